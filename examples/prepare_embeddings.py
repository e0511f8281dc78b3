"""Encodes prompts, or the captions of latents, once for all trainings.

    python examples/prepare_embeddings.py PIPELINE embeddings --prompts prompts.txt
    python examples/prepare_embeddings.py PIPELINE captions --latents latents

The recipes read them with --embeddings and --latent-embeddings. In fp16 a text takes
118 KB (SD1.5) or 318 KB (SDXL). They are written in shards with their texts, and the
same command continues where it was interrupted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from distillation import require_at_least
from embeddings import WHAT, encoders_digest, text_of
from runs import device_of, option
from text_models import open_pipeline
from torch import Tensor
from tqdm import tqdm

from dmdkit.adapters.conditions import TextPooledCondition
from dmdkit.adapters.pipelines import encode_prompts
from dmdkit.data import ShardWriter, open_latents, read_prompts


@dataclass(frozen=True)
class Settings:
    """Encodes prompts, or the captions of latents."""

    pretrained: tyro.conf.Positional[str]
    """The teacher: a pipeline of diffusers, a folder or a name on the hub."""
    out: tyro.conf.Positional[Path]
    """Folder of the shards."""
    prompts: Path | None = None
    """.txt, .jsonl, .csv or .parquet file; as the recipes read it."""
    prompt_column: str = "prompt"
    """Of a table of prompts."""
    min_aesthetic: float | None = None
    """Least score in the table's column "aesthetic"; None: no such filter."""
    latents: tuple[Path, ...] = ()
    """Instead of prompts: folders of latents, whose captions are encoded."""
    local_files_only: bool = False
    """Never ask the hub."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """How embeddings are stored."""
    batch_size: int = 64
    shard_size: int = 1000
    """Texts in a file."""
    device: str = "auto"

    def check(self) -> None:
        """Refuses what cannot run."""
        require_at_least(self, 1, "batch_size", "shard_size")
        if (self.prompts is None) == (not self.latents):
            raise SystemExit("--prompts, --latents: give one of them.")

    def texts(self) -> Any:
        """The data set of which the texts are."""
        if self.prompts is None:
            with option("latents"):
                return open_latents(self.latents)
        with option("prompts"):
            return read_prompts(
                self.prompts,
                column=self.prompt_column,
                min_aesthetic=self.min_aesthetic,
            )


@torch.no_grad()
def main(settings: Settings) -> None:
    """Encodes the texts, from where it stopped."""
    settings.check()
    texts = settings.texts()
    pipeline = open_pipeline(
        settings.pretrained,
        "pretrained",
        local_files_only=settings.local_files_only,
    )
    dtype = torch.float16 if settings.dtype == "fp16" else torch.float32
    about = {
        "what": WHAT,
        "encoders": encoders_digest(pipeline),
        "dtype": settings.dtype,
        "texts": len(texts),
    }
    try:
        writer = ShardWriter(settings.out, about=about, shard_size=settings.shard_size)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    pipeline.to(device_of(settings.device))
    left = range(writer.position, len(texts))
    bar = tqdm(total=len(left), desc="encoding", unit="text")
    for start in left[:: settings.batch_size]:
        rows = range(start, min(start + settings.batch_size, len(texts)))
        prompts = [text_of(texts[row]) for row in rows]
        cond = encode_prompts(pipeline, prompts)
        stored: dict[str, Tensor] = {"text": cond.text.to(dtype)}
        if isinstance(cond, TextPooledCondition):
            stored["pooled"] = cond.pooled.to(dtype)
        if not all(bool(value.isfinite().all()) for value in stored.values()):
            raise SystemExit(
                f"--dtype {settings.dtype}: texts {rows.start} to {rows.stop - 1} have "
                "embeddings that it cannot hold; take fp32."
            )
        writer.add(prompts=prompts, **stored)
        bar.update(len(rows))
    bar.close()
    writer.close()
    print(f"{settings.out} holds the embeddings of {writer.position} texts.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. The same command continues.") from None
