"""The foundation: Config, every preset, the command line, and the machine that it all runs on.

Each field of `Config` is a flag of train.py, and its sentence below is the flag's --help. A preset
is a Config with a name. The machine, in the last part of the file, is everything that is neither
network nor diffusion: processes, precision, seeds, messages, files that appear whole. Every other
file may import this one; it imports none of them (only its own command, below, needs diffit.py).

`python configs.py` lists the presets with parameters and GFLOPs counted from the networks.
"""

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import errno
import gc
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake of the person at the keyboard, in one sentence: what was given, what was expected,
    what to do. Commands print it, and what the file system says (OSError), without a traceback;
    every other exception keeps its own."""


def flag_of(name):
    """lr_decay -> --lr-decay"""
    return "--" + name.replace("_", "-")


def nearest(word, known):
    """'; did you mean X?' for the known word that resembles this one most, or ''."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


# -------------------------------------------------------------------------------------------------
# Config


SMALLEST, LARGEST = 1e-12, 1e12  # numbers beyond these have no use here, and overflow somewhere


def option(default, text, choices="", only="", positive=False, signed=False, most=LARGEST):
    """A field of Config. text: its --help. choices: the words it takes. only: the networks or
    processes that it applies to; elsewhere it must keep its default. Numbers are from 0 to `most`,
    unless they must be positive or may be signed."""
    metadata = dict(
        help=text,
        choices=choices.split(),
        only=only.split(),
        positive=positive,
        signed=signed,
        most=most,
    )
    return dataclasses.field(default=default, metadata=metadata)


# Where each group of fields begins, and its heading in --help.
GROUPS = {
    "data": "data",
    "model": "network",
    "process": "diffusion process",
    "sampler": "sampling",
    "kimg": "training",
    "precision": "machine",
    "tick_kimg": "output and scores",
}

# What a network may be conditioned on: fields of which one at most is not 0.
CONDITIONS = ["num_classes", "token_width", "set_depth"]

# The networks (diffit.NETWORKS) by the fields that they take, and processes with a sigma.
TRANSFORMERS = "diffit dit"
UNETS = "unet ddpmpp"
EDMS = "edm edm-x0"
CONTINUOUS = f"{EDMS} vp ve"


def applies(field, model, process):
    """Does a field of Config mean anything for this network and process?"""
    only = field.metadata["only"]
    return not only or model in only or process in only


def out_of_range(number, metadata):
    """What the number of a field must be, if it is not, or None."""
    most = metadata["most"]
    if metadata["positive"] and number <= 0:
        return "above 0"
    if number < 0 and not metadata["signed"]:
        return "0 or more"
    if not abs(number) <= most:  # NaN, too
        return f"at most {most:d}" if isinstance(most, int) else f"at most {most:g}"
    return f"{SMALLEST:g} or more" if number and abs(number) < SMALLEST else None


TYPES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "yes or no",
    tuple: "a list of numbers",
}


