"""All targets of the benchmarks, by name: unnormalised densities with exact draws.

    from targets import NAMES, target
    moons = target("two_moons")

The `tuning` group was looked at while the automatic fit was made; the `held out` group was not; the `hard`
group was made to break it, and looked at afterwards.
"""

from collections.abc import Callable
from functools import cache

import targets_hard as hard
import targets_heldout as heldout
import targets_tuning as tuning
from target_parts import Group, Modes, Target

__all__ = ["GROUPS", "NAMES", "Group", "Modes", "Target", "names_of", "target"]

_TUNING: dict[str, Callable[[], Target]] = {
    "two_moons": tuning.two_moons,
    "mixture4_d2": lambda: tuning.mixture4(2),
    "mixture4_d8": lambda: tuning.mixture4(8),
    "mixture40": tuning.mixture40,
    "slcp": tuning.slcp,
    "banana_d10": lambda: tuning.banana(10, "tuning"),
    "funnel_d10": lambda: tuning.funnel(10, "tuning"),
    "gaussian_d50": lambda: tuning.gaussian(50, 1e3, "tuning"),
    "student_pair_d5": tuning.student_pair,
    "edge_d10": tuning.edge,
}
_HELD_OUT: dict[str, Callable[[], Target]] = {
    "gaussian_d100": lambda: tuning.gaussian(100, 1e2, "held out"),
    "banana_d50": lambda: tuning.banana(50, "held out"),
    "funnel_d30": lambda: tuning.funnel(30, "held out"),
    "student_d10": heldout.student,
    "needle_d2": lambda: heldout.needle(2),
    "needle_d5": lambda: heldout.needle(5),
    "shell_d2": lambda: heldout.shell(2),
    "shell_d8": lambda: heldout.shell(8),
    "rough_d4": heldout.rough,
    "steps_d3": heldout.steps,
    "corner_d6": heldout.corner,
    "wide_gaussian_d5": heldout.wide_gaussian,
    "wide_lognormal_d5": heldout.wide_lognormal,
    "schools_centred": lambda: heldout.schools(centred=True),
    "schools_noncentred": lambda: heldout.schools(centred=False),
}
_HARD: dict[str, Callable[[], Target]] = {
    "narrow_d50": lambda: hard.narrow(50, 1.0, 0.7),
    "narrow_d8": lambda: hard.narrow(8, 0.5, 0.1),
    "three_d20": hard.three,
    "four_d30": hard.four,
    "spike_d3": hard.spike,
    "ripples_d8": hard.ripples,
    "ball_d4": hard.ball,
    "bananas_d6": hard.bananas,
    "chain_d4": hard.chain,
    "neck_d6": hard.neck,
    "cross_d4": hard.cross,
    "laplace_d10": hard.laplace,
    "shell_d20": lambda: heldout.shell(20, "hard"),
    "corner_d20": hard.corner,
    "growth_d4": hard.growth,
    "stopping_d5": hard.stopping,
    "guarded_d2": hard.guarded,
    "turned_d60": hard.turned,
    "eight_d20": hard.eight,
    "wide_pair_d5": hard.wide_pair,
    "box_pair_d8": hard.box_pair,
    "cut_d10": hard.cut,
}
_BY_GROUP: dict[Group, dict[str, Callable[[], Target]]] = {
    "tuning": _TUNING,
    "held out": _HELD_OUT,
    "hard": _HARD,
}
_MAKERS = {**_TUNING, **_HELD_OUT, **_HARD}

GROUPS = tuple(_BY_GROUP)
NAMES = tuple(_MAKERS)
"""Every target, tuning group first."""


def names_of(group: Group) -> tuple[str, ...]:
    """The names of one group."""
    return tuple(_BY_GROUP[group])


@cache
def target(name: str) -> Target:
    """One target; beside those in `NAMES`, the learned potentials of `neural_targets`.

    Raises:
        KeyError: none of that name.
    """
    if name.startswith(("nle_", "nre_")):
        from neural_targets import neural_target

        return neural_target(name)
    return _MAKERS[name]()
