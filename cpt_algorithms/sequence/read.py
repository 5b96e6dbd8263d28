# SPDX-License-Identifier: Apache-2.0
"""A sequence and its runs from a command line: overrides, scales, sweeps and trials."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cpt_algorithms.files import read_yaml
from cpt_algorithms.launch.wandb_runs import sweep_of_agent
from cpt_algorithms.sequence.expand import Run, expand
from cpt_algorithms.sequence.scale import scale_file, scaled
from cpt_algorithms.sequence.spec import SequenceSpec
from cpt_algorithms.sequence.sweep import check_metric, expand_trials, sequence_of, trials_of
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import with_home

__all__ = ['load_yaml', 'read_sequence']


def load_yaml(words: Sequence[str]) -> dict[str, Any]:
    """A YAML with overrides; of a sequence that says ``scale``, at that size.

    Args:
        words: Its path, and ``key=value``, which apply after scaling. ``scale`` is the path of a scale file, or
            ``tiny`` for ``yamls/scales/tiny.yaml``, looked for in the folders above the YAML.

    Raises:
        ValueError: If a file cannot be read, there is no such scale, or it is not right.
    """
    path, *overrides = words
    scale = read_yaml(path, overrides, resolve=False).get('scale')

    def at_scale(given: dict[str, Any]) -> dict[str, Any]:
        given.pop('scale', None)
        return scaled(given, read_yaml(scale_file(with_home(str(scale)), Path(path)), resolve=False))

    whole = read_yaml(path, overrides, change=at_scale if scale else None)
    whole.pop('scale', None)
    return whole


def read_sequence(
    words: Sequence[str], sweep: str | None = None, trial: Sequence[str] = ()
) -> tuple[SequenceSpec, list[Run]]:
    """A sequence, and all its runs.

    Args:
        words: The path of the sequence YAML and ``key=value``; of a sweep, only the latter.
        sweep: A W&B sweep file, whose trials take the place of the arms. Default: ``None``.
        trial: ``STAGE.KEY=VALUE``, one trial instead of the arms. Default: none.

    Raises:
        ValueError: If the sequence, the sweep or a run is not right.
    """
    from cpt_algorithms.sequence.check import adopted  # seconds that load_yaml does not need

    trials, given = [list(trial)] if trial else [], None
    if sweep:
        try:
            # as wandb sweep reads it; OmegaConf would take ${env} for its own
            given = yaml.safe_load(Path(sweep).read_text(encoding='utf-8'))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f'{sweep} cannot be read: {error}') from None
        words, trials = [*sequence_of(given), *words], trials_of(given)
    if not words:
        raise ValueError('a sequence YAML is missing, or --sweep FILE')
    spec = SequenceSpec.from_yaml(load_yaml(words))
    runs = expand_trials(spec, trials) if trials else adopted(partial(expand, spec))
    if trials:
        check_metric((given or sweep_of_agent()).get('metric'), runs)
    return spec, [_cached_apart(run) for run in runs] if spec.jobs > 1 else runs


def _cached_apart(run: Run) -> Run:
    """A run with cache folders of its own: no two processes may use one at the same time."""

    def place(stream: dict[str, Any]) -> str:
        cache = stream.get('local') or 'cache/' + re.sub(r'\W+', '-', stream['remote'])
        return f'{cache}/{run.name}'

    return replace(run, stage=Stage.from_yaml(_with_caches(run.stage.to_train_yaml(), place)))


def _with_caches(section: Any, place: Callable[[dict[str, Any]], str]) -> Any:
    """A part of a YAML whose streams from elsewhere are all cached where ``place`` says."""
    if isinstance(section, list):
        return [_with_caches(value, place) for value in section]
    if not isinstance(section, dict):
        return section
    section = {key: _with_caches(value, place) for key, value in section.items()}
    return {**section, 'local': place(section)} if section.get('remote') else section
