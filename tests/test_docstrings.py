"""Docstrings of everything public: arguments, shapes, errors, sources.

The rule. A public function names every argument under Args, says what it returns and
what it raises; a public class does so for its constructor, or states the range of each
field that it checks; a tensor's text says its shape. A method may be one line where a
method of the same name and arguments elsewhere has the sections: its contract. What is
mathematics says where it comes from, itself or in its module.
"""

import ast
import logging
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from helpers_docs import ROOT, documented

TENSORS = re.compile(
    r"\b(Latent|RealLatent|Time|RealTime|PerSample|Flags|Logits|FeatureMap|Draws"
    r"|Float\w*|Integer|Bool)\b"
)
SHAPED = re.compile(r"\[|\bshape|\bscalar|\bas `|\b[Tt]heir\b|\bone (number|a)\b")
UNUSED = re.compile(r"\A(Not (looked at|used)|Ignored)")
RANGED = re.compile(r"[<>]|\[|at least|one of|within|positive|\.\.\.")
SOURCES = re.compile(r"arXiv|DMD2?\b|Eq\.|Appendix|Source:|[Oo]fficial")
OF_THE_PAPER = (
    "dmdkit.diffusion.",
    "dmdkit.losses.",
    "dmdkit.sampling.",
    "dmdkit.discriminators.",
)


@cache
def package() -> Any:
    """The package as griffe reads it, without importing it."""
    logging.getLogger("griffe").setLevel(logging.CRITICAL)
    return griffe.load("dmdkit", search_paths=[ROOT], docstring_parser="google")


def resolved(name: str) -> Any:
    """What a full name stands for."""
    found = package()[name.removeprefix("dmdkit.")]
    return found.final_target if found.is_alias else found


def is_public(name: str) -> bool:
    return name == "__call__" or not name.startswith("_")


@cache
def things() -> dict[str, Any]:
    """Everything on the API pages by full name, with the members of classes."""

    def walk(thing: Any) -> Iterator[Any]:
        yield thing
        if thing.is_module or thing.is_class:
            for name, member in thing.members.items():
                if not member.is_alias and is_public(name):
                    yield from walk(member)

    found: dict[str, Any] = {}
    for name in sorted(documented()):
        thing = resolved(name)
        shown = [thing] if thing.is_module and name != "dmdkit.types" else walk(thing)
        found |= {part.path: part for part in shown}
    return found


def sections(thing: Any) -> dict[str, Any]:
    """The parsed sections of a docstring by kind."""
    assert thing.docstring is not None, f"{thing.path} has no docstring"
    return {section.kind.value: section.value for section in thing.docstring.parsed}


def described(thing: Any, *kinds: str) -> dict[str, str]:
    """What a docstring says of arguments or attributes, by name."""
    found = sections(thing)
    parts = [part for kind in kinds for part in found.get(kind, [])]
    return {part.name.lstrip("*"): part.description for part in parts}


def arguments(function: Any) -> dict[str, str]:
    """The arguments of a function and their annotations."""
    return {
        parameter.name.lstrip("*"): str(parameter.annotation)
        for parameter in function.parameters
        if parameter.name not in ("self", "cls")
    }


def raises(function: Any) -> bool:
    """Whether a function's own body raises something."""
    tree = ast.parse(textwrap.dedent(function.source))
    return any(isinstance(n, ast.Raise) and n.exc is not None for n in ast.walk(tree))


def what_lacks(function: Any) -> list[str]:
    """The sections and texts that a function's docstring should have and has not."""
    found, told = sections(function), described(function, "parameters")
    lacking = []
    for name, annotation in arguments(function).items():
        if name not in told:
            lacking.append(f"Args: {name}")
        elif TENSORS.search(annotation) and not (
            SHAPED.search(told[name]) or UNUSED.search(told[name])
        ):
            lacking.append(f"Args: the shape of {name}")
    gives = str(function.returns or "None") not in ("None", "Iterator[None]")
    if gives and not found.keys() & {"returns", "yields"}:
        lacking.append("Returns")
    if raises(function) and "raises" not in found:
        lacking.append("Raises")
    return lacking


