"""Training: python train.py --preset NAME --data PATH, or on several processes torchrun --nproc_per_node=8 train.py ...

`Trainer.step` is the step itself and `train` the loop around it; what they need stands above them. The same command
again resumes. Nothing of a run's randomness is saved, because none needs to be: the data follow from (seed, place), and
the noise, timesteps and dropped labels from (seed, step, micro-batch), whichever process works on that micro-batch.
"""
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint

import configs
import data
import diffit
import diffusion
import sample
from configs import SOURCES, Parser, config_from


# ---------------------------------------------------------------------------------------------
# Gradients of all processes

class GradientAverager:
    """Adds up the gradients of all processes while backward still runs. (Each has divided its loss by the whole batch,
    so the sum is the mean.) Every process then holds the same gradients, and so keeps the same weights.

    Parameters share buckets of about `bucket_mb`, in the order in which backward produces their gradients: their
    reverse at first, from the second step on what the first has shown. A full bucket's all-reduce starts at once;
    buckets go in turn, so that all processes send the same one. Alone it does nothing, and costs nothing."""

    def __init__(self, parameters, bucket_mb=25):
        self.parameters, self.limit, self.active = parameters, bucket_mb * 2 ** 20, False
        self.alone = sample.rank_and_size()[1] == 1
        if self.alone:
            return
        for p in parameters:
            dist.broadcast(p.data, 0)
            p.register_post_accumulate_grad_hook(self.arrived)
        self.number = {p: i for i, p in enumerate(parameters)}
        self.fill(reversed(range(len(parameters))))
        self.seen = []                                                     # None once the order is known

    def fill(self, order):
        """Put the parameters into buckets, in the order of these numbers."""
        self.buckets, self.order, size = [], list(order), math.inf
        for p in (self.parameters[i] for i in self.order):
            if size + p.nbytes > self.limit:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.nbytes
        self.flats = [torch.cat([p.detach().flatten() for p in bucket]) for bucket in self.buckets]  # memory for sums
        self.bucket_of = {p: k for k, bucket in enumerate(self.buckets) for p in bucket}
        self.reset()

    def reset(self):
        self.missing, self.sent, self.active = [len(bucket) for bucket in self.buckets], [], False

    def start(self):
        """Before the backward of a step's last micro-batch: from here on, gradients are complete when they arrive."""
        self.active = not self.alone

    def arrived(self, p):
        if self.active:
            self.missing[self.bucket_of[p]] -= 1
            if self.seen is not None:
                self.seen.append(p)
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self.send()

    def send(self):
        flat = self.flats[len(self.sent)]
        torch.cat([p.grad.flatten() for p in self.buckets[len(self.sent)]], out=flat)
        self.sent.append(dist.all_reduce(flat, async_op=True))

    def finish(self):
        """After that backward: wait, and give each parameter its sum."""
        if self.alone:
            return
        for work, flat, bucket in zip(self.sent, self.flats, self.buckets):
            work.wait()
            for p, grad in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = grad.view_as(p)
        self.reset()
        if self.seen is not None:
            self.fill(sample.objects_from_all([self.number[p] for p in self.seen])[0])  # rank 0's, for all
            self.seen = None

    def state_dict(self):
        """The order, on which the rounding of a sum over three and more processes depends."""
        return {} if self.alone or self.seen is not None else {"order": self.order}

    def load_state_dict(self, state):
        if not self.alone:
            self.fill(state["order"])
            self.seen = None


# ---------------------------------------------------------------------------------------------
# Moving average of the weights

class EMA:
    """A copy of the network whose weights follow the trained ones, ema = beta ema + (1 - beta) weights after each step.
    beta is given, or follows from a half-life in images, which at the start is at most `rampup` of the images seen
    (Karras et al. 2022, App. F.2: early weights are forgotten soon)."""

    def __init__(self, model, cfg):
        self.model, self.cfg = copy.deepcopy(model).eval().requires_grad_(False), cfg
        self.own, self.trained = list(self.model.parameters()), [p.detach() for p in model.parameters()]

    def beta(self, images):
        """The share that stays, for a step that begins after so many images."""
        if self.cfg.ema_decay:
            return self.cfg.ema_decay
        halflife = 1000 * self.cfg.ema_halflife_kimg
        if self.cfg.ema_rampup:
            halflife = min(halflife, self.cfg.ema_rampup * images)
        return 0.5 ** (self.cfg.batch_size / max(halflife, 1e-8))

    @torch.no_grad()
    def update(self, images):
        torch._foreach_lerp_(self.own, self.trained, 1 - self.beta(images))


# ---------------------------------------------------------------------------------------------
# The step

def learning_rate(cfg, images):
    """For a step that begins after so many images: a linear ramp from 0, then constant or half a cosine down to 0."""
    ramp = min(1.0, images / (1000 * cfg.lr_rampup_kimg)) if cfg.lr_rampup_kimg else 1.0
    done = min(1.0, images / (1000 * cfg.kimg)) if cfg.lr_decay == "cosine" else 0.0
    return cfg.lr * ramp * (0.5 + 0.5 * math.cos(math.pi * done))


