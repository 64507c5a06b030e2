"""Going on from weights that exist: fine-tuning, and the adapters of LoRA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, slow
from safetensors.torch import load_file

import sample
import train
from data.loader import open_dataset
from data.prepare import prepare
from exchange import hf
from model import Decoder, ModelConfig
from run.metrics import read_metrics
from weights import checkpoint
from weights.lora import LoRALinear, adapter_count, add_adapters, merge_adapters
from weights.open import (
    LONGEST_CHAIN,
    knobs_of_base,
    load_model,
    open_weights,
    read_architecture,
)

MODEL = ModelConfig(
    n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_hidden=24, block_size=16, vocab_size=30
)
SHAPE = ("n_layer", "n_head", "n_embd", "n_hidden", "block_size")


def ids(seed=0):
    return torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(seed))


def with_adapters(seed=0, rank=4, alpha=8.0, move=True):
    """A model with adapters, and a copy of its weights; `move`: the adapters have learned
    something.
    """
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
    model(ids(), ids(1)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("knobs", [{"ffn": "gelu"}, {"head_dim": 10}, {}])
def test_adapters_are_counted_without_a_model(knobs):
    config = ModelConfig(**vars(MODEL) | knobs)
    model = Decoder(config)
    add_adapters(model, 3, 1.0, 0)
    assert adapter_count(config, 3) == sum(p.numel() for p in learned(model).values())


def test_merged_weights_compute_the_same():
    model, weights = with_adapters()
    merged = merge_adapters(weights, learned(model), 8.0 / 4)
    plain = checkpoint.build_model(MODEL, merged, "cpu")
    assert (model(ids()) - plain(ids())).abs().max() < 1e-5
    assert (model(ids()) - Decoder(MODEL)(ids())).abs().max() > 1e-3


def test_adapters_depend_on_the_seed_alone_and_are_as_wide_as_a_layer_of_their_inputs():
    (one, _), (same, _), (other, _) = (with_adapters(seed, move=False) for seed in (1, 1, 2))
    a, b, c = (m.blocks[1].ffn.up.lora_a for m in (one, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, one.blocks[0].ffn.up.lora_a)
    for name, parameter in one.named_parameters():
        if name.endswith("lora_a"):
            assert 0.7 < parameter.abs().max() * parameter.shape[1] ** 0.5 <= 1


Q = "blocks.0.attn.q"


@pytest.mark.parametrize(
    "changes",
    [
        {f"{Q}.lora_c": torch.zeros(4, 16)},
        {
            "blocks.9.attn.q.lora_a": torch.zeros(4, 16),
            "blocks.9.attn.q.lora_b": torch.zeros(16, 4),
        },
        {f"{Q}.lora_a": torch.zeros(4, 17)},
        {f"{Q}.lora_a": torch.zeros(4)},
        {f"{Q}.lora_b": None},
        {"x": torch.ones(1)},
    ],
    ids=["kind", "layer", "shape", "dimensions", "half", "name"],
)
def test_adapters_for_other_weights_are_refused(changes):
    model, weights = with_adapters()
    adapters = {n: t for n, t in (learned(model) | changes).items() if t is not None}
    with pytest.raises(ValueError, match="does not fit the weights it is for"):
        merge_adapters(weights, adapters, 1.0)


# End to end: base is a run on made-up words with one token per character.


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_folder):
    out = tmp_path_factory.mktemp("trained") / "base"
    words = (f"out_dir={out}", f"dataset={data_folder / 'words'}")
    assert train.main([str(ROOT / "config" / "tiny.py"), *SMALL[:-1], *words]) == 0
    return out


@pytest.fixture
def base(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "base"))


@pytest.fixture
def tune(start, base):
    """tune('key=value', ...) goes on from base: (exit code, stdout, stderr)."""

    def run(*arguments, out="run"):
        return start(f"init_from={base}", *arguments, out=out)

    return run


@pytest.fixture
def own_data(start, data_folder, tmp_path, monkeypatch):
    """A data/ of this test alone, in which data sets may be made, with the usual one in it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words").symlink_to(data_folder / "words")
    monkeypatch.setattr("run.setup.DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def text(tmp_path, data_folder):
    """A text of one's own, in the characters that base knows."""
    path = tmp_path / "mine.txt"
    path.write_text((data_folder / "words.txt").read_text()[:6000].replace("cat", "rat"))
    return path


def tune_by_preset(base, out, *knobs):
    """Fine-tunes with nothing said about the shape of the model."""
    preset = out.with_name(f"{out.name}.py")
    preset.write_text(f"init_from = {str(base)!r}\nout_dir = {str(out)!r}\n")
    data = f"dataset={said(base)['dataset']}"
    named = {a.split("=")[0]: a for a in [*SMALL, data, *knobs]}
    few = [a for name, a in named.items() if name not in SHAPE or a in knobs]
    return train.main([str(preset), *few])


def said(folder):
    return json.loads((folder / "config.json").read_text())


def save_again(path, **changes):
    """Writes a checkpoint once more, with other fields."""
    state = checkpoint.load(path) | changes
    checkpoint.save(path, {k: v for k, v in state.items() if not k.startswith("format")})


@pytest.mark.parametrize("lora", [(), ("lora_rank=2",)], ids=["full", "lora"])
def test_the_first_loss_is_that_of_the_weights_begun_with(tune, base, tmp_path, lora):
    still = ("eval_interval=0", "max_iters=1", "warmup_iters=0", "learning_rate=1e-9")
    code, _, error = tune(*still, *lora)
    assert code == 0, error
    before, found = (
        [record["val_loss"] for record in read_metrics(folder) if "val_loss" in record]
        for folder in (base, tmp_path / "run")
    )
    assert found[-1] == pytest.approx(before[-1], abs=1e-6)


def test_the_architecture_comes_from_the_weights(base, tmp_path):
    assert tune_by_preset(base, tmp_path / "run") == 0
    config = said(tmp_path / "run")
    assert [config[name] for name in SHAPE] == [2, 2, 32, 64, 32]


@pytest.mark.parametrize(
    "knob", ["n_layer=3", "norm=layernorm", "tie_embeddings=true", "rope_theta=5"]
)
def test_a_knob_that_the_weights_decide_is_refused(tune, tmp_path, knob):
    code, _, error = tune(knob)
    assert code == 2 and f"leave out {knob.split('=')[0]}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_dropout_and_context_may_differ_from_the_weights(tune, tmp_path):
    code, _, error = tune("block_size=16", "dropout=0.1", "norm_impl=fused")
    assert code == 0, error
    config = said(tmp_path / "run")
    assert (config["block_size"], config["dropout"], config["norm_impl"]) == (16, 0.1, "fused")


def test_windows_longer_than_the_context_of_the_weights_are_refused(tune, base, tmp_path, capsys):
    code, _, error = tune("block_size=33")
    assert code == 2 and "block_size=33 is more than the 32 tokens" in error
    assert "choose at most 32" in error and not (tmp_path / "run").exists()
    short = tmp_path / "short"
    assert tune_by_preset(base, short, "block_size=20") == 0
    # Tuned on shorter windows, a model keeps the context of the weights that it began with.
    assert tune_by_preset(short, tmp_path / "again", "block_size=32") == 0
    words = [str(short), "eval=val", "device=cpu", f"dataset={said(base)['dataset']}"]
    capsys.readouterr()
    for size, knobs in ((20, []), (32, ["block_size=32"])):  # its own windows, if none are named
        assert sample.main([*words, *knobs]) == 0
        assert f" windows of {size}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sample.main([*words, "block_size=33"])
    assert "block_size=33 is more than the 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [(), ("lora_rank=2",)], ids=["full", "lora"])
def test_the_context_of_weights_is_cut_for_training_and_kept_for_export(base, tmp_path, lora):
    out = tmp_path / "run"
    assert tune_by_preset(base, out, "block_size=20", *lora) == 0
    assert tune_by_preset(base, out, "resume=yes", "max_iters=14", *lora) == 0
    assert checkpoint.load_newest(out)["config"]["block_size"] == 20
    assert hf.main(["export", str(out), str(tmp_path / "hf")]) == 0
    assert said(tmp_path / "hf")["max_position_embeddings"] == 32
    (base / "config.json").write_text(json.dumps(said(base) | {"block_size": 10**5}))
    assert knobs_of_base({"init_from": str(base)})["block_size"] == 2048


@pytest.mark.parametrize(
    "lora",
    [
        (),
        ("lora_rank=2", "lora_alpha=4", "dropout=0.2", "activation_checkpointing=true"),
        slow(("lora_rank=2", "optimizer=muon")),
    ],
    ids=["full", "lora with dropout", "lora with muon"],
)
def test_a_resumed_fine_tuning_is_the_uncut_one(tune, tmp_path, lora):
    knobs = ("lr_schedule=constant", *lora)
    assert tune("max_iters=12", *knobs, out="same")[0] == 0
    assert tune("max_iters=7", *knobs, out="cut")[0] == 0
    assert tune("max_iters=12", "resume=yes", *knobs, out="cut")[0] == 0
    same, cut = (checkpoint.load_newest(tmp_path / name) for name in ("same", "cut"))
    assert same["step"] == cut["step"] == 12
    assert all(torch.equal(t, cut["model"][name]) for name, t in same["model"].items())


def test_checkpoints_of_adapters_hold_nothing_else(tune, tmp_path):
    code, out, _ = tune("lora_rank=2")
    assert code == 0 and "are trained" in out and "peak_memory_mb" in out
    for which in ("latest", "best"):
        state = checkpoint.load_named(tmp_path / "run", which)
        assert all(name.endswith(("lora_a", "lora_b")) for name in state["model"])
    assert not (tmp_path / "run" / "base.pt").exists()


def test_a_run_with_adapters_samples_with_the_weights_it_is_for(tune, base, tmp_path):
    assert tune("lora_rank=2", "learning_rate=0.05")[0] == 0
    tuned, begun = open_weights(tmp_path / "run").tensors, open_weights(base).tensors
    for name, tensor in tuned.items():
        assert torch.equal(tensor, begun[name]) == ("blocks" not in name or "norm" in name)
    assert sample.main([str(tmp_path / "run"), "prompt=the", "max_new_tokens=4", "device=cpu"]) == 0


def test_an_exported_run_has_its_adapters_in_the_weights(tune, base, tmp_path):
    assert tune("lora_rank=2", "lora_alpha=6", "learning_rate=0.05")[0] == 0
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    adapters = checkpoint.load_newest(tmp_path / "run")["model"]
    a, b = (adapters[f"blocks.1.attn.k.lora_{part}"] for part in "ab")
    before = checkpoint.load_newest(base)["model"]["blocks.1.attn.k.weight"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    after = stored["model.layers.1.self_attn.k_proj.weight"]
    assert torch.allclose(after, before + 3 * b @ a, atol=1e-6)
    assert (after - before).abs().max() > 1e-3


def test_adapters_of_adapters_are_merged_twice(tune, start, tmp_path, base):
    assert tune("lora_rank=2", "learning_rate=0.05")[0] == 0
    more = (f"init_from={tmp_path / 'run'}", "lora_rank=1", "learning_rate=0.05")
    assert start(*more, out="again")[0] == 0
    begun, once, twice = (
        open_weights(tmp_path / name).tensors["blocks.0.ffn.up.weight"]
        for name in ("base", "run", "again")
    )
    assert (once - begun).abs().max() > 1e-3
    assert (twice - once).abs().max() > 1e-3


def test_adapters_notice_that_their_weights_are_gone_or_others(tune, base, tmp_path):
    assert tune("lora_rank=2")[0] == 0
    newest = checkpoint.all_in(base)[-1][1]
    newest.rename(tmp_path / "kept.pt")
    with pytest.raises(ValueError, match="which is gone: put it back"):
        load_model(tmp_path / "run")
    model = checkpoint.load(shutil.copy(tmp_path / "kept.pt", newest))["model"]
    model["norm.gain"][0] += 1
    save_again(newest, model=model)
    with pytest.raises(ValueError, match="no longer holds the weights"):
        load_model(tmp_path / "run")
    code, _, error = tune("lora_rank=2", "resume=yes", "max_iters=20")
    assert code == 2 and "no longer holds the weights" in error


def test_a_base_that_goes_on_is_warned_of_and_named_when_it_has(tune, start, base, tmp_path):
    newest = checkpoint.all_in(base)[-1][1]
    code, _, err = tune("lora_rank=2", "max_iters=6", "lr_schedule=constant")
    assert code == 0 and err.count("warning:") == 1
    assert f"only beside {newest}, which the run there removes or replaces if it goes on" in err
    copy = shutil.copytree(base, tmp_path / "copy")
    assert start("resume=yes", "max_iters=20", "keep=1", out="base")[0] == 0
    with pytest.raises(ValueError, match=f"{newest}, which that run has removed: it is at step 20"):
        load_model(tmp_path / "run")
    more = ("lora_rank=2", "max_iters=7", "lr_schedule=constant", "resume=yes")
    code, _, err = tune(*more)
    assert code == 2 and "which that run has removed: it is at step 20" in err
    code, _, err = tune(*more, f"init_from={copy}")  # as the message says
    assert code == 0 and "warning" not in err
    assert load_model(tmp_path / "run")


def test_base_and_adapters_are_found_from_elsewhere_and_over_links(
    tune, base, tmp_path, monkeypatch
):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    knobs = ("lora_rank=2", "lr_schedule=constant")
    assert tune(*knobs, "max_iters=6", out="link/run")[0] == 0
    monkeypatch.chdir(tmp_path / "far")
    code, out, error = tune(*knobs, "resume=yes", "init_from=../base", out="link/run")
    assert code == 0 and "resuming with init_from" in out, error
    assert load_model(tmp_path / "far" / "away" / "run")[0]


def test_moved_weights_can_be_named_again(tune, base, tmp_path):
    knobs = ("lora_rank=2", "lr_schedule=constant")
    assert tune(*knobs, "max_iters=6")[0] == 0
    base.rename(tmp_path / "moved")
    newest = checkpoint.all_in(tmp_path / "moved")[-1][1]
    code, _, error = tune(*knobs, f"init_from={newest}", "resume=yes")
    assert code == 0, error
    assert load_model(tmp_path / "run")[0]


@pytest.mark.parametrize("lora", [(), ("lora_rank=2",)], ids=["full", "lora"])
def test_a_run_that_goes_on_cannot_name_other_weights(tune, start, base, tmp_path, lora):
    assert tune(*lora)[0] == 0
    shutil.copytree(base, tmp_path / "other")
    before = (tmp_path / "run" / "config.json").read_bytes()
    for named in (f"init_from={tmp_path / 'other'}", "init_from="):
        if lora and named == "init_from=":  # adapters need it
            continue
        code, _, error = start(*lora, named, "resume=yes", "max_iters=20")
        assert code == 2 and f"was begun with init_from={base} and goes on" in error, error
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    same = f"init_from={tmp_path}/other/../base"
    assert start(*lora, same, "resume=yes", "max_iters=20")[0] == 0
    code, _, error = start(same, "resume=yes", "max_iters=20", out="base")
    assert code == 2 and "was begun without init_from" in error and "leave init_from out" in error


@pytest.mark.parametrize(
    "first, then",
    [
        ("lora_rank=0", "lora_rank=2"),
        ("lora_rank=2", "lora_rank=0"),
        ("lora_rank=2", "lora_rank=3"),
        ("lora_rank=2", "lora_alpha=3"),
    ],
)
def test_a_run_cannot_change_its_adapters(tune, first, then):
    assert tune(first)[0] == 0
    changed = (first, then) if "alpha" in then else (then,)
    code, _, error = tune(*changed, "resume=yes", "max_iters=20")
    assert code == 2 and f"{then.split('=')[0]}: checkpoint=" in error


def test_adapters_can_be_watched(tune, tmp_path):
    assert tune("lora_rank=2", "watch=true")[0] == 0
    watched = [record["watch"] for record in read_metrics(tmp_path / "run") if "watch" in record]
    names = {name for record in watched for name in record if name.endswith("grad_norm")}
    assert names == {"blocks_grad_norm"}


def test_what_a_checkpoint_says_of_its_base_must_make_sense(tune, tmp_path):
    assert tune("lora_rank=2")[0] == 0
    path = checkpoint.all_in(tmp_path / "run")[-1][1]
    itself = ("../run", f"../run/../run/{path.name}", f"{tmp_path / 'run'}/../run", path.name)
    for base, words in (
        *(({"path": way, "checksum": 0}, "has adapters for itself") for way in itself),
        ({}, "does not say for which weights"),
        ({"more": 1}, "base 'more' is 1"),
        ({"context": "long"}, "base 'context' is 'long'"),
        ({"path": "x", "checksum": "y"}, "base 'checksum' is 'y'"),
        ({"path": 5, "checksum": 0}, "base 'path' is 5"),
    ):
        sound = path.read_bytes()
        save_again(path, base=base)
        with pytest.raises(ValueError, match=words):
            load_model(path)
        path.write_bytes(sound)
    for i in range(LONGEST_CHAIN + 2):
        (tmp_path / f"{i}.pt").write_bytes(sound)
        save_again(tmp_path / f"{i}.pt", base={"path": f"{i + 1}.pt", "checksum": 0})
    with pytest.raises(ValueError, match="this is too deep"):
        load_model(tmp_path / "0.pt")


def test_the_checksum_knows_which_weight_is_which(base):
    weights = open_weights(base)
    before = weights.checksum()
    one, other = "blocks.0.attn.q.weight", "blocks.0.attn.out.weight"
    weights.tensors[one], weights.tensors[other] = weights.tensors[other], weights.tensors[one]
    assert weights.checksum() != before


def test_a_full_fine_tuning_outlives_the_weights_it_began_with(tune, base):
    assert tune("max_iters=5", "lr_schedule=constant")[0] == 0
    shutil.rmtree(base)
    code, _, error = tune("max_iters=12", "lr_schedule=constant", "resume=yes")
    assert code == 0, error


@pytest.mark.parametrize("place", ["best.pt", "ckpt_00000008.pt"])
def test_a_checkpoint_can_be_named_by_its_file(start, base, tmp_path, place):
    nothing_learned = ("learning_rate=1e-12", "max_iters=1", "warmup_iters=0", "weight_decay=0")
    assert start(f"init_from={base / place}", *nothing_learned)[0] == 0
    found = open_weights(tmp_path / "run").tensors
    for name, tensor in checkpoint.load(base / place)["model"].items():
        assert torch.allclose(tensor, found[name], atol=1e-6)


def test_a_folder_whose_config_is_of_another_model_is_refused(tune, base, tmp_path):
    (base / "config.json").write_text(json.dumps(said(base) | {"norm_eps": 0.5}))
    code, _, error = tune()
    assert code == 2 and "is not of the run that" in error
    assert not (tmp_path / "run").exists()


# The data


@pytest.mark.parametrize("knobs", [{"n_head": 5}, {"norm": "none"}, {"norm": "foonorm"}])
def test_a_checkpoint_whose_model_cannot_be_is_named(base, knobs, tmp_path):
    path = tmp_path / "x.pt"
    shutil.copy(base / "best.pt", path)
    save_again(path, config=checkpoint.load(path)["config"] | knobs)
    with pytest.raises(ValueError, match=f"{path}: "):
        open_weights(path)
    (tmp_path / "config.json").write_text(json.dumps(said(base) | {"n_head": 5}))
    with pytest.raises(ValueError, match="config.json: n_embd="):
        read_architecture(tmp_path)


def test_data_with_another_tokenizer_is_refused(tune, data_folder, tmp_path):
    prepare([str(data_folder / "words.txt")], tmp_path / "bytes", tokenizer="byte")
    code, _, error = tune(f"dataset={tmp_path / 'bytes'}")
    assert code == 2 and "was not made with the tokenizer of" in error
    assert "data/prepare.py TEXT tokenizer=" in error


def test_a_text_can_be_named_instead_of_a_data_set(tune, text, tmp_path, own_data):
    code, out, error = tune(f"dataset={text}", "max_iters=2")
    assert code == 0, error
    (made,) = own_data.glob("mine-*")
    assert f"preparing {text} as {made}" in out
    assert open_dataset(made).meta["vocab_size"] == said(tmp_path / "base")["vocab_size"]
    code, out, error = tune(f"dataset={text}", "max_iters=3", "resume=yes")
    assert code == 0 and "preparing" not in out, error
    text.write_text(text.read_text() + "the cat sat")
    code, out, error = tune(f"dataset={text}", "max_iters=4", "resume=yes")
    assert code == 0 and f"{text} has changed since: going on with {made}, the data" in out, error
    assert list(own_data.glob("mine-*")) == [made]


def test_a_data_set_can_be_named_by_its_path(start, data_folder, own_data):
    code, _, error = start(f"dataset={data_folder / 'words'}", "max_iters=2")
    assert code == 0 and [path.name for path in own_data.iterdir()] == ["words"], error


def test_a_folder_of_texts_can_be_named(start, text, tmp_path, own_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    text.rename(tmp_path / "texts" / "a.txt")
    (tmp_path / "texts" / "b.md").write_text("another text, of words again " * 99)
    code, _, error = start("dataset=./texts", "max_iters=2")
    assert code == 0 and list(own_data.glob("texts-*")), error


def test_text_for_other_weights_is_other_data(tune, start, text, own_data):
    assert tune(f"dataset={text}", "max_iters=2", out="one")[0] == 0
    assert start(f"dataset={text}", "max_iters=2", out="two")[0] == 0
    assert len(list(own_data.glob("mine-*"))) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["init_from=nowhere"], "nowhere does not exist"),
        (["lora_rank=2"], "lora_rank=2 needs weights"),
        (["init_from=nowhere", "lora_rank=-1"], "nowhere does not exist"),
        (["dataset=./nowhere"], "dataset=./nowhere does not exist"),
        (["dataset=gone.txt"], "no such data set"),
    ],
)
def test_what_does_not_exist_is_named(start, arguments, words, tmp_path):
    code, _, error = start(*arguments)
    assert code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_data_set_for_given_weights_is_told_how_to_make(tune, base):
    code, _, error = tune("dataset=typo")
    assert code == 2 and f"name=typo tokenizer={base}" in error
