"""Numbers from arrays: kernels, spectra, entropies, dependence, alignment, bounds, generalised mutual information.

This room knows torch and numpy and nothing of models. States go in as arrays `(n, d)`, n states of width d, on whatever device and
of whatever type; an `Estimate` comes out, with its ceiling and its standard error. `calibrate.checks` holds every estimator against
closed forms.
"""

from .alignment import cka, mmd, modality_gap, mutual_knn
from .bounds import (
    Inequality,
    corollary_1,
    counter_example,
    lemma_1,
    lemma_2,
    pinching,
    theorem_1_as_printed,
    theorem_1_valid_part,
)
from .ceilings import entropy_ceiling, joint_ceiling, median_floor
from .dependence import dime, mutual_information, paired_conditional_entropy, paired_estimates, paired_joint_entropy
from .entropy import FEW, conditional_entropy, entropy, gram_entropy, layer_estimates, renyi, sweep
from .estimate import Estimate, Tested
from .gmi import Gmi, calibration_loss, equation_3_as_printed, gmi_test, information_at_one, v_information
from .gmi import gmi as gmi
from .protocol import DEFAULT, PROTOCOLS, Protocol, named
from .rank import (
    curvature,
    dataset_entropy,
    diff_erank,
    effective_rank,
    erank,
    infonce,
    infonce_bound,
    layer_by_layer_entropy,
    lidar,
    rankme,
    vendi,
    vendi_of_gram,
)
from .resample import Interval, bootstrap, paired_permutation
from .spectrum import Spectrum

__all__ = [
    "DEFAULT",
    "FEW",
    "PROTOCOLS",
    "Estimate",
    "Gmi",
    "Inequality",
    "Interval",
    "Protocol",
    "Spectrum",
    "Tested",
    "bootstrap",
    "calibration_loss",
    "cka",
    "conditional_entropy",
    "corollary_1",
    "counter_example",
    "curvature",
    "dataset_entropy",
    "diff_erank",
    "dime",
    "effective_rank",
    "entropy",
    "entropy_ceiling",
    "equation_3_as_printed",
    "erank",
    "gmi",
    "gmi_test",
    "gram_entropy",
    "infonce",
    "infonce_bound",
    "information_at_one",
    "joint_ceiling",
    "layer_by_layer_entropy",
    "layer_estimates",
    "lemma_1",
    "lemma_2",
    "lidar",
    "median_floor",
    "mmd",
    "modality_gap",
    "mutual_information",
    "mutual_knn",
    "named",
    "paired_conditional_entropy",
    "paired_estimates",
    "paired_joint_entropy",
    "paired_permutation",
    "pinching",
    "rankme",
    "renyi",
    "sweep",
    "theorem_1_as_printed",
    "theorem_1_valid_part",
    "v_information",
    "vendi",
    "vendi_of_gram",
]
