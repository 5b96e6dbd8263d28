# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a checkpoint lie on disk: Composer ``.pt``, Composer sharded and Hugging Face safetensors.

Opening reads names, dtypes, shapes and positions, never the tensors, and runs no code that a file brings along.
Composer and torch would: :func:`guard_loading` has every checkpoint looked at before they load it.
"""

import ast
import io
import json
import os
import pickle
import pickletools
import re
import tarfile
import tempfile
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import filesystem, metadata

from cpt_algorithms.files import fetch, list_names, read_or_none
from cpt_algorithms.weight_averaging.functional import window_weights

__all__ = [
    'Checkpoint',
    'CheckpointError',
    'Chunk',
    'TensorOnDisk',
    'UnsafeCheckpointError',
    'dataset_state_of',
    'files_of',
    'resolve_latest',
    'guard_loading',
    'is_safe',
    'is_complete',
    'newest_remote',
    'open_checkpoint',
    'read_metadata',
    'load_structure',
    'safe_globals',
]

SUPPORTED = (
    'a Composer .pt file, a Composer sharded folder (with .metadata), or Hugging Face safetensors (a .safetensors '
    'file, or a folder with model.safetensors or model.safetensors.index.json)'
)
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
MODEL_PREFIX = 'model.'  # what Composer puts before the names of a Hugging Face model
DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
    'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
}  # fmt: skip


HOOK = 'CHECKPOINT_VALIDATION_FUNCTION'  # what Composer calls with every file that it is about to load
_EXTRACTALL = tarfile.TarFile.extractall
TRUST = 'set callbacks.stage_start.trust_checkpoint: true if you trust whoever made it'


class CheckpointError(ValueError):
    """A checkpoint that is not there, is not whole, is not of a supported kind, or is not safe to read."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that could run code of its own if it were loaded as Composer and torch do."""


# Opcodes of pickles, by what they do to the stack.
_PUTS, _GETS = {'PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'}, {'GET', 'BINGET', 'LONG_BINGET'}
_FILLING = {'APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD'}
_TUPLES = {'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'}
_PLAIN = {
    opcode.name
    for opcode in pickletools.opcodes
    if not opcode.stack_before and len(opcode.stack_after) == 1
    and not opcode.name.startswith(('EMPTY_', 'MARK', *_GETS))
} | {'EMPTY_TUPLE'}  # fmt: skip
_ENDLESS = 'its pickle holds the same objects in each other, again and again'
_DEEPEST = 100  # where a pickler that goes through it, or repr, falls over is some hundreds deeper
_MOST_OBJECTS = 10_000_000  # a second of hashing or printing


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, somewhere in a file.

    Args:
        path: The file.
        offset: Byte of the first element.
        at: Where the box begins in the tensor.
        shape: Size of the box.
        stride: Of the box in the file, in elements.
    """

    path: Path
    offset: int
    at: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def is_flat_in(self, shape: tuple[int, ...]) -> bool:
        """Whether the box is a run of consecutive elements of a tensor of this shape, in the file as well."""
        return self.stride == contiguous(self.shape) and self.shape[1:] == shape[1:]


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor on disk.

    Args:
        dtype: Of every piece.
        shape: Of the whole.
        find: Finds the pieces; called when they are first needed.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    find: Callable[[], list[Chunk]]

    @cached_property
    def pieces(self) -> list[Chunk]:
        """The pieces; together they cover the tensor once."""
        return self.find()

    @cached_property
    def is_flat(self) -> bool:
        """Whether every piece is a run of consecutive elements."""
        return all(piece.is_flat_in(self.shape) for piece in self.pieces)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Names are those of the Hugging Face model, without the ``model.`` that Composer puts first.

    Args:
        path: The file or folder.
        kind: ``pt``, ``sharded`` or ``hf``.
        tensors: The model's tensors; of tied ones only the first.
        prefix: What Composer puts before the names: ``model.``, or nothing if the model is not from Hugging Face.
        aliases: The other names of tied tensors, with the name in ``tensors``.
        averages: What the callbacks ``EMA`` and ``LAWA`` keep: for each name the parts (their weights sum to 1), each a
            weight and tensors.
        carried: ``integrations`` and ``metadata`` of a Composer state, as far as they were saved.
    """

    path: Path
    kind: str
    tensors: dict[str, TensorOnDisk]
    prefix: str = MODEL_PREFIX
    aliases: dict[str, str] = field(default_factory=dict)
    averages: dict[str, list[tuple[float, dict[str, TensorOnDisk]]]] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)


