# SPDX-License-Identifier: Apache-2.0
"""The sequences of yamls/claims/: how long their stages are, and how they are trained."""

import subprocess
import sys
from pathlib import Path

import yaml

from cpt_algorithms.files import write_atomic
from cpt_algorithms.terminal import make_console

__all__ = ['FULL', 'QUICK', 'RECOMMENDED', 'SEQUENCES', 'SPACING', 'TREND', 'console', 'stage_times', 'train']

console = make_console()
ROOT = Path(__file__).resolve().parents[2]
FULL, QUICK = 1_048_576, 131_072
# How near union an update comes changes with the tokens of its stages and the model: also trained are these, (tokens,
# d_model). The YAMLs have 32.
TREND = ((FULL // 4, 32), (4 * FULL, 32), (FULL, 64), (4 * FULL, 16))
# What the paper recommends: percent of replay under each shift.
RECOMMENDED = {'weak': 5, 'strong': 25}
SEQUENCES = ('weak_shift', 'strong_shift', 'infinite', 'averaging')
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


def train(folder: Path, tokens: int, jobs: int, d_model: int | None = None) -> None:
    """Run the sequences; one that fails does not stop the others.

    Args:
        folder: Where their folders are.
        tokens: See :func:`stage_times`.
        jobs: Runs at a time.
        d_model: If given, only what is compared with union, with a model of this width. Default: everything, with
            the YAMLs' models.
    """
    for name in ('weak_shift', 'strong_shift') if d_model else SEQUENCES:
        path = ROOT / 'yamls' / 'claims' / f'{name}.yaml'
        if d_model:
            spec = yaml.safe_load(path.read_text(encoding='utf-8'))
            percent = RECOMMENDED[name.removesuffix('_shift')]
            spec['arms'] = {arm: spec['arms'][arm] for arm in (f'replay {percent} %', 'union')}
            spec['common']['model']['d_model'] = d_model
            path = folder / f'{name}.yaml'
            write_atomic(path, yaml.safe_dump(spec, sort_keys=False).encode())
        settings = [f'variables.{key}={value}' for key, value in stage_times(name, tokens).items()]
        arguments = [str(path), f'folder={(folder / name).resolve()}', f'jobs={jobs}', *settings]
        console.print(f'\n{name}, stages of {tokens:,} tokens', style='bold')
        code = subprocess.run([sys.executable, str(ROOT / 'recipes' / 'sequence.py'), *arguments], cwd=ROOT).returncode
        if code:
            console.print(f'{name} ended with {code}: what it lacks is in the table as not run')
