# SPDX-License-Identifier: Apache-2.0
"""One stage: an LLM Foundry train YAML, read once into a typed object that every later part receives.

What is not ours to read stays as it is (``given``), and :meth:`Stage.to_train_yaml` hands the whole to LLM Foundry. No
torch and no Composer in here.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cpt_algorithms.checkpoints.save_folder import batch_of, checkpoint_name, latest_link
from cpt_algorithms.duration import ABSOLUTE, UNITS, Duration, per_batch_of
from cpt_algorithms.files import read_json, read_yaml
from cpt_algorithms.preparation.manifest import sampled_from
from cpt_algorithms.replay.mix import DOWNLOAD_RETRY, STREAM_KEYS, Mix, Stream, read_mix
from cpt_algorithms.validation import ConfigError, PathStr, Section, fits_on_a_disk, parse_section, short_repr

__all__ = ['KEEP_OPTIMIZER_IGNORE_KEYS', 'Callbacks', 'Dataset', 'Loader', 'Merge', 'Model', 'Stage', 'read_model_file']

# What a stage that keeps its parent's optimizer must not load. Exact keys: with a star, a sharded load takes
# `state/schedulers*` out of the *live* scheduler, whose learning rate then never changes again.
KEEP_OPTIMIZER_IGNORE_KEYS = [
    'state/schedulers',
    'state/timestamp',
    'state/dataset_state',
    'state/callbacks',
    'state/algorithms',
    'rng',
]


def _time(units: tuple[str, ...]) -> Any:
    def parse(value: Any) -> Duration:
        if isinstance(value, int) and not isinstance(value, bool) and 'ep' in units:
            value = f'{value}ep'  # Composer's meaning of a number
        return Duration.parse('KEY', value, units)

    return BeforeValidator(parse)


def _more_than_none(time: Duration) -> Duration:
    if not time.value:
        raise ValueError('must be more than nothing')
    return time


def _keeps_some(kept: int) -> int:
    if kept == 0:
        raise ValueError('keeps no checkpoint that a restart could go on from; use 1 or more, or -1 for all')
    return kept


MaxDuration = Annotated[Duration, _time((*ABSOLUTE, 'ep'))]
Interval = Annotated[Duration, _time(UNITS)]
SaveInterval = Annotated[Interval, AfterValidator(_more_than_none)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[int, Field(ge=-1)]
OneOrSeveral = BeforeValidator(lambda given: [given] if isinstance(given, Mapping) else given)
LowerCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)


class ConfigOverrides(Section):
    """Of a Hugging Face model's configuration."""

    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None


class Model(Section):
    """The model, as LLM Foundry builds it."""

    name: str = ''
    init_device: Literal['cpu', 'meta', 'mixed'] | None = None
    pretrained: bool = True
    pretrained_model_name_or_path: str | None = None
    config_overrides: ConfigOverrides = ConfigOverrides()
    master_weights_dtype: str | None = None
    loss_fn: str | None = None
    # without any of these, LLM Foundry silently makes a default model
    d_model: Positive | None = None
    n_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    vocab_size: Positive | None = None
    max_seq_len: Positive | None = None
    expansion_ratio: Annotated[float, Field(gt=0)] | None = None

    @property
    def pretrained_model(self) -> str | None:
        """The Hugging Face model whose weights these are, unless a checkpoint is loaded: a folder or a name."""
        is_pretrained = self.name == 'hf_causal_lm' and self.pretrained
        return self.pretrained_model_name_or_path if is_pretrained else None


class TokenizerKwargs(Section):
    """Arguments of the tokenizer."""

    model_max_length: Positive | None = None


class Tokenizer(Section):
    """The tokenizer: a folder, or a name on the hub."""

    name: str = ''
    kwargs: TokenizerKwargs = TokenizerKwargs()


class Optimizer(Section):
    """The optimizer; ``weight_decay`` of a decoupled one is a share of the weights, times the rate's own multiplier."""

    name: str = ''
    lr: Annotated[float, Field(gt=0)] | None = None
    betas: list[float] | None = None
    eps: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0, lt=1)] | None = None


class Scheduler(Section):
    """The schedule of the learning rate."""

    name: str = ''


