# SPDX-License-Identifier: Apache-2.0
r"""Text to MDS: tokenise, de-duplicate, pack and shard the datasets D0, D1, ... of a continual pre-training sequence.

Offline default (Python and C++ that is already installed)::

    python scripts/prepare_data.py --out data/quickstart --max-train-tokens 3000000 --max-val-tokens 40000

Your own text (``KIND`` is installed, jsonl, parquet, text or hf; quote globs and ``&``), and a year later more of it::

    python scripts/prepare_data.py --out s3://bucket/data --dataset pile=jsonl:'pile/*.jsonl' \
        --dataset web/c4='hf:allenai/c4?name=en&split=train' --dataset web/books='parquet:books/*.parquet' \
        --tokenizer EleutherAI/gpt-neox-20b --max-seq-len 2048 --compression zstd
    python scripts/prepare_data.py --out s3://bucket/german --dataset german=parquet:'german/*.parquet' \
        --parent runs/pile --earlier s3://bucket/data --near-duplicates

``OUT`` gets ``<dataset>/{train,val}/`` (column ``tokens``, ``ndarray:int32``), ``tokenizer/``, ``manifest.json``, and
of validation documents ``lm_eval/<dataset>_{passages,continuations}.jsonl`` for ``scripts/evaluate.py``.
A document's split follows from a hash of its text and the same text is packed only once over all datasets,
so no validation document is in any training set. The same input gives the same bytes. Killed, the same command goes on.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from cpt_algorithms.files import locked_sibling
from cpt_algorithms.preparation.earlier import Earlier, find_earlier
from cpt_algorithms.preparation.engines import LocalEngine, num_cores
from cpt_algorithms.preparation.manifest import FORMAT, find_prepared
from cpt_algorithms.preparation.pipeline import prepare
from cpt_algorithms.preparation.sources import (
    BYTES_PER_TOKEN,
    INSTALLED,
    SMALLEST_PART,
    PrepareError,
    Source,
    find_files,
    parts_of,
    read,
)
from cpt_algorithms.preparation.storage import check_destination, is_remote, upload, work_folder
from cpt_algorithms.preparation.tokenizer import (
    MIN_VOCAB_SIZE,
    Parent,
    find_parent,
    hash_tokenizer,
    load_tokenizer,
)

# streaming (7 s), transformers and datasets are imported where they are used: a wrong argument or a re-run
# of something already prepared answers at once.

DEFAULT_DATASETS = ['python=installed:python', 'cpp=installed:cpp']
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_TOKENIZER_DOCUMENTS = 2000
DEFAULT_MAX_SEQ_LEN = 128
# less text than this is done in this process: others take longer to start
WORTH_A_POOL = 16 * SMALLEST_PART


class OneLineParser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser('prepare_data', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', required=True, help='folder to make, or a URI that Streaming can write to, such as s3://bucket/data')
    add(
        '--dataset',
        action='append',
        metavar='NAME[/SOURCE]=KIND:TARGET',
        help=f'D0, D1, ... in order, of one source or several; installed:({"|".join(INSTALLED)}|a package), '
        'jsonl:GLOB, parquet:GLOB, text:GLOB or hf:PATH?name=..&split=..&revision=.. (default: '
        + ' '.join(DEFAULT_DATASETS)
        + ')',
    )
    add('--text-key', default='text', help='column of the text in jsonl, parquet and hf (default: text)')
    add('--tokenizer', help='Hugging Face name or folder (default: that of --parent or --earlier, or trained on D0)')
    add('--parent', help='the model that will be trained on the data: Hugging Face name or folder, or a run')
    add('--earlier', action='append', default=[], help='data prepared before, whose documents count as seen')
    add('--vocab-size', type=int, help=f'of the trained tokenizer (default: {DEFAULT_VOCAB_SIZE})')
    add(
        '--tokenizer-documents',
        type=int,
        help=f'train documents of D0 the tokenizer is trained on (default: {DEFAULT_TOKENIZER_DOCUMENTS})',
    )
    add('--max-seq-len', type=int, help=f"tokens per sample (default: --parent's, or {DEFAULT_MAX_SEQ_LEN})")
    add('--val-fraction', type=float, default=0.02, help='share of the documents held out (default: 0.02)')
    add('--max-train-tokens', type=int, help='per dataset, rounded down to whole samples (default: no limit)')
    add('--max-val-tokens', type=int, help='the same for val (default: what comes until train is full)')
    add('--near-duplicates', action='store_true', help='drop them, too: MinHash of word n-grams')
    add('--near-threshold', type=float, help='Jaccard similarity aimed at (default: 0.8)')
    add('--compression', help='of the shards, as MDSWriter takes it: zstd, zstd:9, ... (default: none)')
    add('--workers', type=int, help='processes (default: the cores)')
    add('--engine', choices=('local', 'spark'), default='local', help='what the work is done with (default: local)')
    add('--work', help='folder to work in for an --out that is no folder (default: one in the temporary folder)')
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuses values that cannot work."""
    if not is_remote(options.out) and not Path(options.out).name:
        raise PrepareError(f'--out {options.out}: expected the name of a folder to make')
    if options.max_seq_len is not None and options.max_seq_len < 2:
        raise PrepareError(f'--max-seq-len {options.max_seq_len}: a sample needs at least 2 tokens')
    if not 0 < options.val_fraction < 1:
        raise PrepareError(f'--val-fraction {options.val_fraction}: expected more than 0 and less than 1')
    if options.near_threshold is not None and not options.near_duplicates:
        raise PrepareError(f'--near-threshold {options.near_threshold} is of --near-duplicates, which is not given')
    if options.near_threshold is not None and not 0 < options.near_threshold < 1:
        raise PrepareError(f'--near-threshold {options.near_threshold}: expected more than 0 and less than 1')
    if options.workers is not None and options.workers < 1:
        raise PrepareError(f'--workers {options.workers}: expected at least 1')
    given = options.tokenizer or options.parent or (options.earlier and options.earlier[0])
    for name, smallest in {'vocab_size': MIN_VOCAB_SIZE, 'tokenizer_documents': 1}.items():
        value = getattr(options, name)
        flag = '--' + name.replace('_', '-')
        if value is not None and given:
            raise PrepareError(f'{flag} is for a tokenizer trained here; that of {given} is given')
        if value is not None and value < smallest:
            raise PrepareError(f'{flag} {value}: expected at least {smallest}')


