"""Protocols: what they do to images, what they refuse, and what stands beside N."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dmdkit import FeatureStatistics, LPIPSDistance, frechet_distance
from dmdkit.metrics import (
    CLIP_SCORE,
    COCO10K_512,
    COCO30K_256,
    FD_DINOV2,
    IMAGENET64_EDM,
    LPIPS_DIVERSITY,
    PATCH_FID_299,
    CallableFeatures,
    DistanceProtocol,
    DiversityProtocol,
    Measured,
    Step,
    centre_crop,
    centre_patch,
    class_accuracy,
    clean_resize,
    describe_protocol,
    kernel_distance,
    lanczos_resize,
    over_seeds,
    prepare_images,
    statistics,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=seeded(seed)).to(torch.uint8)


class Corners(nn.Module):
    """Six numbers of an image: the colours of two opposite quarters."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        x = x.double() / 255
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        return torch.cat((x[..., :h, :w].mean((2, 3)), x[..., h:, w:].mean((2, 3))), 1)


NETWORK = CallableFeatures(Corners(), "corners", 6)
PLAIN = DistanceProtocol("plain", 40, (), lambda *_: NETWORK, "none", resolution=8)


def coloured(n: int, seed: int, darker: int = 0) -> Tensor:
    """Images with colours of their own, so that features spread."""
    tint = torch.randint(128, (n, 3, 1, 1), generator=seeded(seed + 100))
    noise = torch.randint(128, (n, 3, 8, 8), generator=seeded(seed))
    return (tint + noise - darker).clamp(min=0).to(torch.uint8)


# Distances


def test_a_distance_is_torchmetrics_s_on_the_same_features() -> None:
    real, fake = coloured(60, 1), coloured(40, 2, darker=30)
    theirs = FrechetInceptionDistance(feature=Corners())
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    found = PLAIN.distance(
        PLAIN.statistics(fake.split(7), NETWORK),
        PLAIN.statistics(real.split(16), NETWORK),
    )
    assert found.value == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert found.value > 1e-3
    assert found._replace(value=0) == Measured(
        "plain", 0, 40, 40, "corners, each image as it is", 60
    )


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_the_kernel_distance_is_torchmetrics_s_on_the_same_features() -> None:
    real, fake = coloured(40, 1), coloured(40, 2, darker=30)
    theirs = KernelInceptionDistance(feature=Corners(), subsets=2, subset_size=40)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    a, b = (torch.cat([*PLAIN.features_of(x.split(9), NETWORK)]) for x in (fake, real))
    assert a.dtype == torch.float32
    found = kernel_distance(a, b, subsets=2, subset_size=40)
    assert found.mean == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_the_number_of_samples_is_always_said() -> None:
    real, fake = coloured(60, 1), coloured(20, 2)
    few = PLAIN.distance(
        PLAIN.statistics([fake], NETWORK), PLAIN.statistics([real], NETWORK)
    )
    assert not few.complete
    assert str(few).endswith("(20 of 40 against 60: not comparable)")
    whole = few._replace(samples=40)
    assert whole.complete
    assert str(whole) == f"plain {few.value:.4g} (40 against 60)"
    other = whole._replace(expected_reference=61)
    assert not other.complete
    assert str(other).endswith("(40 against 60 of 61: not comparable)")
    assert str(Measured("clip", 0.332, 9, 9, "f")) == "clip 0.332 (9)"
    with pytest.raises(ValueError, match="samples: 6 images, plain with its 6"):
        PLAIN.distance(
            PLAIN.statistics([fake[:6]], NETWORK), PLAIN.statistics([real], NETWORK)
        )
    with pytest.raises(ValueError, match="reference: 0 images"):
        PLAIN.distance(PLAIN.statistics([fake], NETWORK), PLAIN.statistics([], NETWORK))


def test_statistics_of_other_features_are_refused(tmp_path: Path) -> None:
    images = coloured(40, 1)
    own = PLAIN.statistics([images], NETWORK)
    other = PLAIN.statistics([images], CallableFeatures(Corners(), "others", 6))
    resized = DistanceProtocol(
        "resized", 40, (Step(lanczos_resize, 4),), lambda *_: NETWORK, "none"
    ).statistics([images], NETWORK)
    for wrong, name in ((other, "others, each"), (resized, r"each image lanczos_re")):
        with pytest.raises(ValueError, match=f"b: features of .*{name}.*, expected"):
            PLAIN.distance(own, wrong)
        with pytest.raises(ValueError, match="other: features of"):
            own.merge(wrong)
        with pytest.raises(ValueError, match="state: features of"):
            own.load_state_dict(wrong.state_dict())
    # A file keeps the name; a file of another program has none, and is taken.
    other.save(tmp_path / "other.npz")
    again = FeatureStatistics.load(tmp_path / "other.npz")
    assert again.features == "others, each image as it is"
    with pytest.raises(ValueError, match="b: features of"):
        frechet_distance(own, again)
    np.savez(tmp_path / "edm.npz", mu=own.mean, sigma=own.covariance)
    edm = FeatureStatistics.load(tmp_path / "edm.npz", count=40)
    assert edm.features is None
    assert PLAIN.distance(own, edm).value == pytest.approx(0, abs=1e-9)


