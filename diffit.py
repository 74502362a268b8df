"""The networks: latent DiffiT and image-space DiffiT (arXiv 2312.02139), and DiT (arXiv 2212.09748).

Every network is called model(x, t, y): x (B, C, H, W) noised images or latents, t (B,) what the
process tells it of the noise (an integer timestep, or EDM's ln(sigma)/4), y (B,) class indices,
where num_classes, or no y at all, means "no class". It returns (B, C, H, W), or (B, 2C, H, W) with
learn_sigma. Parts come first, then blocks, then networks, then what the paper compares them with, then `build`.

B images, N tokens on a g x g grid, D width, h heads, c (B, D) the condition: time plus label.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------
# Embeddings

class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, dim): 256 sinusoids, cosines first (DDPM, Sec. 3.3; max period 10000), then an MLP.
    Always fp32: bf16 has 8 bits, and cannot tell timestep 999 from 996."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):  # autocast knows no meta device
            angles = t.float()[:, None] * self.frequency(t.device)         # (B, half)
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

    def frequency(self, device):
        half = self.frequencies // 2
        return torch.exp(torch.arange(half, device=device) * (-math.log(10000) / half))


class FourierEmbedder(TimestepEmbedder):
    """The same with random, fixed frequencies (Tancik et al. 2020; Table 8), as EDM has them for ln(sigma)/4: normal,
    of deviation 16."""

    def __init__(self, dim, frequencies=256):
        super().__init__(dim, frequencies)
        self.register_buffer("freqs", 2 * math.pi * 16 * torch.randn(frequencies // 2))

    def frequency(self, device):
        return self.freqs


class NoEmbedder(nn.Module):
    """t (B,) -> zeros (B, dim): for a network that is not told the time."""

    def __init__(self, dim, frequencies=0):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        return torch.zeros(len(t), self.dim, device=t.device)


class LabelEmbedder(nn.Module):
    """y (B,) in 0..num_classes -> (B, dim). The last row is the null class of classifier-free guidance
    (Ho & Salimans 2022); in training each label becomes it with probability `dropout`."""

    def __init__(self, num_classes, dim, dropout):
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        if self.training and self.dropout > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): one linear map of each patch x patch square, written as a convolution."""

    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos_2d(dim, grid):
    """Fixed position table (1, grid^2, dim): the first half of the width encodes the column, the second
    the row, each as sines then cosines (MAE, as in DiT). What 4 does not divide of the width stays zero."""
    quarter = dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega      # (grid, dim/4)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)                 # (grid, dim/2)
    column = table[None].expand(grid, -1, -1)
    row = table[:, None].expand(-1, grid, -1)
    both = torch.cat([column, row], dim=2).reshape(1, grid * grid, 4 * quarter)
    return F.pad(both, (0, dim - 4 * quarter)).float()


