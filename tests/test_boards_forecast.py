"""Which board gets which layers, what several are together, and where one more stops paying. No model, no network."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from moe_edge.models.errors import UsageError
from moe_edge.runner.workers.wire import Address, is_loopback, parse_address, parse_addresses
from moe_edge.schedulers.boards_forecast import BlockWork, BoardSpeeds, forecast_boards, grow, stops_paying_at
from moe_edge.schedulers.estimate import MachineSpeeds, ModelWork, estimate
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.workers import BoardFacts, shares_of, split_layers

MIB = 1 << 20


def llama_layers(shares: tuple[float, ...], first: int, n_blocks: int) -> list[int]:
    """llama.cpp's rule (llama-model.cpp, load_tensors): the device of each layer from `first`, and of the output."""
    sums = list(itertools.accumulate(shares))
    sums = [each / sums[-1] for each in sums]
    n = n_blocks + 1 - first
    return [sum(edge <= i / n for edge in sums) for i in range(n)]


@pytest.mark.parametrize("n_blocks", [2, 3, 7, 48, 61, 128])
def test_shares_put_each_layer_where_it_was_planned(n_blocks: int) -> None:
    for n_boards in range(1, min(9, n_blocks + 1)):
        ones = [1] * n_blocks
        runs = split_layers([BoardFacts(i + 1) for i in range(n_boards)], ones, ones, ones)
        planned = [board for board, run in enumerate(runs) for _ in run]
        assert llama_layers(shares_of(runs), 0, n_blocks) == [*planned, n_boards - 1]


def test_layers_go_by_memory_and_none_is_left_out() -> None:
    ones = [1] * 12
    assert split_layers([BoardFacts(8), BoardFacts(4)], ones, ones, ones) == [range(8), range(8, 12)]
    assert split_layers([BoardFacts(4), BoardFacts(8)], ones, ones, ones) == [range(4), range(4, 12)]
    assert split_layers([BoardFacts(1000), BoardFacts(1)], ones, ones, ones) == [range(11), range(11, 12)]


def test_every_board_gets_a_layer_with_experts() -> None:
    dense_first = [0, 0, 0, 5, 5]
    runs = split_layers([BoardFacts(9), BoardFacts(1)], [100] * 5, dense_first, [0] * 5)
    assert runs == [range(4), range(4, 5)]
    with pytest.raises(UsageError, match="3 boards are too many: the model has 2 layers with experts"):
        split_layers([BoardFacts(1)] * 3, [100] * 5, dense_first, [0] * 5)


SPEEDS = MachineSpeeds(disk=440e6, memory=25e9, compute=20e9, prefill=40e9, layer_seconds=100e-6)


def model(n_layers: int = 24, n_experts: int = 64, unit: int = 2 * MIB) -> BlockWork:
    layout = Layout((n_experts,) * n_layers, 1, (unit,) * (n_layers * n_experts))
    dense, kv = 8 * MIB, 2 * MIB
    return BlockWork(
        ModelWork(layout, 4, n_layers * dense), tuple(range(n_layers)), (dense,) * n_layers,
        (n_experts * unit,) * n_layers, (kv,) * n_layers, 0.125, 2048, 64 * MIB,
    )  # fmt: skip


def board(ram: int, latency: float = 0.2e-3) -> BoardSpeeds:
    return BoardSpeeds(ram, 20 * MIB, SPEEDS, latency, 125e6)


def test_one_board_without_network_is_one_machine() -> None:
    whole, here = model(), BoardSpeeds(2000 * MIB, 0, SPEEDS, 0.0, float("inf"))
    found = forecast_boards(whole, [here], SPEEDS).boards[0]
    work = replace(whole.work, kv_bytes=6 * MIB)
    assert found.seconds == pytest.approx(1 / estimate(work, found.arena_bytes, SPEEDS).tokens_per_second.expected)


def test_three_boards_with_a_third_each_are_faster_than_one_with_a_third() -> None:
    whole = model()
    a_third = sum(whole.expert_bytes) // 3 + 8 * 10 * MIB + 40 * MIB
    one, three = (forecast_boards(whole, [board(a_third)] * n, SPEEDS) for n in (1, 3))
    assert all(each.estimate and each.estimate.resident for each in three.boards)
    assert three.tokens_per_second > 2 * one.tokens_per_second
    assert [each.layers for each in three.boards] == [range(8), range(8, 16), range(16, 24)]


def test_once_all_is_in_memory_one_more_board_only_adds_its_network() -> None:
    whole = model()
    grown = grow(whole, board(sum(whole.expert_bytes) // 3 + 300 * MIB), SPEEDS)
    assert len(grown) == 8
    speeds = [each.tokens_per_second for each in grown]
    assert speeds[0] < speeds[1] < speeds[2]
    assert stops_paying_at(grown) == 3
    assert speeds[7] < speeds[3]
    far = grow(whole, board(sum(whole.expert_bytes) // 3 + 300 * MIB, latency=20e-3), SPEEDS)
    assert far[7].tokens_per_second < far[2].tokens_per_second < speeds[2]
    assert far[7].boards[0].binds == "network"


def test_a_board_that_is_too_small_says_what_it_needs() -> None:
    found = forecast_boards(model(), [board(10 * MIB)] * 2, SPEEDS)
    assert not found.will_run and found.tokens_per_second == 0
    needed = found.boards[0].needed_bytes
    assert forecast_boards(model(), [board(needed)] * 2, SPEEDS).will_run
    assert not forecast_boards(model(), [board(needed - 1)] * 2, SPEEDS).will_run


def test_fewer_boards_are_tried_when_the_model_has_few_layers() -> None:
    assert len(grow(model(n_layers=3), board(900 * MIB), SPEEDS)) == 3


def test_addresses_are_read_and_refused() -> None:
    assert parse_address("board1") == Address("board1", 50052)
    assert parse_addresses("a:1, [fe80::1]:2") == (Address("a", 1), Address("fe80::1", 2))
    assert str(Address("fe80::1", 2)) == "[fe80::1]:2"
    for wrong in ("", "a:", "a:0", "a:70000", ":5", "a:b", "[::1]5x"):
        with pytest.raises(UsageError, match="is no board; write HOST or HOST:PORT"):
            parse_address(wrong)
    with pytest.raises(UsageError, match="board a:50052 is named twice"):
        parse_addresses("a,a:50052")
    with pytest.raises(UsageError, match="names 17 boards"):
        parse_addresses(",".join(f"b{i}" for i in range(17)))
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.1.5") and not is_loopback("::")
