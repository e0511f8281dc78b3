"""Model cards of students: how to draw from them, and whose terms they inherit."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Times: TypeAlias = Sequence[float | int]

_CARD = """---
library_name: diffusers
license: other
license_name: {licence}
base_model: {teacher}
tags: [dmdkit, DMD2, text-to-image]
---

# A {steps}-step {what} of {teacher}

Distilled with dmdkit by Improved Distribution Matching Distillation (DMD2,
arXiv:2405.14867). It is called at the times {times}, without guidance:

```python
{code}
```

| | |
|---|---|
{rows}

The weights inherit the terms of the teacher's: {licence}.
"""


def pipeline_card(
    pipeline: str,
    times: Times,
    own_times: bool,
    told: Mapping[str, Any],
) -> str:
    """The card of a student that is a whole pipeline.

    Args:
        pipeline: The class of diffusers that loads it.
        times: The student's times in falling order.
        own_times: Whether its scheduler comes to them by their number alone.
        told: What is known of it, "teacher" and "licence" among it.

    Returns:
        The card, in Markdown with a header of metadata.
    """
    code = f"""from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("this/folder")
{_draw(times, own_times, told)}"""
    return _card("student", times, code, told)


def lora_card(times: Times, own_times: bool, told: Mapping[str, Any]) -> str:
    """The card of a student that is an adapter.

    Args:
        times: The student's times in falling order.
        own_times: As for `pipeline_card`, with the scheduler that the card makes.
        told: What is known of it, "teacher" and "licence" among it.

    Returns:
        The card, in Markdown with a header of metadata.
    """
    code = f"""from diffusers import DiffusionPipeline, LCMScheduler

pipe = DiffusionPipeline.from_pretrained("{told["teacher"]}")
pipe.load_lora_weights("this/folder")
pipe.scheduler = LCMScheduler.from_config(
    pipe.scheduler.config, original_inference_steps={len(times)}
)
{_draw(times, own_times, told)}"""
    return _card("LoRA", times, code, told)


def _draw(times: Times, own_times: bool, told: Mapping[str, Any]) -> str:
    steps = [int(t) for t in times]
    if own_times:
        note, call = "", f"num_inference_steps={len(steps)}"
    else:
        note = "# diffusers warns of the first timestep; it is meant so.\n"
        call = f"timesteps={steps}"
    if size := told.get("resolution"):
        call += f", height={size}, width={size}"
    return f"""{note}image = pipe(
    "a photo of a cat", {call}, guidance_scale=0
).images[0]"""


def _card(what: str, times: Times, code: str, told: Mapping[str, Any]) -> str:
    return _CARD.format(
        what=what,
        steps=len(times),
        times=[int(t) for t in times],
        teacher=told["teacher"],
        licence=told["licence"],
        code=code,
        rows="\n".join(f"| {name} | {value} |" for name, value in told.items()),
    )