def has_type(value, kind):
    """Is the value what a field of this type takes? Whole numbers are floats, too."""
    if kind is tuple:
        return isinstance(value, tuple) and all(has_type(part, float) for part in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. UserError where values do not fit one another."""

    # Data
    data: str = option(
        "", "shapes, shapes-set, outlines-set, or a folder, .zip, .npz, CIFAR archive or latents"
    )
    vae: str = option("", "weights of the autoencoder that turns latents into images")
    xflip: bool = option(False, "mirror half of the images")
    augment: float = option(0.0, "probability of each of EDM's augmentations; pixels only")
    set_size: int = option(
        0,
        "train on sets of N images of a class, each conditioned on the others; 0: no sets",
        most=1000,
    )
    holdout: tuple = option((), "classes kept from training on sets, by number")
    # Network
    model: str = option(
        "diffit",
        "diffit: latent DiffiT; dit: DiT; unet: image-space DiffiT; ddpmpp: DDPM++",
        choices=f"{TRANSFORMERS} {UNETS}",
    )
    input_size: int = option(
        32,
        "height and width of the network's input (latents: pixels / 8)",
        positive=True,
        most=2**14,
    )
    in_channels: int = option(3, "3 for pixels, 4 for latents", positive=True, most=2**14)
    num_classes: int = option(
        0, "number of classes; 0: unconditional (by default mostly that of the data)", most=2**20
    )
    token_width: int = option(
        0, "width of given tokens, in place of classes (by default that of the data)", most=2**16
    )
    token_count: int = option(
        1,
        "number of given tokens of an image (by default that of the data)",
        positive=True,
        most=2**16,
    )
    set_depth: int = option(0, "blocks of the encoder of sets; 0: none", most=1000)
    class_dropout_prob: float = option(
        0.1, "share of labels, tokens or sets replaced by the null of guidance"
    )
    learn_sigma: bool = option(False, "also predict the variance, in a second set of channels")
    time_in: str = option(
        "qkv",
        "where the time enters a block (DiffiT Tables 6, 7); none: DDPM++'s own attention",
        choices="qkv token bias mlp none",
        only="diffit unet ddpmpp",
    )
    condition_in: str = option(
        "adaln-zero",
        "how a DiT's blocks take time and label (DiT Table 4); adaln-zero+cross: adaLN-Zero by the "
        "time, cross-attention to tokens or sets",
        choices="adaln-zero adaln cross in-context adaln-zero+cross",
        only="dit",
    )
    time_embedding: str = option(
        "positional", "how the time is embedded (DiffiT Table 8)", choices="positional fourier none"
    )
    num_heads: int = option(4, "attention heads", positive=True, most=2**14)
    mlp_ratio: float = option(
        4.0,
        "hidden width of the MLPs / width",
        only=f"{TRANSFORMERS} unet",
        positive=True,
        most=1000,
    )
    patch_size: int = option(
        0,
        "side of a token in pixels or latents (unet: by default 1)",
        only=f"{TRANSFORMERS} unet",
        most=2**14,
    )
    hidden_size: int = option(
        0, "width of the tokens", only=TRANSFORMERS, positive=True, most=2**16
    )
    depth: int = option(0, "number of blocks", only=TRANSFORMERS, positive=True, most=1000)
    embed_gain: float = option(1.0, "scale of the tokens at initialisation", only=TRANSFORMERS)
    channels: tuple = option(
        (), "width at each resolution, finest first", only=UNETS, positive=True, most=2**16
    )
    blocks: tuple = option(
        (), "ResBlocks at each resolution, finest first", only=UNETS, positive=True, most=1000
    )
    cond_size: int = option(
        512, "width of the time embedding", only=UNETS, positive=True, most=2**16
    )
    dropout: float = option(0.0, "dropout in the ResBlocks", only=UNETS)
    window: int = option(8, "side of an attention window in tokens", only="unet", positive=True)
    encoder: str = option(
        "diffit", "encoder (DiffiT Table 4)", choices="diffit plain vit", only="unet"
    )
    decoder: str = option(
        "diffit", "decoder (DiffiT Table 4)", choices="diffit plain setr", only="unet"
    )
    # Process
    process: str = option(
        "ddpm",
        "ddpm: discrete timesteps; edm: Karras et al. 2022; edm-x0: the same with a network that "
        "predicts the clean image; vp, ve: Song et al. 2021's SDEs",
        choices=f"ddpm {CONTINUOUS}",
    )
    diffusion_steps: int = option(
        1000, "number of timesteps T", only="ddpm", positive=True, most=10**6
    )
    timesteps: str = option(
        "uniform", "how training draws timesteps", choices="uniform loss-aware", only="ddpm"
    )
    schedule: str = option("linear", "noise schedule", choices="linear cosine", only="ddpm")
    fixed_variance: str = option(
        "small",
        "variance of a step without --learn-sigma: the posterior's, or beta",
        choices="small large",
        only="ddpm",
    )
    spacing: str = option(
        "auto",
        "of the timesteps that a sampler visits; quadratic: more of those with little noise; auto: "
        "quadratic for dpmpp, else even, as published",
        choices="auto even quadratic",
        only="ddpm",
    )
    sigma_data: float = option(0.5, "standard deviation of the data", only=EDMS, positive=True)
    p_mean: float = option(-1.2, "mean of ln sigma in training", only=EDMS, signed=True)
    p_std: float = option(
        1.2, "standard deviation of ln sigma in training", only=EDMS, positive=True
    )
    sigma_min: float = option(
        0.002, "the sampler's lowest noise level", only=CONTINUOUS, positive=True
    )
    sigma_max: float = option(
        80.0, "the sampler's highest noise level", only=CONTINUOUS, positive=True
    )
    rho: float = option(
        7.0, "spacing of the sampler's noise levels", only=CONTINUOUS, positive=True
    )
    # Sampling
    sampler: str = option("ddpm", "sampling method", choices="ddpm ddim dpmpp heun")
    sampling_steps: int = option(
        250, "noise levels that the sampler visits (heun: two network calls each)", positive=True
    )
    clip_denoised: bool = option(False, "keep predicted images in [-1, 1]; pixels only")
    cfg_scale: float = option(1.0, "scale of classifier-free guidance; 1: none")
    cfg_schedule: str = option(
        "constant",
        "power-cosine: grows to --cfg-scale over the timesteps",
        choices="constant power-cosine",
    )
    cfg_channels: int = option(0, "guide only the first channels; 0: all")
    cfg_exact: bool = option(
        False, "run the unconditional pass even where the scale is within 0.01 of 1"
    )
    cfg_interval: tuple = option((), "guide only at noise levels sigma from LOW to HIGH (LOW,HIGH)")
    eta: float = option(0.0, "noise of ddim: 0 none, 1 as much as ddpm")
    churn: float = option(0.0, "noise that heun adds on the way (EDM's S_churn)", only=CONTINUOUS)
    churn_interval: tuple = option(
        (), "--churn only at noise levels from LOW to HIGH (S_tmin, S_tmax)", only=CONTINUOUS
    )
    churn_noise: float = option(1.0, "scale of the noise of --churn (S_noise)", only=CONTINUOUS)
    # Training
    kimg: float = option(1000.0, "length of training in thousands of images", positive=True)
    batch_size: int = option(256, "images per step, over all processes", positive=True, most=2**20)
    micro_batch: int = option(0, "images per forward pass; 0: the process's whole share")
    lr: float = option(1e-4, "learning rate", positive=True)
    muon_lr: float = option(
        0.0,
        "that of Muon for the matrices of the blocks, also in their --weight-decay; 0: AdamW "
        "trains these, too",
    )
    lr_rampup_kimg: float = option(0.0, "length of the linear ramp from 0, thousands of images")
    lr_decay: str = option("constant", "cosine: decays to 0 at the end", choices="constant cosine")
    beta2: float = option(0.999, "Adam's second beta; the first is 0.9, eps 1e-8")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    loss_reduction: str = option(
        "mean",
        "over an image; sum: as in EDM, so that gradients, their norms and --grad-clip have that "
        "scale, also beside Adam's eps (the log has mean losses)",
        choices="mean sum",
        only=EDMS,
    )
    grad_clip: float = option(0.0, "largest norm of the gradient; 0: no limit")
    nonfinite_grads: str = option(
        "skip",
        "skip: leave out a step with non-finite gradients; zero: set them to 0",
        choices="skip zero",
    )
    ema_decay: float = option(0.0, "decay of the weights' moving average per step; 0: by half-life")
    ema_halflife_kimg: float = option(
        500.0, "half-life of the weights' moving average, thousands of images"
    )
    ema_rampup: float = option(0.05, "half-life at most this share of the images seen; 0: no ramp")
    seed: int = option(
        0, "seed of the weights, the noise and the order of the data", most=2**63 - 1
    )
    # Machine
    precision: str = option(
        "auto",
        "arithmetic of the network; auto: bf16 where the hardware is fast at it, else fp32",
        choices="auto bf16 fp16 tf32 fp32",
    )
    compile: bool = option(False, "torch.compile each block")
    grad_checkpointing: bool = option(
        False, "recompute blocks in the backward pass instead of storing activations"
    )
    workers: int = option(2, "processes that read data, at most one for each core", most=1000)
    # Output
    tick_kimg: float = option(10.0, "thousands of images between log lines", positive=True)
    sample_kimg: float = option(
        1000.0,
        "thousands of images between sample grids; they also come after 2 minutes, then every 15",
        positive=True,
    )
    save_kimg: float = option(
        1000.0,
        "thousands of images between numbered checkpoints; last.pt is saved then, at grids and "
        "every 15 minutes",
        positive=True,
    )
    keep: int = option(0, "numbered checkpoints that are kept, the newest; 0: all")
    score_every: float = option(0.0, "thousands of images between scores of EMA samples; 0: none")
    score_n: int = option(10_000, "samples per score", most=10**8)
    score_ref: str = option("", "reference of the scores, from sample.py --reference or ADM's")
    inception: str = option("", "weights of Inception; else found by their published name")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self.check_field(field, getattr(self, field.name))
        for sentence in itertools.chain(self.conflicts(), self.sampling_conflicts()):
            raise UserError(sentence)

    def check_field(self, field, value):
        """One field by itself: a word that is known, a place where it has a meaning, a range."""
        flag = flag_of(field.name)
        if not has_type(value, field.type):
            raise UserError(f"{flag} {short(value)} must be {TYPES[field.type]}")
        choices = field.metadata["choices"]
        only = field.metadata["only"]
        here = f"{self.model} with {self.process}"
        if choices and value not in choices:
            hint = nearest(str(value), choices)
            raise UserError(
                f"{flag} {short(value)} is unknown; it takes {', '.join(choices)}{hint}"
            )
        if not applies(field, self.model, self.process):
            if value != field.default:
                raise UserError(f"{flag} is for {' and '.join(only)}, and this is {here}")
            return  # it is not used here, whatever its range
        if isinstance(value, str):
            return
        parts = value if isinstance(value, tuple) else (value,)
        if field.metadata["positive"] and not (value or field.default):
            each = " for each resolution" if field.type is tuple else ""
            raise UserError(f"{flag} is required for {here}; give a number{each}")
        for part in parts:
            if wrong := out_of_range(part, field.metadata):
                raise UserError(f"{flag} {short(value)} must be {wrong}")

    @property
    def takes_y(self):
        """Does the network take a y: classes, tokens or sets?"""
        return any(getattr(self, name) for name in CONDITIONS)

    def network_options(self):
        """The arguments of the network: the fields of its group, by name, that apply to it."""
        fields = dataclasses.fields(self)
        names = [field.name for field in fields]
        group = fields[names.index("model") + 1 : names.index("process")]
        used = [field.name for field in group if applies(field, self.model, self.process)]
        return {name: getattr(self, name) for name in used}

    def conflicts(self):
        """Sentences about fields that do not fit one another: network, data and training."""
        latents = self.in_channels != 3
        if self.in_channels < 3:
            yield (
                f"--in-channels {self.in_channels}: images have 3, grey ones too, as they are read "
                f"as RGB, and latents 4 or more; leave it out"
            )
        for name in ("class_dropout_prob", "dropout", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                yield f"{flag_of(name)} {getattr(self, name)} must be below 1"
        for name in ("channels", "blocks", "holdout"):
            if not all(isinstance(number, int) for number in getattr(self, name)):
                yield f"{flag_of(name)} {short(getattr(self, name))} must be whole numbers"
        if self.model == "ddpmpp" and self.time_in not in ("qkv", "none"):
            yield f"--time-in {self.time_in}: DDPM++ has its own attention (none) or TMSA (qkv)"
        if self.model != "ddpmpp" and self.time_in == "none":
            yield (
                "--time-in none would hide the label, too; for a network without the time pass "
                "--time-embedding none"
            )
        if self.model in TRANSFORMERS.split() and not self.patch_size:
            here = f"{self.model} with {self.process}"
            yield f"--patch-size is required for {here}; give a number"
        timed = "diffit" in (self.encoder, self.decoder)
        if self.model == "unet" and self.time_in != "qkv" and not timed:
            yield f"--time-in {self.time_in} has no effect unless --encoder or --decoder is diffit"
        if self.encoder == "vit" and self.decoder != "setr":
            yield "--encoder vit has features of one resolution, which only --decoder setr takes"
        if self.learn_sigma and self.process != "ddpm":
            yield "--learn-sigma needs --process ddpm; there is no other variance to learn"
        if self.diffusion_steps < 2:
            yield f"--diffusion-steps {self.diffusion_steps} must be 2 or more"
        if self.augment > 1 or (self.augment and latents):
            yield f"--augment {self.augment} is a probability, from 0 to 1, for pixels"
        if self.vae and not latents:
            vae = printable(self.vae, 300)
            yield f"--vae {vae} is for latents, and this network generates pixels"
        if self.micro_batch and self.batch_size % self.micro_batch:
            yield f"--micro-batch {self.micro_batch} does not divide --batch-size {self.batch_size}"
        for name in ("sample_kimg", "save_kimg"):  # files are named by whole thousands of images
            if getattr(self, name) < 1:
                yield f"{flag_of(name)} {getattr(self, name)} must be 1 or more"
        conditions = [name for name in CONDITIONS if getattr(self, name)]
        if len(conditions) > 1:
            flags = " and ".join(map(flag_of, conditions))
            yield f"{flags}: a network takes classes, tokens or sets; choose one"
        if self.set_size == 1 or bool(self.set_size) != bool(self.set_depth):
            yield (
                f"--set-size {self.set_size} and --set-depth {self.set_depth}: sets need 2 images "
                f"or more, of which the others stand for each, and an encoder of 1 block or more"
            )
        micro = self.micro_batch or self.batch_size
        if self.set_size and micro % self.set_size:
            which = "--micro-batch" if self.micro_batch else "--batch-size"
            yield f"{which} {micro} must be whole sets: a multiple of --set-size {self.set_size}"
        if self.holdout and not self.set_size:
            yield "--holdout keeps classes from training on sets, and this run has no --set-size"
        if self.token_count > 1 and not self.token_width:
            yield f"--token-count {self.token_count} needs --token-width, too"
        if self.score_every and not self.score_ref:
            yield f"--score-every {self.score_every:g} needs --score-ref FILE, a reference"
        if self.score_ref and not self.score_every:
            yield f"--score-ref {printable(self.score_ref, 300)} needs --score-every KIMG"

    def sampling_conflicts(self):
        """The same for the fields of sampling."""
        for name in ("cfg_interval", "churn_interval"):
            value = getattr(self, name)
            if value and not (len(value) == 2 and value[0] < value[1]):
                yield f"{flag_of(name)} {value} must be LOW,HIGH, LOW below HIGH"
        if self.sigma_min >= self.sigma_max:
            yield f"--sigma-min {self.sigma_min} must be below --sigma-max {self.sigma_max}"
        if self.process == "ddpm" and self.sampling_steps > self.diffusion_steps:
            yield (
                f"--sampling-steps {self.sampling_steps} must be from 1 to {self.diffusion_steps}, "
                f"the number of timesteps (--diffusion-steps)"
            )
        if self.eta > 1 or (self.eta and self.sampler != "ddim"):
            yield f"--eta {self.eta} is from 0 to 1, for --sampler ddim; this is {self.sampler}"
        if self.churn and self.sampler != "heun":
            yield f"--churn {self.churn} is for --sampler heun; this is {self.sampler}"
        if self.clip_denoised and self.in_channels != 3:
            yield "--clip-denoised is for pixels, which lie in [-1, 1]; latents do not"
        if self.cfg_schedule == "power-cosine" and self.process != "ddpm":
            yield "--cfg-schedule power-cosine depends on the timestep and needs --process ddpm"
        if self.cfg_scale != 1 and not self.takes_y:
            yield (
                f"--cfg-scale {self.cfg_scale:g} guides by classes, tokens or sets, and this "
                f"network has none; leave it out"
            )
        if self.cfg_scale != 1 and not self.class_dropout_prob:
            yield (
                f"--cfg-scale {self.cfg_scale:g} needs a network trained with "
                f"--class-dropout-prob above 0; pass --cfg-scale 1"
            )


# The fields that sampling depends on: sample.py takes them as flags, over those of the checkpoint.
SAMPLING = [
    "sampler", "sampling_steps", "eta", "churn", "churn_interval", "churn_noise", "clip_denoised",
    "spacing", "sigma_min", "sigma_max", "rho", "cfg_scale", "cfg_schedule", "cfg_channels",
    "cfg_interval", "cfg_exact", "vae", "precision",
]  # fmt: skip

# Earlier names, in checkpoints and on the command line, and what they are called now.
RENAMED = {
    "cfg": "cfg_scale",
    "steps": "sampling_steps",
    "clip": "clip_denoised",
    "nonfinite": "nonfinite_grads",
    "checkpoint_blocks": "grad_checkpointing",
    "n": "num_images",
    "raw": "no_ema",
}

# What other programs call things, and the flags that do them here, with a word about each.
LENGTH = ["--kimg X, the thousands of images to train on"]
ELSEWHERE = {
    "epochs": LENGTH,
    "iterations": LENGTH,
    "max_steps": LENGTH,
    "resume": ["--out DIR of the run: the same command again resumes"],
    "train_steps": LENGTH,
    "num_train_epochs": LENGTH,
    "learning_rate": ["--lr X"],
    "batch": ["--batch-size N"],
    "save_every": ["--save-kimg X"],
    "sample_every": ["--sample-kimg X"],
    "num_workers": ["--workers N"],
    "image_size": ["--input-size N (latents: pixels / 8)", "--size N"],
    "resolution": ["--input-size N (latents: pixels / 8)", "--size N"],
    "dataset": ["--data PATH"],
    "data_path": ["--data PATH"],
    "data_dir": ["--data PATH"],
    "output": ["--out PATH"],
    "output_dir": ["--out PATH"],
    "outdir": ["--out PATH"],
    "results_dir": ["--out PATH"],
    "fp16": ["--precision fp16"],
    "bf16": ["--precision bf16"],
    "amp": ["--precision bf16"],
    "mixed_precision": ["--precision bf16"],
    "ema": ["--ema-halflife-kimg X"],
    "cond": ["--num-classes N, by default the number in the data"],
    "gpus": ["--device cuda; for several: torchrun --nproc_per_node=N SCRIPT.py ..."],
    "model_path": ["--ckpt FILE"],
    "checkpoint": ["--ckpt FILE", "--init-from FILE"],
    "network": ["--ckpt FILE"],
    "num_samples": ["--num-images N"],
    "samples": ["--num-images N"],
    "guidance_scale": ["--cfg-scale X"],
    "num_sampling_steps": ["--sampling-steps N"],
    "num_steps": ["--sampling-steps N"],
    "batch_size": ["--batch N"],
    "class": ["--classes LIST"],
}


# -------------------------------------------------------------------------------------------------
# Presets: every configuration of the DiffiT paper, DiT's, and ours. Where the sources disagree or
# are silent, the comment says what was chosen.

PRESETS: dict[str, Config] = {}
SOURCES = {}  # name -> (source, the FID it reports or None)
PAPER = {}  # name -> (parameters in millions, GFLOPs) as the paper gives them


def preset(name, source, fid, base={}, **changes):
    """Name a Config: base, a dict of fields, with these changes."""
    PRESETS[name] = Config(**{**base, **changes})
    SOURCES[name] = source, fid


# The built-in run, for minutes on two CPU cores: an image-space DiffiT. Its convolutions draw edges
# across patches. The network predicts the image, since one so narrow has no room for the noise. It
# trains at high noise, which forms the outline; the sampler stops at a sigma of 0.15, from where
# flat shapes are clean in one step. Muon needs less than half of AdamW's images.
preset(
    "shapes", "this project", None, data="shapes", num_classes=10, model="unet",
    patch_size=2, channels=(32, 64, 64), blocks=(1, 1, 1), cond_size=64, window=4, mlp_ratio=2,
    process="edm-x0", p_mean=0.3, p_std=0.9, sigma_min=0.15, sigma_max=10,
    sampler="dpmpp", sampling_steps=18, clip_denoised=True, cfg_scale=2,
    kimg=40, batch_size=32, lr=4e-3, muon_lr=0.02, lr_rampup_kimg=1, lr_decay="cosine",
    beta2=0.95, grad_clip=1.0, ema_halflife_kimg=3, ema_rampup=0.1,
    workers=1, tick_kimg=2, sample_kimg=20, save_kimg=40,
)  # fmt: skip

# The built-in kinds of shapes, of which 20 are held out, on two CPU cores. Sets of 3, not of 6,
# because a batch then has twice as many kinds and noise levels; a support may have any number. With
# colours and sizes of their own, kinds are learned in minutes, and convolutions draw them cleanly.
# Outlines alone need many more images, which the small DiT has fastest, and more noise.
SHAPES_SET = dict(
    input_size=16, set_size=3, set_depth=2, holdout=tuple(range(980, 1000)),
    process="edm", p_std=1.0, sigma_min=0.05, sigma_max=10,
    sampler="dpmpp", sampling_steps=18, clip_denoised=True,
    batch_size=48, lr=2e-3, lr_rampup_kimg=2, lr_decay="cosine", beta2=0.95,
    grad_clip=1.0, ema_halflife_kimg=4, ema_rampup=0.1, workers=1,
)  # fmt: skip
preset(
    "shapes-set", "this project", None, SHAPES_SET, data="shapes-set", model="unet",
    channels=(16, 32, 64), blocks=(1, 1, 1), cond_size=64, window=4, p_mean=-0.2, cfg_scale=2,
    kimg=70, tick_kimg=2, sample_kimg=35, save_kimg=70,
)  # fmt: skip
preset(
    "outlines-set", "this project", None, SHAPES_SET, data="outlines-set", model="dit",
    patch_size=4, hidden_size=128, depth=4, num_heads=4, embed_gain=4, p_mean=0.2, cfg_scale=3,
    kimg=600, tick_kimg=10, sample_kimg=100, save_kimg=300,
)  # fmt: skip

# For photographs of your own, a few hundred or thousand. Each resolution costs about as much as the
# others; more noise than EDM's, because at 32 pixels most of an image is its layout; augmentation
# and dropout against copies. Sub-folders are classes.
preset(
    "photos", "this project", None, model="unet", input_size=32, channels=(32, 64, 128, 256),
    blocks=(1, 1, 1, 1), cond_size=256, window=8, dropout=0.05, augment=0.1, xflip=True,
    process="edm", p_mean=-0.6, p_std=1.2, sampler="dpmpp", sampling_steps=20, clip_denoised=True,
    kimg=60, batch_size=32, lr=2e-3, lr_rampup_kimg=2, lr_decay="cosine", beta2=0.99,
    grad_clip=1.0, ema_halflife_kimg=4, ema_rampup=0.1,
    tick_kimg=2, sample_kimg=10, save_kimg=60,
)  # fmt: skip

# DiffiT in image space: Tables S.2 and S.3. "Strictly follows EDM" (H.1): its process,
# augmentation, ramp, EMA and dropout; iterations, batch size and learning rate are DiffiT's.
# Blocks per resolution: S.2 and H.1 say 4; I.1 says 1,2,2,2 and 2. Heads: not given, 4 here.
EDM_UNET = dict(
    model="unet", process="edm", sampler="heun", lr_rampup_kimg=10_000, ema_halflife_kimg=500,
    loss_reduction="sum", nonfinite_grads="zero", workers=4, tick_kimg=50, sample_kimg=1000,
    save_kimg=5000,
)  # fmt: skip
cifar10 = dict(
    EDM_UNET, input_size=32, channels=(128, 256, 256), blocks=(2, 2, 2), window=4,
    dropout=0.13, augment=0.12, sampling_steps=18, batch_size=512, lr=1e-3, kimg=102_400,
)  # fmt: skip
ffhq64 = dict(
    EDM_UNET, input_size=64, channels=(128, 256, 256, 256), blocks=(4, 4, 4, 4), window=8,
    dropout=0.05, augment=0.15, xflip=True, sampling_steps=40, batch_size=256, lr=2e-4, kimg=51_200,
)  # fmt: skip
# fmt: off
preset("cifar10",      "DiffiT Table 2", 1.95, cifar10)
preset("ffhq64",       "DiffiT Table 2", 2.22, ffhq64)
preset("cifar10-l4",   "DiffiT Table S.2, the other reading of L", None, cifar10, blocks=(4, 4, 4))
preset("ffhq64-l1222", "DiffiT Table S.2, the other reading of L", None, ffhq64, blocks=(1, 2, 2, 2))

# Width of the time token / of the features; 512/256 is Table 2's. Features of 512: twice the width
# at every resolution.
preset("cifar10-512-512", "DiffiT Table 3", 1.99, cifar10, channels=(256, 512, 512))
preset("cifar10-256-256", "DiffiT Table 3", 2.13, cifar10, cond_size=256)
preset("ffhq64-512-512",  "DiffiT Table 3", 2.27, ffhq64, channels=(256, 512, 512, 512))
preset("ffhq64-256-256",  "DiffiT Table 3", 2.41, ffhq64, cond_size=256)

# A to D; E is cifar10. Width and patch size of A's ViT-12 are not given: 512 and 2 here. Blocks
# without time keep their windows.
preset("cifar10-a-vit-setr",     "DiffiT Table 4", 5.34, cifar10, encoder="vit", decoder="setr",
       blocks=(4, 4, 4), channels=(128, 512, 512), num_heads=8, dropout=0.0)
preset("cifar10-b-plain-setr",   "DiffiT Table 4", 4.64, cifar10, encoder="plain", decoder="setr")
preset("cifar10-c-plain-plain",  "DiffiT Table 4", 3.71, cifar10, encoder="plain", decoder="plain")
preset("cifar10-d-diffit-plain", "DiffiT Table 4", 2.27, cifar10, decoder="plain")

# Song et al. 2021's recipe for DDPM++, sampled as EDM does (the paper does not say how).
DDPMPP = dict(
    model="ddpmpp", num_heads=1, channels=(256, 256, 256), blocks=(4, 4, 4), dropout=0.1,
    xflip=True, sampler="heun", sampling_steps=18, batch_size=128, lr=2e-4, lr_rampup_kimg=640,
    grad_clip=1.0, kimg=166_400, workers=4, tick_kimg=50, sample_kimg=1000, save_kimg=5000,
)
VE = dict(DDPMPP, process="ve", sigma_min=0.02, sigma_max=100.0, ema_decay=0.999)
VP = dict(DDPMPP, process="vp", ema_decay=0.9999)
preset("ddpmpp-ve",      "DiffiT Table 5", 3.77, VE, time_in="none")
preset("ddpmpp-ve-tmsa", "DiffiT Table 5", 3.49, VE)
preset("ddpmpp-vp",      "DiffiT Table 5", 3.01, VP, time_in="none")
preset("ddpmpp-vp-tmsa", "DiffiT Table 5", 2.76, VP)

# F and G; H, time in q, k and v, is cifar10.
preset("cifar10-f-time-bias", "DiffiT Table 6", 3.97, cifar10, time_in="bias")
preset("cifar10-g-time-mlp",  "DiffiT Table 6", 3.81, cifar10, time_in="mlp")
preset("cifar10-time-token",  "DiffiT Table 7", 2.28, cifar10, time_in="token")
preset("ffhq64-time-token",   "DiffiT Table 7", 2.59, ffhq64, time_in="token")
preset("cifar10-fourier",     "DiffiT Table 8", 2.02, cifar10, time_embedding="fourier")
preset("ffhq64-fourier",      "DiffiT Table 8", 2.37, ffhq64, time_embedding="fourier")
preset("cifar10-window2",     "DiffiT Fig. 8", None, cifar10, window=2)  # 4 is cifar10
preset("cifar10-window8",     "DiffiT Fig. 8", None, cifar10, window=8)
preset("ffhq64-window2",      "DiffiT Fig. 8", None, ffhq64, window=2)  # 8 is ffhq64
preset("ffhq64-window4",      "DiffiT Fig. 8", None, ffhq64, window=4)

# Latent DiffiT: Sec. 4.1. The text says 30 layers; the published weights and Table 9's 561M say 28.
# Length: Fig. 7b's 1000k steps. Guidance at 256 pixels: 4.4 in the release, 4.6 in the text.
LATENT = dict(
    in_channels=4, num_classes=1000, learn_sigma=True, patch_size=2, hidden_size=1152, depth=28,
    num_heads=16, ema_decay=0.9999, cfg_channels=3, workers=4, tick_kimg=50, sample_kimg=2000,
    save_kimg=10_000,
)
imagenet256 = dict(
    LATENT, model="diffit", input_size=32, batch_size=256, lr=3e-4, kimg=256_000,
    cfg_scale=4.4, cfg_schedule="power-cosine",
)
preset("imagenet256", "DiffiT Tables 1, 9", 1.73, imagenet256)
preset("imagenet512", "DiffiT Table 1", 2.67, LATENT, model="diffit", input_size=64,
       batch_size=512, lr=1e-4, kimg=512_000, cfg_scale=1.49)
preset("imagenet256-depth30", "DiffiT appendix H.2", None, imagenet256, cfg_scale=4.6, depth=30)
PAPER["imagenet256"] = PAPER["imagenet256-depth30"] = 561, 114
PAPER["dit-xl-2"] = 675, 119

# DiT: sizes from Table 1, training from Sec. 4: 400k steps of 256 images; XL/2 7M at 256 pixels,
# 3M at 512.
DIT = dict(LATENT, model="dit", xflip=True, lr=1e-4, cfg_scale=1.5)
DIT_SIZES = {  # depth, width, heads
    "s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16),
}
for size, (depth, width, heads) in DIT_SIZES.items():
    for patch in (2, 4, 8):
        best = (size, patch) == ("xl", 2)
        preset(f"dit-{size}-{patch}", "DiT Table 1", 2.27 if best else None, DIT, depth=depth,
               hidden_size=width, num_heads=heads, patch_size=patch,
               kimg=1_792_000 if best else 102_400)
preset("dit-xl-2-512", "DiT Table 3", 3.04, DIT, input_size=64, kimg=768_000)

# The other ways of conditioning, after 400k steps and without guidance, where adaLN-Zero (dit-xl-2
# with --kimg 102400 --cfg-scale 1) has 19.47.
for way, fid, *counts in [("in-context", 35.24, 449, 119.37), ("cross", 26.14, 598, 137.62),
                          ("adaln", 25.21, 600, 118.56)]:
    preset(f"dit-xl-2-{way}", "DiT Table 4", fid, DIT, condition_in=way, kimg=102_400, cfg_scale=1)
    PAPER[f"dit-xl-2-{way}"] = counts

# DiT-XL/2 with its own modulation, or with TMSA in its place: DiffiT's blocks, DiT's training.
preset("dit-xl-2-1000k",      "DiffiT Fig. 7b", None, DIT, kimg=256_000)
preset("dit-xl-2-1000k-tmsa", "DiffiT Fig. 7b", None, DIT, model="diffit", kimg=256_000)

# CIFAR-100 in pixels: DiTs of about equal size, traded between width and depth.
CIFAR100_SIZES = [(450, 6, 9), (384, 12, 6), (440, 6, 8), (420, 6, 6), (512, 4, 8)]
for width, depth, heads in CIFAR100_SIZES:
    preset(f"cifar100-{width}x{depth}", "this project", None, model="dit", num_classes=100,
           learn_sigma=True, patch_size=2, hidden_size=width, depth=depth, num_heads=heads,
           sampler="dpmpp", sampling_steps=40, clip_denoised=True, ema_decay=0.9999, xflip=True,
           lr=1e-4, kimg=102_400, workers=4, tick_kimg=50, sample_kimg=1000, save_kimg=5000)

# The same sizes, conditioned on five pictures of a class that it never saw (Giannone et al. 2022;
# the recipe of the DiTs that followed it: 300k steps of 32 sets): by a vector, or with -lag by
# tokens for cross-attention. The classes are split by superclass. (The sources count 43.5M for
# 384x12 and 44.9M for 450x6. The first is right but for learned positions, affine norms and a
# stacked input; the second halves the blocks without widening them, and counts an adaLN in the
# encoder that it does not have.)
CIFAR100_VALIDATION = (
    3, 42, 43, 88, 97, 15, 19, 21, 31, 38, 26, 45, 77, 79, 99, 36, 50, 65, 74, 80,
)
CIFAR100_TEST = (
    4, 30, 55, 72, 95, 6, 7, 14, 18, 24, 34, 63, 64, 66, 75, 2, 11, 35, 46, 98,
)
SETS = dict(
    model="dit", patch_size=2, set_size=6, set_depth=6,
    holdout=(*CIFAR100_VALIDATION, *CIFAR100_TEST),
    diffusion_steps=250, sampler="ddim", sampling_steps=250, clip_denoised=True,
    batch_size=192, ema_decay=0.9999, lr=1e-4, kimg=57_600, workers=4, tick_kimg=50,
    sample_kimg=1000, save_kimg=5000,
)
for width, depth, heads in CIFAR100_SIZES:
    preset(f"cifar100-{width}x{depth}-set", "Few-Shot Diffusion Models", None, SETS,
           hidden_size=width, depth=depth, num_heads=heads)
preset("cifar100-450x6-set-lag", "Few-Shot Diffusion Models", None,
       dict(SETS, hidden_size=450, depth=6, num_heads=9), condition_in="adaln-zero+cross")
# fmt: on


# -------------------------------------------------------------------------------------------------
# From names and flags to a Config


def config_from_preset(name, given):
    """The preset with the fields that were given (a dict). A field that the preset set for another
    network or process, and that the given ones make meaningless, falls back to its default; so do
    its patches between a transformer and a U-Net, another condition than the given one, and
    guidance without any. UserError for an unknown preset or values that do not fit."""
    if name not in PRESETS:
        raise UserError(
            f"unknown preset {short(name)}{nearest(name, PRESETS)} (python configs.py lists them)"
        )
    values = {**dataclasses.asdict(PRESETS[name]), **given}
    for field in dataclasses.fields(Config):
        used = applies(field, values["model"], values["process"])
        if not used and field.name not in given:
            values[field.name] = field.default
    kinds = [model in TRANSFORMERS.split() for model in (PRESETS[name].model, values["model"])]
    if kinds[0] != kinds[1] and "patch_size" not in given:
        values["patch_size"] = 0
    # What a network is conditioned on takes the place of what its preset had.
    chosen = [field for field in CONDITIONS if given.get(field)]
    for field in CONDITIONS:
        if chosen and field not in given:
            values[field] = 0
    if given.get("set_size") == 0:
        values["set_depth"] = given.get("set_depth", 0)
    if not values["set_depth"]:
        values["set_size"] = given.get("set_size", 0)
        values["holdout"] = given.get("holdout", ())
    if not any(values[field] for field in CONDITIONS) and "cfg_scale" not in given:
        values["cfg_scale"] = 1.0
    return Config(**values)


def config_from_dict(values, path):
    """The Config that the file at path holds as a dict, also under earlier names of its fields.
    UserError if a field is unknown here, or has an impossible value."""
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    unknown = values.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        names = ", ".join(map(short, unknown))
        raise UserError(f"the configuration in {path} has fields of another version: {names}")
    # JSON knows no tuples.
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return Config(**values)
    except UserError as error:
        raise UserError(f"the configuration in {path} does not fit this version: {error}") from None


def number(kind):
    """A type of argparse: an int, or a float."""

    def convert(text):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{short(text)} is not {TYPES[kind]}") from None

    return convert


def numbers(text):
    """'4,4,0.5' -> (4, 4, 0.5); whole numbers stay whole."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(int(part) if part.lstrip("-").isdigit() else float(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{short(text)} is not a list of numbers like 64,128"
        ) from None


