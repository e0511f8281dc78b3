"""What keeps the recipes fast: shared passes, no reads from the device, compiling."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import imagenet_edm
import pytest
import sd15
import sdxl
import torch
from distillation import Distillation, backward
from helpers_recipes import save_digit_images, save_digits_teacher
from helpers_speed import FAST, build
from runs import Durations, Soundness, parse
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmdkit import NonFiniteError
from dmdkit.adapters.diffusers import UNetNetwork

RECIPES = ("imagenet", "sd15", "sdxl")
recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_teacher(tmp_path_factory.mktemp("speed") / "teacher")


def weights(run: Distillation) -> dict[str, Tensor]:
    """Weights and moments of what is trained."""
    found = {}
    for name, part in run.trained.items():
        for i, p in enumerate(part.denoiser.parameters()):
            found[f"{name} {i}"] = p.detach().clone()
            for key, value in part.optimizer.state[p].items():
                found[f"{name} {i} {key}"] = value.clone()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


# Shared passes.


@contextmanager
def calls(run: Distillation) -> Iterator[list[tuple[str, int, int]]]:
    """The critic's calls, with the samples that go into encoder and decoder."""
    network: Any = run.trained["critic"].denoiser.network
    unet = next(m for m in network.modules() if isinstance(m, UNetNetwork)).unet
    found: list[list[Any]] = []
    first, last = unet.conv_in, unet.conv_out
    handles = [
        network.register_forward_pre_hook(lambda *_: found.append([0, 0])),
        first.register_forward_hook(
            lambda m, a, out: found[-1].__setitem__(0, len(out))
        ),
        last.register_forward_hook(
            lambda m, a, out: found[-1].__setitem__(1, len(out))
        ),
    ]
    yield found  # pyright: ignore[reportReturnType]
    for handle in handles:
        handle.remove()


@recipes
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [[2, 2], [2, 0], [2, 0], [2, 0], [2, 2]]),
        (("--shared-critic-pass",), [[2, 2], [2, 0], [4, 2]]),
        (("--shared-generator-pass",), [[2, 2], [2, 0], [2, 0], [2, 2]]),
        (("--shared-critic-pass", "--shared-generator-pass"), [[2, 2], [4, 2]]),
    ],
)
def test_the_critic_s_passes_of_an_iteration(
    recipe: str, teacher: Path, options: tuple[str, ...], expected: list[Any]
) -> None:
    run = build(recipe, teacher, *options)
    before = weights(run)
    with calls(run) as found:
        metrics = run.iterate(0)
    assert found == expected
    names = {name.partition("/")[0] for name in metrics}
    assert names == {"dm", "gan", "critic", "discriminator", "student"}
    assert all(bool(value.isfinite()) for value in metrics.values())
    assert not same(before, weights(run))


