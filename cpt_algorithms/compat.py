# SPDX-License-Identifier: Apache-2.0
"""All that depends on the release of another package: the symptom, the releases, and the remedy of each.

Composer 0.32 and llm-foundry 0.22 are of mid-2025 and run beside later releases of torch and transformers but for a few
functions. Each is mended when its module is imported, whoever imports it first, so nothing here takes time. The package
itself asks for this; so does an entry point that llm-foundry loads for every training, whatever its YAML names.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

from wrapt import when_imported

__all__ = [
    'CURRENT_ONLY',
    'MENDED',
    'NUMPY_CORES',
    'PATH_MODULES',
    'SETTINGS_OF_ALL',
    'WEIGHTS_DTYPE',
    'as_given',
    'rope_validation',
    'weights_dtype_key',
    'why_unknown',
]

# numpy 2 moved it; a checkpoint may be of either
NUMPY_CORES = ('core', '_core')
# Python 3.13 moved the classes of paths, and a checkpoint's metadata names them; 3.14 moved them back
PATH_MODULES = ('pathlib', 'pathlib._local')
# What config.json calls the type of the weights: transformers before 4.56, and since.
WEIGHTS_DTYPE = ('torch_dtype', 'dtype')

# What every configuration had before transformers 5, so that each checkpoint's has it.
SETTINGS_OF_ALL = frozenset(
    """
    add_cross_attention bad_words_ids begin_suppress_tokens bos_token_id cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id is_decoder length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores pad_token_id
    prefix pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript typical_p use_bfloat16
    """.split()
)

# Causal models that transformers 4.57 (the stack `current`) knows and 4.51 (`pinned`) does not.
CURRENT_ONLY = frozenset(
    """
    apertus arcee bitnet blt deepseek_v2 doge dots1 ernie4_5 ernie4_5_moe exaone4 falcon_h1
    flex_olmo gemma3n gemma3n_text glm4_moe gpt_oss granitemoehybrid hunyuan_v1_dense hunyuan_v1_moe
    lfm2 longcat_flash minimax ministral modernbert-decoder olmo3 qwen3_next seed_oss smollm3
    vaultgemma xlstm
    """.split()
)

# each mended function or class, and what is seen without it
MENDED: dict[str, str] = {}


def as_given(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, unchanged: llm-foundry loads every transform for every training, and with it this module."""
    return config


