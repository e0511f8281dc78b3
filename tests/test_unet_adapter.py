import copy
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from helpers_script import as_in_a_script
from torch import Tensor, nn

from dmdkit import KarrasPreconditioning, ScoreEstimator, VarianceExploding
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.types import FeatureNetwork

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
PLAIN = {
    **SMALL,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "attention and classes": {
        **SMALL,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 5,
    },
    "as EDM's ADM network": {
        **SMALL,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "num_class_embeds": 3,
        "layers_per_block": 2,
    },
    "skip blocks, fourier time": {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "time_embedding_type": "fourier",
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    },
    "centred input, no middle block": {
        **PLAIN,
        "center_input_sample": True,
        "mid_block_type": None,
    },
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: dict[str, Any]) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**config).eval()


def inputs(unet: UNet2DModel) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=g)
    classes = unet.config["num_class_embeds"]
    labels = None if classes is None else torch.tensor([0, classes - 1])
    return x, torch.tensor([0.3, 1.7]), labels


def count_calls(*modules: nn.Module) -> list[nn.Module]:
    called: list[nn.Module] = []
    for module in modules:
        module.register_forward_hook(lambda m, args, output: called.append(m))
    return called


@configs
def test_the_output_is_diffusers_own_to_the_last_bit(config) -> None:
    unet = build(config)
    x, c_noise, labels = inputs(unet)
    theirs = unet(x, c_noise, class_labels=labels).sample
    assert torch.equal(UNetNetwork(unet)(x, c_noise, labels), theirs)
    one_by_one = UNetNetwork(unet)(x, c_noise, labels, want=("output",))
    assert torch.equal(one_by_one.output, theirs)
    assert one_by_one.features is None


@configs
def test_features_are_what_a_hook_sees_at_the_middle_block(config) -> None:
    unet = build(config)
    if unet.mid_block is None:
        # The end of the encoder is all that there is.
        unet_seen = []
        unet.down_blocks[-1].register_forward_hook(
            lambda m, args, output: unet_seen.extend([output[0], output[0]])
        )
    else:
        unet_seen = []
        unet.mid_block.register_forward_hook(
            lambda m, args, output: unet_seen.extend([args[0], output])
        )
    x, c_noise, labels = inputs(unet)
    unet(x, c_noise, class_labels=labels)
    before, after = unet_seen[:2]
    for network, expected in (
        (UNetNetwork(unet, features="encoder"), before),
        (UNetNetwork(unet, features="mid"), after),
    ):
        both = network(x, c_noise, labels, want=("output", "features"))
        alone = network(x, c_noise, labels, want=("features",))
        assert torch.equal(both.features, expected)
        assert torch.equal(alone.features, expected)
        assert alone.output is None
        assert expected.shape[1] == config["block_out_channels"][-1]
    assert config.get("mid_block_type", "") is None or not torch.equal(before, after)


@configs
def test_features_alone_leave_out_the_decoder_and_both_are_one_pass(config) -> None:
    unet = build(config)
    x, c_noise, labels = inputs(unet)
    decoder = [*unet.up_blocks, unet.conv_norm_out, unet.conv_out]
    encoder = [unet.conv_in, unet.time_embedding, *unet.down_blocks]
    encoder += [] if unet.mid_block is None else [unet.mid_block]
    called = count_calls(*encoder, *decoder)
    network = UNetNetwork(unet)
    network(x, c_noise, labels, want=("features",))
    assert len(called) == len(encoder)
    assert not set(called) & set(decoder)
    called.clear()
    network(x, c_noise, labels, want=("output", "features"))
    assert len(called) == len(set(called)) == len(encoder + decoder)


@configs
def test_gradients_are_those_of_diffusers_also_with_checkpointing(config) -> None:
    gradients = []
    for ours, checkpointed in ((False, False), (True, False), (True, True)):
        unet = build(config).train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        x, c_noise, labels = inputs(unet)
        x.requires_grad_()
        output = (
            UNetNetwork(unet)(x, c_noise, labels)
            if ours
            else unet(x, c_noise, class_labels=labels).sample
        )
        output.square().mean().backward()
        weights = [p.grad for p in unet.parameters() if p.grad is not None]
        assert x.grad is not None
        gradients.append([x.grad, *weights])
    for others in gradients[1:]:
        assert len(others) == len(gradients[0])
        for one, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


