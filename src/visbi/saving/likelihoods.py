"""A learned likelihood as a file: its networks and where their training stands, and back."""

import os
from collections.abc import Mapping
from typing import Any

from visbi import __version__
from visbi.core.archive import Archive, read_archive, write_archive
from visbi.core.encoding import Decoder, Encoder, Kind, Vocabulary
from visbi.estimators import LikelihoodEnsemble, TrainedLikelihood, TrainingState, TrainingTrace
from visbi.saving.coordinates import COORDINATES
from visbi.saving.distributions import CONSTRAINTS, DISTRIBUTIONS, TRANSFORMS
from visbi.saving.estimators import ESTIMATORS
from visbi.saving.modules import dataclass_kind

__all__ = ["load_likelihood", "save_likelihood"]

_KIND = "likelihood"


def _trained(estimator: LikelihoodEnsemble, states: tuple[TrainingState, ...]) -> TrainedLikelihood:
    if not isinstance(estimator, LikelihoodEnsemble) or len(estimator) != len(states):
        raise TypeError("a likelihood without its states of training")
    return TrainedLikelihood(estimator, states)


_VOCABULARY = Vocabulary(
    kinds=(
        *DISTRIBUTIONS,
        *TRANSFORMS,
        *CONSTRAINTS,
        *COORDINATES,
        *ESTIMATORS,
        dataclass_kind(TrainingTrace),
        dataclass_kind(TrainingState),
        Kind("TrainedLikelihood", TrainedLikelihood, lambda trained: dict(vars(trained)), _trained),
    )
)


def save_likelihood(path: str | os.PathLike[str], trained: TrainedLikelihood) -> None:
    """Write it to a file, as a whole or not at all; a network that embeds theta may have to be given again.

    Raises:
        OSError: it cannot be written.
    """
    encoder = Encoder(_VOCABULARY)
    content = encoder.encode(trained, "likelihood")
    write_archive(path, Archive(_KIND, content, encoder.tensors, __version__))


def load_likelihood(path: str | os.PathLike[str], given: Mapping[str, Any]) -> TrainedLikelihood:
    """Read a file that `save_likelihood` wrote; no code in it is run.

    Args:
        path: the file.
        given: `theta_embedding_net`, the network that embeds theta, if it is a user's own.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, foreign or of a newer version.

    >>> import tempfile, torch
    >>> from visbi.estimators import TrainingOptions, fit_likelihood
    >>> theta = torch.randn(100, 1)
    >>> options = dict(options=TrainingOptions(max_epochs=1), show_progress_bar=False)
    >>> trained = fit_likelihood(theta, theta + torch.randn(100, 2), seed=0, **options)
    >>> path = tempfile.mkdtemp() + "/likelihood.visbi"
    >>> save_likelihood(path, trained)
    >>> load_likelihood(path, {}).traces == trained.traces
    True
    """
    archive = read_archive(path, _KIND)
    return Decoder(_VOCABULARY, archive.tensors, given).decode(archive.content)
