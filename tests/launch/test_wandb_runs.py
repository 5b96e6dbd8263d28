# SPDX-License-Identifier: Apache-2.0
"""Under W&B's agent the trial's run gets the trial's numbers, and training processes have runs of their own."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb_files
import yaml
from tiny import ROOT

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
    (path,) = folder.glob(f'wandb/offline-run-*/run-{run_id}.wandb')
    sweep, failed = '', None
    for record in wandb_files.records(path):
        sweep = record.run.sweep_id or sweep
        failed = record.exit.exit_code != 0 if record.HasField('exit') else failed
    return sweep, failed


def test_without_an_agent_nothing_is_opened(monkeypatch):
    monkeypatch.delenv('WANDB_SWEEP_ID', raising=False)
    with trial_run({}) as summary:
        summary['final_loss/mean'] = 1.0
    given = {'PATH': '/bin', 'WANDB_MODE': 'offline', 'WANDB_SWEEP_ID': 'x', 'WANDB_RUN_ID': 'y', 'WANDB_SERVICE': 'z'}
    assert environment_of_children(given) == {'PATH': '/bin', 'WANDB_MODE': 'offline'}


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as one agent, which is given one trial, asks."""

    sweep, trials = {}, []

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['query']
        agent = {'agent': {'id': 'a'}}
        sweep = {
            'id': 's',
            'name': 's',
            'state': 'RUNNING',
            'runs': {'edges': []},
            'config': yaml.safe_dump(self.sweep),
        }
        data = {'project': {'sweep': sweep}, 'createAgent': agent}
        if 'agentHeartbeat' in query:
            data['agentHeartbeat'] = {**agent, 'commands': json.dumps([self.trials.pop()] if self.trials else [])}
        answer = json.dumps({'data': data}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_metric_that_nobody_logs_is_refused_under_wandbs_own_agent(tmp_path, monkeypatch):
    sweep = yaml.safe_load((ROOT / 'yamls' / 'sweeps' / 'lawa.yaml').read_text())
    sweep['metric']['name'] = 'final_loss/mean/lava'
    trial = {'cpp.callbacks.lawa.interval': {'value': '2ba'}, 'cpp.callbacks.lawa.k': {'value': 2}}
    command = {'type': 'run', 'run_id': 'trial', 'program': str(ROOT / sweep['program']), 'args': trial}
    monkeypatch.setattr(Server, 'sweep', sweep)
    monkeypatch.setattr(Server, 'trials', [command])
    with ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        wandb = {
            'WANDB_MODE': 'online', 'WANDB_BASE_URL': f'http://127.0.0.1:{server.server_port}', 'WANDB_API_KEY': 'a' * 40,
            'WANDB_DIR': str(tmp_path), 'WANDB_AGENT_MAX_INITIAL_FAILURES': '1', 'PYTHONPATH': str(ROOT),
            'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),  # it starts `python`
        }  # fmt: skip
        agent = subprocess.run(
            [sys.executable, '-m', 'wandb', 'agent', 'me/project/s', '--count', '1'],
            cwd=ROOT, env={**os.environ, **wandb}, check=False, timeout=300, capture_output=True, text=True,
        )  # fmt: skip
        server.shutdown()
    said = agent.stdout + agent.stderr
    assert "metric.name='final_loss/mean/lava' is logged by no trial" in said and "'final_loss/mean/lawa'?" in said
    assert '1 failed runs in a row' in said
