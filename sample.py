"""Generation from a checkpoint, `python sample.py --ckpt FILE`, and scores of what was generated.

In this order: the machine (processes, precision, speed; train.py uses it, too), networks from files, generation, many
images in parts, the Inception network, scores, the command. Image i follows from (seed, i) alone: all of its noise
comes from a generator of its own, and so does not change with the batch size, the number of images or the order in
which they are made.
"""
import contextlib
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import diffit
import diffusion
from configs import PRESETS, Config, Parser, config_from, flag_of


# ---------------------------------------------------------------------------------------------
# The machine: one process, or those that torchrun started

PATIENCE = datetime.timedelta(minutes=10)  # how long a process waits for another before it gives up


def run_command(parser, act, if_short_of_memory, if_others_are_lost):
    """What `python train.py` and `python sample.py` do: act(), in all processes that were started, with one sentence
    and exit code 2 for what goes wrong; lack of GPU memory and the loss of a process end with the caller's advice.
    act -> the number of the signal that ended it, or None."""
    try:
        join_processes()
        stopped = act()
        leave_processes()
    except (ValueError, OSError) as error:
        if getattr(error, "shared", False) and rank_and_size()[0]:
            sys.exit(2)                                                    # rank 0 says it for all
        parser.exit(2, f"\n{parser.prog}: {error}\n")
    except torch.OutOfMemoryError:
        parser.exit(2, f"\n{parser.prog}: out of GPU memory; {if_short_of_memory}\n")
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            parser.exit(2, f"\n{parser.prog}: a process that reads data has ended ({data.reason(error)}); if memory "
                           f"was short, take fewer --workers or smaller images\n")
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        parser.exit(2, f"\n{parser.prog}: rank {rank_and_size()[0]} lost the other processes "
                       f"({str(error).splitlines()[0][:160]}); {if_others_are_lost}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped\n")
    if stopped:
        sys.exit(128 + stopped)


def default_device():
    """This process's own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def join_processes():
    """Under torchrun, meet the other processes: NCCL on GPUs, gloo on CPUs. ValueError if they do not come."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    device = default_device()
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs here, and this is process {device.index + 1} "
                             f"on this machine; start no more processes than GPUs")
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} could not meet the others at "
                         f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                         f"({str(error).splitlines()[0][:200]}); are all of them started?") from None


def leave_processes():
    """Before the end: without this, processes that are still talking complain of those that are gone."""
    if rank_and_size()[1] > 1:
        dist.destroy_process_group()
        gc.collect()                                                       # its threads must end before the interpreter


