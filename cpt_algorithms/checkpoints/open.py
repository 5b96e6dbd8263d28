# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a checkpoint lie on disk: Composer ``.pt``, Composer sharded and Hugging Face safetensors.

Opening reads names, dtypes, shapes and positions, never the tensors, and runs no code that a file brings along. What is
missing, damaged or of another form raises CheckpointError; what would run code, UnsafeCheckpointError.
"""

import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from bisect import bisect_left
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
from torch.distributed.checkpoint._traverse import set_element
from torch.utils._pytree import tree_leaves

from cpt_algorithms.checkpoints.errors import CheckpointError, UnsafeCheckpointError
from cpt_algorithms.compat import NUMPY_CORES, PATH_MODULES
from cpt_algorithms.formatting import one_line

__all__ = [
    'Checkpoint',
    'Chunk',
    'TensorOnDisk',
    'dataset_state_of',
    'entry_of',
    'files_of',
    'hash_entries',
    'load_entry',
    'load_structure',
    'model_config_of',
    'open_checkpoint',
    'read_metadata',
    'safe_globals',
    'state_of',
    'time_of',
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


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, which begins at ``at``, in a file from byte ``offset`` on; ``stride`` in elements."""

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
    """A tensor on disk; ``find`` is called when its chunks are first needed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    find: Callable[[], list[Chunk]]

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Together they cover the tensor once."""
        return self.find()

    @cached_property
    def is_flat(self) -> bool:
        """Whether every chunk is a run of consecutive elements."""
        return all(chunk.is_flat_in(self.shape) for chunk in self.chunks)

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
        ema: The averages that the callback ``EMA`` kept, by name.
        lawa: The window that the callback ``LAWA`` kept, oldest first.
        lawa_weights: The kind of weights of that window, such as ``uniform``.
        integrations: Of a Composer state: configuration and tokenizer of a Hugging Face model.
        metadata: Of a Composer state, without types of its own.
    """

    path: Path
    kind: str
    tensors: dict[str, TensorOnDisk]
    prefix: str = MODEL_PREFIX
    aliases: dict[str, str] = field(default_factory=dict)
    ema: dict[str, dict[str, TensorOnDisk]] = field(default_factory=dict)
    lawa: list[dict[str, TensorOnDisk]] = field(default_factory=list)
    lawa_weights: str = 'uniform'
    integrations: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def hugging_face(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a Composer state: the configuration of a Hugging Face model, and entries of its tokenizer's files."""
        saved = self.integrations.get('huggingface') or {}
        config = ((saved.get('model') or {}).get('config') or {}).get('content')
        return config or {}, saved.get('tokenizer') or {}


