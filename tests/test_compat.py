# SPDX-License-Identifier: Apache-2.0
"""What other releases of the packages below break is mended, and what of them is private is there."""

import ast
import inspect
import io
import json
import pickle
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.distributed.checkpoint as dcp
from composer.loggers import Logger, WandBLogger
from llmfoundry.models.hf import hf_fsdp
from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
from llmfoundry.models.utils import init_empty_weights
from torch.distributed.checkpoint.metadata import TensorProperties
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

import cpt_algorithms
from cpt_algorithms.checkpoints.open import _MetadataUnpickler, safe_globals
from cpt_algorithms.compat import (
    CURRENT_ONLY,
    MENDED,
    NUMPY_CORES,
    PATH_MODULES,
    WEIGHTS_DTYPE,
    rope_validation,
    weights_dtype_key,
    why_unknown,
)

TRANSFORMERS = int(version('transformers').partition('.')[0])
# Private names of other packages that the library uses or overrides, each with the module that has it.
PRIVATE = {
    '_attn_implementation': 'transformers.configuration_utils',
    '_keys_to_ignore_on_load_unexpected': 'transformers.modeling_utils',
    '_supports_default_dynamic_cache': 'transformers.generation.utils',
    '_extract_param_groups': 'llmfoundry.utils.builders',
    '_read_binary_tokenized_sample': 'llmfoundry.data.text_data',
    '_save_checkpoint': 'llmfoundry.callbacks.hf_checkpointer',
    '_iter_dataloader': 'composer.trainer.trainer',
    '_rng_state': 'composer.trainer.trainer',
    '_get_eval_progress_string': 'composer.loggers.console_logger',
    '_get_progress_string': 'composer.loggers.console_logger',
    '_log_to_console': 'composer.loggers.console_logger',
    '_enqueued_objects': 'composer.loggers.remote_uploader_downloader',
    '_logged_objects': 'composer.loggers.remote_uploader_downloader',
    '_ShardState': 'streaming.base.dataset',
    '_check_and_find_retrying': 'streaming.base.shared.prefix',
    '_download_file': 'streaming.base.stream',
    '_downloader': 'streaming.base.stream',
    '_each_prefix_int': 'streaming.base.shared.prefix',
    '_each_sample_id': 'streaming.base.dataset',
    '_event': 'streaming.base.dataset',
    '_evict_coldest_shard': 'streaming.base.dataset',
    '_get_path': 'streaming.base.shared.prefix',
    '_get_work': 'streaming.base.dataset',
    '_parallel_worker_world': 'streaming.base.dataset',
    '_prepare_shard_part': 'streaming.base.stream',
    '_ready_thread': 'streaming.base.dataset',
    '_resume': 'streaming.base.dataset',
    '_unique_worker_world': 'streaming.base.dataset',
    '_unpack_locals': 'streaming.base.shared.prefix',
    '_MEM_FORMAT_ENCODING': 'torch.distributed.checkpoint.metadata',
    '_StorageInfo': 'torch.distributed.checkpoint.filesystem',
    '_StoragePrefix': 'torch.distributed.checkpoint.filesystem',
    '_foreach_copy_': 'torch',
    '_foreach_lerp_': 'torch',
    '_get_layout': 'torch.serialization',
    '_last_lr': 'torch.optim.lr_scheduler',
    '_spec': 'torch.distributed.tensor._api',
    'FakeTensorMode': 'torch._subclasses.fake_tensor',
    'FlatParamHandle': 'torch.distributed.fsdp._flat_param',
    'compute_local_shape_and_global_offset': 'torch.distributed.tensor._utils',
    'set_element': 'torch.distributed.checkpoint._traverse',
    'tree_leaves': 'torch.utils._pytree',
    '_fd': 'multiprocessing.resource_tracker',
    '_register_atexit': 'threading',
    '_resource_tracker': 'multiprocessing.resource_tracker',
    '_run_exitfuncs': 'atexit',
    '_valid_parameters': 'submitit.slurm.slurm',
}
DOCUMENTED = {'_exit', '_replace'}  # of os, and of every NamedTuple


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.startswith('__')


def names_made_in(tree: ast.AST) -> Iterator[str]:
    """Every function, class, variable and attribute of its own that a file makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ('self', 'cls'):
                yield node.attr


def names_used_in(tree: ast.AST) -> Iterator[str]:
    """Private attributes, and what is imported from other packages under a private name or from a private module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(('cpt_', '__')):
            is_inside = any(map(is_private, node.module.split('.')))
            yield from (alias.name for alias in node.names if is_inside or is_private(alias.name))


def overridden() -> Iterator[str]:
    """Private methods of other packages' classes that a class of ours has anew."""
    for module in [name for name in sys.modules if name.startswith('cpt_algorithms.')]:
        for cls in [each for each in vars(sys.modules[module]).values() if isinstance(each, type)]:
            if cls.__module__ == module:
                for base in cls.__mro__[1:]:
                    if base.__module__.split('.')[0] not in ('cpt_algorithms', 'abc', 'builtins'):
                        yield from filter(
                            is_private, vars(cls).keys() & vars(base).keys() - {'_abc_impl', '_is_protocol'}
                        )


