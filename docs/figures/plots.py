"""Draws the pictures of the concept pages that are computed: scores, processes, toys."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from drawing import ASSETS, BLUE, GREEN, ORANGE, RED
from matplotlib.figure import Figure
from torch import Tensor

import dmdkit as dmd

PLACEHOLDER = "#010203"
"""Becomes `currentColor`, that of the page's text."""

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
        ),
        PLACEHOLDER,
    ),
}


def save(figure: Figure, name: str, says: str) -> None:
    """Writes an SVG without ground whose neutral lines take the page's colour."""
    path: Path = ASSETS / f"{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = path.read_text()
    svg = svg[svg.index("<svg") :].replace(PLACEHOLDER, "currentColor")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{says}"', 1)
    # Blank lines would end the HTML block in the page.
    path.write_text(
        "\n".join(line.rstrip() for line in svg.splitlines() if line.strip())
    )


@dataclass(frozen=True)
class Mixture:
    """The exact denoiser of a mixture of equal Gaussians, [k, d]."""

    means: Tensor
    spread: float
    process: dmd.NoiseProcess

    def __call__(self, x_t: Tensor, t: Tensor, cond: None = None) -> Tensor:
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        variance = (alpha * self.spread) ** 2 + sigma**2
        offset = x_t[:, None] - alpha[..., None] * self.means
        share = (-offset.square().sum(2) / (2 * variance)).softmax(1)[..., None]
        means = self.means + (alpha * self.spread**2 / variance)[..., None] * offset
        return (share * means).sum(1)

    def density(self, x: Tensor, sigma: float) -> Tensor:
        """Of noisy samples on a line, [n]."""
        spread = (self.spread**2 + sigma**2) ** 0.5
        z = (x[:, None] - self.means[:, 0]) / spread
        return (-z.square() / 2).exp().mean(1) / (spread * (2 * torch.pi) ** 0.5)


def scores() -> None:
    """The score's arrows at two noise levels, and one estimate at each."""
    means = torch.tensor([[-1.4, -0.8], [1.4, -0.8], [0.0, 1.5]])
    data = Mixture(means, 0.15, dmd.VarianceExploding())
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(3, (60,), generator=generator)
    samples = means[which] + 0.15 * torch.randn(60, 2, generator=generator)
    axis = torch.linspace(-3, 3, 13)
    grid = torch.cartesian_prod(axis, axis)
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.5))
    for panel, sigma in zip(panels, (0.6, 2.0), strict=True):
        times = torch.full((len(grid),), sigma)
        score = (data(grid, times) - grid) / sigma**2  # Eq. 1 with alpha = 1
        unit = score / score.norm(dim=1, keepdim=True)
        panel.quiver(*grid.T, *unit.T, color=BLUE, alpha=0.65, scale=21, width=0.006)
        panel.scatter(*samples.T, s=8, color=ORANGE, label="data", zorder=2)
        x_t = torch.tensor([[2.6, 0.6]])
        mean = data(x_t, torch.tensor([sigma]))
        panel.annotate(
            "",
            mean[0].tolist(),
            x_t[0].tolist(),
            arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 2},
        )
        panel.scatter(
            *x_t.T, s=30, color=RED, zorder=4, label="$x_t$, and its mean clean sample"
        )
        panel.set(title=f"noise of {sigma}", aspect="equal")
        panel.axis("off")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    save(
        figure,
        "scores",
        "Arrows of the score at two noise levels around data in three clusters. With "
        "little noise they point to the nearest cluster, with much to the middle of all. "
        "A red arrow goes from one noisy point to its estimate.",
    )


