# SPDX-License-Identifier: Apache-2.0
"""A run that streams from object storage and saves to it, moved between numbers of ranks, serves the same batches."""

import pytest
import recorder
import tiny

BATCHES, BATCH = 14, 16


def upload(bucket, data):
    for name in ('new', 'old'):
        for file in (data[name]).rglob('*'):
            if file.is_file():
                bucket.upload_file(str(file), 'bucket', f'data/{name}/{file.relative_to(data[name])}')


def stream(folder, name, run_name):
    return {'remote': f's3://bucket/data/{name}', 'local': str(folder / f'cache-{run_name}' / name), 'split': 'train'}


def batches_of(path, num_ranks):
    """Rows of every global batch, in order: each rank has a part of it."""
    ranks = [recorder.read(path, rank) for rank in range(num_ranks)]
    return {batch: [row for rank in ranks for row in rank[batch]['rows']] for batch in ranks[0]}


@pytest.mark.slow
def test_killed_and_moved_from_two_ranks_to_one_and_to_four(bucket, data, tmp_path):
    upload(bucket, data)

    def train(run_name, ranks, part, kill_at=None):
        # all the time resumed in a ramp
        replay = {'fraction': [['1dur', 0, 0.1]], 'streams': {'old': stream(tmp_path, 'old', run_name)}}
        dataset = {'new': stream(tmp_path, 'new', run_name), 'replay': replay, 'cache_limit': '64kb'}
        witness = {'path': str(tmp_path / f'{run_name}-{part}.jsonl'), 'kill_at': kill_at}
        cfg = tiny.config(
            tmp_path, data, run_name, global_train_batch_size=BATCH, max_duration=f'{BATCHES}ba', save_interval='3ba',
            save_folder=f's3://bucket/runs/{run_name}', fsdp_config={'state_dict_type': 'full'},
            train_loader={'num_workers': 1, 'dataset': dataset}, callbacks={'recorder': witness},
        )  # fmt: skip
        path = tiny.save(tiny.merge(cfg, {}), tmp_path / f'{run_name}.yaml')
        tiny.launch(tiny.RECIPE, path, ranks=ranks, expect=0 if kill_at is None else tiny.KILLED)
        return batches_of(tmp_path / f'{run_name}-{part}.jsonl', ranks)

    straight = train('straight', 2, 0)
    assert sorted(straight) == list(range(BATCHES))
    rows = [tuple(row) for batch in straight.values() for row in batch]
    assert len(set(rows)) == len(rows) == BATCHES * BATCH
    assert sum(row[0] for row in rows) == 11, '0 to 10 % of 224 rows, 11.2 in all, to the nearest'
    assert sum(row[0] for row in rows[: 7 * BATCH]) == 3, 'and 2.8 in the first half'
    moved = [train('moved', 2, 0, kill_at=5), train('moved', 1, 1, kill_at=8), train('moved', 4, 2)]
    # checkpoints were at 3, 6, ... and what was served after them is served again
    assert [(min(part), max(part)) for part in moved] == [(0, 4), (3, 7), (6, BATCHES - 1)]
    for part in moved:
        for batch, served in part.items():
            assert served == straight[batch], f'global batch {batch}, row by row'
