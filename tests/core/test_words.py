"""Values in words are the same in another process and differ where the values do."""

import json

import numpy as np
import pytest
import torch

from visbi.core.words import in_words


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "text", np.int64(3), np.float32(0.5)])
def test_plain_values_are_themselves(value):
    assert json.loads(json.dumps(in_words(value))) == value


def test_tensors_by_their_numbers():
    long = torch.zeros(2000)
    other = long.clone()
    other[1000] = 1.0
    assert in_words(long) == in_words(long.clone()) != in_words(other)


def test_code_by_its_name():
    def made():
        def inner():
            raise NotImplementedError

        return inner

    assert in_words(made()) == in_words(made()) != in_words(print)
    assert "0x" not in in_words(made()) + in_words(object())
