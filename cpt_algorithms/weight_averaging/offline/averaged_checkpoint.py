# SPDX-License-Identifier: Apache-2.0
"""An average of checkpoints as a checkpoint: Hugging Face safetensors, Composer ``.pt`` or Composer sharded."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.exports import CARD, RECIPE, is_foundry_mpt, newest_export
from cpt_algorithms.checkpoints.open import DTYPES, INDEX, Checkpoint, TensorOnDisk, open_checkpoint
from cpt_algorithms.compat import weights_dtype_key
from cpt_algorithms.files import hidden_sibling
from cpt_algorithms.weight_averaging.offline.agreement import check_agreement
from cpt_algorithms.weight_averaging.offline.average import (
    Average,
    as_bytes,
    average_tensors,
    check_alike,
    short,
    view_average,
)
from cpt_algorithms.weight_averaging.offline.storage import provenance_of

__all__ = ['find_small_files', 'make_plan', 'with_composer_names', 'write_average']

NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_FILES = ('.safetensors', '.bin', '.pt', '.pth', '.h5', '.msgpack', '.onnx', '.gguf', '.index.json')
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Plan:
    """Tensors to average, and what stays as it is.

    Args:
        parts: For each tensor (Hugging Face names) the weights, and what they weigh.
        dtypes: Of the results.
        newest: The last checkpoint: its tied tensors, names and Composer state are those of the result.
        copied: Tensors that are no floating-point numbers and are the newest checkpoint's.
        kept: Tensors that the average does not hold, and are averaged over the models themselves.
        accumulate: Dtype of the sums.
    """

    parts: dict[str, list[tuple[float, TensorOnDisk]]]
    dtypes: dict[str, torch.dtype]
    newest: Checkpoint
    copied: list[str]
    kept: list[str]
    accumulate: torch.dtype

    @property
    def read_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(stored.nbytes for parts in self.parts.values() for weight, stored in parts if weight)

    @property
    def written_bytes(self) -> int:
        """Bytes that will be written."""
        return sum(prod(parts[0][1].shape) * self.dtypes[name].itemsize for name, parts in self.parts.items())

    def described(self) -> dict[str, Any]:
        """For the provenance of the result."""
        return {
            'accumulator': short(self.accumulate),
            'dtypes': sorted({short(dtype) for dtype in self.dtypes.values() if dtype.is_floating_point}),
            'copied_from_newest': self.copied,
            'not_in_the_callback': self.kept,
            'parts_of_the_average': [weight for weight, _ in next(iter(self.parts.values()), [])],
        }

    def averages(self, write: dict[str, Callable[[int, Any], None]]) -> Iterator[Average]:
        """The work, in the order of ``write``."""
        return (Average(self.parts[name], self.dtypes[name], write[name]) for name in write)


def make_plan(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    average: str | None = None,
    dtype: torch.dtype | None = None,
    accumulate: torch.dtype = torch.float32,
    may_differ: bool = False,
    is_one_run: bool = True,
) -> Plan:
    """Lay out an average, and refuse what cannot be averaged.

    Args:
        checkpoints: Oldest first.
        weights: As many, with sum 1.
        average: Instead of the models, average what the callbacks kept under this name. Default: ``None``.
        dtype: Of the floating-point results. Default: as in the model.
        accumulate: Dtype of the sums. Default: ``float32``.
        may_differ: Whether what is no weight may differ, see :func:`check_agreement`. Default: ``False``.
        is_one_run: Whether dtypes must be the same, as those of one run are. Default: ``True``.

    Raises:
        CheckpointError: If the checkpoints do not fit each other, or one has no such average.
    """
    check_alike(checkpoints, is_one_run)
    check_agreement(checkpoints, may_differ)
    newest = checkpoints[-1]
    views = [view_average(each, average) if average else [(1.0, each)] for each in checkpoints]
    check_alike([view for each in views for _, view in each], is_one_run)
    parts, dtypes, copied, kept = {}, {}, [], []
    for name, own in newest.tensors.items():
        dtypes[name] = (dtype or own.dtype) if own.dtype.is_floating_point else own.dtype
        if not own.dtype.is_floating_point:
            parts[name] = [(1.0, own)]
            copied.append(name)
        elif average and all(view.tensors[name] is own for _, view in views[-1]):
            parts[name] = [(w, checkpoint.tensors[name]) for w, checkpoint in zip(weights, checkpoints, strict=True)]
            kept.append(name)
        else:
            parts[name] = [
                (weight * part, view.tensors[name])
                for weight, each in zip(weights, views, strict=True)
                for part, view in each
            ]
    return Plan(parts, dtypes, newest, copied, kept, accumulate)


def write_average(
    plan: Plan,
    out: Path,
    to: str,
    provenance: dict[str, Any],
    small_files: dict[str, bytes],
    max_shard_size: str,
    progress: Progress,
) -> None:
    """Compute an average into a checkpoint that appears whole or not at all.

    Args:
        plan: What to average.
        out: The checkpoint; must not exist.
        to: ``hf``, ``pt`` or ``sharded``.
        provenance: How it was made; written as JSON in the folder, or beside the file.
        small_files: Of :func:`find_small_files`, for ``hf``.
        max_shard_size: As ``save_pretrained`` takes it, for ``hf``.
        progress: See :func:`average_tensors`.

    Raises:
        CheckpointError: If ``out`` exists, another run is making it, or an input is damaged.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f'{out} exists; choose another --out or delete it')
    # killed, it leaves only the hidden folder, which the next run empties
    with hidden_sibling(out, CheckpointError(f'another run is making {out}')) as folder:
        made = folder / out.name
        if to == 'hf':
            _write_hugging_face(plan, made, small_files, max_shard_size, progress)
        elif to == 'pt':
            _write_monolithic(plan, made, progress)
        else:
            _write_sharded(plan, made, progress)
        content = json.dumps(provenance, indent=2) + '\n'
        provenance_of(made, is_file=to == 'pt').write_text(content, encoding='utf-8')
        for each in sorted(folder.iterdir(), key=lambda path: path.name == out.name):  # the result last
            each.rename(out.with_name(each.name))


