"""Holds what plan.py says of memory against what the system measures.

    python tests/benchmarks/planned_memory.py [imagenet] [imagenet-fsdp] [sdxl-lora]

Each case is planned and then run, at the networks' full size on the CPU. Measured is
the resident peak of rank 0 until the end of training, its checkpoint included, less
what it was after the imports; the export gathers the student on the CPU. glibc is told
to give freed blocks of 256 KiB and more back at once: by default it comes to keep
blocks of up to 32 MiB in its heap, whose holes then count as resident. `sdxl-lora`
takes a quarter of an hour of a core and 14 GiB, the others a few minutes and as much.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGENET = ["imagenet_edm", "--batch-size", "2", "--micro-batch-size", "2"]
LORA = ["sdxl", "--preset", "four-step-lora", "--batch-size", "1"]
CASES: dict[str, tuple[int, list[str]]] = {
    "imagenet": (1, IMAGENET),
    "imagenet-fsdp": (2, [*IMAGENET, "--strategy", "fsdp"]),
    "sdxl-lora": (1, LORA),
}
ITERATIONS = 2
"""Both learn in each: in the second all moments are there."""


def run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def planned(ranks: int, options: list[str], folder: Path) -> float:
    file = folder / "plan.json"
    plan = [f"{EXAMPLES / 'plan.py'}", *options, "--ranks", f"{ranks}"]
    plan += ["--device", "cpu"]
    run(sys.executable, *plan, "--json", f"{file}")
    return json.loads(file.read_text())["peak_gib_per_rank"]


def measured(ranks: int, options: list[str], folder: Path) -> float:
    recipe, *rest = options
    out = folder / "run"
    rest += ["--random-init", "--device", "cpu", "--workers", "0", "--threads", "1"]
    rest += ["--iterations", f"{ITERATIONS}", "--out", f"{out}"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    start = [*launch, f"{ranks}"] if ranks > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": f"{2**18}"}
    run(sys.executable, *start, f"{EXAMPLES / f'{recipe}.py'}", *rest, env=env)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    after = summary["peak_memory_gib_after"]
    return after["training"] - after["imports"]


def compare(case: str) -> dict[str, Any]:
    """Plans and measures a case."""
    ranks, options = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [*options, "--critic-steps", "1"]
        plan = planned(ranks, options, folder)
        real = measured(ranks, options, folder)
    return {
        "case": case,
        "planned_gib": round(plan, 2),
        "measured_gib": round(real, 2),
        "measured_to_planned": round(real / plan, 3),
    }


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CASES:
        print(json.dumps(compare(chosen)), flush=True)