def why_unknown(config: Mapping[str, Any]) -> str | None:
    """Why the installed transformers cannot read a ``config.json``, in one line; None if it is not for its type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get('model_type')
    if kind is None or kind in CONFIG_MAPPING or 'auto_map' in config:  # the first is of no known file
        return None
    others = 'that of STACK=current does' if kind in CURRENT_ONLY else 'nor does that of STACK=current (4.57)'
    return f'transformers {version("transformers")} does not know model_type={kind}; {others} (README, "Two stacks")'


def rope_validation(kind: str) -> Callable[..., Any] | None:
    """The function of transformers that reads the settings of this kind of RoPE; None if it has none."""
    rope: Any = import_module('transformers.modeling_rope_utils')

    if (by_kind := getattr(rope, 'ROPE_VALIDATION_FUNCTIONS', None)) is not None:  # before transformers 5
        return by_kind.get(kind)
    return getattr(rope.RotaryEmbeddingConfigMixin, f'_validate_{kind}_rope_parameters', None)


def weights_dtype_key(config: Mapping[str, Any]) -> str:
    """The key under which this ``config.json`` has the type of its weights."""
    return next((key for key in reversed(WEIGHTS_DTYPE) if key in config), WEIGHTS_DTYPE[0])


def _mends(module: str, name: str, symptom: str) -> Callable[[Callable[[ModuleType], None]], None]:
    """Call the decorated function with ``module`` once somebody has imported it."""

    def register(mend: Callable[[ModuleType], None]) -> None:
        MENDED[name] = symptom
        when_imported(module)(mend)

    return register


@_mends('llmfoundry.models.hf.hf_fsdp', 'hf_get_causal_base_model', 'Unable to find hidden layer of GPTNeoXForCausalLM')
def _(hf_fsdp: ModuleType) -> None:
    """Since transformers 4.56 every model has ``get_decoder``; where none is known, the model answers itself."""
    stock = hf_fsdp.hf_get_causal_base_model

    def hf_get_causal_base_model(model: Any) -> Any:
        found = stock(model)
        return model.base_model if found is model else found

    vars(hf_fsdp)['hf_get_causal_base_model'] = hf_get_causal_base_model


@_mends('llmfoundry.models.mpt.modeling_mpt', 'MPTForCausalLM', "'MPTForCausalLM' object has no attribute 'generate'")
def _(modeling_mpt: ModuleType) -> None:
    """Since transformers 4.50 models do not inherit ``generate``, and are then given a cache that MPT cannot use."""
    from transformers.generation.utils import GenerationMixin

    mpt: Any = modeling_mpt.MPTForCausalLM
    if not issubclass(mpt, GenerationMixin):
        mpt.__bases__ = (*mpt.__bases__, GenerationMixin)
        mpt._supports_default_dynamic_cache = classmethod(lambda cls: False)
    if hasattr(mpt, 'get_expanded_tied_weights_keys'):  # transformers 5 maps tied names, and MPT has no second one
        stock = vars(mpt)['tie_weights']
        prepare = mpt.prepare_inputs_for_generation

        def with_mask(self: Any, input_ids: Any, *arguments: Any, attention_mask: Any = None, **options: Any) -> Any:
            mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
            return prepare(self, input_ids, *arguments, attention_mask=mask, **options)

        for name, value in {
            'prepare_inputs_for_generation': with_mask,
            '_tied_weights_keys': {},
            'all_tied_weights_keys': {},
            'tie_weights': lambda self, **_: stock(self),
        }.items():
            setattr(mpt, name, value)


@_mends('llmfoundry.models.mpt.configuration_mpt', 'MPTConfig', "'MPTConfig' object has no attribute 'pad_token_id'")
def _(configuration_mpt: ModuleType) -> None:
    """Since transformers 5 a configuration has no tokens but those that its class names."""
    if int(version('transformers').partition('.')[0]) >= 5:
        for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
            setattr(configuration_mpt.MPTConfig, name, None)


@_mends(
    'transformers.models.auto.modeling_auto',
    'AutoModelForCausalLM',
    "LlamaForCausalLM.__init__() got an unexpected keyword argument 'use_auth_token'",
)
def _(modeling_auto: ModuleType) -> None:
    """Since transformers 5 what llm-foundry always gives is handed on to the model, where nothing takes it."""
    stock = modeling_auto.AutoModelForCausalLM.from_pretrained

    def from_pretrained(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        kept = {key: value for key, value in options.items() if key not in ('use_auth_token', 'load_in_8bit') or value}
        return stock.__func__(cls, name, *arguments, **kept)

    modeling_auto.AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)


@_mends(
    'llmfoundry.models.utils.meta_init_context',
    'init_on_device',
    "Parameter.__new__() got an unexpected keyword argument '_is_hf_initialized'",
)
def _(meta_init_context: ModuleType) -> None:
    """Since transformers 5 parameters have a mark that they were initialised, which accelerate's function knows."""
    if int(version('transformers').partition('.')[0]) >= 5:
        from accelerate import init_on_device

        vars(meta_init_context)['init_on_device'] = init_on_device


@_mends('torch.optim.lr_scheduler', 'LambdaLR', 'Missing key in checkpoint state_dict: ...LambdaLR._is_initial')
def _(lr_scheduler: ModuleType) -> None:
    """Since torch 2.8 a scheduler's state has a flag of its constructor, which no earlier sharded checkpoint has."""
    stock = lr_scheduler.LambdaLR.state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        return {key: value for key, value in stock(self).items() if key != '_is_initial'}

    lr_scheduler.LambdaLR.state_dict = state_dict


@_mends('composer.trainer.trainer', 'Trainer', 'with dropout, a run resumed within an epoch is not the one left alone')
def _(module: ModuleType) -> None:
    """Composer 0.32 restores random numbers where it skips batches; a dataset that knows its place has none to skip."""
    from composer.utils import reproducibility

    stock = module.Trainer._iter_dataloader

    def restore(trainer: Any, mode: Any) -> None:
        if mode == module.TrainerMode.TRAIN and 'train' in trainer.state.dataset_resumption and trainer._rng_state:
            reproducibility.load_rng_state(trainer._rng_state)
            trainer._rng_state = None

    def batches(trainer: Any, mode: Any) -> Iterator[Any]:
        for batch in stock(trainer, mode):
            restore(trainer, mode)  # as late as where it skips: to make an iterator draws random numbers
            yield batch
        restore(trainer, mode)  # if nothing is left of the epoch

    module.Trainer._iter_dataloader = batches


