# SPDX-License-Identifier: Apache-2.0
"""A sequence at another size: its stages, arms and schedules, with a model that trains in a minute."""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import ConfigDict, Field

from cpt_algorithms.duration import ABSOLUTE, Duration, per_batch_of
from cpt_algorithms.sequence.spec import AbsoluteTime, SequenceSpec, StageSettings, overlay
from cpt_algorithms.validation import Section, check_keys, check_type, parse_section

__all__ = ['scale_file', 'scaled']


class Scale(Section):
    """A size.

    ``common`` has at least ``global_train_batch_size`` and ``max_seq_len``; ``longest_stage`` is the length of the
    longest stage, ``lr`` the new ``common.optimizer.lr``, ``sequence`` the keys beside ``common``.
    """

    model_config = ConfigDict(extra='forbid')

    name: str
    folder: str
    data: str
    longest_stage: AbsoluteTime
    lr: Annotated[float, Field(gt=0)]
    sequence: dict[str, Any]
    common: StageSettings


def scale_file(name: str, sequence: Path) -> Path:
    """The file of a scale.

    Args:
        name: Its path, or ``tiny`` for ``scales/tiny.yaml`` in one of the folders above the sequence.
        sequence: The sequence YAML.

    Raises:
        ValueError: If there is none.
    """
    folders = [above / 'scales' for above in (*sequence.resolve().parents, Path.cwd() / 'yamls')]
    files = [Path(name)] if name.endswith('.yaml') else [folder / f'{name}.yaml' for folder in folders]
    found = [path for path in files if path.exists()]
    if not found:
        known = sorted({path.stem for folder in folders for path in folder.glob('*.yaml')})
        raise ValueError(f'scale={name}: there is no {files[0].name}; use the path of a YAML, or {", ".join(known)}')
    return found[0]


def scaled(given: Mapping[str, Any], scale: Mapping[str, Any]) -> dict[str, Any]:
    """A sequence YAML at the size that a scale file says.

    * A time in tok, ba or sp under ``common``, ``stages`` or ``arms`` keeps its share of the sequence's longest stage:
      ``round(time / longest stage * longest_stage)`` batches, in the unit it had; at least 1 if it was not 0. Times of
      a list that become equal are one. Times in dur stay as they are.
    * Learning rates keep their ratios, and that of ``common.optimizer`` becomes ``lr``. Weight decay is multiplied
      alike: that of ``decoupled_adamw`` is the usual one times the learning rate.
    * Each dataset lies in ``data``, in the folder of its name.
    * ``common`` wins over the sequence's ``common``, stages and arms, and ``sequence`` over what stands beside these;
      null takes a key away.
    * ``name`` is added to the sequence's, and its folder becomes one in ``folder``.

    Args:
        given: A sequence YAML. Interpolations stay, but not in times and learning rates.
        scale: See :class:`Scale`.

    Raises:
        ValueError: If one of them is not right.
    """
    small = parse_section(Scale, scale, 'scale')
    check_keys('scale.sequence', small.sequence, SequenceSpec.model_fields)
    resolved: Any = OmegaConf.to_container(OmegaConf.create(dict(given)), resolve=True)
    spec = SequenceSpec.from_yaml(resolved)
    now_batch, now_length = small.common.global_train_batch_size, small.common.max_seq_len
    if not now_batch or not now_length:
        raise ValueError('scale.common.global_train_batch_size and scale.common.max_seq_len must both be there')
    if spec.common.optimizer is None or not spec.common.optimizer.lr:
        raise ValueError('common.optimizer.lr is missing: a scale keeps the ratios of learning rates to it')
    batch, length = spec.common.global_train_batch_size, spec.common.max_seq_len
    if not batch or not length:
        raise ValueError('common.global_train_batch_size and common.max_seq_len must both be there')
    longest = max(spec.stage_tokens.values())
    share = Fraction(small.common.batches_of(small.longest_stage), -(-longest // (batch * length)))

    def shorter(time: str) -> str:
        then = Duration.parse('KEY', time, ABSOLUTE)
        batches = then.batches(batch, length)
        now = max(1, round(batches * share)) if batches else 0
        return f'{now * (per_batch_of(then.unit, now_batch, now_length) or 1)}{then.unit}'

    def change(section: Mapping[str, Any] | None, without: Mapping[str, Any] = small.common.given) -> dict[str, Any]:
        return _changed(_without(section or {}, without), shorter, small.lr / spec.common.optimizer.lr)

    arms = {
        arm: {name: section if name == 'baseline' else change(section) for name, section in (sections or {}).items()}
        for arm, sections in (given.get('arms') or {}).items()
    }
    return overlay(
        {
            **given,
            'name': f'{spec.name} ({small.name})',
            'folder': f'{small.folder}/{PurePosixPath(spec.folder).name}',
            'data': {
                name: {**_without(stream, {'remote': '', 'local': ''}), 'local': f'{small.data}/{name}'}
                for name, stream in given['data'].items()
            },
            'common': overlay(change(given.get('common'), {}), small.common.given, null_removes=True),
            'stages': {name: change(stage) for name, stage in given['stages'].items()},
            **({'arms': arms} if arms else {}),
        },
        small.sequence,
        null_removes=True,
    )


def _changed(value: Any, shorter: Callable[[str], str], factor: float) -> Any:
    """A part of a YAML with other times and learning rates."""
    if isinstance(value, Mapping):
        changed = {key: _changed(item, shorter, factor) for key, item in value.items()}
        for key in ('lr', 'weight_decay'):
            if key in (changed.get('optimizer') or {}):
                check_type(f'optimizer.{key}', changed['optimizer'][key], float)
                changed['optimizer'][key] = float(f'{changed["optimizer"][key] * factor:.6g}')
        if (decay := (changed.get('optimizer') or {}).get('weight_decay', 0)) >= 1:
            raise ValueError(f'scale.lr: optimizer.weight_decay goes with it, and would be {decay:g}, not below 1')
        return changed
    if isinstance(value, list):
        items = [_changed(item, shorter, factor) for item in value]
        return list(dict.fromkeys(items)) if all(isinstance(item, str) for item in items) else items
    return shorter(value) if isinstance(value, str) and re.fullmatch(r'\d+(tok|ba|sp)', value) else value


def _without(section: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a section that is not given elsewhere."""
    kept = {}
    for key, value in section.items():
        both = isinstance(value, Mapping) and isinstance(given.get(key), Mapping)
        if both and 'name' not in given[key]:
            kept[key] = _without(value, given[key])
        elif key not in given:
            kept[key] = value
    return kept
