# SPDX-License-Identifier: Apache-2.0
"""Final losses and forgetting, against numbers one can check by hand and a real run."""

import json
from math import inf, log, nan, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from composer.core import Time, Timestamp

from cpt_algorithms.evaluation.final_loss import FinalLoss
from cpt_algorithms.evaluation.functional import (
    Mean,
    adaptation,
    check_labels,
    cuts_of,
    final_loss,
    flips,
    forgetting,
    has_diverged,
    has_same_items,
    in_final_window,
    is_accuracy,
    is_point,
    mean_over_tasks,
    name_of_point,
    paired_delta,
    score,
    shots_of,
    split_label,
    steps_saved,
    training_flops,
    within_noise,
)


def test_final_loss_by_hand():
    mean = final_loss([2.0, 2.2, 2.4])
    assert mean.value == pytest.approx(2.2)
    assert mean.stderr == pytest.approx(0.2 / 3**0.5)  # sample deviation 0.2
    assert final_loss([2.5]).stderr == 0
    with pytest.raises(ValueError, match='^no loss was evaluated .* is max_duration reached.$'):
        final_loss([])


def test_window_is_the_last_100_every_10():
    assert [left for left in range(200) if in_final_window(left, 100, 10)] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]


@pytest.mark.parametrize('tokens', [1_000_000, 1_003_520, 4096 * 245 + 1])
def test_a_budget_that_is_not_whole_batches_still_gives_ten(tokens):
    # the last batch passes max_duration; batches are counted as Composer trains them
    callback, state = FinalLoss(), SimpleNamespace(max_duration=Time(tokens, 'tok'), dataloader_len=None)
    batches = -(-tokens // 4096)
    inside = []
    for batch in range(1, batches + 1):
        state.timestamp = Timestamp(batch=batch, token=4096 * batch)
        if callback._in_final_window(state):
            inside.append(batch)
    assert inside == list(range(batches - 90, batches + 1, 10))


def test_an_extended_run_has_one_final_window():
    callback = FinalLoss(window='4ba', interval='2ba')
    # it was to end at batch 8, and was extended to 16
    callback.losses = {
        'x': [[b, 0, 3.0, 1.0] for b in (6, 8)] + [[12, 0, 9.0, 0.0], [14, 0, 2.0, 1.0], [16, 0, 1.0, 1.0]]
    }
    assert callback.final() == {'x': {'mean': 1.5, 'stderr': 0.5, 'count': 2}}


def test_a_run_that_one_dataset_stops_ends_with_the_losses_of_all(monkeypatch):
    """Composer's early stopper ends it between two evaluations, and only the later one sees that it is over."""
    callback, logged = FinalLoss(window='4ba', interval='2ba'), {}
    callback.losses = {'x': [[6, 0, 3.0, 0.0], [7, 0, 2.0, 0.0]], 'y': [[6, 0, 3.0, 0.0], [7, 0, 4.0, 1.0]]}
    over = SimpleNamespace(
        timestamp=Timestamp(batch=7), max_duration=Time.from_batch(7), evaluators=[SimpleNamespace(label=f'eval/{name}') for name in 'xy'],
        device=SimpleNamespace(name='cpu'),
    )  # fmt: skip
    monkeypatch.setattr('cpt_algorithms.evaluation.final_loss.batches_left', lambda state: 0)
    callback.eval_after_all(over, SimpleNamespace(log_metrics=logged.update))
    assert (logged['final_loss/x'], logged['final_loss/y'], logged['final_loss/mean']) == (2.0, 4.0, 3.0)


def test_device_time_is_that_of_the_ranks_which_trained(monkeypatch):
    clock = iter([0, 10, 100, 105])
    monkeypatch.setattr(f'{FinalLoss.__module__}.time.monotonic', lambda: next(clock))
    callback, state = FinalLoss(), SimpleNamespace(evaluators=[], previous_timestamp=Timestamp(), total_loss_dict={})
    for ranks in (8, 2):  # ten seconds on eight, and restarted, five on two
        monkeypatch.setattr(f'{FinalLoss.__module__}.dist.get_world_size', lambda ranks=ranks: ranks)
        kept, callback = callback.state_dict(), FinalLoss()
        callback.load_state_dict(kept)
        callback.fit_start(state, None)
        callback.batch_end(state, None)
    assert callback.device_seconds == 8 * 10 + 2 * 5
    callback.load_state_dict({'losses': '{}'})  # of a checkpoint before there were any


def test_signs_and_flops():
    assert forgetting(2.44, 2.17) == pytest.approx(0.27)  # Pile after SlimPajama without replay, 405 M
    assert adaptation(2.5, 3.0) == pytest.approx(0.5)
    assert forgetting(2.17, 2.17) == 0
    assert training_flops(10, 100) == 6000


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'window': '100tok'}, r"final_loss\.window='100tok'"),
        ({'window': 100}, r'final_loss\.window=100 '),
        ({'window': '0ba', 'interval': '0ba'}, r'final_loss\.interval=0ba'),
        ({'window': '5ba', 'interval': '10ba'}, 'final_loss.interval=10ba .* window=5ba'),
    ],
)
def test_bad_windows_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FinalLoss(**kwargs)


