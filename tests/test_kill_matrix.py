# SPDX-License-Identifier: Apache-2.0
"""A hundred kills, at random moments of every part of a stage: it always ends as if nothing had happened."""

import json
import os
import random
import signal
import socket
import time
from collections import Counter

import pytest
import recorder
import tiny
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cpt_algorithms.stage.fork_server import ForkServer

# The recipe, as a rank that the composer launcher would have started; a fork of what has made the imports.
RANK = """
import json, os, runpy, sys
from pathlib import Path
folder = Path(sys.argv[1]).parent
given = json.loads((folder / 'rank.json').read_text())
os.environ.update(given['environment'])
sys.argv, sys.path[:0] = [given['recipe'], given['yaml']], given['path']
runpy.run_path(given['recipe'], run_name='__main__')
"""
PHASES = ('start', 'training', 'save', 'average', 'export')


class Stage:
    """A stage that can be started, killed and started again."""

    def __init__(self, folder, data, parent, name, ranks, servers):
        self.folder, self.ranks, self.servers, self.name = folder, ranks, servers, name
        replay = {'fraction': 0.25, 'streams': {'old': {'local': str(data['old']), 'split': 'train'}}}
        callbacks = {
            'final_loss': {'window': '6ba', 'interval': '3ba'}, 'forgetting': {'new': ['new'], 'old': ['old']},
            'ema': {'half_life': '4ba'}, 'lawa': {'k': 3, 'interval': '2ba'},
        }  # fmt: skip
        cfg = tiny.config(
            folder, data, name, load_path=str(parent), max_duration='60ba', save_interval='3ba', eval_interval='4ba',
            train_loader={'dataset': {'replay': replay}}, callbacks=callbacks, save_num_checkpoints_to_keep=2,
            eval_loader=[tiny.eval_loader(label, data[label]) for label in ('old', 'new')],
            fsdp_config={'state_dict_type': 'sharded'} if ranks > 1 else None,
        )  # fmt: skip
        OmegaConf.save(OmegaConf.create(cfg), folder / f'{name}.yaml')
        (folder / 'rank.py').write_text(RANK)
        self.running = []

    @property
    def run(self):
        return self.folder / self.name

    def start(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.running = []
        for rank, server in enumerate(self.servers[: self.ranks]):
            place = self.folder / f'{self.name}-rank{rank}'
            place.mkdir(exist_ok=True)
            environment = {
                'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': self.ranks, 'LOCAL_WORLD_SIZE': self.ranks,
                'NODE_RANK': 0, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port,
            }  # fmt: skip
            given = {
                'environment': {key: str(value) for key, value in environment.items()} if self.ranks > 1 else {},
                'recipe': str(tiny.ROOT / 'recipes' / 'continue_pretraining.py'),
                'yaml': str(self.folder / f'{self.name}.yaml'),
                'path': [str(tiny.ROOT / 'recipes'), str(tiny.ROOT / 'tests')],
            }
            (place / 'rank.json').write_text(json.dumps(given))
            self.running.append(server.start(self.folder / 'rank.py', place / 'run.yaml', place / 'log.txt'))

    def codes(self):
        return [poll() for _, poll in self.running]

    def end(self):
        deadline = time.monotonic() + 120
        while None in self.codes():
            assert time.monotonic() < deadline, 'it hangs'
            time.sleep(0.01)
        return self.codes()

    def kill(self):
        for process, _ in self.running:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return self.end()

    def batches(self):
        path = self.folder / f'{self.name}.jsonl.rank0'
        return path.read_text().count('\n') if path.exists() else 0

    def checkpoints(self):
        return {path.name for path in self.run.glob('ep*')} if self.run.exists() else set()

    def reach(self, phase):
        """Wait until a phase has begun, or the stage is over."""
        batches, checkpoints = self.batches(), self.checkpoints()
        begun = {
            'start': lambda: True,
            'training': lambda: self.batches() > batches,
            'save': lambda: bool(self.checkpoints() - checkpoints),
            'average': lambda: self.batches() > batches + 1,
            'export': lambda: (self.run / 'huggingface').exists(),
        }[phase]
        while not begun() and None in self.codes():
            time.sleep(0.0005)

    def results(self):
        exports = {}
        for path in sorted((self.run / 'huggingface').glob('*/*.safetensors')):
            exports[f'{path.parent.name}/{path.name}'] = {name: t.tolist() for name, t in load_file(path).items()}
        assert len(exports) == 3, 'the weights, and two averages'
        losses = json.loads((self.run / 'losses.json').read_text())
        del losses['cost']['seconds']
        lines = [recorder.read(self.folder / f'{self.name}.jsonl', rank) for rank in range(self.ranks)]
        return {
            'exports': exports, 'losses': losses, 'forgetting': json.loads((self.run / 'forgetting.json').read_text()),
            'done': json.loads((self.run / 'done.json').read_text()), 'lines': lines,
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(('ranks', 'rounds'), [(1, 14), (2, 6)])
def test_killed_at_any_moment_it_ends_the_same(ranks, rounds, data, tmp_path):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'FSDP_VERSION': '2'}
    servers = [ForkServer(environment) for _ in range(ranks)]
    sharded = {'fsdp_config': {'state_dict_type': 'sharded'}} if ranks > 1 else {}
    parent = tiny.config(tmp_path, data, 'parent', max_duration='4ba', save_interval='4ba', **sharded)
    OmegaConf.save(OmegaConf.create(parent), tmp_path / 'parent.yaml')
    if ranks > 1:
        tiny.launch(tiny.ROOT / 'recipes' / 'continue_pretraining.py', tmp_path / 'parent.yaml')
    else:
        tiny.recipe_here(parent, tmp_path)
    checkpoint = tmp_path / 'parent' / ('ep0-ba4' if ranks > 1 else 'ep0-ba4-rank0.pt')

    def stage(name):
        return Stage(tmp_path, data, checkpoint, name, ranks, servers)

    seed = random.randrange(10**6)
    print(f'\n{ranks} rank(s), seed {seed}')  # noqa: T201 - to be able to repeat it
    chance = random.Random(seed)
    straight = stage('straight')
    straight.start()  # the servers import meanwhile
    assert set(straight.end()) == {0}
    expected = straight.results()
    timed = stage('timed')
    begun = time.monotonic()
    timed.start()
    reached = {}
    for phase in ('training', 'export'):
        timed.reach(phase)
        reached[phase] = time.monotonic() - begun
    timed.end()
    training = reached['export'] - reached['training']
    most = {
        'start': reached['training'],
        'training': training / 3,
        'save': 0.01,
        'average': training / 6,
        'export': 0.1,
    }
    kills: Counter[str] = Counter()
    for number in range(rounds):
        killed = stage(f'killed-{number}')
        for phase in PHASES:
            killed.start()
            killed.reach(phase)
            time.sleep(chance.uniform(0, most[phase]))
            codes = killed.kill()
            kills[phase] += set(codes) == {-signal.SIGKILL} and not (killed.run / 'done.json').exists()
        killed.start()
        assert set(killed.end()) == {0}, (tmp_path / f'killed-{number}-rank0' / 'log.txt').read_text()[-3000:]
        assert killed.results() == expected, number
    print(f'killed at work: {dict(kills)} of {rounds} each')  # noqa: T201
    assert sum(kills.values()) >= 0.9 * rounds * len(PHASES), 'the others came after its end'
