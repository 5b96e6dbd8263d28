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

An INPUT is a Composer .pt file, a Composer sharded folder, a Hugging Face safetensors file or folder, a quoted glob of
these, or a run's save_folder: all its ``ep*-ba*`` checkpoints, or its ``huggingface/ba*`` exports if it has no others.
A glob and a save_folder are sorted by batch; a list stays as it is given, oldest first. Object storage (s3://, gs://,
oci://, azure://) is downloaded first into a temporary folder beside the result, which needs disk for all inputs.
"""

import argparse
import fnmatch
import glob
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from prepare_data import OneLineParser
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# torch and Composer (7 s) are imported where they are used: a wrong argument answers at once.

WEIGHTS = ('uniform', 'linear', 'ema', 'one_minus_sqrt')
DTYPES = ('bfloat16', 'float16', 'float32', 'float64')
DEFAULT_DECAY = 0.9
RUN = 'ep*-ba*'  # Composer's names of checkpoints
EXPORT = r'ba\d+'  # and of exports in huggingface/; those of averages have a suffix
PROVENANCE = 'average.json'
LIBRARIES = ('cpt-algorithms', 'mosaicml', 'safetensors', 'torch', 'transformers')


class AverageError(Exception):
    """Something the user can put right; its message is printed as one line."""


# Finding checkpoints


def is_glob(text: str) -> bool:
    """Whether a path is a pattern."""
    return bool(glob.has_magic(text))


class Local:
    """Files on this machine."""

    def children(self, path: str) -> list[str]:
        """Names in a folder; none in a file or where nothing is."""
        return sorted(os.listdir(path)) if os.path.isdir(path) else []

    def glob(self, pattern: str) -> list[str]:
        """Paths that match, without links named ``latest*`` to others of them."""
        found = glob.glob(pattern)
        links = [path for path in found if is_latest(path)]
        real = {os.path.realpath(path) for path in found if path not in links}
        return [path for path in found if path not in links or os.path.realpath(path) not in real]


def is_latest(path: str) -> bool:
    """Whether a path is the link that Composer keeps to its newest checkpoint."""
    return os.path.islink(path) and os.path.basename(path).startswith('latest')


class Remote:
    """Files in a bucket.

    Args:
        uri: A URI in it; what does not lie below the folder of its first wildcard is not listed.
    """

    def __init__(self, uri: str):
        from composer.utils import maybe_create_object_store_from_uri, parse_uri

        fixed = re.split(r'[*?[]', uri)[0]  # where a pattern begins, a URI would have a query
        self.path = uri.split('://', 1)[1].partition('/')[2].rstrip('/')
        self.root = uri[: uri.index('/', uri.index('://') + 3) + 1] if '/' in uri.split('://', 1)[1] else f'{uri}/'
        try:
            store = maybe_create_object_store_from_uri(fixed)
            assert store is not None, 'it has a scheme'
            self.store = store
            found = store.list_objects(parse_uri(fixed)[2])
        except Exception as error:
            raise AverageError(f'{uri}: cannot list it: {" ".join(str(error).split())}') from None
        self.names = sorted(name for name in found if not name.endswith(('.symlink', '/')))
        for name in self.names:
            if '..' in name.split('/'):
                raise AverageError(f'{uri}: the object name {name!r} leads out of its folder')

    @cached_property
    def tree(self) -> dict[str, set[str]]:
        """Names in each folder."""
        tree: dict[str, set[str]] = {}
        for name in self.names:
            *folders, _ = [*accumulate(name.split('/'), '{}/{}'.format)]
            for parent, child in zip(['', *folders], [*folders, name], strict=True):
                tree.setdefault(parent, set()).add(child.rpartition('/')[2])
        return tree

    def children(self, path: str) -> list[str]:
        """Names in a folder; none in a file or where nothing is."""
        return sorted(self.tree.get(path, ()))

    def glob(self, pattern: str) -> list[str]:
        """Paths that match."""
        parts = pattern.split('/')
        paths = {'/'.join(name.split('/')[: len(parts)]) for name in self.names}
        split = [path.split('/') for path in sorted(paths) if path.count('/') == len(parts) - 1]
        return ['/'.join(names) for names in split if all(map(fnmatch.fnmatchcase, names, parts))]


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found.

    Args:
        given: Its path or URI, for messages.
        path: Its path, or name in the bucket.
        remote: The bucket.
    """

    given: str
    path: str
    remote: Remote | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """``ep0-ba10`` for ``run/ep0-ba10-rank0.pt``."""
        path = PurePosixPath(self.path)
        if path.name.startswith('model.safetensors'):
            return path.parent.name
        return re.sub(r'(-rank\d+)?\.(pt|safetensors)$', '', path.name)

    @property
    def batch(self) -> int | None:
        """The batch in its name."""
        numbers = re.findall(r'(?<![a-zA-Z])ba(\d+)', self.name)
        return int(numbers[-1]) if numbers else None


def is_checkpoint(place: Local | Remote, path: str) -> bool:
    """Whether a path looks like one checkpoint: a file, or a folder that one fills."""
    names = place.children(path)
    return not names or any(n in names for n in ('.metadata', 'model.safetensors', 'model.safetensors.index.json'))


def of_run(place: Local | Remote, folder: str) -> list[str]:
    """The checkpoints in a run's folder."""
    checkpoints = [path for path in place.glob(f'{folder}/{RUN}') if is_checkpoint(place, path)]
    exports = [*place.glob(f'{folder}/huggingface/*'), *place.glob(f'{folder}/*')]
    exports = [path for path in exports if re.fullmatch(EXPORT, path.rpartition('/')[2])]
    return checkpoints or [path for path in exports if is_checkpoint(place, path)]


def find(inputs: Sequence[str]) -> list[Found]:
    """All checkpoints that the inputs name, oldest first.

    Raises:
        AverageError: If an input has none, or one is named twice.
    """
    found: list[Found] = []
    for given in inputs:
        remote = Remote(given) if '://' in given else None
        place: Local | Remote = remote or Local()
        path = remote.path if remote else given.rstrip('/') or given
        matches = place.glob(path) if is_glob(path) else [path]
        if not is_glob(path) and not is_checkpoint(place, path):
            # an empty answer is explained when the folder itself is opened
            matches = of_run(place, glob.escape(path)) or matches
        exists = bool(matches) and (
            remote is None or path in remote.names or bool(place.children(path)) or is_glob(path)
        )
        if not exists:
            raise AverageError(f'{given}: no checkpoint found')
        if not remote:
            matches = [os.path.realpath(match) if is_latest(match) else match for match in matches]
        root = remote.root if remote else ''
        group = [Found(root + match, match, remote) for match in matches]
        found += sorted(group, key=lambda one: (one.batch is None, one.batch or 0, one.path))
    counts = Counter(one.given if one.remote else os.path.realpath(one.path) for one in found)
    for path, count in counts.items():
        if count > 1:
            raise AverageError(f'{path} is given {count} times')
    return found


def select(found: Sequence[Found], last: int, every: int | None) -> list[Found]:
    """The latest ``last`` checkpoints, ``every`` batches apart, oldest first.

    Raises:
        AverageError: If there are too few, one is missing, or one has no batch in its name.
    """
    by_batch: dict[int, Found] = {}
    for one in found:
        if one.batch is None:
            raise AverageError(f'--last {last}: {one.given} has no batch in its name, such as ba1000')
        if one.batch in by_batch:
            raise AverageError(f'--last {last}: {by_batch[one.batch].given} and {one.given} are of the same batch')
        by_batch[one.batch] = one
    batches = sorted(by_batch)
    if every is None:
        wanted = batches[-last:]
        if len(batches) < last:
            raise AverageError(f'--last {last}: there are only {len(batches)}: {listed(batches)}')
    else:
        wanted = [batches[-1] - every * back for back in reversed(range(last))]
        if missing := [batch for batch in wanted if batch not in by_batch]:
            raise AverageError(
                f'--last {last} --every {every}: batch {listed(missing)} is missing; there are {listed(batches)}'
            )
    return [by_batch[batch] for batch in wanted]


def listed(numbers: Sequence[int]) -> str:
    """Numbers in a message, the last twenty of them."""
    return ('... ' if len(numbers) > 20 else '') + ', '.join(map(str, numbers[-20:]))


def windows_of(found: list[Found], window: int | None, stride: int) -> list[list[Found]]:
    """Each window along the trajectory; one of everything without ``window``.

    Raises:
        AverageError: If there are too few, or two windows would have one name.
    """
    if window is None:
        return [found]
    if len(found) < window:
        raise AverageError(f'--window {window}: there are only {len(found)} checkpoints')
    windows = [found[end - window : end] for end in range(window, len(found) + 1, stride)]
    for name, count in Counter(each[-1].name for each in windows).items():
        if count > 1:
            raise AverageError(f'--window {window}: {count} checkpoints are called {name!r}')
    return windows


# Object storage


def needed(one: Found, small_files_too: bool) -> list[str]:
    """Objects that make a checkpoint, and with ``small_files_too`` the newest export's config and tokenizer."""
    remote = one.remote
    assert remote is not None, 'only objects are downloaded'
    names = [name for name in remote.names if name == one.path or name.startswith(f'{one.path}/')]
    if small_files_too:
        parent = one.path.rpartition('/')[0]
        beside = Remote(f'{remote.root}{parent}/huggingface/')
        exports = [path for path in beside.glob(f'{parent}/huggingface/*') if 'config.json' in beside.children(path)]
        if exports:
            newest = max((Found('', path) for path in exports), key=lambda export: export.batch or -1).path
            small = ('.json', '.txt', '.model', '.py', '.jinja')
            names += [n for n in beside.names if n.startswith(f'{newest}/') and n.endswith(small)]
    return names


def download(found: Sequence[Found], folder: Path, small_files: bool) -> list[Path]:
    """Bring the checkpoints here, in the order given; what is here already stays where it is.

    Raises:
        AverageError: If the disk is too small or a download fails.
    """
    objects = {}
    for one in found:
        if one.remote:
            for name in needed(one, small_files and one is found[-1]):
                objects[one.remote.root, name] = one.remote.store
    sizes = {place: store.get_object_size(place[1]) for place, store in objects.items()}
    require_disk(folder, sum(sizes.values()), 'downloading the inputs')

    def local(root: str, name: str) -> Path:
        return folder / re.sub(r'\W+', '-', root) / name

    with tqdm(total=sum(sizes.values()), desc='downloading', unit='B', unit_scale=True, disable=None) as bar:
        for (root, name), store in objects.items():
            local(root, name).parent.mkdir(parents=True, exist_ok=True)
            try:
                store.download_object(name, str(local(root, name)))
            except Exception as error:
                raise AverageError(f'{root}{name}: cannot download it: {" ".join(str(error).split())}') from None
            bar.update(sizes[root, name])
    return [local(one.remote.root, one.path) if one.remote else Path(one.path) for one in found]


def upload(made: Path, uri: str) -> None:
    """Send a result to object storage, what makes it look finished last."""
    from composer.utils import maybe_create_object_store_from_uri, parse_uri

    store = maybe_create_object_store_from_uri(uri)
    assert store is not None, 'it has a scheme'
    target = parse_uri(uri)[2].rstrip('/')
    files = sorted((f for f in made.parent.rglob('*') if f.is_file()), key=lambda f: (is_last(f), f))
    for file in tqdm(files, 'uploading', unit=' files', disable=None):
        relative = file.relative_to(made.parent).as_posix().removeprefix(made.name)
        name = (
            target + relative if file.is_relative_to(made) else f'{target.rpartition("/")[0]}/{file.name}'.lstrip('/')
        )
        store.upload_object(name, str(file))


def is_last(file: Path) -> bool:
    """Whether a file makes a checkpoint look finished."""
    return file.name in ('config.json', '.metadata') or file.suffix == '.pt'


def require_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what does not fit."""
    while not folder.exists():
        folder = folder.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise AverageError(f'{what} needs {num_bytes / 1e9:,.1f} GB in {folder}, which has {free / 1e9:,.1f} GB')


# Averaging


def provenance(
    options: argparse.Namespace, found: Sequence[Found], checkpoints: Sequence[Any], plan: Any, weights: Sequence[float]
) -> dict[str, Any]:
    """How a result was made."""
    from cpt_algorithms.checkpoints.open import files_of

    inputs = []
    for one, checkpoint, weight in zip(found, checkpoints, weights, strict=True):
        stats = [file.stat() for file in files_of(checkpoint)]
        size, modified = sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats)
        inputs.append({'path': one.given, 'weight': weight, 'bytes': size, 'modified': modified})
    floats = sorted({str(dtype).removeprefix('torch.') for dtype in plan.dtypes.values() if dtype.is_floating_point})
    return {
        'averaged': options.average or 'weights',
        'inputs': inputs,
        'weights': options.weights,
        'decay': options.decay if options.weights == 'ema' else None,
        'accumulator': options.accumulate,
        'dtypes': floats,
        'copied_from_newest': plan.copied,
        'not_in_the_callback': plan.kept,
        'parts_of_the_average': [weight for weight, _ in next(iter(plan.parts.values()))] if options.average else None,
        'to': options.to,
        'versions': {'python': platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def weights_of(options: argparse.Namespace, count: int) -> list[float]:
    """The weights of a window."""
    from cpt_algorithms.weight_averaging.functional import window_weights

    try:
        kind = options.weights if options.weights in WEIGHTS else [float(w) for w in options.weights.split(',')]
        return window_weights(kind, count, options.decay)
    except ValueError as error:
        raise AverageError(f'--weights {options.weights}: {error}') from None


def print_table(found: Sequence[Found], weights: Sequence[float], out: str, options: argparse.Namespace) -> None:
    """What will be averaged, oldest first."""
    what = f'{options.average} of ' if options.average else ''
    count = f'{len(found)} checkpoint' + ('s' if len(found) > 1 else '')
    table = Table('checkpoint', title=f'{what}{count} -> {out}', title_justify='left', box=box.SIMPLE)
    table.add_column('batch', justify='right')
    table.add_column('weight', justify='right')
    for one, weight in zip(found, weights, strict=True):
        table.add_row(one.given, '' if one.batch is None else f'{one.batch:,}', f'{weight:.6g}')
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def output_of(options: argparse.Namespace, window: Sequence[Found]) -> str:
    """Where a window's average goes."""
    if options.window is None:
        return options.out.rstrip('/')
    return f'{options.out.rstrip("/")}/{window[-1].name}' + ('.pt' if options.to == 'pt' else '')


def companion(out: Path) -> Path:
    """The provenance file beside a single file."""
    return out.with_name(f'{out.name}.{PROVENANCE}')


def refuse_existing(out: str, options: argparse.Namespace) -> None:
    """Nothing is overwritten."""
    if '://' in out:
        remote = Remote(out)
        there = [name for name in remote.names if name == remote.path or name.startswith(f'{remote.path}/')]
        if there:
            raise AverageError(f'{out} exists; choose another --out or delete it')
        return
    result = Path(out)
    # killed between the two, it has left the companion of a result that it had in its hidden folder
    was_killed = result.with_name(f'.{result.name}.partial').exists()
    for path in (result, *([companion(result)] if options.to == 'pt' and not was_killed else [])):
        if path.exists() or path.is_symlink():
            raise AverageError(f'{path} exists; choose another --out or delete it')


def average(
    options: argparse.Namespace, window: Sequence[Found], paths: Sequence[Path], weights: list[float], out: Path
) -> None:
    """Check a window, and unless it is a dry run average it into ``out``."""
    import torch

    from cpt_algorithms.checkpoints.open import open_checkpoint
    from cpt_algorithms.weight_averaging.offline import averaged_checkpoint as to

    checkpoints = [open_checkpoint(path) for path in paths]
    newest = checkpoints[-1]
    small_files = to.find_small_files(newest, options.config) if options.to == 'hf' else {}
    if options.to != 'hf' and newest.kind == 'hf':
        folder = options.config or (newest.path if newest.path.is_dir() else newest.path.parent)
        checkpoints[-1] = replace(newest, aliases=to.tie(newest, folder))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    plan = to.make_plan(checkpoints, weights, options.average, dtype, getattr(torch, options.accumulate))
    require_disk(out.parent, plan.written_bytes, f'writing {out.name}')
    if options.dry_run:
        return
    record = provenance(options, window, checkpoints, plan, weights)
    bar = tqdm(total=plan.read_bytes, desc=out.name, unit='B', unit_scale=True, disable=None)
    with bar, to.appearing_whole(out) as partial:
        made = partial / out.name
        if options.to == 'hf':
            to.write_hugging_face(plan, made, small_files, options.max_shard_size, bar.update)
        elif options.to == 'pt':
            to.write_monolithic(plan, made, bar.update)
        else:
            to.write_sharded(plan, made, bar.update)
        place = companion(made) if options.to == 'pt' else made / PROVENANCE
        place.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')


# Command line


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
        help=f'{", ".join(WEIGHTS)}, or numbers with sum 1, oldest first, such as 0.2,0.3,0.5 (default: uniform)',
    )
    add('--decay', type=float, help=f'of --weights ema, for each step into the past (default: {DEFAULT_DECAY})')
    add('--last', type=int, metavar='K', help='only the latest K (default: all)')
    add('--every', metavar='NU', help='with --last: those NU batches apart, such as 1000ba, back from the newest')
    add(
        '--window',
        type=int,
        metavar='W',
        help='an average of every W in a row; OUT gets one each, called as its newest',
    )
    add('--stride', type=int, help='checkpoints from one window to the next; as long as a window: blocks (default: 1)')
    add('--average', metavar='NAME', help="the run's own averages (an ema_..., or lawa) in place of its weights")
    add('--to', default='hf', choices=('hf', 'pt', 'sharded'), help='Hugging Face, or Composer weights (default: hf)')
    add('--dtype', choices=DTYPES, help='of the result (default: as the input; an EMA as its model)')
    add('--accumulate', default='float32', choices=('float32', 'float64'), help='dtype of sums (default: float32)')
    add('--config', type=Path, help='folder with config.json and tokenizer for hf (default: from the newest input)')
    add('--max-shard-size', default='5GB', help='of safetensors files (default: 5GB)')
    add('--dry-run', action='store_true', help='check and show what would be averaged; downloads nothing')
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse values that cannot work, and fill in what follows from others."""
    if options.weights not in WEIGHTS and not re.fullmatch(r'[-+.\deE]+(,[-+.\deE]+)*', options.weights):
        raise AverageError(
            f'--weights {options.weights}: expected one of {", ".join(WEIGHTS)}, or numbers: 0.2,0.3,0.5'
        )
    if options.decay is not None and options.weights != 'ema':
        raise AverageError(f'--decay {options.decay} is for --weights ema, not {options.weights}')
    options.decay = DEFAULT_DECAY if options.decay is None else options.decay
    for name in ('last', 'window', 'stride'):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise AverageError(f'--{name} {value}: expected at least 1')
    if options.every is not None:
        if not (match := re.fullmatch(r'(\d+)(ba)?', options.every)) or not int(match.group(1)):
            raise AverageError(f'--every {options.every}: expected a number of batches, such as 1000ba')
        if options.last is None:
            raise AverageError(f'--every {options.every} needs --last: how many of them')
        options.every = int(match.group(1))
    if options.stride is not None and options.window is None:
        raise AverageError(f'--stride {options.stride} needs --window')
    if options.to == 'pt' and options.window is None and not options.out.endswith('.pt'):
        raise AverageError(f'--out {options.out}: expected a name that ends in .pt with --to pt')
    if not re.fullmatch(r'[1-9]\d*[KMGT]B', options.max_shard_size):
        raise AverageError(f'--max-shard-size {options.max_shard_size}: expected a size such as 5GB')
    if options.config and not (options.config / 'config.json').is_file():
        raise AverageError(f'--config {options.config}: there is no config.json')


def run(options: argparse.Namespace) -> None:
    """Find, show, check and average."""
    check_options(options)
    found = find(options.inputs)
    if options.last is not None:
        found = select(found, options.last, options.every)
    windows = windows_of(found, options.window, options.stride or 1)
    weights = weights_of(options, len(windows[0]))
    outputs = [output_of(options, window) for window in windows]
    for window, out in zip(windows, outputs, strict=True):
        refuse_existing(out, options)
        print_table(window, weights, out, options)
    is_remote = any(one.remote for one in found)
    if options.dry_run and is_remote:
        return
    beside = Path(options.out).absolute().parent
    if '://' in options.out:
        beside = Path(tempfile.gettempdir())
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.average-', dir=beside) as temporary:
        used = [one for one in found if any(one in window for window in windows)]
        paths = dict(zip(used, download(used, Path(temporary), options.to == 'hf' and not options.config), strict=True))
        for window, out in zip(windows, outputs, strict=True):
            local = Path(temporary) / 'upload' / Path(out).name if '://' in out else Path(out)
            average(options, window, [paths[one] for one in window], weights, local)
            if options.dry_run:
                continue
            if '://' in out:
                upload(local, out)
                for file in local.parent.iterdir():
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            print(f'wrote {out}')


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (AverageError, OSError) as error:
        parser.error(str(error))
    except ValueError as error:
        from cpt_algorithms.checkpoints.open import CheckpointError

        if not isinstance(error, CheckpointError):
            raise
        parser.error(str(error))


if __name__ == '__main__':
    main()
