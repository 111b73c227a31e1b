"""Talking to the hub: what a repository holds, where a file's bytes are, and ranges of them.

The token goes to the hub alone: a redirect to another host gets none. Addresses that a redirect leads to expire, so
they are asked for again when one is refused.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from moe_edge.models.errors import MissingFile, UsageError, WorkError
from moe_edge.runner.hub.names import RemoteFile

TIMEOUT = 30.0  # seconds without a byte
TRIES = 6
PAUSE = 0.5  # seconds before the second try; twice as long before each next one
READ_BYTES = 256 << 10
EXPIRED = (401, 403, 410)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 8


class HubError(WorkError):
    """The hub, or the way to it, failed."""


class Expired(HubError):
    """An address that was given is refused now."""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass
class Answer:
    """A response whose body has not been read. url: where the redirects led."""

    url: str
    status: int
    headers: Message
    body: Any


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Hub:
    """endpoint, token: of the environment where None is given, in llama.cpp's order."""

    def __init__(self, endpoint: str | None = None, token: str | None = None, pause: float = PAUSE) -> None:
        given = endpoint or os.environ.get("MODEL_ENDPOINT") or os.environ.get("HF_ENDPOINT")
        self.endpoint = (given or "https://huggingface.co").rstrip("/")
        self._token = token if token is not None else _token()
        self._pause = pause
        self._open = urllib.request.build_opener(_NoRedirect()).open  # proxies as the environment says

    def repository(self, repo: str, revision: str = "main") -> Repository:
        """Raises MissingFile for one that is not there, UsageError for one that wants a token, HubError."""
        path = f"/api/models/{repo}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
        answer = self.ask(self.endpoint + path, what=repo)
        with answer.body:
            try:
                data = json.loads(_all(answer, what=repo))
                files = tuple(_remote_file(each) for each in data["siblings"])
                return Repository(repo, str(data["sha"]), files)
            except (ValueError, KeyError, TypeError) as error:
                raise HubError(f"{repo}: {self.endpoint} sent a list that cannot be read: {error!r}") from error

    def address(self, repo: Repository, file: RemoteFile) -> str:
        """Where the bytes of a file are, redirects followed."""
        url = f"{self.endpoint}/{repo.repo}/resolve/{repo.commit}/{urllib.parse.quote(file.path)}"
        answer = self.ask(url, method="HEAD", what=f"{repo.repo}/{file.path}")
        answer.body.close()
        return answer.url

    def ranges(self, url: str, start: int, end: int, what: str) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) from start to end, or to wherever the connection breaks.

        A server that ignores ranges sends from 0 on. Raises Expired, HubError.
        """
        answer = self._once(url, {"Range": f"bytes={start}-{end - 1}"}, "GET", what)
        with answer.body:
            if answer.status not in (200, 206):
                raise _refused(answer, what)
            at = start if answer.status == 206 else 0
            while at < end:
                try:
                    data = answer.body.read(min(READ_BYTES, end - at))
                except (OSError, http.client.HTTPException):
                    return
                if not data:
                    return
                yield at, data
                at += len(data)

    def ask(self, url: str, *, method: str = "GET", what: str) -> Answer:
        """A response that is good, tried several times. Raises as repository()."""
        for attempt in range(TRIES):
            try:
                answer = self._once(url, {}, method, what)
                if answer.status < 500 and answer.status != 429:
                    break
                error: Exception = _refused(answer, what)
                answer.body.close()
            except Expired:
                raise
            except HubError as failed:
                error = failed
            if attempt + 1 == TRIES:
                raise error
            time.sleep(self._pause * 2**attempt)
        if answer.status != 200:
            answer.body.close()
            raise _refused(answer, what)
        return answer

    def _once(self, url: str, headers: dict[str, str], method: str, what: str) -> Answer:
        """One response, redirects followed. Raises HubError when there is none."""
        home = urllib.parse.urlsplit(self.endpoint)
        for _ in range(_MOST_REDIRECTS):
            there = urllib.parse.urlsplit(url)
            sent = {"User-Agent": "moe-edge", **headers}
            if self._token and (there.scheme, there.netloc) == (home.scheme, home.netloc):
                sent["Authorization"] = f"Bearer {self._token}"
            request = urllib.request.Request(url, headers=sent, method=method)
            try:
                found = self._open(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                found = error  # a response like any other
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                raise HubError(f"{what}: {there.netloc} cannot be reached: {reason}") from error
            if found.status not in _REDIRECTS:
                return Answer(url, found.status, found.headers, found)
            with found:
                url = urllib.parse.urljoin(url, found.headers.get("Location") or "")
        raise HubError(f"{what}: {home.netloc} redirects without end")


def _token() -> str:
    if given := os.environ.get("HF_TOKEN"):
        return given.strip()
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _remote_file(sibling: dict[str, Any]) -> RemoteFile:
    lfs = sibling.get("lfs") or {}
    sha256 = str(lfs.get("sha256") or lfs.get("oid") or "").removeprefix("sha256:")
    size = int(lfs.get("size") or sibling.get("size") or 0)
    path = str(sibling["rfilename"])
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"a file is called {path}")
    return RemoteFile(path, size, sha256 or str(sibling.get("blobId") or ""), sha256)


def _all(answer: Answer, what: str) -> bytes:
    try:
        return bytes(answer.body.read())
    except (OSError, http.client.HTTPException) as error:
        raise HubError(f"{what}: the connection broke: {error}") from error


def _refused(answer: Answer, what: str) -> MissingFile | UsageError | HubError:
    status, code = answer.status, answer.headers.get("X-Error-Code", "")
    host = urllib.parse.urlsplit(answer.url).netloc
    if code == "GatedRepo":
        return UsageError(f"{what}: asks for an agreement on its page first; then set HF_TOKEN to your token")
    if status == 404 or code in ("RepoNotFound", "EntryNotFound", "RevisionNotFound"):
        return MissingFile(f"{what}: is not at {host}; check the name, or set HF_TOKEN if it is private")
    if status == 401:
        return UsageError(f"{what}: {host} wants a token, or does not take the one it got; set HF_TOKEN")
    if status in EXPIRED:
        return Expired(f"{what}: {host} refuses it (HTTP {status})")
    return HubError(f"{what}: {host} answered HTTP {status}; try again later")