def rank_and_size():
    """This process's number, and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def from_all(x):
    """x (..., b) of every process, in order of rank -> (..., b * size), on each of them."""
    size = rank_and_size()[1]
    if size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=-1)


def objects_from_all(value):
    """[value of rank 0, of rank 1, ...], on each process."""
    values = [value] * rank_and_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_0(act):
    """Call act in one process, once all have come this far, -> what it returns, in all. What it raises is raised in
    all, too; `shared` says that rank 0 will report it."""
    if rank_and_size()[1] == 1:
        return act()
    objects_from_all(None)
    result, error = None, None
    if rank_and_size()[0] == 0:
        try:
            result = act()
        except (ValueError, OSError) as caught:
            error = (OSError if isinstance(caught, OSError) else ValueError)(str(caught))
    result, error = objects_from_all((result, error))[0]
    if error:
        error.shared = True
        raise error
    return result


def fast_bf16(device):
    """True where bf16 is faster than fp32: CUDA from Ampere on, CPUs with AMX. (Elsewhere it works, and is slower.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def arithmetic_of(precision, device):
    """What --precision means on this device: bf16, fp16, tf32 or fp32."""
    if precision == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    return precision


def autocast(precision, device):
    """The context in which networks run. Parameters, sums and losses stay fp32. On CUDA it also says, for the whole
    process, whether fp32 products may use tf32."""
    kind = arithmetic_of(precision, device)
    if device.type == "cuda":                                              # fp32 products of 10 bits, or of all 23
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    return torch.autocast(device.type, torch.float16 if kind == "fp16" else torch.bfloat16, kind in ("bf16", "fp16"))


def finished(device):
    """The time at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device):
    """Peak memory of this process in GB: on the GPU, or in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return math.nan
    import resource                                                        # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure(cfg):
    """-> trained parameters, multiply-adds of one forward pass of one image, tokens; counted on the meta device."""
    with torch.device("meta"):
        model = diffit.build(cfg).eval()
        x, t = torch.empty(1, cfg.in_channels, cfg.input_size, cfg.input_size), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            model(x, t)
    trained = sum(p.numel() for p in model.parameters())
    return trained, counter.get_total_flops() / 2, (cfg.input_size // (cfg.patch_size or 1)) ** 2


def speed(images_per_s, multiply_adds, cfg, device, size=1):
    """In words: images/s, TFLOP/s (two for a multiply-add), their share of what a matrix product reaches in the same
    arithmetic here and now, and peak memory."""
    peak_memory, side = memory(device), 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device)
    with torch.no_grad(), autocast(cfg.precision, device):
        for _ in range(3):
            a @ a
        began = finished(device)
        for _ in range(10):
            a @ a
        peak = 10 * 2 * side ** 3 / (finished(device) - began) * size
    rate = 2 * multiply_adds * images_per_s
    return (f"{images_per_s:.1f} images/s, {rate / 1e12:.3g} TFLOP/s, {100 * rate / peak:.0f} % of the "
            f"{peak / 1e12:.3g} TFLOP/s of a matrix product of {side} in {arithmetic_of(cfg.precision, device)}"
            f"{f' on {size} processes' if size > 1 else ''}, {peak_memory:.2f} GB")


def seed_from(*numbers):
    """A 64-bit seed that depends on all the numbers given; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------------------------------------
# Networks from files

FORMAT = "diffit checkpoint 1"


def read_checkpoint(path):
    """What train.save_checkpoint wrote: a dict of tensors and plain values, memory-mapped. ValueError if the file is
    missing, truncated or something else."""
    state = data.read_file(path)
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of train.py (expected the format {FORMAT!r})")
    return state


def load_model(path, preset="", raw=False, device=None):
    """A checkpoint of train.py, or published weights of the network of a preset (a DiffiT .safetensors, a DiT .pt)
    -> model in eval mode, its Config. EMA weights where there are some, or with raw those that the optimizer holds.
    On a CPU the file itself, memory-mapped, is the one copy. ValueError if the file is something else."""
    content = data.read_file(path)
    weights, kind = data.weights_in(content, path, raw)
    if "post_quant_conv.weight" in weights:
        raise ValueError(f"{path} is a VAE; pass it as --vae, and a network as --ckpt")
    if content.get("format") == FORMAT:
        if preset:
            raise ValueError(f"--preset {preset}: {path} is a checkpoint of train.py, which knows its own network; "
                             f"leave --preset out")
        try:
            cfg = Config(**content["config"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the configuration in {path} is of another version of this code ({error})") from None
    elif preset:
        cfg = config_from(preset, {})
    else:
        name = next((name for name in PRESETS if fits(weights, name)), None)  # of several, the released one
        raise ValueError(f"{path} does not say which network it holds, and "
                         + (f"fits --preset {name}; pass that" if name else "fits no preset; it cannot be sampled"))
    with torch.device("meta"):
        model = diffit.build(cfg)
    data.load_weights(model, weights, path, assign=True)
    model.provenance = f"{kind} weights of {path}"
    if rank_and_size()[0] == 0:
        print(f"{model.provenance}, {preset or 'a checkpoint of train.py'}", file=sys.stderr)
    return model.to(device or default_device()).eval().requires_grad_(False), cfg


def fits(weights, preset):
    """Are these the weights of the preset's network?"""
    with torch.device("meta"):
        model = diffit.build(PRESETS[preset])
    try:
        data.check_weights(model, weights, preset)
    except ValueError:
        return False
    return True


def open_vae(cfg):
    """The VAE that cfg names, or None for networks of pixels. ValueError if it is needed and none is named."""
    if cfg.in_channels == 3:
        return None
    if not cfg.vae:
        raise ValueError(f"this network makes latents of {cfg.in_channels} channels; pass --vae FILE (sd-vae-ft-ema or "
                         f"sd-vae-ft-mse, see the README) to make them into pictures")
    vae = data.load_vae(cfg.vae, default_device())
    if vae.post_quant_conv.in_channels != cfg.in_channels:
        raise ValueError(f"--vae {cfg.vae} has latents of {vae.post_quant_conv.in_channels} channels, and this network "
                         f"makes {cfg.in_channels}")
    return vae


# ---------------------------------------------------------------------------------------------
# Generation

# The fields of Config that a sampler goes by, and that may differ from those of training.
SAMPLING = ["sampler", "steps", "eta", "churn", "churn_interval", "churn_noise", "clip",
            "sigma_min", "sigma_max", "rho", "cfg", "cfg_schedule", "cfg_channels", "cfg_interval", "cfg_exact",
            "vae", "precision"]


def labels_of(indices, cfg, classes=None, seed=0):
    """The classes of the images with these indices, (n,) int64: in turn those named, or all of them, shuffled. None for
    networks without classes."""
    if not cfg.num_classes:
        return None
    order = np.array(classes or np.random.default_rng(seed).permutation(cfg.num_classes))
    return order[np.array(indices) % len(order)]


@torch.no_grad()
def generate(model, cfg, indices, classes=None, seed=0, batch=64, process=None):
    """Make the images with these indices, as cfg's sampling fields say: yields x (b, C, H, W) fp32 and labels y (b,),
    or None without classes. process: in place of the one that cfg describes."""
    device, shape = next(model.parameters()).device, (cfg.in_channels, cfg.input_size, cfg.input_size)
    process = process or diffusion.build(cfg)
    levels, scale = process.levels(cfg.steps), cfg.cfg
    if scale != 1 and cfg.cfg_schedule == "power-cosine":
        scale = diffusion.power_cosine(scale, cfg.diffusion_steps)
    if scale != 1 and cfg.cfg_interval:
        scale = diffusion.interval(scale, *cfg.cfg_interval, process)
    for first in range(0, len(indices), batch):
        chunk = indices[first:first + batch]
        generators = [torch.Generator().manual_seed(seed_from(seed, i)) for i in chunk]

        def noise():
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        y = labels_of(chunk, cfg, classes, seed)
        y = None if y is None else torch.from_numpy(y).to(device)
        f = diffusion.guided(model, y, scale, cfg.cfg_channels or None, cfg.cfg_exact)
        options = {"ddpm": dict(noise=noise), "ddim": dict(noise=noise, eta=cfg.eta),
                   "heun": dict(noise=noise, churn=cfg.churn, interval=cfg.churn_interval, churn_noise=cfg.churn_noise)
                   }.get(cfg.sampler, {})
        sampler = getattr(diffusion, cfg.sampler)
        with autocast(cfg.precision, device):
            x = sampler(process, f, process.prior(noise(), levels[0]), levels, clip=cfg.clip, **options)
        yield x, y


def pixels(x, cfg, vae=None):
    """What a network made (b, C, H, W) -> pictures (b, height, width, 3) uint8."""
    if vae is not None:
        with autocast("fp32" if cfg.precision == "fp16" else cfg.precision, x.device):  # fp16 overflows in the VAE
            x = vae.decode(x)
    return data.to_uint8(x)


def grid_columns(cfg, classes=None):
    """A column for each class where they are few; else None, a square."""
    count = len(classes) if classes else cfg.num_classes
    return count if 1 < count <= 16 else None


def recipe(cfg, seed=0, classes=None):
    """In words: sampler, steps, guidance, and each other sampling field that differs from Config's default."""
    others = [name for name in SAMPLING if name not in ("sampler", "steps", "cfg", "vae", "precision")
              and getattr(cfg, name) != getattr(Config, name)]
    return ", ".join([cfg.sampler, f"{cfg.steps} steps", f"guidance {cfg.cfg:g}",
                      *(f"{name.replace('_', '-')} {getattr(cfg, name)}" for name in others),
                      *([f"classes {','.join(map(str, classes))}"] if classes else []), f"seed {seed}",
                      f"in {arithmetic_of(cfg.precision, default_device())}"])


def made_by(weights, weights_hash, cfg, vae_hash, seed=0, classes=None):
    """What made images, in words: the weights, the VAE where there is one (vae_hash: else ""), and the recipe."""
    decoder = f" and {cfg.vae} ({vae_hash})" if vae_hash else ""
    return f"{weights} ({weights_hash}){decoder}, {recipe(cfg, seed, classes)}"


def save_samples(model, cfg, path, vae=None):
    """The grid that training shows: always the same noise and classes. Four rows of classes, or 36 images, divided
    over the processes; rank 0 writes it."""
    n, (rank, size) = 4 * (grid_columns(cfg) or 9), rank_and_size()
    mine = [pixels(x, cfg, vae) for x, _ in generate(model, cfg, range(rank, n, size))]
    parts = objects_from_all(np.concatenate(mine) if mine else None)
    images = np.stack([parts[i % size][i // size] for i in range(n)])
    on_rank_0(lambda: data.save_grid(images, path, grid_columns(cfg)))


class Filmed:
    """A process that keeps what a sampler shows it: x at each level, scaled to the size of a clean image."""

    def __init__(self, process):
        self.process, self.frames = process, {}

    def __getattr__(self, name):
        return getattr(self.process, name)

    def predict(self, f, x, level, clip=False):
        self.frames[level] = x / math.hypot(*self.process.scales(level))
        return self.process.predict(f, x, level, clip)


def save_film(model, cfg, path, n, vae=None, classes=None, seed=0):
    """The way of images 0 to n - 1 from noise to clean, as an animated .gif of at most 31 frames."""
    process = Filmed(diffusion.build(cfg))
    (x, _), = generate(model, cfg, range(n), classes, seed, batch=n, process=process)
    frames = list(process.frames.values())
    frames = [frames[k] for k in diffusion.spaced(len(frames), min(30, len(frames)))] + [x]
    data.save_film([pixels(x, cfg, vae) for x in frames], path, grid_columns(cfg, classes))


# ---------------------------------------------------------------------------------------------
# Many images: parts on the disk, each an .npy of consecutive images that its first index names. A run that was stopped
# goes on with what is missing, with any number of processes.

def open_parts(folder, settings, n):
    """Make the folder, or accept the one that the same settings began. ValueError for others, and if it holds more than
    n images."""
    said, note = json.dumps(settings, indent=1), folder / "settings.json"
    if folder.exists() and not note.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is where unfinished images would go, and holds something else; move it, or choose "
                         f"another name")
    if note.exists() and note.read_text() != said:
        theirs = json.loads(note.read_text())
        differ = "; ".join(f"{name} is {theirs.get(name)} there and {value} here"
                           for name, value in json.loads(said).items() if value != theirs.get(name))
        raise ValueError(f"{folder} holds part of another run ({differ[:300]}); remove it, or choose another name")
    folder.mkdir(exist_ok=True)
    with data.written_whole(note) as temporary:
        temporary.write_text(said)
    end = max((first + len(images) for first, images in stored(folder)), default=0)
    if end > n:
        raise ValueError(f"{folder} already holds {end} images, and --n {n} would lose some; pass --n {end} or more, "
                         f"or choose another name")


def stored(folder):
    """(first index, images (b, height, width, 3) uint8, memory-mapped) of each whole part, in order."""
    for file in sorted(folder.glob("[0-9]*.npy")):
        try:
            images = np.load(file, mmap_mode="r")
        except (ValueError, EOFError):                                     # cut short: it will be made again
            continue
        yield int(file.stem), images


def missing(folder, n, batch):
    """The spans [(first, end)] of at most `batch` images that no part holds yet, of 0 to n."""
    spans, at = [], 0
    for first, end in [*((first, first + len(images)) for first, images in stored(folder)), (n, n)]:
        high = min(first, n)
        spans += [(k, min(k + batch, high)) for k in range(at, high, batch)]
        at = end
    return spans


def make_parts(model, cfg, vae, folder, n, classes=None, seed=0, batch=64):
    """Images 0 to n - 1 into the folder, divided over the processes. All of them return when all images are there."""
    def left():
        return sum(end - first for first, end in missing(folder, n, n))

    (rank, size), todo, start = rank_and_size(), left(), time.time()
    batch = min(batch, max(1, math.ceil(todo / size)))
    for first, end in on_rank_0(lambda: missing(folder, n, batch))[rank::size]:
        (x, _), = generate(model, cfg, range(first, end), classes, seed, batch)
        with data.written_whole(folder / f"{first:08}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, pixels(x, cfg, vae))
        if rank == 0:
            now = left()
            data.live_line(f"{n - now} of {n} images, {(todo - now) / (time.time() - start):.2f} images/s")
    while left():                                                          # asking the others would end after PATIENCE
        time.sleep(0.5)
    objects_from_all(None)
    if rank == 0:
        data.live_line("\n")


def made(folder, n, rank=0, size=1):
    """The first n images of the folder, or this process's share of them: (indices, images (b, height, width, 3) uint8)
    of each part."""
    for first, images in [part for part in stored(folder) if part[0] < n][rank::size]:
        yield range(first, min(n, first + len(images))), np.array(images[:n - first])


def save_npz(folder, n, labels, path):
    """As ADM's evaluator reads it, arr_0 (n, height, width, 3) uint8 and arr_1 (n,), without holding it in memory."""
    with data.written_whole(path) as temporary, zipfile.ZipFile(temporary, "w") as out:
        with out.open("arr_0.npy", "w", force_zip64=True) as file:
            shape = (n, *next(made(folder, n))[1].shape[1:])
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for _, images in made(folder, n):
                file.write(images.tobytes())
        if labels is not None:
            with out.open("arr_1.npy", "w") as file:
                np.save(file, labels)


# ---------------------------------------------------------------------------------------------
# The network that scores look through

INCEPTION_HASH = "6726825d"           # how the SHA-256 of the published file begins
INCEPTION = f"pt_inception-2015-12-05-{INCEPTION_HASH}.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
RESIZES = {"pytorch": "resized as in pytorch-fid (bilinear to 299, half-pixel centres)",
           "tensorflow": "resized as in TensorFlow 1 (bilinear to 299, corners as centres)"}


class ConvNorm(nn.Module):
    """ReLU(BatchNorm(Conv(x)))"""

    def __init__(self, before, width, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(before, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined along the channels; branch_pool begins with the pool. Each is a chain of
    convolutions (width, kernel), the last of which may be two beside each other, (width, kernel, kernel):
    branch3x3=[(384, 1), (384, (1, 3), (3, 1))] makes branch3x3_1, then branch3x3_2a and branch3x3_2b. Where the pool
    halves the resolution, so does the last convolution of each chain, and what is pooled joins as it is."""

    def __init__(self, before, pool, **branches):
        super().__init__()
        self.pool, self.halves, self.branches = pool, pool.stride == 2, {}
        for branch, chain in branches.items():
            width, names = before, []
            for k, (out, *kernels) in enumerate(chain, 1):
                halves = self.halves and k == len(chain)
                number = f"_{k}" if len(chain) > 1 else ""
                for letter, kernel in zip("ab" if len(kernels) == 2 else [""], kernels):
                    h, w = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    names.append(f"{branch}{number}{letter}")
                    self.add_module(names[-1], ConvNorm(width, out, (h, w), 2 if halves else 1,
                                                        0 if halves else (h // 2, w // 2)))
                width = out
            self.branches[branch] = names[:-len(kernels)], names[-len(kernels):]

    def forward(self, x):
        joined = []
        for branch, (chain, ends) in self.branches.items():
            h = self.pool(x) if branch == "branch_pool" else x
            for name in chain:
                h = getattr(self, name)(h)
            joined += [getattr(self, name)(h) for name in ends]
        return torch.cat(joined + [self.pool(x)] if self.halves else joined, dim=1)


class Inception(nn.Module):
    """Inception-v3 as the first FID had it (Szegedy et al. 2016, Heusel et al. 2017), with the names of its published
    weights: average pools that leave out the padding, a max pool in the last block, 1008 classes.
    pixels (B, 3, H, W) from 0 to 255 -> pooled features (B, 2048) for FID, IS, precision and recall, and the spatial
    ones (B, 2023) of sFID: 7 channels of 17 x 17 places, ordered as ADM's (place, channel). resize: one of RESIZES; the
    evaluators of ADM and EDM follow TensorFlow, those who followed pytorch-fid its own."""
    pooled, spatial = 2048, 7 * 17 * 17

    def __init__(self):
        super().__init__()
        average, largest = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
        self.halve = halve = nn.MaxPool2d(3, 2)
        row, column = (1, 7), (7, 1)

        def mixed_5(before, width):
            return Mixed(before, average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                         branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(width, 1)])

        def mixed_6(width):
            return Mixed(768, average, branch1x1=[(192, 1)], branch7x7=[(width, 1), (width, row), (192, column)],
                         branch7x7dbl=[(width, 1), (width, column), (width, row), (width, column), (192, row)],
                         branch_pool=[(192, 1)])

        def mixed_7(before, pool):
            return Mixed(before, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
                         branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))], branch_pool=[(192, 1)])

        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_6, (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, halve, branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3)])
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, average), mixed_7(2048, largest)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x, resize="pytorch"):
        x = resized(x.float(), resize)
        x = self.halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # (B, 64, 73, 73)
        x = self.halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))          # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                 # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                 # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))                                # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                 # (B, 2048, 8, 8)
        return x.float().mean((2, 3)), spatial.float()

    def logits(self, features):
        """Class scores of pooled features, as the inception score takes them: its evaluators leave out the bias."""
        return features @ self.fc.weight.T


def resized(x, resize):
    """Pixels (B, 3, H, W) from 0 to 255 -> what Inception takes, (B, 3, 299, 299), about [-1, 1]."""
    if resize == "pytorch":
        return F.interpolate(x / 127.5 - 1, (299, 299), mode="bilinear", align_corners=False)
    i = torch.arange(299, device=x.device)
    rows, columns = ((2 * i * side / 299 + 1) / side - 1 for side in x.shape[2:])  # i side / 299, for grid_sample
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).expand(len(x), -1, -1, -1)
    return F.grid_sample((x - 128) / 128, grid, mode="bilinear", padding_mode="border", align_corners=False)


def load_inception(path="", device="cpu"):
    """The file named, or INCEPTION in the working directory or where torch.hub keeps it -> Inception in eval mode, and
    the hash of its file. ValueError, with the place where it is published, if there is none."""
    places = [path] if path else [INCEPTION, os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION)]
    path = next(filter(os.path.isfile, places), None)
    if path is None:
        raise ValueError(f"there is no file {' and no '.join(places)}; FID, sFID, IS, precision and recall need the "
                         f"Inception weights published as {INCEPTION_URL} (95 MB; their SHA-256 begins with "
                         f"{INCEPTION_HASH}): fetch them, and pass --inception FILE unless they lie here")
    net, (state, _) = Inception(), data.weights_in(data.read_file(path), path)
    counters = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
    data.load_weights(net, {**counters, **state}, path)                    # the published file has no counters
    net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return net, data.file_hash(path)


# ---------------------------------------------------------------------------------------------
# Scores

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians (Heusel et al.
    2017, eq. 6), in float64. mu (d,), sigma (d, d), arrays or tensors.

    With roots S = R R^T from symmetric eigenvalues, the last trace is the sum of the singular values of R1^T R2. (Their
    squares are the eigenvalues of S1 S2; taken from these, a root would lose half of its digits.)"""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v, dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2))

    def root(s):
        values, vectors = torch.linalg.eigh(s)
        return vectors * values.clamp(min=0).sqrt()

    trace = sigma1.trace() + sigma2.trace() - 2 * torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return max(((mu1 - mu2).square().sum() + trace).item(), 0.0)           # not below 0 by rounding; nan stays nan


def inception_score(logits, split=5000):
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016), the mean over consecutive splits of `split` images. logits (n,
    classes), in float64."""
    values = []
    for part in torch.as_tensor(logits, dtype=torch.float64).split(split):
        p = part.softmax(1)
        values.append((p * (part.log_softmax(1) - p.mean(0).log())).sum(1).mean().exp().item())
    return sum(values) / len(values)


ROWS = 512                            # of distances at a time: 100 MB for 50,000 columns


def squared_distances(a, b):
    """(n, d), (m, d) -> blocks (ROWS, m). What fp32 cannot tell from 0, as between copies, is 0."""
    norms = b.square().sum(1)
    for rows in a.split(ROWS):
        sums = rows.square().sum(1, keepdim=True) + norms
        d = torch.addmm(sums, rows, b.T, alpha=-2)
        yield d.masked_fill_(d < 1e-5 * sums, 0)


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019). Around each real point lies a ball that reaches to its
    k-th nearest real neighbour; precision is the share of fake points inside any of them, recall the same with real
    and fake exchanged. real (n, d), fake (m, d), on the device that is to do it, in fp32 -> precision, recall."""
    centre = real.mean(0)                                                  # |a|^2 + |b|^2 - 2ab then loses fewer digits
    real, fake = (real - centre).float(), (fake - centre).float()

    def squared_radii(x):                                                  # the nearest of all is the point itself
        return torch.cat([d.topk(min(k + 1, len(x)), largest=False).values[:, -1] for d in squared_distances(x, x)])

    real_radii, fake_radii = squared_radii(real), squared_radii(fake)
    inside_real, inside_fake = torch.zeros(len(fake), dtype=torch.bool, device=fake.device), []
    for radii, d in zip(real_radii.split(ROWS), squared_distances(real, fake)):
        inside_real |= (d <= radii[:, None]).any(0)
        inside_fake.append((d <= fake_radii).any(1))
    return inside_real.double().mean().item(), torch.cat(inside_fake).double().mean().item()


class Moments:
    """Mean and covariance of vectors (b, d) that come a batch at a time, by their number, sum and sum of products, in
    float64."""

    def __init__(self, d, device):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)
        self.products = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, x):
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.T, x)

    def over_all_processes(self):
        """-> mean (d,), covariance (d, d), number. Once only: afterwards each process holds the sums of all."""
        if rank_and_size()[1] > 1:
            for part in (self.n, self.sum, self.products):
                dist.all_reduce(part)
        mean = self.sum / self.n
        return mean.cpu(), ((self.products - self.n * mean[:, None] * mean) / (self.n - 1)).cpu(), int(self.n)


