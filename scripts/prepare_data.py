# SPDX-License-Identifier: Apache-2.0
r"""Text to MDS: tokenise, pack and shard the datasets D0, D1, ... of a continual pre-training sequence.

Offline default (Python and C++ that is already installed)::

    python scripts/prepare_data.py --out data/quickstart --max-train-tokens 3000000 --max-val-tokens 40000

Your own text (``KIND`` is installed, jsonl, parquet, text or hf; quote globs and ``&``)::

    python scripts/prepare_data.py --out data/x --dataset pile=jsonl:'pile/*.jsonl' \
        --dataset web='hf:allenai/c4?name=en&split=train' --tokenizer EleutherAI/gpt-neox-20b --max-seq-len 2048

``OUT`` gets ``<dataset>/{train,val}/`` (column ``tokens``, ``ndarray:int32``), ``tokenizer/``, ``manifest.json``, and
of validation documents ``lm_eval/<dataset>_{passages,continuations}.jsonl`` for ``scripts/evaluate.py``.
A document's split follows from a hash of its text and the same text is packed only once over all datasets,
so no validation document is in any training set. The same input gives the same bytes.
"""

import argparse
import difflib
import glob
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from email import message_from_string
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from cpt_algorithms.files import hidden_sibling

# streaming (7 s), transformers and datasets are imported where they are used: a wrong argument or a re-run
# of something already prepared answers at once.

EOS = '<|endoftext|>'
KINDS = ('installed', 'jsonl', 'parquet', 'text', 'hf')
INSTALLED = ('python', 'stdlib', 'cpp', 'english')
DEFAULT_DATASETS = ['python=installed:python', 'cpp=installed:cpp']
DEFAULT_VOCAB_SIZE = 4096
MIN_VOCAB_SIZE = 257  # the 256 bytes and EOS
DEFAULT_TOKENIZER_DOCUMENTS = 2000
MAX_INSTALLED_BYTES = 1 << 20  # larger source files are generated tables
PRUNED = ('__pycache__', 'site-packages', 'dist-packages')  # folders not walked into
CHUNK_CHARACTERS = 1 << 20  # text tokenised at once: bounds memory, keeps the cores busy
SPLITS = ('train', 'val')
LM_EVAL_ITEMS = 200  # of each kind and dataset
LM_EVAL_DOCUMENTS = 200  # they are taken from
LM_EVAL_CHARACTERS = 1 << 16  # of each of these
LIBRARIES = ('datasets', 'mosaicml-streaming', 'numpy', 'tokenizers', 'transformers')
FORMAT = 2  # of the manifest and of what it describes; another one is never re-used

Packed = tuple[np.ndarray, np.ndarray]
HFTokenizer = Any  # a transformers.PreTrainedTokenizerBase, whose own annotations no type checker follows


class PrepareError(Exception):
    """Something the user can put right; its message is printed as one line."""


# Pure functions


def digest(text: str) -> bytes:
    """The identity of a document: 16 bytes of BLAKE2b of its UTF-8 text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(identity: bytes, val_fraction: float) -> str:
    """The split of a document; its hash as a fraction of the largest hash is below ``val_fraction`` in val."""
    return 'val' if int.from_bytes(identity[:8], 'big') < val_fraction * 2**64 else 'train'


def pack(leftover: np.ndarray, documents: Iterable[Sequence[int]], eos: int, max_seq_len: int) -> Packed:
    """Ends each document with EOS, concatenates and cuts.

    Args:
        leftover: Tokens kept from the documents before.
        documents: Tokens of each document.
        eos: The token id put after each document.
        max_seq_len: Tokens per sample.

    Returns:
        Packed: ``(samples, max_seq_len)`` tokens, and the fewer than ``max_seq_len`` left over.
    """
    pieces = [np.asarray([*document, eos], np.int32) for document in documents]
    tokens = np.concatenate([leftover, *pieces]).astype(np.int32, copy=False)
    end = len(tokens) // max_seq_len * max_seq_len
    return tokens[:end].reshape(-1, max_seq_len), tokens[end:]


def in_chunks(texts: Iterable[str], num_characters: int) -> Iterator[list[str]]:
    """Groups texts, in order, into lists of about ``num_characters`` characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= num_characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def hash_order(names: Iterable[str]) -> list[str]:
    """Sorts file names by the hash of the name: fixed, and the first few come from everywhere."""
    return sorted(names, key=lambda name: (hashlib.blake2b(os.fsencode(name)).digest(), name))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two requests, one phrase per option."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f'{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}' for key in keys]


