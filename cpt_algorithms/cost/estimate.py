# SPDX-License-Identifier: Apache-2.0
"""The cost of a run, before it is paid for: FLOPs, GPU-hours, memory and disk. Nothing is trained, no weight is made.

Sources: Kaplan et al. 2020, https://arxiv.org/abs/2001.08361 (6 FLOPs per parameter and token); Chowdhery et al. 2022,
*PaLM*, https://arxiv.org/abs/2204.02311, appendix B (attention, MFU); Rajbhandari et al. 2020, *ZeRO*,
https://arxiv.org/abs/1910.02054 (what is sharded); Korthikanti et al. 2022, *Reducing Activation Recomputation*,
https://arxiv.org/abs/2205.05198 (activations, recomputation).

Everywhere, a ``microbatch`` is the sequences that go through the model at once, a ``length`` the tokens of a sequence,
and ``bytes_each`` those of a number in the forward pass: 2 in mixed precision, 4 in float32.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS
from llmfoundry.models.hf.hf_fsdp import hf_get_causal_base_model, hf_get_hidden_layers
from llmfoundry.utils.builders import build_optimizer
from torch import nn

from cpt_algorithms.duration import Duration
from cpt_algorithms.files import is_remote
from cpt_algorithms.keys_read import keys_read
from cpt_algorithms.stage.on_meta import model_on_meta
from cpt_algorithms.stage.stage import FSDP, Model, Optimizer, Stage

__all__ = ['GPUS', 'Costs', 'Gpu', 'Memory', 'ModelSize', 'costs_of', 'find_gpu', 'measure', 'model_size']

# Chip in Composer's table of dense peaks, with which its MFU is computed too, and memory: the vendor's gigabytes, taken
# as 10^9 bytes. Data sheets: https://www.nvidia.com/en-us/data-center/ (a10, a100, h100, h200).
GPUS: dict[str, tuple[str, int]] = {
    'a10': ('a10', 24),
    'a100-40gb': ('a100', 40),
    'a100': ('a100', 80),
    'h100-pcie': ('h100-pcie', 80),
    'h100': ('h100-sxm', 80),
    'h200': ('h200-sxm', 141),
}
SHARDINGS = ('none', 'NO_SHARD', 'SHARD_GRAD_OP', 'FULL_SHARD')


@dataclass(frozen=True)
class Gpu:
    """A GPU, with its dense FLOP/s in the run's precision and its bytes, None if not known."""

    name: str
    peak: float
    memory: float | None


def find_gpu(gpu: str, precision: str = 'amp_bf16') -> Gpu:
    """A GPU by its name in ``GPUS``, or by its peak FLOP/s; ``precision`` is Composer's name of the run's.

    Raises:
        ValueError: If it is not known, or cannot compute in this precision.
    """
    if gpu in GPUS:
        chip, gigabytes = GPUS[gpu]
        peaks = GPU_AVAILABLE_FLOPS[chip]
        if precision not in peaks:
            raise ValueError(f'gpu={gpu} has no peak for precision={precision}; it has {", ".join(sorted(peaks))}')
        return Gpu(gpu, peaks[precision], gigabytes * 1e9)
    try:
        peak = float(gpu)
    except ValueError:
        peak = math.nan
    if not 0 < peak < math.inf:
        raise ValueError(f"gpu={gpu!r} must be one of {', '.join(GPUS)}, or a peak in FLOP/s such as '989e12'")
    return Gpu(f'{peak:g} FLOP/s', peak, None)


@dataclass(frozen=True)
class ModelSize:
    """A decoder-only transformer in numbers. Tied weights count once."""

    parameters: int
    embedding: int  # parameters of token and position embeddings and of the output layer
    lookup: int  # those of token embeddings that are only looked up: 0 if they are the output layer too
    blocks: int  # those of all layers together
    layers: int
    hidden: int
    heads: int
    head_dim: int
    ffn: int
    gated: bool  # whether the MLP multiplies two projections (SwiGLU)
    rms_norm: bool  # whether norms are by root mean square (Llama's), not LayerNorm
    vocab: int
    keeps_scores: bool  # whether attention keeps length x length scores (torch, eager), and is not fused (flash, sdpa)

    @property
    def non_embedding(self) -> int:
        """Parameters without embeddings and output layer."""
        return self.parameters - self.embedding


