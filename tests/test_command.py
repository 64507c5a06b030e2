"""What all commands share: words, help, and the one line for an error."""

import contextlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from config.command import (
    help_text,
    print_help,
    split_arguments,
    training_help,
    user_errors,
)
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


def test_help_does_not_need_docstrings():
    code = "from config.command import training_help; print(training_help('usage'))"
    command = [sys.executable, "-OO", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == training_help("usage") + "\n", done.stderr


def test_a_reader_of_help_who_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    # Nothing is raised when the pipe is closed either.
    with os.fdopen(write, "w") as pipe, contextlib.redirect_stdout(pipe):
        print_help("help " * 9999, "more")


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
