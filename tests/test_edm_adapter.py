"""EDM's ADM network in diffusers is the same function, whatever file it came from."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_edm
import pytest
import torch
import tyro
from diffusers.models.unets.unet_2d import UNet2DModel
from helpers_edm import ADM, IMAGENET64, File, Spec, State, random_state, write
from safetensors.torch import save_file
from torch import Tensor

from dmdkit import KarrasPreconditioning, VarianceExploding
from dmdkit.adapters.edm import (
    EDMCheckpoint,
    EDMSettings,
    edm_denoiser,
    edm_to_unet,
    edm_unet_config,
    file_sha256,
    imagenet64_unet,
    read_edm,
)
from dmdkit.adapters.folders import load_denoiser, read_sidecar

NETWORKS = {
    "one level": Spec(),
    "classes": Spec(8, (128, 128), classes=3, attends=(False, False)),
    "attention": Spec(8, (128, 256), 1, (False, True), classes=2, augment=9),
    "attention above": Spec(8, (128, 192), attends=(True, False), channels=1),
    "three levels": Spec(8, (128, 160, 64 * 3), 1, (False, False, True), augment=9),
    "two blocks": Spec(4, (128, 128), 2, (True, True), classes=4, augment=9),
}
networks = pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
SMALL = NETWORKS["classes"]


def inputs(spec: Spec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noisy images at four sigmas, and labels if there are classes."""
    g = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.002, 0.3, 2.5, 80.0])
    x = torch.randn(4, spec.channels, spec.resolution, spec.resolution, generator=g)
    labels = torch.arange(4) % spec.classes if spec.classes else None
    return x * (0.25 + sigma.view(-1, 1, 1, 1) ** 2).sqrt(), sigma, labels


