"""The networks: DiffiT in latent and in image space (arXiv 2312.02139), and DiT (arXiv 2212.09748).

Every network is called model(x, t, y=None, augmented=None):

    x (B, C, H, W)  noised images or latents
    t (B,)          the noise level as the process states it: a timestep, EDM's ln(sigma) / 4, ...
    y               what to show, or None for anything. Classes: indices (B,), of which num_classes
                    means "no class". Tokens (B, M, E): embeddings of a text, say, or in networks
                    with a set encoder the mean of its encodings of a few pictures
    augmented       (B, 9), the labels of EDM's augmentation; only in networks built for it

and returns (B, C, H, W), or (B, 2C, H, W) with learn_sigma. The file goes from parts to wholes:
embeddings, attention, blocks, the latent networks, the image-space U-Net, then the variants that
the paper compares these with, and last `build`, which turns a Config into a network.

In comments: B images, N tokens on a g x g grid, D width, h heads, windows of w x w tokens and
n x n of them on a grid, and c the condition. It is a vector (B, D), in U-Nets (B, cond_size): the
embedding of time and augmentation, plus the mean of those of y's tokens (a label has one). Where a
comment on DiffiT says "time", it means this c. In some DiTs c is a list instead (B, 1 + M, D): the
embedding of time and augmentation, then those of y.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs import UserError


def lookup(name, value, known):
    """known[value]. UserError that lists the choices if it is not among them."""
    if value not in known:
        raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    return known[value]


def check_heads(dim, num_heads):
    if dim % num_heads:
        raise UserError(
            f"width {dim} cannot be split into {num_heads} heads; choose a number that divides it"
        )


# -------------------------------------------------------------------------------------------------
# Embeddings


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, dim): cosines, then sines, of t * 10000^(-i / half) (as in ADM and DiT), then
    an MLP. Always in fp32: in bf16, timesteps 990 to 994 are all 992."""

    with_last = False                                                   # frequency, of 1 / 10000

    def __init__(self, dim, sinusoids=256):
        super().__init__()
        self.sinusoids = sinusoids
        self.mlp = nn.Sequential(nn.Linear(sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        # autocast does not know the meta device, on which `measure` runs.
        device_type = "cpu" if t.is_meta else t.device.type
        with torch.autocast(device_type, enabled=False):
            angles = t.float()[:, None] * self.frequencies(t.device)    # (B, sinusoids / 2)
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

    def frequencies(self, device):
        half = self.sinusoids // 2                                      # a cosine and a sine each
        steps = half - self.with_last
        return torch.exp(torch.arange(half, device=device) * (-math.log(10000) / steps))


class DDPMppEmbedder(TimestepEmbedder):
    """The same with frequencies from 1 to 1 / 10000, both ends included, as DDPM++ has them."""

    with_last = True


class FourierEmbedder(TimestepEmbedder):
    """TimestepEmbedder with random, fixed frequencies (Tancik et al. 2020; DiffiT Table 8): normal,
    of standard deviation 16, as in EDM for ln(sigma) / 4."""

    def __init__(self, dim, sinusoids=256):
        super().__init__(dim, sinusoids)
        self.register_buffer("freqs", 2 * math.pi * 16 * torch.randn(sinusoids // 2))

    def frequencies(self, device):
        return self.freqs                                               # (sinusoids / 2,)


class NoEmbedder(nn.Module):
    """t (B,) -> zeros (B, dim): for a network that does not see the time."""

    def __init__(self, dim, sinusoids=0):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        return torch.zeros(len(t), self.dim, device=t.device)


class LabelEmbedder(nn.Module):
    """y (B,) in 0..num_classes -> one token each, (B, 1, dim). The last row is the null class of
    classifier-free guidance (Ho & Salimans 2022); in training each label becomes it with
    probability `dropout`."""

    shape = ()                                                          # of y, for one image

    def __init__(self, num_classes, dim, dropout):
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        # Guided sampling needs a network that also knows the images without their labels.
        if self.training and self.dropout > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)[:, None]

    def null(self, shape):
        """The y that means no class: of this shape, the null class."""
        return torch.full(shape, self.num_classes, device=self.embedding_table.weight.device)


class TokenEmbedder(nn.Module):
    """y (B, M, width) -> (B, M, dim), each token mapped by itself. A learned null token takes the
    place of all tokens of an image, in training with probability `dropout`. count: the usual M."""

    def __init__(self, width, count, dim, dropout):
        super().__init__()
        self.shape = count, width                                       # of y, for one image
        self.dropout = dropout
        self.null_token = nn.Parameter(torch.zeros(1, 1, width))
        self.proj = nn.Linear(width, dim)

    def forward(self, y):
        if self.training:  # also without dropout: the null token, too, has a gradient in each step
            drop = torch.rand(len(y), 1, 1, device=y.device) < self.dropout
            y = torch.where(drop, self.null_token, y)
        return self.proj(y)

    def null(self, shape):
        """The y that means no tokens: of this shape, all of them null tokens."""
        return self.null_token.expand(shape)


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): one linear map of each patch, written as a convolution."""

    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj(x)                                                # (B, D, g, g)
        return x.flatten(2).transpose(1, 2)                             # row by row


def sincos_2d(dim, grid):
    """Fixed position table (1, grid^2, dim): the first half of the width encodes the column, the
    second the row, each as sines, then cosines (MAE, as in DiT). A width that 4 does not divide is
    filled up with zeros."""
    quarter = dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega   # (grid, dim/4)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)              # (grid, dim/2)
    column = table[None].expand(grid, -1, -1)                           # (grid, grid, dim/2)
    row = table[:, None].expand(-1, grid, -1)                           # (grid, grid, dim/2)
    both = torch.cat([column, row], dim=2).reshape(1, grid * grid, 4 * quarter)
    return F.pad(both, (0, dim - 4 * quarter)).float()


# -------------------------------------------------------------------------------------------------
# Attention


class Attention(nn.Module):
    """Multi-head self-attention, as in DiT. x (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (B, h, N, D/h)
        x = F.scaled_dot_product_attention(q, k, v)                     # (B, h, N, D/h)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class CrossAttention(nn.Module):
    """Every token looks at the tokens of another sequence, as at the text in Rombach et al. 2022.
    x (B, N, D), c (B, M, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, c):
        B, N, D = x.shape
        q = self.q(x).view(B, N, self.num_heads, -1).transpose(1, 2)    # (B, h, N, D/h)
        kv = self.kv(c).view(B, c.shape[1], 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)                                # each (B, h, M, D/h)
        x = F.scaled_dot_product_attention(q, k, v)                     # (B, h, N, D/h)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(d) + bias) v: q (B, h, N, d), k and v (B, h, M, d), bias (h, N, M) or
    one per example (B, h, N, M) -> (B, h, N, d)."""
    bias = bias.to(q.dtype)                                             # autocast makes q bf16
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # On CPUs two plain products are faster, in training (where no fused kernel has a gradient for
    # the bias) and in sampling.
    B, h, N, d = q.shape
    bias = bias.flatten(0, 1) if bias.dim() == 4 else bias.repeat(B, 1, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=d**-0.5)  # (B h, N, M)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, h, N, d)


def relative_position_index(window, device):
    """(w^4,): for each pair of tokens (i, j) of a w x w window, the row of the bias table for the
    offset of i from j. Computing it costs less than using it, so it is not stored."""
    # Offsets go from -(w - 1) to w - 1 each way, and the table lists them row by row: a token one
    # row further down is 2w - 1 entries further on, and one to the right is 1 entry further on.
    step = torch.arange(window, device=device)
    place = ((2 * window - 1) * step[:, None] + step).flatten()         # (w^2,)
    # Entry 0 is for the most negative offset, of the first token from the last.
    return (place[:, None] - place + place[-1]).flatten()


class TMSA(nn.Module):
    """Time-dependent multi-head self-attention (DiffiT eqs. 3-6). The condition adds a query, a key
    and a value of its own to those of every token, and a learned bias B by relative position is
    added to the scores:

        q = x Wqs + c Wqt                          (3)
        k = x Wks + c Wkt                          (4)
        v = x Wvs + c Wvt                          (5)
        TMSA = softmax(q k^T / sqrt(d) + B) v      (6)

    x (B, N, D): the tokens of a grid x grid image, row by row; c (B, cond_dim or dim) -> (B, N, D).
    Attention stays inside non-overlapping squares of window x window tokens (image space); with a
    window of 0 the whole grid is one square (latent space). UserError if the heads do not divide
    the width, or the window does not divide the grid.
    """

    def __init__(self, dim: int, num_heads: int, grid: int, cond_dim: int = 0, window: int = 0):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.grid = grid
        self.window = window or grid
        if grid % self.window:
            raise UserError(
                f"windows of {window} x {window} tokens do not tile a grid of {grid} x {grid} "
                f"tokens; choose a window or an image size so that one divides the other"
            )
        self.qkv = nn.Linear(dim, 3 * dim)                              # Wqs, Wks, Wvs
        self.qkv_temb = nn.Linear(cond_dim or dim, 3 * dim)             # Wqt, Wkt, Wvt
        self.proj = nn.Linear(dim, dim)
        offsets = (2 * self.window - 1) ** 2                            # of one token from another
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        # Eqs. 3-5, side by side. The time's part is one vector per image, so it is broadcast.
        qkv = self.qkv(x) + self.qkv_temb(c)[:, None]                   # (B, N, 3D)
        q, k, v = self.split_windows(qkv)                               # each (B n^2, h, w^2, D/h)
        bias = self.bias(self.relative_position_bias_table)             # (h, w^2, w^2)
        x = attend(q, k, v, bias)                                       # eq. 6
        return self.proj(self.join_windows(x))                          # (B, N, D)

    def split_windows(self, qkv):
        """(B, N, 3D) -> q, k, v, each (B n^2, h, w^2, D/h), the windows of an image together."""
        B = len(qkv)
        w, n = self.window, self.grid // self.window
        qkv = qkv.view(B, n, w, n, w, 3, self.num_heads, -1)            # (B, n, w, n, w, 3, h, D/h)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)                       # (3, B, n, n, h, w, w, D/h)
        return qkv.reshape(3, B * n * n, self.num_heads, w * w, -1).unbind()

    def join_windows(self, x):
        """(B n^2, h, w^2, D/h) -> (B, N, D), the tokens in the order they came in."""
        w, n = self.window, self.grid // self.window
        x = x.view(-1, n, n, self.num_heads, w, w, x.shape[-1])         # (B, n, n, h, w, w, D/h)
        x = x.permute(0, 1, 4, 2, 5, 3, 6)                              # (B, n, w, n, w, h, D/h)
        return x.reshape(len(x), self.grid**2, -1)

    def bias(self, table):
        """(..., offsets, h) -> (..., h, w^2, w^2): at (i, j) the row for the offset of i from j."""
        tokens = self.window**2
        index = relative_position_index(self.window, table.device)      # (w^4,)
        # Of all forms of indexing index_select has the fastest gradient (measured on CPUs).
        return table.mT.index_select(-1, index).unflatten(-1, (tokens, tokens))

    def _load_from_state_dict(self, state, prefix, *args):
        # The released files store the index, which is computed here.
        state.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state, prefix, *args)


# -------------------------------------------------------------------------------------------------
# Blocks


def layer_norm(dim):
    # No weights of its own: in DiT the condition shifts and scales, and DiffiT kept this norm.
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class Mlp(nn.Module):
    """Linear, GELU, linear: (B, N, D) -> (B, N, D). With cond_dim (DiffiT Table 6, G) the time is
    added to the hidden layer."""

    def __init__(self, dim, hidden, cond_dim=0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.temb = nn.Linear(cond_dim, hidden) if cond_dim else None

    def forward(self, x, c=None):
        x = self.fc1(x)                                                 # (B, N, hidden)
        if self.temb is not None:
            x = x + self.temb(c)[:, None]
        return self.fc2(F.gelu(x, approximate="tanh"))                  # tanh: as released


class Block(nn.Module):
    """What networks are stacked from: the units that train.py compiles (--compile) or computes
    again in the backward pass (--grad-checkpointing)."""


class DiffiTBlock(Block):
    """DiffiT eqs. 7-8: x = TMSA(LN(x), c) + x;  x = MLP(LN(x)) + x. The condition enters in the
    attention only: no shift, scale or gate. time_in: where else it could, see ATTENTION below."""

    def __init__(self, dim, num_heads, mlp_ratio, grid, cond_dim=0, window=0, time_in="qkv"):
        super().__init__()
        attention = lookup("time_in", time_in, ATTENTION)               # TMSA by default
        cond_dim = cond_dim or dim
        self.norm1 = layer_norm(dim)
        self.norm2 = layer_norm(dim)
        self.attn = attention(dim, num_heads, grid, cond_dim, window)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), cond_dim if time_in == "mlp" else 0)

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x), c)                             # eq. 7
        return x + self.mlp(self.norm2(x), c)                           # eq. 8


def modulate(x, shift, scale):
    """x (B, N, D), shift and scale (B, D): the same for every token of an image."""
    return x * (1 + scale[:, None]) + shift[:, None]


class ViTBlock(Block):
    """The plain transformer block (Dosovitskiy et al. 2021), which knows no condition:
    x = attention(LN(x)) + x;  x = MLP(LN(x)) + x. (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads, mlp_ratio, grid=0):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.norm2 = layer_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, c=None):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DiTBlock(ViTBlock):
    """adaLN-Zero (DiT Sec. 3.2): the condition c (B, D) shifts, scales and gates both halves of the
    block. The gates start at zero, so a fresh block is the identity."""

    def __init__(self, dim, num_heads, mlp_ratio, grid=0):
        super().__init__(dim, num_heads, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)           # each (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiffiTHead(nn.Module):
    """Tokens to pixels: Linear(SiLU(LN(x))), as released, without the condition.
    (B, N, D) -> (B, N, out)"""

    def __init__(self, dim, out):
        super().__init__()
        self.norm = layer_norm(dim)
        self.linear = nn.Linear(dim, out)

    def forward(self, x, c):
        return self.linear(F.silu(self.norm(x)))


class ViTHead(nn.Module):
    """Tokens to pixels: LN, then a linear map. (B, N, D) -> (B, N, out)"""

    def __init__(self, dim, out):
        super().__init__()
        self.norm = layer_norm(dim)
        self.linear = nn.Linear(dim, out)

    def forward(self, x, c):
        return self.linear(self.norm(x))


class DiTHead(ViTHead):
    """The same, with the norm shifted and scaled by the condition c (B, D)."""

    def __init__(self, dim, out):
        super().__init__(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)         # each (B, D)
        return self.linear(modulate(self.norm(x), shift, scale))


# -------------------------------------------------------------------------------------------------
# What all networks share, and the latent ones


class SetEncoder(nn.Module):
    """A vision transformer that reads the pictures of a set, each by itself: (B, C, H, W) ->
    (B, M, D), a token for each patch; MLPs of four times the width. Without the last norm they stay
    small beside the time embedding for long, and the network does not use them."""

    def __init__(self, dim, depth, input_size, patch_size, in_channels, num_heads):
        super().__init__()
        self.grid = input_size // patch_size
        self.patches = PatchEmbed(patch_size, in_channels, dim)
        self.register_buffer("pos_embed", sincos_2d(dim, self.grid))
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, mlp_ratio=4) for _ in range(depth))
        self.norm = layer_norm(dim)

    def forward(self, x):
        x = self.patches(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def summed(time, tokens):
    """The embeddings of time (B, D) and y (B, M, D) -> one vector (B, D): of several tokens, the
    mean counts."""
    return time + tokens.mean(1) if tokens.shape[1] else time


def listed(time, tokens):
    """The same -> a list of tokens (B, 1 + M, D), the time's first."""
    return torch.cat([time[:, None], tokens], dim=1)


class Network(nn.Module):
    """What all networks here have: the embeddings of time, y and augmentation, the condition that
    they add up to, and the way that weights start."""

    class_names = ()                                                    # where they are known
    time_embedder = TimestepEmbedder

    def add_condition(
        self,
        dim,
        time_embedding,
        num_classes,
        class_dropout_prob,
        augment,
        token_width,
        token_count,
        set_depth,
        picture_sizes,
        sinusoids=256,
    ):
        """Make the embeddings, of width dim. time_embedding: "positional", "fourier" or "none". y
        is one of num_classes, or token_count tokens of token_width, or what a SetEncoder of
        set_depth blocks makes of pictures; picture_sizes: its input_size, patch_size, in_channels
        and num_heads. augment: whether to take the nine augmentation labels of EDM (App. F.2).

        Not in __init__, because optimizer states know parameters by the order they are made in, and
        some networks make others first.
        """
        embedders = {
            "positional": self.time_embedder,
            "fourier": FourierEmbedder,
            "none": NoEmbedder,
        }
        self.num_classes = num_classes
        self.t_embedder = lookup("time_embedding", time_embedding, embedders)(dim, sinusoids)
        self.y_embedder = None
        self.set_encoder = None
        if set_depth:
            self.set_encoder = SetEncoder(dim, set_depth, *picture_sizes)
            token_width = dim
            token_count = self.set_encoder.grid**2
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, dim, class_dropout_prob)
        elif token_width:
            self.y_embedder = TokenEmbedder(token_width, token_count, dim, class_dropout_prob)
        self.augment_embedder = nn.Linear(9, dim, bias=False) if augment else None

    def embed(self, t, y=None, augmented=None):
        """t (B,), y (B,) or (B, M, E) or None for none, augmented (B, 9) or None for zeros -> the
        embeddings of time and augmentation (B, dim), and those of y (B, M, dim), where M is 0 in a
        network that takes no y. UserError if it is given one."""
        time = self.t_embedder(t)
        if self.augment_embedder is not None and augmented is not None:
            time = time + self.augment_embedder(augmented)
        if self.y_embedder is None:
            if y is not None:
                raise UserError(
                    "this network was built without classes (num_classes = 0), tokens or sets, "
                    "but was given a y; call it with y=None"
                )
            return time, time.new_empty(len(t), 0, time.shape[1])
        if y is None:
            y = self.y_embedder.null((len(t), *self.y_embedder.shape))
        if y.shape[2:] != self.y_embedder.shape[1:]:
            raise UserError(
                f"this network takes a y of {('B', *self.y_embedder.shape)}, and was given one of "
                f"{tuple(y.shape)}"
            )
        return time, self.y_embedder(y)

    def condition(self, t, y=None, augmented=None):
        """The same arguments -> the condition as a vector (B, dim), also where blocks take the
        list."""
        return summed(*self.embed(t, y, augmented))

    def leave_one_out(self, pictures, n):
        """Sets of n pictures, one after another (B, C, H, W) -> for each picture the y that the n -
        1 others of its set stand for, (B, M, dim): the mean of what the encoder makes of each, so
        that their order does not matter (LAC in Giannone et al. 2022, arXiv 2205.15463)."""
        encoded = self.set_encoder(pictures).unflatten(0, (-1, n))      # (B / n, n, M, dim)
        # A sum of all, less the own one, would leave a trace of it: its rounding errors.
        others = sum(encoded.roll(j, dims=1) for j in range(1, n)) / (n - 1)
        return others.flatten(0, 1)

    def init_weights(self):
        """How weights start. Each network adds to this.

        linear maps                     Xavier uniform
        embeddings of time and label    normal, 0.02
        relative position bias          truncated normal, 0.02
        convolutions                    PyTorch's default
        biases                          zero

        The patches of a SetEncoder are a linear map, too, though written as a convolution.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, TMSA):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
            if isinstance(module, SetEncoder):
                patches = module.patches.proj.weight
                nn.init.xavier_uniform_(patches.view(len(patches), -1))
        if isinstance(self.t_embedder, TimestepEmbedder):
            nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if isinstance(self.y_embedder, LabelEmbedder):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)


class Transformer(Network):
    """The part that the latent DiffiT and DiT share: patches, embeddings, a stack of blocks, a
    head. The two differ only in the classes of blocks and head. Parameters have the names of the
    released weights. UserError if the sizes do not divide."""

    # Set by DiffiT and DiT, below.
    block_class = None
    head_class = None
    condition_form = staticmethod(summed)                               # as blocks and head take it
    in_context = False                                                  # does it join the sequence?

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        embed_gain: float = 1.0,
        time_embedding: str = "positional",
        augment: bool = False,
        token_width: int = 0,
        token_count: int = 1,
        set_depth: int = 0,
        **block_options,
    ):
        super().__init__()
        if input_size % patch_size:
            raise UserError(
                f"patches of {patch_size} do not tile an input of {input_size} x {input_size}; "
                f"choose a size that is a multiple of the patch"
            )
        self.patch_size = patch_size
        self.grid = input_size // patch_size
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.add_condition(
            hidden_size,
            time_embedding,
            num_classes,
            class_dropout_prob,
            augment,
            token_width,
            token_count,
            set_depth,
            picture_sizes=(input_size, patch_size, in_channels, num_heads),
        )
        self.register_buffer("pos_embed", sincos_2d(hidden_size, self.grid))
        self.blocks = nn.ModuleList(
            self.block_class(hidden_size, num_heads, mlp_ratio, self.grid, **block_options)
            for _ in range(depth)
        )
        self.final_layer = self.head_class(hidden_size, patch_size**2 * self.out_channels)
        self.init_weights(embed_gain)

    def init_weights(self, embed_gain):
        """How weights start, besides Network's.

        patches           Xavier uniform, times embed_gain: a linear map, though a convolution
        positions         sines and cosines, times embed_gain
        modulations       zero: a fresh DiTBlock is the identity (not those of AdaLNBlock)
        cross-attention   in a DiTCrossBlock the projection is zero, too
        output            zero

        A large embed_gain makes tokens large beside what the blocks add to them at first.
        """
        super().init_weights()
        patches = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(patches.view(len(patches), -1), embed_gain)
        self.pos_embed *= embed_gain
        for module in self.modules():
            if isinstance(module, (DiTBlock, DiTHead)):
                nn.init.zeros_(module.adaLN_modulation[1].weight)
            if isinstance(module, DiTCrossBlock):
                nn.init.zeros_(module.cross.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, augmented: Tensor | None = None
    ) -> Tensor:
        B = len(x)
        p, g = self.patch_size, self.grid
        x = self.x_embedder(x) + self.pos_embed                         # (B, N, D)
        c = self.condition_form(*self.embed(t, y, augmented))           # (B, D) or (B, 1 + M, D)
        if self.in_context:
            x = torch.cat([c, x], dim=1)                                # (B, 1 + M + N, D)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x[:, -g * g :], c)                         # (B, N, p*p*out)
        x = x.view(B, g, g, p, p, self.out_channels)                    # a token is p x p pixels
        x = x.permute(0, 5, 1, 3, 2, 4)                                 # (B, out, g, p, g, p)
        return x.reshape(B, self.out_channels, g * p, g * p)            # (B, out, H, W)


class DiffiT(Transformer):
    """Latent DiffiT (Sec. 3.2, "latent space", Fig. 3), as released: blocks of TMSA and MLP."""

    block_class = DiffiTBlock
    head_class = DiffiTHead


class DiT(Transformer):
    """DiT (Peebles & Xie 2022), with adaLN-Zero or by another word of CONDITION_IN below. UserError
    for an unknown one."""

    def __init__(self, *args, condition_in: str = "adaln-zero", **options):
        # Before super(), which makes blocks and head.
        way = lookup("condition_in", condition_in, CONDITION_IN)
        self.block_class, self.head_class, self.condition_form = way
        self.in_context = condition_in == "in-context"
        super().__init__(*args, **options)
        if condition_in == "adaln-zero+cross" and self.y_embedder is None:
            raise UserError(
                f"condition_in {condition_in} looks at classes, tokens or sets, and this network "
                f"has none; leave it out, or give it some"
            )


# -------------------------------------------------------------------------------------------------
# The image-space U-Net of Fig. 4


def group_norm(channels, eps=1e-5):
    """At most 32 groups of at least 4 channels, as in EDM; fewer where that does not divide."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps)


class ResBlock(nn.Module):
    """DiffiT eqs. 9-10: h = Conv3x3(Swish(GN(x)));  x = DiffiTBlock(h, c) + x.
    x (B, in, H, W) -> (B, out, H, W); a 1x1 convolution where the shortcut changes its channels."""

    def __init__(self, in_channels, out_channels, dropout, **block_options):
        super().__init__()
        self.norm = group_norm(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.block = DiffiTBlock(out_channels, **block_options)
        changes = in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x, c):
        h = self.conv(self.dropout(F.silu(self.norm(x))))               # eq. 9: (B, out, H, W)
        tokens = self.block(h.flatten(2).transpose(1, 2), c)            # (B, H*W, out)
        return tokens.transpose(1, 2).reshape(h.shape) + self.skip(x)   # eq. 10


class Stage(nn.Module):
    """`count` ResBlocks at one resolution: x (B, in, g, g) -> (B, out, g, g)."""

    def __init__(self, count, in_channels, out_channels, grid, window, **options):
        super().__init__()
        window = min(window, grid)                                      # a small grid is one window
        widths = [in_channels] + [out_channels] * (count - 1)           # of what enters each block
        self.blocks = nn.ModuleList(
            ResBlock(width, out_channels, grid=grid, window=window, **options) for width in widths
        )

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x


class Encoder(nn.Module):
    """The left half of Fig. 4: stages of ResBlocks with strided convolutions between them.
    x (B, channels[0], H, W) -> the features of each stage, finest first: (B, widths[i], H/2^i,
    W/2^i)."""

    stage_class = Stage

    def __init__(self, input_size, channels, blocks, **options):
        super().__init__()
        self.widths = channels
        self.stages = nn.ModuleList(
            self.stage_class(count, width, width, input_size >> level, **options)
            for level, (count, width) in enumerate(zip(blocks, channels))
        )
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
            for fine, coarse in zip(channels, channels[1:])
        )

    def forward(self, x, c):
        features = []
        for level, stage in enumerate(self.stages):
            if level > 0:
                x = self.downsamplers[level - 1](x)                     # half the resolution
            x = stage(x, c)                                             # (B, channels[level], ...)
            features.append(x)
        return features