def check_lengths(options: argparse.Namespace, parent: Parent | None) -> int:
    """The tokens of a sample; refuses those that the parent cannot read and limits below one sample."""
    if parent and parent.max_seq_len is None and options.max_seq_len is None:
        raise PrepareError(f'--parent {parent.name}: its config.json has no sequence length; give --max-seq-len')
    max_seq_len = options.max_seq_len or (parent and parent.max_seq_len) or DEFAULT_MAX_SEQ_LEN
    if parent and parent.max_seq_len and max_seq_len > parent.max_seq_len:
        raise PrepareError(f'--max-seq-len {max_seq_len}: --parent {parent.name} reads at most {parent.max_seq_len}')
    for name in ('max_train_tokens', 'max_val_tokens'):
        limit = getattr(options, name)
        if limit is not None and limit < max_seq_len:
            raise PrepareError(f'--{name.replace("_", "-")} {limit}: less than one sample of {max_seq_len} tokens')
    return max_seq_len


def check_sources(sources: list[Source]) -> None:
    """Refuses names that occur twice."""
    names = [(source.dataset, source.name) for source in sources]
    for dataset, name in names:
        if names.count((dataset, name)) > 1:
            what = f'datasets are called {name!r}' if name == dataset else f'sources are called {dataset}/{name!r}'
            raise PrepareError(f'--dataset: two {what}')


