"""Files to tensors and back: images, weights, data sets, latents; `python data.py prepare|latents`.

A data set has len(), name(i), labels ((n,) int64 or None), class_names, tokens ((n, M, E) floats
that describe each image, or None), and example(i, mirrored, rng) -> the tensor that a network is
trained on. Data sets of images are an `ImageDataset`, which needs only read(i): the built-in
`Shapes` and `ShapeKinds`, `ImageFiles` (a folder or a .zip), `ImageArray` (an .npz, the CIFAR
archives), or your own. `Latents` holds the `VAE`'s output for such a data set. `open_dataset` finds
out which of them a path is, and `OfClasses` is the part of one that shows some classes.

`ShuffledStream` puts a data set in the endless order of training, with sets of one class if asked
for; `IndexedImages` reads its images by index. Both skip images that cannot be read, and
`UnreadableImages` counts these.
"""

import argparse
import bisect
import collections
import colorsys
import contextlib
import errno
import functools
import gc
import gzip
import hashlib
import io
import itertools
import json
import math
import mmap
import operator
import os
import pickle
import posixpath
import tarfile
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from configs import (
    UNSEEN,
    Parser,
    UserError,
    add_device,
    at_least,
    atomic_write,
    autocast,
    default_device,
    exclusive,
    first_line,
    is_out_of_memory,
    live_line,
    lockstep,
    on_rank_0,
    rank_and_size,
    run_command,
    say,
    short,
    start_worker,
    to_device,
    worker_count,
    write_text,
)

# The formats that are read, whatever a file's name says. (Pillow knows many more, and starts
# Ghostscript for one of them.)
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"]
Image.init()  # fills the table of suffixes
EXTENSIONS = sorted(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)
# Pillow itself refuses images above 179 million pixels, and warns of those with half as many.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
IMAGE_KINDS = (
    "'shapes', 'shapes-set', 'outlines-set', a folder of images (sub-folders are classes), a .zip "
    "of images, an .npz or a CIFAR-10/100 binary archive"
)
KINDS = f"{IMAGE_KINDS}, or a folder of latents made by data.py latents"


@contextlib.contextmanager
def parsing(path, kind, error_class=UserError):
    """Around the calls of a library that takes a file apart, and around nothing else. For a damaged
    file libraries raise what they like (numpy, zipfile, tarfile, Pillow and torch some thirty
    types): here it becomes the sentence "PATH is damaged or not KIND (...)". What the system says
    of a file that is missing or closed to us stays what it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries' own OSErrors have no number; a place before the beginning has one.
        system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if system or is_out_of_memory(error):
            raise
        why = first_line(error).split(" <_io")[0]  # without the address of a file object
        raise error_class(f"{path} is damaged or not {kind} ({why})") from error


def parse_json(text):
    """The value of a text from anywhere; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# -------------------------------------------------------------------------------------------------
# One image


class UnreadableImage(UserError):
    """One image of a data set cannot be read. Code that reads many images skips it."""


def decode(file, size=None):
    """An opened image file -> PIL image, RGB, upright; transparent parts are white. size: what
    center_crop will make of it. UnreadableImage if it is broken, far too large, or not an image in
    one of FORMATS."""
    with parsing("it", f"an image ({', '.join(FORMATS)})", UnreadableImage):
        image = Image.open(file, formats=FORMATS)
    kind = image.format
    with parsing("it", f"a whole {kind} image", UnreadableImage):
        if size and kind == "JPEG":
            image = decode_smaller(image, size)
        image = ImageOps.exif_transpose(image)  # decodes all pixels
    # The range of these is not known: as 16 bits, one of 0 to 255 would be black.
    if image.mode == "F" or (image.mode == "I" and kind == "TIFF"):
        raise UnreadableImage("it has 32-bit pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey
        grey = (np.asarray(image) / 257).clip(0, 255).round()
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def decode_smaller(image, size):
    """An opened JPEG, decoded at 1/2, 1/4 or 1/8 where center_crop would halve it as often and at
    least once more. On photographs the crop then differs from ADM's by 1 of 255 on the average (by
    20 at the most, of all that was tried), also in references of scores."""
    _, extent = image.draft(None, (2 * size, 2 * size))
    # Of 375 rows 188 are decoded at 1/2, which cover 187.5; center_crop would go on with 187.
    width, height = int(extent[2]), int(extent[3])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, extent)
    return image


def center_crop(image, size):
    """ADM's crop: halve with a box filter while the short side is at least 2 * size, resize with a
    bicubic filter, cut the middle. PIL image -> uint8 (size, size, 3)."""
    side = min(image.size)  # the shorter one
    if side < size and max(image.size) > 8 * side:
        # A strip of 1 x 10000 at size 256 would become 256 x 2,560,000, of which a square is kept.
        # The middle 8 squares hold everything that the filter could reach from that one.
        image = middle(image, min(image.width, 8 * side), min(image.height, 8 * side))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        scaled = round(image.width * scale), round(image.height * scale)
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    return np.asarray(middle(image, size, size))


def middle(image, width, height):
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# -------------------------------------------------------------------------------------------------
# Files of weights

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_HEADER = 2**24  # bytes; the header of a network with a thousand tensors has about 2**17


def safetensors_layout(path):
    """The header of a .safetensors file (8 bytes of its length, itself as JSON, then raw tensors)
    -> {name: (dtype, shape, first byte)}, metadata. Nothing in it is trusted: UserError for entries
    of another form, for bytes that the file does not have, for tensors that share bytes."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")  # of the tensors
        possible = 8 < start <= min(size, LONGEST_HEADER)
        header = parse_json(file.read(start - 8)) if possible else None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a safetensors file: it does not begin with a JSON header")
    layout = {}
    spans = []
    for name, entry in header.items():
        tensor = parse_entry(entry, size - start)
        if tensor is None:
            raise UserError(
                f"{path} is damaged or not a safetensors file: with {size - start} bytes of "
                f"tensors, it describes {short(name)} as {short(entry)}"
            )
        dtype, shape, begin, end = tensor
        layout[name] = dtype, shape, start + begin
        spans.append((begin, end))
    if any(begin < end for (_, end), (begin, _) in itertools.pairwise(sorted(spans))):
        raise UserError(f"{path} is damaged: some of its tensors share bytes")
    return layout, metadata


def parse_entry(entry, available):
    """An entry of a safetensors header -> (dtype, shape, begin, end); None if it has another form,
    contradicts itself, or goes beyond the `available` bytes of tensors."""
    entry = entry if isinstance(entry, dict) else {}
    dtype = DTYPES.get(str(entry.get("dtype")))
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    for sizes in (shape, offsets):
        if not isinstance(sizes, list) or len(sizes) > 8:
            return None
        if not all(type(n) is int and 0 <= n < 2**40 for n in sizes):
            return None
    if dtype is None or len(offsets) != 2 or offsets[1] > available:
        return None
    begin, end = offsets
    return (dtype, shape, begin, end) if begin + math.prod(shape) * dtype.itemsize == end else None


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped; writing to a tensor changes this
    process's copy and not the file. UserError as for safetensors_layout."""
    layout, _ = safetensors_layout(path)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, (dtype, shape, at) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=at)
        if at % dtype.itemsize:
            raw = raw.clone()  # not aligned in the file, but in memory
        tensors[name] = raw.view(dtype).view(shape)
    return tensors


def last_in(path):
    """The path of a checkpoint; of a run's folder, its last.pt."""
    return os.path.join(path, "last.pt") if os.path.isdir(path) else path


