"""A killed inference goes on where it stopped: nothing finished is done again, the numbers are the same."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints

import visbi.rounds.learning as learning_module
import visbi.rounds.sequential as sequential_module
from visbi.core.archive import read_archive, write_archive
from visbi.core.random import seeded
from visbi.estimators import TrainingOptions
from visbi.posterior import VIPosterior
from visbi.rounds import Inference, infer
from visbi.saving.likelihoods import load_likelihood
from visbi.simulators.zoo import linear_gaussian

TASK = linear_gaussian.task()
SMALL: dict[str, Any] = dict(
    simulations=(300, 100),
    q="gaussian",
    ensemble=2,
    num_transforms=1,
    hidden_features=8,
    stop_early=False,
    options=TrainingOptions(max_epochs=2),
    train={"max_num_iters": 5, "init": "prior", "quality_control": False},
    show_progress_bar=False,
    seed=7,
)


class Killed(BaseException):
    """In the place of a signal."""


def small(store: Path | None, simulator=TASK.simulator, **changes) -> Inference:
    return infer(simulator, TASK.prior, TASK.x_o, store=store, **{**SMALL, **changes})


def numbers(result: Inference) -> list[Any]:
    """All that a result says, as values that can be compared."""
    with seeded(1):
        draws = [done.posterior.sample((100,)).tolist() for done in result.rounds]
    return [
        [(runs.theta.tolist(), runs.x.tolist(), runs.failures) for runs in result.simulations],
        [(done.n_used, done.errors, done.report, done.likelihood.traces) for done in result.rounds],
        draws,
        result.stop_reason,
    ]


@pytest.fixture(scope="module")
def undisturbed() -> list[Any]:
    return numbers(small(None))


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "new"
    small(folder)
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often networks are trained and q is fitted; raises `Killed` where `kill` is set to that."""
    calls: dict[str, Any] = {"learn": 0, "fit": 0, "judge": 0, "kill": ("", 0)}

    def counting(name: str, module: Any, attribute: str) -> None:
        inner = getattr(module, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if calls["kill"] == (name, calls[name]):
                raise Killed
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, attribute, wrapped)

    counting("learn", learning_module, "fit_likelihood")
    counting("fit", sequential_module, "_fitted")
    counting("judge", sequential_module, "_judged")
    return calls  # type: ignore[return-value]


def never(theta: Tensor) -> Tensor:
    raise AssertionError("a finished run was repeated")


never.__qualname__ = TASK.simulator.__qualname__  # a store knows its simulator by it
pytestmark = pytest.mark.filterwarnings("ignore:.*whose code was another")  # that of `never`


def test_a_store_changes_no_number(stored: Path, undisturbed: list[Any]) -> None:
    assert numbers(small(stored, never)) == undisturbed


def test_a_finished_store_is_only_read(stored: Path, counted: dict[str, int]) -> None:
    before = {path: path.stat().st_mtime_ns for path in stored.rglob("*")}
    seen = []
    small(stored, never, on_round=seen.append)
    assert (counted["learn"], counted["fit"]) == (0, 0) and len(seen) == 2
    assert before == {path: path.stat().st_mtime_ns for path in stored.rglob("*")}


@pytest.mark.parametrize(
    ("kill", "left"),  # how much is to be done afterwards
    [
        (("learn", 1), (2, 2)),
        (("judge", 1), (1, 2)),
        (("fit", 2), (0, 1)),
    ],
)
def test_goes_on_where_it_was_killed(
    tmp_path: Path,
    undisturbed: list[Any],
    counted: dict[str, Any],
    kill: tuple[str, int],
    left: tuple[int, int],
) -> None:
    counted["kill"] = kill
    with pytest.raises(Killed):
        small(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    counted.update(learn=0, fit=0, kill=("", 0))
    assert numbers(small(tmp_path)) == undisturbed
    assert (counted["learn"], counted["fit"]) == left
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}.items()