def safe_globals() -> list[Any]:
    """What a Composer checkpoint holds besides tensors and plain values; none of it can run code."""
    import datetime

    import numpy as np
    from torch.torch_version import TorchVersion

    reconstruct = np.empty(0).__reduce__()[0]
    arrays = [(reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in NUMPY_CORES]
    return [datetime.timedelta, TorchVersion, *arrays, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


@contextmanager
def _refusing_other_forms(path: Path) -> Iterator[None]:
    """Report whatever a checkpoint holds in the wrong places as one error."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, TypeError, LookupError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        problem = f'{type(error).__name__}: {_one_line(error)}'
        raise CheckpointError(f'{path} is not of the form of a checkpoint: {problem}') from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any supported kind. Reads headers only, and the small values of the state.

    Raises:
        CheckpointError: If it is missing, damaged, of no supported kind, or needs code that a model never needs.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f'{path} does not exist; expected {SUPPORTED}')
    with _refusing_other_forms(path):
        if (path / '.metadata').exists():
            return _open_sharded(path)
        if path.is_dir():
            for name in (SINGLE, INDEX):
                if (path / name).exists():
                    return Checkpoint(path, 'hf', _read_hugging_face(path / name))
            unfinished = ': .metadata is missing, so it was not saved to the end' if any(path.glob('*.distcp')) else ''
            raise CheckpointError(f'{path} is no checkpoint{unfinished}; expected {SUPPORTED}')
        if path.name.endswith(('.safetensors', '.safetensors.index.json')):
            return Checkpoint(path, 'hf', _read_hugging_face(path))
        return _open_monolithic(path)


def _read_hugging_face(path: Path) -> dict[str, TensorOnDisk]:
    if not path.is_file():  # a link to a device can be read for ever
        raise CheckpointError(f'{path} is missing, or no file')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    try:
        places = dict(json.loads(path.read_text(encoding='utf-8'))['weight_map'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f'{path} is no safetensors index: {error!r}') from None
    if wrong := [name for name in places.values() if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f'{path} names the file {wrong[0]!r}, which is not beside it')
    files = {}
    for name in sorted(set(places.values())):
        if not os.path.isfile(path.parent / name):
            raise CheckpointError(f'{path} names {name}, which is missing')
        files[name] = _read_safetensors(path.parent / name)
    there = {(key, name) for name in files for key in files[name]}
    if unlike := sorted(there ^ set(places.items())):
        raise CheckpointError(f'{path} and {unlike[0][1]} do not agree on where {unlike[0][0]} is')
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
        shape, offset = tuple(entry['shape']), 8 + length + entry['data_offsets'][0]
        tensors[key] = _in_one_chunk(path, offset, DTYPES[entry['dtype']], shape, contiguous(shape))
    return tensors


def _in_one_chunk(
    path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> TensorOnDisk:
    chunk = Chunk(path, offset, (0,) * len(shape), shape, stride)
    return TensorOnDisk(dtype, shape, lambda: [chunk])


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _load_without_data(file: Path | BinaryIO, where: str) -> Any:
    """The result of ``torch.load``, with tensors that only know where their bytes are in the file."""
    if isinstance(file, Path) and not file.is_file():  # a device can be read without end
        raise CheckpointError(f'{where} is no file')
    try:
        with zipfile.ZipFile(file) as archive:  # whose directory stands at the end
            records = archive.infolist()
            for record in records:
                archive.open(record).close()  # which reads the header in front of it, as torch does
            ends = sorted([*(record.header_offset for record in records), archive.start_dir])
    except Exception as error:
        raise CheckpointError(f'{where} is damaged: it is cut off, or no file of torch.save ({error})') from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f'{where} is compressed inside; save it again with torch.save')
    if not isinstance(file, Path):
        file.seek(0)
    try:
        # cpu: a checkpoint of a GPU run is read where there is none
        with torch.serialization.safe_globals(safe_globals()), FakeTensorMode():
            loaded = torch.load(file, map_location='cpu', weights_only=True)
        tensors = [leaf for leaf in tree_leaves(loaded) if isinstance(leaf, torch.Tensor)]
    except pickle.UnpicklingError as error:
        found = re.search(r'GLOBAL (\S+)', str(error))
        what = f'it asks to import {found[1]}' if found else _one_line(error)
        raise UnsafeCheckpointError(f'{where} is not safe to read: {what}, which no weights need') from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f'{where} is damaged: {_one_line(error)}') from None
    for tensor in tensors:
        if (begin := _place_of(tensor)) is None:
            continue
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        size = span * tensor.dtype.itemsize if tensor.numel() else 0
        room = ends[bisect_left(ends[:-1], begin)] - begin  # torch maps such a file without an error
        if min(tensor.storage_offset(), *tensor.stride(), 0) < 0 or size > room:
            raise CheckpointError(f'{where} is damaged: a tensor reaches beyond its storage')
    return loaded


def _one_line(error: Exception) -> str:
    return one_line(str(error) or repr(error))[:500]


def _place_of(tensor: torch.Tensor) -> int | None:
    """Byte of a fake tensor's first element in the file it was loaded from; None if it is no array with data."""
    start = getattr(tensor.untyped_storage(), '_checkpoint_offset', None) if tensor.layout == torch.strided else None
    return None if start is None else start + int(tensor.storage_offset()) * tensor.dtype.itemsize


def _open_monolithic(path: Path) -> Checkpoint:
    loaded = _load_without_data(path, str(path))
    state = loaded.get('state') if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not isinstance(model := state.get('model'), dict):
        raise CheckpointError(f'{path} holds no state.model, so it is not from Composer; expected {SUPPORTED}')
    prefix = _prefix_of(model)

    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, TensorOnDisk]:
        found = {}
        for key, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or (offset := _place_of(tensor)) is None:
                raise CheckpointError(f'{path}: {key} is a {type(tensor).__name__}, not a tensor with data')
            one = _in_one_chunk(path, offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
            found[key.removeprefix(prefix)] = one
        return found

    tensors, aliases, first = {}, {}, {}
    for key, one in stored(model).items():
        name = first.setdefault((one.dtype, one.chunks[0]) if prod(one.shape) else key, key)
        if name == key:
            tensors[key] = one
        else:
            aliases[key] = name
    callbacks = state.get('callbacks') or {}
    ema, lawa = callbacks.get('EMA') or {}, callbacks.get('LAWA') or {}
    window = sorted((lawa.get('window') or {}).items(), key=lambda item: int(item[0]))
    averages = {name: stored(each) for name, each in (ema.get('averages') or {}).items()}
    kept = averages, [stored(each) for _, each in window], _lawa_weights(lawa.get('meta'))
    about = _about(path, state.get('integrations'), state.get('metadata'))
    return Checkpoint(path, 'pt', tensors, prefix, aliases, *kept, *about)


def _prefix_of(names: Iterable[str]) -> str:
    return MODEL_PREFIX if all(name.startswith(MODEL_PREFIX) for name in names) else ''


def _lawa_weights(meta: str | None) -> str:
    return json.loads(meta or '{}').get('weights', 'uniform')


def _about(path: Path, integrations: Any, described: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """``integrations`` in the form in which Composer fills them, and ``metadata`` in plain types."""
    if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(integrations)):
        raise CheckpointError(f'{path}: state.integrations holds a tensor')
    found = dict(integrations or {})
    saved = found.get('huggingface') or {}
    _plain(((saved.get('model') or {}).get('config') or {}).get('content')).keys()
    for name, entry in (saved.get('tokenizer') or {}).items():
        form = {'.json': (dict, list), '.txt': list, '.model': bytes}.get(entry['file_extension'], (str, bytes))
        if not isinstance(name, str) or not isinstance(entry['content'], form):
            raise TypeError(f'the content of {name!r}, a file of its tokenizer, is a {type(entry["content"]).__name__}')
    return found, _plain(described)


def _plain(described: Any) -> dict[str, Any]:
    """A section of the state in plain types: Composer puts a version there that has a class of its own."""
    return json.loads(json.dumps(described or {}))


def _member(enum: Any, name: str) -> Any:
    """Members of enumerations as early releases of Python 3.11 pickle them, and no other ``getattr``."""
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
    **{(module, name): PurePosixPath for module in PATH_MODULES for name in ('Path', 'PosixPath', 'PurePosixPath')},
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
    """The metadata of a sharded checkpoint, without the plain unpickling of ``FileSystemReader.read_metadata``."""
    path = Path(folder) / '.metadata'
    if not path.is_file():
        raise CheckpointError(f'{path} is no file')
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        places = [(info.relative_path, min(info.offset, info.length)) for info in found.storage_data.values()]
        if outside := [name for name, _ in places if PurePosixPath(name).name != name]:  # Composer would download there
            raise UnsafeCheckpointError(f'it names {outside[0]!r}, outside the folder')
        if not isinstance(found.state_dict_metadata, dict) or any(place < 0 for _, place in places):
            raise ValueError('it is not the metadata of a sharded checkpoint')
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f'{path} is not safe to read: {error}') from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f'{path} is damaged: {_one_line(error)}') from None
    return found