def test_private_names_of_others_are_listed():
    for module in pkgutil.walk_packages(cpt_algorithms.__path__, 'cpt_algorithms.'):
        if not module.name.endswith(('.training_imports', '.spark')):  # which do more than define
            import_module(module.name)
    trees = [ast.parse(path.read_text()) for path in Path(cpt_algorithms.__path__[0]).rglob('*.py')]
    ours = {name for tree in trees for name in names_made_in(tree)}
    used = {name for tree in trees for name in names_used_in(tree)} - ours - DOCUMENTED
    assert used | set(overridden()) == PRIVATE.keys()


def test_private_names_of_others_are_there():
    missing = []
    for name, module in PRIVATE.items():
        found = import_module(module)
        source = getattr(found, '__file__', None)
        if not hasattr(found, name) and name not in set(names_made_in(ast.parse(Path(source).read_text()))):
            missing.append(f'{module} has no {name}')
    assert not missing


# What is mended; each fails without its remedy on the releases that it names


def test_the_blocks_of_a_model_that_is_its_own_decoder_are_found():
    sizes = {'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=16, **sizes))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
    for model, base in ((neox, neox.gpt_neox), (gpt2, gpt2.transformer)):
        assert hf_fsdp.hf_get_causal_base_model(model) is base
        hf_fsdp.prepare_hf_causal_lm_model_for_fsdp(model, 'cpu')


def test_mpt_generates():
    torch.manual_seed(0)
    config = MPTConfig(
        d_model=16, n_heads=2, n_layers=1, max_seq_len=16, vocab_size=32, attn_config={'attn_impl': 'torch'}
    )
    model = MPTForCausalLM(config).eval()
    tokens = torch.tensor([[3, 5, 7]])
    by_hand = tokens
    for _ in range(4):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], dim=1)
    how = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(tokens, generation_config=how).tolist() == by_hand.tolist()


def test_mpt_has_the_tokens_that_every_configuration_had():
    config = MPTConfig()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_a_model_is_not_given_what_is_off(tmp_path):
    """llm-foundry always gives both, and transformers 5 hands them on to the model."""
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', FutureWarning)  # of transformers 4, which takes them
        AutoModelForCausalLM.from_pretrained(tmp_path, use_auth_token=False, load_in_8bit=False)


def test_a_model_that_is_initialised_is_made_without_storage():
    with init_empty_weights():
        module = torch.nn.Module()
        given = torch.nn.Parameter(torch.ones(2))
        if TRANSFORMERS >= 5:
            given._is_hf_initialized = True
        module.register_parameter('weight', given)
    assert module.weight.is_meta


@pytest.mark.parametrize(
    ('kind', 'reads'), [('yarn', 'beta_fast'), ('llama3', 'low_freq_factor'), ('linear', 'factor'), ('other', None)]
)
def test_the_reader_of_a_kind_of_rope(kind, reads):
    reader = rope_validation(kind)
    assert reader is None if reads is None else f"'{reads}'" in inspect.getsource(reader).replace('"', "'")


def test_the_state_of_a_scheduler_is_that_of_every_release():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    state = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch).state_dict()
    assert state.keys() == {
        '_get_lr_called_within_step',
        '_last_lr',
        '_step_count',
        'base_lrs',
        'last_epoch',
        'lr_lambdas',
    } | ({'verbose'} & state.keys())


@pytest.mark.parametrize('module', PATH_MODULES)
def test_paths_in_the_metadata_of_a_sharded_checkpoint(module, tmp_path):
    words = b''.join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, 'PosixPath'))
    code = pickle.PROTO + b'\x04' + words + pickle.STACK_GLOBAL + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.STOP
    assert _MetadataUnpickler(io.BytesIO(code)).load() == PurePosixPath()


def test_metadata_of_a_later_torch():
    of_five = TensorProperties(dtype=torch.bfloat16).__getstate__()[:5]
    found = TensorProperties.__new__(TensorProperties)
    found.__setstate__((*of_five, (2, 1)))
    assert (found.dtype, found.requires_grad) == (torch.bfloat16, False)


@pytest.mark.parametrize('core', NUMPY_CORES)
def test_arrays_in_a_checkpoint(core):
    assert any(isinstance(each, tuple) and each[1].startswith(f'numpy.{core}.') for each in safe_globals())


@pytest.mark.parametrize('key', WEIGHTS_DTYPE)
def test_the_type_of_weights_in_a_configuration(key):
    assert weights_dtype_key({key: 'float32', 'model_type': 'llama'}) == key


