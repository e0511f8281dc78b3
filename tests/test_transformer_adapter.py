"""Diffusion transformers: bit for bit diffusers' own, with features at a block."""

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
    TRANSFORMERS,
    call_transformer,
    calls,
    gradients,
    normal,
    transformer,
    transformer_inputs,
    transformer_network,
)
from helpers_script import as_in_a_script
from torch import Tensor, nn

from dmdkit import (
    ClassifierFreeGuidance,
    DiffusionGANHead,
    RectifiedFlow,
    ScoreEstimator,
    VelocityPrediction,
    trainable_copy,
)
from dmdkit.adapters.diffusers import (
    DiTNetwork,
    EmptyPrompt,
    FluxNetwork,
    PixArtNetwork,
    SD3Network,
    TextCondition,
    TextPooledCondition,
    TransformerNetwork,
)

kinds = pytest.mark.parametrize("kind", TRANSFORMERS)


@kinds
def test_the_output_is_diffusers_own_to_the_last_bit(kind: str) -> None:
    model = transformer(kind)
    x, t, cond = transformer_inputs(kind)
    theirs = call_transformer(kind, model, x, t, cond)
    network = transformer_network(kind, model)
    assert isinstance(network, TransformerNetwork)
    assert torch.equal(network(x, t, cond), theirs)
    given = network(x, t, cond, want=("output",))
    assert torch.equal(given.output, theirs)
    assert given.features is None


@pytest.mark.parametrize("kind", [kind for kind in TRANSFORMERS if kind != "DiT"])
def test_images_that_are_no_squares_are_diffusers_own(kind: str) -> None:
    model = transformer(kind)
    x, t, cond = transformer_inputs(kind, size=(4, 10))
    network = transformer_network(kind, model, 1)
    given = network(x, t, cond, want=("output", "features"))
    assert torch.equal(given.output, call_transformer(kind, model, x, t, cond))
    assert given.features.shape == (2, 24, 2, 5)


def test_a_dit_that_is_no_square_keeps_its_rows_and_columns() -> None:
    # Diffusers knows squares only. Without attention, a patch answers for itself.
    model = transformer("DiT")
    for block in model.transformer_blocks:
        block.attn1.to_out[0].weight.data.zero_()
    model.pos_embed.pos_embed = None
    _, t, labels = transformer_inputs("DiT")
    x = normal(2, 4, 8, 8)
    square = call_transformer("DiT", model, x, t, labels)
    given = DiTNetwork(model)(x[:, :, 2:8, 4:8], t, labels)
    torch.testing.assert_close(given, square[:, :, 2:8, 4:8])


@kinds
@pytest.mark.parametrize("place", [0, 1, 2])
def test_features_are_what_a_hook_sees_at_the_block(kind: str, place: int) -> None:
    model = transformer(kind)
    network = transformer_network(kind, model, place)
    seen: list[Any] = []
    network.blocks[place].register_forward_hook(lambda m, a, out: seen.append(out))
    x, t, cond = transformer_inputs(kind)
    theirs = call_transformer(kind, model, x, t, cond)
    tokens = seen[0][1] if isinstance(seen[0], tuple) else seen[0]
    assert tokens.shape == (2, 16, 24)
    both = network(x, t, cond, want=("output", "features"))
    alone = network(x, t, cond, want=("features",))
    assert torch.equal(both.output, theirs)
    assert alone.output is None
    for features in (both.features, alone.features):
        assert features.shape == (2, 24, 4, 4)
        # Row by row, as a patch embedding lays tokens out.
        for row, column in ((0, 0), (0, 3), (2, 1)):
            token = tokens[:, 4 * row + column]
            assert torch.equal(features[:, :, row, column], token)


@kinds
def test_features_alone_leave_out_the_later_blocks(kind: str) -> None:
    model = transformer(kind)
    network = transformer_network(kind, model, 1)
    blocks = network.blocks
    x, t, cond = transformer_inputs(kind)
    called = calls(*blocks, model.norm_out)
    network(x, t, cond, want=("features",))
    assert called == blocks[:2]
    called.clear()
    network(x, t, cond, want=("output", "features"))
    assert called == [*blocks, model.norm_out]


def test_the_middle_block_is_the_default() -> None:
    assert transformer_network("SD3", transformer("SD3")).place == 1
    assert transformer_network("Flux schnell", transformer("Flux schnell")).place == 2


@kinds
def test_gradients_are_those_of_diffusers_also_with_checkpointing(kind: str) -> None:
    model = transformer(kind)
    x, t, cond = transformer_inputs(kind)
    expected = gradients(model, call_transformer(kind, model, x, t, cond))
    expected = {name: g.clone() for name, g in expected.items()}
    network = transformer_network(kind, model)
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        ours = gradients(model, network(x, t, cond))
        assert ours.keys() == expected.keys()
        for name, g in expected.items():
            torch.testing.assert_close(ours[name], g, rtol=1e-5, atol=1e-7)
    features = network(x, t, cond, want=("features",)).features
    checkpointed = {n: g.clone() for n, g in gradients(model, features).items()}
    model.disable_gradient_checkpointing()
    features = network(x, t, cond, want=("features",)).features
    plain = gradients(model, features)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(checkpointed[name], g) for name, g in plain.items())
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
    assert not any(name.startswith((last, "proj_out")) for name in plain) or (
        kind.startswith("Flux")
    )