def safe_globals() -> list[Any]:
    """What a Composer checkpoint holds besides tensors and plain values; none of it can run code."""
    import datetime

    import numpy as np
    from torch.torch_version import TorchVersion

    reconstruct = np.empty(0).__reduce__()[0]
    # where numpy 1 had it, and numpy 2 has it
    arrays = [(reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')]
    return [datetime.timedelta, TorchVersion, *arrays, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


@contextmanager
def _of_its_form(path: Path) -> Iterator[None]:
    """Let what a checkpoint holds in the wrong places be one error."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, TypeError, LookupError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise CheckpointError(
            f'{path} is not of the form of a checkpoint: {" ".join(repr(error).split())[:500]}'
        ) from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any supported kind.

    Args:
        path: A file or folder.

    Returns:
        The tensors' places. Cost: reads headers only; memory for the names and the small values of the state.

    Raises:
        CheckpointError: If it is missing, damaged, of no supported kind, or needs code that a model never needs.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f'{path} does not exist; expected {SUPPORTED}')
    with _of_its_form(path):
        return _open(path)


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        if (path / '.metadata').exists():
            return _open_sharded(path)
        for name in (SINGLE, INDEX):
            if (path / name).exists():
                return Checkpoint(path, 'hf', _read_hugging_face(path / name))
        unfinished = ': .metadata is missing, so it was not saved to the end' if any(path.glob('*.distcp')) else ''
        raise CheckpointError(f'{path} is no checkpoint{unfinished}; expected {SUPPORTED}')
    if path.name.endswith(('.safetensors', '.safetensors.index.json')):
        return Checkpoint(path, 'hf', _read_hugging_face(path))
    return _open_monolithic(path)


def _read_hugging_face(path: Path) -> dict[str, TensorOnDisk]:
    if not path.is_file():
        raise CheckpointError(f'{path} is no file')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    try:
        places = dict(json.loads(path.read_text(encoding='utf-8'))['weight_map'])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f'{path} is no safetensors index: {error!r}') from None
    if wrong := [name for name in places.values() if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f'{path} names the file {wrong[0]!r}, which is not beside it')
    files = {}
    for name in sorted(set(places.values())):
        if not os.path.isfile(path.parent / name):
            raise CheckpointError(f'{path} names {name}, which is missing')
        files[name] = _read_safetensors(path.parent / name)
    if absent := [key for key, name in places.items() if key not in files[name]]:
        raise CheckpointError(f'{path}: {absent[0]} is not in {places[absent[0]]}')
    if unnamed := [(key, name) for name in files for key in files[name] if places.get(key) != name]:
        raise CheckpointError(f'{path} does not name {unnamed[0][0]}, which is in {unnamed[0][1]}')
    parts = {file.name for file in path.parent.glob('model-*-of-*.safetensors')}
    if stray := sorted(parts - files.keys()):
        raise CheckpointError(f'{path} does not name {stray[0]}, which is beside it')
    return {key: files[name][key] for key, name in places.items()}


def _read_safetensors(path: Path) -> dict[str, TensorOnDisk]:
    try:
        with safe_open(path, 'pt'):  # checks the header: every tensor inside the file, none overlapping
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'{path} is damaged, or no safetensors file: {error}') from None
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
    header.pop('__metadata__', None)
    tensors = {}
    for key, entry in header.items():
        if entry['dtype'] not in DTYPES:
            raise CheckpointError(f'{path}: {key} is {entry["dtype"]}; one of {", ".join(DTYPES)} is possible')
        shape = tuple(entry['shape'])
        tensors[key] = _in_one_piece(path, 8 + length + entry['data_offsets'][0], DTYPES[entry['dtype']], shape)
    return tensors


def _in_one_piece(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorOnDisk:
    piece = Chunk(path, offset, (0,) * len(shape), shape, contiguous(shape))
    return TensorOnDisk(dtype, shape, lambda: [piece])


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _load_without_data(file: Path | BinaryIO, where: str) -> Any:
    """What ``torch.load`` gives, with tensors that only know where their bytes are in the file."""
    if isinstance(file, Path) and not file.is_file():  # a device can be read without end
        raise CheckpointError(f'{where} is no file')
    try:
        with zipfile.ZipFile(file) as archive:  # whose directory stands at the end
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            starts = []
            for record in records:
                archive.open(record).close()  # looks at its own header
                starts.append(_start_of(archive, record))
    except Exception as error:
        raise CheckpointError(
            f'{where} is damaged: it is cut off, compressed, or no file of torch.save ({error})'
        ) from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f'{where} is compressed inside; save it again with torch.save')
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith('/data.pkl'):
                    _check_pickle(archive.read(name))
    except Exception as error:
        raise CheckpointError(f'{where} is damaged: {_first_line(error)}') from None
    if not isinstance(file, Path):
        file.seek(0)
    try:
        # cpu: a checkpoint of a GPU run is read where there is none
        with torch.serialization.safe_globals(safe_globals()), FakeTensorMode():
            loaded = torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'GLOBAL (\S+)', str(error))
        what = f'it asks to import {found.group(1)}' if found else _first_line(error)
        raise UnsafeCheckpointError(f'{where} is not safe to read: {what}, which no weights need') from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f'{where} is damaged: {_first_line(error)}') from None
    # what the directory says, and not into the next header if it lies
    nexts = [*(record.header_offset for record in records[1:]), max(_size_of(file), 1)]
    ends = [min(start + record.file_size, end) for start, record, end in zip(starts, records, nexts, strict=True)]
    for tensor in _tensors_in(loaded):
        begin = _place_of(tensor)
        if begin is None:
            continue
        end = begin + _span(tuple(tensor.shape), tuple(tensor.stride())) * tensor.dtype.itemsize
        if begin < starts[0] or min(tensor.stride(), default=0) < 0 or end > ends[bisect_right(starts, begin) - 1]:
            raise CheckpointError(f'{where} is damaged: a tensor reaches beyond its storage')
    if isinstance(file, Path):
        try:  # what torch itself finds wrong, without reading the data; a storage that only claims to be small, say
            with torch.serialization.safe_globals(safe_globals()):
                torch.load(file, mmap=True, map_location='cpu', weights_only=True)
        except Exception as error:
            raise CheckpointError(f'{where} is damaged: {_first_line(error)}') from None
    return loaded


def _start_of(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Where the data of a member begins, behind a header of 30 bytes, its name and what else is said of it."""
    assert archive.fp is not None, 'it is open'
    archive.fp.seek(record.header_offset + 26)
    lengths = archive.fp.read(4)
    return record.header_offset + 30 + int.from_bytes(lengths[:2], 'little') + int.from_bytes(lengths[2:], 'little')


def _check_pickle(pickled: bytes) -> None:
    """Refuse what an unpickler, or whoever prints, hashes or saves what it makes, would not come to an end with.

    That is a protocol to come, references to more objects than there are bytes, for which the unpickler in C makes
    room, objects that hold each other in so many places that they would be millions if written out, and levels of them
    so deep that whoever goes through comes to Python's limit.

    Raises:
        ValueError: With the reason.
    """
    memo: dict[int, Any] = {}
    # for each object how many there are in it, itself included; [own, others in it] if it can hold more or they can
    stack: list[Any] = []
    made: list[list[Any]] = []
    most = _MOST_OBJECTS + len(pickled)
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in _PUTS:
            place = len(memo) if argument is None else int(argument)  # pyright: ignore[reportArgumentType]
            if place > len(pickled):
                raise ValueError(f'its pickle refers to {place:,} objects, and has {len(pickled):,} bytes')
            memo[place] = stack[-1]
        elif name in _PLAIN:
            stack.append(1)
        elif name in _GETS:
            stack.append(memo[int(argument)])  # pyright: ignore[reportArgumentType]
        elif name == 'DUP':
            stack.append(stack[-1])
        elif name == 'PROTO' and argument > pickle.HIGHEST_PROTOCOL:  # pyright: ignore[reportOptionalOperand]
            raise ValueError(f'its pickle is of protocol {argument}, and this Python reads {pickle.HIGHEST_PROTOCOL}')
        elif name == 'MARK':
            stack.append(None)
        else:
            before, taken = opcode.stack_before, []
            if pickletools.markobject in before:
                while (top := stack.pop()) is not None:
                    taken.append(top)
                before = before[: before.index(pickletools.markobject)]
            taken += [stack.pop() for _ in before]
            target: Any = taken.pop() if name in _FILLING else [1]
            if not isinstance(target, list):
                raise ValueError(f'its pickle fills what cannot be filled ({name})')
            target += [each for each in taken if isinstance(each, list)]
            target[0] += sum(each for each in taken if isinstance(each, int))
            if target[0] > most:
                raise ValueError(_ENDLESS)
            if opcode.stack_after:
                # of plain values; another one is a level of its own
                is_closed = name in _TUPLES and len(target) == 1 and target[0] == 1 + len(taken)
                stack.append(target[0] if is_closed else target)
                made += [] if is_closed or name in _FILLING else [target]
    size: dict[int, int] = {}
    depth: dict[int, int] = {}
    pending: list[tuple[list[Any], bool]] = [(node, False) for node in made if len(node) > 1]
    while pending:
        node, is_counted = pending.pop()
        if is_counted:
            size[id(node)] = node[0] + sum(size[id(each)] for each in node[1:])
            depth[id(node)] = 1 + max((depth[id(each)] for each in node[1:]), default=0)
            if size[id(node)] > most:
                raise ValueError(_ENDLESS)
            if depth[id(node)] > _DEEPEST:
                raise ValueError(f'its pickle holds objects in objects in objects, more than {_DEEPEST} levels of them')
        elif id(node) not in size:
            size[id(node)], depth[id(node)] = 1, 0  # until it is counted, and in itself
            pending += [(node, True), *((each, False) for each in node[1:])]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:500]


def _size_of(file: Path | BinaryIO) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested mappings and lists, once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:  # a few lists can be nested in each other a thousand million times
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one


def _place_of(tensor: torch.Tensor) -> int | None:
    """Byte of a fake tensor's first element in the file it was loaded from; None if it is no array with data."""
    start = getattr(tensor.untyped_storage(), '_checkpoint_offset', None) if tensor.layout == torch.strided else None
    return None if start is None else start + int(tensor.storage_offset()) * tensor.dtype.itemsize


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if prod(shape) else 0


def _words(path: Path, carried: dict[str, Any]) -> dict[str, Any]:
    pending: list[Any] = [carried]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) not in seen:
                seen.add(id(value))
                pending += [*value, *value.values()] if isinstance(value, dict) else value
        elif not isinstance(value, str | bytes | int | float | None):
            what = 'tensor' if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(
                f'{path} holds a {what} in state.integrations or state.metadata, where there are only words'
            )
    described = carried.get('metadata')
    if isinstance(described, dict) and 'torch_version' in described:
        if not isinstance(described['torch_version'], str):
            raise CheckpointError(f'{path}: state.metadata.torch_version is no text')
        described['torch_version'] = str(described['torch_version'])  # a class of its own
    return carried


def _open_monolithic(path: Path) -> Checkpoint:
    loaded = _load_without_data(path, str(path))
    state = loaded.get('state') if isinstance(loaded, dict) else None
    model = state.get('model') if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(model, dict):
        raise CheckpointError(f'{path} holds no state.model, so it is not from Composer; expected {SUPPORTED}')
    prefix = _prefix_of(model)

    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, TensorOnDisk]:
        found = {}
        for key, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or (offset := _place_of(tensor)) is None:
                raise CheckpointError(f'{path}: {key} is a {type(tensor).__name__}, not a tensor with data')
            shape, stride = tuple(tensor.shape), tuple(tensor.stride())
            piece = Chunk(path, offset, (0,) * len(shape), shape, stride)
            found[key.removeprefix(prefix)] = TensorOnDisk(tensor.dtype, shape, lambda piece=piece: [piece])
        return found

    tensors, aliases, first = {}, {}, {}
    for key, one in stored(model).items():
        name = first.setdefault((one.dtype, one.pieces[0]) if prod(one.shape) else key, key)
        if name == key:
            tensors[key] = one
        else:
            aliases[key] = name
    callbacks = state.get('callbacks') or {}
    ema, lawa = callbacks.get('EMA') or {}, callbacks.get('LAWA') or {}
    averages = {name: [(1.0, stored(each))] for name, each in (ema.get('averages') or {}).items()}
    slots = {int(slot): stored(each) for slot, each in (lawa.get('window') or {}).items()}
    averages |= _lawa(slots, lawa.get('meta'))
    carried = _words(
        path, {key: state[key] for key in ('integrations', 'metadata') if isinstance(state.get(key), dict)}
    )
    return Checkpoint(path, 'pt', tensors, prefix, aliases, averages, carried)


