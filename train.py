"""Training: python train.py --preset NAME --data PATH, or torchrun --nproc_per_node=8 train.py ...

`Trainer.step` is the step and `train` the loop around it; the parts they are made of come first.
The same command again resumes. No random state is ever saved, because everything random follows
from its place: the order of the data from (seed, place), the noise, timesteps and dropped labels
from (seed, step, micro-batch), whichever process works on that micro-batch. (With --micro-batch 0
its size, and so the noise, depends on the number of processes.)
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint

import configs
import data
import diffit
import diffusion
import sample
from configs import Config, Parser, UserError, on_rank_0, printable, rank_and_size, say

# -------------------------------------------------------------------------------------------------
# Gradients of all processes


class GradientAverager:
    """Adds up the gradients of all processes while the backward pass still runs. (Each process has
    divided its loss by the size of the whole batch, so the sum is the mean.) Every process then
    holds the same gradients, and so keeps the same weights. Ours, and not torch's
    DistributedDataParallel, so that it can be read.

    Parameters share buckets of about `bucket_mb`, in reverse order: the last layers have their
    gradients first. A full bucket's all-reduce starts at once; buckets go in turn, so that all
    processes send the same one. A single process skips all of it."""

    def __init__(self, parameters: list[nn.Parameter], bucket_mb: float = 25):
        self.alone = rank_and_size()[1] == 1
        self.active = False
        self.buckets = []
        if self.alone:
            return
        size = math.inf  # of the last bucket, so that the first parameter opens one
        for p in reversed(parameters):
            if size + p.nbytes > bucket_mb * 2**20:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.nbytes
        self.bucket_of = {p: k for k, bucket in enumerate(self.buckets) for p in bucket}
        self.sums = [
            torch.empty(
                sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device
            )
            for bucket in self.buckets
        ]
        # All processes draw the same weights, but weights of a file may differ between machines.
        for p in parameters:
            dist.broadcast(p.data, 0)
            p.register_post_accumulate_grad_hook(self.on_gradient)
        self.reset()

    def reset(self):
        self.active = False
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients still to come
        self.sent = []  # the all-reduces under way, one per bucket

    def start(self):
        """Before the backward pass of a step's last micro-batch: from now on a gradient that
        arrives is complete."""
        self.active = not self.alone

    def on_gradient(self, p):
        if self.active:
            self.missing[self.bucket_of[p]] -= 1
            # A bucket that is full early waits for its turn: all processes must send in one order.
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self.send(len(self.sent))

    def send(self, k):
        torch.cat([p.grad.flatten() for p in self.buckets[k]], out=self.sums[k])
        self.sent.append(dist.all_reduce(self.sums[k], async_op=True))

    def finish(self):
        """After that backward pass: wait, and give each parameter its sum."""
        if self.alone:
            return
        for work, total, bucket in zip(self.sent, self.sums, self.buckets, strict=True):
            work.wait()
            for p, grad in zip(bucket, total.split([p.numel() for p in bucket])):
                p.grad = grad.view_as(p)
        self.reset()


# -------------------------------------------------------------------------------------------------
# Moving average of the weights


class EMA:
    """A copy of the network whose weights follow the trained ones: after each step,
    ema = beta ema + (1 - beta) weights. beta is given, or follows from a half-life in images, which
    at the start is at most `rampup` of the images seen (Karras et al. 2022, App. F.2: early weights
    are forgotten soon)."""

    def __init__(self, model: nn.Module, cfg: Config):
        self.cfg = cfg
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.averages = list(self.model.parameters())
        self.weights = [p.detach() for p in model.parameters()]

    def beta(self, images: float) -> float:
        """The share of the old average that stays, in a step that begins after so many images."""
        if self.cfg.ema_decay:
            return self.cfg.ema_decay
        halflife = 1000 * self.cfg.ema_halflife_kimg  # in images
        if self.cfg.ema_rampup:
            halflife = min(halflife, self.cfg.ema_rampup * images)
        return 0.5 ** (self.cfg.batch_size / max(halflife, 1e-8))

    @torch.no_grad()
    def update(self, images: float) -> None:
        torch._foreach_lerp_(self.averages, self.weights, 1 - self.beta(images))


# -------------------------------------------------------------------------------------------------
# Optimizers


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, whose singular values are then all made about 1, so that
    a step moves a matrix as far in its rare directions as in its frequent ones. A convolution is a
    matrix with a row for each output channel. Weight decay is decoupled, as AdamW's, and times this
    lr. (torch.optim.Muon takes matrices alone, one by one and always in bf16, which most CPUs are
    slow at.)"""

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        parameters = group["params"]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in parameters]
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        # Those of one shape together: a few large products are faster than many small ones.
        by_shape = {}
        for p, update in zip(parameters, updates):
            by_shape.setdefault(p.shape, []).append((p, update))
        for alike in by_shape.values():
            alike, updates = zip(*alike)
            updates = torch.stack(updates).flatten(2)  # (n, rows, columns)
            rows, columns = updates.shape[1:]
            # Tall matrices make larger outputs of a step of the same size.
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            for p, update in zip(alike, orthogonalize(updates)):
                p.sub_(update.reshape(p.shape), alpha=rate)


def orthogonalize(x, steps=5):
    """Matrices (n, rows, columns) -> the nearest ones whose singular values are all 1, but for a
    factor of 0.7 to 1.2 (those below a 500th of the norm stay smaller): an odd polynomial of x,
    applied `steps` times, does that to them."""
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(steps):
        square = x @ x.mT
        # a x + b (x x^T) x + c (x x^T)^2 x
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.float() if wide else x.float().mT


def matrices_of_blocks(model):
    """The weights of all linear maps and convolutions in the network's blocks."""
    blocks = [m for m in model.modules() if isinstance(m, (diffit.Block, diffit.ResBlock))]
    inside = [m for block in blocks for m in block.modules()]
    weights = [m.weight for m in inside if isinstance(m, (nn.Linear, nn.Conv2d))]
    return list(dict.fromkeys(weights))  # a ResBlock has a Block inside


def rate_share(cfg, images):
    """The share of the learning rate, in a step that begins after so many images: a linear ramp
    from 0, then constant or half a cosine down to 0."""
    ramp = min(1.0, images / (1000 * cfg.lr_rampup_kimg)) if cfg.lr_rampup_kimg else 1.0
    done = min(1.0, images / (1000 * cfg.kimg)) if cfg.lr_decay == "cosine" else 0.0
    return ramp * (0.5 + 0.5 * math.cos(math.pi * done))


# -------------------------------------------------------------------------------------------------
# The step


