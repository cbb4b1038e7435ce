"""The densities of `targets.py` once more, for JAX, and the map from R^D to the prior's support.

Each takes the target's constants and one theta (D,) and gives log p(theta), so that the samplers of that
world can run on the same targets. The worker compares them with the torch densities at exact draws before it
samples, to within rounding.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm

__all__ = ["check", "log_density", "to_support"]

Constants = Mapping[str, np.ndarray]
Map = Callable[[Array], tuple[Array, Array]]
LOG_2_PI = float(np.log(2 * np.pi))
SCHOOLS_Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_SD = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def _mixture(c: Constants, theta: Array) -> Array:
    z = jnp.einsum("mij,mj->mi", c["inverses"], theta - c["means"])
    log_det = np.log(np.diagonal(c["inverses"], axis1=1, axis2=2)).sum(-1)
    each = -0.5 * (z**2).sum(-1) + log_det - 0.5 * theta.size * LOG_2_PI
    return logsumexp(each + np.log(c["weights"]))


def _two_moons(c: Constants, theta: Array) -> Array:
    first = jnp.abs(theta.sum()) / np.sqrt(2) - 0.25
    second = (theta[0] - theta[1]) / np.sqrt(2)
    radius = jnp.sqrt(first**2 + second**2 + 1e-24)
    signed = jnp.where(first < 0, -radius, radius)
    return norm.logpdf(signed, 0.1, 0.01) - jnp.log(np.pi * radius) - np.log(4)


def _slcp(c: Constants, theta: Array) -> Array:
    s_1, s_2, rho = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4])
    z_1, z_2 = (c["points"][:, 0] - theta[0]) / s_1, (c["points"][:, 1] - theta[1]) / s_2
    log_rest = -2 * jnp.log(jnp.cosh(theta[4]))
    square = z_1**2 + (z_2 - rho * z_1) ** 2 * jnp.exp(-log_rest)
    one = -0.5 * square - LOG_2_PI - jnp.log(s_1) - jnp.log(s_2) - 0.5 * log_rest
    return one.sum() - 5 * np.log(6)


def _banana(c: Constants, theta: Array) -> Array:
    a, b, rest = theta[0], theta[1], theta[2:]
    ridge = norm.logpdf(a, 0, 3) + norm.logpdf(b, -0.1 * (a**2 - 9), 0.3)
    return ridge + norm.logpdf(rest).sum()


def _funnel(c: Constants, theta: Array) -> Array:
    return norm.logpdf(theta[0], 0, 3) + norm.logpdf(theta[1:], 0, jnp.exp(theta[0] / 2)).sum()


def _student(theta: Array, centre: float, df: float) -> Array:
    dim = theta.size
    gammas = jax.scipy.special.gammaln(jnp.array([(df + dim) / 2, df / 2]))
    constant = gammas[0] - gammas[1] - 0.5 * dim * np.log(df * np.pi)
    return constant - 0.5 * (df + dim) * jnp.log1p(((theta - centre) ** 2).sum() / df)


def _student_pair(c: Constants, theta: Array) -> Array:
    return jnp.logaddexp(np.log(0.7) + _student(theta, 3.0, 3.0), np.log(0.3) + _student(theta, -3.0, 3.0))


def _shell(c: Constants, theta: Array) -> Array:
    return norm.logpdf(jnp.sqrt((theta**2).sum() + 1e-12), 2.0, 0.1)


def _rough(c: Constants, theta: Array) -> Array:
    return _mixture(c, theta) + 0.5 * jnp.cos(40.0 * theta).sum()


def _steps(c: Constants, theta: Array) -> Array:
    cell = jnp.clip(jnp.floor((theta + 3) / 0.5), 0, 11)
    return _mixture(c, (cell + 0.5) * 0.5 - 3) - 3 * np.log(6)


def _wide_lognormal(c: Constants, theta: Array) -> Array:
    log_theta = jnp.log(theta)
    return _mixture(c, log_theta - np.log(10.0) * np.arange(-2, 3)) - log_theta.sum()


def _schools(theta: Array, centred: bool) -> Array:
    mu, log_tau, rest = theta[0], theta[1], theta[2:]
    tau = jnp.exp(log_tau)
    half_cauchy = jnp.log(2 / (5 * np.pi)) - jnp.log1p((tau / 5) ** 2) + log_tau
    prior = norm.logpdf(mu, 0, 5) + half_cauchy
    if centred:
        effects, own = rest, norm.logpdf(rest, mu, tau)
    else:
        effects, own = mu + tau * rest, norm.logpdf(rest)
    return prior + own.sum() + norm.logpdf(SCHOOLS_Y, effects, SCHOOLS_SD).sum()


_DENSITIES: dict[str, Callable[[Constants, Array], Array]] = {
    "two_moons": _two_moons,
    "slcp": _slcp,
    "student_pair_d5": _student_pair,
    "student_d10": lambda c, theta: _student(theta, 1.0, 2.0),
    "rough_d4": _rough,
    "steps_d3": _steps,
    "wide_lognormal_d5": _wide_lognormal,
    "schools_centred": lambda c, theta: _schools(theta, True),
    "schools_noncentred": lambda c, theta: _schools(theta, False),
    "banana_d10": _banana,
    "banana_d50": _banana,
    "funnel_d10": _funnel,
    "funnel_d30": _funnel,
    "shell_d2": _shell,
    "shell_d8": _shell,
}


def log_density(name: str, constants: Constants) -> Callable[[Array], Array]:
    """theta (D,) -> log p, unnormalised; all others are (mixtures of) Gaussians."""
    density = _DENSITIES.get(name, _mixture)
    return lambda theta: density(constants, theta)


def to_support(
    constants: Constants,
) -> tuple[Map, Callable[[Array], Array]]:
    """u (D,) -> (theta, log |d theta / d u|), and the log-density of the prior in u.

    A box has theta = low + (high - low) sigmoid(u); a normal prior needs nothing.
    """
    if "low" not in constants:
        loc, scale = constants["prior_loc"], constants["prior_scale"]
        return lambda u: (u, jnp.zeros(())), lambda u: norm.logpdf(u, loc, scale).sum()
    low, width = constants["low"], constants["high"] - constants["low"]

    def log_slope(u: Array) -> Array:
        return jax.nn.log_sigmoid(u) + jax.nn.log_sigmoid(-u)

    def forward(u: Array) -> tuple[Array, Array]:
        return low + width * jax.nn.sigmoid(u), (log_slope(u) + np.log(width)).sum()

    return forward, lambda u: log_slope(u).sum()


def check(name: str, problem: Constants) -> None:
    """Compare with the torch density at the problem's points.

    Raises:
        ValueError: they differ.
    """
    ours = np.asarray(jax.vmap(log_density(name, problem))(problem["check_theta"]))
    worst = float(np.abs(ours - problem["check_value"]).max())
    if not worst < 1e-5 * (1 + np.abs(ours).max()):
        raise ValueError(f"`{name}`: expected the density of torch; got one that differs by {worst:.2e}")
