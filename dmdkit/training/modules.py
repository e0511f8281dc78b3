"""Freezing for a while, and trainable copies of a teacher."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dmdkit._checked import describe
from dmdkit.diffusion.score import ScoreEstimator
from dmdkit.discriminators.networks import NetworkWithHead


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Lets gradients flow through modules, but not into them.

    Run the backward inside as well: activation checkpointing recomputes a forward then.
    On leaving, every parameter's `requires_grad` is what it was: a teacher that was
    frozen before stays frozen. (Official DMD2 switches everything back on, the teacher
    included.)

    Args:
        *modules: The modules, such as the critic on the generator's turn.

    Yields:
        Nothing.

    Raises:
        TypeError: If something else than a module is passed.

    Examples:
        >>> import torch
        >>> critic, x = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
        >>> with frozen(critic):
        ...     critic(x).sum().backward()
        >>> critic.weight.grad is None, x.grad is not None
        (True, True)
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"modules: got {type(module).__name__}, expected modules; pass the "
                "network or the ScoreEstimator itself."
            )
    before = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def trainable_copy(
    estimator: ScoreEstimator, head: nn.Module | None = None
) -> ScoreEstimator:
    """Copies a teacher into a student or a critic that can be trained.

    Everything trainable is fp32, whatever the compute dtype: at the recipes' learning
    rates an update of a bf16 weight is mostly rounded away. Copy before the teacher is
    cast to bf16, else the copy starts from rounded weights (and a warning says so), and
    before anything is wrapped.

    Args:
        estimator: The teacher.
        head: A head for the critic, such as `DiffusionGANHead`; it is used as it is.

    Returns:
        A copy in training mode whose every parameter is fp32 and requires gradients.

    Raises:
        TypeError: If a parameter is sharded or the estimator is none.
    """
    if not isinstance(estimator, ScoreEstimator):
        raise TypeError(
            f"estimator: got {type(estimator).__name__}, expected a ScoreEstimator; "
            "copy the teacher itself, not its guidance or wrapper."
        )
    if head is not None and not isinstance(head, nn.Module):
        raise TypeError(
            f"head: got {describe(head)}, expected a module such as "
            "DiffusionGANHead(channels=1280, resolution=8)."
        )
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if any(isinstance(m, wrapped) for m in estimator.modules()) or any(
        hasattr(p, "device_mesh") for p in estimator.parameters()
    ):
        raise TypeError(
            "estimator: its network is wrapped or sharded; copy first, wrap afterwards."
        )
    low = {
        p.dtype
        for p in estimator.parameters()
        if p.is_floating_point() and p.dtype.itemsize < 4
    }
    if low:
        warnings.warn(
            f"estimator: the copy starts from weights in {', '.join(map(str, low))}; "
            "copy before casting the teacher to keep what it was trained to.",
            stacklevel=2,
        )
    dropout = [
        name
        for name, module in estimator.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    if dropout:
        warnings.warn(
            f"estimator: {dropout[0]} drops out; DMD2 trains without dropout, set p=0.",
            stacklevel=2,
        )
    copied = copy.deepcopy(estimator)
    if head is not None:
        copied.network = NetworkWithHead(copied.network, head)
    copied.to(torch.float32)
    return copied.requires_grad_(True).train()
