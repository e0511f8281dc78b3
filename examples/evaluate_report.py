"""Results of `evaluate.py`: as JSON, as a table, and compared with earlier ones."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from evaluate_baselines import published
from evaluate_protocols import Result

from dmdkit.metrics import over_seeds

PACKAGES = (
    *("dmdkit", "torchvision", "numpy", "pillow", "diffusers"),
    *("transformers", "timm", "open-clip-torch", "torch-fidelity", "lpips"),
)


def versions() -> dict[str, str]:
    """What the numbers were computed with."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found["torch"] = torch.__version__
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit() -> str | None:
    """The commit of this checkout, and whether files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def result_of(results: Sequence[Result], labels: Any) -> dict[str, Any]:
    """What the sets of images gave by one protocol."""
    sets = over_seeds([result.measured for result in results], labels)
    first = sets.single
    return {
        "single": first.value,
        "minimum": sets.minimum.value,
        "mean": sets.mean,
        "by_set": [
            {"value": result.measured.value, **result.extras} for result in results
        ],
        "samples": first.samples,
        "samples_expected": first.expected,
        "reference": first.reference,
        "reference_expected": first.expected_reference,
        "comparable": first.complete,
        "features": first.features,
        "text": str(first),
    }


def numbers_of(content: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result, by name: means over the sets of images."""
    found: dict[str, float] = {}
    for name, result in content["results"].items():
        found[name] = result["mean"]
        if len(result["by_set"]) > 1:
            found[f"{name}_single"] = result["single"]
            found[f"{name}_minimum"] = result["minimum"]
        for extra in result["by_set"][0].keys() - {"value"}:
            values = [row[extra] for row in result["by_set"]]
            found[extra if len(content["results"]) == 1 else f"{name}_{extra}"] = sum(
                values
            ) / len(values)
    if content["latency"] is not None:
        found["latency"] = content["latency"]["seconds_an_image"]
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    unfinished.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a result.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = json.loads(file.read_text())
        _ = content["settings"], content["results"], content["versions"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no result of this program ({error!r}).") from error
    return content


# -- the table


def print_table(content: Mapping[str, Any]) -> None:
    """Prints a result, with what is published beside it."""
    results, latency = content["results"], content["latency"]
    seconds = None if latency is None else latency["seconds_an_image"]
    extras = [
        (name, extra)
        for name, result in results.items()
        for extra in result["by_set"][0].keys() - {"value"}
    ]
    extras.sort(key=lambda pair: list(results[pair[0]]["by_set"][0]).index(pair[1]))
    heads = [*results, *(extra for _, extra in extras)]
    heads += ["s/image"] if latency is not None else []
    rows: list[list[str]] = [["", "calls", *heads, ""]]
    sets = content["sets"]
    for i, one in enumerate(sets):
        values = [result["by_set"][i]["value"] for result in results.values()]
        values += [results[name]["by_set"][i][extra] for name, extra in extras]
        values += [seconds] if latency is not None else []
        calls = content["model"].get("calls", "")
        rows.append([one["title"], f"{calls}", *map(_number, values), ""])
    if len(sets) > 1:
        blanks = [""] * (len(heads) - len(results))
        for kind in ("minimum", "mean"):
            values = [_number(result[kind]) for result in results.values()]
            rows.append([f"  {kind} of {len(sets)}", "", *values, *blanks, ""])
    for row in published([*results], latency=latency is not None):
        names = [*results, *(extra for _, extra in extras)]
        names += ["latency"] if latency is not None else []
        values = [_number(row.numbers.get(name)) for name in names]
        calls = "" if row.calls is None else f"{row.calls}"
        rows.append([row.method, calls, *values, row.source])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for first, *middle, last in rows:
        cells = [f"{x:>{w}}" for x, w in zip(middle, widths[1:-1], strict=True)]
        print(f"{first:<{widths[0]}}  {'  '.join(cells)}  {last}".rstrip())
    print()
    for line in remarks(content):
        print(line)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:#.4g}".rstrip(".")


def remarks(content: Mapping[str, Any]) -> list[str]:
    """What has to be known of the numbers."""
    lines = [result["text"] for result in content["results"].values()]
    for name, about in content["references"].items():
        if about.get("features") == "the file does not say":
            lines.append(
                f"Note: {about['file']} does not say which features it is of; {name} "
                "takes them for its own."
            )
    latency = content["latency"]
    if latency is not None:
        lines.append(
            f"Latency: the median of {latency['timed_batches']} batches of "
            f"{latency['batch_size']}, {latency['precision']}, {latency['device']}, "
            f"{latency['threads']} threads; the paper's is of another machine."
        )
    return lines


# -- the same again


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a repeated result differs, a line a number; none if it does not."""
    old, new = (dict(_flat(content["results"])) for content in (before, now))
    return [
        f"{name}: {old.get(name)} before, now {new.get(name)}"
        f"{_relative(old.get(name), new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _flat(item, f"{name}[{i}]")
    else:
        yield name, value


def _relative(old: Any, new: Any) -> str:
    if not isinstance(old, float) or not isinstance(new, float) or not old:
        return ""
    return f" ({abs(old - new) / abs(old):.1e} of it)"


def changed_around(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another than when a result was written, and may change numbers."""
    lines = []
    for what in ("versions", "networks", "references", "model", "protocols", "commit"):
        old, new = (dict(_flat({what: content.get(what)})) for content in (before, now))
        lines += [
            f"{name}: {old.get(name)} before, now {new.get(name)}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
    return lines
