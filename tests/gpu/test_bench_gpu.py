# SPDX-License-Identifier: Apache-2.0
"""``make bench-gpu``, rehearsed with a tiny model: everything that it measures is measured."""

import json
import subprocess
import sys

import gpu
import pytest
import tiny


@pytest.mark.parametrize(
    ('name', 'key'),
    [
        ('NVIDIA H200', 'h200'),
        ('NVIDIA H100 80GB HBM3', 'h100'),
        ('NVIDIA H100 NVL', None),
        ('NVIDIA A100-SXM4-80GB', 'a100'),
        ('NVIDIA GeForce RTX 4090', None),
    ],
)
def test_cards_are_known_by_their_names(name, key):
    assert gpu.gpu_named(name) == key


@pytest.mark.long
def test_a_rehearsal_measures_everything(tmp_path):
    script, out = tiny.ROOT / 'scripts' / 'benchmarks' / 'gpu.py', tmp_path / 'gpu.json'
    command = [sys.executable, str(script), '--tiny', '--budget', '1000', '--json', str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert not found['failed']
    assert set(found['skipped']) <= {'step: FlashAttention 2', 'step: Liger'}
    for name in ('base', 'compiled', 'compiled, largest', 'FSDP2, one process', 'eager'):
        assert found['step'][name]['tokens/s'] > 0 and 0 < found['step'][name]['MFU'] < 1
    assert len(found['everything on']['in turns']['groups']['ours']) > 1
    assert set(found['averages']['all']['B/s']) == {'snapshot', 'EMA update'}
    for form in ('one file', 'sharded'):
        sides = found['saving'][form]
        assert len(sides['ours']['seconds']) == 3 and sides['ours']['bytes'] > 1.5 * sides['stock']['bytes']
    assert 'step, everything on' in done.stdout and 'aim: 45 % at 405M' in done.stdout
