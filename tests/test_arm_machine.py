"""What sets up an emulated ARM machine, as far as that needs no emulation: `make arm` runs the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ARM = Path(__file__).resolve().parent / "arm"
sys.path.insert(0, str(ARM))

import machine  # noqa: E402  (a folder of its own, whose tests the ordinary run does not collect)


def test_an_unknown_machine_is_named_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.main(["test", "pi9"]) == machine.main(["pi9", "-c", ""]) == 2
    assert capsys.readouterr().err.count("unknown machine 'pi9'; known: pi4, pi5, i8mm") == 2


@pytest.mark.parametrize(("uid", "apt", "says"), [
    (1000, True, "only root can install; run: sudo apt-get install qemu-user-static"),
    (0, False, "emulating ARM needs qemu-user-static, and this machine has no apt-get to install them"),
])  # fmt: skip
def test_missing_tools_are_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uid: int, apt: bool, says: str, tmp_path: Path
) -> None:
    absent = {"qemu-aarch64-static"} | (set() if apt else {"apt-get"})
    monkeypatch.setattr(shutil, "which", lambda program: None if program in absent else f"/usr/bin/{program}")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(machine, "BUILD", tmp_path)
    monkeypatch.setattr(machine, "run", lambda *_command, **_env: pytest.fail("nothing may be run"))
    assert machine.main([]) == 1
    assert says in capsys.readouterr().err


def test_a_part_is_made_again_only_when_what_it_is_made_from_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "BUILD", tmp_path)
    source, made = tmp_path / "source", []
    source.write_text("a")

    def fail() -> None:
        raise machine.CannotSetUp("no")

    def once(make: Callable[[], None] | None = None, *, version: str = "1") -> None:
        machine.once("part", [version, source], make or (lambda: made.append(version)))

    once()
    once()
    assert made == ["1"]
    source.write_text("b")
    with pytest.raises(machine.CannotSetUp):
        once(fail)
    once()
    once(version="2")
    once(version="2")
    assert made == ["1", "1", "2"]


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(machine.CannotSetUp, match=r"ended with 3:\nit went wrong"):
        machine.run("sh", "-c", "echo it went wrong >&2; exit 3")


def test_the_tests_in_emulation_are_not_part_of_the_ordinary_run() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(ARM)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ARM.parents[1], check=False)
    assert "no tests collected" in done.stdout and done.returncode == 5