def read_file(path):
    """A file of weights, or a checkpoint with more in it -> a dict, its tensors memory-mapped if
    they can be. Safetensors, or written by torch.save; of the latter only tensors and plain values
    are ever unpickled. UserError if it is missing, damaged or something else."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a file of weights; give the file in it")
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise UserError(f"{path} is empty; fetch or make it again")
    if head[8:] == b"{" or str(path).endswith(".safetensors"):
        return read_safetensors(path)
    content = read_torch_file(path, zipped=head.startswith(b"PK"))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name")
    check_tensors(content, path)
    return content


def read_torch_file(path, zipped):
    """The object that torch.save wrote. Since torch 1.6 that is a zip archive of uncompressed
    tensors, which can be memory-mapped."""
    if zipped:
        # Cut short, it has no list of its parts.
        with open_zip(path, "a whole file of torch.save") as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise UserError(f"{path} is a zip of other files, not weights")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path} is compressed, which torch.save never does")
    # argparse.Namespace: the flags, in checkpoints of DiT's own training
    with torch.serialization.safe_globals([argparse.Namespace]):
        with parsing(path, "a file of weights"):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            except pickle.UnpicklingError:  # torch goes on to advise trusting the file
                why = "it holds more than tensors and plain values, or none"
                raise ValueError(why) from None


def check_tensors(content, path):
    """UserError unless every tensor in a file's content is an ordinary one: numbers of a known
    type, each in a place of its own. Sparse, quantised, complex or overlapping ones, which a file
    can hold as well, fail somewhere in torch, or crash it."""
    seen = set()
    parts = [content]
    while parts:
        part = parts.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            parts += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set)):
            parts += part
        elif isinstance(part, torch.Tensor) and not is_ordinary(part):
            raise UserError(
                f"{path} holds a tensor of a kind that is not read here ({part.layout}, "
                f"{part.dtype}, {tuple(part.shape)}): sparse, quantised, complex, of another "
                f"unknown type, or overlapping itself"
            )


def is_ordinary(tensor):
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    if tensor.dtype not in DTYPES.values() or tensor.is_neg():
        return False
    # From the closest elements to the farthest: each dimension steps over the whole one before.
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < extent:
            return False
        extent = max(extent, stride * size)
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def open_zip(path, kind="a zip archive"):
    """A ZipFile; UserError if it is not a whole zip archive."""
    with parsing(path, kind):
        return zipfile.ZipFile(path)


def weights_in(content, path, ema=True):
    """The content of a file, from read_file -> {name: tensor}, and which weights they are: "EMA"
    (of an "ema" entry, preferred unless ema is False), "raw" (of a "model" or "state_dict" entry)
    or "plain" (the file holds nothing else). Prefixes that wrappers leave, module. and _orig_mod.,
    are removed. UserError if there are none."""
    keys = ("ema", "model", "state_dict")
    entries = {key: content[key] for key in keys if isinstance(content.get(key), dict)}
    if not ema:
        entries.pop("ema", None)
        if not entries:
            raise UserError(f"{path} holds one set of weights, not an EMA too; leave out --no-ema")
    key, state = next(iter(entries.items()), ("", content))
    if not state or not is_by_name(state):
        raise UserError(f"{path} holds no weights by name, and none under ema, model, state_dict")
    state = {
        name.replace("_orig_mod.", "").removeprefix("module."): value.detach()
        for name, value in state.items()
    }
    return state, {"ema": "EMA", "": "plain"}.get(key, "raw")


def is_by_name(state):
    """Does a dict hold tensors by name, and nothing else?"""
    return all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())


def check_weights(model, state, path):
    """UserError that lists everything in a state_dict that does not fit the network."""
    if not is_by_name(state):
        raise UserError(f"{path} is damaged: it holds something else among its weights")
    own = {name: value.shape for name, value in model.state_dict().items()}
    index = "relative_position_index"  # in the released DiffiT files; it follows from the size
    wrong = {
        "missing": [n for n in own if n not in state],
        "unexpected": [n for n in state if n not in own and not n.endswith(index)],
        "of another shape": [
            f"{n} {tuple(state[n].shape)}, expected {tuple(shape)}"
            for n, shape in own.items()
            if n in state and state[n].shape != shape
        ],
    }
    problems = []
    for kind, names in wrong.items():
        if names:
            first = "; ".join(map(short, names[:10])) + "; ..." * (len(names) > 10)
            problems.append(f"{len(names)} {kind} ({first})")
    if problems:
        raise UserError(f"the weights in {path} do not fit this network: {', '.join(problems)}")


def load_weights(model, state, path, assign=False):
    """state_dict -> model, strictly; UserError as for check_weights, and for numbers that are not
    finite. With assign, a network on the meta device takes the tensors themselves: a memory-mapped
    file stays the only copy."""
    check_weights(model, state, path)
    check_finite(state, path)
    own = model.state_dict()
    state = {name: state[name].to(value.dtype) for name, value in own.items()}
    model.load_state_dict(state, assign=assign)


def check_finite(state, path):
    """UserError if one of these tensors by name holds NaN or infinity."""
    for name, value in state.items():
        # The extremes need no memory, and are NaN if any number is.
        if value.is_floating_point() and value.numel():
            extremes = torch.stack(value.aminmax())
            if not extremes.isfinite().all():
                raise UserError(f"{path} holds numbers that are not finite, in {short(name)}")


def weights_hash(*modules):
    """16 hex digits of the SHA-256 of all tensors in their state_dicts, as fp32."""
    digest = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def file_hash(path):
    """16 hex digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


FORMAT = "diffit checkpoint 1"


# What a checkpoint of train.py has besides, for a resume.
PARTS = {
    "config": dict,
    "dataset": (str, type(None)),
    "step": int,
    "progress": dict,
    "model": dict,
    "ema": dict,
    "optimizer": dict,
}


def read_checkpoint(path):
    """A checkpoint of train.py that a run can resume from: a dict of tensors and plain values.
    UserError if the file is missing, damaged or something else."""
    state = read_file(path)
    if state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of train.py (expected the format {FORMAT!r})")
    state.setdefault("dataset", None)  # earlier versions had none
    wrong = [name for name, kind in PARTS.items() if not isinstance(state.get(name), kind)]
    if wrong or not 0 <= state["step"] < 2**53:
        raise UserError(
            f"{path} cannot be resumed: it lacks {', '.join(wrong) or 'its step'}, or has it in "
            f"another form"
        )
    return state


# -------------------------------------------------------------------------------------------------
# Pixels to latents and back: Stable Diffusion's KL-f8 autoencoder (Rombach et al. 2022), with the
# parameter names of its published weights


class VAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8) of about unit variance. 83.65M
    parameters. channels: the width at each resolution, finest first. Runs in fp32 or bf16 (fp16
    overflows)."""

    scale = 0.18215  # latent = scale * sample of the posterior; no other place knows of it

    def __init__(self, channels: tuple[int, ...] = (128, 256, 512, 512), latent_channels: int = 4):
        super().__init__()
        self.factor = 2 ** (len(channels) - 1)  # pixels per latent position, in each direction
        self.encoder = VAEEncoder(channels, 2 * latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = VAEDecoder(channels, latent_channels)

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) -> the encoder's Gaussian: mean and log-variance, (B, 4, H/8, W/8)
        each, fp32 and not scaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    @classmethod
    def latent(cls, mean, logvar, noise=0.0):
        """A sample of the posterior, given noise ~ N(0, I); its mode without. Scaled."""
        return cls.scale * (mean + (0.5 * logvar).exp() * noise)

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, 4, h, w), scaled -> images (B, 3, 8h, 8w), fp32, about [-1, 1]. One image at
        a time: the widest features of a 512-pixel image take 0.5 GB."""
        images = [self.decoder(self.post_quant_conv(one)) for one in (z / self.scale).split(1)]
        return torch.cat([image.float() for image in images])

    def fingerprint(self) -> str:
        """16 hex digits that tell which latents it makes: of its encoder alone."""
        return weights_hash(self.encoder, self.quant_conv)


class VAEEncoder(nn.Module):
    """(B, 3, H, W) -> (B, out_channels, H/8, W/8)"""

    def __init__(self, channels, out_channels):
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAELevel(channels[max(k - 1, 0)], width, blocks=2, down=k < last)
            for k, width in enumerate(channels)
        )
        self.mid_block = VAEMiddle(channels[-1])
        self.conv_norm_out = vae_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W)
        x = self.conv_in(x)  # (B, 128, H, W)
        for block in self.down_blocks:
            x = block(x)  # in the end (B, 512, H/8, W/8)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEDecoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, 3, 8h, 8w)"""

    def __init__(self, channels, latent_channels):
        super().__init__()
        channels = channels[::-1]  # coarsest first
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = VAEMiddle(channels[0])
        self.up_blocks = nn.ModuleList(
            VAELevel(channels[max(k - 1, 0)], width, blocks=3, up=k < last)
            for k, width in enumerate(channels)
        )
        self.conv_norm_out = vae_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):  # (B, latent_channels, h, w)
        x = self.mid_block(self.conv_in(z))  # (B, 512, h, w)
        for block in self.up_blocks:
            x = block(x)  # in the end (B, 128, 8h, 8w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAELevel(nn.Module):
    """ResBlocks at one resolution, then the step to the next one. All levels but the last have it;
    a list that stays empty has no parameters."""

    def __init__(self, before, width, blocks, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            VAEResBlock(before if k == 0 else width, width) for k in range(blocks)
        )
        self.downsamplers = nn.ModuleList(VAEResample(width, down=True) for _ in range(down))
        self.upsamplers = nn.ModuleList(VAEResample(width, down=False) for _ in range(up))

    def forward(self, x):
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class VAEResample(nn.Module):
    """Half the resolution, or twice."""

    def __init__(self, width, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        if self.down:  # padded on the right and below alone, as the published weights expect
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0))


class VAEMiddle(nn.Module):
    """ResBlock, attention, ResBlock, at the lowest resolution."""

    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResBlock(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(width)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class VAEResBlock(nn.Module):
    """x + Conv(Swish(GN(Conv(Swish(GN(x)))))), a 1x1 convolution on the shortcut where the width
    changes."""

    def __init__(self, before, width):
        super().__init__()
        self.norm1 = vae_norm(before)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = vae_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class VAEAttention(nn.Module):
    """One head over all positions. x (B, width, H, W) -> the same shape"""

    def __init__(self, width):
        super().__init__()
        self.group_norm = vae_norm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, width)
        q, k, v = (f(tokens)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, width)
        return x + self.to_out[0](attended).transpose(1, 2).reshape(x.shape)


def vae_norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


def load_vae(path, device="cpu") -> VAE:
    """sd-vae-ft-ema or -mse, as .safetensors or .bin -> VAE in eval mode, as wide and deep as the
    file says. UserError if the file is something else."""
    state, _ = weights_in(read_file(path), path)
    # The attention's parameters have had two sets of names.
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {
        ".".join(older.get(part, part) for part in name.split(".")): value
        for name, value in state.items()
    }
    channels = []
    while (name := f"encoder.down_blocks.{len(channels)}.resnets.0.conv1.weight") in state:
        channels.append(state[name].shape[0] if state[name].dim() == 4 else 0)
    if not channels or any(width == 0 or width % 32 for width in channels):  # vae_norm's groups
        raise UserError(
            f"{path} is not a VAE of Stable Diffusion; expected sd-vae-ft-ema or sd-vae-ft-mse"
        )
    with torch.device("meta"):
        vae = VAE(tuple(channels))
    load_weights(vae, state, path, assign=True)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------
# Data sets


