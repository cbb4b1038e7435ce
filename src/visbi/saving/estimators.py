"""Learned likelihoods and ratios, and the potentials that are made of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from visbi.core.checks import violation
from visbi.core.encoding import Given, Kind, Otherwise, WrongGiven, described
from visbi.core.random import seeded
from visbi.estimators import LikelihoodEnsemble, NeuralLikelihood, NeuralRatio, RatioEnsemble
from visbi.estimators.likelihood import LikelihoodConfig
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.estimators.ratio import RatioConfig
from visbi.potentials import CustomPotential, LikelihoodPotential, RatioPotential, as_potential
from visbi.potentials.base import BasePotential
from visbi.potentials.fence import Fence, FencedPotential
from visbi.priors import as_prior
from visbi.saving.modules import dataclass_kind, weights_of, with_weights

__all__ = ["ESTIMATORS", "POTENTIALS", "UsersPotential"]


def _estimator(cls: type, attribute: str, keyword: str) -> Kind:
    """Kind of an estimator with an embedding net, which is a user's own unless there is none."""

    def fields(estimator: Any) -> dict[str, Any]:
        net = getattr(estimator, attribute)
        return {
            "theta_features": estimator.theta_features,
            "x_shape": estimator.x_shape,
            "config": estimator.config,
            "embedding": None if type(net) is nn.Identity else Otherwise(net, Given(keyword)),
            "weights": weights_of(estimator),
        }

    def build(
        theta_features: int, x_shape: Any, config: Any, embedding: nn.Module | None, weights: dict[str, Any]
    ) -> Any:
        make: Callable[..., nn.Module] = cls
        try:
            with seeded(0):
                made = make(theta_features, x_shape, config, copy.deepcopy(embedding))
            return with_weights(made, weights).eval()
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if embedding is None:
                raise
            expected = "the network that the estimator was trained with"
            raise WrongGiven(violation(keyword, expected, f"another one ({error})")) from error

    return Kind(cls.__name__, cls, fields, build)


ESTIMATORS = (
    dataclass_kind(LikelihoodConfig),
    dataclass_kind(RatioConfig),
    Kind("PriorCoordinates", PriorCoordinates, lambda net: {"coords": net.coords}, PriorCoordinates),
    _estimator(NeuralLikelihood, "theta_embedding", "theta_embedding_net"),
    _estimator(NeuralRatio, "embedding", "embedding_net"),
    Kind(
        "LikelihoodEnsemble", LikelihoodEnsemble, lambda e: {"members": list(e.members)}, LikelihoodEnsemble
    ),
    Kind("RatioEnsemble", RatioEnsemble, lambda e: {"members": list(e.members)}, RatioEnsemble),
)
"""Kinds of estimators."""


@dataclass(frozen=True)
class UsersPotential:
    """In the place of a potential that is a user's own or of another package.

    Attributes:
        potential_fn: given.
        prior: its prior.
        x_o, x_is_iid: the observation that was set, for a plain callable; objects bring their own.
    """

    potential_fn: Any
    prior: Any
    x_o: Tensor | None
    x_is_iid: bool

    @classmethod
    def of(cls, potential: BasePotential) -> "UsersPotential":
        """What is stored of `potential`."""
        theirs = getattr(potential, "potential_fn", getattr(potential, "inner", None))
        return cls(
            potential_fn=Given("potential_fn", what="" if theirs is None else described(theirs)),
            prior=Otherwise(potential.prior, None),
            x_o=potential.return_x_o(),
            x_is_iid=potential.x_is_iid,
        )

    def made(self, prior: Distribution) -> BasePotential:
        """The potential; `prior` is for one that has none."""
        own = prior if self.prior is None else as_prior(self.prior)
        potential = as_potential(self.potential_fn, own)
        if potential.prior is None:
            potential.prior = own
        if isinstance(potential, CustomPotential) and self.x_o is not None:
            potential.set_x(self.x_o, self.x_is_iid)
        return potential


def _potential(cls: type, estimator: str) -> Kind:
    def fields(potential: Any) -> dict[str, Any]:
        return {
            "estimator": getattr(potential, estimator),
            "prior": potential.prior,
            "x_o": potential.return_x_o(),
            "x_is_iid": potential.x_is_iid,
        }

    def build(estimator: Any, prior: Distribution, x_o: Tensor | None, x_is_iid: bool) -> Any:
        potential = cls(estimator, prior)
        potential.set_x(x_o, x_is_iid)
        return potential

    return Kind(cls.__name__, cls, fields, build)


def _fence(**fields: Any) -> Fence:
    fence = Fence.__new__(Fence)  # its training set is not kept
    vars(fence).update(fields)
    return fence


def _fenced(inner: BasePotential, fence: Fence, x_o: Tensor | None, x_is_iid: bool) -> FencedPotential:
    potential = FencedPotential(inner, fence)
    potential.set_x(x_o, x_is_iid)
    return potential


POTENTIALS = (
    Kind(
        "Fence",
        Fence,
        lambda f: {"coords": f.coords, "loc": f.loc, "tril": f.tril, "radius": f.radius},
        _fence,
    ),
    Kind(
        "FencedPotential",
        FencedPotential,
        lambda p: {
            "inner": p.inner,
            "fence": p.fence,
            "x_o": p.return_x_o(),
            "x_is_iid": p.x_is_iid,
        },
        _fenced,
    ),
    _potential(LikelihoodPotential, "likelihood_estimator"),
    _potential(RatioPotential, "ratio_estimator"),
    dataclass_kind(UsersPotential),
)
"""Kinds of potentials."""
