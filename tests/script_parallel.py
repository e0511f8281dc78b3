"""What every rank does in `test_parallel_recipes.py`, started by torchrun.

    python -m torch.distributed.run --nproc-per-node 2 tests/script_parallel.py \
        FOLDER CHECK ...

It runs a recipe on all ranks and, on each, the same recipe alone on the whole batch,
and leaves a file a check that says how it went.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import distillation  # noqa: E402
import sdxl  # noqa: E402
from parallel import plain, processes  # noqa: E402
from runs import parse  # noqa: E402
from text_to_image import Batch, TextDistillation  # noqa: E402
from torch import Tensor  # noqa: E402

from dmdkit import Monitor, linear_warmup  # noqa: E402

ITERATIONS = 3  # student's turn, critic's alone, student's turn
TERMS = ("dm_loss", "critic_loss", "gan_loss")


def settings(folder: Path, *options: str) -> Any:
    given = ["--pretrained", f"{folder / 'sdxl'}", "--prompts", f"{folder / 'p.txt'}"]
    given += ["--latents", f"{folder / 'latents'}", "--workers", "0", "--device", "cpu"]
    given += ["--batch-size", "8", "--micro-batch-size", "2", "--critic-steps", "2"]
    given += ["--lora-rank", "4", "--times", "999", "499", *options]
    return parse(sdxl.Settings, sdxl.PRESETS, given)


def sines(x: Tensor, generator: object = None) -> Tensor:
    """Noise that depends on the sample alone, so that a split batch has the same."""
    del generator
    return 1.4 * torch.sin(3 * x.detach())


def steady(batch: int, **_: Any) -> Tensor:
    return torch.full((batch,), 500.0)


def rows_of(batch: Batch, rows: slice) -> Batch:
    def part(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, tuple):
            return type(value)(*(part(v) for v in value))
        return value[rows]

    return Batch(*(part(value) for value in batch))


class Fixed:
    """A recipe without chance, and with plain SGD: its weights can be compared."""

    def __init__(self, chosen: Any, whole: list[Batch], rank: int, ranks: int) -> None:
        self.run = TextDistillation(chosen, {}, rank, ranks)
        run, self.whole = self.run, whole
        torch.manual_seed(4)
        trained: dict[str, Any] = run.trained
        for part in trained.values():
            part.optimizer = torch.optim.SGD(part.denoiser.parameters(), 0.02)
            part.schedule = linear_warmup(part.optimizer, 0)
            part.max_gradient_norm = 1.0  # so that clipping takes part
        for name in TERMS:
            object.__setattr__(getattr(run.method, name), "times", steady)
        object.__setattr__(run.method.simulator, "draw_rung", lambda _: 1)

    def iterate(self) -> Iterator[dict[str, Tensor]]:
        """Yields all weights, at first and after each iteration."""
        run = self.run
        yield self.weights()
        for step in range(ITERATIONS):
            parts = iter(range(run.parts))

            def draw(parts: Any = parts, whole: Batch = self.whole[step]) -> Batch:
                start = (next(parts) * run.ranks + run.rank) * run.size
                return rows_of(whole, slice(start, start + run.size))

            run.draw = draw
            run.iterate(step, Monitor())
            yield self.weights()

    def weights(self) -> dict[str, Tensor]:
        """Those of student and critic, as if nothing were sharded."""
        return {
            f"{name}.{key}": full(p)
            for name, part in self.run.trained.items()
            for key, p in plain(part.denoiser.network).named_parameters()
        }


def full(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().clone()


def check(folder: Path, rank: int, ranks: int, *options: str) -> None:
    chosen = settings(folder, *options)
    low = chosen.precision == "bf16"
    alone = TextDistillation(chosen, {})
    whole = []
    for _ in range(ITERATIONS):
        parts = [alone.draw() for _ in range(alone.parts)]
        whole.append(Batch(*(joined(values) for values in zip(*parts, strict=True))))
    expected = Fixed(chosen, whole, 0, 1).iterate()
    found = Fixed(chosen, whole, rank, ranks).iterate()
    first: dict[str, Tensor] = {}
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        if step == 0:
            first = theirs
            assert all(torch.equal(v, theirs[key]) for key, v in ours.items())
            continue
        for name in ("student", "critic"):
            keys = [key for key in theirs if key.startswith(name)]
            a, b, start = (
                torch.cat([values[key].flatten() for key in keys])
                for values in (ours, theirs, first)
            )
            # Of what the weights have moved, not of the weights themselves.
            difference = ((a - b).norm() / (b - start).norm()).item()
            print(f"{options} {name} {step}: {difference:.1e}", flush=True)
            tolerance = 1e-2 if low else 1e-4
            assert difference < tolerance, f"{name}, iteration {step}: {difference:.2e}"
        if low:
            return  # rounding to 8 bits makes two runs of any kind part soon


def joined(values: Any) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], tuple):
        return type(values[0])(*map(joined, zip(*values, strict=True)))
    return torch.cat(values)


FP32 = ("--precision", "fp32")
CHECKS = {
    "ddp": (*FP32, "--strategy", "ddp"),
    "ddp lora": (*FP32, "--strategy", "ddp", "--lora", "both"),
    "fsdp": (*FP32, "--strategy", "fsdp"),
    "fsdp lora": (*FP32, "--strategy", "fsdp", "--lora", "both"),
    "fsdp bf16": ("--strategy", "fsdp", "--precision", "bf16"),
    "hsdp": (*FP32, "--strategy", "hsdp"),
    "control": (*FP32, "--strategy", "ddp"),
}


@contextmanager
def nothing_averaged() -> Iterator[None]:
    """The control: every process keeps its own gradients."""
    kept = distillation.gradients_stay
    recipe: Any = TextDistillation
    learn = recipe.learn

    def alone(self: TextDistillation, *args: Any) -> Any:
        with kept([part.denoiser.network for part in self.trained.values()]):
            return learn(self, *args)

    recipe.learn = alone
    try:
        yield
    finally:
        recipe.learn = learn


def main() -> None:
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for module in ("losses.common", "sampling.common"):
        sys.modules[f"dmdkit.{module}"].__dict__["noise_like"] = sines
    with processes("cpu") as (rank, ranks, _):
        for name in names:
            report = ""
            try:
                with nothing_averaged() if name == "control" else nullcontext():
                    check(Path(folder), rank, ranks, *CHECKS[name])
            except Exception:
                report = traceback.format_exc()
            Path(folder, f"{name} {rank}.txt").write_text(report)


if __name__ == "__main__":
    main()
