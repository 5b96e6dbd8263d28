# SPDX-License-Identifier: Apache-2.0
"""More than a hundred kills, at random moments of every part of a stage, between stages, and of averaging offline.

Whatever is killed, the same command ends as if nothing had happened, and what is half-written is never taken for whole.
"""

import json
import os
import random
import secrets
import signal
import socket
import time
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import tiny
import torch
from judge_of_kills import lines_of, objections
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from test_sequence import results as results_of_sequence
from test_sequence import wait_until_gone
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.exports import exports, models_of
from cpt_algorithms.checkpoints.open import open_checkpoint, safe_globals
from cpt_algorithms.checkpoints.save_folder import is_complete
from cpt_algorithms.launch.fork_server import fork
from cpt_algorithms.weight_averaging.offline.select import find

SCRIPTS = tiny.ROOT / 'scripts'

# A recipe or script, as a process that was started for it alone; a fork of what has made the imports.
PROCESS = """
import json, os, runpy, sys
from pathlib import Path
given = json.loads((Path(sys.argv[1]).parent / 'process.json').read_text())
os.environ.update(given['environment'])
sys.argv, sys.path[:0] = given['words'], given['path']
runpy.run_path(given['words'][0], run_name='__main__')
"""
# Of the fork server, unless another test of this process has started it.
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
PHASES = ('start', 'training', 'save', 'average', 'export')


class Tally:
    """What the table says of each kind of kill."""

    def __init__(self):
        self.kills, self.half, self.same = defaultdict(int), defaultdict(int), {}

    def add(self, phase, ranks, at_work, half):
        self.kills[phase, ranks] += at_work
        self.half[phase, ranks] += at_work and half

    def table(self):
        table = Table('phase', 'processes', title='Killed', title_justify='left')
        for head in ('kills at work', 'left half-written', 'ended bit-identical'):
            table.add_column(head, justify='right')
        for (phase, ranks), kills in self.kills.items():
            same, of = self.same[phase, ranks]
            table.add_row(phase, str(ranks), str(kills), str(self.half[phase, ranks]), f'{same} of {of} runs')
        table.add_row('in all', '', str(sum(self.kills.values())), str(sum(self.half.values())), '')
        return table


@pytest.fixture(scope='module')
def tally():
    tally = Tally()
    yield tally
    Console(width=100).print(tally.table())


def seeded(what):
    """Random numbers, and their seed in the output; the moments also depend on how fast the machine is."""
    seed = secrets.randbelow(10**6)  # Composer has set that of `random`
    print(f'\n{what}: seed {seed}')  # noqa: T201
    return random.Random(seed)


class Process:
    """A script that can be started, killed and started again."""

    def __init__(self, place, words):
        self.place = place
        place.mkdir()
        (place / 'process.py').write_text(PROCESS)
        folders = [tiny.ROOT / 'recipes', tiny.ROOT / 'tests', SCRIPTS]
        self.given = {'words': list(map(str, words)), 'path': list(map(str, folders))}

    def start(self, environment=None):
        (self.place / 'process.json').write_text(
            json.dumps({**self.given, 'environment': {'FSDP_VERSION': '2', **(environment or {})}})
        )
        process = fork(self.place / 'process.py', self.place / 'run.yaml', self.place / 'log.txt', ENVIRONMENT)
        self.process, self.code = process.pid, lambda: process.exitcode

    def end(self, seconds=600):
        deadline = time.monotonic() + seconds
        while self.code() is None:
            assert time.monotonic() < deadline, f'it hangs: {self.said()}'
            time.sleep(0.01)
        return self.code()

    def finish(self):
        self.start()
        assert self.end() == 0, self.said()

    def send(self, what):
        if self.code() is None:  # else the number may be another's by now
            with suppress(ProcessLookupError):
                os.kill(self.process, what)

    def stand_still(self):
        self.send(signal.SIGSTOP)
        with suppress(FileNotFoundError, ProcessLookupError):  # it is over
            while Path(f'/proc/{self.process}/stat').read_text().rpartition(') ')[2][0] not in 'TXZ':
                time.sleep(0.0001)

    def kill(self):
        """Whether it was still at work."""
        self.send(signal.SIGKILL)
        return self.end() == -signal.SIGKILL

    def wait_for(self, begun):
        """Return when something is so, or the process is over."""
        while not begun() and self.code() is None:
            time.sleep(0.0003)

    def said(self):
        return (self.place / 'log.txt').read_text()[-3000:]


def load(path):
    """Everything in a checkpoint."""
    if path.is_dir():
        state = {}
        _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        return state
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True)


