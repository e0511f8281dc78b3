"""Trains the Fashion-MNIST teacher and classifier that the study ships.

    python examples/study/train_fashion.py

Forty minutes on one CPU core. It writes `fashion_teacher.safetensors` and
`fashion_classifier.safetensors` beside this file; `--resume` continues an interrupted
teacher from OUT.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from tqdm import trange

sys.path.append(str(Path(__file__).parents[1]))

from digits_common import parse, save_weights
from study.fashion import (
    CLASSIFIER_FILE,
    NULL_CLASS,
    SIGMA_DATA,
    SIZE,
    TEACHER_FILE,
    Classifier,
    build_denoiser,
    load_images,
)

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

DATA = "Fashion-MNIST, 60,000 training images, 28x28 -> 16x16 (bilinear, antialiased)"
COMMAND = "python examples/study/train_fashion.py"


@dataclass(frozen=True)
class Settings:
    """Trains the Fashion-MNIST teacher and classifier."""

    iterations: int = 6000
    """Optimizer steps of the teacher."""
    classifier_iterations: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Of the teacher's Adam; warmed up over 200 steps, then a cosine to 0."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, so that guidance works."""
    ema_decay: float = 0.999
    save_every: int = 500
    seed: int = 0
    out: Path = Path("runs/fashion_teacher")
    """Checkpoints."""
    resume: bool = False
    threads: int = 1


def train_teacher(settings: Settings) -> None:
    """Denoising score matching on all training images."""
    generator = torch.Generator().manual_seed(settings.seed)
    images, labels = load_images(train=True)
    held_out, held_out_labels = (part[:2000] for part in load_images(train=False))
    teacher = build_denoiser()
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
    loss_function = DenoisingLoss(LogNormalTime(), KarrasWeight(SIGMA_DATA))
    parts = {
        "modules": {"teacher": network},
        "optimizers": {"teacher": optimizer},
        "states": {
            "ema": ema,
            "schedule": schedule,
            "generator": GeneratorState(generator),
        },
    }
    start = 0
    if settings.resume and (found := checkpoints(settings.out)):
        start = load_checkpoint(found[-1], **parts)

    @torch.no_grad()
    def held_out_error() -> float:
        fixed = torch.Generator().manual_seed(1)
        with ema.applied_to(network):
            return loss_function(
                held_out, held_out_labels, denoiser=teacher, generator=fixed
            ).loss.item()

    bar = trange(start, settings.iterations, initial=start, total=settings.iterations)
    for step in bar:
        size = (settings.batch_size,)
        rows = torch.randint(len(images), size, generator=generator)
        dropped = torch.rand(size, generator=generator) < settings.label_dropout
        output = loss_function(
            images[rows],
            torch.where(dropped, NULL_CLASS, labels[rows]),
            denoiser=teacher,
            generator=generator,
        )
        if not bool(output.finite.all()):
            raise SystemExit(f"The loss is not finite at step {step}; no step taken.")
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update(network)
        if (step + 1) % settings.save_every == 0:
            bar.write(f"step {step + 1}: held-out error {held_out_error():.4f}")
            save_checkpoint(settings.out, step=step + 1, keep=1, **parts)

    error = held_out_error()
    ema.copy_to(network)
    about = {
        "what": "class-conditional EDM denoiser of Fashion-MNIST at 16x16",
        "sigma_data": SIGMA_DATA,
        "parameters": sum(p.numel() for p in network.parameters()),
        "held_out_error": round(error, 5),
        "command": COMMAND,
        "settings": {k: v for k, v in asdict(settings).items() if k != "out"},
        "data": DATA,
    }
    save_weights(network, TEACHER_FILE, about)
    print(f"Teacher: held-out error {error:.4f}; wrote {TEACHER_FILE}.")


def train_classifier(settings: Settings) -> None:
    """Slightly noisy, shifted and mirrored images; reports the held-out accuracy."""
    generator = torch.Generator().manual_seed(settings.seed)
    images, labels = load_images(train=True)
    held_out, held_out_labels = load_images(train=False)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.05)
    schedule = CosineAnnealingLR(optimizer, settings.classifier_iterations)
    for _ in trange(settings.classifier_iterations, desc="classifier"):
        rows = torch.randint(len(images), (128,), generator=generator)
        batch = pad(images[rows], (1, 1, 1, 1), value=-1.0)
        top, left = (
            int(i) for i in torch.randint(3, (2,), generator=generator).tolist()
        )
        batch = batch[..., top : top + SIZE, left : left + SIZE]
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(mirrored, batch.flip(-1), batch)
        batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
        loss = cross_entropy(classifier(batch), labels[rows], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        guesses = torch.cat([classifier(x).argmax(1) for x in held_out.split(1000)])
    accuracy = (guesses == held_out_labels).float().mean().item()
    about = {
        "what": "classifier of Fashion-MNIST at 16x16; 64 features",
        "held_out_accuracy": round(accuracy, 4),
        "command": COMMAND,
        "iterations": settings.classifier_iterations,
        "seed": settings.seed,
        "data": DATA,
    }
    save_weights(classifier, CLASSIFIER_FILE, about)
    print(f"Classifier: held-out accuracy {accuracy:.4f}; wrote {CLASSIFIER_FILE}.")


def main(settings: Settings) -> None:
    """Trains both."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    train_classifier(settings)
    train_teacher(settings)


if __name__ == "__main__":
    main(parse(Settings))
