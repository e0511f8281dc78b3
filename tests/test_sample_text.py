"""`sample.py` with text: students, teachers, LoRAs and releases of tiny pipelines."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample
import torch
import tyro
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from helpers_pipelines import SCHEDULE, save_sd15, save_sdxl
from helpers_recipes import save_digits_teacher
from labelled_grid import FONT, labelled_grid, wrap
from PIL import Image, ImageFont
from torch import Tensor

from dmdkit import BackwardSimulator, ScoreEstimator, trainable_copy
from dmdkit.adapters.lora import LoRANetwork
from dmdkit.adapters.lora_files import save_lora
from dmdkit.adapters.pipelines import (
    encode_prompts,
    save_lora_student,
    save_pipeline,
    teacher_from_pipeline,
)
from dmdkit.data import read_prompts

PROMPTS = ["a cat", "two dogs"]
TIMES = (999.0, 749.0, 499.0, 249.0)
FEWER = (999.0, 499.0)
TOLD: dict[str, Any] = {"teacher": "tiny", "licence": "none"}
FIGURES = Path(__file__).parents[1] / "examples" / "prompts"


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def disturbed(pipeline: Any, seed: int, scale: float = 0.02) -> ScoreEstimator:
    """A student: the teacher with other weights."""
    student = trainable_copy(teacher_from_pipeline(pipeline)).requires_grad_(False)
    torch.manual_seed(seed)
    for p in student.parameters():
        p.add_(scale * torch.randn_like(p))
    return student


def adapted(pipeline: Any, seed: int = 0) -> ScoreEstimator:
    """A LoRA student of another rank than the official one."""
    base = teacher_from_pipeline(pipeline).requires_grad_(False)
    network = LoRANetwork(base.network, rank=3, alpha=2, targets=("to_q", "conv1"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return ScoreEstimator(network, base.process, base.parameterization).eval()


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers sd15, sdxl, students of both, one of them of two steps, a LoRA."""
    top = tmp_path_factory.mktemp("text")
    for kind, save in (("sd15", save_sd15), ("sdxl", save_sdxl)):
        pipeline = load(save(top / kind))
        folder = top / f"{kind}-student"
        save_pipeline(folder, pipeline, disturbed(pipeline, 3), times=TIMES, **TOLD)
    save_pipeline(
        top / "two" / "sdxl-student",
        pipeline,
        disturbed(pipeline, 4),
        times=FEWER,
        **TOLD,
    )
    save_lora_student(top / "lora", adapted(pipeline), times=FEWER, **TOLD)
    return top


def draw(*options: str | Path | int) -> None:
    settings = tyro.cli(sample.Settings, args=list(map(str, options)))
    sample.main(settings)


def pngs(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(f)) for f in files]).astype(int)


