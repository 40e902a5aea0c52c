"""Selection by counting, by every route, against the sort and against a ranking in plain Python: the same bits."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lottery_tickets.errors import SparsityError, WeightsError
from lottery_tickets.sparsity import Selection, Sorting, _blocks, _selection
from strategies import DTYPES, from_patterns, sparsities, weights


@contextlib.contextmanager
def small_blocks(size: int = 64) -> Iterator[None]:
    """Cut even small tensors into several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "_LARGEST_BLOCK", size)
        patch.setattr(_blocks, "_SMALLEST_BLOCK", size)
        yield


@contextlib.contextmanager
def bracket_at_any_size(guess: Callable[[np.ndarray], tuple[int, int]] | None = None) -> Iterator[list[bool]]:
    """Guess a bracket from four weights on; the list tells for each line whether its bracket held.

    With `guess`, that function of all magnitudes is the bracket instead of the sample's.
    """
    tried: list[bool] = []
    by_guess = Selection._lines_by_guess

    def watched(self: Selection, ranks: list[int]):
        lines = by_guess(self, ranks)
        tried.extend([lines is not None] * len(ranks))
        return lines

    def guessed(self: Selection, ranks: list[int]) -> list[tuple[int, int]]:
        magnitudes = [self._weights.integers(block).numpy() for block in self._weights.blocks]
        ordered = np.sort(np.concatenate([found & np.iinfo(found.dtype).max for found in magnitudes]))
        return [guess(ordered) for _ in ranks]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_selection, "_BRACKET_FROM", 4)
        patch.setattr(_selection, "_SAMPLE_SHARE", 4)
        patch.setattr(Selection, "_lines_by_guess", watched)
        if guess is not None:
            patch.setattr(Selection, "_guess_brackets", guessed)
        yield tried


def mask_of(selector: Selection | Sorting, removed: int) -> dict[str, bytes]:
    (line,) = selector.lines([removed])
    return {name: bits.tobytes() for name, bits in selector.bits(line).items()}


def oracle_of(tensors: dict[str, torch.Tensor], removed: int) -> dict[str, bytes]:
    return {name: oracles.packed(mask) for name, mask in oracles.magnitude_mask(tensors, removed).items()}


