"""The processes that add noise, what is learned of them, and the samplers that take noise away again.

A process is `Diffusion` (DDPM: integer timesteps 0..T-1) or `EDM` (a continuous noise level sigma; `VP` and `VE` are
EDMs with other coefficients).
At each level an image is x = a x0 + s eps, and everything below needs only these things of a process:

    draw(B)              random levels for a training batch
    quarter(t)           in which quarter of those each lies, to watch the loss by noise
    loss(f, x0, t)       what training minimises, for each image
    levels(n)            n levels from noise to clean, for a sampler
    predict(f, x, level) the clean image and the noise that the network sees in x

f(x, t) is the network with its labels bound (`guided` below, or a lambda). Samplers step from each level
of their list to the next one in it, and from the last one to the clean image: no strides, no special ends.
Coefficients are float64 numbers on the CPU and meet the images as Python floats.
"""
import math

import numpy as np
import torch

LOG2 = math.log(2.0)


# ---------------------------------------------------------------------------------------------
# DDPM (Ho et al. 2020) with learned variance (Nichol & Dhariwal 2021)

class Diffusion:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 0..T-1; the network predicts eps.

    schedule: "linear" (betas 1e-4..0.02 at T = 1000, scaled for other T) or "cosine" (iDDPM eq. 17).
    variance: "learned" (the network's second C channels interpolate, in log, between beta-tilde and
    beta; iDDPM eq. 15), or fixed: "small" (beta-tilde) or "large" (beta)."""

    def __init__(self, T=1000, schedule="linear", variance="learned"):
        self.T, self.variance = T, variance
        if schedule == "linear":
            betas = np.linspace(0.1 / T, 20 / T, T, dtype=np.float64).clip(max=0.999)
        elif schedule == "cosine":
            f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        else:
            raise ValueError(f"unknown schedule {schedule!r}; there are linear and cosine")
        if variance not in ("learned", "small", "large"):
            raise ValueError(f"unknown variance {variance!r}; there are learned, small and large")
        self.abar = np.cumprod(1 - betas)
        previous = np.append(1.0, self.abar[:-1])
        self.log_beta = np.log(betas)
        posterior = betas * (1 - previous) / (1 - self.abar)               # beta-tilde, DDPM eq. 7
        self.log_posterior = np.log(np.append(posterior[1], posterior[1:]))  # 0 at t = 0: the next stands in
        self.x0_coef = betas * np.sqrt(previous) / (1 - self.abar)         # posterior mean: x0_coef x_0 + xt_coef x_t
        self.xt_coef = (1 - previous) * np.sqrt(1 - betas) / (1 - self.abar)

    # ---- training

    def draw(self, B, device="cpu"):
        """Timesteps (B,), uniform."""
        return torch.randint(self.T, (B,), device=device)

    def quarter(self, t):
        """t (B,) -> 0 (the least noise) to 3 (the most), equally many of each in training."""
        return t * 4 // self.T

    def loss(self, f, x0, t, noise=None):
        """x0 (B, C, H, W), t (B,) -> {"loss", "mse", "vlb"}, each (B,). loss = mse of eps + VLB, in bits per
        dimension, of the learned variance; the VLB sends no gradient to the mean (iDDPM Sec. 3.1)."""
        noise = torch.randn_like(x0) if noise is None else noise
        xt = self.at(np.sqrt(self.abar), t, x0) * x0 + self.at(np.sqrt(1 - self.abar), t, x0) * noise
        eps, share = self.split(f(xt, t).to(x0.dtype), x0.shape[1])
        mse = mean_flat((noise - eps) ** 2)
        if self.variance != "learned":
            return {"loss": mse, "mse": mse}
        vlb = self.vlb(x0, xt, t, eps.detach(), share)
        return {"loss": mse + vlb, "mse": mse, "vlb": vlb}

    def vlb(self, x0, xt, t, eps, share):
        """One term of the variational bound, bits per dimension (B,): KL(q(x_t-1 | x_t, x_0) || p), or at
        t = 0 the negative log-likelihood of the image under the discretised Gaussian (DDPM eq. 13)."""
        pred = (xt - self.at(np.sqrt(1 - self.abar), t, xt) * eps) / self.at(np.sqrt(self.abar), t, xt)
        mean = self.at(self.x0_coef, t, xt) * pred + self.at(self.xt_coef, t, xt) * xt
        true = self.at(self.x0_coef, t, xt) * x0 + self.at(self.xt_coef, t, xt) * xt
        low, high = self.at(self.log_posterior, t, xt), self.at(self.log_beta, t, xt)
        logvar = low + share * (high - low)
        kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + (true - mean) ** 2 * (-logvar).exp())
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * logvar)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / LOG2

    # ---- sampling

    def levels(self, n):
        """The n timesteps that a sampler visits, from noise to clean."""
        return spaced(self.T, n)[::-1]

    def scales(self, level):
        """(a, s) of x = a x0 + s eps at this timestep; None is the clean image."""
        return (1.0, 0.0) if level is None else (math.sqrt(self.abar[level]), math.sqrt(1 - self.abar[level]))

    def prior(self, noise, level):
        """Where sampling starts: unit noise (abar_T is almost 0)."""
        return noise

    def noise_level(self, t):
        """sigma = s / a (B,) at timesteps t (B,)."""
        return self.at(np.sqrt(1 / self.abar - 1), t, torch.empty(len(t), device=t.device))

    def predict(self, f, x, level, clip=False):
        """-> x0, eps, and where the variance of a step lies, in log, between beta-tilde (0) and beta (1).
        With clip, x0 is kept in [-1, 1] and eps is what then remains."""
        a, s = self.scales(level)
        t = torch.full((len(x),), level, device=x.device)
        eps, share = self.split(f(x, t).to(x.dtype), x.shape[1])
        x0 = (x - s * eps) / a
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - a * x0) / s
        return x0, eps, share

    # ---- helpers

    def split(self, out, C):
        """The network's output -> eps, and the variance's place between beta-tilde (0) and beta (1)."""
        learned = self.variance == "learned"
        if out.shape[1] != (2 * C if learned else C):
            raise ValueError(f"variance {self.variance!r} needs {2 * C if learned else C} output channels, the "
                             f"network has {out.shape[1]}; set learn_sigma to {learned}")
        return out[:, :C], (out[:, C:] + 1) / 2 if learned else float(self.variance == "large")

    @staticmethod
    def at(table, t, x):
        """table (T,) at t (B,), shaped and typed to multiply x (B, ...)."""
        return torch.as_tensor(table, dtype=x.dtype).to(x.device)[t].view(-1, *[1] * (x.dim() - 1))


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log of the mass that N(mean, exp(log_scale)^2) gives to the 1/255-wide cell around each pixel of x
    (images of 8 bits in [-1, 1]; the outer cells reach to infinity)."""
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    inv = torch.exp(-log_scale)
    upper, lower = cdf(inv * (x - mean + 1 / 255)), cdf(inv * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def mean_flat(x):
    """Mean over all but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def spaced(T, n):
    """n timesteps evenly over 0..T-1, both ends included, ascending (a single one is the noisiest). ValueError
    unless 1 <= n <= T."""
    if not 1 <= n <= T:
        raise ValueError(f"{n} steps asked of a process with {T} timesteps; give a number from 1 to {T}")
    if n == 1:
        return [T - 1]
    # A running sum, as in the reference: its rounding decides which of two neighbours is taken.
    times, at = [], 0.0
    for _ in range(n):
        times.append(round(at))
        at += (T - 1) / (n - 1)
    return times


# ---------------------------------------------------------------------------------------------
# EDM (Karras et al. 2022)

class EDM:
    """x = x0 + sigma eps; the denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM eq. 7, Table 1)
    trained at ln sigma ~ N(p_mean, p_std^2)."""

    def __init__(self, sigma_data=0.5, p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0, rho=7.0):
        self.sigma_data, self.p_mean, self.p_std = sigma_data, p_mean, p_std
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def coefficients(self, sigma):
        """sigma, of any shape -> c_skip, c_out, c_in, c_noise."""
        norm, sd = (sigma ** 2 + self.sigma_data ** 2).sqrt(), self.sigma_data
        return sd ** 2 / norm ** 2, sigma * sd / norm, 1 / norm, sigma.log() / 4

    def noise_level(self, t):
        """sigma (B,) from what the network is told, c_noise."""
        return (4 * t).exp()

    def weight(self, sigma):
        """Of the squared error of D, in the loss."""
        return (sigma ** 2 + self.sigma_data ** 2) / (sigma * self.sigma_data) ** 2

    def draw(self, B, device="cpu"):
        """Noise levels sigma (B,), log-normal."""
        return (self.p_mean + self.p_std * torch.randn(B, device=device)).exp()

    def quarter(self, sigma):
        """sigma (B,) -> 0 (the least noise) to 3 (the most), equally many of each in training."""
        share = torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std)
        return (share * 4).long().clamp(max=3)

    def loss(self, f, x0, sigma, noise=None):
        """x0 (B, C, H, W), sigma (B,) -> {"loss", "mse"}, each (B,): the squared error of D, weighted and
        unweighted."""
        noise = torch.randn_like(x0) if noise is None else noise
        sigma = sigma.to(x0.dtype)
        mse = mean_flat((self.denoise(f, x0 + sigma.view(-1, 1, 1, 1) * noise, sigma) - x0) ** 2)
        return {"loss": self.weight(sigma) * mse, "mse": mse}

    def denoise(self, f, x, sigma):
        """D(x; sigma): x (B, C, H, W), sigma (B,) -> (B, C, H, W)."""
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma.view(-1, 1, 1, 1))
        return c_skip * x + c_out * f(c_in * x, c_noise.flatten()).to(x.dtype)

    def levels(self, n):
        """n sigmas from sigma_max to sigma_min, evenly in sigma^(1/rho) (EDM eq. 5)."""
        if n < 1:
            raise ValueError(f"{n} steps asked; give a number from 1")
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return [(high + i / max(n - 1, 1) * (low - high)) ** self.rho for i in range(n)]

    def scales(self, level):
        """(a, s) of x = a x0 + s eps at this sigma; None is the clean image."""
        return 1.0, level or 0.0

    def prior(self, noise, level):
        """Where sampling starts: noise at the first sigma (the image in it drowns)."""
        return level * noise

    def predict(self, f, x, level, clip=False):
        """-> x0, eps, 0: the variance of a random step is beta-tilde. With clip, x0 is kept in [-1, 1]."""
        x0 = self.denoise(f, x, torch.full((len(x),), level, dtype=x.dtype, device=x.device))
        x0 = x0.clamp(-1, 1) if clip else x0
        return x0, (x - x0) / level, 0.0


class VP(EDM):
    """Song et al. 2021's variance preserving SDE in these terms (EDM Table 1): the network predicts eps, t is uniform
    in [1e-5, 1], and sigma(t)^2 = exp(0.1 t + 19.9 t^2 / 2) - 1."""

    def coefficients(self, sigma):
        return torch.ones_like(sigma), -sigma, 1 / (sigma ** 2 + 1).sqrt(), 999 * self.time(sigma)

    def noise_level(self, t):
        return self.sigma(t / 999)

    def weight(self, sigma):
        return 1 / sigma ** 2

    def draw(self, B, device="cpu"):
        return self.sigma(1e-5 + (1 - 1e-5) * torch.rand(B, device=device))

    def quarter(self, sigma):
        return (self.time(sigma) * 4).long().clamp(0, 3)

    @staticmethod
    def sigma(t):
        return torch.expm1(0.1 * t + 9.95 * t ** 2).sqrt()

    @staticmethod
    def time(sigma):
        return ((0.01 + 39.8 * torch.log1p(sigma ** 2)).sqrt() - 0.1) / 19.9


class VE(EDM):
    """Song et al. 2021's variance exploding SDE: in training ln sigma is uniform over a range of its own."""
    low, high = math.log(0.02), math.log(100)

    def coefficients(self, sigma):
        return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log()

    def noise_level(self, t):
        return 2 * t.exp()

    def weight(self, sigma):
        return 1 / sigma ** 2

    def draw(self, B, device="cpu"):
        return (self.low + (self.high - self.low) * torch.rand(B, device=device)).exp()

    def quarter(self, sigma):
        return ((sigma.log() - self.low) / (self.high - self.low) * 4).long().clamp(0, 3)


