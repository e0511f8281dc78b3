"""The text-to-image recipes: what SD1.5 and SDXL share (DMD2, sections F.3 and F.4).

`sd15.py` and `sdxl.py` give the presets; here are networks, losses and data. Teacher,
student and critic are three UNets, or one UNet and adapters on it (`--lora`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from distillation import (
    Distillation,
    Run,
    RunSettings,
    autocast,
    backward,
    check_shared_passes,
    learn_of_samples,
    refusal,
    require_at_least,
)
from embeddings import (
    ENCODERS,
    Embedded,
    WithEmbeddings,
    condition,
    encoders_digest,
    text_of,
)
from parallel import gradients_stay
from runs import device_of, open_lpips, option, require_checkpoint
from text_models import (
    LatentSpace,
    config_of,
    decode,
    latent_space,
    open_pipeline,
    random_condition,
    random_unet,
)
from torch import Tensor, nn
from torch.utils.data import default_collate

from dmdkit import (
    BackwardSimulator,
    ClassifierFreeGuidance,
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DistributionMatchingLoss,
    NetworkWithHead,
    NoisedData,
    RegressionLoss,
    ScoreEstimator,
    SharedGeneratorLoss,
    frozen,
    load_modules,
    saved_parameters,
    snr_weight,
    trainable_copy,
)
from dmdkit.adapters.conditions import EmptyPrompt, zero_text
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.lora import LoRANetwork
from dmdkit.adapters.lora_files import load_lora
from dmdkit.adapters.official import load_unet_weights
from dmdkit.adapters.pipelines import (
    TextPipeline,
    encode_prompts,
    save_lora_student,
    save_pipeline,
    teacher_from_pipeline,
    unconditional_of,
)
from dmdkit.data import (
    ShardedTensors,
    open_latents,
    read_prompts,
    weights_digest,
)
from dmdkit.diffusion import DiscreteVariancePreserving, EpsilonPrediction
from dmdkit.sampling import InputPolicy
from dmdkit.types import Condition, Denoiser

PICTURES = 16
PATHS = ("prompts", "latents", "pairs", "lpips_weights", "start_from")
PATHS += ("embeddings", "latent_embeddings")
"""Settings that name files and folders."""


@dataclass(frozen=True)
class TextSettings:
    """Distils a text-to-image teacher with DMD2. Sources of values are in brackets."""

    kind: ClassVar[type]
    """The class of pipeline that is distilled."""
    preset: str
    """Which training the other settings start from."""

    pretrained: str
    """The teacher: a pipeline of diffusers, a folder or a name on the hub."""
    local_files_only: bool = False
    """Never ask the hub."""
    random_init: bool = False
    """A UNet of the real size, or of PRETRAINED's if that is a folder, with random
    weights, and random prompts, latents and pairs, to measure time and memory."""
    resolution: int | None = None
    """Height and width of the images; None is what the UNet was made for."""
    prompts: Path | None = None
    """What the student draws: .txt, .jsonl, .csv or .parquet [F.3, F.4: those of
    LAION-Aesthetics 6.25+, 3 million of them in section 5.2]."""
    prompt_column: str = "prompt"
    """Of a table of prompts."""
    min_aesthetic: float | None = None
    """Least score in the table's column "aesthetic" [F: 6.25]; None: no such filter."""
    released_prompts: bool = False
    """Draw the captions of LATENTS instead of PROMPTS, as the released four-step SDXL
    training did (against the paper)."""
    latents: tuple[Path, ...] = ()
    """Real images for the GAN: folders from examples/prepare_latents.py [F: 500K of
    LAION-Aesthetics 5.5+]."""
    embeddings: Path | None = None
    """Stored embeddings of PROMPTS, from examples/prepare_embeddings.py, in place of
    the text encoders [ours]."""
    latent_embeddings: Path | None = None
    """The same of the captions of LATENTS."""
    pairs: Path | None = None
    """Noise-image pairs for the regression, from examples/prepare_pairs.py [F.4:
    10K]."""
    tiny_vae: str = ""
    """Decoder of the regression's LPIPS: a folder or a name on the hub, of an
    AutoencoderTiny [scripts: TAESDXL]."""
    lpips_weights: Path | None = None
    """torchvision's vgg16 weights for LPIPS; None lets torchvision load them."""
    start_from: Path | None = None
    """Where student and critic start, with new optimizers: a checkpoint of another
    run (OUT/best, OUT/checkpoints/...), or a file of student weights, such as an
    official release (.bin, .safetensors)."""

    iterations: int = 20_000
    """Critic updates."""
    batch_size: int = 128
    """Samples of an update, over all processes."""
    micro_batch_size: int = 2
    """Most samples in memory at once; gradients of the parts are accumulated."""
    learning_rate: float = 5e-7
    """Of student and critic alike."""
    weight_decay: float = 0.01
    """[F.3, F.4]."""
    student_warmup: int = 1
    """Student updates until the full rate [scripts: 500 scheduler steps, but these
    advance once a process and iteration, 64 of them: none is left]."""
    critic_warmup: int = 7
    """Critic updates until the full rate [scripts: 500 / 64 processes]."""
    max_gradient_norm: float = 10.0
    """Clipping, student and critic with its head each as one [scripts]."""
    critic_steps: int = 5
    """Critic updates to one student update."""

    guidance_scale: float = 8.0
    """Of the teacher, in the convention in which 1 is none; the critic has none."""
    merged_guidance: bool = False
    """The teacher's calls with and without text as one of twice the batch [scripts]:
    faster where the batch is small, with twice the activations."""
    distribution_matching: bool = True
    """Whether the student has the distribution matching loss [Eq. 2]."""
    gan: bool = True
    """Whether there is a GAN loss on real latents [section 4.3]."""
    gan_weight: float = 5e-3
    """Weight of the student's GAN loss."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the critic's [scripts]."""
    shared_critic_pass: bool = False
    """One pass of the critic serves its denoising and the discriminator: one time and
    noise for both, real and generated samples in one batch [ours; scripts: a pass and
    draws for each]."""
    shared_generator_pass: bool = False
    """On the student's turn the critic's encoder serves score and GAN: an
    approximation, for the GAN gets the times of distribution matching [ours]."""
    regression: bool = False
    """Pre-training: the student learns from pairs alone, there is no critic [F.4]."""
    times: tuple[float, ...] = (999.0,)
    """Timesteps at which the student is called, in falling order."""
    simulation: Literal["backward", "data"] = "backward"
    """What the student is trained on at later times: its own samples [section 4.5], or
    noised latents [Table 4, "without backward simulation"]."""

    lora: Literal["none", "student", "both"] = "none"
    """What is an adapter on the teacher's UNet: nothing; the student [scripts]; student
    and critic, so that one UNet is in memory [ours]."""
    lora_rank: int = 64
    """[scripts]."""
    lora_alpha: float = 8.0
    """[scripts]."""
    gradient_checkpointing: bool = True
    """Recompute activations in backwards: less memory, a third more time."""
    ema: float | None = None
    """Rate of an average of the student's weights, which is then what is exported; none
    [scripts]."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of network calls and of the teacher's weights; what is trained, losses and
    optimizers are fp32 [scripts: bf16]."""
    seed: int = 10
    """[scripts]."""
    licence: str = ""
    """Of the teacher; the student inherits it, and its model card says so."""
    run: Run = field(default_factory=lambda: RunSettings(Path("runs/text")))

    def check(self) -> None:
        """Refuses what cannot run."""
        counts = ("iterations", "batch_size", "micro_batch_size", "critic_steps")
        require_at_least(self, 1, *counts, "lora_rank")
        require_at_least(self, 0, "student_warmup", "critic_warmup")
        self.run.check()
        if not (self.distribution_matching or self.gan or self.regression):
            raise SystemExit(
                "--gan, --distribution-matching, --regression: all are off, so the "
                "student has no loss at all."
            )
        if self.regression and (self.distribution_matching or self.gan):
            raise refusal(
                "regression",
                "it is pre-training, which has no other loss",
                "add --no-gan --no-distribution-matching, then start from its student",
            )
        check_shared_passes(self)
        if not self.times:
            raise SystemExit("--times: expected at least one timestep.")
        if not self.random_init:
            self.check_data()
        for name in PATHS:
            given = getattr(self, name) or ()
            for path in given if isinstance(given, tuple) else (given,):
                if not path.exists():
                    raise refusal(name, path, "there is no such file or folder")

    def check_data(self) -> None:
        """Refuses a training that lacks its data."""
        needs = [
            ("pairs", self.regression, "--regression learns from them"),
            ("tiny_vae", self.regression, "--regression compares decoded images"),
            ("latents", self.gan, "--gan needs them, or --no-gan"),
            ("latents", self.simulation == "data", "--simulation data noises them"),
            ("latents", self.released_prompts, "--released-prompts are their captions"),
            ("prompts", self.draws_prompts(), "what the student is to draw"),
        ]
        for name, needed, why in needs:
            if needed and not getattr(self, name):
                raise refusal(name, "missing", why)
        if self.prompts is not None and not self.draws_prompts():
            raise refusal(
                "prompts",
                "they would not be used",
                "leave them out, for captions or pairs are drawn instead",
            )

        stored = self.embeddings is not None, self.latent_embeddings is not None
        needed = self.draws_prompts(), bool(self.latents) and not self.regression
        if any(stored) and stored != needed:
            raise refusal(
                "embeddings, --latent-embeddings",
                "embeddings of some texts, but not of others",
                "those of --prompts and those of --latents go together; --regression "
                "takes none",
            )

    def draws_prompts(self) -> bool:
        """Whether prompts come from a file of prompts."""
        captions = self.released_prompts or self.simulation == "data"
        return not (self.regression or captions)

    @property
    def has_critic(self) -> bool:
        """Whether there is a critic: pre-training has none."""
        return not self.regression