class Decoder(nn.Module):
    """The right half of Fig. 4: the encoder's features -> (B, channels[0], H, W). From the coarsest
    stage up: upsample, join with the features of this resolution, ResBlocks."""

    stage_class = Stage

    def __init__(self, input_size, channels, blocks, skips, **options):
        """skips: the widths of the encoder's features."""
        super().__init__()
        # A stage takes what the coarser one made, at its own width, joined to the features. The
        # coarsest one starts from the features alone.
        widths_in = [width + skip for width, skip in zip(channels, skips)]
        widths_in[-1] = skips[-1]
        self.stages = nn.ModuleList(
            self.stage_class(count, width_in, width, input_size >> level, **options)
            for level, (count, width_in, width) in enumerate(zip(blocks, widths_in, channels))
        )
        self.upsamplers = nn.ModuleList(
            nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in zip(channels, channels[1:])
        )

    def forward(self, features, c):
        last = len(self.stages) - 1
        x = self.stages[last](features[last], c)
        for level in range(last - 1, -1, -1):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")      # twice the resolution
            x = self.upsamplers[level](x)                               # (B, channels[level], ...)
            x = torch.cat([x, features[level]], dim=1)                  # (B, widths_in[level], ...)
            x = self.stages[level](x, c)
        return x


def check_levels(input_size, channels, blocks, patch_size=1):
    """UserError if a U-Net of these resolutions cannot be built."""
    levels = len(channels)
    if len(blocks) != levels:
        raise UserError(
            f"{levels} widths {channels} but {len(blocks)} block counts {blocks}; "
            f"give one of each for every resolution"
        )
    divisor = patch_size * 2 ** (levels - 1)
    if input_size % divisor:
        patches = f" of patches of {patch_size}" if patch_size > 1 else ""
        raise UserError(
            f"{levels} resolutions{patches} need a size divisible by {divisor}, and {input_size} "
            f"is not; choose another size or fewer resolutions"
        )


class DiffiTUNet(Network):
    """Image-space DiffiT (Fig. 4, Tables S.2 and S.3): a U-Net of ResBlocks with windowed TMSA.

    channels, blocks: the width and the number of ResBlocks of each resolution, finest first; each
    resolution is half of the one before. patch_size: side in pixels of the tokens of the finest, in
    the paper 1; larger ones are cheaper by its square. window: the side of the attention windows,
    in tokens (a smaller grid is one window). cond_size: the width of c. block_options:
    DiffiTBlock's time_in. UserError if the sizes do not divide.

    The paper's figure, tables and text disagree; here the decoder mirrors the encoder, with blocks
    of its own at the coarsest resolution, the resampling convolutions change the width, and skips
    are concatenated.
    """

    encoder_class = Encoder
    decoder_class = Decoder

    def __init__(
        self,
        input_size: int = 64,
        in_channels: int = 3,
        channels: tuple[int, ...] = (128, 256, 256, 256),
        blocks: tuple[int, ...] = (4, 4, 4, 4),
        num_heads: int = 4,
        window: int = 8,
        cond_size: int = 512,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        patch_size: int = 1,
        num_classes: int = 0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        time_embedding: str = "positional",
        augment: bool = False,
        token_width: int = 0,
        token_count: int = 1,
        set_depth: int = 0,
        **block_options,
    ):
        super().__init__()
        self.patch_size = patch_size or 1
        p = self.patch_size
        check_levels(input_size, channels, blocks, p)
        grid = input_size // p                                          # of the finest resolution
        # Every ResBlock of the network has these.
        options = dict(
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            cond_dim=cond_size,
            window=window,
            dropout=dropout,
            **block_options,
        )
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.add_condition(
            cond_size,
            time_embedding,
            num_classes,
            class_dropout_prob,
            augment,
            token_width,
            token_count,
            set_depth,
            picture_sizes=(input_size, 2, in_channels, num_heads),      # patches as in ViTEncoder
        )
        # 3x3 patches, of which a token is the middle one: with a patch_size of 1 a 3x3 convolution.
        self.tokenizer = nn.Conv2d(in_channels, channels[0], 3 * p, stride=p, padding=p)
        self.encoder = self.encoder_class(grid, channels, blocks, **options)
        self.decoder = self.decoder_class(grid, channels, blocks, self.encoder.widths, **options)
        self.head_norm = group_norm(channels[0])
        self.head = nn.Conv2d(channels[0], p * p * out_channels, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """How weights start, besides Network's: the output is zero."""
        super().init_weights()
        nn.init.zeros_(self.head.weight)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, augmented: Tensor | None = None
    ) -> Tensor:
        c = self.condition(t, y, augmented)                             # (B, cond_size)
        x = self.tokenizer(x)                                           # (B, channels[0], g, g)
        features = self.encoder(x, c)                                   # of each resolution
        x = self.decoder(features, c)                                   # (B, channels[0], g, g)
        x = self.head(F.silu(self.head_norm(x)))                        # (B, p*p*out, g, g)
        return F.pixel_shuffle(x, self.patch_size)                      # (B, out, H, W)


# -------------------------------------------------------------------------------------------------
# For Tables 6 and 7: the time elsewhere than in queries, keys and values


class Untimed(TMSA):
    """The same attention without the time."""

    def __init__(self, dim, num_heads, grid, cond_dim=0, window=0):
        super().__init__(dim, num_heads, grid, cond_dim, window)
        # TMSA has made it all the same, so that all variants draw the same initial weights.
        self.qkv_temb = None

    def forward(self, x, c):
        q, k, v = self.split_windows(self.qkv(x))
        bias = self.bias(self.relative_position_bias_table)
        x = attend(q, k, v, bias)
        return self.proj(self.join_windows(x))


class TimeAsToken(Untimed):
    """The time is a token of its own that all others attend to: one more key and value in each
    window, without a bias."""

    def __init__(self, dim, num_heads, grid, cond_dim=0, window=0):
        super().__init__(dim, num_heads, grid, cond_dim, window)
        self.token = nn.Linear(cond_dim or dim, 2 * dim)

    def forward(self, x, c):
        q, k, v = self.split_windows(self.qkv(x))                       # each (B n^2, h, w^2, D/h)
        windows = len(q) // len(c)                                      # n^2
        token = self.token(c).view(len(c), 2, self.num_heads, 1, -1)    # (B, 2, h, 1, D/h)
        token_k, token_v = token.repeat_interleave(windows, 0).unbind(1)
        k = torch.cat([k, token_k], dim=2)                              # (B n^2, h, w^2 + 1, D/h)
        v = torch.cat([v, token_v], dim=2)
        bias = self.bias(self.relative_position_bias_table)             # (h, w^2, w^2)
        bias = F.pad(bias, (0, 1))                                      # 0 for the time's token
        x = attend(q, k, v, bias)
        return self.proj(self.join_windows(x))


