# SPDX-License-Identifier: Apache-2.0
"""A sequence YAML, read once into a typed object. What it says of stages is checked where it is written."""

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, create_model

from cpt_algorithms.duration import ABSOLUTE, Duration
from cpt_algorithms.files import is_remote
from cpt_algorithms.preparation.manifest import sampled_from
from cpt_algorithms.replay.mix import STREAM_KEYS, Stream
from cpt_algorithms.stage.stage import Loader, Model, Positive, Scheduler, Stage, read_model_file
from cpt_algorithms.validation import ConfigError, PathStr, Section, parse_section

__all__ = [
    'ANNEAL_KEYS',
    'FROM_SCRATCH',
    'MADE',
    'OF_THE_TRUNK',
    'Baseline',
    'Branch',
    'SequenceSpec',
    'StageSettings',
    'overlay',
]

# From scratch, as long as all stages, on the data of all; or on the last one's mixture; or on the last one's data, as
# long as that. Or later stages: at the learning rate that the first one ended with; re-warmed and not decayed; without
# replay; re-warmed on the first one's data.
Baseline = Literal['union', 'matched', 'from_scratch', 'constant_eta_min', 'constant_eta_max', 'no_replay', 'same_data']
FROM_SCRATCH = ('union', 'matched', 'from_scratch')
ANNEAL_KEYS = ('t_anneal', 'anneal', 'alpha_f')
MADE = ('merge', 'line', 'soup')
# Filled in for every run.
DERIVED = ('run_name', 'save_folder', 'load_path', 'load_weights_only', 'load_ignore_keys', 'autoresume', 'seed')
# What a branch has from its trunk, or from ANNEAL_KEYS.
OF_THE_TRUNK = (
    'scheduler', 'max_duration', 'optimizer_state', 'branches', 'global_train_batch_size', 'max_seq_len',
)  # fmt: skip


def overlay(base: Mapping[str, Any], over: Mapping[str, Any], null_removes: bool = False) -> dict[str, Any]:
    """Lay sections over others in depth; one that gives a ``name`` replaces the old one with its arguments.

    With ``null_removes``, ``key: null`` removes the key.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if value is None and null_removes:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and 'name' not in value and (isinstance(old, Mapping) or null_removes):
            merged[key] = overlay(old if isinstance(old, Mapping) else {}, value, null_removes)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _refuse(reason: str) -> Any:
    def refuse(value: Any) -> None:
        raise ValueError(f'KEY {reason}')

    return Annotated[Any, BeforeValidator(refuse)]


def _not_empty(value: Any) -> Any:
    if not value:
        raise ValueError('KEY is empty')
    return value


def _model(value: Any) -> Any:
    try:
        return read_model_file(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError('; '.join(error.problems)) from None


def _optional(name: str) -> Any:
    """The type of a key of :class:`Stage`, which a part of a stage need not say."""
    kind: Any = Stage.model_fields[name].annotation
    for each in Stage.model_fields[name].metadata:
        kind = Annotated[kind, each]
    return kind | None, None


AbsoluteTime = Annotated[Duration, BeforeValidator(lambda value: Duration.parse('KEY', value, ABSOLUTE))]
_set_here = _refuse('is set by the sequence for each run; leave it out')
_from_its_trunk = _refuse("of a branch is its trunk's; t_anneal, anneal and alpha_f say the rest")
_FIELDS: dict[str, Any] = {
    name: (_set_here, None) if name in DERIVED else _optional(name) for name in Stage.model_fields
}
_PartOfAStage: Any = create_model('_PartOfAStage', __base__=Section, **_FIELDS)


class Replay(Section):
    """The old data: ``weights`` of earlier datasets; ``consumed_only``, no more of them than stages have read."""

    model_config = ConfigDict(extra='forbid')

    fraction: float | str | list[Any] = 0
    order: str | None = None
    weights: dict[str, float | str | list[Any]] = {}
    consumed_only: bool = False


class BranchMerge(Section):
    """An average of the trunk's last checkpoints."""

    model_config = ConfigDict(extra='forbid')

    last: Annotated[int, Field(ge=2)] | None = None
    every: AbsoluteTime | None = None
    weights: str = 'uniform'


class _OfASequence(_PartOfAStage):
    model: Annotated[Model, BeforeValidator(_model)] = Model()
    train_loader: Loader = Loader()
    eval_loader: Loader = Loader()  # a template, for every dataset
    new: str | Annotated[list[str], Field(min_length=1)] | None = None
    replay: Replay = Replay()


_NOT_OF_A_BRANCH: dict[str, Any] = dict.fromkeys(OF_THE_TRUNK, (_from_its_trunk, None))
_PartOfABranch: Any = create_model('_PartOfABranch', __base__=_OfASequence, **_NOT_OF_A_BRANCH)


class Branch(_PartOfABranch):
    """A run that starts from a checkpoint of a stage: annealed over ``t_anneal``, or made of it without training.

    Attributes:
        t_anneal: See ``ANNEAL_KEYS``.
        anneal: See ``ANNEAL_KEYS``.
        alpha_f: See ``ANNEAL_KEYS``.
        merge: An average of the stage's last checkpoints.
        line: Points between what the stage began from (0) and its end (1).
        soup: Arms whose results are averaged with this one's, or ``seeds``.
    """

    t_anneal: AbsoluteTime | None = None
    anneal: str | None = None
    alpha_f: float | None = None
    merge: BranchMerge | None = None
    line: Annotated[list[float], Field(min_length=1)] | None = None
    soup: Literal['seeds'] | Annotated[list[str], Field(min_length=1)] | None = None

    @property
    def made(self) -> str | None:
        """Which of ``MADE`` it is, if it is not trained."""
        return next((kind for kind in MADE if getattr(self, kind) is not None), None)


