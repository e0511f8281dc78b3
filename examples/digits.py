"""Distils the digits teacher to a one-step student, with the full DMD2 of the paper.

    python examples/digits.py

Distribution matching, the two time-scale update rule and the GAN on real digits, on a
CPU in about three minutes. It writes a picture of teacher and student from the same
noise, curves, a table and the student itself to OUT.

    python examples/digits.py --steps 4          # backward simulation
    python examples/digits.py --iterations 9000  # the longer run, about 20 minutes
    python examples/digits.py --sample demo/student
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from digits_common import (
    CLASSES,
    FEATURES,
    SHAPE,
    load_digits,
    load_sigma_data,
    load_teacher,
    parse,
)
from digits_evaluation import (
    ROWS_FILE,
    SAMPLES,
    SEEDS,
    Evaluator,
    draw_many,
    seconds_per_call,
    teacher_rows,
)
from digits_report import print_table, save_curves, save_grid, save_samples
from runs import RunFolder
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from dmdkit import (
    BackwardSimulator,
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DistributionMatchingLoss,
    GeneratorState,
    KarrasIndexTime,
    KarrasWeight,
    Monitor,
    NonFiniteError,
    ScoreEstimator,
    TTURScheduler,
    checkpoints,
    frozen,
    karras_sigmas,
    trainable_copy,
)
from dmdkit.adapters.folders import load_denoiser, read_sidecar, save_denoiser


@dataclass(frozen=True)
class Settings:
    """Distils the digits teacher with DMD2."""

    steps: int = 1
    """Calls of the student to one sample; above 1 with backward simulation."""
    iterations: int = 1000
    """Critic updates, as the paper counts."""
    batch_size: int = 64
    micro_batches: int = 1
    """Parts of a batch whose gradients are accumulated."""
    learning_rate: float = 5e-4
    """Of the student's AdamW; lowered along a cosine to 0 (ours: the paper's runs are
    long and keep it constant)."""
    critic_learning_rate: float = 1e-3
    critic_steps: int = 5
    """Critic updates to one generator update (paper, section 4.2)."""
    gan: bool = True
    """Whether to add the GAN loss on real digits (paper, section 4.3)."""
    gan_weight: float = 3e-2
    """Weight of the generator's GAN loss (ours, near the gradient balance; the paper's
    weights belong to other sizes)."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss (official scripts)."""
    max_gradient_norm: float = 10.0
    """Clipping of both (official scripts)."""
    seed: int = 0
    out: Path = Path("runs/digits")
    """Folder of everything that is written."""
    resume: bool = False
    """Continue from the newest checkpoint in OUT."""
    evaluate_every: int = 125
    """Iterations between points of the curves; a checkpoint is written with each."""
    samples: int = SAMPLES
    """Samples of each evaluation; there are three, from three noise seeds."""
    full_evaluation: bool = False
    """Also measure the teacher anew instead of showing the shipped numbers."""
    threads: int = 1
    """Of the CPU; networks this small gain little from more."""
    sample: Path | None = None
    """Only draw from this exported student."""

    def __post_init__(self) -> None:
        """Refuses what cannot run."""
        counts = ("iterations", "evaluate_every", "batch_size", "micro_batches")
        for name in (*counts, "steps", "critic_steps", "threads"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected >= 1.")
        if self.batch_size % self.micro_batches:
            raise SystemExit(
                f"--micro-batches {self.micro_batches} must divide --batch-size "
                f"{self.batch_size}."
            )
        if self.samples <= FEATURES:
            raise SystemExit(
                f"--samples {self.samples}: expected more than {FEATURES}, the number "
                "of features, or the Frechet distance is undefined."
            )


class Trained:
    """A denoiser, its AdamW with the paper's settings, a cosine over its own steps."""

    def __init__(
        self, denoiser: ScoreEstimator, learning_rate: float, updates: int
    ) -> None:
        self.denoiser = denoiser
        self.optimizer = torch.optim.AdamW(
            denoiser.parameters(), learning_rate, betas=(0.9, 0.999), weight_decay=0.01
        )
        self.schedule = LambdaLR(
            self.optimizer,
            lambda n: 0.5 * (1 + math.cos(math.pi * min(n / max(updates, 1), 1))),
        )


class Distillation:
    """Networks, optimizers and losses of one run, and its iteration."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.rung_generator = torch.Generator().manual_seed(settings.seed)
        self.train, _ = load_digits()

        self.teacher = load_teacher()
        self.student = trainable_copy(self.teacher)
        head = DiffusionGANHead(channels=64, resolution=4, groups=8)
        self.critic = trainable_copy(self.teacher, head=head if settings.gan else None)
        sigma_data = load_sigma_data()

        # Times and weights of official DMD2 on ImageNet-64.
        self.dm_loss = DistributionMatchingLoss(KarrasIndexTime(20, 981))
        self.critic_loss = DenoisingLoss(KarrasIndexTime(), KarrasWeight(sigma_data))
        self.gan_loss = DiffusionGANLoss(KarrasIndexTime())
        self.simulator = BackwardSimulator(student_times(settings.steps))
        self.ttur = TTURScheduler(settings.critic_steps)

        updates = self.ttur.counts(settings.iterations)
        self.trained = {
            "student": Trained(
                self.student, settings.learning_rate, updates.generator_updates
            ),
            "critic": Trained(
                self.critic, settings.critic_learning_rate, updates.critic_updates
            ),
        }

    def iterate(self, step: int, monitor: Monitor) -> dict[str, Tensor]:
        """One iteration: on the generator's turn both update, else the critic."""
        parts = self.settings.micro_batches
        size = self.settings.batch_size // parts
        generator_turn = self.ttur.generator_turn(step)
        rung = self.simulator.draw_rung(self.rung_generator)  # one for the cycle
        metrics: dict[str, Tensor] = {}
        for _ in range(parts):
            labels = torch.randint(CLASSES, (size,), generator=self.generator)
            noise = torch.randn(size, *SHAPE, generator=self.generator)
            x_t, t, _ = self.simulator(
                self.student, noise, labels, rung=rung, generator=self.generator
            )
            with torch.set_grad_enabled(generator_turn):
                x = self.student(x_t, t, labels)
            losses: dict[str, Any] = {}
            if generator_turn:
                losses |= self.generator_losses(x, labels)
                total = losses["dm"].loss
                if self.settings.gan:
                    total = total + self.settings.gan_weight * losses["gan"].loss
                with frozen(self.critic.network):
                    (total / parts).backward()
            # The same sample, made before the student's update, as in official DMD2.
            losses |= self.critic_losses(x.detach(), labels)
            total = losses["critic"].loss
            if self.settings.gan:
                weight = self.settings.discriminator_weight
                total = total + weight * losses["discriminator"].loss
            (total / parts).backward()
            monitor.require_finite(**losses)
            for name in ("dm", "discriminator"):
                if name in losses:
                    metrics |= losses[name].metrics
        if generator_turn:
            self.update("student", "critic")
        else:
            self.update("critic")
        return metrics

    def generator_losses(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        """Eq. 2, and the generator's side of Eq. 4."""
        with frozen(self.critic.network):
            losses: dict[str, Any] = {
                "dm": self.dm_loss(
                    x,
                    labels,
                    real=self.teacher,
                    fake=self.critic,
                    generator=self.generator,
                )
            }
            if self.settings.gan:
                losses["gan"] = self.gan_loss.generator(
                    x, labels, discriminator=self.critic, generator=self.generator
                )
        return losses

    def critic_losses(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        """Denoising of the student's samples, and telling them from real digits."""
        losses: dict[str, Any] = {
            "critic": self.critic_loss(
                x, labels, denoiser=self.critic, generator=self.generator
            )
        }
        if self.settings.gan:
            rows = torch.randint(
                len(self.train.images), (len(x),), generator=self.generator
            )
            losses["discriminator"] = self.gan_loss.discriminator(
                x,
                labels,
                self.train.images[rows],
                self.train.labels[rows],
                discriminator=self.critic,
                generator=self.generator,
            )
        return losses

    def update(self, *names: str) -> None:
        """Clips all gradients, and takes the steps if they are finite."""
        for name in names:
            parameters = self.trained[name].denoiser.parameters()
            norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_gradient_norm)
            if not bool(norm.isfinite()):
                raise NonFiniteError(
                    f"the gradient of the {name} is not finite; no step was taken."
                )
        for name in names:
            trained = self.trained[name]
            trained.optimizer.step()
            trained.schedule.step()
            trained.optimizer.zero_grad()

    def draw(self, noise: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Samples from the student."""
        return self.simulator.sample(self.student, noise, labels, generator=generator)


def student_times(steps: int) -> tuple[float, ...]:
    """The student's noise levels: Karras' grid from 80, its last level left out."""
    return karras_sigmas(steps + 1)[:-1]


def identity(settings: Settings) -> dict[str, Any]:
    """What makes a run the one it is: all but where, whence and how it is measured."""
    free = ("out", "resume", "sample", "samples", "full_evaluation", "threads")
    return {k: v for k, v in asdict(settings).items() if k not in free}


class Record:
    """The curves and the time spent, for checkpoints and the summary."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"points": [dict(p) for p in self.points], "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = [dict(p) for p in state["points"]]
        self.seconds = float(state["seconds"])


def train(run: Distillation, evaluator: Evaluator) -> Record:
    """The loop: iterations, curves, checkpoints."""
    settings, record, monitor = run.settings, Record(), Monitor(window=10)
    trained = run.trained.items()
    parts: dict[str, Any] = {
        "modules": {name: part.denoiser.network for name, part in trained},
        "optimizers": {name: part.optimizer for name, part in trained},
        "states": {
            **{f"{name}_schedule": part.schedule for name, part in trained},
            "generator": GeneratorState(run.generator),
            "rung_generator": GeneratorState(run.rung_generator),
            "record": record,
            "monitor": monitor,
        },
    }
    folder = RunFolder(settings.out, identity(settings))
    if not settings.resume and checkpoints(folder.checkpoints):
        # The demo is started again and again; a long run would not be removed.
        print(f"Starting anew: removing the earlier run in {folder.checkpoints}.")
        shutil.rmtree(folder.checkpoints)
    start = folder.start(settings.resume, parts)

    def measure(step: int, metrics: dict[str, Tensor]) -> None:
        images = draw_many(run.draw, settings.samples, seed=10_000).images
        frechet = evaluator.frechet(images)
        for text in monitor.observe(step, images, {**metrics, "frechet": frechet}):
            bar.write(text)
        record.points.append(dict(monitor.history[-1]))
        bar.set_postfix(
            frechet=f"{frechet:.2f}",
            gap=f"{record.points[-1].get('gap', 0):.3f}",
            brightness=f"{record.points[-1]['brightness']:.3f}",
        )

    steps = range(start, settings.iterations)
    bar = tqdm(steps, desc="distilling", initial=start, total=settings.iterations)
    metrics: dict[str, Tensor] = {}
    if start == 0:
        measure(0, metrics)
    started = time.perf_counter()
    for step in bar:
        metrics |= run.iterate(step, monitor)
        done = step + 1
        if done % settings.evaluate_every == 0 or done == settings.iterations:
            record.seconds += time.perf_counter() - started
            measure(done, metrics)
            folder.save(done, parts, keep=2)
            started = time.perf_counter()
    return record


def export(run: Distillation, folder: Path) -> None:
    """Writes the student as a diffusers UNet, with what sampling needs beside it."""
    about = {
        "seed": run.settings.seed,
        "iterations": run.settings.iterations,
        "null_class": CLASSES,
    }
    save_denoiser(folder, run.student, times=run.simulator.times, about=about)


def sample(settings: Settings) -> None:
    """Draws ten digits of each class from an exported student."""
    assert settings.sample is not None
    try:
        student = load_denoiser(settings.sample)
        times = read_sidecar(settings.sample).times
    except ValueError as error:
        raise SystemExit(f"--sample: {error}") from error
    if times is None:
        raise SystemExit(f"--sample: {settings.sample} holds a teacher, no student.")
    simulator = BackwardSimulator(times)
    images = draw_many(
        lambda noise, labels, generator: simulator.sample(
            student, noise, labels, generator=generator
        ),
        samples=10 * CLASSES,
        seed=settings.seed,
    ).images
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "drawn.png"
    save_grid(images, path)
    print(f"Wrote {path}: ten of each class, 0 ... 9 from left to right.")


def main(settings: Settings) -> None:
    """Distils, evaluates, and writes everything to OUT."""
    torch.set_num_threads(settings.threads)
    if settings.sample is not None:
        return sample(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator()
    run = Distillation(settings)
    record = train(run, evaluator)
    export(run, settings.out / "student")

    student = evaluator.row(run.draw, samples=settings.samples)
    if settings.full_evaluation:
        teacher = teacher_rows(evaluator, samples=settings.samples)
    else:
        teacher = json.loads(ROWS_FILE.read_text())["rows"]
    student_rows = {str(settings.steps): student}

    def column(name: str) -> dict[str, dict[str, float]]:
        return {
            "teacher": {calls: row[name] for calls, row in teacher.items()},
            "student": {calls: row[name] for calls, row in student_rows.items()},
        }

    seconds = seconds_per_call(run.teacher)
    real_nearest = evaluator.nearest(evaluator.held_out.images)
    summary = {
        "frechet": column("frechet"),
        "frechet_held_out": column("frechet_held_out"),
        "accuracy": column("accuracy"),
        "nearest": {**column("nearest"), "real": real_nearest},
        "seconds_per_1000": {
            "teacher": {calls: int(calls) * seconds for calls in teacher},
            "student": {calls: int(calls) * seconds for calls in student_rows},
        },
        "floor": evaluator.floor,
        "frechet_by_seed": student["frechet_by_seed"],
        "train_seconds": record.seconds,
        "seeds": {"training": settings.seed, "evaluation": list(SEEDS)},
        "samples": settings.samples,
        "iterations": settings.iterations,
        "generator_updates": run.ttur.counts(settings.iterations).generator_updates,
    }
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    save_samples(run.teacher, run.draw, settings.steps, settings.out / "samples.png")
    save_curves(
        record.points,
        {calls: row["frechet"] for calls, row in teacher.items()},
        evaluator.floor,
        evaluator.train.images.mean().item(),
        settings.out / "curves.png",
    )
    print_table(teacher, student_rows, seconds, evaluator, real_nearest)
    print(
        f"Trained for {record.seconds:.0f} s. Wrote {settings.out}/samples.png, "
        "curves.png, summary.json, and the student in student/."
    )


if __name__ == "__main__":
    try:
        main(parse(Settings))
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. The same command with --resume continues from the newest "
            "checkpoint."
        ) from None
