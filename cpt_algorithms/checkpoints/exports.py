# SPDX-License-Identifier: Apache-2.0
"""Exported Hugging Face models of runs: where they are, and which model a run began from."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_algorithms.checkpoints.save_folder import batch_of
from cpt_algorithms.compat import weights_dtype_key
from cpt_algorithms.files import is_remote, list_names, read_json
from cpt_algorithms.formatting import one_line

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger
    from llmfoundry.callbacks import HuggingFaceCheckpointer

__all__ = [
    'CARD',
    'RECIPE',
    'PretrainedModel',
    'export_atomically',
    'exports',
    'folder_of_pretrained',
    'is_foundry_mpt',
    'load_export',
    'models_of',
    'newest_export',
    'parent_of',
]

# Beside an export: what it is, and what made it; neither is a part of the model.
CARD, RECIPE = 'README.md', 'recipe.yaml'


@dataclass(frozen=True)
class PretrainedModel:
    """A model that a run began from, a folder or a name on the hub, and where what is measured of it is kept.

    Not beside itself, since its own folder may be a cache, or read-only, but beside an export of the run.
    """

    name: str
    beside: Path


def folder_of_pretrained(name: str) -> Path:
    """Where a pretrained model, a folder or a name on the hub, lies on this machine. Looks nothing up on the hub.

    Raises:
        ValueError: If it is neither a folder nor in the cache of the hub.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise ValueError(f'{name} is neither a folder nor in the cache of the Hugging Face hub') from None


