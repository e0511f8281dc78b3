"""Is the run healthy? Image statistics, the critic's grip, non-finite values.

The distribution matching loss says nothing about progress: it is the size of a
normalised gradient. What can be watched is whether general image statistics settle
(DMD2, Fig. 8 and Appendix C), how far critic and teacher are apart, and whether the
discriminator can tell real from generated.
"""

import math
import statistics
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmdkit.types import Flags, Latent, Time


@runtime_checkable
class Finite(Protocol):
    """A loss output whose samples are flagged."""

    @property
    def finite(self) -> Flags:
        """Which samples are finite."""
        ...


class NonFiniteError(RuntimeError):
    """A loss was not finite: the message names the loss, the times, the samples."""


def image_statistics(x: Latent) -> dict[str, Tensor]:
    """General statistics of a batch of images or latents (DMD2, Appendix C).

    Args:
        x: Samples, [b, c, ...].

    Returns:
        Detached scalars: `brightness` (mean of everything), `contrast` (mean standard
        deviation within a sample), `saturation` (mean standard deviation over the
        channels of one pixel; 0 for one channel), and `channel0_mean`,
        `channel0_std`, ... over batch and pixels.
    """
    x = x.detach().float()
    flat = x.reshape(x.shape[0], -1)
    channels = x.transpose(0, 1).reshape(x.shape[1], -1)
    spread = x.std(dim=1, correction=0).mean()
    values = {
        "brightness": flat.mean(),
        "contrast": flat.std(dim=1, correction=0).mean(),
        "saturation": spread if x.shape[1] > 1 else torch.zeros_like(spread),
    }
    for i, channel in enumerate(channels):
        values[f"channel{i}_mean"] = channel.mean()
        values[f"channel{i}_std"] = channel.std(correction=0)
    return values


def all_finite(*outputs: Finite) -> Tensor:
    """Whether every sample of every loss is finite: one truth value on the device.

    Read it before the optimizer's step, and take no step if it is False.

    Args:
        *outputs: Results of losses.

    Returns:
        A bool scalar tensor.
    """
    flags = [output.finite.all() for output in outputs]
    flags += [o.finite_real.all() for o in outputs if hasattr(o, "finite_real")]  # pyright: ignore[reportAttributeAccessIssue]
    return torch.stack(flags).all()


def explain_nonfinite(**losses: Any) -> str:
    """Says in one line which losses were not finite, at which times and samples.

    Args:
        **losses: Results of losses by name.

    Returns:
        The line; empty if all is finite. Reads from the device.
    """
    parts = []
    for name, output in losses.items():
        for which, flags, t in (
            ("sample", output.finite, getattr(output, "t", None)),
            (
                "real sample",
                getattr(output, "finite_real", None),
                getattr(output, "t_real", None),
            ),
        ):
            if flags is None or bool(flags.all()):
                continue
            bad = (~flags).nonzero().flatten().tolist()
            shown = ", ".join(_name_sample(i, t) for i in bad[:4])
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            parts.append(f"{name} is not finite for {which} {shown}{more}")
    return "; ".join(parts)


def _name_sample(index: int, t: Time | None) -> str:
    return f"{index}" if t is None else f"{index} (t = {t[index].item():g})"


