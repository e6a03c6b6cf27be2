"""Numbers from arrays: kernels, spectra, entropies, dependence, probes, generalised mutual information.

This room knows torch and numpy and nothing of models. States go in as arrays `(n, d)`, n states of width d, on whatever device and
of whatever type; an `Estimate` comes out, with its ceiling and its standard error.
"""

from .ceilings import entropy_ceiling, joint_ceiling, median_floor
from .entropy import conditional_entropy, entropy, gram_entropy, layer_estimates, renyi, sweep
from .estimate import Estimate
from .protocol import DEFAULT, PROTOCOLS, Protocol, named
from .spectrum import Spectrum

__all__ = [
    "DEFAULT",
    "PROTOCOLS",
    "Estimate",
    "Protocol",
    "Spectrum",
    "conditional_entropy",
    "entropy",
    "entropy_ceiling",
    "gram_entropy",
    "joint_ceiling",
    "layer_estimates",
    "median_floor",
    "named",
    "renyi",
    "sweep",
]
