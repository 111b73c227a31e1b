"""Standard streams of every kind, signals at any moment, names that hold anything: a result, or one sentence."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import resource
import select
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from altered import alter
from moe_edge.convert.convert import convert
from moe_edge.models.embedded import tiny_model_path
from random_vocabulary import ID_OF_EOS

MOE_EDGE = os.path.join(sysconfig.get_path("scripts"), "moe-edge")
GENERATE = ["generate", "-p", "The king", "-n", "6", "-t", "1", "--temp", "0", "--ram", "60MiB"]
SHOW = ["show", str(tiny_model_path())]
COMMANDS = {
    "generate": GENERATE,
    "json": [*GENERATE, "--json"],
    "chat": ["chat", "-n", "6", "-t", "1", "--temp", "0", "--ram", "60MiB"],
    "show": SHOW,
    "show json": [*SHOW, "--json"],
    "plan": ["plan", "--help"],
    "help": ["--help"],
    "version": ["--version"],
}


def call(
    arguments: list[Any], shell: str = "", stdin: bytes = b"hello\n", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """moe-edge through a shell, so that `shell` can close and redirect its streams."""
    line = f'exec "$0" "$@" {shell}'
    done = subprocess.run(
        ["bash", "-c", line, MOE_EDGE, *arguments], input=stdin, capture_output=True, check=False, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
    assert b"fault of moe-edge" not in done.stderr, done.stderr
    return done


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line on standard error: the one sentence."""
    lines = done.stderr.decode().splitlines()
    assert sum(line.startswith("moe-edge: ") for line in lines) == 1, done.stderr
    return lines[-1]


# ---- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_standard_output_that_is_full_or_closed_is_one_sentence(name: str) -> None:
    if os.path.exists("/dev/full"):
        done = call(COMMANDS[name], ">/dev/full")
        assert done.returncode == 1
        assert complaint(done) == "moe-edge: standard output: cannot be written: No space left on device"
    done = call(COMMANDS[name], ">&-")
    assert done.returncode == 1
    assert complaint(done) == "moe-edge: standard output: cannot be written: Bad file descriptor"


@pytest.mark.parametrize("shell", ["2>&-", "2>/dev/full", "2>&- <&-"])
@pytest.mark.parametrize("name", ["generate", "show", "help"])
def test_standard_error_that_cannot_be_written_changes_nothing(name: str, shell: str) -> None:
    if "/dev/full" in shell and not os.path.exists("/dev/full"):
        shell = "2>&-"
    as_usual = call(COMMANDS[name])
    done = call(COMMANDS[name], shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, as_usual.stdout, b"")
    assert call(["generate", "nowhere.gguf", "-p", "x"], shell).returncode == 1


def test_with_all_streams_closed_no_file_gets_their_numbers(tmp_path: Path) -> None:
    arguments = ["convert", str(tiny_model_path()), "-o", str(tmp_path / "out.gguf"), "-t", "1"]
    convert(tiny_model_path(), tmp_path / "good.gguf")
    assert call(arguments, "<&- >&- 2>&-").returncode == 1  # its report cannot be printed
    for suffix in (".gguf", ".experts.gguf"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"good{suffix}").read_bytes()


def test_closed_standard_input_is_an_empty_one() -> None:
    done = call(COMMANDS["chat"], "<&-")
    assert done.returncode == 2 and "nothing on standard input" in complaint(done)
    done = call(["generate", "-p", "-"], "<&-")
    assert done.returncode == 2, done.stdout[:300]


@pytest.mark.parametrize("name", ["generate", "json", "chat", "show", "show json", "help"])
def test_a_reader_that_left_ends_it_quietly(name: str) -> None:
    many = [{"6": "300"}.get(each, each) for each in COMMANDS[name]]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [MOE_EDGE, *many], input=b"hi", stdout=writing, stderr=subprocess.PIPE, check=False, timeout=120
    )
    os.close(writing)
    assert done.returncode == 1 and b"moe-edge:" not in done.stderr and b"Error" not in done.stderr, done.stderr


def vocabulary(model: Path, target: Path, letters: str) -> Path:
    """A model all of whose text tokens but h and i hold `letters`, written as byte-level BPE writes them."""

    def change(key: str, value: Any) -> Any:
        if key != "tokenizer.ggml.tokens":
            return value
        return [each if each in ("h", "i") else f"{letters}{i}" for i, each in enumerate(value[:ID_OF_EOS])] + value[
            ID_OF_EOS:
        ]

    return alter(model, target, change=change)


