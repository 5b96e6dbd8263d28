# SPDX-License-Identifier: Apache-2.0
"""The sequences of yamls/claims/: how long their stages are, and how they are trained."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from cpt_algorithms.files import write_atomic
from cpt_algorithms.terminal import make_console

__all__ = [
    'FULL',
    'QUICK',
    'RECOMMENDED',
    'SAMPLED',
    'SEQUENCES',
    'SPACING',
    'TREND',
    'WIDTH',
    'Model',
    'console',
    'stage_times',
    'train',
    'train_on_samples',
]

console = make_console()
ROOT = Path(__file__).resolve().parents[2]
FULL, QUICK = 1_048_576, 131_072


@dataclass(frozen=True)
class Model:
    """A width, and how long its stages are."""

    d_model: int
    tokens_per_parameter: int

    @property
    def tokens(self) -> int:
        """Of each stage."""
        return self.tokens_per_parameter * {8: 6_368, 16: 15_808}[self.d_model]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f'd_model_{self.d_model}-{self.tokens_per_parameter}_tokens_per_parameter'

    @property
    def seeds(self) -> list[int]:
        """More of what is quickly trained."""
        return [17, 18, 19, 20, 21] if self.tokens < 2 * QUICK else [17, 18, 19]

    @property
    def arms(self) -> tuple[str, ...]:
        """What is trained besides the update: of the longest, which take half of the time, only union."""
        return ('union', 'matched') if self.tokens_per_parameter <= 400 else ('union',)


# Also trained, as far as they are compared with union and matched. The YAMLs' model, of WIDTH, reads 24 tokens per
# parameter.
WIDTH = 32
TREND = (*(Model(8, tokens) for tokens in (25, 100)), Model(16, 25), *(Model(8, tokens) for tokens in (400, 1000)))
# Else glibc maps and unmaps each batch's logits anew, which is a fifth of the time of models as small as these.
MALLOC = {'MALLOC_MMAP_THRESHOLD_': str(1 << 30), 'MALLOC_TRIM_THRESHOLD_': str(1 << 31)}
# What the paper recommends: percent of replay under each shift.
RECOMMENDED = {'weak': 5, 'strong': 25}
SEQUENCES = ('weak_shift', 'strong_shift', 'infinite', 'averaging')
# Under the strong shift, percent of replay of text that the parent of each seed has written itself.
SAMPLED = (5, 25)
# LAWA takes every fourth checkpoint of the constant run: windows can also be narrower than its own.
SPACING = 4


def stage_times(sequence: str, tokens: int) -> dict[str, int]:
    """Times of a sequence whose stages have ``tokens`` if it is about shifts, in whole batches of 1024 tokens."""
    if sequence == 'averaging':
        batches = 2 * tokens // 1024
        every = batches // 64
        return {
            'tokens': batches * 1024,
            'warmup': round(0.02 * batches) * 1024,
            'anneal': batches * 1024 * 10 // 64,
            'spike': batches * 5 // 8 + every // 2 - 4,  # the evaluation comes after some of it has healed
            'every': every,
            'save': every // SPACING,
            'eval': max(2 * every, 16),  # of few batches the evaluations would take longer than the training
            'window': 4 * every,
        }
    batches = tokens // 1024 // (2 if sequence == 'infinite' else 1)
    window = min(100, batches // 10)
    times = {'tokens': batches * 1024, 'window': window, 'interval': max(1, window // 5)}
    if sequence == 'infinite':
        shares = {'warmup': 0.01, 'cooldown': 0.6, 'anneal': 0.15}
        times |= {key: max(1, round(share * batches)) * 1024 for key, share in shares.items()}
    return times


def train(folder: Path, tokens: int, jobs: int, model: Model | None = None) -> None:
    """Run the sequences; one that fails does not stop the others.

    Args:
        folder: Where their folders are.
        tokens: See :func:`stage_times`.
        jobs: Runs at a time.
        model: If given, only what is compared with union and matched, with a model of this width. Default:
            everything, with the YAMLs' models.
    """
    for name in ('weak_shift', 'strong_shift') if model else SEQUENCES:
        path = ROOT / 'yamls' / 'claims' / f'{name}.yaml'
        if model:
            spec = yaml.safe_load(path.read_text(encoding='utf-8'))
            percent = RECOMMENDED[name.removesuffix('_shift')]
            spec['arms'] = {arm: spec['arms'][arm] for arm in (f'replay {percent} %', *model.arms)}
            for stages in spec['arms'].values():
                for stage in stages.values():
                    if isinstance(stage, dict):
                        stage.pop('branches', None)
            spec['seeds'] = model.seeds
            spec['common']['model']['d_model'] = model.d_model
            path = folder / f'{name}.yaml'
            write_atomic(path, yaml.safe_dump(spec, sort_keys=False).encode())
        settings = [f'variables.{key}={value}' for key, value in stage_times(name, tokens).items()]
        arguments = [str(path), f'folder={(folder / name).resolve()}', f'jobs={jobs}', *settings]
        console.print(f'\n{name}, stages of {tokens:,} tokens', style='bold')
        _run('recipes/sequence.py', *arguments)


def train_on_samples(folder: Path, tokens: int, jobs: int) -> None:
    """Have the parents under the strong shift write text, and train updates that differ in what they replay alone.

    Args:
        folder: Where the sequences are.
        tokens: Of a stage.
        jobs: Runs at a time.
    """
    from cpt_algorithms.stage.record import read_record  # seconds that --help does not need

    wanted, configs = tokens * max(SAMPLED) // 100, []
    for seed in (17, 18, 19):
        parent, data = folder / 'strong_shift' / f'python-s{seed}', folder / 'sampled' / f'data-s{seed}'
        spec = f'python=sampled:{parent}?tokens={wanted * 12 // 10}&seed={seed}&batch_size=16'  # some is held out
        options = ['--dataset', spec, '--parent', str(parent), '--val-fraction', '0.1', '--workers', str(jobs)]
        if _run('scripts/prepare_data.py', '--out', str(data), *options):
            return
        for percent in SAMPLED:
            record = read_record(folder / 'strong_shift' / f'cpp-replay_{percent}pct-s{seed}')
            if record is None:
                return
            name = f'cpp-sampled_{percent}pct-s{seed}'
            place = str((folder / 'sampled' / name).resolve())
            config = {**record.config.to_train_yaml(), 'run_name': name, 'save_folder': place}
            for callback in config['callbacks'].values():
                if 'save_folder' in callback:
                    callback['save_folder'] = place
            config['train_loader']['dataset']['replay']['streams']['python']['local'] = str(data / 'python')
            configs.append(folder / 'sampled' / f'{name}.yaml')
            write_atomic(configs[-1], yaml.safe_dump(config, sort_keys=False).encode())
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda config: _run('recipes/continue_pretraining.py', str(config)), configs))


def _run(script: str, *arguments: str) -> int:
    """Run a script of the repository, and say what is missing then if it fails."""
    code = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=ROOT, env={**os.environ, **MALLOC}
    ).returncode
    if code:
        console.print(f'{script} {arguments[0]} ended with {code}: what it lacks is in the table as not run')
    return code
