"""Files as NVIDIA writes them are read; hostile ones do nothing."""

import io
import operator
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_edm import TINY, File, Spec, dumps, random_state, write
from torch import Tensor, nn

from dmdkit.adapters.edm_pickle import EDMSettings, read_edm_pickle
from dmdkit.adapters.restricted_pickle import (
    PickleReader,
    read_legacy_storage,
    rebuild_tensor,
)

WITH_ALL = Spec(
    8, (64, 64), 1, (False, True), classes=5, augment=9, middle_attends=True
)


def tiny(**changes: Any) -> File:
    return File(TINY, random_state(TINY), **changes)


def refused(tmp_path: Path, content: bytes) -> str:
    """The message with which a file is refused, one line."""
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="path: ") as error:
        read_edm_pickle(path)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


# What is read.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("spec", [TINY, WITH_ALL])
def test_weights_and_settings_come_out(
    tmp_path: Path, spec: Spec, protocol: int
) -> None:
    state = random_state(spec)
    file = File(spec, state, sigma_data=0.25)
    found = read_edm_pickle(write(tmp_path / "n.pkl", file, protocol))
    same(found.state, state)
    assert all(name.startswith("model.") for name in found.state)
    assert found.settings == EDMSettings(spec.resolution, 3, spec.classes, 0.25)
    found.state["model.out_conv.bias"].add_(1)  # the tensors are one's own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in random_state(TINY).items()}
    path = write(tmp_path / "n.pkl", File(TINY, state))
    same(read_edm_pickle(path).state, state)


def test_views_are_read_as_what_they_show(tmp_path: Path) -> None:
    state = random_state(TINY)
    whole = torch.arange(3000.0)
    state["model.map_layer0.weight"] = whole[7:519:2].view(8, 32).t()
    state["model.out_conv.bias"] = whole[-3:]
    same(read_edm_pickle(write(tmp_path / "n.pkl", File(TINY, state))).state, state)


def test_the_source_in_the_file_is_not_run(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    source = f"open({str(flag)!r}, 'w').close()\n"
    before = set(sys.modules)
    read_edm_pickle(write(tmp_path / "n.pkl", tiny(source=source)))
    assert not flag.exists()
    assert not {"torch_utils", "dnnlib"} & (set(sys.modules) - before)


STORAGES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64),
    *(torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def legacy(tensor: Tensor) -> bytes:
    """A storage's bytes as torch itself pickles them."""
    found: list[bytes] = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.storage.TypedStorage):
                found.append(obj.__reduce__()[1][0])
            return NotImplemented

    Pickler(io.BytesIO()).dump(tensor)
    return found[0]


@pytest.mark.parametrize("dtype", STORAGES)
def test_storages_of_torch_itself_are_read(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (5, 3)).to(dtype)
    storage = read_legacy_storage(legacy(tensor))
    assert storage.values.dtype == dtype
    assert torch.equal(storage.values.view(5, 3), tensor)


def test_the_network_must_be_adm(tmp_path: Path) -> None:
    for changes in ({"wrapper": "VPPrecond"}, {"network": "SongUNet"}):
        message = refused(tmp_path, dumps(tiny(**changes)))
        assert next(iter(changes.values())) in message
        assert "only DhariwalUNet (ADM) in EDMPrecond is supported" in message


def setting(name: str, **attributes: Any) -> Callable[[nn.Module], Any]:
    return lambda wrapper: wrapper.get_submodule(name).__dict__.update(attributes)


