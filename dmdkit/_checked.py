"""The run-time check of public entry points, and the shape of its messages.

Argument annotations are jaxtyping's; `checked` holds every call against them and
answers a violation with one line: which argument, what came, what was expected.
Under `torch.compile` it steps aside, because Dynamo cannot trace the check.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def describe(value: object) -> str:
    """Says what a value is in a few words: dtype and shape for a tensor."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, bool | int | float | str):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, list | tuple) and len(value) <= 8:
        items = (repr(v) if isinstance(v, str) else describe(v) for v in value)
        return f"{type(value).__name__} [{', '.join(items)}]"
    return (
        f"the class {value.__name__}"
        if inspect.isclass(value)
        else type(value).__name__
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: `Latent | None` has two."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _array_type(annotation: Any) -> Any:
    """The jaxtyping array type in an annotation such as `Latent | None`, or None."""
    arrays = (
        member
        for member in _members(annotation)
        if inspect.isclass(member) and issubclass(member, AbstractArray)
    )
    return next(arrays, None)


def _accepts_dtype(array_type: Any, dtype: torch.dtype) -> bool:
    return str(dtype).removeprefix("torch.") in array_type.dtypes


def _expected(annotation: Any) -> str:
    members, origin = _members(annotation), typing.get_origin(annotation)
    if len(members) > 1:
        return " or ".join(_expected(member) for member in members)
    if annotation is types.NoneType:
        return "None"
    if (array := _array_type(annotation)) is not None:
        axes = ", ".join(array.dim_str.split())
        return f"{array.__name__.split('[')[0].lower()}[{axes}]"
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(annotation)))
    if origin is Sequence:
        return f"a sequence of {_expected(typing.get_args(annotation)[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _hint(value: object, annotation: Any) -> str:
    array = _array_type(annotation)
    if array is None:
        for member in _members(annotation):
            if getattr(member, "_is_protocol", False):
                summary = (inspect.getdoc(member) or "").split("\n")[0].rstrip(".")
                return summary[:1].lower() + summary[1:]
        return ""
    if not isinstance(value, Tensor):
        return "pass a torch.Tensor"
    if not _accepts_dtype(array, value.dtype):
        if list(array.dtypes) == ["float32"]:
            return "use `.float()` on exact numbers: bf16 has rounded them already"
        return f"convert it to a {array.__name__.split('[')[0].lower()} dtype"
    if array.dim_str.strip() == "b":
        return "pass one value a sample, a vector as long as the batch"
    return "the first axis is the batch, and an axis has one length in all arguments"


def _is_choice(value: object, annotation: Any) -> bool:
    """Whether `value` is a name, or several, where the annotation lists names."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Sequence and isinstance(value, list | tuple):
        return all(_is_choice(item, arguments[0]) for item in value)
    return origin is typing.Literal and isinstance(value, str)


def _complain(
    function: str, name: str, value: object, annotation: Any, seen: dict[str, Tensor]
) -> Exception:
    array = _array_type(annotation)
    message = f"{function}: `{name}` is {describe(value)}, expected "
    message += _expected(annotation)
    if seen and array is not None:
        others = ", ".join(f"{k} {list(v.shape)}" for k, v in seen.items())
        message += f" (beside {others})"
    hint = _hint(value, annotation)
    message += f"; {hint}." if hint else "."
    if isinstance(value, Tensor) and array is not None:
        wrong_value = _accepts_dtype(array, value.dtype)
    else:
        wrong_value = _is_choice(value, annotation)
    return ValueError(message) if wrong_value else TypeError(message)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Checks the arguments of a public function against its annotations.

    Tensors are held against their jaxtyping annotation (a name stands for one length
    within a call), everything else against its type as beartype sees it.

    Args:
        function: The function or method to check. Its annotations must be objects, not
            strings.

    Returns:
        The function, which raises `ValueError` for a tensor of the wrong shape or a
        name that a `Literal` does not list, and `TypeError` for a wrong type or dtype,
        each in one line.
    """
    signature = inspect.signature(function)
    annotations = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation not in (parameter.empty, Any)
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not isinstance(parameter.annotation, str)
    }
    label = function.__qualname__.removesuffix(".__call__").removesuffix(".forward")

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # Python's own message is the best
            seen: dict[str, Tensor] = {}
            with jaxtyped("context"):
                for name, value in arguments.items():
                    annotation = annotations.get(name)
                    if annotation is None:
                        continue
                    if not is_bearable(value, annotation):
                        raise _complain(label, name, value, annotation, seen)
                    if isinstance(value, Tensor):
                        seen[name] = value
        return function(*args, **kwargs)

    return wrapper