class Trainer:
    """All that training changes, and the step that changes it. weights: a state_dict, or part of one, to begin with."""

    def __init__(self, cfg, device, weights=None):
        self.cfg, self.device, (rank, size) = cfg, device, sample.rank_and_size()
        torch.manual_seed(cfg.seed)
        self.model = diffit.build(cfg)                                     # on the CPU: the same on every machine
        if weights:
            self.model.load_state_dict({**self.model.state_dict(), **weights})
        self.model.to(device).train()
        self.parameters = list(self.model.parameters())
        self.averager = GradientAverager(self.parameters)                  # from here on, weights are rank 0's
        self.ema = EMA(self.model, cfg)
        self.optimizer = torch.optim.AdamW(self.parameters, cfg.lr, (0.9, cfg.beta2), 1e-8, cfg.weight_decay,
                                           fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
        self.process = diffusion.build(cfg)
        self.timesteps = diffusion.LossAwareTimesteps(cfg.diffusion_steps) if cfg.timesteps == "loss-aware" else None
        self.micro = cfg.micro_batch or cfg.batch_size // size
        each = cfg.batch_size // size // self.micro                        # micro-batches of a process in a step
        self.mine = range(rank * each, (rank + 1) * each)
        self.group_names, self.groups = groups(self.model)
        self.groups = self.groups.to(device)
        for block in (m for m in self.model.modules() if isinstance(m, diffit.BLOCKS)):
            if cfg.checkpoint_blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            if cfg.compile:
                block.compile()                                            # equal blocks compile once

    def parts(self):
        """What a checkpoint holds of it, by name."""
        parts = {"model": self.model, "ema": self.ema.model, "optimizer": self.optimizer, "scaler": self.scaler,
                 "averager": self.averager, "timesteps": self.timesteps}
        return {name: part for name, part in parts.items() if part is not None}

    def step(self, step, batches, watch=False):
        """One step, on this process's next micro-batches (x, y, unreadable) -> what was seen of the whole batch: a dict
        of columns, each (batch_size,), and of the gradient: its norm, then that of each part; None where it was not
        finite, and nothing was changed but what cfg.nonfinite says. watch: also the norm of each condition vector."""
        cfg, images, columns = self.cfg, step * self.cfg.batch_size, []    # images seen before this step
        for k in self.mine:
            x, y, _ = next(batches)
            x = data.to_network(x.to(self.device, non_blocking=True))      # (b, C, H, W), pixels in [-1, 1]
            y = y.to(self.device, non_blocking=True) if cfg.num_classes else None
            torch.manual_seed(sample.seed_from(cfg.seed, step, k))
            t, weight = self.draw(len(x))
            told = []                                                      # what the process tells the network of t

            x, augmented = data.augment(x, cfg.augment) if cfg.augment else (x, None)

            def f(x, t):
                told.append(t)
                return self.model(x, t, y, augmented)

            with sample.autocast(cfg.precision, self.device):
                losses = self.process.loss(f, x, t)                        # each (b,)
            if k == self.mine[-1]:
                self.averager.start()
            self.scaler.scale((weight * losses["loss"]).sum() / cfg.batch_size).backward()
            columns.append({"t": t, "weight": weight, **{name: loss.detach() for name, loss in losses.items()}})
            if watch:
                with torch.no_grad():
                    columns[-1]["condition"] = diffit.condition(self.model, told[0], y, augmented).norm(dim=1)
        self.averager.finish()
        self.scaler.unscale_(self.optimizer)
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters]))
        norm = norms.norm()
        seen = sample.from_all(torch.stack([torch.cat([c[name].float() for c in columns]) for name in columns[0]]))
        seen = dict(zip(columns[0], seen))

        finite = bool(norm.isfinite())
        if not finite and cfg.nonfinite == "zero":                         # EDM's way: what is not a number stays put
            for p in self.parameters:
                torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)
            norm = torch.stack(torch._foreach_norm([p.grad for p in self.parameters])).norm()
        if finite or cfg.nonfinite == "zero":
            if cfg.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, cfg.grad_clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(cfg, images)
            self.optimizer.step()
            self.ema.update(images)
            if self.timesteps and finite:
                self.timesteps.update(seen["t"].long(), seen["loss"])
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        parts = torch.zeros(len(self.group_names), device=self.device).index_add_(0, self.groups, norms ** 2).sqrt()
        return seen, torch.cat([norm[None], parts]) if finite else None

    def draw(self, b):
        """Noise levels (b,) for a micro-batch, and what each image's loss weighs."""
        if self.timesteps:
            return self.timesteps.sample(b, self.device)
        return self.process.draw(b, self.device), torch.ones(b, device=self.device)


def groups(model):
    """The parts whose gradients are watched apart (an embedding, a block, the head): their names, and the number of
    its part for each parameter."""
    def part(name):
        first, *rest = name.split(".")
        return ".".join([first, *itertools.takewhile(lambda word: word.isdigit() or word == "stages", rest)])
    of = [part(name) for name, _ in model.named_parameters()]
    names = list(dict.fromkeys(of))
    return names, torch.tensor([names.index(name) for name in of])


