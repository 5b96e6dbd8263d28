# SPDX-License-Identifier: Apache-2.0
"""The one table of phases: which phases the scheduler of a YAML has in a run, and how they are printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpt_algorithms.schedulers.functional import Schedule, Span, multiplier
from cpt_algorithms.validation import nearest

if TYPE_CHECKING:
    from composer.optim import ComposerScheduler

    from cpt_algorithms.duration import Duration

__all__ = ['Phases', 'build', 'format_spans', 'phases_of']


@dataclass(frozen=True)
class Phases:
    """The schedule of one run; its times and the end of the run are in tok, ba or sp."""

    schedule: Schedule
    unit: str
    end: float

    @property
    def spans(self) -> tuple[Span, ...]:
        """The phases that take time, to the end of the run."""
        return tuple(self.schedule.spans(self.end))

    def multiplier_at(self, time: float) -> float:
        """The factor on the optimizer's learning rate at a time in ``unit``."""
        return multiplier(self.schedule, time)

    def __str__(self) -> str:
        return format_spans(self.spans, self.unit)


def build(section: Mapping[str, Any]) -> 'ComposerScheduler':
    """The scheduler of a train YAML, ours or a stock one.

    Raises:
        ValueError: If the name or an argument is missing, unknown or wrong.
    """
    # seconds that --help does not need
    from llmfoundry import registry
    from llmfoundry.utils.builders import build_scheduler

    arguments = dict(section)
    name = arguments.pop('name', None)
    if name is None:
        raise ValueError('scheduler.name is missing')
    if name not in (known := registry.schedulers.get_all()):
        raise ValueError(f'scheduler.name={name!r} is not registered; {nearest(name, known)}')
    try:
        return build_scheduler(name, arguments)
    except TypeError as error:
        raise ValueError(f'scheduler.name={name!r}: {error}') from None


def phases_of(
    section: Mapping[str, Any], max_duration: 'str | Duration', dataloader_len: int | None = None
) -> Phases | None:
    """The phases of a run; None if the scheduler is none of ours, or the run is in epochs of unknown length.

    Raises:
        ValueError: If the scheduler cannot be built, or its phases do not fit into the run.
    """
    scheduler: Any = build(section)
    in_unknown_epochs = dataloader_len is None and str(max_duration).endswith('ep')
    if not hasattr(scheduler, 'phases') or in_unknown_epochs:
        return None
    return scheduler.phases(max_duration, dataloader_len)


def format_spans(spans: Sequence[Span], unit: str, lr: float = 1.0, per_batch: float | None = None) -> str:
    """Phases as a table of text, one line for each, and in batches of ``per_batch`` of the unit."""
    table = {
        'phase': [span.name for span in spans],
        f'from [{unit}]': [f'{span.begin:,.10g}' for span in spans],
        f'to [{unit}]': [f'{span.until:,.10g}' for span in spans],
        'batches': [f'{(span.until - span.begin) / per_batch:,.10g}' for span in spans] if per_batch else None,
        'start': [f'{span.start * lr:.4g}' for span in spans],
        'end': [f'{span.end * lr:.4g}' for span in spans],
        'shape': [span.shape for span in spans],
    }
    columns = [[head, *cells] for head, cells in table.items() if cells is not None]
    for column in columns[:-1]:
        width = max(map(len, column))
        column[:] = [cell.ljust(width) if column is columns[0] else cell.rjust(width) for cell in column]
    return '\n'.join('  ' + '  '.join(row) for row in zip(*columns, strict=True))
