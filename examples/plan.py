"""Plans a run before it is paid for: memory, FLOPs, communication, time and cost.

    python examples/plan.py sdxl --preset four-step --ranks 64 --strategy fsdp
    python examples/plan.py sdxl --preset four-step-lora --micro-batch-size 1

The first word is the recipe (imagenet_edm, sd15, sdxl), options are its own and those
below. The recipe's own networks, losses, backwards and updates run on tensors without
data, as the first of so many processes, and what they allocate, compute and send is
counted; nothing is downloaded, and no GPU is needed. Some minutes. Autocast is taken
to leave norms in fp32, as on GPUs; with `--device cpu` it is that of CPUs.

Counted are tensors. The text encoders and the VAE of a pipeline have a line of their
own, and what allocators, CUDA and NCCL take comes on top: leave a tenth of a GPU free.
FLOPs are those of products and convolutions, recomputed activations included.
"""

import gc
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import tyro
from distillation import Distillation
from planning import (
    CATEGORIES,
    GIB,
    Counter,
    FakeDDP,
    counted_resizes,
    fake_machine,
    gpu_autocast,
    gradients_counted,
)
from runs import parse
from text_models import parts_beside
from text_to_image import TextSettings
from tqdm import tqdm

from dmdkit import LPIPSDistance

Recipe = Literal["imagenet_edm", "sd15", "sdxl"]
PHASES = ("generate", "student_backward", "critic_backward", "update")