# ---------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, cfg, step, trainer, progress, stays=None):
    """All that a run needs to go on, and `sample.py` to sample: tensors and plain values only. Written under another
    name, flushed to disk, then renamed: whatever happens, `path` holds one whole checkpoint, the new or the old; and
    the one before stays as previous.pt. stays: another name for it; of the numbered ones, the newest
    cfg.keep are kept."""
    state = {"format": sample.FORMAT, "config": dataclasses.asdict(cfg), "step": step, "progress": progress.state(),
             **{name: part.state_dict() for name, part in trainer.parts().items()}}
    try:
        with data.written_whole(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            if stays:                                                      # before path says that this step is done
                link(temporary, stays)
            if path.exists():
                link(path, path.with_name("previous.pt"))
        if stays:
            for old in numbered(path.parent)[:-cfg.keep] if cfg.keep else []:
                old.unlink()
    except (OSError, RuntimeError) as error:                               # torch.save's answer to a full disk
        raise OSError(f"{path} could not be written ({data.reason(error)}); what was there before is whole") from None


def load_checkpoint(path, cfg, trainer, progress):
    """Put a run of the same Config back where save_checkpoint left it -> the step to go on with. ValueError if the
    file is not ours, or belongs to a run that differs in more than what MAY_CHANGE."""
    state = sample.read_checkpoint(path)
    refuse_another_run(state["config"], cfg, path)
    for name, part in trainer.parts().items():
        if isinstance(part, torch.nn.Module):
            data.load_weights(part, state[name], path)
        elif state[name]:                                                  # {}: the part was not in use
            part.load_state_dict(state[name])
    progress.load(state["progress"])
    return state["step"]


def newest(out):
    """The newest whole checkpoint in the folder, or None. One that it must pass over is named, and gives way to the one
    that it finds. ValueError if all are damaged."""
    files = [out / "last.pt", out / "previous.pt", *reversed(numbered(out))]
    files, errors = [file for file in files if file.exists()], []
    for file in files:
        try:
            sample.read_checkpoint(file)
        except ValueError as error:
            errors.append(str(error))
        else:
            for error in errors:
                say(f"{error}; going on from {file}")
            if file != out / "last.pt":
                link(file, out / "last.pt")                                # lest the damaged one become previous.pt
            return file
    if errors:
        raise ValueError("; ".join(errors) + "; give another --out, or --overwrite to start anew there")


def numbered(out):
    """The checkpoints <kimg>.pt in the folder, the newest last."""
    return sorted((file for file in out.glob("*.pt") if file.stem.isdigit()), key=lambda file: int(file.stem))


def link(source, dest):
    """A second name for a file, in the place of what dest was; a copy where the file system has no links."""
    with data.written_whole(dest) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


# A run may change its length, its machine, how it is watched and how its samples are made; nothing else.
MAY_CHANGE = {"kimg", "micro_batch", "compile", "checkpoint_blocks", "workers", "tick_kimg", "sample_kimg", "save_kimg",
              "keep", "score_every", "score_n", "score_ref", "inception", *sample.SAMPLING}


def refuse_another_run(theirs, cfg, path):
    ours = json.loads(json.dumps(dataclasses.asdict(cfg)))                 # tuples become lists, as in config.json
    theirs = json.loads(json.dumps(theirs))
    differ = [name for name in ours if name not in MAY_CHANGE and ours[name] != theirs.get(name)]
    if differ:
        raise ValueError(f"{path} belongs to another run: "
                         + ", ".join(f"{n} is {theirs.get(n)!r} there and {ours[n]!r} here" for n in differ)
                         + "; give another --out, or --overwrite to start anew there")


def open_folder(out, cfg, overwrite):
    """Make the output folder, or accept the one that this run began. ValueError if it holds anything else."""
    config = out / "config.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if config.exists() and overwrite:
        for file in numbered(out) + [file for pattern in ("log.jsonl", "loss.png", "samples-*.png", "last.pt",
                                                          "previous.pt", "best*.pt", "config.json")
                                          for file in out.glob(pattern)]:
            file.unlink()                                                  # config.json last: it marks the folder
    elif config.exists():
        try:
            refuse_another_run(json.loads(config.read_text()), cfg, out)
        except json.JSONDecodeError:
            raise ValueError(f"{config} is damaged; give another --out, or --overwrite to start anew there") from None
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds files that are no run of train.py; give a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(config, json.dumps(dataclasses.asdict(cfg), indent=1))


def write_text(path, text):
    with data.written_whole(path) as temporary:
        temporary.write_text(text)


# ---------------------------------------------------------------------------------------------
# What one sees: a line, a log, curves

class Progress:
    """Means over each tick, shown as one live line on a terminal, elsewhere as a line per tick, and kept in log.jsonl.
    What a tick has seen so far stays on the device, and goes into the checkpoint: a resumed run logs what an unbroken
    one would. Every process has the same; rank 0 writes."""

    def __init__(self, cfg, out, device, dataset):
        self.cfg, self.out, self.device = cfg, out, device
        self.writes = sample.rank_and_size()[0] == 0
        self.live = self.writes and sys.stderr.isatty()
        self.total = math.ceil(round(cfg.kimg * 1000 / cfg.batch_size, 6)) # steps of the whole run
        self.log, self.seen, self.norms, self.skipped = [], [], [], 0
        self.unreadable = data.Unreadable(dataset, self.writes)

    def state(self):
        return {"log": self.log, "seen": self.seen, "norms": self.norms, "skipped": self.skipped,
                "unreadable": self.unreadable.found}

    def load(self, state):
        self.log, self.skipped, self.unreadable.found = state["log"], state["skipped"], state["unreadable"]
        self.seen = [{name: column.to(self.device) for name, column in seen.items()} for seen in state["seen"]]
        self.norms = [norms.to(self.device) for norms in state["norms"]]

    def begin(self, step):
        """Start the clocks at this step; the log is what it was then."""
        if self.writes:
            write_text(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))
        self.first, self.began, self.shown = step, time.time(), 0
        self.timed, self.busy, self.waited = 0, 0.0, 0.0

    def time(self, seconds, waited):
        """One step took so many seconds, of which it waited for data."""
        self.timed, self.busy, self.waited = self.timed + 1, self.busy + seconds, self.waited + waited

    def add(self, seen, norms):
        """What Trainer.step has seen."""
        self.seen.append(seen)
        self.norms.append(norms)

    def means(self, trainer):
        """Of the tick so far: the losses, in all and by quarters of the noise, and the gradient's norms."""
        if not self.seen:
            return {}
        seen = {name: torch.cat([seen[name] for seen in self.seen]) for name in self.seen[0] if name != "condition"}
        weight, norms = seen["weight"], torch.stack(self.norms).mean(0).tolist()
        quarter = torch.nn.functional.one_hot(trainer.process.quarter(seen["t"]).long(), 4).float()
        means = {name: float((weight * seen[name]).mean()) for name in ("loss", "mse", "vlb") if name in seen}
        quarters = (weight * seen["loss"]) @ quarter / (weight @ quarter).clamp(min=1e-9)
        return means | {"loss_quarters": quarters.tolist(), "grad_norm": norms[0],
                        "grad_norm_parts": dict(zip(trainer.group_names, norms[1:]))}

    def show(self, step, lr, tick, trainer, seen):
        """Called after each step; at a tick, write the log."""
        if not tick and not (self.live and time.time() - self.shown > 0.5):
            return
        self.shown = time.time()
        means = self.means(trainer)
        busy = max(self.busy, 1e-9)
        entry = {"step": step, "kimg": step * self.cfg.batch_size / 1000, **means, "lr": lr, "skipped": self.skipped,
                 "unreadable": len(self.unreadable.found), "data_wait": round(self.waited / busy, 4),
                 "images_per_s": round(self.timed * self.cfg.batch_size / busy, 1),
                 "memory_gb": round(sample.memory(self.device), 3)}
        left = (self.total - step) * (self.shown - self.began) / max(step - self.first, 1)
        text = (f"kimg {entry['kimg']:.1f}  loss {means.get('loss', math.nan):.4f}  lr {lr:.2e}  "
                f"grad {means.get('grad_norm', math.nan):.3f}  {entry['images_per_s']:.0f} images/s  "
                f"{entry['memory_gb']:.2f} GB  {clock(left)} left"
                + (f"  {self.skipped} not finite" if self.skipped else ""))
        if self.writes:
            print(f"\r{text:<100}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)
        if tick:
            c = seen["condition"]
            entry["condition_norm"] = {"mean": c.mean().item(), "std": c.std(correction=0).item(),
                                       "max": c.max().item()}
            self.note(entry)
            self.seen, self.norms, self.timed, self.busy, self.waited = [], [], 0, 0.0, 0.0

    def note(self, entry):
        """Into the log."""
        self.log.append(entry)
        if self.writes:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def scored(self, step, scores, kind, provenance):
        """Show and log the scores after so many steps -> is this FID the lowest of its kind, of those that compare?"""
        before = [entry["fid"] for entry in self.log if entry.get("kind") == kind]
        best, name = self.out / "best.pt", f"best-before-{step * self.cfg.batch_size // 1000:06}.pt"
        if self.writes and not before and best.exists():                   # by another measure: not to be compared
            link(best, best.with_name(name))
            say(f"{best} was best by other scores; it stays as {name}")
        kimg = step * self.cfg.batch_size / 1000
        self.note({"step": step, "kimg": kimg, **scores, "kind": kind, "provenance": provenance})
        if self.writes:
            say(f"kimg {kimg:.1f}  {sample.in_words(scores)}\n  {provenance}")
        return scores["fid"] < min(before, default=math.inf)


def clock(seconds):
    return f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02}:{round(seconds) % 60:02}"


