# SPDX-License-Identifier: Apache-2.0
"""Runs are started here, as Slurm jobs (of a small Slurm), and by printed commands."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
import recorder
import sequence
import tiny
from composer.cli import launcher
from omegaconf import OmegaConf

from cpt_algorithms.launch import launcher as launcher_module
from cpt_algorithms.launch.launcher import LaunchError, Resources, command, gpu_shares, make_launcher, resources_of
from cpt_algorithms.launch.slurm_node import TrainingNode

RECIPE = tiny.RECIPE
SLURM = {'slurm_partition': 'debug', 'timeout_min': 60}


def parsed(line, **environ):
    """What the composer launcher makes of a command, which a shell has read."""
    words = subprocess.run(
        ['bash', '-c', f"printf '%s\\n' {line}"],
        capture_output=True, text=True, check=True, env=environ,
    ).stdout.splitlines()  # fmt: skip
    assert words[0] == 'composer'
    return launcher._get_parser().parse_args(words[1:])


def test_commands_are_what_the_launcher_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    yaml = tmp_path / 'two words' / 'run.yaml'
    one = command(Resources(nproc=8), RECIPE, yaml)
    assert one == f"composer -n 8 recipes/continue_pretraining.py '{yaml}'"
    given = parsed(one)
    assert (given.nproc, given.world_size) == (8, None)
    many = command(Resources(nodes=4, nproc=8), RECIPE, Path.cwd() / 'runs' / 'x' / 'run.yaml')
    assert many == (
        'composer -n 8 --world_size 32 --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 29500 '
        'recipes/continue_pretraining.py runs/x/run.yaml'
    )
    given = parsed(many, NODE_RANK='3', MASTER_ADDR='first')
    assert (given.nproc, given.world_size, given.node_rank) == (8, 32, 3)
    assert (given.master_addr, given.master_port) == ('first', 29500)
    assert [given.training_script, *given.training_script_args] == many.split()[-2:]


@pytest.mark.parametrize(
    ('spec', 'problem'),
    [
        ({'nodes': 0}, 'nodes=0 '),
        ({'nproc': '8'}, "nproc='8' "),
        ({'nproc': True}, 'nproc=True '),
        ({'nodes': 0, 'nproc': 0}, r'nodes=0 (.|\n)*nproc=0 '),
        ({'slurm': 'gpu'}, "slurm='gpu' "),
        ({'slurm': {}}, r'^slurm.timeout_min=None '),
        ({'slurm': {'timeout_min': '4h'}}, r"^slurm.timeout_min='4h' "),
        ({'slurm': {'timeout_min': 0}}, r'^slurm.timeout_min=0 '),
        ({'slurm': {**SLURM, 'slurm_partion': 'gpu'}}, r"^slurm.slurm_partion .*'slurm_partition'"),
        ({'slurm': {**SLURM, 'partition': 'gpu'}}, r"^slurm.partition .*'slurm_partition'"),
        ({'slurm': {**SLURM, 'nodes': 2}}, r'^slurm.nodes .*nodes: 2'),
        ({'slurm': {**SLURM, 'tasks_per_node': 8}}, r'^slurm.tasks_per_node .*nproc'),
        ({'slurm': {**SLURM, 'slurm_time': '4:00:00'}}, r'^slurm.slurm_time .*timeout_min'),
        ({'nproc': 8, 'slurm': {**SLURM, 'gpus_per_node': 4}}, r'^slurm.gpus_per_node=4 .*nproc=8'),
        ({'slurm': {**SLURM, 'mem_gb': 'all'}}, r'^slurm: .*"mem_gb".*"all"'),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_submitted(spec, problem):
    with pytest.raises(ValueError, match=problem):
        resources_of(spec)


def test_resources():
    assert vars(resources_of({'nodes': None, 'name': 'of another part'})) == vars(Resources())
    assert resources_of({'nodes': 4, 'nproc': 8, 'slurm': SLURM}).ranks == 32


def test_runs_are_refused_where_they_cannot_be_started(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match='^nodes=2: .*--write'):
        make_launcher(Resources(nodes=2), jobs=1)
    for tool in ('sbatch', 'srun', 'squeue', 'scontrol'):
        monkeypatch.setenv('PATH', str(tmp_path))
        with pytest.raises(ValueError, match=f'^slurm: {tool} '):
            make_launcher(resources_of({'slurm': SLURM}), jobs=1)
        (tmp_path / tool).write_text('#!/bin/sh')
        (tmp_path / tool).chmod(0o755)


# GPUs


def test_runs_at_the_same_time_have_gpus_of_their_own():
    assert gpu_shares(['0', '1', '2', '3'], jobs=4, nproc=1) == ['0', '1', '2', '3']
    assert gpu_shares(['4', 'GPU-5', '6', '7', '8'], jobs=2, nproc=2) == ['4,GPU-5', '6,7']
    assert gpu_shares([], jobs=4, nproc=2) == []
    with pytest.raises(
        ValueError, match='^jobs=2 with nproc=2 wants 4 GPUs, .* 3 can be seen .0,1,2.; choose fewer jobs'
    ):
        gpu_shares(['0', '1', '2'], jobs=2, nproc=2)


@pytest.mark.parametrize(
    ('given', 'count', 'visible'),
    [(None, 2, ['0', '1']), ('3, 1', 2, ['3', '1']), ('0,9', 1, ['0']), ('', 0, []), (None, 0, [])],
)
def test_gpus_that_can_be_seen(given, count, visible, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if given is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', given)
    monkeypatch.setattr('torch.cuda.device_count', lambda: count)
    assert launcher_module._visible_gpus() == visible


def test_a_run_takes_gpus_that_no_other_has(tmp_path, monkeypatch, wait):
    monkeypatch.setattr(launcher_module, '_visible_gpus', lambda: ['2', '5'])
    script = tmp_path / 'says.py'
    script.write_text(
        'import os, pathlib, sys, time\n'
        "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "while not (pathlib.Path(sys.argv[1]).parent / 'end').exists(): time.sleep(0.05)\n"
    )
    folders = [tmp_path / name for name in 'abc']
    for folder in folders:
        folder.mkdir()
    start = make_launcher(Resources(), jobs=2)
    first, second = start(script, folders[0]), start(script, folders[1])
    (folders[1] / 'end').touch()
    assert wait(second) == 0
    third = start(script, folders[2])
    for folder in folders:
        (folder / 'end').touch()
    assert (wait(first), wait(third)) == (0, 0)
    assert [(folder / 'log.txt').read_text().strip() for folder in folders] == ['2', '5', '5']


# A small Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / 'the slurm'
    for key, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setattr('cpt_algorithms.launch.launcher._ASK', 0)
    monkeypatch.setattr('cpt_algorithms.launch.launcher._PAUSE', 0)
    yield folder
    for job, state in fake_slurm.states(folder).items():
        if state == 'RUNNING':
            subprocess.run(['scancel', job], check=True)


def test_a_queued_job_is_found_again_and_a_cancelled_one_has_failed(slurm, run, monkeypatch, wait):
    (slurm / 'hold').touch()
    layout = resources_of(
        {'nodes': 2, 'nproc': 4, 'slurm': {**SLURM, 'slurm_account': 'mine', 'gpus_per_node': 4, 'cpus_per_task': 32}}
    )
    handle = make_launcher(layout, jobs=1)(RECIPE, run)
    assert handle.name == 'Slurm job 1000, which goes on without this process'
    assert handle.poll() is None
    batch = (slurm / '1000.sh').read_text().strip().splitlines()
    for key, value in {
        'job-name': 'runs/run', 'partition': 'debug', 'account': 'mine', 'time': '60', 'nodes': '2',
        'ntasks-per-node': '1', 'gpus-per-node': '4', 'signal': 'USR2@90',
    }.items():  # fmt: skip
        assert f'#SBATCH --{key}={value}' in batch
    assert '--kill-on-bad-exit=1 --cpus-per-task=32' in batch[-1]
    again = make_launcher(layout, jobs=1)(RECIPE, run)
    assert again.name == 'Slurm job 1000, found again'
    assert fake_slurm.states(slurm) == {'1000': 'PENDING'}

    subprocess.run(['scancel', '1000'], check=True)
    monkeypatch.setattr('cpt_algorithms.launch.launcher._LAG', 0.5)
    assert wait(again, 30) == 1
    assert 'Slurm job 1000 is over (CANCELLED)' in (run / 'log.txt').read_text()
    # it is over: the next start is another job
    assert make_launcher(layout, jobs=1)(RECIPE, run).name.startswith('Slurm job 1001,')


# Of https://slurm.schedmd.com/job_state_codes.html, and words that it may have one day
OVER = ['BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'LAUNCH_FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY']
OVER += ['PREEMPTED', 'RECONFIG_FAIL', 'REVOKED', 'TIMEOUT']
ALIVE = ['PENDING', 'RUNNING', 'SUSPENDED', 'COMPLETING', 'CONFIGURING', 'POWER_UP_NODE', 'REQUEUED', 'REQUEUE_HOLD']
ALIVE += ['REQUEUE_FED', 'RESIZING', 'RESV_DEL_HOLD', 'SIGNALING', 'SPECIAL_EXIT', 'STAGE_OUT', 'STOPPED', 'A_NEW_WORD']


def test_over_alive_and_unknown_are_three_answers(slurm, run, monkeypatch, caplog):
    (slurm / 'hold').touch()
    monkeypatch.setattr('cpt_algorithms.launch.launcher._LAG', 0)
    start = make_launcher(resources_of({'slurm': SLURM}), jobs=1)
    handle = start(RECIPE, run)
    for state in ALIVE:
        (slurm / '1000.state').write_text(state)
        assert handle.poll() is None, state
        assert start(RECIPE, run).name == 'Slurm job 1000, found again', state
    # Slurm does not answer: nothing fails, nothing is submitted, however long ago it was
    (slurm / 'deaf').touch()
    os.utime(run / 'slurm' / '1000_submitted.pkl', (0, 0))
    (slurm / '1000.state').write_text('FAILED')
    assert handle.poll() is None and handle.poll() is None
    assert caplog.text.count('squeue does not answer') == 1
    with pytest.raises(LaunchError, match='^run: whether Slurm job 1000 goes on is not known: .*Unable to contact'):
        start(RECIPE, run)
    with pytest.raises(ValueError, match='^slurm: squeue does not answer.*Unable to contact'):
        make_launcher(resources_of({'slurm': SLURM}), jobs=1)
    (slurm / 'deaf').unlink()
    for number, state in enumerate([*OVER, None], start=1001):
        (slurm / f'{number - 1}.state').write_text(state or 'PENDING')
        if state is None:  # purged
            (slurm / f'{number - 1}.state').rename(slurm / 'purged')
        assert handle.poll() == 1, state
        assert f'Slurm job {number - 1} is over ({state or "gone"})' in (run / 'log.txt').read_text()
        if state is not None:
            handle = start(RECIPE, run)
            assert handle.name.startswith(f'Slurm job {number},')
    assert len(fake_slurm.states(slurm)) == len(OVER)


def test_a_job_that_seemed_over_and_goes_on_has_not_failed(slurm, run, monkeypatch):
    (slurm / 'hold').touch()
    monkeypatch.setattr('cpt_algorithms.launch.launcher._LAG', 0.5)
    handle = make_launcher(resources_of({'slurm': SLURM}), jobs=1)(RECIPE, run)
    for state in ('NODE_FAIL', 'PENDING', 'NODE_FAIL'):  # requeued
        (slurm / '1000.state').write_text(state)
        assert handle.poll() is None
        time.sleep(0.3)


def test_a_job_that_slurm_refuses_is_one_line(slurm, run):
    layout = resources_of({'slurm': {**SLURM, 'slurm_partition': 'refuse'}})
    with pytest.raises(LaunchError, match='^run: .* invalid partition'):
        make_launcher(layout, jobs=1)(RECIPE, run)
    assert fake_slurm.states(slurm) == {}


def test_a_node_is_found_by_its_pickle():
    assert TrainingNode.__module__ == 'cpt_algorithms.launch.slurm_node'


def write(run, data, **over):
    cfg = tiny.config(run.parent, data, run.name, log_to_console=True, **over)
    tiny.save(cfg, run / 'run.yaml')


@pytest.mark.slow
def test_a_run_that_fails_says_so(slurm, run, data, wait):
    write(run, data, optimizer={'name': 'decoupled_adamw', 'lr': -1.0})
    assert wait(make_launcher(resources_of({'slurm': SLURM}), jobs=1)(RECIPE, run)) not in (0, None)
    assert 'was refused before training' in (run / 'log.txt').read_text()
    assert not (run / 'done.json').exists()


ALL_REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group('gloo')
ones = torch.ones(1)
dist.all_reduce(ones)
print('sum', int(ones), 'rank', dist.get_rank(), 'node', os.environ['NODE_RANK'], 'of', os.environ['WORLD_SIZE'])
"""


