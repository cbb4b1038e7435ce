"""Finished parts of a sequential inference on disk, so that a killed one goes on where it stopped.

    settings.visbi                   whose inference this is
    round-00/simulations/            finished chunks, a store of `simulate`
    round-00/likelihood.visbi        the trained networks
    round-00/posterior.visbi         q; `VIPosterior.load` reads it
    round-00/round.visbi             its errors: the round is finished

Every file is there whole or not at all, and all of them are tensors and JSON. Each part has a seed of its
own, derived from one, so that what is taken from here and what is made now are the numbers of an undisturbed
run.
One process writes a store at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributions import Distribution

from visbi import __version__
from visbi.core.archive import Archive, read_archive, write_archive
from visbi.core.checks import violation
from visbi.estimators import TrainedLikelihood
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.posterior import VIPosterior
from visbi.priors import coordinates
from visbi.saving.likelihoods import load_likelihood, save_likelihood

__all__ = ["RoundStore", "seed_of"]

_SETTINGS, _NUMBERS = "settings.visbi", "round.visbi"


def seed_of(folder: Path) -> int | None:
    """The seed of the inference whose store is in `folder`; None if there is none yet.

    Raises:
        ValueError: the folder holds something else.
    """
    settings = _settings(folder)
    return None if settings is None else int(settings["seed"])


def _settings(folder: Path) -> dict[str, Any] | None:
    path = folder / _SETTINGS
    if path.exists():
        return read_archive(path, "rounds").content
    if folder.exists() and any(not entry.name.endswith(".part") for entry in folder.iterdir()):
        raise ValueError(violation("store", "an empty folder or a store of infer()", f"{folder}"))
    return None


@dataclass(frozen=True)
class RoundStore:
    """The rounds of one inference in one folder."""

    folder: Path
    prior: Distribution

    @classmethod
    def open(cls, folder: Path, prior: Distribution, settings: Mapping[str, Any]) -> "RoundStore":
        """The store in `folder`, made if absent.

        Args:
            folder: where.
            prior: of the inference, for files that cannot hold it.
            settings: JSON values that decide the numbers.

        Raises:
            ValueError: it belongs to another inference; the message names what differs.
        """
        found = _settings(folder)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_archive(folder / _SETTINGS, Archive("rounds", dict(settings), {}, __version__))
            return cls(folder, prior)
        for name, value in settings.items():
            if found.get(name) != value:
                expected = f"a store made with {name} {value!r} (choose another folder for another inference)"
                raise ValueError(violation("store", expected, f"{folder} with {name} {found.get(name)!r}"))
        for draft in folder.rglob(".*.part"):  # what a kill left of a file that was being written
            draft.unlink()
        return cls(folder, prior)

    def simulations(self, number: int) -> Path:
        """The folder for the simulations of a round."""
        return self._round(number) / "simulations"

    def save_likelihood(self, number: int, trained: TrainedLikelihood) -> None:
        """Keep a round's networks."""
        save_likelihood(self._round(number) / "likelihood.visbi", trained)

    def likelihood(self, number: int) -> TrainedLikelihood | None:
        """A round's networks, or None if they are not there.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._round(number) / "likelihood.visbi"
        given = {"theta_embedding_net": PriorCoordinates(coordinates(self.prior))}
        return load_likelihood(path, given) if path.exists() else None

    def save_round(self, number: int, posterior: VIPosterior, numbers: dict[str, Any]) -> None:
        """Keep a round's q and, last of all, its numbers."""
        posterior.save(self._round(number) / "posterior.visbi")
        write_archive(self._round(number) / _NUMBERS, Archive("round", numbers, {}, __version__))

    def round(self, number: int) -> tuple[VIPosterior, dict[str, Any]] | None:
        """A finished round's q and numbers, or None.

        Raises:
            ValueError: a file is damaged.
        """
        path = self._round(number) / _NUMBERS
        if not path.exists():
            return None
        saved = self._round(number) / "posterior.visbi"
        known = {"prior": self.prior, "theta_embedding_net": PriorCoordinates(coordinates(self.prior))}
        asked = read_archive(saved, "posterior").content["missing"]
        given = {name: value for name, value in known.items() if name in asked}
        return VIPosterior.load(saved, **given), read_archive(path, "round").content

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}"