def check_compression(name: str | None) -> None:
    """Refuses a compression that Streaming does not know."""
    if name is None:
        return
    from streaming.base.compression import get_compressions, is_compression

    if not is_compression(name):
        raise PrepareError(f'--compression {name}: Streaming knows {", ".join(sorted(get_compressions()))}')


def make_request(
    options: argparse.Namespace,
    sources: list[Source],
    files: dict[str, list[str]],
    max_seq_len: int,
    near: dict[str, Any] | None,
    earlier: list[Earlier],
) -> dict[str, Any]:
    """Everything that decides the result, as the manifest records it; the user's own files by number and size."""
    given = options.tokenizer or options.parent or (options.earlier and options.earlier[0]) or None
    folder = Path(options.tokenizer) if options.tokenizer else None
    own_files = {
        str(source).split('=')[0]: f'{len(found)} files, {sum(map(os.path.getsize, found))} bytes'
        for source in sources
        if source.kind != 'installed' and (found := files[str(source)])
    }
    return {
        'format': FORMAT,
        'datasets': [str(source) for source in sources],
        'files': own_files,
        'text_key': options.text_key,
        'tokenizer': options.tokenizer,
        'tokenizer_hash': hash_tokenizer(folder) if folder and (folder / 'tokenizer.json').is_file() else None,
        'parent': options.parent,
        'earlier': {data.location: data.manifest['tokenizer']['hash'] for data in earlier},
        'vocab_size': None if given else options.vocab_size or DEFAULT_VOCAB_SIZE,
        'tokenizer_documents': None if given else options.tokenizer_documents or DEFAULT_TOKENIZER_DOCUMENTS,
        'max_seq_len': max_seq_len,
        'val_fraction': options.val_fraction,
        'max_train_tokens': options.max_train_tokens,
        'max_val_tokens': options.max_val_tokens,
        'near_duplicates': near,
        'compression': options.compression,
    }


def find_tokenizer(options: argparse.Namespace, parent: Parent | None, earlier: list[Earlier]) -> Any:
    """The tokenizer of the parent, of earlier data and of ``--tokenizer``, which must be one; none if none is given."""
    given, hashes = {}, {}
    with ExitStack() as stack:

        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))

        if options.tokenizer:
            given[f'--tokenizer {options.tokenizer}'] = load_tokenizer(options.tokenizer)
        if parent:
            given[f'--parent {parent.name}'] = load_tokenizer(parent.path, '--parent')
        for data in earlier:
            given[f'--earlier {data.location}'] = load_tokenizer(str(data.tokenizer(folder())), '--earlier')
        for name, tokenizer in given.items():
            tokenizer.save_pretrained(saved := folder())
            hashes[name] = hash_tokenizer(saved)
    first = next(iter(given), None)
    for name, found in hashes.items():
        if found != hashes[first]:
            raise PrepareError(
                f'{first} and {name} have different tokenizers (hashes {hashes[first]}, {found}); tokens of one mean '
                "nothing to a model trained with the other: use the parent model's"
            )
    if parent and first and len(given[first]) > parent.vocab_size:
        raise PrepareError(
            f'{first}: its vocabulary of {len(given[first])} is larger than that of --parent {parent.name}, '
            f'{parent.vocab_size}'
        )
    return given[first] if first else None


def check_documents(source: Source, files: list[str], text_key: str) -> None:
    """Reads the first document of a source, so that a wrong column is found before any work."""
    with tempfile.TemporaryDirectory() as folder:
        # a stream is read only as far as its first row
        for part in parts_of(source, files, text_key, 1 if source.kind == 'hf' else 1 << 26, 0, Path(folder)):
            if next(read(part), None) is not None:
                return
    raise PrepareError(f'{source.label}: {source.kind}:{source.target} has no rows')


def make_engine(options: argparse.Namespace, files: dict[str, list[str]], sources: list[Source]) -> Any:
    """What the work is done with."""
    if options.engine == 'spark':
        from cpt_algorithms.preparation.spark import SparkEngine

        return SparkEngine()
    limit = (options.max_train_tokens or 0) + (options.max_val_tokens or 0)
    size = sum(os.path.getsize(file) for found in files.values() for file in found)
    if options.max_train_tokens:
        size = min(size, limit * BYTES_PER_TOKEN * len({source.dataset for source in sources}))
    small = size < WORTH_A_POOL and not any(source.kind == 'hf' for source in sources)
    return LocalEngine(options.workers or (1 if small else num_cores()))