@kinds
def test_checkpointed_blocks_run_again_in_the_backward(kind: str) -> None:
    network = transformer_network(kind, transformer(kind))
    x, t, cond = transformer_inputs(kind)
    entered: list[nn.Module] = []
    for block in network.blocks:
        # Recomputation stops before a block's end, so a hook there would miss it.
        block.register_forward_pre_hook(lambda m, args: entered.append(m))
    for checkpointed in (False, True):
        if checkpointed:
            network.transformer.enable_gradient_checkpointing()
        entered.clear()
        network(x, t, cond).sum().backward()
        assert len(entered) == len(network.blocks) * (2 if checkpointed else 1)


@kinds
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_bf16_by_autocast_or_by_weights_is_diffusers_own(kind: str) -> None:
    model = transformer(kind)
    x, t, cond = transformer_inputs(kind)
    if kind.startswith("Flux"):
        # Diffusers rounds Flux's time to bf16, before and after x1000.
        t = torch.tensor([0.5, 0.25])
    network = transformer_network(kind, model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = call_transformer(kind, model, x, t, cond)
        ours = network(x, t, cond)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    model.bfloat16()
    theirs = call_transformer(kind, model, x, t, cond)
    ours = network(x, t, cond)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@kinds
def test_time_keeps_its_precision_with_bf16_weights(kind: str) -> None:
    model = transformer(kind).bfloat16()
    embeddings = [m for n, m in model.named_modules() if n.endswith(".time_proj")]
    seen: list[Tensor] = []
    embeddings[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    x, t, cond = transformer_inputs(kind)
    transformer_network(kind, model)(x, t, cond)
    assert seen[0].tolist() == pytest.approx([749, 250], abs=1e-3)
    with pytest.raises(TypeError, match=r"c_noise: got bfloat16\[2\]"):
        transformer_network(kind, model)(x, t.bfloat16(), cond)


@kinds
def test_every_part_of_the_condition_is_seen(kind: str) -> None:
    network = transformer_network(kind, transformer(kind))
    x, t, cond = transformer_inputs(kind)
    before = network(x, t, cond)
    parts = {"labels": cond} if kind == "DiT" else cond._asdict()
    for name, part in parts.items():
        if part is None:
            continue
        changed = part.clone()
        changed[1] = 1 - changed[1] if name == "mask" else changed[1] - 1
        new = changed if kind == "DiT" else cond._replace(**{name: changed})
        if name == "mask":
            new.mask[1, 0] = 1
        after = network(x, t, new)
        torch.testing.assert_close(after[0], before[0])
        assert not torch.allclose(after[1], before[1]), name
    assert not torch.allclose(network(x, t / 2, cond), before)


def test_masked_tokens_do_not_matter() -> None:
    network = PixArtNetwork(transformer("PixArt sigma"))
    x, t, cond = transformer_inputs("PixArt sigma")
    noise = normal(2, 7, 6, seed=9) * (1 - cond.mask)[:, :, None]
    torch.testing.assert_close(
        network(x, t, cond), network(x, t, cond._replace(text=cond.text + noise))
    )


def test_guidance_is_told_to_whom_it_is_known() -> None:
    model = transformer("Flux dev")
    x, t, cond = transformer_inputs("Flux dev")
    one, other = (FluxNetwork(model, guidance=scale) for scale in (1, 3.5))
    assert not torch.equal(one(x, t, cond), other(x, t, cond))
    with pytest.raises(ValueError, match="guidance_embeds True; pass a scale"):
        FluxNetwork(model)
    with pytest.raises(ValueError, match="guidance_embeds False; leave it out"):
        FluxNetwork(transformer("Flux schnell"), guidance=3.5)


def test_labels_are_not_dropped_in_train_mode() -> None:
    network = DiTNetwork(transformer("DiT").train())
    copied = copy.deepcopy(nn.Sequential(network)).train()[0]
    x, t, labels = transformer_inputs("DiT")
    torch.manual_seed(0)
    answers = [net(x, t, labels) for net in (network, copied) for _ in range(20)]
    assert network.training
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_what_does_not_fit_is_named() -> None:
    sd3, flux = (transformer_network(k, transformer(k)) for k in ("SD3", "Flux dev"))
    dit, pixart = (
        transformer_network(k, transformer(k)) for k in ("DiT", "PixArt alpha")
    )
    x, t, cond = transformer_inputs("SD3")
    mask = transformer_inputs("PixArt sigma")[2]
    errors: list[tuple[Any, Tensor, Any, type[Exception], str]] = [
        (sd3, x, TextCondition(cond.text), TypeError, "expected a TextPooledCond"),
        (pixart, x, cond, TypeError, "cond: got TextPooledCondition .* TextMaskCond"),
        (dit, x, cond, TypeError, "expected integer labels"),
        (dit, x, torch.tensor([1]), ValueError, "one label for each of 2 samples"),
        (dit, x, torch.zeros(2), TypeError, r"got float32\[2\], expected integer"),
        (pixart, x, mask, ValueError, "cond.resolution: got None; this PixArt is told"),
        (sd3, x[:, :, :7], cond, ValueError, "expected a height and width that are"),
        (flux, x[..., :5], cond, ValueError, "multiples of 2, the side of a token"),
        (
            sd3,
            x,
            TextPooledCondition(cond.text, cond.pooled, torch.zeros(2, 6)),
            ValueError,
            "cond.time_ids: got .*, expected None; only SDXL is told sizes",
        ),
        (
            flux,
            x,
            cond._replace(text=normal(2, 7, 4)),
            ValueError,
            "expected 6 in the last axis",
        ),
    ]
    for network, given, wrong, error, message in errors:
        with pytest.raises(error, match=message) as caught:
            network(given, t, wrong)
        assert "\n" not in str(caught.value)
    for place in (-1, 3):
        with pytest.raises(ValueError, match=rf"features: got {place}, .* 0 \.\.\. 2"):
            SD3Network(transformer("SD3"), features=place)
    with as_in_a_script(), pytest.raises(TypeError, match="diffusers SD3Transformer2D"):
        SD3Network(transformer("DiT"))


@pytest.mark.parametrize(("kind", "scale"), [("SD3", 1000), ("Flux schnell", 1)])
def test_a_critic_with_a_head_guides_and_gives_logits(kind: str, scale: int) -> None:
    parameterization = VelocityPrediction(time_scale=scale)
    network = transformer_network(kind, transformer(kind))
    teacher = ScoreEstimator(network, RectifiedFlow(), parameterization)
    critic = trainable_copy(teacher, head=DiffusionGANHead(24, 4, groups=4))
    x, _, cond = transformer_inputs(kind)
    t = torch.tensor([0.3, 1.0])
    given = critic.estimate(x, t, cond, want=("x0", "logits"))
    assert given.logits is not None
    assert given.logits.shape == (2,)
    output = call_transformer(kind, network.transformer, x, t * scale, cond)
    assert given.x0 is not None
    torch.testing.assert_close(given.x0, x - t.view(2, 1, 1, 1) * output)
    empty = EmptyPrompt(normal(1, 7, 6, seed=8), pooled=normal(1, 5, seed=9))
    one, two = (
        ClassifierFreeGuidance(teacher, empty, 3.0, merged)(x, t, cond)
        for merged in (False, True)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# Two processes, without the import hook of the tests.

DISTRIBUTED = ("SD3", "Flux dev", "PixArt alpha", "DiT")


def backward(kind: str, module: nn.Module, part: slice) -> dict[str, Tensor]:
    """One pass for output and features, and one backward through both."""
    x, t, cond = transformer_inputs(kind, batch=4)
    leaves = (
        cond[part] if kind == "DiT" else [c if c is None else c[part] for c in cond]
    )
    cond = leaves if kind == "DiT" else type(cond)(*leaves)
    given = module(x[part], t[part], cond, want=("output", "features"))
    (given.output.square().mean() + given.features.square().mean()).backward()
    grads = {}
    for name, p in module.named_parameters():
        if p.grad is not None:
            gather = getattr(p.grad, "full_tensor", None)
            whole = p.grad if gather is None else gather()
            grads[name.removeprefix("module.")] = whole
    return grads


def check(kind: str, wrapper: str, part: slice) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    expected = backward(kind, transformer_network(kind, transformer(kind)), slice(0, 4))
    module = transformer_network(kind, transformer(kind))
    if wrapper == "ddp":
        # The text side of a last block has weights that nothing depends on.
        module = DistributedDataParallel(module, find_unused_parameters=True)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in module.blocks[1:]:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    ours = backward(kind, module, part)
    size = max(g.abs().max().item() for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-4, atol=1e-5 * size)


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
    for kind in DISTRIBUTED:
        for wrapper in ("ddp", "fsdp"):
            try:
                check(kind, wrapper, slice(rank * 2, rank * 2 + 2))
                report = ""
            except Exception:
                report = traceback.format_exc()
            Path(folder, f"{kind} {wrapper}{rank}").write_text(report)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_two_ranks_have_the_gradients_of_one(reports, kind: str, wrapper: str) -> None:
    found = (Path(reports, f"{kind} {wrapper}{rank}").read_text() for rank in (0, 1))
    assert "".join(found) == ""


@pytest.mark.slow
def test_networks_compile_to_one_graph() -> None:
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{kind} agrees" for kind in DISTRIBUTED]


if __name__ == "__main__":
    for kind in DISTRIBUTED:
        network = transformer_network(kind, transformer(kind))
        x, t, cond = transformer_inputs(kind)
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        ours = compiled(x, t, cond, want=("output", "features"))
        assert torch.equal(ours.output, network(x, t, cond))
        alone = compiled(x, t, cond, want=("features",))
        assert torch.equal(alone.features, ours.features)
        print(f"{kind} agrees")
