# SPDX-License-Identifier: Apache-2.0
"""The papers' experiments are sequences that can be planned, at their size and at one for a laptop."""

import json
import re
import sys

import prepare_data
import pytest
import sequence
from omegaconf import OmegaConf
from tiny import ROOT, planned

PAPERS = {
    path.stem: path
    for path in sorted((ROOT / 'yamls' / 'sequence').glob('*.yaml'))
    if path.stem not in ('programme', 'quickstart', 'weight_averaging')
}
BATCH, STEPS = 1104 * 2048, 132_366
each_paper = pytest.mark.parametrize('path', PAPERS.values(), ids=PAPERS.keys())


@pytest.fixture(autouse=True)
def from_the_repositorys_root_without_a_network(monkeypatch):
    monkeypatch.chdir(ROOT)  # as the paths in the files are
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_PROFILE', 'S3_ENDPOINT_URL'):
        monkeypatch.delenv(name, raising=False)
    for name in ('AWS_CONFIG_FILE', 'AWS_SHARED_CREDENTIALS_FILE'):
        monkeypatch.setenv(name, '/dev/null')
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')


def tokens(runs):
    return {run.name: run.stage.tokens_by_stream() for run in runs}


def dry_run(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['sequence.py', str(path), '--dry-run'])
    sequence.main()
    return capsys.readouterr().out


def test_every_experiment_is_there():
    assert set(PAPERS) == {
        'pile_slimpajama', 'pile_german', 'eta_max', 'warmup', 'same_data', 'infinite_one_dataset',
        'infinite_three_splits', 'domain_incremental', 'pile_slimpajama_10b', 'lawa_125m', 'lawa_335m', 'lawa_770m',
        'averaging_pile_slimpajama',
    }  # fmt: skip


@each_paper
@pytest.mark.long
def test_it_passes_its_dry_run(path, monkeypatch, capsys):
    printed = dry_run(path, monkeypatch, capsys)
    spec, runs = planned(path)
    assert f'{spec.name}: {len(runs)} runs' in printed
    # here there is neither the data nor the tokenizer, and it says so
    unseen = [line for line in printed.splitlines() if line.startswith('not seen from here: ')]
    assert all('cannot be reached: ' in line or line.split(': ', 1)[1].startswith('tokenizer=') for line in unseen)
    assert any('tokenizer=' in line for line in unseen)
    for dataset in spec.data:
        assert any(f's3://bucket/data/{dataset}/train/index.json' in line for line in unseen)


def test_a_dry_run_does_not_hide_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, 'argv', ['sequence.py', str(PAPERS['lawa_770m']), 'common.callbacks.lawa.kk=3', '--dry-run']
    )
    with pytest.raises(SystemExit, match=r'callbacks\.lawa\.kk is not a key that anything reads') as stopped:
        sequence.main()
    assert 'cannot be reached' not in str(stopped.value)


def test_training_does_not_start_with_what_is_not_seen(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['sequence.py', str(PAPERS['lawa_770m']), 'nproc=1'])
    with pytest.raises(SystemExit, match='refused before training:.*openwebtext.*cannot be'.replace('.*', '(.|\n)*')):
        sequence.main()


@each_paper
def test_the_tokens_of_the_header_are_those_of_the_plan(path):
    header = ' '.join(line.lstrip('# ') for line in path.read_text().splitlines() if line.startswith('#'))
    spec, runs = planned(path)
    size, length = spec.common.global_train_batch_size, spec.common.max_seq_len
    assert f'{size} x {length} = {size * length:,} a batch' in header
    said = {int(number.replace(',', '')) for number in re.findall(r'\d+(?:,\d{3}){2,}', header)} - {size * length}
    counts = tokens(runs)
    meant = {*(sum(count.values()) for count in counts.values()), *(n for c in counts.values() for n in c.values())}
    meant |= {3 * number for number in meant}  # three splits
    # replay of whole sequences
    assert all(any(abs(number - each) <= length for each in meant) for number in said), said
    assert said, 'the budgets are in the header'


