"""Distils the emoji teacher, a text-to-image model, to students of few calls.

    python examples/emoji.py

The full DMD2 of the Stable Diffusion recipes, small enough for a CPU: guidance with the
empty prompt, distribution matching, the two time-scale update rule, the GAN on real
emoji, backward simulation for the student of four calls. A quarter of an hour on two
cores. It writes a picture of real emoji, teacher and students beside each other,
curves, a table and the students themselves to OUT.

    python examples/emoji.py --steps 1 --out runs/emoji-1     # one student alone
    python examples/emoji.py --student runs/emoji/steps-4/student --prompts "cat face"
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from emoji_common import (
    LATENT_SHAPE,
    TEACHER_FILE,
    draw_captions,
    load_emoji,
    load_teacher,
    parse,
    to_images,
    to_latents,
)
from emoji_evaluation import (
    GUIDANCE,
    NAMES,
    ROWS_FILE,
    SEEDS,
    TEACHER_STEPS,
    Evaluator,
    Row,
    require_names,
    teacher_draw,
    teacher_rows,
)
from emoji_report import (
    SHOWN,
    picture_of,
    print_table,
    read_log,
    save_comparison,
    save_curves,
)
from runs import (
    Log,
    RunFolder,
    Trained,
    checkpoint_parts,
    require_finite_norm,
    save_png,
    to_floats,
)
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from dmdkit import (
    BackwardSimulator,
    ClassifierFreeGuidance,
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DistributionMatchingLoss,
    GeneratorState,
    Monitor,
    NonFiniteError,
    TTURScheduler,
    checkpoints,
    few_step_times,
    frozen,
    trainable_copy,
    v_weight,
)
from dmdkit.adapters.conditions import TextPooledCondition
from dmdkit.adapters.folders import load_denoiser, read_sidecar, save_denoiser

WATCHED_NAMES = 128
"""Names by which the curves are drawn."""


@dataclass(frozen=True)
class Settings:
    """Distils the emoji teacher with DMD2."""

    steps: tuple[int, ...] = (4, 1)
    """The students: their calls for one picture; above 1 with backward simulation."""
    iterations: int = 750
    """Critic updates of each student, as the paper counts."""
    batch_size: int = 32
    learning_rate: float = 5e-5
    """Of the student's AdamW; lowered along a cosine to 0 (ours: the paper's runs are
    long and keep it constant)."""
    critic_learning_rate: float = 2e-4
    critic_steps: int = 5
    """Critic updates to one generator update (paper, section 4.2)."""
    guidance: float = GUIDANCE
    """The teacher's guidance scale, which the student takes in."""
    shortened: float = 0.3
    """Share of prompts that are some words of a name, as the teacher was trained."""
    gan: bool = True
    """Whether to add the GAN loss on real emoji (paper, section 4.3)."""
    gan_weight: float = 1e-2
    """Weight of the generator's GAN loss (ours; the paper's belong to other sizes)."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss (official scripts)."""
    max_gradient_norm: float = 10.0
    """Clipping of both (official scripts)."""
    seed: int = 0
    out: Path = Path("runs/emoji")
    """Folder of everything that is written."""
    resume: bool = False
    """Continue from the newest checkpoints in OUT."""
    evaluate_every: int = 125
    """Iterations between points of the curves; a checkpoint is written with each."""
    names: int = NAMES
    """Names, spread over all, that the students are measured on at the end."""
    full_evaluation: bool = False
    """Also measure the teacher anew instead of showing the shipped numbers, which are
    left out where they do not apply: another teacher, guidance or number of names."""
    teacher: Path = TEACHER_FILE
    """Weights that emoji_teacher.py wrote."""
    threads: int = 2
    """Of the CPU."""
    student: Path | None = None
    """Only draw from this exported student: the prompts that follow."""
    prompts: tuple[str, ...] = ("rocket", "face", "moon", "smiling face")
    """What to draw from `student`."""

    def __post_init__(self) -> None:
        """Refuses what cannot run."""
        counts = ("iterations", "evaluate_every", "batch_size", "critic_steps")
        for name in (*counts, "threads"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected >= 1.")
        for name in ("learning_rate", "critic_learning_rate"):
            if not getattr(self, name) > 0:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected > 0.")
        require_names(self.names)
        if not self.steps or not 1 <= min(self.steps) <= max(self.steps) <= 1000:
            raise SystemExit(f"--steps {self.steps}: expected numbers of 1 ... 1000.")
        if len(set(self.steps)) < len(self.steps):
            raise SystemExit(f"--steps {self.steps}: name every number once.")
        if not 0 <= self.shortened <= 1:
            raise SystemExit(f"--shortened {self.shortened}: expected 0 ... 1.")


class Distillation:
    """Networks, optimizers and losses of one student, and its iteration."""

    def __init__(self, settings: Settings, steps: int) -> None:
        self.settings, self.steps = settings, steps
        torch.manual_seed(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.rung_generator = torch.Generator().manual_seed(settings.seed)
        images, self.names = load_emoji()
        self.real = to_latents(images)

        teacher = load_teacher(settings.teacher)
        self.encoder = teacher.encoder
        self.guided = ClassifierFreeGuidance(
            teacher.denoiser, teacher.empty_prompt(), settings.guidance
        )
        self.teacher = teacher.denoiser
        self.student = trainable_copy(teacher.denoiser)
        head = DiffusionGANHead(channels=96, resolution=4, groups=8)
        self.critic = trainable_copy(
            teacher.denoiser, head=head if settings.gan else None
        )

        # Times of official DMD2 for Stable Diffusion; the critic's weight is that of
        # v, which it predicts, where theirs is that of epsilon.
        self.dm_loss = DistributionMatchingLoss(DiscreteUniformTime(20, 981))
        self.critic_loss = DenoisingLoss(DiscreteUniformTime(), v_weight)
        self.gan_loss = DiffusionGANLoss(DiscreteUniformTime())
        self.simulator = BackwardSimulator(few_step_times(steps))
        self.ttur = TTURScheduler(settings.critic_steps)

        updates = self.ttur.counts(settings.iterations)
        self.trained = {
            "student": self._trained(
                self.student, settings.learning_rate, updates.generator_updates
            ),
            "critic": self._trained(
                self.critic, settings.critic_learning_rate, updates.critic_updates
            ),
        }

    def _trained(self, denoiser: Any, learning_rate: float, updates: int) -> Trained:
        trained = Trained(
            denoiser,
            learning_rate=learning_rate,
            weight_decay=0.01,
            warmup=0,
            max_gradient_norm=self.settings.max_gradient_norm,
        )
        trained.schedule = LambdaLR(
            trained.optimizer,
            lambda n: 0.5 * (1 + math.cos(math.pi * min(n / updates, 1))),
        )
        return trained

    def draw_real(self) -> tuple[Tensor, TextPooledCondition]:
        """A batch of emoji and their encoded prompts, as the teacher was trained."""
        rows = torch.randint(
            len(self.names), (self.settings.batch_size,), generator=self.generator
        )
        names = [self.names[row] for row in rows]
        prompts = draw_captions(names, self.settings.shortened, self.generator)
        with torch.no_grad():
            return self.real[rows], self.encoder.encode(prompts)

    def iterate(self, step: int, monitor: Monitor) -> dict[str, Tensor]:
        """One iteration: on the generator's turn both update, else the critic."""
        generator_turn = self.ttur.generator_turn(step)
        rung = self.simulator.draw_rung(self.rung_generator)
        _, cond = self.draw_real()
        noise = torch.randn(
            self.settings.batch_size, *LATENT_SHAPE, generator=self.generator
        )
        x_t, t, _ = self.simulator(
            self.student, noise, cond, rung=rung, generator=self.generator
        )
        with torch.set_grad_enabled(generator_turn):
            x = self.student(x_t, t, cond)
        losses: dict[str, Any] = {}
        if generator_turn:
            losses |= self.generator_losses(x, cond)
        # The same sample, made before the student's update, as in official DMD2.
        losses |= self.critic_losses(x.detach(), cond)
        monitor.require_finite(**losses)
        for name in ("student", "critic") if generator_turn else ("critic",):
            require_finite_norm(self.trained[name].clip(), name)
        for name in ("student", "critic") if generator_turn else ("critic",):
            self.trained[name].step()
        metrics: dict[str, Tensor] = {}
        for name in ("dm", "discriminator"):
            if name in losses:
                metrics |= losses[name].metrics
        return metrics

    def generator_losses(self, x: Tensor, cond: TextPooledCondition) -> dict[str, Any]:
        """Eq. 2, the generator's side of Eq. 4, and their backward."""
        with frozen(self.critic.network):
            losses: dict[str, Any] = {
                "dm": self.dm_loss(
                    x,
                    cond,
                    real=self.guided,
                    fake=self.critic,
                    generator=self.generator,
                )
            }
            total = losses["dm"].loss
            if self.settings.gan:
                losses["gan"] = self.gan_loss.generator(
                    x, cond, discriminator=self.critic, generator=self.generator
                )
                total = total + self.settings.gan_weight * losses["gan"].loss
            total.backward()
        return losses

    def critic_losses(self, x: Tensor, cond: TextPooledCondition) -> dict[str, Any]:
        """Denoising the student's samples, telling them from real ones; backward."""
        losses: dict[str, Any] = {
            "critic": self.critic_loss(
                x, cond, denoiser=self.critic, generator=self.generator
            )
        }
        total = losses["critic"].loss
        if self.settings.gan:
            real, real_cond = self.draw_real()
            losses["discriminator"] = self.gan_loss.discriminator(
                x,
                cond,
                real,
                real_cond,
                discriminator=self.critic,
                generator=self.generator,
            )
            weight = self.settings.discriminator_weight
            total = total + weight * losses["discriminator"].loss
        total.backward()
        return losses

    def draw(
        self, noise: Tensor, cond: TextPooledCondition, generator: torch.Generator
    ) -> Tensor:
        """Samples from the student."""
        return self.simulator.sample(self.student, noise, cond, generator=generator)

    def draw_untrained(
        self, noise: Tensor, cond: TextPooledCondition, generator: torch.Generator
    ) -> Tensor:
        """Samples from what the student was before its training."""
        return self.simulator.sample(self.teacher, noise, cond, generator=generator)


class Stopwatch:
    """The seconds that training took, over all of a run's parts."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = float(state["seconds"])


def identity(settings: Settings, steps: int) -> dict[str, Any]:
    """What makes a run the one it is: all but where, whence and how it is measured."""
    free = ("out", "resume", "names", "full_evaluation", "threads", "student")
    kept = {k: v for k, v in asdict(settings).items() if k not in (*free, "prompts")}
    return {**kept, "steps": steps, "teacher": str(settings.teacher.resolve())}


def train(run: Distillation, evaluator: Evaluator, out: Path) -> float:
    """The loop: iterations, curves, checkpoints; gives the seconds of training."""
    settings, monitor, watch = run.settings, Monitor(window=10), Stopwatch()
    states = {
        "generator": GeneratorState(run.generator),
        "rung_generator": GeneratorState(run.rung_generator),
        "monitor": monitor,
        "stopwatch": watch,
    }
    parts = checkpoint_parts(run.trained, states)
    folder = RunFolder(out, identity(settings, run.steps))
    going_on = settings.resume and bool(checkpoints(folder.checkpoints))
    start = folder.start(going_on, parts)
    log = Log(out, start, None, folder.identity)
    total, metrics = settings.iterations, {}
    noun = "call" if run.steps == 1 else "calls"
    bar = tqdm(
        range(start, total),
        desc=f"student of {run.steps} {noun}",
        initial=start,
        total=total,
    )

    def measure(step: int) -> None:
        images, values = evaluator.of_draws(run.draw, seed=10_000)
        for text in monitor.observe(step, images, metrics):
            bar.write(text)
        values |= {"brightness": images.mean().item()}
        log.scalars(step, {**values, **(to_floats(metrics) if metrics else {})})
        bar.set_postfix({name: f"{values[name]:.3f}" for name in ("top1", "word")})

    if start == 0:
        measure(0)
    started = time.perf_counter()
    for step in bar:
        metrics |= run.iterate(step, monitor)
        done = step + 1
        if done % settings.evaluate_every == 0 or done == total:
            watch.seconds += time.perf_counter() - started
            measure(done)
            folder.save(done, parts, keep=2)
            started = time.perf_counter()
    log.close()
    return watch.seconds


def sample(settings: Settings) -> None:
    """Draws eight pictures for each prompt from an exported student."""
    assert settings.student is not None
    try:
        student = load_denoiser(settings.student)
        times = read_sidecar(settings.student).times
    except ValueError as error:
        raise SystemExit(f"--student: {error}") from error
    if times is None:
        raise SystemExit(f"--student: {settings.student} holds a teacher, no student.")
    if not settings.prompts:
        raise SystemExit('--prompts: none; say what to draw, such as "rocket".')
    each = 8
    prompts = [prompt for prompt in settings.prompts for _ in range(each)]
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        try:
            cond = load_teacher(settings.teacher).encoder.encode(prompts)
        except ValueError as error:
            raise SystemExit(f"--prompts: {error}") from error
    noise = torch.randn(len(prompts), *LATENT_SHAPE, generator=generator)
    latents = BackwardSimulator(times).sample(student, noise, cond, generator=generator)
    path = settings.out / "drawn.png"
    save_png(picture_of(to_images(latents), each), path)
    print(f"Wrote {path}: a row of eight for each prompt.")


def distil(settings: Settings, steps: int) -> tuple[Distillation, float]:
    """Trains and exports one student."""
    run, folder = Distillation(settings, steps), settings.out / f"steps-{steps}"
    seconds = train(run, Evaluator(run.encoder, WATCHED_NAMES), folder)
    about = {"seed": settings.seed, "iterations": settings.iterations}
    save_denoiser(
        folder / "student", run.student, times=run.simulator.times, about=about
    )
    return run, seconds


def compare(runs: dict[int, Distillation], out: Path) -> None:
    """Draws the same prompts by teacher and students from the same noise."""
    run = next(iter(runs.values()))
    with torch.no_grad():
        cond = run.encoder.encode(SHOWN)
    fixed = torch.Generator().manual_seed(0)
    noise = torch.randn(len(SHOWN), *LATENT_SHAPE, generator=fixed)
    draws = {
        "teacher,\n100 calls": teacher_draw(run.guided, TEACHER_STEPS),
        **{f"student,\n{calls_of(steps)}": r.draw for steps, r in runs.items()},
    }
    save_comparison(draws, noise, cond, load_emoji(), out / "comparison.png")


def calls_of(steps: int) -> str:
    """How a number of calls is written."""
    return f"{steps} call" if steps == 1 else f"{steps} calls"


def rows_of_teacher(settings: Settings) -> dict[str, Row]:
    """The teacher's numbers by steps: measured, shipped, or none if others apply."""
    if settings.full_evaluation:
        return teacher_rows(settings.teacher, settings.guidance, settings.names)
    if not ROWS_FILE.is_file():
        print(f"Without the teacher's numbers: emoji_evaluation.py writes {ROWS_FILE}.")
        return {}
    shipped = json.loads(ROWS_FILE.read_text())
    asked = {"guidance": settings.guidance, "names": settings.names}
    other = [
        f"{k} {asked[k]}, not {shipped[k]}" for k in asked if asked[k] != shipped[k]
    ]
    if settings.teacher.resolve() != TEACHER_FILE.resolve():
        other.append("another teacher")
    if other:
        print(
            f"Without the teacher's numbers, which are shipped for others "
            f"({'; '.join(other)}); --full-evaluation measures them."
        )
        return {}
    return shipped["rows"]


def main(settings: Settings) -> None:
    """Distils, evaluates, and writes everything to OUT."""
    torch.set_num_threads(settings.threads)
    if settings.student is not None:
        return sample(settings)
    out, runs, seconds, rows = settings.out, {}, {}, {}
    for steps in settings.steps:
        runs[steps], seconds[steps] = distil(settings, steps)
    evaluator = Evaluator(next(iter(runs.values())).encoder, settings.names)
    for steps, run in runs.items():
        name = f"untrained, {calls_of(steps)}"
        rows[name] = steps, evaluator.row(run.draw_untrained, SEEDS, name)
    for steps, run in runs.items():
        name = f"student, {calls_of(steps)}"
        rows[name] = steps, evaluator.row(run.draw, SEEDS, name)

    teacher = rows_of_teacher(settings)
    real = evaluator.real_row()
    table = [("real", 0, real)]
    for n, row in teacher.items():
        table += [(f"teacher, {n} step{'' if n == '1' else 's'}", 2 * int(n), row)]
    table += [(name, calls, row) for name, (calls, row) in rows.items()]
    summary = {
        "rows": {name: {"calls": calls, **row} for name, calls, row in table},
        "train_seconds": seconds,
        "threads": settings.threads,
        "seeds": {"training": settings.seed, "evaluation": list(SEEDS)},
        "guidance": settings.guidance,
        "names": len(evaluator.rows),
        "words": len(evaluator.words),
        "iterations": settings.iterations,
        "generator_updates": next(iter(runs.values()))
        .ttur.counts(settings.iterations)
        .generator_updates,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    compare(runs, out)
    save_curves(
        {calls_of(n): read_log(out / f"steps-{n}") for n in runs},
        teacher.get(str(TEACHER_STEPS)),
        out / "curves.png",
    )
    print_table(table)
    spent = ", ".join(f"{calls_of(n)} {s:.0f} s" for n, s in seconds.items())
    print(
        f"Trained: {spent}. Wrote {out}/comparison.png, curves.png, summary.json, and "
        f"the students in {out}/steps-*/student."
    )


if __name__ == "__main__":
    try:
        main(parse(Settings))
    except NonFiniteError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. The same command with --resume continues from the newest "
            "checkpoints."
        ) from None
