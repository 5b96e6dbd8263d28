# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a preparation: trained here, given, or that of the parent model; what it puts around a document."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from cpt_algorithms.checkpoints.exports import models_of
from cpt_algorithms.formatting import one_line
from cpt_algorithms.preparation.manifest import Earlier
from cpt_algorithms.preparation.reading import PrepareError, what_is
from cpt_algorithms.validation import nearest

__all__ = [
    'EOS',
    'Parent',
    'document_ends',
    'find_parent',
    'find_tokenizer',
    'hash_tokenizer',
    'load_tokenizer',
    'stop_tokens',
    'train_tokenizer',
    'unreadable',
]

EOS = '<|endoftext|>'

HFTokenizer = Any  # a transformers.PreTrainedTokenizerFast, whose own annotations no type checker follows


def hash_tokenizer(folder: Path) -> str:
    """What a saved tokenizer makes of text, as a hash: two with the same hash give the same tokens.

    The model (vocabulary, merges), the normalizer, how text is split, what is put around it, the added tokens with
    their flags and which of them is EOS count; how and by which release of ``transformers`` the files were written,
    padding and lengths do not.

    Raises:
        ValueError: If the folder lacks ``tokenizer.json`` or ``tokenizer_config.json``, as for tokenizers that have no
            fast form, or one cannot be read.
    """
    try:
        tokenizer = orjson.loads((folder / 'tokenizer.json').read_bytes())
        config = orjson.loads((folder / 'tokenizer_config.json').read_bytes())
        model = dict(tokenizer['model'])
        # older releases write "a b" for ["a", "b"]
        merges = [merge.split(' ', 1) if isinstance(merge, str) else merge for merge in model.get('merges') or ()]
        eos = config.get('eos_token')
        content = {
            # what is null or false is left out by releases that do not know it yet
            'model': {key: value for key, value in model.items() if value is not None and value is not False},
            'merges': merges,
            'normalizer': tokenizer.get('normalizer'),
            'pre_tokenizer': tokenizer.get('pre_tokenizer'),
            'around': _around(tokenizer.get('post_processor')),
            'added_tokens': sorted((token['id'], sorted(token.items())) for token in tokenizer.get('added_tokens', ())),
            'eos': eos['content'] if isinstance(eos, dict) else eos,
        }
        content['model'].pop('merges', None)
    except Exception as error:  # tokenizers has no kind of its own
        raise ValueError(f'{folder}: no fast tokenizer found: {error!r}') from None
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _around(post_processor: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer's post-processor, as JSON, puts before and behind a text."""
    from tokenizers import Tokenizer

    one_word = {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}
    rest = dict.fromkeys(('truncation', 'padding', 'normalizer', 'pre_tokenizer', 'decoder'))
    form = {'version': '1.0', 'added_tokens': [], 'post_processor': post_processor, 'model': one_word, **rest}
    encoding = Tokenizer.from_str(json.dumps(form)).encode('a')
    text = encoding.special_tokens_mask.index(0)
    return encoding.ids[:text], encoding.ids[text + 1 :]


def document_ends(
    tokenizer: HFTokenizer, bos_text: str | None = None, eos_text: str | None = None
) -> tuple[list[int], list[int]]:
    """The tokens put before and behind each document.

    By default what the tokenizer itself puts before and behind a text when it is called, and behind that EOS, unless
    that is there; else the token ``bos_text`` (empty for none) or ``eos_text``.

    Raises:
        PrepareError: If one is no token, or there is no EOS.
    """
    post_processor = tokenizer.backend_tokenizer.post_processor
    start, end = _around(json.loads(post_processor.__getstate__()) if post_processor else None)
    if bos_text is not None:
        start = _token(tokenizer, '--bos-text', bos_text) if bos_text else []
    if eos_text is not None:
        end = _token(tokenizer, '--eos-text', eos_text)
    elif tokenizer.eos_token_id not in (None, *end):
        end = [*end, tokenizer.eos_token_id]
    if not end:
        raise PrepareError('the tokenizer has no EOS token to put between documents; name one with --eos-text')
    return start, end


def _token(tokenizer: HFTokenizer, flag: str, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    if len(ids) != 1:
        hint = nearest(text, tokenizer.all_special_tokens)
        raise PrepareError(f'{flag} {text!r} must be one token of the tokenizer, and is {len(ids)}; {hint}')
    return ids


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Train a byte-level BPE tokenizer whose only special token, EOS, also pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {'vocab_size': vocab_size, 'special_tokens': [EOS], 'initial_alphabet': alphabet}
    trainer = trainers.BpeTrainer(**options, show_progress=False)  # pyright: ignore[reportCallIssue]
    bpe.train_from_iterator(texts, trainer)
    # else it gives generate() token_type_ids, too, which no decoder takes
    inputs = ['input_ids', 'attention_mask']
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, model_input_names=inputs)


def load_tokenizer(name: str, flag: str = '--tokenizer') -> HFTokenizer:
    """Load a Hugging Face tokenizer by its name or folder, which an option named.

    Raises:
        PrepareError: If it cannot be loaded or has no fast form.
    """
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers has no kind of its own
        raise unreadable(f'{flag} {name}: cannot load it', Path(name), error) from error
    if not tokenizer.is_fast:
        raise PrepareError(f'{flag} {name}: it has no fast form (tokenizer.json)')
    return tokenizer


def unreadable(what: str, folder: Path, error: Exception) -> PrepareError:
    """Say why the files of a tokenizer or model in a folder, if it is one, cannot be read."""
    for file in sorted(folder.glob('*.json')) if folder.is_dir() else ():
        try:
            orjson.loads(file.read_bytes())
        except ValueError as found:
            return PrepareError(f'{what}: {file.name} {what_is(file) or f"is cut off, or no JSON ({found})"}')
    reason = one_line(error) or repr(error)
    if 'untagged enum' in reason:  # what tokenizers says of a kind of model or step that it does not know
        release = f'tokenizers {version("tokenizers")}'
        reason = f'its tokenizer.json was made by a newer release than {release}, or is spoilt ({reason})'
    return PrepareError(f'{what}: {reason}')


@dataclass(frozen=True)
class Parent:
    """The model that will be trained on the data; ``max_seq_len`` is None if its configuration does not say.

    ``stops`` are the tokens at which it stops, by the file that says it.
    """

    name: str
    path: str
    vocab_size: int
    max_seq_len: int | None
    stops: dict[str, list[int]]


def stop_tokens(path: str) -> dict[str, list[int]]:
    """The tokens at which a model, a name or folder, stops, by the file that says it.

    Raises:
        OSError: If its ``config.json`` cannot be found.
        ValueError: If one is no JSON.
    """
    found = {}
    for name in ('config.json', 'generation_config.json'):
        given = _config(path, name).get('eos_token_id')
        if given is not None:
            found[name] = given if isinstance(given, list) else [given]
    return found


def _config(path: str, name: str = 'config.json') -> dict[str, Any]:
    """A configuration, with that of the text part of a model of several; empty if an optional one is not there."""
    from transformers.utils.hub import cached_file

    file = cached_file(path, name, _raise_exceptions_for_missing_entries=name == 'config.json')
    config = {} if file is None else json.loads(Path(file).read_text(encoding='utf-8'))
    return {**config.get('text_config', {}), **config}


def find_parent(name: str) -> Parent:
    """Read the configuration of a parent: a Hugging Face name or folder, or a run with ``huggingface/ba<N>``.

    Raises:
        PrepareError: If there is none.
    """
    path = name
    try:
        path = str(models_of(Path(name))[0]) if Path(name).is_dir() else name
        config = _config(path)
        keys = ('max_position_embeddings', 'max_seq_len', 'n_positions')
        lengths = [config[key] for key in keys if isinstance(config.get(key), int)]
        return Parent(name, path, int(config['vocab_size']), lengths[0] if lengths else None, stop_tokens(path))
    except KeyError:
        raise PrepareError(f'--parent {name}: its config.json does not say its vocab_size') from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise unreadable(f'--parent {name}: cannot read its configuration', Path(path), error) from error


def find_tokenizer(
    name: str | None,
    parent: Parent | None,
    earlier: Sequence[Earlier],
    bos_text: str | None = None,
    eos_text: str | None = None,
) -> HFTokenizer | None:
    """The one tokenizer of everything that was given; none if nothing was.

    Raises:
        PrepareError: If they are not the same tokenizer, the parent has too few embeddings for it or stops at another
            token than documents would end with, or documents of earlier data begin or end otherwise.
    """
    given, hashes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if name:
            given[f'--tokenizer {name}'] = load_tokenizer(name)
        if parent:
            given[f'--parent {parent.name}'] = load_tokenizer(parent.path, '--parent')
        for data in earlier:
            given[f'--earlier {data.location}'] = load_tokenizer(str(data.tokenizer(Path(folder))), '--earlier')
        for number, (label, tokenizer) in enumerate(given.items()):
            tokenizer.save_pretrained(saved := Path(folder, str(number)))
            hashes[label] = hash_tokenizer(saved)
    if not given:
        return None
    first, tokenizer = next(iter(given.items()))
    for label, found in hashes.items():
        if found != hashes[first]:
            raise PrepareError(
                f'{first} and {label} have different tokenizers (hashes {hashes[first]}, {found}); tokens of one mean '
                "nothing to a model trained with the other: use the parent model's"
            )
    if parent and len(tokenizer) > parent.vocab_size:
        raise PrepareError(
            f'{first}: its vocabulary of {len(tokenizer)} is larger than that of --parent {parent.name}, '
            f'{parent.vocab_size}'
        )
    ends = document_ends(tokenizer, bos_text, eos_text)
    start, end = map(tokenizer.convert_ids_to_tokens, ends)
    if parent and parent.stops and eos_text is None and not any(ends[1][-1] in ids for ids in parent.stops.values()):
        said = ' and '.join(f'{tokenizer.convert_ids_to_tokens(ids)} ({file})' for file, ids in parent.stops.items())
        raise PrepareError(
            f'documents would end with {end[-1]!r}, the EOS of the tokenizer, and --parent {parent.name} '
            f'stops at {said}: it would unlearn to stop; choose one of these tokens with --eos-text'
        )
    for data in earlier:
        record = data.manifest.tokenizer
        if [record.document_start, record.document_end] != [start, end]:
            raise PrepareError(
                f'documents would begin with {start} and end with {end}, and those of --earlier {data.location} begin '
                f'with {record.document_start} and end with {record.document_end}: choose the same with --bos-text, '
                '--eos-text'
            )
    return tokenizer
