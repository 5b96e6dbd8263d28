# SPDX-License-Identifier: Apache-2.0
r"""Averages checkpoints into one that can be used, or trained on, like any other.

The last five checkpoints of a run, 1000 batches apart, as a Hugging Face model::

    python scripts/average_checkpoints.py runs/stage --last 5 --every 1000ba --out runs/stage-merged

The same as an anneal (WSM's 1-sqrt), as weights that a next stage's ``load_path`` takes::

    python scripts/average_checkpoints.py runs/stage --last 5 --every 1000ba --weights one_minus_sqrt \
        --to pt --out runs/stage-merged.pt

Every window of five along the run; and the average that the run's own EMA callback kept::

    python scripts/average_checkpoints.py 'runs/stage/ep*-ba*' --window 5 --out runs/windows
    python scripts/average_checkpoints.py runs/stage/ep0-ba9000-rank0.pt --average ema_100ba --out runs/ema

A point between a model and the one that it was continued from, and what an instruct model learned, on new weights::

    python scripts/average_checkpoints.py runs/stage/latest-rank0.pt --parent runs/base/latest-rank0.pt --alpha 0.6 \
        --out runs/between
    python scripts/average_checkpoints.py runs/stage/huggingface/ba9000 --plus INSTRUCT --minus BASE --out runs/chat

An INPUT is a Composer .pt file, a Composer sharded folder, a Hugging Face safetensors file or folder, a quoted glob of
these, or a run's save_folder: all its ``ep*-ba*`` checkpoints, or its ``huggingface/ba*`` exports if it has no others.
A glob and a save_folder are sorted by batch, or by the numbers in other names; a list stays as it is given, oldest
first. Object storage (s3://, gs://, oci://, azure://) is downloaded first into a temporary folder beside the result,
which needs disk for all inputs.
"""

import argparse
import re
import shutil
import tempfile
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.files import StorageError, is_remote
from cpt_algorithms.launch.processes import OneLineParser, refuse_launcher, run_command
from cpt_algorithms.terminal import make_console, print_table
from cpt_algorithms.validation import with_home
from cpt_algorithms.weight_averaging.offline.select import AverageError, Found, find, latest, windows_of
from cpt_algorithms.weight_averaging.offline.storage import download, refuse_existing, upload_result

# torch and Composer (7 s) are imported where they are used: a wrong argument answers at once.

