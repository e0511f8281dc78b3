"""The cells of the study: what is trained, and which tables and figures show it."""

from dataclasses import dataclass, replace
from typing import Any

from study.families import FamilyName

GAN_WEIGHT = 3e-2
"""Of the generator's GAN loss, as in `examples/digits.py`."""
GUIDANCE = 2.0
"""Scale of the teacher's guidance in Table 4."""
REGRESSION_WEIGHT = 0.25
"""Of DMD's regression loss (DMD, section 4.3, where it is of LPIPS)."""
LEARNING_RATE = 5e-4
"""Of student and critic, chosen for the full method (`search.py`)."""


@dataclass(frozen=True)
class Cell:
    """One way to train a student; everything not named here is the same for all."""

    name: str
    tables: tuple[str, ...]
    """Where it is shown: "1", "3", "4" are the paper's tables, "8" and "9" its
    figures, "B" its appendix, "steps", "families" and "shared" are ours."""
    critic_steps: int = 5
    """Critic updates to one generator update."""
    distribution_matching: bool = True
    regression_weight: float = 0.0
    """Of DMD's regression loss on the teacher's pairs; 0 is none."""
    gan_weight: float = GAN_WEIGHT
    """0 is no GAN, and no discriminator."""
    learning_rate: float = LEARNING_RATE
    """The student's."""
    critic_rate: float = 1.0
    """The critic's learning rate in the student's."""
    steps: int = 1
    """Calls of the student to one sample."""
    backward_simulation: bool = True
    """Else inputs are real data with noise."""
    guidance: float = 1.0
    family: FamilyName = "edm"
    shared_critic_pass: bool = False
    """Whether denoising and discriminator read one pass of the critic."""
    shared_generator_pass: bool = False
    """Whether distribution matching and the GAN read one pass of the critic."""
    pretraining: float = 0.0
    """Budgets of training without the GAN beforehand, at the full learning rate; the
    GAN's stage then has a quarter of it."""
    budgets: float = 1.0
    """Critic updates, in budgets, of the last stage."""

    @property
    def table(self) -> str:
        """The tables in one word, as the results have them."""
        return "+".join(self.tables)

    @property
    def has_curve(self) -> bool:
        """Whether a figure shows how it went, not only how it ended."""
        return bool({"8", "9"} & set(self.tables))


def _cells() -> tuple[Cell, ...]:
    ttur = Cell("ttur", ("3", "8", "9", "B"), gan_weight=0.0)
    alone = Cell("gan-alone", ("3",), critic_steps=1, distribution_matching=False)
    four = Cell("four-step", ("4",), steps=4, guidance=GUIDANCE)
    no_dm = replace(four, name="four-step-no-dm", distribution_matching=False)
    slow: dict[str, Any] = {"tables": ("3",), "learning_rate": 2e-5}
    slower: dict[str, Any] = {**slow, "learning_rate": 4e-6}
    naive = replace(ttur, name="no-regression", tables=("3", "8", "9"), critic_steps=1)
    dmd = replace(
        naive, name="dmd", tables=("3", "9"), regression_weight=REGRESSION_WEIGHT
    )
    return (
        Cell("dmd2", ("1", "3", "B", "steps", "families", "shared")),
        naive,
        ttur,
        dmd,
        alone,
        replace(alone, name="gan-ttur", critic_steps=5),
        replace(naive, name="no-regression-tuned", **slow),
        replace(dmd, name="dmd-tuned", **slow),
        replace(alone, name="gan-alone-tuned", **slower),
        replace(alone, name="gan-ttur-tuned", critic_steps=5, **slow),
        four,
        replace(four, name="four-step-no-gan", gan_weight=0.0),
        no_dm,
        replace(no_dm, name="four-step-no-dm-tuned", learning_rate=4e-6),
        replace(four, name="four-step-no-simulation", backward_simulation=False),
        Cell("dmd2-longer", ("1",), pretraining=2.0, budgets=0.75),
        replace(ttur, name="ratio-10", tables=("8", "9"), critic_steps=10),
        replace(
            ttur,
            name="asynchronous",
            tables=("8", "9"),
            critic_steps=1,
            critic_rate=5.0,
        ),
        Cell("vp", ("families",), family="vp"),
        Cell("flow", ("families",), family="flow"),
        *(Cell(f"steps-{n}", ("steps",), steps=n) for n in (2, 4, 8)),
        *(
            Cell(f"gan-weight-{weight:g}", ("B",), gan_weight=weight)
            for weight in (3e-3, 1e-2, 1e-1, 3e-1)
        ),
        Cell("shared-critic-pass", ("shared",), shared_critic_pass=True),
        Cell(
            "shared-both-passes",
            ("shared",),
            shared_critic_pass=True,
            shared_generator_pass=True,
        ),
    )


CELLS = {cell.name: cell for cell in _cells()}
SEEDS = {"digits": 5, "fashion": 3}
"""Training seeds of a cell, from 1."""
FASHION = (
    "dmd2",
    "dmd2-longer",
    "ttur",
    "dmd-tuned",
    "no-regression-tuned",
    "gan-alone-tuned",
    "gan-ttur-tuned",
)
"""What Fashion-MNIST is trained for: Tables 1 and 3, each cell at its best rate."""


def cells_of(data: str) -> tuple[Cell, ...]:
    """The cells that a data set has, in the order in which they are run."""
    if data == "digits":
        return tuple(CELLS.values())
    return tuple(CELLS[name] for name in FASHION)