def test_budgets_are_the_papers():
    assert STEPS * BATCH == 299_278_467_072
    counts = tokens(planned(PAPERS['pile_slimpajama'])[1])
    assert counts['pile-s17'] == {'pile': STEPS * BATCH}
    assert counts['union_slimpajama-s17'] == {'slimpajama': STEPS * BATCH, 'pile': STEPS * BATCH}
    shares = {name: count['pile'] / sum(count.values()) for name, count in counts.items() if 'replay' in name}
    assert sorted(shares.values()) == pytest.approx([0.005, 0.01, 0.05, 0.1, 0.5])
    assert {sum(count.values()) for name, count in counts.items() if name.startswith('slim')} == {STEPS * BATCH}
    german = tokens(planned(PAPERS['pile_german'])[1])
    assert german['german-s17'] == {'german': 86_000 * BATCH}
    shares = [count['pile'] / (86_000 * BATCH) for name, count in german.items() if 'replay' in name]
    assert sorted(shares) == pytest.approx([0.01, 0.05, 0.1, 0.25, 0.5])
    # Table 1, in billions
    domains = tokens(planned(PAPERS['domain_incremental'])[1])['union_arxiv-mixed-s17']
    assert {name: round(count / 1e9, 2) for name, count in domains.items()} == {
        'wikipedia': 11.96, 'book': 12.58, 'c4': 79.87, 'stack_exchange': 10.09, 'github': 15.63,
        'common_crawl': 155.89, 'arxiv': 13.25,
    }  # fmt: skip
    assert round(sum(domains.values()) / 1e9, 2) == 299.28
    splits = tokens(planned(PAPERS['infinite_three_splits'])[1])
    assert sum(sum(splits[f'split_{number}-s17'].values()) for number in (1, 2, 3)) == STEPS * BATCH
    lawa = {name: planned(PAPERS[f'lawa_{name}'])[1][0] for name in ('125m', '335m', '770m')}
    assert {name: run.batches for name, run in lawa.items()} == dict.fromkeys(lawa, 70_000)
    assert sum(lawa['125m'].stage.tokens_by_stream().values()) == 70_000 * 393_216


@each_paper
def test_tiny_means_the_same_runs_in_another_folder(path):
    large, small = planned(path), planned(path, 'scale=tiny')
    assert [(run.name, run.parent, run.arm) for run in small[1]] == [
        (run.name, run.parent, run.arm) for run in large[1]
    ]
    assert small[0].folder == f'runs/tiny/{path.stem}'
    for run in small[1]:
        # the union is as long as all stages
        assert run.batches <= 240
        assert run.batches > 0 or run.stage.merge
        assert run.stage.given['model']['d_model'] == 128
        new = run.stage.given['train_loader']['dataset']['new']
        assert {name: stream['local'] for name, stream in new.items()} == {name: f'data/tiny/{name}' for name in new}
    assert max(run.batches for run in small[1] if run.arm not in ('union', 'mixed')) == 120
    # shares of replay are what they were
    for one, other in zip(large[1], small[1], strict=True):
        replay = [run.stage.given['train_loader']['dataset'].get('replay') or {} for run in (one, other)]
        if one.arm not in ('union', 'mixed'):
            assert replay[0].get('fraction') == replay[1].get('fraction')


def test_the_command_line_is_said_of_the_result():
    words = ('scale=tiny', 'folder=elsewhere', 'jobs=1', 'stages.pile.max_duration=4096tok', 'common.optimizer.lr=0.5')
    spec, runs = planned(PAPERS['pile_slimpajama'], *words)
    assert (spec.folder, spec.jobs) == ('elsewhere', 1)
    assert runs[0].batches == 1
    assert {run.stage.given['optimizer']['lr'] for run in runs} == {0.5}


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match=r'scale=tinny: there is no .*tinny\.yaml; .*\btiny\b'):
        planned(PAPERS['pile_slimpajama'], 'scale=tinny')


@each_paper
def test_make_data_tiny_prepares_what_it_reads(path):
    makefile = (ROOT / 'Makefile').read_text()
    for name in planned(path)[0].data:
        assert f'--dataset {name}=installed:' in makefile


@pytest.mark.slow
def test_one_is_trained_from_start_to_report(tmp_path, monkeypatch, capsys):
    limits = ['--max-train-tokens=80000', '--max-val-tokens=4096', '--tokenizer-documents=100', '--vocab-size=2048']
    prepare_data.main([f'--out={tmp_path / "data"}', '--dataset=openwebtext=installed:sympy', *limits])
    scale = OmegaConf.load(ROOT / 'yamls' / 'scales' / 'tiny.yaml')
    scale.update(longest_stage='16ba', folder=str(tmp_path / 'runs'), data=str(tmp_path / 'data'))
    scale.common.tokenizer.name = str(tmp_path / 'data' / 'tokenizer')
    OmegaConf.save(scale, tmp_path / 'smaller.yaml')
    words = [str(PAPERS['lawa_770m']), f'scale={tmp_path / "smaller.yaml"}', 'jobs=1']
    monkeypatch.setattr(sys, 'argv', ['sequence.py', *words])
    sequence.main()
    assert 'final validation loss' in capsys.readouterr().out
    written = json.loads((tmp_path / 'runs' / 'lawa_770m' / 'report.json').read_text())
    assert {row['arm'] for row in written['rows']} >= {'LR 2e-3', 'LR 2e-3, lawa', 'LR 2e-4', 'LR 2e-4, lawa'}
    assert (tmp_path / 'runs' / 'lawa_770m' / 'report.html').exists()
