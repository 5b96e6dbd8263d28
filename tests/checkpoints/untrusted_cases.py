# SPDX-License-Identifier: Apache-2.0
"""Run by test_untrusted_checkpoints under the composer launcher: sharded checkpoints that run code, or are damaged."""

import gc
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import test_untrusted_checkpoints as untrusted
import tiny
from composer.utils import dist
from omegaconf import OmegaConf
from torch.distributed.checkpoint.api import CheckpointException

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.stage.run import check_or_exit, train_stage
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.stage.stage_start import KEEP_OPTIMIZER_IGNORE_KEYS

KEEP = {'load_weights_only': False, 'load_ignore_keys': KEEP_OPTIMIZER_IGNORE_KEYS}
TRUST = {'callbacks': {'stage_start': {'trust_checkpoint': True}}}


def plain(cfg):
    """What llm-foundry's train says, on every rank."""
    try:
        tiny.run(cfg)
    except ValueError as error:
        return str(error)
    except CheckpointException as failures:
        errors = [error for error, _ in failures.failures.values() if isinstance(error, CheckpointError)]
        assert errors, failures
        return str(errors[0])
    finally:
        gc.collect()
    return ''


def recipe(cfg):
    """What the recipe says."""
    try:
        stage = Stage.from_yaml(cfg)
        check_or_exit(stage, 'case')
        train_stage(stage)
    except SystemExit as stopped:
        return str(stopped)
    finally:
        gc.collect()
    return ''


def on_rank_zero(function, *arguments):
    if dist.get_global_rank() == 0:
        function(*arguments)
    dist.barrier()


def copied(base, folder, name):
    """A copy of the run, the YAML that goes on with it, and its newest checkpoint."""
    run = folder / name / 'run'
    on_rank_zero(lambda: shutil.copytree(folder / 'run', run, symlinks=True))
    recorded = {'callbacks': {'recorder': {'path': str(folder / name / 'recorded')}}}
    return tiny.merge(base, {'save_folder': str(run), **recorded}), run / 'ep0-ba2'


def main():
    base = OmegaConf.to_container(OmegaConf.load(sys.argv[1]))
    folder = Path(base['save_folder']).parent
    tiny.run(tiny.merge(base, {'max_duration': '2ba'}))
    on_rank_zero(untrusted.write_record, folder / 'run', base)

    for place, kind in (
        ('load_path', 'metadata'), ('load_path', 'entry'),  # neither `reset` nor `keep` loads a parent's algorithms
        ('resume', 'metadata'), ('resume', 'entry'), ('resume', 'algorithm'),
    ):  # fmt: skip
        cfg, checkpoint = copied(base, folder, f'{place}-{kind}')
        sign = checkpoint.with_name('sign')
        on_rank_zero(untrusted.SPOIL[kind][0], checkpoint, sign)
        if place == 'load_path':
            child = {'run_name': 'child', 'save_folder': str(sign.with_name('child')), 'load_path': str(checkpoint)}
            keep = {**KEEP, 'callbacks': {'stage_start': {'optimizer_state': 'keep'}}}
            cfg = tiny.merge(cfg, {**child, **(keep if kind == 'entry' else {'load_weights_only': True})})
        for said in (plain(cfg), recipe(cfg)):
            # preflight has rank 0 say it
            assert f'{checkpoint}/' in said and 'is not safe to read' in said or said == '1', f'{place} {kind}: {said}'
        dist.barrier()
        assert not sign.exists(), f'{place} {kind}'
        dist.barrier()
        with suppress(Exception, CheckpointException):  # what evil leaves behind may not be loadable
            tiny.run(tiny.merge(cfg, TRUST))
        dist.barrier()
        assert sign.exists(), f'{place} {kind} is harmless anyway'
        print(f'{place} {kind}: ok', flush=True)

    cfg, checkpoint = copied(base, folder, 'cut')
    file = checkpoint / '__1_0.distcp'
    on_rank_zero(lambda: os.truncate(file, file.stat().st_size - 10))
    for said in (plain(cfg), recipe(cfg)):
        assert f'{file} is damaged: it has' in said or said == '1' and dist.get_global_rank(), said
    assert not list((folder / 'cut').glob('recorded*'))
    print('cut off: ok', flush=True)


if __name__ == '__main__':
    main()
