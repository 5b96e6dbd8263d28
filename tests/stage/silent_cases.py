# SPDX-License-Identifier: Apache-2.0
"""Run by test_silent_failures under the composer launcher: gradients of FSDP2 ranks on CPU, stock and ours."""

import sys
from pathlib import Path

import tiny
import torch
from composer.core import Callback
from composer.utils import dist
from llmfoundry import registry
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor


class Norm(Callback):
    """Keeps the norm of each batch's gradient over all ranks."""

    seen: list[float] = []  # noqa: RUF012

    def after_train_batch(self, state, logger):
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        self.seen.append(float(torch.stack([g.double().square().sum() for g in whole]).sum().sqrt()))


registry.callbacks.register('norm', func=Norm)


def norms(base, name, **over):
    folder = Path(base['save_folder']).parent
    place = {'run_name': name, 'save_folder': str(folder / name), 'max_duration': '2ba'}
    place['callbacks'] = {'recorder': {'path': str(folder / f'{name}.jsonl')}, 'norm': {}}
    Norm.seen.clear()
    tiny.run(tiny.merge(tiny.merge(base, place), over))
    return list(Norm.seen)


def main():
    base = OmegaConf.to_container(OmegaConf.load(sys.argv[1]))
    sharded = {'fsdp_config': {'state_dict_type': 'sharded'}}
    right = norms(base, 'ddp')
    stock = norms(base, 'stock', **tiny.merge(sharded, {'callbacks': {'stage_start': None}}))
    ours = norms(base, 'ours', **sharded)
    assert dist.get_world_size() == 2
    assert abs(stock[0] / right[0] - 2) < 1e-4, f'gloo averages now: {stock} {right}'
    assert all(abs(a / b - 1) < 1e-4 for a, b in zip(ours, right, strict=True)), f'{ours} {right}'
    print(f'gradients: ok, {stock[0] / right[0]:.6f} stock and {ours[0] / right[0]:.6f} ours of the mean', flush=True)


if __name__ == '__main__':
    main()
