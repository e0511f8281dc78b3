"""What a script sees that has no import hook over dmdkit."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


@contextmanager
def as_in_a_script() -> Iterator[None]:
    """Sets the tests' own type checks aside, so that dmdkit's messages are seen."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
