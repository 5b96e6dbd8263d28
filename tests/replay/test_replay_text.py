# SPDX-License-Identifier: Apache-2.0
"""``replay_text`` on real MDS shards through real DataLoaders: one process, several workers, several ranks."""

import json
import multiprocessing
import os
import shutil
import socket

import pytest
import tiny  # noqa: F401 - the ranks below import it too: one dataset at a time
import torch
from streaming import Stream, StreamingDataset

from cpt_algorithms.replay.replay_text import ReplayTextDataset, build_replay_text_dataloader

SEQ_LEN = 16
BATCH = 16
NEW, OLD, OLDER = 0, 1, 2  # what the first token of a row says
# of 26 batches of 16: nothing, then in a straight line to one half, then a tenth
MOVING = [['64sp', 0], ['200sp', 0, 0.5], ['300sp', 0.1]]


class FakeTokenizer:
    """The dataset holds tokens; the collator only asks for these."""

    pad_token_id = eos_token_id = 255
    bos_token_id = None
    padding_side = 'right'


def section(data, fraction=0.05, order='pretraining', **over):
    streams = {'old': {'local': str(data['old']), 'split': 'train'}}
    dataset = {
        'max_seq_len': SEQ_LEN,
        'shuffle': True,
        'shuffle_block_size': 100,
        'new': {'local': str(data['new']), 'split': 'train'},
        'replay': {'fraction': fraction, 'order': order, 'streams': streams},
    }
    return {**dataset, **over}


def loader_of(data, num_workers=0, device_batch_size=BATCH, drop_last=True, **over):
    dataset = ReplayTextDataset(
        tokenizer=None, batch_size=device_batch_size, drop_last=drop_last, **section(data, **over)
    )
    fork = 'fork' if num_workers else None  # as from a run; a rank of a forkserver would start its workers like that
    return torch.utils.data.DataLoader(
        dataset, batch_size=device_batch_size, num_workers=num_workers, multiprocessing_context=fork
    )


def rows(loader, limit=None):
    """One list of (dataset, id) per batch."""
    found = []
    for batch in loader:
        found.append([(int(row[0]), int(row[1]) * 100 + int(row[2])) for row in batch])
        if len(found) == limit:
            break
    return found


def test_every_new_sample_once_and_every_prefix_exact(data):
    loader = loader_of(data, fraction=0.05)
    batches = rows(loader)
    assert len(batches) == len(loader) == loader.dataset.num_batches == 420 // 16
    flat = [row for batch in batches for row in batch]
    new = [i for d, i in flat if d == NEW]
    assert len(set(new)) == len(new), 'a new sample was read twice'
    for upto in range(BATCH, len(flat) + 1, BATCH):
        old = sum(d == OLD for d, _ in flat[:upto])
        assert abs(old - 0.05 * upto) <= 0.5
    assert new != sorted(new), 'not shuffled'


def test_nothing_is_dropped_across_epochs(data):
    loader = loader_of(data, fraction=0.25)
    flat = [row for _ in range(3) for batch in rows(loader) for row in batch]
    new = [i for d, i in flat if d == NEW]
    # three epochs are rounded down to whole batches, and each goes on where the last one ended
    # (rows are turned within a batch, so a batch that straddles two passes mixes a few of theirs)
    assert set(new[: 400 + BATCH]) == set(range(400))
    assert all(new[: 800 - BATCH].count(i) in (1, 2) for i in range(400))
    assert new[:380] != new[400:780], 'the second pass must be another order'


def test_stock_stratified_drops_a_fifth_where_ours_drops_nothing(data):
    # 1 % at a global batch of 64: 0.64 rows a batch. Stock rounds it to 1 and stops when the replay stream is used up.
    streams = [
        Stream(local=str(data['new']), split='train', proportion=0.99),
        Stream(local=str(data['old']), split='train', proportion=0.01),
    ]
    stock = StreamingDataset(
        streams=streams, batch_size=64, batching_method='stratified', num_canonical_nodes=1, epoch_size=404
    )
    stock_new = {int(row['tokens'][1]) * 100 + int(row['tokens'][2]) for row in stock if row['tokens'][0] == NEW}
    ours = loader_of(data, fraction=0.01, device_batch_size=64, drop_last=False)
    our_new = [i for batch in rows(ours) for d, i in batch if d == NEW]
    assert len(stock_new) == 315
    assert set(our_new) == set(range(400))


@pytest.mark.parametrize('fraction', [0.001, 0.01, 0.3])
def test_small_and_odd_fractions_work_at_a_small_batch(data, fraction):
    loader = loader_of(data, fraction=fraction, drop_last=False)
    flat = [row for _ in range(5) for batch in rows(loader) for row in batch]
    assert abs(sum(d == OLD for d, _ in flat) - fraction * len(flat)) <= 0.5


