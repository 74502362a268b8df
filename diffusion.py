"""The processes that add noise, the losses that teach a network to see it, and the samplers that
remove it again.

A process is `Diffusion` (DDPM: integer timesteps 0..T-1) or `EDM` (a continuous noise level sigma;
`EDMx0`, `VP` and `VE` are EDMs with other coefficients). An image at a level is x = a x0 + s eps.
Everything below needs only these methods of a process (and heun's churn that a level is a sigma):

    draw(B)               random levels (B,) for a training batch: timesteps, or sigmas
    loss(f, x0, level)    what training minimises, for each image
    levels(n)             n levels from noise to clean, for a sampler
    scales(level)         a and s
    prior(noise, level)   the x from which sampling starts
    predict(f, x, level)  the clean image and the noise that the network sees in x, and where the
                          variance of a random step lies (0: beta-tilde, 1: beta)
    noise_level(t)        sigma = s / a, from the number t that the network sees

f(x, t) is the network with its labels bound (`guided` below, or a lambda); t is what it sees of the
level: the timestep itself, or c_noise, in a loss (B,), in a sampler one number for all images.
Samplers step from each level of their list to the next one in it, and from the last one to the
clean image. Their coefficients are Python floats, computed in float64, so that no step of theirs
waits for the device or copies to it; those of losses are tensors in the dtype of the images.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from configs import UserError

Predictor = Callable[[Tensor, Tensor | int | float], Tensor]  # f(x, t)


# -------------------------------------------------------------------------------------------------
# DDPM (Ho et al. 2020) with learned variance (Nichol & Dhariwal 2021)


class Diffusion:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 0..T-1; the network predicts eps.

    schedule: "linear" (betas 1e-4..0.02 at T = 1000, scaled for other T) or "cosine" (iDDPM eq.
    17). variance: "learned" (the network's second C channels interpolate, in log, between
    beta-tilde and beta; iDDPM eq. 15), or fixed: "small" (beta-tilde) or "large" (beta). spacing:
    of the timesteps that a sampler visits, "even" or "quadratic". UserError for other names.
    """

    def __init__(
        self,
        T: int = 1000,
        schedule: str = "linear",
        variance: str = "learned",
        spacing: str = "even",
    ):
        if variance not in ("learned", "small", "large"):
            raise UserError(f"unknown variance {variance!r}; choose learned, small or large")
        if spacing not in ("even", "quadratic"):
            raise UserError(f"unknown spacing {spacing!r}; choose even or quadratic")
        self.T = T
        self.variance = variance
        self.spacing = spacing
        betas = betas_of(schedule, T)
        self.abar = np.cumprod(1 - betas)
        self.a = np.sqrt(self.abar)
        self.s = np.sqrt(1 - self.abar)
        previous = np.append(1.0, self.abar[:-1])                       # abar of the step before
        posterior = betas * (1 - previous) / (1 - self.abar)            # beta-tilde, DDPM eq. 7
        # beta-tilde is 0 at t = 0, which has no logarithm; the next one stands in, as in iDDPM.
        self.log_posterior = np.log(np.append(posterior[1], posterior[1:]))
        self.log_beta = np.log(betas)
        # The posterior mean is x0_coef x_0 + xt_coef x_t (DDPM eq. 7).
        self.x0_coef = betas * np.sqrt(previous) / (1 - self.abar)
        self.xt_coef = (1 - previous) * np.sqrt(1 - betas) / (1 - self.abar)
        self.copies = {}                                                # of these, for `at`

    # ---- training

    def draw(self, B, device="cpu"):
        """Timesteps (B,), uniform."""
        return torch.randint(self.T, (B,), device=device)

    def loss(self, f: Predictor, x0: Tensor, t: Tensor, noise: Tensor | None = None) -> dict:
        """x0 (B, C, H, W), t (B,) -> {"loss", "mse", "vlb"}, each (B,). loss = mse of eps + VLB of
        the learned variance, in bits per dimension; the VLB sends no gradient to the mean (iDDPM
        Sec. 3.1). Without learned variance there is no "vlb"."""
        noise = torch.randn_like(x0) if noise is None else noise
        a = self.at("a", t, x0)                                         # (B, 1, 1, 1)
        s = self.at("s", t, x0)
        xt = a * x0 + s * noise
        # In the precision of x0, whatever the network computes in.
        eps, variance_mix = self.split(f(xt, t).to(x0.dtype), x0.shape[1])
        mse = mean_flat((noise - eps) ** 2)
        if self.variance != "learned":
            return {"loss": mse, "mse": mse}
        vlb = self.vlb(x0, xt, t, eps.detach(), variance_mix)
        return {"loss": mse + vlb, "mse": mse, "vlb": vlb}

    def vlb(self, x0, xt, t, eps, variance_mix):
        """One term of the variational bound, in bits per dimension (B,): KL(q || p) for the step
        x_t -> x_t-1, or at t = 0 the negative log-likelihood of the image under the discretised
        Gaussian (DDPM eqs. 5, 13). q knows x_0, p is what the network predicts."""
        a = self.at("a", t, xt)
        s = self.at("s", t, xt)
        x0_coef = self.at("x0_coef", t, xt)
        xt_coef = self.at("xt_coef", t, xt)
        mean = x0_coef * ((xt - s * eps) / a) + xt_coef * xt            # of p
        true = x0_coef * x0 + xt_coef * xt                              # of q
        low = self.at("log_posterior", t, xt)                           # log variance of q
        high = self.at("log_beta", t, xt)
        logvar = low + variance_mix * (high - low)                      # of p, iDDPM eq. 15
        kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + (true - mean) ** 2 * (-logvar).exp())
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * logvar)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)

    # ---- sampling

    def levels(self, n: int) -> list[int]:
        """The n timesteps that a sampler visits, from noise to clean."""
        times = spaced(self.T, n)
        if self.spacing == "quadratic":
            # Denser towards the clean image, where sigma changes most from one timestep to the next
            # (DDIM, App. D.2); max keeps them apart.
            last = max(self.T - 1, 1)
            times = [max(i, round(t**2 / last)) for i, t in enumerate(times)]
        return times[::-1]

    def scales(self, level):
        """(a, s) of x = a x0 + s eps at this timestep; None is the clean image."""
        if level is None:
            return 1.0, 0.0
        return float(self.a[level]), float(self.s[level])

    def prior(self, noise, level):
        """Where sampling starts: unit noise (abar_T is almost 0)."""
        return noise

    def noise_level(self, t):
        """sigma = s / a at timestep t."""
        return float(self.s[t] / self.a[t])

    def predict(self, f, x, level, clip=False):
        """-> x0, eps, and where the variance of a step lies, in log, between beta-tilde (0) and
        beta (1). With clip, x0 is kept in [-1, 1], and eps is what then remains of x."""
        a, s = self.scales(level)
        eps, variance_mix = self.split(f(x, level).to(x.dtype), x.shape[1])
        x0 = (x - s * eps) / a
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - a * x0) / s
        return x0, eps, variance_mix

    # ---- helpers

    def split(self, out, C):
        """The network's output -> eps, and the variance's place between beta-tilde (0) and beta
        (1). UserError if the network and the variance do not belong together."""
        learned = self.variance == "learned"
        expected = 2 * C if learned else C
        if out.shape[1] != expected:
            raise UserError(
                f"variance {self.variance!r} needs {expected} output channels, and the network has "
                f"{out.shape[1]}; set learn_sigma to {learned}"
            )
        if learned:
            return out[:, :C], (out[:, C:] + 1) / 2                     # -1..1 -> 0..1
        return out, float(self.variance == "large")

    def at(self, name, t, x):
        """The table (T,) of this name at t (B,), shaped and typed to multiply x (B, ...). It is
        copied to the device once."""
        key = name, x.dtype, x.device
        if key not in self.copies:
            # In two steps, since not all devices have float64.
            self.copies[key] = torch.from_numpy(getattr(self, name)).to(x.dtype).to(x.device)
        return self.copies[key][t].view(-1, *[1] * (x.dim() - 1))


