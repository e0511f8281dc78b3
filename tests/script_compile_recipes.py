"""Compiles a recipe's networks, and counts graphs, breaks and recompilations.

    python tests/script_compile_recipes.py imagenet

A process of its own, because the tests' import hook wraps functions in what Dynamo
cannot trace. Graphs are run as PyTorch runs them. The last line is JSON.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import torch  # noqa: E402
from helpers_recipes import save_digits_teacher  # noqa: E402
from helpers_speed import build  # noqa: E402
from torch._dynamo.testing import CompileCounter  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

CYCLE = 5


def compiled(counter: Any) -> None:
    """Has modules compiled by a backend that counts what it is given."""
    own: Any = torch.nn.Module.compile

    def counted(self: Any, **options: Any) -> None:
        own(self, backend=counter, **options)

    torch.nn.Module.compile = counted


def report(recipe: str, *options: str) -> dict[str, Any]:
    """The graphs of a compiled run after each of two cycles, and how far it is off.

    Compared is the first iteration: later ones start from weights of their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_digits_teacher(Path(folder) / "teacher")
        counter: Any = CompileCounter()
        compiled(counter)
        run = build(recipe, teacher, "--compile", *options)
        eager = build(recipe, teacher, *options)
    graphs: list[int] = []
    found, expected = run.iterate(0), eager.iterate(0)
    difference = max(
        (found[name] / expected[name] - 1).abs().item()
        for name in ("gan/loss", "critic/loss", "discriminator/loss")
    )
    for step in range(1, 2 * CYCLE):
        run.iterate(step)
        if step % CYCLE == CYCLE - 1:
            graphs.append(counter.frame_count)
            run.samples()
    run.soundness.check()
    return {
        "graphs": graphs,
        "breaks": dict(counters["graph_break"]),
        "recompile_limit": dict(counters["recompile_limit"]),
        "difference": difference,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(report(*sys.argv[1:])))
