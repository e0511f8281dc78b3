"""The text-to-image recipes as a user runs them: data, train, kill, export, draw."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import prepare_pairs
import pytest
import sd15
import sdxl
import torch
import tyro
from diffusers import DiffusionPipeline
from helpers_pipelines import (
    SDXL_UNET,
    save_latents,
    save_prompts,
    save_sd15,
    save_sdxl,
    save_tiny_vae,
)
from PIL import Image
from runs import parse
from safetensors.torch import load_file, save_file
from text_to_image import TextDistillation
from torch import Tensor

from dmdkit import BackwardSimulator, checkpoints
from dmdkit.adapters.folders import read_sidecar
from dmdkit.adapters.lora_files import save_lora
from dmdkit.adapters.model_cards import lora_card
from dmdkit.adapters.pipelines import encode_prompts
from dmdkit.data import ShardedTensors

EXAMPLES = Path(__file__).parents[1] / "examples"
FAST = "--workers 0 --device cpu --precision fp32 --checkpoint-every 5".split()
FAST += ["--batch-size", "2"]


def train(module: Any, *options: str | Path) -> None:
    module.main(settings(module, *options))


def settings(module: Any, *options: str | Path) -> Any:
    given = [*FAST, *map(str, options)]
    return parse(module.Settings, module.PRESETS, given)


def pairs(*options: str | Path) -> None:
    prepare_pairs.main(tyro.cli(prepare_pairs.Settings, args=list(map(str, options))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("text")
    return {
        "SD15": save_sd15(top / "sd15"),
        "SDXL": save_sdxl(top / "sdxl"),
        "L15": save_latents(top / "sd15-latents", top / "sd15"),
        "LXL": save_latents(top / "sdxl-latents", top / "sdxl"),
        "P": save_prompts(top / "prompts.txt"),
        "TINY": save_tiny_vae(top / "tiny"),
    }


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights where torchvision's would be."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(make_layers(cfgs["D"]).state_dict(), file)
    return file


def data(folders: dict[str, Path]) -> list[str | Path]:
    return [
        "--pretrained",
        folders["SDXL"],
        "--prompts",
        folders["P"],
        "--latents",
        folders["LXL"],
    ]


def student_unet(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def test_train_kill_resume_and_draw_with_diffusers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options = [*data(folders), "--iterations", "15", "--learning-rate", "1e-4"]
    options += ["--ema", "0.9", "--seed", "3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    given = [*FAST, *map(str, options), "--out", str(killed)]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "sdxl.py"), *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while not checkpoints(killed / "checkpoints") and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "summary.json").exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(sdxl, *options, "--out", killed, "--resume", "--workers", "1")
        train(sdxl, *options, "--out", whole)
    finally:
        torch.set_num_threads(threads)
    uninterrupted, resumed = student_unet(whole), student_unet(killed)
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(v, resumed[k]) for k, v in uninterrupted.items())

    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["seconds_per_iteration"]) == {"generator_turn", "critic_turn"}
    assert summary["peak_memory_gib"] > 0
    assert summary["student_updates"] == 3
    assert summary["parameters"] == sum(v.numel() for v in uninterrupted.values())
    with Image.open(whole / "samples" / "00000015.png") as picture:
        assert picture.size == (6 * 66 + 2, 66 + 2)  # one image a prompt of the file

    sidecar = read_sidecar(whole / "student")
    assert sidecar.times == (999.0, 749.0, 499.0, 249.0)
    assert sidecar.about["teacher"] == "sdxl"
    assert sidecar.about["licence"] == "openrail++"
    assert sidecar.about["iterations"] == 15
    check_diffusers_draws_the_samples(whole / "student")


def check_diffusers_draws_the_samples(folder: Path) -> None:
    """Plain diffusers, by the number of steps alone, draws by section 4.4."""
    from dmdkit.adapters.pipelines import teacher_from_pipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipeline(
        "a cat",
        latents=noise,
        num_inference_steps=4,
        guidance_scale=0,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images
    own = torch.Generator().manual_seed(7)
    fresh = [torch.randn(noise.shape, generator=own) for _ in range(3)]
    expected = BackwardSimulator((999, 749, 499, 249)).sample(
        teacher_from_pipeline(pipeline),
        noise,
        encode_prompts(pipeline, ["a cat"]),
        draws=fresh,
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_stage_two_starts_from_stage_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    common: list[str | Path] = ["--pretrained", folders["SD15"]]
    common += ["--prompts", folders["P"], "--learning-rate", "1e-4"]
    first = tmp_path / "first"
    train(sd15, *common, "--iterations", "10", "--out", first)
    checkpoint = checkpoints(first / "checkpoints")[-1]
    options = [*common, "--preset", "stage2", "--latents", folders["L15"]]
    options += ["--start-from", checkpoint, "--out", tmp_path / "second"]
    run = TextDistillation(settings(sd15, *options), {})
    unet = student_unet(first)
    network: Any = run.networks.student.network
    own = network.unet.state_dict()
    assert all(torch.equal(own[k], v) for k, v in unet.items())
    # The critic has gone on as well, under a head that is new.
    critic: Any = run.networks.critic
    theirs = critic.network.network.unet.state_dict()
    assert any(not torch.equal(v, theirs[k]) for k, v in own.items())
    start: Any = run.base.unet.state_dict()
    assert any(not torch.equal(v, theirs[k]) for k, v in start.items())
    train(sd15, *options, "--iterations", "2")
    log = (tmp_path / "second" / "log.jsonl").read_text().splitlines()
    assert "discriminator/loss" in json.loads(log[-1])


def test_pairs_pretrain_the_one_step_student(
    folders: dict[str, Path], vgg: Path, tmp_path: Path
) -> None:
    made = tmp_path / "pairs"
    common: list[str | Path] = [folders["SDXL"], made, "--prompts", folders["P"]]
    common += ["--steps", "4", "--count", "10", "--batch-size", "2"]
    pairs(*common, "--shard-size", "4")
    found = ShardedTensors(made)
    assert len(found) == 10
    assert found[7]["prompts"] == "prompt number 1"  # the seventh of six
    with Image.open(made / "pairs-0000.png") as picture:
        assert picture.size == (4 * 66 + 2, 66 + 2)

    options: list[str | Path] = ["--preset", "one-step-pretrain", "--pairs", made]
    options += ["--pretrained", folders["SDXL"], "--tiny-vae", folders["TINY"]]
    options += ["--lpips-weights", vgg, "--iterations", "6", "--learning-rate", "1e-3"]
    out = tmp_path / "pretrained"
    train(sdxl, *options, "--out", out, "--log-every", "1")
    losses = [
        json.loads(line)["regression/loss"]
        for line in (out / "log.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    assert json.loads((out / "summary.json").read_text())["student_updates"] == 6
    assert read_sidecar(out / "student").times == (399.0,)

    options = [*data(folders), "--preset", "one-step", "--out", tmp_path / "one"]
    options += ["--start-from", checkpoints(out / "checkpoints")[-1]]
    run = TextDistillation(settings(sdxl, *options), {})
    network: Any = run.networks.student.network
    own = network.unet.state_dict()
    assert all(torch.equal(own[k], v) for k, v in student_unet(out).items())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_pairs_are_diffusers_own_samples(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The released pairs were drawn by SDXL's pipeline with EulerDiscreteScheduler."""
    from diffusers import EulerDiscreteScheduler

    pairs(
        *(folders["SDXL"], tmp_path / "pairs", "--prompts", folders["P"]),
        *("--count", "2", "--steps", "10", "--dtype", "fp32"),
    )
    pair = ShardedTensors(tmp_path / "pairs")[1]
    pipeline: Any = DiffusionPipeline.from_pretrained(
        folders["SDXL"], local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    scheduler: Any = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    # Euler's method starts at sigma_max times the noise, not at its whole variance.
    pipeline.scheduler = scheduler
    bar = float(scheduler.alphas_cumprod[999])
    drawn = pipeline(
        pair["prompts"],
        latents=pair["noise"][None] / (1 - bar) ** 0.5,
        num_inference_steps=10,
        guidance_scale=8.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(pair["latents"][None], drawn, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("steps", "spacing"), [(50, "trailing"), (25, "leading")])
def test_timesteps_are_spaced_as_in_diffusers(steps: int, spacing: Any) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert list(prepare_pairs.timesteps(steps, spacing)) == scheduler.timesteps.tolist()


def test_pairs_go_on_where_they_stopped_and_are_shared_by_ranks(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [folders["SDXL"], "--prompts", folders["P"], "--steps", "2"]
    common += ["--count", "9", "--batch-size", "2", "--shard-size", "2"]
    whole, parted, ranks = (tmp_path / name for name in ("whole", "parted", "ranks"))
    pairs(*common[:1], whole, *common[1:])
    draw, calls = prepare_pairs.Drawing.__call__, []

    def stop(self: Any, prompts: Any, seeds: Any) -> Any:
        calls.append(seeds)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, prompts, seeds)

    monkeypatch.setattr(prepare_pairs.Drawing, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        pairs(*common[:1], parted, *common[1:])
    with pytest.raises(ValueError, match="rank 0"):
        ShardedTensors(parted)
    monkeypatch.undo()
    pairs(*common[:1], parted, *common[1:])
    for rank in ("0", "1"):
        pairs(*common[:1], ranks, *common[1:], "--rank", rank, "--ranks", "2")
    expected = [ShardedTensors(whole)[i] for i in range(9)]
    again = [ShardedTensors(parted)[i] for i in range(9)]
    for one, other in zip(expected, again, strict=True):
        assert one["prompts"] == other["prompts"]
        assert torch.equal(one["latents"], other["latents"])
    # Rank 0 has pairs 0, 2, 4, ..., and each pair its own seed.
    shared = ShardedTensors(ranks)
    order = [*range(0, 9, 2), *range(1, 9, 2)]
    for place, i in enumerate(order):
        assert torch.equal(shared[place]["noise"], expected[i]["noise"])
        torch.testing.assert_close(
            shared[place]["latents"], expected[i]["latents"], rtol=1e-2, atol=1e-2
        )


def test_shared_adapters_are_resumed_and_exported(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options = [*data(folders), "--preset", "four-step-lora", "--lora-rank", "2"]
    options += ["--learning-rate", "1e-2"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(sdxl, *options, "--iterations", "7", "--out", whole)
    train(sdxl, *options, "--iterations", "5", "--out", parted)
    train(sdxl, *options, "--iterations", "7", "--out", parted, "--resume")
    names = ("pytorch_lora_weights.safetensors", "kohya.safetensors")
    for name in names:
        one, other = (load_file(out / "student" / name) for out in (whole, parted))
        assert one.keys() == other.keys()
        assert all(torch.equal(v, other[k]) for k, v in one.items())
    assert "LCMScheduler" in (whole / "student" / "README.md").read_text()
    assert read_sidecar(whole / "student").about["lora_rank"] == 2

    run = TextDistillation(settings(sdxl, *options, "--out", tmp_path / "x"), {})
    from dmdkit.adapters.lora_files import load_lora

    network: Any = run.networks.student.network
    load_lora(network, whole / "student")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = run.encode(["a cat"])
    t = torch.full((1,), 500.0)
    expected = network(noise, t, cond)
    plain = run.base(noise, t, cond)
    assert (expected - plain).abs().max() > 1e-3
    for name in names:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folders["SDXL"], local_files_only=True
        )
        pipeline.load_lora_weights(whole / "student", weight_name=name)
        output = pipeline.unet(
            noise,
            500,
            encoder_hidden_states=cond.text,
            added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
        ).sample
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_run_may_go_on_in_smaller_parts(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after an error for lack of memory; other settings are still refused."""
    options = [*data(folders), "--preset", "four-step-lora", "--lora-rank", "2"]
    options += ["--out", tmp_path / "run"]
    train(sdxl, *options, "--iterations", "5")
    resumed = [*options, "--resume", "--iterations", "7", "--micro-batch-size", "1"]
    with pytest.raises(SystemExit, match="started with seed = 10, now it is 11; use"):
        train(sdxl, *resumed, "--seed", "11")
    capsys.readouterr()
    train(sdxl, *resumed)
    note = "The run was started with micro_batch_size = 2, now it is 1: it goes on with"
    assert note in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["iterations"], summary["micro_batches"]) == (7, 2)


def test_one_step_with_adapters_starts_from_its_pretraining(
    folders: dict[str, Path], vgg: Path, tmp_path: Path
) -> None:
    made, out = tmp_path / "pairs", tmp_path / "pretrained"
    common: list[str | Path] = [folders["SDXL"], made, "--prompts", folders["P"]]
    pairs(*common, "--steps", "2", "--count", "4")
    lora: list[str | Path] = ["--lora", "both", "--lora-rank", "2"]
    options: list[str | Path] = ["--preset", "one-step-pretrain", "--pairs", made]
    options += ["--pretrained", folders["SDXL"], "--tiny-vae", folders["TINY"]]
    options += ["--lpips-weights", vgg, "--iterations", "2", "--out", out]
    train(sdxl, *options, *lora, "--learning-rate", "1e-2")
    adapter = load_file(out / "student" / "pytorch_lora_weights.safetensors")
    assert any(v.any() for k, v in adapter.items() if "lora_B" in k)

    options = [*data(folders), "--preset", "one-step", *lora]
    options += ["--out", tmp_path / "one", "--start-from"]
    checkpoint = checkpoints(out / "checkpoints")[-1]
    for start in (checkpoint, out / "student" / "pytorch_lora_weights.safetensors"):
        chosen = settings(sdxl, *options, start)
        network: Any = TextDistillation(chosen, {}).networks.student.network
        save_lora(network, tmp_path / "started")
        file = tmp_path / "started" / "pytorch_lora_weights.safetensors"
        started = load_file(file)
        assert started.keys() == adapter.keys()
        assert all(torch.equal(v, adapter[k]) for k, v in started.items())
    with pytest.raises(SystemExit, match="--start-from: ") as error:
        train(sdxl, *data(folders), "--start-from", checkpoint, "--out", tmp_path / "x")
    lines(error)


@pytest.mark.parametrize("page", ["lora", "export"])
def test_the_pages_draw_with_an_adapter_as_its_model_card_says(page: str) -> None:
    told = {"teacher": "my-sdxl", "licence": "x", "resolution": 1024}
    card = lora_card((999, 749, 499, 249), True, told)
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("this/folder", "runs/four-step-lora/student")
    text = (EXAMPLES.parent / "docs" / "how-to" / f"{page}.md").read_text()
    assert code in text


@pytest.mark.parametrize("preset", ["four-step-lora", "one-step", "table4-no-gan"])
def test_random_weights_need_no_data(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdxl, "SDXL_UNET", SDXL_UNET)
    out = tmp_path / "run"
    options = ["--preset", preset, "--random-init", "--resolution", "64"]
    options += ["--batch-size", "1", "--iterations", "5", "--precision", "bf16"]
    train(sdxl, *options, "--out", out, "--lora-rank", "4")
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["seconds_per_iteration"]) == {"generator_turn", "critic_turn"}
    # There are no prompts to make pictures of, and no pipeline to put a student in.
    assert not (out / "samples").exists()
    assert (out / "student").exists() == (preset == "four-step-lora")


def test_the_networks_at_full_size_have_the_released_numbers_of_parameters() -> None:
    import text_models
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in UNet2DConditionModel(**config).parameters())
            for config in (text_models.SD15_UNET, text_models.SDXL_UNET)
        ]
    assert counts == [859_520_964, 2_567_463_684]


def test_an_official_student_can_be_trained_on(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(
        folders["SDXL"], local_files_only=True
    )
    with torch.no_grad():
        for p in pipeline.unet.parameters():
            p.mul_(1.5)
    file = tmp_path / "dmd2_sdxl_4step_unet_fp16.bin"
    torch.save(pipeline.unet.half().state_dict(), file)
    run = TextDistillation(settings(sdxl, *data(folders), "--start-from", file), {})
    network: Any = run.networks.student.network
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(network.unet.state_dict()[name], value.float())


def lines(error: pytest.ExceptionInfo[SystemExit]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pretrained nowhere --prompts P --latents LXL", "--pretrained nowhere: it"),
        ("--pretrained SDXL --latents LXL", "--prompts: missing; what the student"),
        ("--pretrained SDXL --prompts P", "--latents: missing; --gan needs them"),
        (
            "--pretrained SDXL --prompts no.txt --latents LXL",
            "--prompts: no.txt; there",
        ),
        (
            "--pretrained SD15 --prompts P --latents L15",
            "recipe distils a StableDiffus",
        ),
        ("--pretrained SDXL --prompts P --latents L15", "--latents: folders:"),
        ("--pretrained SDXL --prompts P --latents P", "--latents: "),
        ("--pretrained SDXL --prompts J --latents LXL", "no column 'prompt'"),
        (
            "--pretrained SDXL --prompts P --latents LXL --resolution 128",
            "resolution 64",
        ),
        ("--pretrained SDXL --prompts P --latents LXL --resolution 60", "multiple of"),
        ("--pretrained SDXL --prompts P --released-prompts --latents LXL", "not be"),
        ("--preset one-step --pretrained SDXL --prompts P --latents LXL", "start-from"),
        ("--preset one-step-pretrain --pretrained SDXL", "--pairs: missing"),
        (
            "--preset one-step-pretrain --pretrained SDXL --pairs LXL --tiny-vae TINY",
            "expected noise and latents",
        ),
        ("--regression --pairs X --prompts P --latents LXL", "pre-training, which has"),
        ("--prompts P --no-gan --no-distribution-matching", "no loss at all"),
        ("--pretrained SDXL --prompts P --latents LXL --start-from x", "--start-from"),
        ("--pretrained SDXL --prompts P --latents LXL --batch-size 0", "expected >= 1"),
        ("--pretrained SDXL --prompts P --latents LXL --resume", "no checkpoint"),
        (
            "--pretrained SDXL --prompts P --latents LXL --times 999 749.5",
            "--times: time: got 749.5, expected a whole index",
        ),
    ],
)
def test_what_cannot_run_is_said_in_one_line(
    folders: dict[str, Path], tmp_path: Path, options: str, message: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a cat"}\n')
    names = {**folders, "J": rows}
    given = [str(names.get(word, word)) for word in options.split()]
    with pytest.raises(SystemExit) as error:
        train(sdxl, *given, "--out", tmp_path / "run")
    assert message in lines(error)


def test_without_torchvision_s_weights_a_file_is_asked_for(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "pairs"
    common: list[str | Path] = [folders["SDXL"], made, "--prompts", folders["P"]]
    pairs(*common, "--steps", "2", "--count", "2")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("lpips.LPIPS", offline)
    options: list[str | Path] = ["--preset", "one-step-pretrain", "--pairs", made]
    options += ["--pretrained", folders["SDXL"], "--tiny-vae", folders["TINY"]]
    with pytest.raises(SystemExit, match="name a file of it") as error:
        train(sdxl, *options, "--out", tmp_path / "run")
    lines(error)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_a_tiny_vae_that_cannot_be_read_is_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "pairs"
    common: list[str | Path] = [folders["SDXL"], made, "--prompts", folders["P"]]
    pairs(*common, "--steps", "2", "--count", "2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options: list[str | Path] = ["--preset", "one-step-pretrain", "--pairs", made]
    options += ["--pretrained", folders["SDXL"], "--local-files-only"]
    for name, end in ((str(made), ""), ("no/such", "; without a network, name a fo")):
        with pytest.raises(SystemExit, match=f"--tiny-vae: {name}; it ") as error:
            train(sdxl, *options, "--tiny-vae", name, "--out", tmp_path / "run")
        text = lines(error)
        assert ".." not in text
        assert end in text


def test_a_checkpoint_that_is_meant_is_named(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    common: list[str | Path] = ["--pretrained", folders["SD15"]]
    common += ["--prompts", folders["P"], "--iterations", "5"]
    first = tmp_path / "first"
    train(sd15, *common, "--out", first)
    for wrong in (first, first / "checkpoints", first / "student"):
        with pytest.raises(SystemExit, match="step-00000005 is meant") as error:
            train(sd15, *common, "--out", tmp_path / "x", "--start-from", wrong)
        lines(error)


def test_what_is_written_may_be_read_by_others(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        options = [*data(folders), "--preset", "four-step-lora", "--lora-rank", "2"]
        train(sdxl, *options, "--iterations", "1", "--out", tmp_path / "run")
        pairs(
            *(folders["SDXL"], tmp_path / "pairs", "--prompts", folders["P"]),
            *("--steps", "2", "--count", "1"),
        )
    finally:
        os.umask(before)
    written = [
        *(tmp_path / "run" / "student").iterdir(),
        *(tmp_path / "pairs").iterdir(),
    ]
    assert {path.suffix for path in written} >= {".safetensors", ".json"}
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {"0o644"}


def test_pairs_of_something_else_are_not_mixed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    common = [folders["SDXL"], tmp_path / "pairs", "--prompts", folders["P"]]
    common += ["--count", "2", "--steps", "2"]
    pairs(*common)
    with pytest.raises(SystemExit, match="was begun with") as error:
        pairs(*common, "--guidance-scale", "4")
    lines(error)
    with pytest.raises(SystemExit, match="--count: 0; expected >= 1"):
        pairs(*common, "--count", "0")


@pytest.mark.parametrize("module", [sdxl, sd15])
def test_help_and_unknown_options(
    module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (["--preset", "table5"], ["--gan-wieght", "1"]):
        with pytest.raises(SystemExit):
            parse(module.Settings, module.PRESETS, given)
        assert given[0].strip("-") in capsys.readouterr().err
    preset = list(module.PRESETS)[1]
    with pytest.raises(SystemExit):
        parse(module.Settings, module.PRESETS, ["--preset", preset, "--help"])
    text = capsys.readouterr().out
    assert "[scripts]" in text
    assert "F.4" in text or "F.3" in text