class Trainer:
    """Everything that training changes, and the step that changes it. weights: a state_dict to
    begin with."""

    def __init__(self, cfg, device, weights=None):
        self.cfg = cfg
        self.device = device
        torch.manual_seed(cfg.seed)
        self.model = diffit.build(cfg)  # on the CPU: the same weights on every machine
        if weights:
            self.model.load_state_dict({**self.model.state_dict(), **weights})
        self.model.to(device).train()
        self.parameters = list(self.model.parameters())
        self.averager = GradientAverager(self.parameters)  # from here on, weights are rank 0's
        self.ema = EMA(self.model, cfg)  # a copy, so before blocks are compiled
        matrices = matrices_of_blocks(self.model) if cfg.muon_lr else []
        muons = set(matrices)
        others = [p for p in self.parameters if p not in muons]
        betas = (0.9, cfg.beta2)
        adamw = torch.optim.AdamW(others, cfg.lr, betas, 1e-8, cfg.weight_decay, fused=True)
        self.optimizers = {"optimizer": adamw}
        if matrices:
            self.optimizers["muon"] = Muon(matrices, cfg.muon_lr, cfg.weight_decay)
        # fp16 has few exponents: losses are scaled up, so that small gradients do not vanish.
        scale = 2.0**16
        if cfg.loss_reduction == "sum":
            scale /= cfg.in_channels * cfg.input_size**2
        fp16 = cfg.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=fp16)
        self.process = diffusion.build(cfg)
        self.timesteps = None
        if cfg.timesteps == "loss-aware":
            self.timesteps = diffusion.LossAwareTimesteps(cfg.diffusion_steps)
        rank, size = rank_and_size()
        self.micro = cfg.micro_batch or cfg.batch_size // size
        count = cfg.batch_size // size // self.micro  # micro-batches of a process in a step
        self.mine = range(rank * count, (rank + 1) * count)
        self.part_names, self.part_of = parts_of(self.model)
        self.part_of = self.part_of.to(device)
        self.prepare_blocks()

    def prepare_blocks(self):
        blocks = [part for part in self.model.modules() if isinstance(part, diffit.Block)]
        if not blocks and (self.cfg.compile or self.cfg.grad_checkpointing):
            raise RuntimeError("this network has no diffit.Block to compile or to recompute")
        for block in blocks:
            if self.cfg.grad_checkpointing:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            if self.cfg.compile:
                block.compile()  # equal blocks compile once

    def state(self):
        """The parts that a checkpoint holds, by name."""
        parts = {
            "model": self.model,
            "ema": self.ema.model,
            **self.optimizers,
            "scaler": self.scaler,
            "timesteps": self.timesteps,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def step(self, step, batches, with_condition=False):
        """One step, on this process's next micro-batches (x, y, unreadable).

        -> columns, norms. columns: per image of the whole batch, a dict of (batch_size,) tensors,
        its noise level, weight and losses, and if asked for what `watch` says of its condition.
        norms (1 + parts,): of the gradient and of each of its parts; None if it was not finite, and
        then nothing changed but what cfg.nonfinite_grads says."""
        cfg = self.cfg
        columns = []
        for k in self.mine:
            x, y, _ = next(batches)
            columns.append(self.accumulate(x, y, step, k, with_condition))
        self.averager.finish()
        columns = gather_columns(columns)
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        # From here on all processes hold the same numbers, and so take the same decisions.
        norms = self.gradient_norms()
        finite = bool(norms[0].isfinite())  # the one place of a step where we wait for the GPU
        if finite:
            if self.timesteps:  # now, while it has nothing else to do
                self.timesteps.update(columns["t"].long(), columns["loss"])
            self.update(step, norms[0])
        elif cfg.nonfinite_grads == "zero":  # EDM
            for p in self.parameters:
                torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)
            self.update(step, self.gradient_norms()[0])
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        return columns, norms if finite else None

    def update(self, step, norm):
        """Clip the gradient, of this norm, and take the step: weights, then their average."""
        images = step * self.cfg.batch_size  # seen before this step
        if self.cfg.grad_clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.cfg.grad_clip, norm)
        share = rate_share(self.cfg, images)
        for optimizer in self.optimizers.values():
            (group,) = optimizer.param_groups
            group["lr"] = share * optimizer.defaults["lr"]
            with configs.autocast(self.cfg.precision, self.device):  # for Muon's products
                optimizer.step()
        self.ema.update(images)

    def accumulate(self, x, y, step, k, with_condition):
        """Forward and backward pass of micro-batch k of a step -> its columns, (b,) each.
        x (b, C, H, W) uint8 or latents, y (b,) or (b, M, E)."""
        cfg = self.cfg
        x = data.to_network(configs.to_device(x, self.device))  # pixels in [-1, 1]
        y = configs.to_device(y, self.device) if cfg.takes_y else None
        # Noise, timesteps and dropped labels: the same whichever process has this micro-batch.
        torch.manual_seed(configs.seed_from(cfg.seed, step, k))
        t, weight = self.draw_noise_levels(len(x))
        pictures = x  # for sets: as they are given when sampling
        augmented = None
        if cfg.augment:
            x, augmented = data.augment(x, cfg.augment)
        noise = torch.randn_like(x)
        times = []  # what the process tells the network of t

        def network(x, time):
            times.append(time)
            return self.model(x, time, y, augmented)

        with configs.autocast(cfg.precision, self.device):
            if cfg.set_size:
                y = self.model.leave_one_out(pictures, cfg.set_size)
            losses = self.process.loss(network, x, t, noise)  # each (b,)
        if k == self.mine[-1]:
            self.averager.start()
        # Divided by the whole batch: gradients of micro-batches and processes just add up.
        loss = (weight * losses["loss"]).sum() / cfg.batch_size
        if cfg.loss_reduction == "sum":
            loss = loss * x[0].numel()
        self.scaler.scale(loss).backward()
        columns = {"t": t, "weight": weight}
        columns |= {name: value.detach() for name, value in losses.items()}
        if with_condition:
            columns |= self.watch(x, times[0], y, augmented, t, noise)
        return columns

    def draw_noise_levels(self, b):
        """For a micro-batch of b images: their noise levels, one for all images of a set, and the
        weights of their losses."""
        n = self.cfg.set_size or 1
        if self.timesteps:
            drawn = self.timesteps.sample(b // n)
            t, weight = [configs.to_device(x, self.device) for x in drawn]
        else:
            t = self.process.draw(b // n, self.device)
            weight = torch.ones(b // n, device=self.device)
        return t.repeat_interleave(n), weight.repeat_interleave(n)

    @torch.no_grad()
    def watch(self, x, time, y, augmented, t, noise):
        """What the log says of conditions, for each image: the norm of its condition vector; if y
        are tokens, also their size, and what they are worth: the loss with null tokens in their
        place, less the loss with them, at the same noise."""
        c = self.model.condition(time, y, augmented)  # (b, D); drops labels anew
        columns = {"condition": c.norm(dim=1)}
        if y is None or not y.is_floating_point():
            return columns
        tokens = y.detach().float().flatten(1)
        columns["context_norm"] = tokens.norm(dim=1)
        columns["context_mean"] = tokens.abs().mean(dim=1)
        columns["context_max"] = tokens.abs().amax(dim=1)
        columns["context_std"] = tokens.std(dim=1, correction=0)

        def loss(y):
            with configs.autocast(self.cfg.precision, self.device):
                return self.process.loss(
                    lambda x, time: self.model(x, time, y, augmented), x, t, noise
                )["loss"]

        self.model.eval()  # without dropping
        columns["worth"] = loss(self.model.y_embedder.null(y.shape)) - loss(y)
        self.model.train()
        return columns

    def gradient_norms(self):
        """(1 + parts,): the norm of the gradient, then that of each part of the network."""
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters]))
        squares = torch.zeros(len(self.part_names), device=self.device)
        parts = squares.index_add_(0, self.part_of, norms**2).sqrt()
        return torch.cat([norms.norm()[None], parts])


def gather_columns(micro_batches):
    """The columns of this process's micro-batches -> those of all processes, in their order."""
    names = list(micro_batches[0])
    columns = [torch.cat([columns[name].float() for columns in micro_batches]) for name in names]
    return dict(zip(names, configs.all_gather(torch.stack(columns))))


def parts_of(model):
    """The parts whose gradients are watched (an embedding, a block, the head): their names, and for
    each parameter the number of its part."""

    def part(name):
        first, *rest = name.split(".")
        number = itertools.takewhile(lambda word: word.isdigit() or word == "stages", rest)
        return ".".join([first, *number])

    parts = [part(name) for name, _ in model.named_parameters()]
    numbers = {name: k for k, name in enumerate(dict.fromkeys(parts))}
    return list(numbers), torch.tensor([numbers[name] for name in parts])


# -------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(
    path: Path,
    cfg: Config,
    step: int,
    trainer: Trainer,
    progress: "Progress",
    stays: Path | None = None,
) -> None:
    """Everything that a run needs to resume, and sample.py to sample: tensors and plain values.

    Written under another name, flushed to disk, then renamed: whatever happens, `path` holds one
    whole checkpoint, the new or the old one, and the one before stays as previous.pt. stays: a
    second name for it; of the numbered ones, the newest cfg.keep are kept. OSError if the disk is
    full."""
    state = {
        "format": data.FORMAT,
        "config": dataclasses.asdict(cfg),
        **progress.about,
        "step": step,
        "progress": progress.state(),
    }
    state |= {name: part.state_dict() for name, part in trainer.state().items()}
    try:
        with configs.atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the rename, should the power fail
            if stays:  # before path says that this step is done
                hardlink_or_copy(temporary, stays)
            if path.exists():
                hardlink_or_copy(path, path.with_name("previous.pt"))
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError on a full disk
        why = configs.first_line(error)
        raise OSError(
            f"{path} could not be written ({why}) and is as it was; make room, and run the same "
            f"command again"
        ) from None
    if stays and cfg.keep:
        for old in numbered(path.parent)[: -cfg.keep]:
            old.unlink()


