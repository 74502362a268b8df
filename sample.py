"""Images from a checkpoint, and scores of images.

    python sample.py --ckpt FILE                        generate images
    python sample.py --images PATH --score REF.npz      score images that exist
    python sample.py --reference DATA --out REF.npz     make a reference for --score
    python sample.py --bench                            time the sampling

In this order: networks from files, what images are to show, generation, many images in a folder,
the Inception network, scores, the four commands. Image i depends on (seed, i) alone: all of its
noise comes from a generator of its own, and a support of pictures from a draw of its own, so it
does not change (but for rounding) with the batch size, the number of images, the number of
processes or the order in which they are generated.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import configs
import data
import diffit
import diffusion
from configs import SAMPLING, Config, Parser, UserError, at_least, autocast, rank_and_size

# -------------------------------------------------------------------------------------------------
# Networks from files


def load_model(
    path: str, preset: str = "", ema: bool = True, device: torch.device | str | None = None
) -> tuple[nn.Module, Config]:
    """A checkpoint of train.py, or published weights of the network of a preset (a DiffiT
    .safetensors, a DiT .pt) -> the network in eval mode, and its Config. With ema, the EMA weights
    where there are some; without, those of the optimizer. On a CPU the file itself, memory-mapped,
    is the only copy. path may be the folder of a run, for its last.pt. The classes' names, as far
    as the file knows them, are in model.class_names. UserError if the file is something else."""
    path = data.last_in(path)
    content = data.read_file(path)
    weights, kind = data.weights_in(content, path, ema)
    if "post_quant_conv.weight" in weights:
        raise UserError(f"{path} is a VAE; pass it as --vae, and a network as --ckpt")
    cfg = config_of(content, path, preset)
    with torch.device("meta"):
        model = diffit.build(cfg)
    data.load_weights(model, weights, path, assign=True)
    names = content.get("class_names", [])
    model.class_names = names if data.is_names(names) else []
    model.provenance = f"{kind} weights of {path}"
    if rank_and_size()[0] == 0:
        configs.say(f"{model.provenance}, {preset or 'a checkpoint of train.py'}")
    return model.to(device or configs.default_device()).eval().requires_grad_(False), cfg


def config_of(content, path, preset):
    """The Config of what read_file returned: a checkpoint knows its own, other weights need a
    preset. UserError where it is the other way round."""
    if content.get("format") == data.FORMAT:
        if not isinstance(content.get("config"), dict):
            raise UserError(f"{path} is damaged: it lacks its configuration")
        if preset:
            raise UserError(
                f"--preset {preset}: {path} is a checkpoint of train.py, which knows its own "
                f"network; leave --preset out"
            )
        return configs.config_from_dict(content["config"], path)
    if not preset:
        raise UserError(
            f"{path} does not say which network it holds; pass --preset (python configs.py lists "
            f"them: imagenet256 and imagenet512 for DiffiT, dit-xl-2 and dit-xl-2-512 for DiT)"
        )
    return configs.config_from_preset(preset, {})


def open_vae(cfg):
    """The VAE that cfg names, or None for networks of pixels. UserError if it is needed and none is
    named, or if its latents do not fit."""
    if cfg.in_channels == 3:
        return None
    if not cfg.vae:
        raise UserError(
            f"this network generates latents of {cfg.in_channels} channels; pass --vae FILE "
            f"(sd-vae-ft-ema or sd-vae-ft-mse, see the README) to decode them"
        )
    vae = data.load_vae(cfg.vae, configs.default_device())
    channels = vae.post_quant_conv.in_channels
    if channels != cfg.in_channels:
        raise UserError(
            f"--vae {cfg.vae} has latents of {channels} channels, and this network generates "
            f"{cfg.in_channels}"
        )
    return vae


# -------------------------------------------------------------------------------------------------
# What images are to show: classes, given tokens, or the kind of a few pictures. Each of the three
# says for image i, from (seed, i) alone,
#
#     labels(indices, seed)       the classes, (n,) int64, or None
#     y(model, indices, seed)     the y of the network, or None
#     cells(made, indices, seed)  of the images made: what a grid shows, in how many columns (None:
#                                 a square), and captions (None: without)
#     count                       how many images a grid has unless told otherwise
#     settings(seed)              what all of it depends on, as JSON


class Classes:
    """Images of classes: of those named, in turn, or of all. names: of the classes, where they are
    known. UserError for a class that the network does not have."""

    def __init__(self, cfg, classes=None, names=()):
        self.total = cfg.num_classes
        self.chosen = classes
        self.names = dict(enumerate(names))
        if classes and not 0 <= min(classes) <= max(classes) < self.total:
            raise UserError(f"classes {classes}: this network has 0 to {self.total - 1}")
        self.count = 4 * (self.columns(1) or 9)

    def order(self, seed):
        """All classes, or those named: in their own order if a grid has a column for each, else
        shuffled."""
        if self.chosen or self.total <= COLUMNS:
            return self.chosen or list(range(self.total))
        return np.random.default_rng(seed).permutation(self.total).tolist()

    def labels(self, indices, seed):
        order = np.array(self.order(seed))
        return order[np.array(indices) % len(order)] if len(order) else None

    def y(self, model, indices, seed):
        labels = self.labels(indices, seed)
        return None if labels is None else torch.from_numpy(labels).to(device_of(model))

    def captions(self, indices, seed):
        labels = self.labels(indices, seed)
        if labels is None:
            return None
        return [self.names.get(label, str(label)) for label in labels.tolist()]

    def columns(self, n):
        """Of n images: a column for each class where they are few, or several; else None."""
        count = len(self.chosen or range(self.total))
        return count * max(1, math.isqrt(n) // count) if 1 < count <= COLUMNS else None

    def cells(self, made, indices, seed):
        return made, self.columns(len(made)), self.captions(indices, seed)

    def settings(self, seed):
        return {"classes": self.order(seed) or None}

    def __str__(self):
        return f"classes {','.join(map(str, self.chosen))}" if self.chosen else ""


COLUMNS = 16  # of a grid with a column for each class


class Tokens:
    """Images of given tokens (n, M, E), in turn. path: where they are from, for messages."""

    count = 36

    def __init__(self, tokens, path="a program"):
        self.tokens = tokens
        self.path = path

    def labels(self, indices, seed):
        return None

    def y(self, model, indices, seed):
        mine = self.tokens[np.array(indices) % len(self.tokens)]
        return torch.from_numpy(np.asarray(mine, np.float32)).to(device_of(model))

    def cells(self, made, indices, seed):
        return made, None, None

    def settings(self, seed):
        return {"tokens": data.content_hash(np.asarray(self.tokens))}

    def __str__(self):
        return f"tokens of {self.path}"


class Support:
    """Images of a kind that a few pictures show: image i of one of these classes of the data, in
    turn (by default of all), conditioned on `shots` of its pictures, drawn by (seed, i). Data
    without labels are one class. Of a single class shots may be None: all of its pictures, the same
    for each image. A network of latents has its pictures through the vae, unless the data are
    latents. UserError if a class has too few pictures, or too many for all of them. lenient: those
    that can be read will do, if they are fewer than shots."""

    def __init__(self, cfg, dataset, path, classes=None, shots=None, vae=None, lenient=False):
        self.cfg = cfg
        self.dataset = dataset
        self.path = path
        self.vae = vae
        self.classes = [None]
        members = [np.arange(len(dataset))]
        if dataset.labels is not None:
            self.classes = list(classes or np.unique(dataset.labels).tolist())
            members = [np.flatnonzero(dataset.labels == k) for k in self.classes]
        self.members = members
        self.names = dict(enumerate(dataset.class_names))
        # One support for all images, or one for each.
        self.shared = len(members) == 1 and shots in (None, len(members[0]))
        self.shots = len(members[0]) if self.shared else shots
        self.lenient = lenient or self.shared
        self.check_numbers()
        self.count = 32 if self.shared else 24
        self.picture = functools.lru_cache(512)(self.picture)
        self.strip = functools.lru_cache(GRID)(self.strip)

    def check_numbers(self):
        for k, indices in zip(self.classes, self.members):
            if len(indices) < self.shots:
                which = "" if k is None else f" of class {self.names.get(k, k)}"
                raise UserError(
                    f"{self.path} has {len(indices)} pictures{which}, and {self.shots} are to "
                    f"condition an image; add some, choose other classes, or pass --shots "
                    f"{max(1, len(indices))}"
                )
        if self.shots > MOST_SHOTS:
            raise UserError(
                f"{self.shots} pictures of {self.path} for each image are more than {MOST_SHOTS}; "
                f"pass --shots with fewer"
            )

    def picture(self, i):
        """Picture i as the network takes it (C, H, W), on the CPU; None if it cannot be read."""
        try:
            x = self.dataset.example(i, False, np.random.default_rng(i))
        except (data.UnreadableImage, OSError) as error:
            configs.say(f"skipped {self.dataset.name(i)}: {configs.first_line(error)}")
            return None
        x = data.to_network(x[None])
        if self.vae and x.shape[1] == 3:
            with torch.no_grad(), autocast("fp32", device_of(self.vae)):
                x = self.vae.latent(*self.vae.posterior(x.to(device_of(self.vae)))).cpu()
        return x[0]

    def pictures(self, i, seed):
        """The pictures for image i, (shots, C, H, W)."""
        members = self.members[i % len(self.members)]
        if not self.shared:
            members = np.random.default_rng([seed, i]).permutation(members)
        readable = (x for x in map(self.picture, members) if x is not None)
        pictures = list(itertools.islice(readable, self.shots))
        if len(pictures) < (1 if self.lenient else self.shots):
            label = self.classes[i % len(self.classes)]
            which = "" if label is None else f" of class {self.names.get(label, label)}"
            raise UserError(
                f"only {len(pictures)} of the pictures{which} in {self.path} can be read, and "
                f"{self.shots} are to condition an image; repair or replace the others"
            )
        return torch.stack(pictures)

    @torch.no_grad()
    def y(self, model, indices, seed):
        device = device_of(model)
        pictures = [self.pictures(i, seed) for i in (indices[:1] if self.shared else indices)]
        with autocast(self.cfg.precision, device):
            contexts = [model.set_encoder(x.to(device)).float().mean(0) for x in pictures]
        return torch.stack(contexts).expand(len(indices), -1, -1)

    def labels(self, indices, seed):
        labels = [self.classes[i % len(self.classes)] for i in indices]
        return None if None in labels else np.array(labels, np.int64)

    def strip(self, i, seed):
        """The pictures for image i side by side, of some of them, and a gap: (H, W', 3) uint8."""
        pictures = self.pictures(i, seed)[:SHOWN]
        shown = to_images(
            pictures.to(device_of(self.vae) if self.vae else "cpu"), self.cfg, self.vae
        )
        size = shown.shape[1]
        white = np.full((size, size, 3), 255, np.uint8)
        missing = [white] * (0 if self.shared else min(self.shots, SHOWN) - len(shown))
        return np.concatenate([*shown, *missing, white[:, : size // 8]], axis=1)

    def cells(self, made, indices, seed):
        """Each image beside its pictures, or rows of eight images beside the pictures of all."""
        each = 8 if self.shared else 1
        white = np.full_like(made[0], 255)
        made = [*made] + [white] * (-len(made) % each)
        apart = white[:, : len(white) // 2]  # from the next cell
        cells = [
            np.concatenate([self.strip(indices[k], seed), *made[k : k + each], apart], axis=1)
            for k in range(0, len(made), each)
        ]
        labels = self.labels(indices, seed)
        if self.shared or labels is None:
            captions = None
        else:
            captions = [self.names.get(k, str(k)) for k in labels.tolist()]
        # About as wide as high.
        columns = 1 if self.shared else max(1, round(math.sqrt(len(cells) / (self.shots + 1))))
        return np.stack(cells), columns, captions

    def settings(self, seed):
        # Of a few pictures all of their bytes; a fingerprint knows some names and files.
        pictures = self.pictures(0, seed).numpy() if self.shared else None
        support = data.content_hash(self.dataset.fingerprint(), pictures)
        return {"support": support, "classes": self.classes, "shots": self.shots}

    def __str__(self):
        labels = f", classes {','.join(map(str, self.classes))}" * (None not in self.classes)
        return f"{self.shots} pictures each of {self.path}{labels}"


SHOWN = 8  # pictures of a support in a grid
MOST_SHOTS = 1000


def device_of(model):
    return next(model.parameters()).device


def shown_in_training(cfg, dataset, vae=None):
    """What the grids and scores of a run show: the classes, the tokens of its data in turn, or
    classes held out (if none is, all), as far as they have enough images to tell one."""
    if cfg.set_size:
        shots = cfg.set_size - 1
        counts = collections.Counter(dataset.labels.tolist())
        enough = [k for k in sorted(counts) if counts[k] >= shots]
        classes = [k for k in enough if k in cfg.holdout]
        return Support(cfg, dataset, cfg.data, classes or enough, shots, vae, lenient=True)
    if cfg.token_width:
        return Tokens(dataset.tokens, cfg.data)
    return Classes(cfg, names=dataset.class_names)


# -------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def generate(
    model: nn.Module,
    cfg: Config,
    indices: range | list[int],
    shown: Classes | Tokens | Support | None = None,
    seed: int = 0,
    batch: int = 64,
    watch=None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Generate the images with these indices, as cfg's sampling fields say: yields x (b, C, H, W)
    fp32 and labels (b,), or None without classes. shown: by default all classes. watch(level, x):
    called at each noise level."""
    shown = shown or Classes(cfg)
    device = device_of(model)
    shape = cfg.in_channels, cfg.input_size, cfg.input_size
    process = diffusion.build(cfg)
    levels = process.levels(cfg.sampling_steps)
    scale = guidance_scale(cfg, process)
    sampler = getattr(diffusion, cfg.sampler)

    for first in range(0, len(indices), batch):
        chunk = indices[first : first + batch]
        generators = [torch.Generator().manual_seed(configs.seed_from(seed, i)) for i in chunk]

        def noise():  # (b, C, H, W): the next of each image's own
            x = [torch.randn(shape, generator=generator) for generator in generators]
            return configs.to_device(torch.stack(x), device)

        # The prior and every random step draw from these, image by image.
        y = shown.y(model, chunk, seed)
        f = diffusion.guided(model, y, scale, cfg.cfg_channels or None, cfg.cfg_exact)
        options = sampler_options(cfg, noise)
        with autocast(cfg.precision, device):
            x = process.prior(noise(), levels[0])
            x = sampler(process, f, x, levels, clip=cfg.clip_denoised, watch=watch, **options)
        if not x.isfinite().all():
            configs.say(
                f"images {chunk[0]} to {chunk[-1]} are not finite numbers; are the tokens or the "
                f"guidance far larger than in training?"
            )
        labels = shown.labels(chunk, seed)
        yield x, None if labels is None else torch.from_numpy(labels).to(device)


def guidance_scale(cfg, process):
    """The scale of guidance: a number, or a function of t."""
    scale = cfg.cfg_scale
    if scale != 1 and cfg.cfg_schedule == "power-cosine":
        scale = diffusion.power_cosine(scale, cfg.diffusion_steps)
    if scale != 1 and cfg.cfg_interval:
        scale = diffusion.interval(scale, *cfg.cfg_interval, process)
    return scale


def sampler_options(cfg, noise):
    """The arguments that cfg's sampler takes and others do not."""
    churn = dict(churn=cfg.churn, churn_interval=cfg.churn_interval, churn_noise=cfg.churn_noise)
    options = {
        "ddpm": dict(noise=noise),
        "ddim": dict(noise=noise, eta=cfg.eta),
        "heun": dict(noise=noise, **churn),
        "dpmpp": {},
    }
    return options[cfg.sampler]


def to_images(x, cfg, vae=None):
    """A network's samples (b, C, H, W) -> images (b, height, width, 3) uint8."""
    if vae is not None:
        precision = "fp32" if cfg.precision == "fp16" else cfg.precision  # fp16 overflows in a VAE
        with autocast(precision, x.device):
            x = vae.decode(x)
    return data.to_uint8(x)


def image_size(cfg, vae):
    """Height and width, in pixels, of the images that to_images returns."""
    return cfg.input_size * (vae.factor if vae else 1)


def provenance(cfg, weights, vae_hash="", seed=0, shown=""):
    """How images were generated, in one line: the weights, the VAE (its hash, where there is one),
    sampler, steps, guidance, and each other sampling field that differs from Config's default."""
    listed = {"sampler", "sampling_steps", "cfg_scale", "vae", "precision"}
    parts = [
        weights + (f" and {cfg.vae} ({vae_hash})" if vae_hash else ""),
        f"{cfg.sampler}, {cfg.sampling_steps} steps, guidance {cfg.cfg_scale:g}",
    ]
    for name in SAMPLING:
        value = getattr(cfg, name)
        if name not in listed and value != getattr(Config, name):
            parts.append(f"{name.replace('_', '-')} {value}")
    if str(shown):
        parts.append(str(shown))
    parts.append(f"seed {seed}")
    parts.append(f"in {configs.arithmetic(cfg.precision, configs.default_device())}")
    return ", ".join(parts)


def show_steps(before, cfg, after=""):
    """A function to watch one call of a sampler with: rank 0 shows each step, between two texts."""
    if rank_and_size()[0]:
        return lambda level, x: None
    steps = itertools.count(1)

    def watch(level, x):
        configs.live_line(f"{before}, step {next(steps)} of {cfg.sampling_steps}{after}")

    return watch


def save_samples(model, cfg, path, vae=None, n=None, shown=None, seed=0, batch=64):
    """A grid of images 0 to n - 1. The processes divide them, rank 0 writes; nothing but the grid
    touches the disk."""
    shown = shown or Classes(cfg)
    n = n or shown.count
    rank, size = rank_and_size()
    # Every size-th image each, so that the work is even; put together again in order.
    mine = []
    for first in range(rank, n, size * batch):
        watch = show_steps(f"{len(mine) * size} of {n} images", cfg, f", for {Path(path).name}")
        indices = range(first, min(n, first + size * batch), size)
        ((x, _),) = generate(model, cfg, indices, shown, seed, batch, watch)
        mine += [*to_images(x, cfg, vae)]
    parts = configs.all_gather_object(mine)
    images = np.stack([parts[i % size][i // size] for i in range(n)])

    def save():
        cells, columns, captions = shown.cells(images, range(n), seed)
        data.save_grid(cells, path, columns, captions)

    configs.on_rank_0(save)


def save_gif(model, cfg, path, n, vae=None, shown=None, seed=0):
    """The trajectory of images 0 to n - 1 from noise to clean: an animated .gif of at most 31
    frames."""
    shown = shown or Classes(cfg)
    process = diffusion.build(cfg)
    frames = []
    show = show_steps(f"{n} images", cfg, f", for {Path(path).name}")

    def watch(level, x):  # at the scale of a clean image
        frames.append(x / math.hypot(*process.scales(level)))
        show(level, x)

    ((x, _),) = generate(model, cfg, range(n), shown, seed, batch=n, watch=watch)
    kept = diffusion.spaced(len(frames), min(30, len(frames)))
    frames = [frames[k] for k in kept] + [x]
    cells = [shown.cells(to_images(x, cfg, vae), range(n), seed) for x in frames]
    _, columns, captions = cells[0]
    data.save_gif([images for images, *_ in cells], path, columns, captions)


# -------------------------------------------------------------------------------------------------
# Many images: a folder of PNGs, named by index. A run that was stopped resumes with those that are
# missing, with any number of processes.

SETTINGS = "settings.json"  # in the folder: what its images depend on


def check_images_folder(folder, settings):
    """UserError if the folder holds anything but images of the same settings."""
    note = folder / SETTINGS
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    if note.exists():
        theirs = data.parse_json(note.read_bytes())
        if not isinstance(theirs, dict):
            raise UserError(f"{note} is damaged; pass --dir with a new or empty folder")
        differ = "; ".join(
            f"{name} is {configs.short(theirs.get(name))} there and "
            f"{configs.short(settings.get(name))} here"
            for name in {**settings, **theirs}
            if settings.get(name) != theirs.get(name)
        )
        if differ:
            raise UserError(
                f"{folder} holds images of another run ({differ[:300]}); pass --dir with a new or "
                f"empty folder"
            )
    elif folder.exists() and (
        not folder.is_dir() or {file.name for file in folder.iterdir()} - configs.UNSEEN
    ):
        raise UserError(
            f"{folder} exists and is not a folder of images of sample.py; pass --dir with a new or "
            f"empty folder"
        )


def write_settings(folder, settings):
    check_images_folder(folder, settings)  # now that no other process can change it
    configs.write_text(folder / SETTINGS, json.dumps(settings, indent=1))


def missing_images(folder, n):
    """The indices below n that have no image yet."""
    # Files appear whole (atomic_write), but after a power failure they may be empty.
    there = {entry.name for entry in os.scandir(folder) if entry.stat().st_size}
    return [i for i in range(n) if f"{i:08}.png" not in there]


def make_images(model, cfg, vae, folder, n, shown=None, seed=0, batch=64):
    """Generate those of images 0 to n - 1 that the folder lacks, divided over the processes; all of
    them return when all images are there."""
    rank, size = rank_and_size()
    start = time.time()
    missing = configs.on_rank_0(lambda: missing_images(folder, n))
    batch = min(batch, max(1, math.ceil(len(missing) / size)))  # all processes get some
    mine = missing[rank::size]
    chunks = [mine[k : k + batch] for k in range(0, len(mine), batch)]
    done = 0
    speed = ""
    for chunk in configs.lockstep(chunks, next(model.parameters()).device):
        if chunk is None:
            continue
        watch = show_steps(f"{n - len(missing) + done} of {n} images{speed}", cfg)
        ((x, _),) = generate(model, cfg, chunk, shown, seed, batch, watch)
        for i, image in zip(chunk, to_images(x, cfg, vae)):
            # Level 1 takes a third of the time of Pillow's default, for slightly larger files.
            data.save_image(Image.fromarray(image), folder / f"{i:08}.png", compress_level=1)
        done = min(done + len(chunk) * size, len(missing))  # as if the others were as far
        speed = f", {done / (time.time() - start):.2f} images/s"
    if rank == 0:
        configs.live_line(f"{n} of {n} images{speed}")
        configs.end_live_line()


def read_images(images, n):
    """The first n images of the folder, one by one. UserError for one that is damaged."""
    for i in range(n):
        try:
            yield images.read(i)
        except data.UnreadableImage as error:
            raise UserError(
                f"{images.path / images.name(i)} cannot be read ({error}); remove it, and run the "
                f"same command again"
            ) from None


def save_npz(images, n, labels, path):
    """The first n images of the folder in the form that ADM's evaluator reads, arr_0 (n, height,
    width, 3) uint8 and arr_1 (n,) labels, without holding them in memory."""
    with configs.atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as out:
        with out.open("arr_0.npy", "w", force_zip64=True) as file:
            shape = (n, images.size, images.size, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image in read_images(images, n):
                file.write(image.tobytes())
        if labels is not None:
            with out.open("arr_1.npy", "w") as file:
                np.save(file, labels)


# -------------------------------------------------------------------------------------------------
# The network of the scores: Inception-v3 as the first FID used it

INCEPTION_HASH = "6726825d"  # how the SHA-256 of the published file begins
INCEPTION = f"pt_inception-2015-12-05-{INCEPTION_HASH}.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
RESIZES = {
    "pytorch": "resized as in pytorch-fid (bilinear to 299, half-pixel centres)",
    "tensorflow": "resized as in TensorFlow 1 (bilinear to 299, corners as centres)",
}


class ConvNorm(nn.Module):
    """ReLU(BatchNorm(Conv(x))); a kernel of (1, 7) is padded by (0, 3)."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    """3 x 3, stride 1; the padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """At 35 x 35: (B, in, 35, 35) -> (B, 224 + pool, 35, 35)."""

    def __init__(self, in_channels, pool_channels):
        super().__init__()
        self.branch1x1 = ConvNorm(in_channels, 64, 1)
        self.branch5x5_1 = ConvNorm(in_channels, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(in_channels, pool_channels, 1)

    def forward(self, x):
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        ]
        return torch.cat(branches, 1)


class InceptionB(nn.Module):
    """From 35 x 35 to 17 x 17: (B, 288, 35, 35) -> (B, 768, 17, 17)."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvNorm(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(288, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x):
        branches = [
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)


class InceptionC(nn.Module):
    """At 17 x 17, 7 x 7 convolutions in two halves: (B, 768, 17, 17) -> (B, 768, 17, 17)."""

    def __init__(self, width):
        super().__init__()
        row = dict(kernel=(1, 7), padding=(0, 3))
        column = dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, **row)
        self.branch7x7_3 = ConvNorm(width, 192, **column)
        self.branch7x7dbl_1 = ConvNorm(768, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, **column)
        self.branch7x7dbl_3 = ConvNorm(width, width, **row)
        self.branch7x7dbl_4 = ConvNorm(width, width, **column)
        self.branch7x7dbl_5 = ConvNorm(width, 192, **row)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        ]
        return torch.cat(branches, 1)


class InceptionD(nn.Module):
    """From 17 x 17 to 8 x 8: (B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)


class InceptionE(nn.Module):
    """At 8 x 8, 3 x 3 convolutions as two side by side: (B, in, 8, 8) -> (B, 2048, 8, 8). With
    max_pool, the pool is a maximum, as in the last block of the first FID's network."""

    def __init__(self, in_channels, max_pool=False):
        super().__init__()
        self.max_pool = max_pool
        row = dict(kernel=(1, 3), padding=(0, 1))
        column = dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = ConvNorm(in_channels, 320, 1)
        self.branch3x3_1 = ConvNorm(in_channels, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, **row)
        self.branch3x3_2b = ConvNorm(384, 384, **column)
        self.branch3x3dbl_1 = ConvNorm(in_channels, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, **row)
        self.branch3x3dbl_3b = ConvNorm(384, 384, **column)
        self.branch_pool = ConvNorm(in_channels, 192, 1)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """Inception-v3 as the first FID used it (Szegedy et al. 2016, Heusel et al. 2017), with the
    names of its published weights: 1008 classes, average pools that leave out the padding, a max
    pool in the last block.

    pixels (B, 3, H, W) from 0 to 255 -> pooled features (B, 2048) for FID, IS, precision and
    recall, and the spatial ones (B, 2023) of sFID: 7 channels of 17 x 17 places, ordered as ADM's
    (place, channel). resize: one of RESIZES; the evaluators of ADM and EDM follow TensorFlow."""

    pooled = 2048
    spatial = 7 * 17 * 17

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool_channels=32)
        self.Mixed_5c = InceptionA(256, pool_channels=64)
        self.Mixed_5d = InceptionA(288, pool_channels=64)
        self.Mixed_6a = InceptionB()
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(
        self, x: torch.Tensor, resize: str = "pytorch"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = resize_for_inception(x.float(), resize)                        # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)                                   # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                      # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)                                   # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                 # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                 # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]                        # (B, 7, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))                                # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                 # (B, 2048, 8, 8)
        return x.float().mean((2, 3)), spatial.permute(0, 2, 3, 1).flatten(1).float()

    def logits(self, features):
        """Class scores of pooled features as the inception score takes them: its evaluators leave
        out the bias."""
        return features @ self.fc.weight.T


def resize_for_inception(x, resize):
    """Pixels (B, 3, H, W) from 0 to 255 -> Inception's input (B, 3, 299, 299), about [-1, 1]."""
    if resize == "pytorch":
        return F.interpolate(x / 127.5 - 1, (299, 299), mode="bilinear", align_corners=False)
    # TensorFlow 1 takes output i from i * side / 299, here in the coordinates of grid_sample.
    i = torch.arange(299, device=x.device)
    rows, columns = ((2 * i * side / 299 + 1) / side - 1 for side in x.shape[2:])
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (299, 299, 2)
    grid = grid.expand(len(x), -1, -1, -1)
    x = (x - 128) / 128
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def load_inception(path="", device="cpu"):
    """The file named, or INCEPTION in the working directory or in torch.hub's cache -> Inception in
    eval mode, and the hash of its file. UserError, with the address where it is published, if there
    is none."""
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION)
    places = [path] if path else [INCEPTION, cached]
    path = next(filter(os.path.isfile, places), None)
    if path is None:
        raise UserError(
            f"there is no file {' and no '.join(places)}; FID, sFID, IS, precision and recall need "
            f"the Inception weights published as {INCEPTION_URL} (95 MB; their SHA-256 begins with "
            f"{INCEPTION_HASH}): download them into this folder, or pass --inception FILE"
        )
    net = Inception()
    state, _ = data.weights_in(data.read_file(path), path)
    # The published file lacks the batch norms' counters, which eval mode does not use.
    own = net.state_dict()
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    data.load_weights(net, {**counters, **state}, path)
    net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return net, data.file_hash(path)


# -------------------------------------------------------------------------------------------------
# Scores


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared 2-Wasserstein distance of two
    Gaussians (Heusel et al. 2017, eq. 6), in float64. mu (d,), sigma (d, d), arrays or tensors.

    With roots S = R R^T from symmetric eigenvalues, the last trace is the sum of the singular
    values of R1^T R2. (Their squares are the eigenvalues of S1 S2; a root taken from these would
    lose half of its digits.)"""
    values = (torch.as_tensor(v, dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2))
    mu1, sigma1, mu2, sigma2 = values

    def root(s):
        values, vectors = torch.linalg.eigh(s)
        return vectors * values.clamp(min=0).sqrt()

    overlap = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # not below 0 by rounding; nan stays nan


def inception_score(logits, split: int = 5000) -> float:
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016), the mean over consecutive splits of `split`
    images. logits (n, classes), in float64."""
    scores = []
    for part in torch.as_tensor(logits, dtype=torch.float64).split(split):
        p = part.softmax(1)
        divergence = p * (part.log_softmax(1) - p.mean(0).log())
        scores.append(divergence.sum(1).mean().exp().item())
    return sum(scores) / len(scores)


ROWS = 512  # of distances at a time: 100 MB for 50,000 columns


def squared_distances(a, b):
    """(n, d), (m, d) -> blocks (ROWS, m). Distances below fp32's rounding error, as between equal
    images, are 0."""
    norms = b.square().sum(1)
    for rows in a.split(ROWS):
        sums = rows.square().sum(1, keepdim=True) + norms
        d = torch.addmm(sums, rows, b.T, alpha=-2)
        yield d.masked_fill_(d < 1e-5 * sums, 0)


def squared_radii(x, k):
    """(n, d) -> (n,) from each point to its k-th nearest neighbour (the nearest is itself)."""
    k = min(k + 1, len(x))
    nearest = [d.topk(k, largest=False).values[:, -1] for d in squared_distances(x, x)]
    return torch.cat(nearest)


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019). Around each real point lies a
    ball that reaches to its k-th nearest real neighbour; precision is the share of fake points
    inside any of them, recall the same with real and fake exchanged. real (n, d), fake (m, d),
    computed in fp32 on their device."""
    centre = real.mean(0)  # |a|^2 + |b|^2 - 2ab loses fewer digits around 0
    real = (real - centre).float()
    fake = (fake - centre).float()
    # All distances are squared: only their order matters.
    real_radii = squared_radii(real, k)
    fake_radii = squared_radii(fake, k)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = []
    for radii, d in zip(real_radii.split(ROWS), squared_distances(real, fake)):
        precise |= (d <= radii[:, None]).any(0)
        recalled.append((d <= fake_radii).any(1))
    recalled = torch.cat(recalled)
    return precise.sum().item() / len(precise), recalled.sum().item() / len(recalled)


class Moments:
    """Mean and covariance of vectors (b, d) that come a batch at a time, from their number, sum and
    sum of products, in float64 (on a device without it: on the CPU)."""

    def __init__(self, d, device):
        device = device if configs.has_float64(torch.device(device)) else "cpu"
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)
        self.products = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, x):
        x = x.to(self.sum.device).double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.T, x)

    def over_all_processes(self):
        """-> mean (d,), covariance (d, d), number. Only once: it adds up the sums in place."""
        if rank_and_size()[1] > 1:
            for part in (self.n, self.sum, self.products):
                dist.all_reduce(part)
        mean = self.sum / self.n
        covariance = (self.products - self.n * mean[:, None] * mean) / (self.n - 1)
        return mean.cpu(), covariance.cpu(), int(self.n)


KEPT = 50_000  # features kept for IS, precision and recall; of more images, a random subset


def format_count(n):
    """n images, in words."""
    return f"{n} images" + (f" (IS, precision and recall of {KEPT} of them)" if n > KEPT else "")


def statistics(inception, batches, n, resize="pytorch"):
    """The features of images, summed up. batches: this process's share of n images, as [(indices,
    images (b, H, W, 3) uint8)] -> for the images of all processes a dict of
        mu (2048,), sigma (2048, 2048)       mean and covariance of the pooled features, float64
        mu_s (2023,), sigma_s (2023, 2023)   and of the spatial ones
        images                               their number
        features (KEPT at most, 2048)        pooled, fp32, ordered by index; on rank 0 only"""
    rank, size = rank_and_size()
    device = inception.fc.weight.device
    pooled = Moments(inception.pooled, device)
    spatial = Moments(inception.spatial, device)
    keep = np.zeros(n, dtype=bool)  # a random subset: a regular one would miss classes in turn
    keep[np.random.default_rng(0).permutation(n)[:KEPT]] = True
    kept = []  # the indices of `features`
    features = []
    start = time.time()
    seen = 0
    for batch in configs.lockstep(batches, device):
        if batch is None:
            continue
        indices, images = batch
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        with torch.no_grad(), autocast("fp32", device):  # without tf32, where there is any
            found, found_spatial = inception(x, resize)
        pooled.add(found)
        spatial.add(found_spatial)
        here = [k for k, i in enumerate(indices) if keep[i]]
        kept += [indices[k] for k in here]
        features.append(found.cpu()[here])
        seen += len(images) * size  # as if the other processes were as far
        if rank == 0:
            rate = seen / (time.time() - start)
            configs.live_line(f"{min(n, seen)} of {n} images seen, {rate:.1f} images/s")
    mu, sigma, images = pooled.over_all_processes()
    mu_s, sigma_s, _ = spatial.over_all_processes()
    stats = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "images": images}
    features = gather_features(kept, features)
    if rank == 0:
        configs.end_live_line()
        stats["features"] = features
    return stats


def gather_features(kept, features):
    """The features of all processes in the order of their indices; on rank 0, else None."""
    rank, size = rank_and_size()
    if size > 1:
        parts = [None] * size if rank == 0 else None
        dist.gather_object((kept, features), parts)
        if rank:
            return None
        kept = [index for part, _ in parts for index in part]
        features = [batch for _, part in parts for batch in part]
    return torch.cat(features)[np.argsort(kept)]


# -------------------------------------------------------------------------------------------------
# References: the statistics of real images, in a file

REFERENCE = "diffit reference 1"


def write_reference(path, stats, header):
    """What `statistics` returned, by the names it has in ADM's files, and what it was made from."""
    header = json.dumps({"format": REFERENCE, **header})
    with configs.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, header=header, **stats)


def read_reference(path):
    """Ours, ADM's, or any other .npz with mu and sigma -> stats, header, has_images: those of the
    entries of `statistics` that the file has; our header, or {}; whether it also holds images, in
    arr_0. UserError if it is missing, damaged or something else."""
    if not os.path.isfile(path):
        raise UserError(
            f"there is no file {path}; make a reference: "
            f"python sample.py --reference DATA --out REF.npz"
        )
    names = data.array_names(path)
    has_images = "arr_0" in names
    arrays = {name: data.read_array(path, name) for name in names if name != "arr_0"}
    if not {"mu", "sigma"} <= arrays.keys():
        advice = f"; make one of its images with --reference {path}" if has_images else ""
        raise UserError(
            f"{path} is not a reference for --score: it has no mu and sigma (it has "
            f"{', '.join(map(configs.short, [*arrays][:10]))}){advice}"
        )
    return reference_statistics(path, arrays), reference_header(path, arrays), has_images


def reference_statistics(path, arrays):
    """The arrays of a reference that `statistics` returns, as tensors. UserError if one of them has
    another shape or is not finite."""
    d = Inception.pooled
    s = Inception.spatial
    shapes = {"mu": (d,), "sigma": (d, d), "mu_s": (s,), "sigma_s": (s, s), "features": (-1, d)}
    stats = {}
    for name in shapes.keys() & arrays.keys():
        array = arrays[name]
        count = math.prod(shapes[name])
        fits = array.size and (array.size % count == 0 if count < 0 else array.size == count)
        if array.dtype.kind != "f" or not fits or not np.isfinite(array).all():
            raise UserError(
                f"{path} is not a reference for --score, or is damaged: {name} is not finite, or "
                f"is not an array of {shapes[name]} (it is {array.dtype} {array.shape})"
            )
        stats[name] = torch.from_numpy(array.reshape(shapes[name]))
    return stats


def reference_header(path, arrays):
    """The header that write_reference wrote, {} in a file made elsewhere. UserError if it is of
    another format."""
    if "header" not in arrays:
        return {}
    header = data.parse_json(str(arrays["header"]))
    known = (
        isinstance(header, dict)
        and header.get("format") == REFERENCE
        and header.get("resize") in RESIZES
        and header.get("arithmetic", "fp32") == "fp32"  # earlier versions also had bf16
        and all(isinstance(header.get(name), str) for name in ("source", "inception"))
        and all(type(header.get(name)) is int for name in ("images", "size"))
    )
    if not known:
        raise UserError(
            f"{path} is not a reference for --score: its header is not of the format "
            f"{REFERENCE!r} in fp32; make it again with --reference"
        )
    return header


def check_number(n, force, what="images"):
    """UserError below 2048 images, unless forced: fewer leave FID's covariance singular."""
    if n < 2048 and not (force and n > 1):
        raise UserError(
            f"{n} {what} are too few for a score: FID needs 2048 or more, and papers use 50000; "
            f"pass --force to score them anyway (2 at least)"
        )


def warn_of_number(n):
    if n < 50_000 and rank_and_size()[0] == 0:
        configs.say(
            f"only {n} images: fewer than the 50000 of papers raise FID; compare it only with "
            f"scores of the same number"
        )


def read_share(images, n, batch, workers):
    """This process's share of the first n images of a data set, as `statistics` takes it."""
    rank, size = rank_and_size()
    mine = range(rank, n, size)
    unreadable = data.UnreadableImages(mine)
    for indices, found, bad in data.IndexedImages.batches(images, mine, batch, workers):
        unreadable.add(bad.values())
        if indices:
            yield indices, np.stack(found)


class Scorer:
    """FID, sFID, IS, precision and recall against a reference: all processes measure their share of
    the images, and rank 0, which has the reference's numbers, compares.

    inception: as for load_inception. force: accept fewer than 2048 images. batch, workers: for the
    images of a reference without features (ADM's). resize: one of RESIZES, for a reference without
    our header (default: tensorflow). UserError if the reference or the weights are missing, or do
    not belong together."""

    def __init__(self, reference, inception="", force=False, batch=64, workers=2, resize=None):
        self.path = reference
        self.force = force
        self.inception, self.inception_hash = load_inception(inception, configs.default_device())

        def read():
            self.real, header, has_images = read_reference(reference)
            return header, data.file_hash(reference), has_images and "features" not in self.real

        header, self.hash, needs_features = configs.on_rank_0(read)
        self.resize = header.get("resize", resize or "tensorflow")
        self.size = header.get("size")
        self.source = f"made elsewhere, taken to be as in {self.resize}"
        if header:
            self.check_header(header, resize)
        if needs_features:
            images = data.read_npz(reference)
            stats = self.measure(read_share(images, len(images), batch, workers), len(images))
            self.size = images.size
            self.source += f"; precision and recall by its {len(images)} images"
            if rank_and_size()[0] == 0:
                self.real["features"] = stats["features"]

    def check_header(self, header, resize):
        """UserError if a reference of ours does not go with the flags."""
        if resize not in (None, self.resize):
            raise UserError(
                f"--resize {resize}: {self.path} was made with --resize {self.resize}, and a score "
                f"follows its reference; leave the flag out, or make another reference"
            )
        if header["inception"] != self.inception_hash:
            raise UserError(
                f"{self.path} was made with other Inception weights ({header['inception']}) than "
                f"those given ({self.inception_hash}); make it again, or pass its own as "
                f"--inception"
            )
        check_number(header["images"], self.force, f"images in {self.path}")
        size = f"{self.size} x {self.size}"
        self.source = f"made of {format_count(header['images'])} of {header['source']}, {size}"

    def check_size(self, size):
        """UserError if the images to be scored have another size than those of the reference."""
        if self.size not in (None, size):
            raise UserError(
                f"the images have {size} x {size} pixels, and those of {self.path} {self.size} x "
                f"{self.size}; scores across sizes say little: make a reference with --size {size}"
            )

    def measure(self, batches, n):
        """This process's share of n images, as for `statistics` -> its result for the images of all
        processes."""
        stats = statistics(self.inception, batches, n, self.resize)
        check_number(stats["images"], self.force)  # some may have been unreadable
        return stats

    def compare(self, fake):
        """On rank 0: the result of `measure` -> {"fid", "is", and as far as the reference has them
        "sfid", "precision", "recall"}."""
        real = self.real
        device = self.inception.fc.weight.device
        try:
            scores = {"fid": frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])}
            if {"mu_s", "sigma_s"} <= real.keys():
                gaussians = real["mu_s"], real["sigma_s"], fake["mu_s"], fake["sigma_s"]
                scores["sfid"] = frechet_distance(*gaussians)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"the covariances of {self.path} or of the images have no square root "
                f"({configs.first_line(error)}); if the file is damaged, make it again"
            ) from None
        with autocast("fp32", device):  # without tf32: distances need all digits
            features = fake["features"].to(device)
            scores["is"] = inception_score(self.inception.logits(features).cpu())
            if "features" in real:
                precision, recall = precision_recall(real["features"].float().to(device), features)
                scores["precision"] = precision
                scores["recall"] = recall
        return scores

    def provenance(self):
        """What the numbers depend on beside the images."""
        return f"against {self.path} ({self.hash}; {self.source}); " + describe_inception(
            self.inception_hash, self.resize
        )


def describe_inception(inception_hash, resize):
    """The network of a score or a reference, with a warning if it is not the published one."""
    words = f"Inception {inception_hash} in fp32, {RESIZES[resize]}"
    if not inception_hash.startswith(INCEPTION_HASH):
        words += (
            "; THESE ARE NOT THE PUBLISHED INCEPTION WEIGHTS: the scores are not meaningful, and "
            "compare with nothing but others of the same file"
        )
    return words


def format_scores(scores):
    """In one line."""
    forms = {
        "fid": "FID {:.4f}",
        "sfid": "sFID {:.4f}",
        "is": "IS {:.3f}",
        "precision": "precision {:.4f}",
        "recall": "recall {:.4f}",
    }
    return ", ".join(form.format(scores[name]) for name, form in forms.items() if name in scores)


# -------------------------------------------------------------------------------------------------
# A score for the built-in data: how many shapes a classifier recognises


def shape_accuracy(images, labels, kinds=None, coloured=None):
    """images (n, H, W, 3) uint8, labels (n,) -> the share of these shapes that a classifier names
    right, and its share of real shapes that it has not seen. It chooses among the ten of
    data.Shapes, or these kinds (a tuple) of data.ShapeKinds."""
    accuracy, real = shape_classifier(images.shape[1], kinds, coloured)
    return accuracy(data.to_float(images), labels), real


@functools.lru_cache
def shape_classifier(size, kinds=None, coloured=None, seed=0):
    """A small CNN, trained here in seconds on 8,000 shapes of a seed that training does not use ->
    accuracy(x, labels), the share of images x that it names so, and that share of 1,000 others."""
    torch.manual_seed(seed)
    train = 8000
    real = data.Shapes(size, train + 1000, seed=1_000_000 + seed)
    if kinds:
        each = math.ceil((train + 1000) / len(kinds))
        real = data.ShapeKinds(size, kinds, each, 1_000_000 + seed, coloured)
    x = data.to_float(np.stack([real.read(i) for i in range(train + 1000)]))
    classes = np.unique(real.labels)
    y = torch.from_numpy(np.searchsorted(classes, real.labels))

    def layer(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(classes))]
    net = nn.Sequential(layer(3, 32), layer(32, 64), layer(64, 128), *head)
    optimizer = torch.optim.Adam(net.parameters())
    batches = [b for _ in range(4) for b in torch.randperm(train).split(128)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, len(batches))
    for b in batches:
        # Samples are never quite clean, so the classifier trains with a little noise.
        noise = 0.05 * torch.rand(len(b), 1, 1, 1) * torch.randn_like(x[b])
        optimizer.zero_grad()
        F.cross_entropy(net(x[b] + noise), y[b]).backward()
        optimizer.step()
        schedule.step()
    net.eval()

    @torch.no_grad()
    def accuracy(x, labels):
        named = torch.cat([net(part).argmax(1) for part in x.split(500)]).numpy()
        return float((classes[named] == labels).mean())

    return accuracy, accuracy(x[train:], real.labels[train : train + 1000])


