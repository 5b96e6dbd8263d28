# SPDX-License-Identifier: Apache-2.0
"""``stage_start`` event by event, on a model of one number: what it puts back, what it refuses, and in which words."""

import json
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Precision, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.optim import ConstantScheduler, LinearScheduler, compile_composer_scheduler
from llmfoundry.callbacks import HuggingFaceCheckpointer
from tiny import Number

from cpt_algorithms.checkpoints.exports import export_atomically
from cpt_algorithms.files import write_json
from cpt_algorithms.replay.replay_text import ReplayTextDataset
from cpt_algorithms.schedulers.schedulers import RewarmConstantScheduler
from cpt_algorithms.stage import stage_start
from cpt_algorithms.stage.model_card import write_card
from cpt_algorithms.stage.record import read_record
from cpt_algorithms.stage.saving import StoppedError
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.stage.stage_start import StageStart


class Run:
    """What Composer's trainer does with the callback."""

    def __init__(
        self, optimizer='reset', run_name='run', lr=0.5, betas=(0.9, 0.99), scheduler=None, ours=None, max_duration='8ba',
        precision=Precision.FP32, algorithms=(), yaml=None,
    ):  # fmt: skip
        self.callback = StageStart(optimizer, train_config=yaml)
        model = Number(1.0)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=0.25)
        self.state = State(
            model=model, rank_zero_seed=0, run_name=run_name, device=DeviceCPU(), max_duration=max_duration,
            optimizers=self.optimizer, callbacks=[self.callback, *([ours] if ours else [])], precision=precision,
            algorithms=list(algorithms),
        )  # fmt: skip
        self.logger = Logger(self.state)
        if scheduler is not None:
            self.state.schedulers = [compile_composer_scheduler(scheduler, self.state)]
        self.callback.init(self.state, self.logger)
        self.callback.before_load(self.state, self.logger)

    def step(self):
        self.state.model.weight.grad = torch.ones(1)
        self.optimizer.step()

    def load(self, parent='parent.pt', at=0, saved=None, **group):
        """As if the parent's checkpoint had brought these hyperparameters."""
        self.state.load_path = parent
        self.state.timestamp = self.state.timestamp.copy(batch=at)
        self.optimizer.param_groups[0].update(group)
        if saved is not None:
            self.callback.load_state_dict(saved)
        self.callback.after_load(self.state, self.logger)
        return self

    def saved(self):
        return self.callback.state_dict()

    @property
    def group(self):
        return {key: value for key, value in self.optimizer.param_groups[0].items() if key != 'params'}


def test_a_stage_takes_back_what_its_yaml_says():
    run = Run(scheduler=ConstantScheduler())
    yaml = run.group
    run.step()
    run.state.schedulers[0].base_lrs = []
    run.load(lr=7.0, initial_lr=8.0, weight_decay=0.0, betas=[0.1, 0.2], eps=1.0)
    assert run.group == yaml
    assert yaml['betas'] == (0.9, 0.99)
    assert run.state.schedulers[0].base_lrs == [0.5]
    assert not run.optimizer.state, 'the optimizer starts afresh'


def test_kept_optimizers_keep_their_moments():
    run = Run('keep')
    run.step()
    run.load(lr=7.0)
    assert run.group['lr'] == 0.5
    assert run.optimizer.state[run.state.model.weight]['exp_avg'].item() == pytest.approx(0.1)
    with pytest.raises(
        ValueError,
        match="^callbacks.stage_start.optimizer_state is keep, but the parent's optimizer state was not loaded; set load_weights_only: false, load_ignore_keys: .state/schedulers, ",
    ):
        Run('keep').load()
    # a sharded load leaves zero moments behind, and a step
    run = Run('keep')
    run.optimizer.state[run.state.model.weight] = {'step': torch.ones(1), 'exp_avg': torch.zeros(1)}
    with pytest.raises(ValueError, match='optimizer state was not loaded'):
        run.load()
    run.optimizer.state[run.state.model.weight] = {'step': torch.ones(1), 'exp_avg': -torch.ones(1)}
    run.load()
    with pytest.raises(
        ValueError, match='^callbacks.stage_start.optimizer_state is keep, but there is no load_path to keep one from$'
    ):
        Run('keep').load(parent=None)