def at_least(low, most=10**8):
    """A type of argparse: a whole number from `low` to `most`."""

    def whole_number(text):
        value = number(int)(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} must be {low} or more")
        if value > most:
            raise argparse.ArgumentTypeError(f"{short(value)} must be at most {most}")
        return value

    return whole_number


class HelpFormatter(argparse.HelpFormatter):
    """Help that shows each default, unless the sentence already does."""

    def _get_help_string(self, action):  # as argparse.ArgumentDefaultsHelpFormatter does it
        shown = action.default is not argparse.SUPPRESS and not action.required
        if shown and "default" not in action.help:
            return f"{action.help} (default: {format_default(action.default)})"
        return action.help


def format_default(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return "none" if value in (None, "") else value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every error is one sentence and exit code 2, with the nearest name
    for an unknown flag, and whose help shows each default."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):  # also called for each sub-command
        args, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self.unknown_argument(unknown[0].split("=")[0]))
        return args, unknown

    def unknown_argument(self, flag):
        """A sentence about a flag that there is not, with what it is called here."""
        known = self._option_string_actions
        word = flag.strip("-").replace("-", "_").lower()
        renamed = flag_of(RENAMED.get(word, ""))
        elsewhere = [answer for answer in ELSEWHERE.get(word, ()) if answer.split()[0] in known]
        if renamed in known:
            hint = f"; did you mean {renamed}?"
        elif elsewhere:
            hint = f"; here it is {elsewhere[0]}"
        else:
            hint = nearest(flag, known) or "; --help lists them"
        return f"unknown argument {flag}{hint}"

    def error(self, message):
        end_live_line()
        self.exit(2, f"{self.prog.split()[0]}: {printable(message)}\n")

    def add_config(self, names=None, shown=None):
        """A flag for each field of Config, or for those named, in the groups of Config; a flag that
        is not given leaves no trace in the result. shown: the Config whose values --help gives as
        defaults; without, they are those of a checkpoint."""
        group = None
        for field in dataclasses.fields(Config):
            if field.name in GROUPS:
                group = GROUPS[field.name]
            if names is None or field.name in names:
                if isinstance(group, str):
                    group = self.add_argument_group(group)
                default = format_default(getattr(shown, field.name, "the checkpoint's"))
                group.add_argument(flag_of(field.name), **flag_options(field, default))


