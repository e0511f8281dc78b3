"""One pass for two losses: with the same draws, what two passes give."""

from typing import Any

import pytest
import torch
from helpers_losses import (
    PROCESSES,
    ToyNetwork,
    generator,
    has_gradient,
    normal,
    toy_estimator,
)
from helpers_script import as_in_a_script
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dmdkit import (
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DistributionMatchingLoss,
    FlooredNormalizer,
    NetworkWithHead,
    RectifiedFlow,
    SamplePrediction,
    ScoreEstimator,
    SharedCriticLoss,
    SharedGeneratorLoss,
    UniformTime,
    VarianceExploding,
    frozen,
    snr_weight,
    trainable_copy,
)
from dmdkit.types import NetworkOutput

processes = pytest.mark.parametrize("kind", PROCESSES)
TIMES = UniformTime(0.5, 2.0)


def critic_of(process: Any, seed: int = 1) -> ScoreEstimator:
    estimator = ScoreEstimator(ToyNetwork(seed), process, SamplePrediction())
    torch.manual_seed(0)
    return trainable_copy(estimator, head=DiffusionGANHead(8, 4, groups=2))


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 0
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


@processes
def test_the_critic_s_losses_and_gradients_are_those_of_two_passes(kind: str) -> None:
    process, times, given = PROCESSES[kind]
    critic = critic_of(process)
    weight = snr_weight if kind == "vp" else DenoisingLoss(times).weight
    denoising, gan = DenoisingLoss(times, weight), DiffusionGANLoss(times)
    x, real = normal(3, 2, 4, 4), normal(2, 2, 4, 4, seed=1)
    cond, real_cond = normal(3, seed=2), normal(2, seed=3)
    draws: dict[str, Any] = {
        "t": torch.tensor(given),
        "noise": normal(*x.shape, seed=4),
    }
    of_real: dict[str, Any] = {
        "t_real": torch.tensor(given[:2]),
        "noise_real": normal(*real.shape, seed=5),
    }
    both = SharedCriticLoss(denoising, gan)(
        x, cond, real, real_cond, critic=critic, **draws, **of_real
    )
    ours = gradients(critic, both.denoising.loss + 0.3 * both.discriminator.loss)
    alone = denoising(x, cond, denoiser=critic, **draws)
    told = gan.discriminator(
        x, cond, real, real_cond, discriminator=critic, **draws, **of_real
    )
    same(ours, gradients(critic, alone.loss + 0.3 * told.loss))
    for shared, separate in ((both.denoising, alone), (both.discriminator, told)):
        for name, value in separate._asdict().items():
            torch.testing.assert_close(
                getattr(shared, name), value, rtol=1e-4, atol=1e-6
            )


@processes
def test_the_generator_s_losses_and_gradients_are_those_of_two_passes(
    kind: str,
) -> None:
    process, times, given = PROCESSES[kind]
    teacher = ScoreEstimator(ToyNetwork(), process, SamplePrediction())
    critic = critic_of(process)
    matching = DistributionMatchingLoss(times, FlooredNormalizer(0.1))
    cond = normal(3, seed=2)
    draws: dict[str, Any] = {
        "t": torch.tensor(given),
        "noise": normal(3, 2, 4, 4, seed=4),
    }
    x, other = (normal(3, 2, 4, 4).requires_grad_() for _ in range(2))
    with frozen(critic, teacher):
        both = SharedGeneratorLoss(matching)(
            x, cond, real=teacher, critic=critic, **draws
        )
        (both.distribution_matching.loss + 0.3 * both.gan.loss).backward()
        alone = matching(other, cond, real=teacher, fake=critic, **draws)
        fooled = DiffusionGANLoss(times).generator(
            other, cond, discriminator=critic, **draws
        )
        (alone.loss + 0.3 * fooled.loss).backward()
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad, other.grad)
    pairs = ((both.distribution_matching, alone), (both.gan, fooled))
    for shared, separate in pairs:
        for name, value in separate._asdict().items():
            torch.testing.assert_close(getattr(shared, name), value)
    assert not has_gradient(critic)
    assert not both.distribution_matching.x_t.requires_grad


