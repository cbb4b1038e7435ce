"""Sequential inference: `infer`, and its pieces to do it by hand.

`RoundProposal` and `TruncatedPrior` say where to simulate next, `fit_likelihood(warm_start=...)` learns,
`VIPosterior(q="auto").train(init=...)` fits, `likelihood_spread`, `likelihood_test`, `error_of_q` and `moved`
judge, and `reason_to_stop` says when it is enough.
"""

from visbi.rounds.errors import Errors, error_of_q, likelihood_spread, moved
from visbi.rounds.local import LikelihoodTest, likelihood_test
from visbi.rounds.proposal import RoundProposal, TruncatedPrior
from visbi.rounds.result import Inference, Round
from visbi.rounds.sequential import infer
from visbi.rounds.stopping import reason_to_stop

__all__ = [
    "Errors",
    "Inference",
    "LikelihoodTest",
    "Round",
    "RoundProposal",
    "TruncatedPrior",
    "error_of_q",
    "infer",
    "likelihood_spread",
    "likelihood_test",
    "moved",
    "reason_to_stop",
]
