"""Draws the healthy and the sick runs of "Reading the curves".

    sh docs/figures/curves.sh            # the runs, to runs/curves
    python docs/figures/curves.py runs/curves

The second command gathers the runs' curves in `curves.json` beside this file, copies a
part of their samples, and draws. Without a folder it draws from `curves.json` again.
"""

import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from drawing import BLUE, GREEN, ORANGE, RED
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dmdkit import checkpoints

HERE = Path(__file__).parent
NUMBERS = HERE / "curves.json"
OUT = HERE.parent / "assets" / "curves"
GREY = "#8a8f98"
"""Words and lines: read on light and on dark."""

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
        ),
        GREY,
    ),
}
SHOWN = ("healthy", "ttur1", "slow", "fast", "ganbig")
KEPT = ("step", "frechet", "gap", "accuracy", "brightness", "contrast")
PANELS = (
    ("frechet", "Fréchet distance", True),
    ("gap", "gap", False),
    ("accuracy", "accuracy", False),
    ("brightness", "brightness", False),
)


def points_of(run: Path) -> list[dict[str, float]]:
    """The curves of a digits run, out of its newest checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        dcp_to_torch_save(checkpoints(run / "checkpoints")[-1], file)
        state: dict[str, Any] = torch.load(file, weights_only=False)
    points = pickle.loads(state["state.record"]["rest"])["points"]
    return [{name: p[name] for name in KEPT if name in p} for p in points]


def gather(folder: Path) -> None:
    """Writes the curves of all runs, rounded, and the last samples of each."""
    runs = {
        run.name: points_of(run)
        for run in sorted(folder.iterdir())
        if (run / "summary.json").is_file()
    }
    rounded = {
        name: [{k: float(f"{v:.4g}") for k, v in p.items()} for p in points]
        for name, points in runs.items()
    }
    lines = [f'"{n}": {json.dumps(points)}' for n, points in rounded.items()]
    NUMBERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name in SHOWN:
        whole = plt.imread(folder / name / "samples.png")
        # The student's are on the right, below a title.
        half = whole[42:483, 758:1494]
        plt.imsave(OUT / f"{name}_samples.png", half)


def draw(name: str, runs: dict[str, list[dict[str, float]]]) -> None:
    """One sick run in four panels, over the healthy one in grey."""
    figure, panels = plt.subplots(2, 2, figsize=(6.4, 3.6))
    for panel, (key, title, log) in zip(panels.flat, PANELS, strict=True):
        colour = GREEN if name == "healthy" else RED
        others = [] if name == "healthy" else [("healthy", GREEN, 1.2)]
        for run, shade, width in [*others, (name, colour, 1.8)]:
            line = [(p["step"], p[key]) for p in runs[run] if key in p]
            panel.plot(*zip(*line, strict=True), color=shade, lw=width)
        panel.set(title=title)
        if log:
            panel.set_yscale("log")
            panel.minorticks_off()
            panel.set_yticks([1, 3, 10, 30, 100], [1, 3, 10, 30, 100])
        if key == "accuracy":
            panel.set_ylim(0.3, 1.03)
            panel.axhline(0.95, color=ORANGE, ls=":", lw=1)
        if key == "brightness":
            panel.axhline(REAL_BRIGHTNESS, color=BLUE, ls=":", lw=1)
            low, high = panel.get_ylim()
            panel.set_ylim(min(low, -0.6), max(high, -0.2))
    for panel in panels[1]:
        panel.set(xlabel="iterations")
    figure.savefig(OUT / f"{name}.png", dpi=150, transparent=True)
    plt.close(figure)


REAL_BRIGHTNESS = -0.389
"""Mean pixel of the training digits in [-1, 1]."""


def main() -> None:
    """Gathers if a folder is named, and draws."""
    OUT.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:]:
        gather(Path(sys.argv[1]))
    runs = json.loads(NUMBERS.read_text())
    with plt.rc_context(STYLE):
        for name in SHOWN:
            draw(name, runs)


if __name__ == "__main__":
    main()