def is_signature(function: Any) -> bool:
    """Whether it only declares, for type checkers, what `forward` documents."""
    return function.docstring.value.startswith("The signature of `forward`")


@cache
def contracts() -> set[tuple[str, tuple[str, ...]]]:
    """Names and arguments of the methods whose docstrings have all sections."""
    return {
        (thing.name, tuple(arguments(thing)))
        for thing in things().values()
        if thing.is_function and thing.docstring and not what_lacks(thing)
    }


def is_field(thing: Any) -> bool:
    """Whether it is a field of a dataclass or a tuple, which its class explains."""
    return (
        thing.is_attribute
        and thing.parent.is_class
        and "instance-attribute" in thing.labels
    )


def test_everything_public_has_a_docstring() -> None:
    bare = []
    for name, thing in things().items():
        if not is_field(thing):
            overrides = thing.is_attribute and "property" not in thing.labels
            if not thing.docstring and not overrides:
                bare.append(name)
        elif "__init__" not in thing.parent.members:
            told = described(thing.parent, "attributes", "parameters")
            if not thing.docstring and thing.name not in told:
                bare.append(name)
    assert bare == []


def test_functions_say_what_they_take_give_and_refuse() -> None:
    lacking = {}
    for name, function in things().items():
        if not function.is_function or is_signature(function):
            continue
        has_contract = (function.name, tuple(arguments(function))) in contracts()
        short = has_contract and len(sections(function)) == 1
        if not short and (lacks := what_lacks(function)):
            lacking[name] = lacks
    assert lacking == {}


def fields_looked_at(method: Any) -> set[str]:
    """The names in the conditions of a constructor and in the loops around them."""
    tree = ast.parse(textwrap.dedent(method.source))
    looked_at = [n.test for n in ast.walk(tree) if isinstance(n, ast.If)]
    looked_at += [n.iter for n in ast.walk(tree) if isinstance(n, ast.For)]
    parts = [part for found in looked_at for part in ast.walk(found)]
    names = {p.attr for p in parts if isinstance(p, ast.Attribute)}
    names |= {p.id for p in parts if isinstance(p, ast.Name)}
    return names | {str(p.value) for p in parts if isinstance(p, ast.Constant)}


def test_classes_say_what_they_are_made_of() -> None:
    lacking: dict[str, list[str]] = {}
    for name, thing in things().items():
        if not thing.is_class:
            continue
        told = described(thing, "parameters", "attributes")
        made_by = thing.members.get("__init__")
        own = made_by is not None and not made_by.is_alias
        lacks = [a for a in arguments(made_by) if a not in told] if own else []
        for method in (made_by, thing.members.get("__post_init__")):
            if method is None or method.is_alias or not raises(method):
                continue
            if "raises" not in sections(thing):
                checked = [a for a in told if a in fields_looked_at(method)]
                lacks += [
                    f"range of {a}" for a in checked if not RANGED.search(told[a])
                ]
                lacks += [] if checked else ["Raises"]
        if lacks:
            lacking[name] = lacks
    assert lacking == {}


def test_mathematics_says_where_it_comes_from() -> None:
    without = []
    for name, thing in things().items():
        plain = thing.is_function and thing.parent.is_module
        if not name.startswith(OF_THE_PAPER) or not (thing.is_class or plain):
            continue
        parts = [thing, thing.module, *thing.members.values()]
        told = "\n".join(part.docstring.value for part in parts if part.docstring)
        if not SOURCES.search(told):
            without.append(name)
    assert without == []


def test_the_rule_can_fail(tmp_path: Path) -> None:
    source = '''
def draw(x: "Latent", seed: int) -> "Latent":
    """Draws.

    Args:
        x: Samples.
    """
    if seed < 0:
        raise ValueError
    return x
'''
    (tmp_path / "sample_module.py").write_text(source)
    module: Any = griffe.load(
        "sample_module", search_paths=[tmp_path], docstring_parser="google"
    )
    expected = ["Args: the shape of x", "Args: seed", "Returns", "Raises"]
    assert what_lacks(module["draw"]) == expected