def test_bad_options_are_named():
    with pytest.raises(
        ValueError, match="^callbacks.stage_start.optimizer_state='x' is not possible; use 'reset' or 'keep'$"
    ):
        StageStart('x')
    with pytest.raises(
        ValueError, match='^callbacks.stage_start.trust_checkpoint=1 is not possible; use true or false$'
    ):
        StageStart(trust_checkpoint=1)
    assert StageStart().optimizer_state == 'reset'
    assert StageStart().trust_checkpoint is False


def test_a_restart_that_changes_nothing_goes_on():
    saved = Run(scheduler=LinearScheduler()).saved()
    run = Run(scheduler=LinearScheduler())
    run.step()
    run.load(at=4, saved=saved, lr=0.28, betas=[0.9, 0.99])
    assert run.group['lr'] == 0.28, 'the learning rate is where it was, one batch late'
    assert run.optimizer.state, 'and so is the optimizer'


@pytest.mark.parametrize(
    ('loaded', 'message'),
    [
        ({'weight_decay': 0.5}, 'weight_decay: 0.5 -> 0.25'),
        ({'betas': [0.8, 0.99]}, r'betas: \[0.8, 0.99\] -> \(0.9, 0.99\)'),
        ({'initial_lr': 1.0, 'eps': 1.0}, 'initial_lr: 1.0 -> 0.5; eps: 1.0 -> 1e-08|eps: 1.0 -> 1e-08; initial_lr: 1.0 -> 0.5'),
    ],
)  # fmt: skip
def test_a_restart_that_changes_something_is_refused(loaded, message):
    saved = Run(scheduler=LinearScheduler()).saved()
    with pytest.raises(
        ValueError,
        match=rf"^run 'run' was saved with other settings \(({message})\)\. A restart changes nothing: restore .* and save_folder of its own$",
    ):
        Run(scheduler=LinearScheduler()).load(at=4, saved=saved, **{'lr': 0.25, **loaded})


def test_our_schedules_are_compared_with_the_time():
    def resumed(lr):
        scheduler = RewarmConstantScheduler('4ba')
        return Run(scheduler=scheduler, ours=scheduler).load(at=2, saved=Run(scheduler=scheduler).saved(), lr=lr)

    assert resumed(0.25).group['lr'] == 0.25  # half of the warm-up
    for lr in (0.25 + 1e-6, 0.25 - 1e-6, 0.25 + 1e-9, 0.5):
        with pytest.raises(ValueError, match=rf'\(lr of batch 2: {lr:g} -> 0.25\)'):
            resumed(lr)


def test_another_runs_checkpoint_is_not_gone_on_with():
    saved = Run(run_name='other').saved()
    with pytest.raises(
        ValueError,
        match="^p.pt was loaded whole, at batch 3 of run 'other': its learning rate, time and data position would go on in 'run'. To start a stage from it, set load_weights_only: true, and",
    ):
        Run().load('p.pt', at=3, saved=saved)
    with pytest.raises(ValueError, match='at batch 3 of a run without stage_start: .*: false, load_i'):
        Run('keep').load('p.pt', at=3)