def load_checkpoint(path: Path, cfg: Config, trainer: Trainer, progress: "Progress") -> int:
    """Put a run of the same Config back where save_checkpoint left it -> the step to resume with.
    UserError if the file is damaged or not ours, or belongs to a run that differs in more than
    MAY_CHANGE."""
    state = data.read_checkpoint(path)
    before = configs.config_from_dict(state["config"], path)
    refuse_another_run(before, state["dataset"], cfg, progress.about["dataset"], path)
    step = state["step"]
    try:
        restore(trainer, state, path)
        progress.load(state["progress"], step, path, 1 + len(trainer.part_names))
    except UserError as error:
        raise UserError(
            f"{error}; remove it, and the same command resumes from the one before"
        ) from None
    describe_new_rate(before, cfg, step)
    return step


def restore(trainer, state, path):
    """Load the parts of the checkpoint at this path. UserError if one of them does not fit."""
    if trainer.device.type == "cpu":
        # These would go on using the file's own memory, and Windows does not replace a mapped file.
        with data.parsing(path, "a whole checkpoint"):
            mapped = ("progress", *trainer.optimizers)
            state |= copy.deepcopy({name: state[name] for name in mapped})
    for name, part in trainer.state().items():
        if isinstance(part, nn.Module):
            data.load_weights(part, state[name], path)
            continue
        with data.parsing(path, f"a whole checkpoint ({name})"):
            if isinstance(part, torch.optim.Optimizer):  # its settings are cfg's
                settings = part.state_dict()["param_groups"]
                part.load_state_dict({"state": state[name]["state"], "param_groups": settings})
            elif state[name]:  # {}: the part was not in use
                part.load_state_dict({key: plain(value) for key, value in state[name].items()})
    check_moments(trainer, path)


def plain(value):
    """A tensor or a number; TypeError for anything else."""
    if not isinstance(value, (torch.Tensor, int, float)):
        raise TypeError(f"expected a number or a tensor, found {configs.short(value)}")
    return value


def check_moments(trainer, path):
    """UserError unless the optimizers have what they keep of each parameter: nothing yet, or AdamW
    the number of its steps and two moments of its shape, Muon one."""
    names = {p: name for name, p in trainer.model.named_parameters()}
    for kind, optimizer in trainer.optimizers.items():
        for p in optimizer.param_groups[0]["params"]:
            kept = optimizer.state[p]
            named = kept.items() if isinstance(kept, dict) else [("nothing", kept)]
            shapes = {key: getattr(value, "shape", None) for key, value in named}
            expected = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if kind == "muon":
                expected = {"momentum": p.shape}
            if kept != {} and shapes != expected:
                raise UserError(
                    f"{path} is damaged: the optimizer's state of {names[p]} does not fit it"
                )
            found = {f"the optimizer's {key} of {names[p]}": t for key, t in kept.items()}
            data.check_finite(found, path)


def describe_new_rate(before, cfg, step):
    """A longer --kimg stretches the cosine, so that the rate goes up again; say so."""
    images = step * cfg.batch_size
    old, new = (c.lr * rate_share(c, images) for c in (before, cfg))
    if new > 1.05 * old and rank_and_size()[0] == 0:
        say(
            f"the learning rate goes back up from {old:.2e} to {new:.2e}: --lr-decay cosine now "
            f"ends at {cfg.kimg:g} kimg, and ended at {before.kimg:g} before"
        )


def latest_checkpoint(out):
    """The newest whole checkpoint in the folder, or None. A damaged one is named, and skipped.
    UserError if all are damaged."""
    last = out / "last.pt"
    errors = []
    for file in checkpoints(out):
        try:
            data.read_checkpoint(file)
        except UserError as error:
            errors.append(str(error))
            continue
        for error in errors:
            say(f"{error}; resuming from {file}")
        if file != last:  # so that the next save does not make a damaged file previous.pt
            if last.exists():
                os.replace(last, out / "last.damaged.pt")
            hardlink_or_copy(file, last)
        return file
    if errors:
        raise UserError(f"{'; '.join(errors)}; give another --out, or --overwrite to start again")
    return None


def checkpoints(out):
    """All checkpoints in the folder, in the order in which a resume tries them."""
    files = [out / "last.pt", out / "previous.pt", *reversed(numbered(out))]
    return [file for file in files if file.exists()]


def numbered(out):
    """The checkpoints <kimg>.pt in the folder, the newest last."""
    files = (file for file in out.glob("*.pt") if file.stem.isdigit())
    return sorted(files, key=lambda file: int(file.stem))


def hardlink_or_copy(source, dest):
    """A second name for a file, in place of what dest was; a copy where there are no links."""
    with configs.atomic_write(dest) as temporary:
        temporary.unlink(missing_ok=True)  # of a run that was killed; a link needs a free name
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


# -------------------------------------------------------------------------------------------------
# The output folder

# A run may change its length, its machine, the place of its data, its log and the sampling of its
# images; nothing else. (The data are the same if their fingerprint is.)
MAY_CHANGE = {
    *("kimg", "data", "micro_batch", "compile", "grad_checkpointing", "workers"),
    *("tick_kimg", "sample_kimg", "save_kimg", "keep"),
    *("score_every", "score_n", "score_ref", "inception"),
    *configs.SAMPLING,
}


def refuse_another_run(theirs, their_data, cfg, our_data, path):
    """UserError if a run's Config or the fingerprint of its data (None: an earlier version, which
    had none) differ from ours."""
    differ = [
        f"{name} is {printable(repr(getattr(theirs, name)), 60)} there and "
        f"{printable(repr(value), 60)} here"
        for name, value in dataclasses.asdict(cfg).items()
        if name not in MAY_CHANGE and value != getattr(theirs, name)
    ]
    same_data = their_data == our_data if their_data else theirs.data == cfg.data
    if not same_data:
        differ.append(f"{cfg.data} does not hold the same data as {theirs.data} did")
    if differ:
        raise UserError(
            f"{path} belongs to another run: {', '.join(differ)}; resume it with its own flags, "
            f"give another --out, or --overwrite to start again there"
        )


# Files of a run, beside the numbered checkpoints and config.json, which marks the folder as ours.
OUTPUTS = ["log.jsonl", "loss.png", "samples-??????*.png", "last.pt", "last.damaged.pt"]
OUTPUTS += ["previous.pt", "best.pt"]


def check_folder(out, cfg, fingerprint, overwrite):
    """UserError if the output folder holds anything but this very run, or one to overwrite. Nothing
    is written yet."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if os.path.isdir(cfg.data) and out.resolve().is_relative_to(Path(cfg.data).resolve()):
        raise UserError(
            f"--out {out} is inside --data {cfg.data}, and the run's own images would join it; "
            f"choose another folder"
        )
    theirs = read_config(out / "config.json")
    others = out.exists() and {file.name for file in out.iterdir()} - configs.UNSEEN
    if theirs is None and others:
        raise UserError(
            f"--out {out} holds files of something else, or its config.json is damaged; give a new "
            f"or an empty folder"
        )
    if theirs and not overwrite:
        their_data = theirs.pop("dataset", None)
        theirs = configs.config_from_dict(theirs, out / "config.json")
        refuse_another_run(theirs, their_data, cfg, fingerprint, out)


def open_folder(out, cfg, fingerprint, overwrite):
    """Once the folder is this run's alone: empty it if that was asked for, and say whose it is."""
    check_folder(out, cfg, fingerprint, overwrite)
    if overwrite and read_config(out / "config.json"):
        for file in numbered(out):
            file.unlink()
        for pattern in OUTPUTS:
            for file in out.glob(pattern):
                file.unlink()
    values = {**dataclasses.asdict(cfg), "dataset": fingerprint}
    configs.write_text(out / "config.json", json.dumps(values, indent=1))


