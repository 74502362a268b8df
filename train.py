"""Training: python train.py --preset NAME --data PATH. The step itself is in `train`; what it needs stands above it.

The same command again resumes. Nothing of a run's randomness is saved, because none needs to be: the data follow from
(seed, place), and the noise, timesteps and dropped labels of a step from (seed, step, micro-batch).
"""
import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import data
import diffit
import diffusion
import sample
from configs import SOURCES, Parser, config_from


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
# Checkpoints

def save_checkpoint(path, cfg, step, model, ema, optimizer, progress):
    """All that a run needs to go on, and `sample.py` to sample: tensors and plain values only. Written under another
    name, flushed to disk, then renamed: whatever happens, `path` holds one whole checkpoint, the new or the old."""
    state = {"format": sample.FORMAT, "config": dataclasses.asdict(cfg), "step": step, "model": model.state_dict(),
             "ema": ema.model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress.state()}
    try:
        with data.written_whole(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                               # torch.save's answer to a full disk
        raise OSError(f"{path} could not be written ({data.reason(error)}); what was there before is whole") from None


def load_checkpoint(path, cfg, model, ema, optimizer, progress):
    """Put a run of the same Config back where save_checkpoint left it -> the step to go on with. ValueError if the
    file is not ours, or belongs to a run that differs in more than what MAY_CHANGE."""
    state = sample.read_checkpoint(path)
    refuse_another_run(state["config"], cfg, path)
    sample.load_weights(model, state["model"], path)
    sample.load_weights(ema.model, state["ema"], path)
    optimizer.load_state_dict(state["optimizer"])
    progress.load(state["progress"])
    return state["step"]


# A run may change its length, its machine, how it is watched and how its samples are made; nothing else.
MAY_CHANGE = {"kimg", "micro_batch", "compile", "workers", "tick_kimg", "sample_kimg", "save_kimg", *sample.SAMPLING}


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
        for pattern in ("config.json", "log.jsonl", "loss.png", "samples-*.png", "last.pt", "[0-9]*.pt"):
            for file in out.glob(pattern):
                file.unlink()
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
# What one sees: a line, a log, a curve

class Progress:
    """Means over each tick, shown as one live line on a terminal, elsewhere as a line per tick, and kept in log.jsonl.
    The sums stay on the device, and go into the checkpoint: a resumed run logs what an unbroken one would."""

    def __init__(self, cfg, out, device, dataset):
        self.cfg, self.out, self.device, self.live = cfg, out, device, sys.stderr.isatty()
        self.total = math.ceil(round(cfg.kimg * 1000 / cfg.batch_size, 6)) # steps of the whole run
        self.log, self.sums, self.steps, self.skipped = [], {}, 0, 0
        self.unreadable = data.Unreadable(dataset)

    def state(self):
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"log": self.log, "sums": sums, "steps": self.steps, "skipped": self.skipped,
                "unreadable": self.unreadable.found}

    def load(self, state):
        self.log, self.sums, self.steps, self.skipped, self.unreadable.found = state.values()

    def begin(self, step):
        """Start the clocks at this step; the log is what it was then."""
        write_text(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))
        self.first, self.began, self.shown = step, time.time(), 0
        self.timed, self.busy, self.waited = 0, 0.0, 0.0

    def time(self, seconds, waited):
        """One step took so many seconds, of which it waited for data."""
        self.timed, self.busy, self.waited = self.timed + 1, self.busy + seconds, self.waited + waited

    def add(self, **values):
        """Scalars of one step, to average."""
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def show(self, step, lr, tick):
        """Called after each step; at a tick, write the log."""
        if not tick and not (self.live and time.time() - self.shown > 0.5):
            return
        self.shown = time.time()
        means = {name: float(total) / max(self.steps, 1) for name, total in self.sums.items()}
        busy = max(self.busy, 1e-9)
        entry = {"step": step, "kimg": step * self.cfg.batch_size / 1000, **means, "lr": lr, "skipped": self.skipped,
                 "unreadable": len(self.unreadable.found), "data_wait": round(self.waited / busy, 4),
                 "images_per_s": round(self.timed * self.cfg.batch_size / busy, 1),
                 "memory_gb": round(memory(self.device), 3)}
        left = (self.total - step) * (self.shown - self.began) / max(step - self.first, 1)
        text = (f"kimg {entry['kimg']:.1f}  loss {means.get('loss', math.nan):.4f}  lr {lr:.2e}  "
                f"grad {means.get('grad_norm', math.nan):.3f}  {entry['images_per_s']:.0f} images/s  "
                f"{entry['memory_gb']:.2f} GB  {clock(left)} left")
        print(f"\r{text:<100}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)
        if tick:
            self.log.append(entry)
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            self.sums, self.steps, self.timed, self.busy, self.waited = {}, 0, 0, 0.0, 0.0


def clock(seconds):
    return f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02}:{round(seconds) % 60:02}"


