# SPDX-License-Identifier: Apache-2.0
"""Run on two ranks by test_average_checkpoints: saves tensors whose shards are uneven, along rows, columns or neither."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

DIMS = {'rows': 0, 'columns': 1, 'middle': 1, 'one': 0, 'whole': None, 'scalar': None, 'steps': None, 'half': 0}
DIMS['tied'] = DIMS['rows']


def tensors(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    shapes = {'rows': (5, 3), 'columns': (4, 7), 'middle': (3, 5, 2), 'one': (1, 6), 'whole': (2, 2), 'scalar': ()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made['tied'] = made['rows']  # which has an entry of its own in the checkpoint
    return {**made, 'steps': torch.tensor(number), 'half': torch.randn(9, generator=generator).to(torch.bfloat16)}


def main(folder: str, count: int, rank: int) -> None:
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    mesh = init_device_mesh('cpu', (2,))
    for number in range(count):
        model = {
            f'model.{name}': distribute_tensor(tensor, mesh, [Replicate() if DIMS[name] is None else Shard(DIMS[name])])
            for name, tensor in tensors(number).items()
        }
        # as Composer nests them, with the names that the callbacks ema and lawa use
        rows = {'model.rows': model['model.rows']}
        callbacks = {
            'EMA': {'averages': {'ema_0.01dur': {'model.rows': 2 * model['model.rows']}}, 'meta': '{}'},
            'LAWA': {
                'window': {'0': rows, '1': {'model.rows': 4 * rows['model.rows']}},
                'meta': '{"weights": "linear"}',
            },
        }
        config = {'config': {'content': {'model_type': 'llama', 'layers': [1, 2], 'nested': {'a.b': None}}}}
        state = {'model': model, 'callbacks': callbacks, 'integrations': {'huggingface': {'model': config}}}
        checkpoint.save({'state': state}, checkpoint_id=f'{folder}/ep0-ba{number + 1}')
    dist.barrier()
    os._exit(0)  # gloo sometimes waits for ever when it is taken down


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
