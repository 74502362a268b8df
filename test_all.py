"""Every test: python test_all.py, or python test_all.py WORD ... for those whose name contains a word.

Each has a known answer: a number measured on the released implementations (GOLDEN), a closed form, a second
implementation, or a run that must equal another one. Pictures and files are written by the tests themselves.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import configs
import data
import diffit
import diffusion
import sample
import train
from diffusion import EDM, Diffusion, guided


class Skip(Exception):
    """Raised by a test that cannot run here, with the reason."""


# ---------------------------------------------------------------------------------------------
# Tensors that are the same everywhere, and what the released implementations make of them

def hashed_noise(name, n):
    x = (np.arange(n, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x ^ (x >> 16)).astype(np.float64) / 2 ** 32 - 0.5


def unit(name, *shape, dtype=torch.float64):
    """Noise of unit variance (B, C, H, W), rounded to fp32 as the reference's inputs were."""
    noise = (hashed_noise(name, math.prod(shape)) * math.sqrt(12)).astype(np.float32)
    return torch.from_numpy(noise).view(shape).to(dtype)


def weight(name, shape):
    """The value of a network's tensor: variance 1 / fan-in, or small numbers around 0 for a bias."""
    noise = hashed_noise(name, math.prod(shape))
    value = (noise * math.sqrt(12 / math.prod(shape[1:])) if len(shape) > 1
             else (1 if name.endswith("weight") else 0) + 0.2 * noise)
    return torch.from_numpy(value.astype(np.float32)).view(shape)


def fill(model):
    """Every parameter of a network := weight(its name, its shape)."""
    model.load_state_dict({n: v if n == "pos_embed" else weight(n, v.shape)
                           for n, v in model.state_dict().items()})
    return model


GOLDEN = {
    "diffit-global": dict(parameters=211692, index=[0, 67, 133, 200, 467, 534, 667, 1535],
        output=[0.28010213, 0.49922121, 1.5590235, 0.24583994, 0.17345709, 0.29344678, 0.71353096, 1.03531194],
        guided=[0.17654948, 0.05077958, 2.44279575, 0.24583994, 0.17345709, 0.79395831, 1.66953087,
            1.03531194]),
    "dit": dict(parameters=256864, index=[0, 67, 133, 200, 467, 534, 667, 1535],
        output=[0.78929204, 0.27335525, 1.31169438, -0.01270803, 3.04910278, 0.49361897, 0.84521455,
            -1.2576648],
        guided=[0.71930748, -0.27489048, 0.1573714, -0.01270803, 3.04910278, 0.44178915, 0.7310577,
            -1.2576648]),
    "linear": dict(
        abar=[0.9999, 0.999780092072, 0.997806572508, 0.521423030619, 0.077796658365,
            4.11819363814e-05, 4.03582976538e-05],
        log_posterior=[-9.8167251353, -9.8167251353, -8.26075560735, -5.28802653049, -4.60004973998,
            -3.91302033739, -3.9120238291],
        x0_coef=[1.0, 0.54529149951, 0.13627785977, 0.00768442233046, 0.00305805707563,
            0.00012952423623, 0.000128351487172],
        xt_coef=[0.0, 0.454708498991, 0.863722069287, 0.991907883274, 0.994104350757,
            0.989958723491, 0.989948678268],
        mse=[1.26294026849, 1.45320978329, 1.01373492942, 1.38488403343, 1.70225564665,
            1.24023576689, 1.20912337918],
        vlb=[2.67242224894, 0.987250752274, 0.110097731876, 0.0106982877187, 0.0135356336735,
            0.0182401789604, 0.017800687267],
        index=[0, 21, 37, 58, 74, 95],
        ddim=[173.143626066, 88.5216083968, 94.7344145116, -153.450282683, 9.6953618359, -219.311067201],
        ddim_clipped=[1.0, 0.876524503508, 1.0, -1.0, 0.991651767386, -1.0],
        ddim_eta1=[268.403469585, 157.791110397, 194.991614611, -409.474727638, 126.480246859, -582.058381382],
        ddpm=[268.398845441, 157.521804941, 195.300761978, -409.475680083, 126.824038377, -582.057877843]),
    "cosine": dict(
        abar=[0.999958715775, 0.999912575927, 0.999278903773, 0.845887986497, 0.492285172449,
            2.42876690703e-06, 2.42876690703e-09],
        log_posterior=[-10.7340825325, -10.7340825325, -9.45015177118, -6.63198703656,
            -5.76162184515, -0.287690168239, -0.00100292667467],
        x0_coef=[1.0, 0.527781409334, 0.124592235522, 0.00792597210882, 0.00436786689953,
            0.00233767618982, 0.00155689171549],
        xt_coef=[0.0, 0.472218590427, 0.875407757383, 0.992046479226, 0.995356279455,
            0.499996963947, 0.0316226998741],
        mse=[1.26483957686, 1.45452099253, 1.02473153808, 1.50704098395, 1.56208746293,
            1.23986268723, 1.20798540942],
        vlb=[2.00152081526, 0.931771210213, 0.100807963101, 0.00941510247619, 0.00703517052166,
            2.68311845662, 870.50685379],
        index=[0, 21, 37, 58, 74, 95],
        ddim=[11199.4462542, -1023.2591911, 12212.9557081, -19595.2994303, 589.414174742, -28192.8158026],
        ddim_clipped=[1.0, 0.39656694216, 1.0, -1.0, 0.989881850436, -1.0],
        ddim_eta1=[11216.232629, -1055.88550019, 12154.5018337, -19677.2882638, 621.230852713, -28308.1592503],
        ddpm=[11216.2190472, -1055.89108113, 12154.6784804, -19677.2999784, 621.436311632, -28308.1629468]),
    "edm": dict(index=[0, 21, 37, 58, 74, 95],
        heun=[0.885153431381, 0.989208253074, -0.558813304543, -0.680094982698, -0.104251915378,
            0.612646741376],
        sigmas=[80.0, 19.3524529803, 3.25682151977, 0.296442284479, 0.00752801996278],
        loss=[1.55666315915, 1.64428846813, 1.35759435328, 1.77839402055]),
    "vae": dict(
        mean=([0, 67, 156, 222, 289, 355, 444, 511],
              [0.0159321, -0.2348087, -0.1908129, 0.0806139, 0.1721102, 0.3792568, 0.3038277, -0.2626736]),
        logvar=([0, 67, 156, 222, 289, 355, 444, 511],
                [-0.2320257, -0.2696292, 0.3648241, 0.027192, -0.9780666, -0.4811084, -0.5883282, 0.2498597]),
        decoded=([0, 200, 467, 667, 868, 1068, 1335, 1535],
                 [0.1874565, -1.4459398, 0.3649606, 1.138008, 0.4882536, -0.3071512, -0.6618357, 0.1876512])),
    "inception": dict(
        mixed_6a=([57900, 77201, 96501, 250902, 270202, 289502, 308802, 347402, 405303],
                  [0.364845, 0.829509, 2.18624, 1.333602, 0.694214, 2.357517, 3.229345, 3.290714, 3.00666]),
        mixed_6e=([0, 19300, 115801, 193001, 231602, 308802, 347402, 386003, 443903],
                  [3.946644, 1.772492, 0.589228, 4.339272, 2.286987, 7.667885, 15.0671, 4.617605, 1.911255]),
        pool=([0, 356, 712, 1246, 1424, 2137, 3561, 3739, 3917],
              [1.423329, 2.754237, 0.047372, 20.780302, 10.607479, 27.968872, 22.199087, 5.353054, 5.464947]),
        logits=([0, 175, 438, 701, 876, 1227, 1402, 1752, 2015],
                [26.054432, -18.220243, -1.470284, 12.334354, -16.44149, 2.942307, 12.527119, -22.804363, -0.694302])),
    "scores": dict(frechet_distance=1.3586417134459232, precision=0.7125, recall=0.96875,
        inception_score=2.4097000334595173),
    "resampler": {
        9: [0.0833333333333, 0.0833333333333, 0.0833333333333],
        10: [0.0828029310459, 0.0872663931284, 0.0665916639696, 0.0811833568096, 0.0919266938167,
            0.0868972126219],
        13: [0.0750522285606, 0.104859961291, 0.0701813579165, 0.0675363059339, 0.0914079827795,
            0.0854566667447],
        "weight": [1.11033789311, 0.794710700895, 1.18739984246, 1.23390422649, 0.911663629361,
            0.975153098146]},
}


# ---------------------------------------------------------------------------------------------
# Saying what is expected

def close(found, expected, tolerance, what=""):
    """|found - expected| <= tolerance * (largest |expected|, or 1 if that is smaller), with the distance in the
    message."""
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    assert found.shape == expected.shape, \
        f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert found.isfinite().all(), f"{what}: not finite"
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    assert error <= tolerance, f"{what}: off by {error:.3g}, allowed {tolerance:g}"


def refused(call, *words):
    """call() must raise a ValueError whose message is one line and holds all the words."""
    try:
        call()
    except ValueError as error:
        text = str(error)
        assert "\n" not in text, f"more than one line: {text}"
        for word in words:
            assert str(word) in text, f"{word!r} is missing from: {text}"
        return
    raise AssertionError(f"accepted, but should have been refused for {words}")


def command(module, *args):
    """Run `python module.py args` in this process -> exit code, standard error."""
    said, argv = io.StringIO(), sys.argv
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = [f"{module.__name__}.py", *map(str, args)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            module.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)
    return code, said.getvalue()


def complains(module, *args, words):
    """The command must end with exit code 2 and one sentence that holds the words."""
    code, said = command(module, *args)
    assert code == 2, f"exit code {code} for {args}: {said}"
    last = said.strip().split("\n")[-1]
    assert "Traceback" not in said and last.startswith(f"{module.__name__}.py: "), said
    for word in words:
        assert str(word) in last, f"{word!r} is missing from: {last}"


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


TINY = ("--hidden-size", 32, "--depth", 1, "--num-heads", 2, "--batch-size", 8, "--lr", 1e-3,
        "--lr-rampup-kimg", 0, "--lr-decay", "constant", "--tick-kimg", 0.016, "--steps", 3,
        "--sample-kimg", 100, "--workers", 0)


def tiny_run(out, *flags, kimg=0.08):
    """Train a very small network on shapes for ten steps of eight images."""
    code, said = command(train, *TINY, "--out", out, "--kimg", kimg, *flags)
    assert code == 0, said
    return torch.load(Path(out) / "last.pt", weights_only=True)


def train_here(cfg, out, scorer=None):
    """train.train on shapes, in this process, on the CPU; signals are given back afterwards."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    out.mkdir(exist_ok=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            train.train(cfg, data.Shapes(32), out, device=torch.device("cpu"), scorer=scorer)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)
    return torch.load(out / "last.pt", weights_only=True)


def start(*flags, prepare="pass", workers=0, **environment):
    """python train.py, on a very small network, in a process of its own; `prepare` is code to run first."""
    return launch("train", *TINY[:-1], workers, *flags, prepare=prepare, **environment)


def launch(script, *flags, prepare="pass", stdout=subprocess.DEVNULL, **environment):
    code = f"import sys; sys.argv = {[script + '.py', *map(str, flags)]}; {prepare}; import {script}; {script}.main()"
    return subprocess.Popen([sys.executable, "-c", code], text=True, cwd=Path(__file__).parent, start_new_session=True,
                            stderr=subprocess.PIPE, stdout=stdout,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@contextlib.contextmanager
def one_thread():
    """As in each of two processes: the order of sums depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_two_processes(act, *args):
    """Call act(*args) in two processes that have met; an error in one of them is an error here."""
    context = torch.multiprocessing.start_processes(
        one_of_two, (act, free_port(), args), nprocs=2, join=False, start_method="spawn")
    while not context.join():
        pass


def one_of_two(rank, act, port, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sample.join_processes()
    act(*args)
    torch.distributed.barrier()
    sample.leave_processes()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def same(a, b):
    """Are two checkpoints equal, bit for bit, in everything but the time that they took?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("images_per_s", "data_wait", "memory_gb", "config"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------------------------------------------------------------------------------------------
# diffit.py

SMALL = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=3, num_heads=4, num_classes=10)


def golden_network(network, name, scale):
    model, gold = fill(network(**SMALL).eval()), GOLDEN[name]
    x, t, y = unit("x", 3, 4, 8, 8, dtype=torch.float32), torch.tensor([0, 37, 999]), torch.tensor([0, 3, 10])
    assert sum(p.numel() for p in model.parameters()) == gold["parameters"]
    with torch.no_grad():
        close(model(x, t, y).flatten()[gold["index"]], gold["output"], 2e-5, "output")
        close(guided(model, y, scale, channels=3)(x, t).flatten()[gold["index"]], gold["guided"], 2e-5,
              "guided output")


def test_golden_diffit():
    golden_network(diffit.DiffiT, "diffit-global", diffusion.power_cosine(4.4))


def test_golden_dit():
    golden_network(diffit.DiT, "dit", 4.4)


def test_released_files_load_with_their_integer_index():
    model = diffit.DiffiT(**SMALL)
    state = {**model.state_dict(),
             **{f"blocks.{i}.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)
                for i in range(3)}}
    model.load_state_dict(state, strict=True)
    data.load_weights(model, state, "file")


def test_parameter_counts_of_the_papers():
    with torch.device("meta"):
        count = lambda name: sum(p.numel() for p in diffit.build(configs.PRESETS[name]).parameters()) / 1e6
        assert round(count("imagenet256"), 1) == 561.0 and round(count("imagenet256-depth30"), 1) == 600.9
        paper = {"s": (33, 33, 33), "b": (130, 130, 131), "l": (458, 458, 459),
                 "xl": (675, 675, 676)}                                    # DiT Table 4
        for size, counts in paper.items():
            for patch, millions in zip((2, 4, 8), counts):
                assert round(count(f"dit-{size}-{patch}")) == millions, \
                    (size, patch, count(f"dit-{size}-{patch}"))


def test_ddpmpp_has_the_parameters_of_edms():
    """EDM's DDPM++ for CIFAR-10 has 55,733,891, of which 9 x 128 are for the augmentation labels."""
    assert sample.measure(configs.PRESETS["ddpmpp-vp"])[0] == 55_733_891 - 9 * 128


def test_multiply_adds_of_the_papers():
    # DiT Table 1, GFLOPs as multiply-adds
    close(sample.measure(configs.PRESETS["dit-xl-2"])[1] / 1e9, 118.64, 1e-3, "DiT-XL/2")
    close(sample.measure(configs.PRESETS["dit-s-8"])[1] / 1e9, 0.36, 1e-2, "DiT-S/8")


def naive_attention(attention, x, c=None):
    """Softmax attention written out token by token, windows, time and all: the oracle for TMSA and Attention."""
    B, N, D = x.shape
    h, d, grid = attention.num_heads, D // attention.num_heads, round(math.sqrt(N))
    window = getattr(attention, "window", grid)
    qkv = attention.qkv(x)
    if isinstance(attention, diffit.TMSA) and attention.qkv_temb is not None:
        qkv = qkv + attention.qkv_temb(c)[:, None]
    q, k, v = (part.view(B, N, h, d) for part in qkv.chunk(3, dim=-1))
    table = None
    if c is not None:
        table = attention.relative_position_bias_table.expand(B, -1, -1)   # (B, offsets, h)
        if isinstance(attention, diffit.TimeInBias):
            table = table + attention.bias_temb(c).view(B, -1, h)
    out = torch.zeros(B, N, h, d, dtype=x.dtype)
    for i in range(N):
        yi, xi = divmod(i, grid)
        mates = [j for j in range(N)
                 if j // grid // window == yi // window and j % grid // window == xi // window]
        score = torch.stack([(q[:, i] * k[:, j]).sum(-1) / math.sqrt(d) for j in mates],
                            dim=-1)                                        # (B, h, mates)
        values = v[:, mates]
        if table is not None:
            rows = [(yi - j // grid + window - 1) * (2 * window - 1) + xi - j % grid + window - 1
                    for j in mates]
            score = score + table[:, rows].transpose(1, 2)
        if isinstance(attention, diffit.TimeAsToken):
            key, value = attention.token(c).view(B, 2, h, d).unbind(1)
            score = torch.cat([score, (q[:, i] * key).sum(-1, keepdim=True) / math.sqrt(d)], dim=-1)
            values = torch.cat([values, value[:, None]], dim=1)
        out[:, i] = torch.einsum("bhm,bmhd->bhd", score.softmax(-1), values)
    return attention.proj(out.reshape(B, N, D))


def random_tmsa(*args, time_in="qkv", **kwargs):
    torch.manual_seed(0)
    layer = diffit.ATTENTION[time_in](*args, **kwargs).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def test_tmsa_equals_the_naive_form():
    for time_in in ("qkv", "token", "bias", "none"):
        for grid, window in [(4, None), (6, 3), (4, 1), (3, 3)]:
            layer = random_tmsa(12, 3, grid, cond_dim=5, window=window, time_in=time_in)
            x, c = torch.randn(2, grid * grid, 12).double(), torch.randn(2, 5).double()
            close(layer(x, c), naive_attention(layer, x, c), 1e-12, f"{time_in}, grid {grid}, window {window}")


def test_time_enters_where_it_should():
    """A block answers the condition wherever time enters, and nowhere else: with its time part at zero (and a time
    token that nobody looks at) it is the block without time."""
    torch.manual_seed(0)
    x, c = torch.randn(2, 16, 12), torch.randn(2, 5)
    plain = diffit.DiffiTBlock(12, 3, 2.0, 4, 5, None, "none")
    assert torch.equal(plain(x, c), plain(x, -c))
    for time_in, part in [("qkv", "attn.qkv_temb"), ("bias", "attn.bias_temb"), ("mlp", "mlp.temb"),
                          ("token", "attn.token")]:
        block = diffit.DiffiTBlock(12, 3, 2.0, 4, 5, None, time_in)
        block.load_state_dict(plain.state_dict(), strict=False)
        extra = [name for name in block.state_dict() if name not in plain.state_dict()]
        assert extra == [f"{part}.weight", f"{part}.bias"], extra
        assert not torch.allclose(block(x, c), block(x, -c)), time_in
        for p in block.get_submodule(part).parameters():
            nn.init.zeros_(p)
        same_as_plain = torch.allclose(block(x, c), plain(x, c), atol=1e-6)
        assert same_as_plain == (time_in != "token"), f"{time_in}: a token of zeros still takes its share"
    hidden = F.linear(x, plain.mlp.fc1.weight, plain.mlp.fc1.bias) + 3.0
    mlp = diffit.Mlp(12, 24, 5)
    mlp.load_state_dict({**plain.mlp.state_dict(), "temb.weight": torch.zeros(24, 5),
                         "temb.bias": torch.full((24,), 3.0)})
    close(mlp(x, c), plain.mlp.fc2(F.gelu(hidden, approximate="tanh")), 1e-6)


def test_time_embeddings():
    torch.manual_seed(0)
    fourier, t = diffit.FourierEmbedder(8), torch.tensor([0.3, -0.7])
    angles = 2 * math.pi * t[:, None] * (fourier.freqs / (2 * math.pi))
    close(fourier(t), fourier.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)), 1e-5)
    assert "freqs" in fourier.state_dict() and "freqs" not in dict(fourier.named_parameters())
    close((fourier.freqs / (2 * math.pi)).std(), 16, 3)
    model = diffit.DiffiT(**{**SMALL, "num_classes": 0}, time_embedding="none")
    nn.init.normal_(model.final_layer.linear.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(model(x, torch.tensor([1, 2])), model(x, torch.tensor([900, 5])))


def test_augmentation_labels_add_to_the_condition():
    torch.manual_seed(0)
    for model, x in [(diffit.DiffiT(**SMALL, augment=True), torch.randn(2, 4, 8, 8)),
                     (diffit.DiffiTUNet(16, 3, (8, 8), (1, 1), 2, 4, 16, augment=True), torch.randn(2, 3, 16, 16))]:
        t, done = torch.tensor([0.1, 0.2]), torch.randn(2, 9)
        c = diffit.condition(model, t, None, done) - diffit.condition(model, t, None)
        close(c, done @ model.augment_embedder.weight.T, 1e-5)
        assert model.augment_embedder.bias is None
        assert torch.equal(model(x, t, None, torch.zeros(2, 9)), model(x, t)), "zero when sampling"


def test_plain_stages_scale_the_time_and_add_it():
    torch.manual_seed(0)
    stage = diffit.Stage([], 6, 5)
    nn.init.normal_(stage.scale)
    x, c = torch.randn(2, 6, 4, 4), torch.randn(2, 5)
    close(stage(x, c), x + (stage.scale * stage.temb(c))[:, :, None, None], 1e-6)
    tokens = torch.randn(2, 9, 6)
    close(stage(tokens, c), tokens + (stage.scale * stage.temb(c))[:, None], 1e-6)


def test_setr_joins_every_feature_at_full_size():
    torch.manual_seed(0)
    decoder = diffit.SETRDecoder(16, (4, 6, 8), 5)
    features = [torch.randn(2, width, 16 >> k, 16 >> k, requires_grad=True) for k, width in enumerate((4, 6, 8))]
    out = decoder(features, None)
    assert out.shape == (2, 5, 16, 16)
    out[:, :, 8, 8].sum().backward()
    assert all(f.grad.any() for f in features)
    total = decoder.reduce[2](features[2])                                 # written out, coarsest first
    full = []
    for k in (2, 1, 0):
        if k < 2:
            total = decoder.reduce[k](features[k]) + F.interpolate(total, scale_factor=2, mode="bilinear")
        full.append(F.interpolate(F.silu(decoder.refine[k](total)), size=(16, 16), mode="bilinear"))
    close(decoder(features, None), decoder.join(torch.cat(full, 1)), 1e-6)


def test_ddpmpp_block_is_its_formula():
    torch.manual_seed(0)
    for tmsa in (False, True):
        block = diffit.DDPMppBlock(8, 12, 6, 4, 0.0, 3, tmsa).double()
        x, c, norm = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 6).double(), lambda n, x: F.silu(n(x))
        h = block.conv1(norm(block.norm1, x)) + block.temb(F.silu(c))[:, :, None, None]
        h = (block.conv2(norm(block.norm2, h)) + block.skip(x)) / math.sqrt(2)
        tokens = block.norm3(h).flatten(2).transpose(1, 2)
        tokens = naive_attention(block.attn, tokens, c if tmsa else None)
        close(block(x, c), (tokens.transpose(1, 2).view_as(h) + h) / math.sqrt(2), 1e-12)
    down, up = (diffit.DDPMppBlock(8, 8, 6, 4, 0.0, 0, False, **{way: True}) for way in ("down", "up"))
    x, c = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    assert down(x, c).shape == (2, 8, 2, 2) and up(x, c).shape == (2, 8, 8, 8)
    for block, resampled in [(down, F.avg_pool2d(x, 2)), (up, F.interpolate(x, scale_factor=2))]:
        nn.init.zeros_(block.conv2.weight), nn.init.zeros_(block.conv2.bias)
        close(block(x, c), block.skip(resampled) / math.sqrt(2), 1e-6)


def test_tmsa_gradients_equal_the_naive_form():
    layer = random_tmsa(8, 2, 4, window=2)
    x, c = torch.randn(2, 16, 8).double(), torch.randn(2, 8).double()
    found = torch.autograd.grad(layer(x, c).pow(2).sum(), layer.parameters())
    expected = torch.autograd.grad(naive_attention(layer, x, c).pow(2).sum(), layer.parameters())
    for (name, _), a, b in zip(layer.named_parameters(), found, expected):
        close(a, b, 1e-11, name)


def test_attend_equals_scaled_dot_product_attention():
    (q, k, v), bias = torch.randn(3, 2, 4, 9, 5), torch.randn(4, 9, 9)
    close(diffit.attend(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias), 1e-6)


def test_plain_attention_equals_the_naive_form():
    torch.manual_seed(0)
    layer, x = diffit.Attention(12, 3).double(), torch.randn(2, 9, 12).double()
    close(layer(x), naive_attention(layer, x), 1e-12)


def test_tmsa_without_time_is_plain_attention():
    layer, plain = random_tmsa(12, 3, 4), diffit.Attention(12, 3).double()
    for p in (*layer.qkv_temb.parameters(), layer.relative_position_bias_table):
        nn.init.zeros_(p)
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n.startswith(("qkv.", "proj."))})
    x, c = torch.randn(2, 16, 12).double(), torch.randn(2, 12).double()
    close(layer(x, c), plain(x), 1e-14)
    assert torch.equal(layer(x, c), layer(x, 2 * c)), "the condition still has a say"