def load_structure(path: str | Path) -> dict[str, Any]:
    """What a Composer ``.pt`` file holds; its tensors have a dtype and a shape, and no data."""
    path = Path(path)
    loaded = _load_without_data(path, str(path))
    if not isinstance(loaded, dict) or not isinstance(loaded.get('state'), dict):
        raise CheckpointError(f'{path} holds no state, so it is not from Composer')
    return loaded


def load_entry(path: Path, offset: int, length: int, where: str) -> Any:
    """An entry of a sharded checkpoint's file, its tensors without data; ``where`` is what errors call it."""
    if not os.path.isfile(path):  # also if no file can have this name
        raise CheckpointError(f'{path} is missing, or not of this checkpoint')
    if (size := path.stat().st_size) < offset + length:
        raise CheckpointError(f'{path} is damaged: it has {size:,} bytes, of which {offset + length:,} are to be read')
    with open(path, 'rb') as file:
        view = io.BufferedReader(_Slice(file, offset, length))
        return _load_without_data(view, where)  # pyright: ignore[reportArgumentType]


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


class _Entries:
    """A sharded checkpoint's ``.metadata``, and the entries that it leads to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)

    def where(self, key: str, offset: torch.Size | None = None) -> Any:
        """File, offset and length."""
        info = self.metadata.storage_data.get(metadata.MetadataIndex(key, offset))
        if info is None:
            raise CheckpointError(f'{self.folder}/.metadata does not say where {key} is')
        if descriptors := getattr(info, 'transform_descriptors', None):
            raise CheckpointError(f'{self.folder / info.relative_path}: {key} is compressed ({", ".join(descriptors)})')
        return info

    def read(self, key: str, offset: torch.Size | None = None) -> Any:
        """The entry, its tensors without data."""
        info = self.where(key, offset)
        path = self.folder / info.relative_path
        return load_entry(path, info.offset, info.length, f'{key} in {path}')

    def below(self, *begin: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """The names of what lies below a place in the state, and the rest of their paths."""
        for key, path in (self.metadata.planner_data or {}).items():
            if tuple(path)[: len(begin)] == begin:
                yield key, tuple(path)[len(begin) :]

    def stored(self, key: str, tensor: metadata.TensorStorageMetadata) -> TensorOnDisk:
        """A tensor, whose chunks are read when they are needed."""
        dtype, shape = tensor.properties.dtype, tuple(tensor.size)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f'{self.folder}/.metadata does not say of what numbers {key} is')
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(shape):
            raise CheckpointError(f'{self.folder} does not hold all of {key}, or some of it twice')
        chunks = [chunk for chunk in tensor.chunks if prod(chunk.sizes)]
        if any(self.where(key, each.offsets).length < prod(each.sizes) * dtype.itemsize for each in chunks):
            raise CheckpointError(f'{self.folder}/.metadata says that {key} is larger than what is stored of it')

        @_refusing_other_forms(self.folder)
        def find() -> list[Chunk]:
            found = []
            for chunk in chunks:
                at, sizes, info = tuple(chunk.offsets), tuple(chunk.sizes), self.where(key, chunk.offsets)
                path, value = self.folder / info.relative_path, self.read(key, chunk.offsets)
                if not isinstance(value, torch.Tensor) or (value.dtype, value.shape) != (dtype, chunk.sizes):
                    raise CheckpointError(f'{path}: {key} is not the {dtype} of {sizes} that .metadata says')
                if (place := _place_of(value)) is None:
                    raise CheckpointError(f'{path}: {key} has no data')
                found.append(Chunk(path, info.offset + place, at, sizes, tuple(value.stride())))
            return found

        return TensorOnDisk(dtype, shape, find)


def hash_entries(folder: Path, *begin: str) -> dict[tuple[Any, ...], str]:
    """Entries of a sharded checkpoint below a place in its state: hashes of their bytes, by the rest of their paths."""
    entries, found = _Entries(folder), {}
    for key, rest in entries.below(*begin):
        info = entries.where(key)
        try:
            with open(folder / info.relative_path, 'rb') as file:
                content = os.pread(file.fileno(), info.length, info.offset)
        except OSError as error:
            raise CheckpointError(f'{error.filename}: {error.strerror}') from None
        found[rest] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return found


def _open_sharded(folder: Path) -> Checkpoint:
    entries = _Entries(folder)
    kept = entries.metadata.state_dict_metadata
    # a name may contain dots: only the planner's paths tell where it ends
    paths = dict(entries.below())
    if strange := [key for key, path in paths.items() if '.'.join(map(str, path)) != key]:
        raise CheckpointError(f'{folder}/.metadata does not say to which part of the state {strange[0]} belongs')
    tensors: dict[str, TensorOnDisk] = {}
    ema: dict[str, dict[str, TensorOnDisk]] = {}
    window: dict[int, dict[str, TensorOnDisk]] = {}
    words: dict[str, Any] = {}
    meta = None
    by_path = {paths.get(key, tuple(key.split('.', 2))): (key, each) for key, each in kept.items()}
    prefix = _prefix_of(path[2] for path in by_path if path[:2] == ('state', 'model'))
    for path, (key, each) in by_path.items():
        if isinstance(each, metadata.TensorStorageMetadata):
            match path:
                case 'state', 'model', name:
                    tensors[name.removeprefix(prefix)] = entries.stored(key, each)
                case 'state', 'callbacks', 'EMA', 'averages', average, name:
                    ema.setdefault(average, {})[name.removeprefix(prefix)] = entries.stored(key, each)
                case 'state', 'callbacks', 'LAWA', 'window', slot, name:
                    window.setdefault(int(slot), {})[name.removeprefix(prefix)] = entries.stored(key, each)
        elif path == ('state', 'callbacks', 'LAWA', 'meta'):
            meta = entries.read(key)
        # the tokenizer would be one entry for each of its tokens
        elif path[:2] == ('state', 'metadata') or path[:4] == ('state', 'integrations', 'huggingface', 'model'):
            set_element(words, path[1:], entries.read(key))
    if not tensors:
        raise CheckpointError(f'{folder} holds no state.model, so it is not from Composer; expected {SUPPORTED}')
    averages = ema, [window[slot] for slot in sorted(window)], _lawa_weights(meta)
    about = _about(folder, words.get('integrations'), words.get('metadata'))
    return Checkpoint(folder, 'sharded', tensors, prefix, {}, *averages, *about)


def entry_of(folder: str | Path, key: str) -> Any:
    """An entry of a sharded checkpoint that is no tensor."""
    return _Entries(Path(folder)).read(key)


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold a checkpoint."""
    if checkpoint.kind == 'sharded':
        return sorted(file for file in checkpoint.path.iterdir() if file.is_file())
    return sorted({chunk.path for one in checkpoint.tensors.values() for chunk in one.chunks})