def lacking(name: str, attribute: str) -> Callable[[nn.Module], Any]:
    return lambda wrapper: wrapper.get_submodule(name).__dict__.pop(attribute)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("model.dec.4x4_in0", num_heads=2), "num_heads 2, ADM has 1"),
        (setting("model.dec.4x4_in1", num_heads=1), "num_heads 1, ADM has 0"),
        (setting("model.enc.8x8_block0", skip_scale=0.5**0.5), "skip_scale 0.707107"),
        (setting("model.enc.8x8_block0", adaptive_scale=False), "adaptive_scale 0"),
        (setting("model.enc.8x8_block0.norm0", eps=1e-6), "eps 1e-06"),
        (setting("model.out_norm", num_groups=32), "num_groups 32, ADM has 16"),
        (setting("model.map_noise", endpoint=True), "endpoint 1"),
        (setting("model.map_noise", max_positions=100), "max_positions 100"),
        (setting("model.enc.4x4_down.conv0", fused_resample=True), "fused_resample 1"),
        (setting("model.enc.4x4_down.conv0", up=True, down=False), "up 1"),
        (setting("model.enc.8x8_block0.conv0", down=True), "down 1"),
        (setting("", label_dim="many"), "label_dim of a 'EDMPrecond' is a str"),
        (setting("", sigma_data=-1), "sigma_data: got -1"),
        (setting("", img_resolution=64.5), "img_resolution"),
        (setting("", sigma_data=float("nan")), "sigma_data"),
        (lacking("", "img_channels"), "does not say its img_channels"),
    ],
)
def test_what_weights_do_not_show_is_verified(
    tmp_path: Path, change: Callable[[nn.Module], Any], message: str
) -> None:
    file = File(WITH_ALL, random_state(WITH_ALL), change=change)
    assert message in refused(tmp_path, dumps(file))


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("model.dec.4x4_in0", "num_heads"), ("model.out_norm", "eps")],
)
def test_what_a_module_does_not_say_is_left_to_the_weights(
    tmp_path: Path, name: str, attribute: str
) -> None:
    state = random_state(WITH_ALL)
    silent = File(WITH_ALL, state, change=lacking(name, attribute))
    (tmp_path / "edm.pkl").write_bytes(dumps(silent))
    read = read_edm_pickle(tmp_path / "edm.pkl").state
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())


class Unknown(nn.Module):
    pass


def graft(name: str, module: Any) -> Callable[[nn.Module], Any]:
    def change(wrapper: nn.Module) -> None:
        wrapper.get_submodule(name)._modules["grafted"] = module

    return change


def another_embedding(wrapper: nn.Module) -> None:
    module = wrapper.get_submodule("model.map_noise")
    module.__class__ = type("FourierEmbedding", (type(module),), {})


def loop(wrapper: nn.Module) -> None:
    enc = wrapper.get_submodule("model.enc")
    enc._modules["loop"] = enc


def twins(wrapper: nn.Module) -> None:
    module = nn.ModuleDict()
    for _ in range(40):
        module = nn.ModuleDict({"one": module, "two": module})
    wrapper.get_submodule("model.enc").add_module("twins", module)


def deep(wrapper: nn.Module) -> None:
    module = nn.ModuleDict()
    for _ in range(30):
        module = nn.ModuleDict({"one": module})
    wrapper.get_submodule("model.enc").add_module("deep", module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_embedding, "'FourierEmbedding', which ADM does not have"),
        (loop, "appears twice"),
        (twins, "nested too deeply"),
        (deep, "nested too deeply"),
        (graft("model.enc", 3), "is no module"),
        (graft("model.enc", torch.zeros(2)), "is no module"),
        (graft("model.enc", nn.Embedding(2, 2)), "'torch.nn.modules.sparse.Embedding'"),
        (lambda w: w.model._parameters.update(a=3), "no tensor"),
        (lambda w: w.model._modules.update({"a.b": nn.ModuleDict()}), "no proper name"),
        (lambda w: w.model.__dict__.update(_modules=[]), "has no _modules"),
    ],
)
def test_the_tree_of_modules_is_walked_with_care(
    tmp_path: Path, change: Callable[[nn.Module], Any], message: str
) -> None:
    assert message in refused(tmp_path, dumps(tiny(change=change)))


def test_a_module_that_appears_twice_is_refused(tmp_path: Path) -> None:
    twin = nn.ModuleDict()

    def change(wrapper: nn.Module) -> None:
        for name in ("model.enc", "model.dec"):
            wrapper.get_submodule(name).add_module("twin", twin)

    assert "'model.dec.twin' appears twice" in refused(
        tmp_path, dumps(tiny(change=change))
    )


# What is not executed.


