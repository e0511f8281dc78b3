"""Kills a run at random moments, saves included, and looks what it lost.

    python tests/faults/kill.py --runs 50
    python tests/faults/kill.py --runs 10 --break rename

Each run is the ImageNet recipe on handwritten digits, which saves after every
iteration. It is killed with SIGKILL, one time in three the newest checkpoint is cut
short as by a power failure, and it is started again with --resume. It is lost if it
does not go on, if its last weights are not those of the uninterrupted run, or if a
folder of a checkpoint is ever half there.

`--break` takes one safeguard away and shows what it is good for: `rename` overwrites
the only checkpoint in place, `manifest` loads without a look at checksums, `rng`
forgets the state of the noise. The last line is JSON: runs, resumed, lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import imagenet_edm  # noqa: E402
import torch  # noqa: E402
from helpers_recipes import save_digit_images, save_digits_teacher  # noqa: E402
from runs import parse  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dmdkit import GeneratorState, checkpoints  # noqa: E402
from dmdkit.training import checkpoint, checkpoint_files  # noqa: E402

ITERATIONS = 8


def without_rename() -> None:
    """There is one checkpoint, which is overwritten."""
    begin: Any = checkpoint_files._begin

    def overwrite(partial: Path) -> None:
        for old in checkpoints(partial.parent):
            shutil.rmtree(old)
        begin(partial)

    checkpoint_files._begin = overwrite


def without_manifest() -> None:
    """Whatever lies there is loaded."""
    changed: Any = checkpoint
    changed.verify_checkpoint = lambda path: None


def without_rng() -> None:
    """Noise begins anew."""
    changed: Any = GeneratorState
    changed.load_state_dict = lambda self, state: None


BREAKS: dict[str, Callable[[], None]] = {
    "rename": without_rename,
    "manifest": without_manifest,
    "rng": without_rng,
}


def start(top: Path, out: Path, *options: str, broken: str | None = None) -> int:
    """Starts a run in a process of its own; gives its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        if broken is not None:
            BREAKS[broken]()
        given = ["--teacher", f"{top / 'teacher'}", "--images", f"{top / 'images'}"]
        given += ["--batch-size", "2", "--learning-rate", "1e-3", "--ema", "0.9"]
        given += ["--workers", "0", "--device", "cpu", "--precision", "fp32"]
        given += ["--iterations", f"{ITERATIONS}", "--checkpoint-every", "1"]
        given += ["--log-every", "1", "--out", f"{out}", *options]
        imagenet_edm.main(parse(imagenet_edm.Settings, imagenet_edm.PRESETS, given))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finished(child: int) -> bool:
    """Waits for a process; whether it ended well."""
    return os.waitpid(child, 0)[1] == 0


def student(out: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run."""
    return load_file(out / "student" / "diffusion_pytorch_model.safetensors")


def half_there(out: Path) -> bool:
    """Whether a checkpoint's name stands on something that is not whole."""
    return any(
        not (path / checkpoint_files.MANIFEST).is_file()
        for path in (out / "checkpoints").glob("step-*")
    )


def cut_short(path: Path) -> None:
    """Does to a checkpoint what a power failure may do."""
    file = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def survives(
    top: Path, out: Path, expected: Any, seconds: float, broken: str | None
) -> bool:
    """Kills a run once and starts it again; whether it lost nothing."""
    child = start(top, out, broken=broken)
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if half_there(out):
        return False
    found = checkpoints(out / "checkpoints")
    begun = bool(found) or any((out / "checkpoints").glob(".step-*"))
    if len(found) > 1 and random.random() < 1 / 3:
        cut_short(found[-1])
    if not found and begun and broken == "rename":
        return False  # there was one, and it is gone
    options = ["--resume"] if found else []
    if not finished(start(top, out, *options, broken=broken)):
        return False
    weights = student(out)
    return all(torch.equal(value, weights[name]) for name, value in expected.items())


def main() -> None:
    """Kills as often as asked, and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--break", dest="broken", choices=BREAKS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        save_digits_teacher(top / "teacher")
        save_digit_images(top / "images", side=8, channels=1)
        began = time.perf_counter()
        if not finished(start(top, top / "whole")):
            raise SystemExit((top / "whole.log").read_text())
        seconds = time.perf_counter() - began
        expected, resumed = student(top / "whole"), 0
        bar = tqdm(range(given.runs), desc="killed", unit="run")
        for i in bar:
            out = top / f"run{i}"
            if survives(top, out, expected, seconds, given.broken):
                resumed += 1
            else:
                last = out.with_suffix(".log").read_text().strip().splitlines()[-1:]
                bar.write(f"run {i} was lost: {''.join(last)[:200]}")
            shutil.rmtree(out, ignore_errors=True)
    lost = given.runs - resumed
    print(f"{given.runs} runs were killed, {resumed} went on unharmed, {lost} did not.")
    print(json.dumps({"runs": given.runs, "resumed": resumed, "lost": lost}))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This process .* is multi-threaded")
    main()
