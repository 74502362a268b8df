"""Config, every preset, and the command line they make: each field below is a flag of train.py.

`python configs.py` prints the presets with parameters and GFLOPs counted from the networks themselves.
"""
import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass


def flag_of(name):
    return "--" + name.replace("_", "-")


def nearest(word, known):
    """'; did you mean X?' for the known word that resembles this one most, or ''."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def one_of(default, *choices):
    return dataclasses.field(default=default, metadata={"choices": choices})


def only(where, default, *choices):
    """A field that has a meaning only for these networks or this process; elsewhere setting it is an error."""
    return dataclasses.field(default=default, metadata={"only": where.split(), "choices": choices})


@dataclass(frozen=True)
class Config:
    # Data
    data: str = ""                    # what --data takes; "" where it must be passed
    vae: str = ""                     # file of the autoencoder that makes latents into pictures
    xflip: bool = False               # mirror half of the images
    augment: float = 0.0              # probability of each of EDM's augmentations (pixels only)
    # Network
    model: str = one_of("diffit", "diffit", "dit", "unet", "ddpmpp")
    input_size: int = 32              # height and width of x: pixels, or latents of 1/8 of the pixels
    in_channels: int = 3              # 3 for pixels, 4 for latents
    num_classes: int = 0              # 0: unconditional
    class_dropout_prob: float = 0.1   # share of labels replaced by "no class", for guidance
    learn_sigma: bool = False         # a second set of output channels for the variance (ddpm)
    time_in: str = only("diffit unet ddpmpp", "qkv", "qkv", "token", "bias", "mlp", "none")  # diffit.py explains them
    time_embedding: str = one_of("positional", "positional", "fourier", "none")
    num_heads: int = 4
    mlp_ratio: float = 4.0            # hidden width of the MLPs / width
    patch_size: int = only("diffit dit", 0)         # pixels or latents on a side of a token
    hidden_size: int = only("diffit dit", 0)        # width D
    depth: int = only("diffit dit", 0)              # blocks
    embed_gain: float = only("diffit dit", 1.0)     # of the tokens at the start of training: patches and positions
    channels: tuple = only("unet ddpmpp", ())       # width at each resolution, finest first
    blocks: tuple = only("unet ddpmpp", ())         # ResBlocks at each resolution
    cond_size: int = only("unet ddpmpp", 512)       # width of the time token
    dropout: float = only("unet ddpmpp", 0.0)
    window: int = only("unet", 8)                   # side of an attention window, tokens
    encoder: str = only("unet", "diffit", "diffit", "plain", "vit")    # the halves of DiffiT Table 4
    decoder: str = only("unet", "diffit", "diffit", "plain", "setr")
    # Process
    process: str = one_of("ddpm", "ddpm", "edm", "vp", "ve")
    diffusion_steps: int = only("ddpm", 1000)       # T
    timesteps: str = only("ddpm", "uniform", "uniform", "loss-aware")  # how training draws them
    schedule: str = only("ddpm", "linear", "linear", "cosine")
    fixed_variance: str = only("ddpm", "small", "small", "large")  # used without learn_sigma
    sigma_data: float = only("edm", 0.5)            # standard deviation of the data
    p_mean: float = only("edm", -1.2)               # training noise: ln sigma ~ N(p_mean, p_std^2)
    p_std: float = only("edm", 1.2)
    sigma_min: float = only("edm vp ve", 0.002)     # range and spacing of the sampler's sigmas
    sigma_max: float = only("edm vp ve", 80.0)
    rho: float = only("edm vp ve", 7.0)
    # Sampling
    sampler: str = one_of("ddpm", "ddpm", "ddim", "dpmpp", "heun")
    steps: int = 250                  # noise levels visited
    clip: bool = False                # keep x_0 in [-1, 1] on the way (pixels only)
    cfg: float = 1.0                  # guidance scale; 1: none
    cfg_schedule: str = one_of("constant", "constant", "power-cosine")  # power-cosine: over timesteps (ddpm)
    cfg_channels: int = 0             # guide only the first channels; 0: all
    cfg_exact: bool = False           # run the unguided half even where the scale is within 0.01 of 1
    cfg_interval: tuple = ()          # guide only at noise levels sigma from LOW to HIGH; (): at all
    eta: float = 0.0                  # ddim's noise: 0 none, 1 as much as ddpm
    churn: float = only("edm vp ve", 0.0)           # noise that heun adds on the way (EDM's S_churn)
    churn_interval: tuple = only("edm vp ve", ())   # at sigmas from LOW to HIGH (S_tmin, S_tmax); (): at all
    churn_noise: float = only("edm vp ve", 1.0)     # and how much (S_noise)
    # Training
    kimg: float = 1000.0              # length, thousands of images
    batch_size: int = 256             # images a step, over all processes
    micro_batch: int = 0              # images a forward pass; 0: all of a process's share of the batch
    lr: float = 1e-4
    lr_rampup_kimg: float = 0.0       # linear ramp from 0
    lr_decay: str = one_of("constant", "constant", "cosine")  # cosine: to 0 at the end
    beta2: float = 0.999              # Adam's second beta; the first is 0.9, eps 1e-8
    weight_decay: float = 0.0         # AdamW's, decoupled
    grad_clip: float = 0.0            # largest gradient norm; 0: no limit
    nonfinite: str = one_of("skip", "skip", "zero")  # gradients that are no numbers: leave the step out, or set them to 0
    ema_decay: float = 0.0            # per step; 0: by half-life instead
    ema_halflife_kimg: float = 500.0
    ema_rampup: float = 0.05          # half-life at most this share of the images seen; 0: no ramp
    seed: int = 0
    # Machine
    precision: str = one_of("auto", "auto", "bf16", "fp16", "tf32", "fp32")  # auto: bf16 where the hardware is fast at it
    compile: bool = False             # torch.compile each block
    checkpoint_blocks: bool = False   # keep only what enters each block, and compute the rest again in backward
    workers: int = 2                  # processes that read data
    # Output
    tick_kimg: float = 10.0           # between log lines
    sample_kimg: float = 1000.0       # between sample grids
    save_kimg: float = 1000.0         # between checkpoints that stay; last.pt is written at these and at the grids
    keep: int = 0                     # how many of them stay, the newest; 0: all
    score_every: float = 0.0          # kimg between scores of EMA samples, FID and others; 0: none
    score_n: int = 10_000             # samples that a score compares
    score_ref: str = ""               # with this reference, made by sample.py --reference, or ADM's
    inception: str = ""               # file of Inception's weights; "": looked for by its published name

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), flag_of(field.name)
            choices, where = field.metadata.get("choices"), field.metadata.get("only")
            if choices and value not in choices:
                raise ValueError(f"{flag} {value} is unknown; it takes {', '.join(choices)}" + nearest(str(value), choices))
            if where and self.model not in where and self.process not in where and value != field.default:
                raise ValueError(f"{flag} has no meaning here: it belongs to {' and '.join(where)}, and this is {self.model} with {self.process}")
            if isinstance(value, (int, float)) and not (math.isfinite(value) and (value >= 0 or field.name == "p_mean")):
                raise ValueError(f"{flag} {value} is out of range; it must be 0 or more")
        sizes = (["patch_size", "hidden_size", "depth"] if self.model in ("diffit", "dit")
                 else ["channels", "blocks", "cond_size"] + ["window"] * (self.model == "unet"))
        for name in sizes + ["input_size", "in_channels", "num_heads", "mlp_ratio", "steps", "kimg", "batch_size", "lr", "tick_kimg",
                             "sample_kimg", "save_kimg", "diffusion_steps", "sigma_data", "sigma_min", "sigma_max", "rho", "p_std"]:
            if not getattr(self, name) or (isinstance(getattr(self, name), tuple) and min(getattr(self, name)) < 1):
                raise ValueError(f"{flag_of(name)} {getattr(self, name)} must be above 0 for {self.model} with {self.process}")
        if not all(isinstance(n, int) for n in self.channels + self.blocks):
            raise ValueError(f"--channels {self.channels} and --blocks {self.blocks} must be whole numbers")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"--sigma-min {self.sigma_min} must be below --sigma-max {self.sigma_max}")
        if self.diffusion_steps < 2:
            raise ValueError(f"--diffusion-steps {self.diffusion_steps} must be 2 or more")
        if self.eta > 1 or (self.eta and self.sampler != "ddim"):
            raise ValueError(f"--eta {self.eta} is a number from 0 to 1 for --sampler ddim, and this is {self.sampler}")
        if min(self.sample_kimg, self.save_kimg) < 1:
            raise ValueError(f"--sample-kimg {self.sample_kimg} and --save-kimg {self.save_kimg} must be 1 or more: files "
                             f"are named by whole thousands of images")
        if bool(self.score_every) != bool(self.score_ref):
            raise ValueError(f"--score-every {self.score_every:g} needs --score-ref FILE, a reference" if self.score_every else
                             f"--score-ref {self.score_ref} needs --score-every KIMG")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"--micro-batch {self.micro_batch} does not divide --batch-size {self.batch_size}")
        for name in ("class_dropout_prob", "dropout", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{flag_of(name)} {getattr(self, name)} must be below 1")
        if self.cfg != 1 and not self.num_classes:
            raise ValueError(f"--cfg {self.cfg:g} is guidance by classes, and this network has none; pass --cfg 1")
        if self.cfg != 1 and not self.class_dropout_prob:
            raise ValueError(f"--cfg {self.cfg:g} needs a network trained with --class-dropout-prob above 0; pass --cfg 1")
        if self.vae and self.in_channels == 3:
            raise ValueError(f"--vae {self.vae} has no meaning here: this network makes pixels, not latents")
        if self.clip and self.in_channels != 3:
            raise ValueError("--clip is for pixels, which end at -1 and 1; this network makes latents, which do not")
        if self.augment > 1 or (self.augment and self.in_channels != 3):
            raise ValueError(f"--augment {self.augment} is a probability, from 0 to 1, for pixels (--in-channels 3)")
        if self.churn and self.sampler != "heun":
            raise ValueError(f"--churn {self.churn} is for --sampler heun, and this is {self.sampler}")
        if self.model == "ddpmpp" and self.time_in not in ("qkv", "none"):
            raise ValueError(f"--time-in {self.time_in}: DDPM++ has its own attention (none) or TMSA (qkv)")
        if self.model != "ddpmpp" and self.time_in == "none":
            raise ValueError("--time-in none leaves these blocks without the label, too; for a network that is not told the time "
                             "pass --time-embedding none")
        if self.model == "unet" and self.time_in != "qkv" and "diffit" not in (self.encoder, self.decoder):
            raise ValueError(f"--time-in {self.time_in} has no meaning where neither --encoder nor --decoder is diffit")
        if self.encoder == "vit" and self.decoder != "setr":
            raise ValueError("--encoder vit gives features of one resolution, which only --decoder setr takes")
        if self.learn_sigma and self.process != "ddpm":
            raise ValueError("--learn-sigma needs --process ddpm: there is no other variance to learn")
        if self.cfg_schedule == "power-cosine" and self.process != "ddpm":
            raise ValueError("--cfg-schedule power-cosine needs --process ddpm: it is a function of the timestep")
        for name in ("cfg_interval", "churn_interval"):
            interval = getattr(self, name)
            if interval and not (len(interval) == 2 and interval[0] < interval[1]):
                raise ValueError(f"{flag_of(name)} {interval} must be two numbers, LOW,HIGH, the smaller one first")
        if self.process == "ddpm" and self.steps > self.diffusion_steps:
            raise ValueError(f"--steps {self.steps} is more than the process has: choose from 1 to {self.diffusion_steps}")


# ---------------------------------------------------------------------------------------------
# Presets: every configuration of the DiffiT paper, DiT's, and ours. Where the sources disagree or say nothing, the note
# says what was chosen.

PRESETS, SOURCES = {}, {}             # name -> Config, name -> (source, reported FID or None)
PAPER = {}                            # name -> (parameters in millions, GFLOPs) as the paper gives them


def preset(name, source, fid, **fields):
    PRESETS[name], SOURCES[name] = Config(**fields), (source, fid)


# Built in, for two CPU cores. Trained above the noise of EDM, where shapes are decided; with a gain of 1 it learns little at first.
preset("shapes", "this project", None, data="shapes", model="diffit", num_classes=10, patch_size=4, hidden_size=128, depth=4,
       num_heads=4, embed_gain=4, process="edm", p_mean=-0.2, p_std=1.0, sigma_min=0.05, sigma_max=10, sampler="dpmpp", steps=18,
       clip=True, cfg=4, kimg=130, batch_size=32, lr=4e-3, lr_rampup_kimg=1, lr_decay="cosine", beta2=0.95, grad_clip=1.0,
       ema_halflife_kimg=3, ema_rampup=0.1, workers=1, tick_kimg=2, sample_kimg=26, save_kimg=130)

# DiffiT, image space: Tables S.2, S.3. Blocks per resolution: S.2 and H.1 say 4; I.1 says 1,2,2,2 and 2. Heads: not said.
# "Strictly follows EDM" (H.1): its process, augmentation, ramp, EMA and dropout; iterations, batch and rate are DiffiT's.
EDM_UNET = dict(model="unet", process="edm", sampler="heun", lr_rampup_kimg=10_000, ema_halflife_kimg=500, nonfinite="zero", workers=4,
                tick_kimg=50, sample_kimg=1000, save_kimg=5000)
cifar10 = dict(EDM_UNET, input_size=32, channels=(128, 256, 256), blocks=(2, 2, 2), window=4, dropout=0.13, augment=0.12, steps=18,
               batch_size=512, lr=1e-3, kimg=102_400)
ffhq64 = dict(EDM_UNET, input_size=64, channels=(128, 256, 256, 256), blocks=(4, 4, 4, 4), window=8, dropout=0.05, augment=0.15,
              xflip=True, steps=40, batch_size=256, lr=2e-4, kimg=51_200)
preset("cifar10",       "DiffiT Table 1", 1.95, **cifar10)
preset("ffhq64",        "DiffiT Table 1", 2.22, **ffhq64)
preset("cifar10-l4",    "DiffiT Table S.2, the other reading of L", None, **{**cifar10, "blocks": (4, 4, 4)})
preset("ffhq64-l1222",  "DiffiT Table S.2, the other reading of L", None, **{**ffhq64, "blocks": (1, 2, 2, 2)})

# Width of the time token / of the features; 512/256 is Table 1's. Features of 512: twice the width at every resolution.
preset("cifar10-512-512", "DiffiT Table 3", 1.99, **{**cifar10, "channels": (256, 512, 512)})
preset("cifar10-256-256", "DiffiT Table 3", 2.13, **{**cifar10, "cond_size": 256})
preset("ffhq64-512-512",  "DiffiT Table 3", 2.27, **{**ffhq64, "channels": (256, 512, 512, 512)})
preset("ffhq64-256-256",  "DiffiT Table 3", 2.41, **{**ffhq64, "cond_size": 256})

# A to D; E is cifar10. ViT-12: its width and patch are not said, 512 and 2 here. Blocks without time keep their windows.
preset("cifar10-a-vit-setr",     "DiffiT Table 4", 5.34, **{**cifar10, "encoder": "vit", "decoder": "setr", "blocks": (4, 4, 4),
                                                            "channels": (128, 512, 512), "num_heads": 8, "dropout": 0.0})
preset("cifar10-b-plain-setr",   "DiffiT Table 4", 4.64, **cifar10, encoder="plain", decoder="setr")
preset("cifar10-c-plain-plain",  "DiffiT Table 4", 3.71, **cifar10, encoder="plain", decoder="plain")
preset("cifar10-d-diffit-plain", "DiffiT Table 4", 2.27, **cifar10, decoder="plain")

# Song et al. 2021's recipe for DDPM++; sampled as EDM does (what the paper did is not said).
DDPMPP = dict(model="ddpmpp", num_heads=1, channels=(256, 256, 256), blocks=(4, 4, 4), dropout=0.1, xflip=True, sampler="heun", steps=18,
              batch_size=128, lr=2e-4, lr_rampup_kimg=640, grad_clip=1.0, kimg=166_400, workers=4, tick_kimg=50, sample_kimg=1000,
              save_kimg=5000)
VE = dict(process="ve", sigma_min=0.02, sigma_max=100.0, ema_decay=0.999)
VP = dict(process="vp", ema_decay=0.9999)
preset("ddpmpp-ve",      "DiffiT Table 5", 3.77, **DDPMPP, **VE, time_in="none")
preset("ddpmpp-ve-tmsa", "DiffiT Table 5", 3.49, **DDPMPP, **VE)
preset("ddpmpp-vp",      "DiffiT Table 5", 3.01, **DDPMPP, **VP, time_in="none")
preset("ddpmpp-vp-tmsa", "DiffiT Table 5", 2.76, **DDPMPP, **VP)

# F and G; H, time in q, k and v, is cifar10.
preset("cifar10-f-time-bias", "DiffiT Table 6", 3.97, **cifar10, time_in="bias")
preset("cifar10-g-time-mlp",  "DiffiT Table 6", 3.81, **cifar10, time_in="mlp")
preset("cifar10-time-token",  "DiffiT Table 7", 2.28, **cifar10, time_in="token")
preset("ffhq64-time-token",   "DiffiT Table 7", 2.59, **ffhq64, time_in="token")
preset("cifar10-fourier",     "DiffiT Table 8", 2.02, **cifar10, time_embedding="fourier")
preset("ffhq64-fourier",      "DiffiT Table 8", 2.37, **ffhq64, time_embedding="fourier")
preset("cifar10-window2",     "DiffiT Fig. 8", None, **{**cifar10, "window": 2})  # 4 is cifar10
preset("cifar10-window8",     "DiffiT Fig. 8", None, **{**cifar10, "window": 8})
preset("ffhq64-window2",      "DiffiT Fig. 8", None, **{**ffhq64, "window": 2})   # 8 is ffhq64
preset("ffhq64-window4",      "DiffiT Fig. 8", None, **{**ffhq64, "window": 4})

# DiffiT, latent: Sec. 4.2. The text says 30 layers, the published weights and Table 9's 561M say 28. Length: Fig. 7b's 1000k steps.
# Guidance at 256: 4.4 in the release, 4.6 in the text.
LATENT = dict(in_channels=4, num_classes=1000, learn_sigma=True, patch_size=2, hidden_size=1152, num_heads=16, ema_decay=0.9999,
              cfg_channels=3, workers=4, tick_kimg=50, sample_kimg=2000, save_kimg=10_000)
imagenet256 = dict(LATENT, model="diffit", input_size=32, batch_size=256, lr=3e-4, kimg=256_000, cfg=4.4, cfg_schedule="power-cosine")
preset("imagenet256",         "DiffiT Tables 2, 9", 1.73, **imagenet256, depth=28)
preset("imagenet512",         "DiffiT Table 2",     2.67, **LATENT, model="diffit", depth=28, input_size=64, batch_size=512, lr=1e-4,
       kimg=512_000, cfg=1.49)
preset("imagenet256-depth30", "DiffiT appendix H.2", None, **{**imagenet256, "cfg": 4.6}, depth=30)
PAPER["imagenet256"] = PAPER["imagenet256-depth30"] = 561, 114
PAPER["dit-xl-2"] = 675, 119

# DiT: sizes from Table 1, training from Sec. 4: 400k steps of 256; XL/2 7M at 256 pixels, 3M at 512.
DIT = dict(LATENT, xflip=True, lr=1e-4, cfg=1.5)
for size, depth, width, heads in [("s", 12, 384, 6), ("b", 12, 768, 12), ("l", 24, 1024, 16), ("xl", 28, 1152, 16)]:
    for patch in (2, 4, 8):
        best = (size, patch) == ("xl", 2)
        preset(f"dit-{size}-{patch}", "DiT Table 1", 2.27 if best else None,
               **{**DIT, "depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch}, model="dit",
               kimg=1_792_000 if best else 102_400)
preset("dit-xl-2-512", "DiT Table 3", 3.04, **DIT, model="dit", depth=28, input_size=64, kimg=768_000)

# DiT-XL/2 with its own modulation, or with TMSA in its place: DiffiT's blocks and head, DiT's training.
preset("dit-xl-2-1000k",      "DiffiT Fig. 7b", None, **DIT, model="dit", depth=28, kimg=256_000)
preset("dit-xl-2-1000k-tmsa", "DiffiT Fig. 7b", None, **DIT, model="diffit", depth=28, kimg=256_000)

# CIFAR-100 in pixels: DiTs of about equal size, traded between width and depth; sampled in 250 steps.
for width, depth, heads in [(450, 6, 9), (384, 12, 6), (440, 6, 8), (420, 6, 6), (512, 4, 8)]:
    preset(f"cifar100-{width}x{depth}", "this project", None, model="dit", num_classes=100, learn_sigma=True, patch_size=2,
           hidden_size=width, depth=depth, num_heads=heads, clip=True, ema_decay=0.9999, xflip=True, lr=1e-4, kimg=102_400, workers=4,
           tick_kimg=50, sample_kimg=1000, save_kimg=5000)


# ---------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every error is one sentence and exit code 2, with the nearest name for an unknown flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_args(self, args=None):
        args, unknown = self.parse_known_args(args)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {flag}" + (nearest(flag, self._option_string_actions) or f"; --help lists them"))
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def add_config(self, names=None):
        """A flag for each field of Config, or for those named; what is not given leaves no trace in the result."""
        group = self.add_argument_group("the configuration (configs.py explains each field; presets and checkpoints set them)")
        for field in dataclasses.fields(Config):
            if names is None or field.name in names:
                kind = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": numbers, "metavar": "A,B,..."}}
                how = kind.get(field.type, {"type": field.type, "metavar": field.type.__name__.upper()})
                group.add_argument(flag_of(field.name), default=argparse.SUPPRESS, **how)


def numbers(text):
    """'4,4,2' -> (4, 4, 2); whole numbers stay whole."""
    return tuple(int(part) if part.strip().lstrip("-").isdigit() else float(part) for part in text.split(",") if part)


def config_from(name, given):
    """The preset with the flags that were given (a dict). What the preset set for another network or process, and the
    flags now replaced, falls back to its default. ValueError for an unknown preset or values that do not fit."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)} (python configs.py lists them)")
    values = {**dataclasses.asdict(PRESETS[name]), **given}
    for field in dataclasses.fields(Config):
        where = field.metadata.get("only")
        if where and field.name not in given and values["model"] not in where and values["process"] not in where:
            values[field.name] = field.default
    return Config(**values)


