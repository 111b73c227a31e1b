"""`moe-edge service`: serve a model from the start of the machine on."""

from __future__ import annotations

import getpass
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from moe_edge.models.errors import BudgetTooSmall, CannotWrite, MissingFile, UsageError
from moe_edge.runner import terminal
from moe_edge.runner.service.unit_facts import Service, closed_to_others
from moe_edge.schedulers.budget import MIB, format_arg

KINDS = ("systemd", "launchd")
_OWN = ("model", "model_option", "ram", "api_key")  # of serve's options, those that are written in another way
PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": True}


@click.group("service")
def command() -> None:
    """Serve a model from the start of the machine on: a systemd unit, or a launchd agent on macOS."""


def _options(f: Any) -> Any:
    for each in reversed([
        click.option("--kind", type=click.Choice(KINDS), help="Default: launchd on macOS, else systemd."),
        click.option("--user/--system", "of_user", default=None, help="Whose service. Default: --system for root."),
        click.option("--name", default="moe-edge", show_default=True, help="What the service is called."),
        click.option("--env-file", type=click.Path(path_type=Path),
                     help="File with lines like MOE_EDGE_API_KEY=..., which only its owner can read."),
        click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [OPTIONS OF serve]..."),
    ]):  # fmt: skip
        f = each(f)
    return f


@command.command("show", context_settings=PASSED_ON)
@_options
def show(**o: Any) -> None:
    """Print the service's file, and touch nothing."""
    terminal.write(_text(_service(o), _kind(o)), end="")


@command.command("install", context_settings=PASSED_ON)
@_options
@click.option("--to", type=click.Path(path_type=Path), help="Folder of the file. Default: where it is looked for.")
@click.option("-y", "--yes", is_flag=True, help="Replace a file that is there without asking.")
def install(to: Path | None, yes: bool, **o: Any) -> None:
    """Write the service's file, and say what starts it."""
    kind, service = _kind(o), _service(o)
    text = _text(service, kind)
    path = (to or _folder(kind, service.of_user)) / _file_name(kind, service.name)
    if path.exists() and not yes and path.read_text(errors="replace") != text:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"{path}: is there already, and differs; --yes replaces it")
        if not click.confirm(f"{path} is there already, and differs. Replace it?", default=False, err=True):
            raise UsageError(f"{path}: left as it is")
    _write(path, text)
    terminal.write(str(path))
    for line in _next(kind, service, path):
        terminal.say(line)


def _kind(o: dict[str, Any]) -> str:
    return str(o["kind"] or ("launchd" if sys.platform == "darwin" else "systemd"))


def _text(service: Service, kind: str) -> str:
    from moe_edge.runner.service.launchd import launchd_agent
    from moe_edge.runner.service.systemd import systemd_unit

    return systemd_unit(service) if kind == "systemd" else launchd_agent(service, Path.home())


def _service(o: dict[str, Any]) -> Service:
    """The service that the arguments of serve describe. Raises what serve would say of them."""
    from moe_edge.runner.commands.serve import command as serve
    from moe_edge.runner.serve.guards import LOOPBACK

    given = [str(each) for each in o["serve_arguments"]]
    context = serve.make_context("moe-edge serve", given, auto_envvar_prefix=None)
    p = context.params
    if context.get_parameter_source("api_key") is ParameterSource.COMMANDLINE:
        raise UsageError(
            "--api-key would stand in a file and a command line that others can read; write MOE_EDGE_API_KEY=... into "
            "a file only its owner can read, and give it with --env-file"
        )
    is_local = p["host"] in LOOPBACK or p["host"].startswith("127.")
    if not is_local and not p["no_api_key"] and o["env_file"] is None:
        raise UsageError(
            f"--host {p['host']} can be reached by other machines: give --env-file with MOE_EDGE_API_KEY=..., or say "
            "--no-api-key to let everybody in"
        )
    env_file = Path(os.path.abspath(o["env_file"])) if o["env_file"] is not None else None
    if env_file is not None and not env_file.is_file():
        raise MissingFile(f"{env_file}: no such file; it holds lines like MOE_EDGE_API_KEY=...")
    model = p["model"] or p["model_option"]
    path = None if model is None else Path(os.path.abspath(model))
    of_user = o["of_user"] if o["of_user"] is not None else _kind(o) == "launchd" or os.geteuid() != 0
    ram = _budget(path, p)
    arguments = ("serve", *_arguments(context, path, ram))
    return Service(o["name"], _program(), arguments, path, ram, is_local, env_file, of_user)


