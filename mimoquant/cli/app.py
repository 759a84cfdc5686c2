"""Verbs: parse, call, print, exit code.

Key idea: stdout carries data (text, or one JSON document with --json), stderr everything else. Errors become one
sentence, a hint and an exit code in one place. Nothing heavy is imported before a verb runs, so --help is instant.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mimoquant.__version__ import __version__
from mimoquant.assembly.files import at_home
from mimoquant.cli.eval_draft import eval_draft
from mimoquant.cli.eval_kl import eval_kl
from mimoquant.cli.sensitivity import sensitivity
from mimoquant.cli.terminal import INTERRUPTED, RESUMABLE, open_streams, say, tell
from mimoquant.cli.verbs import inspect, launch, plan, quantize, relayout, synth, verify
from mimoquant.errors import MimoquantError, StoppedError, UsageError, is_disk_trouble, is_out_of_memory
from mimoquant.machine.team import refuse_ranks

EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # what a shell calls the end of a program whose reader has left
LIBRARIES = ("torch", "triton", "numba", "numpy", "safetensors", "tokenizers")
OPTIONAL = ("transformers", "datasets", "compressed-tensors", "llmcompressor")
_RESUMABLE_VERBS = ("quantize", "relayout")  # the others note on the interrupt when they are
_SHARED_VERBS = ("quantize", "eval-kl", "eval-draft", "sensitivity")  # among ranks


class _Group(TyperGroup):
    """Turns errors and interrupts into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        signal.signal(signal.SIGTERM, _raise_interrupt)
        # A plan is some 10^5 small objects that all live to the end; at the default threshold the collector would
        # walk over them hundreds of times (a third of the time that planning takes).
        gc.set_threshold(100_000, 20, 100)
        try:
            return super().invoke(ctx)
        except MimoquantError as error:
            if not error.told:
                tell(f"error: {error}")
            if error.hint and not error.told:
                tell(f"hint: {error.hint}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            tell(INTERRUPTED)
            if ctx.invoked_subcommand in _RESUMABLE_VERBS or RESUMABLE in getattr(interrupt, "__notes__", ()):
                tell(f"hint: {RESUMABLE}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            _silence()
            raise typer.Exit(EXIT_NO_READER) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            tell(f"error: out of memory ({str(error).partition(chr(10))[0]})")
            if ctx.invoked_subcommand == "quantize":
                tell("hint: go on with --resume where there is more; fewer --sequences need less, plan says how much")
            raise typer.Exit(4) from None
        except UnicodeEncodeError as error:  # of a name on disk; what is printed or written holds any
            tell(f"error: {ascii(error.object)[:200]}: is no name of a file in the encoding {error.encoding}")
            tell("hint: with LC_ALL=C.UTF-8 names may hold any character")
            raise typer.Exit(2) from None
        except OSError as error:
            # what no module foresaw: a path too long, a folder that may not be entered, a full disk under stdout
            where = f"{error.filename}: " if error.filename else ""
            tell(f"error: {where}{error.strerror or error}")
            raise typer.Exit(4 if is_disk_trouble(error) else 2) from None


def _raise_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _silence() -> None:
    """Let what is still in the streams' buffers go nowhere, rather than fail a second time while Python ends."""
    for stream in (sys.stdout, sys.stderr):
        if stream:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Verb(TyperCommand):
    """A verb, none of whose arguments may be empty: `""`, a variable that is not set, would be the current folder. Nor
    may a short option have `=`, which would begin its value: a folder named `=`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if odd := next((word for word in args if word[:1] == "-" and word[1:2].isalpha() and word[2:3] == "="), None):
            raise UsageError(f"{odd}: a short option has no = before its value", hint=f"write {odd[:2]} {odd[3:]}")
        if "" in args or any(word.startswith("--") and word.endswith("=") for word in args):
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in self.get_params(ctx):
                value = given.get(parameter.name)
                if value == "" or (isinstance(value, list | tuple) and "" in value):
                    argument = parameter.param_type_name == "argument"
                    name = (parameter.metavar or parameter.name) if argument else parameter.opts[0]
                    raise UsageError(
                        f"{name} is empty", hint="is a variable of the shell not set? . is the current folder"
                    )
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="4-bit MiMo-V2 checkpoints: streamed, exact, proven. Only the routed experts are quantized.",
)


def version_text() -> str:
    """One `name version` a line, as a bug report needs it; libraries that are not needed only where they are there."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"mimoquant": __version__, "python": platform.python_version()}
    for name in (*LIBRARIES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return "\n".join(f"{name} {number}" for name, number in found.items())


def _version(wanted: bool) -> None:
    if wanted:
        say(version_text())
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the versions of mimoquant and its libraries."
        ),
    ] = False,
) -> None:
    if ctx.invoked_subcommand not in _SHARED_VERBS:
        refuse_ranks(str(ctx.invoked_subcommand))


for verb in (inspect, plan, quantize, relayout, verify, launch):
    app.command(cls=_Verb)(at_home(verb))
app.command("eval-kl", cls=_Verb)(at_home(eval_kl))
app.command(cls=_Verb)(at_home(sensitivity))
app.command("eval-draft", cls=_Verb)(at_home(eval_draft))
app.command(cls=_Verb)(at_home(synth))


def main() -> None:
    """The console script."""
    # Read when torch is loaded: its threads then sleep between two products. They would spin, on cores that our own
    # threads, or another program's, have work for: three times the processor time on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    open_streams()
    try:
        app()
    except BrokenPipeError:
        _silence()
        sys.exit(EXIT_NO_READER)
    except (StoppedError, OSError) as error:  # of --help and --version, which are no verbs
        tell(f"error: {error if isinstance(error, StoppedError) else f'stdout: cannot be written ({error.strerror})'}")
        sys.exit(StoppedError.exit_code)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # of --help and its like: typer makes 1 of it, a bug's code
            _silence()
            sys.exit(EXIT_NO_READER)
        raise
    except KeyboardInterrupt:  # before the verb had begun, or a second time while the first was being told
        sys.exit(EXIT_INTERRUPTED)
    finally:
        gc.freeze()  # the interpreter looks through all objects that are left when it ends: .3 s
