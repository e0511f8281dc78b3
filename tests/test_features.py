"""Feature networks: what they are fed, and files of weights they must refuse."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from dmdkit.metrics import (
    CLIP_SCORE,
    CLIP_SCORE_BIGG,
    COCO30K_256,
    CallableFeatures,
    CLIPEncoder,
    CLIPScoreProtocol,
    DINOv2Features,
    ImageFeatures,
    InceptionFeatures,
    bicubic_resize,
    clean_resize,
    prepare_images,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pixels(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=seeded()).to(torch.uint8)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


# Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torch-fidelity's layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.uniform_(0.05, 0.15)  # keeps the signal alive
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> InceptionFeatures:
    return InceptionFeatures(inception_file)


@pytest.fixture(scope="module")
def fidelity_network(inception_file: Path) -> Any:
    return fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(inception_file)
    )


@pytest.mark.parametrize("size", [64, 299])
def test_inception_of_levels_is_torch_fidelity_s(
    inception: InceptionFeatures, fidelity_network: Any, size: int
) -> None:
    pixels = random_pixels(2, 3, size, size)
    (expected,) = fidelity_network(pixels)
    found = inception(pixels)
    assert found.shape == (2, 2048)
    assert torch.equal(found, expected)
    assert expected.std(0).mean() > 1e-3  # features that tell images apart


def test_inception_of_floats_takes_them_as_they_are(
    inception: InceptionFeatures,
) -> None:
    pixels = random_pixels(1, 3, 299, 299)
    levels = inception(pixels)
    assert torch.equal(inception(pixels.float()), levels)
    # Nothing is rounded to levels.
    moved = (pixels.float() + 0.4).clamp(max=255)
    assert not torch.equal(inception(moved), levels)


def test_inception_stays_in_evaluation_without_gradients(
    inception: InceptionFeatures,
) -> None:
    assert not inception.train().training
    found = inception(random_pixels(1, 3, 32, 32))
    assert not found.requires_grad
    assert isinstance(inception, ImageFeatures)
    assert not any(p.requires_grad for p in inception.parameters())


def test_a_network_s_name_tells_its_weights(
    inception: InceptionFeatures, inception_file: Path
) -> None:
    digest = sha256(inception_file)
    assert inception.checksum == digest
    assert inception.name == f"inception-2015-12-05 (sha256 {digest[:16]})"


def test_images_that_inception_refuses(inception: InceptionFeatures) -> None:
    with pytest.raises(ValueError, match="64x64 pixels, expected 299x299"):
        inception(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"values -1 \.\.\. 0, expected 0 \.\.\. 255"):
        inception(torch.zeros(1, 3, 299, 299) - torch.eye(299))
    with pytest.raises(ValueError, match=r"values nan"):
        inception(torch.full((1, 3, 299, 299), torch.nan))
    with pytest.raises(ValueError, match=r"uint8\[1, 1, 64, 64\]"):
        inception(random_pixels(1, 1, 64, 64))
    with pytest.raises(TypeError, match="images"):
        inception(torch.zeros(1, 3, 299, 299, dtype=torch.int64))


class Scripted(nn.Module):
    """The calls that NVIDIA's TorchScript file answers, as clean-fid makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 2048, 3, stride=64), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        x = nn.functional.interpolate(x.float(), size=[299, 299])
        return self.layers((x - 128) / 128)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_as_clean_fid_runs_it(tmp_path: Path) -> None:
    features = pytest.importorskip("cleanfid.inception_torchscript")
    torch.manual_seed(0)
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "inception-2015-12-05.pt")
    own = InceptionFeatures(tmp_path / "inception-2015-12-05.pt")
    small, large = random_pixels(2, 3, 64, 64), random_pixels(2, 3, 299, 299)
    floats = (large + 0.25).clamp(max=255)
    for images, inside in ((small, True), (floats, False)):
        theirs = features.InceptionV3W(tmp_path, download=False, resize_inside=inside)
        assert torch.equal(own(images), theirs(images))


