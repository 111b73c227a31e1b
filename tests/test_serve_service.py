"""The queue, clients that leave, errors, the log, small paths: what a server is besides its dialects."""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import threading
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from moe_edge.models.errors import EngineError
from moe_edge.runner.chatformat.parts import Text
from moe_edge.runner.fake import FakeModel, says
from moe_edge.runner.protocol import Request
from moe_edge.runner.serve import app
from moe_edge.runner.serve.fields import ApiError
from moe_edge.runner.serve.service import Service
from serving import (
    GENERATING,
    MESSAGES,
    PATIENCE,
    Server,
    eventually,
    exchange,
    raw_request,
    request,
    serving,
    text_of,
)

LONG = "word " * 400


@pytest.fixture
def slow() -> FakeModel:
    """Minutes for a prompt, unless it is stopped."""
    return FakeModel(prefill_seconds=300.0)


@pytest.fixture
def endless() -> FakeModel:
    """Goes on for minutes, a piece every few milliseconds."""
    return FakeModel(says(LONG * 50), n_ctx=100_000, token_seconds=0.005)


# ---- clients that leave


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_in_prefill_frees_the_engine(slow: FakeModel, path: str, streamed: bool) -> None:
    with serving(slow) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as there:
            there.sendall(raw_request(path, GENERATING[path] | {"stream": streamed}))
            assert eventually(lambda: slow.running == 1)
        assert server.idle() and slow.cancelled == 1
        slow.prefill_seconds = 0
        assert server.post(path, GENERATING[path] | {"stream": True}).status_code == 200


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_in_decode_frees_the_engine(endless: FakeModel, path: str, streamed: bool) -> None:
    with serving(endless) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as there:
            there.sendall(raw_request(path, GENERATING[path] | {"stream": streamed}))
            assert not streamed or there.recv(1)
            assert eventually(lambda: endless.running == 1)  # the headers of a stream may come before its turn
        assert server.idle() and endless.cancelled == 1
        assert eventually(lambda: any("left" in line for line in server.log))


def test_a_client_that_leaves_while_it_waits_is_forgotten(slow: FakeModel) -> None:
    with serving(slow) as server:
        first = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        first.sendall(raw_request("/v1/completions", {"prompt": "first"}))
        assert eventually(lambda: slow.running == 1)
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as second:
            second.sendall(raw_request("/v1/completions", {"prompt": "second"}))
            assert eventually(lambda: server.running.service.n_waiting == 1)
        assert eventually(lambda: server.running.service.n_waiting == 0)
        first.close()
        assert server.idle() and [each.prompt for each in slow.requests] == ["first"]


