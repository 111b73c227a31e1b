"""What moe-edge says to somebody who has named nothing yet: next steps, an offer, the Tab key."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import FakeHub, hub_running
from moe_edge.models import known
from moe_edge.models.known import KNOWN, KnownModel, fitting
from moe_edge.runner.commands.first_steps import first_steps
from moe_edge.runner.hub import offer
from moe_edge.runner.hub.names import hub_name, quant_of
from moe_edge.runner.hub.offer import offer_model
from random_models import write_random_model

REPO, GB = "user/model-GGUF", 10**9
START = [sys.executable, "-m", "moe_edge.runner.start"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_random_model(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe").read_bytes()


@pytest.fixture
def hub(model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on loopback, an empty cache, and a table with its one model."""
    for name in ("LLAMA_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_TOKEN", "MODEL_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(known, "KNOWN", (KnownModel(f"{REPO}:Q8_0", len(model), 1, 0.1, "MIT"),))
    with hub_running(FakeHub(REPO, {"m-Q8_0.gguf": model})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


class Person:
    """Answers questions, and remembers what was said."""

    def __init__(self, *answers: bool) -> None:
        self.answers, self.asked, self.heard = list(answers), [], []  # type: ignore[var-annotated]

    def ask(self, question: str, default: bool) -> bool:
        self.asked.append((question, default))
        return self.answers.pop(0)

    def tell(self, line: str) -> None:
        self.heard.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self.heard)


# ---- the table


def test_the_table_can_be_pulled_and_says_that_nothing_of_it_was_run() -> None:
    for each in KNOWN:
        name = hub_name(each.name)
        assert name is not None and name.tag and quant_of(f"m-{name.tag}.gguf") == name.tag
        assert 0 < each.active < each.weights and not each.run_here
        bits = 8 * each.nbytes / (each.weights * GB)
        assert 2.5 < bits < 5.5, each  # a weight of these types takes so much
    assert len({each.name for each in KNOWN}) == len(KNOWN)


def test_memory_and_disk_decide_what_fits() -> None:
    assert [each.name for each in fitting(10**15, 10**15)] == [each.name for each in KNOWN]
    assert not list(fitting(10**8, 10**15)) and not list(fitting(10**15, 2 * GB))
    board = next(fitting(7 * GB, 100 * GB))
    assert board.name.startswith("unsloth/Qwen3-30B-A3B") and board.nbytes < 20 * GB
    assert next(fitting(7 * GB, 8 * GB)).nbytes < 6 * GB


# ---- the offer


def test_a_yes_brings_the_model_after_a_look_at_its_header(hub: FakeHub, model: bytes) -> None:
    person = Person(True)
    path = offer_model(person.ask, person.tell)
    assert path is not None and path.read_bytes() == model
    assert person.asked == [("Download it?", False)]
    assert "not run with moe-edge" in person.text and re.search("FAST|GOOD|RUNS|USABLE", person.text)
    again = Person(True)
    assert offer_model(again.ask, again.tell) == path
    assert again.asked == [(f"No model was named. Talk to {REPO}:Q8_0, which is here?", True)]
    assert offer_model(Person(False).ask, again.tell) is None


def test_a_no_and_nobody_to_ask_fetch_nothing(hub: FakeHub) -> None:
    person = Person(False)
    assert offer_model(person.ask, person.tell) is None
    assert f"moe-edge pull {REPO}:Q8_0 brings the other" in person.text
    alone = Person()
    assert offer_model(None, alone.tell) is None
    assert len(alone.heard) == 1 and "embedded tiny model" in alone.text and f"moe-edge pull {REPO}:Q8_0" in alone.text
    assert not hub.requests


def test_what_will_not_run_is_not_downloaded(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_edge.runner.measure.plan.usable_bytes", lambda: 1 << 20)
    person = Person(True)
    assert offer_model(person.ask, person.tell) is None
    assert "is not downloaded" in person.text and not offer.in_cache()


def test_a_larger_file_than_the_table_says_is_asked_for_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "KNOWN", (KnownModel(f"{REPO}:Q8_0", 1000, 1, 0.1, "MIT"),))
    person = Person(True, False)
    assert offer_model(person.ask, person.tell) is None
    assert "Download it all the same?" in person.asked[1][0] and not offer.in_cache()


def test_a_hub_that_is_not_there_leaves_the_embedded_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_edge.runner.hub.client.PAUSE", 0.01)
    monkeypatch.setattr("moe_edge.runner.hub.client.TRIES", 2)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    person = Person(True)
    assert offer_model(person.ask, person.tell) is None
    assert "cannot be reached" in person.text and "embedded tiny model" in person.text


def test_a_machine_that_nothing_fits_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "auto_budget_bytes", lambda: 0)
    person = Person()
    assert offer_model(person.ask, person.tell) is None
    assert "none that is known fits" in person.text


