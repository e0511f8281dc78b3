"""Bad input is one readable line: the argument, what came and what was expected."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dmdkit._checked import checked, describe
from dmdkit.types import Condition, Denoiser, FeatureMap, Flags, Latent, PerSample, Time

HERE = Path(__file__).parent

EXPECTED = {
    "rank of x": (
        "ValueError",
        r"ScoreEstimator: `x_t` is float32\[\], expected float",
    ),
    "rank of t": (
        "ValueError",
        r"ScoreEstimator: `t` is float32\[2, 1\], expected float32\[b\] "
        r"\(beside x_t \[2, 3\]\); pass one value a sample",
    ),
    "0-d t": ("ValueError", r"`t` is float32\[\], expected float32\[b\]"),
    "batch of t": ("ValueError", r"`t` is float32\[3\], .*\(beside x_t \[2, 3\]\)"),
    "bf16 t": (
        "TypeError",
        r"`t` is bfloat16\[2\], expected float32\[b\].*`\.float\(\)` on exact numbers",
    ),
    "fp64 t": ("TypeError", r"`t` is float64\[2\], expected float32\[b\]"),
    "integer t": ("TypeError", r"`t` is int64\[2\], expected float32\[b\]"),
    "number t": ("TypeError", r"`t` is int 999, expected float32\[b\].*torch\.Tensor"),
    "None t": ("TypeError", r"`t` is None, expected float32\[b\]"),
    "list x": ("TypeError", r"`x_t` is list .*expected float\[b, \*d\]; pass a torch"),
    "numpy x": ("TypeError", r"`x_t` is ndarray, expected float\[b, \*d\]"),
    "uint8 x": ("TypeError", r"`x_t` is uint8\[2, 3\], .*convert it to a float dtype"),
    "bool x": ("TypeError", r"`x_t` is bool\[2, 3\], expected float"),
    "complex x": ("TypeError", r"`x_t` is complex64\[2, 3\], expected float"),
    "no t": ("TypeError", r"ScoreEstimator.* missing .*'t'"),
    "option": ("TypeError", r"ScoreEstimator.* unexpected .*'guidance'"),
    "score rank of t": ("ValueError", r"ScoreEstimator.score: `t` is float32\[2, 1\]"),
    "logits rank of t": ("ValueError", r"ScoreEstimator.\w+: `t` is float32\[2, 1\]"),
    "guided rank of t": ("ValueError", r"ClassifierFreeGuidance: `t` is float32\[2, 1"),
    "guided batch by keyword": ("ValueError", r"`t` is float32\[5\].*x_t \[2, 3\]"),
    "noise shape": (
        "ValueError",
        r"add_noise: `noise` is float32\[2, 1\].*x0 \[2, 3\]",
    ),
    "noise batch": ("ValueError", r"add_noise: `noise` is float32\[3, 3\]"),
    "noise dtype": (
        "TypeError",
        r"add_noise: `noise` is int64\[2, 3\], expected float",
    ),
    "x0 list": ("TypeError", r"add_noise: `x0` is list"),
    "prior t": ("ValueError", r"VarianceExploding.prior: `t` is float32\[3\]"),
    "unit prior t": ("TypeError", r"prior: `t` is int64\[2\]"),
    "output channels": (
        "ValueError",
        r"network: its output is float32\[2, 6\] for an input float32\[2, 3\]",
    ),
    "output tuple": (
        "TypeError",
        r"network: its output is tuple .*expected one tensor",
    ),
    "output None": ("TypeError", r"network: its output is None, expected one tensor"),
    "no features": ("TypeError", r"network: .*no `want`.* cannot give features"),
    "no logits": (
        "TypeError",
        r"network: .*no `want`.* cannot give logits;.*NetworkOutput",
    ),
    "no head": ("TypeError", r"network: asked for logits.*head"),
    "features missing": ("TypeError", r"network: asked for features, logits"),
    "output for logits": ("TypeError", r"network: asked for logits"),
    "unknown want": ("ValueError", r"`?want`?.*x1.*x0.*score.*features.*logits"),
    "unknown want among known": ("ValueError", r"`?want`?.*noise.*x0.*score"),
    "empty want": ("ValueError", r"want: got \[\], expected one or more of x0"),
    "string want": ("TypeError", r"`want` is str 'x0', expected a sequence of 'x0'"),
    "number want": ("TypeError", r"`want` is int 3, expected a sequence"),
    "None want": ("TypeError", r"`want` is None, expected a sequence"),
    "no want": ("TypeError", r"estimate.* missing .*'want'"),
    "network": ("TypeError", r"network: got None, expected a Module"),
    "process": ("TypeError", r"process: got str 'ddpm', expected a NoiseProcess"),
    "process class": (
        "TypeError",
        r"process: got the class VarianceExploding, expected",
    ),
    "parameterization": (
        "TypeError",
        r"parameterization: got str 'eps', expected a Par",
    ),
    "singular": ("ValueError", r"parameterization: KarrasPreconditioning .*alpha = 0"),
    "table": (
        "TypeError",
        r"alphas_cumprod: got list, expected a tuple.*from_alphas_c",
    ),
    "time number": (
        "ValueError",
        r"time: got nan, expected a whole index in 0 \.\.\. 99",
    ),
    "structure": (
        "ValueError",
        r"cond: its structure is .*'text'.*`unconditional` must",
    ),
    "real denoiser": ("TypeError", r"`real` is Network, expected Denoiser; .*process"),
    "fake denoiser": ("TypeError", r"`fake` is DataParallel, expected Denoiser"),
    "no denoiser": ("TypeError", r"DenoisingLoss.* missing .*'denoiser'"),
    "processes": ("ValueError", r"fake: its process RectifiedFlow differs .*real"),
    "tables": ("ValueError", r"fake: its process .*differs .*numbers"),
    "no gradient": ("ValueError", r"x: it carries no gradient"),
    "gan no gradient": ("ValueError", r"x: it carries no gradient"),
    "discriminator": (
        "TypeError",
        r"`discriminator` is Network, expected Discriminator",
    ),
    "loss t": ("ValueError", r"DenoisingLoss: `t` is float32\[2, 1\], .*\(beside x \["),
    "loss integer t": ("TypeError", r"DistributionMatchingLoss: `t` is int64\[2\]"),
    "loss noise": ("ValueError", r"`noise` is float32\[2, 4\], .*or None .*x \[2, 3\]"),
    "loss x": ("TypeError", r"DenoisingLoss: `x` is int64\[2, 3\], expected float"),
    "generator": ("TypeError", r"`generator` is int 3, expected Generator or None"),
    "generator device": ("ValueError", r"generator: it lives on cpu, .* on meta"),
    "loss option": ("TypeError", r"DenoisingLoss.* unexpected .*'weight'"),
    "normalizer": ("TypeError", r"`normalizer` is int 3, expected Callable"),
    "times tuple": ("TypeError", r"times: got tuple.*a time sampler such as"),
    "times class": ("TypeError", r"times: got the class UniformTime.*such as"),
    "weight None": ("TypeError", r"weight: got None, expected a function such as snr"),
    "normalizer field": ("TypeError", r"normalizer: got int 3, expected a function"),
    "unconditional": ("TypeError", r"unconditional: got float32.*expected a function"),
    "frozen": ("TypeError", r"modules: got int, expected modules"),
    "head class": ("TypeError", r"head: got the class Linear, expected a module"),
    "outputs for losses": ("TypeError", r"`distribution_matching` is dict"),
    "column of logits": ("ValueError", r"head: it gave float32\[2, 1\] for 2 samples"),
    "dict for want": ("TypeError", r"network: asked for features it gave dict"),
    "index for a flow": (
        "ValueError",
        r"times: DiscreteUniformTime.* draws whole indices; RectifiedFlow has cont",
    ),
}


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@functools.cache
def outcomes() -> dict[str, list[str] | None]:
    """What an ordinary script meets; one process for all mistakes."""
    return json.loads(run(str(HERE / "script_bad_input.py")))


def test_every_mistake_is_expected_here() -> None:
    assert list(outcomes()) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_mistake_is_one_readable_line(name: str) -> None:
    outcome = outcomes()[name]
    assert outcome is not None, "no error at all"
    kind, message = outcome
    expected_kind, pattern = EXPECTED[name]
    assert kind == expected_kind, message
    assert re.search(pattern, message), message
    assert "\n" not in message
    assert len(message) < 300


def test_importing_dmdkit_is_light() -> None:
    heavy = ["diffusers", "torchvision", "timm", "lpips", "transformers", "peft"]
    heavy += ["sklearn", "matplotlib", "scipy", "tensorboard", "torch._dynamo"]
    heavy += ["open_clip", "torch_fidelity", "huggingface_hub"]
    program = (
        "import json, sys, dmdkit; "
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    assert json.loads(run("-c", program)) == []


class Piece:
    """Something public with every kind of argument."""

    @checked
    def __call__(self, x: Latent, t: Time | None = None, *, label: str = "") -> Latent:
        return x if t is None else x * t[:, None]

    @checked
    def weigh(self, x: Latent, weight: PerSample, flags: Flags | None = None) -> Latent:
        del flags
        return x * weight[:, None]

    @classmethod
    @checked
    def make(cls, x: Latent) -> Latent:
        return x

    @staticmethod
    @checked
    def still(x: Latent) -> Latent:
        return x


@checked
def loosely(a, b: Any, cond: Condition = None, *more: int, **options: Any) -> Any:
    return (a, b, cond, more, options)


@checked
def choose(
    mode: Literal["one", "two"] = "one",
    modes: Sequence[Literal["a", "b"]] = (),
    scale: float | int = 1,
    features: FeatureMap | None = None,
    then: Callable[[Tensor], Tensor] | None = None,
    denoiser: Denoiser | None = None,
) -> str:
    """Picks."""
    return mode


anything: Any = choose


def test_good_calls_pass_in_every_form() -> None:
    piece, x, t = Piece(), torch.ones(2, 3), torch.ones(2)
    for answer in (
        piece(x),
        piece(x, None),
        piece(x, t),
        piece(x=x, t=t, label="a"),
        piece.weigh(x, weight=t.bfloat16(), flags=t > 0),
        Piece.weigh(piece, x, t.double(), None),
        Piece.make(x),
        Piece.make(x=x),
        piece.still(x),
    ):
        assert torch.equal(answer.float(), x)
    assert loosely(1, "b") == (1, "b", None, (), {})
    assert loosely(1, None, None, 4, c=x)[4] == {"c": x}
    assert choose() == "one"
    assert choose("two", ("a", "b"), 0.5, torch.ones(1, 2, 3, 4), torch.exp) == "two"


def test_what_a_function_is_stays_visible() -> None:
    assert choose.__name__ == "choose"
    assert choose.__doc__ == "Picks."
    assert Piece.weigh.__qualname__ == "Piece.weigh"


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda p, x: p(x, x), ValueError, "Piece: `t` is float32[2, 3], expected"),
        (
            lambda p, x: p(x, x[:, 0].long()),
            TypeError,
            "is int64[2], expected float32[b] or None (beside x [2, 3]); use "
            "`.float()` on exact numbers: bf16 has rounded them already.",
        ),
        (lambda p, x: p(x, t=[1.0]), TypeError, "`t` is list [float 1.0], expected"),
        (lambda p, x: p(x, label=3), TypeError, "`label` is int 3, expected str."),
        (
            lambda p, x: p.weigh(x, torch.ones(3)),
            ValueError,
            "Piece.weigh: `weight` is float32[3], expected float[b] (beside x [2, 3])",
        ),
        (
            lambda p, x: p.weigh(x, x[:, 0], x[:, 0]),
            TypeError,
            "`flags` is float32[2], expected bool[b] or None (beside x [2, 3], weight "
            "[2]); convert it to a bool dtype.",
        ),
        (lambda p, x: p.make(x.int()), TypeError, "Piece.make: `x` is int32[2, 3]"),
        (lambda p, x: p.still(None), TypeError, "Piece.still: `x` is None, expected"),
        (
            lambda p, x: anything("three"),
            ValueError,
            "choose: `mode` is str 'three', expected 'one' or 'two'.",
        ),
        (
            lambda p, x: anything(3),
            TypeError,
            "`mode` is int 3, expected 'one' or 'two'.",
        ),
        (
            lambda p, x: anything(modes=["c"]),
            ValueError,
            "`modes` is list ['c'], expected a sequence of 'a' or 'b'.",
        ),
        (
            lambda p, x: anything(modes=[3]),
            TypeError,
            "`modes` is list [int 3], expected",
        ),
        (
            lambda p, x: anything(scale="1"),
            TypeError,
            "str '1', expected float or int.",
        ),
        (
            lambda p, x: anything(features=x),
            ValueError,
            "`features` is float32[2, 3], expected float[b, c, h, w] or None; ",
        ),
        (
            lambda p, x: anything(then=3),
            TypeError,
            "is int 3, expected Callable or None.",
        ),
        (
            lambda p, x: anything(denoiser=torch.nn.Linear),
            TypeError,
            "`denoiser` is the class Linear, expected Denoiser or None; a denoiser has",
        ),
        (
            lambda p, x: anything(wrong=1),
            TypeError,
            "choose() got an unexpected keyword",
        ),
        (lambda p, x: p(), TypeError, "Piece.__call__() missing 1 required positional"),
    ],
)
def test_bad_calls_are_told_in_every_form(
    call: Callable[[Any, Tensor], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call(Piece(), torch.ones(2, 3))
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind


def test_one_name_is_one_length_within_a_call_and_not_across_calls() -> None:
    @checked
    def meet(x: Latent, y: Latent) -> int:
        return len(x) + len(y)

    for shape in ((2, 3), (5, 4), (1, 1, 1), (7,)):
        assert meet(torch.ones(shape), torch.ones(shape)) == 2 * shape[0]
    for y in (
        torch.ones(2, 1),
        torch.ones(1, 3),
        torch.ones(3, 2),
        torch.ones(2, 3, 1),
    ):
        with pytest.raises(
            ValueError, match=r"^.*meet: `y` is .*\(beside x \[2, 3\]\)"
        ):
            meet(torch.ones(2, 3), y)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, 3), "float32[2, 3]"),
        (torch.ones((), dtype=torch.int64), "int64[]"),
        (None, "None"),
        (True, "bool True"),
        (2.5, "float 2.5"),
        ("a", "str 'a'"),
        (["a", 1, None], "list ['a', int 1, None]"),
        ((torch.ones(2),), "tuple [float32[2]]"),
        (list(range(100)), "list"),
        ({"a": 1}, "dict"),
        (dict, "the class dict"),
    ],
    ids=str,
)
def test_values_are_described_in_a_few_words(value: object, words: str) -> None:
    assert describe(value) == words
