"""One fit of many as JSON values and tensors: what goes between processes and into a store.

What all fits share, the potential, the prior, its coordinates and the options, is not in it: a record is
read back relative to a template, a posterior of the same make.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.report import Report
from visbi.core.encoding import Decoder, Encoder, Kind, Otherwise, Unstorable, Vocabulary
from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import make_optimizer
from visbi.fitting.state import AutoFit, SingleFit
from visbi.posterior import VIPosterior
from visbi.priors.transforms import Coordinates
from visbi.saving import VOCABULARY
from visbi.saving.families import UsersFamily

__all__ = ["NOT_YET", "Record", "no_fit", "recorded"]

NOT_YET = "not fitted yet: the run was interrupted. Call fit_many with the same store again."
"""The reason why there is no fit where none was tried."""

_DRAWS = 1024
"""Weighted draws kept with a fit; more are made when they are asked for."""


@dataclass(frozen=True)
class Record:
    """What came of one observation.

    Attributes:
        content: JSON values.
        tensors: by the names that `content` uses.
    """

    content: Any
    tensors: Mapping[str, Tensor]

    @property
    def has_fit(self) -> bool:
        """Whether there is a q at all."""
        return self.content["fit"] is not None

    @property
    def report(self) -> Report:
        """The certificate."""
        return Decoder(VOCABULARY, self.tensors, {}).decode(self.content["report"])

    def posterior(self, template: VIPosterior, x: Tensor, options: TrainOptions) -> VIPosterior:
        """The posterior of x, as `VIPosterior.train` takes it.

        Raises:
            ValueError: there is no fit.
        """
        if not self.has_fit:
            raise ValueError(f"There is no fit to this observation: {self.report.sentence}")
        coords, device = template.coordinates, template.coordinates.low.device
        stand_in = copy.deepcopy(template.q, {id(coords): coords})
        given = {"q": stand_in, "parameters": None, "modules": None}
        parts = Decoder(_relative(coords), self.tensors, given).decode(self.content["fit"])
        family = parts["family"]
        family = (family.made(coords) if isinstance(family, UsersFamily) else family).to(device)
        options = replace(options, seed=parts["seed"])
        if parts["draws"] is not None:
            fit: Any = AutoFit(family, x, parts["trace"], options, self.report, parts["draws"]).to(device)
        else:
            optimizer, scheduler = make_optimizer(family, options)
            method, trace = parts["method"], parts["trace"]
            fit = SingleFit(family, x, trace, options, method, optimizer, scheduler, self.report)
        return template.sibling(fit)


def recorded(template: VIPosterior, fit: SingleFit | AutoFit) -> Record:
    """What is kept of a fit that has its report.

    Args:
        template: it was made from.
        fit: in the template's coordinates.
    """
    encoder = Encoder(_relative(template.coordinates))
    parts = {
        "family": Otherwise(fit.family, UsersFamily.of(fit.family)),
        "trace": fit.trace,
        "method": fit.method,
        "seed": None if fit.options.seed is None else int(fit.options.seed),
        "draws": _first(fit.draws) if isinstance(fit, AutoFit) else None,
    }
    content = {"fit": encoder.encode(parts, "fit"), "report": encoder.encode(fit.report, "report")}
    return Record(content, encoder.tensors)


def no_fit(reason: str) -> Record:
    """For an observation without a fit."""
    nan = math.nan
    report = Report("failed", nan, 0.0, 0.0, nan, nan, nan, 0, 0, reason, stop_reason=reason)
    encoder = Encoder(VOCABULARY)
    return Record({"fit": None, "report": encoder.encode(report, "report")}, encoder.tensors)


def _first(draws: WeightedDraws) -> WeightedDraws:
    """The first of draws that are in no order: they are draws of the same q."""
    return WeightedDraws(*(each[:_DRAWS].clone() for each in (draws.theta, draws.log_p, draws.log_q)))


def _relative(coords: Coordinates) -> Vocabulary:
    """The vocabulary of files, in which these very coordinates need not be stored."""

    def fields(found: Coordinates) -> dict[str, Any]:
        if found is not coords:
            raise Unstorable("a family with coordinates of its own")
        return {}

    kinds = [kind for kind in VOCABULARY.kinds if kind.type is not Coordinates]
    return Vocabulary(
        (*kinds, Kind("TemplateCoordinates", Coordinates, fields, lambda: coords)), VOCABULARY.names
    )
