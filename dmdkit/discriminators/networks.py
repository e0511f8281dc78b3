"""Where a head sits: on the critic itself, or on another network's features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dmdkit._checked import describe
from dmdkit.diffusion.processes import NoiseProcess
from dmdkit.types import (
    Condition,
    FeatureMap,
    Latent,
    Logits,
    NetworkOutput,
    Time,
    Want,
)


class NetworkWithHead(nn.Module):
    """A network and its head as one module with one `forward` (DMD2, section 4.3).

    So both are trained, clipped, wrapped, synchronised and checkpointed together.

    Args:
        network: A network that gives features when asked (`FeatureNetwork`).
        head: What turns its features into logits.
    """

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Latent,
            c_noise: Time,
            cond: Condition = None,
            *,
            want: Sequence[Want] | None = None,
            **decoding: Any,
        ) -> Any:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Condition = None,
        *,
        want: Sequence[Want] | None = None,
        **decoding: Any,
    ) -> Tensor | NetworkOutput:
        """Answers with the output alone, or with what `want` names.

        Args:
            x: The network's input, [b, ...].
            c_noise: What it is fed as time, fp32 [b].
            cond: The condition.
            want: Any of "output", "features", "logits".
            **decoding: What else the network takes, such as `outputs`; it says which
                samples get an output, and all get features and logits.

        Returns:
            The output, or a `NetworkOutput` if `want` is given.

        Raises:
            TypeError: If the network does not answer `want` with a `NetworkOutput`.
        """
        if want is None:
            return self.network(x, c_noise, cond)
        inner: list[Want] = [name for name in ("output", "features") if name in want]
        if "logits" in want and "features" not in inner:
            inner.append("features")
        given = self.network(x, c_noise, cond, want=tuple(inner), **decoding)
        if not isinstance(given, NetworkOutput):
            raise TypeError(
                f"network: asked for {', '.join(inner)} it gave {describe(given)}, "
                "expected a NetworkOutput."
            )
        return NetworkOutput(
            output=given.output,
            features=given.features if "features" in want else None,
            logits=self.head(given.features) if "logits" in want else None,
        )


@dataclass(frozen=True)
class FeatureDiscriminator:
    """A head on features of any origin: the frozen teacher's, or another module's.

    FastGen and ModelOpt read the teacher; DMD2 reads the critic, for which no such
    object is needed. Train `head.parameters()` alone.

    Attributes:
        features: Gives a feature map from (x_t, t, cond), such as `teacher.features`.
        head: Turns the map into one logit a sample.
        process: The noise process in whose units `t` is, such as `teacher.process`.
    """

    features: Callable[[Tensor, Tensor, Any], FeatureMap]
    head: Callable[[FeatureMap], Logits]
    process: NoiseProcess

    def logits(self, x_t: Latent, t: Time, cond: Condition = None) -> Logits:
        """Gives one logit a sample; positive means real.

        Args:
            x_t: Noisy samples, [b, ...].
            t: Their times, fp32 [b].
            cond: The condition.

        Returns:
            The logits, [b].

        Raises:
            ValueError: If the head does not answer with one logit a sample.
        """
        logits = self.head(self.features(x_t, t, cond))
        if logits.shape != x_t.shape[:1]:
            raise ValueError(
                f"head: it gave shape {list(logits.shape)} for {x_t.shape[0]} samples, "
                "expected one logit a sample."
            )
        return logits