# ---------------------------------------------------------------------------------------------
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
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, h, N, D/h)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class TMSA(nn.Module):
    """Time-dependent multi-head self-attention (DiffiT eqs. 3-6): the condition adds its own q, k and v,
    and a learned bias B by relative position is added to the scores:

        q = x Wqs + c Wqt (k, v likewise),   softmax(q k^T / sqrt(d) + B) v

    x (B, N, D) tokens of a grid x grid image in row order, c (B, cond_dim) -> (B, N, D). With `window`,
    attention stays inside non-overlapping window x window squares (image-space model); without, it
    spans the grid. ValueError if heads do not divide the width or the window does not divide the grid."""

    def __init__(self, dim, num_heads, grid, cond_dim=None, window=None):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.grid, self.window = num_heads, grid, window or grid
        if grid % self.window:
            raise ValueError(f"windows of {self.window} x {self.window} tokens do not tile a grid of {grid} x {grid} "
                             f"tokens; choose a window or an image size so that one divides the other")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_temb = nn.Linear(cond_dim or dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.window - 1) ** 2, num_heads))

    def project(self, x, c):
        """Queries, keys and values, side by side: (B, N, 3D)."""
        return self.qkv(x) + self.qkv_temb(c)[:, None]                     # one time vector an image, broadcast

    def bias(self, table):
        """(..., offsets, h) -> (..., h, w*w, w*w): entry (i, j) is the table's row for the offset of token j from i."""
        w = self.window
        table = table.unflatten(-2, (2 * w - 1, 2 * w - 1))
        # Of token i at (yi, xi) and j at (yj, xj) it takes row yi - yj + w - 1, column xi - xj + w - 1: windows slid
        # over the table, read backwards. No index is stored.
        table = table.unfold(-3, w, 1).unfold(-3, w, 1).flip(-2, -1)       # (..., yi, xi, h, yj, xj)
        return table.movedim(-3, -5).flatten(-4, -3).flatten(-2)

    def attend(self, q, k, v, c):
        """q, k, v (B n^2, h, w^2, D/h), windows of an image together -> the same."""
        return attend(q, k, v, self.bias(self.relative_position_bias_table).to(q.dtype))

    def forward(self, x, c):
        B, N, D = x.shape
        w, n = self.window, self.grid // self.window                       # n x n windows of w x w tokens
        qkv = self.project(x, c)
        qkv = qkv.view(B, n, w, n, w, 3, self.num_heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, B * n * n, self.num_heads, w * w, -1)     # each (B n^2, h, w^2, D/h)
        x = self.attend(q, k, v, c)
        x = x.view(B, n, n, self.num_heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.proj(x.reshape(B, N, D))

    def _load_from_state_dict(self, state, prefix, *args):
        # The released files store the integer index that bias() does without.
        state.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state, prefix, *args)


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(d) + bias) v: q (B, h, N, d), k, v (B, h, M, d), bias (h, N, M) or (B, h, N, M)
    -> (B, h, N, d)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # On CPUs two plain products are faster, in training (no fused kernel has a gradient for the bias) and without.
    B, h, N, d = q.shape
    bias = bias.flatten(0, 1) if bias.dim() == 4 else bias.repeat(B, 1, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=d ** -0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, h, N, d)


def check_heads(dim, num_heads):
    if dim % num_heads:
        raise ValueError(f"width {dim} cannot be split into {num_heads} heads; choose a number that divides it")


# ---------------------------------------------------------------------------------------------
# Blocks

def layer_norm(dim):
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class Mlp(nn.Module):
    """Linear, GELU, linear: (B, N, D) -> (B, N, D). With cond_dim, the time is added to the hidden layer."""

    def __init__(self, dim, hidden, cond_dim=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.temb = nn.Linear(cond_dim, hidden) if cond_dim else None

    def forward(self, x, c=None):
        x = self.fc1(x)
        if self.temb is not None:
            x = x + self.temb(c)[:, None]
        return self.fc2(F.gelu(x, approximate="tanh"))


class DiffiTBlock(nn.Module):
    """DiffiT eqs. 7-8: x = TMSA(LN(x), c) + x;  x = MLP(LN(x)) + x. Time enters in the attention alone. time_in: the
    paper's ablations, ATTENTION below."""

    def __init__(self, dim, num_heads, mlp_ratio, grid, cond_dim=None, window=None, time_in="qkv"):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn = chosen("time_in", time_in, ATTENTION)(dim, num_heads, grid, cond_dim, window)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), (cond_dim or dim) if time_in == "mlp" else None)

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x), c)
        return x + self.mlp(self.norm2(x), c)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """adaLN-Zero (DiT Sec. 3.2): the condition shifts, scales and gates both halves of the block.
    The gates start at zero, so a fresh block is the identity."""

    def __init__(self, dim, num_heads, mlp_ratio, grid):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # each (B, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiffiTHead(nn.Module):
    """Tokens to pixels: Linear(SiLU(LN(x))), as released; time has no say here. (B, N, D) -> (B, N, out)"""

    def __init__(self, dim, out):
        super().__init__()
        self.norm, self.linear = layer_norm(dim), nn.Linear(dim, out)

    def forward(self, x, c):
        return self.linear(F.silu(self.norm(x)))


