"""What only a GPU can show; skipped where there is none.

Its numbers are those of the CPU, in fp32 and in bf16, alone and wrapped for several.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import parallel
import pytest
import torch
from distillation import Distillation
from helpers_recipes import save_digit_images, save_digits_teacher
from helpers_speed import build
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dmdkit import (
    ExponentialMovingAverage,
    GeneratorState,
)
from dmdkit.adapters.conditions import EmptyPrompt
from dmdkit.metrics import FeatureStatistics, frechet_distance
from dmdkit.training.ranks import GlobalRandomState

ROOT = Path(__file__).parents[1]
GPU = "cuda"
ROUNDING = 1e-4
"""A relative change of all weights by 1e-7 moves the gradients of these small networks
by 1e-5."""
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
recipes = pytest.mark.parametrize("recipe", ["imagenet", "sd15", "sdxl"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_teacher(tmp_path_factory.mktemp("gpu") / "teacher")


@pytest.fixture
def exact() -> Iterator[None]:
    """Products and convolutions in fp32, not in TF32."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def moved(value: Any, device: str) -> Any:
    """A batch on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(*(moved(v, device) for v in value))
    return value


def gradients(run: Distillation) -> dict[str, Tensor]:
    found = {}
    for name, part in run.trained.items():
        for i, p in enumerate(part.denoiser.parameters()):
            if p.grad is not None:
                grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                found[f"{name} {i}"] = grad.cpu()
    return found


def learned(run: Distillation, batch: Any) -> dict[str, Any]:
    """The losses of an iteration on a batch, and all gradients."""
    run.parts = 2  # so that no step follows the student's backward
    with patch.object(run, "draw", lambda: batch):
        metrics = run.learn(True, 0, 1.0)
    run.parts = 1
    return {"metrics": metrics, "gradients": gradients(run)}


def without_chance(run: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times and noise of losses depend on the sample alone."""

    def noise(x: Tensor, generator: object) -> Tensor:
        del generator
        return 1.4 * torch.sin(3 * x.detach())

    def times(batch: int, **_: Any) -> Tensor:
        return torch.full((batch,), time, device=run.device)

    time = 500.0 if max(run.method.simulator.times) > 80 else 2.0
    monkeypatch.setattr("dmdkit.losses.common.noise_like", noise)
    for name in ("dm_loss", "critic_loss", "gan_loss"):
        object.__setattr__(getattr(run.method, name), "times", times)


