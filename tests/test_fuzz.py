# SPDX-License-Identifier: Apache-2.0
"""Spoilt input is accepted, or refused by one clear error that names a key or a file; in time, and writing nothing.

The default run looks at the same few hundred cases each time; the slow one at thousands, which are others each time
(``pytest -m slow tests/test_fuzz.py -s`` prints the seed; ``FUZZ_SEED=N`` repeats a run).
"""

import contextlib
import copy
import io
import json
import os
import re
import secrets
import signal
from pathlib import Path

import pytest
import tiny
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutations import INTERPOLATIONS, VALUES, names_it, spoil, spoilt
from rich.console import Console

from cpt_algorithms.cost.tables import print_costs, print_stage
from cpt_algorithms.evaluation.suite import load_suite
from cpt_algorithms.launch.launcher import resources_of
from cpt_algorithms.preparation.manifest import FORMAT, Manifest
from cpt_algorithms.replay.shard_index import ShardIndex
from cpt_algorithms.sequence.check import check
from cpt_algorithms.sequence.read import load_yaml
from cpt_algorithms.sequence.show import print_commands, print_runs
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.sequence.sweep import expand_trials, sequence_of, trials_of
from cpt_algorithms.stage.data_checks import find_data_problems
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import parse_section

SECONDS = 20  # of computing, for one input
MINUTES = 5  # of waiting, on a busy machine
FEW = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, derandomize=False)
ALL = VALUES + INTERPOLATIONS


class Hang(BaseException):
    """Nobody takes it for a mistake in a file."""


@contextlib.contextmanager
def in_time():
    """A hang is a failure."""

    def give_up(*_):
        raise Hang(f'no answer after {SECONDS} s of computing, or {MINUTES} min')

    before = [(name, signal.signal(name, give_up)) for name in (signal.SIGALRM, signal.SIGPROF)]
    signal.alarm(60 * MINUTES)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name, handler in before:
            signal.signal(name, handler)


def files(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob('*') if path.is_file()}


def judge(read, value, where, root):
    """Accepted, or refused as the recipes print it. Whatever else it raises goes on, and fails the test."""
    before = files(root)
    try:
        with in_time():
            read(value)
    except ValueError as error:
        said = str(error)
        assert 'not of the form' not in said, f'a check fell over it: {said}'
        assert names_it(said, where), f'{where}: {said}'
    assert files(root) == before, 'reading must write nothing'


def cases(strategy, read, root, examples, slow):
    """Judge many: always the same, or others each time."""
    given_seed = int(os.environ.get('FUZZ_SEED', secrets.randbelow(2**32)))

    @settings(MANY if slow else FEW, max_examples=examples)
    @given(strategy)
    def run(case):
        judge(read, *case, root)

    if slow:
        print(f'FUZZ_SEED={given_seed}')
        run = seed(given_seed)(run)
    run()


SIZES = [pytest.param('few', False), pytest.param('many', True, marks=pytest.mark.slow)]
of_size = pytest.mark.parametrize(('many', 'slow'), SIZES)


# Sequences


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def sequence_spec(root, data):
    infinite = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '2ba', 'alpha_const': 0.5, 't_anneal': '4ba'}
    common = tiny.sequence_common(root, data)
    common['callbacks'] = {'final_loss': {'window': '2ba', 'interval': '1ba'}, 'lawa': {'k': 2, 'interval': '2ba'}}
    return {
        'name': 'fuzz',
        'folder': str(root / 'runs'),
        'jobs': 2,
        'nproc': 1,
        'seeds': [17],
        'variables': {'mine': 1},
        'data': {name: {'local': str(data[name])} for name in ('old', 'new')},
        'stages': {
            'old': {'max_duration': '12ba'},
            'new': {'max_duration': '12ba', 'replay': {'fraction': 0.25, 'weights': {'old': 2}}},
        },
        'arms': {
            'infinite': {
                'common': {'scheduler': infinite},
                'new': {'branches': {'merge': {'merge': {'last': 2, 'every': '2ba'}}, 'long': {'t_anneal': '6ba'}}},
            },
            'kept': {'new': {'optimizer_state': 'keep', 'replay': {'consumed_only': True}}},
            'cold': {'baseline': 'constant_eta_min'},
            'union': {'baseline': 'union'},
        },
        'common': common,
    }


