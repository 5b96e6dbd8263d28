# SPDX-License-Identifier: Apache-2.0
"""``ema`` and ``lawa`` in real runs of one process: right values, training undisturbed, resumed exactly."""

import json
import logging

import pytest
import tiny
import torch
from composer import ComposerModel, Trainer
from composer.core import Callback, Evaluator
from llmfoundry import registry
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from trajectories import assert_near, expected_ema, expected_lawa, weights_along

from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError
from cpt_algorithms.weight_averaging.ema import EMA
from cpt_algorithms.weight_averaging.lawa import LAWA
from cpt_algorithms.weight_averaging.local_shards import LocalShards

AVERAGES = {'ema': {'half_life': ['2ba', '192tok', '0.25dur'], 'interval': '1ba'}, 'lawa': {'k': 3, 'interval': '2ba'}}
# resolved: a batch has 128 tokens; a run has 8 batches
HALF_LIVES = {'ema_2ba': 2.0, 'ema_192tok': 1.5, 'ema_0.25dur': 2.0}
DROPOUT = {'resid_pdrop': 0.1, 'emb_pdrop': 0.1}


def eval_loaders(data, *names):
    return [tiny.eval_loader(name, data[name]) for name in names]


def config(folder, data, name, averages=AVERAGES, **over):
    base = tiny.config(folder, data, name, eval_loader=eval_loaders(data, 'old', 'new'), eval_interval='3ba')
    folder = folder / name
    callbacks = {
        'final_loss': {'window': '4ba', 'interval': '2ba', 'save_folder': str(folder)},
        'recorder': {'weights': str(folder / 'weights')},
    }
    return tiny.merge(tiny.merge(base, {'callbacks': {**callbacks, **averages}}), over)


def trajectory(cfg):
    return weights_along(cfg['callbacks']['recorder']['weights'])


def callback_state(cfg):
    path = f'{cfg["save_folder"]}/latest-rank0.pt'
    return torch.load(path, weights_only=False)['state']['callbacks']


def losses(cfg):
    return json.loads((tiny.Path(cfg['save_folder']) / 'losses.json').read_text())['losses']


@pytest.fixture(scope='module')
def averaged(tmp_path_factory, data):
    """One run with everything on, dropout included, whose checkpoints are kept."""
    folder = tmp_path_factory.mktemp('averaged')
    cfg = config(folder, data, 'averaged', model=DROPOUT, callbacks={
        'hf_checkpointer': {'save_folder': str(folder / 'averaged'), 'save_interval': '4ba', 'precision': 'float32'},
    })  # fmt: skip
    return cfg, tiny.run(cfg)


def test_averages_are_those_of_the_definition(averaged):
    cfg, _ = averaged
    weights = trajectory(cfg)
    saved = callback_state(cfg)['EMA']['averages']
    assert list(saved) == list(HALF_LIVES)
    for name, half_life in HALF_LIVES.items():
        assert saved[name].keys() == weights[0].keys(), 'named as in state.model'
        assert {tensor.dtype for tensor in saved[name].values()} == {torch.float32}
        assert_near(saved[name], expected_ema(weights, half_life))
    window = callback_state(cfg)['LAWA']['window']
    assert list(window) == ['4', '6', '8'], 'oldest first'
    for snapshot, batch in zip(window.values(), (4, 6, 8), strict=True):
        for key, tensor in snapshot.items():
            assert torch.equal(tensor, weights[batch - 1][key]), 'snapshots are exact'


