"""Several networks on one copy of the weights compute what separate ones would."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from helpers_diffusers import TEXT_UNETS, normal, text_inputs, text_unet
from helpers_lora import (
    CHECKPOINTING,
    SDXL,
    Merged,
    PooledHead,
    adapted,
    base,
    fill,
    gradients,
    storages,
)
from helpers_script import as_in_a_script
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dmdkit import (
    DenoisingLoss,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DiscreteVariancePreserving,
    DistributionMatchingLoss,
    EpsilonPrediction,
    ExponentialMovingAverage,
    NetworkWithHead,
    ScoreEstimator,
    frozen,
    snr_weight,
    trainable_copy,
)
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.lora import OFFICIAL_TARGETS, LoRANetwork
from dmdkit.training.checkpoint import load_checkpoint, save_checkpoint
from dmdkit.training.weights import saved_parameters

kinds = pytest.mark.parametrize("kind", TEXT_UNETS)
PROCESS = DiscreteVariancePreserving.scaled_linear()


def estimator(network: nn.Module) -> ScoreEstimator:
    return ScoreEstimator(network, PROCESS, EpsilonPrediction())


def close(ours: list[Tensor], theirs: list[Tensor], relative: float) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= relative * b.abs().max()


# What one network computes.


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_first_every_role_is_the_teacher_to_the_last_bit(kind, dtype) -> None:
    teacher = base(kind, dtype)
    x, t, cond = text_inputs(kind)
    wanted = teacher(x, t, cond, want=("output", "features"))
    for network in (LoRANetwork(teacher), LoRANetwork(teacher, rank=2, alpha=0.5)):
        given = network(x, t, cond, want=("output", "features"))
        assert torch.equal(given.output, wanted.output)
        assert torch.equal(given.features, wanted.features)
        assert torch.equal(network(x, t, cond), wanted.output)


@kinds
def test_output_and_gradients_are_those_of_merged_weights(kind: str) -> None:
    teacher = base(kind, torch.float64)
    network = adapted(teacher, targets=OFFICIAL_TARGETS)
    merged = Merged(teacher, network)
    x, t, cond = text_inputs(kind)
    x = x.double().requires_grad_()
    results = []
    for each in (network, merged):
        given = each(x, t, cond, want=("output", "features"))
        loss = given.output.square().mean() + given.features.sin().mean()
        (by_input,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        results.append([given.output, given.features, by_input, *gradients(each)])
    close(*results, relative=1e-10)
    output = teacher(x, t, cond)
    assert (network(x, t, cond) - output).norm() > 0.1 * output.norm()


@kinds
def test_every_official_kind_of_layer_is_adapted_and_no_other(kind: str) -> None:
    teacher = base(kind)
    names = [n.removesuffix(".weight") for n, _ in teacher.named_parameters()]
    wanted = {n for n in names if n.endswith(tuple(f".{t}" for t in OFFICIAL_TARGETS))}
    matrices = LoRANetwork(teacher, 1).adapter.named_parameters()
    assert {name.rsplit(".", 2)[0] for name, _ in matrices} == wanted
    for target in OFFICIAL_TARGETS:
        assert any(name.endswith(target) for name in wanted)


@pytest.mark.slow
def test_the_true_sdxl_has_a_rank_64_pair_for_788_layers() -> None:
    with torch.device("meta"):
        teacher = UNetNetwork(UNet2DConditionModel(**SDXL)).requires_grad_(False)
        assert sum(p.numel() for p in teacher.parameters()) == 2_567_463_684
    network = LoRANetwork(teacher)
    wanted = 0
    for name, p in teacher.named_parameters():
        if name.endswith(tuple(f".{target}.weight" for target in OFFICIAL_TARGETS)):
            wanted += 64 * (p.shape[1:].numel() + p.shape[0])
    assert sum(p.numel() for p in network.parameters()) == wanted == 196_751_360
    assert len(network.state_dict()) == 2 * 788


def test_a_bf16_base_gets_fp32_adapters_added_in_fp32() -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"to_q": nn.Linear(16, 8)}).requires_grad_(False).bfloat16()
    network = adapted(layer, targets=("to_q",))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    a, b = network.parameters()
    x = normal(5, 16).bfloat16()
    plain = layer["to_q"](x)
    wanted = plain.float() + x.float() @ a.T @ b.T * (2 / 3)
    given = network.network.get_submodule("to_q")(x)
    assert given.dtype == torch.bfloat16
    assert torch.equal(given, wanted.bfloat16())
    assert not torch.equal(given, plain)


@pytest.mark.parametrize("how", ["bf16 base", "autocast"])
def test_low_precision_is_close_and_its_gradients_are_fp32(how: str) -> None:
    x, t, cond = text_inputs("as SDXL")
    exact = adapted(base())
    exact(x, t, cond).square().mean().backward()
    low = adapted(base(dtype=torch.bfloat16) if how == "bf16 base" else base())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = low(x, t, cond)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert (output - exact(x, t, cond)).norm() < 0.03 * output.float().norm()
    ours, theirs = gradients(low), gradients(exact)
    assert {g.dtype for g in ours} == {torch.float32}
    difference = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))
    assert difference < 0.05**2 * sum(b.square().sum() for b in theirs)


# The three roles of distillation.


def two_turns(
    teacher: nn.Module, student: nn.Module, critic: nn.Module, rate: float = 0.1
) -> list[Tensor]:
    """A generator's turn and a critic's turn with a step of SGD each."""
    real, few, fake = estimator(teacher), estimator(student), estimator(critic)
    generator = torch.Generator().manual_seed(5)
    times = DiscreteUniformTime(20, 981)
    gan = DiffusionGANLoss(times)
    noise, _, cond = text_inputs("as SDXL")
    noise, real_x = noise.double(), normal(2, 4, 8, 8, seed=9).double()
    t = torch.full((2,), 999.0)
    seen: list[Tensor] = []

    def step(network: nn.Module) -> None:
        seen.extend(gradients(network))
        torch.optim.SGD(network.parameters(), lr=rate).step()
        network.zero_grad()

    x = few(noise, t, cond)
    with frozen(critic):
        dm = DistributionMatchingLoss(times)(
            x, cond, real=real, fake=fake, generator=generator
        )
        adversarial = gan.generator(x, cond, discriminator=fake, generator=generator)
        (dm.loss + adversarial.loss).backward()
    assert all(p.grad is None for p in critic.parameters())
    step(student)
    x = x.detach()
    denoising = DenoisingLoss(times, weight=snr_weight)(
        x, cond, denoiser=fake, generator=generator
    )
    adversarial = gan.discriminator(
        x, cond, real_x, cond, discriminator=fake, generator=generator
    )
    (denoising.loss + adversarial.loss).backward()
    assert all(p.grad is None for p in student.parameters())
    step(critic)
    return [*seen, few(noise, t, cond), fake(noise, t, cond)]


@pytest.mark.parametrize("checkpointing", ["no checkpointing", "checkpointing"])
def test_two_turns_are_those_of_three_separate_networks(checkpointing: str) -> None:
    teacher = base(dtype=torch.float64)
    before = copy.deepcopy(teacher)
    CHECKPOINTING[checkpointing](teacher)
    torch.manual_seed(1)
    head = PooledHead().double()
    student, critic = adapted(teacher, 1), adapted(teacher, 2)
    theirs = two_turns(
        before,
        Merged(before, student),
        NetworkWithHead(Merged(before, critic), copy.deepcopy(head)),
    )
    ours = two_turns(teacher, student, NetworkWithHead(critic, head))
    close(ours, theirs, relative=1e-7)
    for now, then in zip(teacher.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)
        assert now.grad is None
        assert not now.requires_grad


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_networks_on_shared_weights_equal_networks_on_copies(checkpointing) -> None:
    teacher = base()
    CHECKPOINTING[checkpointing](teacher)
    x, t, cond = text_inputs("as SDXL")
    x.requires_grad_()  # reentrant checkpointing needs it
    alone = []
    for seed in (1, 2):
        network = adapted(copy.deepcopy(teacher), seed)
        network(x, t, cond).square().mean().backward()
        alone.append(gradients(network))
    assert not torch.equal(alone[0][-1], alone[1][-1])
    one, other = adapted(teacher, 1), adapted(teacher, 2)
    losses = [network(x, t, cond).square().mean() for network in (one, other)]
    teacher(x, t, cond)
    for loss in losses:
        loss.backward()
    for network, wanted in zip((one, other), alone, strict=True):
        assert all(map(torch.equal, gradients(network), wanted))
        network.zero_grad()
    (one(x, t, cond).square().mean() + other(x, t, cond).square().mean()).backward()
    for network, wanted in zip((one, other), alone, strict=True):
        assert all(map(torch.equal, gradients(network), wanted))


def test_switching_adapters_as_peft_does_loses_the_gradients() -> None:
    """Why networks share weights here, and not one network its adapters."""
    unet = text_unet("as SDXL")
    for name in ("student", "critic"):
        vars(unet).pop("peft_config", None)  # peft warns of a second adapter
        config = LoraConfig(target_modules=["to_q"], init_lora_weights=False)
        inject_adapter_in_model(config, unet, name)
    layers = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]

    def switch(name: str) -> None:
        for layer in layers:
            layer.set_adapter(name)

    def student_gradients() -> list[Tensor | None]:
        return [p.grad for n, p in unet.named_parameters() if "student" in n]

    x, t, cond = text_inputs("as SDXL")
    network = UNetNetwork(unet)
    switch("student")
    output = network(x, t, cond)
    switch("critic")
    network(x, t, cond)
    output.square().mean().backward()
    assert all(g is None or not g.any() for g in student_gradients())
    switch("student")
    network(x, t, cond).square().mean().backward()
    assert all(g is not None and g.any() for g in student_gradients())


def test_an_exception_in_a_forward_changes_nothing() -> None:
    teacher = base()
    one, other = adapted(teacher, 1), adapted(teacher, 2)
    x, t, cond = text_inputs("as SDXL")
    before = [network(x, t, cond) for network in (teacher, one, other)]
    with pytest.raises(TypeError, match="cond"):
        one(x, t, None)
    after = [network(x, t, cond) for network in (teacher, one, other)]
    assert all(map(torch.equal, before, after))


def test_critic_may_be_a_full_copy_while_the_student_is_an_adapter() -> None:
    teacher = base()
    real = estimator(teacher)
    fake = trainable_copy(real)
    few = estimator(adapted(teacher))
    assert not storages(real).keys() & storages(fake).keys()
    assert all(p.requires_grad for p in fake.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    x, t, cond = text_inputs("as SDXL")
    assert torch.equal(fake(x, t, cond), real(x, t, cond))
    with frozen(fake):
        (fake(few(x, t, cond), t, cond)).square().mean().backward()
    assert all(g.any() for g in gradients(few))


# One copy of the weights, and what belongs to whom.


def test_there_is_one_copy_of_the_weights_also_after_a_cast_of_the_base() -> None:
    teacher = base()
    student, critic = adapted(teacher, 1), adapted(teacher, 2)
    copied = copy.deepcopy(student)
    networks = (student, critic, copied)
    for dtype in (torch.float32, torch.bfloat16):
        teacher.to(dtype)
        everything = storages(teacher, *(n.network for n in networks))
        assert everything == storages(teacher, *networks)
        sizes = sum(p.nbytes for n in (teacher, *networks) for p in n.parameters())
        assert sum(everything.values()) == sizes
        assert {p.dtype for n in networks for p in n.parameters()} == {torch.float32}


def test_buffers_and_replaced_weights_of_the_base_are_seen_as_well() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(4, 4)
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x: Tensor, c_noise: Tensor, cond: None) -> Tensor:
            return self.to_q(x) + self.shift

    teacher, x = Shifted().requires_grad_(False), normal(2, 4)
    network = LoRANetwork(teacher)
    teacher.to(torch.float64).to(torch.float32)
    state = {n: v + 1 for n, v in teacher.state_dict().items()}
    teacher.load_state_dict(state, assign=True)
    assert torch.equal(network(x, torch.ones(2)), teacher(x, torch.ones(2), None))


def test_parameters_state_averages_and_flags_are_the_adapters_alone() -> None:
    teacher = base()
    head = PooledHead()
    student, inner = adapted(teacher, 1), adapted(teacher, 2)
    critic = NetworkWithHead(inner, head)
    names = [name for name, _ in student.named_parameters()]
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    assert list(student.state_dict()) == names
    assert len(list(critic.parameters())) == len(names) + 2
    assert all(p.requires_grad for p in critic.parameters())
    ema = ExponentialMovingAverage(student, (0.9,))
    assert list(ema.averages[0.9]) == names
    with frozen(critic):
        assert not any(p.requires_grad for p in critic.parameters())
        assert all(p.requires_grad for p in student.parameters())
    critic.requires_grad_(False).double().eval()
    assert all(p.requires_grad for p in student.parameters())
    kinds_of_weights = {p.dtype for p in (*student.parameters(), *teacher.parameters())}
    assert kinds_of_weights == {torch.float32}
    assert student.network.training
    assert teacher.training
    assert not any(m.training for m in inner.network.modules())


def test_averages_can_be_put_in_for_a_while() -> None:
    teacher = base()
    x, t, cond = text_inputs("as SDXL")
    student = adapted(teacher)
    before = student(x, t, cond)
    ema = ExponentialMovingAverage(student, (0.5,))
    fill(student, 7)
    after = student(x, t, cond)
    with ema.applied_to(student):
        assert torch.equal(student(x, t, cond), before)
    assert torch.equal(student(x, t, cond), after)
    assert not torch.equal(before, after)


def test_states_load_into_another_adapter_of_the_same_weights() -> None:
    teacher = base()
    x, t, cond = text_inputs("as SDXL")
    one, other = adapted(teacher, 1), adapted(teacher, 2)
    assert not torch.equal(one(x, t, cond), other(x, t, cond))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x, t, cond), other(x, t, cond))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_checkpoints_hold_and_restore_adapters_heads_and_their_optimizer(
    tmp_path: Path,
) -> None:
    teacher = base()
    x, t, cond = text_inputs("as SDXL")

    def build(seed: int) -> tuple[NetworkWithHead, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        critic = NetworkWithHead(adapted(teacher, seed), PooledHead())
        return critic, torch.optim.AdamW(critic.parameters(), lr=1e-2)

    def step(critic: NetworkWithHead, optimizer: torch.optim.Optimizer) -> Tensor:
        given = critic(x, t, cond, want=("output", "logits"))
        (given.output.square().mean() + given.logits.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return given.output

    critic, optimizer = build(1)
    step(critic, optimizer)
    path = save_checkpoint(
        tmp_path,
        step=1,
        modules={"critic": critic},
        optimizers={"critic": optimizer},
    )
    assert saved_parameters(path, "critic") == set(critic.state_dict())
    wanted = [step(critic, optimizer) for _ in range(2)]
    critic, optimizer = build(2)
    load_checkpoint(path, modules={"critic": critic}, optimizers={"critic": optimizer})
    assert all(torch.equal(step(critic, optimizer), expected) for expected in wanted)


def test_a_trainable_copy_is_another_adapter_on_the_same_weights() -> None:
    teacher = base(dtype=torch.bfloat16)
    x, t, cond = text_inputs("as SDXL")
    student = estimator(adapted(teacher))
    with frozen(student):
        critic = trainable_copy(student, head=PooledHead())
    assert isinstance(critic.network, NetworkWithHead)
    assert all(p.requires_grad for p in critic.parameters())
    before = student(x, t, cond)
    assert torch.equal(critic(x, t, cond), before)
    network = critic.network.network
    assert isinstance(network, LoRANetwork)
    assert storages(teacher).items() <= storages(network.network).items()
    assert not storages(student).keys() & storages(critic).keys()
    fill(network, 3)
    assert torch.equal(student(x, t, cond), before)
    assert not torch.equal(critic(x, t, cond), before)


def test_checkpointing_of_the_base_is_taken_over_and_then_its_own() -> None:
    def unet_of(network: LoRANetwork) -> Any:
        return network.network.get_submodule("unet")

    teacher = base()
    assert not unet_of(adapted(teacher)).is_gradient_checkpointing
    teacher.unet.enable_gradient_checkpointing()
    one, other = adapted(teacher), adapted(teacher)
    teacher.unet.disable_gradient_checkpointing()
    unet_of(one).disable_gradient_checkpointing()
    assert not unet_of(one).is_gradient_checkpointing
    assert unet_of(other).is_gradient_checkpointing


def test_a_drawn_by_a_generator_is_that_of_peft_and_b_is_zero() -> None:
    teacher = base()
    state = torch.get_rng_state()
    one, again, other = (
        LoRANetwork(teacher, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    drawn = 0
    for (name, p), same, different in zip(
        one.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, same)
        if name.endswith("lora_B.weight"):
            assert not p.any()
            continue
        bound = p.shape[1:].numel() ** -0.5
        assert p.abs().max() <= bound
        assert p.detach().std() == pytest.approx(bound / 3**0.5, rel=0.2)
        assert not torch.equal(p, different)
        drawn += 1
    assert drawn > 50


# Bad input.


def wrapped() -> nn.Module:
    return nn.DataParallel(base())


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rank 0": (lambda: LoRANetwork(base(), 0), ValueError, "rank, alpha: got 0, 8"),
    "alpha": (lambda: LoRANetwork(base(), alpha=0), ValueError, "rank, alpha: got 64"),
    "nan": (lambda: LoRANetwork(base(), alpha=float("nan")), ValueError, "got 64, nan"),
    "no module": (lambda: LoRANetwork(3), TypeError, "network: got int 3"),  # pyright: ignore[reportArgumentType]
    "wrapped": (lambda: LoRANetwork(wrapped()), TypeError, "wrap that"),
    "adapted": (
        lambda: LoRANetwork(adapted(base())),
        ValueError,
        "it has adapters already",
    ),
    "trainable": (
        lambda: LoRANetwork(UNetNetwork(text_unet("as SDXL"))),
        ValueError,
        "network.requires_grad_(False)",
    ),
    "one string": (
        lambda: LoRANetwork(base(), targets="to_q"),
        TypeError,
        "targets: got the string 'to_q'",
    ),
    "none there": (
        lambda: LoRANetwork(base(), targets=("query",)),
        ValueError,
        "targets: no layer of UNetNetwork ends in any of query",
    ),
    "no layer": (
        lambda: LoRANetwork(base(), targets=("attn1",)),
        TypeError,
        "attn1 is a Attention, expected Linear or Conv2d",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    call, kind, words = BAD[name]
    with as_in_a_script(), pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Wrapped.


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_under_ddp_the_adapter_alone_is_synchronised(tmp_path: Path) -> None:
    teacher = base()
    x, t, cond = text_inputs("as SDXL")
    wanted = adapted(teacher)
    wanted(x, t, cond).square().mean().backward()
    network = adapted(teacher)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(network)
        estimator(parallel).network(x, t, cond).square().mean().backward()
    finally:
        dist.destroy_process_group()
    close(gradients(parallel), gradients(wanted), relative=1e-6)
    assert len(list(parallel.parameters())) == len(list(network.parameters()))


@pytest.mark.slow
def test_it_compiles_to_one_graph() -> None:
    # The tests' import hook wraps functions in what Dynamo cannot trace.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled\n"


def compile_two() -> None:
    teacher = base()
    x, t, cond = text_inputs("as SDXL")
    for seed in (1, 2):
        network = adapted(teacher, seed)
        plain = network(x, t, cond)
        plain.square().mean().backward()
        wanted = gradients(network)
        network.zero_grad()
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        output = compiled(x, t, cond)
        output.square().mean().backward()
        close([output, *gradients(network)], [plain, *wanted], relative=1e-4)
    print("compiled")


if __name__ == "__main__":
    compile_two()
