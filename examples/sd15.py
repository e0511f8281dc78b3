"""Distils Stable Diffusion 1.5 to one step (DMD2, section F.3).

    python examples/sd15.py --preset stage1 --prompts prompts.txt --out runs/stage1
    python examples/sd15.py --preset stage2 --prompts prompts.txt --latents latents \
        --start-from runs/stage1/best --out runs/stage2

Every setting names its source: the paper (its section), the official scripts where the
paper is silent, or "ours". `--help` shows the settings of the preset given. The page
"SD1.5" of the documentation has the whole recipe.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from distillation import Run, RunSettings, distil, refusal, until_interrupted
from runs import parse
from text_models import SD15_UNET
from text_to_image import TextDistillation, TextSettings

Preset = Literal["stage1", "stage2", "shared-adapters"]


@dataclass(frozen=True)
class Settings(TextSettings):
    """Distils SD1.5 with DMD2. Sources of values are in brackets."""

    kind: ClassVar[type] = StableDiffusionPipeline
    preset: Preset = "stage1"
    """Which training of section F.3 the other settings start from."""
    pretrained: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The teacher: a pipeline of diffusers, a folder or a name on the hub [F.3]."""
    iterations: int = 40_000
    """Critic updates [F.3: 40K, then 5K; the official README's best checkpoints: 39K,
    then 2K]."""
    batch_size: int = 2048
    """Samples of an update, over all processes [F.3]."""
    micro_batch_size: int = 32
    """Most samples in memory at once; gradients of the parts are accumulated [scripts:
    32 on each of 64 GPUs, without accumulation]."""
    learning_rate: float = 1e-5
    """Of student and critic alike [F.3]."""
    critic_steps: int = 10
    """Critic updates to one student update [F.3]."""
    guidance_scale: float = 1.75
    """Of the teacher, in the convention in which 1 is none; the critic has none
    [F.3]."""
    gan: bool = False
    """Whether there is a GAN loss on real latents [F.3: in the second stage]."""
    gan_weight: float = 1e-3
    """Weight of the student's GAN loss [F.3]."""
    times: tuple[float, ...] = (999.0,)
    """Timesteps at which the student is called [scripts: 999]."""
    tiny_vae: str = "madebyollin/taesd"
    """Decoder of the regression's LPIPS: a folder or a name on the hub, of an
    AutoencoderTiny [ours: this recipe has no regression]."""
    licence: str = "creativeml-openrail-m"
    """Of the teacher; the student inherits it, and its model card says so [F.3]."""
    run: Run = field(default_factory=lambda: RunSettings(Path("runs/sd15")))

    def check(self) -> None:
        """Refuses what cannot run."""
        super().check()
        if self.preset == "stage2" and self.start_from is None:
            if not self.random_init:
                raise refusal(
                    "start_from",
                    "missing",
                    "stage 2 starts from the best checkpoint of stage 1, its OUT/best "
                    "or OUT/checkpoints/step-...",
                )


ROWS: dict[Preset, dict[str, Any]] = {
    "stage1": {},
    "stage2": {"gan": True, "learning_rate": 5e-7, "iterations": 5000},
    "shared-adapters": {"gan": True, "lora": "both", "learning_rate": 5e-5},
}
"""How the trainings differ from the first stage.

`shared-adapters` is ours: teacher, student and critic on one UNet, with the rate, rank
and layers of the official LoRA script (which is SDXL's) and both losses from the start.
"""
PRESETS = {name: replace(Settings(), preset=name, **row) for name, row in ROWS.items()}


def build(settings: Settings, rank: int = 0, ranks: int = 1) -> TextDistillation:
    """The recipe's networks, losses and data, as one of several processes."""
    return TextDistillation(settings, SD15_UNET, rank, ranks)


def main(settings: Settings) -> None:
    """Distils, and writes everything to OUT."""
    distil(settings, build)


if __name__ == "__main__":
    until_interrupted(lambda: main(parse(Settings, PRESETS)))
