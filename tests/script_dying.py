"""The SDXL recipe, of which rank 1 is killed once, amid its fourth iteration.

The first argument is a file that says that it has died; the others are the recipe's.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import sdxl
from runs import parse
from text_to_image import TextDistillation

MARKER = Path(sys.argv.pop(1))
iterate = TextDistillation.iterate


def dies(self: TextDistillation, step: int) -> Any:
    if self.rank == 1 and step == 3 and not MARKER.exists():
        MARKER.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return iterate(self, step)


if __name__ == "__main__":
    recipe: Any = TextDistillation
    recipe.iterate = dies
    sdxl.main(parse(sdxl.Settings, sdxl.PRESETS))
