"""The paper's teachers by name, and its numbers, for `evaluate.py`."""

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from digits_evaluation import ROWS_FILE

SamplerName = Literal[
    "auto", "edm-ode", "edm-sde", "sd15-pndm", "sd15-ddpm", "sdxl-cfg6", "sdxl-cfg8"
]


class Baseline(NamedTuple):
    """A teacher's sampler as the paper ran it.

    `steps` are noise levels for classes, of which n are 2n - 1 calls.
    """

    kind: Literal["heun", "sde", "pndm", "ddpm", "euler"]
    steps: int
    guidance: float | None = None

    @property
    def is_text(self) -> bool:
        """Whether it draws from prompts."""
        return self.kind not in ("heun", "sde")


BASELINES: dict[str, Baseline] = {
    "edm-ode": Baseline("heun", 256),
    "edm-sde": Baseline("sde", 256),
    "sd15-pndm": Baseline("pndm", 50, 3.0),
    "sd15-ddpm": Baseline("ddpm", 200, 2.0),
    "sdxl-cfg6": Baseline("euler", 50, 6.0),
    "sdxl-cfg8": Baseline("euler", 50, 8.0),
}
"""EDM's two are Algorithms 1 and 2 at 511 calls [Table 1]; SD1.5's the ODE and SDE of
Table 5; SDXL's, with its own Euler scheduler, those of Tables 2 and 6."""


class Published(NamedTuple):
    """A row of a table of somebody else's."""

    method: str
    source: str
    numbers: dict[str, float]
    """By protocol, and the latency in seconds an image."""
    calls: int | None = None


def _sdxl(
    method: str, calls: int, numbers: tuple[float, ...], where: str = "Table 2"
) -> Published:
    names = ["coco10k_512", "patch_fid_299", "clip_score", "lpips_diversity"]
    found: dict[str, float] = dict(zip(names, numbers, strict=False))
    return Published(method, f"the paper's {where}", found, calls)


def _sd15(method: str, seconds: float, fid: float) -> Published:
    numbers = {"coco30k_256": fid, "latency": seconds}
    return Published(method, "the paper's Table 5", numbers)


def _imagenet(method: str, calls: int, fid: float) -> Published:
    numbers = {"imagenet64_edm": fid}
    return Published(method, "the paper's Table 1", numbers, calls)


PAPER = (
    _imagenet("EDM (teacher, ODE)", 511, 2.32),
    _imagenet("EDM (teacher, SDE)", 511, 1.36),
    _imagenet("DMD", 1, 2.62),
    _imagenet("DMD2", 1, 1.51),
    _imagenet("DMD2, longer training", 1, 1.28),
    _sd15("SD1.5 (50 steps, cfg 3, ODE)", 2.59, 8.59),
    _sd15("SD1.5 (200 steps, cfg 2, SDE)", 10.25, 7.21),
    _sd15("DMD", 0.09, 11.49),
    _sd15("DMD2", 0.09, 8.35),
    _sdxl("SDXL (teacher, cfg 6)", 100, (19.36, 21.38, 0.332, 0.64), "Tables 2, 6"),
    _sdxl("SDXL (teacher, cfg 8)", 100, (20.39, 23.21, 0.335, 0.64), "Table 6"),
    _sdxl("DMD2", 1, (19.01, 26.98, 0.336)),
    _sdxl("DMD2", 4, (19.32, 20.86, 0.332, 0.61), "Tables 2, 6"),
)
"""Teachers, and DMD2 itself. Latencies are those of the authors' GPU."""


def published(protocols: Sequence[str], *, latency: bool) -> list[Published]:
    """What there is to stand beside a result."""
    wanted = {*protocols, *(["latency"] if latency and not protocols else [])}
    rows = [row for row in PAPER if wanted & row.numbers.keys()]
    return rows + (digits_rows() if "digits" in protocols else [])


def digits_rows() -> list[Published]:
    """The shipped teacher, as `digits_evaluation.py` measured it.

    It measures floats. With 7 calls some leave [-1, 1] so far that 256 levels, which
    cut them off, make another number; so that row is left out.
    """
    rows = json.loads(ROWS_FILE.read_text())["rows"]
    return [
        Published(
            "digits teacher (Heun)",
            f"examples/{ROWS_FILE.name}",
            {"digits": row["frechet"], "accuracy": row["accuracy"]},
            int(calls),
        )
        for calls, row in rows.items()
        if int(calls) > 7
    ]