class DiTHead(nn.Module):
    """Tokens to pixels: LN modulated by the condition, then a linear map. (B, N, D) -> (B, N, out)"""

    def __init__(self, dim, out):
        super().__init__()
        self.norm, self.linear = layer_norm(dim), nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class ResBlock(nn.Module):
    """DiffiT eqs. 9-10: h = Conv3x3(Swish(GN(x)));  x = DiffiTBlock(h, c) + x.
    x (B, in, H, W) -> (B, out, H, W); the shortcut is a 1x1 convolution where the channels change."""

    def __init__(self, in_channels, out_channels, num_heads, mlp_ratio, grid, cond_dim, window, dropout, time_in="qkv"):
        super().__init__()
        self.norm = group_norm(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.block = DiffiTBlock(out_channels, num_heads, mlp_ratio, grid, cond_dim, window, time_in)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, c):
        h = self.conv(self.dropout(F.silu(self.norm(x))))
        tokens = self.block(h.flatten(2).transpose(1, 2), c)               # (B, H*W, out)
        return tokens.transpose(1, 2).reshape(h.shape) + self.skip(x)


def group_norm(channels, eps=1e-5):
    """At most 32 groups of at least 4 channels, as in EDM."""
    most = max(1, min(32, channels // 4))
    return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels, eps)


# ---------------------------------------------------------------------------------------------
# Networks

class Transformer(nn.Module):
    """What the latent DiffiT and DiT share: patches, embeddings, a stack of blocks, a head. The two differ
    in `Block` and `Head` alone. Parameter names are those of the released weights."""
    Block = Head = None

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, learn_sigma=True, embed_gain=1.0,
                 time_embedding="positional", augment=False, **block_options):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an input of {input_size} x {input_size}; "
                             f"choose a size that is a multiple of the patch")
        self.patch_size, self.grid = patch_size, input_size // patch_size
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        add_condition(self, hidden_size, time_embedding, num_classes, class_dropout_prob, augment)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, self.grid))
        self.blocks = nn.ModuleList(self.Block(hidden_size, num_heads, mlp_ratio, self.grid, **block_options)
                                    for _ in range(depth))
        self.final_layer = self.Head(hidden_size, patch_size ** 2 * self.out_channels)
        self.init_weights(embed_gain)

    def init_weights(self, embed_gain):
        init_common(self)
        # A linear map in a convolution's clothes. With a gain, tokens begin large beside what the blocks add to them.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1), embed_gain)
        self.pos_embed *= embed_gain
        for head in (m for m in self.modules() if isinstance(m, (DiTBlock, DiTHead))):
            nn.init.zeros_(head.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y=None, augmented=None):
        B, p, g = len(x), self.patch_size, self.grid
        x = self.x_embedder(x) + self.pos_embed                            # (B, N, D)
        c = condition(self, t, y, augmented)                               # (B, D)
        for block in self.blocks:
            x = block(x, c)                                                # (B, N, D)
        x = self.final_layer(x, c)                                         # (B, N, p*p*out)
        x = x.view(B, g, g, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, self.out_channels, g * p, g * p)               # (B, out, H, W)


class DiffiT(Transformer):
    """Latent DiffiT (Sec. 3.2 "latent space", Fig. 4), as released: plain blocks of TMSA and MLP."""
    Block, Head = DiffiTBlock, DiffiTHead


class DiT(Transformer):
    """DiT with adaLN-Zero (Peebles & Xie 2022)."""
    Block, Head = DiTBlock, DiTHead


