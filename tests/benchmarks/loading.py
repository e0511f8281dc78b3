"""Samples a second of the recipes' loaders, against what a GPU would take.

    python tests/benchmarks/loading.py --json loading.json

Data of the real kind and size are made up: a zip of PNG files of 64 x 64 pixels with
labels; latents of 4 x 64 x 64 and 4 x 128 x 128 in fp16 with captions, and prompts;
the same with stored text embeddings. They are read as the recipes read them, by one
process and by workers. Files are in the disk's cache, so that what is measured is
decoding, collating and handing over.

The need is that of one GPU at 400 TFLOP/s (40 % of an H100's peak in bf16), from the
FLOPs that examples/plan.py counts for a cycle. `per_cpu_second` is what one core does
when it does nothing else; `workers` says what comes out beside a training process that
only waits, in wall-clock time.
"""

import argparse
import io
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from embeddings import WHAT, WithEmbeddings  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dmdkit.data import (  # noqa: E402
    BatchStream,
    LatentKind,
    Prompts,
    ShardWriter,
    open_images,
    open_latents,
)

TFLOPS = 400e12
CYCLE = {
    # FLOPs of a cycle and samples that it takes from each loader, on one GPU.
    "imagenet": (0.29e15, 5 * 40),
    "sd15": (2.0e15, 10 * 32),
    "sdxl": (0.75e15, 5 * 2),
}
BATCH = {"imagenet": 40, "sd15": 32, "sdxl": 2}
COUNT = {"imagenet": 4000, "sd15": 600, "sdxl": 200}
SIDE = {"sd15": 64, "sdxl": 128}
EMBEDDING: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {"text": (77, 768)},
    "sdxl": {"text": (77, 2048), "pooled": (1280,)},
}


def images(folder: Path) -> Any:
    """An EDM data set: smooth pictures with noise, which compress as photographs do."""
    draw, labels = np.random.default_rng(0), []
    file = folder / "images.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(COUNT["imagenet"]):
            coarse = draw.uniform(0, 255, (8, 8, 3)).astype(np.uint8)
            smooth = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
            pixels = np.asarray(smooth) + draw.normal(0, 8, (64, 64, 3))
            png = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(png, "png")
            name = f"{i // 1000:05d}/img{i:08d}.png"
            archive.writestr(name, png.getvalue())
            labels.append([name, i % 1000])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return open_images(file, resolution=64, channels=3, classes=1000)


def latents(folder: Path, recipe: str) -> Any:
    """Latents with captions."""
    kind = LatentKind("sha256:0", 0.18215, 8 * SIDE[recipe])
    writer = ShardWriter(folder, about=kind.about(), shard_size=100)
    for i in range(0, COUNT[recipe], 100):
        stored = torch.randn(100, 4, SIDE[recipe], SIDE[recipe]).half()
        writer.add(latents=stored, captions=captions(i, 100))
    writer.close()
    return open_latents(folder)


def captions(start: int, count: int) -> list[str]:
    """Texts as long as captions are."""
    words = "a photograph of something that somebody saw, number"
    return [f"{words} {i}" for i in range(start, start + count)]


def embedded(dataset: Any, folder: Path, recipe: str) -> Any:
    """A data set of captions with embeddings."""
    about: dict[str, str] = {"what": WHAT, "encoders": "none"}
    writer = ShardWriter(folder, about=about, shard_size=50)
    for i in range(0, COUNT[recipe], 50):
        parts: dict[str, Tensor] = {
            name: torch.randn(50, *shape).half()
            for name, shape in EMBEDDING[recipe].items()
        }
        writer.add(prompts=captions(i, 50), **parts)
    writer.close()
    return WithEmbeddings(dataset, folder, "none")


def rate(
    datasets: list[Any], size: int, count: int, workers: int, clock: Callable[[], float]
) -> float:
    """Samples a second of each loader, where a batch is taken from all of them."""
    streams = [BatchStream(d, size, seed=0, workers=workers) for d in datasets]
    batches = max(count // size, 3)
    for stream in streams:
        for _ in range(1 + 2 * workers):  # workers start, and read ahead
            next(stream)
    start = clock()
    for _ in range(batches):
        for stream in streams:
            next(stream)
    seconds = clock() - start
    for stream in streams:
        stream.close()
    return batches * size / seconds


def measure(name: str, recipe: str, datasets: list[Any]) -> dict[str, Any]:
    """One recipe's loaders against its need."""
    flops, taken = CYCLE[recipe]
    need = taken / (flops / TFLOPS)
    given = datasets, BATCH[recipe], COUNT[recipe]
    alone = rate(*given, 0, time.process_time)
    with_workers = {
        str(workers): round(rate(*given, workers, time.perf_counter), 1)
        for workers in (1, 2)
    }
    return {
        "loaders": name,
        "batch": BATCH[recipe],
        "needed_per_second": round(need, 1),
        "per_cpu_second": round(alone, 1),
        "cores_needed": round(need / alone, 3),
        "workers": with_workers,
    }


def main() -> None:
    """Measures every loader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, tqdm(total=5, unit="loader") as bar:
        top = Path(name)

        def note(label: str, recipe: str, *datasets: Any) -> None:
            bar.set_description(label)
            found.append(measure(label, recipe, list(datasets)))
            bar.update()

        note("imagenet: PNG files in a zip", "imagenet", images(top))
        for recipe in ("sd15", "sdxl"):
            real = latents(top / recipe, recipe)
            prompts = Prompts(captions(0, COUNT[recipe]))
            note(f"{recipe}: latents, prompts", recipe, real, prompts)
            both = (
                embedded(real, top / f"{recipe}-captions", recipe),
                embedded(prompts, top / f"{recipe}-prompts", recipe),
            )
            note(f"{recipe}: the same with embeddings", recipe, *both)
    for line in found:
        print(json.dumps(line))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
