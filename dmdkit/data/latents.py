"""Latents of captioned images: which VAE made them, and sets that go together."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from dmdkit._checked import checked
from dmdkit.data.shard_columns import TEXT
from dmdkit.data.shards import ShardedTensors

_WHAT = "latents with captions"


@dataclass(frozen=True)
class LatentKind:
    """What must be equal for latents to be trained on together.

    Attributes:
        vae: The VAE that made them, as `weights_digest` names it.
        scaling_factor: What the VAE's latents were multiplied by, as diffusers' VAEs
            have it in their configuration.
        resolution: Height and width of the images, in pixels.
        dtype: How they are stored: "float16", "bfloat16", "float32".
        shift_factor: What was subtracted before scaling; 0 for SD1.5 and SDXL.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from dmdkit.data import ShardWriter
        >>> kind = LatentKind("sha256:0", 0.18215, resolution=64)
        >>> with TemporaryDirectory() as folder:
        ...     writer = ShardWriter(folder, about=kind.about())
        ...     x = torch.zeros(2, 4, 8, 8, dtype=torch.float16)
        ...     writer.add(latents=x, captions=["a cat", "a dog"])
        ...     writer.close()
        ...     latents = open_latents(folder, vae="sha256:0", resolution=64)
        >>> latents[1].caption
        'a dog'
    """

    vae: str
    scaling_factor: float | int
    resolution: int
    dtype: str = "float16"
    shift_factor: float | int = 0.0

    def about(self) -> dict[str, str | int | float]:
        """Gives what a `ShardWriter` of such latents is told they are about.

        Returns:
            Its `about`.
        """
        return {"what": _WHAT, **asdict(self)}


class LatentSample(NamedTuple):
    """An item of a `LatentDataset`.

    Attributes:
        latent: As stored, scaled: [channels, height, width].
        caption: What the image shows.
    """

    latent: Tensor
    caption: str


class LatentDataset(Dataset[LatentSample]):
    """Latents and captions of shards; `open_latents` makes it.

    PyTorch collates a batch to a `LatentSample` of a tensor and a tuple of str. It can
    be pickled, and read in several processes.

    Args:
        parts: Shards with "latents" and "captions", which follow one another.

    Attributes:
        kind: What the latents are.
        shape: Channels, height and width of one.

    Raises:
        ValueError: If there are none, shards hold something else, or they are of
            different kinds.
    """

    def __init__(self, parts: Sequence[ShardedTensors]) -> None:
        if not parts:
            raise ValueError("parts: there are none.")
        self.kind = _kind_of(parts[0])
        first, own = parts[0], _properties(parts[0])
        for part in parts[1:]:
            for name, value in _properties(part).items():
                if value != own[name]:
                    raise ValueError(
                        f"folders: {part.folder} holds latents of {name} {value!r}, "
                        f"{first.folder} of {own[name]!r}; only equal ones go together."
                    )
        self._samples: ConcatDataset[dict[str, Any]] = ConcatDataset(parts)
        self.shape = tuple(parts[0][0]["latents"].shape)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> LatentSample:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 ... {len(self) - 1}.")
        sample = self._samples[index]
        return LatentSample(sample["latents"], sample["captions"])


@checked
def open_latents(
    folders: str | Path | Sequence[str | Path],
    *,
    vae: str | None = None,
    scaling_factor: float | int | None = None,
    resolution: int | None = None,
    dtype: str | None = None,
) -> LatentDataset:
    """Opens one or several folders of latents with captions.

    Args:
        folders: A folder that `ShardWriter` wrote with a `LatentKind`, as
            `examples/prepare_latents.py` does, or several of one kind, which follow
            one another.
        vae: The VAE they must be of, as `weights_digest` names it; any if None.
        scaling_factor: The factor they must have been multiplied by; any if None.
        resolution: The images' height and width that they must have; any if None.
        dtype: How they must be stored, such as "float16"; in any way if None.

    Returns:
        The set.

    Raises:
        ValueError: If a folder is damaged, unfinished or holds something else, the
            latents are not what is asked for, or two folders are of different kinds.
    """
    several = [folders] if isinstance(folders, str | Path) else folders
    latents = LatentDataset([ShardedTensors(folder) for folder in several])
    asked = {
        "vae": vae,
        "scaling_factor": scaling_factor,
        "resolution": resolution,
        "dtype": dtype,
    }
    for name, value in asked.items():
        found = getattr(latents.kind, name)
        if value is not None and value != found:
            raise ValueError(
                f"folders: {several[0]} holds latents of {name} {found!r}, expected "
                f"{value!r}; pass what they were made with, or prepare others."
            )
    return latents


@torch.no_grad()
def weights_digest(module: nn.Module) -> str:
    """Names a module by its weights, whatever file or precision they came from.

    Args:
        module: Such as a VAE.

    Returns:
        "sha256:" and the digest of all parameters and buffers in the state dict, in
        fp32: a VAE loaded in fp16 from an fp16 file is named as if loaded in fp32.

    Examples:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> weights_digest(layer) == weights_digest(nn.Linear(2, 2))
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _kind_of(shards: ShardedTensors) -> LatentKind:
    names = [field.name for field in fields(LatentKind)]
    stored, dtype = shards.kind.get("latents", ""), shards.about.get("dtype")
    if (
        shards.about.get("what") != _WHAT
        or not shards.about.keys() >= set(names)
        or shards.kind.get("captions") != TEXT
        or not stored.startswith(f"{dtype}[")
    ):
        raise ValueError(
            f"folders: {shards.folder} holds no {_WHAT}, but {shards.kind}, "
            f"about={shards.about}."
        )
    return LatentKind(**{name: shards.about[name] for name in names})


def _properties(shards: ShardedTensors) -> dict[str, Any]:
    return {**asdict(_kind_of(shards)), "shape": shards.kind["latents"]}
