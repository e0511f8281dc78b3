"""Trains the network that recognises emoji, and whose features measure distances.

    python examples/emoji_classifier.py

Every emoji is a class of its own, known by one picture; what is varied is how it is
seen: a little shifted, scaled, recoloured, blurred and noisy. A few minutes on a CPU;
writes `examples/emoji_classifier.safetensors`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from emoji_common import CLASSIFIER_FILE, Classifier, load_emoji, parse, save_weights
from torch import Tensor
from torch.nn.functional import (
    affine_grid,
    avg_pool2d,
    cross_entropy,
    grid_sample,
)
from tqdm import trange


@dataclass(frozen=True)
class Settings:
    """Trains the emoji classifier."""

    iterations: int = 4000
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0
    file: Path = CLASSIFIER_FILE
    """Where the weights go."""
    threads: int = 1


def seen_differently(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1], [b, 3, 32, 32], each varied in its own way.

    Shifted by up to 2 pixels, scaled by up to 10 %, brightened and tinted, blurred by
    3x3 to a random degree, with noise of up to 0.3.
    """
    count = len(images)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = between(0.9, 1.1)
    theta[:, :, 2] = between(-0.125, 0.125, 2)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    # What comes into view is white, as all around is.
    moved = grid_sample(images - 1, grid, align_corners=False) + 1
    blurred = avg_pool2d(moved, 3, 1, 1, count_include_pad=False)
    moved = torch.lerp(moved, blurred, between(0.0, 1.0, 1, 1, 1))
    tinted = moved * between(0.8, 1.1, 3, 1, 1) + between(-0.1, 0.1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    return tinted + between(0.0, 0.3, 1, 1, 1) * noise


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor) -> float:
    """The share of pictures, one of each class in order, that are recognised."""
    guess = classifier(images).argmax(dim=1)
    return (guess == torch.arange(len(images))).float().mean().item()


def main(settings: Settings) -> None:
    """Trains on varied pictures and reports the accuracy on others."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    images, names = load_emoji()
    classifier = Classifier(len(names))
    optimizer = torch.optim.AdamW(
        classifier.parameters(), settings.learning_rate, weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, settings.iterations
    )
    for _ in trange(settings.iterations):
        rows = torch.randint(len(names), (settings.batch_size,), generator=generator)
        varied = seen_differently(images[rows], generator)
        loss = cross_entropy(classifier(varied), rows, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    classifier.eval()
    as_drawn = accuracy(classifier, images)
    varied = accuracy(classifier, seen_differently(images, generator))
    about = {
        "what": f"classifier of {len(names)} emoji (32x32), a class each; 64 features",
        "accuracy": round(as_drawn, 4),
        "accuracy_varied": round(varied, 4),
        "command": "python examples/emoji_classifier.py",
        "settings": {
            k: v for k, v in asdict(settings).items() if k not in ("file", "threads")
        },
        "data": "emoji_sheet.png, emoji_names.txt (see emoji_sheet.json)",
    }
    save_weights(classifier, settings.file, about)
    print(
        f"Recognises {as_drawn:.4f} of the pictures, {varied:.4f} of varied ones; "
        f"wrote {settings.file}."
    )


if __name__ == "__main__":
    main(parse(Settings))