@pytest.mark.slow
def test_two_nodes_find_each_other(slurm, run, wait):
    script = run / 'all_reduce.py'
    script.write_text(ALL_REDUCE)
    (run / 'run.yaml').touch()
    handle = make_launcher(resources_of({'nodes': 2, 'nproc': 2, 'slurm': SLURM}), jobs=1)(script, run)
    assert wait(handle) == 0
    assert 'sum 4 rank 0 node 0 of 4' in (run / 'log.txt').read_text()
    assert 'sum 4 rank 2 node 1 of 4' in (run / 'log-node1.txt').read_text()


@pytest.mark.slow
def test_a_job_fails_as_a_whole_if_one_node_does(slurm, run, monkeypatch, wait):
    monkeypatch.setattr('cpt_algorithms.launch.launcher._LAG', 0.5)
    script = run / 'half.py'
    script.write_text("import os, sys, time\nif os.environ['NODE_RANK'] == '1': sys.exit(3)\ntime.sleep(1000)\n")
    (run / 'run.yaml').touch()
    handle = make_launcher(resources_of({'nodes': 2, 'slurm': SLURM}), jobs=1)(script, run)
    assert wait(handle) == 1
    assert 'Slurm job 1000 is over (FAILED)' in (run / 'log.txt').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('numbers', [('SIGUSR2',), ('SIGTERM', 'SIGUSR2')], ids=['time is over', 'preempted'])
