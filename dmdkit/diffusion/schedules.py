"""Lists of times: noise levels of a sampler, calls of a few-step student."""

from typing import TypeVar

import torch

Number = TypeVar("Number", float, torch.Tensor)


def karras_sigmas(
    steps: int,
    sigma_min: float | int = 0.002,
    sigma_max: float | int = 80.0,
    rho: float | int = 7.0,
) -> tuple[float, ...]:
    r"""EDM's grid of noise levels, from the largest to the smallest.

    $\sigma_i = (\sigma_{\max}^{1/\rho} + \frac{i}{n-1} (\sigma_{\min}^{1/\rho} -
    \sigma_{\max}^{1/\rho}))^\rho$.

    Source: Karras et al. 2022 (arXiv 2206.00364), Eq. 5, without the final zero.

    Args:
        steps: The number of levels, at least 1 (one level is `sigma_max`).
        sigma_min: The smallest level, > 0.
        sigma_max: The largest level, > `sigma_min`.
        rho: How strongly the levels gather at the small end.

    Returns:
        The levels in falling order.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> [round(sigma, 3) for sigma in karras_sigmas(3)]
        [80.0, 2.515, 0.002]
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, expected "
            "0 < sigma_min < sigma_max."
        )
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = (i / max(steps - 1, 1) for i in range(steps))
    return tuple((high + r * (low - high)) ** rho for r in ramp)


def shifted(t: Number, shift: float | int) -> Number:
    r"""Times on [0, 1], shifted: $t' = s t / (1 + (s - 1) t)$.

    Written so that it is exactly 1 at t = 1, and never above.

    Source: Esser et al. 2024 (arXiv 2403.03206), Eq. 23.

    Args:
        t: A time, or times of any shape.
        shift: The shift s > 0.

    Returns:
        What `t` becomes.
    """
    return t / (t + (1 - t) / shift)


def few_step_times(n: int, steps: int = 1000) -> tuple[float, ...]:
    """The times of an n-step student of a discrete process.

    DMD2, section 4.4: 999, 749, 499, 249 for four steps of 1000. The official code
    takes every (steps // n)-th index down from the last; where `n` does not divide
    `steps` its list is longer than n and only the first n are used, as here.

    Args:
        n: The number of student calls, 1 ... `steps`.
        steps: The number of indices of the process.

    Returns:
        The times in falling order.

    Raises:
        ValueError: If `n` is out of range.

    Examples:
        >>> few_step_times(4)
        (999.0, 749.0, 499.0, 249.0)
    """
    if not 1 <= n <= steps:
        raise ValueError(f"n: got {n}, expected 1 ... {steps}.")
    return tuple(float(steps - 1 - i * (steps // n)) for i in range(n))


def few_step_flow_times(n: int, shift: float | int = 1.0) -> tuple[float, ...]:
    r"""The times of an n-step student of a rectified flow, shifted.

    Uniform before the shift: $u_i = 1 - i/n$, $t_i = s u_i / (1 + (s - 1) u_i)$.

    Source: Esser et al. 2024 (arXiv 2403.03206), Eq. 23, for the shift.

    Args:
        n: The number of student calls, at least 1.
        shift: The shift s > 0, as in `ShiftedTime`.

    Returns:
        The times in falling order, from 1.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> few_step_flow_times(4, shift=5)
        (1.0, 0.9375, 0.8333333333333334, 0.625)
    """
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least 1.")
    if not shift > 0:
        raise ValueError(f"shift: got {shift}, expected > 0.")
    uniform_times = (1 - i / n for i in range(n))
    return tuple(shifted(u, shift) for u in uniform_times)