def _prefix_of(names: Iterable[str]) -> str:
    return MODEL_PREFIX if all(name.startswith(MODEL_PREFIX) for name in names) else ''


def _lawa(
    slots: dict[int, dict[str, TensorOnDisk]], meta: str | None
) -> dict[str, list[tuple[float, dict[str, TensorOnDisk]]]]:
    if not slots:
        return {}
    weights = window_weights(json.loads(meta or '{}').get('weights', 'uniform'), len(slots))
    return {'lawa': [(weight, slots[slot]) for weight, slot in zip(weights, sorted(slots), strict=True)]}


def _member(enum: Any, name: str) -> Any:
    """What early releases of Python 3.11 pickle a member of an enumeration as, and nothing else of ``getattr``."""
    if enum is not metadata._MEM_FORMAT_ENCODING or name not in enum.__members__:
        raise UnsafeCheckpointError(f'it asks for {name!r} of {enum!r}, which no weights need')
    return enum[name]


_METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    ('builtins', 'getattr'): _member,
    **{
        ('torch.distributed.checkpoint.metadata', name): getattr(metadata, name)
        for name in (
            'BytesStorageMetadata', 'ChunkStorageMetadata', 'Metadata', 'MetadataIndex', 'StorageMeta',
            'TensorProperties', 'TensorStorageMetadata', '_MEM_FORMAT_ENCODING',
        )
    },
    ('torch.distributed.checkpoint.filesystem', '_StorageInfo'): filesystem._StorageInfo,
    ('torch', 'Size'): torch.Size,
    ('torch.serialization', '_get_layout'): torch.serialization._get_layout,
    ('collections', 'OrderedDict'): dict,
    **{('pathlib', name): PurePosixPath for name in ('Path', 'PosixPath', 'PurePosixPath')},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the metadata of a sharded checkpoint and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        try:
            return _METADATA_GLOBALS[module, name]
        except KeyError:
            raise UnsafeCheckpointError(f'it asks to import {module}.{name}, which no weights need') from None


