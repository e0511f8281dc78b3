"""Distils NVIDIA's EDM teacher of ImageNet-64 to one step (DMD2, section F.2).

    python examples/convert_edm.py edm-imagenet-64x64-cond-adm.pkl teacher
    python examples/imagenet_edm.py --teacher teacher --images imagenet-64x64.zip

Every setting names its source: the paper (its section), the official scripts where the
paper is silent, or "ours". Presets are the rows of Tables 1 and 3; `--help` shows the
settings of the preset given. The batch of 280 is reached by gradient accumulation, and
by several processes under torchrun. The page "ImageNet-64" of the documentation has the
whole recipe.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from distillation import (
    Distillation,
    Run,
    RunSettings,
    autocast,
    backward,
    check_shared_passes,
    distil,
    learn_of_samples,
    refusal,
    require_at_least,
    until_interrupted,
)
from parallel import gradients_stay
from runs import device_of, open_lpips, option, parse, require_checkpoint
from torch import Tensor
from torch.nn.functional import interpolate

from dmdkit import (
    BackwardSimulator,
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DistributionMatchingLoss,
    KarrasIndexTime,
    KarrasPreconditioning,
    KarrasWeight,
    NetworkWithHead,
    RegressionLoss,
    RegressionOutput,
    ScoreEstimator,
    SharedGeneratorLoss,
    frozen,
    load_modules,
    saved_parameters,
    squared_distance,
    trainable_copy,
)
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.edm import edm_denoiser, imagenet64_unet
from dmdkit.adapters.folders import load_denoiser, read_sidecar, save_denoiser
from dmdkit.data import ShardedTensors, open_images
from dmdkit.losses.common import Distance

Preset = Literal[
    "standard",
    "long-phase1",
    "long-phase2",
    "table3-dmd",
    "table3-no-regression",
    "table3-ttur",
    "table3-gan-only",
    "table3-gan-ttur",
]


@dataclass(frozen=True)
class Settings:
    """Distils an EDM teacher with DMD2. Sources of values are in brackets."""

    preset: Preset = "standard"
    """Which row of Table 1 or 3 the other settings start from."""

    teacher: Path | None = None
    """Folder that examples/convert_edm.py wrote."""
    random_init: bool = False
    """A teacher of the real size with random weights, and random images and pairs where
    none are given, to measure time and memory."""
    images: Path | None = None
    """Real images for the GAN: an EDM data set (zip or folder with dataset.json), or a
    folder of class folders."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do with an image that cannot be used: stop, or name it and go on."""
    pairs: Path | None = None
    """Noise-image pairs for the regression loss, from examples/imagenet_pairs.py."""
    lpips_weights: Path | None = None
    """torchvision's vgg16 weights for LPIPS; None lets torchvision load them."""
    start_from: Path | None = None
    """Checkpoint whose student and critic the run starts from, with new optimizers
    (phase 2 of the longer training: OUT/best of phase 1)."""

    iterations: int = 200_000
    """Critic updates [F.2; official README's best checkpoint: 193.5K]."""
    batch_size: int = 280
    """Samples of an update, over all processes [F.2]."""
    micro_batch_size: int = 40
    """Most samples in memory at once; gradients of the parts are accumulated [scripts:
    40 on each of 7 GPUs, without accumulation]."""
    learning_rate: float = 2e-6
    """Of student and critic alike [F.2]."""
    weight_decay: float = 0.01
    """[F.2]."""
    student_warmup: int = 14
    """Student updates until the full rate [scripts: 500 scheduler steps, but these
    advance once a process and iteration, 7 x 5 for one student update: 14]."""
    critic_warmup: int = 71
    """Critic updates until the full rate [scripts: 500 / 7 processes]."""
    max_gradient_norm: float = 10.0
    """Clipping, student and critic with its head each as one [scripts]."""
    critic_steps: int = 5
    """Critic updates to one student update [section 4.2, F.2]."""

    distribution_matching: bool = True
    """Whether the student has the distribution matching loss [Eq. 2]."""
    gan: bool = True
    """Whether there is a GAN loss on real images [section 4.3]."""
    gan_weight: float = 3e-3
    """Weight of the student's GAN loss [F.2]."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the critic's [scripts]."""
    gan_features: Literal["encoder", "mid"] = "encoder"
    """Where the head reads the critic: before the middle block [scripts], or after it
    [F.1 says the middle block]."""
    shared_critic_pass: bool = False
    """One pass of the critic serves its denoising and the discriminator: one time and
    noise for both, real and generated samples in one batch [ours; scripts: a pass and
    draws for each]."""
    shared_generator_pass: bool = False
    """On the student's turn the critic's encoder serves score and GAN: an
    approximation, for the GAN gets the times of distribution matching [ours]."""
    regression: bool = False
    """Whether the student has the regression loss on pairs [Eq. 3, DMD]."""
    regression_weight: float = 0.25
    """[DMD, arXiv 2311.18828; the paper repeats no value]."""
    regression_distance: Literal["lpips", "squared"] = "lpips"
    """Distance of a pair: LPIPS at 224 pixels [DMD], or squared error [ours]."""
    times: tuple[float, ...] = (80.0,)
    """Sigmas at which the student is called [scripts: conditioning sigma 80]; several
    are trained by backward simulation."""

    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the teacher's weights [scripts: fp32, cast in every call]."""
    ema: float | None = None
    """Rate of an average of the student's weights, which is then what is exported; none
    [scripts]."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of network calls; weights, losses and optimizers are fp32 [scripts: bf16]."""
    seed: int = 10
    """[scripts]."""
    run: Run = field(default_factory=lambda: RunSettings(Path("runs/imagenet_edm")))

    def check(self) -> None:
        """Refuses what cannot run."""
        counts = ("iterations", "batch_size", "micro_batch_size", "critic_steps")
        require_at_least(self, 1, *counts)
        require_at_least(self, 0, "student_warmup", "critic_warmup")
        self.run.check()
        if not (self.distribution_matching or self.gan or self.regression):
            raise SystemExit(
                "--gan, --distribution-matching, --regression: all are off, so the "
                "student has no loss at all."
            )
        if (self.teacher is None) == (not self.random_init):
            raise SystemExit("--teacher: give a folder, or --random-init, one of them.")
        starts = self.start_from is not None or self.random_init
        if self.preset == "long-phase2" and not starts:
            raise SystemExit(
                "--start-from: missing; phase 2 starts from the best checkpoint of "
                "phase 1, its OUT/best."
            )
        check_shared_passes(self)
        if not self.times:
            raise SystemExit("--times: expected at least one sigma.")
        for needs, name in (("gan", "images"), ("regression", "pairs")):
            missing = getattr(self, name) is None and not self.random_init
            if getattr(self, needs) and missing:
                raise refusal(name, "missing", f"--{needs} needs it, or --no-{needs}")


