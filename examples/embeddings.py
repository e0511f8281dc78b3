"""Text embeddings that were computed before the training (prepare_embeddings.py).

A training encodes the same prompts again and again. Stored embeddings are read beside
the prompts in the loader's processes, and the text encoders stay out of the GPU.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dmdkit.adapters.conditions import (
    TextCondition,
    TextPooledCondition,
    sdxl_time_ids,
)
from dmdkit.adapters.pipelines import TextPipeline
from dmdkit.data import LatentSample, ShardedTensors, weights_digest

WHAT = "text embeddings"
ENCODERS = ("text_encoder", "text_encoder_2")


class Embedded(NamedTuple):
    """An item of a data set, or a batch of them, and the embeddings of its texts."""

    item: Any
    embedding: dict[str, Tensor]


def text_of(item: Any) -> Any:
    """The text of an item: prompt, caption, that of a pair; of a batch, all of them."""
    if isinstance(item, Embedded):
        item = item.item
    if isinstance(item, LatentSample):
        return item.caption
    return item["prompts"] if isinstance(item, dict) else item


def encoders_digest(pipeline: TextPipeline) -> str:
    """Names the text encoders by their weights."""
    parts: dict[str, Any] = pipeline.components
    found = (weights_digest(parts[n]) for n in ENCODERS if parts.get(n) is not None)
    return " ".join(found)


class WithEmbeddings(Dataset[Embedded]):
    """A data set whose items come with the embedding of the same index.

    Raises:
        ValueError: If the folder holds something else, or as many others.
    """

    def __init__(self, dataset: Any, folder: Path, encoders: str) -> None:
        self.dataset, self.stored = dataset, ShardedTensors(folder)
        if self.stored.about.get("what") != WHAT:
            raise ValueError(f"{folder} holds no {WHAT}, but {self.stored.kind}.")
        if self.stored.about.get("encoders") != encoders:
            raise ValueError(
                f"{folder} is of other text encoders than the teacher's; make it with "
                "examples/prepare_embeddings.py and this teacher."
            )
        if len(self.stored) != len(dataset):
            raise ValueError(
                f"{folder} holds {len(self.stored)} embeddings for {len(dataset)} "
                "texts; make it of the same texts, with the same options."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Embedded:
        item, stored = self.dataset[index], self.stored[index]
        prompt = stored.pop("prompts")
        if prompt != text_of(item):
            raise ValueError(
                f"{self.stored.folder}: embedding {index} is of {prompt[:60]!r}, the "
                f"text is {text_of(item)[:60]!r}; make it of the same texts."
            )
        return Embedded(item, stored)


def condition(
    embedding: dict[str, Tensor], device: torch.device, resolution: int
) -> TextCondition | TextPooledCondition:
    """The condition of a batch of embeddings, in fp32 on the device."""
    parts = {k: v.to(device, non_blocking=True).float() for k, v in embedding.items()}
    if "pooled" not in parts:
        return TextCondition(parts["text"])
    ids = sdxl_time_ids(len(parts["text"]), resolution, device)
    return TextPooledCondition(parts["text"], parts["pooled"], ids)
