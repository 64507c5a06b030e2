"""Presets: files that are parsed and never run, and the folders of runs."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from config.command import shell_path
from config.preset import PRESETS, make_config, read_knobs
from model import Decoder, parameter_count


def load(*argv):
    return make_config(read_knobs([str(word) for word in argv]))


def write_preset(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


def write_run(folder, *argv, **more):
    """A folder that looks like that of a run with these knobs; returns the run's Config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load(*argv)
    (folder / "config.json").write_text(json.dumps(config.flat() | {"data": {}} | more))
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is_and_describes_a_model(name):
    path = ROOT / "config" / f"{name}.py"
    config = load(path)
    assert config.out_dir == f"out/{name}" and path.read_text().startswith('"""')
    assert parameter_count(config.model) > 0
    if not name.startswith("llama_"):  # those are too large to build here
        Decoder(dataclasses.replace(config.model, vocab_size=100))


def test_all_other_files_of_the_folder_are_presets():
    programs = {"__init__", "command", "help", "preset", "schema"}
    assert {path.stem for path in (ROOT / "config").glob("*.py")} == programs | set(PRESETS)


def test_command_line_overrides_the_preset_and_small_is_the_default(tmp_path):
    text = "n_layer = 2\nlearning_rate = 6e-4 / 2\nmax_iters = 3 * 10**2\nout_dir = 'a'\n"
    path = write_preset(tmp_path, text)
    config = load(path, "n_layer=3", "--norm=layernorm", "out_dir=x=y", "compile=True")
    assert (config.model.n_layer, config.model.norm) == (3, "layernorm")
    assert (config.out_dir, config.compile) == ("x=y", True)
    assert (config.learning_rate, config.max_iters) == (3e-4, 300)
    assert load() == load(ROOT / "config" / "small.py")


def test_a_byte_order_mark_before_a_preset_is_no_part_of_it(tmp_path):
    assert load(write_preset(tmp_path, "\ufeffn_layer = 2\n")).model.n_layer == 2


def test_a_preset_and_a_command_line_are_each_judged_for_knobs_without_effect(tmp_path):
    path = write_preset(tmp_path, "lr_schedule = 'wsd'\ndecay_fraction = 0.3\nparallel = 'fsdp'\n")
    assert load(path, "lr_schedule=cosine").decay_fraction == 0.3  # of no use, but not a mistake
    write_preset(tmp_path, "decay_fraction = 0.3\n")
    assert load(path, "lr_schedule=wsd").decay_fraction == 0.3
    wanted = f"{path}: decay_fraction=0.3 has no effect without lr_schedule=wsd"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        load(path)
    run = tmp_path / "run"
    write_run(run)  # its config.json has every knob, whether it counts or not
    assert load(run, "seed=3").seed == 3
    with pytest.raises(ValueError, match="command line: decay_fraction=0.3 has no effect"):
        load(run, "decay_fraction=0.3")


