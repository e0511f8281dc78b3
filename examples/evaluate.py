"""Measures images by the paper's protocols: FID, patch FID, CLIP score, diversity.

Images that are there, or that a student or a teacher draws for it:

    python examples/evaluate.py --protocol imagenet64_edm --student runs/imagenet/student \
        --reference imagenet-64x64.npz --json student.json
    python examples/evaluate.py --protocol coco10k_512 patch_fid_299 clip_score \
        --student runs/four-step/student --prompt-file coco/coco10k/prompts.jsonl \
        --reference coco/coco10k/images --json sdxl.json
    python examples/evaluate.py --protocol coco30k_256 --images drawn \
        --reference coco/coco30k/references

The paper's teachers by name, and the time they take:

    python examples/evaluate.py --protocol imagenet64_edm --teacher teacher \
        --sampler edm-ode --seeds 0 --reference imagenet-64x64.npz --latency 20

The digits of this repository, on a CPU:

    python examples/evaluate.py --protocol digits --student demo/student --accuracy

While a recipe runs; and a result again:

    python examples/evaluate.py --protocol digits --watch demo
    python examples/evaluate.py --repeat student.json

torchrun shares the images among processes; numbers are the same to the bit. The page
"Evaluation" of the documentation says what protocols fix and how numbers are read.
"""  # noqa: E501

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import tyro
from evaluate_images import ImageSource
from evaluate_loop import KeptRows, rows_of
from evaluate_models import seconds_an_image
from evaluate_protocols import Distance, Networks, measure_of, naming
from evaluate_reference import open_reference
from evaluate_report import (
    changed_around,
    commit,
    differences,
    numbers_of,
    print_table,
    read_json,
    result_of,
    versions,
    write_json,
)
from evaluate_sets import batch_size_of, images_per_prompt, open_sets
from evaluate_settings import OWN, Settings, as_json, default_of, from_json
from parallel import processes
from runs import device_of
from sample_settings import flag

from dmdkit.metrics import describe_protocol
from dmdkit.training.ranks import on_first, rank_and_ranks


class Evaluation:
    """The protocols that were asked for, with their networks and real images."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, device_of(settings.device)
        self.networks = Networks(settings, self.device)
        self.measures = [
            measure_of(name, settings, self.networks, self.device)
            for name in settings.protocol
        ]
        self.ready = False

    def open_references(self) -> None:
        """Opens real images, or makes their statistics."""
        self.measures = [
            replace(measure, reference=open_reference(measure, self.settings))
            if isinstance(measure, Distance)
            else measure
            for measure in self.measures
        ]
        self.ready = True

    def run(self, settings: Settings) -> dict[str, Any]:
        """Measures the images of some settings: everything of it, on rank 0."""
        model, sets = open_sets(settings, self.measures)
        size = batch_size_of(settings, self.measures, model)
        # Cheap beside real images, whose statistics would be waited for in vain.
        rows_of(sets[0], self.measures, range(images_per_prompt(self.measures)))
        if not self.ready:
            self.open_references()
        told = {k: v for k, v in as_json(settings).items() if k not in OWN}
        about = {} if model is None else {**model.about, "calls": model.calls}
        sets_about = [{"title": s.title, "count": s.count} for s in sets]
        identity = {**told, "sets": sets_about, "networks": self.networks.named()}
        kept = KeptRows(settings.json, {**identity, "model": about, "size": size})
        found = []
        for number, source in enumerate(sets if self.measures else []):
            rows = kept.all_rows(number, source, self.measures, size, source.title)
            found.append(on_first(lambda rows=rows, s=source: self.results(rows, s)))
        latency = None
        if model is not None and settings.latency:
            latency = on_first(lambda: seconds_an_image(model, settings))
        content = {
            "settings": as_json(settings),
            "protocols": {
                m.protocol.name: describe_protocol(m.protocol) for m in self.measures
            },
            "networks": self.networks.named(),
            "references": {
                m.protocol.name: m.reference.about
                for m in self.measures
                if isinstance(m, Distance) and m.reference is not None
            },
            "model": about,
            "sets": sets_about,
            "results": {
                name: result_of([of[i] for of in found], settings.labels)
                for i, name in enumerate(settings.protocol)
            },
            "latency": latency,
            "batch_size": size,
            "ranks": rank_and_ranks()[1],
            "device": str(self.device),
            "versions": versions(),
            "commit": commit(),
        }
        on_first(lambda: self.write(settings, content, kept))
        return content

    def results(self, rows: Sequence[torch.Tensor], source: ImageSource) -> Any:
        """What a set gave by each protocol."""
        return [
            measure.result(of, source)
            for measure, of in zip(self.measures, rows, strict=True)
        ]

    @staticmethod
    def write(settings: Settings, content: dict[str, Any], kept: KeptRows) -> None:
        """Writes the result, and then gives up what was kept for it."""
        if settings.json is not None:
            write_json(settings.json, content)
            kept.remove()


def repeat(settings: Settings) -> bool:
    """Measures again what a file says; whether the numbers are the same."""
    assert settings.repeat is not None
    for field in fields(Settings):
        name = field.name
        if name not in OWN and getattr(settings, name) != default_of(name):
            raise SystemExit(f"{flag(name)}: --repeat takes it from {settings.repeat}.")
    with naming("repeat"):
        before = read_json(settings.repeat)
        own = {n: getattr(settings, n) for n in OWN if n != "repeat"}
        told = replace(from_json(before["settings"]), **own, repeat=None)
    now = measure(told)
    if rank_and_ranks()[0] > 0:
        return True
    found = differences(before, now)
    for line in changed_around(before, now):
        print(f"Changed: {line}")
    if not found:
        print(f"The same numbers as in {settings.repeat}.")
    for line in found:
        print(f"Another number: {line}")
    return not found


def measure(settings: Settings) -> dict[str, Any]:
    """Measures once, and prints the table."""
    settings.check()
    content = Evaluation(settings).run(settings)
    if rank_and_ranks()[0] == 0:
        print_table(content)
        if settings.json is not None:
            print(f"Wrote {settings.json}.")
        if settings.numbers:
            print(json.dumps(numbers_of(content)))
    return content


def main(settings: Settings) -> None:
    """Measures, repeats or watches; errors are one line."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with processes(settings.device):
        try:
            if settings.repeat is not None:
                if not repeat(settings):
                    raise SystemExit(1)
            elif settings.watch is not None:
                from evaluate_watch import watch

                settings.check()
                watch(settings, Evaluation(settings))
            else:
                measure(settings)
        except (ImportError, OSError, ValueError) as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. With --json the same command goes on where it was."
        ) from None