def weights_of(path):
    """Names and values, of any kind of checkpoint."""
    found = load_file(path / 'model.safetensors') if (path / 'config.json').exists() else load(path)['state']['model']
    return {name: tensor.tolist() for name, tensor in found.items()}


def check_whole(run, exported):
    """Whatever a restart, or another command, would take for a checkpoint, a model or a result is whole."""
    for path in run.glob('ep*-ba*'):
        if is_complete(path):
            assert load(path)['state']['model']
    for link in run.glob('latest*'):
        assert not link.exists() or is_complete(link.resolve())
    for folder in models_of(run) if exports(run) else ():
        files, weights = exported[folder.name]
        assert {file.name for file in folder.iterdir()} == files
        assert weights_of(folder) == weights
    for path in run.glob('*.json'):
        json.loads(path.read_text())


def exported_by(run):
    """For each export its files, and its weights."""
    found = run.glob('huggingface/ba*')
    return {folder.name: ({file.name for file in folder.iterdir()}, weights_of(folder)) for folder in found}


def half_saved(run):
    """Checkpoints of which a part is there."""
    return {path for path in run.glob('ep*-ba*') if not is_complete(path)}


def half_exported(run):
    """Exports of which a part is there."""
    return set(run.glob('huggingface/.ba*'))


def half_written(run):
    """The same of everything."""
    return half_saved(run) | half_exported(run) | set(run.glob('.*.json.*'))