def measure(model: Any) -> ModelSize:
    """Count the parameters of a Hugging Face or MPT causal language model, on any device, meta included.

    Raises:
        ValueError: If its blocks have something else than attention and an MLP of two or three matrices.
    """
    config = model.config
    blocks = hf_get_hidden_layers(hf_get_causal_base_model(model))
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    every = {id(parameter): parameter for parameter in model.parameters()}
    embeddings = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings[id(outputs)] = outputs
    if config.tie_word_embeddings:  # on meta, these may be two objects
        for found in (every, embeddings):
            found.pop(id(outputs), None)
            found[id(inputs)] = inputs
    if not len(blocks):
        raise ValueError('model: it has no layers')
    hidden = inputs.shape[1]
    attention = getattr(config, 'attn_config', None)
    if attention is not None:  # MPT
        heads = config.n_heads
        kinds = {'multihead_attention': heads, 'multiquery_attention': 1}
        kv_heads = kinds.get(attention['attn_type']) or attention['kv_n_heads']
        keeps_scores = attention['attn_impl'] == 'torch'
    else:
        heads = config.num_attention_heads
        kv_heads = getattr(config, 'num_key_value_heads', None) or heads
        keeps_scores = config._attn_implementation == 'eager'
    head_dim = getattr(config, 'head_dim', None) or hidden // heads
    matrices = [parameter for parameter in blocks[0].parameters() if parameter.ndim == 2]
    ffn = max(matrix.shape[1] for matrix in matrices)
    mlp = sum(matrix.numel() for matrix in matrices) - 2 * hidden * head_dim * (heads + kv_heads)
    if mlp not in (2 * hidden * ffn, 3 * hidden * ffn):
        kind = type(model).__name__
        raise ValueError(f'model: a block of {kind} is more than attention and an MLP (mixture of experts?)')
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in every.values()),
        embedding=sum(parameter.numel() for parameter in embeddings.values()),
        lookup=0 if config.tie_word_embeddings or outputs is inputs else inputs.numel(),
        blocks=sum(parameter.numel() for parameter in blocks.parameters()),
        layers=len(blocks),
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        ffn=ffn,
        gated=mlp == 3 * hidden * ffn,
        rms_norm=any('rmsnorm' in type(module).__name__.lower() for module in blocks[0].modules()),
        vocab=outputs.shape[0],
        keeps_scores=keeps_scores,
    )


def model_size(model: Model) -> ModelSize:
    """The size of the model that a YAML's ``model`` section describes; of a pretrained one, only its config is read.

    Raises:
        ValueError: If it cannot be built, or its blocks are not known.

    Cost: about a second, and no memory for the weights.
    """
    return _model_size(json.dumps(dict(model.given), sort_keys=True))


@lru_cache
def _model_size(section: str) -> ModelSize:
    given = json.loads(section)
    # no tokenizer, no generation config: nothing that matters here
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            size = measure(model_on_meta(Model.model_validate(given)).model)
    finally:
        logging.disable(disabled)
    if given['name'] == 'hf_causal_lm':  # whose kernels are not chosen on meta; llm-foundry's default is eager
        is_fused = given.get('use_flash_attention_2') or given.get('attn_implementation') not in (None, 'eager')
        size = replace(size, keeps_scores=not is_fused)
    return size


def flops_per_token(size: ModelSize, length: int) -> float:
    r"""Model FLOPs of training on one token, forward and backward: :math:`6 (N - N_{lookup}) + 12 L d_{attn} s`.

    With :math:`d_{attn}` = heads x head_dim. This is llm-foundry's ``flops_per_batch`` per token, with which Composer's
    SpeedMonitor computes MFU for MPT: an embedding that is not tied is looked up and not multiplied, and attention is
    counted as if it saw the future too. The report's 6 N T (:func:`.evaluation.functional.training_flops`) has all
    parameters and no attention: right for shares of runs of one model, and too little by a fifth for 405 M at 2048.
    """
    return 6.0 * (size.parameters - size.lookup) + 12.0 * size.layers * size.heads * size.head_dim * length