def read_config(path):
    """The config.json that open_folder wrote, as a dict; None if there is none, or it is damaged or
    of another program."""
    config = data.parse_json(path.read_bytes()) if path.exists() else None
    ours = isinstance(config, dict) and {"data", "model", "kimg"} <= config.keys()
    return config if ours else None


# -------------------------------------------------------------------------------------------------
# Progress: a line, a log, curves


# The columns of Trainer.watch, which only the last step of a tick has.
CONTEXT = ["context_norm", "context_mean", "context_max", "context_std"]
WATCHED = {"condition", *CONTEXT, "worth"}


class Progress:
    """Means over each tick, shown as one live line on a terminal, elsewhere as a line per tick, and
    kept in log.jsonl. The columns of a tick so far stay on the device and go into the checkpoint,
    so a resumed run logs what an unbroken one would. All processes have the same; rank 0 writes."""

    def __init__(self, cfg, out, device, dataset, fingerprint, on_entry=None):
        self.cfg = cfg
        self.device = device
        self.on_entry = on_entry
        self.writes = rank_and_size()[0] == 0
        self.live = self.writes and sys.stderr.isatty()
        self.path = out / "log.jsonl"
        self.about = {"dataset": fingerprint, "class_names": [*map(str, dataset.class_names)]}
        self.unreadable = data.UnreadableImages(dataset, verbose=self.writes)
        self.total = total_steps(cfg)
        self.log = []  # the entries of log.jsonl
        self.columns = []  # of each step of this tick, as Trainer.step returns them
        self.norms = []
        self.skipped = 0  # steps with non-finite gradients
        self.skipped_in_a_row = 0

    def state(self):
        return {
            "columns": self.columns,
            "norms": self.norms,
            "skipped": self.skipped,
            "unreadable": self.unreadable.found,
        }

    def load(self, state, step, path, parts):
        """The state in the checkpoint at this path, with norms (parts,), and the log as it was at
        its step. UserError if it is not of the form that `state` returns."""
        steps = state.get("columns", state.get("seen"))  # its earlier name
        norms = state.get("norms")
        required, known = {"t", "weight", "loss"}, {"mse", "vlb", *WATCHED}
        batch = self.cfg.batch_size
        whole = (
            all(isinstance(part, list) for part in (steps, norms))
            and all(isinstance(columns, dict) for columns in steps)
            and all(required <= columns.keys() <= required | known for columns in steps)
            and len({frozenset(columns) - WATCHED for columns in steps}) <= 1
            and all(is_vector(c, batch) for columns in steps for c in columns.values())
            and all(is_vector(norm, parts) for norm in norms)
            and type(state.get("skipped")) is int
            and isinstance(state.get("unreadable"), dict)
            and all(isinstance(text, str) for pair in state["unreadable"].items() for text in pair)
        )
        if not whole:
            raise UserError(f"{path} is damaged: its progress has another form")
        self.columns = [{n: c.to(self.device) for n, c in columns.items()} for columns in steps]
        self.norms = [norm.to(self.device) for norm in norms]
        self.skipped = state["skipped"]
        self.unreadable.found = state["unreadable"]
        # What was logged after this checkpoint will be logged again.
        self.log = on_rank_0(lambda: read_log(self.path, step))

    def start(self, step):
        """Start the clocks at this step; log.jsonl holds what came before it."""
        if self.writes:
            configs.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.log))
        self.first_step = step
        self.started = time.time()
        self.shown = 0.0
        self.last_line = ""
        self.reset_clocks()

    def reset_clocks(self):
        self.timed_steps = 0
        self.step_seconds = 0.0
        self.wait_seconds = 0.0

    def add(self, columns, norms, unreadable, seconds, waited):
        """One step: its result, the images that could not be read, and the seconds it took, of
        which it waited for data."""
        self.timed_steps += 1
        self.step_seconds += seconds
        self.wait_seconds += waited
        self.unreadable.add(unreadable)
        if norms is None:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.columns.append(columns)
            self.norms.append(norms)
            self.skipped_in_a_row = 0

    def show(self, trainer, done):
        """After each step: refresh the live line, if it is time."""
        if self.live and time.time() - self.shown > 0.5:
            self.shown = time.time()
            self.last_line = self.line(self.entry(trainer, done))
            configs.live_line(self.last_line)

    def show_again(self):
        """After something else had the live line."""
        if self.live:
            configs.live_line(self.last_line)

    def tick(self, trainer, done, columns):
        """At the end of a tick: a line, an entry in the log, and a fresh tick. columns: of its last
        step."""
        entry = self.entry(trainer, done)
        condition = columns["condition"]
        entry["condition_norm"] = {
            "mean": condition.mean().item(),
            "std": condition.std(correction=0).item(),
            "max": condition.max().item(),
        }
        for name in (*CONTEXT, "worth"):
            if name in columns:
                entry[name] = columns[name].mean().item()
        self.write(entry)
        if self.writes:
            self.last_line = self.line(entry)
            show = configs.live_line if self.live else say
            show(self.last_line)
        self.columns = []
        self.norms = []
        self.reset_clocks()

    def write(self, entry):
        """An entry into the log."""
        self.log.append(entry)
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
            if self.on_entry:
                self.on_entry(entry)

    def entry(self, trainer, done):
        """The means of the tick so far, after so many steps of the run."""
        cfg = self.cfg
        seconds = max(self.step_seconds, 1e-9)
        return {
            "step": done,
            "kimg": done * cfg.batch_size / 1000,
            **self.means(trainer.part_names),
            "lr": cfg.lr * rate_share(cfg, (done - 1) * cfg.batch_size),
            "skipped": self.skipped,
            "unreadable": len(self.unreadable.found),
            "data_wait": round(self.wait_seconds / seconds, 4),
            "images_per_s": round(self.timed_steps * cfg.batch_size / seconds, 1),
            "memory_gb": round(configs.peak_memory(self.device), 3),
        }

    def means(self, part_names):
        """Of the tick so far: the losses, overall and by quartile of the noise, and the norms of
        the gradient."""
        if not self.columns:
            return {}
        names = [name for name in self.columns[0] if name not in WATCHED]
        columns = {name: torch.cat([step[name] for step in self.columns]) for name in names}
        weight = columns["weight"]
        means = {
            name: (weight * columns[name]).mean().item()
            for name in ("loss", "mse", "vlb")
            if name in columns
        }
        # Ranked, so that it works for timesteps and sigmas alike; from the least noise to the most.
        order = columns["t"].argsort(stable=True)
        means["loss_quartiles"] = [
            ((weight * columns["loss"])[part].sum() / weight[part].sum()).item()
            for part in order.tensor_split(4)
        ]
        norm, *parts = torch.stack(self.norms).mean(0).tolist()
        return means | {"grad_norm": norm, "grad_norm_parts": dict(zip(part_names, parts))}

    def line(self, entry):
        done = entry["step"]
        # By the whole time since the start: steps, grids, checkpoints and scores.
        left = (self.total - done) * (time.time() - self.started) / max(done - self.first_step, 1)
        left = round(left)
        parts = [
            f"{entry['kimg']:.{1 if self.cfg.kimg >= 10 else 3}f} of {self.cfg.kimg:g} kimg",
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            f"loss {entry.get('loss', math.nan):.4f}",
            f"{entry['images_per_s']:.0f} images/s",
            f"lr {entry['lr']:.2e}",
            f"grad {entry.get('grad_norm', math.nan):.3f}",
            f"{entry['memory_gb']:.2f} GB",  # cut off on a narrow terminal
        ]
        if self.skipped:
            parts.append(f"{self.skipped} non-finite")
        return "  ".join(parts)


def is_vector(tensor, n):
    """Is it a tensor of n numbers with fractions?"""
    return isinstance(tensor, torch.Tensor) and tensor.shape == (n,) and tensor.is_floating_point()


def read_log(path, step):
    """The entries of log.jsonl up to this step. (After a crash the last line may be cut short.)"""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        entry = data.parse_json(line)
        whole = isinstance(entry, dict) and type(entry.get("step")) is int
        whole = whole and type(entry.get("kimg")) in (int, float)
        if whole and entry["step"] <= step and 0 < entry["kimg"] < configs.LARGEST:
            entries.append(entry)
    return entries