@pytest.mark.parametrize("path", GENERATING)
def test_a_stream_may_be_cut_at_every_byte(path: str) -> None:
    model = FakeModel(says("Grüße, 世界 🙂 and on", piece=2))
    sent = raw_request(path, GENERATING[path] | {"stream": True}, headers="Connection: close\r\n")
    with serving(model) as server:
        whole = exchange(server.port, sent)
        step = max(1, len(whole) // 60)
        for at in range(0, len(whole), step):
            exchange(server.port, sent, at_most=at)
        assert server.idle()
        body = exchange(server.port, sent).partition(b"\r\n\r\n")[2]
        plain = request("POST", server.url + path, json=GENERATING[path] | {"stream": True})
        assert text_of(path, plain.text) == "Grüße, 世界 🙂 and on" and len(body) >= len(plain.content)


# ---- the queue


def taken(server: Server, n: int) -> bool:
    """Whether so many requests run or wait."""
    return server.running.service.n_running + server.running.service.n_waiting == n


def test_requests_beyond_the_queue_are_told_to_come_again(slow: FakeModel) -> None:
    with serving(slow, queue=1) as server:
        waiting = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(2)]
        for n, there in enumerate(waiting):
            there.sendall(raw_request("/v1/completions", {"prompt": f"number {n}"}))
            assert eventually(functools.partial(taken, server, n + 1))
        for path, body in GENERATING.items():
            refused = server.post(path, body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1, path
            assert "try again" in json.dumps(refused.json())
        assert refused.json() == {"error": refused.json()["error"]}
        for there in waiting:
            there.close()
        assert server.idle()


def test_first_come_first_served_and_never_two_at_a_time() -> None:
    model = FakeModel(says("ok"), token_seconds=0.002)

    def in_line(n: int) -> bool:
        return len(model.requests) + server.running.service.n_waiting >= n

    with serving(model, queue=50) as server:
        threads = []
        for n in range(12):
            threads.append(threading.Thread(target=server.post, args=("/v1/completions", {"prompt": f"{n:02d}"})))
            threads[-1].start()
            assert eventually(functools.partial(in_line, n + 1))
        for thread in threads:
            thread.join(PATIENCE)
    assert [each.prompt for each in model.requests] == [f"{n:02d}" for n in range(12)]


def test_the_service_says_when_it_is_not_there() -> None:
    service = Service(1)
    with pytest.raises(ApiError, match="Loading model") as raised:
        _ = service.model
    assert raised.value.status == 503
    service.close()
    service.work()  # returns
    with pytest.raises(ApiError, match="shutting down"):
        service.submit(FakeModel().prepare(_request()), lambda event: None)


def _request() -> Any:
    return Request(prompt="x")


def test_while_the_model_loads_everything_says_so() -> None:
    with serving(None) as server:
        health = server.get("/health")
        assert health.status_code == 503
        assert health.json() == {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
        for path, body in GENERATING.items():
            answer = server.post(path, body)
            assert answer.status_code == 503 and "retry-after" in answer.headers, path
        assert server.get("/metrics").status_code == 200
        assert server.get("/v1/models").status_code == 503


def test_health_answers_while_a_prompt_is_evaluated(slow: FakeModel) -> None:
    with serving(slow) as server, socket.create_connection(("127.0.0.1", server.port)) as there:
        there.sendall(raw_request("/v1/completions", {"prompt": "x"}))
        assert eventually(lambda: slow.running == 1)
        assert server.get("/health").json() == {"status": "ok"}
        assert server.post("/tokenize", {"content": "ab"}).json() == {"tokens": [97, 98]}
        assert server.get("/v1/models").status_code == 200


# ---- errors of a reply


@pytest.mark.parametrize("path", GENERATING)
def test_a_failure_before_and_within_a_stream_is_said_in_the_dialect(path: str) -> None:
    model = FakeModel(lambda asked: [Text("some"), EngineError("the disk is gone")])
    with serving(model) as server:
        whole = server.post(path, GENERATING[path] | {"stream": False})
        assert whole.status_code == 500 and "the disk is gone" in whole.text
        streamed = server.post(path, GENERATING[path] | {"stream": True})
        assert streamed.status_code == 200 and text_of_safe(path, streamed.text) == "some"
        last = streamed.text.strip().splitlines()[-1].removeprefix("data: ")
        said = json.loads(last)
        assert "the disk is gone" in json.dumps(said)
        if path.startswith("/api/"):
            assert said == {"error": "the disk is gone"}
        elif path == "/v1/messages":
            assert said["type"] == "error" and "event: error" in streamed.text
        elif path != "/v1/responses":
            assert said["error"]["type"] == "server_error"
        assert server.idle()


def text_of_safe(path: str, body: str) -> str:
    if path.startswith("/api/"):
        body = "\n".join(line for line in body.splitlines() if '"error"' not in line)
    return text_of(path, body)


def test_a_fault_of_ours_ends_one_reply_and_not_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel(lambda asked: [ZeroDivisionError("oops")])
    with serving(model) as server:
        answer = server.post("/v1/completions", {"prompt": "x"})
        assert answer.status_code == 500 and "fault of moe-edge" in answer.text and "oops" not in answer.text
        model.script = says("fine")
        assert server.post("/v1/completions", {"prompt": "x"}).json()["choices"][0]["text"] == "fine"
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_template_that_refuses_is_the_clients_error() -> None:
    with serving(FakeModel()) as server:
        answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "REFUSE"}]})
        assert answer.status_code == 400 and "template refuses" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", GENERATING)
