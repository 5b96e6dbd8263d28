# SPDX-License-Identifier: Apache-2.0
"""A sequence at another size: its stages, arms and schedules, with a model that trains in a minute."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import OmegaConf

from cpt_algorithms.files import read_yaml
from cpt_algorithms.sequence.branches import in_batches
from cpt_algorithms.sequence.expand import SEQUENCE_KEYS, check_sequence, stage_tokens
from cpt_algorithms.stage.form import check_form
from cpt_algorithms.validation import check_keys, check_type

__all__ = ['load_scaled', 'scaled']

Config = dict[str, Any]

_SCALE_TYPES: dict[str, Any] = {
    **dict.fromkeys(('name', 'folder', 'data', 'longest_stage'), str),
    'lr': float,
    'sequence': dict[str, Any],
    'common': dict[str, Any],
}
SCALE_KEYS = ('name', 'folder', 'data', 'longest_stage', 'lr', 'sequence', 'common')


def load_scaled(words: Sequence[str]) -> Config:
    """A YAML with overrides; of a sequence that says ``scale``, at that size.

    Args:
        words: Its path, and ``key=value``; what these say is said of the result. ``scale`` is the path of a scale file,
            or ``tiny`` for ``yamls/scales/tiny.yaml``, looked for in the folders above the YAML.

    Raises:
        ValueError: If there is no such scale, or the YAML is no mapping; see :func:`scaled`.
        OSError: If a file cannot be read; OmegaConf's errors and YAML's if it is not right.
    """
    given, changes = read_yaml(words[0]), OmegaConf.from_cli(list(words[1:]))
    if scale := _unresolved(OmegaConf.merge(given, changes)).get('scale'):
        whole: Any = OmegaConf.to_container(given, resolve=True)
        whole.pop('scale', None)
        check_sequence(whole)
        then, now = (_unresolved(each) for each in (given, read_yaml(_scale_file(str(scale), Path(words[0])))))
        given = OmegaConf.create(scaled(then, now))
    spec: Any = OmegaConf.to_container(OmegaConf.merge(given, changes), resolve=True)
    spec.pop('scale', None)
    return spec


def _unresolved(config: Any) -> Config:
    plain: Any = OmegaConf.to_container(config)
    return plain


def _scale_file(name: str, sequence: Path) -> Path:
    folders = [above / 'scales' for above in (*sequence.resolve().parents, Path.cwd() / 'yamls')]
    files = [Path(name)] if name.endswith('.yaml') else [folder / f'{name}.yaml' for folder in folders]
    found = [path for path in files if path.exists()]
    if not found:
        known = sorted({path.stem for folder in folders for path in folder.glob('*.yaml')})
        raise ValueError(
            f'scale={name}: there is no {files[0].name}; use {", ".join(known)}, or the path of a YAML like these'
        )
    return found[0]


def scaled(spec: Config, scale: Config) -> Config:
    """A sequence at the size that a scale file says.

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
        spec: A sequence YAML. Interpolations may be unresolved, but not in times and learning rates.
        scale: ``name``, ``folder``, ``data``, ``longest_stage`` in ba, ``lr``, ``sequence``, and ``common`` with at
            least ``global_train_batch_size`` and ``max_seq_len``.

    Raises:
        ValueError: On an unknown or missing key.
    """
    check_keys('scale', scale, SCALE_KEYS)
    if missing := [key for key in SCALE_KEYS if key not in scale]:
        raise ValueError(f'scale.{missing[0]} is missing')
    for key, hint in _SCALE_TYPES.items():
        check_type(f'scale.{key}', scale[key], hint)
    check_keys('scale.sequence', scale['sequence'], SEQUENCE_KEYS)
    if not scale['lr'] > 0:
        raise ValueError(f'scale.lr={scale["lr"]} must be more than 0')
    check_form({key: value for key, value in scale['common'].items() if value is not None}, 'scale.common')
    common, small = spec.get('common') or {}, scale['common']
    if missing := [key for key in ('global_train_batch_size', 'max_seq_len') if small.get(key) is None]:
        raise ValueError(f'scale.common.{missing[0]} is missing')
    if 'lr' not in (common.get('optimizer') or {}):
        raise ValueError('common.optimizer.lr is missing: a scale keeps the ratios of learning rates to it')
    longest = in_batches(f'{max(stage_tokens(spec).values())}tok', common)
    share = Fraction(in_batches(scale['longest_stage'], small, 'scale.longest_stage'), longest)
    change = _Change(common, small, share, scale['lr'] / common['optimizer']['lr'])
    arms = {
        arm: {key: _without(own, small) if isinstance(own, Mapping) else own for key, own in (overrides or {}).items()}
        for arm, overrides in (spec.get('arms') or {}).items()
    }
    return {
        **_with(spec, scale['sequence']),
        'name': f'{spec["name"]} ({scale["name"]})',
        'folder': f'{scale["folder"]}/{PurePosixPath(spec["folder"]).name}',
        'data': {
            name: {**_without(stream, {'remote': '', 'local': ''}), 'local': f'{scale["data"]}/{name}'}
            for name, stream in spec['data'].items()
        },
        'common': _with(change.of(common), small),
        'stages': {name: change.of(_without(stage or {}, small)) for name, stage in spec['stages'].items()},
        **({'arms': change.of(arms)} if arms else {}),
    }


@dataclass(frozen=True)
class _Change:
    """What becomes of times and learning rates.

    Args:
        then: ``common`` of the sequence.
        now: ``common`` of the scale.
        share: Batches now of a batch then.
        factor: Of learning rates.
    """

    then: Config
    now: Config
    share: Fraction
    factor: float

    def of(self, value: Any) -> Any:
        """A part of the YAML, with these changed."""
        if isinstance(value, Mapping):
            changed = {key: self.of(item) for key, item in value.items()}
            for key in ('lr', 'weight_decay'):
                if key in (changed.get('optimizer') or {}):
                    check_type(f'optimizer.{key}', changed['optimizer'][key], float)
                    changed['optimizer'][key] = float(f'{changed["optimizer"][key] * self.factor:.6g}')
            return changed
        if isinstance(value, list):
            items = [self.of(item) for item in value]
            return list(dict.fromkeys(items)) if all(isinstance(item, str) for item in items) else items
        if isinstance(value, str) and (time := re.fullmatch(r'\d+(tok|ba|sp)', value)):
            return f'{self._batches(value) * self._in_a_batch[time[1]]}{time[1]}'
        return value

    def _batches(self, time: str) -> int:
        batches = in_batches(time, self.then)
        return max(1, round(batches * self.share)) if batches else 0

    @property
    def _in_a_batch(self) -> dict[str, int]:
        samples = self.now['global_train_batch_size']
        return {'ba': 1, 'sp': samples, 'tok': samples * self.now['max_seq_len']}


def _without(section: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """What of a section is not given elsewhere."""
    kept = {}
    for key, value in section.items():
        both = isinstance(value, Mapping) and isinstance(given.get(key), Mapping)
        if both and 'name' not in given[key]:
            kept[key] = _without(value, given[key])
        elif key not in given:
            kept[key] = value
    return kept


def _with(section: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """A section and what is given, which wins; as ``plan`` merges, and null takes a key away."""
    merged = dict(section)
    for key, value in given.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and 'name' not in value:
            before = merged.get(key)
            merged[key] = _with(before if isinstance(before, Mapping) else {}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
