"""Commands of a chat, what its template is told, and pasted lines."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import open_engine
from moe_edge.models.errors import UsageError
from moe_edge.runner.chat import Chat
from moe_edge.runner.chat_commands import COMMANDS, help_text
from moe_edge.runner.generate import Sampling
from moe_edge.runner.thinking import parse_settings, thinking_settings
from scripted import write_scripted_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined %}[think={{ enable_thinking }}]{% endif %}"
    "{% if reasoning_effort %}[effort={{ reasoning_effort }}]{% endif %}{% if extra %}[{{ extra }}]{% endif %}"
)
CHAT = [sys.executable, "-m", "moe_edge.runner.start", "chat"]
REPLY = ["one", "two", "three"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("m") / "m.gguf", REPLY, template=TEMPLATE)


@pytest.fixture
def chat(model: Path) -> Iterator[Chat]:
    with open_engine(model, "resident", n_ctx=512) as engine:
        yield Chat(engine, 8, Sampling(temp=0), out=io.StringIO(), err=io.StringIO())


def said(chat: Chat) -> str:
    assert isinstance(chat.err, io.StringIO)
    text = chat.err.getvalue()
    chat.err.truncate(0)
    chat.err.seek(0)
    return text


def test_help_names_every_command() -> None:
    assert all(name in help_text() for name in COMMANDS)


def test_the_system_message_is_set_replaced_shown_and_heads_the_prompt(chat: Chat) -> None:
    assert chat.command("/system") and "no system message" in said(chat)
    chat.command("/system Be brief.")
    chat.reply("hi")
    chat.command("/system Be  very brief.")
    assert [m["role"] for m in chat.conversation.messages] == ["system", "user", "assistant"]
    assert chat.conversation.prompt(8).text.startswith("<system>Be  very brief.<user>hi")
    said(chat)
    chat.command("/system")
    assert said(chat) == "Be  very brief.\n"


def test_thinking_is_told_to_the_template_and_kept_apart_from_other_settings(chat: Chat) -> None:
    chat.conversation.template_kwargs = {"extra": "x"}
    for word, expected in (("on", "[think=True][x]"), ("off", "[think=False][x]"), ("auto", "[x]")):
        assert chat.command(f"/think {word}")
        chat.conversation.messages = [{"role": "user", "content": "q"}]
        assert chat.conversation.prompt(8).text == f"<user>q{expected}"
    said(chat)
    chat.command("/think of")
    assert "did you mean 'off'" in said(chat)


def test_retry_asks_the_same_again_and_leaves_one_answer(chat: Chat) -> None:
    chat.command("/retry")
    assert "no question yet" in said(chat)
    chat.reply("first")
    chat.reply("second")
    before = list(chat.conversation.messages)
    chat.sampling = Sampling(temp=0, seed=7)
    chat.command("/retry")
    assert chat.conversation.messages == before and chat.sampling.seed == 8
    assert [m["content"] for m in before if m["role"] == "user"] == ["first", "second"]


def test_a_conversation_is_saved_and_goes_on_elsewhere(chat: Chat, tmp_path: Path) -> None:
    chat.command("/system Bö.")
    chat.reply("hi")
    path = tmp_path / "a talk.json"
    chat.command(f"/save {path}")
    saved = list(chat.conversation.messages)
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": saved}
    chat.command("/clear")
    chat.command(f"/load {path}")
    assert chat.conversation.messages == saved and "loaded 3 messages" in said(chat)
    path.write_text(json.dumps(saved))  # the list alone, as other programs keep it
    chat.command(f"/load {path}")
    assert chat.conversation.messages == saved


@pytest.mark.parametrize(
    ("data", "words"),
    [("{", "no conversation"), ('{"text": "x"}', "no list of messages"),
     ('[{"role": "robot", "content": ""}]', "message 0"),
     ('[{"role": "user", "content": null}]', "message 0"), ("[" * 10000, "no conversation"), (None, "cannot be read")],
)  # fmt: skip
def test_what_cannot_be_loaded_changes_nothing(chat: Chat, tmp_path: Path, data: str | None, words: str) -> None:
    path = tmp_path / "c.json"
    if data is not None:
        path.write_text(data)
    chat.conversation.add("user", "kept")
    assert chat.command(f"/load {path}")
    text = said(chat)
    assert words in text and str(path) in text
    assert chat.conversation.messages == [{"role": "user", "content": "kept"}]


def test_wrong_commands_are_sentences(chat: Chat, tmp_path: Path) -> None:
    for line, words in (
        ("/sytem x", "did you mean '/system'"), ("/save", "needs the name of a file"),
        (f"/save {tmp_path}/none/x.json", "cannot be written"), ("/nonsense", "unknown command /nonsense"),
    ):  # fmt: skip
        assert chat.command(line)
        assert words in said(chat)


def test_settings_of_the_template() -> None:
    assert thinking_settings(None) == {}
    assert thinking_settings(True, "max") == {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}
    assert thinking_settings(True, "none")["enable_thinking"] is False
    assert parse_settings('{"a": 1}', "--x") == {"a": 1}
    for text, words in (("{", "is no JSON"), ("[1]", "is a list"), ('{"tools": []}', "has 'tools'")):
        with pytest.raises(UsageError, match=words):
            parse_settings(text, "--x")


def test_options_of_the_command_line_reach_the_template(model: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*CHAT, str(model), "-n", "4", "--temp", "0", *arguments]
        return subprocess.run(command, input="hi", capture_output=True, text=True, check=False, timeout=120)

    assert run("--think", "off", "--reasoning-effort", "low", "--system", "S").returncode == 0
    wrong = run("--chat-template-kwargs", "[]")
    assert wrong.returncode == 2 and "is a list" in wrong.stderr


# ---- pasted lines


class Talk:
    """A chat in a terminal of its own."""

    def __init__(self, model: Path, **environment: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update({"TERM": "xterm", **environment})
            os.execv(sys.executable, [*CHAT, str(model), "-n", "4", "--temp", "0"])
        self.seen = ""

    def wait(self, pattern: str, count: int = 1, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while len(re.findall(pattern, self.seen)) < count:
            assert time.monotonic() < end, f"{pattern!r} x {count} not in {self.seen[-800:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


def no_readline(folder: Path) -> str:
    """A folder for PYTHONPATH in which readline cannot be imported."""
    (folder / "readline.py").write_text("raise ImportError('none here')\n")
    return str(folder)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", ["bracketed", "plain", "without readline"])
def test_pasted_lines_are_one_message(model: Path, tmp_path: Path, kind: str) -> None:
    environment: dict[str, Any] = {"PYTHONPATH": no_readline(tmp_path)} if kind == "without readline" else {}
    talk = Talk(model, **environment)
    try:
        talk.wait("> ")
        pasted = "first line\nsecond line\nthird line"
        data = f"\x1b[200~{pasted}\x1b[201~\r" if kind == "bracketed" else pasted + "\n"
        os.write(talk.fd, data.encode())
        talk.wait("/token read\\]")
        talk.wait("> ", 2)
        os.write(talk.fd, f"/save {tmp_path}/talk.json\n".encode())
        talk.wait("saved to")
    finally:
        talk.close()
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"].split("\n") == ["first line", "second line", "third line"]