# -------------------------------------------------------------------------------------------------
# python sample.py --ckpt FILE

GRID = 400  # images of a grid at the most
GIF = 20  # and of a gif


def parse_classes(text, count, names=()):
    """'207,360', 'china,flower' (names: of the classes, as far as they are known) or 'all' -> list
    of class indices. UserError unless they are among `count` classes."""
    if text == "all":
        return list(range(count))
    number = {str(k): k for k in range(count)}
    # A name that is a number means the class of this name.
    number |= {name: k for k, name in enumerate(names[:count])}
    classes = [text] if text in number else text.split(",")  # a name may have commas and blanks
    classes = [part if part in number else part.strip() for part in classes]
    for name in classes:
        if name not in number:
            known = f" or {', '.join(map(configs.short, names[:10]))}" if names else ""
            raise UserError(
                f"--classes {text}: there is no class {name}; give all, or some of 0 to "
                f"{count - 1}{known}, separated by commas"
            )
    return [number[name] for name in classes]


def check_output(flag, path, *endings):
    """Before any work: UserError if there is something at path already, if it has another ending,
    or if its folder is missing or cannot be written to."""
    if not path:
        return
    parent = Path(path).parent
    if endings and not path.lower().endswith(endings):
        raise UserError(f"{flag} {path} must end in {' or '.join(endings)}")
    if endings and os.path.exists(path):
        raise UserError(f"{flag} {path} exists; remove it or choose another name")
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {parent} cannot be written to; choose another")


