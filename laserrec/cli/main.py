"""The command line: all commands, and how it ends when something goes wrong. torch is imported inside commands."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError
from pydantic import ValidationError

import laserrec
from laserrec.cli.backbone import backbone_app
from laserrec.cli.batch import batch_app
from laserrec.cli.data import prepare
from laserrec.cli.entry import interrupted
from laserrec.cli.fit import distil, fit, pretrain, quickstart, refit
from laserrec.cli.index import index_app
from laserrec.cli.inspect import inspect
from laserrec.cli.knowledge import knowledge
from laserrec.cli.list_settings import settings
from laserrec.cli.reflow import reflow_help
from laserrec.cli.report import report_app
from laserrec.cli.reproduce import reproduce_app
from laserrec.cli.serve import serve_app
from laserrec.cli.share import card, push
from laserrec.cli.use import evaluate, recommend
from laserrec.config import problems
from laserrec.util.errors import UserError

app = App(name="laserrec", version=laserrec.__version__, suppress_keyboard_interrupt=False,
          help_format="plaintext", default_parameter=Parameter(negative_iterable=()),
          help="Sequential recommendation from histories and item texts that a frozen LLM reads. The usual way: "
          "prepare, fit, evaluate, recommend.")
for command in (prepare, fit, refit, pretrain, distil, evaluate, inspect, recommend, quickstart, knowledge, settings,
                push, card, backbone_app, batch_app, index_app, report_app, reproduce_app, serve_app):
    app.command(command)
reflow_help(app)


def main() -> None:
    """Run a command. A user's mistake is one line and exit code 2, anything unexpected one line and exit code 1 (with
    LASERREC_LOG=debug a traceback above it); Ctrl-C tells how to go on and exits with 130. Of several processes
    (torchrun) one alone speaks."""
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning  # ty: ignore[invalid-assignment]
        threading.excepthook = _thread_error
        try:
            _read_environment()
            app(sys.argv[1:], exit_on_error=False, print_error=False)
        except CycloptsError as error:
            _end(_usage(error), 2)
        except UserError as error:
            _end(str(error), 2)
        except (OSError, UnicodeEncodeError) as error:
            if (mistake := _bad_name(error)) is None:
                _end_unexpected(error)
            _end(mistake, 2)
        except KeyboardInterrupt:
            interrupted()
        except Exception as error:
            _end_unexpected(error)


def _usage(error: CycloptsError) -> str:
    """What is wrong with the words of a command, and where to look it up."""
    command = " ".join(("laserrec", *(error.command_chain or ())))
    if isinstance(error.__cause__, ValidationError):
        what = f"settings are not valid: {problems(error.__cause__)}"
    elif isinstance(error, UnusedCliTokensError):
        tokens = error.unused_tokens or []
        what = f"{command} takes no such argument: {' '.join(tokens)}{_switch_hint(tokens)}"
    elif isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        what = f"{name} needs a value" if name in sys.argv else f"{command} needs {name.removeprefix('--').upper()}"
    else:
        what = " ".join(str(error).split()).removesuffix(".").removesuffix(", ..")
    return f"{what}; {command} --help shows what it takes"


def _switch_hint(unused: list[str]) -> str:
    """Where true or false stands behind a switch, how to turn it."""
    if not unused or unused[0].lower() not in ("true", "false") or unused[0] not in sys.argv[1:]:
        return ""
    flag = sys.argv[sys.argv.index(unused[0], 1) - 1]
    section, dot, name = flag.rpartition(".")
    opposite = f", its opposite is {section}.no-{name}" if dot and not name.startswith("no-") else ""
    return f" ({flag} takes no value{opposite})" if flag.startswith("--") else ""


def _read_environment() -> None:
    """LASERREC_LOG, and what torchrun sets. Raises UserError for values that are none."""
    level = os.environ.get("LASERREC_LOG", "warning")
    if level.upper() not in (levels := logging.getLevelNamesMapping()):
        raise UserError(f"LASERREC_LOG is {level!r}; give one of {', '.join(levels).lower()}")
    logging.basicConfig(level=level.upper(), format="%(message)s", force=True)
    losses = logging.INFO if level == "warning" else logging.NOTSET  # small ones are told too, unless a level is given
    logging.getLogger("laserrec.data.losses").setLevel(losses)
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        value = os.environ.get(name, "1")
        if not value.isdecimal() or int(value) < least:
            raise UserError(f"{name} is {value!r}, which is no number of processes; start several with torchrun, or "
                            f"unset {name} to run one")
    if _several() and sys.argv[1:2] != ["fit"]:
        raise UserError("of laserrec's commands only fit runs in several processes; start this one without torchrun "
                        "(or unset WORLD_SIZE)")


def _several() -> bool:
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdecimal() and int(size) > 1


def _end(message: str, code: int) -> NoReturn:
    """Exit with one line on standard error."""
    if _several():
        from laserrec.util.distributed import speaks

        if not speaks():
            sys.exit(code)
    print("error: " + message.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    sys.exit(code)


def _bad_name(error: OSError | UnicodeEncodeError) -> str | None:
    """What is wrong with a name on the command line that no file can have; None if that is not it."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        longest = max(Path(str(error.filename)).parts, key=len)
        return f"no file or folder can have so long a name: {longest[:60]}..."
    if isinstance(error, UnicodeEncodeError) and any(0xD800 <= ord(c) <= 0xDFFF for word in sys.argv for c in word):
        return "an argument holds bytes that are no text in this locale; give names in UTF-8"
    return None


def _end_unexpected(error: Exception) -> NoReturn:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    _end(_unexpected(error), 1)


def _unexpected(error: Exception) -> str:
    """What happened and where, for a report."""
    package = Path(laserrec.__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if package in Path(frame.filename).parents]
    place = f" in {Path(frames[-1].filename).relative_to(package.parent)}:{frames[-1].lineno}" if frames else ""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return (f"unexpected {type(error).__name__}{place}: {first}. Please report this, with the command that you gave; "
            "LASERREC_LOG=debug shows the whole traceback")


def _thread_error(told: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread meets a full disk before its caller does, who then tells it in one line."""
    events = type(told.thread).__module__.startswith("tensorboard.")
    if not (events and isinstance(told.exc_value, OSError)) or logging.getLogger().isEnabledFor(logging.DEBUG):
        threading.__excepthook__(told)


def _print_warning(message: Warning | str, *place: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