def add_device(group):
    group.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto: an NVIDIA GPU, else an Apple one (mps), else the CPU",
    )


METAVARS = {str: "PATH", int: "N", float: "X", tuple: "A,B,..."}


def flag_options(field, default):
    """How argparse reads a field of Config, and what --help says of it."""
    choices = field.metadata["choices"]
    options = dict(default=argparse.SUPPRESS)
    text = field.metadata["help"]
    text += "" if "default" in text else f" (default: {default})"
    options["help"] = text.replace("%", "%%")
    if field.type is bool:
        return dict(options, action=argparse.BooleanOptionalAction)
    metavar = "{" + ",".join(choices) + "}" if choices else METAVARS[field.type]
    kinds = {str: str, int: number(int), float: number(float), tuple: numbers}
    return dict(options, type=kinds[field.type], metavar=metavar)


# -------------------------------------------------------------------------------------------------
# The machine: a command in one process, or in the processes that torchrun started

PATIENCE = datetime.timedelta(minutes=10)  # how long a process waits for another before it gives up


def run_command(parser, act, if_out_of_memory="", if_process_lost="", device="auto"):
    """Run act() in all processes that were started; an error that a user can cause ends in one
    sentence and exit code 2. if_out_of_memory, if_process_lost: advice that ends these sentences.
    device: the value of --device. act -> the number of the signal that ended it, or None."""
    end_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where tests replace them
            stream.reconfigure(errors="backslashreplace")  # a path may have letters it lacks
    try:
        choose_device(device)
        join_processes()
        stopped = act()
        leave_processes()  # after an error the others end by themselves, with a sentence
        sys.stdout.flush()
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            sys.exit(141)  # as if by SIGPIPE
        if getattr(error, "shared", False) and rank_and_size()[0]:
            sys.exit(2)  # rank 0 prints it for all
        parser.error(str(error))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            parser.error(f"out of memory; {if_out_of_memory}")
        if "No working C++ compiler" in str(error):  # one of many types of torch's
            parser.error(
                "--compile needs a C++ compiler, and there is none; install g++ or clang++ (or "
                "name yours in CXX), or leave the flag out"
            )
        if "DataLoader worker" in str(error) and "Caught" not in str(error):
            parser.error(
                f"a DataLoader worker died ({first_line(error)}); if memory was short, "
                f"pass fewer --workers or smaller images"
            )
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        parser.error(
            f"rank {rank_and_size()[0]} lost the other processes "
            f"({first_line(error)}); {if_process_lost}"
        )
    except KeyboardInterrupt:
        end_live_line()
        parser.exit(130, f"{parser.prog}: stopped\n")
    if stopped:
        ignore_signals()  # schedulers signal more than once
        sys.exit(128 + stopped)


