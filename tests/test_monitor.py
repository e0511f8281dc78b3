import math
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dmdkit import (
    DenoisingLoss,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DiscreteVariancePreserving,
    Monitor,
    NonFiniteError,
    RegressionLoss,
    all_finite,
    explain_nonfinite,
    image_statistics,
)

PROCESS = DiscreteVariancePreserving.scaled_linear()


class Flagged(NamedTuple):
    """As much of a loss's result as health is read from."""

    finite: Tensor
    t: Tensor


def images(brightness: float) -> Tensor:
    """A batch whose brightness is given and whose contrast is 1."""
    pixels = torch.tensor([1.0, -1.0, 1.0, -1.0]) + brightness
    return pixels.reshape(1, 1, 2, 2).repeat(3, 1, 1, 1)


def flags(*values: bool) -> Tensor:
    return torch.tensor(values)


def test_the_statistics_of_two_pixels_by_hand() -> None:
    x = torch.zeros(2, 2, 1, 2, requires_grad=True)
    with torch.no_grad():
        x[0, 0, 0] = torch.tensor([0.0, 2.0])
        x[0, 1, 0] = torch.tensor([4.0, 2.0])
        x[1, 0, 0] = torch.tensor([1.0, 1.0])
        x[1, 1, 0] = torch.tensor([1.0, 3.0])
    found = image_statistics(x)
    expected = {
        # (0 + 2 + 4 + 2 + 1 + 1 + 1 + 3) / 8
        "brightness": 14 / 8,
        # Sample 0: mean 2, deviations 2, 0, 2, 0; sample 1: mean 1.5, .5, .5, .5, 1.5.
        "contrast": (math.sqrt(8 / 4) + math.sqrt(3 / 4)) / 2,
        # Half the difference of the two channels at each of the four pixels.
        "saturation": (2 + 0 + 0 + 1) / 4,
        "channel0_mean": 1.0,
        "channel0_std": math.sqrt(2 / 4),
        "channel1_mean": 2.5,
        "channel1_std": math.sqrt((1.5**2 + 0.5**2 + 1.5**2 + 0.5**2) / 4),
    }
    assert {k: pytest.approx(v.item()) for k, v in found.items()} == expected
    assert not any(v.requires_grad for v in found.values())


@pytest.mark.parametrize("shape", [(4, 3), (4, 1, 5, 5), (2, 4, 3, 2, 2)])
def test_statistics_exist_for_any_rank(shape: tuple[int, ...]) -> None:
    found = image_statistics(torch.randn(shape, dtype=torch.bfloat16))
    assert len(found) == 3 + 2 * shape[1]
    assert all(v.ndim == 0 and v.dtype == torch.float32 for v in found.values())
    assert (found["saturation"] == 0) == (shape[1] == 1)


def test_the_signal_is_the_wandering_of_brightness_in_contrasts() -> None:
    monitor = Monitor(window=4, unstable_above=10)
    for step, value in enumerate((9.0, 0.0, 1.0, 0.0, 1.0)):
        assert monitor.instability() is None or step == 4
        monitor.observe(step, images(value))
    # Of the last four: standard deviation 1/2, contrast 1.
    assert monitor.instability() == pytest.approx(0.5)
    still = Monitor(window=2)
    for step in range(3):
        still.observe(step, images(4.0))
    assert still.instability() == pytest.approx(0, abs=1e-6)


def test_fluctuation_is_warned_about_once_in_a_sentence() -> None:
    monitor = Monitor(window=3, unstable_above=0.1)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            said += monitor.observe(step, images(0.5 * (-1) ** step))
    assert len(said) == len(caught) == 1
    assert str(caught[0].message) == said[0]
    assert "brightness" in said[0]
    assert "critic" in said[0]
    assert "over the last 3 observations" in said[0]
    assert said[0].endswith(".")


def test_a_settling_run_is_not_warned_about() -> None:
    monitor = Monitor(window=3, unstable_above=0.1)
    for step in range(12):
        assert monitor.observe(step, images(0.01 * (-1) ** step)) == []


def test_a_discriminator_that_has_won_is_warned_about_once() -> None:
    monitor, said = Monitor(window=3), []
    for step in range(2):
        said += monitor.observe(step, images(0), {"accuracy": torch.tensor(0.98)})
    with pytest.warns(UserWarning, match="tells real from generated in 98% of cases"):
        said += monitor.observe(2, images(0), {"accuracy": torch.tensor(0.98)})
    assert len(said) == 1
    assert monitor.observe(3, images(0), {"accuracy": 1.0}) == []
    seldom, even = Monitor(window=3), Monitor(window=3)
    for step in range(6):
        # Every second observation only: never a full window of accuracies.
        metrics = {"accuracy": 1.0} if step % 2 else None
        assert seldom.observe(step, images(0), metrics) == []
        assert even.observe(step, images(0), {"accuracy": 0.6}) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_warned_about(value: float) -> None:
    monitor = Monitor(window=2)
    monitor.observe(0, images(0.0))
    with pytest.warns(UserWarning, match="not finite"):
        monitor.observe(1, images(value))
    assert monitor.observe(2, images(value)) == []
    assert len(monitor.history) == 3


def test_the_history_keeps_every_number() -> None:
    monitor = Monitor(window=2)
    monitor.observe(7, images(0.25), {"gap": torch.tensor(0.5), "loss": 2})
    (entry,) = monitor.history
    assert entry["step"] == 7
    assert entry["gap"] == 0.5
    assert entry["loss"] == 2
    assert entry["brightness"] == pytest.approx(0.25)
    assert entry["contrast"] == pytest.approx(1)


