r"""Classifier two-sample test: can a classifier tell draws of q from draws of p?

C2ST is the accuracy, on data held out from its training, of a classifier between two samples of equal size:
.5 means that it cannot tell them apart, 1 that it always can (Lopez-Paz, Oquab: Revisiting classifier
two-sample tests. ICLR 2017). At best it is (1 + TV) / 2 with TV the total variation between the two. From n
draws of each its standard error is about sqrt(1 / (8 n)), .008 for n = 2000, and its value is not bounded
below by .5.

No classifier sees everything. A network of two layers finds what is smooth and spread over many
dimensions, boosted trees find edges, thin structures and scales; the larger of both accuracies is
reported, which flatters neither (and lies about half a standard error above .5 where the samples agree).
Both samples are scaled by the mean and the standard deviation of the second. Duplicates among the draws
leak from training to test; draw without them.
"""

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import finite_tensor, non_negative_int, one_of, positive_int, violation

__all__ = ["c2st"]

_CLASSIFIERS = ("both", "network", "trees")
_WIDEST = 100


def c2st(
    theta: Tensor, reference: Tensor, *, classifier: str = "both", seed: int = 1, folds: int = 5
) -> float:
    """Accuracy of a classifier between two samples, .5 to 1 up to noise.

    Args:
        theta: draws to be judged, (N, D).
        reference: draws that are right, (M, D); the longer sample is cut to the length of the shorter.
        classifier: "network", "trees", or "both" for the larger of their accuracies.
        seed: of the classifier's weights and of the folds.
        folds: of the cross-validation, at least 2.

    Raises:
        ValueError: unlike D, fewer than 10 draws a fold, an unknown classifier, or draws that are not finite.

    >>> from visbi.core.random import seeded
    >>> with seeded(0):
    ...     a, b, far = torch.randn(400, 1), torch.randn(400, 1), 3 + torch.randn(400, 1)
    >>> c2st(a, b) < 0.57, c2st(a, far) > 0.85
    (True, True)
    """
    theta, reference = finite_tensor("theta", theta), finite_tensor("reference", reference)
    if theta.ndim != 2 or reference.ndim != 2 or theta.shape[1] != reference.shape[1]:
        shapes = f"{tuple(theta.shape)} and {tuple(reference.shape)}"
        raise ValueError(violation("theta` and `reference", "shapes (N, D) and (M, D)", shapes))
    one_of("classifier", classifier, _CLASSIFIERS)
    seed, folds = non_negative_int("seed", seed), positive_int("folds", folds)
    n = min(len(theta), len(reference))
    if folds < 2 or n < 10 * folds:
        raise ValueError(violation("folds", f"2 to a tenth of the draws ({n})", folds))
    loc, scale = reference.double().mean(0), reference.double().std(0).clamp_min(1e-300)
    rows = torch.cat([(part[:n].double() - loc) / scale for part in (theta, reference)]).cpu().numpy()
    names = _CLASSIFIERS[1:] if classifier == "both" else (classifier,)
    return max(_accuracy(name, rows, np.repeat([0, 1], n), seed, folds) for name in names)


def _accuracy(name: str, rows: np.ndarray, labels: np.ndarray, seed: int, folds: int) -> float:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    if name == "network":
        width = min(10 * rows.shape[1], _WIDEST)
        model = MLPClassifier(
            (width, width),
            learning_rate_init=3e-3,
            max_iter=1000,  # it stops long before, on held-out accuracy
            early_stopping=True,
            validation_fraction=0.2,
            n_iter_no_change=30,
            random_state=seed,
        )
    else:
        model = HistGradientBoostingClassifier(
            max_iter=60, max_leaf_nodes=16, min_samples_leaf=10, l2_regularization=1.0, random_state=seed
        )
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(model, rows, labels, cv=parts, scoring="accuracy").mean())
