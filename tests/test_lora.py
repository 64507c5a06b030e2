"""Going on from weights that exist: fine-tuning, and the adapters of LoRA."""

import json
import shutil

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

import checkpoint
import hf
import sample
import train
from data.loader import open_dataset
from data.prepare import prepare
from lora import LoRALinear, adapter_count, add_adapters, merged
from model import Decoder, ModelConfig
from weights import load_model, open_weights

MODEL = ModelConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_hidden=24, block_size=16, vocab_size=30)
SHAPE = ("n_layer", "n_head", "n_embd", "n_hidden", "block_size")


def ids(seed=0):
    return torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(seed))


def with_adapters(seed=0, rank=4, alpha=8.0, move=True):
    """A model with adapters, and a copy of its weights; `move`: the adapters have learned something."""
    model = Decoder(MODEL)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, rank, alpha, seed)
    if move:
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model, weights


def learned(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_at_the_start_adapters_change_nothing():
    model, _ = with_adapters(move=False)
    assert torch.equal(model(ids()), Decoder(MODEL)(ids()))


def test_an_adapter_is_scale_times_b_a():
    linear = torch.nn.Linear(3, 2, bias=False)
    layer = LoRALinear(linear, 1, 0.5)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        layer.lora_a.copy_(torch.tensor([[1.0, 2, 3]]))
        layer.lora_b.copy_(torch.tensor([[1.0], [10]]))
    assert layer(torch.ones(3)).tolist() == [1 + 0.5 * 6, 1 + 0.5 * 60]


def test_every_projection_has_one_and_nothing_else_is_trained():
    model, _ = with_adapters()
    names = learned(model)
    assert len(names) == 2 * 7 * 2 and all(name.endswith(("lora_a", "lora_b")) for name in names)
    assert sum(p.numel() for p in names.values()) == adapter_count(MODEL, 4)
    model(ids(), ids(1)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("knobs", [{"ffn": "gelu"}, {"head_dim": 10}, {}])
def test_adapters_are_counted_without_a_model(knobs):
    config = ModelConfig(**vars(MODEL) | knobs)
    model = Decoder(config)
    add_adapters(model, 3, 1.0, 0)
    assert adapter_count(config, 3) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_merged_weights_compute_the_same():
    model, weights = with_adapters()
    plain = checkpoint.build_model(MODEL, merged(weights, learned(model), 8.0 / 4), "cpu")
    assert (model(ids()) - plain(ids())).abs().max() < 1e-5
    assert (model(ids()) - Decoder(MODEL)(ids())).abs().max() > 1e-3


def test_adapters_start_as_wide_as_a_layer_of_their_inputs():
    model, _ = with_adapters(rank=2, move=False)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_a"):
            assert 0.7 < parameter.abs().max() * parameter.shape[1] ** 0.5 <= 1


def test_adapters_depend_on_the_seed_alone():
    (one, _), (same, _), (other, _) = (with_adapters(seed, move=False) for seed in (1, 1, 2))
    a, b, c = (m.blocks[1].ffn.up.lora_a for m in (one, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, one.blocks[0].ffn.up.lora_a)


@pytest.mark.parametrize("spoil", [
    lambda a: a | {"blocks.0.attn.q.lora_c": a["blocks.0.attn.q.lora_a"]},
    lambda a: a | {f"blocks.9.attn.q.{kind}": a[f"blocks.0.attn.q.{kind}"] for kind in ("lora_a", "lora_b")},
    lambda a: a | {"blocks.0.attn.q.lora_a": torch.zeros(4, 17)},
    lambda a: a | {"blocks.0.attn.q.lora_a": torch.zeros(4)},
    lambda a: {name: t for name, t in a.items() if name != "blocks.0.attn.q.lora_b"},
    lambda a: a | {"x": torch.ones(1)}])
def test_adapters_for_other_weights_are_refused(spoil):
    model, weights = with_adapters()
    with pytest.raises(ValueError, match="does not fit the weights it is for"):
        merged(weights, spoil(learned(model)), 1.0)


# End to end: base is a run on made-up words with one token per character.

@pytest.fixture
def base(start, tmp_path):
    assert start(out="base")[0] == 0
    return tmp_path / "base"


@pytest.fixture
def tune(start, base):
    """tune('key=value', ...) goes on from base: (exit code, stdout, stderr)."""
    def run(*arguments, out="run"):
        return start(f"init_from={base}", *arguments, out=out)
    return run


@pytest.mark.parametrize("lora", [(), ("lora_rank=2",)], ids=["full", "lora"])
def test_the_first_loss_is_that_of_the_weights_begun_with(tune, base, tmp_path, data_folder, lora):
    code, _, error = tune("eval_interval=0", "max_iters=1", "warmup_iters=0", "learning_rate=1e-9", *lora)
    assert code == 0, error
    found = [json.loads(line)["val_loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
             if "val_loss" in line]
    before = [json.loads(line)["val_loss"] for line in (base / "metrics.jsonl").read_text().splitlines()
              if "val_loss" in line]
    assert found[-1] == pytest.approx(before[-1], abs=1e-6)


def test_the_architecture_comes_from_the_weights(start, base, tmp_path, monkeypatch):
    preset = tmp_path / "tune.py"
    knobs = [a for a in SMALL if a.split("=")[0] not in SHAPE]
    preset.write_text(f"init_from = {str(base)!r}\nout_dir = {str(tmp_path / 'run')!r}\n")
    assert train.main([str(preset), *knobs]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["n_hidden"], config["block_size"]) == (2, 32, 64, 32)


@pytest.mark.parametrize("knob", ["n_layer=3", "norm=layernorm", "tie_embeddings=true", "rope_theta=5"])
def test_a_knob_that_the_weights_decide_is_refused(tune, tmp_path, knob):
    code, _, error = tune(knob)
    assert code == 2 and f"leave out {knob.split('=')[0]}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_dropout_and_context_may_differ_from_the_weights(tune, tmp_path):
    code, _, error = tune("block_size=16", "dropout=0.1", "norm_impl=fused")
    assert code == 0, error
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["block_size"], config["dropout"], config["norm_impl"]) == (16, 0.1, "fused")


@pytest.mark.parametrize("lora", [(), ("lora_rank=2", "lora_alpha=4"), ("lora_rank=2", "optimizer=muon"),
                                  ("lora_rank=2", "dropout=0.2", "activation_checkpointing=true")],
                         ids=["full", "lora", "lora with muon", "lora with dropout"])
def test_a_resumed_fine_tuning_is_the_uncut_one(tune, tmp_path, lora):
    assert tune("max_iters=12", *lora, out="whole")[0] == 0
    assert tune("max_iters=12", "lr_schedule=constant", *lora, out="same")[0] == 0
    assert tune("max_iters=7", "lr_schedule=constant", *lora, out="cut")[0] == 0
    assert tune("max_iters=12", "lr_schedule=constant", "resume=yes", *lora, out="cut")[0] == 0
    same, cut = (checkpoint.load_newest(tmp_path / name) for name in ("same", "cut"))
    assert same["step"] == cut["step"] == 12
    assert all(torch.equal(t, cut["model"][name]) for name, t in same["model"].items())


def test_checkpoints_of_adapters_hold_nothing_else(tune, base, tmp_path):
    code, out, _ = tune("lora_rank=2")
    assert code == 0 and "are trained" in out
    for which in ("latest", "best"):
        state = checkpoint.load_named(tmp_path / "run", which)
        assert all(name.endswith(("lora_a", "lora_b")) for name in state["model"])
    assert not (tmp_path / "run" / "base.pt").exists()
    assert "peak memory" in out


def test_a_run_with_adapters_samples_with_the_weights_it_is_for(tune, base, tmp_path, capsys):
    assert tune("lora_rank=2", "learning_rate=0.05")[0] == 0
    tuned, begun = load_model(tmp_path / "run")[0], load_model(base)[0]
    assert all(torch.equal(p, dict(begun.named_parameters())[n]) == ("blocks" not in n or "norm" in n)
               for n, p in tuned.named_parameters())
    assert sample.main([str(tmp_path / "run"), "prompt=the", "max_new_tokens=4", "device=cpu"]) == 0


def test_an_exported_run_has_its_adapters_in_the_weights(tune, base, tmp_path):
    assert tune("lora_rank=2", "lora_alpha=6", "learning_rate=0.05")[0] == 0
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    learned = checkpoint.load_newest(tmp_path / "run")["model"]
    a, b = (learned[f"blocks.1.attn.k.lora_{part}"] for part in "ab")
    before = checkpoint.load_newest(base)["model"]["blocks.1.attn.k.weight"]
    after = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    assert torch.allclose(after, before + 3 * b @ a, atol=1e-6) and (after - before).abs().max() > 1e-3


def test_adapters_of_adapters_are_merged_twice(tune, start, tmp_path, base):
    assert tune("lora_rank=2", "learning_rate=0.05")[0] == 0
    assert start(f"init_from={tmp_path / 'run'}", "lora_rank=1", "learning_rate=0.05", out="again")[0] == 0
    once, twice = (open_weights(tmp_path / name).tensors["blocks.0.ffn.up.weight"] for name in ("run", "again"))
    assert (once - open_weights(base).tensors["blocks.0.ffn.up.weight"]).abs().max() > 1e-3
    assert (twice - once).abs().max() > 1e-3


def test_adapters_notice_that_their_weights_are_gone_or_others(tune, base, tmp_path):
    assert tune("lora_rank=2")[0] == 0
    newest = checkpoint.all_in(base)[-1][1]
    newest.rename(tmp_path / "kept.pt")
    with pytest.raises(ValueError, match="which is gone: put it back"):
        load_model(tmp_path / "run")
    state = checkpoint.load(shutil.copy(tmp_path / "kept.pt", newest))
    state["model"]["norm.gain"][0] += 1
    checkpoint.save(newest, {k: v for k, v in state.items() if not k.startswith("format")})
    with pytest.raises(ValueError, match="no longer holds the weights"):
        load_model(tmp_path / "run")
    code, _, error = tune("lora_rank=2", "resume=yes", "max_iters=20")
    assert code == 2 and "no longer holds the weights" in error


def test_base_and_adapters_are_found_from_elsewhere_and_over_links(tune, base, tmp_path, monkeypatch):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert tune("lora_rank=2", "lr_schedule=constant", "max_iters=6", out="link/run")[0] == 0
    monkeypatch.chdir(tmp_path / "far")
    code, out, error = tune("lora_rank=2", "lr_schedule=constant", "resume=yes", "init_from=../base", out="link/run")
    assert code == 0 and "resuming with init_from" in out, error
    assert load_model(tmp_path / "far" / "away" / "run")[0]


@pytest.mark.parametrize("first, then", [("lora_rank=0", "lora_rank=2"), ("lora_rank=2", "lora_rank=0"),
                                         ("lora_rank=2", "lora_rank=3"), ("lora_rank=2", "lora_alpha=3")])
def test_a_run_cannot_change_its_adapters(tune, first, then):
    assert tune(first)[0] == 0
    code, _, error = tune(*dict.fromkeys((first if "alpha" in then else then, then)), "resume=yes", "max_iters=20")
    assert code == 2 and f"{then.split('=')[0]}: checkpoint=" in error


def test_adapters_can_be_watched(tune, tmp_path):
    assert tune("lora_rank=2", "watch=true")[0] == 0
    scales = [json.loads(line).get("watch") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in scales if record for name in record if name.endswith("grad_norm")}
    assert names == {"blocks_grad_norm"}


@pytest.mark.parametrize("said, words", [
    ({"path": 5, "checksum": 0}, "base 'path' is 5"), ({"path": "x", "checksum": "y"}, "base 'checksum' is 'y'"),
    ({"context": "long"}, "base 'context' is 'long'"), ({"more": 1}, "base 'more' is 1"),
    ({}, "does not say for which weights")])
def test_what_a_checkpoint_says_of_its_base_must_make_sense(tune, tmp_path, said, words):
    assert tune("lora_rank=2")[0] == 0
    path = checkpoint.all_in(tmp_path / "run")[-1][1]
    state = checkpoint.load(path) | {"base": said}
    checkpoint.save(path, {k: v for k, v in state.items() if not k.startswith("format")})
    with pytest.raises(ValueError, match=words):
        load_model(path)


def test_adapters_for_themselves_are_refused(tune, tmp_path):
    assert tune("lora_rank=2")[0] == 0
    path = checkpoint.all_in(tmp_path / "run")[-1][1]
    state = checkpoint.load(path) | {"base": {"path": path.name, "checksum": 0}}
    checkpoint.save(path, {k: v for k, v in state.items() if not k.startswith("format")})
    with pytest.raises(ValueError, match="has adapters for itself"):
        load_model(tmp_path / "run")


def test_the_checksum_knows_which_weight_is_which(base):
    weights = open_weights(base)
    before = weights.checksum()
    one, other = "blocks.0.attn.q.weight", "blocks.0.attn.out.weight"
    weights.tensors[one], weights.tensors[other] = weights.tensors[other], weights.tensors[one]
    assert weights.checksum() != before


def test_a_full_fine_tuning_outlives_the_weights_it_began_with(tune, start, base, tmp_path):
    assert tune("max_iters=5", "lr_schedule=constant")[0] == 0
    knobs = f"init_from={base}"
    shutil.rmtree(base)
    code, _, error = start(knobs, "max_iters=12", "lr_schedule=constant", "resume=yes")
    assert code == 0, error


@pytest.mark.parametrize("place", ["best.pt", "ckpt_00000008.pt"])
def test_a_checkpoint_can_be_named_by_its_file(tune, start, base, tmp_path, place):
    nothing_learned = ("learning_rate=1e-12", "max_iters=1", "warmup_iters=0", "weight_decay=0")
    assert start(f"init_from={base / place}", *nothing_learned)[0] == 0
    found = open_weights(tmp_path / "run").tensors
    assert all(torch.allclose(t, found[n], atol=1e-6) for n, t in checkpoint.load(base / place)["model"].items())


def test_data_with_another_tokenizer_is_refused(tune, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("run.DATA", tmp_path)
    prepare([str(data_folder / "words.txt")], tmp_path / "words", tokenizer="byte")
    code, _, error = tune()
    assert code == 2 and "was not made with the tokenizer of" in error and "data/prepare.py TEXT tokenizer=" in error


@pytest.fixture
def text(tmp_path, data_folder):
    """A text of one's own, in the characters that base knows."""
    path = tmp_path / "mine.txt"
    path.write_text((data_folder / "words.txt").read_text()[:6000].replace("cat", "rat"))
    return path


def test_a_text_can_be_named_instead_of_a_data_set(tune, text, tmp_path, monkeypatch):
    monkeypatch.setattr("run.DATA", tmp_path / "data")
    code, out, error = tune(f"dataset={text}", "max_iters=2")
    assert code == 0, error
    (made,) = (tmp_path / "data").glob("mine-*")
    assert f"preparing {text} as data/{made.name}" in out
    assert open_dataset(made).meta["vocab_size"] == checkpoint.load_newest(tmp_path / "base")["config"]["vocab_size"]
    code, out, error = tune(f"dataset={text}", "max_iters=3", "resume=yes")
    assert code == 0 and "preparing" not in out, error
    text.write_text(text.read_text() + "the cat sat")
    code, out, error = tune(f"dataset={text}", "max_iters=3", "resume=yes")
    assert code == 2 and "data content_sha256: checkpoint=" in error


def test_a_data_set_can_be_named_by_its_path(start, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("run.DATA", tmp_path / "data")
    code, _, error = start(f"dataset={data_folder / 'words'}", "max_iters=2")
    assert code == 0 and not (tmp_path / "data").exists(), error


def test_a_folder_of_texts_can_be_named(start, text, tmp_path, monkeypatch):
    monkeypatch.setattr("run.DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    text.rename(tmp_path / "texts" / "a.txt")
    (tmp_path / "texts" / "b.md").write_text("another text, of words again " * 99)
    code, _, error = start("dataset=./texts", "max_iters=2")
    assert code == 0, error


@pytest.mark.parametrize("arguments, words", [
    (["init_from=nowhere"], "nowhere/config.json is missing"), (["lora_rank=2"], "lora_rank=2 needs weights"),
    (["init_from=x", "lora_rank=-1"], "nowhere"), (["dataset=./nowhere"], "dataset=./nowhere does not exist"),
    (["dataset=gone.txt"], "no such data set")])
def test_what_does_not_exist_is_named(start, arguments, words, tmp_path):
    code, _, error = start(*arguments)
    assert code == 2 and (words in error or "nowhere" in words), error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_context_of_weights_is_cut_for_training_and_kept_for_export(start, base, tmp_path, monkeypatch):
    monkeypatch.setattr("weights.LONGEST", 20)
    preset, knobs = tmp_path / "tune.py", [a for a in SMALL if a.split("=")[0] not in (*SHAPE, "max_iters")]
    preset.write_text(f"init_from = {str(base)!r}\n")
    for out, more in (("run", []), ("lora", ["lora_rank=2"])):
        assert train.main([str(preset), *knobs, *more, f"out_dir={tmp_path / out}", "max_iters=12"]) == 0
        assert checkpoint.load_newest(tmp_path / out)["config"]["block_size"] == 20
        assert train.main([str(preset), *knobs, *more, f"out_dir={tmp_path / out}", "resume=yes", "max_iters=14"]) == 0
        assert hf.main(["export", str(tmp_path / out), str(tmp_path / f"{out}-hf")]) == 0
        assert json.loads((tmp_path / f"{out}-hf" / "config.json").read_text())["max_position_embeddings"] == 32


def test_moved_weights_can_be_named_again(tune, base, tmp_path):
    assert tune("lora_rank=2", "max_iters=6", "lr_schedule=constant")[0] == 0
    base.rename(tmp_path / "moved")
    newest = checkpoint.all_in(tmp_path / "moved")[-1][1]
    code, _, error = tune(f"init_from={newest}", "lora_rank=2", "resume=yes", "lr_schedule=constant")
    assert code == 0, error
    assert load_model(tmp_path / "run")[0]


def test_text_for_other_weights_is_other_data(start, base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("run.DATA", tmp_path / "data")
    assert start(f"init_from={base}", f"dataset={text}", "max_iters=2", out="one")[0] == 0
    assert start(f"dataset={text}", "max_iters=2", out="two")[0] == 0
    assert len(list((tmp_path / "data").glob("mine-*"))) == 2


def test_a_folder_whose_config_is_of_another_model_is_refused(start, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"norm_eps": 0.5}))
    code, _, error = start(f"init_from={base}")
    assert code == 2 and "one of the two is not from this run" in error and not (tmp_path / "run").exists()


def test_an_unknown_data_set_for_given_weights_is_told_how_to_make(tune, base):
    code, _, error = tune("dataset=typo")
    assert code == 2 and f"name=typo tokenizer={base}" in error