def number_in(entry, keys):
    """The number under these keys of a log's entry, the largest of several with names, or NaN: a
    log is a file, and may have been edited."""
    for key in keys:
        try:
            entry = entry[key]
        except (KeyError, IndexError, TypeError):
            return math.nan
    values = entry.values() if isinstance(entry, dict) else [entry]
    return max((value for value in values if type(value) in (int, float)), default=math.nan)


def draw_curves(log, path):
    """loss.png: what the log holds over thousands of images, on logarithmic scales; with tokens of
    y a third row, and with scores another."""

    def curve(name, *keys):
        """(name, points) of what the entries hold under these keys."""
        values = [(entry["kimg"], number_in(entry, keys)) for entry in log]
        # Others have no place on a logarithmic scale.
        return name, [(kimg, math.log10(v)) for kimg, v in values if 1e-99 < v < 1e99]

    quartiles = [curve(str(k + 1), "loss_quartiles", k) for k in range(4)]
    norms = [curve("all", "grad_norm"), curve("part", "grad_norm_parts")]
    norms += [curve("set encoder", "grad_norm_parts", "set_encoder")]
    condition = [curve(name, "condition_norm", name) for name in ("mean", "max", "std")]
    panels = {  # title -> curves, named from right to left
        "loss, and its parts": [curve(name, name) for name in ("mse", "vlb", "loss")],
        "loss by quartile of the noise, 1 the cleanest": quartiles,
        "gradient norm: all, and the largest part": norms,
        "norm of the condition vector": condition,
        "tokens of y, of an image": [curve(name[8:], name) for name in CONTEXT],
        "loss with null tokens, less with its own": [curve("worth", "worth")],
        "scores of samples": [curve(name, name.lower()) for name in ("IS", "sFID", "FID")],
        "precision and recall": [curve(name, name) for name in ("recall", "precision")],
    }
    panels = list(panels.items())
    rows = [panels[k : k + 2] for k in range(0, len(panels), 2)]
    # The first two always; the others where the log has their numbers.
    rows = rows[:2] + [row for row in rows[2:] if any(points for _, points in row[0][1])]
    image = Image.new("RGB", (1200, 400 * len(rows)), "white")
    for k, row in enumerate(rows):
        for column, (title, curves) in enumerate(row):
            curves = [(name, points) for name, points in curves if points]
            if curves:
                draw_panel(ImageDraw.Draw(image), (600 * column, 400 * k), title, curves)
    data.save_image(image, path)


def draw_panel(pen, corner, title, curves, width=600, height=400):
    """Curves [(name, [(kimg, log10 value)])] in a box with this upper left corner."""
    x0, y0 = corner
    left, right = x0 + 60, x0 + width - 20
    top, bottom = y0 + 30, y0 + height - 40
    values = [value for _, points in curves for _, value in points]
    end = max(points[-1][0] for _, points in curves)
    low, high = min(values) - 0.02, max(values) + 0.02

    def at(x, y):
        return left + x / end * (right - left), top + (high - y) / (high - low) * (bottom - top)

    for k in range(5):
        x = end * k / 4
        y = low + (high - low) * k / 4
        pen.line([at(x, low), at(x, high)], fill="#e4e4e4")
        pen.line([at(0, y), at(end, y)], fill="#e4e4e4")
        pen.text((at(x, low)[0], bottom + 6), f"{x:.3g}", fill="black", anchor="ma")
        pen.text((left - 6, at(0, y)[1]), f"{10**y:.3g}", fill="black", anchor="rm")
    for k, (name, points) in enumerate(curves):
        colour = ("#999999", "#dd8833", "#2255cc", "#228833")[k]
        pen.line([at(x, y) for x, y in points], fill=colour, width=2)
        if len(points) < 20:  # a line of one point would show nothing
            for x, y in points:
                pen.circle(at(x, y), 3, fill=colour)
        pen.text((right - 60 * k, y0 + 10), name, fill=colour, anchor="ra")
    pen.text((left, y0 + 10), title, fill="black")
    pen.text(((left + right) / 2, bottom + 22), "thousands of images", fill="black", anchor="ma")


# -------------------------------------------------------------------------------------------------
# Signals, data, and what processes tell one another in each step


