"""Text-to-image pipelines of diffusers: as a teacher, and for a student to go into."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import nn

from dmdkit._checked import describe
from dmdkit.adapters.conditions import (
    EmptyPrompt,
    TextCondition,
    TextPooledCondition,
    sdxl_time_ids,
    zero_text,
)
from dmdkit.adapters.folders import KOHYA_NAME, replacing, write_sidecar
from dmdkit.adapters.lora_files import save_lora
from dmdkit.adapters.model_cards import lora_card, pipeline_card
from dmdkit.adapters.schedulers import (
    parameterization_from_scheduler,
    process_from_scheduler,
)
from dmdkit.adapters.unets import FeaturePlace, UNetNetwork
from dmdkit.diffusion import ScoreEstimator

TextPipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline
"""A pipeline of SD1.x, SD2.x or SDXL."""


def teacher_from_pipeline(
    pipeline: TextPipeline, features: FeaturePlace = "mid"
) -> ScoreEstimator:
    """The UNet of a pipeline as a denoiser, with what its scheduler says of it.

    Args:
        pipeline: The pipeline.
        features: Where features are read (see `UNetNetwork`).

    Returns:
        The denoiser, which holds the pipeline's UNet itself; guide it with
        `unconditional_of`.

    Raises:
        TypeError: If it is no pipeline of SD1.x, SD2.x or SDXL.
        ValueError: If its scheduler or UNet is not supported.
    """
    _require_pipeline(pipeline)
    return ScoreEstimator(
        UNetNetwork(pipeline.unet, features),
        process_from_scheduler(pipeline.scheduler),
        parameterization_from_scheduler(pipeline.scheduler),
    )


@torch.no_grad()
def encode_prompts(
    pipeline: TextPipeline, prompts: Sequence[str], size: int | None = None
) -> TextCondition | TextPooledCondition:
    """Encodes prompts by the pipeline's own text encoders, where these are.

    SD1.x and SD2.x: the last hidden states. SDXL: the last but one of both encoders,
    the pooled embedding of the second, and time ids of images that were not cropped, as
    official DMD2 trains.

    Args:
        pipeline: The pipeline.
        prompts: The prompts; longer ones than the encoders take are cut, as diffusers
            does, which says so.
        size: The side of the images in pixels, for SDXL's time ids; None is what the
            UNet was made for.

    Returns:
        The condition of a batch.

    Raises:
        TypeError: If it is no such pipeline, or the prompts are no strings.
        ValueError: If there are no prompts.
    """
    _require_pipeline(pipeline)
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise TypeError("prompts: expected a list of strings.")
    if not prompts:
        raise ValueError("prompts: got none, expected at least one.")
    more: dict[str, Any] = {
        "prompt": list(prompts),
        "device": _device(pipeline),
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    if isinstance(pipeline, StableDiffusionPipeline):
        return TextCondition(pipeline.encode_prompt(**more)[0])
    text, _, pooled, _ = pipeline.encode_prompt(**more)
    side = size or pipeline.unet.config["sample_size"] * pipeline.vae_scale_factor
    return TextPooledCondition(
        text, pooled, sdxl_time_ids(len(prompts), side, text.device)
    )


def unconditional_of(
    pipeline: TextPipeline,
) -> Callable[[Any], Any]:
    """What guidance takes for no prompt: `unconditional` of `ClassifierFreeGuidance`.

    Args:
        pipeline: The pipeline.

    Returns:
        For SD1.x and SD2.x the encoded empty prompt (DMD2, section F.3), for SDXL zeros
        for both embeddings and the same time ids (official code).

    Raises:
        TypeError: If it is no such pipeline.
    """
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return zero_text
    return EmptyPrompt(encode_prompts(pipeline, [""]).text)


def few_step_scheduler(
    config: Mapping[str, Any], times: tuple[float | int, ...]
) -> LCMScheduler:
    """The scheduler of diffusers that samples as `BackwardSimulator.sample` does.

    Args:
        config: The configuration of the teacher's scheduler.
        times: The student's times in falling order.

    Returns:
        The scheduler. If `times` are evenly spaced down from the last index, as (999,
        749, 499, 249) are, it is set to them: `num_inference_steps=4` is enough. Any
        other times, such as (399,), must be passed to the pipeline as `timesteps`.
    """
    # What other schedulers have beside it would be warned of.
    known = signature(LCMScheduler.__init__).parameters
    scheduler = LCMScheduler.from_config(
        {name: value for name, value in config.items() if name in known},
        original_inference_steps=len(times),
        clip_sample=False,
    )
    assert isinstance(scheduler, LCMScheduler)
    return scheduler


def has_own_times(scheduler: LCMScheduler, times: tuple[float | int, ...]) -> bool:
    """Whether a scheduler comes to the times when it is given their number only.

    Args:
        scheduler: The scheduler; it is not changed.
        times: The student's times in falling order.

    Returns:
        Whether `num_inference_steps` is enough; else pass the times as `timesteps`.
    """
    own = LCMScheduler.from_config(scheduler.config)
    assert isinstance(own, LCMScheduler)
    own.set_timesteps(len(times))
    return own.timesteps.tolist() == [int(t) for t in times]


def save_pipeline(
    folder: str | Path,
    pipeline: TextPipeline,
    student: ScoreEstimator,
    *,
    times: tuple[float | int, ...],
    teacher: str,
    licence: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a student as a whole pipeline, which diffusers loads without dmdkit.

    The folder is the pipeline's with the student's UNet and a scheduler for its times
    (see `few_step_scheduler`), a model card and `dmdkit.json`, whole or not at all. The
    pipeline given is left as it was.

    Args:
        folder: Where it goes. A student written there before is replaced.
        pipeline: The teacher's pipeline, for everything but UNet and scheduler.
        student: The student, its network a `UNetNetwork`; merge or save an adapter
            apart (`save_lora`).
        times: The student's times in falling order.
        teacher: What the student was distilled from, for the card.
        licence: The teacher's licence, whose terms the student's weights inherit.
        about: What else is to be known, as JSON can hold it.

    Raises:
        TypeError: If the pipeline or the student's network is of another kind.
        ValueError: If the folder holds something else.
        OSError: If it cannot be written.
    """
    _require_pipeline(pipeline)
    network = student.network
    if not isinstance(network, UNetNetwork) or not isinstance(
        network.unet, UNet2DConditionModel
    ):
        raise TypeError(
            f"student: its network is {describe(network)}, expected a UNetNetwork of a "
            "UNet2DConditionModel; take it out of its wrapper first."
        )
    scheduler = few_step_scheduler(pipeline.scheduler.config, times)
    told = {"teacher": teacher, "licence": licence, **(about or {})}
    before = pipeline.unet, pipeline.scheduler
    with replacing(folder) as partial:
        try:
            pipeline.register_modules(unet=network.unet, scheduler=scheduler)
            # SDXL's UNet has 10.3 GB in fp32, and belongs in one file.
            pipeline.save_pretrained(partial, max_shard_size="50GB")
        finally:
            pipeline.register_modules(unet=before[0], scheduler=before[1])
        write_sidecar(partial, student, times, told)
        (partial / "README.md").write_text(
            pipeline_card(
                type(pipeline).__name__, times, has_own_times(scheduler, times), told
            )
        )