class Stage:
    """The processes of a stage."""

    def __init__(self, folder, cfg, ranks=1):
        self.folder, self.name, self.run = folder, cfg['run_name'], folder / cfg['run_name']
        words = [tiny.RECIPE, tiny.save(cfg, folder / f'{self.name}.yaml')]
        self.ranks = [Process(folder / f'{self.name}-rank{rank}', words) for rank in range(ranks)]

    def start(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        for path in self.folder.glob(f'{self.name}.moments.*'):
            path.unlink()
        world = len(self.ranks)
        for rank, process in enumerate(self.ranks):
            environment = {
                'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world, 'LOCAL_WORLD_SIZE': world,
                'NODE_RANK': 0, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port,
            }  # fmt: skip
            process.start({key: str(value) for key, value in environment.items()} if world > 1 else {})

    def finish(self):
        self.start()
        assert [process.end() for process in self.ranks] == [0] * len(self.ranks), self.ranks[0].said()

    def kill(self, chance):
        """Kill all at once, or one, and the others a little later, as a launcher does; whether one was at work."""
        first, *others = chance.sample(self.ranks, len(self.ranks))
        at_work = first.kill()
        self.ranks[0].send(signal.SIGCONT)
        time.sleep(chance.choice([0, chance.uniform(0, 1)]) if others else 0)
        for process in others:
            process.kill()
        return at_work and not (self.run / 'done.json').exists()

    def batches(self):
        path = self.folder / f'{self.name}.jsonl.rank0'
        return path.read_bytes().count(b'\n') if path.exists() else 0

    def checkpoints(self):
        return {path.name for path in self.run.glob('ep*')} if self.run.exists() else set()

    def moment(self):
        path = self.folder / f'{self.name}.moments.rank0'
        return path.read_text() if path.exists() else ''

    def get_into(self, phase, chance, longest):
        """Wait until it is anywhere in a phase, and have the first process stand still in what takes a short time.

        Counted in batches where that can be: how fast they are changes with what else the machine does.
        """
        until, first = time.monotonic() + chance.uniform(0, longest[phase]), self.batches()
        ahead = first + chance.randint(1, 10)
        if phase == 'start':
            self.ranks[0].wait_for(lambda: time.monotonic() > until or self.batches() > first)
            return
        if phase == 'training':
            self.ranks[0].wait_for(lambda: self.batches() >= ahead)
            time.sleep(chance.uniform(0, longest[phase]))
            return
        is_over = False
        while not is_over:
            checkpoints, moment = self.checkpoints(), chance.choice('te')
            export = self.run / 'huggingface' / chance.choice(['.ba36', '.ba36-ema_4ba', '.ba36-lawa'])
            begun = {
                'save': lambda before=checkpoints: self.checkpoints() - before,
                'average': lambda moment=moment: self.batches() > first and self.moment() == moment,
                'export': export.exists,
            }[phase]
            self.ranks[0].wait_for(begun)
            time.sleep(chance.uniform(0, longest[phase]))
            is_over = self.ranks[0].code() is not None
            self.ranks[0].stand_still()
            if self.is_half_way(phase):
                return
            self.ranks[0].send(signal.SIGCONT)

    def durations(self):
        """Run it to its end, and say how long each phase takes: a batch, a save, an export."""
        self.start()
        times = []
        for begun in (
            lambda: self.batches() > 0,
            self.checkpoints,
            lambda: any(self.run.glob('latest*')),
            (self.run / 'huggingface').exists,
            (self.run / 'done.json').exists,
        ):
            times.append(time.monotonic())
            self.ranks[0].wait_for(begun)
        codes = [process.end() for process in self.ranks]
        assert codes == [0] * len(self.ranks), self.ranks[0].said()
        start, _, save, training, export = (after - before for before, after in pairwise([*times, time.monotonic()]))
        return {'start': start, 'training': training / 33, 'save': save, 'average': 0.002, 'export': export / 6}

    def is_half_way(self, phase):
        return {
            'average': lambda: self.moment() in {'t', 'e'},
            'export': lambda: half_exported(self.run),
        }.get(phase, lambda: half_saved(self.run))()

    def lines(self, rank):
        return lines_of(self.folder / f'{self.name}.jsonl', rank)

    def results(self):
        exported = exported_by(self.run)
        assert len(exported) == 3, 'the weights, and two averages'
        written = {
            name: json.loads((self.run / f'{name}.json').read_text()) for name in ('losses', 'forgetting', 'done')
        }
        del written['losses']['cost']['device_seconds']
        assert not half_saved(self.run) and not half_exported(self.run)
        return {'exports': exported, 'written': written}


@pytest.mark.slow
@pytest.mark.parametrize(('ranks', 'rounds'), [(1, 10), (2, 5)])
def test_a_stage(ranks, rounds, data, tmp_path, tally):
    sharded = {'state_dict_type': 'sharded'} if ranks > 1 else None
    dropout = {'resid_pdrop': 0.1, 'emb_pdrop': 0.1}  # so that random numbers count
    over = {'max_duration': '4ba', 'save_interval': '4ba', 'fsdp_config': sharded}
    Stage(tmp_path, tiny.config(tmp_path, data, 'parent', **over), ranks).finish()
    replay = {'fraction': 0.25, 'streams': {'old': {'local': str(data['old']), 'split': 'train'}}}

    def stage(name):
        callbacks = {
            'final_loss': {'window': '6ba', 'interval': '3ba'}, 'forgetting': {'new': ['new'], 'old': ['old']},
            'ema': {'half_life': '4ba'}, 'lawa': {'k': 3, 'interval': '2ba'},
            'moments': {'path': str(tmp_path / f'{name}.moments')}, 'recorder': {'digests': ranks == 1},
        }  # fmt: skip
        cfg = tiny.config(
            tmp_path, data, name, load_path=str(tmp_path / 'parent' / ('ep0-ba4' if ranks > 1 else 'ep0-ba4-rank0.pt')),
            max_duration='36ba', save_interval='3ba', eval_interval='4ba', save_num_checkpoints_to_keep=2,
            train_loader={'dataset': {'replay': replay}}, callbacks=callbacks, fsdp_config=sharded,
            eval_loader=[tiny.eval_loader(label, data[label]) for label in ('old', 'new')], model=dropout,
        )  # fmt: skip
        return Stage(tmp_path, cfg, ranks)

    chance = seeded(f'a stage, processes: {ranks}')
    straight = stage('straight')
    longest = straight.durations()
    expected = straight.results()
    for phase in PHASES:
        tally.same[phase, ranks] = (0, rounds)
    for number in range(rounds):
        killed = stage(f'killed-{number}')
        for phase in PHASES:
            killed.start()
            killed.get_into(phase, chance, longest)
            at_work = killed.kill(chance)
            tally.add(phase, ranks, at_work, bool(killed.is_half_way(phase)))
            check_whole(killed.run, expected['exports'])
        killed.finish()
        for rank in range(ranks):
            assert not objections(killed.lines(rank), straight.lines(rank)), number
        assert killed.results() == expected, number
        for phase in PHASES:
            tally.same[phase, ranks] = (number + 1, rounds)
    kills = sum(tally.kills[phase, ranks] for phase in PHASES)
    assert kills >= 0.9 * rounds * len(PHASES), 'the others came after its end'
    for phase in ('save', 'average', 'export'):
        assert tally.half[phase, ranks], f'no kill hit the middle of {phase}'


@pytest.fixture(scope='module')
def lost():
    table = Table('save_interval', 'kills', title='Lost by a kill', title_justify='left')
    for head in ('batches computed again, median (most)', 'restart to first new batch, median (most)'):
        table.add_column(head, justify='right')
    yield table
    Console(width=110).print(table)


@pytest.mark.slow
@pytest.mark.parametrize('interval', [1, 4, 16])
def test_what_a_kill_costs(interval, data, tmp_path, lost, rounds=5):
    """Of a process that makes its own imports, as a restart does."""
    chance, again, seconds = seeded(f'save_interval {interval}ba'), [], []
    for number in range(rounds):
        cfg = tiny.config(tmp_path, data, f'run-{number}', max_duration='48ba', save_interval=f'{interval}ba')
        path = tiny.save(cfg, tmp_path / f'{number}.yaml')

        def batches(name=cfg['run_name']):
            written = tmp_path / f'{name}.jsonl.rank0'
            return [line['batch'] for line in lines_of(tmp_path / f'{name}.jsonl')] if written.exists() else []

        def until(is_so, path=path):
            process, begun = tiny.start(tiny.RECIPE, path), time.monotonic()
            while not is_so():
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.01)
            took = time.monotonic() - begun
            process.kill()
            process.communicate()
            return took

        ahead = chance.randint(16, 36)
        until(lambda: len(batches()) >= ahead)  # noqa: B023
        before = batches()
        seconds.append(until(lambda: batches()[-1] > before[-1]))  # noqa: B023
        again.append(before[-1] + 1 - batches()[len(before)])
        assert 0 <= again[-1] <= interval
    lost.add_row(
        f'{interval}ba',
        str(rounds),
        f'{median(again):g} ({max(again)})',
        f'{median(seconds):.1f} s ({max(seconds):.1f})',
    )