@_mends(
    'streaming.base.dataset', 'StreamingDataset', 'a run resumed between two epochs reads the order of the last one'
)
def _(module: ModuleType) -> None:
    """Between two epochs Composer counts from the beginning of the next, and Streaming 0.13 is still in the last."""
    stock = module.StreamingDataset.state_dict

    def state_dict(self: Any, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        state = stock(self, num_samples, from_beginning)
        is_between = from_beginning and not num_samples
        return {**state, 'epoch': self.next_epoch, 'sample_in_epoch': 0} if is_between else state

    module.StreamingDataset.state_dict = state_dict


@_mends(
    'composer.trainer._patch_pytorch',
    'patch_unshard_for_automicrobatching',
    "with FSDP1 and device_train_microbatch_size: auto, name 'unshard_with_sync' is not defined",
)
def _(patch_pytorch: ModuleType) -> None:
    """Composer 0.32 has what it looks for with torch before 2.7.1 only."""
    if hasattr(patch_pytorch, 'unshard_with_sync'):
        return
    from composer.utils import dist
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    stock = FlatParamHandle.unshard

    def unshard_with_sync(self: Any) -> None:
        def alloc() -> Any:
            found = type(self)._alloc_padded_unsharded_flat_param(self)
            # a rank that ran out of memory meets the others in these two, as Composer has it
            ran_out, is_alive = (self.flat_param.new_zeros(1).byte() for _ in range(2))
            dist.all_reduce(ran_out, reduce_operation='MAX')
            dist.all_reduce(is_alive, reduce_operation='MIN')
            if ran_out.item():
                raise RuntimeError('CUDA out of memory encountered on a different rank')
            return found

        self._alloc_padded_unsharded_flat_param = alloc
        try:
            stock(self)
        finally:
            del self._alloc_padded_unsharded_flat_param

    vars(patch_pytorch).update(original_unshard=stock, unshard_with_sync=unshard_with_sync)


@_mends('llmfoundry.models.mpt.modeling_mpt', 'PartialLlamaConfig', "MPT with rope_impl: hf: '_create_id_label_maps'")
def _(modeling_mpt: ModuleType) -> None:
    """Since transformers 4.56 a configuration looks at more of itself while it is made than llm-foundry lets it."""
    vars(modeling_mpt)['_ALLOWED_LLAMA_CONFIG_KEYS'] |= {
        '_create_id_label_maps',
        '_attn_implementation',
        '_attn_implementation_internal',
        'sub_configs',
    }


@_mends('transformers.activations', 'XIELUActivation', 'Apertus: FSDP expects uniform original parameter dtype')
def _(activations: ModuleType) -> None:
    """In transformers 4.57 its parameters are bfloat16 in a model of any type."""
    if not hasattr(activations, 'XIELUActivation'):
        return
    import torch

    stock = activations.XIELUActivation.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        stock(self, *arguments, **{'dtype': torch.get_default_dtype(), **options})

    activations.XIELUActivation.__init__ = init


@_mends(
    'transformers.tokenization_utils_base',
    'PreTrainedTokenizerBase',
    'a cached tokenizer of more than 100,000 tokens asks the network, and is said to be wrong',
)
def _(tokenization_utils_base: ModuleType) -> None:
    """Since 4.57.3 transformers asks the hub whether a large tokenizer is one of Mistral's, unless it is told."""
    base, name = tokenization_utils_base.PreTrainedTokenizerBase, '_patch_mistral_regex'
    if (stock := getattr(base, name, None)) is None:
        return

    def patch(cls: Any, tokenizer: Any, *arguments: Any, fix_mistral_regex: Any = None, **options: Any) -> Any:
        if fix_mistral_regex is None and 'fix_mistral_regex' not in (options.get('init_kwargs') or {}):
            return tokenizer
        return stock.__func__(cls, tokenizer, *arguments, fix_mistral_regex=fix_mistral_regex, **options)

    setattr(base, name, classmethod(patch))


@_mends(
    'composer.utils.checkpoint',
    'dist_cp_load',
    "a sharded checkpoint of the other stack's transformers: Missing key ...huggingface.model.config.content.dtype",
)
def _(checkpoint: ModuleType) -> None:
    """Composer asks for every setting and token that today's model would save, and then reads none of it."""
    stock = checkpoint.dist_cp_load

    def dist_cp_load(state_dict: dict[str, Any], *arguments: Any, **options: Any) -> None:
        for key in ('integrations', 'metadata'):
            (state_dict.get('state') or {}).pop(key, None)
        stock(state_dict, *arguments, **options)

    vars(checkpoint)['dist_cp_load'] = dist_cp_load


@_mends(
    'torch.distributed.checkpoint.metadata',
    'TensorProperties',
    'a sharded checkpoint of a later torch: too many values to unpack (expected 5)',
)
def _(metadata: ModuleType) -> None:
    """In torch 2.15 its state ends with strides, which no reader needs."""
    if 'strides' in metadata.TensorProperties.__dataclass_fields__:
        return
    stock = metadata.TensorProperties.__setstate__

    def __setstate__(self: Any, state: tuple[Any, ...]) -> None:
        stock(self, state[:5])

    metadata.TensorProperties.__setstate__ = __setstate__


@_mends('wandb.sdk.wandb_run', 'Run', "'Run' object has no attribute 'get_url'")
def _(wandb_run: ModuleType) -> None:
    """Composer's logger asks a run for its address in a way that wandb has given up."""
    if not hasattr(wandb_run.Run, 'get_url'):
        wandb_run.Run.get_url = lambda self: self.url