class Networks(NamedTuple):
    """Guided teacher (frozen), student, and critic, whose network carries the head."""

    teacher: Denoiser
    student: ScoreEstimator
    critic: ScoreEstimator | None


class Teacher(NamedTuple):
    """The teacher's parts."""

    denoiser: ScoreEstimator
    unconditional: Callable[[Any], Any]
    pipeline: TextPipeline | None
    """None for random weights."""


def open_teacher(settings: TextSettings, unet_config: dict[str, Any]) -> Teacher:
    """Reads the teacher's pipeline, or makes a UNet of random weights."""
    device = device_of(settings.run.device)
    if not settings.random_init:
        pipeline = open_pipeline(
            settings.pretrained,
            "pretrained",
            local_files_only=settings.local_files_only,
        )
        if not isinstance(pipeline, settings.kind):
            raise refusal(
                "pretrained",
                f"{settings.pretrained} is a {type(pipeline).__name__}",
                f"this recipe distils a {settings.kind.__name__}",
            )
        with option("pretrained"):
            denoiser = teacher_from_pipeline(pipeline)
        pipeline.to(device)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        unconditional = unconditional_of(pipeline)
        idle = ["safety_checker"]  # these would wait on the device for nothing
        if settings.embeddings is not None or settings.latent_embeddings is not None:
            idle += ENCODERS
        for name in idle:
            if pipeline.components.get(name) is not None:
                pipeline.components[name].to("cpu")
        return Teacher(denoiser, unconditional, pipeline)
    # Adapters need no copy in fp32, so the weights can be drawn in the teacher's dtype.
    low = settings.precision == "bf16" and settings.lora == "both"
    config = config_of(settings.pretrained, "unet", unet_config)
    dtype = torch.bfloat16 if low else torch.float32
    unet: Any = random_unet(config, dtype, device)
    denoiser = ScoreEstimator(
        UNetNetwork(unet),
        DiscreteVariancePreserving.scaled_linear(),
        EpsilonPrediction(),
    )
    empty = random_condition(unet.config, 1, 512)
    unconditional = zero_text
    if not hasattr(empty, "pooled"):
        unconditional = EmptyPrompt(empty.text.to(device))
    return Teacher(denoiser, unconditional, None)