def test_time_in_tmsa_is_a_token_wise_shift():
    """x Wqs + c Wqt = what a layer without time makes of x + d, where d Wqs = c Wqt."""
    layer = random_tmsa(6, 2, 2)
    with torch.no_grad():
        layer.qkv_temb.weight.copy_(layer.qkv.weight)
        layer.qkv_temb.bias.zero_()
    x, c = torch.randn(3, 4, 6).double(), torch.randn(3, 6).double()
    close(layer(x, c), layer(x + c[:, None], 0 * c), 1e-12)


def test_one_window_is_global_attention():
    whole, window = random_tmsa(8, 2, 4), random_tmsa(8, 2, 4, window=4)
    x, c = torch.randn(2, 16, 8).double(), torch.randn(2, 8).double()
    assert torch.equal(whole(x, c), window(x, c))


def test_permuted_windows_permute_the_output():
    layer = random_tmsa(8, 2, 6, window=3)
    # 2 x 2 windows of 3 x 3 tokens; windows change places, tokens in them do not
    x, c = torch.randn(1, 2, 3, 2, 3, 8).double(), torch.randn(1, 8).double()
    swap = lambda tokens: tokens.flip(1, 3)
    run = lambda tokens: layer(tokens.reshape(1, 36, 8), c).view(1, 2, 3, 2, 3, 8)
    close(run(swap(x)), swap(run(x)), 1e-13)
    assert not torch.allclose(run(x), swap(run(x)))


def test_fresh_adaln_zero_block_is_the_identity():
    torch.manual_seed(0)
    model = diffit.DiT(**SMALL)
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    assert torch.equal(model.blocks[0](x, c), x)
    assert not model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2])).any(), "a fresh DiT predicts zero"


def unets():
    for size, classes in [(32, 0), (64, 5), (48, 0)]:
        yield size, diffit.DiffiTUNet(size, 3, channels=(8, 16, 16), blocks=(1, 2, 1), num_heads=2, window=4,
                                      cond_size=24, num_classes=classes)
    small = dict(channels=(8, 8), blocks=(1, 2), num_heads=2, cond_size=16)
    for encoder, decoder in [("vit", "setr"), ("plain", "setr"), ("plain", "plain"), ("diffit", "plain")]:
        yield 16, diffit.DiffiTUNet(16, 3, **small, window=4, num_classes=5, encoder=encoder, decoder=decoder)
    for time_in in ("qkv", "none"):
        yield 16, diffit.DDPMpp(16, 3, **small, time_in=time_in)


def test_unet_takes_any_size_its_levels_divide():
    for size, model in unets():
        x, t = torch.randn(2, 3, size, size), torch.tensor([0.1, -0.3])
        assert model(x, t, torch.tensor([0, 4]) if model.num_classes else None).shape == x.shape
        assert model(x, t).shape == x.shape
    double = diffit.DiffiTUNet(16, 3, (8, 8), (1, 1), 2, window=8, cond_size=8, learn_sigma=True)
    assert double(torch.randn(1, 3, 16, 16), torch.zeros(1)).shape == (1, 6, 16, 16)


def test_resblock_is_equations_9_and_10():
    torch.manual_seed(0)
    block = diffit.ResBlock(8, 12, 3, 4.0, 4, 6, 2, 0.0).double()
    x, c = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 6).double()
    h = F.conv2d(F.silu(F.group_norm(x, 2, block.norm.weight, block.norm.bias)),
                 block.conv.weight, block.conv.bias, padding=1)
    tokens = h.flatten(2).transpose(1, 2)
    tokens = tokens + naive_attention(block.block.attn, F.layer_norm(tokens, (12,), eps=1e-6), c)
    tokens = tokens + block.block.mlp(F.layer_norm(tokens, (12,), eps=1e-6))
    close(block(x, c),
          tokens.transpose(1, 2).view(2, 12, 4, 4) + F.conv2d(x, block.skip.weight, block.skip.bias), 1e-12)


def test_embed_gain_scales_patches_and_positions_alone():
    def weights(gain):
        torch.manual_seed(0)
        return diffit.DiffiT(**SMALL, embed_gain=gain).state_dict()
    plain, large = weights(1.0), weights(4.0)
    for name in plain:
        close(large[name], plain[name] * (4 if name in ("x_embedder.proj.weight", "pos_embed") else 1), 1e-6, name)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    models = [(8, diffit.DiffiT(**SMALL)), (8, diffit.DiT(**SMALL)), *unets()]
    models += [(8, diffit.DiffiT(**SMALL, time_in=time_in)) for time_in in ("token", "bias", "mlp")]
    for size, model in models:
        for p in model.parameters():               # a zero head or gate would hide what lies behind it
            nn.init.normal_(p, std=0.05) if not p.any() else None
        channels = 4 if isinstance(model, diffit.Transformer) else 3
        y = torch.tensor([1, model.num_classes]) if model.num_classes else None
        model(torch.randn(2, channels, size, size), torch.tensor([3.0, 700.0]), y).pow(2).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.any(), f"{type(model).__name__} {name}"


def test_no_label_is_the_null_class():
    model = fill(diffit.DiffiT(**SMALL).eval())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 6])
    assert torch.equal(model(x, t), model(x, t, torch.tensor([10, 10])))
    refused(lambda: diffit.DiffiT(**{**SMALL, "num_classes": 0})(x, t, torch.tensor([0, 1])), "num_classes")


def test_labels_are_dropped_in_training_alone():
    torch.manual_seed(0)
    embed = diffit.LabelEmbedder(4, 2, dropout=0.25)
    with torch.no_grad():
        # first column: was it dropped?
        embed.embedding_table.weight.copy_(torch.tensor([[0.0, 1]] * 4 + [[1.0, 0]]))
    y = torch.zeros(20_000, dtype=torch.long)
    dropped = embed(y)[:, 0].mean().item()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000), dropped
    assert embed.eval()(y)[:, 0].sum() == 0


def test_timesteps_never_pass_through_bf16():
    embed = diffit.TimestepEmbedder(16)
    t = torch.tensor([996, 997, 998, 999])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = embed(t)
    assert c.dtype == torch.float32 and torch.equal(c, embed(t)) and len(c.unique(dim=0)) == 4


def test_position_table():
    table = diffit.sincos_2d(16, 3)[0]
    for token in range(9):
        row, column = divmod(token, 3)
        angle = lambda position: [position / 10000 ** (k / 4) for k in range(4)]
        expected = [f(a) for position in (column, row) for f in (math.sin, math.cos) for a in angle(position)]
        close(table[token], expected, 1e-6)
    odd = diffit.sincos_2d(18, 3)
    assert (odd.shape == (1, 9, 18) and torch.equal(odd[..., :16], diffit.sincos_2d(16, 3))
            and not odd[..., 16:].any())


def test_sizes_that_do_not_fit_are_refused():
    refused(lambda: diffit.TMSA(10, 3, 4), "10", "3 heads")
    refused(lambda: diffit.TMSA(8, 2, 6, window=4), "4 x 4", "6 x 6")
    refused(lambda: diffit.DiffiT(**{**SMALL, "patch_size": 3}), "3", "8 x 8", "multiple")
    refused(lambda: diffit.DiffiTUNet(30, 3), "30", "8")
    refused(lambda: diffit.DiffiTUNet(32, 3, (8, 8), (1,)), "2 widths", "1 block")
    refused(lambda: diffit.DDPMpp(32, 3, (8, 8), (1,)), "2 widths", "1 block")
    refused(lambda: diffit.DDPMpp(30, 3, (8, 8, 8), (1, 1, 1)), "30", "4")
    refused(lambda: diffit.DDPMpp(32, 3, (8, 8), (1, 1), cond_size=3), "3", "narrow")
    refused(lambda: diffit.DiffiT(**SMALL, time_in="kqv"), "kqv", "token", "bias")
    refused(lambda: diffit.DiT(**SMALL, time_embedding="sin"), "sin", "fourier")
    refused(lambda: diffit.DiffiTUNet(32, 3, (8, 8), (1, 1), encoder="Vit"), "Vit", "plain")
    refused(lambda: diffit.DiffiTUNet(24, 3, (8, 8), (1, 1), 2, window=8), "8 x 8", "12 x 12")


def test_bf16_forward_stays_near_fp32():
    model = fill(diffit.DiffiT(**SMALL).eval())
    x, t, y = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
               torch.tensor([3, 900]), torch.tensor([1, 2]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, t, y)
    with torch.no_grad():
        close(low, model(x, t, y), 0.03)


# ---------------------------------------------------------------------------------------------
# diffusion.py

GOLDEN_T = torch.tensor([0, 1, 10, 250, 500, 998, 999])


def golden_net(x, t):
    out = torch.einsum("oc,bchw->bohw", unit("d:A", 6, 3), x)
    return torch.tanh(out + 0.001 * t.double().view(-1, 1, 1, 1))


def golden_noise():
    """noise(): the k-th call gives the k-th tensor that the reference's chains added."""
    count = iter(range(1, 1001))
    return lambda: unit(f"d:z{next(count)}", 2, 3, 4, 4)


def golden_diffusion(schedule):
    process, gold = Diffusion(1000, schedule), GOLDEN[schedule]
    for name in ("abar", "log_posterior", "x0_coef", "xt_coef"):
        close(getattr(process, name)[GOLDEN_T], gold[name], 1e-6, name)
    x0, noise = unit("d:x0", 7, 3, 4, 4).mul(0.5).clamp(-1, 1), unit("d:noise", 7, 3, 4, 4)
    losses = process.loss(golden_net, x0, GOLDEN_T, noise)
    close(losses["mse"], gold["mse"], 1e-6, "mse")
    close(losses["vlb"] / torch.tensor(gold["vlb"]), torch.ones(7), 1e-6, "vlb")
    close(losses["loss"], losses["mse"] + losses["vlb"], 1e-12, "loss")
    x, levels, at = unit("d:xT", 2, 3, 4, 4), process.levels(50), gold["index"]
    close(diffusion.ddim(process, golden_net, x, levels).flatten()[at], gold["ddim"], 1e-6, "ddim")
    close(diffusion.ddim(process, golden_net, x, levels, clip=True).flatten()[at],
          gold["ddim_clipped"], 1e-6, "ddim, clipped")
    close(diffusion.ddim(process, golden_net, x, levels, eta=1.0, noise=golden_noise()).flatten()[at],
          gold["ddim_eta1"], 1e-6, "ddim, eta 1")
    close(diffusion.ddpm(process, golden_net, x, levels, noise=golden_noise()).flatten()[at],
          gold["ddpm"], 1e-6, "ddpm")


def test_golden_linear_schedule_losses_and_chains():
    golden_diffusion("linear")


def test_golden_cosine_schedule_losses_and_chains():
    golden_diffusion("cosine")


def test_golden_edm():
    process, gold = EDM(), GOLDEN["edm"]
    E = unit("m:E", 3, 3)
    net = lambda x, t: torch.tanh(torch.einsum("oc,bchw->bohw", E, x) + t.view(-1, 1, 1, 1))
    levels = process.levels(18)
    close(levels[::4], gold["sigmas"], 1e-12, "sigmas")
    x = diffusion.heun(process, net, process.prior(unit("m:e", 2, 3, 4, 4), levels[0]), levels)
    close(x.flatten()[gold["index"]], gold["heun"], 1e-6, "heun")
    sigma = torch.tensor([0.02, 0.3, 1.5, 40.0], dtype=torch.float64)
    losses = process.loss(net, unit("m:y", 4, 3, 4, 4).mul(0.5).clamp(-1, 1), sigma, unit("m:n", 4, 3, 4, 4))
    close(losses["loss"], gold["loss"], 1e-6, "loss")


def test_golden_loss_aware_timesteps():
    sampler, losses = diffusion.LossAwareTimesteps(12), unit("r:L", 13, 12) ** 2 + 0.1
    for k in range(13):
        sampler.update(torch.arange(12), losses[k])
        if k + 1 in (9, 10, 13):
            gold = GOLDEN["resampler"][k + 1]
            close(sampler.probabilities()[:len(gold)], gold, 1e-6, f"after {k + 1}")
    torch.manual_seed(0)
    t, w = sampler.sample(1000)
    close(w[t < 6], torch.tensor(GOLDEN["resampler"]["weight"])[t[t < 6]], 1e-6, "weights")
    assert w.dtype == torch.float32 and len(t.unique()) == 12


def test_importance_weights_keep_the_mean():
    """sum over t of p(t) w(t) loss(t) = mean of the loss, whatever was seen."""
    sampler, loss = diffusion.LossAwareTimesteps(50, uniform_prob=0.001), torch.arange(1.0, 51).double() ** 2
    for _ in range(10):
        sampler.update(torch.arange(50), loss)
    p = sampler.probabilities()
    close(p.sum(), 1.0, 1e-12)
    close((p * (1 / (50 * p)) * loss).sum(), loss.mean(), 1e-12)
    torch.manual_seed(0)
    t, w = sampler.sample(200_000)
    close((w.double() * loss[t]).mean() / loss.mean(), 1.0, 0.02)


def test_vlb_sends_no_gradient_to_the_mean():
    process, x0 = Diffusion(), unit("v", 4, 3, 4, 4)
    out = unit("v:out", 4, 6, 4, 4).requires_grad_()
    process.loss(lambda x, t: out, x0, torch.tensor([0, 1, 500, 999]),
                 unit("v:n", 4, 3, 4, 4))["vlb"].sum().backward()
    assert not out.grad[:, :3].any() and (out.grad[:, 3:] != 0).any(dim=(1, 2, 3)).all()


def test_vlb_is_the_kl_of_two_gaussians():
    process, t = Diffusion(), torch.tensor([300])
    x0, noise, out = unit("k", 1, 1, 2, 2), unit("k:n", 1, 1, 2, 2), unit("k:o", 1, 2, 2, 2)
    found = process.loss(lambda x, t: out, x0, t, noise)["vlb"]
    a, b, beta = process.abar[300], process.abar[299], 1 - process.abar[300] / process.abar[299]
    xt = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    mean = lambda clean: (math.sqrt(b) * beta * clean + math.sqrt(1 - beta) * (1 - b) * xt) / (1 - a)
    tilde = beta * (1 - b) / (1 - a)
    share = (out[:, 1:] + 1) / 2
    p = torch.distributions.Normal(mean((xt - math.sqrt(1 - a) * out[:, :1]) / math.sqrt(a)),
                                   (beta ** share * tilde ** (1 - share)) ** 0.5)
    q = torch.distributions.Normal(mean(x0), torch.full_like(x0, tilde ** 0.5))
    close(found, torch.distributions.kl_divergence(q, p).mean().view(1) / math.log(2), 1e-10)


def test_discretised_gaussian_sums_to_one():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in [(0.1, 0.05), (-0.97, 0.2), (0.999, 0.01)]:
        mass = diffusion.discretized_gaussian_log_likelihood(
            levels, torch.tensor(mean), torch.tensor(math.log(scale))).exp()
        close(mass.sum(), 1.0, 1e-4, f"mean {mean}")


def test_spaced_gives_the_steps_asked_for():
    for T in (1, 2, 7, 250, 1000):
        for n in range(1, T + 1):
            times = diffusion.spaced(T, n)
            assert len(times) == len(set(times)) == n and sorted(times) == times and times[-1] == T - 1, (T, n)
            assert n == 1 or times[0] == 0
    for n in (0, -3, 1001):
        refused(lambda: diffusion.spaced(1000, n), n, "1 to 1000")
    assert diffusion.spaced(1000, 50)[:6] == [0, 20, 41, 61, 82, 102]      # the reference's rounding
    visited = []
    diffusion.ddim(Diffusion(variance="small"), lambda x, t: visited.append(t[0].item()) or x,
                   torch.zeros(1, 3, 2, 2), Diffusion().levels(7))
    assert visited == [999, 832, 666, 500, 333, 166, 0] == diffusion.spaced(1000, 7)[::-1]


def gaussian(process, mean, std):
    """The exact network for data N(mean, std^2 I): f(x, t) as Diffusion or EDM would call it."""
    def eps(x, t):
        a2 = torch.as_tensor(process.abar)[t.long()].view(-1, 1, 1, 1)
        return (1 - a2).sqrt() * (x - a2.sqrt() * mean) / (a2 * std ** 2 + 1 - a2)

    def F(x, c_noise):                             # D = c_skip x + c_out F, solved for F
        sigma, sd = process.noise_level(c_noise).view(-1, 1, 1, 1), process.sigma_data
        norm = (sigma ** 2 + sd ** 2).sqrt()
        D = (std ** 2 * x * norm + sigma ** 2 * mean) / (std ** 2 + sigma ** 2)
        return (D - sd ** 2 / norm * x) / (sigma * sd / norm)
    return F if isinstance(process, EDM) else eps


def exact_end(process, x, level, mean, std):
    """Where the probability-flow ODE of N(mean, std^2 I) leads from x at this level."""
    a, s = process.scales(level)
    return mean + std * (x - a * mean) / math.sqrt(a ** 2 * std ** 2 + s ** 2)