def test_the_first_batch_is_checked_once(caplog):
    run = Run(scheduler=ConstantScheduler(alpha=0.5)).load()
    run.optimizer.param_groups[0]['lr'] = 0.25
    with caplog.at_level(logging.INFO):
        run.callback.batch_start(run.state, run.logger)
    (record,) = [each for each in caplog.records if each.name.startswith('cpt_algorithms')]
    assert record.getMessage() == (
        'stage start: first step at lr=0.25 (base 0.5), weight_decay=0.25, optimizer state fresh, parent parent.pt'
    )
    run.optimizer.param_groups[0]['lr'] = 1.0
    run.callback.batch_start(run.state, run.logger)

    run = Run('keep', scheduler=ConstantScheduler())
    run.step()
    run.load()
    with caplog.at_level(logging.INFO):
        run.callback.batch_start(run.state, run.logger)
    assert 'optimizer state kept, parent parent.pt' in caplog.text
    run = Run(scheduler=ConstantScheduler()).load(None)
    with caplog.at_level(logging.INFO):
        run.callback.batch_start(run.state, run.logger)
    assert caplog.messages[-1].endswith('optimizer state fresh, no checkpoint loaded')

    run = Run(scheduler=ConstantScheduler()).load()
    run.optimizer.param_groups[0].update(lr=1.0, weight_decay=0.5)
    with pytest.raises(
        RuntimeError,
        match='^the first optimizer step would not obey the YAML: (lr=1.0 instead of 0.5; weight_decay=0.5 instead of 0.25)$',
    ):
        run.callback.batch_start(run.state, run.logger)
    # of a restart that has been judged
    run = Run(scheduler=ConstantScheduler()).load(at=3, saved=Run(scheduler=ConstantScheduler()).saved())
    run.optimizer.param_groups[0]['weight_decay'] = 0.5
    run.callback.batch_start(run.state, run.logger)


def test_an_optimizer_without_decay_has_none(caplog):
    run = Run(scheduler=ConstantScheduler()).load()
    for group in (run.group, run.optimizer.param_groups[0], *run.callback._hyperparameters[0]):
        group.pop('weight_decay', None)
        assert group is run.optimizer.param_groups[0] or 'params' not in group
    with caplog.at_level(logging.INFO):
        run.callback.batch_start(run.state, run.logger)
    assert 'weight_decay=0, ' in caplog.text


@pytest.fixture
def given(data, tmp_path):
    """The YAML of a run in ``tmp_path / 'run'`` as llm-foundry hands it on."""
    cfg = tiny.config(tmp_path, data, 'run', eval_loader=[tiny.eval_loader('old', data['old'])])
    cfg['save_folder'] = f'{tmp_path}/{{run_name}}'
    loaders = {'eval_loaders': cfg.pop('eval_loader'), 'eval_loader': None}
    return {**cfg, **loaders, 'n_gpus': 2, 'eval_first': None}


def record_of(tmp_path):
    return json.loads((tmp_path / 'run' / 'stage.json').read_text())


def test_the_yaml_is_recorded_and_compared(given, tmp_path):
    Run(yaml=given).load(None)
    cfg = {key: value for key, value in given.items() if key not in ('eval_loaders', 'n_gpus', 'eval_first')}
    cfg['eval_loader'] = given['eval_loaders']
    assert read_record(tmp_path / 'run').config.to_train_yaml() == Stage.from_yaml(cfg).to_train_yaml()
    torch.save({'state': {}}, tmp_path / 'run' / 'ep0-ba3-rank0.pt')
    Run(yaml=given)
    with pytest.raises(ValueError, match='seed'):
        Run(yaml={**given, 'seed': 18})
    # the recipe has compared it before; and what has no folder or name cannot be found again
    of_the_recipe = {**given['callbacks'], 'datasets_built': {}}
    for other in ({'callbacks': of_the_recipe}, {'save_folder': None}, {'run_name': None}):
        assert Run(yaml={**given, 'seed': 18, **other}).callback._stage is None


def test_fsdp_that_one_process_does_not_have_is_no_other_setting(given, tmp_path):
    fsdp = {'mixed_precision': 'PURE'}
    Run(yaml={**given, 'fsdp_config': fsdp}).load(None)
    torch.save({'state': {}}, tmp_path / 'run' / 'ep0-ba3-rank0.pt')
    Run(yaml=given)
    with pytest.raises(ValueError, match='mixed_precision'):
        Run(yaml={**given, 'fsdp_config': {'mixed_precision': 'DEFAULT'}})