# ---------------------------------------------------------------------------------------------
# Guidance: wraps a network, which knows nothing of it

NO_GUIDANCE = 0.01                    # scales this near to 1 count as 1


def guided(model, y, scale=1.0, channels=None, exact=False):
    """Classifier-free guidance (Ho & Salimans 2022): eps_null + s (eps_y - eps_null), both halves in one call.

    model(x, t, y), y (B,) labels or None -> f(x, t). scale: a number, or a function of t (B,) such as
    `power_cosine` or `interval`; where it is nearer to 1 than NO_GUIDANCE (with exact: where it is 1) for the whole
    batch, the null half is not run. channels: guide only the first so many (3 in the published DiT and DiffiT); the
    others, and the variance, come from the conditional half. ValueError if labels are missing for a scale other
    than 1."""
    if y is None and scale != 1.0:
        raise ValueError(f"guidance of {scale} needs class labels, and this network has none; use a scale of 1")

    def f(x, t):
        s = scale_at(scale, t).to(x)
        if y is None or bool(((s - 1).abs() <= (0 if exact else NO_GUIDANCE)).all()):
            return model(x, t, y)
        null = torch.full_like(y, model.num_classes)
        cond, uncond = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])).chunk(2)
        k = channels or x.shape[1]
        eps = uncond[:, :k] + s.view(-1, 1, 1, 1) * (cond[:, :k] - uncond[:, :k])
        return torch.cat([eps, cond[:, k:]], dim=1)
    return f