def recomputed_flops_per_token(size: ModelSize, length: int) -> float:
    r"""FLOPs that activation checkpointing adds: the blocks' forward pass, :math:`2 N_{blocks} + 4 L d_{attn} s`.

    Hardware FLOPs are these and :func:`flops_per_token`; MFU is about the latter alone.
    """
    return 2.0 * size.blocks + 4.0 * size.layers * size.heads * size.head_dim * length


def gpu_hours(flops: float, peak: float, mfu: float) -> float:
    r"""Hours of one GPU: :math:`F / (peak \cdot MFU) / 3600`; ``mfu``, the utilisation, is above 0 and at most 1."""
    if not 0 < mfu <= 1:
        raise ValueError(f'mfu={mfu} must be above 0 and at most 1')
    return flops / (peak * mfu) / 3600


def activation_bytes(size: ModelSize, microbatch: int, length: int, *, bytes_each: int = 2) -> int:
    r"""Memory that the blocks keep for the backward pass, without dropout.

    Per token and block, in numbers of ``bytes_each``: attention's input ``h``, its queries, keys, values and output
    ``4 heads head_dim`` (keys and values are repeated for all heads), the MLP's input ``h`` and ``2 ffn``, or ``4 ffn``
    if it is gated. The norms keep their inputs in float32, ``2 h``, and a root-mean-square norm its result too. With
    LayerNorm, ``ffn = 4 h`` and 2 bytes that is 36 h bytes: the 34 h of Korthikanti et al. 2022 without two dropout
    masks, with norms in float32 instead of 2 bytes. Attention that keeps its scores adds, per head and pair of
    positions, the softmax in float32 and a copy in ``bytes_each``, if that is less.

    What PyTorch kept on the CPU was 0.95 to 1.06 of this for GPT-NeoX and MPT, and 1.0 to 1.16 for Llama, whose casts
    under autocast (without FSDP) are more.
    """
    mlp = (4 if size.gated else 2) * size.ffn
    numbers = 2 * size.hidden + 4 * size.heads * size.head_dim + mlp
    norms = 2 * 4 * size.hidden * (2 if size.rms_norm else 1)
    scores = size.heads * length * (4 + (bytes_each if bytes_each < 4 else 0)) if size.keeps_scores else 0
    return size.layers * microbatch * length * (numbers * bytes_each + norms + scores)


def logit_bytes(size: ModelSize, microbatch: int, length: int, *, bytes_each: int = 2, fused: bool = False) -> int:
    """Logits and what the cross entropy makes of them, at the start of the backward pass.

    Per token and entry of the vocabulary: the logits and float32 log-probabilities, and two float32 gradients. A fused
    loss (MPT's ``fused_crossentropy``) has the logits and their gradient only.
    """
    return microbatch * length * size.vocab * (2 * bytes_each if fused else bytes_each + 12)


