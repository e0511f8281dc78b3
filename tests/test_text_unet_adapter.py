"""UNets that are conditioned on text: bit for bit diffusers' own, with features."""

import copy
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_diffusers import (
    TEXT_UNETS,
    call_text_unet,
    calls,
    gradients,
    normal,
    text_inputs,
    text_unet,
)
from helpers_script import as_in_a_script
from torch import Tensor, nn

from dmdkit import (
    ClassifierFreeGuidance,
    DiffusionGANHead,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    NetworkWithHead,
    ScoreEstimator,
    trainable_copy,
)
from dmdkit.adapters.diffusers import (
    EmptyPrompt,
    FeaturePlace,
    TextCondition,
    TextMaskCondition,
    TextPooledCondition,
    UNetNetwork,
    sdxl_time_ids,
    zero_text,
)
from dmdkit.types import NetworkOutput

kinds = pytest.mark.parametrize("kind", TEXT_UNETS)
MORE = {
    "any kind of blocks": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "resnet_time_scale_shift": "scale_shift",
    },
    "no text in the middle": {"mid_block_type": "UNetMidBlock2D"},
    "no middle": {"mid_block_type": None},
    "projected text, act after time": {
        "encoder_hid_dim_type": "text_proj",
        "encoder_hid_dim": 6,
        "cross_attention_dim": 4,
        "time_embedding_act_fn": "silu",
        "center_input_sample": True,
    },
}


@kinds
def test_the_output_is_diffusers_own_to_the_last_bit(kind: str) -> None:
    unet = text_unet(kind)
    x, t, cond = text_inputs(kind)
    theirs = call_text_unet(unet, x, t, cond)
    assert torch.equal(UNetNetwork(unet)(x, t, cond), theirs)
    given = UNetNetwork(unet)(x, t, cond, want=("output",))
    assert torch.equal(given.output, theirs)
    assert given.features is None


@pytest.mark.parametrize("name", MORE)
def test_unusual_unets_are_diffusers_own_too(name: str) -> None:
    unet = text_unet("as SD1.5", **MORE[name])
    x, t, cond = text_inputs("as SD1.5")
    assert torch.equal(UNetNetwork(unet)(x, t, cond), call_text_unet(unet, x, t, cond))


@kinds
@pytest.mark.parametrize("size", [(6, 10), (7, 9)], ids=str)
def test_sizes_that_do_not_halve_are_diffusers_own(kind, size) -> None:
    unet = text_unet(kind)
    _, t, cond = text_inputs(kind)
    x = normal(2, 4, *size)
    assert torch.equal(UNetNetwork(unet)(x, t, cond), call_text_unet(unet, x, t, cond))


@kinds
def test_features_are_what_a_hook_sees_at_the_middle_block(kind: str) -> None:
    unet = text_unet(kind)
    seen: list[Any] = []
    assert unet.mid_block is not None
    unet.mid_block.register_forward_hook(lambda m, a, out: seen.extend([a[0], out]))
    x, t, cond = text_inputs(kind)
    theirs = call_text_unet(unet, x, t, cond)
    before, after = seen
    assert not torch.equal(before, after)
    places: dict[FeaturePlace, Tensor] = {"encoder": before, "mid": after}
    for place, expected in places.items():
        network = UNetNetwork(unet, features=place)
        both = network(x, t, cond, want=("output", "features"))
        alone = network(x, t, cond, want=("features",))
        assert torch.equal(both.features, expected)
        assert torch.equal(both.output, theirs)
        assert torch.equal(alone.features, expected)
        assert alone.output is None
        assert expected.shape == (2, 16, 4, 4)


@kinds
def test_features_alone_leave_out_the_decoder_and_both_are_one_pass(kind: str) -> None:
    unet = text_unet(kind)
    x, t, cond = text_inputs(kind)
    assert unet.mid_block is not None
    assert isinstance(unet.conv_norm_out, nn.Module)
    decoder = [*unet.up_blocks, unet.conv_norm_out, unet.conv_out]
    encoder = [unet.conv_in, unet.time_embedding, *unet.down_blocks, unet.mid_block]
    called = calls(*encoder, *decoder)
    UNetNetwork(unet)(x, t, cond, want=("features",))
    assert len(called) == len(encoder)
    assert not set(called) & set(decoder)
    called.clear()
    UNetNetwork(unet)(x, t, cond, want=("output", "features"))
    assert len(called) == len(set(called)) == len(encoder + decoder)