NO_TTUR: dict[str, Any] = {"critic_steps": 1}
NO_GAN: dict[str, Any] = {"gan": False}
NO_DM: dict[str, Any] = {"distribution_matching": False}
ROWS: dict[Preset, dict[str, Any]] = {
    "standard": {},
    "long-phase1": {**NO_GAN, "iterations": 400_000},
    "long-phase2": {"learning_rate": 5e-7, "iterations": 150_000},
    "table3-dmd": {**NO_TTUR, **NO_GAN, "regression": True},
    "table3-no-regression": {**NO_TTUR, **NO_GAN},
    "table3-ttur": {**NO_GAN, "iterations": 400_000},
    "table3-gan-only": {**NO_TTUR, **NO_DM},
    "table3-gan-ttur": NO_DM,
}
"""How the rows of Tables 1 and 3 differ from the standard training.

Phase 1 is 400K iterations [F.2; README's best checkpoint: 405.5K], phase 2 another 150K
[F.2; README: 140K]. Table 3 does not say how long its rows were trained; the row with
TTUR and without GAN has the FID of phase 1 (2.61) and takes its length, the others keep
the standard one. "GAN alone" keeps the critic's denoising loss, as official code does.
"""
PRESETS = {name: replace(Settings(), preset=name, **row) for name, row in ROWS.items()}


class Networks(NamedTuple):
    """Teacher (frozen), student, and critic, whose network carries the head."""

    teacher: ScoreEstimator
    student: ScoreEstimator
    critic: ScoreEstimator


