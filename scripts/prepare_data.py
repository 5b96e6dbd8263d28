# SPDX-License-Identifier: Apache-2.0
r"""Text to MDS: tokenise, de-duplicate, pack and shard the datasets D0, D1, ... of a continual pre-training sequence.

Offline default (Python and C++ that is already installed)::

    python scripts/prepare_data.py --out data/quickstart --max-train-tokens 3000000 --max-val-tokens 40000

Your own text (``KIND`` is installed, jsonl, parquet, text, hf or sampled; quote globs and ``&``), and a year later
more of it::

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
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from cpt_algorithms.files import StorageError, is_remote, locked_sibling
from cpt_algorithms.launch.processes import OneLineParser, refuse_launcher, run_command
from cpt_algorithms.preparation.engines import make_engine
from cpt_algorithms.preparation.manifest import Manifest, find_earlier, find_prepared
from cpt_algorithms.preparation.options import DEFAULT_DATASETS, Options, make_request, sample_length
from cpt_algorithms.preparation.pipeline import prepare, resumable
from cpt_algorithms.preparation.reading import PrepareError
from cpt_algorithms.preparation.sources import INSTALLED, check_documents, find_files, parse_sources
from cpt_algorithms.preparation.storage import check_destination, upload_folder, work_folder
from cpt_algorithms.preparation.tokenizer import find_parent, find_tokenizer
from cpt_algorithms.validation import ConfigError, parse_section

SHOWN = 10  # rows left out, of each source

# Streaming (7 s), transformers and datasets are imported where they are used: a wrong argument or a re-run
# of something already prepared answers at once.


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser('prepare_data', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', required=True, help='folder to make, or a URI that Composer can write to, such as s3://bucket/data')
    add(
        '--dataset',
        action='append',
        metavar='NAME[/SOURCE]=KIND:TARGET',
        help=f'D0, D1, ... in order, of one source or several; installed:({"|".join(INSTALLED)}|a package), '
        'jsonl:GLOB, parquet:GLOB, text:GLOB, hf:PATH?name=..&split=..&revision=.. or sampled:MODEL?tokens=N (default: '
        + ' '.join(DEFAULT_DATASETS)
        + ')',
    )
    add('--text-key', help='column of the text in jsonl, parquet and hf (default: text)')
    add('--encoding', help="of the text in jsonl and text, in Python's words: utf-16, cp1252, ... (default: utf-8)")
    add('--skip-broken', action='store_true', help='leave out what cannot be read, and list it (default: stop at it)')
    add('--bos-text', help="token before each document; '' for none (default: what the tokenizer itself puts there)")
    add('--eos-text', help='token behind each document (default: what the tokenizer itself puts there, and its EOS)')
    add('--tokenizer', help='Hugging Face name or folder (default: that of --parent or --earlier, or trained on D0)')
    add('--parent', help='the model that will be trained on the data: Hugging Face name or folder, or a run')
    add('--earlier', action='append', help='data prepared before, whose documents count as seen')
    add('--vocab-size', type=int, help='of the trained tokenizer (default: 4096)')
    add(
        '--tokenizer-documents',
        type=int,
        help='train documents of D0 the tokenizer is trained on (default: 2000)',
    )
    add('--max-seq-len', type=int, help="tokens per sample (default: --parent's, or 128)")
    add('--val-fraction', type=float, help='share of the documents held out (default: 0.02)')
    add('--train-subset', type=float, help='share of the documents to train on, by a hash of their text (default: all)')
    add('--max-train-tokens', type=int, help='per dataset, rounded down to whole samples (default: no limit)')
    add('--max-val-tokens', type=int, help='the same for val (default: what comes until train is full)')
    add('--near-duplicates', action='store_true', help='drop them, too: MinHash of word n-grams')
    add('--near-threshold', type=float, help='Jaccard similarity aimed at (default: 0.8)')
    add('--decontaminate', action='append', metavar='SUITE', help='drop documents that share words with its items')
    add('--contamination-ngram', type=int, help='so many words in a row (default: 13)')
    add('--keep-contaminated', action='store_true', help='list them only, in contaminated.jsonl')
    add('--compression', help='of the shards, as MDSWriter takes it: zstd, zstd:9, ... (default: none)')
    add('--workers', type=int, help='processes (default: the cores)')
    add('--engine', help='local or spark: what the work is done with (default: local)')
    add('--work', help='folder to work in for an --out that is no folder (default: one in the temporary folder)')
    return parser


def print_counts(manifest: Manifest, out: str) -> None:
    """Prints what a manifest counts as a table, as wide as the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from cpt_algorithms.terminal import make_console, print_table

    counted = ('documents', 'duplicates', 'near_duplicates', 'contaminated', 'tokens', 'samples', 'bytes')
    asked = {'near_duplicates': manifest.request.near_duplicates, 'contaminated': manifest.request.decontaminate}
    shown = [name for name in counted if asked.get(name, True)]
    max_seq_len, vocab_size = manifest.request.max_seq_len, manifest.tokenizer.vocab_size
    title = f'{out}: samples of {max_seq_len:,} tokens, vocabulary of {vocab_size:,}'
    table = Table('dataset', 'split', title=escape(title), title_justify='left', box=box.SIMPLE)
    for column in shown:
        table.add_column(column.replace('_', '-'), justify='right', no_wrap=True)
    for name, dataset in manifest.datasets.items():
        for split, counts in dataset.splits.items():
            table.add_row(escape(name), split, *[f'{getattr(counts, column):,}' for column in shown])
        for source, described in dataset.sources.items() if len(dataset.sources) > 1 else ():
            for split, counts in described.splits.items():
                cells = [f'{getattr(counts, column):,}' for column in shown]
                table.add_row(escape(f'  {source}'), split, *cells, style='dim')
    print_table(table, make_console())
    for name, dataset in manifest.datasets.items():
        for source, described in dataset.sources.items():
            label = name if source == name else f'{name}/{source}'
            if described.skipped:
                print(f'{label}: {described.skipped:,} of {described.rows:,} rows have no text')
            if described.broken:
                print(f'{label}: {described.broken:,} of {described.rows:,} rows cannot be read and are left out:')
                print(*(f'  {row}' for row in described.first_broken[:SHOWN]), sep='\n')
                if described.broken > SHOWN:
                    print(f'  ... ({out}/manifest.json lists the first {len(described.first_broken)})')
    for name, dataset in manifest.datasets.items():
        for task, hits in dataset.contamination.items():
            what = 'for training that are kept' if manifest.request.keep_contaminated else 'dropped'
            short = f' ({hits.short:,} too short to be looked for)' if hits.short else ''
            found = f'{hits.items:,} of {hits.of:,} items found{short}'
            print(f'{name}, {task}: {found}, documents {what}: {hits.documents:,}')
    start, end = (' '.join(tokens) for tokens in (manifest.tokenizer.document_start, manifest.tokenizer.document_end))
    print(f'each document begins with {start or "its text"} and ends with {end}')


