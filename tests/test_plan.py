"""The planner: what it counts is what a run takes."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import imagenet_edm
import plan
import pytest
import sd15
import sdxl
import torch
import tyro
from helpers_pipelines import save_sdxl
from planning import CATEGORIES, GIB, Counter, FakeDDP, fake_machine, gpu_autocast
from runs import parse
from torch import distributed as dist
from torch import nn
from torch.nn.functional import conv2d, scaled_dot_product_attention, silu
from torch.nn.parallel import DistributedDataParallel

SMALL = ["--batch-size", "1", "--micro-batch-size", "1", "--critic-steps", "2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("teacher") / "sdxl")


def planned(
    folder: Path, *options: str, ranks: int = 1, given: tuple[str, ...] = ()
) -> dict[str, Any]:
    arguments = ["--pretrained", str(folder), "--preset", options[0], *SMALL]
    arguments += options[1:]
    settings = plan.without_data(parse(sdxl.Settings, sdxl.PRESETS, arguments))
    asked = tyro.cli(plan.Settings, args=["sdxl", "--ranks", str(ranks), *given])
    return plan.planned(settings, sdxl, asked)


@pytest.mark.parametrize(
    "options",
    [
        ("four-step", "--precision", "fp32"),
        ("four-step-lora",),
        ("table4-no-backward-simulation", "--ema", "0.9", "--batch-size", "2"),
    ],
)
def test_a_plan_counts_what_the_real_run_takes(
    teacher: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same iterations on real tensors allocate and compute the same."""
    without_data = planned(teacher, *options)
    monkeypatch.setattr(plan, "fake_machine", lambda *_: nullcontext())
    real = planned(teacher, *options)
    for key in ("flops_per_cycle", "flops_by_phase", "parameters"):
        assert without_data[key] == real[key]
    assert without_data["peak_gib_per_rank"] == pytest.approx(
        real["peak_gib_per_rank"], rel=0.01
    )
    assert without_data["by_category"]["weights"] == pytest.approx(
        real["by_category"]["weights"], rel=0.01
    )


def test_the_peak_of_a_few_tensors() -> None:
    with Counter() as counter, torch.no_grad():
        kept = torch.zeros(1000)
        for _ in range(3):
            _ = torch.zeros(500)
            del _
        assert counter.peak == 4 * 1500
        assert sum(counter.live.values()) == 4000
        counter.put(kept, "weights")
        assert counter.live["weights"] == 4000
        counter.restart()
        assert counter.peak == 4000
        view = kept[:10]
        assert sum(counter.live.values()) == 4000  # a view has no memory of its own
        del kept, view
        assert set(counter.live.values()) == {0}


def test_flops_by_hand() -> None:
    """A product of [m, k] and [k, n] takes 2 m k n; attention two of them."""
    with Counter() as counter:
        _ = torch.zeros(3, 5) @ torch.zeros(5, 7)
        assert counter.flops == 2 * 3 * 5 * 7
        before = counter.flops
        conv2d(torch.zeros(2, 4, 8, 8), torch.zeros(6, 4, 3, 3), padding=1)
        assert counter.flops - before == 2 * (2 * 8 * 8) * 6 * (4 * 3 * 3)
    with fake_machine(1, 1), Counter() as counter:
        query = torch.zeros(1, 2, 64, 16)
        scaled_dot_product_attention(query, query, query)
        assert counter.flops == 2 * (2 * 2 * 64 * 64 * 16)


@pytest.mark.parametrize(("on_gpu", "bytes_each"), [(False, 2 + 2), (True, 4 + 4)])
def test_norms_are_kept_as_gpus_keep_them(on_gpu: bool, bytes_each: int) -> None:
    """CUDA's autocast has norms in fp32: what they read and give is twice as much."""
    mode = gpu_autocast() if on_gpu else nullcontext()
    with fake_machine(1, 1), mode, Counter() as counter:
        norm, x = nn.GroupNorm(4, 8), torch.zeros(2, 8, 32, 32, dtype=torch.bfloat16)
        counter.put_all("weights")
        with torch.autocast("cpu", torch.bfloat16):
            y = silu(norm(x + 1))
        assert y.dtype == (torch.float32 if on_gpu else torch.bfloat16)
        kept = counter.live["activations"] - y.nbytes
        assert kept == pytest.approx(bytes_each * x.numel(), rel=0.05)