def test_training_is_bit_identical_to_a_run_without_averaging(averaged, data, tmp_path):
    cfg, lines = averaged
    plain = config(tmp_path, data, 'plain', averages={}, model=DROPOUT)
    assert tiny.run(plain) == lines, 'losses in hex, rows and learning rates, with dropout'
    for ours, theirs in zip(trajectory(cfg), trajectory(plain), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for label in ('old', 'new'):
        assert losses(cfg)[label] == losses(plain)[label], 'evaluations of the raw weights neither'


def test_saved_model_is_the_training_weights(averaged):
    cfg, _ = averaged
    model = torch.load(f'{cfg["save_folder"]}/latest-rank0.pt', weights_only=False)['state']['model']
    for key, tensor in trajectory(cfg)[-1].items():
        assert torch.equal(model[key], tensor)


def model_of(cfg, weights):
    from llmfoundry.utils.builders import build_composer_model, build_tokenizer

    tokenizer = build_tokenizer(cfg['tokenizer']['name'], dict(cfg['tokenizer']['kwargs']))
    model = build_composer_model('mpt_causal_lm', {k: v for k, v in cfg['model'].items() if k != 'name'}, tokenizer)
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=False)
    return model.eval()


def loss_of(cfg, data, label, weights):
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(data[label]), split='val', batch_size=1)
    rows = torch.stack([torch.tensor(dataset[i]['tokens']).long() for i in range(len(dataset))])
    with torch.no_grad():
        logits = model_of(cfg, weights)({'input_ids': rows}).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


def test_the_averaged_loss_is_that_of_a_model_with_the_averaged_weights(averaged, data):
    cfg, _ = averaged
    weights, curves = trajectory(cfg), losses(cfg)
    expected = {
        'ema_2ba': expected_ema(weights, 2), 'ema_192tok': expected_ema(weights, 1.5),
        'lawa': expected_lawa(weights, (4, 6, 8)),
    }  # fmt: skip
    for label in ('old', 'new'):
        raw = [row[:1] for row in curves[label]]
        assert raw == [[3], [6], [8]], 'every 3 batches, and 6 and 8 in the final window'
        for name, average in expected.items():
            rows = curves[f'{label}/{name}']
            assert [row[:1] for row in rows] == raw, 'in the same evaluation pass'
            assert rows[-1][2] == pytest.approx(loss_of(cfg, data, label, average), rel=1e-5)
            assert rows[-1][2] != curves[label][-1][2]
        assert curves[label][-1][2] == pytest.approx(loss_of(cfg, data, label, weights[-1]), rel=1e-5)


def test_averages_are_exported_beside_the_model(averaged):
    cfg, _ = averaged
    folder = tiny.Path(cfg['save_folder']) / 'huggingface'
    names = ['', '-ema_2ba', '-ema_192tok', '-ema_0.25dur', '-lawa']
    assert {path.name for path in folder.iterdir()} == {f'ba{b}{n}' for b in (4, 8) for n in names}
    weights = trajectory(cfg)
    expected = [(8, '', weights[7]), (4, '', weights[3]), (8, '-ema_2ba', expected_ema(weights, 2)),
                (4, '-ema_192tok', expected_ema(weights[:4], 1.5)), (8, '-lawa', expected_lawa(weights, (4, 6, 8))),
                (4, '-lawa', expected_lawa(weights, (2, 4)))]  # fmt: skip
    for batch, name, average in expected:
        exported = load_file(folder / f'ba{batch}{name}' / 'model.safetensors')
        assert (folder / f'ba{batch}{name}' / 'tokenizer.json').exists()
        assert_near({f'model.{key}': tensor for key, tensor in exported.items()}, average)


def same_state(ours, theirs):
    assert ours['meta'] == theirs['meta']
    (group,) = ours.keys() - {'meta'}
    assert ours[group].keys() == theirs[group].keys()
    for name, tensors in ours[group].items():
        assert all(torch.equal(tensor, theirs[group][name][key]) for key, tensor in tensors.items())


def stopped(cfg, at):
    with pytest.raises(RuntimeError, match='stopped'):
        tiny.run(tiny.merge(cfg, {'save_interval': '1ba', 'callbacks': {'stop': {'at': at}}}))


@pytest.mark.parametrize(
    'at', [pytest.param(4, id='before the window is full', marks=pytest.mark.slow), pytest.param(6, id='mid-window')]
)
def test_a_resumed_run_is_the_straight_one(averaged, data, tmp_path, at):
    straight, lines = averaged
    cfg = config(tmp_path, data, 'resumed', model=DROPOUT)
    stopped(cfg, at)  # resumed at batch 3 and 5: between two snapshots
    assert tiny.run(cfg) == lines
    for name in ('EMA', 'LAWA'):
        same_state(callback_state(cfg)[name], callback_state(straight)[name])
    for label, rows in losses(straight).items():
        assert losses(cfg)[label] == rows, 'every evaluation, raw and averaged, once'