class Stopped(Exception):
    """The run was stopped by a signal and saved."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


class StopSignal:
    """Inside the with block, SIGINT, SIGTERM and SIGHUP ask the loop to end after the current step;
    another one, more than three seconds later, ends it at once. (torchrun waits 30 seconds for the
    step and the save, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT.) One that is ignored, as SIGHUP is under
    nohup, stays so. Outside a main thread it does nothing."""

    def __init__(self):
        self.number = 0
        self.first = math.inf  # when the first one came
        self.before = {}  # the handlers to restore

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in configs.ENDING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    # None: a handler that was not set from Python, and cannot be restored
                    self.before[number] = signal.signal(number, self.ask) or signal.SIG_DFL
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        # Several at once are one request: torchrun and a scheduler both signal every process.
        if time.monotonic() - self.first > 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        self.first = min(self.first, time.monotonic())


class TimedLoader:
    """The loader's batches; between two calls of `collect` it adds up the seconds spent waiting for
    them, and the images that could not be read."""

    def __init__(self, loader):
        self.batches = iter(loader)
        self.waited = 0.0
        self.unreadable = []

    def __next__(self):
        start = time.time()
        batch = next(self.batches)
        self.waited += time.time() - start
        self.unreadable += batch[2]
        return batch

    def collect(self):
        """-> seconds waited, unreadable images; resets both."""
        collected = self.waited, self.unreadable
        self.waited = 0.0
        self.unreadable = []
        return collected


def open_loader(dataset, cfg, trainer, first_step):
    """The micro-batches of this process, from a step on."""
    places = (
        range(
            step * cfg.batch_size + k * trainer.micro,
            step * cfg.batch_size + (k + 1) * trainer.micro,
        )
        for step in range(first_step, total_steps(cfg))
        for k in trainer.mine
    )
    stream = data.ShuffledStream(dataset, cfg.seed, cfg.xflip, cfg.set_size, cfg.holdout)
    return TimedLoader(data.loader(stream, places, cfg.workers))


MINUTES = 60  # in seconds


class Clock:
    """What is due by time, however slow the steps are: a checkpoint every 15 minutes, and a grid of
    samples two minutes after the beginning (not of a resumed run), then every 15 or as often as
    grids take a tenth of the time."""

    def __init__(self, start):
        now = time.monotonic()
        self.save_at = now + 15 * MINUTES
        self.grid_at = now + (15 if start else 2) * MINUTES

    def due(self):
        """-> is a grid due, is a checkpoint due. Rank 0 decides for all processes."""
        if rank_and_size()[0]:
            return False, False
        now = time.monotonic()
        return now >= self.grid_at, now >= self.save_at

    def drew(self, seconds):
        self.grid_at = time.monotonic() + max(15 * MINUTES, 10 * seconds)

    def saved(self):
        self.save_at = time.monotonic() + 15 * MINUTES


def sync_status(stop, unreadable=(), due=()):
    """-> the signal that any process received (or 0), the images that any could not read, and of
    the truth values in `due` which are true in any; the same in all processes."""
    if rank_and_size()[1] == 1:
        return stop.number, unreadable, due
    # One small tensor in each step; the list itself only in the few steps that have one.
    status = torch.tensor([[stop.number], [len(unreadable)], *([value] for value in due)])
    numbers, counts, *due = configs.all_gather(status)
    if counts.any():
        unreadable = sum(configs.all_gather_object(list(unreadable)), [])
    return int(numbers.max()), unreadable, [bool(values.any()) for values in due]


# -------------------------------------------------------------------------------------------------
# The loop


def total_steps(cfg):
    # Rounded first: 0.07 kimg in batches of 10 are 7.000000000000001 steps to a computer.
    return max(1, math.ceil(round(cfg.kimg * 1000 / cfg.batch_size, 6)))


def reached(cfg, kimg, done):
    """Did step number `done` reach another multiple of kimg, or the end of the run?"""

    def multiples(steps):  # rounded, because 16.1 kimg are 16100.000000000002 images
        return math.floor(round(steps * cfg.batch_size / (1000 * kimg), 6))

    return multiples(done) > multiples(done - 1) or done == total_steps(cfg)


def resume(out, cfg, trainer, progress):
    """Put the run back to its latest checkpoint, if there is one -> the step to begin with."""
    file = on_rank_0(lambda: latest_checkpoint(out))
    if not file:
        if progress.writes and progress.path.exists():
            say(f"there is no checkpoint in {out}; starting from the beginning")
        return 0
    step = load_checkpoint(file, cfg, trainer, progress)
    if progress.writes:
        say(f"resumed from {file} at {step * cfg.batch_size / 1000:g} kimg")
    return step


def train(
    cfg: Config,
    dataset,
    out: str | Path,
    weights: dict | None = None,
    device: torch.device | None = None,
    vae=None,
    scorer=None,
    overwrite: bool = False,
    on_entry=None,
) -> int | None:
    """Train cfg on dataset in the folder out, from the start or from its latest checkpoint -> None
    when complete, or the number of the signal that stopped it.

    weights: a state_dict to begin with. vae: decodes the sample grids of a latent network; without
    it there are none. scorer: a sample.Scorer, for cfg.score_every; best.pt is the checkpoint of
    the lowest FID. overwrite: start again if the folder holds a run. on_entry: called with each
    entry of the log, a dict, in the process that writes it. UserError if the folder holds anything
    else, or another process works in it; past 1 % unreadable images; after 10 steps in a row with
    non-finite gradients."""
    out = Path(out)
    device = device or configs.default_device()
    check_data(cfg, dataset)
    fingerprint = dataset.fingerprint()
    on_rank_0(lambda: check_folder(out, cfg, fingerprint, overwrite))
    with configs.exclusive(out):
        on_rank_0(lambda: open_folder(out, cfg, fingerprint, overwrite))
        trainer = Trainer(cfg, device, weights)
        progress = Progress(cfg, out, device, dataset, fingerprint, on_entry)
        start = resume(out, cfg, trainer, progress)
        shown = sample.shown_in_training(cfg, dataset, vae)
        scores = SampleScores(cfg, out, trainer, progress, vae, shown, scorer)
        if start >= total_steps(cfg) and not scores.due(start):
            return None
        progress.start(start)
        try:
            with StopSignal() as stop:
                return loop(cfg, dataset, out, trainer, progress, vae, shown, scores, start, stop)
        except Stopped as stopped:  # in the middle of scores
            return stopped.signal


def loop(cfg, dataset, out, trainer, progress, vae, shown, scores, start, stop):
    """The steps from `start` on, and what is due after each -> the number of the signal that ended
    it, or None at the end."""
    total = total_steps(cfg)
    clock = Clock(start)
    loader = open_loader(dataset, cfg, trainer, start)  # its workers end before `stop` does
    if scores.due(start):  # the run was stopped before, or in the middle of them
        scores.compute(start, stop)
    for step in range(start, total):
        done = step + 1
        tick_due = reached(cfg, cfg.tick_kimg, done)
        number_due = reached(cfg, cfg.save_kimg, done)

        began = time.time()
        columns, norms = trainer.step(step, loader, tick_due)
        waited, unreadable = loader.collect()
        signalled, unreadable, (grid_due, save_due) = sync_status(stop, unreadable, clock.due())
        progress.add(columns, norms, unreadable, time.time() - began, waited)
        refuse_divergence(cfg, out, progress, step)

        if tick_due:
            progress.tick(trainer, done, columns)
        else:
            progress.show(trainer, done)
        grid_by_kimg = reached(cfg, cfg.sample_kimg, done)
        name = name_by_kimg(cfg, done) if grid_by_kimg else f"{done * cfg.batch_size / 1000:010.3f}"
        grid_due = grid_by_kimg or (grid_due and not signalled)
        # A run killed in a grid makes it again, if the checkpoint comes after it. One that is due
        # by time alone need not be made again, and a signal leaves no time for it.
        grid_first = grid_by_kimg and not signalled
        if grid_due and grid_first:
            clock.drew(save_pictures(cfg, out, trainer, progress, vae, shown, name))
        if grid_due or number_due or save_due or signalled or scores.due(done):
            save_run(cfg, out, trainer, progress, done, number_due)
            clock.saved()
        if grid_due and not grid_first:
            clock.drew(save_pictures(cfg, out, trainer, progress, vae, shown, name))
        if scores.due(done) and not signalled:
            scores.compute(done, stop)
        if signalled and (done < total or scores.due(done)):
            return signalled


def refuse_divergence(cfg, out, progress, step):
    """UserError after 10 steps in a row without finite gradients."""
    if progress.skipped_in_a_row < 10:
        return
    last = out / "last.pt"
    raise UserError(
        f"non-finite gradients in 10 steps in a row, up to step {step} "
        f"({step * cfg.batch_size / 1000:g} kimg); the last good checkpoint is "
        f"{last if last.exists() else 'yet to be written'}; start again in another --out with a "
        f"lower --lr"
    )


def name_by_kimg(cfg, done):
    return f"{done * cfg.batch_size // 1000:06}"


def save_pictures(cfg, out, trainer, progress, vae, shown, name):
    """samples-NAME.png, a grid always of the same noise and classes, and the curves -> the seconds
    that it took."""
    start = time.monotonic()
    if vae or cfg.in_channels == 3:
        path = out / f"samples-{name}.png"
        batch = min(64, trainer.micro)
        sample.save_samples(trainer.ema.model, cfg, path, vae, shown=shown, batch=batch)
    on_rank_0(lambda: draw_curves(progress.log, out / "loss.png"))
    progress.show_again()
    return time.monotonic() - start


def save_run(cfg, out, trainer, progress, done, number_due):
    """last.pt, and where it is due a numbered checkpoint that stays."""
    stays = out / f"{name_by_kimg(cfg, done)}.pt" if number_due else None
    last = out / "last.pt"
    on_rank_0(lambda: save_checkpoint(last, cfg, done, trainer, progress, stays))


# -------------------------------------------------------------------------------------------------
# Scores while training


class SampleScores:
    """Every cfg.score_every kimg, the scores of cfg.score_n samples of the EMA weights, always of
    the same noise and classes. They go into the log, and the checkpoint of the lowest FID stays as
    best.pt. Without a scorer none are due."""

    def __init__(self, cfg, out, trainer, progress, vae, shown, scorer):
        self.cfg = cfg
        self.out = out
        self.trainer = trainer
        self.progress = progress
        self.vae = vae
        self.shown = shown
        self.scorer = scorer
        if scorer:
            self.vae_hash = data.weights_hash(vae) if vae else ""
            # Only scores of one kind compare: of as many samples, generated and measured alike.
            settings = [getattr(cfg, name) for name in configs.SAMPLING if name != "vae"]
            settings += [cfg.score_n, configs.arithmetic(cfg.precision, trainer.device)]
            hashes = [self.vae_hash, scorer.hash, scorer.inception_hash, scorer.resize]
            self.kind = data.content_hash(settings, hashes)
            self.refuse_another_best()

    def refuse_another_best(self):
        """UserError if best.pt was chosen by scores that do not compare with those to come."""
        kinds = {entry["step"]: entry["kind"] for entry in self.progress.log if "kind" in entry}
        best = self.out / "best.pt"
        if not kinds or not best.exists():
            return
        # A step without an entry: the run was killed between best.pt and the log.
        step = data.read_checkpoint(best)["step"]
        if step in kinds and list(kinds.values())[-1] != self.kind:
            raise UserError(
                f"{best} was the best by other scores (another number of samples, reference or "
                f"sampler), and these do not compare; move it elsewhere, or score as before"
            )

    def due(self, done):
        """Are scores due after so many steps, and not there yet?"""
        if not self.scorer or not done or not reached(self.cfg, self.cfg.score_every, done):
            return False
        log = self.progress.log
        return not any(e.get("kind") == self.kind and e["step"] == done for e in log)

    def compute(self, done, stop):
        """Right after the checkpoint of this step: if the run is killed or stopped before they are
        in the log, the next start computes them again. Raises Stopped, in all processes, if any of
        them got a signal."""
        configs.end_live_line()
        cfg = self.cfg
        model = self.trainer.ema.model
        batches = self.samples(model, stop)
        stats = self.scorer.measure(batches, cfg.score_n)
        scores = on_rank_0(lambda: self.scorer.compare(stats))
        log = self.progress.log
        before = [entry["fid"] for entry in log if entry.get("kind") == self.kind]
        weights = f"EMA weights ({data.weights_hash(model)})"
        maker = sample.provenance(cfg, weights, self.vae_hash, shown=self.shown)
        count = sample.format_count(cfg.score_n)
        entry = {
            "step": done,
            "kimg": done * cfg.batch_size / 1000,
            **scores,
            "kind": self.kind,
            "provenance": f"{count} by the {maker}; {self.scorer.provenance()}",
        }
        if scores["fid"] < min(before, default=math.inf):
            on_rank_0(lambda: hardlink_or_copy(self.out / "last.pt", self.out / "best.pt"))
        self.progress.write(entry)  # from here on they are not due again
        on_rank_0(lambda: draw_curves(log, self.out / "loss.png"))
        if self.progress.writes:
            say(f"{entry['kimg']:.1f} kimg  {sample.format_scores(scores)}")
            say(f"  {entry['provenance']}")

    def samples(self, model, stop):
        """This process's share of the samples, as sample.statistics takes it."""
        cfg = self.cfg
        rank, size = rank_and_size()
        batch = min(64, self.trainer.micro)
        for first in range(0, cfg.score_n, size * batch):  # as often in each process
            signalled, *_ = sync_status(stop)
            if signalled:
                raise Stopped(signalled)
            indices = range(cfg.score_n)[first + rank * batch : first + (rank + 1) * batch]
            watch = sample.show_steps(f"{first} of {cfg.score_n} samples for the scores", cfg)
            for x, _ in sample.generate(model, cfg, indices, self.shown, batch=batch, watch=watch):
                yield indices, sample.to_images(x, cfg, self.vae)


