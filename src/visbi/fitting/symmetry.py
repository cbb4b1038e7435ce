r"""Symmetries of a posterior: labels that can be exchanged, signs that can be turned.

Where the likelihood of a mixture of three does not know which component is which, one mode found is six modes
found. Exploration meets the others by chance; here they follow. In coordinates in which the prior is N(0, I)
every exchange of entries and every change of sign leaves the prior as it is, and volumes, too. So maps

    g(z)_i = s_i z_{pi(i)},    s_i = +-1,

are tried at a few points: exchanges of two entries with the same prior, changes of one sign, and up to three
of these at once (of a mixture of two: both means, both scales, and the sign of the weight's coordinate). What
leaves ell as it is at those points generates the group of all that do.

Nothing hangs on a map's being a symmetry: of x drawn from q and any g that keeps volumes

    E_q[ p(g x) / q(x) 1(q is much too low at g x) ]

is what q lacks of the mass in its own image (`witnesses.mirrored`).
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from visbi.families.gaussians import Mixture, cholesky
from visbi.fitting.mixture import ALIKE, bhattacharyya
from visbi.fitting.target import Target, is_usable

__all__ = ["Map", "completed", "symmetries"]

_MOST = 2048  # maps of one kind that are tried; where there are more, none of that kind
_AT_ONCE = 3  # exchanges and changes of sign
_COMPONENTS, _NUMBERS = 256, 2560  # of a completed mixture, and times dimensions: all pairs are compared
_SAME = 1e-5  # relative to 1 + |ell|: as good as no change


@dataclass(frozen=True)
class Map:
    """z -> sign * z[index], for z (..., d).

    >>> swap = Map(torch.tensor([1, 0, 2]), torch.tensor([1.0, 1.0, -1.0]).double())
    >>> swap.of(torch.tensor([1.0, 2.0, 3.0]).double()).tolist()
    [2.0, 1.0, -3.0]
    """

    index: Tensor
    sign: Tensor

    def of(self, z: Tensor) -> Tensor:
        """The image of z (..., d)."""
        return self.sign * z[..., self.index]

    def of_mixture(self, q: Mixture) -> Mixture:
        """q's components, each in its image."""
        cov = q.cov[..., self.index, :][..., self.index] * self.sign[:, None] * self.sign
        return Mixture(q.log_weights, self.of(q.loc), cholesky(cov))


def symmetries(target: Target, z: Tensor) -> list[Map]:
    """Maps that leave the target as it is at points z (1, N, d), N of two or more.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(3).double(), 1.0), 1)
    >>> def log_p(theta):  # the first two can be exchanged
    ...     return -(theta[:, :2].sum(-1) - 1).square() - theta[:, :2].prod(-1).square() - theta[:, 2]
    >>> found = symmetries(Target(log_p, coordinates(prior)), torch.randn(1, 4, 3).double())
    >>> [each.index.tolist() for each in found]
    [[1, 0, 2]]
    """
    found: list[_Moves] = []
    left = [((i,), ()) for i in range(target.dim)] + [((), pair) for pair in target.alike()]
    for many in range(1, _AT_ONCE + 1):
        sets = _disjoint(left, many, found)
        if len(sets) > _MOST:
            break
        same = [each for each, is_same in zip(sets, _leave_it(target, sets, z), strict=True) if is_same]
        found += same
        left = [move for move in left if (move,) not in found]
    return [_map(each, target) for each in _generators(found)]


_Move = tuple[tuple[int, ...], tuple[int, ...]]  # entries whose sign is changed, and that are exchanged
_Moves = tuple[_Move, ...]


def _disjoint(moves: list[_Move], many: int, found: list[_Moves]) -> list[_Moves]:
    """So many moves at a time, none among them found, no entry touched twice; `_MOST` + 1 sets at most."""
    sets: list[_Moves] = []
    known = [set(each) for each in found if len(each) > 1]  # what was found by itself is no move any more
    for each in combinations(moves, many):
        touched = [i for flipped, swapped in each for i in (*flipped, *swapped)]
        if len(set(touched)) == len(touched) and not any(part <= set(each) for part in known):
            sets.append(each)
            if len(sets) > _MOST:
                break
    return sets


def _leave_it(target: Target, sets: list[_Moves], z: Tensor) -> list[bool]:
    """Which of them leave the target as it is at all points z (1, N, d)."""
    left = list(range(len(sets)))
    for point in z[0]:
        if left:
            images = torch.stack([_map(sets[i], target).of(point) for i in left])
            ell, image = target.value(point[None, None])[0, 0], target.value(images[None])[0]
            same = is_usable(image) & ((image - ell).abs() <= _SAME * (1 + ell.abs()))
            left = [i for i, is_same in zip(left, same.tolist(), strict=True) if is_same]
    return [i in left for i in range(len(sets))]


def _generators(found: list[_Moves]) -> list[_Moves]:
    """All but those exchanges of two entries alone that follow from others."""
    group = {}
    kept = []
    for each in found:
        (_, swapped), *more = each
        if more or not swapped:
            kept.append(each)
            continue
        i, j = (group.get(k, k) for k in swapped)
        if i != j:
            kept.append(each)
            group.update({k: i for k in [*group, *swapped] if group.get(k, k) == j})
    return kept


def _map(moves: _Moves, target: Target) -> Map:
    index, sign = list(range(target.dim)), [1.0] * target.dim
    for flipped, swapped in moves:
        for i in flipped:
            sign[i] = -1.0
        if swapped:
            i, j = swapped
            index[i], index[j] = j, i
    return Map(
        torch.tensor(index, device=target.device),
        torch.tensor(sign, dtype=torch.float64, device=target.device),
    )


def completed(q: Mixture, maps: list[Map]) -> Mixture:
    """q (F = 1) with the images of its components, as far as they are unlike what is there.

    An image weighs as much as what it is the image of. There are 256 components at most, and fewer in more
    than ten dimensions.

    >>> loc = torch.tensor([[[1.0, 2.0, 3.0]]]).double()
    >>> q = Mixture.of(torch.zeros(1, 1).double(), loc, 0.01 * torch.eye(3).double()[None, None])
    >>> eye = torch.ones(3).double()
    >>> swaps = [Map(torch.tensor(order), eye) for order in ([1, 0, 2], [0, 2, 1])]
    >>> completed(q, swaps).loc[0].tolist()
    [[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 3.0, 2.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0], [3.0, 2.0, 1.0]]
    """
    most = min(_COMPONENTS, _NUMBERS // q.loc.shape[2])
    first, before = 0, -1
    while before < (count := q.loc.shape[1]):
        before, newest = count, Mixture(*(part[:, first:] for part in (q.log_weights, q.loc, q.tril)))
        for each in maps:
            if q.loc.shape[1] < most:
                q = _with_unlike(q, each.of_mixture(newest), most)
        first = before
    return Mixture(torch.log_softmax(q.log_weights, 1), q.loc, q.tril)


def _with_unlike(q: Mixture, images: Mixture, most: int) -> Mixture:
    own = q.loc.shape[1]
    pairs = ((q.log_weights, images.log_weights), (q.loc, images.loc), (q.tril, images.tril))
    both = Mixture(*(torch.cat(pair, 1) for pair in pairs))
    alike = bhattacharyya(both)[0] < ALIKE
    kept = torch.arange(len(alike), device=alike.device) < own
    for k in range(own, len(alike)):
        if int(kept.sum()) < most and not bool((alike[k] & kept).any()):
            kept[k] = True
    return Mixture(both.log_weights[:, kept], both.loc[:, kept], both.tril[:, kept])