@kinds
def test_gradients_are_those_of_diffusers_also_with_checkpointing(kind: str) -> None:
    unet = text_unet(kind).train()
    x, t, cond = text_inputs(kind)
    expected = gradients(unet, call_text_unet(unet, x, t, cond))
    expected = {name: g.clone() for name, g in expected.items()}
    assert len(expected) == len(list(unet.parameters()))
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        ours = gradients(unet, UNetNetwork(unet)(x, t, cond))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], g) for name, g in expected.items())


@kinds
def test_checkpointing_gives_the_same_gradients_through_features(kind: str) -> None:
    found = []
    for checkpointed in (False, True):
        unet = text_unet(kind).train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        x, t, cond = text_inputs(kind)
        features = UNetNetwork(unet)(x, t, cond, want=("features",)).features
        found.append(gradients(unet, features))
    assert found[0].keys() == found[1].keys()
    assert not any(name.startswith(("up_blocks", "conv_out")) for name in found[0])
    assert all(torch.equal(found[1][name], g) for name, g in found[0].items())


@kinds
def test_bf16_by_autocast_or_by_weights_is_diffusers_own(kind: str) -> None:
    unet = text_unet(kind)
    x, t, cond = text_inputs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = call_text_unet(unet, x, t, cond), UNetNetwork(unet)(x, t, cond)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    unet.bfloat16()
    theirs = call_text_unet(unet, x, t, cond)
    # Input, text and pooled text come in fp32: the network casts them.
    ours = UNetNetwork(unet)(x, t, cond)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_weights_stored_in_8_bits_compute_as_in_diffusers() -> None:
    unet = text_unet("as SD1.5")
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert unet.conv_in.weight.dtype == torch.float8_e4m3fn
    x, t, cond = text_inputs("as SD1.5")
    theirs = call_text_unet(unet, x, t, cond)
    assert torch.equal(UNetNetwork(unet)(x, t, cond), theirs)


def test_times_and_sizes_keep_their_precision_with_bf16_weights() -> None:
    unet = text_unet("as SDXL").bfloat16()
    seen: list[Tensor] = []
    for embedding in (unet.time_proj, unet.add_time_proj):
        assert isinstance(embedding, nn.Module)
        embedding.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    x, _, cond = text_inputs("as SDXL")
    cond = cond._replace(time_ids=sdxl_time_ids(2, (1021, 1023)))
    UNetNetwork(unet)(x, torch.tensor([749.0, 687.5]), cond)
    assert seen[0].tolist() == [749, 687.5]
    assert seen[1].tolist() == [1021, 1023, 0, 0, 1021, 1023] * 2


def test_a_time_that_was_rounded_on_the_way_is_refused() -> None:
    x, t, cond = text_inputs("as SD1.5")
    with pytest.raises(TypeError, match=r"c_noise: got bfloat16\[2\]") as caught:
        UNetNetwork(text_unet("as SD1.5"))(x, t.bfloat16(), cond)
    assert "cast_forward_inputs=False" in str(caught.value)


@kinds
def test_every_part_of_the_condition_is_seen(kind: str) -> None:
    network = UNetNetwork(text_unet(kind))
    x, t, cond = text_inputs(kind)
    before = network(x, t, cond)
    for name, part in cond._asdict().items():
        changed = part.clone()
        changed[1] += 1
        after = network(x, t, cond._replace(**{name: changed}))
        assert torch.equal(after[0], before[0])
        assert not torch.equal(after[1], before[1]), name


def test_conditions_of_the_wrong_kind_are_named() -> None:
    sd, sdxl = (UNetNetwork(text_unet(kind)) for kind in ("as SD1.5", "as SDXL"))
    x, t, text = text_inputs("as SD1.5")
    pooled = text_inputs("as SDXL")[2]
    for network, cond, message in (
        (sd, None, r"cond: got None, expected a TextCondition\(text\)"),
        (sd, pooled, r"cond: got TextPooledCondition .* a TextCondition\(text\)"),
        (sdxl, text, r"expected a TextPooledCondition\(text, pooled, time_ids\)"),
        (sd, {"text": text.text}, "cond: got dict, expected a TextCondition"),
        (sd, text.text, r"cond: got float32\[2, 7, 6\], expected a TextCondition"),
        (sd, TextCondition([1, 2]), r"cond.text: got list \[int 1, int 2\], expect"),  # pyright: ignore[reportArgumentType]
        (sdxl, pooled._replace(pooled=None), "cond.pooled: got None, expected a tens"),
    ):
        with pytest.raises(TypeError, match=message) as caught:
            network(x, t, cond)
        assert "\n" not in str(caught.value)
    for network, cond, message in (
        (sd, TextCondition(text.text[:1]), r"cond.text: .*\[1, 7, 6\], expected 2 in"),
        (sdxl, pooled._replace(time_ids=None), "time_ids: got None; SDXL wants"),
        (sdxl, pooled._replace(pooled=pooled.pooled[:1]), "cond.pooled: got"),
        (sd, TextCondition(normal(2, 7, 5)), "expected 6 in the last axis"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            network(x, t, cond)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "more"),
    [
        ("class_embed_type 'timestep'", {"class_embed_type": "timestep"}),
        ("num_class_embeds 4", {"num_class_embeds": 4}),
        ("addition_embed_type 'text'", {"addition_embed_type": "text"}),
        ("time_cond_proj_dim 8", {"time_cond_proj_dim": 8}),
        ("attention_type 'gated'", {"attention_type": "gated"}),
        (
            "encoder_hid_dim_type 'image_proj'",
            {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 6},
        ),
    ],
)
def test_what_a_unet_needs_beside_text_is_refused(option: str, more) -> None:
    if option.startswith("addition"):
        more = {**more, "addition_embed_type_num_heads": 1}
    with pytest.raises(ValueError, match=f"unet: {option} is not supp") as caught:
        UNetNetwork(text_unet("as SD1.5", **more))
    assert "\n" not in str(caught.value)


