r"""Batch-and-match: a Gaussian fitted to scores, not to an ELBO.

Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei, Saul: Batch and match. ICML 2024.

From B draws z_b ~ N(mu, S) with scores g_b = grad ell(z_b), their means zbar, gbar and covariances C, G, the
new Gaussian minimises the expected squared difference of scores, weighted by its covariance, plus a KL step
penalty 1/lambda:

    U = lam G + lam/(1+lam) gbar gbar'
    V = S + lam C + lam/(1+lam) (mu - zbar)(mu - zbar)'
    S' U S' + S' = V,    mu' = mu/(1+lam) + lam/(1+lam) (S' gbar + zbar).

The quadratic matrix equation has the solution S' = V^(1/2) R diag(2 / (1 + sqrt(1 + 4 e))) R' V^(1/2) with
V^(1/2) U V^(1/2) = R diag(e) R'. Exact in one step on a Gaussian target. A leading axis fits many Gaussians
at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.fitting.target import Target

__all__ = ["Match", "match_gaussian"]

_SETTLED = 1e-3  # relative change of the covariance, and of the mean in its units


@dataclass(frozen=True)
class Match:
    """Fitted Gaussians.

    Attributes:
        loc: (K, d). cov: (K, d, d).
        elbo: (K,) E_q[ell - log q] from the last batch.
        num_iters: iterations taken.
    """

    loc: Tensor
    cov: Tensor
    elbo: Tensor
    num_iters: int


def match_gaussian(
    target: Target,
    loc: Tensor | None = None,
    cov: Tensor | None = None,
    *,
    batch: int | None = None,
    max_iters: int = 12,
) -> Match:
    """Match Gaussians to the target from given starts.

    Args:
        target: ell and its gradient.
        loc: (K, d) start; None is one start at zero.
        cov: (K, d, d) start; None is the identity.
        batch: draws per iteration; None is max(128, 2 d).
        max_iters: most iterations; fewer if the Gaussians settle.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    >>> target = Target(lambda theta: -50 * (theta - 0.7).square().sum(-1), coordinates(prior))
    >>> match_gaussian(target).cov[0].diagonal().tolist()
    [0.01, 0.01]
    """
    d = target.dim
    batch = max(128, 2 * d) if batch is None else batch
    like = {"dtype": torch.float64, "device": target.device}
    loc = torch.zeros(1, d, **like) if loc is None else loc
    cov = torch.eye(d, **like).expand(len(loc), d, d) if cov is None else cov
    # in coordinates in which the start is N(0, I): scales may differ by 10^8, whose squares no eigh resolves
    start, root = loc, _lower(cov)
    loc, cov = torch.zeros_like(loc), torch.eye(d, **like).expand_as(cov)
    damping = torch.ones(len(loc), 1, 1, **like)
    elbo = torch.full((len(loc),), -torch.inf, **like)
    done = 0
    for t in range(max_iters):
        done = t + 1
        tril = _lower(cov)
        u = torch.randn(len(loc), batch, d, **like)
        y = loc[:, None] + u @ tril.mT
        ell, scores = target.value_and_gradient(start[:, None] + y @ root.mT)
        log_det = (
            (tril.diagonal(dim1=-2, dim2=-1) * root.diagonal(dim1=-2, dim2=-1)).log().sum(-1, keepdim=True)
        )
        log_q = -0.5 * u.square().sum(-1) - log_det
        elbo = (ell - log_q).mean(1) + 0.5 * d * torch.log(torch.tensor(2 * torch.pi, **like))
        rate = damping * batch * d / (t + 1)
        new_loc, new_cov, good = _update(loc, cov, y, scores @ root, rate)
        change = _change(loc, cov, new_loc, new_cov)
        loc = torch.where(good[:, None], new_loc, loc)
        cov = torch.where(good[:, None, None], new_cov, cov)
        damping = torch.where(good[:, None, None], damping, 0.5 * damping)
        if bool((good & (change < _SETTLED)).all()):
            break
    loc = start + (root @ loc[..., None])[..., 0]
    return Match(loc, _symmetric(root @ cov @ root.mT), elbo, done)


def _lower(cov: Tensor) -> Tensor:
    """Cholesky factors; the roots of the diagonal where there are none."""
    tril, info = torch.linalg.cholesky_ex(cov)
    plain = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt())
    return torch.where((info == 0)[:, None, None], tril, plain)


def _update(loc: Tensor, cov: Tensor, z: Tensor, g: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step for every start, and which of them came out finite and positive definite."""
    zbar, gbar = z.mean(1), g.mean(1)
    share = lam / (1 + lam)
    u = lam * _cov(g) + share * _outer(gbar)
    v = cov + lam * _cov(z) + share * _outer(loc - zbar)
    finite = torch.isfinite(u).flatten(1).all(1) & torch.isfinite(v).flatten(1).all(1)
    u = torch.where(finite[:, None, None], u, torch.zeros_like(u))
    v = torch.where(finite[:, None, None], v, cov)
    values, vectors = torch.linalg.eigh(_symmetric(v))
    root = vectors @ (values.clamp_min(0).sqrt()[:, :, None] * vectors.mT)
    e, r = torch.linalg.eigh(_symmetric(root @ u @ root))
    inner = r @ ((2 / (1 + (1 + 4 * e.clamp_min(0)).sqrt()))[:, :, None] * r.mT)
    new_cov = _symmetric(root @ inner @ root)
    new_loc = loc / (1 + lam[:, 0]) + share[:, 0] * ((new_cov @ gbar[:, :, None])[..., 0] + zbar)
    _, info = torch.linalg.cholesky_ex(new_cov)
    good = finite & (info == 0) & torch.isfinite(new_loc).all(1)
    return new_loc, new_cov, good


def _change(loc: Tensor, cov: Tensor, new_loc: Tensor, new_cov: Tensor) -> Tensor:
    sd = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    moved = ((new_loc - loc) / sd).abs().amax(1)
    scaled = ((new_cov - cov) / (sd[:, :, None] * sd[:, None])).abs().flatten(1).amax(1)
    return torch.maximum(moved, scaled)


def _cov(values: Tensor) -> Tensor:
    centred = values - values.mean(1, keepdim=True)
    return centred.mT @ centred / values.shape[1]


def _outer(v: Tensor) -> Tensor:
    return v[:, :, None] * v[:, None]


def _symmetric(m: Tensor) -> Tensor:
    return 0.5 * (m + m.mT)