def reply_of(model: Path, **environment: str) -> bytes:
    done = call(["generate", str(model), "-p", "hi", "-n", "5", *GENERATE[5:]], **environment)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[[str], Path]) -> Path:
    """Replies in umlauts and euros: c3 b6 and e2 82 ac, as GPT-2's letters of bytes."""
    return vocabulary(random_model("qwen3moe"), tmp_path_factory.mktemp("german") / "m.gguf", "Ã¶âĤ¬")


def test_a_reply_reaches_a_utf8_pipe_byte_for_byte(german: Path) -> None:
    out = reply_of(german, PYTHONIOENCODING="utf-8")
    assert out.count("ö€".encode()) == 5 and b"\\" not in out


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", rb"\xf6\u20ac"), ("latin-1", b"\xf6\\u20ac"), ("cp1252", b"\xf6\x80")]
)
def test_a_reply_in_what_the_stream_can_say_and_escapes(german: Path, encoding: str, shown: bytes) -> None:
    assert reply_of(german, PYTHONIOENCODING=encoding).count(shown) == 5
    # strict in the environment, and the C locale with nothing that makes it UTF-8
    assert reply_of(german, PYTHONIOENCODING=f"{encoding}:strict").count(shown) == 5
    if encoding == "ascii":
        plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        assert reply_of(german, **plain).count(shown) == 5


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_says_the_same_in_every_encoding(german: Path, encoding: str) -> None:
    arguments = ["generate", str(german), "-p", "hi", "-n", "5", *GENERATE[5:], "--json"]
    done = call(arguments, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode(encoding))["text"].count("ö€") == 5


# ---- control characters ------------------------------------------------------------------------------------