def test_ddim_returns_the_one_image_there_is():
    for process in (Diffusion(variance="small"), Diffusion(40, "cosine", "large"), EDM()):
        image, levels = unit("one", 2, 3, 4, 4), process.levels(40)
        x = process.prior(unit("one:x", 2, 3, 4, 4), levels[0])
        for sampler in (diffusion.ddim, diffusion.ddpm, diffusion.heun, diffusion.dpmpp):
            close(sampler(process, gaussian(process, image, 0.0), x, levels), image, 1e-8, sampler.__name__)


def test_ddim_over_all_steps_returns_the_gaussian():
    process, mean = Diffusion(variance="small"), unit("g:m", 1, 3, 4, 4)
    x, levels = unit("g:x", 2, 3, 4, 4), process.levels(1000)
    found = diffusion.ddim(process, gaussian(process, mean, 0.5), x, levels)
    close(found, exact_end(process, x, levels[0], mean, 0.5), 4e-3)


def orders(process, sampler, counts):
    """Observed orders of convergence on a mixture of Gaussians: log2 of the error's ratio as the number of steps
    doubles. On the line, the probability-flow ODE maps quantiles to quantiles."""
    mixture, (a, s) = diffusion.Mixture(), process.scales(process.levels(2)[0])
    u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    wide = diffusion.Mixture(mixture.weights.tolist(), *(v.tolist() for v in mixture.components(a, s)))
    start, truth, errors = wide.quantile(u).view(1, 1, 1, -1), mixture.quantile(u), []
    for n in counts:
        end = sampler(process, mixture.network(process), start, process.levels(n)).flatten()
        errors.append((end - truth).square().mean().sqrt().item())
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


def test_orders_of_convergence():
    """Euler falls with the step, Heun and DPM-Solver++(2M) with its square; for both processes."""
    for process, counts, samplers in [
            (EDM(sigma_min=1e-4, sigma_max=3.0), (32, 64, 128), (diffusion.ddim, diffusion.heun, diffusion.dpmpp)),
            (Diffusion(variance="small"), (31, 62, 125), (diffusion.ddim, diffusion.dpmpp)),
            (Diffusion(100_000, variance="small"), (31, 62, 125), (diffusion.heun,))]:
        for sampler in samplers:
            order, found = 1 if sampler is diffusion.ddim else 2, orders(process, sampler, counts)
            assert all(abs(o - order) < 0.3 for o in found), f"{type(process).__name__} {sampler.__name__}: {found}"


def test_mixture_knows_its_data():
    """One component is the Gaussian of the closed form; the mean of the clean image given the noised one is what sums
    over the line say; quantiles undo the distribution function."""
    one = diffusion.Mixture((1.0,), (0.3,), (0.5,))
    for process, t in [(Diffusion(variance="small"), torch.tensor([300])), (EDM(), torch.tensor([-0.2]).double())]:
        x = unit("mix", 1, 1, 3, 3)
        close(one.network(process)(x, t), gaussian(process, 0.3, 0.5)(x, t), 1e-6)
    mixture, line = diffusion.Mixture(), torch.linspace(-4, 4, 4001, dtype=torch.float64)
    density = (mixture.weights * torch.distributions.Normal(mixture.means, mixture.stds).log_prob(line[:, None]).exp()
               ).sum(-1)
    for x, a, s in [(0.4, 0.8, 0.6), (-0.9, 1.0, 0.3)]:
        weight = density * (-(x - a * line) ** 2 / (2 * s ** 2)).exp()
        close(mixture.denoise(torch.tensor(x).double(), a, s), (weight * line).sum() / weight.sum(), 1e-6)
    u = torch.tensor([0.01, 0.3, 0.77]).double()
    close(mixture.cdf(mixture.quantile(u)), u, 1e-12)
    close(diffusion.distance(EDM(), lambda process, f, x, levels: mixture.quantile(
        torch.special.ndtr(x / levels[0])), 2, points=500), 0.0, 1e-9)


def test_ddpm_has_the_variance_of_the_data():
    """Ancestral sampling of N(0.2, 0.5^2) with the exact noise, 250 of 1000 steps: mean and deviation of the
    samples."""
    process = Diffusion(variance="large")
    torch.manual_seed(0)
    x = diffusion.ddpm(process, gaussian(process, 0.2, 0.5), torch.randn(1, 1, 200, 200).double(),
                       process.levels(250))
    close(x.mean(), 0.2, 0.01)
    close(x.std(), 0.5, 0.02)


def test_ddim_with_eta_1_is_ddpm_with_small_variance():
    process = Diffusion(variance="small")
    net = lambda x, t: golden_net(x, t)[:, :3]
    x, levels = unit("d:xT", 2, 3, 4, 4), process.levels(20)
    a = diffusion.ddim(process, net, x, levels, eta=1.0, noise=golden_noise(), clip=True)
    close(a, diffusion.ddpm(process, net, x, levels, noise=golden_noise(), clip=True), 1e-9)


class Counting:
    """A network that notes how many images each call brings; its output tells the label, then a constant."""
    num_classes = 10

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append(len(x))
        return torch.cat([y.double().view(-1, 1, 1, 1).expand_as(x), torch.ones_like(x)], dim=1)


def test_guidance():
    x, t, y = torch.zeros(2, 4, 1, 1).double(), torch.tensor([100, 900]), torch.tensor([3, 7])
    run = lambda *args: guided(net, y, *args)(x, t)[:, :, 0, 0]
    net = Counting()
    close(run(2.5), [[10 + 2.5 * (3 - 10)] * 4 + [1] * 4, [10 + 2.5 * (7 - 10)] * 4 + [1] * 4], 1e-12,
          "all channels")
    close(run(2.5, 3)[0], [-7.5, -7.5, -7.5, 3, 1, 1, 1, 1], 1e-12, "first three")
    assert net.calls == [4, 4], "one call for both halves"
    net = Counting()
    close(run(1.0), [[3] * 4 + [1] * 4, [7] * 4 + [1] * 4], 1e-12)
    run(lambda t: torch.ones(2))
    guided(net, y, diffusion.power_cosine(4.4))(x, torch.tensor([999, 999]))
    assert net.calls == [2, 2, 2], "a scale of 1 needs no null half"
    refused(lambda: guided(net, None, 2.0), "2.0", "class labels")


def test_the_unguided_half_runs_where_it_matters():
    """DiffiT-256's scale stays below 1.01 for 43 % of the steps (t >= 570): half a call each, and the images hardly
    differ. With exact, all of it runs."""
    process, y = Diffusion(), torch.tensor([3, 7])
    x, levels, ends = unit("half", 2, 4, 1, 1), process.levels(250), []
    for exact in (False, True):
        net = Counting()
        f = guided(net, y, diffusion.power_cosine(4.4), 3, exact)
        ends.append(diffusion.ddim(process, lambda x, t: 0.1 * f(x, t), x, levels))
        whole = net.calls.count(4)
        assert whole + net.calls.count(2) == 250
        assert whole > 245 if exact else whole == sum(t < 570 for t in levels), whole  # exact: where fp32 says it is 1
    close(*ends, 1e-3)
    net = Counting()
    for scale in (0.0, 0.5, 1.02):
        guided(net, y, scale)(x, torch.tensor([5, 5]))
    assert net.calls == [4, 4, 4], "a scale below 1 is guidance, too"


def test_guidance_scales():
    t = torch.tensor([0, 500, 999])
    close(diffusion.power_cosine(4.4)(t), [4.4, 1 + 3.4 * (1 - math.cos(math.pi / 16)) / 2, 1.0], 1e-9,
          "power-cosine")
    scale = diffusion.power_cosine(4.4)(torch.arange(1000))
    assert (scale[570:] < 1.01).all() and (scale[:569] > 1.01).all()       # measured on the released schedule
    process = Diffusion()
    sigma = process.noise_level(t).double()
    close(sigma, [math.sqrt(1 / process.abar[i] - 1) for i in t], 1e-5, "sigma of a timestep")
    close(diffusion.interval(3.0, 0.02, 50, process)(t), [1.0, 3.0, 1.0], 1e-6, "interval over timesteps")
    edm = EDM()
    close(edm.noise_level(torch.tensor([0.3, 2.0]).log() / 4), [0.3, 2.0], 1e-6, "sigma of EDM")
    close(diffusion.interval(3.0, 0.28, 1, edm)(torch.tensor([0.3, 2.0]).log() / 4), [3.0, 1.0], 1e-6,
          "interval over sigma")


