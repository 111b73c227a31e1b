"""`chat --session FILE`: a conversation with its state, in one file that a later run goes on with.

The messages are in the header of a state file. They are good for every model, the state for one model run in one way:
where it does not fit, the conversation goes on and is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_edge.models.errors import BadFile, MissingFile, MoeEdgeError
from moe_edge.runner.conversation import Conversation
from moe_edge.runner.engine import Engine
from moe_edge.runner.kv.identity import difference
from moe_edge.runner.kv.state_file import StateFile, load_state, read_header, write_state

KIND = "session"


def check_session(path: Path) -> StateFile | None:
    """The session at `path`; None when there is none yet. To be called before the model is loaded.

    Raises BadFile for a file that is no session, or is damaged: it would be written over. MissingFile for no folder.
    """
    if not path.parent.is_dir():
        raise MissingFile(f"{path}: there is no folder {path.parent} to keep a session in")
    try:
        state = read_header(path)
    except FileNotFoundError:
        return None
    except BadFile as e:
        raise type(e)(f"{e}; name another file for the session, or remove this one") from e
    except OSError as e:
        raise MissingFile(f"{path}: cannot be read: {e.strerror or e}") from e
    messages, text = state.extra.get("messages"), state.extra.get("text")
    if state.extra.get("kind") != KIND or not isinstance(messages, list) or not isinstance(text, str):
        raise BadFile(f"{path}: holds a prompt of the prompt cache and no session; name another file")
    return state


def resume(state: StateFile, engine: Engine, conversation: Conversation, tell: Callable[[str], None]) -> None:
    """Go on with a session: its messages, and its state where it is one of this model run in this way."""
    conversation.restore((list(state.extra["messages"]), str(state.extra["text"])))
    n = len(state.tokens)
    if (differs := difference(engine.identity(), state.identity)) or n >= engine.n_ctx:
        tell(f"session: the messages are those of {state.path}, but they are computed again: {differs or 'too long'}")
        return
    if n == 0:
        return
    with engine.decoding():
        try:
            load_state(state, engine.llama, engine.checkpoints)
            tell(f"session: going on after {n} tokens of {state.path}")
        except (BadFile, OSError) as e:
            tell(f"session: {e}; its messages are computed again")


def keep(path: Path, engine: Engine, conversation: Conversation) -> None:
    """Write the session in place of what was at `path`. Raises CannotWrite."""
    messages, text = conversation.saved()
    extra = {"kind": KIND, "messages": messages, "text": text}
    try:
        with engine.decoding():
            write_state(path, engine.llama, engine.checkpoints, engine.identity(), extra)
    except MoeEdgeError:
        if engine.is_whole:
            raise
        # A board is lost, and its KV cache with it: the messages stay.
        write_state(path, engine.llama, engine.checkpoints, engine.identity(), extra)