class DiffiTUNet(nn.Module):
    """Image-space DiffiT (Fig. 3, Tables S.2 and S.3): a U-Net of DiffiT ResBlocks with windowed TMSA.

    channels, blocks: width and number of ResBlocks at each resolution, finest first; each resolution is
    half of the one before. window: side of the attention windows in tokens (a whole grid that is smaller
    is one window). encoder: "diffit", "plain" or "vit", decoder: "diffit", "plain" or "setr" (Table 4, below).
    ValueError if the sizes do not divide."""

    def __init__(self, input_size=64, in_channels=3, channels=(128, 256, 256, 256), blocks=(4, 4, 4, 4), num_heads=4,
                 window=8, cond_size=512, mlp_ratio=4.0, dropout=0.0, num_classes=0, class_dropout_prob=0.1,
                 learn_sigma=False, time_in="qkv", time_embedding="positional", augment=False, encoder="diffit",
                 decoder="diffit"):
        super().__init__()
        levels = check_levels(input_size, channels, blocks)
        chosen("encoder", encoder, ("diffit", "plain", "vit")), chosen("decoder", decoder, ("diffit", "plain", "setr"))
        add_condition(self, cond_size, time_embedding, num_classes, class_dropout_prob, augment)

        def stage(level, extra, plain):                                    # its first block takes `extra` channels too
            grid, width = input_size >> level, channels[level]
            return Stage((ResBlock(width + (extra if i == 0 else 0), width, num_heads, mlp_ratio, grid, cond_size,
                                   min(window, grid), dropout, "none" if plain else time_in)
                          for i in range(blocks[level])), width + extra, cond_size if plain else None)

        self.tokenizer = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        if encoder == "vit":
            self.encoder = ViTEncoder(input_size, channels, blocks, num_heads, mlp_ratio, cond_size)
        else:
            self.encoder = Encoder([stage(i, 0, encoder == "plain") for i in range(levels)], channels)
        if decoder == "setr":
            self.decoder = SETRDecoder(input_size, self.encoder.widths, channels[0])
        else:
            # The coarsest stage has no skip: it would join the encoder's output to itself.
            self.decoder = Decoder([stage(i, channels[i] if i < levels - 1 else 0, decoder == "plain")
                                    for i in range(levels)], channels)
        self.head_norm = group_norm(channels[0])
        self.head = nn.Conv2d(channels[0], (2 if learn_sigma else 1) * in_channels, 3, padding=1)
        init_common(self)
        nn.init.zeros_(self.head.weight)

    def forward(self, x, t, y=None, augmented=None):
        c = condition(self, t, y, augmented)                               # (B, cond_size)
        x = self.tokenizer(x)                                              # (B, channels[0], H, W)
        features = self.encoder(x, c)                                      # (B, channels[i], H / 2^i, W / 2^i) each
        x = self.decoder(features, c)                                      # (B, channels[0], H, W)
        return self.head(F.silu(self.head_norm(x)))                        # (B, C, H, W)


def check_levels(input_size, channels, blocks):
    """The number of resolutions. ValueError if the sizes do not fit it."""
    levels = len(channels)
    if len(blocks) != levels:
        raise ValueError(f"{levels} widths {channels} but {len(blocks)} block counts {blocks}; "
                         f"give one for each resolution")
    if input_size % 2 ** (levels - 1):
        raise ValueError(f"{levels} resolutions need a size divisible by {2 ** (levels - 1)}; "
                         f"{input_size} is not")
    return levels


