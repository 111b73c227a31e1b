"""A short form of fuzz_parsers.py, the same cases each time; `make fuzz` runs the long one."""

from __future__ import annotations

from fuzz_parsers import fuzz


def test_damaged_files_end_in_a_result_or_one_sentence() -> None:
    assert fuzz(1_500, seed=2026) == {}
