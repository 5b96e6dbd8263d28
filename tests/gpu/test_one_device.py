# SPDX-License-Identifier: Apache-2.0
"""That everything works on a GPU, in one process: ``make gpu``. The same code on the CPU is among the ordinary tests.

Rows, rates, states and averages are compared with those of a run on the CPU, or with their definitions, exactly; losses
within what the GPU's number formats make of them, and how far apart they were is in the table at the end.
"""

import copy
import gc
import json
import shutil
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pretrained
import pytest
import recorder
import tiny
import torch
from composer.core import Callback
from composer.utils import dist
from llmfoundry import registry
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed import destroy_process_group, is_initialized
from trajectories import assert_near, expected_ema, expected_lawa, weights_along
from transformers import AutoModelForCausalLM

from cpt_algorithms import EMA, LAWA
from cpt_algorithms.checkpoints.open import open_checkpoint
from cpt_algorithms.checkpoints.save_folder import newest_complete
from cpt_algorithms.evaluation import lm_eval
from cpt_algorithms.evaluation.suite import load_suite
from cpt_algorithms.preparation.sampling import sample

foundry = import_module('llmfoundry.command_utils.train')  # its package has a function of this name
GPU = pytest.param('gpu', marks=pytest.mark.gpu)
BF16 = {'precision': 'amp_bf16'}
FSDP = {**BF16, 'fsdp_config': {'state_dict_type': 'sharded'}}
NO_AVERAGES = {'callbacks': {'ema': None, 'lawa': None}}
# Each beside everything that is ours. Composer has FSDP1 beside FSDP2, but torch makes its modules on a GPU only.
WAYS = {
    'fp32': {},
    'bf16': BF16,
    'bf16, averages on the device': {**BF16, 'callbacks': {'lawa': {'offload': False}}},
    'FSDP2': FSDP,
    'FSDP2, activation checkpointing': tiny.merge(FSDP, {'fsdp_config': {'activation_checkpointing': True}}),
    'FSDP1, original parameters': tiny.merge(FSDP, {'fsdp_config': {'use_orig_params': True}, **NO_AVERAGES}),
    'compiled': {**BF16, 'compile_config': {}},
    'flash attention': {**BF16, 'model': {'attn_config': {'attn_impl': 'flash'}}},
}
OF_A_GPU = ('FSDP1, original parameters', 'flash attention')
# How far losses may be from those of float32 on the CPU, which are about log(256): TF32, and bfloat16, of which autocast
# on the CPU makes 0.0016.
NEAR = {'fp32': 2e-3, 'amp_bf16': 1e-2}


@contextmanager
def on_cpu():
    """As on a machine without a GPU."""
    end_process_group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, 'is_available', lambda: False)
        yield 'cpu'
    end_process_group()


@contextmanager
def on_gpu():
    """Composer takes the GPU where there is one."""
    assert torch.cuda.is_available(), 'there is no GPU that torch can use'
    end_process_group()
    yield 'gpu'
    end_process_group()


def end_process_group():
    """That of a process has the backend of its first device."""
    gc.collect()
    if is_initialized():
        destroy_process_group()


@pytest.fixture(params=['cpu', GPU])
def device(request):
    with on_cpu() if request.param == 'cpu' else on_gpu() as name:
        yield name


class OutOfMemory(Callback):
    """Has no room for more than two rows, be it in training or in an evaluation; `auto` for both, on the CPU as well."""

    def __init__(self):
        self.seen = {'train': [], 'eval': []}

    def after_load(self, state, logger):
        assert state.device_train_microbatch_size == tiny.BATCH
        state.auto_microbatching = True
        for evaluator in state.evaluators:
            evaluator.auto_microbatching = True

    def eval_start(self, state, logger):
        (evaluator,) = [each for each in state.evaluators if each.label == state.dataloader_label]
        evaluator.device_eval_microbatch_size = tiny.BATCH  # also of a twin, which begins with what its base has found

    def look(self, state, when):
        rows = len(state.batch['input_ids'])
        self.seen[when].append(rows)
        if rows > 2:
            raise RuntimeError('CUDA out of memory')

    def before_forward(self, state, logger):
        self.look(state, 'train')

    def eval_before_forward(self, state, logger):
        self.look(state, 'eval')