class Asked(ToyNetwork):
    """Keeps how often it is called, and what its encoder and decoder were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.encoded: list[int] = []
        self.decoded: list[tuple[int, bool]] = []
        self.register_forward_pre_hook(self._count)
        self.encoder.register_forward_pre_hook(
            lambda _, args: self.encoded.append(len(args[0]))
        )
        self.decoder.register_forward_hook(
            lambda _, args, out: self.decoded.append((len(out), out.requires_grad))
        )

    def _count(self, *_: Any) -> None:
        self.calls += 1


def asked_critic() -> tuple[ScoreEstimator, Asked]:
    network = Asked()
    whole = NetworkWithHead(network, DiffusionGANHead(8, 4, groups=2))
    return ScoreEstimator(whole, VarianceExploding(), SamplePrediction()), network


def test_the_critic_is_called_once_and_decodes_generated_samples_alone() -> None:
    critic, network = asked_critic()
    loss = SharedCriticLoss(DenoisingLoss(TIMES), DiffusionGANLoss(TIMES))
    loss(normal(3, 2, 4, 4), None, normal(5, 2, 4, 4), None, critic=critic)
    assert (network.calls, network.encoded) == (1, [8])
    assert network.decoded == [(3, True)]


def test_on_the_generator_s_turn_the_decoder_has_no_graph() -> None:
    critic, network = asked_critic()
    x = normal(3, 2, 4, 4).requires_grad_()
    with frozen(critic):
        both = SharedGeneratorLoss(DistributionMatchingLoss(TIMES))(
            x, real=toy_estimator(), critic=critic
        )
    assert (network.calls, network.encoded) == (1, [3])
    assert network.decoded == [(3, False)]
    assert both.gan.loss.requires_grad


def saved_bytes(call: Any) -> int:
    """What autograd keeps for the backward of a call, each storage once."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        kept = call()
    del kept
    return sum(storages.values())


