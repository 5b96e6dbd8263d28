# SPDX-License-Identifier: Apache-2.0
"""The cost of ``ema`` per step: its update beside Composer's, and beside the least that memory allows.

    python scripts/benchmarks/weight_averages.py                       # 100 M float32 parameters on the CPU
    python scripts/benchmarks/weight_averages.py --device cuda         # and the share of a step of a 124 M model

All sides alternate in one process; medians and quartiles are shown. The floor is a plain copy's bandwidth: an update
reads the average and the parameters and writes the average, a copy reads once and writes once, so an update takes 1.5
copies. A CPU's copy also fetches the lines that it writes, so that an update can be seen below this floor.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--millions', type=int, default=100, help='parameters, in millions')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--json', type=Path, help='also write the numbers here')
    return parser.parse_intermixed_args()


if __name__ == '__main__':
    OPTIONS = parse()  # before the imports that take seconds

import torch
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from rich.console import Console
from rich.table import Table

from cpt_algorithms.terminal import print_table
from cpt_algorithms.weight_averaging.functional import update_ema_

WIDTH = 1024


def parameters(total: int, device: str) -> list[torch.Tensor]:
    """Tensors of the shapes of a transformer, ``total`` numbers in all."""
    shapes = [(WIDTH,), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    made: list[torch.Tensor] = []
    while total > 0:
        for shape in shapes:
            made.append(torch.randn(shape, device=device))
            total -= made[-1].numel()
    return made


class Model(torch.nn.Module):
    """Holds the tensors, as Composer's EMA wants a model."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = torch.nn.ParameterList([torch.nn.Parameter(tensor) for tensor in tensors])


def alternate(sides: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each side, ``repeats`` times in turn, after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            if device == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            side()
            if device == 'cuda':
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def step_of_125m() -> Callable[[bool], None]:
    """A training step of GPT-2's size (bfloat16 autocast, AdamW, 16 x 1024 tokens) on the GPU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, 50_000, (16, 1024), device='cuda')
    averages = [parameter.detach().clone() for parameter in model.parameters()]

    def step(with_ema: bool) -> None:
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if with_ema:
            update_ema_(averages, [parameter.detach() for parameter in model.parameters()], 0.01)

    return step


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    console = Console()
    console.width = max(console.width, 110)
    tensors = parameters(arguments.millions * 1_000_000, arguments.device)
    averages = [tensor.clone() for tensor in tensors]
    others = [torch.empty_like(tensor) for tensor in tensors]
    model = Model(tensors)
    theirs = EMAParameters(model)
    sides: dict[str, Callable[[], object]] = {
        'copy': lambda: torch._foreach_copy_(others, tensors),
        'ours': lambda: update_ema_(averages, tensors, 0.01),
        'composer': lambda: compute_ema(model, theirs, smoothing=0.99),
    }
    with torch.no_grad():
        times = alternate(sides, arguments.repeats, arguments.device)
    median = {name: statistics.median(values) for name, values in times.items()}
    count = sum(tensor.numel() for tensor in tensors)
    shown = Table(title=f'EMA update of {count / 1e6:.0f} M float32 parameters on {arguments.device}, milliseconds')
    for column in ('', 'median', 'quartiles', 'GB/s', 'against the floor', 'Composer / ours'):
        shown.add_column(column, justify='right')
    floor = 1.5 * median['copy']
    rows = {'floor (1.5 copies)': [1.5 * value for value in times['copy']], 'ours': times['ours']}
    rows['composer.algorithms.ema'] = times['composer']
    for name, values in rows.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratio = f'{median["composer"] / median["ours"]:.2f}' if name == 'ours' else ''
        shown.add_row(
            name,
            f'{middle * 1e3:.1f}',
            f'{low * 1e3:.1f}-{high * 1e3:.1f}',
            f'{12 * count / middle / 1e9:.1f}',
            f'{middle / floor:.2f}',
            ratio,
        )
    print_table(shown, console)
    result = {'parameters': count, 'times': times, 'composer/ours': median['composer'] / median['ours']}
    result['ours/floor'] = median['ours'] / floor
    if arguments.device == 'cuda':
        step = step_of_125m()
        steps = alternate({'plain': lambda: step(False), 'ema': lambda: step(True)}, arguments.repeats, 'cuda')
        share = statistics.median(steps['ema']) / statistics.median(steps['plain']) - 1
        console.print(f'EMA every batch costs {share:.2%} of a training step of GPT-2 (124M, 16 x 1024 tokens)')
        result['share of a step'] = share
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
    main(OPTIONS)