def draw_curves(log, path):
    """loss.png: what the log holds over thousands of images, on logarithmic scales; in a third row, the scores."""
    def line(name, *keys, of=lambda value: value):
        """(name, points) of what the entries hold under these keys, or of a function of it."""
        points = []
        for entry in log:
            with contextlib.suppress(KeyError):
                value = of(functools.reduce(operator.getitem, keys, entry))
                if value > 0 and math.isfinite(value):
                    points.append((entry["kimg"], math.log10(value)))
        return name, points

    panels = [                                                             # names from right to left
        ("loss, and its parts", [line(name, name) for name in ("mse", "vlb", "loss")]),
        ("loss by quarter of the noise, 1 the cleanest", [line(str(k + 1), "loss_quarters", k) for k in range(4)]),
        ("gradient norm: all, and the largest part", [
            line("all", "grad_norm"), line("part", "grad_norm_parts", of=lambda parts: max(parts.values()))]),
        ("norm of the condition vector", [line(name, "condition_norm", name) for name in ("mean", "max", "std")]),
        ("scores of samples", [line(name, name.lower()) for name in ("IS", "sFID", "FID")]),
        ("precision and recall of samples", [line(name, name) for name in ("recall", "precision")])]
    panels = [(title, [(name, points) for name, points in lines if points]) for title, lines in panels]
    scored = any("fid" in entry for entry in log)
    image = Image.new("RGB", (1200, 1200 if scored else 800), "white")
    for k, (title, lines) in enumerate(panels):
        if lines:
            draw_panel(ImageDraw.Draw(image), 600 * (k % 2), 400 * (k // 2), title, lines)
    data.save_image(image, path)


def draw_panel(pen, x0, y0, title, lines, width=600, height=400):
    """Lines [(name, [(kimg, log10 value)])] in a box whose corner is (x0, y0)."""
    left, right, top, bottom = x0 + 60, x0 + width - 20, y0 + 30, y0 + height - 40
    values = [value for _, points in lines for _, value in points]
    end, low, high = max(points[-1][0] for _, points in lines), min(values) - 0.02, max(values) + 0.02

    def at(x, y):
        return left + x / end * (right - left), top + (high - y) / (high - low) * (bottom - top)

    for k in range(5):
        x, y = end * k / 4, low + (high - low) * k / 4
        pen.line([at(x, low), at(x, high)], fill="#e4e4e4")
        pen.line([at(0, y), at(end, y)], fill="#e4e4e4")
        pen.text((at(x, low)[0], bottom + 6), f"{x:.3g}", fill="black", anchor="ma")
        pen.text((left - 6, at(0, y)[1]), f"{10 ** y:.3g}", fill="black", anchor="rm")
    for k, (name, points) in enumerate(lines):
        colour = ("#999999", "#dd8833", "#2255cc", "#228833")[k]
        pen.line([at(x, y) for x, y in points], fill=colour, width=2)
        if len(points) < 20:                                               # a line of one point would show nothing
            for x, y in points:
                pen.circle(at(x, y), 3, fill=colour)
        pen.text((right - 60 * k, y0 + 10), name, fill=colour, anchor="ra")
    pen.text((left, y0 + 10), title, fill="black")
    pen.text(((left + right) / 2, bottom + 22), "thousands of images", fill="black", anchor="ma")


# ---------------------------------------------------------------------------------------------
# The loop

class Stop:
    """SIGINT and SIGTERM ask the loop to end after the step at hand; another one, more than three seconds later, ends
    it at once. torchrun waits 30 seconds for the step and the save, or what TORCH_ELASTIC_SHUTDOWN_TIMEOUT says."""

    def __init__(self):
        self.signal, self.when = 0, math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if time.time() - self.when > 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal, self.when = number, min(self.when, time.time())


class Feed:
    """The loader's batches, with the seconds that were spent waiting for them and what could not be read."""

    def __init__(self, loader):
        self.batches, self.waited, self.failed = iter(loader), 0.0, []

    def __next__(self):
        asked = time.time()
        batch = next(self.batches)
        self.waited, self.failed = self.waited + time.time() - asked, self.failed + batch[2]
        return batch


def agree(stop, failed, device):
    """-> the signal that any process was sent (or 0), and the images that any could not read; the same in all."""
    if sample.rank_and_size()[1] == 1:
        return stop.signal, failed
    said = sample.from_all(torch.tensor([[stop.signal], [len(failed)]], device=device))
    failed = sum(sample.objects_from_all(failed), []) if said[1].any() else []
    return int(said[0].max()), failed


class Stopped(Exception):
    """By a signal, its number."""


def score(model, cfg, scorer, vae, stop, device, batch):
    """The scores of cfg.score_n samples, the same ones each time, in all processes, which divide them. Raises Stopped
    in all if any of them was sent a signal."""
    rank, size = sample.rank_and_size()

    def share():
        for first in range(0, cfg.score_n, size * batch):                  # as often in each process: agree() waits
            signalled, _ = agree(stop, [], device)
            if signalled:
                raise Stopped(signalled)
            indices = range(cfg.score_n)[first + rank * batch:first + (rank + 1) * batch]
            for x, _ in sample.generate(model, cfg, indices, batch=batch):
                yield indices, sample.pixels(x, cfg, vae)

    stats = scorer.look(share(), cfg.score_n)
    return sample.on_rank_0(lambda: scorer.compare(stats))


def train(cfg, dataset, out, weights=None, device=None, vae=None, scorer=None):
    """Train cfg on dataset in the folder out, from the start or from its newest checkpoint -> None when complete, or
    the number of the signal that stopped it. weights: a state_dict to begin with. vae: makes the sample grids of a
    latent network, which has none without. scorer: a sample.Scorer, for cfg.score_every; best.pt is the checkpoint of
    the lowest FID. ValueError past 1 % unreadable images, or after 10 steps in a row without finite gradients."""
    device, out, batch = device or sample.default_device(), Path(out), cfg.batch_size
    trainer, progress, start, good = Trainer(cfg, device, weights), Progress(cfg, out, device, dataset), 0, None
    file = sample.on_rank_0(lambda: newest(out))
    if file:
        start, good = load_checkpoint(file, cfg, trainer, progress), file
        if progress.writes:
            say(f"resumed from {file} at {start * batch / 1000:g} kimg")

    def passed(kimg, done):
        """Did the last of so many steps reach another multiple of so many thousand images, or the end?"""
        return done == progress.total or done * batch // (1000 * kimg) > (done - 1) * batch // (1000 * kimg)

    def due(done):
        """Is there to be a score after so many steps, and is there none yet?"""
        if not scorer or not done or not passed(cfg.score_every, done):
            return False
        return not any("fid" in entry and entry["step"] == done for entry in progress.log)

    def score_if_due(done):
        """-> the signal that came meanwhile, or 0. The checkpoint was written before, so that then nothing is lost and
        the run resumes here; it is written again, with the scores."""
        if not due(done):
            return 0
        if progress.live:
            say("")
        try:
            scores = score(trainer.ema.model, cfg, scorer, vae, stop, device, min(64, trainer.micro))
        except Stopped as stopped:
            return stopped.args[0]
        vae_hash = data.weights_hash(vae) if vae else ""
        maker = sample.made_by("EMA weights", data.weights_hash(trainer.ema.model), cfg, vae_hash)
        best = progress.scored(
            done, scores, f"{cfg.score_n}; {sample.recipe(cfg)}; {vae_hash}; {scorer.hash}; {scorer.inception_hash}",
            f"{sample.counted(cfg.score_n)} by the {maker}; {scorer.provenance()}")
        sample.on_rank_0(lambda: draw_curves(progress.log, out / "loss.png"))
        sample.on_rank_0(lambda: save_checkpoint(out / "last.pt", cfg, done, trainer, progress,
                                                 out / "best.pt" if best else None))
        return 0

    if start > progress.total or (start == progress.total and not due(start)):
        return None

    places = (range(step * batch + k * trainer.micro, step * batch + (k + 1) * trainer.micro)
              for step in range(start, progress.total) for k in trainer.mine)
    feed = Feed(data.loader(data.Stream(dataset, cfg.seed, cfg.xflip), places, cfg.workers, device.type == "cuda"))
    in_a_row, stop = 0, Stop()
    progress.begin(start)

    stopped = score_if_due(start)
    if stopped:
        return stopped
    for step in range(start, progress.total):
        began, images, done = time.time(), step * batch, step + 1
        seen, norms = trainer.step(step, feed, watch=passed(cfg.tick_kimg, done))
        progress.time(time.time() - began, feed.waited)
        stopped, failed = agree(stop, feed.failed, device)
        progress.unreadable.add(failed)
        feed.waited, feed.failed = 0.0, []
        if norms is not None:
            progress.add(seen, norms)
            in_a_row = 0
        else:
            progress.skipped, in_a_row = progress.skipped + 1, in_a_row + 1
        if in_a_row == 10:
            raise ValueError(f"the gradients of 10 steps in a row, up to step {step} ({images / 1000:g} kimg), were "
                             f"not finite; the last good checkpoint is {good or 'yet to be written'}; lower --lr")
        progress.show(done, learning_rate(cfg, images), passed(cfg.tick_kimg, done), trainer, seen)

        name = f"{done * batch // 1000:06}"                                # in kimg
        if passed(cfg.sample_kimg, done):                                  # first: a run killed here does it again
            if vae or cfg.in_channels == 3:
                sample.save_samples(trainer.ema.model, cfg, out / f"samples-{name}.png", vae)
            sample.on_rank_0(lambda: draw_curves(progress.log, out / "loss.png"))
        if passed(cfg.save_kimg, done) or passed(cfg.sample_kimg, done) or stopped or due(done):
            stays = out / f"{name}.pt" if passed(cfg.save_kimg, done) else None
            sample.on_rank_0(lambda: save_checkpoint(out / "last.pt", cfg, done, trainer, progress, stays))
            good = out / "last.pt"
        stopped = stopped or score_if_due(done)
        if stopped and (done < progress.total or due(done)):
            return stopped


# ---------------------------------------------------------------------------------------------
# Speed

def bench(cfg, device, n):
    """Time n training steps on images made up, after a warm-up of 3. Forward and backward count as three forward
    passes, whatever is computed again."""
    trainer, size = Trainer(cfg, device), sample.rank_and_size()[1]
    x = torch.randint(256, (trainer.micro, cfg.in_channels, cfg.input_size, cfg.input_size), dtype=torch.uint8)
    feed = itertools.repeat((x, torch.randint(max(1, cfg.num_classes), (trainer.micro,)), []))

    def run(steps):
        for step in steps:
            trainer.step(step, feed)
        return sample.finished(device)

    began = run(range(3))
    seconds = run(range(3, 3 + n)) - began
    if sample.rank_and_size()[0] == 0:
        say(f"{n} steps of {cfg.batch_size} images, {1000 * seconds / n:.1f} ms each: "
            + sample.speed(n * cfg.batch_size / seconds, 3 * sample.measure(cfg)[1], cfg, device, size))


# ---------------------------------------------------------------------------------------------
# python train.py --study: what the paper's ablations make of shapes

STUDY = {                             # what differs from the preset
    "TMSA (time in q, k, v), positional": {},
    "the same, Fourier": dict(time_embedding="fourier"),
    "time as a token": dict(time_in="token"),
    "time in the bias": dict(time_in="bias"),
    "time in the MLP": dict(time_in="mlp"),
    "no time (label in q, k, v)": dict(time_embedding="none"),
    "adaLN-Zero (DiT)": dict(model="dit")}


def study(out, flags, seeds=3, n=500):
    """Train each variant with each seed, equally long, and print a table: the loss of the last fifth of the run, and
    the share of n samples that a classifier names right; means, and lowest to highest over the seeds. Every run
    resumes, so the same command goes on after a stop."""
    rows, device = [], sample.default_device()
    for name, fields in STUDY.items():
        losses, shares = [], []
        for seed in range(seeds):
            cfg = config_from("shapes", {**flags, **fields, "seed": seed})
            folder = out / f"{cfg.model}-{cfg.time_in}-{cfg.time_embedding}-{cfg.kimg:g}kimg-{seed}"
            open_folder(folder, cfg, overwrite=False)
            stopped = train(cfg, open_data(cfg), folder, device=device)
            if stopped:
                say("\nstopped and saved; the same command goes on from here")
                return stopped
            signal.signal(signal.SIGINT, signal.default_int_handler)       # train's own would wait for a step
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = sample.read_checkpoint(folder / "last.pt")["progress"]["log"]
            tail = [entry["loss"] for entry in log if entry["kimg"] > 0.8 * cfg.kimg and "loss" in entry]
            model, cfg = sample.load_model(folder / "last.pt")
            images, labels = zip(*((sample.pixels(x, cfg), y.cpu()) for x, y in sample.generate(model, cfg, range(n))))
            losses.append(sum(tail) / len(tail))
            shares.append(100 * sample.recognised(np.concatenate(images), torch.cat(labels))[0])
            say(f"{name}, seed {seed}: loss {losses[-1]:.4f}, {shares[-1]:.1f} % recognised")
        spread = lambda values, form: f"{sum(values) / seeds:{form}} ({min(values):{form}} to {max(values):{form}})"
        rows.append(f"| {name} | {spread(losses, '.4f')} | {spread(shares, '.1f')} |")
    print("| | loss | recognised, % |", "|---|---|---|", *rows, sep="\n")


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# python train.py

def open_data(cfg):
    """The data set that cfg names. ValueError if the network cannot take what it holds."""
    if not cfg.data:
        raise ValueError(f"this preset has no data of its own; pass --data: {data.KINDS}")
    dataset = data.open_dataset(cfg.data, cfg.input_size)
    if isinstance(dataset, data.Latents) and dataset.channels != cfg.in_channels:
        raise ValueError(f"{cfg.data} holds latents of {dataset.channels} channels, and this network takes "
                         f"{cfg.in_channels}")
    if not isinstance(dataset, data.Latents) and cfg.in_channels != 3:
        raise ValueError(f"{cfg.data} holds pictures, and this network takes latents; make them with: python data.py "
                         f"latents {cfg.data} latents.safetensors --vae FILE --size {8 * cfg.input_size}")
    if cfg.num_classes and dataset.labels is None:
        raise ValueError(f"{cfg.data} has no labels, and this network has {cfg.num_classes} classes; sort the images "
                         f"into sub-folders, or pass --num-classes 0")
    if cfg.num_classes and dataset.labels.max() >= cfg.num_classes:
        raise ValueError(f"{cfg.data} has a label {dataset.labels.max()}, and this network has the classes 0 to "
                         f"{cfg.num_classes - 1}; pass --num-classes {dataset.labels.max() + 1}")
    return dataset


def open_vae(cfg, dataset):
    """The VAE for sample grids of latents, or None. ValueError if one with another encoder made them."""
    if not cfg.vae:
        return None
    vae, theirs = sample.open_vae(cfg), dataset.header["vae"]
    ours = vae.fingerprint()
    if ours != theirs:
        raise ValueError(f"--vae {cfg.vae} (its encoder: {ours}) is not the one that made {cfg.data} ({theirs}); pass "
                         f"that one, or none and go without sample grids")
    return vae


def open_scorer(cfg, vae, force):
    """What scores the samples while training, or None. ValueError without a VAE for latents, for too few images, and as
    sample.Scorer says it."""
    if not cfg.score_every:
        if force:
            raise ValueError("--force is for --score-every, which is not given")
        return None
    if cfg.in_channels != 3 and not vae:
        raise ValueError("--score-every scores pictures, and this network makes latents; pass --vae FILE")
    sample.check_number(cfg.score_n, force, "images (--score-n)")
    scorer = sample.Scorer(cfg.score_ref, cfg.inception, force, workers=cfg.workers)
    scorer.check_size(cfg.input_size * (vae.factor if vae else 1))
    sample.warn_of_number(cfg.score_n)
    return scorer


def adapted(weights, network, path):
    """Weights of a network with other classes, or for another resolution, as far as they fit this one, and sentences
    that say what was done: a label table of another size begins anew; so does the table of positions; the relative
    position bias is interpolated. ValueError if anything else differs."""
    own, weights, done = network.state_dict(), dict(weights), []

    def differs(name):
        return (own[name].shape if name in own else None) != (weights[name].shape if name in weights else None)

    labels = "y_embedder.embedding_table.weight"
    if differs(labels):
        before, now = (len(table[labels]) - 1 if labels in table else 0 for table in (weights, own))
        done.append(f"{before} classes there and {now} here: the label table begins anew")
        weights.pop(labels, None)
    if "pos_embed" in own and differs("pos_embed"):
        done.append(f"positions are made anew for {own['pos_embed'].shape[1]} tokens")
        weights.pop("pos_embed", None)
    tables = [n for n in own if n.endswith("relative_position_bias_table") and n in weights and differs(n)]
    for name in tables:
        (rows, heads), (before, theirs) = own[name].shape, weights[name].shape
        side, size = math.isqrt(before), math.isqrt(rows)                  # 2 w - 1 offsets each way; 0 stays 0
        if heads == theirs and side ** 2 == before:
            table = weights[name].float().T.reshape(1, heads, side, side)
            table = torch.nn.functional.interpolate(table, (size, size), mode="bilinear", align_corners=True)
            weights[name] = table.view(heads, rows).T.contiguous()
    if tables:
        done.append(f"{len(tables)} tables of relative position bias are interpolated")
    data.check_weights(network, {**{n: own[n] for n in own if n in (labels, "pos_embed")}, **weights}, path)
    return weights, done


def check_machine(cfg, device):
    """ValueError if this machine, or the number of processes, does not suit the configuration."""
    size = sample.rank_and_size()[1]
    if cfg.batch_size % (size * (cfg.micro_batch or 1)):
        raise ValueError(f"--batch-size {cfg.batch_size} cannot be divided over {size} processes"
                         + (f" in micro-batches of {cfg.micro_batch}" if cfg.micro_batch else "")
                         + f"; choose a multiple of {size * (cfg.micro_batch or 1)}")
    if cfg.precision == "tf32" and device.type != "cuda":
        raise ValueError("--precision tf32 is a mode of NVIDIA GPUs, and there is none here; choose bf16 or fp32")


def describe(name, cfg, network, dataset, device):
    """Say what is about to run, and what to expect of this machine."""
    kind, size = sample.arithmetic_of(cfg.precision, device), sample.rank_and_size()[1]
    say(f"{name} ({SOURCES[name][0]}): {cfg.model} of {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M "
        f"parameters, {len(dataset)} images from {cfg.data}, {cfg.kimg:g} kimg, {device.type} in {kind}"
        + (f", {size} processes" if size > 1 else ""))
    if device.type == "cpu" and not sample.fast_bf16(device):
        say("this CPU has no fast bf16 (AMX), so everything runs in fp32: expect a few times the time that a CPU "
            "with AMX takes; the time left is shown below")


def main():
    parser = Parser(prog="train.py", description="Train a network; the same command again resumes.")
    parser.add_argument("--preset", default="shapes", help="python configs.py lists them")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default runs/PRESET)")
    parser.add_argument("--init-from", metavar="CKPT",
                        help="begin with the EMA weights of this checkpoint, or with published ones")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    parser.add_argument("--force", action="store_true", help="score with even fewer than 2048 images")
    parser.add_argument("--study", action="store_true",
                        help="train each of the paper's ablations on shapes, three seeds each, and print a table")
    parser.add_argument("--bench", type=int, nargs="?", const=20, metavar="N", help="only time N steps (default 20)")
    parser.add_config()
    args = vars(parser.parse_args())
    sample.run_command(parser, lambda: run(args), "pass a smaller --micro-batch, or --checkpoint-blocks",
                       "the same command, without --overwrite, goes on from the last checkpoint")


def run(args):
    """The command with these flags -> the number of the signal that stopped it, if one did."""
    name, out, init_from, overwrite, n, studies, force = (
        args.pop(key) for key in ("preset", "out", "init_from", "overwrite", "bench", "study", "force"))
    device = sample.default_device()
    if studies:
        own = {"data", "model", "time_in", "time_embedding", "num_classes", "seed",
               "score_every", "score_ref"} & args.keys()
        if name != "shapes" or own or init_from or overwrite or n is not None or sample.rank_and_size()[1] > 1:
            which = " and ".join(map(configs.flag_of, own)) or "--preset, --init-from, --overwrite, --bench, torchrun"
            raise ValueError(f"--study chooses data, networks, seeds and scores itself; leave out {which}")
        check_machine(config_from(name, args), device)
        return study(Path(out or "runs/study"), args)
    out, weights = Path(out or f"runs/{name}"), None
    first = sample.rank_and_size()[0] == 0                                 # the process that speaks and writes
    overwrite = overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # torchrun's restarts resume
    cfg = config_from(name, args)
    check_machine(cfg, device)
    if n is not None:
        if n < 1:
            raise ValueError(f"--bench {n} must be 1 or more")
        return bench(cfg, device, n)
    dataset = open_data(cfg)
    vae = open_vae(cfg, dataset)
    scorer = open_scorer(cfg, vae, force)
    with torch.device("meta"):
        network = diffit.build(cfg)                                        # do the sizes fit? no memory is taken
    if init_from and (overwrite or not (out / "last.pt").exists()):        # a run under way has weights of its own
        weights, kind = data.weights_in(data.read_file(init_from), init_from)
        weights, done = adapted(weights, network, init_from)
        own = network.state_dict()                                         # copied: --overwrite may remove the file
        weights = {name: value.clone() for name, value in weights.items() if name in own}
        if first:
            say("; ".join([f"beginning with the {kind} weights of {init_from}", *done]))
    sample.on_rank_0(lambda: open_folder(out, cfg, overwrite))             # nothing is written before this line
    if first:
        describe(name, cfg, network, dataset, device)
    stopped = train(cfg, dataset, out, weights, device, vae, scorer)
    if stopped and first:
        say(f"\nstopped by {signal.Signals(stopped).name} and saved; the same command goes on from here"
            + (", without --overwrite" if overwrite else ""))
    elif first:
        say(f"\ncomplete: {out}/last.pt; make images with: python sample.py --ckpt {out}/last.pt")
    return stopped


if __name__ == "__main__":
    main()
