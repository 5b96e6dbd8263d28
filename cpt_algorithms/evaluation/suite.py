# SPDX-License-Identifier: Apache-2.0
"""Suites of lm-eval tasks, as YAMLs under ``yamls/eval`` say them. Imports lm-eval only to look up a task's name."""

import glob
import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from cpt_algorithms.files import null_as_nan, read_json, read_yaml
from cpt_algorithms.validation import ConfigError, Section, nearest, parse_section

__all__ = [
    'Suite',
    'SuiteTask',
    'check_suite',
    'load_suite',
    'load_tasks',
    'read_result',
    'task_manager',
    'why_unavailable',
]

_FILE_BUILDERS = ('json', 'csv', 'parquet', 'text', 'arrow')


class SuiteTask(Section):
    """A task of a suite."""

    model_config = ConfigDict(extra='forbid')

    task: str | dict[str, Any]  # a name that lm-eval knows, or the config of a task, which has its own name as task
    num_fewshot: int = Field(ge=0)
    metric: str  # a mean over items that the task has; <metric>,<filter> if it filters answers in several ways

    @field_validator('task')
    @classmethod
    def _check_task(cls, task: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(task, dict) and not isinstance(task.get('task'), str):
            raise ValueError('the config of a task has its own name as task')
        return task

    @property
    def name(self) -> str:
        """Its name in lm-eval."""
        return self.task if isinstance(self.task, str) else self.task['task']

    @property
    def data_files(self) -> list[str]:
        """Local files, folders and globs that it reads, as its config names them, if it has one of its own."""
        if isinstance(self.task, str):
            return []
        path, kwargs = str(self.task.get('dataset_path') or ''), self.task.get('dataset_kwargs') or {}
        given, is_of_files = kwargs.get('data_files') or [], path in ('', *_FILE_BUILDERS)
        places = [str(kwargs.get('data_dir') or ''), *([] if is_of_files else [path])]
        folders = [each for each in places if re.match(r'/|\.\.?/|~', each) or each and Path(each).is_dir()]
        groups = given.values() if isinstance(given, Mapping) else [given]
        files = [file for group in groups for file in ([group] if isinstance(group, str) else group)]
        # in a folder, datasets looks for them there
        return folders or [file for file in files if is_of_files and '://' not in file]

    @staticmethod
    def is_there(name: str) -> bool:
        """Whether one of ``data_files`` is there: a file, what a pattern matches, or a folder that holds something."""
        path = Path(name).expanduser()
        return any(path.iterdir()) if path.is_dir() else bool(glob.glob(str(path), recursive=True))


class Suite(Section):
    """Tasks that models are compared on."""

    model_config = ConfigDict(extra='forbid')

    name: str  # of the folder that results go to
    variables: dict[str, Any] = {}  # what ${variables.x} stands for
    tasks: dict[str, SuiteTask]  # by the name that tables show
    missing: dict[str, str] = {}  # tasks that the suite wants and lm-eval does not have, each with the reason

    @field_validator('name')
    @classmethod
    def _check_name(cls, name: str) -> str:
        if '/' in name:
            raise ValueError('it names a folder and cannot have a slash')
        return name

    @field_validator('missing')
    @classmethod
    def _check_missing(cls, missing: dict[str, str], others: ValidationInfo) -> dict[str, str]:
        if both := [name for name in missing if name in others.data.get('tasks', {})]:
            raise ValueError(f'KEY.{both[0]} is in tasks, too')
        return missing


def load_suite(given: str | Path | Sequence[str]) -> Suite:
    """Read a suite.

    Args:
        given: The path of its YAML, or a list of the path and ``key=value`` overrides with dotted keys.

    Raises:
        ValueError: If it cannot be read or is no suite, with all problems.
    """
    path, *overrides = [given] if isinstance(given, str | Path) else given
    try:
        return parse_section(Suite, read_yaml(path, list(map(str, overrides))))
    except ConfigError as error:
        raise ValueError(f'{path}: {"; ".join(error.problems)}') from None


def digest_of(given: str | Path | Sequence[str]) -> str:
    """A hash of what a suite asks, which may change under one name.

    Raises:
        ValueError: As :func:`load_suite` does.
    """
    return hashlib.sha256(load_suite(given).model_dump_json().encode()).hexdigest()[:32]


def read_result(path: Path) -> Any:
    """The file of a model's results, scores that were no numbers being so again; None if there is none."""
    result = read_json(path)
    for task in result['tasks'].values() if result else ():
        task |= {key: null_as_nan(task[key]) for key in ('score', 'stderr', 'values') if key in task}
    return result


def check_suite(suite: Suite) -> list[str]:
    """A line for each task of a suite that cannot be run here, as far as that shows without a model.

    Cost: 7 s the first time, if a task is named that lm-eval is to know.
    """
    reasons = {name: why_unavailable(entry) for name, entry in suite.tasks.items()}
    return [f'tasks.{name}: {reason}' for name, reason in reasons.items() if reason]


def why_unavailable(entry: SuiteTask) -> str | None:
    """Why a task cannot be run here, as far as that shows without its data; None if it can."""
    if isinstance(entry.task, str) and entry.task not in (known := task_manager(True).all_tasks):
        return f'lm-eval {version("lm_eval")} has no task {entry.task!r}; {nearest(entry.task, known)}'
    missing = [name for name in entry.data_files if not entry.is_there(name)]
    return f'{missing[0]} does not exist; prepare the data first (scripts/prepare_data.py)' if missing else None


@cache
def task_manager(with_known_tasks: bool) -> Any:
    """lm-eval's own; it reads its 14,000 configs in 7 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_known_tasks)


def load_tasks(entry: SuiteTask) -> Any:
    """The tasks of an entry, with their data.

    As ``lm_eval.simple_evaluate``, which leaves shots of tasks that say 0, and describes the machine for seconds.
    """
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle choices when they are loaded
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    task: Any = entry.task
    if isinstance(task, dict) and entry.data_files:
        # datasets knows files by path and time, and would give the rows of others that had these
        task = {**task, 'dataset_kwargs': {**(task.get('dataset_kwargs') or {}), 'download_mode': 'force_redownload'}}
    loaded = task_manager(isinstance(task, str)).load([task])
    for task in loaded['tasks'].values():
        task.set_config('num_fewshot', entry.num_fewshot)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded
