"""Attention: a few tokens look at the whole of a map, pooled to 8x8, beside a block's convolutions.

After HR-NAS's light transformer (https://arxiv.org/abs/2106.06560), with one difference that makes its tokens
searchable: they look at the encoded map but not at each other, so that one can go without changing the others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerType, Mlp, create_conv2d, get_norm_act_layer
from torch import Tensor, nn

from .channels import TOKENS, ChannelGroup, Member

SIDE = 8
HEADS = 4


class CrossAttention(nn.Module):
    """Multi-head attention of some vectors to others.

    Args:
        dim: Length of a vector.
        num_heads: Heads; divides `dim`.

    Shape:
        `(N, T, dim)` and `(N, M, dim)` to `(N, T, dim)`.
    """

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.k = nn.Linear(dim, dim, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Look `x` up in `memory`."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(memory)), self._heads(self.v(memory))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(x)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return heads


class AttentionLayer(nn.Module):
    """A transformer layer: attention, then a perceptron, each added to its input and normalised.

    With `x` as its own memory it is an encoder layer; otherwise a decoder layer whose vectors do not see each other.

    Args:
        dim: Length of a vector.
        num_heads: Heads; divides `dim`.

    Shape:
        `(N, T, dim)` and `(N, M, dim)` to `(N, T, dim)`.
    """

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.attn = CrossAttention(dim, num_heads, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 2 * dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Look around, then think."""
        x = self.norm1(x + self.attn(x, memory))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class TokenPath(nn.Module):
    """What a few tokens make of a whole map; `bn2.weight` is the gate of the tokens.

    The map is pooled to 8x8 and mixed into `encoded` maps, which an encoder layer relates to each other. Every token
    looks at them through a decoder layer and becomes an 8x8 map; a 1x1 convolution projects these back.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        encoded: Maps that are encoded, whatever the number of tokens.
        tokens: Tokens.
        norm_layer: Batch norm.

    Shape:
        `(N, in_chs, H, W)` to `(N, out_chs, 8, 8)`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        encoded: int,
        tokens: int,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        norm = get_norm_act_layer(norm_layer, None)
        self.side = SIDE
        self.conv_in = create_conv2d(in_chs, encoded, 1, padding='', **dd)
        self.bn1 = norm(encoded, apply_act=False, **dd)
        self.encoder = AttentionLayer(SIDE * SIDE, HEADS, **dd)
        self.tokens = nn.Parameter(torch.empty(tokens, SIDE * SIDE, **dd))
        self.decoder = AttentionLayer(SIDE * SIDE, HEADS, **dd)
        self.bn2 = norm(tokens, apply_act=False, **dd)
        self.conv_out = create_conv2d(tokens, out_chs, 1, padding='', **dd)
        nn.init.trunc_normal_(self.tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Pool, encode, let the tokens look, project back."""
        x = self.bn1(self.conv_in(F.adaptive_avg_pool2d(x, self.side))).flatten(2)
        x = self.encoder(x, x)
        x = self.decoder(self.tokens.expand(x.shape[0], -1, -1), x)
        out: Tensor = self.conv_out(self.bn2(x.unflatten(2, (self.side, self.side))))
        return out


class AttendedBlock(nn.Module):
    """A block, and the tokens' view of its input added to its output.

    Args:
        block: The block.
        tokens: The tokens' path; None once all of them are gone.
    """

    def __init__(self, block: nn.Module, tokens: TokenPath | None) -> None:
        super().__init__()
        self.block = block
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        """Both, at the resolution of the block's output."""
        y: Tensor = self.block(x)
        if self.tokens is not None:
            y = y + F.interpolate(self.tokens(x), size=y.shape[-2:], mode='bilinear', align_corners=False)
        return y


def token_group(name: str, block: int, tokens: int) -> ChannelGroup:
    """The tokens of a `TokenPath` as a channel group; they can all go.

    Args:
        name: The path's module path in its model.
        block: The block's index in the arch.
        tokens: How many there are.
    """
    thinned = [
        ('tokens', 0),
        *((f'bn2.{tensor}', 0) for tensor in ('weight', 'bias', 'running_mean', 'running_var')),
        ('conv_out.weight', 1),
    ]
    gate, shift = f'{name}.bn2.weight', f'{name}.bn2.bias'
    return ChannelGroup(
        block=block,
        gate=gate,
        shift=shift,
        kernels=((TOKENS, tokens),),
        members=tuple(Member(f'{name}.{tensor}', dim, 0, tokens) for tensor, dim in thinned),
        inside=f'{name}.',
        output=(gate, shift),
        shared=tuple(f'{name}.decoder.{layer}.weight' for layer in ('attn.q', 'attn.proj', 'mlp.fc1', 'mlp.fc2')),
    )
