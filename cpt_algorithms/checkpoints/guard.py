# SPDX-License-Identifier: Apache-2.0
"""The guard that Composer asks before it loads a checkpoint, which it would unpickle, and in part evaluate."""

import os
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cpt_algorithms.checkpoints.errors import CheckpointError, UnsafeCheckpointError
from cpt_algorithms.checkpoints.open import load_entry, load_structure, read_metadata

__all__ = ['HOOK', 'TRUST', 'guard_loading', 'is_safe']

HOOK = 'CHECKPOINT_VALIDATION_FUNCTION'  # what Composer calls with every file that it is about to load
TRUST = 'set callbacks.stage_start.trust_checkpoint: true if you trust whoever made it'
# `BlurPool(replace_convs=True,min_channels=16)`, `LowPrecisionLayerNorm(apply_at=Event.INIT)`: one call, nothing in it
# that can call; or `<my.Algorithm object>`, which is no Python
_PLAIN_CALL = re.compile(r"\w+\((\w+=([\w.+-]+|'[^'\\]*')(, ?(?=\w)|(?=\))))*\)|<.*>")


def guard_loading(trust: bool = False) -> None:
    """Have Composer ask :func:`is_safe` of every checkpoint that this process and its children load from now on.

    Composer unpickles whatever ``load_path`` names and whatever it resumes from, and evaluates the names of algorithms
    in it. This sets the environment variable ``CHECKPOINT_VALIDATION_FUNCTION``, which is Composer's own hook, and
    refuses archives (``load_path: x.tar``), which Composer would unpack to wherever their members say.

    Args:
        trust: Ask no more. Default: ``False``.

    Raises:
        ValueError: If the variable names another function.

    Cost: reads the pickles once more and no tensors.
    """
    from composer.utils import checkpoint  # takes seconds

    ours, given = f'{__name__}.{is_safe.__name__}', os.environ.get(HOOK)
    if given not in (None, ours) and not trust:
        raise ValueError(f'{HOOK}={given} in the environment takes the place of our check; unset it, or {TRUST}')
    if not trust:
        os.environ[HOOK] = ours
    elif given == ours:
        del os.environ[HOOK]
    checkpoint.tarfile = tarfile if trust else SimpleNamespace(open=_open_archive)  # pyright: ignore


def _open_archive(name: str, mode: str | None = None) -> tarfile.TarFile:
    """Composer gives a mode only when it saves."""
    if mode is None:
        raise UnsafeCheckpointError(
            f'{name} is an archive, whose members can be written anywhere; unpack it, or {TRUST}'
        )
    return tarfile.open(name, mode)  # pyright: ignore


def is_safe(path: str | Path, specs: list[tuple[int, int]] | None = None) -> bool:
    """The hook that Composer calls before it unpickles a file; see :func:`guard_loading`.

    Args:
        path: A ``.pt`` file, a ``.metadata``, or a file of a sharded checkpoint.
        specs: Offset and length of what will be read of a file of a sharded checkpoint. Default: ``None``.

    Raises:
        UnsafeCheckpointError: If loading it could run code.
        CheckpointError: If it is cut off or damaged.
    """
    if not os.path.isfile(path):  # also if no file can have this name
        raise CheckpointError(f'{path} is missing, or no file')
    path = Path(os.path.realpath(path))  # what Composer calls rank0_checkpoint is a link to it
    try:
        if specs is not None:
            for offset, length in set(specs):
                _check_algorithms(load_entry(path, offset, length, str(path)), path)
        elif path.name == '.metadata':
            read_metadata(path.parent)
        else:
            _check_algorithms(load_structure(path)['state'].get('algorithms'), path)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f'{error}; {TRUST}') from None
    return True


def _check_algorithms(value: Any, path: Path) -> None:
    """Refuse a list of algorithms if Composer would evaluate more than the plain call of a class for one of them."""
    for entry in value if isinstance(value, list) else ():
        # any entry of a sharded checkpoint may come here: what has no `repr` is no algorithm
        if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict) and 'repr' in entry[1]:
            if not _PLAIN_CALL.fullmatch(text := str(entry[1]['repr'])):
                raise UnsafeCheckpointError(f'{path} is not safe to read: Composer would evaluate {text[:200]!r}')