# Of a sequence of two stages: until when it is left alone, and seconds within which it is then killed.
BETWEEN = {
    'plan is written': (lambda runs: any(runs.glob('*sequence.json*')), 0.02),
    'parent is exported': (lambda runs: any(runs.glob('old-s17/huggingface/.ba*')), 0.3),
    'parent is done': (lambda runs: any(runs.glob('old-s17/*done.json*')), 0.6),
    'child starts': (lambda runs: any(runs.glob('new-s17/*run.yaml')), 1.5),
    'report is written': (lambda runs: any(runs.glob('new-s17/done.json')), 2.0),
}


@pytest.mark.slow
def test_between_stages(data, tmp_path, tally, rounds=4):
    over = {
        'scheduler': {'name': 'rewarm_cosine', 't_warmup': '0.1dur'},
        'callbacks': {'lawa': {'k': 3, 'interval': '1ba'}},
    }
    stages = {'old': {'max_duration': '8ba'}, 'new': {'max_duration': '8ba', 'replay': {'fraction': 0.25}}}
    common = tiny.sequence_common(tmp_path, data, **over)
    spec = tiny.sequence_spec(tmp_path, data, stages=stages, arms={'replay': {}}, common=common)
    chance = seeded('between stages')

    def sequence(name):
        runs = tmp_path / f'{name}-runs'
        own = {**spec, 'folder': str(runs)}
        words = [tiny.SEQUENCE, tiny.save(own, tmp_path / f'{name}.yaml')]
        return own, runs, Process(tmp_path / name, words)

    def exported(runs):
        return {run.name: exported_by(run) for run in runs.glob('*-s17')}

    straight, runs, process = sequence('straight')
    process.finish()
    expected, models = results_of_sequence(straight), exported(runs)
    assert [len(each) for each in models.values()] == [2, 2], 'the weights and an average of two runs'
    for moment in BETWEEN:
        tally.same[moment, 'sequence'] = (0, rounds)
    for number in range(rounds):
        own, runs, process = sequence(f'killed-{number}')
        for moment, (begun, most) in BETWEEN.items():
            before = {path for each in (runs, *runs.glob('*-s17')) for path in half_written(each)}
            process.start()
            process.wait_for(lambda begun=begun, runs=runs: begun(runs))
            time.sleep(chance.uniform(0, most))
            at_work = process.kill()
            wait_until_gone(str(runs), seconds=60)
            left = {path for each in (runs, *runs.glob('*-s17')) for path in half_written(each)} - before
            tally.add(moment, 'sequence', at_work, bool(left))
            for run in runs.glob('*-s17'):
                check_whole(run, models[run.name])
        process.finish()
        assert results_of_sequence(own) == expected, number
        assert exported(runs) == models
        for moment in BETWEEN:
            tally.same[moment, 'sequence'] = (number + 1, rounds)
    kills = sum(tally.kills[moment, 'sequence'] for moment in BETWEEN)
    assert kills >= 0.9 * rounds * len(BETWEEN), 'the others came after its end'


