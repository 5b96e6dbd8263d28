# SPDX-License-Identifier: Apache-2.0
"""The learning-rate-on-load contract, in real runs of llm-foundry: a table of parents, and what must be refused."""

import math

import pytest
import tiny

from cpt_algorithms.stage.saving import StoppedError
from cpt_algorithms.stage.stage_start import KEEP_OPTIMIZER_IGNORE_KEYS

PARENTS = {
    'same': {},
    'other base lr': {'optimizer': {'name': 'decoupled_adamw', 'lr': 7e-2, 'betas': [0.9, 0.95], 'weight_decay': 1e-5}},
    'other weight decay': {
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-3, 'betas': [0.8, 0.9], 'weight_decay': 0.3}
    },
    'stock scheduler': {'scheduler': {'name': 'cosine_with_warmup', 't_warmup': '2ba', 'alpha_f': 0.0}},
    'no stage_start': {'callbacks': {'stage_start': None}},
}
LOAD = {
    'reset': {'load_weights_only': True},
    'keep': {'load_weights_only': False, 'load_ignore_keys': KEEP_OPTIMIZER_IGNORE_KEYS},
}


@pytest.fixture(scope='module')
def parents(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('parents')
    paths = {}
    for number, (name, over) in enumerate(PARENTS.items()):
        cfg = tiny.config(folder, data, f'parent{number}', **{'max_duration': '6ba', 'save_interval': '3ba', **over})
        tiny.run(cfg)
        paths[name] = folder / f'parent{number}' / 'ep0-ba3-rank0.pt'
        assert paths[name].exists()
    return paths


def planned(batch: int) -> float:
    """rewarm_cosine of tiny.config by hand: 0.25 -> 1 over 4 batches, cosine to 0.1 at batch 8; lr 1e-3."""
    if batch < 4:
        return 1e-3 * (0.25 + 0.75 * batch / 4)
    return 1e-3 * (0.1 + 0.9 / 2 * (1 + math.cos(math.pi * (batch - 4) / 4)))


@pytest.mark.parametrize('optimizer', ['reset', 'keep'])
@pytest.mark.parametrize('parent', PARENTS)
def test_a_stage_obeys_its_own_yaml_from_its_first_step(parents, parent, optimizer, data, tmp_path):
    cfg = tiny.config(
        tmp_path, data, 'child', load_path=str(parents[parent]), **LOAD[optimizer],
        callbacks={'stage_start': {'optimizer_state': optimizer}},
    )  # fmt: skip
    lines = tiny.run(cfg)
    assert sorted(lines) == list(range(8))
    for batch, line in lines.items():
        assert line['lr'] == pytest.approx([planned(batch)], rel=1e-12)
        assert line['initial_lr'] == [1e-3]
        assert line['base_lrs'] == [1e-3]
        assert line['weight_decay'] == [1e-5]
        # Adam has taken this many steps before: the parent's three if its optimizer was kept
        assert line['adam_step'] == batch + (3 if optimizer == 'keep' else 0)


def test_stock_scheduler_also_obeys_at_the_first_step(parents, data, tmp_path):
    cfg = tiny.config(
        tmp_path, data, 'child', load_path=str(parents['other base lr']), **LOAD['keep'],
        callbacks={'stage_start': {'optimizer_state': 'keep'}},
        scheduler={'name': 'constant_with_warmup', 't_warmup': '0ba', 'alpha': 0.5},
    )  # fmt: skip
    assert [line['lr'] for line in tiny.run(cfg).values()] == [[5e-4]] * 8


TAKES_TIME_OVER = {
    'full load': {},  # everything: the parent's learning rate, time and data position
    'ignores optimizers': {'load_ignore_keys': ['state/optimizers*']},  # the old base LR comes back after one batch
    'ignores schedulers*': {'load_ignore_keys': ['state/schedulers*']},  # frozen for the whole run if sharded
    'ignores both': {'load_ignore_keys': ['state/optimizers*', 'state/schedulers*', 'state/dataset_state']},
}


@pytest.mark.parametrize(
    ('parent', 'load'),
    [*((parent, 'full load') for parent in PARENTS), *(('same', load) for load in [*TAKES_TIME_OVER][1:])],
)
def test_a_load_that_takes_over_the_parents_time_is_refused(parents, parent, load, data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'child', load_path=str(parents[parent]), **TAKES_TIME_OVER[load])
    with pytest.raises(ValueError, match='To start a stage from it, set load_weights_only: true'):
        tiny.run(cfg)
    assert not (tmp_path / 'child.jsonl.rank0').exists(), 'it must not train'


def test_keep_without_a_loaded_optimizer_is_refused(parents, data, tmp_path):
    cfg = tiny.config(
        tmp_path, data, 'child', load_path=str(parents['same']), load_weights_only=True,
        callbacks={'stage_start': {'optimizer_state': 'keep'}},
    )  # fmt: skip
    with pytest.raises(ValueError, match="the parent's optimizer state was not loaded; set load_weights_only: false"):
        tiny.run(cfg)
    with pytest.raises(ValueError, match='there is no load_path'):
        tiny.run(tiny.merge(cfg, {'load_path': None, 'load_weights_only': None}))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        # the same learning rate at the batch where it resumes, and another one later
        ({'scheduler': {'name': 'rewarm_cosine', 't_warmup': '4ba', 'alpha_i': 0.25, 'alpha_f': 0.5, 't_max': '8ba'}}, r'alpha_f: 0\.1 -> 0\.5'),
        # without the comparison, Composer trains on with half of the parameters
        ({'optimizer': {'disable_grad': 'wte'}}, r'optimizer\.disable_grad: absent -> wte'),
    ],
)  # fmt: skip
def test_a_restart_changes_nothing(change, message, data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'run', save_interval='4ba', callbacks={'recorder': {'kill_at': None}})
    cfg = tiny.merge(cfg, {'scheduler': {'t_max': '8ba'}})
    tiny.run(tiny.merge(cfg, {'max_duration': '4ba'}))
    with pytest.raises(ValueError, match=message):
        tiny.run(tiny.merge(cfg, change))
    lines = tiny.run(cfg)  # and as it was, it goes on
    assert sorted(lines) == list(range(8))
    assert [lines[b]['lr'][0] for b in range(8)] == pytest.approx([planned(b) for b in range(8)], rel=1e-12)


