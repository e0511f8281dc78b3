"""What a TTUR cycle costs beside its passes, and how many passes it makes.

    python tests/benchmarks/cycle.py --json cycle.json
    python tests/benchmarks/cycle.py --json cycle.json --networks edm-16 sdxl-like
    python tests/benchmarks/cycle.py --json gpu.json --device cuda

A cycle is five iterations of a recipe, with GAN: five updates of the critic, one of the
student. In one process iterations of several kinds take turns on the same networks: the
recipe's own, those with shared passes, and for each of these the bare passes: the same
forwards and backwards of the networks and the same optimizer steps (clipping and
zeroing included), with nothing in between. Weights are random.

On a CPU: small networks in fp32 without gradient checkpointing, and the CPU time of one
thread. On a GPU: the recipes' networks at their full size, in bf16, checkpointed as
their presets are, and the GPU's time between events; an iteration begins when the GPU
is idle, and what it waits for the host counts.

For each network the file has

- `overhead_ratio`: time of the recipe's cycle over that of its bare passes, and
  `overhead_quartiles`, between which half of the rounds were;
- `beside_ratio`: time of the recipe's cycle over that of the calls of networks, the
  backwards and the optimizer steps within it. Both are of one run, so that a noisy
  machine matters little; it does not see passes that are made in vain, and the losses'
  own backward, which is small, counts as a pass;
- `operations_beside`: how many operations PyTorch makes in an iteration outside of
  those, views included: each is at most a launch on a GPU;
- `shared_ratio`: time of a cycle with both shared passes over the default's, and
  `shared_passes_ratio`, the same of the bare passes; `shared_excess`: the one over
  that of the passes within it; `shared_critic_...`: with the critic's alone;
- `allocated_gib` (GPU): most memory of tensors in an iteration, weights and moments
  included;
- `passes`: forwards and backwards of encoder and decoder in a cycle, in batches,
  counted by hooks, beside those of the official loop, counted from its source;
- `peak_bytes` (CPU): the most bytes of tensors beside weights and moments in each
  phase, and a lower `bound`: what autograd keeps for a backward when that begins, or
  all gradients when it ends, whichever is more. The critic's losses have a backward
  each, unless they share a pass.

Ratios are medians of the rounds' own; seconds are medians.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples")]

import imagenet_edm  # noqa: E402
import sd15  # noqa: E402
import sdxl  # noqa: E402
import torch  # noqa: E402
from diffusers.models.unets.unet_2d import UNet2DModel  # noqa: E402
from distillation import Distillation, RunSettings  # noqa: E402
from plan import phases_counted  # noqa: E402
from planning import Counter  # noqa: E402
from text_to_image import TextDistillation  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dmdkit import (  # noqa: E402
    ClassifierFreeGuidance,
    concatenate_conditions,
    frozen,
)
from dmdkit.adapters.diffusers import UNetNetwork  # noqa: E402
from dmdkit.adapters.edm import edm_denoiser, imagenet64_unet  # noqa: E402
from dmdkit.adapters.edm_unet import adm_config  # noqa: E402
from dmdkit.adapters.folders import save_denoiser  # noqa: E402

CRITIC_STEPS = 5
RUNGS = (1, 3, 0, 2, 2)
"""Of the iterations of a cycle, where there are four: 1.6 simulated calls on average,
against 1.5 of uniform draws."""
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "shared_critic": {"shared_critic_pass": True},
    "shared": {"shared_critic_pass": True, "shared_generator_pass": True},
}
TEXT_UNETS: dict[str, dict[str, Any]] = {
    "sd15-like": {
        "sample_size": 32,
        "block_out_channels": (32, 64, 128, 128),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": 128,
        "attention_head_dim": 4,
    },
    "sdxl-like": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "cross_attention_dim": 256,
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 320,
    },
}
"""SD1.5 and SDXL with a tenth of their channels, on smaller latents."""
ADMS: dict[str, dict[str, Any]] = {
    "edm-16": {"widths": (128, 256), "blocks": 2, "attends": (False, True)},
    "adm-163m-16": {
        "widths": (192, 384, 576, 768),
        "blocks": 1,
        "attends": (False, True, True, True),
    },
    "imagenet64-16": {},
}
"""EDM's networks on images of 16 pixels: a small one; that of ImageNet-64 at its full
width with a block a level in place of three, 163 M parameters; that of ImageNet-64, 296
M, which takes 10.5 GiB."""
BATCH = {
    "edm-16": 4,
    "sd15-like": 2,
    "sdxl-like": 2,
    "adm-163m-16": 4,
    "imagenet64-16": 4,
}
FULL_SIZE: dict[str, tuple[Any, str, int]] = {
    "imagenet64": (imagenet_edm, "standard", 40),
    "sd15": (sd15, "stage2", 32),
    "sdxl": (sdxl, "four-step", 2),
}
"""Recipe, preset and batch on a GPU; one of 80 GB is too small for sdxl."""


def build_full_size(name: str, folder: Path) -> Distillation:
    """A recipe as its preset is, on a GPU, with random weights."""
    recipe, preset, batch = FULL_SIZE[name]
    settings = replace(
        recipe.PRESETS[preset],
        random_init=True,
        batch_size=batch,
        micro_batch_size=batch,
        critic_steps=CRITIC_STEPS,
        gan=True,
        run=RunSettings(folder, device="cuda", workers=0),
    )
    return recipe.build(settings, 0, 1)


def build(name: str, folder: Path) -> Distillation:
    """A recipe on a network, its data drawn at random."""
    if name in FULL_SIZE:
        return build_full_size(name, folder)
    common: dict[str, Any] = {
        "batch_size": BATCH[name],
        "micro_batch_size": BATCH[name],
        "critic_steps": CRITIC_STEPS,
        "gan": True,
        "precision": "fp32",
        "run": RunSettings(folder, device="cpu", workers=0),
    }
    if name in TEXT_UNETS:
        recipe, preset = (
            (sdxl, "four-step") if name == "sdxl-like" else (sd15, "stage1")
        )
        settings = replace(
            recipe.PRESETS[preset],
            random_init=True,
            gradient_checkpointing=False,
            **common,
        )
        return TextDistillation(settings, TEXT_UNETS[name])
    torch.manual_seed(0)
    if shape := ADMS[name]:
        more: dict[str, Any] = {"resolution": 16, "channels": 3, "classes": 1000}
        unet = UNet2DModel(**adm_config(**shape, **more))
    else:
        unet = imagenet64_unet()
        unet.register_to_config(sample_size=16)
    save_denoiser(folder / name, edm_denoiser(unet))
    settings = imagenet_edm.Settings(teacher=folder / name, **common)
    return imagenet_edm.ImageNetDistillation(settings)


class Stopwatch:
    """Seconds between two moments: a thread's of the CPU, or the GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def moment(self) -> Any:
        """Now."""
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """The seconds; waits for the GPU."""
        if not self.on_gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


