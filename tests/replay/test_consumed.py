# SPDX-License-Identifier: Apache-2.0
"""Replay limited to what an earlier run has really read, in its order."""

import json

import numpy as np
import pytest
import recorder
import tiny
import torch
import torch.distributed.checkpoint as dcp
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from cpt_algorithms.checkpoints.open import dataset_state_of
from cpt_algorithms.replay.consumed import Consumed, consumed_by, positions_behind, read_consumed, read_positions
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError

NEW, OLD = 0, 1


# What a dataset says of itself, and what it had read.
MIX = {
    'shuffle': True,
    'shuffle_seed': 5,
    'shuffle_block_size': 40,
    'order': 'as first read',
    'new.web': '400 samples (abc)',
    'replay.pile': '300 samples (def), weight 3',
    'replay.code': '200 samples (123), weight 1',
}
READ = {'new': 96, 'pile': 24, 'code': 8}


def state_of(**over):
    return {'mix': json.dumps({**MIX, **over}), 'consumed': json.dumps(READ)}


def test_what_was_consumed_by_hand():
    assert consumed_by(state_of(), 'abc') == Consumed(96, 5, 40)
    assert consumed_by(state_of(shuffle=False), 'abc') == Consumed(96, None, 40)
    with pytest.raises(ValueError, match=r'^its train loader was not replay_text, or an older one, so what it read is'):
        consumed_by({'mix': json.dumps(MIX)}, 'abc')
    with pytest.raises(
        ValueError,
        match=r'^it learned another dataset \(web: 400 samples \(abc\); this one is ab\): name the run that read it$',
    ):
        consumed_by(state_of(), 'ab')
    with pytest.raises(
        ValueError,
        match=r'^it read several new datasets shuffled together \(web: 400 samples \(abc\), more: 1 samples \(9\)\); one by',
    ):
        consumed_by(state_of(**{'new.more': '1 samples (9)'}), 'abc')


def test_positions_behind_by_hand():
    def behind(**over):
        return positions_behind(state_of(), json.dumps({**MIX, **over}))

    assert behind() == READ
    # other weights and limits are another mix of the same data
    pile = '300 samples (def), weight 9, only the first {} of seed {}, block {}'
    assert behind(**{'replay.pile': pile.format(7, 5, 40)}) == READ
    with pytest.raises(ValueError, match=r'another order \(pile: seed 5, block 40 -> seed 1, block 40\)'):
        behind(**{'replay.pile': pile.format(7, 1, 40)})
    # replay's own order shuffles what there is
    own = {'order': 'shuffled', 'replay.pile': pile.format(7, 5, 40)}
    assert positions_behind(state_of(**own), json.dumps({**MIX, **own})) == READ
    with pytest.raises(ValueError, match=r'another order \(pile: seed 5, block 40, of 7 -> seed 5, block 40, of 8\)'):
        positions_behind(state_of(**own), json.dumps({**MIX, **own, 'replay.pile': pile.format(8, 5, 40)}))
    # an order that is none; of replay's own, of all
    with pytest.raises(ValueError, match=r'another order \(pile: seed 5, block 40 -> unshuffled\)'):
        behind(**{'replay.pile': pile.format(7, None, 40)})
    plain = {'shuffle': False, 'replay.pile': pile.format(7, None, 40)}
    assert positions_behind(state_of(shuffle=False), json.dumps({**MIX, **plain})) == READ
    shuffled = {'order': 'shuffled'}
    with pytest.raises(ValueError, match=r'another order \(pile: seed 5, block 40, of all -> seed 5, block 40, of 7\)'):
        positions_behind(state_of(**shuffled), json.dumps({**MIX, **shuffled, 'replay.pile': pile.format(7, 5, 40)}))
    # what is not the same data in the same role begins at 0
    assert behind(**{'new.web': '400 samples (abd)'}) == {'pile': 24, 'code': 8}
    assert behind(**{'new.more': '1 samples (9)'}) == {'pile': 24, 'code': 8}
    assert behind(**{'replay.pile': '300 samples (dee)', 'replay.web': '400 samples (abc)'}) == {'new': 96, 'code': 8}
    for key, value in (('shuffle', False), ('shuffle_seed', 6), ('shuffle_block_size', 41), ('order', 'shuffled')):
        with pytest.raises(
            ValueError,
            match=rf'^it read in another order \({key}: {MIX[key]} -> {value}\), and this run would not know what is left$',
        ):
            behind(**{key: value})
    with pytest.raises(ValueError, match='shuffle: True -> False; shuffle_seed: 5 -> 6'):
        behind(shuffle=False, shuffle_seed=6)
    with pytest.raises(ValueError, match=r'^its train loader was not replay_text, or an older one, so what it read is'):
        positions_behind({'mix': json.dumps(MIX)}, json.dumps(MIX))
    # the order of old data is nothing to a run that had none, or reads none of it again; nor is any if all is new
    others = {'replay.pile': '1 samples (1)', 'replay.code': '1 samples (2)'}
    assert behind(order='shuffled', **others) == {'new': 96}
    assert behind(shuffle_seed=6, **others, **{'new.web': '1 samples (3)'}) == {}


