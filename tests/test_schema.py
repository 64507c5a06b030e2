"""Knobs: the types and bounds of their values, and the one line for a value that is refused."""

import json

import pytest

from config.command import split_arguments
from config.preset import make_config, read_knobs
from config.schema import Config, knobs_of, parse_knobs, parse_value
from model import ModelConfig


def load(*argv):
    return make_config(read_knobs(list(argv)))


def test_config_and_model_share_no_knob():
    assert not knobs_of(Config).keys() & knobs_of(ModelConfig).keys()


def test_flat_config_is_plain_json_of_every_knob():
    flat = load().flat()
    assert json.loads(json.dumps(flat)) == flat
    assert flat.keys() == knobs_of(Config, ModelConfig).keys()


@pytest.mark.parametrize(
    "value, kind, wanted",
    [
        ("1", float, 1.0),
        (1, float, 1.0),
        ("1e-3", float, 1e-3),
        ("7", int, 7),
        ("true", bool, True),
        ("No", bool, False),
        ("0", bool, False),
        (True, bool, True),
        ("a=b", str, "a=b"),
        ("", str, ""),
    ],
)
def test_values_become_the_type_of_their_knob(value, kind, wanted):
    result = parse_value("name", value, kind)
    assert result == wanted and type(result) is type(wanted)