def test_distribution_matching_keeps_nothing_of_teacher_and_critic() -> None:
    """What is saved is of the size of the gradient, however wide the networks are."""

    def wide(seed: int) -> ScoreEstimator:
        network = nn.Sequential(nn.Conv2d(2, 512, 1), nn.SiLU(), nn.Conv2d(512, 2, 1))

        class Wide(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(seed)
                self.layers = network

            def forward(
                self,
                x: Tensor,
                c_noise: Tensor,
                cond: Any,
                want: Any = None,
                output_grad: bool = True,
            ) -> Any:
                output = self.layers(x)
                if want is None:
                    return output
                return NetworkOutput(output, features=output)

        return ScoreEstimator(Wide(), VarianceExploding(), SamplePrediction())

    teacher, critic = wide(0), wide(1)
    x = normal(8, 2, 4, 4).requires_grad_()
    size = x.untyped_storage().nbytes()

    def matching() -> Tensor:
        return DistributionMatchingLoss(TIMES)(x, real=teacher, fake=critic).loss

    assert saved_bytes(matching) <= 2 * size
    # The measure sees what a network with a graph would keep.
    graph = saved_bytes(lambda: critic(x, torch.ones(8)))
    assert graph > 100 * size


def test_shared_draws_have_the_distribution_of_the_losses() -> None:
    times = DiscreteUniformTime(3, 8)
    critic = critic_of(PROCESSES["vp"][0])
    loss = SharedCriticLoss(DenoisingLoss(times), DiffusionGANLoss(times))
    x, real = normal(400, 2, 4, 4), normal(300, 2, 4, 4, seed=1)
    both = loss(x, None, real, None, critic=critic, generator=generator())
    t, t_real = both.discriminator.t, both.discriminator.t_real
    assert torch.equal(both.denoising.t, t)
    for drawn in (t, t_real):
        assert set(drawn.tolist()) == {3, 4, 5, 6, 7}
    assert (t[:300] == t_real).float().mean() < 0.4
    again = loss(x, None, real, None, critic=critic, generator=generator())
    assert torch.equal(again.denoising.x_t, both.denoising.x_t)


def test_losses_that_draw_from_other_times_cannot_share() -> None:
    with pytest.raises(ValueError, match="gan: it draws its times from UniformTime"):
        SharedCriticLoss(DenoisingLoss(TIMES), DiffusionGANLoss(UniformTime(0.5, 3.0)))


def test_what_is_no_loss_is_named() -> None:
    wrong: Any = TIMES
    with as_in_a_script():
        with pytest.raises(TypeError, match="denoising: got UniformTime, expected"):
            SharedCriticLoss(wrong, DiffusionGANLoss(TIMES))
        with pytest.raises(TypeError, match="gan: got UniformTime, expected a Diff"):
            SharedCriticLoss(DenoisingLoss(TIMES), wrong)
        with pytest.raises(TypeError, match="distribution_matching: got UniformTime"):
            SharedGeneratorLoss(wrong)


class WithoutSharing(nn.Module):
    """A network with features that takes no more keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = ToyNetwork()

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Any, *, want: Any = None
    ) -> Any:
        return self.toy(x, c_noise, cond, want=want)


def test_a_network_that_takes_no_shared_pass_is_named() -> None:
    whole = NetworkWithHead(WithoutSharing(), DiffusionGANHead(8, 4, groups=2))
    critic = ScoreEstimator(whole, VarianceExploding(), SamplePrediction())
    loss = SharedCriticLoss(DenoisingLoss(TIMES), DiffusionGANLoss(TIMES))
    x = normal(2, 2, 4, 4).requires_grad_()
    with pytest.raises(TypeError, match="takes no `outputs`, which a shared pass"):
        loss(x, None, x, None, critic=critic)
    with pytest.raises(TypeError, match="takes no `output_grad`, which a shared pass"):
        SharedGeneratorLoss(DistributionMatchingLoss(TIMES))(
            x, real=toy_estimator(), critic=critic
        )


def test_bad_calls_are_refused() -> None:
    critic, _ = asked_critic()
    x = normal(2, 2, 4, 4)
    shared = SharedGeneratorLoss(DistributionMatchingLoss(TIMES))
    with pytest.raises(ValueError, match="x: it carries no gradient"):
        shared(x, real=toy_estimator(), critic=critic)
    flow = ScoreEstimator(ToyNetwork(), RectifiedFlow(), SamplePrediction())
    with pytest.raises(ValueError, match="critic: its process VarianceExploding diff"):
        shared(x.requires_grad_(), real=flow, critic=critic)
    loss = SharedCriticLoss(DenoisingLoss(TIMES), DiffusionGANLoss(TIMES))
    with pytest.raises(
        ValueError, match=r"real_cond: got float32\[2\], which cannot be joined"
    ):
        loss(x, None, x, torch.ones(2), critic=critic)
    with pytest.raises(TypeError, match="asked for output, logits"):
        loss(x, None, x, None, critic=toy_estimator())


@pytest.mark.parametrize("count", [0, 4, -1])
def test_outputs_is_a_number_of_samples(count: int) -> None:
    with pytest.raises(ValueError, match=r"outputs: got -?\d, expected 1 ... 3"):
        toy_estimator().estimate(
            normal(3, 2, 4, 4), torch.ones(3), want=("x0", "features"), outputs=count
        )


def test_scores_of_the_first_samples() -> None:
    estimator, x, t = toy_estimator(), normal(3, 2, 4, 4), torch.ones(3)
    given = estimator.estimate(x, t, want=("x0", "score", "features"), outputs=2)
    assert given.x0 is not None
    assert given.score is not None
    assert given.features is not None
    assert len(given.features) == 3
    torch.testing.assert_close(given.x0, estimator(x[:2], t[:2]))
    torch.testing.assert_close(given.score, estimator.score(x[:2], t[:2]))
    alone = estimator.estimate(x, t, want=("x0",), outputs=1, output_grad=False)
    assert alone.x0 is not None
    assert not alone.x0.requires_grad
    torch.testing.assert_close(alone.x0, estimator(x[:1], t[:1]))
