"""A posterior as a file, and back.

What is a user's own code, a callable, a distribution, a network, cannot be stored: the file says that it is
missing, and loading asks for it by keyword.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from visbi import __version__
from visbi.core.archive import Archive, ArchiveError, read_archive, write_archive
from visbi.core.checks import unknown_keyword, violation
from visbi.core.encoding import (
    Decoder,
    Encoder,
    Given,
    Otherwise,
    Unstorable,
    Vocabulary,
    WrongGiven,
    described,
)
from visbi.core.types import ZScore
from visbi.families import Family
from visbi.fitting.state import AmortizedFit, AutoFit, SingleFit
from visbi.potentials.base import BasePotential
from visbi.priors import as_prior
from visbi.priors.transforms import Coordinates
from visbi.saving.amortized import AMORTIZED, StoredAmortizedFit
from visbi.saving.auto import AUTOMATIC, StoredAutoFit
from visbi.saving.coordinates import COORDINATES, CoordinatesOfPrior
from visbi.saving.distributions import CONSTRAINTS, DISTRIBUTIONS, TRANSFORMS
from visbi.saving.estimators import ESTIMATORS, POTENTIALS, UsersPotential
from visbi.saving.families import FAMILIES, UsersFamily
from visbi.saving.fits import CALLABLES, FITS, StoredFit

__all__ = ["VOCABULARY", "Parts", "load_parts", "save_parts"]

_KIND = "posterior"
VOCABULARY = Vocabulary(
    kinds=(
        *DISTRIBUTIONS,
        *TRANSFORMS,
        *CONSTRAINTS,
        *COORDINATES,
        *ESTIMATORS,
        *POTENTIALS,
        *FAMILIES,
        *FITS,
        *AMORTIZED,
        *AUTOMATIC,
    ),
    names=CALLABLES,
)
"""All that may occur in a file."""

_KEYWORDS = (
    "potential_fn",
    "prior",
    "q",
    "parameters",
    "modules",
    "theta_transform",
    "theta_embedding_net",
    "embedding_net",
    "q_embedding_net",
    "optimizer",
    "scheduler",
    "weight_transform",
)
_TYPES: dict[str, tuple[type, ...]] = {
    "prior": (Distribution,),
    "coords": (Coordinates,),
    "potential": (BasePotential, UsersPotential),
    "family": (Family, UsersFamily),
    "fit": (StoredFit, StoredAutoFit, StoredAmortizedFit, type(None)),
    "options": (dict,),
    "x": (Tensor, type(None)),
    "map": (Tensor, type(None)),
}
_MAY_BE_NONE = ("optimizer", "scheduler", "weight_transform")
# what a damaged or forged manifest makes the builders raise
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a posterior consists of.

    Attributes:
        prior, potential, coords, family: of the rooms of the house.
        fit: to one observation, of the same `family`, or an amortised one; or None.
        options: plain values by name.
        x: the default observation.
        map: the maximum, if it was searched for.
    """

    prior: Distribution
    potential: BasePotential
    coords: Coordinates
    family: Family
    fit: SingleFit | AutoFit | AmortizedFit | None
    options: dict[str, Any]
    x: Tensor | None
    map: Tensor | None


def save_parts(path: str | os.PathLike[str], parts: Parts, *, z_score: ZScore) -> None:
    """Write a posterior to a file, as a whole or not at all.

    Args:
        path: where; a file there is replaced.
        parts: what.
        z_score: how the coordinates were made, for a prior that cannot be stored.

    Raises:
        OSError: it cannot be written.
    """
    encoder = Encoder(VOCABULARY)
    content: dict[str, Any] = {"prior": encoder.encode(Otherwise(parts.prior, Given("prior")), "prior")}
    transform = Given("theta_transform", required="prior" not in encoder.missing)
    stand_ins = {
        "coords": CoordinatesOfPrior.of(parts.coords, parts.prior, z_score, transform),
        "potential": UsersPotential.of(parts.potential),
        "family": UsersFamily.of(parts.family),
    }
    for name, stand_in in stand_ins.items():
        content[name] = encoder.encode(Otherwise(getattr(parts, name), stand_in), name)
    rest = {"fit": _stored_fit(parts, transform), "options": parts.options, "x": parts.x, "map": parts.map}
    content |= {name: encoder.encode(value, name) for name, value in rest.items()}
    content |= {"missing": encoder.missing, "optional": encoder.optional}
    write_archive(path, Archive(_KIND, content, encoder.tensors, __version__))


