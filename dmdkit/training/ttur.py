"""The two time-scale update rule (DMD2, section 4.2), a pure function of the step."""

from dataclasses import dataclass
from typing import NamedTuple


class TTURCounts(NamedTuple):
    """What has happened before a step.

    Attributes:
        cycles: Whole cycles of `critic_steps` iterations.
        generator_updates: Updates of the generator (the student).
        critic_updates: Updates of the critic. What the paper calls iterations.
    """

    cycles: int
    generator_updates: int
    critic_updates: int


@dataclass(frozen=True)
class TTURScheduler:
    """Says whose turn it is at a step.

    Official DMD2 (section 4.2: "5 fake score updates per generator update") updates the
    critic at every iteration and the generator at every fifth, the first included, both
    on the same samples: 5 critic updates to 1. FastGen and others skip the critic on
    the generator's turn, so that their 5 means 4 to 1:
    `critic_on_generator_turn=False`.

    The schedule has no state: a resumed run asks it about its own step. With gradient
    accumulation a step is one optimizer step, whatever the number of micro-batches.

    Attributes:
        critic_steps: Iterations to one generator update, at least 1: 5 for ImageNet-64
            and SDXL, 10 for SD1.5, 1 for alternating updates.
        critic_on_generator_turn: Whether the critic is also updated on the generator's
            turn.

    Examples:
        >>> ttur = TTURScheduler(critic_steps=5)
        >>> [step for step in range(11) if ttur.generator_turn(step)]
        [0, 5, 10]
        >>> ttur.counts(10)
        TTURCounts(cycles=2, generator_updates=2, critic_updates=10)
    """

    critic_steps: int = 5
    critic_on_generator_turn: bool = True

    def __post_init__(self) -> None:
        """Checks the ratio."""
        least = 1 if self.critic_on_generator_turn else 2
        if isinstance(self.critic_steps, bool) or not isinstance(
            self.critic_steps, int
        ):
            raise TypeError(
                f"critic_steps: got {self.critic_steps!r}, expected a whole number."
            )
        if self.critic_steps < least:
            raise ValueError(
                f"critic_steps: got {self.critic_steps}, expected at least {least}; "
                "below that the critic would never be updated."
            )

    def generator_turn(self, step: int) -> bool:
        """Whether the generator is updated at a step.

        Args:
            step: The step, counted from 0.

        Returns:
            True on its turn.
        """
        return step % self.critic_steps == 0

    def critic_turn(self, step: int) -> bool:
        """Whether the critic is updated at a step.

        Args:
            step: The step, counted from 0.

        Returns:
            True on its turn.
        """
        return self.critic_on_generator_turn or not self.generator_turn(step)

    def counts(self, step: int) -> TTURCounts:
        """Counts the updates made before a step.

        Args:
            step: The step, which is also the number of iterations made, >= 0.

        Returns:
            The counts.

        Raises:
            ValueError: If `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step: got {step}, expected >= 0.")
        generator = -(-step // self.critic_steps)
        critic = step if self.critic_on_generator_turn else step - generator
        return TTURCounts(step // self.critic_steps, generator, critic)
