r"""Where to simulate next: around the present posterior, and a little all over what it has not ruled out.

A round's thetas are drawn from

    (1 - s) q_corrected(theta) + s p(theta) 1[log q(theta) >= tau] / C,

s = .2. The first part simulates where the posterior is. The second is the prior, truncated to the region that
holds all but a share 1e-4 of the posterior's draws (Deistler, Goncalves, Macke: Truncated proposals for
scalable and hassle-free simulation-based inference. NeurIPS 2022); it keeps on testing the learned
likelihood between and beside the posterior's modes, where a wrong maximum would grow unseen. Corrected draws,
of a named q too, because an error of q would otherwise be passed on from round to round (Glöckler, Deistler,
Macke: Variational methods for simulation-based inference. ICLR 2022).

The truncated prior may be a millionth of the prior, so rejection alone would take forever. It is drawn by
importance resampling from half the prior and half a widened mixture around the posterior's draws, whose
weights are bounded by 2.
"""

import copy
import math

import torch
from scipy.special import gammaincinv
from torch import Tensor

from visbi.certificate.report import GOOD
from visbi.certificate.verdict import certify
from visbi.certificate.weights import effective_sample_size, resample
from visbi.core.checks import in_interval, positive_int, violation
from visbi.core.types import Shape
from visbi.correcting import POOL
from visbi.families.gaussians import Mixture
from visbi.fitting.refine import around
from visbi.posterior import VIPosterior
from visbi.priors import coordinates

__all__ = ["RoundProposal", "TruncatedPrior"]

_DRAWS = 10_000  # of the posterior, behind its region
_SHAPE = 2000  # of them behind the mixture
_SPARE = 8  # proposals for each draw of the truncated prior
_FEWEST = 8192


