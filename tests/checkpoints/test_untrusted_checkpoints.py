# SPDX-License-Identifier: Apache-2.0
"""No checkpoint runs code of its own, and a damaged one is named; each is shown to be dangerous with the stock stack."""

import io
import json
import os
import pickle
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from composer.core import State
from composer.utils import checkpoint
from composer.utils.checkpoint import FileSystemReaderWithValidation, dist_cp_load
from spoilt_checkpoints import Evil, evil_algorithm, evil_metadata, put_entry, rewrite, saved
from torch.distributed.checkpoint.api import CheckpointException

from cpt_algorithms.checkpoints.errors import CheckpointError, UnsafeCheckpointError
from cpt_algorithms.checkpoints.guard import HOOK, guard_loading, is_safe
from cpt_algorithms.checkpoints.open import read_metadata, safe_globals
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError

WHAT_TO_DO = r'set callbacks\.stage_start\.trust_checkpoint: true if you trust whoever made it'


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the guard sets ends with each test."""
    monkeypatch.setenv(HOOK, '')
    monkeypatch.delenv(HOOK)
    monkeypatch.setattr(checkpoint, 'tarfile', tarfile)


def load(path: Path):
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    """A run of two batches with a checkpoint of each."""
    folder = tmp_path_factory.mktemp('trained')
    tiny.run(tiny.config(folder, data, 'run', max_duration='2ba', save_interval='1ba', scheduler={'t_max': '8ba'}))
    return folder


def config(folder: Path, data, place: str, **over):
    """A stage that loads ``ep0-ba2-rank0.pt`` of ``folder / 'run'``, as its parent or to go on from."""
    if place == 'load_path':
        parent = str(folder / 'run' / 'ep0-ba2-rank0.pt')
        base = {'load_path': parent, 'load_weights_only': True, 'max_duration': '1ba', 'scheduler': {'t_max': '8ba'}}
        return tiny.merge(tiny.config(folder, data, 'child', **base), over)
    return tiny.merge(tiny.config(folder, data, 'run', max_duration='3ba', scheduler={'t_max': '8ba'}), over)


def write_record(run: Path, cfg: dict) -> None:
    """Whose checkpoints these are."""
    (run / 'stage.json').write_text(json.dumps({'run_name': 'run', 'config': cfg}))


def spoil(path: Path, kind: str, sign: Path) -> None:
    """Put what is evil into a ``.pt`` file."""
    content = load(path)
    if kind == 'pickle':
        content['extra'] = Evil(sign)
    else:
        content['state']['algorithms'] = evil_algorithm(sign)
    torch.save(content, path)


@pytest.mark.parametrize(
    ('kind', 'place'),
    [
        ('pickle', 'load_path'),
        ('text that Composer evaluates', 'newest of its own'),
        pytest.param('pickle', 'newest of its own', marks=pytest.mark.slow),
        pytest.param('text that Composer evaluates', 'load_path', marks=pytest.mark.slow),
    ],
)
def test_a_pt_file_that_runs_code(kind, place, trained, data, tmp_path):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    sign, checkpoint = tmp_path / 'sign', tmp_path / 'run' / 'ep0-ba2-rank0.pt'
    spoil(checkpoint, kind, sign)
    write_record(tmp_path / 'run', config(tmp_path, data, 'newest of its own'))
    before = checkpoint.read_bytes()
    cfg = config(tmp_path, data, place)
    what = 'asks to import posix.system' if kind == 'pickle' else "Composer would evaluate 'BlurPool"

    with pytest.raises(UnsafeCheckpointError, match=WHAT_TO_DO) as refused:
        tiny.run(cfg)  # plain llm-foundry, with stage_start
    assert str(refused.value).startswith(f'{checkpoint} is not safe to read: ') and what in str(refused.value)
    assert '\n' not in str(refused.value)
    with pytest.raises(SystemExit, match=WHAT_TO_DO) as stopped:
        tiny.recipe_here(cfg, tmp_path)
    assert what in str(stopped.value) and str(checkpoint) in str(stopped.value)
    del stopped, refused  # through which the run's lock lives on
    assert not sign.exists()
    assert checkpoint.read_bytes() == before

    # what the stock stack does, and the user has asked for
    trusting = tiny.merge(cfg, {'callbacks': {'stage_start': {'trust_checkpoint': True}}})
    tiny.recipe_here(trusting, tmp_path)
    assert (tmp_path / cfg['run_name'] / 'done.json').exists()
    assert sign.exists()


def test_a_trusted_run_that_only_lacks_its_export(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    spoil(tmp_path / 'run' / 'ep0-ba2-rank0.pt', 'pickle', tmp_path / 'sign')
    trusting = {'callbacks': {'stage_start': {'trust_checkpoint': True}}}
    cfg = config(tmp_path, data, 'newest of its own', max_duration='2ba', **trusting)
    write_record(tmp_path / 'run', cfg)
    tiny.recipe_here(cfg, tmp_path)
    assert json.loads((tmp_path / 'run' / 'done.json').read_text())['batch'] == 2


def test_a_parent_in_object_storage(trained, data, tmp_path, bucket):
    shutil.copytree(trained / 'run', tmp_path / 'run', symlinks=True)
    sign, checkpoint = tmp_path / 'sign', tmp_path / 'run' / 'ep0-ba2-rank0.pt'
    spoil(checkpoint, 'pickle', sign)
    bucket.upload_file(str(checkpoint), 'bucket', 'run/ep0-ba2-rank0.pt')
    cfg = config(tmp_path, data, 'load_path', load_path='s3://bucket/run/ep0-ba2-rank0.pt')
    with pytest.raises(SystemExit, match='asks to import posix.system') as stopped:
        tiny.recipe_here(cfg, tmp_path)
    assert str(stopped.value).endswith('(copied from load_path=s3://bucket/run/ep0-ba2-rank0.pt)')
    assert not sign.exists() and not list((tmp_path / 'child').glob('ep*'))


@pytest.mark.parametrize('place', ['load_path', 'newest of its own'])
def test_a_pt_file_that_is_cut_off(place, trained, data, tmp_path):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    checkpoint = tmp_path / 'run' / 'ep0-ba2-rank0.pt'
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').glob('*') if path.is_file()}
    cfg = config(tmp_path, data, place)
    with pytest.raises(CheckpointError, match=r'ep0-ba2-rank0\.pt is damaged: it is cut off') as refused:
        tiny.run(cfg)
    assert '\n' not in str(refused.value)
    if place == 'load_path':
        with pytest.raises(SystemExit, match=r'ep0-ba2-rank0\.pt is damaged: it is cut off'):
            tiny.recipe_here(cfg, tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / 'run').glob('*') if path.is_file()} == before


@pytest.mark.parametrize('lost', [4, 1])
def test_a_tensor_that_lacks_its_bytes(lost, tmp_path):
    """Torch maps such a file without an error."""
    path = tmp_path / 'ep0-ba2-rank0.pt'
    torch.save({'state': {'model': {'a': torch.ones(1), 'b': torch.ones(5)}}}, path)
    assert is_safe(path)

    def cut_short(members):
        members[:] = [(name, data[:-lost] if name.endswith('data/0') else data) for name, data in members]

    rewrite(path, cut_short)
    with pytest.raises(CheckpointError, match='a tensor reaches beyond its storage'):
        is_safe(path)


def test_an_archive_is_refused(trained, data, tmp_path):
    """Composer extracts ``load_path: x.tar``, wherever its members say."""
    spoilt = tmp_path / 'run' / 'parent.tar'
    spoilt.parent.mkdir()
    with tarfile.open(spoilt, 'w') as archive:
        archive.add(trained / 'run' / 'ep0-ba2-rank0.pt', 'composer_states.pt')
        archive.addfile(tarfile.TarInfo(f'../../../../../../..{tmp_path}/sign'), io.BytesIO())
    cfg = config(tmp_path, data, 'load_path', load_path=str(spoilt))
    with pytest.raises(UnsafeCheckpointError, match=f'is an archive.*{WHAT_TO_DO}'):
        tiny.run(cfg)
    assert not (tmp_path / 'sign').exists()
    tiny.run(tiny.merge(cfg, {'callbacks': {'stage_start': {'trust_checkpoint': True}}}))
    assert (tmp_path / 'sign').exists()


# Sharded checkpoints, as Composer reads them; with ranks in untrusted_cases.py


@pytest.fixture
def shards(tmp_path) -> Path:
    """What torch writes: a tensor and two other entries."""
    content = {
        'state': {
            'model': {'w': torch.ones(4)},
            'run_name': 'x',
            'algorithms': [('NoOpModel', {'repr': 'NoOpModel()'})],
        }
    }
    dcp.save(content, checkpoint_id=tmp_path / 'ep0-ba2')
    return tmp_path / 'ep0-ba2'


def load_shards(folder: Path) -> dict:
    content = {'state': {'model': {'w': torch.zeros(4)}, 'run_name': '', 'algorithms': []}}
    reader = FileSystemReaderWithValidation(str(folder))
    reader.read_metadata()  # as Composer does first
    dist_cp_load(content, reader)
    return content['state']


def message_of(folder: Path) -> str:
    """The refusal of our check."""
    guard_loading()
    try:
        load_shards(folder)
    except CheckpointError as error:
        return str(error)
    except CheckpointException as failures:
        ((error, _),) = failures.failures.values()
        assert isinstance(error, CheckpointError), error
        return str(error)
    raise AssertionError('was not refused')


SPOIL = {
    'metadata': (evil_metadata, '.metadata', 'it asks to import posix.system'),
    'entry': (lambda f, sign: put_entry(f, 'state.run_name', saved(Evil(sign))), '__0_0.distcp', 'it asks to import posix.system'),
    'algorithm': (
        lambda f, sign: put_entry(f, 'state.algorithms', saved(evil_algorithm(sign))), '__0_0.distcp',
        "Composer would evaluate 'BlurPool(min_channels=__import__",
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', SPOIL)
def test_a_sharded_checkpoint_that_runs_code(kind, shards):
    spoilt, file, what = SPOIL[kind]
    sign = shards.parent / 'sign'
    assert load_shards(shards)['run_name'] == 'x'
    spoilt(shards, sign)
    message = message_of(shards)
    assert message.startswith(f'{shards}/{file} is not safe to read: {what}')
    assert message.endswith('; set callbacks.stage_start.trust_checkpoint: true if you trust whoever made it')
    assert not sign.exists()
    guard_loading(trust=True)
    with suppress(AttributeError, ValueError):  # what evil leaves behind is no metadata, and this no State
        State._apply_required_algorithms(SimpleNamespace(algorithms=[]), load_shards(shards), None)
    assert sign.exists()


def test_good_sharded_checkpoints_are_loaded_the_same(shards):
    guard_loading()
    loaded = load_shards(shards)
    assert torch.equal(loaded['model']['w'], torch.ones(4)) and loaded['algorithms'][0][0] == 'NoOpModel'


def test_a_sharded_checkpoint_that_is_cut_off(shards):
    file = shards / '__0_0.distcp'
    size = file.stat().st_size
    os.truncate(file, size - 10)
    assert f'{file} is damaged: it has {size - 10:,} bytes, of which {size:,} are to be read' in message_of(shards)
    file.unlink()
    assert f'{file} is missing' in message_of(shards)
    os.truncate(shards / '.metadata', 100)
    assert message_of(shards).startswith(f'{shards}/.metadata is damaged: ')


def test_metadata_leads_nowhere_else(shards):
    """Composer downloads each file to where its name leads."""
    found = read_metadata(shards)
    for info in found.storage_data.values():
        info.relative_path = '../sign'
    (shards / '.metadata').write_bytes(pickle.dumps(found))
    assert "it names '../sign', outside the folder" in message_of(shards)


@pytest.mark.parametrize(
    ('algorithm', 'is_evaluated_safely'),
    [
        (('NoOpModel', {'repr': 'NoOpModel()'}), True),
        (('LowPrecisionLayerNorm', {'repr': 'LowPrecisionLayerNorm(apply_at=Event.INIT)'}), True),
        (('Alibi', {'repr': 'Alibi(max_sequence_length=-1,train_sequence_length_scaling=0.25)'}), True),
        (('Mine', {'repr': '<my.Mine object at 0x7f>'}), True),  # cannot be evaluated
        (('NoOpModel', {'repr': 'NoOpModel() or exit()'}), False),
        (('NoOpModel', {'repr': 'NoOpModel(x=(lambda: 1))'}), False),
        (('NoOpModel', {'repr': 'NoOpModel(x=[y for y in (1,)])'}), False),
        (('NoOpModel', {'repr': 'warnings.sys.exit()'}), False),
        (('X', {'repr': "X(replace_convs=True, drop='linear')"}), True),
        (['NoOpModel', {'repr': 'NoOpModel(x=[0 for warnings.sys in [1]])'}], False),
        (['NoOpModel', {'repr': 'NoOpModel(0 for warnings.sys in x)'}], False),
        (['NoOpModel', {'repr': 'NoOpModel()()'}], False),
    ],
)
def test_what_composer_would_evaluate(algorithm, is_evaluated_safely, tmp_path):
    torch.save({'state': {'algorithms': [algorithm]}}, tmp_path / 'x.pt')
    if is_evaluated_safely:
        assert is_safe(tmp_path / 'x.pt')
    else:
        with pytest.raises(UnsafeCheckpointError, match='Composer would evaluate'):
            is_safe(tmp_path / 'x.pt')


def test_another_check_in_the_environment_is_not_replaced(monkeypatch):
    monkeypatch.setenv(HOOK, 'my.check')
    with pytest.raises(ValueError, match=f'{HOOK}=my.check in the environment'):
        guard_loading()
    guard_loading(trust=True)
    assert os.environ[HOOK] == 'my.check'


def test_trust_is_true_or_false(data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'x', callbacks={'stage_start': {'trust_checkpoint': 'no'}})
    with pytest.raises(ConfigError, match="trust_checkpoint='no' .*true or false"):
        preflight(Stage.from_yaml(cfg))


def test_a_pretrained_model_that_brings_code_along(data, tmp_path):
    """llm-foundry's default is to run it."""
    folder, sign = tmp_path / 'model', tmp_path / 'sign'
    folder.mkdir()
    auto_map = '{"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "configuration_x.X"}'
    (folder / 'config.json').write_text(f'{{"model_type": "x", "auto_map": {auto_map}}}')
    (folder / 'configuration_x.py').write_text(
        f'from transformers import PretrainedConfig\nopen({str(sign)!r}, "w")\nclass X(PretrainedConfig): pass\n'
    )
    model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(folder), 'pretrained': False}
    cfg = {**tiny.config(tmp_path, data, 'x'), 'model': model}
    with pytest.raises(ConfigError, match='trust_remote_code=True'):
        preflight(Stage.from_yaml(cfg))
    assert not sign.exists()
    with pytest.raises(ConfigError, match='model cannot be built'):  # it is no model
        preflight(Stage.from_yaml({**cfg, 'model': {**model, 'trust_remote_code': True}}))
    assert sign.exists()


@pytest.mark.slow
def test_sharded_checkpoints_of_two_ranks(data, tmp_path):
    """Several runs in one launch; untrusted_cases.py asserts on both ranks and prints a line for each case."""
    sharded = {'fsdp_config': {'state_dict_type': 'sharded'}, 'max_duration': '3ba', 'scheduler': {'t_max': '8ba'}}
    path = tiny.save(tiny.config(tmp_path, data, 'run', **sharded), tmp_path / 'case.yaml')
    printed = tiny.launch(tiny.ROOT / 'tests' / 'checkpoints' / 'untrusted_cases.py', path)
    cases = ['load_path metadata', 'load_path entry', *(f'resume {kind}' for kind in SPOIL), 'cut off']
    for case in cases:
        assert f'{case}: ok' in printed, printed[-6000:]
