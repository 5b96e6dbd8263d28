# SPDX-License-Identifier: Apache-2.0
"""A programme of four stages: infinite learning rate, replay of everything earlier, branches and averages; killed often."""

import random
import time

import pytest
import tiny
from test_sequence import results, wait_until_gone

STAGES = ('first', 'second', 'third', 'fourth')


@pytest.fixture
def spec(data, write_mds, tmp_path):
    write_mds(tmp_path / 'late', 3, 300)
    write_mds(tmp_path / 'late', 13, 16, split='val')
    folders = dict(zip(STAGES, (data['old'], data['new'], data['older'], tmp_path / 'late'), strict=True))
    common = tiny.sequence_common(
        tmp_path,
        data,
        save_num_checkpoints_to_keep=1,
        scheduler={'name': 'infinite', 't_warmup': '2ba', 't_cooldown': '6ba', 'alpha_const': 0.5, 't_anneal': '4ba'},
        callbacks={'lawa': {'k': 3, 'interval': '2ba'}},
    )
    return {
        'name': 'programme',
        'folder': str(tmp_path / 'runs'),
        'jobs': 2,
        'data': {name: {'local': str(folders[name])} for name in STAGES},
        'stages': {
            'first': {'max_duration': '16ba'},
            'second': {'max_duration': '16ba', 'replay': {'fraction': 0.25}},
            'third': {'max_duration': '16ba', 'replay': {'fraction': 0.25, 'weights': {'first': 1, 'second': 2}}},
            'fourth': {
                'max_duration': '16ba',
                'replay': {'fraction': 0.25},
                'branches': {
                    'long': {'t_anneal': '8ba', 'anneal': 'linear', 'alpha_f': 0.0},
                    'merge': {'merge': {'last': 3, 'every': '2ba', 'weights': 'one_minus_sqrt'}},
                },
            },
        },
        'arms': {
            'infinite': {},
            'union': {'baseline': 'union', 'common': {'scheduler': {'name': 'rewarm_cosine', 't_warmup': '2ba'}}},
        },
        'common': common,
    }


def finished(path):
    """Runs a sequence to its end."""
    process = tiny.start(tiny.SEQUENCE, path)
    printed, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, printed
    return printed


def state_of(runs):
    """What a sequence has saved so far."""
    return sorted(str(path) for pattern in ('*/ep*-ba*', '*/done.json') for path in runs.glob(pattern))


def killed_on_its_way(path, runs, wait):
    """Starts a sequence and kills it, ``wait`` seconds after it has saved something; whether it was still at work."""
    before, process = state_of(runs), tiny.start(tiny.SEQUENCE, path)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and state_of(runs) == before:
        time.sleep(0.05)
    time.sleep(wait)
    is_at_work = process.poll() is None
    process.kill()
    process.communicate()
    wait_until_gone(str(runs))
    return is_at_work


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_report(spec, tmp_path):
    straight = {**spec, 'folder': str(tmp_path / 'straight')}
    printed = finished(tiny.save(straight, tmp_path / 'straight.yaml'))
    assert 'fourth-merge-s17: done' in printed
    expected = results(straight)
    names = {row['arm'] for row in expected['report.json']['rows']}
    arms = {
        'first only',
        'second, anneal',
        'infinite',
        'union',
        *(f'infinite, {of}' for of in ('long', 'merge', 'lawa')),
    }
    assert arms <= names

    path, draw = tiny.save(spec, tmp_path / 'sequence.yaml'), random.Random(2)
    kills = [killed_on_its_way(path, tmp_path / 'runs', draw.uniform(0, 4)) for _ in range(10)]
    assert all(kills), f'it ended before all kills: {kills}'
    done_before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'runs').glob('*/done.json')}
    assert 2 < len(done_before) < 11, 'the kills came too late or too early'
    finished(path)
    assert results(spec) == expected
    for path_done, when in done_before.items():
        assert path_done.stat().st_mtime_ns == when, 'finished work was done again'

    # a fifth stage, a year later
    write_again = {
        **spec,
        'stages': {**spec['stages'], 'fifth': {'new': 'first', 'max_duration': '8ba', 'branches': {}}},
    }
    printed = finished(tiny.save(write_again, tmp_path / 'sequence.yaml'))
    assert '10 of 13 runs are done already' in printed
