"""Trains the emoji teacher: a text-to-image denoiser and its text encoder.

    python examples/emoji_teacher.py

About an hour on one core of a CPU. It shows the loss as it goes, draws pictures to OUT
and writes `examples/emoji_teacher.safetensors` with the averaged weights. `--resume`
continues an interrupted run from OUT.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from emoji_common import (
    LATENT_SHAPE,
    TEACHER_FILE,
    build_teacher,
    draw_captions,
    load_emoji,
    parse,
    save_weights,
    to_images,
    to_latents,
)
from runs import grid_of, save_png, to_pixels
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

from dmdkit import (
    ClassifierFreeGuidance,
    DenoisingLoss,
    DiscreteUniformTime,
    EulerSampler,
    ExponentialMovingAverage,
    GeneratorState,
    checkpoints,
    few_step_times,
    load_checkpoint,
    save_checkpoint,
    v_weight,
)

PROMPTS = (
    *("rocket", "slice of pizza", "cat face", "cactus", "tiger face", "green apple"),
    *("face", "moon", "cat", "cloud", "monkey", "smiling face"),
)
"""What is drawn as the training goes, twice."""


@dataclass(frozen=True)
class Settings:
    """Trains the emoji teacher."""

    iterations: int = 8_000
    """Optimizer steps."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Of AdamW; warmed up over 300 steps, then lowered along a cosine to 0."""
    shortened: float = 0.3
    """Share of names of which only some words are kept."""
    prompt_dropout: float = 0.1
    """Share of prompts that are left empty, so that guidance works."""
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.999
    bf16: bool = True
    """Autocast. `--no-bf16` is faster on processors without bf16 arithmetic."""
    evaluate_every: int = 500
    """Iterations between lines, pictures and checkpoints."""
    seed: int = 0
    out: Path = Path("runs/emoji_teacher")
    """Checkpoints and pictures."""
    file: Path = TEACHER_FILE
    """Where the weights go."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`."""
    threads: int = 1


class Progress:
    """The time spent and a running mean of the loss, for checkpoints."""

    def __init__(self) -> None:
        self.seconds, self.loss = 0.0, math.nan

    def add(self, loss: float, seconds: float) -> None:
        """Counts one step."""
        self.seconds += seconds
        self.loss = loss if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * loss

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "loss": self.loss}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds, self.loss = state["seconds"], state["loss"]


class Training:
    """The networks of a run, and its iteration."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        images, self.names = load_emoji()
        self.latents = to_latents(images)
        self.teacher = build_teacher(self.names)
        self.modules = self.teacher.modules()
        self.loss = DenoisingLoss(DiscreteUniformTime(), v_weight)
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), settings.learning_rate, weight_decay=0.01
        )
        self.schedule = LambdaLR(
            self.optimizer,
            lambda step: (
                min(1.0, (step + 1) / 300)
                * 0.5
                * (1 + math.cos(math.pi * step / settings.iterations))
            ),
        )
        self.ema = ExponentialMovingAverage(self.modules, (settings.ema_decay,))
        self.progress = Progress()

    def checkpoint_parts(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {
            "modules": {"teacher": self.modules},
            "optimizers": {"teacher": self.optimizer},
            "states": {
                "ema": self.ema,
                "schedule": self.schedule,
                "generator": GeneratorState(self.generator),
                "progress": self.progress,
            },
        }

    def iterate(self, step: int) -> None:
        """One optimizer step."""
        began, settings = time.perf_counter(), self.settings
        rows = torch.randint(
            len(self.names), (settings.batch_size,), generator=self.generator
        )
        captions = draw_captions(
            [self.names[row] for row in rows],
            settings.shortened,
            self.generator,
            settings.prompt_dropout,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            output = self.loss(
                self.latents[rows],
                self.teacher.encoder.encode(captions),
                denoiser=self.teacher.denoiser,
                generator=self.generator,
            )
        if not bool(output.finite.all()):
            raise SystemExit(f"The loss is not finite at step {step}; no step taken.")
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.modules.parameters(), settings.max_gradient_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.update(self.modules)
        self.progress.add(output.loss.item(), time.perf_counter() - began)

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Pictures of the averaged teacher: 20 steps, guidance 2, the same noise."""
        fixed = torch.Generator().manual_seed(1)
        noise = torch.randn(2 * len(PROMPTS), *LATENT_SHAPE, generator=fixed)
        with self.ema.applied_to(self.modules):
            cond = self.teacher.encoder.encode(PROMPTS * 2)
            guided = ClassifierFreeGuidance(
                self.teacher.denoiser, self.teacher.empty_prompt(), 2.0
            )
            latents = EulerSampler(few_step_times(20))(guided, noise, cond)
        pixels = to_pixels(to_images(latents))
        save_png(grid_of(pixels, len(PROMPTS)), path)


def main(settings: Settings) -> None:
    """Trains, shows, writes the weights."""
    torch.set_num_threads(settings.threads)
    run, start = Training(settings), 0
    folder = settings.out / "checkpoints"
    found = checkpoints(folder)
    if found and not settings.resume:
        raise SystemExit(
            f"--out: {settings.out} holds a run; continue it with --resume, or name "
            "another folder."
        )
    if found:
        start = load_checkpoint(found[-1], **run.checkpoint_parts())
    bar = trange(start, settings.iterations, initial=start, total=settings.iterations)
    for step in bar:
        run.iterate(step)
        if (step + 1) % settings.evaluate_every == 0:
            bar.write(
                f"step {step + 1}: loss {run.progress.loss:.4f}, "
                f"{run.progress.seconds:.0f} s"
            )
            save_checkpoint(folder, step=step + 1, keep=1, **run.checkpoint_parts())
            run.draw(settings.out / "samples" / f"{step + 1:06d}.png")

    run.ema.copy_to(run.modules)
    about = {
        "what": f"text-to-image denoiser of {len(run.names)} emoji (32x32), and its "
        "text encoder",
        "parameters": sum(p.numel() for p in run.modules.parameters()),
        "loss": run.progress.loss,
        "seconds": round(run.progress.seconds),
        "command": "python examples/emoji_teacher.py",
        "settings": {
            k: v
            for k, v in asdict(settings).items()
            if k not in ("out", "file", "resume")
        },
        "data": "emoji_sheet.png, emoji_names.txt (see emoji_sheet.json)",
    }
    save_weights(run.modules, settings.file, about)
    print(
        f"Loss {run.progress.loss:.4f} after {run.progress.seconds:.0f} s; wrote "
        f"{settings.file} ({settings.file.stat().st_size / 1e6:.2f} MB)."
    )


if __name__ == "__main__":
    main(parse(Settings))
