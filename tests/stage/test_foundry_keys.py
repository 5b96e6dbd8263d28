# SPDX-License-Identifier: Apache-2.0
"""What llm-foundry takes is taken: its published keys and documented options; what nothing reads is refused."""

import json
import re
from functools import cache

import pytest
import tiny
import torch
from composer.core import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from llmfoundry import registry
from llmfoundry.models.mpt import ComposerMPTCausalLM
from llmfoundry.utils.builders import _extract_param_groups
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cpt_algorithms.keys_read import keys_read
from cpt_algorithms.replay.replay_text import COLLATOR_KEYS
from cpt_algorithms.stage.foundry_keys import check_model_keys, check_optimizer
from cpt_algorithms.stage.on_meta import model_on_meta
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.stage import Model, Optimizer, Stage
from cpt_algorithms.validation import ConfigError

MPT = {
    'name': 'mpt_causal_lm', 'd_model': 16, 'n_heads': 2, 'n_layers': 2, 'vocab_size': tiny.VOCAB, 'max_seq_len': 16,
    'loss_fn': 'torch_crossentropy', 'attn_config': {'attn_impl': 'torch'}, 'use_train_metrics': False,
}  # fmt: skip


def nested(flat):
    """``{'a.b': 1}`` as ``{'a': {'b': 1}}``."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f'{key}={json.dumps(value)}' for key, value in flat.items()]))


def problems(cfg):
    try:
        preflight(Stage.from_yaml(cfg))
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture(scope='module')
def llama(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('llama')
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(data['tokenizer'])).save_pretrained(folder)
    return str(folder)


# Keys of llm-foundry's scripts/train/yamls/pretrain, and of its documentation, all at once.
PUBLISHED = {
    'eval_first': False, 'eval_subset_num_batches': -1, 'eval_interval': 1, 'progress_bar': False, 'log_to_console': True,
    'console_log_interval': '1ba', 'dist_timeout': 3600, 'expandable_segments': True, 'save_interval': '1000ba',
    'save_num_checkpoints_to_keep': 1, 'python_log_level': 'warning', 'variables.data_local': 'x', 'icl_seq_len': 16,
    'icl_tasks': 'eval/yamls/tasks_v0.2.yaml', 'eval_gauntlet': 'eval/yamls/eval_gauntlet_v0.2.yaml',
    'icl_subset_num_batches': 1, 'metadata.team': 'x', 'accumulate_train_batch_on_tokens': True, 'spin_dataloaders': True,
    'tokenizer.kwargs.model_max_length': 16, 'tokenizer.kwargs.trust_remote_code': False,
    'train_loader.pin_memory': True, 'train_loader.prefetch_factor': 2, 'train_loader.persistent_workers': True,
    'train_loader.timeout': 0, 'train_loader.num_workers': 1,
    'optimizer.eps': 1e-8, 'optimizer.disable_grad': ['wte'],
    'optimizer.param_groups': [{'param_str_match': 'norm', 'lr': 1e-4, 'weight_decay': 0.0}, {'param_str_match': 'ffn'}],
    'algorithms.gradient_clipping.clipping_type': 'norm', 'algorithms.gradient_clipping.clipping_threshold': 1.0,
    'callbacks.speed_monitor.window_size': 10, 'callbacks.lr_monitor': {}, 'callbacks.memory_monitor': {},
    'callbacks.runtime_estimator': {},
    'callbacks.hf_checkpointer': {'overwrite': True, 'precision': 'bfloat16', 'save_folder': './{run_name}/checkpoints',
                                  'save_interval': '1dur'},
    'fsdp_config': {
        'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'PURE', 'activation_checkpointing': False,
        'activation_checkpointing_reentrant': False, 'activation_cpu_offload': False, 'limit_all_gathers': True,
        'backward_prefetch': 'BACKWARD_PRE', 'state_dict_type': 'sharded', 'sync_module_states': True, 'verbose': False,
    },
}  # fmt: skip
OF_MPT = {
    'model.init_device': 'meta', 'model.expansion_ratio': 4, 'model.attn_config.attn_uses_sequence_id': True,
    'model.resid_pdrop': 0.1, 'model.emb_pdrop': 0.1, 'model.learned_pos_emb': False, 'model.no_bias': True,
    'model.logit_scale': 'inv_sqrt_d_model', 'model.norm_type': 'layernorm', 'model.norm_eps': 1e-5,
    'model.embedding_fraction': 1.0, 'model.fc_type': 'torch', 'model.tie_word_embeddings': True,
    'model.final_logit_softcapping': 30.0, 'model.master_weights_dtype': 'bfloat16', 'model.head_dim': 8,
    'model.init_config': {'name': 'baseline_', 'init_std': 0.02, 'init_div_is_residual': True, 'emb_init_std': None,
                          'fan_mode': 'fan_in'},
    'model.attn_config.qk_ln': True, 'model.attn_config.clip_qkv': 6, 'model.attn_config.softmax_scale': 0.5,
    'model.attn_config.rope': True, 'model.attn_config.rope_impl': 'hf', 'model.attn_config.rope_theta': 10000,
    'model.attn_config.rope_hf_config': {'type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1, 'high_freq_factor': 4,
                                         'original_max_position_embeddings': 8},
    'model.attn_config.rope_dail_config': {'type': 'original', 'pos_idx_in_fp32': True, 'xpos_scale_base': 512},
    'model.attn_config.attn_type': 'grouped_query_attention', 'model.attn_config.kv_n_heads': 1,
    'model.ffn_config': {'ffn_type': 'mptglu', 'ffn_act_fn': {'name': 'silu'}}, 'model.fuse_norm_attn_norm': False,
    'model.additional_train_metrics': [], 'model.pad_token_id': None,
}  # fmt: skip
OF_HF = {
    'model.pretrained': False, 'model.init_device': 'cpu', 'model.use_auth_token': False, 'model.use_flash_attention_2': False,
    'model.attn_implementation': 'sdpa', 'model.trust_remote_code': False, 'model.use_train_metrics': False,
    'model.allow_embedding_resizing': False, 'model.config_overrides': {
        'max_position_embeddings': 32, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0},
    },
}  # fmt: skip


@pytest.mark.parametrize('loader', ['text', 'replay_text'])
@pytest.mark.parametrize('kind', ['mpt', 'hf'])
def test_published_and_documented_keys_pass(kind, loader, llama, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ('icl_tasks', 'eval_gauntlet'):
        path = tmp_path / PUBLISHED[key]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{key}: []')
    over = nested({**PUBLISHED, **(OF_MPT if kind == 'mpt' else OF_HF)})
    if kind == 'hf':
        over['model'] |= {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': llama}
        over['optimizer']['disable_grad'] = 'embed_tokens'
        over['optimizer']['param_groups'][1]['param_str_match'] = 'mlp'
        over['tokenizer']['name'] = llama
    cfg = tiny.config(tmp_path, data, 'published', **over)
    if kind == 'mpt':  # its vocabulary counts in multiples
        cfg['model'] = {**MPT, **cfg['model'], 'attn_config': {**MPT['attn_config'], **cfg['model']['attn_config']}}
    read_by_collator = {
        'eos_token_id': 200, 'override_eos_token_id_mismatch_error': True, 'override_bos_token_id_mismatch_error': True,
        'seq_parallel_replication': 1, 'mlm_probability': None, 'replication': None, 'token_encoding_type': 'int64',
    }  # fmt: skip
    if kind == 'hf':  # which sees no documents: refused below
        del read_by_collator['eos_token_id']
    dataset = cfg['train_loader']['dataset'] | read_by_collator | {'shuffle_seed': 17}
    if loader == 'text':
        dataset |= {'local': str(data['new']), 'split': 'train', 'remote': None, 'shuffle_algo': 'py1e'}
        del dataset['new']
    cfg['train_loader'] = {**cfg['train_loader'], 'name': loader, 'dataset': dataset}
    evaluated = tiny.eval_loader('a', data['new'])
    evaluated['dataset'] |= read_by_collator
    assert problems({**cfg, 'eval_loader': [evaluated]}) == []


# What llm-foundry takes and we refuse; each is a rule of the stage's card.
REFUSED = {
    'autoresume': ({'autoresume': False}, 'autoresume=false'),
    'save_overwrite': ({'save_overwrite': True}, 'save_overwrite=true'),
    'save_weights_only': ({'save_weights_only': True}, 'save_weights_only=true'),
    'run_name': ({'run_name': None}, 'run_name is missing'),
    'parent without stage_start': ({'load_path': 'x.pt', 'callbacks': {'stage_start': None}}, 'callbacks.stage_start'),
    'adapter': ({'model': {'peft_config': {'peft_type': 'LORA'}}}, 'model.peft_config'),
    'no training': ({'only_hf_checkpoint': True}, 'only_hf_checkpoint=true'),
    'nor this': ({'only_composer_checkpoint': True}, 'only_composer_checkpoint=true'),
    'ranks that read the same': ({'train_loader': {'dataset': {'replication': 2}}}, 'train_loader.dataset.replication=2'),
    "another run's exports": (
        {'callbacks': {'hf_checkpointer': {'save_folder': 'exports', 'save_interval': '1dur'}}}, 'use exports/{run_name}',
    ),
    'scaled at each restart': ({'callbacks': {'global_lr_scaling': {}}}, 'callbacks.global_lr_scaling: each restart'),
    'a state that is not loaded': ({'callbacks': {'dataset_swap': {}}}, 'callbacks.dataset_swap: its state'),
    '8 bits': ({'model': {'load_in_8bit': True}}, 'model.load_in_8bit'),
    'masked tokens': ({'train_loader': {'dataset': {'mlm_probability': 0.15}}}, 'mlm_probability=0.15'),
    'documents that end nowhere': (
        {'model': {'attn_config': {'attn_uses_sequence_id': True}}}, 'train_loader.dataset.eos_token_id is missing',
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_refused_by_a_rule(case, llama, data, tmp_path):
    over, said = REFUSED[case]
    cfg = tiny.merge(tiny.config(tmp_path, data, 'refused'), over)
    if said.startswith('model.'):
        cfg['model'] = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': llama, **over['model']}
    assert any(said in problem for problem in problems(cfg)), problems(cfg)


def test_evaluations_of_a_part_are_of_the_same_rows(data, tmp_path):
    loader = tiny.eval_loader('new', data['new'])
    shuffled = {**loader, 'dataset': {**loader['dataset'], 'shuffle': True}}
    cfg = tiny.config(tmp_path, data, 'run', eval_loader=[shuffled])
    preflight(Stage.from_yaml(cfg))
    cfg['eval_subset_num_batches'] = 1
    assert any('eval_loader[0].dataset.shuffle=true: the 1 batches' in problem for problem in problems(cfg))


def test_exports_elsewhere_have_the_runs_name(data, tmp_path):
    for place in (f'{tmp_path}/exports/{{run_name}}', f'{tmp_path}/run/hf', 's3://bucket/exports'):
        exporter = {'hf_checkpointer': {'save_folder': place, 'save_interval': '1dur'}}
        found = _problems_if_any(tiny.config(tmp_path, data, 'run', callbacks=exporter))
        assert not any('hf_checkpointer.save_folder' in problem for problem in found)


def _problems_if_any(cfg):
    try:
        preflight(Stage.from_yaml(cfg))
    except ValueError as error:
        return str(error).splitlines()
    return []


def test_what_llm_foundry_takes_reaches_it_as_it_does(data, tmp_path):
    """One evaluator without a label is no list to it, and it does not fill in the microbatch."""
    loader = {key: value for key, value in tiny.eval_loader('', data['new']).items() if key != 'label'}
    cfg = tiny.config(tmp_path, data, 'run', eval_loader=loader)
    assert isinstance(Stage.from_yaml(cfg).to_train_yaml()['eval_loader'], dict)
    several = {**cfg, 'eval_loader': [loader, tiny.eval_loader('old', data['old'])]}
    assert len(Stage.from_yaml(several).to_train_yaml()['eval_loader']) == 2, 'none is dropped'
    tiny.run(cfg)
    del cfg['device_train_microbatch_size']
    assert Stage.from_yaml(cfg).to_train_yaml()['device_train_microbatch_size'] == 'auto'


@pytest.mark.parametrize('where', ['train_loader', 'eval_loader[0]'])
def test_a_hugging_face_model_sees_no_documents(where, llama, data, tmp_path):
    loader = tiny.eval_loader('new', data['new'])
    cfg = tiny.config(tmp_path, data, 'run', eval_loader=[loader])
    cfg['model'] = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': llama, 'pretrained': True}
    (cfg['train_loader'] if where == 'train_loader' else loader)['dataset']['eos_token_id'] = 255
    assert any(f'{where}.dataset.eos_token_id: Composer does not give' in problem for problem in problems(cfg))


def test_evaluators_must_see_the_documents_too(data, tmp_path):
    over = {
        'model': {'attn_config': {'attn_uses_sequence_id': True}},
        'train_loader': {'dataset': {'eos_token_id': 255}},
    }
    loaders = [tiny.eval_loader('a', data['new']), tiny.eval_loader('b', data['old'])]
    loaders[0]['dataset']['eos_token_id'] = 255
    found = problems(tiny.config(tmp_path, data, 'documents', eval_loader=loaders, **over))
    assert len(found) == 1 and found[0].startswith('eval_loader[1].dataset.eos_token_id is missing')
    loaders[1]['dataset']['bos_token_id'] = 1
    loaders[1]['dataset']['override_bos_token_id_mismatch_error'] = True
    assert problems(tiny.config(tmp_path, data, 'documents', eval_loader=loaders, **over)) == []


def tasks(*labels):
    return [
        {'label': label, 'dataset_uri': 'x', 'num_fewshot': [0, 1], 'icl_task_type': 'language_modeling'}
        for label in labels
    ]


@pytest.mark.parametrize(
    ('labels', 'icl', 'said'),
    [
        (['a', 'a'], [], "'a'"), (['a', 'b', 'a'], ['c'], "'a'"), (['a'], ['q', 'q'], "'q/0-shot'"),
        (['q/1-shot'], ['q'], "'q/1-shot'"), (['a', None], [], r'eval_loader\[1\].label is missing'),
        (['a', 'b'], ['a', 'b'], None), ([None], [], None),
    ],
)  # fmt: skip
def test_labels_are_of_one_evaluator(labels, icl, said, data, tmp_path):
    loaders = [tiny.eval_loader(label, data['new']) for label in labels]
    found = problems(tiny.config(tmp_path, data, 'labels', eval_loader=loaders, icl_tasks=tasks(*icl)))
    assert len(found) == (said is not None), found
    if said:
        assert re.search(said, found[0])


@pytest.mark.parametrize(
    ('labels', 'icl', 'said'),
    [(['a'], ['q', 'q'], "'q/0-shot'"), (['q/1-shot'], ['q'], "'q/1-shot'"), (['a'], ['b'], None)],
)
def test_labels_of_tasks_in_a_file(labels, icl, said, data, tmp_path):
    loaders = [tiny.eval_loader(label, data['new']) for label in labels]
    path = tiny.save({'icl_tasks': tasks(*icl)}, tmp_path / 'tasks.yaml')
    cfg = tiny.config(tmp_path, data, 'labels', eval_loader=loaders, icl_tasks=str(path))
    found = problems(cfg)
    assert len(found) == (said is not None), found
    if said:
        assert re.search(said, found[0])
    for content in ('tasks: []', 'icl_tasks: a', '- a', 'a: ['):
        path.write_text(content)
        (found,) = problems(cfg)
        assert found.startswith(f'icl_tasks={path}') and '\n' not in found, found


STOPPER = {'monitor': 'LanguageCrossEntropy', 'dataloader_label': 'eval/a'}
# What Composer drops, looks for at the first evaluation, or refuses on several ranks only.
LATE = {
    'a key of FSDP': ({'fsdp_config': {'sharding_strateg': 'FULL_SHARD'}}, "fsdp_config.sharding_strateg .* 'sharding_strategy'"),
    'a strategy': ({'fsdp_config': {'sharding_strategy': 'FULL'}}, "fsdp_config.sharding_strategy='FULL' .*FULL_SHARD"),
    'a precision': ({'fsdp_config': {'mixed_precision': 'HALF'}}, "fsdp_config.mixed_precision='HALF'"),
    'checkpoints': ({'fsdp_config': {'state_dict_type': 'local'}}, "fsdp_config.state_dict_type='local'"),
    'a metric': ({'callbacks': {'early_stopper': {'monitor': 'Loss', 'dataloader_label': 'eval/a'}}}, "early_stopper.monitor='Loss'"),
    'of training': ({'callbacks': {'early_stopper': {'monitor': 'LanguageCrossEntropy', 'dataloader_label': 'train'}}}, 'early_stopper.monitor='),
    'an evaluator': ({'callbacks': {'early_stopper': {'monitor': 'LanguageCrossEntropy', 'dataloader_label': 'a'}}}, "dataloader_label='a'.* eval/a"),
    'the highest loss': ({'callbacks': {'early_stopper': STOPPER}}, 'early_stopper.comp is missing, .*; use comp: less'),
    'no comparison': ({'callbacks': {'early_stopper': {**STOPPER, 'comp': 'min'}}}, "early_stopper.comp='min'"),
    'a patience': ({'callbacks': {'early_stopper': {**STOPPER, 'comp': 'less', 'patience': '9tok'}}}, "early_stopper.patience='9tok' .* in ba or ep"),
    'no checkpoint': ({'save_num_checkpoints_to_keep': 0}, 'save_num_checkpoints_to_keep=0'),
    'no interval': ({'save_interval': '0ba'}, "save_interval='0ba'"),
    'a unit': ({'console_log_interval': '10tok'}, "console_log_interval='10tok' .* in ba or ep"),
    'weights from elsewhere': ({'callbacks': {'load_checkpoint': {'load_path': 'x'}}}, 'callbacks.load_checkpoint .* load_path'),
    'a memory': ({'callbacks': {'kill_loss_spike': {'log_only': False}}}, 'kill_loss_spike.log_only=false: .* leave log_only out'),
    'a file': ({'icl_tasks': 'no/tasks.yaml'}, "icl_tasks='no/tasks.yaml'"),
}  # fmt: skip


@pytest.mark.parametrize('case', LATE)
def test_what_would_be_seen_late_is_seen_at_once(case, data, tmp_path):
    over, said = LATE[case]
    loaders = [tiny.eval_loader(label, data['new']) for label in 'ab']
    (found,) = problems(tiny.config(tmp_path, data, 'late', eval_loader=loaders, **over))
    assert re.search(said, found), found


def test_an_early_stopper_of_what_is_measured_passes(data, tmp_path):
    loaders = [tiny.eval_loader(label, data['new']) for label in 'ab']
    for over in ({'patience': '2ba', 'comp': 'LT'}, {'monitor': 'LanguagePerplexity', 'patience': 2}):
        stopper = {'early_stopper': {**STOPPER, **over}}
        assert problems(tiny.config(tmp_path, data, 'stop', eval_loader=loaders, callbacks=stopper)) == []


# typing errors and keys in a wrong place; every one was silently dropped
WRONG = {
    'a letter': ({'resid_pdrpo': 0.1}, 'model.resid_pdrpo', "'resid_pdrop'"),
    'of init_config': ({'init_config': {'naame': 1}}, 'model.init_config.naame', "'name'"),
    'of its function': ({'init_config': {'init_std': 0.02}}, 'model.init_config.init_std', 'kaiming_normal_'),
    'its function': ({'init_config': {'name': 'kaiming'}}, "init_config.name='kaiming'", 'kaiming_'),
    'of a section': ({'attn_impl': 'torch'}, 'model.attn_impl'),
    'of another section': ({'init_config': {'resid_pdrop': 0.1}}, 'model.init_config.resid_pdrop'),
    'of rope': ({'attn_config': {'rope_hf_config': {'type': 'linear', 'factr': 2.0}}}, 'rope_hf_config.factr', "'factor'"),
    'of another rope': (
        {'attn_config': {'rope_hf_config': {'type': 'linear', 'factor': 2.0, 'low_freq_factor': 1}}}, 'low_freq_factor',
    ),
    'of dail': ({'attn_config': {'rope_dail_config': {'tpye': 'xpos'}}}, 'rope_dail_config.tpye', "'type'"),
    'no blank': ({'name:hf_causal_lm': None, 'pretrained:true': None}, 'name:hf_causal_lm'),
    'of hf': ({'pretrained': True}, 'model.pretrained'),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_a_key_of_mpt_that_nothing_reads(case):
    over, *words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        check_model_keys(Model.model_validate({**MPT, **over}))
    assert all(word in str(caught.value) for word in words), caught.value


@settings(deadline=None, max_examples=50)
@given(
    section=st.sampled_from(['', 'init_config']),
    key=st.text('abcdeinoprs_', min_size=1, max_size=12),
    value=st.integers(),
)
def test_keys_that_are_taken_change_the_model(section, key, value):
    """A key is refused, or it is an argument of what is built."""
    given = {**MPT, **({'init_config': {key: value}} if section else {key: value})}
    try:
        check_model_keys(Model.model_validate(given))
    except ValueError as error:
        assert key in str(error)
    else:
        model = ComposerMPTCausalLM(**{k: v for k, v in MPT.items() if k != 'name'}, tokenizer=None)
        assert key in model.config.to_dict()


@pytest.mark.parametrize(
    ('overrides', 'said'),
    [
        ({'rope_scaling': {'rope_type': 'linear', 'factr': 2.0}}, 'config_overrides.rope_scaling.factr'),
        ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0, 'beta_fast': 32}}, 'rope_scaling.beta_fast'),
        ({'sep_token_id': {'a': 1}}, 'config_overrides.sep_token_id'),
        ({'id2label': {'a': {'b': 1}}}, 'config_overrides.id2label.a'),
    ],
)
def test_nested_overrides_that_nothing_reads(overrides, said, llama):
    given = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': llama, 'config_overrides': overrides}
    with pytest.raises(ValueError, match=said):
        check_model_keys(Model.model_validate(given))


# Parameter groups and frozen parameters


def optimizer(**given):
    return Optimizer.model_validate({'name': 'decoupled_adamw', 'lr': 1e-3, **given})


@cache
def mpt():
    return model_on_meta(Model.model_validate(MPT))


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        ({'disable_grad': 'wet'}, r"disable_grad='wet' matches no parameter .* model\.transformer\.wte\.weight"),
        ({'disable_grad': ['wte', 'embed']}, "disable_grad='embed' matches no"),
        ({'disable_grad': ['wte', '']}, 'leaves no parameter'),
        ({'disable_grad': 'wte['}, 'is not a regular expression'),
        ({'disable_grad': 3}, 'optimizer.disable_grad=3'),
        ({'param_groups': [{'param_str_match': 'nrom'}]}, r"param_groups\[0\]\.param_str_match='nrom' matches no"),
        ({'param_groups': [{'param_str_match': 'norm'}, {'param_str_match': 'norm_1'}]}, r"\[1\].*'norm_1' matches no"),
        ({'param_groups': [{'param_str_match': 'norm', 'weight_decy': 0}]}, r"\[0\]\.weight_decy .*'weight_decay'"),
        ({'param_groups': [{'lr': 1e-4}]}, r'param_groups\[0\]\.param_str_match is missing'),
        ({'param_groups': [{'param_str_match': 'norm', 'lr': -1.0}], 'name': 'adamw'}, r'param_groups\[0\]=.*-1\.0'),
        ({'param_groups': {'param_str_match': 'norm'}}, 'optimizer.param_groups='),
        ({'betas': [2.0, 0.9], 'name': 'adamw'}, 'optimizer=.*is refused by adamw'),
    ],
)  # fmt: skip
def test_patterns_and_groups_that_are_refused(given, said):
    if given.get('name') == 'adamw' and 'adamw' not in registry.optimizers:
        registry.optimizers.register('adamw', func=torch.optim.AdamW)
    with pytest.raises(ValueError, match=said):
        check_optimizer(optimizer(**given), mpt)


PARTS = ['wte', 'norm', 'attn', 'ffn', 'bias', 'blocks.0', 'blocks.1', 'weight$', 'nothing']


@settings(deadline=None, max_examples=40)
@given(frozen=st.lists(st.sampled_from(PARTS), max_size=2), groups=st.lists(st.sampled_from(PARTS), max_size=3))
def test_what_passes_is_what_llm_foundry_groups(frozen, groups):
    """Judged by its own function, on the real model."""
    given = {'disable_grad': frozen, 'param_groups': [{'param_str_match': part} for part in groups]}
    model = mpt().requires_grad_(True)
    names = {name for name, _ in model.named_parameters()}
    unmatched = [part for part in frozen if not any(re.search(part, name) for name in names)]
    made = list(_extract_param_groups(model, {'lr': 1e-3, **json.loads(json.dumps(given))}))[1:]
    trained = any(each.requires_grad for each in model.parameters())
    is_right = not unmatched and all(list(group['params']) for group in made) and trained
    try:
        check_optimizer(optimizer(**given), mpt)
    except ValueError as error:
        assert not is_right, error
    else:
        assert is_right


def test_a_run_with_groups_and_frozen_parameters_restarts_and_averages(data, tmp_path):
    seen = {}

    class Groups(Callback):
        def batch_start(self, state, logger):
            groups = state.optimizers[0].param_groups
            seen[int(state.timestamp.batch.value)] = [(g['initial_lr'], g['lr'], g['weight_decay']) for g in groups]

        def fit_start(self, state, logger):
            self.before = state.model.model.transformer.wte.weight.clone()

        def fit_end(self, state, logger):
            assert (state.model.model.transformer.wte.weight == self.before).all()

    registry.callbacks.register('groups', func=Groups)
    cfg = tiny.config(
        tmp_path, data, 'run', callbacks={'groups': {}, 'ema': {'half_life': '2ba'}},
        scheduler={'t_max': '8ba'},
        optimizer={'disable_grad': 'wte', 'param_groups': [{'param_str_match': 'norm', 'lr': 1e-4, 'weight_decay': 0.0}]},
    )  # fmt: skip
    assert problems(cfg) == []
    tiny.run({**cfg, 'max_duration': '2ba'})
    tiny.run({**cfg, 'max_duration': '4ba'})
    assert sorted(seen) == [0, 1, 2, 3]
    for (base, now, decay), (base_of_norm, now_of_norm, decay_of_norm) in seen.values():
        assert (base, decay, base_of_norm, decay_of_norm) == (1e-3, 1e-5, 1e-4, 0.0)
        assert now_of_norm == pytest.approx(now / 10)


# Keys from source


def by_helper(config):
    return config['a'], config.get('b', 1), config.pop('c')


def reads(config, other):
    if 'd' in config and 'e' in config.keys():
        del other['x']
    return by_helper(config), other.get('y'), config[other]


def test_keys_of_a_function_and_its_helpers():
    assert keys_read(reads, 'config') == {'a', 'b', 'c', 'd', 'e'}
    assert keys_read(reads, 'other') == {'x', 'y'}
    assert {'override_eos_token_id_mismatch_error', 'eos_token_id', 'mlm_probability'} <= COLLATOR_KEYS
