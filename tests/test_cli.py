"""The command line as a user meets it: in its own process, with exit codes, one sentence for each error."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from moe_edge.convert.convert import convert
from moe_edge.models.embedded import tiny_model_path
from random_models import Shape, write_random_model

MOE_EDGE = [sys.executable, "-m", "moe_edge.runner.start"]


def run(*args: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MOE_EDGE, *(str(a) for a in args)], input=stdin, capture_output=True, text=True, check=False, timeout=120
    )


def told(*args: object) -> Any:
    """What a call with --json prints. When it fails, the test says what the call complained of."""
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fails(status: int, *args: object) -> str:
    """The one sentence a failing call prints; checks the exit status and that nothing else is said."""
    done = run(*args)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("moe-edge: "), done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, converted: skeleton path."""
    folder = tmp_path_factory.mktemp("pair")
    convert(tiny_model_path(), folder / "tiny.gguf")
    return folder / "tiny.gguf"


def copy_pair(pair: Path, to: Path) -> tuple[Path, Path]:
    skeleton, store = to / "tiny.gguf", to / "tiny.experts.gguf"
    skeleton.write_bytes(pair.read_bytes())
    store.write_bytes(pair.with_name("tiny.experts.gguf").read_bytes())
    return skeleton, store


JSON_KEYS = {
    "text", "prompt_tokens", "generated_tokens", "load_s", "ttft_s", "prefill_tok_s", "decode_tok_s", "expert_uses",
    "expert_hit_rate", "expert_bytes_read", "expert_bytes_per_token", "stall_s", "low_precision_uses", "skipped_uses",
    "substituted_uses",
    "ram_budget_bytes", "peak_rss_bytes", "policy", "warm_start", "lookahead", "prefetched", "prefetch_useful",
    "prefetch_late", "prefetch_wasted", "prefetch_cancelled", "prefetch_failed", "prefetch_bytes", "wasted_bytes",
}  # fmt: skip


def test_generate_prints_json_with_every_promised_field() -> None:
    done = run("generate", "-p", "The king said", "-n", 20, "--temp", 0, "--ram", "40MiB", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert JSON_KEYS <= result.keys()
    assert result["generated_tokens"] == 20 and result["prompt_tokens"] == 3
    assert result["ram_budget_bytes"] == 40 << 20
    assert result["peak_rss_bytes"] <= (40 + 64) << 20
    assert 0 < result["expert_hit_rate"] < 1 and result["expert_bytes_read"] > 0
    assert (result["low_precision_uses"], result["skipped_uses"], result["policy"]) == (0, 0, "exact")


def test_text_is_the_same_at_every_budget_converted_or_in_place(pair: Path) -> None:
    facts = told("show", tiny_model_path(), "--json")  # in place: slices off the page grid take more
    budgets = [facts["ram_floor_bytes"], facts["ram_comfortable_bytes"], facts["ram_resident_bytes"], "auto"]
    texts = set()
    for model in (pair, tiny_model_path()):
        for ram in budgets:
            done = run("generate", model, "-p", "And the LORD said", "-n", 40, "--temp", 0, "--ram", ram, "--json")
            assert done.returncode == 0, done.stderr
            texts.add(json.loads(done.stdout)["text"])
    assert len(texts) == 1 and len(texts.pop()) > 50


def test_the_split_of_the_budget_is_printed_before_the_reply() -> None:
    done = run("generate", "-p", "The", "-n", 3, "--ram", "40MiB")
    assert re.search(r"memory 40\.0 MiB: dense .* KV cache .* compute .* experts ", done.stderr)
    assert re.search(r"\[3 tokens, .* tok/s, first token .* expert hits, .*/token read\]", done.stderr)


def test_look_ahead_adds_a_line_with_its_counts() -> None:
    plain = run("generate", "-p", "The", "-n", 30, "--temp", 0, "--ram", "38MiB")
    assert len(plain.stderr.splitlines()) == 2 and "look-ahead" not in plain.stderr
    done = run("generate", "-p", "The", "-n", 30, "--temp", 0, "--ram", "38MiB", "--lookahead", "single")
    assert done.stdout == plain.stdout
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"\[look-ahead single: [1-9]\d* experts prefetched, \d+ useful \(\d+ late\), \d+ wasted, \d+ cancelled, "
        r"0 failed; \d+\.\d MiB prefetched, \d+\.\d MiB wasted\]",
        last,
    ), last


