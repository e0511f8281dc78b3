"""The emoji example: its data, its prompts, its networks and the whole of it, small."""

import json
import re
from pathlib import Path
from typing import Any

import emoji
import emoji_classifier
import emoji_data
import emoji_evaluation
import emoji_teacher
import numpy as np
import pytest
import torch
import tyro
from emoji_common import (
    CLASSIFIER_FILE,
    HERE,
    LATENT_SHAPE,
    MAX_WORDS,
    NAMES_FILE,
    PADDING,
    SHEET_FILE,
    START,
    TEACHER_FILE,
    Emoji,
    TextEncoder,
    Vocabulary,
    draw_captions,
    load_classifier,
    load_emoji,
    load_teacher,
    random_caption,
    to_images,
    to_latents,
)
from emoji_report import SHOWN, real_for
from safetensors.torch import load_file
from torch import Tensor, nn

from dmdkit import BackwardSimulator, Monitor
from dmdkit.adapters.folders import load_denoiser, read_sidecar

EMOJI = load_emoji()


with_teacher = pytest.mark.skipif(
    not TEACHER_FILE.is_file(),
    reason="the teacher has not been trained: python examples/emoji_teacher.py",
)


def image_of(name: str) -> Tensor:
    return EMOJI.images[EMOJI.names.index(name)]


def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(Vocabulary(EMOJI.names)).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_names_are_unique_and_each_has_a_picture() -> None:
    assert len(EMOJI.names) == len(set(EMOJI.names)) == len(EMOJI.images) == 459
    assert EMOJI.images.shape[1:] == (3, 32, 32)
    assert EMOJI.images.min() >= -1
    assert EMOJI.images.max() == 1
    assert (EMOJI.images.flatten(1).std(1) > 0.03).all()  # none is blank
    assert all(name == name.lower().strip() for name in EMOJI.names)
    assert max(len(name.split()) for name in EMOJI.names) <= MAX_WORDS


@pytest.mark.parametrize(
    ("name", "strongest"),
    [
        ("red apple", 0),
        ("tomato", 0),
        ("green apple", 1),
        ("broccoli", 1),
        ("blueberries", 2),
        ("water wave", 2),
    ],
)
def test_names_and_pictures_line_up(name: str, strongest: int) -> None:
    """The middle of a thing that is named after a colour has that colour."""
    colour = image_of(name)[:, 10:22, 10:22].mean((1, 2))
    assert int(colour.argmax()) == strongest
    assert colour[strongest] - colour.sum().sub(colour[strongest]) / 2 > 0.3


