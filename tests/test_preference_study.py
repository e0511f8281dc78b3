"""A study from folders to rates, its page clicked through in a real browser."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import preference_rates
import preference_study
import pytest
import tyro
from helpers_browser import Page, browser
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from preference_rates import rates_of, read_answers, read_study, wilson
from sample_models import Picture
from sample_text import save_prompts
from scipy.stats import binom, binomtest

PROMPTS = ["a cat", 'two "dogs" </script> & <b>', "ein Vogel, größer", "a fox", "a cow"]


def folder(path: Path, level: int, prompts: list[str] = PROMPTS) -> Path:
    """Images as `sample.py --out` writes them: image i of a model is level + i."""
    path.mkdir(parents=True)
    for i in range(len(prompts)):
        info = PngInfo()
        info.add_text("model", path.name)
        image = Image.new("RGB", (32, 24), (level + i, 60, 200))
        image.save(path / f"{i:06d}.png", pnginfo=info)
    save_prompts([Picture(p, i) for i, p in enumerate(prompts)], path / "prompts.jsonl")
    return path


def study(top: Path, prompts: list[str] = PROMPTS, **options: Any) -> Path:
    a = folder(top / "our-student", 10, prompts)
    b = folder(top / "their-teacher", 110, prompts)
    settings = {"quality": None, "max_side": 16, **options}
    preference_study.main(
        preference_study.Settings(a=a, b=b, out=top / "study", **settings)
    )
    return top / "study"


def key_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "study.json").read_text())


def shown(path: Path) -> dict[str, Any]:
    """What the page holds."""
    found = re.search('id="study">(.*?)</script>', (path / "study.html").read_text())
    assert found
    return json.loads(found[1])


def decode(page: Page, address: str) -> list[int]:
    """The middle pixel of an image as a browser shows it."""
    image = f"Object.assign(new Image(), {{src: {json.dumps(address)}}})"
    script = (
        f"(async () => {{ const i = {image}; await i.decode();"
        "const c = new OffscreenCanvas(i.naturalWidth, i.naturalHeight);"
        "const x = c.getContext('2d'); x.drawImage(i, 0, 0);"
        "return [c.width, c.height, ...x.getImageData(8, 6, 1, 1).data]; })()"
    )
    found = page.call(
        *("Runtime.evaluate",),
        **{"expression": script, "returnByValue": True, "awaitPromise": True},
    )
    return found["result"]["value"]


def saved(path: Path, rater: str, sides: dict[str, Any], top: Path, **other) -> Path:
    """A file of answers such as the page saves."""
    content = {
        "format": preference_rates.ANSWERS_FORMAT,
        "study": key_of(path)["study"],
        "rater": rater,
        "consent": True,
        "answers": sides,
        **other,
    }
    file = top / f"{rater.strip()}-{len(list(top.iterdir()))}.json"
    file.write_text(json.dumps(content))
    return file


def analyse(path: Path, *files: Path, **options: Any) -> dict[str, Any]:
    return preference_rates.analyse(
        preference_rates.Settings(study=path, answers=files, **options)
    )


# -- the study


@pytest.mark.parametrize("count", [1, 2, 7, 128])
@pytest.mark.parametrize("seed", range(5))
def test_sides_are_balanced_and_every_pair_is_shown_once(count: int, seed: int) -> None:
    pairs = preference_study.order_and_sides(count, seed)
    assert sorted(index for index, _ in pairs) == list(range(count))
    on_left = [side for _, side in pairs].count("a")
    assert on_left in (count // 2, count - count // 2)
    assert pairs == preference_study.order_and_sides(count, seed)


def test_sides_are_random_and_do_not_follow_the_order() -> None:
    draws = [preference_study.order_and_sides(5, seed) for seed in range(400)]
    for index in range(5):
        first = sum(pairs[0][0] == index for pairs in draws)
        left = sum(dict(pairs)[index] == "a" for pairs in draws)
        assert 40 < first < 130  # 80 expected, deviation 8
        assert 150 < left < 250  # 200 expected, deviation 10
    # Of two "a" and three "b", or the reverse, neighbours are equal 2 times in 5.
    equal = sum(pairs[0][1] == pairs[1][1] for pairs in draws)
    assert 110 < equal < 210  # 160 expected, deviation 10


def test_the_page_says_nothing_of_the_models(tmp_path: Path) -> None:
    path = study(tmp_path)
    page = (path / "study.html").read_text()
    for word in ("our-student", "their-teacher", "sha256", "000000.png", '"seed"'):
        assert word in (path / "study.json").read_text()
        assert word not in page
    assert "http:" not in page
    assert "https:" not in page
    content = shown(path)
    assert content.keys() == {"study", "questions", "pairs"}
    for pair in content["pairs"]:
        assert pair.keys() == {"id", "prompt", "left", "right"}
    assert [p["id"] for p in content["pairs"]] == [f"{i:04d}" for i in range(1, 6)]
    assert sorted(p["prompt"] for p in content["pairs"]) == sorted(PROMPTS)


def test_images_are_encoded_anew(tmp_path: Path) -> None:
    image = folder(tmp_path / "secret", 10) / "000000.png"
    for quality in (90, None):
        encoded = preference_study.to_webp(image, 64, quality)
        assert b"secret" in image.read_bytes()
        assert b"secret" not in encoded
    alpha = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    alpha.save(tmp_path / "alpha.png")
    encoded = preference_study.to_webp(tmp_path / "alpha.png", 4, None)
    (tmp_path / "made.webp").write_bytes(encoded)
    with Image.open(tmp_path / "made.webp") as made:
        assert made.size == (4, 4)
        assert made.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_a_study_is_the_same_again_and_its_id_is_of_its_content(tmp_path: Path) -> None:
    first = study(tmp_path / "1")
    again = study(tmp_path / "2")
    for name in ("study.html", "study.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    seeded = study(tmp_path / "3", seed=1)
    other = study(tmp_path / "4", [*PROMPTS[:4], "a dog"])
    ids = {key_of(path)["study"] for path in (first, again, seeded, other)}
    assert len(ids) == 3


def test_inputs_that_are_refused(tmp_path: Path, capsys) -> None:
    a = folder(tmp_path / "a", 1)
    make = preference_study.main

    def settings(b: Path, **options: Any) -> preference_study.Settings:
        out = tmp_path / "study"
        return preference_study.Settings(**{"a": a, "b": b, "out": out, **options})

    with pytest.raises(SystemExit, match=r"B: there is no .*nowhere.*; name a folder"):
        make(settings(tmp_path / "nowhere"))
    fewer = folder(tmp_path / "fewer", 1, PROMPTS[:3])
    with pytest.raises(SystemExit, match="A, B: 5 and 3 images"):
        make(settings(fewer))
    other = folder(tmp_path / "other", 1, [*PROMPTS[:4], "a dog"])
    with pytest.raises(SystemExit, match="differs in line 5: 'a cow' and 'a dog'"):
        make(settings(other))
    b = folder(tmp_path / "b", 1)
    (b / "000002.png").write_text("no image")
    with pytest.raises(SystemExit, match=r"000002.png: cannot identify image file\."):
        make(settings(b))
    (b / "000002.png").unlink()
    with pytest.raises(SystemExit, match=r"B: .*line 3: there is no image .*000002"):
        make(settings(b))
    listing = a / "prompts.jsonl"
    lines = listing.read_text().splitlines()
    c = folder(tmp_path / "c", 1)
    for content, message in (
        ("", "lists no images"),
        ("\n".join([*lines, lines[0]]), "lists 1 images twice"),
        ('{"file": "000000.png"}', "prompt"),
        ('{"file": "000000.png", "prompt": " "}', "line 1: it has no prompt"),
        ("no json", "B: "),
    ):
        (c / "prompts.jsonl").write_text(content)
        with pytest.raises(SystemExit, match=message) as caught:
            make(settings(c))
        assert "\n" not in str(caught.value)
    d = folder(tmp_path / "d", 1)
    for option, value in (("max_side", 0), ("max_side", 20000), ("quality", 0)):
        flag = f"--{option.replace('_', '-')} {value}"
        with pytest.raises(SystemExit, match=flag):
            make(settings(d, **{option: value}))
    for name in ("", "a"):
        with pytest.raises(SystemExit, match="expected two names"):
            make(settings(d, name_b=name))
    with pytest.raises(SystemExit, match=r"--out: .* exists"):
        make(settings(d, out=d))
    capsys.readouterr()
    make(settings(d, name_a="x", name_b="y"))
    out = capsys.readouterr().out
    assert re.search("5 pairs of x and y; on the left is x in [23], y in [23]", out)
    assert "the paper's study has 128 pairs, this one has 5" in out
    assert not list(tmp_path.glob(".*partial"))


# -- the rates


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 7), (3, 7), (128, 128)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(0.95, "wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_keeps_its_level() -> None:
    # Its coverage over all outcomes, averaged over rates.
    n = 40
    ends = np.array([wilson(k / n, n) for k in range(n + 1)])
    rates = np.linspace(0.02, 0.98, 97)[:, None]
    inside = (ends[:, 0] <= rates) & (rates <= ends[:, 1])
    covered = (inside * binom.pmf(np.arange(n + 1), n, rates)).sum(1)
    assert covered.mean() == pytest.approx(0.95, abs=0.01)
    assert covered.min() > 0.9


def side_of(path: Path, pair: int, model: str) -> str:
    return "left" if key_of(path)["pairs"][pair]["left"] == model else "right"


def test_rates_by_hand(tmp_path: Path, capsys) -> None:
    path, answers = study(tmp_path), tmp_path / "answers"
    answers.mkdir()
    ids = [pair["id"] for pair in key_of(path)["pairs"]]

    def sides(quality: str, alignment: str) -> dict[str, dict[str, str]]:
        given: dict[str, dict[str, str]] = {}
        for question, models in (("quality", quality), ("alignment", alignment)):
            for i, model in enumerate(models):
                if model in "ab":
                    given.setdefault(ids[i], {})[question] = side_of(path, i, model)
        return given

    files = [
        saved(path, "Anna", sides("aaaab", "bbbbb"), answers),
        saved(path, "Ben", sides("aab..", "ba..."), answers),
        saved(path, "Cleo", sides("aabb.", "bb..."), answers),
    ]
    found = analyse(path, *files, json=tmp_path / "rates.json")
    quality, alignment = found["questions"].values()
    # 12 answers, for A: 4 + 2 + 2; pair by pair: 3, 3, 1 of 3, 1 of 2, 0 of 1.
    assert [quality[n] for n in ("for_a", "answers", "unanswered")] == [8, 12, 3]
    assert quality["rate"] == 8 / 12
    assert quality["pairs_won"] == {"a": 2, "b": 2, "even": 1}
    assert quality["over_answers"] == pytest.approx(
        binomtest(8, 12).proportion_ci(method="wilson")
    )
    # 8 of 12 over 5 pairs: Wilson's formula, by hand.
    z, p = 1.959963984540054, 2 / 3
    half = z * (p * (1 - p) / 5 + z * z / 100) ** 0.5 / (1 + z * z / 5)
    middle = (p + z * z / 10) / (1 + z * z / 5)
    assert quality["over_pairs"] == pytest.approx((middle - half, middle + half))
    assert alignment["rate"] == 1 / 9
    assert alignment["pairs_won"] == {"a": 0, "b": 5, "even": 0}
    by_rater = {n: (r["rate"], r["unanswered"]) for n, r in quality["raters"].items()}
    assert by_rater == {"Anna": (4 / 5, 0), "Ben": (2 / 3, 2), "Cleo": (0.5, 1)}
    left = [pair["left"] == "a" for pair in key_of(path)["pairs"]]
    expected = sum(left[:4]) + (not left[4])
    assert quality["raters"]["Anna"]["left"] == expected
    assert json.loads((tmp_path / "rates.json").read_text()) == json.loads(
        json.dumps(found)
    )
    out = capsys.readouterr().out
    assert re.search(r"all +66.7% +39.1% to 86.2% +12 +3 ", out)
    assert "Pairs won: 2 by A, 2 by B, 1 even." in out
    assert "asks 5 raters about each pair; here a pair has 1 answers" in out


def test_exchanged_models_have_exchanged_rates(tmp_path: Path) -> None:
    path = study(tmp_path)
    key = read_study(path)
    swapped = {**key, "pairs": [dict(pair) for pair in key["pairs"]]}
    for pair in swapped["pairs"]:
        pair["left"] = {"a": "b", "b": "a"}[pair["left"]]
    sides = {pair["id"]: {"quality": "left"} for pair in key["pairs"][:4]}
    given = [read_answers(saved(path, "r", sides, tmp_path), key)]
    one = rates_of(key, given)["questions"]["quality"]
    two = rates_of(swapped, given)["questions"]["quality"]
    assert one["rate"] == pytest.approx(1 - two["rate"])
    assert one["over_pairs"] == pytest.approx([1 - x for x in two["over_pairs"][::-1]])
    assert one["left"] == two["left"] == 4


def test_a_question_that_nobody_answered(tmp_path: Path, capsys) -> None:
    path = study(tmp_path)
    file = saved(path, "r", {"0001": {"quality": "left"}}, tmp_path)
    found = analyse(path, file, plot=tmp_path / "p.png")
    assert found["questions"]["alignment"]["rate"] is None
    assert re.search(r"all +- +- +0 +5 +-", capsys.readouterr().out)


def test_answers_that_are_refused(tmp_path: Path) -> None:
    path = study(tmp_path)
    good = {"0001": {"quality": "left"}}

    def refused(message: str, *files: Path, **options: Any) -> None:
        with pytest.raises(SystemExit, match=message) as caught:
            analyse(path, *files, **options)
        assert "\n" not in str(caught.value)

    anna = saved(path, "Anna", good, tmp_path)
    analyse(path, anna)
    refused("both of rater 'anna'", anna, saved(path, "anna ", good, tmp_path))
    refused("of study 0000", saved(path, "x", good, tmp_path, study="0" * 64))
    refused("no pair '0006'", saved(path, "x", {"0006": {}}, tmp_path))
    refused("no rater", saved(path, " ", good, tmp_path))
    refused("no rater", saved(path, "x", good, tmp_path, answers=[]))
    refused("nothing is answered", saved(path, "x", {"0001": {}}, tmp_path))
    refused("did not consent", saved(path, "x", good, tmp_path, consent=False))
    for given in ({"quality": "both"}, {"quality": None}, {"beauty": "left"}):
        refused("pair 0001: '", saved(path, "x", {"0001": given}, tmp_path))
    refused("no sides by question", saved(path, "x", {"0001": "left"}, tmp_path))
    refused("its format is 'x'", saved(path, "x", good, tmp_path, format="x"))
    (tmp_path / "no.json").write_text("{")
    refused("cannot be read", tmp_path / "no.json")
    refused("cannot be read", tmp_path / "nowhere.json")
    refused("expected at least one")
    refused("--plot .*expected .png", anna, plot=tmp_path / "rates.gif")
    refused("give --plot", anna, beside=(anna,))
    refused("--beside .*its format", anna, beside=(anna,), plot=tmp_path / "p.png")
    key = key_of(path)
    first = key["pairs"][0]
    first["left"] = {"a": "b", "b": "a"}[first["left"]]
    (path / "study.json").write_text(json.dumps(key))
    refused("changed after it was made", anna)


def test_a_plot_of_two_studies(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        path = study(tmp_path / str(seed), seed=seed)
        sides = {
            pair["id"]: {"quality": pair_side(pair, "a"), "alignment": "left"}
            for pair in key_of(path)["pairs"]
        }
        found.append((path, saved(path, "r", sides, tmp_path)))
    analyse(*found[0], json=tmp_path / "first.json")
    analyse(*found[1], plot=tmp_path / "p.png", beside=(tmp_path / "first.json",))
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = (np.abs(pixels - (0x3B, 0x6F, 0xB6)).sum(-1) < 6).sum(0)
    half = len(blue) // 2
    # Always A in the first panel; in the second, sides that say nothing.
    assert (blue[:half] > 0).sum() > 1.5 * (blue[half:] > 0).sum() > 0


def pair_side(pair: dict[str, Any], model: str) -> str:
    return "left" if pair["left"] == model else "right"


def test_the_command_lines(tmp_path: Path) -> None:
    made = tyro.cli(preference_study.Settings, args=["a", "b", "out", "--quality", "9"])
    assert (made.a, made.quality) == (Path("a"), 9)
    script = Path(preference_rates.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "x.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "STUDY" in done.stderr


# -- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def visible(page: Page) -> set[str]:
    parts = ("start", "pair", "end")
    return {p for p in parts if not page.run(f"document.getElementById('{p}').hidden")}


def text(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def begin(page: Page, path: Path, rater: str, top: Path) -> str:
    """Opens the page and starts as a rater; gives the address."""
    address = (path / "study.html").as_uri()
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(top))
    page.open(f"{address}?rater={rater}")
    page.run("localStorage.clear()")
    page.open(f"{address}?rater={rater}")
    assert visible(page) == {"start"}
    page.click("#start button")
    assert visible(page) == {"start"}, "without consent nothing starts"
    page.click("#consent")
    page.click("#start button")
    assert visible(page) == {"pair"}
    return address


def download(page: Page, top: Path) -> Path:
    page.events.clear()
    page.click("#save")
    name = page.wait_for("Page.downloadWillBegin")["suggestedFilename"]
    while page.wait_for("Page.downloadProgress")["state"] != "completed":
        pass
    return top / name


def buttons(question: str, side: str) -> str:
    return f"#question-{question} button[data-side={side}]"


def test_clicked_through_with_a_reload_and_analysed(page: Page, tmp_path: Path) -> None:
    path, downloads = study(tmp_path), tmp_path / "downloads"
    downloads.mkdir()
    key = key_of(path)
    address = begin(page, path, "Ännä", downloads)
    # A is more appealing in the pairs 0, 2, 3; it fits the prompt in the last alone.
    wanted = {"quality": "abaab", "alignment": "bbbba"}
    for place, pair in enumerate(key["pairs"]):
        assert text(page, "#prompt") == f"“{pair['prompt']}”"
        assert text(page, "#count") == f"{place} of 5"
        for side in ("left", "right"):
            source = page.run(f"document.querySelector('[data-side={side}] img').src")
            width, height, red, *_ = decode(page, source)
            assert (width, height) == (16, 12)
            model = "a" if (side == "left") == (pair["left"] == "a") else "b"
            index = PROMPTS.index(pair["prompt"])
            assert red == {"a": 10, "b": 110}[model] + index
        assert page.run("document.getElementById('next').disabled")
        wrong, side = (
            ("left", "right")
            if pair_side(pair, wanted["quality"][place]) == "right"
            else ("right", "left")
        )
        page.click(buttons("quality", wrong))
        page.click(buttons("quality", side))
        if place == 2:  # half a pair is answered
            page.open(address)
            assert visible(page) == {"pair"}
            assert text(page, "#prompt") == f"“{pair['prompt']}”"
            pressed = f"document.querySelector('{buttons('quality', side)}')"
            assert page.run(f"{pressed}.ariaPressed") == "true"
        page.click(buttons("alignment", pair_side(pair, wanted["alignment"][place])))
        page.click("#next")
    assert visible(page) == {"end"}
    assert "all 5 pairs" in text(page, "#end")
    page.open(address)
    assert visible(page) == {"end"}, "the end outlives a reload too"
    file = download(page, downloads)
    assert file.name == f"answers-{key['study'][:8]}-Ännä.json"
    content = json.loads(file.read_text("utf-8"))
    assert content["consent"] is True
    found = analyse(path, file)
    assert {n: q["for_a"] for n, q in found["questions"].items()} == {
        "quality": 3,
        "alignment": 1,
    }
    assert found["questions"]["quality"]["rate"] == 3 / 5
    assert found["questions"]["alignment"]["unanswered"] == 0
    assert list(found["questions"]["quality"]["raters"]) == ["Ännä"]
    requests = [e for e in page.events if e["method"] == "Network.requestWillBeSent"]
    urls = [e["params"]["request"]["url"] for e in requests]
    assert all(u.startswith(("file:", "data:", "blob:")) for u in urls)


def test_by_keys_stopped_and_saved(page: Page, tmp_path: Path) -> None:
    path = study(tmp_path)
    begin(page, path, "ben", tmp_path)
    page.key("Enter")  # nothing is answered yet
    assert text(page, "#count") == "0 of 5"
    for name in ("ArrowLeft", "ArrowRight", "Enter", "ArrowRight"):
        page.key(name)
    assert page.run("state.at") == 1
    page.key("Backspace")
    assert page.run("state.at") == 0
    page.click(buttons("quality", "right"))
    page.key("Enter")  # the button that was clicked has the focus
    assert page.run("state.at") == 1
    page.click(".image[data-side=left]")
    assert page.run("document.getElementById('large').open")
    page.key("ArrowRight")
    large = "document.querySelector('#large img').src"
    assert page.run(f"{large} === pairs[1].right")
    page.key("Escape")
    assert not page.run("document.getElementById('large').open")
    page.click("#stop")
    assert "You answered 1 of 5 pairs" in text(page, "#end")
    file = download(page, tmp_path)
    assert json.loads(file.read_text())["answers"] == {
        "0001": {"quality": "right", "alignment": "right"},
        "0002": {"quality": "right"},
    }
    found = analyse(path, file)["questions"]
    assert [q["unanswered"] for q in found.values()] == [3, 4]
    page.click("#return")
    assert page.run("state.at") == 1


def test_a_hidden_button_has_no_focus(page: Page, tmp_path: Path) -> None:
    begin(page, study(tmp_path), "ben", tmp_path)
    for button in ("stop", "return", "stop"):
        # In one script, and so before the browser's next frame.
        press = f"$('{button}').focus(), $('{button}').click()"
        assert page.run(f"{press}, document.activeElement === document.body"), button


def test_studies_do_not_share_answers(page: Page, tmp_path: Path) -> None:
    one, two = study(tmp_path / "1"), study(tmp_path / "2", seed=1)
    begin(page, one, "r", tmp_path)
    page.key("ArrowLeft")
    page.open((two / "study.html").as_uri())
    assert visible(page) == {"start"}
    page.open((one / "study.html").as_uri())
    assert page.run("state.answers") == {"0001": {"quality": "left"}}


def test_on_a_phone_nothing_is_cut_off(page: Page, tmp_path: Path) -> None:
    path = study(tmp_path, ["a" * 200, "a dog"])
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    begin(page, path, "r", tmp_path)
    page.run("goTo(pairs.findIndex((p) => p.prompt.length > 100))")
    assert page.run("document.documentElement.scrollWidth") == 360
    boxes = page.run(
        "[...document.querySelectorAll('#pair button')].map("
        "(b) => { const r = b.getBoundingClientRect();"
        "return [r.left, r.right, r.height]; })"
    )
    for left, right, height in boxes:
        assert 0 <= left < right <= 360
        assert height >= 40
    page.call("Emulation.clearDeviceMetricsOverride")
