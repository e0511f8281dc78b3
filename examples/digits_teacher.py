"""Trains the digits teacher: a class-conditional EDM denoiser on real images.

    python examples/digits_teacher.py

It takes some minutes on a CPU, shows the error on held-out images as it goes, and
writes `examples/digits_teacher.safetensors` with the averaged weights that denoise
held-out images best. `--resume` continues an interrupted run from OUT.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from digits_common import (
    NULL_CLASS,
    TEACHER_FILE,
    build_denoiser,
    load_digits,
    parse,
    save_weights,
)
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

from dmdkit import (
    DenoisingLoss,
    ExponentialMovingAverage,
    GeneratorState,
    KarrasWeight,
    LogNormalTime,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)


@dataclass(frozen=True)
class Settings:
    """Trains the digits teacher."""

    iterations: int = 3000
    """Optimizer steps."""
    batch_size: int = 128
    learning_rate: float = 2e-3
    """Of Adam; warmed up over 200 steps, then lowered along a cosine to 0."""
    dropout: float = 0.1
    """Within the network, in training only; 1,437 images are few."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, so that guidance works."""
    ema_decay: float = 0.998
    evaluate_every: int = 250
    seed: int = 0
    out: Path = Path("runs/digits_teacher")
    """Checkpoints."""
    file: Path = TEACHER_FILE
    """Where the weights go."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`."""
    threads: int = 1


def main(settings: Settings) -> None:
    """Trains, evaluates on held-out images, keeps the best average."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    train, held_out = load_digits()
    sigma_data = round(float(train.images.std()), 4)
    teacher = build_denoiser(sigma_data, settings.dropout)
    network = teacher.network
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    schedule = LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / 200)
            * 0.5
            * (1 + math.cos(math.pi * step / settings.iterations))
        ),
    )
    ema = ExponentialMovingAverage(network, (settings.ema_decay,))
    best = ExponentialMovingAverage(network, (settings.ema_decay,))
    progress = Progress()
    loss_function = DenoisingLoss(LogNormalTime(), KarrasWeight(sigma_data))
    parts = {
        "modules": {"teacher": network},
        "optimizers": {"teacher": optimizer},
        "states": {
            "ema": ema,
            "best": best,
            "schedule": schedule,
            "generator": GeneratorState(generator),
            "progress": progress,
        },
    }
    start = 0
    if settings.resume and (found := checkpoints(settings.out)):
        start = load_checkpoint(found[-1], **parts)

    def held_out_error() -> float:
        fixed = torch.Generator().manual_seed(1)
        network.eval()
        with torch.no_grad(), ema.applied_to(network):
            repeated = held_out.images.repeat(8, 1, 1, 1)
            labels = held_out.labels.repeat(8)
            error = loss_function(
                repeated, labels, denoiser=teacher, generator=fixed
            ).loss.item()
        network.train()
        return error

    bar = trange(start, settings.iterations, initial=start, total=settings.iterations)
    for step in bar:
        rows = torch.randint(
            len(train.images), (settings.batch_size,), generator=generator
        )
        dropped = (
            torch.rand(settings.batch_size, generator=generator)
            < settings.label_dropout
        )
        labels = torch.where(dropped, NULL_CLASS, train.labels[rows])
        output = loss_function(
            train.images[rows], labels, denoiser=teacher, generator=generator
        )
        if not bool(output.finite.all()):
            raise SystemExit(f"The loss is not finite at step {step}; no step taken.")
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update(network)
        if (step + 1) % settings.evaluate_every == 0:
            error = held_out_error()
            if error < progress.best_error:
                progress.best_error, progress.best_step = error, step + 1
                best.load_state_dict(ema.state_dict())
            bar.write(
                f"step {step + 1}: loss {output.loss.item():.4f}, held out {error:.4f}"
            )
            save_checkpoint(settings.out, step=step + 1, keep=1, **parts)

    best.copy_to(network)
    about = {
        "what": "class-conditional EDM denoiser of scikit-learn's digits (8x8)",
        "sigma_data": sigma_data,
        "parameters": sum(p.numel() for p in network.parameters()),
        "held_out_error": progress.best_error,
        "step": progress.best_step,
        "command": "python examples/digits_teacher.py",
        "settings": {
            k: v for k, v in asdict(settings).items() if k not in ("out", "file")
        },
        "data": "scikit-learn load_digits, 80 % (stratified, random_state 0)",
    }
    save_weights(network, settings.file, about)
    print(
        f"Best held-out error {progress.best_error:.4f} at step {progress.best_step}; "
        f"wrote {settings.file} ({settings.file.stat().st_size / 1e6:.2f} MB)."
    )


class Progress:
    """The best held-out error so far, for checkpoints."""

    def __init__(self) -> None:
        self.best_error, self.best_step = math.inf, 0

    def state_dict(self) -> dict[str, float]:
        return {"best_error": self.best_error, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best_error = state["best_error"]
        self.best_step = int(state["best_step"])


if __name__ == "__main__":
    main(parse(Settings))
