"""Simulators ready to run, with real data or a known posterior.

Each module has a function `task()` that returns a `Task`:

- `lynx_hare`: Lotka-Volterra and the Hudson Bay pelts, exact likelihood
- `two_moons`: two crescents, exact likelihood and posterior samples
- `slcp`: simple likelihood, complex posterior; exact likelihood
- `linear_gaussian`: any number of parameters, everything known
"""

from visbi.simulators.zoo import linear_gaussian, lynx_hare, slcp, two_moons
from visbi.simulators.zoo.task import Task

__all__ = ["Task", "linear_gaussian", "lynx_hare", "slcp", "two_moons"]