def state_of(path: str | Path, *keys: str) -> dict[str, Any]:
    """A section of the state in a Composer checkpoint, such as ``'dataset_state', 'train'``; empty if it has none."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f'{path} does not exist')
    state: Any = {}
    with _refusing_other_forms(path):
        if path.is_dir():
            entries = _Entries(path)
            for key, rest in entries.below('state', *keys):
                set_element(state, rest, entries.read(key))
        else:
            state = load_structure(path)['state']
            for key in keys:
                state = state.get(key) or {}
    if not isinstance(state, dict):
        raise CheckpointError(f'{path}: state.{".".join(keys)} is no section of a state')
    return state


def dataset_state_of(path: str | Path) -> dict[str, Any]:
    """The state of the train loader's dataset in a Composer checkpoint."""
    if not (state := state_of(path, 'dataset_state', 'train')):
        raise CheckpointError(f'{path} holds no dataset state: it was saved with weights only, or from another loader')
    return state


def time_of(path: str | Path) -> dict[str, int]:
    """How far a Composer checkpoint was trained, in ``ep``, ``ba``, ``sp`` and ``tok``."""
    time = state_of(path, 'timestamp', 'Timestamp')
    try:
        return {'ep': time['epoch'], 'ba': time['batch'], 'sp': time['sample'], 'tok': time['token']}
    except KeyError as key:
        raise CheckpointError(f'{path} does not say how far it was trained: {key} is missing') from None


def model_config_of(path: str | Path) -> dict[str, Any]:
    """The Hugging Face configuration of the model in a Composer checkpoint of llm-foundry; empty if it has none."""
    with _refusing_other_forms(Path(path)):
        return _plain(state_of(path, 'integrations', 'huggingface', 'model', 'config').get('content'))