def check_flags(args):
    """UserError for outputs that cannot be written, and for flags that would be ignored. Fills in
    the default of --out."""
    if not (args.out or args.dir or args.npz or args.gif or args.score):
        names = itertools.chain(["samples.png"], (f"samples-{k}.png" for k in itertools.count(2)))
        args.out = next(name for name in names if not os.path.exists(name))
    check_output("--out", args.out, ".png", ".jpg", ".webp")
    check_output("--npz", args.npz, ".npz")
    check_output("--gif", args.gif, ".gif")
    check_output("--dir", args.dir)
    paths = [str(path) for path in (args.out, args.npz, args.gif, folder_of(args)) if path]
    support = Path(args.support or "").resolve()
    for path in paths:
        if os.path.isdir(args.support or "") and Path(path).resolve().is_relative_to(support):
            raise UserError(
                f"{path} is inside --support {args.support}, and would be one of its pictures; "
                f"choose another place"
            )
    if len(set(paths)) < len(paths):
        raise UserError(f"{', '.join(paths)}: each output needs a name of its own; choose others")
    if args.score in (None, "shapes"):
        scoring = ("force", "inception", "resize")
        unused = [configs.flag_of(name) for name in scoring if getattr(args, name)]
        if unused:
            raise UserError(f"{' and '.join(unused)} cannot be used without --score REF")
    else:
        check_number(args.num_images, args.force, "images (--num-images)")
    if args.out and args.num_images > GRID and not folder_of(args):
        raise UserError(
            f"--num-images {args.num_images} is more than a grid shows ({GRID}); pass --dir DIR or "
            f"--npz FILE, too"
        )


