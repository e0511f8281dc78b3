"""How good are drawn emoji? Recognised or not, distances, variety.

    python examples/emoji_evaluation.py

measures the shipped teacher: at several guidance scales, with few steps and names, then
by numbers of steps at the scale that `emoji.py` distils. It writes
`examples/emoji_teacher_rows.json`, which `emoji.py` shows beside the students. About
ten minutes on one CPU core.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from emoji_common import (
    FEATURES,
    HERE,
    LATENT_SHAPE,
    TEACHER_FILE,
    TextEncoder,
    load_classifier,
    load_emoji,
    load_teacher,
    parse,
    to_images,
)
from torch import Tensor
from tqdm import tqdm

from dmdkit import (
    ClassifierFreeGuidance,
    EulerSampler,
    FeatureStatistics,
    few_step_times,
    frechet_distance,
)
from dmdkit.adapters.conditions import TextPooledCondition
from dmdkit.types import Denoiser

ROWS_FILE = HERE / "emoji_teacher_rows.json"
SEEDS = (1, 2, 3)
BATCH = 64
GUIDANCE = 2.0
"""The scale that is distilled; `emoji_teacher_rows.json` has what else was tried."""
SCALES = (1.0, 1.5, 2.0, 3.0)
TEACHER_STEPS = 50
SCAN_STEPS = 20

NAMES = 459
"""Names that teacher and students are measured on: all."""
LEAST_IMAGES = 5
"""Emoji whose names must share a word, for the word to be a prompt of its own."""
DRAWS_OF_WORD = 8
NO_SUBJECTS = frozenset(
    "with and of for in on from over no up down left right sign symbol mark".split()
)
"""Words that say nothing of what is seen."""

Draw = Callable[[Tensor, TextPooledCondition, torch.Generator], Tensor]
"""Noise, prompts and a generator to latents."""


class Row(TypedDict):
    """How good draws are; averages over noise seeds."""

    top1: float
    """Share of full names whose draw is recognised as that very emoji."""
    top5: float
    """Share whose emoji is among the five likeliest."""
    frechet: float
    """Distance of one draw for every name to the real set."""
    word: float
    """Share of draws for one word whose recognised emoji has the word in its name."""
    distinct: float
    """How many different emoji are recognised in 8 draws for one word."""


def words_of(names: Sequence[str]) -> tuple[str, ...]:
    """Single words that name something and that at least five names share."""
    counts = Counter(word for name in names for word in set(name.split()))
    return tuple(
        sorted(
            word
            for word, count in counts.items()
            if count >= LEAST_IMAGES and word not in NO_SUBJECTS
        )
    )


def require_names(names: int) -> None:
    """Refuses a number of names that no distance can be measured with."""
    if not FEATURES < names <= NAMES:
        raise SystemExit(
            f"--names {names}: expected {FEATURES + 1} ... {NAMES}: more than there "
            "are features, or the Frechet distance is undefined."
        )


class Evaluator:
    """Holds the real emoji and the classifier, and measures draws against them."""

    def __init__(self, encoder: TextEncoder, names: int = NAMES) -> None:
        """`names` is how many, spread over all."""
        self.encoder, self.classifier = encoder, load_classifier()
        self.emoji = load_emoji()
        require_names(names)
        rows = torch.linspace(0, NAMES - 1, names).round().long()
        self.rows = rows
        self.words = words_of(self.emoji.names)
        self.prompts = [w for w in self.words for _ in range(DRAWS_OF_WORD)]
        images = self.emoji.images
        self.real = self._statistics(images[rows])

    def _real_rows(self) -> Tensor:
        """For every draw of a word a real emoji with it in its name, at random."""
        fixed = torch.Generator().manual_seed(0)
        chosen = []
        for word in self.prompts:
            found = [i for i, n in enumerate(self.emoji.names) if word in n.split()]
            chosen.append(found[int(torch.randint(len(found), (1,), generator=fixed))])
        return torch.tensor(chosen)

    @torch.no_grad()
    def _statistics(self, images: Tensor) -> FeatureStatistics:
        statistics = FeatureStatistics(FEATURES)
        for batch in images.split(512):
            statistics.update(self.classifier.features(batch))
        return statistics

    @torch.no_grad()
    def _ranked(self, images: Tensor) -> Tensor:
        """The five likeliest emoji of each picture, [b, 5]."""
        logits = torch.cat([self.classifier(batch) for batch in images.split(512)])
        return logits.topk(5).indices

    def of_names(self, images: Tensor) -> dict[str, float]:
        """Measures one picture for each name."""
        hits = self._ranked(images) == self.rows[:, None]
        return {
            "top1": hits[:, 0].float().mean().item(),
            "top5": hits.any(1).float().mean().item(),
            "frechet": frechet_distance(self._statistics(images), self.real),
        }

    def of_words(self, images: Tensor) -> dict[str, float]:
        """Measures eight pictures for each word."""
        guesses = self._ranked(images)[:, 0].tolist()
        hits = [
            word in self.emoji.names[guess].split()
            for word, guess in zip(self.prompts, guesses, strict=True)
        ]
        groups = [
            guesses[i : i + DRAWS_OF_WORD]
            for i in range(0, len(guesses), DRAWS_OF_WORD)
        ]
        return {
            "word": sum(hits) / len(hits),
            "distinct": sum(len(set(group)) for group in groups) / len(groups),
        }

    def of_draws(self, draw: Draw, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Draws all prompts from a noise seed: the pictures for names, and numbers."""
        names = [self.emoji.names[row] for row in self.rows]
        images = draw_many(draw, self.encoder, names, seed)
        of_words = draw_many(draw, self.encoder, self.prompts, 1000 + seed)
        return images, {**self.of_names(images), **self.of_words(of_words)}

    def row(self, draw: Draw, seeds: Sequence[int] = SEEDS, name: str = "") -> Row:
        """Averages over noise seeds."""
        bar = tqdm(seeds, desc=f"evaluating {name}", leave=False)
        return mean_row([self.of_draws(draw, seed)[1] for seed in bar])

    def real_row(self) -> Row:
        """The same for real emoji; the distances are 0 by definition."""
        images = self.emoji.images
        of_words = self.of_words(images[self._real_rows()])
        return mean_row([{**self.of_names(images[self.rows]), **of_words}])