def test_a_prompt_that_is_too_long_is_refused_before_a_stream_begins(path: str) -> None:
    with serving(FakeModel(n_ctx=30)) as server:
        body = json.loads(json.dumps(GENERATING[path]).replace("Hello", "Hello " * 40))
        answer = server.post(path, body | {"stream": True})
        assert answer.status_code == 400 and "30" in answer.text
        if not path.startswith(("/api/", "/v1/messages")):
            assert answer.json()["error"]["code"] == "context_length_exceeded"


# ---- keep-alive, text over pieces, stops


@pytest.mark.parametrize("path", GENERATING)
def test_a_client_that_waits_for_a_prompt_hears_from_us(path: str) -> None:
    model = FakeModel(says("done"), prefill_seconds=1.0)
    with serving(model, {"keep_alive_seconds": 0.05}) as server:
        answer = server.post(path, GENERATING[path] | {"stream": True})
    assert text_of(path, answer.text) == "done"
    mark = {"/v1/messages": "event: ping", "/api/chat": '"content":""', "/api/generate": '"response":""'}
    assert answer.text.count(mark.get(path, "\n: ")) >= 2 or answer.text.startswith(": ")


def test_a_stop_text_over_pieces_ends_the_reply_before_it() -> None:
    with serving(FakeModel(says("one two three", piece=1))) as server:
        answer = server.post("/v1/completions", {"prompt": "x", "stop": "two", "max_tokens": 100})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


# ---- the log, metrics, small paths


def test_one_line_for_each_request() -> None:
    with serving(FakeModel(says("abcdef"))) as server:
        server.post("/v1/chat/completions", {"messages": MESSAGES, "stream": True})
        server.post("/v1/chat/completions", {"messages": []})
        server.get("/health")
        assert eventually(lambda: len(server.log) == 2)
    assert "POST /v1/chat/completions 200 prompt" in server.log[0] and ", stop, total" in server.log[0]
    assert "400" in server.log[1] and "error" in server.log[1]
    with serving(FakeModel(says("abcdef")), log_json=True) as server:
        server.post("/api/chat", {"messages": MESSAGES})
        assert eventually(lambda: len(server.log) == 1)
    line = json.loads(server.log[0])
    assert line["endpoint"] == "/api/chat" and line["status"] == 200 and line["finish"] == "stop"
    assert line["prompt"] > 0 and line["generated"] == 2 and line["moe_edge"]["expert_hits"] == 3


def test_what_was_traded_is_in_every_answer() -> None:
    with serving(FakeModel()) as server:
        for path, body in GENERATING.items():
            answer = server.post(path, body | {"stream": False})
            told = answer.json()
            traded = told["moe_edge"] if path.startswith("/api/") else told["usage"]["moe_edge"]
            assert traded["expert_hits"] == 3 and traded["policy"] == "exact", path
            assert json.loads(answer.headers["x-moe-edge"])["expert_bytes_read"] == 100, path
        streamed = server.post("/v1/messages", GENERATING["/v1/messages"] | {"stream": True}).text
        assert '"expert_hits":3' in streamed


def test_metrics_have_llama_servers_names_and_ours() -> None:
    with serving(FakeModel(says("abcdef"))) as server:
        server.post("/v1/completions", {"prompt": "xyz", "max_tokens": 100})
        text = server.get("/metrics").text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values["llamacpp:prompt_tokens_total"] == 3 and values["llamacpp:tokens_predicted_total"] == 2
    assert values["moe_edge_expert_hits_total"] == 3 and values["moe_edge_expert_misses_total"] == 1
    assert values["moe_edge_budget_bytes"] == 1e6 and values["moe_edge_ttft_seconds_count"] == 1
    assert values["llamacpp:prompt_tokens_seconds"] == 300
    assert values["llamacpp:requests_processing"] == 0 and values["moe_edge_peak_rss_bytes"] > 1e6


