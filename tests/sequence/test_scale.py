# SPDX-License-Identifier: Apache-2.0
"""A sequence at another size, by numbers worked out by hand."""

import copy

import pytest
from tiny import runs_of

from cpt_algorithms.sequence.scale import scaled

# 10 x 100 tokens a batch; the longest stage has 1000 batches, so that 1 batch becomes 1/10
SPEC = {
    'name': 'large',
    'folder': '/elsewhere/runs/large',
    'nproc': 8,
    'variables': {'remote': 's3://bucket'},
    'data': {
        'old': {'remote': '${variables.remote}/old', 'local': '/cache/old', 'stand_in_for': 'something'},
        'new': {'remote': '${variables.remote}/new'},
    },
    'stages': {
        'old': {'max_duration': '1000000tok'},
        'new': {'max_duration': '254ba', 'callbacks': {'final_loss': {'window': '9ba'}}},
    },
    'arms': {
        'plain': {},
        'high': {
            'new': {
                'optimizer': {'lr': 6.0e-4, 'weight_decay': 6.0e-5},
                'scheduler': {'t_warmup': '0.02dur'},
                'precision': 'amp_bf16',
            }
        },
        'infinite': {
            'common': {
                'scheduler': {
                    'name': 'infinite', 't_warmup': '4000tok', 't_cooldown': '100000tok', 't_anneal': '0tok',
                    'alpha_const': 0.5,
                },
            },
            'new': {'branches': {'merge': {'merge': {'last': 2, 'every': '30ba'}}}},
        },
        'union': {'baseline': 'union'},
    },
    'common': {
        'model': {'name': 'mpt_causal_lm', 'd_model': 1024},
        'tokenizer': {'name': 'tokenizer'},
        'max_seq_len': 100,
        'global_train_batch_size': 10,
        'precision': 'amp_bf16',
        'fsdp_config': {'sharding_strategy': 'FULL_SHARD'},
        'optimizer': {'name': 'decoupled_adamw', 'lr': 3.0e-4, 'betas': [0.9, 0.95], 'weight_decay': 3.0e-5},
        'scheduler': {'name': 'rewarm_cosine', 't_warmup': '0.01dur', 'alpha_f': 0.1},
        'callbacks': {
            'final_loss': {'window': '100ba', 'interval': '10ba'},
            'ema': {'half_life': ['7ba', '5ba', '50000tok', '0.01dur']},
            'lawa': {'k': 5, 'interval': '200sp', 'start': '0ba'},
        },
        'train_loader': {'num_workers': 8, 'dataset': {'cache_limit': '500gb', 'shuffle': True}},
    },
}  # fmt: skip
SCALE = {
    'name': 'tiny',
    'folder': 'runs/tiny',
    'data': 'data/tiny',
    'longest_stage': '100ba',
    'lr': 3.0e-3,
    'sequence': {'jobs': 2, 'nproc': None},
    'common': {
        'model': {'name': 'mpt_causal_lm', 'd_model': 16},
        'max_seq_len': 16,
        'global_train_batch_size': 4,
        'precision': 'fp32',
        'fsdp_config': None,
        'callbacks': {'final_loss': {'window': '20ba'}},
        'train_loader': {'num_workers': 1, 'dataset': {'cache_limit': None}},
    },
}


@pytest.fixture
def small():
    return scaled(copy.deepcopy(SPEC), copy.deepcopy(SCALE))