def betas_of(schedule, T):
    """(T,) float64: the variance that each timestep adds. UserError for an unknown schedule."""
    if schedule == "linear":
        return np.linspace(0.1 / T, 20 / T, T, dtype=np.float64).clip(max=0.999)
    if schedule == "cosine":
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)
    raise UserError(f"unknown schedule {schedule!r}; choose linear or cosine")


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log of the mass that N(mean, exp(log_scale)^2) gives to the cell, 2/255 wide, around each
    pixel of x (images of 8 bits in [-1, 1]; the outer cells reach to infinity)."""

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = torch.exp(-log_scale)
    upper = cdf(inverse * (x - mean + 1 / 255))
    lower = cdf(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def mean_flat(x):
    """Mean over all but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def spaced(T: int, n: int) -> list[int]:
    """n timesteps evenly over 0..T-1, both ends included, ascending (a single one is the noisiest).
    UserError unless 1 <= n <= T."""
    if not 1 <= n <= T:
        raise UserError(
            f"a process of {T} timesteps cannot be sampled in {n} steps; choose from 1 to {T}"
        )
    if n == 1:
        return [T - 1]
    # A running sum, as in the reference: its rounding decides which of two neighbours is taken.
    times = []
    now = 0.0
    for _ in range(n):
        times.append(round(now))
        now += (T - 1) / (n - 1)
    return times


