# SPDX-License-Identifier: Apache-2.0
"""``ema`` and ``lawa`` event by event, on a model of one number that is 1 after the first batch, 2 after the second, ..."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Evaluator, State, Time, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger, LoggerDestination, WandBLogger
from composer.utils import checkpoint
from hypothesis import given
from hypothesis import strategies as st
from llmfoundry.callbacks import HuggingFaceCheckpointer
from tiny import Number
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils.data import DataLoader

from cpt_algorithms.checkpoints.links import LinkingWriter
from cpt_algorithms.duration import Duration
from cpt_algorithms.weight_averaging.averaged_weights import resolve_time, total_of
from cpt_algorithms.weight_averaging.ema import EMA
from cpt_algorithms.weight_averaging.lawa import LAWA


class Run:
    """What Composer's trainer does with a callback."""

    def __init__(self, callback, max_duration='8ba', loaded=None, at=0, before=0):
        self.callback, self.before = callback, before  # batches of the trunk of a branch
        self.state = State(
            model=Number(0.0), rank_zero_seed=0, run_name='run', device=DeviceCPU(), max_duration=max_duration,
            callbacks=[callback],
        )  # fmt: skip
        self.logger = Logger(self.state)
        self.train(at, quietly=True)
        callback.init(self.state, self.logger)
        callback.before_load(self.state, self.logger)
        if loaded is not None:
            callback.load_state_dict(loaded)
        callback.after_load(self.state, self.logger)

    def train(self, batches, quietly=False):
        for _ in range(batches):
            self.state.previous_timestamp = self.state.timestamp
            self.state.timestamp = self.state.timestamp.to_next_batch(samples=4, tokens=32)
            with torch.no_grad():
                self.state.model.weight.fill_(float(self.before + self.state.timestamp.batch.value))
            if not quietly:
                self.callback.batch_end(self.state, self.logger)
        return self

    def averages(self):
        found = {name: self.callback.average(name)[0].item() for name in self.callback.names()}
        self.callback.release()
        return found

    def saved(self):
        return self.callback.state_dict()


def test_ema_counts_halves():
    # a half-life of a batch: 1, (1/2 + 2) / (3/2), (1/4 + 2/2 + 3) / (7/4)
    run = Run(EMA('1ba'))
    assert run.averages() == {}
    found = [run.train(1).averages()['ema_1ba'] for _ in range(3)]
    assert found == pytest.approx([1, 5 / 3, 17 / 7], rel=1e-6)


def test_half_lives_in_other_units_are_as_long():
    run = Run(EMA(['32tok', '4sp', '0.125dur']), max_duration='8ba').train(3)
    assert run.averages() == {
        name: pytest.approx(17 / 7, rel=1e-6) for name in ('ema_32tok', 'ema_4sp', 'ema_0.125dur')
    }


def test_ema_looks_every_interval_from_its_start_on():
    # at batches 4 and 6, two batches apart; a half-life of two
    run = Run(EMA('2ba', start='3ba', interval='2ba'))
    assert run.train(3).averages() == {}
    assert run.train(1).averages() == {'ema_2ba': 4.0}
    # began at batch 3: weights 1/2 of the 2 batches until 6, over 1 - 2^(-3/2) of the 3 since
    weight = (1 / 2) / (1 - 2**-1.5)
    assert run.train(2).averages() == {'ema_2ba': pytest.approx(4 + weight * 2, rel=1e-6)}


def test_lawa_keeps_the_latest():
    run = Run(LAWA('2ba', k=2))
    assert run.train(1).averages() == {}
    assert [run.train(1).averages().get('lawa') for _ in range(6)] == [2.0, 2.0, 3.0, 3.0, 5.0, 5.0]
    assert list(run.saved()['window']) == ['4', '6'], 'by batch, oldest first'
    assert Run(LAWA('1ba', k=2, weights='linear')).train(2).averages() == {'lawa': pytest.approx(5 / 3)}


