"""Text-to-image students and the paper's teachers of text, for `evaluate.py`."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import sample_settings
import torch
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from evaluate_baselines import BASELINES, Baseline
from evaluate_models import (
    Model,
    digest_of,
    require_kind,
    source_of,
    title_of,
    told_to_sample,
)
from evaluate_settings import Settings
from sample_models import Picture, Source, TextModel, sources_of
from torch import Tensor

from dmdkit import AncestralSampler, BackwardSimulator, ClassifierFreeGuidance
from dmdkit.types import Condition


def text_model(settings: Settings, prompts: Sequence[str], each: int) -> Model:
    """Opens a student or a teacher; `each` is images a prompt."""
    told = told_to_sample(settings, source_of(settings)[0])
    source = sources_of(told)[0]
    require_kind(settings, source.times)
    if not prompts:
        raise SystemExit(f"--prompt-file: missing; {source.title} draws from prompts.")
    model = PaperModel(source, told, BASELINES.get(settings.sampler))
    if settings.sampler != "auto":
        require_pipeline(settings.sampler, model.pipeline)

    def draw(batch: range, seed: int) -> Tensor:
        # More images than prompts are only drawn to take the time.
        own = [prompts[i // each % len(prompts)] for i in batch]
        seeds = [seed + i for i in batch]
        return model.pixels([Picture(*x) for x in zip(own, seeds, strict=True)])

    about = {
        "weights": digest_of(model.denoiser),
        "sampler": model.about,
        "resolution": model.space.resolution,
    }
    return Model(draw, title_of(settings), model.calls, 4, about)


def require_pipeline(sampler: str, pipeline: Any) -> None:
    """Refuses a baseline of another pipeline than it is of."""
    is_sdxl = "XL" in type(pipeline).__name__
    if not sampler.startswith("sdxl" if is_sdxl else "sd15"):
        raise SystemExit(
            f"--sampler {sampler}: not for a {type(pipeline).__name__}; give another, "
            "or --steps and --guidance."
        )


class PaperModel(TextModel):
    """A model of `sample.py`, or a teacher with a sampler of the paper."""

    def __init__(
        self,
        source: Source,
        told: sample_settings.Settings,
        baseline: Baseline | None,
    ) -> None:
        if baseline is not None and not baseline.is_text:
            raise SystemExit(
                f"--sampler: {baseline.kind} draws from classes, {source.title} from "
                "prompts."
            )
        super().__init__(source, told)
        self.kind = "euler" if baseline is None else baseline.kind
        if self.kind != "euler":
            self.about = f"{self.kind}, {self.about}"

    @property
    def calls(self) -> int:
        """Calls of the UNet for an image; guidance takes two each."""
        calls = len(self.sampler.times) + (self.kind == "pndm")
        guided = isinstance(self.denoiser, ClassifierFreeGuidance)
        return calls * (2 if guided and self.denoiser.scale != 1 else 1)

    def run(self, noise: Tensor, cond: Condition, draws: Iterator[Tensor]) -> Tensor:
        """Calls the sampler with as much noise as it needs: latents."""
        times = self.sampler.times
        if isinstance(self.sampler, BackwardSimulator) or self.kind == "euler":
            return super().run(noise, cond, draws)
        if self.kind == "ddpm":
            return AncestralSampler(times)(self.denoiser, noise, cond, draws=draws)
        config = self.pipeline.scheduler.config
        return pndm(self.denoiser, config, len(times), noise, cond)


def pndm(
    denoiser: Any, config: Mapping[str, Any], steps: int, noise: Tensor, cond: Condition
) -> Tensor:
    """SD1.5's own sampler, through diffusers: n steps, n + 1 calls.

    Source: Liu et al. 2022 (arXiv 2202.09778), in the form without Runge-Kutta steps
    that SD1.5's scheduler names.
    """
    known = signature(PNDMScheduler.__init__).parameters
    scheduler: Any = PNDMScheduler.from_config(
        {name: value for name, value in config.items() if name in known},
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(steps)
    process, x = denoiser.process, noise
    for time in scheduler.timesteps.tolist():
        t = torch.full((len(x),), float(time), device=x.device)
        alpha, sigma = (
            level(t).reshape(-1, 1, 1, 1) for level in (process.alpha, process.sigma)
        )
        epsilon = (x - alpha * denoiser(x, t, cond)) / sigma
        x = scheduler.step(epsilon, time, x).prev_sample
    return x
