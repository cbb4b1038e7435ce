r"""Mixtures of Gaussians, each with a full covariance: q(z) = sum_k w_k N(z; m_k, L_k L_k').

A draw picks a component k and is z = m_k + L_k e, e ~ N(0, I); means and factors move it, the weights do not.
Two ways lead to gradients by the weights as well.

*For objectives* (`draw`), E_q[f] has by the logits a the derivative E_q[f(z) d log q(z) / da]: the draws come
with log q as a function of the logits alone, and objectives weigh that (`objectives.particles`). It is right
however far components lie apart.

*For a function of draws alone* (`rsample_and_log_prob`), draws are differentiated implicitly (Graves 2016;
Figurnov, Mohamed, Mnih 2018). With u_k = L_k^{-1} (z - m_k) the conditional cdf of z_i given z_1, z_2, .. is

    F_i(z) = sum_k r_ki Phi(u_ki),   r_ki = softmax_k(log w_k + sum_{j<i} log N(u_kj) - log L_kjj),

F(z) is uniform on the cube whatever the parameters, and so dz = -J^{-1} (dF/dphi) dphi with J = dF/dz, lower
triangular, its diagonal the conditional densities p_i. Row i is divided by p_i, in log space, and where F_i
is above 1/2 by way of 1 - F_i: in tails that leaves ratios of the size of a scale. Between two modes it does
not: there F_i changes though hardly any mass is passed, and a draw that far out moves by 1 / p_i. Such ratios
are held below a bound, since their variance has none; how much weight each of two modes far apart has can
hardly be learnt that way.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from visbi.core.checks import finite_tensor, positive_int, violation
from visbi.core.logs import log_sum_exp
from visbi.families.base import Body, path_part
from visbi.families.gaussian import UNIT
from visbi.families.gaussians import Mixture

__all__ = ["MixtureBody"]

_SPREAD = 0.7  # of the components' means at the start; with their variances it makes up that of N(0, I)
_LEAST_WEIGHT = 1e-12  # a weight of zero has no logarithm
_LARGEST_RATIO = 1e3  # of a conditional cdf to its density, in units of the component's scale
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class MixtureBody(Body):
    """K Gaussians, L_k = diag(s_k) (I + strictly lower triangle); everything is float64.

    The means start at random, from torch's generator, so that components can part ways.

    Args:
        dim: d.
        n_components: K.

    Raises:
        ValueError: fewer than one component.

    >>> body = MixtureBody(2, 3)
    >>> z, log_q = body.rsample_and_log_prob(4)
    >>> bool(torch.allclose(body.log_prob(z), log_q)), body.cov.shape
    (True, torch.Size([3, 2, 2]))
    """

    def __init__(self, dim: int, n_components: int = 8) -> None:
        super().__init__(dim)
        k = self.n_components = positive_int("n_components", n_components)
        spread = _SPREAD if k > 1 else 0.0
        double = torch.float64
        log_scale = 0.5 * math.log1p(-(spread**2))
        self.raw_logits = nn.Parameter(torch.zeros(k, dtype=double))
        self.raw_loc = nn.Parameter(spread / UNIT * torch.randn(k, dim, dtype=double))
        self.raw_log_diag = nn.Parameter(torch.full((k, dim), log_scale / UNIT, dtype=double))
        self.raw_below = nn.Parameter(torch.zeros(k, dim * (dim - 1) // 2, dtype=double))

    @classmethod
    def of(cls, weights: Tensor, loc: Tensor, cov: Tensor) -> "MixtureBody":
        """The mixture with given weights (K,), means (K, d) and covariances (K, d, d).

        Weights are normalised. Torch's generator stays as it was.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, a weight below 0, no weight above
                0, or a covariance that is not positive definite.

        >>> body = MixtureBody.of(torch.tensor([1.0, 3.0]), torch.zeros(2, 1), torch.ones(2, 1, 1))
        >>> body.weights.tolist()
        [0.25, 0.75]
        """
        weights, loc, cov = (
            finite_tensor(name, value).detach().double()
            for name, value in (("weights", weights), ("loc", loc), ("cov", cov))
        )
        if loc.ndim != 2:
            raise ValueError(violation("loc", "shape (K, d)", tuple(loc.shape)))
        k, d = loc.shape
        for name, value, shape in (("weights", weights, (k,)), ("cov", cov, (k, d, d))):
            if value.shape != shape:
                raise ValueError(violation(name, f"shape {shape}", tuple(value.shape)))
        if not (bool((weights >= 0).all()) and bool(weights.sum() > 0)):
            raise ValueError(violation("weights", "numbers >= 0, not all 0", weights.tolist()))
        scale_tril, info = torch.linalg.cholesky_ex(0.5 * (cov + cov.mT))
        if bool((info != 0).any()):
            raise ValueError(violation("cov", "positive definite matrices", f"{int((info != 0).sum())} not"))
        with torch.random.fork_rng(devices=[]):
            body = cls(d, k).to(loc.device)
        body._set(weights / weights.sum(), loc, scale_tril)
        return body

    @torch.no_grad()
    def _set(self, weights: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        diag = scale_tril.diagonal(dim1=-2, dim2=-1)
        i, j = torch.tril_indices(self.dim, self.dim, -1)
        self.raw_logits.copy_(weights.clamp_min(_LEAST_WEIGHT).log() / UNIT)
        self.raw_loc.copy_(loc / UNIT)
        self.raw_log_diag.copy_(diag.log() / UNIT)
        self.raw_below.copy_((scale_tril / diag[..., None])[:, i, j] / UNIT)

    @property
    def logits(self) -> Tensor:
        """Logarithms of the weights, up to a constant, (K,)."""
        return UNIT * self.raw_logits

    @property
    def weights(self) -> Tensor:
        """w, (K,), sums to one."""
        return self.logits.softmax(0)

    @property
    def loc(self) -> Tensor:
        """m, (K, d)."""
        return UNIT * self.raw_loc

    @property
    def scale_tril(self) -> Tensor:
        """L, (K, d, d)."""
        scale = (UNIT * self.raw_log_diag).exp()
        i, j = torch.tril_indices(self.dim, self.dim, -1, device=scale.device)
        unit = torch.eye(self.dim, dtype=scale.dtype, device=scale.device).repeat(len(scale), 1, 1)
        component = torch.arange(len(scale), device=scale.device)[:, None]
        return scale[..., None] * unit.index_put((component, i, j), UNIT * self.raw_below)

    @property
    def cov(self) -> Tensor:
        """Covariances of the components, (K, d, d)."""
        scale_tril = self.scale_tril
        return scale_tril @ scale_tril.mT

    def _drawn(self, n: int) -> Tensor:
        """Draws (n, d), each with the gradient of its component's mean and factor."""
        k = torch.multinomial(self.weights.detach(), n, replacement=True)
        u = torch.randn(n, self.dim, 1, dtype=self.raw_loc.dtype, device=self.raw_loc.device)
        return self.loc[k] + (self.scale_tril[k] @ u)[..., 0]

    def sample(self, n: int) -> Tensor:
        """`n` draws (n, d), no gradient."""
        with torch.no_grad():
            return self._drawn(n)

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        z = self.sample(n)
        if not torch.is_grad_enabled():
            return z, self.log_prob(z)
        scale_tril, log_w = self.scale_tril, self.logits.log_softmax(0)
        u = _noise(z, self.loc, scale_tril)
        log_n = _log_normal(u, scale_tril)
        z = z - _implicit(u, log_n, log_w, scale_tril.detach())
        return z, _log_q_along(z, u, log_n, log_w, scale_tril)[0]

    def draw(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        if not (path and torch.is_grad_enabled()):
            return *self.rsample_and_log_prob(n), None
        z = self._drawn(n)
        scale_tril, log_w = self.scale_tril, self.logits.log_softmax(0)
        u = _noise(z.detach(), self.loc, scale_tril)
        log_q, score = _log_q_along(z, u, _log_normal(u, scale_tril), log_w, scale_tril)
        return z, log_q, path_part(log_q, z, score)

    def log_prob_by_choice(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            log_n = self._log_components(z.double())
        return self._log_sum(log_n)

    def log_prob(self, z: Tensor) -> Tensor:
        z = z.double()
        if not torch.is_grad_enabled():
            return self._plain().log_prob(z[None])[0]
        return self._log_sum(self._log_components(z))

    def _log_components(self, z: Tensor) -> Tensor:
        """log N(z; m_k, L_k L_k'), (K, N)."""
        scale_tril = self.scale_tril
        return _log_normal(_noise(z, self.loc, scale_tril), scale_tril).sum(1)

    def _log_sum(self, log_n: Tensor) -> Tensor:
        """log q (N,) from those of the components."""
        return log_sum_exp(self.logits.log_softmax(0)[:, None] + log_n, 0)

    def _plain(self) -> Mixture:
        """As it is, for several times faster densities without gradient."""
        return Mixture(self.logits.log_softmax(0)[None], self.loc[None], self.scale_tril[None])

    def score_at_draws(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            scale_tril = self.scale_tril
            u = _noise(z.double(), self.loc, scale_tril)
            log_n = _log_normal(u, scale_tril).sum(1)
            return _score(u, (self.logits[:, None] + log_n).softmax(0), scale_tril)


def _noise(z: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """u, (K, d, N), for z (N, d)."""
    return torch.linalg.solve_triangular(scale_tril, z.mT - loc[..., None], upper=False)


def _log_normal(u: Tensor, scale_tril: Tensor) -> Tensor:
    """log N(u_ki) - log L_kii, (K, d, N)."""
    log_diag = scale_tril.diagonal(dim1=-2, dim2=-1).log()
    return -0.5 * u.square() - (log_diag + _HALF_LOG_2PI)[..., None]


def _score(u: Tensor, shares: Tensor, scale_tril: Tensor) -> Tensor:
    """-sum_k share_k L_k^{-T} u_k, (N, d), for the components' shares of each z (K, N)."""
    return -(torch.linalg.solve_triangular(scale_tril.mT, shares[:, None] * u, upper=True)).sum(0).mT


def _log_q_along(
    z: Tensor, u: Tensor, log_n: Tensor, log_w: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor]:
    """log q at z (N, d) with its total derivative, from u and log_n at z held fixed, and the score there."""
    log_joint = log_w[:, None] + log_n.sum(1)
    score = _score(u.detach(), log_joint.detach().softmax(0), scale_tril.detach())
    return torch.logsumexp(log_joint, 0) + (score * (z - z.detach())).sum(-1), score


def _implicit(u: Tensor, log_n: Tensor, log_w: Tensor, scale_tril: Tensor) -> Tensor:
    """A tensor of zeros (N, d) whose gradient is J^{-1} dF/dphi."""
    before = functional.pad(log_n.cumsum(1)[:, :-1], (0, 0, 1, 0)) + log_w[:, None, None]
    log_r = before.log_softmax(0)
    with torch.no_grad():
        sign = torch.where((log_r.exp() * torch.special.ndtr(u)).sum(0) > 0.5, -1.0, 1.0).to(u.dtype)
    log_tail = log_r + torch.special.log_ndtr(sign * u)
    with torch.no_grad():
        log_scale = scale_tril.diagonal(dim1=-2, dim2=-1).log()[..., None]
        highest = (log_tail - log_scale).amax(0) - math.log(_LARGEST_RATIO)
        log_p = torch.maximum(torch.logsumexp(log_r + log_n, 0), highest)
    ratio = (log_tail - log_p).exp()  # r_ki Phi(+-u_ki) / p_i
    change = sign * ratio.sum(0)
    with torch.no_grad():
        density = (log_r + log_n - log_p).exp()
        triangle = _jacobian(u, log_r.exp(), sign * ratio, density, scale_tril)
    rhs = (change - change.detach()).mT[..., None]
    return torch.linalg.solve_triangular(triangle, rhs, upper=False, unitriangular=True)[..., 0]


def _jacobian(u: Tensor, r: Tensor, ratio: Tensor, density: Tensor, scale_tril: Tensor) -> Tensor:
    """J with its rows divided by p_i, (N, d, d), sum_k M_k L_k^{-1} with M_k lower triangular.

    The diagonal of M_k is r_ki N(u_ki) / p_i; left of it stands -a_ki u_kj, for log r_ki changes with u_kj by
    -u_kj less what it does on average: a_ki = ratio_ki - r_ki sum_l ratio_li.
    """
    k, d, n = u.shape
    if d == 1:
        return u.new_ones(n, 1, 1)
    a = (ratio - r * ratio.sum(0)).permute(2, 1, 0)[..., None]  # (N, d, K, 1)
    strictly_below = torch.ones(d, d, dtype=u.dtype, device=u.device).tril(-1)[:, None]
    m = -a * u.permute(2, 0, 1)[:, None] * strictly_below  # (N, d, K, d)
    diagonal = density * scale_tril.diagonal(dim1=-2, dim2=-1)[..., None]
    m.diagonal(dim1=1, dim2=3).copy_(diagonal.permute(2, 0, 1))
    eye = torch.eye(d, dtype=u.dtype, device=u.device).expand(k, d, d)
    inverse = torch.linalg.solve_triangular(scale_tril, eye, upper=False)
    return (m.reshape(n * d, k * d) @ inverse.reshape(k * d, d)).view(n, d, d)
