# SPDX-License-Identifier: Apache-2.0
"""The card of an exported model, ``README.md`` as the hub shows it, and ``recipe.yaml``, which made it."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from cpt_algorithms.checkpoints.exports import CARD, RECIPE
from cpt_algorithms.stage.record import StageRecord

__all__ = ['model_card', 'write_card']

_ON_THE_HUB = re.compile(r'[\w.-]+(/[\w.-]+)?')
# Of the YAML, what is of whom trained it, and not of the model.
_PRIVATE = ('loggers', 'metadata')


def write_card(folder: Path, record: StageRecord, batch: int, average: str = '') -> None:
    """Write ``README.md`` and ``recipe.yaml`` into an export: the YAML without its loggers and ``metadata``.

    Args:
        folder: The export.
        record: Of its run.
        batch: At which it was exported.
        average: Of the weights, as its folder is called. Default: ``''``, the weights themselves.
    """
    (folder / CARD).write_text(model_card(record, batch, average), encoding='utf-8')
    recipe = {key: value for key, value in record.config.to_train_yaml().items() if key not in _PRIVATE}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(text, encoding='utf-8')


def model_card(record: StageRecord, batch: int, average: str = '') -> str:
    """The text of a card: what the model began from, what it has read, and how it was trained; see :func:`write_card`.

    ``base_model`` is there if that is a name on the hub, and not a folder of this machine.
    """
    stage, base = record.config, record.pretrained_model
    tags = {'continual-pretraining': True, 'replay': stage.mix and stage.mix.old, 'merge': stage.merge}
    is_public = base is not None and _ON_THE_HUB.fullmatch(base) and not Path(base).exists()
    data = ModelCardData(
        base_model=base if is_public else None,
        library_name='transformers',
        pipeline_tag='text-generation',
        tags=[tag for tag, applies in tags.items() if applies],
        model_name=record.run_name or None,
    )
    rows = [f'| {key} | {value} |' for key, value in _rows(record, batch, average)]
    table = ['| | |', '|---|---|', *rows]
    recipe = 'merge' if stage.merge else 'continue_pretraining'
    made = f'`recipe.yaml` beside this card is the whole recipe, of `recipes/{recipe}.py`.'
    head = ['---', data.to_yaml(), '---', '', f'# {record.run_name}', '']
    return '\n'.join([*head, *table, '', *_data(record, batch), made, ''])


def _rows(record: StageRecord, batch: int, average: str) -> Iterator[tuple[str, str]]:
    stage = record.config
    yield 'began from', f'`{record.parent}`' if record.parent else 'nothing: trained from scratch'
    if stage.merge:
        yield 'weights', f'{stage.merge.described}{f", {average}" if average else ""}'
    else:
        yield 'weights', f'their average `{average}`' if average else 'as they were trained'
        of = '' if stage.batches is None else f' of {stage.batches:,}'
        yield 'batches', f'{batch:,}{of}, each of {stage.tokens_per_batch:,} tokens'
        lr = '' if stage.optimizer.lr is None else f', {stage.optimizer.lr:g}'
        yield 'optimizer, learning rate', f'{stage.optimizer.name}{lr}, {stage.scheduler.name}'
        yield 'precision', stage.precision
    yield 'versions', ', '.join(f'{name} {version}' for name, version in record.versions.items())


def _data(record: StageRecord, batch: int) -> Iterator[str]:
    """A table of what was read by then; nothing of merges, which read nothing, and where only the data knows it."""
    stage = record.config
    if stage.merge or stage.mix is None or stage.batches is None:
        return
    tokens = stage.tokens_until(batch)
    yield from ('| data | | tokens | share |', '|---|---|---|---|')
    for name, count in tokens.items():
        old = stage.mix.old.get(name)
        what = 'new' if old is None else 'replay' + (f', in place of {old.stand_in_for}' if old.stand_in_for else '')
        yield f'| {name} | {what} | {count:,} | {100 * count / max(1, sum(tokens.values())):.3g} % |'
    yield ''