# -------------------------------------------------------------------------------------------------
# EDM (Karras et al. 2022)


class EDM:
    """x = x0 + sigma eps, and the denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM
    eq. 7, Table 1), where F is the network. Training draws ln sigma ~ N(p_mean, p_std^2); a sampler
    visits sigma_max to sigma_min, spaced by rho."""

    def __init__(
        self,
        sigma_data: float = 0.5,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ):
        self.sigma_data = sigma_data
        self.p_mean = p_mean
        self.p_std = p_std
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def coefficients(self, sigma):
        """sigma, of any shape -> c_skip, c_out, c_in, c_noise."""
        # They give what enters F and what F should return unit variance at every sigma.
        sd = self.sigma_data
        norm = (sigma**2 + sd**2).sqrt()
        return sd**2 / norm**2, sigma * sd / norm, 1 / norm, sigma.log() / 4

    def noise_level(self, t):
        """sigma from c_noise, the t that the network sees."""
        return math.exp(4 * t)

    def weight(self, sigma):
        """Of the squared error of D, in the loss; in EDM itself 1 / c_out^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    # ---- training

    def draw(self, B, device="cpu"):
        """Noise levels sigma (B,), log-normal."""
        return (self.p_mean + self.p_std * torch.randn(B, device=device)).exp()

    def loss(self, f: Predictor, x0: Tensor, sigma: Tensor, noise: Tensor | None = None) -> dict:
        """x0 (B, C, H, W), sigma (B,) -> {"loss", "mse"}, each (B,): the squared error of D,
        weighted and unweighted."""
        noise = torch.randn_like(x0) if noise is None else noise
        sigma = sigma.to(x0.dtype)
        x = x0 + sigma.view(-1, 1, 1, 1) * noise
        mse = mean_flat((self.denoise(f, x, sigma) - x0) ** 2)
        return {"loss": self.weight(sigma) * mse, "mse": mse}

    def denoise(self, f, x, sigma):
        """D(x; sigma): x (B, C, H, W), sigma (B,) or a number -> (B, C, H, W)."""
        if isinstance(sigma, Tensor):
            c_skip, c_out, c_in, c_noise = self.coefficients(sigma.view(-1, 1, 1, 1))
            c_noise = c_noise.flatten()
        else:
            level = torch.tensor(sigma, dtype=torch.float64)
            c_skip, c_out, c_in, c_noise = [c.item() for c in self.coefficients(level)]
        return c_skip * x + c_out * f(c_in * x, c_noise).to(x.dtype)

    # ---- sampling

    def levels(self, n: int) -> list[float]:
        """n sigmas from sigma_max to sigma_min, evenly in sigma^(1/rho) (EDM eq. 5). UserError
        unless n >= 1."""
        if n < 1:
            raise UserError(f"sampling cannot take {n} steps; give a number from 1")
        high = self.sigma_max ** (1 / self.rho)
        low = self.sigma_min ** (1 / self.rho)
        # max: a single level is sigma_max.
        return [(high + i / max(n - 1, 1) * (low - high)) ** self.rho for i in range(n)]

    def scales(self, level):
        """(a, s) of x = a x0 + s eps at this sigma; None is the clean image."""
        return 1.0, level or 0.0

    def prior(self, noise, level):
        """Where sampling starts: noise at the first sigma, beside which the image is negligible."""
        return level * noise

    def predict(self, f, x, level, clip=False):
        """-> x0, eps, and 0: the variance of a random step is beta-tilde. With clip, x0 is kept in
        [-1, 1], and eps is what then remains of x."""
        x0 = self.denoise(f, x, level)
        x0 = x0.clamp(-1, 1) if clip else x0
        return x0, (x - x0) / level, 0.0


class EDMx0(EDM):
    """EDM with a network that predicts the clean image, D(x; sigma) = F(c_in x; c_noise), as in
    Salimans & Ho 2022; the loss is EDM's. EDM's own F is mostly noise at low sigma, which only a
    network with room for all of it can return (Li & He 2025, arXiv 2511.13720)."""

    def coefficients(self, sigma):
        _, _, c_in, c_noise = super().coefficients(sigma)
        return torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise


class VP(EDM):
    """Song et al. 2021's variance preserving SDE in these terms (EDM Table 1): the network predicts
    eps, t is uniform in [1e-5, 1], and sigma(t)^2 = exp(0.1 t + 19.9 t^2 / 2) - 1."""

    def coefficients(self, sigma):
        one = torch.ones_like(sigma)
        return one, -sigma, 1 / (sigma**2 + 1).sqrt(), 999 * self.time(sigma)

    def noise_level(self, t):
        return self.sigma(torch.tensor(t / 999, dtype=torch.float64)).item()

    def weight(self, sigma):
        return 1 / sigma**2

    def draw(self, B, device="cpu"):
        return self.sigma(1e-5 + (1 - 1e-5) * torch.rand(B, device=device))

    @staticmethod
    def sigma(t):
        return torch.expm1(0.1 * t + 9.95 * t**2).sqrt()

    @staticmethod
    def time(sigma):
        """The inverse of sigma(t): the root of a quadratic equation in t."""
        return ((0.01 + 39.8 * torch.log1p(sigma**2)).sqrt() - 0.1) / 19.9


class VE(EDM):
    """Song et al. 2021's variance exploding SDE (EDM Table 1). In training ln sigma is uniform over
    a range of its own, whatever the sampler's."""

    low = math.log(0.02)
    high = math.log(100)

    def coefficients(self, sigma):
        one = torch.ones_like(sigma)
        return one, sigma, one, (sigma / 2).log()

    def noise_level(self, t):
        return 2 * math.exp(t)

    def weight(self, sigma):
        return 1 / sigma**2

    def draw(self, B, device="cpu"):
        return (self.low + (self.high - self.low) * torch.rand(B, device=device)).exp()


