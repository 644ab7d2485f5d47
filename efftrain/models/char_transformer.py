"""A small decoder-only language model over bytes."""

# B sequences, T bytes each, D = width, H heads of size D / H

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.models.pretrained import Pretrained, require


@dataclass(frozen=True)
class CharTransformerConfig:
    """Sizes of a ``CharTransformer``."""

    vocab: int = 256
    context: int = 128
    """Longest sequence, in bytes."""
    width: int = 128
    depth: int = 4
    heads: int = 4
    """Divides ``width``."""
    tied: bool = False
    """Use the embedding as the output layer too. Saves ``vocab * width`` parameters; the first and the last stage of a
    pipeline must then share one tensor, so leave it off there."""

    def __post_init__(self) -> None:
        sizes = (self.vocab, self.context, self.width, self.depth, self.heads)
        require(min(sizes) > 0, "char-transformer", "sizes above 0", self)
        require(self.width % self.heads == 0, "char-transformer", "a width that heads divides", self)


class Attention(nn.Module):
    """Causal self-attention. Input and output ``(B, T, D)``.

    Query, key and value have a linear layer each, and the number of heads is read off their output, so that the
    layers can be divided by heads over a tensor-parallel axis.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_size = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each position attends to itself and to those before it."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Attention and a GELU MLP four times as wide, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` to ``(B, T, D)``."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(self.gelu(self.up(self.norm2(x))))
        return y


class CharTransformer(Pretrained):
    """Pre-norm transformer with learned positions.

    Args:
        config: Sizes. Parameters: ``12 * depth * width ** 2`` and smaller terms.

    Input ``(B, T)`` int64 in ``[0, vocab)`` with ``T <= context``; output ``(B, T, vocab)`` logits of the next byte.
    """

    name = "char-transformer"
    config_class = CharTransformerConfig
    config: CharTransformerConfig
    input_dtype = torch.int64

    def __init__(self, config: CharTransformerConfig | None = None) -> None:
        config = config or CharTransformerConfig()
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self._init_weights()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(context,)``."""
        return (self.config.context,)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, T, vocab)`` for tokens ``(B, T)``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return logits

    def _init_weights(self) -> None:
        # Small weights, and smaller ones where a block adds to the residual stream: the variance of the stream
        # would otherwise grow with depth.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * self.config.depth) ** -0.5 if name.endswith(("attention.out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