class Monitor:
    """Watches a run from numbers that the loop hands over now and then.

    `observe` reads from the device, so call it on logging steps. The stability signal
    is the standard deviation of brightness over the last `window` observations,
    relative to the mean contrast: periodic fluctuation of image statistics is how an
    undertrained critic shows (DMD2, section 4.2); the remedy is more critic steps.

    Args:
        window: How many observations a judgement looks back on, at least 2.
        unstable_above: The signal above which the run is called unstable.
        accuracy_above: The mean discriminator accuracy above which the GAN term is
            called won by the discriminator.
        gap_above: How many times its lowest earlier mean, over a window other than the
            first, the DM gap may reach before critic and teacher are said to part.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> import torch
        >>> monitor = Monitor(window=2)
        >>> for step in (0, 100):
        ...     new_warnings = monitor.observe(step, torch.eye(8).expand(4, 1, 8, 8))
        >>> monitor.instability()
        0.0
    """

    def __init__(
        self,
        window: int = 20,
        unstable_above: float | int = 0.1,
        accuracy_above: float | int = 0.95,
        gap_above: float | int = 2.0,
    ) -> None:
        if window < 2 or unstable_above <= 0 or not 0.5 < accuracy_above <= 1:
            raise ValueError(
                f"window, unstable_above, accuracy_above: got {window}, "
                f"{unstable_above}, {accuracy_above}, expected >= 2, > 0, and within "
                "(0.5, 1]."
            )
        if not gap_above > 1:
            raise ValueError(f"gap_above: got {gap_above}, expected > 1.")
        self.window = window
        self.unstable_above = unstable_above
        self.accuracy_above = accuracy_above
        self.gap_above = gap_above
        self.history: list[dict[str, float]] = []
        self._recent: deque[dict[str, float]] = deque(maxlen=window)
        self._said: set[str] = set()

    def observe(
        self,
        step: float | int,
        samples: Latent,
        metrics: Mapping[str, Tensor | float | int] | None = None,
    ) -> list[str]:
        """Takes samples and metrics of one step, and judges the recent ones.

        Args:
            step: The step, for the history.
            samples: The student's samples, [b, c, ...].
            metrics: Scalars by name; all are kept, `accuracy` and `gap` are judged.

        Returns:
            New warnings, each a sentence; each kind is also given to
            `warnings.warn` once.
        """
        named = {**image_statistics(samples), **(metrics or {})}
        # One transfer for all.
        values = torch.stack(
            [torch.as_tensor(v, device=samples.device).float() for v in named.values()]
        )
        entry = {"step": float(step)}
        entry |= dict(zip(named, values.tolist(), strict=True))
        self.history.append(entry)
        self._recent.append(entry)
        fresh = [text for kind, text in self._judge() if kind not in self._said]
        self._said |= {kind for kind, _ in self._judge()}
        for text in fresh:
            warnings.warn(text, stacklevel=2)
        return fresh

    def instability(self) -> float | None:
        """The stability signal.

        Returns:
            0 is still; None until the window is full.
        """
        if len(self._recent) < self.window:
            return None
        # `statistics` raises at values that are not finite.
        brightness = torch.tensor([entry["brightness"] for entry in self._recent])
        contrast = torch.tensor([entry["contrast"] for entry in self._recent]).mean()
        spread = brightness.double().std(correction=0)
        return float(spread / contrast.clamp(min=1e-12))

    def require_finite(self, **losses: Any) -> None:
        """Stops the run if a loss was not finite.

        Args:
            **losses: Results of losses by name. Reads from the device.

        Raises:
            NonFiniteError: Naming the loss, the times and the samples.
        """
        line = explain_nonfinite(**losses)
        if line:
            raise NonFiniteError(
                f"{line}; no step was taken. Are these times of the process? If so, "
                "look at the inputs at these times, and at the learning rates."
            )

    def state_dict(self) -> dict[str, Any]:
        """Gives the history, for a checkpoint."""
        return {"history": [dict(e) for e in self.history], "said": sorted(self._said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a history.

        Args:
            state: What `state_dict` gave.
        """
        self.history = [dict(entry) for entry in state["history"]]
        self._recent = deque(self.history[-self.window :], maxlen=self.window)
        self._said = set(state["said"])

    def _judge(self) -> list[tuple[str, str]]:
        verdicts = []
        if not math.isfinite(self._recent[-1]["brightness"]):
            verdicts.append(
                (
                    "nonfinite",
                    "The samples hold values that are not finite: the student is "
                    "broken. Go back to a checkpoint and lower the learning rate.",
                )
            )
        signal = self.instability()
        if signal is not None and signal > self.unstable_above:
            verdicts.append(
                (
                    "unstable",
                    f"The brightness of the samples wanders by {signal:.2f} of their "
                    f"contrast over the last {self.window} observations: the critic "
                    "may not keep up. Try more critic steps or a lower learning rate.",
                )
            )
        accuracies = [e["accuracy"] for e in self._recent if "accuracy" in e]
        if len(accuracies) == self.window:
            mean = statistics.fmean(accuracies)
            if mean > self.accuracy_above:
                verdicts.append(
                    (
                        "discriminator",
                        f"The discriminator tells real from generated in {mean:.0%} of "
                        "cases: its gradient may be of little use. Try a lower "
                        "discriminator weight, or look at what betrays the samples.",
                    )
                )
        gaps = [entry["gap"] for entry in self.history if "gap" in entry]
        ends = range(len(gaps), 2 * self.window - 1, -self.window)
        # The first window is left out: critic and teacher agree when a run starts.
        means = [statistics.fmean(gaps[end - self.window : end]) for end in ends]
        if len(means) > 1 and means[0] > self.gap_above * min(means[1:]):
            verdicts.append(
                (
                    "gap",
                    f"The gap between teacher and critic is {means[0]:.3g} on average, "
                    f"after {min(means[1:]):.3g} earlier: the student moves away from "
                    "the teacher. Look at samples, and lower the learning rates.",
                )
            )
        return verdicts
