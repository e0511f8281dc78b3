"""The SD1.5 and SDXL recipes: what they compute, held against the paper."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sd15
import sdxl
import torch
from helpers_pipelines import save_latents, save_prompts, save_sd15, save_sdxl
from runs import parse
from text_to_image import Batch, Method, Networks, TextDistillation, TextSettings
from torch import Tensor, nn

from dmdkit import (
    ClassifierFreeGuidance,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    NetworkWithHead,
    ScoreEstimator,
)
from dmdkit.adapters.conditions import TextPooledCondition, sdxl_time_ids, zero_text
from dmdkit.adapters.lora import LoRANetwork
from dmdkit.types import NetworkOutput, Want

GOLDENS = Path(__file__).parent / "goldens" / "sdxl.json"
# Stable Diffusion's noise: betas linear in their roots; cumulative products in fp64.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA_BAR = torch.from_numpy(np.cumprod(1 - BETAS))


class Recorder(nn.Module):
    """A network that keeps what it was asked, and answers with something simple."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls: list[dict[str, Any]] = []

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: TextPooledCondition,
        *,
        want: Sequence[Want] | None = None,
    ) -> Tensor | NetworkOutput:
        self.calls.append(
            {
                "x": x.detach(),
                "t": c_noise.detach(),
                "cond": cond,
                "want": want,
                "trains": self.factor.requires_grad and torch.is_grad_enabled(),
            }
        )
        output = self.answer(x, cond)
        if want is None:
            return output
        return NetworkOutput(output, features=output)

    def answer(self, x: Tensor, cond: TextPooledCondition) -> Tensor:
        return answer(self.factor, x, cond)


def answer(factor: Any, x: Tensor, cond: TextPooledCondition) -> Tensor:
    text = cond.text.to(x).mean(dim=(1, 2)) + cond.pooled.to(x).mean(dim=1)
    return torch.sin(factor * x) + text.reshape(-1, 1, 1, 1)


class MeanHead(nn.Module):
    """A head with one weight: the mean feature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, features: Tensor) -> Tensor:
        return self.weight * features.flatten(1).mean(dim=1)


def recorded(
    process: DiscreteVariancePreserving | None = None, **changes: Any
) -> tuple[Method, Networks]:
    settings = sdxl.Settings(precision="fp32", **changes)
    process = process or DiscreteVariancePreserving.scaled_linear()

    def denoiser(network: nn.Module) -> ScoreEstimator:
        return ScoreEstimator(network, process, EpsilonPrediction())

    teacher, student = denoiser(Recorder(0.5)), denoiser(Recorder(0.7))
    critic = denoiser(NetworkWithHead(Recorder(0.9), MeanHead()))
    guided = ClassifierFreeGuidance(
        teacher.requires_grad_(False), zero_text, settings.guidance_scale
    )
    return Method(settings), Networks(guided, student, critic)


def recorder_of(denoiser: Any) -> Recorder:
    if isinstance(denoiser, ClassifierFreeGuidance):
        denoiser = denoiser.denoiser
    network = denoiser.network
    inner = network.network if isinstance(network, NetworkWithHead) else network
    assert isinstance(inner, Recorder)
    return inner


def cond_of(size: int, seed: int) -> TextPooledCondition:
    generator = torch.Generator().manual_seed(seed)
    return TextPooledCondition(
        torch.randn(size, 3, 2, generator=generator),
        torch.randn(size, 2, generator=generator),
        sdxl_time_ids(size, 64),
    )


def batch_of(size: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, 1, 2, 2, generator=generator)
    latents = torch.randn(size, 1, 2, 2, generator=generator)
    return Batch(noise, cond_of(size, 1), None, latents, cond_of(size, 2))


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma at whole times, in fp64."""
    bar = ALPHA_BAR[t.long()].reshape(-1, 1, 1, 1)
    return bar.sqrt(), (1 - bar).sqrt()


