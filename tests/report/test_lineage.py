# SPDX-License-Identifier: Apache-2.0
"""The family tree of runs, from run folders written here."""

import json
import re
import shutil

import lineage as script
import pytest

from cpt_algorithms.report.lineage import details, read_lineage, status, walk
from cpt_algorithms.report.page import write_report


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(folder, parent=None, batches=100, reached=None, final=None, failed=False, replay=None, **config):
    """Batches of 2 x 50 tokens; ``reached`` of them are trained, or all."""
    dataset = {'new': {folder.name: {'local': 'data/x', 'split': 'train'}}}
    if replay:
        dataset['replay'] = {'fraction': 0.25, 'streams': replay}
    config = {
        'run_name': folder.name, 'save_folder': str(folder), 'seed': 17, 'max_duration': f'{batches}ba',
        'global_train_batch_size': 2, 'max_seq_len': 50, 'optimizer': {'lr': 0.01}, 'load_path': parent,
        'scheduler': {'name': 'rewarm_cosine', 'alpha_f': 0.1}, 'train_loader': {'dataset': dataset}, **config,
    }  # fmt: skip
    stage = {'run_name': folder.name, 'parent': parent, 'data': dataset, 'max_duration': '1ba', 'config': config}
    write(folder / 'stage.json', {**stage, 'versions': {'torch': '2.7.0'}})
    batch = batches if reached is None else reached
    measured = {'losses': {label: [[batch, batch * 100, loss]] for label, loss in (final or {}).items()}}
    cost = {'batch': batch, 'tokens': batch * 100, 'seconds': 1.0, 'devices': 1, 'device': 'cpu', 'parameters': 1000}
    write(folder / 'losses.json', {**measured, 'cost': cost})
    if reached is None:
        write(folder / 'done.json', {'batch': batches, 'lm_eval': None})
    if failed:
        write(folder / 'failed.json', {'returncode': 1, 'log': ['ValueError: no']})


@pytest.fixture
def runs(tmp_path):
    """A trunk of two stages, with an anneal from the middle of the first, a failed one from its end, and a merge."""
    folder = tmp_path / 'runs'
    write_run(folder / 'a', final={'a': 4.0, 'a/lawa': 3.9})
    old = {'a': {'local': 'y', 'weight': 1}, 'web': {'local': 'z', 'weight': 3, 'stand_in_for': 'the base data'}}
    write_run(folder / 'b', parent=f'{folder}/a/latest-rank0.pt', replay=old, reached=40, final={'b': 5.0})
    write_run(folder / 'a-early', parent=f'{folder}/a/ep0-ba60-rank0.pt', batches=20)
    write_run(folder / 'a-anneal', parent=f'{folder}/a/ep0-ba100-rank0.pt', batches=20, reached=5, failed=True)
    merge = {'of': f'{folder}/a', 'batch': 100, 'last': 3, 'every': '20ba', 'weights': 'uniform'}
    write_run(folder / 'a-merged', variables={'merge': merge}, max_duration='0ba', final={'a': 3.8}, batches=0)
    (folder / 'a' / 'huggingface' / 'ba100').mkdir(parents=True)
    return folder


def drawn(roots):
    return [(depth, node.name) for depth, node in walk(roots)]


def test_the_tree_has_branches_before_what_goes_on(runs):
    roots = read_lineage([runs])
    assert drawn(roots) == [(0, 'a'), (1, 'a-early'), (1, 'a-merged'), (1, 'a-anneal'), (1, 'b')]
    nodes = {node.name: node for _, node in walk(roots)}
    assert {name: node.begins for name, node in nodes.items()} == {
        'a': None, 'a-early': 60, 'a-merged': None, 'a-anneal': None, 'b': None,
    }  # fmt: skip
    assert {name: status(node) for name, node in nodes.items()} == {
        'a': 'finished', 'a-early': 'finished', 'a-merged': 'finished', 'a-anneal': 'failed at batch 5 of 20',
        'b': 'at batch 40 of 100',
    }  # fmt: skip
    assert nodes['a-merged'].merged == ['60', '80', '100']
    assert nodes['a-merged'].final == {'a': 3.8}
    assert [(stream.name, stream.tokens, stream.is_new) for stream in nodes['b'].streams] == [
        ('b', 7500, True), ('a', 600, False), ('web', 1900, False),
    ]  # fmt: skip
    assert nodes['b'].streams[2].stand_in_for == 'the base data'


