# SPDX-License-Identifier: Apache-2.0
"""Odd fractions, batch sizes, ranks, workers and sizes of data: refused in one line that is right, or exact everywhere.

``pytest -m slow tests/test_fuzz_numbers.py -s`` looks at many, others each time (``FUZZ_SEED=N`` repeats a run).
"""

import math
import os
import re
import secrets
from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from test_fuzz import FEW, MANY, SIZES, in_time

from cpt_algorithms.replay.functional import worker_slots
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.stage.preflight import PreflightError, preflight
from cpt_algorithms.stage.stage import Stage

NEW, OLD = (1, 7, 16, 97, 400), (1, 13, 300)
FRACTIONS = [0, 0.0, '0', 1e-9, 1e-6, 0.001, 0.05, 0.25, '1/3', 1 / 3, '2/7', 0.5, 0.9, 0.9999, 0.999999, 1 - 1e-9, 1, -0.1, 2, '5%']  # fmt: skip
BATCHES = [1, 2, 3, 5, 7, 8, 12, 16, 31, 97, 400, 401, 1000]


@pytest.fixture(scope='module')
def sized(tmp_path_factory, write_mds):
    """Datasets of odd sizes."""
    root = tmp_path_factory.mktemp('sized')
    new = {size: write_mds(root / f'new{size}', 1, size) for size in NEW}
    return new, {size: write_mds(root / f'old{size}', 2, size) for size in OLD}


def number(fraction) -> Fraction | None:
    """What it stands for; None if it is no share."""
    try:
        share = Fraction(f'{fraction:.12g}' if isinstance(fraction, float) else str(fraction))
    except ValueError:
        return None
    return share if 0 <= share < 1 else None


def mistake(fraction, batch, ranks, batches, new, old) -> str | None:
    """What must be said of it."""
    share = number(fraction)
    if batch % ranks:
        return f'global_train_batch_size={batch} is not divisible by the {ranks} ranks'
    if share is None:
        is_no_number = isinstance(fraction, str) and not re.fullmatch(r'[\d.eE/+-]+', fraction)
        return f'replay.fraction={repr(fraction) if is_no_number else fraction}'
    replayed = math.floor(batch * batches * share + Fraction(1, 2))
    return 'too little data' if batch * batches - replayed > new or replayed > old else None


def judge(case, data, sized, folder):
    """One case."""
    fraction, batch, ranks, workers, batches, new, old, shuffle = case
    streams = {'old': {'local': str(sized[1][old]), 'split': 'train'}}
    dataset = {
        'max_seq_len': tiny.SEQ_LEN,
        'shuffle': shuffle,
        'new': {'local': str(sized[0][new]), 'split': 'train'},
        'replay': {'fraction': fraction, 'order': 'pretraining', 'streams': streams},
    }
    loader = {'dataset': dataset, 'num_workers': workers}
    times = {'max_duration': f'{batches}ba', 'scheduler': {'name': 'rewarm_cosine', 't_warmup': '0ba'}}
    cfg = tiny.config(folder, data, 'x', train_loader=loader, global_train_batch_size=batch, **times)
    wrong = mistake(fraction, batch, ranks, batches, new, old)
    with in_time():
        try:
            preflight(Stage.from_yaml(cfg), ranks)
            said = None
        except PreflightError as refused:
            said = refused.problems
    if wrong:
        assert said and any(wrong in each for each in said), (wrong, said)
        assert not any('\n' in each or 'not of the form' in each for each in said), said
        return 'refused'
    assert not said, said

    share = number(fraction)
    assert share is not None
    with in_time():
        made = ReplayTextDataset(tokenizer=None, batch_size=batch, drop_last=True, **dataset)
        fork = 'fork' if workers else None
        reader = torch.utils.data.DataLoader(made, batch_size=batch, num_workers=workers, multiprocessing_context=fork)
        rows = [tuple(row[:3].tolist()) for _, found in zip(range(batches), reader, strict=False) for row in found]
        if not workers:  # whose threads would look for work for ever
            made._iterator.exit()
    assert len(rows) == batch * batches
    is_old = np.array([row[0] == 2 for row in rows])
    exact = [math.floor(upto * share + Fraction(1, 2)) for upto in range(batch, len(rows) + 1, batch)]
    assert np.cumsum(is_old)[batch - 1 :: batch].tolist() == exact, 'exact after every batch'
    assert len(set(rows)) == len(rows), 'no row twice'
    # what real ranks and workers read of the same order (test_replay_text.py has them)
    mine = batch // ranks
    each = max(workers, 1)
    slots = [
        worker_slots(np.arange(len(range(worker, batches, each)) * mine), 0, mine, rank, ranks, worker, each)
        for rank in range(ranks)
        for worker in range(each)
    ]
    assert sorted(np.concatenate(slots).tolist()) == list(range(batch * batches)), 'each once, on some rank'
    return 'exact'


@pytest.mark.parametrize(('many', 'slow'), SIZES)
@pytest.mark.long
def test_odd_numbers(many, slow, data, sized, tmp_path):
    counts = {'exact': 0, 'refused': 0}
    examples = 1500 if slow else 40

    @settings(MANY if slow else FEW, max_examples=examples)
    @given(
        st.tuples(
            st.one_of(
                st.sampled_from(FRACTIONS), st.integers(0, 999).map(lambda number: number / 1000), st.floats(0, 1)
            ),
            st.one_of(st.sampled_from(BATCHES), st.integers(1, 40)),
            st.sampled_from([1, 1, 1, 2, 3, 4, 8]),
            st.sampled_from([0, 0, 0, 0, 1, 3] if slow else [0]),
            st.integers(1, 12),
            st.sampled_from(NEW),
            st.sampled_from(OLD),
            st.booleans(),
        )
    )
    def run(case):
        try:
            counts[judge(case, data, sized, tmp_path)] += 1
        except BaseException as error:  # hypothesis shows no case of a hang
            error.add_note(str(case))
            raise

    if slow:
        given_seed = int(os.environ.get('FUZZ_SEED', secrets.randbelow(2**32)))
        print(f'FUZZ_SEED={given_seed}')
        run = seed(given_seed)(run)
    run()
    print(counts)
    assert min(counts.values()) > examples / 20
