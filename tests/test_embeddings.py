"""Stored text embeddings: a training with them is the training without."""

from pathlib import Path
from typing import Any

import prepare_embeddings as script
import pytest
import sd15
import sdxl
import torch
from embeddings import Embedded, WithEmbeddings, encoders_digest
from helpers_pipelines import save_latents, save_prompts, save_sd15, save_sdxl
from runs import parse
from text_models import open_pipeline
from text_to_image import TextDistillation
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dmdkit.data import ShardedTensors, read_prompts

models = pytest.mark.parametrize("model", ["sd15", "sdxl"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("embeddings")
    save_prompts(top / "prompts.txt")
    for model, save in (("sd15", save_sd15), ("sdxl", save_sdxl)):
        save_latents(top / f"{model}-latents", save(top / model))
        prepare(top, model, "prompts", "--prompts", top / "prompts.txt")
        prepare(top, model, "captions", "--latents", top / f"{model}-latents")
    return top


def prepare(top: Path, model: str, name: str, *more: Any) -> None:
    import tyro

    given = [top / model, top / f"{model}-{name}", *more, "--dtype", "fp32"]
    given += ["--batch-size", "4", "--shard-size", "5", "--device", "cpu"]
    script.main(tyro.cli(script.Settings, args=[str(value) for value in given]))


def build(top: Path, model: str, *options: Any) -> TextDistillation:
    module: Any = {"sd15": sd15, "sdxl": sdxl}[model]
    given = ["--pretrained", top / model, "--gan", "--precision", "fp32"]
    given += ["--batch-size", "2", "--workers", "0", "--device", "cpu"]
    if "--released-prompts" not in options:
        given += ["--prompts", top / "prompts.txt"]
    given += ["--latents", top / f"{model}-latents", *options]
    chosen = parse(module.Settings, module.PRESETS, [str(value) for value in given])
    chosen.check()
    return TextDistillation(chosen, {})


def stored(top: Path, model: str) -> list[Any]:
    given = ["--embeddings", top / f"{model}-prompts"]
    return [*given, "--latent-embeddings", top / f"{model}-captions"]


@models
def test_batches_and_pictures_are_those_of_the_encoders(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = build(folder, model)
    ours = build(folder, model, *stored(folder, model))

    def refuse(*_: Any) -> Any:
        raise AssertionError("a text was encoded")

    monkeypatch.setattr(ours, "encode", refuse)
    for _ in range(3):
        for a, b in zip(
            tree_leaves(ours.draw()), tree_leaves(usual.draw()), strict=True
        ):
            if isinstance(a, Tensor):
                # The encoders saw other batches.
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            else:
                assert a is b is None
    pictures = ours.samples(), usual.samples()
    assert pictures[0] is not None
    assert pictures[1] is not None
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)
    assert ours.iterate(0).keys() == usual.iterate(0).keys()


def test_captions_alone_serve_where_they_are_drawn(folder: Path) -> None:
    options = ["--released-prompts", "--latent-embeddings", folder / "sdxl-captions"]
    run, usual = build(folder, "sdxl", *options), build(folder, "sdxl", options[0])
    ours, theirs = run.draw(), usual.draw()
    for name in ("cond", "latent_cond"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_interrupted_preparation_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sdxl").symlink_to(folder / "sdxl")
    encode: Any = script.encode_prompts
    seen: list[str] = []

    def dies(pipeline: Any, prompts: list[str]) -> Any:
        seen.extend(prompts)
        if len(seen) > 5 and len(seen) <= 8:
            raise KeyboardInterrupt
        return encode(pipeline, prompts)

    monkeypatch.setattr(script, "encode_prompts", dies)
    prompts = save_prompts(tmp_path / "p.txt", count=12)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, "sdxl", "prompts", "--prompts", prompts)
    prepare(tmp_path, "sdxl", "prompts", "--prompts", prompts)
    shards = ShardedTensors(tmp_path / "sdxl-prompts")
    assert [shards[i]["prompts"] for i in range(len(shards))] == list(
        read_prompts(prompts)
    )


def test_embeddings_of_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(str(folder / "sdxl"), "pretrained")
    digest, texts = encoders_digest(pipeline), read_prompts(folder / "prompts.txt")
    kept = folder / "sdxl-prompts"
    assert isinstance(WithEmbeddings(texts, kept, digest)[2], Embedded)
    with pytest.raises(ValueError, match="is of other text encoders than the teacher"):
        WithEmbeddings(texts, kept, "sha256:0")
    with pytest.raises(ValueError, match="holds no text embeddings, but"):
        WithEmbeddings(texts, folder / "sdxl-latents", digest)
    with pytest.raises(ValueError, match="holds 6 embeddings for 4 texts"):
        WithEmbeddings(list(texts)[:4], kept, digest)
    other = [*list(texts)[:5], "another"]
    with pytest.raises(ValueError, match="embedding 5 is of 'prompt number 5', the te"):
        WithEmbeddings(other, kept, digest)[5]
    with pytest.raises(
        SystemExit, match=r"--latent-embeddings: .* 6 embeddings for 12"
    ):
        build(folder, "sdxl", "--embeddings", kept, "--latent-embeddings", kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embeddings", "."], "embeddings of some texts, but not of others"),
        (["--embeddings", "nowhere"], "--embeddings: nowhere; there is no such file"),
    ],
)
def test_settings_that_do_not_go_together(
    folder: Path, options: list[Any], message: str
) -> None:
    if options[1] == "nowhere":
        options = [*options, "--latent-embeddings", "."]
    with pytest.raises(SystemExit, match=message):
        build(folder, "sdxl", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompts, --latents: give one of them"),
        (["--prompts", "p.txt", "--latents", "l"], "--prompts, --latents: give one"),
        (["--prompts", "p.txt", "--batch-size", "0"], "--batch-size: 0; expected >= 1"),
    ],
)
def test_a_preparation_that_cannot_run(options: list[str], message: str) -> None:
    import tyro

    given = ["pipeline", "out", *options]
    with pytest.raises(SystemExit, match=message):
        script.main(tyro.cli(script.Settings, args=given))