def on_a_terminal(arguments: list[str]) -> bytes:
    """Everything a command writes to a terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv(MOE_EDGE, [MOE_EDGE, *arguments])
    seen, end = b"", time.monotonic() + 60
    while time.monotonic() < end and select.select([fd], [], [], 60)[0]:
        try:
            data = os.read(fd, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(fd)
    assert os.waitpid(pid, 0)[1] == 0, seen
    return seen


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_a_model_says_to_a_terminal_does_not_act_on_it(
    tmp_path: Path, random_model: Callable[[str], Path]
) -> None:
    """ESC, C1 (c2 9b) and a line, in every token."""
    model = vocabulary(random_model("qwen3moe"), tmp_path / "m.gguf", "ě[31mÂĽĊ")
    exact = reply_of(model, PYTHONIOENCODING="utf-8")
    assert exact.count("\x1b[31m\x9b\n".encode()) == 5
    shown = on_a_terminal(["generate", str(model), "-p", "hi", "-n", "5", *GENERATE[5:]])
    assert shown.count(b"\\x1b[31m\\x9b\r\n") == 5
    assert b"\x1b" not in shown and b"\xc2\x9b" not in shown


EVIL = "\x1b]0;x\x07\x1b[2J\n\r\x9b1m\u202e\u2028"


@pytest.mark.parametrize("where", ["file name", "architecture", "tensor name", "template", "missing", "option"])
def test_names_from_outside_reach_standard_error_as_escapes(
    where: str, tmp_path: Path, random_model: Callable[[str], Path]
) -> None:
    from dataclasses import replace

    source, model = random_model("qwen3moe"), tmp_path / "m.gguf"
    arguments = ["generate", str(model), *GENERATE[1:]]
    if where == "file name":
        model = tmp_path / f"{EVIL.replace('/', '')}.gguf"
        alter(source, model, {"qwen3moe.expert_count": 16})
        arguments[1] = str(model)
    elif where == "architecture":
        alter(source, model, {"general.architecture": EVIL})
    elif where == "tensor name":
        alter(source, model, tensors=lambda e: replace(e, name=EVIL, type=99) if e.name == "output_norm.weight" else e)
    elif where == "template":
        alter(source, model, {"tokenizer.chat_template": "{{ raise_exception('" + EVIL.replace("\n", "") + "') }}"})
        arguments = ["chat", str(model), *COMMANDS["chat"][1:]]
    elif where == "missing":
        arguments[1] = f"/{EVIL}.gguf"
    else:
        alter(source, model)
        arguments += ["--policy", EVIL]
    done = call(arguments)
    assert done.returncode in (1, 2)
    said = done.stderr.decode()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", said), said
    assert r"\x1b[2J" in said
    complaint(done)


def test_show_and_plan_print_a_name_on_one_line(tmp_path: Path, random_model: Callable[[str], Path]) -> None:
    folder = tmp_path / "a\x1b[2J\nWILL NOT RUN\u202e"
    folder.mkdir()
    model = folder / "m.gguf"
    model.write_bytes(random_model("qwen3moe").read_bytes())
    for arguments in (["show", str(model)], ["plan", str(model), "--ram", "200MiB", "--disk", "1GB/s"]):
        done = call(arguments)
        assert done.returncode == 0, done.stderr
        out = done.stdout.decode()
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", out), out
        assert not [line for line in out.splitlines() if line.startswith("WILL NOT RUN")], out
    facts = call(["show", str(model), "--json"])
    assert b"\x1b" not in facts.stdout and json.loads(facts.stdout)["model"] == str(model)


def test_an_endless_name_does_not_make_an_endless_message() -> None:
    done = call(["generate", "x" * 100_000 + "/m.gguf", "-p", "x"])
    assert done.returncode == 1 and len(complaint(done)) < 2200


# ---- arguments and the environment -------------------------------------------------------------------------


def test_names_that_are_not_utf8_are_names_like_any_other(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9\xff"
    os.mkdir(folder)
    stock, made, text = folder + b"/t\xff.gguf", folder + b"/o\xff.gguf", folder + b"/t\xff.txt"
    Path(os.fsdecode(stock)).write_bytes(tiny_model_path().read_bytes())
    Path(os.fsdecode(text)).write_bytes(b"And the king said unto them, Behold. " * 40)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    usual = call(GENERATE).stdout
    trace = [b"trace", stock, b"--text", text, b"-n", b"20", b"-o", folder + b"/t\xff.npz", b"-t", b"1"]
    for environment in ({}, plain):
        for arguments in (
            [b"convert", stock, b"-o", made, b"-t", b"1", b"--force"],
            [b"show", made], [b"show", stock, b"--json"], trace,
            [b"simulate", folder + b"/t\xff.npz", b"--policy", b"exact", b"--cache", b"lru"],
        ):  # fmt: skip
            assert call(arguments, **environment).returncode == 0, arguments  # type: ignore[arg-type]
        for model in (stock, made):
            done = call([b"generate", model, *(each.encode() for each in GENERATE[1:])], **environment)  # type: ignore[arg-type]
            assert (done.returncode, done.stdout) == (0, usual), done.stderr
        done = call([b"generate", folder + b"/none\xfe.gguf", b"-p", b"x"], **environment)  # type: ignore[arg-type]
        assert done.returncode == 1 and r"caf\xe9\xff/none\xfe.gguf: no such file" in complaint(done)


def test_without_a_home_folder_the_sentence_says_what_to_set(tmp_path: Path) -> None:
    """No HOME, and a user whom the system does not know: in containers with a user id of their own."""
    (tmp_path / "sitecustomize.py").write_text("import pwd\ndef none(uid): raise KeyError(uid)\npwd.getpwuid = none\n")
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [MOE_EDGE, *arguments], env={**bare, **more}, capture_output=True, text=True, check=False, timeout=120,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    for arguments in (GENERATE, SHOW, ["doctor"], ["plan"]):
        done = run(*arguments)
        assert done.returncode == 1, done
        assert re.fullmatch(r"(?s).*moe-edge: there is no home folder .*set MOE_EDGE_CACHE [^\n]*\n", done.stderr), done
    assert run(*GENERATE, MOE_EDGE_CACHE=str(tmp_path / "cache")).returncode == 0
    made = str(tmp_path / "o.gguf")  # a converted model needs no cache
    assert run("convert", str(tiny_model_path()), "-o", made, "-t", "1").returncode == 0
    assert run("generate", made, *GENERATE[1:]).returncode == 0


# ---- signals -----------------------------------------------------------------------------------------------


def test_signals_at_any_moment_leave_a_status_and_nothing_else(tmp_path: Path) -> None:
    """Twenty random moments from the start of the process to its end; half of them are pressed twice."""
    rng = random.Random(os.environ.get("MOE_EDGE_SIGNAL_SEED"))
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    long = ["-n", "400", "-t", "1", "--temp", "0", "--ram", "60MiB"]
    commands = {
        "generate": ["generate", "-p", "The king", *long],
        "chat": ["chat", *long],
        "show": SHOW,
        "convert": ["convert", str(tiny_model_path()), "-o", str(out / "m.gguf"), "-t", "1", "--high", "Q4_K"],
    }
    seconds = {name: wait_for(commands[name], {"MOE_EDGE_CACHE": str(tmp_path / "c")}) for name in commands}
    for path in out.iterdir():
        path.unlink()
    for _ in range(20):
        name, number = rng.choice(list(commands)), rng.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM))
        after = rng.uniform(0, seconds[name])
        environment = {**os.environ, "MOE_EDGE_CACHE": str(cache)}
        child = subprocess.Popen(
            [MOE_EDGE, *commands[name]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert child.stdin is not None and child.stderr is not None
        child.stdin.write(b"hello\n")
        child.stdin.close()
        time.sleep(after)
        for pause in (0.0, rng.choice((0.001, 0.02)))[: rng.choice((1, 2))]:
            time.sleep(pause)
            child.send_signal(number)
        said = child.stderr.read().decode()
        child.stderr.close()
        status = child.wait(timeout=60)
        what = f"{name} {number.name} after {after:.3f} of {seconds[name]:.3f} s: {status}\n{said}"
        if not before_our_first_line(status, said):
            assert status in (0, 128 + number, -number), what
            assert "Traceback" not in said and "ignored" not in said, what
        left = [p.name for p in tmp_path.rglob("*") if ".part" in p.name or p.name.startswith("core")]
        made = sorted(p.name for p in out.iterdir())
        assert not left and made in ([], ["m.experts.gguf", "m.gguf"]), (what, left, made)
        for path in out.iterdir():
            path.unlink()


@pytest.mark.parametrize("ends", ["start._ignore_interrupts()", "signals.finish()"])
def test_a_signal_that_was_put_off_does_not_end_a_process_that_is_leaving(ends: str) -> None:
    """Python lets go of its handlers at the end: the alarm that brings the signal again would kill it, status -14."""
    code = (
        "import signal, sys, time\nfrom moe_edge.runner import signals, start\nsignals.install()\n"
        f"signals._send_again(signal.SIGINT)\n{ends}\nsignal.signal(signal.SIGALRM, signal.SIG_DFL)\n"
        "time.sleep(0.1)\nsys.exit(130)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 130


def before_our_first_line(status: int, said: str) -> bool:
    """Python itself says Traceback when it is interrupted before it has begun with a program; no line of ours ran."""
    return status in (1, -signal.SIGINT) and "KeyboardInterrupt" in said and not re.search(r'File ".*moe_edge/', said)


def wait_for(arguments: list[str], environment: dict[str, str]) -> float:
    start = time.monotonic()
    subprocess.run(
        [MOE_EDGE, *arguments], input=b"hello\n", capture_output=True, check=True, env={**os.environ, **environment}
    )
    return time.monotonic() - start


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("where", ["weights", "decode"])
def test_a_signal_that_comes_while_c_code_runs_is_not_lost(name: str, status: int, where: str) -> None:
    """It is sent out of one of the callbacks, through which no exception comes out."""
    at = {"weights": "(loading, 'load_llama', 'go_on')", "decode": "(native.NativeModel, '_on_step', None)"}[where]
    code = f"""
