# SPDX-License-Identifier: Apache-2.0
"""Real Hugging Face models are updated: GPT-NeoX and Llama as bases, through stages, averages, exports and lm-eval."""

import json
import os
import shutil

import average_checkpoints
import evaluate
import prepare_data
import pytest
import recorder
import tiny
import torch
from pretrained import LONG, SIZES, load, logits, loss_by_hand, make, of_checkpoint, read, stage
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)

from cpt_algorithms.checkpoints.exports import PretrainedModel, folder_of_pretrained, parent_of
from cpt_algorithms.report.page import write_report
from cpt_algorithms.report.run_records import read_runs
from cpt_algorithms.report.tables import rows_of
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.record import read_record
from cpt_algorithms.stage.restart_checks import write_record
from cpt_algorithms.stage.stage import Stage

# of parameters in two types, unless compat.py mends it
SPLIT = ['apertus'] if 'apertus' in CONFIG_MAPPING else []


@pytest.fixture(scope='module')
def bases(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('bases')
    kinds = ('neox', 'llama', 'tied_llama', 'qwen3', *SPLIT)
    return {kind: make(kind, folder, data['tokenizer']) for kind in kinds}


# A stage from a base, in this process

of_llama = pytest.mark.parametrize(
    'updated', [pytest.param('neox', marks=pytest.mark.slow), 'tied_llama'], indirect=True
)


@pytest.fixture(scope='module', params=['neox', 'tied_llama', pytest.param('llama', marks=pytest.mark.slow)])
def updated(request, bases, data, offline, tmp_path_factory):
    """The kind, and the folder with the finished run ``update`` of it."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = stage(folder, data, 'update', bases[request.param], variables={'lm_eval': offline})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.recipe_here(cfg, folder)
    return request.param, folder


def test_the_untouched_base_is_the_parent(updated, bases, data):
    kind, folder = updated
    judged, lineage = read(folder / 'update' / 'forgetting.json'), read(folder / 'update' / 'stage.json')
    tokenizer = AutoTokenizer.from_pretrained(bases[kind])
    for label, name in (('fresh', 'new'), ('past', 'old')):
        by_hand = loss_by_hand(load(bases[kind]), data[name], tokenizer)
        assert judged['parent'][label] == pytest.approx(by_hand, rel=1e-5)
    losses = read(folder / 'update' / 'losses.json')
    assert losses['losses']['past'][0] == [0, 0, judged['parent']['past']]
    assert losses['final']['fresh']['mean'] != judged['parent']['fresh']
    assert lineage['parent'] == str(bases[kind])
    assert parent_of(folder / 'update') == PretrainedModel(str(bases[kind]), folder / 'update' / 'huggingface')
    first = recorder.read(folder / 'update.jsonl')[0]
    assert first['lr'] == [5e-3 * 0.25] and first['adam_step'] == 0
    rows = [row[0] for line in recorder.read(folder / 'update.jsonl').values() for row in line['rows']]
    assert rows.count(1) == 16, 'a quarter of 64 rows is replay'


def test_the_export_is_the_checkpoint(updated, bases):
    kind, folder = updated
    run = folder / 'update'
    exported = load(run / 'huggingface' / 'ba8')
    trained = of_checkpoint(run / 'ep0-ba8-rank0.pt', bases[kind])
    assert torch.equal(logits(exported), logits(trained))
    assert not torch.equal(logits(exported), logits(load(bases[kind])))
    assert (exported.lm_head if kind != 'neox' else exported.embed_out).weight.data_ptr() == (
        exported.get_input_embeddings().weight.data_ptr()
    ) or kind != 'tied_llama'
    for name in ('ema_2ba', 'lawa'):
        assert not torch.equal(logits(load(run / 'huggingface' / f'ba8-{name}')), logits(exported))
    assert exported.config.model_type == ('gpt_neox' if kind == 'neox' else 'llama')
    again = AutoTokenizer.from_pretrained(run / 'huggingface' / 'ba8')
    assert again.get_vocab() == AutoTokenizer.from_pretrained(bases[kind]).get_vocab()


def test_checkpoints_average_to_what_transformers_loads(updated, bases, tmp_path):
    kind, folder = updated
    run = folder / 'update'
    average_checkpoints.main([str(run), '--last', '3', '--to', 'hf', '--out', str(tmp_path / 'hf')])
    average_checkpoints.main([str(run), '--last', '3', '--to', 'pt', '--out', str(tmp_path / 'mean.pt')])
    average_checkpoints.main([str(run / 'ep0-ba8-rank0.pt'), '--average', 'lawa', '--out', str(tmp_path / 'lawa')])
    states = [of_checkpoint(run / f'ep0-ba{batch}-rank0.pt', bases[kind]).state_dict() for batch in (4, 6, 8)]
    by_hand = of_checkpoint(run / 'ep0-ba8-rank0.pt', bases[kind])
    by_hand.load_state_dict({name: sum(state[name] for state in states) / 3 for name in states[0]})
    torch.testing.assert_close(logits(load(tmp_path / 'hf')), logits(by_hand), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(load(tmp_path / 'hf')), logits(of_checkpoint(tmp_path / 'mean.pt', bases[kind])))
    assert torch.equal(logits(load(tmp_path / 'lawa')), logits(load(run / 'huggingface' / 'ba8-lawa')))
    # and of exports; base and update are of one kind, too
    average_checkpoints.main(
        [str(bases[kind]), str(run / 'huggingface' / 'ba8'), '--to', 'pt', '--out', str(tmp_path / 'soup.pt')]
    )
    both = [load(path).state_dict() for path in (bases[kind], run / 'huggingface' / 'ba8')]
    by_hand.load_state_dict({name: (both[0][name] + both[1][name]) / 2 for name in both[0]})
    assert torch.equal(logits(of_checkpoint(tmp_path / 'soup.pt', bases[kind])), logits(by_hand))


@of_llama
def test_a_second_stage_reads_no_base(updated, bases, data, tmp_path):
    """From the average of the first one; of the base only its configuration is needed."""
    kind, folder = updated
    average_checkpoints.main([str(folder / 'update'), '--last', '3', '--to', 'pt', '--out', str(tmp_path / 'mean.pt')])
    shutil.copytree(bases[kind], tmp_path / 'base')
    (tmp_path / 'base' / 'model.safetensors').unlink()
    cfg = stage(
        tmp_path, data, 'second', tmp_path / 'base', load_path=str(tmp_path / 'mean.pt'), max_duration='2ba',
        scheduler={'t_warmup': '1ba'}, callbacks={'final_loss': {'window': '2ba', 'interval': '1ba'}},
    )  # fmt: skip
    tiny.recipe_here(cfg, tmp_path)
    judged, lineage = read(tmp_path / 'second' / 'forgetting.json'), read(tmp_path / 'second' / 'stage.json')
    tokenizer = AutoTokenizer.from_pretrained(bases[kind])
    parent = of_checkpoint(tmp_path / 'mean.pt', bases[kind])
    assert judged['parent']['past'] == pytest.approx(loss_by_hand(parent, data['old'], tokenizer), rel=1e-5)
    assert lineage['parent'] == str(tmp_path / 'mean.pt')
    assert lineage['config']['model']['pretrained'] is False and lineage['pretrained_model'] is None


def main(*arguments):
    """The exit status of scripts/evaluate.py."""
    try:
        evaluate.main([*map(str, arguments), '--device', 'cpu'])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_lm_eval_compares_with_the_base(updated, bases, offline, tmp_path, capsys):
    kind, folder = updated
    results = folder / 'update' / 'huggingface' / 'lm_eval' / 'offline'
    assert sorted(path.stem for path in results.iterdir()) == ['ba8', 'ba8-ema_2ba', 'ba8-lawa', 'base']
    found = {name: read(results / f'{name}.json') for name in ('ba8', 'base')}
    assert found['base']['model'] == str(bases[kind])
    assert len(found['base']['tasks']) == 4 and not found['base']['missing']
    key = 'python bits per byte'
    assert found['ba8']['tasks'][key]['score'] != found['base']['tasks'][key]['score']
    assert not (bases[kind].parent / 'lm_eval').exists(), 'nothing is written beside the base'
    report = write_report([folder / 'update'], tmp_path / 'report')
    [row, *averages] = report.rows
    assert {row.kind, *(each.kind for each in averages)} == {'update'} and len(averages) == 2
    assert {'forgetting', 'adaptation'} <= row.columns.keys() and 'compute vs union' not in row.columns
    delta = next(scores for scores in report.scores if scores.row is row).deltas[key]
    assert delta.value == pytest.approx(found['ba8']['tasks'][key]['score'] - found['base']['tasks'][key]['score'])
    assert report.study.missing_parents == {}
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert str(bases[kind]) in page and 'stands in for what it was trained on' in page


@of_llama
def test_a_sequence_from_a_base(updated, bases, tmp_path):
    """Its first stage is an update, compared with the base; what training on everything would cost is not known."""
    kind, folder = updated
    shutil.copytree(folder / 'update', tmp_path / 'first-s17')
    common = {'arm': 'replay', 'seed': 17, 'tokens': {'new': 768, 'old': 256}, 'tokens_before_branch': {}, 'batches': 8}
    common |= {'plan': 'p', 'judged_by': read_record(str(tmp_path / 'first-s17')).config.judged_by}
    runs = [
        {'name': 'first-s17', 'stage': 'first', 'parent': None, **common},
        {'name': 'second-s17', 'stage': 'second', 'parent': 'first-s17', **common},
    ]
    plan = {'plan': 'p', 'plans': {'p': {'tokens': {'first': 1024, 'second': 1024}}}}
    sequence = {'name': 'x', 'data': ['fresh', 'past'], **plan, 'runs': runs}
    (tmp_path / 'sequence.json').write_text(json.dumps(sequence))
    study = read_runs([tmp_path])
    row = next(row for row in rows_of(study) if row.arm == 'first only' and not row.average)
    assert row.kind == 'update' and 'compute vs union' not in row.columns
    assert {'forgetting', 'adaptation'} <= row.columns.keys()
    assert row.runs[0].began_from == str(bases[kind])


@of_llama
def test_runs_of_one_base_measure_it_once(updated, offline, bases, data, tmp_path, monkeypatch, capsys):
    kind, folder = updated
    shutil.copytree(folder / 'update', tmp_path / 'one')
    shutil.copytree(folder / 'update', tmp_path / 'two')
    shutil.rmtree(tmp_path / 'two' / 'huggingface' / 'lm_eval')
    from cpt_algorithms.evaluation import lm_eval

    ran = []
    original = lm_eval._run
    monkeypatch.setattr(lm_eval, '_run', lambda *given: ran.append(given) or original(*given))
    assert main(tmp_path / 'two', '--suite', *offline) == 0
    assert len(ran) == 3 * 4, 'the run and its averages, not the base'
    assert capsys.readouterr().out.count('against') == 3
    base = 'huggingface/lm_eval/offline/base.json'
    assert read(tmp_path / 'two' / base)['tasks'] == read(tmp_path / 'one' / base)['tasks']


# What is refused


def test_what_is_right_passes(bases, data, tmp_path):
    for kind, base in bases.items():
        preflight(Stage.from_yaml(stage(tmp_path, data, kind, base)))
    overridden = {'model': {'config_overrides': {'attention_dropout': 0.1}, 'use_flash_attention_2': True}}
    preflight(Stage.from_yaml(tiny.merge(stage(tmp_path, data, 'run', bases['neox']), overridden)))
    scratch = {
        'model': {'pretrained': False, 'config_overrides': {'num_hidden_layers': 1}},
        'callbacks': {'forgetting': None},
    }
    preflight(Stage.from_yaml(tiny.merge(stage(tmp_path, data, 'run', bases['llama']), scratch)))


def test_bases_as_they_are_published_pass(bases, data, tmp_path):
    """With the buffers that Pythia's files hold, without the prefix as GPT-2's, in several files, or as pickles."""
    whole = load_file(bases['neox'] / 'model.safetensors')
    mask = torch.ones(1, 1, tiny.SEQ_LEN, tiny.SEQ_LEN, dtype=torch.bool)
    of_layer = {'bias': mask, 'masked_bias': torch.tensor(-1e9), 'rotary_emb.inv_freq': torch.ones(1)}
    buffers = {
        f'gpt_neox.layers.{layer}.attention.{name}': value.clone()
        for layer in (0, 1)
        for name, value in of_layer.items()
    }
    published = {name: tmp_path / 'published' / name for name in ('pythia', 'without_prefix', 'in_parts', 'pickled')}
    for name, folder in published.items():
        shutil.copytree(bases['tied_llama' if name == 'without_prefix' else 'neox'], folder)
        (folder / 'model.safetensors').unlink()
    save_file(whole | buffers, published['pythia'] / 'model.safetensors', {'format': 'pt'})
    load(bases['tied_llama']).model.save_pretrained(published['without_prefix'])
    load(bases['neox']).save_pretrained(published['in_parts'], max_shard_size='20KB')
    torch.save(whole, published['pickled'] / 'pytorch_model.bin')
    for name, folder in published.items():
        preflight(Stage.from_yaml(stage(tmp_path, data, name, folder)))
    assert (published['in_parts'] / 'model.safetensors.index.json').exists()
    assert 'embed_tokens.weight' in load_file(published['without_prefix'] / 'model.safetensors')


BAD = {
    'forgetting from scratch': ({'pretrained': False}, 'callbacks.forgetting compares with the parent, and load_path is missing: name the checkpoint the stage starts from, or a model with pretrained: true'),
    'adapters': ({'peft_config': {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM'}}, 'model.peft_config: what is trained, averaged and exported here are whole models'),
    'an adapter': ({'pretrained_lora_id_or_path': 'somewhere'}, 'model.pretrained_lora_id_or_path: what is trained'),
    'quantized': ({'load_in_8bit': True}, 'model.load_in_8bit: what is trained'),
    'more layers': ({'config_overrides': {'num_hidden_layers': 3}}, "model.config_overrides={'num_hidden_layers': 3} does not fit the pretrained "),
    'fewer layers': ({'config_overrides': {'num_hidden_layers': 1}}, 'model.layers.1.'),
    'more tokens': ({'config_overrides': {'vocab_size': 260}}, 'model.model.embed_tokens.weight is (256, 32) there and (260, 32) here'),
    'untied': ({'config_overrides': {'tie_word_embeddings': False}}, 'lm_head.weight would be left at random'),
    'no such base': ({'pretrained_model_name_or_path': 'nobody/nothing'}, 'model.pretrained_model_name_or_path=nobody/nothing: its configuration cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_what_would_not_be_the_base_is_refused(case, bases, data, tmp_path):
    change, message = BAD[case]
    found = tiny.problems(tiny.merge(stage(tmp_path, data, 'bad', bases['tied_llama']), {'model': change}))
    assert any(message in problem for problem in found), found
    assert len(found) == 1, found


def test_a_base_that_is_not_whole_is_refused(bases, data, tmp_path):
    base = tmp_path / 'base'
    shutil.copytree(bases['neox'], base)
    cfg = stage(tmp_path, data, 'run', base)
    config = read(base / 'config.json')
    (base / 'config.json').write_text(json.dumps({**config, 'num_hidden_layers': 3}))
    [found] = tiny.problems(cfg)
    assert f'{base}' in found and 'gpt_neox.layers.2.' in found and 'would be left at random' in found
    (base / 'config.json').write_text(json.dumps({**config, 'num_hidden_layers': 1}))
    [found] = tiny.problems(cfg)
    assert 'gpt_neox.layers.1.' in found and 'would be dropped' in found
    (base / 'config.json').write_text(json.dumps(config))
    (base / 'training_args.bin').write_bytes(b'')  # which the trainer of transformers leaves
    (base / 'config.json').write_text(json.dumps({**config, 'vocab_size': 300}))
    [found] = tiny.problems(cfg)
    assert 'gpt_neox.embed_in.weight has another shape than it says' in found
    (base / 'config.json').write_text(json.dumps({**config, 'quantization_config': {'quant_method': 'mxfp4'}}))
    [found] = tiny.problems(cfg)
    assert f'={base} is quantized (quantization_config in its config.json)' in found
    (base / 'config.json').write_text(json.dumps(config))
    (base / 'model.safetensors').unlink()
    [found] = tiny.problems(cfg)
    assert f'{base} is no checkpoint' in found
    later = Stage.from_yaml({**cfg, 'load_path': 'later.pt'})
    preflight(later, parent_is_there=False)  # which reads no base
    assert Stage.from_yaml(cfg).pretrained_model == str(base) and later.pretrained_model is None


def test_a_tokenizer_that_is_not_the_bases_is_refused(bases, data, tmp_path):
    base = tmp_path / 'base'
    shutil.copytree(bases['llama'], base)
    cfg = stage(tmp_path, data, 'run', base)
    tokenizer = read(base / 'tokenizer.json')
    tokenizer['model']['merges'].pop()
    (base / 'tokenizer.json').write_text(json.dumps(tokenizer))
    [found] = tiny.problems(cfg)
    assert 'is not the tokenizer of the parent, model.pretrained_model_name_or_path' in found
    for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
        (base / name).unlink()
    [found] = tiny.problems(cfg)
    assert f'{base} has no tokenizer that can be loaded' in found
    small = make('llama', tmp_path / 'small', data['tokenizer'], vocab_size=250)
    [found] = tiny.problems(stage(tmp_path, data, 'run', small))
    assert (
        'has 256 tokens, more than the 250 of the model: set model.allow_embedding_resizing: true, or name the' in found
    )


def test_several_ranks_cannot_begin_on_the_meta_device(bases, data, tmp_path):
    cfg = stage(
        tmp_path, data, 'run', bases['neox'], model={'init_device': 'meta'}, fsdp_config={'state_dict_type': 'full'}
    )
    [found] = tiny.problems(cfg)
    assert 'model.init_device=meta, and the weights of' in found and 'use mixed' in found


def test_the_base_is_evaluated_again_if_it_has_changed(bases, data, tmp_path):
    shutil.copytree(bases['neox'], tmp_path / 'base')
    cfg, run = Stage.from_yaml(stage(tmp_path, data, 'run', tmp_path / 'base')), tmp_path / 'run'
    run.mkdir()
    losses = run / 'forgetting.json'

    def kept(cfg):
        """Whether losses of a start that was stopped before its first checkpoint are still those of the parent."""
        losses.write_text('{}')
        for path in (tmp_path / 'base', *(tmp_path / 'base').iterdir()):
            os.utime(path, (1, 1))
        change()
        write_record(cfg)
        return losses.exists()

    change = lambda: None  # noqa: E731
    assert not kept(cfg), 'nothing is known of the start that wrote it'
    assert kept(cfg)
    weights = tmp_path / 'base' / 'model.safetensors'
    change = lambda: weights.write_bytes(weights.read_bytes()[:-1] + b'!')  # noqa: E731
    assert not kept(cfg), 'the weights were replaced'
    change = lambda: None  # noqa: E731
    assert not kept(cfg.but(seed=3)), 'another run'
    shutil.rmtree(tmp_path / 'base')
    losses.write_text('{}')
    write_record(cfg.but(seed=3))
    assert not losses.exists()


def test_a_base_of_the_hub_is_looked_for_in_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / 'models--some--llama' / 'snapshots' / 'abc'
    snapshot.mkdir(parents=True)
    (tmp_path / 'models--some--llama' / 'refs').mkdir()
    (tmp_path / 'models--some--llama' / 'refs' / 'main').write_text('abc')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    assert folder_of_pretrained('some/llama') == snapshot
    with pytest.raises(ValueError, match='some/other is neither a folder nor in the cache of the Hugging Face hub'):
        folder_of_pretrained('some/other')
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'stage.json').write_text(json.dumps({'parent': 'some/other', 'pretrained_model': 'some/other'}))
    with pytest.raises(ValueError, match='some/other is neither'):
        parent_of(run)


# Several ranks, kills, real text


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'device'), [('neox', 'cpu'), *((each, 'mixed') for each in ('tied_llama', 'qwen3', *SPLIT))]
)
def test_two_ranks_update_a_base_and_go_on_after_a_kill(kind, device, bases, data, offline, tmp_path):
    sharded = {'fsdp_config': {'state_dict_type': 'sharded'}, 'model': {'init_device': device}, 'save_interval': '3ba'}

    def train(cfg, expect=0):
        return tiny.launch(tiny.RECIPE, tiny.save(cfg, tmp_path / f'{cfg["run_name"]}.yaml'), expect=expect)

    train(stage(tmp_path, data, 'straight', bases[kind], variables={'lm_eval': offline}, **sharded))
    killed = stage(tmp_path, data, 'killed', bases[kind], callbacks={'recorder': {'kill_at': 5}}, **sharded)
    train(killed, expect=tiny.KILLED)
    assert (tmp_path / 'killed' / 'ep0-ba3' / '.metadata').exists()
    train(tiny.merge(killed, {'callbacks': {'recorder': {'kill_at': None}}}))
    for rank in (0, 1):
        straight, resumed = (recorder.read(tmp_path / f'{run}.jsonl', rank) for run in ('straight', 'killed'))
        assert sorted(straight) == list(range(8)) and resumed == straight
    for name in ('ba8', 'ba8-ema_2ba', 'ba8-lawa'):
        exported, again = (load(tmp_path / run / 'huggingface' / name) for run in ('straight', 'killed'))
        assert torch.equal(logits(exported), logits(again))
    judged = [read(tmp_path / run / 'forgetting.json') for run in ('straight', 'killed')]
    assert judged[0] == judged[1]
    tokenizer = AutoTokenizer.from_pretrained(bases[kind])
    by_hand = loss_by_hand(load(bases[kind]), data['old'], tokenizer)
    assert judged[0]['parent']['past'] == pytest.approx(by_hand, rel=1e-5), 'every rank has the weights of the base'
    run = tmp_path / 'straight'
    for to, out in (('hf', 'mean'), ('pt', 'mean.pt'), ('sharded', 'mean_sharded')):
        average_checkpoints.main([str(run), '--last', '2', '--to', to, '--out', str(tmp_path / out)])
    assert torch.equal(logits(load(tmp_path / 'mean')), logits(of_checkpoint(tmp_path / 'mean.pt', bases[kind])))
    assert read(run / 'huggingface' / 'lm_eval' / 'offline' / 'base.json')['model'] == str(bases[kind])
    # the next stage, from the average, at another number of ranks
    second = {'load_path': str(tmp_path / 'mean_sharded'), 'max_duration': '2ba', 'scheduler': {'t_warmup': '1ba'}}
    second['callbacks'] = {'final_loss': {'window': '2ba', 'interval': '1ba'}}
    train(stage(tmp_path, data, 'second', bases[kind], **sharded, **second))
    by_hand = loss_by_hand(load(tmp_path / 'mean'), data['old'], tokenizer)
    assert read(tmp_path / 'second' / 'forgetting.json')['parent']['past'] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kill_at', [1, 5])
def test_one_process_goes_on_after_a_kill(kill_at, bases, data, tmp_path):
    tiny.recipe(stage(tmp_path, data, 'straight', bases['llama']), tmp_path)
    killed = stage(tmp_path, data, 'killed', bases['llama'], callbacks={'recorder': {'kill_at': kill_at}})
    tiny.recipe(killed, tmp_path, expect=tiny.KILLED)
    tiny.recipe(tiny.merge(killed, {'callbacks': {'recorder': {'kill_at': None}}}), tmp_path)
    straight, resumed = (recorder.read(tmp_path / f'{run}.jsonl') for run in ('straight', 'killed'))
    assert sorted(straight) == list(range(8)) and resumed == straight
    assert read(tmp_path / 'straight' / 'forgetting.json') == read(tmp_path / 'killed' / 'forgetting.json')
    for name in ('ba8', 'ba8-ema_2ba', 'ba8-lawa'):
        exported, again = (load(tmp_path / run / 'huggingface' / name) for run in ('straight', 'killed'))
        assert torch.equal(logits(exported), logits(again))


@pytest.mark.slow
def test_from_scratch_to_a_base_to_its_update_on_real_text(data, tmp_path, capsys):
    """What a reader does: a model from its configuration, then an update of it with other text, by the scripts alone."""
    sources = {'python': tiny.ROOT / 'cpt_algorithms', 'prose': tiny.ROOT}
    files = {'python': f'{sources["python"]}/*/*.py', 'prose': f'{sources["prose"]}/cpt_algorithms/*/README.md'}
    common = ['--max-seq-len', str(LONG), '--val-fraction', '0.2']
    prepare_data.main(
        ['--out', str(tmp_path / 'old'), '--dataset', f'python=text:{files["python"]}', '--vocab-size', '400', *common]
    )
    shape = LlamaConfig(
        **SIZES | {'vocab_size': 400, 'max_position_embeddings': LONG, 'eos_token_id': 0}, num_key_value_heads=2
    )
    shape.save_pretrained(tmp_path / 'shape')
    shutil.copytree(tmp_path / 'old' / 'tokenizer', tmp_path / 'shape', dirs_exist_ok=True)

    def on_text(name, base, root, **over):
        dataset = {'max_seq_len': LONG, 'new': {'local': str(tmp_path / root), 'split': 'train'}}
        cfg = stage(
            tmp_path, data, name, base, max_seq_len=LONG, max_duration='60ba', save_interval='20ba',
            eval_interval='1000ba', device_train_microbatch_size=8, **over,
        )  # fmt: skip
        cfg['tokenizer'] = {'name': str(base), 'kwargs': {'model_max_length': LONG}}
        cfg['train_loader']['dataset'] = dataset
        cfg['eval_loader'] = [
            tiny.merge(tiny.eval_loader(label, tmp_path / root / name), {'dataset': {'max_seq_len': LONG}})
            for label, root, name in (('past', 'old', 'python'), ('fresh', 'next', 'prose'))
            if (tmp_path / root).exists()
        ]
        return cfg

    scratch = {'model': {'pretrained': False}, 'callbacks': {'forgetting': None}, 'scheduler': {'t_warmup': '4ba'}}
    tiny.recipe_here(on_text('base', tmp_path / 'shape', 'old/python', **scratch), tmp_path)
    assert read(tmp_path / 'base' / 'stage.json')['parent'] is None
    base = tmp_path / 'base' / 'huggingface' / 'ba60'
    prepare_data.main(['--out', str(tmp_path / 'next'), '--dataset', f'prose=text:{files["prose"]}', '--parent', str(base), '--earlier', str(tmp_path / 'old'), *common])  # fmt: skip
    cfg = on_text('update', base, 'next/prose')
    old = {'local': str(tmp_path / 'old' / 'python'), 'split': 'train', 'stand_in_for': 'all that it has read'}
    cfg['train_loader']['dataset'] |= {'replay': {'fraction': 0.1, 'streams': {'python': old}}, 'max_passes': 20}
    tiny.recipe_here(cfg, tmp_path)
    judged, losses = read(tmp_path / 'update' / 'forgetting.json'), read(tmp_path / 'update' / 'losses.json')
    assert judged['parent']['past'] == pytest.approx(
        read(tmp_path / 'base' / 'losses.json')['losses']['past'][-1][2], rel=1e-5
    )
    assert losses['final']['fresh']['mean'] < judged['parent']['fresh'] - 0.1, 'it learns'
    root = f'variables.root={tmp_path / "suite"}'
    (tmp_path / 'suite' / 'lm_eval').mkdir(parents=True)
    for prepared, name, as_name in (('old', 'python', 'python'), ('next', 'prose', 'cpp')):
        for kind in ('passages', 'continuations'):
            file = tmp_path / prepared / 'lm_eval' / f'{name}_{kind}.jsonl'
            shutil.copy(file, tmp_path / 'suite' / 'lm_eval' / f'{as_name}_{kind}.jsonl')
    average_checkpoints.main([str(tmp_path / 'update'), '--last', '3', '--out', str(tmp_path / 'mean')])
    suite = ('--suite', tiny.ROOT / 'yamls' / 'eval' / 'offline.yaml', root, '--limit', 8)
    capsys.readouterr()
    assert main(tmp_path / 'update', *suite) == 0 and capsys.readouterr().out.count('against') == 3
    assert main(tmp_path / 'mean', *suite, '--parent', base) == 0 and capsys.readouterr().out.count('against') == 1
    found = [
        read(path)
        for path in (
            (tmp_path / 'update' / 'huggingface' / 'lm_eval' / 'offline-limit8' / f'{n}.json') for n in ('ba60', 'base')
        )
    ]
    bits = [each['tasks']['cpp bits per byte']['score'] for each in found]
    assert bits[0] < bits[1], 'and lm-eval sees it'


@pytest.mark.slow
def test_a_base_in_bfloat16_is_trained_in_float32_and_may_be_exported_as_it_was(data, tmp_path):
    base = make('llama', tmp_path, data['tokenizer'], torch.bfloat16)
    folder = str(tmp_path / 'update')
    export = {'hf_checkpointer': {'save_folder': folder, 'save_interval': '1dur', 'precision': 'bfloat16'}}
    tiny.recipe_here(stage(tmp_path, data, 'update', base, callbacks=export), tmp_path)
    in_float32 = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32).eval()
    by_hand = loss_by_hand(in_float32, data['old'], AutoTokenizer.from_pretrained(base))
    judged = read(tmp_path / 'update' / 'forgetting.json')
    assert judged['parent']['past'] == pytest.approx(by_hand, rel=1e-5)
    state = torch.load(tmp_path / 'update' / 'ep0-ba8-rank0.pt', weights_only=False)['state']['model']
    assert {value.dtype for value in state.values()} == {torch.float32}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / 'update' / 'huggingface' / 'ba8', torch_dtype='auto')
    assert exported.dtype == torch.bfloat16
    both = [str(base), str(tmp_path / 'update' / 'huggingface' / 'ba8')]
    average_checkpoints.main([*both, '--to', 'hf', '--out', str(tmp_path / 'soup')])
    assert torch.isfinite(logits(load(tmp_path / 'soup'))).all()
