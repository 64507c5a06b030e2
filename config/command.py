"""What all programs of this repository share: their words, their output, errors and signals.

A program ends with exit code 0 when it has done what was asked, with 1 when the disk or the data
failed meanwhile, with 2 after one line on stderr that says what the user got wrong, and with
128 + n when signal n stopped it. (train.py and sample.py also end with 3; their `main` says when.)

This file must not import torch, which takes seconds: every program imports it first, for `start`.

Reading order: the words of a command line; how a program starts and ends; errors; signals.
"""

import errno
import gc
import io
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

_at_start: tuple[float, float, float] | None = None  # see free_cores
PACKAGES = ("torch", "numpy", "sentencepiece", "tiktoken", "tqdm")  # those of requirements.txt
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
    '='. An argument with a '/' before its first '=' (or a backslash, on Windows) is a word: a path
    such as out/lr=1. A word's ~ becomes the user's home. Raises ValueError for an option without a
    value, and for a key that is given twice.
    """
    words, pairs = [], {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals and argument.startswith("-"):
            raise ValueError(f"{argument} has no value: write {key.lstrip('-')}=VALUE")
        if not equals or names_folder(key):
            words.append(expand_home(argument))
            continue
        key = key.lstrip("-")
        if key in pairs:
            raise ValueError(
                f"{key} is given twice on the command line, as {pairs[key]!r} and {value!r}: "
                f"keep one"
            )
        pairs[key] = value
    return words, pairs


def names_folder(text: str) -> bool:
    """Whether a text has what ends a folder in a path: '/', or on Windows also a backslash."""
    return "/" in text or os.sep in text


def expand_home(path: str) -> str:
    """The path with the folder of the user for its ~ or ~NAME. ValueError if there is none."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        user = path[1:].partition("/")[0]
        raise ValueError(f"{path}: there is no user {user!r}; a folder of this name is ./{path}")
    return expanded


def shell_path(path: Path) -> str:
    """A path as the user can type it after a command: quoted for the shell, and with a '/' in it
    and no '-' before it, so that it cannot look like a knob, an option or the name of a preset.
    """
    as_typed = path.as_posix()  # Windows reads a '/', too; a backslash would be quoted
    ambiguous = "/" not in as_typed or as_typed.startswith("-")
    return shlex.quote(f"./{as_typed}" if ambiguous else as_typed)


class Output(io.TextIOWrapper):
    """stdout or stderr, to which a program can print whatever happens behind it.

    A character that the encoding does not have is replaced. If the reader of a pipe has gone or a
    disk is full, `fault` says so, and from then on everything that is printed goes nowhere: the
    work of the program is worth more than what it says of it.
    """

    fault: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # What is still in the buffer is flushed again later, so the stream must lead somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        self.fault = self.fault or error
        if self is sys.stdout and not reader_left(self):
            told = f"error: standard output failed, so nothing more is printed: {error}"
            print(one_line(told), file=sys.stderr)


def reader_left(stream: TextIO) -> bool:
    """Whether whoever read the stream has gone: `| head` has ended, or the terminal is closed."""
    fault = getattr(stream, "fault", None)
    # Windows says EINVAL of a pipe that nobody reads.
    return fault is not None and fault.errno in (errno.EPIPE, errno.EIO, errno.EINVAL)


def free_cores() -> float:
    """The mean number of cores that other programs have left free since start(), of those that this
    process may use. inf where nobody can say: start() was not called, the system is not Linux, or a
    sandbox hides it."""
    began, now = _at_start, _processor_seconds()
    if began is None or now is None or began[0] == now[0]:
        return math.inf
    clock, free, ours = (after - before for before, after in zip(began, now, strict=True))
    return (free + ours) / clock


