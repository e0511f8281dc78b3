"""Pictures and the table of the emoji example."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from emoji_common import SIZE, Emoji, to_images
from emoji_evaluation import Draw, Row
from runs import grid_of, to_pixels
from torch import Tensor

from dmdkit.adapters.conditions import TextPooledCondition

GAP = 4
"""White pixels between pictures."""
SHOWN = (
    *("rocket", "slice of pizza", "tiger face", "cactus", "penguin", "green apple"),
    *("grinning face", "octopus", "strawberry", "automobile", "sunflower", "rainbow"),
    *("face", "moon", "cat", "cloud", "monkey", "rice"),
    *("person", "train", "tree", "fish", "bus", "smiling face"),
)
"""Twelve names and twelve prompts that several names share."""


EXPLAINED = """\
Top-1, top-5: draws for a name that are recognised as that emoji. Frechet: of draws for
names to real emoji. Word: draws for a single word whose recognised emoji has it in its
name. Distinct: different emoji recognised in 8 draws for one word. Calls: for one
picture. Untrained: the teacher without guidance, called as the student is."""


def picture_of(images: Tensor, columns: int, zoom: int = 2) -> Tensor:
    """Lays pictures in [-1, 1] out in rows, uint8 [3, h, w]."""
    large = to_pixels(images).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    return grid_of(large, columns)


def real_for(prompt: str, emoji: Emoji) -> Tensor:
    """The emoji of that name, or the first whose name has the prompt's words."""
    if prompt in emoji.names:
        return emoji.images[emoji.names.index(prompt)]
    words = set(prompt.split())
    for image, name in zip(emoji.images, emoji.names, strict=True):
        if words <= set(name.split()):
            return image
    raise ValueError(f"prompt: no emoji's name has the words of {prompt!r}.")


def save_comparison(
    draws: Mapping[str, Draw],
    noise: Tensor,
    cond: TextPooledCondition,
    emoji: Emoji,
    path: Path,
) -> None:
    """Draws the same prompts from the same noise by each method, a column each."""
    columns = [torch.stack([real_for(prompt, emoji) for prompt in SHOWN])]
    with torch.no_grad():
        for draw in draws.values():
            generator = torch.Generator().manual_seed(0)
            columns.append(to_images(draw(noise, cond, generator)))
    count, half = len(columns), len(SHOWN) // 2
    rows = torch.stack(columns, dim=1)  # [prompts, columns, 3, 32, 32]
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 1 + 0.62 * half))
    for axis, prompts, part in zip(
        axes, (SHOWN[:half], SHOWN[half:]), (rows[:half], rows[half:]), strict=True
    ):
        axis.imshow(_mosaic(part).numpy(), interpolation="nearest")
        cell = SIZE + GAP
        axis.set_yticks([cell * i + cell / 2 for i in range(half)], prompts)
        axis.set_xticks(
            [cell * i + cell / 2 for i in range(count)], ["real", *draws], fontsize=8
        )
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mosaic(rows: Tensor) -> Tensor:
    """Pictures, [r, c, 3, 32, 32] in [-1, 1], side by side on white: [h, w, 3]."""
    padded = torch.nn.functional.pad(rows.clamp(-1, 1), (GAP // 2,) * 4, value=1.0)
    r, c, _, h, w = padded.shape
    return (padded.permute(0, 3, 1, 4, 2).reshape(r * h, c * w, 3) + 1) / 2


def read_log(folder: Path) -> list[dict[str, float]]:
    """The points of a student's curves."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def save_curves(
    students: Mapping[str, list[dict[str, float]]], teacher: Row | None, path: Path
) -> None:
    """Plots distance, recognition and variety over training."""
    titles = {
        "frechet": "Frechet distance, draws for names",
        "word": "Recognised words (share)",
        "distinct": "Different emoji in 8 draws for a word",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for label, points in students.items():
            axis.plot(
                [p["step"] for p in points],
                [p[name] for p in points],
                "o-",
                ms=3,
                label=label,
            )
        # A distance depends on the number of pictures, which is another here.
        if teacher and name != "frechet":
            axis.axhline(teacher[name], color="black", ls="--", lw=1, label="teacher")
        axis.set(xlabel="iterations (critic updates)", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def print_table(rows: Sequence[tuple[str, int, Row]]) -> None:
    """Prints real emoji, teacher and students: name, calls for one picture, numbers."""
    print(
        f"\n{'':<24}{'calls':>6}{'top-1':>8}{'top-5':>8}{'Frechet':>9}"
        f"{'word':>8}{'distinct':>10}"
    )
    for name, calls, row in rows:
        print(
            f"{name:<24}{calls:>6}{row['top1']:>8.3f}{row['top5']:>8.3f}"
            f"{abs(row['frechet']):>9.2f}{row['word']:>8.3f}{row['distinct']:>10.2f}"
        )
    print(EXPLAINED)
