# SPDX-License-Identifier: Apache-2.0
"""Which finished runs are pilots, and what the command makes of them."""

import json
from math import exp

import foresee
import pytest
from run_folders import entry, write_plan, write_run, write_sequence

from cpt_algorithms.report.pilots import pilots_of
from cpt_algorithms.report.run_records import read_runs

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5)


def forgets(share):
    """0 at a quarter."""
    return exp(-8 * share) - exp(-2)


@pytest.fixture
def folder(tmp_path):
    """Two seeds of five shares; one arm of another schedule, and one that has not finished."""
    runs = []
    for seed in (1, 2):
        parent = f'old-s{seed}'
        write_run(tmp_path / parent, {'old': 3.0, 'new': 5.0}, start={'old': 9.0, 'new': 9.0})
        runs.append(entry(parent, 'none', 'old', seed, tokens={'old': 1000}))
        for share in (*SHARES, 'other', 'unfinished'):
            part = 0.3 if isinstance(share, str) else share
            more = {'other': {'scheduler': {'name': 'rewarm_constant'}}, 'unfinished': {'reached': 5}}.get(share, {})
            name, final = f'new-{share}-s{seed}', {'old': 3.0 + forgets(part), 'new': 1 + 0.1 * exp(3 * part)}
            streams = {'old': {'local': 'data/y'}} if part else None
            write_run(tmp_path / name, final, f'{tmp_path}/{parent}/latest-rank0.pt', new='new', replay=streams, **more)
            tokens = {'new': round(1000 * (1 - part)), **({'old': round(1000 * part)} if part else {})}
            runs.append(entry(name, str(share), 'new', seed, parent, tokens))
    write_plan(tmp_path, 'pilots', {'old': 1000, 'new': 1000}, runs)
    return tmp_path


def test_runs_that_differ_in_the_share_alone_are_the_pilots(folder):
    found = pilots_of(read_runs([folder]))
    assert list(found) == ['old']
    assert [(each.seed, each.shares) for each in found['old']] == [(1, SHARES), (2, SHARES)]
    assert found['old'][0].forgetting == pytest.approx([forgets(share) for share in SHARES])
    assert found['old'][1].on_new['new'][-1] == pytest.approx(1 + 0.1 * exp(1.5))


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / 'out'
    out.mkdir()
    foresee.main([str(folder), '--out', str(out / 'share.png'), '--json', str(out / 'share.json')])
    said = ' '.join(capsys.readouterr().out.split())
    assert '25.0 % (25.0 to 25.0)' in said and 'nothing is forgotten' in said
    assert (out / 'share.png').stat().st_size > 10_000
    assert json.loads((out / 'share.json').read_text())['old']['share']['value'] == pytest.approx(0.25, abs=1e-4)
    with pytest.raises(SystemExit, match='no pilot forgets as little as -1'):
        foresee.main([str(folder), '--forgetting', '-1'])


def test_runs_that_are_no_pilots_are_refused(tmp_path):
    write_sequence(tmp_path / 'two')
    with pytest.raises(SystemExit, match='there are 2 shares'):
        foresee.main([str(tmp_path / 'two'), '--forgetting', '0.5'])
    write_run(tmp_path / 'one' / 'scratch-s1', {'old': 3.0}, start={'old': 9.0})
    with pytest.raises(SystemExit, match=r'no finished update of a parent knows what it forgot'):
        foresee.main([str(tmp_path / 'one' / 'scratch-s1')])
