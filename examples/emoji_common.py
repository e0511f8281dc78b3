"""What the emoji examples share: data, prompts, networks, files.

The data are 459 emoji of the font Noto Color Emoji (plants, food, animals, faces,
vehicles), 32x32 pixels on white, with their Unicode names as prompts (see
emoji_data.py). The networks see each picture as a latent
of 12 channels and 16x16 places: the four pixels of a place side by side. That is a
mere rearrangement, it loses nothing, and it takes the place of a VAE.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dmdkit import DiscreteVariancePreserving, ScoreEstimator, VPrediction
from dmdkit.adapters.conditions import (
    EmptyPrompt,
    TextPooledCondition,
    sdxl_time_ids,
)
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.extras import require_extra

require_extra("train", "tyro", "matplotlib", "PIL")

SettingsType = TypeVar("SettingsType")
HERE = Path(__file__).parent
SHEET_FILE = HERE / "emoji_sheet.png"
NAMES_FILE = HERE / "emoji_names.txt"
TEACHER_FILE = HERE / "emoji_teacher.safetensors"
CLASSIFIER_FILE = HERE / "emoji_classifier.safetensors"

SIZE = 32
FEATURES = 64
LATENT_SHAPE = (12, 16, 16)

MAX_WORDS = 9
"""The longest prompt; the encoder has one place more, for its start token."""
PADDING, START = 0, 1
TEXT_WIDTH = 96

UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (48, 96, 96),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,  # the number of heads: diffusers' name is historical
    "addition_embed_type": "text_time",  # as SDXL: pooled text beside the time
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
    "norm_num_groups": 16,
}


def parse(settings: type[SettingsType]) -> SettingsType:
    """Reads a settings dataclass from the command line."""
    import tyro

    return tyro.cli(settings)


class Emoji(NamedTuple):
    """Pictures in [-1, 1], fp32 [n, 3, 32, 32], and their names."""

    images: Tensor
    names: tuple[str, ...]


def load_emoji(sheet: Path = SHEET_FILE, names: Path = NAMES_FILE) -> Emoji:
    """Reads the shipped emoji: pictures row by row, and a name a line."""
    from PIL import Image

    read = tuple(names.read_text().splitlines())
    pixels = torch.from_numpy(np.array(Image.open(sheet)))
    rows, columns = pixels.shape[0] // SIZE, pixels.shape[1] // SIZE
    if not (rows - 1) * columns < len(read) <= rows * columns:
        raise SystemExit(
            f"{names} has {len(read)} names, {sheet} has {rows}x{columns} pictures; "
            "write both anew with emoji_data.py."
        )
    tiles = pixels.reshape(rows, SIZE, columns, SIZE, 3).permute(0, 2, 4, 1, 3)
    tiles = tiles.reshape(-1, 3, SIZE, SIZE)[: len(read)]
    return Emoji(tiles.float() / 127.5 - 1, read)


def to_latents(images: Tensor) -> Tensor:
    """Rearranges pictures, [b, 3, 32, 32], to latents, [b, 12, 16, 16]."""
    return pixel_unshuffle(images, 2)


def to_images(latents: Tensor) -> Tensor:
    """Undoes `to_latents`."""
    return pixel_shuffle(latents, 2)


class Vocabulary:
    """The words of the emoji's names, numbered."""

    def __init__(self, names: Sequence[str]) -> None:
        self.words = sorted({word for name in names for word in name.split()})
        self._numbers = {word: START + 1 + i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        """With padding and start."""
        return START + 1 + len(self.words)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """The words of prompts behind a start token, padded: integers [b, 10].

        Raises:
            ValueError: If a prompt has more than 9 words, or one that is in no name.
        """
        tokens = torch.full((len(prompts), MAX_WORDS + 1), PADDING)
        tokens[:, 0] = START
        for row, prompt in zip(tokens, prompts, strict=True):
            words = prompt.split()
            if len(words) > MAX_WORDS:
                raise ValueError(
                    f"prompt: {prompt!r} has {len(words)} words, at most {MAX_WORDS} "
                    "fit; shorten it."
                )
            for place, word in enumerate(words, start=1):
                row[place] = self._number(word)
        return tokens

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
            raise ValueError(
                f"prompt: {word!r} is no word of an emoji's name, the only ones that "
                "are known; choose others"
                + (f", such as {', '.join(near)}." if near else ".")
            )
        return self._numbers[word]


class TextEncoder(nn.Module):
    """A small transformer over the words of a prompt.

    Padding is a token like others, as in the CLIP of Stable Diffusion.
    """

    def __init__(self, vocabulary: Vocabulary, width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embed = nn.Embedding(len(vocabulary), width)
        self.positions = nn.Parameter(0.1 * torch.randn(MAX_WORDS + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states, [b, 10, 96]."""
        return self.body(self.embed(tokens) + self.positions)

    def encode(self, prompts: Sequence[str]) -> TextPooledCondition:
        """Prompts as the UNet takes them, in SDXL's form; pooled is the start token."""
        text = self(self.vocabulary.tokens(prompts))
        time_ids = sdxl_time_ids(len(prompts), SIZE)
        return TextPooledCondition(text, text[:, 0], time_ids)


def random_caption(name: str, generator: torch.Generator) -> str:
    """A random, not empty subset of a name's words, in order.

    So "face" and "moon" are prompts as well, each with many true pictures.
    """
    words = name.split()
    kept = torch.rand(len(words), generator=generator) < 0.5
    kept[torch.randint(len(words), (1,), generator=generator)] = True
    return " ".join(w for w, keep in zip(words, kept.tolist(), strict=True) if keep)


def draw_captions(
    names: Sequence[str],
    shortened: float,
    generator: torch.Generator,
    dropped: float = 0.0,
) -> list[str]:
    """The prompts of a batch: names, a share of them shortened, a share empty."""
    chance = torch.rand(len(names), 2, generator=generator).tolist()
    captions = []
    for name, (a, b) in zip(names, chance, strict=True):
        caption = random_caption(name, generator) if a < shortened else name
        captions.append("" if b < dropped else caption)
    return captions


def build_denoiser() -> ScoreEstimator:
    """A denoiser with fresh weights: Stable Diffusion's process, v-prediction."""
    from diffusers import UNet2DConditionModel

    return ScoreEstimator(
        UNetNetwork(UNet2DConditionModel(**UNET_CONFIG)),
        DiscreteVariancePreserving.scaled_linear(),
        VPrediction(),
    )


class Teacher(NamedTuple):
    """A denoiser of latents and the encoder of its prompts."""

    denoiser: ScoreEstimator
    encoder: TextEncoder

    def modules(self) -> nn.ModuleDict:
        """Both under one roof, for files and averages."""
        return nn.ModuleDict({"unet": self.denoiser.network, "text": self.encoder})

    def empty_prompt(self) -> EmptyPrompt:
        """The encoded empty prompt, for guidance."""
        with torch.no_grad():
            empty = self.encoder.encode([""])
        return EmptyPrompt(empty.text, empty.pooled)


def build_teacher(names: Sequence[str]) -> Teacher:
    """A teacher with fresh weights, whose prompts have the words of some names."""
    return Teacher(build_denoiser(), TextEncoder(Vocabulary(names)))


def load_teacher(path: Path = TEACHER_FILE) -> Teacher:
    """The shipped teacher, frozen."""
    teacher = build_teacher(load_emoji().names)
    load_weights(teacher.modules(), path)
    for module in (teacher.denoiser, teacher.encoder):
        module.requires_grad_(False).eval()
    return teacher


def save_weights(module: nn.Module, path: Path, about: dict[str, object]) -> None:
    """Writes weights in fp16, and a sidecar that says where they come from."""
    state = {k: v.detach().half().contiguous() for k, v in module.state_dict().items()}
    save_file(state, path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


def load_weights(module: nn.Module, path: Path) -> dict[str, object]:
    """Reads weights and gives their sidecar."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: train it with the script of that name.")
    module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return json.loads(path.with_suffix(".json").read_text())


class Classifier(nn.Module):
    """Recognises emoji, one class each; its features measure distances of samples."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, wider in ((3, 32), (32, 64), (64, 96)):
            layers += [
                nn.Conv2d(width, wider, 3, stride=2, padding=1),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, FEATURES))
        self.classify = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Features before the last activation, [b, 64]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, [b, classes]."""
        return self.classify(self.features(images).relu())


def load_classifier() -> Classifier:
    """The shipped classifier, frozen."""
    classifier = Classifier(len(load_emoji().names))
    load_weights(classifier, CLASSIFIER_FILE)
    return classifier.requires_grad_(False).eval()
