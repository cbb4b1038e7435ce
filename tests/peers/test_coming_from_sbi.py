"""The page for users of sbi: its examples with sbi run, and the names it gives for sbi are sbi's."""

import re
import warnings
from importlib import import_module
from typing import Any

import pytest
import torch

from test_coming_from_sbi import PAGE, blocks

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
pytest.importorskip("sbi")


def test_examples_with_sbi(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(with_sbi=True):
            exec(compile(block, "coming-from-sbi.md", "exec"), names)
    assert len(blocks(with_sbi=True)) == 3
    assert (names["samples"].mean(0) - names["x_o"]).abs().max() < 0.15
    assert (names["samples"].std(0) - 0.3).abs().max() < 0.1
    # the status hangs on k-hat, which for a flow's tail differs between processors
    assert names["posterior"].report.total_variation < 0.05 and "k-hat" in capsys.readouterr().out
    assert names["ranks"].shape == (100, 2)


def test_every_name_of_theirs_is_there() -> None:
    table = PAGE.split("## Names")[1].split("## What differs")[0]
    names = set(re.findall(r"`(sbi\.[\w.]+)", table))
    assert len(names) > 12
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name
