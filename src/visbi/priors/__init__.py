"""What is believed before the data: prior distributions and the maps from their supports to R^d."""

from visbi.priors.distributions import BoxUniform, MultipleIndependent, as_prior
from visbi.priors.transforms import coordinates, mcmc_transform
from visbi.priors.truncated_normal import TruncatedNormal

__all__ = [
    "BoxUniform",
    "MultipleIndependent",
    "TruncatedNormal",
    "as_prior",
    "coordinates",
    "mcmc_transform",
]
