# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Everything runs offline, on CPU."""

import os

# Before torch is imported anywhere: parallel test processes must not fight over the cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('WANDB_MODE', 'offline')

import atexit
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

SEQ_LEN = 16
VOCAB = 256
settings.register_profile('on any machine', deadline=None)
settings.load_profile('on any machine')
# Files that launch ranks or sequences come first: one left to the end would have a process of pytest-xdist to itself.
LONGEST_FIRST = (
    'test_sharded_averages',
    'test_sequence',
    'test_two_ranks',
    'test_lr_on_load',
    'test_estimate',
    'test_streams',
    'test_fuzz',
    'test_report',
    'test_continue_pretraining',
    'test_hf_models',
    'test_lm_eval',
    'test_average_checkpoints',
    'test_ema_and_lawa',
    'test_object_storage',
    'test_replay_text',
    'test_forgetting',
    'test_done',
    'test_consumed',
    'test_fork_server',
    'test_comparable',
)
# Ends with its parent, which holds the other end of stdin.
S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
server.start()
print('http://%s:%s' % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file, the longest first."""
    order = {name: index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope='session')
def no_power_cuts() -> Iterator[None]:
    """Tests kill processes, whose files are read again on a machine that stays on: nothing needs to be on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', lambda file: None)
        yield


@pytest.fixture(autouse=True, scope='session')
def runs_share_what_they_can() -> None:
    """Of one process, and of this machine."""
    import tiny  # noqa: F401 - importing it is what does it


@pytest.fixture(autouse=True, scope='session')
def iterators() -> list[Any]:
    """Every iterator over a StreamingDataset of this process, whose two threads read ahead."""
    from streaming.base import dataset

    made: list[Any] = []
    original = dataset._Iterator.__init__

    def init(self: Any, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    dataset._Iterator.__init__ = init
    return made


@pytest.fixture(autouse=True)
def end_iterators(iterators: list[Any]) -> Iterator[None]:
    """Streaming ends an iterator that was left with its process: the threads of some dozens take a core."""
    yield
    while iterators:
        iterators.pop().non_blocking_exit()


@cache
def freeze_once() -> None:
    """Garbage is not looked for among what the first run has imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def free_shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streaming frees shared memory only at exit, and every dataset opens that of all before: 20,000 files in all."""
    from streaming.base.shared.memory import SharedMemory

    made: list[SharedMemory] = []
    original = SharedMemory.__init__

    def init(self: SharedMemory, *args, **kwargs) -> None:
        original(self, *args, **kwargs)  # raises where there is none to attach to
        made.append(self)

    monkeypatch.setattr(SharedMemory, '__init__', init)
    yield
    if made:
        gc.collect()
        freeze_once()
    for memory in made:
        try:
            memory.cleanup()
        except BufferError:  # somebody still looks at it: left to the exit
            continue
        atexit.unregister(memory.cleanup)


@pytest.fixture(scope='session')
def write_mds() -> Callable[..., Path]:
    """Writes ``num_samples`` rows of SEQ_LEN tokens; each row begins with (dataset, id // 100, id % 100)."""

    def write(folder: Path, dataset: int, num_samples: int, samples_per_shard: int = 20, split: str = 'train') -> Path:
        from streaming import MDSWriter

        rows = np.random.default_rng(dataset).integers(0, VOCAB, (num_samples, SEQ_LEN), dtype=np.int32)
        rows[:, 0] = dataset
        rows[:, 1], rows[:, 2] = np.divmod(np.arange(num_samples), 100)
        row_bytes = 4 * SEQ_LEN + 4
        with MDSWriter(
            out=str(folder / split),
            columns={'tokens': f'ndarray:int32:{SEQ_LEN}'},
            size_limit=samples_per_shard * row_bytes + 200,
            hashes=['xxh64'],
        ) as writer:
            for row in rows:
                writer.write({'tokens': row})
        return folder

    return write


@pytest.fixture(scope='session')
def data(tmp_path_factory: pytest.TempPathFactory, write_mds) -> dict[str, Path]:
    """``new`` (400 samples), ``old`` (300) and ``older`` (200) with a validation split each, and a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp('data')
    single = sorted(pre_tokenizers.ByteLevel.alphabet())[:200]
    merges = list(zip(single, single[1 : VOCAB - 200], strict=False))
    tokens = [*single, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|endoftext|>', pad_token='<|endoftext|>')
    assert len(fast) == VOCAB
    fast.save_pretrained(root / 'tokenizer')
    folders = {'tokenizer': root / 'tokenizer'}
    for number, (name, size) in enumerate({'new': 400, 'old': 300, 'older': 200}.items()):
        folders[name] = write_mds(root / name, number, size)
        write_mds(root / name, 10 + number, 16, split='val')
    return folders


@pytest.fixture(scope='session')
def offline(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What yamls/eval/offline.yaml wants, of the letters that the tokenizer knows."""
    root = tmp_path_factory.mktemp('offline')
    (root / 'lm_eval').mkdir()
    for seed, name in enumerate(('python', 'cpp')):
        texts = [''.join(chr(97 + (7 * i + j * (seed + 3)) % 20) for j in range(12)) for i in range(8)]
        choices = [{'context': t[:6], 'choices': [t[6:], *(o[6:] for o in texts[:3])], 'answer': 0} for t in texts]
        for kind, items in (('passages', [{'text': text} for text in texts]), ('continuations', choices)):
            lines = ''.join(json.dumps(item) + '\n' for item in items)
            (root / 'lm_eval' / f'{name}_{kind}.jsonl').write_text(lines)
    return [str(Path(__file__).parents[1] / 'yamls' / 'eval' / 'offline.yaml'), f'variables.root={root}']


@pytest.fixture(scope='session')
def s3_server() -> Iterator[str]:
    """The address of a real S3 server on this machine (moto's), in a process of its own."""
    with subprocess.Popen(
        [sys.executable, '-c', S3_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch):
    """A client of the server, which has an empty bucket called ``bucket``; the environment leads to it."""
    import boto3

    for key, value in {
        'AWS_ACCESS_KEY_ID': 'x', 'AWS_SECRET_ACCESS_KEY': 'x', 'AWS_DEFAULT_REGION': 'us-east-1',
        'S3_ENDPOINT_URL': s3_server,
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    client = boto3.client('s3', endpoint_url=s3_server)
    client.create_bucket(Bucket='bucket')
    yield client
    bucket = boto3.resource('s3', endpoint_url=s3_server).Bucket('bucket')
    bucket.objects.all().delete()
    bucket.delete()
