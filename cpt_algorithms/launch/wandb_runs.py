# SPDX-License-Identifier: Apache-2.0
"""The run that ``wandb agent`` opened for a trial: filled in by the sequence, left alone by its training processes."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cpt_algorithms.launch.processes import OF_A_LAUNCHER

__all__ = ['environment_of_children', 'sweep_of_agent', 'trial_run']

log = logging.getLogger(__name__)

# What wandb.init takes for its own: the agent's run, sweep and parameters, and the service process of the sequence.
_OF_THE_TRIAL = ('WANDB_RUN_ID', 'WANDB_SWEEP_ID', 'WANDB_SWEEP_PARAM_PATH', 'WANDB_SERVICE')


def environment_of_children(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment in which each training process opens a W&B run of its own, and has no launcher but its own."""
    return {key: value for key, value in environ.items() if key not in (*_OF_THE_TRIAL, *OF_A_LAUNCHER)}


def sweep_of_agent() -> Mapping[str, Any]:
    """The sweep whose ``wandb agent`` started this process, as W&B knows it; nothing without one, or offline."""
    sweep = os.environ.get('WANDB_SWEEP_ID')
    if sweep is None or os.environ.get('WANDB_MODE', 'online') != 'online':
        return {}
    import wandb  # takes a second, and most sequences need none

    try:
        return wandb.Api(timeout=20).sweep(sweep).config
    except Exception as error:  # W&B and requests have many; a trial that was handed out is not lost for this
        log.warning('W&B does not say what the sweep %s compares trials by: %s', sweep, error)
        return {}


@contextmanager
def trial_run(config: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """Under ``wandb agent``: the trial's run, from now to the end of the block. Otherwise: nothing.

    It is opened before anything is trained, so that the sweep sees a trial that runs, and one that fails. The config is
    shown with it; the trial's parameters are there already.

    Yields:
        A mapping to fill in: the summary of the run, where W&B looks for the sweep's metric.
    """
    summary: dict[str, float] = {}
    if 'WANDB_SWEEP_ID' not in os.environ:
        yield summary
        return
    import wandb  # takes a second, and most sequences need none

    run = wandb.init(config=dict(config))
    code = 1
    try:
        yield summary
        code = 0
    except SystemExit as error:
        code = int(bool(error.code))
        raise
    finally:
        run.summary.update(summary)
        run.finish(exit_code=code)