def print_counts(manifest: dict[str, Any], out: str) -> None:
    """Prints what a manifest counts as a table."""
    counted = ('documents', 'duplicates', 'near_duplicates', 'tokens', 'samples', 'bytes')
    shown = [name for name in counted if name != 'near_duplicates' or manifest['request']['near_duplicates']]
    max_seq_len, vocab_size = manifest['request']['max_seq_len'], manifest['tokenizer']['vocab_size']
    title = f'{out}: samples of {max_seq_len:,} tokens, vocabulary of {vocab_size:,}'
    table = Table('dataset', 'split', title=title, title_justify='left', box=box.SIMPLE)
    for column in shown:
        table.add_column(column.replace('_', '-'), justify='right', no_wrap=True)
    for name, dataset in manifest['datasets'].items():
        for split, counts in dataset['splits'].items():
            table.add_row(name, split, *[f'{counts[column]:,}' for column in shown])
        for source, described in dataset['sources'].items() if len(dataset['sources']) > 1 else ():
            for split, counts in described['splits'].items():
                table.add_row(f'  {source}', split, *[f'{counts[column]:,}' for column in shown], style='dim')
    Console().print(table)


def near_settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """The settings of near-duplicates, if these are looked for."""
    if not options.near_duplicates:
        return None
    from cpt_algorithms.preparation.duplicates import NearDuplicates

    return asdict(NearDuplicates(options.near_threshold) if options.near_threshold else NearDuplicates())


@contextmanager
def going_on_later(partial: Path) -> Iterator[None]:
    """An error says that what is finished is kept, if anything is."""
    try:
        yield
    except BrokenProcessPool as error:
        raise PrepareError(
            'a process was killed, perhaps for lack of memory: try fewer --workers '
            f'(the same command goes on from {partial})'
        ) from error
    except PrepareError as error:
        if not any((partial / 'work' / 'parts').glob('[!.]*')):
            shutil.rmtree(partial)
            raise
        raise PrepareError(f'{error} (the same command goes on from {partial}, which can be deleted)') from error


def run(options: argparse.Namespace) -> None:
    """Prepares what the options ask for, or shows what is already there."""
    check_options(options)
    sources = [Source.parse(spec) for spec in options.dataset or DEFAULT_DATASETS]
    check_sources(sources)
    check_compression(options.compression)
    files = {str(source): find_files(source) for source in sources}
    parent = find_parent(options.parent) if options.parent else None
    max_seq_len = check_lengths(options, parent)
    near = near_settings(options)
    earlier = [find_earlier(location, near) for location in options.earlier]
    request = make_request(options, sources, files, max_seq_len, near, earlier)
    manifest = find_prepared(options.out, request)
    if manifest:
        print(f'{options.out} is already prepared')
    else:
        for source in sources:
            if found := files[str(source)]:
                print(f'{source.label.removeprefix("dataset ")}: {len(found):,} files found')
            check_documents(source, found, options.text_key)
        tokenizer = find_tokenizer(options, parent, earlier)
        remote = is_remote(options.out)
        out = (Path(options.work) if options.work else work_folder(options.out)) if remote else Path(options.out)
        with locked_sibling(out, PrepareError(f'another run is preparing {out}')) as partial:
            if remote:
                check_destination(options.out, partial)
            if not find_prepared(str(out), request):
                with going_on_later(partial), make_engine(options, files, sources) as engine:
                    prepare(request, sources, files, partial, engine, tokenizer, earlier).rename(out)
            if remote:
                upload(out, options.out, partial)
                shutil.rmtree(out)
            manifest = find_prepared(options.out, request)
            shutil.rmtree(partial)
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
