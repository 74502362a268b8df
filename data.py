"""Files to tensors and back: weights, latents, data sets, pictures; and `python data.py prepare|latents`.

A data set has len(), example(i, mirrored, rng) -> what a network is trained on, labels ((n,) int64, or None), name(i),
and class_names (empty where the source has only numbers). Three hold pictures, which read(i) gives as uint8
(size, size, 3): `Shapes` (drawn), `Files` (a folder or a zip), `Arrays` (an .npz, the CIFAR archives). `Latents` holds
what the `VAE` made of one of these. `Stream` puts any of them in the endless order that training reads it in.
"""
import argparse
import colorsys
import contextlib
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import signal
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
KINDS = ("'shapes', a folder of images (sub-folders are classes), a .zip of images, an .npz, "
         "a CIFAR-10/100 binary archive, or the .safetensors of data.py latents")


# ---------------------------------------------------------------------------------------------
# One picture

def decode(file):
    """An opened image file -> PIL image, RGB, upright; transparency is laid on white. For a broken file it raises
    what Pillow raises, which can be nearly anything."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):                                         # 16-bit grey
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop: halve with a box filter while the short side is at least 2 x size, then bicubic, then cut the
    middle. PIL image -> uint8 (size, size, 3)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        size_now = round(image.width * scale), round(image.height * scale)
        image = image.resize(size_now, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


# ---------------------------------------------------------------------------------------------
# Files of weights

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
LONGEST_HEADER = 2 ** 24              # bytes; that of a network with a thousand tensors has about 2^17


def safetensors_layout(path):
    """The header of a .safetensors file (8 bytes of its length, itself as JSON, then raw tensors) -> {name: (dtype,
    shape, first byte)}, metadata. ValueError if it says anything that the file does not bear out."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= min(size, LONGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file: of {size} bytes, its header would take {start - 8}")
        try:
            header = json.loads(file.read(start - 8))
        except (ValueError, RecursionError):
            header = None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is no safetensors file: its header is not a JSON object as described there")
    layout, spans = {}, []
    for name, said in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES[said["dtype"]], said["shape"], said["data_offsets"]
            whole = isinstance(shape, list) and len(shape) <= 8 and all(
                type(n) is int and 0 <= n <= size for n in [*shape, begin, end])
        except (KeyError, TypeError, ValueError):
            whole = False
        if not (whole and end - begin == math.prod(shape) * dtype.itemsize and start + end <= size):
            raise ValueError(f"{path} is damaged, or no safetensors file: it describes {name[:60]!r} as "
                             f"{str(said)[:120]}, and has {size - start} bytes of tensors")
        layout[name] = dtype, shape, start + begin
        spans.append((begin, end, name))
    for (_, end, name), (begin, _, other) in itertools.pairwise(sorted(spans)):
        if begin < end:
            raise ValueError(f"{path} is damaged: its tensors {name[:60]!r} and {other[:60]!r} share bytes")
    return layout, metadata


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: the file itself, memory-mapped; what is written to them stays in this
    process. ValueError as above."""
    layout, tensors = safetensors_layout(path)[0], {}
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, (dtype, shape, at) in layout.items():
        count = math.prod(shape)
        if not count:
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif at % dtype.itemsize:                                          # no address for numbers of this size
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=at)
            tensors[name] = raw.clone().view(dtype).view(shape)
        else:
            tensors[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=at).view(shape)
    return tensors


def safetensors_header(tensors, metadata):
    """The first bytes of a .safetensors file of {name: (dtype as in DTYPES, shape)}, and where each tensor begins."""
    header, starts, end = {"__metadata__": metadata}, {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + at for name, at in starts.items()}


def read_file(path):
    """A file of weights, or a checkpoint with more in it -> a dict, its tensors memory-mapped. Safetensors, or what
    torch.save wrote; of that only tensors and plain values are ever unpickled. ValueError if it is missing, damaged or
    something else."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{" or str(path).endswith(".safetensors"):
        return read_safetensors(path)
    try:
        zipped = zipfile.is_zipfile(path)                                  # else of before torch 1.6
        if zipped and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        with torch.serialization.safe_globals([argparse.Namespace]):       # the flags, in checkpoints of DiT's training
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:                                             # torch.load fails in a dozen ways
        why = reason(error)[:100]
        if "Weights only" in why:                                          # torch's advice is to trust the file
            why = "it holds more than tensors and plain values, or none"
        raise ValueError(f"{path} is truncated, or no file of weights ({why})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    return content


def weights_in(content, path, raw=False):
    """What read_file gave -> {name: tensor}, and which they are: "EMA" (an "ema" entry, which is preferred), "raw"
    (a "model" or "state_dict" entry; with raw wanted), or "plain" (the file holds nothing else). Prefixes that wrappers
    leave, module. and _orig_mod., are gone. ValueError if there are none."""
    entries = {key: content[key] for key in ("ema", "model", "state_dict") if isinstance(content.get(key), dict)}
    if raw:
        entries.pop("ema", None)
        if not entries:
            raise ValueError(f"{path} holds one set of weights, and no raw ones beside them; leave --raw out")
    key, state = next(iter(entries.items()), ("", content))
    if not state or not all(isinstance(n, str) and isinstance(value, torch.Tensor) for n, value in state.items()):
        raise ValueError(f"{path} holds no weights (expected tensors by name, or such a dict under ema or model)")
    state = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}
    return state, {"ema": "EMA", "": "plain"}.get(key, "raw")


