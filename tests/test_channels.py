"""Constraints on channels become coupled groups and interchangeable sets."""

import numpy as np
import pytest
import torch

from helpers.sparsity.channels import Channels, gather_index, gather_positions


def partition(numbers: np.ndarray) -> list[list[int]]:
    """Return which channels have the same number, without those that have -1."""
    parts = [np.flatnonzero(numbers == each).tolist() for each in set(numbers.tolist()) - {-1}]
    return sorted(parts)


def test_channels_without_a_constraint_are_one_interchangeable_set():
    channels = Channels()
    channels.new(4)
    groups = channels.solve()
    assert len(partition(groups.coupled_group)) == 4
    assert partition(groups.interchangeable_set) == [[0, 1, 2, 3]]


def test_coupled_channels_are_a_group_and_ranked_by_their_numbers():
    channels = Channels()
    left, right = channels.new(2), channels.new(2)
    channels.couple(left, right)
    groups = channels.solve()
    assert partition(groups.coupled_group) == [[0, 2], [1, 3]]
    assert groups.rank.tolist() == [0, 0, 1, 1]
    assert partition(groups.interchangeable_set) == [[0, 1, 2, 3]]


def test_left_and_right_of_a_coupling_are_told_apart():
    """Of the first group the left channel has the lower number, of the second the right one."""
    channels = Channels()
    channels.new(4)
    channels.couple(torch.tensor([0, 3]), torch.tensor([1, 2]))
    groups = channels.solve()
    assert partition(groups.coupled_group) == [[0, 1], [2, 3]]
    assert partition(groups.interchangeable_set) == [[0, 1], [2, 3]]


def test_a_membership_is_not_a_coupling_of_the_same_operator():
    """Both groups are coupled by operator 0; a channel of one is also a member of it."""
    for operand in range(3):
        channels = Channels()
        channels.new(4)
        channels.couple(torch.tensor([0]), torch.tensor([1]))
        channels.couple(torch.tensor([2]), torch.tensor([3]))
        channels.join(torch.tensor([2]), operand)
        assert len(partition(channels.solve().interchangeable_set)) == 2


@pytest.mark.parametrize("part", [(0,), (0, 1), (1, 0)])
def test_members_of_different_parts_do_not_change_places(part):
    channels = Channels()
    channels.new(4)
    channels.join(torch.tensor([0, 1]), 0, 0)
    channels.join(torch.tensor([2, 3]), *part)
    assert partition(channels.solve().interchangeable_set) == [[0, 1], [2, 3]]


def test_a_fixed_channel_keeps_its_group_and_gives_the_first_reason():
    channels = Channels()
    left, right = channels.new(2), channels.new(2)
    channels.couple(left, right)
    channels.fix(right[:1], "it leaves the network")
    channels.fix(left[:1], "a later reason")
    groups = channels.solve()
    assert partition(groups.interchangeable_set) == [[1, 3]]
    assert groups.why_fixed(0) == groups.why_fixed(2) == "it leaves the network"
    assert groups.why_fixed(1) == ""


def test_a_value_that_meets_several_channels_is_fixed_and_they_are_not_coupled():
    channels = Channels()
    one, several = channels.new(1), channels.new(3)
    assert channels.couple(one, several).tolist() == several.tolist()
    groups = channels.solve()
    assert groups.why_fixed(0) == "it meets several channels at once"
    assert partition(groups.interchangeable_set) == [[1, 2, 3]]


def test_channels_that_differ_along_the_other_dimensions_are_coupled():
    channels = Channels()
    labels = channels.new(2, 3)
    assert channels.reduce_to(labels, 1).tolist() == [0, 1, 2]
    assert partition(channels.solve().coupled_group) == [[0, 3], [1, 4], [2, 5]]


def test_whole_groups_move_rank_by_rank():
    channels = Channels()
    left, right = channels.new(3), channels.new(3)
    channels.couple(left, right)
    groups = channels.solve()
    move = np.array([0, 1, 2]), np.array([2, 0, 1])
    assert gather_index(groups, [move]).tolist() == [2, 0, 1, 5, 3, 4]


def test_the_occurrences_of_a_channel_are_read_in_order():
    along = np.array([7, 7, 5, 5, 6, 6])
    index = np.arange(8)
    index[[5, 6, 7]] = [6, 7, 5]
    assert gather_positions(along, index).tolist() == [2, 3, 4, 5, 0, 1]
