"""Generation from a checkpoint, `python sample.py --ckpt FILE`, and scores of what was generated.

Image i follows from (seed, i) alone: its noise, first and last, comes from a generator of its own, and so does not
change with the batch size, the number of images or the order in which they are made.
"""
import dataclasses
import datetime
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import diffit
import diffusion
from configs import Config, Parser, config_from, measure


# ---------------------------------------------------------------------------------------------
# The machine: one process, or those that torchrun started

PATIENCE = datetime.timedelta(minutes=10)  # how long a process waits for another before it gives up


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
            error = type(caught)(str(caught))
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


def arithmetic(precision, device):
    """What --precision means on this device: bf16, fp16, tf32 or fp32."""
    if precision == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    return precision


def autocast(precision, device):
    """The context in which networks run. Parameters, sums and losses stay fp32."""
    kind = arithmetic(precision, device)
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
            f"{peak / 1e12:.3g} TFLOP/s of a matrix product of {side} in {arithmetic(cfg.precision, device)}"
            f"{f' on {size} processes' if size > 1 else ''}, {peak_memory:.2f} GB")


def seed_from(*numbers):
    """A 64-bit seed that depends on all the numbers given; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------------------------------------
# Checkpoints

FORMAT = "diffit checkpoint 1"


def read_checkpoint(path):
    """What train.save_checkpoint wrote: a dict of tensors and plain values, memory-mapped. ValueError if the file is
    missing, truncated or something else."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}; train.py writes last.pt into its output folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:                                             # torch.load fails in a dozen ways
        raise ValueError(f"{path} is truncated or no checkpoint ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of train.py (expected the format {FORMAT!r})")
    return state


