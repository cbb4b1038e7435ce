"""Finished parts of a sequential inference on disk, so that a killed one goes on where it stopped.

    settings.visbi                   whose inference this is
    round-00/simulations/            finished chunks, a store of `simulate`
    round-00/usable.visbi            which of the runs so far it learns from
    round-00/likelihood.visbi        the trained networks
    round-00/posterior.visbi         q; `VIPosterior.load` reads it
    round-00/round.visbi             its errors: the round is finished

Every file is there whole or not at all, and all of them are tensors and JSON. Each part has a seed of its
own, derived from one, so that what is taken from here and what is made now are the numbers of an undisturbed
run.
One process writes a store at a time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from visbi import __version__
from visbi.core.archive import Archive, read_archive, write_archive
from visbi.core.checks import violation
from visbi.core.folders import differing
from visbi.core.words import digest
from visbi.estimators import TrainedLikelihood, TrainingOptions
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.posterior import VIPosterior
from visbi.priors import coordinates
from visbi.saving.likelihoods import load_likelihood, save_likelihood

__all__ = ["RoundStore", "seed_of"]

_SETTINGS, _USABLE = "settings.visbi", "usable.visbi"
_LIKELIHOOD, _NUMBERS = "likelihood.visbi", "round.visbi"


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


def _begin_alike(some: list[int], others: list[int]) -> bool:
    """Seeds of a round do not depend on how many rounds there are."""
    n = min(len(some), len(others))
    return some[:n] == others[:n]


def _mask(usable: Tensor) -> dict[str, Any]:
    return {"kept": int(usable.sum()), "mask": digest(usable)}


@dataclass(frozen=True)
class RoundStore:
    """The rounds of one inference in one folder."""

    folder: Path
    prior: Distribution
    train: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        folder: Path,
        prior: Distribution,
        settings: Mapping[str, Any],
        *,
        former: Mapping[str, Any],
        train: Mapping[str, Any],
    ) -> "RoundStore":
        """The store in `folder`, made if absent.

        It may hold more rounds than are asked for, or fewer: then it grows.

        Args:
            folder: where.
            prior: of the inference, for files that cannot hold it.
            settings: JSON values that decide the numbers.
            former: how stores of earlier versions say it, as far as it differs.
            train: keywords of the fits, whose code no file can hold either.

        Raises:
            ValueError: it belongs to another inference; the message names what differs.
        """
        found = _settings(folder)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_archive(folder / _SETTINGS, Archive("rounds", dict(settings), {}, __version__))
            return cls(folder, prior, train)
        # they know `usable` by its name
        for name, value in (settings if "usable" not in found else {**settings, **former}).items():
            if name == "simulations" and _begin_alike(value, found[name]):
                continue
            if name == "options" and value and found[name]:  # earlier versions had fewer
                found = {**found, name: {**asdict(TrainingOptions()), **found[name]}}
            if found.get(name) != value:
                asked, had = differing(value, found.get(name))
                expected = f"a store made with {name} {asked!r} (choose another folder for another inference)"
                raise ValueError(violation("store", expected, f"{folder} with {name} {had!r}"))
        for draft in folder.rglob(".*.part"):  # what a kill left of a file that was being written
            draft.unlink()
        if len(settings["simulations"]) > len(found["simulations"]):
            grown = {**found, "simulations": settings["simulations"]}
            write_archive(folder / _SETTINGS, Archive("rounds", grown, {}, __version__))
        return cls(folder, prior, train)

    def simulations(self, number: int) -> Path:
        """The folder for the simulations of a round."""
        return self._round(number) / "simulations"

    def save_likelihood(self, number: int, trained: TrainedLikelihood, usable: Tensor) -> None:
        """Keep a round's networks, and which of all runs so far, (N,) bool, they have learnt from."""
        write_archive(self._round(number) / _USABLE, Archive("usable", _mask(usable), {}, __version__))
        save_likelihood(self._round(number) / _LIKELIHOOD, trained)

    def likelihood(self, number: int, usable: Tensor) -> TrainedLikelihood | None:
        """A round's networks, or None if they are not there.

        Args:
            number: of the round.
            usable: which of all runs so far, (N,) bool, they should have learnt from.

        Raises:
            ValueError: they learnt from others, or a file is damaged.
        """
        path, known = self._round(number) / _LIKELIHOOD, self._round(number) / _USABLE
        if not path.exists():
            return None
        # stores of earlier versions have no such file
        learnt_from = read_archive(known, "usable").content if known.exists() else _mask(usable)
        if learnt_from != _mask(usable):
            expected = f"one that leaves the runs which round {number + 1} in {self.folder} has learnt from"
            got = f"{learnt_from['kept']} of {len(usable)} then, {int(usable.sum())} now"
            cure = "choose another folder for another `usable`"
            raise ValueError(f"{violation('usable', expected, f'others ({got})')}: {cure}")
        return load_likelihood(path, {"theta_embedding_net": PriorCoordinates(coordinates(self.prior))})

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
        embedding = PriorCoordinates(coordinates(self.prior))
        known = {**self.train, "prior": self.prior, "theta_embedding_net": embedding}
        asked = read_archive(saved, "posterior").content["missing"]
        given = {name: value for name, value in known.items() if name in asked}
        return VIPosterior.load(saved, **given), read_archive(path, "round").content

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}"