class Bench:
    """A recipe's run, whose cycles can be made as they are, or bare."""

    def __init__(self, run: Distillation) -> None:
        self.run, settings = run, cast(Any, run.settings)
        teacher, student, critic = run.networks
        self.guided = isinstance(teacher, ClassifierFreeGuidance)
        denoiser = teacher.denoiser if self.guided else teacher
        self.teacher, self.student = denoiser.network, student.network
        self.critic = critic.network
        more = []
        if isinstance(run, imagenet_edm.ImageNetDistillation):
            more = [denoiser.parameterization.sigma_data]
        self.methods = {
            name: type(run.method)(replace(settings, **changes), *more)
            for name, changes in MODES.items()
        }
        several = len(settings.times) > 1
        self.rungs = RUNGS if several else (0,) * CRITIC_STEPS
        batch: Any = run.draw()
        t = torch.full((len(batch.noise),), 0.5, device=run.device)
        if isinstance(run, imagenet_edm.ImageNetDistillation):
            self.fake = batch.noise, t, batch.labels
            self.real = batch.images, t, batch.image_labels
        else:
            self.fake = batch.noise, t, batch.cond
            self.real = batch.latents, t, batch.latent_cond
        self.both = (
            torch.cat((self.fake[0], self.real[0])),
            torch.cat((t, t)),
            concatenate_conditions(self.fake[2], self.real[2]),
        )
        self.watch = Stopwatch(run.device)
        self.parts: list[tuple[str, Any, Any]] = []
        """Of the last iteration: its name, begin and end."""
        self.within = 0
        """How many of the calls that count as passes are going on."""

    def iteration(self, mode: str, step: int) -> float:
        """Seconds of an iteration of the recipe; those of its parts are noted."""
        self.run.method = self.methods[mode]
        self.parts.clear()
        with (
            patch.object(self.run, "draw_rung", lambda: self.rungs[step]),
            self.parts_timed(),
        ):
            start = self.watch.moment()
            self.run.iterate(step)
            return self.watch.between(start, self.watch.moment())

    def seconds(self) -> dict[str, float]:
        """Those of the parts of the last iteration."""
        found: dict[str, float] = {}
        for name, begin, end in self.parts:
            found[name] = found.get(name, 0) + self.watch.between(begin, end)
        return found

    @contextmanager
    def parts_timed(self) -> Iterator[None]:
        """Within it calls of networks, backwards and optimizer steps are timed."""

        def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                self.within += 1
                with self.timed(name):
                    answer = call(*args, **kwargs)
                self.within -= 1
                return answer

            return run

        parts: list[tuple[Any, str, str]] = [
            (network, "forward", "forwards")
            for network in (self.teacher, self.student, self.critic)
        ]
        parts += [(Tensor, "backward", "backwards")]
        for trained in self.run.trained.values():
            parts += [(trained, name, "optimizers") for name in ("clip", "step")]
        with ExitStack() as stack:
            for owner, name, kind in parts:
                call = timed(kind, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, call))
            yield

    def operations_beside(self, step: int) -> int:
        """Operations of an iteration outside of networks, backwards and optimizers."""
        with CountBeside(self) as counted:
            self.iteration("default", step)
        return counted.operations

    def bare_iteration(self, mode: str, step: int) -> float:
        """Seconds of its passes and optimizer steps alone."""
        shares, trained = MODES[mode], self.run.trained
        turn = self.run.ttur.generator_turn(step)
        self.parts.clear()
        with self.timed("samples"):
            x = self.sample(self.rungs[step], train=turn)
        if turn:
            with frozen(self.critic), self.timed("student"):
                self.of_student(x, "shared_generator_pass" in shares).backward()
            with self.timed("optimizers"):
                trained["student"].clip()
                trained["student"].step()
        with self.timed("critic"):
            for loss in self.of_critic("shared_critic_pass" in shares):
                loss().backward()
        with self.timed("optimizers"):
            trained["critic"].clip()
            trained["critic"].step()
        return sum(self.seconds().values())

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes what is within it as a part."""
        start = self.watch.moment()
        yield
        self.parts.append((name, start, self.watch.moment()))

    def autocast(self) -> torch.autocast:
        """In the recipe's precision."""
        return self.run.method.autocast(self.run.device)

    def sample(self, rung: int, *, train: bool) -> Tensor:
        """The student's passes of an iteration."""
        with self.autocast(), torch.no_grad():
            for _ in range(rung):
                self.student(*self.fake)
        with self.autocast(), torch.set_grad_enabled(train):
            return self.student(*self.fake)

    def of_student(self, x: Tensor, shared: bool) -> Tensor:
        """The passes of the student's losses, as one number to backpropagate."""
        _, t, cond = self.fake
        with self.autocast(), torch.no_grad():
            for _ in range(2 if self.guided else 1):
                self.teacher(x, t, cond)
            if not shared:
                self.critic(x, t, cond)
        wanted: dict[str, Any] = {"want": ("logits",)}
        if shared:
            wanted = {"want": ("output", "logits"), "output_grad": False}
        with self.autocast():
            return self.critic(x, t, cond, **wanted).logits.mean()

    def of_critic(self, shared: bool) -> list[Callable[[], Tensor]]:
        """The passes of the critic's losses, as numbers to backpropagate in turn."""

        def both() -> Tensor:
            wanted: dict[str, Any] = {"want": ("output", "logits")}
            with self.autocast():
                given = self.critic(*self.both, **wanted, outputs=len(self.fake[0]))
            return given.output.mean() + given.logits.mean()

        def tell() -> Tensor:
            with self.autocast():
                fake, real = (
                    self.critic(*given, want=("logits",)).logits.mean()
                    for given in (self.fake, self.real)
                )
            return fake + real

        def denoise() -> Tensor:
            with self.autocast():
                return self.critic(*self.fake).mean()

        return [both] if shared else [tell, denoise]

    def passes(self, mode: str) -> dict[str, float]:
        """Counts what encoders and decoders do in the recipe's own cycle."""
        found: dict[str, float] = dict.fromkeys(self.official_passes(), 0)
        size = self.run.settings.batch_size

        def count(part: str) -> Callable[..., None]:
            def add(name: str, share: float) -> None:
                found[f"{part}_{name}"] += share

            def hook(_: nn.Module, __: Any, output: Any) -> None:
                h = output if isinstance(output, Tensor) else output[0]
                share = len(h) / size
                add("forwards", share)
                if h.requires_grad:
                    h.register_hook(lambda _: add("backwards", share))

            return hook

        with ExitStack() as stack:
            for network in (self.teacher, self.student, self.critic):
                modules = network.modules()
                unet: Any = next(m for m in modules if isinstance(m, UNetNetwork)).unet
                for part, block in (
                    ("encoder", unet.down_blocks[0]),
                    ("decoder", unet.up_blocks[-1]),
                ):
                    handle = block.register_forward_hook(count(part))
                    stack.callback(handle.remove)
            for step in range(CRITIC_STEPS):
                self.iteration(mode, step)
        return found

    def official_passes(self) -> dict[str, float]:
        """The same in official DMD2 (main/edm/train_edm.py, main/train_sd.py).

        One sample an iteration, with a graph on the student's turn; teacher and critic
        for distribution matching; the critic's encoder for the student's GAN loss; and
        for every update of the critic a pass to denoise and two of its encoder to
        classify.
        """
        critics, guided = CRITIC_STEPS, 2 if self.guided else 1
        whole = critics + sum(self.rungs) + guided + 1 + critics
        return {
            "encoder_forwards": whole + 1 + 2 * critics,
            "decoder_forwards": whole,
            "encoder_backwards": 1 + 1 + 3 * critics,
            "decoder_backwards": 1 + critics,
        }

    def allocated(self, mode: str) -> float:
        """GiB of the GPU that tensors take in an iteration at most."""
        torch.cuda.reset_peak_memory_stats()
        self.iteration(mode, 0)
        return torch.cuda.max_memory_allocated() / 2**30

    def peaks(self, mode: str) -> dict[str, dict[str, int]]:
        """Most bytes of tensors beside weights and moments, by phase, and the bound."""
        counter, trained = Counter(), self.run.trained.values()
        self.run.method = self.methods[mode]
        with counter, phases_counted(self.run, counter) as phases:
            counter.put(list(self.teacher.parameters()), "weights")
            for part in trained:
                counter.put(list(part.denoiser.parameters()), "weights")
                counter.put(part.optimizer.state, "optimizer")
            kept = sum(counter.live.values())
            with patch.object(self.run, "draw_rung", lambda: self.rungs[0]):
                self.run.iterate(0)
        shares = MODES[mode]
        x, student = saved(self.student, lambda: self.sample(0, train=True))
        with frozen(self.critic):
            given, shared = x.detach().requires_grad_(), "shared_generator_pass"
            _, gan = saved(
                self.critic, lambda: self.of_student(given, shared in shares)
            )
        terms = self.of_critic("shared_critic_pass" in shares)
        critic = max(saved(self.critic, term)[1] for term in terms)
        gradients = {
            name: sum(4 * p.numel() for p in part.denoiser.parameters())
            for name, part in self.run.trained.items()
        }
        bounds = {
            "generate": student,
            "student_backward": max(student + gan, gradients["student"]),
            "critic_backward": max(critic, gradients["critic"]),
        }
        return {
            name: {"peak": phases[name].peak - kept, "bound": bound}
            for name, bound in bounds.items()
        }