def numel_of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def same_number(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


# --- The same bits by every route ---


@settings(max_examples=150)
@given(weights(), sparsities())
def test_radix_sort_and_oracle_agree(tensors, sparsity):
    removed = round(sparsity * numel_of(tensors))
    expected = oracle_of(tensors, removed)
    assert mask_of(Sorting(tensors), removed) == expected
    assert mask_of(Selection(tensors), removed) == expected
    with small_blocks():
        assert mask_of(Selection(tensors), removed) == expected


@settings(max_examples=100)
@given(weights(nan=True), sparsities())
def test_nan_goes_first_where_asked(tensors, sparsity):
    removed = round(sparsity * numel_of(tensors))
    expected = oracle_of(tensors, removed)
    assert mask_of(Sorting(tensors, nan="prune"), removed) == expected
    with small_blocks():
        assert mask_of(Selection(tensors, nan="prune"), removed) == expected
        with bracket_at_any_size():
            assert mask_of(Selection(tensors, nan="prune"), removed) == expected


@settings(max_examples=100)
@given(weights(), sparsities())
def test_a_sampled_bracket_gives_the_same_bits(tensors, sparsity):
    removed = round(sparsity * numel_of(tensors))
    with small_blocks(), bracket_at_any_size():
        assert mask_of(Selection(tensors), removed) == oracle_of(tensors, removed)


@settings(max_examples=150)
@given(weights(), sparsities(), st.data())
def test_any_bracket_is_proven_or_refuted(tensors, sparsity, data):
    """Whatever the guess, and even a wrong one, the line is the same: the counts decide."""
    removed = round(sparsity * numel_of(tensors))

    def guess(magnitudes: np.ndarray) -> tuple[int, int]:
        ends = data.draw(st.lists(st.integers(0, magnitudes.size - 1), min_size=2, max_size=2).map(sorted))
        return int(magnitudes[ends[0]]), int(magnitudes[ends[1]])

    with small_blocks(), bracket_at_any_size(guess) as held:
        assert mask_of(Selection(tensors), removed) == oracle_of(tensors, removed)
    assert len(held) == (removed > 0)


class Passes:
    """Pages that advise nothing, and count how often all weights are read."""

    def __init__(self) -> None:
        self.numels: list[int] = []

    def gather(self, views):
        return [view.reshape(-1) for view in views]

    @contextlib.contextmanager
    def reading(self, runs):
        self.numels.append(sum(run.numel() for run in runs))
        yield lambda turn: contextlib.nullcontext()


@settings(max_examples=100)
@given(weights(), st.lists(sparsities(), min_size=1, max_size=10), st.sampled_from([0, 256]))
def test_lines_through_weights_in_files(tensors, asked, counted):
    """Where passes cost a disk, several lines are guessed together; the bits are those of each alone."""
    removals = [round(sparsity * numel_of(tensors)) for sparsity in asked]
    with small_blocks(), bracket_at_any_size(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_selection, "_COUNTED_UP_TO", counted)
        selection = Selection(tensors, pages=Passes())
        found = selection.bits_of_each(selection.lines(removals))
    for removed, bits in zip(removals, found, strict=True):
        assert {name: packed.tobytes() for name, packed in bits.items()} == oracle_of(tensors, removed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_passes_over_a_file_for_any_few_lines(dtype):
    tensors, pages = spread(1 << 16, dtype), Passes()
    with bracket_at_any_size():
        selection = Selection(tensors, pages=pages)
        selection.bits_of_each(selection.lines([6000, 30_000, 60_000]))
    assert pages.numels == [1 << 16, 1 << 16]


def spread(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return {"first": values[: count // 3].reshape(-1, 1), "second": values[count // 3 :]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(0.4, 0.6, True), (0.5, 0.5, None), (0.0, 1.0, True), (0.0, 0.1, False), (0.9, 1.0, False)],
)
def test_brackets_that_hold_and_that_do_not(dtype, low, high, holds):
    tensors = spread(3000, dtype)

    def guess(magnitudes):
        return tuple(int(magnitudes[int(share * (magnitudes.size - 1))]) for share in (low, high))

    with small_blocks(256), bracket_at_any_size(guess) as held:
        assert mask_of(Selection(tensors), 1500) == oracle_of(tensors, 1500)
    assert holds is None or held == [holds]


def test_a_bracket_too_full_to_store_falls_back(monkeypatch):
    tensors = spread(3000)
    monkeypatch.setattr(_selection, "_BRACKET_BYTES", 64)
    with small_blocks(256), bracket_at_any_size(lambda magnitudes: (0, int(magnitudes[-1]))) as held:
        assert mask_of(Selection(tensors), 1500) == oracle_of(tensors, 1500)
    assert held == [False]


def test_ties_that_fill_the_bracket_are_not_stored(monkeypatch):
    """Half of the weights zero, the line among them: the bracket is one point and stores nothing."""
    tensors = {"w": torch.cat([torch.zeros(2000), torch.rand(2000) + 1])}
    monkeypatch.setattr(_selection, "_BRACKET_BYTES", 0)
    with small_blocks(256), bracket_at_any_size() as held:
        assert mask_of(Selection(tensors), 1000) == oracle_of(tensors, 1000)
    assert held == [True]


def test_the_sample_settles_a_large_selection():
    """At the size from which it is used, the guess holds on plain weights: else it would be no use."""
    tensors = {"w": torch.randn(_selection._BRACKET_FROM, generator=torch.Generator().manual_seed(1))}
    assert Selection(tensors)._lines_by_guess([tensors["w"].numel() // 2]) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tensors_with_ties_by_both_routes(dtype):
    """Sizes at which blocks, brackets and threads are those of real use; numpy's stable sort is the oracle."""
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2_100_001, generator=generator), torch.randn(1_500, 1_500, generator=generator)
    tensors = {"first": (first * 64).round().to(dtype) / 64, "second": second.to(dtype).t()}
    scores = np.concatenate([tensor.double().abs().reshape(-1).numpy() for tensor in tensors.values()])
    order = np.argsort(scores, kind="stable")
    for removed in (1, scores.size // 3, scores.size - 1):
        kept = np.ones(scores.size, bool)
        kept[order[:removed]] = False
        expected = (
            np.packbits(kept[:2_100_001], bitorder="little"),
            np.packbits(kept[2_100_001:], bitorder="little"),
        )
        for lines in (Selection(tensors).lines([removed]), Selection(tensors).lines([removed, 5])[:1]):
            bits = Selection(tensors).bits(lines[0])
            assert np.array_equal(bits["first"], expected[0])
            assert np.array_equal(bits["second"], expected[1])


# --- Lines ---


@settings(max_examples=60)
@given(weights(nan=True), st.lists(sparsities(), min_size=1, max_size=12))
def test_many_lines_from_one_count_equal_single_ones(tensors, asked):
    removals = [round(sparsity * numel_of(tensors)) for sparsity in asked]
    with small_blocks():
        together = Selection(tensors, nan="prune")
        plain = Sorting(tensors, nan="prune")
        for removed, line, sorted_line in zip(
            removals, together.lines(removals), plain.lines(removals), strict=True
        ):
            (alone,) = Selection(tensors, nan="prune").lines([removed])
            assert (line.key, line.removed) == (alone.key, alone.removed)
            assert np.array_equal(line.quotas, alone.quotas)
            assert line.removed == sorted_line.removed
            expected = oracles.magnitude_mask(tensors, removed)
            assert line.removed == {name: int((~mask).sum()) for name, mask in expected.items()}
            for found in (line, sorted_line):
                assert same_number(found.threshold, oracles.threshold(tensors, removed))


@settings(max_examples=60)
@given(weights(nan=True), st.data())
def test_kth_smallest(tensors, data):
    numel = numel_of(tensors)
    ranks = data.draw(st.lists(st.integers(1, numel), max_size=12)) if numel else []
    scores = [score for score, *_ in oracles.ranking(tensors)]
    found = Selection(tensors, nan="prune").kth_smallest(ranks)
    for rank, (magnitude, ties) in zip(ranks, found, strict=True):
        score = scores[rank - 1]
        assert same_number(magnitude, score if score >= 0 else float("nan"))
        assert ties == rank - sum(other < score for other in scores)


def test_more_lines_than_one_pass_counts():
    """Beyond eight prefixes fp32 and fp64 are settled by fewer bits a pass."""
    for dtype, step in ((torch.float32, 250), (torch.float64, 250), (torch.float32, 19)):
        tensors = spread(5000, dtype)
        ranks = list(range(0, 5000, step))
        for rank, line in zip(ranks, Selection(tensors).lines(ranks), strict=True):
            assert line.threshold == oracles.threshold(tensors, rank)


@pytest.mark.parametrize("selector", [Selection, Sorting])
@pytest.mark.parametrize("rank", [-1, 5])
def test_ranks_that_no_weight_has(selector, rank):
    with pytest.raises(SparsityError, match=f"Cannot remove {rank} of 4 weights"):
        selector({"w": torch.ones(4)}).lines([rank])


# --- One thread or many ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    tensors = spread(100_000, dtype)
    before = torch.get_num_threads()
    masks = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            with small_blocks(4096):
                selection = Selection(tensors)
                masks.append(
                    [
                        {n: b.tobytes() for n, b in selection.bits(line).items()}
                        for line in selection.lines([10_000, 50_000, 90_000])
                    ]
                )
    finally:
        torch.set_num_threads(before)
    assert masks[0] == masks[1] == masks[2]


def test_several_threads_may_select_at_once():
    tensors = spread(200_000)
    expected = mask_of(Selection(tensors), 100_000)
    found: list[dict[str, bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append(mask_of(Selection(tensors), 100_000))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_flushing_subnormals_changes_nothing():
    patterns = np.random.default_rng(0).integers(0, 1 << 10, 1000)
    tensors = {"w": -from_patterns(patterns, torch.float32)}
    expected = oracle_of(tensors, 400)
    assert torch.set_flush_denormal(True)
    try:
        assert mask_of(Selection(tensors), 400) == expected
    finally:
        torch.set_flush_denormal(False)


# --- Over ranks ---


def over_ranks(shards: list[dict[str, torch.Tensor]], work: Callable[[Selection], object], **options) -> list:
    """Run `work` on every shard in a thread of its own, its counts summed over all of them."""
    meeting = threading.Barrier(len(shards), timeout=10)
    board: list[np.ndarray | None] = [None] * len(shards)
    answers: list[object] = [None] * len(shards)

    def rank(index: int) -> None:
        def reduce(counts: np.ndarray) -> np.ndarray:
            board[index] = counts.copy()
            meeting.wait()
            total = sum(board)
            meeting.wait()
            return total

        try:
            answers[index] = work(Selection(shards[index], reduce=reduce, **options))
        except Exception as error:
            answers[index] = error

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nan", ["raise", "prune"])
def test_counts_summed_over_ranks_find_what_the_whole_finds(dtype, nan):
    values = (torch.randn(4000, generator=torch.Generator().manual_seed(3)) * 16).round().to(dtype)
    if nan == "prune":
        values[::7] = float("nan")
    ranks = [1, 500, 2000, 3999, 4000]
    whole = Selection({"w": values}, nan=nan).kth_smallest(ranks)
    shards = [{"w": part} for part in values.split([10, 0, 2500, 1490])]
    for answer in over_ranks(shards, lambda selection: selection.kth_smallest(ranks), nan=nan):
        assert [ties for _, ties in answer] == [ties for _, ties in whole]
        for (found, _), (expected, _) in zip(answer, whole, strict=True):
            assert same_number(found, expected)


def test_nan_on_one_rank_stops_every_rank():
    shards = [{"w": torch.tensor([1.0, float("nan")])}, {"w": torch.tensor([2.0, 3.0])}]
    answers = over_ranks(shards, lambda selection: selection.kth_smallest([1]))
    assert [type(answer) for answer in answers] == [WeightsError, WeightsError]
    assert "w (1)" in str(answers[0])
    assert "1 found on another rank" in str(answers[1])


def test_ranks_agree_on_what_weights_are_compared_in():
    shards = [
        {},
        {"w": torch.tensor([1.5], dtype=torch.bfloat16)},
        {"v": torch.tensor([1.1], dtype=torch.float64)},
    ]
    for answer in over_ranks(shards, lambda selection: selection.kth_smallest([1, 2])):
        assert answer == [(1.1, 1), (1.5, 1)]


def test_a_rank_beyond_all_weights_is_refused():
    for asked in (0, 4):
        answers = over_ranks([{"w": torch.ones(1)}, {"w": torch.ones(2)}], lambda s, k=asked: s.kth_smallest([k]))
        assert [type(answer) for answer in answers] == [SparsityError, SparsityError]
        assert f"rank {asked} of 3 weights" in str(answers[0])


def test_lines_are_of_one_rank_alone():
    """Ties are settled by position among all weights, which one rank does not see."""
    with pytest.raises(SparsityError, match=r"lines\(\) .* reduce.* kth_smallest"):
        Selection({"w": torch.ones(4)}, reduce=lambda counts: 2 * counts).lines([1])


# --- Scores in the place of weights ---


@settings(max_examples=60)
@given(weights(), sparsities(), st.lists(st.floats(2**-20, 2**20), min_size=5, max_size=5))
def test_rescored_weights(tensors, sparsity, factors):
    importance = dict(zip(tensors, factors, strict=False))
    removed = round(sparsity * numel_of(tensors))

    def rescore(name, values):
        return values.double().abs() * importance[name]

    expected = {
        name: oracles.packed(mask) for name, mask in oracles.magnitude_mask(tensors, removed, importance).items()
    }
    options = {"rescore": rescore, "dtype": torch.float64}
    assert mask_of(Sorting(tensors, **options), removed) == expected
    with small_blocks():
        assert mask_of(Selection(tensors, **options), removed) == expected
        with bracket_at_any_size():
            assert mask_of(Selection(tensors, **options), removed) == expected


# --- What has no rank ---


@pytest.mark.parametrize("selector", [Selection, Sorting])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_refused_with_its_place_and_number(selector, dtype, sign):
    broken = torch.ones(300, dtype=dtype)
    broken[[3, 250]] = torch.tensor(float("nan"), dtype=dtype) * sign
    with pytest.raises(WeightsError, match=r"NaN has no rank .* fc\.weight \(2\).*nan='prune'"):
        selector({"ok": torch.ones(5, dtype=dtype), "fc.weight": broken}).lines([100])


def test_nan_is_refused_by_the_bracket_too():
    tensors = {"ok": torch.ones(500), "fc.weight": torch.full((500,), float("nan"))}
    with (
        small_blocks(),
        bracket_at_any_size(),
        pytest.raises(WeightsError, match=r"found in fc\.weight \(500\)"),
    ):
        Selection(tensors).lines([400])


@pytest.mark.parametrize("selector", [Selection, Sorting])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, device="meta"), "fc is on the meta device and has no values; load"),
        (torch.ones(3, dtype=torch.int8), r"fc: .* got torch\.int8, torch\.strided\. Convert or exclude it"),
        (torch.ones(3).to_sparse(), r"fc: .* got torch\.float32, torch\.sparse_coo"),
        (torch.ones(3, dtype=torch.float8_e4m3fn), r"fc: .* got torch\.float8_e4m3fn"),
        (torch.ones(3, dtype=torch.complex64), r"fc: .* got torch\.complex64"),
        ([1.0, 2.0], "fc: expected a tensor of weights, got list"),
    ],
)
def test_what_has_no_magnitudes_is_refused(selector, weight, message):
    with pytest.raises(WeightsError, match=message):
        selector({"fc": weight})