def scale_at(scale, t):
    """A number, or a function of t (B,), as a tensor."""
    return torch.as_tensor(scale(t) if callable(scale) else scale, device=t.device)


def power_cosine(scale, T=1000, power=4.0):
    """The guidance of DiffiT-256: from 1 at t = T up to `scale` at t = 0, s(t) = 1 + (scale - 1)
    (1 - cos(pi (1 - t/T)^power)) / 2, t the original timestep."""
    return lambda t: 1 + (scale - 1) * (1 - torch.cos(math.pi * (1 - t.double() / T) ** power)) / 2


def interval(scale, low, high, process):
    """Guidance only at noise levels low <= sigma <= high (Kynkaanniemi et al. 2024). scale: a number or a function
    of t."""
    def inside(t):
        sigma = process.noise_level(t)
        return torch.where((low <= sigma) & (sigma <= high), scale_at(scale, t), 1.0)
    return inside


# ---------------------------------------------------------------------------------------------
# Samplers: sampler(process, f, x, levels, ...): x (B, C, H, W) at levels[0] -> clean (B, C, H, W).
# noise() gives the next fresh unit noise like x. clip keeps each x0 in [-1, 1] (pixels, never latents).

def steps(process, levels):
    """(level, a, s, a', s') for each step; the last one goes to the clean image, a' = 1 and s' = 0."""
    for level, target in zip(levels, [*levels[1:], None]):
        yield level, *process.scales(level), *process.scales(target)