def folder_of(args):
    """Where the PNGs go, or None: a grid or a gif alone stays in memory."""
    if args.dir:
        return Path(args.dir)
    if args.npz:
        return Path(args.npz).with_suffix("")
    return Path("samples") if args.score else None


def with_flags(cfg, args):
    """The Config with those sampling fields that are given as flags."""
    given = {name: value for name, value in vars(args).items() if name in SAMPLING}
    return dataclasses.replace(cfg, **given)


def shown_by(args, model, cfg, vae):
    """What --classes, --tokens or --support ask for. UserError if the network takes none of it."""
    takes = "nothing; leave the flag out"
    if cfg.set_depth:
        takes = "a few pictures; pass --support PATH"
    elif cfg.token_width:
        takes = "tokens; pass --tokens FILE"
    elif cfg.num_classes:
        takes = f"one of {cfg.num_classes} classes; pass --classes, or leave it out for all"
    for flag, fits in {
        "classes": cfg.num_classes or (cfg.set_depth and args.support),
        "tokens": cfg.token_width,
        "support": cfg.set_depth,
        "shots": cfg.set_depth and args.support,
    }.items():
        if getattr(args, flag) is not None and not fits:
            raise UserError(
                f"--{flag} {getattr(args, flag)}: this network is conditioned on {takes}"
            )
    if args.support:
        return open_support(args, model, cfg, vae)
    if args.tokens:
        return Tokens(open_tokens(args.tokens, cfg), args.tokens)
    if cfg.set_depth or cfg.token_width:
        if cfg.cfg_scale != 1:
            raise UserError(
                f"this network is conditioned on {takes}, or --cfg-scale 1 for images of anything"
            )
        if rank_and_size()[0] == 0:
            configs.say(f"images of anything; this network is conditioned on {takes}")
    classes = None
    if args.classes is not None:
        classes = parse_classes(args.classes, cfg.num_classes, model.class_names)
    return Classes(cfg, classes, model.class_names)


