# SPDX-License-Identifier: Apache-2.0
"""Spoilt checkpoints: damaged as disks and networks do it, and written by somebody who wants code to be run."""

import copy
import io
import json
import pickle
import pickletools
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from cpt_algorithms.checkpoints.open import read_metadata, safe_globals

Spoil = Callable[[Path, random.Random, Path], None]


# Bytes


def cut(file: Path, rng: random.Random, sign: Path) -> None:
    """Cut off anywhere, often near an end."""
    data = file.read_bytes()
    file.write_bytes(
        data[: rng.choice([rng.randrange(len(data) + 1), rng.randrange(200), len(data) - rng.randrange(200)])]
    )


def flip(file: Path, rng: random.Random, sign: Path) -> None:
    """Other bytes, often near an end, where headers and directories are."""
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.choice(
            [rng.randrange(len(data)), rng.randrange(min(2000, len(data))), -1 - rng.randrange(min(2000, len(data)))]
        )
        data[at] = rng.choice([data[at] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)])
    file.write_bytes(data)


def move(file: Path, rng: random.Random, sign: Path) -> None:
    """A block is zero, twice, missing, or in another's place."""
    data = file.read_bytes()
    size = rng.choice([8, 64, 512, 4096])
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


# Pickles


def text(value: str) -> bytes:
    """Push a string."""
    data = value.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def blob(value: bytes) -> bytes:
    """Push bytes."""
    return b'B' + struct.pack('<I', len(value)) + value


def call(name: str, *arguments: bytes, protocol: int = 2) -> bytes:
    """Push what a call gives."""
    module, _, what = name.rpartition('.')
    function = f'c{module}\n{what}\n'.encode() if protocol < 4 else text(module) + text(what) + b'\x93'
    return function + b'(' + b''.join(arguments) + b'tR'