class Dataset(Section):
    """The data of a loader: ``new`` and ``replay`` of ``replay_text``; one stream or several of ``text``."""

    max_seq_len: Positive | None = None
    local: PathStr | None = None
    remote: PathStr | None = None
    split: str | None = None
    streams: dict[str, dict[str, Any]] = {}
    new: dict[str, Any] = {}
    replay: dict[str, Any] = {}
    max_passes: float | str = 1
    resume_after: PathStr | None = None


class Loader(Section):
    """A train or evaluation loader."""

    name: str = ''
    label: str | None = None
    dataset: Dataset = Dataset()

    @cached_property
    def mix(self) -> Mix | None:
        """The data of ``replay_text``; None of another loader.

        Raises:
            ValueError: If it is not right.
        """
        dataset = self.dataset
        return read_mix(dataset.new, dataset.replay, dataset.resume_after) if self.name == 'replay_text' else None

    def streams(self, where: str) -> dict[str, Stream]:
        """Every stream that is read, by its key below the loader's; none of a loader that reads otherwise.

        Args:
            where: The loader's key, for errors.

        Raises:
            ValueError: If one is not right.
        """
        if self.mix is not None:
            new = {f'dataset.new.{name}': stream for name, stream in self.mix.new.items()}
            return {**new, **{f'dataset.replay.streams.{name}': stream for name, stream in self.mix.old.items()}}
        given: dict[str, Any] = {f'dataset.streams.{name}': each for name, each in self.dataset.streams.items()}
        if not given and (self.dataset.remote or self.dataset.local or self.name == 'text'):
            given = {'dataset': self.dataset.given}
        return {
            key: parse_section(Stream, {name: each[name] for name in STREAM_KEYS if name in each}, f'{where}.{key}')
            for key, each in given.items()
        }


class FSDP(Section):
    """How the model is sharded."""

    state_dict_type: str | None = None
    sharding_strategy: str = 'FULL_SHARD'
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    mixed_precision: Any = None
    data_parallel_shard_degree: int = -1
    data_parallel_replicate_degree: int | None = None


class StageStartArguments(Section):
    """How the stage begins."""

    optimizer_state: str = 'reset'
    trust_checkpoint: bool = False
    model_changes: list[str] = []


class ForgettingArguments(Section):
    """Labels of what was learned before, and now; of a branch, the file with the losses of its stage's parent."""

    old: list[str] = []
    new: list[str] = []
    parent_losses: PathStr | None = None


class EMAArguments(Section):
    """One or several half-lives."""

    half_life: list[str] | str = []

    @property
    def half_lives(self) -> list[Duration]:
        """One for each average that is kept."""
        given = [self.half_life] if isinstance(self.half_life, str) else self.half_life
        return [Duration.parse('callbacks.ema.half_life', time) for time in given]


class LAWAArguments(Section):
    """The window."""

    k: int = 5
    offload: bool = True


class HuggingFaceCheckpointer(Section):
    """When and how the model is exported."""

    save_folder: str | None = None
    save_interval: SaveInterval = Duration(1, 'dur')
    precision: str = 'float32'


class BranchPointArguments(Section):
    """Batches whose checkpoints stay."""

    at: list[int] = []