KEPT = 50_000                         # features kept for IS, precision and recall at the most, of images drawn by lot


def counted(n):
    """n images, in words."""
    return f"{n} images" + (f" (IS, precision and recall of {KEPT} of them)" if n > KEPT else "")


def in_step(batches, device):
    """The batches, and None in place of one while other processes still have some: so nobody waits for longer than a
    batch takes, and PATIENCE need not cover what slower processes have left."""
    for batch in itertools.chain(batches, itertools.repeat(None)):
        if not from_all(torch.tensor([int(batch is not None)], device=device)).any():
            return
        yield batch


def statistics(inception, batches, n, arithmetic="fp32", resize="pytorch"):
    """What the scores compare. batches: this process's share of n images, [(indices, images (b, H, W, 3) uint8)] -> for
    the images of all processes together a dict of
        mu (2048,), sigma (2048, 2048)       mean and covariance of the pooled features, float64
        mu_s (2023,), sigma_s (2023, 2023)   and of the spatial ones
        images                               their number
        features (KEPT at most, 2048)        pooled, fp32, in the order of indices; on rank 0 alone"""
    (rank, size), start, seen = rank_and_size(), time.time(), 0
    device = inception.fc.weight.device
    pooled, spatial = Moments(inception.pooled, device), Moments(inception.spatial, device)
    kept, features, drawn = [], [], np.zeros(n, dtype=bool)
    drawn[np.random.default_rng(0).permutation(n)[:KEPT]] = True           # by lot: classes may come in turn
    for indices, images in filter(None, in_step(batches, device)):
        with torch.no_grad(), autocast(arithmetic, device):
            found, found_s = inception(torch.from_numpy(images).to(device).permute(0, 3, 1, 2), resize)
        pooled.add(found)
        spatial.add(found_s)
        here = [k for k, i in enumerate(indices) if drawn[i]]
        kept += [indices[k] for k in here]
        features.append(found[here].cpu())
        seen += len(images)
        if rank == 0:                                                      # as if the others were as far
            done = min(n, seen * size)
            data.live_line(f"{done} of {n} images seen by Inception, {done / (time.time() - start):.1f} images/s")
    (mu, sigma, images), (mu_s, sigma_s, _) = pooled.over_all_processes(), spatial.over_all_processes()
    stats = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "images": images}
    if size > 1:
        parts = [None] * size if rank == 0 else None
        dist.gather_object((kept, features), parts)
        if rank == 0:
            kept, features = ([item for part in column for item in part] for column in zip(*parts))
    if rank == 0:
        data.live_line("\n")
        stats["features"] = torch.cat(features)[np.argsort(kept)]
    return stats