MADE = {
    'ema': lambda: EMA(['1ba', '96tok']),
    'lawa': lambda: LAWA('1ba', k=3),
    'lawa beside the parameters': lambda: LAWA('1ba', k=3, offload=False),
}


@pytest.mark.parametrize('name', MADE)
@pytest.mark.parametrize('at', [1, 2, 5])
def test_a_resumed_run_has_the_same_averages(name, at):
    straight = Run(MADE[name]()).train(8)
    saved = Run(MADE[name]()).train(at).saved()
    saved = {**saved, 'meta': json.loads(json.dumps(saved['meta']))}
    resumed = Run(MADE[name](), loaded=saved, at=at)
    before = Run(MADE[name]()).train(at)
    assert resumed.averages() == before.averages()
    assert resumed.train(8 - at).averages() == straight.averages()
    if name == 'ema':
        # in its own memory: what was loaded is not written to
        assert all(value.item() <= at for group in saved['averages'].values() for value in group.values())


def test_what_starts_afresh_is_said(caplog):
    saved = Run(EMA(['1ba', '2ba'])).train(2).saved()
    with caplog.at_level(logging.INFO):
        run = Run(EMA(['2ba', '3ba']), loaded=saved, at=2)
    assert list(run.averages()) == ['ema_2ba']
    assert [record.getMessage() for record in caplog.records if record.name.startswith('cpt_algorithms')] == [
        'ema: ema_1ba of the checkpoint is not asked for any more',
        'ema: the checkpoint holds no ema_3ba in ba; it starts afresh from here',
        'ema: restored ema_2ba at batch 2',
    ]
    # (2 + 2 3) / 3 = 8 / 3 would be of an average that began at the resumed batch
    assert run.train(1).averages()['ema_3ba'] == 3.0


def test_a_share_of_another_run_is_another_half_life(caplog):
    saved = Run(EMA('0.5dur'), max_duration='8ba').train(2).saved()
    run = Run(EMA('0.5dur'), max_duration='256tok', loaded=saved, at=2)
    assert run.averages() == {}
    assert 'the checkpoint holds no ema_0.5dur in tok; it starts afresh from here' in caplog.text


def test_a_window_of_another_interval_starts_afresh(caplog):
    saved = Run(LAWA('1ba', k=3)).train(4).saved()
    assert Run(LAWA('2ba', k=3), loaded=saved, at=4).averages() == {}
    assert 'lawa: the window was taken every 1ba, now every 2ba; it starts afresh from here' in caplog.text
    assert Run(LAWA('1ba', k=2), loaded=saved, at=4).averages() == {'lawa': 3.5}, 'the newest stay'
    longer = Run(LAWA('1ba', k=4), loaded=saved, at=4)
    assert longer.train(1).averages() == {'lawa': 3.5}


def test_a_checkpoint_without_averages_is_said(caplog):
    Run(EMA('1ba'), at=3)
    assert 'ema: the checkpoint at batch 3 holds no average; it starts afresh from here' in caplog.text


@pytest.mark.parametrize('name', MADE)
def test_a_damaged_average_is_refused(name):
    saved = Run(MADE[name]()).train(1).saved()
    group = saved[MADE[name]().state_key]
    first = next(iter(group))
    group[first] = {key: tensor + 1 for key, tensor in group[first].items()}
    with pytest.raises(
        RuntimeError,
        match=rf'{name.split()[0]} \({first}\) was saved with the sum of squares 1\.0 and loaded with 4\.0',
    ):
        Run(MADE[name](), loaded=saved, at=1)


