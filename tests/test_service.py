"""`moe-edge service`: what it writes is checked by systemd itself, by plistlib, and by starting what it says."""

from __future__ import annotations

import ast
import contextlib
import http.server
import io
import os
import plistlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import MoeEdgeError
from moe_edge.runner import terminal
from moe_edge.runner.cli import main
from moe_edge.runner.service.systemd import systemd_unit
from moe_edge.runner.service.unit_facts import KERNEL_BYTES, Service, closed_to_others
from serving import PATIENCE
from test_memory_limit import Cgroup, cgroup

__all__ = ["cgroup"]
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "examples" / "docker"
SMALL = ("--ram", "64MiB", "-c", "512", "-t", "1")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None and not (os.environ.get("CI") and sys.platform == "linux"),
    reason="no systemd-analyze; `make units` installs it where that is possible",
)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def call(*arguments: str) -> Done:
    """`moe-edge service` with these arguments, in this process: a process of its own takes a second each."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            main(["service", *arguments], standalone_mode=False)
            status = 0
        except click.ClickException as error:
            status = error.exit_code
        except MoeEdgeError as error:
            terminal.complain(error)
            status = error.exit_status
    return Done(status, out.getvalue(), said.getvalue())


def shown(*arguments: str) -> str:
    done = call("show", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def field(unit: str, name: str) -> str:
    found = re.findall(rf"^{name}=(.*)$", unit, re.M)
    assert len(found) == 1, (name, found)
    return str(found[0])


def words(unit: str) -> list[str]:
    """ExecStart as systemd would start it, for words without backslashes."""
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(field(unit, "ExecStart"))]


def analyze(*arguments: str, unit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "moe-edge.service"
    path.write_text(unit)
    return subprocess.run(
        ["systemd-analyze", *arguments, str(path)], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"SYSTEMD_COLORS": "0", "XDG_RUNTIME_DIR": str(folder)},
    )  # fmt: skip


# ---- systemd ------------------------------------------------------------------------------------------------


@needs_systemd
def test_systemd_finds_no_fault_and_little_exposure(tmp_path: Path) -> None:
    """1.3 of 10, counted by systemd 252; the same unit for the network, 2.0 at the most."""
    unit = shown("--kind", "systemd", "--system", *SMALL)
    checked = analyze("verify", "--man=no", unit=unit, folder=tmp_path)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    assert analyze("security", "--offline=yes", "--threshold=15", unit=unit, folder=tmp_path).returncode == 0
    open_to_all = shown("--kind", "systemd", "--system", *SMALL, "--host", "0.0.0.0", "--no-api-key")
    assert "IPAddressDeny" not in open_to_all and "network-online.target" in open_to_all
    assert analyze("security", "--offline=yes", "--threshold=20", unit=open_to_all, folder=tmp_path).returncode == 0
    without = re.sub(r"^(Protect|Private|SystemCall|Restrict|Capab).*\n", "", unit, flags=re.M)
    assert analyze("security", "--offline=yes", "--threshold=20", unit=without, folder=tmp_path).returncode != 0


@needs_systemd
def test_a_unit_of_a_user_has_nothing_that_takes_privileges(tmp_path: Path) -> None:
    unit = shown("--kind", "systemd", "--user", *SMALL)
    checked = analyze("--user", "verify", "--man=no", unit=unit, folder=tmp_path)
    assert "moe-edge.service" not in checked.stdout + checked.stderr
    assert field(unit, "WantedBy") == "default.target"
    for name in ("DynamicUser", "CapabilityBoundingSet", "ProtectSystem", "PrivateDevices", "IPAddressDeny"):
        assert name not in unit
    assert field(unit, "NoNewPrivileges") == "yes"


@needs_systemd
def test_names_with_blanks_signs_and_quotes_come_through(tmp_path: Path) -> None:
    model = tmp_path / 'a b%n $HOME "q" \\x;.gguf'
    shutil.copy(tiny_model_path(), model)
    unit = shown("--kind", "systemd", "--system", str(model), *SMALL, "--alias", "%i $PATH")
    checked = analyze("verify", "--man=no", unit=unit, folder=tmp_path)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    script = 'import sys; print(sys.argv[1:])'
    service = Service("x", (sys.executable, "-c"), (script, str(model), "%i $PATH"), model, MIB, True)
    line = field(systemd_unit(service), "ExecStart")
    assert '%%i $$PATH' in line and '\\"q\\" \\\\x;' in line and "b%%n $$HOME" in line


def test_the_budget_is_a_number_and_the_limits_are_what_it_takes() -> None:
    unit = shown("--kind", "systemd", "--system", "--ram", "100MiB", "-c", "512")
    assert (field(unit, "MemoryHigh"), field(unit, "MemorySwapMax")) == ("164M", "0")
    assert field(unit, "MemoryMax") == f"{164 + 1 + KERNEL_BYTES // MIB}M"  # 100 MiB have 0.2 MiB of page tables
    automatic = shown("--kind", "systemd", "--system", "-c", "512")
    ram = words(automatic)[words(automatic).index("--ram") + 1]
    assert re.fullmatch(r"\d+MiB", ram)
    assert int(ram[:-3]) < 200  # not more than the model can use
    refused = call("show", "--ram", "1MiB")
    assert refused.returncode == 2 and "than this model needs; give --ram" in refused.stderr


def test_options_of_serve_come_through_and_wrong_ones_are_refused() -> None:
    given = ("--temp", "0.5", "--cors", "http://a", "--cors", "http://b", "--no-flash-attn", "--warm-start",
             "--port", "81")  # fmt: skip
    found = words(shown("--kind", "systemd", *SMALL, *given))
    assert Path(found[0]).is_absolute() and found[1] == "serve"
    text = " ".join(found)
    for part in ("--cors http://a --cors http://b", "--no-flash-attn", "--warm-start", "--port 81", "--temp 0.5"):
        assert part in text
    assert call("show", "--bogus").returncode == 2
    assert call("show", "/nonexistent/model.gguf").returncode == 1


def test_a_key_never_stands_in_the_file(tmp_path: Path) -> None:
    refused = call("show", "--api-key", "sesame", *SMALL)
    assert refused.returncode == 2 and "--env-file" in refused.stderr and "sesame" not in refused.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_EDGE_API_KEY", "sesame")
        assert "sesame" not in shown("--kind", "systemd", *SMALL)
    assert call("show", "--host", "0.0.0.0", *SMALL).returncode == 2
    keys = tmp_path / "keys"
    assert call("show", "--env-file", str(keys), *SMALL).returncode == 1
    keys.write_text("MOE_EDGE_API_KEY=sesame\n")
    unit = shown("--kind", "systemd", "--env-file", str(keys), "--host", "0.0.0.0", *SMALL)
    assert field(unit, "EnvironmentFile") == str(keys)


def test_what_the_unit_starts_becomes_ready_within_its_limit(cgroup: Cgroup, tmp_path: Path) -> None:
    """The command of ExecStart, under MemoryMax, tells whom systemd would listen with that it is ready, and ends."""
    unit = shown("--kind", "systemd", "--system", "--ram", "64MiB", "-c", "512", "-t", "1", "--port", "0")
    cgroup.limit(int(field(unit, "MemoryMax")[:-1]) * MIB)

    def enter() -> None:
        (cgroup.folder / "cgroup.procs").write_text(str(os.getpid()))

    _starts(words(unit), tmp_path, {}, enter)


def _starts(
    command: list[str], folder: Path, environment: dict[str, str], enter: Callable[[], None] | None = None
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(str(folder / "n"))
        there.settimeout(PATIENCE)
        child = subprocess.Popen(
            command, stderr=subprocess.PIPE, preexec_fn=enter,
            env=os.environ | {"NOTIFY_SOCKET": str(folder / "n"), "MOE_EDGE_CACHE": str(folder / "c")} | environment,
        )  # fmt: skip
        try:
            assert there.recv(100) == b"READY=1"
            child.send_signal(signal.SIGTERM)
            _, said = child.communicate(timeout=PATIENCE)
            assert child.returncode == 0, said.decode()
        finally:
            child.kill()
            child.communicate()


# ---- launchd ------------------------------------------------------------------------------------------------


def test_a_launchd_agent_reads_back_and_starts(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("MOE_EDGE_API_KEY=a-key\n")
    text = shown("--kind", "launchd", "--env-file", str(keys), *SMALL, "--alias", "<&>", "--port", "0")
    agent = plistlib.loads(text.encode())
    assert agent["Label"] == "io.github.moe-edge.moe-edge"
    assert (agent["RunAtLoad"], agent["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert agent["ProcessType"] == "Interactive"
    assert "<&>" in agent["ProgramArguments"] and "a-key" not in text
    assert plistlib.loads(plistlib.dumps(agent)) == agent
    _starts(agent["ProgramArguments"], tmp_path, {})
    plain = plistlib.loads(shown("--kind", "launchd", *SMALL).encode())
    assert Path(plain["ProgramArguments"][0]).is_absolute() and plain["ProgramArguments"][1] == "serve"


# ---- install ------------------------------------------------------------------------------------------------


def test_install_writes_asks_and_says_what_comes_next(tmp_path: Path) -> None:
    to = ("--to", str(tmp_path / "units"))
    first = call("install", "--kind", "systemd", "--system", *to, *SMALL)
    path = tmp_path / "units/moe-edge.service"
    assert (first.returncode, first.stdout.strip()) == (0, str(path)), first.stderr
    assert "sudo systemctl daemon-reload && sudo systemctl enable --now moe-edge" in first.stderr
    text = path.read_text()
    assert text == shown("--kind", "systemd", "--system", *SMALL)
    assert call("install", "--kind", "systemd", "--system", *to, *SMALL).returncode == 0  # the same again
    other = call("install", "--kind", "systemd", "--system", *to, *SMALL, "--port", "9090")
    assert other.returncode == 2 and "--yes replaces it" in other.stderr and path.read_text() == text
    assert call("install", "--kind", "systemd", "--user", *to, "--yes", *SMALL, "--port", "9090").returncode == 0
    assert "--port 9090" in path.read_text()
    agent = call("install", "--kind", "launchd", "--name", "tiny", *to, *SMALL)
    assert "launchctl bootstrap gui/$(id -u)" in agent.stderr
    assert plistlib.loads((tmp_path / "units/io.github.moe-edge.tiny.plist").read_bytes())["Label"].endswith("tiny")
    assert call("install", "--name", "../x", *to, *SMALL).returncode == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("install", "--kind", "systemd", "--to", str(tmp_path / "file"), *SMALL)
    assert done.returncode == 1 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_who_may_not_read_the_model_is_told(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    model = home / "m.gguf"
    shutil.copy(tiny_model_path(), model)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(folder, 0o755)
    outside = closed_to_others(tmp_path)
    model.chmod(0o600)
    assert closed_to_others(model) == outside or model
    home.chmod(0o700)
    assert closed_to_others(model) == outside or home
    if outside is None:
        assert closed_to_others(model) == home
    done = call("install", "--kind", "systemd", "--system", "--to", str(tmp_path / "u"), str(model), *SMALL)
    assert "a user of its own, who may not read" in done.stderr


# ---- the image ----------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.exists():
        assert sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"), "make setup installs it"
        pytest.skip("hadolint has no package for this machine")
    done = subprocess.run([linter, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_nobody_special_and_what_it_starts_is_a_call_of_ours() -> None:
    found = instructions()
    last = found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]
    by_name = {name: value for name, value in last}
    assert by_name["USER"].isdigit() and int(by_name["USER"]) >= 1000
    assert ast.literal_eval(by_name["VOLUME"]) == ["/models", "/cache"]
    from moe_edge.runner.commands.serve import command

    arguments = ast.literal_eval(by_name["CMD"])
    assert ast.literal_eval(by_name["ENTRYPOINT"]) == ["moe-edge"] and arguments[0] == "serve"
    parsed = command.make_context("serve", arguments[1:])
    assert (parsed.params["port"], parsed.params["host"]) == (int(by_name["EXPOSE"]), "0.0.0.0")
    for name in [line for name, line in found if name == "COPY" and "--from" not in line]:
        assert name == ". ."
    kept = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert all((ROOT / name).exists() for name in kept) and {"pyproject.toml", "native", "runner"} <= set(kept)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_its_health_check_tells_a_server_that_is_ready_from_one_that_loads(status: int, healthy: bool) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    check = next(value for name, value in instructions() if name == "HEALTHCHECK")
    command = ast.literal_eval(check.split(" CMD ", 1)[1])
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        command[-1] = command[-1].replace(":8080/", f":{server.server_address[1]}/")
        done = subprocess.run([sys.executable, *command[1:]], capture_output=True, timeout=60, check=False)
    assert (done.returncode == 0) == healthy