@dataclass(frozen=True)
class Settings:
    """Plans a run. The options of the recipe are given as well."""

    recipe: Annotated[Recipe, tyro.conf.Positional]
    """Whose run; `python examples/RECIPE.py --help` shows its options."""
    ranks: int = 1
    """Processes, with a device each."""
    ranks_per_machine: int = 8
    """Of them in one machine, for `--strategy hsdp`."""
    tflops: float = 150.0
    """What a device reaches, in 10^12 FLOPs a second: ImageNet-64's recipe had 143 on
    an H200, not compiled (docs/speed.md)."""
    bandwidth: float = 50.0
    """What a process can send to other machines, in GB a second: a 400 Gbit/s
    network."""
    local_bandwidth: float = 300.0
    """What it can send within its machine: NVLink."""
    price: float = 3.0
    """Of a device for an hour."""
    json: Path | None = None
    """File for the numbers."""
    plot: Path | None = None
    """File for a picture of the memory, .png."""

    def __post_init__(self) -> None:
        """Refuses what cannot be planned."""
        for name in ("ranks", "ranks_per_machine"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected >= 1.")
        for name in ("tflops", "bandwidth", "local_bandwidth", "price"):
            if not getattr(self, name) > 0:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected > 0.")

    def check(self, strategy: str) -> None:
        """Refuses numbers of processes that a strategy cannot have."""
        if self.ranks == 1 and strategy != "ddp":
            raise SystemExit(f"--strategy {strategy}: takes several; give --ranks.")
        several = self.ranks > self.ranks_per_machine
        if strategy == "hsdp" and several and self.ranks % self.ranks_per_machine:
            raise SystemExit(
                f"--ranks {self.ranks}: expected a multiple of --ranks-per-machine "
                f"{self.ranks_per_machine}, or another of these."
            )


@dataclass
class Phase:
    """What the calls of a phase took, one after the other."""

    flops: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    sent_far: list[float] = field(default_factory=list)
    peak: int = 0
    """Most bytes that were live in any of them."""

    def of_cycle(self, name: str, calls: int) -> float:
        """A count for so many calls in a row: the last may differ (DDP averages)."""
        values = getattr(self, name)
        return values[0] * (calls - 1) + values[-1]


@contextmanager
def phases_counted(run: Distillation, counter: Counter) -> Iterator[dict[str, Phase]]:
    """Counts the parts of an iteration by themselves."""
    phases = {name: Phase() for name in PHASES}

    def counted(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts, before = counter.counts(), counter.at_peak
            counter.restart()
            output = own(*args, **kwargs)
            phase = phases[name]
            for kind, count in counter.counts().items():
                getattr(phase, kind).append(count - counts[kind])
            phase.peak = max(phase.peak, counter.peak)
            if sum(before.values()) > counter.peak:
                counter.at_peak = before
            return output

        return call

    with ExitStack() as stack:
        for name in PHASES:
            owner = run if name == "update" else run.method
            own = counted(name, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, own))
        yield phases


def beside(settings: Any) -> int:
    """Bytes of a pipeline's text encoders and VAE, in fp32."""
    if not isinstance(settings, TextSettings):
        return 0
    return 4 * sum(parts_beside(settings.pretrained, settings.kind).values())


def planned(
    settings: Any, recipe: Any, given: Settings, *, on_gpu: bool = True
) -> dict[str, Any]:
    """Runs a recipe's iterations on fake tensors, and gives the numbers."""
    counter = Counter()
    with fake_machine(given.ranks, given.ranks_per_machine), ExitStack() as stack:
        bar = tqdm(total=4, desc="planning", unit="step", leave=False)
        stack.callback(bar.close)
        # Random weights do; what is in memory is the same.
        stack.enter_context(patch.object(LPIPSDistance, "_load_backbone", lambda *_: 0))
        if on_gpu:
            stack.enter_context(gpu_autocast())
        stack.enter_context(counted_resizes(counter))
        stack.enter_context(counter)
        bar.set_postfix_str("networks")
        try:
            run: Distillation = recipe.build(settings, 0, given.ranks)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        parts = run.parts
        run.parts = min(parts, 2)  # further ones repeat the first
        gc.collect()  # what building left behind in cycles
        counter.put_all("weights")
        trained = list(run.trained.values())
        for part in trained:
            if part.ema is not None:
                counter.put(list(part.ema.state_dict().values()), "optimizer")
            if isinstance(part.denoiser.network, FakeDDP):
                buckets = part.denoiser.network.buckets.values()
                counter.put(list(buckets), "gradients")
        parameters = [p for part in trained for p in part.denoiser.parameters()]
        stack.enter_context(gradients_counted(counter, parameters))
        # Drawn on the CPU, and read.
        stack.enter_context(patch.object(run, "draw_rung", lambda: 0))

        # The optimizers' moments exist from the first step on, and count in the next.
        for stage in ("first iteration", "iteration"):
            bar.update()
            bar.set_postfix_str(stage)
            with phases_counted(run, counter) as phases:
                counter.restart()
                run.iterate(0)
                peak, by_category = counter.peak, counter.at_peak
            for part in trained:
                counter.put(part.optimizer.state, "optimizer")
        bar.update()
        bar.set_postfix_str("generation")
        drawn, counted = _generation(run, counter), run.counts()
        bar.update()
    cycle = _cycle(settings, phases, drawn, parts)
    return {
        "recipe": given.recipe,
        "preset": settings.preset,
        "ranks": given.ranks,
        "strategy": settings.run.strategy if given.ranks > 1 else "one process",
        "batch_size": settings.batch_size,
        "preset_batch_size": recipe.PRESETS[settings.preset].batch_size,
        "micro_batch_size": run.size,
        "micro_batches": parts,
        "parameters": counted,
        "peak_gib_per_rank": peak / GIB,
        "by_category": {name: by_category[name] / GIB for name in CATEGORIES},
        "peak_gib_by_phase": {name: phases[name].peak / GIB for name in PHASES},
        "beside_gib": beside(settings) / GIB,
        **cycle,
        **_cost(settings, given, cycle),
    }


def _generation(run: Distillation, counter: Counter) -> dict[str, dict[str, float]]:
    """What samples without gradients take, and what every simulated call adds."""
    batch, taken = run.draw(), []
    for rung in range(min(2, len(run.method.simulator.times))):
        before = counter.counts()
        run.method.generate(run.networks, batch, rung, run.generator, train=False)
        taken.append({k: v - before[k] for k, v in counter.counts().items()})
    once = taken[0]
    return {"once": once, "more": {k: taken[-1][k] - once[k] for k in once}}


def _cycle(
    settings: Any,
    phases: dict[str, Phase],
    drawn: dict[str, dict[str, float]],
    parts: int,
) -> dict[str, Any]:
    """FLOPs and bytes of a process in a cycle: one student update and its critic's.

    Rungs are drawn uniformly: of n there are (n - 1) / 2 calls to simulate on average.
    """
    critics, rungs = settings.critic_steps, len(settings.times)
    has_critic = bool(phases["critic_backward"].flops)

    def total(name: str) -> dict[str, float]:
        simulated = parts * critics * (rungs - 1) / 2 * drawn["more"][name]
        alone = parts * (critics - 1) * drawn["once"][name]
        learnt = phases["critic_backward"].of_cycle(name, parts) if has_critic else 0.0
        return {
            "samples": phases["generate"].of_cycle(name, parts) + alone + simulated,
            "student": phases["student_backward"].of_cycle(name, parts),
            "critic": critics * learnt,
        }

    flops = total("flops")
    sent, far = (sum(total(name).values()) for name in ("sent", "sent_far"))
    return {
        "flops_per_cycle": sum(flops.values()),
        "flops_by_phase": flops,
        "communication_gib_per_cycle": sent / GIB,
        "communication_gib_between_machines": far / GIB,
    }


def _cost(settings: Any, given: Settings, cycle: dict[str, Any]) -> dict[str, Any]:
    """Time and price at the stated rates; computing and sending do not overlap."""
    computing = cycle["flops_per_cycle"] / (given.tflops * 1e12)
    far = cycle["communication_gib_between_machines"]
    near = cycle["communication_gib_per_cycle"] - far
    sending = GIB / 1e9 * (far / given.bandwidth + near / given.local_bandwidth)
    iteration = (computing + sending) / settings.critic_steps
    hours = iteration * settings.iterations / 3600
    return {
        "tflops": given.tflops,
        "bandwidth_gb_per_second": given.bandwidth,
        "local_bandwidth_gb_per_second": given.local_bandwidth,
        "seconds_computing_per_cycle": computing,
        "seconds_sending_per_cycle": sending,
        "seconds_per_iteration": iteration,
        "iterations": settings.iterations,
        "hours": hours,
        "cost": hours * given.ranks * given.price,
    }


def without_data(settings: Any) -> Any:
    """The settings of a run on random weights and data, on the CPU."""
    changes: dict[str, Any] = {
        "random_init": True,
        "run": replace(settings.run, device="cpu", workers=0, wandb=None),
        "start_from": None,
        "pairs": None,
        "lpips_weights": Path() if settings.regression else None,
    }
    if isinstance(settings, TextSettings):
        changes |= {"prompts": None, "latents": (), "released_prompts": False}
    else:
        changes |= {"images": None, "teacher": None}
    settings = replace(settings, **changes)
    settings.check()
    if settings.run.cpu_offload:
        raise SystemExit(
            "--cpu-offload: a plan counts one memory, not what waits in another; leave "
            "it out."
        )
    return settings


def show(plan: dict[str, Any], given: Settings) -> None:
    """Prints a plan as a table."""
    categories, phases = plan["by_category"], plan["peak_gib_by_phase"]
    print(
        f"{plan['recipe']} {plan['preset']}: {_where(plan)}, batch "
        f"{plan['batch_size']} = {given.ranks} x {plan['micro_batches']} x "
        f"{plan['micro_batch_size']}"
    )
    lines: list[tuple[str, str]] = [
        (f"parameters, {name}", f"{count / 1e6:,.1f} M")
        for name, count in plan["parameters"].items()
    ]
    lines += [("peak memory of a process", f"{plan['peak_gib_per_rank']:.2f} GiB")]
    lines += [(f"  {name}", f"{value:.2f} GiB") for name, value in categories.items()]
    lines += [
        (f"peak of {name}", f"{value:.2f} GiB")
        for name, value in phases.items()
        if value
    ]
    if plan["beside_gib"]:
        whole = plan["peak_gib_per_rank"] + plan["beside_gib"]
        lines += [
            ("text encoders and VAE beside", f"{plan['beside_gib']:.2f} GiB"),
            ("peak memory with them", f"{whole:.2f} GiB"),
        ]
    lines += [("FLOPs of a cycle, per process", f"{plan['flops_per_cycle']:.3g}")]
    lines += [
        (f"  {name}", f"{value:.3g}") for name, value in plan["flops_by_phase"].items()
    ]
    lines += [
        ("sent in a cycle", f"{plan['communication_gib_per_cycle']:.2f} GiB"),
        ("  between machines", f"{plan['communication_gib_between_machines']:.2f} GiB"),
        ("time of a cycle, computing", f"{plan['seconds_computing_per_cycle']:.3g} s"),
        ("  sending", f"{plan['seconds_sending_per_cycle']:.3g} s"),
        ("time of an iteration", f"{plan['seconds_per_iteration']:.3g} s"),
        (
            "whole run",
            f"{plan['iterations']:,} iterations, {plan['hours']:,.1f} h, "
            f"{plan['hours'] * given.ranks:,.0f} device-hours, "
            f"cost {plan['cost']:,.0f}",
        ),
    ]
    for name, value in lines:
        print(f"{name:<34}{value}")
    print(
        f"Time at {given.tflops:g} TFLOP/s a device, {given.bandwidth:g} GB/s between "
        f"machines and {given.local_bandwidth:g} within, computing and sending one "
        f"after the other; cost at {given.price:g} an hour."
    )
    own, usual = plan["batch_size"], plan["preset_batch_size"]
    if own != usual:
        print(
            f"Batch {own}, where {plan['preset']} has {usual}: the whole run, its time "
            f"and cost are of {own / usual:.3g} times as many samples as the recipe's."
        )


def _where(plan: dict[str, Any]) -> str:
    ranks = plan["ranks"]
    return "one process" if ranks == 1 else f"{ranks} processes, {plan['strategy']}"


def save_plot(plan: dict[str, Any], path: Path) -> None:
    """Draws the peak memory by category."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    left = 0.0
    bars = {**plan["by_category"], "text encoders, VAE": plan["beside_gib"]}
    for name, value in bars.items():
        if value:
            axis.barh(0, value, left=left, label=f"{name} {value:.1f}")
            left += value
    axis.set(
        xlabel="GiB of one process at the peak",
        yticks=[],
        title=f"{plan['recipe']} {plan['preset']}, {_where(plan)}, "
        f"{plan['micro_batch_size']} at once: {left:.1f} GiB",
    )
    figure.legend(ncols=3, fontsize=8, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(given: Settings, options: list[str]) -> dict[str, Any]:
    """Plans, prints, and writes what is asked for."""
    recipe = importlib.import_module(given.recipe)
    asked = parse(recipe.Settings, recipe.PRESETS, options)
    settings = without_data(asked)
    given.check(settings.run.strategy)
    on_gpu = asked.run.device != "cpu"
    plan = planned(settings, recipe, given, on_gpu=on_gpu)
    show(plan, given)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(plan, indent=2) + "\n")
    if given.plot is not None:
        save_plot(plan, given.plot)
    return plan


if __name__ == "__main__":
    main(*tyro.cli(Settings, return_unknown_args=True))
