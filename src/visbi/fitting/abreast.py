r"""The gradient loop for F fits of one named family abreast: each step one call for all of them.

The weights of F bodies of one make stand along a leading axis (`torch.func`), so that one vectorised call
draws from all of them, one call evaluates the potential of every observation at its own draws, and one
backward pass serves all. Everything that decides stays with each fit: a step whose loss or gradient is not
finite is skipped by that fit alone, its gradient is clipped by its own norm, and it stops by its own losses,
by the rule of `gradient`; it then leaves the group. Adam's arithmetic is entry by entry, so F of them are
one on stacked weights; it is written out here because a fit that skips a step must keep its own state, which
torch's optimisers, one count of steps for a tensor, cannot do.

The objective is the reverse KL with sticking the landing, the default one.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.optim.lr_scheduler import ExponentialLR

from visbi.core.random import seeded
from visbi.families.base import Body, LinkedFamily
from visbi.fitting.config import METHODS, TrainOptions
from visbi.fitting.gradient import (
    GIVE_UP,
    JUDGE,
    WINDOW,
    Trace,
    converged,
    no_higher,
    stopped_by_convergence,
    stopped_by_nan,
)
from visbi.fitting.together import JointDensity
from visbi.objectives.reverse_kl import reverse_kl_rows

__all__ = ["fit_abreast", "goes_abreast"]

_BETAS, _TINY = (0.9, 0.999), 1e-8  # Adam's, as torch has them


def goes_abreast(family: object, method: str, options: TrainOptions) -> bool:
    """Whether fits of this family, by this method and with these options, can be made side by side.

    It takes a named family whose bodies can be vectorised, the reverse KL with its default estimator, Adam
    with its exponential schedule, a start that does not depend on the observation, and no budget, which is
    each fit's own.
    """
    plain = (
        method == METHODS[0]
        and options.stick_the_landing is not False
        and options.dreg is None
        and options.optimizer is torch.optim.Adam
        and options.scheduler is ExponentialLR
        and options.max_potential_evals is None
        and options.max_seconds is None
        and not options.retain_graph
        and (isinstance(options.init, Tensor) or options.init == "prior")
    )
    return plain and isinstance(family, LinkedFamily) and _can_be_vectorised(family.body)


def _can_be_vectorised(body: Body) -> bool:
    stack = _Stack([copy.deepcopy(body), copy.deepcopy(body)])
    try:
        with seeded(0):  # whether this was tried must not change what is drawn afterwards
            z, _, path, _ = stack.draw(2)
        (z.sum() + path.sum()).backward()
    except Exception:  # noqa: BLE001 - what torch.func cannot do it says by errors of many kinds
        return False
    return True


class _Draw(nn.Module):
    """A body's draws as a module's forward pass, which is what `functional_call` calls."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, n: int) -> tuple[Tensor, ...]:
        z, log_q, path = self.body.draw(n, path=True)
        assert path is not None
        choice = self.body.log_prob_by_choice(z.detach())
        return (z, log_q, path) if choice is None else (z, log_q, path, choice)