def read_sequence(root):
    """What the recipe does before it trains."""

    def read(spec):
        path = root.parent / f'{root.name}.yaml'
        path.write_text(yaml.safe_dump(spec, allow_unicode=True, sort_keys=False), encoding='utf-8')
        given, runs = tiny.planned(path)
        resources, console = resources_of(given.given), Console(file=io.StringIO(), width=140)
        check(runs, resources.ranks, is_plan=True)
        print_runs(given.name, runs, {}, console)
        print_commands(resources, runs, Path('recipes'), console)
        print_costs({r.name: r.stage for r in runs}, console, gpus=resources.ranks, budgets=given.stage_tokens)

    return read


def test_the_sequence_is_right_as_it_is(sequence_spec, root):
    read_sequence(root)(sequence_spec)


@of_size
def test_sequences(sequence_spec, root, many, slow):
    cases(spoilt(sequence_spec, values=ALL), read_sequence(root), root, 2000 if slow else 40, slow)


@of_size
@pytest.mark.long
def test_sequences_of_the_papers_at_a_small_scale(root, monkeypatch, many, slow):
    """Their plans: the data of all of them may not be here."""
    monkeypatch.chdir(tiny.ROOT)
    spec = load_yaml(['yamls/sequence/programme.yaml'])
    spec['folder'] = str(root / 'programme')

    def read(given):
        path = root.parent / f'{root.name}.yaml'
        path.write_text(yaml.safe_dump(given, allow_unicode=True, sort_keys=False), encoding='utf-8')
        tiny.planned(path)

    cases(spoilt(spec, values=ALL), read, root, 3000 if slow else 60, slow)


@of_size
@pytest.mark.long
def test_scales(root, monkeypatch, many, slow):
    """Both the scale and the sequence that is scaled."""
    monkeypatch.chdir(tiny.ROOT)
    spec = yaml.safe_load(Path('yamls/sequence/pile_german.yaml').read_text(encoding='utf-8'))
    scale = yaml.safe_load(Path('yamls/scales/tiny.yaml').read_text(encoding='utf-8'))

    def read(value):
        paths = [root.parent / f'{root.name}-{name}.yaml' for name in ('sequence', 'scale')]
        for path, content in zip(paths, (value.get('s'), value.get('t')), strict=True):
            path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding='utf-8')
        tiny.planned(paths[0], f'scale={paths[1]}')

    both = {'s': spec, 't': scale}
    read(both)
    cases(spoilt(both, values=ALL), read, root, 2000 if slow else 60, slow)


@pytest.mark.parametrize(
    ('place', 'value'),
    [(('sequence', 'nproc'), {'a': 1}), (('common', 'global_train_batch_size'), {}), (('lr',), 1e30)],
)
def test_what_was_found_in_scales_is_refused(root, monkeypatch, place, value):
    """A mapping where the sequence has none; a rate that takes the weight decay with it."""
    monkeypatch.chdir(tiny.ROOT)
    scale = yaml.safe_load(Path('yamls/scales/tiny.yaml').read_text(encoding='utf-8'))
    spoil(scale, 'put', place, value)
    path = root.parent / f'{root.name}-scale.yaml'
    path.write_text(yaml.safe_dump(scale), encoding='utf-8')
    with pytest.raises(ValueError, match=place[-1]):
        resources_of(tiny.planned('yamls/sequence/pile_german.yaml', f'scale={path}')[0].given)


