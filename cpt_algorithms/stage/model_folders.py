# SPDX-License-Identifier: Apache-2.0
"""Whether a model or tokenizer that a YAML names by its folder is there, and can be read as one."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import nearest

__all__ = ['find_folder_problems']

_CONVERT = (
    'llm-foundry trains no GGUF, and most are quantized: name the model that it was made from, or, with the package '
    "gguf, convert it: AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={file!r}).save_pretrained('model'), "
    'and AutoTokenizer likewise'
)


def find_folder_problems(stage: Stage) -> Iterator[str]:
    """Find names of folders that are no model or tokenizer, whose loaders would speak of a hub or a list of models.

    Args:
        stage: The stage.

    Yields:
        Problems, each with its key, its value and what would be right.
    """
    names = {'tokenizer.name': stage.tokenizer.name}
    if stage.model.name == 'hf_causal_lm' and stage.model.pretrained_model_name_or_path:
        names['model.pretrained_model_name_or_path'] = stage.model.pretrained_model_name_or_path
    problems = {key: _problem(name, needs_config=key.startswith('model')) for key, name in names.items()}
    yield from (f'{key}={names[key]}{problem}' for key, problem in problems.items() if problem)


def _problem(name: str, needs_config: bool) -> str | None:
    path = Path(name)
    is_file, is_dir = os.path.isfile(name), os.path.isdir(name)  # a name may be too long to ask the path
    files = [path.name] if is_file else [each.name for each in path.iterdir()] if is_dir else []
    ggufs = [file for file in files if file.endswith('.gguf')]
    if ggufs and 'config.json' not in files:
        folder = path.parent if is_file else path
        return ' is a GGUF: ' + _CONVERT.format(folder=str(folder), file=ggufs[0])
    if is_file:
        return f' is a file; name the folder that it lies in, {path.parent}'
    if is_dir:
        missing = needs_config and 'config.json' not in files
        return ' has no config.json: name the folder of a Hugging Face model' if missing else None
    # a name on the hub is `name` or `owner/name`, and no folder of that owner lies here
    if re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', name) and not (path.parent.name and path.parent.is_dir()):
        return None
    beside = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    return f' does not exist; {nearest(path.name, beside)}' if beside else ' does not exist'
