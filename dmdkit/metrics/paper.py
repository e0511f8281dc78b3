"""The protocols of DMD2's tables, and one that its tables lack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmdkit.metrics.clip import CLIPEncoder
from dmdkit.metrics.dinov2 import DINOv2Features
from dmdkit.metrics.images import (
    bicubic_resize,
    centre_crop,
    centre_patch,
    clean_resize,
    lanczos_resize,
    pairwise_diversity,
)
from dmdkit.metrics.inception import InceptionFeatures
from dmdkit.metrics.protocols import (
    DistanceProtocol,
    Images,
    Step,
    prepare_images,
)
from dmdkit.metrics.results import Measured, mean_score
from dmdkit.types import PerSample

IMAGENET64_EDM = DistanceProtocol(
    name="imagenet64_edm",
    samples=50_000,
    prepare=(),
    network=InceptionFeatures,
    reference="ImageNet's training images at 64 pixels, EDM's imagenet-64x64.npz",
    reference_samples=1_281_167,
    resolution=64,
    seeds=(0, 50_000, 100_000),
    source="Karras et al. 2022 (arXiv 2206.00364), fid.py: the smallest of three sets "
    "with random classes; official DMD2: one set with balanced classes",
)
"""FID of ImageNet-64, Tables 1 and 3: `over_seeds` carries the sets, the smallest of
three as EDM reports it, and the first."""

COCO30K_256 = DistanceProtocol(
    name="coco30k_256",
    samples=30_000,
    prepare=(Step(centre_crop), Step(lanczos_resize, 256), Step(clean_resize, 299)),
    network=InceptionFeatures,
    reference="all images of COCO 2014's validation set, prepared alike",
    reference_samples=40_504,
    source="DMD2, section G and Table 5; official test_folder_sd.py; clean-fid",
)
"""FID of SD1.5, Table 5."""

COCO10K_512 = DistanceProtocol(
    name="coco10k_512",
    samples=10_000,
    prepare=(Step(centre_crop), Step(lanczos_resize, 512), Step(clean_resize, 299)),
    network=InceptionFeatures,
    reference="the images of COCO 2014's validation set that the prompts are of",
    reference_samples=10_000,
    source="DMD2, section G and Table 2; official test_folder_sdxl.py; clean-fid",
)
"""FID of SDXL, Tables 2, 4 and 6."""

PATCH_FID_299 = DistanceProtocol(
    name="patch_fid_299",
    samples=10_000,
    prepare=(Step(centre_patch, 299), Step(clean_resize, 299)),
    network=InceptionFeatures,
    reference="the images of COCO 2014's validation set that the prompts are of, each "
    "in its own resolution; those with a side below 299 are resized whole",
    reference_samples=10_000,
    source="DMD2, section 5; official coco_evaluator.py",
)
"""Patch FID of SDXL, Tables 2, 4 and 6: the middle 299 pixels, resized by nothing."""

FD_DINOV2 = DistanceProtocol(
    name="fd_dinov2",
    samples=50_000,
    prepare=(Step(bicubic_resize, 224),),
    network=DINOv2Features,
    reference="the training images, or those that another protocol takes",
    source="Stein et al. 2023 (arXiv 2306.04675), dgm-eval; not in DMD2",
)
"""Frechet distance on DINOv2's features, beside any FID: Inception's favour GANs."""


@dataclass(frozen=True)
class CLIPScoreProtocol:
    """The mean cosine between images and their prompts.

    Attributes:
        name: Its name.
        model: OpenCLIP's name of the model.
        tag: OpenCLIP's name of its weights.
        samples: How many images, each with its prompt.
        prefix: What stands before each prompt (Hessel et al. 2021, arXiv 2104.08718).
        prepare: What is done to images of 256 levels before OpenCLIP's own transform,
            which resizes them to 224 by PIL's bicubic filter.
        source: Where all this is from.
    """

    name: str
    model: str
    tag: str
    samples: int = 10_000
    prefix: str = "A photo depicts "
    prepare: tuple[Callable[[Tensor], Tensor], ...] = (
        Step(centre_crop),
        Step(lanczos_resize, 256),
    )
    source: str = ""

    def network(
        self, weights: str | Path | None = None, *, checksum: str | None = None
    ) -> CLIPEncoder:
        """Opens the model.

        Args:
            weights: The file of its weights; None: OpenCLIP's own loader.
            checksum: The SHA-256 that the file must have.

        Returns:
            The model.

        Raises:
            ImportError: If open_clip is missing.
            ValueError: If the file is missing, damaged or another.
        """
        return CLIPEncoder(self.model, self.tag, weights=weights, checksum=checksum)

    def scores(
        self, images: Images, prompts: Sequence[str], network: CLIPEncoder
    ) -> PerSample:
        """Gives the cosine of each image with its prompt.

        Args:
            images: Images of 256 levels.
            prompts: One an image.
            network: What `network` opened.

        Returns:
            The cosines, fp32 [b] on the CPU.

        Raises:
            ValueError: If there are not as many prompts as images, or it is another
                model.
        """
        if network.model != self.model:
            raise ValueError(f"network: {network.name}, expected {self.model}.")
        texts = [self.prefix + prompt for prompt in prompts]
        return network.similarity(prepare_images(images, self.prepare), texts).cpu()

    def measured(self, scores: Tensor, network: CLIPEncoder) -> Measured:
        """Gives the mean of scores, of all batches and ranks, and what it is of.

        Args:
            scores: The cosines, [n].
            network: The model.

        Returns:
            The score, as the tables print it (0.332, not 33.2).

        Raises:
            ValueError: If there are none, or one is not finite.
        """
        return mean_score(self.name, scores, self.samples, network.name)


CLIP_SCORE = CLIPScoreProtocol(
    "clip_score",
    "ViT-g-14",
    "laion2b_s12b_b42k",
    source='official coco_evaluator.py, which calls it "ViT-G/14"',
)
"""CLIP score of Tables 2, 4 and 6, as the official code takes it."""

CLIP_SCORE_BIGG = CLIPScoreProtocol(
    "clip_score_bigg",
    "ViT-bigG-14",
    "laion2b_s39b_b160k",
    source='DMD2, section G: "the OpenCLIP-G backbone", taken at its word',
)
"""CLIP score with the larger model that the paper's wording suggests."""


