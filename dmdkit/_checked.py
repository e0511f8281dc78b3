"""The run-time check of public entry points, and the shape of its messages.

Argument annotations are jaxtyping's; `checked` holds every call against them and
answers a violation with one line: which argument, what came, what was expected.
Under `torch.compile` it steps aside, because Dynamo cannot trace the check.
"""

import functools
import inspect
import typing
from collections.abc import Callable
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
    if value is None or isinstance(value, bool | int | float | str):
        return f"{type(value).__name__} {value!r}"
    return type(value).__name__


def _array_types(annotation: Any) -> list[Any]:
    """The jaxtyping array types in an annotation such as `Latent | None`."""
    members = typing.get_args(annotation) or (annotation,)
    return [m for m in members if inspect.isclass(m) and issubclass(m, AbstractArray)]


def _accepts_dtype(array_type: Any, dtype: torch.dtype) -> bool:
    return str(dtype).removeprefix("torch.") in array_type.dtypes


def _expected(annotation: Any) -> str:
    arrays = _array_types(annotation)
    if arrays:
        kind, shape = arrays[0].__name__.split("[")[0], arrays[0].dim_str.strip()
        return f"{kind} [{' '.join(shape.split())}]"
    return getattr(annotation, "__name__", str(annotation))


def _hint(name: str, value: object, annotation: Any) -> str:
    arrays = _array_types(annotation)
    if arrays and not isinstance(value, Tensor):
        return f"pass a torch.Tensor for `{name}`"
    if arrays and isinstance(value, Tensor):
        if not _accepts_dtype(arrays[0], value.dtype):
            wanted = "float32" if "float32" in arrays[0].dtypes else arrays[0].dtypes[0]
            return f"make it from exact values with dtype torch.{wanted}"
        if arrays[0].dim_str.strip() == "b":
            return f"pass one value a sample, a vector as long as the batch (`{name}`)"
        return "every axis of one name must have one length"
    summary = (inspect.getdoc(annotation) or "").split("\n")[0].rstrip(".")
    return (
        summary if getattr(annotation, "_is_protocol", False) else "see its docstring"
    )


def _complain(
    function: str, name: str, value: object, annotation: Any, seen: dict[str, Tensor]
) -> Exception:
    arrays = _array_types(annotation)
    message = f"{function}: `{name}` is {describe(value)}, expected "
    message += _expected(annotation)
    if seen and arrays:
        others = ", ".join(f"{k} {list(v.shape)}" for k, v in seen.items())
        message += f" (beside {others})"
    message += f"; {_hint(name, value, annotation)}."
    wrong_shape = (
        isinstance(value, Tensor)
        and bool(arrays)
        and any(_accepts_dtype(array, value.dtype) for array in arrays)
    )
    return ValueError(message) if wrong_shape else TypeError(message)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Checks the arguments of a public function against its annotations.

    Tensors are held against their jaxtyping annotation (a name stands for one length
    within a call), everything else against its type as beartype sees it.

    Args:
        function: The function or method to check. Its annotations must be objects, not
            strings.

    Returns:
        The function, which raises `ValueError` for a tensor of the wrong shape and
        `TypeError` for a wrong type or dtype, each in one line.
    """
    signature = inspect.signature(function)
    annotations = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation not in (inspect.Parameter.empty, Any)
        and not isinstance(parameter.annotation, str)
    }
    label = function.__qualname__.removesuffix(".__call__").removesuffix(".forward")

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            arguments = signature.bind(*args, **kwargs).arguments
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