def build_networks(
    settings: TextSettings, teacher: Teacher, space: LatentSpace
) -> Networks:
    """Makes student and critic: copies of the teacher's UNet, or adapters on it."""
    base = teacher.denoiser
    unet: Any = network_of(base).unet
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    head = None
    if settings.gan:
        torch.manual_seed(settings.seed)  # alike on every process
        head = DiffusionGANHead(*mid_block(unet, space)).to(unet.device)
    student = critic = None
    if settings.lora == "none":
        student = trainable_copy(base)
    if settings.has_critic and settings.lora != "both":
        critic = trainable_copy(base, head=head)
    base.requires_grad_(False).eval()
    if settings.precision == "bf16":
        base.network.to(torch.bfloat16)  # [scripts]

    def adapted(seed: int, head: nn.Module | None = None) -> ScoreEstimator:
        network: nn.Module = LoRANetwork(
            base.network,
            settings.lora_rank,
            settings.lora_alpha,
            generator=torch.Generator(unet.device).manual_seed(seed),
        )
        if head is not None:
            network = NetworkWithHead(network, head)
        return ScoreEstimator(network, base.process, base.parameterization)

    if student is None:
        student = adapted(settings.seed)
    if critic is None and settings.has_critic:
        critic = adapted(settings.seed + 1, head)
    guided = ClassifierFreeGuidance(
        base,
        teacher.unconditional,
        settings.guidance_scale,
        merged=settings.merged_guidance,
    )
    networks = Networks(guided, student, critic)
    if settings.start_from is not None:
        with option("start-from"):
            start_from(settings.start_from, networks)
    return networks