@pytest.mark.parametrize('num_workers', [1, 2, 3, 4])
def test_workers_do_not_change_the_batches(data, num_workers):
    assert rows(loader_of(data, num_workers=num_workers)) == rows(loader_of(data))


def test_a_mix_that_changes_is_served_as_it_is_written(data):
    flat = [d for batch in rows(loader_of(data, fraction=MOVING)) for d, _ in batch]
    # integrals: 0 up to row 64; a ramp of 136 rows to 1/2, 34 rows; 100 rows of 1/10, and so on
    upto = {64: 0, 132: 8.5, 200: 34, 300: 44, 400: 54}
    assert {rows_: flat[:rows_].count(OLD) for rows_ in upto if rows_ % BATCH == 0} == {64: 0, 400: 54}
    for rows_, integral in upto.items():  # within a batch, rows are turned
        begin, end = rows_ // BATCH * BATCH, -(-rows_ // BATCH) * BATCH
        assert flat[:begin].count(OLD) <= integral + 0.5 and flat[:end].count(OLD) >= integral - 0.5


def state_after(data, batches, **over):
    """Of a loader whose first epoch has begun, as it has whenever a checkpoint is saved."""
    loader = loader_of(data, **over)
    rows(loader, limit=1)
    return loader.dataset.state_dict(batches * BATCH, True)


@pytest.mark.parametrize(
    ('done', 'num_workers', 'fraction'), [(1, 0, 0.05), (7, 2, 0.05), (25, 3, 0.05), (26, 1, 0.05), (9, 2, MOVING)]
)
def test_resume_at_any_batch(data, done, num_workers, fraction):
    straight = loader_of(data, fraction=fraction)
    expected = rows(straight)
    resumed = loader_of(data, num_workers=num_workers, fraction=fraction)
    resumed.dataset.load_state_dict(json.loads(json.dumps(state_after(data, done, fraction=fraction))))
    assert rows(resumed) == expected[done:]
    assert rows(resumed) == rows(straight), 'the next epoch'


def test_pretraining_order_is_the_order_in_which_d0_was_read(data):
    pretraining = loader_of(data, new={'local': str(data['old']), 'split': 'train'}, replay=None, fraction=0)
    d0 = [{i for _, i in batch} for batch in rows(pretraining)]

    def replayed(**over):  # a quarter of 16 rows: four batches replay one batch of D0's training
        old = [i for batch in rows(loader_of(data, fraction=0.25, **over)) for d, i in batch if d == OLD]
        assert len(set(old)) == len(old)
        return [set(old[start : start + BATCH]) for start in range(0, len(old) - BATCH, BATCH)]

    assert replayed() == d0[: len(replayed())]
    assert replayed(order='shuffled') != replayed()


def test_several_old_datasets_with_weights(data):
    streams = {
        'old': {'local': str(data['old']), 'split': 'train', 'weight': 3},
        'older': {'local': str(data['older']), 'split': 'train', 'weight': 1},
    }
    loader = loader_of(data, replay={'fraction': 0.4, 'streams': streams})
    flat = [d for batch in rows(loader) for d, _ in batch]
    for upto in range(BATCH, len(flat) + 1, BATCH):
        assert abs(flat[:upto].count(OLD) - 0.3 * upto) < 1
        assert abs(flat[:upto].count(OLDER) - 0.1 * upto) < 1


def test_several_new_datasets_are_each_read_once(data):
    both = {name: {'local': str(data[name]), 'split': 'train'} for name in ('new', 'older')}
    loader = loader_of(data, new=both, replay=None)
    flat = [row for batch in rows(loader) for row in batch]
    assert len(flat) == len(set(flat)) == 592  # 600 samples in whole batches of 16
    first_half = [d for d, _ in flat[:300]]
    assert 60 < first_half.count(OLDER) < 140, 'shuffled together'