@pytest.mark.parametrize('duration', ['8ba', pytest.param(f'{8 * tiny.TOKENS_PER_BATCH}tok', marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_real_run_evaluates_its_final_window_and_a_restart_keeps_it(duration, data, tmp_path):
    def cfg(name):
        scheduler = {'name': 'rewarm_constant', 't_warmup': '0.5dur'}
        loaders = [tiny.eval_loader('fresh', data['new']), tiny.eval_loader('past', data['old'])]
        final = {'save_folder': str(tmp_path / name), 'window': '6ba', 'interval': '2ba'}
        return tiny.config(
            tmp_path, data, name, max_duration=duration, scheduler=scheduler, eval_loader=loaders,
            eval_interval='5ba', eval_first=True, save_interval='1ba', save_num_checkpoints_to_keep=-1,
            callbacks={'final_loss': final},
        )  # fmt: skip

    tiny.run(cfg('straight'))
    straight = json.loads((tmp_path / 'straight' / 'losses.json').read_text())
    assert sorted(straight['losses']) == ['fresh', 'past']
    # at the start, at the usual interval, and with 4, 2 and 0 batches left
    assert [row[0] for row in straight['losses']['past']] == [0, 4, 5, 6, 8]
    assert [row[1] for row in straight['losses']['past']] == [b * tiny.TOKENS_PER_BATCH for b in (0, 4, 5, 6, 8)]
    window = [row[2] for row in straight['losses']['past'] if row[0] in (4, 6, 8)]
    assert straight['final']['past']['mean'] == pytest.approx(sum(window) / 3)
    assert straight['final']['past']['count'] == 3

    tiny.run(cfg('again'))
    (tmp_path / 'again' / 'latest-rank0.pt').unlink()
    (tmp_path / 'again' / 'latest-rank0.pt').symlink_to('ep0-ba5-rank0.pt')  # as if killed after batch 5
    for batch in (6, 7, 8):
        (tmp_path / 'again' / f'ep0-ba{batch}-rank0.pt').unlink()
    (tmp_path / 'again' / 'losses.json').unlink()
    tiny.run(cfg('again'))
    again = json.loads((tmp_path / 'again' / 'losses.json').read_text())
    assert again['cost'].pop('device_seconds') > 0 < straight['cost'].pop('device_seconds')
    assert again == straight


def test_steps_saved_by_hand():
    raw = [[100, 5.0], [200, 4.0], [300, 3.2], [400, 3.0], [500, 2.8]]
    # the last 200 batches have the mean 2.9 (at 400 and 500), which the average passes half-way from 200 to 300
    averaged = [[100, 5.5], [200, 3.1], [300, 2.7], [400, 2.6], [500, 2.6]]
    assert steps_saved(raw, averaged, window=200) == pytest.approx(1 - 250 / 400)
    assert steps_saved(raw, [[100, 5.0], [500, 3.0]], window=200) is None
    # as good at an evaluation; at its first one
    assert steps_saved(raw, [[100, 5.0], [200, 2.9], [300, 2.9]], window=200) == 1 - 200 / 400
    assert steps_saved(raw, [[300, 2.8], [400, 2.85], [500, 2.8]], window=200) == 1 - 300 / 400


@pytest.mark.parametrize(
    ('losses', 'diverged'),
    [
        ([], False),
        ([5.0], False),
        ([1.0, 1.0 + log(2)], False),
        ([1.0, 1.0 + log(2) + 1e-9], True),
        ([1.0, 2.75], True),
        ([3.0] * 10 + [1.0] + [3.0] * 9, True),
        # means of two: 3.0 and 2.6 at the end, where a single one would be enough
        ([2.0] * 39 + [4.0], True),
        ([2.0] * 39 + [3.2], False),
        # twenty parts of 21: the last is of two
        ([2.0] * 20 + [3.2], False),
        # the lowest mean of two is 2.0, the lowest loss 1.0
        ([4.0] * 10 + [3.0, 1.0] + [4.0] * 26 + [2.72] * 2, True),
        ([4.0] * 10 + [3.0, 1.0] + [4.0] * 26 + [2.68] * 2, False),
        # the first loss by itself, and no other
        ([1.0, 5.0] + [3.0] * 38, True),
        ([5.0, 1.0] + [3.0] * 38, False),
        # what ends as no number
        ([2.0] * 39 + [nan], True),
        ([nan] * 5 + [2.0] * 35, False),
        ([nan] * 5 + [1.0] * 33 + [2.0] * 2, True),
        ([2.0] * 39 + [inf], True),
    ],
)
def test_diverged_by_hand(losses, diverged):
    assert has_diverged(losses) is diverged


def test_score_by_hand():
    # 1 of 4: variance of the items 3/16 * 4/3 = 1/4, of the mean 1/16
    assert score([1, 0, 0, 0], [1, 1, 1, 1]) == Mean(0.25, 0.25, 4)
    # 6 bits on 2 bytes: residuals 4 - 3 and 2 - 3; sqrt(2/1 * 2) / 2
    assert score([4, 2], [1, 1]) == Mean(3, 1, 2)
    # 9 bits on 3 bytes: 2 - 3 and 7 - 6; sqrt(2 * 2) / 3
    assert score([2, 7], [1, 2]) == Mean(3, 2 / 3, 2)
    assert score([0.5], [1]) == Mean(0.5, 0, 1)
    with pytest.raises(ValueError, match='^there is no item$'):
        score([], [])


def test_paired_delta_by_hand():
    # +1 -1 +1 0: mean 1/4, squares 3 - 4/16, sqrt(11/4 * 4/3) / 4
    delta = paired_delta([1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1])
    assert delta.value == 0.25 and delta.stderr == pytest.approx(sqrt(11 / 3) / 4)
    # what both share cancels, whatever the items' spread
    assert paired_delta([10, 3, 8], [9, 2, 7], [1, 1, 1]) == Mean(1, 0, 3)


def test_flips_by_hand():
    # of 8 items of 3 choices: 2 lost, 1 gained, 3 right and 2 wrong in both; 2 of 8 wrong, so 1 of 8 by luck each way
    ours, theirs = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 1, 0, 0, 1, 1, 0]
    found = flips([(ours, theirs)], [3] * 8)
    assert found is not None
    assert (found.lost, found.gained) == (score([0] * 5 + [1, 1, 0], [1] * 8), score([0] * 7 + [1], [1] * 8))
    assert found.chance == pytest.approx(1 / 8)
    assert found.truly_lost.value == pytest.approx((2 / 8 - 1 / 8) * 3 / 2)
    assert found.truly_gained.value == pytest.approx(0)
    reverse = flips([(theirs, ours)], [3] * 8)
    assert reverse is not None and reverse.truly_gained.value == pytest.approx((2 / 8 - 1 / 8) * 3 / 2)
    certain = flips([(ours, theirs)], [1] * 8)
    assert certain is not None and certain.chance == 0 and certain.truly_lost == certain.lost
    # nothing can be guessed where nothing is chosen, and bits are neither right nor wrong
    free = flips([(ours, theirs)], [])
    assert free is not None and free.chance == 0 and free.truly_lost == free.lost
    assert flips([([0.5, 1], [1, 1])], []) is None
    # of two seeds the mean, item by item
    both = flips([(ours, theirs), (theirs, ours)], [3] * 8)
    assert both is not None and both.lost.value == both.gained.value == pytest.approx(3 / 16)
    # items of other numbers of choices count for themselves: 0 of 2 wrong in both, 1 of 2 choices, 1 of 5
    mixed = flips([([0, 0, 1], [0, 0, 1])], [2, 5, 2])
    assert mixed is not None and mixed.chance == pytest.approx((1 + 1 / 4) / 3)


def test_guessing_alone_loses_nothing_and_intervals_hold_what_is_lost():
    # knows 30 % of items and guesses the rest among 4; then nothing changes, or a third is lost and 5 % are learned
    draws, inside, trials, count = np.random.default_rng(3), [0, 0, 0], 300, 400
    for _ in range(trials):
        knew = draws.random(count) < 0.3
        later = (knew & (draws.random(count) < 2 / 3)) | (~knew & (draws.random(count) < 0.05))
        before, same, now = ((known | (draws.random(count) < 1 / 4)).astype(int) for known in (knew, knew, later))
        unchanged, changed = (flips([(each.tolist(), before.tolist())], [4] * count) for each in (same, now))
        assert unchanged is not None and changed is not None
        pairs = [(unchanged.truly_lost, 0), (changed.truly_lost, 0.1), (changed.truly_gained, 0.7 * 0.05)]
        inside = [
            n + (abs(mean.value - is_so) < 1.96 * mean.stderr) for n, (mean, is_so) in zip(inside, pairs, strict=True)
        ]
        kept = flips([(before.tolist(), before.tolist())], [4] * count)
        # who keeps his guesses has lost nothing, and no more is said than that at least nothing was
        assert kept is not None and kept.lost.value == 0 and kept.truly_lost.value < 0
    # of 300 intervals that hold 95 %, at least 273 hold it but for 1 in 1000
    assert min(inside) >= 273


def test_within_noise():
    assert within_noise(Mean(0.195, 0.1, 9)) and within_noise(Mean(-0.195, 0.1, 9)) and within_noise(Mean(0, 0, 9))
    assert not within_noise(Mean(0.197, 0.1, 9))
    assert within_noise(Mean(1, 0, 1))  # one item says nothing
    assert not within_noise(Mean(1, 0.1, 2))


def test_labels_by_hand():
    assert split_label('d', ['d', 'e']) == ('d', '')
    assert split_label('d/lawa', ['d']) == ('d', 'lawa') and split_label('a/b/ema_2ba', ['a/b']) == ('a/b', 'ema_2ba')
    assert split_label('x/lawa', ['d']) is None and split_label('d/other', ['d']) is None
    assert is_point(name_of_point(0.5)) and not is_point('lawa')
    check_labels(['d', 'e', 'e_stderrs', 'd interval '])
    for labels, message in (
        (['d', 'mean'], "eval_loader: 'mean' is the mean over all datasets in results; give it another label"),
        (['d', 'e', 'd'], "eval_loader: 2 loaders have the label 'd'; name them differently"),
        (['d', 'e', 'd', 'd'], "eval_loader: 3 loaders have the label 'd'; name them differently"),
        (['d', 'd_stderr'], "eval_loader: a result of 'd' is called 'd_stderr', too; give it another label"),
        (['d interval', 'd'], "eval_loader: a result of 'd' is called 'd interval', too; give it another label"),
        (['d', 'e', 'd/lawa'], "eval_loader: a result of 'd' is called 'd/lawa', too; give it another label"),
    ):
        with pytest.raises(ValueError) as error:
            check_labels(labels)
        assert str(error.value) == message


def test_results_of_tasks_by_hand():
    result = {'higher_is_better': True, 'weights': [1, 1], 'entry': {'a': 1}, 'items': 'x', 'cut': 0, 'prompts': 2000}
    assert is_accuracy(result)
    assert not is_accuracy({**result, 'weights': [1, 2]}) and not is_accuracy({**result, 'higher_is_better': False})
    assert has_same_items(result, {**result, 'prompts': 3})
    for key in ('entry', 'items', 'weights', 'cut'):
        assert not has_same_items(result, {**result, key: 'other'})
        assert not has_same_items({**result, key: 'other'}, {other: result[other] for other in result if other != key})
    assert cuts_of(result) == cuts_of({}) == '' and cuts_of({**result, 'cut': 1500}) == '1,500 of 2,000'
    assert [shots_of(*each) for each in ((None, True), (0, True), (5, False), (5, True))] == ['', '0', '5', '≤ 5']


def test_mean_over_tasks_by_hand():
    assert mean_over_tasks([Mean(0.2, 0.03, 10), Mean(0.6, 0.04, 1000)]) == Mean(0.4, pytest.approx(0.025), 1010)