def find_small_files(checkpoint: Checkpoint, config: Path | None) -> dict[str, bytes]:
    """The files of a Hugging Face model besides its weights, by name: config, tokenizer, code.

    Args:
        checkpoint: The newest.
        config: A folder that has them. Default: the checkpoint's own folder (Hugging Face), the newest export
            ``huggingface/*`` beside it (Composer), or what its state holds.

    Raises:
        CheckpointError: If there is no ``config.json``.
    """
    own = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    found = own if checkpoint.kind == 'hf' else newest_export(own.parent if checkpoint.kind == 'sharded' else own)
    if (given := config or found) is None:
        return _files_of_state(checkpoint)
    folder = Path(given)
    if not (folder / 'config.json').is_file():
        raise CheckpointError(f'{folder} has no config.json; give a folder that has one with --config')
    not_its_own = (*WEIGHT_FILES, CARD, RECIPE)  # the last two say what the other model is
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.endswith(not_its_own))
    return {file.name: file.read_bytes() for file in files}


def _files_of_state(checkpoint: Checkpoint) -> dict[str, bytes]:
    config, tokenizer = checkpoint.hugging_face
    if not config:
        raise CheckpointError(
            f'{checkpoint.path} holds no config of a Hugging Face model, and there is no export huggingface/* beside '
            'it; give a folder with config.json with --config'
        )
    files = {'config.json': f'{json.dumps(config, indent=2)}\n'.encode()}
    for name, entry in tokenizer.items():
        content = entry['content']
        if Path(name).name != name:
            raise CheckpointError(f'{checkpoint.path}: its tokenizer has a file {name!r}')
        if entry['file_extension'] == '.json':
            content = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
        elif entry['file_extension'] == '.txt':
            content = '\n'.join(content)
        files[name] = content if isinstance(content, bytes) else content.encode()
    return files


def _fill(plan: Plan, skeleton: Checkpoint, progress: Progress) -> None:
    """Compute everything into a file that has room for it."""
    in_order = sorted((one.chunks[0].offset, name) for name, one in skeleton.tensors.items())
    (path,) = {one.chunks[0].path for one in skeleton.tensors.values()} or {skeleton.path}

    def write(offset: int, begin: int, data: Any) -> None:
        place = offset + begin
        while data:
            count = os.pwrite(file.fileno(), data, place)
            data, place = data[count:], place + count

    with open(path, 'r+b') as file:
        writers = {name: partial(write, offset) for offset, name in in_order}
        average_tensors(plan.averages(writers), plan.accumulate, progress)


