"""What all commands of this program share: their words, their help, their errors, their signals.

A command ends with exit code 0 when it has done what was asked, with 2 after one line on stderr
that says what the user got wrong, and with 128 + n when signal n stopped it. (train.py and
sample.py have a few more; their `main` says which.)
"""

import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from config.schema import FIRST_KNOBS, GROUPS, knobs_of

HELP_WIDTH = 100  # columns of a line of --help
HELP_INDENT = 34  # the column at which the meaning of a knob begins
UNPRINTABLE = dict.fromkeys(
    {
        *range(32),  # C0
        *range(127, 160),  # DEL and C1
        *(0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF),
        *range(0x2028, 0x202F),  # ends of lines and paragraphs, directions
        *range(0x2060, 0x2070),  # invisible operators, directions
        *range(0xFFF9, 0xFFFC),  # annotations
        *range(0xE0000, 0xE0080),  # tags
    }
    - {ord("\t"), ord("\n")}
)


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command line, and its key=value pairs.

    ['config/x.py', 'a=1', '--b=2'] -> (['config/x.py'], {'a': '1', 'b': '2'}). A value may contain
    '='. An argument with a '/' before its first '=' is a word: a path such as out/lr=1. Raises
    ValueError for an option without a value, and for a key that is given twice.
    """
    words, pairs = [], {}
    for argument in argv:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals and argument.startswith("-"):
            raise ValueError(f"{argument} has no value: write {key.lstrip('-')}=VALUE")
        if not equals or "/" in key:
            words.append(argument)
        elif key in pairs:
            raise ValueError(
                f"{key} is given twice on the command line, as {pairs[key]!r} and {value!r}: "
                f"keep one"
            )
        else:
            pairs[key] = value
    return words, pairs


def shell_path(path: Path) -> str:
    """A path as the user can type it after a command: quoted for the shell, and with a '/' in it,
    without which a path could look like a knob, an option or the name of a preset.
    """
    return shlex.quote(str(path) if "/" in str(path) else f"./{path}")


def training_help(usage: str) -> str:
    """--help of a command that trains: `usage`, and every knob of a run in its group."""
    about = (
        f"These are all knobs, with the values that they have where the preset does not set them. "
        f"To begin with, you need only {', '.join(FIRST_KNOBS[:-1])} and {FIRST_KNOBS[-1]}."
    )
    groups = [help_text(f"{group}:", knobs) for group, knobs in GROUPS.items()]
    return "\n\n".join([usage, textwrap.fill(about, HELP_WIDTH), *groups])


def help_text(title: str, knobs: type) -> str:
    """`title`, and below it each knob of the dataclass `knobs`: default, meaning and choices."""
    lines = [title]
    for name, (kind, knob_field) in knobs_of(knobs).items():
        start = f"  {name}={_typed_by_user(knob_field.default)}".ljust(HELP_INDENT - 1)
        line = f"{start} {knob_field.metadata['help']} ({_choices(kind)})"
        lines += textwrap.wrap(
            line, HELP_WIDTH, subsequent_indent=HELP_INDENT * " ", break_on_hyphens=False
        )
    return "\n".join(lines)


def _choices(kind: Any) -> str:
    """'a | b' for a choice of two, 'int' for any whole number, and so on."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if kind is bool:
        choices = (True, False)
    return " | ".join(map(_typed_by_user, choices)) or kind.__name__


def _typed_by_user(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "''" if value == "" else str(value)


def print_help(*texts: str) -> None:
    """Prints the texts with an empty line between them. A reader who leaves before the end, as
    `| head` does, is no error.
    """
    try:
        print(*texts, sep="\n\n", flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, so stdout must lead to something open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: object, most: int = 1500) -> str:
    """The text of an error on one line of at most about `most` characters. Control characters,
    which a file may have put into it, become spaces.
    """
    printable = "".join(c if c.isprintable() else " " for c in str(error))
    text = " ".join(printable.split())
    return text if len(text) <= most else f"{text[: most - 300]} ... {text[-295:]}"


def printable(text: str) -> str:
    """The text without what a terminal would obey or not show: control characters (but not tab and
    newline), and characters that change the direction of text or have no width. What joins letters
    (U+200C, U+200D) stays, because Persian, Hindi and emoji are written with it.
    """
    return text.translate(UNPRINTABLE)


def warn(text: str) -> None:
    """Prints one line on stderr. If stderr cannot be written to, the warning is dropped."""
    with suppress(OSError):
        print(f"warning: {one_line(text)}", file=sys.stderr)


@contextmanager
def user_errors() -> Iterator[None]:
    """Stands around the part of a command in which the user's mistakes show: a wrong knob, a
    missing file, a full disk, a model for which there is not enough memory.

    A ValueError, an OSError or lack of memory becomes one line on stderr and exit code 2;
    `python -X dev` shows the traceback instead. Ctrl-C, SIGTERM and a closed terminal end the
    program at once, with exit code 128 + n: no training is under way that would have to be saved.
    They do it by an exception, so that `with` and `finally` remove what is half made.
    """
    before = catch_signals(exit_on_signal)
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        no_memory = lacks_memory(error)
        if sys.flags.dev_mode or not (no_memory or isinstance(error, (ValueError, OSError))):
            raise
        text = f"not enough memory ({error})" if no_memory else error
        print(f"error: {one_line(text)}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        restore_signals(before)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory. torch says it with a RuntimeError."""
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory")
    of_torch = isinstance(error, (RuntimeError, OSError)) and any(w in str(error) for w in words)
    return isinstance(error, MemoryError) or of_torch


def catch_signals(handler: Callable) -> dict[int, Any]:
    """Has Ctrl-C, SIGTERM and a closed terminal (SIGHUP) call handler(number, frame) from now on.

    A signal that this process ignores, as SIGHUP under nohup, stays ignored. Returns the handlers
    before, for restore_signals.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in caught}


def restore_signals(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def exit_on_signal(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
