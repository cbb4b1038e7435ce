"""What is minimised: one function per divergence, `(family, log_p, n) -> Loss`."""

from visbi.objectives.forward_kl import forward_kl
from visbi.objectives.importance import importance_weighted
from visbi.objectives.particles import Loss
from visbi.objectives.renyi import renyi
from visbi.objectives.reverse_kl import reverse_kl

__all__ = ["Loss", "forward_kl", "importance_weighted", "renyi", "reverse_kl"]