def test_an_empty_prompt_stands_for_every_sample() -> None:
    empty = EmptyPrompt(normal(1, 7, 6, seed=9))
    cond = text_inputs("as SD1.5", batch=3)[2]
    null = empty(cond)
    assert isinstance(null, TextCondition)
    assert torch.equal(null.text, empty.text.repeat(3, 1, 1))
    half = TextCondition(cond.text.bfloat16())
    assert empty(half).text.dtype == torch.bfloat16
    with_pooled = TextPooledCondition(cond.text, normal(3, 5), sdxl_time_ids(3, 64))
    both = EmptyPrompt(empty.text, pooled=torch.zeros(1, 5))(with_pooled)
    assert both.pooled.shape == (3, 5)
    assert both.time_ids is with_pooled.time_ids
    masked = TextMaskCondition(cond.text, torch.ones(3, 7, dtype=torch.long))
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0]])
    assert EmptyPrompt(empty.text, mask=mask)(masked).mask.sum() == 3
    with pytest.raises(ValueError, match="TextPooledCondition has `pooled`, the empty"):
        empty(with_pooled)
    with pytest.raises(ValueError, match="TextCondition lacks `pooled`, the empty"):
        EmptyPrompt(empty.text, pooled=torch.zeros(1, 5))(cond)
    with as_in_a_script():
        with pytest.raises(TypeError, match="cond: got dict, expected a text cond"):
            empty({"text": cond.text})  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"text: got float32\[2, 7, 6\], expected"):
            EmptyPrompt(normal(2, 7, 6))
        with pytest.raises(TypeError, match="text: got None, expected a tensor"):
            EmptyPrompt(None)  # pyright: ignore[reportArgumentType]


def test_zero_text_keeps_the_time_ids() -> None:
    cond = text_inputs("as SDXL")[2]
    null = zero_text(cond)
    assert torch.equal(null.text, torch.zeros(2, 7, 6))
    assert torch.equal(null.pooled, torch.zeros(2, 5))
    assert null.time_ids is cond.time_ids
    with as_in_a_script(), pytest.raises(TypeError, match="take an EmptyPrompt"):
        zero_text(TextCondition(cond.text))  # pyright: ignore[reportArgumentType]


def test_time_ids_are_size_corner_size() -> None:
    assert sdxl_time_ids(2, 64).tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert sdxl_time_ids(1, (48, 64)).tolist() == [[48, 64, 0, 0, 48, 64]]
    assert sdxl_time_ids(1, 8).dtype == torch.float32
    for batch, size in ((0, 64), (1, 0), (1, (64, -1))):
        with pytest.raises(ValueError, match="expected positive whole numbers"):
            sdxl_time_ids(batch, size)


@kinds
def test_guidance_in_one_batch_equals_two_calls(kind: str) -> None:
    x, t, cond = text_inputs(kind)
    empty = EmptyPrompt(normal(1, 7, 6, seed=8))
    null = zero_text if kind == "as SDXL" else empty
    network = UNetNetwork(text_unet(kind))
    process = DiscreteVariancePreserving.scaled_linear()
    teacher = ScoreEstimator(network, process, EpsilonPrediction())
    one, two = (
        ClassifierFreeGuidance(teacher, null, 3.0, merged)(x, t, cond)
        for merged in (False, True)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, teacher(x, t, cond))


