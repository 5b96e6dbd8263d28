# SPDX-License-Identifier: Apache-2.0
"""The page, printed by a browser on both paper sizes: no row of a table has lost a column, or a part of a number."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from run_folders import write_sequence
from test_report import benchmark

from cpt_algorithms.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
SIZES = {'a4': (595, 842), 'letter': (612, 792)}  # in points
MARGIN = 30


class Rows(HTMLParser):
    """Every row of the tables that are for paper, without white space: not of those that are only for screens."""

    def __init__(self):
        super().__init__()
        self.rows, self.is_shown, self.is_cell = [], False, False

    def handle_starttag(self, tag, attributes):
        if tag == 'div':
            self.is_shown = 'whole' not in (dict(attributes).get('class') or '').split()
        elif tag == 'tr' and self.is_shown:
            self.rows.append('')
        self.is_cell = self.is_shown and (self.is_cell or tag in {'th', 'td'})

    def handle_endtag(self, tag):
        self.is_cell = self.is_cell and tag not in {'th', 'td'}

    def handle_data(self, data):
        if self.is_cell:
            self.rows[-1] += ''.join(data.split())


def ends_of_numbers(page):
    """Where on the page each number ends, about: a digit is half as wide as its letters are high, or wider."""
    ends = {}

    def visit(text, cm, tm, font, size):
        if re.fullmatch(r'[-+±≈]?\s?\d[\d.,]*( %)?', text.strip()):
            x, scale = tm[4] * cm[0] + tm[5] * cm[2] + cm[4], abs(tm[0] * cm[0] + tm[1] * cm[2])
            ends[x + 0.5 * scale * size * len(text.strip())] = text.strip()

    page.extract_text(visitor_text=visit)
    return ends


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='no chromium')
@pytest.mark.parametrize('size', SIZES)
def test_every_number_and_name_of_the_tables_is_on_paper(size, tmp_path):
    import pypdf

    small = write_sequence(tmp_path / 'small', seeds=(1, 2), averages=('lawa', 'ema_100ba'))
    large = [write_sequence(tmp_path / str(size), seeds=(1,), parameters=size) for size in (125_000_000, 405_000_000)]
    for name in ('old-s1', 'new-none-s1', 'new-r25-s1'):
        benchmark(small / name, 3)
    for name, folders in {'one': [small], 'three': [small, *large]}.items():
        text = write_report(folders, tmp_path / name).path.read_text()
        page, pdf = tmp_path / name / 'page.html', tmp_path / name / 'page.pdf'
        assert text.count('@page {') == 1
        page.write_text(text.replace('@page {', f'@page {{ size: {size};'))
        command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/chromium']
        command += ['--no-pdf-header-footer', f'--print-to-pdf={pdf}', page.as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        paper = pypdf.PdfReader(pdf)
        assert {(round(each.mediabox.width), round(each.mediabox.height)) for each in paper.pages} == {SIZES[size]}
        ends = {end: text for each in paper.pages for end, text in ends_of_numbers(each).items()}
        assert len(ends) > 20 and {end: text for end, text in ends.items() if end > SIZES[size][0] - MARGIN} == {}
        printed = [''.join(each.extract_text().split()) for each in paper.pages]
        rows = Rows()
        rows.feed(text)
        assert len(rows.rows) > 20
        assert [row for row in rows.rows if not any(row in each for each in printed)] == []
