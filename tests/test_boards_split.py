"""The fastest split of layers over boards, against every split there is. No model, no network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_edge.models.errors import UsageError
from moe_edge.schedulers.boards_forecast import BlockWork, BoardsForecast, BoardSpeeds, forecast_boards
from moe_edge.schedulers.boards_split import EVEN_SHARE, SPARE_BYTES, fastest_split, split_by_speed
from moe_edge.schedulers.budget import MIB
from moe_edge.schedulers.estimate import MachineSpeeds, ModelWork
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.workers import BoardFacts, exact_split, parse_split, split_layers

CLIENT = MachineSpeeds(disk=440e6, memory=25e9, compute=20e9, prefill=40e9)


def model(experts: Sequence[int], dense: Sequence[int], *, n_experts: int = 16, used: int = 2) -> BlockWork:
    """experts, dense: MiB of each block's; 0: it has no experts."""
    with_experts = [block for block, size in enumerate(experts) if size]
    units = [experts[block] * MIB // n_experts for block in with_experts for _ in range(n_experts)]
    layout = Layout((n_experts,) * len(with_experts), 1, tuple(units))
    dense_bytes = tuple(size * MIB for size in dense)
    return BlockWork(
        ModelWork(layout, used, sum(dense_bytes)), tuple(with_experts), dense_bytes,
        tuple(size * MIB for size in experts), (MIB,) * len(experts), 0.5, 2048, 0,
    )  # fmt: skip


def board(ram_mib: int, disk: float = 440e6, compute: float = 20e9) -> BoardSpeeds:
    return BoardSpeeds(ram_mib * MIB, 4 * MIB, MachineSpeeds(disk, 25e9, compute, 40e9), 0.2e-3, 125e6)


def with_spare(boards: Sequence[BoardSpeeds]) -> list[BoardSpeeds]:
    """As the policy counts them, which leaves a little of each budget alone."""
    return [
        BoardSpeeds(b.ram_bytes, b.fixed_bytes + SPARE_BYTES, b.speeds, b.latency_seconds, b.network_bytes_per_second)
        for b in boards
    ]


def every_split(whole: BlockWork, n_boards: int) -> Iterator[list[range]]:
    n = len(whole.dense_bytes)
    for ends in itertools.combinations(range(1, n), n_boards - 1):
        runs = [range(a, b) for a, b in itertools.pairwise([0, *ends, n])]
        if all(any(whole.expert_bytes[i] for i in run) for run in runs):
            yield runs


def seconds(found: BoardsForecast) -> float:
    return sum(each.seconds for each in found.boards)


@st.composite
def instances(draw: st.DrawFn) -> tuple[BlockWork, list[BoardSpeeds]]:
    n_boards = draw(st.integers(1, 4))
    with_experts = draw(st.lists(st.integers(1, 12), min_size=n_boards, max_size=7))
    experts = [0] * draw(st.integers(0, 2)) + [16 * size for size in with_experts]
    dense = draw(st.lists(st.integers(1, 40), min_size=len(experts), max_size=len(experts)))
    boards = [
        board(
            draw(st.integers(30, 900)), draw(st.sampled_from((20e6, 440e6, 3e9))),
            draw(st.sampled_from((2e9, 8e9, 20e9))),
        )
        for _ in range(n_boards)
    ]  # fmt: skip
    return model(experts, dense), boards


@given(instances())
def test_no_split_is_faster_than_what_evenness_may_cost(instance: tuple[BlockWork, list[BoardSpeeds]]) -> None:
    """And the seconds it counts with are those of the forecast that a person sees."""
    whole, boards = instance
    counted = with_spare(boards)
    best = min(seconds(forecast_boards(whole, counted, CLIENT, runs)) for runs in every_split(whole, len(boards)))
    found = fastest_split(whole, boards)
    if best == float("inf"):
        assert found is None
        return
    assert found is not None
    assert list(found.layers) in list(every_split(whole, len(boards)))
    assert found.seconds == pytest.approx(seconds(forecast_boards(whole, counted, CLIENT, found.layers)), rel=1e-9)
    assert found.seconds <= best * (1 + EVEN_SHARE) * (1 + 1e-9)


@given(instances(), st.integers(0, 3))
def test_more_memory_or_a_faster_disk_is_never_much_slower(
    instance: tuple[BlockWork, list[BoardSpeeds]], which: int
) -> None:
    whole, boards = instance
    before = fastest_split(whole, boards)
    b = boards[which % len(boards)]
    boards[which % len(boards)] = board(b.ram_bytes // MIB + 100, 2 * b.speeds.disk, b.speeds.compute)
    after = fastest_split(whole, boards)
    if before is not None:
        assert after is not None and after.seconds <= before.seconds * (1 + EVEN_SHARE) * (1 + 1e-9)


def test_a_board_with_a_slow_processor_gets_few_layers_and_one_with_a_slow_disk_what_it_holds() -> None:
    whole = model([64] * 12, [8] * 12)
    slow = fastest_split(whole, [board(2000, compute=2e9), board(2000)])
    assert slow is not None and slow.layers == (range(1), range(1, 12))
    same_memory = [board(400, disk=20e6), board(400, disk=3e9)]
    card = fastest_split(whole, same_memory)
    assert card is not None and len(card.layers[0]) < len(card.layers[1])
    alone = forecast_boards(whole, same_memory, CLIENT, card.layers).boards[0]
    assert alone.estimate is not None and alone.estimate.resident


def test_like_boards_get_as_many_layers_although_one_was_measured_a_little_slower() -> None:
    whole = model([64] * 12, [8] * 12)
    found = fastest_split(whole, [board(2000, compute=19.7e9), board(2000), board(2000)])
    assert found is not None and [len(run) for run in found.layers] == [4, 4, 4]


def test_the_split_of_a_calibrated_model_is_the_fastest_as_well() -> None:
    plain = model([64] * 8, [8] * 8)
    counts = np.tile(np.arange(16, 0, -1, dtype=np.int64) ** 3, (8, 1))
    work = ModelWork(plain.work.layout, 2, plain.work.dense_bytes, counts=counts)
    whole = BlockWork(
        work, plain.moe_blocks, plain.dense_bytes, plain.expert_bytes, plain.kv_bytes, 0.5, 2048, 0
    )  # fmt: skip
    boards = [board(150, disk=100e6), board(300), board(200, compute=8e9)]
    best = min(seconds(forecast_boards(whole, with_spare(boards), CLIENT, runs)) for runs in every_split(whole, 3))
    found = fastest_split(whole, boards)
    assert found is not None
    real = seconds(forecast_boards(whole, with_spare(boards), CLIENT, found.layers))
    assert real <= best * (1 + EVEN_SHARE + 0.03)  # the curve of all layers stands for each run's


def test_boards_that_are_too_small_together_are_split_by_memory() -> None:
    whole, boards = model([64] * 6, [8] * 6), [board(20), board(40)]
    assert fastest_split(whole, boards) is None
    by_memory = split_layers(
        [BoardFacts(b.ram_bytes) for b in boards], whole.dense_bytes, whole.expert_bytes, whole.kv_bytes
    )
    assert split_by_speed(whole, boards) == by_memory
    with pytest.raises(UsageError, match="7 boards are too many: the model has 6 layers with experts"):
        fastest_split(whole, [board(500)] * 7)


def test_what_a_user_asks_for_is_read_and_refused() -> None:
    assert parse_split("20, 14,14") == (20, 14, 14)
    assert [parse_split(word) for word in ("auto", "speed", "memory")] == ["auto", "speed", "memory"]
    for wrong in ("", "fast", "3,,4", "3,-1", "0,4", "3;4", "²"):
        with pytest.raises(UsageError, match="is neither auto, speed nor memory, nor a number of layers for each"):
            parse_split(wrong)
    experts = [0, 0, 5, 5]
    assert exact_split((3, 1), experts, 2) == [range(3), range(3, 4)]
    with pytest.raises(UsageError, match=r"--split 3,1 is for 2 boards, and --workers names 3"):
        exact_split((3, 1), experts, 3)
    with pytest.raises(UsageError, match=r"--split 3,2 has 5 layers, and the model 4"):
        exact_split((3, 2), experts, 2)
    with pytest.raises(UsageError, match=r"--split 2,2 gives board 1 layers 0 to 1, none of which has experts"):
        exact_split((2, 2), experts, 2)
