"""The noise process and the parameterization that a diffusers scheduler stands for."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from dmdkit.diffusion.parameterizations import (
    EpsilonPrediction,
    Parameterization,
    SamplePrediction,
    VelocityPrediction,
    VPrediction,
)
from dmdkit.diffusion.processes import (
    DiscreteVariancePreserving,
    NoiseProcess,
    RectifiedFlow,
)

FLOWS = (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)

PREDICTIONS: dict[str, type[Parameterization]] = {
    "epsilon": EpsilonPrediction,
    "v_prediction": VPrediction,
    "sample": SamplePrediction,
    "flow_prediction": VelocityPrediction,
}


def process_from_scheduler(scheduler: SchedulerMixin) -> NoiseProcess:
    r"""Gives the noise process of a diffusers scheduler.

    Flow matching gives `RectifiedFlow`, whose times lie in [0, 1]: the scheduler's
    shift belongs to the times of losses and students, not to the process. A scheduler
    with betas (DDPM, DDIM, PNDM, Euler, Euler ancestral, LCM, DPM-Solver and their
    like) gives `DiscreteVariancePreserving`. Its table is computed anew, in fp64 from
    the configuration, so that all schedulers of one configuration give equal processes,
    and those of SD1.5 and SDXL `DiscreteVariancePreserving.scaled_linear()`; then it is
    held against the scheduler's own in fp32. With `rescale_betas_zero_snr` the last
    $\bar\alpha$ is exactly 0, also where the scheduler replaces it by $2^{-24}$.

    Args:
        scheduler: The scheduler, as a pipeline has it.

    Returns:
        The process.

    Raises:
        TypeError: If it is no scheduler of a known process.
        ValueError: If its schedule is unknown, or its table is not what its
            configuration says.

    Examples:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(
        ...     beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ... )
        >>> process = process_from_scheduler(scheduler)
        >>> process == DiscreteVariancePreserving.scaled_linear()
        True
    """
    config = _config(scheduler)
    if _is_flow(scheduler, config):
        if config.get("invert_sigmas"):
            raise ValueError(
                "scheduler: invert_sigmas runs time from data to noise and is not "
                "supported; negate the network's time instead."
            )
        return RectifiedFlow()
    own = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(own, Tensor) or "beta_schedule" not in config:
        raise TypeError(
            f"scheduler: {type(scheduler).__name__} has no table of betas; build its "
            "process yourself, such as VarianceExploding() or RectifiedFlow()."
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"scheduler: timestep_type {config['timestep_type']!r} is not supported, "
            "since its times are no indices; build a VarianceExploding() yourself."
        )
    process = _variance_preserving(config)
    if len(own) != process.steps or not all(
        math.isclose(ours, theirs, rel_tol=2e-4, abs_tol=1.2e-7)
        for ours, theirs in zip(process.alphas_cumprod, own.tolist(), strict=True)
    ):
        raise ValueError(
            f"scheduler: the alphas_cumprod of {type(scheduler).__name__} are not what "
            "its betas give; use DiscreteVariancePreserving.from_alphas_cumprod."
        )
    return process


def parameterization_from_scheduler(
    scheduler: SchedulerMixin, *, time_scale: float | int | None = None
) -> Parameterization:
    """Gives the parameterization that a diffusers scheduler assumes of its network.

    Args:
        scheduler: The scheduler, as a pipeline has it.
        time_scale: The network is fed `t * time_scale`. None is 1 for a network
            conditioned on the index; for flow matching the scheduler does not tell, so
            it must be given: 1000 for SD3, 1 for Flux.

    Returns:
        The parameterization.

    Raises:
        TypeError: If it is no scheduler of diffusers.
        ValueError: If the prediction is unknown, or `time_scale` is missing.

    Examples:
        >>> from diffusers import DDIMScheduler
        >>> parameterization_from_scheduler(DDIMScheduler())
        EpsilonPrediction(time_scale=1)
    """
    config = _config(scheduler)
    is_flow = _is_flow(scheduler, config)
    prediction = "flow_prediction" if is_flow else config.get("prediction_type")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has prediction_type {prediction!r},"
            f" expected {', '.join(PREDICTIONS)}."
        )
    if is_flow and time_scale is None:
        raise ValueError(
            "time_scale: got None, which a flow scheduler leaves open; pass what the "
            "network was trained with: 1000 for SD3, 1 for Flux."
        )
    scale = 1 if time_scale is None else time_scale
    return PREDICTIONS[prediction](time_scale=scale)  # pyright: ignore[reportCallIssue]


def _config(scheduler: SchedulerMixin) -> Mapping[str, Any]:
    config = getattr(scheduler, "config", None)
    if not isinstance(scheduler, SchedulerMixin) or not isinstance(config, Mapping):
        raise TypeError(
            f"scheduler: got {type(scheduler).__name__}, expected a diffusers scheduler"
            " such as pipeline.scheduler."
        )
    return config


def _is_flow(scheduler: SchedulerMixin, config: Mapping[str, Any]) -> bool:
    return isinstance(scheduler, FLOWS) or bool(config.get("use_flow_sigmas"))


def _variance_preserving(config: Mapping[str, Any]) -> DiscreteVariancePreserving:
    process = _from_betas(config)
    if not config.get("rescale_betas_zero_snr"):
        return process
    # Lin et al. 2023 (arXiv 2305.08891), Algorithm 1.
    roots = [math.sqrt(value) for value in process.alphas_cumprod]
    first, last = roots[0], roots[-1]
    rescaled = ((root - last) * first / (first - last) for root in roots)
    return DiscreteVariancePreserving(tuple(root**2 for root in rescaled))


def _from_betas(config: Mapping[str, Any]) -> DiscreteVariancePreserving:
    start, end = config["beta_start"], config["beta_end"]
    steps, schedule = config["num_train_timesteps"], config["beta_schedule"]
    if config.get("trained_betas") is not None:
        return DiscreteVariancePreserving.from_betas(list(config["trained_betas"]))
    if schedule == "scaled_linear":
        return DiscreteVariancePreserving.scaled_linear(start, end, steps)
    if schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
        return DiscreteVariancePreserving.from_betas(betas)
    if schedule == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021 (arXiv 2102.09672), Eq. 17.
        kept = [
            math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            for i in range(steps + 1)
        ]
        betas = [min(1 - kept[i + 1] / kept[i], 0.999) for i in range(steps)]
        return DiscreteVariancePreserving.from_betas(betas)
    raise ValueError(
        f"scheduler: beta_schedule {schedule!r} is not supported; use "
        "DiscreteVariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod)."
    )