# -------------------------------------------------------------------------------------------------
# Guidance: wraps a network, which knows nothing of it

SCALE_TOLERANCE = 0.01  # scales this near to 1 count as 1


def guided(
    model,
    y: Tensor | None,
    scale: float | Callable[[int | float], float] = 1.0,
    channels: int | None = None,
    exact: bool = False,
) -> Predictor:
    """Classifier-free guidance (Ho & Salimans 2022, whose w is s - 1): eps_null + s (eps_y -
    eps_null), both halves in one call. For EDM the same mix applies to F, since D is affine in F.
    model(x, t, y), y (B,) labels, (B, M, E) tokens or None -> f(x, t), t a number.

    scale: a number, or a function of t such as `power_cosine` or `interval`. Where it is no further
    from 1 than SCALE_TOLERANCE (with exact: where it is 1), the null half is not run. channels: the
    number of leading channels that are guided (3 in the published DiT and DiffiT); the others, and
    the variance, come from the conditional half. UserError if a scale other than 1 has no y.
    """
    if y is None and scale != 1.0:
        raise UserError("guidance needs a y (class labels, tokens), and got none; use a scale of 1")
    # In DiffiT-256 43 % of the steps have such a scale; without the null half they cost half.
    tolerance = 0 if exact else SCALE_TOLERANCE

    def f(x, t):
        s = scale_at(scale, t)
        times = torch.full((len(x),), t, device=x.device)
        if y is None or abs(s - 1) <= tolerance:
            return model(x, times, y)
        null = model.y_embedder.null(y.shape)
        # One call of twice the batch is faster than two calls.
        both = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, null]))
        cond, uncond = both.chunk(2)                                    # each (B, C or 2C, H, W)
        k = channels or x.shape[1]
        eps = uncond[:, :k] + s * (cond[:, :k] - uncond[:, :k])
        return torch.cat([eps, cond[:, k:]], dim=1)

    return f


def scale_at(scale, t):
    """The scale at t, of a number or of a function of t."""
    return scale(t) if callable(scale) else scale