class ImageDataset:
    """A data set of images. One of your own is a subclass with

        size            height and width in pixels
        labels          (n,) int64 class numbers 0, 1, 2, ..., or None
        __len__()       n
        read(i)         -> uint8 (size, size, 3); UnreadableImage or OSError for an image to skip
        name(i)         what messages call it

    and optionally the names of the classes, where the labels come from, and content()."""

    labels = None
    tokens = None
    labels_from = ""  # "sub-folders", "dataset.json", "arr_1", "the archive"
    class_names = ()
    left_out = ""  # files that are no images, counted

    def name(self, i):
        return f"image {i}"

    @property
    def num_classes(self):
        """Of the labels: the largest one decides where there are no names."""
        return 0 if self.labels is None else max(len(self.class_names), int(self.labels.max()) + 1)

    def summary(self):
        """What was found, in one line."""
        text = f"{len(self)} images"
        if self.tokens is not None:
            count, width = self.tokens.shape[1:]
            text += f" with {count} token{'s' * (count > 1)} each of width {width}"
        if self.labels is not None:
            names = [f"{k} {short(name)}" for k, name in enumerate(self.class_names)]
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            text += f" of {self.num_classes} classes" + (f": {shown}" if names else "")
            text += f" (by {self.labels_from})" if self.labels_from else ""
        return text + (f"; left out: {self.left_out}" if self.left_out else "")

    def example(self, i, mirrored, rng):
        """-> (3, size, size) uint8. rng is for data sets whose examples are random (Latents)."""
        image = self.read(i)
        if mirrored:
            image = image[:, ::-1]
        return torch.from_numpy(image.transpose(2, 0, 1).copy())

    def blank(self):
        """What stands in for an example where none can be read."""
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8)

    def content(self):
        """Anything, beside number, labels and classes, in which another data set would differ."""

    def fingerprint(self) -> str:
        """16 hex digits by which a resumed run recognises its data, also after a move."""
        return content_hash(len(self), list(self.class_names), self.labels, self.content())


class OfClasses(ImageDataset):
    """The images of a data set that show these classes, with the numbers and names they have there.
    UserError if it has none of any of them."""

    def __init__(self, dataset, classes):
        self.dataset = dataset
        self.size = dataset.size
        self.indices = np.flatnonzero(np.isin(dataset.labels, classes))
        self.labels = dataset.labels[self.indices]
        self.class_names = dataset.class_names
        if not len(self.indices):
            raise UserError(f"there are no images of class {classes[0]} in these data")

    def summary(self):
        there = np.unique(self.labels).tolist()
        names = dict(enumerate(self.class_names))
        shown = ", ".join(f"{k} {short(names.get(k, ''))}".strip() for k in there[:10])
        return f"{len(self)} images of {len(there)} classes: {shown}{', ...' * (len(there) > 10)}"

    def content(self):
        return self.dataset.fingerprint()

    def __len__(self):
        return len(self.indices)

    def name(self, i):
        return self.dataset.name(self.indices[i])

    def read(self, i):
        return self.dataset.read(self.indices[i])