def chosen(name, value, known):
    """known[value], or value itself where known only lists what there is. ValueError if it is unknown."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; there are {', '.join(known)}")
    return known[value] if isinstance(known, dict) else value


class Stage(nn.Module):
    """The ResBlocks at one resolution. With cond_size (Table 4, A to C, where blocks have no time of their own), the
    time is projected, scaled and added to what enters; the scale is learned, for each channel."""

    def __init__(self, blocks, width, cond_size=None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.temb = nn.Linear(cond_size, width) if cond_size else None
        self.scale = nn.Parameter(torch.ones(width)) if cond_size else None

    def forward(self, x, c):
        if self.temb is not None:
            time = self.scale * self.temb(c)                               # (B, width)
            x = x + time.view(*time.shape[:1], *([-1, 1, 1] if x.dim() == 4 else [1, -1]))
        for block in self.blocks:
            x = block(x, c)
        return x


class Encoder(nn.Module):
    """(B, channels[0], H, W) -> the features of each stage, finest first; strided convolutions between them."""

    def __init__(self, stages, channels):
        super().__init__()
        self.stages, self.widths = nn.ModuleList(stages), channels
        self.downsamplers = nn.ModuleList(nn.Conv2d(a, b, 3, 2, padding=1) for a, b in zip(channels, channels[1:]))

    def forward(self, x, c):
        features = []
        for level, stage in enumerate(self.stages):
            x = stage(self.downsamplers[level - 1](x) if level else x, c)
            features.append(x)
        return features


class Decoder(nn.Module):
    """The encoder's features -> (B, channels[0], H, W): from the coarsest stage up, each joined to the encoder's."""

    def __init__(self, stages, channels):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.upsamplers = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in zip(channels, channels[1:]))

    def forward(self, features, c):
        x = self.stages[-1](features[-1], c)
        for level in range(len(self.stages) - 2, -1, -1):
            x = self.upsamplers[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = self.stages[level](torch.cat([x, features[level]], dim=1), c)
        return x


def add_condition(model, dim, time_embedding, num_classes, class_dropout_prob, augment, frequencies=256):
    """What `condition` needs of a network: embeddings of time and label, and of nine augmentation labels (EDM, App.
    F.2)."""
    model.num_classes = num_classes
    embedders = {"positional": TimestepEmbedder, "fourier": FourierEmbedder, "none": NoEmbedder}
    model.t_embedder = chosen("time_embedding", time_embedding, embedders)(dim, frequencies)
    model.y_embedder = LabelEmbedder(num_classes, dim, class_dropout_prob) if num_classes else None
    model.augment_embedder = nn.Linear(9, dim, bias=False) if augment else None


def condition(model, t, y, augmented=None):
    """c = embedding of the time + of the label, the null class where none is given, + of the augmentation labels (B,
    9), zero where none are given."""
    c = model.t_embedder(t)
    if model.y_embedder is not None:
        c = c + model.y_embedder(torch.full_like(t, model.num_classes, dtype=torch.long) if y is None else y)
    elif y is not None:
        raise ValueError("this network was built without classes (num_classes = 0), but was given labels; "
                         "call it with y=None")
    if model.augment_embedder is not None and augmented is not None:
        c = c + model.augment_embedder(augmented)
    return c


def init_common(model):
    """Xavier for linears, zeros for biases, normal 0.02 for the embeddings of t and y, truncated normal
    0.02 for the relative position bias; convolutions keep PyTorch's own. Each network adds what starts at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, TMSA):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
    if isinstance(model.t_embedder, TimestepEmbedder):
        nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)
    if model.y_embedder is not None:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)


# ---------------------------------------------------------------------------------------------
# What Tables 6 and 7 compare with: the time elsewhere than in queries, keys and values