def clean_fid_resize(pixels: np.ndarray) -> np.ndarray:
    resize = pytest.importorskip("cleanfid.resize")
    return resize.build_resizer("clean")(pixels)


@pytest.mark.parametrize("shape", [(40, 52), (425, 640), (299, 299)])
def test_clean_resize_is_clean_fid_s(shape: tuple[int, int]) -> None:
    pixels = random_pixels(1, 3, *shape)
    expected = clean_fid_resize(pixels[0].permute(1, 2, 0).numpy())
    assert np.array_equal(clean_resize(pixels)[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("shape", [(425, 640), (427, 640), (300, 301)])
def test_coco_images_are_prepared_as_the_official_code_does(
    shape: tuple[int, int],
) -> None:
    from torchvision.transforms.functional import center_crop

    pixels = random_pixels(3, *shape)
    image: Any = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    square: Any = center_crop(image, [min(shape), min(shape)])
    small = square.resize((256, 256), Image.Resampling.LANCZOS)
    expected = clean_fid_resize(np.asarray(small))
    (found,) = prepare_images([pixels], COCO30K_256.prepare)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


# DINOv2

SMALL = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def small_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = timm.create_model(SMALL, pretrained=False).state_dict()
    state["pos_embed"] = torch.randn(state["pos_embed"].shape, generator=seeded())
    return state


@pytest.fixture(scope="module")
def dinov2(
    small_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> DINOv2Features:
    # The authors' file has a mask token, which timm's model lacks.
    state = small_state | {"mask_token": torch.zeros(1, 384)}
    path = tmp_path_factory.mktemp("dinov2") / "pretrain.pth"
    torch.save(state, path)
    return DINOv2Features(path, model=SMALL)


def cubic(x: float, a: float = -0.75) -> float:
    """The cubic of Keys (1981), with PyTorch's a."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_dinov2_s_positions_are_interpolated_as_by_its_authors(
    dinov2: DINOv2Features, small_state: dict[str, Tensor]
) -> None:
    old, new = 37, 16
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        x = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(int(x // 1) - 1, int(x // 1) + 3):
            matrix[i, min(max(j, 0), old - 1)] += cubic(x - j)
    grid = small_state["pos_embed"][0, 1:].double().reshape(old, old, -1)
    expected = torch.einsum("ai,bj,ijc->abc", matrix, matrix, grid).flatten(0, 1)
    found = dinov2.network.pos_embed[0]
    assert torch.equal(found[0], small_state["pos_embed"][0, 0])
    torch.testing.assert_close(found[1:].double(), expected, atol=1e-5, rtol=1e-5)


def test_dinov2_s_features_are_its_class_token(
    dinov2: DINOv2Features,
) -> None:
    pixels = random_pixels(2, 3, 224, 224)
    seen: dict[str, Tensor] = {}
    hooks = [
        dinov2.network.patch_embed.register_forward_pre_hook(
            lambda _, inputs: seen.update(input=inputs[0])
        ),
        dinov2.network.norm.register_forward_hook(
            lambda _, __, output: seen.update(tokens=output)
        ),
    ]
    found = dinov2(pixels)
    for hook in hooks:
        hook.remove()
    assert found.shape == (2, dinov2.dim) == (2, 384)
    assert torch.equal(found, seen["tokens"][:, 0])
    assert seen["tokens"].shape == (2, 1 + 16 * 16, 384)
    for channel, (mean, std) in enumerate(
        [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]
    ):
        torch.testing.assert_close(
            seen["input"][:, channel], (pixels[:, channel] / 255 - mean) / std
        )
    assert torch.equal(dinov2(pixels.float()), found)


def test_dinov2_refuses_other_sizes_and_models(
    dinov2: DINOv2Features, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="32x32 pixels, expected 224x224"):
        dinov2(random_pixels(1, 3, 32, 32))
    with pytest.raises(ValueError, match="model: got 'resnet18', expected a DINOv2"):
        DINOv2Features(tmp_path / "x.pth", model="resnet18")


def test_bicubic_resize_is_torchvision_s_of_pil_images() -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_to_tensor, resize

    pixels = random_pixels(3, 90, 61)
    image: Any = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    expected = pil_to_tensor(resize(image, [224, 224], InterpolationMode.BICUBIC))
    assert torch.equal(bicubic_resize(pixels[None], 224)[0], expected)


# CLIP


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP of OpenCLIP under the name `tiny-clip`, with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            **{"image_size": 224, "layers": 1, "width": 32},
            **{"head_width": 16, "patch_size": 32},
        },
        "text_cfg": {
            **{"context_length": 77, "vocab_size": 49408, "width": 32},
            **{"heads": 2, "layers": 1},
        },
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    torch.save(model.state_dict(), folder / "clip.pt")
    return folder / "clip.pt"


TINY_CLIP = CLIPScoreProtocol("tiny_clip", "tiny-clip", "random", samples=3)


def official_tokens(prompt: str) -> list[int]:
    """The prompt's tokens with those of the prefix set in after the first one."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    own = [start, *tokenizer.encode(prompt), end]
    own = own if len(own) <= 77 else [*own[:76], end]
    tokens = [own[0], *tokenizer.encode("A photo depicts "), *own[1:]][:77]
    tokens += [0] * (77 - len(tokens))
    tokens[76] = end if tokens[76] else 0
    return tokens


def test_clip_scores_by_open_clip_s_own_calls(clip_file: Path) -> None:
    prompts = ["a cat", "two dogs on a beach", "one word " * 60]
    pixels = random_pixels(3, 3, 300, 411)
    network = TINY_CLIP.network(clip_file)
    found = TINY_CLIP.scores(pixels, prompts, network)

    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-clip", pretrained=str(clip_file)
    )
    call: Any = model.eval()
    transform: Any = preprocess
    images = []
    for image in pixels:
        opened = Image.fromarray(image.permute(1, 2, 0).numpy())
        square = opened.crop((56, 0, 356, 300))  # half of 111 is nearer to even 56
        images.append(transform(square.resize((256, 256), Image.Resampling.LANCZOS)))
    with torch.no_grad():
        a = call.encode_image(torch.stack(images))
        b = call.encode_text(torch.tensor([official_tokens(x) for x in prompts]))
    expected = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found, expected)
    assert found.unique().numel() == 3

    assert network.dim == 16
    assert isinstance(network, ImageFeatures)
    measured = TINY_CLIP.measured(found, network)
    assert measured.value == pytest.approx(expected.double().mean().item())
    assert (measured.samples, measured.complete) == (3, True)
    assert sha256(clip_file)[:16] in measured.features


@pytest.mark.parametrize("protocol", [CLIP_SCORE, CLIP_SCORE_BIGG])
def test_the_paper_s_clip_models_take_the_transform_that_a_file_gets(
    protocol: CLIPScoreProtocol,
) -> None:
    known: Any = open_clip.get_pretrained_cfg(protocol.model, protocol.tag)
    default = PreprocessCfg()
    for name in ("mean", "std", "interpolation", "resize_mode"):
        assert known[name] == getattr(default, name)
    config: Any = open_clip.get_model_config(protocol.model)
    assert config["vision_cfg"]["image_size"] == 224
    assert "quick_gelu" not in config
    assert not known.get("quick_gelu")


def test_prompts_and_images_that_do_not_match(clip_file: Path) -> None:
    network = TINY_CLIP.network(clip_file)
    pixels = random_pixels(2, 3, 64, 64)
    with pytest.raises(ValueError, match="2 and 1, expected as many"):
        TINY_CLIP.scores(pixels, ["a cat"], network)
    with pytest.raises(ValueError, match=r"tiny-clip.*expected ViT-g-14"):
        CLIP_SCORE.scores(pixels, ["a cat", "a dog"], network)
    with pytest.raises(ValueError, match="scores: there are none"):
        TINY_CLIP.measured(torch.zeros(0), network)
    with pytest.raises(ValueError, match=r"model: got 'ViT-Z'"):
        CLIPEncoder("ViT-Z", weights=clip_file)
    with pytest.raises(ValueError, match=r"tag: got 'x', expected .*laion2b_s12b_b42k"):
        CLIPEncoder("ViT-g-14", "x")


# Files of weights

Open = Callable[..., Any]


def open_dinov2(weights: Any = None, **options: Any) -> DINOv2Features:
    return DINOv2Features(weights, model=SMALL, **options)


def open_clip_encoder(weights: Any = None, **options: Any) -> CLIPEncoder:
    model, tag = ("tiny-clip", "random") if weights else ("ViT-B-32", "openai")
    return CLIPEncoder(model, tag, weights=weights, **options)


OPENERS = [InceptionFeatures, open_dinov2, open_clip_encoder]


@pytest.mark.usefixtures("clip_file")
@pytest.mark.parametrize("opened", OPENERS)
def test_weights_are_read_without_executing_anything(
    opened: Open, tmp_path: Path
) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "mark"
    torch.save({"weight": Bomb(mark)}, path)
    with pytest.raises(ValueError, match="weights: "):
        opened(path)
    path.write_bytes(pickle.dumps({"weight": Bomb(mark)}, protocol=2))
    with pytest.raises(ValueError, match="weights: "):
        opened(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # the bomb is a live one
    assert mark.exists()


@pytest.mark.usefixtures("clip_file")
@pytest.mark.parametrize("opened", OPENERS)
def test_weights_of_another_network(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"weights: .*weights\.pth"):
        opened(path)
    path.write_bytes(b"nothing that can be read")
    with pytest.raises(ValueError, match=r"weights: .*weights\.pth"):
        opened(path)


@pytest.mark.parametrize(
    ("opened", "source"),
    [
        (InceptionFeatures, "weights-inception-2015-12-05-6726825d.pth from https://"),
        (open_dinov2, f"model.safetensors from https://huggingface.co/timm/{SMALL}"),
        (open_clip_encoder, "OpenCLIP's .*, from "),
    ],
)
@pytest.mark.usefixtures("clip_file")
def test_missing_weights_are_named_with_their_source(
    opened: Open, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=f"there is no file .*none.pth; .*{source}"):
        opened(tmp_path / "none.pth")

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("Network is unreachable\nand more")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=rf"{source}.* cannot be fetched \(Network is unreachable\)"
    ):
        opened()


def test_the_library_s_own_loader_finds_its_cache(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fetch(url: str, path: str, prefix: str) -> None:
        assert url.endswith("/v0.2.0/weights-inception-2015-12-05-6726825d.pth")
        assert prefix == "6726825d"
        Path(path).write_bytes(inception_file.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(ValueError, match="expected 6726825d; the file is damaged"):
        InceptionFeatures()


def test_checksums_are_verified(inception_file: Path, tmp_path: Path) -> None:
    digest = sha256(inception_file)
    assert InceptionFeatures(inception_file, checksum=digest).checksum == digest
    wrong = digest[:8] + ("0" if digest[8] != "0" else "1") + digest[9:]
    with pytest.raises(
        ValueError, match=f"SHA-256 of .* is {digest}, expected {wrong}"
    ):
        InceptionFeatures(inception_file, checksum=wrong)
    with pytest.raises(ValueError, match="checksum: got 'abc', expected a SHA-256"):
        InceptionFeatures(inception_file, checksum="abc")
    named = tmp_path / "weights-01234567.pth"
    torch.save({}, named)
    with pytest.raises(ValueError, match="expected 01234567"):
        InceptionFeatures(named)


# One's own


def test_a_function_of_one_s_own_is_a_feature_network() -> None:
    own = CallableFeatures(lambda x: x.float().mean((2, 3)), "means", 3)
    assert isinstance(own, ImageFeatures)
    assert own(random_pixels(4, 3, 8, 8)).shape == (4, 3)
    with pytest.raises(ValueError, match=r"means gave float32\[4, 1\].*\[4, 3\]"):
        own(random_pixels(4, 1, 8, 8))
    whole = CallableFeatures(lambda x: x[:, :, 0, 0], "corners", 3)
    with pytest.raises(ValueError, match=r"corners gave uint8\[4, 3\]"):
        whole(random_pixels(4, 3, 8, 8))