class Call:
    """Pickles as a call; may itself be what another one calls."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments

    def __call__(self) -> None:
        """So that pickle takes it for a function."""


def payloads(flag: str) -> dict[str, Any]:
    code = f"open({flag!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {flag}"),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.getattr": Call(Call(getattr, Call(__import__, "os"), "mkdir"), flag),
        "operator.methodcaller": Call(
            Call(operator.methodcaller, "mkdir", flag), Call(__import__, "os")
        ),
        "torch.save": Call(torch.save, 1, flag),
    }


@pytest.mark.parametrize("kind", list(payloads("")))
@pytest.mark.parametrize("place", ["network", "beside", "attribute", "storage"])
def test_nothing_is_executed(tmp_path: Path, kind: str, place: str) -> None:
    flag = tmp_path / "flag"
    payload = payloads(str(flag))[kind]
    pickle.loads(pickle.dumps(payload))
    assert flag.exists(), "the payload itself does nothing"
    flag.rmdir() if flag.is_dir() else flag.unlink()
    if place == "network":
        content = pickle.dumps({"ema": payload})
    elif place == "beside":
        content = dumps(tiny(extra={"ema2": payload}))
    elif place == "attribute":
        content = dumps(tiny(change=setting("model.enc", payload=payload)))
    else:
        inner = pickle.dumps(payload, 2)
        load: Any = torch.storage._load_from_bytes
        content = dumps(tiny(extra={"x": Call(load, inner)}))
    message = refused(tmp_path, content)
    assert not flag.exists()
    assert "is not allowed" in message


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    coded = value.encode()
    return b"X" + struct.pack("<I", len(coded)) + coded


ORDERED, SET = name("collections", "OrderedDict"), name("builtins", "set")
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
MODULES = name("torch.nn.modules.container", "ModuleDict")
LOAD = name("torch.storage", "_load_from_bytes")
ENCODE = name("_codecs", "encode")
STATE = b"}" + text("__class__") + b"K\x01s"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (name("posix", "system"), "'posix.system' is not allowed"),
        (name("os", "system.__call__"), "'os.system.__call__' is not allowed"),
        (name("collections", "OrderedDict.fromkeys"), "is not allowed"),
        (name("torch_utils.persistence", "exec"), "is not allowed"),
        (name("builtins", "a" * 999), "is not allowed"),
        (text("os") + text("system") + b"\x93", "'os.system' is not allowed"),
        (b"K\x01K\x02\x93", "STACK_GLOBAL at byte 6 does not fit"),
        # A state set on a name, on a value, on what a call made.
        (ORDERED + STATE + b"b", "BUILD at byte"),
        (REBUILD + STATE + b"b", "BUILD at byte"),
        (SET + b"N" + STATE + b"\x86b", "BUILD at byte"),
        (ORDERED + b")R" + STATE + b"b", "BUILD at byte"),
        (b"]" + STATE + b"b", "BUILD at byte"),
        # A call of what is no name, with what are no arguments.
        (ORDERED + b")R)R", "REDUCE at byte"),
        (ORDERED + b"K\x01R", "REDUCE at byte"),
        (ORDERED + b"]R", "REDUCE at byte"),
        (ORDERED + b"K\x01\x85R", "REDUCE at byte"),
        (ORDERED + ORDERED + b"R", "REDUCE at byte"),
        (MODULES + b")}\x92", "NEWOBJ_EX is not allowed"),
        (b"(" + ORDERED + b"o", "OBJ is not allowed"),
        (b"(iposix\nsystem\n", "INST is not allowed"),
        (b"Pid\n", "PERSID is not allowed"),
        (b"K\x01Q", "BINPERSID is not allowed"),
        (b"\x82\x01", "EXT1 is not allowed"),
        (b"\x97", "NEXT_BUFFER is not allowed"),
        (b"\x98", "READONLY_BUFFER is not allowed"),
        (b"\x96" + struct.pack("<Q", 2**62), "file.pkl was refused"),
        (b"Vtext\n", "UNICODE is not allowed"),
        (b"S'\\y'\n", "file.pkl"),
        # Lengths and numbers beyond the file.
        (b"\x8e" + struct.pack("<Q", 2**62), "expected 4611686018427387904 bytes"),
        (b"\x8e" + struct.pack("<Q", 2**64 - 1), "file.pkl was refused"),
        (b"B" + struct.pack("<I", 2**32 - 1), "expected 4294967295 bytes"),
        (b"X" + struct.pack("<I", 2**32 - 1), "file.pkl was refused"),
        (b"\x8b" + struct.pack("<i", 2**31 - 1), "file.pkl was refused"),
        (b"\x8b" + struct.pack("<i", -1), "file.pkl was refused"),
        (b"N\x95" + struct.pack("<Q", 2**63), "holds no network"),
        (b"Nr" + struct.pack("<I", 2**32 - 1), "holds no network"),
        (b"j" + struct.pack("<I", 2**32 - 1), "LONG_BINGET at byte 2 does not fit"),
        # What does not fit together.
        (b"", "STOP at byte 2 does not fit"),
        (b"t", "TUPLE at byte 2"),
        (b"\x87", "TUPLE3 at byte 2"),
        (b"K\x01(\x85", "TUPLE1 at byte"),
        (b"NNa", "APPEND at byte"),
        (b"}" + text("a") + b"(u", "SETITEMS at byte"),
        (b"N" + text("a") + b"Ns", "SETITEM at byte"),
        (b"}(" + text("a") + b"u", "SETITEMS at byte"),
        (b"})Ns", "a dict has a tuple for a key"),
        (b"}" + text("ema") + b"Ns", "holds no network under the name 'ema'"),
        (b"}" + text("ema") + MODULES + b")\x81s", "'ModuleDict', only DhariwalUNet"),
        (ENCODE + text("é") + text("utf8") + b"\x86R", "'utf8'"),
        (LOAD + b"C\x00\x85R", "pickle exhausted"),
        (LOAD + b"C\x03PK\x03\x85R", "file.pkl was refused"),
    ],
)
def test_what_is_no_part_of_such_a_file_is_refused(
    tmp_path: Path, body: bytes, message: str
) -> None:
    assert message in refused(tmp_path, b"\x80\x04" + body + b".")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"\xae" * 9, b"."])
def test_another_kind_of_file_is_told_apart(tmp_path: Path, content: bytes) -> None:
    assert "it is no pickle; look whether" in refused(tmp_path, content)


def repeat(first: bytes, again: bytes, times: int) -> bytes:
    return b"\x80\x04" + first + again * times + b"."


@pytest.mark.parametrize(
    "content",
    [
        # The same text made to bytes, the same storage read, many times over.
        repeat(
            ENCODE + text("a" * 100_000) + text("latin1") + b"\x86q\x00",
            ENCODE + b"h\x00R",
            2_000,
        ),
        repeat(
            b"B" + struct.pack("<I", len(legacy(torch.zeros(20_000))))
            + legacy(torch.zeros(20_000)) + b"\x85q\x00" + LOAD + b"q\x01",
            b"h\x01h\x00R",
            2_000,
        ),
        # The same list made to a set.
        repeat(b"](" + b"K\x01" * 5_000 + b"e\x85q\x00", SET + b"h\x00R", 2_000),
        # A tuple of twice the same, sixty deep: to hash it would take for ever.
        b"\x80\x04})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
        # And one so deep that hashing it overruns C's stack.
        b"\x80\x04})" + b"\x85" * 10_000 + b"Ns.",
        b"\x80\x04" + b"]" * 10_000 + b"a" * 9_999 + b".",
        b"\x80\x04" + b"(" * 10_000 + b"t" * 10_000 + b".",
        b"\x80\x04}" + text("ema")
        + (MODULES + b")\x81}" + text("_modules") + b"}" + text("a")) * 2_000
        + b"N" + b"ssb" * 2_000 + b"s.",
    ],
    ids=["text", "storage", "set", "hash", "deep hash", "list", "tuple", "module"],
)  # fmt: skip
def test_little_makes_much_of_nothing(tmp_path: Path, content: bytes) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    refused(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - started < 30
    assert peak < 1_000_000 + 200 * len(content)


def described(
    kind: bytes = name("torch", "FloatStorage"),
    count: Any = 4,
    held: int = 4,
    key: str = "7",
    keys: tuple[str, ...] = ("7",),
    little: Any = True,
    numbers: bytes = bytes(16),
    view: bytes = b"N",
) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": little}]
    content = b"".join(pickle.dumps(part, 2) for part in head)
    content += b"\x80\x02(" + text("storage") + kind + text(key) + text("cpu")
    content += pickle.dumps(count, 2)[2:-1] + view + b"tQ."
    return content + pickle.dumps(list(keys), 2) + struct.pack("<q", held) + numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 2**40, "held": 2**40}, "claims 1099511627776 numbers of 4 bytes"),
        ({"count": 2**40}, "claims 1099511627776"),
        ({"held": 2**62}, "claims 4 numbers"),
        ({"count": 0, "held": 0, "numbers": b""}, "claims 0"),
        ({"count": -4, "held": -4}, "claims -4"),
        ({"count": 5, "held": 5}, "claims 5"),
        ({"numbers": bytes(17)}, "holds 17 bytes"),
        ({"count": "4"}, "in an unknown way"),
        ({"keys": ("7", "8")}, "followed by others"),
        ({"keys": ("8",)}, "followed by others"),
        ({"little": False}, "not little-endian"),
        ({"view": b")"}, "in an unknown way"),
        ({"kind": b"N"}, "in an unknown way"),
        ({"kind": name("torch", "ComplexFloatStorage")}, "is not allowed"),
        ({"kind": name("torch", "FloatStorage") + b")R"}, "REDUCE at byte"),
        ({"kind": name("torch._utils", "_rebuild_tensor_v2")}, "is not allowed"),
    ],
)
def test_a_storage_holds_what_it_claims(changes: dict[str, Any], message: str) -> None:
    assert read_legacy_storage(described()).values.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=message):
        read_legacy_storage(described(**changes))
    content = described()
    for end in range(len(content)):
        with pytest.raises(ValueError):  # noqa: PT011
            read_legacy_storage(content[:end])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, (2, 2), (2, 1)), None),
        ((1, (3,), (1,)), None),
        ((3, (1, 1), (2**70, 5)), None),
        ((2, (3,), (1,)), ValueError),
        ((0, (2, 3), (1, 1)), ValueError),
        ((0, (9,), (0,)), ValueError),
        ((0, (2**62, 2**62), (0, 0)), ValueError),
        ((0, (2,), (4,)), ValueError),
        ((-1, (1,), (1,)), ValueError),
        ((0, (-1,), (1,)), ValueError),
        ((3, (2,), (-1,)), ValueError),
        ((0, (0,), (1,)), ValueError),
        ((4, (), ()), ValueError),
        ((0, (True,), (1,)), ValueError),
        ((0, (1.0,), (1,)), ValueError),
        ((0, (2,), (1, 1)), TypeError),
        ((0, (1,) * 9, (1,) * 9), TypeError),
        ((0, (2,), (1,), False, {}, {"conj": True}), ValueError),
        ((0, (2,), (1,), False, {}, {}), None),
    ],
)
def test_a_tensor_stays_within_its_storage(
    arguments: tuple[Any, ...], error: type[Exception] | None
) -> None:
    storage = read_legacy_storage(described())
    if error is None:
        assert rebuild_tensor(storage, *arguments).shape == arguments[1]
        return
    with pytest.raises(error):
        rebuild_tensor(storage, *arguments)


def test_a_tensor_has_no_other_tensor_for_a_storage() -> None:
    with pytest.raises(TypeError):
        rebuild_tensor(torch.zeros(4), 0, (2,), (1,))


def test_tensors_that_share_a_storage_do_not_pass_for_more(tmp_path: Path) -> None:
    def change(wrapper: nn.Module) -> None:
        shared = nn.Parameter(torch.zeros(1_000_000), requires_grad=False)
        container = nn.ModuleDict()
        for i in range(5):
            container.register_parameter(f"p{i}", shared)
        wrapper.get_submodule("model").add_module("shared", container)

    assert "its tensors overlap" in refused(tmp_path, dumps(tiny(change=change)))


# What is damaged.


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.pkl"):
        with pytest.raises(ValueError, match="there is no file"):
            read_edm_pickle(path)
    refused(tmp_path, b"")
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, b"<!DOCTYPE html>")
    refused(tmp_path, pickle.dumps([1, 2]))
    buffer = io.BytesIO()
    torch.save({"ema": 1}, buffer)
    refused(tmp_path, buffer.getvalue())


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    content, chance = dumps(tiny()), random.Random(0)
    for end in [*range(1, 30), *chance.sample(range(len(content)), 50)]:
        refused(tmp_path, content[:end])


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, protocol: int) -> None:
    content, chance = dumps(tiny(), protocol), random.Random(protocol)
    path = tmp_path / "file.pkl"
    read = 0
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 5, 50])):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            read_edm_pickle(path)
            read += 1
        except ValueError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
    assert 0 < read < 40


def test_nothing_survives_a_hostile_file(tmp_path: Path) -> None:
    before = dict(vars(OrderedDict)), set(sys.modules)
    refused(tmp_path, b"\x80\x04" + ORDERED + STATE + b"b.")
    refused(tmp_path, b"\x80\x04" + b"(" * 9 + name("os", "system") + b".")
    assert (dict(vars(OrderedDict)), set(sys.modules)) == before
    state = random_state(TINY)
    same(read_edm_pickle(write(tmp_path / "n.pkl", File(TINY, state))).state, state)


def test_plain_data_is_read_as_pickle_reads_it() -> None:
    data: dict[Any, Any] = {
        "numbers": [0, 1, -1, 255, 256, 70000, 2**40, -(2**70), 1.5, float("inf")],
        "rest": (None, True, False, "é", b"\x00\xff", (), (1,), (1, 2), (1, 2, 3, 4)),
        3: {"again": [[], {}, [1] * 2000, dict.fromkeys(range(2000))]},
    }
    for protocol in (3, 4, 5):
        file = io.BytesIO(pickle.dumps(data, protocol) + b"rest")
        assert PickleReader(file, {}).read() == data
        assert file.read() == b"rest"
