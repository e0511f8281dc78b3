"""Streaming feature statistics and the distances between them."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.training.ranks import gathered


class FeatureStatistics:
    """Mean and covariance of feature vectors, gathered batch by batch in fp64.

    Statistics of parts can be merged (`a.merge(b)`), and the result is that of one
    pass, since the mean is kept apart from the scatter around it (Chan et al. 1979).

    Args:
        dim: The number of features.
        features: The name of what the features are of: network, weights, preparation
            of the images. Statistics with two names are neither merged nor compared.
            None: it is not known, as in other programs' files.

    Raises:
        ValueError: If `dim` is not positive.

    Examples:
        >>> import torch
        >>> statistics = FeatureStatistics(dim=2)
        >>> statistics.update(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        >>> statistics.mean
        tensor([1., 2.], dtype=torch.float64)
    """

    def __init__(self, dim: int, features: str | None = None) -> None:
        if dim < 1:
            raise ValueError(f"dim: got {dim}, expected at least 1.")
        self.dim, self.features = dim, features
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @checked
    def update(self, features: Float[Tensor, " b f"]) -> None:
        """Adds a batch.

        Args:
            features: Feature vectors, [b, dim]; any device.

        Raises:
            ValueError: If the number of features is another, or one is not finite.
        """
        if features.shape[1] != self.dim:
            raise ValueError(
                f"features: got {features.shape[1]} a sample, expected {self.dim}."
            )
        values = features.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("features: some are not finite.")
        batch = FeatureStatistics.__new__(FeatureStatistics)
        batch.dim, batch.features = self.dim, None
        batch.count = values.shape[0]
        batch.mean = values.mean(dim=0)
        centred = values - batch.mean
        batch._scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the statistics of another part.

        Args:
            other: Statistics of the same features.

        Raises:
            ValueError: If the number of features is another, or their name.
        """
        if other.dim != self.dim:
            raise ValueError(f"other: {other.dim} features, expected {self.dim}.")
        _require_same_features("other", other.features, self.features)
        self.features = self.features or other.features
        total = self.count + other.count
        if other.count == 0:
            return
        step = other.mean - self.mean
        self._scatter = (
            self._scatter
            + other._scatter
            + torch.outer(step, step) * (self.count * other.count / total)
        )
        self.mean = self.mean + step * (other.count / total)
        self.count = total

    def merged_ranks(self) -> "FeatureStatistics":
        """Gives the statistics of all ranks, merged in their order, on every rank.

        A collective call if there are ranks. One process and several agree to rounding.

        Returns:
            The statistics of all.

        Raises:
            ValueError: If the ranks have other features.
        """
        merged = FeatureStatistics(self.dim, self.features)
        for state in gathered(self.state_dict()):
            part = FeatureStatistics(len(state["mean"]))
            part.load_state_dict(state)
            merged.merge(part)
        return merged

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, fp64 [dim, dim].

        Raises:
            ValueError: If there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"count: {self.count} samples, expected at least 2.")
        return self._scatter / (self.count - 1)

    @classmethod
    def of_moments(
        cls,
        mean: Tensor,
        covariance: Tensor,
        count: int,
        features: str | None = None,
    ) -> "FeatureStatistics":
        """Makes statistics of moments that are known.

        Args:
            mean: The mean, [dim].
            covariance: The unbiased covariance, [dim, dim].
            count: How many samples they are of, at least 2.
            features: The name of the features.

        Returns:
            The statistics, to which more may be added.

        Raises:
            ValueError: If the shapes do not match, a number is not finite, or the
                covariance is not symmetric.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or count < 2:
            raise ValueError(
                f"mean, covariance, count: got {list(mean.shape)}, "
                f"{list(covariance.shape)}, {count}, expected [dim], [dim, dim] and at "
                "least 2."
            )
        mean, covariance = mean.double(), covariance.double()
        if not bool(mean.isfinite().all() & covariance.isfinite().all()):
            raise ValueError("mean, covariance: some numbers are not finite.")
        if not torch.allclose(covariance, covariance.T, atol=1e-8):
            raise ValueError("covariance: it is not symmetric.")
        made = cls(len(mean), features)
        made.count, made.mean = count, mean.clone()
        made._scatter = covariance * (count - 1)
        return made

    def save(self, path: str | Path) -> None:
        """Writes `mu` and `sigma` as EDM's files have them, `count` and `features`.

        Args:
            path: The file, `.npz`.

        Raises:
            ValueError: If the name has another ending, or there are fewer than two
                samples.
        """
        path = _npz(path)
        moments = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.features is not None:
            moments["features"] = np.array(self.features)
        np.savez(path, allow_pickle=False, count=self.count, **moments)

    @classmethod
    def load(cls, path: str | Path, *, count: int | None = None) -> "FeatureStatistics":
        """Reads what `save` wrote, or statistics of EDM, NVIDIA or clean-fid.

        Args:
            path: The file, `.npz`, with `mu` and `sigma`.
            count: How many samples they are of, where the file does not say: 1,281,167
                for EDM's of ImageNet.

        Returns:
            The statistics.

        Raises:
            ValueError: If the file is missing or has no such arrays, or the number of
                samples is not known, or is another.
        """
        path = _npz(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            mean, covariance = (
                torch.from_numpy(np.asarray(found[name], dtype=np.float64))
                for name in ("mu", "sigma")
            )
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise ValueError(
                f"path: {path} holds no statistics, mu and sigma ({error})."
            ) from error
        told = int(found["count"]) if "count" in found else None
        if told is None and count is None:
            raise ValueError(
                f"count: {path} does not say how many samples it is of; give count."
            )
        if told is not None and count not in (None, told):
            raise ValueError(f"count: got {count}, {path} is of {told} samples.")
        features = str(found["features"]) if "features" in found else None
        return cls.of_moments(mean, covariance, told or count or 0, features)

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on."""
        return {
            "count": self.count,
            "mean": self.mean,
            "scatter": self._scatter,
            "features": self.features,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave.

        Args:
            state: What it gave.

        Raises:
            ValueError: If the number of features is another, or their name.
        """
        if state["mean"].shape != (self.dim,):
            raise ValueError(
                f"state: {state['mean'].numel()} features, expected {self.dim}."
            )
        _require_same_features("state", state.get("features"), self.features)
        self.features = self.features or state.get("features")
        self.count = int(state["count"])
        self.mean, self._scatter = state["mean"].clone(), state["scatter"].clone()


def _require_same_features(argument: str, got: str | None, own: str | None) -> None:
    if None not in (got, own) and got != own:
        raise ValueError(f"{argument}: features of {got}, expected those of {own}.")


def _npz(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path: got {path}, expected a name that ends in .npz.")
    return path


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    r"""The Frechet distance of two Gaussians.

    $\|m_a - m_b\|^2 + \mathrm{tr}(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2})$.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6. With N samples it is biased
    upwards by an amount that falls as 1/N: compare only numbers of one N.

    Args:
        a: Statistics of one set.
        b: Statistics of the other, of the same features.

    Returns:
        The distance, >= 0 up to rounding.

    Raises:
        ValueError: If the features differ in number or name, or a set is no larger
            than their number (its covariance would be singular).
    """
    if a.dim != b.dim:
        raise ValueError(f"a, b: {a.dim} and {b.dim} features, expected as many.")
    _require_same_features("b", b.features, a.features)
    for name, statistics in (("a", a), ("b", b)):
        if statistics.count <= statistics.dim:
            raise ValueError(
                f"{name}: {statistics.count} samples of {statistics.dim} features, "
                "expected more samples than features."
            )
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The product is positive semi-definite; what lies below zero is rounding.
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * cross.sqrt().sum()
    return float((a.mean - b.mean).square().sum() + trace)