def open_tokens(path, cfg):
    """The value of --tokens. UserError unless they are as many and as wide as the network's."""
    tokens = data.read_tokens(path)
    count, width = tokens.shape[1:]
    if (count, width) != (cfg.token_count, cfg.token_width):
        raise UserError(
            f"{path} has tokens ({count} of width {width} for each image) other than this network "
            f"takes ({cfg.token_count} of width {cfg.token_width}); make them as for its training"
        )
    return tokens


def open_support(args, model, cfg, vae):
    """The value of --support: pictures without classes, or a data set, of which those classes are
    shown by default that were held out in training, if it has the classes of the training data."""
    cached = data.is_latents(args.support)
    size = cfg.input_size if cached else image_size(cfg, vae)
    dataset = data.open_dataset(args.support, size)
    if cached:
        fits = vae and dataset.channels == cfg.in_channels
        if not fits or dataset.header["vae"] != vae.fingerprint():
            raise UserError(
                f"--support {args.support} holds latents that are not those of this network and "
                f"its VAE; pass images"
            )
    if rank_and_size()[0] == 0:
        configs.say(f"{args.support}: {dataset.summary()}")
    if dataset.labels is None:
        if args.classes is not None:
            raise UserError(
                f"--classes {args.classes}: {args.support} has no classes (sub-folders, labels); "
                f"leave the flag out"
            )
        return Support(cfg, dataset, args.support, None, args.shots, vae)
    alike = list(dataset.class_names) == list(model.class_names)
    classes = cfg.holdout if alike and {*cfg.holdout} <= {*dataset.labels.tolist()} else None
    if args.classes is not None:
        classes = parse_classes(args.classes, dataset.num_classes, dataset.class_names)
    if args.classes == "all":
        classes = None  # those that have images
    return Support(cfg, dataset, args.support, classes, args.shots or cfg.set_size - 1, vae)