def nearest(word: str, known: Sequence[str]) -> str:
    """Ends an error message about an unknown ``word``: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f'known: {", ".join(known)}'


def boundary(text: str, limit: int) -> int:
    """Where to cut at most ``limit`` characters: after the last newline of their second half, or space, or all."""
    newline, space = (text.rfind(mark, limit // 2, limit) + 1 for mark in '\n ')
    return newline or space or limit


def passages(text: str, length: int) -> list[str]:
    """Cuts a text into pieces of at most ``length`` characters, at a :func:`boundary`; joined, they are the text."""
    pieces = []
    while len(text) > length:
        end = boundary(text, length)
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text] if text else pieces


def in_hash_order(documents: Sequence[str], length: int) -> list[tuple[int, str]]:
    """The passages of all documents that are not blank, each text once, with the number of the document."""
    found = {piece: number for number, text in enumerate(documents) for piece in passages(text, length)}
    return sorted(((number, piece) for piece, number in found.items() if piece.strip()), key=lambda p: digest(p[1]))


def continuations(documents: Sequence[str], length: int, count: int) -> list[dict[str, Any]]:
    """Items "which of 4 texts follows": one that does, three that follow something in other documents.

    All four begin at a :func:`boundary` and have as many characters, so that their likelihoods can be compared as they
    are.

    Args:
        documents: Texts.
        length: Characters of context and continuation at most; a quarter, or 64, is the continuation.
        count: Items wanted; where there are not enough other documents there are fewer.

    Returns:
        ``{context, choices, answer}`` each.
    """
    size = min(length // 4, 64)
    split = []
    for number, piece in in_hash_order(documents, length)[: 10 * count]:
        end = boundary(piece, len(piece) - size) if len(piece) >= length // 2 else len(piece)
        if piece[:end].strip() and piece[end : end + size].strip():
            split.append((number, piece[:end], piece[end : end + size]))
    items = []
    for number, context, right in split:
        if len(items) == count:
            break
        others = list(dict.fromkeys(text for other, _, text in split if other != number and text != right))
        if len(others) >= 3:
            generator = random.Random(digest(context + right))
            choices = [right, *generator.sample(others, 3)]
            generator.shuffle(choices)
            items.append({'context': context, 'choices': choices, 'answer': choices.index(right)})
    return items


# Sources: where documents come from


@dataclass(frozen=True)
class Source:
    """One dataset as asked for: ``NAME=KIND:TARGET``."""

    name: str
    kind: str
    target: str

    @classmethod
    def parse(cls, spec: str) -> 'Source':
        """Reads ``NAME=KIND:TARGET`` and says what is wrong with it."""
        match = re.fullmatch(r'([^=]*)=([^:]*):(.+)', spec, re.DOTALL)
        if not match:
            raise PrepareError(f'--dataset {spec!r}: expected NAME=KIND:TARGET, such as german=jsonl:german.jsonl')
        name, kind, target = match.groups()
        if not re.fullmatch(r'[A-Za-z0-9][\w.-]*', name) or name in ('tokenizer', 'lm_eval', 'manifest.json'):
            raise PrepareError(f'--dataset {spec!r}: {name!r} cannot be the name of a dataset folder')
        if kind not in KINDS:
            raise PrepareError(f'--dataset {spec!r}: unknown source kind {kind!r}; {nearest(kind, KINDS)}')
        if kind == 'installed' and target not in INSTALLED:
            raise PrepareError(f'--dataset {spec!r}: unknown text {target!r}; {nearest(target, INSTALLED)}')
        if kind == 'hf':
            hf_arguments(target)
        return cls(name, kind, target)


def hf_arguments(target: str) -> dict[str, str]:
    """The ``load_dataset`` arguments of ``PATH?name=CONFIG&split=SPLIT&revision=REVISION``."""
    path, _, query = target.partition('?')
    known = ('name', 'split', 'revision')
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError:
        raise PrepareError(f'hf:{target}: expected options as name=value&name=value after the ?') from None
    for option in options:
        if option not in known:
            raise PrepareError(f'hf:{target}: unknown option {option!r}; {nearest(option, known)}')
    return {'path': path, 'split': 'train', **options}


def installed_roots(text: str) -> tuple[list[str], Callable[[str], bool]]:
    """The folders that hold an installed text, and which of their files belong to it."""
    paths = sysconfig.get_paths()
    site = sorted({paths['purelib'], paths['platlib']})
    if text == 'python':
        return site, lambda name: name.endswith('.py')
    if text == 'stdlib':
        return [paths['stdlib']], lambda name: name.endswith('.py')
    if text == 'english':
        return site, lambda name: name.endswith(('.dist-info/METADATA', '.md', '.rst'))
    torch = importlib.util.find_spec('torch')
    folders = torch.submodule_search_locations if torch else None
    roots = [os.path.join(folder, 'include') for folder in folders or ()]
    return roots, lambda name: name.endswith(('.h', '.hpp', '.cuh'))


def find_files(source: Source) -> list[str]:
    """The files of a source, in the order they are read; none for ``hf``."""
    if source.kind == 'hf':
        return []
    if source.kind == 'installed':
        roots, wanted = installed_roots(source.target)
        files = []
        for root in roots:
            names = []
            for folder, subfolders, leaves in os.walk(root):
                subfolders[:] = [name for name in subfolders if name not in PRUNED]
                prefix = os.path.relpath(folder, root)
                names += [name for leaf in leaves if wanted(name := os.path.join(prefix, leaf))]
            files += [os.path.join(root, name) for name in hash_order(names)]
    else:
        names = [name for name in glob.glob(source.target, recursive=True) if os.path.isfile(name)]
        files = hash_order(names) if source.kind == 'text' else sorted(names)
    if not files:
        raise PrepareError(f'dataset {source.name}: no file found for {source.kind}:{source.target}')
    return files


def read_installed(files: Iterable[str]) -> Iterator[str]:
    """The text of each file; empty where it is too large or no UTF-8."""
    for file in files:
        with open(file, 'rb') as handle:
            data = handle.read(MAX_INSTALLED_BYTES + 1)
        try:
            text = data.decode('utf-8') if len(data) <= MAX_INSTALLED_BYTES else ''
        except UnicodeDecodeError:
            text = ''
        if file.endswith('METADATA'):
            text = str(message_from_string(text).get_payload())  # the body: the package's README
        yield text


def read_rows(source: Source, files: list[str], text_key: str) -> Iterator[str]:
    """The text of each row, streamed by Hugging Face ``datasets``; empty where the row has none."""
    import datasets
    from datasets.exceptions import DatasetsError

    if source.kind == 'hf':
        arguments: dict[str, Any] = hf_arguments(source.target)
    else:
        builder = {'jsonl': 'json'}.get(source.kind, source.kind)
        # datasets takes every path for a pattern
        arguments = {'path': builder, 'data_files': [glob.escape(file) for file in files], 'split': 'train'}
    if source.kind == 'text':
        arguments['sample_by'], text_key = 'document', 'text'
    try:
        for row in datasets.load_dataset(**arguments, streaming=True):
            if text_key not in row:
                columns = ', '.join(row)
                raise PrepareError(f'dataset {source.name}: no column {text_key!r} (--text-key); it has: {columns}')
            text = row[text_key]
            if not isinstance(text, str | None):
                raise PrepareError(f'dataset {source.name}: column {text_key!r} holds {type(text).__name__}, not text')
            yield text or ''
    except (OSError, ValueError, DatasetsError) as error:
        where = f'{source.kind}:{source.target}'
        raise PrepareError(f'dataset {source.name}: cannot read {where}: {error}') from error


def read_documents(source: Source, files: list[str], text_key: str) -> Iterator[str]:
    """The documents of a source in their fixed order; blank where there is no usable text."""
    return read_installed(files) if source.kind == 'installed' else read_rows(source, files, text_key)


# Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Trains a byte-level BPE tokenizer whose only special token, EOS, also pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


def load_tokenizer(name: str) -> HFTokenizer:
    """Loads a Hugging Face tokenizer that has an EOS token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PrepareError(f'--tokenizer {name}: cannot load it: {error}') from error
    if tokenizer.eos_token_id is None:
        raise PrepareError(f'--tokenizer {name}: it has no EOS token to put between documents')
    return tokenizer


