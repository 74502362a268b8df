"""The networks: latent DiffiT and image-space DiffiT (arXiv 2312.02139), and DiT (arXiv 2212.09748).

Every network is called model(x, t, y): x (B, C, H, W) noised images or latents, t (B,) what the
process tells it of the noise (an integer timestep, or EDM's ln(sigma)/4), y (B,) class indices,
where num_classes, or no y at all, means "no class". It returns (B, C, H, W), or (B, 2C, H, W) with
learn_sigma. Parts come first, then blocks, then networks, then `build`.

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
        half = self.frequencies // 2
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):  # autocast knows no meta device
            freqs = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
            angles = t.float()[:, None] * freqs                            # (B, half)
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


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

    def bias(self):
        """(h, w*w, w*w): entry (i, j) is the table's row for the offset of token j from token i."""
        w = self.window
        table = self.relative_position_bias_table.view(2 * w - 1, 2 * w - 1, -1)
        # Of token i at (yi, xi) and j at (yj, xj) it takes row yi - yj + w - 1, column xi - xj + w - 1: windows slid
        # over the table, read backwards. No index is stored.
        table = table.unfold(0, w, 1).unfold(1, w, 1).flip(3, 4)           # (yi, xi, h, yj, xj)
        return table.permute(2, 0, 1, 3, 4).reshape(-1, w * w, w * w)

    def forward(self, x, c):
        B, N, D = x.shape
        w, n = self.window, self.grid // self.window                       # n x n windows of w x w tokens
        qkv = self.qkv(x) + self.qkv_temb(c)[:, None]                      # one time vector an image, broadcast
        qkv = qkv.view(B, n, w, n, w, 3, self.num_heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, B * n * n, self.num_heads, w * w, -1)     # each (B n^2, h, w^2, D/h)
        x = attend(q, k, v, self.bias().to(q.dtype))
        x = x.view(B, n, n, self.num_heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.proj(x.reshape(B, N, D))

    def _load_from_state_dict(self, state, prefix, *args):
        # The released files store the integer index that bias() does without.
        state.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state, prefix, *args)


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(d) + bias) v: q, k, v (B, h, N, d), bias (h, N, N) -> (B, h, N, d)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # On CPUs two plain products are faster, in training (no fused kernel has a gradient for the bias) and without.
    B, h, N, d = q.shape
    scores = torch.baddbmm(bias.repeat(B, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=d ** -0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, h, N, d)


def check_heads(dim, num_heads):
    if dim % num_heads:
        raise ValueError(f"width {dim} cannot be split into {num_heads} heads; choose a number that divides it")


# ---------------------------------------------------------------------------------------------
# Blocks

def layer_norm(dim):
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiffiTBlock(nn.Module):
    """DiffiT eqs. 7-8: x = TMSA(LN(x), c) + x;  x = MLP(LN(x)) + x. Time enters in the attention alone."""

    def __init__(self, dim, num_heads, mlp_ratio, grid, cond_dim=None, window=None):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn = TMSA(dim, num_heads, grid, cond_dim, window)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x), c)
        return x + self.mlp(self.norm2(x))


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

    def __init__(self, in_channels, out_channels, num_heads, mlp_ratio, grid, cond_dim, window, dropout):
        super().__init__()
        self.norm = group_norm(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.block = DiffiTBlock(out_channels, num_heads, mlp_ratio, grid, cond_dim, window)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, c):
        h = self.conv(self.dropout(F.silu(self.norm(x))))
        tokens = self.block(h.flatten(2).transpose(1, 2), c)               # (B, H*W, out)
        return tokens.transpose(1, 2).reshape(h.shape) + self.skip(x)