def test_averages_that_are_lost_are_refused():
    saved = Run(EMA('1ba')).train(2).saved()
    del saved['averages']
    with pytest.raises(ValueError, match=r'ema \(ema_1ba\) was saved for other trainable parameters .*: weight is not'):
        Run(EMA('1ba'), loaded=saved, at=2)
    saved = Run(LAWA('1ba')).train(2).saved()
    del saved['window']['1']
    with pytest.raises(ValueError, match=r'lawa \(1\) was saved for other trainable parameters'):
        Run(LAWA('1ba'), loaded=saved, at=2)
    saved['window']['1'] = {'weight': torch.ones(2)}
    with pytest.raises(ValueError, match=r'^lawa \(1\): weight is \(2,\) there and \(1,\) here$'):
        Run(LAWA('1ba'), loaded=saved, at=2)


def test_averages_of_a_diverged_model_go_on():
    run = Run(EMA('1ba'))
    run.train(1)
    run.callback.average('ema_1ba')[0].fill_(float('nan'))
    assert Run(EMA('1ba'), loaded=run.saved(), at=1).callback.average('ema_1ba')[0].isnan().all()


@pytest.mark.parametrize('name', MADE)
def test_the_model_holds_the_average_only_inside(name):
    run = Run(MADE[name]()).train(3)
    label, expected = next(iter(run.averages().items()))
    with run.callback.swapped_in(label):
        assert run.state.model.weight.item() == pytest.approx(expected)
        with pytest.raises(AssertionError, match='the model holds an average'):
            run.saved()
    assert run.state.model.weight.item() == 3.0
    with pytest.raises(KeyboardInterrupt), run.callback.swapped_in(label):
        raise KeyboardInterrupt
    assert run.state.model.weight.item() == 3.0


def test_the_sum_of_squares_may_differ_by_rounding():
    def load(value, difference):
        run = Run(EMA('1ba')).train(1)
        run.callback.average('ema_1ba')[0].fill_(value)
        saved = run.saved()
        settings = json.loads(saved['meta'])
        settings['square_sum']['ema_1ba'] *= 1 + difference
        return Run(EMA('1ba'), loaded={**saved, 'meta': json.dumps(settings)}, at=1)

    for value, rounding in ((4.0, 5e-10), (0.25, -5e-10), (0.0, 0.0)):
        assert load(value, rounding).averages() == {'ema_1ba': value}
    for value, too_much in ((4.0, 2e-9), (0.25, -2e-9)):
        with pytest.raises(RuntimeError, match='or the checkpoint is damaged'):
            load(value, too_much)


def test_the_sum_of_a_snapshot_is_taken_once_and_that_of_an_ema_each_time():
    def sums(run):
        return json.loads(run.saved()['meta'])['square_sum']

    def spoil(run):
        run.callback.average(run.callback.names()[0])[0].fill_(9.0)

    ema, lawa = Run(EMA('1ba')).train(2), Run(LAWA('1ba', k=2)).train(2)
    assert sums(lawa) == {'1': 1.0, '2': 4.0}
    for snapshot in lawa.callback._window.values():
        snapshot[0].fill_(9.0)  # a fault of the memory, which a loaded checkpoint will not agree with
    assert sums(lawa.train(1)) == {'2': 4.0, '3': 9.0}
    first = sums(ema)['ema_1ba']
    spoil(ema)
    assert sums(ema) == {'ema_1ba': 81.0} != {'ema_1ba': first}


class Uploads(LoggerDestination):
    def can_upload_files(self):
        return True


@pytest.mark.parametrize(
    ('loggers', 'linked'),
    [
        (lambda: (), True),
        (lambda: (WandBLogger(log_artifacts=False),), True),
        (lambda: (WandBLogger(log_artifacts=True),), False),
        (lambda: (Uploads(),), False),
    ],
)
def test_checkpoints_that_a_logger_uploads_have_no_further_files(loggers, linked, tmp_path):
    run, saver, seen = Run(LAWA('1ba')), CheckpointSaver(str(tmp_path)), []

    def save(*arguments, **words):
        seen.append((arguments, words, checkpoint.dist_cp.FileSystemWriter(str(tmp_path / 'ep0-ba1'))))

    saver._save_checkpoint = save
    run.state.callbacks.append(saver)
    run.logger.destinations = loggers()
    run.callback.fit_start(run.state, run.logger)
    saver._save_checkpoint(run.state, logger=run.logger)
    ((arguments, words, writer),) = seen
    assert (arguments, words) == ((run.state,), {'logger': run.logger})
    assert isinstance(writer, LinkingWriter) == linked
    if linked:
        assert writer.written is run.callback._written
        keys = ('state.callbacks.LAWA.window.12.model.a.weight', 'state.model.a.weight', 'state.callbacks.LAWA.meta')
        assert [writer.name_of(key) for key in keys] == ['ba12', None, None]