def check_weights(model, state, path):
    """ValueError that lists what of a state_dict does not fit the network."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    wrong = {"missing": [n for n in own if n not in state],
             "unexpected": [n for n in state if n not in own and not n.endswith("relative_position_index")],
             "of another shape": [f"{n} {tuple(state[n].shape)}, expected {tuple(own[n])}"
                                  for n in own if n in state and state[n].shape != own[n]]}
    said = [f"{len(names)} {what} ({'; '.join(names[:10])}{'; ...' if len(names) > 10 else ''})"
            for what, names in wrong.items() if names]
    if said:
        raise ValueError(f"the weights in {path} do not fit this network: " + ", ".join(said))


def load_weights(model, state, path):
    """state_dict -> model, strictly. ValueError that lists what does not fit."""
    check_weights(model, state, path)
    model.load_state_dict(state)


def load_model(path, raw=False, device=None):
    """-> model in eval mode, its Config. EMA weights, or with raw those that the optimizer holds."""
    state = read_checkpoint(path)
    try:
        cfg = Config(**state["config"])
    except TypeError as error:
        raise ValueError(f"the configuration in {path} is of another version of this code ({error})") from None
    model = diffit.build(cfg)
    load_weights(model, state["model" if raw else "ema"], path)
    return model.to(device or default_device()).eval().requires_grad_(False), cfg


# ---------------------------------------------------------------------------------------------
# Generation

def class_of(i, cfg, classes=None, seed=0):
    """The label of image i: the classes in turn; without a list, all of them in a shuffled order."""
    if not classes:
        classes = np.random.default_rng(seed).permutation(cfg.num_classes)
    return int(classes[i % len(classes)])


@torch.no_grad()
def generate(model, cfg, indices, classes=None, seed=0, batch=64):
    """Make the images with these indices, as cfg's sampling fields say: yields x (b, C, H, W) fp32 and labels y (b,),
    or None without classes."""
    device, shape = next(model.parameters()).device, (cfg.in_channels, cfg.input_size, cfg.input_size)
    process = diffusion.build(cfg)
    levels = process.levels(cfg.steps)
    scale = diffusion.power_cosine(cfg.cfg, cfg.diffusion_steps) if cfg.cfg_schedule == "power-cosine" else cfg.cfg
    if cfg.cfg_interval and cfg.cfg != 1:
        scale = diffusion.interval(scale, *cfg.cfg_interval, process)
    for first in range(0, len(indices), batch):
        chunk = indices[first:first + batch]
        generators = [torch.Generator().manual_seed(seed_from(seed, i)) for i in chunk]

        def noise():
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        y = None
        if cfg.num_classes:
            y = torch.tensor([class_of(i, cfg, classes, seed) for i in chunk], device=device)
        f = diffusion.guided(model, y, scale, cfg.cfg_channels or None)
        options = {"ddpm": dict(noise=noise), "ddim": dict(noise=noise, eta=cfg.eta)}.get(cfg.sampler, {})
        sampler = getattr(diffusion, cfg.sampler)
        with autocast(cfg.precision, device):
            x = sampler(process, f, process.prior(noise(), levels[0]), levels, clip=cfg.clip, **options)
        yield x, y


def grid_columns(cfg, classes=None):
    """A column for each class where they are few; else None, a square."""
    count = len(classes) if classes else cfg.num_classes
    return count if 1 < count <= 16 else None


def save_samples(model, cfg, path):
    """The grid that training shows: always the same noise and classes. Four rows of classes, or 36 images, divided
    over the processes; rank 0 writes it."""
    n, (rank, size) = 4 * (grid_columns(cfg) or 9), rank_and_size()
    mine = [data.to_uint8(x) for x, _ in generate(model, cfg, range(rank, n, size))]
    parts = objects_from_all(np.concatenate(mine) if mine else None)
    images = np.stack([parts[i % size][i // size] for i in range(n)])
    on_rank_0(lambda: data.save_grid(images, path, grid_columns(cfg)))


# ---------------------------------------------------------------------------------------------
# Scores

def recognised(images, labels, seed=0):
    """How many of these shapes a classifier names right. images (n, H, W, 3) uint8, labels (n,) -> the share of them,
    and the classifier's share on real shapes that it has not seen. The classifier is a small CNN trained here, on
    8,000 shapes of a seed that training does not use."""
    torch.manual_seed(seed)
    size, real = images.shape[1], 8000
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

    return right(data.to_float(images), torch.as_tensor(labels)), right(x[real:], y[real:])


# ---------------------------------------------------------------------------------------------
# python sample.py

GRID = 400                            # images that a grid shows at the most
# The fields of Config that a sampler goes by, and that may differ from those of training.
SAMPLING = ["sampler", "steps", "eta", "clip", "sigma_min", "sigma_max", "rho",
            "cfg", "cfg_schedule", "cfg_channels", "cfg_interval", "precision"]


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


def check_outputs(args):
    """Before the work: every place that is to be written can be, and holds nothing yet. Fills in args.out."""
    if not (args.out or args.dir or args.npz or args.score):
        names = (f"samples{k}.png" for k in [""] + [f"-{k}" for k in range(2, 10_000)])
        args.out = next(name for name in names if not os.path.exists(name))
    for flag, path, endings in [("--out", args.out, (".png", ".jpg", ".webp")), ("--npz", args.npz, (".npz",))]:
        if path and not path.lower().endswith(endings):
            raise ValueError(f"{flag} {path} must end in {' or '.join(endings)}")
        if path and os.path.exists(path):
            raise ValueError(f"{flag} {path} exists; remove it or choose another name")
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"{flag} {path}: the folder {Path(path).parent} does not exist; make it first")
    if args.dir and os.path.exists(args.dir) and (not os.path.isdir(args.dir) or os.listdir(args.dir)):
        raise ValueError(f"--dir {args.dir} exists and is not an empty folder; choose another name")
    if args.dir and not Path(args.dir).parent.is_dir():
        raise ValueError(f"--dir {args.dir}: the folder {Path(args.dir).parent} does not exist; make it first")


def main():
    parser = Parser(prog="sample.py", description="Make images from a checkpoint of train.py, and score them.")
    parser.add_argument("--ckpt", metavar="FILE", help="a checkpoint; it knows its network and sampler")
    parser.add_argument("--bench", type=int, nargs="?", const=3, metavar="N",
                        help="only time N batches (default 3), with --ckpt or with the untrained network of --preset")
    parser.add_argument("--preset", default="shapes", help="for --bench without --ckpt")
    parser.add_argument("--n", type=int, default=64, help="how many images")
    parser.add_argument("--classes", metavar="207,360|all", help="classes, in turn (default: all, shuffled)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--raw", action="store_true", help="the optimizer's weights instead of their moving average")
    parser.add_argument("--out", metavar="PNG", help="a grid of the first 400 (default samples.png)")
    parser.add_argument("--dir", metavar="DIR", help="a folder for one PNG each")
    parser.add_argument("--npz", metavar="FILE", help="as ADM's evaluator reads it: arr_0 uint8 NHWC, arr_1 labels")
    parser.add_argument("--score", choices=["shapes"], help="let a classifier, trained on the spot, name them")
    parser.add_config(SAMPLING)
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error(f"out of GPU memory; pass a --batch below {args.batch}")
    except KeyboardInterrupt:
        parser.exit(130, "\nsample.py: stopped\n")


def bench(args, given):
    """Time the sampling of args.bench batches, after a warm-up of one."""
    if args.ckpt:
        model, cfg = load_model(args.ckpt, args.raw)
    else:
        cfg = config_from(args.preset, {})
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


def run(args):
    given = {name: value for name, value in vars(args).items() if name in SAMPLING}
    for flag in ("n", "batch", "bench"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: give a number from 1")
    if args.bench is not None:
        return bench(args, given)
    if not args.ckpt:
        raise ValueError("pass --ckpt FILE, the checkpoint to sample from; train.py writes last.pt into its folder")
    check_outputs(args)
    model, cfg = load_model(args.ckpt, args.raw)
    cfg = dataclasses.replace(cfg, **given)
    if cfg.in_channels != 3:
        raise ValueError(f"{args.ckpt} makes latents of {cfg.in_channels} channels, which are no pictures")
    if args.score and cfg.num_classes != 10:
        raise ValueError(f"--score shapes needs a network with the ten classes of shapes; {args.ckpt} has "
                         f"{cfg.num_classes}")
    classes = parse_classes(args.classes, cfg) if args.classes else None

    if args.dir:
        Path(args.dir).mkdir(exist_ok=True)
    images, labels, done, start = [], [], 0, time.time()
    for x, y in generate(model, cfg, range(args.n), classes, args.seed, args.batch):
        images.append(data.to_uint8(x))
        labels += [] if y is None else y.tolist()
        if args.dir:
            for i, image in enumerate(images[-1], start=done):
                data.save_image(Image.fromarray(image), f"{args.dir}/{i:06d}.png")
        done += len(x)
        data.live_line(f"{done} of {args.n} images, {done / (time.time() - start):.1f} images/s")
    data.live_line("\n")
    images = np.concatenate(images)

    if args.npz:
        with data.written_whole(args.npz) as temporary, open(temporary, "wb") as file:
            np.savez(file, images, **({"arr_1": np.array(labels)} if labels else {}))
    if args.out:
        data.save_grid(images[:GRID], args.out, grid_columns(cfg, classes))
    for path in filter(None, (args.out, args.dir, args.npz)):
        print(f"wrote {path}")
    if args.score:
        share, real = recognised(images, labels)
        print(f"{100 * share:.1f} % of {args.n} samples named right by a classifier that names {100 * real:.1f} % of "
              f"real shapes right; {'raw' if args.raw else 'EMA'} weights of {args.ckpt}, {cfg.sampler}, "
              f"{cfg.steps} steps, guidance {cfg.cfg:g}, seed {args.seed}")


if __name__ == "__main__":
    main()
