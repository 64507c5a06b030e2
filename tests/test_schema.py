"""Presets and command lines: what is accepted, and the one line for what is not."""

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from config.schema import (
    Config,
    as_place,
    convert,
    help_text,
    knobs_of,
    load_config,
    print_help,
    read_preset,
    split_arguments,
    typed,
    user_errors,
)
from cost import parameter_count
from model import Decoder, ModelConfig

CONFIG = Path(__file__).parent.parent / "config"
PRESETS = sorted(p for p in CONFIG.glob("*.py") if p.stem not in ("schema", "__init__"))


def preset(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_loads_and_says_what_to_expect(path):
    config = load_config([str(path)])
    assert config.out_dir == f"out/{path.stem}"
    assert path.read_text().startswith('"""')
    assert parameter_count(config.model) > 0


@pytest.mark.parametrize("path", [p for p in PRESETS if not p.stem.startswith("llama_")], ids=lambda p: p.stem)
def test_every_small_preset_builds(path):
    Decoder(ModelConfig(**vars(load_config([str(path)]).model) | {"vocab_size": 100}))


def test_command_line_overrides_the_preset_and_small_is_the_default(tmp_path):
    path = preset(tmp_path, "n_layer = 2\nlearning_rate = 6e-4 / 2\nmax_iters = 3 * 10**2\nout_dir = 'a'\n")
    config = load_config([path, "n_layer=3", "--norm=layernorm", "out_dir=x=y", "compile=True"])
    assert (config.model.n_layer, config.model.norm, config.out_dir, config.compile) == (3, "layernorm", "x=y", True)
    assert (config.learning_rate, config.max_iters) == (3e-4, 300)
    assert load_config([]) == load_config([str(CONFIG / "small.py")])


@pytest.mark.parametrize("name", ["tiny", "tiny.py", "config/tiny.py"])
def test_a_preset_of_ours_is_found_from_any_folder_unless_there_is_another(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert load_config([name]) == load_config([str(CONFIG / "tiny.py")])
    for other in ("elsewhere/tiny.py", "tiny.txt", "none", "", "..", "config"):
        with pytest.raises(ValueError, match="is neither a file nor a run's folder; presets are"):
            read_preset(other)
    for name in ("config/tiny.py", "tiny.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("n_layer = 3")
        assert read_preset(name) == {"n_layer": 3}


def test_overrides_are_checked_together():
    config = load_config(["n_embd=600", "n_head=6", "n_kv_head=0"])  # either alone would not fit the preset's
    assert config.model.head_size == 100


def test_config_and_model_share_no_knob():
    assert not knobs_of(Config).keys() & knobs_of(ModelConfig).keys()


def test_help_lists_every_knob_with_its_default():
    text = help_text("usage", Config, ModelConfig)
    assert max(map(len, text.splitlines())) <= 120
    text = " ".join(text.split())
    for name, (_, field) in knobs_of(Config, ModelConfig).items():
        assert f" {name}={field.default} {field.metadata['help']} (" in text or field.default == ""
        assert field.metadata["help"] in text


def test_a_reader_of_help_who_leaves_is_no_error(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        print_help("help " * 9999, "more")  # and nothing is raised when the pipe is closed either


def test_flat_config_is_plain_json():
    config = load_config([])
    assert json.loads(json.dumps(config.flat())) == config.flat()


@pytest.mark.parametrize("value, kind, wanted", [
    ("1", float, 1.0), (1, float, 1.0), ("1e-3", float, 1e-3), ("7", int, 7), ("true", bool, True), ("No", bool, False),
    ("0", bool, False), (True, bool, True), ("a=b", str, "a=b"), ("", str, "")])
def test_values_become_the_type_of_their_knob(value, kind, wanted):
    result = convert("key", value, kind)
    assert result == wanted and type(result) is type(wanted)


@pytest.mark.parametrize("arguments, words", [
    # 1: unknown keys
    (["learing_rate=1e-3"], "unknown knob 'learing_rate'; did you mean learning_rate?"),
    (["lr=1e-3"], "did you mean learning_rate?"),
    (["gradient_accumulation_steps=4"], "did you mean micro_batch_size?"),
    (["zzzzzz=4"], "--help lists all"),
    # 2: wrong types
    (["n_layer=abc"], "n_layer must be a whole number, got 'abc'"),
    (["n_layer=4.0"], "n_layer must be a whole number, got '4.0'"),
    (["n_layer="], "n_layer must be a whole number, got ''"),
    (["n_layer=True"], "n_layer must be a whole number"),
    (["--n_layer"], "--n_layer has no value: write n_layer=VALUE"),
    # 4: booleans and choices
    (["tie_embeddings=maybe"], "tie_embeddings must be true or false, got 'maybe'"),
    (["norm_pos=middle"], "norm_pos must be pre, post, sandwich, out or deepnorm, got 'middle'"),
    (["norm=none", "norm_pos=out"], "norm=none has nothing to place: leave norm_pos=pre and qk_norm=false"),
    (["norm=none", "qk_norm=true"], "norm=none has nothing to place"),
    (["norm=dyt", "norm_pos=deepnorm"], "norm=dyt does not: use norm_pos=post or another norm"),
    (["norm=prmsnorm", "norm_impl=fused"], "norm_impl=fused has no kernel for norm=prmsnorm"),
    (["prms_p=0"], "prms_p must be in (0, 1], got 0.0"), (["norm_alpha=0"], "norm_alpha must be above 0"),
    (["ffn=gelu", "n_hidden=101"], "n_hidden=101 must be even for ffn=gelu, which gets 3/2 of it"),
    # 5: not finite
    (["learning_rate=nan"], "must be finite"), (["learning_rate=inf"], "must be finite"),
    (["learning_rate=1e400"], "must be finite"),
    # 6 and 8: places
    (["config/none.py"], "config/none.py is neither a file nor a run's folder; presets are"),
    (["config"], "config is neither a file nor"),
    (["config/small.py", "config/tiny.py"], "one preset at most"),
    (["n_layer=2", "n_layer=3"], "n_layer is given twice"),
    # 9 and 10: shapes
    (["n_head=5"], "must be a multiple of 2 * n_head=5"),
    (["n_head=4", "n_embd=256", "n_kv_head=3"], "choose n_kv_head from 1, 2, 4"),
    (["n_layer=0"], "n_layer must be between 1 and"),
    (["batch_size=1000000000"], "batch_size must be at most"),
    (["micro_batch_size=1000000000000"], "micro_batch_size must be at most 1,000,000"),
    (["batch_size=-1"], "batch_size must be 1 or more"),
    # 11: across fields
    (["learning_rate=-1", "min_lr=0"], "learning_rate must be above 0"),
    (["beta1=1.0"], "beta1 must be in [0, 1)"), (["dropout=1"], "dropout must be in [0, 1)"),
    (["min_lr=1", "learning_rate=0.1"], "min_lr=1.0 must not be above learning_rate=0.1"),
    (["warmup_iters=100", "max_iters=10"], "warmup_iters=100 must not be above max_iters=10"),
    (["grad_clip=-1"], "grad_clip must be 0 or more"),
    (["batch_size=12", "micro_batch_size=5"], "the nearest is 4"),
    # 12: intervals
    (["eval_interval=-1"], "eval_interval must be 0 or more"), (["log_interval=0"], "log_interval must be 1 or more"),
    (["n_layer=" + "9" * 5000], "n_layer must be a whole number, got '999"),
    (["seed=" + "9" * 50], "seed must be a whole number, got '999"),
    (["learning_rate=" + "9" * 101], "learning_rate must be a number, got '999"),
    (["norm=" + "x" * 9999], "or none, got 'xxx"),
    # paths
    (["dataset=.."], "dataset must be the name of a folder"), (["out_dir="], "out_dir must be a folder, got ''"),
])
def test_bad_command_lines_are_refused_in_one_line(arguments, words):
    with pytest.raises(ValueError) as error:
        load_config(arguments)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("text, words", [
    ("learing_rate = 1", "mine.py: unknown knob 'learing_rate'; did you mean learning_rate?"),
    ("n_layer = 2\nn_layer = 3", "mine.py:2:1: n_layer is given twice"),
    ("import os", "mine.py:1:1: a preset holds only lines of the form name = literal"),
    ("n_layer = open('x').read()", "mine.py:1:11: only numbers, strings, booleans and arithmetic"),
    ("n_layer = __import__('os').system('touch x')", "only numbers, strings"),
    ("n_layer = [2]", "only numbers, strings"), ("n_layer = None", "only numbers, strings"),
    ("n_layer = 'a' * 9", "only numbers, strings"),
    ("learning_rate = 1 / 0", "division by zero"),
    ("n_layer = 10 ** 10 ** 10", "only numbers, strings"),
    ("n_layer = 9 ** 9 ** 2 ** 9", "only numbers, strings"),
    ("n_layer, n_head = 2, 2", "a preset holds only lines"),
    ("if True:\n  n_layer = 2", "a preset holds only lines"),
    ("n_layer = = 2", "mine.py:1:11: invalid syntax"),
    ("n_layer = '2x'", "n_layer must be a whole number, got '2x'"),
    ("out_dir = 3", "out_dir must be text in quotes, got 3"),
    ("n_layer = 2.0", "n_layer must be a whole number, got 2.0"),
    ("n_layer = " + "+".join("1" * 20_000), "is nested too deeply"),
    ("n_layer = " + "+".join("1" * 3000), "nested too deeply"),
    ("n_layer = " + "-" * 90_000 + "1", "is nested too deeply"),
    ("seed = 0x" + "f" * 9000, "arithmetic of numbers (below 2**63)"), ("learning_rate = " + "9" * 4000, "below 2**63"),
    ("out_dir = " + "9" * 5000, "4300 digits"), ("seed = 10 ** 17 * 1000", "seed must be a whole number, got 1000"),
    ("#" * 100_001, "is larger than 100,000 bytes"), ("n_layer = 1is 1", "only numbers, strings"),
])
def test_bad_presets_are_refused_with_their_place_and_not_run(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        load_config([preset(tmp_path, text)])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"n_layer = 1\x00", b"n_layer = '\xe9'"])
def test_binary_presets_are_refused(tmp_path, content):
    (tmp_path / "x.py").write_bytes(content)
    with pytest.raises(ValueError, match="x.py"):
        read_preset(tmp_path / "x.py")


def test_a_runs_folder_is_a_preset_with_all_of_its_knobs(tmp_path):
    config = load_config(["tiny", "seed=5", "norm=none", "dataset=words", "out_dir=elsewhere"])
    saved = config.flat() | {"device": "cuda:3", "versions": {"torch": "9"}, "parameters": 7, "data": {"tokens": 1}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert load_config([str(tmp_path)]) == dataclasses.replace(
        config, device="cuda", out_dir=str(tmp_path), resume="auto")
    assert load_config([str(tmp_path), "seed=6", "out_dir=x"]).flat() == config.flat() | {
        "seed": 6, "out_dir": "x", "device": "cuda", "resume": "no"}


@pytest.mark.parametrize("content, words", [
    (None, "is neither a file nor a run's folder; presets are config/"), ("{", "config.json is not JSON"),
    ("[" * 90_000, "config.json is not JSON"), (" " * 2**24 + "{}", "is larger than 16,777,216 bytes"),
    ("3", "config.json must hold a JSON object, got int"),
    ('{"data": 1, "out_dir": "x", "device": "cpu"}', "is not a run's folder, going by its config.json"),
    ('{"model_type": "llama", "architectures": []}', "for weights there is init_from="),
    ('{"versions": 1, "parameters": 1, "data": {}, "out_dir": "x", "device": "cpu", "nlayer": 1}', "mean n_layer?"),
    ('{"versions": 1, "parameters": 1, "data": {}, "out_dir": "x", "device": "cpu", "seed": []}', "seed must be a num"),
])
def test_other_folders_are_no_presets(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as error:
        load_config([str(tmp_path)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_value_that_no_preset_can_hold_is_refused_unread():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ValueError, match="x.pt: n_layer must be a number or a text, got list"):
        typed({"n_layer": deep}, knobs_of(ModelConfig), "x.pt")


def test_a_vocab_size_that_is_the_datas_is_left_open(tmp_path):
    """So that a twin on other data has theirs; one that was chosen, as a padded one, stays."""
    saved = load_config(["tiny", "vocab_size=50"]).flat()
    for tokens, vocab in ((50, 0), (49, 50)):
        (tmp_path / "config.json").write_text(json.dumps(saved | {"data": {"vocab_size": tokens}}))
        assert load_config([str(tmp_path)]).model.vocab_size == vocab


def test_a_value_and_a_place_may_hold_an_equals_sign():
    assert split_arguments(["a=b=c", "--d=e"]) == ([], {"a": "b=c", "d": "e"})
    assert split_arguments(["out/lr=1", "a=b/c", "./x=2"]) == (["out/lr=1", "./x=2"], {"a": "b/c"})


@pytest.mark.parametrize("name", ["tiny", "config/tiny", "my run", "lr=3", "out/lr=3", "-x", "it's $HOME/run"])
def test_the_place_of_a_run_is_taken_for_it_alone(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    (Path(name) / "config.json").write_text(json.dumps(load_config(["tiny", "seed=5"]).flat() | {"data": {}}))
    config = load_config(shlex.split(as_place(Path(name))))
    assert config.seed == 5 and Path(config.out_dir) == Path(name)


def test_a_run_in_this_folder_comes_before_a_preset_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text(json.dumps(load_config(["tiny", "seed=5"]).flat() | {"data": {}}))
    assert load_config(["tiny"]).seed == 5


@pytest.mark.parametrize("said, shown", [
    ("a\nb\x1b]0;x\x07\u202e\ud800c", "a b ]0;x c"), ("x" * 9999, "x" * 1200 + " ... " + "x" * 295)])
def test_an_error_is_one_line_that_no_terminal_obeys(capsys, said, shown):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise ValueError(said)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {shown}\n"