def x0_of(epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = levels(t)
    return (x_t.double() - sigma * epsilon.double()) / alpha


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_the_first_rung_is_pure_noise_at_999(generator: torch.Generator) -> None:
    method, networks = recorded()
    batch = batch_of(3)
    x = method.generate(networks, batch, 0, generator, train=True)
    (call,) = recorder_of(networks.student).calls
    # Not alpha x + sigma noise: alpha is 0.068 at 999, not 0.
    assert torch.equal(call["x"], batch.noise)
    assert call["t"].tolist() == [999] * 3
    assert call["cond"] is batch.cond
    expected = x0_of(answer(0.7, batch.noise, call["cond"]), batch.noise, call["t"])
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)


def test_later_rungs_are_the_student_s_own_with_noise_of_their_own(
    generator: torch.Generator,
) -> None:
    method, networks = recorded()
    batch = batch_of(2000)
    method.generate(networks, batch, 3, generator, train=True)
    calls = recorder_of(networks.student).calls
    assert [call["t"][0].item() for call in calls] == [999, 749, 499, 249]
    assert [call["trains"] for call in calls] == [False, False, False, True]
    noises = [calls[0]["x"].double()]
    for now, then in itertools.pairwise(calls):
        x0 = x0_of(answer(0.7, now["x"].double(), now["cond"]), now["x"], now["t"])
        alpha, sigma = levels(then["t"])
        noises.append((then["x"].double() - alpha * x0) / sigma)
    # The input itself has the batch's noise; the trajectory before it has others.
    torch.testing.assert_close(noises[-1], batch.noise.double(), rtol=1e-3, atol=1e-3)
    flat = torch.stack([noise.flatten() for noise in noises])
    correlation = torch.corrcoef(flat)
    off = correlation - torch.eye(4, dtype=torch.float64)
    # Five standard deviations of a correlation of 8000 independent pairs.
    assert off.abs().max() < 5 / 8000**0.5


def test_without_backward_simulation_the_input_is_noised_data(
    generator: torch.Generator,
) -> None:
    method, networks = recorded(simulation="data")
    data = torch.randn(3, 1, 2, 2)
    batch = batch_of(3)._replace(data=data)
    method.generate(networks, batch, 2, generator, train=True)
    (call,) = recorder_of(networks.student).calls
    alpha, sigma = levels(torch.full((3,), 499))
    expected = alpha * data.double() + sigma * batch.noise.double()
    torch.testing.assert_close(call["x"].double(), expected, rtol=1e-5, atol=1e-5)
    assert call["t"].tolist() == [499] * 3


def test_times_of_every_term(generator: torch.Generator) -> None:
    method, networks = recorded()
    batch = batch_of(20_000)
    x = method.generate(networks, batch, 0, generator, train=True)
    method.student_backward(networks, batch, x, generator)
    method.critic_backward(networks, batch, x, generator)
    without, of_teacher = recorder_of(networks.teacher).calls
    scored, fooled, fake, real, denoising = recorder_of(networks.critic).calls
    # Of 961 and of 1000 places, 20,000 draws leave none out (p < 1e-5).
    assert set(of_teacher["t"].tolist()) == set(range(20, 981))
    for call in (fooled, denoising, fake, real):
        assert set(call["t"].tolist()) == set(range(1000))
    # Teacher, with and without text, and critic see the same; the others draw anew.
    for call in (without, scored):
        assert torch.equal(call["t"], of_teacher["t"])
        assert torch.equal(call["x"], of_teacher["x"])
    draws = [scored, fooled, denoising, fake, real]
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            assert (one["t"] == other["t"]).float().mean() < 0.01
    # Generated samples go with the student's prompts, real latents with their own.
    for call in (of_teacher, scored, fooled, denoising, fake):
        assert call["cond"] is batch.cond
    assert real["cond"] is batch.latent_cond
    # SDXL's unconditional: zeros for both embeddings, the same time ids.
    assert not without["cond"].text.any()
    assert not without["cond"].pooled.any()
    assert torch.equal(without["cond"].time_ids, batch.cond.time_ids)
    assert [call["want"] for call in draws] == [
        None,
        ("features",),
        None,
        ("features",),
        ("features",),
    ]
    assert [call["trains"] for call in draws] == [False, False, True, True, True]