def stdout_is_closed():
    """Has whoever read the output seen enough, as in `| head`?"""
    try:
        print(flush=True)
    except BrokenPipeError:
        sys.stdout = None  # Python would try again at its end
        return True
    return False


def is_out_of_memory(error):
    """Python's, torch's on a GPU, and torch's on a CPU, which is a RuntimeError like others."""
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


# Signals that ask a process to end: Ctrl-C, a scheduler's time limit, a terminal that was closed.
ENDING = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    ENDING.append(signal.SIGHUP)


def end_on_signals():
    """SIGTERM and SIGHUP end a command like Ctrl-C: temporary files are removed, workers end. What
    is ignored (SIGHUP under nohup) stays ignored. Outside a main thread nothing is changed."""
    with contextlib.suppress(ValueError):  # only a main thread may
        for number in ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, exit_on_signal)


def ignore_signals():
    with contextlib.suppress(ValueError):  # only a main thread may
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)


def exit_on_signal(number, frame):
    ignore_signals()  # the first one is enough
    say(f"stopped by {signal.Signals(number).name}")
    sys.exit(128 + number)


# -------------------------------------------------------------------------------------------------
# Processes that read data. They ignore the signals that ask a command to end, because their parent
# needs them until its step is done; they end with their parent, whichever way it ends.