def generate_command(args):
    """--ckpt FILE: images, in all the forms that were asked for, and their score."""
    check_flags(args)
    first = rank_and_size()[0] == 0  # the process that prints and writes, also once it is alone
    model, cfg = load_model(args.ckpt, args.preset, not args.no_ema)
    cfg = with_flags(cfg, args)
    vae = open_vae(cfg)
    shown = shown_by(args, model, cfg, vae)
    kinds = isinstance(shown, Support) and isinstance(shown.dataset, data.ShapeKinds)
    if args.score == "shapes" and cfg.num_classes != 10 and not kinds:
        raise UserError(
            f"--score shapes needs a network with the ten classes of shapes, or --support of a "
            f"built-in set; {args.ckpt} has {cfg.num_classes} classes"
        )
    if folder_of(args):
        many_images(args, model, cfg, vae, shown)
    elif args.out:
        n = args.num_images
        save_samples(model, cfg, args.out, vae, n, shown, args.seed, args.batch)
    if args.gif and first:
        save_gif(model, cfg, args.gif, min(args.num_images, GIF), vae, shown, args.seed)
    configs.end_live_line()
    if first:
        for path in filter(None, (folder_of(args), args.out, args.npz, args.gif)):
            print(f"wrote {path}", flush=True)


def open_scorer(args):
    return Scorer(args.score, args.inception, args.force, args.batch, args.workers, args.resize)


