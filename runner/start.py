"""Where the command line begins and ends: nothing but a result, or one sentence, comes out of it.

Only the standard library's smallest parts are imported before the first `try`: Ctrl-C may come at any moment, also
while the rest is imported.
"""

import _signal  # type: ignore[import-not-found]  # the part of `signal` that is in the interpreter
import os
import sys

TRACEBACK = "MOE_EDGE_TRACEBACK"  # in the environment: show where a fault of our own happened
INTERRUPTED = 130


def main() -> None:
    """The console script."""
    try:
        from moe_edge.runner import signals

        signals.install()
        from moe_edge.runner.cli import main as command
    except KeyboardInterrupt:
        _ignore_interrupts()
        _leave(INTERRUPTED, "interrupted")
    run(command)


def run(command: object) -> None:
    """Run a click command with the arguments of the process, and end the process with its status."""
    try:
        from moe_edge.runner import signals

        signals.install()
        status, said = _outcome(command)
        signals.finish()
    except KeyboardInterrupt:
        _ignore_interrupts()
        status, said = INTERRUPTED, "interrupted"
    _leave(status, said)


def _ignore_interrupts() -> None:
    """At once: the module `signal` itself may be what was interrupted as it was imported.

    One that was put off (signals._send_again) is given up: its alarm would end a process that has let go of handlers.
    """
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    _signal.setitimer(_signal.ITIMER_REAL, 0)


def _outcome(command: object) -> tuple[int, str]:
    """(exit status, what to say) of a command, its output written out."""
    from moe_edge.models.errors import MoeEdgeError, UnknownArchitecture
    from moe_edge.runner import terminal

    terminal.open_streams()
    try:
        status, said = _called(command)
        sys.stdout.flush()
        return status, said
    except BrokenPipeError:  # who read our output has what they wanted
        return 1, ""
    except UnknownArchitecture as e:
        from moe_edge.runner.llama import explained

        return e.exit_status, str(explained(e))
    except MoeEdgeError as e:
        return e.exit_status, str(e)
    except MemoryError:
        return 1, "memory ran out; try a smaller --ram, --ctx-size or --ubatch-size"
    except OSError as e:  # what reads and writes files raises our own errors; what was forgotten is a sentence too
        return 1, f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except Exception as e:
        if os.environ.get(TRACEBACK):
            raise
        return 1, _our_fault(e)
    finally:
        terminal.drop_output()


def _called(command: object) -> tuple[int, str]:
    import click

    try:
        value = command.main(prog_name="moe-edge", standalone_mode=False)  # type: ignore[attr-defined]
    except click.exceptions.Abort:  # click's name for Ctrl-C
        return INTERRUPTED, "interrupted"
    except click.ClickException as e:
        return _wrong_call(e)
    except SystemExit as e:
        value = e.code
    status = value if isinstance(value, int) else 0
    return status, _of_status(status)


def _of_status(status: int) -> str:
    """A command returns a status above 128 when a signal ended it (runner/signals.py)."""
    if status <= 128:
        return ""
    from signal import SIGINT, Signals

    return "interrupted" if status == 128 + SIGINT else f"ended by {Signals(status - 128).name}"


def _wrong_call(error: object) -> tuple[int, str]:
    """Click's own words for a call it cannot parse: usage, and what is wrong."""
    import io

    from moe_edge.runner import terminal

    said = io.StringIO()
    error.show(file=said)  # type: ignore[attr-defined]
    terminal.say(said.getvalue().rstrip("\n"))
    return error.exit_code, ""  # type: ignore[attr-defined]


def _our_fault(error: Exception) -> str:
    """A fault of moe-edge itself, as one sentence that can be reported."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f" at {os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}" if at is not None else ""
    return (
        f"this is a fault of moe-edge, please report it: {type(error).__name__}{where}: {error}; "
        f"{TRACEBACK}=1 shows more"
    )


def _leave(status: int, said: str) -> None:
    """End the process. `said` goes to standard error, if that takes it."""
    try:
        if said:
            from moe_edge.runner import terminal

            terminal.complain(said)
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


if __name__ == "__main__":
    main()
