"""Models that do not fit one device: the frozen weights of each layer are divided over the ranks (FSDP2).

A layer is put together when a pass reaches it and let go after it, forward and backward (ZeRO stage 3: Rajbhandari
et al. 2020, arXiv 1910.02054). Each rank keeps whole what is trained, the embeddings and the head: so the sum of
gradients, checkpoints and the saved adapter are those of data parallelism. Knows no pairs and no losses.
"""

from __future__ import annotations

import torch
from torch import nn

from training.engine.distributed import World
from training.engine.errors import RefusedError


def divide_frozen_weights(decoder: nn.Module, device: torch.device, world: World) -> None:
    """In place; the layers' shards land on `device`. From now on every pass needs all ranks.

    Raises `RefusedError` for weights that cannot be divided: trained, quantised, or of a decoder without layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = layers_of(decoder)
    for layer in layers:
        _check(layer)
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in layers:
        trained = {tensor for tensor in layer.parameters() if tensor.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    divided = {tensor for layer in layers for tensor in layer.parameters() if not tensor.requires_grad}
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - divided)


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The longest list of modules in the decoder: its layers."""
    lists = [list(module) for module in decoder.children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise RefusedError(
            "The layers of this model are not known here, so its weights cannot be divided.",
            "Set the parallelism to data.",
        )
    return max(lists, key=len)


def _check(layer: nn.Module) -> None:
    frozen = [tensor for tensor in layer.parameters() if not tensor.requires_grad]
    if not frozen:
        raise RefusedError(
            "The parallelism fsdp divides frozen weights, and here all weights are trained.",
            "Train an adapter, or set the parallelism to data.",
        )
    if any(not tensor.is_floating_point() for tensor in frozen):
        raise RefusedError(
            "Quantised weights cannot be divided over devices.",
            "Set the parallelism to data, or load the model without quantisation.",
        )