def memory(device):
    """Peak memory of this process in GB: on the GPU, or in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return math.nan
    import resource                                                        # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def draw_loss(log, path):
    """loss.png: the mean loss of each tick over thousands of images, on a logarithmic scale."""
    points = [(entry["kimg"], math.log10(entry["loss"])) for entry in log if entry.get("loss", 0) > 0]
    if not points:
        return
    width, height, left, right, top, bottom = 720, 400, 70, 20, 20, 40
    end, low, high = points[-1][0], min(y for _, y in points) - 0.02, max(y for _, y in points) + 0.02

    def at(x, y):
        return left + x / end * (width - left - right), top + (high - y) / (high - low) * (height - top - bottom)

    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for k in range(5):
        x, y = end * k / 4, low + (high - low) * k / 4
        pen.line([at(x, low), at(x, high)], fill="#e4e4e4")
        pen.line([at(0, y), at(end, y)], fill="#e4e4e4")
        pen.text((at(x, low)[0], height - bottom + 6), f"{x:g}", fill="black", anchor="ma")
        pen.text((left - 6, at(0, y)[1]), f"{10 ** y:.3g}", fill="black", anchor="rm")
    pen.line([at(x, y) for x, y in points], fill="#2255cc", width=2)
    pen.text((width / 2, height - 10), "thousands of images", fill="black", anchor="mm")
    pen.text((width - right - 6, top + 6), "loss", fill="#2255cc", anchor="ra")
    data.save_image(image, path)


# ---------------------------------------------------------------------------------------------
# The loop

class Stop:
    """SIGINT and SIGTERM ask the loop to end after the step at hand; a second one ends it at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def learning_rate(cfg, images):
    """For a step that begins after so many images: a linear ramp from 0, then constant or half a cosine down to 0."""
    ramp = min(1.0, images / (1000 * cfg.lr_rampup_kimg)) if cfg.lr_rampup_kimg else 1.0
    done = min(1.0, images / (1000 * cfg.kimg)) if cfg.lr_decay == "cosine" else 0.0
    return cfg.lr * ramp * (0.5 + 0.5 * math.cos(math.pi * done))