def content_hash(*parts):
    """16 hex digits of arrays and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part))
        else:
            digest.update(ascii(part).encode() + b"\0")
    return digest.hexdigest()[:16]


def square(width, height, subject):
    """The side of a square image; UserError if it is not one."""
    if width != height:
        raise UserError(f"{subject} is {width} x {height}, not square; pass --size to crop all")
    return width


def circle(n, radius=1.0, phase=0.0):
    """n points evenly on a circle, the first at the top, y down: (n, 2)."""
    angle = 2 * np.pi * np.arange(n) / n + phase
    return radius * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def shape_outlines():
    """The ten shapes in the unit circle: name -> polygons to draw in turn, each (points (K, 2), 1
    to fill or 0 to cut out)."""
    u = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    heart_x = 16 * np.sin(u) ** 3
    heart_y = -13 * np.cos(u) + 5 * np.cos(2 * u) + 2 * np.cos(3 * u) + np.cos(4 * u)
    heart = np.stack([heart_x, heart_y], axis=1) / 17
    star = np.stack([circle(5), circle(5, 0.42, np.pi / 5)], axis=1).reshape(10, 2)
    upright = np.array([(-0.33, -0.95), (0.33, -0.95), (0.33, 0.95), (-0.33, 0.95)])
    bar = np.array([(-0.9, -0.17), (0.9, -0.17), (0.9, 0.17), (-0.9, 0.17)])
    return {
        "circle": [(circle(48, 0.9), 1)],
        "square": [(circle(4, 1.1, np.pi / 4), 1)],
        "triangle": [(circle(3), 1)],
        "star": [(star, 1)],
        "cross": [(upright, 1), (upright[:, ::-1], 1)],
        "ring": [(circle(48), 1), (circle(48, 0.55), 0)],
        "diamond": [(circle(4) * (0.6, 1.0), 1)],
        "heart": [(heart, 1)],
        "moon": [(circle(48), 1), (circle(48, 0.85) + (0.5, -0.1), 0)],
        "bars": [(bar + (0, y), 1) for y in (-0.65, 0, 0.65)],
    }


class Shapes(ImageDataset):
    """The built-in set: one bright shape of ten on a dark ground. Image i depends on (seed, i)
    alone and has class i % 10; size, place, tilt and colours are random."""

    outlines = shape_outlines()
    class_names = list(outlines)

    def __init__(self, size=32, n=50_000, seed=0):
        self.size = size
        self.n = n
        self.seed = seed
        self.labels = np.arange(n, dtype=np.int64) % len(self.class_names)

    def __len__(self):
        return self.n

    def name(self, i):
        return f"shape {i}"

    def content(self):
        return self.seed

    def read(self, i):
        rng = np.random.default_rng([self.seed, i])
        look = random_look(rng)
        return draw(self.outlines[self.class_names[self.labels[i]]], self.size, *look)


def random_look(rng):
    """Of a shape in one picture -> radius, tilt, colour, ground, place."""
    radius, tilt, hue, saturation, value, right, down = rng.uniform(
        [0.36, -0.2, 0, 0.75, 0.85, 0, 0], [0.45, 0.2, 1, 1, 1, 1, 1]
    )
    ground = rng.uniform(0.2, 0.32, 3)
    colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    return radius, tilt, colour, ground, (right, down)


def draw(polygons, size, radius, tilt, colour, ground, place):
    """Polygons in the unit circle, to fill or to cut out -> uint8 (size, size, 3). Lengths are
    fractions of the image; the shape stays inside, 0.02 off the border."""
    centre = radius + 0.02 + (0.96 - 2 * radius) * np.array(place)
    cos, sin = math.cos(tilt), math.sin(tilt)
    turn = np.array([[cos, sin], [-sin, cos]])
    # Drawn four times too large and averaged down, for smooth edges.
    side = 4 * size
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for points, fill in polygons:
        corners = (points @ turn * radius + centre) * 4 * size
        pen.polygon(corners.ravel().tolist(), fill=255 * fill)
    alpha = np.asarray(mask.reduce(4), dtype=np.float32)[:, :, None] / 255  # (size, size, 1)
    return np.round(255 * (ground + alpha * (colour - ground))).astype(np.uint8)


class ShapeKinds(ImageDataset):
    """The built-in sets: any number of kinds of shapes, of which class k has the outline that
    follows from k. Image i depends on (seed, i) alone and shows the kinds in turn, at a random
    place and tilt. coloured: a kind also has a colour and a size of its own, which its images share
    but for a little; otherwise all have the same colours, and sizes are random. kinds: how many, or
    which."""

    def __init__(self, size=32, kinds=4000, each=12, seed=0, coloured=True):
        self.size = size
        self.seed = seed
        self.coloured = coloured
        self.labels = np.tile(np.arange(kinds) if isinstance(kinds, int) else kinds, each)

    def __len__(self):
        return len(self.labels)

    def content(self):
        return self.seed, self.coloured

    def read(self, i):
        rng = np.random.default_rng([self.seed, i])
        radius, tilt, colour, ground, place = random_look(rng)
        kind = np.random.default_rng([2, int(self.labels[i])])
        outline = random_outline(kind)
        if self.coloured:
            hue = kind.uniform() + rng.normal(0, 0.01)
            colour = np.array(colorsys.hsv_to_rgb(hue % 1, kind.uniform(0.3, 1), colour.max()))
            radius = kind.uniform(0.2, 0.45) * rng.uniform(0.96, 1.04)
        else:
            colour = np.array([0.98, 0.8, 0.35])
            ground = np.array([0.2, 0.22, 0.3])
        return draw([(outline, 1)], self.size, radius, tilt, colour, ground, place)


def random_outline(rng):
    """A polygon, a star or a blob, the farthest point at a distance of 1: (K, 2)."""
    family = rng.integers(3)
    if family == 0:
        corners = rng.integers(3, 7)
        angle = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) / corners
        radius = rng.uniform(0.5, 1, corners)
    elif family == 1:
        corners = 2 * rng.integers(3, 8)
        angle = 2 * np.pi * np.arange(corners) / corners
        radius = np.where(np.arange(corners) % 2, rng.uniform(0.25, 0.65), 1)
    else:
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        waves = np.arange(1, 6)[:, None]
        height = rng.normal(0, 0.35, (5, 1)) / np.sqrt(waves)
        phase = rng.uniform(0, 2 * np.pi, (5, 1))
        radius = np.exp((height * np.cos(waves * angle + phase)).sum(0))
    points = radius[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1)
    points = points * (1, rng.uniform(0.55, 1))
    turn = rng.uniform(0, 2 * np.pi)
    points = points @ [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    return points / np.linalg.norm(points, axis=1).max()


EMPTY_ZIP = b"PK\x05\x06" + bytes(18)


class ZipReader:
    """The files of a .zip, by name. Of 300,000 zipfile's own list has 400 MB, and each worker would
    spend seconds to make it again; here a file is a row of numbers."""

    fields = ["header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits"]

    def __init__(self, path):
        self.path = path
        self.archive = None
        self.pid = None
        with open_zip(path) as archive:
            # Some programs write the names as cats\a.png, others as ./cats/a.png.
            entry_of = {slashes(name): archive.getinfo(name) for name in archive.namelist()}
        self.names = sorted(name for name in entry_of if not name.endswith("/"))  # no folders
        entries = [entry_of[name] for name in self.names]
        self.written = {
            name: entry.orig_filename
            for name, entry in zip(self.names, entries)
            if name != entry.orig_filename
        }
        rows = [*map(operator.attrgetter(*self.fields), entries)]
        with parsing(path, "a whole zip archive"):  # a damaged one may have numbers beyond these
            self.numbers = np.array(rows, np.uint64).reshape(-1, len(self.fields))

    def __getstate__(self):  # a file handle cannot be pickled; a worker opens its own
        return {**self.__dict__, "archive": None, "pid": None}

    def open(self, name):
        """UnreadableImage if it cannot be unpacked."""
        entry = zipfile.ZipInfo(self.written.get(name, name))
        row = self.numbers[bisect.bisect_left(self.names, name)]
        for field, number in zip(self.fields, row.tolist()):
            setattr(entry, field, number)
        if entry.file_size > MOST_BYTES:
            raise UnreadableImage(f"it has {entry.file_size} bytes; make it smaller")
        if self.pid != os.getpid():  # processes that share a file handle share its place
            # An empty archive, for zipfile's way of reading (from its `fp`): we know the entries.
            self.archive = zipfile.ZipFile(io.BytesIO(EMPTY_ZIP))
            self.archive.fp = open(self.path, "rb")
            self.pid = os.getpid()
        with parsing("it", "packed in a way that Python can unpack", UnreadableImage):
            return io.BytesIO(self.archive.read(entry))


@contextlib.contextmanager
def without_collection():
    """Inside, Python does not look for garbage: among the objects of 300,000 names, none of which
    is, that takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ImageFiles(ImageDataset):
    """Images in a folder or in a .zip, read when asked for, cropped and resized to size. Without a
    size, all must be squares as large as the first.

    Labels come from a dataset.json ({"labels": [["path", class], ...], "class_names": [...]}, the
    first as in EDM, the second optional) in a folder that holds all images; else from the
    sub-folders, in alphabetical order, or that of their numbers if all are numbers, inside the one
    folder that holds everything; images without sub-folders have none.
    UserError if there are no images, or if the labels cannot be understood."""

    @without_collection()
    def __init__(self, path, size=None):
        self.path = Path(path)
        self.zip = None if self.path.is_dir() else ZipReader(self.path)
        self.crops = size is not None
        found = self.zip.names if self.zip else self.names_in_folder()
        found = {n for n in found if "/." not in f"/{n}" and "/__MACOSX" not in f"/{n}"}  # hidden
        described = [n for n in found if f"/{n}".lower().endswith("/dataset.json")]
        self.names = sorted(n for n in found if suffix(n) in EXTENSIONS)
        others = found.difference(self.names, described)
        ends = collections.Counter(sorted(suffix(n) or "without a suffix" for n in others))
        counted = [f"{count} {short(end)}" for end, count in ends.most_common()]
        self.left_out = ", ".join(counted[:5]) + (", ..." if len(counted) > 5 else "")
        if not self.names:
            raise UserError(
                f"{path} holds no images ({', '.join(EXTENSIONS)})"
                + (f", but {self.left_out}" if self.left_out else "")
            )
        self.root = ""  # the folder, in all names, that labels are relative to
        if described:
            self.labels_from_json(described)
        else:
            self.labels_from_folders(others)
        self.size = size or self.common_size()

    def names_in_folder(self):
        """Paths of all files, relative to self.path, with / between their parts."""
        root = os.path.realpath(self.path)
        for top, folders, files in os.walk(root, onerror=raise_it, followlinks=True):
            folders[:] = [name for name in folders if not leads_back(os.path.join(top, name))]
            folder = Path(top).relative_to(root).as_posix()
            yield from (name if folder == "." else f"{folder}/{name}" for name in files)

    def labels_from_json(self, described):
        """described: the names of all files called dataset.json."""
        self.root = described[0][: -len("dataset.json")]
        if len(described) > 1 or not all(name.startswith(self.root) for name in self.names):
            raise UserError(
                f"{self.path} holds {', '.join(map(short, sorted(described)[:5]))}; expected one "
                f"dataset.json, in a folder that holds all images"
            )
        try:
            with self.open(described[0]) as file:
                content = parse_json(file.read())
        except UnreadableImage as error:
            raise UserError(f"dataset.json in {self.path}: {error}") from None
        pairs = content.get("labels", ()) if isinstance(content, dict) else ()
        if pairs is None:
            return
        label_of = {}
        if isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 for p in pairs):
            label_of = {slashes(str(name)): label for name, label in pairs}
        labels = [label_of.get(name[len(self.root) :]) for name in self.names]
        for name, label in zip(self.names, labels):
            if type(label) is not int or not 0 <= label < MOST_CLASSES:
                raise UserError(
                    f"dataset.json in {self.path} gives {short(name)} the class {short(label)}; "
                    'expected {"labels": [["path", class], ...]} with numbers from 0 for all images'
                )
        self.labels = np.array(labels, np.int64)
        self.labels_from = "dataset.json"
        self.class_names = content.get("class_names", [])
        if not is_names(self.class_names) or 0 < len(self.class_names) <= self.labels.max():
            raise UserError(
                f"dataset.json in {self.path} has the class_names {short(self.class_names)}; "
                f"expected a list with a name for each class up to {self.labels.max()}"
            )

    def labels_from_folders(self, others):
        """others: the names of files that are no images."""
        # What the first and the last of the sorted names share, all share. The classes are the
        # folders in the last folder that all share; if that holds them itself, it is the class.
        common = os.path.commonprefix([self.names[0], self.names[-1]]).rpartition("/")[0]
        if all(posixpath.dirname(name) == common for name in self.names):
            common = posixpath.dirname(common)
        self.root = common and common + "/"
        parts = [name[len(self.root) :].split("/") for name in self.names]
        folders = [part[0] if len(part) > 1 else None for part in parts]
        class_names = sorted(set(folders) - {None})
        if not class_names:
            return
        if all_numbers(class_names):
            # As numbers, of which a name may be a very long one: 2 before 10.
            class_names.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
        splits = [name for name in class_names if name.lower() in SPLITS]
        if len(splits) > 1:
            raise UserError(
                f"{self.path} has the folders {' and '.join(splits)}, which are parts of a data "
                f"set and not classes; "
                + ("unpack it, and give " if self.zip else f"give {self.path / self.root}/")
                + f"{splits[0]}"
            )
        if None in folders:
            raise UserError(
                f"{self.path} has images both beside and inside sub-folders, so their classes are "
                f"unclear; put all of them in sub-folders, or none"
            )
        number = {name: k for k, name in enumerate(class_names)}
        self.labels = np.array([number[folder] for folder in folders], np.int64)
        self.class_names = class_names
        self.labels_from = "sub-folders"
        inside = [name[len(self.root) :] for name in others if name.startswith(self.root)]
        empty = {name.split("/")[0] for name in inside if "/" in name}.difference(class_names)
        if empty:
            self.left_out += f", all that is in {', '.join(map(short, sorted(empty)))}"

    def common_size(self):
        """The size of the first image that can be read; read() holds the others to it."""
        for name in self.names[: max_unreadable(len(self)) + 1]:
            try:
                with self.open(name) as file:
                    width, height = decode(file).size
            except (UnreadableImage, OSError):
                continue  # whoever reads all of them will name it
            return square(width, height, f"{name} in {self.path}")
        raise UserError(f"the first images in {self.path} cannot be read ({self.names[0]}, ...)")

    def open(self, name):
        if self.zip:
            return self.zip.open(name)
        if not os.path.isfile(self.path / name):  # a pipe, say, which never ends
            raise UnreadableImage("it is not an ordinary file")
        return open(self.path / name, "rb")

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]

    def content(self):
        """All names, and the bytes of three files, because prepared sets have equal names."""
        names = [name[len(self.root) :] for name in self.names]
        files = []
        for name in (self.names[0], self.names[len(self) // 2], self.names[-1]):
            try:
                with self.open(name) as file:
                    files.append(hashlib.sha256(file.read()).hexdigest())
            except (UnreadableImage, OSError):
                files.append(None)
        return names, files

    def read(self, i):
        with self.open(self.names[i]) as file:
            image = decode(file, self.size if self.crops else None)
        if not self.crops and image.size != (self.size, self.size):
            raise UnreadableImage(
                f"not of {self.size} x {self.size} pixels, like the first; pass --size to crop all"
            )
        return center_crop(image, self.size)


SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
MOST_CLASSES = 2**20
MOST_BYTES = 2**29  # of one image's file


def suffix(name):
    return posixpath.splitext(name)[1].lower()


def all_numbers(names):
    return all(name.isascii() and name.isdigit() for name in names)


def is_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def slashes(name):
    """A path in an archive with / between its parts, and without a leading ./"""
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def raise_it(error):
    """For os.walk, which would silently leave out a folder that it cannot read."""
    raise error


def leads_back(folder):
    """Is this folder a link to one of its own parents, or to a folder above them? Following it
    would never end. (Links to other folders are followed, so real paths count.)"""
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    way = Path(folder).parents
    return any(Path(os.path.realpath(passed)).is_relative_to(target) for passed in way)


class MappedArray(np.memmap):
    """A memory-mapped array that is pickled as its place in the file: a worker maps it, too."""

    def __reduce__(self):
        order = "C" if self.flags.c_contiguous else "F"
        return MappedArray, (self.filename, self.dtype, "r", self.offset, self.shape, order)


class ImageArray(ImageDataset):
    """Images in one array: images (n, H, W, 3) uint8, labels (n,) or None, tokens (n, M, E) or
    None. Without a size, they must be squares."""

    def __init__(self, images, labels, size=None, class_names=(), labels_from="", tokens=None):
        self.images = images
        self.labels = labels
        self.tokens = tokens
        self.class_names = list(class_names)
        self.labels_from = labels_from if labels is not None else ""
        self.size = size or square(images.shape[2], images.shape[1], "each of these images")

    def __len__(self):
        return len(self.images)

    def content(self):
        few = np.linspace(0, len(self) - 1, 16).astype(int)
        images = np.asarray(self.images[few])
        tokens = None if self.tokens is None else np.asarray(self.tokens[few])
        return images if tokens is None else content_hash(images, tokens)

    def read(self, i):
        image = np.asarray(self.images[i])
        if image.shape[0] == image.shape[1] == self.size:
            return image
        return center_crop(Image.fromarray(image), self.size)


def read_npz(path, size=None):
    """arr_0, uint8 NHWC, and arr_1 of an .npz (the form of ADM's samples) -> ImageArray. arr_1
    holds labels (n,), or tokens (n, E) or (n, M, E) of floats. Uncompressed arrays stay in the
    file, memory-mapped."""
    images = read_array(path, "arr_0", mapped=True)
    if images.ndim == 4 and not len(images):
        raise UserError(f"arr_0 in {path} holds no images")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise UserError(
            f"arr_0 in {path} is {images.dtype} {images.shape}, not uint8 (n, height, width, 3)"
        )
    labels = read_array(path, "arr_1", mapped=True) if "arr_1" in array_names(path) else None
    n = len(images)
    if labels is not None and labels.dtype.kind == "f":
        tokens = as_tokens(labels, path, "arr_1")
        if len(tokens) != n:
            raise UserError(f"arr_1 in {path} has tokens of {len(tokens)} images, and arr_0 {n}")
        return ImageArray(images, None, size, tokens=tokens)
    if labels is not None:
        whole = labels.shape == (n,) and labels.dtype.kind in "iu"
        if not whole or labels.min() < 0 or labels.max() >= MOST_CLASSES:
            kind = f"{labels.dtype} {labels.shape}"
            if whole:
                kind = f"from {labels.min()} to {labels.max()}"
            raise UserError(
                f"arr_1 in {path} is {kind}, not class numbers of the {n} images, nor tokens"
            )
        labels = np.array(labels, np.int64)  # in memory
    return ImageArray(images, labels, size, labels_from="arr_1")


def as_tokens(array, path, name):
    """An array (n, E) or (n, M, E) of floats -> (n, M, E). UserError for anything else."""
    if array.dtype.kind != "f" or array.ndim not in (2, 3) or not array.size:
        raise UserError(
            f"{name} in {path} is {array.dtype} {array.shape}, not tokens: floats (n, width) or "
            f"(n, number, width)"
        )
    return array[:, None] if array.ndim == 2 else array


def as_float32(array):
    """The same numbers; those that are too large become infinite, which others check."""
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def read_tokens(path):
    """The tokens in an .npz: arr_1, as beside images, or else its only array -> (n, M, E) fp32.
    UserError if they are not finite, or if there are none."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}; expected an .npz of tokens")
    names = array_names(path)
    name = names[0] if len(names) == 1 else "arr_1"
    tokens = as_float32(as_tokens(read_array(path, name), path, name))
    if not np.isfinite(tokens).all():
        raise UserError(f"{name} in {path} holds numbers that are not finite")
    return tokens


def array_names(path):
    """The names of the arrays in an .npz. UserError if it is not one."""
    with open_zip(path, "an .npz file") as archive:
        return arrays_in(archive)


def arrays_in(archive):
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_array(path, name, mapped=False):
    """An array of an .npz; with `mapped`, memory-mapped if it is not compressed. UserError if it is
    not there, or damaged."""
    kind = f"an .npz file with an array {name}"
    with open_zip(path, "an .npz file") as archive, parsing(path, kind):
        names = arrays_in(archive)
        if name not in names:
            found = ", ".join(map(short, names[:10])) or "nothing"
            raise UserError(f"{path} has no array {name} (found: {found})")
        entry = archive.getinfo(f"{name}.npy")
        # Deflate makes nothing smaller than by 1032.
        if entry.file_size > 1032 * entry.compress_size + 1024:
            raise ValueError(f"{entry.file_size} bytes cannot come from {entry.compress_size}")
        if mapped and entry.compress_type == zipfile.ZIP_STORED:
            return map_array(path, place_in_zip(path, entry), entry.file_size)
        with archive.open(entry) as file:
            dtype, shape, order = array_header(file, entry.file_size)
            return np.ndarray(shape, dtype, file.read(), order=order).copy()


def place_in_zip(path, entry):
    """The first byte of an uncompressed entry."""
    with open(path, "rb") as file:
        # A header of 30 bytes ends in the lengths of the name and the extra field after it.
        file.seek(entry.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
        return entry.header_offset + 30 + int(lengths.sum())


def array_header(file, size):
    """The header of an .npy of `size` bytes, at whose first byte the file stands -> dtype, shape,
    order; the file then stands at the numbers. ValueError if they are not all there."""
    begin = file.tell()
    version = np.lib.format.read_magic(file)
    read = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}[version]
    shape, fortran, dtype = getattr(np.lib.format, read)(file)
    expected = file.tell() - begin + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or expected != size:
        raise ValueError(f"its header describes {dtype} {shape}, and it has {size} bytes")
    return dtype, shape, "F" if fortran else "C"


def map_array(path, place=0, size=None, mode="r"):
    """The .npy at `place` in a file -> its numbers, memory-mapped. Errors of numpy's own kinds."""
    with open(path, "rb") as file:
        file.seek(place)
        dtype, shape, order = array_header(file, size or os.path.getsize(path))
        start = file.tell()
    if not math.prod(shape):
        return np.empty(shape, dtype)  # nothing that could be mapped
    return MappedArray(path, dtype, mode, start, shape, order)


MOST_CIFAR = 2**28  # bytes; either archive has 185 million


def read_cifar(path, size=None):
    """The training images of cifar-10-binary.tar.gz, or of cifar-100-binary.tar.gz with its fine
    labels -> ImageArray. A record is 1 or 2 label bytes, then 3 x 32 x 32 pixels."""
    contents = {}
    with open(path, "rb") as file, parsing(path, "CIFAR's binary archive"):
        unpacked = file if path.lower().endswith(".tar") else gzip.GzipFile(fileobj=file)
        # Unpacked first, and no further than this: sizes in the archive itself may lie.
        unpacked = io.BytesIO(unpacked.read(MOST_CIFAR))
        with tarfile.open(fileobj=unpacked, mode="r:") as tar:
            for member in tar:
                name = posixpath.basename(member.name)
                plain = member.isfile() and not member.issparse()  # which may grow without limit
                if plain and name.endswith((".bin", ".txt")) and "test" not in name:
                    contents[name] = tar.extractfile(member).read()
    batches = sorted(name for name in contents if name.startswith("data_batch_"))
    if batches:
        label_bytes, titles = 1, "batches.meta.txt"
    else:
        batches, label_bytes, titles = ["train.bin"], 2, "fine_label_names.txt"
    if batches[0] not in contents:
        raise UserError(f"{path} holds no images of CIFAR; expected the archive's binary version")
    raw = b"".join(contents[name] for name in batches)
    record = label_bytes + 3 * 32 * 32
    if not raw or len(raw) % record:
        raise UserError(f"{path}: {len(raw)} bytes are not a multiple of a CIFAR record ({record})")
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # NHWC
    labels = records[:, label_bytes - 1].astype(np.int64)  # CIFAR-100 has the coarse one before it
    names = contents.get(titles, b"").decode(errors="replace").split()
    names = names if len(names) > labels.max() else []
    return ImageArray(np.ascontiguousarray(images), labels, size, names, "the archive")


LATENTS = "diffit latents 2"
TO_DO, DONE, UNREADABLE = 0, 1, 2  # the state of an image


class Latents:
    """The folder that `python data.py latents` makes: the mean and log-variance of the VAE's
    posterior for each image and its mirror image.

        latents.json    format, vae (fingerprint), scale, size (of the images), data (fingerprint),
                        class_names
        moments.npy     (n, 2, 2, C, g, g) fp16: plain or mirrored, mean or log-variance
        labels.npy      (n,) int64, -1 where the images have none
        tokens.npy      (n, M, E) floats, where the images have tokens
        state.npy       (n,) uint8, TO_DO, DONE or UNREADABLE

    An example is a fresh sample of the posterior, (C, g, g) fp32, scaled. UserError if the folder
    is not finished, or made with another scale or for another size."""

    labels_from = "the latents"
    left_out = ""

    def __init__(self, path, size=None):
        self.path = Path(path)
        self.header = read_latents_header(path)
        self.moments = load_array(self.path / "moments.npy", mapped=True)
        state = load_array(self.path / "state.npy")
        labels = load_array(self.path / "labels.npy")
        n = state.size
        like = self.moments.shape[:3] == (n, 2, 2) and self.moments.dtype == np.float16
        like = like and self.moments.ndim == 6 and self.moments.shape[4] == self.moments.shape[5]
        like = like and labels.shape == state.shape == (n,) and labels.dtype == np.int64
        if not n or not like or labels.max() >= MOST_CLASSES:
            raise UserError(f"{path} is damaged: its arrays do not belong together; make it again")
        self.channels, self.size = self.moments.shape[3:5]
        to_do = np.count_nonzero(state == TO_DO)
        if to_do:
            raise UserError(
                f"{to_do} of {n} latents in {path} are still to be made; run the same "
                f"data.py latents command again"
            )
        if self.header["scale"] != VAE.scale:
            raise UserError(f"{path} has the scale {short(self.header['scale'])}, not {VAE.scale}")
        if size not in (None, self.size):
            raise UserError(
                f"{path} holds latents of {self.size} x {self.size}, and this network takes {size} "
                f"x {size}; choose another preset, or make them with another --size"
            )
        self.kept = np.flatnonzero(state == DONE)  # place -> index in the files
        if not len(self.kept):
            raise UserError(f"{path} holds no latents: none of its images could be read")
        labels = labels[self.kept]
        self.labels = None if (labels < 0).any() else labels
        self.tokens = self.kept_tokens(n)
        self.class_names = self.header.get("class_names", [])

    num_classes = ImageDataset.num_classes
    summary = ImageDataset.summary

    def kept_tokens(self, n):
        """Of the images that are kept of n, or None if they have no tokens."""
        file = self.path / "tokens.npy"
        if not file.exists():
            return None
        tokens = as_tokens(load_array(file, mapped=True), self.path, file.name)
        if len(tokens) != n:
            raise UserError(f"{file} has tokens of {len(tokens)} images, not {n}; make it again")
        return tokens if len(self.kept) == n else np.array(tokens[self.kept])

    def __len__(self):
        return len(self.kept)

    def name(self, i):
        return f"latent {self.kept[i]}"

    def blank(self):
        return torch.zeros(self.channels, self.size, self.size)

    def fingerprint(self) -> str:
        """16 hex digits of what the latents were made of."""
        return content_hash(len(self), self.labels, sorted(self.header.items()))

    def example(self, i, mirrored, rng):
        moments = self.moments[self.kept[i], int(mirrored)].astype(np.float32)  # (2, C, g, g)
        if not np.isfinite(moments).all():
            raise UnreadableImage("its numbers are not finite")
        mean, logvar = torch.from_numpy(moments)
        noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32))
        return VAE.latent(mean, logvar, noise)


