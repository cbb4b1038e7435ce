"""What a sequential inference gives: its rounds, and what is to be said of the last one."""

from dataclasses import dataclass

from visbi.certificate.predictive import PredictiveCheck
from visbi.certificate.report import Report
from visbi.estimators import TrainedLikelihood
from visbi.posterior import VIPosterior
from visbi.rounds.errors import Errors
from visbi.simulators import Simulations

__all__ = ["Inference", "Round"]


@dataclass(frozen=True, eq=False)
class Round:
    """One round of `infer` in which a likelihood was learnt.

    Attributes:
        simulations: what was simulated in it.
        n_used: runs, of this round and earlier ones, that the likelihood was learnt from.
        likelihood: the learnt likelihood and its traces.
        posterior: q fitted to it.
        errors: of q and of the likelihood, and how far the posterior has moved.
    """

    simulations: Simulations
    n_used: int
    likelihood: TrainedLikelihood
    posterior: VIPosterior
    errors: Errors

    @property
    def report(self) -> Report:
        """The certificate of q."""
        return self.posterior.report


@dataclass(frozen=True, eq=False)
class Inference:
    """What `infer` returns.

    Attributes:
        posterior: the last round's.
        simulations: of every round; the first are at draws of the prior.
        rounds: those in which a likelihood was learnt.
        stop_reason: why it ended.
        prior_check: whether x_o is foreign to the first round's runs; None with fewer than 100 of them, or
            where x is very long.
    """

    posterior: VIPosterior
    simulations: tuple[Simulations, ...]
    rounds: tuple[Round, ...]
    stop_reason: str
    prior_check: PredictiveCheck | None = None

    @property
    def errors(self) -> Errors:
        """Of the last round; `errors.spend_on` says what to spend on next."""
        return self.rounds[-1].errors

    @property
    def n_simulations(self) -> int:
        """Runs of the simulator, failed ones included."""
        return sum(len(runs) + runs.n_failed for runs in self.simulations)

    def __str__(self) -> str:
        head = f"{self.n_simulations} simulations in {len(self.simulations)} rounds: {self.stop_reason}"
        unknown = "not compared (fewer than 100 runs, or a very long x)"
        among = unknown if self.prior_check is None else self.prior_check
        lines = [
            head,
            f"x_o among the prior's simulations: {among}",
            self.errors,
            "certificate of q against the learnt likelihood",
            self.posterior.report,
        ]
        return "\n".join(map(str, lines))