class TimeInBias(Untimed):
    """The time is added to the table of the relative position bias, for each offset and head."""

    def __init__(self, dim, num_heads, grid, cond_dim=0, window=0):
        super().__init__(dim, num_heads, grid, cond_dim, window)
        self.bias_temb = nn.Linear(cond_dim or dim, self.relative_position_bias_table.numel())

    def forward(self, x, c):
        q, k, v = self.split_windows(self.qkv(x))
        windows = len(q) // len(c)                                      # n^2
        table = self.relative_position_bias_table                       # (offsets, h)
        table = table + self.bias_temb(c).view(-1, *table.shape)        # (B, offsets, h)
        bias = self.bias(table)                                         # (B, h, w^2, w^2)
        x = attend(q, k, v, bias.repeat_interleave(windows, 0))
        return self.proj(self.join_windows(x))


# time_in of a DiffiTBlock -> its attention
ATTENTION = {
    "qkv": TMSA,                                    # eqs. 3-6 (Table 6, H; Table 7, mixed)
    "token": TimeAsToken,                           # Table 7, separate
    "bias": TimeInBias,                             # Table 6, F
    "mlp": Untimed,                                 # Table 6, G: in the hidden layer of the MLP
    "none": Untimed,                                # in Table 4's plain stages, below
}


# -------------------------------------------------------------------------------------------------
# For DiT's Table 4, and for tokens of y: the condition elsewhere than in adaLN-Zero


class AdaLNBlock(ViTBlock):
    """adaLN: the condition c (B, D) shifts and scales what enters both halves; no gates."""

    def __init__(self, dim, num_heads, mlp_ratio, grid=0):
        super().__init__(dim, num_heads, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))

    def forward(self, x, c):
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class CrossBlock(ViTBlock):
    """Every token looks at those of the condition c (B, 1 + M, D), after it has looked at the
    others."""

    def __init__(self, dim, num_heads, mlp_ratio, grid=0):
        super().__init__(dim, num_heads, mlp_ratio)
        self.norm_cross = layer_norm(dim)
        self.cross = CrossAttention(dim, num_heads)

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class DiTCrossBlock(DiTBlock):
    """adaLN-Zero by the time alone, and cross-attention to the tokens of y, as networks that draw
    from text have it (PixArt-alpha, Chen et al. 2023). c (B, 1 + M, D), the time first. The
    projection starts at zero, so a fresh block ignores y."""

    def __init__(self, dim, num_heads, mlp_ratio, grid=0):
        super().__init__(dim, num_heads, mlp_ratio)
        self.norm_cross = layer_norm(dim)
        self.cross = CrossAttention(dim, num_heads)

    def forward(self, x, c):
        time, tokens = c[:, 0], c[:, 1:]
        modulation = self.adaLN_modulation(time).chunk(6, dim=1)        # each (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross(self.norm_cross(x), tokens)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TimeHead(DiTHead):
    """DiTHead by the time alone: c (B, 1 + M, D), the time first."""

    def forward(self, x, c):
        return super().forward(x, c[:, 0])


# condition_in of a DiT -> its blocks, its head, and the form in which they take the condition
CONDITION_IN = {
    "adaln-zero": (DiTBlock, DiTHead, summed),
    "adaln": (AdaLNBlock, DiTHead, summed),
    "cross": (CrossBlock, ViTHead, listed),
    "in-context": (ViTBlock, ViTHead, listed),      # before the image's tokens, dropped at the head
    "adaln-zero+cross": (DiTCrossBlock, TimeHead, listed),
}


# -------------------------------------------------------------------------------------------------
# For Table 4: other encoders and decoders
#
#     A  ViTEncoder, SETRDecoder          C  PlainEncoder, PlainDecoder       E  DiffiTUNet
#     B  PlainEncoder, SETRDecoder        D  Encoder, PlainDecoder


class PlainStage(Stage):
    """A stage whose ResBlocks do not see the time: it is projected, scaled for each channel by a
    learned number, and added to the input of the stage."""

    def __init__(self, count, in_channels, out_channels, grid, window, **options):
        options = {**options, "time_in": "none"}
        super().__init__(count, in_channels, out_channels, grid, window, **options)
        self.temb = nn.Linear(options["cond_dim"], in_channels)
        self.scale = nn.Parameter(torch.ones(in_channels))

    def forward(self, x, c):
        time = self.scale * self.temb(c)                                # (B, in)
        return super().forward(x + time[:, :, None, None], c)


class PlainEncoder(Encoder):
    stage_class = PlainStage


class PlainDecoder(Decoder):
    stage_class = PlainStage


class ViTStage(nn.Module):
    """The same for tokens (B, N, D): the scaled time, then transformer blocks without it."""

    def __init__(self, count, dim, num_heads, mlp_ratio, grid, cond_dim):
        super().__init__()
        self.blocks = nn.ModuleList(
            DiffiTBlock(dim, num_heads, mlp_ratio, grid, cond_dim, time_in="none")
            for _ in range(count)
        )
        self.temb = nn.Linear(cond_dim, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x, c):
        time = self.scale * self.temb(c)                                # (B, D)
        x = x + time[:, None]
        for block in self.blocks:
            x = block(x, c)
        return x


class ViTEncoder(nn.Module):
    """A vision transformer of sum(blocks) blocks (12 in the paper) on patches of 2, as wide as the
    last of channels (the paper states neither patch nor width). x (B, channels[0], H, W) -> the
    features of each stage, all of one resolution, (B, channels[-1], H/2, W/2).

    Like SETRDecoder it has no ResBlocks, and so no use for their other options.
    """

    def __init__(self, input_size, channels, blocks, num_heads, mlp_ratio, cond_dim, **unused):
        super().__init__()
        dim = channels[-1]
        self.grid = input_size // 2
        self.widths = (dim,) * len(blocks)
        self.patches = PatchEmbed(2, channels[0], dim)
        self.register_buffer("pos_embed", sincos_2d(dim, self.grid))
        self.stages = nn.ModuleList(
            ViTStage(count, dim, num_heads, mlp_ratio, self.grid, cond_dim) for count in blocks
        )

    def forward(self, x, c):
        tokens = self.patches(x) + self.pos_embed                       # (B, N, D)
        features = []
        for stage in self.stages:
            tokens = stage(tokens, c)
            features.append(tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        return features


def resize(x, size):
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


class SETRDecoder(nn.Module):
    """SETR-MLA (Zheng et al. 2021): all features are reduced to channels[0], each is added to the
    sum of the coarser ones, and all sums are resized to the full size and joined."""

    def __init__(self, input_size, channels, blocks, skips, **unused):
        super().__init__()
        width = channels[0]
        self.input_size = input_size
        self.reduce = nn.ModuleList(nn.Conv2d(skip, width, 1) for skip in skips)
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in skips)
        self.join = nn.Conv2d(len(skips) * width, width, 3, padding=1)

    def forward(self, features, c):
        total = None
        full = []                                                       # (B, channels[0], H, W)
        for level in range(len(features) - 1, -1, -1):
            x = self.reduce[level](features[level])
            total = x if total is None else x + resize(total, x.shape[-1])
            full.append(resize(F.silu(self.refine[level](total)), self.input_size))
        return self.join(torch.cat(full, dim=1))


ENCODERS = {"diffit": Encoder, "plain": PlainEncoder, "vit": ViTEncoder}
DECODERS = {"diffit": Decoder, "plain": PlainDecoder, "setr": SETRDecoder}


class Table4UNet(DiffiTUNet):
    """DiffiTUNet with another encoder or decoder, by its name. UserError for an unknown one."""

    def __init__(self, *args, encoder: str = "diffit", decoder: str = "diffit", **options):
        # Before super(), which makes one of each.
        self.encoder_class = lookup("encoder", encoder, ENCODERS)
        self.decoder_class = lookup("decoder", decoder, DECODERS)
        super().__init__(*args, **options)


# -------------------------------------------------------------------------------------------------
# For Table 5: DDPM++, and TMSA in it


class DDPMppBlock(Block):
    """h = Conv(Swish(GN(x))) + time;  x = (Conv(Dropout(Swish(GN(h)))) + x) / sqrt 2;  with heads
    also x = (attention(GN(x)) + x) / sqrt 2. x (B, width_in, H, W) -> (B, width, H, W), or with
    down or up at half or twice the resolution. tmsa: the attention is TMSA."""

    def __init__(
        self, width_in, width, cond_size, grid, dropout, num_heads, tmsa, down=False, up=False
    ):
        super().__init__()
        self.downsamples = down
        self.upsamples = up
        self.norm1 = group_norm(width_in, 1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.temb = nn.Linear(cond_size, width)
        self.norm2 = group_norm(width, 1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        changes = width_in != width or down or up
        self.skip = nn.Conv2d(width_in, width, 1) if changes else nn.Identity()
        self.norm3 = group_norm(width, 1e-6) if num_heads else None
        self.attn = None
        if num_heads and tmsa:
            self.attn = TMSA(width, num_heads, grid, cond_size)
        elif num_heads:
            self.attn = Attention(width, num_heads)

    def resample(self, x):
        if self.downsamples:
            return F.avg_pool2d(x, 2)
        if self.upsamples:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x

    def forward(self, x, c):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))            # (B, width, H', W')
        h = h + self.temb(F.silu(c))[:, :, None, None]                  # a number for each channel
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = (h + self.skip(self.resample(x))) * math.sqrt(0.5)          # keeps the variance at 1
        if self.attn is not None:
            tokens = self.norm3(x).flatten(2).transpose(1, 2)           # (B, N, width)
            tokens = self.attn(tokens, c) if isinstance(self.attn, TMSA) else self.attn(tokens)
            x = (tokens.transpose(1, 2).reshape(x.shape) + x) * math.sqrt(0.5)
        return x


def ddpmpp_blocks(block, input_size, stem, channels, blocks):
    """The blocks of the left half, the middle and the right half, each in the order of use.
    block(width_in, width, level, attends, down or up) makes one."""
    last = len(channels) - 1
    down = []
    width = stem
    skips = [stem]                                                      # widths, for the right half
    for level, count in enumerate(blocks):
        if level > 0:
            down.append(block(width, width, level, down=True))
            skips.append(width)
        for _ in range(count):
            attends = input_size >> level == 16
            down.append(block(width, channels[level], level, attends))
            width = channels[level]
            skips.append(width)

    middle = [block(width, width, last, attends=True), block(width, width, last)]

    up = []
    for level in range(last, -1, -1):
        if level < last:
            up.append(block(width, width, level, up=True))
        # One more than on the left, where each resolution starts with a block that downsamples, or
        # the stem, and hands that over, too. At 16 x 16 only the last of them attends.
        for i in range(blocks[level] + 1):
            attends = input_size >> level == 16 and i == blocks[level]
            up.append(block(width + skips.pop(), channels[level], level, attends))
            width = channels[level]
    return down, middle, up


def stem_width(cond_size):
    """DDPM++'s base width, and the number of its sinusoids: 128 for a time token of 512. UserError
    if that is not an even number."""
    if cond_size % 8:
        raise UserError(
            f"a time token of {cond_size} does not fit DDPM++, which starts with a quarter of it, "
            f"half cosines and half sines; choose a multiple of 8"
        )
    return cond_size // 4


