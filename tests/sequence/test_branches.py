# SPDX-License-Identifier: Apache-2.0
"""Branches: where one may start, what it reads and at which learning rate, and that the trunk stays as it is."""

import gc
import json
import sys

import anneal
import numpy as np
import pytest
import recorder
import tiny
import torch

from cpt_algorithms.checkpoints.open import entry_of
from cpt_algorithms.replay.consumed import positions_behind
from cpt_algorithms.replay.functional import Interleaving, MixedSequence, StreamOrder, check_budget, shares_of
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.sequence.branches import annealed, branch_of, constant_alpha
from cpt_algorithms.stage.branch_points import BranchPoints
from cpt_algorithms.stage.stage import Stage

INFINITE = {'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '2ba', 'alpha_const': 0.5, 't_anneal': '0ba'}

# of two half-lives, and two snapshots, one of them in the branch
AVERAGES = {'ema': {'half_life': ['100ba', '0.25dur'], 'start': '1ba'}, 'lawa': {'interval': '3ba'}}


@pytest.fixture
def stage_of(data, tmp_path):
    """A stage with a schedule."""

    def stage_of(scheduler, duration='8ba'):
        given = tiny.config(tmp_path, data, 'trunk', max_duration=duration)
        return Stage.from_yaml({**given, 'scheduler': scheduler})

    return stage_of


@pytest.mark.parametrize(
    ('scheduler', 'duration', 'alphas'),
    [
        (INFINITE, '8ba', {4: 0.5, 6: 0.5, 8: 0.5}),
        ({**INFINITE, 't_warmup': '256tok', 't_cooldown': '256tok', 't_anneal': '0tok'}, '1024tok', {4: 0.5, 8: 0.5}),
        ({'name': 'rewarm_constant', 't_warmup': '2ba'}, '8ba', {2: 1.0, 8: 1.0}),
        ({'name': 'wsd', 't_warmup': '2ba', 't_decay': '2ba'}, '8ba', {2: 1.0, 6: 1.0}),
    ],
)
def test_where_the_learning_rate_is_constant(stage_of, scheduler, duration, alphas):
    trunk = stage_of(scheduler, duration)
    assert {batch: constant_alpha(trunk, batch) for batch in alphas} == alphas


@pytest.mark.parametrize(
    ('scheduler', 'batch', 'message'),
    [
        (INFINITE, 3, r"batch 3 is in the phase 'cooldown' of scheduler\.name=infinite: .* constant, batches 4 to 8"),
        ({**INFINITE, 't_anneal': '2ba'}, 7, r"in the phase 'anneal' .* batches 4 to 6"),
        (
            {'name': 'rewarm_cosine', 't_warmup': '2ba'},
            4,
            r"'decay' of scheduler.name=rewarm_cosine: .*this schedule never is",
        ),
        ({'name': 'cosine_with_warmup', 't_warmup': '2ba'}, 4, 'has no phases that can be looked at'),
    ],
)
def test_where_it_is_not(stage_of, scheduler, batch, message):
    with pytest.raises(ValueError, match=message):
        constant_alpha(stage_of(scheduler), batch)


def test_nothing_to_anneal(stage_of):
    trunk = stage_of({'name': 'rewarm_constant', 't_warmup': '0ba', 'alpha': 0.1})
    with pytest.raises(ValueError, match='alpha_f=0.1: nothing to anneal, the trunk is at 0.1 times the learning rate'):
        annealed(trunk, trunk.given, 'x.pt', 4, '2ba')


def test_streams_go_on_each_by_itself():
    orders = [StreamOrder(np.array([20, 20]), 3), StreamOrder(np.array([10]), 3)]
    mixes = [Interleaving(shares_of(fraction, {'old': 1})) for fraction in (0.25, 0.5)]
    whole, branch = MixedSequence(mixes[0], orders), MixedSequence(mixes[1], orders, starts=[15, 5])
    new = [int(i) for i in whole(np.arange(40)) if i < 40]
    found = [int(i) for i in branch(np.arange(20))]
    assert [i for i in found if i < 40] == new[15:25]
    rest, again = orders[1].one_pass(0)(np.arange(5, 10)), orders[1].one_pass(1)(np.arange(5))
    assert [i - 40 for i in found if i >= 40] == [*rest, *again]
    check_budget(20, mixes[1], {'new': 25, 'old': 15}, 1, 16, {'new': 15, 'old': 5})
    with pytest.raises(ValueError, match=r'reads 400 tokens .*\(240 of them .*384'):
        check_budget(20, mixes[1], {'new': 24, 'old': 15}, 1, 16, {'new': 15, 'old': 5})


MIX = {
    'fraction': '1/4', 'order': 'pretraining', 'shuffle': True, 'shuffle_seed': 5, 'shuffle_block_size': 40,
    'new.web': '400 samples (aa)', 'replay.pile': '300 samples (bb), weight 1', 'replay.code': '200 samples (cc), weight 2',
}  # fmt: skip


def behind(**now):
    state = {'mix': json.dumps(MIX), 'consumed': json.dumps({'new': 12, 'pile': 1, 'code': 3})}
    return positions_behind(state, json.dumps({k: v for k, v in {**MIX, **now}.items() if v is not None}))


def test_what_both_runs_read_in_the_same_role_goes_on():
    assert behind() == {'new': 12, 'pile': 1, 'code': 3}
    reweighted = {'fraction': '1/2', 'replay.pile': '300 samples (bb), weight 7', 'replay.code': None}
    assert behind(**reweighted) == {'new': 12, 'pile': 1}
    assert behind(**{'new.web': '400 samples (dd)'}) == {'pile': 1, 'code': 3}
    assert behind(**{'new.web': 'x (dd)', 'replay.pile': None, 'replay.code': None, 'shuffle_seed': 6}) == {}
    assert behind(**{'new.more': '10 samples (ee)'}) == {'pile': 1, 'code': 3}, 'shuffled together, it is other data'


@pytest.mark.parametrize(
    ('now', 'message'),
    [
        ({'shuffle_seed': 6}, r'it read in another order \(shuffle_seed: 5 -> 6\)'),
        ({'order': 'shuffled'}, r'\(order: pretraining -> shuffled\)'),
    ],
)
def test_another_order_is_refused(now, message):
    with pytest.raises(ValueError, match=message):
        behind(**now)


def test_branch_points_are_batches():
    with pytest.raises(ValueError, match=r"branch_points.at: '8ba' must be a whole number of batches"):
        BranchPoints(['8ba'])


# A real trunk and its branches


@pytest.fixture(scope='module')
def streams(data):
    return {
        'new': {'local': str(data['new']), 'split': 'train'},
        'replay': {'fraction': 0.25, 'streams': {'old': {'local': str(data['old']), 'split': 'train'}}},
    }


@pytest.fixture(scope='module')
def trunk(data, streams, tmp_path_factory):
    """Eight batches, the last four constant; of its checkpoints, those after 4 and 8 batches are left."""
    folder = tmp_path_factory.mktemp('trunk')
    cfg = tiny.config(
        folder, data, 'trunk', scheduler=INFINITE, save_num_checkpoints_to_keep=1, save_interval='3ba',
        train_loader={'dataset': streams}, callbacks={'branch_points': {'at': [4]}, **AVERAGES},
    )  # fmt: skip
    tiny.recipe_here(cfg, folder)
    return folder / 'trunk'


def run(checkpoint, *overrides):
    words, sys.argv = sys.argv, ['anneal.py', str(checkpoint), *map(str, overrides)]
    try:
        anneal.main()
    finally:
        sys.argv = words
        gc.collect()


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file() and path.suffix != '.lock'}