REFERENCE = "diffit reference 1"


def write_reference(path, stats, header):
    """What `statistics` gave, with the names that it has in ADM's files, and what it was made from."""
    with data.written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, header=json.dumps({"format": REFERENCE, **header}), **stats)


def read_reference(path):
    """Ours, ADM's, or any other .npz with mu and sigma -> what `statistics` gives, as far as the file has it; our
    header, or {}; does it hold images? ValueError if it is missing, damaged or something else."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}; make a reference: python sample.py --reference DATA --out REF.npz")
    d, s = Inception.pooled, Inception.spatial
    expected = {"mu": (d,), "sigma": (d, d), "mu_s": (s,), "sigma_s": (s, s), "features": (-1, d)}
    stats, header = {}, {}
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("an .npz is a zip archive, and this is none")
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                advice = f"; make a reference of its images with --reference {path}" if "arr_0" in file else ""
                raise ValueError(f"it has no mu and sigma; found: {', '.join(file.files[:10])}{advice}")
            for name in expected.keys() & set(file.files):
                stats[name] = torch.from_numpy(file[name].reshape(expected[name]))
                if not (stats[name].is_floating_point() and len(stats[name]) and stats[name].isfinite().all()):
                    raise ValueError(f"{name} is not finite, or no array of such numbers")
            if "header" in file:
                header = json.loads(str(file["header"]))
                missing = {"format", "source", "images", "size", "inception", "arithmetic", "resize"} - set(header)
                if (missing or header["format"] != REFERENCE or header["resize"] not in RESIZES
                        or header["arithmetic"] not in ("fp32", "bf16")
                        or not all(type(header[name]) is int for name in ("images", "size"))):
                    raise ValueError(f"its header is not of the format {REFERENCE!r}")
            return stats, header, "arr_0" in file
    except (ValueError, TypeError, RuntimeError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no reference for --score, or is damaged ({data.reason(error)})") from None


def check_number(n, force, what="images"):
    """ValueError below 2048 images, which a covariance of full rank takes, unless forced."""
    if n < 2048 and not (force and n > 1):
        raise ValueError(f"{n} {what} are too few for a score: FID needs 2048 or more, and papers use 50000; pass "
                         f"--force to score them anyway (2 at least)")


def warn_of_number(n):
    if n < 50_000 and rank_and_size()[0] == 0:
        print(f"only {n} images: fewer than the 50000 of papers raise FID; compare it only with scores of as many",
              file=sys.stderr)


def read_share(dataset, batch, workers):
    """This process's share of the pictures of a data set, as `statistics` takes it."""
    rank, size = rank_and_size()
    mine = range(rank, len(dataset), size)
    unreadable = data.Unreadable(mine)
    for indices, images, bad in data.Reader.batches(dataset, mine, batch, workers):
        unreadable.add([why for _, *why in bad])
        if images:
            yield indices, np.stack(images)