def mean_row(measured: Sequence[dict[str, float]]) -> Row:
    """The mean of each number."""
    means = {k: sum(m[k] for m in measured) / len(measured) for k in measured[0]}
    return Row(**means)


@torch.no_grad()
def draw_many(
    draw: Draw, encoder: TextEncoder, prompts: Sequence[str], seed: int
) -> Tensor:
    """Draws a picture for each prompt, in batches."""
    generator, images = torch.Generator().manual_seed(seed), []
    for i in tqdm(range(0, len(prompts), BATCH), desc="drawing", leave=False):
        cond = encoder.encode(prompts[i : i + BATCH])
        noise = torch.randn(len(cond.text), *LATENT_SHAPE, generator=generator)
        images.append(to_images(draw(noise, cond, generator)))
    return torch.cat(images).clamp(-1, 1)


def guided_teacher(path: Path, scale: float) -> tuple[Denoiser, TextEncoder]:
    """A guided teacher and its text encoder."""
    teacher = load_teacher(path)
    empty = teacher.empty_prompt()
    return ClassifierFreeGuidance(teacher.denoiser, empty, scale), teacher.encoder


def teacher_draw(guided: Denoiser, steps: int) -> Draw:
    """Draws by DDIM: two calls of the network a step, one without guidance."""
    sampler = EulerSampler(few_step_times(steps))
    return lambda noise, cond, _: sampler(guided, noise, cond)


@dataclass(frozen=True)
class Settings:
    """Measures the shipped emoji teacher."""

    scan_names: int = 100
    """Names, spread over all, by which the guidance scales are compared."""
    names: int = NAMES
    """Names, spread over all, of the rows."""
    teacher: Path = TEACHER_FILE
    """Weights that emoji_teacher.py wrote."""
    threads: int = 1
    file: Path = ROWS_FILE
    """Where the rows go."""


def scan(settings: Settings) -> dict[str, Row]:
    """Compares guidance scales on some names, by fewer steps."""
    rows = {}
    for scale in SCALES:
        guided, encoder = guided_teacher(settings.teacher, scale)
        evaluator = Evaluator(encoder, settings.scan_names)
        draw = teacher_draw(guided, SCAN_STEPS)
        rows[str(scale)] = evaluator.row(draw, SEEDS[:1], f"scale {scale}")
        print(f"guidance {scale}: {show(rows[str(scale)])}", flush=True)
    return rows


def teacher_rows(
    path: Path = TEACHER_FILE,
    scale: float = GUIDANCE,
    names: int = NAMES,
    steps: Sequence[int] = (TEACHER_STEPS, 4, 1),
) -> dict[str, Row]:
    """Measures the teacher by numbers of steps; many steps on one noise seed alone."""
    guided, encoder = guided_teacher(path, scale)
    evaluator, rows = Evaluator(encoder, names), {}
    for count in steps:
        seeds = SEEDS if count < TEACHER_STEPS else SEEDS[:1]
        draw = teacher_draw(guided, count)
        rows[str(count)] = evaluator.row(draw, seeds, f"teacher, {count} steps")
        print(f"{count} steps: {show(rows[str(count)])}", flush=True)
    return rows


def show(row: Row) -> str:
    """A row in one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in row.items())


def main(settings: Settings) -> None:
    """Measures the teacher and writes its rows."""
    torch.set_num_threads(settings.threads)
    about = {
        "what": "the shipped emoji teacher by DDIM with guidance",
        "command": "python examples/emoji_evaluation.py",
        "scan": {
            "steps": SCAN_STEPS,
            "names": settings.scan_names,
            "seeds": list(SEEDS[:1]),
            "rows": scan(settings),
        },
        "guidance": GUIDANCE,
        "names": settings.names,
        "seeds": {"50": list(SEEDS[:1]), "4": list(SEEDS), "1": list(SEEDS)},
        "rows": teacher_rows(settings.teacher, GUIDANCE, settings.names),
    }
    settings.file.write_text(json.dumps(about, indent=2) + "\n")
    print(f"Wrote {settings.file}.")


if __name__ == "__main__":
    main(parse(Settings))