@configs
def test_bf16_by_autocast_or_by_weights_is_diffusers_own(config) -> None:
    unet = build(config)
    x, c_noise, labels = inputs(unet)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = unet(x, c_noise, class_labels=labels).sample
        ours = UNetNetwork(unet)(x, c_noise, labels)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    unet.bfloat16()
    theirs = unet(x.bfloat16(), c_noise, class_labels=labels).sample
    # Our input is fp32: the network casts it, and leaves time as it is.
    network = UNetNetwork(unet)
    assert torch.equal(network(x, c_noise, labels), theirs)
    assert network(x, c_noise, labels, want=("features",)).features.dtype == (
        torch.bfloat16
    )


def test_large_times_keep_their_precision_with_bf16_weights() -> None:
    # bf16 knows no 749 and 751 (both would be 748 or 752).
    unet = build(PLAIN).bfloat16()
    seen = []
    unet.time_proj.register_forward_hook(lambda m, args, output: seen.append(args[0]))
    UNetNetwork(unet)(torch.zeros(2, 3, 8, 8), torch.tensor([749.0, 751.0]))
    assert seen[0].tolist() == [749, 751]


def test_it_is_a_network_as_an_estimator_wants_it() -> None:
    network = UNetNetwork(build(PLAIN))
    assert isinstance(network, FeatureNetwork)
    teacher = ScoreEstimator(network, VarianceExploding(), KarrasPreconditioning())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0])
    found = teacher.estimate(x, t, want=("x0", "features"))
    assert found.x0 is not None
    assert found.features is not None
    assert found.x0.shape == x.shape
    assert found.features.shape == (2, 16, 4, 4)
    torch.testing.assert_close(teacher(x, t), found.x0)


def test_a_copy_is_apart_from_its_original() -> None:
    unet = build(CONFIGS["attention and classes"])
    network = UNetNetwork(unet, features="encoder")
    x, c_noise, labels = inputs(unet)
    before = network(x, c_noise, labels)
    copied = copy.deepcopy(network)
    assert copied.place == "encoder"
    assert torch.equal(copied(x, c_noise, labels), before)
    with torch.no_grad():
        copied.unet.conv_in.weight.add_(1)
    assert torch.equal(network(x, c_noise, labels), before)
    assert not torch.equal(copied(x, c_noise, labels), before)


def test_labels_change_the_answer() -> None:
    unet = build(CONFIGS["attention and classes"])
    x, c_noise, _ = inputs(unet)
    network = UNetNetwork(unet)
    one, other = (
        network(x, c_noise, torch.tensor(labels)) for labels in ([0, 1], [0, 2])
    )
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_bad_labels_are_named() -> None:
    with_classes = UNetNetwork(build(CONFIGS["attention and classes"]))
    without = UNetNetwork(build(PLAIN))
    x, c_noise = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="cond: the UNet needs class labels, got None"):
        with_classes(x, c_noise, None)
    with pytest.raises(ValueError, match="cond: the UNet has no classes"):
        without(x, c_noise, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"cond: got float32\[2\], expected integer"):
        with_classes(x, c_noise, torch.zeros(2))
    with as_in_a_script(), pytest.raises(TypeError, match="cond: got list"):
        with_classes(x, c_noise, [0, 1])
    with pytest.raises(ValueError, match=r"cond: got int64\[3\], expected one label"):
        with_classes(x, c_noise, torch.zeros(3, dtype=torch.long))


def test_what_is_not_supported_is_refused_when_it_is_built() -> None:
    with as_in_a_script():
        message = "unet: got Linear, expected a diffusers UNet2DModel"
        with pytest.raises(TypeError, match=message):
            UNetNetwork(nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="features: got 'up'"):
            UNetNetwork(build(PLAIN), features="up")  # pyright: ignore[reportArgumentType]
    for kind in ("timestep", "identity"):
        with pytest.raises(ValueError, match=f"class_embed_type '{kind}' is not"):
            UNetNetwork(build({**PLAIN, "class_embed_type": kind}))
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 10}
    with pytest.raises(ValueError, match="time_embedding_type 'learned'"):
        UNetNetwork(build({**PLAIN, **learned}))
