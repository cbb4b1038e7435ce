"""theta -> x: running simulators, and simulators ready to run (`visbi.simulators.zoo`)."""

from visbi.simulators.simulate import simulate
from visbi.simulators.simulations import Simulations

__all__ = ["Simulations", "simulate"]