class Callbacks(Section):
    """The callbacks that are looked into, among others; ``name: null`` is one without arguments."""

    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]
    stage_start: StageStartArguments | None = None
    final_loss: Section | None = None
    forgetting: ForgettingArguments | None = None
    ema: EMAArguments | None = None
    lawa: LAWAArguments | None = None
    hf_checkpointer: HuggingFaceCheckpointer = HuggingFaceCheckpointer()
    branch_points: BranchPointArguments | None = None

    @property
    def masks_documents(self) -> bool:
        """Whether documents of a row do not see each other."""
        return 'mask_documents' in self.given

    @property
    def averages(self) -> list[str]:
        """Names of the averages of the weights."""
        names = [f'ema_{time}' for time in self.ema.half_lives] if self.ema is not None else []
        return [*names, *(['lawa'] if self.lawa is not None else [])]

    @classmethod
    def without_null(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """A callback without arguments is there."""
        return {name: {} if arguments is None else arguments for name, arguments in given.items()}


class Merge(Section):
    """What a run is in place of training: a window, a line or a soup.

    Attributes:
        of: The folder of the run that it is a branch of.
        batch: The last batch of that.
        last: How many of its last checkpoints are averaged.
        every: How far apart those are.
        weights: Of the window.
        line: Points between ``parent`` (0) and the end of ``of`` (1), each a model; the best is the run's.
        parent: What ``of`` began from, a checkpoint or a pretrained model.
        soup: Checkpoints of other runs, averaged with the last one of ``of``.
    """

    of: PathStr
    batch: int
    last: Annotated[int, Field(ge=2)] | None = None
    every: Interval | None = None
    weights: str = 'uniform'
    line: Annotated[list[float], Field(min_length=1)] | None = None
    parent: PathStr | None = None
    soup: Annotated[list[PathStr], Field(min_length=1)] | None = None

    @model_validator(mode='after')
    def _check_kind(self) -> 'Merge':
        needed = {'last': self.every, 'line': self.parent, 'soup': self.of}
        given = [name for name in needed if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f'KEY has {" and ".join(given) or "none"} of last, line and soup; one of them is needed')
        if needed[given[0]] is None:
            raise ValueError(f'KEY.{given[0]} needs {"every" if given == ["last"] else "parent"}')
        return self

    @property
    def described(self) -> str:
        """In words, for people."""
        if self.line is not None:
            return f'line from the parent, {len(self.line)} points'
        if self.soup is not None:
            return f'average of {len(self.soup) + 1} runs'
        return f'average of {self.last} checkpoints, {self.every} apart'


class Variables(Section):
    """The section that LLM Foundry leaves to the YAML's author."""

    lm_eval: str | list[str] | None = None
    merge: Merge | None = None


class Stage(Section):
    """A train YAML. Attributes are the keys that we read, under LLM Foundry's names; methods derive the rest."""

    model: Model
    tokenizer: Tokenizer
    optimizer: Optimizer
    scheduler: Scheduler
    train_loader: Loader
    max_duration: MaxDuration
    max_seq_len: Positive
    global_train_batch_size: Positive
    run_name: str = ''
    save_folder: Annotated[str, AfterValidator(fits_on_a_disk)] = ''
    save_interval: SaveInterval = Duration(1000, 'ba')
    save_num_checkpoints_to_keep: Annotated[int, Field(ge=-1), AfterValidator(_keeps_some)] = -1
    save_overwrite: bool = False
    save_weights_only: bool = False
    load_path: PathStr | None = None
    load_weights_only: bool = False
    load_ignore_keys: list[str] = []
    autoresume: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    precision: Annotated[Literal['fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8'], LowerCase] = 'amp_bf16'
    python_log_level: Annotated[Literal['debug', 'info', 'warning', 'error', 'critical'], LowerCase] = 'debug'
    console_log_interval: Annotated[Duration, _time(('ba', 'ep'))] = Duration(1, 'ba')
    # Composer cannot split a batch of text into parts of 2.5 rows
    device_train_microbatch_size: Positive | Literal['auto'] = 'auto'
    device_eval_batch_size: Positive | None = None
    train_subset_num_batches: Share = -1
    eval_loader: Annotated[list[Loader], OneOrSeveral] = []
    eval_interval: Interval = Duration(1, 'ep')
    eval_first: bool = False
    eval_subset_num_batches: Share = -1
    callbacks: Callbacks = Callbacks()
    algorithms: dict[str, dict[str, Any] | None] = {}
    loggers: dict[str, dict[str, Any] | None] = {}
    fsdp_config: FSDP | None = None
    tp_config: dict[str, Any] | None = None
    dist_timeout: Annotated[float, Field(ge=1)] = 600.0
    code_paths: list[PathStr] = []
    variables: Variables = Variables()

    @classmethod
    def read(cls, path: str, overrides: Sequence[str] = ()) -> 'Stage':
        """Read a YAML.

        Args:
            path: An LLM Foundry train YAML.
            overrides: ``key=value``, applied before anything is read.

        Raises:
            ValueError: If it cannot be read, or is not right, naming everything that is wrong.
        """
        return cls.from_yaml(read_yaml(path, overrides))

    @classmethod
    def from_yaml(cls, given: Mapping[str, Any]) -> 'Stage':
        """Read a train YAML that is a mapping already, and fill in what follows from the rest of it.

        * ``model: FILE.yaml``: its content, such as ``yamls/models/gpt_neox_405m.yaml``.
        * ``autoresume: true``: llm-foundry says it turns it on, and does not.
        * ``load_weights_only`` and ``load_ignore_keys`` as ``callbacks.stage_start.optimizer_state`` needs them.
        * ``save_folder`` of ``callbacks.final_loss``, ``forgetting`` and ``hf_checkpointer`` (export at the end).
        * ``eval_first: true`` for ``callbacks.forgetting``, which wants the parent's losses.
        * ``model.pretrained: false`` with ``load_path``: the checkpoint's weights would replace those that were read.
        * ``model.trust_remote_code: false`` for ``hf_causal_lm``: llm-foundry runs code that a model brings along.
        * ``stream_name: resilient`` for evaluators that read one remote stream.
        * Times of a replay fraction or weight that changes in ``sp``, which the loader wants.
        * ``stand_in_for`` of old data that ``prepare_data.py`` has sampled from a model.

        Args:
            given: The YAML, interpolations resolved. It stays as it is.

        Raises:
            ConfigError: With everything that is wrong.
        """
        if isinstance(given, Mapping) and isinstance(given.get('model'), str):
            given = {**given, 'model': read_model_file(given['model'])}
        return parse_section(cls, _filled_in(given, parse_section(cls, given)))

    def to_train_yaml(self) -> dict[str, Any]:
        """The YAML for LLM Foundry: as it was given, with the defaults that were filled in."""
        return copy.deepcopy(dict(self.given))

    def but(self, **changes: Any) -> 'Stage':
        """Another stage that differs from this one.

        Args:
            **changes: Top-level keys of the YAML.
        """
        return Stage.from_yaml({**self.to_train_yaml(), **changes})

    @cached_property
    def batches(self) -> int | None:
        """Batches of the whole stage; None if it is given in epochs, whose length only the data knows."""
        return self.max_duration.batches(self.global_train_batch_size, self.max_seq_len)

    @property
    def tokens_per_batch(self) -> int:
        """Of all ranks, if rows are packed."""
        return self.global_train_batch_size * self.max_seq_len

    def batches_of(self, key: str, time: Duration) -> int:
        """Whole batches that a time of this stage takes.

        Args:
            key: What it is called in an error.
            time: Not in epochs; of ``dur``, a share of the stage.

        Raises:
            ValueError: If only the data knows.
        """
        whole = self.batches if time.unit == 'dur' else time.batches(self.global_train_batch_size, self.max_seq_len)
        if whole is None:
            raise ValueError(
                f'{key}={self.max_duration if time.unit == "dur" else time} is in epochs, whose length only the data '
                'knows; write it in tok, ba or sp'
            )
        return time.of(whole) if time.unit == 'dur' else whole

    @property
    def mix(self) -> Mix | None:
        """The data of the train loader, of ``replay_text``; None of another loader."""
        return self.train_loader.mix

    def tokens_by_stream(self, batches: int | None = None) -> dict[str, int]:
        """Tokens that the stage takes from each stream, the new data first; of another loader all under ``data``.

        Args:
            batches: Of only so many first batches. Default: all.

        Raises:
            ValueError: If the stage is given in epochs.
        """
        batches = self.batches_of('max_duration', self.max_duration) if batches is None else batches
        samples = batches * self.global_train_batch_size
        counts = {'data': samples} if self.mix is None else self.mix.counts(samples)
        return {name: count * self.max_seq_len for name, count in counts.items()}

    def passes(self) -> dict[str, float]:
        """How often the stage reads what is there of each stream, where that lies on this machine and can be read.

        Cost: reads the indexes.
        """
        if self.mix is None or self.batches is None:
            return {}
        groups = {self.mix.name: list(self.mix.new.values()), **{name: [each] for name, each in self.mix.old.items()}}
        found = {}
        for name, tokens in self.tokens_by_stream().items():
            indexes = [Path(each.local, each.split or '', 'index.json') for each in groups[name] if each.local]
            with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):  # preflight speaks of those
                shards = [shard for index in indexes for shard in (read_json(index) or {})['shards']]
                there = sum(shard['samples'] for shard in shards) * self.max_seq_len
                if tokens and there and len(indexes) == len(groups[name]):
                    found[name] = tokens / there
        return found

    def tokens_until(self, batch: int) -> dict[str, int]:
        """The same of its first batches, of which there are no more than it has."""
        return self.tokens_by_stream(batch if self.batches is None else min(batch, self.batches))

    @property
    def folder(self) -> str:
        """``save_folder``, with the run's name in it.

        Raises:
            ValueError: If anything else stands in braces.
        """
        try:
            return self.save_folder.format(run_name=self.run_name)
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(
                f'save_folder={short_repr(self.save_folder)}: only {{run_name}} can stand in braces'
            ) from None

    @property
    def pretrained_model(self) -> str | None:
        """The pretrained Hugging Face model that the stage starts from, a folder or a name; None if from others."""
        return None if self.load_path else self.model.pretrained_model

    @property
    def parent(self) -> str | None:
        """The checkpoint or the pretrained model that the stage starts from; None from scratch."""
        return self.load_path or self.pretrained_model

    @property
    def judged_by(self) -> dict[str, Any]:
        """How much of its evaluation data it is judged on, and by which final loss: others are not compared with it."""
        final = self.callbacks.final_loss.given if self.callbacks.final_loss else {}
        how = {key: value for key, value in final.items() if key != 'save_folder'}
        judged: dict[str, Any] = {'eval_subset_num_batches': self.eval_subset_num_batches, 'final_loss': how}
        if self.callbacks.masks_documents:  # first tokens of documents are no labels then
            judged['mask_documents'] = dict(self.given['callbacks']['mask_documents'] or {})
        return judged

    @property
    def begins(self) -> tuple[str, int | None] | None:
        """The run's folder that it begins from, and the batch there, None if its name does not say; None of none."""
        if self.merge:
            return self.merge.of, self.merge.batch
        place = (self.load_path or '').rstrip('/')
        return (place.rpartition('/')[0] or '.', batch_of(place)) if place else None

    @property
    def is_branch(self) -> bool:
        """Whether it goes on in the data of what it begins from: both are one stage."""
        return self.merge is not None or self.train_loader.dataset.resume_after is not None

    @property
    def keeps_optimizer_state(self) -> bool:
        """Whether it goes on with its parent's."""
        return self.callbacks.stage_start is not None and self.callbacks.stage_start.optimizer_state == 'keep'

    @property
    def is_sharded(self) -> bool:
        """Whether its checkpoints are folders with a file of each rank."""
        return self.fsdp_config is not None and self.fsdp_config.state_dict_type == 'sharded'

    @property
    def loaders(self) -> list[tuple[str, Loader]]:
        """The train loader and every evaluation loader, each with its key."""
        return [
            ('train_loader', self.train_loader),
            *((f'eval_loader[{index}]', loader) for index, loader in enumerate(self.eval_loader)),
        ]

    @property
    def suite(self) -> str | list[str] | None:
        """The lm-eval suite that the stage ends with."""
        return self.variables.lm_eval

    @property
    def merge(self) -> Merge | None:
        """What the run is, if it is not trained."""
        return self.variables.merge

    @property
    def merged(self) -> list[str]:
        """The checkpoints that a merge is made of, the newest, its trunk's, last."""
        if self.merge is None:
            return []
        trunk = self.load_path or f'{self.merge.of}/{latest_link(self.is_sharded)}'
        if self.merge.line is not None:
            return [str(self.merge.parent), trunk]
        if self.merge.soup is not None:
            return [*self.merge.soup, trunk]
        assert self.merge.last and self.merge.every, 'Merge has looked'
        step = self.batches_of('every', self.merge.every)
        batches = [self.merge.batch - number * step for number in reversed(range(self.merge.last))]
        return [f'{self.merge.of}/{checkpoint_name(batch, self.is_sharded)}' for batch in batches]


