# SPDX-License-Identifier: Apache-2.0
"""Phases and costs of runs, as tables."""

import os
from collections.abc import Iterator, Mapping
from itertools import accumulate

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpt_algorithms.cost.estimate import Costs, Memory, costs_of
from cpt_algorithms.duration import per_batch_of
from cpt_algorithms.evaluation.functional import training_flops
from cpt_algorithms.formatting import flop, gigabytes, hours, percent, short
from cpt_algorithms.preparation.manifest import sampled_from
from cpt_algorithms.schedulers.functional import Span
from cpt_algorithms.schedulers.phases import phases_of
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.terminal import make_console, print_table

__all__ = ['base_of', 'print_costs', 'print_phases', 'print_schedule', 'print_stage']

_PARTS = {
    'parameters': 'weights',
    'gradients': 'gradients',
    'optimizer': 'optimizer',
    'averages': 'averages (ema, lawa)',
    'gathered': 'gathered or cast weights, their gradients',
    'activations': 'activations and logits',
    'evaluation': 'or, in evaluations, their logits and copies',
}


def print_phases(stages: Mapping[str, Stage], console: Console) -> None:
    """Tokens of each stream in each phase of the schedule, steps, and learning rates where phases meet.

    Stages that differ in nothing of this are shown once; those that train nothing (merges) are left out.

    Raises:
        ValueError: If a run is given in epochs.
    """
    alike: dict[str, tuple[list[str], Stage]] = {}
    for name, stage in stages.items():
        if stage.batches == 0:
            continue
        key = repr([stage.tokens_by_stream(), stage.optimizer.lr, stage.max_duration, stage.scheduler])
        alike.setdefault(key, ([], stage))[0].append(name)
    for names, stage in alike.values():
        _show(console, *_phase_table(_several(names), stage))


def _show(console: Console, title: str, table: Table) -> None:
    """Not as the table's own title, which is broken to its width."""
    console.print(f'[bold]{escape(title)}[/bold]')
    print_table(table, console)


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f'{names[0]} and {len(names) - 1} more'


def _phase_table(name: str, stage: Stage) -> tuple[str, Table]:
    tokens = stage.tokens_by_stream()
    total = sum(tokens.values())
    batches, lr = total // stage.tokens_per_batch, stage.optimizer.lr or 0.0
    title = f'{name}: {stage.scheduler.name}, {batches:,} batches of {stage.tokens_per_batch:,} tokens'
    table = _table('phase', 'to batch', 'LR from', 'LR to', 'tokens', *tokens)
    before = dict.fromkeys(tokens, 0)
    for span, end in _spans(stage, batches):
        counts = stage.tokens_by_stream(end)
        row = [counts[name] - before[name] for name in tokens]
        lrs = [f'{span.start * lr:.3g}', f'{span.end * lr:.3g}'] if span else ['', '']
        table.add_row(span.name if span else 'all', f'{end:,}', *lrs, f'{sum(row):,}', *(f'{n:,}' for n in row))
        before = counts
    assert before == tokens, 'the last phase ends with the run'
    table.add_section()
    table.add_row('in all', f'{batches:,}', '', '', f'{total:,}', *(f'{count:,}' for count in tokens.values()))
    return title, table