def run(options: Options) -> None:
    """Prepares the data, or shows it if it is already there."""
    options.check()
    sources = parse_sources(options.dataset, options.encoding, options.skip_broken)
    files = {str(source): find_files(source) for source in sources}
    parent = find_parent(options.parent) if options.parent else None
    max_seq_len, near = sample_length(options, parent), options.near_settings()
    earlier = [find_earlier(location, near) for location in options.earlier]
    items = None
    if options.decontaminate:
        from cpt_algorithms.preparation.contamination import NGRAM, read_items

        items = read_items(options.decontaminate, options.contamination_ngram or NGRAM)
    request = make_request(options, sources, files, max_seq_len, near, earlier, items.digest if items else None)
    manifest = find_prepared(options.out, request)
    if manifest:
        print(f'{options.out} is already prepared')
    else:
        for source in sources:
            if found := files[str(source)]:
                print(f'{source.label.removeprefix("dataset ")}: {len(found):,} files found')
            check_documents(source, found, options.text_key)
        tokenizer = find_tokenizer(options.tokenizer, parent, earlier, options.bos_text, options.eos_text)
        remote = is_remote(options.out)
        out = (Path(options.work) if options.work else work_folder(options.out)) if remote else Path(options.out)
        with locked_sibling(out, PrepareError(f'another run is preparing {out}')) as partial:
            if remote:
                check_destination(options.out, partial)
            if not find_prepared(str(out), request):
                with resumable(partial), make_engine(options, sources, files) as engine:
                    prepare(request, sources, files, partial, engine, tokenizer, earlier, items).rename(out)
            if remote:
                upload_folder(out, options.out, partial)
                shutil.rmtree(out)
            manifest = find_prepared(options.out, request)
            shutil.rmtree(partial)
    assert manifest is not None
    print_counts(manifest, options.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    try:
        run(parse_section(Options, vars(parser.parse_intermixed_args(arguments))))
    except ConfigError as error:
        named = [re.sub(r'^\w+', lambda key: f'--{key[0].replace("_", "-")}', problem) for problem in error.problems]
        parser.error('; '.join(named))
    except (PrepareError, StorageError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    refuse_launcher()
    run_command(main)