@pytest.mark.parametrize("name", ["tiny", "tiny.py", "config/tiny.py"])
def test_a_preset_of_ours_is_found_from_any_folder_unless_there_is_another(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert load(name) == load(ROOT / "config" / "tiny.py")
    if name.endswith(".py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("n_layer = 3")
    else:
        write_run(tmp_path / name, "n_layer=3")
    assert load(name).model.n_layer == 3


@pytest.mark.parametrize(
    "name",
    ["elsewhere/tiny.py", "tiny.txt", "none", "", "..", "config", "knobs", "preset", "~nobody/x"],
)
def test_what_is_no_preset_is_refused_with_the_nearest_or_all_presets(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    hint = f"presets of config/ are {', '.join(PRESETS)}"
    if "tiny" in name:
        hint = "did you mean config/tiny.py?"
    with pytest.raises(ValueError) as error:
        load(name)
    assert str(error.value).endswith(f"is neither a file nor a run's folder; {hint}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("learing_rate = 1", "mine.py: unknown knob 'learing_rate'; did you mean learning_rate?"),
        ("n_layer = 2\nn_layer = 3", "mine.py:2:1: n_layer is given twice"),
        ("import os", "mine.py:1:1: a preset holds only lines of the form name = literal"),
        ("n_layer = open('x').read()", "mine.py:1:11: only numbers, strings, booleans and arith"),
        ("n_layer = __import__('os').system('touch x')", "only numbers, strings"),
        ("n_layer = [2]", "only numbers, strings"),
        ("n_layer = None", "only numbers, strings"),
        ("n_layer = 'a' * 9", "only numbers, strings"),
        ("learning_rate = 1 / 0", "division by zero"),
        ("n_layer = 10 ** 10 ** 10", "only numbers, strings"),
        ("n_layer = 9 ** 9 ** 2 ** 9", "only numbers, strings"),
        ("n_layer, n_head = 2, 2", "a preset holds only lines"),
        ("n_layer = n_head = 2", "a preset holds only lines"),
        ("n_layer: int = 2", "a preset holds only lines"),
        ("if True:\n  n_layer = 2", "a preset holds only lines"),
        ("n_layer = = 2", "mine.py:1:11: invalid syntax"),
        ("n_layer = '2x'", "mine.py: n_layer must be a whole number, got '2x'"),
        ("out_dir = 3", "out_dir must be text in quotes, got 3"),
        ("n_layer = 2.0", "n_layer must be a whole number, got 2.0"),
        ("n_layer = " + "+".join("1" * 20_000), "is nested too deeply"),
        ("n_layer = " + "+".join("1" * 3000), "nested too deeply"),
        ("n_layer = " + "-" * 90_000 + "1", "is nested too deeply"),
        ("seed = 0x" + "f" * 9000, "arithmetic of numbers (below 2**63)"),
        ("learning_rate = " + "9" * 4000, "below 2**63"),
        ("learning_rate = (-8) ** 0.5", "learning_rate must be a number or a text, got complex"),
        ("out_dir = " + "9" * 5000, "4300 digits"),
        ("seed = 10 ** 17 * 1000", "seed must be a whole number below 2**63, got 1000"),
        ("#" * 100_001, "is larger than 100,000 bytes"),
        ("n_layer = 1is 1", "only numbers, strings"),
    ],
)
def test_bad_presets_are_refused_with_their_place_and_not_run(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        load(write_preset(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"n_layer = 1\x00", b"n_layer = '\xe9'"])
def test_binary_presets_are_refused(tmp_path, content):
    (tmp_path / "x.py").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.py is not a UTF-8 text file: "):
        load(tmp_path / "x.py")


def test_a_runs_folder_is_a_preset_with_all_of_its_knobs(tmp_path):
    argv = ["tiny", "seed=5", "norm=none", "dataset=words", "out_dir=elsewhere"]
    about = {"versions": {"torch": "9"}, "parameters": 7, "data": {"tokens": 1}}
    config = write_run(tmp_path, *argv, device="cuda:3", **about)
    same = dataclasses.replace(config, device="cuda", out_dir=str(tmp_path), resume="auto")
    assert load(tmp_path) == same
    twin = dataclasses.replace(config, device="cuda", out_dir="x", seed=6)
    assert load(tmp_path, "seed=6", "out_dir=x") == twin and twin.resume == "no"


RUN = '{"versions": 1, "parameters": 1, "data": {}, "out_dir": "x", "device": "cpu", '


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json is not JSON"),
        ("[" * 90_000, "config.json is not JSON"),
        (" " * 2**24 + "{}", "is larger than 16,777,216 bytes"),
        ("3", "config.json must hold a JSON object, got int"),
        ('{"data": 1, "out_dir": "x", "device": "cpu"}', "is not a run's folder, going by its"),
        ('{"model_type": "llama", "architectures": []}', "write init_from="),
        (RUN + '"nlayer": 1}', "mean n_layer?"),
        (RUN + '"seed": []}', "seed must be a num"),
        (RUN + '"norm": "foonorm"}', "config.json: its knobs: norm must be "),
        (RUN + '"n_head": 7}', "config.json: n_embd=384 must be a multiple of 2 * n_head=7"),
        (RUN + '"optimizer": "x"}', "(use the version of the program that wrote it)"),
    ],
)
def test_folders_that_are_no_run_are_no_presets(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("tokens, vocab_size", [(50, 0), (49, 50)])
def test_a_vocab_size_that_is_the_datas_is_left_open(tmp_path, tokens, vocab_size):
    """So a twin on other data has theirs; one that was chosen, as a padded one, stays."""
    write_run(tmp_path, "tiny", "vocab_size=50", data={"vocab_size": tokens})
    assert load(tmp_path).model.vocab_size == vocab_size


def test_weights_decide_the_architecture_and_a_run_may_choose_the_rest():
    weights = {"n_layer": 3, "n_embd": 96, "n_head": 6, "block_size": 512}
    knobs = {"init_from": "x", "n_layer": 3, "block_size": 64, "dropout": 0.5}
    model = make_config(knobs, weights).model
    assert (model.n_layer, model.n_embd, model.block_size, model.dropout) == (3, 96, 64, 0.5)
    with pytest.raises(ValueError) as error:
        make_config(knobs | {"n_embd": 32}, weights)
    assert "init_from=x decides the architecture: leave out n_embd=32 (96 there)" in str(
        error.value
    )


@pytest.mark.parametrize(
    "name", ["tiny", "config/tiny", "my run", "lr=3", "out/lr=3", "-x", "-x/y", "it's $HOME/run"]
)
def test_the_path_of_a_run_as_messages_write_it_is_taken_for_that_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_run(Path(name), "seed=5")
    config = load(*shlex.split(shell_path(Path(name))))
    assert config.seed == 5 and Path(config.out_dir) == Path(name)