def read_metadata(folder: str | Path) -> metadata.Metadata:
    """The metadata of a sharded checkpoint, without the risk of ``FileSystemReader.read_metadata``, a plain unpickling.

    Args:
        folder: A folder that ``torch.distributed.checkpoint`` wrote.

    Raises:
        CheckpointError: If it asks for anything but metadata, or is damaged.
    """
    path = Path(folder) / '.metadata'
    if not path.is_file():
        raise CheckpointError(f'{path} is no file')
    try:
        pickled = path.read_bytes()
        _check_pickle(pickled)
        found = _MetadataUnpickler(io.BytesIO(pickled)).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f'{path} is not safe to read: {error}') from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f'{path} is damaged: {error!r}') from None
    parts = [getattr(found, name, None) for name in ('storage_data', 'state_dict_metadata')]
    if not isinstance(found, metadata.Metadata) or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f'{path} is not the metadata of a sharded checkpoint')
    for info in found.storage_data.values():
        name = getattr(info, 'relative_path', None)
        if not isinstance(name, str) or PurePosixPath(name).name != name:  # Composer would download to there
            raise UnsafeCheckpointError(f'{path} is not safe to read: it names {name!r}, outside the folder')
        if not all(isinstance(at, int) and at >= 0 for at in (getattr(info, k, None) for k in ('offset', 'length'))):
            raise CheckpointError(f'{path} is damaged: it does not say where in {name} an entry is')
    return found


