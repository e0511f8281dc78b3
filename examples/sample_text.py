"""Draws from text-to-image students and teachers, for `sample.py`."""

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from labelled_grid import labelled_grid
from runs import grid_of, option, save_png
from sample_models import Picture, Source, TextModel, sources_of
from sample_settings import CLASS_OPTIONS, Settings, partial_of, parts
from torch import Tensor
from tqdm import tqdm

from dmdkit.data import read_prompts

BATCH_SIZE = 4
MOST_IN_A_GRID = 1024


def prompts_of(settings: Settings) -> list[str]:
    """The prompts that were given, one way or the other."""
    file = settings.prompt_file
    if bool(settings.prompts) == bool(file):
        wrong = "one of them, not both" if file else "one of them"
        missing = "" if Path(settings.folder).is_dir() else ", and no such folder here"
        raise SystemExit(
            f"--prompts, --prompt-file: give {wrong}; {settings.folder} is a "
            f"text-to-image pipeline{missing}."
        )
    if file is None or file.suffix.lower() == ".txt":
        settings.refuse(("prompt_column",), "only a --prompt-file with columns has it.")
    if file is None:
        return list(settings.prompts)
    with option("prompt-file"):
        return list(read_prompts(file, column=settings.prompt_column))


def check_text(settings: Settings, sources: list[Source], count: int) -> None:
    """Refuses what cannot be drawn, before anything is loaded."""
    if settings.grid is not None and count * len(sources) > MOST_IN_A_GRID:
        raise SystemExit(
            f"--grid: {count * len(sources)} images are too many for a picture, "
            f"expected {MOST_IN_A_GRID} at most; use --out."
        )
    if settings.compare and (settings.out is not None or settings.grid is None):
        raise SystemExit("--compare: it makes a picture; give --grid, and not --out.")
    if settings.out is not None and settings.out.suffix == ".npz":
        raise SystemExit(f"--out {settings.out}: expected a folder, for text.")
    if all(source.times for source in sources):
        settings.refuse(
            ("steps", "guidance"),
            "no teacher is drawn from; students are called at their times, without "
            "guidance.",
        )


def draw(
    model: TextModel, pictures: list[Picture], settings: Settings, bar: tqdm
) -> Iterator[tuple[range, Tensor]]:
    """Draws batch by batch: which images, and uint8 [b, 3, h, w]."""
    for part in parts(len(pictures), settings.batch_size or BATCH_SIZE):
        yield part, model.pixels([pictures[i] for i in part])
        bar.update(len(part))


def save_single(
    source: Source, pictures: list[Picture], settings: Settings, bar: tqdm
) -> None:
    """Draws from one model: a grid, single images, or both."""
    out, kept = settings.out, []
    partial = None if out is None else partial_of(out)
    model = TextModel(source, settings)
    if partial is not None:
        partial.mkdir(parents=True)
    for part, pixels in draw(model, pictures, settings, bar):
        if settings.grid is not None:
            kept.append(pixels)
        if partial is not None:
            for i, image in zip(part, pixels, strict=True):
                save_png(image, partial / f"{i:06d}.png")
    bar.close()
    if out is not None and partial is not None:
        save_prompts(pictures, partial / "prompts.jsonl")
        partial.rename(out)
        print(f"Wrote {len(pictures)} images and prompts.jsonl to {out}.")
    if settings.grid is not None:
        each = settings.images_per_prompt
        # A row for each prompt, but a block where there would be one row or column.
        prompts = [picture.prompt for picture in pictures[::each]]
        block = each == 1 or len(prompts) == 1
        columns = math.ceil(math.sqrt(len(pictures))) if block else each
        save_png(grid_of(torch.cat(kept), columns), settings.grid)
        what = "row by row" if block else "a row each"
        print(f"Wrote {settings.grid}, by {model.about}; its prompts, {what}:")
        for number, prompt in enumerate(prompts, 1):
            print(f"{number:4d}  {prompt}")


def save_prompts(pictures: list[Picture], path: Path) -> None:
    """Writes what each file was drawn from; `--prompt-file` reads it too."""
    with path.open("w", encoding="utf-8") as file:
        for i, picture in enumerate(pictures):
            line = {"file": f"{i:06d}.png", **picture._asdict()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def save_comparison(
    sources: list[Source], pictures: list[Picture], settings: Settings, bar: tqdm
) -> None:
    """Draws from each model in turn, one in memory, and lays them out side by side."""
    assert settings.grid is not None
    columns, titles, shapes = [], [], []
    for source, title in zip(sources, titles_of(sources), strict=True):
        model = TextModel(source, settings)
        titles.append(f"{title}\n{model.about}")
        shapes.append(model.space.shape)
        if shapes[0] != shapes[-1]:
            raise SystemExit(
                f"--compare {source.name}: its latents are {list(shapes[-1])}, those "
                f"of FOLDER {list(shapes[0])}; give --resolution."
            )
        columns.append(
            torch.cat([pixels for _, pixels in draw(model, pictures, settings, bar)])
        )
        del model
        gc.collect()
        torch.cuda.empty_cache()
    bar.close()
    several = settings.images_per_prompt > 1
    labels = [p.prompt + (f" (seed {p.seed})" if several else "") for p in pictures]
    settings.grid.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(columns, titles, labels).save(settings.grid)
    print(f"Wrote {settings.grid}; its columns are:")
    for title in titles:
        print(f"  {title.replace(chr(10), ': ')}")


def titles_of(sources: list[Source]) -> list[str]:
    """The ends of the models' paths, as much of them as tells one from another."""
    paths = [Path(source.title).parts for source in sources]

    def end(parts: tuple[str, ...]) -> str:
        for n in range(1, len(parts)):
            if sum(other[-n:] == parts[-n:] for other in paths) == 1:
                return "/".join(parts[-n:])
        return str(Path(*parts))

    return [end(parts) for parts in paths]


def draw_text(settings: Settings) -> None:
    """Draws a grid, single images, both, or a comparison."""
    settings.refuse(
        CLASS_OPTIONS,
        f"{settings.folder} is a text-to-image pipeline; this is for class-conditional "
        "models.",
    )
    prompts, n = prompts_of(settings), settings.images_per_prompt
    pictures = [
        Picture(prompts[i // n], settings.seed + i) for i in range(len(prompts) * n)
    ]
    sources = sources_of(settings)
    check_text(settings, sources, len(pictures))
    total = len(pictures) * len(sources)
    with tqdm(total=total, desc="drawing", unit="image") as bar:
        if settings.compare:
            save_comparison(sources, pictures, settings, bar)
        else:
            save_single(sources[0], pictures, settings, bar)
