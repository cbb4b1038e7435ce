"""`VIPosterior`: a posterior fitted by variational inference to a potential.

The class is thin: it checks what comes in, keeps what belongs to one posterior (potential, prior,
coordinates, family, state) and hands the work to the rooms of the house.

References:
    Glöckler, Deistler, Macke: Variational methods for simulation-based inference. ICLR 2022.
    Wiqvist, Frellsen, Picchini: Sequential neural posterior and likelihood approximation. 2021.
"""

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.report import FitError, Report
from visbi.certificate.weights import MIN_DRAWS
from visbi.core.checks import checked_shape, finite_tensor, floating_tensor, one_of, positive_int, violation
from visbi.core.devices import move
from visbi.core.random import fresh_seed, seeded
from visbi.core.types import LogDensity, Seed, Shape, ZScore
from visbi.correcting import POOL, corrected, pool, pool_for
from visbi.families.base import Family, kept_inside
from visbi.families.custom import family_from
from visbi.families.names import FAMILY_NAMES, named_family
from visbi.fitting.amortized_config import AmortizedOptions, Choice, check_simulations
from visbi.fitting.config import AUTO, INIT_DRAWS, METHODS, QUALITY_METRICS, TrainOptions
from visbi.fitting.gradient import Trace
from visbi.fitting.maximum import ascend
from visbi.fitting.single import Problem, fit_single
from visbi.fitting.state import AmortizedFit, AmortizedTrace, AutoFit, SingleFit, Untrained, same
from visbi.potentials.base import BasePotential
from visbi.potentials.custom import as_potential
from visbi.priors.distributions import as_prior
from visbi.priors.inverse import lasting
from visbi.priors.transforms import Coordinates, coordinates
from visbi.scoring import CERTIFICATE_DRAWS, Score, certificate, scored

if TYPE_CHECKING:  # these load zuko
    from visbi.families.conditional import ConditionalFamily
    from visbi.families.names import ZukoFlowType
    from visbi.fitting.parameters import VIPosteriorParameters

__all__ = ["VIPosterior"]

_DEFAULT = TrainOptions.DEFAULT
_AMORTIZED = AmortizedOptions.DEFAULT
_BEFORE_AUTO = "gaussian"  # what q is until q="auto" has found another
_SAVED_OPTIONS = {  # plain values by their names in a file
    "device": "_device",
    "method": "_method",
    "warm": "_warm",
    "automatic": "_automatic",
    **{name: name for name in ("num_transforms", "hidden_features", "z_score_theta", "z_score_x")},
}
_SAVED_LATER = {"automatic": False}  # options that older files lack