# ---------------------------------------------------------------------------------------------
# python configs.py

NOTE = """Where counts and paper differ: 561M belongs to 28 layers, which the published weights have; the 30 of the text have 600.9M.
DiffiT's 114 GFLOPs are the 118.5 counted here without the two products inside attention (28 x 2 x 256^2 x 1152 = 4.2);
DiT's 119 has them."""


def main():
    from sample import measure        # for this table alone: as a module, configs needs no other file
    Parser(prog="configs.py", description="Print every preset.").parse_args()
    print(f"{'preset':24}{'network':9}{'parameters':>12}{'GFLOPs':>9}{'tokens':>8}{'FID':>7}   in the paper\n"
          f"{'':44}(multiply-adds) (reported)")
    heading = None
    for name, cfg in PRESETS.items():
        parameters, flops, tokens = measure(cfg)
        source, fid = SOURCES[name]
        if source != heading:
            print(f"\n{source}")
            heading = source
        paper = "{}M, {} GFLOPs".format(*PAPER[name]) if name in PAPER else ""
        print(f"{name:24}{cfg.model:9}{parameters / 1e6:11.2f}M{flops / 1e9:9.2f}{tokens:8}{fid or '-':>7}   {paper}")
    print("\n" + NOTE)


if __name__ == "__main__":
    main()