@pytest.fixture
def said():
    """What the library logs; LLM Foundry takes the handlers off the root logger."""
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger('cpt_algorithms')
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_checkpoint_without_averages_starts_them_afresh(data, tmp_path, said):
    without = {'callbacks': {'stage_start': None}}  # which would refuse it
    stopped(tiny.merge(config(tmp_path, data, 'afresh', averages={}), without), 5)
    cfg = tiny.merge(config(tmp_path, data, 'afresh'), without)
    tiny.run(cfg)
    for key in ('ema', 'lawa'):
        assert f'{key}: the checkpoint at batch 4 holds no average; it starts afresh from here' in said
    weights = trajectory(cfg)
    saved = callback_state(cfg)
    assert_near(saved['EMA']['averages']['ema_2ba'], expected_ema(weights, 2.0, begin=4))
    assert len(saved['LAWA']['window']) == 2, 'batches 6 and 8'


def test_what_the_yaml_changes_at_a_restart_is_said(data, tmp_path, said):
    without = {'callbacks': {'stage_start': None}}  # which would refuse it
    stopped(tiny.merge(config(tmp_path, data, 'changed'), without), 8)
    changed = {'ema': {'half_life': ['2ba', '5ba']}, 'lawa': {'k': 2, 'interval': '2ba', 'weights': 'linear'}}
    cfg = tiny.merge(config(tmp_path, data, 'changed', averages=changed), without)
    tiny.run(cfg)
    for words in (
        'ema: restored ema_2ba at batch 7',
        'ema: ema_192tok of the checkpoint is not asked for any more',
        'ema: the checkpoint holds no ema_5ba in ba; it starts afresh from here',
    ):
        assert words in said, said
    weights = trajectory(cfg)
    saved = callback_state(cfg)['EMA']['averages']
    for name, half_life, begin in (('ema_2ba', 2, 0), ('ema_5ba', 5, 7)):
        assert_near(saved[name], expected_ema(weights, half_life, begin))
    # of a shorter window, the newest stay
    window = callback_state(cfg)['LAWA']['window']
    assert len(window) == 2
    for snapshot, batch in zip(window.values(), (6, 8), strict=True):
        assert all(torch.equal(tensor, weights[batch - 1][key]) for key, tensor in snapshot.items())
    linear = loss_of(cfg, data, 'old', expected_lawa(weights, (6, 8), 'linear'))
    assert losses(cfg)['old/lawa'][-1][2] == pytest.approx(linear, rel=1e-5)


def test_nothing_is_averaged_before_start(data, tmp_path):
    averages = {
        'ema': {'half_life': '2ba', 'start': '4ba', 'interval': '2ba'},
        'lawa': {'k': 3, 'interval': '2ba', 'start': '0.5dur', 'offload': False},
    }
    cfg = config(tmp_path, data, 'start', averages=averages)
    tiny.run(cfg)
    weights = trajectory(cfg)
    average = callback_state(cfg)['EMA']['averages']['ema_2ba']
    # looked at after batches 6 and 8, one half-life apart
    assert_near(average, {key: (weights[5][key].double() + 2 * weights[7][key].double()) / 3 for key in average})
    assert len(callback_state(cfg)['LAWA']['window']) == 2
    assert [row[0] for row in losses(cfg)['old']] == [3, 6, 8]
    assert [row[0] for row in losses(cfg)['old/lawa']] == [6, 8], 'evaluated from when it exists'


class SwapsWholeEvaluations(Callback):
    """Stands for anybody else's averaging: other weights in the model from EVAL_START to EVAL_END."""

    def eval_start(self, state, logger):
        self.kept = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        with torch.no_grad():
            for p in state.model.parameters():
                p.mul_(0.5)

    def eval_end(self, state, logger):
        with torch.no_grad():
            for name, p in state.model.named_parameters():
                p.copy_(self.kept[name])