def processes() -> None:
    """Alpha and sigma over time in each process's own units."""
    figure, panels = plt.subplots(1, 3, figsize=(7.2, 2.7))
    cases = (
        (
            dmd.VarianceExploding(),
            torch.logspace(-2.7, 1.9, 200),
            "VarianceExploding",
            "t is sigma",
        ),
        (
            dmd.DiscreteVariancePreserving.scaled_linear(),
            torch.arange(1000).float(),
            "DiscreteVariancePreserving",
            "t is the index",
        ),
        (
            dmd.RectifiedFlow(),
            torch.linspace(0, 1, 200),
            "RectifiedFlow",
            "t in [0, 1]",
        ),
    )
    for panel, (process, t, title, label) in zip(panels, cases, strict=True):
        panel.plot(t, process.alpha(t), color=ORANGE, label="alpha, of the sample")
        panel.plot(t, process.sigma(t), color=BLUE, label="sigma, of the noise")
        panel.set(xlabel=label)
        panel.set_title(title, fontsize=9)
    panels[0].set(xscale="log", yscale="log")
    panels[1].scatter(
        [999, 749, 499, 249],
        dmd.DiscreteVariancePreserving.scaled_linear().sigma(
            torch.tensor([999.0, 749.0, 499.0, 249.0])
        ),
        color=RED,
        s=18,
        zorder=3,
        label="times of a four-step student",
    )
    figure.legend(
        *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    save(
        figure,
        "processes",
        "Alpha and sigma over time for three noise processes: with variance exploding "
        "alpha stays one and sigma grows to 80; variance preserving and rectified flow "
        "go from the sample alone to nearly, or exactly, noise alone.",
    )


def matching() -> None:
    """Which way the gradient pushes generated samples, at little and at much noise."""
    process = dmd.VarianceExploding()
    real = Mixture(torch.tensor([[-2.0], [2.0]]), 0.3, process)
    fake = Mixture(torch.tensor([[0.6]]), 0.5, process)
    line = torch.linspace(-6, 6, 400)
    at = torch.linspace(-2.7, 3.3, 9)[:, None]
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.1))
    for panel, sigma in zip(panels, (0.3, 1.5), strict=True):
        panel.plot(line, real.density(line, sigma), color=ORANGE, label="real, noisy")
        panel.plot(line, fake.density(line, sigma), color=BLUE, label="fake, noisy")
        t = torch.full((len(at),), sigma)
        push = (real(at, t) - fake(at, t))[:, 0]
        top = float(panel.get_ylim()[1])
        y = torch.full((len(at),), -0.12 * top)
        panel.quiver(
            at[:, 0], y, 0.6 * push, 0 * push, color=RED, angles="xy", scale_units="xy",
            scale=1, width=0.009, headwidth=4,
        )  # fmt: skip
        panel.axhline(0, color=PLACEHOLDER, lw=0.8)
        panel.set(
            title=f"noise of {sigma}", yticks=[], ylim=(-0.2 * top, top), xlim=(-6, 6)
        )
        panel.spines["left"].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    save(
        figure,
        "matching",
        "Densities of noisy real samples with two modes and of noisy generated samples "
        "between them, and arrows of the teacher's estimate minus the critic's. They "
        "push generated samples out towards both modes.",
    )


@dataclass
class Spot:
    """The exact denoiser of Gaussian data around `mean` with unit spread."""

    mean: Tensor
    process = dmd.VarianceExploding()

    def __call__(self, x_t: Tensor, t: Tensor, cond: None = None) -> Tensor:
        return self.mean + (x_t - self.mean) / (1 + t[:, None] ** 2)


def chase(critic_steps: int, iterations: int = 600, seed: int = 0) -> list[float]:
    """The student's place over training: it adds one number to its noise."""
    torch.manual_seed(seed)
    shift = torch.nn.Parameter(torch.zeros(()))
    guess = torch.nn.Parameter(torch.zeros(()))
    real, fake = Spot(torch.tensor(2.0)), Spot(guess)
    times = dmd.UniformTime(0.1, 5)
    dm_loss, critic_loss = dmd.DistributionMatchingLoss(times), dmd.DenoisingLoss(times)
    ttur = dmd.TTURScheduler(critic_steps)
    student_optimizer = torch.optim.AdamW([shift], lr=0.1)
    critic_optimizer = torch.optim.AdamW([guess], lr=0.1)
    path = []
    for step in range(iterations):
        x = shift + torch.randn(16, 1)
        if ttur.generator_turn(step):
            dm_loss(x, real=real, fake=fake).loss.backward()
            student_optimizer.step()
            student_optimizer.zero_grad()
        critic_loss(x.detach(), denoiser=fake).loss.backward()
        critic_optimizer.step()
        critic_optimizer.zero_grad()
        path.append(shift.item())
    return path


def two_time_scales() -> None:
    """A student of one number, with a critic of one number, at three ratios."""
    figure, panels = plt.subplots(1, 3, figsize=(7.2, 2.8), sharey=True)
    cases = ((1, RED), (5, GREEN), (10, ORANGE))
    for panel, (steps, colour) in zip(panels, cases, strict=True):
        for seed in range(5):
            panel.plot(chase(steps, seed=seed), color=colour, lw=1, alpha=0.8)
        panel.axhline(2, color=PLACEHOLDER, ls=":", lw=1)
        panel.set(title=f"{steps} : 1", xlabel="critic updates")
    panels[0].set(ylabel="mean of the samples")
    save(
        figure,
        "time-scales",
        "The mean of a student's samples over iterations, five seeds at each of three "
        "ratios. At one to one it swings widely around the goal, at five to one less, "
        "at ten to one least, but it arrives later.",
    )


def main() -> None:
    """Draws all."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({**STYLE, "svg.hashsalt": "dmdkit"}):
        for draw in (scores, processes, matching, two_time_scales):
            draw()


if __name__ == "__main__":
    main()
