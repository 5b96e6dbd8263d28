# SPDX-License-Identifier: Apache-2.0
"""The family tree of runs, from run folders written here."""

import json
import re
import shutil

import lineage as script
import pytest
from run_folders import BATCH, LENGTH, write, write_run

from cpt_algorithms.report.lineage import read_lineage
from cpt_algorithms.report.page import write_report


@pytest.fixture
def runs(tmp_path):
    """A trunk of two stages, with an anneal from the middle of the first, a failed one from its end, and a merge."""
    folder = tmp_path / 'runs'
    write_run(folder / 'a', {'a': 4.0, 'a/lawa': 3.9}, batches=100)
    old = {'a': {'local': 'y', 'weight': 1}, 'web': {'local': 'z', 'weight': 3, 'stand_in_for': 'the base data'}}
    write_run(folder / 'b', {'b': 5.0}, f'{folder}/a/latest-rank0.pt', batches=100, replay=old, reached=40)
    write_run(folder / 'a-early', parent=f'{folder}/a/ep0-ba60-rank0.pt', batches=20)
    write_run(
        folder / 'a-anneal', parent=f'{folder}/a/ep0-ba100-rank0.pt', batches=20, reached=5, log=['ValueError: no']
    )
    merge = {'of': f'{folder}/a', 'batch': 100, 'last': 3, 'every': f'{20 * BATCH * LENGTH}tok', 'weights': 'uniform'}
    write_run(folder / 'a-merged', {'a': 3.8}, batches=0, variables={'merge': merge}, max_duration='0ba')
    (folder / 'a' / 'huggingface' / 'ba100').mkdir(parents=True)
    return folder


def walk(nodes, depth=0):
    """Every node after its parent, with its depth."""
    for node in nodes:
        yield depth, node
        yield from walk(node.children, depth + 1)


def drawn(roots):
    return [(depth, node.name) for depth, node in walk(roots)]


def by_name(*folders):
    return {node.name: node for _, node in walk(read_lineage(folders))}


def test_the_tree_has_branches_before_what_goes_on(runs):
    assert drawn(read_lineage([runs])) == [(0, 'a'), (1, 'a-early'), (1, 'a-merged'), (1, 'a-anneal'), (1, 'b')]
    nodes = by_name(runs)
    assert {name: (node.kind, node.begins, node.look) for name, node in nodes.items()} == {
        'a': ('run', None, 'finished'), 'a-early': ('run', 60, 'finished'), 'a-merged': ('merge', None, 'finished'),
        'a-anneal': ('run', None, 'failed'), 'b': ('run', None, 'unfinished'),
    }  # fmt: skip
    assert nodes['a-merged'].merged == ['60', '80', '100']
    assert nodes['a-merged'].run.final == {'a': 3.8}
    assert nodes['b'].run.tokens == {'b': 7500, 'a': 600, 'web': 1900}


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('a', ['a 10.0 k', 'rewarm_cosine, lr 0.01, alpha_f 0.1', 'final loss a 4.000']),
        ('a-merged', ['average of batches 60, 80, 100', 'final loss a 3.800']),
        ('b', ['b 7.50 k + replay of a 600 (6 %), web 1.90 k (19 %) in place of the base data', 'loss so far b 7.400']),
        ('a-early', ['from batch 60']),
        ('a-anneal', ['ValueError: no']),
    ],
)
def test_it_is_said_in_words(name, words, runs):
    assert [line for line in by_name(runs)[name].details if line in words] == words


def test_a_parent_that_is_gone_is_named(runs, capsys):
    shutil.rmtree(runs / 'a')
    script.main([str(runs)])
    printed = capsys.readouterr().out
    assert printed.index(f'{runs}/a\n') < printed.index('a-early') < printed.index('b  at batch 40 of 100')
    (root,) = read_lineage([runs])
    assert (root.name, root.kind, root.look, len(root.children)) == ('a', 'missing', 'failed', 4)