@pytest.mark.parametrize('ran_out', [False, True])
def test_ranks_that_look_for_a_microbatch_wait_for_each_other(ran_out, monkeypatch):
    """Between the memory for the gathered parameters and the gathering; on either stack, by whoever defines it."""
    from composer.trainer import _patch_pytorch
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    seen = []

    class Handle:
        flat_param, device = torch.ones(4), 'cpu'

        def needs_unshard(self):
            return True

        def _alloc_padded_unsharded_flat_param(self):
            seen.append('alloc')

        def _all_gather_flat_param(self, found):
            seen.append('gather')

        def _use_unsharded_flat_param(self, found):
            seen.append('use')

    def reduce(tensor, reduce_operation):
        seen.append(reduce_operation)
        tensor.fill_(ran_out)

    monkeypatch.setattr('composer.utils.dist.all_reduce', reduce)
    stock = FlatParamHandle.unshard
    _patch_pytorch.patch_unshard_for_automicrobatching(auto_microbatch_size_found=False)
    try:
        with pytest.raises(RuntimeError, match='CUDA out of memory') if ran_out else nullcontext():
            FlatParamHandle.unshard(Handle())
    finally:
        _patch_pytorch.patch_unshard_for_automicrobatching(auto_microbatch_size_found=True)
    assert FlatParamHandle.unshard is stock
    assert seen == ['alloc', 'MAX', 'MIN', *([] if ran_out else ['gather', 'use'])]


def test_mpt_turns_by_position():
    rope = {
        'rope': True,
        'rope_impl': 'hf',
        'rope_hf_config': {'type': 'no_scaling', 'factor': 1.0},
        'attn_impl': 'torch',
    }
    torch.manual_seed(0)
    model = MPTForCausalLM(
        MPTConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=16, vocab_size=32, attn_config=rope)
    ).eval()
    same = model(torch.tensor([[3, 5, 7, 5]])).logits, model(torch.tensor([[5, 3, 7, 5]])).logits
    assert not torch.allclose(same[0][:, -1], same[1][:, -1])


@pytest.mark.skipif('apertus' not in CONFIG_MAPPING, reason='the other stack knows it')
def test_activations_have_the_type_of_the_model():
    from transformers.activations import ACT2FN

    with torch.device('cpu'):
        assert {each.dtype for each in ACT2FN['xielu'].parameters()} == {torch.float32}


def test_a_large_tokenizer_is_loaded_without_the_network(tmp_path, monkeypatch, caplog):
    """As a name on the hub that is in its cache: transformers 4.57.3 asks the hub about each."""
    vocab = {f't{number}': number for number in range(100_010)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, 't0')))
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama', 'transformers_version': '4.57.6'}))
    monkeypatch.setattr('huggingface_hub.model_info', lambda name: pytest.fail('the hub was asked'))
    with caplog.at_level('WARNING', logger='transformers'):
        found = AutoTokenizer.from_pretrained(tmp_path)
    assert found('t7 t9')['input_ids'] == [7, 9]
    assert 'regex' not in caplog.text


def test_a_run_of_wandb_has_an_address(tmp_path):
    logger = WandBLogger(project='x', init_kwargs={'dir': str(tmp_path), 'mode': 'offline'})
    logger.init(SimpleNamespace(run_name='x'), Logger(SimpleNamespace(run_name='x'), destinations=[]))
    logger.post_close()
    assert logger.run_url is None, 'offline'


def test_a_sharded_checkpoint_need_not_describe_the_model_as_today(monkeypatch):
    from composer.utils import checkpoint

    saved = {'state.model.w': torch.ones(2)}
    asked = {
        'state': {'model': {'w': torch.zeros(2)}, 'integrations': {'huggingface': {'dtype': 'x'}}, 'metadata': {'x': 1}}
    }
    with TemporaryDirectory() as folder:
        dcp.save(saved, checkpoint_id=folder)
        checkpoint.dist_cp_load(asked, storage_reader=dcp.FileSystemReader(folder))
    assert asked['state']['model']['w'].tolist() == [1, 1]


def test_which_stack_knows_a_model(tmp_path):
    known = {kind for kind in CURRENT_ONLY if kind in CONFIG_MAPPING}
    assert known == (CURRENT_ONLY if version('transformers') >= '4.57' else set())
    assert why_unknown({}) is None, 'another check speaks of it'
    assert why_unknown({'model_type': 'llama'}) is None is why_unknown({'model_type': 'x', 'auto_map': {}})
    assert 'nor does that of STACK=current' in why_unknown({'model_type': 'gemma4'})
    if not known:
        assert 'model_type=smollm3; that of STACK=current does' in why_unknown({'model_type': 'smollm3'})


def test_llm_foundrys_own_command_is_mended_too():
    code = """
import sys
from llmfoundry.utils.config_utils import apply_transforms_to_config
assert 'cpt_algorithms' not in sys.modules
apply_transforms_to_config({'global_train_batch_size': 8, 'device_train_microbatch_size': 8}, 'all')
print(*sys.modules['cpt_algorithms.compat'].MENDED)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*MENDED]