def training_texts(documents: Iterable[str], val_fraction: float) -> Iterator[str]:
    """The documents that belong to train, each once."""
    seen = set()
    for text in documents:
        identity = digest(text)
        if text.strip() and identity not in seen and split_of(identity, val_fraction) == 'train':
            seen.add(identity)
            yield text


def encode(tokenizer: HFTokenizer, texts: list[str]) -> list[list[int]]:
    """Tokenises documents as plain text: one that spells a special token does not get the token."""
    if not texts:
        return []
    options = {'add_special_tokens': False, 'split_special_tokens': True, 'return_attention_mask': False}
    return tokenizer(texts, **options, return_token_type_ids=False, verbose=False)['input_ids']


def hash_tokenizer(folder: Path) -> str:
    """A hash of the files that make a saved tokenizer."""
    hasher = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.suffix in ('.json', '.txt', '.model'):
            hasher.update(file.name.encode() + b'\0' + file.read_bytes())
    return hasher.hexdigest()


# Writing


@dataclass
class Counts:
    """What went into one split of one dataset.

    Args:
        documents: Documents packed, the last one perhaps in part.
        duplicates: Documents dropped because the same text was packed before, here or in an earlier dataset.
        tokens: Tokens written, EOS included: ``samples`` times ``max_seq_len``.
        samples: Samples written.
        leftover: Tokens dropped at the end, too few for a sample or over the limit.
        bytes: UTF-8 bytes of the text written, for bits per byte. Dropped tokens are subtracted as decoded,
            which is within 3 bytes where the cut is inside a character.
    """

    documents: int = 0
    duplicates: int = 0
    tokens: int = 0
    samples: int = 0
    leftover: int = 0
    bytes: int = 0