@pytest.mark.parametrize("name", ["out_dir", "dataset", "init_from"])
def test_the_home_of_the_user_is_found_in_every_path(monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_value(name, "~/x", str) == "/home/me/x"
    assert parse_value("sample_prompt", "~/x", str) == "~/x"
    words, pairs = split_arguments(["~/run", f"{name}=~/x"])
    assert words == ["/home/me/run"] and pairs == {name: "~/x"}


def test_knobs_are_checked_together():
    # Either alone would not fit the other knobs of the preset.
    assert load("n_embd=600", "n_head=6", "n_kv_head=0").model.head_size == 100


@pytest.mark.parametrize(
    "words, message",
    [
        # unknown names
        ("learing_rate=1e-3", "unknown knob 'learing_rate'; did you mean learning_rate?"),
        ("lr=1e-3", "did you mean learning_rate?"),
        ("gradient_accumulation_steps=4", "batch_size is that of a whole step"),
        ("--eval_only", "python sample.py FOLDER eval=val evaluates a run"),
        ("--eval_only=True", "python sample.py FOLDER eval=val evaluates a run"),
        ("--backend=nccl", "torchrun starts several ranks"),
        ("--bias=False", "norm=layernorm_nobias has none"),
        (
            "--wandb_project=x",
            "set the environment variable WANDB_PROJECT",
        ),
        ("zzzzzz=4", "--help lists all"),
        ("nope=4", "--help lists all"),
        ("epochs=4", "max_iters counts the optimizer steps"),
        ("num_samples=4", "sample.py has it"),
        ("-lr=1", "did you mean learning_rate?"),
        # types
        ("n_layer=abc", "n_layer must be a whole number, got 'abc'"),
        ("n_layer=4.0", "n_layer must be a whole number, got '4.0'"),
        ("n_layer=", "n_layer must be a whole number, got ''"),
        ("n_layer=True", "n_layer must be a whole number, got 'True'"),
        ("n_layer=" + "9" * 5000, "n_layer must be a whole number, got '999"),
        ("seed=" + "9" * 50, "seed must be a whole number below 2**63, got '999"),
        ("n_embd=1_28", "n_embd must be a whole number, got '1_28'"),
        ("n_embd=\uff11\uff12\uff18", "n_embd must be a whole number, got '\uff11\uff12\uff18'"),
        ("learning_rate=1_0e-4", "learning_rate must be a number, got '1_0e-4'"),
        ("learning_rate=" + "9" * 101, "learning_rate must be a number, got '999"),
        ("learning_rate=nan", "must be finite"),
        ("learning_rate=inf", "must be finite"),
        ("learning_rate=1e400", "must be finite"),
        ("tie_embeddings=maybe", "tie_embeddings must be true or false, got 'maybe'"),
        ("norm_pos=middle", "sandwich, out, deepnorm, lns, mix or final, got 'middle'"),
        ("norm=" + "x" * 9999, "or none, got 'xxx"),
        ("out_dir=", "out_dir must be a folder, got ''"),
        # words
        ("--n_layer", "--n_layer has no value: write n_layer=VALUE"),
        ("n_layer=2 n_layer=3", "n_layer is given twice"),
        ("config/none.py", "config/none.py is neither a file nor a run's folder; presets of"),
        ("config", "config is neither a file nor"),
        ("config/train_shakespeare_char.py", "did you mean config/shakespeare_char.py?"),
        ("config/finetune_shakespeare.py", "did you mean config/finetune.py?"),
        ("--config=config/tiny.py", "write the preset as a word of its own"),
        ("out_dir=~nobody-here/x", "there is no user 'nobody-here'"),
        ("~nobody-here", "there is no user 'nobody-here'"),
        ("config/small.py config/tiny.py", "one preset at most"),
        # the model
        ("n_head=5", "must be a multiple of 2 * n_head=5"),
        ("norm=none norm_pos=out", "norm=none has nothing to place"),
        ("norm=none qk_norm=true", "norm=none has nothing to place"),
        ("norm=dyt embed_scale=sqrt", "scales the embedding by a learned factor already"),
        ("norm=dyt norm_pos=deepnorm", "norm=dyt does not: use norm_pos=post or another norm"),
        ("norm=prmsnorm norm_impl=fused", "norm_impl=fused has no kernel for norm=prmsnorm"),
        ("norm=prmsnorm prms_p=0", "prms_p must be in (0, 1], got 0.0"),
        ("norm=dyt norm_alpha=0", "norm_alpha must be above 0"),
        ("norm=dyt norm_alpha=1e39", "norm_alpha must be at most 1,000,000, got 1e+39"),
        ("ffn=gelu n_hidden=101", "n_hidden=101 must be even for ffn=gelu, which gets 3/2 of it"),
        # bounds of the other knobs
        ("batch_size=-1", "batch_size must be 1 or more"),
        ("batch_size=1000000000", "batch_size must be at most"),
        ("micro_batch_size=1000000000000", "micro_batch_size must be at most 1,000,000"),
        ("learning_rate=-1 min_lr=0", "learning_rate must be above 0"),
        ("beta1=1.0", "beta1 must be in [0, 1)"),
        ("grad_clip=-1", "grad_clip must be 0 or more"),
        ("eval_interval=-1", "eval_interval must be 0 or more"),
        ("log_interval=0", "log_interval must be 1 or more"),
        ("profile=101", "profile must be at most 100"),
        ("lr_schedule=wsd decay_fraction=0", "decay_fraction must be in (0, 1]"),
        ("seed=8796093022208", "seed must be below 2**43"),
        # knobs without effect
        ("rope_factor=4", "rope_factor=4.0 has no effect without rope_scaling=llama3"),
        ("rope_original_context=99", "has no effect without rope_scaling=llama3"),
        ("norm=dyt norm_eps=1e-6", "norm_eps=1e-06 has no effect without a norm with an eps"),
        ("prms_p=0.5", "prms_p=0.5 has no effect without norm=prmsnorm"),
        ("norm_alpha=1", "norm_alpha=1.0 has no effect without norm=dyt or norm=derf"),
        ("optimizer=adamw muon_momentum=0.9", "has no effect without optimizer=muon"),
        ("lr_schedule=constant min_lr=1e-5", "has no effect without a falling lr_schedule"),
        ("decay_fraction=0.1", "decay_fraction=0.1 has no effect without lr_schedule=wsd"),
        ("init_from=x lora_alpha=8", "lora_alpha=8.0 has no effect without lora_rank above 0"),
        ("norm=none norm_impl=fused", "norm_impl=fused has no effect without a norm"),
        ("norm=rmsnorm_noparam gain_decay=0.1", "gain_decay=0.1 has no effect without a norm with"),
        (
            "init_from=x lora_rank=2 gain_decay=1",
            "gain_decay=1.0 has no effect without lora_rank=0",
        ),
        ("init_from=x lora_rank=2 embed_lr=3", "embed_lr=3.0 has no effect without lora_rank=0"),
        ("init_from=x lora_rank=2 optimizer=muon beta1=0.8", "without optimizer=adamw or lora_"),
        ("sample_tokens=0 sample_prompt=a", "has no effect without sample_tokens above 0"),
        ("parallel=ddp", "parallel=ddp has no effect without torchrun, which starts several ranks"),
        # knobs that do not fit together
        ("min_lr=1 learning_rate=0.1", "min_lr=1.0 must not be above learning_rate=0.1"),
        ("warmup_iters=100 max_iters=10", "warmup_iters=100 must not be above max_iters=10"),
        ("batch_size=12 micro_batch_size=5", "the nearest is 4"),
        ("dataset=..", "dataset must be the name of a folder"),
        ("lora_rank=2", "lora_rank=2 needs weights to adapt: name them with init_from"),
        (
            "centred_writers=true lora_rank=2 init_from=x",
            "centred_writers=true would move the weights that lora_rank=2 freezes",
        ),
        (
            "centred_writers=true induction_init=false norm_pos=out",
            "with norm_pos=out gains would bring the mean back",
        ),
        (
            "centred_writers=true induction_init=false norm_pos=mix",
            "so use norm_pos=pre, lns or final",
        ),
        ("taper_end=9", "taper_end=9 has no effect without norm=tapernorm"),
        ("norm=tapernorm", "0 < taper_start < taper_end, got taper_start=0 and taper_end=0"),
        ("norm=tapernorm taper_start=5 taper_end=5", "got taper_start=5 and taper_end=5"),
        (
            "norm=tapernorm taper_start=5 taper_end=201 max_iters=200",
            "taper_end=201 must not be above max_iters=200",
        ),
        (
            "norm=tapernorm taper_start=5 taper_end=9 init_from=x",
            "init_from: the norms of these weights (norm=tapernorm) have been faded",
        ),
        (
            "norm=tapernorm norm_pos=sandwich taper_start=5 taper_end=9",
            "norm=tapernorm is for norm_pos=pre",
        ),
        ("lora_rank=999 init_from=x", "lora_rank=999 must be at most n_embd=192"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(words, message):
    with pytest.raises(ValueError) as error:
        load(*words.split())
    said = str(error.value)
    assert message in said and "\n" not in said and len(said) < 300


@pytest.mark.parametrize(
    "words",
    [
        "save_interval=0 keep=3",  # each Ctrl-C and each end saves
        "sharded=true",  # one process writes parts, too
        "init_from=x norm_alpha=0.8",  # the weights decide the norm: make_config compares them
        "sample_tokens=0 sample_prompt=",
    ],
)
def test_knobs_that_count_are_taken(words):
    assert read_knobs(words.split())


def test_a_value_that_no_preset_can_hold_is_refused_unread():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ValueError, match="x.pt: n_layer must be a number or a text, got list"):
        parse_knobs({"n_layer": deep}, knobs_of(ModelConfig), "x.pt")
