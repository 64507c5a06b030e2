"""What all commands share: words, help, and the one line for an error."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

from config.command import counted, run_command, split_arguments, user_errors
from config.help import help_text, training_help
from config.schema import FIRST_KNOBS, GROUPS, Config, knobs_of
from model import ModelConfig
from sample import SampleOptions

KNOBS = knobs_of(Config, ModelConfig)


@pytest.mark.parametrize(
    "argv, words, pairs",
    [
        (["x.py", "a=1", "--b=2"], ["x.py"], {"a": "1", "b": "2"}),
        (["a=b=c", "--d=e", "f="], [], {"a": "b=c", "d": "e", "f": ""}),
        (["out/lr=1", "a=b/c", "./x=2"], ["out/lr=1", "./x=2"], {"a": "b/c"}),
    ],
)
def test_a_command_line_is_words_and_pairs(argv, words, pairs):
    assert split_arguments(argv) == (words, pairs)


def test_one_of_something_is_not_called_several():
    assert [counted(n, "block*") for n in (0, 1, 1200)] == ["0 blocks", "1 block", "1,200 blocks"]


def test_every_knob_is_in_one_group_of_the_help_with_default_meaning_and_choices():
    text = training_help("usage")
    assert max(map(len, text.splitlines())) <= 100
    usage, about, *groups = text.split("\n\n")
    assert usage == "usage" and all(name in about for name in FIRST_KNOBS)
    assert len(FIRST_KNOBS) == 12 and KNOBS.keys() >= set(FIRST_KNOBS)
    assert [group.splitlines()[0] for group in groups] == [f"{name}:" for name in GROUPS]
    shown = [line for group in groups for line in group.splitlines() if line[2:3].strip()]
    names = [line.partition("=")[0].strip() for line in shown if line.startswith("  ")]
    assert len(names) == len(set(names)) and set(names) == KNOBS.keys()
    for name, (_, knob_field) in KNOBS.items():
        assert f" {name}=" in text and knob_field.metadata["help"] in " ".join(text.split())
    for line in (
        "  n_layer=6                       number of Blocks (int)",
        "  qk_norm=false ",
        "(true | false)",
        "  resume=no ",
        "  sample_prompt='' ",
        "(adamw | muon)",
        "(auto | true | false)",
    ):
        assert line in text


def test_the_help_of_one_dataclass_has_no_groups():
    first, *lines = help_text("usage", SampleOptions).splitlines()
    assert first == "usage" and lines[0].startswith("  prompt=''")
    assert max(map(len, lines)) <= 100 and not any(line.endswith(":") for line in lines)


# Starts and ends as every program does, which tests/test_repo.py sees to. Its work is a file.
PROGRAM = """
import sys, time
from config.command import start, run_command
start()
print("importing", file=sys.stderr, flush=True)
time.sleep(float(sys.argv[1]))
def main(argv):
    print("\u4e2d \xe9 a" + 9999 * ".", flush=True)
    print("more")
    open(sys.argv[2], "w").write("done")
    return 0
sys.exit(run_command(main, sys.argv[1:]))
"""


def start_program(tmp_path, seconds=0.0, **options):
    words = [sys.executable, "-c", PROGRAM, str(seconds), str(tmp_path / "work")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(words, cwd=ROOT, **pipes | options)


def test_the_garbage_collector_looks_at_nothing_that_was_imported_and_at_nothing_in_the_end():
    code = (
        "import gc; from config.command import start, run_command; start()\n"
        "print(gc.isenabled())\n"
        "def main(argv):\n"
        "    global more\n"
        "    more = [[] for _ in range(10_000)]\n"
        "    print(gc.isenabled(), 0 < gc.get_freeze_count() < 10_000)\n"
        "run_command(main, []); print(gc.get_freeze_count() > 10_000)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT).decode()
    assert printed.split() == ["False", "True", "True", "True"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_the_output_cannot_hold_is_replaced(tmp_path, encoding):
    program = start_program(tmp_path, env=os.environ | {"PYTHONIOENCODING": encoding})
    output, errors = program.communicate()
    assert program.returncode == 0 and errors == b"importing\n"
    assert output.startswith("\u4e2d \xe9 a".encode(encoding, "replace"))


@pytest.mark.parametrize("name, code", [("closed", 0), ("gone", 0), ("full", 1)])
def test_the_work_is_done_whatever_becomes_of_the_output(tmp_path, name, code):
    """`>&-`, `| true` and a full disk. Only the last one loses what was to be kept."""
    full = open("/dev/full", "w")
    options = {
        "closed": {"preexec_fn": lambda: os.close(1)},
        "gone": {},
        "full": {"stdout": full},
    }[name]
    with full, start_program(tmp_path, **options) as program:
        if program.stdout:
            program.stdout.close()
        errors = program.stderr.read().decode()
    assert (program.returncode, (tmp_path / "work").read_text()) == (code, "done"), errors
    lines = errors.splitlines()[1:]
    assert len(lines) == code and all("No space left on device" in line for line in lines)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_lack_of_memory_in_the_middle_of_the_work_is_one_line(capsys, error):
    def main(argv):
        raise error

    assert run_command(main, []) == 1
    assert capsys.readouterr().err == f"error: not enough memory ({error})\n"


def test_ctrl_c_while_a_program_imports_ends_it_without_a_traceback(tmp_path):
    program = start_program(tmp_path, seconds=60)
    assert program.stderr.readline() == b"importing\n"
    program.send_signal(signal.SIGINT)
    output, errors = program.communicate()
    assert (program.returncode, output, errors) == (130, b"", b"")


def test_a_python_without_the_packages_is_named_with_the_way_out():
    code = "from config.command import start; start()"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append('.'); {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {sys.executable} has no torch, numpy, sentencepiece, tiktoken, tqdm: write "
        f".venv/bin/python instead of python (make train makes .venv), or pip install -r "
        f"requirements.txt\n"
    )


@pytest.mark.parametrize(
    "said, shown",
    [
        ("a\nb\x1b]0;x\x07\u202e\ud800c", "a b ]0;x c"),
        ("x" * 9999, "x" * 1200 + " ... " + "x" * 295),
    ],
)
def test_an_error_is_one_line_that_no_terminal_obeys(capsys, said, shown):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise ValueError(said)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {shown}\n"


def test_what_a_signal_breaks_off_does_not_warn():
    """torch.compile does so, with the traceback of the line that it was at."""
    with pytest.raises(SystemExit, match="143"), user_errors():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            warnings.warn("broken off", stacklevel=1)
