"""The study: its cells, one teacher in three families, its files, a small run of it."""

import csv
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study import critic_steps, distil, run, search
from study.cells import CELLS, LEARNING_RATE, SEEDS, cells_of
from study.datasets import DIGITS
from study.distil import Run, Training, train
from study.evaluation import Evaluator
from study.families import LAST_FLOW_TIME, FamilyName, in_family, student_times
from study.figures import spaced
from study.records import RESULTS, Records, Task, read
from study.tables import NAMES, TABLES, Results, cell_text, fill_page, label, table
from study.teachers import HELD_OUT, TEACHERS, draw_teacher
from torch import Tensor, nn

from dmdkit import HeunSampler, NoisedData, karras_sigmas

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "examples" / "study"
PAGE = ROOT / "docs" / "study.md"
SMALL = Training(batch_size=4)


# --- one teacher in three families ---


def edm_level(name: FamilyName, t: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and noise level in EDM's terms, from each family's definition."""
    if name == "flow":
        return 1 - t, t / (1 - t)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)[t.long()]
    alpha = alphas_cumprod.sqrt()
    return alpha, (1 - alphas_cumprod).sqrt() / alpha


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_a_family_estimates_what_the_edm_teacher_estimates(name: FamilyName) -> None:
    teacher = DIGITS.load_teacher()
    other = in_family(teacher, name, DIGITS.sigma_data)
    t = torch.tensor([20.0, 500.0, 981.0] if name == "vp" else [0.02, 0.5, 0.98])
    labels = torch.tensor([1, 2, 3])
    scale, level = edm_level(name, t.double())
    x_ve = torch.randn(3, *DIGITS.shape) * level.view(-1, 1, 1, 1).float()
    expected = teacher(x_ve, level.float(), labels)
    x_t = x_ve * scale.view(-1, 1, 1, 1).float()
    torch.testing.assert_close(other(x_t, t, labels), expected, atol=2e-4, rtol=2e-4)


def test_one_step_students_start_from_the_largest_noise_of_their_family() -> None:
    assert student_times("edm", 1) == (80.0,)
    assert student_times("vp", 1) == (999.0,)
    (flow,) = student_times("flow", 1)
    assert flow / (1 - flow) == pytest.approx(80)
    assert student_times("flow", 4)[1] == pytest.approx(LAST_FLOW_TIME * 0.75)


# --- what a cell trains ---


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "PAIRS", 16)
    distil.pairs_of.cache_clear()


def test_figures_have_the_curves_of_their_cells() -> None:
    shown = {"no-regression", "asynchronous", "ttur", "ratio-10", "dmd"}
    assert {cell.name for cell in CELLS.values() if cell.has_curve} == shown


def test_pairs_are_the_teachers_and_the_same_for_all_seeds() -> None:
    first, second = (Run(DIGITS, CELLS["dmd"], seed) for seed in (1, 2))
    assert first.pairs is not None
    assert first.pairs is second.pairs
    assert first.preparation == second.preparation > 0
    noise, labels, images = first.pairs
    made = HeunSampler(karras_sigmas(18))(DIGITS.load_teacher(), noise, labels)
    torch.testing.assert_close(images, made)


def test_table_3_has_the_papers_rows() -> None:
    rows = {  # distribution matching, no regression, TTUR, GAN (paper, Table 3)
        "dmd": (True, False, False, False),
        "no-regression": (True, True, False, False),
        "ttur": (True, True, True, False),
        "dmd2": (True, True, True, True),
        "gan-alone": (False, True, False, True),
        "gan-ttur": (False, True, True, True),
    }
    shown = [CELLS[name] for name in TABLES["3"] if name in CELLS]
    assert {cell.name.removesuffix("-tuned") for cell in shown} == set(rows)
    for cell in shown:
        ticks = (
            cell.distribution_matching,
            not cell.regression_weight,
            cell.critic_steps == 5,
            cell.gan_weight > 0,
        )
        assert ticks == rows[cell.name.removesuffix("-tuned")]
        assert "3" in cell.tables


def test_every_cell_has_a_place_in_the_report() -> None:
    everything = {*CELLS, *TEACHERS, HELD_OUT}
    assert {cell for names in TABLES.values() for cell in names} == everything
    assert {name.removesuffix("-tuned") for name in everything} == set(NAMES)
    assert len({label(name) for name in everything}) == len(everything)


def run_of(name: str) -> Run:
    return Run(DIGITS, CELLS[name], seed=3, training=SMALL)


def moved(run: Run, steps: int) -> tuple[bool, bool]:
    """Whether student and critic moved in some iterations."""
    before = {
        name: [p.detach().clone() for p in network.parameters()]
        for name, network in (("student", run.student), ("critic", run.critic))
    }
    for step in range(steps):
        run.iterate(step)
    after = {"student": run.student, "critic": run.critic}
    student, critic = (
        any(
            not torch.equal(a, b)
            for a, b in zip(before[name], after[name].parameters(), strict=True)
        )
        for name in ("student", "critic")
    )
    return student, critic


@pytest.mark.parametrize(
    "name",
    ["dmd2", "dmd", "gan-alone", "vp", "flow", "ratio-10", "shared-both-passes"],
)
def test_both_networks_move_and_the_student_at_its_ratio(name: str) -> None:
    run = run_of(name)
    assert moved(run, 2) == (True, True)
    assert run.generator_updates == (2 if CELLS[name].critic_steps == 1 else 1)


def test_without_distribution_matching_the_teacher_is_not_asked() -> None:
    run = run_of("gan-ttur")
    calls: list[int] = []
    network = run.teacher.network  # pyright: ignore[reportAttributeAccessIssue]
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    run.iterate(0)
    assert not calls
    full = run_of("dmd2")
    network = full.teacher.network  # pyright: ignore[reportAttributeAccessIssue]
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    full.iterate(0)
    assert len(calls) == 1


def test_without_a_gan_the_critic_has_no_head() -> None:
    def heads(run: Run) -> int:
        return sum(name.startswith("network.head") for name, _ in named(run))

    def named(run: Run) -> list[tuple[str, nn.Parameter]]:
        return list(run.critic.named_parameters())

    assert heads(run_of("ttur")) == 0
    assert heads(run_of("dmd2")) > 0


def test_asynchronous_rates_differ_by_five_and_others_do_not() -> None:
    def rates(name: str) -> list[float]:
        optimizers = run_of(name).optimizers
        return [optimizers[n].param_groups[0]["lr"] for n in ("student", "critic")]

    student, critic = rates("asynchronous")
    assert critic == pytest.approx(5 * student)
    assert len(set(rates("ttur"))) == 1


def test_inputs_without_simulation_are_noised_data_with_their_labels() -> None:
    run = run_of("four-step-no-simulation")
    assert isinstance(run.inputs, NoisedData)
    seen: list[tuple[Tensor, Tensor]] = []
    run.student.register_forward_pre_hook(lambda _, args: seen.append(args[1:3]))
    run.iterate(0)
    ((_, labels),) = seen
    # The labels are those of the images that were drawn first.
    rows = torch.randint(
        len(run.labels), (4,), generator=_after_labels(torch.Generator(), 4)
    )
    assert torch.equal(labels, run.labels[rows])


def _after_labels(generator: torch.Generator, size: int) -> torch.Generator:
    generator.manual_seed(3)
    torch.randint(DIGITS.classes, (size,), generator=generator)
    return generator


def test_the_average_is_over_critic_updates_whatever_the_ratio() -> None:
    over = Training().average_over
    for name in ("ttur", "no-regression"):
        (decay,) = run_of(name).average.averages
        assert decay ** (over / CELLS[name].critic_steps) == pytest.approx(math.exp(-1))


def test_two_stages_count_their_updates_together() -> None:
    cell = replace(CELLS["dmd2-longer"], pretraining=1.0, budgets=0.5)
    ends: list[tuple[int, bool, float]] = []

    def measure(run: Run) -> dict[str, float]:
        rate = run.optimizers["student"].param_groups[0]["lr"]
        ends.append((run.generator_updates, run.cell.gan_weight > 0, rate))
        return {}

    trained = train(DIGITS, cell, 1, 10, measure, every=10, training=SMALL)
    assert (trained.critic_updates, trained.generator_updates) == (15, 3)
    full = cell.learning_rate
    assert ends == [(0, False, full), (0, True, full / 4), (1, True, full / 4)]
    points = [(p["critic_updates"], p["generator_updates"]) for p in trained.curve]
    assert points == [(0, 0), (10, 2), (15, 3)]


def test_the_second_stage_goes_on_from_the_average_of_the_first() -> None:
    cell = replace(CELLS["dmd2-longer"], pretraining=1.0, budgets=1.0)
    noise = torch.randn(2, *DIGITS.shape)
    labels = torch.tensor([0, 1])
    drawn: list[Tensor] = []

    def measure(run: Run) -> dict[str, float]:
        drawn.append(run.draw(noise, labels, torch.Generator()))
        drawn.append(run.draw_last(noise, labels, torch.Generator()))
        return {}

    train(DIGITS, cell, 1, 2, measure, every=2, training=SMALL)
    _, _, average, last, *_ = drawn
    torch.testing.assert_close(average, last)  # a new stage: both are its start
    assert not torch.equal(drawn[0], average)


# --- measuring ---


def test_real_images_measure_as_real() -> None:
    evaluator = Evaluator(DIGITS)
    images, labels, *_ = DIGITS.images
    # In the order of classes that class-balanced samples have.
    by_class = [images[labels == c][:100] for c in range(10)]
    measured = evaluator.measure(torch.stack(by_class, 1).flatten(0, 1))
    assert measured.frechet < 0.5
    assert measured.precision == 1.0
    assert measured.accuracy > 0.99
    assert measured.nearest == 0.0
    noise = evaluator.measure(torch.rand(1000, *DIGITS.shape) * 2 - 1)
    assert noise.frechet > 10
    assert noise.accuracy < 0.3


def test_held_out_images_are_measured_by_their_own_labels() -> None:
    evaluator = Evaluator(DIGITS)
    measured = evaluator.measure_held_out()
    assert measured.frechet_held_out is None
    assert measured.accuracy > 0.95
    labels = evaluator.held_out_labels
    turned = evaluator.measure(evaluator.held_out_images, (labels + 1) % 10)
    assert turned.accuracy < 0.05
    assert turned.frechet == measured.frechet
    assert turned.frechet_held_out == pytest.approx(0, abs=1e-6)
    shown = evaluator.held_out_by_class(3)
    nines = evaluator.held_out_images[labels == 9]
    assert torch.equal(shown[9::10], nines[:3])


@pytest.mark.parametrize("name", ["untrained", "untrained-four-step"])
def test_untrained_rows_are_students_before_their_first_update(name: str) -> None:
    steps = TEACHERS[name].calls
    cell = {1: "dmd2", 4: "four-step"}[steps]
    noise, labels = torch.randn(4, *DIGITS.shape), torch.arange(4)
    student = run_of(cell).draw(noise, labels, torch.Generator().manual_seed(1))
    drawn = draw_teacher(DIGITS, TEACHERS[name])
    torch.testing.assert_close(
        drawn(noise, labels, torch.Generator().manual_seed(1)), student
    )


# --- learning rates ---


def test_a_cell_has_its_own_rate_where_the_search_found_a_better_one() -> None:
    rows = read(STUDY / "search.csv")
    for name in search.SEARCHED:
        trials = {
            float(r["learning_rate"]): float(r["frechet"])
            for r in rows
            if r["cell"] == name
        }
        usual = trials[LEARNING_RATE]
        best = min(trials, key=lambda key: trials[key])
        tuned = CELLS.get(f"{name}-tuned")
        assert (tuned is not None) == (trials[best] < search.BETTER * usual), name
        if tuned is not None:
            assert tuned.learning_rate == best
    assert {row["seed"] for row in rows} == {str(search.SEED)}
    assert max(SEEDS.values()) < search.SEED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": ("dmd3",)}, "--cells dmd3: expected some of"),
        ({"budget": 0}, "--budget 0: expected >= 1"),
    ],
)
def test_a_search_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        search.Settings(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("small")
def test_a_search_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        search,
        "ProcessPoolExecutor",
        lambda workers, mp_context: ThreadPoolExecutor(workers),
    )
    monkeypatch.setattr(search, "SAMPLES", 200)
    settings = search.Settings(
        cells=("ttur",), rates=(1e-4, 1e-3), budget=2, workers=1, out=tmp_path
    )
    search.main(settings)
    rows = read(tmp_path / "search.csv")
    assert [r["learning_rate"] for r in rows] == ["0.0001", "0.001"]
    assert len({r["frechet"] for r in rows}) == 2
    search.main(replace(settings, rates=(1e-4, 2e-4)))
    assert len(read(tmp_path / "search.csv")) == 3
    assert "Wrote" in capsys.readouterr().out


# --- files ---


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SAMPLES", 200)
    monkeypatch.setattr(run, "CURVE_SAMPLES", 100)
    monkeypatch.setattr(run, "_evaluators", {})


@pytest.mark.usefixtures("small")
def test_a_task_leaves_one_row_and_is_not_done_again(tmp_path: Path) -> None:
    records = Records(tmp_path)
    task = Task("digits", "ttur", 1, 5)
    assert not records.has(task)
    records.add(task, run.perform(task), "abc1234")
    teacher = Task("digits", "teacher-ode-7", 1, 0)
    records.add(teacher, run.perform(teacher), "abc1234")

    again = Records(tmp_path)
    assert again.has(task)
    assert again.has(teacher)
    assert not again.has(task._replace(seed=2))
    assert not again.has(task._replace(budget=6))
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == RESULTS
    assert [row["cell"] for row in rows] == ["ttur", "teacher-ode-7"]
    assert rows[0]["generator_updates"] == "1"
    assert float(rows[0]["seconds"]) > 0
    curve = read(tmp_path / "curves.csv")
    assert [point["critic_updates"] for point in curve] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
    ]
    assert again.grid_file("digits", "ttur").is_file()
    run.main(
        run.Settings(
            data=("digits",),
            cells=("ttur", "teacher-ode-7"),
            seeds=1,
            budget=5,
            out=tmp_path,
        )
    )
    assert len(read(tmp_path / "results.csv")) == 2
    assert (tmp_path / "plots" / "study_digits_samples.png").is_file()


def test_cells_of_another_budget_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(
        ",".join(RESULTS) + "\ndigits,3,ttur,1,600,1,1,1,1,120,60.0,abc1234\n"
    )
    with pytest.raises(SystemExit, match=r"--budget 100: .* of 600 critic updates"):
        run.main(run.Settings(budget=100, out=tmp_path))


def test_the_same_seed_gives_the_same_student() -> None:
    def student(seed: int) -> Tensor:
        made = Run(DIGITS, CELLS["dmd2"], seed, SMALL)
        for step in range(2):
            made.iterate(step)
        return torch.cat([p.flatten() for p in made.student.parameters()]).detach()

    assert torch.equal(student(1), student(1))
    assert not torch.equal(student(1), student(2))


def test_a_dry_run_names_what_is_left_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(
        run.Settings(
            data=("digits",), cells=("teacher-ode-7",), out=tmp_path, dry_run=True
        )
    )
    printed = capsys.readouterr().out
    assert "0 of 5 are done; 5 are left." in printed
    assert "teacher-ode-7" in printed
    assert not (tmp_path / "results.csv").exists()


def test_as_many_seeds_as_are_named_and_one_of_real_images() -> None:
    settings = run.Settings(data=("digits",), cells=("ttur", "held-out"), seeds=7)
    seeds = [(task.cell, task.seed) for task in run.tasks_of(settings)]
    assert sorted(seeds) == [("held-out", 1), *(("ttur", i) for i in range(1, 8))]


def test_fashion_has_tables_1_and_3_alone() -> None:
    trained = {cell.name.removesuffix("-tuned") for cell in cells_of("fashion")}
    rows = {name.removesuffix("-tuned") for name in TABLES["3"] if name in CELLS}
    assert trained == rows | {"dmd2-longer"}
    # A cell that has a rate of its own is trained at that one.
    assert all(f"{cell.name}-tuned" not in CELLS for cell in cells_of("fashion"))
    assert len(cells_of("digits")) == len(CELLS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": ("dmd3",)}, "--cells dmd3: expected some of"),
        ({"seeds": 0}, "--seeds 0: expected >= 1"),
        ({"workers": 0}, "--workers 0: expected >= 1"),
    ],
)
def test_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run.Settings(**options)  # pyright: ignore[reportArgumentType]


# --- the page ---


def test_a_cell_shows_median_and_range() -> None:
    assert cell_text([3.0, 1.0, 2.04], 1) == "2.0 (1.0 ... 3.0)"
    assert cell_text([1.0, 1.0], 2) == "1.00"
    assert cell_text([], 2) == ""


def test_the_pages_numbers_are_the_files_numbers() -> None:
    text = PAGE.read_text()
    parts = Counter(re.findall(r"<!-- (table|search|critic|status)\b", text))
    assert parts["table"] >= 8
    assert parts["search"] == parts["status"] == 1
    assert parts["critic"] >= 1
    assert parts.total() == text.count("<!-- end -->")
    assert fill_page(text, Results(STUDY)) == text


def test_a_changed_number_is_noticed() -> None:
    results = Results(STUDY)
    shown = table(results, "digits", "1")
    for row in results.rows:
        row["frechet"] = str(float(row["frechet"]) + 1)
    assert table(results, "digits", "1") != shown


def test_every_row_of_the_results_has_its_measures_and_curve() -> None:
    results = Results(STUDY)
    assert results.rows
    for row in results.rows:
        assert row["nearest"], row
    points = Counter((r["data"], r["cell"], r["seed"]) for r in results.curves)
    assert points == {
        (r["data"], r["cell"], r["seed"]): 21 if CELLS[r["cell"]].has_curve else 1
        for r in results.rows
        if r["cell"] in CELLS
    }
    budgets = {r["budget"] for r in results.rows if r["cell"] in CELLS}
    assert len(budgets) <= 1, "every cell has the same budget"


def test_a_picture_of_samples_has_white_between_them() -> None:
    side, gap = 16, 2
    grid = np.zeros((6 * side, 10 * side))
    grid[side, 9 * side] = 0.5  # the corner of the last image of the second row
    page = spaced(grid)
    assert page.shape == (2 * (side + gap), 10 * (side + gap))
    assert page[side + gap, 9 * (side + gap)] == 0.5
    assert (page == 1).sum() == page.size - 2 * 10 * side**2


# --- how many critic updates ---


def curve_of(values: list[float]) -> list[dict[str, float]]:
    return [{"brightness": v, "contrast": 0.0} for v in values]


def test_a_drift_is_stable_and_coming_and_going_is_not() -> None:
    drift = curve_of([0.1 * i for i in range(20)])
    assert critic_steps.wander(drift, "brightness", 1.0) == pytest.approx(0, abs=1e-9)
    swing = curve_of([(-1.0) ** i for i in range(40)])
    # An alternation of +-1 has standard deviation 1, whatever its trend nearly.
    assert critic_steps.wander(swing, "brightness", 2.0) == pytest.approx(0.5, abs=0.01)
    early = curve_of([(-1.0) ** i for i in range(20)] + [0.0] * 20)
    assert critic_steps.wander(early, "brightness", 1.0) == 0


def test_the_smallest_stable_number_is_named() -> None:
    wanders = {
        1: {"brightness": 0.5, "contrast": 0.01},
        2: {"brightness": 0.05, "contrast": 0.3},
        5: {"brightness": 0.05, "contrast": 0.02},
        10: {"brightness": 0.01, "contrast": 0.01},
    }
    assert critic_steps.smallest_stable(wanders, 0.1) == 5
    assert critic_steps.smallest_stable(wanders, 0.001) is None


def test_the_tool_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    critic_steps.main(
        critic_steps.Settings(
            critic_steps=(1, 2),
            student_updates=8,
            samples=20,
            tolerance=1e9,
            out=tmp_path,
        )
    )
    assert "--critic-steps 1." in capsys.readouterr().out
    rows = read(tmp_path / "critic_steps_digits.csv")
    assert [(r["critic_steps"], r["stable"]) for r in rows] == [
        ("1", "True"),
        ("2", "True"),
    ]
    assert (tmp_path / "critic_steps_digits.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_steps": (0,)}, "--critic-steps: expected numbers >= 1"),
        ({"student_updates": 2}, "--student-updates 2: expected >= 8"),
        ({"tolerance": 0.0}, "--tolerance 0.0: expected > 0"),
    ],
)
def test_the_tool_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        critic_steps.Settings(**options)  # pyright: ignore[reportArgumentType]
