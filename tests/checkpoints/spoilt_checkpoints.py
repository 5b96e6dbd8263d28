# SPDX-License-Identifier: Apache-2.0
"""Spoilt checkpoints: damaged as disks and networks do it, and written by somebody who wants code to be run."""

import copy
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import torch
from torch.distributed.checkpoint.metadata import Metadata

from cpt_algorithms.checkpoints.open import read_metadata, safe_globals

Spoil = Callable[[Path, random.Random, Path], None]


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return os.system, (f'touch {self.sign}',)

    def __deepcopy__(self, memo):
        """As itself: Python copies by what ``__reduce__`` says, and would run it."""
        return self


def evil_algorithm(sign: Path) -> list:
    """No pickle at all: Composer evaluates this text."""
    return [('BlurPool', {'repr': f'BlurPool(min_channels=__import__("os").system("touch {sign}"))'})]


# Bytes


def cut(file: Path, rng: random.Random, sign: Path) -> None:
    """Cut off anywhere, often near an end."""
    size = file.stat().st_size
    os.truncate(
        file, rng.choice([rng.randrange(size), rng.randrange(min(size, 200)), max(0, size - rng.randrange(1, 200))])
    )


def flip(file: Path, rng: random.Random, sign: Path) -> None:
    """Other bytes, often near an end, where headers and directories are."""
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        near = rng.randrange(min(2000, len(data)))
        at = rng.choice([rng.randrange(len(data)), near, -1 - near])
        data[at] = rng.choice([data[at] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)])
    file.write_bytes(data)


def move(file: Path, rng: random.Random, sign: Path) -> None:
    """A block is zero, twice, missing, or in another's place."""
    data, size = file.read_bytes(), rng.choice([8, 64, 512, 4096])
    one, other = (rng.randrange(len(data)) for _ in range(2))
    block = data[one : one + size]
    new: bytes = rng.choice([bytes(len(block)), block + block, b'', data[other : other + size]])
    file.write_bytes(data[:one] + new + data[one + size :])


def other_kind(file: Path, rng: random.Random, sign: Path) -> None:
    """Something else of this name."""
    file.unlink()
    what = rng.choice(['folder', 'itself', 'nowhere', 'zeros', 'text', 'nothing'])
    if what == 'folder':
        file.mkdir()
    elif what in ('itself', 'nowhere', 'zeros'):
        file.symlink_to({'itself': file.name, 'nowhere': 'nowhere', 'zeros': '/dev/zero'}[what])
    else:
        file.write_bytes(b'to whom it may concern' if what == 'text' else b'')


BYTES: dict[str, Spoil] = {'cut': cut, 'flip': flip, 'move': move, 'other kind': other_kind}


# Composer's .pt


def rewrite(file: Path, change: Callable[[list[tuple[str, bytes]]], Any], how: int = zipfile.ZIP_STORED) -> None:
    """Change the members of a zip file."""
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    change(members)
    with zipfile.ZipFile(file, 'w', how) as archive:
        for name, data in members:
            archive.writestr(name, data)


def spoil_members(file: Path, rng: random.Random, sign: Path) -> None:
    """Members that change places, are missing, twice, compressed, shorter, or a second pickle, which is evil."""

    def change(members: list[tuple[str, bytes]]) -> None:
        one, other = (rng.randrange(len(members)) for _ in range(2))
        how = rng.choice(['swap', 'drop', 'twice', 'shorter', 'second pickle', 'compressed'])
        if how == 'swap':
            (a, first), (b, second) = members[one], members[other]
            members[one], members[other] = (a, second), (b, first)
        elif how == 'drop':
            del members[one]
        elif how == 'twice':
            members.insert(rng.randrange(len(members)), (members[one][0], members[other][1]))
        elif how == 'shorter':
            members[one] = (members[one][0], members[one][1][: rng.randrange(len(members[one][1]) + 1)])
        elif how == 'second pickle':  # who reads the first, and who the last?
            (name,) = {name for name, _ in members if name.endswith('/data.pkl')}
            members.insert(rng.choice([0, len(members)]), (name, pickle.dumps(Evil(sign))))

    rewrite(file, change, rng.choice([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED]))