def check_weights(model, state, path):
    """ValueError that lists what of a state_dict does not fit the network."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    wrong = {"missing": [n for n in own if n not in state],
             "unexpected": [n for n in state if n not in own and not n.endswith("relative_position_index")],
             "of another shape": [f"{n} {tuple(state[n].shape)}, expected {tuple(own[n])}"
                                  for n in own if n in state and state[n].shape != own[n]]}
    said = [f"{len(names)} {what} ({'; '.join(n[:100] for n in names[:10])}{'; ...' if len(names) > 10 else ''})"
            for what, names in wrong.items() if names]
    if said:
        raise ValueError(f"the weights in {path} do not fit this network: " + ", ".join(said))


def load_weights(model, state, path, assign=False):
    """state_dict -> model, strictly. With assign the network, built on the meta device, takes the tensors themselves,
    so that a memory-mapped file is the one copy there is. ValueError that lists what does not fit."""
    check_weights(model, state, path)
    own = model.state_dict()
    model.load_state_dict({name: state[name].to(own[name].dtype) for name in own}, assign=assign)


def weights_hash(*modules):
    """The first 16 digits of the SHA-256 of all that their state_dicts hold, as fp32."""
    digest = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def file_hash(path):
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return hashlib.sha256(mapped).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Pixels to latents and back: Stable Diffusion's KL-f8 autoencoder (Rombach et al. 2022), with the names of its
# published weights

class VAE(nn.Module):
    """(B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8) of about unit variance: 83.65M parameters.
    channels: the width at each resolution, finest first. Runs in fp32 or bf16 (fp16 overflows)."""
    scale = 0.18215                   # latent = scale * sample of the posterior; nothing else knows of it

    def __init__(self, channels=(128, 256, 512, 512), latent_channels=4):
        super().__init__()
        self.factor = 2 ** (len(channels) - 1)                             # pixels on a side of a latent
        self.encoder = Encoder(channels, 2 * latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(channels, latent_channels)

    def posterior(self, x):
        """Pictures (B, 3, H, W) -> mean and log-variance (B, 4, H/8, W/8) of the encoder's Gaussian, not scaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def fingerprint(self):
        """16 digits that tell which latents it makes: of its encoder, not its decoder, nor of the file it came in."""
        return weights_hash(self.encoder, self.quant_conv)

    @classmethod
    def latent(cls, mean, logvar, noise=0.0):
        """A sample of the posterior, by unit noise; without, its mode. Scaled."""
        return cls.scale * (mean + (0.5 * logvar).exp() * noise)

    @torch.no_grad()
    def decode(self, z):
        """Latents (B, 4, h, w), scaled -> pictures (B, 3, 8h, 8w) fp32, about [-1, 1]. One at a time, for memory."""
        return torch.cat([self.decoder(self.post_quant_conv(one)).float() for one in (z / self.scale).split(1)])


class Encoder(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(before, width, 2, "downsamplers" if k < len(channels) - 1 else None)
            for k, (before, width) in enumerate(zip((channels[0], *channels), channels)))
        self.mid_block = Middle(channels[-1])
        self.conv_norm_out, self.conv_out = vae_norm(channels[-1]), nn.Conv2d(channels[-1], out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, channels, latent_channels):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0])
        self.up_blocks = nn.ModuleList(
            Level(before, width, 3, "upsamplers" if k < len(channels) - 1 else None)
            for k, (before, width) in enumerate(zip((channels[0], *channels), channels)))
        self.conv_norm_out, self.conv_out = vae_norm(channels[-1]), nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Level(nn.Module):
    """ResBlocks at one resolution, then the way to the next. resample: "downsamplers", "upsamplers" or None."""

    def __init__(self, before, width, blocks, resample):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResBlock(before if k == 0 else width, width) for k in range(blocks))
        self.resample = resample
        if resample:
            self.add_module(resample, nn.ModuleList([Resample(width, down=resample == "downsamplers")]))

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        return getattr(self, self.resample)[0](x) if self.resample else x


