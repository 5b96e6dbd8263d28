# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and results in a bucket: the same run as in a folder, resumed from whatever a kill leaves, parents, data."""

import json
import multiprocessing
import re
import secrets
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import average_checkpoints
import boto3
import composer.callbacks.checkpoint_saver as checkpoint_saver
import pytest
import recorder
import tiny
import torch
from composer.core import Callback
from composer.utils import S3ObjectStore
from llmfoundry import registry
from torch.distributed import checkpoint as dcp

from cpt_algorithms import files
from cpt_algorithms.checkpoints.exports import parent_of
from cpt_algorithms.checkpoints.save_folder import newest_complete, resolve_latest
from cpt_algorithms.report.run_records import read_runs
from cpt_algorithms.sequence.check import check
from cpt_algorithms.sequence.run import write_yaml
from cpt_algorithms.stage import run as stage_run
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage

RUN = 's3://bucket/runs/run'


def quick_uploads(monkeypatch):
    """Upload workers that do not import everything again, and look every 0.1 s whether an upload is done."""
    monkeypatch.setattr(boto3, 'Session', cache(boto3.Session))
    get_context = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, 'get_context', lambda method=None: get_context(method and 'fork'))
    init = checkpoint_saver.CheckpointSaver.__init__

    def impatient(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._symlink_upload_wait_before_next_try_in_seconds = 0.1

    monkeypatch.setattr(checkpoint_saver.CheckpointSaver, '__init__', impatient)


def settings(folder, data, name='run', **over):
    """A stage of 8 batches with a checkpoint at 4, an average, and losses on both datasets."""
    base = {
        'save_interval': '4ba',
        'eval_loader': [tiny.eval_loader(label, data[label]) for label in ('old', 'new')],
        'callbacks': {'ema': {'half_life': '2ba'}, 'final_loss': {'window': '4ba', 'interval': '4ba'}},
        'save_folder': f's3://bucket/runs/{name}',
    }
    return tiny.config(folder, data, name, **tiny.merge(base, over))


def objects(client):
    """All objects by name."""
    return {
        one.key: one.get()['Body'].read()
        for one in boto3.resource('s3', endpoint_url=client.meta.endpoint_url).Bucket('bucket').objects.all()
    }


def put(client, wanted):
    for name, content in wanted.items():
        client.put_object(Bucket='bucket', Key=name, Body=content)


def nearby(factory, folder):
    """A short name of a folder for temporary files: sockets are made in it, whose names have 107 characters at most."""
    folder.mkdir()
    link = factory.getbasetemp() / secrets.token_hex(3)
    link.symlink_to(folder)
    return str(link)


@pytest.fixture(scope='module')
def original(data, tmp_path_factory, s3_server):
    """The run in a folder, and all objects of the same run in a slow bucket; what was there when it said it was done."""
    folder = tmp_path_factory.mktemp('original')
    with pytest.MonkeyPatch.context() as patch:
        quick_uploads(patch)
        for key in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
            patch.setenv(key, 'x')
        patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
        patch.setenv('S3_ENDPOINT_URL', s3_server)
        patch.setattr(tempfile, 'tempdir', nearby(tmp_path_factory, folder / 'temporary'))
        patch.chdir(folder)
        client = boto3.client('s3', endpoint_url=s3_server)
        client.create_bucket(Bucket='bucket')
        upload, write = S3ObjectStore.upload_object, stage_run.write_json

        def upload_slowly(self, object_name, filename, *args, **kwargs):
            time.sleep(1.5 * object_name.endswith(('model.safetensors', 'ba8-rank0.pt')))
            upload(self, object_name, filename, *args, **kwargs)

        def write_and_look(place, value):
            if str(place) == f'{RUN}/done.json':
                found.update(objects(client))
            write(place, value)

        patch.setattr(S3ObjectStore, 'upload_object', upload_slowly)
        patch.setattr(stage_run, 'write_json', write_and_look)
        found = {}
        tiny.recipe_here(settings(folder, data), folder)
        left_here = {path.name for path in folder.iterdir()}
        everything = objects(client)
        (folder / 'run.jsonl.rank0').rename(folder / 'remote.jsonl.rank0')
        tiny.recipe_here(settings(folder, data, save_folder=str(folder / 'run')), folder)
        store = boto3.resource('s3', endpoint_url=s3_server).Bucket('bucket')
        store.objects.all().delete()
        store.delete()
    return folder, everything, set(found), left_here


@pytest.fixture
def finished(original, bucket, tmp_path, tmp_path_factory, monkeypatch):
    """The bucket as the run left it, and what it recorded."""
    folder, everything, _, _ = original
    put(bucket, everything)
    quick_uploads(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, 'tempdir', nearby(tmp_path_factory, tmp_path / 'temporary'))
    shutil.copy(folder / 'remote.jsonl.rank0', tmp_path / 'run.jsonl.rank0')
    return bucket


def named(everything, name):
    return json.loads(everything[f'runs/run/{name}.json'])


def exports(everything):
    return {name: value for name, value in everything.items() if name.endswith('model.safetensors')}


def test_the_same_run_as_in_a_folder(original):
    folder, everything, _, _ = original
    assert recorder.read(folder / 'remote.jsonl') == recorder.read(folder / 'run.jsonl')
    assert sorted(exports(everything)) == [
        f'runs/run/huggingface/ba8{average}/model.safetensors' for average in ('-ema_2ba', '')
    ]
    for name, weights in exports(everything).items():
        assert (folder / name.removeprefix('runs/')).read_bytes() == weights, 'averages too'
        card = name.replace('model.safetensors', 'README.md')
        assert everything[card] == (folder / card.removeprefix('runs/')).read_bytes()
    here = {name: json.loads((folder / 'run' / f'{name}.json').read_text()) for name in ('losses', 'done', 'stage')}
    assert named(everything, 'done') == here['done']
    for key in ('losses', 'final', 'learning_rate'):
        assert named(everything, 'losses')[key] == here['losses'][key]
    assert named(everything, 'stage').keys() == here['stage'].keys()
    assert named(everything, 'stage')['config']['train_loader'] == here['stage']['config']['train_loader']


def test_done_is_said_when_everything_is_in_the_bucket_and_nothing_is_kept_here(original):
    folder, everything, when_done, left_here = original
    assert {name for name in everything if not name.endswith('done.json')} == when_done
    assert left_here == {'run.yaml', 'run.jsonl.rank0', 'temporary'}
    assert not list((folder / 'temporary').rglob('*.pt'))


def test_a_finished_run_is_left_alone(finished, original, data, tmp_path, capsys):
    tiny.recipe_here(settings(tmp_path, data), tmp_path)
    assert 'finished already, at batch 8' in capsys.readouterr().out
    assert objects(finished) == original[1]


@pytest.mark.parametrize(
    'case',
    [
        'between a checkpoint and its link',
        'while uploading a checkpoint',
        pytest.param('before the first checkpoint', marks=pytest.mark.slow),
        pytest.param('during the export', marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_killed(case, finished, original, data, tmp_path, monkeypatch):
    everything = original[1]
    gone = ['done.json', 'huggingface/']
    if case == 'during the export':
        gone = ['done.json', 'huggingface/ba8/model', 'huggingface/ba8-ema_2ba']
    elif case == 'between a checkpoint and its link':
        finished.put_object(Bucket='bucket', Key='runs/run/latest-rank0.pt.symlink', Body=b'runs/run/ep0-ba4-rank0.pt')
    elif case == 'while uploading a checkpoint':  # the first link was not written yet either
        gone += ['ep0-ba8', 'latest']
        # what an earlier resume of Composer's own leaves in the working folder
        stale = tmp_path / 's3:' / 'bucket' / 'runs' / 'run' / 'latest-rank0.pt'
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b'not to be read')
        # an upload that outlives its process for a while
        tracked = stage_run._tracked

        def late(*args):
            finished.put_object(Bucket='bucket', Key='runs/run/ep0-ba8-rank0.pt', Body=b'to be written over')
            return tracked(*args)

        monkeypatch.setattr(stage_run, '_tracked', late)
    else:
        gone += ['ep0', 'latest', 'losses.json']
    for name in everything:
        if name.startswith(tuple(f'runs/run/{each}' for each in gone)):
            finished.delete_object(Bucket='bucket', Key=name)
    tiny.recipe_here(settings(tmp_path, data), tmp_path)
    assert sorted(recorder.read(tmp_path / 'run.jsonl')) == list(range(8)), 'it would refuse another batch'
    trained = len((tmp_path / 'run.jsonl.rank0').read_text().splitlines()) - 8
    assert trained == {'while uploading a checkpoint': 4, 'before the first checkpoint': 8}.get(case, 0)
    now = objects(finished)
    assert now.keys() == everything.keys()
    assert exports(now) == exports(everything)
    assert named(now, 'losses')['losses'] == named(everything, 'losses')['losses']
    assert named(now, 'done')['batch'] == 8
    assert now['runs/run/latest-rank0.pt.symlink'] == b'runs/run/ep0-ba8-rank0.pt'
    assert named(now, 'stage')['wandb_id'] == named(everything, 'stage')['wandb_id'] or trained == 8


class Intruder(Callback):
    """Another process that starts into the same folder after some batches."""

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 2:
            files.write_json(f'{RUN}/writer.json', {'token': 'another', 'host': 'elsewhere', 'pid': 1})


def test_of_two_processes_the_first_stops_before_its_next_checkpoint(bucket, data, tmp_path, monkeypatch):
    quick_uploads(monkeypatch)
    registry.callbacks.register('intruder', func=Intruder)
    cfg = tiny.config(tmp_path, data, 'run', max_duration='4ba', save_folder=RUN, callbacks={'intruder': {}})
    with pytest.raises(
        SystemExit,
        match=r'^run stopped: save_folder=.*another process has started to train there \(elsewhere, process 1\)',
    ):
        tiny.recipe_here({**cfg, 'save_interval': '3ba'}, tmp_path)
    names = {name.removeprefix('runs/run/') for name in objects(bucket)}
    assert names == {'.credentials_validated_successfully', 'stage.json', 'writer.json'}


@pytest.mark.slow
def test_an_export_that_cannot_be_uploaded_is_not_called_done(bucket, data, tmp_path, monkeypatch):
    quick_uploads(monkeypatch)
    upload = S3ObjectStore.upload_object

    def fail(self, object_name, filename, *args, **kwargs):
        if object_name.endswith('model.safetensors'):
            time.sleep(1)
            raise PermissionError('no more space')
        upload(self, object_name, filename, *args, **kwargs)

    monkeypatch.setattr(S3ObjectStore, 'upload_object', fail)
    cfg = tiny.config(tmp_path, data, 'run', max_duration='4ba', save_folder=RUN)
    with pytest.raises(PermissionError, match='no more space'):
        tiny.recipe_here(cfg, tmp_path)
    assert newest_complete(RUN)[0] == 4
    assert not files.exists(f'{RUN}/done.json')


def test_a_parent_in_a_bucket(finished, original, data, tmp_path):
    cfg = settings(
        tmp_path, data, 'child', load_path=f'{RUN}/latest-rank0.pt', max_duration='4ba',
        callbacks={'forgetting': {'new': ['new'], 'old': ['old']}, 'ema': None, 'final_loss': {'window': '4ba'}},
    )  # fmt: skip
    tiny.recipe_here(cfg, tmp_path)
    forgetting, losses, stage = (
        json.loads(objects(finished)[f'runs/child/{name}.json']) for name in ('forgetting', 'losses', 'stage')
    )
    at_its_end = {label: rows[-1][2] for label, rows in named(original[1], 'losses')['losses'].items()}
    assert forgetting['parent'] == {label: pytest.approx(at_its_end[label], rel=1e-6) for label in ('old', 'new')}
    assert [row[0] for row in losses['losses']['old']] == [0, 4]
    assert stage['parent'] == f'{RUN}/latest-rank0.pt'


def test_checkpoints_of_a_run_are_averaged_from_there(finished, tmp_path):
    average_checkpoints.main([RUN, '--last', '2', '--out', str(tmp_path / 'average')])
    from safetensors.torch import load_file

    averaged = load_file(tmp_path / 'average' / 'model.safetensors')
    finished.download_file('bucket', 'runs/run/ep0-ba4-rank0.pt', str(tmp_path / '4.pt'))
    finished.download_file('bucket', 'runs/run/ep0-ba8-rank0.pt', str(tmp_path / '8.pt'))
    models = [torch.load(tmp_path / f'{n}.pt', weights_only=False)['state']['model'] for n in (4, 8)]
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, sum(model[f'model.{name}'] for model in models) / 2)


# What is said before anything is trained


def test_somebody_elses_folder(finished, data, tmp_path):
    cfg = settings(tmp_path, data)
    preflight(Stage.from_yaml(cfg))
    preflight(Stage.from_yaml({**cfg, 'run_name': 'mine'}))
    assert f"save_folder={RUN} holds the checkpoints of run 'run', " in tiny.said(
        {**cfg, 'run_name': 'mine', 'seed': 18}
    )
    finished.delete_object(Bucket='bucket', Key='runs/run/stage.json')
    assert 'holds the checkpoints of a run that this recipe did not start' in tiny.said(cfg)


def test_a_parent_that_is_not_there_or_does_not_fit(finished, data, tmp_path):
    cfg = settings(tmp_path, data, 'child', load_path=f'{RUN}/latest-rank0.pt')
    preflight(Stage.from_yaml(cfg))
    assert f'load_path={RUN}/latest.pt does not exist; did you mean {RUN}/latest-rank0.pt?' in tiny.said(
        {**cfg, 'load_path': f'{RUN}/latest.pt'}
    )
    assert 'load_path=s3://bucket/nothing/x.pt ' in tiny.said({**cfg, 'load_path': 's3://bucket/nothing/x.pt'})
    wider = {**cfg['model'], 'd_model': 32}
    assert f'load_path={RUN}/latest-rank0.pt does not fit the model' in tiny.said({**cfg, 'model': wider})


def test_a_sharded_checkpoint_counts_when_all_it_names_is_there(finished, original, data, tmp_path):
    with open(tmp_path / 'x.pt', 'wb') as file:
        file.write(original[1]['runs/run/ep0-ba8-rank0.pt'])
    model = torch.load(tmp_path / 'x.pt', weights_only=False)['state']['model']
    dcp.save({'state': {'model': model}}, checkpoint_id=tmp_path / 'sharded')
    there = {
        f'runs/sharded/ep0-ba{n}/{f.name}': f.read_bytes() for n in (2, 4) for f in (tmp_path / 'sharded').iterdir()
    }
    put(finished, {**there, 'runs/sharded/latest-sharded-rank0.symlink': b'runs/sharded/ep0-ba4'})
    folder = 's3://bucket/runs/sharded'
    assert newest_complete(folder) == (4, f'{folder}/ep0-ba4')
    assert (
        resolve_latest(f'{folder}/latest-sharded-rank0')
        == resolve_latest(f'{folder}/latest-sharded-rank0.symlink')
        == f'{folder}/ep0-ba4'
    )
    fsdp = {'fsdp_config': {'state_dict_type': 'sharded'}}
    cfg = settings(tmp_path, data, 'child', load_path=f'{folder}/latest-sharded-rank0', **fsdp)
    preflight(Stage.from_yaml(cfg))
    assert 'does not fit the model' in tiny.said({**cfg, 'model': {**cfg['model'], 'd_model': 32}})
    # Composer uploads .metadata first
    finished.delete_object(Bucket='bucket', Key='runs/sharded/ep0-ba4/__0_0.distcp')
    assert newest_complete(folder) == (2, f'{folder}/ep0-ba2')
    assert newest_complete('s3://bucket/runs')[0] == 0


def test_data_in_a_bucket_is_measured(bucket, data, tmp_path):
    index = (data['new'] / 'train' / 'index.json').read_bytes()
    put(bucket, {'data/new/train/index.json': index})

    def stage(remote, **over):
        new = {'remote': remote, 'local': str(tmp_path / 'cache'), 'split': 'train'}
        loader = tiny.config(tmp_path, data, 'x')['train_loader']
        loader = {**loader, 'dataset': {**loader['dataset'], 'new': new, **over.pop('dataset', {})}}
        return {**tiny.config(tmp_path, data, 'x', **over), 'train_loader': loader}

    preflight(Stage.from_yaml(stage('s3://bucket/data/new')))
    assert 'too little data' in tiny.said(stage('s3://bucket/data/new', max_duration='51ba'))
    long = {'max_seq_len': 32, 'dataset': {'max_seq_len': 32}}
    assert 'packed to rows of 16 tokens' in tiny.said(stage('s3://bucket/data/new', **long))
    missing = tiny.said(stage('s3://bucket/data/nothing'))
    assert 'train_loader.dataset.new.new: there is no dataset' in missing
    assert 's3://bucket/data/nothing/train/index.json' in missing
    assert 'dataset.new.new: s3://nobucket/train/index.json cannot be reached' in tiny.said(stage('s3://nobucket'))


def test_storage_that_does_not_answer_is_one_clear_error(bucket, data, tmp_path, monkeypatch):
    cfg = settings(tmp_path, data, save_folder='s3://nobucket/run', load_path='s3://nobucket/parent/x.pt')
    said = tiny.said(cfg)
    assert 'save_folder: s3://nobucket/run/ cannot be reached: ' in said
    assert 'NoSuchBucket' in said
    monkeypatch.setattr(S3ObjectStore, 'list_objects', lambda *_: ['secret.json'])
    assert files.read_json('s3://bucket/nothing.json') is None
    with pytest.raises(files.StorageError, match='it is there, and may not be read'):
        files.read_json('s3://bucket/secret.json')


def test_what_needs_a_local_copy_says_so(data, tmp_path):
    files.write_json(tmp_path / 'stage.json', {'parent': f'{RUN}/latest-rank0.pt'})
    with pytest.raises(ValueError, match='--parent names a copy of its export'):
        parent_of(tmp_path)
    with pytest.raises(ValueError, match='copy its JSON files into a local folder'):
        read_runs([Path(RUN)])


# Sequences


def sequence_on(data, tmp_path, **over):
    caches = {
        name: {'remote': f's3://bucket/{name}', 'local': str(tmp_path / 'cache' / name)} for name in ('old', 'new')
    }
    arms = {'none': {}, 'some': {'new': {'replay': {'fraction': 0.25}}}}
    spec = tiny.sequence_spec(tmp_path, data, '8ba', **{'data': caches, 'arms': arms, **over})
    return str(tiny.save(spec, tmp_path / 'sequence.yaml'))


def test_runs_at_the_same_time_have_caches_of_their_own(bucket, data, tmp_path):
    for name in ('old', 'new'):
        for path in data[name].rglob('index.json'):
            put(bucket, {f'{name}/{path.relative_to(data[name])}': path.read_bytes()})
    _, together = tiny.planned(sequence_on(data, tmp_path))
    check(together, 1)
    _, one_by_one = tiny.planned(sequence_on(data, tmp_path, jobs=1))

    def caches(run):
        loaders = [run.stage.given['train_loader'], *run.stage.given['eval_loader']]
        found = re.findall(r"'local': '([^']+)'", str(loaders))
        return {str(Path(place).relative_to(tmp_path / 'cache')) for place in found}

    assert [caches(run) for run in one_by_one] == [{'old', 'new'}] * 3
    assert [caches(run) for run in together] == [{f'old/{run.name}', f'new/{run.name}'} for run in together]
    # how many run at a time changes nothing of a run
    for run in one_by_one:
        write_yaml(run)
        (run.folder / 'stage.json').write_text('{}')
    check(together, 1)


def test_a_sequence_keeps_its_runs_in_a_local_folder(data, tmp_path):
    with pytest.raises(ValueError, match=r"folder='s3://bucket/runs'.* local folder"):
        tiny.planned(sequence_on(data, tmp_path, folder='s3://bucket/runs'))


# Killed for real, with Composer's upload workers in processes of their own


@pytest.fixture
def scratch(bucket, tmp_path, tmp_path_factory, monkeypatch):
    """The working folder and the folder for temporary files, which a machine that is lost takes with it."""
    (tmp_path / 'working').mkdir()
    monkeypatch.chdir(tmp_path / 'working')
    monkeypatch.setenv('TMPDIR', nearby(tmp_path_factory, tmp_path / 'temporary'))
    return bucket


def lose(folder):
    for name in ('working', 'temporary'):
        for path in (folder / name).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_sigkill(scratch, data, tmp_path):
    straight = tiny.config(tmp_path, data, 'straight', save_interval='2ba')
    tiny.recipe(straight, tmp_path)
    cfg = tiny.config(
        tmp_path, data, 'run', save_interval='2ba', callbacks={'recorder': {'kill_at': 5}}, save_folder=RUN
    )
    # returns when its upload workers are gone too
    tiny.recipe(cfg, tmp_path, expect=tiny.KILLED)
    there = newest_complete(RUN)[0]
    assert there < 6
    lose(tmp_path)
    cfg['callbacks']['recorder']['kill_at'] = None
    tiny.recipe(cfg, tmp_path)
    lines = recorder.read(tmp_path / 'run.jsonl')
    assert lines == recorder.read(tmp_path / 'straight.jsonl')
    assert len((tmp_path / 'run.jsonl.rank0').read_text().splitlines()) == 5 + 8 - there
    assert newest_complete(RUN)[0] == 8
    assert files.exists(f'{RUN}/huggingface/ba8/model.safetensors')
    assert files.read_json(f'{RUN}/done.json')['batch'] == 8
    assert resolve_latest(f'{RUN}/latest-rank0.pt') == f'{RUN}/ep0-ba8-rank0.pt'


@pytest.mark.slow
def test_two_sharded_ranks_killed_in_the_middle_of_an_upload(scratch, data, tmp_path):
    def launch(cfg):
        tiny.launch(tiny.RECIPE, tiny.save(cfg, tmp_path / f'{cfg["run_name"]}.yaml'))

    cfg = tiny.config(
        tmp_path, data, 'run', save_interval='2ba', save_folder=RUN, fsdp_config={'state_dict_type': 'sharded'}
    )
    launch(cfg)
    lines = [recorder.read(tmp_path / 'run.jsonl', rank) for rank in (0, 1)]
    assert newest_complete(RUN)[0] == 8
    # as if killed while uploading the last: .metadata comes first
    for name in ('ep0-ba8/__1_0.distcp', 'ep0-ba6/__0_0.distcp', 'latest-sharded-rank0.symlink', 'done.json'):
        scratch.delete_object(Bucket='bucket', Key=f'runs/run/{name}')
    assert newest_complete(RUN)[0] == 4
    lose(tmp_path)
    launch(cfg)
    assert [recorder.read(tmp_path / 'run.jsonl', rank) for rank in (0, 1)] == lines
    assert len((tmp_path / 'run.jsonl.rank0').read_text().splitlines()) == 8 + 4
    assert newest_complete(RUN) == (8, f'{RUN}/ep0-ba8')
    assert resolve_latest(f'{RUN}/latest-sharded-rank0') == f'{RUN}/ep0-ba8'
    assert not list((tmp_path / 'temporary').rglob('*.distcp')), 'nothing is left on the disk of any rank'
    average_checkpoints.main([RUN, '--last', '2', '--out', str(tmp_path / 'average')])
    assert (tmp_path / 'average' / 'model.safetensors').exists()
    child = {**cfg, 'run_name': 'child', 'save_folder': 's3://bucket/runs/child', 'max_duration': '4ba'}
    child = tiny.merge(
        child,
        {
            'load_path': f'{RUN}/latest-sharded-rank0',
            'callbacks': {'recorder': {'path': str(tmp_path / 'child.jsonl')}},
        },
    )
    launch(child)
    assert newest_complete('s3://bucket/runs/child')[0] == 4
