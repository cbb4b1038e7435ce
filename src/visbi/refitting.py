r"""A posterior that is fitted anew to every observation it is asked about.

q(theta) belongs to one observation. Diagnostics such as simulation-based calibration look at hundreds, and
ask for draws and densities at each. `RefittingPosterior` answers: it fits a q of its own to every
observation, always from the same start, so that no fit depends on those before it or on their order. With
q="auto", those of a batch are fitted side by side by `fit_many`, which is many times quicker; such a fit
depends on the batch that it was asked for in.

References:
    Talts, Betancourt, Simpson, Vehtari, Gelman: Validating Bayesian inference algorithms with
    simulation-based calibration. 2018.
"""

from typing import Any

import torch
from torch import Tensor

from visbi.core.checks import finite_tensor, violation
from visbi.core.progress import Progress
from visbi.core.types import Shape
from visbi.fitting.config import TrainOptions
from visbi.many import fit_many
from visbi.posterior import VIPosterior

__all__ = ["RefittingPosterior"]

# where they differ from those of `train`, for hundreds of fits
_DEFAULTS = {"retrain_from_scratch": True, "show_progress_bar": False, "quality_control": False}


class RefittingPosterior:
    """One fit for each observation, made when it is first asked for, and kept.

    Args:
        posterior: what to fit: its potential, prior, coordinates, family and divergence. It is not changed.
        **train: keywords of `VIPosterior.train`, for every fit. Unlike there, each starts from fresh weights
            unless `retrain_from_scratch=False`, which starts each from the weights of `posterior`; and there
            is no progress bar and no quality control unless asked for. With a `seed`, the same x gives the
            same fit.

    Raises:
        TypeError: `posterior` is no `VIPosterior`; an unknown keyword.
        ValueError: a keyword's value is out of range.

    >>> from visbi.priors import BoxUniform
    >>> def potential(theta, x_o):
    ...     return -0.5 * ((theta - x_o) / 0.5).square().sum(-1)
    >>> posterior = VIPosterior(potential, BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2)), q="gaussian")
    >>> refitting = RefittingPosterior(posterior, learning_rate=0.05, max_num_iters=200, seed=1)
    >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> refitting.sample_batched((500,), x, show_progress_bars=False).mean(0).round(decimals=0).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    >>> refitting.at(x[0]).report.status
    'ok'
    """

    def __init__(self, posterior: VIPosterior, **train: Any) -> None:
        if not isinstance(posterior, VIPosterior):
            raise TypeError(violation("posterior", "a VIPosterior", type(posterior).__name__))
        TrainOptions.from_keywords(train)  # what is wrong shows here, not at the first fit
        self.posterior = posterior
        self._train = {**_DEFAULTS, **train}
        self._fits: dict[Any, VIPosterior] = {}

    @property
    def prior(self) -> torch.distributions.Distribution:
        """The prior."""
        return self.posterior.prior

    def at(self, x: Tensor | None) -> VIPosterior:
        """The posterior fitted to x, (K,) or trials (T, ...) as for `VIPosterior.train`.

        Raises:
            ValueError: no x, or one that is not finite.
        """
        if x is None:
            raise ValueError(violation("x", "an observation", None))
        x, key = _named(x)
        if key not in self._fits:
            potential = self.posterior.potential_fn
            fit = VIPosterior(potential, self.prior, q=self.posterior, device=potential.device)
            self._fits[key] = fit.train(x, **self._train)
        return self._fits[key]

    def sample(
        self, sample_shape: Shape = (), x: Tensor | None = None, show_progress_bars: bool = True
    ) -> Tensor:
        """Draws of the q fitted to x, (*sample_shape, D); the last argument is unused."""
        return self.at(x).sample(sample_shape)

    def sample_batched(
        self,
        sample_shape: Shape,
        x: Tensor,
        max_sampling_batch_size: int = 10_000,
        show_progress_bars: bool = True,
    ) -> Tensor:
        """Draws at many observations, (*sample_shape, num_obs, D), each from its own q.

        Args:
            sample_shape: shape of the draws for each observation.
            x: observations (num_obs, K), or each of several trials (num_obs, T, ...).
            max_sampling_batch_size: unused, draws cost little beside the fits.
            show_progress_bars: show one over the observations.

        Raises:
            ValueError: no observations.
        """
        if not len(x):
            raise ValueError(violation("x", "at least one observation", "none"))
        if self.posterior.automatic and x.ndim == 2:
            self._fit_together(finite_tensor("x", x), show_progress_bars)
            show_progress_bars = False
        with Progress(show_progress_bars, x, desc="Fitting q to each observation") as each:
            return torch.stack([self.sample(sample_shape, row) for row in each], dim=-2)

    def _fit_together(self, x: Tensor, show_progress_bars: bool) -> None:
        """Fit those of x (num_obs, K) that are new; what cannot be fitted is left to raise by itself."""
        new = {key: row for row in x for _, key in [_named(row)] if key not in self._fits}
        if len(new) < 2:
            return
        told = {**self._train, "show_progress_bar": show_progress_bars, "quality_control": False}
        potential = self.posterior.potential_fn
        fits = fit_many(potential, self.prior, torch.stack(list(new.values())), self.posterior, **told)
        for i, key in enumerate(new):
            if fits.reports[i].status != "failed":
                self._fits[key] = fits[i]

    def log_prob(self, theta: Tensor, x: Tensor | None = None, track_gradients: bool = False) -> Tensor:
        """log q(theta), (batch,), of the q fitted to x, for theta (batch, D)."""
        return self.at(x).log_prob(theta, track_gradients=track_gradients)


def _named(x: Tensor) -> tuple[Tensor, Any]:
    """An observation as `VIPosterior.train` takes it, and what it is known by."""
    x = finite_tensor("x", x)
    x = x[None] if x.ndim < 2 else x
    return x, (tuple(x.shape), tuple(x.detach().cpu().flatten().tolist()))