def test_edm_draws_and_weights():
    torch.manual_seed(0)
    logs = EDM(p_mean=-0.4, p_std=1.3).draw(100_000).log()
    close([logs.mean(), logs.std()], [-0.4, 1.3], 0.02)
    x0, sigma = unit("w", 3, 3, 2, 2), torch.tensor([0.1, 1.0, 30.0]).double()
    losses = EDM().loss(lambda x, t: 0 * x, x0, sigma, unit("w:n", 3, 3, 2, 2))
    close(losses["loss"], losses["mse"] * (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2, 1e-12)


def test_vp_and_ve_are_songs():
    """Their schedules in closed form, what the network is told and back, and what they need of it: samplers with the
    exact network end in the data."""
    vp, ve, t = diffusion.VP(), diffusion.VE(sigma_min=0.02, sigma_max=100.0), torch.linspace(0.01, 1, 9).double()
    integral = torch.cumulative_trapezoid(0.1 + 19.9 * torch.linspace(0, 1, 100_001).double(), dx=1e-5)
    abar = (-integral[(t * 100_000).round().long() - 1]).exp()             # of the continuous process
    close((1 / abar - 1).sqrt().log(), vp.sigma(t).log(), 1e-6)
    close(vp.time(vp.sigma(t)), t, 1e-9)
    for process in (vp, ve, EDM()):
        sigma = torch.tensor([0.03, 0.5, 7.0, 60.0]).double()
        close(process.noise_level(process.coefficients(sigma)[3]) / sigma, torch.ones(4), 1e-9)
        mixture = diffusion.Mixture()
        x, s = unit("vp", 1, 1, 2, 2), torch.tensor([0.4]).double()
        close(process.denoise(mixture.network(process), x, s), mixture.denoise(x, 1.0, 0.4), 1e-6)
        assert diffusion.distance(process, diffusion.heun, 40, points=300) < 0.01
    torch.manual_seed(0)
    drawn = vp.time(vp.draw(50_000)), ve.draw(50_000).log()
    close(torch.stack([drawn[0].mean(), drawn[0].std()]), [0.5, 1 / math.sqrt(12)], 0.01)
    close(torch.stack([drawn[1].min(), drawn[1].max()]), [math.log(0.02), math.log(100)], 0.01)
    assert diffusion.VE().draw(9_999).max() > 90, "the sampler's range does not bound it"
    for process in (vp, ve):
        levels = process.draw(20_000)
        close(torch.bincount(process.quarter(levels), minlength=4) / 20_000, [0.25] * 4, 0.02)
        x0, n = unit("vp:x", 1, 3, 2, 2), unit("vp:n", 1, 3, 2, 2)
        losses = process.loss(lambda x, t: 0 * x, x0, torch.tensor([2.0]).double(), n)
        close(losses["loss"], (n ** 2).mean().view(1), 1e-9, "a network that says nothing misses the unit noise")


def test_churn_keeps_the_distribution():
    """EDM's stochastic sampler with the exact network: other images, the same Gaussian; outside its interval of noise
    levels it is Heun's method."""
    process, levels = EDM(), EDM().levels(60)
    torch.manual_seed(0)
    x = process.prior(torch.randn(1, 1, 100, 100).double(), levels[0])
    net = gaussian(process, 0.2, 0.5)
    plain, churned = (diffusion.heun(process, net, x, levels, churn=churn) for churn in (0.0, 30.0))
    assert (plain - churned).abs().mean() > 0.1
    close([churned.mean(), churned.std()], [0.2, 0.5], 0.02)
    assert torch.equal(plain, diffusion.heun(process, net, x, levels, churn=30.0, interval=(200, 300)))
    ones = diffusion.heun(process, lambda x, t: 0 * x, torch.zeros(1, 1, 1, 1).double(), [2.0], churn=0.5,
                          churn_noise=2.0, noise=lambda: torch.ones(1, 1, 1, 1).double())
    gamma = math.sqrt(2) - 1                                               # alg. 2 for one step, F = 0: D = c_skip x
    hat, noised = 2 * (1 + gamma), 2.0 * math.sqrt((2 * (1 + gamma)) ** 2 - 4)
    close(ones.view(1), [0.25 / (hat ** 2 + 0.25) * noised], 1e-9)


def test_variance_and_channels_must_agree():
    refused(lambda: Diffusion().loss(lambda x, t: x, unit("c", 1, 3, 2, 2), torch.tensor([3])),
            "6 output channels", "learn_sigma")
    refused(lambda: Diffusion(schedule="quadratic"), "quadratic", "cosine")
    refused(lambda: Diffusion(variance="tiny"), "tiny", "small")
    for variance in ("small", "large"):
        losses = Diffusion(variance=variance).loss(lambda x, t: 0 * x, unit("c", 1, 3, 2, 2), torch.tensor([3]))
        assert losses.keys() == {"loss", "mse"} and torch.equal(losses["loss"], losses["mse"])


# ---------------------------------------------------------------------------------------------
# data.py

def pictures(root, broken=True):
    """Ordinary files in two classes: sizes, modes and formats as they come, one of them truncated."""
    rng = np.random.default_rng(0)
    noise = lambda h, w, c=3: rng.integers(0, 256, (h, w, c), np.uint8).squeeze()
    (root / "cats").mkdir(parents=True)
    (root / "dogs").mkdir()
    Image.fromarray(noise(40, 50)).save(root / "cats/a.png")
    Image.fromarray(noise(64, 33)).save(root / "cats/b.jpg")
    Image.fromarray(noise(90, 90, 1)).save(root / "cats/grey.jpeg")
    Image.fromarray(noise(32, 32, 4), "RGBA").save(root / "dogs/alpha.png")
    Image.fromarray(noise(37, 45)).convert("P").save(root / "dogs/palette.gif")
    Image.fromarray(rng.integers(0, 65536, (35, 35)).astype(np.uint16)).save(root / "dogs/deep.png")
    Image.fromarray(noise(20, 200)).save(root / "dogs/wide.webp")
    (root / "dogs/notes.txt").write_text("no picture")
    if broken:
        (root / "dogs/broken.png").write_bytes((root / "cats/a.png").read_bytes()[:2000])


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            out.write(file, file.relative_to(root))
    return path


def test_shapes_follow_from_seed_and_index():
    one, two = data.Shapes(32), data.Shapes(32)
    for i in (0, 7, 49_999):
        assert np.array_equal(one.read(i), two.read(i)) and one.labels[i] == i % 10
    assert one.read(3).shape == (32, 32, 3) and one.read(3).dtype == np.uint8
    assert (not np.array_equal(one.read(0), data.Shapes(32, seed=1).read(0))
            and not np.array_equal(one.read(0), one.read(10)))
    large = Image.fromarray(data.Shapes(128).read(14)).resize((32, 32), Image.Resampling.BOX)
    large = np.asarray(large).astype(float)
    assert np.abs(large - one.read(14)).mean() < 2, "the same picture at any size"
    assert len(data.Shapes.class_names) == 10 == len({data.Shapes(32).read(i).tobytes() for i in range(10)})


def test_center_crop_is_adms():
    """Known answers: an image of the right size is untouched; halving is a box mean; the middle is cut."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert np.array_equal(data.center_crop(Image.fromarray(image), 16), image)
    halved = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(data.center_crop(Image.fromarray(image), 8) - halved).max() <= 1  # it rounds twice
    wide = np.zeros((10, 31, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (data.center_crop(Image.fromarray(wide), 10) == 200).all()
    assert data.center_crop(Image.new("RGB", (500, 37)), 32).shape == (32, 32, 3)
    assert data.center_crop(Image.new("RGB", (9, 5)), 32).shape == (32, 32, 3)


def test_decode_modes():
    def through(image, kind="png"):
        file = io.BytesIO()
        image.save(file, kind)
        return np.asarray(data.decode(file))
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((0, 0), (10, 20, 30, 255))
    assert through(half).tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [255] * 3]], "transparent is white"
    assert (through(Image.new("L", (2, 2), 77)) == 77).all()
    assert (through(Image.fromarray(np.full((2, 2), 257 * 99, np.uint16))) == 99).all(), "16 bits"
    assert (through(Image.new("1", (2, 2), 1)) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6                                                       # camera held upright
    file = io.BytesIO()
    Image.new("RGB", (4, 2)).save(file, "jpeg", exif=exif)
    assert data.decode(file).size == (2, 4)


def test_folder_zip_npz_and_prepared_zip_hold_the_same():
    with folder() as root:
        pictures(root / "pics", broken=False)
        files = data.open_dataset(root / "pics", 32)
        assert files.class_names == ["cats", "dogs"] and files.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
        images = np.stack([files.read(i) for i in range(7)])
        np.savez(root / "a.npz", images, arr_1=files.labels)
        data.prepare(root / "pics", root / "ready.zip", 32, workers=0)
        for path in (zipped(root / "pics", root / "a.zip"), root / "a.npz", root / "ready.zip"):
            other = data.open_dataset(path, 32)
            assert other.labels.tolist() == files.labels.tolist(), path
            assert np.array_equal(np.stack([other.read(i) for i in range(7)]), images), path
        assert data.open_dataset(root / "a.npz", 16).read(0).shape == (16, 16, 3)
        refused(lambda: data.prepare(root / "pics", root / "ready.zip", 32), "ready.zip", "exists")
        assert sorted(p.name for p in root.iterdir()) == ["a.npz", "a.zip", "pics", "ready.zip"], \
            "nothing is left behind"


def test_a_zipped_folder_and_links_keep_their_classes():
    with folder() as root:
        pictures(root / "all/pics", broken=False)
        os.symlink(root / "all/pics/cats", root / "all/pics/lynxes")
        flat, deep = zipped(root / "all/pics", root / "flat.zip"), zipped(root / "all", root / "deep.zip")
        for source in (root / "all", flat, deep):
            found = data.open_dataset(source, 32)
            links = source.is_dir()                                        # a zip made here follows no links
            assert found.class_names == ["cats", "dogs", "lynxes"][:2 + links], (source, found.class_names)
            assert found.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3 * links


def cifar(path, kind, records):
    """A binary archive of n records as published: label bytes, then red, green and blue planes."""
    n, rng = records, np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (n, 3, 32, 32), np.uint8), rng.integers(0, kind, (n, 1), np.uint8)
    rows = np.concatenate([labels // 5, labels] if kind == 100 else [labels], axis=1)
    raw = np.concatenate([rows, images.reshape(n, -1)], axis=1).tobytes()
    size = n // 5 * 3073
    parts = {"train.bin": raw} if kind == 100 else {
        f"data_batch_{k + 1}.bin": raw[k * size:(k + 1) * size] for k in range(5)}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in reversed(parts.items()):
            info = tarfile.TarInfo(f"cifar-{kind}-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return images.transpose(0, 2, 3, 1), labels[:, 0]


def test_cifar_archives():
    with folder() as root:
        for kind in (10, 100):
            path = root / f"cifar-{kind}-binary.tar.gz"
            images, labels = cifar(path, kind, 20)
            read = data.open_dataset(path, 32)
            assert (np.array_equal(np.stack([read.read(i) for i in range(20)]), images)
                    and read.labels.tolist() == labels.tolist())
        (root / "cut.tar.gz").write_bytes(path.read_bytes()[:9000])
        refused(lambda: data.open_dataset(root / "cut.tar.gz", 32), "cut.tar.gz", "damaged")


def test_data_that_cannot_be_used_is_refused():
    with folder() as root:
        opened = lambda name: lambda: data.open_dataset(root / name, 32)
        refused(opened("nowhere"), "nowhere", "'shapes'")
        (root / "empty").mkdir()
        refused(opened("empty"), "holds no images", "'shapes'")
        (root / "text.csv").write_text("a,b")
        refused(opened("text.csv"), "cannot tell", "text.csv")
        (root / "bad.zip").write_bytes(b"PK no zip")
        refused(opened("bad.zip"), "bad.zip", "damaged")
        (root / "bad.npz").write_bytes(b"PK no npz")
        refused(opened("bad.npz"), "bad.npz")
        np.savez(root / "other.npz", x=np.zeros(3))
        refused(opened("other.npz"), "arr_0", "found: x")
        np.savez(root / "float.npz", np.zeros((2, 32, 32, 3), np.float32))
        refused(opened("float.npz"), "float32", "uint8")
        np.savez(root / "short.npz", np.zeros((2, 32, 32, 3), np.uint8), arr_1=np.zeros(3, int))
        refused(opened("short.npz"), "arr_1", "2 images")
        pictures(root / "mixed")
        Image.new("RGB", (8, 8)).save(root / "mixed/loose.png")
        refused(opened("mixed"), "unclear")
        for labels in ('{"labels": [["x.png", 0]]}', '{"labels": 3}', "no json",
                       '{"labels": [["cats/a.png", "cat"]]}'):
            (root / "one/cats").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(root / "one/cats/a.png")
            (root / "one/dataset.json").write_text(labels)
            refused(opened("one"), "dataset.json")
        (root / "one/dataset.json").write_text('{"labels": null}')
        assert data.open_dataset(root / "one", 32).labels is None


def test_order_follows_from_seed_and_place():
    shapes = data.Shapes(8, n=13)
    stream, again = data.Stream(shapes, seed=3, xflip=True), data.Stream(shapes, seed=3, xflip=True)
    first = [stream[p] for p in range(40)]
    for p in (39, 5, 17, 0, 26):                                           # any order of asking
        assert torch.equal(again[p][0], first[p][0]) and again[p][1] == first[p][1]
    find = lambda image: next(i for i in range(13) if np.array_equal(shapes.read(i), image)
                              or np.array_equal(shapes.read(i)[:, ::-1], image))
    seen = [find(x.permute(1, 2, 0).numpy()) for x, _, _ in first[:26]]
    assert sorted(seen[:13]) == sorted(seen[13:]) == list(range(13)) and seen[:13] != seen[13:], \
        "each epoch is another shuffle"
    flips = [data.Stream(shapes, 0, True)[p][0].equal(data.Stream(shapes, 0, False)[p][0]) for p in range(400)]
    assert 140 < sum(flips) < 260
    assert any(not data.Stream(shapes, 4)[p][0].equal(data.Stream(shapes, 3)[p][0]) for p in range(5))


def test_workers_do_not_change_the_order():
    stream = data.Stream(data.Shapes(8, n=50), seed=1, xflip=True)
    batches = [range(k, k + 6) for k in range(0, 60, 6)]
    read = lambda workers: [(x, y) for x, y, _ in data.loader(stream, batches, workers)]
    for (x0, y0), (x2, y2) in zip(read(0), read(2)):
        assert torch.equal(x0, x2) and torch.equal(y0, y2)


def test_unreadable_images_are_named_skipped_and_counted():
    with folder() as root:
        pictures(root / "pics")
        stream = data.Stream(data.open_dataset(root / "pics", 32))
        found = [stream[p] for p in range(16)]
        skipped = [name for _, _, unreadable in found for name, reason in unreadable]
        assert set(skipped) == {"dogs/broken.png"} and len(skipped) == 2, "once in each of two epochs"
        assert all(x.shape == (3, 32, 32) for x, _, _ in found)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            counter = data.Unreadable(range(1000))
            counter.add([(f"{i}.png", "cut short") for i in range(10)] * 2)
            refused(lambda: counter.add([("last.png", "cut short")]), "11 of 1000", "last.png", "1 %")
        assert said.getvalue().count("\n") == 11 and "3.png: cut short" in said.getvalue()
        for file in (root / "pics").rglob("*.*"):
            file.write_bytes(b"")
        unreadable = data.Stream(data.open_dataset(root / "pics", 32))[0][2]
        with contextlib.redirect_stderr(io.StringIO()):
            refused(lambda: data.Unreadable(range(8)).add(unreadable), "2 of 8 images", "more than 1 %")


def smooth(S):
    """Two pictures of S x S pixels without fine detail."""
    v = torch.linspace(-1, 1, S, dtype=torch.float64)
    y, x = torch.meshgrid(v, v, indexing="ij")
    return torch.stack([torch.stack([(2 * x + y).sin(), (x * y * 3).cos(), x - y ** 2]),
                        torch.stack([(3 * y).cos(), (x - 2 * y).sin(), y * x])])


def test_augmentation_does_what_it_says():
    """Flips are flips; a turn by 90 degrees is rot90 inside; a shift by whole pixels is a shift; half the size puts
    pixel 2 k where k was; what goes up and down unchanged is unchanged."""
    x, S = smooth(24), 24
    no, yes, still = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.zeros(2, 2).double()
    eye = torch.eye(2).double().expand(2, 2, 2)
    inside = lambda x: x[..., 5:-5, 5:-5]
    assert torch.equal(data.transform(x, no, no, eye, still), x)
    assert torch.equal(data.transform(x, yes, no, eye, still), torch.stack([x[0], x[1].flip(2)]))
    assert torch.equal(data.transform(x, no, yes, eye, still), torch.stack([x[0], x[1].flip(1)]))
    one_turned = data.transform(x, no, no, data.rotation(torch.tensor([0.0, 0.3]).double()), still)
    close(one_turned[0], x[0], 1e-9, "unchanged beside one that is turned")
    assert (one_turned[1] - x[1]).abs().max() > 0.05
    turned = data.transform(x, no, no, data.rotation(torch.full((2,), math.pi / 2).double()), still)
    close(inside(turned), inside(x.rot90(1, (2, 3))), 0.01, "a quarter turn")
    shifted = data.transform(x, no, no, eye, torch.tensor([[3.0, 0.0], [0.0, -2.0]]).double())
    close(inside(shifted), inside(torch.stack([x[0].roll(3, 2), x[1].roll(-2, 1)])), 1e-9, "a shift")
    close(shifted[0, :, :, 2], x[0, :, :, 1], 1e-6, "reflected at the border")
    halved = data.transform(smooth(25), no, no, 2 * eye, still)
    close(halved[..., 8:17, 8:17], smooth(25)[..., 4:21:2, 4:21:2], 0.02, "half the size")
    white = data.transform(torch.ones(2, 3, 16, 16), no, no, data.rotation(torch.tensor([0.4, 2.0])), torch.ones(2, 2))
    close(white, torch.ones(2, 3, 16, 16), 1e-3, "white stays white")
    for scale in (0.7, 0.9, 1.3):
        white = data.transform(torch.ones(1, 3, 16, 16), no[:1], no[:1], scale * torch.eye(2)[None], torch.zeros(1, 2))
        close(white, torch.ones(1, 3, 16, 16), 1e-3, f"white stays white, size 1 / {scale}")


def test_augmentation_labels_say_what_was_done():
    torch.manual_seed(0)
    x = torch.randn(400, 3, 8, 8)
    same_x, none = data.augment(x, 0.0)
    assert torch.equal(same_x, x) and none.shape == (400, 9) and not none.any()
    _, labels = data.augment(x, 0.12)
    done = [labels[:, 0], labels[:, 1], labels[:, 2], labels[:, 4], labels[:, 5:7].norm(dim=1), labels[:, 7]]
    close(torch.stack([(d != 0).float().mean() for d in done]), [0.5, 0.06, 0.12, 0.12, 0.12, 0.12], 0.06, "how often")
    close((labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, torch.ones(400), 1e-5, "a cosine and a sine")
    for seed in range(20):                                                 # rebuild the images from their labels
        torch.manual_seed(seed)
        x = smooth(16)
        made, l = data.augment(x, 0.5)
        turn, axis, rebuilt = torch.atan2(l[:, 4], l[:, 3] + 1), torch.atan2(l[:, 6], l[:, 5]), []
        for sign in (1, -1):                       # a stretch of -n along an axis has the labels of n the other way
            along = 2 ** (0.2 * sign * l[:, 5:7].norm(dim=1))
            matrix = data.rotation(turn) @ data.rotation(-axis) @ torch.diag_embed(torch.stack([1 / along, along], 1))
            matrix = matrix @ data.rotation(axis) / (2 ** (0.2 * l[:, 2])).view(-1, 1, 1)
            rebuilt.append(data.transform(x, l[:, 0], l[:, 1], matrix, 0.125 * 16 * l[:, 7:]))
        off = torch.stack([(made - again).abs().flatten(1).max(1).values for again in rebuilt]).min(0).values
        close(off, torch.zeros(2), 1e-6, f"seed {seed}")


def test_save_grid():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 80, 80, 3), np.uint8) * 50
    with folder() as root:
        data.save_grid(images, root / "g.png", columns=3)
        grid = np.asarray(Image.open(root / "g.png"))
        assert grid.shape == (2 * 82 + 2, 3 * 82 + 2, 3)
        assert (grid[40, 40, 0] == 0 and grid[40, 122, 0] == 50 and grid[122, 40, 0] == 150
                and (grid[122, 220] == 255).all())
        data.save_grid(images[:, :16, :16], root / "s.png")
        assert Image.open(root / "s.png").size == (3 * 66 + 2, 2 * 66 + 2), "small images are enlarged"
        assert sorted(p.name for p in root.iterdir()) == ["g.png", "s.png"]
    x = torch.tensor([-2.0, -1, 0, 1, 3]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert data.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_prepare_command():
    with folder() as root:
        pictures(root / "pics")
        code, said = command(data, "prepare", root / "pics", root / "out.zip", "--size", 16, "--workers", 0)
        assert (code == 0 and "skipped dogs/broken.png" in said
                and "7 images of 16 x 16, 2 classes" in said), said
        listed = json.loads(zipfile.ZipFile(root / "out.zip").read("dataset.json"))
        assert listed["labels"][-1] == ["00000/img00000006.png", 1]
        complains(data, "prepare", root / "pics", root / "out.zip", "--size", 16, words=["exists"])
        complains(data, "prepare", root / "pics", root / "out.tar", "--size", 16, words=["out.tar", ".zip"])
        complains(data, "prepare", root / "nowhere", root / "new.zip", "--size", 16, words=["nowhere"])
        complains(data, "prepare", root / "pics", root / "new.zip", "--size", 0, words=["--size 0"])


# ---------------------------------------------------------------------------------------------
# data.py: files of weights, the VAE, latents

def write_safetensors(path, tensors, names={torch.float64: "F64", torch.float32: "F32", torch.float16: "F16",
                                            torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8",
                                            torch.bool: "BOOL"}):
    """A file in the published format, tensors end to end in the order given."""
    header, body = {}, b""
    for name, value in tensors.items():
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def small_vae():
    """Two levels of 32 and 64 channels, filled like the reference's."""
    return fill(data.VAE((32, 64))).eval().requires_grad_(False)


def vae_file(path):
    return write_safetensors(path, small_vae().state_dict())


def test_golden_vae():
    vae, gold = small_vae(), GOLDEN["vae"]
    x = unit("v:img", 2, 3, 16, 16, dtype=torch.float32).mul(0.5).clamp(-1, 1)
    mean, logvar = vae.posterior(x)
    decoded = vae.decode(unit("v:z", 2, 4, 8, 8, dtype=torch.float32) * data.VAE.scale)
    for name, found in (("mean", mean), ("logvar", logvar), ("decoded", decoded)):
        index, values = gold[name]
        close(found.flatten()[index], values, 1e-5, name)
    with torch.device("meta"):
        assert sum(p.numel() for p in data.VAE().parameters()) == 83_653_863


def test_vae_latents_are_scaled_samples_of_the_posterior():
    mean, logvar, noise = unit("z:m", 1, 4, 2, 2), unit("z:v", 1, 4, 2, 2), unit("z:n", 1, 4, 2, 2)
    q = torch.distributions.Normal(mean, logvar.exp().sqrt())
    close(data.VAE.latent(mean, logvar, noise), 0.18215 * (q.mean + q.stddev * noise), 1e-12)
    assert torch.equal(data.VAE.latent(mean, logvar), 0.18215 * mean), "the mode"
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = small_vae().decode(small_vae().posterior(x)[0])
    close(low, small_vae().decode(small_vae().posterior(x)[0]), 0.1, "bf16")


def test_vae_reads_every_form_it_is_published_in():
    """Safetensors and .bin, today's names in the attention and the older ones, half precision."""
    state = small_vae().state_dict()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in state.items():
        for new_name, old_name in older.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        old[name] = value
    assert sum(n not in state for n in old) == 16
    with folder() as root:
        torch.save(old, root / "old.bin")
        files = [write_safetensors(root / "new.safetensors", state), write_safetensors(root / "old.safetensors", old),
                 root / "old.bin"]
        for file in files:
            assert same(dict(data.load_vae(file).state_dict()), dict(state)), file
        half = write_safetensors(root / "half.safetensors", {n: v.half() for n, v in state.items()})
        vae = data.load_vae(half)
        assert vae.quant_conv.weight.dtype == torch.float32
        close(vae.quant_conv.weight, state["quant_conv.weight"], 1e-3)
        del state["quant_conv.bias"]
        refused(lambda: data.load_vae(write_safetensors(root / "less.safetensors", state)), "1 missing",
                "quant_conv.bias")
        write_safetensors(root / "dit.safetensors", diffit.DiT(**SMALL).state_dict())
        refused(lambda: data.load_vae(root / "dit.safetensors"), "no VAE of Stable Diffusion")


def test_safetensors_come_back_as_written():
    tensors = {"half": torch.tensor([1.5, -2.0, 3.0]).half(), "a": torch.arange(6.0).view(2, 3),  # a: not aligned
               "brain": torch.tensor([0.1, 1e30]).bfloat16(), "long": torch.tensor([[2 ** 40]]),
               "none": torch.empty(0, 3), "yes": torch.tensor([True, False]), "one": torch.tensor(7.0).double(),
               "bytes": torch.arange(5, dtype=torch.uint8)}
    with folder() as root:
        path = write_safetensors(root / "x.safetensors", tensors)
        before = path.read_bytes()
        read = data.read_safetensors(path)
        assert data.safetensors_layout(path)[1] == {} and read.keys() == tensors.keys()
        for name, value in tensors.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
        read["bytes"].zero_()
        assert path.read_bytes() == before, "the file is not written to"
        header, starts = data.safetensors_header({"x": ("F32", (2, 3)), "y": ("U8", (4,))}, {"made": "here"})
        body = np.arange(6, dtype=np.float32).tobytes() + bytes([1, 2, 3, 4])
        path.write_bytes(header + body)
        read = data.read_safetensors(path)
        assert data.safetensors_layout(path)[1] == {"made": "here"}
        assert starts == {"x": len(header), "y": len(header) + 24}
        assert read["x"].tolist() == [[0, 1, 2], [3, 4, 5]] and read["y"].tolist() == [1, 2, 3, 4]


def test_safetensors_that_lie_are_refused():
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    headers = [{"w": {**good, **change}} for change in (
        {"data_offsets": [0, 17]}, {"data_offsets": [8, 24]}, {"data_offsets": [-16, 0]}, {"data_offsets": [16, 0]},
        {"data_offsets": [0]}, {"data_offsets": None}, {"shape": [-2, -2]}, {"shape": [2 ** 62, 2 ** 62]},
        {"shape": [True, 4]}, {"shape": [2.0, 2]}, {"shape": "22"}, {"shape": [1] * 9}, {"dtype": "F9"},
        {"dtype": ["F32"]}, {"shape": [3, 2]})] + [
        {"w": {**good, "shape": {}}}, {"w": {**good, "shape": [2 ** 63, 0], "data_offsets": [0, 0]}},
        {"__metadata__": [1], "w": good}, [["w", good]], {"w": 3}, {"w": {}}, [1, 2], "w", None,
        {"w": good, "v": good},
        {"w": good, "v": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}]
    with folder() as root:
        path = root / "x.safetensors"
        for header in headers:
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
            refused(lambda: data.read_file(path), "x.safetensors")
        for raw in (b"", b"123", (2 ** 60).to_bytes(8, "little") + b"{}", bytes(8), b"\x02" + bytes(7) + b"[[",
                    (100_000).to_bytes(8, "little") + b"[" * 100_000, b"\x05" + bytes(7) + b'{"w":'):
            path.write_bytes(raw)
            refused(lambda: data.read_file(path), "x.safetensors", "no safetensors file")


class Evil:
    """What a pickle can hold: a call, made when it is read."""
    def __reduce__(self):
        return os.mkdir, ("/tmp/evil-pickle-was-run",)


def test_weights_are_recognised_and_nothing_else_is_run():
    state = diffit.DiT(**SMALL).state_dict()
    other = {name: value + 1 for name, value in state.items()}
    with folder() as root:
        path = root / "x.pt"

        def took(content, raw=False, **how):
            torch.save(content, path, **how)
            found, kind = data.weights_in(data.read_file(path), path, raw)
            assert found.keys() == state.keys()
            return kind, "first" if torch.equal(found["pos_embed"], state["pos_embed"]) else "second"
        assert took(state) == ("plain", "first")
        assert took(state, _use_new_zipfile_serialization=False) == ("plain", "first")
        assert took({"model": other, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1)}) == ("EMA", "first")
        assert took({"model": other, "ema": state}, raw=True) == ("raw", "second")
        assert took({"model": state}) == took({"state_dict": state}) == ("raw", "first")
        assert took({f"module.{name}": value for name, value in state.items()}) == ("plain", "first")
        assert took({f"_orig_mod.{name.replace('.attn', '._orig_mod.attn')}": value for name, value in state.items()}
                    ) == ("plain", "first")
        refused(lambda: took(state, raw=True), "--raw")
        for content in ([1, 2], {}, {"lr": 3}, {"model": {}}, {0: torch.zeros(1)}):
            refused(lambda: took(content), "x.pt")
        refused(lambda: took({"w": Evil()}), "x.pt", "no file of weights")
        assert not os.path.exists("/tmp/evil-pickle-was-run")
        torch.save(state, path)
        with zipfile.ZipFile(path) as plain, zipfile.ZipFile(root / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
            for name in plain.namelist():
                bomb.writestr(name, plain.read(name))
        refused(lambda: data.read_file(root / "bomb.pt"), "bomb.pt", "compressed")
        path.write_bytes(path.read_bytes()[:-500])
        refused(lambda: data.read_file(path), "x.pt is truncated")
        refused(lambda: data.read_file(root / "none.pt"), "no file", "none.pt")


def test_what_does_not_fit_is_listed_ten_at_most():
    model = diffit.DiT(**SMALL)
    refused(lambda: data.check_weights(model, {}, "x.pt"), f"{len(model.state_dict())} missing", "; ...")
    state = {**model.state_dict(), **{f"extra{i}": torch.zeros(1) for i in range(12)}}
    state["pos_embed"] = torch.zeros(3)
    try:
        data.check_weights(model, state, "x.pt")
    except ValueError as error:
        assert str(error).count("extra") == 10 and "12 unexpected" in str(error), error
        assert "1 of another shape (pos_embed (3,), expected (1, 16, 64))" in str(error), error


@contextlib.contextmanager
def preset(name, **fields):
    """A preset for as long as a test runs."""
    configs.preset(name, "a test", None, **fields)
    try:
        yield configs.PRESETS[name]
    finally:
        del configs.PRESETS[name], configs.SOURCES[name]


LATENT_PRESET = dict(SMALL, model="diffit", learn_sigma=True, steps=5, cfg=4.4, cfg_schedule="power-cosine",
                     cfg_channels=3, precision="fp32", lr=1e-3, ema_decay=0.9, batch_size=4, kimg=0.04, tick_kimg=0.008,
                     sample_kimg=1, save_kimg=1, workers=0)


def test_published_files_make_pictures():
    """The published DiffiT as safetensors, with its integer index, DiTs as they are saved: each gives the pictures that
    network, sampler and VAE give when put together here."""
    models = {name: fill(network(**SMALL)).eval() for name, network in [("diffit", diffit.DiffiT), ("dit", diffit.DiT)]}
    with folder() as root, preset("tiny-diffit", **LATENT_PRESET) as cfg, \
            preset("tiny-dit", **{**LATENT_PRESET, "model": "dit", "cfg_schedule": "constant", "cfg": 1.5}):
        vae_file(root / "vae.safetensors")
        released = {**models["diffit"].state_dict(),
                    "blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
        write_safetensors(root / "diffit.safetensors", released)
        torch.save(models["dit"].state_dict(), root / "dit.pt")
        torch.save({"ema": models["dit"].state_dict(), "model": diffit.DiT(**SMALL).state_dict()}, root / "dit-ema.pt")
        flags = ("--vae", root / "vae.safetensors", "--classes", "3,7", "--n", 3, "--batch", 2)
        for name, file in [("diffit", "diffit.safetensors"), ("dit", "dit.pt"), ("dit", "dit-ema.pt")]:
            code, said = command(sample, "--ckpt", root / file, "--preset", f"tiny-{name}", *flags,
                                 "--npz", root / f"{file}.npz")
            assert code == 0 and ("EMA" if "ema" in file else "plain") in said, said
            expected = [small_vae().decode(x) for x, _ in sample.generate(models[name], configs.PRESETS[f"tiny-{name}"],
                                                                          range(3), [3, 7], batch=3)]
            with np.load(root / f"{file}.npz") as made:
                off = np.abs(made["arr_0"].astype(int) - data.to_uint8(torch.cat(expected)))
                assert off.max() <= 1 and made["arr_0"].std() > 5 and made["arr_1"].tolist() == [3, 7, 3], off.max()
        no = lambda *args, words: complains(sample, *args, "--out", root / "x.png", words=words)
        file = root / "diffit.safetensors"
        no("--ckpt", file, *flags, words=["--preset", "tiny-diffit"])
        no("--ckpt", file, "--preset", "tiny-dit", *flags, words=["8 missing", "adaLN", "9 unexpected"])
        no("--ckpt", file, "--preset", "tiny-diffit", words=["--vae", "latents of 4 channels"])
        no("--ckpt", file, "--preset", "tiny-diffit", "--vae", file, words=["no VAE"])
        no("--ckpt", root / "vae.safetensors", "--preset", "tiny-diffit", *flags, words=["is a VAE", "--vae"])
        no("--ckpt", file, "--preset", "tiny-difit", *flags, words=["did you mean tiny-diffit"])
        assert not (root / "x.png").exists()


def cache(*args):
    code, said = command(data, "latents", *args, "--workers", 0)
    assert code == 0, said
    return said


def test_cached_latents_hold_the_posterior_and_its_mirror_image():
    with folder() as root:
        pictures(root / "pics")
        said = cache(root / "pics", root / "z.safetensors", "--vae", vae_file(root / "v.safetensors"), "--size", 16)
        assert "skipped dogs/broken.png" in said and "7 images" in said and "1 unreadable" in said, said
        assert not (root / "z.safetensors.partial").exists()
        latents, files = data.open_dataset(root / "z.safetensors", 8), data.open_dataset(root / "pics", 16)
        assert (len(latents), latents.channels, latents.labels.tolist()) == (7, 4, [0, 0, 0, 1, 1, 1, 1])
        good = [i for i in range(8) if "broken" not in files.name(i)]
        vae = small_vae()
        for k, i in enumerate(good):
            for mirrored in (False, True):
                image = files.read(i)[:, ::-1] if mirrored else files.read(i)
                mean, logvar = vae.posterior(data.to_float(image[None].copy()))
                eps = np.random.default_rng(k).standard_normal((4, 8, 8), np.float32)
                close(latents.example(k, mirrored, np.random.default_rng(k)),
                      data.VAE.latent(mean, logvar, torch.from_numpy(eps))[0], 2e-3, f"{i}, mirrored: {mirrored}")
        stream, epochs = data.Stream(latents, seed=1), range(0, 7 * 400, 7)
        draws = torch.stack([stream[p + stream.order.tolist().index(0)][0] for p in epochs if stream[p]])
        mean, logvar = torch.from_numpy(latents.moments[0, 0].astype(np.float64))
        close(draws.mean(0), 0.18215 * mean, 0.05, "fresh samples each time: their mean")
        close(draws.std(0), 0.18215 * (logvar / 2).exp(), 0.05, "and deviation")
        assert torch.equal(stream[5][0], data.Stream(latents, seed=1)[5][0]) and not torch.equal(draws[0], draws[1])


def test_cached_latents_resume_divide_and_refuse():
    """Stopped at any place, or made by two processes that say nothing to each other: the same bytes. The same command
    when all is done: nothing happens."""
    with folder() as root:
        np.savez(root / "a.npz", np.random.default_rng(0).integers(0, 256, (150, 16, 16, 3), np.uint8),
                 arr_1=np.arange(150) % 3)
        vae = vae_file(root / "v.safetensors")
        flags = ("--vae", vae, "--size", 16, "--batch", 16)
        cache(root / "a.npz", root / "whole.safetensors", *flags)
        whole = (root / "whole.safetensors").read_bytes()
        tensors = data.read_safetensors(root / "whole.safetensors")
        begun, state_at = bytearray(whole), len(whole) - 150
        assert whole[state_at:] == b"\x01" * 150
        for i in (0, 3, 77, 149):
            at = len(whole) - 150 - 150 * 8 - (150 - i) * tensors["moments"][0].nbytes
            begun[at:at + 100], begun[state_at + i] = bytes(100), 0
        (root / "b.safetensors.partial").write_bytes(begun)
        complains(data, "latents", root / "a.npz", root / "b.safetensors", "--vae", vae, "--size", 8,
                  words=["b.safetensors.partial", "--size 8"])
        other = write_safetensors(root / "w.safetensors", {n: v * 1.1 for n, v in small_vae().state_dict().items()})
        complains(data, "latents", root / "a.npz", root / "b.safetensors", "--vae", other, "--size", 16,
                  words=["b.safetensors.partial", "this --vae"])
        cache(root / "a.npz", root / "b.safetensors", *flags)
        assert (root / "b.safetensors").read_bytes() == whole, "resumed: other bytes"
        for rank in ("0", "1"):
            os.environ.update(RANK=rank, WORLD_SIZE="2")
            try:
                cache(root / "a.npz", root / "c.safetensors", *flags)
            finally:
                del os.environ["RANK"], os.environ["WORLD_SIZE"]
            assert (root / "c.safetensors").exists() == (rank == "1")
        assert (root / "c.safetensors").read_bytes() == whole, "two processes: other bytes"
        assert "is complete" in cache(root / "a.npz", root / "c.safetensors", *flags)
        no = lambda *args, words: complains(data, "latents", *args, words=words)
        new = root / "new.safetensors"
        no(root / "a.npz", root / "new.zip", *flags, words=["new.zip", ".safetensors"])
        no(root / "a.npz", new, "--vae", vae, "--size", 15, words=["--size 15", "multiple of 2"])
        no(root / "a.npz", new, "--vae", root / "a.npz", "--size", 16, words=["a.npz"])
        no(root / "c.safetensors", new, *flags, words=["holds latents", "pictures"])
        no(root / "a.npz", new, *flags, "--batch", 0, words=["--batch 0"])
        complains(data, "prepare", root / "c.safetensors", root / "c.zip", "--size", 16, words=["holds latents"])
        assert not [p for p in root.iterdir() if "new" in p.name or p.name.startswith(".")]
        refused(lambda: data.open_dataset(root / "c.safetensors", 32), "8 x 8", "32 x 32", "--size")
        refused(lambda: data.open_dataset(vae, 8), "holds no latents")
        (root / "s.safetensors").write_bytes(whole.replace(b'"0.18215"', b'"0.13025"'))
        refused(lambda: data.open_dataset(root / "s.safetensors", 8), "0.13025", "0.18215")


def test_training_on_latents():
    """From pictures to pictures: cached, trained, resumed as if never stopped, grids on the way, samples after."""
    with folder() as root, preset("tiny", **LATENT_PRESET, xflip=True):
        vae = vae_file(root / "v.safetensors")
        np.savez(root / "a.npz", np.stack([data.Shapes(16).read(i) for i in range(40)]), arr_1=np.arange(40) % 10)
        cache(root / "a.npz", root / "z.safetensors", "--vae", vae, "--size", 16)
        flags = ("--preset", "tiny", "--data", root / "z.safetensors")

        def trained(out, *more):
            code, said = command(train, *flags, "--out", root / out, *more)
            assert code == 0, said
            return torch.load(root / out / "last.pt", weights_only=True)
        whole = trained("whole", "--vae", vae)
        trained("parts", "--kimg", 0.024, "--workers", 2)
        assert same(whole, trained("parts")), "the resumed run differs"
        assert Image.open(root / "whole/samples-000000.png").size == (10 * 66 + 2, 4 * 66 + 2)
        assert not (root / "parts/samples-000000.png").exists(), "no VAE, no grids"
        code, said = command(sample, "--ckpt", root / "whole/last.pt", "--n", 2, "--out", root / "x.png")
        assert code == 0 and Image.open(root / "x.png").size == (134, 68), said  # the checkpoint names its VAE
        no = lambda *args, words: complains(train, *args, "--out", root / "new", words=words)
        other = write_safetensors(root / "w.safetensors", {n: v * 1.1 for n, v in small_vae().state_dict().items()})
        no(*flags, "--vae", other, words=["w.safetensors", "is not the one that made", "z.safetensors"])
        no("--preset", "tiny", "--data", root / "a.npz", words=["a.npz holds pictures", "data.py latents", "--vae"])
        no(*flags, "--input-size", 16, words=["8 x 8", "16 x 16"])
        no("--data", root / "z.safetensors", "--input-size", 8, words=["latents of 4 channels", "takes 3"])
        no("--vae", vae, words=["--vae", "pixels"])
        no(*flags, "--clip", words=["--clip", "latents"])
        assert not (root / "new").exists()


# ---------------------------------------------------------------------------------------------
# configs.py

def test_every_preset_takes_a_step_and_samples():
    """Reduced in width and depth, through the same code."""
    for name, cfg in configs.PRESETS.items():
        small = (dict(hidden_size=16, depth=1, num_heads=2) if cfg.model in ("diffit", "dit") else
                 dict(channels=(8,) * len(cfg.channels), blocks=(1,) * len(cfg.blocks), num_heads=2, cond_size=16))
        cfg = dataclasses.replace(cfg, **small, steps=2)
        torch.manual_seed(0)
        model, process = diffit.build(cfg), diffusion.build(cfg)
        x = torch.randn(2, cfg.in_channels, cfg.input_size, cfg.input_size)
        y = torch.tensor([0, cfg.num_classes - 1]) if cfg.num_classes else None
        done = None
        if cfg.augment:
            x, done = data.augment(x, cfg.augment)
        loss = process.loss(lambda x, t: model(x, t, y, done), x, process.draw(2))["loss"].mean()
        loss.backward()
        assert loss.isfinite(), name
        for made, _ in sample.generate(model.eval(), cfg, [0]):
            assert made.shape == x[:1].shape and made.isfinite().all(), name


def test_flags_and_presets():
    cfg = configs.config_from(
        "dit-s-2", {"lr": 3e-4, "process": "edm", "learn_sigma": False, "sampler": "heun"})
    assert (cfg.lr, cfg.process, cfg.hidden_size, cfg.diffusion_steps) == (3e-4, "edm", 384, 1000)
    unet = configs.config_from("shapes", {"model": "unet", "channels": (8, 8), "blocks": (1, 1)})
    assert (unet.hidden_size, unet.patch_size, unet.data) == (0, 0, "shapes")
    assert configs.numbers("4,4,0.5") == (4, 4, 0.5) and isinstance(configs.numbers("4")[0], int)
    for given, words in [({"hidden_size": 7.5e400}, ["--hidden-size"]),
                         ({"channels": (8,)}, ["--channels", "unet"]),
                         ({"lr": -1.0}, ["--lr -1.0"]),
                         ({"sampler": "dpmp"}, ["dpmp", "did you mean dpmpp"]),
                         ({"batch_size": 64, "micro_batch": 7}, ["7", "64"]),
                         ({"num_classes": 0}, ["--cfg 4", "classes"]),
                         ({"learn_sigma": True}, ["--learn-sigma", "ddpm"]),
                         ({"kimg": 0.0}, ["--kimg"]),
                         ({"dropout": 0.5}, ["--dropout"]),
                         ({"steps": 2000, "process": "ddpm"}, ["2000", "1000"]),
                         ({"cfg_interval": (1,)}, ["LOW,HIGH"]), ({"cfg_interval": (5, 1)}, ["LOW,HIGH"]),
             ({"eta": 0.5}, ["--eta", "ddim"]), ({"sampler": "ddim", "eta": 2.0}, ["--eta 2.0"]),
             ({"save_kimg": 0.5}, ["--save-kimg 0.5"]),
             ({"sigma_min": 90.0}, ["--sigma-min"]), ({"class_dropout_prob": 0.0}, ["--class-dropout-prob"]),
             ({"model": "unet", "channels": (8.5,), "blocks": (1,)}, ["whole numbers"]),
                         ({"beta2": 1.0}, ["--beta2"])]:
        refused(lambda: configs.config_from("shapes", given), *words)
    refused(lambda: configs.config_from("fhq64", {}), "fhq64", "did you mean ffhq64")


def test_table_of_presets():
    """python configs.py: every preset builds at full size, on the meta device, and can list its levels."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        argv, sys.argv = sys.argv, ["configs.py"]
        configs.main()
        sys.argv = argv
    lines = [line.split() for line in said.getvalue().splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in configs.PRESETS}
    assert list(rows) == list(configs.PRESETS) and sum(name.startswith("dit-") for name in rows) == 15
    assert said.getvalue().count("\nDiffiT Table 3\n") == 1
    assert rows["dit-xl-2"][-4:] == ["2.27", "675M,", "119", "GFLOPs"]
    assert rows["imagenet256"][1:6] == ["diffit", "561.04M", "118.51", "256", "1.73"], rows["imagenet256"]
    assert {"shapes", "cifar10", "ffhq64", "imagenet256-depth30", "imagenet512", "cifar100-450x6"} <= set(rows)
    for name, cfg in configs.PRESETS.items():
        assert len(diffusion.build(cfg).levels(cfg.steps)) == cfg.steps and configs.SOURCES[name][0], name


def test_every_row_of_the_papers_tables_is_there():
    """The FIDs that DiffiT's tables report, by the preset that trains them."""
    paper = {"cifar10": 1.95, "ffhq64": 2.22, "imagenet256": 1.73, "imagenet512": 2.67, "dit-xl-2": 2.27,
             "dit-xl-2-512": 3.04, "cifar10-512-512": 1.99, "cifar10-256-256": 2.13,
             "ffhq64-512-512": 2.27, "ffhq64-256-256": 2.41,
             "cifar10-a-vit-setr": 5.34, "cifar10-b-plain-setr": 4.64, "cifar10-c-plain-plain": 3.71,
             "cifar10-d-diffit-plain": 2.27, "ddpmpp-ve": 3.77, "ddpmpp-ve-tmsa": 3.49, "ddpmpp-vp": 3.01,
             "ddpmpp-vp-tmsa": 2.76, "cifar10-f-time-bias": 3.97, "cifar10-g-time-mlp": 3.81,
             "cifar10-time-token": 2.28, "ffhq64-time-token": 2.59, "cifar10-fourier": 2.02, "ffhq64-fourier": 2.37}
    assert {name: fid for name, (_, fid) in configs.SOURCES.items() if fid} == paper
    edm = configs.PRESETS["cifar10"], configs.PRESETS["ffhq64"]
    assert [(c.augment, c.dropout, c.xflip, c.steps, c.batch_size, c.lr, c.nonfinite) for c in edm] == [
        (0.12, 0.13, False, 18, 512, 1e-3, "zero"), (0.15, 0.05, True, 40, 256, 2e-4, "zero")]


# ---------------------------------------------------------------------------------------------
# train.py

def test_ema():
    cfg = dataclasses.replace(configs.PRESETS["shapes"], ema_decay=0.9)
    model = nn.Linear(1, 1, bias=False)
    ema = train.EMA(model, cfg)
    start = ema.model.weight.item()
    for k in range(5):
        nn.init.constant_(model.weight, k)
        ema.update(images=0)
    close(ema.model.weight.item(), 0.9 ** 5 * start + sum(0.1 * 0.9 ** (4 - k) * k for k in range(5)), 1e-6)
    cfg = dataclasses.replace(cfg, ema_decay=0.0, ema_halflife_kimg=1.0, ema_rampup=0.05, batch_size=100)
    ema = train.EMA(model, cfg)
    close(ema.beta(1e6) ** 10, 0.5, 1e-12, "half after a half-life of 1000 images")
    close(ema.beta(4000), 0.5 ** (100 / 200), 1e-12, "ramp: 5 % of 4000 images")
    assert ema.beta(0) == 0, "the first step is copied"


def test_learning_rate():
    cfg = dataclasses.replace(configs.PRESETS["shapes"], lr=2.0, lr_rampup_kimg=10, lr_decay="constant",
                              kimg=100)
    close([train.learning_rate(cfg, n) for n in (0, 2500, 10_000, 90_000)], [0, 0.5, 2, 2], 1e-12)
    cfg = dataclasses.replace(cfg, lr_decay="cosine", lr_rampup_kimg=0.0)
    close([train.learning_rate(cfg, n) for n in (0, 25_000, 50_000, 100_000)],
          [2, 1 + math.sqrt(0.5), 1, 0], 1e-12)


def test_training_lowers_the_loss_and_writes_its_files():
    with folder() as root:
        code, said = command(train, *TINY, "--out", root / "run", "--kimg", 1.2, "--sample-kimg", 1,
                             "--save-kimg", 1)
        assert code == 0 and "complete" in said, said
        log = [json.loads(line) for line in (root / "run/log.jsonl").read_text().splitlines()]
        assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["step"] == 150, (log[0], log[-1])
        assert {"kimg", "lr", "grad_norm", "mse", "images_per_s", "skipped", "unreadable",
                "memory_gb"} <= log[0].keys()
        names = {p.name for p in (root / "run").iterdir()}
        assert {"config.json", "log.jsonl", "loss.png", "last.pt", "previous.pt", "000001.pt",
                "samples-000001.png"} == names, names
        assert Image.open(root / "run/loss.png").size == (1200, 800)
        code, said = command(train, *TINY, "--out", root / "run", "--kimg", 1.2)
        assert code == 0 and "complete" in said


def test_resumed_equals_unbroken():
    """Stopped by a signal in the middle of a tick and started again by the same command: every tensor and the log,
    bit for bit."""
    with folder() as root:
        whole, read, count = tiny_run(root / "whole"), data.Shapes.read, [0]

        def interrupting(self, i):
            count[0] += 1
            if count[0] == 20:                                             # in the third of ten steps
                os.kill(os.getpid(), signal.SIGTERM)
            return read(self, i)
        data.Shapes.read = interrupting
        try:
            code, said = command(train, *TINY, "--out", root / "parts", "--kimg", 0.08)
        finally:
            data.Shapes.read = read
        assert code == 143 and "stopped by SIGTERM and saved" in said, said
        assert torch.load(root / "parts/last.pt", weights_only=True)["step"] == 3
        parts = tiny_run(root / "parts")
        assert whole["step"] == parts["step"] == 10 and same(whole, parts), "the resumed run differs"
        assert len(parts["progress"]["log"]) == 5
        other = tiny_run(root / "other", "--seed", 1)
        assert not same(whole["model"], other["model"])


def test_micro_batches_add_up_to_the_batch():
    """The gradient of 2 x 4 images is that of 8: with dropout, noise and timesteps out of the way, the same
    steps."""
    cfg = dataclasses.replace(configs.PRESETS["shapes"], hidden_size=16, depth=1, num_heads=2,
                              class_dropout_prob=0.0, cfg=1.0, batch_size=8)

    def gradients(micro):
        torch.manual_seed(0)
        model, images = diffit.build(cfg), np.stack([data.Shapes(32).read(i) for i in range(8)])
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 128 - 1
        process, noise = diffusion.build(cfg), torch.randn(8, 3, 32, 32)
        sigma, y = torch.rand(8) + 0.1, torch.arange(8)
        for part in torch.arange(8).split(micro):
            loss = process.loss(lambda x, t: model(x, t, y[part]), x[part], sigma[part], noise[part])["loss"]
            (loss.mean() * micro / 8).backward()
        return model
    for a, b in zip(gradients(8).parameters(), gradients(4).parameters()):
        close(a.grad, b.grad, 1e-6)
    with folder() as root:
        state = tiny_run(root / "run", "--micro-batch", 4)
        assert state["step"] == 10 and state["progress"]["log"][-1]["loss"] > 0


def test_signal_finishes_the_step_and_saves():
    with folder() as root:
        run = [sys.executable, "train.py", *map(str, TINY), "--kimg", "1000", "--out", str(root / "run")]
        process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
        while "loss" not in process.stderr.readline():         # the first tick: training is under way
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert (process.returncode == 143 and "stopped by SIGTERM and saved" in said
                and "Traceback" not in said), said
        stopped = torch.load(root / "run/last.pt", weights_only=True)
        whole = tiny_run(root / "again", kimg=stopped["step"] * 8 / 1000)
        for part in ("step", "model", "ema", "optimizer"):
            assert same(stopped[part], whole[part]), f"{part}: stopped is not like never stopped"


def test_non_finite_steps_are_skipped_and_ten_in_a_row_end_the_run():
    cfg = configs.config_from("shapes", dict(hidden_size=16, depth=1, num_heads=2, batch_size=8, kimg=0.16,
                                             workers=0, tick_kimg=0.16, steps=2, sample_kimg=9.0))
    loss, count = EDM.loss, [0]

    def poisoned(bad):
        def replacement(self, f, x0, t, noise=None):
            count[0] += 1
            losses = loss(self, f, x0, t, noise)
            return {n: v * (math.nan if bad(count[0]) else 1) for n, v in losses.items()}
        return replacement
    try:
        with folder() as root:
            EDM.loss, count[0] = poisoned(lambda k: k in (3, 4, 9)), 0
            state = train_here(cfg, root / "a")
            assert state["progress"]["skipped"] == 3 and math.isfinite(state["progress"]["log"][-1]["loss"])
            assert all(v.isfinite().all() for v in state["ema"].values())
            EDM.loss, count[0] = poisoned(lambda k: k > 5), 0
            refused(lambda: train_here(cfg, root / "b"), "10 steps in a row", "step 14")
    finally:
        EDM.loss = loss


def test_gradients_that_are_no_numbers_become_zero():
    """EDM's way: a step whose gradient is NaN in one parameter moves that one as a gradient of zero would, the others
    as ever; it is counted."""
    cfg = configs.config_from("shapes", dict(hidden_size=16, depth=1, num_heads=2, batch_size=8, nonfinite="zero",
                                             grad_clip=0.0, precision="fp32"))
    x, y = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    ends = []
    for poison in (math.nan, 0.0):
        trainer = train.Trainer(cfg, torch.device("cpu"))
        for p in trainer.parameters:                                       # a fresh head is zero and hides the rest
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
        hook = trainer.parameters[0].register_hook(lambda grad: grad * poison)
        norms = trainer.step(100, iter([(x, y, [])]))[1]
        assert (norms is None) == math.isnan(poison)
        hook.remove()
        ends.append([p.detach().clone() for p in trainer.parameters])
    for a, b in zip(*ends):
        assert a.isfinite().all() and torch.equal(a, b)


def test_study_makes_a_table_and_resumes():
    with folder() as root:
        flags = ("--study", "--out", root / "s", "--hidden-size", 16, "--depth", 1, "--num-heads", 2, "--batch-size", 8,
                 "--kimg", 0.016, "--tick-kimg", 0.008, "--steps", 2, "--workers", 0, "--lr-rampup-kimg", 0)
        real, said = train.study, io.StringIO()
        train.study = lambda out, flags: real(out, flags, seeds=2, n=20)
        try:
            code, said = command(train, *flags)
            assert code == 0, said
            rows = [line for line in said.splitlines() if line.startswith("| ")][1:]
            assert [row.split(" | ")[0][2:] for row in rows] == list(train.STUDY)
            assert len(list((root / "s").iterdir())) == 14
            again = command(train, *flags)[1].splitlines()
            assert [line for line in again if line.startswith("| ")][1:] == rows, "nothing is trained twice"
        finally:
            train.study = real
        complains(train, *flags, "--time-in", "token", words=["--time-in", "leave out"])
        complains(train, *flags, "--preset", "cifar10", words=["--study", "--preset"])


def test_real_pictures_train_resume_and_sample():
    """python train.py --preset cifar10 --data FOLDER, .zip, .npz: mixed sizes, modes and formats, one file
    truncated."""
    small = ("--preset", "cifar10", "--channels", "8,8,8", "--blocks", "1,1,1", "--num-heads", 2,
             "--cond-size", 16, "--batch-size", 4, "--steps", 2, "--tick-kimg", 0.008, "--workers", 1)
    with folder() as root:
        pictures(root / "pics")
        files = data.Files(root / "pics", 32)
        good = [i for i, n in enumerate(files.names) if "broken" not in n]
        np.savez(root / "pics.npz", np.stack([files.read(i) for i in good]))
        zipped(root / "pics", root / "pics.zip")
        for name in ("pics", "pics.zip", "pics.npz"):
            for kimg in (0.008, 0.016):
                code, said = command(train, *small, "--data", root / name, "--out", root / f"run-{name}",
                                     "--kimg", kimg)
                assert code == 0, said
                assert ("skipped dogs/broken.png" in said) == (
                    name != "pics.npz" and kimg == 0.008 or "dogs/broken.png" in said), said
            assert "resumed" in said
            code, said = command(sample, "--ckpt", root / f"run-{name}/last.pt", "--n", 2,
                                 "--out", root / f"{name}.png")
            assert code == 0 and Image.open(root / f"{name}.png").size == (134, 68), said


def test_training_refuses_what_it_cannot_do():
    with folder() as root:
        pictures(root / "pics")
        out = ("--out", root / "new")
        complains(train, "--preset", "imagnet256", *out, words=["imagnet256", "did you mean imagenet256"])
        complains(train, "--hiden-size", 3, *out, words=["--hiden-size", "did you mean --hidden-size"])
        complains(train, "--lr", "fast", *out, words=["--lr", "fast"])
        complains(train, "--preset", "cifar10", *out, words=["--data", "'shapes'"])
        complains(train, "--preset", "cifar10", "--data", root / "nothing", *out, words=["nothing"])
        complains(train, "--preset", "imagenet256", "--data", root / "pics", *out,
                  words=["holds pictures", "takes latents", "--size 256"])
        complains(train, "--input-size", 30, *out, words=["30 x 30", "multiple"])
        complains(train, "--num-classes", 5, *out, words=["label 9", "0 to 4", "--num-classes 10"])
        np.savez(root / "plain.npz", np.zeros((3, 32, 32, 3), np.uint8))
        complains(train, "--data", root / "plain.npz", *out, words=["no labels", "--num-classes 0"])
        complains(train, "--steps", 0, *out, words=["--steps"])
        complains(train, "--init-from", root / "no.pt", *out, words=["no.pt"])
        assert not (root / "new").exists(), "a refused run leaves nothing behind"
        complains(train, "--out", root / "pics", words=["no run of train.py"])
        complains(train, "--out", root / "plain.npz", words=["is a file"])


def test_a_folder_with_another_run_is_kept():
    with folder() as root:
        before = tiny_run(root / "run")
        files = {p.name: p.read_bytes() for p in (root / "run").iterdir()}
        complains(train, *TINY, "--out", root / "run", "--lr", 0.5,
                  words=["another run", "lr is 0.001 there and 0.5 here"])
        complains(train, *TINY, "--out", root / "run", "--overwrite", "--data", root / "none", words=["none"])
        assert files == {p.name: p.read_bytes() for p in (root / "run").iterdir()}, \
            "a refused run changed files"
        after = tiny_run(root / "run", "--lr", 0.5, "--overwrite")
        assert after["config"]["lr"] == 0.5 and not same(before["model"], after["model"])
        (root / "run/last.pt").write_bytes((root / "run/last.pt").read_bytes()[:5000])
        complains(train, *TINY, "--out", root / "run", "--lr", 0.5, "--kimg", 5, words=["last.pt", "truncated"])
        (root / "run/config.json").write_text("{")
        complains(train, *TINY, "--out", root / "run", words=["config.json", "damaged"])


def test_init_from_takes_the_ema_weights():
    with folder() as root:
        state = tiny_run(root / "a")
        code, said = command(train, *TINY, "--out", root / "b", "--kimg", 0.008, "--lr", 1e-12,
                             "--init-from", root / "a/last.pt")
        assert code == 0, said
        for name, value in torch.load(root / "b/last.pt", weights_only=True)["model"].items():
            close(value, state["ema"][name], 1e-6, name)
        complains(train, *TINY, "--hidden-size", 64, "--out", root / "c", "--init-from", root / "a/last.pt",
                  words=["do not fit", "expected"])


def test_init_from_another_number_of_classes_and_another_resolution():
    """The label table alone begins anew; positions are made for the new grid; the bias by relative position is
    interpolated: of a table that is linear in the offsets, to one that is linear over the same range."""
    with folder() as root, preset("tiny", **LATENT_PRESET), preset("large", **{**LATENT_PRESET, "input_size": 16}):
        model = fill(diffit.DiffiT(**SMALL))
        slope = torch.linspace(-1, 1, 7)                                   # a 4 x 4 grid has offsets of -3 to 3
        linear = (slope[:, None] + 2 * slope)[..., None] * torch.arange(1.0, 5)
        state = {**model.state_dict(), "blocks.1.attn.relative_position_bias_table": linear.view(49, 4)}
        write_safetensors(root / "x.safetensors", state)
        network = diffit.DiffiT(**{**SMALL, "input_size": 16, "num_classes": 4})
        weights, done = train.adapted(state, network, "x")
        slope = torch.linspace(-1, 1, 15)
        close(weights["blocks.1.attn.relative_position_bias_table"].view(15, 15, 4),
              (slope[:, None] + 2 * slope)[..., None] * torch.arange(1.0, 5), 1e-5)
        assert len(done) == 3 and "10 classes there and 4 here" in done[0] and "64 tokens" in done[1], done
        left = {"y_embedder.embedding_table.weight", "pos_embed"}
        assert weights.keys() == state.keys() - left
        for name in weights:
            if "relative" not in name:
                assert torch.equal(weights[name], state[name]), name
        assert train.adapted(state, model, "x") == (state, [])

        np.savez(root / "a.npz", np.stack([data.Shapes(32).read(i) for i in range(8)]), arr_1=np.arange(8) % 4)
        cache(root / "a.npz", root / "z.safetensors", "--vae", vae_file(root / "v.safetensors"), "--size", 32)
        flags = ("--preset", "large", "--data", root / "z.safetensors", "--init-from", root / "x.safetensors")
        code, said = command(train, *flags, "--num-classes", 4, "--lr", 1e-12, "--kimg", 0.004, "--out", root / "run")
        assert code == 0 and "10 classes there and 4 here" in said and "interpolated" in said, said
        state = torch.load(root / "run/last.pt", weights_only=True)["model"]
        assert state["y_embedder.embedding_table.weight"].shape == (5, 64)
        assert torch.equal(state["pos_embed"], diffit.sincos_2d(64, 8))
        for name in weights:
            close(state[name], weights[name], 1e-6, name)
        complains(train, *flags, "--hidden-size", 32, "--out", root / "new", words=["do not fit", "of another shape"])


def test_checkpoints_hold_tensors_and_plain_values_and_survive_a_failed_write():
    with folder() as root:
        tiny_run(root / "run")
        before = (root / "run/last.pt").read_bytes()
        real = os.fsync

        def full_disk(descriptor):
            raise OSError(28, "No space left on device")
        os.fsync = full_disk
        try:
            complains(train, *TINY, "--out", root / "run", "--kimg", 0.16, words=["No space left"])
        finally:
            os.fsync = real
        assert (root / "run/last.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------
# train.py on several processes, and through faults

LOSS_AWARE = dict(process="ddpm", learn_sigma=True, diffusion_steps=4, timesteps="loss-aware", sampler="ddpm")
SMALL_NETWORKS = {
    "edm": dict(hidden_size=16, depth=2, num_heads=2),
    "diffit": dict(LOSS_AWARE, hidden_size=16, depth=2, num_heads=2),
    "dit": dict(LOSS_AWARE, model="dit", hidden_size=16, depth=2, num_heads=2),
    "unet": dict(LOSS_AWARE, model="unet", channels=(8, 8), blocks=(1, 1), cond_size=16, num_heads=2, dropout=0.1)}


def train_small_networks(root):
    """Twenty steps of eight images for each network, in micro-batches of four; on the CPU, in fp32."""
    for name, fields in SMALL_NETWORKS.items():
        cfg = configs.config_from("shapes", dict(
            fields, batch_size=8, micro_batch=4, kimg=0.16, tick_kimg=0.04, steps=3, workers=0, precision="fp32"))
        train_here(cfg, root / name)


def test_two_processes_equal_one():
    """Two processes of one micro-batch each, and one process of two: weights, EMA, optimizer, timesteps, log and the
    images made on the way, bit for bit."""
    with folder() as one, folder() as two:
        with one_thread():
            train_small_networks(one)
        in_two_processes(train_small_networks, two)
        for name in SMALL_NETWORKS:
            a, b = (torch.load(root / name / "last.pt", weights_only=True) for root in (one, two))
            assert sorted(b.pop("averager")["order"]) == list(range(len(a["optimizer"]["state"])))
            assert a.pop("averager") == {}, "one process has no order of its own"
            assert a["step"] == 20 and same(a, b), f"{name}: two processes differ from one"
            assert name == "edm" or a["timesteps"]["counts"].min() > 10, "the losses came to steer the timesteps"
            images = [np.asarray(Image.open(root / name / "samples-000000.png")) for root in (one, two)]
            assert abs(np.subtract(*images, dtype=int)).max() <= 1, f"{name}: other images"


def average_like_torch():
    """In each of two processes: gradients from GradientAverager and from DistributedDataParallel, five steps of
    their own data, in buckets of a few parameters; the second of two micro-batches communicates."""
    rank = sample.rank_and_size()[0]
    torch.manual_seed(rank)                                                # rank 0's parameters must reach rank 1
    ours = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    averager = train.GradientAverager(list(ours.parameters()), bucket_mb=200 / 2 ** 20)
    torchs = nn.parallel.DistributedDataParallel(nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]))
    torchs.module.load_state_dict(ours.state_dict())
    assert len(averager.buckets) > 4
    for step in range(5):
        x = torch.randn(2, 4, 8)
        for k in range(2):
            if k == 1:
                averager.start()
            (ours(x[k]).pow(2).sum() / 2).backward()
            with contextlib.nullcontext() if k == 1 else torchs.no_sync():
                torchs(x[k]).pow(2).sum().backward()
        averager.finish()
        for p, q in zip(ours.parameters(), torchs.parameters()):
            close(p.grad, q.grad, 1e-6, f"step {step}")
            q.grad = p.grad = None
    assert averager.seen is None and [averager.number[p] for p in averager.buckets[0]][0] > 9, "the last layer is first"


def test_averaged_gradients_equal_those_of_torch():
    in_two_processes(average_like_torch)


def test_a_lost_process_and_a_missing_one_end_in_a_sentence():
    with folder() as root:
        where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        pair = [start("--out", root / "run", "--kimg", 1000, RANK=str(r), LOCAL_RANK=str(r), **where) for r in (0, 1)]
        while "loss" not in pair[0].stderr.readline():
            assert pair[0].poll() is None
        pair[1].kill()
        said = pair[0].communicate(timeout=60)[1]
        pair[1].communicate()
        assert pair[0].returncode == 2 and "rank 0 lost the other processes" in said and "Traceback" not in said, said
        alone = start("--out", root / "alone", prepare="import sample; sample.PATIENCE *= 1 / 300",
                      RANK="0", LOCAL_RANK="0", **dict(where, MASTER_PORT=str(free_port())))
        said = alone.communicate(timeout=60)[1]
        assert alone.returncode == 2 and "could not meet the others" in said and "Traceback" not in said, said
        assert not (root / "alone").exists()


def test_killed_again_and_again_equals_unbroken():
    """kill -9 at four moments, drawn at random, of a run that saves every 125 steps."""
    flags, moments = ("--kimg", 4, "--save-kimg", 1), random.Random(0)
    with folder() as root:
        for _ in range(4):
            process = start("--out", root / "run", *flags)
            while "kimg" not in process.stderr.readline():
                pass
            time.sleep(moments.uniform(0, 2))
            process.kill()
            process.communicate()
        for name in ("whole", "run"):
            start("--out", root / name, *flags).communicate()
        whole, parts = (torch.load(root / name / "last.pt", weights_only=True) for name in ("whole", "run"))
        assert parts["step"] == 500 and same(whole, parts), "the resumed run differs"


def test_a_full_disk_leaves_the_checkpoint_before_whole():
    with folder() as root:
        tiny_run(root / "run", kimg=0.04)
        before = (root / "run/last.pt").read_bytes()
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, -1))"
        full = start("--out", root / "run", "--kimg", 0.08, prepare=limit)
        said = full.communicate(timeout=60)[1]
        assert full.returncode == 2 and "could not be written" in said and "Traceback" not in said, said
        assert (root / "run/last.pt").read_bytes() == before and not list((root / "run").glob(".*"))
        resumed, whole = tiny_run(root / "run"), tiny_run(root / "whole")
        assert all(same(resumed[part], whole[part]) for part in ("step", "model", "ema", "optimizer"))


