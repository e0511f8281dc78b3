"""Text-to-image students and teachers with their samplers, for `sample.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from runs import device_of, option, to_pixels
from safetensors import SafetensorError, safe_open
from sample_settings import Settings, noises
from text_models import decode, latent_space, open_pipeline
from torch import Tensor

from dmdkit import (
    BackwardSimulator,
    ClassifierFreeGuidance,
    DiscreteVariancePreserving,
    EulerSampler,
    NoiseProcess,
    ScoreEstimator,
)
from dmdkit.adapters.folders import KOHYA_NAME, SIDECAR, read_sidecar
from dmdkit.adapters.lora import LoRANetwork
from dmdkit.adapters.lora_files import FILE_NAME, load_lora
from dmdkit.adapters.official import load_unet_weights
from dmdkit.adapters.pipelines import (
    TextPipeline,
    encode_prompts,
    teacher_from_pipeline,
    unconditional_of,
)
from dmdkit.types import Condition

STEPS = 50


class Source(NamedTuple):
    """Where a model comes from; the times are None for a teacher."""

    name: str
    option: str
    times: tuple[float, ...] | None
    lora: Path | None = None
    unet: Path | None = None

    @property
    def title(self) -> str:
        """The path or name of its weights."""
        return str(self.lora or self.unet or self.name)


class Picture(NamedTuple):
    """What one image is drawn from."""

    prompt: str
    seed: int


def sources_of(settings: Settings) -> list[Source]:
    """FOLDER, and what it is compared with."""
    name, lora, unet = settings.folder, settings.lora, settings.unet
    if lora and unet:
        raise SystemExit("--lora, --unet: give one of them.")
    times = settings.times or (lora_times(lora) if lora else None)
    if (lora or unet) and not times:
        raise SystemExit(
            f"--{'lora' if lora else 'unet'}: give the student's --times as well, such "
            "as 999 749 499 249."
        )
    first = Source(name, "FOLDER", times or own_times(name), lora, unet)
    others = [Source(name, "compare", own_times(name)) for name in settings.compare]
    return [first, *others]


def own_times(name: str) -> tuple[float, ...] | None:
    """The times of the student in a folder, None if there is none."""
    return read_sidecar(name).times if (Path(name) / SIDECAR).is_file() else None


def own_resolution(source: Source) -> int | None:
    """The resolution that a student was trained at, if its folder says so."""
    folder = source.lora if source.lora is not None else Path(source.name)
    folder = folder.parent if folder.name in (FILE_NAME, KOHYA_NAME) else folder
    if not (folder / SIDECAR).is_file():
        return None
    return read_sidecar(folder).about.get("resolution")


class TextModel:
    """A student or a teacher and its sampler: from prompts and seeds to pixels."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self.device = device_of(settings.device)
        pipeline = open_pipeline(
            source.name, source.option, local_files_only=settings.local_files_only
        )
        if source.unet is not None:
            with option("unet"):
                load_unet_weights(pipeline.unet, source.unet)
        if settings.precision == "bf16":
            pipeline.unet.to(torch.bfloat16)
        pipeline.unet.requires_grad_(False)
        self.pipeline: Any = pipeline.to(self.device)
        resolution = settings.resolution or own_resolution(source)
        self.space = latent_space(pipeline.unet.config, pipeline, resolution)
        denoiser = denoiser_of(pipeline, source)
        self.denoiser: ScoreEstimator | ClassifierFreeGuidance = denoiser
        self.sampler: BackwardSimulator | EulerSampler
        if source.times is not None:
            self.sampler = few_steps(denoiser.process, source.times)
            self.about = f"{len(source.times)} step{'s' * (len(source.times) > 1)}"
            return
        refuse_student(pipeline, source)
        steps, scale = settings.steps or STEPS, guidance_of(pipeline, settings)
        self.sampler = ddim(denoiser.process, steps)
        self.denoiser = ClassifierFreeGuidance(
            denoiser, unconditional_of(pipeline), scale
        )
        self.about = f"{steps} step{'s' * (steps > 1)}, guidance {scale:g}"

    @torch.no_grad()
    def pixels(self, pictures: list[Picture]) -> Tensor:
        """Draws pictures, uint8 [b, 3, h, w]."""
        prompts = [picture.prompt for picture in pictures]
        cond = encode_prompts(self.pipeline, prompts, self.space.resolution)
        draws = noises(self.space.shape, [p.seed for p in pictures], self.device)
        images = decode(self.pipeline.vae, self.run(next(draws), cond, draws))
        finite = images.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            seed = pictures[finite.index(False)].seed
            raise SystemExit(
                f"The image of seed {seed} is not finite; try --precision fp32."
            )
        return to_pixels(images).cpu()

    def run(self, noise: Tensor, cond: Condition, draws: Iterator[Tensor]) -> Tensor:
        """Calls the sampler with as much noise as it needs: latents."""
        sampler = self.sampler
        if isinstance(sampler, BackwardSimulator):
            fresh = [next(draws) for _ in sampler.times[1:]]
            return sampler.sample(self.denoiser, noise, cond, draws=fresh)
        return sampler(self.denoiser, noise, cond)