def network_of(denoiser: ScoreEstimator) -> UNetNetwork:
    """The network of a denoiser without head or adapter."""
    network = denoiser.network
    assert isinstance(network, UNetNetwork)
    return network


def mid_block(unet: Any, space: LatentSpace) -> tuple[int, int]:
    """Channels and side of the middle block's output: 1280 and 8 (SD1.5) or 32."""
    widths = unet.config["block_out_channels"]
    return widths[-1], space.side >> len(widths) - 1


def start_from(path: Path, networks: Networks) -> None:
    """Takes the weights of an earlier run, or a file of the student's."""
    student = networks.student.network
    if path.is_file():
        if isinstance(student, LoRANetwork):
            load_lora(student, path)
        else:
            load_unet_weights(network_of(networks.student).unet, path)
        return
    require_checkpoint(path)
    modules: dict[str, nn.Module] = {"student": student}
    names = saved_parameters(path, "critic")
    if names and networks.critic is not None:
        critic = networks.critic.network
        had_head = any(name.startswith("head.") for name in names)
        if isinstance(critic, NetworkWithHead) and not had_head:
            critic = critic.network  # stage 1 has no GAN yet
        modules["critic"] = critic
    load_modules(path, **modules)


class DecodedDistance(nn.Module):
    """A distance of what a VAE's decoder makes of two latents."""

    def __init__(self, vae: nn.Module, distance: nn.Module) -> None:
        super().__init__()
        self.vae, self.distance = vae.requires_grad_(False).eval(), distance

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """One distance a sample, [b]."""
        vae: Any = self.vae
        return self.distance(vae.decode(a).sample, vae.decode(b).sample)


