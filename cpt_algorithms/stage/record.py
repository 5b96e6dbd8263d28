# SPDX-License-Identifier: Apache-2.0
"""``stage.json`` in a run's folder: written when the run starts, read by whoever wants to know what it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from cpt_algorithms.duration import Duration
from cpt_algorithms.files import read_json
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError, Section, parse_section

__all__ = ['StageRecord', 'done_with', 'has_reached', 'read_record']


class StageRecord(Section):
    """What a run was.

    ``parent`` is a checkpoint, or the name of a pretrained model (then ``pretrained_model`` is the same); null from
    scratch. ``config`` is the whole YAML. ``contents`` says what lay behind its paths: see
    :func:`~cpt_algorithms.stage.identity.contents_of`.
    """

    run_name: str
    config: Annotated[Stage, BeforeValidator(Stage.from_yaml)]
    parent: str | None = None
    pretrained_model: str | None = None
    versions: dict[str, str] = {}
    contents: dict[str, str] = {}
    wandb_id: str = ''


def read_record(folder: str | Path) -> StageRecord | None:
    """The record in a run's folder, local or in object storage; None if there is none.

    Args:
        folder: The run's ``save_folder``.

    Raises:
        ValueError: If it is not one.
    """
    given = read_json(f'{folder}/stage.json')
    try:
        return None if given is None else parse_section(StageRecord, given)
    except ConfigError as error:
        raise ValueError(f'{folder}/stage.json: {error.problems[0]}') from None


def has_reached(time: Mapping[str, int], max_duration: Duration) -> bool:
    """Whether a run that was trained so far, in each unit, is at its end."""
    return time.get(max_duration.unit, -1) >= max_duration.value


def done_with(stage: Stage, folder: str | Path | None = None) -> dict[str, Any] | None:
    """``done.json`` of a stage that was trained to its end, and exported; None of any other.

    It says to which ``max_duration`` the run was trained, so that one that was stopped early is done, and one that is
    extended is not.

    Args:
        stage: The stage.
        folder: Where it lies now. Default: its ``save_folder``.

    Raises:
        StorageError: If object storage cannot be reached.
    """
    done = read_json(f'{folder or stage.folder}/done.json')
    if done is None:
        return None
    is_done = done['max_duration'] == str(stage.max_duration) or has_reached(done['time'], stage.max_duration)
    return done if is_done else None