def test_killed_while_simulating(tmp_path: Path, undisturbed: list[Any]) -> None:
    calls: list[Tensor] = []
    killed: list[int] = []

    def simulator(theta: Tensor) -> Tensor:
        calls.append(theta)
        if len(theta) == 44 and not killed:  # the last of the first 300
            killed.append(len(calls))
            raise Killed
        return TASK.simulator(theta)

    simulator.__qualname__ = TASK.simulator.__qualname__
    with pytest.raises(Killed):
        small(tmp_path, simulator)
    (n_before,) = killed
    result = small(tmp_path, simulator)
    assert numbers(result) == undisturbed
    finished = [theta for theta in calls[: n_before - 1] if len(theta) == 256]
    assert len(finished) == 1  # is not run again, unlike the one in which the kill fell
    again = [theta for theta in calls[n_before:] if len(theta) in (44, 256)]
    assert len(again) == 1 and torch.equal(again[0], calls[n_before - 1])


def test_left_over_drafts_are_cleared(stored: Path) -> None:
    draft = stored / "round-01" / ".posterior.visbi.0123.part"
    draft.write_bytes(b"half of a file")
    small(stored, never)
    assert not draft.exists()


def test_seed_of_a_store_is_taken(stored: Path, undisturbed: list[Any]) -> None:
    assert numbers(small(stored, never, seed=None)) == undisturbed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(seed=8), "seed 8"),
        (dict(simulations=(300, 101)), r"simulations \[300, 101\]"),
        (dict(simulations=(301,)), r"simulations \[301\]"),
        (dict(q="maf"), "q 'maf'"),
        (dict(ensemble=1), "ensemble 1"),
        (dict(prior_share=0.5), "prior_share 0.5"),
        (dict(options=TrainingOptions(max_epochs=3)), "options {'max_epochs': 3} "),
        (dict(train={**SMALL["train"], "max_num_iters": 6}), "train {'max_num_iters': 6} "),
    ],
)
def test_a_store_of_another_inference(stored: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"`store`: expected a store made with {named}"):
        small(stored, never, **changes)


def test_only_what_differs_is_printed(stored: Path) -> None:
    with pytest.raises(ValueError, match=r"got .* with options {'max_epochs': 2}$"):
        small(stored, never, options=TrainingOptions(max_epochs=3))


STARTS = torch.zeros(2000, 2)
STARTS[[0, -1]] = 1.0  # what a tensor shows of itself


def test_tensors_in_train_are_told_by_their_numbers(tmp_path: Path) -> None:
    others = STARTS.clone()
    others[1000] = 0.5
    assert repr(others) == repr(STARTS)
    few: dict[str, Any] = dict(simulations=(60,), ensemble=1)
    small(tmp_path, train={**SMALL["train"], "init": STARTS}, **few)
    small(tmp_path, never, train={**SMALL["train"], "init": STARTS.clone()}, **few)
    with pytest.raises(ValueError, match=r"expected a store made with train {'init': 'sha256"):
        small(tmp_path, never, train={**SMALL["train"], "init": others}, **few)


def own_optimizer() -> Any:
    def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr)

    return adam


def test_functions_in_train_are_told_by_their_names(tmp_path: Path) -> None:
    """Where they lie in memory is another place in the process that goes on."""
    few: dict[str, Any] = dict(simulations=(60,), ensemble=1)
    first, other = own_optimizer(), own_optimizer()
    assert repr(first) != repr(other)
    small(tmp_path, train={**SMALL["train"], "optimizer": first}, **few)
    small(tmp_path, never, train={**SMALL["train"], "optimizer": other}, **few)


def test_usable_is_told_by_what_it_leaves(tmp_path: Path) -> None:
    few: dict[str, Any] = dict(simulations=(100, 60), ensemble=1)
    first = numbers(small(tmp_path, usable=lambda x: x[:, 0] > -1.0, **few))

    def renamed(x: Tensor) -> Tensor:
        return x[:, 0] + 1.0 > 0.0

    assert numbers(small(tmp_path, never, usable=renamed, **few)) == first
    for other in (None, lambda x: x[:, 0] > -0.9, lambda x: x[:, 0] < 1.0):
        with pytest.raises(ValueError, match=r"`usable`: expected .* round 1 .*choose another folder"):
            small(tmp_path, never, usable=other, **few)


def test_one_that_leaves_all_is_as_none(stored: Path, undisturbed: list[Any]) -> None:
    everything = small(stored, never, usable=lambda x: torch.ones(len(x), dtype=torch.bool))
    assert numbers(everything) == undisturbed