TERMINAL = """
import moe_edge.models.known as known, sys
known.KNOWN = (known.KnownModel({name!r}, {nbytes}, 1, 0.1, "MIT"),)
sys.argv = ["moe-edge", "chat", "-n", "2", "--temp", "0", "-t", "1", "-c", "256", "--ram", "200MiB"]
from moe_edge.runner.start import main
main()
"""


def test_chat_on_a_terminal_pulls_and_talks(hub: FakeHub, model: bytes) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, "-c", TERMINAL.format(name=f"{REPO}:Q8_0", nbytes=len(model))])
    seen, end, answered = "", time.monotonic() + 120, False

    def asks() -> bool:  # a line editor may say how it reads pastes before its prompt
        return "memory 200.0 MiB" in seen and seen.endswith("> ")

    while time.monotonic() < end and not asks():
        if select.select([fd], [], [], 0.2)[0]:
            try:
                seen += os.read(fd, 4096).decode(errors="replace").replace("\r", "")
            except OSError:
                break
        if "Download it? [y/N]" in seen and not answered:
            answered = True
            os.write(fd, b"y\n")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(fd)
    assert answered and [each.repo for each in offer.in_cache()] == [REPO], seen
    assert asks(), repr(seen)


# ---- moe-edge alone


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_alone_it_says_what_to_type(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"moe-edge pull {REPO}:Q8_0" in first_steps() and "echo 'Hello' | moe-edge chat" in first_steps()
    offer_model(Person(True).ask, lambda _: None)
    text = first_steps()
    assert f"moe-edge serve {REPO}:Q8_0" in text and "in the cache" in text and "pull" not in text
    monkeypatch.setattr("sys.stdin", Keyboard())
    assert f"moe-edge chat {REPO}:Q8_0" in first_steps() and "echo" not in first_steps()


def test_alone_it_exits_with_zero_and_asks_nobody(hub: FakeHub) -> None:
    done = subprocess.run(START, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "moe-edge doctor" in done.stdout and "moe-edge --help" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert not hub.requests


# ---- the Tab key


def completed(words: str, incomplete: str, shell: str = "bash", **environment: str) -> list[str]:
    env = {"COMP_WORDS": f"{words} {incomplete}", "COMP_CWORD": str(len(words.split()))}
    done = subprocess.run(
        START, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        env=os.environ | {"_MOE_EDGE_COMPLETE": f"{shell}_complete"} | env | environment,
    )  # fmt: skip
    assert done.stderr == "", done.stderr
    return done.stdout.splitlines()


def test_models_of_the_cache_options_and_commands_are_completed(hub: FakeHub) -> None:
    offer_model(Person(True).ask, lambda _: None)
    before = len(hub.requests)
    assert completed("moe-edge chat", "us") == ["file,us", f"plain,{REPO}:Q8_0"]
    assert completed("moe-edge serve -m", "us") == ["file,us", f"plain,{REPO}:Q8_0"]
    assert "plain,--max-kld" in completed("moe-edge chat other/repo", "--max-k")
    assert completed("moe-edge show", "models/tiny/tiny-moe-small.Q8")[1:] == (
        ["plain,models/tiny/tiny-moe-small.Q8_0.gguf"] if Path("models/tiny").is_dir() else []
    )
    assert "plain,doctor" in completed("moe-edge", "doc")
    assert len(hub.requests) == before  # a name that is not here is not asked for


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_a_shell_reads(shell: str) -> None:
    done = subprocess.run([*START, "completion", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_MOE_EDGE_COMPLETE={shell}_complete" in done.stdout and "%(" not in done.stdout
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=done.stdout, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_itself_completes_a_name_with_a_colon(hub: FakeHub, tmp_path: Path) -> None:
    offer_model(Person(True).ask, lambda _: None)
    program = tmp_path / "bin/moe-edge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {START[0]} -m {START[2]} "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(moe-edge completion bash)"; COMP_WORDS=(moe-edge chat user/model-GGUF:); COMP_CWORD=2; '
        '_moe_edge_completion moe-edge; printf "%s\\n" "${COMPREPLY[@]}"; printf "[%s]" "$COMP_WORDBREAKS"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == f"{REPO}:Q8_0", done.stdout + done.stderr
    assert ":" not in done.stdout.rsplit("[", 1)[1]
