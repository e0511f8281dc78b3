"""Writes a recipe's golden curve anew, with the reason for it.

    python tests/regenerate_goldens.py imagenet_edm \
        --reason "the head is drawn before the networks"

A golden file changes only when the numbers of a recipe are meant to change.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import test_imagenet_recipe  # noqa: E402
import test_text_recipes  # noqa: E402
from helpers_pipelines import save_latents, save_prompts, save_sdxl  # noqa: E402
from helpers_recipes import save_digit_images, save_digits_teacher  # noqa: E402

Curve = dict[str, list[float]]


def imagenet_edm(top: Path) -> Curve:
    """The digits teacher through the ImageNet recipe."""
    return test_imagenet_recipe.golden_curve(
        {
            "teacher": save_digits_teacher(top / "teacher"),
            "images": save_digit_images(top / "images", side=8, channels=1),
        }
    )


def sdxl(top: Path) -> Curve:
    """A tiny pipeline through the SDXL recipe."""
    pipeline = save_sdxl(top / "sdxl")
    return test_text_recipes.golden_curve(
        {
            "sdxl": pipeline,
            "sdxl-latents": save_latents(top / "latents", pipeline),
            "prompts": save_prompts(top / "prompts.txt"),
        }
    )


RECIPES = {
    "imagenet_edm": (imagenet_edm, test_imagenet_recipe.GOLDENS),
    "sdxl": (sdxl, test_text_recipes.GOLDENS),
}


def main() -> None:
    """Runs the ten iterations and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--reason", required=True)
    given = parser.parse_args()
    run, file = RECIPES[given.recipe]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curve = run(Path(folder))
    about = {
        "reason": given.reason,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "curve": curve,
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(about, indent=2) + "\n")
    print(f"Wrote {file}.")


if __name__ == "__main__":
    main()