def start_worker(_):
    """The first thing that a DataLoader worker does."""
    ignore_signals()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this process once its parent is gone, or the server that forked it for the parent."""
    parent = multiprocessing.parent_process()
    forked_by = os.getppid()
    while parent.is_alive() and os.getppid() == forked_by:
        time.sleep(1)
    os._exit(1)


@atexit.register
def end_workers():
    """Kill the daemonic children before the interpreter ends: it would ask them to end, which
    workers ignore, and wait for ever. Only an exception leaves any behind."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def worker_count(workers):
    """At most one for each core that this process may use; more only slow one another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(workers, cores or 1)


# -------------------------------------------------------------------------------------------------
# Devices and processes


class DEVICE:
    """What --device said."""

    kind = "auto"


def choose_device(kind):
    """The value of --device, for the whole process. UserError if there is no such device here."""
    there = {
        "auto": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not there[kind]:
        maker = {"cuda": "NVIDIA", "mps": "Apple"}[kind]
        raise UserError(
            f"--device {kind}: torch {torch.__version__} finds no {maker} GPU here; leave the flag "
            f"out, or pass --device cpu"
        )
    DEVICE.kind = kind


def default_device():
    """This process's own NVIDIA GPU, else the Apple GPU, else the CPU; or as --device says."""
    kind = DEVICE.kind
    if kind == "auto" and torch.cuda.is_available():
        kind = "cuda"
    elif kind == "auto":
        kind = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)