def test_it_is_said_in_words(runs):
    nodes = {node.name: node for _, node in walk(read_lineage([runs]))}
    assert details(nodes['a']) == ['a 10.0 k', 'rewarm_cosine, lr 0.01, alpha_f 0.1', 'final loss a 4.000']
    assert details(nodes['a-early'])[0] == 'from batch 60'
    assert details(nodes['a-merged']) == ['average of batches 60, 80, 100', 'final loss a 3.800']
    mix, _, loss = details(nodes['b'])
    assert mix == 'b 7.50 k + replay of a 600 (6 %), web 1.90 k (19 %) in place of the base data'
    assert loss == 'loss so far b 5.000'


def test_a_parent_that_is_gone_is_named(runs, capsys):
    shutil.rmtree(runs / 'a')
    script.main([str(runs)])
    printed = capsys.readouterr().out
    assert f'a  not there: {runs}/a' in printed
    assert printed.index('a  not there') < printed.index('a-early') < printed.index('b  at batch 40 of 100')
    roots = read_lineage([runs])
    assert [(root.name, root.kind) for root in roots] == [('a', 'missing')]
    assert len(roots[0].children) == 4


def test_ancestors_elsewhere_are_found_and_moved_runs_keep_their_own(runs, tmp_path):
    write_run(tmp_path / 'slurm' / 'c', parent=f'{runs}/b/latest-rank0.pt')
    assert drawn(read_lineage([tmp_path / 'slurm'])) == [(0, 'a'), (1, 'b'), (2, 'c')]
    shutil.copytree(runs, tmp_path / 'copy')
    roots = read_lineage([tmp_path / 'copy'])
    assert len(drawn(roots)) == 5
    assert {node.place for _, node in walk(roots)} == {str(path.parent) for path in tmp_path.glob('copy/*/stage.json')}


def test_a_pretrained_model_and_an_averaged_checkpoint_are_parents(runs):
    model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': 'EleutherAI/pythia-70m'}
    write_run(runs / 'of_a_base', model=model)
    stage = json.loads((runs / 'of_a_base' / 'stage.json').read_text())
    write(runs / 'of_a_base' / 'stage.json', {**stage, 'parent': 'EleutherAI/pythia-70m'})
    inputs = [{'path': f'{runs}/a/ep0-ba{batch}-rank0.pt', 'weight': 0.5} for batch in (40, 60)]
    write(runs / 'soup.pt.average.json', {'inputs': inputs})
    write_run(runs / 'of_a_soup', parent=f'{runs}/soup.pt')
    nodes = {node.name: node for _, node in walk(read_lineage([runs]))}
    base = nodes['EleutherAI/pythia-70m']
    assert (base.kind, status(base)) == ('base', 'pretrained model')
    assert [child.name for child in base.children] == ['of_a_base']
    soup = nodes['soup.pt']
    assert (soup.kind, soup.begins) == ('merge', 60)
    assert soup in nodes['a'].children
    assert [child.name for child in soup.children] == ['of_a_soup']
    assert 'average of ' in details(soup)[1]


def test_runs_in_object_storage(runs, bucket):
    for path in runs.rglob('*.json'):
        stored = path.read_text().replace(f'{runs}/', 's3://bucket/runs/')
        bucket.put_object(Bucket='bucket', Key=f'runs/{path.relative_to(runs)}', Body=stored.encode())
    roots = read_lineage(['s3://bucket/runs'])
    assert drawn(roots) == drawn(read_lineage([runs]))
    assert roots[0].place == 's3://bucket/runs/a'


def test_local_runs_ask_nothing_of_object_storage(runs, monkeypatch):
    monkeypatch.delenv('S3_ENDPOINT_URL', raising=False)
    write_run(runs / 'far', parent='s3://bucket/base/ep0-ba60-rank0.pt')
    base = next(root for root in read_lineage([runs]) if root.children and root.children[0].name == 'far')
    assert (base.name, base.kind, status(base)) == ('base', 'missing', 'in object storage: s3://bucket/base')


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match=f'{tmp_path}: there is no run below it'):
        script.main([str(tmp_path)])


def test_json_is_the_same_tree(runs, capsys):
    script.main([str(runs), '--json'])
    (root,) = json.loads(capsys.readouterr().out)
    assert [child['name'] for child in root['children']] == ['a-early', 'a-merged', 'a-anneal', 'b']


def test_the_report_draws_it(runs, tmp_path):
    page = write_report([runs / 'b', runs / 'a-early'], tmp_path / 'out').path.read_text()
    tree = page[page.index('<ul class="tree">') : page.index('<details>')]
    assert re.sub(r'>\s+<', '><', re.sub(r'<small>.*?</small>', '', tree)).strip() == (
        '<ul class="tree"><li><b>a</b><span class="pill finished">finished</span>'
        '<ul><li><b>a-early</b><span class="pill finished">finished</span></li>'
        '<li><b>b</b><span class="pill unfinished">at batch 40 of 100</span></li></ul></li></ul>'
    )
    assert '<small>from batch 60 · a-early' in tree