class TruncatedPrior:
    """The prior where a posterior is not negligible: log q(theta) at least its quantile over draws.

    Args:
        posterior: fitted to one observation.
        outside: share of its draws that lie outside the region, in (0, 1).
        seed_draws: draws (N, D) of the posterior that decide; None takes some.

    Raises:
        ValueError: `outside` out of range, or a posterior that is not fitted or amortised.

    >>> from visbi.priors import BoxUniform
    >>> prior = BoxUniform(-10 * torch.ones(2), 10 * torch.ones(2))
    >>> def potential(theta, x_o):
    ...     return -0.5 * (theta - x_o).square().sum(-1)
    >>> posterior = VIPosterior(potential, prior, q="auto")
    >>> posterior = posterior.train(torch.zeros(1, 2), seed=0, show_progress_bar=False)
    >>> truncated = TruncatedPrior(posterior)
    >>> theta = truncated.sample((1000,))
    >>> bool(truncated.contains(theta).all()), 2.8 < float(theta.norm(dim=-1).max()) < 6
    (True, True)
    """

    def __init__(
        self, posterior: VIPosterior, *, outside: float = 1e-4, seed_draws: Tensor | None = None
    ) -> None:
        in_interval("outside", outside, 0.0, 1.0)
        self.posterior = copy.copy(posterior)  # its pool of draws grows for itself
        draws = _near(self.posterior, _DRAWS) if seed_draws is None else seed_draws
        log_q = self.posterior.log_prob(draws).double()
        if log_q.ndim != 1:
            raise ValueError(violation("posterior", "one fitted to one observation", repr(posterior)))
        self.threshold = float(log_q.quantile(outside))
        self.coords = coordinates(posterior.prior)
        z = self.coords.to_z(draws[torch.randperm(len(draws))[:_SHAPE]])[0].detach()
        self._wide = _reaching(around(z[None]), outside)

    def contains(self, theta: Tensor) -> Tensor:
        """Which of theta (N, D) lie in the region, (N,) bool."""
        return self.posterior.log_prob(theta).double() >= self.threshold

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws of shape (*sample_shape, D), from torch's global generator."""
        shape = torch.Size(sample_shape)
        n = shape.numel()
        many = max(_FEWEST, _SPARE * n)
        theta, log_w = self._weighted(many)
        # where the region is hard to hit, once more with what it takes; then copies are let stand
        share = effective_sample_size(log_w) / len(log_w)
        if share * many < 2 * n:
            more = self._weighted(min(math.ceil(4 * n / max(share, 1e-3)), 64 * many))
            theta, log_w = torch.cat([theta, more[0]]), torch.cat([log_w, more[1]])
        return theta[resample(log_w, n)].reshape(*shape, theta.shape[-1])

    def _weighted(self, n: int) -> tuple[Tensor, Tensor]:
        """n proposals in the support and their log-weights, -inf outside the region."""
        prior = self.posterior.prior
        theta = torch.cat([prior.sample(torch.Size([n // 2])).to(self.coords.low), self._widened(n - n // 2)])
        z, ladj = self.coords.to_z(theta)
        log_prior = prior.log_prob(theta).double() + ladj
        log_g = torch.logaddexp(log_prior, self._wide.log_prob(z[None])[0]) - math.log(2)
        log_w = log_prior - log_g
        return theta, torch.where(self.contains(theta) & log_w.isfinite(), log_w, -torch.inf)

    def _widened(self, n: int) -> Tensor:
        return self.coords.to_theta(self._wide.sample(n)[0])[0]


def _reaching(mixture: Mixture, outside: float) -> Mixture:
    """The mixture with each Gaussian spread over the ball that held all but `outside` of it."""
    d = mixture.loc.shape[-1]
    return mixture.widened(
        2.0 * float(gammaincinv(d / 2, 1.0 - outside)) / d
    )  # chi2's quantile over its mean


def _near(posterior: VIPosterior, n: int) -> Tensor:
    """n draws of the posterior, (n, D), corrected where that can be done.

    Raises:
        ValueError: a posterior that is not fitted or amortised.
    """
    if posterior.automatic:  # it knows by itself whether its draws are to be corrected
        return posterior.sample((n,))
    posterior.weighted_sample(POOL)  # makes the pool, or says what cannot be weighted
    pool = posterior.fit.draws  # type: ignore[union-attr]
    assert pool is not None
    sound = certify(pool.log_p, pool.log_q, resampled=True).status in GOOD
    # Where k-hat is high, a few draws of q hold almost all of the weight: resampled, a round's runs would all
    # be at these few thetas, out where q is most wrong. Raw draws spread at least over what q covers, the
    # truncated prior looks around it, and `errors.q` asks for another q.
    return posterior.sample((n,), correct=sound)


class RoundProposal:
    """What a round's thetas are drawn from: corrected draws of the posterior, and its truncated prior.

    Args:
        posterior: the present one, fitted to one observation.
        prior_share: s, the share of draws of the truncated prior, in [0, 1].
        outside: as for `TruncatedPrior`.

    Raises:
        ValueError: a share out of range, or a posterior that is not fitted or amortised.

    >>> from visbi.priors import BoxUniform
    >>> prior = BoxUniform(-10 * torch.ones(2), 10 * torch.ones(2))
    >>> def potential(theta, x_o):
    ...     return -0.5 * (theta - x_o).square().sum(-1)
    >>> posterior = VIPosterior(potential, prior, q="auto")
    >>> posterior = posterior.train(torch.zeros(1, 2), seed=0, show_progress_bar=False)
    >>> RoundProposal(posterior).sample((500,)).shape
    torch.Size([500, 2])
    """

    def __init__(self, posterior: VIPosterior, *, prior_share: float = 0.2, outside: float = 1e-4) -> None:
        self.prior_share = in_interval("prior_share", prior_share, 0.0, 1.0, closed="lr")
        self.outside = in_interval("outside", outside, 0.0, 1.0)
        self.posterior = copy.copy(posterior)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws of shape (*sample_shape, D), in random order, from torch's global generator."""
        shape = torch.Size(sample_shape)
        n = positive_int("sample_shape", shape.numel())
        posterior = copy.copy(self.posterior)  # each call draws alike under the same seed
        n_prior = round(self.prior_share * n)
        near = _near(posterior, max(n - n_prior, _DRAWS))
        parts = [near[torch.randperm(len(near))[: n - n_prior]]]
        if n_prior:
            truncated = TruncatedPrior(posterior, outside=self.outside, seed_draws=near)
            parts.append(truncated.sample((n_prior,)))
        theta = torch.cat(parts)[torch.randperm(n)]
        return theta.reshape(*shape, theta.shape[-1])
