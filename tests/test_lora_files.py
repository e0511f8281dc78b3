"""Files of adapters: diffusers loads them and computes the same, and the way back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from helpers_diffusers import (
    TEXT_UNETS,
    call_text_unet,
    normal,
    text_inputs,
    text_unet,
)
from helpers_lora import ALPHA, RANK, SDXL, adapted, base, fill
from helpers_script import as_in_a_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmdkit import ExponentialMovingAverage
from dmdkit.adapters.diffusers import SD3Network, TextPooledCondition
from dmdkit.adapters.lora import OFFICIAL_TARGETS, LoRANetwork
from dmdkit.adapters.lora_files import FILE_NAME, Layout, load_lora, save_lora

kinds = pytest.mark.parametrize("kind", TEXT_UNETS)
layouts = pytest.mark.parametrize("layout", ["diffusers", "kohya"])


def all_adapted(kind: str, seed: int = 0, **more: Any) -> LoRANetwork:
    """A network with every official kind of layer adapted."""
    return adapted(base(kind), seed, targets=OFFICIAL_TARGETS, **more)


def pipeline(kind: str, unet: UNet2DConditionModel) -> Any:
    """A pipeline of which only the UNet is there."""
    scheduler: Any = DDPMScheduler(steps_offset=1, clip_sample=False)
    none: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if kind == "as SDXL":
        none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        return StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **none)
    none |= dict.fromkeys(("safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, requires_safety_checker=False, **none
    )


@kinds
@layouts
def test_a_pipeline_of_diffusers_loads_it_and_computes_the_same(
    kind: str, layout: Layout, tmp_path: Path
) -> None:
    network = all_adapted(kind)
    x, t, cond = text_inputs(kind)
    wanted, unet = network(x, t, cond), text_unet(kind)
    plain = call_text_unet(unet, x, t, cond)
    assert save_lora(network, tmp_path, layout=layout) == tmp_path / FILE_NAME
    pipe = pipeline(kind, unet)
    pipe.load_lora_weights(tmp_path)
    given = call_text_unet(pipe.unet, x, t, cond)
    assert torch.equal(given, wanted)
    assert (given - plain).norm() > 0.1 * plain.norm()


@layouts
def test_reading_gives_every_number_back(layout: Layout, tmp_path: Path) -> None:
    network = all_adapted("as SDXL", 1)
    file = save_lora(network, tmp_path / "deep" / "a.safetensors", layout=layout)
    other = all_adapted("as SDXL", 2)
    load_lora(other, file)
    for (name, p), (same, q) in zip(
        network.named_parameters(), other.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(p, q)
    assert all(p.requires_grad for p in other.parameters())
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"]


def test_a_unet_of_diffusers_loads_it_without_a_pipeline(tmp_path: Path) -> None:
    network = all_adapted("as SDXL")
    x, t, cond = text_inputs("as SDXL")
    save_lora(network, tmp_path)
    unet = text_unet("as SDXL")
    unet.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    assert torch.equal(call_text_unet(unet, x, t, cond), network(x, t, cond))


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        out_channels=4,
        pos_embed_max_size=8,
    ).requires_grad_(False)


def test_a_transformer_of_diffusers_loads_it_too(tmp_path: Path) -> None:
    cond = TextPooledCondition(normal(2, 7, 6), normal(2, 5))
    x, t = normal(2, 4, 8, 8), torch.tensor([900.0, 20.0])
    network = adapted(SD3Network(sd3()), targets=("to_q", "to_out.0", "proj_out"))
    save_lora(network, tmp_path)
    other = sd3()
    plain = SD3Network(other)(x, t, cond)
    other.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
    assert torch.equal(SD3Network(other)(x, t, cond), network(x, t, cond))
    assert not torch.equal(plain, network(x, t, cond))
    with pytest.raises(ValueError, match="'kohya' has no names for a transformer"):
        save_lora(network, tmp_path, layout="kohya")


def test_without_its_metadata_diffusers_would_take_another_alpha(tmp_path) -> None:
    network = all_adapted("as SD1.5")
    x, t, cond = text_inputs("as SD1.5")
    file = save_lora(network, tmp_path)
    save_file(load_file(file), file)
    pipe = pipeline("as SD1.5", text_unet("as SD1.5"))
    pipe.load_lora_weights(tmp_path)
    given = call_text_unet(pipe.unet, x, t, cond)
    assert not torch.allclose(given, network(x, t, cond), rtol=0.1)
    with pytest.raises(ValueError, match=f"alpha {RANK}, the network {ALPHA}; make"):
        load_lora(network, file)
    as_rank = all_adapted("as SD1.5", alpha=RANK)
    load_lora(as_rank, file)
    assert torch.equal(as_rank(x, t, cond), given)


def test_the_names_are_those_that_each_side_knows(tmp_path: Path) -> None:
    network = all_adapted("as SDXL")
    save_lora(network, tmp_path / "kohya.safetensors", layout="kohya")
    save_lora(network, tmp_path / "diffusers.safetensors")
    kohya = load_file(tmp_path / "kohya.safetensors")
    theirs = load_file(tmp_path / "diffusers.safetensors")
    for name in (
        "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "down_blocks_0_downsamplers_0_conv",
        "down_blocks_1_resnets_0_conv_shortcut",
        "mid_block_resnets_1_time_emb_proj",
        "up_blocks_0_attentions_1_proj_in",
    ):
        down = kohya[f"lora_unet_{name}.lora_down.weight"]
        up = kohya[f"lora_unet_{name}.lora_up.weight"]
        assert down.shape[0] == up.shape[1] == RANK
        assert kohya[f"lora_unet_{name}.alpha"].item() == ALPHA
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert theirs[f"{layer}.lora_A.weight"].shape == (RANK, 16)
    assert len(kohya) * 2 == len(theirs) * 3
    with safe_open(tmp_path / "diffusers.safetensors", "pt") as opened:
        about = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (about["unet.r"], about["unet.lora_alpha"]) == (RANK, ALPHA)


def test_every_kohya_name_of_the_true_sdxl_leads_back_to_its_layer() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    ends = tuple(f".{target}" for target in OFFICIAL_TARGETS)
    layers = [name for name, _ in unet.named_modules() if name.endswith(ends)]
    flat = {f"lora_unet_{name.replace('.', '_')}" for name in layers}
    assert len(flat) == len(layers) == 788
    state = {
        f"{name}.{kind}.weight": torch.ones(1)
        for name in flat
        for kind in ("lora_down", "lora_up")
    }
    converted, _ = _convert_non_diffusers_lora_to_diffusers(state)
    assert set(convert_unet_state_dict_to_peft(converted)) == {
        f"unet.{name}.{kind}.weight" for name in layers for kind in ("lora_A", "lora_B")
    }


def official(unet: nn.Module, rank: int, alpha: float) -> dict[str, Tensor]:
    """A file as official DMD2 releases it: fp16, alphas included, made by its names."""
    state: dict[str, Tensor] = {}
    for name, weight in unet.named_parameters():
        if not name.endswith(tuple(f".{t}.weight" for t in OFFICIAL_TARGETS)):
            continue
        out, *into = weight.shape
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        state[f"{flat}.lora_down.weight"] = normal(rank, *into).half()
        state[f"{flat}.lora_up.weight"] = normal(
            out, rank, *(1 for _ in into[1:])
        ).half()
        state[f"{flat}.alpha"] = torch.tensor(alpha).half()
    return state


def test_a_file_of_the_official_kind_is_read_as_diffusers_reads_it(tmp_path) -> None:
    unet = text_unet("as SDXL")
    state = official(unet, rank=64, alpha=8)
    save_file(state, tmp_path / "lora.safetensors")
    x, t, cond = text_inputs("as SDXL")
    network = LoRANetwork(base("as SDXL"))
    load_lora(network, tmp_path / "lora.safetensors")
    pipe = pipeline("as SDXL", unet)
    plain = call_text_unet(unet, x, t, cond)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    wanted = call_text_unet(pipe.unet, x, t, cond)
    assert torch.equal(network(x, t, cond), wanted)
    assert not torch.equal(wanted, plain)


def test_half_precision_and_averages_are_written_as_asked(tmp_path: Path) -> None:
    network = adapted(base())
    ema = ExponentialMovingAverage(network, (0.5,))
    averages = ema.averages[0.5]
    fill(network, 9)
    with ema.applied_to(network):
        file = save_lora(network, tmp_path, dtype=torch.float16)
    for name, value in load_file(file).items():
        assert torch.equal(value, averages[f"adapter.{name}"].half())


# Bad input.


def edited(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Any]:
    """Reads a file with something wrong in it."""

    def call(folder: Path) -> None:
        state = official(text_unet("as SDXL"), rank=4, alpha=2)
        edit(state)
        save_file(state, folder / FILE_NAME)
        load_lora(LoRANetwork(base(), 4, 2), folder)

    return call


def another_rank(state: dict[str, Tensor]) -> None:
    state.update(official(text_unet("as SDXL"), rank=5, alpha=2))


def another_alpha(state: dict[str, Tensor]) -> None:
    state.update({k: v * 2 for k, v in state.items() if k.endswith(".alpha")})


def dora(folder: Path) -> None:
    network = adapted(base())
    file = save_lora(network, folder)
    about = {"unet.lora_alpha": ALPHA, "unet.use_dora": True}
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(about)})
    load_lora(network, file)


def broken(folder: Path) -> None:
    (folder / FILE_NAME).write_bytes(b"no tensors")
    load_lora(adapted(base()), folder)


FIRST = "lora_unet_mid_block_resnets_0_conv1"
BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a key too few": (
        edited(lambda state: state.pop(f"{FIRST}.lora_up.weight")),
        ValueError,
        f"1 names are only in FILE or only in the network, {FIRST}.lora_up.weight",
    ),
    "a key too many": (
        edited(lambda state: state.update(lora_te_x=torch.ones(1))),
        ValueError,
        "1 names are only in FILE or only in the network, lora_te_x",
    ),
    "another rank": (
        edited(another_rank),
        ValueError,
        "float16[5, 8, 3, 3], expected the shape [4, 8, 3, 3]",
    ),
    "another alpha": (
        edited(another_alpha),
        ValueError,
        "FILE has alpha 4, the network 2; make the LoRANetwork with that",
    ),
    "one other alpha": (
        edited(lambda state: state[f"{FIRST}.alpha"].mul_(3)),
        ValueError,
        "FILE has alpha 2, 6, the network 2",
    ),
    "another kind": (dora, ValueError, "FILE has use_dora True, expected a plain"),
    "another model": (
        lambda folder: load_lora(
            all_adapted("as SD2"), save_lora(all_adapted("as SDXL"), folder)
        ),
        ValueError,
        "names are only in FILE or only in the network",
    ),
    "no file": (
        lambda folder: load_lora(adapted(base()), folder),
        FileNotFoundError,
        "path: there is no file FILE.",
    ),
    "no safetensors": (broken, ValueError, "path: FILE is no safetensors file"),
    "no adapter": (
        lambda folder: save_lora(base(), folder),  # pyright: ignore[reportArgumentType]
        TypeError,
        "network: got UNetNetwork, expected a LoRANetwork",
    ),
    "no diffusers model": (
        lambda folder: save_lora(
            LoRANetwork(
                nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), targets=("0",)
            ),
            folder,
        ),
        ValueError,
        "network: it is made on a Sequential, expected a UNetNetwork",
    ),
    "layout": (
        lambda folder: save_lora(adapted(base()), folder, layout="sgm"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "layout: got 'sgm', expected 'diffusers' or 'kohya'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    call, kind, words = BAD[name]
    with as_in_a_script(), pytest.raises(kind) as caught:
        call(tmp_path)
    assert words.replace("FILE", str(tmp_path / FILE_NAME)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_is_left_alone_by_a_file_that_does_not_fit(tmp_path: Path) -> None:
    network = adapted(base(), 1)
    file = save_lora(adapted(base(), 2, rank=RANK + 1), tmp_path)
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ValueError, match="expected the shape"):
        load_lora(network, file)
    assert all(map(torch.equal, before, network.parameters()))