class VIPosterior:
    """A variational posterior over theta given x.

    Args:
        potential_fn: log p(theta | x) + const: a `BasePotential`, one of the `sbi` package, or a callable
            (theta (N, D), x_o) -> (N,).
        prior: over theta, event_shape (D,); None takes the potential's, or that of a `VIPosterior` given as
            `q`.
        q: the variational family: "auto", which finds one by itself and corrects its draws; a name
            (`visbi.families.FAMILY_NAMES`), a Distribution with trainable parameters, a `VIPosterior` to
            start from, or a callable (event_shape, link_transform, device) -> Distribution.
        theta_transform: a map from the prior's support to R^d; None derives one from the prior.
        vi_method: the divergence: "rKL", "fKL", "IW" or "alpha".
        device: where everything lives.
        x_shape: deprecated and ignored.
        parameters, modules: what to train, for a `q` that does not say.
        num_transforms, hidden_features: layers and width of flows.
        z_score_theta: the coordinates flows live in: "none", "independent" or "structured".
        z_score_x: how x is standardised in amortised fits.

    Raises:
        ValueError: an unknown name, or a prior that cannot be found or has no support.
        TypeError: an object of the wrong kind.

    >>> from visbi.priors import BoxUniform
    >>> prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
    >>> def potential(theta, x_o):
    ...     return -0.5 * ((theta - x_o) / 0.5).square().sum(-1)
    >>> posterior = VIPosterior(potential, prior, q="gaussian")
    >>> options = dict(learning_rate=0.05, max_num_iters=200, seed=0, show_progress_bar=False)
    >>> posterior = posterior.train(torch.zeros(1, 2), **options)
    >>> posterior.report.status
    'ok'
    >>> posterior.sample((100,)).shape
    torch.Size([100, 2])
    """

    def __init__(
        self,
        potential_fn: Any,
        prior: Distribution | None = None,
        q: Any = "maf",
        theta_transform: Transform | None = None,
        vi_method: str = "rKL",
        device: str | torch.device = "cpu",
        x_shape: torch.Size | None = None,
        parameters: Iterable[Tensor] | None = None,
        modules: Iterable[nn.Module] | None = None,
        num_transforms: int = 5,
        hidden_features: int = 50,
        z_score_theta: ZScore = "independent",
        z_score_x: ZScore = "independent",
    ) -> None:
        if x_shape is not None:
            warnings.warn("`x_shape` is deprecated and ignored.", DeprecationWarning, stacklevel=2)
        self.prior = _find_prior(prior, potential_fn, q)
        self.potential_fn: BasePotential = as_potential(potential_fn)
        if self.potential_fn.prior is None:
            self.potential_fn.prior = self.prior
        self._device = str(device)
        self.num_transforms = positive_int("num_transforms", num_transforms)
        self.hidden_features = positive_int("hidden_features", hidden_features)
        self.z_score_theta: ZScore = z_score_theta
        self.z_score_x: ZScore = one_of("z_score_x", z_score_x, ("none", "independent", "structured"))  # type: ignore[assignment]
        self._coords = coordinates(self.prior, z_score=z_score_theta, theta_transform=theta_transform)
        self._state: Untrained | SingleFit | AutoFit | AmortizedFit
        self._map: Tensor | None
        x_o = self.potential_fn.return_x_o()
        self._x: Tensor | None = None if x_o is None else _observation(x_o)
        self.set_vi_method(vi_method)
        self.set_q(q, parameters=parameters, modules=modules)
        if vi_method != METHODS[0]:  # asked for: stands above that of a posterior given as q
            self.set_vi_method(vi_method)
        if self._device != "cpu":
            self.to(self._device)

    # -- what q is and how it is fitted ------------------------------------------------------------------

    @property
    def q(self) -> "Family | ConditionalFamily":
        """The variational family with its present weights; q(theta | x) after `train_amortized`."""
        return self._state.conditional if isinstance(self._state, AmortizedFit) else self._family

    @q.setter
    def q(self, q: Any) -> None:
        self.set_q(q)

    @property
    def automatic(self) -> bool:
        """Whether q is "auto": found by the fit itself."""
        return self._automatic

    @property
    def coordinates(self) -> Coordinates:
        """Coordinates of the prior's support, in which q is fitted."""
        return self._coords

    @property
    def fit(self) -> Untrained | SingleFit | AutoFit | AmortizedFit:
        """What it was fitted by."""
        return self._state

    def sibling(self, fit: SingleFit | AutoFit | None = None) -> "VIPosterior":
        """A posterior that shares potential, prior and coordinates with this one.

        Args:
            fit: what it was fitted by, in these coordinates; None: it is not fitted yet, and starts from a
                copy of this one's weights unless told to `retrain_from_scratch`.

        >>> from visbi.priors import BoxUniform
        >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
        >>> posterior = VIPosterior(lambda theta, x: -(theta - x).square().sum(-1), prior)
        >>> other = posterior.sibling()
        >>> other.prior is posterior.prior, other.q is posterior.q
        (True, False)
        """
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        made._state, made._map = (Untrained() if fit is None else fit), None
        if fit is None:
            made._family = copy.deepcopy(self._family, {id(self._coords): self._coords})
            made._warm = self._warm or not isinstance(self._state, Untrained)
        else:
            made._family, made._x, made._warm = fit.family, fit.x, False
        return made

    @property
    def theta_transform(self) -> Transform:
        """The map from the prior's support to unconstrained coordinates."""
        return self._coords.transform()

    @property
    def link_transform(self) -> Transform:
        """The inverse of `theta_transform`."""
        return self.theta_transform.inv

    @property
    def vi_method(self) -> str:
        """The divergence in use."""
        return self._method

    @vi_method.setter
    def vi_method(self, method: str) -> None:
        self.set_vi_method(method)

    def set_vi_method(self, method: str) -> "VIPosterior":
        """Choose the divergence: "rKL", "fKL", "IW" or "alpha". Returns self."""
        self._method = one_of("vi_method", method, METHODS)
        return self

    def set_q(
        self,
        q: Any,
        parameters: Iterable[Tensor] | None = None,
        modules: Iterable[nn.Module] | None = None,
    ) -> None:
        """Choose the variational family; see the class for what `q` may be.

        A `VIPosterior` given as `q` lends a copy of its weights, with its coordinates and its divergence; the
        two share nothing afterwards.

        Raises:
            ValueError: an unknown name, another D than the prior's, nothing to train, or `parameters` or
                `modules` for a q that brings its own.
        """
        if isinstance(q, str | VIPosterior | Family) and (parameters is not None or modules is not None):
            name = "modules" if parameters is None else "parameters"
            raise ValueError(violation(name, "None, since this q brings its own", "some"))
        automatic = q == AUTO if isinstance(q, str) else isinstance(q, VIPosterior) and q._automatic
        if isinstance(q, str) and q in (AUTO, *FAMILY_NAMES):
            family: Family = self._named(_BEFORE_AUTO if automatic else q)
        elif isinstance(q, VIPosterior):
            if isinstance(q._state, AmortizedFit):
                expected = "a posterior that was not amortised: q(theta | x) lends no q(theta)"
                raise ValueError(violation("q", expected, repr(q)))
            if q._family.event_shape != self.prior.event_shape:
                expected = f"a posterior over {self.prior.event_shape[0]} parameters, as the prior"
                raise ValueError(violation("q", expected, q._family.event_shape[0]))
            self._coords = copy.deepcopy(q._coords).to(self._device)
            self._method = q._method
            family = copy.deepcopy(q._family)
        elif callable(q) or callable(getattr(q, "log_prob", None)):
            family = family_from(q, self._coords, parameters=parameters, modules=modules, device=self._device)
        else:
            names = ", ".join(map(repr, (AUTO, *FAMILY_NAMES)))
            accepted = f"one of {names}, a Distribution, a VIPosterior or a callable"
            raise ValueError(violation("q", accepted, repr(q)))
        self._family = family.to(self._device)
        self._automatic = automatic
        self._state, self._map = Untrained(), None
        self._warm = isinstance(q, VIPosterior)  # a warm start is not moved back to the prior

    def _named(self, name: str) -> Family:
        return named_family(
            name, self._coords, num_transforms=self.num_transforms, hidden_features=self.hidden_features
        )

    # -- the observation ---------------------------------------------------------------------------------

    @property
    def default_x(self) -> Tensor | None:
        """The observation used where none is given."""
        return self._x

    @default_x.setter
    def default_x(self, x: Tensor) -> None:
        self.set_default_x(x)

    def set_default_x(self, x: Tensor) -> "VIPosterior":
        """Set the observation used where none is given; forgets the MAP of another one. Returns self."""
        self._x = _observation(x).to(self._device)
        self._map = None
        return self

    def _x_or_default(self, x: Tensor | None) -> Tensor | None:
        if x is not None:
            return _observation(x).to(self._device)
        if self._x is None and not _ignores_x(self.potential_fn):
            raise ValueError(violation("x", "an observation (pass x or call set_default_x)", None))
        return self._x

    # -- training ----------------------------------------------------------------------------------------

    def train(
        self,
        x: Tensor | None = None,
        n_particles: int = _DEFAULT.n_particles,
        learning_rate: float = _DEFAULT.learning_rate,
        gamma: float = _DEFAULT.gamma,
        max_num_iters: int = _DEFAULT.max_num_iters,
        min_num_iters: int = _DEFAULT.min_num_iters,
        clip_value: float = _DEFAULT.clip_value,
        warm_up_rounds: int = _DEFAULT.warm_up_rounds,
        retrain_from_scratch: bool = _DEFAULT.retrain_from_scratch,
        reset_optimizer: bool = _DEFAULT.reset_optimizer,
        show_progress_bar: bool = _DEFAULT.show_progress_bar,
        check_for_convergence: bool = _DEFAULT.check_for_convergence,
        quality_control: bool = _DEFAULT.quality_control,
        quality_control_metric: str = _DEFAULT.quality_control_metric,
        **kwargs: Any,
    ) -> "VIPosterior":
        """Fit q to the posterior of one observation. Returns self.

        Args:
            x: the observation; None uses the default one.
            n_particles: draws of q per step.
            learning_rate, gamma: of the first step, and its factor after every step.
            max_num_iters, min_num_iters: bounds on the number of steps.
            clip_value: largest norm of the gradient.
            warm_up_rounds: steps that move q onto the prior before a first fit.
            retrain_from_scratch: start from fresh weights.
            reset_optimizer: start with a fresh optimiser.
            show_progress_bar: show one.
            check_for_convergence: stop when the objective no longer improves.
            quality_control, quality_control_metric: score q afterwards ("psis", "prop", "prop_prior"); a bad
                score warns.
            **kwargs: `eps`, `retain_graph`, `optimizer`, `scheduler`, `alpha`, `K`, `stick_the_landing`,
                `dreg`, `weight_transform`, `init` (also an earlier `VIPosterior`), `seed`,
                `max_potential_evals`, `max_seconds`, `allow_failed`: see `visbi.fitting.TrainOptions`.

        With q="auto" there are no steps: only `init`, `seed`, `show_progress_bar`, `quality_control`,
        `retrain_from_scratch` and the last three have a meaning, and any other that is chosen warns.

        Raises:
            ValueError: a value out of range, x missing or not finite.
            TypeError: an unknown keyword.
            FitError: q="auto" found nothing that can be used; it carries the report and the best fit.
        """
        lender = kwargs.pop("init") if isinstance(kwargs.get("init"), VIPosterior) else None
        options = TrainOptions.from_keywords(
            {
                "n_particles": n_particles,
                "learning_rate": learning_rate,
                "gamma": gamma,
                "max_num_iters": max_num_iters,
                "min_num_iters": min_num_iters,
                "clip_value": clip_value,
                "warm_up_rounds": warm_up_rounds,
                "retrain_from_scratch": retrain_from_scratch,
                "reset_optimizer": reset_optimizer,
                "show_progress_bar": show_progress_bar,
                "check_for_convergence": check_for_convergence,
                "quality_control": quality_control,
                "quality_control_metric": quality_control_metric,
                **kwargs,
            }
        )
        x = self._state.rows(self._x_or_default(x))
        if self._automatic and options.seed is None:  # the report names one, by which the fit can be repeated
            options = replace(options, seed=fresh_seed())
        with seeded(options.seed):
            if lender is not None:
                options = replace(options, init=lender.sample((INIT_DRAWS,)))
            self._fit(x, options)
            self._map = self._map if same(x, self._x) else None
            self._x = x
            if self._automatic and self.report.status == "failed" and not options.allow_failed:
                raise FitError(self.report, self)
            if options.quality_control:
                self._quality_control(options.quality_control_metric)
        return self

    def _fit(self, x: Tensor | None, options: TrainOptions) -> None:
        log_p = self._log_p(x)
        self._probe(log_p)
        if isinstance(self._state, AmortizedFit):
            warnings.warn("train() replaces the amortised fit by one to a single observation.", stacklevel=3)
            self._state, self._map = Untrained(), None
        problem = self._problem(x)
        if self._automatic:
            self._find(problem, x, options)
            return
        before = self._state if isinstance(self._state, SingleFit) else None
        fit = fit_single(self._family, problem, self._method, options, before=before, warm=self._warm)
        self._family, self._warm = fit.family, False
        self._state = replace(fit, x=x)

    def _find(self, problem: Problem, x: Tensor | None, options: TrainOptions) -> None:
        from visbi.fitting.auto import fit_auto, idle_options

        idle = ["vi_method"] if self._method != METHODS[0] else []
        if idle := [*idle, *idle_options(options)]:
            names = ", ".join(f"`{name}`" for name in idle)
            warnings.warn(f"{names}: of no use to q='auto', which takes no steps of this kind.", stacklevel=4)
        begun = self._warm or isinstance(self._state, AutoFit)
        earlier = self._family if begun and not options.retrain_from_scratch else None
        fit = fit_auto(problem, x, options, earlier=earlier)
        self._family, self._state, self._warm = fit.family, fit, False

    def _problem(self, x: Tensor | None) -> Problem:
        return Problem(self._log_p(x), self._log_prior, self._coords)

    def _probe(self, log_p: LogDensity) -> None:
        """Evaluate the potential once, so that a wrong shape shows before any fit."""
        # q="auto" starts from the same random numbers whatever q there is
        with torch.no_grad(), seeded(fresh_seed() if self._automatic else None):
            log_p(self._family.sample((2,)))

    def _log_p(self, x: Tensor | None) -> LogDensity:
        def log_p(theta: Tensor) -> Tensor:
            return self.potential_fn.evaluate(theta, x)

        return log_p

    def _log_prior(self, theta: Tensor) -> Tensor:
        return self.prior.log_prob(theta)

    def train_amortized(
        self,
        theta: Tensor,
        x: Tensor,
        n_particles: int = _AMORTIZED.n_particles,
        learning_rate: float = _AMORTIZED.learning_rate,
        gamma: float = _AMORTIZED.gamma,
        max_num_iters: int = _AMORTIZED.max_num_iters,
        clip_value: float = _AMORTIZED.clip_value,
        batch_size: int = _AMORTIZED.batch_size,
        validation_fraction: float = _AMORTIZED.validation_fraction,
        validation_batch_size: int | None = _AMORTIZED.validation_batch_size,
        validation_n_particles: int | None = _AMORTIZED.validation_n_particles,
        stop_after_iters: int = _AMORTIZED.stop_after_iters,
        show_progress_bar: bool = _AMORTIZED.show_progress_bar,
        retrain_from_scratch: bool = _AMORTIZED.retrain_from_scratch,
        flow_type: "ZukoFlowType | str | None" = None,
        num_transforms: int | None = None,
        hidden_features: int | None = None,
        z_score_theta: ZScore | None = None,
        z_score_x: ZScore | None = None,
        params: "VIPosteriorParameters | None" = None,
        *,
        seed: Seed = None,
        embedding_net: nn.Module | None = None,
        objective: str = _AMORTIZED.objective,
    ) -> "VIPosterior":
        """Fit q(theta | x), one q for all x, to simulations. Returns self.

        A second call trains on, unless `retrain_from_scratch` or another choice of what to build asks for
        fresh weights. What is not chosen is taken from `params`, then from the fit that is trained on, then
        from the instance.

        Args:
            theta: parameters of the simulations, (N, D), drawn from the prior: checked, but the ELBO learns
                from draws of its own.
            x: their observations, (N, ...); each row is one observation.
            n_particles: draws of q per x.
            learning_rate, gamma: of the first step, and its factor after every step.
            max_num_iters: largest number of steps.
            clip_value: largest norm of the gradient.
            batch_size: x per step.
            validation_fraction: share of the x that are held out, in (0, 1).
            validation_batch_size, validation_n_particles: held-out x looked at after every step, and draws
                for each; None: as in a step.
            stop_after_iters: steps without a lower held-out loss that end the fit.
            show_progress_bar: show one.
            retrain_from_scratch: start from fresh weights.
            flow_type: the family: a name of `families.CONDITIONAL_NAMES` or a `ZukoFlowType`; with q="auto"
                "maf" unless another is named.
            num_transforms, hidden_features: layers and width of its networks.
            z_score_theta, z_score_x: its coordinates, and how x is standardised.
            params: several of the above in one value.
            seed: makes the fit repeatable and leaves torch's global generator alone.
            embedding_net: applied to standardised x (M, ...), gives (M, features); copied, then trained.
            objective: "elbo" (draws of q and the potential), "forward" (minus log q of the simulations:
                covers all of a posterior, needs no potential, wants theta from the prior), or "mixed" (that,
                then the sum of both). With "forward", and in the first stage of "mixed", a step is a pass
                over the simulations in batches of `batch_size`, and the held-out loss is that of all held-out
                ones unless `validation_batch_size` is given; its quick family is flow_type="coupling".

        Raises:
            ValueError: theta and x of different lengths, none, not finite, another D than the prior's, an
                unknown name, a value out of range, or theta outside the prior's support where q learns from
                it.
            TypeError: an argument of the wrong kind.

        >>> from visbi.priors import BoxUniform
        >>> prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
        >>> def potential(theta, x):
        ...     return -0.5 * ((theta - x) / 0.5).square().sum(-1)
        >>> theta = prior.sample((200,))
        >>> x = theta + 0.5 * torch.randn_like(theta)
        >>> options = dict(flow_type="gaussian", max_num_iters=10, show_progress_bar=False)
        >>> posterior = VIPosterior(potential, prior).train_amortized(theta, x, **options)
        >>> posterior.sample((7,), x[:3]).shape, posterior.log_prob(theta[:3], x[:3]).shape
        (torch.Size([7, 3, 2]), torch.Size([3]))
        """
        from visbi.fitting.amortized import amortize  # loads zuko

        options = AmortizedOptions(
            n_particles=n_particles,
            learning_rate=learning_rate,
            gamma=gamma,
            max_num_iters=max_num_iters,
            clip_value=clip_value,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            validation_batch_size=validation_batch_size,
            validation_n_particles=validation_n_particles,
            stop_after_iters=stop_after_iters,
            show_progress_bar=show_progress_bar,
            retrain_from_scratch=retrain_from_scratch,
            seed=seed,
            objective=objective,
        )
        choice = Choice(flow_type, num_transforms, hidden_features, z_score_theta, z_score_x)
        family = None if self._automatic else self._family
        instance = Choice(
            family, self.num_transforms, self.hidden_features, self.z_score_theta, self.z_score_x
        )
        fit = amortize(
            (theta, x),
            self.potential_fn,
            self.prior,
            self._coords,
            options,
            choices=(choice, params, instance),
            method=self._method,
            embedding_net=embedding_net,
            before=self._state,
        )
        if isinstance(self._state, SingleFit | AutoFit):  # q(theta) goes back to its start, if it can
            with contextlib.suppress(ValueError):
                fresh = self._named(_BEFORE_AUTO) if self._automatic else self._family.fresh()
                self._family = fresh.to(self._device)
        self._state, self._map = fit, None
        return self

    # -- using the fit -----------------------------------------------------------------------------------

    def _fitted(self, x: Tensor | None) -> SingleFit | AutoFit | AmortizedFit:
        """The fit for x, or for the default x where none is given."""
        return self._state.at(self._x if x is None else _observation(x).to(self._device))

    def sample(
        self,
        sample_shape: Shape = (),
        x: Tensor | None = None,
        show_progress_bars: bool = True,
        *,
        correct: bool | None = None,
    ) -> Tensor:
        """Draws of q, (*sample_shape, D); of an amortised q at many x, (*sample_shape, num_obs, D).

        After a fit with q="auto" they are corrected: taken from a pool of draws of q, kept for later calls,
        by their importance weights. An amortised q is corrected at each x by weights of new draws; where
        those are not sound, a q of that x alone is found by the ladder, from draws of q(. | x), and its draws
        are taken. That warns where even they are not certified.

        Args:
            sample_shape: shape of the draws; () gives one of shape (D,).
            x: the observation q was fitted to, or None; for an amortised q one or many, (num_obs, ...).
            show_progress_bars: unused, drawing is one call.
            correct: whether to correct; None: after q="auto".

        Raises:
            ValueError: before training; for another x, be it the default one; x missing or of another shape;
                nothing to correct with, because the potential is finite at no draw.
            TypeError: `sample_shape` is no shape.
        """
        fit, shape = self._fitted(x), checked_shape("sample_shape", sample_shape)
        if not (fit.corrects if correct is None else correct):
            return fit.sample(shape)
        if self._coords.low.is_meta:  # no weights there
            return fit.sample(shape)
        if isinstance(fit, AmortizedFit):
            return self._corrected_at_each(shape, fit).squeeze(-2)  # the axis of a single x
        seed = fresh_seed()
        draws = pool_for(shape.numel(), fit, self._log_p(fit.x), seed)
        self._state = replace(fit, draws=draws)
        return corrected(draws, shape, seed)

    def _corrected_at_each(self, shape: torch.Size, fit: AmortizedFit) -> Tensor:
        from visbi.amortized import corrected_at_each  # loads the ladder

        return corrected_at_each(shape, fit, self.potential_fn, self._problem)

    def weighted_sample(self, n: int = 10_000, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws of q with the weights that make them draws of the posterior.

        Args:
            n: how many.
            x: the observation q was fitted to, or None.

        Returns:
            theta (n, D) and the logarithms (n,) of smoothed weights, which add up to one.

        Raises:
            ValueError: before training; for another x; for an amortised q, or fewer than 25 draws.
        """
        n = _enough_draws("n", n)
        fit = _of_one_observation("weighted_sample", self._fitted(x))
        draws = pool(fit, self._log_p(fit.x), n)
        self._state = replace(fit, draws=draws)
        draws = WeightedDraws(draws.theta[:n], draws.log_p[:n], draws.log_q[:n])
        return draws.theta, draws.log_weights

    def sample_batched(
        self,
        sample_shape: Shape,
        x: Tensor,
        max_sampling_batch_size: int = 10_000,
        show_progress_bars: bool = True,
        *,
        correct: bool = False,
    ) -> Tensor:
        """Draws of an amortised q for many observations, (*sample_shape, num_obs, D).

        Args:
            sample_shape: shape of the draws for each observation.
            x: observations (num_obs, ...).
            max_sampling_batch_size: draws, over all observations, in one pass.
            show_progress_bars: unused.
            correct: whether to correct them, as `sample` does.

        Raises:
            NotImplementedError: q was fitted to one observation.
            ValueError: before training, or x of another shape.
        """
        at_once = positive_int("max_sampling_batch_size", max_sampling_batch_size)
        if isinstance(self._state, AmortizedFit):
            fit = self._state.at(_observation(x).to(self._device))
            shape = checked_shape("sample_shape", sample_shape)
            return self._corrected_at_each(shape, fit) if correct else fit.sample_batched(shape, at_once)
        raise NotImplementedError(
            "This q belongs to one observation. Use train_amortized() before sample_batched(), "
            "or RefittingPosterior(posterior), which fits a q to each observation."
        )

    def log_prob(
        self,
        theta: Tensor,
        x: Tensor | None = None,
        track_gradients: bool = False,
        *,
        normalized: str = "q",
    ) -> Tensor:
        """log q(theta), (batch,), for theta (batch, D); -inf outside the prior's support.

        `normalized="potential"` gives the potential less the log-evidence that q found instead: the
        posterior's own density, as exact as that number.

        For an amortised q, log q(theta | x): theta (batch, D) and x (batch, ...), or one row in either.

        Raises:
            ValueError: before training, for another x, for theta of another length, or numbers of rows that
                do not fit; a fit that found no log-evidence to normalise by.
        """
        one_of("normalized", normalized, ("q", "potential"))
        fit, theta = self._fitted(x), self._theta(theta)
        with torch.set_grad_enabled(track_gradients):
            if normalized == "potential":
                _of_one_observation("normalized", fit)
                contained, safe = kept_inside(self._coords, theta)
                evidence = self.report.log_evidence
                if not math.isfinite(evidence):
                    raise ValueError(violation("normalized", "a fit with a finite log-evidence", evidence))
                values = self._log_p(fit.x)(safe).double() - evidence
                return torch.where(contained, values, -torch.inf).to(theta.dtype)
            return fit.log_prob(theta).to(theta.dtype)

    def potential(self, theta: Tensor, x: Tensor | None = None, track_gradients: bool = False) -> Tensor:
        """The potential log p(theta | x) + const, (batch,), for theta (batch, D)."""
        theta = self._theta(theta)
        with torch.set_grad_enabled(track_gradients):
            return self.potential_fn.evaluate(theta, self._state.rows(self._x_or_default(x)))

    def map(
        self,
        x: Tensor | None = None,
        num_iter: int = 1000,
        num_to_optimize: int = 100,
        learning_rate: float = 0.01,
        init_method: str | Tensor = "proposal",
        num_init_samples: int = 10_000,
        save_best_every: int = 10,
        show_progress_bars: bool = False,
        force_update: bool = False,
    ) -> Tensor:
        """The maximum a posteriori, (1, D), by gradient ascent from the best of many starts.

        It is kept until x changes.

        Args:
            x: the observation; None uses the default one.
            num_iter, learning_rate, save_best_every: of the ascent.
            num_to_optimize: how many of the starts are followed.
            init_method: "posterior" (or "proposal") and "prior" draw `num_init_samples` starts; a tensor (N,
                D) is used as it is.
            show_progress_bars: show one.
            force_update: search again although a value is kept.

        Ctrl-C ends the search and keeps the best so far.
        """
        x, default = (self._state.rows(each) for each in (self._x_or_default(x), self._x))
        if self._map is None or force_update or not same(x, default):
            best, _ = ascend(
                self._log_p(x),
                self._coords,
                self._starts(x, init_method, positive_int("num_init_samples", num_init_samples)),
                num_iter=num_iter,
                num_to_optimize=num_to_optimize,
                learning_rate=learning_rate,
                save_best_every=save_best_every,
                show_progress_bars=show_progress_bars,
            )
            if not same(x, default):
                return best[None]
            self._map = best[None]
        return self._map

    def _starts(self, x: Tensor | None, init_method: str | Tensor, n: int) -> Tensor:
        if isinstance(init_method, Tensor):
            return self._theta(finite_tensor("init_method", init_method))
        one_of("init_method", init_method, ("proposal", "posterior", "prior"))
        if init_method == "prior":
            return self.prior.sample(torch.Size([n]))
        return self._state.latest(x).family.sample((n,))

    # -- how good it is ----------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace | AmortizedTrace:
        """How the objective went during the last fit."""
        return self._state.trace

    @property
    def report(self) -> Report:
        """The certificate of the last fit, of an amortised one at the default x; made on first use."""
        state = self._state.latest(self._x)
        if state.report is None:
            n = POOL if isinstance(state, AmortizedFit) else CERTIFICATE_DRAWS  # as `certify` has it
            state = replace(state, report=self._certify(n))
            self._state = state
        return state.report

    def certify(self, x: Tensor | None = None, *, n_draws: int = POOL) -> list[Report]:
        """The certificate of q at each observation: a list with one report for each.

        Of an amortised q a report says "ok" where draws may be used as they are, "corrected" where those of
        `sample(..., correct=True)` may, and "suspect" or "failed" where that will look for a q of that x
        alone, as `refine` does. Of a fit to one observation it is what `report` says, from new draws.

        Args:
            x: observations (num_obs, ...), or one; None: the default one.
            n_draws: of q at each.

        Raises:
            ValueError: before training; x of another shape, or not the one that q was fitted to; fewer than
                25 draws.

        >>> from visbi.priors import BoxUniform
        >>> prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
        >>> def potential(theta, x):
        ...     return -0.5 * ((theta - x) / 0.5).square().sum(-1)
        >>> theta = prior.sample((500,))
        >>> x = theta + 0.5 * torch.randn_like(theta)
        >>> options = dict(flow_type="gaussian", max_num_iters=3, show_progress_bar=False)
        >>> posterior = VIPosterior(potential, prior)
        >>> posterior = posterior.train_amortized(theta, x, objective="forward", **options)
        >>> tuple(report.n_draws for report in posterior.certify(x[:3], n_draws=1000))
        (1000, 1000, 1000)
        """
        n_draws = _enough_draws("n_draws", n_draws)
        return self._certificates(self._fitted(x), n_draws)

    def stack(self, theta: Tensor, x: Tensor, *, n_draws: int = 256) -> float:
        """Let simulations that nothing was trained on say what `sample(..., correct=True)` shall draw from.

        A learned potential is an estimate, and so is a q that was trained on simulations. Corrected draws are
        from then on those of exp(potential)^a q^(1 - a), with the a of [0, 1] under which the given
        simulations are most probable; of the potential, as before, unless another a is better beyond doubt.
        What `certify` says stays about the potential.

        Args:
            theta, x: some hundred simulations (M, D) and (M, ...), with theta from the prior, that neither q
                nor the potential has seen.
            n_draws: of q at each x, from which p_a gets its constant.

        Returns:
            a.

        Raises:
            ValueError: q was not amortised; theta and x as for `train_amortized`; the potential or q is not
                finite at most of them.

        Source: Yao, Regaldo-Saint Blancard, Domke: Simulation-based stacking. 2023.

        >>> from visbi.priors import BoxUniform
        >>> prior = BoxUniform(-3 * torch.ones(1), 3 * torch.ones(1))
        >>> def too_narrow(theta, x):
        ...     return -0.5 * ((theta - x) / 0.1).square().sum(-1)
        >>> theta = prior.sample((1000,))
        >>> x = theta + 0.5 * torch.randn_like(theta)
        >>> options = dict(flow_type="gaussian", objective="forward", show_progress_bar=False, seed=0)
        >>> posterior = VIPosterior(too_narrow, prior).train_amortized(theta[:700], x[:700], **options)
        >>> posterior.stack(theta[700:], x[700:]) < 0.1
        True
        """
        if not isinstance(self._state, AmortizedFit):
            raise ValueError(violation("stack", "an amortised fit", self._state.described))
        from visbi.amortized import share_of_potential  # loads the ladder

        theta, x = check_simulations(theta, x, self._coords.dim_theta, self._device)
        n_draws = _enough_draws("n_draws", n_draws)
        share = share_of_potential(self._state, self.potential_fn, theta, x, n_draws)
        self._state = replace(self._state, share=share)
        return share

    def refine(self, x: Tensor | None = None, **train: Any) -> "VIPosterior":
        """A posterior of one observation alone, found by the ladder of q="auto" from draws of q(. | x).

        This one is not changed; the two share the potential.

        Args:
            x: the observation; None uses the default one.
            **train: keywords of `train` that concern q="auto", such as `seed` or `max_seconds`. There is no
                progress bar unless `show_progress_bar=True`.

        Raises:
            ValueError: q was not amortised; x missing, several or of another shape.
            FitError, TypeError: as for `train`.

        >>> from visbi.priors import BoxUniform
        >>> prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
        >>> def potential(theta, x):
        ...     return -0.5 * ((theta - x) / 0.5).square().sum(-1)
        >>> theta = prior.sample((100,))
        >>> options = dict(flow_type="gaussian", max_num_iters=1, show_progress_bar=False)
        >>> posterior = VIPosterior(potential, prior).train_amortized(theta, theta, **options)
        >>> posterior.refine(torch.zeros(2), seed=0).report.status
        'ok'
        """
        fit = self._fitted(x)
        if not isinstance(fit, AmortizedFit):
            raise ValueError(violation("refine", "an amortised fit", "one to a single observation"))
        if "init" in train:
            raise TypeError(violation("init", "no start: it is drawn from q(theta | x)", "one"))
        lender = copy.copy(self)
        lender._x = fit.family.x  # type: ignore[assignment]
        posterior = VIPosterior(self.potential_fn, self.prior, q=AUTO, device=self._device)
        posterior._coords, posterior.z_score_theta = copy.deepcopy(self._coords), self.z_score_theta
        return posterior.train(lender._x, init=lender, **{"show_progress_bar": False, **train})

    def evaluate(self, quality_control_metric: str = "psis", N: int = CERTIFICATE_DRAWS) -> Report:  # noqa: N803
        """Score q, print the score and return the report, of an amortised q that of `certify`.

        Args:
            quality_control_metric: "psis" (k-hat of the importance weights), "prop" or "prop_prior" (is q
                proportional to the potential at draws of q, of the prior).
            N: number of draws.
        """
        one_of("quality_control_metric", quality_control_metric, QUALITY_METRICS)
        N = _enough_draws("N", N)
        score = self._score(quality_control_metric, self._certify(N), N)
        print(score.line)
        return score.report

    def _certify(self, n: int) -> Report:
        fit = self._state.latest(self._x)
        _ = fit.family  # says so where there are several observations
        return self._certificates(fit, n)[0]

    def _certificates(self, fit: SingleFit | AutoFit | AmortizedFit, n: int) -> list[Report]:
        if isinstance(fit, AmortizedFit):
            from visbi.amortized import certificates  # loads the ladder

            return certificates(fit, self.potential_fn, n)
        return [certificate(fit, self._log_p(fit.x), n)]

    def _score(self, metric: str, report: Report, n: int) -> Score:
        fit = self._state.latest(self._x)
        return scored(metric, report, fit, self._log_p(fit.x), self.prior, n)

    def _quality_control(self, metric: str) -> None:
        score = self._score(metric, self.report, CERTIFICATE_DRAWS)
        if score.poor:
            warnings.warn(f"Quality of q: {score.brief}. {score.advice}", stacklevel=3)

    # -- moving and printing -----------------------------------------------------------------------------

    def to(self, device: str | torch.device) -> "VIPosterior":
        """Move everything, cached values and the optimiser's state included, to `device`. Returns self."""
        self._device = str(device)
        shared = self.potential_fn.prior is self.prior
        self.potential_fn.to(device)
        moved = self.potential_fn.prior if shared else None
        self.prior = move(self.prior, device) if moved is None else moved
        self._coords = self._coords.to(device)
        self._family = self._family.to(device)
        self._x = None if self._x is None else self._x.to(device)
        self._map = None if self._map is None else self._map.to(device)
        self._state = self._state.to(device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this posterior, fitted or not, to one file of tensors and JSON: no pickle, no code.

        What is a user's own code (a callable potential, a prior or q of a class of one's own, a network that
        embeds, an optimiser) is not in it; `load` asks for it by keyword.

        Args:
            path: where; a file there is replaced, by a whole one or not at all.

        Raises:
            OSError: it cannot be written.
        """
        from visbi.saving import Parts, save_parts

        options = {name: getattr(self, attribute) for name, attribute in _SAVED_OPTIONS.items()}
        parts = Parts(
            prior=self.prior,
            potential=self.potential_fn,
            coords=self._coords,
            family=self._family,
            fit=None if isinstance(self._state, Untrained) else self._state,
            options=options,
            x=self._x,
            map=self._map,
        )
        save_parts(path, parts, z_score=self.z_score_theta)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        **what_cannot_be_stored: Any,
    ) -> "VIPosterior":
        """The posterior in a file that `save` wrote: same draws from the same seed, trained on alike.

        Args:
            path: the file; code in it is never run.
            device: where to put it; None: where it was.
            **what_cannot_be_stored: what the file lacks, as it was: `potential_fn`, `prior`,
                `theta_transform`, `q` (its tensors are overwritten by the stored ones) with `parameters` or
                `modules`, `theta_embedding_net`, `embedding_net`, `q_embedding_net` (as `train_amortized`
                got it), `optimizer`, `scheduler`, `weight_transform` (the last three may be None, to do
                without). The error that comes without them lists them.

        Raises:
            OSError: no such file.
            ValueError: a damaged or foreign file, one of a newer version, or something missing.
            TypeError: a keyword that the file does not ask for.

        >>> import tempfile
        >>> from visbi.priors import BoxUniform
        >>> def potential(theta, x_o):
        ...     return -0.5 * (theta - x_o).square().sum(-1)
        >>> posterior = VIPosterior(potential, BoxUniform(-torch.ones(2), torch.ones(2)), q="gaussian")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     posterior.save(f"{folder}/posterior.visbi")
        ...     VIPosterior.load(f"{folder}/posterior.visbi", potential_fn=potential)
        VIPosterior(D=2, not fitted)
        """
        from visbi.saving import load_parts

        parts = load_parts(path, what_cannot_be_stored, options=_SAVED_OPTIONS.keys() - _SAVED_LATER.keys())
        posterior = cls.__new__(cls)
        posterior.prior, posterior.potential_fn = parts.prior, parts.potential
        posterior._coords, posterior._family = parts.coords, parts.family
        posterior._state = Untrained() if parts.fit is None else parts.fit
        posterior._x, posterior._map = parts.x, parts.map
        options = {**_SAVED_LATER, **parts.options}
        for name, attribute in _SAVED_OPTIONS.items():
            setattr(posterior, attribute, options[name])
        posterior._device, device = "cpu", posterior._device if device is None else device
        try:
            return posterior if str(device) == "cpu" else posterior.to(device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            expected = "a device that is here (the posterior was saved on another: pass device='cpu')"
            raise ValueError(violation("device", expected, repr(str(device)))) from error

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["prior"] = lasting(self.prior)
        state["potential_fn"] = potential = copy.copy(self.potential_fn)
        potential.prior = state["prior"] if potential.prior is self.prior else lasting(potential.prior)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        was, now = torch.device(self._device), self._coords.low.device
        if (was.type, was.index or 0) != (now.type, now.index or 0):  # torch.load(..., map_location=...)
            self.to(now)

    def __repr__(self) -> str:
        return f"VIPosterior(D={self._coords.dim_theta}, {self._state.described})"

    def _theta(self, theta: Any) -> Tensor:
        theta = floating_tensor("theta", theta, self._coords.low)
        theta = theta[None] if theta.ndim == 1 else theta
        if theta.ndim != 2 or theta.shape[-1] != self._coords.dim_theta:
            raise ValueError(
                violation("theta", f"shape (batch, {self._coords.dim_theta})", tuple(theta.shape))
            )
        return theta


def _find_prior(prior: Distribution | None, potential_fn: Any, q: Any) -> Distribution:
    for candidate in (prior, getattr(potential_fn, "prior", None), getattr(q, "prior", None)):
        if candidate is not None:
            return as_prior(candidate)
    raise ValueError(violation("prior", "a Distribution (neither `potential_fn` nor `q` carries one)", None))


def _observation(x: Any) -> Tensor:
    x = finite_tensor("x", x)
    return x[None] if x.ndim < 2 else x


def _ignores_x(potential: BasePotential) -> bool:
    """A plain callable may have its observation inside."""
    return hasattr(potential, "potential_fn")


def _enough_draws(name: str, n: int) -> int:
    n = positive_int(name, n)
    if n < MIN_DRAWS:
        raise ValueError(violation(name, f"at least {MIN_DRAWS} draws", n))
    return n


def _of_one_observation(name: str, fit: SingleFit | AutoFit | AmortizedFit) -> SingleFit | AutoFit:
    """`fit`, if it is one whose draws have weights."""
    if isinstance(fit, AmortizedFit):
        raise ValueError(violation(name, "a fit to one observation", "an amortised one"))
    return fit