def test_a_window_is_taken_back_in_the_order_of_its_batches():
    saved = Run(LAWA('1ba', k=2)).train(10).saved()
    saved['window'] = dict(reversed(saved['window'].items()))
    assert list(saved['window']) == ['10', '9']
    assert Run(LAWA('1ba', k=2), loaded=saved, at=10).train(1).averages() == {'lawa': 10.5}


def test_a_trainer_whose_time_is_set_back_has_the_later_snapshot_last():
    run = Run(LAWA('1ba', k=3)).train(2)
    run.saved()
    run.callback._written.update(ba1='written before', ba2='and this')
    run.state.timestamp = Timestamp()
    run.before = 4
    saved = run.train(1).saved()
    assert list(saved['window']) == ['2', '1'] and json.loads(saved['meta'])['square_sum'] == {'2': 4.0, '1': 25.0}
    assert run.callback._written == {'ba2': 'and this'}


def test_averages_are_in_float32_whatever_the_weights_are():
    run = Run(EMA('1ba'))
    run.state.model.bfloat16()
    run.callback.before_load(run.state, run.logger)
    assert run.train(1).callback.average('ema_1ba')[0].dtype == torch.float32
    saved = run.saved()
    saved['averages']['ema_1ba'] = {key: tensor.bfloat16() for key, tensor in saved['averages']['ema_1ba'].items()}
    assert Run(EMA('1ba'), loaded=saved, at=1).callback.average('ema_1ba')[0].dtype == torch.float32


def test_one_average_starts_afresh_and_the_next_goes_on(caplog):
    saved = Run(EMA(['1ba', '2ba'])).train(2).saved()
    with caplog.at_level(logging.INFO):
        run = Run(EMA(['3ba', '1ba', '2ba']), loaded=saved, at=2)
    assert list(run.averages()) == ['ema_1ba', 'ema_2ba']
    assert 'ema: restored ema_1ba, ema_2ba at batch 2' in caplog.text


TIMES = st.one_of(
    st.integers(1, 20).map('{}ba'.format),
    st.integers(1, 600).map('{}tok'.format),
    st.integers(1, 80).map('{}sp'.format),
    st.sampled_from(['0.01dur', '0.25dur', '0.6dur', '1dur', '1.5dur']),
)


@given(st.one_of(TIMES, st.just('0ba')), TIMES, st.sampled_from(['8ba', '256tok', '33sp', '250tok']))
def test_the_first_average_is_foreseen(start, interval, length):
    run = Run(LAWA(interval, start=start), max_duration=length)
    total = Duration.parse('max_duration', length)
    foreseen, batches = run.callback.first_update(total, 4, 8), total.batches(4, 8)
    found = next((batch for batch in range(1, 31) if run.train(1).averages()), None)
    assert found == (foreseen if foreseen <= 30 else None)
    assert batches == 8 or length == '33sp'