class Scorer:
    """FID, sFID, IS, precision and recall against a reference: all processes look at their share of the images, and
    rank 0, which has the reference's numbers, compares. inception: as for load_inception. force: accept fewer than 2048
    images. batch, workers: for the images of a reference without features (ADM's). resize: one of RESIZES, for a
    reference without our header (default: tensorflow). ValueError if the reference or the weights are missing, or do
    not belong together."""

    def __init__(self, reference, inception="", force=False, batch=64, workers=2, resize=None):
        self.path, self.force = reference, force
        self.inception, self.inception_hash = load_inception(inception, default_device())

        def read():
            self.real, header, pictured = read_reference(reference)
            return header, data.file_hash(reference), pictured and "features" not in self.real

        self.header, self.hash, needs_features = on_rank_0(read)
        self.arithmetic = self.header.get("arithmetic", "fp32")            # both sides by the same
        self.resize = self.header.get("resize", resize or "tensorflow")
        if self.header and resize not in (None, self.resize):
            raise ValueError(f"--resize {resize}: {reference} was made with --resize {self.resize}, and what is scored "
                             f"follows it; leave the flag out, or make another reference")
        self.size, self.made = self.header.get("size"), f"made elsewhere, taken to be as in {self.resize}"
        if self.header:
            images, source = counted(self.header["images"]), self.header["source"]
            self.made = f"made of {images} of {source}, {self.size} x {self.size}"
        if self.header.get("inception", self.inception_hash) != self.inception_hash:
            raise ValueError(f"{reference} was made with other Inception weights ({self.header['inception']}) than "
                             f"those given ({self.inception_hash}); make it again, or pass its own as --inception")
        check_number(self.header.get("images", math.inf), force, f"images in {reference}")
        if needs_features:
            images = data.read_npz(reference)
            stats = self.look(read_share(images, batch, workers), len(images))
            self.size, self.made = images.size, f"{self.made}; precision and recall by its {len(images)} images"
            if rank_and_size()[0] == 0:
                self.real["features"] = stats["features"]

    def check_size(self, size):
        """ValueError if the images to be scored have another size than those of the reference."""
        if self.size not in (None, size):
            raise ValueError(f"the images have {size} x {size} pixels, and those of {self.path} {self.size} x "
                             f"{self.size}; scores across sizes say little: make a reference with --size {size}")

    def look(self, batches, n):
        """This process's share of n images, as for `statistics` -> what that gives for the images of all processes."""
        stats = statistics(self.inception, batches, n, self.arithmetic, self.resize)
        check_number(stats["images"], self.force)                          # some may have been unreadable
        return stats

    def compare(self, fake):
        """On rank 0: what `look` gave -> {"fid", "is", and as far as the reference goes "sfid", "precision",
        "recall"}."""
        real, device, scores = self.real, default_device(), {}
        scores["fid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
        if "mu_s" in real:
            scores["sfid"] = frechet_distance(real["mu_s"], real["sigma_s"], fake["mu_s"], fake["sigma_s"])
        with autocast("fp32", device):                                     # without tf32: distances need all digits
            features = fake["features"].to(device)
            scores["is"] = inception_score(self.inception.logits(features).cpu())
            if "features" in real:
                scores["precision"], scores["recall"] = precision_recall(real["features"].to(device), features)
        return scores

    def provenance(self):
        """What the numbers depend on beside the images."""
        return (f"against {self.path} ({self.hash}; {self.made}); Inception {self.inception_hash} in "
                f"{self.arithmetic}, {RESIZES[self.resize]}{unless_published(self.inception_hash)}")


def unless_published(inception_hash):
    if inception_hash.startswith(INCEPTION_HASH):
        return ""
    return ("; THESE ARE NOT THE PUBLISHED INCEPTION WEIGHTS: the scores are not meaningful, and compare with nothing "
            "but others of the same file")


def in_words(scores):
    """In one line."""
    forms = {"fid": "FID {:.4f}", "sfid": "sFID {:.4f}", "is": "IS {:.3f}", "precision": "precision {:.4f}",
             "recall": "recall {:.4f}"}
    return ", ".join(form.format(scores[name]) for name, form in forms.items() if name in scores)


def recognised(images, labels):
    """How many of these shapes a classifier names right. images (n, H, W, 3) uint8, labels (n,) -> the share of them,
    and the classifier's share on real shapes that it has not seen."""
    right, real = shape_classifier(images.shape[1])
    return right(data.to_float(images), torch.as_tensor(labels)), real


@functools.lru_cache
def shape_classifier(size, seed=0):
    """A small CNN trained here, on 8,000 shapes of a seed that training does not use -> right(x, y), the share of
    pictures x that it names y, and that share of 1,000 others."""
    torch.manual_seed(seed)
    real = 8000
    dataset = data.Shapes(size, real + 1000, seed=1_000_000 + seed)
    x = data.to_float(np.stack([dataset.read(i) for i in range(len(dataset))]))
    y = torch.from_numpy(dataset.labels)

    def layer(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    net = nn.Sequential(layer(3, 32), layer(32, 64), layer(64, 128),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters())
    batches = [b for _ in range(4) for b in torch.randperm(real).split(128)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, len(batches))
    for b in batches:
        noisy = x[b] + 0.05 * torch.rand(len(b), 1, 1, 1) * torch.randn_like(x[b])  # samples are never quite clean
        optimizer.zero_grad()
        F.cross_entropy(net(noisy), y[b]).backward()
        optimizer.step()
        schedule.step()
    net.eval()

    @torch.no_grad()
    def right(x, y):
        return (torch.cat([net(part).argmax(1) for part in x.split(500)]) == y).float().mean().item()

    return right, right(x[real:], y[real:])


# ---------------------------------------------------------------------------------------------
# python sample.py

GRID = 400                            # images that a grid shows at the most
FILM = 20                             # and a film
OUTPUTS = "outputs.txt"               # among the parts: what this run has begun to write, and may write again


def parse_classes(text, cfg):
    """'207,360' or 'all' -> list of class indices. ValueError if the network has no such class."""
    if not cfg.num_classes:
        raise ValueError(f"--classes {text}: this network was trained without classes; leave the flag out")
    if text == "all":
        return list(range(cfg.num_classes))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--classes {text}: give numbers with commas between them, as in 207,360, or all") from None
    for c in classes:
        if not 0 <= c < cfg.num_classes:
            raise ValueError(f"--classes {text}: there is no class {c}; this network has 0 to {cfg.num_classes - 1}")
    return classes


def parts_of(args):
    """The folder of parts beside the .npz, or the folder, that they become; None where neither is asked for."""
    lasting = args.npz or args.dir
    return Path(f"{lasting.rstrip('/')}.parts") if lasting else None


def check_outputs(args):
    """Before the work: every place that is to be written can be, and holds nothing yet, unless this is the same run
    going on. Fills in args.out."""
    begun = parts_of(args) / OUTPUTS if parts_of(args) else None
    begun = begun.read_text().splitlines() if begun and begun.exists() else []
    if args.reference and not args.out:
        raise ValueError("--reference DATA needs --out REF.npz, the file to write")
    if not (args.out or args.dir or args.npz or args.gif or args.score):
        names = itertools.chain(["samples.png"], (f"samples-{k}.png" for k in itertools.count(2)))
        args.out = next(name for name in names if not os.path.exists(name))
    pictures = (".npz",) if args.reference else (".png", ".jpg", ".webp")
    for flag, path, endings in [("--out", args.out, pictures), ("--npz", args.npz, (".npz",)),
                                ("--gif", args.gif, (".gif",)), ("--dir", args.dir, ("",))]:
        if path and not path.lower().endswith(endings):
            raise ValueError(f"{flag} {path} must end in {' or '.join(endings)}")
        empty = flag == "--dir" and os.path.isdir(path or "") and not os.listdir(path)
        if path and os.path.exists(path) and not (empty or os.path.abspath(path) in begun):
            raise ValueError(f"{flag} {path} exists; remove it or choose another name")
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"{flag} {path}: the folder {Path(path).parent} does not exist; make it first")
        if path and not os.access(Path(path).parent, os.W_OK):
            raise ValueError(f"{flag} {path}: the folder {Path(path).parent} cannot be written to; choose another")


@contextlib.contextmanager
def parts_folder(args, settings):
    """Where the parts go until all that was asked for is whole. With --npz or --dir it stays after a kill, so that the
    same command goes on; else it does not outlast this run. settings: what the images depend on."""
    folder, first = parts_of(args), rank_and_size()[0] == 0
    if folder:
        on_rank_0(lambda: open_parts(folder, settings, args.n))
        yield folder
        if first:                                                          # settings.json last: it marks the folder
            for file in [*folder.glob("*.npy"), *folder.glob(".*.tmp"), folder / OUTPUTS, folder / "settings.json"]:
                file.unlink(missing_ok=True)
            folder.rmdir()
        return
    folder = on_rank_0(lambda: tempfile.mkdtemp(prefix=".samples-", dir=Path(args.out or ".").parent))
    try:
        yield Path(folder)
    finally:
        if first:
            shutil.rmtree(folder)


def write(args, cfg, folder, classes, labels):
    """Make of the parts the files that were asked for."""
    (folder / OUTPUTS).write_text("\n".join(os.path.abspath(path) for path in (args.out, args.dir, args.npz) if path))
    if args.dir:
        Path(args.dir).mkdir(exist_ok=True)
        for indices, images in made(folder, args.n):
            for i, image in zip(indices, images):
                data.save_image(Image.fromarray(image), f"{args.dir}/{i:06d}.png")
    if args.out:
        images = np.concatenate([images for _, images in made(folder, min(args.n, GRID))])
        data.save_grid(images, args.out, grid_columns(cfg, classes))
    if args.npz:
        save_npz(folder, args.n, labels, args.npz)
    for path in filter(None, (args.out, args.dir, args.npz)):
        print(f"wrote {path}")


def make_images(args, given):
    """--ckpt FILE: images, in all the forms asked for, and their score."""
    check_outputs(args)
    reference = args.score if args.score != "shapes" else None
    if reference:
        check_number(args.n, args.force, "images (--n)")
    first = rank_and_size()[0] == 0
    told = first and (args.dir or args.npz or args.score)                  # before the file can be another one
    weights_hash = data.file_hash(args.ckpt) if told and os.path.isfile(args.ckpt) else ""
    model, cfg = load_model(args.ckpt, args.preset, args.raw)
    cfg = dataclasses.replace(cfg, **given)
    vae = open_vae(cfg)
    vae_hash = data.file_hash(cfg.vae) if told and vae else ""
    if args.score == "shapes" and cfg.num_classes != 10:
        raise ValueError(f"--score shapes needs a network with the ten classes of shapes; {args.ckpt} has "
                         f"{cfg.num_classes}")
    classes = parse_classes(args.classes, cfg) if args.classes else None
    settings = {**dataclasses.asdict(cfg), "weights": weights_hash, "raw": args.raw, "seed": args.seed,
                "classes": classes, "vae_weights": vae_hash}

    if args.out or args.dir or args.npz or args.score:
        scorer = None
        if reference:
            scorer = Scorer(reference, args.inception, args.force, args.batch, args.workers, args.resize)
            scorer.check_size(cfg.input_size * (vae.factor if vae else 1))
            warn_of_number(args.n)
        with parts_folder(args, settings) as folder:
            make_parts(model, cfg, vae, folder, args.n, classes, args.seed, args.batch)
            stats = scorer.look(made(folder, args.n, *rank_and_size()), args.n) if scorer else None
            leave_processes()                                              # what rank 0 still has to do may take long
            if first:
                labels = labels_of(range(args.n), cfg, classes, args.seed)
                if scorer:
                    result, judge = in_words(scorer.compare(stats)), scorer.provenance()
                elif args.score:
                    images = np.concatenate([images for _, images in made(folder, args.n)])
                    share, real = recognised(images, labels)
                    result = f"{100 * share:.1f} % named right"
                    judge = f"by a classifier that names {100 * real:.1f} % of real shapes right"
                if args.score:
                    n = counted(stats["images"]) if scorer else f"{args.n} images"
                    maker = made_by(model.provenance, weights_hash, cfg, vae_hash, args.seed, classes)
                    print(f"{result}\n  {n} by the {maker}; {judge}", flush=True)
                write(args, cfg, folder, classes, labels)
    if args.gif and first:
        save_film(model, cfg, args.gif, min(args.n, FILM), vae, classes, args.seed)
        print(f"wrote {args.gif}")


def make_reference(args):
    """--reference DATA --out REF.npz: write the reference. ValueError if DATA are no pictures."""
    check_outputs(args)
    inception, inception_hash = load_inception(args.inception, default_device())
    dataset, precision = data.open_pictures(args.reference, args.size), "bf16" if args.bf16 else "fp32"
    start = time.time()
    images = read_share(dataset, args.batch, args.workers)
    resize = args.resize or "pytorch"
    stats = statistics(inception, images, len(dataset), precision, resize)
    n = stats["images"]
    if not stats["mu"].isfinite().all():
        raise ValueError("the features of these images are not finite; are the Inception weights damaged?")
    check_number(n, force=True)
    warn_of_number(n)
    if rank_and_size()[0] == 0:
        source = args.reference + (" (cropped and resized)" if args.size else "")
        write_reference(args.out, stats, {"source": source, "images": n, "size": dataset.size,
                                          "inception": inception_hash, "arithmetic": precision, "resize": resize})
        print(f"wrote {args.out}: statistics of {n} images ({dataset.size} x {dataset.size}), features of "
              f"{len(stats['features'])}, {n / (time.time() - start):.1f} images/s; Inception {inception_hash} in "
              f"{precision}, {RESIZES[resize]}{unless_published(inception_hash)}")


def score_images(args):
    """--images PATH --score REF: print the scores. ValueError if PATH holds no pictures, or others than REF."""
    if args.score in (None, "shapes"):
        raise ValueError("--images PATH needs --score REF.npz (make one with --reference)")
    dataset = data.open_pictures(args.images, args.size)
    check_number(len(dataset), args.force)
    scorer = Scorer(args.score, args.inception, args.force, args.batch, args.workers, args.resize)
    scorer.check_size(dataset.size)
    warn_of_number(len(dataset))
    stats, first = scorer.look(read_share(dataset, args.batch, args.workers), len(dataset)), rank_and_size()[0] == 0
    leave_processes()                                                      # comparing may take rank 0 some minutes
    if first:
        digest = f" ({data.file_hash(args.images)})" if os.path.isfile(args.images) else ""
        print(f"{in_words(scorer.compare(stats))}\n  {counted(stats['images'])} of {args.images}{digest}, "
              f"{'cropped and resized to ' if args.size else ''}{dataset.size} x {dataset.size}; {scorer.provenance()}")


def bench(args, given):
    """Time the sampling of args.bench batches, after a warm-up of one. Latents stay latents."""
    if args.ckpt:
        model, cfg = load_model(args.ckpt, args.preset, args.raw)
    else:
        cfg = config_from(args.preset or "shapes", {})
        model = diffit.build(cfg).to(default_device()).eval().requires_grad_(False)
    cfg, device, calls = dataclasses.replace(cfg, **given), next(model.parameters()).device, []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))

    def batches(n):
        for _ in generate(model, cfg, range(n * args.batch), batch=args.batch):
            pass
        return finished(device)

    began = batches(1)
    calls.clear()
    seconds, n = batches(args.bench) - began, args.bench * args.batch
    print(f"{n} images in batches of {args.batch}, {cfg.sampler}, {cfg.steps} steps, guidance {cfg.cfg:g}, "
          f"{sum(calls) / n:.1f} passes an image: {speed(n / seconds, sum(calls) / n * measure(cfg)[1], cfg, device)}")


