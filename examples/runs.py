"""What the recipes share: command line, run folder, log, optimizers, pictures.

A run's folder holds `settings.json`, `log.jsonl`, TensorBoard's events, `checkpoints/`,
`samples/` and, at the end, `student/` and `summary.json`.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from parallel import averages, plain, whole_norm
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from dmdkit import (
    BackgroundCheckpoints,
    ExponentialMovingAverage,
    LPIPSDistance,
    NonFiniteError,
    ScoreEstimator,
    checkpoints,
    explain_nonfinite,
    keep_checkpoint,
    linear_warmup,
    load_newest_checkpoint,
    save_checkpoint,
)
from dmdkit.extras import require_extra
from dmdkit.training.checkpoint_files import require_visible
from dmdkit.training.ranks import everywhere, on_any, on_first, rank_and_ranks

require_extra("train", "tyro", "tensorboard", "tqdm")

SettingsType = TypeVar("SettingsType")


def parse(
    settings: type[SettingsType],
    presets: Mapping[str, SettingsType],
    arguments: Sequence[str] | None = None,
) -> SettingsType:
    """Reads settings from the command line: those of `--preset`, and what differs."""
    import tyro

    given = list(sys.argv[1:] if arguments is None else arguments)
    finder = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    finder.add_argument("--preset")
    try:
        name = finder.parse_known_args(given)[0].preset
    except argparse.ArgumentError:
        name = None
    # tyro itself refuses a preset that is not in the list.
    default = presets.get(str(name), next(iter(presets.values())))
    return tyro.cli(settings, default=default, args=given)


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is the first GPU if there is one."""
    if name == "auto":
        # torchrun's processes have a GPU each, which is the current one.
        on_gpu = torch.cuda.is_available()
        name = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: expected auto, cuda or cpu.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: this machine has no CUDA device.")
    return device


def require_wandb(project: str | None) -> None:
    """Refuses `--wandb` where its package is missing: it is no dependency."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise SystemExit("--wandb: wandb is missing; type: pip install wandb")


@contextmanager
def option(name: str) -> Iterator[None]:
    """Says which option of the command line an error is about, in one line."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"--{name}: {error}") from error


def open_lpips(weights: Path | None) -> LPIPSDistance:
    """LPIPS with VGG, of a file or of torchvision's own weights."""
    with option("lpips-weights"):
        try:
            return LPIPSDistance("vgg", weights)
        except OSError as error:  # without a network
            raise ValueError(
                f"torchvision could not load its vgg16 ({error}); name a file of it."
            ) from error


def require_checkpoint(path: Path) -> None:
    """Refuses a folder that is no checkpoint, and says where one might be meant."""
    if checkpoints(path.parent).count(path) or (path / "best.json").is_file():
        return
    near = checkpoints(path) or checkpoints(path / "checkpoints")
    near = near or checkpoints(path.parent) or checkpoints(path.parent / "checkpoints")
    meant = f"; perhaps {near[-1]} is meant" if near else ""
    raise ValueError(f"there is no complete checkpoint in {path}{meant}.")


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Trained:
    """A denoiser, its AdamW with the paper's betas, warm-up, clipping, and averages."""

    def __init__(
        self,
        denoiser: ScoreEstimator,
        *,
        learning_rate: float,
        weight_decay: float,
        warmup: int,
        max_gradient_norm: float,
    ) -> None:
        self.denoiser = denoiser
        self.max_gradient_norm = max_gradient_norm
        self.optimizer = torch.optim.AdamW(
            denoiser.parameters(),
            learning_rate,
            betas=(0.9, 0.999),  # paper, sections F.2 to F.4
            weight_decay=weight_decay,
            fused=True,  # else there are temporaries as large as the weights
        )
        self.schedule: LRScheduler = linear_warmup(self.optimizer, warmup)
        self.ema: ExponentialMovingAverage | None = None

    def average(self, decay: float) -> None:
        """Keeps an average of the weights as well, from now on."""
        self.ema = ExponentialMovingAverage(plain(self.denoiser.network), (decay,))

    def clip(self) -> Tensor:
        """Clips the gradient, and gives its norm before."""
        norm = torch.nn.utils.clip_grad_norm_(
            self.denoiser.parameters(), self.max_gradient_norm
        )
        return whole_norm(norm)

    def step(self, broken: Tensor | None = None) -> None:
        """Takes the optimizer's step and what follows it, and frees the gradient.

        The fused AdamW itself leaves weights and moments as they are where `broken`, a
        number on its device, is 1: nothing is read.
        """
        optimizer: Any = self.optimizer
        optimizer.found_inf = broken
        optimizer.step()
        self.schedule.step()
        if self.ema is not None:
            self.ema.update(plain(self.denoiser.network))
        self.optimizer.zero_grad()


