"""Sizes, parsing, and the split of a budget, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from moe_edge.models.errors import BudgetTooSmall, UsageError
from moe_edge.schedulers.budget import (
    MIB,
    PROGRAM_VARIES_BYTES,
    FixedSizes,
    arena_floor_bytes,
    arena_working_set_bytes,
    format_arg,
    format_bytes,
    parse_bytes,
    plan_memory,
)
from moe_edge.schedulers.layout import Layout


@pytest.mark.parametrize(
    ("text", "n"),
    [("6GiB", 6 << 30), ("6G", 6 * 10**9), ("6gb", 6 * 10**9), ("1.5GiB", 3 << 29), ("8MiB", 8 << 20), ("4096", 4096)],
)
def test_sizes_are_read_as_people_write_them(text: str, n: int) -> None:
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "six", "6 XB", "6ib"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="6GiB"):
        parse_bytes(text)


def test_bytes_are_printed_in_binary_units() -> None:
    assert format_bytes(3 << 29) == "1.50 GiB"
    assert format_bytes(10 * MIB) == "10.0 MiB"
    assert format_arg(10 * MIB + 1) == "11MiB"


LAYOUT = Layout((2, 2), 1, (10 * MIB, 20 * MIB, 30 * MIB, 30 * MIB))
FIXED = FixedSizes(dense_bytes=100 * MIB, kv_bytes=10 * MIB, compute_bytes=5 * MIB, scratch_bytes=5 * MIB)


def test_the_floor_is_the_largest_expert_of_each_layer_and_at_least_two_experts() -> None:
    assert arena_floor_bytes(LAYOUT) == 60 * MIB  # 20 + 30, but two of the largest is more
    assert arena_floor_bytes(Layout((2, 2, 2), 1, (MIB,) * 6)) == 3 * MIB
    assert arena_working_set_bytes(LAYOUT, 2) == 100 * MIB


def test_a_budget_is_split_and_the_rest_goes_to_the_experts() -> None:
    plan = plan_memory(200 * MIB, FIXED, LAYOUT, 2)
    assert plan.arena_bytes == 80 * MIB
    assert (plan.floor_bytes, plan.comfortable_bytes, plan.resident_bytes) == (180 * MIB, 210 * MIB, 210 * MIB)
    assert plan.below_comfortable and "--ram 210MiB" in plan.lines()[1]


def test_more_than_the_experts_need_is_not_taken() -> None:
    plan = plan_memory(1000 * MIB, FIXED, LAYOUT, 2)
    assert plan.arena_bytes == LAYOUT.total_bytes
    assert len(plan.lines()) == 1


def test_below_the_floor_is_refused_with_the_number_that_works() -> None:
    with pytest.raises(BudgetTooSmall, match="try --ram 180MiB or more") as e:
        plan_memory(180 * MIB - 1, FIXED, LAYOUT, 2)
    assert e.value.needed_bytes == 180 * MIB
    assert e.value.exit_status == 2
    assert plan_memory(e.value.needed_bytes, FIXED, LAYOUT, 2).arena_bytes == 60 * MIB


def test_the_number_that_works_also_works_when_the_program_is_larger_at_its_next_start() -> None:
    """Libraries are mapped by more or fewer pages: two starts differ by fractions of a MiB, installations by 7."""
    now = replace(FIXED, program_excess_bytes=100, program_varies_bytes=PROGRAM_VARIES_BYTES)
    with pytest.raises(BudgetTooSmall, match=r"needs 180\.0 MiB .*; try --ram 185MiB or more") as e:
        plan_memory(180 * MIB, now, LAYOUT, 2)
    then = replace(now, program_excess_bytes=100 + PROGRAM_VARIES_BYTES)
    assert plan_memory(e.value.needed_bytes, then, LAYOUT, 2).arena_bytes == 60 * MIB
    with pytest.raises(BudgetTooSmall):
        plan_memory(e.value.needed_bytes - 1, then, LAYOUT, 2)