class Resample(nn.Module):
    """Half the resolution, with zeros added to the right and below alone, or twice the resolution."""

    def __init__(self, width, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Middle(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResBlock(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEResBlock(nn.Module):
    """x + Conv(Swish(GN(Conv(Swish(GN(x)))))), a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, before, width):
        super().__init__()
        self.norm1, self.conv1 = vae_norm(before), nn.Conv2d(before, width, 3, padding=1)
        self.norm2, self.conv2 = vae_norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else None

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class VAEAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = vae_norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)             # (B, H*W, width)
        q, k, v = (f(tokens)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + tokens.transpose(1, 2).reshape(x.shape)


def vae_norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


def load_vae(path, device="cpu"):
    """sd-vae-ft-ema or -mse, as .safetensors or .bin, with today's names in the attention or the older ones -> VAE in
    eval mode, as wide and deep as the file says. ValueError if the file is something else."""
    state, _ = weights_in(read_file(path), path)
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {".".join(older.get(part, part) for part in name.split(".")): value for name, value in state.items()}
    names = (f"encoder.down_blocks.{k}.resnets.0.conv1.weight" for k in itertools.count())
    widths = [state[name] for name in itertools.takewhile(state.__contains__, names)]
    channels = tuple(weight.shape[0] if weight.dim() == 4 else 0 for weight in widths)
    if not channels or any(width % 32 or not width for width in channels):
        raise ValueError(f"{path} is no VAE of Stable Diffusion; expected sd-vae-ft-ema or sd-vae-ft-mse")
    with torch.device("meta"):
        vae = VAE(channels)
    load_weights(vae, state, path, assign=True)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Data sets

def around(n, radius=1.0, phase=0.0):
    """n points evenly on a circle, the first at the top, y down: (n, 2)."""
    angle = 2 * np.pi * np.arange(n) / n + phase
    return radius * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def outlines():
    """The ten shapes in the unit circle: name -> polygons to draw in turn, each (points (K, 2), 1 to fill or 0 to cut
    out)."""
    u = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    heart = np.stack([16 * np.sin(u) ** 3,
                      -13 * np.cos(u) + 5 * np.cos(2 * u) + 2 * np.cos(3 * u) + np.cos(4 * u)], axis=1)
    star = np.stack([around(5), around(5, 0.42, np.pi / 5)], axis=1).reshape(10, 2)
    upright = np.array([(-0.33, -0.95), (0.33, -0.95), (0.33, 0.95), (-0.33, 0.95)])
    bar = np.array([(-0.9, -0.17), (0.9, -0.17), (0.9, 0.17), (-0.9, 0.17)])
    return {
        "circle":   [(around(48, 0.9), 1)],
        "square":   [(around(4, 1.1, np.pi / 4), 1)],
        "triangle": [(around(3), 1)],
        "star":     [(star, 1)],
        "cross":    [(upright, 1), (upright[:, ::-1], 1)],
        "ring":     [(around(48), 1), (around(48, 0.55), 0)],
        "diamond":  [(around(4) * (0.6, 1.0), 1)],
        "heart":    [(heart / 17, 1)],
        "moon":     [(around(48), 1), (around(48, 0.85) + (0.5, -0.1), 0)],
        "bars":     [(bar + (0, y), 1) for y in (-0.65, 0, 0.65)],
    }


class Pictures:
    """A data set that has read(i), and gives a network its pixels."""

    def example(self, i, mirrored, rng):
        """-> (3, size, size) uint8, mirrored or not. rng is for data sets with chance in them."""
        image = self.read(i)
        return torch.from_numpy((image[:, ::-1] if mirrored else image).transpose(2, 0, 1).copy())


class Shapes(Pictures):
    """The built-in set: one bright shape of ten on a dark ground. Image i follows from (seed, i) alone and has class
    i % 10; size, place, tilt and colour are random. Drawn four times too large and averaged down for smooth edges."""
    outlines = outlines()
    class_names = list(outlines)

    def __init__(self, size=32, n=50_000, seed=0):
        self.size, self.n, self.seed = size, n, seed
        self.labels = np.arange(n) % len(self.class_names)

    def __len__(self):
        return self.n

    def name(self, i):
        return f"shape {i}"

    def read(self, i):
        rng = np.random.default_rng([self.seed, i])
        radius, tilt, hue, saturation, value, right, down = rng.uniform(
            [0.36, -0.2, 0, 0.75, 0.85, 0, 0], [0.45, 0.2, 1, 1, 1, 1, 1])
        ground = rng.uniform(0.2, 0.32, 3)
        turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        centre = radius + 0.02 + (0.96 - 2 * radius) * np.array([right, down])
        mask = Image.new("L", (4 * self.size, 4 * self.size))
        pen = ImageDraw.Draw(mask)
        for points, fill in self.outlines[self.class_names[self.labels[i]]]:
            pen.polygon(((points @ turn * radius + centre) * 4 * self.size).ravel().tolist(), fill=255 * fill)
        alpha = np.asarray(mask.reduce(4), dtype=np.float32)[:, :, None] / 255
        colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        return np.round(255 * (ground + alpha * (colour - ground))).astype(np.uint8)


class Files(Pictures):
    """Pictures in a folder or in a .zip, read when asked for, cropped and resized to size.

    Classes: what dataset.json says ({"labels": [["path", class], ...]}, as in EDM), else the first level of
    sub-folders in alphabetical order (inside the one folder that holds everything, if there is one); pictures
    that lie in no sub-folder have none.
    Without a size, all must be squares as large as the first.
    ValueError if there are no pictures, or if the labels cannot be understood."""

    def __init__(self, path, size=None):
        self.path, self.size, self.crops, self.archive, self.pid = Path(path), size, size is not None, None, None
        if self.path.is_dir():
            found = (Path(top, name).relative_to(self.path).as_posix()
                     for top, _, names in os.walk(self.path, followlinks=True) for name in names)
        else:
            found = self.zip().namelist()
        hidden = (".", "__MACOSX")
        found = {n for n in found if not any(part.startswith(hidden) for part in n.split("/"))}
        self.names = sorted(n for n in found if Path(n).suffix.lower() in EXTENSIONS)
        if not self.names:
            raise ValueError(f"{path} holds no images ({' '.join(sorted(EXTENSIONS))}); --data takes {KINDS}")
        self.labels, self.class_names = self.find_labels("dataset.json" in found)
        if size is None:
            self.size = self.common_size()

    def common_size(self):
        """Of the first picture that can be read; the others are held to it."""
        for name in self.names[:allowed(len(self.names)) + 1]:
            size = None
            with contextlib.suppress(Exception), self.open(name) as file:  # who reads them all will name it
                size = decode(file).size
            if size:
                return square(*size, f"{name} in {self.path}")
        raise ValueError(f"the first images in {self.path} cannot be read, {self.names[0]} and others")

    def find_labels(self, described):
        if described:
            try:
                with self.open("dataset.json") as file:
                    labels = json.load(file)["labels"]
                if labels is None:
                    return None, []
                labels = {name: label for name, label in labels}
                chosen = [labels[name] for name in self.names]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"dataset.json in {self.path} does not give every image a label ({error!r}); "
                                 'expected {"labels": [["path", class], ...]}') from None
            if not all(type(label) is int and label >= 0 for label in chosen):
                raise ValueError(f"dataset.json in {self.path} has a label that is not a class number 0, 1, 2, ...")
            return np.array(chosen), []
        folders = [n.split("/")[:-1] for n in self.names]
        while all(len(f) > 1 and f[0] == folders[0][0] for f in folders):  # as when a whole folder was zipped
            folders = [f[1:] for f in folders]
        folders = [f[0] if f else None for f in folders]
        classes = sorted({f for f in folders if f is not None})
        if not classes:
            return None, []
        if None in folders:
            raise ValueError(f"{self.path} has images both beside and inside sub-folders, so their classes are "
                             f"unclear; put all of them in sub-folders, or none")
        return np.array([classes.index(f) for f in folders]), classes

    def zip(self):
        if self.archive is None or self.pid != os.getpid():                # a handle must not cross a fork
            self.archive, self.pid = zipfile.ZipFile(self.path), os.getpid()
        return self.archive

    def open(self, name):
        if self.path.is_dir():
            return open(self.path / name, "rb")
        return io.BytesIO(self.zip().read(name))

    def __getstate__(self):
        return {**self.__dict__, "archive": None}

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]

    def read(self, i):
        with self.open(self.names[i]) as file:
            image = decode(file)
        if not self.crops and image.size != (self.size, self.size):
            raise ValueError(f"{image.width} x {image.height} pixels, and the first one has {self.size} x {self.size}; "
                             f"pass --size to crop and resize all")
        return center_crop(image, self.size)


def square(width, height, what):
    if width != height:
        raise ValueError(f"{what} has {width} x {height} pixels and is not square; pass --size to crop and resize all")
    return width


class Arrays(Pictures):
    """Pictures in one array: images (n, H, W, 3) uint8, labels (n,) or None. Without a size, they must be squares."""

    def __init__(self, images, labels, size=None, class_names=()):
        self.images, self.labels, self.class_names = images, labels, list(class_names)
        self.size = size or square(images.shape[2], images.shape[1], "each of these images")

    def __getstate__(self):
        """Of an array in a file, where it is: a worker maps it itself."""
        a = self.images
        if not isinstance(a, np.memmap):
            return self.__dict__
        order = "C" if a.flags.c_contiguous else "F"
        return {**self.__dict__, "images": None, "mapped": (a.filename, a.dtype, "r", a.offset, a.shape, order)}

    def __setstate__(self, state):
        mapped = state.pop("mapped", None)
        self.__dict__.update(state)
        if mapped:
            self.images = np.memmap(*mapped)

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return f"image {i}"

    def read(self, i):
        image = np.asarray(self.images[i])
        if image.shape[0] == image.shape[1] == self.size:
            return image
        return center_crop(Image.fromarray(image), self.size)


def read_npz(path, size=None):
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("an .npz is a zip archive, and this is none")
    with np.load(path, allow_pickle=False) as file:
        if "arr_0" not in file:
            raise ValueError(f"{path} has no array arr_0 (found: {', '.join(file.files[:10]) or 'nothing'})")
        try:
            images = mapped_array(path, "arr_0.npy")
            images = file["arr_0"] if images is None else images
            labels = file["arr_1"] if "arr_1" in file else None
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({reason(error)}); fetch or make it again") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"arr_0 in {path} is {images.dtype} {images.shape}, not uint8 (n, height, width, 3)")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise ValueError(f"arr_1 in {path} is {labels.dtype} {labels.shape}, not one class number 0, 1, ... for each "
                         f"of the {len(images)} images")
    return Arrays(images, None if labels is None else labels.astype(np.int64), size)


def mapped_array(path, name):
    """An array of an .npz, memory-mapped; None if it is compressed (np.savez does not), damaged, or no plain array."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entry = archive.getinfo(name)
        file.seek(entry.header_offset + 26)                                # 30 bytes; the last four are the lengths of
        lengths = np.frombuffer(file.read(4), "<u2")                       # the name and the extra field that follow
        file.seek(int(lengths.sum()), os.SEEK_CUR)
        if entry.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(file) != (1, 0):
            return None
        begins = file.tell() - 6 - 2                                       # before the magic string and the version
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject or file.tell() - begins + math.prod(shape) * dtype.itemsize != entry.file_size:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def read_cifar(path, size):
    """The training images of cifar-10-binary.tar.gz, or cifar-100-binary.tar.gz with its fine labels. A record is
    1 or 2 label bytes, then 3 x 32 x 32 pixels."""
    with tarfile.open(path) as tar:
        files = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
        batches = sorted(n for n in files if n.startswith("data_batch_") and n.endswith(".bin"))
        header, titles = (1, "batches.meta.txt") if batches else (2, "fine_label_names.txt")
        batches = batches or ["train.bin"]
        if batches[0] not in files:
            raise ValueError(f"{path} holds neither data_batch_1.bin (CIFAR-10) nor train.bin (CIFAR-100); "
                             f"take the binary version of the archive")
        raw = b"".join(tar.extractfile(files[n]).read() for n in batches)
        names = tar.extractfile(files[titles]).read().decode().split() if titles in files else []
    if not raw or len(raw) % (header + 3072):
        raise ValueError(f"{path}: {len(raw)} bytes are no whole number of {header + 3072}-byte CIFAR records")
    records = np.frombuffer(raw, np.uint8).reshape(-1, header + 3072)
    images = np.ascontiguousarray(records[:, header:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    labels = records[:, header - 1].astype(np.int64)
    return Arrays(images, labels, size, names)


class Latents:
    """What `python data.py latents` wrote: mean and log-variance of the VAE's posterior for each picture and its
    mirror image. An example is a fresh sample of it, (4, size, size) fp32, scaled. Nothing is read before it is asked
    for. ValueError if it was made with another scale, or for another size."""

    def __init__(self, path, size):
        self.path, self.moments, self.class_names = str(path), None, []
        self.layout, self.header = safetensors_layout(path)
        if self.header.get("format") != LATENTS:
            raise ValueError(f"{path} holds no latents; --data takes {KINDS}")
        if float(self.header["scale"]) != VAE.scale:
            raise ValueError(f"{path} was made for latents scaled by {self.header['scale']}, and here they are scaled "
                             f"by {VAE.scale}; make it again")
        self.channels, grid = self.layout["moments"][1][3:5]
        if size and grid != size:
            raise ValueError(f"{path} holds latents of {grid} x {grid} (of images of {self.header['size']} pixels), "
                             f"and this network takes {size} x {size}; choose another preset, or make them with "
                             f"another --size")
        self.size = grid
        self.kept = np.flatnonzero(self.open("state", np.uint8) == DONE)   # without the unreadable
        labels = np.array(self.open("labels", np.int64))[self.kept]
        self.labels = None if (labels < 0).any() else labels

    def open(self, name, dtype):
        _, shape, at = self.layout[name]
        return np.memmap(self.path, dtype, "r", at, tuple(shape))

    def __getstate__(self):
        return {**self.__dict__, "moments": None}                          # a worker maps the file itself

    def __len__(self):
        return len(self.kept)

    def name(self, i):
        return f"latent {self.kept[i]}"

    def example(self, i, mirrored, rng):
        if self.moments is None:
            self.moments = self.open("moments", np.float16)
        mean, logvar = torch.from_numpy(self.moments[self.kept[i], int(mirrored)].astype(np.float32))
        return VAE.latent(mean, logvar, torch.from_numpy(rng.standard_normal(mean.shape, np.float32)))


def open_dataset(path, size=None):
    """What --data names -> a data set of size x size images, or latents; without a size, of images that are all as
    large as the first, and square. ValueError, in one sentence, if it is missing, empty, damaged or of another kind."""
    path, low = str(path), str(path).lower()
    if path == "shapes":
        return Shapes(size or 32)
    if not os.path.exists(path):
        raise ValueError(f"there is no data at {path!r}; --data takes {KINDS}")
    readers = {".zip": Files, ".npz": read_npz, ".tar.gz": read_cifar, ".tgz": read_cifar, ".tar": read_cifar,
               ".safetensors": Latents}
    reader = Files if os.path.isdir(path) else next((r for end, r in readers.items() if low.endswith(end)), None)
    if reader is None:
        raise ValueError(f"cannot tell what {path!r} holds; --data takes {KINDS}")
    try:
        return reader(path, size)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or incomplete; fetch or make it "
                         f"again") from None


# ---------------------------------------------------------------------------------------------
# The order of training

class Stream(torch.utils.data.Dataset):
    """A data set in training order: place 0, 1, 2, ... without end -> example, label, unreadable.

    Each run of n places is one shuffle of the n images. What comes at a place, whether it is mirrored, and the noise of
    a latent depend on (seed, place) alone: there is nothing to save for a resume, and neither the number of
    processes nor of workers changes it. An unreadable image gives way to the next one of the shuffle;
    `unreadable` lists (name, reason) of those passed over."""

    def __init__(self, dataset, seed=0, xflip=False):
        self.dataset, self.seed, self.xflip, self.epoch, self.order = dataset, seed, xflip, None, None

    def __getitem__(self, place):
        n = len(self.dataset)
        epoch, k = divmod(place, n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(n)
        mirrored = self.xflip and np.random.default_rng([self.seed, 1, place]).random() < 0.5
        rng, unreadable = np.random.default_rng([self.seed, 2, place]), []
        while True:
            i = self.order[(k + len(unreadable)) % n]
            try:
                x = self.dataset.example(i, mirrored, rng)
                break
            except Exception as error:
                unreadable.append((self.dataset.name(i), reason(error)))
            if len(unreadable) > allowed(n):                               # the list alone is enough to stop the run
                x = torch.zeros(3, self.dataset.size, self.dataset.size, dtype=torch.uint8)
                break
        label = -1 if self.dataset.labels is None else int(self.dataset.labels[i])
        return x, label, unreadable


def collate(items):
    images, labels, unreadable = zip(*items)
    return torch.stack(images), torch.tensor(labels), sum(unreadable, [])


def outlive_the_signal(_):
    """In a worker: Ctrl-C, and the SIGTERM that a cluster sends to every process, are the main process's to handle,
    which needs this worker until its step is done. A second SIGTERM ends it, as torch may wish to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over `batches`, an iterable of lists of places -> examples (b, C, H, W), labels (b,), unreadable."""
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                                       worker_init_fn=outlive_the_signal, pin_memory=pin_memory,
                                       prefetch_factor=4 if workers else None)


def reason(error):
    """What went wrong with an image, in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def allowed(n):
    """How many of n images may be unreadable: 1 %, and one is always forgiven."""
    return max(1, n // 100)


class Unreadable:
    """Names and counts the images that could not be read. ValueError, with the list, past what is allowed."""

    def __init__(self, dataset, speaks=True):
        self.found, self.total, self.speaks = {}, len(dataset), speaks

    def add(self, unreadable):
        for name, why in unreadable:
            if name not in self.found:
                self.found[name] = why
                if self.speaks:
                    print(f"skipped {name}: {why}", file=sys.stderr, flush=True)
        if len(self.found) > allowed(self.total):
            raise ValueError(f"{len(self.found)} of {self.total} images cannot be read, more than 1 %; mend or "
                             f"remove them: " + ", ".join(self.found))


# ---------------------------------------------------------------------------------------------
# Augmentation for small data sets (EDM, App. F.2): by whole batches, where they are

# The sym6 wavelet's low-pass filter. It is orthogonal to itself shifted by 2, so that what is brought to twice the
# resolution and back, without a change between, is what it was.
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)
SYM6_MIDDLE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)       # of its taps, 5.10


def augment(x, p):
    """EDM's pipeline: a flip left to right for half of the images, and with probability p each a flip upside down, a
    change of size 2^(0.2 n), a turn by any angle, a stretch of 2^(0.2 n) along one axis (any, half of the time) and as
    much a squeeze across it, a shift of 0.125 n of the size. x (B, C, S, S) -> the same, and what was done, (B, 9):
    flips, n of the size, cos - 1 and sin of the turn, n of the stretch times cos and sin of its axis, n of the
    shift."""
    B, dtype, device = len(x), x.dtype, x.device

    def draw(values, probability=p):
        chosen = torch.rand(B, device=device) < probability
        return torch.where(chosen.view(-1, *[1] * (values.dim() - 1)), values, 0)

    def normal(*shape):
        return torch.randn(B, *shape, device=device, dtype=dtype)

    def angle():
        return (torch.rand(B, device=device, dtype=dtype) * 2 - 1) * math.pi

    flips = [draw(torch.randint(2, (B,), device=device), p * scale) for scale in (1e8, 1)]
    size, turn, stretch, shift = draw(normal()), draw(angle()), draw(normal()), draw(normal(2))
    axis = draw(angle(), 0.5)
    axis, along = torch.where(stretch == 0, 0, axis), 2 ** (0.2 * stretch)  # exactly the identity where nothing is done
    matrix = rotation(turn) @ rotation(-axis) @ torch.diag_embed(torch.stack([1 / along, along], 1)) @ rotation(axis)
    x = transform(x, *flips, matrix / (2 ** (0.2 * size)).view(-1, 1, 1), 0.125 * x.shape[-1] * shift)
    return x, torch.stack([*flips, size, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(),
                           *shift.unbind(1)], 1).to(dtype)


def rotation(angle):
    """(B,) -> (B, 2, 2)"""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)


def transform(x, flip_x, flip_y, matrix, shift):
    """Mirror (B,) where told; then what comes to v (in pixels from the middle, x before y) is what was at matrix (B, 2,
    2) times v - shift (B, 2). x (B, C, S, S), reflected at its borders; sampled at twice the resolution."""
    x = torch.where(flip_x.bool().view(-1, 1, 1, 1), x.flip(3), x)
    x = torch.where(flip_y.bool().view(-1, 1, 1, 1), x.flip(2), x)
    B, C, S = x.shape[:3]
    if not shift.any() and torch.equal(matrix, torch.eye(2).to(matrix).expand_as(matrix)):
        return x
    taps = len(SYM6)
    side = 2 * S + taps - 2                                                # samples that the way down again needs
    middle = (taps - 1) / 2 - SYM6_MIDDLE                                  # the filter moves what passes it
    v = torch.arange(side, dtype=x.dtype, device=x.device) - (side - 1) / 2 + middle
    v = torch.stack(torch.meshgrid(v, v, indexing="xy"), -1).view(1, -1, 2)  # (1, side^2, 2)
    u = (v - 2 * shift[:, None]) @ matrix.mT                               # where each is taken from
    margin = math.ceil((u.abs().max().item() - (side - 1) / 2) / 2) + (taps - 2) // 2  # as far as the filter reaches
    margin = min(max(margin, 0), S - 1)
    x = F.pad(x, [margin] * 4, mode="reflect")
    kernel = torch.tensor(SYM6, dtype=x.dtype, device=x.device).expand(C, 1, 1, taps)
    x = F.conv_transpose2d(x, kernel, stride=(1, 2), groups=C)             # twice the width, then twice the height
    x = F.conv_transpose2d(x, kernel.mT, stride=(2, 1), groups=C)
    u = 2 * (u - middle) / x.shape[-1]                                     # as grid_sample counts, -1 to 1
    x = F.grid_sample(x, u.view(B, side, side, 2), mode="bilinear", align_corners=False)
    return F.conv2d(F.conv2d(x, kernel, stride=(1, 2), groups=C), kernel.mT, stride=(2, 1), groups=C)


# ---------------------------------------------------------------------------------------------
# Tensors to pictures

def to_network(x):
    """A batch of examples as networks take them: pixels (B, 3, H, W) uint8 -> [-1, 1]; latents stay as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 numpy."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images):
    """(B, H, W, 3) uint8 numpy -> (B, 3, H, W) in [-1, 1]."""
    return to_network(torch.from_numpy(images).permute(0, 3, 1, 2))


def grid(images, columns=None):
    """uint8 (n, H, W, 3) -> one PIL image, row by row; images under 64 pixels are enlarged."""
    n, height, width, _ = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows, zoom, gap = math.ceil(n / columns), max(1, 64 // width), 2
    sheet = np.full((rows * (zoom * height + gap) + gap, columns * (zoom * width + gap) + gap, 3), 255, np.uint8)
    for k, image in enumerate(images):
        top = gap + k // columns * (zoom * height + gap)
        left = gap + k % columns * (zoom * width + gap)
        sheet[top:top + zoom * height, left:left + zoom * width] = image.repeat(zoom, 0).repeat(zoom, 1)
    return Image.fromarray(sheet)


def save_grid(images, path, columns=None):
    save_image(grid(images, columns), path)


def save_film(frames, path, columns=None):
    """A list of uint8 (n, H, W, 3) -> an animated .gif of their grids, three seconds long, then two on the last."""
    first, *rest = [grid(images, columns) for images in frames]
    shown = [max(20, 3000 // len(frames))] * len(rest) + [2000]            # milliseconds
    save_image(first, path, save_all=True, append_images=rest, duration=shown, loop=0)


def save_image(image, path, **options):
    with written_whole(path) as temporary:
        image.save(temporary, format=Image.registered_extensions().get(Path(path).suffix.lower(), "PNG"), **options)


@contextlib.contextmanager
def written_whole(path):
    """A temporary name beside path to write to. It is renamed to path at the end, and removed if anything fails:
    path holds all of the new content, or what it held before."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def live_line(text):
    """Progress: on a terminal over the line that stands there, elsewhere a line a minute."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="", file=sys.stderr, flush=True)
    elif text.strip() and time.time() - live_line.said > 60:
        live_line.said = time.time()
        print(text, file=sys.stderr, flush=True)


live_line.said = time.time()


# ---------------------------------------------------------------------------------------------
# python data.py prepare SRC DEST.zip --size 64

def prepare(source, dest, size, workers=2):
    """Crop, resize and pack any pictures that training reads into an uncompressed .zip of PNGs with a dataset.json. The
    file appears when it is complete; one that exists is left alone (ValueError)."""
    dest = Path(dest)
    check_dest(dest, ".zip")
    if dest.exists():
        raise ValueError(f"{dest} exists; remove it or choose another name")
    dataset = open_pictures(source, size)
    labels, unreadable = [], Unreadable(dataset)
    with written_whole(dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out:
        for indices, images, bad in Reader.batches(dataset, range(len(dataset)), 64, workers, as_png):
            unreadable.add([why for _, *why in bad])
            for i, png in zip(indices, images):
                name = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                out.writestr(name, png)
                labels.append([name, None if dataset.labels is None else int(dataset.labels[i])])
            live_line(f"{len(labels)} of {len(dataset)} images")
        known = labels if dataset.labels is not None else None
        out.writestr("dataset.json", json.dumps({"labels": known}))
    classes = 0 if dataset.labels is None else int(dataset.labels.max()) + 1
    live_line("\n")
    print(f"{dest}: {len(labels)} images of {size} x {size}, {classes} classes, "
          f"{len(unreadable.found)} unreadable images left out", file=sys.stderr)


def as_png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def check_dest(dest, ending):
    if dest.suffix != ending:
        raise ValueError(f"{dest} does not end in {ending}, which is what is written there")
    if not dest.parent.is_dir():
        raise ValueError(f"the folder {dest.parent} for {dest.name} does not exist; make it first")


def open_pictures(source, size=None):
    if str(source).endswith(".safetensors"):
        raise ValueError(f"{source} holds latents or weights, and this command takes pictures")
    return open_dataset(source, size)


class Reader(torch.utils.data.Dataset):
    """Place i of a data set -> (i, form(picture), None), or (i, name, reason) where it cannot be read."""

    def __init__(self, dataset, form):
        self.dataset, self.form = dataset, form

    def __getitem__(self, i):
        try:
            return i, self.form(self.dataset.read(i)), None
        except Exception as error:
            return i, self.dataset.name(i), reason(error)

    @staticmethod
    def collate(items):
        good = [(i, image) for i, image, why in items if why is None]
        return [i for i, _ in good], [image for _, image in good], [item for item in items if item[2] is not None]

    @classmethod
    def batches(cls, dataset, indices, batch, workers, form=np.asarray):
        """-> indices, pictures, [(index, name, reason)] of those that cannot be read, `batch` places at a time."""
        places = [indices[k:k + batch] for k in range(0, len(indices), batch)]
        return torch.utils.data.DataLoader(cls(dataset, form), batch_sampler=places, num_workers=workers,
                                           collate_fn=cls.collate, worker_init_fn=outlive_the_signal)


# ---------------------------------------------------------------------------------------------
# python data.py latents SRC DEST.safetensors --vae FILE --size 256, or on several GPUs torchrun data.py latents ...

LATENTS = "diffit latents 1"
DONE, UNREADABLE = 1, 2               # states of a place; 0: to do


def cache_latents(source, dest, vae_path, size, batch=8, workers=2, bf16=False):
    """The posterior of each picture and of its mirror image, as `Latents` reads it: fp16, of which a posterior's own
    spread hides the rounding. The same command again goes on where it was stopped.

    All processes (of one machine) write to one file, DEST.partial, each its own places, and say nothing to each other:
    a place is done when its state is set, and the one that finds nothing left to do gives the file its name."""
    rank, ranks, local_rank, local_ranks = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))))
    if ranks != local_ranks:
        raise ValueError(f"{ranks} processes on several machines cannot write to one file; start them on one")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(f"there are {torch.cuda.device_count()} GPUs here, and this is process {local_rank + 1}; "
                         f"start no more processes than GPUs")
    torch.backends.cudnn.allow_tf32 = False                                # fp32 means fp32
    dest = Path(dest)
    check_dest(dest, ".safetensors")
    vae = load_vae(vae_path, device)
    if size % vae.factor:
        raise ValueError(f"--size {size} is no multiple of {vae.factor}, the side of a latent in pixels")
    dataset = open_pictures(source, size)
    n, grid, channels = len(dataset), size // vae.factor, vae.post_quant_conv.in_channels
    names = hashlib.sha256(repr([os.path.getsize(source) if os.path.isfile(source) else 0,
                                 *map(dataset.name, range(n))]).encode()).hexdigest()[:16]
    header, starts = safetensors_header(
        {"moments": ("F16", (n, 2, 2, channels, grid, grid)),              # (plain or mirrored, mean or log-variance)
         "labels": ("I64", (n,)), "state": ("U8", (n,))},
        {"format": LATENTS, "vae": vae.fingerprint(), "scale": str(VAE.scale), "size": str(size), "names": names})
    partial = dest.with_name(dest.name + ".partial")
    for path in (dest, partial):
        if path.exists() and not same_start(path, header):
            raise ValueError(f"{path} is not of these {n} pictures, this --vae and --size {size}; remove it, or choose "
                             f"another name")
    if dest.exists():
        print(f"{dest} is complete", file=sys.stderr)
        return
    if rank == 0 and not partial.exists():
        begin_file(partial, header, {starts["labels"]: np.full(n, -1) if dataset.labels is None else dataset.labels},
                   starts["state"] + n)
    while not (partial.exists() or dest.exists()):
        time.sleep(0.2)                                                    # rank 0 is about to
    if dest.exists():                                                      # the others needed no help
        return
    moments = np.memmap(partial, np.float16, "r+", starts["moments"], (n, 2, 2, channels, grid, grid))
    state = np.memmap(partial, np.uint8, "r+", starts["state"], (n,))
    chunks = [range(k, min(k + 64, n)) for k in range(0, n, 64)][rank::ranks]
    mine = [i for chunk in chunks for i in chunk if state[i] != DONE]
    state[mine] = 0                                                        # what was unreadable may have been mended
    unreadable, start, before = Unreadable(dataset), time.time(), int((state == DONE).sum())
    fresh, saved = [], time.time()
    for indices, images, bad in Reader.batches(dataset, mine, batch, workers):
        if indices:
            x = to_float(np.stack(images)).to(device)
            for mirrored, view in enumerate((x, x.flip(3))):
                with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                    moments[indices, mirrored] = torch.stack(vae.posterior(view), dim=1).cpu().numpy()
        state[[i for i, _, _ in bad]] = UNREADABLE
        unreadable.add([why for _, *why in bad])
        fresh += indices
        if time.time() - saved > 5 or fresh[-1:] == mine[-1:]:
            moments.flush()                                                # to the disk, before it counts as done
            state[fresh], fresh, saved = DONE, [], time.time()
            if rank == 0:
                done = int((state == DONE).sum())
                live_line(f"{done} of {n} images, {(done - before) / (time.time() - start):.1f} images/s")
    moments.flush()
    state[fresh] = DONE
    state.flush()
    if not state.all():
        return                                                             # other processes have places to do
    lost = Unreadable(dataset, speaks=False)
    lost.add((dataset.name(i), "") for i in np.flatnonzero(state == UNREADABLE))  # of all processes
    with contextlib.suppress(FileNotFoundError):                           # another process was faster
        os.replace(partial, dest)
        live_line("\n")
        print(f"{dest}: latents of {int((state == DONE).sum())} images of {size} x {size}, "
              f"{len(lost.found)} unreadable images left out", file=sys.stderr)


def same_start(path, header):
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def begin_file(path, header, parts, size):
    """A file of this size: a header, arrays at their places, zeros."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for at, array in parts.items():
            file.seek(at)
            file.write(array.tobytes())
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):                                 # a full disk says so here, and not later
            os.posix_fallocate(file.fileno(), 0, size)


def main():
    parser = argparse.ArgumentParser(description="Prepare data for training.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare|latents")
    for name, dest, text in [("prepare", "DEST.zip", "crop, resize and pack images into a zip"),
                             ("latents", "DEST.safetensors", "encode images for the training of latent networks")]:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.error = lambda message: parser.exit(2, f"data.py: {message}\n")
        command.add_argument("source", metavar="SRC", help=KINDS)
        command.add_argument("dest", metavar=dest)
        command.add_argument("--size", type=int, required=True, help="height and width in pixels")
        command.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    command.add_argument("--vae", metavar="FILE", required=True, help="sd-vae-ft-ema or -mse, .safetensors or .bin")
    command.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    command.add_argument("--bf16", action="store_true", help="encode in bf16 instead of fp32")
    parser.error = command.error
    args = parser.parse_args()
    try:
        if args.size < 1:
            raise ValueError(f"--size {args.size} is no size; give a number of pixels from 1")
        if args.command == "prepare":
            prepare(args.source, args.dest, args.size, args.workers)
        else:
            if args.batch < 1:
                raise ValueError(f"--batch {args.batch}: give a number from 1")
            cache_latents(args.source, args.dest, args.vae, args.size, args.batch, args.workers, args.bf16)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error(f"out of GPU memory; pass a --batch below {args.batch}")
    except KeyboardInterrupt:
        parser.exit(130, "\ndata.py: stopped; the same command goes on\n" if args.command == "latents" else
                    "\ndata.py: stopped\n")


if __name__ == "__main__":
    main()