def test_ddp_sends_the_gradients_once_an_update(teacher: Path) -> None:
    """A ring sends 2 (R - 1) / R of what is averaged, however many micro-batches."""
    found = planned(teacher, "four-step", "--batch-size", "8", ranks=4)
    parameters = found["parameters"]
    critics = 2
    trained = parameters["parameters"] + critics * parameters["critic_parameters"]
    assert found["communication_gib_per_cycle"] * GIB == pytest.approx(
        2 * 3 / 4 * 4 * trained, rel=1e-3
    )
    assert found["strategy"] == "ddp"
    assert found["communication_gib_between_machines"] == 0
    sent = found["communication_gib_per_cycle"] * GIB
    assert found["seconds_sending_per_cycle"] == pytest.approx(sent / 300e9)


def test_the_stand_in_for_ddp_keeps_what_ddp_keeps() -> None:
    """Weights, moments and buckets stay after a step, gradients come on top of none."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    found = []
    try:
        for wrap in (FakeDDP, DistributedDataParallel):
            with Counter() as counter:
                wrapped: Any = wrap(
                    nn.Linear(500, 500, bias=False), gradient_as_bucket_view=True
                )
                optimizer = torch.optim.AdamW(wrapped.parameters(), fused=True)
                held = []
                for _ in range(3):
                    wrapped(torch.ones(1, 500)).sum().backward()
                    held.append(sum(counter.live.values()))
                    optimizer.step()
                    optimizer.zero_grad()
                    held.append(sum(counter.live.values()))
                found.append(held)
                del wrapped, optimizer
    finally:
        dist.destroy_process_group()
    weights = 4 * 500 * 500
    assert found[0][-1] == pytest.approx(4 * weights, rel=0.01)
    for stand_in, real in zip(*found, strict=True):
        assert stand_in == pytest.approx(real, rel=0.01)


def test_shards_take_a_share_of_the_memory(teacher: Path) -> None:
    one = planned(teacher, "four-step", "--precision", "fp32")
    options = ("four-step", "--precision", "fp32", "--batch-size", "4")
    four = planned(teacher, *options, "--strategy", "fsdp", ranks=4)
    for category in ("weights", "optimizer"):
        ratio = four["by_category"][category] / one["by_category"][category]
        assert ratio == pytest.approx(1 / 4, rel=0.01)
    assert four["communication_gib_per_cycle"] > 0
    halves = ("--strategy", "hsdp")
    hybrid = planned(
        teacher, *options, *halves, ranks=4, given=("--ranks-per-machine", "2")
    )
    ratio = hybrid["by_category"]["weights"] / one["by_category"]["weights"]
    assert ratio == pytest.approx(1 / 2, rel=0.01)
    # Machines average shards of gradients; weights are gathered within each of them.
    sent = hybrid["communication_gib_per_cycle"]
    far = hybrid["communication_gib_between_machines"]
    assert 0 < far < sent / 2
    seconds = GIB * (far / 50e9 + (sent - far) / 300e9)
    assert hybrid["seconds_sending_per_cycle"] == pytest.approx(seconds)
    assert four["communication_gib_between_machines"] == 0


def test_the_command(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pretrained", str(teacher), "--preset", "four-step-lora", *SMALL]
    files = [
        "--json",
        str(tmp_path / "a" / "p.json"),
        "--plot",
        str(tmp_path / "p.png"),
    ]
    given, rest = tyro.cli(
        plan.Settings, args=["sdxl", *options, *files], return_unknown_args=True
    )
    found = plan.main(given, rest)
    written = json.loads((tmp_path / "a" / "p.json").read_text())
    assert written == found
    assert set(written["by_category"]) == set(CATEGORIES)
    assert sum(written["by_category"].values()) == pytest.approx(
        written["peak_gib_per_rank"]
    )
    assert sum(written["flops_by_phase"].values()) == written["flops_per_cycle"]
    assert written["micro_batches"] == 1
    assert (tmp_path / "p.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "peak memory of a process" in shown
    assert "whole run" in shown
    assert "Batch 1, where four-step-lora has 128: the whole run, its time and" in shown
    assert "are of 0.00781 times as many samples as the recipe's." in shown
    plan.show({**found, "batch_size": 128}, given)
    assert "times as many samples" not in capsys.readouterr().out


def test_sd15_is_planned_as_well(tmp_path: Path) -> None:
    """At full size, without a weight in memory: 860 M parameters are 3.2 GiB."""
    arguments = ["--preset", "stage1", "--batch-size", "1", "--micro-batch-size", "1"]
    settings = plan.without_data(parse(sd15.Settings, sd15.PRESETS, arguments))
    found = plan.planned(settings, sd15, tyro.cli(plan.Settings, args=["sd15"]))
    assert found["parameters"]["unet_parameters"] == 859_520_964
    weights = (2 + 4 + 4) * 859_520_964 / GIB  # teacher in bf16, two copies in fp32
    assert found["by_category"]["weights"] == pytest.approx(weights, rel=0.01)
    moments = 2 * (4 + 4) * 859_520_964 / GIB
    assert found["by_category"]["optimizer"] == pytest.approx(moments, rel=0.01)


def test_what_cannot_be_planned_is_refused() -> None:
    for options, message in (
        (["--ranks", "0"], "--ranks 0: expected >= 1"),
        (["--tflops", "0"], "expected > 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            tyro.cli(plan.Settings, args=["sdxl", *options])


@pytest.mark.parametrize("recipe", [imagenet_edm, sd15, sdxl])
def test_every_preset_can_be_planned(recipe: Any) -> None:
    """None asks for data or for an earlier run, which a plan has no need of."""
    for preset in recipe.PRESETS:
        asked = parse(recipe.Settings, recipe.PRESETS, ["--preset", preset])
        assert plan.without_data(asked).preset == preset


def test_casts_keep_what_a_module_is() -> None:
    with fake_machine(1, 1):
        layer = nn.Linear(3, 4).requires_grad_(False).to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
        assert not layer.weight.requires_grad


def test_numbers_of_processes_that_a_strategy_cannot_have() -> None:
    twelve = tyro.cli(plan.Settings, args=["sdxl", "--ranks", "12"])
    with pytest.raises(SystemExit, match="a multiple of --ranks-per-machine 8"):
        twelve.check("hsdp")
    twelve.check("fsdp")
    with pytest.raises(SystemExit, match="--strategy fsdp: takes several"):
        tyro.cli(plan.Settings, args=["sdxl"]).check("fsdp")


def test_a_plan_has_one_memory() -> None:
    given = ["--strategy", "fsdp", "--cpu-offload"]
    with pytest.raises(SystemExit, match="--cpu-offload: a plan counts one memory"):
        plan.without_data(parse(sdxl.Settings, sdxl.PRESETS, given))
    with pytest.raises(SystemExit, match="--cpu-offload: strategy ddp"):
        plan.without_data(parse(sdxl.Settings, sdxl.PRESETS, given[2:]))


@pytest.mark.slow
def test_the_system_measures_what_is_planned() -> None:
    """At the full size of the network, in one process and in two."""
    script = Path(__file__).parent / "benchmarks" / "planned_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), "imagenet", "imagenet-fsdp"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["planned_gib"] > 2
        assert found["measured_gib"] == pytest.approx(found["planned_gib"], rel=0.15)
