# SPDX-License-Identifier: Apache-2.0
"""Run by test_two_ranks under the composer launcher: mistakes that a sharded load makes without an error."""

import sys
from pathlib import Path

import recorder
import tiny
import torch
from composer.core import Algorithm
from composer.utils import dist
from llmfoundry import registry
from omegaconf import OmegaConf

from cpt_algorithms.stage.stage_start import KEEP_OPTIMIZER_IGNORE_KEYS


class KeepsTensors(Algorithm):
    """Stands for Composer's EMA: its state is a tensor."""

    def match(self, event, state):
        return False

    def apply(self, event, state, logger):
        pass

    def state_dict(self):
        return {'average': {'weight': torch.zeros(2)}}


registry.algorithms.register('keeps_tensors', func=KeepsTensors)


def case(base, name, **over):
    folder = Path(base['save_folder']).parent
    run_name = name.replace(' ', '_')
    witness = {'callbacks': {'recorder': {'path': str(folder / f'{run_name}.jsonl')}}}
    return tiny.merge(
        base, tiny.merge({'run_name': run_name, 'save_folder': str(folder / run_name)}, tiny.merge(witness, over))
    )


def refused(cfg, words):
    try:
        tiny.run(cfg)
    except ValueError as error:
        assert words in str(error), error
        return
    raise AssertionError(f'{cfg["run_name"]} was not refused')


def witnessed(cfg):
    tiny.run(cfg)
    return recorder.read(cfg['callbacks']['recorder']['path'], dist.get_global_rank())


def main():
    parent, base = (OmegaConf.to_container(OmegaConf.load(path)) for path in sys.argv[1:])
    tiny.run(parent)
    dist.barrier()
    keep = {'load_weights_only': False, 'load_ignore_keys': KEEP_OPTIMIZER_IGNORE_KEYS}
    keeps = {'callbacks': {'stage_start': {'optimizer_state': 'keep'}}}
    short = {'max_duration': '3ba', 'scheduler': {'t_max': '8ba'}}

    lines = witnessed(case(base, 'kept optimizer', **keep, **keeps, **short))
    assert [line['lr'] for line in lines.values()] == [[1e-3 * (0.25 + 0.75 * b / 4)] for b in range(3)]
    assert lines[0]['weight_decay'] == [1e-5]
    assert lines[0]['adam_step'] == 4, 'the parent took four steps'
    print('kept optimizer: ok', flush=True)

    # `state/schedulers*` empties the live scheduler's base_lrs: the LR would stay where it is for the whole run
    starred = [key.replace('state/schedulers', 'state/schedulers*') for key in KEEP_OPTIMIZER_IGNORE_KEYS]
    lines = witnessed(case(base, 'starred ignore', load_weights_only=False, load_ignore_keys=starred, **keeps, **short))
    assert [line['lr'] for line in lines.values()] == [[1e-3 * (0.25 + 0.75 * b / 4)] for b in range(3)]
    assert all(line['base_lrs'] == [1e-3] for line in lines.values())
    print('starred ignore: ok', flush=True)

    # Adam would start at step 1 with zero moments, and its first update would be too small
    ignored = [*KEEP_OPTIMIZER_IGNORE_KEYS, 'state/optimizers']
    without = {'load_weights_only': False, 'load_ignore_keys': ignored}
    lines = witnessed(case(base, 'ignored optimizer', **without, **short))
    assert lines[0]['adam_step'] == 0
    refused(case(base, 'ignored optimizer kept', **without, **keeps), "the parent's optimizer state was not loaded")
    print('ignored optimizer: ok', flush=True)

    # without autoresume a sharded run starts over, on top of its own checkpoints
    cfg = case(base, 'no autoresume', load_weights_only=True, autoresume=False, save_interval='1ba', **short)
    tiny.run(cfg)
    dist.barrier()
    refused(cfg, 'holds checkpoints already')
    print('no autoresume: ok', flush=True)

    refused(
        case(base, 'tensors in an algorithm', load_weights_only=True, algorithms={'keeps_tensors': {}}, **short),
        "keeps tensors in its state, of which Composer saves rank 0's shard only",
    )
    print('tensors in an algorithm: ok', flush=True)


if __name__ == '__main__':
    main()