@pytest.mark.long
def test_branch_points_stay(trunk):
    assert sorted(path.name for path in trunk.glob('ep0-*')) == ['ep0-ba4-rank0.pt', 'ep0-ba8-rank0.pt']


def test_a_branch_is_what_the_trunk_would_have_been(trunk, data, streams, tmp_path):
    before = contents(trunk)
    branch = tmp_path / 'branch'
    run(
        trunk / 'ep0-ba4-rank0.pt', 't_anneal=4ba', 'anneal=linear', 'alpha_f=0.0', f'save_folder={branch}',
        f'callbacks.recorder.path={tmp_path / "branch.jsonl"}',
    )  # fmt: skip
    assert contents(trunk) == before
    whole = tiny.config(
        tmp_path, data, 'whole', train_loader={'dataset': streams}, callbacks=AVERAGES,
        scheduler={**INFINITE, 't_anneal': '4ba', 'anneal': 'linear', 'alpha_f': 0.0},
    )  # fmt: skip
    straight, branched = tiny.run(whole), recorder.read(tmp_path / 'branch.jsonl')
    assert sorted(branched) == [0, 1, 2, 3]
    for batch in range(4):
        theirs, ours = straight[4 + batch], branched[batch]
        assert sorted(ours['rows']) == sorted(theirs['rows']), 'the data is read on'
        assert ours['lr'] == pytest.approx(theirs['lr'])
        assert ours['adam_step'] == theirs['adam_step'], 'the optimizer is kept'
        assert float.fromhex(ours['loss']) == pytest.approx(float.fromhex(theirs['loss']), rel=1e-5)
    stage = json.loads((branch / 'stage.json').read_text())
    assert stage['run_name'] == 'trunk-anneal-ba4'
    assert (
        stage['parent'] == stage['config']['train_loader']['dataset']['resume_after'] == str(trunk / 'ep0-ba4-rank0.pt')
    )
    assert list((branch / 'huggingface').glob('ba4/model.safetensors'))
    ours, theirs = (averages(folder) for folder in (branch, tmp_path / 'whole'))
    assert ours.keys() == theirs.keys() and len(ours) == 4 * len({key[-1] for key in ours})
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=5e-5)  # a step is 1e-3


