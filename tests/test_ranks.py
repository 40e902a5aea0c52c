"""Processes that count together and fail together."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from lottery_tickets import _ranks
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError, SparsityError, WeightsError


def sums(rank: int) -> tuple[list[int], bytes, bytes, int]:
    everyone = Ranks.world()
    integers = everyone.sum(np.array([1 << 60, rank, -(10**rank)]))
    floats = everyone.sum(np.array([0.1 * (rank + 1), 1e16 if rank == 1 else 1.0, float("inf")]))
    halves = torch.full((3, 5), 0.1, dtype=torch.bfloat16).t()
    everyone.add_up(halves)
    return integers.tolist(), floats.tobytes(), halves.float().numpy().tobytes(), everyone.sent


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums_are_exact_for_integers_and_the_same_bits_everywhere(ranks, size):
    found = ranks(size).run(sums)
    assert found[0][0] == [size << 60, sum(range(size)), -sum(10**rank for rank in range(size))]
    assert all(one[1:] == found[0][1:] for one in found[1:])
    assert np.frombuffer(found[0][1])[2] == np.inf


def test_a_process_alone_adds_nothing():
    alone = Ranks.world()
    assert (alone.rank, alone.size, alone.first, alone.gather("x")) == (0, 1, True, ["x"])
    assert alone.sum(np.array([3])).tolist() == [3]
    assert alone.collect("x") == ["x"]
    with pytest.raises(KeyError), alone.together(), alone.watched("nothing"):
        raise KeyError("w")
    assert alone.sent == 0


def exchange(rank: int) -> tuple[list[object], list[object] | None, list[int]]:
    everyone = Ranks.world()
    with everyone.together():
        parts = everyone.collect(list(range(rank * 3)))
    return everyone.gather({"rank": "x" * rank}), parts, everyone.least(np.array([rank, -rank])).tolist()


def test_messages_of_different_sizes(ranks):
    found = ranks(4).run(exchange)
    assert all(one[0] == [{"rank": "x" * rank} for rank in range(4)] for one in found)
    assert found[0][1] == [list(range(rank * 3)) for rank in range(4)]
    assert [one[1] for one in found[1:]] == [None] * 3
    assert [one[2] for one in found] == [[0, -3]] * 4


def hand_out(rank: int) -> bytes:
    everyone = Ranks.world()
    tensors = [torch.full((2, 3), float(rank)).t(), torch.full((4,), rank, dtype=torch.uint8), torch.empty(0)]
    tensors[0][0, 0] = -0.0 if rank == 0 else 1.0
    for tensor in tensors:
        everyone.hand_out(tensor)
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def test_what_rank_0_has_is_handed_out_bit_for_bit(ranks):
    expected = np.array([-0.0, 0, 0, 0, 0, 0], np.float32).tobytes() + bytes(4)
    assert ranks(2).run(hand_out) == [expected] * 2
    assert hand_out(0) == expected


def bring(rank: int) -> tuple[list[tuple[list[int], list[float]]], int]:
    """Of rank 1 nothing, of rank 2 more than of rank 0."""
    everyone = Ranks.world()
    shapes = [torch.Size(one) for one in ((2, 1), (0, 3), (2, 2))]
    mine = torch.full(shapes[rank], rank + 0.5, dtype=torch.bfloat16)
    with everyone.together():
        brought = [(list(one.shape), one.flatten().tolist()) for one in everyone.bring(mine, shapes)]
    return brought, everyone.sent


def test_what_each_rank_has_is_brought_to_rank_0(ranks):
    (first, sent), (second, sent_nothing), (third, sent_all) = ranks(3).run(bring)
    assert first == [([2, 1], [0.5] * 2), ([0, 3], []), ([2, 2], [2.5] * 4)]
    assert second == third == []
    assert sent == sent_nothing == sent_all - 4 * 2, "four numbers of two bytes, of one rank"
    alone = torch.ones(2)
    assert [one is alone for one in Ranks().bring(alone, [alone.shape])] == [True]


def share_out(rank: int, size: int) -> list[float]:
    everyone = Ranks.world()
    rows = torch.arange(3.0 * size).view(size, 3) * (rank + 1)
    assert everyone.share_out(rows[:, :0].contiguous(), "nothing").numel() == 0
    return everyone.share_out(rows, "w").tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_gets_the_sum_of_its_row(ranks, size):
    times = size * (size + 1) / 2
    expected = [[times * (3 * rank + place) for place in range(3)] for rank in range(size)]
    assert ranks(size).run(share_out, size) == expected


def share_out_unlike(rank: int) -> None:
    everyone = Ranks.world()
    with everyone.together():
        everyone.share_out(torch.ones(2, 3), f"experts.{rank}.weight")


def test_sums_of_different_tensors_are_not_added(ranks):
    for error in ranks(2).attempt(share_out_unlike):
        assert isinstance(error, DistributedError)
        assert "rank 0: the sum of experts.0.weight; rank 1: the sum of experts.1.weight" in str(error)


def fail(rank: int, failing: dict[int, Exception], *, before: bool) -> None:
    everyone = Ranks.world()
    with everyone.together(), everyone.together():
        if before and rank in failing:
            raise failing[rank]
        everyone.sum(np.zeros(1000 + before))
        everyone.gather(rank)
        if rank in failing:
            raise failing[rank]


def fail_before(rank: int, failing: dict[int, Exception]) -> None:
    fail(rank, failing, before=True)


def fail_at_the_end(rank: int, failing: dict[int, Exception]) -> None:
    fail(rank, failing, before=False)


@pytest.mark.parametrize("function", [fail_before, fail_at_the_end])
def test_the_first_error_of_a_rank_is_the_error_of_all(ranks, function):
    found = ranks(4).attempt(function, {2: KeyError("w"), 3: SparsityError("later")})
    assert [type(error) for error in found] == [DistributedError, DistributedError, KeyError, DistributedError]
    assert str(found[0]) == str(found[3]) == "rank 2 failed: KeyError: 'w'"
    found = ranks(4).attempt(function, {1: WeightsError("w: NaN")})
    assert [(type(error), str(error)) for error in found] == [(WeightsError, "w: NaN")] * 4
    assert ranks(4).run(exchange)  # the group is as good as before


def part_ways(rank: int) -> None:
    everyone = Ranks.world()
    with everyone.together():
        everyone.sum(np.zeros(3)) if rank else everyone.gather(1)


def sum_unlike(rank: int) -> None:
    Ranks.world().sum(np.zeros(3 + rank))


def test_ranks_that_part_ways_are_told(ranks):
    for error in ranks(2).attempt(part_ways):
        assert isinstance(error, DistributedError)
        assert "rank 0: gather of 5 bytes; rank 1: sum of 24 bytes" in str(error)
    for error in ranks(2).attempt(sum_unlike):
        assert "rank 0: sum of 24 bytes; rank 1: sum of 32 bytes" in str(error)


def die(rank: int, dying: int) -> None:
    _ranks._ROLL_CALL_SECONDS = 1.0
    everyone = Ranks.world()
    with everyone.together():
        for _ in range(5):
            everyone.sum(np.zeros(10))
        if rank == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        everyone.sum(np.zeros(10))
        time.sleep(0.2 * rank)
        everyone.gather(rank)


def test_a_killed_rank_is_named(ranks):
    with ranks.own(3) as world:
        found = world.attempt(die, 1)
    for survivor in (0, 2):
        assert isinstance(found[survivor], DistributedError)
        assert "no answer from rank 1," in str(found[survivor])


def leave_word(rank: int) -> None:
    everyone = Ranks.world()
    with everyone.watched("the forward pass"):
        if rank == 1:
            raise ValueError("a bad batch")
        # A collective of somebody else, which the failing rank never joins.
        torch.distributed.all_reduce(torch.zeros(3))


def fail_in_a_pass(rank: int) -> None:
    try:
        leave_word(rank)
    except ValueError:
        os._exit(1)


def test_a_failure_between_collectives_of_others_is_shown(ranks):
    with ranks.own(2) as world:
        found = world.attempt(fail_in_a_pass)
    assert isinstance(found[0], DistributedError)
    assert str(found[0]) == "the forward pass ended: rank 1 failed: ValueError: a bad batch"
