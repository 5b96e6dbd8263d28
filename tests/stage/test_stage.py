# SPDX-License-Identifier: Apache-2.0
"""A train YAML, read once: what is filled in, what follows from it, and every mistake of type at once."""

import copy

import pytest
import tiny

from cpt_algorithms.duration import Duration
from cpt_algorithms.stage.stage import KEEP_OPTIMIZER_IGNORE_KEYS, Stage
from cpt_algorithms.validation import ConfigError


@pytest.fixture
def yaml(data, tmp_path):
    return tiny.config(tmp_path, data, 'child', load_path='parent.pt')


def test_what_follows_is_filled_in_and_what_was_given_stays(yaml, tmp_path):
    before = copy.deepcopy(yaml)
    stage = Stage.from_yaml({**yaml, 'autoresume': None})
    filled = stage.to_train_yaml()
    assert filled['load_weights_only'] is True
    assert filled['callbacks']['hf_checkpointer']['save_folder'] == str(tmp_path / 'child')
    assert yaml == before
    assert Stage.from_yaml(filled).to_train_yaml() == filled, 'once more changes nothing'
    kept = stage.but(
        load_weights_only=None, callbacks={**yaml['callbacks'], 'stage_start': {'optimizer_state': 'keep'}}
    )
    assert kept.keeps_optimizer_state and not kept.load_weights_only
    assert kept.load_ignore_keys == KEEP_OPTIMIZER_IGNORE_KEYS


def test_what_is_changed_in_a_copy_is_not_changed_in_the_stage(yaml):
    stage = Stage.from_yaml(yaml)
    stage.to_train_yaml()['optimizer']['lr'] = 0
    stage.optimizer.arguments['lr'] = 0
    assert stage.optimizer.lr == stage.to_train_yaml()['optimizer']['lr'] == yaml['optimizer']['lr']


def test_what_follows_from_a_stage(yaml, tmp_path):
    stage = Stage.from_yaml({**yaml, 'save_folder': str(tmp_path / '{run_name}'), 'max_duration': '1000tok'})
    assert stage.batches == 8  # of 8 x 16 tokens
    assert stage.tokens_by_stream() == {'new': 1024}
    assert stage.tokens_by_stream(batches=3) == {'new': 384}
    assert stage.folder == str(tmp_path / 'child')
    assert (stage.parent, stage.pretrained_model) == ('parent.pt', None)
    epochs = stage.but(max_duration='2ep')
    assert epochs.batches is None
    with pytest.raises(ValueError, match='max_duration=2ep'):
        epochs.tokens_by_stream()


def moving(yaml, fraction, **top):
    old = {'local': 'old', 'weight': [['2ba', 1, 0.5]]}
    dataset = {'replay': {'fraction': fraction, 'streams': {'old': old}}}
    return tiny.merge(yaml, {'max_duration': '10ba', 'train_loader': {'dataset': dataset}, **top})


def test_times_of_a_mix_that_changes_become_samples(yaml):
    # batches of 8 rows of 16 tokens, 10 of them
    stage = Stage.from_yaml(moving(yaml, [['128tok', 0.1], ['2ba', 0.1, 0.5], ['20sp', 0.5], ['0.5dur', 0]]))
    replay = stage.to_train_yaml()['train_loader']['dataset']['replay']
    assert replay['fraction'] == [['8sp', 0.1], ['16sp', 0.1, 0.5], ['20sp', 0.5], ['40sp', 0]]
    assert replay['streams']['old']['weight'] == [['16sp', 1, 0.5]]
    assert Stage.from_yaml(stage.to_train_yaml()).to_train_yaml() == stage.to_train_yaml()
    # 8 of 0.1, 8 of 0.3 in the mean, 4 of 0.5: 5.2, and 5.2 x 16 tokens is no number of rows
    assert stage.tokens_by_stream() == {'new': (80 - 5) * 16, 'old': 5 * 16}


@pytest.mark.parametrize(
    ('fraction', 'message'),
    [
        (
            [['soon', 0.1]],
            r"^train_loader\.dataset\.replay\.fraction\[0\]\[0\]='soon' must be a time .* tok, ba, sp or dur",
        ),
        ([['3ep', 0.1]], r"replay\.fraction\[0\]\[0\]='3ep' must be a time"),
        ([['1dur', 0.1]], r'replay\.fraction\[0\]=2ep is in epochs, whose length only the data knows'),
    ],
)
def test_times_of_a_mix_that_are_none_are_named(yaml, fraction, message):
    with pytest.raises(ValueError, match=message):
        Stage.from_yaml(moving(yaml, fraction, max_duration='2ep'))


WRONG = {
    'callbacks.lr_monitor': ('yes', "'yes'", 'mapping'),
    'max_duration': ('12', '12', 'tok'),
    'max_seq_len': ('16', "'16'", 'whole number'),
    'global_train_batch_size': (8.0, '8.0', 'whole number'),
    'run_name': (5, '5', 'text'),
    'seed': (-1, '-1', '0'),
    'precision': ('amp_bf61', 'amp_bf61', 'amp_bf16'),
    'save_interval': ('5x', '5x', 'ba'),
    'eval_first': ('yes', "'yes'", 'true or false'),
    'load_ignore_keys': ('rng', "'rng'", 'list'),
    'device_train_microbatch_size': (2.5, '2.5', 'auto'),
    'optimizer.lr': ('3e-4', "'3e-4'", 'number'),
    'optimizer.weight_decay': (1.5, '1.5', '1'),
    'model.n_layers': (0, '0', '1'),
    'model.init_device': ('gpu', "'gpu'", 'cpu'),
    'train_loader.dataset.max_seq_len': (1.5, '1.5', 'whole number'),
    'eval_loader': (5, '5', 'list'),
    'callbacks': ([1], '[1]', 'mapping'),
    'callbacks.forgetting': ({'old': 'a'}, "'a'", 'list'),
    'tokenizer': ('gpt2', "'gpt2'", 'mapping'),
}


def spoilt(yaml, keys):
    yaml = copy.deepcopy(yaml)
    for key in keys:
        *sections, last = key.split('.')
        section = yaml
        for name in sections:
            section = section[name]
        section[last] = WRONG[key][0]
    return yaml


@pytest.mark.parametrize('key', WRONG)
def test_a_value_of_another_type_is_refused_by_key_value_and_what_is_right(key, yaml):
    with pytest.raises(ConfigError) as refused:
        Stage.from_yaml(spoilt(yaml, [key]))
    [problem] = refused.value.problems
    assert problem.startswith(key)
    assert all(word in problem for word in WRONG[key][1:])


def test_all_mistakes_are_said_at_once(yaml):
    keys = ['max_duration', 'optimizer.lr', 'model.n_layers', 'eval_first']
    with pytest.raises(ConfigError) as refused:
        Stage.from_yaml(spoilt({**yaml, 'scheduler': None}, keys))
    named = {problem.split('=')[0].split(' ')[0] for problem in refused.value.problems}
    assert named == {*keys, 'scheduler'}


@pytest.mark.parametrize('given', [None, 5, 'text', [], {}, {1: 2}, {'model': '???'}])
def test_what_is_no_train_yaml_is_refused(given):
    with pytest.raises(ConfigError):
        Stage.from_yaml(given)


def test_a_number_is_epochs_as_composer_takes_it(yaml):
    for key in ('max_duration', 'save_interval', 'eval_interval', 'console_log_interval'):
        assert getattr(Stage.from_yaml({**yaml, key: 2}), key) == Duration(2, 'ep')