def test_a_requeued_job_goes_on_from_its_latest_checkpoint(slurm, run, data, numbers, wait):
    write(run, data, max_duration='48ba', scheduler={'t_warmup': '4ba'})
    handle = make_launcher(resources_of({'slurm': SLURM}), jobs=1)(RECIPE, run)
    deadline = time.monotonic() + 300
    while not list(run.glob('ep0-ba*')):
        assert handle.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for number in numbers:
        subprocess.run(['scancel', '1000', '--signal', number], check=True)
    assert wait(handle) == 0, (run / 'log.txt').read_text()
    assert 'Requeued job 1000' in (run / 'slurm' / '1000_0_log.out').read_text()
    assert fake_slurm.states(slurm)['1000'] in ('RUNNING', 'COMPLETED')
    assert json.loads((run / 'done.json').read_text())['batch'] == 48
    trained = recorder.read(run.parent / 'run.jsonl', 0)  # refuses batches that were redone differently
    assert list(trained) == list(range(48))


# A sequence


@pytest.fixture
def spec(data, tmp_path):
    return tiny.sequence_spec(tmp_path, data, '8ba', jobs=1)


def save(spec, folder):
    return str(tiny.save(spec, folder / 'sequence.yaml'))


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, 'argv', ['sequence.py', *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        sequence.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    return capsys.readouterr().out


def test_commands_are_printed_and_written_yamls_are_what_they_train(spec, tmp_path, monkeypatch, capsys):
    spec |= {'nodes': 2, 'nproc': 2, 'slurm': SLURM}
    monkeypatch.chdir(tmp_path)
    path = save(spec, tmp_path)
    printed = call(monkeypatch, capsys, path, '--dry-run')
    assert not (tmp_path / 'runs').exists()
    many = 'composer -n 2 --world_size 4 --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 29500'
    commands = [f'{many} {shlex.quote(str(RECIPE))} runs/{name}/run.yaml' for name in ('old-s17', 'new-s17')]
    assert [line for line in printed.splitlines() if line.startswith('composer')] == commands
    assert '# new-s17, when old-s17 is done' in printed
    assert 'NODE_RANK is 0 to 1' in printed

    assert call(monkeypatch, capsys, path, '--write') == printed
    files = [file for file in (tmp_path / 'runs').rglob('[!.]*') if file.is_file()]
    assert {str(file.relative_to(tmp_path / 'runs')) for file in files} == {
        'sequence.json',
        'old-s17/run.yaml',
        'new-s17/run.yaml',
    }
    run = OmegaConf.load(tmp_path / 'runs' / 'new-s17' / 'run.yaml')
    assert run.load_path == f'{tmp_path}/runs/old-s17/latest-rank0.pt'


@pytest.mark.slow
def test_a_printed_command_trains_the_run_and_the_sequence_keeps_it(spec, tmp_path, monkeypatch, capsys):
    path = save(spec, tmp_path)
    printed = call(monkeypatch, capsys, path, '--write')
    first = next(line for line in printed.splitlines() if line.startswith('composer'))
    bin_folder = Path(sys.executable).parent
    subprocess.run(['bash', '-c', first], check=True, env={**os.environ, 'PATH': f'{bin_folder}:{os.environ["PATH"]}'})
    printed = call(monkeypatch, capsys, path)
    assert '1 of 2 runs are done already' in printed
    assert 'old-s17: started' not in printed


@pytest.mark.slow
def test_a_killed_sequence_finds_its_jobs_again(spec, tmp_path, slurm, monkeypatch, capsys):
    spec['slurm'] = SLURM
    path = save(spec, tmp_path)
    (slurm / 'hold').touch()
    process = tiny.start(tiny.SEQUENCE, path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / 'runs').glob('*/slurm/*_submitted.pkl')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    fake_slurm.release(slurm)
    printed = call(monkeypatch, capsys, path)
    assert 'old-s17: started (Slurm job 1000, found again)' in printed
    assert 'new-s17: done' in printed
    assert fake_slurm.states(slurm).keys() == {'1000', '1001'}, 'one job for each run'
    assert 'final validation loss' in printed