class DDPMpp(Network):
    """DDPM++ (Song et al. 2021): a U-Net with self-attention at 16 x 16 and in the middle, its own
    (time_in "none") or TMSA ("qkv"). channels, blocks: as in DiffiTUNet; the decoder has one block
    more at each resolution. UserError if the sizes do not divide."""

    time_embedder = DDPMppEmbedder

    def __init__(
        self,
        input_size: int = 32,
        in_channels: int = 3,
        channels: tuple[int, ...] = (256, 256, 256),
        blocks: tuple[int, ...] = (4, 4, 4),
        num_heads: int = 1,
        cond_size: int = 512,
        dropout: float = 0.0,
        num_classes: int = 0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        time_in: str = "none",
        time_embedding: str = "positional",
        augment: bool = False,
        token_width: int = 0,
        token_count: int = 1,
        set_depth: int = 0,
    ):
        super().__init__()
        check_levels(input_size, channels, blocks)
        tmsa = lookup("time_in", time_in, {"none": False, "qkv": True})
        stem = stem_width(cond_size)
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.add_condition(
            cond_size,
            time_embedding,
            num_classes,
            class_dropout_prob,
            augment,
            token_width,
            token_count,
            set_depth,
            picture_sizes=(input_size, 2, in_channels, num_heads),
            sinusoids=stem,
        )

        def block(width_in, width, level, attends=False, **resample):
            heads = num_heads if attends else 0
            grid = input_size >> level
            return DDPMppBlock(width_in, width, cond_size, grid, dropout, heads, tmsa, **resample)

        self.stem = nn.Conv2d(in_channels, stem, 3, padding=1)
        down, middle, up = ddpmpp_blocks(block, input_size, stem, channels, blocks)
        # Optimizer states know parameters by this order, which is not the one of construction.
        self.middle = nn.ModuleList(middle)
        self.down = nn.ModuleList(down)
        self.up = nn.ModuleList(up)
        self.head_norm = group_norm(channels[0], 1e-6)
        self.head = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """How weights start, besides Network's: the output and the last map of every residual
        branch are zero."""
        super().init_weights()
        nn.init.zeros_(self.head.weight)
        for module in self.modules():
            if isinstance(module, DDPMppBlock):
                nn.init.zeros_(module.conv2.weight)
                if module.attn is not None:
                    nn.init.zeros_(module.attn.proj.weight)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, augmented: Tensor | None = None
    ) -> Tensor:
        c = self.condition(t, y, augmented)                             # (B, cond_size)
        x = self.stem(x)                                                # (B, stem, H, W)
        skips = [x]
        for block in self.down:
            x = block(x, c)
            skips.append(x)
        for block in self.middle:
            x = block(x, c)
        for block in self.up:
            # Blocks that upsample have no skip; every other one takes the last that is left.
            x = block(x if block.upsamples else torch.cat([x, skips.pop()], dim=1), c)
        return self.head(F.silu(self.head_norm(x)))                     # (B, out, H, W)


# -------------------------------------------------------------------------------------------------
# Networks of a Config

# Config.model -> its class. It is called with the fields of Config's network group that apply to
# that word (their `only`), by their names.
NETWORKS = {
    "diffit": DiffiT,
    "dit": DiT,
    "unet": Table4UNet,                             # DiffiTUNet, unless encoder or decoder differ
    "ddpmpp": DDPMpp,
}


def build(cfg) -> nn.Module:
    """The network that a configs.Config describes. UserError if its sizes do not fit each other.
    Only this function and `measure` know Config: all else takes numbers and names."""
    network = lookup("model", cfg.model, NETWORKS)
    return network(**cfg.network_options(), augment=cfg.augment > 0)


def measure(cfg) -> tuple[int, float, int]:
    """The trained parameters, the multiply-adds of a forward pass of one image (without those of a
    set encoder, which reads the pictures of a set once), and the tokens of an image, of the network
    that a configs.Config describes. Counted on the meta device: nothing is computed."""
    with torch.device("meta"):
        model = build(cfg).eval()
        x = torch.empty(1, cfg.in_channels, cfg.input_size, cfg.input_size)
        t = torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            model(x, t)
    trained = sum(p.numel() for p in model.parameters())                # not buffers
    multiply_adds = counter.get_total_flops() / 2                       # which it counts twice
    tokens = (cfg.input_size // (cfg.patch_size or 1)) ** 2             # of a U-Net the finest
    return trained, multiply_adds, tokens


# -------------------------------------------------------------------------------------------------
# Weights of one network for another: other classes, another resolution

LABELS = "y_embedder.embedding_table.weight"
CONDITION = [".y_embedder.", ".set_encoder.", ".cross."]                # what reads y
POSITIONS = "pos_embed"
BIAS_TABLE = "relative_position_bias_table"


def rows(state, name):
    """The number of rows of a table in a state_dict, (rows, D) or (1, rows, D); 0 without one."""
    return math.prod(state[name].shape[:-1]) if name in state else 0


def interpolate_bias(table, shape):
    """A bias table ((2w - 1)^2, h), resized bilinearly to the shape it has for another window. The
    largest offsets stay at the corners, and offset 0 in the middle. A table that already has this
    shape, or has another number of heads, is returned as it is."""
    before, after = math.isqrt(table.shape[:1].numel()), math.isqrt(shape[0])
    if table.shape == shape or not before or table.shape != (before**2, shape[1]):
        return table
    image = table.float().T.reshape(1, -1, before, before)
    image = F.interpolate(image, (after, after), mode="bilinear", align_corners=True)
    return image.view(shape[1], shape[0]).T.contiguous()


def adapt_weights(weights: dict[str, Tensor], network: nn.Module) -> tuple[dict, list[str]]:
    """Weights of a network with other classes, or of another resolution -> a state_dict for this
    network (which may be on the meta device), and sentences that say what was changed.

    What cannot carry over is the network's own: a label table for other classes, what reads tokens
    or sets where the other has classes, and the positions of another grid. The relative position
    bias is interpolated. The rest is neither changed nor checked.
    """
    own = network.state_dict()
    adapted = dict(weights)
    notes = []

    def readers(state):
        """What reads y, but for the label table and positions, which may be of another size."""
        names = {n for n in state if any(part in f".{n}" for part in CONDITION)} - {LABELS}
        return {n: None if n.endswith(POSITIONS) else state[n].shape for n in names}

    ours, theirs = readers(own), readers(weights)
    new = [name for name in ours if name not in theirs or ours[name] != theirs[name]]
    for name in theirs.keys() - ours.keys():
        adapted.pop(name)
    adapted.update({name: own[name] for name in new})
    if new or theirs.keys() - ours.keys():
        notes.append("it is conditioned on something else there, so what reads it is new")

    before = max(0, rows(weights, LABELS) - 1)                          # without the null class
    now = max(0, rows(own, LABELS) - 1)
    if before != now:
        adapted.pop(LABELS, None)
        fate = "re-initialised" if now else "left out"
        notes.append(f"{before} classes there and {now} here, so the label table is {fate}")
    positions = [n for n in own if n.endswith(POSITIONS) and n not in new]  # of a ViT encoder, too
    for name in positions:
        if rows(weights, name) != rows(own, name):
            adapted.pop(name, None)
            notes.append(f"the position table is recomputed for {rows(own, name)} tokens")
    for name in (LABELS, *positions):
        if name in own:
            adapted.setdefault(name, own[name])                         # where they were removed

    # One table for each block (in a U-Net only those whose windows have another size differ).
    tables = [name for name in own if name.endswith(BIAS_TABLE) and name in weights]
    for name in tables:
        adapted[name] = interpolate_bias(weights[name], own[name].shape)
    resized = sum(adapted[name] is not weights[name] for name in tables)
    if resized:
        notes.append(f"{resized} relative position bias tables are interpolated")
    return adapted, notes