def averages(folder):
    """Every tensor of the averages in a run's latest checkpoint."""
    callbacks = torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['callbacks']
    kept = {'EMA': 'averages', 'LAWA': 'window'}
    return {
        (name, number, key): tensor
        for name, group in kept.items()
        for number, tensors in callbacks[name][group].items()
        for key, tensor in tensors.items()
    }


def test_a_branch_with_a_mix_of_its_own_is_continued(trunk, streams, data, tmp_path):
    """From the latest checkpoint, by its link."""
    place = [f'save_folder={tmp_path / "own"}', f'callbacks.recorder.path={tmp_path / "own.jsonl"}']
    how = ['t_anneal=4ba', 'train_loader.dataset.replay.fraction=0.5', *place]
    run(trunk / 'latest-rank0.pt', *how)
    rows = [tuple(row) for line in recorder.read(tmp_path / 'own.jsonl').values() for row in line['rows']]
    read = [tuple(row) for line in recorder.read(trunk.parent / 'trunk.jsonl').values() for row in line['rows']]
    assert sorted(row[0] for row in rows) == [0] * 16 + [1] * 16
    assert not set(rows) & set(read), 'nothing is read twice'


@pytest.mark.parametrize(
    ('checkpoint', 'words', 'message'),
    [
        ('ep0-ba4-rank0.pt', [], 't_anneal is missing'),
        ('stage.json', ['t_anneal=2ba'], 'is no checkpoint of continue_pretraining.py'),
        ('nothing/ep0-ba4-rank0.pt', ['t_anneal=2ba'], 'is no checkpoint'),
        ('ep0-ba3-rank0.pt', ['t_anneal=2ba'], "batch 3 is in the phase 'cooldown'"),
        ('ep0-ba6-rank0.pt', ['t_anneal=2ba'], 'ep0-ba6-rank0.pt does not exist'),
        ('ep0-ba4-rank0.pt', ['t_anneal=2ba', 'save_folder=TRUNK'], 'holds the checkpoints of run .trunk.'),
        ('ep0-ba4-rank0.pt', ['t_anneal=2ba', 'max_duration=9ba'], 'max_duration: a branch has this from its trunk'),
        ('ep0-ba4-rank0.pt', ['t_anneal=2ba', 'train_loader.dataset.shuffle_seed=3'], 'it read in another order'),
    ],
)
def test_what_is_no_branch_is_refused(trunk, checkpoint, words, message, tmp_path):
    with pytest.raises((SystemExit, ValueError), match=message):
        run(trunk / checkpoint, f'save_folder={tmp_path / "b"}', *(word.replace('TRUNK', str(trunk)) for word in words))


