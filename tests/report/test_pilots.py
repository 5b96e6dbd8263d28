# SPDX-License-Identifier: Apache-2.0
"""Which finished runs are pilots, and what the command makes of them."""

import json
from math import exp

import foresee
import pytest
from run_folders import change, entry, write_plan, write_run, write_sequence

from cpt_algorithms.report.pilots import forecast_of, pilots_of, rates_of, update_pilots_of
from cpt_algorithms.report.run_records import read_runs

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5)


def forgets(share):
    """0 at a quarter."""
    return exp(-8 * share) - exp(-2)


@pytest.fixture
def folder(tmp_path):
    """Two seeds of five shares; one arm of another schedule, and one that has not finished."""
    runs = []
    for seed in (1, 2):
        parent = f'old-s{seed}'
        write_run(tmp_path / parent, {'old': 3.0, 'new': 5.0}, start={'old': 9.0, 'new': 9.0})
        runs.append(entry(parent, 'none', 'old', seed, tokens={'old': 1000}))
        for share in (*SHARES, 'other', 'unfinished'):
            part = 0.3 if isinstance(share, str) else share
            more = {'other': {'scheduler': {'name': 'rewarm_constant'}}, 'unfinished': {'reached': 5}}.get(share, {})
            name, final = f'new-{share}-s{seed}', {'old': 3.0 + forgets(part), 'new': 1 + 0.1 * exp(3 * part)}
            streams = {'old': {'local': 'data/y'}} if part else None
            write_run(tmp_path / name, final, f'{tmp_path}/{parent}/latest-rank0.pt', new='new', replay=streams, **more)
            tokens = {'new': round(1000 * (1 - part)), **({'old': round(1000 * part)} if part else {})}
            runs.append(entry(name, str(share), 'new', seed, parent, tokens))
    write_plan(tmp_path, 'pilots', {'old': 1000, 'new': 1000}, runs)
    return tmp_path


def test_runs_that_differ_in_the_share_alone_are_the_pilots(folder):
    found = pilots_of(read_runs([folder]))
    assert list(found) == ['old']
    assert [(each.seed, each.shares) for each in found['old']] == [(1, SHARES), (2, SHARES)]
    assert found['old'][0].forgetting == pytest.approx([forgets(share) for share in SHARES])
    assert found['old'][1].on_new['new'][-1] == pytest.approx(1 + 0.1 * exp(1.5))


def test_a_share_that_changes_is_no_pilot(folder):
    moving = [['100sp', 0.5], ['1000sp', 0.0]]
    for seed in (1, 2):
        change(
            folder / f'new-0.1-s{seed}' / 'stage.json',
            lambda stage: stage['config']['train_loader']['dataset']['replay'].update(fraction=moving),
        )
    found = pilots_of(read_runs([folder]))
    assert [each.shares for each in found['old']] == [(0.0, 0.05, 0.25, 0.5)] * 2


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / 'out'
    out.mkdir()
    foresee.main([str(folder), '--out', str(out / 'share.png'), '--json', str(out / 'share.json')])
    said = ' '.join(capsys.readouterr().out.split())
    assert '25.0 % (25.0 to 25.0)' in said and 'nothing is forgotten' in said
    assert (out / 'share.png').stat().st_size > 10_000
    assert json.loads((out / 'share.json').read_text())['old']['share']['value'] == pytest.approx(0.25, abs=1e-4)
    with pytest.raises(SystemExit, match='no pilot forgets as little as -1'):
        foresee.main([str(folder), '--forgetting', '-1'])


def test_runs_that_are_no_pilots_are_refused(tmp_path):
    write_sequence(tmp_path / 'two')
    with pytest.raises(SystemExit, match='there are 2 shares'):
        foresee.main([str(tmp_path / 'two'), '--forgetting', '0.5'])
    write_run(tmp_path / 'one' / 'scratch-s1', {'old': 3.0}, start={'old': 9.0})
    with pytest.raises(SystemExit, match=r'no finished update of a parent knows what it forgot'):
        foresee.main([str(tmp_path / 'one' / 'scratch-s1')])


# How updates end


@pytest.fixture
def curves(tmp_path):
    """Updates of four shares whose losses fall and rise as the rates say; another schedule of one; one under way."""
    runs = [entry('old-s1', 'none', 'old', 1, tokens={'old': 10_000})]
    write_run(tmp_path / 'old-s1', {'old': 3.0, 'new': 5.0}, batches=100)
    others = {'other': {'scheduler': {'name': 'rewarm_constant', 't_warmup': '0ba'}}, 'going': {'reached': 70}}
    for share in (*SHARES[:4], 'other', 'going'):
        part, name = 0.05 if isinstance(share, str) else share, f'new-{share}-s1'
        streams = {'old': {'local': 'data/y'}} if part else None
        scheduler = {'name': 'rewarm_cosine', 't_warmup': '0.1dur', 'alpha_f': 0.1}
        over = {'scheduler': scheduler, **others.get(share, {})}
        final = {'old': 3.5, 'new': 4.0}
        parent = f'{tmp_path}/old-s1/latest-rank0.pt'
        write_run(tmp_path / name, final, parent, batches=100, new='new', replay=streams, **over)
        change(tmp_path / name / 'losses.json', lambda run, part=part: follow_the_law(run, part))
        if part:
            change(tmp_path / name / 'stage.json', lambda stage, part=part: set_fraction(stage['config'], part))
        tokens = {'new': round(10_000 * (1 - part)), **({'old': round(10_000 * part)} if part else {})}
        runs.append({**entry(name, f'replay {share}', 'new', 1, 'old-s1', tokens), 'batches': 100})
    write_plan(tmp_path, 'pilots', {'old': 10_000, 'new': 10_000}, runs)
    return tmp_path


