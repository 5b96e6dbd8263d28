# SPDX-License-Identifier: Apache-2.0
"""Try to save and export everything but the weights of a model, before anything is trained."""

import copy
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from typing import Any

from accelerate import init_empty_weights
from composer.core import State
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from composer.utils import dist, format_name_with_dist
from llmfoundry.callbacks import HuggingFaceCheckpointer
from transformers.utils import GENERATION_CONFIG_NAME

from cpt_algorithms.checkpoints.exports import folder_of_pretrained
from cpt_algorithms.files import nearest_existing
from cpt_algorithms.formatting import gigabytes, one_line
from cpt_algorithms.ranks import on_rank_zero
from cpt_algorithms.stage.saving import StoppedError, savers

__all__ = ['pass_on_generation_config', 'rehearse', 'rehearse_run']


def rehearse(model: Any, prepare: Callable[[Any], Any] = copy.deepcopy) -> None:
    """Write a model's configuration and tokenizer as a checkpoint and an export will, into a folder that is removed.

    Args:
        model: Composer's model; its weights are not looked at. One that is not from Hugging Face is exported otherwise.
        prepare: The ``transform_config`` of the run's ``hf_checkpointer``. Default: a copy.

    Raises:
        ValueError: If it cannot be written, naming what and the remedy.

    Cost: half a second for a vocabulary of 50,000, and the model on the meta device.
    """
    if not isinstance(model, HuggingFaceModel):
        return
    try:
        model.get_metadata()
    except Exception as error:  # of any reader of a tokenizer's file
        raise ValueError(_blame(model.tokenizer, error)) from error
    inner: Any = getattr(model.model, 'module', model.model)  # FSDP1
    try:
        with tempfile.TemporaryDirectory() as folder, init_empty_weights():
            exported = type(inner)(prepare(inner.config))
            if exported.generation_config is not None:
                exported.generation_config.update(**inner.generation_config.to_dict())
            if _generation_config_of(inner) is not None:
                _leave_out_generation_config(exported)
            exported.save_pretrained(folder, state_dict={})
    except Exception as error:  # of any model
        name = inner.name_or_path or type(inner).__name__
        raise ValueError(f'model={name} cannot be exported: {one_line(error)}') from error


def _blame(tokenizer: Any, error: Exception) -> str:
    """Which of a tokenizer's files it is."""
    said = one_line(error)
    if tokenizer is None:
        return f'the model cannot be described in a checkpoint: {said}'
    frames = [frame.f_locals for frame, _ in walk_tb(error.__traceback__)]
    name = next((Path(each['tokenizer_file_name']).name for each in frames if 'tokenizer_file_name' in each), 'a file')
    said = re.sub(r'\S*/tokenizer/', '', said)  # a temporary folder
    remedy = (
        f'name a copy of that folder without {name}: tokenizer.json is the whole tokenizer'
        if tokenizer.is_fast
        else 'name a folder that has it as tokenizer.json alone'
    )
    if name == 'additional_chat_templates':  # which transformers makes of a list
        remedy = 'keep one chat_template in tokenizer_config.json of a copy of that folder'
    return f'tokenizer={tokenizer.name_or_path}: {name} cannot be put into a checkpoint ({said}); {remedy}'


def _generation_config_of(inner: Any) -> bytes | None:
    """The parent's file as it was published; None if there is none."""
    try:
        return (folder_of_pretrained(inner.name_or_path) / GENERATION_CONFIG_NAME).read_bytes()
    except (AttributeError, OSError, ValueError):  # not from Hugging Face, or no such file
        return None


def _leave_out_generation_config(exported: Any) -> None:
    exported.can_generate = lambda: False  # all that save_pretrained asks


def pass_on_generation_config(state: State) -> None:
    """Have exports hold the pretrained model's ``generation_config.json`` as it is: training does not change it.

    transformers reads many that it refuses to write, at the end of a run.

    Args:
        state: At ``Event.INIT``, when all callbacks are there.
    """
    exporters = [each for each in state.callbacks if isinstance(each, HuggingFaceCheckpointer)]
    if dist.get_global_rank() or not exporters:
        return
    content = _generation_config_of(getattr(getattr(state, 'model', None), 'model', None))
    for exporter in exporters:
        if content is not None:
            _pass_on(content, exporter)


def _pass_on(content: bytes, exporter: HuggingFaceCheckpointer) -> None:
    transform, add = exporter.transform_model_and_tokenizer, exporter.save_additional_contents

    def without_generation_config(model: Any, tokenizer: Any) -> Any:
        model, tokenizer = transform(model, tokenizer)
        _leave_out_generation_config(model)
        return model, tokenizer

    def with_the_parents(state: State, logger: Logger, save_dir: str) -> None:
        (Path(save_dir) / GENERATION_CONFIG_NAME).write_bytes(content)
        add(state, logger, save_dir)

    vars(exporter).update(
        transform_model_and_tokenizer=without_generation_config, save_additional_contents=with_the_parents
    )


def _check_room(state: State) -> None:
    """A checkpoint holds the weights, and two moments of each that is trained; averages come on top of that."""
    needed = sum(weights.nbytes for weights in state.model.parameters())
    for optimizer in state.optimizers:
        trained = sum(weights.nbytes for group in optimizer.param_groups for weights in group['params'])
        needed += 2 * trained if 'betas' in optimizer.defaults else 0
    for saver in savers(state):
        folder = Path(format_name_with_dist(saver.folder, state.run_name)).absolute()
        free = shutil.disk_usage(nearest_existing(folder)).free
        if free < needed:
            raise ValueError(
                f'save_folder={folder}: a checkpoint takes {gigabytes(needed)} or more, and {gigabytes(free)} are '
                'free; make room, or choose another'
            )


def rehearse_run(state: State) -> None:
    """The same with a run's own model and exporters, for all ranks; also whether a checkpoint fits on the disk.

    Args:
        state: At ``Event.FIT_START``.

    Raises:
        StoppedError: On all ranks.
    """

    def try_everything() -> None:
        model = getattr(state.model, 'module', state.model)  # DDP
        exporters = [each for each in state.callbacks if isinstance(each, HuggingFaceCheckpointer)]
        _check_room(state)
        for prepare in [each.transform_config for each in exporters] or [copy.deepcopy]:
            rehearse(model, prepare)

    try:
        on_rank_zero(try_everything)
    except ValueError as error:
        raise StoppedError(str(error)) from None