def load_structure(path: str | Path) -> dict[str, Any]:
    """What a Composer ``.pt`` file holds; its tensors have a dtype and a shape, and no data.

    Args:
        path: The file.

    Raises:
        UnsafeCheckpointError: If loading it could run code.
        CheckpointError: If it is cut off, damaged, or no checkpoint of Composer.
    """
    path = Path(path)
    loaded = _load_without_data(path, str(path))
    state = loaded.get('state') if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f'{path} holds no state, so it is not from Composer')
    _check_algorithms(state.get('algorithms'), str(path))
    return loaded


# `BlurPool(replace_convs=True,min_channels=16)`, `LowPrecisionLayerNorm(apply_at=Event.INIT)`
_CALL = (
    ast.Expression, ast.Call, ast.keyword, ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.USub, ast.List,
    ast.Tuple, ast.Dict, ast.Load,
)  # fmt: skip


def _check_algorithms(value: Any, where: str) -> None:
    """Refuse a list of algorithms of which Composer would make one by evaluating more than a call of its class."""
    for entry in value if isinstance(value, list) else ():
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], dict):
            continue
        text = f'algorithms.{entry[1].get("repr")}'
        try:
            nodes = list(ast.walk(ast.parse(text, mode='eval')))
        except (SyntaxError, ValueError):
            continue  # as in `<my.Algorithm object>`: it cannot be evaluated
        except (RecursionError, MemoryError):
            nodes = [ast.Pass()]
        calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
        if calls not in ([], [f'algorithms.{entry[0]}']) or not all(isinstance(node, _CALL) for node in nodes):
            raise UnsafeCheckpointError(f'{where} is not safe to read: Composer would evaluate {text[:200]!r}')