def test_names_of_features_stay_with_what_is_merged() -> None:
    named, unknown = FeatureStatistics(2, "a"), FeatureStatistics(2)
    named.update(torch.eye(2))
    unknown.merge(named)
    assert unknown.features == "a"
    fresh = FeatureStatistics(2)
    fresh.load_state_dict(named.state_dict())
    assert fresh.features == "a"
    old = {k: v for k, v in named.state_dict().items() if k != "features"}
    named.load_state_dict(old)
    assert named.features == "a"


def test_ranks_are_merged_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [PLAIN.statistics([coloured(n, n)], NETWORK) for n in (9, 0, 23)]
    states = [part.state_dict() for part in parts]
    monkeypatch.setattr(statistics, "gathered", lambda _: states)
    first, last = parts[0].merged_ranks(), parts[2].merged_ranks()
    assert torch.equal(first.covariance, last.covariance)
    assert (first.count, first.features) == (32, parts[0].features)
    whole = PLAIN.statistics([coloured(9, 9), coloured(23, 23)], NETWORK)
    torch.testing.assert_close(first.mean, whole.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        first.covariance, whole.covariance, rtol=1e-10, atol=1e-12
    )
    assert parts[0].count == 9


def test_alone_merged_ranks_are_one_s_own() -> None:
    own = PLAIN.statistics([coloured(9, 9)], NETWORK)
    merged = own.merged_ranks()
    merged.update(torch.zeros(1, 6))
    assert (own.count, merged.count) == (9, 10)


def test_features_that_are_not_finite() -> None:
    broken = CallableFeatures(lambda x: torch.full((len(x), 6), math.nan), "nan", 6)
    with pytest.raises(ValueError, match="features: some are not finite"):
        PLAIN.statistics([coloured(4, 0)], broken)


# Images


def test_images_that_a_protocol_refuses() -> None:
    with pytest.raises(ValueError, match="4x4 pixels, plain takes 8x8"):
        PLAIN.statistics([random_pixels(2, 3, 4, 4)], NETWORK)
    with pytest.raises(ValueError, match="32x32 pixels, imagenet64_edm takes 64x64"):
        IMAGENET64_EDM.statistics([random_pixels(2, 3, 32, 32)], NETWORK)
    with pytest.raises(ValueError, match="got 3x4x4, 3x5x5, expected all of one"):
        prepare_images([random_pixels(3, 4, 4), random_pixels(3, 5, 5)], ())
    with pytest.raises(ValueError, match="got 1x4x4, 3x4x4, expected all of one mode"):
        prepare_images([random_pixels(3, 4, 4), random_pixels(1, 4, 4)], ())
    with pytest.raises(ValueError, match="got none"):
        prepare_images([], ())
    with pytest.raises(TypeError, match=r"float32\[2, 3, 4, 4\], expected uint8"):
        prepare_images(torch.zeros(2, 3, 4, 4), ())
    with pytest.raises(ValueError, match=r"uint8\[3, 4, 4\], expected uint8\[b"):
        prepare_images(random_pixels(3, 4, 4), ())


def test_single_images_of_any_size_are_prepared_one_by_one() -> None:
    images = [random_pixels(3, 40, 30), random_pixels(3, 33, 61)]
    steps = (Step(centre_crop), Step(lanczos_resize, 16), Step(clean_resize, 20))
    found = prepare_images(images, steps)
    assert found.shape == (2, 3, 20, 20)
    for image, ready in zip(images, found, strict=True):
        square = centre_crop(image[None])
        expected = clean_resize(lanczos_resize(square, 16), 20)[0]
        assert torch.equal(ready, expected)


@pytest.mark.parametrize(("protocol", "size"), [(COCO30K_256, 256), (COCO10K_512, 512)])
def test_coco_protocols_round_at_their_size(
    protocol: DistanceProtocol, size: int
) -> None:
    image = random_pixels(1, 3, 300, 340)
    levels = lanczos_resize(image[..., 20:320], size)
    assert torch.equal(
        prepare_images(image, protocol.prepare), clean_resize(levels, 299)
    )