def _write_hugging_face(
    plan: Plan, folder: Path, small_files: dict[str, bytes], max_shard_size: str, progress: Progress
) -> None:
    """A folder that ``from_pretrained`` takes; the type in ``config.json`` becomes that of the weights."""
    folder.mkdir()
    for name, content in small_files.items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    floats = {short(dtype) for dtype in plan.dtypes.values() if dtype.is_floating_point}
    key = weights_dtype_key(config)
    if len(floats) == 1 and config.get(key) not in floats:
        config[key] = floats.pop()
        (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    split = split_state_dict_into_shards_factory(
        {name: (name,) for name in plan.parts},  # strings would be left out
        get_storage_size=lambda key: prod(plan.parts[key[0]][0][1].shape) * plan.dtypes[key[0]].itemsize,
        filename_pattern='model{suffix}.safetensors',
        get_storage_id=lambda key: None,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        _write_safetensors_header(plan, folder / file, names)
        _fill(plan, open_checkpoint(folder / file), progress)
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _write_safetensors_header(plan: Plan, path: Path, names: Sequence[str]) -> None:
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers refuses a file without
    end = 0
    for name in sorted(names, key=lambda name: (-plan.dtypes[name].itemsize, name)):  # so everything is aligned
        shape, dtype = plan.parts[name][0][1].shape, plan.dtypes[name]
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {'dtype': NAMES[dtype], 'shape': shape, 'data_offsets': [begin, end]}
    data = json.dumps(header, separators=(',', ':')).encode()
    data += b' ' * (-len(data) % 8)
    with open(path, 'wb') as file:
        file.write(len(data).to_bytes(8, 'little') + data)
        file.truncate(8 + len(data) + end)


def _write_monolithic(plan: Plan, path: Path, progress: Progress) -> None:
    """A file that ``load_path`` with ``load_weights_only: true`` takes. Tied tensors stay tied."""
    newest = plan.newest
    with FakeTensorMode():
        model = {name: torch.empty(one.shape, dtype=plan.dtypes[name]) for name, one in newest.tensors.items()}
    model |= {alias: model[name] for alias, name in newest.aliases.items()}
    state: dict[str, Any] = {'model': {newest.prefix + name: tensor for name, tensor in model.items()}}
    state |= {'integrations': newest.integrations, 'metadata': newest.metadata}
    # leaves room where the data goes
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({'state': state}, path)
    _fill(plan, open_checkpoint(path), progress)


class _LazyPlanner(DefaultSavePlanner):
    """Computes each tensor when its turn to be written comes."""

    def __init__(self, compute: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.tensor_data is None:
            return super().resolve_data(write_item)
        return self.compute(write_item.index.fqn)


def _write_sharded(plan: Plan, folder: Path, progress: Progress) -> None:
    """A folder that ``load_path`` with ``load_weights_only: true`` takes, on any number of ranks.

    Takes memory for one or two of the result's tensors.
    """
    newest = plan.newest
    sources = {name: name for name in newest.tensors} | newest.aliases
    by_key = {f'state.model.{newest.prefix}{name}': source for name, source in sources.items()}

    def compute(key: str) -> torch.Tensor:
        name = by_key[key]
        result = torch.empty(plan.parts[name][0][1].shape, dtype=plan.dtypes[name])
        data = as_bytes(result.view(-1))

        def write(begin: int, block: Any) -> None:
            data[begin : begin + len(block)] = block

        average_tensors(plan.averages({name: write}), plan.accumulate, progress)
        return result

    model = {
        newest.prefix + name: torch.empty(newest.tensors[source].shape, dtype=plan.dtypes[source], device='meta')
        for name, source in sources.items()
    }
    state: dict[str, Any] = {'model': model, 'metadata': newest.metadata}
    if config := (newest.integrations.get('huggingface') or {}).get('model'):
        state['integrations'] = {'huggingface': {'model': config}}  # a tokenizer is an entry for each of its tokens
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.distributed is ')
        warnings.filterwarnings('ignore', 'TypedStorage is deprecated')
        save(
            {'state': state},
            storage_writer=FileSystemWriter(folder, thread_count=1),
            planner=_LazyPlanner(compute),
            no_dist=True,
        )
    if not (folder / '.metadata').exists():
        raise CheckpointError(f'{folder} was not written')


def with_composer_names(checkpoints: Sequence[Checkpoint], config: Path | None) -> list[Checkpoint]:
    """Give Hugging Face checkpoints the names that ``load_path`` takes, as ``from_pretrained`` does.

    Published models leave out the prefix of their base model and the second name of tied tensors, and hold buffers that
    transformers makes anew since, such as ``attn.bias`` of GPT-2.

    Args:
        checkpoints: Of any kind; only those of Hugging Face are changed.
        config: The folder with ``config.json``. Default: that of the newest of them.

    Returns:
        The checkpoints; as they are if transformers cannot build the model by itself, or LLM Foundry wrote them.

    Raises:
        CheckpointError: If the weights do not fit ``config.json``.
    """
    ours = [each for each in checkpoints if each.kind == 'hf']
    if not ours:
        return list(checkpoints)
    from accelerate import init_empty_weights
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    newest = ours[-1].path
    folder = config or (newest if newest.is_dir() else newest.parent)
    try:
        with init_empty_weights():
            described = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if is_foundry_mpt(described.to_dict()):
                return list(checkpoints)
            model = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    except Exception:  # what a config.json holds can be anything
        return list(checkpoints)
    model.tie_weights()
    return [_named_as(model, folder, each) if each.kind == 'hf' else each for each in checkpoints]


def _named_as(model: Any, folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    ids = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    buffers = {name for name, _ in model.named_buffers()}
    left_out = [*(model._keys_to_ignore_on_load_unexpected or ()), r'rotary_emb\.inv_freq']
    first = {number: name for name, number in reversed(ids.items())}  # of the names of tied tensors
    tensors: dict[str, TensorOnDisk] = {}
    for name, tensor in checkpoint.tensors.items():
        names = (name, f'{model.base_model_prefix}.{name}')
        if known := [each for each in names if each in ids]:
            tensors.setdefault(first[ids[known[0]]], tensor)
        elif not (buffers.intersection(names) or any(re.search(pattern, name) for pattern in left_out)):
            raise CheckpointError(f'{checkpoint.path} does not fit {folder}/config.json, which knows no {name}')
    if missing := [name for name in first.values() if name not in tensors]:
        raise CheckpointError(f'{checkpoint.path} does not fit {folder}/config.json: {missing[0]} is missing')
    aliases = {name: first[number] for name, number in ids.items() if name not in tensors}
    return replace(checkpoint, tensors=tensors, aliases=aliases)