def test_evaluations_take_no_random_numbers():
    run = Run()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run.callback.eval_start(run.state, run.logger)
    torch.rand(3)
    for _ in range(2):
        run.callback.eval_end(run.state, run.logger)
    assert torch.rand(1) == expected


def test_a_record_is_written_when_a_stage_starts_and_when_it_is_extended(given, tmp_path):
    saved = Run().saved()
    Run(yaml=given).load(None)
    marked = {**record_of(tmp_path), 'versions': {'torch': 'earlier'}, 'contents': {'earlier': 'kept'}}
    write_json(f'{tmp_path}/run/stage.json', marked)
    Run(yaml=given).load('latest.pt', at=1, saved=saved)
    assert record_of(tmp_path) == marked, 'it was resumed'
    Run(yaml={**given, 'max_duration': '9ba'}).load('latest.pt', at=1, saved=saved)
    extended = record_of(tmp_path)
    assert extended['config']['max_duration'] == '9ba'
    assert extended['versions'] != marked['versions'] and extended['contents']['earlier'] == 'kept'
    write_json(f'{tmp_path}/run/stage.json', marked)
    Run(yaml=given).load('parent.pt')
    again = record_of(tmp_path)
    assert again['versions'] != marked['versions'] and 'earlier' not in again['contents'], 'it starts again'


def test_a_run_whose_name_has_changed_is_known_by_its_folder(given, tmp_path):
    saved = {'run_name': 'called otherwise before'}
    with pytest.raises(ValueError, match="at batch 3 of run 'called otherwise before'"):
        Run(yaml=given).load(f'{tmp_path}/run/ep0-ba3-rank0.pt', at=3, saved=saved)  # nothing was recorded there
    Run(yaml=given).load(None)
    Run(yaml=given).load(f'{tmp_path}/run/ep0-ba3-rank0.pt', at=3, saved=saved)
    for elsewhere in (f'{tmp_path}/other/ep0-ba3-rank0.pt', None):
        with pytest.raises(ValueError, match="at batch 3 of run 'called otherwise before'"):
            Run(yaml=given).load(elsewhere, at=3, saved=saved)


def test_rows_that_run_out_stop_the_run(monkeypatch):
    asked = []

    def check_budget(slots):
        asked.append(slots)
        if slots > 24:
            raise ValueError('there are 24 rows')

    text = ReplayTextDataset.__new__(ReplayTextDataset)
    monkeypatch.setattr(ReplayTextDataset, 'is_packed', property(lambda self: len(asked) > 2), raising=False)
    vars(text).update(check_budget=check_budget, global_batch_size=8)
    run = Run(scheduler=ConstantScheduler()).load(at=2, saved=Run(scheduler=ConstantScheduler()).saved())
    run.state.train_dataloader = SimpleNamespace(dataset=text)
    run.state.timestamp = run.state.timestamp.copy(sample=16)
    run.callback.batch_start(run.state, run.logger)
    run.state.timestamp = run.state.timestamp.copy(sample=17)
    with pytest.raises(StoppedError, match='^after batch 2, there are 24 rows$'):
        run.callback.batch_start(run.state, run.logger)
    assert asked == [24, 25]
    asked.append(0)
    run.callback.batch_start(run.state, run.logger)  # of packed rows it is known from the start
    assert asked == [24, 25, 0]
    run.callback.eval_end(run.state, run.logger)  # of an evaluation that did not begin