def train(cfg, dataset, out, weights=None, device=None):
    """Train cfg on dataset in the folder out, from the start or from out/last.pt -> None when complete, or the number
    of the signal that stopped it. weights: a state_dict to begin with. ValueError past 1 % unreadable images, or after
    10 steps in a row without finite gradients."""
    device = device or sample.default_device()
    out, micro = Path(out), cfg.micro_batch or cfg.batch_size
    torch.manual_seed(cfg.seed)
    model = diffit.build(cfg)                                              # on the CPU: the same on every machine
    if weights:
        model.load_state_dict(weights)
    model.to(device).train()
    ema = EMA(model, cfg)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, cfg.lr, (0.9, cfg.beta2), 1e-8, cfg.weight_decay, fused=True)
    process, progress, start = diffusion.build(cfg), Progress(cfg, out, device, dataset), 0
    if (out / "last.pt").exists():
        start = load_checkpoint(out / "last.pt", cfg, model, ema, optimizer, progress)
        say(f"resumed from {out}/last.pt at {start * cfg.batch_size / 1000:g} kimg")
    if start >= progress.total:
        return None
    if cfg.compile:
        for block in (m for m in model.modules() if isinstance(m, (diffit.DiffiTBlock, diffit.DiTBlock))):
            block.compile()                                                # equal blocks compile once

    places = (range(step * cfg.batch_size + k, step * cfg.batch_size + k + micro)
              for step in range(start, progress.total) for k in range(0, cfg.batch_size, micro))
    batches = iter(data.loader(data.Stream(dataset, cfg.seed, cfg.xflip), places, cfg.workers, device.type == "cuda"))
    in_a_row, stop = 0, Stop()
    progress.begin(start)

    for step in range(start, progress.total):
        began, images = time.time(), step * cfg.batch_size                 # images seen before this step
        lr, means, waited = learning_rate(cfg, images), {}, 0.0
        for k in range(0, cfg.batch_size, micro):
            asked = time.time()
            x, y, failed = next(batches)
            waited += time.time() - asked
            progress.unreadable.add(failed)
            x = x.to(device, non_blocking=True).float() / 127.5 - 1        # (b, C, H, W) in [-1, 1]
            y = y.to(device, non_blocking=True) if cfg.num_classes else None
            torch.manual_seed(sample.seed_from(cfg.seed, step, k // micro))
            t = process.draw(len(x), device)
            with sample.autocast(cfg.precision, device):
                losses = process.loss(lambda x, t: model(x, t, y), x, t)   # each (b,)
            losses = {name: value.mean() * micro / cfg.batch_size for name, value in losses.items()}
            losses["loss"].backward()
            means = {name: means.get(name, 0) + value.detach() for name, value in losses.items()}

        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        if norm.isfinite():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            ema.update(images)
            progress.add(**means, grad_norm=norm)
            in_a_row = 0
        else:
            progress.skipped, in_a_row = progress.skipped + 1, in_a_row + 1
        optimizer.zero_grad(set_to_none=True)
        progress.time(time.time() - began, waited)
        if in_a_row == 10:
            raise ValueError(f"the gradients of 10 steps in a row, up to step {step} ({images / 1000:g} kimg), were "
                             f"not finite; lower --lr, or go on from the last good checkpoint in {out}")

        done, last = step + 1, step + 1 == progress.total
        passed = lambda kimg: last or done * cfg.batch_size // (1000 * kimg) > images // (1000 * kimg)
        progress.show(done, lr, passed(cfg.tick_kimg))
        name = f"{done * cfg.batch_size // 1000:06}"                       # in kimg
        if passed(cfg.save_kimg) or passed(cfg.sample_kimg) or stop.signal:
            save_checkpoint(out / "last.pt", cfg, done, model, ema, optimizer, progress)
        if passed(cfg.save_kimg):
            link(out / "last.pt", out / f"{name}.pt")
        if stop.signal and not last:
            return stop.signal
        if passed(cfg.sample_kimg):
            sample.save_samples(ema.model, cfg, out / f"samples-{name}.png")
            draw_loss(progress.log, out / "loss.png")


def link(source, dest):
    """A second name for a checkpoint that stays; a copy where the file system has no links."""
    dest.unlink(missing_ok=True)
    try:
        os.link(source, dest)
    except OSError:
        shutil.copyfile(source, dest)


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# python train.py

def open_data(cfg):
    """The data set that cfg names. ValueError if the network cannot take what it holds."""
    if not cfg.data:
        raise ValueError(f"this preset has no data of its own; pass --data: {data.KINDS}")
    if cfg.in_channels != 3:
        raise ValueError(f"--data {cfg.data}: pictures have 3 channels, and this network takes {cfg.in_channels} "
                         f"(latents)")
    dataset = data.open_dataset(cfg.data, cfg.input_size)
    if cfg.num_classes and dataset.labels is None:
        raise ValueError(f"{cfg.data} has no labels, and this network has {cfg.num_classes} classes; sort the images "
                         f"into sub-folders, or pass --num-classes 0")
    if cfg.num_classes and dataset.labels.max() >= cfg.num_classes:
        raise ValueError(f"{cfg.data} has a label {dataset.labels.max()}, and this network has the classes 0 to "
                         f"{cfg.num_classes - 1}; pass --num-classes {dataset.labels.max() + 1}")
    return dataset


def describe(name, cfg, network, dataset, device):
    """Say what is about to run, and what to expect of this machine."""
    size = sum(p.numel() for p in network.parameters())
    bf16 = sample.uses_bf16(cfg.precision, device)
    say(f"{name} ({SOURCES[name][0]}): {cfg.model} of {size / 1e6:.2f}M parameters, {len(dataset)} images from "
        f"{cfg.data}, {cfg.kimg:g} kimg, {device.type} in {'bf16' if bf16 else 'fp32'}")
    if device.type == "cpu" and not bf16:
        say("this CPU has no fast bf16 (AMX), so everything runs in fp32: expect a few times the time that a CPU "
            "with AMX takes; the time left is shown below")


def main():
    parser = Parser(prog="train.py", description="Train a network; the same command again resumes.")
    parser.add_argument("--preset", default="shapes", help="python configs.py lists them")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default runs/PRESET)")
    parser.add_argument("--init-from", metavar="CKPT", help="begin with the EMA weights of this checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    parser.add_config()
    args = vars(parser.parse_args())
    name, out, init_from, overwrite = (args.pop(key) for key in ("preset", "out", "init_from", "overwrite"))
    out, weights, device = Path(out or f"runs/{name}"), None, sample.default_device()
    try:
        cfg = config_from(name, args)
        dataset = open_data(cfg)
        with torch.device("meta"):
            network = diffit.build(cfg)                                    # do the sizes fit? no memory is taken
        if init_from and (overwrite or not (out / "last.pt").exists()):    # a run under way has weights of its own
            weights = sample.read_checkpoint(init_from)["ema"]
            sample.check_weights(network, weights, init_from)
            weights = {key: value.clone() for key, value in weights.items()}  # --overwrite may remove the file
        open_folder(out, cfg, overwrite)                                   # nothing is written before this line
        describe(name, cfg, network, dataset, device)
        stopped = train(cfg, dataset, out, weights, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error(f"out of GPU memory; pass a --micro-batch below {cfg.micro_batch or cfg.batch_size}")
    if stopped:
        say(f"\nstopped by {signal.Signals(stopped).name} and saved; the same command goes on from here"
            + (", without --overwrite" if overwrite else ""))
        sys.exit(128 + stopped)
    say(f"\ncomplete: {out}/last.pt; make images with: python sample.py --ckpt {out}/last.pt")


if __name__ == "__main__":
    main()