def test_the_gradient_at_the_sample_is_that_of_the_paper(
    generator: torch.Generator,
) -> None:
    method, networks = recorded()
    batch = batch_of(5)
    x = method.generate(networks, batch, 1, generator, train=True)
    x.retain_grad()
    method.student_backward(networks, batch, x, generator)
    scored, fooled = recorder_of(networks.critic).calls
    clean, x_t, t = x.detach().double(), scored["x"].double(), scored["t"]
    nothing = zero_text(batch.cond)
    with_text, without = answer(0.5, x_t, batch.cond), answer(0.5, x_t, nothing)
    real = x0_of(without + 8 * (with_text - without), x_t, t)
    fake = x0_of(answer(0.9, x_t, batch.cond), x_t, t)
    normalizer = (clean - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    matching = (fake - real) / normalizer / clean.numel()
    # softplus(-l) with l = 3 mean(sin(0.9 x_t) + text); d x_t / d x = alpha.
    x_t, alpha = fooled["x"].double(), levels(fooled["t"])[0]
    logit = 3 * answer(0.9, x_t, batch.cond).mean(dim=(1, 2, 3), keepdim=True)
    slope = 3 * torch.cos(0.9 * x_t) * 0.9 * alpha / 4
    towards_real = -torch.sigmoid(-logit) * slope
    expected = matching + 5e-3 * towards_real / len(clean)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-3, atol=1e-8)
    critic = networks.critic
    assert critic is not None
    assert all(p.grad is None for p in critic.parameters())
    assert recorder_of(networks.teacher).factor.grad is None


def test_the_critic_s_gradient_is_that_of_the_paper(
    generator: torch.Generator,
) -> None:
    method, networks = recorded()
    batch = batch_of(5)
    x = method.generate(networks, batch, 2, generator, train=False)
    method.critic_backward(networks, batch, x, generator)
    fake, real, denoising = recorder_of(networks.critic).calls
    factor = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x_t = denoising["x"].double()
    alpha, sigma = levels(denoising["t"])
    noise = (x_t - alpha * x.double()) / sigma
    # The plain squared error of epsilon, guided by nothing.
    loss = (answer(factor, x_t, denoising["cond"]) - noise).square().mean()
    for call, sign in ((fake, 1), (real, -1)):
        features = answer(factor, call["x"].double(), call["cond"])
        logit = weight * features.mean(dim=(1, 2, 3))
        loss = loss + 1e-2 * torch.nn.functional.softplus(sign * logit).mean()
    loss.backward()
    inner = recorder_of(networks.critic)
    assert inner.factor.grad is not None
    assert factor.grad is not None
    torch.testing.assert_close(
        inner.factor.grad.double(), factor.grad, rtol=1e-3, atol=1e-5
    )
    critic = networks.critic
    assert critic is not None
    head: Any = critic.network.head
    torch.testing.assert_close(
        head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7
    )
    assert recorder_of(networks.student).factor.grad is None