# What the three commands that make no images take.
OTHER_COMMANDS = {"reference": ["reference", "out", "inception", "batch", "workers", "size", "bf16", "resize"],
                  "images": ["images", "score", "force", "inception", "batch", "workers", "size", "resize"],
                  "bench": ["bench", "ckpt", "preset", "raw", "batch", *SAMPLING]}


def run(args):
    """The command with these flags."""
    given = {name: value for name, value in vars(args).items() if name in SAMPLING}
    for flag, least in [("n", 1), ("batch", 1), ("bench", 1), ("size", 1), ("seed", 0), ("workers", 0)]:
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be {least} or more")
    other = next((name for name in OTHER_COMMANDS if name in args.given), None)
    if other:
        wrong, where = args.given - set(OTHER_COMMANDS[other]), f"with --{other}"
    elif args.score in (None, "shapes"):
        wrong, where = args.given & {"force", "inception", "workers", "resize"}, "without --score REF"
    else:
        wrong, where = args.given & {"size", "bf16"}, "here: what is scored follows the reference"
    if wrong:
        raise ValueError(f"{' and '.join(map(flag_of, sorted(wrong)))} cannot be used {where}")
    if other == "reference":
        make_reference(args)
    elif other == "images":
        score_images(args)
    elif other == "bench":
        bench(args, given)
    elif args.ckpt:
        make_images(args, given)
    else:
        raise ValueError("pass --ckpt FILE: a checkpoint (train.py writes last.pt into its folder), or published "
                         "weights")


