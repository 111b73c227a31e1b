"""What the server costs: /health while a prompt is evaluated, and a streamed token over a generated one.

    python bench/serve.py [model.gguf] --ram 2GiB --prompt 2000 --tokens 256 --rounds 5

Starts `moe-edge serve` on a free port, all experts resident if --ram allows it. Prints the time to the first byte of
/health during prefills (median, 90th percentile, most), then the seconds a token of a stream and of generate() in a
process of its own, in turns. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MOE_EDGE = [sys.executable, "-m", "moe_edge.runner.start"]
WORDS = "It was a bright cold day in April, and the clocks were striking thirteen. "


@contextmanager
def server(model: list[str], options: list[str]) -> Iterator[int]:
    """The port of a server that is ready."""
    child = subprocess.Popen(
        [*MOE_EDGE, "serve", *model, "--port", "0", "--temp", "0", *options], stderr=subprocess.PIPE, text=True
    )
    try:
        port = 0
        assert child.stderr is not None
        for line in child.stderr:
            if found := re.search(r"ready at http://[\d.]+:(\d+)", line):
                port = int(found[1])
                break
        if port == 0:
            raise SystemExit(f"the server did not start: {line.strip()}")
        threading.Thread(target=child.stderr.read, daemon=True).start()
        yield port
    finally:
        child.terminate()
        child.wait()


def post(port: int, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def prompt_of(port: int, n_tokens: int, salt: int) -> str:
    """A text of about so many tokens that begins differently each time."""
    each = len(json.loads(post(port, "/tokenize", {"content": WORDS}).read())["tokens"])
    return f"{salt} " + WORDS * max(1, n_tokens // each)


def health_during_prefill(port: int, n_prompt: int, rounds: int) -> list[float]:
    """Seconds to the first byte of /health, asked again and again while prompts are evaluated."""
    seconds: list[float] = []
    for salt in range(rounds):
        body = {"prompt": prompt_of(port, n_prompt, salt), "max_tokens": 1}
        prefill = threading.Thread(target=lambda body=body: post(port, "/v1/completions", body).read())
        prefill.start()
        time.sleep(0.02)
        while prefill.is_alive():
            connection = http.client.HTTPConnection("127.0.0.1", port)
            started = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse()
            seconds.append(time.perf_counter() - started)
            connection.close()
            time.sleep(0.005)
        prefill.join()
    return seconds


def streamed(port: int, n_tokens: int) -> float:
    """Seconds a token of a stream, as its client sees them, after the first."""
    times: list[float] = []
    answer = post(port, "/v1/completions", {"prompt": "The king said", "max_tokens": n_tokens, "stream": True})
    for line in answer:
        if line.startswith(b'data: {"id"') and b'"finish_reason":null' in line:
            times.append(time.perf_counter())
    return (times[-1] - times[0]) / (n_tokens - 1)


def generated(model: list[str], options: list[str], n_tokens: int) -> float:
    """Seconds a token of `moe-edge generate`, after the first, as it says itself."""
    command = [*MOE_EDGE, "generate", *model, "-p", "The king said", "-n", str(n_tokens), "--temp", "0", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return 1.0 / float(json.loads(done.stdout)["decode_tok_s"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: the embedded tiny model")
    parser.add_argument("--ram", default="200MiB")
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args(arguments)
    model = [o.model] if o.model else []
    options = ["--ram", o.ram, "-c", str(o.ctx_size), "-t", str(o.threads)]
    with server(model, options) as port:
        streamed(port, o.tokens)  # experts are read once before anything is measured
        health = sorted(health_during_prefill(port, o.prompt, o.rounds))
        stream, plain = [], []
        for _ in range(o.rounds):
            stream.append(streamed(port, o.tokens))
            plain.append(generated(model, options, o.tokens))
    summary = {
        "median": 1000 * statistics.median(health), "p90": 1000 * health[int(0.9 * (len(health) - 1))],
        "most": 1000 * health[-1], "n": len(health),
    }  # fmt: skip
    result = {
        "health_first_byte_ms": summary,
        "stream_ms_per_token": 1000 * statistics.median(stream),
        "generate_ms_per_token": 1000 * statistics.median(plain),
        "overhead_ms_per_token": 1000 * (statistics.median(stream) - statistics.median(plain)),
        "options": vars(o),
    }  # fmt: skip
    h: dict[str, float] = summary
    print(f"/health during prefill: median {h['median']:.2f} ms, 90 % {h['p90']:.2f} ms, most {h['most']:.2f} ms")
    print(
        f"a token: stream {result['stream_ms_per_token']:.3f} ms, generate {result['generate_ms_per_token']:.3f} ms, "
        f"the server's part {result['overhead_ms_per_token']:.3f} ms"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