def test_a_monitor_continues_from_its_state() -> None:
    def observe(monitor: Monitor, first: int, last: int) -> list[str]:
        said = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(first, last):
                said += monitor.observe(step, images(0.5 * (-1) ** step))
        return said

    whole = Monitor(window=3)
    first = observe(whole, 0, 5)
    for used in (0, 9):
        resumed = Monitor(window=3)
        observe(resumed, 0, used)
        resumed.load_state_dict(whole.state_dict())
        assert resumed.history == whole.history
        assert resumed.instability() == whole.instability()
        assert len(first) == 1
        assert observe(resumed, 5, 8) == []
    # Not even by a history shorter than the window is an older one mixed in.
    short = Monitor(window=3)
    observe(short, 0, 3)
    short.load_state_dict({"history": whole.history[:1], "said": []})
    assert short.instability() is None


def test_bad_settings_are_named() -> None:
    wrong: list[dict[str, Any]] = [
        {"window": 1},
        {"unstable_above": 0},
        {"accuracy_above": 0.5},
        {"accuracy_above": 1.1},
    ]
    for settings in wrong:
        with pytest.raises(ValueError, match="window, unstable_above, accuracy_above"):
            Monitor(**settings)


def broken_gan(real_value: float, fake_value: float):
    """The result of a GAN loss whose second sample is what is given."""

    class Sum:
        process = PROCESS

        def logits(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return x_t.sum(dim=1)

    x, real = torch.ones(3, 2), torch.ones(3, 2)
    x[1], real[1] = fake_value, real_value
    return DiffusionGANLoss(DiscreteUniformTime()).discriminator(
        x,
        None,
        real,
        None,
        discriminator=Sum(),
        t=torch.tensor([1.0, 2.0, 3.0]),
        t_real=torch.tensor([4.0, 5.0, 6.0]),
    )


def test_a_non_finite_sample_is_named_with_its_loss_and_time() -> None:
    monitor = Monitor()
    outputs = {
        "dm": Flagged(flags(True, False, False), torch.tensor([1.0, 749.0, 20.0])),
        "fine": Flagged(flags(True), torch.tensor([3.0])),
    }
    line = explain_nonfinite(**outputs)
    assert line == "dm is not finite for sample 1 (t = 749), 2 (t = 20)"
    with pytest.raises(NonFiniteError, match=r"1 \(t = 749\).*no step was taken"):
        monitor.require_finite(**outputs)
    assert explain_nonfinite(fine=outputs["fine"]) == ""
    monitor.require_finite(fine=outputs["fine"])


def test_of_many_samples_the_first_are_named() -> None:
    output = Flagged(torch.zeros(9, dtype=torch.bool), torch.arange(9.0))
    line = explain_nonfinite(critic=output)
    assert "3 (t = 3) and 5 more" in line
    assert "4 (t" not in line


def test_real_samples_are_told_from_generated_ones() -> None:
    real = explain_nonfinite(gan=broken_gan(math.nan, 1.0))
    assert real == "gan is not finite for real sample 1 (t = 5)"
    fake = explain_nonfinite(gan=broken_gan(1.0, math.inf))
    assert fake == "gan is not finite for sample 1 (t = 2)"
    both = explain_nonfinite(gan=broken_gan(math.nan, math.nan))
    assert both == f"{fake}; {real}"


def test_a_loss_without_times_is_named_by_sample() -> None:
    x = torch.tensor([[1.0], [math.nan]], requires_grad=True)
    output = RegressionLoss()(x, torch.zeros(2, 1))
    assert explain_nonfinite(pairs=output) == "pairs is not finite for sample 1"


def test_one_truth_value_for_all_losses_stays_on_the_device() -> None:
    class Identity:
        process = PROCESS

        def __call__(self, x_t: Tensor, t: Tensor, cond: object = None, /) -> Tensor:
            return x_t

    good = DenoisingLoss(DiscreteUniformTime())(torch.ones(2, 3), denoiser=Identity())
    fine, real, fake = (
        broken_gan(*values) for values in ((1.0, 1.0), (math.nan, 1), (1, math.nan))
    )
    for expected, outputs in (
        (True, (good, fine)),
        (False, (good, real)),
        (False, (fake, good)),
        (True, (good,)),
    ):
        answer = all_finite(*outputs)
        assert answer.dtype == torch.bool
        assert answer.shape == ()
        assert bool(answer) is expected
    # Nothing is read to the host: it works where there are no values.
    meta = Flagged(torch.ones(2, dtype=torch.bool, device="meta"), torch.zeros(2))
    assert all_finite(meta, meta).device.type == "meta"


def test_a_gap_that_grows_again_is_warned_about_once() -> None:
    monitor, said = Monitor(window=2, gap_above=2), []
    x = torch.eye(8).expand(2, 1, 8, 8)
    # The rise from the start, where critic and teacher are one, is no sign of trouble.
    for step, gap in enumerate((0.0, 0.1, 1.0, 1.2, 0.4, 0.4, 0.7, 0.8)):
        said += monitor.observe(step, x, {"gap": gap})
    assert not said
    with pytest.warns(UserWarning, match="The gap between teacher and critic is 0.95"):
        said += monitor.observe(8, x, {"gap": 0.9}) + monitor.observe(9, x, {"gap": 1})
    said += monitor.observe(10, x, {"gap": 5.0}) + monitor.observe(11, x, {"gap": 5.0})
    assert len(said) == 1


def test_a_gap_limit_that_could_never_be_right_is_refused() -> None:
    with pytest.raises(ValueError, match="gap_above: got 1, expected > 1"):
        Monitor(gap_above=1)