def test_ancestors_elsewhere_are_found_and_moved_runs_keep_their_own(runs, tmp_path):
    write_run(tmp_path / 'slurm' / 'c', parent=f'{runs}/b/latest-rank0.pt')
    assert drawn(read_lineage([tmp_path / 'slurm'])) == [(0, 'a'), (1, 'b'), (2, 'c')]
    shutil.copytree(runs, tmp_path / 'copy')
    places = [node.place for _, node in walk(read_lineage([tmp_path / 'copy']))]
    assert sorted(places) == sorted(str(path.parent) for path in tmp_path.glob('copy/*/stage.json'))


def test_a_pretrained_model_and_an_averaged_checkpoint_are_parents(runs):
    model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': 'EleutherAI/pythia-70m'}
    write_run(runs / 'of_a_base', model=model)
    inputs = [{'path': f'{runs}/a/ep0-ba{batch}-rank0.pt', 'weight': 0.5} for batch in (40, 60)]
    write(runs / 'soup.pt.average.json', {'inputs': inputs})
    write_run(runs / 'of_a_soup', parent=f'{runs}/soup.pt')
    for nodes in (by_name(runs), by_name(runs / 'of_a_base', runs / 'of_a_soup')):
        base, soup = nodes['EleutherAI/pythia-70m'], nodes['soup.pt']
        assert (base.kind, [child.name for child in base.children]) == ('base', ['of_a_base'])
        assert (soup.kind, soup.begins, [child.name for child in soup.children]) == ('merge', 60, ['of_a_soup'])
        assert soup in nodes['a'].children
        assert soup.merged == [each['path'] for each in inputs]


def test_an_average_of_exports_has_their_run_as_parent(runs):
    inputs = [{'path': f'{runs}/a/huggingface/ba{batch}', 'weight': 0.5} for batch in (40, 60)]
    write(runs / 'soup.pt.average.json', {'inputs': inputs})
    write_run(runs / 'of_a_soup', parent=f'{runs}/soup.pt')
    soup = by_name(runs)['soup.pt']
    assert (soup.kind, soup.begins) == ('merge', 60) and [child.name for child in soup.children] == ['of_a_soup']
    assert 'soup.pt' in [child.name for child in by_name(runs)['a'].children]
    shutil.rmtree(runs / 'a')
    missing = by_name(runs / 'of_a_soup')['a']
    assert (missing.kind, missing.place) == ('missing', f'{runs}/a')


def test_links_are_followed_once(runs, tmp_path):
    write_run(tmp_path / 'scratch' / 'german', parent=f'{runs}/a/latest-rank0.pt')
    (runs / 'german').symlink_to(tmp_path / 'scratch' / 'german')
    (runs / 'again').symlink_to(runs)
    places = [node.place for _, node in walk(read_lineage([runs]))]
    assert len(places) == len(set(places)) == 6 and str(tmp_path / 'scratch' / 'german') in places


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
    base = by_name(runs)['base']
    assert (base.kind, base.place, [child.name for child in base.children]) == ('missing', 's3://bucket/base', ['far'])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=str(tmp_path)):
        script.main([str(tmp_path)])


def test_json_is_the_same_tree(runs, capsys):
    script.main([str(runs), '--json'])
    (root,) = json.loads(capsys.readouterr().out)
    assert [child['name'] for child in root['children']] == ['a-early', 'a-merged', 'a-anneal', 'b']
    assert root['children'][3]['tokens'] == {'b': 7500, 'a': 600, 'web': 1900}


def test_the_report_draws_it(runs, tmp_path):
    page = write_report([runs / 'b', runs / 'a-early'], tmp_path / 'out').path.read_text()
    tree = page[page.index('<ul class="tree">') : page.index('<details>')]
    assert re.sub(r'>\s+<', '><', re.sub(r'<small>.*?</small>', '', tree)).strip() == (
        '<ul class="tree"><li><b>a</b><span class="pill finished">finished</span>'
        '<ul><li><b>a-early</b><span class="pill finished">finished</span></li>'
        '<li><b>b</b><span class="pill unfinished">at batch 40 of 100</span></li></ul></li></ul>'
    )
    assert '<small>from batch 60 · a-early' in tree
