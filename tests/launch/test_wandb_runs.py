# SPDX-License-Identifier: Apache-2.0
"""Under W&B's agent the trial's run gets the trial's numbers, and training processes have runs of their own."""

import os
import subprocess
import sys

import wandb_files

from cpt_algorithms.launch.wandb_runs import environment_of_children, trial_run

TRIAL = """
import os, subprocess, sys
from cpt_algorithms.launch.wandb_runs import environment_of_children, trial_run
child = 'import wandb; run = wandb.init(project="p", name="child"); run.log({"loss": 1.0}); run.finish()'
with trial_run({'sequence': 'quickstart'}) as summary:
    subprocess.run([sys.executable, '-c', child], env=environment_of_children(os.environ), check=True, timeout=60)
    summary['final_loss/mean'] = 3.25
    sys.exit(int(sys.argv[1]))
"""


def test_the_agents_run_gets_the_summary_and_children_have_their_own(tmp_path):
    parameters = tmp_path / 'config.yaml'
    parameters.write_text('wandb_version: 1\n\ncpp.replay.fraction:\n  value: 0.05\n')
    agent = {
        'WANDB_MODE': 'offline',
        'WANDB_DIR': str(tmp_path),
        'WANDB_SWEEP_ID': 'sweep',
        'WANDB_RUN_ID': 'trial',
        'WANDB_SWEEP_PARAM_PATH': str(parameters),
    }
    command = [sys.executable, '-c', TRIAL, '3']
    assert subprocess.run(command, env={**os.environ, **agent}, check=False, timeout=120).returncode == 3
    runs = {run.id: run for run in wandb_files.read(tmp_path)}
    trial, child = runs.pop('trial'), runs.popitem()[1]
    assert not runs
    assert trial.summary['final_loss/mean'] == 3.25
    assert trial.config['cpp.replay.fraction'] == 0.05
    assert trial.config['sequence'] == 'quickstart'
    assert (child.name, child.summary['loss']) == ('child', 1.0)
    assert 'cpp.replay.fraction' not in child.config
    assert wandb_files_say(tmp_path, 'trial') == ('sweep', True), 'the sweep sees that it failed'
    assert wandb_files_say(tmp_path, child.id) == ('', False)


def wandb_files_say(folder, run_id):
    """The sweep that a run belongs to, and whether it failed."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = folder.glob(f'wandb/offline-run-*/run-{run_id}.wandb')
    store, sweep, failed = DataStore(), '', None
    store.open_for_scan(str(path))
    while data := store.scan_data():
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        sweep = record.run.sweep_id or sweep
        failed = record.exit.exit_code != 0 if record.HasField('exit') else failed
    return sweep, failed


def test_without_an_agent_nothing_is_opened(monkeypatch):
    monkeypatch.delenv('WANDB_SWEEP_ID', raising=False)
    with trial_run({}) as summary:
        summary['final_loss/mean'] = 1.0
    given = {'PATH': '/bin', 'WANDB_MODE': 'offline', 'WANDB_SWEEP_ID': 'x', 'WANDB_RUN_ID': 'y', 'WANDB_SERVICE': 'z'}
    assert environment_of_children(given) == {'PATH': '/bin', 'WANDB_MODE': 'offline'}
