"""One iteration of DMD2 and the loop around it, as the recipes share them.

A recipe has networks, a method (its losses as functions of tensors) and data; here is
what happens with them: turns, accumulation, updates, log, pictures, checkpoints.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import parallel
import torch
import tyro
from parallel import (
    Strategy,
    gradients_stay,
    head_of,
    plain,
    processes,
    share,
    whole,
)
from runs import (
    Best,
    Durations,
    Log,
    RunFolder,
    Soundness,
    StopSignals,
    Trained,
    check_evaluation,
    checkpoint_parts,
    device_of,
    grid_of,
    peak_memory_gib,
    require_wandb,
    run_evaluation,
    save_png,
    to_floats,
    to_pixels,
)
from torch import Tensor
from tqdm import tqdm

from dmdkit import (
    BackgroundCheckpoints,
    GeneratorState,
    Monitor,
    NonFiniteError,
    ScoreEstimator,
    SharedCriticLoss,
    TTURScheduler,
    all_finite,
)
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.data import BadImageError, BatchStream
from dmdkit.training.ranks import on_first


@dataclass(frozen=True)
class RunSettings:
    """Where a run is, and how it is watched: nothing that changes its result."""

    out: Path
    """Folder of everything that is written."""
    resume: bool = False
    """Continue from the newest checkpoint in OUT."""
    device: str = "auto"
    """cuda, cuda:1, cpu; auto takes a GPU if there is one, under torchrun one each."""
    strategy: Strategy = "ddp"
    """Of several processes, started by torchrun: copies of the networks (ddp), shards
    of them over all processes (fsdp), or over those of a machine (hsdp)."""
    cpu_offload: bool = False
    """Of fsdp and hsdp: weights, gradients and moments wait in the CPU's memory, and
    optimizers step there: slower, with room for larger batches."""
    compile: bool = False
    """torch.compile for the calls of teacher, student and critic: the first cycle takes
    minutes; under fsdp and hsdp block by block."""
    channels_last: bool = False
    """Weights of convolutions with channels last, as tensor cores read them."""
    threads: int = 0
    """Of the CPU; 0 leaves PyTorch's choice."""
    workers: int = min(4, os.cpu_count() or 1)
    """Processes that read data."""
    log_every: int = 100
    """Iterations between lines of the log."""
    sample_every: int = 500
    """Iterations between pictures of samples."""
    checkpoint_every: int = 500
    """Iterations between checkpoints [scripts]; one is written at the end too."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    background_saving: bool = False
    """Write checkpoints while training goes on; takes as much memory of the CPU as a
    process's part of the checkpoint."""
    evaluate: str | None = None
    """Command that measures a student, such as "python fid.py {student}"; the last line
    it prints is a JSON object of numbers, which go to the log."""
    evaluate_every: int = 1
    """Run it on every n-th checkpoint [scripts: every one]."""
    best: str = "fid"
    """Number of the evaluation that is smallest for the best checkpoint: OUT/best."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well."""

    def check(self) -> None:
        """Refuses what cannot run."""
        every = ("log_every", "sample_every", "checkpoint_every", "evaluate_every")
        require_at_least(self, 1, *every, "keep")
        require_at_least(self, 0, "workers", "threads")
        if self.cpu_offload and self.strategy == "ddp":
            raise refusal("cpu-offload", "strategy ddp", "takes --strategy fsdp, hsdp")
        if self.out.exists() and not self.out.is_dir():
            raise SystemExit(f"--out: {self.out} is a file; name a folder.")
        require_wandb(self.wandb)
        if self.evaluate is not None:
            check_evaluation(self.evaluate)


Run = Annotated[RunSettings, tyro.conf.arg(name="")]
"""The settings of a run within those of a recipe, as plain options."""


