"""Every test: python test_all.py, or python test_all.py WORD ... for those named like a word.

Each has a known answer: a number measured on the released implementations (GOLDEN), a closed form,
a second implementation, or a run that must equal another one. Images and files are written by the
tests themselves. Tests run with one thread each, in as many processes as there are cores (`main`,
at the end); to debug one, call it: python -c "import test_all; test_all.test_ema()".
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import queue
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import configs
import data
import diffit
import diffusion
import sample
import train
from diffusion import EDM, VE, VP, Diffusion, guided


class Skip(Exception):
    """Raised by a test that cannot run here, with the reason."""


# -------------------------------------------------------------------------------------------------
# Tensors that are the same everywhere, and the outputs of the released implementations for them


def hashed_noise(name, n):
    """n numbers in [-0.5, 0.5) float64, by a hash of the name and of each place."""
    x = (np.arange(n, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x ^ (x >> 16)).astype(np.float64) / 2**32 - 0.5


def unit(name, *shape, dtype=torch.float64):
    """Noise of unit variance, rounded to fp32 as the reference's inputs were."""
    noise = (hashed_noise(name, math.prod(shape)) * math.sqrt(12)).astype(np.float32)
    return torch.from_numpy(noise).view(shape).to(dtype)


def weight(name, shape):
    """The value of a network's tensor: variance 1 / fan-in, or near 1 for a gain, 0 for a bias."""
    noise = hashed_noise(name, math.prod(shape))
    if len(shape) > 1:
        value = noise * math.sqrt(12 / math.prod(shape[1:]))
    else:
        value = 0.2 * noise + (1 if name.endswith("weight") else 0)
    return torch.from_numpy(value.astype(np.float32)).view(shape)


def fill(model):
    """Every parameter of a network := weight(its name, its shape)."""
    state = model.state_dict()
    for name, value in state.items():
        if name != "pos_embed":
            state[name] = weight(name, value.shape)
    model.load_state_dict(state)
    return model


# fmt: off
GOLDEN = {
    "diffit-global": dict(
        parameters=211692,
        index=[0, 67, 133, 200, 467, 534, 667, 1535],
        output=[0.28010213, 0.49922121, 1.5590235, 0.24583994, 0.17345709, 0.29344678, 0.71353096,
            1.03531194],
        guided=[0.17654948, 0.05077958, 2.44279575, 0.24583994, 0.17345709, 0.79395831, 1.66953087,
            1.03531194]),
    "dit": dict(
        parameters=256864,
        index=[0, 67, 133, 200, 467, 534, 667, 1535],
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
        ddim=[173.143626066, 88.5216083968, 94.7344145116, -153.450282683, 9.6953618359,
            -219.311067201],
        ddim_clipped=[1.0, 0.876524503508, 1.0, -1.0, 0.991651767386, -1.0],
        ddim_eta1=[268.403469585, 157.791110397, 194.991614611, -409.474727638, 126.480246859,
            -582.058381382],
        ddpm=[268.398845441, 157.521804941, 195.300761978, -409.475680083, 126.824038377,
            -582.057877843]),
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
        ddim=[11199.4462542, -1023.2591911, 12212.9557081, -19595.2994303, 589.414174742,
            -28192.8158026],
        ddim_clipped=[1.0, 0.39656694216, 1.0, -1.0, 0.989881850436, -1.0],
        ddim_eta1=[11216.232629, -1055.88550019, 12154.5018337, -19677.2882638, 621.230852713,
            -28308.1592503],
        ddpm=[11216.2190472, -1055.89108113, 12154.6784804, -19677.2999784, 621.436311632,
            -28308.1629468]),
    "edm": dict(
        index=[0, 21, 37, 58, 74, 95],
        heun=[0.885153431381, 0.989208253074, -0.558813304543, -0.680094982698, -0.104251915378,
            0.612646741376],
        sigmas=[80.0, 19.3524529803, 3.25682151977, 0.296442284479, 0.00752801996278],
        loss=[1.55666315915, 1.64428846813, 1.35759435328, 1.77839402055]),
    "vae": dict(
        mean=([0, 67, 156, 222, 289, 355, 444, 511], [0.0159321, -0.2348087, -0.1908129, 0.0806139,
            0.1721102, 0.3792568, 0.3038277, -0.2626736]),
        logvar=([0, 67, 156, 222, 289, 355, 444, 511], [-0.2320257, -0.2696292, 0.3648241, 0.027192,
            -0.9780666, -0.4811084, -0.5883282, 0.2498597]),
        decoded=([0, 200, 467, 667, 868, 1068, 1335, 1535], [0.1874565, -1.4459398, 0.3649606,
            1.138008, 0.4882536, -0.3071512, -0.6618357, 0.1876512])),
    "inception": dict(
        mixed_6a=([57900, 77201, 96501, 250902, 270202, 289502, 308802, 347402, 405303], [0.364845,
            0.829509, 2.18624, 1.333602, 0.694214, 2.357517, 3.229345, 3.290714, 3.00666]),
        mixed_6e=([0, 19300, 115801, 193001, 231602, 308802, 347402, 386003, 443903], [3.946644,
            1.772492, 0.589228, 4.339272, 2.286987, 7.667885, 15.0671, 4.617605, 1.911255]),
        pool=([0, 356, 712, 1246, 1424, 2137, 3561, 3739, 3917], [1.423329, 2.754237, 0.047372,
            20.780302, 10.607479, 27.968872, 22.199087, 5.353054, 5.464947]),
        logits=([0, 175, 438, 701, 876, 1227, 1402, 1752, 2015], [26.054432, -18.220243, -1.470284,
            12.334354, -16.44149, 2.942307, 12.527119, -22.804363, -0.694302])),
    "scores": dict(
        frechet_distance=1.3586417134459232,
        precision=0.7125,
        recall=0.96875,
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
# fmt: on


# -------------------------------------------------------------------------------------------------
# Assertions


def close(found, expected, tolerance, what=""):
    """|found - expected| <= tolerance * (largest |expected|, or 1 if that is smaller); the message
    of a failure gives the distance."""
    found = torch.as_tensor(found, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    shapes = tuple(found.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"{what}: shape {shapes[0]}, expected {shapes[1]}"
    assert found.isfinite().all(), f"{what}: not finite"
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    assert error <= tolerance, f"{what}: off by {error:.3g}, allowed {tolerance:g}"


def same(a, b, but=("images_per_s", "data_wait", "memory_gb", "config")):
    """Are two checkpoints equal, bit for bit, in everything but the time that they took?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], but) for k in a if k not in but)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, but) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def holds(text, words):
    """Every one of the words must be in the text."""
    for word in words:
        assert str(word) in text, f"{word!r} is missing from: {text}"


def refused(call, *words):
    """call() must raise a UserError (any other exception is a slip, and passes through here) whose
    message is one line and holds all the words."""
    try:
        call()
    except configs.UserError as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        holds(str(error), words)
        return
    raise AssertionError(f"accepted, but should have been refused for {words}")


@contextlib.contextmanager
def signals_restored():
    """Restore the handlers of SIGINT, SIGTERM and SIGHUP at the end."""
    handlers = {number: signal.getsignal(number) for number in configs.ENDING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(module, *args):
    """Run `python module.py args` in this process -> exit code, all that it printed. An exception
    that would end in a traceback passes through."""
    said = io.StringIO()
    argv = [f"{module.__name__}.py", *map(str, args)]
    with signals_restored(), patch.object(sys, "argv", argv):
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                module.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
    return code, said.getvalue()


def succeeds(module, *args):
    """The command must end with exit code 0 -> all that it printed."""
    code, said = command(module, *args)
    assert code == 0, f"exit code {code} for {args}: {said}"
    return said


def complains(module, *args, words):
    """The command must end with exit code 2 and one sentence that holds the words."""
    code, said = command(module, *args)
    assert code == 2, f"exit code {code} for {args}: {said}"
    last = said.strip().split("\n")[-1]
    assert "Traceback" not in said and last.startswith(f"{module.__name__}.py: "), said
    holds(last, words)


@contextlib.contextmanager
def folder():
    """A temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def files_of(path):
    """The names of what lies in a folder, without the lock."""
    return {file.name for file in path.iterdir()} - {configs.LOCK}


# -------------------------------------------------------------------------------------------------
# Runs of train.py, and processes

# A very small network on shapes. The number of workers stands last, for `start` to replace it.
TINY = tuple(
    "--model diffit --patch-size 4 --hidden-size 32 --depth 1 --num-heads 2 --batch-size 8 "
    "--lr 1e-3 --muon-lr 0 --lr-rampup-kimg 0 --lr-decay constant --tick-kimg 0.016 "
    "--sampling-steps 3 --sample-kimg 100 --workers 0".split()
)
# The fields of one a little larger.
LATENT = dict(model="diffit", patch_size=4, hidden_size=128, depth=4, num_heads=4)
LATENT |= dict(process="edm", muon_lr=0.0, mlp_ratio=4.0)


def on_shapes(**fields):
    """The preset shapes with these fields; as far as they do not say otherwise, with LATENT."""
    transformer = fields.get("model", "diffit") in configs.TRANSFORMERS.split()
    return configs.config_from_preset("shapes", {**(LATENT if transformer else {}), **fields})


LONG = 600  # seconds to wait for a process: far more than it takes, for machines that are busy


def tiny_run(out, *flags, kimg=0.08):
    """Train a very small network on shapes, for ten steps of eight images -> its checkpoint."""
    succeeds(train, *TINY, "--out", out, "--kimg", kimg, *flags)
    return torch.load(Path(out) / "last.pt", weights_only=True)


def train_here(cfg, out, scorer=None):
    """train.train on shapes, in this process, on the CPU -> the checkpoint."""
    with signals_restored(), contextlib.redirect_stderr(io.StringIO()):
        train.train(cfg, data.Shapes(32), out, device=torch.device("cpu"), scorer=scorer)
    return torch.load(out / "last.pt", weights_only=True)


@contextlib.contextmanager
def preset(name, **fields):
    """A preset for as long as a test runs."""
    cfg = configs.Config(**fields)
    with patch.dict(configs.PRESETS, {name: cfg}):
        with patch.dict(configs.SOURCES, {name: ("a test", None)}):
            yield cfg


STARTED = []  # the processes of `launch`, which end with their test at the latest


def launch(script, *flags, prepare="pass", stdout=subprocess.DEVNULL, **environment):
    """python SCRIPT.py FLAGS in a process and process group of its own, after the code `prepare`.
    environment: variables beside those of this process -> Popen, whose stderr is a pipe."""
    argv = [f"{script}.py", *map(str, flags)]
    # Tests that run under nohup ignore SIGHUP, which it would inherit.
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    code += f"import sys; sys.argv = {argv}; {prepare}; import {script}; {script}.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        cwd=Path(__file__).parent,
        start_new_session=True,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    STARTED.append(process)
    return process


def start(*flags, prepare="pass", workers=0, **environment):
    """`launch` of train.py on a very small network."""
    return launch("train", *TINY[:-1], workers, *flags, prepare=prepare, **environment)


def await_line(process, word):
    """Read a process's standard error up to the first line that holds the word."""
    line = ""
    while word not in line:
        line = process.stderr.readline()
        assert line or process.poll() is None, f"it ended ({process.returncode}) without {word!r}"


def end_of(process):
    """Wait for a process of `launch` -> exit code, its standard error."""
    said = process.communicate(timeout=LONG)[1]
    return process.returncode, said


def end_started():
    """Kill the processes of `launch` that are still there, with the workers of each."""
    while STARTED:
        process = STARTED.pop()
        kill_group(process.pid)
        process.communicate()


def kill_group(leader):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def torchrun_variables(rank, port, size=2):
    """The environment that torchrun gives to one of its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def torchrun(script, *flags, prepare="pass"):
    """python SCRIPT.py FLAGS as two processes that meet -> for each, exit code, stdout, stderr."""
    port = free_port()
    pair = []
    for rank in (0, 1):
        environment = torchrun_variables(rank, port)
        pair.append(launch(script, *flags, prepare=prepare, stdout=subprocess.PIPE, **environment))
    said = [process.communicate(timeout=LONG) for process in pair]
    return [(process.returncode, *texts) for process, texts in zip(pair, said)]


def in_two_processes(act, *args):
    """Call act(*args) in two processes that have met; an error in one of them is an error here."""
    context = torch.multiprocessing.start_processes(
        one_of_two, (act, free_port(), args), nprocs=2, join=False, start_method="forkserver"
    )
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()


def one_of_two(rank, act, port, args):
    os.environ.update(torchrun_variables(rank, port))
    torch.set_num_threads(1)
    configs.join_processes()
    act(*args)
    torch.distributed.barrier()
    configs.leave_processes()


def free_port():
    """A free port, outside of the range that outgoing connections get theirs from, so that no test
    that runs at the same time takes it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port


# -------------------------------------------------------------------------------------------------
# diffit.py

SMALL = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=3, num_heads=4, num_classes=10
)


def choices_of(name):
    """The words that a field of Config takes."""
    (field,) = (field for field in dataclasses.fields(configs.Config) if field.name == name)
    return field.metadata["choices"]


# Sizes for any network; each takes those that it knows.
SIZES = dict(
    input_size=16,
    hidden_size=16,
    depth=1,
    patch_size=4,
    channels=(8, 16),
    blocks=(1, 1),
    cond_size=16,
    window=4,
    num_heads=2,
    num_classes=3,
)


def every_network():
    """(words, Config) for each network and each place of the time in it that there is."""
    by_name = {field.name: field for field in dataclasses.fields(configs.Config)}
    for model, time_in in itertools.product(choices_of("model"), choices_of("time_in")):
        fields = dict(SIZES, model=model, time_in=time_in, batch_size=4, kimg=0.012)
        only = {name: by_name[name].metadata["only"] for name in fields}
        fields = {name: v for name, v in fields.items() if not only[name] or model in only[name]}
        try:
            yield f"{model} with the time in {time_in}", configs.Config(**fields)
        except configs.UserError as error:  # not a place in this network
            holds(str(error), ["--time-in"])


def test_every_network_trains_and_samples():
    """Whatever diffit.NETWORKS and ATTENTION hold: a step, gradients everywhere, blocks to compile,
    an output that depends on the time, samples."""
    assert diffit.NETWORKS.keys() == set(choices_of("model"))
    assert diffit.ATTENTION.keys() == set(choices_of("time_in"))
    tried = []
    for words, cfg in every_network():
        trainer = train.Trainer(cfg, torch.device("cpu"))
        assert any(isinstance(part, diffit.Block) for part in trainer.model.modules()), words
        with torch.no_grad():
            for p in trainer.parameters:
                p += 0.1 * torch.randn_like(p)  # some weights start at zero
        before = [p.detach().clone() for p in trainer.parameters]
        x = torch.randn(4, 3, 16, 16)
        batches = itertools.repeat((x, torch.arange(4) % 3, []))
        columns, norms = trainer.step(0, batches)
        assert norms.isfinite().all() and columns["loss"].isfinite().all(), words
        still = [a.equal(b) for a, b in zip(before, trainer.parameters)]
        names = [name for name, _ in trainer.model.named_parameters()]
        # Keys' biases and some unused rows of tables cannot have a gradient.
        assert sum(still) <= 1, (words, [name for name, same in zip(names, still) if same])
        model = trainer.ema.model
        early, late = (model(x, torch.full((4,), t)) for t in (10.0, 900.0))
        assert (early - late).abs().max() > 1e-4, f"{words}: the time has no effect"
        ((x, _),) = sample.generate(model, dataclasses.replace(cfg, sampling_steps=2), range(2))
        assert x.shape == (2, 3, 16, 16) and x.isfinite().all(), words
        tried.append(words)
    assert len(tried) >= 8 and "unet with the time in token" in tried


def test_golden_networks():
    x = unit("x", 3, 4, 8, 8, dtype=torch.float32)
    t = torch.tensor([0, 37, 999])
    y = torch.tensor([0, 3, 10])
    for name, network, scale in [
        ("diffit-global", diffit.DiffiT, diffusion.power_cosine(4.4)),
        ("dit", diffit.DiT, 4.4),
    ]:
        model = fill(network(**SMALL).eval())
        gold = GOLDEN[name]
        assert sum(p.numel() for p in model.parameters()) == gold["parameters"]
        with torch.no_grad():
            output = model(x, t, y).flatten()
            parts = [
                guided(model, y[i : i + 1], scale, channels=3)(x[i : i + 1], t[i].item())
                for i in range(3)
            ]
            guided_output = torch.cat(parts).flatten()
        close(output[gold["index"]], gold["output"], 2e-5, f"{name}, output")
        close(guided_output[gold["index"]], gold["guided"], 2e-5, f"{name}, guided output")


def test_released_files_load_with_their_integer_index():
    """In the released files each attention has a `relative_position_index` among its weights. It is
    accepted, and not used: the zeros given here would change the output."""
    model = fill(diffit.DiffiT(**SMALL).eval())
    released = model.state_dict()
    assert not any("index" in name for name in released)
    for k in range(3):
        index = torch.zeros(16, 16, dtype=torch.long)
        released[f"blocks.{k}.attn.relative_position_index"] = index
    x = torch.randn(1, 4, 8, 8)
    t = torch.tensor([3])
    for load in (
        lambda network: network.load_state_dict(released, strict=True),
        lambda network: data.load_weights(network, released, "file"),
    ):
        network = diffit.DiffiT(**SMALL).eval()
        load(network)
        assert torch.equal(network(x, t), model(x, t))
    with torch.device("meta"):
        network = diffit.DiffiT(**SMALL).eval()
    data.load_weights(network, released, "file", assign=True)
    assert torch.equal(network(x, t), model(x, t)), "built on the meta device"


def test_parameter_counts_of_the_papers():
    def millions(name):
        with torch.device("meta"):
            model = diffit.build(configs.PRESETS[name])
        return sum(p.numel() for p in model.parameters()) / 1e6

    assert round(millions("imagenet256"), 1) == 561.0
    assert round(millions("imagenet256-depth30"), 1) == 600.9
    # DiT Table 4, for patches of 2, 4 and 8
    paper = {"s": (33, 33, 33), "b": (130, 130, 131), "l": (458, 458, 459), "xl": (675, 675, 676)}
    for size, counts in paper.items():
        for patch_size, count in zip((2, 4, 8), counts):
            name = f"dit-{size}-{patch_size}"
            assert round(millions(name)) == count, (name, millions(name))
    # EDM's DDPM++ for CIFAR-10, less its weights for the nine augmentation labels
    assert diffit.measure(configs.PRESETS["ddpmpp-vp"])[0] == 55_733_891 - 9 * 128


def test_multiply_adds_of_the_papers():
    """DiT Table 1: GFLOPs, which count a multiply-add once."""
    for name, gflops, tokens in [("dit-xl-2", 118.64, 256), ("dit-s-8", 0.36, 16)]:
        parameters, multiply_adds, found = diffit.measure(configs.PRESETS[name])
        close(multiply_adds / 1e9 / gflops, 1, 1e-2 if gflops < 1 else 1e-3, name)
        assert found == tokens


def naive_attention(attention, x, c=None):
    """Softmax attention written out token by token, with windows and time: what TMSA, its variants
    and Attention must equal."""
    B, N, D = x.shape
    h = attention.num_heads
    d = D // h
    grid = math.isqrt(N)
    window = getattr(attention, "window", grid)
    qkv = attention.qkv(x)
    if isinstance(attention, diffit.TMSA) and attention.qkv_temb is not None:
        qkv = qkv + attention.qkv_temb(c)[:, None]
    q, k, v = (part.view(B, N, h, d) for part in qkv.chunk(3, dim=-1))
    table = None
    if c is not None:
        table = attention.relative_position_bias_table.expand(B, -1, -1)  # (B, offsets, h)
        if isinstance(attention, diffit.TimeInBias):
            table = table + attention.bias_temb(c).view(B, -1, h)
    out = torch.zeros(B, N, h, d, dtype=x.dtype)
    for i in range(N):
        yi, xi = divmod(i, grid)
        mates = []  # the tokens in i's window, and the rows of the table for their offsets
        rows = []
        for j in range(N):
            yj, xj = divmod(j, grid)
            if (yj // window, xj // window) == (yi // window, xi // window):
                mates.append(j)
                rows.append((yi - yj + window - 1) * (2 * window - 1) + xi - xj + window - 1)
        score = (q[:, i, None] * k[:, mates]).sum(-1).mT / math.sqrt(d)  # (B, h, mates)
        values = v[:, mates]
        if table is not None:
            score = score + table[:, rows].mT
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
    """Wherever the time enters, for one window and several: the output and all gradients."""
    for time_in in ("qkv", "token", "bias", "none"):
        for grid, window in [(4, None), (6, 3), (4, 1), (3, 3), (4, 2)]:
            what = f"{time_in}, grid {grid}, window {window}"
            layer = random_tmsa(12, 3, grid, cond_dim=5, window=window, time_in=time_in)
            x = torch.randn(2, grid * grid, 12).double()
            c = torch.randn(2, 5).double()
            found = layer(x, c)
            expected = naive_attention(layer, x, c)
            close(found, expected, 1e-12, what)
            found = torch.autograd.grad(found.pow(2).sum(), layer.parameters())
            expected = torch.autograd.grad(expected.pow(2).sum(), layer.parameters())
            for (name, _), a, b in zip(layer.named_parameters(), found, expected):
                close(a, b, 1e-11, f"{what}, gradient of {name}")


def test_the_bias_between_two_tokens_is_the_row_of_their_offset():
    """Exactly, in one table for all images and in one for each."""
    for window in (1, 2, 5):
        layer = random_tmsa(6, 3, 2 * window, window=window)
        side = 2 * window - 1
        for table in (torch.randn(side**2, 3), torch.randn(4, side**2, 3)):
            bias = layer.bias(table)
            assert bias.shape == (*table.shape[:-2], 3, window**2, window**2)
            for i in range(window**2):
                for j in range(window**2):
                    down = i // window - j // window
                    right = i % window - j % window
                    row = (down + window - 1) * side + right + window - 1
                    assert torch.equal(bias[..., i, j], table[..., row, :]), (window, i, j)


def test_time_enters_where_it_should():
    """A block answers the condition wherever time enters, and nowhere else: with its time part at
    zero (and a time token that nobody looks at) it is the block without time."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 12)
    c = torch.randn(2, 5)
    plain = diffit.DiffiTBlock(12, 3, 2.0, 4, 5, None, "none")
    assert torch.equal(plain(x, c), plain(x, -c))
    for time_in, part in [
        ("qkv", "attn.qkv_temb"),
        ("bias", "attn.bias_temb"),
        ("mlp", "mlp.temb"),
        ("token", "attn.token"),
    ]:
        block = diffit.DiffiTBlock(12, 3, 2.0, 4, 5, None, time_in)
        block.load_state_dict(plain.state_dict(), strict=False)
        extra = [name for name in block.state_dict() if name not in plain.state_dict()]
        assert extra == [f"{part}.weight", f"{part}.bias"], extra
        assert not torch.allclose(block(x, c), block(x, -c)), time_in
        for p in block.get_submodule(part).parameters():
            nn.init.zeros_(p)
        equal = torch.allclose(block(x, c), plain(x, c), atol=1e-6)
        assert equal == (time_in != "token"), f"{time_in}: a token of zeros still takes its share"
    mlp = diffit.Mlp(12, 24, 5)
    temb = {"temb.weight": torch.zeros(24, 5), "temb.bias": torch.full((24,), 3.0)}
    mlp.load_state_dict({**plain.mlp.state_dict(), **temb})
    hidden = F.linear(x, plain.mlp.fc1.weight, plain.mlp.fc1.bias) + 3.0
    close(mlp(x, c), plain.mlp.fc2(F.gelu(hidden, approximate="tanh")), 1e-6)


def test_time_embeddings():
    torch.manual_seed(0)
    fourier = diffit.FourierEmbedder(8)
    t = torch.tensor([0.3, -0.7])
    angles = 2 * math.pi * t[:, None] * (fourier.freqs / (2 * math.pi))
    close(fourier(t), fourier.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)), 1e-5)
    assert "freqs" in fourier.state_dict()
    assert "freqs" not in dict(fourier.named_parameters())
    close((fourier.freqs / (2 * math.pi)).std(), 16, 3)
    model = diffit.DiffiT(**{**SMALL, "num_classes": 0}, time_embedding="none")
    nn.init.normal_(model.final_layer.linear.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(model(x, torch.tensor([1, 2])), model(x, torch.tensor([900, 5])))


def test_augmentation_labels_add_to_the_condition():
    torch.manual_seed(0)
    t = torch.tensor([0.1, 0.2])
    done = torch.randn(2, 9)
    for model, x in [
        (diffit.DiffiT(**SMALL, augment=True), torch.randn(2, 4, 8, 8)),
        (
            diffit.DiffiTUNet(16, 3, (8, 8), (1, 1), 2, 4, 16, augment=True),
            torch.randn(2, 3, 16, 16),
        ),
    ]:
        c = model.condition(t, None, done) - model.condition(t)
        close(c, done @ model.augment_embedder.weight.T, 1e-5)
        assert model.augment_embedder.bias is None
        assert torch.equal(model(x, t, None, torch.zeros(2, 9)), model(x, t)), "zero when sampling"


def test_plain_stages_scale_the_time_and_add_it():
    torch.manual_seed(0)
    c = torch.randn(2, 5)
    options = dict(num_heads=2, mlp_ratio=2.0, cond_dim=5)
    stage = diffit.PlainStage(1, 6, 6, grid=4, window=4, dropout=0.0, **options)
    nn.init.normal_(stage.scale)
    x = torch.randn(2, 6, 4, 4)
    entering = x + (stage.scale * stage.temb(c))[:, :, None, None]
    close(stage(x, c), stage.blocks[0](entering, None), 1e-6)
    stage = diffit.ViTStage(2, 6, grid=3, **options)
    nn.init.normal_(stage.scale)
    tokens = torch.randn(2, 9, 6)
    entering = tokens + (stage.scale * stage.temb(c))[:, None]
    close(stage(tokens, c), stage.blocks[1](stage.blocks[0](entering, None), None), 1e-6)


def test_setr_joins_every_feature_at_full_size():
    torch.manual_seed(0)
    decoder = diffit.SETRDecoder(16, (5,), None, skips=(4, 6, 8))
    features = []
    for k, width in enumerate((4, 6, 8)):
        features.append(torch.randn(2, width, 16 >> k, 16 >> k, requires_grad=True))
    out = decoder(features, None)
    assert out.shape == (2, 5, 16, 16)
    out[:, :, 8, 8].sum().backward()
    assert all(f.grad.any() for f in features)
    total = decoder.reduce[2](features[2])  # written out, coarsest first
    full = []
    for k in (2, 1, 0):
        if k < 2:
            coarser = F.interpolate(total, scale_factor=2, mode="bilinear")
            total = decoder.reduce[k](features[k]) + coarser
        refined = F.silu(decoder.refine[k](total))
        full.append(F.interpolate(refined, size=(16, 16), mode="bilinear"))
    close(out, decoder.join(torch.cat(full, 1)), 1e-6)


def test_ddpmpp_block_is_its_formula():
    def activated(norm, x):
        return F.silu(norm(x))

    torch.manual_seed(0)
    for tmsa in (False, True):
        block = diffit.DDPMppBlock(8, 12, 6, 4, 0.0, 3, tmsa).double()
        x = torch.randn(2, 8, 4, 4).double()
        c = torch.randn(2, 6).double()
        h = block.conv1(activated(block.norm1, x)) + block.temb(F.silu(c))[:, :, None, None]
        h = (block.conv2(activated(block.norm2, h)) + block.skip(x)) / math.sqrt(2)
        tokens = block.norm3(h).flatten(2).transpose(1, 2)
        tokens = naive_attention(block.attn, tokens, c if tmsa else None)
        close(block(x, c), (tokens.transpose(1, 2).view_as(h) + h) / math.sqrt(2), 1e-12)
    x = torch.randn(2, 8, 4, 4)
    c = torch.randn(2, 6)
    for way, resampled in [
        ("down", F.avg_pool2d(x, 2)),
        ("up", F.interpolate(x, scale_factor=2)),
    ]:
        block = diffit.DDPMppBlock(8, 8, 6, 4, 0.0, 0, False, **{way: True})
        assert block(x, c).shape == resampled.shape
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
        close(block(x, c), block.skip(resampled) / math.sqrt(2), 1e-6)


def test_attend_equals_scaled_dot_product_attention():
    q, k, v = torch.randn(3, 2, 4, 9, 5)
    bias = torch.randn(4, 9, 9)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    close(diffit.attend(q, k, v, bias), expected, 1e-6)


def test_plain_attention_equals_the_naive_form():
    torch.manual_seed(0)
    layer = diffit.Attention(12, 3).double()
    x = torch.randn(2, 9, 12).double()
    close(layer(x), naive_attention(layer, x), 1e-12)


def test_tmsa_without_time_is_plain_attention():
    layer = random_tmsa(12, 3, 4)
    plain = diffit.Attention(12, 3).double()
    for p in (*layer.qkv_temb.parameters(), layer.relative_position_bias_table):
        nn.init.zeros_(p)
    shared = ("qkv.", "proj.")
    state = layer.state_dict()
    plain.load_state_dict({name: p for name, p in state.items() if name.startswith(shared)})
    x = torch.randn(2, 16, 12).double()
    c = torch.randn(2, 12).double()
    close(layer(x, c), plain(x), 1e-14)
    assert torch.equal(layer(x, c), layer(x, 2 * c)), "the condition still changes the output"


def test_time_in_tmsa_is_a_token_wise_shift():
    """x Wqs + c Wqt is (x + d) Wqs where d Wqs = c Wqt."""
    layer = random_tmsa(6, 2, 2)
    with torch.no_grad():
        layer.qkv_temb.weight.copy_(layer.qkv.weight)
        layer.qkv_temb.bias.zero_()
    x = torch.randn(3, 4, 6).double()
    c = torch.randn(3, 6).double()
    close(layer(x, c), layer(x + c[:, None], 0 * c), 1e-12)


def test_one_window_is_global_attention():
    whole = random_tmsa(8, 2, 4)
    window = random_tmsa(8, 2, 4, window=4)
    x = torch.randn(2, 16, 8).double()
    c = torch.randn(2, 8).double()
    assert torch.equal(whole(x, c), window(x, c))


def test_permuted_windows_permute_the_output():
    """2 x 2 windows of 3 x 3 tokens: windows change places, the tokens in them do not."""
    layer = random_tmsa(8, 2, 6, window=3)
    x = torch.randn(1, 2, 3, 2, 3, 8).double()
    c = torch.randn(1, 8).double()

    def swap(tokens):
        return tokens.flip(1, 3)

    def run(tokens):
        return layer(tokens.reshape(1, 36, 8), c).view(1, 2, 3, 2, 3, 8)

    close(run(swap(x)), swap(run(x)), 1e-13)
    assert not torch.allclose(run(x), swap(run(x)))


def test_fresh_adaln_zero_block_is_the_identity():
    torch.manual_seed(0)
    model = diffit.DiT(**SMALL)
    x = torch.randn(2, 16, 64)
    c = torch.randn(2, 64)
    assert torch.equal(model.blocks[0](x, c), x)
    output = model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]))
    assert not output.any(), "a fresh DiT predicts zero"


def unets():
    """Input size and network: the image-space DiffiT, Table 4's comparisons, DDPM++."""
    for size, classes in [(32, 0), (64, 5), (48, 0)]:
        yield size, diffit.DiffiTUNet(
            size,
            3,
            channels=(8, 16, 16),
            blocks=(1, 2, 1),
            num_heads=2,
            window=4,
            cond_size=24,
            num_classes=classes,
        )
    small = dict(channels=(8, 8), blocks=(1, 2), num_heads=2, cond_size=16)
    for encoder, decoder in [
        ("vit", "setr"),
        ("plain", "setr"),
        ("plain", "plain"),
        ("diffit", "plain"),
    ]:
        halves = dict(encoder=encoder, decoder=decoder)
        yield 16, diffit.Table4UNet(16, 3, **small, window=4, num_classes=5, **halves)
    for time_in in ("qkv", "none"):
        yield 16, diffit.DDPMpp(16, 3, **small, time_in=time_in)


def test_unet_takes_any_size_its_levels_divide():
    for size, model in unets():
        x = torch.randn(2, 3, size, size)
        t = torch.tensor([0.1, -0.3])
        y = torch.tensor([0, 4]) if model.num_classes else None
        assert model(x, t, y).shape == x.shape
        assert model(x, t).shape == x.shape
    double = diffit.DiffiTUNet(16, 3, (8, 8), (1, 1), 2, window=8, cond_size=8, learn_sigma=True)
    assert double(torch.randn(1, 3, 16, 16), torch.zeros(1)).shape == (1, 6, 16, 16)


def test_resblock_is_equations_9_and_10():
    torch.manual_seed(0)
    options = dict(num_heads=3, mlp_ratio=4.0, grid=4, cond_dim=6, window=2)
    block = diffit.ResBlock(8, 12, 0.0, **options).double()
    x = torch.randn(2, 8, 4, 4).double()
    c = torch.randn(2, 6).double()
    h = F.silu(F.group_norm(x, 2, block.norm.weight, block.norm.bias))
    h = F.conv2d(h, block.conv.weight, block.conv.bias, padding=1)
    tokens = h.flatten(2).transpose(1, 2)
    normed = F.layer_norm(tokens, (12,), eps=1e-6)
    tokens = tokens + naive_attention(block.block.attn, normed, c)
    tokens = tokens + block.block.mlp(F.layer_norm(tokens, (12,), eps=1e-6))
    shortcut = F.conv2d(x, block.skip.weight, block.skip.bias)
    close(block(x, c), tokens.transpose(1, 2).view(2, 12, 4, 4) + shortcut, 1e-12)


def test_a_unet_on_patches_is_one_on_their_pixels():
    """Patches of 2 x 2 pixels are 12 channels of an image half as large."""
    sizes = dict(channels=(8, 8), blocks=(1, 1), num_heads=2, window=4, cond_size=16, num_classes=3)
    patched = varied(diffit.DiffiTUNet(16, 3, patch_size=2, **sizes))
    plain = diffit.DiffiTUNet(8, 12, **sizes).eval()
    state = patched.state_dict()
    state["tokenizer.weight"] = F.pixel_unshuffle(state["tokenizer.weight"], 2)
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([-0.3, 0.4])
    y = torch.tensor([1, 3])
    with torch.no_grad():
        expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t, y), 2)
        close(patched(x, t, y), expected, 1e-5)
    refused(lambda: diffit.DiffiTUNet(18, 3, patch_size=2, **sizes), "patches of 2", "by 4", "18")


def test_ddpmpp_has_its_own_frequencies():
    """From 1 to 1 / 10000, both included (Song et al. 2021), where ADM's and DiT's end before."""
    with_ends = diffit.DDPMppEmbedder(8, 16).frequencies("cpu")
    close(with_ends[[0, -1]], [1.0, 1e-4], 1e-9)
    close(with_ends[1:] / with_ends[:-1], [10 ** (-4 / 7)] * 7, 1e-6)
    without = diffit.TimestepEmbedder(8, 16).frequencies("cpu")
    close(without[1:] / without[:-1], [10 ** (-4 / 8)] * 7, 1e-6)
    model = diffit.DDPMpp(16, 3, (8, 8), (1, 1), cond_size=16)
    assert type(model.t_embedder) is diffit.DDPMppEmbedder


def test_embed_gain_scales_patches_and_positions_alone():
    def weights(gain):
        torch.manual_seed(0)
        return diffit.DiffiT(**SMALL, embed_gain=gain).state_dict()

    plain = weights(1.0)
    for name, value in weights(4.0).items():
        gain = 4 if name in ("x_embedder.proj.weight", "pos_embed") else 1
        close(value, plain[name] * gain, 1e-6, name)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    models = [(8, diffit.DiffiT(**SMALL)), (8, diffit.DiT(**SMALL)), *unets()]
    models += [(8, diffit.DiffiT(**SMALL, time_in=time_in)) for time_in in ("token", "bias", "mlp")]
    t = torch.tensor([3.0, 700.0])
    for size, model in models:
        for p in model.parameters():
            if not p.any():  # a zero head or gate would hide what lies behind it
                nn.init.normal_(p, std=0.05)
        channels = 4 if isinstance(model, diffit.Transformer) else 3
        y = torch.tensor([1, model.num_classes]) if model.num_classes else None
        model(torch.randn(2, channels, size, size), t, y).pow(2).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.any(), f"{type(model).__name__} {name}"


def test_no_label_is_the_null_class():
    model = fill(diffit.DiffiT(**SMALL).eval())
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([5, 6])
    y = torch.tensor([10, 10])
    assert torch.equal(model(x, t), model(x, t, y))
    without = diffit.DiffiT(**{**SMALL, "num_classes": 0})
    refused(lambda: without(x, t, torch.tensor([0, 1])), "num_classes")


def test_labels_are_dropped_in_training_alone():
    torch.manual_seed(0)
    embed = diffit.LabelEmbedder(4, 2, dropout=0.25)
    table = torch.tensor([[0.0, 1]] * 4 + [[1.0, 0]])  # first column: was it dropped?
    embed.load_state_dict({"embedding_table.weight": table})
    y = torch.zeros(20_000, dtype=torch.long)
    dropped = embed(y)[:, 0, 0].mean().item()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000), dropped
    assert embed.eval()(y)[:, 0, 0].sum() == 0


def test_timesteps_never_pass_through_bf16():
    embed = diffit.TimestepEmbedder(16)
    t = torch.tensor([996, 997, 998, 999])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = embed(t)
    assert c.dtype == torch.float32
    assert torch.equal(c, embed(t))
    assert len(c.unique(dim=0)) == 4


def test_position_table():
    table = diffit.sincos_2d(16, 3)[0]
    for token in range(9):
        row, column = divmod(token, 3)
        expected = []
        for position in (column, row):
            angles = [position / 10000 ** (k / 4) for k in range(4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        close(table[token], expected, 1e-6)
    odd = diffit.sincos_2d(18, 3)
    assert odd.shape == (1, 9, 18)
    assert torch.equal(odd[..., :16], diffit.sincos_2d(16, 3))
    assert not odd[..., 16:].any()


def test_networks_refuse_sizes_that_do_not_fit():
    for call, words in [
        (lambda: diffit.TMSA(10, 3, 4), ["10", "3 heads"]),
        (lambda: diffit.TMSA(8, 2, 6, window=4), ["4 x 4", "6 x 6"]),
        (lambda: diffit.DiffiT(**{**SMALL, "patch_size": 3}), ["3", "8 x 8", "multiple"]),
        (lambda: diffit.DiffiTUNet(30, 3), ["30", "8"]),
        (lambda: diffit.DiffiTUNet(32, 3, (8, 8), (1,)), ["2 widths", "1 block"]),
        (lambda: diffit.DDPMpp(32, 3, (8, 8), (1,)), ["2 widths", "1 block"]),
        (lambda: diffit.DDPMpp(30, 3, (8, 8, 8), (1, 1, 1)), ["30", "4"]),
        (lambda: diffit.DDPMpp(32, 3, (8, 8), (1, 1), cond_size=12), ["12", "multiple of 8"]),
        (lambda: diffit.DiffiT(**SMALL, time_in="kqv"), ["kqv", "token", "bias"]),
        (lambda: diffit.DiT(**SMALL, time_embedding="sin"), ["sin", "fourier"]),
        (lambda: diffit.Table4UNet(32, 3, (8, 8), (1, 1), encoder="Vit"), ["Vit", "plain"]),
        (lambda: diffit.DiffiTUNet(24, 3, (8, 8), (1, 1), 2, window=8), ["8 x 8", "12 x 12"]),
    ]:
        refused(call, *words)


def test_bf16_forward_stays_near_fp32():
    model = fill(diffit.DiffiT(**SMALL).eval())
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 900])
    y = torch.tensor([1, 2])
    with torch.no_grad():
        full = model(x, t, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x, t, y)
    close(half, full, 0.03)


def test_weights_adapt_to_other_classes_and_another_resolution():
    """The label table alone is re-initialised; positions are those of the new grid; the bias by
    relative position is interpolated: a table that is linear in the offsets stays linear over the
    same range."""

    def linear(side):
        slope = torch.linspace(-1, 1, side)
        table = (slope[:, None] + 2 * slope)[..., None] * torch.arange(1.0, 5)
        return table.view(side**2, 4)

    bias = "blocks.1.attn.relative_position_bias_table"
    labels = "y_embedder.embedding_table.weight"
    model = fill(diffit.DiffiT(**SMALL))
    state = {**model.state_dict(), bias: linear(7)}  # a 4 x 4 grid has offsets of -3 to 3
    network = diffit.DiffiT(**{**SMALL, "input_size": 16, "num_classes": 4})
    own = network.state_dict()
    weights, notes = diffit.adapt_weights(state, network)
    assert weights.keys() == own.keys()
    assert len(notes) == 3, notes
    holds(notes[0], ["10 classes", "4"])
    holds(notes[1], ["64 tokens"])
    holds(notes[2], ["3", "interpolated"])
    close(weights[bias], linear(15), 1e-5)
    for name, value in weights.items():
        if name in (labels, "pos_embed"):
            assert torch.equal(value, own[name]), name
        elif "relative" not in name:
            assert torch.equal(value, state[name]), name
    with torch.device("meta"):
        network = diffit.DiffiT(**{**SMALL, "input_size": 16, "num_classes": 4})
    on_meta, notes_on_meta = diffit.adapt_weights(state, network)
    assert notes_on_meta == notes
    assert {name: value.shape for name, value in on_meta.items()} == {
        name: value.shape for name, value in own.items()
    }
    without = diffit.DiffiT(**{**SMALL, "num_classes": 0})
    weights, notes = diffit.adapt_weights(state, without)
    assert weights.keys() == without.state_dict().keys() and len(notes) == 1
    holds(notes[0], ["10 classes", "0"])
    weights, notes = diffit.adapt_weights(weights, model)
    assert weights.keys() == state.keys() and len(notes) == 1
    holds(notes[0], ["0 classes", "10"])
    unchanged, notes = diffit.adapt_weights(state, model)
    assert notes == [] and same(unchanged, state)


# -------------------------------------------------------------------------------------------------
# diffusion.py

GOLDEN_T = torch.tensor([0, 1, 10, 250, 500, 998, 999])


def golden_net(x, t):
    out = torch.einsum("oc,bchw->bohw", unit("d:A", 6, 3), x)
    return torch.tanh(out + 0.001 * torch.as_tensor(t).double().view(-1, 1, 1, 1))


def golden_noise():
    """noise(): the k-th call gives the k-th tensor that the reference's chains added."""
    count = iter(range(1, 1001))
    return lambda: unit(f"d:z{next(count)}", 2, 3, 4, 4)


def test_golden_schedules_losses_and_chains():
    x0 = unit("d:x0", 7, 3, 4, 4).mul(0.5).clamp(-1, 1)
    noise = unit("d:noise", 7, 3, 4, 4)
    start = unit("d:xT", 2, 3, 4, 4)
    for schedule in ("linear", "cosine"):
        process = Diffusion(1000, schedule)
        gold = GOLDEN[schedule]
        for name in ("abar", "log_posterior", "x0_coef", "xt_coef"):
            close(getattr(process, name)[GOLDEN_T], gold[name], 1e-6, name)
        losses = process.loss(golden_net, x0, GOLDEN_T, noise)
        close(losses["mse"], gold["mse"], 1e-6, "mse")
        close(losses["vlb"] / torch.tensor(gold["vlb"]), torch.ones(7), 1e-6, "vlb")
        close(losses["loss"], losses["mse"] + losses["vlb"], 1e-12, "loss")
        for name, sampler, options in [
            ("ddim", diffusion.ddim, {}),
            ("ddim_clipped", diffusion.ddim, dict(clip=True)),
            ("ddim_eta1", diffusion.ddim, dict(eta=1.0, noise=golden_noise())),
            ("ddpm", diffusion.ddpm, dict(noise=golden_noise())),
        ]:
            end = sampler(process, golden_net, start, process.levels(50), **options)
            close(end.flatten()[gold["index"]], gold[name], 1e-6, f"{schedule}, {name}")


def test_golden_edm():
    process = EDM()
    gold = GOLDEN["edm"]
    E = unit("m:E", 3, 3)

    def net(x, t):
        return torch.tanh(
            torch.einsum("oc,bchw->bohw", E, x) + torch.as_tensor(t).view(-1, 1, 1, 1)
        )

    levels = process.levels(18)
    close(levels[::4], gold["sigmas"], 1e-12, "sigmas")
    x = process.prior(unit("m:e", 2, 3, 4, 4), levels[0])
    x = diffusion.heun(process, net, x, levels)
    close(x.flatten()[gold["index"]], gold["heun"], 1e-6, "heun")
    sigma = torch.tensor([0.02, 0.3, 1.5, 40.0], dtype=torch.float64)
    x0 = unit("m:y", 4, 3, 4, 4).mul(0.5).clamp(-1, 1)
    losses = process.loss(net, x0, sigma, unit("m:n", 4, 3, 4, 4))
    close(losses["loss"], gold["loss"], 1e-6, "loss")


def test_golden_loss_aware_timesteps():
    sampler = diffusion.LossAwareTimesteps(12)
    losses = unit("r:L", 13, 12) ** 2 + 0.1
    for k in range(13):
        sampler.update(torch.arange(12), losses[k])
        if k + 1 in (9, 10, 13):
            gold = GOLDEN["resampler"][k + 1]
            close(sampler.probabilities()[: len(gold)], gold, 1e-6, f"after {k + 1}")
    torch.manual_seed(0)
    t, w = sampler.sample(1000)
    gold = torch.tensor(GOLDEN["resampler"]["weight"])
    close(w[t < 6], gold[t[t < 6]], 1e-6, "weights")
    assert w.dtype == torch.float32 and len(t.unique()) == 12


def test_importance_weights_keep_the_mean():
    """The sum over t of p(t) w(t) loss(t) is the mean of the loss, whatever losses came before."""
    sampler = diffusion.LossAwareTimesteps(50, uniform_prob=0.001)
    loss = torch.arange(1.0, 51).double() ** 2
    for _ in range(10):
        sampler.update(torch.arange(50), loss)
    p = sampler.probabilities()
    close(p.sum(), 1.0, 1e-12)
    close((p * (1 / (50 * p)) * loss).sum(), loss.mean(), 1e-12)
    torch.manual_seed(0)
    t, w = sampler.sample(200_000)
    close((w.double() * loss[t]).mean() / loss.mean(), 1.0, 0.02)


def test_vlb_sends_no_gradient_to_the_mean():
    process = Diffusion()
    x0 = unit("v", 4, 3, 4, 4)
    noise = unit("v:n", 4, 3, 4, 4)
    out = unit("v:out", 4, 6, 4, 4).requires_grad_()
    losses = process.loss(lambda x, t: out, x0, torch.tensor([0, 1, 500, 999]), noise)
    losses["vlb"].sum().backward()
    assert not out.grad[:, :3].any()
    assert (out.grad[:, 3:] != 0).any(dim=(1, 2, 3)).all()


def test_vlb_is_the_kl_of_two_gaussians():
    process = Diffusion()
    x0 = unit("k", 1, 1, 2, 2)
    noise = unit("k:n", 1, 1, 2, 2)
    out = unit("k:o", 1, 2, 2, 2)
    found = process.loss(lambda x, t: out, x0, torch.tensor([300]), noise)["vlb"]
    a = process.abar[300]
    b = process.abar[299]
    beta = 1 - a / b
    tilde = beta * (1 - b) / (1 - a)
    xt = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise

    def mean(clean):
        return (math.sqrt(b) * beta * clean + math.sqrt(1 - beta) * (1 - b) * xt) / (1 - a)

    mix = (out[:, 1:] + 1) / 2
    predicted = mean((xt - math.sqrt(1 - a) * out[:, :1]) / math.sqrt(a))
    p = torch.distributions.Normal(predicted, (beta**mix * tilde ** (1 - mix)) ** 0.5)
    q = torch.distributions.Normal(mean(x0), torch.full_like(x0, tilde**0.5))
    kl = torch.distributions.kl_divergence(q, p).mean().view(1)
    close(found, kl / math.log(2), 1e-10)


def test_discretised_gaussian_sums_to_one():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in [(0.1, 0.05), (-0.97, 0.2), (0.999, 0.01)]:
        log_mass = diffusion.discretized_gaussian_log_likelihood(
            levels, torch.tensor(mean), torch.tensor(math.log(scale))
        )
        close(log_mass.exp().sum(), 1.0, 1e-4, f"mean {mean}")


def test_spaced_gives_the_steps_asked_for():
    for T in (1, 2, 7, 250, 1000):
        for n in range(1, T + 1):
            times = diffusion.spaced(T, n)
            assert len(times) == len(set(times)) == n and sorted(times) == times, (T, n)
            assert times[-1] == T - 1 and (n == 1 or times[0] == 0), (T, n)
    for n in (0, -3, 1001):
        refused(lambda: diffusion.spaced(1000, n), n, "1 to 1000")
    assert diffusion.spaced(1000, 50)[:6] == [0, 20, 41, 61, 82, 102]  # the reference's rounding
    visited = []

    def net(x, t):
        visited.append(t)
        return x

    process = Diffusion(variance="small")
    diffusion.ddim(process, net, torch.zeros(1, 3, 2, 2), process.levels(7))
    assert visited == [999, 832, 666, 500, 333, 166, 0] == diffusion.spaced(1000, 7)[::-1]


SAMPLERS = [getattr(diffusion, name) for name in choices_of("sampler")]


def gaussian(process, mean, std):
    """The exact network for data N(mean, std^2 I): f(x, t) as a sampler of Diffusion or EDM would
    call it."""

    def eps(x, t):
        a, s = process.scales(t)
        return s * (x - a * mean) / (a**2 * std**2 + s**2)

    def F(x, c_noise):  # D = c_skip x + c_out F, solved for F
        sigma = process.noise_level(c_noise)
        sd = process.sigma_data
        norm = math.sqrt(sigma**2 + sd**2)
        D = (std**2 * x * norm + sigma**2 * mean) / (std**2 + sigma**2)
        return (D - sd**2 / norm * x) / (sigma * sd / norm)

    return F if isinstance(process, EDM) else eps


class Mixture:
    """A mixture of Gaussians on the line, and the network that knows it: f(x, t), t a number, for
    either process, predicts the clean image as no better network could. weights, means, stds: a
    number for each component."""

    def __init__(self, weights=(0.3, 0.5, 0.2), means=(-0.7, 0.1, 0.8), stds=(0.2, 0.15, 0.25)):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)

    def components(self, a, s):
        """Means and standard deviations (..., K) of a x0 + s eps, for numbers or tensors a, s."""
        a = torch.as_tensor(a, dtype=torch.float64)[..., None]
        s = torch.as_tensor(s, dtype=torch.float64)[..., None]
        return a * self.means, (a**2 * self.stds**2 + s**2).sqrt()

    def denoise(self, x, a, s):
        """E[x0 | a x0 + s eps = x], in x's shape; a and s are numbers, or shaped like x."""
        means, stds = self.components(a, s)
        z = (x[..., None] - means) / stds
        posterior = (self.weights.log() - stds.log() - z**2 / 2).softmax(-1)
        gain = torch.as_tensor(a, dtype=torch.float64)[..., None] * self.stds**2 / stds
        return (posterior * (self.means + gain * z)).sum(-1)

    def network(self, process):
        """-> f(x, t), which predicts eps for Diffusion, and F of EDM eq. 7 for EDM."""

        def eps(x, t):
            a, s = process.scales(t)
            return (x - a * self.denoise(x, a, s)) / s

        def F(x, t):
            sigma = torch.tensor(process.noise_level(t), dtype=torch.float64)
            c_skip, c_out, c_in, _ = process.coefficients(sigma)
            x = x / c_in
            return (self.denoise(x, torch.ones_like(sigma), sigma) - c_skip * x) / c_out

        return F if isinstance(process, EDM) else eps

    def cdf(self, x):
        """The share of the data below x."""
        z = (x[..., None] - self.means) / self.stds
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def quantile(self, u):
        """The point below which lies the share u of the data, by bisection."""
        low = torch.full_like(u, -10.0)
        high = torch.full_like(u, 10.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < u
            low = torch.where(below, middle, low)
            high = torch.where(below, high, middle)
        return (low + high) / 2


def distance(process, sampler, n, points=2000):
    """The 2-Wasserstein distance between the mixture and a sampler's output in n steps: on the line
    the root mean square of the differences, in order."""
    mixture = Mixture()
    levels = process.levels(n)
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    x = process.prior(torch.special.ndtri(u).view(1, 1, 1, -1), levels[0])
    end = sampler(process, mixture.network(process), x, levels).flatten().sort().values
    return (end - mixture.quantile(u)).square().mean().sqrt().item()


def test_mixture_knows_its_data():
    """One component is the Gaussian of the closed form; the mean of the clean image given the
    noised one equals a sum over the line; quantiles invert the distribution function."""
    one = Mixture((1.0,), (0.3,), (0.5,))
    for process, t in [(Diffusion(variance="small"), 300), (EDM(), -0.2)]:
        x = unit("mix", 1, 1, 3, 3)
        close(one.network(process)(x, t), gaussian(process, 0.3, 0.5)(x, t), 1e-6)
    mixture = Mixture()
    line = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    components = torch.distributions.Normal(mixture.means, mixture.stds)
    density = (mixture.weights * components.log_prob(line[:, None]).exp()).sum(-1)
    for x, a, s in [(0.4, 0.8, 0.6), (-0.9, 1.0, 0.3)]:
        likely = density * (-((x - a * line) ** 2) / (2 * s**2)).exp()
        expected = (likely * line).sum() / likely.sum()
        close(mixture.denoise(torch.tensor(x).double(), a, s), expected, 1e-6)
    u = torch.tensor([0.01, 0.3, 0.77]).double()
    close(mixture.cdf(mixture.quantile(u)), u, 1e-12)

    def exact(process, f, x, levels):
        return mixture.quantile(torch.special.ndtr(x / levels[0]))

    close(distance(EDM(), exact, 2, points=500), 0.0, 1e-9)


def test_samplers_return_the_one_image_there_is():
    for process in (Diffusion(variance="small"), Diffusion(40, "cosine", "large"), EDM()):
        image = unit("one", 2, 3, 4, 4)
        levels = process.levels(40)
        x = process.prior(unit("one:x", 2, 3, 4, 4), levels[0])
        for sampler in SAMPLERS:
            end = sampler(process, gaussian(process, image, 0.0), x, levels)
            close(end, image, 1e-8, sampler.__name__)


def test_ddim_over_all_steps_returns_the_gaussian():
    """The probability-flow ODE of N(mean, std^2 I) leads from x to mean + std (x - a mean) / the
    deviation of the noised data."""
    process = Diffusion(variance="small")
    mean = unit("g:m", 1, 3, 4, 4)
    std = 0.5
    x = unit("g:x", 2, 3, 4, 4)
    levels = process.levels(1000)
    found = diffusion.ddim(process, gaussian(process, mean, std), x, levels)
    a, s = process.scales(levels[0])
    expected = mean + std * (x - a * mean) / math.sqrt(a**2 * std**2 + s**2)
    close(found, expected, 4e-3)


def orders(process, sampler, counts):
    """Observed orders of convergence on a mixture of Gaussians: log2 of the error's ratio as the
    number of steps doubles. On the line, the probability-flow ODE maps quantiles to quantiles."""
    mixture = Mixture()
    u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    means, stds = mixture.components(*process.scales(process.levels(2)[0]))
    noised = Mixture(mixture.weights.tolist(), means.tolist(), stds.tolist())
    start = noised.quantile(u).view(1, 1, 1, -1)
    errors = []
    for n in counts:
        end = sampler(process, mixture.network(process), start, process.levels(n)).flatten()
        errors.append((end - mixture.quantile(u)).square().mean().sqrt().item())
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


def test_orders_of_convergence():
    """The error of Euler's method falls with the step, that of Heun's and of DPM-Solver++(2M) with
    its square, for both processes (with enough timesteps that rounding them does not matter)."""
    first = {diffusion.ddim: 1}
    second = {diffusion.heun: 2, diffusion.dpmpp: 2}
    fine = Diffusion(100_000, variance="small", spacing="quadratic")
    for process, counts, samplers in [
        (EDM(sigma_min=1e-4, sigma_max=3.0), (32, 64, 128), {**first, **second}),
        (Diffusion(variance="small"), (31, 62, 125), first),
        (fine, (31, 62, 125), {**first, **second}),
    ]:
        for sampler, order in samplers.items():
            found = orders(process, sampler, counts)
            what = f"{type(process).__name__} {sampler.__name__}: {found}"
            assert all(abs(o - order) < 0.3 for o in found), what


def test_few_steps():
    """DPM-Solver++ in 5 to 40 calls: each doubling helps, by timesteps more than the published
    rule, with which 10 and 20 were worse than 5 (0.091, 0.240, 0.150, 0.046)."""
    for process, most in [
        (Diffusion(variance="small", spacing="quadratic"), [0.06, 0.022, 0.006, 0.001]),
        (Diffusion(variance="small"), [0.21, 0.065, 0.026, 0.013]),
        (Diffusion(schedule="cosine", variance="small", spacing="quadratic"), [0.07, 0.012, 0.004]),
        (EDM(), [0.21, 0.043, 0.016, 0.004]),
    ]:
        found = [distance(process, diffusion.dpmpp, n, 500) for n in (5, 10, 20, 40)]
        assert sorted(found, reverse=True) == found, found
        assert all(a < b for a, b in zip(found, most)), found
    for spacing, expected in [("even", [999, 666, 333, 0]), ("quadratic", [999, 444, 111, 0])]:
        assert Diffusion(spacing=spacing).levels(4) == expected
        for T, n in [(1000, 1000), (1000, 400), (7, 7), (7, 5), (2, 2), (1000, 1)]:
            levels = Diffusion(T, spacing=spacing).levels(n)
            assert levels == sorted(set(levels), reverse=True) and len(levels) == n
            assert levels[0] == T - 1 and (n == 1 or levels[-1] == 0)
    refused(lambda: Diffusion(spacing="odd"), "unknown spacing", "even or quadratic")
    shared = dict(SMALL, model="diffit")
    for fields, expected in [({}, "even"), ({"sampler": "dpmpp"}, "quadratic")]:
        assert diffusion.build(configs.Config(**shared, **fields)).spacing == expected


def test_ddpm_has_the_variance_of_the_data():
    """Ancestral sampling of N(0.2, 0.5^2) with the exact noise, 250 of 1000 steps: mean and
    deviation of the samples."""
    process = Diffusion(variance="large")
    torch.manual_seed(0)
    x = torch.randn(1, 1, 200, 200).double()
    x = diffusion.ddpm(process, gaussian(process, 0.2, 0.5), x, process.levels(250))
    close(x.mean(), 0.2, 0.01)
    close(x.std(), 0.5, 0.02)


def test_ddim_with_eta_1_is_ddpm_with_small_variance():
    def net(x, t):
        return golden_net(x, t)[:, :3]

    process = Diffusion(variance="small")
    x = unit("d:xT", 2, 3, 4, 4)
    levels = process.levels(20)
    a = diffusion.ddim(process, net, x, levels, eta=1.0, noise=golden_noise(), clip=True)
    close(a, diffusion.ddpm(process, net, x, levels, noise=golden_noise(), clip=True), 1e-9)


def test_samplers_can_be_watched():
    """watch(level, x) is called once a step, with x at that level, and changes nothing."""
    for process in (Diffusion(variance="small"), EDM()):
        net = gaussian(process, 0.2, 0.5)
        levels = process.levels(5)
        start = process.prior(unit("watch", 2, 3, 4, 4), levels[0])
        for sampler in SAMPLERS:
            options = dict(noise=golden_noise()) if sampler is diffusion.ddpm else {}
            plain = sampler(process, net, start, levels, **options)
            seen = []
            options = dict(noise=golden_noise()) if sampler is diffusion.ddpm else {}
            watched = sampler(
                process, net, start, levels, watch=lambda *at: seen.append(at), **options
            )
            assert torch.equal(watched, plain), sampler.__name__
            assert [level for level, _ in seen] == levels, sampler.__name__
            assert torch.equal(seen[0][1], start), sampler.__name__
            if sampler in (diffusion.ddim, diffusion.heun):  # steps that remember nothing
                for k in (2, 4):
                    end = sampler(process, net, seen[k][1], levels[k:])
                    assert torch.equal(end, plain), f"{sampler.__name__}, from x at step {k}"


class CountingNet:
    """A network that notes the size of each batch; its output is the label, then a constant."""

    y_embedder = diffit.LabelEmbedder(10, 1, dropout=0.0)

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append(len(x))
        label = y.double().view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([label, torch.ones_like(x)], dim=1)


def test_guidance():
    x = torch.zeros(2, 4, 1, 1).double()
    y = torch.tensor([3, 7])

    def run(*args):
        return guided(net, y, *args)(x, 100)[:, :, 0, 0]

    net = CountingNet()
    expected = [[10 + 2.5 * (3 - 10)] * 4 + [1] * 4, [10 + 2.5 * (7 - 10)] * 4 + [1] * 4]
    close(run(2.5), expected, 1e-12, "all channels")
    close(run(2.5, 3)[0], [-7.5, -7.5, -7.5, 3, 1, 1, 1, 1], 1e-12, "first three")
    assert net.calls == [4, 4], "one call for both halves"
    net = CountingNet()
    close(run(1.0), [[3] * 4 + [1] * 4, [7] * 4 + [1] * 4], 1e-12)
    run(lambda t: 1.0)
    guided(net, y, diffusion.power_cosine(4.4))(x, 999)
    assert net.calls == [2, 2, 2], "a scale of 1 needs no null half"
    net = CountingNet()
    for scale in (0.0, 0.5, 1.02):
        run(scale)
    assert net.calls == [4, 4, 4], "a scale below 1 is guidance, too"
    refused(lambda: guided(net, None, 2.0), "class labels", "scale of 1")


def test_the_unguided_half_runs_where_it_matters():
    """DiffiT-256's scale stays below 1.01 for 43 % of the steps (t >= 570): half a call each, and
    the images hardly differ. With exact, all of it runs."""
    process = Diffusion()
    y = torch.tensor([3, 7])
    x = unit("half", 2, 4, 1, 1)
    levels = process.levels(250)
    ends = []
    for exact in (False, True):
        net = CountingNet()
        f = guided(net, y, diffusion.power_cosine(4.4), 3, exact)
        ends.append(diffusion.ddim(process, lambda x, t: 0.1 * f(x, t), x, levels))
        whole = net.calls.count(4)
        assert whole + net.calls.count(2) == 250
        if exact:
            assert whole > 245, whole  # but for the levels where fp32 rounds the scale to 1
        else:
            assert whole == sum(t < 570 for t in levels), whole
    close(*ends, 1e-3)


def test_guidance_scales():
    times = [0, 500, 999]
    expected = [4.4, 1 + 3.4 * (1 - math.cos(math.pi / 16)) / 2, 1.0]
    scale = diffusion.power_cosine(4.4)
    close([scale(t) for t in times], expected, 1e-9, "power-cosine")
    # measured on the released schedule
    assert all((scale(t) < 1.01) == (t >= 570) for t in range(1000) if t != 569)
    process = Diffusion()
    sigma = [process.noise_level(t) for t in times]
    close(sigma, [math.sqrt(1 / process.abar[t] - 1) for t in times], 1e-12, "sigma of a timestep")
    scale = diffusion.interval(3.0, 0.02, 50, process)
    assert [scale(t) for t in times] == [1.0, 3.0, 1.0], "interval over timesteps"
    edm = EDM()
    times = [math.log(0.3) / 4, math.log(2.0) / 4]
    close([edm.noise_level(t) for t in times], [0.3, 2.0], 1e-12, "sigma of EDM")
    scale = diffusion.interval(3.0, 0.28, 1, edm)
    assert [scale(t) for t in times] == [3.0, 1.0], "interval over sigma"


def test_edm_draws_and_weights():
    torch.manual_seed(0)
    logs = EDM(p_mean=-0.4, p_std=1.3).draw(100_000).log()
    close([logs.mean(), logs.std()], [-0.4, 1.3], 0.02)
    sigma = torch.tensor([0.1, 1.0, 30.0]).double()
    losses = EDM().loss(lambda x, t: 0 * x, unit("w", 3, 3, 2, 2), sigma, unit("w:n", 3, 3, 2, 2))
    close(losses["loss"], losses["mse"] * (sigma**2 + 0.25) / (0.5 * sigma) ** 2, 1e-12)


def test_vp_and_ve_match_the_papers():
    """Their schedules in closed form, the network's second argument and back, and what they need of
    it: samplers with the exact network end in the data."""
    vp = VP()
    ve = VE(sigma_min=0.02, sigma_max=100.0)
    t = torch.linspace(0.01, 1, 9).double()
    beta = 0.1 + 19.9 * torch.linspace(0, 1, 100_001).double()
    integral = torch.cumulative_trapezoid(beta, dx=1e-5)
    abar = (-integral[(t * 100_000).round().long() - 1]).exp()  # of the continuous process
    close((1 / abar - 1).sqrt().log(), vp.sigma(t).log(), 1e-6)
    close(vp.time(vp.sigma(t)), t, 1e-9)
    mixture = Mixture()
    for process in (vp, ve, EDM(), diffusion.EDMx0()):
        sigma = torch.tensor([0.03, 0.5, 7.0, 60.0]).double()
        c_noise = process.coefficients(sigma)[3]
        back = torch.tensor([process.noise_level(t.item()) for t in c_noise])
        close(back / sigma, torch.ones(4), 1e-6)
        x = unit("vp", 1, 1, 2, 2)
        found = process.denoise(mixture.network(process), x, 0.4)
        close(found, mixture.denoise(x, 1.0, 0.4), 1e-6)
        assert distance(process, diffusion.heun, 40, points=300) < 0.01
    x = unit("x0", 2, 3, 4, 4)
    sigma = torch.tensor([0.3, 5.0]).double()
    losses = diffusion.EDMx0().loss(lambda x, t: 0 * x + 0.1, x, sigma)
    close(losses["mse"], ((x - 0.1) ** 2).mean((1, 2, 3)), 1e-12, "F is the image")
    close(losses["loss"] / losses["mse"], EDM().weight(sigma), 1e-12)
    torch.manual_seed(0)
    times = vp.time(vp.draw(50_000))
    close([times.mean(), times.std()], [0.5, 1 / math.sqrt(12)], 0.01)
    logs = ve.draw(50_000).log()
    close([logs.min(), logs.max()], [math.log(0.02), math.log(100)], 0.01)
    assert VE().draw(9_999).max() > 90, "the sampler's range does not bound it"
    x0 = unit("vp:x", 1, 3, 2, 2)
    noise = unit("vp:n", 1, 3, 2, 2)
    for process in (vp, ve):
        losses = process.loss(lambda x, t: 0 * x, x0, torch.tensor([2.0]).double(), noise)
        unexplained = (noise**2).mean().view(1)
        close(losses["loss"], unexplained, 1e-9, "a network of zeros misses the unit noise")


def test_churn_keeps_the_distribution():
    """EDM's stochastic sampler with the exact network: other images, the same Gaussian; outside its
    interval of noise levels it is Heun's method."""
    process = EDM()
    levels = process.levels(60)
    torch.manual_seed(0)
    x = process.prior(torch.randn(1, 1, 100, 100).double(), levels[0])
    net = gaussian(process, 0.2, 0.5)
    plain = diffusion.heun(process, net, x, levels)
    churned = diffusion.heun(process, net, x, levels, churn=30.0)
    assert (plain - churned).abs().mean() > 0.1
    close([churned.mean(), churned.std()], [0.2, 0.5], 0.02)
    outside = diffusion.heun(process, net, x, levels, churn=30.0, churn_interval=(200, 300))
    assert torch.equal(plain, outside)
    # Algorithm 2 for one step from sigma 2 with noise 1 and F = 0, so that D = c_skip x.
    one = torch.ones(1, 1, 1, 1).double()
    options = dict(churn=0.5, churn_noise=2.0, noise=lambda: one)
    found = diffusion.heun(process, lambda x, t: 0 * x, 0 * one, [2.0], **options)
    sigma = 2 * math.sqrt(2)  # 2 (1 + gamma), with the largest gamma there is
    noised = 2.0 * math.sqrt(sigma**2 - 4)
    close(found.view(1), [0.25 / (sigma**2 + 0.25) * noised], 1e-9)


def test_variance_and_channels_must_agree():
    x0 = unit("c", 1, 3, 2, 2)
    t = torch.tensor([3])
    for call, words in [
        (lambda: Diffusion().loss(lambda x, t: x, x0, t), ["6 output channels", "learn_sigma"]),
        (lambda: Diffusion(schedule="quadratic"), ["quadratic", "cosine"]),
        (lambda: Diffusion(variance="tiny"), ["tiny", "small"]),
        (lambda: EDM().levels(0), ["0 steps"]),
    ]:
        refused(call, *words)
    for variance in ("small", "large"):
        losses = Diffusion(variance=variance).loss(lambda x, t: 0 * x, x0, t)
        assert losses.keys() == {"loss", "mse"}
        assert torch.equal(losses["loss"], losses["mse"])


# -------------------------------------------------------------------------------------------------
# data.py


def pictures(root, broken=True):
    """Ordinary files in two classes, of mixed sizes, modes and formats; one is truncated."""
    rng = np.random.default_rng(0)

    def noise(height, width, channels=3):
        return rng.integers(0, 256, (height, width, channels), np.uint8).squeeze()

    (root / "cats").mkdir(parents=True)
    (root / "dogs").mkdir()
    Image.fromarray(noise(40, 50)).save(root / "cats/a.png")
    Image.fromarray(noise(64, 33)).save(root / "cats/b.jpg")
    Image.fromarray(noise(90, 90, 1)).save(root / "cats/grey.jpeg")
    Image.fromarray(noise(32, 32, 4), "RGBA").save(root / "dogs/alpha.png")
    Image.fromarray(noise(37, 45)).convert("P").save(root / "dogs/palette.gif")
    Image.fromarray(rng.integers(0, 65536, (35, 35)).astype(np.uint16)).save(root / "dogs/deep.png")
    Image.fromarray(noise(20, 200)).save(root / "dogs/wide.webp")
    (root / "dogs/notes.txt").write_text("not an image")
    if broken:
        (root / "dogs/broken.png").write_bytes((root / "cats/a.png").read_bytes()[:2000])


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            out.write(file, file.relative_to(root))
    return path


def encoded(image, kind="png", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def all_images(dataset):
    return np.stack([dataset.read(i) for i in range(len(dataset))])


def test_shapes_follow_from_seed_and_index():
    one = data.Shapes(32)
    two = data.Shapes(32)
    for i in (0, 7, 49_999):
        assert np.array_equal(one.read(i), two.read(i)) and one.labels[i] == i % 10
    assert one.read(3).shape == (32, 32, 3) and one.read(3).dtype == np.uint8
    assert not np.array_equal(one.read(0), data.Shapes(32, seed=1).read(0))
    assert not np.array_equal(one.read(0), one.read(10))
    large = Image.fromarray(data.Shapes(128).read(14)).resize((32, 32), Image.Resampling.BOX)
    off = np.abs(np.asarray(large).astype(float) - one.read(14))
    assert off.mean() < 2, "the same picture at any size"
    assert len(data.Shapes.class_names) == 10 == len({one.read(i).tobytes() for i in range(10)})


def test_center_crop_is_adms():
    """An image of the right size is untouched; halving is a box mean; the middle is cut."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert np.array_equal(data.center_crop(Image.fromarray(image), 16), image)
    halved = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
    found = data.center_crop(Image.fromarray(image), 8)
    assert np.abs(found - halved).max() <= 1, "it rounds twice"
    wide = np.zeros((10, 31, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (data.center_crop(Image.fromarray(wide), 10) == 200).all()
    for size in ((500, 37), (9, 5)):
        assert data.center_crop(Image.new("RGB", size), 32).shape == (32, 32, 3)


def test_center_crop_of_a_line_stays_small():
    """A picture of 1 x 10,000 pixels is not enlarged to 2.5 million rows to cut out 256."""
    line = np.zeros((10_000, 1, 3), np.uint8)
    line[4990:5010] = 77
    real = Image.Image.resize
    with patch.object(Image.Image, "resize", autospec=True, side_effect=real) as resize:
        for image in (line, line.transpose(1, 0, 2)):
            found = data.center_crop(Image.fromarray(image), 256)
            assert found.shape == (256, 256, 3) and (found == 77).all()
    for call in resize.call_args_list:
        assert math.prod(call.args[1]) < 1e6, call


def unreadable(content, *words):
    """These bytes are not an image, for a reason in one line that holds the words."""
    try:
        data.decode(io.BytesIO(content))
    except data.UnreadableImage as error:
        assert "\n" not in str(error)
        holds(str(error), words)
        return
    raise AssertionError(f"decoded, but should have been unreadable for {words}")


def test_decode_modes():
    def through(image, kind="png"):
        return np.asarray(data.decode(io.BytesIO(encoded(image, kind))))

    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((0, 0), (10, 20, 30, 255))
    white = [255] * 3
    assert through(half).tolist() == [[[10, 20, 30], white], [white, white]], "transparent is white"
    assert (through(Image.new("L", (2, 2), 77)) == 77).all()
    deep = Image.fromarray(np.full((2, 2), 257 * 99, np.uint16))
    assert (through(deep) == 99).all(), "16 bits"
    assert (through(Image.new("1", (2, 2), 1)) == 255).all()
    for kind in (np.float32, np.int32):  # pixels of an unknown range
        deep = encoded(Image.fromarray(np.full((2, 2), 200, kind)), "tiff")
        unreadable(deep, "32-bit", "16 bits")
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    file = io.BytesIO(encoded(Image.new("RGB", (4, 2)), "jpeg", exif=exif))
    assert data.decode(file).size == (2, 4)


def test_broken_images_are_unreadable_in_every_format():
    """Whatever Pillow raises for them (of eight types at least), decode raises UnreadableImage; a
    slip in decode itself would pass through as it is."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    png = encoded(image)
    for raw in (
        b"",
        b"not an image",
        png[:-500],
        png[:20],  # ends within the chunk of sizes: ValueError in Pillow
        png[:16] + b"\xff\xff\xff\xff" + png[20:],  # 4 billion pixels wide
        encoded(image, "webp", exif=b"not EXIF"),  # SyntaxError
        b"P3\n2 2\n255\n1 2 x",  # ValueError
    ):
        try:
            data.decode(io.BytesIO(raw))
        except data.UnreadableImage as error:
            assert "\n" not in str(error) and str(error)
        else:
            raise AssertionError(f"decoded: {raw[:30]}")
    rng = random.Random(0)
    broken = 0
    # Sizes that the damage makes large are refused as bombs, so that this takes no memory.
    with patch.object(Image, "MAX_IMAGE_PIXELS", 10_000), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm"):
            whole = encoded(image, kind, **({"exif": exif} if kind in ("png", "jpeg") else {}))
            for _ in range(200):
                damaged = bytearray(whole)
                for _ in range(rng.randint(1, 4)):
                    damaged[int(len(whole) * rng.random() ** 3)] = rng.randrange(256)
                if rng.random() < 0.3:
                    del damaged[rng.randrange(len(whole)) :]
                try:
                    assert data.decode(io.BytesIO(damaged)).mode == "RGB"
                except data.UnreadableImage:
                    broken += 1
    assert broken > 300, broken


def photograph(width, height, seed=0):
    """A picture with the spectrum of photographs: amplitudes of 1 / frequency, random phases."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(x, y), 1 / max(width, height))
    waves = [np.fft.ifft2(amplitude * np.fft.fft2(rng.normal(size=(height, width)))) for _ in "rgb"]
    waves = np.stack(waves, -1).real
    return Image.fromarray((128 + 50 * waves / waves.std()).clip(0, 255).astype(np.uint8))


def test_large_jpegs_are_decoded_smaller():
    """Where the crop halves an image twice or more, the JPEG is decoded at half its size or less:
    the crop stays where it was, and hardly changes; also where sides are odd, on their side in a
    camera's EXIF, or grey. Other crops do not change at all."""
    for width, height, size, smaller in [
        (500, 375, 64, True), (375, 500, 64, True), (501, 377, 32, True), (640, 427, 32, True),
        (1024, 1030, 32, True), (500, 375, 128, False), (100, 90, 64, False),
    ]:  # fmt: skip
        image = photograph(width, height)
        turned = Image.Exif()
        turned[0x0112] = 6
        for picture, options in [(image, {}), (image, {"exif": turned}), (image.convert("L"), {})]:
            file = io.BytesIO()
            picture.save(file, "jpeg", quality=90, **options)
            whole = data.decode(file)
            found = data.decode(file, size)
            assert (min(found.size) < min(whole.size)) == smaller
            assert 2 * size <= min(found.size) or found.size == whole.size
            expected = data.center_crop(whole, size).astype(int)
            difference = np.abs(data.center_crop(found, size) - expected)
            if smaller:
                assert 0 < difference.mean() < 2 and difference.max() <= 20, (width, height, size)
            else:
                assert not difference.any()


def test_a_zip_needs_little_room_in_workers():
    """A few numbers for each file, and no list of zipfile's, go to a worker; it reads the same."""
    with folder() as root:
        png = encoded(Image.new("RGB", (8, 8), (1, 2, 3)))
        names = [f"{k % 7}/a picture with a long name {k:06}.png" for k in range(5000)]
        files = data.open_dataset(written_zip(root / "a.zip", dict.fromkeys(names, png)))
        sent = pickle.dumps(files)
        assert len(sent) < 200 * len(names), len(sent) / len(names)
        there = pickle.loads(sent)
        assert there.read(4321)[0, 0].tolist() == [1, 2, 3]


def test_folder_zip_npz_and_prepared_zip_hold_the_same():
    with folder() as root:
        pictures(root / "pics", broken=False)
        files = data.open_dataset(root / "pics", 32)
        assert files.class_names == ["cats", "dogs"] and files.labels.tolist() == [0] * 3 + [1] * 4
        assert files.labels_from == "sub-folders"
        images = all_images(files)
        np.savez(root / "a.npz", images, arr_1=files.labels)
        data.prepare(root / "pics", root / "ready.zip", 32, workers=0)
        for path, labels_from in [
            (zipped(root / "pics", root / "a.zip"), "sub-folders"),
            (root / "a.npz", "arr_1"),
            (root / "ready.zip", "dataset.json"),
        ]:
            other = data.open_dataset(path, 32)
            assert other.labels.tolist() == files.labels.tolist(), path
            assert np.array_equal(all_images(other), images), path
            assert other.labels_from == labels_from
        assert data.open_dataset(root / "a.npz", 16).read(0).shape == (16, 16, 3)
        refused(lambda: data.prepare(root / "pics", root / "ready.zip", 32), "ready.zip", "exists")
        left = sorted(p.name for p in root.iterdir())
        assert left == ["a.npz", "a.zip", "pics", "ready.zip"], "nothing is left behind"


def test_links_are_followed_but_not_in_circles():
    with folder() as root:
        pictures(root / "all/pics", broken=False)
        pics = root / "all/pics"
        os.symlink(pics / "cats", pics / "lynxes")
        found = data.open_dataset(root / "all", 32)
        assert found.class_names == ["cats", "dogs", "lynxes"]
        assert found.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
        for link, target in [
            (pics / "cats/up", ".."),
            (pics / "dogs/here", "."),
            (pics / "dogs/there", "."),
            (pics / "cats/over", "../dogs/back"),
            (pics / "dogs/back", "../cats"),
        ]:
            os.symlink(target, link)
        found = data.open_dataset(root / "all", 32)
        assert found.class_names == ["cats", "dogs", "lynxes"]
        assert len(set(found.names)) == len(found) == 13
        assert found.labels.tolist() == [0] * 3 + [1] * 7 + [2] * 3, "dogs/back holds three more"


def written_zip(path, entries):
    """A zip whose names are stored as they are given, as other programs write them."""
    with zipfile.ZipFile(path, "w") as out:
        for name, content in entries.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            out.writestr(info, content)
    return path


def test_zips_of_other_programs_keep_their_classes():
    """The folder that everything lies in is no class; names with \\ (Windows) or ./ (libarchive)
    mean what they do there; labels in a dataset.json are relative to where it lies."""

    def png(value):
        return encoded(Image.new("RGB", (8, 8), (value, value, value)))

    with folder() as root:
        pictures(root / "all/pics", broken=False)
        for path in (
            zipped(root / "all/pics", root / "flat.zip"),
            zipped(root / "all", root / "deep.zip"),
        ):
            found = data.open_dataset(path, 32)
            assert found.class_names == ["cats", "dogs"]
            assert found.labels.tolist() == [0] * 3 + [1] * 4
        for shape in ("cats\\{}.png", "./cats/{}.png", "all\\cats\\{}.png"):
            names = [shape.format(0), shape.format(1), shape.replace("cats", "dogs").format(2)]
            path = written_zip(root / "a.zip", {name: png(k) for k, name in enumerate(names)})
            found = data.open_dataset(path, 8)
            assert found.class_names == ["cats", "dogs"], names
            assert found.labels.tolist() == [0, 0, 1], names
            assert all_images(found)[:, 0, 0, 0].tolist() == [0, 1, 2]
        names = [f"{k // 2:05}/img{k:08}.png" for k in range(6)]
        described = json.dumps({"labels": [[name, k % 3] for k, name in enumerate(names)]})
        for top in ("", "cifar/", "./", "a/b/"):
            entries = {top + name: png(k) for k, name in enumerate(names)}
            path = written_zip(root / "a.zip", {**entries, f"{top}dataset.json": described})
            found = data.open_dataset(path, 8)
            assert found.labels.tolist() == [0, 1, 2, 0, 1, 2], top
            assert found.labels_from == "dataset.json"
            assert all_images(found)[:, 0, 0, 0].tolist() == list(range(6)), top
        entries = {f"cifar/{name}": png(9) for name in names}
        written_zip(root / "a.zip", {**entries, "cifar/00001/dataset.json": described})
        refused(lambda: data.open_dataset(root / "a.zip", 8), "cifar/00001/dataset.json", "a.zip")
        with zipfile.ZipFile(root / "a.zip") as archive:
            archive.extractall(root / "a")
        refused(lambda: data.open_dataset(root / "a", 8), "cifar/00001/dataset.json")
        (root / "a/cifar/00001/dataset.json").rename(root / "a/cifar/dataset.json")
        assert data.open_dataset(root / "a", 8).labels.tolist() == [0, 1, 2, 0, 1, 2]


def cifar(path, kind, records):
    """A binary archive of n records as published: label bytes, then red, green and blue planes."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (records, 3, 32, 32), np.uint8)
    labels = rng.integers(0, kind, (records, 1), np.uint8)
    columns = [labels] if kind == 10 else [labels // 5, labels]
    rows = np.concatenate([*columns, images.reshape(records, -1)], axis=1)
    if kind == 100:
        parts = {"train.bin": rows}
    else:
        parts = {f"data_batch_{k + 1}.bin": part for k, part in enumerate(np.split(rows, 5))}
    with tarfile.open(path, "w:gz") as tar:
        for name, part in reversed(parts.items()):
            content = part.tobytes()
            info = tarfile.TarInfo(f"cifar-{kind}-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return images.transpose(0, 2, 3, 1), labels[:, 0]


def test_cifar_archives():
    with folder() as root:
        for kind in (10, 100):
            path = root / f"cifar-{kind}-binary.tar.gz"
            images, labels = cifar(path, kind, 20)
            found = data.open_dataset(path, 32)
            assert np.array_equal(all_images(found), images)
            assert found.labels.tolist() == labels.tolist()
            assert found.labels_from == "the archive"
        (root / "cut.tar.gz").write_bytes(path.read_bytes()[:9000])
        refused(lambda: data.open_dataset(root / "cut.tar.gz", 32), "cut.tar.gz", "damaged")
        with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
            info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
            info.size = 9
            tar.addfile(info, io.BytesIO(b"pickled..."))
        refused(lambda: data.open_dataset(root / "cifar-10-python.tar.gz", 32), "binary version")


def test_data_that_cannot_be_used_is_refused():
    with folder() as root:
        (root / "empty").mkdir()
        for name, content in [("text.csv", b"a,b"), ("bad.zip", b"PK"), ("bad.npz", b"PK")]:
            (root / name).write_bytes(content)
        np.savez(root / "other.npz", x=np.zeros(3))
        np.savez(root / "float.npz", np.zeros((2, 32, 32, 3), np.float32))
        np.savez(root / "short.npz", np.zeros((2, 32, 32, 3), np.uint8), arr_1=np.zeros(3, int))
        with zipfile.ZipFile(root / "bare.npz", "w") as archive:
            archive.writestr("arr_0", b"not an .npy")
        pictures(root / "mixed")
        Image.new("RGB", (8, 8)).save(root / "mixed/loose.png")
        for name, words in [
            ("nowhere", ["nowhere", "'shapes'"]),
            ("empty", ["no images", ".png", ".jfif", ".avif"]),
            ("text.csv", ["cannot tell", "text.csv", "'shapes'"]),
            ("bad.zip", ["bad.zip", "damaged"]),
            ("bad.npz", ["bad.npz"]),
            ("other.npz", ["arr_0", "found: x"]),
            ("float.npz", ["float32", "uint8"]),
            ("short.npz", ["arr_1", "2 images"]),
            ("bare.npz", ["no array arr_0"]),
            ("mixed", ["unclear"]),
        ]:
            refused(lambda: data.open_dataset(root / name, 32), *words)
        (root / "one/cats").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "one/cats/a.png")
        described = root / "one/dataset.json"
        for labels in (
            '{"labels": [["x.png", 0]]}',
            '{"labels": 3}',
            '{"labels": [["cats/a.png", "cat"]]}',
            '{"labels": [["cats/a.png", -1]]}',
            '{"labels": [["cats/a.png"]]}',
            "[]",
            "not json",
        ):
            described.write_text(labels)
            refused(lambda: data.open_dataset(root / "one", 32), "dataset.json")
        described.write_text('{"labels": null}')
        found = data.open_dataset(root / "one", 32)
        assert found.labels is None and found.labels_from == ""
        # A folder that cannot be listed is an error: its class would shift all others.
        with patch.object(os, "scandir", side_effect=PermissionError(13, "Permission denied")):
            raises(PermissionError, lambda: data.open_dataset(root / "one", 32), "denied")


def test_zips_with_unreadable_entries():
    """Another compression (Explorer takes Deflate64 above 2 GB), a password, damage: such images
    are unreadable, one by one; a dataset.json of that kind is refused."""

    def changed(raw, at_local, at_central, value):
        """A two-byte field of both of an entry's headers, in all entries."""
        raw = bytearray(raw)
        for mark, at in ((b"PK\3\4", at_local), (b"PK\1\2", at_central)):
            start = raw.find(mark)
            while start >= 0:
                raw[start + at : start + at + 2] = value.to_bytes(2, "little")
                start = raw.find(mark, start + 4)
        return bytes(raw)

    with folder() as root:
        path = root / "a.zip"
        pictures(root / "pics", broken=False)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            out.write(root / "pics/cats/a.png", "a.png")
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 0xFF
        broken = [changed(whole, 8, 10, 9), changed(whole, 6, 8, 1), bytes(damaged)]
        for raw in broken:
            path.write_bytes(raw)
            files = data.open_dataset(path, 32)
            refused(lambda: files.read(0))
            try:
                files.read(0)
            except data.UnreadableImage:
                pass
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            out.write(root / "pics/cats/a.png", "a.png")
            out.writestr("dataset.json", '{"labels": [["a.png", 0]]}')
        whole = path.read_bytes()
        for raw in (changed(whole, 8, 10, 9), changed(whole, 6, 8, 1)):
            path.write_bytes(raw)
            refused(lambda: data.open_dataset(path, 32), "a.zip")


def test_fingerprints_are_of_what_a_data_set_holds():
    """Not of where it lies; other classes, labels, names or pixels have another."""

    def fingerprint(path, size=32):
        found = data.open_dataset(path, size).fingerprint()
        assert len(found) == 16 and int(found, 16) >= 0
        return found

    with folder() as root:
        pictures(root / "pics")
        first = fingerprint(root / "pics")
        assert fingerprint(f"{root}/pics/") == first, "a slash"
        (root / "elsewhere").mkdir()
        moved = (root / "pics").rename(root / "elsewhere/other")
        assert fingerprint(moved) == first, "moved"
        seen = {first}

        def differs(new):
            assert new not in seen
            seen.add(new)

        (moved / "apes").mkdir()
        Image.new("RGB", (8, 8)).save(moved / "apes/x.png")
        differs(fingerprint(moved))
        (moved / "apes/x.png").rename(moved / "apes/y.png")
        differs(fingerprint(moved))
        (moved / "apes").rename(moved / "bears")
        differs(fingerprint(moved))
        Image.new("RGB", (8, 8), "red").save(moved / "bears/y.png")
        differs(fingerprint(moved))
        images = np.stack([data.Shapes(32).read(i) for i in range(20)])
        np.savez(root / "a.npz", images, arr_1=np.arange(20))
        np.savez(root / "b.npz", images, arr_1=np.arange(20))
        differs(fingerprint(root / "a.npz"))
        assert fingerprint(root / "b.npz") == fingerprint(root / "a.npz")
        np.savez(root / "b.npz", images, arr_1=np.arange(20)[::-1])
        differs(fingerprint(root / "b.npz"))
        images[:] = images[::-1].copy()
        np.savez(root / "b.npz", images, arr_1=np.arange(20))
        differs(fingerprint(root / "b.npz"))
        differs(fingerprint("shapes"))
        differs(data.Shapes(32, seed=1).fingerprint())
        differs(data.Shapes(32, n=100).fingerprint())
        assert data.Shapes(32).fingerprint() == fingerprint("shapes")


def test_order_follows_from_seed_and_place():
    shapes = data.Shapes(8, n=13)
    stream = data.ShuffledStream(shapes, seed=3, xflip=True)
    again = data.ShuffledStream(shapes, seed=3, xflip=True)
    first = [stream[p] for p in range(40)]
    for p in (39, 5, 17, 0, 26):  # any order of asking
        assert torch.equal(again[p][0], first[p][0]) and again[p][1] == first[p][1]
    known = {}
    for i in range(13):
        image = shapes.read(i)
        known[image.tobytes()] = i
        known[image[:, ::-1].tobytes()] = i
    seen = [known[x.permute(1, 2, 0).numpy().tobytes()] for x, _, _ in first[:26]]
    assert sorted(seen[:13]) == sorted(seen[13:]) == list(range(13))
    assert seen[:13] != seen[13:], "each epoch is another shuffle"
    plain = data.ShuffledStream(shapes, 0, False)
    mirrored = data.ShuffledStream(shapes, 0, True)
    unflipped = sum(plain[p][0].equal(mirrored[p][0]) for p in range(400))
    assert 140 < unflipped < 260
    other = data.ShuffledStream(shapes, 4)
    stream = data.ShuffledStream(shapes, 3)
    assert any(not other[p][0].equal(stream[p][0]) for p in range(5))


def test_workers_do_not_change_the_order():
    stream = data.ShuffledStream(data.Shapes(8, n=50), seed=1, xflip=True)
    batches = [range(k, k + 6) for k in range(0, 60, 6)]
    alone = list(data.loader(stream, batches, 0))
    shared = list(data.loader(stream, batches, 2))
    assert len(alone) == len(shared) == 10
    for a, b in zip(alone, shared):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_only_the_listed_formats_are_opened():
    """Whatever a name says: Pillow starts Ghostscript for PostScript."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with patch.object(subprocess, "Popen", Mock(side_effect=AssertionError("a program was run"))):
        unreadable(postscript, "not an image", "PNG")
        unreadable(encoded(Image.new("RGB", (4, 4)), "tga"), "not an image")
    with folder() as root:
        image = Image.new("RGB", (8, 8), (9, 99, 199))
        for end, kind in [("jfif", "jpeg"), ("jpe", "jpeg"), ("pgm", "ppm"), ("PNG", "png")]:
            image.save(root / f"{kind}.{end}", kind)
        names = [*(root / "x").parent.iterdir()]
        for name in ("a.txt", "b.txt", "c.heic", "none"):
            (root / name).write_bytes(b"something else")
        found = data.open_dataset(root, 8)
        assert len(found) == len(names) == 4
        close(all_images(found).mean((0, 1, 2)), [9, 99, 199], 0.02)
        assert found.summary() == "4 images; left out: 2 .txt, 1 .heic, 1 without a suffix"
        if hasattr(os, "mkfifo"):
            os.mkfifo(root / "pipe.png")
            with contextlib.redirect_stderr(io.StringIO()) as said:
                code, said = command(data, "prepare", root, root.with_suffix(".zip"), "--size", 8)
            root.with_suffix(".zip").unlink()
            assert code == 0 and "skipped pipe.png: it is not an ordinary file" in said, said
            refused(lambda: data.open_dataset(root / "pipe.png", 8), "pipe.png")
    huge = encoded(Image.new("1", (2**14, 2**14)))  # a few kB, 800 MB of pixels
    unreadable(huge, "268435456 pixels")


def test_classes_of_folders():
    with folder() as root:
        class_folders(root / "numbered", [str(k) for k in range(12)], each=1)
        numbered = data.open_dataset(root / "numbered", 8)
        assert numbered.class_names == [str(k) for k in range(12)]
        assert numbered.labels.tolist() == [*range(2), 10, 11, *range(2, 10)], "by path"
        for names in (["train", "val"], ["Training", "test", "valid"]):
            top = root / names[0]
            class_folders(top, names)
            words = [names[0], "parts of a data set", f"{top}/{sorted(names)[0]}"]
            refused(lambda: data.open_dataset(top, 8), *words)
        class_folders(root / "three/three", ["cats", "test", "train"])
        refused(lambda: data.open_dataset(root / "three", 8), "test and train")
        zipped(root / "three", root / "three.zip")
        refused(lambda: data.open_dataset(root / "three.zip", 8), "unpack it, and give test")
        class_folders(root / "heic", ["cats"])
        (root / "heic/dogs").mkdir()
        (root / "heic/dogs/a.heic").write_bytes(b"no codec")
        found = data.open_dataset(root / "heic", 8).summary()
        holds(found, ["1 classes: 0 cats", "left out: 1 .heic, all that is in dogs"])
        class_folders(root / "vehicles", ["car", "train"])
        assert data.open_dataset(root / "vehicles", 8).class_names == ["car", "train"]
        assert data.open_dataset(root / "train/train", 8).labels is None
        class_folders(root / "set/set", ["cats", "dogs"])
        shutil.copy(root / "set/set/cats/0.png", root / "set/set/preview.png")
        refused(lambda: data.open_dataset(root / "set", 8), "both beside and inside sub-folders")
        for name in ("Dataset.JSON", "dataset.json"):
            files = [f"{k}/0.png" for k in range(12)]
            labels = {"labels": [[file, 1] for file in files], "class_names": ["a", "b"]}
            (root / "numbered" / name).write_text(json.dumps(labels))
            found = data.open_dataset(root / "numbered", 8)
            assert found.summary() == "12 images of 2 classes: 0 a, 1 b (by dataset.json)"
            for names in (["a"], "ab", [1, 2]):
                (root / "numbered" / name).write_text(json.dumps({**labels, "class_names": names}))
                refused(lambda: data.open_dataset(root / "numbered", 8), "class_names")
            (root / "numbered" / name).unlink()


def test_the_names_of_classes_are_kept():
    """From folders through a prepared zip or latents and a checkpoint to samples and captions."""
    drawn = []
    text = data.ImageDraw.ImageDraw.text

    def watched(pen, at, words, *args, **options):
        drawn.append(words)
        return text(pen, at, words, *args, **options)

    with folder() as root, preset("tiny", **LATENT_PRESET):
        class_folders(root / "pics", ["flower", "china", "Zürich 東"])
        names = ["Zürich 東", "china", "flower"]
        succeeds(data, "prepare", root / "pics", root / "a.zip", "--size", 16, "--workers", 0)
        with zipfile.ZipFile(root / "a.zip") as archive:
            listed = json.loads(archive.read("dataset.json"))
        assert listed["class_names"] == names and dict(listed["labels"]), "and EDM's own form"
        vae = vae_file(root / "v.safetensors")
        cache(root / "a.zip", root / "z", "--vae", vae, "--size", 16)
        run = ("--preset", "tiny", "--data", root / "z", "--vae", vae, "--kimg", 0.004)
        for k, flags in enumerate(
            [
                (*TINY, "--data", root / "pics", "--sampling-steps", 1, "--kimg", 0.008),
                (*TINY, "--data", root / "a.zip", "--sampling-steps", 1, "--kimg", 0.008),
                run,
            ]
        ):
            with patch.object(data.ImageDraw.ImageDraw, "text", watched):
                holds(succeeds(train, *flags, "--out", root / str(k)), ["3 classes", *names])
            captions = [words for words in drawn if words[:2] in ("Zu", "ch", "fl")]
            assert captions == ["Zurich ", "china", "flower"], "one row of them, in their order"
            drawn.clear()
            model, cfg = load_model(root / str(k))
            assert model.class_names == names and cfg.num_classes == 3
            made = ("--ckpt", root / str(k), "--num-images", 4, "--sampling-steps", 1)
            made += ("--classes", "flower,0", "--out", root / f"{k}.png")
            with patch.object(data.ImageDraw.ImageDraw, "text", watched):
                succeeds(sample, *made)
            assert drawn == ["flower", "Zurich "]
            drawn.clear()


def test_captions_stand_above_rows_that_differ():
    images = np.zeros((4, 64, 64, 3), np.uint8)
    data.image_grid(images, 2, ["a\nb", "\x1b", "x" * 10**6, ""])  # names from anywhere
    plain = np.asarray(data.image_grid(images, 2))
    once = np.asarray(data.image_grid(images, 2, ["a", "b", "a", "b"]))
    twice = np.asarray(data.image_grid(images, 2, ["a", "b", "c", "d" * 99]))
    assert len(once) == len(plain) + CAPTION and len(twice) == len(plain) + 2 * CAPTION
    assert np.array_equal(once[-132:], plain[-132:]), "no caption above the second row"
    assert once[2 : 2 + CAPTION].min() < 100 and (once[2 : 2 + CAPTION, 68:].min() < 100)
    assert (twice[2 + 66 + CAPTION : 2 + 66 + 2 * CAPTION].min(2) < 200).any(1).sum() > 5


def test_messages_are_one_line_of_plain_letters():
    assert configs.printable("a\nb\x1b[2J\u2028é") == "a\\nb\\x1b[2J\\u2028é"
    assert configs.printable("x" * 10_000) == "x" * 4000 + "..."
    assert configs.short(10**5000) == "int of great length" and len(configs.short("x" * 99)) == 63
    with folder() as root:
        for k in range(3):
            (root / f"bad\n\x1b[31m{k}.png").write_bytes(b"broken")
        code, said = command(data, "prepare", root, root.with_suffix(".zip"), "--size", 8)
        assert code == 2 and said.count("\n") == 5 and "\x1b" not in said, said
        holds(said, ["3 of 3 images", "bad\\n\\x1b[31m0.png, bad"])
    with io.TextIOWrapper(io.BytesIO(), "ascii") as stdout, patch.object(sys, "stdout", stdout):
        parser = configs.Parser(prog="x.py")
        assert exit_code(lambda: configs.run_command(parser, lambda: print("é 東"))) == 0
        assert stdout.buffer.getvalue() == b"\\xe9 \\u6771\n"


def test_output_that_nobody_reads():
    """python configs.py | head: no traceback."""
    few = "import configs; configs.PRESETS = dict([*configs.PRESETS.items()][:2])"
    process = launch("configs", stdout=subprocess.PIPE, prepare=few)
    process.stdout.close()
    assert process.wait(LONG) == 141 and process.stderr.read() == ""


def test_unreadable_images_are_named_skipped_and_counted():
    with folder() as root:
        pictures(root / "pics")
        stream = data.ShuffledStream(data.open_dataset(root / "pics", 32))
        found = [stream[p] for p in range(16)]
        skipped = [name for _, _, unreadable in found for name, reason in unreadable]
        assert skipped == ["dogs/broken.png"] * 2, "once in each of two epochs"
        assert all(x.shape == (3, 32, 32) for x, _, _ in found)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            counter = data.UnreadableImages(range(1000))
            counter.add([(f"{i}.png", "cut short") for i in range(10)] * 2)
            last = [("last.png", "cut short")]
            refused(lambda: counter.add(last), "11 of 1000", "last.png", "1 %")
        assert said.getvalue().count("\n") == 11
        holds(said.getvalue(), ["3.png: cut short"])
        for file in (root / "pics").rglob("*.*"):
            file.write_bytes(b"")
        unreadable = data.ShuffledStream(data.open_dataset(root / "pics", 32))[0][2]
        with contextlib.redirect_stderr(io.StringIO()):
            counter = data.UnreadableImages(range(8))
            refused(lambda: counter.add(unreadable), "2 of 8 images", "more than 1 %")


def test_one_unreadable_image_is_forgiven_but_never_all():
    allowed = {1: 0, 2: 1, 99: 1, 199: 1, 200: 2, 50_000: 500}
    assert {n: data.max_unreadable(n) for n in allowed} == allowed
    with folder() as root:
        (root / "one").mkdir()
        (root / "one/a.png").write_bytes(b"not an image")
        stream = data.ShuffledStream(data.open_dataset(root / "one", 32))
        with contextlib.redirect_stderr(io.StringIO()):
            counter = data.UnreadableImages(stream.dataset)
            refused(lambda: counter.add(stream[0][2]), "a.png", "1 of 1")
        flags = (root / "one", root / "one.zip", "--size", 16, "--workers", 0)
        complains(data, "prepare", *flags, words=["a.png", "1 of 1"])
        assert not (root / "one.zip").exists()


class SlippingShapes(data.Shapes):
    """A user's own data set, with a mistake in its `read`."""

    def __init__(self, slip=NameError):
        super().__init__(32, n=100)
        self.slip = slip

    def read(self, i):
        raise self.slip("a slip")


def raises(kind, call, *words):
    """call() must raise exactly this kind of exception, with the words in its message."""
    try:
        call()
    except Exception as error:
        assert type(error) is kind, f"{type(error).__name__}: {error}"
        holds(str(error), words)
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def test_slips_in_code_are_not_unreadable_images():
    """In one's own `read`: the exception itself, not an image that is skipped."""
    for slip in (NameError, TypeError, ValueError, configs.UserError):
        dataset = SlippingShapes(slip)
        raises(slip, lambda: data.ShuffledStream(dataset)[0], "a slip")
        batches = data.IndexedImages.batches(dataset, range(4), 2, workers=0)
        raises(slip, lambda: list(batches), "a slip")
    unreadable = data.ShuffledStream(SlippingShapes(OSError))[0][2]
    assert len(unreadable) == 2, "a lost disk is skipped, and counted"


def test_slips_in_code_end_in_a_traceback():
    """Not in one sentence and exit code 2, whatever the command and whatever their type; and with
    workers the process ends, too."""

    def wrong_unpacking(self, x, c):
        B, N, D, E = x.shape

    with folder() as root:
        flags = (*TINY, "--kimg", 0.016, "--out")
        packing = ("prepare", "shapes", root / "x.zip", "--size", 8, "--workers")
        with patch.object(diffit.TMSA, "forward", wrong_unpacking):
            words = "not enough values to unpack"
            raises(ValueError, lambda: command(train, *flags, root / "a"), words)
        with patch.object(data, "open_dataset", lambda *args: SlippingShapes()):
            raises(NameError, lambda: command(train, *flags, root / "b"), "a slip")
            raises(NameError, lambda: command(data, *packing, 0), "a slip")
        slipping = "import data, test_all; data.open_dataset = lambda *_: test_all.SlippingShapes()"
        for process in (
            launch("train", *flags, root / "c", "--workers", 2, prepare=slipping),
            launch("data", *packing, 2, prepare=slipping),
        ):
            code, said = end_of(process)
            assert code == 1 and "Traceback" in said and "NameError: a slip" in said, said
        assert not list(root.glob("*.zip")) and not list(root.glob(".*")), "nothing is left behind"


def smooth(S):
    """Two pictures of S x S pixels without fine detail."""
    v = torch.linspace(-1, 1, S, dtype=torch.float64)
    y, x = torch.meshgrid(v, v, indexing="ij")
    one = torch.stack([(2 * x + y).sin(), (x * y * 3).cos(), x - y**2])
    two = torch.stack([(3 * y).cos(), (x - 2 * y).sin(), y * x])
    return torch.stack([one, two])


def test_augmentation_does_what_it_says():
    """Flips are flips; a turn by 90 degrees is rot90 inside; a shift by whole pixels is a shift;
    half the size puts pixel 2 k where k was; what goes up and down unchanged is unchanged."""

    def inside(x):
        return x[..., 5:-5, 5:-5]

    def turn(*angles):
        return data.rotation(torch.tensor(angles).double())

    S = 24
    x = smooth(S)
    no = torch.tensor([0, 0])
    yes = torch.tensor([0, 1])
    still = torch.zeros(2, 2).double()
    eye = torch.eye(2).double().expand(2, 2, 2)
    assert torch.equal(data.transform(x, no, no, eye, still), x)
    flipped = data.transform(x, yes, no, eye, still)
    assert torch.equal(flipped, torch.stack([x[0], x[1].flip(2)]))
    flipped = data.transform(x, no, yes, eye, still)
    assert torch.equal(flipped, torch.stack([x[0], x[1].flip(1)]))
    one_turned = data.transform(x, no, no, turn(0.0, 0.3), still)
    close(one_turned[0], x[0], 1e-9, "unchanged beside one that is turned")
    assert (one_turned[1] - x[1]).abs().max() > 0.05
    turned = data.transform(x, no, no, turn(math.pi / 2, math.pi / 2), still)
    close(inside(turned), inside(x.rot90(1, (2, 3))), 0.01, "a quarter turn")
    shift = torch.tensor([[3.0, 0.0], [0.0, -2.0]]).double()
    shifted = data.transform(x, no, no, eye, shift)
    rolled = torch.stack([x[0].roll(3, 2), x[1].roll(-2, 1)])
    close(inside(shifted), inside(rolled), 1e-9, "a shift")
    close(shifted[0, :, :, 2], x[0, :, :, 1], 1e-6, "reflected at the border")
    halved = data.transform(smooth(25), no, no, 2 * eye, still)
    close(halved[..., 8:17, 8:17], smooth(25)[..., 4:21:2, 4:21:2], 0.02, "half the size")
    ones = torch.ones(2, 3, 16, 16)
    white = data.transform(ones, no, no, data.rotation(torch.tensor([0.4, 2.0])), torch.ones(2, 2))
    close(white, ones, 1e-3, "white stays white")
    for scale in (0.7, 0.9, 1.3):
        white = data.transform(ones, no, no, scale * eye.float(), torch.zeros(2, 2))
        close(white, ones, 1e-3, f"white stays white, size 1 / {scale}")


def test_augmentation_labels_say_what_was_done():
    torch.manual_seed(0)
    x = torch.randn(400, 3, 8, 8)
    unchanged, none = data.augment(x, 0.0)
    assert torch.equal(unchanged, x)
    assert none.shape == (400, 9) and not none.any()
    _, labels = data.augment(x, 0.12)
    stretch = labels[:, 5:7].norm(dim=1)
    done = [labels[:, 0], labels[:, 1], labels[:, 2], labels[:, 4], stretch, labels[:, 7]]
    often = torch.stack([(d != 0).float().mean() for d in done])
    close(often, [0.5, 0.06, 0.12, 0.12, 0.12, 0.12], 0.06, "how often")
    ones = (labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2
    close(ones, torch.ones(400), 1e-5, "a cosine and a sine")
    for seed in range(20):  # rebuild the images from their labels
        torch.manual_seed(seed)
        x = smooth(16)
        augmented, l = data.augment(x, 0.5)
        turn = torch.atan2(l[:, 4], l[:, 3] + 1)
        axis = torch.atan2(l[:, 6], l[:, 5])
        off = []
        for sign in (1, -1):  # a stretch of -n along an axis has the labels of n the other way
            along = 2 ** (0.2 * sign * l[:, 5:7].norm(dim=1))
            stretch = torch.diag_embed(torch.stack([1 / along, along], 1))
            matrix = data.rotation(turn) @ data.rotation(-axis) @ stretch @ data.rotation(axis)
            matrix = matrix / (2 ** (0.2 * l[:, 2])).view(-1, 1, 1)
            rebuilt = data.transform(x, l[:, 0], l[:, 1], matrix, 0.125 * 16 * l[:, 7:])
            off.append((augmented - rebuilt).abs().flatten(1).amax(1))
        close(torch.minimum(*off), torch.zeros(2), 1e-6, f"seed {seed}")


CAPTION = 13  # pixels above the rows of a grid


def test_save_grid():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * 50
    images = images * np.ones((1, 80, 80, 3), np.uint8)
    with folder() as root:
        data.save_grid(images, root / "g.png", columns=3)
        grid = np.asarray(Image.open(root / "g.png"))
        assert grid.shape == (2 * 82 + 2, 3 * 82 + 2, 3)
        assert (grid[40, 40, 0], grid[40, 122, 0], grid[122, 40, 0]) == (0, 50, 150)
        assert (grid[122, 220] == 255).all()
        data.save_grid(images[:, :16, :16], root / "s.png")
        size = Image.open(root / "s.png").size
        assert size == (3 * 66 + 2, 2 * 66 + 2), "small images are enlarged"
        assert sorted(p.name for p in root.iterdir()) == ["g.png", "s.png"]
    x = torch.tensor([-2.0, -1, 0, 1, 3]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert data.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_prepare_command():
    with folder() as root:
        pictures(root / "pics")
        made = (root / "pics", root / "out.zip", "--size", 16)
        said = succeeds(data, "prepare", *made, "--workers", 0)
        holds(said, ["skipped dogs/broken.png", "7 images of 16 x 16, 2 classes"])
        with zipfile.ZipFile(root / "out.zip") as archive:
            listed = json.loads(archive.read("dataset.json"))
        assert listed["labels"][-1] == ["00000/img00000006.png", 1]
        new = root / "new.zip"
        for args, words in [
            (made, ["exists"]),
            ((root / "pics", root / "out.tar", "--size", 16), ["out.tar", ".zip"]),
            ((root / "nowhere", new, "--size", 16), ["nowhere"]),
            ((root / "pics", new, "--size", 0), ["--size", "0", "1 or more"]),
            ((*made, "--worker", 3), ["--worker", "did you mean --workers"]),
            ((root / "pics", root / "none/new.zip", "--size", 16), ["none", "does not exist"]),
        ]:
            complains(data, "prepare", *args, words=words)
        with patch.object(data, "rank_and_size", lambda: (1, 2)):
            refused(lambda: data.prepare(root / "pics", new, 16), "without torchrun")
        assert not new.exists()


# -------------------------------------------------------------------------------------------------
# data.py: files of weights, the VAE, latents

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path, tensors, metadata=None):
    """A file in the published format, tensors end to end in the order given."""
    header = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, value in tensors.items():
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        header[name] = {
            "dtype": SAFETENSORS_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def small_vae():
    """Two levels of 32 and 64 channels, filled like the reference's."""
    return fill(data.VAE((32, 64))).eval().requires_grad_(False)


def vae_file(path, gain=1.0):
    state = small_vae().state_dict()
    return write_safetensors(path, {name: gain * value for name, value in state.items()})


def test_golden_vae():
    vae = small_vae()
    gold = GOLDEN["vae"]
    x = unit("v:img", 2, 3, 16, 16, dtype=torch.float32).mul(0.5).clamp(-1, 1)
    mean, logvar = vae.posterior(x)
    decoded = vae.decode(unit("v:z", 2, 4, 8, 8, dtype=torch.float32) * data.VAE.scale)
    for name, found in (("mean", mean), ("logvar", logvar), ("decoded", decoded)):
        index, values = gold[name]
        close(found.flatten()[index], values, 1e-5, name)
    with torch.device("meta"):
        assert sum(p.numel() for p in data.VAE().parameters()) == 83_653_863


def test_vae_latents_are_scaled_samples_of_the_posterior():
    mean = unit("z:m", 1, 4, 2, 2)
    logvar = unit("z:v", 1, 4, 2, 2)
    noise = unit("z:n", 1, 4, 2, 2)
    q = torch.distributions.Normal(mean, logvar.exp().sqrt())
    found = data.VAE.latent(mean, logvar, noise)
    close(found, 0.18215 * (q.mean + q.stddev * noise), 1e-12)
    assert torch.equal(data.VAE.latent(mean, logvar), 0.18215 * mean), "the mode"
    vae = small_vae()
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    full = vae.decode(vae.posterior(x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = vae.decode(vae.posterior(x)[0])
    close(half, full, 0.1, "bf16")


def test_vae_reads_every_form_it_is_published_in():
    """Safetensors and .bin, today's names in the attention and the older ones, half precision."""
    state = small_vae().state_dict()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in state.items():
        for new_part, old_part in older.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        old[name] = value
    assert sum(name not in state for name in old) == 16
    with folder() as root:
        torch.save(old, root / "old.bin")
        for file in (
            write_safetensors(root / "new.safetensors", state),
            write_safetensors(root / "old.safetensors", old),
            root / "old.bin",
        ):
            assert same(dict(data.load_vae(file).state_dict()), dict(state)), file
        half = {name: value.half() for name, value in state.items()}
        vae = data.load_vae(write_safetensors(root / "half.safetensors", half))
        assert vae.quant_conv.weight.dtype == torch.float32
        close(vae.quant_conv.weight, state["quant_conv.weight"], 1e-3)
        del state["quant_conv.bias"]
        less = write_safetensors(root / "less.safetensors", state)
        refused(lambda: data.load_vae(less), "1 missing", "quant_conv.bias")
        dit = write_safetensors(root / "dit.safetensors", diffit.DiT(**SMALL).state_dict())
        refused(lambda: data.load_vae(dit), "dit.safetensors", "VAE of Stable Diffusion")


def test_safetensors_come_back_as_written():
    tensors = {
        "half": torch.tensor([1.5, -2.0, 3.0]).half(),
        "a": torch.arange(6.0).view(2, 3),  # begins at byte 6, and is not aligned
        "brain": torch.tensor([0.1, 1e30]).bfloat16(),
        "long": torch.tensor([[2**40]]),
        "none": torch.empty(0, 3),
        "yes": torch.tensor([True, False]),
        "one": torch.tensor(7.0).double(),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    with folder() as root:
        for metadata in (None, {"made": "here"}):
            path = write_safetensors(root / "x.safetensors", tensors, metadata)
            before = path.read_bytes()
            found = data.read_safetensors(path)
            assert data.safetensors_layout(path)[1] == (metadata or {})
            assert found.keys() == tensors.keys()
            for name, value in tensors.items():
                assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
            found["bytes"].zero_()
            assert path.read_bytes() == before, "the file is not written to"


def test_safetensors_that_lie_are_refused():
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    changes = [
        *({"data_offsets": at} for at in ([0, 17], [8, 24], [-16, 0], [16, 0], [0], None)),
        *({"shape": shape} for shape in ([-2, -2], [2**62, 2**62], [True, 4], [2.0, 2], [3, 2])),
        *({"shape": shape} for shape in ("22", [1] * 9, {})),
        {"shape": [2**63, 0], "data_offsets": [0, 0]},
        *({"dtype": dtype} for dtype in ("F9", ["F32"])),
    ]
    headers = [
        *({"w": {**good, **change}} for change in changes),
        *({"w": value} for value in (3, {}, None, [])),
        {"__metadata__": [1], "w": good},
        *([["w", good]], [1, 2], "w", None),
        {"w": good, "v": good},
        {"w": good, "v": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}},
    ]
    with folder() as root:
        path = root / "x.safetensors"
        for header in headers:
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
            refused(lambda: data.read_file(path), "x.safetensors")
        for raw in (
            b"123",
            (2**60).to_bytes(8, "little") + b"{}",
            bytes(8),
            b"\x02" + bytes(7) + b"[[",
            (100_000).to_bytes(8, "little") + b"[" * 100_000,
            b"\x05" + bytes(7) + b'{"w":',
        ):
            path.write_bytes(raw)
            refused(lambda: data.read_file(path), "x.safetensors is not a safetensors file")
        path.write_bytes(b"")
        refused(lambda: data.read_file(path), "x.safetensors is empty")


class PickledCall:
    """An object whose pickle is a call of os.mkdir, made when the pickle is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_are_recognised_and_nothing_else_is_run():
    state = diffit.DiT(**SMALL).state_dict()
    other = {name: value + 1 for name, value in state.items()}
    of_modules = {f"module.{name}": value for name, value in state.items()}
    compiled = {f"_orig_mod.{n.replace('.attn', '._orig_mod.attn')}": v for n, v in state.items()}
    with folder() as root:
        path = root / "x.pt"

        def took(content, ema=True, **options):
            torch.save(content, path, **options)
            found, kind = data.weights_in(data.read_file(path), path, ema)
            assert found.keys() == state.keys()
            first = torch.equal(found["pos_embed"], state["pos_embed"])
            return kind, "first" if first else "second"

        both = {"model": other, "ema": state}
        settings = {"opt": {}, "args": argparse.Namespace(lr=1)}
        assert took(state) == ("plain", "first")
        assert took(state, _use_new_zipfile_serialization=False) == ("plain", "first")
        assert took({**both, **settings}) == ("EMA", "first")
        assert took(both, ema=False) == ("raw", "second")
        assert took({"model": state}) == took({"state_dict": state}) == ("raw", "first")
        assert took(of_modules) == took(compiled) == ("plain", "first")
        refused(lambda: took(state, ema=False), "--no-ema")
        for content in ([1, 2], {}, {"lr": 3}, {"model": {}}, {0: torch.zeros(1)}):
            refused(lambda: took(content), "x.pt")
        refused(lambda: took({"w": PickledCall(root / "ran")}), "x.pt", "not a file of weights")
        assert not (root / "ran").exists()
        torch.save(state, path)
        with zipfile.ZipFile(path) as plain:
            with zipfile.ZipFile(root / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
                for name in plain.namelist():
                    bomb.writestr(name, plain.read(name))
        (root / "cut.pt").write_bytes(path.read_bytes()[:-500])
        (root / "empty.pt").write_bytes(b"")
        for name, words in [
            ("bomb.pt", ["bomb.pt", "compressed"]),
            ("cut.pt", ["cut.pt"]),
            ("empty.pt", ["empty.pt"]),
            ("none.pt", ["no file", "none.pt"]),
        ]:
            refused(lambda: data.read_file(root / name), *words)
        refused(lambda: data.read_checkpoint(path), "x.pt is not a checkpoint of train.py")


def test_weights_that_do_not_fit_are_listed_ten_at_most():
    model = diffit.DiT(**SMALL)
    count = len(model.state_dict())
    refused(lambda: data.check_weights(model, {}, "x.pt"), f"{count} missing", "; ...")
    state = {**model.state_dict(), **{f"extra{i}": torch.zeros(1) for i in range(12)}}
    state["pos_embed"] = torch.zeros(3)
    try:
        data.check_weights(model, state, "x.pt")
    except configs.UserError as error:
        text = str(error)
    assert text.count("extra") == 10, text
    holds(text, ["12 unexpected", "1 of another shape (pos_embed (3,), expected (1, 16, 64))"])


LATENT_PRESET = dict(
    SMALL,
    model="diffit",
    learn_sigma=True,
    sampling_steps=5,
    cfg_scale=4.4,
    cfg_schedule="power-cosine",
    cfg_channels=3,
    precision="fp32",
    lr=1e-3,
    ema_decay=0.9,
    batch_size=4,
    kimg=0.04,
    tick_kimg=0.008,
    sample_kimg=1,
    save_kimg=1,
    workers=0,
)


def test_published_files_make_images():
    """The published DiffiT as safetensors, with its integer index, DiTs as they are saved: each
    gives the images that network, sampler and VAE give when put together here."""
    networks = {"diffit": diffit.DiffiT, "dit": diffit.DiT}
    models = {name: fill(network(**SMALL)).eval() for name, network in networks.items()}
    dit = {**LATENT_PRESET, "model": "dit", "cfg_schedule": "constant", "cfg_scale": 1.5}
    with folder() as root, preset("tiny-diffit", **LATENT_PRESET), preset("tiny-dit", **dit):
        vae_file(root / "vae.safetensors")
        released = models["diffit"].state_dict()
        released["blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
        write_safetensors(root / "diffit.safetensors", released)
        torch.save(models["dit"].state_dict(), root / "dit.pt")
        trained = {"ema": models["dit"].state_dict(), "model": diffit.DiT(**SMALL).state_dict()}
        torch.save(trained, root / "dit-ema.pt")
        flags = ("--vae", root / "vae.safetensors", "--classes", "3,7", "--num-images", 3)
        flags += ("--batch", 2)
        for name, file, kind in [
            ("diffit", root / "diffit.safetensors", "plain"),
            ("dit", root / "dit.pt", "plain"),
            ("dit", root / "dit-ema.pt", "EMA"),
        ]:
            preset_name = f"tiny-{name}"
            npz = root / f"by-{file.name}.npz"
            said = succeeds(sample, "--ckpt", file, "--preset", preset_name, *flags, "--npz", npz)
            holds(said, [kind])
            cfg = configs.PRESETS[preset_name]
            shown = sample.Classes(cfg, [3, 7])
            latents = sample.generate(models[name], cfg, range(3), shown, batch=3)
            expected = data.to_uint8(torch.cat([small_vae().decode(x) for x, _ in latents]))
            with np.load(npz) as found:
                off = np.abs(found["arr_0"].astype(int) - expected).max()
                assert off <= 1 and found["arr_0"].std() > 5, off
                assert found["arr_1"].tolist() == [3, 7, 3]
        file = ("--ckpt", root / "diffit.safetensors")
        diffit_file = (*file, "--preset", "tiny-diffit")
        vae = ("--vae", root / "vae.safetensors")
        for args, words in [
            ((*file, *flags), ["--preset"]),
            ((*file, "--preset", "tiny-dit", *flags), ["8 missing", "adaLN", "9 unexpected"]),
            (diffit_file, ["--vae", "latents of 4 channels"]),
            ((*diffit_file, "--vae", file[1]), ["VAE of Stable Diffusion"]),
            (("--ckpt", vae[1], "--preset", "tiny-diffit", *vae), ["is a VAE", "--vae"]),
            ((*file, "--preset", "tiny-difit", *vae), ["did you mean tiny-diffit"]),
        ]:
            complains(sample, *args, "--out", root / "x.png", words=words)
        assert not (root / "x.png").exists()


def cache(*args):
    """data.py latents -> what it says."""
    return succeeds(data, "latents", *args, "--workers", 0)


def test_cached_latents_hold_the_posterior_and_its_mirror_image():
    with folder() as root:
        pictures(root / "pics")
        vae_file(root / "v.safetensors")
        said = cache(root / "pics", root / "z", "--vae", root / "v.safetensors", "--size", 16)
        holds(said, ["skipped dogs/broken.png", "7 images", "1 unreadable"])
        latents = data.open_dataset(root / "z", 8)
        files = data.open_dataset(root / "pics", 16)
        assert len(latents) == 7 and latents.channels == 4
        assert latents.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
        vae = small_vae()
        good = [i for i in range(8) if "broken" not in files.name(i)]
        for k, i in enumerate(good):
            for mirrored in (False, True):
                image = files.read(i)[:, ::-1] if mirrored else files.read(i)
                mean, logvar = vae.posterior(data.to_float(image[None].copy()))
                eps = np.random.default_rng(k).standard_normal((4, 8, 8), np.float32)
                expected = data.VAE.latent(mean, logvar, torch.from_numpy(eps))[0]
                found = latents.example(k, mirrored, np.random.default_rng(k))
                close(found, expected, 2e-3, f"{i}, mirrored: {mirrored}")
        stream = data.ShuffledStream(latents, seed=1)
        draws = []
        for first in range(0, 7 * 400, 7):
            stream[first]  # the order of this epoch
            draws.append(stream[first + stream.order.tolist().index(0)][0])
        draws = torch.stack(draws)
        mean, logvar = torch.from_numpy(np.load(root / "z/moments.npy")[0, 0].astype(np.float64))
        close(draws.mean(0), 0.18215 * mean, 0.05, "fresh samples each time: their mean")
        close(draws.std(0), 0.18215 * (logvar / 2).exp(), 0.05, "and deviation")
        again = data.ShuffledStream(latents, seed=1)
        assert torch.equal(stream[5][0], again[5][0]) and not torch.equal(draws[0], draws[1])


def check_latents(path, whole):
    """The folder must hold the same files as another one: moments within one rounding of fp16 (how
    many images are encoded at a time decides over the last digit), the others bit for bit."""
    names = {"latents.json", "moments.npy", "labels.npy", "state.npy"}
    assert files_of(path) == names
    for name in names - {"moments.npy"}:
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name
    expected = np.load(whole / "moments.npy").astype(float)
    assert expected.shape == (60, 2, 2, 4, 8, 8)
    close(np.load(path / "moments.npy").astype(float), expected, 1e-3)


@contextlib.contextmanager
def latents_to_make():
    """A folder with 60 small images and a VAE -> the folder, the images, flags, and the folder of
    latents that an unbroken run makes."""
    with folder() as root:
        images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
        np.savez(root / "a.npz", images, arr_1=np.arange(60) % 3)
        flags = ("--vae", vae_file(root / "v.safetensors"), "--size", 16, "--batch", 16)
        cache(root / "a.npz", root / "whole", *flags)
        yield root, root / "a.npz", flags, root / "whole"


def test_cached_latents_resume():
    """Stopped by Ctrl-C or by SIGTERM, or with places undone: refused as data until the same
    command has made the rest; then as if never stopped. Where all is done, nothing happens."""
    posterior = data.VAE.posterior
    with latents_to_make() as (root, images, flags, whole):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            calls = []

            def interrupted(self, x):
                calls.append(x)
                if len(calls) == 7:  # in the fourth batch: each is encoded mirrored, too
                    os.kill(os.getpid(), number)
                return posterior(self, x)

            out = root / f"stopped-{number}"
            seconds = itertools.count(step=10)  # so that it saves after each batch
            with patch.object(data.VAE, "posterior", interrupted):
                with patch("time.time", lambda: next(seconds)):
                    made = ("latents", images, out, *flags, "--workers", 0)
                    assert command(data, *made)[0] == code
            refused(lambda: data.open_dataset(out, 8), f"{60 - 3 * 16} of 60", "the same", "again")
            cache(images, out, *flags)
            check_latents(out, whole)
        out = root / "undone"
        shutil.copytree(whole, out)
        moments = np.load(out / "moments.npy", mmap_mode="r+")
        state = np.load(out / "state.npy", mmap_mode="r+")
        assert moments.dtype == np.float16 and (state == data.DONE).all()
        for i in (0, 3, 37, 59):
            moments[i] = 0
            state[i] = 0
        moments.flush()
        state.flush()
        refused(lambda: data.open_dataset(out, 8), "4 of 60", "the same", "again")
        cache(images, out, *flags)
        check_latents(out, whole)
        with patch.object(data.VAE, "posterior", None):
            holds(cache(images, out, *flags), ["complete"])


def test_cached_latents_in_two_processes():
    with latents_to_make() as (root, images, flags, whole):
        made = ("latents", images, root / "two", *flags, "--workers", 0)
        (code, *first), (other_code, *other) = torchrun("data", *made)
        assert code == other_code == 0, (first, other)
        holds("".join(first), ["60 images"])
        assert other == ["", ""], "the second process says nothing"
        check_latents(root / "two", whole)
        moved = data.open_dataset((root / "two").rename(root / "moved"), 8)
        assert moved.fingerprint() == data.open_dataset(whole, 8).fingerprint()
        refusals = torchrun("data", *made, "--size", 8, "--vae", root / "none.safetensors")
        assert [code for code, *_ in refusals] == [2, 2], refusals


def test_cached_latents_refuse():
    with latents_to_make() as (root, images, flags, whole):
        vae = flags[:2]
        size = flags[2:4]
        other_vae = ("--vae", vae_file(root / "w.safetensors", gain=1.1))
        other_images = np.zeros((60, 16, 16, 3), np.uint8)
        np.savez(root / "other.npz", other_images, arr_1=np.arange(60) % 3)
        (root / "file").write_text("precious")
        (root / "things").mkdir()
        (root / "things/a.txt").write_text("precious")
        new = root / "new"
        for args, words in [
            ((images, whole, *vae, "--size", 8), ["whole", "another size"]),
            ((images, whole, *other_vae, *size), ["whole", "another vae"]),
            ((root / "other.npz", whole, *flags), ["whole", "another data"]),
            ((images, root / "file", *flags), ["file"]),
            ((images, root / "things", *flags), ["things"]),
            ((images, root / "none/new", *flags), ["none", "does not exist"]),
            ((images, new, *vae, "--size", 15), ["--size 15", "multiple of 2"]),
            ((images, new, "--vae", images, *size), ["a.npz"]),
            ((whole, new, *flags), ["holds latents", "images"]),
            ((images, new, *flags, "--batch", 0), ["--batch"]),
        ]:
            complains(data, "latents", *args, words=words)
        complains(data, "prepare", whole, root / "c.zip", *size, words=["holds latents"])
        assert not [p for p in root.iterdir() if "new" in p.name or p.name.startswith(".")]
        assert (root / "file").read_text() == (root / "things/a.txt").read_text() == "precious"
        refused(lambda: data.open_dataset(whole, 32), "8 x 8", "32 x 32", "--size")
        refused(lambda: data.open_dataset(vae[1], 8), "cannot tell", "v.safetensors")
        header = (whole / "latents.json").read_text()
        for broken, words in [
            (header.replace("0.18215", "0.13025"), ["0.13025", "0.18215"]),
            (header.replace("diffit latents 2", "diffit latents 3"), ["whole"]),
            ("{", ["whole"]),
        ]:
            (whole / "latents.json").write_text(broken)
            refused(lambda: data.open_dataset(whole, 8), *words)


def test_training_on_latents():
    """From images to images: cached, trained, resumed as if never stopped, grids on the way,
    samples after."""
    with folder() as root, preset("tiny", **LATENT_PRESET, xflip=True):
        vae = vae_file(root / "v.safetensors")
        images = np.stack([data.Shapes(16).read(i) for i in range(40)])
        np.savez(root / "a.npz", images, arr_1=np.arange(40) % 10)
        cache(root / "a.npz", root / "z", "--vae", vae, "--size", 16)
        flags = ("--preset", "tiny", "--data", root / "z")

        def trained(out, *more):
            succeeds(train, *flags, "--out", root / out, *more)
            return torch.load(root / out / "last.pt", weights_only=True)

        whole = trained("whole", "--vae", vae)
        trained("parts", "--kimg", 0.024, "--workers", 2)
        assert same(whole, trained("parts")), "the resumed run differs"
        grid = root / "whole/samples-000000.png"
        assert Image.open(grid).size == (10 * 66 + 2, 4 * 66 + 2 + CAPTION)
        assert not (root / "parts/samples-000000.png").exists(), "no VAE, no grids"
        made = ("--num-images", 2, "--out", root / "x.png")  # the checkpoint names its VAE
        succeeds(sample, "--ckpt", root / "whole/last.pt", *made)
        assert Image.open(root / "x.png").size == (134, 68 + CAPTION)
        np.savez(root / "b.npz", images)
        cache(root / "b.npz", root / "unlabelled", "--vae", vae, "--size", 16)
        without = ("--data", root / "unlabelled", "--kimg", 0.004, "--out", root / "without")
        said = succeeds(train, "--preset", "tiny", *without)
        holds(said, ["40 images\n", "unconditional, as the data have no two classes"])
        other = vae_file(root / "w.safetensors", gain=1.1)
        for args, words in [
            ((*flags, "--vae", other), ["w.safetensors", "is not the one that made", f"{root}/z"]),
            (
                ("--preset", "tiny", "--data", root / "a.npz"),
                ["a.npz holds images", "data.py latents", "--vae"],
            ),
            ((*flags, "--input-size", 16), ["8 x 8", "16 x 16"]),
            (("--data", root / "z", "--input-size", 8), ["latents of 4 channels", "takes 3"]),
            (("--vae", vae), ["--vae", "pixels"]),
            ((*flags, "--clip-denoised"), ["--clip-denoised", "latents"]),
        ]:
            complains(train, *args, "--out", root / "new", words=words)
        assert not (root / "new").exists()


# -------------------------------------------------------------------------------------------------
# configs.py: presets and flags

FIELDS = [field.name for field in dataclasses.fields(configs.Config)]
# Neither a network nor its samples depend on these.
TRAINING = ["data", "xflip", *FIELDS[FIELDS.index("kimg") :]]


def reduced(cfg):
    """A preset's network in small, of the same code and proportions. Presets that differ in their
    training alone become equal."""
    if cfg.model in ("diffit", "dit"):
        small = dict(hidden_size=16, depth=1, num_heads=2)
    else:
        small = dict(channels=tuple(max(2, width // 16) for width in cfg.channels), cond_size=16)
        small |= dict(blocks=(1,) * len(cfg.blocks), num_heads=min(cfg.num_heads, 2))
    training = {name: getattr(configs.Config, name) for name in TRAINING}
    if cfg.set_size:
        small |= dict(set_depth=1)
        training["batch_size"] = cfg.set_size
    return dataclasses.replace(cfg, **small, **training, sampling_steps=2)


def test_every_preset_takes_a_step_and_samples():
    for cfg, name in {reduced(cfg): name for name, cfg in configs.PRESETS.items()}.items():
        torch.manual_seed(0)
        model = diffit.build(cfg)
        process = diffusion.build(cfg)
        x = torch.randn(2, cfg.in_channels, cfg.input_size, cfg.input_size)
        y = torch.tensor([0, cfg.num_classes - 1]) if cfg.num_classes else None
        shown = None
        if cfg.set_size:
            y = model.leave_one_out(x, 2)
            kinds = data.ShapeKinds(cfg.input_size, 1, 2)
            shown = sample.Support(cfg, kinds, "kinds")
        augmented = None
        if cfg.augment:
            x, augmented = data.augment(x, cfg.augment)
        losses = process.loss(lambda x, t: model(x, t, y, augmented), x, process.draw(2))
        loss = losses["loss"].mean()
        loss.backward()
        assert loss.isfinite(), name
        for found, _ in sample.generate(model.eval(), cfg, [0], shown):
            assert found.shape == x[:1].shape and found.isfinite().all(), name


def test_table_of_presets():
    """python configs.py: every preset builds at full size, on the meta device, and can list its
    levels. (Counting the multiply-adds of all of them would take half a minute: here, of three.)"""
    measure = diffit.measure
    counted = [configs.PRESETS[name] for name in ("shapes", "imagenet256", "dit-xl-2")]

    def quick_measure(cfg):
        if cfg in counted:
            return measure(cfg)
        with torch.device("meta"):
            return sum(p.numel() for p in diffit.build(cfg).parameters()), 0, 0

    with patch.object(diffit, "measure", quick_measure):
        said = succeeds(configs)
    lines = [line.split() for line in said.splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in configs.PRESETS}
    assert list(rows) == list(configs.PRESETS)
    assert sum(name.startswith("dit-") for name in rows) == 18
    assert said.count("\nDiffiT Table 3\n") == 1
    assert rows["dit-xl-2"][-4:] == ["2.27", "675M,", "119", "GFLOPs"]
    expected = ["diffit", "561.04M", "118.51", "256", "1.73"]
    assert rows["imagenet256"][1:6] == expected, rows["imagenet256"]
    others = "shapes cifar10 ffhq64 imagenet256-depth30 imagenet512 cifar100-450x6".split()
    assert rows.keys() >= set(others)
    for name, cfg in configs.PRESETS.items():
        levels = diffusion.build(cfg).levels(cfg.sampling_steps)
        assert len(levels) == cfg.sampling_steps and configs.SOURCES[name][0], name


def test_every_row_of_the_papers_tables_is_there():
    """The FIDs that DiffiT's tables report, by the preset that trains them."""
    paper = {
        **{"cifar10": 1.95, "ffhq64": 2.22, "imagenet256": 1.73, "imagenet512": 2.67},
        **{"dit-xl-2": 2.27, "dit-xl-2-512": 3.04, "dit-xl-2-in-context": 35.24},
        **{"dit-xl-2-cross": 26.14, "dit-xl-2-adaln": 25.21},
        **{"cifar10-512-512": 1.99, "cifar10-256-256": 2.13},
        **{"ffhq64-512-512": 2.27, "ffhq64-256-256": 2.41},
        **{"cifar10-a-vit-setr": 5.34, "cifar10-b-plain-setr": 4.64},
        **{"cifar10-c-plain-plain": 3.71, "cifar10-d-diffit-plain": 2.27},
        **{"ddpmpp-ve": 3.77, "ddpmpp-ve-tmsa": 3.49, "ddpmpp-vp": 3.01, "ddpmpp-vp-tmsa": 2.76},
        **{"cifar10-f-time-bias": 3.97, "cifar10-g-time-mlp": 3.81},
        **{"cifar10-time-token": 2.28, "ffhq64-time-token": 2.59},
        **{"cifar10-fourier": 2.02, "ffhq64-fourier": 2.37},
    }
    assert {name: fid for name, (_, fid) in configs.SOURCES.items() if fid} == paper
    recipe = "augment dropout xflip sampling_steps batch_size lr nonfinite_grads".split()
    for name, expected in [
        ("cifar10", (0.12, 0.13, False, 18, 512, 1e-3, "zero")),
        ("ffhq64", (0.15, 0.05, True, 40, 256, 2e-4, "zero")),
    ]:
        found = tuple(getattr(configs.PRESETS[name], field) for field in recipe)
        assert found == expected, f"{name} does not follow EDM: {found}"


def test_flags_change_presets():
    given = {"lr": 3e-4, "process": "edm", "learn_sigma": False, "sampler": "heun"}
    cfg = configs.config_from_preset("dit-s-2", given)
    assert (cfg.lr, cfg.process, cfg.hidden_size, cfg.diffusion_steps) == (3e-4, "edm", 384, 1000)
    given = {"model": "unet", "channels": (8, 8), "blocks": (1, 1)}
    unet = configs.config_from_preset("shapes", given)
    assert (unet.hidden_size, unet.depth, unet.data) == (0, 0, "shapes")
    assert configs.config_from_preset("dit-s-4", {**given, "cond_size": 8}).patch_size == 0
    summed = configs.config_from_preset("cifar10", {"process": "vp"})
    assert summed.loss_reduction == "mean", "for EDM alone"
    assert configs.config_from_preset("shapes", {"num_classes": 0}).cfg_scale == 1
    assert configs.numbers("4,4,0.5") == (4, 4, 0.5)
    assert isinstance(configs.numbers("4")[0], int)
    for given, words in [
        ({"hidden_size": 7.5e400}, ["--hidden-size"]),
        ({"depth": 8}, ["--depth", "diffit and dit", "unet"]),
        ({"model": "dit"}, ["--hidden-size is required for dit with edm-x0"]),
        (
            {"model": "dit", "hidden_size": 8, "depth": 1, "num_heads": 2},
            ["--patch-size is required for dit with edm-x0"],
        ),
        ({"lr": -1.0}, ["--lr -1.0"]),
        ({"sampler": "dpmp"}, ["dpmp", "did you mean dpmpp"]),
        ({"batch_size": 64, "micro_batch": 7}, ["7", "64"]),
        ({"num_classes": 0, "cfg_scale": 4.0}, ["--cfg-scale 4", "classes"]),
        ({"learn_sigma": True}, ["--learn-sigma", "ddpm"]),
        ({"kimg": 0.0}, ["--kimg"]),
        ({"dropout": 1.5}, ["--dropout"]),
        ({"sampling_steps": 2000, "process": "ddpm"}, ["2000", "1000"]),
        ({"cfg_interval": (1,)}, ["LOW,HIGH"]),
        ({"cfg_interval": (5, 1)}, ["LOW,HIGH"]),
        ({"eta": 0.5}, ["--eta", "ddim"]),
        ({"sampler": "ddim", "eta": 2.0}, ["--eta 2.0"]),
        ({"save_kimg": 0.5}, ["--save-kimg 0.5"]),
        ({"sigma_min": 90.0}, ["--sigma-min"]),
        ({"class_dropout_prob": 0.0}, ["--class-dropout-prob"]),
        ({"model": "unet", "channels": (8.5,), "blocks": (1,)}, ["whole numbers"]),
        ({"beta2": 1.0}, ["--beta2"]),
    ]:
        refused(lambda: configs.config_from_preset("shapes", given), *words)
    refused(lambda: configs.config_from_preset("fhq64", {}), "fhq64", "did you mean ffhq64")
    another = {**dataclasses.asdict(configs.PRESETS["shapes"]), "colour": "blue"}
    refused(lambda: configs.config_from_dict(another, "x.pt"), "x.pt", "another version", "colour")


def test_renamed_flags_are_answered_by_their_new_names():
    """Scripts written for earlier versions; no name resembles most of the new ones."""
    for name, new in [
        ("--cfg", "--cfg-scale"),
        ("--cfg=3", "--cfg-scale"),
        ("--steps", "--sampling-steps"),
        ("--clip", "--clip-denoised"),
        ("--nonfinite", "--nonfinite-grads"),
        ("--checkpoint-blocks", "--grad-checkpointing"),
    ]:
        complains(train, name, 3, words=[f"{name.split('=')[0]}; did you mean {new}?"])
    for name, answer in [
        ("--epochs", "--kimg X, the thousands of images"),
        ("--resume", "the same command again resumes"),
        ("--batch", "--batch-size N"),
        ("--image-size=64", "--input-size N"),
        ("--num_workers", "--workers N"),
        ("--fp16", "--precision fp16"),
    ]:
        words = [f"unknown argument {name.split('=')[0]}; here it is", answer]
        complains(train, name, 3, words=words)
    complains(sample, "--ckpt", "x", "--num-samples", 3, words=["here it is --num-images N"])
    for name, new in [
        ("--cfg", "--cfg-scale"),
        ("--steps", "--sampling-steps"),
        ("--clip", "--clip-denoised"),
        ("--n", "--num-images"),
        ("--raw", "--no-ema"),
    ]:
        complains(sample, "--ckpt", "x", name, 3, words=[f"{name}; did you mean {new}?"])


def test_help_says_everything():
    """Every flag of every command has a sentence, its default and its choices, in lines that fit 80
    columns."""
    parsers = []
    format_help = configs.Parser.format_help

    def remember(parser):
        parsers.append(parser)
        return format_help(parser)

    flags = set()
    with (
        patch.object(configs.Parser, "format_help", remember),
        patch.dict(os.environ, COLUMNS="80"),
    ):
        for module, *args in [
            (configs,),
            (data,),
            (data, "prepare"),
            (data, "latents"),
            (sample,),
            (sample, "--images"),
            (sample, "--reference", "x"),
            (sample, "--bench"),
            (train,),
        ]:
            said = succeeds(module, *args, "--help")
            assert max(map(len, said.splitlines())) <= 80, said
            parser = parsers.pop()
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    assert action.choices and all(c.help for c in action._choices_actions)
                    continue
                text = parser._get_formatter()._expand_help(action)
                told = f"{module.__name__}.py {args}: {action.option_strings or action.dest}"
                assert len(text.split()) > 2, f"{told} has no sentence: {text}"
                holds(said, action.option_strings)
                if action.option_strings and not action.required and action.dest != "help":
                    assert "default" in text, f"{told} shows no default: {text}"
                if module is train:
                    flags |= set(action.option_strings)
    fields = dataclasses.fields(configs.Config)  # train.py has all of them, in groups
    assert flags >= {configs.flag_of(field.name) for field in fields}
    holds(said, [f"{heading}:" for heading in configs.GROUPS.values()])
    words = " ".join(said.split())
    for field in fields:
        if field.metadata["choices"]:
            holds(words, ["{" + ",".join(field.metadata["choices"]) + "}"])


# -------------------------------------------------------------------------------------------------
# configs.py: the machine


def exit_code(call):
    """Of a process that does nothing but call()."""
    try:
        call()
    except SystemExit as end:
        return end.code
    return 0


def test_mistakes_of_users_end_in_a_sentence():
    parser = configs.Parser(prog="train.py")
    for error, code, words in [
        (configs.UserError("one thing"), 2, ["train.py: one thing"]),
        (FileNotFoundError(2, "No such file", "x.png"), 2, ["train.py:", "No such file", "x.png"]),
        (torch.OutOfMemoryError("9 GiB"), 2, ["train.py: out of memory; take less"]),
        (RuntimeError("DefaultCPUAllocator: can't"), 2, ["train.py: out of memory; take less"]),
        (RuntimeError("DataLoader worker (pid 7) is killed"), 2, ["worker died", "--workers"]),
        (RuntimeError("No working C++ compiler found"), 2, ["--compile needs a C++ compiler"]),
        (RuntimeError("[gloo] closed by peer"), 2, ["rank 0 lost the other", "start again"]),
        (KeyboardInterrupt(), 130, ["train.py: stopped"]),
    ]:
        said = io.StringIO()
        act = Mock(side_effect=error)
        with signals_restored(), contextlib.redirect_stderr(said):
            found = exit_code(lambda: configs.run_command(parser, act, "take less", "start again"))
        assert found == code, f"{error!r}: exit code {found}"
        holds(said.getvalue(), words)
        assert said.getvalue().count("\n") == 1, said.getvalue()
    with signals_restored():
        stopped = exit_code(lambda: configs.run_command(parser, lambda: signal.SIGTERM))
        assert stopped == 128 + signal.SIGTERM
        assert exit_code(lambda: configs.run_command(parser, lambda: None)) == 0


def test_slips_keep_their_traceback():
    parser = configs.Parser(prog="train.py")
    for slip in (
        ValueError("not enough values to unpack"),
        KeyError("loss"),
        RuntimeError("shapes cannot be multiplied"),
        RuntimeError("Caught ValueError in DataLoader worker process 0."),
    ):
        act = Mock(side_effect=slip)
        with signals_restored():
            raises(type(slip), lambda: configs.run_command(parser, act), slip.args[0])
    assert issubclass(configs.UserError, ValueError), "who calls the modules may catch ValueError"


def test_a_file_appears_whole_or_not_at_all():
    with folder() as root:
        path = root / "x.txt"
        path.write_text("before")
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            with contextlib.suppress(type(error)):
                with configs.atomic_write(path) as temporary:
                    temporary.write_text("half of i")
                    raise error
            assert path.read_text() == "before" and list(root.iterdir()) == [path]
        with configs.atomic_write(path) as temporary:
            temporary.write_text("after")
            assert path.read_text() == "before"
        assert path.read_text() == "after" and list(root.iterdir()) == [path]


class Terminal(io.StringIO):
    """Standard error as a terminal of so many columns."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def isatty(self):
        return True

    def fileno(self):
        return 2

    def rows(self):
        """The text that stands on the terminal: a character beyond the last column begins a new
        row, as it does there."""
        rows = [[]]
        column = 0
        for character in self.getvalue():
            if character == "\r":
                column = 0
                continue
            if character == "\n" or column == self.columns:
                rows.append([])
                column = 0
            if character != "\n":
                rows[-1][column : column + 1] = character
                column += 1
        return ["".join(row).rstrip() for row in rows]


@contextlib.contextmanager
def terminal(columns):
    """A Terminal as standard error."""
    screen = Terminal(columns)
    with (
        contextlib.redirect_stderr(screen),
        patch.object(os, "get_terminal_size", lambda *_: os.terminal_size((screen.columns, 24))),
        patch.object(configs.LIVE, "length", 0),
    ):
        yield screen


def test_the_live_line_fits_the_terminal():
    for columns in (80, 40):
        with terminal(columns) as screen:
            configs.live_line("kimg " + "9" * 100)
            assert [len(row) for row in screen.rows()] == [columns - 1]
            configs.live_line("kimg 2")
            assert screen.rows() == ["kimg 2"]
            configs.say("skipped a.png")
            assert screen.rows() == ["skipped a.png", ""], "the line is cleared for a message"
            configs.live_line("kimg 3")
            configs.live_line("kimg 40")
            configs.end_live_line()
            configs.say("complete")
            assert screen.rows() == ["skipped a.png", "kimg 40", "complete", ""]
            configs.live_line("kimg " + "9" * 100)
            screen.columns = 20  # the window was made smaller
            lines = len(screen.rows())
            configs.live_line("kimg 5")
            assert len(screen.rows()) <= lines, "no update is wider than the terminal"
    said = io.StringIO()  # a file, or the pipe of a cluster
    with contextlib.redirect_stderr(said), patch.object(configs.LIVE, "printed", time.time() - 61):
        for k in range(3):
            configs.live_line(f"kimg {k}")
    assert said.getvalue() == "kimg 0\n", "one line a minute"


def test_training_on_a_terminal():
    """Nothing is glued to the live line, and no update leaves a row of its own."""
    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 4, "sampling_steps": 1}
    given |= {"kimg": 0.04, "tick_kimg": 0.008, "workers": 0, "num_classes": 2}
    cfg = on_shapes(**given)
    for columns in (80, 40):
        with folder() as root:
            pictures(root / "pics")
            images = data.open_dataset(root / "pics", 32)
            with terminal(columns) as screen:
                train.train(cfg, images, root / "run", device=torch.device("cpu"))
                configs.end_live_line()
            rows = "\n".join(screen.rows())
            live = [row for row in screen.rows() if "of 0.04 kimg" in row]
            assert len(live) == 1 and rows.count("kimg") == 1, rows
            assert rows.startswith("skipped dogs/broken.png"), rows
            updates = screen.getvalue().replace("\n", "\r").split("\r")
            updates = [update for update in updates if "of 0.04 kimg" in update]
            assert len(updates) >= 6, f"one in the first tick, and one a tick: {updates}"
            assert max(map(len, updates)) < columns, updates


# -------------------------------------------------------------------------------------------------
# train.py: the average of the weights, the step


def test_ema():
    cfg = dataclasses.replace(configs.PRESETS["shapes"], ema_decay=0.9)
    model = nn.Linear(1, 1, bias=False)
    ema = train.EMA(model, cfg)
    start = ema.model.weight.item()
    for k in range(5):
        nn.init.constant_(model.weight, k)
        ema.update(images=0)
    expected = 0.9**5 * start + sum(0.1 * 0.9 ** (4 - k) * k for k in range(5))
    close(ema.model.weight.item(), expected, 1e-6)
    halflife = dict(ema_decay=0.0, ema_halflife_kimg=1.0, ema_rampup=0.05, batch_size=100)
    ema = train.EMA(model, dataclasses.replace(cfg, **halflife))
    close(ema.beta(1e6) ** 10, 0.5, 1e-12, "half after a half-life of 1000 images")
    close(ema.beta(4000), 0.5 ** (100 / 200), 1e-12, "ramp: 5 % of 4000 images")
    assert ema.beta(0) == 0, "the first step is copied"


def test_muon_takes_steps_of_equal_size_in_all_directions():
    """Of a matrix U S V^T five steps of Newton-Schulz leave U S' V^T with all of S' near 1,
    whatever S; the step is that of its momentum, longer for tall matrices, the same alone as among
    others."""
    torch.manual_seed(0)
    for shape in [(24, 24), (40, 24), (24, 40)]:
        u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
        sizes = torch.logspace(0, -2, 24)
        found = train.orthogonalize(u * sizes @ v)
        inside = u.mT @ found @ v.mT
        close(
            inside, torch.diag_embed(inside.diagonal(dim1=1, dim2=2)), 2e-4, "the same directions"
        )
        values = inside.diagonal(dim1=1, dim2=2)
        assert 0.65 < values.min() and values.max() < 1.25, values
    shapes = [(6, 4), (4, 6), (6, 4), (6, 2, 3, 3), (40, 2, 3, 3)]
    weights = [torch.randn(shape) for shape in shapes]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    muon = train.Muon(parameters, lr=0.1, weight_decay=0.5)
    momenta = [torch.zeros_like(w) for w in weights]
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        muon.step()
        for w, m, p in zip(weights, momenta, parameters):
            m.lerp_(p.grad, 0.05)
            update = (0.05 * p.grad + 0.95 * m).flatten(1)  # with Nesterov's look ahead
            rows, columns = update.shape
            update = train.orthogonalize(update[None])[0] * math.sqrt(max(1, rows / columns))
            w.mul_(1 - 0.1 * 0.5).sub_(0.1 * update.reshape(w.shape))
    for w, p in zip(weights, parameters):
        close(p.detach(), w, 1e-5)


def test_muon_trains_the_matrices_of_blocks():
    """All linear maps and convolutions in blocks, and no others; AdamW has the rest."""
    for name, fields in SMALL_NETWORKS.items():
        cfg = on_shapes(**{**fields, "muon_lr": 0.01, "sampling_steps": 1})
        trainer = train.Trainer(cfg, torch.device("cpu"))
        names = {p: n for n, p in trainer.model.named_parameters()}
        groups = [o.param_groups[0]["params"] for o in trainer.optimizers.values()]
        adamw, muon = [{names[p] for p in group} for group in groups]
        assert not adamw & muon and len(adamw | muon) == len(names)
        for n in adamw | muon:
            inside = ".blocks." in f".{n}" or re.match("(middle|down|up)[.]", n)
            weight = n.endswith("weight") and ".norm" not in n
            assert (n in muon) == bool(inside and weight), (name, n)


def test_learning_rate():
    cfg = dataclasses.replace(configs.PRESETS["shapes"], lr=2.0, kimg=100)
    ramp = dataclasses.replace(cfg, lr_rampup_kimg=10, lr_decay="constant")
    found = [ramp.lr * train.rate_share(ramp, n) for n in (0, 2500, 10_000, 90_000)]
    close(found, [0, 0.5, 2, 2], 1e-12)
    cosine = dataclasses.replace(cfg, lr_rampup_kimg=0.0, lr_decay="cosine")
    found = [cosine.lr * train.rate_share(cosine, n) for n in (0, 25_000, 50_000, 100_000)]
    close(found, [2, 1 + math.sqrt(0.5), 1, 0], 1e-12)
    for kimg, batch_size, steps in [(0.08, 8, 10), (0.081, 8, 11), (0.07, 10, 7), (1e-6, 8, 1)]:
        length = dataclasses.replace(cfg, kimg=kimg, batch_size=batch_size)
        assert train.total_steps(length) == steps, (kimg, batch_size)


def test_micro_batches_add_up_to_the_batch():
    """The gradient of 2 x 4 images is that of 8: with dropout, noise and timesteps out of the way,
    the same steps."""
    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 8}
    given |= {"class_dropout_prob": 0.0, "cfg_scale": 1.0}
    cfg = on_shapes(**given)

    def gradients(micro):
        torch.manual_seed(0)
        model = diffit.build(cfg)
        x = data.to_float(np.stack([data.Shapes(32).read(i) for i in range(8)]))
        process = diffusion.build(cfg)
        noise = torch.randn(8, 3, 32, 32)
        sigma = torch.rand(8) + 0.1
        y = torch.arange(8)
        for part in torch.arange(8).split(micro):
            network = functools.partial(model, y=y[part])
            losses = process.loss(network, x[part], sigma[part], noise[part])
            (losses["loss"].mean() * micro / 8).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(8), gradients(4), strict=True):
        close(a, b, 1e-4)
    with folder() as root:
        state = tiny_run(root / "run", "--micro-batch", 4)
        assert state["step"] == 10 and log_of(root / "run")[-1]["loss"] > 0


def test_non_finite_steps_are_skipped_and_ten_in_a_row_end_the_run():
    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 8, "sampling_steps": 1}
    given |= {"kimg": 0.16, "workers": 0, "tick_kimg": 0.16, "sample_kimg": 9.0}
    cfg = on_shapes(**given)
    loss = EDM.loss

    def poisoned(bad):
        counter = iter(range(1, 1000))

        def replacement(*args):
            factor = math.nan if bad(next(counter)) else 1
            return {name: value * factor for name, value in loss(*args).items()}

        return patch.object(EDM, "loss", replacement)

    with folder() as root:
        with poisoned(lambda k: k in (3, 4, 9)):
            state = train_here(cfg, root / "a")
        (entry,) = log_of(root / "a")
        assert state["progress"]["skipped"] == entry["skipped"] == 3
        assert math.isfinite(entry["loss"])
        assert all(value.isfinite().all() for value in state["ema"].values())
        with poisoned(lambda k: k > 5):
            refused(lambda: train_here(cfg, root / "b"), "10 steps in a row", "step 14", "--lr")


def test_non_finite_gradients_become_zero():
    """EDM's way: a step whose gradient is NaN in one parameter moves that one as a gradient of zero
    would, the others as ever; it is counted."""
    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 8}
    given |= {"nonfinite_grads": "zero", "grad_clip": 0.0, "precision": "fp32"}
    cfg = on_shapes(**given)
    x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    ends = []
    for poison in (math.nan, 0.0):
        trainer = train.Trainer(cfg, torch.device("cpu"))
        for p in trainer.parameters:  # a fresh head is zero, and hides the rest
            generator = torch.Generator().manual_seed(p.numel())
            nn.init.normal_(p, std=0.05, generator=generator)
        trainer.parameters[0].register_hook(lambda grad: grad * poison)
        _, norms = trainer.step(100, iter([(x, torch.arange(8), [])]))
        assert (norms is None) == math.isnan(poison)
        ends.append([p.detach() for p in trainer.parameters])
    for a, b in zip(*ends, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_summed_losses_train_as_in_edm():
    """EDM sums its loss over the pixels, so that its gradients are so many times larger beside
    Adam's eps of 1e-8; with means that is an eps as many times smaller. The log has means."""
    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 8, "grad_clip": 0.0}
    given |= {"precision": "fp32", "lr": 1e-3, "lr_rampup_kimg": 0.0}
    x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    pixels = 3 * 32 * 32

    def trained(reduction, eps):
        cfg = on_shapes(**given, loss_reduction=reduction)
        trainer = train.Trainer(cfg, torch.device("cpu"))
        trainer.optimizers["optimizer"].param_groups[0]["eps"] = eps
        batches = itertools.repeat((x, torch.arange(8), []))
        seen = [trainer.step(step, batches) for step in range(4)]
        losses = torch.stack([columns["loss"] for columns, _ in seen])
        return losses, seen[0][1], torch.cat([p.detach().flatten() for p in trainer.parameters])

    losses, norms, weights = trained("sum", 1e-8)
    mean_losses, mean_norms, mean_weights = trained("mean", 1e-8 / pixels)
    close(losses, mean_losses, 1e-5)
    close(norms / pixels, mean_norms, 1e-5)
    close(weights, mean_weights, 3e-4)
    moved = (trained("mean", 1e-8)[2] - weights).abs().max().item()
    assert moved > 1e-3, f"the eps matters: {moved}"
    summed = {name for name, cfg in configs.PRESETS.items() if cfg.loss_reduction == "sum"}
    assert summed == {name for name in configs.PRESETS if re.match("cifar10(-|$)|ffhq64", name)}


def test_recomputing_blocks_changes_nothing():
    common = dict(batch_size=4, kimg=0.016, sampling_steps=1, workers=0, cfg_scale=1.0)
    with folder() as root:
        for name in ("diffit", "unet"):
            given = {**SMALL_NETWORKS[name], **common, "precision": "fp32"}
            cfg = on_shapes(**given)
            again = dataclasses.replace(cfg, grad_checkpointing=True)
            states = train_here(cfg, root / name), train_here(again, root / f"{name}-again")
            assert same(*states), name
            assert same(log_of(root / name), log_of(root / f"{name}-again")), name


def test_fp16_scales_its_losses():
    """Half precision with a scaler learns what fp32 learns; the scaler's state is saved."""
    with folder() as root:
        flags = ("--tick-kimg", 0.08, "--sampling-steps", 1, "--lr", 3e-3)
        half = tiny_run(root / "fp16", *flags, "--precision", "fp16", kimg=0.24)
        full = tiny_run(root / "fp32", *flags, "--precision", "fp32", kimg=0.24)
        assert half["scaler"]["scale"] > 1 and not full["scaler"]
        losses = [[entry["loss"] for entry in log_of(root / name)] for name in ("fp16", "fp32")]
        assert losses[1][-1] < 0.9 * losses[1][0], losses
        close(losses[0][-1], losses[1][-1], 0.03)
        # A sum is thousands of times larger, and must not overflow the more often.
        summed = tiny_run(root / "sum", "--precision", "fp16", "--loss-reduction", "sum")
        assert summed["progress"]["skipped"] == 0 and summed["scaler"]["scale"] < 100


def test_bench_says_how_fast():
    seconds_per_call = configs.seconds_per_call

    def once(work, repeats, device, warmup=1):
        return seconds_per_call(work, 1, device, warmup=0)

    words = ("images/s", "TFLOP/s", "matrix product", "GB")
    with patch.object(configs, "seconds_per_call", once):
        holds(succeeds(train, "--bench", 1, *TINY[:8]), words)
        said = succeeds(sample, "--bench", 1, "--batch", 2, "--sampling-steps", 3)
        holds(said, [*words, "6.0 passes an image"])


# -------------------------------------------------------------------------------------------------
# train.py: runs


def log_of(out):
    """The entries of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_training(a, b):
    """Are the two checkpoints of the same weights and optimizer, whatever the runs logged?"""
    return all(same(a[part], b[part]) for part in ("step", "model", "ema", "optimizer"))


def stopped_run(out, *flags):
    """`tiny_run`, stopped by a signal in its third step, which is the middle of a tick."""
    read = data.Shapes.read
    counter = iter(range(1, 1000))

    def interrupting_read(self, i):
        if next(counter) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, i)

    with patch.object(data.Shapes, "read", interrupting_read):
        code, said = command(train, *TINY, "--out", out, "--kimg", 0.08, *flags)
    assert code == 143 and "stopped by SIGTERM and saved" in said, said
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3


def test_training_lowers_the_loss_and_writes_its_files():
    with folder() as root:
        flags = (*TINY, "--batch-size", 20, "--lr", 4e-3, "--tick-kimg", 0.1, "--out", root / "run")
        flags += ("--kimg", 1.2, "--sample-kimg", 1, "--save-kimg", 1)
        holds(succeeds(train, *flags), ["complete"])
        log = log_of(root / "run")
        assert log[-1]["loss"] < 0.8 * log[0]["loss"], (log[0], log[-1])
        assert [entry["step"] for entry in log] == list(range(5, 61, 5))
        names = "kimg lr grad_norm mse images_per_s data_wait skipped unreadable memory_gb"
        assert set(names.split()) <= log[0].keys()
        names = "config.json log.jsonl loss.png last.pt previous.pt 000001.pt samples-000001.png"
        assert files_of(root / "run") == set(names.split())
        assert Image.open(root / "run/loss.png").size == (1200, 800)
        state = torch.load(root / "run/last.pt", weights_only=True)
        names = "format config dataset class_names step progress model ema optimizer scaler"
        assert set(state) == set(names.split()), state.keys()
        assert state["dataset"] == data.Shapes(32).fingerprint()
        assert "log" not in state["progress"], "a long log would make each checkpoint slow"
        holds(succeeds(train, *flags), ["resumed", "complete"])


def test_resumed_equals_unbroken():
    """Stopped by a signal in the middle of a tick and started again by the same command: every
    tensor and the log, bit for bit. Entries after the checkpoint leave the log, as those of a run
    that was killed before the next one; the last of them is cut short."""
    with folder() as root:
        whole = tiny_run(root / "whole")
        stopped_run(root / "parts")
        with open(root / "parts/log.jsonl", "a") as file:
            file.write('{"step": 4, "kimg": 0.032, "loss": 9}\n{"step": 6, "kimg": 0.0')
        parts = tiny_run(root / "parts")
        assert whole["step"] == 10 and same(whole, parts), "the resumed run differs"
        assert same(log_of(root / "whole"), log_of(root / "parts"))
        assert [entry["step"] for entry in log_of(root / "parts")] == [2, 4, 6, 8, 10]
        other = tiny_run(root / "other", "--seed", 1, kimg=0.008)
        assert not same(whole["model"], other["model"])


OLD_NAMES = {
    "cfg_scale": "cfg",
    "sampling_steps": "steps",
    "clip_denoised": "clip",
    "nonfinite_grads": "nonfinite",
    "grad_checkpointing": "checkpoint_blocks",
}


def as_written_before(out):
    """Rewrite a run as the version before saved it: other names, the log and an order of buckets in
    the checkpoint, no fingerprint of the data."""
    state = torch.load(out / "last.pt", weights_only=True)
    note = json.loads((out / "config.json").read_text())
    for values in (note, state):
        del values["dataset"]
    note = {OLD_NAMES.get(name, name): value for name, value in note.items()}
    progress = state["progress"]
    progress["seen"] = progress.pop("columns")
    progress["log"] = log_of(out)
    state["config"] = {OLD_NAMES.get(name, name): v for name, v in state["config"].items()}
    state["averager"] = {"order": list(range(9))}
    torch.save(state, out / "last.pt")
    (out / "config.json").write_text(json.dumps(note))


def test_a_checkpoint_of_the_version_before_samples_and_resumes():
    with folder() as root:
        whole = tiny_run(root / "whole")
        stopped_run(root / "run")
        state = torch.load(root / "run/last.pt", weights_only=True)
        assert len(state["progress"]["columns"]) == 1, "it is in the middle of a tick"
        as_written_before(root / "run")
        model, cfg = load_model(root / "run/last.pt")
        assert same(dict(model.state_dict()), dict(state["ema"]))
        assert cfg == configs.config_from_dict(whole["config"], "")
        assert cfg.clip_denoised and (cfg.cfg_scale, cfg.sampling_steps) == (2, 3)
        copy = root / "copy"
        shutil.copytree(root / "run", copy)
        np.savez(root / "a.npz", np.zeros((4, 32, 32, 3), np.uint8), arr_1=np.arange(4))
        for flags, words in [
            (("--lr", 0.5), ["lr is 0.001 there and 0.5 here"]),
            (("--nonfinite-grads", "zero"), ["nonfinite_grads is 'skip' there and 'zero' here"]),
            (("--data", root / "a.npz"), ["same data", "shapes"]),
        ]:
            complains(train, *TINY, "--out", copy, *flags, words=["another run", *words])
        assert same(tiny_run(root / "run"), whole)
        assert same(log_of(root / "run"), log_of(root / "whole"))


def test_a_signal_ends_the_step_and_is_saved():
    """To all of the processes, as Ctrl-C on a terminal: the workers leave it to the main one."""
    with folder() as root:
        process = start("--out", root / "run", "--kimg", 1000, workers=2)
        await_line(process, "loss")  # training is under way
        os.killpg(process.pid, signal.SIGTERM)
        code, said = end_of(process)
        assert code == 143 and "stopped by SIGTERM and saved" in said, said
        assert "Traceback" not in said, said
        stopped = torch.load(root / "run/last.pt", weights_only=True)
        whole = tiny_run(root / "whole", kimg=stopped["step"] * 8 / 1000)
        assert same_training(stopped, whole), "stopped is not like never stopped"


def test_a_scheduler_that_signals_everyone_twice():
    """torchrun, its processes and their workers all get SIGTERM, and a few milliseconds later
    again: the step ends and is saved, and nothing stays behind."""
    flags = (*TINY[:-1], 2, "--kimg", 1000)
    with folder() as root:
        argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        argv += ["train.py", *map(str, flags), "--out", str(root / "run")]
        job = subprocess.Popen(
            argv,
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        STARTED.append(job)
        await_line(job, " loss ")
        everyone = [job.pid, *descendants(job.pid)]
        assert len(everyone) >= 1 + 2 + 2, "torchrun, two processes, a worker each or more"
        for _ in range(2):
            for pid in everyone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.004)
        said = end_of(job)[1]
        holds(said, ["stopped by SIGTERM and saved"])
        stopped = torch.load(root / "run/last.pt", weights_only=True)
        assert stopped["step"] > 0
        await_end(everyone)
        done = stopped["step"] * 8 / 1000
        holds(succeeds(train, *flags, "--kimg", done, "--out", root / "run"), ["complete"])


def descendants(pid):
    """The processes that it has started, and those that these have started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *descendants(child))]


def await_end(pids):
    """All of these processes must end within a minute."""
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and running(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.1)


def running(pid):
    """Is it there, and not only waiting for its parent to take its exit code?"""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_killed_run_leaves_no_worker_and_no_lock():
    """While it runs, its folder is taken; once it is gone, by whatever way, it is free."""
    with folder() as root:
        process = start("--out", root / "run", "--kimg", 1000, workers=2)
        await_line(process, " loss ")
        workers = descendants(process.pid)
        assert len(workers) >= 1
        taken = ["another process is working in", "run"]
        complains(train, *TINY, "--out", root / "run", "--kimg", 1000, words=taken)
        complains(train, *TINY, "--out", root / "run", "--overwrite", words=taken)
        for pid in workers:
            for number in configs.ENDING:
                os.kill(pid, number)  # a worker outlives what is meant for the run
        time.sleep(0.5)
        assert process.poll() is None and all(map(running, workers))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        tiny_run(root / "run", kimg=0.016)
        await_end(workers)


def test_folders_are_locked_for_sampling_and_latents():
    holder = (
        "import configs, sys\n"
        "with configs.exclusive(sys.argv[1]):\n    print(1, flush=True)\n    sys.stdin.read()"
    )

    @contextlib.contextmanager
    def held(path):
        argv = [sys.executable, "-c", holder, str(path)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = subprocess.Popen(argv, cwd=Path(__file__).parent, **pipes)
        STARTED.append(process)
        assert process.stdout.readline() == "1\n"
        yield
        process.communicate("")

    with checkpoint() as (root, path):
        flags = ("--ckpt", path, "--num-images", 2, "--sampling-steps", 1, "--dir", root / "each")
        with held(root / "each"):
            complains(sample, *flags, words=["another process is working in", "each"])
            assert files_of(root / "each") == set()
        succeeds(sample, *flags)
    with latents_to_make() as (root, images, flags, _):
        made = ("latents", images, root / "z", *flags, "--workers", 0)
        with held(root / "z"):
            complains(data, *made, words=["another process is working in", "z"])
            assert files_of(root / "z") == set()
        succeeds(data, *made)


def test_processes_that_do_not_know_each_other_are_refused():
    """As srun starts them."""
    with folder() as root, patch.dict(os.environ, SLURM_NTASKS="8"):
        words = ["SLURM_NTASKS is 8", "srun", "torchrun --nproc_per_node"]
        complains(train, *TINY, "--out", root / "run", words=words)
        assert not (root / "run").exists()


def test_signals_that_are_ignored_stay_ignored():
    """Under nohup the end of a terminal is nothing to a run."""
    with signals_restored():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with train.StopSignal() as stop:
            configs.end_on_signals()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with train.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == signal.SIGHUP


def test_a_terminal_that_is_closed_does_not_lose_the_run():
    """Writing to it fails, and its end is a SIGHUP."""
    closed = Mock(isatty=lambda: True, write=Mock(side_effect=OSError(5, "Input/output error")))
    closed.fileno.side_effect = OSError
    sync_status = train.sync_status

    def hung_up(stop, *args):
        stop.ask(signal.SIGHUP, None)
        return sync_status(stop, *args)

    cfg = on_shapes(hidden_size=16, depth=1, num_heads=2)
    cfg = dataclasses.replace(cfg, batch_size=4, workers=0, tick_kimg=0.004)
    with folder() as root:
        with patch.object(sys, "stderr", closed), patch.object(train, "sync_status", hung_up):
            cpu = torch.device("cpu")
            assert train.train(cfg, data.Shapes(32), root, device=cpu) == signal.SIGHUP
        assert data.read_checkpoint(root / "last.pt")["step"] == 1


def test_nothing_that_is_open_or_mapped_is_renamed():
    """Windows refuses to rename, replace or remove what a process has open or mapped."""
    moves = {name: getattr(os, name) for name in ("replace", "rename", "link", "unlink", "remove")}

    def in_use():
        """All paths that this process has mapped or open."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = [line.split(maxsplit=5)[5] for line in lines if "/" in line]
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of this very list
                paths.append(os.readlink(f"/proc/self/fd/{number}"))
        return paths

    def checked(name):
        def move(*paths, **options):
            for path in map(os.path.realpath, paths):
                busy = [used for used in in_use() if used == path or used.startswith(path + "/")]
                assert not busy, f"os.{name} of {paths}, of which {busy} are in use"
            return moves[name](*paths, **options)

        return move

    flags = ("--sampling-steps", 1, "--sample-kimg", 1, "--save-kimg", 1, "--batch-size", 100)
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(folder())
        for name in moves:
            stack.enter_context(patch.object(os, name, checked(name)))
        for kimg in (1, 2, 3):  # resumed twice, each with a grid, a numbered checkpoint, last.pt
            tiny_run(root / "run", *flags, kimg=kimg)
        made = ("--ckpt", root / "run", "--num-images", 2, "--sampling-steps", 1)
        succeeds(sample, *made, "--npz", root / "a.npz", "--gif", root / "a.gif")
        vae = vae_file(root / "v.safetensors")
        cache(root / "a.npz", root / "z", "--vae", vae, "--size", 16)
        cache(root / "a.npz", root / "z", "--vae", vae, "--size", 16)
        (root / "x").write_bytes(b"1")
        with open(root / "x"):
            raises(AssertionError, lambda: os.replace(root / "x", root / "y"), "in use")
        busy = np.memmap(root / "x", np.uint8, "r")
        raises(AssertionError, lambda: os.unlink(root / "x"), "in use")
        del busy


def test_devices():
    there = patch.object(torch.cuda, "is_available", lambda: True)
    apple = patch.object(torch.backends.mps, "is_available", lambda: True)
    with folder() as root, patch.object(configs.DEVICE, "kind", "auto"):
        for kind, words in [("cuda", "NVIDIA"), ("mps", "Apple")]:
            if not {"cuda": torch.cuda, "mps": torch.backends.mps}[kind].is_available():
                words = [f"--device {kind}", words, "--device cpu"]
                complains(train, *TINY, "--out", root / "run", "--device", kind, words=words)
        with apple:
            with patch.object(torch.cuda, "is_available", lambda: False):
                assert configs.default_device() == torch.device("mps")
            configs.choose_device("cpu")
            assert configs.default_device() == torch.device("cpu")
            configs.choose_device("mps")
            assert not configs.has_float64(configs.default_device())
            with patch.dict(os.environ, WORLD_SIZE="2"):
                refused(configs.join_processes, "Apple GPU", "--device cpu")
        with there, patch.dict(os.environ, LOCAL_RANK="1"):
            configs.choose_device("auto")
            assert configs.default_device() == torch.device("cuda", 1)


def test_workers_need_no_shared_memory():
    """Of which a container may have too little for a single batch."""
    nothing = Mock(side_effect=AssertionError("a tensor went through shared memory"))
    dataset = data.ShuffledStream(data.Shapes(16, n=40))
    with (
        patch.object(torch.UntypedStorage, "_share_fd_cpu_", nothing),
        patch.object(torch.UntypedStorage, "_share_filename_cpu_", nothing),
    ):
        batches = data.loader(dataset, [range(0, 8), range(8, 16)], workers=2)
        found = [examples for examples, *_ in batches]
    expected = [torch.stack([dataset[k][0] for k in range(a, a + 8)]) for a in (0, 8)]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_a_killed_worker_ends_the_command():
    """So does a signal; and neither leaves a worker, or the file that was being written."""
    slow = "import time, data; read = data.Shapes.read; data.Shapes.read = "
    slow += "lambda self, i: time.sleep(0.1) or read(self, i)"
    expected = {signal.SIGKILL: 2, signal.SIGTERM: 143, signal.SIGHUP: 129}
    with folder() as root:
        started = {}
        for number in expected:
            (root / number.name).mkdir()
            made = ("prepare", "shapes", root / number.name / "x.zip", "--size", 8, "--workers", 2)
            started[number] = launch("data", *made, prepare=slow)
        for number, process in started.items():
            await_line(process, "50000 images")
            while not (workers := descendants(process.pid)):
                time.sleep(0.05)
            time.sleep(0.3)
            assert list((root / number.name).glob(".*.tmp")), "it is being written"
            os.kill(workers[0] if number == signal.SIGKILL else process.pid, number)
            code, said = end_of(process)
            assert code == expected[number] and "Traceback" not in said, (code, said)
            if number == signal.SIGKILL:
                holds(said, ["a DataLoader worker died"])
            assert not list((root / number.name).iterdir())
            await_end(workers)


def test_signals_are_taken_for_as_long_as_training_runs():
    def mine(number, frame):
        pass

    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "batch_size": 4, "sampling_steps": 1}
    cfg = on_shapes(**given, kimg=0.008, workers=0)
    cpu = torch.device("cpu")
    numbers = signal.SIGINT, signal.SIGTERM
    with folder() as root, signals_restored(), contextlib.redirect_stderr(io.StringIO()):
        for number in numbers:
            signal.signal(number, mine)
        with train.StopSignal() as stop:
            assert [signal.getsignal(number) for number in numbers] == [stop.ask, stop.ask]
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM, "a second one at once, as of a terminal's group"
            with patch.object(time, "monotonic", lambda now=time.monotonic(): now + 4):
                with patch.object(os, "kill") as kill:
                    stop.ask(signal.SIGTERM, None)
            kill.assert_called_once_with(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a later one ends it"
        assert [signal.getsignal(number) for number in numbers] == [mine, mine]
        train.train(cfg, data.Shapes(32), root / "a", device=cpu)
        slip = patch.object(train.Trainer, "step", side_effect=KeyError("slip"))
        with slip, contextlib.suppress(KeyError):
            train.train(cfg, data.Shapes(32), root / "b", device=cpu)
        assert [signal.getsignal(number) for number in numbers] == [mine, mine]
        thread = threading.Thread(
            target=train.train, args=(cfg, data.Shapes(32), root / "c"), kwargs={"device": cpu}
        )
        thread.start()  # a notebook's, or a server's
        thread.join()
        states = [torch.load(root / name / "last.pt", weights_only=True) for name in "ac"]
        assert same(*states)


def class_folders(root, names, each=4):
    """Shapes in a sub-folder for each name."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            image = data.Shapes(32).read(ord(name[0]) * each + i)
            Image.fromarray(image).save(root / name / f"{i}.png")


def test_the_same_data_by_another_path_resume():
    """And other data by the same path do not."""
    with folder() as root, contextlib.chdir(root):
        class_folders(root / "pics", ["b", "c", "d"])
        flags = (*TINY, "--out", root / "run", "--num-classes", 3, "--sampling-steps", 1)
        succeeds(train, *flags, "--data", "pics", "--kimg", 0.008)
        before = (root / "run/last.pt").read_bytes()
        shutil.copytree("pics", "more")
        class_folders(root / "more", ["a"])  # the first in the alphabet: all numbers shift
        shutil.copytree("pics", "turned")
        Path("turned/b").rename("turned/x")
        for other in ("more", "turned"):
            Path("pics").rename("aside")
            Path(other).rename("pics")
            words = ["another run", "does not hold the same data"]
            complains(train, *flags, "--data", "pics", "--num-classes", 4, words=words)
            if other == "more":
                complains(train, *flags, "--data", "pics", words=["--num-classes 4"])
            Path("pics").rename(other)
            Path("aside").rename("pics")
        assert (root / "run/last.pt").read_bytes() == before
        shutil.copytree("pics", "elsewhere/pictures")
        zipped(root / "pics", root / "pics.zip")
        for k, path in enumerate(("pics/", "./pics", root / "pics", "elsewhere/pictures"), start=2):
            said = succeeds(train, *flags, "--data", path, "--kimg", 0.008 * k)
            holds(said, ["resumed", "complete"])
        state = torch.load(root / "run/last.pt", weights_only=True)
        note = json.loads((root / "run/config.json").read_text())
        fingerprint = data.open_dataset("pics", 32).fingerprint()
        assert state["step"] == 5 and state["dataset"] == note["dataset"] == fingerprint


def test_classes_are_said_and_taken_from_the_data():
    """Where the user gives no number; an unconditional preset takes those that have names."""
    unet = ("--preset", "cifar10", "--channels", "8,8,8", "--blocks", "1,1,1", "--num-heads", 2)
    unet += ("--cond-size", 16, "--batch-size", 4, "--sampling-steps", 1, "--workers", 0)
    shapes = (*TINY, "--sampling-steps", 1)
    with folder() as root:
        class_folders(root / "pics", ["red", "blue"])
        class_folders(root / "numbered", ["0", "2", "10"])
        class_folders(root / "one", ["red"])
        plain = np.zeros((8, 32, 32, 3), np.uint8)
        np.savez(root / "a.npz", plain, arr_1=np.arange(8) % 3)
        np.savez(root / "plain.npz", plain)
        cifar(root / "cifar.tar.gz", 10, 20)
        for k, (flags, classes, words) in enumerate(
            [
                ((*shapes, "--data", root / "pics"), 2, ["images of 2 classes: 0 blue, 1 red"]),
                ((*shapes, "--data", root / "pics"), 2, ["these 2 classes", "preset has 10"]),
                (
                    (*shapes, "--data", root / "pics", "--num-classes", 10),
                    10,
                    ["has 10 classes", "from 2 on", "--num-classes 2"],
                ),
                ((*shapes, "--data", root / "pics", "--num-classes", 2), 2, []),
                (
                    (*shapes, "--data", root / "pics", "--num-classes", 0),
                    0,
                    ["unconditional and ignores them", "--num-classes 2"],
                ),
                ((*shapes, "--data", root / "numbered"), 3, ["0 0, 1 2, 2 10"]),
                ((*shapes, "--data", root / "one"), 0, ["unconditional", "0 red"]),
                ((*shapes, "--data", root / "a.npz"), 3, ["8 images of 3 classes (by arr_1)"]),
                ((*shapes, "--data", root / "plain.npz"), 0, ["no two classes"]),
                (shapes, 10, ["50000 images of 10 classes: 0 circle, 1 square"]),
                ((*unet, "--data", root / "pics"), 2, ["these 2 classes", "preset has none"]),
                ((*unet, "--data", root / "pics", "--cfg-scale", 2), 2, []),
                (
                    (*unet, "--data", root / "numbered"),
                    0,
                    ["unconditional and ignores them", "--num-classes 3"],
                ),
                ((*unet, "--data", root / "cifar.tar.gz"), 0, ["(by the archive)"]),
            ]
        ):
            said = succeeds(train, *flags, "--kimg", 0.008, "--out", root / str(k))
            holds(said, words)
            cfg = data.read_checkpoint(root / f"{k}/last.pt")["config"]
            assert cfg["num_classes"] == classes, (flags, cfg["num_classes"])


def test_real_images_train_resume_and_sample():
    """python train.py --preset cifar10 --data FOLDER, .zip, .npz: mixed sizes, modes and formats,
    one file truncated."""
    small = ("--preset", "cifar10", "--channels", "8,8,8", "--blocks", "1,1,1", "--num-heads", 2)
    small += ("--cond-size", 16, "--batch-size", 4, "--sampling-steps", 1, "--tick-kimg", 0.008)
    with folder() as root:
        pictures(root / "pics")
        files = data.ImageFiles(root / "pics", 32)
        good = [i for i in range(len(files)) if "broken" not in files.name(i)]
        np.savez(root / "pics.npz", np.stack([files.read(i) for i in good]))
        zipped(root / "pics", root / "pics.zip")
        for name, workers in (("pics", 1), ("pics.zip", 1), ("pics.npz", 0)):
            run = (*small, "--workers", workers, "--data", root / name)
            run += ("--out", root / f"run-{name}")
            said = succeeds(train, *run, "--kimg", 0.008)
            assert ("skipped dogs/broken.png" in said) == (name != "pics.npz"), said
            holds(succeeds(train, *run, "--kimg", 0.016), ["resumed"])
            made = ("--num-images", 2, "--out", root / f"{name}.png")
            succeeds(sample, "--ckpt", root / f"run-{name}", *made)
            captions = 0 if name == "pics.npz" else CAPTION  # it has no labels
            assert Image.open(root / f"{name}.png").size == (134, 68 + captions)


def test_training_refuses_what_it_cannot_do():
    with folder() as root:
        pictures(root / "pics")
        np.savez(root / "plain.npz", np.zeros((3, 32, 32, 3), np.uint8))
        few = np.array([0, 1, 9])
        np.savez(root / "few.npz", np.zeros((3, 32, 32, 3), np.uint8), arr_1=few)
        for args, words in [
            (("--preset", "imagnet256"), ["imagnet256", "did you mean imagenet256"]),
            (("--hiden-size", 3), ["--hiden-size", "did you mean --hidden-size"]),
            (("--lr", "fast"), ["--lr", "fast"]),
            (("--channels", "4,x"), ["--channels", "4,x"]),
            (("--preset", "cifar10"), ["--data", "shapes"]),
            (("--preset", "cifar10", "--data", root / "nothing"), ["nothing"]),
            (
                ("--preset", "imagenet256", "--data", root / "pics"),
                ["holds images", "network takes 4", "--size 256"],
            ),
            (("--input-size", 30), ["patches of 2", "divisible by 8", "30"]),
            (("--num-classes", 5), ["10 classes", "--num-classes 10"]),
            (("--data", root / "plain.npz", "--num-classes", 2), ["no labels", "--num-classes 0"]),
            (("--data", root / "plain.npz", "--cfg-scale", 3), ["--cfg-scale 3", "leave it out"]),
            (("--in-channels", 1), ["images have 3", "grey"]),
            (("--data", root / "few.npz"), ["go up to 9", "only 3 images", "--num-classes 10"]),
            (("--sampling-steps", 0), ["--sampling-steps"]),
            (("--init-from", root / "no.pt"), ["no.pt"]),
            (("--precision", "tf32"), ["tf32", "GPUs", "fp32"]),
            (("--force",), ["--force", "--score-every"]),
            (("--seed", 2**63), ["--seed", f"at most {2**63 - 1}"]),
        ]:
            complains(train, *args, "--out", root / "new", words=words)
        inside = ("--data", root / "pics", "--num-classes", 2, "--out", root / "pics/run")
        complains(train, *inside, words=["pics/run is inside --data", "another folder"])
        assert not (root / "pics/run").exists()
        with patch.object(configs, "rank_and_size", lambda: (0, 3)):
            with patch.object(train, "rank_and_size", lambda: (0, 3)):
                cfg = configs.PRESETS["shapes"]
                cpu = torch.device("cpu")
                refused(lambda: train.check_machine(cfg, cpu), "32", "3 processes", "multiple of 3")
        assert not (root / "new").exists(), "a refused run leaves nothing behind"
        complains(train, "--out", root / "pics", words=["files of something else", "empty folder"])
        complains(train, "--out", root / "plain.npz", words=["is a file"])


def test_a_folder_with_another_run_is_kept():
    with folder() as root:
        out = ("--out", root / "run")

        def contents():
            return {p.name: p.read_bytes() for p in (root / "run").iterdir()}

        before = tiny_run(root / "run")
        files = contents()
        words = ["another run", "lr is 0.001 there and 0.5 here"]
        complains(train, *TINY, *out, "--lr", 0.5, words=words)
        missing = ("--overwrite", "--data", root / "none")
        complains(train, *TINY, *out, *missing, words=["none"])
        assert files == contents(), "a refused run changed files"
        after = tiny_run(root / "run", "--lr", 0.5, "--overwrite")
        assert after["config"]["lr"] == 0.5 and not same(before["model"], after["model"])
        assert len(log_of(root / "run")) == 5, "the log begins again, too"
        (root / "run/last.pt").write_bytes((root / "run/last.pt").read_bytes()[:5000])
        words = ["last.pt", "damaged"]
        complains(train, *TINY, *out, "--lr", 0.5, "--kimg", 5, words=words)
        for note, words in [
            (b"{", ["config.json", "damaged"]),
            (b"\xff\xfe", ["config.json"]),
            (b"[1, 2]", ["--out"]),  # many programs call a file config.json
            (b"{}", ["--out"]),
        ]:
            (root / "run/config.json").write_bytes(note)
            complains(train, *TINY, *out, words=words)


def test_init_from_takes_the_ema_weights():
    with folder() as root:
        state = tiny_run(root / "a")
        init = ("--init-from", root / "a/last.pt")
        found = tiny_run(root / "b", "--lr", 1e-12, *init, kimg=0.008)
        for name, value in found["model"].items():
            close(value, state["ema"][name], 1e-6, name)
        again = (*TINY, "--out", root / "a", "--kimg", 0.088, "--init-from", root / "none.pt")
        holds(succeeds(train, *again), ["none.pt is not used", "holds a run, which resumes"])
        words = ["do not fit", "expected"]
        complains(train, *TINY, "--hidden-size", 64, "--out", root / "c", *init, words=words)


def test_init_from_another_number_of_classes_and_another_resolution():
    """`diffit.adapt_weights` by the command, for latents."""
    large = {**LATENT_PRESET, "input_size": 16}
    with folder() as root, preset("large", **large):
        model = fill(diffit.DiffiT(**SMALL))
        write_safetensors(root / "x.safetensors", model.state_dict())
        network = diffit.DiffiT(**{**SMALL, "input_size": 16, "num_classes": 4})
        weights, _ = diffit.adapt_weights(model.state_dict(), network)
        images = np.stack([data.Shapes(32).read(i) for i in range(8)])
        np.savez(root / "a.npz", images, arr_1=np.arange(8) % 4)
        vae = vae_file(root / "v.safetensors")
        cache(root / "a.npz", root / "z", "--vae", vae, "--size", 32)
        flags = ("--preset", "large", "--data", root / "z", "--init-from", root / "x.safetensors")
        run = ("--num-classes", 4, "--lr", 1e-12, "--kimg", 0.004, "--out", root / "run")
        holds(succeeds(train, *flags, *run), ["10 classes there and 4 here", "interpolated"])
        state = torch.load(root / "run/last.pt", weights_only=True)["model"]
        assert state["y_embedder.embedding_table.weight"].shape == (5, 64)
        assert torch.equal(state["pos_embed"], diffit.sincos_2d(64, 8))
        for name, value in weights.items():
            if name not in ("y_embedder.embedding_table.weight", "pos_embed"):
                close(state[name], value, 1e-6, name)
        words = ["do not fit", "of another shape"]
        complains(train, *flags, "--hidden-size", 32, "--out", root / "new", words=words)


def test_the_log_adds_up():
    """Quartiles average to the loss, parts of the gradient to its norm, mse and vlb to the loss;
    the condition's norms are those of the embeddings."""
    with folder() as root:
        tiny_run(
            *(root / "run", "--process", "ddpm", "--learn-sigma", "--sampler", "ddpm"),
            *("--tick-kimg", 0.008, "--class-dropout-prob", 0, "--cfg-scale", 1),
        )
        log = log_of(root / "run")
        assert len(log) == 10
        for entry in log:
            close(entry["mse"] + entry["vlb"], entry["loss"], 1e-5)
            close(math.hypot(*entry["grad_norm_parts"].values()), entry["grad_norm"], 1e-5)
            close(sum(entry["loss_quartiles"]) / 4, entry["loss"], 1e-5)
        names = "x_embedder t_embedder y_embedder blocks.0 final_layer"
        assert set(entry["grad_norm_parts"]) == set(names.split())
        assert 0 < entry["condition_norm"]["mean"] <= entry["condition_norm"]["max"]
        cfg = configs.PRESETS["shapes"]
        progress = train.Progress(cfg, root, torch.device("cpu"), data.Shapes(32), "")
        progress.start(0)
    t = torch.randperm(16).float()  # two steps of eight images, in any order
    columns = {"t": t, "loss": t**2, "weight": 1 + t % 2}
    for part in (slice(0, 8), slice(8, 16)):
        step = {name: column[part] for name, column in columns.items()}
        progress.add(step, torch.tensor([3.0, 1.0]), [], seconds=1, waited=0)
    means = progress.means(["x"])
    quartiles = [sum((1 + k % 2) * k**2 for k in range(i, i + 4)) / 6 for i in (0, 4, 8, 12)]
    close(means["loss_quartiles"], quartiles, 1e-5, "a quarter of the images each, by their noise")
    close(means["loss"], sum(quartiles) * 6 / 16, 1e-5)
    assert means["grad_norm"] == 3 and means["grad_norm_parts"] == {"x": 1}


# -------------------------------------------------------------------------------------------------
# train.py on several processes, and through faults

LOSS_AWARE = dict(process="ddpm", learn_sigma=True, diffusion_steps=4, timesteps="loss-aware")
LOSS_AWARE |= dict(sampler="ddpm")
SMALL_NETWORKS = {
    "edm": dict(hidden_size=16, depth=2, num_heads=2),
    "diffit": dict(LOSS_AWARE, hidden_size=16, depth=2, num_heads=2),
    "dit": dict(LOSS_AWARE, model="dit", hidden_size=16, depth=2, num_heads=2),
    "unet": dict(
        LOSS_AWARE,
        model="unet",
        channels=(8, 8),
        blocks=(1, 1),
        cond_size=16,
        num_heads=2,
        dropout=0.1,
        sampling_steps=1,
    ),
}

# Processes that tests start by a function are forked from one that has imported everything (the
# optimizers of torch import torch._dynamo, which takes seconds): they begin at once.
multiprocessing.set_forkserver_preload(["train", "torch._dynamo"])
FORK = multiprocessing.get_context("forkserver")


def command_to_file(name, args, file):
    """In a process of its own: run a command, and write its exit code and all that it printed."""
    torch.set_num_threads(1)
    result = command(sys.modules[name], *args)
    Path(file).write_text(json.dumps(result))
    return result[0]


def one_of_two_commands(rank, jobs, root, inception):
    """`commands_in_two_processes`, in one of them."""
    if inception:
        sample.Inception = SmallInception
    for k, (port, name, args) in enumerate(jobs):
        os.environ.update(torchrun_variables(rank, port))
        if command_to_file(name, args, f"{root}/{k}-{rank}"):
            return  # the other one must not wait for this


def commands_in_two_processes(*commands, inception=False):
    """Each command (module, flag, ...), one after another, in two processes as torchrun starts them
    -> for each: exit code and all that it printed, of rank 0 and of rank 1. inception: with
    SmallInception."""
    jobs = [(free_port(), module.__name__, [*map(str, args)]) for module, *args in commands]
    with folder() as root:
        pair = []
        for rank in (0, 1):
            job = FORK.Process(target=one_of_two_commands, args=(rank, jobs, str(root), inception))
            job.start()
            pair.append(job)
        for job in pair:
            job.join(LONG)
            job.kill()
        results = []
        for k in range(len(jobs)):
            files = [root / f"{k}-{rank}" for rank in (0, 1)]
            assert all(file.exists() for file in files), f"{jobs[k]} did not end: {results}"
            results.append([json.loads(file.read_text()) for file in files])
    return results


def train_small_networks(root):
    """Twelve steps of eight images for each network, in micro-batches of four; on the CPU, in
    fp32."""
    common = dict(batch_size=8, micro_batch=4, kimg=0.096, tick_kimg=0.04, sampling_steps=2)
    common |= dict(workers=0, precision="fp32")
    for name, fields in SMALL_NETWORKS.items():
        train_here(on_shapes(**{**common, **fields}), root / name)


def test_two_processes_equal_one():
    """Two processes of one micro-batch each, and one process of two: weights, EMA, optimizer,
    timesteps, log and the images generated on the way, bit for bit."""
    with folder() as one, folder() as two:
        train_small_networks(one)
        in_two_processes(train_small_networks, two)
        for name in SMALL_NETWORKS:
            roots = one / name, two / name
            a, b = (torch.load(root / "last.pt", weights_only=True) for root in roots)
            assert a["step"] == 12 and same(a, b), f"{name}: two processes differ from one"
            assert same(*map(log_of, roots)), f"{name}: another log"
            steered = name == "edm" or a["timesteps"]["counts"].min() > 10
            assert steered, "the losses came to steer the timesteps"
            images = [np.asarray(Image.open(root / "samples-000000.png")) for root in roots]
            assert abs(np.subtract(*images, dtype=int)).max() <= 1, f"{name}: other images"


def average_like_torch():
    """In each of two processes: gradients from GradientAverager and DistributedDataParallel, five
    steps of their own data, in buckets of a few parameters; the second of two micro-batches
    communicates."""

    def network():
        return nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])

    torch.manual_seed(configs.rank_and_size()[0])  # rank 0's parameters must reach rank 1
    ours = network()
    parameters = list(ours.parameters())
    averager = train.GradientAverager(parameters, bucket_mb=200 / 2**20)
    theirs = nn.parallel.DistributedDataParallel(network())
    theirs.module.load_state_dict(ours.state_dict())
    assert len(averager.buckets) > 4
    order = [p for bucket in averager.buckets for p in bucket]
    assert all(p is q for p, q in zip(order, reversed(parameters), strict=True))
    for step in range(5):
        x = torch.randn(2, 4, 8)
        for k in range(2):
            last = k == 1
            if last:
                averager.start()
            (ours(x[k]).pow(2).sum() / 2).backward()
            with contextlib.nullcontext() if last else theirs.no_sync():
                theirs(x[k]).pow(2).sum().backward()
        averager.finish()
        for p, q in zip(parameters, theirs.parameters(), strict=True):
            close(p.grad, q.grad, 1e-6, f"step {step}")
            p.grad = None
            q.grad = None


def test_averaged_gradients_equal_those_of_torch():
    in_two_processes(average_like_torch)


def test_a_lost_process_and_a_missing_one_end_in_a_sentence():
    with folder() as root:
        port = free_port()
        pair = []
        for rank in (0, 1):
            environment = torchrun_variables(rank, port)
            pair.append(start("--out", root / "run", "--kimg", 1000, **environment))
        await_line(pair[0], "loss")
        pair[1].kill()
        code, said = end_of(pair[0])
        assert code == 2 and "rank 0 lost the other processes" in said, said
        assert "Traceback" not in said, said
        out = ("--out", root / "alone")
        with (
            patch.dict(os.environ, torchrun_variables(0, free_port())),
            patch.object(configs, "PATIENCE", datetime.timedelta(seconds=1)),
        ):
            complains(train, *TINY, *out, words=["rendezvous failed", "rank 0 of 2"])
        assert not (root / "alone").exists()


def test_killed_again_and_again_equals_unbroken():
    """kill -9 at random moments of a run that saves every 20 steps and keeps two numbered
    checkpoints."""
    flags = (*TINY, "--batch-size", 50, "--kimg", 4, "--save-kimg", 1, "--keep", 2)
    flags += ("--tick-kimg", 0.2, "--sampling-steps", 1, "--input-size", 16)
    moments = random.Random(0)
    with folder() as root:
        run = [*map(str, flags), "--out", str(root / "run")]
        for saved in (1, 2, 3):  # it is killed shortly after this checkpoint
            process = FORK.Process(target=command_to_file, args=("train", run, root / "said"))
            process.start()
            while process.is_alive() and not (root / f"run/00000{saved}.pt").exists():
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
            process.join()
        succeeds(train, *run)
        succeeds(train, *flags, "--out", root / "whole")
        roots = root / "whole", root / "run"
        whole, parts = (torch.load(out / "last.pt", weights_only=True) for out in roots)
        assert parts["step"] == 80 and same(whole, parts), "the resumed run differs"
        assert same(*map(log_of, roots))
        for out in roots:
            assert [p.name for p in sorted(out.glob("0*.pt"))] == ["000003.pt", "000004.pt"]
            assert torch.load(out / "previous.pt", weights_only=True)["step"] == 60


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_latents_that_are_not_finite_are_left_out():
    """Named, and past 1 % the end of the run."""
    with folder() as root, preset("tiny", **LATENT_PRESET):
        latents = small_latents(root)
        moments = np.load(latents / "moments.npy", mmap_mode="r+")
        run = ("--preset", "tiny", "--data", latents, "--kimg", 0.016, "--out")
        for bad, code, words in [
            ([2], 0, ["skipped latent 2: its numbers are not finite", "complete"]),
            ([1], 2, ["2 of 4 images", "latent 1", "its numbers are not"]),
            ([0, 3], 2, ["of 4 images", "its numbers are not finite"]),
        ]:
            moments[bad, :, 0, 0, 3] = math.inf
            moments.flush()
            found, said = command(train, *run, root / str(bad))
            assert found == code, said
            holds(said, words)


def test_tensors_of_strange_kinds_are_refused():
    """Where the file is read, before torch does anything with them; and numbers that are none."""
    value = torch.randn(3, 4)
    with folder() as root:
        path = root / "x.pt"
        for good in (value, value.T, value[1:], value[:, 1:3], nn.Parameter(value)):
            torch.save({"w": good}, path)
            assert torch.equal(data.weights_in(data.read_file(path), path)[0]["w"], good)
        for bad in (
            value.to_sparse(),
            value.to_sparse_csr(),
            value.to(torch.complex64),
            value.to(torch.float8_e4m3fn),
            value[:1].expand(3, 4),
            value.flatten()[:4].as_strided((2, 2), (1, 1)),
            torch.empty(3, 4, device="meta"),
            torch.randn(3, dtype=torch.complex64).conj().imag,  # numbers with their sign turned
        ):
            torch.save({"model": {"deep": [{"w": bad}]}}, path)
            refused(lambda: data.read_file(path), "x.pt", "of a kind that is not read")
    with checkpoint() as (root, path):
        state = torch.load(path, weights_only=True)
        for part, name in [("ema", "blocks.0.mlp.fc1.bias"), ("model", "pos_embed")]:
            value = state[part][name].clone()
            state[part][name][..., -1] = math.nan
            torch.save(state, path)
            words = [str(path), "not finite", name]
            if part == "ema":
                complains(sample, "--ckpt", path, "--out", root / "x.png", words=words)
                start_from = ("--init-from", path, "--out", root / "new")
                complains(train, *TINY, *start_from, words=words)
            cfg = configs.config_from_dict(state["config"], path)
            network = diffit.build(cfg)
            refused(lambda: data.load_weights(network, state[part], path), *words)
            state[part][name] = value


def test_a_checkpoint_with_a_part_that_lies_is_refused():
    with folder() as root:
        good = tiny_run(root / "run", kimg=0.016)
        last = root / "run/last.pt"
        name = next(iter(good["optimizer"]["state"]))
        moments = good["optimizer"]["state"][name]

        def with_moments(**changes):
            kept = {**good["optimizer"]["state"], name: {**moments, **changes}}
            return {"optimizer": {**good["optimizer"], "state": kept}}

        progress = good["progress"]
        for change, words in [
            ({"step": "two"}, ["lacks step"]),
            ({"step": -1}, ["its step"]),
            ({"optimizer": None}, ["lacks optimizer"]),
            ({"config": {**good["config"], "depth": "1"}}, ["--depth 1 must be a whole number"]),
            ({"config": {**good["config"], "lr": 0.5}}, ["another run", "lr is 0.5"]),
            ({"config": {"depth": 1}}, ["last.pt"]),
            ({"optimizer": {"state": 3}}, ["damaged", "optimizer"]),
            (with_moments(exp_avg=torch.zeros(3)), ["optimizer's state", "does not fit"]),
            (with_moments(exp_avg=moments["exp_avg"] * math.nan), ["not finite", "exp_avg"]),
            ({"progress": {**progress, "columns": [{"t": torch.zeros(3)}]}}, ["progress"]),
            ({"progress": {**progress, "unreadable": {3: "x"}}}, ["progress"]),
            ({"model": {**good["model"], "pos_embed": 3}}, ["something else among its weights"]),
        ]:
            torch.save({**good, **change}, last)
            shutil.copy(last, root / "run/previous.pt")
            complains(train, *TINY, "--out", root / "run", "--kimg", 0.024, words=words)
        torch.save(good, last)
        assert tiny_run(root / "run", kimg=0.024)["step"] == 3


def test_checkpoints_and_grids_are_due_by_time_too():
    """A grid after two minutes and then every 15, a checkpoint at least every 15; the run is the
    same."""
    now = [0.0]
    saved = []
    drawn = []
    step = train.Trainer.step
    save_run = train.save_run
    save_pictures = train.save_pictures

    def slow_step(*args):
        now[0] += 60
        return step(*args)

    def watched_save(cfg, out, trainer, progress, done, number_due):
        saved.append(done)
        save_run(cfg, out, trainer, progress, done, number_due)

    def watched_pictures(*args):
        drawn.append(saved[-1] if args[-1] != "000000" else 60)  # those by time come after a save
        save_pictures(*args)
        return 30.0 if len(drawn) == 1 else 240.0  # the seconds that it took

    with folder() as root:
        whole = tiny_run(root / "whole", kimg=0.48)
        with (
            patch.object(time, "monotonic", lambda: now[0]),
            patch.object(train.Trainer, "step", slow_step),
            patch.object(train, "save_run", watched_save),
            patch.object(train, "save_pictures", watched_pictures),
        ):
            slow = tiny_run(root / "slow", kimg=0.48)
        assert drawn == [2, 17, 57, 60], "the second took four minutes: then after forty"
        assert saved == [2, 17, 32, 47, 57, 60]
        assert same_training(slow, whole)
        grids = {"samples-000000.016.png", "samples-000000.136.png", "samples-000000.456.png"}
        assert grids | {"samples-000000.png"} <= files_of(
            root / "slow"
        ), "none took another's place"


def test_a_longer_cosine_says_that_its_rate_goes_up():
    flags = ("--lr-decay", "cosine")
    with folder() as root:
        tiny_run(root / "run", *flags, kimg=0.08)
        run = (*TINY, *flags, "--out", root / "run", "--kimg")
        said = succeeds(train, *run, 0.16)
        holds(said, ["goes back up from", "to 5.00e-04", "0.16 kimg", "0.08 before"])
        assert "goes back up" not in succeeds(train, *run, 0.16)


def test_steps_of_sampling_are_shown():
    """While a batch is sampled, and while training makes its grid."""
    with checkpoint() as (root, path), terminal(80) as screen:
        flags = ("--ckpt", path, "--num-images", 6, "--batch", 3)
        for k, where in enumerate([("--out", "a.png"), ("--npz", "a.npz"), ("--gif", "a.gif")]):
            argv = ["sample.py", *map(str, flags), where[0], str(root / where[1])]
            with patch.object(sys, "argv", argv), signals_restored():
                sample.main()
        shown = screen.getvalue()
        holds(shown, ["0 of 6 images, step 1 of 3, for a.png", "3 of 6 images, step 3 of 3, for a"])
        holds(shown, ["0 of 6 images, step 2 of 3", "6 images, step 3 of 3, for a.gif"])
        assert re.search(r"3 of 6 images, [\d.]+ images/s, step 1 of 3", shown), shown


def test_a_failed_write_leaves_the_checkpoint_before_whole():
    with folder() as root:
        tiny_run(root / "run", kimg=0.04)
        last = root / "run/last.pt"
        before = last.read_bytes()
        full = OSError(28, "No space left on device")
        for fault, why in [
            (patch.object(os, "fsync", side_effect=[None, full]), "No space left"),  # config.json
            (full_disk(len(before) // 2), ""),
        ]:
            words = ["last.pt could not be written", why]
            with fault:
                complains(train, *TINY, "--out", root / "run", "--kimg", 0.08, words=words)
            assert last.read_bytes() == before and not list((root / "run").glob("*.tmp"))
        assert same_training(tiny_run(root / "run"), tiny_run(root / "whole"))


def test_a_truncated_checkpoint_gives_way_to_the_one_before():
    with folder() as root:
        run = (*TINY, "--out", root / "run", "--kimg", 0.08)
        for kimg in (0.04, 0.064):
            tiny_run(root / "run", kimg=kimg)
        assert [entry["step"] for entry in log_of(root / "run")] == [2, 4, 5, 6, 8]
        last = root / "run/last.pt"
        last.write_bytes(last.read_bytes()[:3000])
        said = succeeds(train, *run)
        holds(said, ["last.pt is damaged", "resuming from", "previous.pt", "at 0.04 kimg"])
        assert (root / "run/last.damaged.pt").stat().st_size == 3000, "the damaged file stays"
        resumed = torch.load(last, weights_only=True)
        assert same_training(resumed, tiny_run(root / "whole"))
        assert [entry["step"] for entry in log_of(root / "run")] == [2, 4, 5, 6, 8, 10]
        for file in (root / "run").glob("*.pt"):
            file.write_bytes(b"")
        complains(train, *run, words=["last.pt is empty", "--overwrite"])


# -------------------------------------------------------------------------------------------------
# sample.py


@functools.cache
def tiny_checkpoint(*flags):
    """The last.pt of two steps, as bytes."""
    with folder() as root:
        tiny_run(root / "run", "--sampling-steps", 1, *flags, kimg=0.016)
        return (root / "run/last.pt").read_bytes()


@contextlib.contextmanager
def checkpoint(*flags):
    """A folder with a checkpoint that train.py made in it."""
    with folder() as root:
        path = root / "last.pt"
        path.write_bytes(tiny_checkpoint(*flags, "--sampling-steps", 3))
        yield root, path


def load_model(path, **options):
    with contextlib.redirect_stderr(io.StringIO()):
        return sample.load_model(path, device="cpu", **options)


def most_different(a, b):
    return np.abs(np.subtract(a, b, dtype=int)).max()


def arrays(path):
    """Images and labels of an .npz that sample.py wrote."""
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"].tolist()


def test_image_i_follows_from_seed_and_i():
    with checkpoint("--lr", 0.01) as (root, path):
        model, cfg = load_model(path)
    for p in model.parameters():  # after two steps all images are nearly the same
        p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    for settings in (
        dict(sampler="heun", cfg_scale=2.0),
        dict(sampler="ddpm", cfg_scale=1.0),
        dict(sampler="ddim", eta=0.7, cfg_scale=1.5),
        dict(sampler="dpmpp"),
    ):
        cfg = dataclasses.replace(cfg, **{"eta": 0.0, **settings})

        def images(indices, batch, seed=5):
            batches = sample.generate(model, cfg, indices, seed=seed, batch=batch)
            return np.concatenate([data.to_uint8(x) for x, _ in batches])

        at_once = images(range(6), 6)
        assert most_different(at_once, images(range(6), 4)) <= 1, settings
        assert most_different(at_once[[5, 2]], images([5, 2], 1)) <= 1, settings
        assert most_different(at_once[0], at_once[1]) > 1, settings
        assert most_different(at_once, images(range(6), 6, seed=6)) > 1, settings


def test_the_python_of_the_readme():
    """Its lines, as they stand there."""
    text = (Path(__file__).parent / "README.md").read_text()
    code = text.split("```python\nimport torch")[1].split("```")[0]
    flags = ("--sampling-steps", 2, "--process", "edm", "--sigma-min", 0.05)
    with folder() as root, contextlib.chdir(root):
        state = tiny_run("runs/shapes", *flags)
        here = {}
        with contextlib.redirect_stderr(io.StringIO()):
            exec("import torch" + code, here)
        assert Image.open("ten.png").size == (4 * 66 + 2, 3 * 66 + 2)
        close(here["x"][..., :16], here["known"][..., :16], 0.3, "the left half")
        assert (here["x"] - here["known"])[..., 16:].abs().mean() > 0.1, "the right one is new"
        slim, _ = load_model("slim.pt")
        assert torch.equal(slim.state_dict()["pos_embed"], state["ema"]["pos_embed"])
        assert Path("slim.pt").stat().st_size < 0.4 * Path("runs/shapes/last.pt").stat().st_size
        entries = []
        cfg = dataclasses.replace(here["cfg"], kimg=0.096)
        with contextlib.redirect_stderr(io.StringIO()):
            train.train(cfg, data.Shapes(32), "runs/shapes", on_entry=entries.append)
        assert [entry["step"] for entry in entries] == [12]


def test_classes():
    cfg = configs.PRESETS["shapes"]
    classes = sample.Classes(cfg, [2, 7])
    assert classes.labels(range(5), 0).tolist() == [2, 7, 2, 7, 2]
    every = sample.Classes(cfg)
    assert every.labels([13, 3], 0).tolist() == [3, 3], "few classes: in their order"
    assert sample.parse_classes("all", 10) == list(range(10))
    shuffled = sample.Classes(configs.PRESETS["imagenet256"]).labels(range(1000), 0).tolist()
    assert sorted(shuffled) == list(range(1000)) != shuffled
    assert sample.parse_classes("207,360", 1000) == [207, 360]
    two = configs.config_from_preset("shapes", {"num_classes": 2})
    assert sample.parse_classes("flower, china,0", 2, ["china", "flower"]) == [1, 0, 0]
    refused(lambda: sample.parse_classes("cat", 2, ["china", "flower"]), "cat", "china, flower")
    assert sample.parse_classes("1,2", 2, ["1", "2"]) == [0, 1], "names that are numbers"
    assert sample.parse_classes(" a, b", 2, [" a, b", "c"]) == [0]
    refused(lambda: sample.Classes(two, [2]), "0 to 1")
    assert sample.Classes(two).columns(64) == 8 and every.columns(64) == 10


def test_sampling_writes_grid_folder_and_npz():
    with checkpoint() as (root, path):
        flags = ("--ckpt", path, "--num-images", 5, "--batch", 2, "--classes", "3,1")
        flags += ("--sampler", "ddim", "--eta", 0.5, "--cfg-scale", 2, "--cfg-interval", "0.1,5")
        where = ("--out", root / "g.png", "--dir", root / "each", "--npz", root / "a.npz")
        said = succeeds(sample, *flags, *where)
        holds(said, [f"wrote {root / name}" for name in ("g.png", "each", "a.npz")])
        images, labels = arrays(root / "a.npz")
        assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
        assert labels == [3, 1, 3, 1, 3]
        each = sorted((root / "each").glob("*.png"))
        assert [p.name for p in each] == [f"{i:08}.png" for i in range(5)]
        for file, image in zip(each, images, strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), image)
        grid = Image.open(root / "g.png")
        assert grid.size == (2 * 66 + 2, 3 * 66 + 2 + CAPTION), "a column for each class"
        state = torch.load(path, weights_only=True)
        name = "final_layer.linear.weight"
        raw = load_model(path, ema=False)[0].get_parameter(name)
        ema = load_model(path)[0].get_parameter(name)
        assert torch.equal(raw, state["model"][name]) and torch.equal(ema, state["ema"][name])
        assert not torch.equal(raw, ema)


def test_a_grid_alone_never_touches_the_disk():
    with checkpoint() as (root, path), contextlib.chdir(root):
        (root / "tmp").mkdir()
        flags = ("--ckpt", path, "--num-images", 5, "--classes", "3,1", "--batch", 2)
        succeeds(sample, *flags, "--dir", "d", "--out", "folder.png")
        shutil.rmtree("d")
        before = sorted(root.rglob("*"))
        save_grid = data.save_grid
        saved = []

        def watching_save_grid(images, *args):
            assert sorted(root.rglob("*")) == before, "something was written before the grid"
            saved.append(images)
            save_grid(images, *args)

        with (
            patch.object(data, "save_grid", watching_save_grid),
            patch.object(tempfile, "tempdir", str(root / "tmp")),
        ):
            succeeds(sample, *flags, "--out", "grid.png")
            assert sorted(root.rglob("*")) == sorted([*before, root / "grid.png"])
        assert len(saved) == 1 and len(saved[0]) == 5
        grids = [np.asarray(Image.open(name)) for name in ("folder.png", "grid.png")]
        assert most_different(*grids) <= 1
        for name in ("samples.png", "samples-2.png"):  # where no flag names a file
            holds(succeeds(sample, *flags), [f"wrote {name}"])
            assert most_different(np.asarray(Image.open(name)), grids[0]) <= 1


MANY = ("--classes", "1,4,2", "--num-images", 11)


def npz_of(path, root, name, *flags):
    """The arrays of root/NAME.npz, written from a checkpoint, and the indices of those images that
    were generated for it."""
    generate = sample.generate
    generated = []

    def watched_generate(model, cfg, indices, *args):
        generated.extend(indices)
        return generate(model, cfg, indices, *args)

    with patch.object(sample, "generate", watched_generate):
        succeeds(sample, "--ckpt", path, *MANY, "--npz", root / f"{name}.npz", *flags)
    return *arrays(root / f"{name}.npz"), generated


def test_many_images_are_the_same_in_any_division():
    """All at once, one at a time, fewer, in two processes: the same .npz."""
    with checkpoint("--lr", 0.01) as (root, path):
        whole, labels, generated = npz_of(path, root, "whole", "--batch", 11)
        assert len(whole) == 11 and labels == [1, 4, 2] * 3 + [1, 4]
        assert generated == list(range(11))
        assert len(list((root / "whole").glob("*.png"))) == 11
        few, _, _ = npz_of(path, root, "few", "--num-images", 4, "--batch", 1)
        assert most_different(few, whole[:4]) <= 1
        shutil.copytree(root / "whole", root / "two")
        for i in (0, 4, 5, 9, 10):
            (root / f"two/{i:08}.png").unlink()
        run = (sample, "--ckpt", path, *MANY, "--npz", root / "two.npz", "--batch", 2)
        run += ("--gif", root / "two.gif")
        (code, said), (other_code, other_said) = commands_in_two_processes(run)[0]
        assert code == other_code == 0, (said, other_said)
        assert "wrote" in said and other_said == "", "the second process says nothing"
        images, order = arrays(root / "two.npz")
        assert most_different(images, whole) <= 1 and order == labels
        assert Image.open(root / "two.gif").n_frames == 4 and not list(root.glob(".*"))


def test_images_that_are_missing_are_generated():
    """After a kill, with images lost and cut short, with another batch and more images than at
    first: the same .npz, for which no image is generated twice."""
    with checkpoint("--lr", 0.01) as (root, path):
        whole, labels, _ = npz_of(path, root, "whole", "--batch", 11)
        saved = iter(range(5))
        save_image = data.save_image

        def killed_save_image(*args, **kwargs):
            if next(saved, None) is None:
                sys.exit("killed")
            save_image(*args, **kwargs)

        images = root / "resumed"
        run = ("--ckpt", path, *MANY, "--npz", root / "resumed.npz")
        with patch.object(data, "save_image", killed_save_image):
            assert command(sample, *run, "--num-images", 9, "--batch", 2)[0] == "killed"
        assert sorted(p.name for p in images.glob("*.png")) == [f"{i:08}.png" for i in range(5)]
        assert not (root / "resumed.npz").exists()
        (images / "00000001.png").unlink()
        (images / "00000003.png").write_bytes(b"")
        (root / "other.pt").write_bytes(tiny_checkpoint("--sampling-steps", 3))
        for other, words in [
            (("--seed", 5), ["seed is 0 there and 5 here"]),
            (("--cfg-scale", 1.5), ["cfg_scale is 2 there and 1.5 here"]),
            (("--no-ema",), ["ema is True there and False here"]),
            (("--classes", "3"), ["classes is [1, 4, 2] there and [3] here"]),
            (("--ckpt", root / "other.pt"), ["weights is"]),
        ]:
            words = ["resumed holds images of another run", *words]
            complains(sample, *run, *other, words=words)
        resumed, order, generated = npz_of(path, root, "resumed", "--batch", 3)
        assert generated == [1, 3, 5, 6, 7, 8, 9, 10]
        assert most_different(resumed, whole) <= 1 and order == labels
        again, _, generated = npz_of(path, root, "again", "--dir", images, "--batch", 1)
        assert generated == [] and np.array_equal(again, resumed)
        Image.new("RGB", (40, 30)).save(images / "0.png")  # somebody else's
        first, _, _ = npz_of(path, root, "first", "--num-images", 4, "--dir", images)
        assert np.array_equal(first, resumed[:4]), "the first of a folder that holds more"
        (images / "00000002.png").write_bytes(b"damaged")
        run = ("--ckpt", path, *MANY, "--npz", root / "damaged.npz", "--dir", images)
        complains(sample, *run, words=["00000002.png", "cannot be read", "remove it"])


def test_folders_of_other_things_are_kept():
    with checkpoint() as (root, path):
        (root / "mine").mkdir()
        (root / "mine/000000.png").write_bytes(b"precious")
        for flag, name in [("--dir", "mine"), ("--npz", "mine.npz"), ("--dir", "last.pt")]:
            words = [name.removesuffix(".npz"), "is not a folder of images of sample.py"]
            complains(sample, "--ckpt", path, flag, root / name, words=words)
        assert [p.name for p in (root / "mine").iterdir()] == ["000000.png"]
        assert (root / "mine/000000.png").read_bytes() == b"precious"


def test_a_gif_goes_from_noise_to_the_image():
    with checkpoint("--lr", 0.01) as (root, path):
        flags = ("--ckpt", path, "--num-images", 4, "--classes", "1,2", "--sampling-steps", 12)

        def frame(k):
            gif.seek(k)
            return np.asarray(gif.convert("RGB")).astype(int)

        for sampler in ("heun", "dpmpp"):
            where = ("--gif", root / f"{sampler}.gif", "--out", root / f"{sampler}.png")
            succeeds(sample, *flags, "--sampler", sampler, *where)
            gif = Image.open(where[1])
            image = np.asarray(Image.open(where[3]).convert("RGB")).astype(int)
            assert gif.n_frames == 13 and gif.size == image.shape[1::-1]
            assert np.abs(frame(12) - image).mean() < 12, "the end: the image, in 256 colours"
            assert np.abs(frame(0) - image).mean() > 25, "the beginning: noise"
            names = {p.name for p in root.iterdir()}
            assert names == {"last.pt", "heun.gif", "heun.png"} | {p.name for p in where[1::2]}


def test_sampling_refuses_what_it_cannot_do():
    with checkpoint() as (root, path):
        (root / "cut.pt").write_bytes(path.read_bytes()[:20_000])
        (root / "text.pt").write_text("no checkpoint")
        torch.save({"weights": torch.zeros(3)}, root / "foreign.pt")
        state = torch.load(path, weights_only=True)
        shape = {**state, "config": {**state["config"], "hidden_size": 64}}
        torch.save(shape, root / "shape.pt")
        less = {name: value for name, value in state["ema"].items() if "fc1" not in name}
        torch.save({**state, "ema": less}, root / "less.pt")
        (root / "empty.pt").write_bytes(b"")
        (root / "taken.png").write_bytes(b"precious")
        (root / "taken.npz").write_bytes(b"precious")
        before = {p.name for p in root.iterdir()}
        for name, words in [
            ("none.pt", ["none.pt"]),
            ("cut.pt", ["cut.pt", "damaged"]),
            ("text.pt", ["text.pt"]),
            ("empty.pt", ["empty.pt"]),
            ("foreign.pt", ["foreign.pt", "does not say which network", "--preset"]),
            ("shape.pt", ["shape.pt", "of another shape", "expected"]),
            ("less.pt", ["2 missing", "fc1"]),
        ]:
            complains(sample, "--ckpt", root / name, "--out", root / "x.png", words=words)
        x = ("--out", root / "x.png")
        for args, words in [
            ((*x, "--classes", "3,10"), ["10", "0 to 9"]),
            ((*x, "--classes", "-1"), ["-1"]),
            ((*x, "--classes", "cat"), ["cat", "0 to 9", "circle, square"]),
            ((*x, "--sampling-steps", 0), ["--sampling-steps"]),
            ((*x, "--num-images", 0), ["--num-images", "0 must be 1 or more"]),
            ((*x, "--sampler", "dpmpq"), ["did you mean dpmpp"]),
            ((*x, "--eta", 1), ["--eta", "ddim"]),
            ((*x, "--cfgs", 2), ["--cfgs", "did you mean --cfg"]),
            ((*x, "--seed", -1), ["--seed", "-1 must be 0 or more"]),
            ((*x, "--vae", path), ["--vae", "pixels"]),
            ((*x, "--preset", "shapes"), ["--preset shapes", "knows its own network"]),
            ((*x, "--num-images", 401), ["--num-images 401", "400", "--dir", "--npz"]),
            ((*x, "--precision", "tf32"), ["tf32", "GPUs", "fp32"]),
            ((*x, "--dir", root / "x.png"), ["x.png", "a name of its own"]),
            (("--npz", root / ".npz"), [".npz", "a name of its own"]),
            (
                (*x, "--force", "--resize", "pytorch"),
                ["--force and --resize", "without --score REF"],
            ),
            (("--num-images", 401), ["--num-images 401", "400", "--dir", "--npz"]),
            (("--out", root / "nowhere/x.png"), ["nowhere", "does not exist"]),
            (("--dir", root / "nowhere/x"), ["nowhere", "does not exist"]),
            (("--out", root / "x.doc"), ["x.doc", ".png"]),
            (("--out", root / "taken.png"), ["taken.png", "exists"]),
            (("--npz", root / "taken.npz"), ["taken.npz", "exists"]),
            (("--dir", root), ["not a folder of images"]),
            (("--gif", root / "x.png"), ["x.png", ".gif"]),
        ]:
            complains(sample, "--ckpt", path, *args, words=words)
        assert (root / "taken.png").read_bytes() == b"precious"
        assert {p.name for p in root.iterdir()} == before, "a refused command leaves nothing"
    unconditional = ("--process", "ddpm", "--sampler", "ddpm", "--num-classes", 0)
    with checkpoint(*unconditional) as (root, path):
        for args, words in [
            (("--sampling-steps", 1001), ["1001", "1 to 1000"]),
            (("--classes", "all"), ["conditioned on nothing"]),
            (("--cfg-scale", 2), ["--cfg-scale 2", "classes"]),
            (("--score", "shapes"), ["--score shapes", "ten classes"]),
        ]:
            complains(sample, "--ckpt", path, *args, "--out", root / "x.png", words=words)


def test_a_classifier_recognises_real_shapes_and_no_others():
    shapes = data.Shapes(16, 200, seed=5)
    images = np.stack([shapes.read(i) for i in range(200)])
    right, real = sample.shape_accuracy(images, shapes.labels)
    assert right > 0.97 and real > 0.98, (right, real)
    assert sample.shape_accuracy(images, (shapes.labels + 1) % 10)[0] < 0.03
    with checkpoint("--input-size", 16) as (root, path):
        flags = ("--num-images", 10, "--score", "shapes", "--dir", root / "d")
        said = succeeds(sample, "--ckpt", path, *flags)
        holds(said, ["% named right", f"10 images by the EMA weights of {path}", "of real shapes"])


# -------------------------------------------------------------------------------------------------
# sample.py: scores


def inception_file(path, net=None):
    """Inception as its reference was filled, in the published format, which has no counters of
    batches."""

    def value(name, shape):
        if name.endswith("running_var"):
            return 1 + weight(name, shape)
        return weight(name, shape) * (1.6 if len(shape) == 4 else 1)

    with torch.device("meta"):
        state = (net or sample.Inception()).state_dict()
    state = {name: value(name, v.shape) for name, v in state.items() if "tracked" not in name}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


class SmallInception(nn.Module):
    """Quick features in Inception's place, where a test is of what happens to them."""

    pooled = 16
    spatial = 6
    logits = sample.Inception.logits

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, stride=4)
        self.fc = nn.Linear(16, 5)

    def forward(self, x, resize="pytorch"):
        h = self.conv(x.float() / 127.5 - (1 if resize == "pytorch" else 1.01)).tanh()
        return h.mean((2, 3)), h[:, :6, 2, 2]


@contextlib.contextmanager
def small_inception():
    """A folder with weights of SmallInception, which takes Inception's place meanwhile."""
    with patch.object(sample, "Inception", SmallInception), folder() as root:
        inception_file(root / "inception.pth")
        yield root


def scores_in(said):
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
    """The network alone, and by the commands: a reference scores itself perfectly. (Distances of
    2048 dimensions take a minute and have a test of their own: here both sides must be equal.)"""
    with folder() as root:
        weights = inception_file(root / "i.pth")
        net, digest = sample.load_inception(weights)
        assert digest == data.file_hash(weights)
        found = {}
        for name in ("Mixed_6a", "Mixed_6e", "Mixed_6d.branch1x1"):

            def keep(module, inputs, output, name=name):
                found[name.lower()] = output

            net.get_submodule(name).register_forward_hook(keep)
        images = (128 + 40 * unit("s:inc", 2, 3, 32, 32)).clamp(0, 255).round()
        with torch.no_grad():
            found["pool"], spatial = net(images.byte())
        found["logits"] = net.fc(found["pool"])
        for name, (index, values) in GOLDEN["inception"].items():
            close(found[name].flatten()[index], values, 1e-5, name)
        assert spatial.shape == (2, 2023)
        maps = found["mixed_6d.branch1x1"][:, :7]
        close(spatial.view(2, 17, 17, 7).permute(0, 3, 1, 2), maps, 0, "sFID's features")
        close(net.logits(found["pool"]), found["logits"] - net.fc.bias, 1e-5, "without the bias")

        npz = root / "a.npz"
        np.savez(npz, arr_0=images.permute(0, 2, 3, 1).byte().numpy())
        common = ("--inception", weights, "--force")
        distances = []

        def equal_gaussians(mu, sigma, *others):
            close(others[0], mu, 1e-6)
            close(others[1], sigma, 1e-6)
            distances.append(len(mu))
            return 0.0

        with (
            patch.object(sample, "check_number"),
            patch.object(sample, "load_inception", lambda *_: (net, digest)),
            patch.object(sample, "frechet_distance", equal_gaussians),
        ):
            succeeds(sample, "--reference", npz, "--out", root / "ref.npz", *common[:2])
            said = succeeds(sample, "--images", npz, "--score", root / "ref.npz", *common)
        assert distances == [2048, 2023]
        scores, _ = scores_in(said)
        assert scores["fid"] == scores["sfid"] == 0 and scores["precision"] == scores["recall"] == 1
        with np.load(root / "ref.npz") as ref:
            assert {name: ref[name].shape for name in ref.files if name != "header"} == {
                **{"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)},
                **{"features": (2, 2048), "images": ()},
            }
            assert ref["sigma"].dtype == ref["sigma_s"].dtype == np.float64


def test_golden_scores():
    gold = GOLDEN["scores"]
    real = unit("f:fa", 64, 8) @ (torch.eye(8) + 0.3 * unit("f:fm", 8, 8) / math.sqrt(8))
    fake = 1.2 * unit("f:fb", 80, 8) + 0.1
    found = sample.frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
    close(found, gold["frechet_distance"], 1e-6)
    close(sample.precision_recall(real, fake), (gold["precision"], gold["recall"]), 1e-6)
    close(sample.inception_score(2 * unit("f:lg", 64, 20)), gold["inception_score"], 1e-6)


def test_frechet_distance_of_known_gaussians():
    """N(0, I) and N(m, Q diag(s) Q^T): |m|^2 + sum (1 - sqrt s)^2. A set without full rank is at 0
    from itself."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6).double())[0]
    s = torch.rand(6).double() * 4
    m = torch.randn(6).double()
    expected = m.square().sum() + (1 - s.sqrt()).square().sum()
    a = torch.zeros(6), torch.eye(6)
    b = m, q * s @ q.T
    close(sample.frechet_distance(*a, *b), expected, 1e-12)
    of_arrays = sample.frechet_distance(*(v.numpy() for v in b), *a)
    close(of_arrays, expected, 1e-12, "the other way round, from numpy")
    few = 100 * torch.randn(8, 300).double()
    mean = few.mean(0)
    covariance = few.T.cov()
    assert sample.frechet_distance(mean, covariance, mean, covariance) < 1e-7
    moved = sample.frechet_distance(mean, covariance, mean + 1, covariance)
    close(moved, 300, 1e-9, "moved by 1 in 300 directions")


def test_inception_score_by_splits():
    sure = torch.eye(4).repeat(5, 1) * 100  # all four classes, each certain
    close(sample.inception_score(sure), 4, 1e-12)
    close(sample.inception_score(torch.zeros(7, 4)), 1, 1e-12, "all classes are as likely")
    logits = torch.cat([sure[:8], sure[:1].repeat(4, 1)])  # then one class alone
    close(sample.inception_score(logits, split=8), (4 + 1) / 2, 1e-12, "two splits")


def test_precision_and_recall_equal_the_naive_form():
    def share_inside(x, y, k):
        radii = torch.cdist(x, x).kthvalue(k + 1, dim=1).values
        return (torch.cdist(y, x) <= radii).any(1).double().mean()

    torch.manual_seed(0)
    real = 3 + torch.randn(70, 3).double()
    fake = 3.4 + 0.7 * torch.randn(50, 3).double()
    for rows in (sample.ROWS, 16, 1):  # a block of distances at a time
        with patch.object(sample, "ROWS", rows):
            for k in (1, 3):
                naive = share_inside(real, fake, k), share_inside(fake, real, k)
                close(sample.precision_recall(real, fake, k), naive, 1e-12, f"k = {k}")
    copies = torch.cat([torch.randn(20, 2048) + 5] * 6)  # balls of radius 0, and fp32
    assert sample.precision_recall(copies, copies.flip(0)) == (1, 1)
    beside = sample.precision_recall(copies, copies[:20] + 1e-2)
    assert beside == (0, 1), "beside copies; and among neighbours"
    assert sample.precision_recall(real, fake + 100) == (0, 0)


def moments_of_two_processes(path):
    rank = configs.rank_and_size()[0]
    moments = sample.Moments(5, "cpu")
    for part in (5 + unit("moments", 60, 5)).float().split(7)[rank::2]:
        moments.add(part)
    mean, covariance, n = moments.over_all_processes()
    np.savez(path / f"{rank}.npz", mean=mean, covariance=covariance, n=n)


def test_moments_stream_and_add_up_over_processes():
    x = (5 + unit("moments", 60, 5)).float().double().numpy()
    with folder() as root:
        in_two_processes(moments_of_two_processes, root)
        for rank in (0, 1):
            found = np.load(root / f"{rank}.npz")
            assert found["n"] == 60
            close(found["mean"], x.mean(0), 1e-14)
            close(found["covariance"], np.cov(x.T), 1e-14)


def test_features_are_kept_in_order_and_of_all_classes():
    net = SmallInception()
    images = np.stack([data.Shapes(32).read(i) for i in range(60)])  # class i % 10
    with patch.object(sample, "KEPT", 20), contextlib.redirect_stderr(io.StringIO()):
        for n in (7, 20, 60):
            parts = [range(n)[k : k + 4] for k in range(0, n, 4)]
            batches = [(part, images[part.start : part.stop]) for part in parts[::2] + parts[1::2]]
            stats = sample.statistics(net, batches, n)  # in any order
            with torch.no_grad():
                features = net(torch.from_numpy(images[:n]).permute(0, 3, 1, 2))[0]
            kept = [int((features - one).square().sum(1).argmin()) for one in stats["features"]]
            assert len(kept) == min(n, 20) and kept == sorted(set(kept)) and stats["images"] == n
            close(stats["features"], features[kept], 1e-6, f"{n} images")
            close(stats["sigma"], features.T.double().cov(), 1e-6, "and the covariance is of all")
    assert len({i % 10 for i in kept}) > 6 and len({i % 3 for i in kept}) == 3
    assert "50000 of them" in sample.format_count(60_000)
    assert sample.format_count(9) == "9 images"


def test_resizing_as_in_tensorflow():
    """Output i lies at i side / 299 of the input, and beyond its last pixel nothing changes."""
    ramp = torch.arange(64.0) + 100 * torch.arange(32.0).view(1, 1, 32, 1)
    i = torch.arange(299)

    def at_corners(side):
        return (i * side / 299).clamp(max=side - 1)

    def at_centres(side):
        return ((i + 0.5) * side / 299 - 0.5).clamp(0, side - 1)

    expected = at_corners(64) + 100 * at_corners(32).view(1, 1, -1, 1)
    close(sample.resize_for_inception(ramp, "tensorflow"), (expected - 128) / 128, 1e-6)
    expected = at_centres(64) + 100 * at_centres(32).view(1, 1, -1, 1)
    close(sample.resize_for_inception(ramp, "pytorch"), expected / 127.5 - 1, 1e-6, "pytorch")


def test_a_reference_scores_itself_perfectly():
    """The commands; images in an .npz, a folder and a zip."""
    with small_inception() as root:
        inception = ("--inception", root / "inception.pth")
        npz = save_images(root / "a.npz", 8)
        said = succeeds(sample, "--reference", npz, "--out", root / "ref.npz", *inception)
        holds(said, ["8 images (32 x 32), features of 8", "images/s"])
        with np.load(root / "ref.npz") as ref:
            header = json.loads(str(ref["header"]))
        assert (header["source"], header["images"], header["size"]) == (str(npz), 8, 32)
        assert header["resize"] == "pytorch" and header["inception"] == data.file_hash(inception[1])
        (root / "each").mkdir()
        for i, image in enumerate(np.load(npz)["arr_0"]):
            Image.fromarray(image).save(root / f"each/{i}.png")
        zipped(root / "each", root / "each.zip")
        score = ("--score", root / "ref.npz", *inception)
        for images, words in [
            (npz, ["8 images are too few", "2048", "--force"]),
            ("shapes", ["8 images in", "ref.npz are too few", "--force"]),
        ]:
            complains(sample, "--images", images, *score, words=words)
        for source in (npz, root / "each", root / "each.zip"):
            said = succeeds(sample, "--images", source, *score, "--force", "--batch", 3)
            holds(said, ["only 8 images", "fewer than the 50000"])
            scores, provenance = scores_in(said)
            assert scores["fid"] < 1e-2 and scores["sfid"] < 1e-2, scores
            assert scores["precision"] == scores["recall"] == 1, scores
            hashes = data.file_hash(root / "ref.npz"), data.file_hash(inception[1])
            words = [f"8 images of {source}", *hashes, "bilinear", "fp32", "NOT THE PUBLISHED"]
            holds(provenance, words)


def test_references_of_all_kinds():
    """ADM's files have no features, but images to take them from; others have mu and sigma
    alone."""
    with small_inception() as root:
        weights = ("--inception", root / "inception.pth")
        npz = save_images(root / "a.npz", 30)
        other = save_images(root / "b.npz", 40, first=30)

        def flags(reference, *more):
            return "--images", other, "--score", reference, "--force", *weights, *more

        def score(*args):
            return scores_in(succeeds(sample, *flags(*args)))

        make = ("--reference", npz, *weights)
        succeeds(sample, *make, "--out", root / "half.npz")
        succeeds(sample, *make, "--out", root / "ref.npz", "--resize", "tensorflow")
        with np.load(root / "ref.npz") as ref:
            ours = dict(ref)
        adm = {name: ours[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
        np.savez(root / "adm.npz", arr_0=np.load(npz)["arr_0"], **adm)
        np.savez_compressed(root / "edm.npz", mu=ours["mu"], sigma=ours["sigma"])
        expected, provenance = score(root / "ref.npz")
        assert "as in TensorFlow" in provenance and expected["fid"] > 0 and len(expected) == 5
        assert "as in pytorch-fid" in score(root / "adm.npz", "--resize", "pytorch")[1]
        scores, provenance = score(root / "adm.npz", "--batch", 7)
        assert scores == expected
        words = ["as in TensorFlow", "made elsewhere", "precision and recall by its 30 images"]
        holds(provenance, words)
        assert score(root / "edm.npz")[0] == {"fid": expected["fid"], "is": expected["is"]}
        assert score(root / "half.npz")[0] != expected, "another resizing"
        assert score(root / "ref.npz", "--size", 32)[0] == expected

        header = {"format": sample.REFERENCE, "images": 30, "size": 32, "source": ""}
        header |= {"inception": "0" * 16, "resize": "pytorch"}
        (root / "cut.npz").write_bytes((root / "ref.npz").read_bytes()[:3000])
        np.savez(root / "shape.npz", **{**adm, "mu": np.zeros(5)})
        np.savez(root / "nan.npz", **{**adm, "mu_s": np.full(6, np.nan)})
        for name, changes in [
            ("foreign", {}),
            ("text", {"images": "30"}),
            ("half-precision", {"arithmetic": "bf16"}),
        ]:
            np.savez(root / name, **{**ours, "header": json.dumps({**header, **changes})})
        np.savez(root / "header.npz", **{**ours, "header": "{}"})
        for name, words in [
            ("none.npz", ["no file", "none.npz", "--reference"]),
            ("a.npz", ["a.npz", "no mu and sigma", "--reference"]),
            ("cut.npz", ["cut.npz", "damaged"]),
            ("shape.npz", ["shape.npz", "is not a reference"]),
            ("foreign.npz", ["foreign.npz", "other Inception weights", "0" * 16]),
            ("nan.npz", ["nan.npz", "mu_s is not finite"]),
            ("header.npz", ["header.npz", "is not a reference"]),
            ("text.npz", ["text.npz", "header"]),
            ("half-precision.npz", ["half-precision.npz", "fp32"]),
        ]:
            complains(sample, *flags(root / name), words=words)
        for name, more, words in [
            ("ref.npz", ("--resize", "pytorch"), ["ref.npz", "--resize tensorflow"]),
            ("ref.npz", ("--size", 64), ["64 x 64", "32 x 32", "--size 64"]),
            ("adm.npz", ("--size", 64), ["64 x 64", "32 x 32"]),
        ]:
            complains(sample, *flags(root / name, *more), words=words)


def test_reading_images_to_score_them():
    """Without --size they must be squares of one size; arrays of an .npz stay in the file."""
    with small_inception() as root:
        weights = ("--inception", root / "inception.pth")
        with np.load(save_images(root / "a.npz", 5)) as file:
            images = file["arr_0"]
        np.savez_compressed(root / "small.npz", arr_0=images)
        np.savez(root / "fortran.npz", arr_0=np.asfortranarray(images))
        for name in ("a", "small", "fortran"):
            dataset = data.open_dataset(root / f"{name}.npz")
            assert dataset.size == 32 and np.array_equal(dataset.read(3), images[3])
            if name != "small":  # a worker gets the place, not the images
                packed = pickle.dumps(dataset)
                assert isinstance(dataset.images, np.memmap) and len(packed) < 2000
                assert np.array_equal(pickle.loads(packed).read(3), images[3])
        with zipfile.ZipFile(root / "a.npz") as whole:
            array = whole.read("arr_0.npy")
        with zipfile.ZipFile(root / "short.npz", "w") as out:
            out.writestr("arr_0.npy", array[:-5000])
            out.writestr("arr_2.npy", bytes(9000))  # another array follows in the file
        with zipfile.ZipFile(root / "text.npz", "w") as out:
            out.writestr("arr_0.npy", "no array at all")
        np.savez(root / "wide.npz", arr_0=np.zeros((3, 32, 40, 3), np.uint8))
        (root / "empty").mkdir()
        for name, tall in [("one", (4,)), ("two", (3, 4)), ("first", (0, 4)), ("broken", (4,))]:
            (root / name).mkdir()
            for i in range(10):
                size = (32, 40) if i in tall else (32, 32)
                Image.fromarray(images[i % 5]).resize(size).save(root / f"{name}/{i}.png")
        (root / "broken/0.png").write_bytes(b"broken")
        (root / "all").mkdir()
        for i in range(2):
            (root / f"all/{i}.png").write_bytes(b"broken")
        (root / "single").mkdir()
        (root / "single/0.png").write_bytes(b"broken")
        Image.fromarray(images[0]).save(root / "single/1.png")

        def reference(name, *more):
            return "--reference", root / name, "--out", root / "out.npz", *weights, *more

        for name, words in [
            ("short.npz", ["short.npz", "damaged"]),
            ("text.npz", ["text.npz"]),
            ("wide.npz", ["40 x 32", "--size"]),
            ("two", ["1 %", ": 3.png, 4.png: not of 32 x 32 pixels", "pass --size"]),
            ("first", ["0.png", "32 x 40", "--size"]),
            ("broken", ["cannot be read, more than 1 %", "0.png", "4.png"]),
            ("all", ["all", "0.png"]),
            ("single", ["1 images are too few"]),  # one unreadable image is forgiven
        ]:
            complains(sample, *reference(name), words=words)
        holds(succeeds(sample, *reference("one")), ["skipped 4.png", "9 images (32 x 32)"])
        complains(sample, *reference("one", "--size", 16), words=["out.npz", "exists"])
        (root / "out.npz").unlink()
        said = succeeds(sample, *reference("broken", "--size", 16))
        holds(said, ["skipped 0.png", "9 images (16 x 16)"])
        for args, words in [
            (("--reference", root / "one"), ["--out"]),
            (("--reference", root / "one", "--out", root / "x.png"), ["x.png", ".npz"]),
            (("--images", root / "one"), ["--score"]),
            (("--images", root / "one", "--score", "x", "--cfg-scale", 3), ["--cfg-scale"]),
            (("--images", root / "one", "--score", "x", "--num-images", 3), ["--num-images"]),
            (("--bench", "--score", "x"), ["--score"]),
        ]:
            complains(sample, *args, words=words)


def test_scores_of_samples_in_one_process_and_in_two():
    """--ckpt scores the images that it writes; two processes, and those of --images, say the
    same."""
    with small_inception() as root, checkpoint("--lr", 0.01) as (_, path):
        weights = ("--inception", root / "inception.pth")
        ref = root / "ref.npz"
        real = save_images(root / "a.npz", 20)
        reference = ("--reference", real, *weights, "--workers", 0)
        succeeds(sample, *reference, "--out", ref, "--batch", 3)
        generated = ("--ckpt", path, "--num-images", 11, "--score", ref, *weights)
        generated += ("--classes", "3,1", "--cfg-scale", 2)
        score = (*generated, "--force", "--dir")
        words = ["11 images (--num-images) are too few", "--force"]
        complains(sample, *generated, words=words)
        said = succeeds(sample, *generated, "--force", "--npz", root / "one.npz")
        expected, provenance = scores_in(said)
        words = ["11 images by the EMA weights of", "dpmpp, 3 steps, guidance 2", "classes 3,1"]
        words += ["seed 0", str(ref), "bilinear", "fp32"]
        words += [data.weights_hash(load_model(path)[0])]
        holds(provenance, [*words, *map(data.file_hash, (ref, weights[1]))])
        images = ("--images", root / "one.npz", "--score", ref, *weights, "--force")
        assert scores_in(succeeds(sample, *images))[0] == expected
        raw, provenance = scores_in(succeeds(sample, *score, root / "raw", "--no-ema"))
        assert "raw weights of" in provenance and raw != expected
        results = commands_in_two_processes(
            (sample, *reference, "--out", root / "two.npz", "--batch", 2),
            (sample, *score, root / "two", "--batch", 2),
            (sample, *images, "--batch", 2),
            inception=True,
        )
        assert all(code == 0 for pair in results for code, _ in pair), results
        assert all(said == "" for _, (_, said) in results), "the second process says nothing"
        with np.load(ref) as one, np.load(root / "two.npz") as two:
            assert one["images"] == two["images"] == 20
            assert str(one["header"]) == str(two["header"])
            for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
                close(two[name], one[name], 1e-6, name)
        for ((_, said), _), tolerance in zip(results[1:], (1e-2, 1e-4), strict=True):
            found, provenance = scores_in(said)
            for name in expected:
                close(found[name], expected[name], tolerance, name)
            assert provenance.startswith("  11 images"), "none was lost"
        missing = ("--score", root / "none.npz", "--force", "--dir", root / "none")
        complains(sample, *generated, *missing, words=["no file", "none.npz"])
        assert not (root / "none").exists()


def test_without_inception_weights_the_rest_works():
    with checkpoint() as (root, path):
        ref = root / "ref.npz"
        words = ["mseitzer/pytorch-fid/releases", "pt_inception-2015-12-05-6726825d.pth"]
        words += ["SHA-256 begins with 6726825d", "--inception"]
        reference = ("--reference", "shapes", "--out", ref)
        with patch.object(torch.hub, "get_dir", lambda: str(root)):
            score = ("--num-images", 2048, "--score", ref, "--dir", root / "d")
            complains(sample, "--ckpt", path, *score, words=words)
            complains(sample, *reference, words=words)
            score = ("--score-every", 1, "--score-ref", ref, "--out", root / "new")
            complains(train, *TINY, *score, words=words)
            with patch.object(sample, "Inception", SmallInception):
                (root / "checkpoints").mkdir()
                file = inception_file(root / "checkpoints" / sample.INCEPTION)
                assert sample.load_inception()[1] == data.file_hash(file)
        torch.save({"fc.weight": torch.zeros(3)}, root / "x.pth")
        (root / "empty.pth").write_bytes(b"")
        for name, words in [
            ("x.pth", ["x.pth", "missing", "Conv2d_1a_3x3"]),
            ("empty.pth", ["empty.pth"]),
        ]:
            complains(sample, *reference, "--inception", root / name, words=words)
        assert not any((root / name).exists() for name in ("ref.npz", "new", "d"))
        succeeds(sample, "--ckpt", path, "--num-images", 2, "--out", root / "x.png")


@contextlib.contextmanager
def scored_training(n=30):
    """A folder with a reference, and flags of train.py that score samples against it, after 4 and 8
    of 10 steps and at the end; with SmallInception."""
    with small_inception() as root:
        inception = ("--inception", root / "inception.pth")
        images = save_images(root / "a.npz", 40)
        succeeds(sample, "--reference", images, "--out", root / "ref.npz", *inception)
        flags = ("--lr", 0.01, "--precision", "fp32", "--sampling-steps", 1, "--score-n", n)
        flags += ("--score-every", 0.032, "--score-ref", root / "ref.npz", *inception, "--force")
        yield root, flags


def scores_of(out):
    """The entries with scores in a run's log."""
    return [entry for entry in log_of(out) if "fid" in entry]


def best_of(out):
    """The step whose checkpoint is best.pt."""
    return data.read_checkpoint(out / "best.pt")["step"]


def test_scores_while_training():
    """The log, the curves, the best checkpoint; and the scores that sample.py gives it."""
    with scored_training() as (root, flags):
        run = root / "run"
        tiny_run(run, *flags)
        scores = scores_of(run)
        assert [entry["step"] for entry in scores] == [4, 8, 10]
        for entry in scores:
            assert 0 <= entry["recall"] <= 1 < entry["is"]
            assert entry["provenance"].startswith("30 images by the EMA weights (")
            holds(entry["provenance"], ["dpmpp, 1 steps", data.file_hash(root / "ref.npz")])
        best = min(scores, key=lambda entry: entry["fid"])
        assert best_of(run) == best["step"]
        model, _ = load_model(run / "best.pt")
        holds(best["provenance"], [f"EMA weights ({data.weights_hash(model)})"])
        assert Image.open(run / "loss.png").size == (1200, 1200)
        made = ("--num-images", 30, "--dir", root / "d", "--score", root / "ref.npz", "--force")
        inception = ("--inception", root / "inception.pth")
        said = succeeds(sample, "--ckpt", run / "best.pt", *made, *inception)
        close(scores_in(said)[0]["fid"], best["fid"], 1e-3)
        tiny_run(root / "late")
        assert not scores_of(root / "late")
        tiny_run(root / "late", *flags, "--lr", 1e-3, "--precision", "auto")
        late = [entry["step"] for entry in scores_of(root / "late")]
        assert late == [10], "a finished run is scored when that is asked for"
        for more, words in [
            (("--score-every", 1), ["--score-every 1 needs --score-ref"]),
            (("--score-ref", "x"), ["--score-ref x needs --score-every"]),
            (flags[:-1], ["30 images (--score-n) are too few", "--force"]),
            ((*flags, "--input-size", 16), ["16 x 16", "32 x 32"]),
        ]:
            complains(train, *TINY, "--out", root / "no", "--kimg", 0.08, *more, words=words)


def test_scored_runs_resume_as_if_unbroken():
    """Stopped in a step whose checkpoint is scored next, at the beginning and at the end of a
    score, in the last score; and killed when best.pt is new, and the score is not in the log."""
    with scored_training() as (root, flags):
        whole = tiny_run(root / "whole", *flags)
        sync_status = train.sync_status
        write = train.Progress.write

        def resumes(out):
            state = tiny_run(out, *flags)
            assert same(state, whole) and same(log_of(out), log_of(root / "whole")), out
            assert best_of(out) == best_of(root / "whole")

        run = (*TINY, "--kimg", 0.08, *flags, "--out")
        # sync_status is asked in each step, and for each of the four batches of a score.
        for moment, step in ((4, 4), (5, 4), (8, 4), (20, 10)):
            calls = iter(range(1, 1000))

            def interrupted(stop, *args):
                if next(calls) == moment:
                    stop.ask(signal.SIGTERM, None)
                return sync_status(stop, *args)

            out = root / f"stopped-{moment}"
            with patch.object(train, "sync_status", interrupted):
                code, said = command(train, *run, out)
            assert code == 143 and "the same command resumes" in said, (code, said)
            assert data.read_checkpoint(out / "last.pt")["step"] == step
            resumes(out)

        def killed_write(progress, entry):
            if "fid" in entry:
                raise SystemExit(137)
            write(progress, entry)

        with patch.object(train.Progress, "write", killed_write):
            assert command(train, *run, root / "killed")[0] == 137
        assert best_of(root / "killed") == 4 and not scores_of(root / "killed")
        resumes(root / "killed")


def test_the_best_checkpoint_by_other_scores_is_kept():
    with scored_training(n=10) as (root, flags):
        out = root / "run"
        fids = iter([3.0, 1.0, 2.0, 5.0, 0.5])
        compare = sample.Scorer.compare

        def scripted_compare(scorer, fake):
            return {**compare(scorer, fake), "fid": next(fids)}

        with patch.object(sample.Scorer, "compare", scripted_compare):
            tiny_run(out, *flags, kimg=0.064)  # 3.0 at step 4, 1.0 at step 8
            assert best_of(out) == 8
            tiny_run(out, *flags)
            assert best_of(out) == 8, "2.0 is not the best"
            before = (out / "best.pt").read_bytes()
            run = (*TINY, "--out", out, *flags)
            others = (*run, "--kimg", 0.096, "--score-n", 12)
            words = ["best.pt", "by other scores", "move it", "score as before"]
            complains(train, *others, words=words)
            assert (out / "best.pt").read_bytes() == before
            (out / "best.pt").rename(out / "best-of-10.pt")
            succeeds(train, *others)
            assert best_of(out) == 12, "5.0 is the best of its kind"
            complains(train, *run, "--kimg", 0.128, words=["best.pt", "by other scores"])
            assert best_of(out) == 12
            assert (out / "best-of-10.pt").read_bytes() == before


def scored_run(root):
    """`scored_training` as two micro-batches."""
    given = dict(hidden_size=32, depth=1, num_heads=2, batch_size=8, micro_batch=4, kimg=0.08)
    given |= dict(tick_kimg=0.016, sampling_steps=1, workers=0, precision="fp32", lr=1e-2)
    given |= dict(score_every=0.032, score_n=30, score_ref=str(root / "ref.npz"))
    given |= dict(inception=str(root / "inception.pth"))
    cfg = on_shapes(**given)
    with patch.object(sample, "Inception", SmallInception):
        with contextlib.redirect_stderr(io.StringIO()):
            scorer = sample.Scorer(cfg.score_ref, cfg.inception, force=True)
        train_here(cfg, root / "run", scorer)


def test_scores_while_training_in_two_processes():
    with scored_training() as (one, _), folder() as two:
        for name in ("ref.npz", "inception.pth"):
            (two / name).write_bytes((one / name).read_bytes())
        scored_run(one)
        in_two_processes(scored_run, two)
        for a, b in zip(scores_of(one / "run"), scores_of(two / "run"), strict=True):
            assert a["step"] == b["step"] and a["provenance"].startswith("30 images")
            for name in ("fid", "sfid", "is", "precision", "recall"):
                close(a[name], b[name], 1e-3, name)
        assert best_of(one / "run") == best_of(two / "run")


# -------------------------------------------------------------------------------------------------
# Files that lie: every reader, given files of every form with parts of them changed


def changed_bytes(content, rng):
    """A file with bytes flipped, a piece cut out, doubled or overwritten, or its end missing."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        size = len(content)
        at = rng.randrange(size + 1)
        length = rng.choice([1, 2, 4, 8, 64, size // 3])
        piece = content[at : at + length]
        numbers = [0, 1, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63]
        kind = rng.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            content[at : at + length] = b""
        elif kind == 2:
            content[at:at] = piece
        elif kind == 3:
            content[at : at + 8] = rng.choice(numbers).to_bytes(8, rng.choice(["little", "big"]))
        elif kind == 4:
            content[at : at + length] = bytes(len(piece))
        else:
            del content[at:]
    return bytes(content)


# What a number, a word or a list in a file could be instead.
LIES = [None, True, -1, 0, 2**31, 2**70, 1e308, math.nan, math.inf, "", "x", "\x1b[2J\n", [], {}]
LIES += [[0], [-1, -1], ["a"], {"a": 1}, [[[[]]]], 10**400, "9" * 5000, ("a", 1)]


def changed_value(value, rng):
    """A structure of plain values and tensors with one of them, anywhere, replaced or missing."""
    if isinstance(value, (dict, list, tuple)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        copied = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.15:
            del copied[key]
        else:
            copied[key] = changed_value(value[key], rng)
        return tuple(copied) if isinstance(value, tuple) else copied
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return rng.choice(strange_tensors(value))
    return rng.choice(LIES)


def strange_tensors(value):
    """Tensors of kinds that torch.save can write, and no checkpoint has."""
    dense = value.detach().clone().float()
    wrong = [
        dense.to_sparse(),
        dense.to(torch.complex64),
        dense.to(torch.float8_e4m3fn),
        dense.bool(),
        dense.flatten()[:1].expand(dense.numel() + 3),
        torch.full_like(dense, math.nan),
        torch.full_like(dense, math.inf),
        dense.flatten()[1:],
        dense[None],
        torch.zeros(0),
        torch.empty(dense.shape, device="meta"),
        torch.quantize_per_tensor(dense.flatten(), 0.1, 0, torch.qint8),
        torch.view_as_complex(dense.flatten().repeat(2).view(-1, 2)).conj(),
        nn.Parameter(dense),
    ]
    if dense.dim() > 1:
        wrong += [dense.mT, dense.to_sparse_csr() if dense.dim() == 2 else dense[0]]
    return wrong


def changed_zip(content, rng):
    """A zip with one of its files changed and its checksums right; or changed as any file is."""
    if rng.random() < 0.3:
        return changed_bytes(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as copy:
        entries = archive.infolist()
        chosen = rng.choice(entries)
        for entry in entries:
            inside = archive.read(entry)
            if entry is chosen:
                inside = (
                    changed_json(inside, rng) if inside[:1] == b"{" else changed_bytes(inside, rng)
                )
            copy.writestr(entry, inside)
    return out.getvalue()


def changed_gzip(content, rng):
    if rng.random() < 0.3:
        return changed_bytes(content, rng)
    return gzip.compress(changed_bytes(gzip.decompress(content), rng), 1)


def changed_json(content, rng):
    """A file of JSON with a value replaced, or its text changed."""
    if rng.random() < 0.3:
        return changed_bytes(content, rng)
    try:
        return json.dumps(changed_value(json.loads(content), rng)).encode()
    except ValueError:  # a number too long to be written
        return b'{"labels": ' + b"[" * 50_000


def changed_torch(content, rng):
    """A file of torch.save with a value or a tensor replaced, or changed as a zip."""
    if rng.random() < 0.4:
        return changed_zip(content, rng)
    out = io.BytesIO()
    torch.save(changed_value(torch.load(io.BytesIO(content), weights_only=True), rng), out)
    return out.getvalue()


def read_image(path):
    with open(path, "rb") as file:
        data.center_crop(data.decode(file), 8)


def read_whole(path, size=8):
    """Open a data set, and read all of it as training does."""
    dataset = data.open_dataset(path, size)
    dataset.fingerprint()
    dataset.summary()
    stream = data.ShuffledStream(dataset)
    unreadable = data.UnreadableImages(dataset, verbose=False)
    for place in range(min(3, len(dataset))):
        unreadable.add(stream[place][2])


def read_reference_and_score(path):
    stats, *_ = sample.read_reference(path)
    scorer = Mock(real=stats, path=path, inception=SmallInception())
    d, s = SmallInception.pooled, SmallInception.spatial
    fake = {"mu": torch.zeros(d), "sigma": torch.eye(d), "mu_s": torch.zeros(s)}
    fake |= {"sigma_s": torch.eye(s), "features": torch.ones(4, d)}
    sample.Scorer.compare(scorer, fake)


def small_latents(root):
    """The folder of four latents of two classes -> its path."""
    (root / "z").mkdir()
    np.save(root / "z/moments.npy", np.zeros((4, 2, 2, 4, 8, 8), np.float16))
    np.save(root / "z/labels.npy", np.arange(4) % 2)
    np.save(root / "z/state.npy", np.full(4, data.DONE, np.uint8))
    header = {"format": data.LATENTS, "size": 64, "vae": "0", "scale": data.VAE.scale, "data": "0"}
    (root / "z/latents.json").write_text(json.dumps({**header, "class_names": ["a", "b"]}))
    return root / "z"


def lying_files(root):
    """(name, file, how to change its content, what reads it), for every kind of file there is."""
    cases = []

    def case(name, path, change, read):
        cases.append((name, path, change, read))

    photo = Image.fromarray(data.Shapes(24).read(3))
    for kind in data.FORMATS:
        if kind == "AVIF" and ".avif" not in data.EXTENSIONS:
            continue  # this Pillow has no codec for it
        path = root / f"a.{kind.lower()}"
        path.write_bytes(encoded(photo, kind))
        case(kind, path, changed_bytes, read_image)
    (root / "named/cats").mkdir(parents=True)
    photo.save(root / "named/cats/a.png")
    labels = {"labels": [["cats/a.png", 0]], "class_names": ["cats"]}
    (root / "named/dataset.json").write_text(json.dumps(labels))
    case("labels", root / "named/dataset.json", changed_json, lambda path: read_whole(path.parent))
    entries = {"cats/a.png": encoded(photo), "dogs/b.jpg": encoded(photo, "jpeg")}
    entries["dataset.json"] = json.dumps({"labels": [["cats/a.png", 0], ["dogs/b.jpg", 1]]})
    case("zip", written_zip(root / "a.zip", entries), changed_zip, read_whole)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(root / "a.npz", images, arr_1=np.arange(3))
    np.savez_compressed(root / "b.npz", images, arr_1=np.arange(3))
    case("npz", root / "a.npz", changed_zip, read_whole)
    case("compressed npz", root / "b.npz", changed_zip, read_whole)
    np.savez(root / "t.npz", images, arr_1=np.ones((3, 2, 5), np.float16))
    np.savez(root / "u.npz", np.ones((3, 5)))
    case("images with tokens", root / "t.npz", changed_zip, read_whole)
    case("tokens", root / "u.npz", changed_zip, data.read_tokens)
    cifar(root / "c.tar.gz", 10, 20)
    case("cifar", root / "c.tar.gz", changed_gzip, read_whole)
    latents = small_latents(root)
    np.save(latents / "tokens.npy", np.ones((4, 1, 5)))
    for name in ("moments.npy", "labels.npy", "tokens.npy", "state.npy", "latents.json"):
        change = changed_json if name.endswith("json") else changed_bytes
        case(name, latents / name, change, lambda path: read_whole(path.parent))

    d, s = SmallInception.pooled, SmallInception.spatial
    stats = {"mu": np.zeros(d), "sigma": np.eye(d), "mu_s": np.zeros(s), "sigma_s": np.eye(s)}
    header = {"images": 30, "size": 32, "inception": "0", "resize": "pytorch", "source": "x"}
    features = np.random.default_rng(0).random((30, d))
    sample.write_reference(root / "ref.npz", {**stats, "features": features}, header)
    case("reference", root / "ref.npz", changed_zip, read_reference_and_score)

    (root / "run").mkdir()
    (root / "run/last.pt").write_bytes(tiny_checkpoint())
    case("checkpoint", root / "run/last.pt", changed_torch, lambda path: load_model(path))
    cfg = configs.config_from_dict(data.read_checkpoint(root / "run/last.pt")["config"], "")
    dataset = data.open_dataset("shapes", cfg.input_size)
    trainer = train.Trainer(cfg, torch.device("cpu"))
    batches = itertools.repeat((torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long), []))

    def resume(path):
        """From the folder of a run: its config.json, its checkpoint, its log; then a step."""
        fingerprint = dataset.fingerprint()
        train.check_folder(path.parent, cfg, fingerprint, False)
        progress = train.Progress(cfg, path.parent, trainer.device, dataset, fingerprint)
        progress.start(train.resume(path.parent, cfg, trainer, progress))
        columns, norms = trainer.step(3, batches)
        progress.add(columns, norms, [], 1, 0)
        train.draw_curves(progress.log, path.parent / "loss.png")
        progress.entry(trainer, 4)

    (root / "run/config.json").write_text(
        json.dumps({**dataclasses.asdict(cfg), "dataset": dataset.fingerprint()})
    )
    entry = {"step": 1, "kimg": 0.008, "loss": 1.0, "loss_quartiles": [1.0, 1.0, 1.0, 1.0]}
    entry |= {"grad_norm_parts": {"a": 1.0}, "condition_norm": {"mean": 1.0}}
    (root / "run/log.jsonl").write_text(json.dumps(entry) + "\n")
    case("resume", root / "run/last.pt", changed_torch, resume)
    case("config.json", root / "run/config.json", changed_json, resume)
    case("log.jsonl", root / "run/log.jsonl", changed_json, resume)
    torch.save({"state_dict": diffit.DiT(**SMALL).state_dict()}, root / "dit.pt")
    with torch.device("meta"):
        network = diffit.DiT(**SMALL)
    case(
        "foreign weights",
        root / "dit.pt",
        changed_torch,
        lambda path: train.starting_weights(path, network),
    )
    vae = vae_file(root / "v.safetensors")
    case("safetensors", vae, changed_bytes, data.load_vae)
    (root / "images").mkdir()
    settings = {"seed": 0, "classes": [1, 2], "sampler": "ddim"}
    (root / "images/settings.json").write_text(json.dumps(settings))
    case(
        "settings.json",
        root / "images/settings.json",
        changed_json,
        lambda path: sample.check_images_folder(path.parent, settings),
    )
    return cases


def fuzz(count, seed=0):
    """Change files `count` times and read them; whatever is not read ends in one sentence. ->
    how often for each kind of file."""
    rng = random.Random(seed)
    warnings.simplefilter("ignore")  # of torch, about the tensors that are made here
    refusals = collections.Counter()
    with folder() as root, patch.object(sample, "Inception", SmallInception):
        cases = lying_files(root)
        before = {path: path.read_bytes() for _, path, *_ in cases}
        folders = {path.parent: files_of(path.parent) for path in before}
        for k in range(count):
            name, path, change, read = cases[k % len(cases)]
            where = f"input {k} of seed {seed}, {name}"
            path.write_bytes(change(before[path], rng))
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    read(path)
            except (configs.UserError, OSError) as error:
                assert len(configs.printable(str(error))) < 4000, where
                refusals[name] += 1
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            for part, names in folders.items():
                for extra in files_of(part) - names - {"loss.png", "last.damaged.pt", "log.jsonl"}:
                    raise AssertionError(f"{where}: it left {part / extra}")
            for file, content in before.items():
                if file.parent == path.parent or not file.exists():
                    file.write_bytes(content)
    return refusals


def test_files_that_lie_end_in_a_sentence():
    refusals = fuzz(300)
    assert len(refusals) > 20, f"nearly every kind of file was refused at least once: {refusals}"


# -------------------------------------------------------------------------------------------------
# Devices without float64 (Apple's), played by tensors that say they lie elsewhere


class OnDevice(torch.Tensor):
    """A tensor that calls its device "meta"; its numbers lie on the CPU, in `numbers`."""

    @staticmethod
    def __new__(cls, numbers):
        strides = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=numbers.dtype, device="meta", **strides
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        TRAFFIC["read"] += 1
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_device(func, args, kwargs or {})


class DeviceMode(TorchDispatchMode):
    """Inside it "meta" is a device that computes, and refuses what a real one would: float64, and
    tensors of two devices in one operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_device(func, args, kwargs or {})


# How often since it was cleared the program read numbers of the device, and so waited for it
# ("read"), copied others there ("copied"), or had them copied without waiting ("sent").
TRAFFIC = collections.Counter()
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"}


def on_device(func, args, kwargs):
    """Do the operation on the CPU; what comes of it lies where it would lie on a real device."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnDevice)]
    here = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
    name = func._schema.name.removeprefix("aten::")
    # Copies go from one to another; indices may lie on the CPU.
    mixes = there and here and not name.startswith(("_to_copy", "copy_", "index"))
    assert not mixes, f"{name} of tensors on two devices"
    asked = kwargs.get("device")
    goes_there = bool(there) if asked is None else torch.device(asked).type == "meta"
    if name in READS or (name == "_to_copy" and not goes_there):
        TRAFFIC["read"] += bool(there)
    if name in ("_to_copy", "copy_") and not isinstance(tensors[-1], OnDevice) and goes_there:
        TRAFFIC["sent" if kwargs.get("non_blocking") else "copied"] += 1
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    numbers = tree_map(lambda x: x.numbers if isinstance(x, OnDevice) else x, (args, kwargs))
    result = func(*numbers[0], **numbers[1])
    if any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments):
        return args[0] if isinstance(result, torch.Tensor) else result  # changed in place

    def place(x):
        if not isinstance(x, torch.Tensor):
            return x
        assert x.dtype != torch.float64, f"{name} makes float64 on the device"
        return OnDevice(x)

    return tree_map(place, result) if goes_there else result


@contextlib.contextmanager
def device_without_float64():
    """A device that is no CPU -> its torch.device."""
    device = torch.device("meta")
    adamw = torch.optim.AdamW
    tensor, as_tensor = torch.tensor, torch.as_tensor  # make empty ones there, past the mode

    def tensor_by_copy(values, dtype=None, device="cpu"):
        return tensor(values, dtype=dtype).to(device)

    def as_tensor_by_copy(values, dtype=None, device=None):
        made = as_tensor(values, dtype=dtype)
        return made if device is None else made.to(device)

    with (
        DeviceMode(),
        patch.object(configs, "has_float64", lambda device: device.type == "cpu"),
        patch.object(configs, "autocast", lambda *_: contextlib.nullcontext()),
        patch.object(sample, "autocast", lambda *_: contextlib.nullcontext()),
        patch.object(torch, "tensor", tensor_by_copy),
        patch.object(torch, "as_tensor", as_tensor_by_copy),
        patch.object(torch.optim, "AdamW", lambda *args, fused: adamw(*args, foreach=False)),
    ):
        yield device


def trained_sampled_and_scored(device):
    """Numbers from a step of each process, each sampler, and each score, computed on a device."""
    found = []
    latent = dict(SMALL, model="diffit", learn_sigma=True, cfg_scale=4.0, cfg_channels=3)
    latent |= dict(cfg_schedule="power-cosine", cfg_interval=(0.1, 50.0), sampling_steps=4)
    unet = dict(model="unet", input_size=16, channels=(8, 8), blocks=(1, 1), cond_size=16, window=4)
    shared = dict(batch_size=4, precision="fp32", kimg=1, lr=1e-2)
    for fields in (
        dict(latent, timesteps="loss-aware"),
        dict(unet, process="edm", augment=0.5, sampling_steps=3, time_embedding="fourier"),
        dict(unet, process="edm", set_size=2, set_depth=1, sampling_steps=3),
    ):
        cfg = configs.Config(**shared, **fields)
        trainer = train.Trainer(cfg, device)
        x = torch.randn(4, cfg.in_channels, cfg.input_size, cfg.input_size)
        batches = itertools.repeat((x, torch.arange(4) % 2, []))
        columns, norms = trainer.step(0, batches, with_condition=True)
        trainer.step(1, batches)
        found += [columns["loss"], columns["condition"], norms]
        shown = None
        if cfg.set_size:
            found += [columns["worth"], columns["context_std"]]
            shown = sample.Support(cfg, data.ShapeKinds(16, 2, 4), "kinds", None, 3)
        for sampler in choices_of("sampler"):
            made = dataclasses.replace(cfg, sampler=sampler)
            ((x, _),) = sample.generate(trainer.ema.model, made, range(2), shown)
            found.append(x)
    inception = SmallInception().to(device)
    images = np.stack([data.Shapes(32).read(i) for i in range(12)])
    real = sample.statistics(inception, [(range(6), images[:6])], 6)
    fake = sample.statistics(inception, [(range(6), images[6:])], 6)
    scorer = Mock(real=real, inception=inception)
    found += [real["mu"], torch.tensor([*sample.Scorer.compare(scorer, fake).values()])]
    return [x.cpu() for x in found]


def test_a_device_without_float64_computes_the_same():
    with contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        expected = trained_sampled_and_scored(torch.device("cpu"))
        torch.manual_seed(0)
        with device_without_float64() as device:
            found = trained_sampled_and_scored(device)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-4)


def test_steps_do_not_wait_for_the_device():
    """A step of training asks the device one thing, whether the gradients are finite, and sends it
    nothing but its batch and what is drawn on the CPU. A step of sampling asks nothing, and sends
    the noise of random samplers alone; the process's tables go there once."""
    small = dict(batch_size=4, precision="fp32", kimg=1)
    latent = dict(SMALL, **small, model="diffit", learn_sigma=True, cfg_scale=4.0)
    unet = dict(small, model="unet", input_size=16, channels=(8, 8), blocks=(1, 1), cond_size=16)
    unet |= dict(window=4, process="edm")

    def sent(x, device):  # as to CUDA
        return x.to(device, non_blocking=True)

    with (
        device_without_float64() as device,
        patch.object(configs, "to_device", sent),
        patch.object(data, "to_device", sent),
    ):
        for fields, count in [
            (latent, 2),
            (dict(unet, num_classes=2, cfg_scale=2.0), 2),
            # and mirrors, positions, matrices, shifts, labels of the augmentation
            (dict(unet, augment=1.0), 1 + 6),
            (dict(unet, set_size=2, set_depth=1), 2),
        ]:
            cfg = configs.Config(**fields)
            trainer = train.Trainer(cfg, device)
            x = torch.randn(4, cfg.in_channels, cfg.input_size, cfg.input_size)
            batches = itertools.repeat((x, torch.arange(4) % 2, []))
            trainer.step(0, batches)
            TRAFFIC.clear()
            trainer.step(1, batches)
            assert TRAFFIC == {"read": 1, "sent": count}, (fields, TRAFFIC)
        loss_aware = configs.Config(**latent, timesteps="loss-aware")
        trainer = train.Trainer(loss_aware, device)
        batches = itertools.repeat((torch.randn(4, 4, 8, 8), torch.arange(4) % 2, []))
        trainer.step(0, batches)
        TRAFFIC.clear()
        trainer.step(1, batches)
        # Timesteps and weights; and, just after the wait, both to remember the losses.
        assert TRAFFIC == {"read": 3, "sent": 4}, TRAFFIC
        for fields in (latent, dict(latent, cfg_schedule="power-cosine"), dict(latent, eta=1.0)):
            for sampler in choices_of("sampler"):
                if ("eta" in fields) != (sampler == "ddim"):
                    continue
                cfg = configs.Config(**{**fields, "sampler": sampler, "cfg_interval": (0.1, 50.0)})
                counts = []
                for n in (2, 4):
                    made = dataclasses.replace(cfg, sampling_steps=n)
                    TRAFFIC.clear()
                    ((x, _),) = sample.generate(trainer.ema.model, made, range(2))
                    counts.append(dict(TRAFFIC))
                few, many = counts
                random = sampler == "ddpm" or "eta" in fields
                assert many.pop("sent") - few.pop("sent") == 2 * random, (sampler, counts)
                assert few == many, (sampler, counts)


# -------------------------------------------------------------------------------------------------
# Conditions: DiT's four ways, given tokens, sets of pictures

WAYS = list(diffit.CONDITION_IN)
PATCHES = 16  # of SET's images
SET = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=0
)


def varied(model):
    """The network with some of everything, also where weights start at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


def condition_inputs(B=3, count=5, width=7):
    torch.manual_seed(1)
    return torch.randn(B, 3, 8, 8), torch.tensor([3, 400, 900])[:B], torch.randn(B, count, width)


def test_parameter_counts_of_dits_ways():
    """DiT Table 4, and to the last parameter: a block of 12 D^2 + 9 D, with cross-attention 4 D^2 +
    4 D more, and so on."""
    assert WAYS == choices_of("condition_in")
    D = 1152
    plain = 12 * D**2 + 9 * D
    cross = 4 * D**2 + 4 * D
    rest = (16 * D + D) + (256 * D + D + D**2 + D) + 1001 * D + (32 * D + 32)
    head = 2 * D**2 + 2 * D
    expected = {
        "dit-xl-2-in-context": (28 * plain + rest, 449, 119.37),
        "dit-xl-2-cross": (28 * (plain + cross) + rest, 598, 137.62),
        "dit-xl-2-adaln": (28 * (plain + 4 * D**2 + 4 * D) + rest + head, 600, 118.56),
        "dit-xl-2": (28 * (plain + 6 * D**2 + 6 * D) + rest + head, 675, 118.64),
    }
    for name, (count, millions, gflops) in expected.items():
        parameters, multiply_adds, _ = diffit.measure(configs.PRESETS[name])
        assert parameters == count and round(count / 1e6) == millions, (name, parameters)
        close(multiply_adds / 1e9 / gflops, 1, 3e-4, name)


def test_parameter_counts_of_set_networks():
    counts = {"384x12-set": 43.26, "450x6-set": 37.46, "450x6-set-lag": 42.33}
    for name, millions in counts.items():
        with torch.device("meta"):
            model = diffit.build(configs.PRESETS[f"cifar100-{name}"])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions, name
        encoder = sum(p.numel() for p in model.set_encoder.blocks.parameters()) / 1e6
        assert round(encoder, 2) == (10.64 if "384" in name else 14.60)


def test_cross_attention_equals_the_naive_sum():
    torch.manual_seed(0)
    attention = diffit.CrossAttention(12, 3).double()
    x = torch.randn(2, 5, 12).double()
    c = torch.randn(2, 4, 12).double()
    expected = torch.zeros_like(x)
    keys, values = attention.kv(c).chunk(2, dim=-1)
    queries = attention.q(x)
    for b, n, h in itertools.product(range(2), range(5), range(3)):
        part = slice(4 * h, 4 * h + 4)
        scores = [(queries[b, n, part] @ keys[b, m, part]).item() / 2 for m in range(4)]
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[b, n, part] = sum(w * values[b, m, part] for m, w in enumerate(weights))
    close(attention(x, c), attention.proj(expected), 1e-12)
    single = attention(x, c[:, :1])
    close(single, single[:, :1].expand_as(single), 1e-14, "a single token tells all the same")


def test_an_adaln_block_without_modulation_is_a_plain_one():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 24)
    c = torch.randn(2, 24)
    plain = diffit.ViTBlock(24, 2, 4.0)
    block = diffit.AdaLNBlock(24, 2, 4.0)
    block.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.equal(block(x, c), plain(x))
    nn.init.zeros_(block.adaLN_modulation[1].weight)
    nn.init.zeros_(block.adaLN_modulation[1].bias)
    assert torch.equal(block(x, c), plain(x))


def test_each_way_of_conditioning_sees_time_and_tokens():
    x, t, y = condition_inputs()
    for way in WAYS:
        model = varied(diffit.DiT(**SET, condition_in=way, token_width=7, token_count=5))
        made = model(x, t, y)
        assert made.shape == (3, 6, 8, 8)
        assert (model(x, t + 9, y) - made).abs().max() > 1e-4, f"{way}: the time has no effect"
        assert (model(x, t, y + 1) - made).abs().max() > 1e-4, f"{way}: the tokens have none"
        close(model(x, t, y.flip(1)), made, 1e-5, f"{way}: the order of tokens does not matter")
        # Where nothing else is in the softmax, one null token tells what five do.
        alone = (model(x, t, model.y_embedder.null((3, 1, 7))) - model(x, t)).abs().max()
        assert (alone < 1e-5) == (way not in ("cross", "in-context")), (way, alone)
        assert torch.equal(model(x, t), model(x, t, model.y_embedder.null((3, 5, 7))))


def test_ways_of_conditioning_without_a_y():
    x, t, _ = condition_inputs()
    for way in WAYS:
        if way == "adaln-zero+cross":
            refused(lambda: diffit.DiT(**SET, condition_in=way), way, "has none")
            continue
        model = varied(diffit.DiT(**SET, condition_in=way))
        model(x, t).sum().backward()
        assert all(p.grad is not None for p in model.parameters()), way
    model = varied(diffit.DiT(**SET, token_width=7, token_count=5))
    refused(lambda: model(x, t, torch.randn(3, 5, 8)), "('B', 5, 7)", "(3, 5, 8)")


def test_weights_adapt_to_another_condition():
    """A network of classes starts one of tokens, with cross-attention, or of sets: what reads them
    is new, the rest is kept."""
    classes = varied(diffit.DiT(**{**SET, "num_classes": 4}))
    for options in [
        dict(token_width=7, condition_in="adaln-zero+cross"),
        dict(set_depth=1),
        dict(num_classes=6),
        dict(num_classes=0),
    ]:
        network = diffit.DiT(**{**SET, **options})
        weights, notes = diffit.adapt_weights(classes.state_dict(), network)
        network.load_state_dict(weights)
        kept = classes.state_dict()
        same_now = {n for n, w in network.state_dict().items() if n in kept and w.equal(kept[n])}
        assert same_now == {n for n in kept if not n.startswith("y_embedder")}, options
        assert len(notes) == 1 + bool({*options} & {"token_width", "set_depth"}), notes


def test_a_label_is_one_token():
    """For classes, c is what it always was: the embedding of the time plus that of the label."""
    model = varied(diffit.DiT(**SMALL))
    t = torch.tensor([5.0, 700.0])
    y = torch.tensor([3, 10])
    table = model.y_embedder.embedding_table.weight
    assert torch.equal(model.condition(t, y), model.t_embedder(t) + table[y])


def test_a_fresh_cross_attention_ignores_its_tokens():
    x, t, y = condition_inputs()
    model = diffit.DiT(**SET, condition_in="adaln-zero+cross", token_width=7, token_count=5)
    with torch.no_grad():  # all but the cross-attention's projections
        for name, p in model.named_parameters():
            if ".cross.proj" not in name:
                p += 0.2 * torch.randn_like(p)
    assert torch.equal(model.eval()(x, t, y), model(x, t, torch.randn_like(y)))


def test_given_tokens_enter_every_network():
    """Those that have one condition vector take the mean of the embedded tokens."""
    for words, cfg in every_network():
        cfg = dataclasses.replace(cfg, num_classes=0, token_width=7, token_count=5)
        model = varied(diffit.build(cfg))
        t = torch.tensor([10.0, 20.0])
        y = torch.randn(2, 5, 7)
        c = model.t_embedder(t) + model.y_embedder.proj(y).mean(1)
        close(model.condition(t, y), c, 1e-6, words)
        null = model.t_embedder(t) + model.y_embedder.proj(model.y_embedder.null_token)[:, 0]
        close(model.condition(t), null, 1e-6, words)


def test_tokens_are_dropped_all_together():
    torch.manual_seed(0)
    embed = diffit.TokenEmbedder(2, 3, 2, dropout=0.25)
    embed.load_state_dict(
        {
            "null_token": torch.tensor([[[0.0, 1]]]),
            "proj.weight": torch.eye(2),
            "proj.bias": torch.zeros(2),
        }
    )
    y = torch.tensor([1.0, 0]).expand(20_000, 3, 2)
    dropped = embed(y)[..., 1]
    assert torch.equal(dropped[:, :1].expand_as(dropped), dropped), "all tokens of an image or none"
    share = dropped[:, 0].mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000), share
    assert torch.equal(embed.eval()(y), y)


def test_guidance_by_tokens():
    x, _, y = condition_inputs()
    t = torch.full((3,), 400)
    model = varied(diffit.DiT(**SET, condition_in="cross", token_width=7, token_count=5))
    with torch.no_grad():
        null = model(x, t)
        expected = null + 2.5 * (model(x, t, y) - null)
        expected[:, 3:] = model(x, t, y)[:, 3:]  # the variance
        close(guided(model, y, 2.5)(x, 400), expected, 1e-5)


def set_network(**options):
    return varied(diffit.DiT(**{**SET, **options}, set_depth=1))


def test_contexts_leave_one_out():
    """The context of a picture is the mean of the encodings of the others, each encoded by itself;
    it does not depend on their order, and not in the least on the picture."""
    model = set_network()
    torch.manual_seed(2)
    x = torch.randn(12, 3, 8, 8)
    contexts = model.leave_one_out(x, 6)
    assert contexts.shape == (12, PATCHES, 24)
    alone = torch.cat([model.set_encoder(one) for one in x.split(1)])
    for i in range(12):
        first = i // 6 * 6
        others = [j for j in range(first, first + 6) if j != i]
        close(contexts[i], alone[others].mean(0), 1e-6, f"context {i}")
    order = [3, 0, 5, 1, 4, 2]
    close(model.leave_one_out(x[:6][order], 6), contexts[:6][order], 1e-6, "permuted")
    changed = x.clone()
    changed[2] = 1000 * torch.randn(3, 8, 8)
    again = model.leave_one_out(changed, 6)
    assert torch.equal(again[2], contexts[2]), "not even a rounding error of its own picture"
    assert all((again[i] - contexts[i]).abs().max() > 1e-3 for i in (0, 1, 3, 4, 5))
    assert torch.equal(again[6:], contexts[6:]), "another set"
    x.requires_grad_(True)
    model.leave_one_out(x, 6)[2].sum().backward()
    assert not x.grad[2].any() and all(x.grad[i].any() for i in (0, 1, 3, 4, 5))
    copies = x.detach()[:1].expand(6, -1, -1, -1)
    close(model.leave_one_out(copies, 6)[0], alone[0], 1e-6, "copies say what one says")


def test_sets_and_tokens_train_in_every_network():
    """A step: gradients everywhere; samples from a support, and none without."""
    kinds = data.ShapeKinds(16, kinds=4, each=6)
    for words, cfg in every_network():
        fields = dict(num_classes=0, set_size=2, set_depth=1, diffusion_steps=20, sampling_steps=2)
        cfg = dataclasses.replace(cfg, **fields)
        trainer = train.Trainer(cfg, torch.device("cpu"))
        with torch.no_grad():
            for p in trainer.parameters:
                p += 0.1 * torch.randn_like(p)
        before = [p.detach().clone() for p in trainer.parameters]
        x = torch.stack([kinds.example(i, False, None) for i in (0, 4, 1, 5)])
        columns, _ = trainer.step(0, itertools.repeat((x, torch.arange(4), [])), True)
        t = columns["t"]
        assert t[0] == t[1] and t[2] == t[3], "one noise level for a set"
        names = [name for name, _ in trainer.model.named_parameters()]
        still = [name for name, p, q in zip(names, before, trainer.parameters) if p.equal(q)]
        assert len(still) <= 1, (words, still)
        assert columns["worth"].isfinite().all() and columns["context_norm"].min() > 0
        support = sample.Support(cfg, kinds, "kinds", [1, 3], 3)
        ((x, labels),) = sample.generate(trainer.ema.model, cfg, range(3), support)
        assert x.isfinite().all() and labels.tolist() == [1, 3, 1], words


def test_the_log_says_what_the_context_is_worth():
    """The loss with null tokens less the loss with its own, at the same noise, by hand."""
    cfg = configs.config_from_preset(
        "outlines-set",
        dict(set_size=6, input_size=8, hidden_size=24, depth=1, num_heads=2, batch_size=12),
    )
    trainer = train.Trainer(cfg, torch.device("cpu"))
    varied(trainer.model)
    torch.manual_seed(0)
    x = torch.randn(12, 3, 8, 8)
    with torch.no_grad():
        y = trainer.model.leave_one_out(x, 6)
        t = trainer.process.draw(12)
        noise = torch.randn_like(x)
        found = trainer.watch(x, t, y, None, t, noise)
        trainer.model.eval()
        own, null = (
            trainer.process.loss(lambda x, t: trainer.model(x, t, z), x, t, noise)["loss"]
            for z in (y, trainer.model.y_embedder.null_token.expand_as(y))
        )
    close(found["worth"], null - own, 1e-6)
    assert found["worth"].abs().min() > 0
    close(found["context_norm"], y.flatten(1).norm(dim=1), 1e-6)
    close(found["context_mean"], y.abs().mean((1, 2)), 1e-6)
    close(found["context_max"], y.abs().amax((1, 2)), 1e-6)
    close(found["context_std"], y.flatten(1).numpy().std(1), 1e-6)


def test_kinds_of_shapes_follow_from_their_number():
    one = data.ShapeKinds(16, kinds=7, each=3)
    assert len(one) == 21 and one.labels.tolist() == [*range(7)] * 3
    assert torch.equal(*(torch.from_numpy(data.ShapeKinds(16, 7, 3).read(9)) for _ in range(2)))
    assert len({one.read(i).tobytes() for i in range(21)}) == 21
    few = data.ShapeKinds(16, kinds=[5, 2], each=2, seed=4)
    assert few.labels.tolist() == [5, 2, 5, 2]
    for coloured in (True, False):
        # Drawn large, at the same place: two pictures of a kind are closer than those of two kinds.
        kinds = data.ShapeKinds(32, kinds=[5, 2], each=20, coloured=coloured)
        means = np.stack([kinds.read(i) for i in range(40)]).reshape(20, 2, -1).mean(0)
        assert np.abs(means[0] - means[1]).mean() > 3
    for k in range(200):
        radius = np.linalg.norm(data.random_outline(np.random.default_rng(k)), axis=1)
        close(radius.max(), 1, 1e-12)
        assert radius.min() > 0.05
    assert one.fingerprint() != data.ShapeKinds(16, 7, 3, coloured=False).fingerprint()


def identity_stream(labels, **options):
    """A stream over images that show their own number: place -> image."""
    images = np.repeat(np.arange(len(labels), dtype=np.uint8), 12).reshape(-1, 2, 2, 3)
    dataset = data.ImageArray(images, np.array(labels))
    return data.ShuffledStream(dataset, 1, set_size=3, **options)


def test_sets_in_the_order_of_training():
    """Each run of n places is of one class, none of those held out, and each image comes once in an
    epoch at most; what is left of a class comes in others."""
    labels = [k for k, count in enumerate([7, 3, 10, 2 + 1, 5]) for _ in range(count)]
    stream = identity_stream(labels, holdout=(1,))
    assert stream.length == 6 + 9 + 3 + 3
    epochs = []
    for epoch in range(6):
        places = range(stream.length * epoch, stream.length * (epoch + 1))
        images = [int(stream[place][0][0, 0, 0]) for place in places]
        classes = [stream[place][1] for place in places]
        assert classes == [labels[i] for i in images]
        sets = [classes[k : k + 3] for k in range(0, len(classes), 3)]
        assert all(len(set(group)) == 1 for group in sets) and 1 not in classes
        assert len(set(images)) == len(images), "at most once in an epoch"
        epochs.append(images)
    assert len({tuple(images) for images in epochs}) == 6
    assert set(sum(epochs, [])) == {i for i, k in enumerate(labels) if k != 1}
    again = identity_stream(labels, holdout=(1,))
    for place in (100, 3, 77):
        assert torch.equal(again[place][0], stream[place][0])
    batches = [range(k, k + 6) for k in range(0, 60, 6)]
    for a, b in zip(data.loader(stream, batches, 0), data.loader(stream, batches, 2), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def broken_images(numbers):
    """As long as it is entered, these images of an ImageArray cannot be read."""
    read = data.ImageArray.read

    def reads(self, i):
        if i in numbers:
            raise data.UnreadableImage("broken")
        return read(self, i)

    return patch.object(data.ImageArray, "read", reads)


def test_an_unreadable_image_of_a_set_gives_way_to_one_of_its_class():
    labels = [0] * 7 + [1] * 400
    for broken in range(7):
        stream = identity_stream(labels)
        with broken_images([broken]):
            for first in range(0, 3 * stream.length, 3):
                if stream[first][1] == 0:
                    found = [stream[place] for place in range(first, first + 3)]
                    images = {int(x[0, 0, 0]) for x, *_ in found}
                    assert len(images) == 3 and max(images) < 7 and broken not in images
                    assert {name for *_, bad in found for name, _ in bad} <= {f"image {broken}"}


def test_a_class_without_a_readable_image_ends_the_run():
    stream = identity_stream([0] * 4 + [1] * 900)
    with broken_images(range(4)):
        first = next(p for p in range(0, stream.length, 3) if stream[p][1] == 0)
        with contextlib.redirect_stderr(io.StringIO()):
            counter = data.UnreadableImages(stream.dataset)
            words = ("class 0", "none can be read", "hold the class out")
            refused(lambda: counter.add(stream[first][2]), *words)


def test_damaged_images_of_a_set_are_listed_as_others_are():
    """Three of twenty, of a class that has two more: past 1 %, not a class without any."""
    labels = [0] * 5 + [1] * 15
    stream = identity_stream(labels)
    with broken_images(range(3)):
        bad = [pair for place in range(3 * stream.length) for pair in stream[place][2]]
    assert {name for name, _ in bad} == {"image 0", "image 1", "image 2"}, bad


SETS = ("--preset", "outlines-set", "--data", "shapes-set", "--input-size", 8, "--set-depth", 1)
SETS += ("--set-size", 6, "--batch-size", 12)


def test_sets_resume_as_if_unbroken():
    """Stopped in the middle of a tick, with other workers: every tensor, and the log with what
    contexts are worth, bit for bit."""
    with folder() as root:
        with patch.object(data.Shapes, "read", data.ShapeKinds.read):  # stopped_run counts these
            pass
        whole = tiny_run(root / "whole", *SETS, kimg=0.12)
        tiny_run(root / "parts", *SETS, "--workers", 2, kimg=0.036)
        parts = tiny_run(root / "parts", *SETS, kimg=0.12)
        assert whole["step"] == 10 and same_training(whole, parts)
        log = log_of(root / "whole")
        assert same(log, log_of(root / "parts"))
        assert {"worth", *train.CONTEXT} <= log[0].keys()
        assert "set_encoder" in log[0]["grad_norm_parts"]
        assert Image.open(root / "whole/loss.png").size == (1200, 1200)
        # 24 images beside five pictures each: two cells in a row, of 6 pictures and two gaps.
        grid = Image.open(root / "whole/samples-000000.png")
        assert grid.size[0] == 2 * (64 * 6 + 8 + 32 + 2) + 2


def train_sets(root):
    fields = dict(input_size=8, hidden_size=32, depth=1, num_heads=2, set_depth=1, batch_size=24)
    fields |= dict(micro_batch=12, kimg=0.12, tick_kimg=0.048, sampling_steps=2, workers=0)
    fields |= dict(set_size=6, precision="fp32")
    for way in ("adaln-zero", "adaln-zero+cross"):
        fields |= dict(condition_in=way)
        cfg = configs.config_from_preset("outlines-set", fields)
        with signals_restored(), contextlib.redirect_stderr(io.StringIO()):
            train.train(cfg, data.ShapeKinds(8), root / way, device=torch.device("cpu"))


def test_sets_in_two_processes_equal_one():
    with folder() as one, folder() as two:
        train_sets(one)
        in_two_processes(train_sets, two)
        for way in ("adaln-zero", "adaln-zero+cross"):
            a, b = (torch.load(root / way / "last.pt", weights_only=True) for root in (one, two))
            assert a["step"] == 5 and same(a, b), f"{way}: two processes differ from one"
            assert same(log_of(one / way), log_of(two / way))


def test_sampling_from_a_support():
    """A folder of a few pictures of any size; classes of a data set, those held out unless told
    otherwise; image i from (seed, i) alone."""
    with folder() as root:
        tiny_run(root / "run", *SETS, "--lr", 0.01, kimg=0.06)
        (root / "five").mkdir()
        kinds = data.ShapeKinds(20, [7], 5)
        for i in range(5):
            size = (20 + i, 30)
            Image.fromarray(kinds.read(i)).resize(size).save(root / f"five/{i}.png")
        (root / "five/notes.txt").write_text("x")
        (root / "five/broken.png").write_bytes(b"x")
        flags = ("--ckpt", root / "run")
        five = (*flags, "--support", root / "five")
        said = succeeds(sample, *five, "--num-images", 11, "--out", root / "x.png")
        holds(said, ["6 images; left out: 1 .txt", "skipped broken.png", "wrote"])
        # Two rows of eight beside the five that can be read, a gap, and one at the end.
        assert Image.open(root / "x.png").size == (64 * (5 + 8) + 8 + 32 + 4, 2 * 66 + 2)
        succeeds(sample, *five, "--num-images", 3, "--npz", root / "a.npz", "--shots", 2)
        with np.load(root / "a.npz") as found:
            assert found["arr_0"].shape == (3, 8, 8, 3) and "arr_1" not in found
        # Held-out kinds in turn; the support of an image does not depend on the others.
        many = (*flags, "--support", "shapes-set", "--num-images", 25, "--seed", 3)
        said = succeeds(sample, *many, "--npz", root / "b.npz", "--score", "shapes")
        holds(said, ["% named right", "5 pictures each of shapes-set, classes 980,981", "20 kinds"])
        images, labels = arrays(root / "b.npz")
        assert labels == [*range(980, 1000), *range(980, 985)]
        few = (*many, "--num-images", 3, "--batch", 1, "--npz", root / "c.npz")
        succeeds(sample, *few)
        assert most_different(arrays(root / "c.npz")[0], images[:3]) <= 1
        some = (*many, "--num-images", 3, "--classes", "4,2", "--dir", root / "d")
        said = succeeds(sample, *some, "--shots", 1, "--npz", root / "d.npz")
        holds(said, ["48000 images of 4000 classes"])
        assert arrays(root / "d.npz")[1] == [4, 2, 4]
        complains(sample, *some, "--shots", 2, words=["another run", "shots"])
        model, cfg = load_model(root / "run")
        support = sample.Support(cfg, data.ShapeKinds(8), "kinds", [4, 2], 3)
        alone = [support.y(model, [i], seed=5) for i in range(4)]
        together = support.y(model, range(4), seed=5)
        close(torch.cat(alone), together, 1e-6)
        assert (together[0] - together[2]).abs().max() > 1e-3, "the same class, another support"
        for args, words in [
            (flags, ["--support PATH"]),
            ((*flags, "--classes", "3"), ["--classes 3", "--support PATH"]),
            ((*flags, "--tokens", "x.npz"), ["--tokens x.npz", "--support PATH"]),
            ((*flags, "--shots", 3), ["--shots 3", "pass --support PATH"]),
            ((*five, "--shots", 9), ["6 pictures, and 9 are to condition", "--shots 6"]),
            ((*five, "--dir", root / "five/x"), ["is inside --support"]),
            ((*five, "--classes", "1"), ["has no classes"]),
            ((*many, "--shots", 25), ["12 pictures of class 980, and 25 are", "--shots 12"]),
            ((*many, "--classes", "4000"), ["there is no class 4000"]),
            ((*flags, "--support", root / "none"), ["there is no data at"]),
        ]:
            complains(sample, *args, "--out", root / "y.png", words=words)
        dataset = data.ShapeKinds(8, [7], 9)
        with patch.object(data.ShapeKinds, "read", Mock(side_effect=data.UnreadableImage("x"))):
            with contextlib.redirect_stderr(io.StringIO()):
                strict = sample.Support(cfg, dataset, "kinds", [7], 3)
                refused(lambda: strict.y(model, [0], 0), "only 0 of", "class 7", "3 are to")
        with patch.object(data.ShapeKinds, "read", lambda self, i: np.zeros((8, 8, 3), np.uint8)):
            assert len(sample.Support(cfg, dataset, "kinds", [7], 3).pictures(0, 0)) == 3
        (root / "empty").mkdir()
        empty = (*flags, "--support", root / "empty", "--out", root / "y.png")
        complains(sample, *empty, words=["holds no images"])
        unguided = ("--cfg-scale", 1, "--num-images", 2, "--out", root / "z.png")
        succeeds(sample, *flags, *unguided)
        succeeds(sample, "--bench", 1, *flags, "--batch", 2)
    with checkpoint() as (root, path):
        refused_here = ("--ckpt", path, "--support", "shapes-set", "--out", root / "x.png")
        complains(sample, *refused_here, words=["--support shapes-set", "one of 10 classes"])


def test_references_of_some_classes():
    shapes = data.Shapes(32, 40)
    some = data.OfClasses(shapes, [7, 2])
    assert len(some) == 8 and set(some.labels.tolist()) == {2, 7}
    assert some.name(1) == "shape 7" and np.array_equal(some.read(1), shapes.read(7))
    refused(lambda: data.OfClasses(shapes, [11, 12]), "class 11")
    with folder() as root, small_inception():
        weights = ("--inception", inception_file(root / "i.pth"))
        np.savez(root / "a.npz", all_images(shapes), arr_1=shapes.labels)
        flags = (*weights, "--workers", 0, "--classes", "2,7")
        said = succeeds(sample, "--reference", root / "a.npz", "--out", root / "r.npz", *flags)
        holds(said, ["statistics of 8 images"])
        scored = ("--images", root / "a.npz", "--score", root / "r.npz", "--force", *flags)
        said = succeeds(sample, *scored)
        holds(said, ["FID 0.0000", "8 images of", "classes 2,7", "a.npz, classes 2,7"])
        np.savez(root / "b.npz", all_images(shapes))
        args = ("--reference", root / "b.npz", "--out", root / "s.npz", *flags)
        complains(sample, *args, words=["has no classes"])


def test_training_on_given_tokens():
    """From an .npz with a float arr_1 to samples of tokens in a file; the width and the number are
    those of the data."""
    with folder() as root:
        shapes = data.Shapes(32, 40)
        tokens = np.eye(10, dtype=np.float16)[shapes.labels]
        np.savez(root / "a.npz", all_images(shapes), tokens)
        np.savez(root / "b.npz", all_images(shapes), np.repeat(tokens[:, None], 3, axis=1))
        np.savez(root / "p.npz", tokens[:4])
        flags = ("--model", "dit", "--condition-in", "adaln-zero+cross", "--data")
        said = []
        with contextlib.redirect_stderr(io.StringIO()):
            said = succeeds(
                train, *TINY, *flags, root / "a.npz", "--out", root / "run", "--kimg", 0.032
            )
        holds(said, ["40 images with 1 token each of width 10"])
        cfg = torch.load(root / "run/last.pt", weights_only=True)["config"]
        assert (cfg["num_classes"], cfg["token_width"], cfg["token_count"]) == (0, 10, 1)
        assert {"worth", *train.CONTEXT} <= log_of(root / "run")[0].keys()
        tiny_run(root / "three", *flags, root / "b.npz", "--workers", 2, kimg=0.016)
        cfg = torch.load(root / "three/last.pt", weights_only=True)["config"]
        assert (cfg["token_width"], cfg["token_count"]) == (10, 3)
        ckpt = ("--ckpt", root / "run", "--tokens", root / "p.npz")
        succeeds(sample, *ckpt, "--num-images", 6, "--npz", root / "x.npz")
        model, cfg = load_model(root / "run")
        shown = sample.Tokens(tokens[:4, None])
        ((x, labels),) = sample.generate(model, cfg, range(6), shown)
        with np.load(root / "x.npz") as found:
            assert labels is None and most_different(found["arr_0"], data.to_uint8(x)) <= 1
        other = ("--ckpt", root / "three", "--tokens", root / "p.npz", "--out", root / "y.png")
        complains(sample, *other, words=["(1 of width 10 for", "takes (3 of width 10)"])
        np.savez(root / "huge.npz", np.full((4, 10), 1e30, np.float32))
        said = succeeds(
            sample,
            "--ckpt",
            root / "run",
            "--tokens",
            root / "huge.npz",
            "--num-images",
            2,
            "--out",
            root / "h.png",
        )
        holds(said, ["images 0 to 1 are not finite numbers"])
        np.savez(root / "wide.npz", np.zeros((4, 11), np.float32))
        np.savez(root / "labels.npz", np.arange(4))
        np.savez(root / "nan.npz", np.full((4, 10), np.nan))
        for file, words in [
            ("wide.npz", ["of width 11", "1 of width 10"]),
            ("labels.npz", ["int64 (4,)", "not tokens"]),
            ("nan.npz", ["not finite"]),
            ("none.npz", ["there is no file"]),
        ]:
            args = ("--ckpt", root / "run", "--tokens", root / file, "--out", root / "y.png")
            complains(sample, *args, words=words)
        out = ("--kimg", 0.016, "--out", root / "new")
        for args, words in [
            (("a.npz", "--token-width", 9), ["(1 of width 10 for", "(1 of width 9)"]),
            (("a.npz", "--num-classes", 10), ["no labels", "10 classes"]),
            (("p.npz",), ["arr_0", "float16 (4, 10)"]),
        ]:
            complains(train, *TINY, *flags, root / args[0], *args[1:], *out, words=words)
        np.savez(root / "bad.npz", all_images(shapes), tokens[:7])
        complains(train, *TINY, "--data", root / "bad.npz", *out, words=["7 images, and arr_0 40"])
        prepared = ("prepare", root / "a.npz", root / "a.zip", "--size", 16)
        complains(data, *prepared, words=["has tokens, which a .zip cannot hold"])
        tokens = np.eye(10)[shapes.labels]
        tokens[3] = np.nan
        dataset = data.ImageArray(all_images(shapes), None, tokens=tokens[:, None])
        stream = data.ShuffledStream(dataset)
        bad = [pair for place in range(40) for pair in stream[place][2]]
        assert bad == [("image 3", "its tokens are not finite")]


def test_sets_and_tokens_of_latents():
    """Networks of latents: sets from cached latents, a support through the VAE, tokens beside
    them."""
    fields = {**LATENT_PRESET, "model": "dit", "num_classes": 0, "set_size": 2, "set_depth": 1}
    fields |= {"holdout": (0, 1)}
    with (
        folder() as root,
        preset("tiny", **fields),
        preset("told", **{**LATENT_PRESET, "num_classes": 0, "cfg_scale": 1.0}),
    ):
        vae = ("--vae", vae_file(root / "v.safetensors"))
        images = all_images(data.Shapes(16, 40))
        np.savez(root / "a.npz", images, np.arange(40) % 10)
        cache(root / "a.npz", root / "z", *vae, "--size", 16)
        succeeds(train, "--preset", "tiny", "--data", root / "z", *vae, "--out", root / "run")
        grid = Image.open(root / "run/samples-000000.png")
        assert grid.size[0] == 3 * (2 * 64 + 8 + 32 + 2) + 2, "two pictures and two gaps in a cell"
        for support in ("a.npz", "z"):
            flags = ("--ckpt", root / "run", "--support", root / support, "--num-images", 4)
            npz = root / f"by-{support}.npz"
            succeeds(sample, *flags, "--npz", npz)
            assert arrays(npz)[1] == [0, 1, 0, 1] and arrays(npz)[0].shape == (4, 16, 16, 3)
        np.savez(root / "b.npz", images, np.eye(10)[np.arange(40) % 10])
        cache(root / "b.npz", root / "y", *vae, "--size", 16)
        latents = data.open_dataset(root / "y")
        assert np.array_equal(latents.tokens[:, 0], np.eye(10)[np.arange(40) % 10])
        succeeds(train, "--preset", "told", "--data", root / "y", "--out", root / "told")
        model, cfg = load_model(root / "told/last.pt")
        assert cfg.token_width == 10


def test_another_condition_takes_the_place_of_the_presets():
    for name, given, expected in [
        ("shapes-set", {"num_classes": 3}, (3, 0, 0, 0, ())),
        ("shapes-set", {"token_width": 3}, (0, 3, 0, 0, ())),
        ("shapes-set", {"set_size": 0}, (0, 0, 0, 0, ())),
        ("shapes", {"set_size": 2, "set_depth": 1}, (0, 0, 1, 2, ())),
        ("shapes", {"token_width": 3, "token_count": 2}, (0, 3, 0, 0, ())),
    ]:
        cfg = configs.config_from_preset(name, given)
        found = cfg.num_classes, cfg.token_width, cfg.set_depth, cfg.set_size, cfg.holdout
        assert found == expected, (name, given, found)
        assert cfg.takes_y == (found != (0, 0, 0, 0, ())) and (cfg.takes_y or cfg.cfg_scale == 1)


def test_sets_that_cannot_be():
    with folder() as root:
        shapes = all_images(data.Shapes(8, 30))
        np.savez(root / "a.npz", shapes, np.array([0] * 20 + [1] * 6 + [2] * 4))
        np.savez(root / "plain.npz", shapes)
        ours = ("--data", root / "a.npz", "--holdout", "2")
        flags = (*TINY, *SETS, "--kimg", 0.012, "--out", root / "run")
        succeeds(train, *flags, *ours)
        for args, words in [
            (("--data", root / "plain.npz"), ["has no labels", "sub-folders"]),
            (("--data", root / "a.npz"), ["no images of class 980", "--holdout ''"]),
            (("--data", root / "a.npz", "--holdout", ""), ["class 2", "4 images", "--set-size 6"]),
            ((*ours, "--holdout", "0,1,2"), ["all 3 classes"]),
            ((*ours, "--holdout", "0.5"), ["whole numbers"]),
            ((*ours, "--set-size", 1), ["--set-size 1", "2 images or more"]),
            ((*ours, "--set-size", 0), ["--set-size 0", "--set-depth 1"]),
            ((*ours, "--set-size", 3, "--set-depth", 0), ["--set-size 3 and --set-depth 0"]),
            ((*ours, "--batch-size", 10), ["--batch-size 10", "multiple of --set-size 6"]),
            ((*ours, "--micro-batch", 4), ["--micro-batch 4", "multiple of --set-size 6"]),
            ((*ours, "--num-classes", 3), ["--num-classes and --set-depth", "choose one"]),
            ((*ours, "--token-width", 3), ["--token-width and --set-depth", "choose one"]),
        ]:
            new = ("--out", root / "new")
            complains(train, *flags, *args, *new, words=words)
        complains(
            train, *TINY, "--holdout", "3", "--out", root / "new", words=["--holdout", "--set-size"]
        )
        complains(train, *TINY, "--token-count", 3, "--out", root / "new", words=["--token-width"])
        complains(
            train,
            *TINY,
            "--condition-in",
            "cross",
            "--out",
            root / "new",
            words=["--condition-in is for dit"],
        )


def test_a_network_learns_what_a_few_pictures_show():
    """Sets of four kinds that are four colours: after a short training the mean colour of samples
    follows that of the support, of kinds that were held out, too."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (60, 3))
    labels = np.repeat(np.arange(60), 8)
    images = colours[labels][:, None, None] + rng.integers(-9, 10, (480, 4, 4, 3))
    dataset = data.ImageArray(images.clip(0, 255).astype(np.uint8), labels)
    fields = dict(input_size=4, patch_size=2, hidden_size=48, depth=2, set_depth=1, num_heads=2)
    fields |= dict(set_size=3, batch_size=48, lr=3e-3, kimg=24, holdout=tuple(range(50, 60)))
    fields |= dict(workers=0, cfg_scale=1.0, tick_kimg=4, sample_kimg=100, sampling_steps=8)
    cfg = configs.config_from_preset("outlines-set", fields)
    with folder() as root, signals_restored(), contextlib.redirect_stderr(io.StringIO()):
        train.train(cfg, dataset, root / "run", device=torch.device("cpu"))
        model, cfg = load_model(root / "run")
        worth = log_of(root / "run")[-1]["worth"]
    support = sample.Support(cfg, dataset, "colours", list(cfg.holdout), 2)
    ((x, labels),) = sample.generate(model, cfg, range(40), support)
    made = data.to_uint8(x).mean((1, 2))
    error = np.abs(made - colours[labels]).mean()
    chance = np.abs(made - colours[np.roll(labels, 1)]).mean()
    assert error < 0.5 * chance, (error, chance)
    assert worth > 0, worth


# -------------------------------------------------------------------------------------------------
# CUDA


def need_cuda():
    if not torch.cuda.is_available():
        raise Skip("no CUDA device")
    return torch.device("cuda")


def small_inputs(device):
    """x, t, y for a network of SMALL."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([0, 37, 999]), torch.tensor([0, 3, 10])
    return [value.to(device) for value in inputs]


def test_cuda_forward_equals_cpu():
    device = need_cuda()
    for network in (diffit.DiffiT, diffit.DiT):
        model = fill(network(**SMALL).eval())
        with torch.no_grad():
            expected = model(*small_inputs("cpu"))
            close(model.to(device)(*small_inputs(device)).cpu(), expected, 1e-4)


def test_cuda_trains_resumes_and_samples():
    need_cuda()
    with folder() as root:
        tiny_run(root / "run", kimg=0.04)
        state = tiny_run(root / "run")
        assert state["step"] == 10
        assert all(value.isfinite().all() for value in state["model"].values())
        made = ("--num-images", 4, "--out", root / "x.png")
        succeeds(sample, "--ckpt", root / "run/last.pt", *made)


def test_cuda_steps_wait_once():
    device = need_cuda()
    cfg = configs.Config(**SMALL, model="diffit", learn_sigma=True, batch_size=4, precision="bf16")
    trainer = train.Trainer(cfg, device)
    batches = itertools.repeat((torch.randn(4, 4, 8, 8), torch.arange(4) % 2, []))
    trainer.step(0, batches)
    process = trainer.process
    start = torch.randn(2, 4, 8, 8, device=device)
    f = guided(trainer.ema.model, torch.tensor([0, 1], device=device), diffusion.power_cosine(4.4))
    for act, waits in [
        (lambda: trainer.step(1, batches), 1),
        (lambda: diffusion.ddim(process, f, start, process.levels(3)), 0),
        (lambda: diffusion.dpmpp(process, f, start, process.levels(3)), 0),
    ]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            act()
            torch.cuda.set_sync_debug_mode("default")
        found = [str(w.message) for w in caught if "synchron" in str(w.message)]
        assert len(found) == waits, found


def test_cuda_compiled_blocks_equal_eager_ones():
    device = need_cuda()
    model = fill(diffit.DiffiT(**SMALL).eval()).to(device)
    inputs = small_inputs(device)
    with torch.no_grad():
        expected = model(*inputs).cpu()
        for block in model.blocks:
            block.compile()
        close(model(*inputs).cpu(), expected, 1e-4)


def test_cuda_scores_equal_those_of_the_cpu():
    device = need_cuda()
    with folder() as root:
        weights = inception_file(root / "i.pth")
        nets = [sample.load_inception(weights, where)[0] for where in ("cpu", device)]
    images = np.stack([data.Shapes(32).read(i) for i in range(8)])
    configs.autocast("tf32", device)  # must not last
    a, b = (sample.statistics(net, [(range(8), images)], 8) for net in nets)
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        close(b[name], a[name], 1e-4, name)
    torch.manual_seed(0)
    real = torch.randn(600, 64)
    fake = 0.9 * torch.randn(500, 64) + 0.1
    found = sample.precision_recall(real.cuda(), fake.cuda())
    close(found, sample.precision_recall(real, fake), 0.01)


# -------------------------------------------------------------------------------------------------
# Running them

MOST_PROCESSES = 16  # with more of them, the longest test alone would decide
LONGEST = 3600  # seconds until a test counts as hanging, and its process is killed
SPAWN = multiprocessing.get_context("spawn")


def outcome_of(test):
    """Run a test -> "passed", "skipped" or "failed", and details for the report."""
    try:
        test()
    except Skip as reason:
        return "skipped", f": {reason}"
    except (Exception, SystemExit):
        return "failed", "\n" + traceback.format_exc()
    finally:
        end_started()
    return "passed", ""


def work(connection, log):
    """A process that runs the tests whose names it is sent, in its main thread, until there are no
    more. All that it and the processes started by tests print goes to the file `log`."""
    os.setsid()  # Ctrl-C on a terminal reaches `main` alone, which passes it on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell said "&"
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    faulthandler.enable()
    torch.set_num_threads(1)
    # This process was spawned, so it would spawn the workers of DataLoaders, too. As elsewhere:
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            name = connection.recv()
            os.truncate(log, 0)
            began = time.time()
            outcome, detail = outcome_of(globals()[f"test_{name}"])
            connection.send((outcome, time.time() - began, detail))


class Worker:
    """A process of `work`, started when it is needed. Where a test kills it, another follows."""

    def __init__(self, log):
        self.log = Path(log)
        self.log.touch()
        self.process = None

    def run(self, name):
        """-> outcome, seconds, details"""
        if self.process is None or not self.process.is_alive():
            self.connection, theirs = SPAWN.Pipe()
            self.process = SPAWN.Process(target=work, args=(theirs, self.log))
            self.process.start()
            theirs.close()
        began = time.time()
        try:
            self.connection.send(name)
            # The end of the pipe alone would not do: children of a lost process may hold it open.
            while not self.connection.poll(1):
                if not self.process.is_alive():
                    raise EOFError
                if time.time() - began > LONGEST:
                    self.process.kill()
            outcome, seconds, detail = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            kill_group(self.process.pid)
            outcome = "failed"
            seconds = time.time() - began
            detail = f": its process was lost (exit code {self.process.exitcode})"
        if outcome == "failed":
            printed = self.log.read_text(errors="replace")[-10_000:]
            detail += f"\nIt printed:\n{printed}" if printed else ""
        return outcome, seconds, detail

    def interrupt(self):
        """Ctrl-C: the test may still remove what it made."""
        if self.process is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def end(self, patience=10):
        if self.process is not None:
            self.connection.close()
            self.process.join(patience)
            self.process.kill()
            kill_group(self.process.pid)


def run_in_processes(names, processes):
    """Run tests in so many processes: yields name, outcome, seconds, detail in their order."""
    with tempfile.TemporaryDirectory() as logs:
        workers = [Worker(f"{logs}/{k}") for k in range(min(processes, len(names)))]
        idle = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def next_idle(name):
            worker = idle.get()
            try:
                return name, *worker.run(name)
            finally:
                idle.put(worker)

        # A thread for each process waits for it; `map` gives the results in order.
        pool = ThreadPoolExecutor(max(1, len(workers)))
        try:
            yield from pool.map(next_idle, names)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.interrupt()
            raise
        finally:
            for worker in workers:
                worker.end()
            pool.shutdown()


def main():
    words = sys.argv[1:]
    tests = [n.removeprefix("test_") for n in globals() if n.startswith("test_")]
    for word in words:
        if not any(word in name for name in tests):
            print(f"test_all.py: no test has {word!r} in its name", file=sys.stderr)
            sys.exit(2)
    tests = [n for n in tests if not words or any(word in n for word in words)]
    on_cuda = [n for n in tests if n.startswith("cuda_")]
    rest = [n for n in tests if n not in on_cuda]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        # Tests of the CPU see no GPU; those of the GPU run one at a time, with nothing beside them.
        with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
            for result in run_in_processes(rest, min(cores, MOST_PROCESSES)):
                report(*result, counts)
        for result in run_in_processes(on_cuda, 1):
            report(*result, counts)
    except KeyboardInterrupt:
        sys.exit(130)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(1 if counts["failed"] or not sum(counts.values()) else 0)


def report(name, outcome, seconds, detail, counts):
    counts[outcome] += 1
    print(f"{outcome:8}{seconds:6.1f} s  {name.replace('_', ' ')}{detail}", flush=True)


if __name__ == "__main__":
    main()
