"""Pipelines of diffusers as teachers, and students in pipelines."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from helpers_pipelines import save_sd15, save_sdxl
from helpers_script import as_in_a_script
from torch import Tensor

from dmdkit import (
    BackwardSimulator,
    ClassifierFreeGuidance,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    few_step_times,
    trainable_copy,
)
from dmdkit.adapters.conditions import TextCondition, TextPooledCondition
from dmdkit.adapters.folders import read_sidecar, require_replaceable
from dmdkit.adapters.pipelines import (
    encode_prompts,
    few_step_scheduler,
    has_own_times,
    save_pipeline,
    teacher_from_pipeline,
    unconditional_of,
)

PROMPTS = ["a cat", "two dogs on a very red chair"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("pipelines")
    return {"sd15": save_sd15(top / "sd15"), "sdxl": save_sdxl(top / "sdxl")}


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=generator)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_teacher_is_the_pipeline_s_unet(
    folders: dict[str, Path], kind: str
) -> None:
    pipeline = load(folders[kind])
    teacher = teacher_from_pipeline(pipeline)
    assert teacher.process == DiscreteVariancePreserving.scaled_linear()
    assert teacher.parameterization == EpsilonPrediction()
    x_t, t = latents(pipeline), torch.full((2,), 500.0)
    cond = encode_prompts(pipeline, PROMPTS)
    more: dict[str, Any] = {}
    if isinstance(cond, TextPooledCondition):
        more = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    epsilon = pipeline.unet(
        x_t, 500, encoder_hidden_states=cond.text, added_cond_kwargs=more
    ).sample
    alpha = pipeline.scheduler.alphas_cumprod[500].sqrt()
    sigma = (1 - alpha**2).sqrt()
    torch.testing.assert_close(
        teacher(x_t, t, cond), (x_t - sigma * epsilon) / alpha, rtol=1e-4, atol=1e-4
    )


def test_sd15_sees_the_last_hidden_states(folders: dict[str, Path]) -> None:
    pipeline = load(folders["sd15"])
    cond = encode_prompts(pipeline, PROMPTS)
    assert isinstance(cond, TextCondition)
    tokens = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    expected = pipeline.text_encoder(tokens.input_ids).last_hidden_state
    torch.testing.assert_close(cond.text, expected)
    nothing = unconditional_of(pipeline)(cond)
    empty = pipeline.tokenizer([""], padding="max_length", return_tensors="pt")
    expected = pipeline.text_encoder(empty.input_ids).last_hidden_state
    torch.testing.assert_close(nothing.text, expected.expand_as(cond.text))
    assert not nothing.text.equal(torch.zeros_like(nothing.text))


def test_sdxl_sees_the_last_but_one_of_both_encoders(
    folders: dict[str, Path],
) -> None:
    pipeline = load(folders["sdxl"])
    cond = encode_prompts(pipeline, PROMPTS, size=1024)
    assert isinstance(cond, TextPooledCondition)
    hidden = []
    for words, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        tokens = words(PROMPTS, padding="max_length", return_tensors="pt")
        output = encoder(tokens.input_ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    torch.testing.assert_close(cond.text, torch.cat(hidden, dim=-1))
    torch.testing.assert_close(cond.pooled, output.text_embeds)
    assert cond.time_ids is not None
    assert cond.time_ids.tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 2
    nothing = unconditional_of(pipeline)(cond)
    assert isinstance(nothing, TextPooledCondition)
    assert not nothing.text.any()
    assert not nothing.pooled.any()
    assert nothing.time_ids is not None
    assert nothing.time_ids.equal(cond.time_ids)
    # The UNet of 8 latent pixels was made for images of 64.
    small = encode_prompts(pipeline, ["a"])
    assert isinstance(small, TextPooledCondition)
    assert small.time_ids is not None
    assert small.time_ids[0, 0] == 8 * pipeline.vae_scale_factor


def test_a_guided_teacher_is_the_pipeline_with_that_guidance(
    folders: dict[str, Path],
) -> None:
    pipeline = load(folders["sdxl"])
    teacher = teacher_from_pipeline(pipeline)
    guided = ClassifierFreeGuidance(
        teacher, unconditional=unconditional_of(pipeline), scale=8.0
    )
    cond = encode_prompts(pipeline, PROMPTS)
    x_t, t = latents(pipeline), torch.full((2,), 999.0)
    nothing = unconditional_of(pipeline)(cond)
    expected = teacher(x_t, t, nothing) + 8 * (
        teacher(x_t, t, cond) - teacher(x_t, t, nothing)
    )
    torch.testing.assert_close(guided(x_t, t, cond), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_evenly_spaced_times_need_only_their_number(
    folders: dict[str, Path], n: int
) -> None:
    config = load(folders["sdxl"]).scheduler.config
    scheduler = few_step_scheduler(config, few_step_times(n))
    assert has_own_times(scheduler, few_step_times(n))
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == list(few_step_times(n))


def test_other_times_must_be_passed(folders: dict[str, Path]) -> None:
    config = load(folders["sdxl"]).scheduler.config
    assert not has_own_times(few_step_scheduler(config, (399,)), (399,))


READ_WITHOUT_DMDKIT = """
import sys
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipe.set_progress_bar_config(disable=True)
torch.manual_seed(0)
noise = torch.load(sys.argv[2])
call = eval(f"dict({sys.argv[3]})")
drawn = pipe(
    ["a cat", "two dogs on a very red chair"],
    latents=noise,
    guidance_scale=0,
    output_type="latent",
    generator=torch.Generator().manual_seed(7),
    **call,
).images
assert "dmdkit" not in sys.modules
torch.save(drawn, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("kind", "times", "call"),
    [
        ("sdxl", few_step_times(4), "num_inference_steps=4"),
        ("sdxl", (399,), "timesteps=[399]"),
        ("sd15", (999,), "num_inference_steps=1"),
    ],
)
def test_diffusers_alone_draws_the_student_s_samples(
    folders: dict[str, Path],
    tmp_path: Path,
    kind: str,
    times: tuple[float, ...],
    call: str,
) -> None:
    pipeline = load(folders[kind])
    student = trainable_copy(teacher_from_pipeline(pipeline)).requires_grad_(False)
    torch.manual_seed(3)
    for p in student.parameters():
        p.add_(0.02 * torch.randn_like(p))
    scheduler, unet = pipeline.scheduler, pipeline.unet
    save_pipeline(
        tmp_path / "student",
        pipeline,
        student,
        times=times,
        teacher="tiny/teacher",
        licence="openrail++",
        about={"iterations": 5},
    )
    assert pipeline.scheduler is scheduler
    assert pipeline.unet is unet
    noise = latents(pipeline)
    torch.save(noise, tmp_path / "latents.pt")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            READ_WITHOUT_DMDKIT,
            str(tmp_path / "student"),
            str(tmp_path / "latents.pt"),
            call,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = torch.load(tmp_path / "latents.pt")
    generator = torch.Generator().manual_seed(7)
    fresh = [torch.randn(noise.shape, generator=generator) for _ in times[1:]]
    expected = BackwardSimulator(times).sample(
        student, noise, encode_prompts(pipeline, PROMPTS), draws=fresh
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)

    sidecar = read_sidecar(tmp_path / "student")
    assert sidecar.times == times
    assert sidecar.process == student.process
    assert sidecar.about == {
        "teacher": "tiny/teacher",
        "licence": "openrail++",
        "iterations": 5,
    }
    card = (tmp_path / "student" / "README.md").read_text()
    assert call in card
    assert "inherit the terms of the teacher's: openrail++" in card
    assert isinstance(load(tmp_path / "student").scheduler, LCMScheduler)
    require_replaceable(tmp_path / "student")
    (tmp_path / "student" / "vae2").mkdir()
    with pytest.raises(ValueError, match="holds vae2"):
        require_replaceable(tmp_path / "student")


def test_what_is_no_pipeline_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    wrong: Any = "stabilityai/stable-diffusion-xl-base-1.0"
    with as_in_a_script(), pytest.raises(TypeError, match="pipeline: got str"):
        teacher_from_pipeline(wrong)
    pipeline = load(folders["sd15"])
    with as_in_a_script(), pytest.raises(TypeError, match="prompts: expected a list"):
        encode_prompts(pipeline, "a cat")
    with pytest.raises(ValueError, match="prompts: got none"):
        encode_prompts(pipeline, [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"holds other\.txt"):
        save_pipeline(
            tmp_path / "full",
            pipeline,
            teacher_from_pipeline(pipeline),
            times=(999,),
            teacher="t",
            licence="l",
        )
    assert (tmp_path / "full" / "other.txt").read_text() == "kept"
