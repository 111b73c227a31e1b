"""Why llama.cpp refused a model, or died of it: the one line of its log that explains.

llama.cpp says the reason first and then, one layer after the other, that something failed; a failed assertion or an
exception that nobody caught is printed as the process ends. Here is only text in, text out.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

MAX_REASON = 400

# From what explains best to what explains least. The last match of the first pattern that matches is the reason.
_ABORTED = (
    re.compile(r"(?P<file>[\w.+-]+\.\w+):(?P<line>\d+): (?P<why>GGML_ASSERT\(.*)"),
    re.compile(r"^\s*what\(\):\s*(?P<why>.+)"),
    re.compile(r"(?P<file>[\w.+-]+\.(?:c|cc|cpp|cu|h|hpp|m|mm)):(?P<line>\d+): (?P<why>.+)"),  # GGML_ABORT
    re.compile(r"terminate called after throwing an instance of '(?P<why>[^']+)'"),
    re.compile(r"^(?P<why>(?:MemoryError|Fatal Python error).*)"),
)
_REFUSED = (
    re.compile(r"error loading model: (?P<why>.+)"),
    re.compile(r"failed to initialize the context: (?P<why>.+)"),
    re.compile(r"^\w+: (?P<why>(?:invalid token|invalid |unknown |missing |unsupported ).+)"),
)
_HINTS = re.compile(r"error|fail|invalid|cannot|not supported|unsupported", re.IGNORECASE)
# Said on the way out by every layer that was above the failure.
_NOTHING = re.compile(
    r"failed to load model$|Failed to load model from file|Failed to create llama_context|"
    r"failed to (?:initialize|create) (?:the )?(?:context|model|batch)$|llama_decode: failed to decode, ret",
)
_PREFIX = re.compile(
    r"^(?:error loading model (?:architecture|hyperparameters|vocabulary): |[\w:~]*llama_[\w:]+: |"
    r"(?:check_tensor_dims|done_getting_tensors): )+"
)


def reason(log: str | Iterable[str], status: int = 0) -> str:
    """The line of llama.cpp's log that explains, shortened to what a reader needs; empty when none does.

    status: of the process, as subprocess gives it. Below zero it was ended by a signal, and what it said as it died
    explains better than what it had complained of before.
    """
    text = log if isinstance(log, str) else "".join(log)
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    for pattern in (*_ABORTED, *_REFUSED) if status < 0 else (*_REFUSED, *_ABORTED):
        for line in reversed(lines):
            if match := pattern.search(line):
                return _short(match)
    for line in reversed(lines):
        if _HINTS.search(line) and not _NOTHING.search(line):
            return _cut(_PREFIX.sub("", line.strip()))
    return ""


def refusal(name: str, why: str) -> str:
    """The sentence for a model that llama.cpp does not take, with the way out."""
    return (
        f"{name}: llama.cpp cannot run this model: {why}; the file is damaged, contradicts itself, or is made for "
        "another release of llama.cpp: get it again, or convert it anew"
    )


def ending(status: int) -> str:
    """How a process ended that did not say why: `llama.cpp crashed (SIGSEGV)`."""
    if status >= 0:
        return f"llama.cpp ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if name == "SIGKILL":
        return "the trial of it was killed (SIGKILL), most likely because memory ran out"
    if name in ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"):
        return f"llama.cpp crashed ({name})"
    return f"the trial of it was ended by {name}"


def _short(match: re.Match[str]) -> str:
    why = _cut(_PREFIX.sub("", match["why"].strip()))
    groups = match.groupdict()
    return f"{why} ({groups['file']}:{groups['line']})" if groups.get("file") else why


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
