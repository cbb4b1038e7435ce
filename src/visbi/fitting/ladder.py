r"""The automatic fit: cheap ways first, dearer ones only where those before them did not do.

    Gaussian    matched to scores from the prior; exact for many posteriors
    mixture     matched, and fitted to what a tempered explorer saw; refitted to weighted draws
    flow        trained by the reverse KL where no mixture fits
    bridge      particles carried from the best q to the posterior, and a mixture fitted to them
    particles   those themselves, flagged

A rung answers if its q passes a certificate on fresh draws (`certificate.report`) and two checks that such a
certificate cannot make: that hardly any of the explorer's particles lie where q is much too low, and that the
posterior's own moves do not carry resampled draws away (`explore.drift`). A rung that has passed with few
of its draws to spare is kept, and the next one is tried; the better answers.

Every way works in coordinates z in which the prior is N(0, I), or near it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visbi.certificate.modes import find_modes
from visbi.certificate.report import BROKEN, Report, broken_sentence, certify
from visbi.certificate.weights import pareto_smooth, resample
from visbi.fitting.budget import BudgetReached
from visbi.fitting.explore import Exploration, drift, explore
from visbi.fitting.flow import FlowProposal, flow_body, train_flow, widened
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import Mixture, defended, local_covariances, spread_out
from visbi.fitting.pool import Pool, Proposal, Trial
from visbi.fitting.probe import useful_gradient
from visbi.fitting.refine import around, from_particles, matched, patch, refined
from visbi.fitting.target import Target, is_usable

__all__ = ["Answer", "climb"]

_LOOK = 4096  # draws of the prior that are looked at first
_TRIAL = 4096
_DRAWS = 16_384  # that a certificate rests on
_PARTICLES = 1024
_STARTS = 24
_SPARE = 0.2  # effective share of draws with which a rung's answer is final
_CLEAR = 0.5  # with which the Gaussian's is, and no mixture need be tried
_LOW = math.log(20.0)  # nats by which q is much too low somewhere
_FEW = 5e-3  # share of the explorer's particles, or of the mass, that may lie there
_MISSING = 0.02  # share of the mass beyond which an answer is in doubt
_WITNESSES = 2048
_DRIFT = 5.0  # standard errors
_DRIFTERS = 1024
_WIDE = 20  # dimensions beyond which the explorer is not sent after a Gaussian that passes
_BENT, _BENT_DIMENSIONS = 0.25, 4  # a first mixture's share below which a posterior of one mode is for a flow
_FLOW_ROUNDS, _FLOW_STEPS, _FLOW_BATCH = 3, 200, 256
_HOPELESS_FLOW = 0.02
_ENOUGH_FLOW = 0.6
_FORWARD = 0.5


@dataclass(frozen=True)
class Answer:
    """What the ladder found.

    Attributes:
        q: in coordinates z.
        z, ell, log_q: fresh draws of q (N, d), the target, -inf where it is not finite, and log q at them
            (N,): what the certificate rests on.
        report: the certificate, with what the ladder has to say.
    """

    q: Proposal
    z: Tensor
    ell: Tensor
    log_q: Tensor
    report: Report


@dataclass
class _Climb:
    """The state of a climb: what is known of the posterior so far."""

    target: Target
    say: Callable[[str], None]
    story: list[str] = field(default_factory=list)
    pool: Pool = field(init=False)
    gradient: bool = True
    seen: Exploration | None = None
    starts: Tensor = field(init=False)
    modes: int = 1
    flown: bool = False
    broken: float = 0.0  # share of the answer's draws at which the potential is NaN or +inf
    best: tuple[str, Proposal, Trial] | None = None
    answer: tuple[str, Answer] | None = None

    def __post_init__(self) -> None:
        self.pool = Pool(self.target)

    def consider(self, rung: str, q: Proposal, trial: Trial) -> None:
        """Keep q if it is the best so far."""
        if self.best is None or _merit(trial) > _merit(self.best[2]):
            self.best = rung, q, trial

    def certified(self, rung: str, q: Proposal, *, spare: float) -> bool:
        """Whether q passes with draws to spare; if it passes at all it is kept as an answer."""
        broken = self.target.n_broken
        trial = self.pool.draw(q, _DRAWS)
        broken = (self.target.n_broken - broken) / _DRAWS
        ell, log_q = trial.ell, trial.log_q
        report = certify(ell, log_q, resampled=True, doubts=self.doubts(q, trial.z, ell, log_q))
        answer = Answer(q, trial.z, ell, log_q, report)
        if self.answer is None or _rank(report) > _rank(self.answer[1].report):
            self.answer, self.broken = (rung, answer), broken
        if report.status in ("ok", "corrected") and report.ess_fraction >= spare:
            return True
        self.story.append(f"{rung} {_why(report)}")
        return False

    def doubts(self, q: Proposal, z: Tensor, ell: Tensor, log_q: Tensor) -> list[str]:
        """What speaks against q beside its weights."""
        found = []
        log_w = ell - log_q
        log_z = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
        share = self.missing(q, log_z)
        if share > _MISSING:
            found.append(
                f"an independent exploration has seen about {100 * share / (1 + share):.1f} % of the "
                "posterior's mass where q has next to none. Run MCMC to be sure."
            )
        try:
            index = resample(pareto_smooth(log_w)[0], _DRIFTERS)
            moved = drift(self.target, z[index], lambda z: q.log_prob(z[None])[0], gradient=self.gradient)
        except BudgetReached:
            return [*found, "the budget left no room to check that resampled draws stay where they are."]
        if moved > _DRIFT:
            found.append(
                "the posterior's own moves carry resampled draws to where q is too low: mass next to them is "
                "missing. Run MCMC to be sure."
            )
        return found

    def missing(self, q: Proposal, log_z: float) -> float:
        """Share of the posterior's mass that the explorer's particles say q is much too low at.

        The particles alone are no proof: where an explorer mixes badly they sit where hardly any mass is. So
        a mixture fitted to those that accuse q is drawn from, and the mass there is weighed.
        """
        if self.seen is None:
            return 0.0
        z, ell = self.seen.z[0], self.seen.ell[0]
        low = ell - q.log_prob(z[None])[0] - log_z > _LOW
        if float(low.double().mean()) < _FEW:
            return 0.0
        return self.missing_at(q, defended(around(z[low])), log_z)

    def missing_at(self, q: Proposal, local: Mixture, log_z: float) -> float:
        """Mass, relative to what q has, that draws of `local` find where q is much too low."""
        trial = self.pool.draw(local, _WITNESSES)
        log_q = q.log_prob(trial.z[None])[0]
        both = torch.logaddexp(log_q, trial.log_q) - math.log(2)  # half of the draws are thought to be q's
        mass = (trial.ell - both - log_z).clamp_max(50.0).exp() * (trial.ell - log_q - log_z > _LOW)
        return float(mass.mean()) / 2


def climb(
    target: Target, *, start: Mixture | None = None, say: Callable[[str], None] = lambda _: None
) -> Answer:
    """Find q for the target, as far up the ladder as it takes.

    Args:
        target: with its budget; reaching it ends the climb with the best so far.
        start: an earlier q, or draws' moments, to begin with beside the usual starts.
        say: told what is being done.

    Raises:
        ValueError: the potential is finite at no draw of the prior.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(lambda theta: 3 - 50 * theta.square().sum(-1), coordinates(prior))
    >>> report = climb(target).report
    >>> report.rung, report.status, report.log_evidence - 3 - math.log(2 * math.pi / 100)
    ('a Gaussian', 'ok', 0.00)
    """
    now = _Climb(target, say)
    reason = ""
    try:
        for rung in (_look, _gaussian, _mixture, _flow, _bridge):
            say(rung.__name__.strip("_"))
            if rung(now, start):
                break
    except BudgetReached as reached:
        reason = str(reached)
    except KeyboardInterrupt:
        reason = "interrupted"
    return _conclude(now, reason)


# -- the rungs: each returns whether it has answered ------------------------------------------------------


def _look(now: _Climb, start: Mixture | None) -> bool:
    """What the prior's draws say about the potential."""
    z = torch.randn(_LOOK, now.target.dim, dtype=torch.float64, device=now.target.device)
    ell = now.target.value(z)
    usable = is_usable(ell)
    if not bool(usable.any()):
        raise ValueError(
            "`potential_fn`: expected finite values at draws of the prior; got none at "
            f"{_LOOK} of them (is x of the scale that the potential was trained on?)"
        )
    top = z[ell.topk(min(16, int(usable.sum()))).indices]
    some = z[usable][:32]
    now.gradient = useful_gradient(now.target, torch.cat([top, some]))
    if not now.gradient:
        now.story.append("the potential has no useful gradient")
    now.starts = z[(ell + 0.5 * z.square().sum(-1)).topk(min(512, int(usable.sum()))).indices]
    return False