@given(
    st.sampled_from(['ema', 'lawa']), st.one_of(TIMES, st.just('0ba')), TIMES, TIMES,
    st.integers(1, 7), st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_an_average_goes_on_in_a_branch_as_in_its_trunk(
    tmp_path_factory, kind, start, interval, half_life, at, killed_after, further
):
    """Also in one that is killed, and in a branch of a branch."""

    def make(checkpoint=None):
        if kind == 'ema':
            return EMA(half_life, start=start, interval=interval, resume_after=checkpoint)
        return LAWA(interval, k=3, start=start, resume_after=checkpoint)

    def branch_of(trunk, length):
        path = tmp_path_factory.mktemp('trunk') / 'latest-rank0.pt'
        torch.save({'state': {'callbacks': {type(trunk.callback).__qualname__: trunk.saved()}}}, path)
        before = trunk.before + int(trunk.state.timestamp.batch.value)
        # how long the branch is says nothing of its averages
        branch = Run(make(str(path)), max_duration=length, before=before)
        if killed_after:
            saved = branch.train(killed_after).saved()
            branch = Run(make(str(path)), max_duration=length, loaded=saved, at=killed_after, before=before)
        return branch

    straight, branch = Run(make()).train(at), branch_of(Run(make()).train(at), '5ba')
    straight.train(killed_after)
    if further:
        branch = branch_of(branch, '7ba')
        straight.train(killed_after)
    for _ in range(3):
        assert branch.averages() == straight.averages()
        branch.train(1)
        straight.train(1)


@pytest.mark.parametrize('kind', ['ema', 'lawa'])
def test_a_branch_goes_on_with_the_averages_of_a_sharded_trunk(kind, tmp_path):
    def make(checkpoint=None):
        return (
            EMA(['1ba', '96tok'], resume_after=checkpoint) if kind == 'ema' else LAWA('2ba', 2, resume_after=checkpoint)
        )

    trunk = Run(make()).train(4)
    ours = type(trunk.callback).__qualname__
    save({'state': {'callbacks': {ours: trunk.saved()}}}, checkpoint_id=tmp_path / 'ep0-ba4', no_dist=True)
    branch = Run(make(str(tmp_path / 'ep0-ba4')), before=4)
    for _ in range(3):
        assert branch.averages() == trunk.averages()
        branch.train(1)
        trunk.train(1)


@pytest.mark.parametrize('kind', ['whole', 'whole, older', 'sharded'])
def test_a_trunk_without_an_average_is_said(kind, tmp_path, caplog):
    path = tmp_path / ('ep0-ba4' if kind == 'sharded' else 'ep0-ba4-rank0.pt')
    if kind == 'sharded':
        save({'state': {'model': {'weight': torch.ones(1)}}}, checkpoint_id=path, no_dist=True)
    else:
        torch.save({'state': {} if kind == 'whole, older' else {'callbacks': {}}}, path)
    run = Run(LAWA('1ba', resume_after=str(path)), before=4)
    assert f'lawa: the checkpoint {path} holds no average' in caplog.text
    assert run.train(1).averages() == {'lawa': 5.0}


@pytest.mark.parametrize('length', [None, '2ep'])
def test_how_long_a_run_is_may_not_be_known_when_it_is_saved(length):
    saved = Run(EMA('1ba'), max_duration=length).saved()
    assert json.loads(saved['meta'])['of'] == '0ba'


def test_averages_in_object_storage_are_not_taken(caplog):
    Run(EMA('1ba', resume_after='s3://bucket/trunk/ep0-ba4-rank0.pt'))
    assert 'ema: s3://bucket/trunk/ep0-ba4-rank0.pt is in object storage' in caplog.text


def test_an_average_that_never_began_is_said(caplog):
    for callback, said in ((LAWA('9ba'), 'lawa'), (EMA('1ba', start='8ba'), 'ema'), (EMA('1ba'), None)):
        caplog.clear()
        run = Run(callback).train(8)
        run.callback.fit_end(run.state, run.logger)
        assert (f'{said}: nothing was averaged' in caplog.text) == bool(said)


def test_shares_of_the_run_are_whole_in_its_unit():
    eight = Time.from_batch(8)
    for share, state, value in (
        ('0.25dur', {'max_duration': eight}, 2),
        ('0.01dur', {'max_duration': eight}, 1),
        ('0dur', {'max_duration': eight}, 0),
        ('0.25dur', {'max_duration': Time.from_epoch(2), 'dataloader_len': Time.from_batch(10)}, 5),
    ):
        assert resolve_time(Duration.parse('share', share), total_of(SimpleNamespace(**state))) == Duration(value, 'ba')
    assert EMA('1ba', start='0dur').start.value == 0
    run = Run(EMA('2ba', start='0.375dur', interval='0.25dur'))
    assert [bool(run.train(1).averages()) for _ in range(5)] == [False, False, False, True, True]
    assert run.averages() == {'ema_2ba': 4.0}


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: EMA('soon'), "callbacks.ema.half_life='soon'"),
        (lambda: EMA('2ep'), "callbacks.ema.half_life='2ep' .* ba, tok, sp or dur"),
        (lambda: EMA('0ba'), "callbacks.ema.half_life='0ba'"),
        (lambda: EMA('0dur'), "callbacks.ema.half_life='0dur'"),
        (lambda: EMA('1ba', start='-1ba'), "callbacks.ema.start='-1ba'"),
        (lambda: EMA('1ba', start=None), 'callbacks.ema.start=None'),
        (lambda: EMA('1ba', interval='0ba'), "callbacks.ema.interval='0ba'"),
        (lambda: LAWA('0ba'), "callbacks.lawa.interval='0ba'"),
        (lambda: EMA([]), r'callbacks.ema.half_life=\[\]'),
        (lambda: EMA(['1ba', '1ba']), r"callbacks.ema.half_life=\['1ba', '1ba'\]"),
        (lambda: LAWA('1ba', k=0), 'callbacks.lawa.k=0 .* at least 1$'),
        (lambda: LAWA('1ba', k='2'), "callbacks.lawa.k='2' .* at least 1$"),
        (lambda: LAWA('1ba', weights='x'), "callbacks.lawa.weights='x' .*'uniform' or 'linear'$"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        make()


def test_a_window_is_made_once():
    lawa = LAWA('1ba')
    assert (lawa.k, lawa.weights, lawa.offload, lawa.device()) == (5, 'uniform', True, torch.device('cpu'))
    assert LAWA('1ba', offload=False).device() is None
    assert Run(LAWA('1ba', k=1)).train(2).averages() == {'lawa': 2.0}
    run = Run(LAWA('1ba', k=2)).train(2)
    places = [snapshot[0].data_ptr() for snapshot in run.callback._window.values()]
    assert [snapshot[0].data_ptr() for snapshot in run.train(1).callback._window.values()] == places[::-1]
    assert json.loads(run.saved()['meta'])['weights'] == 'uniform', 'for those who average the checkpoint afterwards'


def test_every_evaluator_has_one_twin_of_each_average():
    run = Run(EMA(['1ba', '2ba']))
    run.state.evaluators = [Evaluator(label=label, dataloader=DataLoader([1])) for label in ('old', 'new')]
    run.state.eval_metrics = {'old': {'m': [1]}, 'new': {'m': [2]}}
    run.train(2)
    labels = [f'{base}{average}' for average in ('', '/ema_1ba', '/ema_2ba') for base in ('old', 'new')]
    assert [evaluator.label for evaluator in run.state.evaluators] == labels
    assert [evaluator.average_name for evaluator in run.state.evaluators[2:]] == ['ema_1ba'] * 2 + ['ema_2ba'] * 2
    assert run.state.eval_metrics.keys() == set(labels)
    twins = run.state.eval_metrics['new/ema_1ba']
    assert twins == {'m': [2]}
    assert twins['m'] is not run.state.eval_metrics['new']['m']


def test_exporters_export_averages_too(monkeypatch):
    callback, exporter = EMA('1ba'), HuggingFaceCheckpointer.__new__(HuggingFaceCheckpointer)
    hooked = []
    monkeypatch.setattr(callback, '_export_with', hooked.append)
    run = Run(callback)
    run.state.callbacks = [callback, exporter]
    callback.after_load(run.state, run.logger)
    assert hooked == [exporter]