def test_sweeps(root, sequence_spec):
    sweep = yaml.safe_load((tiny.ROOT / 'yamls/sweeps/eta_max.yaml').read_text(encoding='utf-8'))
    sweep['parameters'] = {
        'new.optimizer.lr': {'values': [3e-4, 1e-2]},
        'new.train_loader.num_workers': {'min': 0, 'max': 1},
    }

    def read(value):
        sequence_of(value)
        expand_trials(SequenceSpec.from_yaml(sequence_spec), trials_of(value)[:3])

    read(sweep)
    cases(spoilt(sweep), read, root, 100, False)


def test_suites(root, monkeypatch):
    suite = yaml.safe_load((tiny.ROOT / 'yamls/eval/offline.yaml').read_text(encoding='utf-8'))

    def read(value):
        path = root.parent / 'suite.yaml'
        path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding='utf-8')
        load_suite(path)

    read(suite)
    cases(spoilt(suite, values=ALL), read, root, 60, False)


# Stages


@pytest.fixture(scope='module')
def stage(root, data):
    replay = {
        'fraction': 0.25,
        'order': 'pretraining',
        'streams': {'old': {'local': str(data['old']), 'split': 'train'}},
    }
    return tiny.config(
        root, data, 'stage',
        train_loader={'dataset': {'replay': replay}},
        eval_loader=[tiny.eval_loader('old', data['old']), tiny.eval_loader('new', data['new'])],
        algorithms={'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0}},
        callbacks={
            'final_loss': {'window': '4ba', 'interval': '2ba'}, 'lawa': {'k': 2, 'interval': '2ba'}, 'ema': {'half_life': '4ba'},
            'forgetting': {'new': ['new'], 'old': ['old']}, 'hf_checkpointer': {'save_folder': str(root / 'stage'), 'save_interval': '8ba'},
        },
        load_path=str(root / 'parent.pt'), load_weights_only=True, eval_first=True, variables={'mine': 1},
    )  # fmt: skip


def read_stage(root):
    def read(value):
        path = root.parent / f'{root.name}-stage.yaml'
        path.write_text(yaml.safe_dump(value, allow_unicode=True, sort_keys=False), encoding='utf-8')
        stage = Stage.read(str(path))
        preflight(stage, 1, parent_is_there=False)
        with contextlib.redirect_stdout(io.StringIO()):
            print_stage(stage, with_cost=True)

    return read


def test_the_stage_is_right_as_it_is(stage, root):
    read_stage(root)(stage)


@of_size
def test_stages(stage, root, many, slow):
    cases(spoilt(stage, values=ALL), read_stage(root), root, 3000 if slow else 80, slow)


# Every place is one at which a traceback was found: (place, value).
FOUND_IN_STAGES = [
    ('max_duration', 'yes'),
    ('max_seq_len', [None]),
    ('max_seq_len', False),
    ('global_train_batch_size', float('nan')),
    ('algorithms', '7ba'),
    ('save_folder', '{nope}'),
    ('save_folder', '%s{}'),
    ('save_num_checkpoints_to_keep', '5 ba'),
    ('save_interval', -0.0),
    ('model.vocab_size', 'text'),
    ('model.max_seq_len', '{nope}'),
    ('model.name', 10**18),
    ('optimizer.name', {}),
    ('optimizer.lr', 'nanba'),
    ('optimizer', {'name': 'decoupled_adamw'}),
    ('callbacks.final_loss.window', {1: 2}),
    ('callbacks.final_loss.interval', 'torch_crossentropy'),
    ('callbacks.lawa.interval', 3),
    ('eval_loader.0.name', float('inf')),
    ('eval_loader.0.dataset.max_seq_len', '1/3'),
    ('eval_loader.0.dataset.local', [[]]),
    ('eval_loader.0.dataset.local', 'x' * 3000),
    ('eval_loader.0.dataset.split', 3),
    ('eval_loader.0.dataset.split', 'x' * 3000),
    ('train_loader.dataset.new.split', 'x' * 3000),
    ('tokenizer.name', 'x' * 3000),
    ('code_paths.0', '../..'),
    ('code_paths.0', 'x' * 3000),
    ('variables', {'lm_eval': -1}),
    ('variables', {'lm_eval': [[]]}),
    ('global_train_batch_size', 10**18),
    # what would have trained nothing, or failed only when the trainer was made
    ('device_train_microbatch_size', 2.5),
    ('device_eval_batch_size', 2.5),
    ('model.n_layers', 0),
    ('model.d_model', 0),
    ('model.d_model', 15),
    ('model.n_heads', 0),
    ('model.expansion_ratio', 0),
    ('model.loss_fn', '/dev/null'),
    ('model.attn_config.attn_impl', '1/3'),
    ('model.init_device', ''),
    ('optimizer.lr', -1e-3),
    ('optimizer.lr', 0),
    ('optimizer.lr', float('nan')),
    ('optimizer.eps', 0),
    ('optimizer.betas', [0.9]),
    ('optimizer.betas.0', 2.5),
    ('optimizer.betas.1', -0.1),
    ('optimizer.betas', [0.9, 0.95, 0.9, 0.95]),
    ('optimizer.weight_decay', -1),
    ('optimizer.weight_decay', 10**18),
    ('algorithms.gradient_clipping.clipping_type', '%s{}'),
    ('algorithms.gradient_clipping.clipping_threshold', 0),
    ('algorithms.gradient_clipping.clipping_threshold', -1),
    ('train_loader.num_workers', -1),
    ('eval_loader.0.num_workers', -1),
    ('eval_loader.0.prefetch_factor', 2),
    ('eval_loader.0.persistent_workers', True),
    ('tokenizer.kwargs.model_max_length', '1dur'),
]


def place_of(path):
    return tuple(int(key) if key.isdigit() else key for key in path.split('.'))


@pytest.mark.parametrize(('path', 'value'), FOUND_IN_STAGES)
def test_what_was_found_in_stages_is_refused(stage, root, path, value):
    changed = copy.deepcopy(stage)
    spoil(changed, 'put', place_of(path), value)
    with pytest.raises(ValueError, match=re.escape(path.partition('.')[0])) as caught:
        read_stage(root)(changed)
    assert 'not of the form' not in str(caught.value)


FOUND_IN_SEQUENCES = [
    ('arms.kept', 3),
    ('arms.kept', '1/0'),
    ('arms.cold.baseline', []),
    ('arms.infinite.common', '1dur'),
    ('stages.new', 10**18),
    ('stages.new.max_duration', 3),
    ('stages.new.max_duration', 'a folder/with spaces'),
    ('stages.new.replay', '0.1dur'),
    ('seeds', 2.5),
    ('seeds.0', '/dev/null'),
    ('seeds', [1, 1]),
    ('jobs', '7ba'),
    ('jobs', 0),
    ('folder', '%s{}'),
    ('data.new', 1e30),
    ('data.new.local', 'x' * 3000),
    ('common.scheduler', '7ba'),
    ('common.scheduler.t_warmup', 5),
    ('common.scheduler', {'name': 'rewarm_cosine', 't_warmup': '2ba', 5: 1}),
    ('common.train_loader.dataset', ' '),
    ('common.callbacks', '-3ba'),
    ('common.callbacks.final_loss', '1/3'),
    ('common.eval_loader', 2.5),
    ('common.max_seq_len', 0),
    ('common.optimizer.lr', -1),
    ('arms.infinite.new.branches.merge.merge', 2.5),
]


@pytest.mark.parametrize(('path', 'value'), FOUND_IN_SEQUENCES)
def test_what_was_found_in_sequences_is_refused(sequence_spec, root, path, value):
    changed = copy.deepcopy(sequence_spec)
    spoil(changed, 'put', place_of(path), value)
    with pytest.raises(ValueError) as caught:
        read_sequence(root)(changed)
    assert names_it(str(caught.value), [place_of(path)]), caught.value


# Indices and manifests


IN_INDEX = [
    *VALUES,
    2**63,
    -(2**63),
    2**40,
    '../../secret',
    '/etc/passwd',
    'a/../../b',
    'pkl',
    'mds',
    'ndarray:int32:8',
]


@pytest.fixture(scope='module')
def index(root, data):
    return json.loads((data['old'] / 'train' / 'index.json').read_text())


def read_index(root):
    def read(value):
        path = root.parent / 'index.json'
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        read = ShardIndex.read(path)
        assert read.samples.min(initial=0) >= 0
        for number in range(len(read)):
            for file in read.reader(number, '/folder', 'train').file_pairs[0]:
                assert file is None or os.path.normpath(f'/folder/{file.basename}').startswith('/folder/')
        read.cached([str(root / 'shard.00000.mds')], str(root))

    return read


@of_size
def test_indices(index, root, many, slow, monkeypatch):
    named = [('index.json',)]
    strategy = spoilt(index, values=IN_INDEX, most=3).map(lambda case: (case[0], named))
    cases(strategy, read_index(root), root, 5000 if slow else 250, slow)


@of_size
def test_indices_of_a_broken_disk(index, root, many, slow):
    """Cut anywhere, bytes changed, or something else altogether."""
    text = json.dumps(index).encode()
    cut = st.integers(0, len(text) - 1).map(lambda end: text[:end])
    bit = st.tuples(st.integers(0, len(text) - 1), st.integers(0, 255)).map(
        lambda at: text[: at[0]] + bytes([at[1]]) + text[at[0] + 1 :]
    )
    other = st.sampled_from(
        [
            b'',
            b'\0' * 99,
            b'[]',
            b'null',
            b'{"shards": []}',
            b'{"shards": [' + b'[' * 5000,
            b'{"version": 2, "shards": [5]}',
        ]
    )
    strategy = st.one_of(cut, bit, other, st.binary(max_size=200)).map(lambda value: (value, [('index.json',)]))
    cases(strategy, read_index(root), root, 5000 if slow else 150, slow)


_DATASET = {
    **dict.fromkeys(('files', 'rows', 'skipped', 'broken', 'parts'), 0),
    **{'first_broken': [], 'splits': {}, 'sources': {}, 'lm_eval': {}},
}
_TOKENIZER = {'vocab_size': 280, 'eos_token': 'x', 'eos_token_id': 0, 'hash': 'abc', 'files': ['tokenizer.json']}
MANIFEST = {
    'request': {
        **{'format': FORMAT, 'eos_text': None, 'val_fraction': 0.1, 'datasets': ['old=text:a', 'new=text:b']},
        **{'files': {}, 'earlier': {}, 'max_seq_len': 16},
    },
    'tokenizer': {**_TOKENIZER, 'document_start': [], 'document_end': ['x']},
    'datasets': {'old': copy.deepcopy(_DATASET), 'new': copy.deepcopy(_DATASET)},
    'earlier': {'before': ['old=text:c']},
    'engine': 'local',
    'versions': {},
}


def test_manifests(root, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('prepared')
    cfg = tiny.config(root, data, 'manifest', train_loader={'dataset': {'new': {'local': str(folder / 'new')}}})
    cfg['eval_loader'] = [{**tiny.eval_loader('old', folder / 'old')}]
    stage = Stage.from_yaml(cfg)

    def read(value):
        (folder / 'manifest.json').write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        list(find_data_problems(stage, False))

    parse_section(Manifest, MANIFEST)
    read(MANIFEST)
    (folder / 'manifest.json').write_bytes(b'{"request": ')
    with pytest.raises(ValueError, match=r'manifest\.json cannot be read'):
        list(find_data_problems(stage, False))
    strategy = spoilt(MANIFEST, values=IN_INDEX).map(lambda case: (case[0], [('manifest.json',)]))
    cases(strategy, read, root, 60, False)