@recipes
@pytest.mark.parametrize("shared", [False, True])
def test_the_critic_has_one_graph_at_a_time(
    recipe: str, shared: bool, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(recipe, teacher, *["--shared-critic-pass"] * shared)
    run.iterate(0)
    events: list[str] = []
    network = run.trained["critic"].denoiser.network
    network.register_forward_pre_hook(lambda *_: events.append("call"))

    def noted(losses: Any, *more: Any) -> None:
        backward(losses, *more)
        events.extend(losses)

    monkeypatch.setattr("distillation.backward", noted)
    run.iterate(1)
    expected = ["call", "call", "discriminator", "call", "critic"]
    assert events == (["call", "critic", "discriminator"] if shared else expected)


@recipes
def test_shared_passes_have_the_gradients_of_separate_ones(
    recipe: str, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times and noise that depend on the sample alone, nothing else differs."""

    def noise(x: Tensor, generator: object) -> Tensor:
        del generator
        return 1.4 * torch.sin(57 * x.detach())

    def times(batch: int, **_: Any) -> Tensor:
        return torch.full((batch,), 2.0 if recipe == "imagenet" else 500.0)

    monkeypatch.setattr("dmdkit.losses.common.noise_like", noise)
    found = []
    for options in ((), ("--shared-critic-pass", "--shared-generator-pass")):
        run = build(recipe, teacher, *options)
        torch.manual_seed(4)
        with torch.no_grad():  # else critic and teacher agree
            for p in run.trained["critic"].denoiser.parameters():
                p.add_(0.02 * torch.randn_like(p))
        for name in ("dm_loss", "critic_loss", "gan_loss"):
            object.__setattr__(getattr(run.method, name), "times", times)
        kept: dict[str, Tensor] = {}

        def keep(name: str, run: Any = run, kept: Any = kept) -> dict[str, Tensor]:
            parameters = run.trained[name].denoiser.parameters()
            grads = [p.grad.flatten() for p in parameters if p.grad is not None]
            kept[name] = torch.cat(grads).clone()
            return {}

        monkeypatch.setattr(run, "update", keep)
        run.iterate(0)
        found.append(kept)
    separate, shared = found
    assert list(shared) == ["student", "critic"]
    for name, expected in separate.items():
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(shared[name], expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shared-critic-pass", "--no-gan"), "--shared-critic-pass: nothing to"),
        (("--shared-generator-pass", "--no-gan"), "--shared-generator-pass: it serves"),
        (
            ("--shared-generator-pass", "--no-distribution-matching"),
            "--shared-generator-pass: it serves two losses",
        ),
    ],
)
@pytest.mark.parametrize("module", [imagenet_edm, sd15, sdxl])
def test_a_pass_is_not_shared_with_nothing(
    module: Any, options: tuple[str, ...], message: str
) -> None:
    given = ["--random-init", "--gan", *options]
    chosen = parse(module.Settings, module.PRESETS, given)
    with pytest.raises(SystemExit, match=message):
        chosen.check()


# What is not finite: no step is taken, and it is read late.


@pytest.mark.parametrize(
    ("recipe", "micro"),
    [("imagenet", "2"), ("imagenet", "1"), ("sd15", "2"), ("sdxl", "1")],
)
def test_from_the_first_loss_that_is_not_finite_no_step_is_taken(
    recipe: str, teacher: Path, micro: str
) -> None:
    run = build(recipe, teacher, "--micro-batch-size", micro, "--batch-size", "2")
    run.iterate(0)
    run.soundness.check()
    before = weights(run)
    generate: Callable[..., Tensor] = run.method.generate
    calls: list[int] = []

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        x = generate(*args, **kwargs)
        calls.append(0)
        # In one micro-batch of one iteration.
        return x * (math.inf if len(calls) == 1 else 1.0)

    with patch.object(run.method, "generate", broken):
        for step in (1, 5, 6):  # at 5 the student has its turn
            run.iterate(step)
    assert same(before, weights(run))
    with pytest.raises(
        NonFiniteError,
        match=r"iteration 2: critic is not finite for sample 0 \(t = .*no step was t",
    ):
        run.soundness.check()


@pytest.mark.parametrize("recipe", ["imagenet", "sd15"])
def test_a_gradient_alone_that_is_not_finite_gates_the_step(
    recipe: str, teacher: Path
) -> None:
    run = build(recipe, teacher)
    run.iterate(0)
    before = weights(run)
    first = next(run.trained["critic"].denoiser.parameters())
    handle = first.register_hook(lambda gradient: gradient * math.inf)
    run.iterate(1)
    handle.remove()
    run.iterate(2)
    assert same(before, weights(run))
    with pytest.raises(
        NonFiniteError, match=r"iteration 2: the gradient of the critic is not finite"
    ):
        run.soundness.check()


def test_a_flagged_sample_makes_every_gradient_nan() -> None:
    """Also one that its loss does not see, so that all processes learn of it."""
    weight = torch.ones(3, requires_grad=True)

    def output(*finite: bool) -> SimpleNamespace:
        loss = weight.square().sum()
        return SimpleNamespace(loss=loss, finite=torch.tensor(finite))

    weights = {"one": 2.0, "other": 0.5}
    backward({"one": output(True), "other": output(True, True)}, weights, 0.5)
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.5] * 3  # (2 + 0.5) 2 w / 2
    weight.grad = None
    backward({"one": output(True), "other": output(True, False)}, weights, 0.5)
    assert weight.grad is not None
    assert weight.grad.isnan().all()


def test_a_run_that_breaks_stops_with_one_line_and_saves_nothing_of_it(
    teacher: Path, tmp_path: Path
) -> None:
    images = save_digit_images(tmp_path / "images", side=8, channels=1)
    out = tmp_path / "run"
    given = [*FAST, "--teacher", str(teacher), "--images", str(images)]
    given += ["--iterations", "6", "--checkpoint-every", "2", "--out", str(out)]
    method = imagenet_edm.Method
    learn, count = method.critic_backward, iter(range(100))

    def broken(self: Any, networks: Any, batch: Any, x: Tensor, *more: Any) -> Any:
        if next(count) == 2:
            x = x + math.nan
        return learn(self, networks, batch, x, *more)

    settings = parse(imagenet_edm.Settings, imagenet_edm.PRESETS, given)
    with (
        patch.object(method, "critic_backward", broken),
        pytest.raises(SystemExit, match="iteration 3: critic is not finite for sample"),
    ):
        imagenet_edm.main(settings)
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    assert saved == ["step-00000002"]
    lines = (out / "log.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["step"] > 2 for line in lines)


def test_soundness_names_the_first_and_forgets_what_was_sound() -> None:
    sound = Soundness()
    sound.check()
    for step, norm in enumerate((1.0, 2.0, math.nan, 3.0)):
        sound.begin(step)
        broken = sound.gradient("student", torch.tensor(norm))
        assert broken.item() == (step >= 2)
        if step == 1:
            sound.check()
    with pytest.raises(NonFiniteError, match="iteration 3: the gradient of the stud"):
        sound.check()


def test_medians_of_times_are_of_the_last_thousand_iterations() -> None:
    durations = Durations(torch.device("cpu"))
    clock = iter([t for i in range(2000) for t in (0.0, 1.0 if i < 1000 else 3.0)])
    with patch("runs.time.perf_counter", lambda: next(clock)):
        for _ in range(2000):
            with durations.of("critic_turn"):
                pass
    assert durations.medians() == {"critic_turn": 3.0}


# Nothing is read back within an iteration.

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "unique")
READS += ("__bool__", "__float__", "__int__", "__index__", "__contains__", "equal")
READS += ("allclose", "masked_select")


class NoReads(TorchFunctionMode):
    """Raises where Python asks a tensor for its values."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            raise AssertionError(f"{name} reads from the device")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index):
                raise AssertionError("a mask as an index reads from the device")
        return func(*args, **(kwargs or {}))


class NoScalars(TorchDispatchMode):
    """Raises where PyTorch itself reads a value, or makes a shape of values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "_unique2",
        ):
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads(run: Distillation) -> Iterator[None]:
    """Forbids reads, but for the rung, which is drawn on the CPU."""
    rung = run.draw_rung()
    with patch.object(run, "draw_rung", lambda: rung), NoReads(), NoScalars():
        yield


@pytest.mark.parametrize(
    ("recipe", "shared"),
    [("imagenet", False), ("imagenet", True), ("sd15", False), ("sdxl", True)],
)
def test_no_iteration_reads_from_the_device(
    recipe: str, teacher: Path, shared: bool
) -> None:
    options = ["--ema", "0.9", "--micro-batch-size", "1"]
    if shared:
        options += ["--shared-critic-pass", "--shared-generator-pass"]
    run = build(recipe, teacher, *options)
    for step in range(2):
        with no_reads(run):
            run.iterate(step)
    run.soundness.check()


def test_the_check_for_reads_sees_them(teacher: Path) -> None:
    run = build("imagenet", teacher)
    x = torch.ones(3)
    reads: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: bool(x.sum()),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        run.soundness.check,
    ]
    run.soundness.gradient("critic", torch.ones(()))
    for read in reads:
        with pytest.raises(AssertionError, match="reads from the device"):
            with no_reads(run):
                read()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@recipes
def test_no_iteration_waits_for_the_gpu(recipe: str, teacher: Path) -> None:
    run = build(recipe, teacher, "--device", "cuda")
    run.iterate(0)  # tables and moments are made
    run.iterate(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (5, 6):
            run.iterate(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.soundness.check()


# Layout, guidance, the teacher's precision, compiling.


def losses(run: Distillation, steps: int = 1) -> dict[str, Tensor]:
    for step in range(steps - 1):
        run.iterate(step)
    return {k: v for k, v in run.iterate(steps - 1).items() if k.endswith("/loss")}


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name != "dm/loss" or value > 1e-6:  # of alike networks it is rounding
            torch.testing.assert_close(value, other[name], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("recipe", ["imagenet", "sdxl"])
def test_channels_last_is_a_layout_and_nothing_else(recipe: str, teacher: Path) -> None:
    run = build(recipe, teacher, "--channels-last")
    for part in run.networks:
        denoiser = getattr(part, "denoiser", part)  # the teacher's is guided
        for p in denoiser.parameters():
            if p.ndim == 4:
                assert p.is_contiguous(memory_format=torch.channels_last)
    close(losses(run), losses(build(recipe, teacher)), 1e-3)


@pytest.mark.parametrize("recipe", ["sd15", "sdxl"])
def test_merged_guidance_is_that_of_two_calls(recipe: str, teacher: Path) -> None:
    merged, usual = build(recipe, teacher, "--merged-guidance"), build(recipe, teacher)
    batch = usual.draw()
    called: list[int] = []
    unet: Any = merged.networks.teacher.denoiser.network
    unet.register_forward_pre_hook(lambda _, args: called.append(len(args[0])))
    given = batch.noise, torch.full((2,), 500.0), batch.cond
    torch.testing.assert_close(
        merged.networks.teacher(*given),
        usual.networks.teacher(*given),
        rtol=1e-3,
        atol=1e-3,
    )
    assert called == [4]


def test_a_teacher_in_bf16_is_the_teacher_rounded(teacher: Path) -> None:
    low = build("imagenet", teacher, "--teacher-precision", "bf16")
    high = build("imagenet", teacher)
    assert {p.dtype for p in low.networks.teacher.parameters()} == {torch.bfloat16}
    for name in ("student", "critic"):
        pairs = zip(
            getattr(low.networks, name).parameters(),
            getattr(high.networks, name).parameters(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    x, t, labels = torch.randn(8, 1, 8, 8), torch.full((8,), 0.5), torch.arange(8)
    ours, theirs = (run.networks.teacher(x, t, labels) for run in (low, high))
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02


def compiled(recipe: str, *options: str) -> dict[str, Any]:
    script = Path(__file__).with_name("script_compile_recipes.py")
    done = subprocess.run(
        [sys.executable, script, recipe, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SHARED = ("--shared-critic-pass", "--shared-generator-pass")


@pytest.mark.parametrize(
    ("recipe", "options", "graphs"),
    [
        # Teacher; student with and without a graph; critic: score, the student's GAN
        # loss, denoising, the discriminator's.
        ("imagenet", (), 7),
        # The critic on the student's turn, and on its own.
        pytest.param("imagenet", SHARED, 5, marks=pytest.mark.slow),
        pytest.param("sd15", (), 7, marks=pytest.mark.slow),
        pytest.param("sdxl", SHARED, 5, marks=pytest.mark.slow),
        pytest.param("sdxl", ("--lora", "both"), 7, marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_have_no_break_and_are_not_compiled_again(
    recipe: str, options: tuple[str, ...], graphs: int
) -> None:
    found = compiled(recipe, *options)
    assert found["graphs"] == [graphs, graphs]
    assert found["breaks"] == found["recompile_limit"] == {}
    assert found["difference"] < 1e-4