import os, signal, sys
from moe_edge.runner import loading, native, start
from moe_edge.runner.cli import main
owner, name, argument = {at}
inner = getattr(owner, name)
def press():
    os.kill(os.getpid(), signal.{name})
def in_callback(*args, **kwargs):
    if argument is None:
        press()
    else:
        asked = kwargs[argument]
        kwargs[argument] = lambda: (press(), asked())[1]
    return inner(*args, **kwargs)
setattr(owner, name, in_callback)
start.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *GENERATE], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
    said = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert done.stderr.splitlines()[-1] == f"moe-edge: {said}"


def test_an_interrupt_while_importing_says_interrupted() -> None:
    """A module that takes its time in the place of click: the interrupt comes while it is imported."""
    code = "import signal, os, sys; os.kill(os.getpid(), signal.SIGINT)"
    run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from moe_edge.runner.start import main; main()"
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "click.py").write_text(code)
        done = subprocess.run(
            [sys.executable, "-c", run, folder, "--help"], capture_output=True, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "moe-edge: interrupted\n")


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As for a background job of a shell."""
    child = subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$0" "$@"', MOE_EDGE, *GENERATE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stderr is not None and child.stderr.readline().startswith(b"memory ")
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and out.strip()


def test_no_core_file_is_written(tmp_path: Path, random_model: Callable[[str], Path]) -> None:
    def allow_cores() -> None:
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    model = alter(random_model("qwen3moe"), tmp_path / "m.gguf", {"qwen3moe.expert_used_count": 9})
    done = subprocess.run(
        [MOE_EDGE, "generate", str(model), *GENERATE[1:]], capture_output=True, check=False, cwd=tmp_path,
        preexec_fn=allow_cores,
    )  # fmt: skip
    assert done.returncode == 1 and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