def read_model_file(path: str) -> dict[str, Any]:
    """The content of ``model: FILE.yaml``.

    Raises:
        ConfigError: If it cannot be read, or is not right.
    """
    try:
        model = read_yaml(path)
    except ValueError as error:
        raise ConfigError([f'model={short_repr(path)}: {error}']) from None
    parse_section(Model, model, path)
    return model


def _filled_in(given: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """See :meth:`Stage.from_yaml`; ``stage`` is what the YAML says, read."""
    filled: dict[str, Any] = {'autoresume': True, **given, 'callbacks': {**(given.get('callbacks') or {})}}
    filled.setdefault('device_train_microbatch_size', 'auto')  # LLM Foundry's default, which it does not fill in
    if stage.eval_loader:
        loaders = [_resilient(loader) for loader in stage.eval_loader]
        is_unnamed = len(loaders) == 1 and not stage.eval_loader[0].label  # which is no list to LLM Foundry
        filled['eval_loader'] = loaders[0] if is_unnamed else loaders
    if stage.load_path and stage.callbacks.stage_start is not None:
        filled.setdefault('load_weights_only', not stage.keeps_optimizer_state)
        if stage.keeps_optimizer_state:
            filled.setdefault('load_ignore_keys', list(KEEP_OPTIMIZER_IGNORE_KEYS))
    if stage.model.name == 'hf_causal_lm':
        trained = {'pretrained': False} if stage.load_path else {}
        filled['model'] = {'trust_remote_code': False, **given['model'], **trained}
    callbacks, folder = filled['callbacks'], given.get('save_folder')
    for name in ('final_loss', 'forgetting'):
        if name in callbacks:
            callbacks[name] = {'save_folder': folder, **(callbacks[name] or {})}
    if 'forgetting' in callbacks:
        filled.setdefault('eval_first', True)
    callbacks.setdefault('hf_checkpointer', {'save_folder': folder, 'save_interval': '1dur', 'precision': 'float32'})
    if stage.train_loader.name == 'replay_text' and stage.train_loader.dataset.replay:
        loader, replay = given['train_loader'], stage.train_loader.dataset.replay
        replay = _in_samples(stage, 'train_loader.dataset.replay', replay)
        if isinstance(replay.get('streams'), Mapping):
            replay['streams'] = {name: _stand_in(stream) for name, stream in replay['streams'].items()}
        filled['train_loader'] = {**loader, 'dataset': {**loader['dataset'], 'replay': replay}}
    return filled


def _stand_in(stream: Any) -> Any:
    """An old stream; what a model wrote says in place of what it stands."""
    if not isinstance(stream, Mapping) or stream.keys() & {'only_seen_by', 'stand_in_for'}:
        return stream
    places = [place for key in ('local', 'remote') if isinstance(place := stream.get(key), str)]
    sampled = sampled_from(places, str(stream.get('split') or ''))
    return {**stream, 'stand_in_for': sampled.stands_in_for} if sampled and sampled.is_whole else stream


def _in_samples(stage: Stage, key: str, given: Any) -> Any:
    """A part of ``replay`` with the times of numbers that change, ``[until, ...]``, in samples."""
    if isinstance(given, Mapping):
        return {name: _in_samples(stage, f'{key}.{name}', value) for name, value in given.items()}
    if not isinstance(given, list):
        return given
    if not given or isinstance(given[0], list):
        return [_in_samples(stage, f'{key}[{number}]', value) for number, value in enumerate(given)]
    until, batch = Duration.parse(f'{key}[0]', given[0], (*ABSOLUTE, 'dur')), stage.global_train_batch_size
    if until.unit == 'dur':
        stage.batches_of(key, until)  # refuses a stage in epochs
        samples = until.value * (stage.batches or 0) * batch
    else:
        samples = until.value * batch / (per_batch_of(until.unit, batch, stage.max_seq_len) or 1)
    return [f'{round(samples)}sp', *given[1:]]


def _resilient(loader: Loader) -> dict[str, Any]:
    given, dataset = dict(loader.given), loader.dataset.given
    if loader.name != 'text' or not dataset.get('remote'):
        return given
    defaults: dict[str, Any] = {'stream_name': 'resilient', 'download_retry': DOWNLOAD_RETRY}
    if 'cache_limit' in dataset and dataset.get('stream_name', 'resilient') == 'resilient':
        defaults['stream_config'] = {'cache_limit': dataset['cache_limit']}
    return {**given, 'dataset': {**defaults, **dataset}}