class CountBeside(TorchDispatchMode):
    """Counts operations that are no part of a pass."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench, self.operations = bench, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.bench.within:
            self.operations += 1
        return func(*args, **(kwargs or {}))


def saved(network: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A call's answer, and the bytes that autograd keeps for its backward."""
    found: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        answer = call()
    return answer, sum(found.values())


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Everything about one network."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(build(name, Path(folder)))
    passes = {mode: bench.passes(mode) for mode in MODES}  # warms up as well
    memory: dict[str, Any] = {}
    if bench.watch.on_gpu:
        memory["allocated_gib"] = {m: round(bench.allocated(m), 2) for m in MODES}
        memory["gpu"] = torch.cuda.get_device_name()
    else:
        memory["peak_bytes"] = {m: bench.peaks(m) for m in MODES}
    cycles: dict[str, list[float]] = {mode: [0.0] * rounds for mode in MODES}
    bare: dict[str, list[float]] = {mode: [0.0] * rounds for mode in MODES}
    within: dict[str, list[float]] = {mode: [0.0] * rounds for mode in MODES}
    parts: list[dict[str, float]] = [{} for _ in range(rounds)]
    operations = {
        name: bench.operations_beside(step)
        for name, step in (("student_turn", 0), ("critic_turn", 1))
    }
    kinds = [(bare, bench.bare_iteration), (cycles, bench.iteration)]
    order = [(mode, *kind) for mode in MODES for kind in kinds]
    for i in tqdm(range(rounds), desc=name, unit="round"):
        for step in range(CRITIC_STEPS):
            random.shuffle(order)
            for mode, seconds, make in order:
                seconds[mode][i] += make(mode, step)
                if seconds is cycles:
                    within[mode][i] += sum(bench.seconds().values())
                elif mode == "default":
                    for part, taken in bench.seconds().items():
                        parts[i][part] = parts[i].get(part, 0) + taken

    def quartiles(above: list[float], below: list[float]) -> list[float]:
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        return [round(q, 4) for q in statistics.quantiles(ratios, method="inclusive")]

    def ratio(above: list[float], below: list[float]) -> float:
        return quartiles(above, below)[1]

    usual, usual_bare = cycles["default"], bare["default"]
    return {
        "network": name,
        "parameters": sum(p.numel() for p in bench.teacher.parameters()),
        "batch": bench.run.size,
        "rounds": rounds,
        "overhead_ratio": ratio(usual, usual_bare),
        "overhead_quartiles": quartiles(usual, usual_bare)[::2],
        "overhead_ratio_shared": ratio(cycles["shared"], bare["shared"]),
        "overhead_quartiles_shared": quartiles(cycles["shared"], bare["shared"])[::2],
        "beside_ratio": ratio(usual, within["default"]),
        "beside_quartiles": quartiles(usual, within["default"])[::2],
        "beside_ratio_shared": ratio(cycles["shared"], within["shared"]),
        "operations_beside": operations,
        "shared_ratio": ratio(cycles["shared"], usual),
        "shared_passes_ratio": ratio(bare["shared"], usual_bare),
        "shared_excess": ratio(
            [a / b for a, b in zip(cycles["shared"], usual, strict=True)],
            [a / b for a, b in zip(within["shared"], within["default"], strict=True)],
        ),
        "shared_critic_ratio": ratio(cycles["shared_critic"], usual),
        "shared_critic_passes_ratio": ratio(bare["shared_critic"], usual_bare),
        "seconds": {
            "cycle": {m: round(statistics.median(s), 4) for m, s in cycles.items()},
            "bare": {m: round(statistics.median(s), 4) for m, s in bare.items()},
            "parts": {
                part: round(statistics.median(p[part] for p in parts), 4)
                for part in parts[0]
            },
        },
        "passes": {"official": bench.official_passes(), **passes},
        **memory,
    }


def main() -> None:
    """Measures the networks that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--networks", nargs="+", help="names; all of the device's")
    parser.add_argument("--rounds", type=int, default=7, help="seven or more settle it")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error(f"--rounds {given.rounds}: expected at least 2")
    known = list(BATCH if given.device == "cpu" else FULL_SIZE)
    if wrong := set(given.networks or ()) - set(known):
        parser.error(f"--networks {' '.join(wrong)}: expected {', '.join(known)}")
    if given.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.set_float32_matmul_precision("high")  # as the recipes have it
    found = []
    for name in given.networks or known:
        found.append(measure(name, given.rounds))
        print(json.dumps(found[-1], indent=2), flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