def truth(spec: Spec, state: State, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """The clean image and the encoder's output, computed in fp64 without diffusers."""
    network = ADM(spec, {k: v.double() for k, v in state.items()}, sigma_data)
    clean = network(*inputs(spec))
    assert network.encoded is not None
    return clean, network.encoded


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert expected.std() > 0.05
    scale = expected.abs().max().clamp(min=1)
    assert (found - expected).abs().max() < tolerance * scale


@networks
@torch.no_grad()
def test_the_denoiser_is_the_same_function(spec: Spec) -> None:
    state = random_state(spec)
    denoiser = edm_denoiser(edm_to_unet(state), features="encoder")
    clean, encoded = truth(spec, state)
    x, sigma, labels = inputs(spec)
    close(denoiser(x, sigma, labels), clean)
    close(denoiser.features(x, sigma, labels), encoded)
    assert denoiser.process == VarianceExploding()
    assert denoiser.parameterization == KarrasPreconditioning(0.5)


@torch.no_grad()
def test_sigma_data_is_the_denoisers() -> None:
    state = random_state(SMALL)
    clean, _ = truth(SMALL, state, sigma_data=0.25)
    denoiser = edm_denoiser(edm_to_unet(state), sigma_data=0.25)
    close(denoiser(*inputs(SMALL)), clean)


def test_the_configuration_is_derived_from_shapes_alone() -> None:
    state = {
        name: torch.empty(tensor.shape, device="meta")
        for name, tensor in random_state(NETWORKS["three levels"]).items()
    }
    config = edm_unet_config(state)
    assert config["sample_size"] == 8
    assert config["block_out_channels"] == (128, 160, 192)
    assert config["layers_per_block"] == 1
    assert config["num_class_embeds"] is None
    assert config["down_block_types"] == (
        "ResnetDownsampleBlock2D",
        "ResnetDownsampleBlock2D",
        "AttnDownBlock2D",
    )
    without = {name.removeprefix("model."): t for name, t in state.items()}
    assert edm_unet_config(without) == config


def test_the_unet_is_built_without_a_copy_and_can_be_trained() -> None:
    state = random_state(SMALL)
    unet = edm_to_unet(state)
    assert (
        unet.conv_in.weight.data_ptr() == state["model.enc.8x8_conv.weight"].data_ptr()
    )
    assert all(p.requires_grad and p.device.type == "cpu" for p in unet.parameters())
    assert not unet.training
    eager = UNet2DModel(**edm_unet_config(state))
    eager.load_state_dict(unet.state_dict())
    x, sigma, labels = inputs(SMALL)
    with torch.no_grad():
        expected = edm_denoiser(eager)(x, sigma, labels)
        assert torch.equal(edm_denoiser(unet)(x, sigma, labels), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_unet_is_fp32_whatever_the_file_has(dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) for name, t in random_state(SMALL).items()}
    for name, parameter in edm_to_unet(state).named_parameters():
        assert parameter.dtype == torch.float32, name
    x, sigma, labels = inputs(SMALL)
    with torch.no_grad():
        found = edm_denoiser(edm_to_unet(state))(x, sigma, labels)
    close(found, truth(SMALL, {k: v.float() for k, v in state.items()})[0])


# Files.


def save_torch(path: Path, state: State) -> None:
    torch.save(state, path)


FORMATS: dict[str, Callable[[Path, State], Any]] = {
    ".pkl": lambda path, state: write(path, File(SMALL, state)),
    ".pth": save_torch,
    ".pt": save_torch,
    ".bin": save_torch,
    ".safetensors": lambda path, state: save_file(state, path),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_all_formats_are_read_alike(tmp_path: Path, suffix: str, prefix: str) -> None:
    state = random_state(SMALL)
    named = {prefix + name.removeprefix("model."): t for name, t in state.items()}
    path = tmp_path / f"network{suffix}"
    FORMATS[suffix](path, state if suffix == ".pkl" else named)
    found = read_edm(path, sha256=file_sha256(path).upper())
    assert isinstance(found, EDMCheckpoint)
    assert found.settings == EDMSettings(8, 3, 3, 0.5)
    assert set(found.state) == set(state)
    assert all(torch.equal(found.state[name], state[name]) for name in state)


def test_a_folder_holds_the_same_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = NETWORKS["attention"]
    state = random_state(spec)
    path = write(tmp_path / "network.pkl", File(spec, state, sigma_data=0.25))
    folder = tmp_path / "folder"
    digest = file_sha256(path)
    arguments = [str(path), str(folder), "--sha256", digest]
    convert_edm.main(tyro.cli(convert_edm.Settings, args=arguments))
    printed = capsys.readouterr().out
    parameters = sum(
        t.numel() for n, t in state.items() if not re.search("resample|augment", n)
    )
    for text in (digest, f"{parameters:,}", "2 classes", "128 times 1, 2", "8x8"):
        assert text in printed
    assert str(folder) in printed
    assert "CC BY-NC-SA 4.0" in printed
    about = {"source": "network.pkl", "sha256": digest}
    assert read_sidecar(folder).about == about | {"sigma_min": 0.002, "sigma_max": 80.0}
    assert read_sidecar(folder).times is None
    x, sigma, labels = inputs(spec)
    with torch.no_grad():
        found = load_denoiser(folder)(x, sigma, labels)
        close(found, truth(spec, state, sigma_data=0.25)[0])
        unet: Any = UNet2DModel.from_pretrained(folder)
        assert torch.equal(edm_denoiser(unet, 0.25)(x, sigma, labels), found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pkl", "out"], "there is no file"),
        (["n.bin", "out", "--sha256", "0" * 64], "the checksum of"),
        (["n.bin", "full"], "is no part of a denoiser"),
        (["n.bin", "out", "--sigma-data", "0"], "sigma_data: got 0"),
    ],
)
def test_the_converter_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_torch(tmp_path / "n.bin", random_state(SMALL))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all of it")
    monkeypatch.setattr(sys, "argv", ["convert_edm.py", *arguments])
    with pytest.raises(SystemExit, match=message) as error:
        convert_edm.run()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.zip", b"", "has the suffix '.zip', expected .pkl"),
        ("n.pth", None, "there is no file"),
        ("n.safetensors", None, "there is no file"),
        ("n.pth", b"", "cannot be read"),
        ("n.pth", b"damaged", "is damaged or holds more than tensors"),
        ("n.bin", b"PK\x03\x04damaged", "cannot be read"),
        ("n.safetensors", b"damaged", "cannot be read"),
        ("n.safetensors", b"\xff" * 8, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_edm(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"sha256|suffix|no file"):
        read_edm(tmp_path / name, sha256="0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is no state dict"),
        ({"ema": {"a": torch.zeros(1)}}, "is no state dict"),
        ({1: torch.zeros(1)}, "is no state dict"),
        ({}, "it is no ADM network"),
        ({"weight": torch.zeros(1)}, "it is no ADM network"),
        ({"enc.8x8_block0.conv1.weight": torch.tensor(1.0)}, "has the shape"),
        ({"enc.8x8_block0.conv1.bias": torch.zeros(1)}, "conv1.weight is missing"),
        ({"enc.8x4_block0.conv1.weight": torch.zeros(1)}, "is not square"),
    ],
)
def test_what_is_no_such_network_is_named(
    tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "n.pt")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_edm(tmp_path / "n.pt")
    assert len(str(error.value).splitlines()) == 1


def test_a_pickle_whose_settings_are_not_its_weights_is_refused(tmp_path: Path) -> None:
    file = File(SMALL, random_state(SMALL), change=lambda w: setattr(w, "label_dim", 7))
    path = write(tmp_path / "n.pkl", file)
    with pytest.raises(ValueError, match=r"says EDMSettings.*classes=7.*classes=3"):
        read_edm(path)