def unet_config(denoiser: ScoreEstimator) -> Any:
    """The configuration of a denoiser's UNet."""
    network = denoiser.network
    assert isinstance(network, UNetNetwork)
    return network.unet.config


def head_for(teacher: ScoreEstimator) -> DiffusionGANHead:
    """A head on the critic's last level: 768 channels at 8x8 for the real network."""
    config = unet_config(teacher)
    channels = config["block_out_channels"]
    return DiffusionGANHead(
        channels[-1], resolution=config["sample_size"] >> len(channels) - 1
    )


def build_networks(settings: Settings) -> Networks:
    """Reads or makes the teacher, and copies it into student and critic."""
    torch.manual_seed(settings.seed)  # of the head: alike on every process
    if settings.teacher is None:
        teacher = edm_denoiser(imagenet64_unet(), features=settings.gan_features)
    else:
        with option("teacher"):
            teacher = load_denoiser(settings.teacher, features=settings.gan_features)
    with option("times"):
        for time in settings.times:
            teacher.process.check_time(time)
    student = trainable_copy(teacher)
    teacher.requires_grad_(False).eval()
    critic = trainable_copy(teacher, head=head_for(teacher) if settings.gan else None)
    if settings.teacher_precision == "bf16":
        teacher.network.to(torch.bfloat16)  # after it was copied
    networks = Networks(teacher, student, critic)
    if settings.start_from is not None:
        with option("start-from"):
            start_from(settings.start_from, networks)
    device = device_of(settings.run.device)
    return Networks(*(network.to(device) for network in networks))


def start_from(checkpoint: Path, networks: Networks) -> None:
    """Takes the weights of an earlier phase; its critic may have had no head yet."""
    require_checkpoint(checkpoint)
    critic = networks.critic.network
    had_head = any(
        name.startswith("head.") for name in saved_parameters(checkpoint, "critic")
    )
    if isinstance(critic, NetworkWithHead) and not had_head:
        critic = critic.network
    load_modules(checkpoint, student=networks.student.network, critic=critic)


@dataclass(frozen=True)
class At224:
    """A distance of images scaled to 224 pixels, as DMD takes LPIPS."""

    distance: Distance

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.distance(
            *(interpolate(x, size=224, mode="bilinear") for x in (a, b))
        )


class Batch(NamedTuple):
    """The tensors of one micro-batch."""

    noise: Tensor
    """Of the student's samples, [b, c, h, w]."""
    labels: Tensor | None
    """Their classes, drawn uniformly [scripts], [b]."""
    images: Tensor | None = None
    """Real images in [-1, 1], [b, c, h, w]."""
    image_labels: Tensor | None = None
    pair_noise: Tensor | None = None
    pair_images: Tensor | None = None
    """What the teacher made of `pair_noise`, in [-1, 1]."""
    pair_labels: Tensor | None = None


