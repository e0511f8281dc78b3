"""Learning rate warm-up, counted in an optimizer's own steps."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_warmup(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Raises the learning rate linearly to its full value, then keeps it.

    Call `.step()` on the schedule after each step of this optimizer, so that the
    generator's warm-up is counted in generator steps. (Official DMD2 counts every
    iteration, times the number of processes: its 500 are about 14 generator steps on 7
    GPUs, and its first generator step has rate 0.)

    Args:
        optimizer: The optimizer.
        steps: Its step n of the first `steps` has n / steps of the full rate; 0 is no
            warm-up.

    Returns:
        The schedule.

    Raises:
        ValueError: If `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"steps: got {steps}, expected >= 0.")
    return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / max(steps, 1)))