def backward_bytes(
    size: ModelSize,
    microbatch: int,
    length: int,
    *,
    bytes_each: int = 2,
    checkpointing: bool = False,
    fused: bool = False,
) -> int:
    """Activations and logits at the worst moment of a backward pass.

    That is its start: :func:`activation_bytes` and :func:`logit_bytes`. With activation checkpointing the blocks have
    kept their inputs only, and beside them there are the logits or, later, what one block keeps when it is computed
    again, whichever is more.
    """
    activations = activation_bytes(size, microbatch, length, bytes_each=bytes_each)
    logits = logit_bytes(size, microbatch, length, bytes_each=bytes_each, fused=fused)
    if not checkpointing:
        return activations + logits
    return size.layers * microbatch * length * size.hidden * bytes_each + max(logits, activations // size.layers)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part; without CUDA's context, NCCL's buffers and fragmentation: some 10 % more."""

    parameters: float  # trained weights, or this GPU's shard of them; likewise what follows
    gradients: float
    optimizer: float
    averages: float  # of ema, and of a lawa that is not offloaded
    gathered: float  # whole copies in the precision that is computed in, with their gradients
    activations: float  # of one microbatch, with its logits
    evaluation: float  # what evaluations need instead: logits, and copies for averaged weights
    host: float  # of the CPU's memory, per GPU: the window of lawa

    @property
    def total(self) -> float:
        """The most that is in use at one time."""
        always = self.parameters + self.gradients + self.optimizer + self.averages + self.gathered
        return always + max(self.activations, self.evaluation)


def memory_per_gpu(
    size: ModelSize,
    *,
    sharding: str,
    gpus: int,
    shards: int,
    weight_bytes: int = 4,
    compute_bytes: int = 2,
    gathered_bytes: int = 2,
    optimizer_bytes: float = 8,
    activations: float = 0,
    evaluation_logits: float = 0,
    emas: int = 0,
    lawa: int = 0,
    lawa_is_offloaded: bool = True,
) -> Memory:
    r"""Memory of one GPU, by part.

    With N parameters on S shards (1 unless sharded), of w bytes:

    * parameters, gradients :math:`w N/S`; optimizer: its bytes per parameter, times :math:`N/S`
    * gathered: ``FULL_SHARD`` holds weights and gradients of what is outside the blocks and of two blocks (the current
      one and the next), ``SHARD_GRAD_OP`` the same and all weights; ``none`` and ``NO_SHARD`` hold a copy of all
      weights in the compute precision if that is narrower (autocast's cache), and ``none`` on several GPUs (DDP) its
      buckets, as large as the gradients
    * averages: ``ema`` :math:`4 N/S` per half-life, ``lawa`` :math:`k w N/S`, by default in the CPU's memory; their
      evaluation takes the training weights aside, and LAWA's mean in float32

    Args:
        size: The model.
        sharding: One of ``SHARDINGS``; ``none`` is one GPU, or DDP.
        gpus: All of them.
        shards: GPUs that share one copy of the model.
        weight_bytes: Of a trained weight; 2 with ``master_weights_dtype``.
        compute_bytes: Of a number in the forward pass.
        gathered_bytes: Of a gathered weight.
        optimizer_bytes: State per parameter; 8 is AdamW in float32.
        activations: Of :func:`backward_bytes`.
        evaluation_logits: Bytes of the logits of an evaluation.
        emas: Half-lives of ``ema``.
        lawa: Length of the window of ``lawa``.
        lawa_is_offloaded: Whether the window is in the CPU's memory.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f'fsdp_config.sharding_strategy={sharding} is not planned for; one of {", ".join(SHARDINGS)}')
    is_sharded = sharding in ('SHARD_GRAD_OP', 'FULL_SHARD')
    ours = size.parameters / (shards if is_sharded else 1)
    if is_sharded:
        units = size.parameters - size.blocks + 2 * size.blocks / size.layers
        weights = size.parameters if sharding == 'SHARD_GRAD_OP' else units
        gathered = gathered_bytes * (weights + units)
    else:
        buckets = weight_bytes if sharding == 'none' and gpus > 1 else 0
        gathered = size.parameters * (buckets + (compute_bytes if compute_bytes < weight_bytes else 0))
    window = lawa * weight_bytes * ours
    aside = (weight_bytes if emas or lawa else 0) + (4 if lawa else 0)
    return Memory(
        parameters=weight_bytes * ours,
        gradients=weight_bytes * ours,
        optimizer=optimizer_bytes * ours,
        averages=4 * emas * ours + (0 if lawa_is_offloaded else window),
        gathered=gathered,
        activations=activations,
        evaluation=evaluation_logits + aside * ours,
        host=window if lawa_is_offloaded else 0,
    )


def optimizer_bytes(optimizer: Optimizer, weight_bytes: int = 4) -> float:
    """State per parameter of any registered optimizer: what one step on a small matrix leaves, in its shape."""
    layer = nn.Linear(16, 16, bias=False, dtype=torch.float32 if weight_bytes == 4 else torch.bfloat16)
    of_parameters = keys_read(build_optimizer, 'optimizer_config')  # patterns of names, which the layer does not have
    arguments = {key: value for key, value in optimizer.arguments.items() if key not in of_parameters}
    try:
        built = build_optimizer(layer, optimizer.name, arguments)
    except Exception as error:
        raise ValueError(f'optimizer={optimizer.name!r} cannot be built: {error}') from None
    layer.weight.grad = torch.ones_like(layer.weight)
    built.step()
    state = [value for value in built.state[layer.weight].values() if isinstance(value, torch.Tensor)]
    like_weights = [value for value in state if value.shape == layer.weight.shape]
    return sum(value.numel() * value.element_size() for value in like_weights) / layer.weight.numel()


def checkpoint_bytes(
    parameters: int, *, weight_bytes: int = 4, optimizer_bytes: float = 8, emas: int = 0, lawa: int = 0
) -> float:
    """A Composer checkpoint: weights, optimizer state, and averages, as in :func:`memory_per_gpu`; sharded or not.

    Buffers, random states and the tokenizer are left out: less than a megabyte, or a few with a large tokenizer.
    """
    return parameters * (weight_bytes * (1 + lawa) + optimizer_bytes + 4 * emas)


@dataclass(frozen=True)
class Disk:
    """The disk that a run takes."""

    checkpoint: float  # bytes of one
    saves: int  # checkpoints that are written
    kept: int  # of these, how many stay
    at_once: int  # the most there are at one time: the oldest goes when the newest is complete
    export: float  # bytes of one exported model
    exports: int  # exported models, of the weights and of their averages

    @property
    def total(self) -> float:
        """The most bytes there are at one time."""
        return self.checkpoint * self.at_once + self.export * self.exports


def disk(
    checkpoint: float,
    export: float,
    batches: int,
    every: int,
    keep: int,
    exports_every: int,
    averages: int = 0,
    points: Collection[int] = (),
) -> Disk:
    """Disk of a run. Composer saves every ``every`` batches and at the end, and keeps ``keep``, or with -1 all.

    ``averages`` are exported beside the weights; ``points``, the batches of ``branch_points``, are kept besides.
    """
    ends = math.ceil(batches / every)
    in_turn = ends - sum(1 for point in {*points} if 0 < point <= batches and (point % every == 0 or point == batches))
    kept = in_turn if keep < 0 else min(in_turn, keep)
    return Disk(
        checkpoint=checkpoint,
        saves=in_turn + len(points),
        kept=kept + len(points),
        at_once=min(in_turn, kept + 1) + len(points),
        export=export,
        exports=math.ceil(batches / exports_every) * (1 + averages),
    )


@dataclass(frozen=True)
class Costs:
    """The costs of one run."""

    size: ModelSize
    tokens: dict[str, int]  # of each stream, the new data first
    batches: int
    flops: float  # model FLOPs
    hardware_flops: float  # with recomputation
    gpu: Gpu
    gpus: int
    gpu_hours: float  # of all GPUs together
    microbatch: int  # of a GPU; of ``auto``, the largest that fits, from the GPU's batch by halves
    sharding: str  # one of SHARDINGS
    memory: Memory
    disk: Disk


def costs_of(stage: Stage, gpu: str = 'h100', gpus: int = 8, mfu: float = 0.4) -> Costs:
    """The costs of a stage.

    As in training, ``FSDP_VERSION`` of the environment decides how ``fsdp_config`` is read: FSDP2 has no
    ``sharding_strategy`` but ``reshard_after_forward``; and one GPU has no FSDP.

    Args:
        stage: The stage.
        gpu: Name or peak, of :func:`find_gpu`. Default: ``h100``.
        gpus: How many it runs on. Default: ``8``.
        mfu: Model FLOPs utilisation to reckon with. Default: ``0.4``.

    Raises:
        ValueError: If the YAML or one of these is not right.
    """
    if stage.tp_config:
        raise ValueError('tp_config: tensor parallelism is not planned for; leave it out')
    if gpus < 1 or stage.global_train_batch_size % gpus:
        raise ValueError(f'global_train_batch_size={stage.global_train_batch_size} is not divisible by {gpus} GPUs')
    chip = find_gpu(gpu, stage.precision)
    size, length = model_size(stage.model), stage.max_seq_len
    batches = stage.batches_of('max_duration', stage.max_duration)
    tokens = batches * stage.tokens_per_batch
    fsdp = stage.fsdp_config if gpus > 1 else None
    checkpointing = fsdp is not None and fsdp.activation_checkpointing
    flops = tokens * flops_per_token(size, length)
    weight_bytes = 2 if stage.model.master_weights_dtype else 4
    compute_bytes = 4 if stage.precision == 'fp32' else 2
    sharding, shards = _sharding(fsdp, gpus)
    callbacks = stage.callbacks
    kept: dict[str, Any] = {
        'weight_bytes': weight_bytes,
        'optimizer_bytes': optimizer_bytes(stage.optimizer, weight_bytes),
        'emas': len(callbacks.ema.half_lives) if callbacks.ema else 0,
        'lawa': callbacks.lawa.k if callbacks.lawa else 0,
    }
    is_fused = stage.model.loss_fn == 'fused_crossentropy'

    def memory_of(microbatch: int) -> Memory:
        return memory_per_gpu(
            size,
            sharding=sharding,
            gpus=gpus,
            shards=shards,
            compute_bytes=compute_bytes,
            gathered_bytes=weight_bytes if fsdp and fsdp.mixed_precision == 'FULL' else compute_bytes,
            activations=backward_bytes(
                size, microbatch, length, bytes_each=compute_bytes, checkpointing=checkpointing, fused=is_fused
            ),
            # no gradients
            evaluation_logits=(stage.device_eval_batch_size or microbatch) * length * size.vocab * (compute_bytes + 8),
            lawa_is_offloaded=callbacks.lawa is None or callbacks.lawa.offload,
            **kept,
        )

    of_a_gpu, given = stage.global_train_batch_size // gpus, stage.device_train_microbatch_size
    microbatch = of_a_gpu if given == 'auto' else min(given, of_a_gpu)
    while given == 'auto' and microbatch > 1 and memory_of(microbatch).total > (chip.memory or math.inf):
        microbatch = math.ceil(microbatch / 2)
    export = callbacks.hf_checkpointer
    return Costs(
        size=size,
        tokens=stage.tokens_by_stream(),
        batches=batches,
        flops=flops,
        hardware_flops=flops + (tokens * recomputed_flops_per_token(size, length) if checkpointing else 0),
        gpu=chip,
        gpus=gpus,
        gpu_hours=gpu_hours(flops, chip.peak, mfu),
        microbatch=microbatch,
        sharding=sharding,
        memory=memory_of(microbatch),
        disk=disk(
            checkpoint_bytes(size.parameters, **kept),
            size.parameters * (4 if export.precision == 'float32' else 2),
            batches,
            _interval('save_interval', stage.save_interval, stage),
            -1 if is_remote(stage.save_folder) else stage.save_num_checkpoints_to_keep,
            _interval('callbacks.hf_checkpointer.save_interval', export.save_interval, stage),
            kept['emas'] + (1 if kept['lawa'] else 0),
            callbacks.branch_points.at if callbacks.branch_points else (),
        ),
    )


def _interval(key: str, interval: Duration, stage: Stage) -> int:
    """Batches between two events; epochs come to their end with the run."""
    if not interval.value:
        raise ValueError(f'{key}={interval} must be above 0')
    return stage.batches_of(key, Duration(1, 'dur') if interval.unit == 'ep' else interval)


def _sharding(fsdp: FSDP | None, gpus: int) -> tuple[str, int]:
    """One of ``SHARDINGS``, and how many GPUs share one copy of the model."""
    if fsdp is None or not fsdp.given:
        return 'none', 1
    if os.environ.get('FSDP_VERSION', '1') == '2':
        sharding = 'FULL_SHARD' if fsdp.reshard_after_forward else 'SHARD_GRAD_OP'
    else:
        given = fsdp.sharding_strategy.upper()
        # hybrid: the same within data_parallel_shard_degree
        sharding = {'HYBRID_SHARD': 'FULL_SHARD', '_HYBRID_SHARD_ZERO2': 'SHARD_GRAD_OP'}.get(given, given)
    degree = fsdp.data_parallel_shard_degree
    return sharding, degree if degree > 0 else gpus // (fsdp.data_parallel_replicate_degree or 1)
