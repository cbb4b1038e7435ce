"""The maximum a posteriori by gradient ascent in unconstrained coordinates.

The density that is maximised is that of theta, without the Jacobian of the coordinates: the coordinates only
keep the ascent inside the support. Where the maximum lies on a bound the ascent creeps, for the coordinates
go to infinity there; so at its end every coordinate that is far out is tried at the end of its range.
"""

import torch
from torch import Tensor

from visbi.core.checks import positive, positive_int
from visbi.core.progress import Progress
from visbi.core.types import LogDensity
from visbi.priors.transforms import Coordinates

__all__ = ["ascend"]

_Z_FAR = 1.5  # beyond it a bound may be where the ascent was heading
_Z_BOUND = 40.0  # on the bound, in any coordinates
_Z_EDGE = 4.0  # a start on a bound, where the coordinates are flat, is moved to within


def ascend(
    log_p: LogDensity,
    coords: Coordinates,
    starts: Tensor,
    *,
    num_iter: int = 1000,
    num_to_optimize: int = 100,
    learning_rate: float = 0.01,
    save_best_every: int = 10,
    show_progress_bars: bool = False,
) -> tuple[Tensor, float]:
    """The best theta (D,) found from the best `num_to_optimize` of `starts`, and its potential.

    Args:
        log_p: the potential, (N, D) -> (N,).
        coords: coordinates of the prior's support.
        starts: (N, D).
        num_iter: gradient steps.
        num_to_optimize: how many starts are followed.
        learning_rate: of Adam, in the coordinates.
        save_best_every: every how many steps the best so far is kept.
        show_progress_bars: show one.

    Ctrl-C returns the best so far.

    >>> from visbi.priors import BoxUniform, coordinates
    >>> coords = coordinates(BoxUniform(torch.zeros(2), torch.ones(2)))
    >>> starts = torch.full((1, 2), 0.5)
    >>> theta, value = ascend(lambda t: t[:, 0] - t[:, 1], coords, starts, num_iter=300)
    >>> [round(entry, 3) for entry in theta.tolist()]
    [1.0, 0.0]
    """
    positive_int("num_iter", num_iter)
    positive_int("num_to_optimize", num_to_optimize)
    positive_int("save_best_every", save_best_every)
    positive("learning_rate", learning_rate)
    with torch.no_grad():
        values = _finite(log_p(starts))
        best = starts[values.topk(min(num_to_optimize, len(starts))).indices]
        z = _inside(coords, best).requires_grad_()
    top, top_value = best[0].detach().clone(), float(values.max())
    optimizer = torch.optim.Adam([z], lr=learning_rate)
    steps = Progress(show_progress_bars, range(num_iter), desc="Climbing", leave=False)
    try:
        for step in steps:
            theta = coords.to_theta(z)[0]
            values = log_p(theta)
            if step % save_best_every == 0:
                top, top_value = _better(theta, values, top, top_value)
            optimizer.zero_grad(set_to_none=True)
            (-torch.where(torch.isfinite(values), values, torch.zeros_like(values)).sum()).backward()
            assert z.grad is not None
            z.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
        with torch.no_grad():
            theta = coords.to_theta(z)[0]
            top, top_value = _better(theta, log_p(theta), top, top_value)
            top, top_value = _onto_bounds(log_p, coords, top, top_value)
    except KeyboardInterrupt:
        pass
    finally:
        steps.close()
    return top, top_value


def _inside(coords: Coordinates, theta: Tensor) -> Tensor:
    """Coordinates of theta (N, D), those on a bound moved to where the map has a slope."""
    z = coords.to_z(theta)[0]
    on_bound = (theta <= coords.low) | (theta >= coords.high)
    if coords.dim_z != coords.dim_theta:
        on_bound = on_bound.any(-1, keepdim=True)
    return torch.where(on_bound, z.clamp(-_Z_EDGE, _Z_EDGE), z)


def _onto_bounds(log_p: LogDensity, coords: Coordinates, top: Tensor, value: float) -> tuple[Tensor, float]:
    """`top` with those coordinates moved onto their bounds whose move raises the potential."""
    for _ in range(2):  # the second time with the others in their new places
        z = coords.to_z(top[None])[0][0]
        far = z.abs() > _Z_FAR
        if not bool(far.any()):
            break
        ends = torch.where(z > 0, _Z_BOUND, -_Z_BOUND)
        each = coords.to_theta(torch.where(far.diag(), ends, z))[0]
        values = _finite(log_p(each))
        together = coords.to_theta(torch.where(values > value, ends, z)[None])[0]
        candidates, values = torch.cat([each, together]), torch.cat([values, _finite(log_p(together))])
        top, value = _better(candidates, values, top, value)
    return top, value


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, -torch.inf)


def _better(theta: Tensor, values: Tensor, top: Tensor, top_value: float) -> tuple[Tensor, float]:
    values = _finite(values.detach())
    index = int(values.argmax())
    if float(values[index]) > top_value:
        return theta[index].detach().clone(), float(values[index])
    return top, top_value