def test_a_truncated_checkpoint_gives_way_to_the_one_before():
    with folder() as root:
        for kimg in (0.04, 0.064):
            tiny_run(root / "run", kimg=kimg)
        last = root / "run/last.pt"
        last.write_bytes(last.read_bytes()[:3000])
        code, said = command(train, *TINY, "--out", root / "run", "--kimg", 0.08)
        assert code == 0 and "last.pt is truncated" in said and "going on from" in said and "previous.pt" in said, said
        resumed, whole = torch.load(last, weights_only=True), tiny_run(root / "whole")
        assert all(same(resumed[part], whole[part]) for part in ("step", "model", "ema", "optimizer"))
        for file in (root / "run").glob("*.pt"):
            file.write_bytes(b"")
        complains(train, *TINY, "--out", root / "run", "--kimg", 0.08, words=["truncated", "--overwrite"])


def test_a_signal_to_every_process_reaches_the_workers_too():
    with folder() as root:
        process = start("--out", root / "run", "--kimg", 1000, workers=2)
        while "loss" not in process.stderr.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 143 and "stopped by SIGTERM and saved" in said and "Traceback" not in said, said


def test_keep_bounds_the_numbered_checkpoints():
    with folder() as root:
        tiny_run(root / "run", "--keep", 2, "--save-kimg", 1, kimg=4)
        assert [p.name for p in sorted((root / "run").glob("0*.pt"))] == ["000003.pt", "000004.pt"]
        assert torch.load(root / "run/previous.pt", weights_only=True)["step"] == 375