def _gaussian(now: _Climb, start: Mixture | None) -> bool:
    passed = False
    q: Mixture | None = None
    if now.gradient:
        match = match_gaussian(now.target)
        q = Mixture.of(torch.zeros(1, 1).to(match.loc), match.loc[None], match.cov[None])
        trial = now.pool.draw(defended(q), _TRIAL)
        now.consider("a Gaussian", q, trial)
        passed = trial.share > _CLEAR and trial.khat < 0.5
        if not passed:
            now.story.append(f"a Gaussian had an effective share of {trial.share:.2f}")
    if start is not None:
        now.consider("the start", start, now.pool.draw(defended(start), _TRIAL))
    if not (passed and now.target.dim > _WIDE):
        now.seen = explore(now.target, _PARTICLES // 2 if passed else _PARTICLES, gradient=now.gradient)
    if not passed or q is None:
        return False
    log_z = _log_z(now.best[2]) if now.best else 0.0
    elsewhere = start is not None and now.missing_at(defended(q), defended(start), log_z) > _FEW
    if elsewhere or now.missing(defended(q), log_z) > _FEW or _other_modes(now, q, log_z):
        now.story.append("a Gaussian missed other modes")
        return False
    return now.certified("a Gaussian", defended(q), spare=_CLEAR)


def _other_modes(now: _Climb, q: Mixture, log_z: float) -> bool:
    """Whether Gaussians matched from the most promising of the prior's draws hold mass that q misses."""
    starts = now.starts
    chosen = starts[spread_out(starts, torch.full((len(starts),), 1.0 / len(starts)).to(starts), _STARTS)]
    eye = 0.09 * torch.eye(now.target.dim, dtype=starts.dtype, device=starts.device)
    others = matched(now.target, chosen, eye.expand(len(chosen), -1, -1))
    return now.missing_at(defended(q), defended(others), log_z) > _FEW


def _mixture(now: _Climb, start: Mixture | None) -> bool:
    """Mixtures, matched and from particles; what is bent and in one piece is left to a flow first."""
    seen = now.seen = (
        now.seen if now.seen is not None else explore(now.target, _PARTICLES, gradient=now.gradient)
    )
    found: list[Mixture] = []
    z = seen.z[0]
    if now.gradient:
        even = torch.full((len(z),), 1.0 / len(z)).to(z)
        starts = z[spread_out(z, even, _STARTS)]
        cov = local_covariances(z, starts, max(4 * now.target.dim, 40))
        found.append(matched(now.target, starts, cov))
    found.append(from_particles(seen))
    if start is not None:  # what the user knows of, whatever the explorer saw
        found = [q.with_(start, 0.5) for q in found]
    trials = [(q, now.pool.draw(defended(q), _TRIAL)) for q in found]
    best, trial = max(trials, key=lambda pair: _merit(pair[1]))
    now.consider("a mixture", best, trial)
    now.modes = len(find_modes(z, lambda z: best.log_prob(z[None])[0]))
    bent = trial.share < _BENT and now.modes == 1 and now.target.dim >= _BENT_DIMENSIONS
    if now.gradient and bent and _flow(now, start):
        return True
    return _refits(now, best, trial)


def _refits(now: _Climb, q: Mixture, trial: Trial) -> bool:
    for _ in range(2):  # the second time with the draws of a certificate that failed among the points
        q, trial = refined(now.pool, q, trial)
        now.consider("a mixture", q, trial)
        if trial.khat >= 0.9 or trial.share < 0.05:
            now.story.append(
                f"a mixture had k-hat {trial.khat:.2f} and an effective share of {trial.share:.2f}"
            )
            return False
        if now.certified("a mixture", defended(q), spare=_SPARE):
            return True
    return False


def _flow(now: _Climb, start: Mixture | None) -> bool:
    if not now.gradient or now.flown:
        return False
    now.flown = True
    now.say("flow")
    z, weights = now.pool.points(_TRIAL)
    mean = (weights[:, None] * z).sum(0)
    cov = (weights[:, None] * (z - mean)).mT @ (z - mean)
    cov = cov + 1e-9 * torch.diag_embed(cov.diagonal())
    body = flow_body(now.target.dim).to(now.target.device)
    body.placed(mean, torch.linalg.cholesky(cov))
    q, trial = None, None
    for number in range(_FLOW_ROUNDS):
        train_flow(
            body,
            now.target,
            round_=number,
            steps=_FLOW_STEPS,
            batch=_FLOW_BATCH,
            # what draws of a flow do not reach, such as another mode, only weighted points can teach it
            points=now.pool.points(2 * _TRIAL) if now.modes > 1 else None,
            forward_share=_FORWARD,
        )
        q = FlowProposal(widened(copy.deepcopy(body)))  # the pool keeps it, and training goes on
        trial = now.pool.draw(q, _TRIAL)
        if trial.share > _ENOUGH_FLOW and trial.khat < 0.6:
            break
        if number and trial.share < _HOPELESS_FLOW:
            break
    assert q is not None and trial is not None
    now.consider("a flow", q, trial)
    if trial.khat < 0.9 and trial.share > _HOPELESS_FLOW and now.certified("a flow", q, spare=_SPARE):
        return True
    patched = patch(now.pool, q)
    trial = now.pool.draw(patched, _TRIAL)
    now.consider("a patched flow", patched, trial)
    if trial.khat >= 0.9 or trial.share < _HOPELESS_FLOW:
        now.story.append(f"a flow had k-hat {trial.khat:.2f} and an effective share of {trial.share:.2f}")
        return False
    return now.certified("a patched flow", patched, spare=_SPARE)


def _bridge(now: _Climb, start: Mixture | None) -> bool:
    for _ in range(2):
        assert now.best is not None
        base = now.best[1]
        if not isinstance(base, Mixture):
            return False
        seen = explore(now.target, _PARTICLES, base=_From(defended(base)), gradient=now.gradient)
        q = from_particles(seen)
        trial = now.pool.draw(defended(q), _TRIAL)
        if _merit(now.best[2]) > _merit(trial):
            q, trial = base, now.best[2]
        q, trial = refined(now.pool, q, trial, rounds=2)
        now.consider("a bridged mixture", q, trial)
        if trial.khat < 0.9 and now.certified("a bridged mixture", defended(q), spare=_SPARE):
            return True
    return False


@dataclass(frozen=True)
class _From:
    """A mixture as the base of an exploration."""

    q: Mixture

    def sample(self, fits: int, n: int, like: Tensor) -> Tensor:
        return self.q.sample(fits * n).reshape(fits, n, -1)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_q, score = self.q.log_prob_and_score(z.reshape(1, -1, z.shape[-1]))
        return log_q.reshape(z.shape[:-1]), score.reshape(z.shape)


# -- the end ----------------------------------------------------------------------------------------------


def _conclude(now: _Climb, reason: str) -> Answer:
    """The best answer, whatever ended the climb."""
    if now.answer is not None:
        rung, answer = now.answer
    else:
        rung, answer = _unfinished(now)
    report = answer.report
    doubts = [broken_sentence(now.broken)] if now.broken > BROKEN else []
    doubts += [f"the fit ended early: {reason}. Give it more."] if reason else []
    if doubts and report.status in ("ok", "corrected"):
        report = certify(answer.ell, answer.log_q, resampled=True, doubts=doubts)
    elif doubts and now.best is None:
        report = replace(report, sentence=doubts[0])
    return replace(
        answer,
        report=replace(report, rung=rung, story=tuple(now.story), stop_reason=reason),
    )


def _unfinished(now: _Climb) -> tuple[str, Answer]:
    """From the trials alone: no rung came as far as a certificate."""
    if now.best is None:
        q = Mixture.of(*_prior_like(now.target))
        z = q.sample(256)
        unknown = torch.full((256,), -torch.inf, dtype=torch.float64, device=z.device)
        return "the prior", Answer(q, z[0], unknown, q.log_prob(z)[0], certify(unknown, q.log_prob(z)[0]))
    rung, q, trial = now.best
    q = defended(q) if isinstance(q, Mixture) else q
    report = certify(trial.ell, trial.log_q, resampled=True, doubts=["no rung passed."])
    return rung, Answer(q, trial.z, trial.ell, trial.log_q, report)


def _prior_like(target: Target) -> tuple[Tensor, Tensor, Tensor]:
    like = {"dtype": torch.float64, "device": target.device}
    d = target.dim
    return torch.zeros(1, 1, **like), torch.zeros(1, 1, d, **like), torch.eye(d, **like).expand(1, 1, d, d)


def _merit(trial: Trial) -> float:
    """Effective share, discounted where the weights' tail is too heavy to believe it."""
    return trial.share * (1.0 if trial.khat < 0.7 else 0.3)


def _rank(report: Report) -> tuple[int, float]:
    order = {"failed": 0, "suspect": 1, "corrected": 2, "ok": 2}
    return order[report.status], report.ess_fraction * (1.0 if report.khat < 0.7 else 0.3)


def _why(report: Report) -> str:
    numbers = f"had k-hat {report.khat:.2f} and an effective share of {report.ess_fraction:.2f}"
    return numbers if report.status != "suspect" else f"{numbers} ({report.sentence.split('.')[0]})"


def _log_z(trial: Trial) -> float:
    return float(torch.logsumexp(trial.log_w, 0)) - math.log(len(trial.log_w))
