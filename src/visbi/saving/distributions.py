"""Distributions, transforms and constraints of torch and of `visbi.priors`, by what their constructors take.

A class is here if building it again from these arguments gives the same draws and densities to the last bit.
Subclasses of a user's own are not: what they add is code.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributions as td
from torch.distributions import constraints, transforms

from visbi.core.encoding import Kind
from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal
from visbi.priors.inverse import Inverted
from visbi.priors.simplex import StickBreaking

__all__ = ["CONSTRAINTS", "DISTRIBUTIONS", "TRANSFORMS"]

# argument names, which are attribute names too
_UNIVARIATE: dict[type, tuple[str, ...]] = {
    td.Beta: ("concentration1", "concentration0"),
    td.Cauchy: ("loc", "scale"),
    td.Chi2: ("df",),
    td.Exponential: ("rate",),
    td.FisherSnedecor: ("df1", "df2"),
    td.Gamma: ("concentration", "rate"),
    td.GeneralizedPareto: ("loc", "scale", "concentration"),
    td.Gumbel: ("loc", "scale"),
    td.HalfCauchy: ("scale",),
    td.HalfNormal: ("scale",),
    td.InverseGamma: ("concentration", "rate"),
    td.Kumaraswamy: ("concentration1", "concentration0"),
    td.Laplace: ("loc", "scale"),
    td.LogNormal: ("loc", "scale"),
    td.Normal: ("loc", "scale"),
    td.Pareto: ("scale", "alpha"),
    td.StudentT: ("df", "loc", "scale"),
    td.Uniform: ("low", "high"),
    td.VonMises: ("loc", "concentration"),
    td.Weibull: ("scale", "concentration"),
    TruncatedNormal: ("loc", "scale", "low", "high"),
}
_MULTIVARIATE: dict[type, tuple[str, ...]] = {
    td.Dirichlet: ("concentration",),
    td.LogisticNormal: ("loc", "scale"),
    td.LowRankMultivariateNormal: ("loc", "cov_factor", "cov_diag"),
    td.MultivariateNormal: ("loc", "scale_tril"),
    td.MixtureSameFamily: ("mixture_distribution", "component_distribution"),
    MultipleIndependent: ("dists", "arg_constraints"),
}
_PLAIN_TRANSFORMS: tuple[type, ...] = (
    transforms.ExpTransform,
    transforms.LowerCholeskyTransform,
    transforms.SigmoidTransform,
    transforms.SoftmaxTransform,
    transforms.SoftplusTransform,
    transforms.StickBreakingTransform,
    transforms.TanhTransform,
    StickBreaking,
)
_TRANSFORMS: dict[type, tuple[str, ...]] = {
    transforms.AffineTransform: ("loc", "scale", "event_dim"),
    transforms.CatTransform: ("transforms", "dim", "lengths"),
    transforms.ComposeTransform: ("parts",),
    transforms.IndependentTransform: ("base_transform", "reinterpreted_batch_ndims"),
    transforms.PowerTransform: ("exponent",),
    transforms.ReshapeTransform: ("in_shape", "out_shape"),
    transforms.StackTransform: ("transforms", "dim"),
}
_TRANSFORM_KEYWORDS = {"transforms": "tseq"}  # an argument whose attribute has another name
_CONSTRAINTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "cat": (constraints.cat, ("cseq", "dim", "lengths")),
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
    "independent": (constraints.independent, ("base_constraint", "reinterpreted_batch_ndims")),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "mixture": (constraints.MixtureSameFamilyConstraint, ("base_constraint",)),
    "stack": (constraints.stack, ("cseq", "dim")),
}


def _distribution(cls: type, arguments: Mapping[str, Callable[[Any], Any]]) -> Kind:
    def fields(dist: Any) -> dict[str, Any]:
        own = {name: read(dist) for name, read in arguments.items()}
        return {**own, "validate_args": vars(dist).get("_validate_args")}

    return Kind(cls.__name__, cls, fields, cls)


def _attributes(names: tuple[str, ...]) -> dict[str, Callable[[Any], Any]]:
    return {name: lambda value, name=name: getattr(value, name) for name in names}


def _box_fields(prior: BoxUniform) -> dict[str, Any]:
    base: Any = prior.base_dist
    return {"low": base.low, "high": base.high, "reinterpreted_batch_ndims": prior.reinterpreted_batch_ndims}


def _categorical_fields(dist: td.Categorical) -> dict[str, Any]:
    # what it was built from; the other of the two may be there as well
    name = "probs" if vars(dist)["_param"] is vars(dist).get("probs") else "logits"
    return {name: getattr(dist, name), "validate_args": vars(dist).get("_validate_args")}


def _categorical(validate_args: bool | None, **weights: Any) -> td.Categorical:
    dist = td.Categorical(**weights, validate_args=validate_args)
    for name, value in weights.items():
        setattr(dist, name, value)  # normalised already; once more may change the last digit
    return dist


DISTRIBUTIONS = (
    *(_distribution(cls, _attributes(names)) for cls, names in {**_UNIVARIATE, **_MULTIVARIATE}.items()),
    _distribution(
        td.Independent,
        {
            "base_distribution": lambda dist: dist.base_dist,
            "reinterpreted_batch_ndims": lambda dist: dist.reinterpreted_batch_ndims,
        },
    ),
    _distribution(
        td.TransformedDistribution,
        {"base_distribution": lambda dist: dist.base_dist, "transforms": lambda dist: dist.transforms},
    ),
    Kind("BoxUniform", BoxUniform, _box_fields, BoxUniform),
    Kind("Categorical", td.Categorical, _categorical_fields, _categorical),
)
"""Kinds of distributions."""


def _transform(cls: type, names: tuple[str, ...]) -> Kind:
    def fields(transform: Any) -> dict[str, Any]:
        own = {_TRANSFORM_KEYWORDS.get(name, name): getattr(transform, name) for name in names}
        cached = getattr(transform, "_cache_size", 0)
        return {**own, **({"cache_size": cached} if cached else {})}

    return Kind(cls.__name__, cls, fields, cls)


TRANSFORMS = (
    *(_transform(cls, ()) for cls in _PLAIN_TRANSFORMS),
    *(_transform(cls, names) for cls, names in _TRANSFORMS.items()),
    Kind("Inverted", Inverted, lambda t: {"forward": t.forward}, Inverted),
    Kind("Inverse", type(td.ExpTransform().inv), lambda t: {"forward": t.inv}, lambda forward: forward.inv),
)
"""Kinds of transforms."""

CONSTRAINTS = (
    Kind("real", type(constraints.real), lambda _: {}, lambda: constraints.real),
    Kind("simplex", type(constraints.simplex), lambda _: {}, lambda: constraints.simplex),
    *(
        Kind(name, cls, lambda c, names=names: {n: getattr(c, n) for n in names}, cls)
        for name, (cls, names) in _CONSTRAINTS.items()
    ),
)
"""Kinds of constraints."""
