r"""An amortised fit: one q(theta | x) for all x, from simulations.

The published objective is the ELBO averaged over simulated observations,

    max_phi  E_{x ~ data} E_{theta ~ q_phi(. | x)} [ log p(theta | x) - log q_phi(theta | x) ],

whose maximum over all q is the posterior at every x (Rezende, Mohamed 2015; with learned likelihoods:
Glöckler, Deistler, Macke 2022). A step takes a batch of x, draws particles for each, evaluates the potential
on all pairs at once and follows the path gradient (Roeder, Wu, Duvenaud 2017). The others are in
`fitting.amortized_objectives`, the loop is in `fitting.amortized_loop`.
"""

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from visbi.core.checks import violation
from visbi.core.random import seeded
from visbi.core.types import ZScore
from visbi.families.conditional import ConditionalFamily
from visbi.families.conditional_config import ConditionalConfig
from visbi.fitting.amortized_config import AmortizedOptions, check_simulations, chosen_config
from visbi.fitting.amortized_loop import INTERRUPTED, descend
from visbi.fitting.amortized_objectives import HELD_OUT_SEED, Both, Elbo, Forward, Pairs, elbo
from visbi.fitting.state import AmortizedFit, AutoFit, SingleFit, Untrained
from visbi.potentials.base import BasePotential
from visbi.priors.blocks import BijectionBlock
from visbi.priors.transforms import Coordinates, coordinates

__all__ = ["amortize", "conditional_family", "fit_amortized"]

_DIVERGENCES = {"elbo": ("rKL",), "forward": ("rKL", "fKL"), "mixed": ("rKL", "fKL")}  # rKL is no wish
_SAID = {
    "elbo": "maximises the ELBO, that is rKL",
    "forward": "with objective='forward' minimises fKL on the simulations",
    "mixed": "with objective='mixed' minimises fKL, then fKL and rKL",
}
METHODS = {"elbo": "amortised rKL", "forward": "amortised fKL", "mixed": "amortised fKL and rKL"}
"""What a fit says of itself."""


def amortize(
    simulations: tuple[Any, Any],
    potential: BasePotential,
    prior: Distribution,
    coords: Coordinates,
    options: AmortizedOptions,
    *,
    choices: tuple[Any, Any, Any],
    method: str,
    embedding_net: nn.Module | None,
    before: Untrained | SingleFit | AutoFit | AmortizedFit,
) -> AmortizedFit:
    """All of `VIPosterior.train_amortized`: check, build or go on, fit.

    Args:
        simulations: theta and x as they came.
        potential: log p(theta | x) + const, for pairs.
        prior: over theta.
        coords: the posterior's coordinates of its support.
        options: see `AmortizedOptions`.
        choices: what to build: explicit, `params`, and the instance's.
        method: the instance's divergence; any but "rKL", here or in `params`, warns that it is not used.
        embedding_net: copied.
        before: what the posterior has now.
    """
    pairs = Pairs(*check_simulations(*simulations, coords.dim_theta, coords.low.device))
    if options.objective != "elbo":
        _check_support(pairs.theta, coords)
    explicit, params, instance = choices
    kept = before if isinstance(before, AmortizedFit) and not options.retrain_from_scratch else None
    config = chosen_config(explicit, params, None if kept is None else kept.conditional.config, instance)
    method = method if params is None else params.vi_method
    if method not in _DIVERGENCES[options.objective]:
        said = f"train_amortized() {_SAID[options.objective]}: vi_method = {method!r} is not used."
        warnings.warn(said, stacklevel=3)
    if isinstance(before, SingleFit | AutoFit):
        warnings.warn("train_amortized() replaces the fit to a single observation.", stacklevel=3)
    with seeded(options.seed):
        family = conditional_family(
            config,
            _of_kind(config.z_score_theta, prior, coords, instance.z_score_theta),
            pairs.x,
            embedding_net=copy.deepcopy(embedding_net),
            before=kept,
        )
        _probe(family, potential, pairs.x)
        return fit_amortized(family, potential, pairs, options)