def to_device(x, device):
    """x there; neither the program nor an NVIDIA GPU waits for the copy."""
    if device.type != "cuda":
        return x.to(device)  # Apple's GPUs may read memory that is free by then
    # Memory that is not pinned would have to be read before this returns.
    return x.pin_memory().to(device, non_blocking=True)


def has_float64(device):
    """Apple GPUs compute in fp32 at most."""
    return device.type != "mps"


def join_processes():
    """Under torchrun, join the other processes: NCCL for tensors on GPUs, gloo for those on CPUs,
    which no GPU has to wait for. UserError if there are more processes than GPUs, if the others
    do not connect, or if SLURM started several processes that do not know of one another."""
    refuse_strangers()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    device = default_device()
    if device.type == "mps":
        raise UserError(
            "several processes cannot share the Apple GPU; start one, or pass --device cpu"
        )
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"there are {torch.cuda.device_count()} GPUs here, and this is process "
                f"{device.index + 1} on this machine; start no more processes than GPUs"
            )
        torch.cuda.set_device(device)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        raise UserError(
            f"rendezvous failed: rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} could "
            f"not reach the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({first_line(error)}); start all of them with "
            f"torchrun, or unset WORLD_SIZE and RANK for a single process"
        ) from None


def refuse_strangers():
    """UserError if srun started several of this process: each would do all of the work."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"SLURM_NTASKS is {tasks}, and each of these tasks would do the whole work by itself; "
            f"ask for one task on a machine, and let it start the processes: srun "
            f"--ntasks-per-node=1 torchrun --nproc_per_node=GPUS SCRIPT.py ... (for a single "
            f"process: --ntasks=1)"
        )


def leave_processes():
    """Leave the group; otherwise a process that is still talking reports those that are gone."""
    if rank_and_size()[1] > 1:
        dist.destroy_process_group()
        gc.collect()  # the group's threads must end before the interpreter does


def rank_and_size():
    """This process's number and how many there are; (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_gather(x):
    """x (..., b) of every process, in order of rank -> (..., b * size), in each of them."""
    size = rank_and_size()[1]
    if size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=-1)


def all_gather_object(value):
    """[value of rank 0, of rank 1, ...], in each process."""
    values = [value] * rank_and_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_0(act):
    """Call act in one process, once all have come this far -> its result, in all. A UserError or
    OSError is raised in all, too, marked `shared`: rank 0 will print it."""
    if rank_and_size()[1] == 1:
        return act()
    all_gather_object(None)  # a barrier: rank 0 acts once all have arrived
    result = error = None
    if rank_and_size()[0] == 0:
        try:
            result = act()
        except (UserError, OSError) as caught:
            error = (OSError if isinstance(caught, OSError) else UserError)(str(caught))
    result, error = all_gather_object((result, error))[0]
    if error:
        error.shared = True
        raise error
    return result


@contextlib.contextmanager
def exclusive(folder):
    """Inside the with block this run alone works in the folder, which is made if it is missing.
    The system holds the lock, on an empty file .lock that stays there, and lets go of it when this
    process ends, whichever way. Rank 0 holds it for all processes. UserError if it is taken."""
    files = []
    on_rank_0(lambda: files.append(lock(Path(folder))))
    try:
        yield
    finally:
        for file in files:
            file.close()