def load_array(path, mapped=False, mode="r"):
    """An .npy file; UserError if it is damaged."""
    with parsing(path, "an .npy file"):
        array = map_array(path, mode=mode)
        return array if mapped else np.array(array)


def read_latents_header(folder):
    header = parse_json((Path(folder) / "latents.json").read_bytes())
    whole = isinstance(header, dict) and {"vae", "scale", "size", "data"} <= header.keys()
    if not whole or header.get("format") != LATENTS or not is_names(header.get("class_names", [])):
        raise UserError(f"{folder} holds no latents of this version ({LATENTS!r}); make them again")
    return header


def is_latents(path):
    return (Path(path) / "latents.json").is_file()


def open_dataset(path: str | Path, size: int | None = None) -> ImageDataset | Latents:
    """The value of --data -> a data set of size x size images, or latents. Without a size, the
    images must all be squares as large as the first. UserError if the path is missing, empty,
    damaged or of another kind."""
    path = str(path)
    if path == "shapes":
        return Shapes(size or 32)
    if path in ("shapes-set", "outlines-set"):
        return ShapeKinds(size or 32, coloured=path == "shapes-set")
    if not os.path.isdir(path) and not os.path.isfile(path):
        raise UserError(f"there is no data at {path}; expected {KINDS}")
    if is_latents(path):
        return Latents(path, size)
    if os.path.isdir(path) or path.lower().endswith(".zip"):
        return ImageFiles(path, size)
    if path.lower().endswith(".npz"):
        return read_npz(path, size)
    if path.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return read_cifar(path, size)
    raise UserError(f"cannot tell what {path} holds; expected {KINDS}")