def test_the_log_adds_up():
    """Quarters average to the loss, parts of the gradient to its norm, mse and vlb to the loss; the condition's norms
    are those of the embeddings."""
    with folder() as root:
        state = tiny_run(root / "run", "--process", "ddpm", "--learn-sigma", "--sampler", "ddpm", "--tick-kimg", 0.008,
                         "--class-dropout-prob", 0, "--cfg", 1)
        for entry in state["progress"]["log"]:
            close(entry["mse"] + entry["vlb"], entry["loss"], 1e-5)
            close(math.hypot(*entry["grad_norm_parts"].values()), entry["grad_norm"], 1e-5)
        assert set(entry["grad_norm_parts"]) == {"x_embedder", "t_embedder", "y_embedder", "blocks.0", "final_layer"}
        assert 0 < entry["condition_norm"]["mean"] <= entry["condition_norm"]["max"]
    for process, levels in [(Diffusion(8), torch.arange(8)), (EDM(), EDM(p_mean=-1.2).draw(100_000))]:
        counts = torch.bincount(process.quarter(levels), minlength=4) / len(levels)
        close(counts, [0.25] * 4, 0.01), "each quarter has its share"
        assert (process.quarter(levels.sort().values).diff() >= 0).all(), "quarters rise with the noise"


def test_recomputing_blocks_changes_nothing():
    with folder() as root:
        for name in ("diffit", "unet"):
            cfg = configs.config_from("shapes", dict(SMALL_NETWORKS[name], batch_size=4, kimg=0.016, steps=1, workers=0,
                                                     cfg=1.0, precision="fp32"))
            again = dataclasses.replace(cfg, checkpoint_blocks=True)
            assert same(train_here(cfg, root / name), train_here(again, root / f"{name}-again")), name


def test_fp16_scales_its_losses():
    """Half precision with a scaler learns what fp32 learns; the scaler's state is saved."""
    with folder() as root:
        half, full = (tiny_run(root / p, "--precision", p, kimg=0.8) for p in ("fp16", "fp32"))
        assert half["scaler"]["scale"] > 1 and not full["scaler"]
        close(half["progress"]["log"][-1]["loss"], full["progress"]["log"][-1]["loss"], 0.03)


def test_bench_says_how_fast():
    code, said = command(train, "--bench", 1, "--hidden-size", 32, "--depth", 1)
    words = ("images/s", "TFLOP/s", "matrix product", "GB")
    assert code == 0 and all(word in said for word in words), said
    code, said = command(sample, "--bench", 1, "--batch", 2, "--steps", 3)
    assert code == 0 and all(word in said for word in (*words, "6.0 passes an image")), said


# ---------------------------------------------------------------------------------------------
# sample.py

@contextlib.contextmanager
def checkpoint(*flags):
    with folder() as root:
        tiny_run(root / "run", *flags, kimg=0.016)
        yield root, root / "run/last.pt"


def load_model(path, **options):
    with contextlib.redirect_stderr(io.StringIO()):
        return sample.load_model(path, device="cpu", **options)


def test_image_i_follows_from_seed_and_i():
    with checkpoint("--lr", 0.01) as (root, path):
        model, cfg = load_model(path)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        for settings in (dict(sampler="heun", cfg=2.0), dict(sampler="ddpm", cfg=1.0),
                         dict(sampler="ddim", eta=0.7, cfg=1.5), dict(sampler="dpmpp")):
            cfg = dataclasses.replace(cfg, **{"eta": 0.0, **settings})
            make = lambda indices, batch, seed=5: np.concatenate([
                data.to_uint8(x) for x, _ in sample.generate(model, cfg, indices, seed=seed, batch=batch)])
            all_at_once, in_parts, some = make(range(6), 6), make(range(6), 4), make([5, 2], 1)
            off = lambda a, b: np.abs(a.astype(int) - b.astype(int)).max()
            assert off(all_at_once, in_parts) <= 1 and off(all_at_once[[5, 2]], some) <= 1, settings
            assert off(all_at_once[0], all_at_once[1]) > 1 and off(all_at_once, make(range(6), 6, seed=6)) > 1