def test_other_data_takes_the_place_of_the_trunks(trunk):
    other = 'train_loader.dataset.new={local: books, split: train}'
    dataset = branch_of(str(trunk / 'ep0-ba4-rank0.pt'), ['t_anneal=2ba', other]).given['train_loader']['dataset']
    assert dataset['new'] == {'local': 'books', 'split': 'train'}
    assert list(dataset['replay']['streams']) == ['old']
    other = 'train_loader.dataset.replay.streams={more: {local: more, split: train}}'
    dataset = branch_of(str(trunk / 'ep0-ba4-rank0.pt'), ['t_anneal=2ba', other]).given['train_loader']['dataset']
    assert (dataset['replay']['fraction'], list(dataset['replay']['streams'])) == (0.25, ['more'])
    assert list(dataset['new']) == ['local', 'split']


@pytest.fixture
def judged(data, streams, tmp_path):
    """A trunk with ``forgetting``, saved as llm-foundry's published YAMLs do, and moved since."""
    tiny.recipe_here(tiny.config(tmp_path, data, 'base', max_duration='2ba', scheduler={'t_max': '8ba'}), tmp_path)
    cfg = tiny.config(
        tmp_path, data, 'judged', scheduler=INFINITE, save_folder=f'{tmp_path}/{{run_name}}', save_interval='4ba',
        load_path=str(tmp_path / 'base' / 'latest-rank0.pt'), eval_loader=[tiny.eval_loader('new', data['new'])],
        train_loader={'dataset': streams}, callbacks={'forgetting': {'new': ['new']}},
    )  # fmt: skip
    tiny.recipe_here(cfg, tmp_path)
    moved = tmp_path / 'elsewhere' / 'trunk'
    moved.parent.mkdir()
    (tmp_path / 'judged').rename(moved)
    return moved


def test_a_branch_is_judged_against_the_parent_of_its_trunk_wherever_that_lies(judged, tmp_path):
    losses = judged / 'forgetting.json'
    theirs = json.loads(losses.read_text())
    (tmp_path / 'judged').mkdir()  # another run lies there now
    (tmp_path / 'judged' / 'forgetting.json').write_text(json.dumps({**theirs, 'parent': {'new': 99.0}}))
    words = ['t_anneal=2ba', f'callbacks.recorder.path={tmp_path / "branch.jsonl"}']
    spoilt = {
        'does not exist; name that of the run whose parent': None,
        'is no forgetting.json; name': '[1]',
        'cannot be read: ': '{',
        "the parent was not evaluated on 'new'": '{"parent": {"old": 1.0}}',
    }
    for message, content in spoilt.items():
        losses.unlink() if content is None else losses.write_text(content)
        with pytest.raises(SystemExit, match=rf'callbacks.forgetting.parent_losses(=|: ){losses}.* ?{message}'):
            run(judged / 'ep0-ba4-rank0.pt', *words)
    losses.write_text(json.dumps(theirs))
    with pytest.raises(SystemExit, match=r'the parent was judged otherwise \(eval_subset_num_batches: -1 -> 1; '):
        run(judged / 'ep0-ba4-rank0.pt', *words, 'eval_subset_num_batches=1')
    run(judged / 'ep0-ba4-rank0.pt', *words)
    ours = json.loads((judged.parent / 'judged-anneal-ba4' / 'forgetting.json').read_text())
    assert ours['parent'] == theirs['parent']
    losses.unlink()
    run(judged / 'ep0-ba4-rank0.pt', *words)  # which has its own


def test_what_was_read_before_counts(trunk, streams):
    dataset = ReplayTextDataset(
        tokenizer=None, max_seq_len=tiny.SEQ_LEN, batch_size=8, shuffle=True, shuffle_seed=9176, **streams,
        resume_after=str(trunk / 'ep0-ba4-rank0.pt'),
    )  # fmt: skip
    assert json.loads(dataset.state_dict(16, True)['consumed']) == {'new': 24 + 12, 'old': 8 + 4}
    dataset.check_budget(400)
    with pytest.raises(ValueError, match=r'of the new data \(384 of them before it begins\), which has 6,400'):
        dataset.check_budget(600)


