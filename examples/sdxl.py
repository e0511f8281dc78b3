"""Distils SDXL to four steps or one (DMD2, section F.4).

    python examples/sdxl.py --prompts prompts.txt --latents latents

Every setting names its source: the paper (its section), the official scripts where the
paper is silent, or "ours". Presets are the four-step and the one-step training, the
latter's pre-training, an adapter instead of a whole UNet, and the rows of Table 4;
`--help` shows the settings of the preset given. The page "SDXL" of the documentation
has the whole recipe.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from distillation import Run, RunSettings, distil, refusal, until_interrupted
from runs import parse
from text_models import SDXL_UNET
from text_to_image import TextDistillation, TextSettings

Preset = Literal[
    "four-step",
    "four-step-lora",
    "one-step-pretrain",
    "one-step",
    "table4-no-gan",
    "table4-no-distribution-matching",
    "table4-no-backward-simulation",
]


@dataclass(frozen=True)
class Settings(TextSettings):
    """Distils SDXL with DMD2. Sources of values are in brackets."""

    kind: ClassVar[type] = StableDiffusionXLPipeline
    preset: Preset = "four-step"
    """Which training of section F.4 or row of Table 4 the other settings start from."""
    pretrained: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """The teacher: a pipeline of diffusers, a folder or a name on the hub [F.4]."""
    iterations: int = 20_000
    """Critic updates [F.4: 20K for four steps, 25K for one; the official README's best
    checkpoints: 19K, 24K, with LoRA 16K]."""
    batch_size: int = 128
    """Samples of an update, over all processes [F.4]."""
    micro_batch_size: int = 2
    """Most samples in memory at once; gradients of the parts are accumulated [scripts:
    2 on each of 64 GPUs, without accumulation]."""
    learning_rate: float = 5e-7
    """Of student and critic alike [F.4]."""
    critic_steps: int = 5
    """Critic updates to one student update [F.4]."""
    guidance_scale: float = 8.0
    """Of the teacher, in the convention in which 1 is none; the critic has none
    [F.4]."""
    gan_weight: float = 5e-3
    """Weight of the student's GAN loss [scripts; the paper gives none for SDXL]."""
    times: tuple[float, ...] = (999.0, 749.0, 499.0, 249.0)
    """Timesteps at which the student is called [section 4.4]; one step: 399 [F.4]."""
    tiny_vae: str = "madebyollin/taesdxl"
    """Decoder of the regression's LPIPS: a folder or a name on the hub, of an
    AutoencoderTiny [scripts: TAESDXL]."""
    licence: str = "openrail++"
    """Of the teacher; the student inherits it, and its model card says so [F.4]."""
    run: Run = field(default_factory=lambda: RunSettings(Path("runs/sdxl")))

    def check(self) -> None:
        """Refuses what cannot run."""
        super().check()
        if self.preset == "one-step" and self.start_from is None:
            if not self.random_init:
                raise refusal(
                    "start_from",
                    "missing",
                    "the one-step student starts from the last checkpoint of the "
                    "preset one-step-pretrain (OUT/checkpoints/step-...)",
                )


ONE_STEP: dict[str, Any] = {"times": (399.0,)}
ROWS: dict[Preset, dict[str, Any]] = {
    "four-step": {},
    "four-step-lora": {"lora": "both", "learning_rate": 5e-5},
    "one-step-pretrain": {
        **ONE_STEP,
        "regression": True,
        "gan": False,
        "distribution_matching": False,
        "learning_rate": 1e-5,
        "batch_size": 256,
        "micro_batch_size": 4,
        "iterations": 2000,
        "critic_steps": 1,
    },
    "one-step": {**ONE_STEP, "iterations": 25_000},
    "table4-no-gan": {"gan": False},
    "table4-no-distribution-matching": {"distribution_matching": False},
    "table4-no-backward-simulation": {"simulation": "data"},
}
"""How the trainings differ from that to four steps.

LoRA is not in the paper: rate, rank, alpha and layers are those of the official script,
whose critic is a whole UNet (`--lora student`). The pre-training is that of the scripts
(rate 1e-5, batch 256, checkpoint after 2,000 updates); section F.4 says "a small set of
10K pairs for a short period". Table 4 does not say how long its rows were trained; they
keep the length of the training to four steps.
"""
PRESETS = {name: replace(Settings(), preset=name, **row) for name, row in ROWS.items()}


def build(settings: Settings, rank: int = 0, ranks: int = 1) -> TextDistillation:
    """The recipe's networks, losses and data, as one of several processes."""
    return TextDistillation(settings, SDXL_UNET, rank, ranks)


def main(settings: Settings) -> None:
    """Distils, and writes everything to OUT."""
    distil(settings, build)


if __name__ == "__main__":
    until_interrupted(lambda: main(parse(Settings, PRESETS)))