def _stored_fit(parts: Parts, transform: Given) -> StoredFit | StoredAutoFit | StoredAmortizedFit | None:
    if isinstance(parts.fit, AmortizedFit):
        return StoredAmortizedFit.of(parts.fit, parts.prior, transform)
    if isinstance(parts.fit, AutoFit):
        return StoredAutoFit.of(parts.fit)
    return None if parts.fit is None else StoredFit.of(parts.fit, _storable)


def load_parts(path: str | os.PathLike[str], given: Mapping[str, Any], *, options: Iterable[str]) -> Parts:
    """Read a posterior from a file; no code in it is run.

    Args:
        path: the file.
        given: by keyword, what it could not store.
        options: names of those that it must hold.

    Raises:
        OSError: there is no such file.
        ArchiveError: a file that is damaged, foreign or of a newer version.
        TypeError: a keyword that the file does not ask for.
        ValueError: something is missing, or not what the posterior was saved with.
    """
    archive = read_archive(path, _KIND)
    with _reading(path):
        content: dict[str, Any] = archive.content
        missing, optional = dict(content["missing"]), list(content["optional"])
    _check_given(path, missing, optional, given)
    with _reading(path):
        decoder = Decoder(VOCABULARY, archive.tensors, given)
        names = ("prior", "coords", "potential", "family", "fit", "options", "x", "map")
        stored = {name: decoder.decode(content[name]) for name in names}
        _check_types(stored, missing)
        if absent := set(options) - stored["options"].keys():
            raise LookupError(f"no options {', '.join(sorted(absent))}")
    return _assembled(stored)


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever fails here is the file's fault, unless it says that it is not."""
    try:
        yield
    except (WrongGiven, ArchiveError):
        raise
    except (*_DAMAGE, RecursionError) as error:
        got = f"{os.fspath(path)!r}: content that it cannot read ({type(error).__name__}: {error})"
        raise ArchiveError(violation("path", f"a {_KIND} saved by visbi", got)) from error


def _storable(value: Any) -> bool:
    try:
        Encoder(VOCABULARY).encode(value, "")
    except Unstorable:
        return False
    return True


def _check_given(
    path: str | os.PathLike[str], missing: dict[str, str], optional: list[str], given: Mapping[str, Any]
) -> None:
    """Raise unless exactly what the file lacks is given."""
    for name in given:
        if name in _KEYWORDS and name not in missing and name not in optional:
            raise TypeError(violation(name, "nothing, since the file holds it", type(given[name]).__name__))
        if name not in _KEYWORDS:
            raise unknown_keyword(name, _KEYWORDS, "load()")
    absent = [n for n in missing if n not in given or (given[n] is None and n not in _MAY_BE_NONE)]
    if absent:
        call = ", ".join(f"{name}=..." for name in missing)
        lacks = "; ".join(f"{name} was {missing[name]}" for name in absent)
        expected = f"what {os.fspath(path)!r} could not store ({lacks})"
        raise ValueError(f"{violation('`, `'.join(absent), expected, None)}. Call load(path, {call}).")


def _check_types(stored: dict[str, Any], missing: Mapping[str, str]) -> None:
    """Raise TypeError for content of the wrong kinds."""
    for name, kinds in _TYPES.items():
        if name not in missing and not isinstance(stored[name], kinds):
            raise TypeError(f"{name} is {described(stored[name])}")
    draws = getattr(stored["fit"], "draws", None)
    if draws is not None and draws.theta.shape[1] != stored["coords"].dim_theta:
        raise TypeError(f"draws of {draws.theta.shape[1]} parameters")


def _assembled(stored: dict[str, Any]) -> Parts:
    """The parts, with what was given in its places."""
    prior, coords, potential, family, fit = (
        stored[name] for name in ("prior", "coords", "potential", "family", "fit")
    )
    prior = as_prior(prior)
    if tuple(prior.event_shape) != (coords.dim_theta,):
        raise ValueError(violation("prior", f"event_shape ({coords.dim_theta},)", tuple(prior.event_shape)))
    if isinstance(potential, UsersPotential):
        potential = potential.made(prior)
    if isinstance(family, UsersFamily):
        family = family.made(coords)
    if isinstance(fit, StoredFit | StoredAutoFit):
        fit = fit.made(family)
    elif isinstance(fit, StoredAmortizedFit):
        fit = fit.made()
    return Parts(
        prior=prior,
        potential=potential,
        coords=coords,
        family=family,
        fit=fit,
        options=stored["options"],
        x=stored["x"],
        map=stored["map"],
    )
