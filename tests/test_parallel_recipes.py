"""The recipes on several processes: what one process computes, bit by bit or nearly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers_pipelines import save_latents, save_prompts, save_sd15, save_sdxl
from helpers_recipes import save_adm_teacher, save_digit_images
from safetensors.torch import load_file
from torch import Tensor

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def torchrun(*command: str | Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(ranks), *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        # Else a process that torchrun started again may read addresses of before.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        timeout=600,
    )


def reports(folder: Path, *names: str, ranks: int = 2) -> dict[str, str]:
    """What went wrong in checks of `script_parallel.py`, by name."""
    for recipe, save in (("sdxl", save_sdxl), ("sd15", save_sd15)):
        save_latents(folder / f"latents {recipe}", save(folder / recipe))
    save_prompts(folder / "p.txt")
    save_adm_teacher(folder / "adm")
    save_digit_images(folder / "images", side=16, channels=3)
    done = torchrun(TESTS / "script_parallel.py", folder, *names, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: "".join(
            (folder / f"{name} {rank}.txt").read_text() for rank in range(ranks)
        )
        for name in names
    }


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Both optimizers' steps over a cycle, with accumulation and checkpointing on."""
    found = reports(tmp_path, "ddp lora", "fsdp", "control", "imagenet fsdp")
    assert found.pop("control").count("AssertionError") == 2, "nothing was compared"
    assert found == {"ddp lora": "", "fsdp": "", "imagenet fsdp": ""}


def test_four_processes_are_one(tmp_path: Path) -> None:
    names = ("ddp", "fsdp lora")
    assert reports(tmp_path, *names, ranks=4) == dict.fromkeys(names, "")


@pytest.mark.slow
def test_two_processes_are_one_with_every_strategy_and_recipe(tmp_path: Path) -> None:
    names = ("ddp", "fsdp lora", "fsdp bf16", "fsdp offload", "hsdp")
    names += ("sd15 ddp", "sd15 fsdp", "imagenet ddp")
    names += ("fsdp shared", "ddp lora shared", "fsdp compiled", "ddp compiled")
    assert reports(tmp_path, *names) == dict.fromkeys(names, "")


def options(folder: Path) -> list[str | Path]:
    given: list[str | Path] = ["--pretrained", folder / "sdxl", "--workers", "0"]
    given += ["--prompts", folder / "p.txt", "--latents", folder / "latents"]
    given += ["--device", "cpu", "--precision", "fp32", "--batch-size", "4"]
    return [*given, "--learning-rate", "1e-3", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("text")
    save_latents(top / "latents", save_sdxl(top / "sdxl"))
    save_prompts(top / "p.txt")
    return top


def train(*given: str | Path, ranks: int = 2, restarts: int = 0) -> str:
    launcher = ["--max-restarts", str(restarts)] if restarts else []
    done = torchrun(*launcher, *given, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def student(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(
    folder: Path, tmp_path: Path
) -> None:
    command = [EXAMPLES / "sdxl.py", *options(folder), "--ema", "0.9"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(*command, "--iterations", "7", "--out", whole)
    saving = ["--background-saving", "--iterations", "4"]
    train(*command, *saving, "--out", parted)
    train(*command, "--iterations", "7", "--out", parted, "--resume")
    one, other = student(whole), student(parted)
    assert all(torch.equal(v, other[key]) for key, v in one.items())


PATIENCE = """
import sys, time
from datetime import timedelta
sys.path.insert(0, {examples!r})
import parallel
from dmdkit.training.ranks import on_first
parallel.TIMEOUT = timedelta(seconds=5)
with parallel.processes("cpu"):
    group = parallel.patient_group() if sys.argv[1] == "patient" else None
    on_first(lambda: time.sleep(12), group)
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", ["patient", "default"])
def test_what_takes_longer_than_the_timeout_is_waited_for(
    tmp_path: Path, group: str
) -> None:
    script = tmp_path / "wait.py"
    script.write_text(PATIENCE.format(examples=str(EXAMPLES)))
    done = torchrun(script, group)
    assert (done.returncode == 0) == (group == "patient"), done.stderr[-3000:]


@pytest.mark.slow
def test_all_processes_wait_for_an_evaluation(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text("import time; time.sleep(2); print('{\"score\": 1.5}')")
    evaluate = [
        "--best",
        "score",
        "--evaluate",
        f"{sys.executable} {script} {{student}}",
    ]
    command = [EXAMPLES / "sdxl.py", *options(folder), *evaluate]
    train(*command, "--iterations", "3", "--out", tmp_path / "run")
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best == {"step": 2, "score": 1.5}


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_strategy_and_number_of_processes(
    folder: Path, tmp_path: Path, first: str
) -> None:
    """Without a step in between, weights, moments and averages are those saved."""
    command = [EXAMPLES / "sdxl.py", *options(folder), "--ema", "0.9"]
    out = tmp_path / "run"
    saving = ["--strategy", first, "--background-saving", "--iterations", "2"]
    train(*command, *saving, "--out", out)
    expected = student(out)
    for strategy, ranks in (("fsdp", 2), ("fsdp", 4), ("hsdp", 2), ("ddp", 1)):
        more = ["--iterations", "2", "--resume", "--strategy", strategy]
        train(*command, *more, "--out", out, ranks=ranks)
        found = student(out)
        assert all(torch.equal(v, found[key]) for key, v in expected.items())
    train(*command, "--iterations", "4", "--out", out, "--resume", ranks=4)
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.slow
def test_a_dead_process_ends_all_and_torchrun_starts_them_again(
    folder: Path, tmp_path: Path
) -> None:
    out, marker = tmp_path / "run", tmp_path / "died"
    command = [TESTS / "script_dying.py", marker, *options(folder)]
    said = train(*command, "--iterations", "6", "--out", out, restarts=1)
    assert marker.is_file()
    assert "Resumed from" in said
    whole = tmp_path / "whole"
    train(EXAMPLES / "sdxl.py", *options(folder), "--iterations", "6", "--out", whole)
    one, other = student(whole), student(out)
    assert all(torch.equal(v, other[key]) for key, v in one.items())