@torch.no_grad()
def ddpm(process, f, x, levels, noise=None, clip=False):
    """Ancestral sampling (DDPM alg. 2) along any list of levels, with the process's own variance."""
    noise = noise or (lambda: torch.randn_like(x))
    for level, a, s, a2, s2 in steps(process, levels):
        x0, _, share = process.predict(f, x, level, clip)
        beta = s ** 2 - (a / a2 * s2) ** 2                                 # variance of this step, forward
        x = a2 * beta / s ** 2 * x0 + a / a2 * s2 ** 2 / s ** 2 * x        # posterior mean, DDPM eq. 7
        if s2 > 0:
            low, high = math.log(beta * s2 ** 2 / s ** 2), math.log(beta)  # of beta-tilde and of beta
            x = x + torch.exp(torch.as_tensor(0.5 * (low + share * (high - low)), dtype=x.dtype)) * noise()
    return x


@torch.no_grad()
def ddim(process, f, x, levels, eta=0.0, noise=None, clip=False):
    """DDIM (Song et al. 2021, eq. 12): eta 0 is deterministic (for EDM: Euler's method), 1 has DDPM's small
    variance."""
    noise = noise or (lambda: torch.randn_like(x))
    for level, a, s, a2, s2 in steps(process, levels):
        x0, eps, _ = process.predict(f, x, level, clip)
        beta = s ** 2 - (a / a2 * s2) ** 2
        var = eta ** 2 * beta * s2 ** 2 / s ** 2                           # eq. 16
        x = a2 * x0 + math.sqrt(s2 ** 2 - var) * eps
        if var > 0:
            x = x + math.sqrt(var) * noise()
    return x