def denoiser_of(pipeline: TextPipeline, source: Source) -> ScoreEstimator:
    """The UNet as a denoiser, read as its dmdkit.json says, else as its scheduler."""
    denoiser = teacher_from_pipeline(pipeline)
    network, process = denoiser.network, denoiser.process
    parameterization = denoiser.parameterization
    if (Path(source.name) / SIDECAR).is_file():
        process, parameterization, *_ = read_sidecar(source.name)
    if source.lora is not None:
        with option("lora"):
            network = with_lora(network, source.lora)
    return ScoreEstimator(network, process, parameterization).eval()


def few_steps(process: NoiseProcess, times: tuple[float, ...]) -> BackwardSimulator:
    """A student's sampler."""
    with option("times"):
        sampler = BackwardSimulator(times)
        for time in times:
            process.check_time(time)
    return sampler


def ddim(process: NoiseProcess, steps: int) -> EulerSampler:
    """A teacher's sampler, at the times of SD's schedulers: 981, 961, ... 1 for 50.

    The last step goes to clean data, as that of diffusers' EulerDiscreteScheduler.
    """
    with option("steps"):
        if not isinstance(process, DiscreteVariancePreserving):
            raise ValueError(f"the process is {type(process).__name__}, not DDPM's.")
        if steps >= process.steps:
            raise ValueError(f"got {steps}, expected 1 ... {process.steps - 1}.")
        stride = process.steps // steps
    return EulerSampler(tuple(float(1 + i * stride) for i in reversed(range(steps))))


def guidance_of(pipeline: TextPipeline, settings: Settings) -> float:
    """The teacher's scale: what was given, or the default of diffusers' pipeline."""
    if settings.guidance is not None:
        return settings.guidance
    return 5.0 if isinstance(pipeline, StableDiffusionXLPipeline) else 7.5


def refuse_student(pipeline: TextPipeline, source: Source) -> None:
    """Refuses to guide a student whose times are not known."""
    if isinstance(pipeline.scheduler, LCMScheduler):
        raise SystemExit(
            f"{source.name}: its scheduler is a few-step student's, and there is no "
            f"{SIDECAR} with the times; give it as FOLDER, with --times."
        )


class LoRAFile(NamedTuple):
    """What a LoRA file says of itself without its numbers."""

    ranks: dict[str, int]
    """By the name of a layer's first matrix."""
    alphas: dict[str, float]
    """By the name of a tensor, in kohya's layout."""
    alpha: float | None
    """Of all layers, in diffusers' layout."""


def lora_times(path: Path) -> tuple[float, ...] | None:
    """The times of a LoRA student that dmdkit wrote, from beside its files."""
    folder = path.parent if path.name in (FILE_NAME, KOHYA_NAME) else path
    return own_times(str(folder))


def read_lora(path: Path) -> LoRAFile:
    """Reads what `with_lora` makes the adapter by."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no file {file}.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata, keys = opened.metadata() or {}, list(opened.keys())
            ranks = {
                key: opened.get_slice(key).get_shape()[0]
                for key in keys
                if key.endswith((".lora_A.weight", ".lora_down.weight"))
            }
            alphas = {
                key: float(opened.get_tensor(key))
                for key in keys
                if key.endswith(".alpha")
            }
        about = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a LoRA: {error}") from error
    return LoRAFile(ranks, alphas, about.get("unet.lora_alpha"))


def with_lora(network: torch.nn.Module, path: Path) -> LoRANetwork:
    """Puts a file's adapter, of its own rank, alpha and layers, on a UNet."""
    file = read_lora(path)
    layers = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            flat = f"lora_{name.replace('.', '_')}"
            for key in (f"{name}.lora_A.weight", f"{flat}.lora_down.weight"):
                if key in file.ranks:
                    layers[name] = file.ranks[key], file.alphas.get(f"{flat}.alpha")
    if not layers:
        raise ValueError(f"{path} has no layer of FOLDER's UNet, or not by its names.")
    rank, alpha = next(iter(layers.values()))
    # A file that does not say alpha means the rank.
    alpha = next((a for a in (alpha, file.alpha) if a is not None), float(rank))
    adapted = LoRANetwork(network, rank, alpha, list(layers))
    load_lora(adapted, path)
    return adapted
