# SPDX-License-Identifier: Apache-2.0
"""For every YAML under yamls/: what is handed to llm-foundry, byte for byte, and the plan of every sequence.

A change on purpose is a commit of its own that says so: ``python tests/test_golden.py`` writes ``golden.json`` again, and
``git diff`` shows which runs have another YAML (its hash), parent, number of tokens or of batches.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from cpt_algorithms.sequence.read import read_sequence
from cpt_algorithms.stage.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name('golden.json')
KNOWN = json.loads(GOLDEN.read_text(encoding='utf-8'))


def hash_of(config):
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]


def runs_of(words, sweep=None):
    return {
        run.name: {
            'arm': run.arm,
            'stage': run.stage_name,
            'seed': run.seed,
            'parent': run.parent,
            'merges': run.stage.merge is not None,
            'tokens': run.stage.tokens_by_stream(),
            'before_branch': run.tokens_before_branch,
            'batches': run.batches,
            'yaml': hash_of(run.stage.to_train_yaml()),
        }
        for run in read_sequence(words, sweep)[1]
    }


def golden_of(key):
    words = key.split(' ')
    if words[0].startswith('yamls/continue_pretraining/'):
        return hash_of(Stage.read(words[0]).to_train_yaml())
    return runs_of([], words[0]) if words[0].startswith('yamls/sweeps/') else runs_of(words)


def keys():
    """Every YAML that trains something, and the papers' also at the size of a laptop."""
    found = [path.relative_to(ROOT) for path in sorted(ROOT.glob('yamls/*/*.yaml'))]
    for path in found:
        if path.parent.name in ('continue_pretraining', 'sequence', 'claims', 'sweeps'):
            yield str(path)
        if path.parent.name == 'sequence' and path.stem not in ('programme', 'quickstart', 'weight_averaging'):
            yield f'{path} scale=tiny'


def test_every_yaml_is_there():
    assert list(keys()) == list(KNOWN)


@pytest.mark.parametrize('key', KNOWN)
def test_what_is_handed_to_llm_foundry_is_what_it_was(key, monkeypatch):
    monkeypatch.chdir(ROOT)
    found, known = golden_of(key), KNOWN[key]
    if isinstance(known, dict):  # one by one: what differs is shown
        assert list(found) == list(known)
        for name in known:
            assert found[name] == known[name], name
    assert found == known


if __name__ == '__main__':
    os.chdir(ROOT)
    text = json.dumps({key: golden_of(key) for key in keys()}, indent=1)
    # a run on a line of its own
    GOLDEN.write_text(
        re.sub(r'(?<={)\n {3,}|\n {2,}(?=})', '', re.sub(r'(?<=,)\n {3,}', ' ', text)) + '\n', encoding='utf-8'
    )