registry.callbacks.register('out_of_memory', func=OutOfMemory)


def config(folder, data, name, parent, device, **over):
    """A stage with everything on."""
    base = tiny.config(
        folder, data, name, load_path=parent, load_weights_only=True, eval_interval='4ba', eval_first=True, max_duration='8ba',
        save_interval='4ba', model={'d_model': 32}, python_log_level='error',
        eval_loader=[tiny.eval_loader(label, data[label]) for label in ('new', 'old')],
        train_loader={
            'pin_memory': device == 'gpu',
            'dataset': {'replay': {'fraction': 0.25, 'streams': {'old': {'local': str(data['old']), 'split': 'train'}}}},
        },
        callbacks={
            'forgetting': {'new': ['new'], 'old': ['old'], 'save_folder': str(folder / name)}, 'final_loss': {'window': '4ba', 'interval': '2ba', 'save_folder': str(folder / name)},
            'ema': {'half_life': ['2ba', '256tok']}, 'lawa': {'k': 3, 'interval': '2ba'},
            'recorder': {'weights': str(folder / f'{name}.weights')},
        },
    )  # fmt: skip
    return on_device(tiny.merge(base, over), device)


def on_device(cfg, device):
    """Composer has no bfloat16 on the CPU, and torch no compiled code there without a compiler of C++."""
    if device == 'cpu':
        cfg['precision'] = 'fp32'
        if 'compile_config' in cfg:
            cfg['compile_config'] = {'backend': 'aot_eager'}
    return cfg


def train(cfg):
    """Its lines, its callbacks by name and the averages, in this process."""
    end_process_group()
    with pytest.MonkeyPatch.context() as patch:
        # llm-foundry takes FSDP away from a run of one process
        alone = SimpleNamespace(**{**vars(dist), 'get_world_size': lambda: 1 + ('fsdp_config' in cfg)})
        patch.setattr(foundry, 'dist', alone)
        patch.setenv('FSDP_VERSION', '1' if 'use_orig_params' in cfg.get('fsdp_config', {}) else '2')
        trainer = foundry.train(OmegaConf.create(copy.deepcopy(cfg)))
    callbacks = {type(each).__name__: each for each in trainer.state.callbacks}
    averages = {
        name: dict(zip(each.shards.parameters, [tensor.cpu() for tensor in each.average(name)], strict=True))
        for each in callbacks.values()
        if isinstance(each, EMA | LAWA)
        for name in each.names()
    }
    lines = recorder.read(cfg['callbacks']['recorder']['path'])
    trainer.close()
    return SimpleNamespace(lines=lines, callbacks=callbacks, averages=averages, model=trainer.state.model)


def distance(ours, theirs):
    """How far apart the losses of two runs ever were."""
    assert ours.keys() == theirs.keys()
    return max(abs(float.fromhex(ours[at]['loss']) - float.fromhex(theirs[at]['loss'])) for at in ours)


def planned(lines):
    """What does not depend on the numbers of a device: rows and learning rates."""
    return [(line['rows'], line['lr'], line['weight_decay'], line['adam_step']) for line in lines.values()]


def weights_of(cfg):
    return weights_along(cfg['callbacks']['recorder']['weights'])


def assert_averages(cfg, ran):
    """Of the definition, taken from the weights after each batch."""
    weights = weights_of(cfg)
    expected = {
        'ema_2ba': expected_ema(weights, 2), 'ema_256tok': expected_ema(weights, 2), 'lawa': expected_lawa(weights, (4, 6, 8)),
    }  # fmt: skip
    assert ran.averages.keys() == expected.keys()
    for name, average in ran.averages.items():
        assert_near(average, expected[name])