def set_fraction(config, part):
    config['train_loader']['dataset']['replay']['fraction'] = part


def follow_the_law(run, part):
    area = [sum(rate for _, _, rate in run['learning_rate'][:batch]) for batch in range(101)]
    for name, start, shift in (('old', 3.0, exp(-6 * part)), ('new', 5.0, -2.0)):
        for row in run['losses'][name]:
            row[2] = start + shift * (1 - (1 + 20 * area[row[0]]) ** -0.5)
    run['final'] = {name: {'mean': rows[-1][2]} for name, rows in run['losses'].items()} if run['final'] else {}


def test_updates_that_differ_in_schedule_alone_are_one_group(curves):
    groups = update_pilots_of(read_runs([curves]))
    assert [each.updates[0].share for each in groups] == list(SHARES[:4])
    assert [len(each.updates[0].trajectories['old']) for each in groups] == [2, 3, 2, 2], 'with the parent'
    assert groups[0].updates[0].trajectories['new'][1].losses[0] == 5.0


def test_the_rates_of_a_schedule(curves):
    stage = update_pilots_of(read_runs([curves]))[0].stage
    assert rates_of(stage)[:2] == [0, pytest.approx(0.001)]
    wsd = rates_of(stage, 5000, {'name': 'wsd', 't_warmup': '0ba', 't_decay': '10ba', 'alpha_f': 0.0})
    assert (len(wsd), wsd[0], wsd[39]) == (50, 0.01, 0.01) and wsd[49] == pytest.approx(0.001, rel=0.5)
    with pytest.raises(ValueError, match=r'scheduler.name=cosine_with_warmup, 50ba: what is foretold is'):
        rates_of(stage, 5000, {'name': 'cosine_with_warmup', 't_warmup': '1ba'})


def test_the_command_says_how_updates_end(curves, capsys, tmp_path):
    out = ['--out', str(tmp_path / 'end.png'), '--json', str(tmp_path / 'end.json')]
    foresee.main([str(curves), '--tokens', '5000', *out])
    said = ' '.join(capsys.readouterr().out.split())
    assert 'at the end of 5.00 k tokens' in said and 'old (old)' in said and said.count('one seed:') == 1
    found = json.loads((tmp_path / 'end.json').read_text())
    assert list(found) == [f'replay {share}' for share in SHARES[:4]]
    assert found['replay 0.0']['old']['change']['value'] > found['replay 0.25']['old']['change']['value'] > 0
    assert (tmp_path / 'end.png').stat().st_size > 10_000
    foresee.main([str(curves), '--scheduler', '{name: wsd, t_warmup: 1ba, t_decay: 0.2dur, alpha_f: 0.0}'])
    assert 'no pilot has gone as far: the area' in capsys.readouterr().out
    for words, message in (
        (['--scheduler', 'wsd'], 'scheduler.name is missing'),
        (['--scheduler', '[wsd]'], 'expected a mapping'),
        (['--scheduler', '{name: wsdd}'], "did you mean 'wsd'"),
        (['--forgetting', '-1', '--adaptation', '9'], 'no pilot shows both within 10,000 tokens'),
    ):
        with pytest.raises(SystemExit, match=message):
            foresee.main([str(curves), *words])
    with pytest.raises(SystemExit):
        foresee.main([str(curves), '--tokens', '5000', '--adaptation', '1'])


def test_the_command_says_what_is_cheapest(curves, capsys, tmp_path):
    words = ['--forgetting', '0.4', '--adaptation', '1.2', '--out', str(tmp_path / 'cheapest.png')]
    foresee.main([str(curves), *words])
    said = ' '.join(capsys.readouterr().out.split())
    assert 'forgetting of at most 0.4, adaptation of at least 1.2' in said
    assert (tmp_path / 'cheapest.png').stat().st_size > 10_000


def test_the_rest_of_a_run_is_foretold(curves):
    study = read_runs([curves])
    going = next(run for run in study.given if run.state == 'unfinished')
    forecast = forecast_of(study, going, 'new')
    assert [tokens for tokens, _ in forecast] == [7000, 8500, 10_000]
    finished = next(run for run in study.given if run.name == 'new-0.05-s1')
    assert forecast[-1][1].value == pytest.approx(finished.final['new'], abs=0.05)
    assert forecast_of(study, finished, 'new') == []
