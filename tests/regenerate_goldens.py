"""Writes the golden curves anew, with the reason for it.

    python tests/regenerate_goldens.py --reason "the head is drawn before the networks"

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

from helpers_recipes import save_digit_images, save_digits_teacher  # noqa: E402
from test_imagenet_recipe import GOLDENS, golden_curve  # noqa: E402


def main() -> None:
    """Runs the ten iterations and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reason", required=True)
    reason = parser.parse_args().reason
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        curve = golden_curve(
            {
                "teacher": save_digits_teacher(top / "teacher"),
                "images": save_digit_images(top / "images", side=8, channels=1),
            }
        )
    about = {
        "reason": reason,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "curve": curve,
    }
    GOLDENS.parent.mkdir(exist_ok=True)
    GOLDENS.write_text(json.dumps(about, indent=2) + "\n")
    print(f"Wrote {GOLDENS}.")


if __name__ == "__main__":
    main()
