"""`evaluate.py` with text-to-image models, and beside runs that go on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import digits
import evaluate_protocols
import evaluate_watch
import imagenet_edm
import open_clip
import pytest
import sdxl
import torch
import tyro
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from evaluate_protocols import PROTOCOLS
from evaluate_sets import open_sets
from evaluate_settings import Settings
from evaluate_text import pndm
from evaluate_watch import Run, export
from helpers_evaluate import read, refused, run, save_photos
from helpers_pipelines import SCHEDULE, save_latents, save_prompts, save_sd15, save_sdxl
from helpers_recipes import save_digit_images, save_digits_teacher
from PIL import Image
from runs import parse
from safetensors.torch import load_file
from torch import Tensor

from dmdkit import ClassifierFreeGuidance, LPIPSDistance, checkpoints
from dmdkit.adapters.pipelines import (
    encode_prompts,
    save_pipeline,
    teacher_from_pipeline,
    unconditional_of,
)
from dmdkit.metrics import CLIPScoreProtocol, DiversityProtocol, Step, lanczos_resize

PROMPTS = ["a cat", "two dogs", "a hat"]
FAST = ["--device", "cpu", "--local-files-only"]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers sd15 and sdxl, a student of sd15, prompts."""
    top = tmp_path_factory.mktemp("models")
    save_sdxl(top / "sdxl")
    pipeline = load(save_sd15(top / "sd15"))
    student = teacher_from_pipeline(pipeline)
    told = {"times": (999.0,), "teacher": "tiny", "licence": "none"}
    save_pipeline(top / "student", pipeline, student, **told)
    (top / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return top


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(*options: str | Path | float) -> tuple[Any, Tensor]:
    """The model, and images 0 and 1 of its first set."""
    told = tyro.cli(Settings, args=[*FAST, *map(str, options)])
    model, sets = open_sets(told, [])
    images: Any = sets[0].images(range(2))
    return model, images.int()


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


def as_diffusers(pipeline: Any, steps: int, guidance: float) -> Tensor:
    """What diffusers' own pipeline draws from the same noise."""
    made = pipeline(
        PROMPTS[:2],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators(),
        output_type="pt",
    )
    return (made.images * 255).round().int()


# The paper's teachers


@pytest.mark.parametrize(
    ("sampler", "kind", "calls"),
    [("sd15-pndm", PNDMScheduler, 14), ("sd15-ddpm", DDPMScheduler, 12)],
)
def test_sd15_s_baselines_are_diffusers_own(
    top: Path, sampler: str, kind: Any, calls: int
) -> None:
    pipeline = load(top / "sd15")
    assert isinstance(pipeline, StableDiffusionPipeline)
    is_pndm = "pndm" in sampler
    own = {"skip_prk_steps": True} if is_pndm else {"clip_sample": False}
    pipeline.register_modules(scheduler=kind(**SCHEDULE, **own))
    options = ["--latency", 1, "--prompt-file", top / "prompts.txt"]
    options += ["--teacher", top / "sd15", "--sampler", sampler, "--steps", 6]
    model, images = drawn(*options)
    expected = as_diffusers(pipeline, 6, 3.0 if is_pndm else 2.0)
    assert (images - expected).abs().max() <= 1
    assert images.float().std() > 5
    assert model.calls == calls


def test_pndm_of_a_teacher_that_predicts_anything(top: Path) -> None:
    """The latents themselves, before the decoder and its rounding."""
    pipeline = load(top / "sd15")
    pipeline.register_modules(scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True))
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators()])
    teacher = teacher_from_pipeline(pipeline)
    guided = ClassifierFreeGuidance(teacher, unconditional_of(pipeline), 3.0)
    cond = encode_prompts(pipeline, PROMPTS[:2])
    with torch.no_grad():
        found = pndm(guided, pipeline.scheduler.config, 5, noise, cond)
    expected = pipeline(
        PROMPTS[:2],
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_sdxl_s_baselines(top: Path) -> None:
    options = ["--latency", 1, "--prompt-file", top / "prompts.txt", "--teacher"]
    for name, scale in (("sdxl-cfg6", 6.0), ("sdxl-cfg8", 8.0)):
        given = [*options, top / "sdxl", "--steps", 2]
        model, images = drawn(*given, "--sampler", name)
        assert model.calls == 4
        assert f"guidance {scale:g}" in model.about["sampler"]
        assert torch.equal(images, drawn(*given, "--guidance", scale)[1])
    given = ["--device", "cpu", *options]
    refused("--sampler sd15-pndm: not for a StableDiffusionXL", *given, top / "sdxl",
            "--sampler", "sd15-pndm")  # fmt: skip
    refused("--sampler: heun draws from classes", *given, top / "sdxl",
            "--sampler", "edm-ode")  # fmt: skip
    refused("it is a student; give it as --student", *given, top / "student")


# CLIP score and diversity


@pytest.fixture
def tiny_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CLIP of random weights, under the protocol's name."""
    vision = {"image_size": 224, "layers": 1, "width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32}
    config = {
        "embed_dim": 16,
        "vision_cfg": {**vision, "head_width": 16, "patch_size": 32},
        "text_cfg": {**text, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    protocol = CLIPScoreProtocol("clip_score", "tiny-clip", "random", samples=3)
    monkeypatch.setitem(PROTOCOLS, "clip_score", protocol)
    return tmp_path / "clip.pt"


def test_clip_score_of_images_and_of_a_student(
    top: Path, tmp_path: Path, tiny_clip: Path
) -> None:
    protocol: Any = PROTOCOLS["clip_score"]
    common = ["--device", "cpu", "--protocol", "clip_score", "--weights", "clip"]
    common += [tiny_clip, "--json", tmp_path / "r.json"]
    run(*common, "--student", top / "student", "--prompt-file", top / "prompts.txt")
    content = read(tmp_path / "r.json")
    result = content["results"]["clip_score"]
    assert (result["samples"], result["comparable"]) == (3, True)
    assert content["networks"][0]["checksum"] is not None

    options = ["--latency", 1, "--student", top / "student", "--prompt-file"]
    told = tyro.cli(Settings, args=[*FAST, *map(str, [*options, top / "prompts.txt"])])
    pixels: Any = open_sets(told, [])[1][0].images(range(3))
    scores = protocol.scores(pixels, PROMPTS, protocol.network(tiny_clip))
    assert result["single"] == pytest.approx(scores.mean().item(), rel=1e-5)

    # The same images from a folder, by its own prompts and by a file of them.
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i, image in enumerate(pixels):
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{i:06d}.png")
        lines.append(json.dumps({"file": f"{i:06d}.png", "prompt": PROMPTS[i]}))
    refused("--prompt-file: missing; clip_score compares", *common, "--images", folder)
    run(*common, "--images", folder, "--prompt-file", top / "prompts.txt")
    by_file = read(tmp_path / "r.json")["results"]["clip_score"]["single"]
    (folder / "prompts.jsonl").write_text("\n".join(reversed(lines)))
    run(*common, "--images", folder)
    by_folder = read(tmp_path / "r.json")["results"]["clip_score"]["single"]
    assert by_file == by_folder == pytest.approx(result["single"], rel=1e-5)

    (tmp_path / "two.txt").write_text("a\nb\n")
    more = ["--images", folder, "--prompt-file"]
    refused(
        "--prompt-file: 2 prompts for 3 images, .* images without prompts",
        *[*common, *more, tmp_path / "two.txt"],
    )
    (tmp_path / "two.txt").write_text("a\nb\nc\nd\n")
    refused("there are prompts without images", *common, *more, tmp_path / "two.txt")
    refused("--prompt-file: path: there is no", *common, *more, tmp_path / "x.txt")
    (folder / "prompts.jsonl").write_text("\n".join(lines[:2]))
    refused("has no prompt for 000002.png and 0", *common, "--images", folder)
    (folder / "000002.png").unlink()
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    refused("no image for the prompt of 000002.png", *common, "--images", folder)
    student = ["--student", top / "student", "--prompt-file", top / "prompts.txt"]
    refused("--count 4: --prompt-file has 3 prompts", *common, *student, "--count", 4)
    missing = ["--student", top / "student"]
    refused("--prompt-file: missing; .* draws from prompts", *common, *missing)


def test_diversity_of_images_of_a_prompt(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    file = tmp_path / "squeeze.pth"
    torch.save(squeezenet1_1(weights=None).features.state_dict(), file)
    protocol = DiversityProtocol(
        prompts=3, prepare=(Step(lanczos_resize, 64),), backbone="squeeze"
    )
    monkeypatch.setitem(PROTOCOLS, "lpips_diversity", protocol)
    common = ["--device", "cpu", "--protocol", "lpips_diversity", "--weights", "lpips"]
    common += [file, "--json", tmp_path / "r.json"]
    student = ["--student", top / "student", "--prompt-file", top / "prompts.txt"]
    run(*common, *student)
    result = read(tmp_path / "r.json")["results"]["lpips_diversity"]
    told = tyro.cli(
        Settings, args=[*FAST, "--latency", "1", *map(str, student), "--count", "3"]
    )
    measure = evaluate_protocols.Diversity(protocol, LPIPSDistance("squeeze", file))
    sets = open_sets(replace(told, count=None), [measure])[1]
    assert sets[0].count == 12
    assert [sets[0].prompts_of(range(12))[i] for i in (0, 3, 4, 11)] == [
        *(PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2])
    ]
    expected = [
        protocol.score(sets[0].images(range(i, i + 4)), measure.network)
        for i in (0, 4, 8)
    ]
    assert result["single"] == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert (result["samples"], result["comparable"]) == (3, True)
    refused("--batch-size 6: expected a multiple of 4", *common, *student,
            "--batch-size", 6)  # fmt: skip
    images = save_photos(tmp_path / "images", 5, (64, 64))
    refused("--images: 5 images, expected 4 of each", *common, "--images", images)


# Watching a run

SMALL = "--iterations 6 --batch-size 8 --samples 80 --evaluate-every 3".split()


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "demo"
    digits.main(tyro.cli(digits.Settings, args=[*SMALL, "--out", str(out)]))
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_watching_ends_with_the_run(
    digits_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["--protocol", "digits", "--count", 80, "--seeds", 0, "--device", "cpu"]
    command = [*common, "--watch", digits_run, "--watch-every", 0.01]
    run(*command)
    lines = read_lines(digits_run)
    assert [line["step"] for line in lines] == [3, 6]
    assert not any(line["comparable"] for line in lines)
    with Image.open(digits_run / "evaluation.png") as picture:
        assert picture.size[0] > 500
    assert not (digits_run / ".watched").exists()
    # The last checkpoint is the student that the run exported.
    run(*common, "--student", digits_run / "student", "--json", tmp_path / "r.json")
    content = read(tmp_path / "r.json")
    assert content["results"]["digits"]["single"] == lines[1]["digits"]
    assert content["model"]["weights"] == lines[1]["weights"]
    assert "The run has ended; 2 checkpoints" in capsys.readouterr().out
    # Nothing is measured twice, nor put beside numbers of something else.
    run(*command)
    assert read_lines(digits_run) == lines
    refused(
        "--watch: .* has numbers of labels = balanced, now it is random",
        *[*command, "--labels", "random"],
    )


def read_lines(out: Path) -> list[dict[str, Any]]:
    text = (out / "evaluation.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_watching_waits_and_gives_up(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that writes a checkpoint while it is watched, loses one, then stops."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "settings.json").write_bytes((digits_run / "settings.json").read_bytes())
    first, last = checkpoints(digits_run / "checkpoints")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            (out / "checkpoints" / last.name).symlink_to(last)
        if len(slept) == 3:
            (out / "checkpoints" / first.name).symlink_to(first)
            monkeypatch.setattr(evaluate_watch, "keep_checkpoint", removed)
        if len(slept) > 4:
            monkeypatch.setattr(evaluate_watch.time, "monotonic", lambda: 1e12)

    def removed(*_: Any) -> Path:
        raise FileNotFoundError("gone")

    monkeypatch.setattr(evaluate_watch.time, "sleep", sleep)
    common = ["--protocol", "digits", "--count", 80, "--seeds", 0, "--device", "cpu"]
    run(*common, "--watch", out, "--watch-every", 7, "--watch-timeout", 100)
    assert set(slept) == {7}
    assert [line["step"] for line in read_lines(out)] == [6]
    said = capsys.readouterr().out
    assert "Step 3: its run has removed it before it could be read" in said
    assert "No new checkpoint for" in said
    assert "The run goes on, or was stopped; 1 checkpoints" in said


def test_students_of_checkpoints_are_those_exported(tmp_path: Path) -> None:
    """Averages of weights, for classes."""
    teacher = save_digits_teacher(tmp_path / "teacher")
    images = save_digit_images(tmp_path / "images", side=8, channels=1)
    given = "--workers 0 --device cpu --precision fp32 --iterations 6 --batch-size 2"
    options = ["--teacher", teacher, "--images", images, "--out", tmp_path / "run"]
    options += ["--ema", "0.5", "--learning-rate", "1e-3", "--student-warmup", "0"]
    told = [*given.split(), *map(str, options)]
    imagenet_edm.main(parse(imagenet_edm.Settings, imagenet_edm.PRESETS, told))
    found = Run(tmp_path / "run")
    (checkpoint,) = found.checkpoints()
    export(found, checkpoint, tmp_path / "student")
    one, other = weights(tmp_path / "student"), weights(tmp_path / "run" / "student")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(
        not torch.equal(value, load_file(teacher / WEIGHTS)[name])
        for name, value in one.items()
    )
    assert (tmp_path / "student" / "dmdkit.json").is_file()


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("lora", ["none", "both"])
def test_text_students_of_checkpoints(tmp_path: Path, top: Path, lora: str) -> None:
    save_latents(tmp_path / "latents", top / "sdxl")
    save_prompts(tmp_path / "p.txt")
    given = "--workers 0 --device cpu --precision fp32 --iterations 1 --batch-size 2"
    options = ["--pretrained", top / "sdxl", "--prompts", tmp_path / "p.txt"]
    options += ["--latents", tmp_path / "latents", "--out", tmp_path / "run"]
    options += ["--learning-rate", "1e-3", "--lora", lora, "--lora-rank", 2]
    told = [*given.split(), *map(str, options)]
    sdxl.main(parse(sdxl.Settings, sdxl.PRESETS, told))
    found = Run(tmp_path / "run")
    (checkpoint,) = found.checkpoints()
    student = tmp_path / "student"
    export(found, checkpoint, student)
    file = "pytorch_lora_weights.safetensors" if lora == "both" else f"unet/{WEIGHTS}"
    one, other = load_file(student / file), load_file(found.folder / "student" / file)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    settings = Settings(protocol=("coco10k_512",), watch=found.folder)
    told = evaluate_watch.student_settings(settings, found, student)
    assert told.lora == (student if lora == "both" else None)
    assert told.student == str(top / "sdxl" if lora == "both" else student)


def test_runs_that_cannot_be_watched(tmp_path: Path) -> None:
    command = ["--device", "cpu", "--protocol", "digits", "--watch", tmp_path]
    for content, match in (
        ({"colour": 1}, "of no recipe that this can read: digits, Im"),
        ({"teacher": None, "random_init": True}, r"is of random weights \(--random"),
    ):
        (tmp_path / "settings.json").write_text(json.dumps(content))
        refused(f"--watch: .* {match}", *command)