@pytest.fixture(scope='module')
def parents(data, tmp_path_factory):
    """A model that was saved on the CPU, whole and in shards."""
    folder, found = tmp_path_factory.mktemp('parents'), {}
    with on_cpu():
        for form, over in (('full', {}), ('sharded', {'fsdp_config': FSDP['fsdp_config']})):
            cfg = tiny.config(
                folder, data, form, model={'d_model': 32}, max_duration='4ba', callbacks={'recorder': {}}, **over
            )
            train(cfg)
            found[form] = newest_complete(folder / form)[1]
    return found


@pytest.fixture
def parent(parents):
    return parents['full']


@pytest.fixture(scope='module')
def reference(data, parents, tmp_path_factory):
    """The stage on the CPU, in float32: what it was trained with, and where it is."""
    folder = tmp_path_factory.mktemp('reference')
    with on_cpu():
        return train(config(folder, data, 'reference', parents['full'], 'cpu')).lines


@pytest.mark.parametrize('way', [way for way in WAYS if way not in OF_A_GPU])
def test_trains(way, device, data, parents, reference, tmp_path, measured):
    check_training(way, device, data, parents, reference, tmp_path, measured)


@pytest.mark.gpu
@pytest.mark.parametrize('way', OF_A_GPU)
def test_trains_as_only_a_gpu_can(way, data, parents, reference, tmp_path, measured):
    if way == 'flash attention' and find_spec('flash_attn') is None:
        pytest.skip('flash_attn is not installed')
    with on_gpu() as device:
        check_training(way, device, data, parents, reference, tmp_path, measured)


def check_training(way, device, data, parents, reference, folder, measured):
    parent = parents['sharded' if 'fsdp_config' in WAYS[way] else 'full']
    cfg = config(folder, data, 'run', parent, device, **WAYS[way])
    ran = train(cfg)
    assert planned(ran.lines) == planned(reference), 'the rows and rates of the CPU'
    apart = distance(ran.lines, reference)
    measured(loss_apart_from_float32_on_CPU=f'{apart:.1e}')
    assert apart < NEAR[cfg['precision']]
    if 'lawa' in cfg['callbacks']:
        assert_averages(cfg, ran)
        kinds = {tensor.device.type for snapshot in ran.callbacks['LAWA']._window.values() for tensor in snapshot}
        offload = cfg['callbacks']['lawa'].get('offload', True)
        assert kinds == {'cpu' if offload or device == 'cpu' else 'cuda'}
        pinned = [tensor.is_pinned() for snapshot in ran.callbacks['LAWA']._window.values() for tensor in snapshot]
        assert all(pinned) == (offload and device == 'gpu')
    judged = json.loads((tiny.Path(cfg['save_folder']) / 'forgetting.json').read_text())
    assert judged['parent'].keys() == {'new', 'old'}


ATTENTIONS = ('eager', 'sdpa', 'sdpa, documents masked', 'flash_attention_2', 'flash_attention_2, documents masked')