def open_tiny_vae(settings: TextSettings) -> nn.Module:
    """The decoder of the regression."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    name = settings.tiny_vae
    if settings.random_init and not Path(name).is_dir():
        return AutoencoderTiny()
    try:
        vae: Any = AutoencoderTiny.from_pretrained(
            name, local_files_only=settings.local_files_only or Path(name).is_dir()
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        remedy = "" if Path(name).is_dir() else "; without a network, name a folder"
        raise refusal(
            "tiny_vae", name, f"it cannot be read: {reason}{remedy}"
        ) from error
    return vae.float()


class Batch(NamedTuple):
    """The tensors of one micro-batch."""

    noise: Tensor
    """Of the student's samples, or the pairs', [b, c, h, w]."""
    cond: Condition
    """Their encoded prompts."""
    data: Tensor | None = None
    """Latents with those captions, to be noised in place of simulation."""
    latents: Tensor | None = None
    """Real latents for the GAN."""
    latent_cond: Condition = None
    """Their encoded captions."""
    pair_latents: Tensor | None = None
    """What the teacher made of `noise`."""


class Method:
    """The losses of a run, and one iteration as functions of tensors.

    Each function reads nothing back from the device and knows no loader, so that it
    can be run on tensors without data, to plan memory and time.
    """

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self.weights = {
            "dm": 1.0,
            "gan": settings.gan_weight,
            "regression": 1.0,
            "critic": 1.0,
            "discriminator": settings.discriminator_weight,
        }
        self.simulator = BackwardSimulator(settings.times)
        self.inputs: InputPolicy = self.simulator
        if settings.simulation == "data":
            self.inputs = NoisedData(settings.times)
        # 20 ... 980, and 0 ... 999 for critic and GAN [scripts].
        self.dm_loss = DistributionMatchingLoss(DiscreteUniformTime(20, 981))
        self.critic_loss = DenoisingLoss(DiscreteUniformTime(), snr_weight)
        self.gan_loss = DiffusionGANLoss(DiscreteUniformTime())
        self.regression_loss = RegressionLoss()
        if settings.regression:
            distance = DecodedDistance(
                open_tiny_vae(settings), open_lpips(settings.lpips_weights)
            )
            self.regression_loss = RegressionLoss(
                distance.to(device_of(settings.run.device))
            )

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
            x_t, t, _ = self.inputs(
                networks.student,
                batch.noise,
                batch.cond,
                rung=rung,
                generator=generator,
                data=batch.data,
            )
            return networks.student(x_t, t, batch.cond)

    def student_backward(
        self,
        networks: Networks,
        batch: Batch,
        x: Tensor,
        generator: torch.Generator,
        share: float = 1.0,
    ) -> dict[str, Any]:
        """Adds the gradient of the student's losses to it (Eqs. 2, 3 and 4)."""
        settings, critic = self.settings, networks.critic
        losses: dict[str, Any] = {}
        if settings.regression:
            assert batch.pair_latents is not None
            losses["regression"] = self.regression_loss(x, batch.pair_latents)
            backward(losses, self.weights, share)
            return losses
        assert critic is not None
        with frozen(critic.network), gradients_stay([critic.network]):
            with self.autocast(x.device):
                if settings.shared_generator_pass:
                    both = SharedGeneratorLoss(self.dm_loss)(
                        x,
                        batch.cond,
                        real=networks.teacher,
                        critic=critic,
                        generator=generator,
                    )
                    losses["dm"], losses["gan"] = both
                elif settings.distribution_matching:
                    losses["dm"] = self.dm_loss(
                        x,
                        batch.cond,
                        real=networks.teacher,
                        fake=critic,
                        generator=generator,
                    )
                if settings.gan and "gan" not in losses:
                    losses["gan"] = self.gan_loss.generator(
                        x, batch.cond, discriminator=critic, generator=generator
                    )
            backward(losses, self.weights, share)
        return losses

    def critic_backward(
        self,
        networks: Networks,
        batch: Batch,
        x: Tensor,
        generator: torch.Generator,
        share: float = 1.0,
    ) -> dict[str, Any]:
        """Adds the gradient of the critic's losses to it and its head."""
        assert networks.critic is not None
        about = (batch.cond, batch.latents, batch.latent_cond)
        return learn_of_samples(
            self, networks.critic, x.detach(), *about, generator, share
        )


