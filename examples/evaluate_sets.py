"""The sets of images that `evaluate.py` measures: given ones, or a model's."""

from collections.abc import Sequence

from evaluate_images import DrawnImages, ImageSource, open_images
from evaluate_models import Model, open_model
from evaluate_protocols import (
    KID_SUBSET,
    PROTOCOLS,
    Distance,
    Diversity,
    Measure,
    Score,
    images_of,
    naming,
    seeds_of,
)
from evaluate_reference import require_enough
from evaluate_settings import Settings

from dmdkit.data import read_prompts

BATCH_SIZE = 64


def images_per_prompt(measures: Sequence[Measure]) -> int:
    """How many images of a prompt follow each other."""
    diverse = [m.protocol for m in measures if isinstance(m, Diversity)]
    return diverse[0].images_per_prompt if diverse else 1


def batch_size_of(
    settings: Settings, measures: Sequence[Measure], model: Model | None
) -> int:
    """Images at a time: whole prompts of them."""
    each, size = images_per_prompt(measures), settings.batch_size
    if size is None:
        return BATCH_SIZE if model is None else model.batch_size
    if size % each:
        raise SystemExit(f"--batch-size {size}: expected a multiple of {each}.")
    return size


def open_sets(
    settings: Settings, measures: Sequence[Measure]
) -> tuple[Model | None, list[ImageSource]]:
    """Opens the images, or the model that draws them, and refuses what does not fit."""
    prompts, each, model = prompts_of(settings), images_per_prompt(measures), None
    if settings.images:
        sets = given_sets(settings, prompts, each)
    else:
        model = open_model(settings, prompts, each)
        sets = drawn_sets(settings, model, prompts, each)
    for source in sets:
        require_fit(source, settings, measures)
    return model, sets


def prompts_of(settings: Settings) -> list[str]:
    """Those of the file of prompts."""
    if settings.prompt_file is None:
        return []
    with naming("prompt-file"):
        return list(read_prompts(settings.prompt_file, column=settings.prompt_column))


def given_sets(
    settings: Settings, prompts: Sequence[str], each: int
) -> list[ImageSource]:
    """Folders and files of images."""
    channels = 1 if "digits" in settings.protocol else 3
    with naming("images"):
        sets = [open_images(path, channels=channels) for path in settings.images]
    for source in sets:
        if settings.count not in (None, source.count):
            raise SystemExit(
                f"--count {settings.count}: {source.title} has {source.count} images."
            )
        if prompts and len(prompts) * each != source.count:
            fewer = len(prompts) * each < source.count
            lacking = "images without prompts" if fewer else "prompts without images"
            raise SystemExit(
                f"--prompt-file: {len(prompts)} prompts for {source.count} images, "
                f"expected {each} of each; there are {lacking}."
            )
        if prompts:
            source.prompts, source.images_per_prompt = prompts, each
    return sets


def drawn_sets(
    settings: Settings, model: Model, prompts: Sequence[str], each: int
) -> list[ImageSource]:
    """The images of a model, from the seeds of the first protocol."""
    protocols = [PROTOCOLS[name] for name in settings.protocol]
    seeds = settings.seeds or (seeds_of(protocols[0]) if protocols else (0,))
    count = settings.count or (images_of(protocols[0]) if protocols else 1)
    if model.label is None and prompts:
        most = len(prompts) * each
        count = settings.count or most
        if count > most:
            raise SystemExit(
                f"--count {count}: --prompt-file has {len(prompts)} prompts, which "
                f"makes {most} images."
            )
    option = "student" if settings.student is not None else "teacher"
    return [drawn_set(model, seed, count, prompts, each, option) for seed in seeds]


def drawn_set(
    model: Model,
    seed: int,
    count: int,
    prompts: Sequence[str],
    each: int,
    option: str,
) -> ImageSource:
    """The images of a model from some seed on."""
    title = f"{model.title}, seed {seed}"
    source = DrawnImages(lambda batch: model.draw(batch, seed), count, title, option)
    if model.label is not None:
        source.labels = [model.label(i, seed) for i in range(count)]
    elif prompts:
        source.prompts, source.images_per_prompt = prompts, each
    return source


def require_fit(
    source: ImageSource, settings: Settings, measures: Sequence[Measure]
) -> None:
    """Refuses images that a protocol can do nothing with."""
    each = images_per_prompt(measures)
    if source.count % each:
        raise SystemExit(
            f"--{'images' if settings.images else 'count'}: {source.count} images, "
            f"expected {each} of each prompt."
        )
    for measure in measures:
        if isinstance(measure, Distance):
            with naming("images" if settings.images else "count"):
                require_enough(measure, source.count)
        if isinstance(measure, Score) and source.prompts is None:
            raise SystemExit(
                f"--prompt-file: missing; {measure.protocol.name} compares images with "
                "their prompts."
            )
    if settings.accuracy and source.labels is None:
        raise SystemExit(f"--accuracy: {source.title} has no labels.")
    if settings.kid and source.count < KID_SUBSET:
        raise SystemExit(
            f"--kid: {source.count} images, expected at least {KID_SUBSET}."
        )