def _check_support(theta: Tensor, coords: Coordinates) -> None:
    outside = int((~coords.contains(theta)).sum())
    if outside:
        raise ValueError(violation("theta", "rows within the prior's support", f"{outside} outside of it"))


def _of_kind(wanted: ZScore, prior: Distribution, coords: Coordinates, kind: ZScore) -> Coordinates:
    """Coordinates of the kind that is wanted: a copy of `coords`, which are of `kind`, or others.

    Where `coords` come from a map of the user's own, the others do so too.
    """
    if wanted == kind:
        return copy.deepcopy(coords)
    own = None
    if len(coords.blocks) == 1 and isinstance(block := coords.blocks[0], BijectionBlock):
        own = None if _agree(coords, prior, kind) else block.link.inv
    return coordinates(prior, z_score=wanted, theta_transform=own)


def _agree(coords: Coordinates, prior: Distribution, kind: ZScore) -> bool:
    """Whether `coords` are those that the prior alone would have."""
    try:
        again = coordinates(prior, z_score=kind)
    except ValueError:  # no support, so no map but the user's
        return False
    with seeded(HELD_OUT_SEED):
        z = torch.randn(16, coords.dim_z, dtype=torch.float64).to(coords.low.device)
    return again.dim_z == coords.dim_z and torch.allclose(again.to_theta(z)[0], coords.to_theta(z)[0])


def _probe(family: ConditionalFamily, potential: BasePotential, x: Tensor) -> None:
    """Evaluate the potential once, so that a wrong shape shows before any fit."""
    with torch.no_grad(), seeded(HELD_OUT_SEED):
        family.eval()
        elbo(family, potential, x[:2], 2)


def conditional_family(
    config: ConditionalConfig,
    coords: Coordinates,
    x: Tensor,
    *,
    embedding_net: nn.Module | None,
    before: AmortizedFit | None,
) -> ConditionalFamily:
    """The family to train: that of an earlier fit where it can go on, else a new one with fresh weights.

    Args:
        config: what to build.
        coords: coordinates of the prior's support for `config.z_score_theta`.
        x: observations (N, ...), from which a new family takes mean and scale.
        embedding_net: used as it is by a new family.
        before: an earlier fit to go on from.

    Raises:
        ValueError: the earlier fit has x of another shape.
    """
    if before is not None:
        kept = before.conditional
        changed = [name for name, value in vars(config).items() if value != getattr(kept.config, name)]
        changed += [] if embedding_net is None else ["embedding_net"]
        if not changed:
            if x.shape[1:] != kept.x_shape:
                expected = f"shape (N, {', '.join(map(str, kept.x_shape))}), or retrain_from_scratch=True"
                raise ValueError(violation("x", expected, tuple(x.shape)))
            return kept
        warnings.warn(f"q is built anew, because of another {', '.join(changed)}.", stacklevel=4)
    family = ConditionalFamily(coords, x.shape[1:], config, embedding_net)
    return family.to(x.device).fit_standardisation(x)


def fit_amortized(
    family: ConditionalFamily, potential: BasePotential, pairs: Pairs, options: AmortizedOptions
) -> AmortizedFit:
    """Fit q(theta | x), in place, to simulations.

    Args:
        family: q.
        potential: log p(theta | x) + const, for pairs.
        pairs: simulations; a share of them is held out.
        options: see `AmortizedOptions`.

    Returns:
        The fit, with the weights of the lowest held-out loss. Ctrl-C ends it early.
    """
    train, held_out = pairs.split(options.validation_fraction)
    if options.objective == "elbo":
        trace = descend(family, Elbo(family, potential, train, held_out, options), options)
        return AmortizedFit(family, trace, options)
    trace = descend(family, Forward(family, train, held_out, options), options)
    if options.objective == "mixed" and trace.stop_reason != INTERRUPTED:
        both = Both(family, potential, train, held_out, options)
        trace = replace(descend(family, both, options), before=trace)
    return AmortizedFit(family, trace, options, method=METHODS[options.objective])
