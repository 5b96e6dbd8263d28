# SPDX-License-Identifier: Apache-2.0
"""A spoilt checkpoint is read as what is in it, or refused in one line that names it, by each of its readers.

It runs no code, writes nothing, and reads nothing that the libraries would not read. ``spoilt_checkpoints.py`` spoils. The slow run looks at thousands (``FUZZ_SEED=N`` repeats one, ``FUZZ_SEED=N-17`` its 17th case alone).
"""

import os
import random
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

import average_checkpoints
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from spoilt_checkpoints import PT, SAFETENSORS, SHARDED, spoilt_copy

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.guard import is_safe
from cpt_algorithms.checkpoints.open import dataset_state_of, open_checkpoint, read_metadata, safe_globals
from cpt_algorithms.stage.preflight import PreflightError, preflight
from cpt_algorithms.stage.stage import Stage


@pytest.fixture(scope='module')
def originals(data, tmp_path_factory):
    """The same run as Composer's file, as torch's shards and as a model of several safetensors files."""
    folder = tmp_path_factory.mktemp('originals')
    averages = {'ema': {'half_life': '2ba'}, 'lawa': {'k': 2, 'interval': '1ba'}}
    tiny.run(
        tiny.config(
            folder, data, 'run', max_duration='2ba', save_interval='2ba', scheduler={'t_max': '8ba'}, callbacks=averages
        )
    )
    made = {
        kind: folder / name for kind, name in [('pt', 'ep0-ba2-rank0.pt'), ('sharded', 'ep0-ba2'), ('hf', 'ep0-ba2-hf')]
    }
    shutil.copyfile(folder / 'run' / 'ep0-ba2-rank0.pt', made['pt'])
    with torch.serialization.safe_globals(safe_globals()):
        content = torch.load(made['pt'], weights_only=True)
    del content['state']['optimizers']
    del content['state']['integrations']['huggingface']['tokenizer']  # an entry for each of its tokens
    dcp.save(content, checkpoint_id=made['sharded'])
    average_checkpoints.main([str(made['pt']), '--out', str(made['hf']), '--max-shard-size', '8KB'])
    return made


def files(folder: Path) -> dict:
    """All that is there."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob('*')
    }


def refusal(read, path: Path) -> str | None:
    """How a reader refuses; None if it reads. Anything but a refusal fails."""
    try:
        read(path)
    except (CheckpointError, PreflightError) as error:
        return str(error)
    return None


def average(path: Path, out: Path, capsys) -> str | None:
    """The same for the command line."""
    try:
        average_checkpoints.main([str(path), '--out', str(out), '--to', 'pt'])
    except SystemExit as stopped:
        assert stopped.code == 2
        said = capsys.readouterr().err
        assert 'Traceback' not in said, said
        return said.strip().splitlines()[-1]
    return None


def inside(path: Path) -> dict[str, torch.Tensor]:
    """What the libraries that wrote it find there."""
    if path.is_file():
        with torch.serialization.safe_globals(safe_globals()):
            model = torch.load(path, weights_only=True, map_location='cpu')['state']['model']
    elif (path / '.metadata').exists():
        there = read_metadata(path).state_dict_metadata
        keys = [key for key in there if key.startswith('state.model.')]
        flat = {key: torch.zeros(there[key].size, dtype=there[key].properties.dtype) for key in keys}
        dcp.load(flat, checkpoint_id=path, no_dist=True)
        model = {key.removeprefix('state.model.'): value for key, value in flat.items()}
    else:
        model = {key: value for file in sorted(path.glob('*.safetensors')) for key, value in load_file(file).items()}
    return {key.removeprefix('model.'): value for key, value in model.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bits, so that NaN is NaN."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def as_composer_does(path: Path) -> None:
    """Ask our check, and if it finds nothing unpickle it as Composer does: torch may refuse, but runs no code."""
    if path.is_file():
        is_safe(path)
        with suppress(Exception):
            torch.load(path, map_location='cpu', weights_only=False)
        return
    is_safe(path / '.metadata')
    found = read_metadata(path)
    entries: dict[str, list] = {}
    for info in found.storage_data.values():
        entries.setdefault(info.relative_path, []).append((info.offset, info.length))
    for name, specs in entries.items():
        is_safe(path / name, specs)


@pytest.fixture
def preflight_of(data):
    """Preflight of a stage with this parent."""

    def read(path: Path) -> None:
        over = {'fsdp_config': {'state_dict_type': 'sharded'}} if path.is_dir() else {}
        cfg = tiny.config(path.parent, data, 'child', load_path=str(path), load_weights_only=True, **over)
        preflight(Stage.from_yaml(cfg))

    return read


KINDS = {'pt': PT, 'sharded': SHARDED, 'hf': SAFETENSORS}
SIZES = [pytest.param(12, False, id='few'), pytest.param(2000, True, id='many', marks=pytest.mark.slow)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('many', 'slow'), SIZES)
@pytest.mark.long
def test_spoilt_checkpoints(kind, many, slow, originals, tmp_path, preflight_of, capsys):
    given = os.environ.get('FUZZ_SEED', str(secrets.randbelow(2**32)) if slow else '1')
    print(f'FUZZ_SEED={given}')
    base, _, only = given.partition('-')
    counts = {'read': 0, 'refused': 0}
    for number in [int(only)] if only else range(many):
        rng = random.Random(f'{base}-{number}')
        how = rng.choice(sorted(KINDS[kind]))
        try:
            judge(kind, how, rng, originals[kind], tmp_path / str(number), preflight_of, capsys, counts)
        except BaseException as error:
            error.add_note(f'FUZZ_SEED={base}-{number}: {kind}, {how}')
            raise
        shutil.rmtree(tmp_path / str(number))
    print(counts)
    assert only or counts['read'] > many / 50 and counts['refused'] > many / 5


def judge(kind, how, rng, original, folder, preflight_of, capsys, counts):
    """One case."""
    folder.mkdir()
    sign, path = folder.parent / 'sign', folder / original.name
    spoilt_copy(original, path, KINDS[kind][how], rng, sign)
    assert not sign.exists(), 'spoiling runs nothing'
    before = files(folder.parent)

    readers = [as_composer_does, dataset_state_of] if kind != 'hf' else []
    # which reads it as the first does, and much else
    readers += [preflight_of] if readers and int(folder.name) % 20 == 0 else []
    said = {reader: refusal(reader, path) for reader in readers}
    assert files(folder.parent) == before, 'reading must write nothing'
    said['average'] = average(path, folder / 'out.pt', capsys)
    for each in filter(None, said.values()):
        assert original.name in each, each
        assert '\n' not in each.strip(), each
    counts['refused' if said['average'] else 'read'] += 1
    after = files(folder.parent)
    if not said['average']:
        read, aliases = inside(folder / 'out.pt'), open_checkpoint(path).aliases
        try:
            there = inside(path)
        except (RuntimeError, TypeError) as error:  # a storage claims to be smaller than what it holds: not asked here
            assert how == 'numbers' or 'Trying to resize storage' in str(error), how
            there = read
        assert there.keys() - aliases.keys() <= read.keys(), (there.keys(), read.keys())
        assert all(same(there[name], read[name]) for name in read if name in there)
        after = {place: value for place, value in after.items() if not place.name.startswith('out.pt')}
    assert after == before, 'only the average may be written'