def lock(folder):
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "w")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UserError(
                f"another process is working in {folder}; wait until it is done, or choose another "
                f"folder"
            ) from None
        say(f"{folder} cannot be locked ({error.strerror}); start no second run there")
    return file


LOCK = ".lock"
# What may lie in a folder that is still to be begun, if its first start was killed.
UNSEEN = {LOCK, ".config.json.tmp", ".settings.json.tmp", ".latents.json.tmp"}


def lockstep(batches, device):
    """The batches of this process, then None for as long as another process still has some. So no
    process waits for longer than a batch takes, whatever the slowest has left."""
    for batch in itertools.chain(batches, itertools.repeat(None)):
        if not all_gather(torch.tensor([int(batch is not None)], device=device)).any():
            return
        yield batch


# -------------------------------------------------------------------------------------------------
# Precision, speed and seeds


def fast_bf16(device):
    """Is bf16 faster than fp32 here? CUDA from Ampere on, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def arithmetic(precision, device):
    """What --precision means on this device: bf16, fp16, tf32 or fp32. UserError for tf32 where
    there is none."""
    if precision == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise UserError(
            f"--precision tf32 is a mode of NVIDIA GPUs, and this run is on {device.type}; choose "
            f"bf16 or fp32"
        )
    return precision


def autocast(precision, device):
    """The context in which networks run; parameters, sums and losses stay fp32. On CUDA it also
    sets, for the whole process, whether fp32 products may use tf32."""
    kind = arithmetic(precision, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        torch.backends.cudnn.allow_tf32 = kind == "tf32"
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=kind in ("bf16", "fp16"))


def synchronized_time(device):
    """The time in seconds, once the device has finished its work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def seconds_per_call(work, repeats, device, warmup=1):
    """The mean time of work(), after a warm-up."""
    for _ in range(warmup):
        work()
    start = synchronized_time(device)
    for _ in range(repeats):
        work()
    return (synchronized_time(device) - start) / repeats


def format_speed(images_per_s, multiply_adds, precision, device):
    """A sentence: images/s, TFLOP/s (two operations per multiply-add of an image), their share of
    a matrix product's in the same arithmetic here and now, and peak memory."""
    size = rank_and_size()[1]
    memory = peak_memory(device)
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device)
    # What this machine reaches here and now, beside whatever else it does.
    with torch.no_grad(), autocast(precision, device):
        product = 2 * side**3 / seconds_per_call(lambda: a @ a, 10, device, warmup=3) * size
    rate = 2 * multiply_adds * images_per_s
    return (
        f"{images_per_s:.1f} images/s, {rate / 1e12:.3g} TFLOP/s, {100 * rate / product:.0f} % of "
        f"the {product / 1e12:.3g} TFLOP/s of a matrix product of {side} in "
        f"{arithmetic(precision, device)}{f' on {size} processes' if size > 1 else ''}, "
        f"{memory:.2f} GB"
    )


def peak_memory(device):
    """Peak memory of this process in GB: the GPU's, or on a CPU all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9  # at present: it keeps no peak
    if sys.platform == "win32":
        return math.nan
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def seed_from(*numbers):
    """A 64-bit seed that depends on all the numbers; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# -------------------------------------------------------------------------------------------------
# Messages, and files that appear whole


def say(text):
    """A message on stderr, on a line of its own."""
    text = printable(text)
    if LIVE.length:
        blank = " " * min(LIVE.length, terminal_width() - 1)
        to_stderr(f"\r{blank}\r", end="")
        LIVE.length = 0
    to_stderr(text)


def to_stderr(text, end="\n"):
    with contextlib.suppress(OSError):  # a terminal that was closed; its SIGHUP ends the run
        print(text, end=end, file=sys.stderr, flush=True)


def live_line(text):
    """Progress on stderr: on a terminal one line that is rewritten in place and never wider than
    the terminal; elsewhere at most one line a minute."""
    text = printable(text)
    if sys.stderr.isatty():
        # One column less than there are: a full line would move the cursor to the next one.
        width = terminal_width() - 1
        text = text[:width]
        padded = text.ljust(min(LIVE.length, width))  # erases a longer line
        to_stderr("\r" + padded, end="")
        LIVE.length = len(text)
    elif time.time() - LIVE.printed > 60:
        LIVE.printed = time.time()
        to_stderr(text)


def end_live_line():
    """Leave the live line where it is, and continue below it."""
    if LIVE.length:
        to_stderr("")
        LIVE.length = 0


class LIVE:
    """The state of the live line."""

    length = 0  # characters that stand on the terminal's last line
    printed = time.time()  # when a line was last printed elsewhere


def terminal_width():
    """Columns of the terminal that stderr goes to; 80 where it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: unknown
    except OSError:
        return 80


def printable(text, longest=4000):
    """A text in one line of limited length: what is not a letter, a sign or a space (names in files
    may hold line breaks and a terminal's commands) is escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: longest + 1])
    return text if len(text) <= longest else text[:longest] + "..."


def short(value):
    """A value from a file or a command line, as messages show it."""
    return printable(value if isinstance(value, str) else repr_or_type(value), 60)


def repr_or_type(value):
    try:
        return repr(value)
    except (ValueError, RecursionError):  # more than 4,300 digits, or lists in lists
        return f"{type(value).__name__} of great length"


def first_line(error):
    """An exception in one line."""
    return printable((str(error).splitlines() or [""])[0] or type(error).__name__, 200)


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path beside `path` to write to. It is renamed to `path` at the end, and removed
    if anything fails: `path` holds all of the new content, or its previous content."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A small file, whole and on the disk, unless it holds this text already."""
    if path.exists() and path.read_bytes() == text.encode():
        return
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path} could not be written ({first_line(error)})") from None


# -------------------------------------------------------------------------------------------------
# python configs.py

NOTE = """
561M parameters belong to 28 layers, which the published weights have; the 30 layers of the text
have 600.9M. DiffiT's 114 GFLOPs are the 118.5 counted here without the two products inside
attention (28 x 2 x 256^2 x 1152 = 4.2); DiT's 119 includes them. Parameters of sets' presets are
with their encoder, GFLOPs without: it reads each picture once."""


def main():
    parser = Parser(prog="configs.py", description="Print every preset.")
    parser.parse_args()
    run_command(parser, print_presets)


def print_presets():
    """The table of presets, by the source they come from."""
    from diffit import measure  # for this table alone: as a module, configs needs no other file

    print(
        f"{'preset':24}{'network':9}{'parameters':>12}{'GFLOPs':>9}{'tokens':>8}{'FID':>7}"
        f"   in the paper\n{'':44}(multiply-adds) (reported)"
    )
    heading = None
    for name, cfg in PRESETS.items():
        parameters, multiply_adds, tokens = measure(cfg)
        source, fid = SOURCES[name]
        if source != heading:
            print(f"\n{source}")
            heading = source
        paper = "{}M, {} GFLOPs".format(*PAPER[name]) if name in PAPER else ""
        print(
            f"{name:24}{cfg.model:9}{parameters / 1e6:11.2f}M{multiply_adds / 1e9:9.2f}"
            f"{tokens:8}{fid or '-':>7}   {paper}"
        )
    print(NOTE)


if __name__ == "__main__":
    main()