@pytest.mark.parametrize(
    ('device', 'attention'),
    [
        pytest.param(device, attention, marks=[pytest.mark.gpu] * (device == 'gpu'))
        for device in ('cpu', 'gpu')
        for attention in ATTENTIONS
        if device == 'gpu' or not attention.startswith('flash')
    ],
    indirect=['device'],
)
def test_a_hugging_face_model_is_updated_and_exported(attention, device, data, tmp_path, measured):
    attention, _, masked = attention.partition(', ')
    if attention == 'flash_attention_2' and find_spec('flash_attn') is None:
        pytest.skip('flash_attn is not installed')
    base = pretrained.make('llama', tmp_path, data['tokenizer'])
    ends = {'mask_documents': {'eos_token_id': 7}} if masked else {}  # any token: rows are random
    over = {'python_log_level': 'error', 'callbacks': ends, 'eval_first': True}
    cfg = on_device(pretrained.stage(tmp_path, data, 'run', base, **BF16, **over), device)
    cfg['model']['attn_implementation'] = attention
    cfg['callbacks']['recorder']['weights'] = str(tmp_path / 'weights')
    exporter = {'save_folder': cfg['save_folder'], 'save_interval': '8ba', 'precision': 'float32'}
    cfg['callbacks']['hf_checkpointer'] = exporter
    ran = train(cfg)
    assert ran.model.model.config._attn_implementation == attention
    with on_cpu():
        apart = distance(ran.lines, train(pretrained.stage(tmp_path, data, 'cpu', base, **over)).lines)
    measured(loss_apart_from_float32_on_CPU=f'{apart:.1e}')
    assert apart < NEAR['fp32'], 'with so few steps bfloat16 is as near'
    exported = load_file(tiny.Path(cfg['save_folder']) / 'huggingface' / 'ba8' / 'model.safetensors')
    last = weights_along(tmp_path / 'weights')[-1]
    assert {f'model.{key}' for key in exported} == last.keys()
    assert all(torch.equal(tensor, last[f'model.{key}']) for key, tensor in exported.items()), 'bit for bit'


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize('offload', [True, False])
def test_averages_leave_training_as_it_is(offload, device, data, parent, tmp_path, deterministic, measured):
    dropout = {**BF16, 'model': {'resid_pdrop': 0.1}}
    plain, again = (
        train(config(tmp_path, data, name, parent, device, **tiny.merge(dropout, NO_AVERAGES))).lines
        for name in ('plain', 'again')
    )
    over = {**dropout, 'callbacks': {'lawa': {'offload': offload}}}
    averaged = train(config(tmp_path, data, 'averaged', parent, device, **over)).lines
    noise, apart = distance(plain, again), distance(plain, averaged)
    assert planned(averaged) == planned(plain)
    measured(the_same_run_twice=f'{noise:.1e}', with_and_without_averages=f'{apart:.1e}')
    # bit-identical, if the same run twice is
    assert apart <= 10 * noise < NEAR['fp32']


@pytest.mark.parametrize('device', [pytest.param('cpu', marks=pytest.mark.long), GPU], indirect=True)
def test_killed_and_resumed(device, data, parent, tmp_path, deterministic, measured):
    """The process is killed in earnest, behind the checkpoint of batch 4."""
    over = {**BF16, 'callbacks': {'recorder': {'digests': True, 'weights': None}}}
    straight = train(config(tmp_path, data, 'straight', parent, device, **over)).lines
    cfg = config(tmp_path, data, 'killed', parent, device, **over)
    with pytest.MonkeyPatch.context() as patch:
        if device == 'cpu':
            patch.setenv('CUDA_VISIBLE_DEVICES', '')
        tiny.recipe(tiny.merge(cfg, {'callbacks': {'recorder': {'kill_at': 6}}}), tmp_path, expect=tiny.KILLED)
    assert newest_complete(cfg['save_folder'])[0] == 4
    before = {line['batch']: line for line in lines_of(tmp_path / 'killed.jsonl')}
    (tmp_path / 'killed.jsonl.rank0').rename(tmp_path / 'before.jsonl.rank0')
    tiny.recipe_here(cfg, tmp_path)
    after = recorder.read(tmp_path / 'killed.jsonl')
    assert list(before) == [0, 1, 2, 3, 4, 5] and list(after) == [4, 5, 6, 7]
    for key in ('rows', 'lr', 'moments', 'averages', 'random'):
        assert after[4][key] == before[4][key], f'{key} at batch 4, bit for bit'
    assert planned({**before, **after}) == planned(straight)
    apart = distance({**before, **after}, straight)
    measured(loss_apart_from_the_straight_run=f'{apart:.1e}')
    assert apart <= (0 if device == 'cpu' else NEAR['fp32'])


def lines_of(path):
    return [json.loads(line) for line in path.with_name(f'{path.name}.rank0').read_text().splitlines()]


