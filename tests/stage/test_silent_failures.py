# SPDX-License-Identifier: Apache-2.0
"""Silent failures of the stock stack that no other test proves cannot happen here; the card's table names the rest."""

import pytest
import tiny


@pytest.mark.slow
def test_fsdp2_on_cpu_averages_gradients(data, tmp_path):
    path = tiny.save(tiny.config(tmp_path, data, 'case', scheduler={'t_max': '8ba'}), tmp_path / 'case.yaml')
    printed = tiny.launch(tiny.ROOT / 'tests' / 'stage' / 'silent_cases.py', path)
    assert 'gradients: ok' in printed, printed[-6000:]


def clipped(threshold):
    return {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': threshold}}


@pytest.mark.parametrize('stage_start', [None, {}], ids=['stock', 'ours'])
@pytest.mark.long
def test_a_restart_with_another_gradient_clipping(stage_start, data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'run', scheduler={'t_max': '8ba'}, algorithms=clipped(1.0))
    cfg = tiny.merge(cfg, {'callbacks': {'stage_start': stage_start}})
    tiny.run(tiny.merge(cfg, {'max_duration': '2ba'}))
    changed = tiny.merge(cfg, {'algorithms': clipped(0.5), 'max_duration': '3ba'})
    if stage_start is None:
        assert sorted(tiny.run(changed)) == [0, 1, 2], 'silently accepted'
        return
    with pytest.raises(ValueError, match=r'gradient_clipping\.clipping_threshold: 1\.0 -> 0\.5'):
        tiny.run(changed)
    assert sorted(tiny.run(tiny.merge(cfg, {'max_duration': '3ba'}))) == [0, 1, 2]
