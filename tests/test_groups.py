from __future__ import annotations

import re

import pytest
import torch

from lmrl_env.errors import ConfigurationError
from lmrl_env.groups import by_group, has_signal


def test_adjacent_responses_are_a_group():
    rewards = torch.arange(6.0)
    groups = by_group(rewards, 3)
    assert groups.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert groups.data_ptr() == rewards.data_ptr()  # a view


@pytest.mark.parametrize(
    ("shape", "group_size"), [((5,), 2), ((4,), 1), ((4,), 0), ((4,), -2), ((0,), 2), ((4, 2), 2)]
)
@pytest.mark.parametrize("function", [by_group, has_signal])
def test_rewards_that_form_no_groups_are_refused(function, shape, group_size):
    message = (
        f"rewards of shape {shape} do not form groups of group_size={group_size}: expected shape "
        "(N,) and a group size of at least 2 that divides N"
    )
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        function(torch.zeros(shape), group_size)


def test_a_group_teaches_something_if_its_rewards_differ_by_more_than_the_tolerance():
    rewards = torch.tensor(
        [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.1, 0.1 + 1e-7, 0.1], [-1.0, -0.9, -1.0]],
        dtype=torch.float64,
    ).reshape(-1)
    assert has_signal(rewards, 3).tolist() == [True, False, False, True]
    assert has_signal(rewards, 3, tolerance=0.2).tolist() == [True, False, False, False]
    assert has_signal(rewards, 3, tolerance=0.0).tolist() == [True, False, True, True]


def test_a_range_of_just_the_tolerance_is_no_signal():
    assert has_signal(torch.tensor([0.0, 0.25]), 2, tolerance=0.25).tolist() == [False]