def test_microbatches_that_do_not_fit_are_halved_with_averages_too(device, data, parent, tmp_path):
    found = {}
    for name, size, more in (('fixed', 2, {}), ('auto', 'auto' if device == 'gpu' else 8, {'out_of_memory': {}})):
        cfg = config(tmp_path, data, name, parent, device, device_train_microbatch_size=size, callbacks=more)
        found[name] = train(cfg)
        assert_averages(cfg, found[name])
    seen = found['auto'].callbacks['OutOfMemory'].seen
    assert seen['train'][:3] == [8, 4, 2] and set(seen['train'][3:]) == {2}
    # in each evaluation; in those of the averages, the model holds one meanwhile
    assert seen['eval'].count(8) == seen['eval'].count(4) > 8
    assert planned(found['auto'].lines) == planned(found['fixed'].lines)
    assert distance(found['auto'].lines, found['fixed'].lines) <= (0 if device == 'cpu' else NEAR['fp32'])
    losses = [json.loads((tmp_path / name / 'losses.json').read_text())['losses'] for name in found]
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 8
    for label, rows in losses[0].items():
        assert [row[2] for row in rows] == pytest.approx([row[2] for row in losses[1][label]], rel=NEAR['fp32']), label


def test_checkpoints_go_from_one_device_to_the_other(device, data, parent, tmp_path):
    """A parent of the CPU (in all of the above), and from here back; and a run that goes on where the other stopped."""
    there = train(config(tmp_path, data, 'there', parent, device))
    checkpoint = newest_complete(tmp_path / 'there')[1]
    assert sorted(open_checkpoint(checkpoint).ema) == ['ema_256tok', 'ema_2ba']
    with on_cpu():
        back = train(config(tmp_path, data, 'back', checkpoint, 'cpu')).lines
        shutil.copytree(tmp_path / 'there', tmp_path / 'moved', symlinks=True)
        (tmp_path / 'moved' / 'ep0-ba8-rank0.pt').unlink()
        (tmp_path / 'moved' / 'latest-rank0.pt').unlink()
        (tmp_path / 'moved' / 'latest-rank0.pt').symlink_to('ep0-ba4-rank0.pt')
        (tmp_path / 'there.jsonl.rank0').rename(tmp_path / 'here.jsonl.rank0')
        moved = config(tmp_path, data, 'there', parent, 'cpu', save_folder=str(tmp_path / 'moved'))
        went_on = train(moved)
    assert len(back) == 8 and back[0]['adam_step'] == 0, 'a stage of its own'
    assert planned(went_on.lines) == planned(there.lines)[4:]
    assert_averages(moved, went_on)


def test_lm_eval_is_that_of_the_cpu(device, data, offline, tmp_path, measured):
    base = pretrained.make('llama', tmp_path, data['tokenizer'])
    scores = []
    for place, kind in (('there', 'cpu'), ('here', 'cuda' if device == 'gpu' else 'cpu')):
        model = tmp_path / place / 'huggingface' / 'ba1'
        shutil.copytree(base, model, dirs_exist_ok=True)
        (found,) = lm_eval.evaluate_runs([model], load_suite(offline), device=kind).values()
        assert found['settings']['device'] == kind and not found['missing']
        scores.append({task: result['score'] for task, result in found['tasks'].items()})
    assert scores[0].keys() == scores[1].keys()
    measured(apart=f'{max(abs(scores[0][task] - scores[1][task]) for task in scores[0]):.1e}')
    assert scores[1] == pytest.approx(scores[0], rel=2e-3)


def test_documents_are_sampled_on_it(device, data, tmp_path):
    base = pretrained.make('llama', tmp_path, data['tokenizer'])
    model = AutoModelForCausalLM.from_pretrained(base).eval().to('cuda' if device == 'gpu' else 'cpu')
    state = torch.random.get_rng_state()
    once, again = (sample(model, [5], [3], 8, tiny.SEQ_LEN, seed=1) for _ in range(2))
    assert once == again and len(once) == 8
    assert all(0 <= token < tiny.VOCAB for document in once for token in document)
    assert torch.equal(torch.random.get_rng_state(), state)
