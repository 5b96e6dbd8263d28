# SPDX-License-Identifier: Apache-2.0
"""A model's trainable parameters as this rank holds them: whole (one process, DDP) or one shard of each (FSDP2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from composer.utils import dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cpt_algorithms.weight_averaging.functional import square_sum

__all__ = ['LocalShards']

# What activation checkpointing and torch.compile put into names; checkpoints have them without.
_WRAPPERS = ('_checkpoint_wrapped_module.', '_orig_mod.')


class LocalShards:
    """Reads and writes a model's trainable parameters on this rank, without gathering.

    Tied parameters count once. Frozen parameters and buffers are left out: whoever uses an average takes the model's
    own. The parameter objects are kept, because between a forward pass and the next reshard FSDP2 shows the module
    other, gathered tensors under the same names.

    Args:
        model: The model, already wrapped.

    Raises:
        ValueError: For FSDP1, whose parameters are views that it re-makes.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                'ema and lawa work on plain, DDP and FSDP2 models, and this one is wrapped in FSDP1: set '
                'FSDP_VERSION=2 in the environment of the launcher (the same fsdp_config works), or leave the '
                'callbacks out and average the checkpoints with scripts/average_checkpoints.py'
            )
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                for wrapper in _WRAPPERS:
                    name = name.replace(wrapper, '')
                self.parameters[name] = parameter
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def reshard(self) -> None:
        """Let go of gathered parameters, which would go on being used after the shards are written."""
        for module in self._modules:
            module.reshard()

    def tensors(self) -> list[torch.Tensor]:
        """This rank's part of each parameter, sharing its memory."""
        return [_local(parameter.detach()) for parameter in self.parameters.values()]

    def to_saved(self, tensors: Sequence[torch.Tensor], full: bool) -> dict[str, torch.Tensor]:
        """Tensors shaped like the local shards, on any device, as a checkpoint keeps them, by name.

        With ``full`` (``state_dict_type: full``; all ranks must call it) whole tensors on rank 0 and nothing elsewhere,
        else each rank's own shard, as a DTensor, which torch's distributed checkpoints save and reshard.
        """
        saved: dict[str, torch.Tensor] = {}
        for (name, parameter), tensor in zip(self.parameters.items(), tensors, strict=True):
            if isinstance(parameter, DTensor) and full:
                whole = _like(parameter, tensor.to(parameter.device)).full_tensor()
                saved[name] = whole.cpu() if dist.get_global_rank() == 0 else torch.empty(0)
            else:
                saved[name] = _like(parameter, tensor) if isinstance(parameter, DTensor) else tensor
        return saved

    def from_saved(self, saved: Mapping[str, torch.Tensor], what: str) -> list[torch.Tensor]:
        """This rank's part of :meth:`to_saved`'s result, possibly at another number of ranks; ``what`` is its name.

        Raises:
            ValueError: If names or shapes are not the model's.
        """
        if saved.keys() != self.parameters.keys():
            differing = sorted(saved.keys() ^ self.parameters.keys())
            raise ValueError(f"{what} was saved for other trainable parameters than this model's: {differing[:3]}")
        tensors = []
        for name, parameter in self.parameters.items():
            tensor = saved[name]
            if tensor.shape != parameter.shape:
                raise ValueError(f'{what}: {name} is {tuple(tensor.shape)} there and {tuple(parameter.shape)} here')
            if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
                shape, offset = compute_local_shape_and_global_offset(
                    parameter.shape, parameter.device_mesh, parameter.placements
                )
                for dim, (size, begin) in enumerate(zip(shape, offset, strict=True)):
                    tensor = tensor.narrow(dim, begin if size else 0, size)
            tensors.append(_local(tensor))
        return tensors

    def empty(self, dtype: Callable[[str], torch.dtype], device: torch.device | None) -> dict[str, torch.Tensor]:
        """Uninitialised tensors to load a sharded checkpoint into, as :meth:`to_saved` gives them.

        On the device, or that of each parameter; of the dtype of each name.
        """
        made = {}
        for name, parameter in self.parameters.items():
            local = _local(parameter.detach())
            tensor = torch.empty_like(local, dtype=dtype(name), device=device or local.device)
            made[name] = _like(parameter, tensor) if isinstance(parameter, DTensor) else tensor
        return made

    def square_sum(self, tensors: Sequence[torch.Tensor]) -> float:
        """Sum of squares over all ranks, in float64: the same whatever the number of ranks, but for rounding."""
        total, sharded = 0.0, False
        for parameter, tensor in zip(self.parameters.values(), tensors, strict=True):
            owns = dist.get_global_rank() == 0
            if isinstance(parameter, DTensor):
                sharded = True
                coordinate = parameter.device_mesh.get_coordinate() or []
                placed = zip(coordinate, parameter.placements, strict=True)
                owns = all(index == 0 for index, placement in placed if isinstance(placement, Replicate))
            if (owns or not self._modules) and tensor.numel():
                total += square_sum(tensor)
        if not sharded:
            return total
        return float(sum(dist.all_gather_object(total)))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: DTensor, local: torch.Tensor) -> Any:
    # not DTensor.from_local, which would move a tensor that lives on the CPU to the mesh's device
    return DTensor(local, parameter._spec, requires_grad=False)  # pyright: ignore[reportCallIssue]
