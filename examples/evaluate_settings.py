"""What `evaluate.py` is told."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from evaluate_baselines import SamplerName
from sample_settings import flag

ProtocolName = Literal[
    "imagenet64_edm",
    "coco30k_256",
    "coco10k_512",
    "patch_fid_299",
    "fd_dinov2",
    "clip_score",
    "clip_score_bigg",
    "lpips_diversity",
    "digits",
]
NetworkName = Literal["inception", "dinov2", "clip", "clip_bigg", "lpips"]
MODEL_OPTIONS = (
    *("sampler", "seeds", "steps", "guidance", "times", "resolution", "lora", "unet"),
    *("local_files_only", "precision", "latency"),
)
OWN = ("json", "numbers", "device", "threads", "repeat")
"""What may differ when a result is repeated, and does not change it."""


@dataclass(frozen=True)
class Settings:
    """Measures images, or those that a student or teacher draws, by a protocol."""

    protocol: tuple[ProtocolName, ...] = ()
    """What is measured; several of the same images: they are drawn once."""

    images: tuple[Path, ...] = ()
    """Images: a folder of PNG and JPEG files, or an .npz file with `images` or `arr_0`
    (uint8 [n, h, w, 3] or [n, 3, h, w]) and perhaps `labels`. Several: a set each."""
    student: str | None = None
    """A student that a recipe exported; an adapter's teacher, with --lora."""
    teacher: Annotated[str | None, tyro.conf.arg(aliases=["--pipeline"])] = None
    """A teacher: a folder of convert_edm.py, a pipeline (a folder or a name on the
    hub), or "digits", the one in this repository."""
    sampler: SamplerName = "auto"
    """Of a teacher: one of the paper's baselines, with its steps and guidance. auto:
    what sample.py takes."""

    reference: Path | None = None
    """Real images: their statistics in an .npz file (EDM's, NVIDIA's, clean-fid's, or
    of this program), or a folder of them, whose statistics are kept beside it. digits
    has its own."""
    reference_count: int | None = None
    """How many images an .npz is of, where it does not say; None: as many as the
    protocol asks for."""
    weights: dict[NetworkName, Path] = field(default_factory=dict)
    """Files of the networks that measure, such as "inception FILE clip FILE"; others
    are fetched by their libraries, or found in their caches."""
    checksums: dict[NetworkName, str] = field(default_factory=dict)
    """SHA-256 that these files must have, or its first digits: "inception 6726825d"."""

    kid: bool = False
    """Also the kernel distance, of 100 subsets of 1,000 images; this, and the next two,
    need a folder of real images, and keep features in memory."""
    precision_recall: bool = False
    """Also precision and recall, of 3 neighbours [Kynkäänniemi et al. 2019]."""
    density_coverage: bool = False
    """Also density and coverage, of 5 neighbours [Naeem et al. 2020]."""
    accuracy: bool = False
    """Also how many images are taken for their class; digits has a classifier."""

    count: int | None = None
    """Images of a set; None: as many as the protocol asks for, or there are. For text
    the first prompts are taken."""
    seeds: tuple[int, ...] = ()
    """Of the first image of each set; image i has this seed plus i. None: those of the
    protocol: three for ImageNet and digits, else one."""
    labels: Literal["balanced", "random"] = "balanced"
    """Classes: image i has class i modulo the number of classes [official DMD2], or a
    random one [EDM]."""
    prompt_file: Path | None = None
    """Prompts: .txt, one a line, .jsonl, .csv or .parquet. With --images these in their
    order; else of a folder's own prompts.jsonl, as sample.py writes it."""
    prompt_column: str = "prompt"
    """Of a table of prompts."""
    steps: int | None = None
    """Of a teacher, as in sample.py; None: the baseline's."""
    guidance: float | None = None
    """Of a text-to-image teacher; None: the baseline's."""
    times: tuple[float, ...] = ()
    """Times at which a student is called, instead of its own."""
    resolution: int | None = None
    """Side of a text-to-image model's images."""
    lora: Path | None = None
    """A LoRA student on --student, its teacher, as in sample.py."""
    unet: Path | None = None
    """Weights in the place of a pipeline's UNet, as in sample.py."""
    local_files_only: bool = False
    """Never ask the hub."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the model that draws."""

    batch_size: int | None = None
    """Images at a time, of each process; 64, for text 4. Images are the same whatever
    it is, up to the rounding of sums."""
    device: str = "auto"
    """cuda, cuda:1, cpu; auto takes a GPU if there is one, under torchrun one each."""
    threads: int = 0
    """Of the CPU; 0 leaves PyTorch's choice."""
    latency: int = 0
    """Also the time an image takes, the median of so many timed batches."""
    latency_batch_size: int = 1
    """Images of such a batch."""

    json: Path | None = None
    """File of the result, with everything to repeat it. What is computed until an
    interruption is kept beside it, and the same command goes on."""
    numbers: bool = False
    """End with the numbers in a line of JSON, as the recipes' --evaluate reads it."""
    repeat: Path | None = None
    """Measure again what such a file says, and compare."""
    watch: Path | None = None
    """Folder of a recipe's run: measure every checkpoint as it appears, until the run
    has ended. Numbers go to evaluation.jsonl there, with a plot, evaluation.png."""
    watch_timeout: float = 86_400.0
    """Seconds without a new checkpoint after which watching ends too."""
    watch_every: float = 10.0
    """Seconds between looks."""

    def check(self) -> None:
        """Refuses what cannot run, before anything is opened."""
        for name in ("count", "reference_count", "batch_size", "steps"):
            self._at_least(name, 1)
        for name in ("latency", "threads"):
            self._at_least(name, 0)
        self._at_least("latency_batch_size", 1)
        if len(set(self.protocol)) < len(self.protocol):
            raise SystemExit("--protocol: one of them is named twice.")
        if not self.protocol and not self.latency:
            raise SystemExit("--protocol: missing; give one of them, or --latency.")
        self._check_source()
        self._check_protocols()
        if self.json is not None and self.json.is_dir():
            raise SystemExit(f"--json: {self.json} is a folder; name a file.")
        if self.reference is not None and not self.reference.exists():
            # Said here, before networks are fetched.
            raise SystemExit(
                f"--reference: there is no {self.reference}; name a folder of images "
                "or an .npz file of statistics."
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise SystemExit(f"{flag(name)} {value}: expected >= {least}.")

    def _check_source(self) -> None:
        given = {
            "images": bool(self.images),
            "student": self.student is not None,
            "teacher": self.teacher is not None,
            "watch": self.watch is not None,
        }
        if sum(given.values()) != 1:
            flags = ", ".join(map(flag, given))
            raise SystemExit(f"{flags}: give one of them, and one only.")
        if self.images:
            self.refuse(MODEL_OPTIONS, "--images are there already; nothing is drawn.")
        if self.sampler != "auto" and self.teacher is None:
            raise SystemExit("--sampler: it is a teacher's; give --teacher.")
        if self.watch is not None:
            told = ("lora", "unet", "times", "latency")
            self.refuse(told, "--watch takes students as their run made them.")
            if self.watch_timeout <= 0 or self.watch_every <= 0:
                raise SystemExit("--watch-timeout, --watch-every: expected > 0.")

    def _check_protocols(self) -> None:
        alone = {"lpips_diversity", "digits"} & set(self.protocol)
        if alone and len(self.protocol) > 1:
            raise SystemExit(
                f"--protocol {alone.pop()}: it takes other images than the others; "
                "measure it alone."
            )
        if self.accuracy and "digits" not in self.protocol:
            raise SystemExit("--accuracy: only the protocol digits has a classifier.")
        distances = [name for name in self.protocol if is_distance(name)]
        if "digits" in distances:
            self.refuse(("reference",), "digits has its own real images.")
        elif distances and self.reference is None:
            raise SystemExit(
                f"--reference: missing; {distances[0]} is a distance from real images: "
                "give their statistics, or a folder."
            )
        elif not distances:
            self.refuse(
                ("reference", "reference_count", *EXTRAS),
                f"{', '.join(self.protocol) or 'a latency'} has no real images.",
            )
        files = self.reference is not None and self.reference.suffix == ".npz"
        if files and len(distances) > 1:
            raise SystemExit(
                f"--reference: {self.reference} holds the statistics of one protocol, "
                f"not of {', '.join(distances)}; give a folder of images."
            )
        if files:
            reason = f"{self.reference} holds statistics; give a folder of images."
            self.refuse(EXTRAS, reason)
        elif self.reference is not None:
            self.refuse(("reference_count",), "a folder is counted.")

    def refuse(self, names: tuple[str, ...], reason: str) -> None:
        """Refuses options that were given but do not apply."""
        for name in names:
            if getattr(self, name) != default_of(name):
                raise SystemExit(f"{flag(name)}: {reason}")


EXTRAS = ("kid", "precision_recall", "density_coverage")


def is_distance(protocol: str) -> bool:
    """Whether it is a distance from real images."""
    return not protocol.startswith(("clip_score", "lpips"))


def default_of(name: str) -> Any:
    """What an option is if it is not given."""
    return getattr(Settings(), name)


def as_json(settings: Settings) -> dict[str, Any]:
    """All settings as JSON holds them, paths from the root."""
    return {f.name: _plain(getattr(settings, f.name)) for f in fields(settings)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def from_json(content: dict[str, Any]) -> Settings:
    """The settings that `as_json` wrote down.

    Raises:
        ValueError: If they are not understood.
    """
    known = {f.name for f in fields(Settings)}
    if strangers := sorted(content.keys() - known):
        raise ValueError(f"its setting {strangers[0]!r} is unknown here")
    arguments = []
    for name, value in content.items():
        if value in (None, [], {}, "") or value == default_of(name):
            continue
        if isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{flag(name)[2:]}")
        elif isinstance(value, dict):
            arguments += [flag(name), *(str(x) for item in value.items() for x in item)]
        else:
            items = value if isinstance(value, list) else [value]
            arguments += [flag(name), *map(str, items)]
    try:
        return tyro.cli(Settings, args=arguments, console_outputs=False)
    except SystemExit as error:
        raise ValueError("its settings are not understood") from error