@torch.no_grad()
def heun(process, f, x, levels, clip=False, churn=0.0, interval=(), churn_noise=1.0, noise=None):
    """Heun's second-order method (EDM alg. 1) on d(x/a) / d(s/a) = eps: two network calls a step, one in the last.
    churn (EDM alg. 2, S_churn; for EDM alone): before each step at a level inside the interval (S_tmin, S_tmax) add
    noise, scaled by churn_noise (S_noise), and begin the step at the level it brings x to."""
    noise = noise or (lambda: torch.randn_like(x))
    gamma = min(churn / len(levels), math.sqrt(2) - 1)
    low, high = interval or (0, math.inf)
    targets = [*levels[1:], None]
    for target, (level, a, s, a2, s2) in zip(targets, steps(process, levels)):
        if gamma and low <= level <= high:
            level = s = level * (1 + gamma)
            x = x + churn_noise * math.sqrt(s ** 2 - (s / (1 + gamma)) ** 2) * noise()
        eps = process.predict(f, x, level, clip)[1]
        step = s2 / a2 - s / a
        euler = a2 * (x / a + step * eps)
        if target is not None:
            eps2 = process.predict(f, euler, target, clip)[1]
            euler = a2 * (x / a + step * (eps + eps2) / 2)
        x = euler
    return x


@torch.no_grad()
def dpmpp(process, f, x, levels, clip=False):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): second order from the memory of the last x0, one call a step;
    first order in the first step and in the last, which goes to s = 0."""
    last, last_h = None, None
    for level, a, s, a2, s2 in steps(process, levels):
        x0 = process.predict(f, x, level, clip)[0]
        if s2 == 0:
            return a2 * x0
        h = math.log(a2 / s2) - math.log(a / s)                            # step in log signal-to-noise
        D = x0 if last is None else x0 + h / last_h / 2 * (x0 - last)
        x = s2 / s * x - a2 * math.expm1(-h) * D
        last, last_h = x0, h


# ---------------------------------------------------------------------------------------------
# Timesteps by importance

class LossAwareTimesteps:
    """Timesteps drawn where the loss is large (iDDPM Sec. 3.3, "loss second moment"): p ~ sqrt(mean loss^2)
    over the last `history` losses of each timestep, mixed with `uniform_prob` of uniform. Uniform until every
    timestep has `history` losses. The weight 1 / (T p) keeps the loss's mean what it was."""

    def __init__(self, T, uniform_prob=0.1, history=10):
        self.T, self.uniform_prob = T, uniform_prob
        self.losses = torch.zeros(T, history, dtype=torch.float64)        # a ring for each timestep
        self.counts = torch.zeros(T, dtype=torch.int64)

    def probabilities(self):
        """(T,) float64, sums to 1."""
        if (self.counts < self.losses.shape[1]).any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        p = (self.losses ** 2).mean(1).sqrt()
        return (1 - self.uniform_prob) * p / p.sum() + self.uniform_prob / self.T

    def sample(self, B, device="cpu"):
        """-> timesteps (B,) and importance weights (B,) on device."""
        p = self.probabilities()
        t = torch.multinomial(p, B, replacement=True)
        return t.to(device), (1 / (self.T * p[t])).float().to(device)

    def update(self, t, losses):
        """Remember the unweighted losses (B,) of timesteps t (B,); all processes must be given all of them."""
        ring, counts = self.losses.numpy(), self.counts.numpy()            # the same memory, quicker one by one
        for i, loss in zip(t.tolist(), losses.tolist()):
            ring[i, counts[i] % ring.shape[1]] = loss
            counts[i] += 1

    def state_dict(self):
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state):
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


