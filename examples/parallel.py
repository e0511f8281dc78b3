"""A recipe on several processes: DDP, FSDP2, and FSDP2 within nodes.

Started by torchrun. Each process has its own share of the batch, and noise of its own;
gradients are averaged, so that R processes train as one would on the whole batch.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dmdkit import NetworkWithHead, ScoreEstimator
from dmdkit.adapters.lora import LoRANetwork

Strategy = Literal["ddp", "fsdp", "hsdp"]
TIMEOUT = timedelta(minutes=30)
UNITS = ("BasicTransformerBlock", "ResnetBlock2D", "Attention")
"""The blocks whose weights are gathered together, by the name of their class."""


class Ranks(NamedTuple):
    """This process among all."""

    rank: int = 0
    ranks: int = 1
    local: int = 0
    """Its number on this machine."""


@contextmanager
def processes(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun started; one alone needs nothing."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Ranks()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device.startswith("cuda") or (
        device == "auto" and torch.cuda.is_available()
    )
    if on_gpu:
        torch.cuda.set_device(local)
    # gloo as well: what is no tensor on a GPU goes through it.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Ranks(distributed.get_rank(), ranks, local)
    finally:
        distributed.destroy_process_group()


def patient_group() -> Any:
    """A process group through which others wait for what may take rank 0 hours."""
    if not distributed.is_initialized():
        return None
    return distributed.new_group(backend="gloo", timeout=timedelta(days=7))


def mesh_of(strategy: Strategy, device: torch.device) -> Any:
    """The processes as FSDP2 sees them: a row, or a row of each machine."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks = distributed.get_world_size()
    if strategy == "fsdp":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    own = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return init_device_mesh(
        device.type, (ranks // own, own), mesh_dim_names=("replicate", "shard")
    )


def share(
    denoiser: ScoreEstimator,
    strategy: Strategy,
    mesh: Any,
    *,
    low_precision: bool,
    offload: bool = False,
) -> None:
    """Puts a denoiser's network on all processes, in place; in one it stays.

    Under FSDP2 weights are kept in their own precision and gathered in bf16 where
    network calls are in bf16; the head is a unit of its own in fp32. With `offload`
    each process's shards wait in the CPU's memory.
    """
    if not distributed.is_initialized():
        return
    network = denoiser.network
    trained = any(p.requires_grad for p in network.parameters())
    if strategy == "ddp":
        if trained:
            denoiser.network = DistributedDataParallel(
                network, gradient_as_bucket_view=True
            )
        return
    shard(network, mesh, low_precision=low_precision, offload=offload)


def shard(
    network: nn.Module, mesh: Any, *, low_precision: bool, offload: bool = False
) -> None:
    """Shards a network by blocks, its head in fp32."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = MixedPrecisionPolicy(
        torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = low if low_precision and not is_adapter(network) else own
    waiting = OffloadPolicy()
    if offload:
        waiting = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    where: Any = {"mesh": mesh, "offload_policy": waiting}
    for parameter in network.parameters():
        # Every rank must start from the same weights; FSDP2 does not see to it.
        distributed.broadcast(parameter.data, src=0)
    body = network
    if isinstance(network, NetworkWithHead):
        fully_shard(network.head, **where, mp_policy=own, reshard_after_forward=True)
        body = network.network
    for unit in units_of(body):
        fully_shard(unit, **where, mp_policy=policy)
    # Else what a call without gradients gathered would stay, and be averaged or saved
    # in the place of the weights.
    fully_shard(body, **where, mp_policy=policy, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # FSDP2 settles a unit's precision when it is first gathered, which has to
            # see it trainable: on the student's turn the critic would be frozen.
            module.unshard()
            module.reshard()


def compile_network(network: nn.Module, *, by_blocks: bool = False) -> None:
    """Compiles a network's calls in place, or those of the blocks that are sharded.

    Shapes do not change in a training, so each is compiled for. There is one graph for
    each kind of call (trained, frozen, without gradients; output, features), block by
    block times their shapes, and all networks count together: the limit on graphs is
    raised, and beyond it is an error, for calls would go uncompiled without a word.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    parts: list[Any] = [network]
    if by_blocks:
        body = network.network if isinstance(network, NetworkWithHead) else network
        parts = units_of(body)
        if isinstance(body, LoRANetwork):
            raise SystemExit(
                "--compile: adapters are not compiled where they are sharded; take "
                "--strategy ddp."
            )
    for part in parts:
        part.compile(dynamic=False)


def is_adapter(network: nn.Module) -> bool:
    """Whether it is an adapter, with a head or without: its weights stay fp32."""
    return any(isinstance(m, LoRANetwork) for m in network.modules())


def units_of(network: nn.Module) -> list[nn.Module] | list[list[nn.Module]]:
    """The parts whose weights are gathered together: blocks, or their adapters."""
    if not isinstance(network, LoRANetwork):
        found = [m for m in network.modules() if type(m).__name__ in UNITS]
        inner = {id(m) for unit in found for m in unit.modules() if m is not unit}
        return [unit for unit in found if id(unit) not in inner]
    units: dict[str, list[nn.Module]] = {}
    for name, layer in network.adapter.named_modules():
        if hasattr(layer, "lora_A"):
            block = re.match(r"(.*\.(?:transformer_blocks|resnets)\.\d+)\.", name)
            matrices = units.setdefault(block[1] if block else name, [])
            matrices += [layer.get_submodule(kind) for kind in ("lora_A", "lora_B")]
    return list(units.values())


def plain(network: nn.Module) -> nn.Module:
    """A network out of its DDP wrapper."""
    if isinstance(network, DistributedDataParallel):
        return network.module
    return network


@contextmanager
def gradients_stay(networks: list[nn.Module]) -> Iterator[None]:
    """Within it, backwards add up gradients on each process, without averaging.

    For every backward of an update but the last, and where a network is frozen, as a
    call outside has DDP wait for gradients. FSDP2 averages each time: the sum is the
    same, and whole gradients would need the memory that it saves.
    """
    with ExitStack() as stack:
        for network in networks:
            if isinstance(network, DistributedDataParallel):
                stack.enter_context(network.no_sync())
        yield


def head_of(network: nn.Module) -> Tensor | float:
    """Zero, but under DDP as a function of the head's weights.

    DDP waits for a gradient of every weight in the backward that it averages after,
    and denoising alone does not use the head.
    """
    body = plain(network)
    if body is network or not isinstance(body, NetworkWithHead):
        return 0.0
    return 0.0 * sum(p.sum() for p in body.head.parameters())


def whole_norm(norm: Tensor) -> Tensor:
    """A gradient's norm over all shards."""
    full: Any = getattr(norm, "full_tensor", None)
    return norm if full is None else full()


def averages(values: Tensor) -> Tensor:
    """Means over the processes."""
    if not distributed.is_initialized():
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values / distributed.get_world_size()


def whole(
    denoiser: ScoreEstimator, fresh: Callable[[nn.Module], nn.Module]
) -> ScoreEstimator | None:
    """A denoiser as if it were in one process, for files; rank 0 gets it.

    `fresh` makes a network like a sharded one, to put the gathered weights into.
    """
    network = plain(denoiser.network)
    if any(hasattr(p, "device_mesh") for p in network.parameters()):
        state = whole_state(network)
        if distributed.get_rank() > 0:
            return None
        network = fresh(network)
        network.load_state_dict(state)
    elif distributed.is_initialized() and distributed.get_rank() > 0:
        return None
    return ScoreEstimator(network, denoiser.process, denoiser.parameterization)


def whole_state(network: nn.Module) -> dict[str, Any]:
    """The weights of a network, gathered on the CPU of rank 0."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
    )

    return get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