class SplitWriter:
    """Packs the documents of one split into MDS shards, up to a number of tokens.

    Args:
        writer: The ``MDSWriter``.
        tokenizer: Gives EOS, and the text of dropped tokens.
        max_seq_len: Tokens per sample.
        max_tokens: The split is full at this many tokens; ``None`` never.
    """

    def __init__(self, writer: Any, tokenizer: HFTokenizer, max_seq_len: int, max_tokens: int | None):
        self.counts = Counts()
        self.texts: list[str] = []  # the beginnings of its first documents
        self._writer = writer
        self._tokenizer = tokenizer
        self._max_seq_len = max_seq_len
        self.max_samples = None if max_tokens is None else max_tokens // max_seq_len
        self._dropped = np.zeros(0, np.int32)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.counts.samples == self.max_samples

    def add(self, text: str, tokens: Sequence[int]) -> None:
        """Packs one document; what goes over the limit is dropped."""
        rows, rest = pack(self._dropped, [tokens], self._tokenizer.eos_token_id, self._max_seq_len)
        room = len(rows) if self.max_samples is None else self.max_samples - self.counts.samples
        for row in rows[:room]:
            self._writer.write({'tokens': row})
        self._dropped = np.concatenate([rows[room:].ravel(), rest])
        if len(self.texts) < LM_EVAL_DOCUMENTS:
            self.texts.append(text[:LM_EVAL_CHARACTERS])
        self.counts.documents += 1
        self.counts.bytes += len(text.encode())
        self.counts.samples += len(rows[:room])

    def finish(self) -> Counts:
        """Settles what was dropped at the end."""
        text = self._tokenizer.decode(
            self._dropped.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self.counts.bytes -= len(text.encode())
        self.counts.tokens = self.counts.samples * self._max_seq_len
        self.counts.leftover = len(self._dropped)
        return self.counts


def pack_dataset(
    documents: Iterable[str],
    splits: dict[str, SplitWriter],
    seen: set[bytes],
    val_fraction: float,
    tokenizer: HFTokenizer,
) -> int:
    """Sends each document to its split, once, until train is full and val, if it has a limit, too.

    Args:
        documents: Documents in order; blank ones are skipped.
        splits: The writer of each split.
        seen: Identities of the documents packed so far, over all datasets; those packed here are added.
        val_fraction: See :func:`split_of`.
        tokenizer: A Hugging Face tokenizer.

    Returns:
        int: Blank documents skipped.
    """
    skipped = 0
    for chunk in in_chunks(documents, CHUNK_CHARACTERS):
        identities = [digest(text) for text in chunk]
        fresh = {
            identity: text
            for identity, text in zip(identities, chunk, strict=True)
            if text.strip() and identity not in seen and not splits[split_of(identity, val_fraction)].full
        }
        encoded = dict(zip(fresh, encode(tokenizer, list(fresh.values())), strict=True))
        for identity, text in zip(identities, chunk, strict=True):
            split = splits[split_of(identity, val_fraction)]
            if not text.strip():
                skipped += 1
            elif split.full:
                continue
            elif identity in seen:
                split.counts.duplicates += 1
            else:
                seen.add(identity)
                split.add(text, encoded[identity])
                if splits['train'].full and (splits['val'].full or splits['val'].max_samples is None):
                    return skipped
    return skipped


def write_lm_eval(folder: Path, dataset: str, documents: Sequence[str], max_seq_len: int) -> dict[str, int]:
    """Writes the data of lm-eval tasks, of two characters per token that a model can read at once.

    Args:
        folder: Where the files go.
        dataset: Their name.
        documents: Documents held out from training.
        max_seq_len: Tokens of a sample.

    Returns:
        dict: Rows of each kind; one that has none gets no file.
    """
    length = 2 * max_seq_len
    rows = {
        'passages': [{'text': piece} for _, piece in in_hash_order(documents, length)[:LM_EVAL_ITEMS]],
        'continuations': continuations(documents, length, LM_EVAL_ITEMS),
    }
    folder.mkdir(exist_ok=True)
    for kind, items in rows.items():
        if items:
            lines = ''.join(json.dumps(item) + '\n' for item in items)
            (folder / f'{dataset}_{kind}.jsonl').write_text(lines, encoding='utf-8')
    return {kind: len(items) for kind, items in rows.items()}


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """Gives a sibling of ``out`` that becomes ``out`` only if nothing goes wrong; one run at a time has it."""
    with hidden_sibling(out, PrepareError(f'another run is preparing {out}')) as partial:
        yield partial
        partial.rename(out)


def prepare(request: dict[str, Any], sources: list[Source], files: dict[str, list[str]], out: Path) -> dict:
    """Does the work of a request, into the folder ``out``.

    Args:
        request: See :func:`make_request`.
        sources: The datasets in order.
        files: The files of each dataset.
        out: An empty folder.

    Returns:
        dict: The manifest, also written to ``out``.
    """
    from streaming import MDSWriter

    def documents(source: Source, what: str) -> Iterable[str]:
        total = len(files[source.name]) if source.kind in ('installed', 'text') else None
        texts = read_documents(source, files[source.name], request['text_key'])
        return tqdm(texts, f'{what} {source.name}', total, unit=' documents', disable=None)

    val_fraction, max_seq_len = request['val_fraction'], request['max_seq_len']
    if request['tokenizer']:
        tokenizer = load_tokenizer(request['tokenizer'])
    else:
        texts = training_texts(documents(sources[0], 'tokenizer on'), val_fraction)
        tokenizer = train_tokenizer(islice(texts, request['tokenizer_documents']), request['vocab_size'])
    tokenizer.save_pretrained(out / 'tokenizer')

    seen: set[bytes] = set()
    datasets = {}
    for source in sources:
        with ExitStack() as stack:
            splits = {}
            for split in SPLITS:
                folder = str(out / source.name / split)
                columns = {'tokens': f'ndarray:int32:{max_seq_len}'}
                writer = stack.enter_context(MDSWriter(out=folder, columns=columns, hashes=['xxh64']))
                splits[split] = SplitWriter(writer, tokenizer, max_seq_len, request[f'max_{split}_tokens'])
            skipped = pack_dataset(documents(source, 'packing'), splits, seen, val_fraction, tokenizer)
        counts = {split: asdict(writer.finish()) for split, writer in splits.items()}
        for split, count in counts.items():
            if not count['samples']:
                raise PrepareError(
                    f'dataset {source.name}: {split} has no sample of {max_seq_len} tokens '
                    f'({count["documents"]} documents, {count["duplicates"]} duplicates, {count["leftover"]} tokens); '
                    'give it more text or change --val-fraction, --max-seq-len'
                )
        items = write_lm_eval(out / 'lm_eval', source.name, splits['val'].texts, max_seq_len)
        datasets[source.name] = {
            'files': len(files[source.name]),
            'skipped': skipped,
            'splits': counts,
            'lm_eval': items,
        }

    manifest = {
        'request': request,
        'tokenizer': {
            'vocab_size': len(tokenizer),
            'eos_token': tokenizer.eos_token,
            'eos_token_id': tokenizer.eos_token_id,
            'hash': hash_tokenizer(out / 'tokenizer'),
        },
        'datasets': datasets,
        'versions': {'python': platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }
    (out / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n', encoding='utf-8')
    return manifest


# Command line


class OneLineParser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser('prepare_data', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', type=Path, required=True, help='folder to make')
    add(
        '--dataset',
        action='append',
        metavar='NAME=KIND:TARGET',
        help=f'D0, D1, ... in order; installed:({"|".join(INSTALLED)}), jsonl:GLOB, parquet:GLOB, text:GLOB or '
        f'hf:PATH?name=..&split=..&revision=.. (default: {" ".join(DEFAULT_DATASETS)})',
    )
    add('--text-key', default='text', help='column of the text in jsonl, parquet and hf (default: text)')
    add('--tokenizer', help='Hugging Face name or folder (default: train byte-level BPE on D0)')
    add('--vocab-size', type=int, help=f'of the trained tokenizer (default: {DEFAULT_VOCAB_SIZE})')
    add(
        '--tokenizer-documents',
        type=int,
        help=f'train documents of D0 the tokenizer is trained on (default: {DEFAULT_TOKENIZER_DOCUMENTS})',
    )
    add('--max-seq-len', type=int, default=128, help='tokens per sample (default: 128)')
    add('--val-fraction', type=float, default=0.02, help='share of the documents held out (default: 0.02)')
    add('--max-train-tokens', type=int, help='per dataset, rounded down to whole samples (default: no limit)')
    add('--max-val-tokens', type=int, help='the same for val (default: what comes until train is full)')
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuses values that cannot work."""
    if not options.out.name:
        raise PrepareError(f'--out {options.out}: expected the name of a folder to make')
    if options.max_seq_len < 2:
        raise PrepareError(f'--max-seq-len {options.max_seq_len}: a sample needs at least 2 tokens')
    if not 0 < options.val_fraction < 1:
        raise PrepareError(f'--val-fraction {options.val_fraction}: expected more than 0 and less than 1')
    for name in ('max_train_tokens', 'max_val_tokens'):
        limit = getattr(options, name)
        if limit is not None and limit < options.max_seq_len:
            raise PrepareError(
                f'--{name.replace("_", "-")} {limit}: less than one sample of {options.max_seq_len} tokens'
            )
    for name, smallest in {'vocab_size': MIN_VOCAB_SIZE, 'tokenizer_documents': 1}.items():
        value = getattr(options, name)
        flag = '--' + name.replace('_', '-')
        if value is not None and options.tokenizer:
            raise PrepareError(f'{flag} is for a tokenizer trained here; --tokenizer {options.tokenizer} is given')
        if value is not None and value < smallest:
            raise PrepareError(f'{flag} {value}: expected at least {smallest}')


def make_request(options: argparse.Namespace, sources: list[Source], files: dict[str, list[str]]) -> dict[str, Any]:
    """Everything that decides the result, as the manifest records it; the user's own files by number and size."""
    tokenizer = options.tokenizer
    local_tokenizer = Path(tokenizer) if tokenizer and Path(tokenizer).is_dir() else None
    own_files = {
        source.name: f'{len(found)} files, {sum(map(os.path.getsize, found))} bytes'
        for source in sources
        if source.kind != 'installed' and (found := files[source.name])
    }
    return {
        'format': FORMAT,
        'datasets': [f'{source.name}={source.kind}:{source.target}' for source in sources],
        'files': own_files,
        'text_key': options.text_key,
        'tokenizer': tokenizer,
        'tokenizer_hash': hash_tokenizer(local_tokenizer) if local_tokenizer else None,
        'vocab_size': None if tokenizer else options.vocab_size or DEFAULT_VOCAB_SIZE,
        'tokenizer_documents': None if tokenizer else options.tokenizer_documents or DEFAULT_TOKENIZER_DOCUMENTS,
        'max_seq_len': options.max_seq_len,
        'val_fraction': options.val_fraction,
        'max_train_tokens': options.max_train_tokens,
        'max_val_tokens': options.max_val_tokens,
    }


def find_prepared(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of ``out`` if it is there and answers the same request; refuses anything else there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    advice = 'choose another --out or delete it'
    try:
        manifest = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
        differing = differences(manifest['request'], request)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PrepareError(f'{out} exists and was not made by this script; {advice}') from None
    if differing:
        raise PrepareError(f'{out} was prepared differently ({"; ".join(differing)}); {advice}')
    return manifest


def print_counts(manifest: dict[str, Any], out: Path) -> None:
    """Prints what a manifest counts as a table."""
    columns = ('documents', 'duplicates', 'tokens', 'samples', 'bytes')
    max_seq_len, vocab_size = manifest['request']['max_seq_len'], manifest['tokenizer']['vocab_size']
    title = f'{out}: samples of {max_seq_len:,} tokens, vocabulary of {vocab_size:,}'
    table = Table('dataset', 'split', title=title, title_justify='left', box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify='right', no_wrap=True)
    for name, dataset in manifest['datasets'].items():
        for split, counts in dataset['splits'].items():
            table.add_row(name, split, *[f'{counts[column]:,}' for column in columns])
    Console().print(table)


def run(options: argparse.Namespace) -> None:
    """Prepares what the options ask for, or shows what is already there."""
    check_options(options)
    sources = [Source.parse(spec) for spec in options.dataset or DEFAULT_DATASETS]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise PrepareError(f'--dataset: two datasets are called {name!r}')
    files = {source.name: find_files(source) for source in sources}
    request = make_request(options, sources, files)
    manifest = find_prepared(options.out, request)
    if manifest:
        print(f'{options.out} is already prepared')
    else:
        for source in sources:
            if files[source.name]:
                print(f'{source.name}: {len(files[source.name]):,} files found')
            if next(read_documents(source, files[source.name], options.text_key), None) is None:
                raise PrepareError(f'dataset {source.name}: {source.kind}:{source.target} has no rows')
        with appearing_whole(options.out) as partial:
            manifest = prepare(request, sources, files, partial)
    print_counts(manifest, options.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    try:
        run(parser.parse_args(arguments))
    except PrepareError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