def require_finite_norm(norm: Tensor, name: str) -> None:
    """Stops a run before a step if the norm of a gradient is not finite."""
    if not bool(norm.isfinite()):
        raise NonFiniteError(
            f"the gradient of the {name} is not finite; no step was taken."
        )


class Flagged(NamedTuple):
    """What is kept of a loss until the next look: flags of its samples, and times."""

    finite: Tensor
    t: Tensor | None
    finite_real: Tensor | None
    t_real: Tensor | None


_OPTIONAL = Flagged._fields[1:]


class Soundness:
    """Whether everything has been finite, known to the device and read now and then.

    From the first loss or gradient that was not, optimizers take no step, on any
    process. `check` reads that, names the first, and stops the run.
    """

    def __init__(self) -> None:
        self.broken: Tensor | None = None
        """1 if something was not finite, else 0; where gradients' norms are."""
        self._seen: list[tuple[int, dict[str, Flagged], dict[str, Tensor]]] = []
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begins an iteration."""
        self._seen.append((step, {}, {}))

    def losses(self, losses: Mapping[str, Any]) -> None:
        """Keeps the flags of a micro-batch's losses; their gradients tell of them."""
        step, flagged, _ = self._seen[-1]
        if flagged.keys() & losses.keys():  # a further micro-batch
            self.begin(step)
        self._seen[-1][1].update(
            {
                name: Flagged(out.finite, *(getattr(out, k, None) for k in _OPTIONAL))
                for name, out in losses.items()
            }
        )

    def gradient(self, name: str, norm: Tensor) -> Tensor:
        """Looks at a gradient's norm; gives `broken`."""
        bad = (~norm.detach().isfinite()).float()
        self.broken = bad if self.broken is None else torch.maximum(self.broken, bad)
        self._seen[-1][2][name] = norm.detach()
        return self.broken

    def check(self) -> None:
        """Stops the run if anything was not finite since the last look."""
        seen, self._seen = self._seen, self._seen[-1:]
        if self.broken is None or not bool(self.broken):
            return
        for step, losses, norms in seen:
            names = [name for name, norm in norms.items() if not bool(norm.isfinite())]
            line = explain_nonfinite(**losses) or "; ".join(
                f"the gradient of the {name} is not finite" for name in names
            )
            if line:
                raise NonFiniteError(
                    f"iteration {step + 1}: {line}; no step was taken from there on. "
                    "Look at the inputs at these times, and at the learning rates; "
                    "checkpoints hold nothing of it."
                )