def power_cosine(scale, T=1000, power=4.0):
    """The guidance of DiffiT-256: from 1 at t = T up to `scale` at t = 0, s(t) = 1 + (scale - 1)
    (1 - cos(pi (1 - t/T)^power)) / 2, t the original timestep."""
    return lambda t: 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - t / T) ** power)) / 2


def interval(scale, low, high, process):
    """Guidance only at noise levels low <= sigma <= high (Kynkaanniemi et al. 2024). scale: a
    number, or a function of t."""
    return lambda t: scale_at(scale, t) if low <= process.noise_level(t) <= high else 1.0


# -------------------------------------------------------------------------------------------------
# Samplers: x (B, C, H, W) at levels[0] -> clean (B, C, H, W). All of them take
#
#     process, f, levels   as above; levels descend in noise
#     clip                 keep each x0 in [-1, 1] (pixels, never latents)
#     watch                if given, watch(level, x) is called with x at each level, before the
#                          step; it may change x in place
#     noise                where a step is random: noise() gives the next fresh unit noise like x


def steps(process, levels):
    """(level, a, s, a_next, s_next) for each step; the last goes to the clean image, a_next = 1 and
    s_next = 0."""
    for level, target in zip(levels, [*levels[1:], None]):
        yield level, *process.scales(level), *process.scales(target)


@torch.no_grad()
def ddpm(
    process, f: Predictor, x: Tensor, levels: list, *, noise=None, clip=False, watch=None
) -> Tensor:
    """Ancestral sampling (DDPM alg. 2) along any levels, with the process's own variance."""
    noise = noise or (lambda: torch.randn_like(x))
    for level, a, s, a_next, s_next in steps(process, levels):
        if watch:
            watch(level, x)
        x0, _, variance_mix = process.predict(f, x, level, clip)
        beta = s**2 - (a / a_next * s_next) ** 2                        # variance of this step
        # The posterior mean, DDPM eq. 7.
        x = a_next * beta / s**2 * x0 + a / a_next * s_next**2 / s**2 * x
        if s_next > 0:  # to a clean image no noise is added
            low = math.log(beta * s_next**2 / s**2)                     # beta-tilde
            high = math.log(beta)
            logvar = low + variance_mix * (high - low)
            x = x + torch.exp(torch.as_tensor(0.5 * logvar, dtype=x.dtype)) * noise()
    return x