class _Stack:
    """Bodies of one make, their weights stacked, with Adam's moments and means over the present window."""

    def __init__(self, bodies: Sequence[Body]) -> None:
        self._call = _Draw(copy.deepcopy(bodies[0]))
        stacked = stack_module_state([_Draw(body) for body in bodies])[0]
        self.weights = {name: value.detach().requires_grad_() for name, value in stacked.items()}
        self._fixed = dict(self._call.named_buffers())
        zeros = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.first, self.second = dict(zeros), dict(zeros)
        self.mean = dict(zeros)

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """z (F, n, d), log q, its path part, and its part by choices, if it has one, (F, n) each."""

        def one(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return functional_call(self._call, {**self._fixed, **weights}, (n,))

        found = torch.func.vmap(one, randomness="different")(self.weights)
        z, log_q, path, *choice = found
        return z, log_q, path, choice[0] if choice else None

    def gradient(self) -> dict[str, Tensor]:
        """Of all weights, and none left in them."""
        found = {
            name: w.grad if w.grad is not None else torch.zeros_like(w) for name, w in self.weights.items()
        }
        for weight in self.weights.values():
            weight.grad = None
        return found

    @torch.no_grad()
    def step(self, gradient: dict[str, Tensor], which: Tensor, steps: Tensor, rate: Tensor) -> None:
        """Adam's step of the fits `which` (F,), `steps` (F,) so far with this one, at rates (F,)."""
        for name, weight in self.weights.items():
            first = torch.lerp(self.first[name], gradient[name], 1 - _BETAS[0])
            second = torch.lerp(self.second[name], gradient[name].square(), 1 - _BETAS[1])
            mean, spread = (
                moment / _wide(1 - beta**steps, weight).to(weight)
                for moment, beta in zip((first, second), _BETAS, strict=True)
            )
            moved = weight - _wide(rate, weight).to(weight) * mean / (spread.sqrt() + _TINY)
            here = _wide(which, weight)
            weight.copy_(torch.where(here, moved, weight))
            self.first[name] = torch.where(here, first, self.first[name])
            self.second[name] = torch.where(here, second, self.second[name])

    @torch.no_grad()
    def remember(self, count: int) -> None:
        """Take the weights into the window's mean, as the `count`-th."""
        self.mean = {name: self.mean[name].lerp(w.detach(), 1 / count) for name, w in self.weights.items()}

    def only(self, which: Tensor) -> "_Stack":
        """The fits `which`, (F,) bool."""
        fewer = copy.copy(self)
        fewer.weights = {k: v.detach()[which].requires_grad_() for k, v in self.weights.items()}
        fewer.first, fewer.second, fewer.mean = (
            {k: v[which] for k, v in each.items()} for each in (self.first, self.second, self.mean)
        )
        return fewer

    def at_mean(self) -> "_Stack":
        """With the mean over the window as weights."""
        other = copy.copy(self)
        other.weights = {k: v.detach().clone().requires_grad_() for k, v in self.mean.items()}
        return other

    @torch.no_grad()
    def put_into(self, body: Body, i: int) -> None:
        """Fit i's weights into a body."""
        there = dict(_Draw(body).named_parameters())
        for name, weight in self.weights.items():
            there[name].copy_(weight[i])


def fit_abreast(families: Sequence[LinkedFamily], log_p: JointDensity, options: TrainOptions) -> list[Trace]:
    """Fit families of one make, each to its own potential, in place.

    Args:
        families: F of them, with equal coordinates; see `goes_abreast`.
        log_p: (theta (F', N, D), which (F',)) -> (F', N), the potentials `which` of all F.
        options: see `TrainOptions`.

    Returns:
        How each fit went.

    >>> from visbi.families import named_family
    >>> from visbi.priors import BoxUniform, coordinates
    >>> coords = coordinates(BoxUniform(-3 * torch.ones(1), 3 * torch.ones(1)))
    >>> places = torch.tensor([-1.0, 0.5])
    >>> def log_p(theta, which):
    ...     return -50 * (theta[..., 0] - places[which, None]).square()
    >>> families = [named_family("gaussian", coords) for _ in places]
    >>> traces = fit_abreast(families, log_p, TrainOptions(learning_rate=0.01))
    >>> [round(float(q.sample((1000,)).mean()), 1) for q in families]
    [-1.0, 0.5]
    """
    coords, n = families[0].coords, options.n_particles
    device = coords.low.device
    which = torch.arange(len(families), device=device)
    stack = _Stack([family.body for family in families])
    steps, in_a_row = torch.zeros(len(families)).to(which), torch.zeros(len(families)).to(which)
    losses: list[list[float]] = [[] for _ in families]
    excluded, skipped = [0] * len(families), [0] * len(families)
    reasons = [f"reached max_num_iters = {options.max_num_iters}"] * len(families)

    def objective(stack: _Stack, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Surrogates (F',), losses (F',), and draws that do not count (F',)."""
        z, log_q, path, choice = stack.draw(n)
        theta, ladj = coords.to_theta(z.flatten(0, 1))
        ladj = ladj.reshape(z.shape[:2])
        log_q, path = log_q.double() - ladj, path.double() - ladj
        theta = theta.reshape(*z.shape[:2], -1)
        return reverse_kl_rows(lambda t: log_p(t, which), theta, log_q, path, choice)

    for number in range(options.max_num_iters):
        surrogate, value, outside = objective(stack, which)
        torch.where(torch.isfinite(surrogate), surrogate, 0.0).sum().backward()
        gradient = stack.gradient()
        norm = sum(g.double().flatten(1).square().sum(1) for g in gradient.values())
        norm = torch.as_tensor(norm).sqrt()
        good = torch.isfinite(surrogate) & torch.isfinite(value) & torch.isfinite(norm)
        shrunk = (options.clip_value / (norm + 1e-6)).clamp_max(1.0)
        gradient = {k: g * _wide(shrunk, g).to(g) for k, g in gradient.items()}
        steps = steps + good.long()
        rate = options.learning_rate * options.gamma ** (steps - 1).double()
        stack.step(
            {k: g.nan_to_num(0.0, 0.0, 0.0) for k, g in gradient.items()},
            good,
            steps.double().clamp_min(1),
            rate,
        )
        stack.remember(number % WINDOW + 1)
        in_a_row = torch.where(good, 0, in_a_row + 1)
        over = in_a_row >= GIVE_UP
        calm = torch.zeros_like(over)
        for row, fit in enumerate(which.tolist()):
            losses[fit].append(float(value[row]))
            skipped[fit] += int(not good[row])
            excluded[fit] += int(outside[row])
            if over[row]:
                reasons[fit] = stopped_by_nan()
            elif options.check_for_convergence and converged(losses[fit], options):
                reasons[fit], calm[row] = stopped_by_convergence(), True
        ended = over | calm
        if bool(ended.any()) or number + 1 == options.max_num_iters:
            room = number + 1 + JUDGE <= options.max_num_iters
            last = ended if number + 1 < options.max_num_iters else torch.ones_like(ended)
            settled = _settled(stack, which, calm & room, losses, objective)
            for row in last.nonzero()[:, 0].tolist():
                settled.put_into(families[int(which[row])].body, row)
            if bool(last.all()):
                break
            stack, which = stack.only(~last), which[~last]
            steps, in_a_row = steps[~last], in_a_row[~last]
    return [Trace(tuple(losses[i]), reasons[i], skipped[i], excluded[i]) for i in range(len(families))]


def _settled(
    stack: _Stack,
    which: Tensor,
    calm: Tensor,
    losses: Sequence[Sequence[float]],
    objective: Callable[[_Stack, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> _Stack:
    """With the window's mean as the weights of the fits `calm` (F,) where the loss is not higher there."""
    if not bool(calm.any()):
        return stack
    mean = stack.only(calm).at_mean()
    here = torch.stack([objective(mean, which[calm])[1] for _ in range(JUDGE)], 1).tolist()
    better = torch.zeros_like(calm)
    for row, values in zip(calm.nonzero()[:, 0].tolist(), here, strict=True):
        better[row] = no_higher(values, losses[int(which[row])][-WINDOW:])
    settled = copy.copy(stack)
    settled.weights = {
        name: torch.where(_wide(better, weight), stack.mean[name], weight.detach())
        for name, weight in stack.weights.items()
    }
    return settled


def _wide(each: Tensor, weight: Tensor) -> Tensor:
    """A number for each fit (F,) in a shape that goes with a weight (F, ...)."""
    return each.reshape(-1, *[1] * (weight.ndim - 1))
