"""Bare UNets in one file, as official DMD2 releases them: all of one, or an error."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from helpers_pipelines import SDXL_UNET
from helpers_script import as_in_a_script
from safetensors.torch import save_file
from torch import Tensor

from dmdkit.adapters.lora import LoRANetwork
from dmdkit.adapters.lora_files import save_lora
from dmdkit.adapters.official import load_unet_weights
from dmdkit.adapters.unets import UNetNetwork

State = dict[str, Tensor]


def unet(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**SDXL_UNET)


@pytest.fixture(scope="module")
def released() -> State:
    """The weights of another UNet in fp16, as they are released."""
    return unet(1).half().state_dict()


def call(model: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    more = {"text_embeds": normal(2, 24), "time_ids": normal(2, 6)}
    x, text = normal(2, 4, 8, 8), normal(2, 7, 40)
    with torch.no_grad():
        return model(x, 399, encoder_hidden_states=text, added_cond_kwargs=more).sample


def save_safetensors(state: State, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def save_before_zip(state: State, file: Path) -> None:
    torch.save(state, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("dmd2_sdxl_4step_unet_fp16.bin", torch.save),
        ("pytorch_model.bin", save_before_zip),
        ("model.PTH", torch.save),
        ("diffusion_pytorch_model.safetensors", save_safetensors),
    ],
)
def test_the_unet_computes_what_the_released_one_does(
    tmp_path: Path, released: State, name: str, save: Callable[[State, Path], None]
) -> None:
    save(released, tmp_path / name)
    model = unet(2)
    before, pointer = call(model), next(model.parameters()).data_ptr()
    load_unet_weights(model, tmp_path / name)
    rounded = unet(1).half().float()
    assert torch.equal(call(model), call(rounded))
    assert not torch.equal(before, call(model))
    assert next(model.parameters()).data_ptr() == pointer  # an optimizer keeps it
    # Of the file nothing is held: it can be written anew.
    (tmp_path / name).write_bytes(b"")
    assert torch.equal(call(model), call(rounded))


@pytest.mark.parametrize("prefix", ["module.", "feedforward_model."])
def test_a_prefix_of_all_names_is_left_off(
    tmp_path: Path, released: State, prefix: str
) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({prefix + name: tensor for name, tensor in released.items()}, file)
    model = unet(2)
    load_unet_weights(model, file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, released[name].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_unet_keeps_its_dtype(
    tmp_path: Path, released: State, dtype: torch.dtype
) -> None:
    torch.save(released, tmp_path / "a.bin")
    model: Any = unet(2)
    model.to(dtype)
    load_unet_weights(model, tmp_path / "a.bin")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, released[name].to(dtype))


def without_one(state: State) -> None:
    del state["conv_in.weight"]


def with_another(state: State) -> None:
    for i in range(5):
        state[f"cls_pred_branch.{i}.weight"] = torch.zeros(1)


def of_another_width(state: State) -> None:
    state["conv_in.bias"] = torch.zeros(320)


def not_a_number(state: State) -> None:
    state["conv_out.bias"][1] = torch.nan


def too_large(state: State) -> None:
    state["conv_out.bias"] = torch.full((4,), 1e39, dtype=torch.float64)


def of_whole_numbers(state: State) -> None:
    state["conv_out.bias"] = torch.zeros(4, dtype=torch.int8)


def with_some_prefixed(state: State) -> None:
    state["module.conv_in.weight"] = state.pop("conv_in.weight")


def twice_prefixed(state: State) -> None:
    for name in list(state):
        state[f"module.feedforward_model.{name}"] = state.pop(name)


FAULTS = [
    (without_one, r"lacks 1 weight: conv_in\.weight; take the UNet of the teacher"),
    (
        with_another,
        r"has 5 weights: cls_pred_branch\.0\.weight, cls_pred_branch\.1\.weight, "
        r"cls_pred_branch\.2\.weight, \.\.\., which the UNet lacks",
    ),
    (of_another_width, r"for 1 weight: conv_in\.bias \(\[320\], expected \[16\]\)"),
    (not_a_number, r"conv_out\.bias in .* is not finite as torch\.float32"),
    (too_large, r"conv_out\.bias in .* is not finite as torch\.float32"),
    (of_whole_numbers, r"conv_out\.bias in .* is int8\[4\], expected float32"),
    (with_some_prefixed, r"lacks 1 weight: conv_in.weight; has 1 weight: module\."),
    (twice_prefixed, r"lacks \d+ weights: .*has \d+ weights: feedforward_model\."),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=lambda x: str(x)[:20])
def test_another_network_s_weights_are_refused_and_nothing_is_changed(
    tmp_path: Path, released: State, spoil: Callable[[State], None], message: str
) -> None:
    state = {name: tensor.clone() for name, tensor in released.items()}
    spoil(state)
    torch.save(state, tmp_path / "a.bin")
    refuses(tmp_path / "a.bin", message)


def refuses(file: Path, message: str) -> None:
    model = unet(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_unet_weights(model, file)
    assert "\n" not in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_is_recognized(tmp_path: Path, layout: Any) -> None:
    network = LoRANetwork(UNetNetwork(unet(0)).requires_grad_(False), rank=2)
    file = save_lora(network, tmp_path / "lora.safetensors", layout=layout)
    refuses(file, r"is a LoRA, no whole UNet; read it with load_lora")


class Code:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_executed(tmp_path: Path, released: State) -> None:
    file = tmp_path / "a.bin"
    torch.save({**released, "conv_in.weight": Code(tmp_path / "executed")}, file)
    refuses(file, r"holds more than tensors, and nothing in it was executed; write")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_state_dict_is_refused(tmp_path: Path, released: State) -> None:
    file = tmp_path / "a.bin"
    refuses(file, "there is no file")
    file.write_bytes(b"PK\x03\x04 and no more")
    refuses(file, "a.bin (cannot be read|is damaged)")
    torch.save(released, file)
    file.write_bytes(file.read_bytes()[:5000])
    refuses(file, "a.bin (cannot be read|is damaged)")
    torch.save({"state_dict": released, "step": 5}, file)
    refuses(file, "is no state dict, tensors by name")
    torch.save({}, file)
    refuses(file, r"lacks \d+ weights")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    refuses(tmp_path / "a.safetensors", "cannot be read")
    refuses(tmp_path / "a.ckpt", r"the suffix '\.ckpt', expected \.bin, \.pt, \.pth")


def test_only_a_unet_of_diffusers_can_be_filled(tmp_path: Path) -> None:
    wrong: Any = UNetNetwork(unet(0))
    with as_in_a_script(), pytest.raises(TypeError, match="unet: got UNetNetwork"):
        load_unet_weights(wrong, tmp_path / "a.bin")
    with torch.device("meta"):
        hollow = UNet2DConditionModel(**SDXL_UNET)
    torch.save({}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="it is on the meta device"):
        load_unet_weights(hollow, tmp_path / "a.bin")
