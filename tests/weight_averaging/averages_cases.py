# SPDX-License-Identifier: Apache-2.0
"""Run by test_sharded_averages under the composer launcher: what goes wrong with averages elsewhere."""

import gc
import sys
from pathlib import Path

import recorder
import tiny
import torch
from composer.algorithms import EMA as ComposersEMA  # noqa: N811
from composer.utils import dist
from llmfoundry import registry
from llmfoundry.command_utils import train
from omegaconf import OmegaConf

from cpt_algorithms import EMA, LAWA

registry.algorithms.register('composers_ema', func=ComposersEMA)
AVERAGES = ('EMA', 'LAWA')


def case(base, name, **over):
    folder = Path(base['save_folder']).parent
    place = {
        'run_name': name,
        'save_folder': str(folder / name),
        'callbacks': {'recorder': {'path': str(folder / f'{name}.jsonl'), 'weights': None}},
    }
    return tiny.merge(tiny.merge(base, place), over)


def stopped(cfg, at):
    try:
        tiny.run(tiny.merge(cfg, {'save_interval': '1ba', 'callbacks': {'stop': {'at': at}}}))
    except RuntimeError as error:
        assert 'stopped' in str(error), error
        gc.collect()
        return
    raise AssertionError('was not stopped')


def trained(cfg):
    """Lines of this rank's witness, this rank's averages, and the callbacks."""
    trainer = train(OmegaConf.create(cfg))
    ours = {type(c).__name__: c for c in trainer.state.callbacks if isinstance(c, EMA | LAWA)}
    averages = {
        f'{key} {name}': [tensor.clone() for tensor in callback.average(name)]
        for key, callback in ours.items()
        for name in callback.names()
    }
    trainer.close()
    return recorder.read(cfg['callbacks']['recorder']['path'], dist.get_global_rank()), averages, ours


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs[name], strict=True)), name


def main():
    base = OmegaConf.to_container(OmegaConf.load(sys.argv[1]))
    without = {'callbacks': {'ema': None, 'lawa': None}}

    lines, averages, callbacks = trained(case(base, 'sharded'))
    model = sum(p.numel() for p in callbacks['EMA'].shards.parameters.values())
    for key in AVERAGES:
        shards = callbacks[key]
        here = sum(tensor.numel() for tensor in shards.average(shards.names()[0]))
        assert 0.4 * model < here < 0.6 * model, 'half the model on each of two ranks'
    assert len(callbacks['LAWA']._window) == 2
    assert all(tensor.device.type == 'cpu' for snapshot in callbacks['LAWA']._window.values() for tensor in snapshot)
    print('local shards: ok', flush=True)

    # torch refuses to load a key that a sharded checkpoint lacks
    cfg = case(base, 'afresh')
    stopped(case(base, 'afresh', **without), 5)
    dist.barrier()
    Path(cfg['save_folder'], 'stage.json').unlink(missing_ok=True)  # by which stage_start would refuse it
    dist.barrier()
    again, _, callbacks = trained(cfg)
    assert again == lines, 'training is the same with and without averages, before and after'
    assert callbacks['EMA']._clocks['ema_2ba']['begin'] == 4
    assert len(callbacks['LAWA']._window) == 2
    print('no averages saved: ok', flush=True)

    # `state_dict_type: full` gathers on rank 0, which a DTensor in a callback's state does not survive
    cfg = case(base, 'full', fsdp_config={'state_dict_type': 'full'})
    stopped(cfg, 6)
    dist.barrier()
    path = Path(cfg['save_folder']) / 'latest-rank0.pt'
    saved = torch.load(path, weights_only=False)['state']['callbacks']['EMA']['averages']['ema_2ba']
    parameters = callbacks['EMA'].shards.parameters
    assert {key: tensor.shape for key, tensor in saved.items()} == {key: p.shape for key, p in parameters.items()}
    again, resumed, _ = trained(cfg)
    assert again == lines
    same(resumed, averages)
    print('full: ok', flush=True)

    # gathered parameters stay in the model between batches, and would be trained on
    gathered = {'state_dict_type': 'sharded', 'reshard_after_forward': False}
    plain, _, _ = trained(case(base, 'gathered_plain', fsdp_config=gathered, **without))
    ours, averaged, _ = trained(case(base, 'gathered', fsdp_config=gathered))
    assert ours == plain
    same(averaged, averages)
    print('gathered parameters: ok', flush=True)

    # its state is that of rank 0, with which all ranks would train on
    ema = {'composers_ema': {'half_life': '2ba', 'smoothing': None}}
    try:
        tiny.run(case(base, 'composers', algorithms=ema, **without))
    except ValueError as error:
        assert "EMA keeps tensors in its state, of which Composer saves rank 0's shard only" in str(error), error
    else:
        raise AssertionError('not refused')
    print("Composer's EMA: ok", flush=True)

    cfg = case(base, 'ddp')
    del cfg['fsdp_config']
    stopped(cfg, 6)
    dist.barrier()
    _, replicas, callbacks = trained(cfg)
    assert sum(tensor.numel() for tensor in replicas['EMA ema_2ba']) == model
    everywhere = dist.all_gather_object([float(tensor.sum()) for tensor in replicas['EMA ema_2ba']])
    assert everywhere[0] == everywhere[1]
    print('DDP: ok', flush=True)


if __name__ == '__main__':
    main()