def main():
    parser = Parser(prog="sample.py", description="Make images from a checkpoint of train.py, or from published "
                                                  "weights, and score them; or score others.")
    parser.add_argument("--ckpt", metavar="FILE", help="a checkpoint of train.py, or published weights")
    parser.add_argument("--preset", default="", help="the network, for published weights and for --bench alone")
    parser.add_argument("--bench", type=int, nargs="?", const=3, metavar="N",
                        help="only time N batches (default 3), with --ckpt or with the untrained network of --preset")
    parser.add_argument("--n", type=int, default=64, help="how many images")
    parser.add_argument("--classes", metavar="207,360|all", help="classes, in turn (default: all, shuffled)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--raw", action="store_true", help="the optimizer's weights instead of their moving average")
    parser.add_argument("--out", metavar="PNG", help=f"a grid of the first {GRID} (default samples.png)")
    parser.add_argument("--dir", metavar="DIR", help="a folder for one PNG each")
    parser.add_argument("--npz", metavar="FILE", help="as ADM's evaluator reads it: arr_0 uint8 NHWC, arr_1 labels")
    parser.add_argument("--gif", metavar="FILE", help=f"a film of the first {FILM} on their way from noise")
    parser.add_argument("--score", metavar="REF|shapes", help="FID, sFID, IS, precision and recall against a "
                        "reference; shapes: let a classifier, trained on the spot, name them")
    parser.add_argument("--force", action="store_true", help="score even fewer than 2048 images")
    parser.add_argument("--inception", metavar="FILE", default="",
                        help=f"the weights that scores look through (default: {INCEPTION}, here or in torch's cache)")
    parser.add_argument("--images", metavar="PATH", help=f"score these, and make none: {data.KINDS}")
    parser.add_argument("--reference", metavar="DATA", help="make a reference for --score of these, in --out REF.npz")
    parser.add_argument("--size", type=int, help="crop and resize --images or --reference as training would "
                                                 "(default: they all have one size)")
    parser.add_argument("--bf16", action="store_true", help="a reference, and all scores against it, in bf16: faster, "
                                                            "and comparable with nothing else")
    parser.add_argument("--resize", choices=list(RESIZES),
                        help="how a reference, and what is scored against it, comes to Inception's 299 pixels (default "
                             "pytorch); tensorflow: as in the evaluators of ADM and EDM, and for their references")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images to be scored")
    parser.add_config(SAMPLING)
    args = parser.parse_args()
    args.given = {name for name, value in vars(args).items() if value != parser.get_default(name)}

    def end(number, frame):                                                # as Ctrl-C: leave nothing behind
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)                  # torch would raise for each worker that ends
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    run_command(parser, lambda: run(args), f"pass a --batch below {args.batch}",
                "with --npz or --dir, the same command goes on")


if __name__ == "__main__":
    main()