def _budget(path: Path | None, p: dict[str, Any]) -> int:
    """--ram in bytes, at most what the model can use. Raises BudgetTooSmall, and what opening the model raises."""
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.commands.parameters import engine_options
    from moe_edge.runner.memory import auto_budget_bytes
    from moe_edge.runner.sizes import sizes_of

    plan = sizes_of(path or tiny_model_path(), engine_options(p)).plan
    ram = p["ram"]
    if ram is None:
        ram = min(auto_budget_bytes(), plan.resident_bytes)
    if ram < plan.floor_bytes:
        enough = plan.floor_bytes + plan.fixed.program_varies_bytes
        raise BudgetTooSmall(
            f"--ram {format_arg(ram)} is less than this model needs; give --ram {format_arg(enough)} or more", enough
        )
    return int(ram)


def _arguments(context: click.Context, path: Path | None, ram: int) -> list[str]:
    """serve's command line anew, of what was given on it: the model absolute, the budget in numbers."""
    words = [] if path is None else [str(path)]
    for param in context.command.params:
        name = param.name or ""
        if name in _OWN or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for each in value if param.multiple else (value,):
            if not getattr(param, "is_flag", False):
                words += [max(param.opts, key=len), "auto" if each is None else str(each)]
            else:
                words.append(max(param.opts, key=len) if each else param.secondary_opts[0])
    return [*words, "--ram", f"{ram // MIB}MiB"]


def _program() -> tuple[str, ...]:
    """How this program is started, absolute: its console script, or the interpreter that runs it."""
    script = Path(sys.executable).parent / "moe-edge"
    if script.is_file():
        return (str(script.absolute()),)
    found = shutil.which("moe-edge")
    return (os.path.abspath(found),) if found else (os.path.abspath(sys.executable), "-m", "moe_edge.runner.start")


def _folder(kind: str, of_user: bool) -> Path:
    if kind == "launchd":
        return Path.home() / "Library/LaunchAgents"
    if of_user:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd/user"
    return Path("/etc/systemd/system")


def _file_name(kind: str, name: str) -> str:
    from moe_edge.runner.service.launchd import label

    if not name or not name.isascii() or not all(c.isalnum() or c in "._-" for c in name) or name[0] in ".-":
        raise UsageError(f"--name {name!r}: give letters, digits, and . _ - between them")
    return f"{name}.service" if kind == "systemd" else f"{label(name)}.plist"


def _write(path: Path, text: str) -> None:
    from moe_edge.models.formats.work import new_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as part:
            part.write(text.encode())
        path.chmod(0o644)
    except OSError as e:
        way = "; run it with sudo, or give --user" if isinstance(e, PermissionError) else ""
        raise CannotWrite(f"{path}: cannot be written: {e.strerror or e}{way}") from e


def _next(kind: str, service: Service, path: Path) -> list[str]:
    """What to type, and what may be in the way."""
    from moe_edge.runner.measure.boards.finding import COSTS
    from moe_edge.runner.measure.boards.limits import CHECK as LIMITS
    from moe_edge.runner.measure.boards.machine import Machine

    if kind == "launchd":
        return [f"start it: launchctl bootstrap gui/$(id -u) {path}"]
    lines = []
    if service.of_user:
        lines.append(f"start it: systemctl --user daemon-reload && systemctl --user enable --now {service.name}")
        lines.append(f"keep it when nobody is logged in: sudo loginctl enable-linger {getpass.getuser()}")
    else:
        lines.append(f"start it: sudo systemctl daemon-reload && sudo systemctl enable --now {service.name}")
        for what in (Path(service.program[0]), service.model):
            closed = closed_to_others(what) if what is not None else None
            if closed is not None:
                lines.append(
                    f"the service has a user of its own, who may not read {closed}: "
                    f"sudo chmod o+rX {closed}, move {what} to /var/lib, or give --user"
                )
    lines += [f"{each.found}: {each.cost}; {each.mend}" for each in LIMITS.run(Machine()) if each.state == COSTS]
    return lines