def many_images(args, model, cfg, vae, shown):
    """Images as PNGs in a folder; from it their score, the grid and the .npz."""
    folder = folder_of(args)
    n = args.num_images
    first = rank_and_size()[0] == 0
    scorer = None
    if args.score not in (None, "shapes"):
        scorer = open_scorer(args)
        scorer.check_size(image_size(cfg, vae))
        warn_of_number(n)
    # Of what was loaded: the file may be replaced meanwhile, as train.py does with last.pt.
    weights_hash = data.weights_hash(model)
    vae_hash = data.weights_hash(vae) if vae else ""
    settings = {name: getattr(cfg, name) for name in SAMPLING if name != "vae"}
    settings |= {"weights": weights_hash, "ema": not args.no_ema, "vae_weights": vae_hash}
    settings |= {"seed": args.seed, **shown.settings(args.seed)}
    settings["precision"] = configs.arithmetic(cfg.precision, configs.default_device())
    if any(other != settings for other in configs.all_gather_object(settings)):
        raise UserError(
            f"{args.ckpt}, or what its images depend on, was replaced while the processes read it; "
            f"start again"
        )
    configs.on_rank_0(lambda: check_images_folder(folder, settings))
    with configs.exclusive(folder):  # nothing is written before this line
        configs.on_rank_0(lambda: write_settings(folder, settings))
        make_images(model, cfg, vae, folder, n, shown, args.seed, args.batch)
    images = data.ImageFiles(folder, image_size(cfg, vae))
    images.names = [f"{i:08}.png" for i in range(n)]  # whatever else may lie there
    stats = None
    if scorer:
        stats = scorer.measure(read_share(images, n, args.batch, args.workers), n)
    configs.leave_processes()  # the rest is rank 0's, and may take long
    if not first:
        return
    labels = shown.labels(range(n), args.seed)
    weights = f"{model.provenance} ({weights_hash})"
    maker = provenance(cfg, weights, vae_hash, args.seed, shown)
    if scorer:
        print(format_scores(scorer.compare(stats)))
        print(f"  {format_count(stats['images'])} by the {maker}; {scorer.provenance()}")
    elif args.score:
        kinds = ()
        if isinstance(shown, Support):
            kinds = tuple(shown.classes), shown.dataset.coloured
        share, real = shape_accuracy(np.stack([*read_images(images, n)]), labels, *kinds)
        judge = f"a classifier that names {100 * real:.1f} % of real shapes right"
        judge += f", among {len(shown.classes)} kinds" if kinds else ""
        print(f"{100 * share:.1f} % named right\n  {n} images by the {maker}; by {judge}")
    if args.out:
        grid = np.stack([*read_images(images, min(n, GRID))])
        cells, columns, captions = shown.cells(grid, range(len(grid)), args.seed)
        data.save_grid(cells, args.out, columns, captions)
    if args.npz:
        save_npz(images, n, labels, args.npz)


# -------------------------------------------------------------------------------------------------
# python sample.py --reference DATA --out REF.npz, --images PATH --score REF.npz, --bench


def open_classes(path, size, text):
    """The images of a data set, or those of the classes in this text. UserError if there are no
    classes."""
    images = data.open_images(path, size)
    if text is None:
        return images
    if images.labels is None:
        raise UserError(f"--classes {text}: {path} has no classes; leave the flag out")
    classes = parse_classes(text, images.num_classes, images.class_names)
    return data.OfClasses(images, classes)


def reference_command(args):
    """Write the reference. UserError if DATA are not images."""
    check_output("--out", args.out, ".npz")
    images = open_classes(args.reference, args.size, args.classes)
    inception, inception_hash = load_inception(args.inception, configs.default_device())
    if rank_and_size()[0] == 0:
        configs.say(images.summary())
    start = time.time()
    batches = read_share(images, len(images), args.batch, args.workers)
    stats = statistics(inception, batches, len(images), args.resize)
    n = stats["images"]
    if not stats["mu"].isfinite().all():
        raise UserError(
            "the features of these images are not finite; are the Inception weights damaged?"
        )
    check_number(n, force=True)
    warn_of_number(n)
    if rank_and_size()[0] > 0:
        return
    header = {
        "source": args.reference
        + (f", classes {args.classes}" if args.classes else "")
        + (" (cropped and resized)" if args.size else ""),
        "images": n,
        "size": images.size,
        "inception": inception_hash,
        "resize": args.resize,
    }
    write_reference(args.out, stats, header)
    print(
        f"wrote {args.out}: statistics of {n} images ({images.size} x {images.size}), features of "
        f"{len(stats['features'])}, {n / (time.time() - start):.1f} images/s; "
        + describe_inception(inception_hash, args.resize)
    )


