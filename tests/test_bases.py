# SPDX-License-Identifier: Apache-2.0
"""Every family that people continue, tiny and random: updated, killed, resumed, averaged, exported, judged, averaged again."""

import json

import average_checkpoints
import pytest
import recorder
import tiny
import torch
from pretrained import FAMILIES, load, logits, loss_by_hand, make, of_checkpoint, read, stage
from transformers import CONFIG_MAPPING, AutoTokenizer

from cpt_algorithms.compat import CURRENT_ONLY, why_unknown
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Stage
from cpt_algorithms.validation import ConfigError

EAGER = {'gemma2', 'gemma3_text', 'gpt_oss'}  # as transformers advises, or the only one it has
KNOWN = [kind for kind in FAMILIES if kind in CONFIG_MAPPING]


def on(base, folder, data, run_name, kind, **over):
    attention = {'model': {'attn_implementation': 'eager' if kind in EAGER else 'sdpa'}}
    return stage(folder, data, run_name, base, **tiny.merge(attention, over))


@pytest.mark.parametrize('kind', FAMILIES)
def test_a_family_is_known_or_refused_with_the_stack_that_knows_it(kind, data, tmp_path):
    if kind in KNOWN:
        assert why_unknown({'model_type': kind}) is None
        return
    assert kind in CURRENT_ONLY, 'the other stack knows it'
    (tmp_path / 'base').mkdir()
    (tmp_path / 'base' / 'config.json').write_text(json.dumps({'model_type': kind}))
    with pytest.raises(ConfigError, match=rf'model_type={kind}; that of STACK=current does \(README, "Two stacks"\)'):
        preflight(Stage.from_yaml(on(tmp_path / 'base', tmp_path, data, 'run', kind)))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KNOWN)
def test_a_base_is_updated(kind, data, offline, tmp_path):
    base = make(kind, tmp_path, data['tokenizer'])
    tiny.recipe_here(on(base, tmp_path, data, 'straight', kind, variables={'lm_eval': offline}), tmp_path)
    killed = on(base, tmp_path, data, 'killed', kind, callbacks={'recorder': {'kill_at': 5}})
    tiny.recipe(killed, tmp_path, expect=tiny.KILLED)
    tiny.recipe_here(tiny.merge(killed, {'callbacks': {'recorder': {'kill_at': None}}}), tmp_path)
    straight, resumed = (recorder.read(tmp_path / f'{run}.jsonl') for run in ('straight', 'killed'))
    assert sorted(straight) == list(range(8)) and resumed == straight

    run = tmp_path / 'straight'
    parent = read(run / 'forgetting.json')['parent']
    by_hand = loss_by_hand(load(base), data['old'], AutoTokenizer.from_pretrained(base))
    assert parent['past'] == pytest.approx(by_hand, rel=1e-5)
    exported = load(run / 'huggingface' / 'ba8')
    assert exported.config.model_type == kind
    assert torch.equal(logits(exported), logits(of_checkpoint(run / 'ep0-ba8-rank0.pt', base)))
    assert not torch.equal(logits(exported), logits(load(base)))
    ties = exported.get_output_embeddings().weight.data_ptr() == exported.get_input_embeddings().weight.data_ptr()
    assert ties == load(base).config.tie_word_embeddings
    for name in ('ba8', 'ba8-ema_2ba', 'ba8-lawa'):
        here, again = (load(tmp_path / each / 'huggingface' / name) for each in ('straight', 'killed'))
        assert torch.equal(logits(here), logits(again))

    average_checkpoints.main([str(run), '--last', '3', '--out', str(tmp_path / 'mean')])
    average_checkpoints.main([str(run / 'ep0-ba8-rank0.pt'), '--average', 'lawa', '--out', str(tmp_path / 'lawa')])
    states = [of_checkpoint(run / f'ep0-ba{batch}-rank0.pt', base).state_dict() for batch in (4, 6, 8)]
    mean = of_checkpoint(run / 'ep0-ba8-rank0.pt', base)
    mean.load_state_dict({name: sum(state[name] for state in states) / 3 for name in states[0]})
    torch.testing.assert_close(logits(load(tmp_path / 'mean')), logits(mean), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(load(tmp_path / 'lawa')), logits(load(run / 'huggingface' / 'ba8-lawa')))
    scores = {name: read(run / f'huggingface/lm_eval/offline/{name}.json') for name in ('ba8', 'base')}
    assert all(len(each['tasks']) == 4 and not each['missing'] for each in scores.values())