def build(cfg):
    """The process that a Config describes (the only place in this file that knows of Config)."""
    if cfg.process != "ddpm":
        process = {"edm": EDM, "vp": VP, "ve": VE}[cfg.process]
        return process(cfg.sigma_data, cfg.p_mean, cfg.p_std, cfg.sigma_min, cfg.sigma_max, cfg.rho)
    return Diffusion(cfg.diffusion_steps, cfg.schedule, "learned" if cfg.learn_sigma else cfg.fixed_variance)


# ---------------------------------------------------------------------------------------------
# python diffusion.py: how near each sampler comes to the truth, where the truth is known

class Mixture:
    """A mixture of Gaussians on the line, and the network that knows it: f(x, t), for either process, sees the clean
    image in the noise as no better network could. weights, means, stds: a number for each component."""

    def __init__(self, weights=(0.3, 0.5, 0.2), means=(-0.7, 0.1, 0.8), stds=(0.2, 0.15, 0.25)):
        self.weights, self.means, self.stds = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))

    def components(self, a, s):
        """Means and standard deviations (..., K) of a x0 + s eps, for numbers or tensors a and s."""
        a, s = (torch.as_tensor(v, dtype=torch.float64)[..., None] for v in (a, s))
        return a * self.means, (a ** 2 * self.stds ** 2 + s ** 2).sqrt()

    def denoise(self, x, a, s):
        """E[x0 | a x0 + s eps = x], in x's shape; a and s are numbers, or shaped like x."""
        means, stds = self.components(a, s)
        z = (x[..., None] - means) / stds
        posterior = (self.weights.log() - stds.log() - z ** 2 / 2).softmax(-1)
        gain = torch.as_tensor(a, dtype=torch.float64)[..., None] * self.stds ** 2 / stds
        return (posterior * (self.means + gain * z)).sum(-1)

    def network(self, process):
        """-> f(x, t), which predicts eps for Diffusion, and F of EDM eq. 7 for EDM."""
        def eps(x, t):
            abar = torch.as_tensor(process.abar, dtype=torch.float64)[t].view(-1, 1, 1, 1)
            a, s = abar.sqrt(), (1 - abar).sqrt()
            return (x - a * self.denoise(x, a, s)) / s

        def F(x, t):
            sigma = process.noise_level(t).view(-1, 1, 1, 1)
            c_skip, c_out, c_in, _ = process.coefficients(sigma)
            return (self.denoise(x / c_in, torch.ones_like(sigma), sigma) - c_skip * x / c_in) / c_out
        return F if isinstance(process, EDM) else eps

    def cdf(self, x):
        """The share of the data below x."""
        return (self.weights * torch.special.ndtr((x[..., None] - self.means) / self.stds)).sum(-1)

    def quantile(self, u):
        """The point below which lies the share u of the data, by bisection."""
        low, high = torch.full_like(u, -10.0), torch.full_like(u, 10.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def distance(process, sampler, n, points=2000):
    """The 2-Wasserstein distance between the mixture and what a sampler makes of it in n steps. On the line it is the
    root mean square of the differences, in order."""
    mixture, levels = Mixture(), process.levels(n)
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    start = torch.special.ndtri(u).view(1, 1, 1, -1)
    made = sampler(process, mixture.network(process), process.prior(start, levels[0]), levels)
    return (made.flatten().sort().values - mixture.quantile(u)).square().mean().sqrt().item()


def main():
    torch.manual_seed(0)
    counts = (5, 10, 20, 40, 80, 160)
    print("2-Wasserstein distance to a mixture of three Gaussians, exact network, by calls of the network"
          f"\n{'':16}" + "".join(f"{count:9}" for count in counts))
    for name, process in [("DDPM", Diffusion(variance="small")), ("EDM", EDM())]:
        for sampler in (ddpm, ddim, heun, dpmpp):
            steps = [(count + 1) // 2 if sampler is heun else count for count in counts]
            print(f"{name:6}{sampler.__name__:10}" + "".join(f"{distance(process, sampler, n):9.4f}" for n in steps))


if __name__ == "__main__":
    main()