# -------------------------------------------------------------------------------------------------
# Reading a data set: in the order of training, or by index


class ShuffledStream(torch.utils.data.Dataset):
    """A data set in training order: place 0, 1, 2, ... without end -> example, label or tokens,
    unreadable.

    Each run of n places is one shuffle of the n images. With set_size, each run of that many places
    is a set of images of one class, none of the classes in holdout: an epoch shuffles every class
    and cuts it into sets, then shuffles the sets; what is left of a class waits for the next epoch.

    The image at a place, whether it is mirrored, and the noise of a latent depend on (seed, place)
    alone: nothing needs saving for a resume, and neither the number of processes nor of workers
    matters. An unreadable image gives way to the next one of the shuffle, in a set to one of its
    class outside the set, as long as there are any; `unreadable` lists (name, why) of those
    skipped."""

    def __init__(self, dataset, seed=0, xflip=False, set_size=0, holdout=()):
        self.dataset = dataset
        self.seed = seed
        self.xflip = xflip
        self.set_size = set_size
        self.classes = []  # the images of each class that sets are made of
        self.length = len(dataset)  # of an epoch
        if set_size:
            by_class = np.argsort(dataset.labels, kind="stable")
            _, starts = np.unique(dataset.labels[by_class], return_index=True)
            classes = np.split(by_class, starts[1:])
            self.classes = [c for c in classes if dataset.labels[c[0]] not in holdout]
            self.length = sum(len(c) // set_size * set_size for c in self.classes)
        self.epoch = None  # whose order is in memory
        self.order = None  # (length,) images
        self.members = None  # for each set, its class as it was shuffled, and where in it it begins

    def __getitem__(self, place):
        epoch, k = divmod(place, self.length)
        if epoch != self.epoch:
            self.epoch = epoch
            self.shuffle(np.random.default_rng([self.seed, epoch]))
        # Random numbers of their own for the shuffle, the mirroring and the example.
        mirrored = self.xflip and np.random.default_rng([self.seed, 1, place]).random() < 0.5
        rng = np.random.default_rng([self.seed, 2, place])
        unreadable = []
        candidates = self.candidates(k)
        for i in itertools.islice(candidates, max_unreadable(len(self.dataset)) + 1):
            try:
                label = self.label(i)
                if not np.isfinite(label).all():
                    raise UnreadableImage("its tokens are not finite")
                return self.dataset.example(i, mirrored, rng), label, unreadable
            except (UnreadableImage, OSError) as error:
                unreadable.append((self.dataset.name(i), first_line(error)))
        # The list ends the run: it is too long, or says that nothing is left of a class.
        if next(candidates, None) is None and self.set_size:
            names = dict(enumerate(self.dataset.class_names))
            label = int(self.label(i))
            unreadable.append((f"all images of class {names.get(label, label)}", NONE_LEFT))
        return self.dataset.blank(), self.label(i), unreadable

    def shuffle(self, rng):
        """Draw the order of an epoch."""
        n = self.set_size
        if not n:
            self.order = rng.permutation(self.length)
            return
        shuffled = [rng.permutation(c) for c in self.classes]
        sets = [(c, first) for c in shuffled for first in range(0, len(c) - n + 1, n)]
        self.members = [sets[k] for k in rng.permutation(len(sets))]
        self.order = np.concatenate([c[first : first + n] for c, first in self.members])

    def candidates(self, k):
        """The image at place k of the epoch, then those that stand in for it if it is unreadable,
        each in its turn."""
        if not self.set_size:
            yield from itertools.chain(self.order[k:], self.order[:k])
            return
        n = self.set_size
        members, first = self.members[k // n]
        own = members[first : first + n]
        others = np.concatenate([members[first + n :], members[:first]])
        place = k % n
        yield own[place]
        # From a place of its own for each image of the set, so that two seldom find the same.
        yield from np.roll(others, -place)
        # Now one stands in its set twice.
        yield from np.delete(own, place)

    def label(self, i):
        """Its tokens (M, E), or its class, or -1 where it has neither."""
        if self.dataset.tokens is not None:
            return as_float32(self.dataset.tokens[i])
        return np.int64(-1 if self.dataset.labels is None else self.dataset.labels[i])


def loader(dataset, batches, workers):
    """Over `batches`, an iterable of lists of places: examples (b, C, H, W), labels (b,) or tokens
    (b, M, E), unreadable. Workers send numpy arrays, through a pipe: tensors would need room in
    /dev/shm, of which a container may have very little."""
    workers = worker_count(workers)
    batches = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        prefetch_factor=4 if workers else None,
    )
    for examples, labels, unreadable in batches:
        yield torch.from_numpy(examples), torch.from_numpy(labels), unreadable


def collate(items):
    examples, labels, unreadable = zip(*items)
    return torch.stack(examples).numpy(), np.stack(labels), sum(unreadable, [])


class IndexedImages(torch.utils.data.Dataset):
    """Image i -> (i, form(image), None), or (i, name, why) where it cannot be read."""

    def __init__(self, dataset, form):
        self.dataset = dataset
        self.form = form

    def __getitem__(self, i):
        try:
            return i, self.form(self.dataset.read(i)), None
        except (UnreadableImage, OSError) as error:
            return i, self.dataset.name(i), first_line(error)

    @staticmethod
    def collate(items):
        good = [(i, image) for i, image, why in items if why is None]
        unreadable = {i: (name, why) for i, name, why in items if why is not None}
        return [i for i, _ in good], [image for _, image in good], unreadable

    @classmethod
    def batches(cls, dataset, indices, batch, workers, form=np.asarray):
        """`batch` indices at a time -> indices and images of those that can be read, and {index:
        (name, why)} of the others. form: applied to each image, in the workers."""
        return torch.utils.data.DataLoader(
            cls(dataset, form),
            batch_sampler=[indices[k : k + batch] for k in range(0, len(indices), batch)],
            num_workers=worker_count(workers),
            collate_fn=cls.collate,
            worker_init_fn=start_worker,
        )


def max_unreadable(n):
    """How many of n images may be unreadable: 1 %, at least one, never all."""
    return min(max(1, n // 100), n - 1)


NONE_LEFT = "none can be read"  # of a class, of which sets are made


class UnreadableImages:
    """Names and counts the images that cannot be read. UserError, with the list and the reasons,
    past 1 %, or where a class has none left."""

    def __init__(self, dataset, verbose=True):
        self.found = {}  # name -> why
        self.total = len(dataset)
        self.verbose = verbose

    def add(self, unreadable):
        """unreadable: (name, why) of each; those known already do not count again."""
        for name, why in unreadable:
            if name not in self.found and self.verbose:
                say(f"skipped {name}: {why}")
            self.found.setdefault(name, why)
            if why == NONE_LEFT:
                raise UserError(f"{name}: {why}; repair or replace them, or hold the class out")
        if len(self.found) > max_unreadable(self.total):
            names_by_reason = {}
            for name, why in itertools.islice(self.found.items(), 100):
                names_by_reason.setdefault(why, []).append(short(name))
            listed = [f"{', '.join(names)}: {why}" for why, names in names_by_reason.items()]
            more = "; ..." if len(self.found) > 100 else ""
            raise UserError(
                f"{len(self.found)} of {self.total} images cannot be read, more than 1 %; repair "
                f"or replace them: {'; '.join(listed)}{more}"
            )


# -------------------------------------------------------------------------------------------------
# Augmentation for small data sets (EDM, App. F.2), of whole batches, on their device


def augment(x, p):
    """EDM's pipeline: a flip left to right for half of the images, and with probability p each
        a flip upside down,
        a change of size by 2^(0.2 n), n ~ N(0, 1),
        a rotation by any angle,
        a stretch by 2^(0.2 n) along an axis (any axis, half of the time) and as much a squeeze
        across it,
        a shift by 0.125 n of the size.
    x (B, C, S, S) -> the same, and labels (B, 9) that say what was done: both flips, n of the size,
    cos - 1 and sin of the rotation, n of the stretch times cos and sin of its axis, n of the shift.
    """
    B = len(x)

    # Drawn on the CPU, which must know how far the images move, and need not ask the GPU.
    def sometimes(values, probability=p):
        drawn = torch.rand(B) < probability
        return torch.where(drawn.view(-1, *[1] * (values.dim() - 1)), values, 0)

    def normal(*shape):
        return torch.randn(B, *shape, dtype=x.dtype)

    def angle():
        return (torch.rand(B, dtype=x.dtype) * 2 - 1) * math.pi

    flip_x = sometimes(torch.randint(2, (B,)), p * 1e8)  # always, unless p is 0
    flip_y = sometimes(torch.randint(2, (B,)))
    size = sometimes(normal())  # (B,), as are the others
    turn = sometimes(angle())
    stretch = sometimes(normal())
    shift = sometimes(normal(2))  # (B, 2)
    axis = sometimes(angle(), 0.5)
    axis = torch.where(stretch == 0, 0, axis)  # then the matrix of no change is exactly 1
    along = 2 ** (0.2 * stretch)
    stretched = torch.diag_embed(torch.stack([1 / along, along], 1))  # (B, 2, 2)
    matrix = rotation(turn) @ rotation(-axis) @ stretched @ rotation(axis)
    matrix = matrix / (2 ** (0.2 * size)).view(-1, 1, 1)
    x = transform(x, flip_x, flip_y, matrix, 0.125 * x.shape[-1] * shift)
    labels = [flip_x, flip_y, size, turn.cos() - 1, turn.sin()]
    labels += [stretch * axis.cos(), stretch * axis.sin(), *shift.unbind(1)]
    return x, to_device(torch.stack(labels, 1).to(x.dtype), x.device)


def rotation(angle):
    """(B,) -> (B, 2, 2)"""
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    return rows.view(-1, 2, 2)


def transform(x, flip_x, flip_y, matrix, shift):
    """Mirror (B,) where set, then move: position v, in pixels from the middle, x before y, shows
    what was at matrix (B, 2, 2) times (v - shift (B, 2)). x (B, C, S, S), reflected at its borders;
    sampled at twice the resolution, as a bilinear warp blurs and aliases. All but x lie on the
    CPU."""
    flip_x, flip_y = [
        to_device(flip.bool().view(-1, 1, 1, 1), x.device) for flip in (flip_x, flip_y)
    ]
    x = torch.where(flip_x, x.flip(3), x)
    x = torch.where(flip_y, x.flip(2), x)
    if not shift.any() and torch.equal(matrix, torch.eye(2).to(matrix).expand_as(matrix)):
        return x
    side = 2 * x.shape[-1] + TAPS - 2  # of what downsample needs
    v = torch.arange(side, dtype=x.dtype) - (side - 1) / 2 + OFF_CENTRE
    # The map is linear, so the corners are taken from farthest away.
    reach = warp_sources(v[[0, -1]], matrix, shift).abs().max().item()
    v, matrix, shift = [to_device(values, x.device) for values in (v, matrix, shift)]
    u = warp_sources(v, matrix, shift)  # (B, 2S + 10, 2S + 10, 2)
    x = upsample(pad_to_reach(x, reach))  # (B, C, 2S' + 10, 2S' + 10), S' = S + twice the padding
    x = warp(x, u)  # (B, C, 2S + 10, 2S + 10)
    return downsample(x)  # (B, C, S, S)


# The sym6 wavelet's low-pass filter. It is orthogonal to itself shifted by 2, so an image that is
# upsampled and downsampled, without a warp between, comes back exactly. It moves an image by its
# centre of mass, which is not the middle of its 12 taps: OFF_CENTRE, in samples.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
TAPS = len(SYM6)
OFF_CENTRE = (TAPS - 1) / 2 - sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)


def sym6(x):
    """The filter for each channel of x (B, C, H, W), along its width: (C, 1, 1, 12)."""
    return sym6_on(x.device, x.dtype).expand(x.shape[1], 1, 1, TAPS)


@functools.lru_cache
def sym6_on(device, dtype):
    """(12,), copied to the device once."""
    return torch.tensor(SYM6, dtype=dtype).to(device)


def upsample(x):
    """(B, C, H, W) -> (B, C, 2H + 10, 2W + 10): twice the samples, and the filter's reach."""
    x = F.conv_transpose2d(x, sym6(x), stride=(1, 2), groups=x.shape[1])
    return F.conv_transpose2d(x, sym6(x).mT, stride=(2, 1), groups=x.shape[1])


def downsample(x):
    """(B, C, 2H + 10, 2W + 10) -> (B, C, H, W)"""
    x = F.conv2d(x, sym6(x), stride=(1, 2), groups=x.shape[1])
    return F.conv2d(x, sym6(x).mT, stride=(2, 1), groups=x.shape[1])


def warp_sources(v, matrix, shift):
    """The samples that those of the rows and columns v (n,) are taken from: (B, n, n, 2). Both are
    counted at twice the resolution from the middle, x before y."""
    both = torch.stack(torch.meshgrid(v, v, indexing="xy"), -1).view(1, -1, 2)  # (1, n^2, 2)
    u = (both - 2 * shift[:, None]) @ matrix.mT
    return u.view(-1, len(v), len(v), 2)


def pad_to_reach(x, reach):
    """Reflect x (B, C, S, S) at its borders as far as samples are taken from, counted as in
    warp_sources, and the filter around them."""
    S = x.shape[-1]
    beyond = reach - (2 * S + TAPS - 3) / 2  # in samples
    margin = math.ceil(beyond / 2) + (TAPS - 2) // 2  # in pixels
    margin = min(max(margin, 0), S - 1)  # F.pad reflects no further
    return F.pad(x, [margin] * 4, mode="reflect")


def warp(x, u):
    """The samples of x (B, C, L, L) at u (B, side, side, 2) -> (B, C, side, side)."""
    u = 2 * (u - OFF_CENTRE) / x.shape[-1]  # as grid_sample counts, from -1 to 1
    return F.grid_sample(x, u, mode="bilinear", align_corners=False)


# -------------------------------------------------------------------------------------------------
# Tensors to images


def to_network(x):
    """A batch of examples as networks take them: pixels (B, 3, H, W) uint8 -> [-1, 1]; latents
    stay as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 numpy."""
    x = (x.float().clamp(-1, 1) + 1) * 127.5
    return x.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images):
    """(B, H, W, 3) uint8 numpy -> (B, 3, H, W) in [-1, 1]."""
    return to_network(torch.from_numpy(images).permute(0, 3, 1, 2))


def image_grid(images, columns=None, captions=None):
    """uint8 (n, H, W, 3) -> one PIL image, row by row; images under 64 pixels are enlarged.
    captions: a text for each; they stand above a row, unless the row above has the same."""
    n, height, width, _ = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = [range(k, min(k + columns, n)) for k in range(0, n, columns)]
    texts = [[captions[k] for k in row] if captions else [] for row in rows]
    captioned = [text != above[: len(text)] for above, text in zip([[], *texts], texts)]
    zoom = max(1, 64 // height)
    gap = 2  # pixels of white
    line = 13  # height of a caption
    step_x = zoom * width + gap
    step_y = zoom * height + gap
    size = columns * step_x + gap, len(rows) * step_y + gap + line * sum(captioned)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    top = gap
    for row, text, shown in zip(rows, texts, captioned):
        for k, caption in enumerate(text if shown else []):
            # The font has no other letters; what is too long is cut.
            caption = unicodedata.normalize("NFKD", short(caption)).encode("ascii", "ignore")
            caption = caption.decode()
            while caption and pen.textlength(caption, font) > step_x:
                caption = caption[:-1]
            pen.text((gap + k * step_x, top), caption, "black", font)
        top += line * shown
        for k, i in enumerate(row):
            image = Image.fromarray(images[i]).resize(
                (zoom * width, zoom * height), Image.Resampling.NEAREST
            )
            sheet.paste(image, (gap + k * step_x, top))
        top += step_y
    return sheet


def save_grid(
    images: np.ndarray,
    path: str | Path,
    columns: int | None = None,
    captions: list[str] | None = None,
) -> None:
    """uint8 (n, H, W, 3) -> an image file of all of them, as image_grid arranges them."""
    save_image(image_grid(images, columns, captions), path)


def save_gif(frames, path, columns=None, captions=None):
    """A list of uint8 (n, H, W, 3) -> an animated .gif of their grids: three seconds, and two more
    on the last."""
    first, *rest = [image_grid(images, columns, captions) for images in frames]
    duration = [max(20, 3000 // len(frames))] * len(rest) + [2000]  # milliseconds
    save_image(first, path, save_all=True, append_images=rest, duration=duration, loop=0)


def save_image(image, path, **options):
    """PIL image -> a file in the format of its suffix (PNG if unknown), which appears whole."""
    known = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    with atomic_write(path) as temporary:
        image.save(temporary, format=known, **options)


# -------------------------------------------------------------------------------------------------
# python data.py prepare SRC DEST.zip --size 64


def prepare(source, dest, size, workers=2):
    """Crop, resize and pack any images that training reads into an uncompressed .zip of PNGs with
    a dataset.json. The file appears when it is complete; UserError if there is one already."""
    dest = Path(dest)
    if rank_and_size()[1] > 1:
        raise UserError("data.py prepare is for a single process; start it without torchrun")
    if dest.suffix != ".zip":
        raise UserError(f"{dest} does not end in .zip, which is the format written there")
    if dest.exists():
        raise UserError(f"{dest} exists; remove it or choose another name")
    check_parent(dest)
    dataset = open_images(source, size)
    if dataset.tokens is not None:
        raise UserError(f"{source} has tokens, which a .zip cannot hold; train on it as it is")
    say(dataset.summary())
    labels = []
    unreadable = UnreadableImages(dataset)
    everything = range(len(dataset))
    with atomic_write(dest) as temporary, zipfile.ZipFile(temporary, "w") as out:
        for indices, pngs, bad in IndexedImages.batches(dataset, everything, 64, workers, as_png):
            unreadable.add(bad.values())
            for i, png in zip(indices, pngs):
                name = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                out.writestr(name, png)
                labels.append([name, None if dataset.labels is None else int(dataset.labels[i])])
            live_line(f"{len(labels)} of {len(dataset)} images")
        known = labels if dataset.labels is not None else None
        content = {"labels": known, "class_names": list(dataset.class_names)}
        out.writestr("dataset.json", json.dumps(content))
    say(
        f"{dest}: {len(labels)} images of {size} x {size}, {dataset.num_classes} classes, "
        f"{len(unreadable.found)} unreadable images left out"
    )


def check_parent(dest):
    if not dest.parent.is_dir():
        raise UserError(f"the folder {dest.parent} for {dest.name} does not exist; make it first")


def as_png(image):
    out = io.BytesIO()
    # As in EDM: uncompressed ones are twice as large, and written and read in half of the time.
    Image.fromarray(image).save(out, "png", compress_level=0)
    return out.getvalue()


def open_images(source, size=None):
    """open_dataset for commands that take images alone."""
    if is_latents(source):
        raise UserError(f"{source} holds latents, and this command takes images")
    return open_dataset(source, size)


# -------------------------------------------------------------------------------------------------
# python data.py latents SRC DEST --vae FILE --size 256, or on several GPUs torchrun data.py latents


def cache_latents(source, dest, vae, size, batch=8, workers=2, bf16=False):
    """The posterior of each image and of its mirror image, in a folder that `Latents` reads; fp16,
    whose rounding is far below the posterior's own deviation. The same command again resumes. All
    processes, on one machine, map the same files and write each its own images."""
    dest = Path(dest)
    rank, ranks = rank_and_size()
    if ranks != int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):
        raise UserError(
            f"{ranks} processes on several machines cannot write to one folder; start them on one"
        )
    check_parent(dest)
    vae = load_vae(vae, default_device())
    if size % vae.factor:
        raise UserError(f"--size {size} is not a multiple of {vae.factor}, as this VAE needs it")
    dataset = open_images(source, size)
    if rank == 0:
        say(dataset.summary())
    precision = "bf16" if bf16 else "fp32"
    made_of = {"vae": vae.fingerprint(), "scale": VAE.scale, "data": dataset.fingerprint()}
    header = {"format": LATENTS, "size": size, "precision": precision, **made_of}
    header["class_names"] = list(dataset.class_names)
    grid = size // vae.factor
    shape = (len(dataset), 2, 2, vae.post_quant_conv.in_channels, grid, grid)
    on_rank_0(lambda: check_folder(dest, header))
    with exclusive(dest):
        if on_rank_0(lambda: start_or_resume(dest, header, shape, dataset)):
            if rank == 0:
                say(f"{dest} is complete")
            return
        make_latents(dest, dataset, vae, batch, workers, precision)
        on_rank_0(lambda: check_finished(dest, dataset, size))


def check_folder(dest, header):
    """UserError if the folder holds anything but latents of the same images, VAE and size."""
    if is_latents(dest):
        found = read_latents_header(dest)
        found.setdefault("class_names", header["class_names"])  # earlier versions had none
        differ = [key for key in header if found.get(key) != header[key]]
        if differ:
            other = " and ".join(differ)
            raise UserError(
                f"{dest} was made of another {other}; remove it, or choose another name"
            )
    elif dest.exists():
        # A run that was stopped right at its start has left some of these.
        ours = {*UNSEEN, "moments.npy", "labels.npy", "tokens.npy", "state.npy"}
        if not dest.is_dir() or {path.name for path in dest.iterdir()} - ours:
            raise UserError(f"{dest} exists and holds no latents; remove it or choose another name")


def start_or_resume(dest, header, shape, dataset):
    """Make the files, of which the header is the last, unless they are there -> are all done?"""
    check_folder(dest, header)  # now that no other process can change it
    if is_latents(dest):
        return bool(load_array(dest / "state.npy").all())
    allocate(dest / "moments.npy", shape, np.float16)
    labels = dataset.labels
    np.save(dest / "labels.npy", np.full(shape[0], -1, np.int64) if labels is None else labels)
    (dest / "tokens.npy").unlink(missing_ok=True)  # of a first start of other images
    if dataset.tokens is not None:
        np.save(dest / "tokens.npy", dataset.tokens)
    np.save(dest / "state.npy", np.full(shape[0], TO_DO, np.uint8))
    write_text(dest / "latents.json", json.dumps(header, indent=1))
    return False


def allocate(path, shape, dtype):
    """An .npy file of zeros, with room on the disk for all of it: a full disk is an error here, and
    would end the process (SIGBUS) when the mapped file is written to."""
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    size = path.stat().st_size
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        try:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                return  # a file system that cannot promise it
            why = f"no room for {size / 1e9:.3g} GB of latents ({error.strerror})"
            raise UserError(why) from None


def make_latents(folder, dataset, vae, batch, workers, precision):
    """This process's share of the latents that are not done yet."""
    rank, ranks = rank_and_size()
    moments = load_array(folder / "moments.npy", mapped=True, mode="r+")
    state = load_array(folder / "state.npy", mapped=True, mode="r+")
    mine = np.flatnonzero(state != DONE)  # unreadable images may have been repaired
    # Whole batches each, so that batches, and with them the last bits, are those of one process.
    mine = mine[mine // batch % ranks == rank].tolist()
    state[mine] = TO_DO
    unreadable = UnreadableImages(dataset)
    start = saved = time.time()
    done_before = np.count_nonzero(state == DONE)
    fresh = []  # encoded, but perhaps not on the disk yet
    device = vae.quant_conv.weight.device
    for found in lockstep(IndexedImages.batches(dataset, mine, batch, workers), device):
        if found is not None:  # None: only other processes have some left
            indices, images, bad = found
            if indices:
                moments[indices] = posteriors(vae, np.stack(images), precision)
            unreadable.add(bad.values())
            state[list(bad)] = UNREADABLE
            fresh += indices
        if time.time() - saved > 5:
            moments.flush()  # an image counts as done once it is on the disk
            state[fresh] = DONE
            fresh = []
            saved = time.time()
        if rank == 0:
            done = np.count_nonzero(state == DONE)
            rate = (done - done_before) / (time.time() - start)
            live_line(f"{done} of {len(state)} images, {rate:.1f} images/s")
    moments.flush()
    state[fresh] = DONE
    state.flush()


@torch.no_grad()
def posteriors(vae, images, precision):
    """uint8 (b, size, size, 3) -> numpy (b, 2, 2, C, g, g), as in moments.npy but fp32."""
    device = vae.quant_conv.weight.device
    x = to_float(images).to(device)
    with autocast(precision, device):
        plain = torch.stack(vae.posterior(x), dim=1)  # (b, 2, C, g, g)
        mirrored = torch.stack(vae.posterior(x.flip(3)), dim=1)
    return torch.stack([plain, mirrored], dim=1).cpu().numpy()


def check_finished(folder, dataset, size):
    """Of all processes: UserError if too many images were unreadable, else a summary."""
    state = load_array(folder / "state.npy", mapped=True, mode="r+")
    lost = np.flatnonzero(state == UNREADABLE)
    unreadable = UnreadableImages(dataset, verbose=False)
    if len(lost) > max_unreadable(len(dataset)):
        state[lost] = TO_DO  # for the same command, once they are repaired
    unreadable.add((dataset.name(i), "see above") for i in lost)
    say(
        f"{folder}: latents of {len(state) - len(lost)} images of {size} x {size}, {len(lost)} "
        f"unreadable images left out"
    )


def main():
    parser = Parser(prog="data.py", description="Prepare data for training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare|latents")
    text = "crop, resize and pack images into a .zip"
    command = commands.add_parser("prepare", help=text, description=text)
    command.add_argument("source", metavar="SRC", help=IMAGE_KINDS)
    command.add_argument("dest", metavar="DEST.zip", help="the file to write")
    common_flags(command)
    text = "encode images into a folder, for training latent networks"
    command = commands.add_parser("latents", help=text, description=text)
    command.add_argument("source", metavar="SRC", help=IMAGE_KINDS)
    command.add_argument("dest", metavar="DEST", help="a new folder, or that of a stopped run")
    common_flags(command)
    command.add_argument(
        "--vae", metavar="FILE", required=True, help="sd-vae-ft-ema or -mse, .safetensors or .bin"
    )
    command.add_argument("--batch", type=at_least(1), default=8, help="images at a time")
    command.add_argument("--bf16", action="store_true", help="encode in bf16 instead of fp32")
    add_device(command)
    options = vars(parser.parse_args())
    device = options.pop("device", "cpu")
    if options.pop("command") == "prepare":
        run_command(parser, lambda: prepare(**options), "pass fewer --workers")
    else:
        advice = "pass a smaller --batch", "the same command resumes"
        run_command(parser, lambda: cache_latents(**options), *advice, device)


def common_flags(command):
    command.add_argument(
        "--size", type=at_least(1, 2**14), required=True, help="height and width in pixels"
    )
    command.add_argument(
        "--workers", type=at_least(0), default=2, help="processes that read images"
    )


if __name__ == "__main__":
    main()
