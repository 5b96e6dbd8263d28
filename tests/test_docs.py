# SPDX-License-Identifier: Apache-2.0
"""What the README, the cards and the YAMLs say is true: they are parsed, built and checked here."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections import Counter
from importlib.metadata import entry_points

import numpy as np
import pytest
import yaml
from llmfoundry import registry
from llmfoundry.utils.builders import build_callback, build_scheduler
from omegaconf import OmegaConf
from tiny import ROOT

import cpt_algorithms
from cpt_algorithms.report.tables import over_seeds
from cpt_algorithms.sequence.expand import expand
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.sequence.sweep import sequence_of, trials_of
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'cpt_algorithms').rglob('*.md'))]
YAMLS = sorted((ROOT / 'yamls').rglob('*.yaml'))
TRAIN_YAMLS = [
    path for path in YAMLS if path.parent.name not in ('eval', 'models', 'scales', 'sweeps')
]  # those have tests of their own
TRACKED = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def blocks(page, language):
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


def test_there_is_a_card_for_every_folder_and_it_is_in_the_readme():
    folders = {path.parent for path in (ROOT / 'cpt_algorithms').glob('*/__init__.py')}
    assert {page.parent for page in PAGES} == {ROOT, *folders}
    for folder in folders:
        assert f'(cpt_algorithms/{folder.name}/README.md)' in PAGES[0].read_text()


CLAIMS, BENCH = ROOT / 'yamls' / 'claims', ROOT / 'scripts' / 'benchmarks'
TABLES = [CLAIMS / 'README.md', BENCH / 'README.md']  # of numbers, beside what they were made with


@pytest.mark.parametrize('page', PAGES + TABLES, ids=lambda page: page.parent.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r'\b((?:recipes|scripts|yamls|cpt_algorithms)/[\w./]+\.(?:py|yaml))', text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name)
def test_yaml_blocks_build(page):
    for text in blocks(page, 'yaml'):
        if 'parameters:' in text:
            sweep = yaml.safe_load(text)
            assert sequence_of(sweep)
            assert trials_of(sweep)
            continue
        cfg = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        if 'scheduler' in cfg:
            section = dict(cfg['scheduler'])
            build_scheduler(section.pop('name'), section)
        for name, arguments in (cfg.get('callbacks') or {}).items():
            build_callback(name, arguments)


def test_verdicts_are_those_of_the_kept_results():
    found = json.loads((CLAIMS / 'results.json').read_text())['findings']
    rows = {
        line.split()[1]: line.split('|')[-2].strip()
        for line in TABLES[0].read_text().splitlines()
        if re.match(r'\| [CW]\d+ [A-Z1]', line)
    }
    assert rows == {each['claim']: each['verdict'] for each in found}
    counts = Counter(rows.values())
    said = f'{len(rows)} claims](yamls/claims/README.md), {counts["reproduced"]} are reproduced'
    assert said in ' '.join(PAGES[0].read_text().split())
    assert f'{counts["not reproduced"]} are not' in PAGES[0].read_text()


def test_speeds_are_those_of_the_kept_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import summary

    rows = [line for line in summary.page(summary.lines_of(BENCH / 'results')).splitlines() if line.startswith('| ')]
    shown = [line for line in TABLES[1].read_text().splitlines() if line.startswith('| ')]
    assert shown == rows
    step = json.loads((BENCH / 'results' / 'training_step.json').read_text())['step']
    ratio = over_seeds(np.divide(step['ours'], step['stock']).tolist())
    interval = f'{ratio.mean:.3f}, 95 % interval {ratio.mean - ratio.half:.3f} to {ratio.mean + ratio.half:.3f}'
    assert interval in ' '.join(TABLES[1].read_text().split())
    said = f'{ratio.mean:.3f} times a stock training step ({interval.partition(", ")[2]})'
    assert said in ' '.join(PAGES[0].read_text().split())


def test_what_mutants_are_tested_with_is_there():
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['mutmut']
    for each in settings['pytest_add_cli_args_test_selection']:
        path, _, test = each.removeprefix('--deselect=').partition('::')
        assert not test or f'def {test}(' in (ROOT / path).read_text(), each
    assert all((ROOT / path).is_file() for path in settings['only_mutate'])


def test_registered_names_are_those_the_readme_lists():
    ours = {
        point.name
        for group in ('schedulers', 'callbacks', 'callbacks_with_config', 'dataloaders')
        for point in entry_points(group=f'llmfoundry_{group}')
        if point.value.startswith('cpt_algorithms')
    }
    table = PAGES[0].read_text().split('| part | YAML name |')[1].split('\n\n')[0]
    cells = ' '.join(line.split('|')[2] for line in table.splitlines() if '](' in line)
    assert ours == set(re.findall(r'`(\w+)`', cells))
    for kind in (registry.schedulers, registry.callbacks, registry.callbacks_with_config, registry.dataloaders):
        built_in = {name for name in kind.get_all() if name not in kind.get_entry_points()}
        assert not ours & built_in, 'an entry point would silently replace a built-in of LLM Foundry'


COMMANDS = {  # of which some are on several pages
    command: pytest.param(command, id=f'{page.parent.name}: {command[:60]}')
    for page in [*PAGES, *sorted((ROOT / 'cpt_algorithms').rglob('[a-z]*.md')), *TABLES]
    for text in blocks(page, 'bash')
    for command in (' '.join(line.partition(' #')[0].split()) for line in text.replace('\\\n', ' ').splitlines())
    if command and not command.startswith(('#', 'export '))
}.values()
# of others, and what this machine has not: a bucket, W&B's server
FOREIGN = {'aws', 'wandb', 'pip', 'uv'}


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_understood(command, monkeypatch):
    """Each command of ours is parsed by its own parser; what trains and reads no data is run."""
    for part in command.split('&&'):
        words = [word for word in shlex.split(part) if not re.fullmatch(r'[A-Z_]+=.*', word)]
        scripts = [word for word in words if re.fullmatch(r'(recipes|scripts)/.*\.py', word)]
        if words[0] == 'make':
            subprocess.run(['make', '-n', *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] in ('llmfoundry', 'pytest'):
            assert all((ROOT / word).exists() for word in words if word.startswith('tests/'))
        elif words[0] not in FOREIGN:
            [script] = scripts
            understands(ROOT / script, words[words.index(script) + 1 :], monkeypatch)


def understands(script, words, monkeypatch):
    class Parsed(Exception):
        pass

    def parsed(parse):
        def stop(self, *args, **kwargs):
            parse(self, *args, **kwargs)
            raise Parsed

        return stop

    for name in ('parse_args', 'parse_intermixed_args'):
        monkeypatch.setattr(ArgumentParser, name, parsed(getattr(ArgumentParser, name)))
    monkeypatch.setattr(sys, 'argv', [str(script), *words])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name='__main__')


@pytest.mark.parametrize(
    'command',
    [each for each in COMMANDS if re.match(r'python scripts/(estimate_cost|plot_schedules).* yamls/', each.values[0])],
)
def test_commands_that_need_no_data_are_run(command, tmp_path, monkeypatch, capsys):
    words = [str(tmp_path / word) if word.endswith('.png') else word for word in shlex.split(command)[1:]]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', words)
    monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
    runpy.run_path(words[0], run_name='__main__')
    assert capsys.readouterr().out or list(tmp_path.iterdir())


def test_what_the_readme_says_is_where_it_says():
    said = ' '.join(PAGES[0].read_text().split('Where is ...')[1].split('## Develop')[0].split())
    places = re.findall(r'`([\w/]+\.py): ([^`]+)`', said)
    assert len(places) >= 7
    for path, names in places:
        text = (ROOT / 'cpt_algorithms' / path).read_text()
        for name in re.split(r', |\.', names):
            assert re.search(rf'^ *(def|class) {name}\b', text, re.MULTILINE), (path, name)


def test_public_names_are_listed_and_exist():
    assert cpt_algorithms.__all__ == sorted(cpt_algorithms.__all__)
    for name in cpt_algorithms.__all__:
        assert getattr(cpt_algorithms, name).__doc__


def test_the_readmes_tree_is_the_repositorys():
    tree = PAGES[0].read_text().split('```\ncpt_algorithms/')[1].split('```')[0]
    named = set(re.findall(r'^(\w+)/', 'cpt_algorithms/' + tree, re.MULTILINE))
    tracked = {path.split('/')[0] for path in TRACKED if '/' in path and not path.startswith('.')}
    assert named == tracked


def test_every_recipe_has_yamls():
    # a branch takes the YAML of its trunk, a merge the one that a sequence writes
    recipes = {path.stem for path in (ROOT / 'recipes').glob('*.py')} - {'anneal', 'merge'}
    assert recipes == {path.parent.name for path in TRAIN_YAMLS} - {'claims'}


@pytest.mark.parametrize('path', YAMLS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_yaml_has_a_header(path):
    header = path.read_text().split('\n')[:3]
    assert all(line.startswith('#') for line in header), 'a header: what, launch, tokens'


@pytest.fixture(scope='module')
def big_data(tmp_path_factory, data):
    """Datasets as large as the YAMLs need, of the same rows again and again."""
    from streaming import MDSWriter

    root = tmp_path_factory.mktemp('big')
    shutil.copytree(data['tokenizer'], root / 'tokenizer')
    (root / 'lm_eval').mkdir()
    for name in ('python', 'cpp'):
        for kind in ('passages', 'continuations'):
            (root / 'lm_eval' / f'{name}_{kind}.jsonl').touch()
    rows = np.random.default_rng(0).integers(0, 512, (8, 128), dtype=np.int32)
    for name in ('python', 'cpp'):
        for split, samples in (('train', 33_600), ('val', 160)):
            with MDSWriter(out=str(root / name / split), columns={'tokens': 'ndarray:int32:128'}) as writer:
                for index in range(samples):
                    writer.write({'tokens': rows[index % 8]})
    return root


# the papers' data are not here: tests/sequence/test_paper_yamls.py
ON_A_LAPTOP = [path for path in TRAIN_YAMLS if 'data/quickstart' in path.read_text()]


@pytest.mark.parametrize('path', ON_A_LAPTOP, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_yaml_passes_preflight(path, big_data, tmp_path):
    cfg = OmegaConf.load(path)
    key = 'root' if 'root' in cfg.variables else 'data'
    cfg.variables[key] = str(big_data)
    spec = OmegaConf.to_container(cfg, resolve=True)
    if path.parent.name == 'sequence':
        stages = [run.stage for run in expand(SequenceSpec.from_yaml({**spec, 'folder': str(tmp_path)}))]
    else:
        stages = [Stage.from_yaml({'load_path': 'parent.pt', **spec, 'save_folder': str(tmp_path)})]
    for stage in stages:
        preflight(stage, parent_is_there=False)