def noise(seeds: list[int], side: int = 8, count: int = 1) -> list[Tensor]:
    """What the images of these seeds are drawn from, one after the other."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [
        torch.stack([torch.randn(4, side, side, generator=g) for g in generators])
        for _ in range(count)
    ]


@torch.no_grad()
def to_png(pipeline: Any, latents: Tensor) -> np.ndarray:
    """What diffusers makes of latents: uint8 [b, h, w, 3]."""
    images = pipeline.vae.decode(latents / pipeline.vae.config["scaling_factor"]).sample
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return (images * 255).round().astype(int)


def student_by_hand(folder: Path, seeds: list[int], prompts: list[str]) -> np.ndarray:
    pipeline = load(folder)
    student = teacher_from_pipeline(pipeline)
    first, *fresh = noise(seeds, count=len(TIMES))
    cond = encode_prompts(pipeline, prompts)
    latents = BackwardSimulator(TIMES).sample(student, first, cond, draws=fresh)
    return to_png(pipeline, latents)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_student_s_images_are_backward_simulation_s(
    top: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = top / f"{kind}-student", tmp_path / "out"
    common = [folder, "--prompts", *PROMPTS, "--images-per-prompt", 3, "--seed", 5]
    draw(*common, "--out", out, "--grid", tmp_path / "grid.png")
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    expected = student_by_hand(folder, list(range(5, 11)), repeated)
    assert np.abs(pngs(out) - expected).max() <= 1  # sums have another order
    assert expected.std() > 10
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(6)), "prompts.jsonl"]
    lines = (out / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": f"{i:06d}.png", "prompt": repeated[i], "seed": 5 + i} for i in range(6)
    ]
    assert list(read_prompts(out / "prompts.jsonl")) == repeated
    # Rows of the grid are prompts, columns images of one.
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    for i, image in enumerate(pngs(out)):
        y, x = 2 + i // 3 * 66, 2 + i % 3 * 66
        assert np.array_equal(grid[y : y + 64, x : x + 64], image)
    said = "by 4 steps; its prompts, a row each:\n   1  a cat\n   2  two dogs\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("prompts", "each"), [(5, 1), (1, 5)])
def test_what_would_be_one_row_or_column_is_a_block(
    top: Path, tmp_path: Path, prompts: int, each: int
) -> None:
    given = [f"prompt {i}" for i in range(prompts)]
    common = [top / "sd15-student", "--prompts", *given, "--images-per-prompt", each]
    draw(*common, "--grid", tmp_path / "grid.png", "--out", tmp_path / "out")
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    for i, image in enumerate(pngs(tmp_path / "out")):
        y, x = 2 + i // 3 * 66, 2 + i % 3 * 66
        assert np.array_equal(grid[y : y + 64, x : x + 64], image)


@pytest.mark.parametrize("model", ["sdxl-student", "sdxl"])
def test_an_image_is_the_same_in_any_batch(
    top: Path, tmp_path: Path, model: str
) -> None:
    common = [top / model, "--prompts", "a", "b c", "d", "--images-per-prompt", "2"]
    common += ["--steps", "3"] if model == "sdxl" else []
    for size in (1, 4, 6):
        draw(*common, "--batch-size", size, "--out", tmp_path / str(size))
    one, four, six = (pngs(tmp_path / str(size)) for size in (1, 4, 6))
    assert max(np.abs(one - four).max(), np.abs(one - six).max()) <= 1
    assert np.abs(one[0] - one[1]).max() > 10  # one prompt, two seeds


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_teacher_s_images_are_those_of_diffusers_pipeline(
    top: Path, tmp_path: Path, kind: str
) -> None:
    draw(top / kind, "--prompts", *PROMPTS, "--steps", 5, "--out", tmp_path / "out")
    pipeline = load(top / kind)
    pipeline.scheduler = EulerDiscreteScheduler(**SCHEDULE)
    latents = pipeline(
        PROMPTS, latents=noise([0, 1])[0], num_inference_steps=5, output_type="latent"
    ).images
    assert np.abs(pngs(tmp_path / "out") - to_png(pipeline, latents)).max() <= 1
    # Guidance is that pipeline's own default.
    draw(top / kind, "--prompts", *PROMPTS, "--steps", 5, "--out", tmp_path / "other")
    options = ["--guidance", 1, "--steps", 5, "--out", tmp_path / "unguided"]
    draw(top / kind, "--prompts", *PROMPTS, *options)
    assert np.abs(pngs(tmp_path / "out") - pngs(tmp_path / "unguided")).max() > 2


def test_times_make_a_student_of_a_teacher_s_pipeline(
    top: Path, tmp_path: Path
) -> None:
    options = ["--times", *TIMES, "--prompts", *PROMPTS, "--out", tmp_path / "out"]
    draw(top / "sdxl", *options)
    expected = student_by_hand(top / "sdxl", [0, 1], PROMPTS)
    assert np.abs(pngs(tmp_path / "out") - expected).max() <= 1


def test_another_resolution(top: Path, tmp_path: Path) -> None:
    options = ["--prompts", "a", "--resolution", 96, "--out", tmp_path / "out"]
    draw(top / "sdxl-student", *options)
    pipeline = load(top / "sdxl-student")
    first, *fresh = noise([0], side=12, count=4)
    cond = encode_prompts(pipeline, ["a"], size=96)
    latents = BackwardSimulator(TIMES).sample(
        teacher_from_pipeline(pipeline), first, cond, draws=fresh
    )
    assert np.abs(pngs(tmp_path / "out") - to_png(pipeline, latents)).max() <= 1


def test_a_release_s_unet_takes_the_place_of_the_teacher_s(
    top: Path, tmp_path: Path
) -> None:
    unet = load(top / "sdxl-student").unet
    torch.save(unet.state_dict(), tmp_path / "release.bin")
    options = ["--unet", tmp_path / "release.bin", "--times", *TIMES]
    draw(top / "sdxl", *options, "--prompts", *PROMPTS, "--out", tmp_path / "out")
    expected = student_by_hand(top / "sdxl-student", [0, 1], PROMPTS)
    assert np.abs(pngs(tmp_path / "out") - expected).max() <= 1


def test_a_lora_student_on_its_teacher(top: Path, tmp_path: Path) -> None:
    pipeline = load(top / "sdxl")
    cond = encode_prompts(pipeline, PROMPTS)
    first, *fresh = noise([0, 1], count=2)
    student = adapted(pipeline)
    latents = BackwardSimulator(FEWER).sample(student, first, cond, draws=fresh)
    expected = to_png(pipeline, latents)
    for i, file in enumerate(("", "kohya.safetensors")):
        options = ["--lora", top / "lora" / file, "--prompts", *PROMPTS]
        draw(top / "sdxl", *options, "--out", tmp_path / str(i))
        assert np.abs(pngs(tmp_path / str(i)) - expected).max() <= 1
    network: Any = student.network
    elsewhere = save_lora(network, tmp_path / "release.safetensors")
    options = ["--lora", elsewhere, "--prompts", *PROMPTS, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"--lora: give the student's --times as well"):
        draw(top / "sdxl", *options)
    draw(top / "sdxl", *options, "--times", 999, 499)
    assert np.abs(pngs(tmp_path / "out") - expected).max() <= 1
    draw(top / "sdxl", "--times", 999, 499, *options[2:-1], tmp_path / "plain")
    assert np.abs(pngs(tmp_path / "plain") - expected).max() > 5


def test_half_precision_draws_about_the_same(top: Path, tmp_path: Path) -> None:
    for model, more in (("sdxl-student", []), ("sdxl", ["--steps", 3])):
        options = [top / model, "--prompts", *PROMPTS, *more, "--out"]
        draw(*options, tmp_path / f"{model}-fp32")
        draw(*options, tmp_path / f"{model}-bf16", "--precision", "bf16")
        gap = np.abs(
            pngs(tmp_path / f"{model}-fp32") - pngs(tmp_path / f"{model}-bf16")
        )
        assert 0 < gap.mean() < 3
    options = ["--lora", top / "lora", "--prompts", "a", "--precision", "bf16"]
    draw(top / "sdxl", *options, "--out", tmp_path / "lora-bf16")


def test_a_comparison_s_columns_are_the_models_own_images(
    top: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("caption,other\na cat,1\na very long name of a dog,2\n")
    prompts = ["--prompt-file", file, "--prompt-column", "caption", "--seed", 9]
    prompts += ["--images-per-prompt", 2]
    models = [top / "sdxl-student", top / "two" / "sdxl-student", top / "sdxl"]
    picture = tmp_path / "new" / "compare.png"
    draw(models[0], "--compare", *models[1:], *prompts, "--grid", picture, "--steps", 3)
    titles = capsys.readouterr().out
    first = f"{top.name}/sdxl-student"
    assert f"  {first}: 4 steps\n  two/sdxl-student: 2 steps\n" in titles
    assert "\n  sdxl: 3 steps, guidance 5\n" in titles
    canvas = np.asarray(Image.open(picture)).astype(int)
    rows: list[int] = []
    # Columns of 80 pixels, the narrowest that titles are given, after 160 of prompts.
    for i, model in enumerate(models):
        steps = ["--steps", 3] if model == models[2] else []
        draw(model, *prompts, *steps, "--out", tmp_path / f"single-{i}")
        left = 160 + 2 * 8 + i * (80 + 8)
        column = canvas[:, left : left + 64]
        tops = [
            y
            for y in range(len(canvas) - 63)
            for image in pngs(tmp_path / f"single-{i}")
            if np.array_equal(column[y : y + 64], image)
        ]
        assert len(tops) == 4
        assert tops == sorted(tops)
        rows = rows or tops
        assert tops == rows


def test_a_labelled_grid_never_cuts_text_or_pictures() -> None:
    columns = [torch.randint(256, (2, 3, 40, 32), dtype=torch.uint8) for _ in range(2)]
    words = "forty words are a lot for the label of one small row " * 4
    picture = labelled_grid(columns, ["one", "two"], [words, "short"])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    found = [
        [
            (y, x)
            for y in range(pixels.shape[1] - 39)
            for x in range(pixels.shape[2] - 31)
            if torch.equal(pixels[:, y : y + 40, x : x + 32], image)
        ]
        for column in columns
        for image in column
    ]
    assert [len(places) for places in found] == [1] * 4
    (a,), (b,), (c,), (d,) = found
    assert (a[0], b[0]) == (c[0], d[0])  # rows begin at one height
    assert (a[1], c[1]) == (b[1], d[1])  # columns at one distance
    assert b[0] - a[0] > 2 * 40  # the label needs more than its picture
    margin = pixels[:, :, : a[1] - 8]
    assert (margin[:, a[0] : b[0]] < 128).any()
    assert (pixels[:, -2:, : a[1]] == 255).all()


def test_lines_are_as_long_as_fits() -> None:
    font = ImageFont.truetype(FONT, 11)
    text = "the quick brown fox jumps over Donaudampfschifffahrtsgesellschaft dogs"
    lines = wrap(text, font, 100).split("\n")
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(
        font.getlength(f"{line} {after.split()[0]}") > 100
        for line, after in itertools.pairwise(lines[:3])
    )
    assert wrap("a\nb", font, 100) == "a\nb"


def test_the_paper_s_prompts_are_complete() -> None:
    found = {n: list(read_prompts(FIGURES / f"dmd2-figure{n}.txt")) for n in (1, 2, 11)}
    assert {n: len(prompts) for n, prompts in found.items()} == {1: 10, 2: 15, 11: 15}
    assert all(len(set(prompts)) == len(prompts) for prompts in found.values())
    assert "a squirrell driving a toy car" in found[2]  # as printed
    assert found[11][-1] == found[2][13] == "motion"
    assert found[1][5] == "a portrait of an old man"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_teacher(tmp_path_factory.mktemp("digits") / "digits")


ERRORS = [
    ("sdxl", "--prompts, --prompt-file: give one of them; "),
    ("sdxl --prompts a --prompt-file F", "give one of them, not both"),
    ("no/where", "no/where is a text-to-image pipeline, and no such folder here"),
    ("./nowhere/at/all --prompts a", "FOLDER ./nowhere/at/all: there is no such"),
    ("top --prompts a", "it has neither the model_index.json of a pipeline nor"),
    ("lora --prompts a", "it is a LoRA student; pass its teacher as FOLDER, and"),
    ("sdxl --prompts a --classes 1", "--classes: "),
    ("sdxl --prompts a --labels random", "is a text-to-image pipeline; this is for"),
    ("sdxl --prompts a --count 3", "--count: "),
    ("sdxl --prompts a --sampler heun", "--sampler: "),
    ("sdxl --prompts a --sampler sde", "--sampler: "),
    ("digits --prompts a", "--prompts: "),
    ("digits --guidance 2", "is a class-conditional model; this is for text-to-image"),
    ("sdxl --prompts a --unet U", "--unet: give the student's --times as well, such"),
    ("sdxl --prompts a --unet U.bin --times 999", "--unet: file: there is no file U"),
    ("sdxl --prompts a --lora U --times 999", "--lora: there is no file U"),
    ("sdxl --prompts a --unet U --lora U", "--lora, --unet: give one of them"),
    ("sdxl --prompts a --times 1000", "--times: time: got 1000.0, expected a whole"),
    ("sdxl --prompts a --times 249 499", "--times: times: got (249.0, 499.0)"),
    ("sdxl --prompts a --steps 1000", "--steps: got 1000, expected 1 ... 999"),
    ("sdxl --prompts a --steps 0", "--steps 0: expected >= 1"),
    ("sdxl --prompts a --images-per-prompt 0", "--images-per-prompt 0: expected"),
    ("sdxl --prompts a --images-per-prompt 1025", "are too many for a picture"),
    ("sdxl --prompts a --resolution 100", "--resolution 100: expected a multiple of"),
    ("sdxl --prompts a --prompt-column b", "--prompt-column: only a --prompt-file"),
    ("sdxl --prompt-file F --prompt-column b", "--prompt-column: only a"),
    ("sdxl --prompt-file T --prompt-column b", "--prompt-file: "),
    ("sdxl --prompt-file missing.txt", "--prompt-file: path: there is no file"),
    ("sdxl --prompts a --device cuda:9", "--device cuda:9: this machine has no"),
    ("sdxl-student --prompts a --guidance 2", "--guidance: no teacher is drawn from"),
    ("sdxl-student --prompts a --steps 2", "--steps: no teacher is drawn from"),
    ("sdxl --prompts a --compare top", "--compare {top}: it has neither"),
    ("sdxl --prompts a --compare digits", "--compare: only text-to-image pipelines"),
    ("digits --compare sdxl", "--compare: only text-to-image pipelines can be"),
    ("sdxl --prompts a --compare sd15 --out o", "--compare: it makes a picture; give"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=lambda x: x[:40])
def test_what_cannot_be_drawn_is_said_in_one_line(
    top: Path, digits: Path, tmp_path: Path, options: str, message: str
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "table.csv").write_text("prompt\na\n")
    names = {name: str(top / name) for name in ("sd15", "sdxl", "sdxl-student", "lora")}
    names |= {"top": str(top), "digits": str(digits)}
    names |= {"F": str(tmp_path / "prompts.txt"), "T": str(tmp_path / "table.csv")}
    given = [names.get(word, word) for word in options.split()]
    with pytest.raises(SystemExit) as error:
        draw(*given, "--grid", tmp_path / "grid.png")
    text = str(error.value)
    assert message.replace("{top}", str(top)) in text
    assert "\n" not in text
    assert not (tmp_path / "grid.png").exists()


def test_nothing_is_left_where_nothing_was_asked(top: Path, tmp_path: Path) -> None:
    """An image that is not finite, OUT that exists, a student without times."""
    out = tmp_path / "out"
    common = ["--prompts", "a", "--out", out]
    broken = load(top / "sdxl")
    broken.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(SystemExit, match="The image of seed 7 is not finite"):
        draw(tmp_path / "broken", *common, "--steps", 2, "--seed", 7)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(SystemExit, match=r"--out: .* exists; remove it"):
        draw(top / "sdxl-student", *common)
    with pytest.raises(SystemExit, match=r"--out x\.npz: expected a folder, for text"):
        draw(top / "sdxl-student", *common[:2], "--out", "x.npz")
    broken.scheduler = LCMScheduler.from_config(broken.scheduler.config)
    broken.save_pretrained(tmp_path / "few")
    with pytest.raises(SystemExit, match=r"its scheduler is a few-step student's, and"):
        draw(tmp_path / "few", "--prompts", "a", "--out", tmp_path / "other")


def test_a_missing_folder_beside_others_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(SystemExit, match="FOLDER demo/student: there is no such"):
        sample.kind_of("demo/student", "FOLDER")
    assert sample.kind_of("someone/student", "FOLDER") == "text"