def test_classes():
    cfg = configs.PRESETS["shapes"]
    assert sample.labels_of(range(5), cfg, [2, 7]).tolist() == [2, 7, 2, 7, 2]
    shuffled = sample.labels_of(range(10), cfg).tolist()
    assert sorted(shuffled) == list(range(10)) == sample.parse_classes("all", cfg) and shuffled != list(range(10))
    assert sample.labels_of([13, 3], cfg).tolist() == 2 * [shuffled[3]]
    assert sample.parse_classes("207,360", dataclasses.replace(cfg, num_classes=1000)) == [207, 360]


def test_sampling_writes_grid_folder_and_npz():
    with checkpoint() as (root, path):
        flags = ("--ckpt", path, "--n", 5, "--batch", 2, "--classes", "3,1", "--sampler", "ddim",
                 "--eta", 0.5, "--cfg", 2, "--cfg-interval", "0.1,5")
        code, said = command(sample, *flags, "--out", root / "g.png", "--dir", root / "each",
                             "--npz", root / "a.npz")
        assert code == 0, said
        arrays = np.load(root / "a.npz")
        assert (arrays["arr_0"].shape == (5, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
                and arrays["arr_1"].tolist() == [3, 1, 3, 1, 3])
        names = sorted(p.name for p in (root / "each").iterdir())
        assert names == [f"{i:06}.png" for i in range(5)]
        assert all(np.array_equal(np.asarray(Image.open(root / "each" / n)), a)
                   for n, a in zip(names, arrays["arr_0"]))
        assert Image.open(root / "g.png").size == (2 * 66 + 2, 3 * 66 + 2), "a column for each class"
        raw, ema = (torch.load(path, weights_only=True)[k]["final_layer.linear.weight"]
                    for k in ("model", "ema"))
        assert torch.equal(load_model(path, raw=True)[0].final_layer.linear.weight, raw)
        assert torch.equal(load_model(path)[0].final_layer.linear.weight, ema) and not torch.equal(raw, ema)


def arrays(path):
    with np.load(path) as file:
        return file["arr_0"].astype(int), file["arr_1"].tolist()


def test_many_images_are_the_same_in_any_division_and_after_a_kill():
    """One process, two, another batch, parts lost and cut short, more images than at first: the same npz."""
    with checkpoint("--lr", 0.01) as (root, path):
        flags = ("--ckpt", path, "--classes", "1,4,2")

        def made(name, *more):
            code, said = command(sample, *flags, "--npz", root / name, *more)
            assert code == 0 and not (root / f"{name}.parts").exists(), said
            return arrays(root / name)
        whole, labels = made("whole.npz", "--n", 11, "--batch", 11)
        assert len(whole) == 11 and labels == [1, 4, 2] * 3 + [1, 4]

        def begin(name):
            """A run of nine images that was killed: a part is missing, one is cut short."""
            real, sample.write = sample.write, lambda *args: sys.exit("killed")
            try:
                command(sample, *flags, "--npz", root / name, "--n", 9, "--batch", 2)
            finally:
                sample.write = real
            parts = root / f"{name}.parts"
            assert [p.name for p in sorted(parts.glob("*.npy"))] == [f"{k:08}.npy" for k in (0, 2, 4, 6, 8)]
            (root / name).write_bytes(b"half of it")                       # as if it had been killed while writing
            complains(sample, *flags, "--npz", root / name, "--n", 9, words=[name, "exists"])  # is it ours?
            (parts / sample.OUTPUTS).write_text(str(root / name))
            complains(sample, *flags, "--npz", root / name, "--n", 8, words=["already holds 9 images", "--n 9"])
            (parts / "00000004.npy").unlink()
            (parts / "00000006.npy").write_bytes((parts / "00000006.npy").read_bytes()[:500])
            assert sample.missing(parts, 11, 3) == [(4, 7), (7, 8), (9, 11)]
            return parts
        begin("resumed.npz")
        for other in (("--seed", 5), ("--cfg", 1.5), ("--raw",), ("--classes", "3")):
            complains(sample, *flags, *other, "--npz", root / "resumed.npz", "--n", 11,
                      words=["resumed.npz.parts holds part of another run", other[0][2:]])
        resumed = made("resumed.npz", "--n", 11, "--batch", 3)
        begin("two.npz")
        port = str(free_port())
        pair = [launch("sample", *flags, "--npz", root / "two.npz", "--n", 11, "--batch", 2, MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
        assert all(process.wait(60) == 0 for process in pair), [process.stderr.read() for process in pair]
        assert not (root / "two.npz.parts").exists()
        for images, order in (resumed, arrays(root / "two.npz"), made("small.npz", "--n", 11, "--batch", 1)):
            assert np.abs(images - whole).max() <= 1 and order == labels
        assert np.abs(made("few.npz", "--n", 4)[0] - whole[:4]).max() <= 1
        (root / "mine.npz.parts").mkdir()
        (root / "mine.npz.parts/00000000.npy").write_bytes(b"precious")
        complains(sample, *flags, "--npz", root / "mine.npz", words=["mine.npz.parts", "something else"])
        assert (root / "mine.npz.parts/00000000.npy").read_bytes() == b"precious"


def test_a_film_goes_from_noise_to_the_image():
    with checkpoint("--lr", 0.01) as (root, path):
        flags = ("--ckpt", path, "--n", 4, "--classes", "1,2", "--steps", 12)
        for sampler in ("heun", "dpmpp"):
            gif, png = root / f"{sampler}.gif", root / f"{sampler}.png"
            code, said = command(sample, *flags, "--sampler", sampler, "--gif", gif, "--out", png)
            assert code == 0 and "x.gif" not in said, said
            film, last = Image.open(gif), np.asarray(Image.open(png).convert("RGB")).astype(int)
            assert film.n_frames == 13 and film.size == Image.open(png).size
            frame = lambda k: (film.seek(k), np.asarray(film.convert("RGB")).astype(int))[1]
            assert np.abs(frame(12) - last).mean() < 12, "the end: the image, in 256 colours"
            assert np.abs(frame(0) - last).mean() > 30, "the beginning: noise"
            assert not list(root.glob(".*")), "nothing is left behind"


def test_sampling_refuses_what_it_cannot_do():
    with checkpoint() as (root, path):
        no = lambda *args, words: complains(sample, "--ckpt", path, *args, words=words)
        out = ("--out", root / "x.png")
        complains(sample, "--ckpt", root / "none.pt", *out, words=["none.pt"])
        (root / "cut.pt").write_bytes(path.read_bytes()[:20_000])
        complains(sample, "--ckpt", root / "cut.pt", *out, words=["cut.pt", "truncated"])
        (root / "text.pt").write_text("no checkpoint")
        complains(sample, "--ckpt", root / "text.pt", *out, words=["text.pt"])
        torch.save({"weights": torch.zeros(3)}, root / "foreign.pt")
        complains(sample, "--ckpt", root / "foreign.pt", *out,
                  words=["foreign.pt", "does not say which network", "fits no preset"])
        state = torch.load(path, weights_only=True)
        torch.save({**state, "config": {**state["config"], "hidden_size": 64}}, root / "shape.pt")
        complains(sample, "--ckpt", root / "shape.pt", *out, words=["shape.pt", "of another shape", "expected"])
        torch.save({**state, "ema": {n: v for n, v in state["ema"].items() if "fc1" not in n}},
                   root / "less.pt")
        complains(sample, "--ckpt", root / "less.pt", *out, words=["2 missing", "fc1"])
        no("--classes", "3,10", *out, words=["no class 10", "0 to 9"])
        no("--classes", "-1", *out, words=["-1"])
        no("--classes", "cat", *out, words=["cat"])
        no("--steps", 0, *out, words=["--steps"])
        no("--n", 0, *out, words=["--n 0"])
        no("--sampler", "dpmpq", *out, words=["did you mean dpmpp"])
        no("--eta", 1, *out, words=["--eta", "ddim"])
        no("--cfgs", 2, *out, words=["--cfgs", "did you mean --cfg"])
        no("--out", root / "nowhere/x.png", words=["nowhere", "does not exist"])
        no("--out", root / "x.doc", words=["x.doc", ".png"])
        (root / "taken.png").write_bytes(b"precious")
        no("--out", root / "taken.png", words=["taken.png", "exists"])
        no("--dir", root / "run", words=["--dir", "exists"])
        no("--gif", root / "x.png", words=["x.png", ".gif"])
        no("--seed", -1, *out, words=["--seed -1"])
        no("--vae", path, *out, words=["--vae", "pixels"])
        no("--preset", "shapes", *out, words=["--preset shapes", "knows its own network"])
        assert (root / "taken.png").read_bytes() == b"precious" and not (root / "x.png").exists()
    with checkpoint("--process", "ddpm", "--sampler", "ddpm", "--num-classes", 0, "--cfg", 1) as (root, path):
        complains(sample, "--ckpt", path, "--steps", 1001, "--out", root / "x.png", words=["1001", "1 to 1000"])
        complains(sample, "--ckpt", path, "--classes", "all", "--out", root / "x.png",
                  words=["without classes"])
        complains(sample, "--ckpt", path, "--cfg", 2, "--out", root / "x.png", words=["--cfg 2", "classes"])


def test_a_classifier_recognises_real_shapes_and_no_others():
    shapes = data.Shapes(32, 200, seed=5)
    images = np.stack([shapes.read(i) for i in range(200)])
    right, real = sample.recognised(images, shapes.labels)
    assert right > 0.97 and real > 0.98, (right, real)


# ---------------------------------------------------------------------------------------------
# sample.py: scores

def inception_file(path, net=None):
    """Inception as its reference was filled, in the published format, which has no counters of batches."""
    def value(name, shape):
        if name.endswith("running_var"):
            return 1 + weight(name, shape)
        return weight(name, shape) * (1.6 if len(shape) == 4 else 1)
    state = (net or sample.Inception()).state_dict()
    torch.save({name: value(name, v.shape) for name, v in state.items() if "tracked" not in name}, path,
               _use_new_zipfile_serialization=False)
    return path


class SmallInception(nn.Module):
    """Quick features in Inception's place, where a test is of what happens to them."""
    pooled, spatial, logits = 16, 6, sample.Inception.logits

    def __init__(self):
        super().__init__()
        self.look, self.fc = nn.Conv2d(3, 16, 8, stride=4), nn.Linear(16, 5)

    def forward(self, x, resize="pytorch"):
        h = self.look(x.float() / 127.5 - (1 if resize == "pytorch" else 1.01)).tanh()
        return h.mean((2, 3)), h[:, :6, 2, 2]


USE_SMALL_INCEPTION = "import sample, test_all; sample.Inception = test_all.SmallInception"


@contextlib.contextmanager
def small_inception():
    """A folder with weights of SmallInception, which takes Inception's place meanwhile."""
    real, sample.Inception = sample.Inception, SmallInception
    try:
        with folder() as root:
            inception_file(root / "inception.pth")
            yield root
    finally:
        sample.Inception = real


def scores_said(said):
    """'FID 1.5, sFID 2, ...' -> {"fid": 1.5, ...}, and the line of provenance below."""
    lines = said.split("\n")
    at = next(k for k, line in enumerate(lines) if line.startswith("FID "))
    found = dict(part.lower().split() for part in lines[at].split(", "))
    return {name: float(value) for name, value in found.items()}, lines[at + 1]


def save_images(path, n, size=32, seed=0, first=0):
    """n shapes as ADM's evaluator reads them."""
    shapes = data.Shapes(size, first + n, seed)
    np.savez(path, arr_0=np.stack([shapes.read(i) for i in range(first, first + n)]))
    return path


def test_golden_inception():
    with folder() as root:
        net, digest = sample.load_inception(inception_file(root / "x.pth"))
        assert digest == data.file_hash(root / "x.pth")
    seen = {}
    for name in ("Mixed_6a", "Mixed_6e", "Mixed_6d.branch1x1"):
        net.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name.lower(), out))
    images = (128 + 40 * unit("s:inc", 2, 3, 32, 32)).clamp(0, 255).round()
    with torch.no_grad():
        seen["pool"], spatial = net(images.byte())
    seen["logits"] = net.fc(seen["pool"])
    for name, (index, values) in GOLDEN["inception"].items():
        close(seen[name].flatten()[index], values, 1e-5, name)
    assert spatial.shape == (2, 2023)
    close(spatial.view(2, 17, 17, 7).permute(0, 3, 1, 2), seen["mixed_6d.branch1x1"][:, :7], 0, "sFID's features")
    close(net.logits(seen["pool"]), seen["logits"] - net.fc.bias, 1e-5, "without the bias")


def test_golden_scores():
    gold = GOLDEN["scores"]
    real = unit("f:fa", 64, 8) @ (torch.eye(8) + 0.3 * unit("f:fm", 8, 8) / math.sqrt(8))
    fake = 1.2 * unit("f:fb", 80, 8) + 0.1
    found = sample.frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
    close(found, gold["frechet_distance"], 1e-6)
    close(sample.precision_recall(real, fake), (gold["precision"], gold["recall"]), 1e-6)
    close(sample.inception_score(2 * unit("f:lg", 64, 20)), gold["inception_score"], 1e-6)


def test_frechet_distance_of_known_gaussians():
    """N(0, I) and N(m, Q diag(s) Q^T): |m|^2 + sum (1 - sqrt s)^2. A set without full rank is at 0 from itself."""
    torch.manual_seed(0)
    q, s, m = torch.linalg.qr(torch.randn(6, 6).double())[0], torch.rand(6).double() * 4, torch.randn(6).double()
    expected = m.square().sum() + (1 - s.sqrt()).square().sum()
    a, b = (torch.zeros(6), torch.eye(6)), (m, q * s @ q.T)
    close(sample.frechet_distance(*a, *b), expected, 1e-12)
    close(sample.frechet_distance(*(v.numpy() for v in b), *a), expected, 1e-12, "the other way round, from numpy")
    few = 100 * torch.randn(5, 40).double()
    mean, covariance = few.mean(0), few.T.cov()
    assert sample.frechet_distance(mean, covariance, mean, covariance) < 1e-8
    close(sample.frechet_distance(mean, covariance, mean + 1, covariance), 40, 1e-9, "moved by 1 in 40 directions")


def test_inception_score_by_splits():
    sure = torch.eye(4).repeat(5, 1) * 100                                 # all four classes, each certain
    close(sample.inception_score(sure), 4, 1e-12)
    close(sample.inception_score(torch.zeros(7, 4)), 1, 1e-12, "no idea")
    logits = torch.cat([sure[:8], sure[:1].repeat(4, 1)])                  # then but one class
    close(sample.inception_score(logits, split=8), (4 + 1) / 2, 1e-12, "two splits")


def test_precision_and_recall_equal_the_naive_form():
    def naive(real, fake, k):
        radii = lambda x: torch.cdist(x, x).kthvalue(k + 1, dim=1).values
        inside = lambda x, y: (torch.cdist(y, x) <= radii(x)).any(1).double().mean()
        return inside(real, fake), inside(fake, real)
    torch.manual_seed(0)
    real, fake = 3 + torch.randn(70, 3).double(), 3.4 + 0.7 * torch.randn(50, 3).double()
    rows = sample.ROWS
    try:
        for sample.ROWS in (rows, 16, 1):                                  # a block of distances at a time
            for k in (1, 3):
                close(sample.precision_recall(real, fake, k), naive(real, fake, k), 1e-12, f"k = {k}")
    finally:
        sample.ROWS = rows
    copies = torch.cat([torch.randn(20, 2048) + 5] * 6)                    # balls of radius 0: fp32 must not miss them
    assert sample.precision_recall(copies, copies.flip(0)) == (1, 1)
    assert sample.precision_recall(copies, copies[:20] + 1e-2) == (0, 1), "beside copies; and among neighbours"
    assert sample.precision_recall(real, fake + 100) == (0, 0)


def moments_of_two_processes(path):
    rank, moments = int(os.environ["RANK"]), sample.Moments(5, "cpu")
    for part in (5 + unit("moments", 60, 5)).float().split(7)[rank::2]:
        moments.add(part)
    mean, covariance, n = moments.over_all_processes()
    np.savez(path / f"{rank}.npz", mean=mean, covariance=covariance, n=n)


def test_statistics_stream_and_add_up_over_processes():
    x = (5 + unit("moments", 60, 5)).float().double().numpy()
    with folder() as root:
        in_two_processes(moments_of_two_processes, root)
        for rank in (0, 1):
            found = np.load(root / f"{rank}.npz")
            assert found["n"] == 60
            close(found["mean"], x.mean(0), 1e-14)
            close(found["covariance"], np.cov(x.T), 1e-14)


def test_features_are_kept_in_order_and_of_all_classes():
    kept = sample.KEPT
    try:
        sample.KEPT = 20
        net, images = SmallInception(), np.stack([data.Shapes(32).read(i) for i in range(60)])  # class i % 10
        for n in (7, 20, 60):
            batches = [(range(k, min(n, k + 4)), images[k:min(n, k + 4)]) for k in range(0, n, 4)]
            stats = sample.statistics(net, batches[::2] + batches[1::2], n, "fp32")  # in any order
            with torch.no_grad():
                features = net(torch.from_numpy(images[:n]).permute(0, 3, 1, 2))[0]
            which = [int((features - one).square().sum(1).argmin()) for one in stats["features"]]
            assert len(which) == min(n, 20) and which == sorted(set(which)) and stats["images"] == n
            assert n < 60 or len({i % 10 for i in which}) > 6 and len({i % 3 for i in which}) == 3
            close(stats["features"], features[which], 1e-6, f"{n} images")
            close(stats["sigma"], features.T.double().cov(), 1e-6, "and the covariance is of all")
    finally:
        sample.KEPT = kept
    assert "50000 of them" in sample.counted(60_000) and sample.counted(9) == "9 images"


def test_resizing_as_in_tensorflow():
    """Output i lies at i side / 299 of the input, and beyond its last pixel nothing changes."""
    ramp = torch.arange(64.).view(1, 1, 1, 64) + 100 * torch.arange(32.).view(1, 1, 32, 1)
    at = lambda side: (torch.arange(299) * side / 299).clamp(max=side - 1)
    expected = at(64).view(1, 1, 1, -1) + 100 * at(32).view(1, 1, -1, 1)
    close(sample.resized(ramp, "tensorflow"), (expected - 128) / 128, 1e-6)
    middle = lambda side: ((torch.arange(299) + 0.5) * side / 299 - 0.5).clamp(0, side - 1)
    expected = middle(64).view(1, 1, 1, -1) + 100 * middle(32).view(1, 1, -1, 1)
    close(sample.resized(ramp, "pytorch"), expected / 127.5 - 1, 1e-6, "pytorch")


def test_a_reference_scores_itself_perfectly():
    """The commands, the real network, images in an .npz, a folder and a zip."""
    with folder() as root:
        inception, npz = ("--inception", inception_file(root / "i.pth")), save_images(root / "a.npz", 8)
        code, said = command(sample, "--reference", npz, "--out", root / "ref.npz", *inception)
        assert code == 0 and "8 images (32 x 32), features of 8" in said and "images/s" in said, said
        (root / "each").mkdir()
        with np.load(npz) as file, np.load(root / "ref.npz") as ref, zipfile.ZipFile(root / "each.zip", "w") as out:
            assert {n: ref[n].shape for n in ref.files if n != "header"} == {
                "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023), "features": (8, 2048),
                "images": ()} and ref["sigma_s"].dtype == np.float64
            header = json.loads(str(ref["header"]))
            assert (header["source"], header["images"], header["size"]) == (str(npz), 8, 32)
            assert header["resize"] == "pytorch" and header["inception"] == data.file_hash(inception[1])
            for i, image in enumerate(file["arr_0"]):
                Image.fromarray(image).save(root / f"each/{i}.png")
                out.write(root / f"each/{i}.png", f"{i}.png")
        score = ("--score", root / "ref.npz", *inception)
        complains(sample, "--images", npz, *score, words=["8 images are too few", "2048", "--force"])
        complains(sample, "--images", "shapes", *score, words=["8 images in", "ref.npz are too few", "--force"])
        for source in (npz, root / "each.zip"):
            code, said = command(sample, "--images", source, *score, "--force", "--batch", 3)
            assert code == 0 and "only 8 images" in said and "fewer than the 50000" in said, said
            scores, provenance = scores_said(said)
            assert scores["fid"] < 1e-2 and scores["sfid"] < 1e-2, scores
            assert scores["precision"] == scores["recall"] == 1, scores
            for words in (f"8 images of {source}", data.file_hash(root / "ref.npz"), "bilinear",
                          data.file_hash(root / "i.pth"), "fp32", "NOT THE PUBLISHED"):
                assert words in provenance, (words, provenance)


def test_references_of_all_kinds():
    """ADM's files have no features, but images to take them from; others have mu and sigma alone."""
    with small_inception() as root:
        weights = ("--inception", root / "inception.pth")
        npz, other = save_images(root / "a.npz", 30), save_images(root / "b.npz", 40, first=30)
        flags = lambda ref, *more: ("--images", other, "--score", ref, "--force", *weights, *more)
        score = lambda *args: scores_said(command(sample, *flags(*args))[1])
        command(sample, "--reference", npz, "--out", root / "half.npz", *weights)
        command(sample, "--reference", npz, "--out", root / "ref.npz", "--resize", "tensorflow", *weights)
        other_way, _ = score(root / "half.npz")
        with np.load(root / "ref.npz") as ref, np.load(npz) as images:
            ours = {n: ref[n] for n in ref.files}
            adm = {n: ref[n] for n in ("mu", "sigma", "mu_s", "sigma_s")}
            np.savez(root / "adm.npz", arr_0=images["arr_0"], **adm)
            np.savez_compressed(root / "edm.npz", mu=ref["mu"], sigma=ref["sigma"])
        expected, provenance = score(root / "ref.npz")
        assert "as in TensorFlow" in provenance and expected["fid"] > 0 and len(expected) == 5
        assert "as in pytorch-fid" in score(root / "adm.npz", "--resize", "pytorch")[1]
        complains(sample, *flags(root / "ref.npz", "--resize", "pytorch"), words=["ref.npz", "--resize tensorflow"])
        scores, provenance = score(root / "adm.npz", "--batch", 7)
        assert scores == expected and "as in TensorFlow" in provenance
        assert "made elsewhere" in provenance and "precision and recall by its 30 images" in provenance
        assert score(root / "edm.npz")[0] == {"fid": expected["fid"], "is": expected["is"]}

        no = lambda *args, words: complains(sample, *flags(*args), words=words)
        no(root / "none.npz", words=["no file", "none.npz", "--reference"])
        no(npz, words=["a.npz", "no mu and sigma", "--reference"])
        (root / "cut.npz").write_bytes((root / "ref.npz").read_bytes()[:3000])
        no(root / "cut.npz", words=["cut.npz", "is no reference"])
        np.savez(root / "shape.npz", **{**adm, "mu": np.zeros(5)})
        no(root / "shape.npz", words=["shape.npz", "is no reference"])
        header = json.loads(str(ours["header"]))
        np.savez(root / "foreign.npz", **{**ours, "header": json.dumps({**header, "inception": "0" * 16})})
        no(root / "foreign.npz", words=["foreign.npz", "other Inception weights", "0" * 16])
        np.savez(root / "nan.npz", **{**adm, "mu_s": np.full(6, np.nan)})
        no(root / "nan.npz", words=["nan.npz", "mu_s is not finite"])
        np.savez(root / "header.npz", **{**ours, "header": "{}"})
        no(root / "header.npz", words=["header.npz", "is no reference"])
        no(root / "ref.npz", "--size", 64, words=["64 x 64", "32 x 32", "--size 64"])
        no(root / "adm.npz", "--size", 64, words=["64 x 64", "32 x 32"])
        assert score(root / "ref.npz", "--size", 32)[0] == expected != other_way
        text = {"images": "30", "size": 32, "source": "", "inception": "", "arithmetic": "fp32", "resize": "pytorch"}
        np.savez(root / "text.npz", **{**ours, "header": json.dumps({"format": sample.REFERENCE, **text})})
        no(root / "text.npz", words=["text.npz", "header"])


def test_reading_images_to_score_them():
    """Without --size they must be squares of one size; arrays of an .npz stay in the file."""
    with small_inception() as root:
        weights = ("--inception", root / "inception.pth")
        make = lambda source, *more: (sample, "--reference", source, "--out", root / "out.npz", *weights, *more)
        with np.load(save_images(root / "a.npz", 5)) as file:
            images = file["arr_0"]
        dataset = data.open_dataset(root / "a.npz")
        assert isinstance(dataset.images, np.memmap) and dataset.size == 32
        assert np.array_equal(dataset.read(3), images[3])
        np.savez_compressed(root / "small.npz", arr_0=images)
        assert np.array_equal(data.open_dataset(root / "small.npz").read(3), images[3])
        np.savez(root / "fortran.npz", arr_0=np.asfortranarray(images))
        for name in ("a", "fortran"):                                      # a worker gets the place, not the pictures
            dataset = data.open_dataset(root / f"{name}.npz")
            packed = pickle.dumps(dataset)
            assert len(packed) < 2000 and np.array_equal(pickle.loads(packed).read(3), images[3])
        with zipfile.ZipFile(root / "short.npz", "w") as out, zipfile.ZipFile(root / "a.npz") as whole:
            out.writestr("arr_0.npy", whole.read("arr_0.npy")[:-5000])     # another array follows in the file
            out.writestr("arr_2.npy", bytes(9000))
        complains(*make(root / "short.npz"), words=["short.npz", "cannot be read"])
        with zipfile.ZipFile(root / "text.npz", "w") as out:
            out.writestr("arr_0.npy", "no array at all")
        complains(*make(root / "text.npz"), words=["text.npz"])
        (root / "mixed").mkdir()
        for i in range(5):
            Image.fromarray(images[i]).resize((32, 40) if i == 4 else (32, 32)).save(root / f"mixed/{i}.png")
            Image.fromarray(images[i]).resize((32, 40) if i in (0, 3) else (32, 32)).save(root / "mixed" / f"x{i}.png")
        complains(*make(root / "mixed"), words=["cannot be read, more than 1 %", "x0.png", "x3.png"])
        Image.new("RGB", (32, 40)).save(root / "mixed/0.png")
        complains(*make(root / "mixed"), words=["0.png", "32 x 40", "--size"])
        (root / "mixed/0.png").write_bytes(b"broken")
        complains(*make(root / "mixed"), words=["cannot be read, more than 1 %", "0.png", "x0.png"])
        (root / "all").mkdir()
        for i in range(2):
            (root / f"all/{i}.png").write_bytes(b"broken")
        complains(*make(root / "all"), words=["all", "0.png and others"])
        Image.fromarray(images[0]).save(root / "all/1.png")
        complains(*make(root / "all"), words=["1 images are too few"])     # one unreadable image is forgiven
        np.savez(root / "wide.npz", arr_0=np.zeros((3, 32, 40, 3), np.uint8))
        complains(*make(root / "wide.npz"), words=["40 x 32", "--size"])
        code, said = command(*make(root / "mixed", "--size", 16))
        assert code == 0 and "skipped 0.png" in said and "9 images (16 x 16)" in said, said
        complains(*make(root / "mixed", "--size", 16), words=["out.npz", "exists"])
        complains(sample, "--reference", root / "mixed", words=["--out REF.npz"])
        complains(sample, "--reference", root / "mixed", "--out", root / "x.png", words=["x.png", ".npz"])
        complains(sample, "--images", root / "mixed", words=["--score"])
        complains(sample, "--images", root / "mixed", "--score", "x", "--cfg", 3, "--n", 3,
                  words=["--cfg and --n cannot", "--images"])
        complains(sample, "--ckpt", "x", "--score", "y", "--bf16", words=["--bf16", "follows the reference"])
        complains(sample, "--ckpt", "x", "--force", *weights, words=["--force and --inception", "without --score REF"])
        complains(sample, "--bench", "--score", "x", words=["--score", "--bench"])


def test_scores_of_samples_in_one_process_and_in_two():
    """What --ckpt scores is what it writes; two processes, and those of --images, say the same."""
    with small_inception() as root, checkpoint("--lr", 0.01) as (_, path):
        weights, ref = ("--inception", root / "inception.pth"), root / "ref.npz"
        command(sample, "--reference", save_images(root / "a.npz", 20), "--out", ref, *weights)
        flags = ("--ckpt", path, "--n", 11, "--score", ref, *weights, "--classes", "3,1", "--cfg", 2)
        complains(sample, *flags, words=["11 images (--n) are too few", "--force"])
        code, said = command(sample, *flags, "--force", "--npz", root / "made.npz")
        assert code == 0, said
        expected, provenance = scores_said(said)
        for words in ("11 images by the EMA weights of", data.file_hash(path), "dpmpp, 3 steps, guidance 2", "seed 0",
                      "classes 3,1", str(ref), data.file_hash(ref), "bilinear", data.file_hash(weights[1]), "fp32"):
            assert words in provenance, (words, provenance)
        images = ("--images", root / "made.npz", "--score", ref, *weights)
        assert scores_said(command(sample, *images, "--force")[1])[0] == expected
        begin = ("--reference", root / "a.npz", "--workers", 0)
        command(sample, *begin, "--out", root / "one.npz", *weights, "--batch", 3)
        raw = scores_said(command(sample, *flags, "--force", "--raw", "--batch", 4)[1])
        assert "raw weights of" in raw[1] and raw[0] != expected
        port = str(free_port())
        for more in ((*begin, "--out", root / "two.npz", *weights), (*flags, "--force"), (*images, "--force")):
            pair = [launch("sample", *more, "--batch", 2, prepare=USE_SMALL_INCEPTION, MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=port, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, stdout=subprocess.PIPE)
                    for rank in ("0", "1")]
            said = [process.communicate(timeout=60) for process in pair]
            assert all(process.returncode == 0 for process in pair) and not said[1][0], said
            if more[0] == "--reference":
                with np.load(root / "one.npz") as one, np.load(root / "two.npz") as two:
                    assert one["images"] == two["images"] == 20 and str(one["header"]) == str(two["header"])
                    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
                        close(two[name], one[name], 1e-6, name)
                continue
            found = scores_said(said[0][0])[0]
            for name in expected:
                close(found[name], expected[name], 1e-4 if "--images" in more else 1e-2, name)
            assert scores_said(said[0][0])[1].startswith("  11 images"), "none was lost"
        complains(sample, "--ckpt", path, "--n", 11, "--force", "--score", root / "none.npz", *weights,
                  words=["no file", "none.npz"])


def test_without_inception_weights_the_rest_works():
    with checkpoint() as (root, path):
        words = ["mseitzer/pytorch-fid/releases", "pt_inception-2015-12-05-6726825d.pth",
                 "SHA-256 begins with 6726825d", "--inception"]
        hub, torch.hub.get_dir = torch.hub.get_dir, lambda: str(root)
        try:
            complains(sample, "--ckpt", path, "--n", 2048, "--score", root / "ref.npz", words=words)
            complains(sample, "--reference", "shapes", "--out", root / "ref.npz", words=words)
            complains(train, *TINY, "--out", root / "new", "--score-every", 1, "--score-ref", root / "ref.npz",
                      words=words)
            (root / "checkpoints").mkdir()
            inception_file(root / "checkpoints" / sample.INCEPTION)
            assert sample.load_inception()[1] == data.file_hash(root / "checkpoints" / sample.INCEPTION)
        finally:
            torch.hub.get_dir = hub
        torch.save({"fc.weight": torch.zeros(3)}, root / "x.pth")
        complains(sample, "--reference", "shapes", "--out", root / "ref.npz", "--inception", root / "x.pth",
                  words=["x.pth", "missing", "Conv2d_1a_3x3"])
        (root / "empty.pth").write_bytes(b"")
        complains(sample, "--reference", "shapes", "--out", root / "ref.npz", "--inception", root / "empty.pth",
                  words=["empty.pth"])
        assert not (root / "ref.npz").exists() and not (root / "new").exists()
        assert command(sample, "--ckpt", path, "--n", 2, "--out", root / "x.png")[0] == 0


def scored_runs(root):
    """Ten steps of eight images, scored after 4 and 8 of them and at the end, as two micro-batches."""
    sample.Inception = SmallInception
    cfg = configs.config_from("shapes", dict(
        hidden_size=32, depth=1, num_heads=2, batch_size=8, micro_batch=4, kimg=0.08, tick_kimg=0.016, steps=3,
        workers=0, precision="fp32", lr=1e-2, score_every=0.032, score_n=70, score_ref=str(root / "ref.npz"),
        inception=str(root / "inception.pth")))
    with contextlib.redirect_stderr(io.StringIO()):
        scorer = sample.Scorer(cfg.score_ref, cfg.inception, force=True)
    train_here(cfg, root / "run", scorer)


def test_scores_while_training():
    """The log, the picture, the best checkpoint; what sample.py makes of that; and resumed equals unbroken, also where
    the stop came in the middle of a score."""
    with small_inception() as root:
        command(sample, "--reference", save_images(root / "a.npz", 40), "--out", root / "ref.npz",
                "--inception", root / "inception.pth")
        scored = ("--score-every", 0.032, "--score-n", 70, "--score-ref", root / "ref.npz",
                  "--inception", root / "inception.pth", "--force")
        flags = ("--lr", 0.01, "--precision", "fp32", *scored)
        whole = tiny_run(root / "whole", *flags)
        ref, log = root / "ref.npz", [json.loads(line) for line in (root / "whole/log.jsonl").read_text().splitlines()]
        scores = [entry for entry in log if "fid" in entry]
        assert log == whole["progress"]["log"] and [entry["step"] for entry in scores] == [4, 8, 10]
        for entry in scores:
            assert 0 <= entry["recall"] <= 1 < entry["is"]
            assert (entry["provenance"].startswith("70 images by the EMA weights (")
                    and "dpmpp, 3 steps" in entry["provenance"] and data.file_hash(ref) in entry["provenance"])
        best = min(scores, key=lambda entry: entry["fid"])
        assert sample.read_checkpoint(root / "whole/best.pt")["step"] == best["step"]
        model, _ = load_model(root / "whole/best.pt")
        assert f"EMA weights ({data.weights_hash(model)})" in best["provenance"]
        assert Image.open(root / "whole/loss.png").size == (1200, 1200)
        said = command(sample, "--ckpt", root / "whole/best.pt", "--n", 70, "--score", root / "ref.npz", "--inception",
                       root / "inception.pth", "--force")[1]
        close(scores_said(said)[0]["fid"], best["fid"], 1e-3)

        agree = train.agree

        def interrupted(stop, failed, device):
            interrupted.asked += 1
            if interrupted.asked == when:
                stop.ask(signal.SIGTERM, None)
            return agree(stop, failed, device)
        for when, step in ((4, 4), (5, 4), (13, 4), (30, 10)):             # asked at each step, nine times in a score
            interrupted.asked, out = 0, root / f"stopped-{when}"
            try:
                train.agree = interrupted
                code, said = command(train, *TINY, "--out", out, "--kimg", 0.08, *flags)
            finally:
                train.agree = agree
            assert code == 143 and "the same command goes on" in said, (code, said)
            assert sample.read_checkpoint(out / "last.pt")["step"] == step
            assert same(tiny_run(out, *flags)["progress"], whole["progress"]), when
        write, out = data.written_whole, root / "killed"

        @contextlib.contextmanager
        def killed(path):                                                  # when best.pt is new, and last.pt is not
            with write(path) as temporary:
                yield temporary
                if path.name == "last.pt" and (out / "best.pt").exists():
                    raise SystemExit(137)
        try:
            data.written_whole = killed
            code, said = command(train, *TINY, "--out", out, "--kimg", 0.08, *flags)
        finally:
            data.written_whole = write
        assert code == 137 and "fid" not in sample.read_checkpoint(out / "last.pt")["progress"]["log"][-1]
        assert same(tiny_run(out, *flags)["progress"], whole["progress"])
        assert sample.read_checkpoint(out / "best.pt")["step"] == best["step"]
        assert "fid" not in tiny_run(root / "late")["progress"]["log"][-1]
        assert "fid" in tiny_run(root / "late", *scored)["progress"]["log"][-1], "a finished run, scored when asked for"
        no = lambda *more, words: complains(train, *TINY, "--out", root / "no", "--kimg", 0.08, *more, words=words)
        no("--score-every", 1, words=["--score-every 1 needs --score-ref"])
        no("--score-ref", "x", words=["--score-ref x needs --score-every"])
        no(*flags[:-1], words=["70 images (--score-n) are too few", "--force"])
        no(*flags, "--input-size", 16, words=["16 x 16", "32 x 32"])


def test_the_best_checkpoint_is_the_best_of_its_kind():
    with folder() as root, contextlib.redirect_stderr(io.StringIO()):
        (root / "best.pt").write_bytes(b"by other scores")
        progress = train.Progress(configs.PRESETS["shapes"], root, torch.device("cpu"), data.Shapes(32))
        best = [progress.scored(step, {"fid": fid, "is": 1.0}, kind, "") for step, (fid, kind) in enumerate(
            [(3.0, "a"), (1.0, "a"), (2.0, "a"), (2.0, "b"), (1.0, "a"), (1.5, "b")])]
        assert best == [True, True, False, True, False, True]
        assert (root / "best-before-000000.pt").read_bytes() == b"by other scores"


def test_scores_while_training_in_two_processes():
    with small_inception() as one, folder() as two:
        command(sample, "--reference", save_images(one / "a.npz", 40), "--out", one / "ref.npz", "--inception",
                one / "inception.pth")
        for name in ("ref.npz", "inception.pth"):
            (two / name).write_bytes((one / name).read_bytes())
        with one_thread():
            scored_runs(one)
        in_two_processes(scored_runs, two)
        logs = [[json.loads(line) for line in (root / "run/log.jsonl").read_text().splitlines()] for root in (one, two)]
        for a, b in zip(*([entry for entry in log if "fid" in entry] for log in logs), strict=True):
            assert a["step"] == b["step"] and a["provenance"].startswith("70 images")
            for name in ("fid", "sfid", "is", "precision", "recall"):
                close(a[name], b[name], 1e-3, name)
        steps = [sample.read_checkpoint(root / "run/best.pt")["step"] for root in (one, two)]
        assert steps[0] == steps[1]


# ---------------------------------------------------------------------------------------------
# CUDA

def need_cuda():
    if not torch.cuda.is_available():
        raise Skip("no CUDA device")
    return torch.device("cuda")


def test_cuda_forward_equals_cpu():
    device = need_cuda()
    for model in (fill(diffit.DiffiT(**SMALL).eval()), fill(diffit.DiT(**SMALL).eval())):
        x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 37, 999]), torch.tensor([0, 3, 10])
        with torch.no_grad():
            expected = model(x, t, y)
            close(model.to(device)(x.to(device), t.to(device), y.to(device)).cpu(), expected, 1e-4)