@torch.no_grad()
def ddim(
    process, f: Predictor, x: Tensor, levels: list, *, eta=0.0, noise=None, clip=False, watch=None
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): eta 0 is deterministic (for EDM: Euler's method), eta 1 has
    DDPM's small variance."""
    noise = noise or (lambda: torch.randn_like(x))
    for level, a, s, a_next, s_next in steps(process, levels):
        if watch:
            watch(level, x)
        x0, eps, _ = process.predict(f, x, level, clip)
        beta = s**2 - (a / a_next * s_next) ** 2                        # variance of this step
        var = eta**2 * beta * s_next**2 / s**2                          # eq. 16, squared
        x = a_next * x0 + math.sqrt(s_next**2 - var) * eps              # the rest is fresh noise
        if var > 0:
            x = x + math.sqrt(var) * noise()
    return x


@torch.no_grad()
def heun(
    process,
    f: Predictor,
    x: Tensor,
    levels: list,
    *,
    noise=None,
    clip=False,
    watch=None,
    churn: float = 0.0,
    churn_interval: tuple = (),
    churn_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order method (EDM alg. 1) on d(x/a) / d(s/a) = eps: two network calls a step,
    one in the last. churn (EDM alg. 2, S_churn; only for EDM): before each step at a level inside
    churn_interval (S_tmin, S_tmax) add noise, scaled by churn_noise (S_noise), and start the step
    at the level that x then has."""
    noise = noise or (lambda: torch.randn_like(x))
    gamma = min(churn / len(levels), math.sqrt(2) - 1)
    low, high = churn_interval or (0, math.inf)
    targets = [*levels[1:], None]
    for target, (level, a, s, a_next, s_next) in zip(targets, steps(process, levels)):
        if watch:
            watch(level, x)
        if gamma and low <= level <= high:
            # From s to a higher level: the noise added makes up the difference of the variances.
            level = s = level * (1 + gamma)
            x = x + churn_noise * math.sqrt(s**2 - (s / (1 + gamma)) ** 2) * noise()
        eps = process.predict(f, x, level, clip)[1]
        step = s_next / a_next - s / a                                  # in s/a
        end = a_next * (x / a + step * eps)                             # Euler's
        if target is not None:
            eps2 = process.predict(f, end, target, clip)[1]             # the slope at that end
            end = a_next * (x / a + step * (eps + eps2) / 2)
        x = end
    return x


@torch.no_grad()
def dpmpp(process, f: Predictor, x: Tensor, levels: list, *, clip=False, watch=None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): second order by remembering the last x0, one call
    a step; first order in the first step and in the last, which goes to s = 0. A step that is
    longer than the last one extrapolates no further than if they were equal. Theirs does, and
    overshoots where timesteps are even: the one to t = 0 is six times as long in log-SNR, and the
    error of 10 to 40 steps four to eight times as large."""
    last, last_h = None, None
    for level, a, s, a_next, s_next in steps(process, levels):
        if watch:
            watch(level, x)
        x0 = process.predict(f, x, level, clip)[0]
        if s_next == 0:
            return a_next * x0
        h = math.log(a_next / s_next) - math.log(a / s)                 # in log signal-to-noise
        # x0 half a step ahead, extrapolated from this one and the last, but no further than half of
        # the last step.
        D = x0 if last is None else x0 + min(h / last_h, 1) / 2 * (x0 - last)
        x = s_next / s * x - a_next * math.expm1(-h) * D
        last, last_h = x0, h


# -------------------------------------------------------------------------------------------------
# Timesteps by importance


class LossAwareTimesteps:
    """Timesteps drawn where the loss is large (iDDPM Sec. 3.3, "loss second moment"): p ~ sqrt(mean
    loss^2) over the last `history` losses of each timestep, mixed with `uniform_prob` of uniform.
    Uniform until every timestep has `history` losses. The weight 1 / (T p) keeps the expected loss
    what it is with uniform timesteps."""

    def __init__(self, T: int, uniform_prob: float = 0.1, history: int = 10):
        self.T = T
        self.uniform_prob = uniform_prob
        self.losses = torch.zeros(T, history, dtype=torch.float64)      # a ring for each timestep
        self.counts = torch.zeros(T, dtype=torch.int64)                 # ever seen of each

    def probabilities(self) -> Tensor:
        """(T,) float64, sums to 1."""
        if (self.counts < self.losses.shape[1]).any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        p = (self.losses**2).mean(1).sqrt()
        return (1 - self.uniform_prob) * p / p.sum() + self.uniform_prob / self.T

    def sample(self, B: int) -> tuple[Tensor, Tensor]:
        """-> timesteps (B,) and importance weights (B,), on the CPU, as the tables are."""
        p = self.probabilities()
        t = torch.multinomial(p, B, replacement=True)
        return t, (1 / (self.T * p[t])).float()

    def update(self, t: Tensor, losses: Tensor):
        """Remember the unweighted losses (B,) of timesteps t (B,). Every rank must pass the losses
        of all ranks, so that they agree on p."""
        # The same memory as numpy arrays, in which single elements are set faster.
        ring = self.losses.numpy()
        counts = self.counts.numpy()
        for i, loss in zip(t.tolist(), losses.tolist()):
            ring[i, counts[i] % ring.shape[1]] = loss                   # in place of the oldest
            counts[i] += 1

    def state_dict(self):
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state):
        for name, own in self.state_dict().items():
            if state[name].shape != own.shape or not (state[name] >= 0).all():  # NaN is not, either
                raise UserError(f"the timesteps' {name} are damaged")
            own.copy_(state[name])


def build(cfg) -> Diffusion | EDM:
    """The process that a configs.Config describes (no other part of this file knows Config)."""
    if cfg.process == "ddpm":
        variance = "learned" if cfg.learn_sigma else cfg.fixed_variance
        spacing = cfg.spacing
        if spacing == "auto":
            spacing = "quadratic" if cfg.sampler == "dpmpp" else "even"
        return Diffusion(cfg.diffusion_steps, cfg.schedule, variance, spacing)
    process = {"edm": EDM, "edm-x0": EDMx0, "vp": VP, "ve": VE}[cfg.process]
    return process(cfg.sigma_data, cfg.p_mean, cfg.p_std, cfg.sigma_min, cfg.sigma_max, cfg.rho)