@pytest.mark.slow
def test_two_ranks_branch_off_a_sharded_trunk_and_are_killed(data, streams, tmp_path):
    """FSDP2: an anneal killed on the way, and a merge, of a trunk that one rank would have trained on alike."""
    recipes = tiny.ROOT / 'recipes'
    sharded = {'fsdp_config': {'state_dict_type': 'sharded'}}
    mix = {'train_loader': {'dataset': streams}}
    judged = {'final_loss': {'window': '4ba', 'interval': '2ba'}}
    cfg = tiny.config(
        tmp_path, data, 'trunk', scheduler=INFINITE, save_num_checkpoints_to_keep=1, save_interval='8ba', **mix, **sharded,
        callbacks={'branch_points': {'at': [4, 6]}, **judged, **AVERAGES}, eval_loader=[tiny.eval_loader('new', data['new'])],
    )  # fmt: skip
    tiny.launch(tiny.RECIPE, tiny.save(cfg, tmp_path / 'trunk.yaml'))
    trunk = tmp_path / 'trunk'
    assert sorted(path.name for path in trunk.glob('ep0-*')) == ['ep0-ba4', 'ep0-ba6', 'ep0-ba8']
    before = contents(trunk)
    words = [
        trunk / 'ep0-ba4', 't_anneal=4ba', 'anneal=linear', 'alpha_f=0.0', f'save_folder={tmp_path / "branch"}',
        'save_interval=2ba', f'callbacks.recorder.path={tmp_path / "branch.jsonl"}',
    ]  # fmt: skip
    tiny.launch(recipes / 'anneal.py', *words, 'callbacks.recorder.kill_at=3', expect=tiny.KILLED)
    tiny.launch(recipes / 'anneal.py', *words)
    whole = tiny.config(
        tmp_path, data, 'whole', scheduler={**INFINITE, 't_anneal': '4ba', 'anneal': 'linear', 'alpha_f': 0.0}, **mix
    )
    straight = tiny.run(whole)
    ranks = [recorder.read(tmp_path / 'branch.jsonl', rank) for rank in (0, 1)]
    for batch in range(4):
        rows = [row for lines in ranks for row in lines[batch]['rows']]
        assert sorted(rows) == sorted(straight[4 + batch]['rows'])
        assert ranks[0][batch]['lr'] == pytest.approx(straight[4 + batch]['lr'])
        assert ranks[0][batch]['adam_step'] == straight[4 + batch]['adam_step']
    # on both ranks, the sums of squares have been compared
    ema, lawa = (
        json.loads(entry_of(tmp_path / 'branch' / 'ep0-ba4', f'state.callbacks.{name}.meta'))
        for name in ('EMA', 'LAWA')
    )
    assert ema['clocks']['ema_100ba'] == {'unit': 'ba', 'begin': 1, 'last': 8}
    assert (lawa['at']['ba'], lawa['square_sum'].keys()) == (8, {'3', '6'}), 'snapshots of batch 3 and 6'
    merge = {'of': str(trunk), 'batch': 8, 'last': 3, 'every': '2ba', 'weights': 'uniform'}
    merged = {
        **cfg, 'run_name': 'merged', 'save_folder': str(tmp_path / 'merged'), 'max_duration': '0ba',
        'variables': {'merge': merge}, 'callbacks': {'stage_start': {}, **judged},
    }  # fmt: skip
    tiny.launch(recipes / 'merge.py', tiny.save(merged, tmp_path / 'merged.yaml'))
    losses = json.loads((tmp_path / 'merged' / 'losses.json').read_text())['losses']
    (point,), *_ = [rows for label, rows in losses.items() if label == 'new']
    assert point[:2] == [0, 0]
    assert 4 < point[2] < 8
    assert (tmp_path / 'merged' / 'huggingface' / 'ba8' / 'model.safetensors').exists()
    assert contents(trunk) == before