# Networks that are not ADM, or not one that diffusers can be.


def less(name: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k != f"model.{name}"}


def more(**tensors: Tensor) -> Callable[[State], State]:
    names = {f"model.{k.replace('__', '.')}": v for k, v in tensors.items()}
    return lambda state: state | names


def put(name: str, value: Tensor) -> Callable[[State], State]:
    return lambda state: state | {f"model.{name}": value}


DOWN = "enc.4x4_down"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (less("out_norm.bias"), "1 tensors are missing: out_norm.bias."),
        (less("dec.4x4_in0.qkv.weight"), "1 tensors are missing: dec.4x4_in0.qkv"),
        (less(f"{DOWN}.skip.resample_filter"), f"missing: {DOWN}.skip.resample_fil"),
        (less("map_layer0.weight"), "map_layer0.weight is missing"),
        (more(spare=torch.zeros(1)), "1 tensors are left over: spare."),
        (
            more(**{f"s{i}": torch.zeros(1) for i in range(6)}),
            "6 tensors are left over: s0, s1, s2, s3, ....",
        ),
        (
            put("enc.8x8_block0.qkv.weight", torch.zeros(384, 128, 1, 1)),
            "are missing: dec.8x8_block0.norm2",
        ),
        (put("enc.8x8_block7.norm0.weight", torch.zeros(1)), "as many blocks"),
        (
            put("out_conv.bias", torch.zeros(4)),
            "1 tensors have another shape than ADM's: out_conv.bias [4].",
        ),
        (put("map_layer1.bias", torch.zeros(())), "map_layer1.bias []"),
        (put("map_label.weight", torch.zeros(4, 4, 4)), "map_label.weight [4, 4, 4]"),
        (put("dec.4x4_in0.qkv.bias", torch.zeros(())), "dec.4x4_in0.qkv.bias []"),
        (
            put(f"{DOWN}.conv0.resample_filter", torch.full((1, 1, 2, 2), 0.2)),
            f"{DOWN}.conv0.resample_filter is not the 2x2 box",
        ),
        (
            put("dec.8x8_up.skip.resample_filter", torch.full((1, 1, 4, 4), 0.0625)),
            "dec.8x8_up.skip.resample_filter is not the 2x2 box",
        ),
        (put("out_conv.bias", torch.zeros(3).long()), "out_conv.bias is torch.int64"),
        (more(dec__8x8_aux_norm__weight=torch.zeros(1)), "it is EDM's SongUNet"),
    ],
)
def test_each_tensor_is_used_once(
    change: Callable[[State], State], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        edm_to_unet(change(random_state(SMALL)))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(widths=(64,)), "only from 128 channels on"),
        (Spec(widths=(144,), middle_attends=False), "in multiples of 32"),
        (Spec(widths=(160,)), "a head has 64 of them"),
        (Spec(8, (160, 192), attends=(True, False)), "a head has 64 of them"),
    ],
)
def test_what_diffusers_cannot_be_is_refused(spec: Spec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edm_to_unet(random_state(spec))


def test_a_first_level_of_more_channels_is_refused() -> None:
    state = random_state(Spec(widths=(256,)))
    state["model.map_layer0.weight"] = torch.zeros(512, 128)
    with pytest.raises(ValueError, match=r"channel_mult\[0\] = 1"):
        edm_to_unet(state)


def test_levels_must_halve() -> None:
    state = {
        name.replace("4x4", "2x2"): tensor
        for name, tensor in random_state(SMALL).items()
    }
    with pytest.raises(ValueError, match=r"\[8, 2\] are not levels that halve"):
        edm_to_unet(state)


# The network of the paper.


def test_the_network_of_imagenet64_has_its_size() -> None:
    with torch.device("meta"):
        unet = imagenet64_unet()
    assert sum(p.numel() for p in unet.parameters()) == 295_899_267
    assert unet.config["sample_size"] == 64
    assert unet.config["num_class_embeds"] == 1000


@pytest.mark.slow
@torch.no_grad()
def test_the_full_network_is_the_same_function(tmp_path: Path) -> None:
    state = random_state(IMAGENET64)
    path = write(tmp_path / "full.pkl", File(IMAGENET64, state))
    checkpoint = read_edm(path)
    assert checkpoint.settings == EDMSettings(64, 3, 1000, 0.5)
    unet = edm_to_unet(checkpoint.state)
    with torch.device("meta"):
        assert dict(unet.config) == dict(imagenet64_unet().config)
    assert sum(p.numel() for p in unet.parameters()) == 295_899_267
    x, sigma, labels = inputs(IMAGENET64)
    clean = ADM(IMAGENET64, state)(x, sigma, labels)
    close(edm_denoiser(unet)(x, sigma, labels), clean)