def test_cuda_trains_resumes_and_samples():
    need_cuda()
    with folder() as root:
        tiny_run(root / "run", kimg=0.04)
        state = tiny_run(root / "run", kimg=0.08)
        assert state["step"] == 10 and all(v.isfinite().all() for v in state["model"].values())
        code, said = command(sample, "--ckpt", root / "run/last.pt", "--n", 4, "--out", root / "x.png")
        assert code == 0, said


def test_cuda_compiled_blocks_equal_eager_ones():
    device = need_cuda()
    model = fill(diffit.DiffiT(**SMALL).eval()).to(device)
    x, t, y = (torch.randn(3, 4, 8, 8, device=device), torch.tensor([0, 37, 999], device=device),
               torch.tensor([0, 3, 10], device=device))
    with torch.no_grad():
        expected = model(x, t, y)
        for block in model.blocks:
            block.compile()
        close(model(x, t, y).cpu(), expected.cpu(), 1e-4)


def test_cuda_scores_equal_those_of_the_cpu():
    need_cuda()
    with folder() as root:
        nets = [sample.load_inception(inception_file(root / "i.pth"), device)[0] for device in ("cpu", "cuda")]
    images = np.stack([data.Shapes(32).read(i) for i in range(8)])
    sample.autocast("tf32", torch.device("cuda"))                          # must not last
    batches = [(range(8), images)]
    a, b = (sample.statistics(net, batches, 8) for net in nets)
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        close(b[name], a[name], 1e-4, name)
    torch.manual_seed(0)
    real, fake = torch.randn(600, 64), 0.9 * torch.randn(500, 64) + 0.1
    close(sample.precision_recall(real.cuda(), fake.cuda()), sample.precision_recall(real, fake), 0.01)


# ---------------------------------------------------------------------------------------------
# Running them

def main():
    words, counts = sys.argv[1:], {"passed": 0, "failed": 0, "skipped": 0}
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.init()                                                  # before what follows hides it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                                # in the processes that tests start
    for name, test in [(n[5:], f) for n, f in globals().items() if n.startswith("test_")]:
        if words and not any(word in name for word in words):
            continue
        start, outcome, detail = time.time(), "passed", ""
        torch.cuda.is_available = lambda name=name: has_cuda and name.startswith("cuda")  # others: bit for bit
        try:
            test()
        except Skip as reason:
            outcome, detail = "skipped", f": {reason}"
        except Exception:
            outcome, detail = "failed", "\n" + traceback.format_exc()
        counts[outcome] += 1
        print(f"{outcome:8}{time.time() - start:6.1f} s  {name.replace('_', ' ')}{detail}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(1 if counts["failed"] or not sum(counts.values()) else 0)


if __name__ == "__main__":
    main()