def agree(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """Losses, and every module's gradient as one vector."""
    for name, value in one["metrics"].items():
        if name.endswith("/loss"):
            expected = other["metrics"][name].cpu()
            torch.testing.assert_close(value.cpu(), expected, rtol=tolerance, atol=1e-6)
    for part in ("student", "critic"):
        a, b = (vector_of(x["gradients"], part) for x in (one, other))
        assert (a - b).norm() < tolerance * b.norm(), part


def vector_of(gradients: dict[str, Tensor], part: str) -> Tensor:
    return torch.cat([g.flatten() for k, g in gradients.items() if part in k])


def networks(run: Distillation) -> list[Any]:
    """Teacher, student and critic, as what is spread over processes."""
    return [getattr(denoiser, "denoiser", denoiser) for denoiser in run.networks]


def take_weights(run: Distillation, other: Distillation) -> None:
    """Gives a run the weights of another, and its empty prompt, which is random too."""
    for own, given in zip(networks(run), networks(other), strict=True):
        own.network.load_state_dict(given.network.state_dict())
    empty = getattr(other.networks.teacher, "unconditional", None)
    if isinstance(empty, EmptyPrompt):
        same = EmptyPrompt(empty.text.to(run.device))
        object.__setattr__(run.networks.teacher, "unconditional", same)


def distinct(run: Distillation) -> Distillation:
    """Moves the critic's weights a little, so that it and the teacher differ."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in run.trained["critic"].denoiser.parameters():
            p.add_(0.02 * torch.randn(p.shape).to(p.device))
    return run


@recipes
def test_losses_and_gradients_are_those_of_the_cpu(
    recipe: str, teacher: Path, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del exact
    on_cpu = distinct(build(recipe, teacher, "--device", "cpu"))
    on_gpu = build(recipe, teacher, "--device", GPU)
    take_weights(on_gpu, on_cpu)
    for run in (on_cpu, on_gpu):
        without_chance(run, monkeypatch)
    batch = on_cpu.draw()
    expected = learned(on_cpu, batch)
    agree(learned(on_gpu, moved(batch, GPU)), expected, ROUNDING)


@recipes
def test_bf16_is_near_fp32(
    recipe: str, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = distinct(build(recipe, teacher, "--device", GPU))
    short = build(recipe, teacher, "--device", GPU, "--precision", "bf16")
    take_weights(short, exact)
    for run in (exact, short):
        without_chance(run, monkeypatch)
    batch = exact.draw()
    found = learned(short, batch)
    trained = short.trained["critic"].denoiser.parameters()
    assert {p.dtype for p in trained} == {torch.float32}
    expected = learned(exact, batch)
    for name in ("critic/loss", "discriminator/loss", "gan/loss"):
        wanted = expected["metrics"][name]
        torch.testing.assert_close(found["metrics"][name], wanted, rtol=0.05, atol=0)
    for part in ("student", "critic"):
        a, b = (vector_of(x["gradients"], part) for x in (found, expected))
        assert 1e-4 * b.norm() < (a - b).norm() < 0.4 * b.norm(), part


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process, through NCCL."""
    store = distributed.HashStore()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@recipes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_wrapped_for_several_gpus_it_learns_the_same(
    recipe: str,
    strategy: str,
    teacher: Path,
    alone: None,
    exact: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del alone, exact
    plain = distinct(build(recipe, teacher, "--device", GPU))

    def spread(run: Distillation, *denoisers: Any) -> None:
        mesh = None if strategy == "ddp" else parallel.mesh_of("fsdp", run.device)
        for denoiser in denoisers:
            twin = networks(plain)[networks(run).index(denoiser)]
            denoiser.network.load_state_dict(twin.network.state_dict())
            kind = run.run_settings.strategy
            parallel.share(denoiser, kind, mesh, low_precision=False)

    monkeypatch.setattr(Distillation, "spread", spread)
    options = ("--device", GPU, "--strategy", strategy)
    wrapped = build(recipe, teacher, *options)
    kind = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}[strategy]
    for part in wrapped.trained.values():
        modules = part.denoiser.network.modules()
        assert any(isinstance(module, kind) for module in modules)
    for run in (plain, wrapped):
        without_chance(run, monkeypatch)
    batch = plain.draw()
    agree(learned(wrapped, batch), learned(plain, batch), ROUNDING)
    for step in range(3):
        assert wrapped.iterate(step)["critic/gradient_norm"].isfinite()
    wrapped.soundness.check()


def test_random_numbers_go_on_from_a_checkpoint() -> None:
    own = torch.Generator(GPU).manual_seed(3)
    states = GeneratorState(own), GlobalRandomState()
    torch.randn(5, device=GPU)
    saved = [state.state_dict() for state in states]

    def draw() -> list[Tensor]:
        drawn = torch.randn(9, device=GPU, generator=own)
        return [drawn, torch.randn(9, device=GPU), torch.randn(9)]

    expected = draw()
    for state, value in zip(states, saved, strict=True):
        state.load_state_dict(value)
    for value, wanted in zip(draw(), expected, strict=True):
        assert torch.equal(value, wanted)


def test_averages_and_distances_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    features = torch.randn(500, 16), torch.randn(500, 16) + 0.3
    module = torch.nn.Linear(16, 16)
    found = []
    for device in ("cpu", GPU):
        network = torch.nn.Linear(16, 16).to(device)
        network.load_state_dict(module.state_dict())
        average = ExponentialMovingAverage(network, (0.9,))
        with torch.no_grad():
            network.weight += 1
        average.update(network)
        with average.applied_to(network):
            weight = network.weight.detach().cpu().clone()
        both = [FeatureStatistics(16) for _ in features]
        for statistics, x in zip(both, features, strict=True):
            statistics.update(x.to(device))
        found.append((weight, frechet_distance(*both)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "options", [(), ("--compile",), ("--channels-last", "--precision", "fp32")]
)
def test_a_run_is_made_resumed_and_drawn_from(
    options: tuple[str, ...], teacher: Path, tmp_path: Path
) -> None:
    images = save_digit_images(tmp_path / "images", side=8, channels=1)
    out = tmp_path / "run"
    given = ["--teacher", f"{teacher}", "--images", f"{images}", "--out", f"{out}"]
    given += ["--batch-size", "8", "--micro-batch-size", "4", "--workers", "2"]
    given += ["--log-every", "1", *options]
    for iterations, more in ((6, ()), (12, ("--resume",))):
        whole = [*given, "--iterations", f"{iterations}", *more]
        run("examples/imagenet_edm.py", *whole)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["device"].startswith("cuda")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))
    assert summary["peak_memory_gib"] > 0
    run("examples/sample.py", f"{out / 'student'}", "--grid", f"{out / 'grid.png'}")
    assert (out / "grid.png").is_file()
