# SPDX-License-Identifier: Apache-2.0
"""Runs that are started, and waited for."""

import time

import pytest


@pytest.fixture
def run(tmp_path):
    """The folder of a run."""
    folder = tmp_path / 'runs' / 'run'
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def wait():
    """Waits for the exit code of a handle."""

    def until_it_ends(handle, seconds=240):
        deadline = time.monotonic() + seconds
        while (code := handle.poll()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return code

    return until_it_ends