def test_the_end_of_an_infinite_schedule_may_move_and_no_other_may(data, tmp_path):
    infinite = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '1ba', 'alpha_const': 0.5, 't_anneal': '0ba'}
    cfg = tiny.config(tmp_path, data, 'trunk', scheduler=infinite, max_duration='4ba')
    tiny.run(cfg)
    lines = tiny.run(tiny.merge(cfg, {'max_duration': '6ba'}))
    assert [lines[batch]['lr'] for batch in range(3, 6)] == [[5e-4]] * 3
    cosine = tiny.config(
        tmp_path, data, 'cosine', scheduler={'name': 'rewarm_cosine', 't_warmup': '1ba'}, max_duration='4ba'
    )
    tiny.run(cosine)
    with pytest.raises(ValueError, match=r'max_duration: .*4.* -> .*6'):
        tiny.run(tiny.merge(cosine, {'max_duration': '6ba'}))


def test_another_runs_folder_is_not_resumed_from(data, tmp_path):
    tiny.run(tiny.config(tmp_path, data, 'one', max_duration='2ba', scheduler={'t_max': '8ba'}))
    cfg = tiny.config(tmp_path, data, 'two', save_folder=str(tmp_path / 'one'))
    with pytest.raises(ValueError, match="holds the checkpoints of run 'one', and run_name is 'two', with other"):
        tiny.run(cfg)


def test_a_run_is_known_by_its_folder_and_not_by_its_name(data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'one', max_duration='4ba', scheduler={'t_max': '8ba'}, save_interval='1ba')
    lines = tiny.run(cfg)
    (tmp_path / 'one').rename(tmp_path / 'two')
    for batch in (3, 4):
        (tmp_path / 'two' / f'ep0-ba{batch}-rank0.pt').unlink()
    (tmp_path / 'two' / 'latest-rank0.pt').unlink()
    (tmp_path / 'two' / 'latest-rank0.pt').symlink_to('ep0-ba2-rank0.pt')
    renamed = {**cfg, 'run_name': 'two', 'save_folder': str(tmp_path / '{run_name}')}
    assert tiny.run(renamed) == lines, 'the recorder refuses other batches'
    whole = {'load_path': str(tmp_path / 'two' / 'ep0-ba2-rank0.pt'), 'load_weights_only': False}
    with pytest.raises(ValueError, match="ep0-ba2-rank0.pt was loaded whole, at batch 2 of run 'one'"):
        tiny.run({**cfg, **whole, 'run_name': 'three', 'save_folder': str(tmp_path / 'three')})


def test_a_changed_stock_mix_is_refused(data, tmp_path):
    def loader(proportion):
        streams = {
            name: {'local': str(data[name]), 'split': 'train', 'proportion': share}
            for name, share in (('new', proportion), ('old', 1 - proportion))
        }
        return {
            'name': 'text', 'drop_last': True, 'num_workers': 0, 'prefetch_factor': None, 'persistent_workers': False,
            'dataset': {'streams': streams, 'max_seq_len': tiny.SEQ_LEN, 'shuffle': True},
        }  # fmt: skip

    cfg = tiny.config(tmp_path, data, 'run', scheduler={'t_max': '8ba'}, save_interval='4ba')
    tiny.run({**cfg, 'train_loader': loader(0.75), 'max_duration': '4ba'})
    with pytest.raises(ValueError, match=r'streams\.new\.proportion: 0\.75 -> 0\.5'):
        tiny.run({**cfg, 'train_loader': loader(0.5)})


def test_too_little_data_is_said_before_the_first_batch(data, tmp_path):
    cfg = tiny.config(
        tmp_path, data, 'run', max_duration=f'{51 * tiny.TOKENS_PER_BATCH}tok', scheduler={'t_warmup': '0tok'}
    )
    with pytest.raises(StoppedError, match='too little data: a budget of 6,528 tokens'):
        tiny.run(cfg)
    assert not (tmp_path / 'run.jsonl.rank0').exists()