def refuse_all(folder):
    """What lies in a folder is no checkpoint, no model and no run for any command."""
    assert [one.path for one in find([str(folder)])] == [str(folder)], 'nothing in it'
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match='no model found'):
        models_of(folder)


@pytest.fixture(scope='module')
def kept(data, tmp_path_factory):
    """A run of 8 batches whose checkpoints were all kept, and its YAML."""
    folder = tmp_path_factory.mktemp('kept')
    judged = {'final_loss': {'window': '4ba', 'interval': '2ba'}}
    cfg = tiny.config(
        folder, data, 'run', save_num_checkpoints_to_keep=-1, callbacks=judged, max_duration='8ba',
        eval_loader=[tiny.eval_loader('new', data['new'])], model={'d_model': 128, 'n_layers': 4},
    )  # fmt: skip
    tiny.recipe_here(cfg, folder)
    return folder / 'run', cfg


@pytest.mark.slow
@pytest.mark.parametrize('to', ['hf', 'pt', 'sharded'])
def test_averaging_offline(to, kept, tmp_path, tally, rounds=4):
    chance, key = seeded(f'averaging offline, to {to}'), (f'average_checkpoints --to {to}', 1)

    def averaging(name):
        out = tmp_path / name / 'results' / 'out.pt'
        words = [SCRIPTS / 'average_checkpoints.py', kept[0], '--last', 3, '--to', to, '--out', out]
        return out, out.with_name('.out.pt.partial'), Process(tmp_path / name, words)

    out, partial, process = averaging('straight')
    process.start()
    process.wait_for(partial.exists)
    begun = time.monotonic()
    process.wait_for(out.exists)
    took = time.monotonic() - begun
    assert process.end() == 0, process.said()
    expected = weights_of(out)
    tally.same[key] = (0, rounds)
    for number in range(rounds):
        out, partial, process = averaging(f'killed-{number}')
        process.start()
        process.wait_for(partial.exists)
        time.sleep(chance.uniform(0, took / 2))
        at_work = process.kill()
        tally.add(*key, at_work, partial.exists() and not out.exists())
        if out.exists():
            assert weights_of(out) == expected
        else:
            refuse_all(out.parent)
            process.finish()
        assert weights_of(out) == expected
        assert not partial.exists()
        tally.same[key] = (number + 1, rounds)
    assert tally.half[key], 'no kill hit the middle of it'


# Of recipes/merge.py, in the order in which it makes them.
MERGE = ('.merged.pt.partial', 'huggingface/.ba8.partial', 'huggingface/ba8')


@pytest.mark.slow
def test_merge(kept, data, tmp_path, tally, rounds=2):
    run, cfg = kept
    chance, key = seeded('merge'), ('merge', 1)

    def merging(name):
        merge = {'of': str(run), 'batch': 8, 'last': 3, 'every': '2ba', 'weights': 'uniform'}
        merged = {
            **cfg, 'run_name': 'merged', 'save_folder': str(tmp_path / name), 'max_duration': '0ba',
            'variables': {'merge': merge}, 'callbacks': {'stage_start': {}, 'final_loss': cfg['callbacks']['final_loss']},
        }  # fmt: skip
        words = [tiny.ROOT / 'recipes' / 'merge.py', tiny.save(merged, tmp_path / f'{name}.yaml')]
        return tmp_path / name, Process(tmp_path / f'{name}-process', words)

    def results(folder):
        losses = json.loads((folder / 'losses.json').read_text())
        del losses['cost']['device_seconds']
        return losses, weights_of(folder / 'merged.pt'), exported_by(folder)

    folder, process = merging('straight')
    process.finish()
    expected = results(folder)
    tally.same[key] = (0, rounds)
    for number in range(rounds):
        folder, process = merging(f'killed-{number}')
        for made in MERGE:
            process.start()
            process.wait_for(lambda path=folder / made: path.exists())
            time.sleep(chance.uniform(0, 0.01))
            at_work = process.kill()
            tally.add(*key, at_work, any(folder.glob('.merged*')) or any(folder.glob('huggingface/.ba*')))
            assert not (folder / 'merged.pt').exists() or weights_of(folder / 'merged.pt') == expected[1]
            assert {name: expected[2][name] for name in exported_by(folder)} == exported_by(folder)
        process.finish()
        assert results(folder) == expected
        tally.same[key] = (number + 1, rounds)
    assert tally.half[key], 'no kill hit the middle of it'
