import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmdkit import FeatureStatistics, frechet_distance, nearest_distance
from dmdkit.metrics import (
    density_coverage,
    kernel_distance,
    manifold,
    precision_recall,
    squared_mmd,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gather(*batches: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def with_moments(mean: Tensor, covariance: Tensor, n: int = 50) -> Tensor:
    """Features that have exactly this mean and unbiased covariance."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=seeded())
    x = x - x.mean(dim=0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)))
    return x @ whiten.T @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(dim: int, seed: int) -> Tensor:
    root = torch.randn(dim, dim, dtype=torch.float64, generator=seeded(seed))
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


def test_diagonal_gaussians_have_a_distance_in_closed_form() -> None:
    # For commuting covariances: |m - m'|^2 + sum (s - s')^2.
    spread = torch.tensor([1.0, 2.0, 0.5]).double()
    other = torch.tensor([3.0, 2.0, 1.5]).double()
    a = gather(with_moments(torch.zeros(3).double(), spread.square().diag()))
    mean = torch.tensor([1.0, 0.0, -2.0]).double()
    b = gather(with_moments(mean, other.square().diag()))
    assert frechet_distance(a, b) == pytest.approx(5 + 4 + 0 + 1, abs=1e-9)


def test_two_correlated_dimensions_by_hand() -> None:
    # For 2x2, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), and S_a S_b has the eigenvalues
    # of S_a^1/2 S_b S_a^1/2.
    one = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double()
    two = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    product = one @ two
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (one.trace() + two.trace()).item() - 2 * root
    zero = torch.zeros(2).double()
    a, b = gather(with_moments(zero, one)), gather(with_moments(zero, two))
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dim", [2, 5, 20])
def test_the_distance_agrees_with_scipy_s_matrix_root(dim: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    one, two = random_covariance(dim, 1), random_covariance(dim, 2)
    mean = torch.randn(dim, dtype=torch.float64, generator=seeded(3))
    root = linalg.sqrtm(one.numpy() @ two.numpy())
    expected = mean.square().sum() + (one + two).trace() - 2 * root.real.trace()
    a = gather(with_moments(torch.zeros_like(mean), one))
    b = gather(with_moments(mean, two))
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-8)


def test_a_set_has_no_distance_to_itself() -> None:
    x = torch.randn(100, 8, generator=seeded())
    assert abs(frechet_distance(gather(x), gather(x))) < 1e-10


def test_degenerate_features_give_a_finite_distance() -> None:
    # One feature is constant: both covariances are singular, the formula still holds.
    x = torch.randn(50, 3, generator=seeded()).double()
    x[:, 2] = 1.0
    y = 2 * x
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.trace(torch.cov(x.T))
    assert frechet_distance(gather(x), gather(y)) == pytest.approx(
        expected.item(), abs=1e-7
    )


def test_mean_and_covariance_are_the_textbook_s() -> None:
    x = torch.randn(31, 4, dtype=torch.float64, generator=seeded())
    found = gather(x[:10], x[10:11], x[11:])
    assert found.count == 31
    torch.testing.assert_close(found.mean, x.mean(dim=0))
    torch.testing.assert_close(found.covariance, torch.cov(x.T))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_parts_equal_one_pass(
    sizes: list[int], offset: float, seed: int
) -> None:
    x = offset + torch.randn(
        sum(sizes) + 2, 3, dtype=torch.float64, generator=seeded(seed)
    )
    whole = gather(x)
    merged = gather(x[-2:])
    for part in x[:-2].split(sizes):
        merged.merge(gather(part))
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10
    )


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    # A sum of squares minus the squared mean would lose all sixteen digits here.
    x = torch.randn(1000, 3, dtype=torch.float64, generator=seeded())
    far = gather(*(x + 1e8).split(64))
    torch.testing.assert_close(far.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-6)
    a, b = gather(x + 1e6), gather(2 * x + 1e6)
    expected = x.mean(0).square().sum() + torch.cov(x.T).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)


def test_low_precision_features_are_summed_in_fp64() -> None:
    x = torch.randn(64, 2, generator=seeded()).bfloat16().requires_grad_()
    found = gather(x)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    torch.testing.assert_close(found.mean, x.detach().double().mean(0))
    assert not found.mean.requires_grad


def test_statistics_continue_from_their_state() -> None:
    x = torch.randn(20, 3, generator=seeded())
    first, second = gather(x[:10]), FeatureStatistics(3)
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        one.update(x[10:])
    assert torch.equal(first.covariance, second.covariance)
    assert second.count == 20
    with pytest.raises(ValueError, match="state: 3 features, expected 2"):
        FeatureStatistics(2).load_state_dict(first.state_dict())


def test_bad_statistics_are_named() -> None:
    with pytest.raises(ValueError, match="dim: got 0"):
        FeatureStatistics(0)
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match="got 2 a sample, expected 3"):
        statistics.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.tensor([[1.0, math.nan, 0.0]]))
    with pytest.raises(ValueError, match="features"):
        statistics.update(torch.zeros(3))
    with pytest.raises(ValueError, match="other: 2 features, expected 3"):
        statistics.merge(FeatureStatistics(2))
    with pytest.raises(ValueError, match="1 samples, expected at least 2"):
        _ = gather(torch.zeros(1, 3)).covariance
    enough, few = gather(torch.eye(4)[:, :3]), gather(torch.eye(3))
    with pytest.raises(ValueError, match="b: 3 samples of 3 features"):
        frechet_distance(enough, few)
    with pytest.raises(ValueError, match="a, b: 3 and 2 features"):
        frechet_distance(enough, gather(torch.eye(3)[:, :2]))


def brute_force(x: Tensor, reference: Tensor) -> list[float]:
    return [
        min(math.dist(a, b) for b in reference.double().tolist())
        for a in x.double().tolist()
    ]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_the_nearest_is_that_of_trying_all(n: int, m: int, seed: int) -> None:
    x = torch.randn(n, 3, generator=seeded(seed))
    reference = torch.randn(m, 3, generator=seeded(seed + 1))
    found = nearest_distance(x, reference)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(brute_force(x, reference))


def test_a_set_held_against_itself_skips_itself() -> None:
    x = torch.randn(7, 4, generator=seeded(), dtype=torch.float64) + 1e6
    assert nearest_distance(x, x).tolist() == [0] * 7
    others = [
        brute_force(x[i : i + 1], torch.cat((x[:i], x[i + 1 :])))[0] for i in range(7)
    ]
    found = nearest_distance(x, x, skip_identical=True)
    assert found.tolist() == pytest.approx(others, rel=1e-9)
    assert found.min() > 0


def test_more_samples_than_one_chunk_keep_their_order() -> None:
    x = torch.arange(2500.0)[:, None]
    found = nearest_distance(x, torch.zeros(1, 1))
    torch.testing.assert_close(found, x[:, 0].double())


def test_an_empty_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference: it is empty"):
        nearest_distance(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="reference"):
        nearest_distance(torch.zeros(2, 3), torch.zeros(2, 4))


def test_kernel_distance_by_two_loops() -> None:
    a = torch.randn(6, 4, generator=seeded(1))
    b = torch.randn(5, 4, generator=seeded(2)) + 0.5

    def mean_of_pairs(x: Tensor, y: Tensor, same: bool) -> float:
        values = [
            (float(p.double() @ q.double()) / 4 + 1) ** 3
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    expected = mean_of_pairs(a, a, True) + mean_of_pairs(b, b, True)
    expected -= 2 * mean_of_pairs(a, b, False)
    assert squared_mmd(a, b).item() == pytest.approx(expected, rel=1e-12)
    whole = kernel_distance(a[:5], b, subsets=3, subset_size=5, generator=seeded())
    assert whole.mean == pytest.approx(squared_mmd(a[:5], b).item())
    assert whole.std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_has_no_bias() -> None:
    """Between sets of one distribution it is zero on average, within its error."""
    draws = [
        squared_mmd(*torch.randn(2, 20, 3, generator=seeded(seed))).item()
        for seed in range(400)
    ]
    values = torch.tensor(draws)
    assert abs(values.mean()) < 3 * values.std() / 20
    assert (values < 0).any()


def test_precision_and_recall_of_constructed_points() -> None:
    # Real: a chain 0, 1, 2, 3 and an outlier at 10. With k = 1 the chain's points reach
    # 1 far, the outlier 7: all samples but the last are within reach of one.
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    samples = torch.tensor([[-1.0], [0.5], [2.9], [17.0], [17.1]])
    found = precision_recall(samples, real, neighbours=1)
    assert found.precision == pytest.approx(4 / 5)
    # Samples reach 1.5, 1.5, 2.4, 0.1, 0.1: to 0, 1, 2 and 3, not to 10.
    assert found.recall == pytest.approx(4 / 5)
    assert precision_recall(real, real, neighbours=3) == (1, 1)
    far = precision_recall(real + 100, real, neighbours=3)
    assert far == (0, 0)


def test_density_and_coverage_of_constructed_points() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    samples = torch.tensor([[0.5], [0.5], [50.0]])
    found = density_coverage(samples, real, neighbours=1)
    # Each 0.5 is within reach of 0 and of 1 alone.
    assert found.density == pytest.approx(4 / 3)
    assert found.coverage == pytest.approx(2 / 5)
    two = density_coverage(samples, real, neighbours=2)
    # With k = 2 the reaches are 2, 1, 1, 2, 8: 0.5 is within 0, 1 and no other's.
    assert two.density == pytest.approx(4 / (2 * 3))


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(30, 4, generator=seeded(1))
    real = torch.randn(41, 4, generator=seeded(2))
    whole = precision_recall(samples, real), density_coverage(samples, real)
    monkeypatch.setattr(manifold, "CHUNK", 7)
    assert (precision_recall(samples, real), density_coverage(samples, real)) == whole
    assert 0 < whole[0].precision < 1


@pytest.mark.parametrize("call", [precision_recall, density_coverage])
def test_neighbours_must_be_fewer_than_points(call: Any) -> None:
    few, many = torch.randn(3, 2), torch.randn(9, 2)
    with pytest.raises(ValueError, match="neighbours: got 3 with sets of 3 points"):
        call(many, few, neighbours=3)


def test_kernel_distance_refuses_sets_smaller_than_its_subsets() -> None:
    few = torch.randn(10, 2)
    with pytest.raises(ValueError, match="fewer than subset_size 1000"):
        kernel_distance(few, few)
    with pytest.raises(ValueError, match="at least 2"):
        squared_mmd(few[:1], few)
    with pytest.raises(ValueError, match="subsets, subset_size"):
        kernel_distance(few, few, subsets=0)


def test_statistics_in_a_file(tmp_path: Path) -> None:
    x = torch.randn(30, 4, dtype=torch.float64, generator=seeded())
    statistics = gather(x[:20])
    statistics.save(tmp_path / "own.npz")
    again = FeatureStatistics.load(tmp_path / "own.npz")
    again.update(x[20:])
    expected = gather(x)
    assert again.count == 30
    assert torch.allclose(again.mean, expected.mean, atol=1e-14)
    assert torch.allclose(again.covariance, expected.covariance, atol=1e-13)
    # As EDM and clean-fid write them: numpy's own moments, without a number of samples.
    theirs = tmp_path / "theirs.npz"
    values = x.numpy()
    np.savez(theirs, mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    read = FeatureStatistics.load(theirs, count=30)
    assert frechet_distance(read, expected) == pytest.approx(0, abs=1e-9)


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no statistics"):
        FeatureStatistics.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        FeatureStatistics.load(tmp_path / "none.pkl")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("count", {"mu": np.zeros(2), "sigma": np.eye(2)}),
        ("holds no statistics", {"mu": np.zeros(2)}),
        ("not symmetric", {"mu": np.zeros(2), "sigma": np.triu(np.ones((2, 2)))}),
        ("not finite", {"mu": np.full(2, np.nan), "sigma": np.eye(2)}),
        (r"\[dim, dim\]", {"mu": np.zeros(2), "sigma": np.eye(3)}),
        ("is of 9 samples", {"mu": np.zeros(2), "sigma": np.eye(2), "count": 9}),
    ]
    for name, arrays in cases:
        np.savez(tmp_path / "s.npz", **arrays)
        with pytest.raises(ValueError, match=name):
            FeatureStatistics.load(
                tmp_path / "s.npz", count=None if name == "count" else 5
            )