DTYPES = ('bfloat16', 'float16', 'float32', 'float64')
DEFAULT_DECAY = 0.9


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(
        'average_checkpoints', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('inputs', nargs='+', metavar='INPUT', help='checkpoints, globs, or the save_folder of a run; oldest first')
    add('--out', required=True, help='what to make; must not exist. Object storage is written here first and uploaded')
    add(
        '--weights',
        default='uniform',
        help='uniform, linear, ema, one_minus_sqrt, or numbers with sum 1, oldest first, such as 0.2,0.3,0.5 '
        '(default: uniform)',
    )
    add('--parent', help='with --alpha A: (1 - A) PARENT + A INPUT')
    add(
        '--alpha', type=float, metavar='A', help='see --parent; 0 is the parent, 1 the input, others may be beyond them'
    )
    add(
        '--plus',
        metavar='OTHER',
        help='with --minus BASE: INPUT + (OTHER - BASE), such as an instruct model and its base',
    )
    add('--minus', metavar='BASE', help='see --plus')
    add('--decay', type=float, help=f'of --weights ema, for each step into the past (default: {DEFAULT_DECAY})')
    add('--last', type=int, metavar='K', help='only the latest K (default: all)')
    add('--every', metavar='NU', help='with --last: those NU batches apart, such as 1000ba, back from the newest')
    add('--window', type=int, metavar='W', help='average every W in a row; OUT gets one each, called as its newest')
    add('--stride', type=int, help='checkpoints from one window to the next; as long as a window: blocks (default: 1)')
    add('--average', metavar='NAME', help="the run's own averages (an ema_..., or lawa) in place of its weights")
    add('--to', default='hf', choices=('hf', 'pt', 'sharded'), help='Hugging Face, or Composer weights (default: hf)')
    add('--dtype', choices=DTYPES, help='of the result (default: as the input; an EMA as its model)')
    add('--accumulate', default='float32', choices=('float32', 'float64'), help='dtype of sums (default: float32)')
    add('--config', type=Path, help='folder with config.json and tokenizer for hf (default: from the newest input)')
    add('--max-shard-size', default='5GB', help='of safetensors files (default: 5GB)')
    add('--may-differ', action='store_true', help='what is no weight (config, tokenizer) may; the newest counts')
    add('--dry-run', action='store_true', help='check and show what would be averaged; downloads nothing')
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse values that cannot work, and fill in what follows from others."""
    if options.decay is not None and options.weights != 'ema':
        raise AverageError(f'--decay {options.decay} is for --weights ema, not {options.weights}')
    options.decay = DEFAULT_DECAY if options.decay is None else options.decay
    for name in ('last', 'window', 'stride'):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise AverageError(f'--{name} {value}: expected at least 1')
    if options.every is not None:
        if not (match := re.fullmatch(r'0*([1-9]\d*)(ba)?', options.every)):
            raise AverageError(f'--every {options.every}: expected a number of batches, such as 1000ba')
        if options.last is None:
            raise AverageError(f'--every {options.every} needs --last: how many of them')
        options.every = int(match[1])
    if options.stride is not None and options.window is None:
        raise AverageError(f'--stride {options.stride} needs --window')
    if options.to == 'pt' and options.window is None and not options.out.endswith('.pt'):
        raise AverageError(f'--out {options.out}: expected a name that ends in .pt with --to pt')
    if not re.fullmatch(r'[1-9]\d*[KMGT]B', options.max_shard_size):
        raise AverageError(f'--max-shard-size {options.max_shard_size}: expected a size such as 5GB')
    if options.config and not (options.config / 'config.json').is_file():
        raise AverageError(f'--config {options.config}: there is no config.json')


def others_of(options: argparse.Namespace) -> list[tuple[str, float]]:
    """What --parent, or --plus and --minus add to the one input, and what it weighs."""
    pairs = (('parent', 'alpha'), ('plus', 'minus'))
    given = [name for pair in pairs for name in pair if getattr(options, name) is not None]
    if not given:
        return []
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        if one in given and other not in given:
            raise AverageError(f'--{one} {getattr(options, one)} needs --{other}')
    ours = {'weights': 'uniform', 'last': None, 'window': None, 'average': None}
    others = given[2:] + [name for name, usual in ours.items() if getattr(options, name) != usual]
    if others:
        raise AverageError(f'--{others[0]} {getattr(options, others[0])} does not go with --{given[0]}')
    if options.alpha is not None:
        if not isfinite(options.alpha):
            raise AverageError(f'--alpha {options.alpha}: expected a number')
        return [(options.parent, 1 - options.alpha)]
    return [(options.minus, -1.0), (options.plus, 1.0)]


def one_of(given: str) -> Found:
    """The one checkpoint that an argument names."""
    found = find([given])
    if len(found) > 1:
        raise AverageError(f'{given} holds {len(found)} checkpoints, and one is wanted, such as {found[-1].path}')
    return found[0]


def weights_of(options: argparse.Namespace, window: Sequence[Found]) -> list[float]:
    """The weights of a window."""
    from cpt_algorithms.weight_averaging.functional import window_weights

    is_numbers = options.weights[:1] in '+-.0123456789'
    try:
        kind = [float(weight) for weight in options.weights.split(',')] if is_numbers else options.weights
        weights = window_weights(kind, len(window), options.decay)
    except ValueError as error:
        raise AverageError(f'--weights {options.weights}: {error}') from None
    if not all(0 <= weight <= 1 for weight in weights):
        raise AverageError(
            f'--weights {options.weights}: weights below 0 or above 1 make no average. {meant(window, weights)}'
        )
    return weights


def meant(window: Sequence[Found], weights: Sequence[float]) -> str:
    """The command for a sum that is no average."""
    paths = [one.path for one in window]
    if len(paths) == 2:
        return f'For a point beyond the ends of a line: {paths[1]} --parent {paths[0]} --alpha {weights[1]:g}'
    if sorted(weights) == [-1, 1, 1]:
        base = paths.pop(weights.index(-1))
        return f'For what one model learned, on another: {paths[0]} --plus {paths[1]} --minus {base}'
    return 'Sums with names are INPUT --parent PARENT --alpha A, and INPUT --plus OTHER --minus BASE'


def print_inputs(found: Sequence[Found], weights: Sequence[float], out: str, average: str | None) -> None:
    """Print the inputs, oldest first."""
    what = f'{average} of ' if average else ''
    count = f'{len(found)} checkpoint' + ('s' if len(found) > 1 else '')
    table = Table('checkpoint', title=escape(f'{what}{count} -> {out}'), title_justify='left', box=box.SIMPLE)
    table.add_column('batch', justify='right')
    table.add_column('weight', justify='right')
    for one, weight in zip(found, weights, strict=True):
        table.add_row(escape(one.path), '' if one.batch is None else f'{one.batch:,}', f'{weight:.6g}')
    print_table(table, make_console())


def output_of(options: argparse.Namespace, window: Sequence[Found]) -> str:
    """Where a window's average goes."""
    if options.window is None:
        return options.out.rstrip('/')
    return f'{options.out.rstrip("/")}/{window[-1].name}' + ('.pt' if options.to == 'pt' else '')


def run(options: argparse.Namespace) -> None:
    """Find, show, check and average."""
    for name in ('inputs', 'out', 'parent', 'plus', 'minus'):  # quoted, the shell leaves a ~
        setattr(options, name, with_home(getattr(options, name)))
    check_options(options)
    others = others_of(options)
    if others:
        if len(options.inputs) > 1:
            raise AverageError(f'--{"alpha" if options.parent else "plus"} is for one INPUT, not {len(options.inputs)}')
        found = [*(one_of(path) for path, _ in others), one_of(options.inputs[0])]
        windows = [found]
        weights = [*(weight for _, weight in others), options.alpha if options.parent else 1.0]
    else:
        # without an order, which one is the newest is not known
        order_matters = options.weights != 'uniform' or options.window is not None or options.may_differ
        found = find(options.inputs, order_matters)
        if options.last is not None:
            found = latest(found, options.last, options.every)
        windows = windows_of(found, options.window, options.stride or 1)
        weights = weights_of(options, windows[0])
    outputs = [output_of(options, window) for window in windows]
    for window, out in zip(windows, outputs, strict=True):
        refuse_existing(out, is_file=options.to == 'pt')
        print_inputs(window, weights, out, options.average)
    if options.dry_run and any(one.objects for one in found):
        return
    beside = Path(tempfile.gettempdir()) if is_remote(options.out) else Path(options.out).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    from cpt_algorithms.weight_averaging.offline.average_files import average_files

    how = {'weights': options.weights, 'decay': options.decay if options.weights == 'ema' else None}
    with tempfile.TemporaryDirectory(prefix='.average-', dir=beside) as temporary:
        used = [one for one in found if any(one in window for window in windows)]
        paths = dict(zip(used, download(used, Path(temporary), options.to == 'hf' and not options.config), strict=True))
        for window, out in zip(windows, outputs, strict=True):
            local = Path(temporary) / 'upload' / Path(out).name if is_remote(out) else Path(out)
            try:
                average_files(
                    [paths[one] for one in window],
                    weights,
                    local,
                    options.to,
                    average=options.average,
                    dtype=options.dtype,
                    accumulate=options.accumulate,
                    config=options.config,
                    max_shard_size=options.max_shard_size,
                    may_differ=options.may_differ,
                    is_one_run=not others,
                    dry_run=options.dry_run,
                    places=[one.path for one in window],
                    how={} if others else how,
                )
            except CheckpointError as error:  # of what was downloaded, which nobody has named
                said = str(error)
                for one in window:
                    said = said.replace(str(paths[one]), one.path)
                raise AverageError(said) from None
            if options.dry_run:
                continue
            if is_remote(out):
                upload_result(local, out)
                shutil.rmtree(local.parent)
            print(f'wrote {out}')


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        run(options)
    except (AverageError, CheckpointError, StorageError, OSError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    refuse_launcher()
    run_command(main)