def test_a_patch_is_the_middle_by_index_arithmetic() -> None:
    image = random_pixels(2, 3, 1024, 1024)
    found = prepare_images(image, PATCH_FID_299.prepare)
    # Half of the margin of 725 is 362.5, rounded to the even 362.
    assert torch.equal(found, image[..., 362 : 362 + 299, 362 : 362 + 299].float())
    small = random_pixels(1, 3, 200, 400)
    assert torch.equal(centre_patch(small, 299), small)
    whole = prepare_images(small, PATCH_FID_299.prepare)
    assert torch.equal(whole, clean_resize(small, 299))


@pytest.mark.parametrize("margin", range(8))
def test_the_middle_is_torchvision_s(margin: int) -> None:
    from torchvision.transforms.functional import center_crop

    image = random_pixels(1, 3, 9 + margin, 9)
    assert torch.equal(centre_crop(image, 9), center_crop(image, [9, 9]))


# What protocols state


def test_protocols_state_what_they_do() -> None:
    stated = describe_protocol(COCO30K_256)
    assert json.loads(json.dumps(stated)) == stated
    assert stated["prepare"] == [
        "centre_crop",
        "lanczos_resize(256)",
        "clean_resize(299)",
    ]
    assert stated["network"] == "InceptionFeatures"
    assert (stated["samples"], stated["reference_samples"]) == (30_000, 40_504)
    assert describe_protocol(CLIP_SCORE)["prefix"] == "A photo depicts "
    assert describe_protocol(FD_DINOV2)["prepare"] == ["bicubic_resize(224)"]
    assert describe_protocol(LPIPS_DIVERSITY)["images_per_prompt"] == 4
    assert IMAGENET64_EDM.seeds == (0, 50_000, 100_000)


def test_the_smallest_of_seeds_and_the_first() -> None:
    values = (1.53, 1.51, 1.55)
    results = [Measured("p", value, 10, 10, "f", 20) for value in values]
    found = over_seeds(results, "random")
    assert found.single.value == 1.53
    assert found.minimum.value == 1.51
    assert found.mean == pytest.approx(1.53)
    assert (len(found.by_seed), found.labels) == (3, "random")
    with pytest.raises(ValueError, match="by_seed: 2 results of unlike"):
        over_seeds([results[0], results[1]._replace(samples=9)], "random")
    with pytest.raises(ValueError, match="by_seed: 0 results"):
        over_seeds([], "balanced")


# Diversity and accuracy


def test_diversity_is_the_lpips_package_s(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path / "squeeze.pth"
    torch.save(squeezenet1_1(weights=None).features.state_dict(), path)
    distance = LPIPSDistance("squeeze", path)
    protocol = DiversityProtocol(
        prompts=2, prepare=(Step(lanczos_resize, 64),), backbone="squeeze"
    )
    images = random_pixels(4, 3, 90, 90)
    theirs: Any = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    theirs.net.load_state_dict(distance.lpips.net.state_dict())
    small = [
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize((64, 64), 1) for x in images
    ]
    ready = [lpips.im2tensor(np.asarray(x)) for x in small]
    with torch.no_grad():
        expected = [float(theirs(a, b)) for a, b in combinations(ready, 2)]
    found = protocol.score(images, distance)
    assert len(expected) == 6
    assert found == pytest.approx(sum(expected) / 6, rel=1e-5)
    assert protocol.score(images[:1].expand(4, -1, -1, -1), distance) == 0
    measured = protocol.measured(torch.tensor([found, 0.0]))
    assert measured.value == pytest.approx(found / 2)
    assert (measured.samples, measured.expected) == (2, 2)
    with pytest.raises(ValueError, match="images: 3 of a prompt, lpips_diver"):
        protocol.score(images[:3], distance)
    with pytest.raises(ValueError, match="scores: there are none, or some are not"):
        protocol.measured(torch.tensor([0.1, math.nan]))


def test_accuracy_counts_what_is_right() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = class_accuracy(logits, torch.tensor([1, 2, 2]))
    assert found.value == pytest.approx(2 / 3)
    assert found.samples == 3
    with pytest.raises(ValueError, match=r"labels: 0 \.\.\. 3, expected 0 \.\.\. 2"):
        class_accuracy(logits, torch.tensor([0, 3, 1]))
    with pytest.raises(ValueError, match="not finite"):
        class_accuracy(logits * math.nan, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="labels"):
        class_accuracy(logits, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="there are none"):
        class_accuracy(logits[:0], torch.tensor([], dtype=torch.int64))
