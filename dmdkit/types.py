"""The names of tensor shapes, and the few contracts that everything else meets in.

Axes: `b` is the batch; `*d` are the axes of one sample, any number of them.
"""

from collections.abc import Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    runtime_checkable,
)

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

if TYPE_CHECKING:
    from dmdkit.diffusion.processes import NoiseProcess

Latent: TypeAlias = Float[Tensor, " b *d"]
"""A batch of samples, images or latents, of any rank."""

Time: TypeAlias = Float32[Tensor, " b"]
"""One time a sample in the process's own units; fp32, since bf16(749) is 748."""

PerSample: TypeAlias = Float[Tensor, " b"]
"""One number a sample: coefficients, weights, distances."""

RealLatent: TypeAlias = Float[Tensor, " n *d"]
"""Real samples of the same shape in a batch of their own size."""

RealTime: TypeAlias = Float32[Tensor, " n"]
"""One time a real sample."""

Flags: TypeAlias = Bool[Tensor, " b"]
"""One truth value a sample."""

Logits: TypeAlias = Float[Tensor, " b"]
"""A discriminator's answer, one a sample; positive means real."""

FeatureMap: TypeAlias = Float[Tensor, " b c h w"]
"""Features of a network at one place."""

Scalar: TypeAlias = Float[Tensor, ""]
"""A number on the device."""

Condition: TypeAlias = Any
"""A pytree of batch-first tensors (labels, text, ...) or None; never looked into."""

Want: TypeAlias = Literal["output", "features", "logits"]
"""What a network may be asked for."""


class NetworkOutput(NamedTuple):
    """What a network gave when asked by name; what was not asked for is None.

    Attributes:
        output: Its prediction, of the shape of its input.
        features: Its features, mostly [b, c, h, w].
        logits: Its head's answers, [b].
    """

    output: Tensor | None = None
    features: Tensor | None = None
    logits: Tensor | None = None


@runtime_checkable
class Network(Protocol):
    """A network as a parameterization sees it: `network(c_in x_t, c_noise, cond)`."""

    def __call__(self, x: Latent, c_noise: Time, cond: Condition) -> Latent:
        """Answers with its prediction.

        Args:
            x: The scaled noisy samples, [b, ...].
            c_noise: What it is fed as time, fp32 [b].
            cond: The condition.

        Returns:
            A tensor of the shape of `x`.
        """
        ...


@runtime_checkable
class FeatureNetwork(Protocol):
    """A network whose one `forward` can also be asked for features or logits.

    For shared passes (`SharedCriticLoss`, `SharedGeneratorLoss`) it takes two more
    keywords: `outputs`, how many samples, the first of the batch, get an output while
    all get features, and `output_grad=False`, by which the output has no graph.
    """

    def __call__(
        self,
        x: Latent,
        c_noise: Time,
        cond: Condition,
        *,
        want: Sequence[Want] | None = None,
    ) -> Latent | NetworkOutput:
        """Answers with the output alone, or, if `want` is given, with what it names.

        Args:
            x: The scaled noisy samples, [b, ...].
            c_noise: What it is fed as time, fp32 [b].
            cond: The condition.
            want: What to answer with; the output alone if None.

        Returns:
            The output, or a `NetworkOutput`.
        """
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A denoiser has `.process` and is called as `denoiser(x_t, t, cond)`.

    It estimates the clean sample: teacher, critic, student, a guided teacher.
    """

    @property
    def process(self) -> "NoiseProcess":
        """The process whose noise it removes."""
        ...

    def __call__(self, x_t: Latent, t: Time, cond: Condition, /) -> Latent:
        r"""Estimates $\mathbb{E}[x_0 \mid x_t]$.

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition.

        Returns:
            The estimate, [b, ...].
        """
        ...


@runtime_checkable
class Discriminator(Protocol):
    """A discriminator has `.process` and `.logits(x_t, t, cond)`.

    It tells real from generated: the critic with a head, a head on other features.
    """

    @property
    def process(self) -> "NoiseProcess":
        """The process whose noise its inputs carry."""
        ...

    def logits(self, x_t: Latent, t: Time, cond: Condition, /) -> Logits:
        """Answers one logit a sample; positive means real.

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition.

        Returns:
            The logits, [b].
        """
        ...


@runtime_checkable
class TimeSampler(Protocol):
    """A time sampler is called as `times(batch, device=..., generator=...)`.

    It is the distribution of times from which a loss draws.
    """

    def __call__(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Time:
        """Draws times.

        Args:
            batch: How many samples.
            device: Where the times go.
            generator: Source of what is drawn, on that device.

        Returns:
            One time for each of `batch` samples, fp32 [b].
        """
        ...