def save_lora_student(
    folder: str | Path,
    student: ScoreEstimator,
    *,
    times: tuple[float | int, ...],
    teacher: str,
    licence: str,
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes an adapter as a folder: both layouts of `save_lora`, card, `dmdkit.json`.

    `pipe.load_lora_weights(folder)` of diffusers takes it as it is; the file
    `kohya.safetensors` is what ComfyUI and A1111 load. The folder is written whole or
    not at all.

    Args:
        folder: Where it goes. A student written there before is replaced.
        student: The student, its network a `LoRANetwork` on a `UNetNetwork`.
        times: The student's times in falling order.
        teacher: What the adapter belongs to, for the card.
        licence: The teacher's licence, whose terms the adapter inherits.
        about: What else is to be known, as JSON can hold it.
        dtype: The numbers in the files.

    Raises:
        TypeError: If the student's network is no `LoRANetwork`.
        ValueError: If the folder holds something else.
        OSError: If it cannot be written.
    """
    network: Any = student.network
    told = {"teacher": teacher, "licence": licence, **(about or {})}
    with replacing(folder) as partial:
        save_lora(network, partial, dtype=dtype)
        save_lora(network, partial / KOHYA_NAME, layout="kohya", dtype=dtype)
        told |= {"lora_rank": network.rank, "lora_alpha": network.alpha}
        write_sidecar(partial, student, times, told)
        scheduler = LCMScheduler(original_inference_steps=len(times))
        own_times = has_own_times(scheduler, times)
        (partial / "README.md").write_text(lora_card(times, own_times, told))


def _device(pipeline: TextPipeline) -> torch.device:
    encoder: nn.Module = pipeline.text_encoder
    return next(encoder.parameters()).device


def _require_pipeline(pipeline: Any) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise TypeError(
            f"pipeline: got {describe(pipeline)}, expected a StableDiffusionPipeline "
            "or a StableDiffusionXLPipeline of diffusers."
        )