# -------------------------------------------------------------------------------------------------
# Speed


def bench(cfg, device, repeats):
    """Time some training steps on random images, after a warm-up of 3. Forward and backward count
    as three forward passes, whatever is recomputed."""
    trainer = Trainer(cfg, device)
    shape = trainer.micro, cfg.in_channels, cfg.input_size, cfg.input_size
    x = torch.randint(256, shape, dtype=torch.uint8)
    y = torch.randint(max(1, cfg.num_classes), (trainer.micro,))
    if cfg.token_width:
        y = torch.randn(trainer.micro, cfg.token_count, cfg.token_width)
    batches = itertools.repeat((x, y, []))
    steps = itertools.count()
    seconds = configs.seconds_per_call(
        lambda: trainer.step(next(steps), batches), repeats, device, warmup=3
    )
    multiply_adds = 3 * diffit.measure(cfg)[1]
    speed = configs.format_speed(cfg.batch_size / seconds, multiply_adds, cfg.precision, device)
    if rank_and_size()[0] == 0:
        say(f"{repeats} steps of {cfg.batch_size} images, {1000 * seconds:.1f} ms each: {speed}")


# -------------------------------------------------------------------------------------------------
# python train.py


def open_data(name, given):
    """The data set of a preset with the fields that were given, among which the number of classes
    is from then on. UserError if the network cannot take what it holds."""
    # Whether there is anything to guide by, and how many tokens, the data will tell.
    cfg = configs.config_from_preset(name, {**given, "cfg_scale": 1.0, "token_count": 1})
    if not cfg.data:
        raise UserError(f"this preset has no data of its own; pass --data: {data.KINDS}")
    dataset = data.open_dataset(cfg.data, cfg.input_size)
    if isinstance(dataset, data.Latents):
        if dataset.channels != cfg.in_channels:
            raise UserError(
                f"{cfg.data} holds latents of {dataset.channels} channels, and this network takes "
                f"{cfg.in_channels}; choose another preset"
            )
    elif cfg.in_channels != 3:
        raise UserError(
            f"{cfg.data} holds images, which are read with 3 channels (grey ones, too), and this "
            f"network takes {cfg.in_channels}; pass --in-channels 3, or for a network of latents "
            f"make them: python data.py latents {cfg.data} latents --vae FILE --size "
            f"{8 * cfg.input_size}"
        )
    given.setdefault("num_classes", classes_of(dataset, cfg))
    if dataset.tokens is not None and not cfg.set_size and not given["num_classes"]:
        count, width = dataset.tokens.shape[1:]
        given.setdefault("token_width", width)
        given.setdefault("token_count", count if given["token_width"] else 1)
    return dataset


def classes_of(dataset, preset):
    """The number of classes of the network where the user gives none: that of the data. A preset
    without classes takes only those with names (numbered folders are often parts of one set), and
    none of CIFAR's archives, which the paper's unconditional networks are trained on. UserError if
    there are fewer images than that."""
    if preset.set_size or preset.token_width or dataset.tokens is not None:
        return 0  # they take the place of classes
    named = not data.all_numbers(dataset.class_names)
    if not preset.num_classes and (not named or dataset.labels_from == "the archive"):
        return 0
    if dataset.num_classes > len(dataset):
        raise UserError(
            f"the labels go up to {dataset.num_classes - 1}, and there are only {len(dataset)} "
            f"images; mend the labels, or pass --num-classes {dataset.num_classes} if that is meant"
        )
    return dataset.num_classes if dataset.num_classes > 1 else 0


def check_data(cfg, dataset):
    """UserError if the network takes another size than the data have, or has classes and the data
    have none, or more; likewise for tokens and sets."""
    if dataset.size != cfg.input_size:
        raise UserError(
            f"the data are {dataset.size} x {dataset.size}, and this network takes "
            f"{cfg.input_size} x {cfg.input_size}; open them with that size"
        )
    if cfg.num_classes and dataset.labels is None:
        raise UserError(
            f"{cfg.data} has no labels, and this network has {cfg.num_classes} classes; sort the "
            f"images into sub-folders, or pass --num-classes 0"
        )
    if cfg.num_classes and dataset.num_classes > cfg.num_classes:
        raise UserError(
            f"{cfg.data} has {dataset.num_classes} classes, and this network {cfg.num_classes}; "
            f"pass --num-classes {dataset.num_classes}, or leave it out"
        )
    if cfg.token_width:
        check_tokens(cfg, dataset)
    if cfg.set_size:
        check_sets(cfg, dataset)


def check_tokens(cfg, dataset):
    """UserError unless the data have tokens as the network takes them."""
    theirs = None if dataset.tokens is None else dataset.tokens.shape[1:]
    ours = cfg.token_count, cfg.token_width
    if theirs != ours:
        found = "none" if theirs is None else "{} of width {}".format(*theirs)
        raise UserError(
            f"{cfg.data} has tokens ({found} for each image) other than the network takes "
            f"({ours[0]} of width {ours[1]}); pass an .npz with images and a float arr_1 of "
            f"tokens, and leave out --token-width and --token-count"
        )


def check_sets(cfg, dataset):
    """UserError unless the data have classes, and a set's number of images of each that is not held
    out."""
    if dataset.labels is None:
        raise UserError(
            f"{cfg.data} has no labels, and sets are images of one class; sort the images into "
            f"sub-folders"
        )
    counts = np.bincount(dataset.labels)
    there = set(np.flatnonzero(counts).tolist())
    strange = sorted(set(cfg.holdout) - there)
    if strange:
        raise UserError(
            f"{cfg.data} has no images of class {strange[0]}, which --holdout (by default the "
            f"preset's) keeps from training; pass those to keep, or none: --holdout ''"
        )
    trained = sorted(there.difference(cfg.holdout))
    if not trained:
        raise UserError(
            f"--holdout names all {len(there)} classes of {cfg.data}; leave some to train on"
        )
    small = [k for k in trained if counts[k] < cfg.set_size]
    if small:
        names = dict(enumerate(dataset.class_names))
        raise UserError(
            f"class {names.get(small[0], small[0])} of {cfg.data} has {counts[small[0]]} images, "
            f"fewer than --set-size {cfg.set_size}; add some, choose smaller sets, or hold the "
            f"class out: --holdout {','.join(map(str, [*cfg.holdout, *small]))}"
        )


