"""Denoisers as folders: a diffusers UNet, and beside it what sampling needs.

The UNet is an ordinary diffusers folder, `UNet2DModel.from_pretrained(folder)` or, for
a UNet with text, `UNet2DConditionModel.from_pretrained(folder)`. The file
`dmdkit.json` beside it names the process, the parameterization and, for a student,
the times at which it is called. Nothing in a folder is executed when it is read.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

import dmdkit.diffusion as diffusion
from dmdkit._checked import describe
from dmdkit._files import open_to_umask
from dmdkit.adapters.diffusers import FeaturePlace, UNetNetwork
from dmdkit.diffusion import NoiseProcess, Parameterization, ScoreEstimator

SIDECAR = "dmdkit.json"
KOHYA_NAME = "kohya.safetensors"
"""The file of an adapter in kohya's layout."""
_PROCESSES = {
    kind.__name__: kind
    for kind in (
        diffusion.VarianceExploding,
        diffusion.DiscreteVariancePreserving,
        diffusion.RectifiedFlow,
    )
}
_PARAMETERIZATIONS = {
    kind.__name__: kind
    for kind in (
        diffusion.EpsilonPrediction,
        diffusion.VPrediction,
        diffusion.VelocityPrediction,
        diffusion.SamplePrediction,
        diffusion.KarrasPreconditioning,
    )
}


class Sidecar(NamedTuple):
    """What stands in `dmdkit.json`.

    Attributes:
        process: The noise process.
        parameterization: What the UNet predicts.
        times: The times of a few-step student in falling order; None for a teacher.
        about: Anything else: where the weights come from, how they were trained.
    """

    process: NoiseProcess
    parameterization: Parameterization
    times: tuple[float, ...] | None
    about: dict[str, Any]


def save_denoiser(
    folder: str | Path,
    estimator: ScoreEstimator,
    *,
    times: tuple[float | int, ...] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a denoiser as a diffusers folder, whole or not at all.

    Args:
        folder: Where it goes. A denoiser written there before is replaced.
        estimator: The denoiser, its network a `UNetNetwork` without a head.
        times: For a few-step student the times at which it is called.
        about: What else is to be known, as JSON can hold it: provenance, settings.

    Raises:
        TypeError: If the network is no `UNetNetwork`.
        ValueError: If the folder holds something else.
        OSError: If it cannot be written.
    """
    network = estimator.network
    if not isinstance(network, UNetNetwork):
        raise TypeError(
            f"estimator: its network is {describe(network)}, expected a UNetNetwork; "
            "take it out of its wrapper or head first."
        )
    with replacing(folder) as partial:
        network.unet.save_pretrained(partial)
        write_sidecar(partial, estimator, times, about)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the place of another one when it is full."""
    folder = Path(folder)
    require_replaceable(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    open_to_umask(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_sidecar(
    folder: Path,
    estimator: ScoreEstimator,
    times: tuple[float | int, ...] | None,
    about: Mapping[str, Any] | None,
) -> None:
    """Writes what `read_sidecar` reads."""
    content = {
        "process": _value(estimator.process),
        "parameterization": _value(estimator.parameterization),
        "times": times,
        "about": dict(about or {}),
    }
    (folder / SIDECAR).write_text(json.dumps(content, indent=2) + "\n")


def require_replaceable(folder: str | Path) -> None:
    """Raises `ValueError` if a folder holds anything that is no part of a denoiser.

    Args:
        folder: A folder that is to be written; it need not exist.

    Raises:
        ValueError: If it is a file, or a folder with other things in it.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file; name another.")
    names = {path.name for path in folder.iterdir()}
    own = _names_written(folder) if SIDECAR in names else set()
    if strangers := sorted(names - own):
        raise ValueError(
            f"folder: {folder} holds {strangers[0]}, which is no part of a denoiser; "
            "move it, or name another folder."
        )


def _names_written(folder: Path) -> set[str]:
    """What a denoiser or a pipeline consists of, by name, in a folder."""
    names = {SIDECAR, "README.md", "config.json", "model_index.json"}
    names |= {KOHYA_NAME, "pytorch_lora_weights.safetensors"}
    names |= {path.name for path in folder.glob("diffusion_pytorch_model*")}
    index = folder / "model_index.json"
    return names | set(json.loads(index.read_text()) if index.is_file() else ())


def read_sidecar(folder: str | Path) -> Sidecar:
    """Reads what stands beside the UNet.

    Args:
        folder: A folder that `save_denoiser` wrote.

    Returns:
        Its content.

    Raises:
        ValueError: If it is missing or not understood.
    """
    path = Path(folder) / SIDECAR
    if not path.is_file():
        raise ValueError(
            f"folder: there is no {SIDECAR} in {folder}; it is no folder that "
            "dmdkit wrote (see examples/convert_edm.py)."
        )
    try:
        content = json.loads(path.read_text())
        times = content["times"]
        return Sidecar(
            _build(_PROCESSES, content["process"]),
            _build(_PARAMETERIZATIONS, content["parameterization"]),
            None if times is None else tuple(float(t) for t in times),
            content["about"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"folder: {path} is not understood: {error!r}.") from error


def load_denoiser(
    folder: str | Path, *, features: FeaturePlace = "mid"
) -> ScoreEstimator:
    """Reads a denoiser from a folder.

    Args:
        folder: A folder that `save_denoiser` wrote.
        features: Where its network reads features (see `UNetNetwork`).

    Returns:
        The denoiser in evaluation mode, with fp32 weights that can be trained.

    Raises:
        ValueError: If something is missing or not understood.
    """
    sidecar = read_sidecar(folder)
    kind = _unet_kind(Path(folder))
    try:
        unet: Any = kind.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"folder: {folder} holds no UNet: {message}") from error
    return ScoreEstimator(
        UNetNetwork(unet.float(), features),
        sidecar.process,
        sidecar.parameterization,
    ).eval()


def _unet_kind(folder: Path) -> type[Any]:
    """The class that a folder's `config.json` names."""
    kinds = {
        kind.__name__: kind
        for kind in (diffusers.UNet2DModel, diffusers.UNet2DConditionModel)
    }
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"folder: {folder} holds no UNet: there is no config.json.")
    try:
        name = json.loads(config.read_text())["_class_name"]
        return kinds[name]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"folder: {config} is not that of a UNet ({error!r}); expected a "
            f"_class_name of {' or '.join(kinds)}."
        ) from error


def _value(value: Any) -> dict[str, Any]:
    return {"type": type(value).__name__, **dataclasses.asdict(value)}


def _build(kinds: Mapping[str, type], described: Mapping[str, Any]) -> Any:
    arguments = dict(described)
    kind = kinds.get(arguments.pop("type"))
    if kind is None:
        raise ValueError(f"type {described['type']!r}, expected one of {list(kinds)}")
    # JSON has lists where the values have tuples.
    return kind(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    )
