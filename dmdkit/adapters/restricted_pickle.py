"""Reads the harmless part of the pickle language, executing and importing nothing.

Python's own `pickle.Unpickler` is not used. Even with a restricted `find_class` it
hashes keys nested as deeply as a file likes (a crash in C) and sets attributes on
whatever a file names. Here a name in the file stays a name: it can only be looked up in
a table of functions that build plain data. Opcodes are decoded by `pickletools`, whose
reads never reserve more than what the file holds.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any

import torch
from torch import Tensor

Constructors = Mapping[str, Callable[..., Any]]
"""What stands for each name that a file may use; anything else is refused."""

_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # only membership is ever asked for, and a list hashes nothing
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Name:
    """A class or function as a file names it; never imported."""

    full: str


@dataclass(eq=False)
class Record:
    """An object of a file: the name of its class and its state, without behaviour."""

    kind: str
    state: Any = None


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers behind tensors, on the CPU: [n]."""

    values: Tensor


def quoted(value: object) -> str:
    """A text from a file in one short line; of other values only the type."""
    if not isinstance(value, str):
        return type(value).__name__
    return repr(value) if len(value) <= 80 else f"{value[:77]!r}..."


class PickleReader:
    """Reads one pickle from where a file stands, and leaves the file behind it.

    Args:
        file: A binary file, or anything with `read`, `readline` and `tell`.
        constructors: The functions behind the names that the file may use. They are
            given what the file says and must build plain data.
        persistent: What a persistent id stands for; None refuses them.
    """

    def __init__(
        self,
        file: IO[bytes] | Any,
        constructors: Constructors,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.file, self.constructors, self.persistent = file, constructors, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """Reads up to STOP.

        Returns:
            Plain data: numbers, texts, bytes, tuples, lists (also for sets), dicts with
            plain keys, `Name`, and what the constructors build.

        Raises:
            ValueError: If the file uses a name or an opcode that is not allowed, or is
                no pickle.
        """
        for opcode, argument, position in pickletools.genops(self.file):
            try:
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._execute(opcode.name, argument)
            except (AttributeError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{opcode.name} at byte {position} does not fit what came before"
                ) from error
        raise ValueError("the pickle has no end")

    def _execute(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case _ if opcode in _LITERALS:
                stack.append(argument)
            case _ if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            case _ if opcode in _EMPTY:
                stack.append(_EMPTY[opcode]())
            case _ if opcode in _TUPLES:
                stack.append(tuple(self._pop(_TUPLES[opcode])))
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "TUPLE":
                items = self._pop_to_mark()
                self.stack.append(tuple(items))
            case "FROZENSET":
                items = self._pop_to_mark()
                self.stack.append(items)
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GLOBAL":
                stack.append(self._name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(self._name(".".join(self._pop(2))))
            case "REDUCE" | "NEWOBJ":
                self._construct(*self._pop(2))
            case "BUILD":
                self._build(*self._pop(1))
            case "BINPERSID" if self.persistent is not None:
                stack.append(self.persistent(*self._pop(1)))
            case _:
                raise ValueError(f"the opcode {opcode} is not allowed")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise LookupError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | bytes | None):
                raise ValueError(f"a dict has a {type(key).__name__} for a key")
            target[key] = value

    def _name(self, full: str) -> Name:
        if full not in self.constructors:
            raise ValueError(f"the name {quoted(full)} is not allowed")
        return Name(full)

    def _construct(self, name: Any, arguments: Any) -> None:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise TypeError
        self.stack.append(self.constructors[name.full](*arguments))

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict) or not isinstance(state, dict) or state:
            raise TypeError


def read_legacy_storage(data: bytes) -> Storage:
    """Reads a storage as it stands in a plain pickle of a tensor.

    It is what `torch.save` wrote before its zip format: magic number, version, facts
    about the machine, the storage's description, its key, its length and its bytes.

    Args:
        data: The bytes.

    Returns:
        The storage on the CPU, a copy.

    Raises:
        ValueError: If they are anything else, or fewer than they claim to be.
    """
    file = BytesIO(data)
    if PickleReader(file, {}).read() != _LEGACY_MAGIC:
        raise ValueError("a storage does not start with torch's magic number")
    if PickleReader(file, {}).read() != _LEGACY_VERSION:
        raise ValueError("a storage is of an unknown version")
    machine = PickleReader(file, {}).read()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("a storage is not little-endian")
    names = dict.fromkeys(_STORAGE_DTYPES, _not_callable)
    found = PickleReader(file, names, persistent=lambda key: (key,)).read()
    match found:
        case (("storage", Name(kind), str() as key, str(), int() as count, None),):
            dtype = _STORAGE_DTYPES[kind]
        case _:
            raise ValueError("a storage is described in an unknown way")
    if PickleReader(file, {}).read() != [key]:
        raise ValueError("a storage is followed by others")
    length = int.from_bytes(file.read(8), "little", signed=True)
    start, size = file.tell(), count * dtype.itemsize
    if not 0 < count == length or len(data) - start != size:
        raise ValueError(
            f"a storage claims {count} numbers of {dtype.itemsize} bytes and holds "
            f"{len(data) - start} bytes"
        )
    raw = torch.frombuffer(bytearray(memoryview(data)[start:]), dtype=torch.uint8)
    return Storage(raw.bool() if dtype is torch.bool else raw.view(dtype))


def rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any
) -> Tensor:
    """Makes a tensor, a view of its storage.

    Args:
        storage: A `Storage`.
        offset: Where it starts, in elements.
        size: Its shape, at least one element.
        stride: Its strides, in elements.
        ignored: Whether it wants a gradient, its hooks; and its flags, which must be
            absent.

    Returns:
        The tensor.

    Raises:
        ValueError: If it reaches beyond the storage, has more elements than it
            (expanded views), or flags.
        TypeError: If an argument is something else.
    """
    if not isinstance(storage, Storage) or not len(size) == len(stride) <= 8:
        raise TypeError
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor's shape, strides or offset are not whole numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    available = storage.values.numel()
    if not 0 < math.prod(size) <= available or not last < available:
        raise ValueError("a tensor is empty or reaches beyond its storage")
    if len(ignored) > 2 and ignored[2]:
        raise ValueError("a tensor has flags, such as conjugation")
    # The stride of an axis of length one says nothing, and may be absurd.
    steps = [1 if n == 1 else step for n, step in zip(size, stride, strict=True)]
    return storage.values.as_strided(size, steps, offset)


def _not_callable(*arguments: Any) -> Any:
    raise TypeError
