"""Makes preference rates of the answers to a study that `preference_study.py` made.

    python examples/preference_rates.py study/study.json answers-*.json --plot rates.png

For each question: how often A was preferred, by rater and in all, with 95% intervals of
Wilson (1927, J. Am. Stat. Assoc. 22), which keep their level for few answers and for
rates near 0 and 1. The interval over answers takes all answers as independent. Answers
about the same pair are not: the interval over pairs is as wide as if all raters of a
pair always agreed, and is the one to trust for a claim about other prompts.

For a plot like the paper's Figure 5, of several studies, write each one's rates with
--json and give them to the last as --beside.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import tyro

LEVEL = 0.95
RATERS = 5
KEY = "study.json"
STUDY_FORMAT = "dmdkit preference study 1"
ANSWERS_FORMAT = "dmdkit preference answers 1"
RATES_FORMAT = "dmdkit preference rates 1"
SIDES = ("left", "right")


@dataclass(frozen=True)
class Settings:
    """Makes preference rates of the answers to a study."""

    study: tyro.conf.Positional[Path]
    """study.json, or its folder."""
    answers: tyro.conf.Positional[tuple[Path, ...]]
    """The files that the raters saved, one a rater."""
    json: Path | None = None
    """Where the rates go, with all that they are made of."""
    plot: Path | None = None
    """Picture of the rates: .png, .pdf or .svg."""
    beside: tuple[Path, ...] = ()
    """Rates of other studies, written with --json, that the plot shows too."""

    def check(self) -> None:
        """Refuses what cannot run."""
        if not self.answers:
            raise SystemExit("ANSWERS: expected at least one file of a rater.")
        if self.beside and self.plot is None:
            raise SystemExit("--beside: it is for the plot; give --plot.")
        if self.plot is not None and self.plot.suffix not in (".png", ".pdf", ".svg"):
            raise SystemExit(f"--plot {self.plot}: expected .png, .pdf or .svg.")


class Answers(NamedTuple):
    """What a rater saved: by pair and question, "left" or "right"."""

    file: Path
    rater: str
    sides: dict[str, dict[str, str]]


class Tally(NamedTuple):
    """Answers to one question: how many, and how many for A."""

    for_a: int
    answers: int
    unanswered: int

    def rates(self) -> dict[str, Any]:
        """The rate and its interval over answers; None without answers."""
        rate = self.for_a / self.answers if self.answers else None
        interval = None if rate is None else wilson(rate, self.answers)
        return {**self._asdict(), "rate": rate, "over_answers": interval}


def wilson(rate: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a rate that was seen in a number of trials."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = rate + z * z / (2 * count)
    half = z * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    # At rates of 0 and 1 the ends are these, but for rounding.
    low = 0.0 if rate == 0 else (centre - half) / scale
    high = 1.0 if rate == 1 else (centre + half) / scale
    return low, high


def read_json(path: Path, what: str, expected: str) -> dict[str, Any]:
    """Reads a file of one of our formats, or says in one line what is wrong."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{what} {path}: it cannot be read: {error}.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected:
        raise SystemExit(f"{what} {path}: its format is {found!r}, not {expected!r}.")
    return content


