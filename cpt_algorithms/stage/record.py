# SPDX-License-Identifier: Apache-2.0
"""``stage.json`` in a run's folder: written when the run starts, read by whoever wants to know what it was."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from cpt_algorithms.files import read_json
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError, Section, parse_section

__all__ = ['StageRecord', 'read_record']


class StageRecord(Section):
    """What a run was.

    ``parent`` is a checkpoint, or the name of a pretrained model (then ``pretrained_model`` is the same); null from
    scratch. ``config`` is the whole YAML. ``parent_files`` tells a parent that was trained again from the one before.
    """

    run_name: str
    config: Annotated[Stage, BeforeValidator(Stage.from_yaml)]
    parent: str | None = None
    pretrained_model: str | None = None
    versions: dict[str, str] = {}
    parent_files: dict[str, Any] | None = None
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