def _spans(stage: Stage, batches: int) -> list[tuple[Span | None, int]]:
    """Phases, each with the batch before which it ends: a batch belongs to the phase in which it starts."""
    phases = phases_of(stage.scheduler.given, stage.max_duration)
    if phases is None:
        return [(None, batches)]
    per_batch = per_batch_of(phases.unit, stage.global_train_batch_size, stage.max_seq_len)
    assert per_batch is not None, 'phases are in tok, ba or sp'
    return [(span, min(batches, -int(-span.until // per_batch))) for span in phases.spans]


def print_schedule(stage: Stage, console: Console) -> None:
    """The phases as multipliers of ``optimizer.lr``, if the scheduler is one of ours."""
    if phases := phases_of(stage.scheduler.given, stage.max_duration):
        said = f'{stage.run_name}: {stage.scheduler.name}, times lr {stage.optimizer.lr:g}\n{phases}'
        console.print(said, markup=False, soft_wrap=True)


def print_stage(stage: Stage, with_cost: bool) -> None:
    """On the first rank, the schedule as multipliers of ``optimizer.lr`` and, if wanted, the cost on these ranks."""
    if os.environ.get('RANK', '0') != '0':
        return
    console = make_console()
    print_schedule(stage, console)
    if with_cost:
        try:
            print_costs({stage.run_name: stage}, console, gpus=int(os.environ.get('WORLD_SIZE', '1')))
        except ValueError as error:  # epochs, mixtures of experts: they can be trained
            console.print(f'what it will cost is not known: {error}', markup=False, soft_wrap=True)


def base_of(stages: Mapping[str, Stage]) -> str | None:
    """The pretrained model that the stages of a sequence begin from, or None."""
    return next((stage.pretrained_model for stage in stages.values() if stage.pretrained_model), None)


def print_costs(
    stages: Mapping[str, Stage],
    console: Console,
    *,
    gpu: str = 'h100',
    gpus: int = 8,
    mfu: float = 0.4,
    budgets: Mapping[str, int] | None = None,
    base: str | None = None,
) -> dict[str, Costs]:
    """FLOPs and GPU-hours, memory per GPU by part, checkpoints and disk, and the saving against union retraining.

    Args:
        stages: Stages, by name. Those that train nothing (merges) are left out.
        console: Where to print.
        gpu: As of :func:`~cpt_algorithms.cost.estimate.costs_of`, which raises if this or what follows is not right.
        gpus: Likewise, for each run.
        mfu: Likewise.
        budgets: Token budget of each stage, for the saving. Default: ``None``, no such table, as for one stage.
        base: The pretrained model that the first stage begins from: what that has read is not known, so that no saving
            is. Default: ``None``.

    Returns:
        The numbers, by name.

    Raises:
        ValueError: If nothing is trained.
    """
    costs = {name: costs_of(stage, gpu, gpus, mfu) for name, stage in stages.items() if stage.batches != 0}
    if not costs:
        raise ValueError('nothing is trained')
    chip = next(iter(costs.values())).gpu
    _show(console, f'compute, {gpus} x {chip.name} at {percent(mfu)} MFU', _compute_table(costs))
    if any(cost.hardware_flops > cost.flops for cost in costs.values()):
        most = max(cost.hardware_flops / cost.flops for cost in costs.values())
        console.print(
            f'  with what activation checkpointing computes again: up to {most:.2f} times as many FLOP, '
            f'{percent(mfu * most)} of the hardware',
        )
    shares = [training_flops(c.size.parameters, sum(c.tokens.values())) / c.flops for c in costs.values()]
    console.print(
        f'  the report counts 6 x parameters x tokens, without attention: {percent(min(shares))}'
        f'{"" if percent(min(shares)) == percent(max(shares)) else f" to {percent(max(shares))}"} of these FLOP\n',
    )
    holds = f', which holds {gigabytes(chip.memory)}' if chip.memory else ''
    for said in dict.fromkeys(said for name in costs for said in _sampling(stages[name], costs[name])):
        console.print(f'  {said}\n', markup=False, soft_wrap=True)
    _show(console, f'memory of one GPU{holds}', _memory_table(costs))
    console.print('  besides, some 10 %: CUDA, NCCL, fragmentation\n')
    _show(console, 'checkpoints and disk', _disk_table(costs))
    if base:
        why = f'what {base} has read is not known, and so neither is training from scratch on everything'
        console.print(why, markup=False, soft_wrap=True)
    elif budgets and len(budgets) > 1:
        _show(console, 'updating against training from scratch on everything', _saving_table(budgets))
    return costs


def _sampling(stage: Stage, cost: Costs) -> Iterator[str]:
    """What it took to sample replayed data: a forward pass for every token, of a model of this size."""
    for name, stream in (stage.mix.old if stage.mix else {}).items():
        if sampled := sampled_from([stream.local, stream.remote], stream.split):
            spent = flop(2 * cost.size.parameters * sampled.tokens)
            tokens = short(sampled.tokens)
            yield f'{name} was sampled from {sampled.models}: {tokens} tokens, {spent} FLOP that are not counted above'


def _table(first: str, *columns: str) -> Table:
    table = Table(first, box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(escape(column), justify='right')
    return table


def _compute_table(costs: Mapping[str, Costs]) -> Table:
    table = _table('run', 'parameters', 'not embeddings', 'tokens', 'batches', 'FLOP', 'GPU-hours', 'hours')
    for name, cost in costs.items():
        size, tokens = cost.size, sum(cost.tokens.values())
        counts = (f'{n:,}' for n in (size.parameters, size.non_embedding, tokens, cost.batches))
        table.add_row(escape(name), *counts, flop(cost.flops), hours(cost.gpu_hours), hours(cost.gpu_hours / cost.gpus))
    if len(costs) > 1:
        every = costs.values()
        tokens = sum(sum(cost.tokens.values()) for cost in every)
        spent = flop(sum(cost.flops for cost in every)), hours(sum(cost.gpu_hours for cost in every))
        table.add_section()
        table.add_row('in all', '', '', f'{tokens:,}', '', *spent, '')
    return table


def _memory_table(costs: Mapping[str, Costs]) -> Table:
    groups: dict[tuple[Memory, int, str], list[str]] = {}
    for name, cost in costs.items():
        groups.setdefault((cost.memory, cost.microbatch, cost.sharding), []).append(name)
    limit = next(iter(costs.values())).gpu.memory
    memories = [memory for memory, _, _ in groups]
    table = _table('part', *map(_several, groups.values()))
    for part, shown in _PARTS.items():
        table.add_row(shown, *(gigabytes(getattr(memory, part)) for memory in memories))
    table.add_section()
    totals = [memory.total for memory in memories]
    over = [' [red]too much[/red]' if limit and total > limit else '' for total in totals]
    table.add_row('at most at one time', *(f'{gigabytes(n)}{mark}' for n, mark in zip(totals, over, strict=True)))
    if any(memory.host for memory in memories):
        table.add_row("the CPU's memory, per GPU (lawa)", *(gigabytes(memory.host) for memory in memories))
    table.add_row('microbatch, sharding', *(f'{microbatch}, {sharding}' for _, microbatch, sharding in groups))
    return table


def _disk_table(costs: Mapping[str, Costs]) -> Table:
    table = _table('run', 'a checkpoint', 'saved', 'kept', 'at once', 'an export', 'exports', 'at most')
    for name, cost in costs.items():
        d = cost.disk
        saved = (gigabytes(d.checkpoint), *(f'{n:,}' for n in (d.saves, d.kept, d.at_once)))
        table.add_row(escape(name), *saved, gigabytes(d.export), f'{d.exports:,}', gigabytes(d.total))
    if len(costs) > 1:
        table.add_section()
        table.add_row('in all', *[''] * 6, gigabytes(sum(cost.disk.total for cost in costs.values())))
    return table


def _saving_table(budgets: Mapping[str, int]) -> Table:
    r"""Savings per stage: :math:`T_k` against :math:`\sum_{j \le k} T_j`, and both summed over the stages so far.

    Replay is part of a stage's budget (compute-equivalent, Ibrahim et al. 2024, section 4.2), so that the union has
    the tokens of all budgets.
    """
    table = _table('stage', 'update', 'from scratch', 'share', 'all updates', 'from scratch each time', 'share')
    union = list(accumulate(budgets.values()))
    for (stage, update), updates, retrains in zip(budgets.items(), union, accumulate(union), strict=True):
        pairs = (update, updates), (updates, retrains)
        table.add_row(escape(stage), *(text for a, b in pairs for text in (short(a), short(b), percent(a / b))))
    return table