def open_vae(cfg, dataset):
    """The VAE for sample grids of latents, or None. UserError if one with another encoder made
    them."""
    if not cfg.vae:
        return None
    vae = sample.open_vae(cfg)
    ours = vae.fingerprint()
    theirs = dataset.header["vae"]
    if ours != theirs:
        raise UserError(
            f"--vae {cfg.vae} (its encoder: {ours}) is not the one that made {cfg.data} "
            f"({theirs}); pass that one, or none for a run without sample grids"
        )
    return vae


def open_scorer(cfg, vae, force):
    """The scorer of samples while training, or None. UserError without a VAE for latents, for too
    few images, and as sample.Scorer says it."""
    if not cfg.score_every:
        if force:
            raise UserError("--force is for --score-every KIMG, which is not given; leave it out")
        return None
    if cfg.in_channels != 3 and not vae:
        raise UserError(
            "--score-every scores images, and this network generates latents; pass --vae FILE"
        )
    sample.check_number(cfg.score_n, force, "images (--score-n)")
    scorer = sample.Scorer(cfg.score_ref, cfg.inception, force, workers=cfg.workers)
    scorer.check_size(sample.image_size(cfg, vae))
    sample.warn_of_number(cfg.score_n)
    return scorer


def check_machine(cfg, device):
    """UserError if this machine, or the number of processes, does not suit the configuration."""
    size = rank_and_size()[1]
    multiple = size * (cfg.micro_batch or cfg.set_size or 1)
    if cfg.batch_size % multiple:
        micro = f" in sets of {cfg.set_size}" if cfg.set_size else ""
        micro = f" in micro-batches of {cfg.micro_batch}" if cfg.micro_batch else micro
        raise UserError(
            f"--batch-size {cfg.batch_size} cannot be divided over {size} processes{micro}; choose "
            f"a multiple of {multiple}"
        )
    configs.arithmetic(cfg.precision, device)


def starting_weights(path, network):
    """The weights of --init-from, as far as they fit the network (on the meta device), and
    sentences about them. UserError if the file holds something else."""
    path = data.last_in(path)
    weights, kind = data.weights_in(data.read_file(path), path)
    weights, notes = diffit.adapt_weights(weights, network)
    data.check_weights(network, weights, path)
    data.check_finite({n: w for n, w in weights.items() if not w.is_meta}, path)
    # Meta tensors stand for what is re-initialised. The others are copied: --overwrite may remove
    # the file that they are mapped from.
    own = network.state_dict()
    weights = {n: w.clone() for n, w in weights.items() if n in own and not w.is_meta}
    return weights, [f"starting from the {kind} weights of {path}", *notes]


def describe(name, cfg, network, dataset, device):
    """Say what is about to run, and what to expect of the data and of this machine."""
    source = configs.SOURCES[name][0]
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    arithmetic = configs.arithmetic(cfg.precision, device)
    size = rank_and_size()[1]
    processes = f", {size} processes" if size > 1 else ""
    say(
        f"{name} ({source}): {cfg.model} of {millions:.2f}M parameters, {cfg.kimg:g} kimg "
        f"(thousands of images), {device.type} in {arithmetic}{processes}"
    )
    say(f"{cfg.data}: {dataset.summary()}")
    describe_classes(configs.PRESETS[name].num_classes, cfg, dataset)
    if device.type == "cpu" and arithmetic == "fp32":
        say("this CPU has no fast bf16 (AMX): expect a few times the time of one that has it")


def describe_classes(usual, cfg, dataset):
    """Say what a user may not expect of the classes. usual: the number that the preset has."""
    now = cfg.num_classes
    count = dataset.num_classes
    if cfg.token_width:
        return  # which the summary of the data describes
    if cfg.set_size:
        trained = len(set(dataset.labels.tolist()).difference(cfg.holdout))
        say(
            f"sets of {cfg.set_size} images of a class: {trained} classes to train on, "
            f"{len(set(cfg.holdout))} held out"
        )
    elif not now and count > 1:
        say(f"the network is unconditional and ignores them; --num-classes {count} uses them")
    elif not now and usual:
        say(f"the network is unconditional, as the data have no two classes (the preset: {usual})")
    elif now > count:
        say(
            f"the network has {now} classes: those from {count} on have no images and will not be "
            f"learned; pass --num-classes {count}"
        )
    elif now != usual:
        say(f"the network has these {now} classes, where the preset has {usual or 'none'}")


def main():
    parser = Parser(
        prog="train.py",
        usage="train.py [--preset NAME] [--data PATH] [--out DIR] [--FIELD VALUE ...]",
        description="Train a network; the same command again resumes. A preset is a Config with a "
        "name; each flag below the first group replaces a field of it.",
        epilog="The defaults are those of the preset: try --preset ffhq64 --help. On several "
        "processes: torchrun --nproc_per_node=8 train.py ...",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--preset", default="shapes", metavar="NAME", help="python configs.py lists them"
    )
    group.add_argument("--out", metavar="DIR", help="where everything goes (default: runs/PRESET)")
    group.add_argument(
        "--init-from", metavar="CKPT", help="start from these weights (EMA), or published ones"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start again in a folder that holds a run"
    )
    group.add_argument(
        "--force", action="store_true", help="compute scores from fewer than 2048 images"
    )
    group.add_argument(
        "--bench",
        type=configs.at_least(1),
        nargs="?",
        const=20,
        metavar="N",
        help="only time N steps (default: 20)",
    )
    configs.add_device(group)
    parser.add_config(shown=shown_preset())
    args = vars(parser.parse_args())
    configs.run_command(
        parser,
        lambda: run(args),
        "pass a smaller --micro-batch, or --grad-checkpointing",
        "the same command, without --overwrite, resumes from the last checkpoint",
        args.pop("device"),
    )


def shown_preset():
    """The preset whose values --help shows: the one on the command line, if it exists."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", nargs="?")
    name = finder.parse_known_args()[0].preset
    return configs.PRESETS.get(name, configs.PRESETS["shapes"])


def run(args):
    """The command with these flags -> the number of the signal that stopped it, if one did."""
    own = ("preset", "out", "init_from", "overwrite", "force", "bench")
    name, out, init_from, overwrite, force, repeats = (args.pop(key) for key in own)
    out = Path(out or f"runs/{name}")
    first = rank_and_size()[0] == 0  # the process that prints and writes
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        overwrite = False  # torchrun has restarted a run: it resumes
    device = configs.default_device()
    if repeats:
        cfg = configs.config_from_preset(name, args)
        check_machine(cfg, device)
        return bench(cfg, device, repeats)

    dataset = open_data(name, args)
    cfg = configs.config_from_preset(name, args)
    check_machine(cfg, device)
    vae = open_vae(cfg, dataset)
    scorer = open_scorer(cfg, vae, force)
    with torch.device("meta"):
        network = diffit.build(cfg)  # do the sizes fit? no memory is taken
    weights = None
    notes = []
    if init_from and checkpoints(out) and not overwrite:
        notes = [f"--init-from {init_from} is not used: {out} holds a run, which resumes"]
    elif init_from:
        weights, notes = starting_weights(init_from, network)
    check_data(cfg, dataset)
    if first:
        describe(name, cfg, network, dataset, device)
        for note in notes:
            say(note)
    stopped = train(cfg, dataset, out, weights, device, vae, scorer, overwrite)
    configs.end_live_line()
    if stopped and first:
        how = "the same command resumes" + (" (without --overwrite)" if overwrite else "")
        say(f"stopped by {signal.Signals(stopped).name} and saved; {how}")
    elif first:
        needs = " --support PATH" * bool(cfg.set_depth) + " --tokens FILE" * bool(cfg.token_width)
        made = f"python sample.py --ckpt {out}/last.pt{needs}"
        say(f"complete: {out}/last.pt; make images with: {made}")
    return stopped


if __name__ == "__main__":
    main()