class Method:
    """The losses of a run, and one iteration as functions of tensors.

    Each function reads nothing back from the device and knows no loader, so that it
    can be run on tensors without data, to plan memory and time.
    """

    def __init__(self, settings: Settings, sigma_data: float) -> None:
        self.settings = settings
        self.dm_loss = DistributionMatchingLoss(KarrasIndexTime(20, 981))
        self.critic_loss = DenoisingLoss(KarrasIndexTime(), KarrasWeight(sigma_data))
        self.gan_loss = DiffusionGANLoss(KarrasIndexTime())
        self.weights = {
            "dm": 1.0,
            "gan": settings.gan_weight,
            "regression": settings.regression_weight,
            "critic": 1.0,
            "discriminator": settings.discriminator_weight,
        }
        self.simulator = BackwardSimulator(settings.times)
        self.regression_loss = RegressionLoss(squared_distance)
        if settings.regression and settings.regression_distance == "lpips":
            lpips = open_lpips(settings.lpips_weights)
            lpips.to(device_of(settings.run.device))
            self.regression_loss = RegressionLoss(At224(lpips))

    def autocast(self, device: torch.device) -> torch.autocast:
        """Network calls in the settings' precision."""
        return autocast(self.settings.precision, device)

    def generate(
        self,
        networks: Networks,
        batch: Batch,
        rung: int,
        generator: torch.Generator,
        *,
        train: bool,
    ) -> Tensor:
        """The student's samples, with a graph if they are to train it."""
        with self.autocast(batch.noise.device), torch.set_grad_enabled(train):
            x_t, t, _ = self.simulator(
                networks.student,
                batch.noise,
                batch.labels,
                rung=rung,
                generator=generator,
            )
            return networks.student(x_t, t, batch.labels)

    def student_backward(
        self,
        networks: Networks,
        batch: Batch,
        x: Tensor,
        generator: torch.Generator,
        share: float = 1.0,
    ) -> dict[str, Any]:
        """Adds the gradient of the student's losses to it (Eqs. 2, 3 and 4)."""
        settings, critic, losses = self.settings, networks.critic, {}
        with frozen(critic.network), gradients_stay([critic.network]):
            with self.autocast(x.device):
                if settings.shared_generator_pass:
                    both = SharedGeneratorLoss(self.dm_loss)(
                        x,
                        batch.labels,
                        real=networks.teacher,
                        critic=critic,
                        generator=generator,
                    )
                    losses["dm"], losses["gan"] = both
                elif settings.distribution_matching:
                    losses["dm"] = self.dm_loss(
                        x,
                        batch.labels,
                        real=networks.teacher,
                        fake=critic,
                        generator=generator,
                    )
                if settings.gan and "gan" not in losses:
                    losses["gan"] = self.gan_loss.generator(
                        x, batch.labels, discriminator=critic, generator=generator
                    )
            if settings.regression:
                losses["regression"] = self.regress(networks.student, batch)
            backward(losses, self.weights, share)
        return losses

    def regress(self, student: ScoreEstimator, batch: Batch) -> RegressionOutput:
        """How far the student is from what the teacher made of the same noise."""
        noise, images = batch.pair_noise, batch.pair_images
        assert noise is not None
        assert images is not None
        t = torch.full(noise.shape[:1], self.settings.times[0], device=noise.device)
        with self.autocast(noise.device):
            x = student(student.process.prior(noise, t), t, batch.pair_labels)
        return self.regression_loss(x, images)

    def critic_backward(
        self,
        networks: Networks,
        batch: Batch,
        x: Tensor,
        generator: torch.Generator,
        share: float = 1.0,
    ) -> dict[str, Any]:
        """Adds the gradient of the critic's losses to it and its head."""
        about = (batch.labels, batch.images, batch.image_labels)
        return learn_of_samples(
            self, networks.critic, x.detach(), *about, generator, share
        )


def to_images(pixels: Tensor, device: torch.device) -> Tensor:
    """Pixels, uint8, as images in [-1, 1] on the device."""
    return pixels.to(device, non_blocking=True).float() / 127.5 - 1


