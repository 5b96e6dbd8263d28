# SPDX-License-Identifier: Apache-2.0
"""The card and the recipe beside an export."""

import tiny
import yaml
from huggingface_hub import ModelCard

from cpt_algorithms.stage.model_card import model_card, write_card
from cpt_algorithms.stage.record import StageRecord
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import parse_section


def record_of(folder, data, parent='runs/base/latest-rank0.pt', **over):
    streams = {'old': {'local': str(data['old']), 'split': 'train', 'stand_in_for': 'the web'}}
    replay = {'train_loader': {'dataset': {'replay': {'fraction': 0.25, 'streams': streams}}}}
    config = tiny.merge(tiny.config(folder, data, 'child', max_duration='8ba'), replay)
    given = {'run_name': 'child', 'config': tiny.merge(config, over), 'versions': {'torch': '2.7.0'}}
    return parse_section(StageRecord, {**given, 'parent': parent})


def test_a_card_says_what_the_model_is_and_its_front_matter_parses(data, tmp_path):
    record = record_of(tmp_path, data, loggers={'wandb': {'entity': 'ours'}})
    write_card(tmp_path, record, 4, 'lawa')
    card = ModelCard.load(tmp_path / 'README.md')
    assert card.data.to_dict() == {
        'library_name': 'transformers', 'model_name': 'child', 'pipeline_tag': 'text-generation',
        'tags': ['continual-pretraining', 'replay'],
    }  # fmt: skip
    for line in (
        '| began from | `runs/base/latest-rank0.pt` |',
        '| weights | their average `lawa` |',
        '| batches | 4 of 8, each of 128 tokens |',
        # of 4 batches of 8 rows of 16 tokens
        '| new | new | 384 | 75 % |',
        '| old | replay, in place of the web | 128 | 25 % |',
        '| versions | torch 2.7.0 |',
    ):
        assert line in card.text.splitlines(), line
    recipe = yaml.safe_load((tmp_path / 'recipe.yaml').read_text())
    given = record.config.to_train_yaml()
    assert given.pop('loggers') and recipe == given == Stage.from_yaml(recipe).to_train_yaml()


def test_a_base_is_named_if_others_can_have_it(data, tmp_path):
    named = {'some-lab/a-model_1.7B': True, 'gpt2': True, str(tmp_path): False, 'runs/base/ep0-ba10-rank0.pt': False}
    for base, is_public in named.items():
        record = record_of(tmp_path, data, base).model_copy(update={'pretrained_model': base})
        (tmp_path / 'README.md').write_text(model_card(record, 8))
        found = ModelCard.load(tmp_path / 'README.md')
        assert found.data.to_dict().get('base_model') == (base if is_public else None)
        assert f'began from | `{base}`' in found.text
    scratch = model_card(record_of(tmp_path, data, None), 8)
    assert 'trained from scratch' in scratch and 'as they were trained' in scratch


def test_what_only_the_data_knows_is_left_out(data, tmp_path):
    card = model_card(record_of(tmp_path, data, max_duration='1ep'), 4)
    assert '| batches | 4, each of 128 tokens |' in card and '| share |' not in card
    merge = {'of': 'runs/trunk', 'batch': 10, 'last': 3, 'every': '2ba'}
    made = model_card(record_of(tmp_path, data, None, variables={'merge': merge}), 10, 'alpha_0.5')
    assert (
        '| weights | average of 3 checkpoints, 2ba apart, alpha_0.5 |' in made
        and '- merge' in made
        and 'batches |' not in made
    )
    assert '`recipe.yaml` beside this card is the whole recipe, of `recipes/merge.py`' in made
