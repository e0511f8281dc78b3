"""Classifier-free guidance (arXiv 2207.12598) of a denoiser, as mostly written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dmdkit._checked import checked, describe
from dmdkit.diffusion.processes import NoiseProcess
from dmdkit.types import Condition, Denoiser, Latent, Time


def _paired_leaves(null: Condition, cond: Condition) -> tuple[list[Any], TreeSpec]:
    """The leaves of two conditions of one structure in pairs, and the structure."""
    leaves, structure = tree_flatten(null)
    others, other_structure = tree_flatten(cond)
    if structure != other_structure:
        one, two = (" ".join(str(s).split()) for s in (structure, other_structure))
        raise ValueError(
            f"cond: its structure is {two}, that of its unconditional counterpart "
            f"{one}; `unconditional` must answer with the structure it was given."
        )
    return list(zip(leaves, others, strict=True)), structure


def _require_counterpart(null: Condition, cond: Condition) -> None:
    """Refuses what cannot stand for a condition; None may, as the network's own."""
    if null is None:
        return
    for a, b in _paired_leaves(null, cond)[0]:
        if isinstance(b, Tensor) and not (a is None or isinstance(a, Tensor)):
            raise TypeError(
                f"unconditional: it answered with {describe(a)} where cond has "
                f"{describe(b)}; expected a batch-first tensor, or None."
            )


def concatenate_conditions(first: Condition, second: Condition) -> Condition:
    """Joins two conditions of one structure along the batch.

    Args:
        first: A pytree of batch-first tensors; None stays None.
        second: Another one of the same structure.

    Returns:
        The pytree whose leaves are concatenated along axis 0.

    Raises:
        ValueError: If the structures, or the shapes of two leaves beyond the batch,
            differ.
        TypeError: If a leaf is no tensor.
    """
    pairs, structure = _paired_leaves(first, second)

    def join(a: Any, b: Any) -> Any:
        if a is None and b is None:
            return None
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            raise TypeError(
                f"cond: cannot concatenate {describe(a)} and {describe(b)}; every leaf "
                "must be a batch-first tensor."
            )
        if not a.ndim or not b.ndim or a.shape[1:] != b.shape[1:]:
            raise ValueError(
                f"cond: cannot concatenate {describe(a)} and {describe(b)} along the "
                "batch; every other axis of a leaf must be as long in both."
            )
        return torch.cat((a, b))

    joined = [join(a, b) for a, b in pairs]
    return tree_unflatten(joined, structure)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    r"""A guided denoiser: $u + s (c - u)$ with $u$ unconditional, $c$ conditional.

    Since x0 is affine in the network's output, guiding x0 equals guiding epsilon, as
    official DMD2 does. At scale 1 the unconditional call is left out (official code
    also leaves it out below 1; here a scale below 1 interpolates, as the formula says).

    Source: Ho & Salimans 2022 (arXiv 2207.12598); DMD2, section F.3 and F.4.

    Attributes:
        denoiser: The denoiser to guide, usually the teacher.
        unconditional: Answers a condition with its unconditional counterpart: the null
            class, the empty prompt, zero embeddings.
        scale: The guidance scale $s$: 1 is none; SD1.5 is 1.75, SDXL is 8. Codebases
            with $c + w (c - u)$ call $s - 1$ by that name: see
            `guidance_scale_from_offset`.
        merged: Whether one call on a doubled batch, [unconditional, conditional],
            replaces two calls. Faster on small batches, with twice the activations.

    Raises:
        TypeError: If `unconditional` cannot be called.
    """

    denoiser: Denoiser
    unconditional: Callable[[Any], Any]
    scale: float | int
    merged: bool = False

    def __post_init__(self) -> None:
        """Checks that `unconditional` can be called."""
        if not callable(self.unconditional):
            raise TypeError(
                f"unconditional: got {describe(self.unconditional)}, expected a "
                "function from a condition to its unconditional counterpart."
            )

    @property
    def process(self) -> NoiseProcess:
        """The process of the guided denoiser."""
        return self.denoiser.process

    @checked
    def __call__(self, x_t: Latent, t: Time, cond: Condition = None) -> Latent:
        """Estimates the clean sample with guidance.

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition.

        Returns:
            The guided estimate, [b, ...].

        Raises:
            ValueError: If a shape is wrong, or the condition and its unconditional
                counterpart, unless that is None, differ in structure.
            TypeError: If a dtype is wrong, or a leaf of the counterpart is no tensor
                where the condition has one.
        """
        if self.scale == 1:
            return self.denoiser(x_t, t, cond)
        null = self.unconditional(cond)
        if self.merged:
            both = self.denoiser(
                torch.cat((x_t, x_t)),
                torch.cat((t, t)),
                concatenate_conditions(null, cond),
            )
            u, c = both.chunk(2)
        else:
            _require_counterpart(null, cond)
            u, c = self.denoiser(x_t, t, null), self.denoiser(x_t, t, cond)
        return u + self.scale * (c - u)


def guidance_scale_from_offset(weight: float | int) -> float | int:
    r"""Converts the weight of $c + w (c - u)$ to the standard scale $s = 1 + w$.

    CausVid, Self-Forcing and FastVideo's older trainer write the former; DMD2,
    diffusers and dmdkit the latter.

    Args:
        weight: The weight w in the offset convention; 0 is no guidance.

    Returns:
        The scale for `ClassifierFreeGuidance`.

    Examples:
        >>> guidance_scale_from_offset(3.5)
        4.5
    """
    return 1 + weight