class ImageNetDistillation(Distillation):
    """The recipe with its data."""

    settings: Settings

    def __init__(self, settings: Settings, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(settings, rank, ranks)
        self.networks = build_networks(settings)
        teacher = self.networks.teacher
        config = unet_config(teacher)
        self.classes = config["num_class_embeds"] or 0
        self.shape = (config["in_channels"], *[config["sample_size"]] * 2)
        parameterization = teacher.parameterization
        if not isinstance(parameterization, KarrasPreconditioning):
            raise SystemExit(
                f"--teacher: it is a {type(parameterization).__name__} model, this "
                "recipe distils EDM's (see examples/convert_edm.py)."
            )
        self.method = Method(settings, parameterization.sigma_data)
        self.arrange(*self.networks)
        self.spread(*self.networks)
        if settings.gan and settings.images is not None:
            self.stream("images", self.real_images())
        if settings.regression and settings.pairs is not None:
            self.stream("pairs", self.noise_image_pairs())
        self.trained = {
            "student": self.train_with(self.networks.student, settings.student_warmup),
            "critic": self.train_with(self.networks.critic, settings.critic_warmup),
        }
        if settings.ema is not None:
            self.trained["student"].average(settings.ema)

    def real_images(self) -> Any:
        """The images of the GAN."""
        assert self.settings.images is not None
        with option("images"):
            images = open_images(
                self.settings.images,
                resolution=self.shape[1],
                channels=self.shape[0],
                # Labels mean nothing to a teacher of random weights.
                classes=self.classes or None if self.settings.teacher else None,
                on_bad=self.settings.on_bad,
            )
            _ = images[0]  # a set of another size is found out before training starts
        return images

    def noise_image_pairs(self) -> Any:
        """The pairs of the regression loss."""
        assert self.settings.pairs is not None
        with option("pairs"):
            pairs = ShardedTensors(self.settings.pairs)
        shape = tuple(pairs[0]["images"].shape)
        if shape != self.shape:
            raise SystemExit(
                f"--pairs: images of {list(shape)}, the teacher's are "
                f"{list(self.shape)}; draw them with examples/imagenet_pairs.py."
            )
        return pairs

    def draw(self) -> Batch:
        """A micro-batch: noise and uniform labels, real images, pairs."""
        random = {"device": self.device, "generator": self.generator}
        noise = torch.randn(self.size, *self.shape, **random)
        labels = None
        if self.classes:
            labels = torch.randint(self.classes, (self.size,), **random)
        batch = Batch(noise, labels)
        if "images" in self.streams:
            pixels, image_labels = next(self.streams["images"])
            batch = batch._replace(
                images=to_images(pixels, self.device),
                image_labels=self.onto_device(image_labels) if self.classes else None,
            )
        elif self.settings.gan:  # random weights need no data
            images = torch.randn(noise.shape, **random)
            batch = batch._replace(images=images, image_labels=labels)
        if "pairs" in self.streams:
            pair = next(self.streams["pairs"])
            pair = {name: self.onto_device(v) for name, v in pair.items()}
            batch = batch._replace(
                pair_noise=pair["noise"].float(),
                pair_images=pair["images"].float(),
                pair_labels=pair["labels"] if self.classes else None,
            )
        elif self.settings.regression:
            images = torch.randn(noise.shape, **random)
            batch = batch._replace(
                pair_noise=noise, pair_images=images, pair_labels=labels
            )
        return batch

    def onto_device(self, stored: Tensor) -> Tensor:
        """What was read, on the device, without waiting for it."""
        return stored.to(self.device, non_blocking=True)

    @torch.no_grad()
    def samples(self, count: int = 32) -> Tensor:
        """Samples of always the same noise and labels, for pictures and the monitor."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        noise = torch.randn(count, *self.shape, generator=generator)
        labels = None
        if self.classes:
            labels = torch.randint(self.classes, (count,), generator=generator)
        own = torch.Generator(self.device).manual_seed(self.settings.seed)
        drawn = []
        with self.averaged(), self.method.autocast(self.device):
            for rows in self.rows_of_pictures(count):
                cond = None if labels is None else labels[rows].to(self.device)
                drawn.append(
                    self.method.simulator.sample(
                        self.networks.student,
                        noise[rows].to(self.device),
                        cond,
                        generator=own,
                    ).cpu()
                )
        return torch.cat(drawn)[:count]

    def export(self, folder: Path, step: int) -> None:
        """Writes the student as a diffusers folder to sample from."""
        settings, teacher = self.settings, {}
        if settings.teacher is not None:
            teacher = read_sidecar(settings.teacher).about
        about = {
            "method": "DMD2, arXiv 2405.14867",
            "preset": settings.preset,
            "iterations": step,
            "student_updates": self.ttur.counts(step).generator_updates,
            "ema": settings.ema,
            "seed": settings.seed,
            "teacher": teacher,
        }
        self.write_student(
            lambda student: save_denoiser(
                folder, student, times=settings.times, about=about
            )
        )

    def counts(self) -> dict[str, int]:
        """The parameters of student and critic, the critic's with its head."""
        student, critic = self.networks.student, self.networks.critic
        return {
            "parameters": sum(p.numel() for p in student.parameters()),
            "critic_parameters": sum(p.numel() for p in critic.parameters()),
        }

    def how_to_draw(self) -> str:
        """The command that draws a picture."""
        student = self.run_settings.out / "student"
        return f"python examples/sample.py {student} --grid samples.png"


build = ImageNetDistillation


def main(settings: Settings) -> None:
    """Distils, and writes everything to OUT."""
    distil(settings, build)


if __name__ == "__main__":
    until_interrupted(lambda: main(parse(Settings, PRESETS)))