@pytest.mark.parametrize("name", ["generate", "chat", "plan"])
def test_below_one_tokens_working_set_a_warning_names_the_number(name: str) -> None:
    good = told("show", "--json")["ram_comfortable_bytes"]
    more = {"generate": ["-p", "The", "-n", 2], "chat": ["-n", 2], "plan": ["--disk", "1GB/s"]}[name]

    def said(ram: int) -> str:
        done = run(name, "--ram", ram, *more, stdin="The\n")  # type: ignore[misc]
        assert done.returncode == 0, done.stderr
        return " ".join((done.stdout + done.stderr).split())

    number = f"{-(-good // 2**20)}MiB"
    assert re.search(
        "warning: this is below one token's working set: most experts will be read again for every token; "
        rf"--ram {number} or more lets experts be reused", said(good - 2**20)
    )  # fmt: skip
    assert "working set" not in said(-(-good // 2**20) * 2**20)


def test_budget_is_an_alias_and_the_environment_a_default() -> None:
    a = told("generate", "-p", "x", "-n", 1, "--budget", "41MiB", "--json")
    assert a["ram_budget_bytes"] == 41 << 20
    os.environ["MOE_EDGE_GENERATE_RAM"] = "42MiB"
    try:
        b = told("generate", "-p", "x", "-n", 1, "--json")
    finally:
        del os.environ["MOE_EDGE_GENERATE_RAM"]
    assert b["ram_budget_bytes"] == 42 << 20


def test_show_tells_what_a_model_is(pair: Path) -> None:
    facts = told("show", pair, "--json")
    assert facts["architecture"] == "olmoe" and facts["n_moe_layers"] == 4
    assert facts["n_expert"] == 16 and facts["n_expert_used"] == 4 and not facts["in_place"]
    assert facts["expert_types"] == {"down Q8_0": 64, "gate Q8_0": 64, "up Q8_0": 64}
    assert facts["expert_bytes"] == 4 * 16 * 3 * 256 * 256 // 32 * 34
    assert facts["ram_floor_bytes"] < facts["ram_comfortable_bytes"] < facts["ram_resident_bytes"]
    assert "16 experts, top 4" in run("show", pair).stdout


def test_a_pipe_is_one_shot_and_only_the_reply_is_on_standard_output() -> None:
    done = run("chat", "--temp", 0, "-n", 12, "--ram", "40MiB", stdin="In the beginning God created\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "MiB" not in done.stdout
    assert "[12 tokens" in done.stderr


def test_convert_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = run("convert", tiny_model_path(), "-o", tmp_path / "x.gguf", "--type", "Q4_K", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "Q8_0 -> Q4_K" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_convert_then_generate(tmp_path: Path) -> None:
    done = run("convert", tiny_model_path(), "-o", tmp_path / "x.gguf", "--type", "Q4_K", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.experts.gguf", "x.gguf"]
    result = told("generate", tmp_path / "x.gguf", "-p", "The", "-n", 8, "--ram", "40MiB", "--json")
    assert result["generated_tokens"] == 8


def test_bench_prints_rows_for_each_budget_and_a_block_to_paste() -> None:
    done = run("bench", "-n", 8, "--ram", "36MiB", "--ram", "48MiB", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["rows"]] == [
        "--ram 36.0 MiB, cold", "--ram 36.0 MiB, warm", "--ram 48.0 MiB, cold", "--ram 48.0 MiB, warm",
    ]  # fmt: skip
    small, large = result["rows"][1], result["rows"][3]
    assert small["expert_bytes_per_token"] > large["expert_bytes_per_token"]
    assert small["expert_hit_rate"] < large["expert_hit_rate"] <= 1
    assert all(row["decode_tok_s"] > 0 and row["peak_rss_bytes"] < (48 + 64) << 20 for row in result["rows"])
    block = run("bench", "-n", 4, "--ram", "40MiB").stdout
    assert "| row | --ram | tok/s |" in block and block.count("| --ram 40.0 MiB, ") == 2
    assert "is too small" in fails_last(2, "bench", "-n", 4, "--ram", "5MiB")


def test_a_model_that_is_not_there() -> None:
    assert "nowhere.gguf" in fails(1, "generate", "nowhere.gguf", "-p", "x")


def test_a_missing_store(pair: Path, tmp_path: Path) -> None:
    skeleton, store = copy_pair(pair, tmp_path)
    store.unlink()
    assert "tiny.experts.gguf" in fails(1, "generate", skeleton, "-p", "x")


def test_the_store_of_another_model(pair: Path, tmp_path: Path) -> None:
    skeleton, store = copy_pair(pair, tmp_path)
    other = write_random_model(tmp_path / "o.gguf", "olmoe")
    convert(other, tmp_path / "other.gguf")
    store.write_bytes((tmp_path / "other.experts.gguf").read_bytes())
    said = fails(1, "generate", skeleton, "-p", "x")
    assert "tiny.experts.gguf" in said and len(re.findall(r"[0-9a-f]{32}", said)) == 2


@pytest.mark.parametrize("which", [0, 1])
def test_a_cut_file_names_file_tensor_and_bytes(pair: Path, tmp_path: Path, which: int) -> None:
    path = copy_pair(pair, tmp_path)[which]
    os.truncate(path, path.stat().st_size * 2 // 3)
    said = fails(1, "generate", tmp_path / "tiny.gguf", "-p", "x")
    assert path.name in said and "tensor '" in said and len(re.findall(r"\d{4,}", said)) >= 2


def test_a_wrong_magic(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"ZIPF" + bytes(100))
    said = fails(1, "generate", tmp_path / "m.gguf", "-p", "x")
    assert "m.gguf" in said and "GGUF" in said


def test_a_flipped_byte_is_caught_by_verify_and_by_verify_only(pair: Path, tmp_path: Path) -> None:
    skeleton, store = copy_pair(pair, tmp_path)
    data = bytearray(store.read_bytes())
    data[-5000] ^= 1
    store.write_bytes(data)
    said = fails(1, "generate", skeleton, "-p", "x", "--verify")
    assert "tiny.experts.gguf" in said and "_exps." in said and "CRC-32" in said
    assert run("generate", skeleton, "-p", "x", "-n", 1, "--ram", "40MiB").returncode == 0
    assert run("generate", pair, "-p", "x", "-n", 1, "--ram", "40MiB", "--verify").returncode == 0


def test_a_budget_under_the_floor_names_the_number_that_works() -> None:
    done = run("generate", "-p", "x", "-n", "1", "--ram", "5MiB")
    assert done.returncode == 2
    need = re.search(r"try --ram (\d+MiB)", done.stderr)
    assert need, done.stderr
    assert run("generate", "-p", "x", "-n", "1", "--ram", need[1]).returncode == 0


def test_the_number_that_works_does_so_in_a_program_that_is_larger_than_the_one_that_named_it() -> None:
    """Libraries are mapped by more or fewer pages at each start, and the program's own size is charged above 64 MiB."""

    def larger(mib: float, ram: str) -> subprocess.CompletedProcess[str]:
        code = f"held = b'x' * {int(mib * 2**20)}\nfrom moe_edge.runner.start import main\nmain()"
        arguments = ["generate", "-p", "x", "-n", "1", "-t", "1", "--ram", ram]
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120
        )

    refused = larger(40, "5MiB")  # so that both are above 64 MiB, however the libraries are mapped
    need = re.search(r"try --ram (\d+MiB)", refused.stderr)
    assert refused.returncode == 2 and need, refused.stderr
    done = larger(43.5, need[1])
    assert done.returncode == 0, done.stderr


def test_an_unknown_architecture_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    source = write_random_model(tmp_path / "m.gguf", "olmoe")
    data = source.read_bytes()
    assert data.count(b"olmoe")
    source.write_bytes(data.replace(b"olmoe", b"llamu"))
    said = fails(2, "convert", source, "-o", tmp_path / "out.gguf")
    assert "llamu" in said
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_model_without_experts(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "dense.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    for args in (("generate", path, "-p", "x"), ("convert", path, "-o", tmp_path / "o.gguf")):
        said = fails(1, *args)
        assert "dense.gguf" in said and "expert" in said


def test_an_unreadable_folder_and_a_folder_without_a_model(tmp_path: Path) -> None:
    assert str(tmp_path) in fails(1, "generate", tmp_path, "-p", "x")
    if os.geteuid() == 0:
        return  # root reads everything
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    assert "locked" in fails(1, "generate", locked / "m.gguf", "-p", "x")


def test_a_wrong_size_policy_or_type_is_a_wrong_call(tmp_path: Path) -> None:
    assert run("generate", "-p", "x", "--ram", "lots").returncode == 2
    assert "known: exact" in fails_last(2, "generate", "-p", "x", "--policy", "lfru", "--ram", "40MiB")
    assert "Q9_Z" in fails(2, "convert", tiny_model_path(), "-o", tmp_path / "x.gguf", "--type", "Q9_Z")
    assert list(tmp_path.iterdir()) == []


def fails_last(status: int, *args: object) -> str:
    """As fails(), for a failure after the memory plan was printed."""
    done = run(*args)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_an_empty_prompt_and_one_that_does_not_fit() -> None:
    assert "empty" in fails_last(2, "generate", "-p", "", "--ram", "40MiB")
    said = fails_last(2, "generate", "-p", "word " * 300, "-c", 256, "--ram", "40MiB")
    assert "256" in said and "--ctx-size" in said


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_while_converting_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, check=False)  # type: ignore[arg-type]
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small disk here")
    try:
        said = fails(1, "convert", tiny_model_path(), "-o", disk / "x.gguf")
        assert "x.gguf" in said and len(re.findall(r"\d{6,}", said)) >= 2
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    shape = Shape(n_layer=12, n_expert=64)
    source = write_random_model(tmp_path / "m.gguf", "qwen3moe", shape, expert_type="F16", tile=True)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["convert", str(source), "-o", str(out / "x.gguf"), "--type", "Q3_K"]
    child = subprocess.Popen([*MOE_EDGE, *arguments], stderr=subprocess.PIPE, text=True)
    for _ in range(3000):
        if any(out.iterdir()) or child.poll() is not None:
            break
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert list(out.iterdir()) == []


@dataclass
class Terminal:
    """`moe-edge chat` on a pseudo-terminal."""

    pid: int
    fd: int
    seen: str = ""

    def expect(self, text: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"waited for {text!r}, saw {self.seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    assert text in self.seen, f"ended before {text!r}: {self.seen!r}"
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*args: object) -> Terminal:
        pid, fd = pty.fork()
        if pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*MOE_EDGE, "chat", *(str(a) for a in args)])
        started.append(Terminal(pid, fd))
        return started[-1]

    yield start
    for t in started:
        try:
            os.kill(t.pid, signal.SIGKILL)
            os.waitpid(t.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(t.fd)


# Python 3.12 and later warn about fork in a process with threads; the child execs at once.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_conversation_in_a_terminal(chat: Callable[..., Terminal]) -> None:
    t = chat(tiny_model_path(), "--ram", "40MiB", "--temp", "0", "-n", "2000", "-c", "2048")
    t.expect("continues the text")
    t.expect("> ")
    t.type("/help\n")
    t.expect("/clear")
    t.expect("> ")
    t.type("/nonsense\n")
    t.expect("unknown command /nonsense")
    t.expect("> ")
    t.type("In the beginning\n")
    t.expect("In the beginning\r\n")
    t.expect(" ")  # a reply has begun
    t.type("\x03")  # Ctrl-C stops the reply, not the program
    t.expect("/token read]")
    t.expect("> ")
    t.type('"""\nAnd the king\nsaid\n"""\n')
    t.expect("... said")
    t.expect('"""\r\n')
    t.expect(" ")
    t.type("\x03")
    t.expect("/token read]")
    t.expect("> ")
    t.type("/stats\n")
    t.expect("session: ")
    t.expect("memory 40.0 MiB")
    t.type("/clear\n")
    t.expect("(forgotten)")
    t.expect("> ")
    t.type("/exit\n")
    assert os.waitpid(t.pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_model_with_a_template_remembers_the_conversation(
    chat: Callable[..., Terminal], random_model: Callable[[str], Path]
) -> None:
    t = chat(random_model("qwen3moe"), "--temp", "0", "-n", "5", "-c", "512")
    for message in ("hello there", "and again"):
        t.expect("> ")
        t.type(message + "\n")
        t.expect("/token read]")
    t.expect("> ")
    t.type("\x04")  # Ctrl-D leaves
    assert os.waitpid(t.pid, 0)[1] == 0


def test_an_interrupt_ends_generate_with_130_and_no_traceback() -> None:
    arguments = ["generate", "-n", "100000", "-c", "8192", "--temp", "0", "--ram", "200MiB", "-t", "1"]
    arguments += ["-p", "word " * 900]
    for delay in (0.3, 0.6):
        child = subprocess.Popen([*MOE_EDGE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        assert child.stderr.readline().startswith("memory ")  # planned; it loads and decodes now
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 130, said
        assert "ignored" not in said and "Traceback" not in said
        assert said.splitlines()[-1] == "moe-edge: interrupted"


def test_bytes_that_are_not_utf8_are_a_prompt_like_any_other() -> None:
    raw = subprocess.run(
        [*MOE_EDGE, "generate", "-p", b"a\xff", "-n", "2", "--ram", "40MiB"], capture_output=True, check=False
    )
    assert raw.returncode == 0, raw.stderr
    piped = subprocess.run(
        [*MOE_EDGE, "chat", "-n", "2", "--ram", "40MiB"], input=b"a\xff\n", capture_output=True, check=False
    )
    assert piped.returncode == 0, piped.stderr


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    command = f"{' '.join(MOE_EDGE)} generate -p The -n 400 --ram 40MiB | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr
