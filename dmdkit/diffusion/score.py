"""A network, its noise process and its parameterization, seen as a denoiser."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dmdkit._checked import checked, describe
from dmdkit.diffusion.parameterizations import Parameterization
from dmdkit.diffusion.processes import NoiseProcess, expand_as
from dmdkit.types import (
    Condition,
    FeatureMap,
    Latent,
    Logits,
    NetworkOutput,
    Time,
    Want,
)

Quantity = Literal["x0", "score", "features", "logits"]


class Estimate(NamedTuple):
    """What was asked of a `ScoreEstimator`; what was not asked for is None.

    Attributes:
        x0: The clean samples, [b, ...].
        score: The scores (DMD2, Eq. 1), [b, ...].
        features: The network's features, [b, c, h, w].
        logits: The head's answers, [b].
    """

    x0: Tensor | None = None
    score: Tensor | None = None
    features: Tensor | None = None
    logits: Tensor | None = None


class ScoreEstimator(nn.Module):
    r"""Teacher, critic or student: $\mu(x_t, t)$ of DMD2, section 3.

    The network is what gets trained, wrapped (DDP, FSDP2) and compiled; the estimator
    stays outside of that and adds the affine map of its parameterization, in fp32. Its
    network is called as `network(c_in * x_t, c_noise, cond)` and, for features or
    logits, with `want=(...)` (see `FeatureNetwork`). It chooses its own compute dtype.

    Attributes:
        network: The network, wrapped or not.
        parameterization: How its output is read.

    Args:
        network: The network.
        process: The noise process that the network was trained on.
        parameterization: What the network predicts.

    Raises:
        ValueError: If the parameterization has no x0 at some time of the process, such
            as epsilon where alpha is 0.

    Examples:
        >>> import torch
        >>> from dmdkit import RectifiedFlow, ScoreEstimator, VelocityPrediction
        >>> class Zero(torch.nn.Module):
        ...     def forward(self, x, c_noise, cond):
        ...         return torch.zeros_like(x)
        >>> teacher = ScoreEstimator(Zero(), RectifiedFlow(), VelocityPrediction())
        >>> teacher(torch.ones(2, 3), torch.tensor([0.5, 1.0]), None).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: nn.Module,
        process: NoiseProcess,
        parameterization: Parameterization,
    ) -> None:
        super().__init__()
        for name, value, kind in (
            ("network", network, nn.Module),
            ("process", process, NoiseProcess),
            ("parameterization", parameterization, Parameterization),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"{name}: got {describe(value)}, expected a {kind.__name__}."
                )
        parameterization.check(process)
        self.network = network
        self.parameterization = parameterization
        self._process = process

    if TYPE_CHECKING:

        def __call__(self, x_t: Latent, t: Time, cond: Condition = None, /) -> Latent:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    @property
    def process(self) -> NoiseProcess:
        """The noise process in whose units `t` is."""
        return self._process

    @checked
    def forward(self, x_t: Latent, t: Time, cond: Condition = None) -> Latent:
        r"""Estimates the clean sample, $\mathbb{E}[x_0 \mid x_t]$.

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition, handed to the network as it is.

        Returns:
            The estimate, [b, ...], in fp32 or better.

        Raises:
            ValueError: If a shape is wrong, the network's output included.
            TypeError: If a dtype is wrong.
        """
        c = self.parameterization.coefficients(self.process, t)
        output = self.network(expand_as(c.c_in, x_t) * x_t, c.c_noise, cond)
        return self._to_x0(output, x_t, c.c_skip, c.c_out)

    @checked
    def estimate(
        self,
        x_t: Latent,
        t: Time,
        cond: Condition = None,
        *,
        want: Sequence[Quantity],
        outputs: int | None = None,
        output_grad: bool = True,
    ) -> Estimate:
        """Gives several quantities in one pass of the network.

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition.
            want: Any of "x0", "score", "features", "logits".
            outputs: How many samples, the first of the batch, get x0 and score; all if
                None. The rest of the network is not run for the others.
            output_grad: Whether x0 and score have a graph; if not, only features and
                logits do, and the rest of the network saves nothing.

        Returns:
            What was asked for.

        Raises:
            ValueError: If a shape is wrong, `want` names something else, or `outputs`
                is no number of samples.
            TypeError: If a dtype is wrong, or if the network has no such thing to give.
        """
        unknown = set(want) - set(Estimate._fields)
        if unknown or not want:
            raise ValueError(
                f"want: got {list(want)}, expected one or more of "
                f"{', '.join(Estimate._fields)}."
            )
        if outputs is not None and not 0 < outputs <= len(x_t):
            raise ValueError(f"outputs: got {outputs}, expected 1 ... {len(x_t)}.")
        inner: list[Want] = [name for name in ("features", "logits") if name in want]
        if "x0" in want or "score" in want:
            inner.insert(0, "output")
        c = self.parameterization.coefficients(self.process, t)
        x = expand_as(c.c_in, x_t) * x_t
        given = self._ask(x, c.c_noise, cond, inner, outputs, output_grad)
        found: dict[str, Tensor | None] = {
            "features": given.features,
            "logits": given.logits,
        }
        if "output" in inner:
            n = len(x_t) if outputs is None else outputs
            with torch.set_grad_enabled(output_grad and torch.is_grad_enabled()):
                x0 = self._to_x0(given.output, x_t[:n], c.c_skip[:n], c.c_out[:n])
                found["x0"] = x0
                if "score" in want:
                    found["score"] = self._to_score(x0, x_t[:n], t[:n])
        return Estimate(**{name: found[name] for name in want})

    @checked
    def score(self, x_t: Latent, t: Time, cond: Condition = None) -> Latent:
        r"""The score $\nabla \log p_t(x_t) = -(x_t - \alpha_t \mu(x_t, t)) / \sigma_t^2$.

        Source: DMD2, Eq. 1.

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b]; the score is not finite where sigma is 0.
            cond: The condition.

        Returns:
            The score, [b, ...].

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype is wrong.
        """  # noqa: E501
        return self._to_score(self(x_t, t, cond), x_t, t)

    def features(self, x_t: Latent, t: Time, cond: Condition = None) -> FeatureMap:
        """The network's features at the place that it names, [b, c, h, w].

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition.

        Returns:
            The feature map.

        Raises:
            TypeError: If the network has no features to give.
        """
        features = self.estimate(x_t, t, cond, want=("features",)).features
        assert features is not None
        return features

    def logits(self, x_t: Latent, t: Time, cond: Condition = None) -> Logits:
        """The logits of the network's head: positive means real (DMD2, Eq. 4).

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition.

        Returns:
            One logit a sample, [b].

        Raises:
            TypeError: If the network has no head.
        """
        logits = self.estimate(x_t, t, cond, want=("logits",)).logits
        assert logits is not None
        return logits

    def _ask(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Condition,
        want: list[Want],
        outputs: int | None,
        output_grad: bool,
    ) -> NetworkOutput:
        decoding: dict[str, Any] = {}
        if outputs is not None:
            decoding["outputs"] = outputs
        if not output_grad:
            decoding["output_grad"] = False
        if want == ["output"] and not decoding:
            return NetworkOutput(self.network(x, c_noise, cond))
        try:
            given = self.network(x, c_noise, cond, want=tuple(want), **decoding)
        except TypeError as error:
            refused = [name for name in decoding if f"'{name}'" in str(error)]
            if refused:
                raise TypeError(
                    f"network: it takes no `{refused[0]}`, which a shared pass needs; "
                    "add it to its forward (see dmdkit.types.FeatureNetwork), or leave "
                    "passes apart."
                ) from error
            if "'want'" not in str(error):
                raise
            raise TypeError(
                f"network: it takes no `want`, so it cannot give {', '.join(want)}; "
                "add `*, want=None` to its forward and answer with a NetworkOutput "
                "when it is given (see dmdkit.types.FeatureNetwork)."
            ) from error
        if not isinstance(given, NetworkOutput) or any(
            getattr(given, name) is None for name in want
        ):
            raise TypeError(
                f"network: asked for {', '.join(want)}, it did not give all of them; "
                "a head is needed for logits (see trainable_copy(..., head=...))."
            )
        if given.logits is not None and given.logits.shape != x.shape[:1]:
            raise ValueError(
                f"head: it gave {describe(given.logits)} for {x.shape[0]} samples, "
                "expected one logit a sample, [b]; flatten its answer."
            )
        return given

    def _to_x0(
        self, output: object, x_t: Tensor, c_skip: Tensor, c_out: Tensor
    ) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"network: its output is {describe(output)}, expected one tensor; wrap "
                "the network so that it answers with that alone."
            )
        if output.shape != x_t.shape:
            raise ValueError(
                f"network: its output is {describe(output)} for an input "
                f"{describe(x_t)}, expected the same shape; a variance half must be "
                "dropped by the network."
            )
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        return expand_as(c_skip, x_t) * x_t.to(dtype) + (
            expand_as(c_out, x_t) * output.to(dtype)
        )

    def _to_score(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha = expand_as(self.process.alpha(t), x_t)
        sigma = expand_as(self.process.sigma(t), x_t)
        return -(x_t - alpha * x0) / sigma.square()