def test_times_keep_their_share_of_the_longest_stage(small):
    # 1000 batches become 100, of 4 x 16 = 64 tokens; 254 become 25.4
    assert small['stages']['old'] == {'max_duration': '6400tok'}
    assert small['stages']['new']['max_duration'] == '25ba'
    # of 4, 100 and 0 batches: never 0 unless it was
    scheduler = small['arms']['infinite']['common']['scheduler']
    assert {key: scheduler[key] for key in ('t_warmup', 't_cooldown', 't_anneal')} == {
        't_warmup': '64tok', 't_cooldown': '640tok', 't_anneal': '0tok',
    }  # fmt: skip
    assert small['arms']['infinite']['new']['branches'] == {'merge': {'merge': {'last': 2, 'every': '3ba'}}}
    # 0.7 and 0.5 batches are both 1; 50 are 5; 20 are 2
    assert small['common']['callbacks']['ema'] == {'half_life': ['1ba', '320tok', '0.01dur']}
    assert small['common']['callbacks']['lawa'] == {'k': 5, 'interval': '8sp', 'start': '0ba'}
    assert small['arms']['high']['new']['scheduler'] == {'t_warmup': '0.02dur'}


def test_learning_rates_and_weight_decay_keep_their_ratios(small):
    optimizer = {'name': 'decoupled_adamw', 'lr': 0.003, 'betas': [0.9, 0.95], 'weight_decay': 0.0003}
    assert small['common']['optimizer'] == optimizer
    assert small['arms']['high']['new']['optimizer'] == {'lr': 0.006, 'weight_decay': 0.0006}
    assert small['common']['scheduler'] == SPEC['common']['scheduler']


def test_what_the_scale_says_wins_everywhere(small):
    common = small['common']
    assert (common['model']['d_model'], common['precision']) == (16, 'fp32')
    assert 'fsdp_config' not in common
    assert common['callbacks']['final_loss'] == {'window': '20ba', 'interval': '1ba'}
    assert common['train_loader'] == {'num_workers': 1, 'dataset': {'shuffle': True}}
    assert small['stages']['new'] == {'max_duration': '25ba', 'callbacks': {'final_loss': {}}}
    assert 'precision' not in small['arms']['high']['new']
    assert small['arms']['union'] == {'baseline': 'union'}
    assert (small['jobs'], small.get('nproc')) == (2, None)


def test_it_is_kept_elsewhere_and_reads_elsewhere(small):
    assert (small['name'], small['folder']) == ('large (tiny)', 'runs/tiny/large')
    assert small['data'] == {
        'old': {'local': 'data/tiny/old', 'stand_in_for': 'something'},
        'new': {'local': 'data/tiny/new'},
    }


def test_nothing_is_changed_in_place():
    spec, scale = copy.deepcopy(SPEC), copy.deepcopy(SCALE)
    scaled(spec, scale)['common']['optimizer']['lr'] = 7
    assert (spec, scale) == (SPEC, SCALE)


def test_it_means_the_same_runs(small):
    large = runs_of({**copy.deepcopy(SPEC), 'variables': None} | {'variables': {}})
    assert [(run.name, run.parent) for run in runs_of(small)] == [(run.name, run.parent) for run in large]
    union = next(run for run in runs_of(small) if run.arm == 'union')
    assert union.stage.tokens_by_stream() == {'new': 25 * 64, 'old': 6400}


@pytest.mark.parametrize(
    ('spec', 'scale', 'message'),
    [
        (
            {},
            {'long_stage': '1ba'},
            r"scale\.long_stage is not a key that anything reads; did you mean 'longest_stage'",
        ),
        ({}, {'lr': ...}, r'scale\.lr is missing'),
        ({}, {'sequence': {'job': 2}}, r"scale\.sequence\.job is not a key that anything reads; did you mean 'jobs'"),
        ({}, {'lr': -1e-3}, r'scale\.lr=-0\.001 must be above 0'),
        ({'common': {**SPEC['common'], 'optimizer': {}}}, {}, r'common\.optimizer\.lr is missing'),
        ({'stages': {'old': {'max_duration': '2ep'}}}, {}, r"stages\.old\.max_duration='2ep' .* tok, ba or sp"),
        ({}, {'longest_stage': '1dur'}, r"scale\.longest_stage='1dur' .* tok, ba or sp"),
    ],
)
def test_what_is_wrong_is_named(spec, scale, message):
    scale = {key: value for key, value in {**SCALE, **scale}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        scaled({**SPEC, **spec}, scale)