def test_an_estimator_gives_x0_and_logits_in_one_pass_and_is_copied() -> None:
    unet = text_unet("as SDXL")
    process = DiscreteVariancePreserving.scaled_linear()
    teacher = ScoreEstimator(UNetNetwork(unet), process, EpsilonPrediction())
    critic = trainable_copy(teacher, head=DiffusionGANHead(16, 4, groups=4))
    x, t, cond = text_inputs("as SDXL")
    given = critic.estimate(x, t, cond, want=("x0", "logits"))
    assert given.logits is not None
    assert given.logits.shape == (2,)
    assert given.x0 is not None
    assert torch.equal(given.x0, teacher(x, t, cond))
    copied = copy.deepcopy(teacher)
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    assert torch.equal(copied(x, t, cond), given.x0)


# Two processes, without the import hook of the tests.


def critic(kind: str) -> nn.Module:
    torch.manual_seed(1)
    head = DiffusionGANHead(16, 4, groups=4)
    return NetworkWithHead(UNetNetwork(text_unet(kind).train()), head)


def backward(module: nn.Module, part: slice) -> dict[str, Tensor]:
    """A critic's turn: one pass for the output, another for logits; one backward."""
    x, t, cond = text_inputs("as SDXL", batch=4)
    x, t, cond = x[part], t[part], type(cond)(*(leaf[part] for leaf in cond))
    output = module(x, t, cond)
    given: NetworkOutput = module(x.flip(-1), t, cond, want=("logits",))
    assert given.logits is not None
    (output.square().mean() + given.logits.square().mean()).backward()
    grads = {}
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        gather = getattr(p.grad, "full_tensor", None)
        grads[name.removeprefix("module.")] = p.grad if gather is None else gather()
    return grads


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    size = max(g.abs().max().item() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-4, atol=1e-5 * size)


def check_ddp(part: slice, expected: dict[str, Tensor]) -> None:
    from torch.nn.parallel import DistributedDataParallel

    module = critic("as SDXL")
    for unet in module.modules():
        if hasattr(unet, "enable_gradient_checkpointing"):
            unet.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    close(backward(DistributedDataParallel(module), part), expected)


def check_fsdp(part: slice, expected: dict[str, Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, module = init_device_mesh("cpu", (2,)), critic("as SDXL")
    unet = module.get_submodule("network.unet")
    for group in ("down_blocks", "up_blocks"):
        for block in unet.get_submodule(group).children():
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    close(backward(module, part), expected)


def check_fsdp_in_bf16(part: slice, expected: dict[str, Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, module = init_device_mesh("cpu", (2,)), critic("as SDXL")
    fully_shard(
        module.get_submodule("head"), mesh=mesh, mp_policy=MixedPrecisionPolicy()
    )
    bf16 = MixedPrecisionPolicy(
        torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in module.get_submodule("network.unet.down_blocks").children():
        fully_shard(block, mesh=mesh, mp_policy=bf16)
    fully_shard(module, mesh=mesh, mp_policy=bf16)
    ours = backward(module, part)
    one, other = (
        torch.cat([g[name].flatten() for name in expected]) for g in (ours, expected)
    )
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert (one - other).norm() < 0.1 * other.norm()


CHECKS = {
    "ddp": check_ddp,
    "fsdp": check_fsdp,
    "fsdp in bf16": check_fsdp_in_bf16,
}


def worker(rank: int, folder: str) -> None:
    """Runs every check, and leaves a file for each that says how it went."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    expected = backward(critic("as SDXL"), slice(0, 4))
    for name, check in CHECKS.items():
        try:
            check(slice(rank * 2, rank * 2 + 2), expected)
            report = ""
        except Exception:
            report = traceback.format_exc()
        Path(folder, f"{name}{rank}").write_text(report)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return {
        name: "".join((folder / f"{name}{rank}").read_text() for rank in (0, 1))
        for name in CHECKS
    }


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_have_the_gradients_of_one(reports, name: str) -> None:
    assert reports[name] == ""


COMPILED = ("as SD1.5", "as SDXL")


def compiled_cases() -> None:
    for kind in COMPILED:
        network, (x, t, cond) = UNetNetwork(text_unet(kind)), text_inputs(kind)
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        ours = compiled(x, t, cond, want=("output", "features"))
        assert torch.equal(ours.output, network(x, t, cond))
        alone = compiled(x, t, cond, want=("features",))
        assert torch.equal(alone.features, ours.features)
        print(f"{kind} agrees")


@pytest.mark.slow
def test_networks_compile_to_one_graph() -> None:
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{kind} agrees" for kind in COMPILED]


if __name__ == "__main__":
    compiled_cases()