def _processor_seconds() -> tuple[float, float, float] | None:
    """Seconds of the clock; those in which the cores that this process may use had nothing to do,
    added up; and those in which they worked for this process. None where nobody can say."""
    try:
        lines = map(str.split, Path("/proc/stat").read_text().splitlines())
        numbers = {name: numbers for name, *numbers in lines}
        cores = [numbers[f"cpu{i}"] for i in os.sched_getaffinity(0)]
        # Idle, waiting for a disk, and stolen by a virtual machine's host, which would not give it
        # back to fewer threads.
        free = sum(int(core[i]) for core in cores for i in (3, 4, 7)) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, LookupError):
        return None
    return time.monotonic(), free, sum(os.times()[:4])


def start() -> None:
    """Every program calls this first, before it imports torch.

    From here on, Ctrl-C ends it without a traceback, and no output fails. A package that is missing
    ends it with exit code 2 and one line, because it is usually another Python that has them all.
    So does a folder for data sets (see data.DATA) that would be another one in every folder.
    """
    global _at_start
    _at_start = _processor_seconds()
    gc.disable()  # until run_command: imports make a million objects and no garbage
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # it is closed, so the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0)
    sys.stdout = _as_output(sys.stdout or open(1, "w"), "replace")
    sys.stderr = _as_output(sys.stderr or open(2, "w"), "backslashreplace")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        print(
            f"error: {sys.executable} has no {', '.join(missing)}: write .venv/bin/python instead "
            f"of python (make train makes .venv), or pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)
    place = os.environ.get("ROOTLLAMA_DATA")
    if place is not None and not os.path.isabs(place):
        told = f"error: ROOTLLAMA_DATA is {place!r}: make it the absolute path of a folder"
        print(one_line(told), file=sys.stderr)
        sys.exit(2)


def _exit_at_once(number: int, frame: Any) -> None:
    os._exit(128 + number)  # there is nothing to save or to remove yet


def _as_output(stream: TextIO, errors: str) -> Output:
    settings = {
        name: getattr(stream, name) for name in ("encoding", "line_buffering", "write_through")
    }
    return Output(stream.detach(), errors=errors, **settings)


def run_command(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Calls main(argv) and returns the exit code of the process.

    After the work was done, it is 1 if the output did not reach its disk. A reader who has left, as
    `| head` does, is no error. A signal that was met as an exception ends the process here: its
    usual end would wait until the C++ compilers are done that torch.compile has started.
    """
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = False
    gc.freeze()  # what was imported stays, so no collection need look at it
    gc.enable()
    try:
        code = main(argv)
    except KeyboardInterrupt:
        code, interrupted = 128 + signal.SIGINT, True
    except SystemExit as ended:
        code = ended.code or 0
        interrupted = code > 128
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error) or sys.flags.dev_mode:
            raise
        print(f"error: not enough memory ({one_line(error)})", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # else Python looks through all objects again before it ends: half a second
    if interrupted:
        os._exit(code)
    output_failed = getattr(sys.stdout, "fault", None) and not reader_left(sys.stdout)
    return 1 if code == 0 and output_failed else code


def one_line(error: object, most: int = 1500) -> str:
    """The text of an error on one line of at most about `most` characters. Control characters,
    which a file may have put into it, become spaces.
    """
    printable = "".join(c if c.isprintable() else " " for c in str(error))
    text = " ".join(printable.split())
    return text if len(text) <= most else f"{text[: most - 300]} ... {text[-295:]}"


def counted(number: int, words: str) -> str:
    """'1 hidden file', or '2 hidden files': the number of what 'hidden file*' names."""
    return f"{number:,} {words.replace('*', '' if number == 1 else 's')}"


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
    """Has Ctrl-C, SIGTERM and a closed terminal call handler(number, frame) from now on.

    A signal that this process ignores, as SIGHUP under nohup, stays ignored. Returns the handlers
    before, for restore_signals.
    """
    # A closed terminal is SIGHUP, on Windows SIGBREAK; no system has both.
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in caught}


def restore_signals(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def exit_on_signal(number: int, frame: Any) -> None:
    warnings.simplefilter("ignore")  # torch.compile, if it is broken off, warns with a traceback
    raise SystemExit(128 + number)