def score_command(args):
    """Print the scores of existing images. UserError if PATH does not hold images, or of another
    size than the reference's."""
    if args.score == "shapes":
        raise UserError("--score shapes is for samples of a --ckpt; give a reference, REF.npz")
    images = open_classes(args.images, args.size, args.classes)
    if rank_and_size()[0] == 0:
        configs.say(images.summary())
    n = len(images)
    check_number(n, args.force)
    scorer = open_scorer(args)
    scorer.check_size(images.size)
    warn_of_number(n)
    stats = scorer.measure(read_share(images, n, args.batch, args.workers), n)
    first = rank_and_size()[0] == 0
    configs.leave_processes()  # comparing may take rank 0 some minutes
    if first:
        digest = f" ({data.file_hash(args.images)})" if os.path.isfile(args.images) else ""
        digest += f", classes {args.classes}" if args.classes else ""
        resized = "cropped and resized to " if args.size else ""
        print(format_scores(scorer.compare(stats)))
        print(
            f"  {format_count(stats['images'])} of {args.images}{digest}, {resized}"
            f"{images.size} x {images.size}; {scorer.provenance()}"
        )


def bench_command(args):
    """Time the sampling of args.bench batches, after a warm-up of one. Latents stay latents."""
    if rank_and_size()[1] > 1:
        raise UserError("--bench times a single process; start it without torchrun")
    if args.ckpt:
        model, cfg = load_model(args.ckpt, args.preset, not args.no_ema)
    else:
        cfg = configs.config_from_preset(args.preset or "shapes", {})
        model = diffit.build(cfg).to(configs.default_device()).eval().requires_grad_(False)
    cfg = with_flags(cfg, args)
    device = device_of(model)
    shown = Classes(cfg)
    if model.y_embedder is not None and not cfg.num_classes:
        shown = Tokens(np.zeros((1, *model.y_embedder.shape), np.float32))
    passes = []  # images in each call of the network
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))

    def one_batch():
        passes.clear()
        list(generate(model, cfg, range(args.batch), shown, batch=args.batch))

    seconds = configs.seconds_per_call(one_batch, args.bench, device)
    each = sum(passes) / args.batch
    multiply_adds = each * diffit.measure(cfg)[1]
    speed = configs.format_speed(args.batch / seconds, multiply_adds, cfg.precision, device)
    print(
        f"{args.bench} batches of {args.batch}, {cfg.sampler}, {cfg.sampling_steps} steps, "
        f"guidance {cfg.cfg_scale:g}, {each:.1f} passes an image: {speed}"
    )


# -------------------------------------------------------------------------------------------------
# The command line: four commands, each with a parser and flags of its own


def main():
    """Run the command that the flags name; without a name, images are generated."""
    commands = {"--images": score_main, "--reference": reference_main, "--bench": bench_main}
    named = [flag.split("=")[0] for flag in sys.argv[1:]]
    command = next((commands[flag] for flag in named if flag in commands), generate_main)
    if {"-h", "--help"} & set(named):
        sys.argv[1:] = ["--help"]  # also where the flag that names the command lacks its value
    command()


def run(parser, command, if_process_lost="start the command again"):
    """Parse the flags and run the command, in all processes."""
    configs.add_device(parser)
    args = parser.parse_args()
    advice = f"pass a --batch below {args.batch}", if_process_lost
    configs.run_command(parser, lambda: command(args), *advice, args.device)


def generate_main():
    parser = Parser(
        prog="sample.py",
        usage="sample.py --ckpt FILE [--num-images N] [--out PNG] [--npz FILE] ...",
        description="Generate images from a checkpoint of train.py or from published weights. "
        "Three other commands have flags of their own: --images PATH --score REF.npz scores "
        "images that exist, --reference DATA --out REF.npz makes a reference, --bench 3 times the "
        "sampling; --images --help lists the flags of the first, and so on.",
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--ckpt",
        metavar="FILE",
        required=True,
        help="checkpoint of train.py, the folder of a run, or published weights",
    )
    network_flags(group)
    group.add_argument(
        "--num-images", type=at_least(1), default=64, metavar="N", help="how many images"
    )
    group.add_argument(
        "--classes",
        metavar="207,360|NAMES|all",
        help="classes by number or name, in turn (default: all, shuffled if they are many)",
    )
    group.add_argument(
        "--support",
        metavar="PATH",
        help="show what the pictures in this folder show, or what those of each class of a data "
        "set do (default of --classes: those held out in training); for networks of sets",
    )
    group.add_argument(
        "--shots",
        type=at_least(1),
        metavar="K",
        help="so many pictures of --support tell an image, drawn anew for each (default: of a "
        "folder without classes all, else as many as in training)",
    )
    group.add_argument(
        "--tokens",
        metavar="FILE",
        help="an .npz of tokens (n, width) or (n, number, width), in turn; for networks of tokens",
    )
    group.add_argument(
        "--seed",
        type=at_least(0, 2**63 - 1),
        default=0,
        help="image i depends on the seed and i alone",
    )
    group.add_argument("--batch", type=at_least(1), default=64, help="images at a time")
    group = parser.add_argument_group(
        "output",
        "Without any of these, a grid in samples.png, or the next of samples-2.png, ... With "
        "--dir, --npz or --score the images stay as PNGs in a folder, and the same command resumes "
        "with those that are missing.",
    )
    group.add_argument("--out", metavar="PNG", help=f"a grid of the first {GRID}")
    group.add_argument(
        "--dir", metavar="DIR", help="the folder of PNGs (default: named after --npz, or samples)"
    )
    group.add_argument(
        "--npz", metavar="FILE", help="for ADM's evaluator: arr_0 uint8 NHWC, arr_1 labels"
    )
    group.add_argument(
        "--gif", metavar="FILE", help=f"the first {GIF} on their way from noise to image"
    )
    group = parser.add_argument_group("score")
    group.add_argument(
        "--score",
        metavar="REF|shapes",
        help="FID, sFID, IS, precision and recall against a reference; shapes: the share of "
        "shapes that a classifier names right",
    )
    group.add_argument("--force", action="store_true", help="score fewer than 2048 images")
    scoring_flags(group)
    parser.add_config(SAMPLING)
    run(parser, generate_command, "with --dir, --npz or --score the same command resumes")


def score_main():
    parser = Parser(prog="sample.py", description="Score images that exist against a reference.")
    parser.add_argument("--images", metavar="PATH", required=True, help=data.IMAGE_KINDS)
    parser.add_argument(
        "--score", metavar="REF", required=True, help="file of --reference, or ADM's"
    )
    parser.add_argument("--force", action="store_true", help="score fewer than 2048 images")
    parser.add_argument("--batch", type=at_least(1), default=64, help="images at a time")
    classes_flag(parser)
    size_flag(parser)
    scoring_flags(parser)
    run(parser, score_command)


def reference_main():
    parser = Parser(prog="sample.py", description="Make a reference for --score of real images.")
    parser.add_argument("--reference", metavar="DATA", required=True, help=data.IMAGE_KINDS)
    parser.add_argument("--out", metavar="REF.npz", required=True, help="the file to write")
    parser.add_argument("--batch", type=at_least(1), default=64, help="images at a time")
    classes_flag(parser)
    size_flag(parser)
    scoring_flags(parser, resize="pytorch")
    run(parser, reference_command)


def bench_main():
    parser = Parser(prog="sample.py", description="Time the sampling, after a warm-up batch.")
    parser.add_argument(
        "--bench", type=at_least(1), nargs="?", const=3, metavar="N", help="batches (default: 3)"
    )
    parser.add_argument("--ckpt", metavar="FILE", help="network (default: untrained --preset)")
    network_flags(parser)
    parser.add_argument("--batch", type=at_least(1), default=64, help="images at a time")
    parser.add_config(SAMPLING)
    run(parser, bench_command)


def network_flags(group):
    group.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help="the network; only where there is no checkpoint",
    )
    group.add_argument(
        "--no-ema", action="store_true", help="the weights of the optimizer, not their average"
    )


def classes_flag(parser):
    parser.add_argument(
        "--classes", metavar="2,11|NAMES", help="only the images of these classes (default: all)"
    )


def size_flag(parser):
    parser.add_argument(
        "--size",
        type=at_least(1, 2**14),
        help="crop and resize as training does (default: the images have one size)",
    )


def scoring_flags(group, resize=None):
    group.add_argument(
        "--inception",
        metavar="FILE",
        default="",
        help=f"weights of Inception (default: {INCEPTION})",
    )
    group.add_argument(
        "--resize",
        choices=list(RESIZES),
        default=resize,
        help="how images come to Inception's 299 pixels: as in pytorch-fid, or as in the "
        "evaluators of ADM and EDM (tensorflow); a score follows its reference",
    )
    group.add_argument(
        "--workers", type=at_least(0), default=2, help="processes that read images to be scored"
    )


if __name__ == "__main__":
    main()
