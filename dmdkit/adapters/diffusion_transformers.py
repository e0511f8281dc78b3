"""One network for each family of diffusion transformers: SD3, Flux, PixArt, DiT."""

from typing import ClassVar

import torch
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from dmdkit._checked import describe
from dmdkit.adapters.conditions import TextMaskCondition, TextPooledCondition
from dmdkit.adapters.inputs import check_condition
from dmdkit.adapters.transformer_networks import Tokens, TransformerNetwork, unpatch
from dmdkit.types import Condition


class SD3Network(TransformerNetwork):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206).

    The condition is a `TextPooledCondition` without time ids. Time reaches the network
    as 0 ... 1000: `VelocityPrediction(time_scale=1000)` with `RectifiedFlow`.

    Args:
        transformer: A diffusers `SD3Transformer2DModel`.
        features: See `TransformerNetwork`.

    Examples:
        >>> import torch
        >>> from dmdkit.adapters.diffusers import TextPooledCondition
        >>> transformer = SD3Transformer2DModel(
        ...     sample_size=8,
        ...     in_channels=4,
        ...     out_channels=4,
        ...     num_layers=2,
        ...     attention_head_dim=4,
        ...     num_attention_heads=2,
        ...     joint_attention_dim=6,
        ...     caption_projection_dim=8,
        ...     pooled_projection_dim=5,
        ... )
        >>> network = SD3Network(transformer, features=0)
        >>> cond = TextPooledCondition(torch.zeros(1, 7, 6), torch.zeros(1, 5))
        >>> x, c_noise = torch.zeros(1, 4, 8, 8), torch.tensor([750.0])
        >>> network(x, c_noise, cond, want=("features",)).features.shape
        torch.Size([1, 8, 4, 4])
    """

    family: ClassVar[type[ModelMixin]] = SD3Transformer2DModel

    @property
    def first(self) -> nn.Module:
        """The layer that the input goes into."""
        return self.transformer.pos_embed.proj

    def embed(self, x: Tensor, c_noise: Tensor, cond: Condition) -> Tokens:
        """Gives what the first block is fed."""
        model = self.transformer
        _check_text_pooled(cond, x, model.config["joint_attention_dim"])
        image = model.pos_embed(x).contiguous()
        emb = model.time_text_embed(c_noise, cond.pooled.to(x.dtype))
        text = model.context_embedder(cond.text.to(x.dtype))
        return Tokens(image, (text, emb, None), emb, self.grid(x))

    def unembed(self, tokens: Tokens) -> Tensor:
        """Gives the output from what the last block answered."""
        model = self.transformer
        output = model.proj_out(model.norm_out(tokens.image, tokens.emb))
        return unpatch(output, tokens.grid, self.patch)


class FluxNetwork(TransformerNetwork):
    """Flux.1: latents [b, c, h, w] are packed into tokens of 2 x 2 and unpacked here.

    The condition is a `TextPooledCondition` without time ids. Time reaches the network
    in [0, 1]: `VelocityPrediction(time_scale=1)`; the transformer scales it by 1000
    itself. It does so in fp32 here; with bf16 weights, diffusers rounds time before and
    after that, so that 0.749 becomes 752.

    Args:
        transformer: A diffusers `FluxTransformer2DModel`.
        features: See `TransformerNetwork`; the index runs on from `transformer_blocks`
            through `single_transformer_blocks`.
        guidance: The guidance scale that a guidance-distilled transformer (Flux.1 dev)
            is told, such as 3.5; None for any other.

    Raises:
        ValueError: If `guidance` is missing or not wanted, or there is no such block.
    """

    family: ClassVar[type[ModelMixin]] = FluxTransformer2DModel
    shared: ClassVar[tuple[int, ...]] = (2,)  # the positions

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        features: int | None = None,
        guidance: float | int | None = None,
    ) -> None:
        super().__init__(transformer, features)
        is_told = transformer.config["guidance_embeds"]
        if is_told != (guidance is not None):
            raise ValueError(
                f"guidance: got {guidance}, but the transformer has guidance_embeds "
                f"{is_told}; " + ("pass a scale." if is_told else "leave it out.")
            )
        self.guidance = guidance

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        model = self.transformer
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    @property
    def patch(self) -> int:
        """The side of a token in the input; diffusers leaves packing to pipelines."""
        return 2

    @property
    def first(self) -> nn.Module:
        """The layer that the input goes into."""
        return self.transformer.x_embedder

    def embed(self, x: Tensor, c_noise: Tensor, cond: Condition) -> Tokens:
        """Gives what the first block is fed."""
        model, (rows, columns) = self.transformer, self.grid(x)
        _check_text_pooled(cond, x, model.config["joint_attention_dim"])
        packed = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        image = model.x_embedder(packed)
        scales = [c_noise * 1000]
        if self.guidance is not None:
            scales.append(torch.full_like(c_noise, self.guidance * 1000))
        emb = model.time_text_embed(*scales, cond.pooled.to(x.dtype))
        text = model.context_embedder(cond.text.to(x.dtype))
        rotary = model.pos_embed(_flux_positions(c_noise, text.shape[1], rows, columns))
        return Tokens(image, (text, emb, rotary, None), emb, (rows, columns))

    def unembed(self, tokens: Tokens) -> Tensor:
        """Gives the output from what the last block answered."""
        model, (rows, columns) = self.transformer, tokens.grid
        output = model.proj_out(model.norm_out(tokens.image, tokens.emb))
        return rearrange(
            output,
            "b (h w) (c p q) -> b c (h p) (w q)",
            h=rows,
            w=columns,
            p=2,
            q=2,
        )


class PixArtNetwork(TransformerNetwork):
    """PixArt-alpha and -sigma (Chen et al. 2023, arXiv 2310.00426).

    The condition is a `TextMaskCondition`. Time reaches the network as an index. If its
    output has twice the channels, the variance half is dropped here.

    Args:
        transformer: A diffusers `PixArtTransformer2DModel`.
        features: See `TransformerNetwork`.
    """

    family: ClassVar[type[ModelMixin]] = PixArtTransformer2DModel

    @property
    def first(self) -> nn.Module:
        """The layer that the input goes into."""
        return self.transformer.pos_embed.proj

    def embed(self, x: Tensor, c_noise: Tensor, cond: Condition) -> Tokens:
        """Gives what the first block is fed."""
        model = self.transformer
        check_condition(cond, TextMaskCondition, x, model.config["caption_channels"])
        sizes = {"resolution": cond.resolution, "aspect_ratio": cond.aspect_ratio}
        missing = [name for name, value in sizes.items() if value is None]
        if model.use_additional_conditions and missing:
            raise ValueError(
                f"cond.{missing[0]}: got None; this PixArt is told resolution and "
                "aspect_ratio, so give both."
            )
        image = model.pos_embed(x)
        time, emb = model.adaln_single(
            c_noise, sizes, batch_size=len(x), hidden_dtype=image.dtype
        )
        text = cond.text.to(x.dtype)
        if model.caption_projection is not None:
            text = model.caption_projection(text)
        # The value that diffusers adds to attention where the mask is 0.
        bias = (1 - cond.mask.to(image.dtype))[:, None] * -10000.0
        context = (None, text, bias, time, None, None)
        return Tokens(image, context, emb, self.grid(x))

    def unembed(self, tokens: Tokens) -> Tensor:
        """Gives the output from what the last block answered."""
        model = self.transformer
        table = model.scale_shift_table[None] + tokens.emb[:, None]
        shift, scale = table.chunk(2, dim=1)
        image = model.norm_out(tokens.image) * (1 + scale) + shift
        output = unpatch(model.proj_out(image), tokens.grid, self.patch)
        return _without_variance(output, model.config["in_channels"])


class DiTNetwork(TransformerNetwork):
    """DiT on ImageNet (Peebles & Xie 2022, arXiv 2212.09748).

    The condition is a batch of class labels, integers [b]; the number of classes itself
    is the null label of guidance. Time reaches the network as an index. If its output
    has twice the channels, the variance half is dropped here. Labels are never dropped
    at random, in train mode either: diffusers would draw anew in every block.

    Args:
        transformer: A diffusers `DiTTransformer2DModel`.
        features: See `TransformerNetwork`.
    """

    family: ClassVar[type[ModelMixin]] = DiTTransformer2DModel

    def __init__(
        self, transformer: DiTTransformer2DModel, features: int | None = None
    ) -> None:
        super().__init__(transformer, features)
        self.train(transformer.training)

    def train(self, mode: bool = True) -> "DiTNetwork":
        """Sets train or eval mode, except where labels are embedded."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, LabelEmbedding):
                module.eval()
        return self

    @property
    def first(self) -> nn.Module:
        """The layer that the input goes into."""
        return self.transformer.pos_embed.proj

    def embed(self, x: Tensor, c_noise: Tensor, cond: Condition) -> Tokens:
        """Gives what the first block is fed."""
        if not isinstance(cond, Tensor) or cond.is_floating_point():
            raise TypeError(f"cond: got {describe(cond)}, expected integer labels.")
        if cond.shape != x.shape[:1]:
            raise ValueError(
                f"cond: got {describe(cond)}, expected one label for each of {len(x)} "
                "samples."
            )
        context = (None, None, None, c_noise, None, cond)
        image = self.transformer.pos_embed(x)
        return Tokens(image, context, (c_noise, cond), self.grid(x))

    def unembed(self, tokens: Tokens) -> Tensor:
        """Gives the output from what the last block answered."""
        model, image = self.transformer, tokens.image
        # The last norm shares the embedding of the first block's.
        embedding = model.transformer_blocks[0].norm1.emb
        emb = silu(embedding(*tokens.emb, hidden_dtype=image.dtype))
        shift, scale = model.proj_out_1(emb).chunk(2, dim=1)
        image = model.norm_out(image) * (1 + scale[:, None]) + shift[:, None]
        output = unpatch(model.proj_out_2(image), tokens.grid, self.patch)
        return _without_variance(output, model.config["in_channels"])


def _check_text_pooled(cond: Condition, x: Tensor, width: int) -> None:
    check_condition(cond, TextPooledCondition, x, width)
    if cond.time_ids is not None:
        raise ValueError(
            f"cond.time_ids: got {describe(cond.time_ids)}, expected None; only SDXL "
            "is told sizes."
        )


def _flux_positions(like: Tensor, text: int, rows: int, columns: int) -> Tensor:
    """(0, row, column) of every token [n, 3]; text first, all of it at the origin."""
    kind = {"device": like.device, "dtype": torch.float32}
    row, column = torch.meshgrid(
        torch.arange(rows, **kind), torch.arange(columns, **kind), indexing="ij"
    )
    image = torch.stack((torch.zeros_like(row), row, column), dim=-1).reshape(-1, 3)
    return torch.cat((image.new_zeros(text, 3), image))


def _without_variance(output: Tensor, channels: int) -> Tensor:
    return output[:, :channels]