class Untimed(TMSA):
    """The same attention, blind to time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.qkv_temb = None

    def project(self, x, c):
        return self.qkv(x)


class TimeAsToken(Untimed):
    """The time is a token of its own, which all others see: one more key and value in each window, without a bias."""

    def __init__(self, dim, num_heads, grid, cond_dim=None, window=None):
        super().__init__(dim, num_heads, grid, cond_dim, window)
        self.token = nn.Linear(cond_dim or dim, 2 * dim)

    def attend(self, q, k, v, c):
        time = self.token(c).view(len(c), 2, self.num_heads, 1, -1).repeat_interleave(len(q) // len(c), 0)
        k, v = torch.cat([k, time[:, 0]], dim=2), torch.cat([v, time[:, 1]], dim=2)
        bias = F.pad(self.bias(self.relative_position_bias_table), (0, 1))  # (h, w^2, w^2 + 1)
        return attend(q, k, v, bias.to(q.dtype))


class TimeInBias(Untimed):
    """The time adds to the table of the relative position bias, for each offset and head."""

    def __init__(self, dim, num_heads, grid, cond_dim=None, window=None):
        super().__init__(dim, num_heads, grid, cond_dim, window)
        self.bias_temb = nn.Linear(cond_dim or dim, self.relative_position_bias_table.numel())

    def attend(self, q, k, v, c):
        table = self.relative_position_bias_table
        bias = self.bias(table + self.bias_temb(c).view(-1, *table.shape))  # (B, h, w^2, w^2)
        return attend(q, k, v, bias.to(q.dtype).repeat_interleave(len(q) // len(c), 0))


ATTENTION = {                         # time_in: where the time enters a DiffiTBlock
    "qkv": TMSA,                      # eqs. 3-6 (Table 6, H; Table 7, mixed)
    "token": TimeAsToken,             # Table 7, separate
    "bias": TimeInBias,               # Table 6, F
    "mlp": Untimed,                   # Table 6, G: in the hidden layer of the MLP
    "none": Untimed}                  # nowhere: for blocks that get it in another way (Table 4's plain stages)


# ---------------------------------------------------------------------------------------------
# What Table 4 compares with. A: ViTEncoder and SETRDecoder; B: plain Encoder and SETRDecoder; C: plain Encoder and
# Decoder; D: the encoder of DiffiT and a plain Decoder. Plain stages have ResBlocks without time (see Stage).

class ViTEncoder(nn.Module):
    """A vision transformer of sum(blocks) plain blocks (12 in the paper), as wide as the last of channels, on patches
    of 2 (neither is said): features after each of its len(channels) stages, all of one resolution."""

    def __init__(self, input_size, channels, blocks, num_heads, mlp_ratio, cond_size):
        super().__init__()
        grid, dim = input_size // 2, channels[-1]
        self.patches = PatchEmbed(2, channels[0], dim)
        self.register_buffer("pos_embed", sincos_2d(dim, grid))
        self.stages = nn.ModuleList(
            Stage((DiffiTBlock(dim, num_heads, mlp_ratio, grid, cond_size, None, "none") for _ in range(count)), dim,
                  cond_size) for count in blocks)
        self.widths = (dim,) * len(blocks)

    def forward(self, x, c):
        tokens, features = self.patches(x) + self.pos_embed, []
        for stage in self.stages:
            tokens = stage(tokens, c)
            features.append(tokens.transpose(1, 2).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)))
        return features


class SETRDecoder(nn.Module):
    """SETR-MLA (Zheng et al. 2021): each feature map is made `width` wide, those of later stages are added to it, and
    all are brought to the full size and joined."""

    def __init__(self, input_size, widths, width):
        super().__init__()
        self.input_size = input_size
        self.reduce = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.join = nn.Conv2d(len(widths) * width, width, 3, padding=1)

    def forward(self, features, c):
        total, full = 0, []
        for level in range(len(features) - 1, -1, -1):
            x = self.reduce[level](features[level])
            total = x + (resize(total, x.shape[-1]) if full else 0)
            full.append(resize(F.silu(self.refine[level](total)), self.input_size))
        return self.join(torch.cat(full, dim=1))


def resize(x, size):
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------
# What Table 5 puts TMSA into

class DDPMpp(nn.Module):
    """DDPM++ (Song et al. 2021): a U-Net with self-attention at 16 x 16 and in the middle, its own (time_in "none") or
    TMSA ("qkv"). channels, blocks: as in DiffiTUNet; the decoder has one block more at each resolution."""

    def __init__(self, input_size=32, in_channels=3, channels=(256, 256, 256), blocks=(4, 4, 4), num_heads=1,
                 cond_size=512, dropout=0.0, num_classes=0, class_dropout_prob=0.1, learn_sigma=False, time_in="none",
                 time_embedding="positional", augment=False):
        super().__init__()
        last, stem = check_levels(input_size, channels, blocks) - 1, cond_size // 4  # the base width: 128
        if not stem:
            raise ValueError(f"a time token of {cond_size} is too narrow: DDPM++ begins with a quarter of it")
        chosen("time_in", time_in, ("qkv", "none"))
        add_condition(self, cond_size, time_embedding, num_classes, class_dropout_prob, augment, frequencies=stem)

        def block(before, width, level, attends, **resample):
            grid = input_size >> level
            return DDPMppBlock(before, width, cond_size, grid, dropout,
                               num_heads if attends else 0, time_in == "qkv", **resample)

        self.stem, widths, self.down, self.up = nn.Conv2d(in_channels, stem, 3, padding=1), [stem], [], []
        x = stem
        for level, (width, count) in enumerate(zip(channels, blocks)):
            if level:
                self.down.append(block(x, x, level, False, down=True))
                widths.append(x)
            for _ in range(count):
                self.down.append(block(x, width, level, input_size >> level == 16))
                x = width
                widths.append(x)
        self.middle = nn.ModuleList([block(x, x, last, True), block(x, x, last, False)])
        for level in range(last, -1, -1):
            if level < last:
                self.up.append(block(x, x, level, False, up=True))
            for i in range(blocks[level] + 1):
                attends = input_size >> level == 16 and i == blocks[level]
                self.up.append(block(x + widths.pop(), channels[level], level, attends))
                x = channels[level]
        self.down, self.up = nn.ModuleList(self.down), nn.ModuleList(self.up)
        self.head_norm = group_norm(x, 1e-6)
        self.head = nn.Conv2d(x, (2 if learn_sigma else 1) * in_channels, 3, padding=1)
        init_common(self)
        blocks = [module for module in self.modules() if isinstance(module, DDPMppBlock)]
        for end in [self.head, *(b.conv2 for b in blocks), *(b.attn.proj for b in blocks if b.attn is not None)]:
            nn.init.zeros_(end.weight)

    def forward(self, x, t, y=None, augmented=None):
        c = condition(self, t, y, augmented)                               # (B, cond_size)
        x = self.stem(x)
        skips = [x]
        for block in self.down:
            x = block(x, c)
            skips.append(x)
        for block in self.middle:
            x = block(x, c)
        for block in self.up:
            x = block(x if block.upsamples else torch.cat([x, skips.pop()], dim=1), c)
        return self.head(F.silu(self.head_norm(x)))


class DDPMppBlock(nn.Module):
    """h = Conv(Swish(GN(x))) + time;  x = (Conv(Dropout(Swish(GN(h)))) + x) / sqrt 2;  then, with heads, x =
    (attention(GN(x)) + x) / sqrt 2. down, up: at half, or twice, the resolution of x. tmsa: that attention is TMSA."""

    def __init__(self, before, width, cond_size, grid, dropout, num_heads, tmsa, down=False, up=False):
        super().__init__()
        self.downsamples, self.upsamples = down, up
        self.norm1, self.conv1 = group_norm(before, 1e-6), nn.Conv2d(before, width, 3, padding=1)
        self.temb = nn.Linear(cond_size, width)
        self.norm2, self.conv2 = group_norm(width, 1e-6), nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(before, width, 1) if before != width or down or up else nn.Identity()
        self.norm3, self.attn = (group_norm(width, 1e-6) if num_heads else None), None
        if num_heads:
            self.attn = TMSA(width, num_heads, grid, cond_size) if tmsa else Attention(width, num_heads)

    def resample(self, x):
        x = F.avg_pool2d(x, 2) if self.downsamples else x
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.upsamples else x

    def forward(self, x, c):
        h = self.conv1(self.resample(F.silu(self.norm1(x)))) + self.temb(F.silu(c))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = (h + self.skip(self.resample(x))) * math.sqrt(0.5)
        if self.attn is not None:
            tokens = self.norm3(x).flatten(2).transpose(1, 2)              # (B, H*W, width)
            tokens = self.attn(tokens, c) if isinstance(self.attn, TMSA) else self.attn(tokens)
            x = (tokens.transpose(1, 2).reshape(x.shape) + x) * math.sqrt(0.5)
        return x


BLOCKS = DiffiTBlock, DiTBlock, DDPMppBlock  # what train.py compiles, or computes again in backward


def build(cfg):
    """The network that a Config describes (the only place in this file that knows of Config)."""
    shared = dict(input_size=cfg.input_size, in_channels=cfg.in_channels, num_heads=cfg.num_heads,
                  num_classes=cfg.num_classes, class_dropout_prob=cfg.class_dropout_prob, learn_sigma=cfg.learn_sigma,
                  time_embedding=cfg.time_embedding, augment=cfg.augment > 0)
    tokens = dict(patch_size=cfg.patch_size, hidden_size=cfg.hidden_size, depth=cfg.depth, mlp_ratio=cfg.mlp_ratio,
                  embed_gain=cfg.embed_gain)
    levels = dict(channels=cfg.channels, blocks=cfg.blocks, cond_size=cfg.cond_size, dropout=cfg.dropout)
    if cfg.model == "diffit":
        return DiffiT(**shared, **tokens, time_in=cfg.time_in)
    if cfg.model == "dit":
        return DiT(**shared, **tokens)
    if cfg.model == "ddpmpp":
        return DDPMpp(**shared, **levels, time_in=cfg.time_in)
    return DiffiTUNet(**shared, **levels, mlp_ratio=cfg.mlp_ratio, window=cfg.window, time_in=cfg.time_in,
                      encoder=cfg.encoder, decoder=cfg.decoder)