def study_id(key: Mapping[str, Any]) -> str:
    """The hash of all that the key file of a study says."""
    content = {name: value for name, value in key.items() if name != "study"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_study(path: Path) -> dict[str, Any]:
    """Reads the key file, and makes sure that nobody changed it."""
    path = path / KEY if path.is_dir() else path
    key = read_json(path, "STUDY", STUDY_FORMAT)
    if study_id(key) != key.get("study"):
        raise SystemExit(f"STUDY {path}: it was changed after it was made.")
    return key


def read_answers(path: Path, key: Mapping[str, Any]) -> Answers:
    """Reads what a rater saved, and refuses what does not belong to the study."""
    content = read_json(path, "ANSWERS", ANSWERS_FORMAT)
    if content.get("study") != key["study"]:
        raise SystemExit(
            f"ANSWERS {path}: of study {str(content.get('study'))[:8]}, expected "
            f"{key['study'][:8]}."
        )
    rater, sides = content.get("rater"), content.get("answers")
    if not isinstance(rater, str) or not rater.strip() or not isinstance(sides, dict):
        raise SystemExit(f"ANSWERS {path}: no rater, or no answers.")
    known = {pair["id"] for pair in key["pairs"]}
    for pair, given in sides.items():
        if pair not in known:
            raise SystemExit(f"ANSWERS {path}: the study has no pair {pair!r}.")
        if not isinstance(given, dict):
            raise SystemExit(f"ANSWERS {path}: pair {pair}: no sides by question.")
        for question, side in given.items():
            if question not in key["questions"] or side not in SIDES:
                raise SystemExit(
                    f"ANSWERS {path}: pair {pair}: {question!r} is {side!r}, expected "
                    f"{' or '.join(map(repr, key['questions']))}, left or right."
                )
    if content.get("consent") is not True:
        raise SystemExit(f"ANSWERS {path}: the rater did not consent.")
    if not any(sides.values()):
        raise SystemExit(f"ANSWERS {path}: nothing is answered.")
    return Answers(path, rater.strip(), sides)


def require_raters_once(answers: Sequence[Answers]) -> None:
    """Refuses two files of one rater, such as a file saved twice."""
    first: dict[str, Path] = {}
    for given in answers:
        name = given.rater.casefold()
        if name in first:
            raise SystemExit(
                f"ANSWERS: {first[name]} and {given.file} are both of rater "
                f"{given.rater!r}; keep one of them."
            )
        first[name] = given.file


def chose_a(pair: Mapping[str, Any], side: str) -> bool:
    """Whether the side that was chosen shows model A."""
    return (side == "left") == (pair["left"] == "a")


def rates_of(key: Mapping[str, Any], answers: Sequence[Answers]) -> dict[str, Any]:
    """All rates of a study, as --json writes them."""
    pairs: list[dict[str, Any]] = key["pairs"]
    questions = {}
    for question, text in key["questions"].items():
        votes: dict[str, list[bool]] = {pair["id"]: [] for pair in pairs}
        raters = {}
        for given in answers:
            sides = {id: s[question] for id, s in given.sides.items() if question in s}
            chosen = {
                pair["id"]: chose_a(pair, sides[pair["id"]])
                for pair in pairs
                if pair["id"] in sides
            }
            for id, for_a in chosen.items():
                votes[id].append(for_a)
            tally = Tally(sum(chosen.values()), len(chosen), len(pairs) - len(chosen))
            left = sum(side == "left" for side in sides.values())
            raters[given.rater] = {**tally.rates(), "left": left}
        questions[question] = {"text": text, **in_all(votes, raters), "raters": raters}
    return {
        "format": RATES_FORMAT,
        "study": key["study"],
        "names": key["names"],
        "pairs": len(pairs),
        "raters": len(answers),
        "level": LEVEL,
        "questions": questions,
        "files": {
            given.file.name: hashlib.sha256(given.file.read_bytes()).hexdigest()
            for given in answers
        },
    }


def in_all(
    votes: Mapping[str, Sequence[bool]], raters: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The answers of all raters to a question; `votes` has those about each pair."""
    sums = Counter[str]()
    for tally in raters.values():
        sums.update({name: tally[name] for name in (*Tally._fields, "left")})
    total = Tally(*(sums[name] for name in Tally._fields)).rates()
    answered = [pair for pair in votes.values() if pair]
    rate = total["rate"]
    leads = [2 * sum(pair) - len(pair) for pair in answered]
    return {
        **total,
        "over_pairs": None if rate is None else wilson(rate, len(answered)),
        "left": sums["left"],
        "pairs_won": {
            "a": sum(lead > 0 for lead in leads),
            "b": sum(lead < 0 for lead in leads),
            "even": sum(lead == 0 for lead in leads),
        },
        "fewest_answers": min(map(len, votes.values())),
    }


def percent(value: float | None) -> str:
    """A rate as it is printed."""
    return "-" if value is None else f"{100 * value:.1f}%"


def span(interval: Sequence[float] | None) -> str:
    """An interval as it is printed."""
    return "-" if interval is None else " to ".join(map(percent, interval))


def print_rates(rates: Mapping[str, Any]) -> None:
    """Prints a table for each question."""
    a, b = rates["names"]["a"], rates["names"]["b"]
    print(
        f"Study {rates['study'][:8]}: {a} (A) against {b} (B), {rates['pairs']} pairs, "
        f"{rates['raters']} raters. Intervals: {LEVEL:.0%}, Wilson."
    )
    for found in rates["questions"].values():
        print(f"\n{found['text']}")
        width = max(12, *map(len, found["raters"]))
        print(
            f"{'rater':<{width}}{'prefers A':>11}{'interval':>19}{'answers':>9}"
            f"{'unanswered':>12}{'left':>7}"
        )
        for name, row in (*found["raters"].items(), ("all", found)):
            left = percent(row["left"] / row["answers"] if row["answers"] else None)
            print(
                f"{name:<{width}}{percent(row['rate']):>11}"
                f"{span(row['over_answers']):>19}{row['answers']:>9}"
                f"{row['unanswered']:>12}{left:>7}"
            )
        print(f"{'over pairs':<{width}}{'':>11}{span(found['over_pairs']):>19}")
        won = found["pairs_won"]
        print(f"Pairs won: {won['a']} by A, {won['b']} by B, {won['even']} even.")
    fewest = min(found["fewest_answers"] for found in rates["questions"].values())
    if fewest < RATERS:
        print(
            f"\nNote: the paper asks {RATERS} raters about each pair; here a pair has "
            f"{fewest} answers."
        )


def save_plot(studies: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a panel for each question and a bar for each study, as in Figure 5."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    questions = studies[0]["questions"]
    figure, axes = plt.subplots(
        *(1, len(questions)),
        figsize=(5 * len(questions), 1.3 + 0.8 * len(studies)),
        layout="constrained",
        gridspec_kw={"wspace": 0.1},
    )
    for axis, (question, found) in zip(axes, questions.items(), strict=True):
        for row, study in enumerate(studies):
            here, names = study["questions"][question], study["names"]
            rate, interval = here["rate"], here["over_pairs"]
            if rate is None:
                continue
            axis.barh(row, rate, 0.6, color="#3b6fb6")
            axis.barh(row, 1 - rate, 0.6, left=rate, color="#d9d9d4")
            low, high = interval
            axis.errorbar(
                *(rate, row),
                xerr=[[rate - low], [high - rate]],
                color="black",
                capsize=3,
                lw=1,
            )
            share = f"{names['a']}  {rate:.0%}"
            other = f"{1 - rate:.0%}  {names['b']}"
            axis.text(0, row - 0.34, share, ha="left", va="bottom", fontsize=9)
            axis.text(1, row - 0.34, other, ha="right", va="bottom", fontsize=9)
        axis.axvline(0.5, color="black", ls=":", lw=1)
        axis.set(xlim=(0, 1), ylim=(len(studies) - 0.5, -0.75), yticks=[])
        axis.set_title(found["text"], fontsize=10)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        for side in ("top", "left", "right"):
            axis.spines[side].set_visible(False)
    figure.supxlabel(f"preferred; bars: {LEVEL:.0%} interval over pairs", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def analyse(settings: Settings) -> dict[str, Any]:
    """Makes the rates, prints them and writes what was asked for."""
    settings.check()
    key = read_study(settings.study)
    answers = [read_answers(path, key) for path in settings.answers]
    require_raters_once(answers)
    rates = rates_of(key, answers)
    beside = [read_json(path, "--beside", RATES_FORMAT) for path in settings.beside]
    for path, other in zip(settings.beside, beside, strict=True):
        if other["questions"].keys() != rates["questions"].keys():
            raise SystemExit(f"--beside {path}: it has other questions.")
    print_rates(rates)
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rates, indent=2, ensure_ascii=False)
        settings.json.write_text(text + "\n", "utf-8")
        print(f"Wrote {settings.json}.")
    if settings.plot is not None:
        save_plot([*beside, rates], settings.plot)
        print(f"Wrote {settings.plot}.")
    return rates


if __name__ == "__main__":
    try:
        analyse(tyro.cli(Settings))
    except OSError as error:
        raise SystemExit(f"{error}.") from error
