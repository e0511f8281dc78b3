"""DMD2 in one's own loop: python examples/custom_loop.py flow, half a minute.

Eight Gaussians in the plane; prints how many of the student's samples lie in a mode.
"""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dmdkit as dmd
from dmdkit.types import NetworkOutput

ANGLES = torch.arange(8) * math.pi / 4
MODES, SPREAD = torch.stack((ANGLES.cos(), ANGLES.sin()), dim=1) * 2, 0.1
# fmt: off
SETUPS = {  # process, parameterization; times of DM and the rest, weight, student time
    "edm": (dmd.VarianceExploding(), dmd.KarrasPreconditioning(1.4),
        dmd.KarrasIndexTime(20, 981), dmd.KarrasIndexTime(), dmd.KarrasWeight(1.4), 80),
    "vp": (dmd.DiscreteVariancePreserving.scaled_linear(), dmd.VPrediction(0.001),
        dmd.DiscreteUniformTime(20, 981), dmd.DiscreteUniformTime(), dmd.v_weight, 999),
    "flow": (dmd.RectifiedFlow(), dmd.VelocityPrediction(),
        dmd.UniformTime(0.02, 0.98), dmd.UniformTime(1e-3), dmd.velocity_weight, 1),
}
# fmt: on


@dataclass(frozen=True)
class Teacher:
    """A denoiser is anything with a process and a call: here the exact E[x0 | x_t]."""

    process: dmd.NoiseProcess

    def __call__(self, x_t: Tensor, t: Tensor, cond: None = None) -> Tensor:
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        variance = (alpha * SPREAD) ** 2 + sigma**2
        offset = x_t[:, None] - alpha[..., None] * MODES  # [b, 8, 2]
        share = (-offset.square().sum(2) / (2 * variance)).softmax(dim=1)[..., None]
        x0_by_mode = MODES + (alpha * SPREAD**2 / variance)[..., None] * offset
        return (share * x0_by_mode).sum(dim=1)


class MLP(nn.Module):
    """A network of one's own; `want` is only needed for the GAN's features."""

    def __init__(self) -> None:
        super().__init__()
        layers = [m for n in (10, 128, 128) for m in (nn.Linear(n, 128), nn.SiLU())]
        self.body, self.out = nn.Sequential(*layers), nn.Linear(128, 2)

    def forward(self, x: Tensor, c_noise: Tensor, cond: None = None, *, want=None):
        waves = c_noise[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0])
        h = self.body(torch.cat((x, waves.sin(), waves.cos()), dim=1))
        return self.out(h) if want is None else NetworkOutput(self.out(h), h)


def distil(setup: str, iterations: int = 4000, batch: int = 256, seed: int = 0):
    """Distils the teacher; gives 2,000 samples of the student."""
    torch.manual_seed(seed)
    process, parameterization, dm_times, times, weight, last = SETUPS[setup]
    teacher = Teacher(process)
    student = dmd.ScoreEstimator(MLP(), process, parameterization)
    head = nn.Sequential(nn.Linear(128, 1), nn.Flatten(0))
    critic = dmd.trainable_copy(student, head)
    dm_loss = dmd.DistributionMatchingLoss(dm_times)
    critic_loss, gan = dmd.DenoisingLoss(times, weight), dmd.DiffusionGANLoss(times)
    simulator, ttur = dmd.BackwardSimulator((last,)), dmd.TTURScheduler(5)
    student_optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), 1e-3)
    # --8<-- [start:loop]
    for step in range(iterations):
        x_t, t, _ = simulator(student, torch.randn(batch, 2))
        with torch.set_grad_enabled(ttur.generator_turn(step)):
            x = student(x_t, t)
        if ttur.generator_turn(step):
            with dmd.frozen(critic):
                dm = dm_loss(x, real=teacher, fake=critic)
                fool = gan.generator(x, discriminator=critic)
                (dm.loss + 1e-2 * fool.loss).backward()
            student_optimizer.step()
            student_optimizer.zero_grad()
        x = x.detach()  # the same sample, made before the update, as in DMD2
        real = MODES[torch.randint(8, (batch,))] + SPREAD * torch.randn(batch, 2)
        denoise = critic_loss(x, denoiser=critic)
        tell = gan.discriminator(x, None, real, None, discriminator=critic)
        (denoise.loss + 1e-2 * tell.loss).backward()
        critic_optimizer.step()
        critic_optimizer.zero_grad()
    # --8<-- [end:loop]
    return simulator.sample(student, torch.randn(2000, 2))


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in SETUPS]:
        sys.exit(f"usage: python examples/custom_loop.py {'|'.join(SETUPS)}")
    distance, mode = torch.cdist(distil(sys.argv[-1]), MODES).min(dim=1)
    hit = mode[distance < 3 * SPREAD].bincount(minlength=8)
    print(f"{hit.sum() / 20:.1f} % of samples in a mode; by mode: {hit.tolist()}")