def checkpoint_parts(
    trained: Mapping[str, Trained], states: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a checkpoint holds, as `save_checkpoint` takes it."""
    averages = {
        f"{name}_ema": part.ema
        for name, part in trained.items()
        if part.ema is not None
    }
    schedules = {f"{name}_schedule": part.schedule for name, part in trained.items()}
    return {
        "modules": {name: part.denoiser.network for name, part in trained.items()},
        "optimizers": {name: part.optimizer for name, part in trained.items()},
        "states": {**schedules, **averages, **states},
    }


FREE = ("micro_batch_size",)
"""Settings with which a run may go on otherwise than it was started: they change its
numbers by rounding and by other noise, not what is trained."""


class RunFolder:
    """The folder of a run: what it was started with, and its checkpoints."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out, self.identity = out, json.loads(json.dumps(identity, default=str))
        self.checkpoints = out / "checkpoints"
        self.background: BackgroundCheckpoints | None = None
        """Writes the checkpoints while training goes on, if set."""
        self._saved: Path | None = None

    def resumes(self, resume: bool) -> bool:
        """Whether a run is to be taken up; refuses what cannot be."""
        file, found = self.out / "settings.json", checkpoints(self.checkpoints)
        # torchrun --max-restarts starts the same command again after a failure.
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if not resume and not (restarted and found):
            if found:
                raise SystemExit(
                    f"--out: {self.out} holds a run with checkpoints; continue it with "
                    "--resume, or name another folder."
                )
            return False
        if not found:
            raise SystemExit(f"--resume: there is no checkpoint in {self.checkpoints}.")
        if not file.is_file():
            raise SystemExit(f"--resume: {file}, the settings of the run, is missing.")
        differing = self._differing()
        changed = [text for name, text in differing.items() if name not in FREE]
        if changed:
            raise SystemExit(
                f"--resume: the run in {self.out} was started with "
                f"{'; with '.join(changed)}; use the same."
            )
        return True

    def _differing(self) -> dict[str, str]:
        """The settings that are not those the run was started with, in words."""
        started = json.loads((self.out / "settings.json").read_text())
        return {
            name: f"{name} = {started.get(name)}, now it is {value}"
            for name, value in self.identity.items()
            if started.get(name) != value
        }

    def start(self, resume: bool, parts: Mapping[str, Any]) -> int:
        """Begins a run or takes up the newest checkpoint; gives the step to go on."""
        if not self.resumes(resume):
            on_first(self._begin)
            everywhere(lambda: require_visible([self.out / "settings.json"]))
            return 0
        try:
            resumed = load_newest_checkpoint(self.checkpoints, **parts)
        except ValueError as error:
            raise SystemExit(f"--resume: {error}") from error
        assert resumed is not None
        if rank_and_ranks()[0] == 0:
            print(f"Resumed from {resumed.path}.")
            for text in self._differing().values():  # what `resumes` lets pass
                print(f"The run was started with {text}: it goes on with other noise.")
        return resumed.step

    def _begin(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "settings.json"
        file.write_text(json.dumps(self.identity, indent=2) + "\n")

    def save(self, step: int, parts: Mapping[str, Any], keep: int) -> None:
        """Writes a checkpoint, or has it written, and removes all but the newest."""
        given = {"directory": self.checkpoints, "step": step, "keep": keep, **parts}
        if self.background is None:
            self._saved = save_checkpoint(**given)
        else:
            self.background.save(**given)

    def saved(self) -> Path:
        """The checkpoint that was saved last, once it is written."""
        if self.background is not None:
            self._saved = self.background.wait() or self._saved
        assert self._saved is not None
        return self._saved

    def keep_best(self, checkpoint: Path, about: Mapping[str, Any]) -> None:
        """Keeps a checkpoint as `best/`, whatever becomes of the original (rank 0)."""
        keep_checkpoint(checkpoint, self.out / "best", about)


class StopSignals:
    """SIGTERM and SIGUSR1, which schedulers send before a kill, and Ctrl-C.

    Within it they do not end the process: the loop asks, and stops where it can go on.
    A second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        print(f"{self.name}: saving after this iteration ...", flush=True)

    def asked(self) -> bool:
        """Whether any rank was told to stop; the same answer on all."""
        return on_any(self.name is not None)


class Log:
    """Metrics by step: to `log.jsonl`, TensorBoard and, if asked, Weights & Biases."""

    def __init__(
        self, out: Path, start: int, wandb: str | None, settings: Mapping[str, Any]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = out / "log.jsonl"
        # What came after the checkpoint is written again by the resumed run.
        self.file.write_text(
            "".join(
                line + "\n"
                for line in self._lines(self.file)
                if start and _step(line) <= start
            )
        )
        self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self.wandb = None
        if wandb is not None:
            import wandb as client  # pyright: ignore[reportMissingImports]

            name = out / "wandb_id.txt"  # so that a resumed run goes on there too
            if not name.is_file():
                name.write_text(uuid.uuid4().hex)
            self.wandb = client.init(
                project=wandb,
                id=name.read_text(),
                dir=out,
                config=dict(settings),
                resume="allow",
            )

    @staticmethod
    def _lines(file: Path) -> list[str]:
        return file.read_text().splitlines() if file.is_file() else []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of numbers."""
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, grid: Tensor) -> None:
        """Shows a picture, uint8 [3, h, w], to the trackers."""
        self.tensorboard.add_image(name, grid, step)
        if self.wandb is not None:
            import wandb as client  # pyright: ignore[reportMissingImports]

            self.wandb.log({name: client.Image(grid.permute(1, 2, 0).numpy())}, step)

    def close(self) -> None:
        """Writes what is still on its way."""
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _step(line: str) -> int:
    return int(json.loads(line)["step"])


def to_floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Reads scalars from the device in one transfer, as means over the ranks."""
    values = torch.stack([value.detach().float() for value in scalars.values()])
    values = averages(values)
    return dict(zip(scalars, values.tolist(), strict=True))


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded to the nearest of 256 levels."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid_of(pixels: Tensor, columns: int) -> Tensor:
    """Lays pictures, uint8 [b, c, h, w], out in rows: uint8 [3, h', w']."""
    from torchvision.utils import make_grid

    return make_grid(pixels.cpu(), nrow=columns, padding=2)


def save_png(picture: Tensor, path: Path) -> None:
    """Writes a picture, uint8 [c, h, w]."""
    from torchvision.transforms.functional import to_pil_image

    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(picture).save(path)


class Best:
    """The smallest value so far of one number of the evaluations.

    A resumed run takes it from the `best/` folder, which outlives any checkpoint.
    """

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name, self.value = name, math.inf
        file = None if folder is None else folder / "best.json"
        if file is not None and file.is_file():
            self.value = float(json.loads(file.read_text()).get(name, math.inf))

    def unknown_to(self, found: dict[str, float]) -> str | None:
        """What is wrong if an evaluation gave numbers, but not this one."""
        if not found or self.name in found:
            return None
        return f"--best {self.name}: the evaluation gave {', '.join(found)}; name one."

    def improved(self, found: dict[str, float]) -> bool:
        """Takes a new evaluation; whether it is the best."""
        better = found.get(self.name, math.inf) < self.value
        if better:
            self.value = found[self.name]
        return better


class Durations:
    """Seconds of the last thousand iterations of each kind, here or on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, deque[float]] = {}
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Times what is within it."""
        if self._on_gpu:
            # The host runs ahead of the GPU, so its clock would not do.
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((kind, begin, end))
            return
        began = time.perf_counter()
        yield
        self._add(kind, time.perf_counter() - began)

    def _add(self, kind: str, seconds: float) -> None:
        self.seconds.setdefault(kind, deque(maxlen=1000)).append(seconds)

    def medians(self) -> dict[str, float]:
        """The median of each kind; waits for the GPU."""
        events, self._events = self._events, []
        for kind, begin, end in events:
            end.synchronize()
            self._add(kind, begin.elapsed_time(end) / 1000)
        return {k: statistics.median(v) for k, v in self.seconds.items()}


def check_evaluation(command: str) -> None:
    """Refuses a command that cannot be run, before anything is trained."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SystemExit(f"--evaluate: {error}: {command}") from error
    if "{student}" not in command:
        raise SystemExit(
            "--evaluate: it does not say {student}, the folder of the student."
        )
    if shutil.which(words[0]) is None:
        raise SystemExit(f"--evaluate: there is no program {words[0]}.")


def environment_alone() -> dict[str, str]:
    """The environment of a process that is none of torchrun's."""
    set_by_torchrun = re.compile(
        r"TORCHELASTIC_.*|MASTER_(ADDR|PORT)|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)"
        r"|GROUP_WORLD_SIZE|ROLE_(NAME|WORLD_SIZE)"
    )
    return {k: v for k, v in os.environ.items() if not set_by_torchrun.fullmatch(k)}


def run_evaluation(command: str, student: Path, step: int) -> dict[str, float]:
    """Runs a command on an exported student; its last line is a JSON object of numbers.

    `{student}` and `{step}` are filled in. A failure is printed and does not stop the
    run: training is worth more.
    """
    values = {"{student}": str(student), "{step}": str(step)}
    words = shlex.split(command)
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env=environment_alone()
        )
        if done.returncode:
            raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        print(f"The evaluation at step {step} gave no numbers: {error}", flush=True)
        return {}
