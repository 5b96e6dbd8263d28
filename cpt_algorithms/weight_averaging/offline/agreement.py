# SPDX-License-Identifier: Apache-2.0
"""Whether checkpoints are of one model: everything in them that is not a weight must agree before they are averaged."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.open import Checkpoint, hash_entries
from cpt_algorithms.compat import WEIGHTS_DTYPE
from cpt_algorithms.formatting import first_of
from cpt_algorithms.validation import differences, short_repr
from cpt_algorithms.weight_averaging.offline.average import read_tensor, short

__all__ = ['check_agreement']

# Keys of config.json about its origin, the software that wrote it (a run that has exported adds auto_map to its
# checkpoints), and the tensors, which say it themselves; as are those that begin with _.
_ORIGIN = ('architectures', 'auto_map', *WEIGHTS_DTYPE, 'transformers_version', 'use_cache')
# Of the tokenizer's files likewise; how a batch of texts is filled up or cut is up to the caller.
_OF_TOKENIZERS = ('model_max_length', 'name_or_path', 'padding', 'tokenizer_class', 'truncation')
# Where a sharded checkpoint has its tokenizer: an entry for each token.
_TOKENIZER_ENTRIES = ('state', 'integrations', 'huggingface', 'tokenizer')
# What save_pretrained of a tokenizer writes.
_TOKENIZER = ('tokenizer', 'vocab', 'merges', 'special_tokens', 'added_tokens', 'spiece', 'sentencepiece')


def check_agreement(checkpoints: Sequence[Checkpoint], may_differ: bool = False) -> None:
    """Refuse to average models of which more differs than their weights.

    Configurations (after the defaults of transformers), tokenizers and all tensors that are no floating-point numbers
    must be the same, as far as the checkpoints hold them. Codes of quantised models cannot be averaged at all.

    Args:
        checkpoints: The others are compared with the first.
        may_differ: Whether to refuse only what is quantised; the newest one's is taken. Default: ``False``.

    Raises:
        CheckpointError: Naming the first three differences.

    Cost: reads the tensors that are no floating-point numbers, and the files of the tokenizers.
    """
    held = [_saved_files(checkpoint) for checkpoint in checkpoints]
    for checkpoint, files in zip(checkpoints, held, strict=True):
        for key in ('quantization_config', 'compression_config'):
            if (files.get('config.json') or {}).get(key):
                raise CheckpointError(
                    f'{checkpoint.path}: config.json has {key}; codes of quantised weights cannot be averaged, so '
                    'average the models before they are quantised'
                )
    if may_differ:
        return
    for other, files in zip(checkpoints[1:], held[1:], strict=True):
        if found := list(_differences(checkpoints[0], held[0], other, files)):
            raise CheckpointError(
                f'{other.path} differs from {checkpoints[0].path} in more than weights: {first_of(found)}. '
                'If they are one model all the same, --may-differ takes these from the newest'
            )


def _saved_files(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration and the tokenizer that a checkpoint holds, by file name; JSON as its value, without the rest.

    Raises:
        CheckpointError: If a JSON file of them cannot be read.
    """
    if checkpoint.kind != 'hf':
        config, tokenizer = checkpoint.hugging_face
        files = {name: entry['content'] for name, entry in tokenizer.items()}
        return {**files, **({'config.json': config} if config else {})}
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    files: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        is_tokenizer = file.name.startswith(_TOKENIZER) or file.suffix in ('.model', '.tiktoken')
        if file.is_file() and (file.name == 'config.json' or is_tokenizer):
            content = file.read_bytes()
            try:
                files[file.name] = json.loads(content) if file.suffix == '.json' else content
            except ValueError as error:
                raise CheckpointError(f'{file} is no JSON: {error}') from None
    return files


def _differences(one: Checkpoint, held: dict[str, Any], other: Checkpoint, files: dict[str, Any]) -> Iterator[str]:
    for name in (name for name in held if name in files):
        # Composer keeps a file of lines as a list
        then, now = (_plain(name, content) for content in (held[name], files[name]))
        if name == 'config.json' and then != now:
            then, now = _with_defaults(then), _with_defaults(now)
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            yield from (f'{name}: {short_repr(line)[1:-1]}' for line in differences(then, now))
        elif then != now:
            yield f'{name} is another'
    if one.kind == other.kind == 'sharded':
        there, here = (hash_entries(each.path, *_TOKENIZER_ENTRIES) for each in (one, other))
        unlike = (path for path in {**there, **here} if there and here and there.get(path) != here.get(path))
        yield from (f'its tokenizer in {"/".join(map(str, path))}' for path in unlike)
    for name, tensor in one.tensors.items():
        twin = other.tensors.get(name)
        if twin and not tensor.dtype.is_floating_point and tensor.shape == twin.shape and tensor.dtype == twin.dtype:
            if read_tensor(tensor) != read_tensor(twin):
                yield f'{name}, which is {short(tensor.dtype)} and cannot be averaged'


def _plain(name: str, content: Any) -> Any:
    if isinstance(content, list):
        content = '\n'.join(content)
    content = content.encode() if isinstance(content, str) else content
    if isinstance(content, bytes):
        return content.strip()
    origin = _ORIGIN if name == 'config.json' else _OF_TOKENIZERS
    if not isinstance(content, dict):
        return content
    # a token by itself, or with flags that stand in tokenizer.json, too
    words = {
        key: value['content'] if isinstance(value, dict) and 'content' in value else value
        for key, value in content.items()
    }
    return {key: value for key, value in words.items() if key not in origin and not key.startswith('_')}


def _with_defaults(config: Any) -> Any:
    """A configuration with the defaults of this release of transformers, whichever release wrote it."""
    from transformers.models.auto.configuration_auto import AutoConfig

    try:
        known = AutoConfig.for_model(**config).to_dict()
    except Exception:  # what a config.json holds can be anything
        return config
    return {**_plain('config.json', known), **config}