def _check_entries(path: Path, specs: list[tuple[int, int]]) -> None:
    """Refuse entries of a sharded checkpoint's file that are cut off or could run code."""
    if not os.path.isfile(path):
        raise CheckpointError(f'{path} is missing, or not of this checkpoint')
    size, end = path.stat().st_size, max((offset + length for offset, length in specs), default=0)
    if size < end:
        raise CheckpointError(f'{path} is damaged: it has {size:,} bytes, of which {end:,} are to be read')
    with open(path, 'rb') as file, FakeTensorMode():  # once, and not for each entry
        for offset, length in set(specs):
            view = io.BufferedReader(_Slice(file, offset, length))
            _check_algorithms(_load_without_data(view, str(path)), str(path))  # pyright: ignore[reportArgumentType]


def is_safe(path: str | Path, specs: list[tuple[int, int]] | None = None) -> bool:
    """What Composer asks before it unpickles a file; see :func:`guard_loading`.

    Args:
        path: A ``.pt`` file, a ``.metadata``, or a file of a sharded checkpoint.
        specs: Offset and length of what will be read of a file of a sharded checkpoint. Default: ``None``.

    Returns:
        True.

    Raises:
        UnsafeCheckpointError: If loading it could run code, naming the file, what it wanted, and what to do.
        CheckpointError: If it is cut off or damaged.
    """
    if not os.path.isfile(path):  # also if no file can be called so
        raise CheckpointError(f'{path} is missing, or no file')
    path = Path(os.path.realpath(path))  # what Composer calls rank0_checkpoint is a link to it
    try:
        if specs is not None:
            _check_entries(path, specs)
        elif path.name == '.metadata':
            read_metadata(path.parent)
        else:
            load_structure(path)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f'{error}; {TRUST}') from None
    return True


def guard_loading(trust: bool = False) -> None:
    """Have Composer ask :func:`is_safe` of every checkpoint that this process and its children load from now on.

    Composer unpickles whatever ``load_path`` names and whatever it resumes from, and evaluates the names of algorithms
    in it. This sets the environment variable ``CHECKPOINT_VALIDATION_FUNCTION``, which is Composer's own hook, and
    keeps archives (``load_path: x.tar``) from writing outside their folder.

    Args:
        trust: Ask no more. Default: ``False``.

    Raises:
        ValueError: If the variable leads to another function.

    Cost: reads the pickles four times and no tensors; 0.15 ms for each entry of a sharded checkpoint that is not a
    tensor, of which a tokenizer has one for each token.
    """
    ours, given = f'{__name__}.{is_safe.__name__}', os.environ.get(HOOK)
    if given not in (None, ours):
        if not trust:
            raise ValueError(f'{HOOK}={given} in the environment takes the place of our check; unset it, or {TRUST}')
    elif trust:
        os.environ.pop(HOOK, None)
        tarfile.TarFile.extractall = _EXTRACTALL
    else:
        os.environ[HOOK] = ours
        if hasattr(tarfile, 'data_filter'):
            tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # pyright: ignore
        else:  # Python below 3.10.12 and 3.11.4
            tarfile.TarFile.extractall = _leave_packed  # pyright: ignore[reportAttributeAccessIssue]


def _leave_packed(archive: tarfile.TarFile, *_: Any, **__: Any) -> None:
    raise UnsafeCheckpointError(f'{archive.name}: this Python cannot unpack an archive safely; unpack it yourself')


