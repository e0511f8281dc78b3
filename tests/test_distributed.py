"""Two processes on the CPU, once with DistributedDataParallel and once with FSDP2.

The workers run in a process of their own without the import hook of the tests.
"""

import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_training import PROCESS, TinyNetwork
from torch import Tensor, nn

from dmdkit import (
    BackwardSimulator,
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DistributionMatchingLoss,
    EpsilonPrediction,
    Monitor,
    NetworkWithHead,
    RegressionLoss,
    ScoreEstimator,
    TTURScheduler,
    few_step_times,
    frozen,
    load_checkpoint,
    save_checkpoint,
)
from dmdkit.training.ranks import gathered

BATCH = 8
TIMES = DiscreteUniformTime(20, 981)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def estimator(network: nn.Module) -> ScoreEstimator:
    return ScoreEstimator(network, PROCESS, EpsilonPrediction())


def networks(seed: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(seed)
    head = DiffusionGANHead(channels=8, resolution=1, groups=2)
    critic = NetworkWithHead(TinyNetwork(), head)
    return TinyNetwork().requires_grad_(False), TinyNetwork(), critic


class Draws:
    """Everything random of one step, and the part of it that a rank gets."""

    def __init__(self, step: int, part: slice) -> None:
        g = torch.Generator().manual_seed(step)
        self.labels = torch.randint(4, (BATCH,), generator=g)[part]
        self.real, self.noise, self.pair, *self.noises = (
            torch.randn(BATCH, 3, generator=g)[part] for _ in range(8)
        )
        self.times = [
            torch.randint(20, 980, (BATCH,), generator=g).float()[part]
            for _ in range(5)
        ]


def generator_turn(
    teacher: ScoreEstimator, student: ScoreEstimator, critic: ScoreEstimator, d: Draws
) -> Tensor:
    """Backward through every loss that reaches the student; gives its sample."""
    x = student(d.noise, torch.full_like(d.times[0], 999), d.labels)
    with frozen(critic):
        dm = DistributionMatchingLoss(TIMES)(
            x, d.labels, real=teacher, fake=critic, t=d.times[0], noise=d.noises[0]
        )
        gan = DiffusionGANLoss(TIMES).generator(
            x, d.labels, discriminator=critic, t=d.times[1], noise=d.noises[1]
        )
        pairs = RegressionLoss()(x, d.pair)
        (dm.loss + gan.loss + 0.1 * pairs.loss).backward()
    return x.detach()


def critic_turn(critic: ScoreEstimator, x: Tensor, d: Draws) -> None:
    denoising = DenoisingLoss(TIMES)(
        x, d.labels, denoiser=critic, t=d.times[2], noise=d.noises[2]
    )
    gan = DiffusionGANLoss(TIMES).discriminator(
        x,
        d.labels,
        d.real,
        d.labels,
        discriminator=critic,
        t=d.times[3],
        noise=d.noises[3],
        t_real=d.times[4],
        noise_real=d.noises[4],
    )
    (denoising.loss + gan.loss).backward()


def whole(tensor: Tensor) -> Tensor:
    """A tensor as if nothing were sharded."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().clone()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): whole(p.grad)
        for name, p in module.named_parameters()
        if p.grad is not None
    }


def train(
    teacher: nn.Module,
    student: nn.Module,
    critic: nn.Module,
    part: slice,
    *,
    first_critic_turn_before: bool = False,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Four iterations of the loop of DMD2; gives the gradients of every turn."""
    real, fake, generator = map(estimator, (teacher, critic, student))
    ttur = TTURScheduler(2)
    of_student = torch.optim.SGD(student.parameters(), 0.05)
    of_critic = torch.optim.SGD(critic.parameters(), 0.05)
    if first_critic_turn_before:
        # FSDP2 settles what a group of parameters is at its first forward, which has
        # to see it trainable; the generator's turn would show it frozen.
        d = Draws(0, part)
        critic_turn(fake, d.real, d)
        of_critic.zero_grad()
    for step in range(4):
        d = Draws(step, part)
        if ttur.generator_turn(step):
            x = generator_turn(real, generator, fake, d)
            assert not any(p.grad is not None for p in critic.parameters())
            yield f"{step} student", gradients(student)
            of_student.step()
            of_student.zero_grad()
        else:
            with torch.no_grad():
                x = generator(d.noise, torch.full_like(d.times[0], 999), d.labels)
        critic_turn(fake, x, d)
        assert all(p.requires_grad for p in critic.parameters())
        yield f"{step} critic", gradients(critic)
        of_critic.step()
        of_critic.zero_grad()


def compare(
    found: Iterator[tuple[str, dict[str, Tensor]]],
    expected: Iterator[tuple[str, dict[str, Tensor]]],
) -> None:
    turns = 0
    for (turn, ours), (other, theirs) in zip(found, expected, strict=True):
        assert turn == other
        assert ours.keys() == theirs.keys()
        size = max(g.abs().max().item() for g in theirs.values())
        for name, gradient in ours.items():
            torch.testing.assert_close(
                gradient,
                theirs[name],
                rtol=1e-5,
                atol=1e-5 * size,
                msg=lambda text, at=f"{turn}, {name}": f"{at}: {text}",
            )
        turns += 1
    assert turns == 6


def check_ddp(rank: int, part: slice) -> None:
    from torch.nn.parallel import DistributedDataParallel

    _, student, critic = networks(seed=rank)
    assert not equal_on_all_ranks(critic.get_parameter("head.layers.0.weight"))
    teacher = networks(seed=0)[0]
    student = DistributedDataParallel(student)
    critic = DistributedDataParallel(critic)
    for parameter in critic.parameters():
        assert equal_on_all_ranks(parameter)
    compare(
        train(teacher, student, critic, part),
        train(*networks(seed=0), slice(0, BATCH)),
    )
    for module in (student, critic):
        for parameter in module.parameters():
            assert equal_on_all_ranks(parameter)


def check_fsdp(rank: int, part: slice) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    teacher, student, critic = networks(seed=0)
    for module in (teacher, student, critic):
        fully_shard(module, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in critic.parameters())
    compare(
        train(teacher, student, critic, part, first_critic_turn_before=True),
        train(*networks(seed=0), slice(0, BATCH)),
    )


def check_fsdp_in_bf16(rank: int, part: slice) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    teacher, student, critic = networks(seed=0)
    # The head computes in fp32, so it is a unit of its own.
    head = critic.get_submodule("head")
    fully_shard(head, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    bf16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for module in (teacher, student, critic):
        fully_shard(module, mesh=mesh, mp_policy=bf16)
    found = train(teacher, student, critic, part, first_critic_turn_before=True)
    expected = train(*networks(seed=0), slice(0, BATCH))
    for (turn, ours), (_, theirs) in zip(found, expected, strict=True):
        assert {g.dtype for g in ours.values()} == {torch.float32}
        a, b = (torch.cat([g.flatten() for g in d.values()]) for d in (ours, theirs))
        assert (a - b).norm() < 0.05 * b.norm(), turn


def check_simulation(rank: int, part: slice) -> None:
    student = estimator(networks(seed=0)[1])
    simulator = BackwardSimulator(few_step_times(4))
    torch.manual_seed(rank)
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(100 + rank)
    rungs = []
    for _ in range(12):
        noise = torch.randn(2, 3, generator=own)
        x_t, t, rung = simulator(student, noise, rung_generator=shared, generator=own)
        rungs.append(rung)
        assert equal_on_all_ranks(t)
        assert not equal_on_all_ranks(x_t)
    assert equal_on_all_ranks(torch.tensor(rungs))
    assert len(set(rungs)) > 1


class WhoSaved:
    """A state that is another on every rank, as a loader's own may be."""

    def __init__(self, rank: int) -> None:
        self.who, self.tensor = rank, torch.full((2,), float(rank))

    def state_dict(self) -> dict[str, Any]:
        return {"who": self.who, "tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.who, self.tensor = state["who"], state["tensor"]


def check_states(rank: int, part: slice) -> None:
    # Widths that make PyTorch's plan give rank 1 less to write than rank 0.
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 64))
    monitor, who = Monitor(), WhoSaved(rank)
    if rank == 0:
        monitor.observe(0, torch.rand(2, 1, 4, 4))
    history = gathered(monitor.history)[0]
    parts: dict[str, Any] = {
        "modules": {"net": net},
        "states": {"monitor": monitor, "who": who},
    }
    folder = gathered(tempfile.mkdtemp())[0]
    path = save_checkpoint(folder, step=1, **parts)
    monitor.history.clear()
    load_checkpoint(path, **parts)
    assert len(history) == 1
    assert monitor.history == history
    assert who.who == 0
    assert who.tensor.tolist() == [0, 0]


def equal_on_all_ranks(tensor: Tensor) -> bool:
    copies = [torch.empty_like(tensor.detach()) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.detach().contiguous())
    return all(torch.equal(copies[0], other) for other in copies[1:])


CHECKS = {
    "states": check_states,
    "simulation": check_simulation,
    "ddp": check_ddp,
    "fsdp": check_fsdp,
    "fsdp in bf16": check_fsdp_in_bf16,
}


def worker(rank: int, folder: str) -> None:
    """Runs every check, and leaves a file for each that says how it went."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    half = BATCH // 2
    for name, check in CHECKS.items():
        try:
            check(rank, slice(rank * half, (rank + 1) * half))
            report = ""
        except Exception:
            report = traceback.format_exc()
        Path(folder, f"{name}{rank}").write_text(report)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each check, from one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return {
        name: "".join((folder / f"{name}{rank}").read_text() for rank in (0, 1))
        for name in CHECKS
    }


def test_two_processes_share_the_rung_and_not_the_noise(reports) -> None:
    assert reports["simulation"] == ""


def test_states_are_those_of_rank_0(reports) -> None:
    assert reports["states"] == ""


def test_every_loss_works_with_ddp_as_in_one_process(reports) -> None:
    assert reports["ddp"] == ""


def test_every_loss_works_with_fully_shard_as_in_one_process(reports) -> None:
    assert reports["fsdp"] == ""


def test_every_loss_works_with_fully_shard_in_bf16(reports) -> None:
    assert reports["fsdp in bf16"] == ""
