"""Draws from a student, or from the teacher it was distilled from.

Classes, from a folder that dmdkit wrote, an exported student or a converted teacher:

    python examples/sample.py runs/imagenet_edm/student --grid samples.png
    python examples/sample.py runs/imagenet_edm/student --out samples.npz --count 50000
    python examples/sample.py teacher --out samples --count 50000 --sampler sde

Text, from a pipeline of SD1.x, SD2.x or SDXL. If its dmdkit.json has a student's times,
it is called at these, without guidance; else it is a teacher, drawn from by DDIM with
classifier-free guidance:

    python examples/sample.py student --prompts "a cat" --images-per-prompt 4 --grid cat.png
    python examples/sample.py stabilityai/stable-diffusion-xl-base-1.0 --out samples \
        --prompt-file prompts.txt --guidance 8 --precision bf16

Figure 2 of DMD2, one row a prompt, from a student or from an official release of it:

    P=examples/prompts/dmd2-figure2.txt B=stabilityai/stable-diffusion-xl-base-1.0
    python examples/sample.py student --prompt-file $P --grid figure2.png
    python examples/sample.py $B --unet dmd2_sdxl_4step_unet_fp16.bin \
        --times 999 749 499 249 --prompt-file $P --grid figure2.png

A LoRA student on its teacher:

    python examples/sample.py $B --lora runs/sdxl/student --prompts "a cat" --grid cat.png

Figures 6, 7 and 10, students and teacher side by side from the same noise:

    python examples/sample.py student --compare ablation $B --prompt-file $P --grid 6.png

Every image has a seed of its own, so it is the same in whatever batch it is drawn. Its
noise is drawn on the CPU, so it is the same for every model too.
"""  # noqa: E501

import re
from pathlib import Path
from typing import Literal

import tyro
from sample_classes import draw_classes
from sample_settings import Settings

from dmdkit.adapters.folders import KOHYA_NAME, SIDECAR


def kind_of(source: str, option: str) -> Literal["classes", "text"]:
    """What a folder, or a name on the hub, holds."""
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return "text"
    if (folder / KOHYA_NAME).is_file():
        raise SystemExit(
            f"{option} {source}: it is a LoRA student; pass its teacher as FOLDER, and "
            f"--lora {source}."
        )
    if (folder / SIDECAR).is_file():
        return "classes"
    if (folder / "student").is_dir():  # of a run's folder
        inside = folder / "student"
        raise SystemExit(f"{option} {source}: it is no model; did you mean {inside}?")
    if folder.exists():
        raise SystemExit(
            f"{option} {source}: it has neither the model_index.json of a pipeline nor "
            f"the {SIDECAR} of a class-conditional model."
        )
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if not is_name or folder.parent.is_dir():  # a name on the hub has no folder here
        raise SystemExit(f"{option} {source}: there is no such folder.")
    return "text"


def main(settings: Settings) -> None:
    """Draws a grid, single images, or both."""
    settings.check()
    kind = kind_of(settings.folder, "FOLDER")
    for source in settings.compare:
        if kind_of(source, "--compare") == "classes" or kind == "classes":
            raise SystemExit(
                "--compare: only text-to-image pipelines can be compared, and "
                f"{source if kind == 'text' else settings.folder} is none."
            )
    try:
        if kind == "classes":
            draw_classes(settings)
        else:
            # transformers, which only text needs, takes seconds to import.
            from sample_text import draw_text

            draw_text(settings)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(tyro.cli(Settings))
