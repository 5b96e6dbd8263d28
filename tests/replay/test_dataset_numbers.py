# SPDX-License-Identifier: Apache-2.0
"""Datasets have no part in what a killed run has left in shared memory under their number."""

import _posixshmem
import json
import mmap
import os
import threading
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from secrets import randbelow

import pytest
from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, RESUME
from streaming.base.shared import memory, prefix

from cpt_algorithms.replay import dataset_numbers
from cpt_algorithms.replay.dataset_numbers import unique_shm_prefixes


def rows(data):
    dataset = StreamingDataset(local=str(data['new']), split='val', batch_size=1, shuffle=False)
    return len(list(dataset)), len(dataset), dataset._shm_prefix_int


@pytest.fixture
def leftover(monkeypatch):
    """A number of which only a position is left, the last that a killed run's clean-up comes to; one before is in use."""
    used = 500_000 + randbelow(400_000)  # far from those of the processes of this machine
    monkeypatch.setattr(prefix, '_each_prefix_int', lambda: count(used))
    monkeypatch.setattr(dataset_numbers, 'count', lambda: count(used))
    number = used + 1
    shared = {
        prefix._get_path(used, LOCALS): prefix._pack_locals(['nowhere'], used),
        prefix._get_path(number, RESUME): json.dumps(
            {'epoch': 0, 'sample_in_epoch': 5, 'num_canonical_nodes': 1, 'shuffle_seed': 0, 'initial_physical_nodes': 1}
        ).encode(),
    }
    made = [SharedMemory(name, create=True, size=mmap.PAGESIZE) for name in shared]
    for shared_memory, value in zip(made, shared.values(), strict=True):
        shared_memory.buf[: len(value)] = value
    yield number
    for shared_memory in made:
        shared_memory.close()
        shared_memory.unlink()


def test_stock_evaluates_a_part_of_the_data_without_an_error(data, leftover):
    read, there, number = rows(data)
    assert (read, number) == (there - 5, leftover)


def test_a_number_is_free_once_nothing_is_left_of_it(data, leftover, monkeypatch):
    monkeypatch.setattr(prefix, '_check_and_find_retrying', prefix._check_and_find_retrying)  # put back afterwards
    unique_shm_prefixes()
    read, there, number = rows(data)
    assert read == there
    assert number == leftover + 1


def test_looking_is_not_taking(leftover):
    """Or the leftovers would be removed, with a warning, when this process ends."""
    seen = []
    register, resource_tracker.register = resource_tracker.register, lambda *what: seen.append(what)
    try:
        assert dataset_numbers._exists(leftover, RESUME)
    finally:
        resource_tracker.register = register
    assert not seen


def test_what_a_thousand_killed_runs_left_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_numbers, 'gettempdir', lambda: str(tmp_path))
    asked = []
    monkeypatch.setattr(dataset_numbers, '_exists', lambda number, _: asked.append(number))
    for number in range(1000):
        (tmp_path / prefix._get_path(number, BARRIER_FILELOCK if number % 2 else CACHE_FILELOCK)).touch()
    assert next(dataset_numbers._free_numbers()) == 1000
    assert set(asked) == {1000}


def test_memory_that_another_rank_has_not_sized_yet_is_waited_for():
    unique_shm_prefixes()
    name = f'sized_later_{os.getpid()}'
    file = _posixshmem.shm_open(f'/{name}', os.O_CREAT | os.O_RDWR, mode=0o600)
    later = threading.Timer(0.3, os.ftruncate, (file, 4096))
    later.start()
    try:
        found = memory.SharedMemory(name=name, size=4096)  # at once, stock: cannot mmap an empty file
        found.buf[:2] = b'ok'
        assert os.pread(file, 2, 0) == b'ok'
        found.shm.close()
    finally:
        later.join()
        _posixshmem.shm_unlink(f'/{name}')
        os.close(file)