@pytest.mark.parametrize("simulation", ["backward", "data"])
def test_an_iteration_reads_nothing_back_from_the_device(simulation: str) -> None:
    """On fake tensors there is nothing to read: any such read raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    process = DiscreteVariancePreserving.scaled_linear()
    with FakeTensorMode():
        method, networks = recorded(process, simulation=simulation)
        generator = torch.Generator()
        batch = batch_of(3)
        batch = batch._replace(data=batch.latents)
        x = method.generate(networks, batch, 2, generator, train=True)
        losses = method.student_backward(networks, batch, x, generator)
        losses |= method.critic_backward(networks, batch, x, generator)
        assert set(losses) == {"dm", "gan", "critic", "discriminator"}


# From here on with tiny pipelines, as a user would start it.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("text")
    return {
        "sd15": save_sd15(top / "sd15"),
        "sdxl": save_sdxl(top / "sdxl"),
        "sd15-latents": save_latents(top / "sd15-latents", top / "sd15"),
        "sdxl-latents": save_latents(top / "sdxl-latents", top / "sdxl"),
        "prompts": save_prompts(top / "prompts.txt"),
    }


FAST = "--batch-size 2 --workers 0 --device cpu".split()


def settings(folders: dict[str, Path], model: str, *options: str) -> TextSettings:
    given = ["--pretrained", str(folders[model]), *FAST]
    if "--released-prompts" not in options:
        given += ["--prompts", str(folders["prompts"])]
    given += ["--latents", str(folders[f"{model}-latents"])]
    module = sdxl if model == "sdxl" else sd15
    return parse(module.Settings, module.PRESETS, [*given, *options])


def build(
    folders: dict[str, Path], model: str, *options: str, rank: int = 0, ranks: int = 1
) -> TextDistillation:
    chosen = settings(folders, model, "--precision", "fp32", *options)
    return TextDistillation(chosen, {}, rank, ranks)


def weights(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_sdxl_s_teacher_is_guided_by_8_from_zeros(folders: dict[str, Path]) -> None:
    run = build(folders, "sdxl")
    batch = run.draw()
    cond: Any = batch.cond
    t = torch.full((2,), 500.0)
    unet: Any = run.base.unet

    def epsilon(text: Tensor, pooled: Tensor) -> Tensor:
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        added = {"text_embeds": pooled, "time_ids": ids}
        return unet(
            batch.noise, 500, encoder_hidden_states=text, added_cond_kwargs=added
        ).sample

    with_text = epsilon(cond.text, cond.pooled)
    without = epsilon(torch.zeros_like(cond.text), torch.zeros_like(cond.pooled))
    expected = x0_of(without + 8 * (with_text - without), batch.noise, t)
    found = run.networks.teacher(batch.noise, t, cond)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_sd15_s_teacher_is_guided_by_1_75_from_the_empty_prompt(
    folders: dict[str, Path],
) -> None:
    run = build(folders, "sd15")
    batch = run.draw()
    cond: Any = batch.cond
    t = torch.full((2,), 500.0)
    pipeline: Any = run.pipeline
    tokens = pipeline.tokenizer([""], padding="max_length", return_tensors="pt")
    empty = pipeline.text_encoder(tokens.input_ids).last_hidden_state
    unet: Any = run.base.unet

    def epsilon(text: Tensor) -> Tensor:
        return unet(batch.noise, 500, encoder_hidden_states=text).sample

    with_text, without = epsilon(cond.text), epsilon(empty.expand_as(cond.text))
    expected = x0_of(without + 1.75 * (with_text - without), batch.noise, t)
    found = run.networks.teacher(batch.noise, t, cond)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_ranks_share_the_rung_and_nothing_else(folders: dict[str, Path]) -> None:
    runs = [build(folders, "sdxl", rank=rank, ranks=2) for rank in range(2)]
    rungs = [
        [run.method.simulator.draw_rung(run.rung_generator) for _ in range(20)]
        for run in runs
    ]
    assert rungs[0] == rungs[1]
    assert set(rungs[0]) == {0, 1, 2, 3}
    one, other = (run.draw() for run in runs)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.cond.text, other.cond.text)


def test_prompts_are_the_file_s_or_as_released_the_captions(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for options, kind in (((), "prompt number"), (("--released-prompts",), "caption")):
        run = build(folders, "sdxl", *options)
        encode = run.encode

        def keep(prompts: Sequence[str], encode: Any = encode) -> Any:
            asked.extend(prompts)
            return encode(prompts)

        monkeypatch.setattr(run, "encode", keep)
        asked.clear()
        run.draw()
        student, real = asked[:2], asked[2:]
        assert all(prompt.startswith(kind) for prompt in student)
        assert all(prompt.startswith("caption") for prompt in real)
        assert student != real


@pytest.mark.parametrize(
    ("model", "options", "turns"),
    [("sdxl", (), 5), ("sd15", ("--preset", "stage1"), 10)],
)
def test_the_student_moves_at_its_turns_the_critic_at_each(
    folders: dict[str, Path], model: str, options: tuple[str, ...], turns: int
) -> None:
    run = build(folders, model, *options)
    critic = run.networks.critic
    of_student, of_critic, of_teacher = map(
        weights, (run.networks.student, critic, run.base)
    )
    moved = []
    for step in range(turns + 1):
        run.iterate(step)
        student, now = weights(run.networks.student), weights(critic)
        moved.append((not student.equal(of_student), not now.equal(of_critic)))
        of_student, of_critic = student, now
    assert moved == [(step % turns == 0, True) for step in range(turns + 1)]
    assert weights(run.base).equal(of_teacher)


@pytest.mark.parametrize("lora", ["none", "student", "both"])
def test_what_is_trained_is_fp32_and_the_base_bf16(
    folders: dict[str, Path], lora: str
) -> None:
    chosen = settings(folders, "sdxl", "--lora", lora, "--lora-rank", "2")
    run = TextDistillation(chosen, {})
    networks, base = run.networks, {id(p) for p in run.base.parameters()}
    critic = networks.critic
    assert critic is not None
    assert {p.dtype for p in run.base.parameters()} == {torch.bfloat16}
    for denoiser in (networks.student, critic):
        for p in denoiser.parameters():
            assert p.dtype == torch.float32
            assert p.requires_grad
            assert id(p) not in base
    of_critic: Any = critic.network
    adapted = [
        isinstance(network, LoRANetwork)
        for network in (networks.student.network, of_critic.network)
    ]
    expected = {"none": [False] * 2, "student": [True, False], "both": [True] * 2}
    assert adapted == expected[lora]
    before = weights(run.base), weights(networks.student), weights(critic)
    for step in range(2):
        run.iterate(step)
    assert weights(run.base).equal(before[0])
    assert not weights(networks.student).equal(before[1])
    assert not weights(critic).equal(before[2])


def test_presets_are_the_sections_of_the_paper() -> None:
    def row(s: TextSettings) -> tuple[Any, ...]:
        return (
            s.learning_rate,
            s.batch_size,
            s.iterations,
            s.critic_steps,
            s.guidance_scale,
            s.times,
        )

    four = (999.0, 749.0, 499.0, 249.0)
    # Section F.4 and Table 2.
    assert row(sdxl.PRESETS["four-step"]) == (5e-7, 128, 20_000, 5, 8, four)
    assert row(sdxl.PRESETS["one-step"]) == (5e-7, 128, 25_000, 5, 8, (399.0,))
    # Section F.3.
    assert row(sd15.PRESETS["stage1"]) == (1e-5, 2048, 40_000, 10, 1.75, (999.0,))
    assert row(sd15.PRESETS["stage2"]) == (5e-7, 2048, 5_000, 10, 1.75, (999.0,))
    stage1, stage2 = sd15.PRESETS["stage1"], sd15.PRESETS["stage2"]
    assert (stage1.gan, stage2.gan, stage2.gan_weight) == (False, True, 1e-3)
    # Table 4: which of GAN, distribution matching and backward simulation is there.
    parts = {
        name: (s.gan, s.distribution_matching, s.simulation == "backward")
        for name, s in sdxl.PRESETS.items()
    }
    assert parts["table4-no-gan"] == (False, True, True)
    assert parts["table4-no-distribution-matching"] == (True, False, True)
    assert parts["table4-no-backward-simulation"] == (True, True, False)
    assert parts["four-step"] == (True, True, True)
    for module in (sdxl, sd15):
        assert {n: s.preset for n, s in module.PRESETS.items()} == {
            n: n for n in module.PRESETS
        }


def golden_curve(folders: dict[str, Path]) -> dict[str, list[float]]:
    """Ten iterations with a rate at which the networks part visibly."""
    run = build(folders, "sdxl", "--learning-rate", "1e-4", "--critic-steps", "3")
    keys = ("dm/loss", "gan/loss", "critic/loss", "discriminator/loss")
    keys += ("student/gradient_norm", "critic/gradient_norm")
    curve: dict[str, list[float]] = {key: [] for key in keys}
    for step in range(10):
        metrics = run.iterate(step)
        for key in keys:
            if key in metrics:
                curve[key].append(metrics[key].item())
    return curve


def test_ten_iterations_are_those_of_the_golden_file(folders: dict[str, Path]) -> None:
    """Within 0.5 %: what the order of sums on other processors may change in 10 steps.

    Written by `python tests/regenerate_goldens.py --reason "..."`.
    """
    golden = json.loads(GOLDENS.read_text())
    curve = golden_curve(folders)
    assert curve.keys() == golden["curve"].keys()
    for key, values in golden["curve"].items():
        assert curve[key] == pytest.approx(values, rel=5e-3), key