def _one_rank(rank, num_ranks, port, data, num_workers, resume_at, fraction, queue):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
    )  # fmt: skip
    torch.distributed.init_process_group('gloo')
    loader = loader_of(data, num_workers=num_workers, device_batch_size=BATCH // num_ranks, fraction=fraction)
    if resume_at:
        state = {'epoch': 0, 'sample_in_epoch': resume_at * BATCH, 'num_canonical_nodes': 1, 'shuffle_seed': 9176}
        loader.dataset.load_state_dict({**state, 'initial_physical_nodes': 1, 'mix': loader.dataset.mix})
    queue.put((rank, rows(loader)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ('num_ranks', 'num_workers', 'resume_at', 'fraction'),
    [
        (2, 2, 9, MOVING),
        pytest.param(2, 2, 0, 0.25, marks=pytest.mark.long),
        pytest.param(4, 1, 5, 0.25, marks=pytest.mark.long),
        pytest.param(8, 0, 3, 0.25, marks=pytest.mark.long),
    ],
)
def test_real_ranks_read_the_same_global_batches_with_replay_spread_over_them(
    data, num_ranks, num_workers, resume_at, fraction
):
    expected = rows(loader_of(data, fraction=fraction))[resume_at:]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    # ranks are forked from a server that has imported the library, and started no threads
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['cpt_algorithms.replay.replay_text'])
    queue = context.Queue()
    ranks = [
        context.Process(target=_one_rank, args=(rank, num_ranks, port, data, num_workers, resume_at, fraction, queue))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        by_rank = dict(queue.get(timeout=120) for _ in ranks)
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    merged = [[row for rank in range(num_ranks) for row in by_rank[rank][b]] for b in range(len(by_rank[0]))]
    assert merged == expected
    replayed = [sum(d == OLD for batch in by_rank[rank] for d, _ in batch) for rank in range(num_ranks)]
    assert max(replayed) - min(replayed) <= len(merged), f'replay is piled on some ranks: {replayed}'
    assert min(replayed) > 0


@pytest.mark.parametrize(
    ('over', 'message'),
    [
        ({'fraction': 0.25}, r'fraction: 1/20 -> 1/4'),
        ({'fraction': [['9sp', 0.1, 0.5]]}, r'fraction: 1/20 -> 1/10 to 1/2 until 9sp, then 1/2'),
        ({'order': 'shuffled'}, r'order: pretraining -> shuffled'),
        ({'shuffle_seed': 1}, r'shuffle_seed: 9176 -> 1'),
        ({'device_batch_size': 8}, r'global_batch_size: 16 -> 8'),
        ({'drop_last': False}, r'drop_last: True -> False'),
        ({'replay': None}, r'replay\.old: 300 samples .* -> absent'),
    ],
)
def test_resuming_with_another_mix_is_refused_and_named(data, over, message):
    other = loader_of(data, **over)
    with pytest.raises(ValueError, match=message):
        other.dataset.load_state_dict(state_after(data, 3))


@pytest.mark.parametrize(('kind', 'samples'), [(7, 400), (0, 410)], ids=['as many rows', 'more rows'])
def test_other_data_is_noticed_and_moved_data_is_the_same(data, write_mds, tmp_path, kind, samples):
    state = state_after(data, 3)
    write_mds(tmp_path / 'new', kind, samples)
    other = loader_of(data, new={'local': str(tmp_path / 'new'), 'split': 'train'})
    with pytest.raises(ValueError, match=rf'new\.new: 400 samples \(\w+\) -> {samples} samples'):
        other.dataset.load_state_dict(state)
    shutil.copytree(data['new'], tmp_path / 'moved')
    loader_of(data, new={'local': str(tmp_path / 'moved'), 'split': 'train'}).dataset.load_state_dict(state)


def test_another_loaders_state_is_refused(data):
    with pytest.raises(ValueError, match='saved by another train loader'):
        loader_of(data).dataset.load_state_dict({'epoch': 0, 'sample_in_epoch': 16})


@pytest.mark.parametrize(
    ('over', 'message'),
    [
        ({'shufle': True}, r"train_loader\.dataset\.shufle .* did you mean 'shuffle'"),
        ({'batching_method': 'random'}, r'train_loader\.dataset\.batching_method is not a key'),
        ({'replay': {'fracton': 0.1}}, r"replay\.fracton .* did you mean 'fraction'"),
        ({'replay': {'fraction': 0.1}}, r'replay\.streams is empty'),
        ({'replay': {'fraction': 0.1, 'order': 'random', 'streams': {}}}, r"replay\.order='random' is not possible"),
        ({'new': {'local': 'x', 'proportion': 0.5}}, r'dataset\.new\.proportion is not a key'),
        ({'new': {}}, r'dataset\.new is empty'),
        ({'replay': {'fraction': [['1dur', 0.1]]}}, r"fraction\[0\]\[0\]='1dur' must be a time of at least 0 in sp"),
        ({'replay': {'fraction': MOVING, 'streams': {'old': {'local': 'x'}}}, 'resume_after': 'x'}, r'cannot change'),
        ({'new': {'pile': 'x'}}, r"new\.pile='x' is not a stream"),
    ],
)
def test_bad_sections_are_named(data, over, message):
    with pytest.raises(ValueError, match=message):
        build_replay_text_dataloader(FakeTokenizer(), BATCH, {**section(data), **over})


def test_rows_of_another_length_are_refused(data):
    with pytest.raises(ValueError, match='max_seq_len=8, but the data was packed to rows of 16 tokens'):
        loader_of(data, max_seq_len=8)


def test_less_new_data_than_a_batch_is_an_error(data):
    with pytest.raises(ValueError, match='too few for one global batch of 1000'):
        loader_of(data, device_batch_size=1000)