@pytest.mark.parametrize('together', [True, False])
def test_positions_come_from_a_checkpoint(tmp_path, together):
    path = str(tmp_path / 'ep0-ba12-rank0.pt')
    torch.save({'state': {'dataset_state': {'train': state_of()}}}, path)
    assert read_positions('key', path, json.dumps(MIX)) == READ
    assert read_consumed('key', path, 'abc', together) == Consumed(96, 5, 40)
    with pytest.raises(ValueError, match=rf'^key={path}: it learned another dataset '):
        read_consumed('key', path, 'x', together)
    with pytest.raises(ValueError, match=rf'^key={path}: KeyError: .shuffle'):
        read_positions('key', path, json.dumps({'new.web': MIX['new.web']}))


def ids_of(rows):
    """Of the old data's."""
    return [int(row[1]) * 100 + int(row[2]) for row in rows if int(row[0]) == OLD]


@pytest.fixture(scope='module')
def parent(data, tmp_path_factory):
    """A run that read 64 of the 300 samples of ``old``, with a shuffle of its own; and what it read, in order."""
    folder = tmp_path_factory.mktemp('parent')
    dataset = {'new': {'local': str(data['old']), 'split': 'train'}, 'shuffle_seed': 5, 'shuffle_block_size': 40}
    lines = tiny.run(tiny.config(folder, data, 'parent', train_loader={'dataset': dataset}))
    read = [row for batch in range(8) for row in lines[batch]['rows']]
    assert {row[0] for row in read} == {OLD}
    return folder / 'parent' / 'latest-rank0.pt', ids_of(read)


def dataset(data, stream=None, fraction=0.5, max_passes=1, name='old', **over):
    streams = {name: {'local': str(data[name]), 'split': 'train', **(stream or {})}}
    return ReplayTextDataset(
        tokenizer=None, max_seq_len=tiny.SEQ_LEN, new={'local': str(data['new']), 'split': 'train'}, batch_size=8,
        replay={'fraction': fraction, 'streams': streams, **over}, shuffle=True, max_passes=max_passes,
    )  # fmt: skip


def in_slot_order(found):
    """Rows of a batch are turned; the dataset's own sequence is not."""
    offset = int(found.indexes[0].samples.sum())
    ids = found.sequence(np.arange(2 * found.sequence.sizes[0]))
    return [int(i) - offset for i in ids if i >= offset]


def test_only_what_was_read_comes_back_in_that_order(parent, data):
    checkpoint, read = parent
    limited = dataset(data, {'only_seen_by': str(checkpoint)})
    assert limited.sequence.sizes == [400, 64]
    found = in_slot_order(limited)
    # the parent's batches are turned too
    assert [sorted(found[k : k + 8]) for k in range(0, 64, 8)] == [sorted(read[k : k + 8]) for k in range(0, 64, 8)]
    assert all(sorted(found[k : k + 64]) == sorted(read) for k in range(0, 320, 64))
    assert found[64:128] != found[:64]
    assert set(ids_of(limited)) == set(read), 'as the loader reads it'
    shuffled = in_slot_order(dataset(data, {'only_seen_by': str(checkpoint)}, order='shuffled'))
    assert sorted(shuffled[:64]) == sorted(read)
    assert shuffled[:64] != found[:64]
    assert len(set(in_slot_order(dataset(data))[:200])) == 200, 'without the key there is no limit'


def test_the_budget_counts_passes_over_the_part(parent, data):
    limited = dataset(data, {'only_seen_by': str(parent[0])})
    limited.check_budget(128)
    with pytest.raises(ValueError, match=r"replay stream 'old', which has 1,024 \(1\.\d+ passes"):
        limited.check_budget(160)


def test_the_mix_says_so(parent, data):
    mixes = [json.loads(dataset(data, {'only_seen_by': str(parent[0])} if key else {}).mix) for key in (True, False)]
    limited, free = (mix['replay.old'] for mix in mixes)
    assert limited.startswith(free)
    assert 'the first 64 of seed 5, block 40' in limited


def test_a_sharded_checkpoint_says_the_same(parent, data, tmp_path):
    state = dataset_state_of(parent[0])
    dcp.save({'state': {'dataset_state': {'train': state}}}, checkpoint_id=tmp_path / 'ep0-ba8', no_dist=True)
    assert dataset_state_of(tmp_path / 'ep0-ba8') == state
    assert dataset(data, {'only_seen_by': str(tmp_path / 'ep0-ba8')}).sequence.sizes == [400, 64]


