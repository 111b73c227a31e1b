"""How long, how slow, and who: bodies, headers, clients that read nothing, keys, hosts, pages of other origins."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from moe_edge.models.errors import UsageError
from moe_edge.runner.fake import FakeModel, says
from moe_edge.runner.serve.connection import PatientProtocol
from moe_edge.runner.serve.server import ServerOptions
from serving import GENERATING, MESSAGES, PATIENCE, Server, eventually, exchange, raw_request, request, serving

# ---- limits


def test_a_body_that_is_too_long_is_refused_with_its_limit() -> None:
    with serving(FakeModel(), {"most_bytes": 1000}) as server:
        for path in GENERATING:
            answer = request("POST", server.url + path, content=b" " * 1200)
            assert answer.status_code == 413 and "1000 bytes" in answer.text, path
        huge = exchange(server.port, raw_request("/v1/completions", b"", length=10**12))
        assert b" 413 " in huge.splitlines()[0]
        assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    with serving(FakeModel(), {"body_seconds": 0.1}) as server:
        answer = exchange(server.port, raw_request("/v1/completions", b"{", length=100))
        assert b" 408 " in answer.splitlines()[0]


def test_headers_that_do_not_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.2)
    with serving(FakeModel()) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as there:
            there.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert there.recv(1) == b""
        long = b"GET /health HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"
        assert b" 400 " in exchange(server.port, long).splitlines()[0]
        assert server.get("/health").status_code == 200


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "write_seconds", 0.3)
    model = FakeModel(says("x" * 16_000_000, piece=80_000), n_ctx=10_000)
    with serving(model) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            there.sendall(raw_request("/v1/chat/completions", {"messages": MESSAGES, "stream": True}))
            assert eventually(lambda: len(server.log) == 1), "the request is still being answered"
        assert server.idle() and server.get("/health").status_code == 200


# ---- keys, hosts, origins


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    with serving(FakeModel(), api_key="secret", origins=("http://page.example",)) as server:
        yield server


def test_a_key_is_taken_in_both_headers_and_nothing_else(locked: Server) -> None:
    for path, body in GENERATING.items():
        refused = locked.post(path, body)
        assert refused.status_code == 401, path
        assert refused.headers["www-authenticate"] == "Bearer"
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert locked.post(path, body, headers=headers).status_code == 200, path
        for headers in ({"Authorization": "Bearer wrong"}, {"x-api-key": ""}, {"Authorization": "secret"}):
            assert locked.post(path, body, headers=headers).status_code == 401, path
    assert locked.post("/v1/messages", {}).json()["error"]["type"] == "authentication_error"
    assert locked.get("/health").status_code == 200 and locked.get("/metrics").status_code == 401


def test_pages_may_ask_only_where_cors_names_them(locked: Server) -> None:
    ours = {"Origin": "http://page.example", "x-api-key": "secret"}
    answer = locked.post("/v1/completions", {"prompt": "x"}, headers=ours)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://page.example"
    asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    assert request("OPTIONS", locked.url + "/v1/completions", headers=asked).status_code == 200
    other = locked.post("/v1/completions", {"prompt": "x"}, headers=ours | {"Origin": "http://evil.example"})
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_without_cors_no_page_of_another_origin_and_no_other_name() -> None:
    with serving(FakeModel()) as server:
        assert "access-control-allow-origin" not in server.get("/health", headers={"Origin": server.url}).headers
        assert server.get("/health", headers={"Origin": server.url}).status_code == 200
        assert server.get("/health", headers={"Origin": "null"}).status_code == 403
        assert server.get("/health", headers={"Host": f"evil.example:{server.port}"}).status_code == 403
        assert server.get("/health", headers={"Host": f"localhost:{server.port}"}).status_code == 200


def test_a_server_for_the_network_needs_a_key_or_the_word_for_none() -> None:
    with pytest.raises(UsageError, match="--no-api-key"):
        ServerOptions(host="0.0.0.0").access()
    with pytest.raises(UsageError, match="empty"):
        ServerOptions(api_key=" ").access()
    assert ServerOptions(host="0.0.0.0", no_api_key=True).access().hosts == ()
    assert ServerOptions(host="0.0.0.0", api_key="k").access().api_key == "k"
    assert "localhost" in ServerOptions(host="127.0.0.1").access().hosts
