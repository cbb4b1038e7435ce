r"""Two errors kept apart, in one unit, and which of them to spend on.

A posterior from a learned likelihood is wrong twice: q is not the posterior of the learned likelihood, and
the learned likelihood is not the simulator's. Both are given as total variation, the largest difference in
the probability of any event, so that they can be compared.

q            what the certificate says of the draws that `sample` gives: of raw ones the distance of q; of
             corrected ones the mass beyond their largest weights, extrapolated.
likelihood   how far the posteriors of an ensemble's networks p_k are from that of their average p, at x_o:

                 mean_k TV(p_k, p),    TV(p_k, p) = E_p |w_k / E_p[w_k] - 1| / 2,
                 w_k = q_k(x_o | theta) / mean_j q_j(x_o | theta).

The networks differ by their seeds: their first weights, the order of the batches, and which runs are held out
(Lakshminarayanan, Pritzel, Blundell: Simple and scalable predictive uncertainty estimation using deep
ensembles. NeurIPS 2017). What they all get wrong in the same way is not seen: the spread is a lower bound.

So each round's runs, before they are learnt from, test the likelihood of the round before (`local`). Where
they contradict it, the networks had agreed on what is wrong. Whether they agree on better now only further
runs can tell: the likelihood may not pass as known, however small its spread.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.certificate.ranks import ALPHA
from visbi.certificate.report import GOOD
from visbi.certificate.weights import total_variation, unseen_mass
from visbi.estimators import LikelihoodEnsemble
from visbi.posterior import VIPosterior
from visbi.potentials.base import BasePotential

__all__ = ["ENOUGH", "MORE_SIMULATIONS", "REFINE_Q", "Errors", "error_of_q", "likelihood_spread", "moved"]

MORE_SIMULATIONS = "more simulations"
REFINE_Q = "refine q"
ENOUGH = "nothing"
_SMALL = 0.02  # of a total variation: a perfect classifier is right in 51 % of the cases


@dataclass(frozen=True)
class Errors:
    """What may be wrong with the posterior of a round, in total variation, 0 to 1.

    Attributes:
        q: of the draws of q that `sample` gives, from the posterior of the learned likelihood.
        likelihood: between the posteriors of the ensemble's networks and that of their average; None with one
            network, where it is not known.
        moved: between this posterior and that of the round before; None in the first.
        q_status: of the certificate of q.
        likelihood_p: p-value that the likelihood of the round before is the simulator's, from this round's
            runs at one theta; None in the first round, and with fewer than 100 runs.
        likelihood_finding: what that test found, as a sentence.
    """

    q: float
    likelihood: float | None
    moved: float | None
    q_status: str
    likelihood_p: float | None = None
    likelihood_finding: str = ""

    @property
    def contradicted(self) -> bool:
        """Whether this round's runs reject the likelihood of the round before, at the level .05."""
        return self.likelihood_p is not None and self.likelihood_p < ALPHA

    @property
    def own(self) -> float:
        """The larger of both errors, as far as they can be seen."""
        return max(self.q, self.likelihood or 0.0)

    @property
    def spend_on(self) -> str:
        """ "more simulations", "refine q", or "nothing" where both errors are too small to be seen.

        A likelihood that new runs contradict asks for more simulations, unless q has failed or its own error
        is the larger one that can be seen: that is mended without any.

        >>> Errors(q=0.01, likelihood=0.12, moved=0.2, q_status="corrected").spend_on
        'more simulations'
        """
        likelihood = self.likelihood or 0.0
        if self.q_status == "failed" or self.q > max(_SMALL, likelihood):
            return REFINE_Q
        if self.contradicted:
            return MORE_SIMULATIONS
        if self.q_status == "suspect" and likelihood <= _SMALL:
            return REFINE_Q
        if self.likelihood is not None and likelihood <= _SMALL and (self.moved or 0.0) <= _SMALL:
            return ENOUGH
        return MORE_SIMULATIONS

    def __str__(self) -> str:
        known = "not known (one network)" if self.likelihood is None else f"{self.likelihood:.3f}"
        lines = [
            f"error of q {self.q:.3f} ({self.q_status}), error of the learned likelihood {known}, "
            "in total variation",
        ]
        if self.moved is not None:
            lines.append(f"the last round moved the posterior by {self.moved:.3f}")
        if self.likelihood_p is not None:
            lines.append(f"its runs on the likelihood of the round before: {self.likelihood_finding}")
        lines.append(f"spend next on: {self.spend_on}")
        return "\n".join(lines)


def error_of_q(posterior: VIPosterior) -> float:
    """Total variation between the draws that `posterior.sample` gives and what its potential describes.

    >>> from visbi.priors import BoxUniform
    >>> prior = BoxUniform(-9 * torch.ones(2), 9 * torch.ones(2))
    >>> def potential(theta, x_o):
    ...     return -0.5 * (theta - x_o).square().sum(-1)
    >>> posterior = VIPosterior(potential, prior, q="auto")
    >>> error_of_q(posterior.train(torch.zeros(1, 2), seed=0, show_progress_bar=False)) < 0.01
    True
    """
    report = posterior.report
    raw = report.total_variation
    if not report.rung or report.status not in GOOD:  # draws as they are, or doubtful weights
        return min(raw, 1.0) if math.isfinite(raw) else 1.0
    smooth = posterior.weighted_sample(report.n_draws)[1]
    return min(unseen_mass(smooth, report.khat), 1.0)


def likelihood_spread(estimator: LikelihoodEnsemble, theta: Tensor, x_o: Tensor) -> float | None:
    """Mean distance of the networks' posteriors from that of their average; None of one network.

    Args:
        estimator: the ensemble.
        theta: draws (N, D) of the posterior of its average, N >= 25.
        x_o: the observation, (1, ...).

    >>> from visbi.estimators import TrainingOptions, fit_likelihood
    >>> theta = torch.randn(100, 1)
    >>> options = dict(ensemble=2, options=TrainingOptions(max_epochs=1), show_progress_bar=False)
    >>> trained = fit_likelihood(theta, theta + torch.randn(100, 2), seed=0, **options)
    >>> 0 < likelihood_spread(trained.estimator, theta, torch.zeros(1, 2)) < 1
    True
    """
    if len(estimator) < 2:
        return None
    with torch.no_grad():
        members = estimator.members_log_prob(x_o, theta).double()
    average = members.logsumexp(0)
    return sum(total_variation(member - average) for member in members) / len(members)


def moved(before: BasePotential, now: BasePotential, theta: Tensor, x_o: Tensor) -> float:
    """Distance of the posterior of one potential from that of another.

    Args:
        before, now: the potentials.
        theta: draws (N, D) of the posterior of `now`, N >= 25.
        x_o: the observation, (1, ...).

    >>> from visbi.potentials import as_potential
    >>> from visbi.priors import BoxUniform
    >>> prior = BoxUniform(-9 * torch.ones(1), 9 * torch.ones(1))
    >>> now = as_potential(lambda theta, x: -0.5 * theta.square().sum(-1), prior)
    >>> before = as_potential(lambda theta, x: -0.5 * (theta - 1).square().sum(-1), prior)
    >>> distance = moved(before, now, torch.randn(100_000, 1), torch.zeros(1, 1))
    >>> abs(distance - 0.383) < 0.01  # 2 Phi(1 / 2) - 1
    True
    """
    with torch.no_grad():
        return total_variation((before.evaluate(theta, x_o) - now.evaluate(theta, x_o)).double())
