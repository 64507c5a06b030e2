"""What can be known of Windows on Linux. docs/platforms.md says what that leaves open."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
from conftest import ROOT

from config.command import (
    exit_on_signal,
    reader_left,
    shell_path,
    split_arguments,
    user_errors,
)
from run.metrics import read_metrics
from run.setup import dataset_folder, text_meant
from run.signals import Interrupts
from text.prompt import prompt_text


def test_every_module_and_a_run_work_under_the_rules_of_windows(tmp_path):
    """Trained, resumed and sampled, with the output in the encoding of a Western Windows."""
    known = {name: value for name, value in os.environ.items() if name != "ROOTLLAMA_DATA"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "windows.py"), str(tmp_path)],
        env=known | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    output, errors = done.stdout.decode("cp1252"), done.stderr.decode("cp1252")
    assert done.returncode == 0, errors
    assert "? cat" in output and "Traceback" not in errors
    warned = [line for line in errors.splitlines() if line.startswith("warning: ")]
    told = f"{tmp_path / 'run'} cannot be locked here (this system has no such locks)"
    assert len([line for line in warned if told in line]) == 2  # trained twice
    others = [line for line in warned if told not in line]
    assert all("of the val text" in line for line in others), others
    names = "ckpt_00000003.pt ckpt_00000004.pt best.pt config.json metrics.jsonl tokenizer.model"
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(names.split())
    evaluated = [r["step"] for r in read_metrics(tmp_path / "run") if "val_loss" in r]
    assert evaluated == [1, 2, 3, 4]
    assert {path.name[:5] for path in tmp_path.iterdir()} == {"run", "text-", "text."}


def test_a_backslash_separates_folders(monkeypatch):
    assert split_arguments(["runs\\lr=1"]) == ([], {"runs\\lr": "1"})
    monkeypatch.setattr(os, "sep", "\\")
    assert split_arguments(["runs\\lr=1", "a=b\\c"]) == (["runs\\lr=1"], {"a": "b\\c"})
    for name in ("texts\\my", "C:\\texts\\my"):
        assert dataset_folder(name) == text_meant(name) == Path(name)


def test_a_printed_path_has_no_backslash_that_a_shell_could_take_for_another_sign():
    assert shell_path(PureWindowsPath("out\\small")) == "out/small"
    assert shell_path(PureWindowsPath("C:\\my runs\\a")) == "'C:/my runs/a'"
    assert shell_path(PureWindowsPath("small")) == "./small"


def test_a_prompt_may_be_a_file_on_a_drive():
    with pytest.raises(FileNotFoundError, match="C:"):
        prompt_text("FILE:C:\\nowhere\\my.txt")


def test_a_second_ctrl_c_ends_a_run_where_there_is_no_sighup(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    interrupts = Interrupts()
    interrupts.note(signal.SIGINT)
    assert interrupts.agreed()
    with pytest.raises(SystemExit, match="130"):
        interrupts.note(signal.SIGINT)


def test_a_terminal_that_is_closed_ends_a_program_as_on_linux(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)), user_errors():
        assert signal.getsignal(signal.SIGUSR1) is exit_on_signal
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_pipe_that_nobody_reads_is_known_by_the_error_of_windows():
    for number, gone in ((errno.EINVAL, True), (errno.EPIPE, True), (errno.ENOSPC, False)):
        assert reader_left(SimpleNamespace(fault=OSError(number, "as the system says"))) == gone
