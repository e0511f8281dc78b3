"""Runs killed at random moments, in short; `faults/kill.py` is the long form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parent / "faults" / "kill.py"


def killed(*options: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(KILL), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_killed_run_loses_nothing() -> None:
    assert killed("--runs", "3") == {"runs": 3, "resumed": 3, "lost": 0}


@pytest.mark.slow
@pytest.mark.parametrize(("safeguard", "runs"), [("rename", 10), ("rng", 15)])
def test_without_a_safeguard_something_is_lost(safeguard: str, runs: int) -> None:
    # Of ten runs six and three were lost; the chance of none is below 1 %.
    assert killed("--runs", f"{runs}", "--break", safeguard)["lost"] > 0
