"""What the diffusion transformers of diffusers have in common, as dmdkit sees them.

Nothing is patched or hooked: features come from calling a transformer's own blocks.
"""

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dmdkit.adapters.inputs import check_time, input_dtype
from dmdkit.types import Condition, Latent, NetworkOutput, Time, Want


class Tokens(NamedTuple):
    """What travels from block to block.

    Attributes:
        image: The image's tokens, [b, n, c].
        context: A block's further arguments, in its own order; if it answers with text
            beside the image, that takes the place of the first.
        emb: What the last norm is conditioned on.
        grid: The rows and columns of the image's tokens.
    """

    image: Tensor
    context: tuple[Any, ...]
    emb: Any
    grid: tuple[int, int]

    def first(self, count: int, shared: Sequence[int]) -> "Tokens":
        """Those of the first samples; `shared` are places in the context for all."""
        image, context, emb, grid = self

        def cut(parts: Any) -> Any:
            return tree_map_only(Tensor, lambda part: part[:count], parts)

        kept = (p if i in shared else cut(p) for i, p in enumerate(context))
        return Tokens(cut(image), tuple(kept), cut(emb), grid)

    def as_map(self) -> Tensor:
        """The image's tokens as a feature map, [b, c, rows, columns]."""
        return rearrange(self.image, "b (h w) c -> b c h w", h=self.grid[0])


class TransformerNetwork(nn.Module, abc.ABC):
    """A diffusion transformer of diffusers as a network with features.

    The input, text and pooled text are cast to the transformer's dtype; time stays
    fp32. Time is scaled by the parameterization: its `time_scale` brings the process's
    time to what the family expects. Wrap, shard and compile this module, not the
    transformer inside it, whose `forward` is never called. Under DDP, a backward that
    goes through features alone leaves the later blocks without gradients and needs
    `find_unused_parameters=True`; together with one through the output it does not.

    Attributes:
        blocks: The blocks in the order in which they run.

    Args:
        transformer: The transformer.
        features: The index of the block whose image tokens are the features, as a map
            [b, channels, rows, columns]; None is the middle one.

    Raises:
        TypeError: If the transformer is of another family.
        ValueError: If there is no such block.
    """

    family: ClassVar[type[ModelMixin]]
    """The class of diffusers that the adapter is for."""
    shared: ClassVar[tuple[int, ...]] = ()
    """Places in the blocks' context of what all samples share, without a batch axis."""

    def __init__(self, transformer: Any, features: int | None = None) -> None:
        super().__init__()
        if not isinstance(transformer, self.family):
            raise TypeError(
                f"transformer: got {type(transformer).__name__}, expected a diffusers "
                f"{self.family.__name__}."
            )
        self.transformer: Any = transformer
        count = len(self.blocks)
        place = count // 2 if features is None else features
        if not 0 <= place < count:
            raise ValueError(
                f"features: got {features}, expected the index of one of {count} "
                f"blocks, 0 ... {count - 1}."
            )
        self.place = place

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Latent,
            c_noise: Time,
            cond: Condition = None,
            *,
            want: Sequence[Want] | None = None,
            outputs: int | None = None,
            output_grad: bool = True,
        ) -> Any:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        return list(self.transformer.transformer_blocks)

    @property
    def patch(self) -> int:
        """The side of a token in the input."""
        return self.transformer.config["patch_size"]

    @property
    @abc.abstractmethod
    def first(self) -> nn.Module:
        """The layer that the input goes into."""

    @abc.abstractmethod
    def embed(self, x: Tensor, c_noise: Tensor, cond: Condition) -> Tokens:
        """Gives what the first block is fed.

        Args:
            x: The network's input in the transformer's dtype, [b, c, h, w].
            c_noise: What it is fed as time, fp32 [b].
            cond: The condition that the family wants.

        Returns:
            The tokens before the first block.

        Raises:
            TypeError: If the condition is of the wrong kind.
            ValueError: If the condition is of another batch, or lacks a part.
        """

    @abc.abstractmethod
    def unembed(self, tokens: Tokens) -> Tensor:
        """Gives the output from what the last block answered.

        Args:
            tokens: The tokens after the last block.

        Returns:
            The output, [b, c, h, w].
        """

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Condition = None,
        *,
        want: Sequence[Want] | None = None,
        outputs: int | None = None,
        output_grad: bool = True,
    ) -> Tensor | NetworkOutput:
        """Answers with the output alone, or with what `want` names, in one pass.

        Args:
            x: The network's input, [b, c, h, w].
            c_noise: What it is fed as time, fp32 [b].
            cond: The condition that the family wants.
            want: Any of "output", "features". Features alone leave out the later
                blocks.
            outputs: How many samples, the first of the batch, get an output; the later
                blocks run for these. None is all.
            output_grad: Whether the output has a graph; if not, only features do.

        Returns:
            The output, or a `NetworkOutput` if `want` is given.

        Raises:
            TypeError: If the condition is of the wrong kind, or time is bf16.
            ValueError: If the condition is of another batch, or the height or width of
                `x` is no multiple of a token's.
        """
        check_time(c_noise)
        if any(side % self.patch for side in x.shape[-2:]):
            raise ValueError(
                f"x: got shape {list(x.shape)}, expected a height and width that are "
                f"multiples of {self.patch}, the side of a token."
            )
        tokens = self.embed(
            x.to(input_dtype(self.transformer, self.first)), c_noise, cond
        )
        for block in self.blocks[: self.place + 1]:
            tokens = self._step(block, tokens)
        output, features = None, None
        if want is not None and "features" in want:
            features = tokens.as_map()
        if want is None or "output" in want:
            if outputs is not None:
                tokens = tokens.first(outputs, self.shared)
            with torch.set_grad_enabled(output_grad and torch.is_grad_enabled()):
                for block in self.blocks[self.place + 1 :]:
                    tokens = self._step(block, tokens)
                output = self.unembed(tokens)
        if want is None:
            assert output is not None
            return output
        return NetworkOutput(output, features)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """The rows and columns of tokens of an input.

        Args:
            x: The network's input, [b, c, h, w].

        Returns:
            Rows and columns.
        """
        return x.shape[-2] // self.patch, x.shape[-1] // self.patch

    def _step(self, block: nn.Module, tokens: Tokens) -> Tokens:
        if torch.is_grad_enabled() and self.transformer.gradient_checkpointing:
            checkpoint = self.transformer._gradient_checkpointing_func
            answer = checkpoint(block, tokens.image, *tokens.context)
        else:
            answer = block(tokens.image, *tokens.context)
        if isinstance(answer, Tensor):
            return tokens._replace(image=answer)
        text, image = answer
        return tokens._replace(image=image, context=(text, *tokens.context[1:]))


def unpatch(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Lays patches [b, rows * columns, patch * patch * c] out as [b, c, h, w]."""
    return rearrange(
        tokens,
        "b (h w) (p q c) -> b c (h p) (w q)",
        h=grid[0],
        w=grid[1],
        p=patch,
        q=patch,
    )