@dataclass(frozen=True)
class DiversityProtocol:
    """The mean LPIPS among the images of a prompt, over prompts.

    Attributes:
        name: Its name.
        prompts: How many prompts.
        images_per_prompt: How many images of each.
        prepare: What is done to images of 256 levels; they are then taken to [-1, 1].
        backbone: LPIPS's network. The paper names none: AlexNet is lpips's own default.
        source: Where all this is from.
    """

    name: str = "lpips_diversity"
    prompts: int = 128
    images_per_prompt: int = 4
    prepare: tuple[Callable[[Tensor], Tensor], ...] = (Step(lanczos_resize, 512),)
    backbone: str = "alex"
    source: str = (
        "DMD2, section B and Table 6; official coco_evaluator.py, whose images in "
        "[0, 1] would not be LPIPS's [-1, 1], and which nothing calls"
    )

    @torch.no_grad()
    def score(self, images: Images, distance: Callable[..., Tensor]) -> float:
        """Gives the mean distance among the images of one prompt.

        Args:
            images: The images of 256 levels, as many as `images_per_prompt`.
            distance: Gives distances [b] of two batches in [-1, 1], such as
                `LPIPSDistance(backbone)`.

        Returns:
            The mean over their pairs.

        Raises:
            ValueError: If there are more images or fewer.
        """
        if len(images) != self.images_per_prompt:
            raise ValueError(
                f"images: {len(images)} of a prompt, {self.name} takes "
                f"{self.images_per_prompt}."
            )
        ready = prepare_images(images, self.prepare).float() / 127.5 - 1
        if isinstance(distance, torch.nn.Module):
            ready = ready.to(next(distance.parameters()).device)
        return float(pairwise_diversity(ready[None], distance))

    def measured(self, scores: Tensor) -> Measured:
        """Gives the mean of scores, of all prompts and ranks, and what it is of.

        Args:
            scores: One a prompt, [n].

        Returns:
            The diversity, and the number of prompts.

        Raises:
            ValueError: If there are none, or one is not finite.
        """
        return mean_score(
            self.name, scores, self.prompts, f"LPIPS 0.1, {self.backbone}"
        )


LPIPS_DIVERSITY = DiversityProtocol()
"""The diversity score of Table 6: on the 128 PartiPrompts that LADD takes."""