class _Slice(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        data = os.pread(self.file.fileno(), count, self.offset + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _read_slice(folder: Path, info: Any, where: str) -> tuple[Path, Any]:
    """The file an entry lies in, and the entry itself without its tensors' data."""
    path = folder / info.relative_path
    if getattr(info, 'transform_descriptors', None):
        raise CheckpointError(f'{path}: {where} is compressed ({", ".join(info.transform_descriptors)})')
    if not os.path.isfile(path):
        raise CheckpointError(f'{path} is missing, or not of this checkpoint')
    if path.stat().st_size < info.offset + info.length:
        raise CheckpointError(f'{path} is damaged: {path.stat().st_size:,} bytes, and {where} ends behind them')
    with open(path, 'rb') as file:
        view = io.BufferedReader(_Slice(file, info.offset, info.length))
        return path, _load_without_data(view, f'{where} in {path}')  # pyright: ignore[reportArgumentType]


def _open_sharded(folder: Path) -> Checkpoint:
    found = read_metadata(folder)
    storage = found.storage_data

    def entry(key: str, offset: torch.Size | None) -> Any:
        try:
            return storage[metadata.MetadataIndex(key, offset)]
        except KeyError:
            raise CheckpointError(f'{folder}/.metadata does not say where {key} is') from None

    def stored(key: str, tensor: metadata.TensorStorageMetadata) -> TensorOnDisk:
        dtype, shape = tensor.properties.dtype, tuple(tensor.size)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f'{folder}/.metadata does not say of what numbers {key} is')
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(shape):
            raise CheckpointError(f'{folder} does not hold all of {key}, or some of it twice')
        for chunk in tensor.chunks:
            info = entry(key, chunk.offsets) if prod(chunk.sizes) else None
            if info and not getattr(info, 'transform_descriptors', None):
                if info.length < prod(chunk.sizes) * dtype.itemsize:
                    raise CheckpointError(f'{folder}/.metadata says that {key} is larger than what is stored of it')

        def find() -> list[Chunk]:
            with _of_its_form(folder):
                return pieces_of()

        def pieces_of() -> list[Chunk]:
            pieces = []
            for chunk in tensor.chunks:
                if not prod(chunk.sizes):
                    continue
                info = entry(key, chunk.offsets)
                path, value = _read_slice(folder, info, key)
                if not isinstance(value, torch.Tensor) or (value.dtype, value.shape) != (dtype, chunk.sizes):
                    raise CheckpointError(
                        f'{path}: {key} is not the {dtype} of {tuple(chunk.sizes)} that .metadata says'
                    )
                at, sizes, stride = tuple(chunk.offsets), tuple(chunk.sizes), tuple(value.stride())
                place = _place_of(value)
                if place is None:
                    raise CheckpointError(f'{path}: {key} has no data')
                pieces.append(Chunk(path, info.offset + place, at, sizes, stride))
            return pieces

        return TensorOnDisk(dtype, shape, find)

    # a name may contain dots: only the planner's paths tell where it ends
    paths = {key: tuple(path) for key, path in (found.planner_data or {}).items()}
    if strange := [key for key, path in paths.items() if '.'.join(map(str, path)) != key]:
        raise CheckpointError(f'{folder}/.metadata does not say to which part of the state {strange[0]} belongs')
    tensors: dict[str, TensorOnDisk] = {}
    averages: dict[str, dict[str, TensorOnDisk]] = {}
    slots: dict[int, dict[str, TensorOnDisk]] = {}
    carried: dict[str, Any] = {}
    meta = None
    entries = {paths.get(key, tuple(key.split('.', 2))): (key, each) for key, each in found.state_dict_metadata.items()}
    prefix = _prefix_of(path[2] for path in entries if path[:2] == ('state', 'model'))
    for path, (key, each) in entries.items():
        if isinstance(each, metadata.TensorStorageMetadata):
            match path:
                case 'state', 'model', name:
                    tensors[name.removeprefix(prefix)] = stored(key, each)
                case 'state', 'callbacks', 'EMA', 'averages', average, name:
                    averages.setdefault(average, {})[name.removeprefix(prefix)] = stored(key, each)
                case 'state', 'callbacks', 'LAWA', 'window', slot, name:
                    slots.setdefault(int(slot), {})[name.removeprefix(prefix)] = stored(key, each)
        elif path == ('state', 'callbacks', 'LAWA', 'meta'):
            meta = _read_slice(folder, entry(key, None), key)[1]
        # the tokenizer would be one entry for each of its tokens
        elif path[:2] == ('state', 'metadata') or path[:4] == ('state', 'integrations', 'huggingface', 'model'):
            _put(carried, path[1:], _read_slice(folder, entry(key, None), key)[1])
    if not tensors:
        raise CheckpointError(f'{folder} holds no state.model, so it is not from Composer; expected {SUPPORTED}')
    all_averages = {name: [(1.0, each)] for name, each in averages.items()} | _lawa(slots, meta)
    return Checkpoint(folder, 'sharded', tensors, prefix, {}, all_averages, _words(folder, _with_lists(carried)))


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_lists(tree: Any) -> Any:
    """Nested dicts whose keys are 0, 1, ... back to the lists they were."""
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    is_list = bool(values) and all(isinstance(key, int) for key in values)
    return [values[key] for key in sorted(values)] if is_list else values


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold a checkpoint."""
    if checkpoint.kind == 'sharded':
        return sorted(file for file in checkpoint.path.iterdir() if file.is_file())
    return sorted({piece.path for one in checkpoint.tensors.values() for piece in one.pieces})


def is_complete(path: str | Path) -> bool:
    """Whether a local Composer checkpoint was written to its end, and its deletion has not begun.

    A zip's directory stands at its end. A sharded folder's ``.metadata`` is written last, and says how long its other
    files are, some of which may be deleted before it.

    Args:
        path: A ``.pt`` file, or a sharded folder.

    Raises:
        CheckpointError: If ``.metadata``, which is there whole or not at all, cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return zipfile.is_zipfile(path)
    if not (path / '.metadata').exists():
        return False
    ends: dict[str, int] = {}
    for info in read_metadata(path).storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    return all(sizes.get(name, -1) >= end for name, end in ends.items())


def newest_remote(folder: str) -> tuple[int, str | None]:
    """The newest whole checkpoint that a run has in object storage.

    An object is there whole or not at all. A sharded checkpoint is whole if every file is there that its ``.metadata``
    names, which Composer uploads first.

    Args:
        folder: The run's ``save_folder``.

    Returns:
        Its batch and its URI; 0 and None if there is none. Cost: one listing, and ``.metadata`` of the newest.

    Raises:
        StorageError: If the bucket cannot be reached.
        CheckpointError: If ``.metadata`` cannot be read.
    """
    names = set(list_names(folder))
    found = [re.fullmatch(r'(ep\d+-ba(\d+))(-rank0\.pt|/\.metadata)', name) for name in names]
    for match in sorted(filter(None, found), key=lambda match: int(match[2]), reverse=True):
        uri = f'{folder.rstrip("/")}/{match[1]}'
        if match[3] != '/.metadata':
            return int(match[2]), uri + match[3]
        with tempfile.TemporaryDirectory() as here:
            fetch(f'{uri}/.metadata', Path(here) / '.metadata')
            needed = {info.relative_path for info in read_metadata(here).storage_data.values()}
        if all(f'{match[1]}/{name}' in names for name in needed):
            return int(match[2]), uri
    return 0, None


def resolve_latest(uri: str) -> str:
    """Where Composer's ``latest-rank0.pt`` or ``latest-sharded-rank0`` leads in object storage.

    There are no links: ``latest-rank0.pt.symlink`` is an object that holds the name of another.

    Args:
        uri: A checkpoint, or one of these names, with or without ``.symlink``.

    Returns:
        The checkpoint's URI; the URI itself if there is no such object.

    Raises:
        StorageError: If the bucket cannot be reached.
    """
    from composer.utils import parse_uri  # takes seconds

    target = read_or_none(uri if uri.endswith('.symlink') else f'{uri}.symlink')
    return uri if target is None else uri.removesuffix(parse_uri(uri)[2]) + target.decode()


def dataset_state_of(path: str | Path) -> dict[str, Any]:
    """The state of the train loader's dataset in a Composer checkpoint.

    Args:
        path: A ``.pt`` file, or a sharded folder.

    Raises:
        CheckpointError: If it cannot be read, or has none (weights only, or another kind of dataset).
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f'{path} does not exist')
    state: Any = {}
    with _of_its_form(path):
        if path.is_dir():
            found = read_metadata(path)
            for key, where in (found.planner_data or {}).items():
                if tuple(where)[:3] == ('state', 'dataset_state', 'train'):
                    info = found.storage_data[metadata.MetadataIndex(key)]
                    _put(state, tuple(where)[3:], _read_slice(path, info, key)[1])
        else:
            loaded = _load_without_data(path, str(path))
            with_state = loaded.get('state') if isinstance(loaded, dict) else None
            state = ((with_state or {}).get('dataset_state') or {}).get('train')
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f'{path} holds no dataset state: it was saved with weights only, or from another loader')
    return state
