# SPDX-License-Identifier: Apache-2.0
"""Datasets have no part in what a killed run has left in shared memory under their number."""

import json
import mmap
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

import pytest
from streaming import StreamingDataset
from streaming.base.constant import LOCALS, RESUME
from streaming.base.shared import prefix

from cpt_algorithms.replay import dataset_numbers
from cpt_algorithms.replay.dataset_numbers import safe_numbers


def rows(data):
    dataset = StreamingDataset(local=str(data['new']), split='val', batch_size=1, shuffle=False)
    return len(list(dataset)), len(dataset), dataset._shm_prefix_int


@pytest.fixture
def leftover():
    """Of the lowest free number, a position: the last that a killed run's clean-up has not come to yet."""
    number = prefix._check_and_find(['nowhere'], [None], LOCALS)
    left = SharedMemory(prefix._get_path(number, RESUME), create=True, size=mmap.PAGESIZE)
    state = {
        'epoch': 0,
        'sample_in_epoch': 5,
        'num_canonical_nodes': 1,
        'shuffle_seed': 9176,
        'initial_physical_nodes': 1,
    }
    position = json.dumps(state).encode()
    left.buf[: len(position)] = position
    yield number
    left.close()
    left.unlink()


def test_stock_evaluates_a_part_of_the_data_without_an_error(data, leftover, monkeypatch):
    monkeypatch.setattr(prefix, '_each_prefix_int', count)
    read, there, number = rows(data)
    assert (read, number) == (there - 5, leftover)


def test_a_number_is_free_once_nothing_is_left_of_it(data, leftover):
    safe_numbers()
    read, there, number = rows(data)
    assert read == there
    assert number > leftover


def test_looking_is_not_taking(leftover):
    """Or the leftovers would be removed, with a warning, when this process ends."""
    seen = []
    register, resource_tracker.register = resource_tracker.register, lambda *what: seen.append(what)
    try:
        assert dataset_numbers._exists(leftover, RESUME)
    finally:
        resource_tracker.register = register
    assert not seen
