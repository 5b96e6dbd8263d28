# SPDX-License-Identifier: Apache-2.0
"""Times of a YAML, such as ``1000ba``, read without Composer; and the one way from a time to batches."""

import math
import re
from dataclasses import dataclass
from typing import Any

from cpt_algorithms.validation import short_repr

__all__ = ['ABSOLUTE', 'UNITS', 'Duration', 'per_batch_of']

# What can be counted in batches before the data is known.
ABSOLUTE = ('tok', 'ba', 'sp')
UNITS = (*ABSOLUTE, 'dur', 'ep')
_TIME = re.compile(r'(\d*\.?\d+(?:e[+-]?\d+)?)(tok|ba|sp|dur|ep)', re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """A time, as Composer writes it: a value of at least 0, whole but for ``dur``, a share of the run, and its unit."""

    value: float
    unit: str

    @classmethod
    def parse(cls, key: str, value: Any, units: tuple[str, ...] = UNITS) -> 'Duration':
        """Read a time that a YAML says under a key.

        Raises:
            ValueError: If it is none, negative, or in another unit.
        """
        if isinstance(value, cls):
            value = str(value)
        found = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
        unit = found[2].lower() if found else ''
        number = float(found[1]) if found else math.nan
        if unit in units and math.isfinite(number) and (unit == 'dur' or number.is_integer()):
            return cls(number if unit == 'dur' else int(number), unit)
        example = "'0.01dur'" if units == ('dur',) else f"'1000{units[0]}'"
        raise ValueError(
            f'{key}={short_repr(value)} must be a time of at least 0 in {_either(units)}, such as {example}'
        )

    def __str__(self) -> str:
        return f'{self.value:g}{self.unit}' if self.unit == 'dur' else f'{self.value}{self.unit}'

    def batches(self, global_batch_size: int, max_seq_len: int, epoch: int | None = None) -> int | None:
        """Batches that begin before this much has been trained: rounded up, as Composer trains.

        Args:
            global_batch_size: Samples of a batch over all ranks.
            max_seq_len: Tokens of a sample.
            epoch: Batches of an epoch. Default: ``None``, not known.

        Returns:
            None for ``dur``, and for ``ep`` of unknown length.
        """
        if self.unit == 'ep' and epoch is not None:
            return int(self.value) * epoch
        per_batch = per_batch_of(self.unit, global_batch_size, max_seq_len)
        return None if per_batch is None else -(-int(self.value) // per_batch)

    def of(self, batches: int) -> int:
        """Batches of a share (``dur``) of a run of so many: at least 1, rounded up."""
        return max(1, math.ceil(self.value * batches))


def per_batch_of(unit: str, global_batch_size: int, max_seq_len: int) -> int | None:
    """How much of a unit a batch has; None of ``ep`` and ``dur``."""
    return {'ba': 1, 'sp': global_batch_size, 'tok': global_batch_size * max_seq_len}.get(unit)


def _either(words: tuple[str, ...]) -> str:
    return ' or '.join(filter(None, [', '.join(words[:-1]), words[-1]]))