def is_foundry_mpt(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of LLM Foundry's MPT, which transformers takes for its own, without positions."""
    # a checkpoint of Composer does not say the architectures
    return config.get('model_type') == 'mpt' and config.get('architectures') != ['MptForCausalLM']


def exports(run: str | Path, file: str = 'config.json') -> dict[int, str]:
    """A run's exports of its own weights by batch: folders or URIs, as the run is one, that hold such a file."""
    folder = f'{run}/huggingface'
    names = list_names(folder) if is_remote(folder) else [p.parent.name for p in Path(folder).glob(f'ba*/{file}')]
    ours = {name.removesuffix(f'/{file}'): batch_of(name.removesuffix(f'/{file}')) for name in names}
    return {batch: f'{folder}/{name}' for name, batch in ours.items() if batch is not None and name == f'ba{batch}'}


def newest_export(run: str | Path, file: str = 'config.json') -> str | None:
    """The newest of a run's :func:`exports`; None if there is none."""
    found = exports(run, file)
    return found[max(found)] if found else None


def load_export(folder: Path, device: str) -> tuple[Any, Any, int | None]:
    """An exported model, its tokenizer, and the length of its rows where transformers does not know that.

    Models that LLM Foundry's ``mpt_causal_lm`` exported are loaded with LLM Foundry's own class: for these,
    ``AutoModelForCausalLM`` takes transformers' ``mpt``, which knows no learned positions, and gives other numbers
    silently. No code is taken from the folder.

    Raises:
        ValueError: If it cannot be loaded, or not all of its weights are there.
    """
    # is not annotated in a way that a type checker follows, and takes seconds
    transformers: Any = import_module('transformers')
    settings = read_json(folder / 'config.json') or {}
    arguments: dict[str, Any] = {'torch_dtype': 'auto', 'output_loading_info': True, 'trust_remote_code': False}
    kind, max_length = transformers.AutoModelForCausalLM, None
    try:
        if is_foundry_mpt(settings):
            mpt: Any = import_module('llmfoundry.models.mpt')
            kind, config = mpt.MPTForCausalLM, mpt.MPTConfig.from_pretrained(folder, init_device='cpu')
            # flash attention can do neither
            if device == 'cpu' or settings.get(weights_dtype_key(settings)) == 'float32':
                config.attn_config['attn_impl'] = 'torch'
            arguments['config'], max_length = config, config.max_seq_len  # which lm-eval does not look for
        model, loaded = kind.from_pretrained(folder, **arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what a model's files hold can be anything
        said = one_line(error)
        raise ValueError(f'{folder} cannot be loaded: {type(error).__name__}: {said[:200]}') from None
    empty = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if lacking := [*loaded['missing_keys'], *loaded['unexpected_keys'], *loaded['mismatched_keys'], *empty]:
        name = lacking[0] if isinstance(lacking[0], str) else lacking[0][0]  # of a mismatch, with both shapes
        raise ValueError(f'{folder} cannot be loaded: weights do not fit its config.json, such as {name}')
    return model.to(device), tokenizer, max_length


def models_of(given: Path) -> list[Path]:
    """The models that an argument names, a run's own weights first.

    Raises:
        ValueError: If there is none.
    """
    given = given.resolve()  # results are called as the folder, not as a link to it
    if (given / 'config.json').is_file():
        return [given]
    if (found := newest_export(given)) is None:
        raise ValueError(f'{given}: no model found; expected config.json, or huggingface/ba<N>/config.json of a run')
    newest = Path(found)
    return [newest, *sorted(path.parent for path in newest.parent.glob(f'{newest.name}-*/config.json'))]


def parent_of(given: Path) -> Path | PretrainedModel | None:
    """The export of the checkpoint that a run began from, or the pretrained model; None from scratch, or if not known.

    Args:
        given: A run's folder, or one of its exports.

    Raises:
        ValueError: If there was a parent and it has no export, or the pretrained model is not on this machine.
    """
    run = given.resolve().parent.parent if (given / 'config.json').is_file() else given
    try:
        stage = read_json(run / 'stage.json') or {}
        load_path = stage['parent']
    except (OSError, ValueError, KeyError):
        return None
    if not load_path:
        return None
    if base := stage.get('pretrained_model'):
        folder_of_pretrained(base)
        return PretrainedModel(base, run / 'huggingface')
    if is_remote(load_path):
        raise ValueError(
            f'{given}: its parent {load_path} lies in object storage, so no differences are shown; --parent names a '
            'copy of its export'
        )
    # latest-rank0.pt is a link to ep0-ba100-rank0.pt
    checkpoint = Path(os.path.realpath(load_path))
    found = exports(Path(load_path).parent)
    batch = batch_of(checkpoint)
    wanted = max(found, default=-1) if batch is None else batch
    if wanted not in found:
        name = f'huggingface/ba{"<N>" if batch is None else batch}'
        raise ValueError(
            f'{given}: its parent {load_path} has no export {name} beside it, so no differences are shown; '
            '--parent names another'
        )
    return Path(found[wanted])


def export_atomically(exporter: 'HuggingFaceCheckpointer', state: 'State', logger: 'Logger', **how: bool) -> None:
    """Export as LLM Foundry does, but so that the folder appears whole or not at all; it writes ``config.json`` first.

    Made in a hidden folder beside, which is then renamed. Not so in object storage, where nothing can be renamed, nor
    if the export goes to MLflow, which reads it in another process. The arguments are those of ``_save_checkpoint``.
    """
    from composer.utils import dist, format_name_with_dist_and_time  # Composer takes seconds to import
    from llmfoundry.callbacks import HuggingFaceCheckpointer

    def place(name: Path) -> Path:
        full = str(Path(exporter.save_dir_format_str) / name)
        return Path(format_name_with_dist_and_time(full, state.run_name, state.timestamp))

    def save() -> None:
        HuggingFaceCheckpointer._save_checkpoint(exporter, state, logger, **how)

    # a run that is exported once more says so in any case, and would get a second model in `register_save`
    how['register_to_mlflow'] &= exporter.mlflow_registered_model_name is not None
    if exporter.remote_ud is not None or how['register_to_mlflow']:
        save()
        return
    name = exporter.huggingface_folder_name_fstr
    hidden = Path(name).with_name(f'.{Path(name).name}')
    out, partial, replaced = place(Path(name)), place(hidden), place(hidden.with_name(f'{hidden.name}.replaced'))
    if dist.get_global_rank() == 0:
        for left in (partial, replaced):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
    exporter.huggingface_folder_name_fstr = str(hidden)
    try:
        save()
    except BaseException:
        if dist.get_global_rank() == 0:  # room again on a disk that is full
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        exporter.huggingface_folder_name_fstr = name
    if dist.get_global_rank() == 0 and partial.exists():
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
