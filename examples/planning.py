"""What a run would take, counted on tensors without data (see plan.py).

PyTorch's fake tensors have shapes, dtypes and storages of a size, but no memory. A
recipe's own code runs on them, and what it allocates, computes and sends is counted.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args
from unittest.mock import patch

import parallel
import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

Category = Literal["weights", "gradients", "optimizer", "activations", "temporaries"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
GIB = 2**30


class FakeMachine(FakeTensorMode):
    """Makes every tensor a fake one; copies of tensors stay in the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeMachine":
        return self


def _apply(
    module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`nn.Module._apply`, which cannot swap fake tensors, by new parameters."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, p in module._parameters.items():
        if p is not None:
            new = function(p.detach())
            module._parameters[name] = nn.Parameter(new, p.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


class FakeDDP(nn.Module):
    """Does what DDP does, which reads tensors: it keeps buckets, and averages in them.

    Gradients are averaged one by one as a backward makes them: the same bytes are sent.
    Buckets stay when gradients are dropped, as DDP's do.
    """

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module, self.averages = module, True
        self.buckets: dict[Tensor, Tensor] = {}
        for parameter in module.parameters():
            if parameter.requires_grad:
                self.buckets[parameter] = torch.zeros_like(parameter)
                parameter.register_post_accumulate_grad_hook(self._average)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answers as the network does."""
        return self.module(*args, **kwargs)

    def _average(self, parameter: Tensor) -> None:
        if self.averages and parameter.grad is not None:
            parameter.grad = self.buckets[parameter].copy_(parameter.grad)
            distributed.all_reduce(parameter.grad)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it gradients stay on each process."""
        before, self.averages = self.averages, False
        try:
            yield
        finally:
            self.averages = before


_mesh_of = parallel.mesh_of


def _mesh(*args: Any) -> Any:
    """The processes' mesh, whose numbers are read and so must be real."""
    with unset_fake_temporarily():
        return _mesh_of(*args)


@contextmanager
def fake_machine(ranks: int, per_machine: int) -> Iterator[None]:
    """Within it tensors are fake, and this is the first of `ranks` processes."""
    with ExitStack() as stack:
        if ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            own = {"LOCAL_WORLD_SIZE": str(min(ranks, per_machine))}
            stack.enter_context(patch.dict(os.environ, own))
            distributed.init_process_group(
                "fake", rank=0, world_size=ranks, store=FakeStore()
            )
            stack.callback(distributed.destroy_process_group)
            stack.enter_context(patch.object(parallel, "mesh_of", _mesh))
            stack.enter_context(
                patch.object(parallel, "DistributedDataParallel", FakeDDP)
            )
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(FakeMachine())
        yield


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Within it autocast leaves in fp32 what it does on GPUs, and not on CPUs.

    Norms and resizing, so that their inputs and outputs are kept in fp32 for the
    backward (PyTorch's autocast op reference).
    """

    def in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(_in_fp32, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm", "interpolate"):
            own = in_fp32(getattr(nn.functional, name))
            stack.enter_context(patch.object(nn.functional, name, own))
        yield


def _in_fp32(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.half)
    return value.float() if is_low else value


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # The kernels of CPUs, which PyTorch's table leaves out; they get shapes as well.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _attention_backward
    ),
}
BY_SHAPE = (_attention, _attention_backward)


class Counter(TorchDispatchMode):
    """Counts the live bytes of tensors by category, their peak, FLOPs, what is sent.

    `sent` is all that a process sends, `sent_far` what goes between machines.

    What is allocated while gradients are recorded counts as activation until it is
    freed, all else as temporary, unless it is put into another category.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.at_peak = dict(self.live)
        self.sent, self.sent_far, self.flops = 0.0, 0.0, 0.0
        self._bytes: dict[int, int] = {}
        self._category: dict[int, Category] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were live at once."""
        return sum(self.at_peak.values())

    def counts(self) -> dict[str, float]:
        """What only grows."""
        names = ("flops", "sent", "sent_far")
        return {name: getattr(self, name) for name in names}

    def restart(self) -> None:
        """Forgets the peak."""
        self.at_peak = dict(self.live)

    def put_all(self, category: Category) -> None:
        """Moves all that is live to a category."""
        total = sum(self.live.values())
        self.live = {**dict.fromkeys(CATEGORIES, 0), category: total}
        for key, size in self._bytes.items():
            # An empty storage is one that FSDP2 fills when it gathers weights.
            self._category[key] = category if size else "temporaries"

    def put(self, tensors: Any, category: Category) -> None:
        """Moves tensors to a category."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                for part in local(tensor):
                    self._see(part.untyped_storage(), category)
                    key = part.untyped_storage()._cdata
                    self.live[self._category[key]] -= self._bytes[key]
                    self.live[category] += self._bytes[key]
                    self._category[key] = category

    def _see(self, storage: torch.UntypedStorage, category: Category) -> None:
        """Counts a storage that is new, or has another size than before."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._references:
            category = self._category[key]
            self.live[category] += size - self._bytes[key]
        else:
            self._references[key] = weakref.ref(storage, lambda _: self._free(key))
            self._category[key] = category
            self.live[category] += size
        self._bytes[key] = size
        if sum(self.live.values()) > self.peak:
            self.at_peak = dict(self.live)

    def _free(self, key: int) -> None:
        self.live[self._category.pop(key)] -= self._bytes.pop(key)
        del self._references[key]

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage anew, after it was resized behind the dispatcher's back."""
        self._see(storage, "temporaries")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
            ranks = _ranks_of(group)
            sent = _sent_by(func, args, len(ranks))
            self.sent += sent
            self.sent_far += sent * _leave_a_machine(ranks)
        self.flops += _flops_of(func, args, kwargs or {}, output)
        category: Category = "temporaries"
        if torch.is_grad_enabled():
            category = "activations"
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                for part in local(tensor):
                    self._see(part.untyped_storage(), category)
        return output


def local(tensor: Tensor) -> list[Tensor]:
    """The tensor, or this process's part of a sharded one."""
    if hasattr(tensor, "_local_tensor"):
        return [tensor._local_tensor]  # pyright: ignore[reportAttributeAccessIssue]
    return [tensor]


def _flops_of(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Floating-point operations, a multiplication and an addition as two."""
    formula = FLOPS.get(func._overloadpacket)
    if formula is None:
        return 0
    if formula in BY_SHAPE:
        args = tree_map(lambda a: a.shape if isinstance(a, Tensor) else a, args)
        return formula(*args)
    return formula(*args, **kwargs, out_val=output)


def _sent_by(func: Any, args: Any, ranks: int) -> float:
    """Bytes that a process sends in a collective of so many, by rings.

    Of R processes each sends (R - 1) / R of the whole tensor to gather or to reduce and
    scatter it, and twice that to reduce it everywhere (Patarasuk and Yuan 2009).
    """
    name = func._opname
    tensors = [a for a in tree_leaves(args[:2]) if isinstance(a, Tensor)]
    sizes = [t.numel() * t.element_size() for t in tensors]
    share = (ranks - 1) / ranks
    if "allreduce" in name:
        return 2 * share * sum(sizes)
    if "gather" in name or "reduce_scatter" in name:
        return share * max(sizes)
    return 0.0


def _ranks_of(group: Any) -> list[int]:
    """The processes of a group; of the default one if it is None."""
    if group is None:
        return list(range(distributed.get_world_size()))
    unboxed = distributed.ProcessGroup.unbox(group)
    return distributed.get_process_group_ranks(unboxed)


def _leave_a_machine(ranks: list[int]) -> bool:
    """Whether processes are of several machines, by their numbers."""
    own = int(os.environ.get("LOCAL_WORLD_SIZE", len(ranks)))
    return len({rank // own for rank in ranks}) > 1


@contextmanager
def counted_resizes(counter: Counter) -> Iterator[None]:
    """Counts the storages that FSDP2 frees and allocates by resizing them."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    with ExitStack() as stack:
        for name in ("alloc_storage", "free_storage"):
            own = getattr(_fsdp_param, name)

            def counted(tensor: Tensor, own: Any = own) -> None:
                own(tensor)
                counter.resized(tensor.untyped_storage())

            for module in (_fsdp_param, _fsdp_param_group):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, counted))
        yield


@contextmanager
def gradients_counted(
    counter: Counter, parameters: list[nn.Parameter]
) -> Iterator[None]:
    """Puts gradients into their category as soon as a backward has made them."""

    def put(parameter: Tensor) -> None:
        counter.put(parameter.grad, "gradients")

    with ExitStack() as stack:
        for parameter in parameters:
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(put)
                stack.callback(handle.remove)
        yield
