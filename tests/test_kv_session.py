"""`chat --session FILE`: the conversation goes on, and no file is lost or written over."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BadFile, BadMagic, MissingFile
from moe_edge.runner.chat import Chat
from moe_edge.runner.commands.chat import command
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling
from moe_edge.runner.kv.session import check_session, keep, resume
from moe_edge.runner.kv.state_file import write_state
from moe_edge.runner.prove import NOTHING

GREEDY = Sampling(temp=0)


def tiny(n_ctx: int = 0) -> Engine:
    return Engine(tiny_model_path(), EngineOptions(ram_bytes=1 << 30, n_ctx=n_ctx, n_threads=1, proof=NOTHING))


def chat_on(engine: Engine) -> Chat:
    engine.load()
    return Chat(engine, 12, GREEDY, out=io.StringIO(), err=io.StringIO())


def made(path: Path) -> str:
    """A session with one reply; the text of the conversation."""
    with tiny() as engine:
        chat = chat_on(engine)
        chat.reply("The king said that the old man was in the house by the sea and")
        keep(path, engine, chat.conversation)
        return chat.conversation.text


def test_a_session_goes_on_in_another_process(tmp_path: Path) -> None:
    path, said = tmp_path / "s", list[str]()
    text = made(path)
    state = check_session(path)
    assert state is not None
    with tiny() as engine:
        chat = chat_on(engine)
        resume(state, engine, chat.conversation, said.append)
        assert chat.conversation.text == text and len(said) == 1
        result = chat.reply(" Then the queen")
        assert result is not None and result.prompt_tokens - result.reused_tokens <= 8
    with tiny() as engine:
        chat = chat_on(engine)
        chat.conversation.text = text
        fresh = chat.reply(" Then the queen")
        assert fresh is not None and fresh.reused_tokens == 0 and fresh.text == result.text


def test_another_way_to_run_it_computes_the_messages_again(tmp_path: Path) -> None:
    path, said = tmp_path / "s", list[str]()
    text = made(path)
    state = check_session(path)
    assert state is not None
    with tiny(n_ctx=256) as engine:
        chat = chat_on(engine)
        resume(state, engine, chat.conversation, said.append)
        assert chat.conversation.text == text and "n_ctx is" in said[0]
        result = chat.reply(" Then")
        assert result is not None and result.reused_tokens == 0


def test_a_damaged_state_leaves_the_messages(tmp_path: Path) -> None:
    path, said = tmp_path / "s", list[str]()
    text = made(path)
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    state = check_session(path)
    assert state is not None
    with tiny() as engine:
        chat = chat_on(engine)
        resume(state, engine, chat.conversation, said.append)
        assert chat.conversation.text == text and "damaged" in said[0] and engine.llama.n_tokens == 0


def test_a_session_without_a_word_can_be_kept(tmp_path: Path) -> None:
    with tiny() as engine:
        chat = chat_on(engine)
        keep(tmp_path / "s", engine, chat.conversation)
        state = check_session(tmp_path / "s")
        assert state is not None
        resume(state, engine, chat.conversation, lambda _: None)


def test_files_that_are_no_sessions_are_refused_and_stay(tmp_path: Path) -> None:
    assert check_session(tmp_path / "new") is None
    with pytest.raises(MissingFile, match="no folder"):
        check_session(tmp_path / "no" / "s")
    notes = tmp_path / "notes"
    notes.write_text("dear diary " * 20)
    with pytest.raises(BadMagic, match="name another file"):
        check_session(notes)
    with tiny() as engine:
        engine.load()
        write_state(tmp_path / "prompt", engine.llama, engine.checkpoints, {})
    with pytest.raises(BadFile, match="no session"):
        check_session(tmp_path / "prompt")


def run(path: Path, message: str) -> Result:
    options = ["--session", str(path), "-n", "8", "--temp", "0", "--ram", "1GiB", "-t", "1"]
    return CliRunner().invoke(command, options, input=message)


def test_the_command_keeps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert run(path, "The king said").exit_code == 0
    again = run(path, " and then the old man")
    assert again.exit_code == 0 and "going on after" in again.stderr
    notes = tmp_path / "notes"
    notes.write_text("dear diary " * 20)
    assert isinstance(run(notes, "x").exception, BadMagic)
    assert notes.read_text() == "dear diary " * 20