class TextDistillation(Distillation):
    """A text-to-image recipe with its data."""

    settings: TextSettings

    def __init__(
        self,
        settings: TextSettings,
        unet_config: dict[str, Any],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(settings, rank, ranks)
        teacher = open_teacher(settings, unet_config)
        with option("times"):
            for time in settings.times:
                teacher.denoiser.process.check_time(time)
        self.pipeline = teacher.pipeline
        self.base = network_of(teacher.denoiser)
        self.config: Any = self.base.unet.config
        self.space = latent_space(self.config, self.pipeline, settings.resolution)
        self.open_data()
        self.networks = build_networks(settings, teacher, self.space)
        self.arrange(teacher.denoiser, self.networks.student)
        if self.networks.critic is not None:
            self.arrange(self.networks.critic)
        self.spread(self.networks.student)
        if self.networks.critic is not None:
            self.spread(self.networks.critic)
        self.spread_teacher(teacher.denoiser)
        self.method = Method(settings)
        self.trained = {
            "student": self.train_with(self.networks.student, settings.student_warmup)
        }
        if self.networks.critic is not None:
            self.trained["critic"] = self.train_with(
                self.networks.critic, settings.critic_warmup
            )
        if settings.ema is not None:
            self.trained["student"].average(settings.ema)

    def spread_teacher(self, teacher: ScoreEstimator) -> None:
        """Shards the teacher as well, unless adapters stand on it."""
        if self.settings.lora == "none":
            self.spread(teacher)

    def open_data(self) -> None:
        """Opens what the settings name, before anything large is made."""
        settings = self.settings
        if settings.random_init:
            return
        if settings.regression:
            self.stream("pairs", self.noise_image_pairs())
        if settings.draws_prompts():
            assert settings.prompts is not None
            with option("prompts"):
                prompts = read_prompts(
                    settings.prompts,
                    column=settings.prompt_column,
                    min_aesthetic=settings.min_aesthetic,
                )
            self.stream("prompts", self.embedded(prompts, "embeddings"))
        if settings.latents:
            latents = self.embedded(self.real_latents(), "latent_embeddings")
            if settings.gan:
                self.stream("latents", latents, seed=1)
            if not settings.draws_prompts():
                self.stream("captions", latents)

    def real_latents(self) -> Any:
        """Latents of the teacher's VAE and of the resolution that is trained."""
        assert self.pipeline is not None
        vae: Any = self.pipeline.vae
        with option("latents"):
            latents = open_latents(
                self.settings.latents,
                vae=weights_digest(vae),
                scaling_factor=vae.config["scaling_factor"],
                resolution=self.space.resolution,
            )
        if latents.shape != self.space.shape:
            raise SystemExit(
                f"--latents: they are {list(latents.shape)}, the UNet takes "
                f"{list(self.space.shape)}; prepare them with the teacher's VAE."
            )
        return latents

    def noise_image_pairs(self) -> Any:
        """The pairs of the regression."""
        assert self.settings.pairs is not None
        with option("pairs"):
            pairs = ShardedTensors(self.settings.pairs)
            found = pairs[0]
            missing = {"noise", "latents", "prompts"} - found.keys()
            if missing or tuple(found["latents"].shape) != self.space.shape:
                raise ValueError(
                    f"{self.settings.pairs} holds {pairs.kind}, expected noise and "
                    f"latents of {list(self.space.shape)} and prompts; draw them with "
                    "examples/prepare_pairs.py."
                )
        return pairs

    def embedded(self, dataset: Any, name: str) -> Any:
        """A data set with its stored embeddings, if the settings name some."""
        folder: Path | None = getattr(self.settings, name)
        if folder is None:
            return dataset
        assert self.pipeline is not None
        with option(name.replace("_", "-")):
            return WithEmbeddings(dataset, folder, encoders_digest(self.pipeline))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encodes prompts by the pipeline's text encoders."""
        assert self.pipeline is not None
        return encode_prompts(self.pipeline, prompts, self.space.resolution)

    def take(self, name: str) -> tuple[Any, Condition]:
        """The next batch of a stream, and the condition that its texts are."""
        batch = next(self.streams[name])
        if isinstance(batch, Embedded):
            return batch.item, self.stored_condition(batch)
        return batch, self.encode(text_of(batch))

    def stored_condition(self, batch: Embedded) -> Condition:
        """The condition of a batch that came with its embeddings."""
        return condition(batch.embedding, self.device, self.space.resolution)

    def condition_of(self, items: list[Any]) -> Condition:
        """The condition of single items of a data set."""
        if isinstance(items[0], Embedded):
            return self.stored_condition(default_collate(items))
        return self.encode([text_of(item) for item in items])

    def onto_device(self, stored: Tensor) -> Tensor:
        """What was read, in fp32 on the device, without waiting for it."""
        return stored.to(self.device, non_blocking=True).float()

    def draw(self) -> Batch:
        """A micro-batch: noise and prompts, real latents and captions, or pairs."""
        if self.settings.random_init:
            return self.draw_random()
        if "pairs" in self.streams:
            pair, cond = self.take("pairs")
            noise, latents = (self.onto_device(pair[k]) for k in ("noise", "latents"))
            return Batch(noise, cond, pair_latents=latents)
        batch = Batch(self.noise(), None)
        if "prompts" in self.streams:
            batch = batch._replace(cond=self.take("prompts")[1])
        else:
            captioned, cond = self.take("captions")
            data = self.onto_device(captioned.latent)
            batch = batch._replace(cond=cond, data=data)
        if "latents" in self.streams:
            real, cond = self.take("latents")
            latents = self.onto_device(real.latent)
            batch = batch._replace(latents=latents, latent_cond=cond)
        return batch

    def draw_random(self) -> Batch:
        """A micro-batch that costs what a real one does, but for text encoders."""

        def cond() -> Condition:
            return random_condition(
                self.config, self.size, self.space.resolution, self.generator
            )

        batch = Batch(self.noise(), cond())
        if self.settings.simulation == "data":
            batch = batch._replace(data=self.noise())
        if self.settings.gan:
            batch = batch._replace(latents=self.noise(), latent_cond=cond())
        if self.settings.regression:
            batch = batch._replace(pair_latents=self.noise())
        return batch

    def noise(self) -> Tensor:
        """Standard normal noise for the samples of a micro-batch."""
        shape = (self.size, *self.space.shape)
        return torch.randn(shape, device=self.device, generator=self.generator)

    @torch.no_grad()
    def samples(self) -> Tensor | None:
        """Images of the first prompts of the data, from always the same noise."""
        if self.pipeline is None:
            return None
        items = self.shown()
        generator = torch.Generator().manual_seed(self.settings.seed)
        noise = torch.randn(len(items), *self.space.shape, generator=generator)
        own = torch.Generator(self.device).manual_seed(self.settings.seed)
        drawn = []
        with self.averaged():
            for rows in self.rows_of_pictures(len(items)):
                cond = self.condition_of([items[i] for i in rows])
                with self.method.autocast(self.device):
                    latents = self.method.simulator.sample(
                        self.networks.student,
                        noise[rows].to(self.device),
                        cond,
                        generator=own,
                    )
                drawn.append(decode(self.pipeline.vae, latents).cpu())
        return torch.cat(drawn)[: len(items)]

    def shown(self) -> list[Any]:
        """The items of the data whose texts are those of the pictures."""
        name = "prompts" if "prompts" in self.streams else None
        dataset = next(
            self.streams[key].dataset
            for key in (name, "captions", "pairs")
            if key in self.streams
        )
        return [dataset[i] for i in range(min(PICTURES, len(dataset)))]

    def export(self, folder: Path, step: int) -> None:
        """Writes the student: a whole pipeline, or the files of its adapter."""
        settings = self.settings
        about = {
            "method": "DMD2, arXiv 2405.14867",
            "preset": settings.preset,
            "iterations": step,
            "student_updates": self.ttur.counts(step).generator_updates,
            "guidance_scale": settings.guidance_scale,
            "resolution": self.space.resolution,
            "ema": settings.ema,
            "seed": settings.seed,
        }
        told: dict[str, Any] = {
            "times": settings.times,
            "teacher": "random weights" if self.pipeline is None else self.name(),
            "licence": settings.licence,
            "about": about,
        }

        def write(student: ScoreEstimator) -> None:
            if settings.lora != "none":
                save_lora_student(folder, student, **told)
            elif self.pipeline is not None:
                save_pipeline(folder, self.pipeline, student, **told)

        self.write_student(write)

    def unsharded(self, network: nn.Module) -> nn.Module:
        """A network like a sharded one, to put its gathered weights into."""
        if isinstance(network, LoRANetwork):
            return LoRANetwork(self.base, network.rank, network.alpha)
        return super().unsharded(network)

    def name(self) -> str:
        """The teacher's name: that on the hub, or its folder's."""
        name = self.settings.pretrained
        return Path(name).resolve().name if Path(name).is_dir() else name

    def counts(self) -> dict[str, int]:
        """What is trained, and what is frozen beside it."""
        critic = self.networks.critic
        trained = self.networks.student.parameters()
        return {
            "unet_parameters": sum(p.numel() for p in self.base.parameters()),
            "parameters": sum(p.numel() for p in trained),
            "critic_parameters": 0
            if critic is None
            else sum(p.numel() for p in critic.parameters()),
        }

    def how_to_draw(self) -> str | None:
        """The command that draws a picture; there is none of random weights."""
        if self.pipeline is None:
            return None
        student = self.run_settings.out / "student"
        where = f"{student}"
        if self.settings.lora != "none":
            where = f"{self.settings.pretrained} --lora {student}"
        return (
            f"python examples/sample.py {where} --grid samples.png --prompt-file "
            "examples/prompts/dmd2-figure2.txt"
        )
