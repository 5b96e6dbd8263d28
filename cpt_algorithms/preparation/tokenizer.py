# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a preparation: trained here, given, or that of the parent model, and whether two are the same."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cpt_algorithms.checkpoints.exports import models_of
from cpt_algorithms.preparation.manifest import Earlier
from cpt_algorithms.preparation.sources import PrepareError

__all__ = [
    'EOS',
    'Parent',
    'find_parent',
    'find_tokenizer',
    'hash_tokenizer',
    'load_tokenizer',
    'train_tokenizer',
]

EOS = '<|endoftext|>'

HFTokenizer = Any  # a transformers.PreTrainedTokenizerFast, whose own annotations no type checker follows


def hash_tokenizer(folder: Path) -> str:
    """What a saved tokenizer makes of text, as a hash: two with the same hash give the same tokens.

    The vocabulary, the merges, the normalizer, how text is split, the added tokens and which of them is EOS count; how
    and by which release of ``transformers`` the files were written, padding and lengths do not.

    Args:
        folder: Of ``save_pretrained``: holds ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        ValueError: If there is no such file in it, as for tokenizers that have no fast form.
    """
    try:
        tokenizer = orjson.loads((folder / 'tokenizer.json').read_bytes())
        config = orjson.loads((folder / 'tokenizer_config.json').read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f'{folder}: no fast tokenizer found: {error}') from None
    model = dict(tokenizer['model'])
    # older releases write "a b" for ["a", "b"]
    model['merges'] = [merge.split(' ', 1) if isinstance(merge, str) else merge for merge in model.get('merges', ())]
    eos = config.get('eos_token')
    content = {
        'model': {key: value for key, value in model.items() if value},
        'normalizer': tokenizer.get('normalizer'),
        'pre_tokenizer': tokenizer.get('pre_tokenizer'),
        'added_tokens': sorted((token['id'], token['content']) for token in tokenizer.get('added_tokens', ())),
        'eos': eos['content'] if isinstance(eos, dict) else eos,
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


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
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


def load_tokenizer(name: str, flag: str = '--tokenizer') -> HFTokenizer:
    """Load a Hugging Face tokenizer by its name or folder, which an option named.

    Raises:
        PrepareError: If it cannot be loaded, has no EOS token or no fast form.
    """
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PrepareError(f'{flag} {name}: cannot load it: {error}') from error
    if tokenizer.eos_token_id is None:
        raise PrepareError(f'{flag} {name}: it has no EOS token to put between documents')
    if not tokenizer.is_fast:
        raise PrepareError(f'{flag} {name}: it has no fast form (tokenizer.json)')
    return tokenizer


@dataclass(frozen=True)
class Parent:
    """The model that will be trained on the data; ``max_seq_len`` is None if its configuration does not say."""

    name: str
    path: str
    vocab_size: int
    max_seq_len: int | None


def find_parent(name: str) -> Parent:
    """Read the configuration of a parent.

    Args:
        name: A Hugging Face name or folder, or the folder of a run that exports to ``huggingface/ba<N>``.

    Raises:
        PrepareError: If there is none.
    """
    from transformers.utils.hub import cached_file

    try:
        path = str(models_of(Path(name))[0]) if Path(name).is_dir() else name
        file = cached_file(path, 'config.json')
        assert file is not None
        config = json.loads(Path(file).read_text(encoding='utf-8'))
        keys = ('max_position_embeddings', 'max_seq_len', 'n_positions')
        lengths = [config[key] for key in keys if isinstance(config.get(key), int)]
        return Parent(name, path, int(config['vocab_size']), lengths[0] if lengths else None)
    except (OSError, ValueError) as error:
        raise PrepareError(f'--parent {name}: cannot read its configuration: {error}') from error
    except KeyError:
        raise PrepareError(f'--parent {name}: its config.json does not say its vocab_size') from None


def find_tokenizer(name: str | None, parent: Parent | None, earlier: Sequence[Earlier]) -> HFTokenizer | None:
    """The one tokenizer of everything that was given; none if nothing was.

    Raises:
        PrepareError: If they are not the same tokenizer, or the parent has too few embeddings for it.
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
    first = next(iter(given))
    for label, found in hashes.items():
        if found != hashes[first]:
            raise PrepareError(
                f'{first} and {label} have different tokenizers (hashes {hashes[first]}, {found}); tokens of one mean '
                "nothing to a model trained with the other: use the parent model's"
            )
    if parent and len(given[first]) > parent.vocab_size:
        raise PrepareError(
            f'{first}: its vocabulary of {len(given[first])} is larger than that of --parent {parent.name}, '
            f'{parent.vocab_size}'
        )
    return given[first]