@pytest.mark.parametrize('average', ['', '-lawa'])
def test_an_export_gets_its_card(average, given, tmp_path):
    exporter = HuggingFaceCheckpointer.__new__(HuggingFaceCheckpointer)
    added = []
    vars(exporter)['save_additional_contents'] = lambda *given: added.append(given)
    exporter.huggingface_folder_name_fstr = 'huggingface/ba{batch}'
    run = Run(yaml=given, ours=exporter).load(None)
    exporter.huggingface_folder_name_fstr = f'huggingface/.ba{{batch}}{average}'
    run.state.timestamp = run.state.timestamp.copy(batch=5)
    out = tmp_path / 'export'
    out.mkdir()
    exporter.save_additional_contents(run.state, run.logger, str(out))
    assert added == [(run.state, run.logger, str(out))], 'whatever else is added'
    (tmp_path / 'expected').mkdir()
    write_card(tmp_path / 'expected', read_record(tmp_path / 'run'), 5, average.removeprefix('-'))
    for path in (tmp_path / 'expected').iterdir():
        assert (out / path.name).read_text() == path.read_text()
    assert ('lawa' in (out / 'README.md').read_text()) == bool(average)
    # a trainer made by hand has no record
    by_hand = HuggingFaceCheckpointer.__new__(HuggingFaceCheckpointer)
    vars(by_hand)['save_additional_contents'] = lambda *given: added.append(given)
    by_hand.huggingface_folder_name_fstr = 'huggingface/ba{batch}'
    run = Run(ours=by_hand).load(None)
    (tmp_path / 'bare').mkdir()
    by_hand.save_additional_contents(run.state, run.logger, str(tmp_path / 'bare'))
    assert len(added) == 2 and not list((tmp_path / 'bare').iterdir())


def test_loading_and_exporting_are_done_with_care(monkeypatch):
    asked = []
    monkeypatch.setattr(stage_start, 'guard_loading', asked.append)
    exporter = HuggingFaceCheckpointer.__new__(HuggingFaceCheckpointer)
    exporter.huggingface_folder_name_fstr = 'huggingface/ba{batch}'
    StageStart(trust_checkpoint=True).init(SimpleNamespace(callbacks=[exporter]), None)
    assert asked == [True]
    assert (exporter._save_checkpoint.func, exporter._save_checkpoint.args) == (export_atomically, (exporter,))


@pytest.mark.parametrize('state', [{'a': [{'b': torch.ones(1)}]}, {'a': (1, torch.ones(1))}, {'a': torch.ones(1)}])
def test_tensors_of_an_algorithm_are_refused_when_sharded(state):
    algorithm = SimpleNamespace(state_dict=lambda: {'first': 1, **state, 'last': 'x'})
    with pytest.raises(
        ValueError,
        match="^algorithm SimpleNamespace keeps tensors in its state, of which Composer saves rank 0's shard only: every rank would resume with it. Use a callback .this library's ema, lawa. instead$",
    ):
        stage_start._refuse_rank0_tensors(SimpleNamespace(fsdp_enabled=True, algorithms=[algorithm]))
    stage_start._refuse_rank0_tensors(SimpleNamespace(fsdp_enabled=False, algorithms=[algorithm]))


def test_a_save_folder_with_checkpoints_is_refused(tmp_path):
    def check(batch=0, overwrite=False):
        saver = CheckpointSaver(folder=str(tmp_path / '{run_name}'), overwrite=overwrite)
        timestamp = SimpleNamespace(batch=SimpleNamespace(value=batch))
        stage_start._check_save_folder(SimpleNamespace(timestamp=timestamp, callbacks=[saver], run_name='run'))

    check()
    (tmp_path / 'run').mkdir()
    for name in ('notes.txt', 'huggingface/ba6/model.safetensors'):
        (tmp_path / 'run' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'run' / name).touch()
        check()
    for name in ('step9.pt', 'ep0-ba6-rank0.pt'):
        (tmp_path / 'run' / name).touch()
    with pytest.raises(ValueError) as refused:
        check()
    assert str(refused.value) == (
        f'save_folder {tmp_path}/run holds checkpoints already (ep0-ba6-rank0.pt), and this run would start at batch 0 '
        'beside them. Set autoresume: true to go on from the latest checkpoint, or choose another save_folder'
    )
    check(batch=3)
    check(overwrite=True)