class RecipeSettings(Protocol):
    """What the loop asks of a recipe's settings."""

    @property
    def preset(self) -> str: ...
    @property
    def iterations(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def critic_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_gradient_norm(self) -> float: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def run(self) -> RunSettings: ...


def refusal(name: str, got: object, remedy: str) -> SystemExit:
    """An error about an option, in one line."""
    return SystemExit(f"--{name.replace('_', '-')}: {got}; {remedy}.")


def require_at_least(settings: object, least: int, *names: str) -> None:
    """Refuses settings that are smaller."""
    for name in names:
        if getattr(settings, name) < least:
            raise refusal(name, getattr(settings, name), f"expected >= {least}")


def check_shared_passes(settings: Any) -> None:
    """Refuses to share a pass between losses of which one is off."""
    if settings.shared_critic_pass and not settings.gan:
        raise refusal("shared_critic_pass", "nothing to share it with", "add --gan")
    both = settings.gan and settings.distribution_matching
    if settings.shared_generator_pass and not both:
        raise refusal(
            "shared_generator_pass",
            "it serves two losses, of which one is off",
            "add --gan and --distribution-matching",
        )


def micro_batches(settings: RecipeSettings, ranks: int) -> tuple[int, int]:
    """How many micro-batches a process takes, and their size."""
    if settings.batch_size % ranks:
        raise SystemExit(
            f"--batch-size {settings.batch_size}: {ranks} processes must divide it; "
            f"take {max(settings.batch_size // ranks, 1) * ranks}, or other processes."
        )
    own = settings.batch_size // ranks
    parts = -(-own // settings.micro_batch_size)
    while own % parts:
        parts += 1
    size = own // parts
    if 2 * size <= settings.micro_batch_size and parts > 1:
        raise SystemExit(
            f"--micro-batch-size {settings.micro_batch_size}: the next size that "
            f"divides {own} is {size}; choose sizes that go together, as 40 and 280 do."
        )
    return parts, size


def identity(settings: Any) -> dict[str, Any]:
    """What makes a run the one it is: all but where it is and how it is watched."""
    return {
        name: _as_text(value)
        for name, value in asdict(settings).items()
        if name not in ("run", "iterations")
    }


def _as_text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, tuple):
        return [_as_text(item) for item in value]
    return value


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Network calls in bf16, if that is the precision.

    Without autocast's cache, so that no cast made under `no_grad` can serve a later
    call that needs its graph.
    """
    enabled = precision == "bf16"
    return torch.autocast(
        device.type, torch.bfloat16, enabled=enabled, cache_enabled=False
    )


def backward(
    losses: Mapping[str, Any],
    weights: Mapping[str, float],
    share: float,
    zero: Tensor | float = 0.0,
) -> None:
    """Adds the gradient of a share of the weighted losses to what is trained.

    If a sample of the losses is not finite, every gradient becomes NaN: also where its
    loss alone would not tell, and on all processes, which then take no step. `zero` is
    a zero of weights that are to have a gradient as well.
    """
    total = sum((weights[name] * out.loss for name, out in losses.items()), start=zero)
    sound = all_finite(*losses.values())
    (total * torch.where(sound, share, math.nan)).backward()


def learn_of_samples(
    method: Any,
    critic: ScoreEstimator,
    x: Tensor,
    cond: Any,
    real: Tensor | None,
    real_cond: Any,
    generator: torch.Generator,
    share: float,
) -> dict[str, Any]:
    """Adds the gradient of denoising and GAN loss (Eq. 4) to the critic and its head.

    Where they share no pass, the discriminator's graph is gone before the denoising's
    is made: memory holds one of them at a time.
    """
    about: Any = (x, cond, real, real_cond)
    weights: Mapping[str, float] = method.weights
    if method.settings.shared_critic_pass:
        loss = SharedCriticLoss(method.critic_loss, method.gan_loss)
        with method.autocast(x.device):
            both = loss(*about, critic=critic, generator=generator)
        losses = {"critic": both.denoising, "discriminator": both.discriminator}
        backward(losses, weights, share)
        return losses
    told = {}
    if method.settings.gan:
        with gradients_stay([critic.network]):
            with method.autocast(x.device):
                told["discriminator"] = method.gan_loss.discriminator(
                    *about, discriminator=critic, generator=generator
                )
            backward(told, weights, share)
    with method.autocast(x.device):
        loss = method.critic_loss(x, cond, denoiser=critic, generator=generator)
    losses = {"critic": loss}
    backward(losses, weights, share, head_of(critic.network))
    return losses | told


class Distillation(ABC):
    """Networks, losses, optimizers and data of a run, and its iteration.

    `rank` of `ranks` processes has its own noise, conditions and share of the batch;
    the rung is the same on all. A recipe adds networks, method and trained modules to
    it, and says how data are drawn, shown and exported.
    """

    networks: Any
    method: Any
    """The recipe's losses as functions of tensors, without loaders and host reads:
    `simulator`, `generate`, `student_backward`, `critic_backward`."""
    trained: dict[str, Trained]

    def __init__(self, settings: RecipeSettings, rank: int, ranks: int) -> None:
        self.settings, self.run_settings = settings, settings.run
        self.rank, self.ranks = rank, ranks
        self.device = device_of(settings.run.device)
        self.ttur = TTURScheduler(settings.critic_steps)
        self.generator = torch.Generator(self.device).manual_seed(settings.seed + rank)
        self.rung_generator = torch.Generator().manual_seed(settings.seed)
        self.parts, self.size = micro_batches(settings, ranks)
        self.streams: dict[str, BatchStream] = {}
        self.soundness = Soundness()

    @abstractmethod
    def draw(self) -> Any:
        """Draws a micro-batch."""

    @abstractmethod
    def samples(self) -> Tensor | None:
        """Images in [-1, 1] of always the same noise and conditions, if there are."""

    @abstractmethod
    def export(self, folder: Path, step: int) -> None:
        """Writes the student for others to sample from."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """The parameters of the networks, for the summary."""

    @abstractmethod
    def how_to_draw(self) -> str | None:
        """The command that draws from the exported student, if it is worth it."""

    def train_with(self, denoiser: Any, warmup: int) -> Trained:
        """An optimizer for student or critic: both have the same settings."""
        return Trained(
            denoiser,
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            warmup=warmup,
            max_gradient_norm=self.settings.max_gradient_norm,
        )

    def stream(self, name: str, dataset: Any, seed: int = 0) -> BatchStream:
        """Endless shuffled batches, of which every process has its own part."""
        self.streams[name] = BatchStream(
            dataset,
            self.size,
            seed=self.settings.seed + seed,
            rank=self.rank,
            ranks=self.ranks,
            workers=self.run_settings.workers,
            pin_memory=self.device.type == "cuda",
        )
        return self.streams[name]

    def iterate(self, step: int) -> dict[str, Tensor]:
        """One iteration: on the student's turn both learn, else the critic alone.

        Nothing is read back from the device, so that the host runs ahead of it. The
        metrics are those of the last micro-batch.

        The critic sees the samples that the student made before its own update, as in
        official DMD2. All micro-batches share a rung; only if there is one does the
        student step before the critic's backward, so that its gradient is freed.
        """
        turn = self.ttur.generator_turn(step)
        rung = self.draw_rung()
        share, metrics = 1 / self.parts, {}
        networks = [part.denoiser.network for part in self.trained.values()]
        self.soundness.begin(step)
        for part in range(1, self.parts + 1):
            with gradients_stay(networks if part < self.parts else []):
                metrics |= self.learn(turn, rung, share)
        if turn and self.parts > 1:
            metrics |= self.update("student")
        if "critic" in self.trained:
            metrics |= self.update("critic")
        return metrics

    def learn(self, turn: bool, rung: int, share: float) -> dict[str, Tensor]:
        """Adds the gradients of a micro-batch to student and critic."""
        batch, metrics = self.draw(), {}
        about = (self.networks, batch)
        x = self.method.generate(*about, rung, self.generator, train=turn)
        if turn:
            losses = self.method.student_backward(*about, x, self.generator, share)
            metrics |= self.note(losses)
            if self.parts == 1:
                metrics |= self.update("student")
        if "critic" in self.trained:
            losses = self.method.critic_backward(*about, x, self.generator, share)
            metrics |= self.note(losses)
        return metrics

    def note(self, losses: dict[str, Any]) -> dict[str, Tensor]:
        """Keeps the flags of losses for `soundness`, and gives their metrics."""
        self.soundness.losses(losses)
        metrics = {f"{name}/loss": out.loss.detach() for name, out in losses.items()}
        for name, output in losses.items():
            metrics |= {f"{name}/{key}": v for key, v in output.metrics.items()}
        return metrics

    def rows_of_pictures(self, count: int) -> tuple[Tensor, ...]:
        """Rows 0 ... count - 1 in batches of the size for which networks are compiled.

        The last goes round to the first rows.
        """
        whole_batches = -(-count // self.size) * self.size
        return (torch.arange(whole_batches) % count).split(self.size)

    def draw_rung(self) -> int:
        """Draws the rung of an iteration, the same on all processes."""
        return self.method.simulator.draw_rung(self.rung_generator)

    def update(self, name: str) -> dict[str, Tensor]:
        """Clips the gradient and, if all has been finite so far, takes a step."""
        trained = self.trained[name]
        norm = trained.clip()
        trained.step(self.soundness.gradient(name, norm))
        return {f"{name}/gradient_norm": norm.to(self.device)}

    def arrange(self, *denoisers: ScoreEstimator) -> None:
        """Lays networks out and compiles them, as the settings say, in place.

        Before they are wrapped: names of weights, and so checkpoints, stay the same.
        """
        watch = self.run_settings
        sharded = self.ranks > 1 and watch.strategy != "ddp"
        for denoiser in denoisers:
            if watch.channels_last:
                denoiser.network.to(memory_format=torch.channels_last)
            if watch.compile:
                parallel.compile_network(denoiser.network, by_blocks=sharded)

    def spread(self, *denoisers: ScoreEstimator) -> None:
        """Puts networks on all processes, if there are several."""
        offload = self.run_settings.cpu_offload
        if self.ranks == 1:
            if offload:
                raise refusal("cpu-offload", "one process", "start several by torchrun")
            return
        strategy = self.run_settings.strategy
        mesh = None if strategy == "ddp" else parallel.mesh_of(strategy, self.device)
        low = self.settings.precision == "bf16"
        for denoiser in denoisers:
            share(denoiser, strategy, mesh, low_precision=low, offload=offload)

    def write_student(self, write: Callable[[ScoreEstimator], None]) -> None:
        """Hands the whole student to rank 0, averaged if there is an average."""
        with self.averaged():
            student = whole(self.networks.student, self.unsharded)
            on_first(lambda: None if student is None else write(student))

    def unsharded(self, network: torch.nn.Module) -> torch.nn.Module:
        """A network like a sharded one, to put its gathered weights into."""
        assert isinstance(network, UNetNetwork)
        unet: Any = network.unet
        place: Any = network.place
        return UNetNetwork(type(unet).from_config(unet.config), place)

    def averaged(self) -> Any:
        """Puts the average of the student's weights in place, if there is one."""
        student = self.trained["student"]
        if student.ema is None:
            return nullcontext()
        return student.ema.applied_to(plain(student.denoiser.network))

    def parts_of_checkpoint(self, **states: Any) -> dict[str, Any]:
        """Everything that a run is."""
        own = {
            "generator": GeneratorState(self.generator),
            "rung_generator": GeneratorState(self.rung_generator, shared=True),
        }
        return checkpoint_parts(self.trained, {**own, **self.streams, **states})


WATCHED = ("dm/gap", "discriminator/accuracy", "critic/error")
"""What the progress bar shows and the monitor judges."""
SHOWN = (*WATCHED, "regression/loss")


def train(run: Distillation, folder: RunFolder, stop: StopSignals) -> dict[str, float]:
    """The loop: iterations, log, pictures, checkpoints, evaluation."""
    settings, out, monitor = run.settings, run.run_settings.out, Monitor()
    watch = run.run_settings
    parts = run.parts_of_checkpoint(monitor=monitor)
    start = folder.start(watch.resume, parts)
    # Not by --resume: torchrun's restarts go on as well.
    best = Best(watch.best, out / "best" if start else None)
    if start > settings.iterations:
        raise SystemExit(
            f"--iterations {settings.iterations}: the run has made {start} already."
        )
    patient = parallel.patient_group() if watch.evaluate else None
    first = run.rank == 0
    if first and start < settings.iterations:
        (out / "summary.json").unlink(missing_ok=True)  # of a shorter run before
    log = Log(out, start, watch.wandb, folder.identity) if first else None
    durations = Durations(run.device)
    steps = range(start, settings.iterations)
    bar = tqdm(
        steps,
        desc=settings.preset,
        initial=start,
        total=settings.iterations,
        unit="it",
        disable=not first,
    )
    metrics: dict[str, Tensor] = {}

    def show(done: int) -> None:
        images = run.samples()
        if images is None or log is None:
            return
        watched = {k.rpartition("/")[2]: metrics[k] for k in WATCHED if k in metrics}
        for text in monitor.observe(done, images, watched):
            bar.write(text)
        grid = grid_of(to_pixels(images), columns=8)
        save_png(grid, out / "samples" / f"{done:08d}.png")
        log.picture(done, "samples", grid)

    def save(done: int) -> None:
        folder.save(done, parts, watch.keep)
        number = done // watch.checkpoint_every
        last = done == settings.iterations
        if watch.evaluate and (last or number % watch.evaluate_every == 0):
            path, student = folder.saved(), out / "evaluated"
            run.export(student, done)
            wrong = on_first(lambda: evaluate(path, student, done), patient)
            if wrong and not last:  # else a long run would end without its best
                raise SystemExit(f"{wrong} The run is saved; --resume goes on.")
            if wrong and first:
                bar.write(wrong)

    def evaluate(path: Path, student: Path, done: int) -> str | None:
        assert log is not None
        assert watch.evaluate is not None
        found = run_evaluation(watch.evaluate, student, done)
        log.scalars(done, {f"evaluation/{k}": v for k, v in found.items()})
        if best.improved(found):
            folder.keep_best(path, {"step": done, **found})
        return best.unknown_to(found)

    for step in bar:
        turn = run.ttur.generator_turn(step)
        with durations.of("generator_turn" if turn else "critic_turn"):
            metrics |= run.iterate(step)
        done = step + 1
        last = done == settings.iterations
        every = (watch.log_every, watch.sample_every, watch.checkpoint_every)
        if last or any(done % n == 0 for n in every):
            run.soundness.check()  # before anything is written
        if last or done % watch.log_every == 0:
            values = to_floats(metrics)
            learner = run.trained.get("critic", run.trained["student"])
            rate = float(learner.schedule.get_last_lr()[0])
            line = {**values, "learning_rate": rate, **durations.medians()}
            if log is not None:
                log.scalars(done, line)
            bar.set_postfix(
                {k: f"{values[k]:.3g}" for k in SHOWN if k in values}, refresh=False
            )
        if last or done % watch.sample_every == 0:
            show(done)
        if last or done % watch.checkpoint_every == 0:
            save(done)
        if done % watch.log_every == 0:
            metrics.clear()  # a line has nothing older than the line before
        if not last and stop.asked():
            run.soundness.check()
            if done % watch.checkpoint_every:
                folder.save(done, parts, watch.keep)
            folder.saved()
            if log is not None:
                log.close()
                bar.close()
                print(
                    f"Stopped by {stop.name or 'a signal'} after iteration {done}, "
                    "which is saved; the same command with --resume continues."
                )
            raise SystemExit
    if log is not None:
        log.close()
    return durations.medians()


def distil(settings: Any, build: Callable[[Any, int, int], Distillation]) -> None:
    """Distils, and writes everything to OUT."""
    settings.check()
    before = peak_memory_gib(torch.device("cpu"))
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    torch.set_float32_matmul_precision("high")  # TF32 [scripts]
    with processes(settings.run.device) as ranks:
        folder = RunFolder(settings.run.out, identity(settings))
        folder.resumes(settings.run.resume)  # before networks are built
        try:
            run = build(settings, ranks.rank, ranks.ranks)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        try:
            with StopSignals() as stop, ExitStack() as stack:
                if settings.run.background_saving:
                    folder.background = stack.enter_context(BackgroundCheckpoints())
                seconds = train(run, folder, stop)
                trained = peak_memory_gib(run.device)
        except (BadImageError, NonFiniteError) as error:
            raise SystemExit(str(error)) from error
        run.export(settings.run.out / "student", settings.iterations)
        if ranks.rank == 0:
            memory = {"imports": before, "training": trained}
            summarise(run, seconds, memory)


def summarise(
    run: Distillation, seconds: dict[str, float], memory: dict[str, float]
) -> None:
    """Writes and prints what the run took; `memory` are peaks after parts of it."""
    settings, out = run.settings, run.run_settings.out
    file = out / "summary.json"
    if not seconds and file.is_file():
        print(f"The run had its {settings.iterations} iterations already.")
        return
    summary = {
        "preset": settings.preset,
        "iterations": settings.iterations,
        "student_updates": run.ttur.counts(settings.iterations).generator_updates,
        "batch_size": settings.batch_size,
        "micro_batches": run.parts,
        "ranks": run.ranks,
        **run.counts(),
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "precision": settings.precision,
        "seconds_per_iteration": seconds,
        "peak_memory_gib": peak_memory_gib(run.device),
        "peak_memory_gib_after": memory,
    }
    file.write_text(json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:<24}{value}")
    if run.run_settings.evaluate and not (out / "best").is_dir():
        print(f"No evaluation gave {run.run_settings.best!r}: there is no {out}/best.")
    if command := run.how_to_draw():
        print(f"The student is in {out}/student; draw from it with\n  {command}")


def until_interrupted(start: Callable[[], None]) -> None:
    """Runs a recipe; Ctrl-C ends it with one line."""
    try:
        start()
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. The same command with --resume continues from the newest "
            "checkpoint, if one has been written."
        ) from None