def evil_file(sign: Path) -> bytes:
    """What torch.load runs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + call('posix.system', text(f'touch {sign}')) + b'.')
        archive.writestr('archive/version', '3\n')
    return file.getvalue()


def payloads(sign: Path) -> list[bytes]:
    """Each pushes one object, and would leave a file behind, ask for a terabyte, or confuse who reads it."""
    touch = text(f'touch {sign}')
    python = text(f'open({str(sign)!r}, "w")')
    plain = b'\x80\x02' + call('posix.system', touch) + b'.'
    array = call('numpy.core.multiarray._reconstruct', b'cnumpy\nndarray\n', b'K\x00\x85', text('b'))
    return [
        call('posix.system', touch), call('os.system', touch), call('os.system', touch, protocol=4),
        call('builtins.eval', python), call('builtins.exec', python), call('__builtin__.eval', python),
        call('builtins.open', text(str(sign)), text('w')), call('io.open', text(str(sign)), text('w')),
        call('subprocess.Popen', b'(' + text('touch') + text(str(sign)) + b'l'),
        call('subprocess.check_output', b'(' + text('touch') + text(str(sign)) + b'l'),
        b'(' + touch + b'iposix\nsystem\n', b'(cposix\nsystem\n' + touch + b'o',
        b'csubprocess\nPopen\n((' + text('touch') + text(str(sign)) + b'lt\x81',
        call('builtins.getattr', b'cos\nsystem\n', text('__call__')), call('builtins.__import__', text('antigravity')),
        call('torch.load', text(str(sign.with_name('evil.pt')))), call('torch.serialization.load', text(str(sign.with_name('evil.pt')))),
        call('torch.storage._load_from_bytes', blob(evil_file(sign))), call('torch.hub.load', text('a/b'), text('c')),
        call('pickle.loads', blob(plain)), call('_pickle.loads', blob(plain)), call('torch.jit.load', text(str(sign))),
        call('numpy.load', text(str(sign.with_name('evil.pt'))), b'N', b'\x88'), call('runpy.run_path', text(str(sign.with_name('evil.py')))),
        call('numpy.core.multiarray.scalar', call('numpy.dtype', text('O8'), b'K\x00', b'K\x01'), blob(plain)),
        # arrays of objects, of odd types and of too many
        call('numpy.core.multiarray._reconstruct', b'cnumpy\nndarray\n', b'K\x00\x85', text('O')),
        array + b'(K\x01K\x01\x85' + call('numpy.dtype', text('O8'), b'K\x00', b'K\x01') + b'\x89(' + call('posix.system', touch) + b'ltb',
        array + b'(K\x01(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft' + call('numpy.dtype', text('f8'), b'K\x00', b'K\x01') + b'\x89B\x00\x00\x00\x00tb',
        call('numpy.core.multiarray._reconstruct', b'cnumpy\nndarray\n', b'(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft', text('d')),
        call('numpy.dtype', text('O8,' * 50 + 'O8'), b'K\x00', b'K\x01'), call('numpy.dtype', text('x' * 999)),
        call('numpy.ndarray', b'(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft'), call('datetime.timedelta', b'J\xff\xff\xff\x7f'),
        call('torch._utils._rebuild_tensor_v2', b'N', b'K\x00', b'K\x05\x85', b'K\x01\x85', b'\x89', b'}'),
        call('torch._utils._rebuild_parameter', b'N', b'\x89', b'}'), call('torch.Size', b'(J\xff\xff\xff\x7ftt'),
        call('torch.serialization._get_layout', python), call('torch.torch_version.TorchVersion', text('1' * 5000)),
        call('torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING', b'K\x63'),
        call('builtins.getattr', b'ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n', text('__class__')),
        call('builtins.getattr', b'ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n', text('mro')),
        call('pathlib.PosixPath', text('/etc'), text('passwd')), call('collections.OrderedDict', b'K\x05'),
        b'ccollections\nOrderedDict\n)R}' + text('__reduce__') + b'cposix\nsystem\nsb',
        # opcodes that nobody writes there
        b'\x82\x01', b'Pabc\n', text('x') + b'Q', b'(' + text('storage') + b'N' + text('../../x') + text('cpu') + b'K\x05tQ',
        b'h\xff', b'\x80\x7f', b'\x97', b'\x98', b'\x8d' + struct.pack('<Q', 2**62), b'\x8e' + struct.pack('<Q', 2**62), b'\x95' + b'\xff' * 8,
        b'I' + b'9' * 6000 + b'\n', b'(' * 3000 + b't' * 3000, b']' + b'q\xf0' + b'h\xf0a', b']' * 5000 + b'a' * 4999,
        # nested a thousand million times, in few bytes
        b'K\x01' + b'\x85q\xf1h\xf1\x86' * 40,
        # the same as a key, and lists that are put into each other before they are filled
        b'}K\x01' + b'\x85q\xf1h\xf1\x86' * 60 + b'K\x01s',
        b']q\xf2' + b']q\xf1h\xf2h\xf1ah\xf1a00h\xf1q\xf20' * 60,
    ]  # fmt: skip


def opcodes(data: bytes) -> list[int]:
    """Where opcodes begin."""
    return [at for _, _, at in pickletools.genops(data) if at is not None]


def with_payload(data: bytes, rng: random.Random, sign: Path) -> bytes:
    """A pickle that pushes something more on the way, and drops it or lets it stand for what comes next."""
    at, payload = rng.choice(opcodes(data)[1:]), rng.choice(payloads(sign))
    return data[:at] + payload + rng.choice([b'0', b'']) + data[at:]


def with_other_opcodes(data: bytes, rng: random.Random, sign: Path) -> bytes:
    """Opcodes that change places, are missing or are others."""
    places = opcodes(data)
    one = rng.randrange(1, len(places) - 1)
    begin, end = places[one], places[one + 1]
    other = rng.randrange(1, len(places) - 1)
    new = rng.choice([b'', data[begin:end] * 2, data[places[other] : places[other + 1]], bytes([rng.randrange(256)])])
    return data[:begin] + new + data[end:]


def only_payload(data: bytes, rng: random.Random, sign: Path) -> bytes:
    """Nothing else."""
    return b'\x80\x02' + rng.choice(payloads(sign)) + b'.'


PICKLES = [with_payload, with_payload, with_other_opcodes, only_payload]


# Composer's .pt


def members(file: Path) -> list[tuple[zipfile.ZipInfo, bytes]]:
    """Of a zip file."""
    with zipfile.ZipFile(file) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def write_members(
    file: Path, found: list[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED
) -> None:
    """A zip file."""
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for info, data in found:
            archive.writestr(info if isinstance(info, str) else info.filename, data)


def spoil_pickle(file: Path, rng: random.Random, sign: Path) -> None:
    """Another ``data.pkl``."""
    spoil = rng.choice(PICKLES)
    found = [
        (info, spoil(data, rng, sign) if info.filename.endswith('/data.pkl') else data) for info, data in members(file)
    ]
    write_members(file, found)  # pyright: ignore[reportArgumentType]


def spoil_members(file: Path, rng: random.Random, sign: Path) -> None:
    """Members that change places, are missing, twice, compressed, too long or lead elsewhere."""
    found: list[Any] = [(info.filename, data) for info, data in members(file)]
    root = found[0][0].partition('/')[0]
    one, other = (rng.randrange(len(found)) for _ in range(2))
    compression = zipfile.ZIP_STORED
    how = rng.choice(
        [
            'swap',
            'drop',
            'twice',
            'outside',
            'shorter',
            'longer',
            'compressed',
            'bomb',
            'rename',
            'second pickle',
            'link',
        ]
    )
    if how == 'swap':
        found[one], found[other] = (found[one][0], found[other][1]), (found[other][0], found[one][1])
    elif how == 'drop':
        del found[one]
    elif how == 'twice':
        found.insert(rng.randrange(len(found)), (found[one][0], found[other][1]))
    elif how == 'outside':
        found.append((rng.choice(['../../sign', f'{root}/../../sign', str(sign), f'{root}/data/../../../sign']), b''))
    elif how == 'shorter':
        found[one] = (found[one][0], found[one][1][: rng.randrange(len(found[one][1]) + 1)])
    elif how == 'longer':
        found[one] = (found[one][0], found[one][1] + bytes(rng.randrange(99)))
    elif how == 'compressed':
        compression = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    elif how == 'bomb':
        compression = zipfile.ZIP_DEFLATED
        found[one] = (found[one][0], bytes(2**26))
    elif how == 'rename':
        found[one] = (rng.choice(['x', found[one][0].upper(), f'{root}/data/99', f'{found[one][0]}/x']), found[one][1])
    elif how == 'second pickle':  # who reads the first, and who the last?
        place = rng.choice([0, len(found)])
        found.insert(place, (f'{root}/data.pkl', b'\x80\x02' + rng.choice(payloads(sign)) + b'.'))
    else:
        info = zipfile.ZipInfo(found[one][0])
        info.external_attr = 0o120777 << 16
        found[one] = (info, b'/etc/passwd')
    if how == 'link':
        with zipfile.ZipFile(file, 'w') as archive:
            for info, data in found:
                archive.writestr(info, data)
        return
    write_members(file, found, compression)


def laughs() -> Any:
    """Nested a thousand million times, in few objects."""
    value: Any = ['ha']
    for _ in range(30):
        value = [value, value]
    return value


def spoil_content(file: Path, rng: random.Random, sign: Path) -> None:
    """A checkpoint that holds something else in one of its places."""
    with torch.serialization.safe_globals(safe_globals()):
        content = torch.load(file, weights_only=True)
    evil = [('BlurPool', {'repr': f'BlurPool(x=__import__("os").system("touch {sign}"))'})]
    there = [place for place in mutations.places(content) if place[:2] not in [('state', 'optimizers')]]
    extra = [evil, laughs(), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int8), torch.tensor(1.0), torch.zeros(0), 'lawa',
             torch.zeros(5).expand(4, 5), torch.randn(4, 4).t(), torch.zeros(3, dtype=torch.complex64), torch.sparse_coo_tensor(size=(2, 2)),
             {'weights': 'ema'}, '{"weights": "nope"}', {'../../sign': {'content': 'x', 'file_extension': '.txt'}}, torch.zeros(3, device='meta')]  # fmt: skip
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.choice(there)
        how = rng.choice(['put', 'put', 'put', 'delete', 'rename'])
        new = rng.choice([*extra, *mutations.VALUES]) if how == 'put' else rng.choice(['x', 'model.x', 5, ''])
        try:
            mutations.spoil(content, how, place, new)
        except (KeyError, IndexError, TypeError):  # it is gone
            continue
    torch.save(content, file)


def spoil_tensor(file: Path, rng: random.Random, sign: Path) -> None:
    """Numbers in ``data.pkl`` that say how large a tensor is and where it begins."""
    found: list[Any] = []
    for info, data in members(file):
        if info.filename.endswith('/data.pkl'):
            numbers = [
                (at, op) for op, _, at in pickletools.genops(data) if op.name in ('BININT', 'BININT1', 'BININT2')
            ]
            at, op = rng.choice(numbers)
            width = {'BININT': 4, 'BININT1': 1, 'BININT2': 2}[op.name]
            new = rng.choice([0, 1, 2**31 - 1, -1, -(2**31), 17, 255, 65536])
            data = data[:at] + b'J' + struct.pack('<i', new) + data[at + 1 + width :]  # noqa: PLW2901
        found.append((info, data))
    write_members(file, found)


PT: dict[str, Spoil] = {
    **BYTES,
    'pickle': spoil_pickle,
    'members': spoil_members,
    'content': spoil_content,
    'numbers': spoil_tensor,
}


# Sharded


def of_folder(spoil: Spoil) -> Spoil:
    """The same for one of the files of a folder."""
    return lambda folder, rng, sign: spoil(rng.choice(sorted(folder.iterdir())), rng, sign)


def spoil_metadata_pickle(folder: Path, rng: random.Random, sign: Path) -> None:
    """Another pickle in ``.metadata``."""
    file = folder / '.metadata'
    file.write_bytes(rng.choice(PICKLES)(file.read_bytes(), rng, sign))


NUMBERS = [0, 1, -1, 17, 2**31, 2**62, -(2**62), 10**30, 2.5, None, 'x']


def spoil_metadata(folder: Path, rng: random.Random, sign: Path) -> None:
    """Metadata that says something else of one entry."""
    found = read_metadata(folder)
    index = rng.choice(list(found.storage_data))
    info, kept = found.storage_data[index], found.state_dict_metadata
    tensors = [key for key in kept if hasattr(kept[key], 'chunks')]
    one = kept[rng.choice(tensors)]
    how = rng.choice(
        [
            'offset',
            'length',
            'path',
            'size',
            'chunk',
            'twice',
            'dtype',
            'gone',
            'planner',
            'plan',
            'other',
            'transforms',
            'all',
        ]
    )
    if how in ('offset', 'length'):
        setattr(info, how, rng.choice(NUMBERS))
    elif how == 'path':
        info.relative_path = rng.choice(
            ['../sign', str(sign), '', '.', '..', '.metadata', 'x' * 300, None, 5, 'no\0', 'a/b']
        )
    elif how == 'size':
        one.size = rng.choice(
            [torch.Size([]), torch.Size([0]), torch.Size([2**40, 2**20]), [1], None, torch.Size([17, 3])]
        )
    elif how == 'chunk':
        chunk = rng.choice(one.chunks)
        setattr(
            chunk,
            rng.choice(['offsets', 'sizes']),
            rng.choice([torch.Size([]), torch.Size([-1]), torch.Size([2**40] * 2), None, torch.Size([1, 1])]),
        )
    elif how == 'twice':
        one.chunks.append(rng.choice(one.chunks))
    elif how == 'dtype':
        one.properties.dtype = rng.choice([torch.int8, torch.float64, torch.complex64, None, torch.bool])
    elif how == 'gone':
        del found.storage_data[index]
    elif how == 'planner':
        key = rng.choice(list(found.planner_data))
        found.planner_data[key] = rng.choice([None, (), ('state',), ('state', 'model'), ('state', 'model', 5), 'x', 5, [[]],
                                              ('state', 'callbacks', 'LAWA', 'window', 'x', 'y'), ('state', 'metadata', 5, 'x')])  # fmt: skip
    elif how == 'plan':
        found.planner_data = rng.choice([None, {}, 5, [], 'x'])
    elif how == 'other':
        found.storage_data[index] = rng.choice([None, 5, one])
    elif how == 'transforms':
        info.transform_descriptors = ['zstd']
    else:
        setattr(
            found, rng.choice(['state_dict_metadata', 'storage_data']), rng.choice([None, {}, [], {'x': 5}, {5: None}])
        )
    (folder / '.metadata').write_bytes(pickle.dumps(found))


def spoil_entry(folder: Path, rng: random.Random, sign: Path) -> None:
    """Another entry where one is, with what is evil or not what was there."""
    found = read_metadata(folder)
    index = rng.choice([key for key in found.storage_data if isinstance(key, MetadataIndex)])
    info = found.storage_data[index]
    data = io.BytesIO()
    torch.save(
        rng.choice(
            [
                3,
                None,
                'x',
                torch.zeros(3),
                laughs(),
                {'x': [1]},
                torch.zeros(4, 4).t(),
                [('BlurPool', {'repr': f'BlurPool(x=open({str(sign)!r},"w"))'})],
            ]
        ),
        data,
    )
    entry = folder.parent / 'entry'
    entry.write_bytes(data.getvalue())
    rng.choice([lambda *_: None, spoil_pickle, spoil_members, flip])(entry, rng, sign)
    new = entry.read_bytes()
    entry.unlink()
    file = folder / info.relative_path
    with open(file, 'ab') as end:
        info.offset, info.length = end.tell(), len(new)
        end.write(new)
    (folder / '.metadata').write_bytes(pickle.dumps(found))


SHARDED: dict[str, Spoil] = {
    **{name: of_folder(spoil) for name, spoil in BYTES.items()},
    'pickle': spoil_metadata_pickle, 'metadata': spoil_metadata, 'entry': spoil_entry, 'entry, again': spoil_entry,
}  # fmt: skip


# safetensors


def spoil_json(value: Any, rng: random.Random) -> Any:
    """One or two changes of the kind that test_fuzz.py makes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        there = list(mutations.places(value))
        if there:
            how = rng.choice(['put', 'put', 'put', 'delete', 'rename', 'twice'])
            new = rng.choice(
                [*mutations.VALUES, *NUMBERS[:7], 'F64', 'BF16', 'F8_E4M3', [0, 4], [2**62], '../sign', '/etc/passwd']
            )
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
    **{name: of_folder(spoil) for name, spoil in BYTES.items()}, 'header': spoil_header, 'header, again': spoil_header, 'config': spoil_config,
}  # fmt: skip


def spoilt_copy(original: Path, target: Path, spoil: Spoil, rng: random.Random, sign: Path) -> None:
    """A copy, spoilt."""
    if original.is_dir():
        shutil.copytree(original, target, symlinks=True)
    else:
        shutil.copyfile(original, target)
    spoil(target, rng, sign)