def test_a_stage_replays_it_and_resumes(parent, data, tmp_path):
    checkpoint, read = parent
    streams = {'old': {'local': str(data['old']), 'split': 'train', 'only_seen_by': str(checkpoint)}}
    over = {
        'train_loader': {'dataset': {'replay': {'fraction': 0.25, 'streams': streams}}},
        'load_path': str(checkpoint),
    }
    tiny.recipe_here(tiny.config(tmp_path, data, 'stage', **over), tmp_path)
    lines = recorder.read(tmp_path / 'stage.jsonl')
    rows = [row for batch in range(8) for row in lines[batch]['rows']]
    assert set(ids_of(rows)) == set(read[:16])
    lineage = json.loads((tmp_path / 'stage' / 'stage.json').read_text())
    assert lineage['config']['train_loader']['dataset']['replay']['streams']['old']['only_seen_by'] == str(checkpoint)


def test_what_cannot_be_is_named(parent, data, tmp_path):
    key = 'train_loader.dataset.replay.streams.old.only_seen_by'
    for stream, name, message in [
        ({'only_seen_by': str(tmp_path / 'nothing.pt')}, 'old', f'{key}={tmp_path}/nothing.pt: .*does not exist'),
        ({'only_seen_by': str(parent[0])}, 'older', r'it learned another dataset \(.*: 300 samples .*this one is'),
        ({'only_seen_by': str(parent[0]), 'stand_in_for': 'the web'}, 'old', 'not both'),
    ]:
        with pytest.raises(ValueError, match=message):
            dataset(data, stream, name=name)
    (tmp_path / 'text.pt').write_text('no zip')
    with pytest.raises(ValueError, match='text.pt is'):
        dataset(data, {'only_seen_by': str(tmp_path / 'text.pt')})


def test_preflight_knows_how_much_that_is(parent, data, tmp_path):
    streams = {'old': {'local': str(data['old']), 'split': 'train', 'only_seen_by': str(parent[0])}}
    replay = {'fraction': 0.5, 'streams': streams}
    cfg = tiny.config(tmp_path, data, 'stage', max_duration='16ba', train_loader={'dataset': {'replay': replay}})
    preflight(Stage.from_yaml(cfg))
    with pytest.raises(ConfigError, match=r"replay stream 'old', which has 1,024 \(1.25 passes"):
        preflight(Stage.from_yaml({**cfg, 'max_duration': '20ba'}))
    streams['old']['only_seen_by'] = str(tmp_path / 'later.pt')
    with pytest.raises(ConfigError, match='later.pt does not exist'):
        preflight(Stage.from_yaml(cfg))
    preflight(Stage.from_yaml(cfg), parent_is_there=False)


@pytest.mark.long
@pytest.mark.parametrize('is_ours', [True, False], ids=['replay_text', 'text'])
def test_epochs_go_on_after_a_restart_at_their_end(is_ours, data, tmp_path):
    """A pass has 25 batches. Stock: a checkpoint at the end of an epoch is one at its beginning, and it is read again."""
    stream = {'local': str(data['older']), 'split': 'train'}
    loader = {'dataset': {'new': stream, 'max_passes': 2}}
    if not is_ours:
        dataset = {'shuffle': True, 'max_seq_len': tiny.SEQ_LEN, **stream}
        workers = {'num_workers': 0, 'prefetch_factor': None, 'persistent_workers': False}
        loader = {'name': 'text', 'drop_last': True, 'dataset': dataset, **workers}
    over = {'max_duration': '29ba', 'train_loader': loader, 'save_interval': '1ep'}
    straight = tiny.run(tiny.config(tmp_path, data, 'straight', **over))
    stopped = tiny.config(tmp_path, data, 'stopped', **tiny.merge(over, {'callbacks': {'stop': {'at': 27}}}))
    with pytest.raises(RuntimeError, match='stopped'):
        tiny.run(stopped)
    resumed = tiny.run(tiny.merge(stopped, {'callbacks': {'stop': None}}))
    assert [resumed[batch]['rows'] for batch in range(29)] == [straight[batch]['rows'] for batch in range(29)]
    if not is_ours:
        return
    state = dataset_state_of(tmp_path / 'stopped' / 'latest-rank0.pt')
    assert json.loads(state['consumed']) == {'new': 8 * 29}


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('is_ours', [True, False], ids=['replay_text', 'stock'])
def test_a_resumed_dataset_does_not_start_over_when_shared_memory_is_cleaned_up(data, num_workers, is_ours):
    """As when an earlier dataset of the same number is; stock Streaming begins at the first sample, and says nothing."""

    def made():
        if is_ours:
            return dataset(data, fraction=0)
        return StreamingDataset(
            local=str(data['new']), split='train', batch_size=8, shuffle=True, num_canonical_nodes=1
        )

    def rows(found, workers=0):
        batches = DataLoader(found, batch_size=8, num_workers=workers, collate_fn=list)
        return [[np.asarray(row['tokens'] if isinstance(row, dict) else row).tolist() for row in b] for b in batches]

    straight, resumed = rows(made()), made()
    resumed.load_state_dict({**resumed.state_dict(24, True), 'epoch': 0})
    if not is_ours:  # which keeps it elsewhere
        resumed._resume_shm.cleanup()
    assert rows(resumed, num_workers) == straight[3 if is_ours else 0 :]