def test_a_sheet_comes_back_the_same(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    emoji_data.save_sheet(pictures, tmp_path / "s.png")
    (tmp_path / "n.txt").write_text("".join(f"name {i}\n" for i in range(50)))
    images, names = load_emoji(tmp_path / "s.png", tmp_path / "n.txt")
    assert names[49] == "name 49"
    back = ((images + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8)
    assert np.array_equal(back.numpy(), pictures)
    (tmp_path / "n.txt").write_text("only one\n")
    with pytest.raises(SystemExit, match=r"has 1 names, .* has 2x25 pictures; write"):
        load_emoji(tmp_path / "s.png", tmp_path / "n.txt")


def test_a_font_that_is_none_is_refused(tmp_path: Path) -> None:
    settings = emoji_data.Settings(tmp_path / "no.ttf")
    with pytest.raises(SystemExit, match="--font: there is no file"):
        emoji_data.main(settings)
    settings.font.write_text("no font")
    with pytest.raises(SystemExit, match="is no font with bitmaps of 109 pixels"):
        emoji_data.main(settings)


def test_latents_are_a_rearrangement_of_pixels() -> None:
    images = EMOJI.images[:4]
    latents = to_latents(images)
    assert latents.shape[1:] == LATENT_SHAPE
    assert torch.equal(to_images(latents), images)
    assert torch.equal(latents[:, 0], images[:, 0, ::2, ::2])
    assert torch.equal(latents[:, 11], images[:, 2, 1::2, 1::2])


def test_prompts_become_the_numbers_of_their_words() -> None:
    vocabulary = Vocabulary(["red heart", "green heart"])  # green, heart, red
    assert len(vocabulary) == 5
    tokens = vocabulary.tokens(["red heart", "", "heart"])
    assert tokens.shape == (3, MAX_WORDS + 1)
    assert tokens[0, :4].tolist() == [START, 4, 3, PADDING]
    assert tokens[1].tolist() == [START] + [PADDING] * MAX_WORDS
    assert tokens[2, :3].tolist() == [START, 3, PADDING]


def test_every_name_is_a_prompt() -> None:
    tokens = Vocabulary(EMOJI.names).tokens(EMOJI.names)
    assert len(tokens.unique(dim=0)) == len(EMOJI.names)


def test_a_prompt_is_neither_cut_nor_guessed() -> None:
    vocabulary = Vocabulary(EMOJI.names)
    with pytest.raises(ValueError, match="has 10 words, at most 9 fit; shorten it"):
        vocabulary.tokens(["rocket", "face " * 10])
    near = r"'appel' is no word .* such as .*apple"
    with pytest.raises(ValueError, match=near) as error:
        vocabulary.tokens(["red appel"])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"choose others\."):
        vocabulary.tokens(["0123456789"])


def test_a_caption_is_some_words_in_order() -> None:
    name = "smiling face with open mouth"
    captions = {random_caption(name, seeded(i)) for i in range(200)}
    assert "" not in captions
    assert {"face", name, "smiling face"} <= captions
    for caption in captions:
        rest = iter(name.split())
        for word in caption.split():  # each behind the one before
            assert next(other for other in rest if other == word)


def test_shares_of_captions_are_as_asked() -> None:
    names = ["alpha beta gamma delta epsilon"] * 4000
    captions = draw_captions(names, 0.3, seeded(), 0.1)
    empty = captions.count("") / 4000
    whole = captions.count(names[0]) / 4000
    # A subset of five words is all of them in (1 + 5 * 1 / 5) / 32 of cases.
    assert empty == pytest.approx(0.1, abs=0.02)
    assert whole == pytest.approx(0.9 * (0.7 + 0.3 * 2 / 32), abs=0.03)
    assert draw_captions(names[:9], 0.0, seeded()) == names[:9]


def test_the_encoder_tells_prompts_apart_and_the_same_alike() -> None:
    with torch.no_grad():
        together = encoder().encode(["face", "moon", "face"]).text
        alone = encoder().encode(["face"]).text
    assert together.shape == (3, MAX_WORDS + 1, 96)
    assert torch.equal(together[0], together[2])
    assert torch.allclose(together[:1], alone, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


@with_teacher
def test_guidance_is_given_the_encoded_empty_prompt() -> None:
    teacher = load_teacher()
    with torch.no_grad():
        cond = teacher.encoder.encode(["face", "moon"])
        empty = teacher.encoder.encode(["", ""])
    answered = teacher.empty_prompt()(cond)
    assert torch.allclose(answered.text, empty.text, atol=1e-5)
    assert torch.allclose(answered.pooled, empty.pooled, atol=1e-5)
    assert (answered.text - cond.text).abs().max() > 0.1


@with_teacher
def test_what_is_shipped_is_small_and_says_where_it_comes_from() -> None:
    limits = {TEACHER_FILE: 8, CLASSIFIER_FILE: 1, SHEET_FILE: 2.5}
    for file, megabytes in limits.items():
        assert file.stat().st_size <= megabytes * 1e6
        about = json.loads(file.with_suffix(".json").read_text())
        assert about["command"].startswith("python examples/emoji_")
    assert "SIL Open Font License" in SHEET_FILE.with_suffix(".json").read_text()
    parameters = sum(p.numel() for p in load_teacher().modules().parameters())
    assert parameters <= 3.9e6


def test_the_classifier_recognises_what_is_seen_differently() -> None:
    classifier = load_classifier()
    assert emoji_classifier.accuracy(classifier, EMOJI.images) > 0.98
    varied = emoji_classifier.seen_differently(EMOJI.images, seeded(5))
    assert emoji_classifier.accuracy(classifier, varied) > 0.8


@with_teacher
def test_the_shipped_teacher_draws_what_it_is_asked_for() -> None:
    guided, text_encoder = emoji_evaluation.guided_teacher(TEACHER_FILE, 2.0)
    draw = emoji_evaluation.teacher_draw(guided, 10)
    prompts = [SHOWN[i] for i in range(8)]
    images = emoji_evaluation.draw_many(draw, text_encoder, prompts, seed=0)
    ranked = load_classifier()(images).topk(5).indices.tolist()
    hits = [
        EMOJI.names.index(prompt) in five
        for prompt, five in zip(prompts, ranked, strict=True)
    ]
    assert sum(hits) >= 7  # 8 when it was shipped


def test_real_emoji_measure_as_real() -> None:
    evaluator = emoji_evaluation.Evaluator(encoder(), names=300)
    row = evaluator.real_row()
    assert row["top1"] > 0.98
    assert row["word"] > 0.98
    assert row["frechet"] == pytest.approx(0, abs=1e-6)
    shuffled = evaluator.of_names(EMOJI.images[evaluator.rows.flip(0)])
    assert shuffled["top1"] < 0.05  # others than were asked for
    assert shuffled["frechet"] == pytest.approx(0, abs=1e-6)  # but as real
    grey = evaluator.of_names(torch.zeros(300, 3, 32, 32))
    assert grey["frechet"] > 10


def test_words_are_judged_by_the_names_of_what_is_recognised() -> None:
    evaluator = emoji_evaluation.Evaluator(encoder(), names=300)
    cat = image_of("cat face")
    numbers = evaluator.of_words(cat.expand(len(evaluator.prompts), 3, 32, 32))
    fitting = {"cat", "face"} & set(evaluator.words)
    assert fitting
    assert numbers["word"] == pytest.approx(len(fitting) / len(evaluator.words))
    assert numbers["distinct"] == 1


def test_too_few_names_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"--names 64: expected 65 \.\.\. 459"):
        emoji_evaluation.Evaluator(encoder(), names=64)


def test_every_prompt_of_the_picture_has_a_real_emoji() -> None:
    for prompt in SHOWN:
        image = real_for(prompt, EMOJI)
        row = next(i for i, x in enumerate(EMOJI.images) if torch.equal(x, image))
        assert set(prompt.split()) <= set(EMOJI.names[row].split())
    with pytest.raises(ValueError, match="no emoji's name has the words of 'zzz'"):
        real_for("zzz", Emoji(EMOJI.images[:3], EMOJI.names[:3]))


SMALL = ["--iterations", "4", "--batch-size", "4", "--names", "65"]
SMALL += ["--evaluate-every", "2", "--critic-steps", "2", "--threads", "1"]


def settings(out: Path, *options: str) -> emoji.Settings:
    return tyro.cli(emoji.Settings, args=[*SMALL, "--out", str(out), *options])


@pytest.fixture(scope="module", autouse=True)
def less_to_measure() -> Any:
    """Fewer names, one noise seed and a teacher of two steps in the picture."""
    with pytest.MonkeyPatch.context() as patch:
        whole = emoji_evaluation.teacher_draw
        patch.setattr(emoji, "WATCHED_NAMES", 65)
        patch.setattr(emoji, "SEEDS", (1,))
        patch.setattr(emoji, "teacher_draw", lambda guided, _: whole(guided, 2))
        yield


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emoji")
    emoji.main(settings(out, "--steps", "2", "1"))
    return out


def student_weights(out: Path, steps: int) -> dict[str, Tensor]:
    student = out / f"steps-{steps}" / "student"
    return load_file(student / "diffusion_pytorch_model.safetensors")


@with_teacher
def test_the_example_writes_what_it_promises(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    calls = {name: row["calls"] for name, row in summary["rows"].items()}
    assert calls["real"] == 0
    assert "teacher, 50 steps" not in calls  # its shipped numbers are of 459 names
    assert calls["student, 2 calls"] == 2
    assert calls["student, 1 call"] == 1
    assert summary["generator_updates"] == 2
    assert summary["names"] == 65
    assert set(summary["train_seconds"]) == {"1", "2"}
    for picture in ("comparison.png", "curves.png"):
        assert (run_folder / picture).stat().st_size > 10_000
    lines = (run_folder / "steps-1" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    assert {"top1", "word", "gap"} <= set(json.loads(lines[-1]))


@with_teacher
def test_the_teacher_is_shown_by_numbers_that_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(emoji_evaluation.ROWS_FILE.read_text())["rows"]
    assert set(rows) == {"50", "4", "1"}
    assert emoji.rows_of_teacher(emoji.Settings(out=tmp_path)) == rows
    assert emoji.rows_of_teacher(settings(tmp_path, "--guidance", "7")) == {}
    shown = capsys.readouterr().out
    assert "guidance 7.0, not" in shown
    assert "names 65, not 459" in shown


@with_teacher
def test_the_student_has_moved_from_its_teacher(run_folder: Path) -> None:
    teacher = load_file(TEACHER_FILE)
    for steps in (1, 2):
        for name, weight in student_weights(run_folder, steps).items():
            assert not torch.equal(weight, teacher[f"unet.unet.{name}"].float()), name


@with_teacher
def test_a_killed_run_resumes_to_the_same_bits(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = emoji.Distillation.iterate

    def killed(self: Any, step: int, monitor: Monitor) -> dict[str, Tensor]:
        if step == 3:  # the last checkpoint is that of step 2
            raise KeyboardInterrupt
        return whole(self, step, monitor)

    monkeypatch.setattr(emoji.Distillation, "iterate", killed)
    with pytest.raises(KeyboardInterrupt):
        emoji.main(settings(tmp_path, "--steps", "2"))
    monkeypatch.setattr(emoji.Distillation, "iterate", whole)
    with pytest.raises(SystemExit, match="continue it with --resume"):
        emoji.main(settings(tmp_path, "--steps", "2"))
    with pytest.raises(SystemExit, match="was started with seed = 0, now it is 1"):
        emoji.main(settings(tmp_path, "--steps", "2", "--resume", "--seed", "1"))
    emoji.distil(settings(tmp_path, "--steps", "2", "--resume"), 2)
    uninterrupted = student_weights(run_folder, 2)
    resumed = student_weights(tmp_path, 2)
    assert all(torch.equal(uninterrupted[k], resumed[k]) for k in uninterrupted)


@with_teacher
def test_an_exported_student_draws_as_the_run_did(run_folder: Path) -> None:
    folder = run_folder / "steps-2" / "student"
    student, times = load_denoiser(folder), read_sidecar(folder).times
    assert times is not None
    assert times == (999.0, 499.0)
    teacher = load_teacher()
    with torch.no_grad():
        cond = teacher.encoder.encode(["face", "green apple"])
    noise = torch.randn(2, *LATENT_SHAPE, generator=seeded())
    simulator = BackwardSimulator(times)
    one = simulator.sample(student, noise, cond, generator=seeded(1))
    run = emoji.Distillation(settings(run_folder, "--resume"), 2)
    network = run.student.network
    assert isinstance(network, nn.Module)
    network.load_state_dict(
        {f"unet.{k}": v for k, v in student_weights(run_folder, 2).items()}
    )
    assert torch.equal(one, run.draw(noise, cond, seeded(1)))


@with_teacher
def test_prompts_are_drawn_from_an_exported_student(
    run_folder: Path, tmp_path: Path
) -> None:
    student = ["--student", str(run_folder / "steps-1" / "student")]
    emoji.main(settings(tmp_path, *student, "--prompts", "face", "green apple"))
    assert (tmp_path / "drawn.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match=r"--prompts: prompt: 'zzz' is no word"):
        emoji.main(settings(tmp_path, *student, "--prompts", "zzz"))
    with pytest.raises(SystemExit, match="--student: folder: there is no dmdkit"):
        emoji.main(settings(tmp_path, "--student", str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1", "1"], "name every number once"),
        (["--steps", "0"], r"expected numbers of 1 \.\.\. 1000"),
        (["--steps", "1001"], r"expected numbers of 1 \.\.\. 1000"),
        (["--learning-rate", "-1"], "--learning-rate -1.0: expected > 0"),
        (["--names", "20"], r"--names 20: expected 65 \.\.\. 459"),
        (["--batch-size", "0"], "--batch-size 0: expected >= 1"),
        (["--shortened", "1.5"], r"--shortened 1\.5: expected 0 \.\.\. 1"),
        (["--teacher", "no.safetensors"], "is missing: train it"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        emoji.main(settings(tmp_path, *options))


def test_a_teacher_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji_teacher.Training, "draw", lambda *_: None)

    def train(name: str, *options: str) -> dict[str, Tensor]:
        file = tmp_path / f"{name}.safetensors"
        args = ["--iterations", "2", "--batch-size", "2", "--evaluate-every", "1"]
        args += ["--file", str(file), "--out", str(tmp_path / name), *options]
        emoji_teacher.main(tyro.cli(emoji_teacher.Settings, args=args))
        return load_file(file)

    whole = train("whole")
    iterate = emoji_teacher.Training.iterate

    def killed(self: Any, step: int) -> None:
        if step == 1:
            raise KeyboardInterrupt
        iterate(self, step)

    monkeypatch.setattr(emoji_teacher.Training, "iterate", killed)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    monkeypatch.setattr(emoji_teacher.Training, "iterate", iterate)
    with pytest.raises(SystemExit, match="holds a run; continue it with --resume"):
        train("killed")
    resumed = train("killed", "--resume")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("module", [emoji, emoji_teacher, emoji_data])
def test_help_names_every_option(module: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(module.Settings, args=["--help"])
    assert stopped.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name in module.Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


def test_the_shipped_names_are_those_of_the_sheet() -> None:
    about = json.loads(SHEET_FILE.with_suffix(".json").read_text())
    lines = NAMES_FILE.read_text().splitlines()
    assert about["what"].startswith(f"{len(lines)} emoji")
    assert HERE == NAMES_FILE.parent