def group_norm(channels):
    """At most 32 groups of at least 4 channels, as in EDM."""
    most = max(1, min(32, channels // 4))
    return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)


# ---------------------------------------------------------------------------------------------
# Networks

class Transformer(nn.Module):
    """What the latent DiffiT and DiT share: patches, embeddings, a stack of blocks, a head. The two differ
    in `Block` and `Head` alone. Parameter names are those of the released weights."""
    Block = Head = None

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, learn_sigma=True, embed_gain=1.0):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an input of {input_size} x {input_size}; "
                             f"choose a size that is a multiple of the patch")
        self.num_classes, self.patch_size, self.grid = num_classes, patch_size, input_size // patch_size
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        self.register_buffer("pos_embed", sincos_2d(hidden_size, self.grid))
        self.blocks = nn.ModuleList(self.Block(hidden_size, num_heads, mlp_ratio, self.grid) for _ in range(depth))
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

    def forward(self, x, t, y=None):
        B, p, g = len(x), self.patch_size, self.grid
        x = self.x_embedder(x) + self.pos_embed                            # (B, N, D)
        c = condition(self, t, y)                                          # (B, D)
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
    is one window). ValueError if the sizes do not divide."""

    def __init__(self, input_size=64, in_channels=3, channels=(128, 256, 256, 256), blocks=(4, 4, 4, 4), num_heads=4,
                 window=8, cond_size=512, mlp_ratio=4.0, dropout=0.0, num_classes=0, class_dropout_prob=0.1,
                 learn_sigma=False):
        super().__init__()
        levels = len(channels)
        if len(blocks) != levels:
            raise ValueError(f"{levels} widths {channels} but {len(blocks)} block counts {blocks}; "
                             f"give one for each resolution")
        if input_size % 2 ** (levels - 1):
            raise ValueError(f"{levels} resolutions need a size divisible by {2 ** (levels - 1)}; "
                             f"{input_size} is not")
        self.num_classes = num_classes
        self.t_embedder = TimestepEmbedder(cond_size)
        self.y_embedder = LabelEmbedder(num_classes, cond_size, class_dropout_prob) if num_classes else None

        def stage(level, extra):                                           # its first block takes `extra` channels too
            grid, width = input_size >> level, channels[level]
            return nn.ModuleList(ResBlock(width + (extra if i == 0 else 0), width, num_heads, mlp_ratio, grid,
                                          cond_size, min(window, grid), dropout) for i in range(blocks[level]))

        down, up = range(levels - 1), range(1, levels)
        self.tokenizer = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.encoder = nn.ModuleList(stage(level, 0) for level in range(levels))
        self.downsamplers = nn.ModuleList(nn.Conv2d(channels[i], channels[i + 1], 3, 2, padding=1) for i in down)
        # The coarsest stage has no skip: it would join the encoder's output to itself.
        self.decoder = nn.ModuleList(stage(i, channels[i] if i < levels - 1 else 0) for i in range(levels))
        self.upsamplers = nn.ModuleList(nn.Conv2d(channels[i], channels[i - 1], 3, padding=1) for i in up)
        self.head_norm = group_norm(channels[0])
        self.head = nn.Conv2d(channels[0], (2 if learn_sigma else 1) * in_channels, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        init_common(self)
        nn.init.zeros_(self.head.weight)

    def forward(self, x, t, y=None):
        c = condition(self, t, y)                                          # (B, cond_size)
        x = self.tokenizer(x)                                              # (B, channels[0], H, W)
        skips, coarsest = [], len(self.encoder) - 1
        for level, stage in enumerate(self.encoder):
            for block in stage:
                x = block(x, c)                                            # (B, channels[level], H / 2^level, ...)
            if level < coarsest:
                skips.append(x)
                x = self.downsamplers[level](x)
        for level in range(coarsest, -1, -1):
            if level < coarsest:
                x = self.upsamplers[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
                x = torch.cat([x, skips.pop()], dim=1)
            for block in self.decoder[level]:
                x = block(x, c)
        return self.head(F.silu(self.head_norm(x)))                        # (B, C, H, W)


def condition(model, t, y):
    """c = embedding of the time + embedding of the label, the null class where none is given."""
    c = model.t_embedder(t)
    if model.y_embedder is not None:
        c = c + model.y_embedder(torch.full_like(t, model.num_classes, dtype=torch.long) if y is None else y)
    elif y is not None:
        raise ValueError("this network was built without classes (num_classes = 0), but was given labels; "
                         "call it with y=None")
    return c


def init_common(model):
    """Xavier for linears, zeros for biases, normal 0.02 for the embeddings of t and y, truncated normal
    0.02 for the relative position bias; convolutions keep PyTorch's own. Each network adds what starts at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.zeros_(module.bias)
        if isinstance(module, TMSA):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)
    if model.y_embedder is not None:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)


def build(cfg):
    """The network that a Config describes (the only place in this file that knows of Config)."""
    shared = dict(input_size=cfg.input_size, in_channels=cfg.in_channels, num_heads=cfg.num_heads,
                  mlp_ratio=cfg.mlp_ratio, num_classes=cfg.num_classes, class_dropout_prob=cfg.class_dropout_prob,
                  learn_sigma=cfg.learn_sigma)
    if cfg.model == "unet":
        return DiffiTUNet(**shared, channels=cfg.channels, blocks=cfg.blocks, window=cfg.window,
                          cond_size=cfg.cond_size, dropout=cfg.dropout)
    network = {"diffit": DiffiT, "dit": DiT}[cfg.model]
    return network(**shared, patch_size=cfg.patch_size, hidden_size=cfg.hidden_size, depth=cfg.depth,
                   embed_gain=cfg.embed_gain)