registry.callbacks.register('swaps', func=SwapsWholeEvaluations)


@pytest.mark.parametrize('first', [True, False])
def test_nothing_depends_on_who_else_swaps_weights(averaged, data, tmp_path, first):
    straight, lines = averaged
    cfg = config(tmp_path, data, 'swaps', model=DROPOUT)
    others = {'swaps': {}}
    cfg['callbacks'] = {**others, **cfg['callbacks']} if first else {**cfg['callbacks'], **others}
    assert tiny.run(cfg) == lines
    for label, rows in losses(straight).items():
        same = losses(cfg)[label] == rows
        assert same == ('/' in label), "the raw evaluation is the other one's, the averages are ours"


class TiedAndFrozen(ComposerModel):
    """A tied, a frozen and a bfloat16 parameter, and a buffer that training changes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
        self.head = self.embed
        self.narrow = torch.nn.Parameter(torch.randn(4, generator=generator).bfloat16())
        self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer('steps', torch.zeros(()))

    def forward(self, batch):
        if self.training:
            self.steps += 1
        return batch[0] @ self.embed @ self.head + self.narrow.float() + self.frozen + 0 * self.steps

    def loss(self, outputs, batch):
        return ((outputs - batch[1]) ** 2).mean()

    def get_metrics(self, is_train):
        return {} if is_train else {'Loss': MeanMetric()}

    def update_metric(self, batch, outputs, metric):
        assert self.steps > 0, 'the buffer is the current one'
        metric.update(self.loss(outputs, batch))


def test_tied_frozen_and_half_precision_parameters(tmp_path):
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(32, 4), torch.randn(32, 4))
    model = TiedAndFrozen()
    ema, lawa = EMA('3ba'), LAWA('2ba', k=2)
    seen = []

    class Witness(Callback):
        def batch_end(self, state, logger):
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, batch_size=4),
        eval_dataloader=Evaluator(label='val', dataloader=DataLoader(dataset, batch_size=16)),
        eval_interval='4ba',
        optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
        max_duration='8ba',
        callbacks=[Witness(), ema, lawa],
        device='cpu',
        progress_bar=False,
    )
    trainer.fit()
    assert list(ema.shards.parameters) == ['embed', 'narrow'], 'tied once, frozen not at all'
    saved = trainer.state.state_dict()['callbacks']
    for (key, average), snapshot in zip(
        saved['EMA']['averages']['ema_3ba'].items(), saved['LAWA']['window']['8'].values(), strict=True
    ):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected_ema(seen, 3)[key], rtol=1e-6, atol=1e-8)
        assert snapshot.dtype == seen[-1][key].dtype, 'kept as it is'
        assert torch.equal(snapshot, seen[-1][key])
    metrics = {label: float(m['Loss'].compute()) for label, m in trainer.state.eval_metrics.items()}
    assert set(metrics) == {'val', 'val/ema_3ba', 'val/lawa'}
    for name, average in (('ema_3ba', expected_ema(seen, 3)), ('lawa', expected_lawa(seen, (6, 8)))):
        # the parameters as the model can hold them: bfloat16 stays bfloat16
        held = {key: value.to(seen[-1][key].dtype).double() for key, value in average.items()}
        outputs = dataset.tensors[0].double() @ held['embed'] @ held['embed'] + held['narrow'] + 1
        assert metrics[f'val/{name}'] == pytest.approx(float(((outputs - dataset.tensors[1]) ** 2).mean()), rel=1e-5)
    # memory that runs out in the middle leaves the training weights, and the next try has the average
    mean = lawa.average
    lawa.average = lambda name: (_ for _ in ()).throw(RuntimeError('CUDA out of memory'))
    with pytest.raises(RuntimeError, match='out of memory'), lawa.swapped_in('lawa'):
        raise AssertionError('not reached')
    lawa.eval_before_forward(trainer.state, trainer.logger)  # no evaluation of ours is under way
    lawa.average = mean
    assert torch.equal(model.embed.data, seen[-1]['embed'])
    with lawa.swapped_in('lawa'):
        assert torch.equal(model.embed.data, mean('lawa')[0])
    assert 'LAWA' in trainer.state.state_dict()['callbacks']
    before = dict(metrics)
    trainer.eval()
    assert {label: float(m['Loss'].compute()) for label, m in trainer.state.eval_metrics.items()} == before
    with ema.swapped_in('ema_3ba'):
        assert model.head is model.embed
        assert torch.equal(model.embed.data, ema.average('ema_3ba')[0])
    assert torch.equal(model.embed.data, seen[-1]['embed'])


@pytest.mark.parametrize(
    ('averages', 'words'),
    [
        ({'ema': {}}, 'callbacks.ema.half_life is missing'),
        ({'ema': {'half_life': '2ep'}}, "callbacks.ema.half_life='2ep'"),
        ({'ema': {'halflife': '2ba'}}, "callbacks.ema.halflife .*'half_life'"),
        ({'lawa': {'k': 3}}, 'callbacks.lawa.interval is missing'),
        ({'lawa': {'interval': '2ba', 'k': 2.5}}, 'callbacks.lawa.k=2.5'),
        ({'lawa': {'interval': '9ba'}}, 'callbacks.lawa: .*interval=9ba .* batch 9, .* batch 8'),
        ({'lawa': {'interval': '3ba', 'start': '6ba'}}, 'callbacks.lawa: .*start=6ba.* batch 9, .* batch 8'),
        ({'ema': {'half_life': '2ba', 'start': '8ba'}}, 'callbacks.ema: .*start=8ba.* batch 9, .* batch 8'),
        (
            {'ema': {'half_life': '2ba', 'interval': '1025tok'}},
            'callbacks.ema: .*interval=1025tok .* batch 9, .* batch 8',
        ),
        ({'branch_points': {'at': [4, 9]}}, r'branch_points.at=\[4, 9\], .* batch 8'),
        (
            {'final_loss': {'window': '4ba', 'interval': '2ba', 'metric': 'LanguageLoss'}},
            'final_loss.metric=.*did you mean',
        ),
    ],
)
def test_bad_settings_are_refused_before_training(data, tmp_path, averages, words):
    """What the callbacks themselves refuse: test_averages_by_hand."""
    with pytest.raises(ConfigError, match=words) as refused:
        preflight(Stage.from_yaml(config(tmp_path, data, 'bad', averages=averages)))
    assert len(refused.value.problems) == 1


def test_epochs_are_as_long_as_the_data(data, tmp_path):
    cfg = config(tmp_path, data, 'epochs', averages={'lawa': {'interval': '100ba'}}, max_duration='2ep')
    cfg['scheduler'] = {'name': 'rewarm_cosine', 't_warmup': '0.1dur'}
    cfg['train_loader']['dataset']['max_passes'] = 2
    preflight(Stage.from_yaml(cfg))  # 50 batches each
    cfg['callbacks']['lawa']['interval'] = '101ba'
    with pytest.raises(ConfigError, match='callbacks.lawa: .* batch 101, .* batch 100'):
        preflight(Stage.from_yaml(cfg))


def test_fsdp1_is_refused_before_training(data, tmp_path, monkeypatch):
    cfg = Stage.from_yaml(config(tmp_path, data, 'fsdp1', fsdp_config={'state_dict_type': 'sharded'}))
    monkeypatch.setenv('FSDP_VERSION', '2')
    preflight(cfg, world_size=2)
    monkeypatch.delenv('FSDP_VERSION')  # Composer's default is 1
    preflight(cfg, world_size=1)  # no FSDP
    with pytest.raises(ConfigError, match='callbacks.ema works on plain, DDP and FSDP2 models.*set FSDP_VERSION=2'):
        preflight(cfg, world_size=2)
    # and by the callbacks themselves: torch makes FSDP1 modules on a GPU only, so this one is not initialised
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match='wrapped in FSDP1: set FSDP_VERSION=2'):
        LocalShards(wrapped)
