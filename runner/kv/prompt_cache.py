"""`--prompt-cache`: conversations of earlier runs on disk, so that a prompt starts where one of them ends.

A conversation is written when it leaves memory: when another one takes its place, and when the engine is closed. Each
reply would be a write of the whole, and disks wear. It is written only when that pays (see pays()). Several processes
share the folder: names appear by one rename, and removing and adding are done under a lock. A file that is damaged or
was removed meanwhile costs the seconds that it would have saved, and one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.errors import BadFile, CannotWrite, MoeEdgeError
from moe_edge.models.formats.work import is_part
from moe_edge.runner.kv.prefix import keep_prefix, shared_prefix
from moe_edge.runner.kv.rollback import Checkpoints
from moe_edge.runner.kv.state_file import StateFile, hold, is_whole, load_state, read_header, write_state
from moe_edge.runner.llama import can_cut, sequence_bytes, sliding_window, window_is_kept

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

SUFFIX, LOCK = ".kv", "lock"
LEAST_SECONDS = 1.0  # of computing; a prompt that takes less is not worth a file
LEAST_TOKENS = 32
FIRST_SPEED = 100e6  # bytes a second, an SD card's, until a file was written
TIMES = 2.0  # the computing that is saved must take so many times the writing


def pays(seconds_to_compute: float, nbytes: int, bytes_per_second: float) -> bool:
    """Whether a conversation is worth a file: at least a second, and twice the seconds that the file is written in."""
    return seconds_to_compute >= max(LEAST_SECONDS, TIMES * nbytes / bytes_per_second)


class PromptCache:
    """The cache of one loaded Llama. limit_bytes: of all files in the folder together, whatever their model.

    identity: what must be the same for a file to be used. tell: gets the sentences. Raises CannotWrite when there can
    be no such folder.
    """

    def __init__(
        self, folder: Path, limit_bytes: int, identity: Mapping[str, Any], llama: Any, checkpoints: Checkpoints,
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._folder, self._limit, self._tell = folder, limit_bytes, tell
        self._identity = dict(json.loads(json.dumps(identity)))
        self._key = hashlib.blake2b(json.dumps(self._identity, sort_keys=True).encode(), digest_size=8).hexdigest()
        self._llama, self._checkpoints = llama, checkpoints
        self._seconds, self._evaluated = 0.0, 0  # of all prompts: what a token costs here
        self._speed = FIRST_SPEED
        self.always = False  # for tests: write and read whatever it costs
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CannotWrite(f"{folder}: there is no room for prompts here: {e.strerror or e}") from e

    def measure(self, seconds: float, n_tokens: int) -> None:
        """A prompt of so many tokens took so long to evaluate."""
        self._seconds, self._evaluated = self._seconds + seconds, self._evaluated + n_tokens

    # ---- a prompt comes

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """As kv.prefix.keep_prefix(), from memory or from a file, whichever has more of the prompt."""
        held = self._usable(self._llama.input_ids[: self._llama.n_tokens], tokens, self._checkpoints_at(), 0)
        found = self._best(tokens)
        leaves = 2 * shared_prefix(self._llama, tokens) < self._llama.n_tokens
        from_disk = found is not None and found[0] >= held + LEAST_TOKENS
        if leaves or from_disk:
            self.store()
        if found is not None and from_disk:
            self.load(found[1])
        return keep_prefix(self._llama, self._checkpoints, tokens)

    def load(self, state: StateFile) -> bool:
        """Take a file's conversation in place of the present one; False, with a sentence, when that fails."""
        try:
            load_state(state, self._llama, self._checkpoints)
            os.utime(state.path)
        except (BadFile, OSError) as e:
            self._discard(state.path, e)
            return False
        return True

    def _checkpoints_at(self) -> list[int]:
        return [each.n_tokens for each in self._checkpoints.kept]

    def _usable(self, have: Any, tokens: Sequence[int], checkpoints: Sequence[int], first: int) -> int:
        """How much of a prompt a conversation of these tokens saves; its last token is always evaluated."""
        most = min(len(have), len(tokens) - 1)
        differ = np.flatnonzero(np.asarray(have[:most]) != np.asarray(tokens[:most], np.int32))
        n = int(differ[0]) if len(differ) else most
        if n == len(have):
            return n
        if self._checkpoints.are_needed:
            return max((at for at in checkpoints if at <= n), default=0)
        return n if can_cut(sliding_window(self._llama), first, n) else 0

    def _best(self, tokens: Sequence[int]) -> tuple[int, StateFile] | None:
        best: tuple[int, StateFile] | None = None
        for state in self.states():
            n = self._usable(state.tokens, tokens, [at for at, _, _ in state.checkpoints], state.first)
            if n > 0 and len(state.tokens) < self._llama.n_ctx() and (best is None or n > best[0]):
                best = n, state
        return best

    def states(self) -> Iterator[StateFile]:
        """Those of this model and these options; damaged ones are removed, with a sentence."""
        for path in sorted(self._folder.glob(f"{self._key}-*{SUFFIX}")):
            try:
                state = read_header(path)
            except FileNotFoundError:
                continue  # removed meanwhile
            except (BadFile, OSError) as e:
                self._discard(path, e)
                continue
            if state.identity == self._identity:
                yield state

    def _discard(self, path: Path, error: Exception) -> None:
        self._tell(f"prompt cache: {error}; it is removed, and the prompt is computed again")
        with contextlib.suppress(OSError):
            path.unlink()

    # ---- a conversation leaves

    def store(self) -> None:
        """Write the present conversation, if that pays and no file has it; a sentence when that fails."""
        n = int(self._llama.n_tokens)
        if n < LEAST_TOKENS or not is_whole(self._llama):
            return
        tokens = self._llama.input_ids[:n].astype(np.int32)
        nbytes = sequence_bytes(self._llama) + sum(len(each.copy) for each in self._checkpoints.kept)
        c = self._checkpoints
        extra = {"prompt_tokens": min(c.prompt_tokens, n), "aligned": min(c.aligned, n)}
        self.keep(
            tokens, nbytes,
            lambda path: write_state(path, self._llama, self._checkpoints, self._identity, extra),
        )  # fmt: skip

    def keep(self, tokens: Any, nbytes: int, write: Callable[[Path], int]) -> None:
        """Have a conversation of these tokens written, as store() does it. write: path -> the bytes of the file."""
        n = len(tokens)
        try:
            earlier = [each for each in self.states() if np.array_equal(each.tokens[:n], tokens[: len(each.tokens)])]
            known = max((len(state.tokens) for state in earlier), default=0)
            if known >= n or nbytes > self._limit:
                return
            cost = self._seconds / self._evaluated if self._evaluated else 0.0
            if not self.always and not pays((n - known) * cost, nbytes, self._speed):
                return
            self._write(tokens, earlier, write)
        except (MoeEdgeError, OSError) as e:
            self._tell(f"prompt cache: {e}")

    def _write(self, tokens: Any, earlier: Sequence[StateFile], write: Callable[[Path], int]) -> None:
        name = hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
        started = time.monotonic()
        path = self._folder / f"{self._key}-{name}{SUFFIX}"
        size = write(path)
        self._speed = size / max(1e-3, time.monotonic() - started)
        with self._locked():
            cut = sliding_window(self._llama) == 0 or window_is_kept(self._llama)
            if cut and not self._checkpoints.are_needed:
                for state in earlier:  # the new file serves whatever they would
                    state.path.unlink(missing_ok=True)
            trim(self._folder, self._limit, path)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What must be the same for a file to be used."""
        return self._identity

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / LOCK, "ab") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def trim(folder: Path, limit_bytes: int, newest: Path) -> None:
    """Remove what was used longest ago until the files together fit, never `newest`; and parts left behind."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if is_part(path.name):
                with open(path, "rb") as part:
                    if hold(part):  # who wrote it is no more
                        path.unlink()
            elif path.suffix == SUFFIX and path != newest:
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
    room = limit_bytes - newest.stat().st_size
    for _, size, path in sorted(found, reverse=True):  # the newest first: they stay while there is room
        room -= size
        if room < 0:
            path.unlink(missing_ok=True)