def test_llama_servers_small_paths() -> None:
    with serving(FakeModel()) as server:
        assert server.get("/v1/health").json() == {"status": "ok"}
        assert server.get("/props").json()["default_generation_settings"]["n_ctx"] == 4096
        with_pieces = server.post("/tokenize", {"content": "aü", "with_pieces": True}).json()["tokens"]
        assert with_pieces[0] == {"id": 97, "piece": "a"} and with_pieces[1]["piece"] == [0xC3]
        assert server.post("/detokenize", {"tokens": [104, 105]}).json() == {"content": "hi"}
        assert server.post("/detokenize", {"tokens": [999]}).status_code == 400
        prompt = server.post("/apply-template", {"messages": MESSAGES}).json()["prompt"]
        assert prompt == "<user>Hello</user><assistant>"
        assert server.get("/").text == "Ollama is running" and server.get("/moe-edge/facts").json()["name"] == "fake"
        assert server.get("/moe-edge/picture").json()["resident"] == [[0, 1], [0]]
        live = server.get("/moe-edge/live").json()
        assert b64decode(live["recency"]) == bytes([0, 255, 0]) and live["numbers"]["expert_hits"] == 3
        assert (live["running"], live["waiting"], live["queue_limit"]) == (0, 0, 8) and live["peak_rss_bytes"] > 1 << 20
        assert request("HEAD", server.url + "/").status_code == 200


def test_a_page_is_served_to_browsers_and_ollamas_words_to_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.html").write_text("<p>the page</p>")
    (tmp_path / "page.js").write_text("1")
    monkeypatch.setattr(app, "PAGE", tmp_path)
    with serving(FakeModel(), api_key="k") as server:
        page = server.get("/", headers={"Accept": "text/html,*/*"})
        assert page.text == "<p>the page</p>" and page.headers["content-type"].startswith("text/html")
        assert server.get("/page/page.js").text == "1"
        assert server.get("/page/../app.py").status_code == 401 and server.get("/page/no").status_code == 404
        assert server.get("/").text == "Ollama is running"


def test_paths_that_are_none_say_so_in_their_dialect() -> None:
    with serving(FakeModel()) as server:
        assert server.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        assert server.get("/api/nothing").json() == {"error": server.get("/api/nothing").json()["error"]}
        wrong = server.get("/v1/chat/completions")
        assert wrong.status_code == 405 and wrong.json()["error"]["message"]


def test_openapi_lists_every_path_that_takes_a_body() -> None:
    with serving(FakeModel()) as server:
        document = server.get("/openapi.json").json()
    assert set(GENERATING) | {"/tokenize", "/v1/messages/count_tokens"} <= set(document["paths"])
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["messages"] and body["properties"]["stream"] == {"type": "boolean"}


def test_many_at_a_time_with_clients_that_leave() -> None:
    """Two at a time, 240 requests in six dialects, a third of them left somewhere: none hangs, answers stay whole."""
    model = FakeModel(says("All work and no play", piece=2), token_seconds=0.0005)
    failures: list[str] = []

    def fds() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def client(seed: int, n: int) -> None:
        rng = random.Random(seed)
        for _ in range(n):
            path = rng.choice(sorted(GENERATING))
            streamed = rng.random() < 0.7
            body = GENERATING[path] | {"stream": streamed}
            if rng.random() < 0.33:
                sent = raw_request(path, body, headers="Connection: close\r\n")
                exchange(server.port, sent, at_most=rng.randrange(0, 1500))
                continue
            answer = server.post(path, body)
            if answer.status_code != 200 or (streamed and text_of(path, answer.text) != "All work and no play"):
                failures.append(f"{path} {answer.status_code} {answer.text[:200]}")

    with serving(model, queue=100) as server:
        client(99, 10)
        assert server.idle()
        before = fds()
        threads = [threading.Thread(target=client, args=(seed, 120)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert server.idle() and failures == []
        assert eventually(lambda: fds() <= before + 2)


def test_a_reply_that_runs_when_the_server_ends_is_ended_and_said(endless: FakeModel) -> None:
    got: list[str] = []
    with serving(endless) as server:
        def ask(path: str) -> None:
            got.append(server.post(path, GENERATING[path] | {"stream": True}).text)

        thread = threading.Thread(target=ask, args=("/v1/messages",))
        thread.start()
        assert eventually(lambda: endless.running == 1)
        started = time.monotonic()
    thread.join(PATIENCE)
    assert "message_stop" in got[0] and '"stop_reason":"max_tokens"' in got[0]
    assert time.monotonic() - started < PATIENCE and endless.cancelled == 1