def spoil_content(file: Path, rng: random.Random, sign: Path) -> None:
    """A checkpoint that holds something else in one of its places."""
    with torch.serialization.safe_globals(safe_globals()):
        content = torch.load(file, weights_only=True)
    there = [place for place in mutations.places(content) if place[:2] != ('state', 'optimizers')]
    extra = [Evil(sign), evil_algorithm(sign), torch.zeros(3), torch.zeros(0), torch.zeros(5).expand(4, 5),
             torch.randn(4, 4).t(), torch.zeros(3, dtype=torch.complex64), torch.sparse_coo_tensor(size=(2, 2)), 'lawa',
             {'weights': 'ema'}, {'../../sign': {'content': 'x', 'file_extension': '.txt'}}]  # fmt: skip
    how = rng.choice(['put', 'put', 'put', 'delete', 'rename'])
    new = rng.choice([*extra, *mutations.VALUES]) if how == 'put' else rng.choice(['x', 'model.x', 5, ''])
    mutations.spoil(content, how, rng.choice(there), new)
    torch.save(content, file)


def spoil_numbers(file: Path, rng: random.Random, sign: Path) -> None:
    """Numbers in ``data.pkl`` that say how large a tensor is and where it begins."""

    def change(members: list[tuple[str, bytes]]) -> None:
        for index, (name, data) in enumerate(members):
            if name.endswith('/data.pkl'):
                at = rng.choice([at for at in range(len(data) - 1) if data[at] == pickle.BININT1[0]])
                new = struct.pack('<i', rng.choice([0, 1, 2**31 - 1, -1, -(2**31), 17, 255, 65536]))
                members[index] = (name, data[:at] + pickle.BININT + new + data[at + 2 :])

    rewrite(file, change)


PT: dict[str, Spoil] = {**BYTES, 'members': spoil_members, 'content': spoil_content, 'numbers': spoil_numbers}


# Sharded


def of_folder(spoil: Spoil) -> Spoil:
    """The same for one of the files of a folder."""
    return lambda folder, rng, sign: spoil(rng.choice(sorted(folder.iterdir())), rng, sign)


NUMBERS = [0, 1, -1, 17, 2**31, 2**62, -(2**62), 10**30, 2.5, None, 'x']
SIZES = [torch.Size([]), torch.Size([0]), torch.Size([-1]), torch.Size([2**40, 2**20]), torch.Size([17, 3]), None]
PATHS = [None, (), ('state',), ('state', 'model'), ('state', 'model', 5), 'x', 5, ('state', 'callbacks', 'LAWA', 'window', 'x', 'y')]  # fmt: skip
NAMES = ['../sign', '', '.', '..', '.metadata', 'x' * 300, None, 5, 'no\0', 'a/b']


def write_metadata(folder: Path, found: Any) -> None:
    """Replace a folder's ``.metadata``."""
    (folder / '.metadata').write_bytes(pickle.dumps(found))


def spoil_metadata(folder: Path, rng: random.Random, sign: Path) -> None:
    """Metadata that says something else of one entry, or is evil."""
    found = read_metadata(folder)
    index = rng.choice(list(found.storage_data))
    info, kept = found.storage_data[index], found.state_dict_metadata
    one: Any = kept[rng.choice([key for key in kept if hasattr(kept[key], 'chunks')])]
    key = rng.choice(list(found.planner_data))
    changes: list[Callable[[], Any]] = [
        lambda: setattr(info, rng.choice(['offset', 'length']), rng.choice(NUMBERS)),
        lambda: setattr(info, 'relative_path', rng.choice(NAMES)),
        lambda: setattr(info, 'transform_descriptors', ['zstd']),
        lambda: setattr(one, 'size', rng.choice(SIZES)),
        lambda: setattr(rng.choice(one.chunks), rng.choice(['offsets', 'sizes']), rng.choice(SIZES)),
        lambda: one.chunks.append(rng.choice(one.chunks)),
        lambda: setattr(one.properties, 'dtype', rng.choice([torch.int8, torch.complex64, None, torch.bool])),
        lambda: found.storage_data.pop(index),
        lambda: found.storage_data.update({index: rng.choice([None, 5, one])}),
        lambda: found.planner_data.update({key: rng.choice(PATHS)}),
        lambda: setattr(found, 'planner_data', rng.choice([None, {}, 5, [], Evil(sign)])),
        lambda: setattr(
            found, rng.choice(['state_dict_metadata', 'storage_data']), rng.choice([None, {}, [], {5: None}])
        ),
    ]
    rng.choice(changes)()
    write_metadata(folder, found)


