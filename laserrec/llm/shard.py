"""A frozen LLM of which each process holds a part (torch's FSDP), for backbones that are too large for one machine.

Every process reads its own rows of each matrix from the weight files and nothing else. A layer's parts are gathered
when it computes, forward and backward, and dropped again. The token embeddings stay whole in every process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from laserrec.util.distributed import World
from laserrec.util.errors import UserError


def shard(model: Any, layers: nn.ModuleList, folder: Path, dtype: torch.dtype, world: World,
          device: torch.device) -> None:
    """Fill `model`, whose parameters are on the meta device, with this process's part of the weights in `folder`, on
    `device`.

    model: transformers'. layers: its stack; each is gathered as one. Raises UserError where a weight is not in the
    files under the name that the model has for it.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    group = world.group or dist.group.WORLD
    assert group is not None  # the processes have joined one
    mesh = DeviceMesh.from_group(group, device.type)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.get_input_embeddings().weight})
    weights = _Weights(folder, model.base_model_prefix)
    state = {name: weights.part(name, tensor, dtype, world, device) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.to(device)  # buffers that no file holds


class _Weights:
    """The safetensors files of one folder, as one mapping from names to slices."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix, self.slices = folder, prefix, {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            self.slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        if not self.slices:
            raise UserError(f"backbone.shard reads safetensors, and {folder} has none; convert the weights first")

    def part(self, name: str, like: Tensor, dtype: torch.dtype, world: World, device: torch.device) -> Tensor:
        """The rows that this process holds of a sharded parameter, or all of any other tensor."""
        from torch.distributed.tensor import DTensor

        found = self.slices.get(name) or self.slices.get(f"{self.prefix}.{name}")
        if found is None or tuple(found.get_shape()) != tuple(like.shape):
            raise UserError(f"backbone.shard: the weight {name} {tuple(like.shape)} is not in {self.folder} as such "
                            "(transformers converts this model when it loads it); leave backbone.shard off")
        if not isinstance(like, DTensor):
            return found[:].to(device, dtype if like.is_floating_point() else like.dtype)
        rows = -(-like.shape[0] // world.size)  # as torch.chunk: the last parts may be shorter, or empty
        first, last = (min(r * rows, like.shape[0]) for r in (world.rank, world.rank + 1))
        mine = found[first:last].to(device, dtype)
        return DTensor.from_local(mine, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                                  stride=like.stride())