def test_a_store_from_before_usable_was_told_by_what_it_leaves(
    stored: Path, tmp_path: Path, undisturbed: list[Any]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    for path in copy.rglob("usable.visbi"):
        path.unlink()
    archive = read_archive(copy / "settings.visbi", "rounds")
    train = {name: repr(value) for name, value in SMALL["train"].items()}
    old = {**archive.content, "usable": None, "train": train}
    write_archive(copy / "settings.visbi", replace(archive, content=old))
    assert numbers(small(copy, never)) == undisturbed
    with pytest.raises(ValueError, match=r"made with train {'max_num_iters': '6'}"):
        small(copy, never, train={**SMALL["train"], "max_num_iters": 6})
    with pytest.raises(ValueError, match=r"made with usable '.*<lambda>'"):
        small(copy, never, usable=lambda x: x[:, 0] > -1.0)


def test_further_rounds_go_on_from_a_finished_store(
    stored: Path, tmp_path: Path, counted: dict[str, int]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    longer = (300, 100, 80)
    before = {path: path.stat().st_mtime_ns for path in copy.glob("round-0?/*.visbi")}
    grown = numbers(small(copy, simulations=longer))
    assert (counted["learn"], counted["fit"]) == (1, 1)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in copy.rglob("*.visbi")}.items()
    assert grown == numbers(small(None, simulations=longer))
    assert numbers(small(copy, never, simulations=longer)) == grown
    with pytest.raises(ValueError, match=r"got .* with simulations \[300, 100, 80\]"):
        small(copy, never, simulations=(300, 100, 90))


def test_fewer_rounds_of_a_store(stored: Path, undisturbed: list[Any]) -> None:
    settings = (stored / "settings.visbi").read_bytes()
    first = small(stored, never, simulations=(300,))
    assert len(first.rounds) == 1 and numbers(first)[1] == undisturbed[1][:1]
    assert (stored / "settings.visbi").read_bytes() == settings
    assert numbers(small(stored, never)) == undisturbed


def test_another_observation_or_prior(stored: Path) -> None:
    with pytest.raises(ValueError, match=r"made with x_o"):
        infer(TASK.simulator, TASK.prior, TASK.x_o + 1, store=stored, **SMALL)
    other = torch.distributions.Independent(Normal(torch.zeros(2), 3 * torch.ones(2)), 1)
    with pytest.raises(ValueError, match="theta"):
        infer(TASK.simulator, other, TASK.x_o, store=stored, **SMALL)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`store`: expected an empty folder or a store of infer"):
        small(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_file_says_so(stored: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    path = copy / "round-01" / "likelihood.visbi"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"likelihood.visbi"):
        small(copy, never)


def test_a_store_from_before_likelihoods_were_tested(stored: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    path = copy / "round-01" / "round.visbi"
    archive = read_archive(path, "round")
    old = {name: archive.content[name] for name in ("q", "likelihood", "moved", "q_status")}
    write_archive(path, replace(archive, content=old))
    errors, now = small(copy, never).errors, small(stored, never).errors
    assert (errors.likelihood_p, errors.likelihood_finding) == (None, "") and now.likelihood_p is not None
    assert replace(now, likelihood_p=None, likelihood_finding="") == errors


def test_a_round_s_files_can_be_used_by_themselves(stored: Path) -> None:
    posterior = VIPosterior.load(stored / "round-01" / "posterior.visbi")
    assert posterior.sample((7,)).shape == (7, 2)
    trained = load_likelihood(stored / "round-01" / "likelihood.visbi", {})
    assert len(trained.estimator) == 2 and [len(t.validation) for t in trained.traces] == [2, 2]


class Own(Distribution):
    """A prior of a class that no file can hold."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return 2 * torch.randn(*sample_shape, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        return Normal(0.0, 2.0).log_prob(value).sum(-1)


def test_a_prior_of_a_user_s_own_class(tmp_path: Path) -> None:
    first = infer(TASK.simulator, Own(), TASK.x_o, store=tmp_path, **SMALL)
    again = infer(never, Own(), TASK.x_o, store=tmp_path, **SMALL)
    assert numbers(first) == numbers(again)


def test_settings_are_plain(stored: Path) -> None:
    import zipfile

    with zipfile.ZipFile(stored / "settings.visbi") as file:
        content = json.loads(file.read("manifest.json"))["content"]
    assert content["seed"] == 7 and content["simulations"] == [300, 100]