def put_entry(folder: Path, key: str, data: bytes) -> None:
    """Put other bytes where an entry is."""
    found = read_metadata(folder)
    for index, info in found.storage_data.items():
        if index.fqn == key:
            file = folder / info.relative_path
            info.offset, info.length = file.stat().st_size, len(data)
            with open(file, 'ab') as end:
                end.write(data)
    write_metadata(folder, found)


def saved(value: Any) -> bytes:
    """What ``torch.save`` writes."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def spoil_entry(folder: Path, rng: random.Random, sign: Path) -> None:
    """Another entry where one is, with what is evil or not what was there."""
    others = [3, None, 'x', torch.zeros(3), {'x': [1]}, torch.zeros(4, 4).t(), Evil(sign), evil_algorithm(sign)]
    entry = folder.parent / 'entry'
    entry.write_bytes(saved(rng.choice(others)))
    rng.choice([lambda *_: None, spoil_members, flip])(entry, rng, sign)
    put_entry(folder, rng.choice(sorted(index.fqn for index in read_metadata(folder).storage_data)), entry.read_bytes())
    entry.unlink()


def evil_metadata(folder: Path, sign: Path) -> None:
    """Metadata that runs code."""
    found = read_metadata(folder)
    write_metadata(folder, Metadata(found.state_dict_metadata, found.planner_data, found.storage_data, Evil(sign)))  # pyright: ignore


SHARDED: dict[str, Spoil] = {
    **{name: of_folder(spoil) for name, spoil in BYTES.items()},
    'metadata': spoil_metadata,
    'metadata, again': spoil_metadata,
    'entry': spoil_entry,
}


# safetensors


def spoil_json(value: Any, rng: random.Random) -> Any:
    """A change of the kind that people make."""
    value = copy.deepcopy(value)
    if there := list(mutations.places(value)):
        how = rng.choice(['put', 'put', 'put', 'delete', 'rename', 'twice'])
        new = rng.choice([*mutations.VALUES, *NUMBERS[:7], 'F64', 'BF16', 'F8_E4M3', [0, 4], [2**62], '../sign', '/etc/passwd'])  # fmt: skip
        mutations.spoil(value, how, rng.choice(there), new if how == 'put' else 'x')
    return value


def spoil_header(folder: Path, rng: random.Random, sign: Path) -> None:
    """Another header, of a length that is right or not, or another index."""
    file = rng.choice([file for file in sorted(folder.iterdir()) if file.name.startswith('model')])
    if file.suffix == '.json':
        file.write_text(json.dumps(spoil_json(json.loads(file.read_text()), rng)))
        return
    data = file.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.dumps(spoil_json(json.loads(data[8 : 8 + length]), rng)).encode()
    said = rng.choice([len(header), len(header), len(header), 0, 2**63, len(header) + 5, length])
    file.write_bytes(said.to_bytes(8, 'little') + header + data[8 + length :])


def spoil_config(folder: Path, rng: random.Random, sign: Path) -> None:
    """Another ``config.json``."""
    file = folder / 'config.json'
    file.write_text(json.dumps(spoil_json(json.loads(file.read_text()), rng)))


SAFETENSORS: dict[str, Spoil] = {
    **{name: of_folder(spoil) for name, spoil in BYTES.items()},
    'header': spoil_header,
    'header, again': spoil_header,
    'config': spoil_config,
}


def spoilt_copy(original: Path, target: Path, spoil: Spoil, rng: random.Random, sign: Path) -> None:
    """A copy, spoilt."""
    (shutil.copytree if original.is_dir() else shutil.copyfile)(original, target)
    spoil(target, rng, sign)