class StageSettings(_OfASequence):
    """The settings of a stage in a sequence, in one place or merged: LLM Foundry's keys and a few more."""

    scheduler: Scheduler = Scheduler()
    max_duration: AbsoluteTime | None = None
    global_train_batch_size: Positive | None = None
    max_seq_len: Positive | None = None
    optimizer_state: Literal['reset', 'keep'] = 'reset'
    branches: dict[str, Branch | None] = {}

    @cached_property
    def batches(self) -> int:
        """Of the whole stage; needs its length, batch size and length of rows."""
        return self.batches_of(self.max_duration)

    def batches_of(self, time: Duration | None) -> int:
        """Whole batches that a time takes."""
        assert time and self.global_train_batch_size and self.max_seq_len, 'SequenceSpec has looked'
        batches = time.batches(self.global_train_batch_size, self.max_seq_len)
        assert batches is not None, 'not in epochs'
        return batches


class Arm(Section):
    """Overrides of ``common`` and ``stages``: by stage, or for all."""

    __pydantic_extra__: dict[str, StageSettings | None] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    baseline: Baseline | None = None
    common: StageSettings = StageSettings()


class Dataset(Stream):
    """A dataset.

    Attributes:
        stand_in_for: In place of which data, that is not known, it stands.
        passes: How often the run that this is a pilot of reads it in the stage that learns it. The plan warns where
            this one does otherwise.
    """

    stand_in_for: str | None = None
    passes: Positive | Annotated[float, Field(gt=0)] | None = None
    split: _set_here = None  # pyright: ignore[reportInvalidTypeForm]

    @property
    def stands_in_for(self) -> str | None:
        """``stand_in_for``; of what a model wrote, by itself what that was trained on."""
        sampled = sampled_from([self.local, self.remote], 'train')
        return self.stand_in_for or (sampled.stands_in_for if sampled and sampled.is_whole else None)

    @property
    def stream(self) -> dict[str, Any]:
        """As a loader has it."""
        return {key: value for key, value in self.given.items() if key in STREAM_KEYS}


def _local_folder(folder: str) -> str:
    if is_remote(folder):
        raise ValueError('must be a local folder, of plan, logs and runs; only data may lie in object storage')
    if '{' in folder:
        raise ValueError('must be a path without braces')
    return folder


def _each_once(seeds: list[int]) -> list[int]:
    if len({*seeds}) < len(seeds):
        raise ValueError('a seed is there twice')
    return seeds


def _stage_names(stages: dict[str, Any]) -> dict[str, Any]:
    if taken := [name for name in ('common', 'baseline', *FROM_SCRATCH) if name in stages]:
        raise ValueError(f'KEY.{taken[0]}: a stage cannot have this name, which means something else in arms')
    return stages


class SequenceSpec(Section):
    """A sequence: stages x arms x seeds.

    * ``data``: ``{name: stream}``, the datasets. If the model is a pretrained one, stand-ins are what it has read.
    * ``common``: LLM Foundry's keys of all stages.
    * ``stages``: in order, ``{name: LLM Foundry's keys + new, replay, optimizer_state, branches}``.
    * ``arms``: ``{arm: {stage or common: overrides}}``, or ``{baseline: NAME}`` with overrides.
    * ``lm_eval``: the suite that every run ends with.
    """

    model_config = ConfigDict(extra='forbid')

    name: Annotated[str, AfterValidator(_not_empty)]
    folder: Annotated[PathStr, AfterValidator(_local_folder)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], AfterValidator(_each_once)] = [17]
    jobs: Positive = 1
    nodes: Positive = 1
    nproc: Positive = 1
    slurm: dict[str, Any] | None = None
    data: Annotated[dict[str, Dataset], AfterValidator(_not_empty)]
    common: StageSettings = StageSettings()
    stages: Annotated[dict[str, StageSettings | None], AfterValidator(_not_empty), AfterValidator(_stage_names)]
    arms: dict[str, Arm | None] = {}
    variables: dict[str, Any] = {}
    lm_eval: str | list[str] | None = None

    @classmethod
    def from_yaml(cls, given: Mapping[str, Any]) -> 'SequenceSpec':
        """Read a sequence YAML that is a mapping already.

        Args:
            given: The YAML, interpolations resolved.

        Raises:
            ConfigError: With everything that is wrong.
        """
        spec = parse_section(cls, given)
        missing = [
            f'stages.{name}.{key} is missing (or common.{key} for all stages)'
            for name, stage in spec.merged.items()
            for key in ('max_duration', 'global_train_batch_size', 'max_seq_len')
            if stage.get(key) is None
        ]
        if missing:
            raise ConfigError(missing)
        return spec

    def with_arms(self, arms: Mapping[str, Any] | None) -> 'SequenceSpec':
        """The same with other arms."""
        return self.from_yaml({**self.given, 'arms': arms})

    @property
    def merged(self) -> dict[str, dict[str, Any]]:
        """Each stage's YAML with ``common``."""
        return {
            name: overlay({'new': name, **self.common.given}, stage.given if stage else {})
            for name, stage in self.stages.items()
        }

    @cached_property
    def stage_tokens(self) -> dict[str, int]:
        """The token budget of each stage, as ``stages`` and ``common`` say."""
        budgets = {}
        for name, given in self.merged.items():
            stage = parse_section(StageSettings, given, f'stages.{name}')
            budgets[name] = stage.batches * given['global_train_batch_size'] * given['max_seq_len']
        return budgets
