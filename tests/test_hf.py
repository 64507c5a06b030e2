"""In and out of the command exchange/hf.py, against transformers.

`PYTHONPATH=. python tests/test_hf.py` prints the table of docs/huggingface.md.
"""

import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, largest_file, slow
from safetensors.torch import load_file
from test_weights import DEFAULT_ROPE, KINDS, edit, save_hf
from test_weights import LLAMA3 as THEIR_LLAMA3
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
import train
from config.schema import Config
from data.prepare import prepare
from exchange import hf
from model import Decoder, ModelConfig
from text.tokenizer import ByteTokenizer, CharTokenizer, train_sentencepiece
from text.tokenizer_export import tokenizer_files
from text.tokenizer_json import ID_NAMES
from weights import checkpoint
from weights.open import load_model, open_weights

HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
LLAMA3 = dict(rope_scaling="llama3", rope_theta=500000.0, rope_original_context=64)
THEIR_LLAMA3 = THEIR_LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 64}
ROPES = {  # name -> (our knobs, their rope_parameters)
    "default": ({}, DEFAULT_ROPE | {"rope_theta": 10000.0}),
    "llama3 scaling": (LLAMA3, THEIR_LLAMA3),
}
# Each value of each column once.
QUICK = [("MHA", False, "llama3 scaling"), ("GQA", True, "default"), ("MQA", False, "default")]
GRID = [(heads, tied, rope) for heads in HEADS for tied in (False, True) for rope in ROPES]
GRID = QUICK + [slow(*row) for row in GRID if row not in QUICK]
TEXT = "def main():\n    return [x for x in range(10)]  # a comment\n"


def model_of(**knobs):
    """A model with random weights and gains, sharp enough that the likeliest token is clear."""
    shape = dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, block_size=256, vocab_size=257)
    model = Decoder(ModelConfig(**shape | knobs))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith("gain")
            parameter.normal_(float(gain), 0.3 if gain else 0.15, generator=generator)
    return model.eval()


def save_run(folder, model, tokenizer=None, data=None, **knobs):
    """A run's folder as train.py leaves it, with this model."""
    tokenizer = tokenizer or ByteTokenizer()
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    config = Config(model=model.config, **knobs).flat()
    (folder / "config.json").write_text(json.dumps(config))
    state = {
        "step": 3,
        "model": {name: p.detach() for name, p in model.named_parameters()},
        "optimizer": {},
        "scaler": {},
        "config": config,
        "data": data or {"tokenizer_sha256": tokenizer.sha256},
        "base": {},
        "best_val_loss": 2.0,
        "grad_norms": [],
    }
    checkpoint.save(checkpoint.path_of(folder, 3), state)
    return folder


def save_hf_twin(folder, kind="MHA", **knobs):
    """A Hugging Face folder of the shapes of model_of, with a byte tokenizer."""
    shape = dict(vocab_size=257, max_position_embeddings=256, bos_token_id=256, eos_token_id=256)
    save_hf(folder, kind, **shape | knobs)
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (folder / name).write_bytes(content)
    return folder


def run_hf(*argv):
    try:
        return hf.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def export_and_import(run):
    """The folder beside `run` to which it is exported, and the run that this becomes again."""
    out, again = run.with_name("out"), run.with_name("again")
    assert run_hf("export", run, out) == 0
    assert run_hf("import", out, f"out_dir={again}") == 0
    return out, again


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.inference_mode()
def compare(run, folder, new_tokens=40):
    """The same weights here and in transformers: the largest difference of a logit, and whether the
    ids of a text, and the ids that are likeliest to follow, are equal.
    """
    ours, tokenizer, _ = load_model(run)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + tokenizer.encode(TEXT)
    x = torch.tensor([ids])
    ours_next = [i for (i,) in sample.generate(ours, ids[:8], new_tokens, temperature=0)]
    greedy = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs_next = theirs.generate(x[:, :8], max_new_tokens=new_tokens, **greedy)[0, 8:].tolist()
    return SimpleNamespace(
        difference=(ours(x) - theirs(x).logits).abs().max().item(),
        ids=AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == ids,
        text=ours_next == theirs_next,
        distinct=len(set(ours_next)),
    )


def assert_the_same(run, folder):
    found = compare(run, folder)
    assert found.difference <= 1e-5 and found.ids and found.text
    assert found.distinct > 3  # else equal texts would say little


def there(folder, heads, tied, rope):
    """Ours -> Hugging Face."""
    model = model_of(n_kv_head=HEADS[heads], tie_embeddings=tied, **ROPES[rope][0])
    run = save_run(folder / "run", model)
    assert run_hf("export", run, folder / "out") == 0
    return run, folder / "out"


def back(folder, heads, tied, rope):
    """Hugging Face -> ours."""
    knobs = dict(num_key_value_heads=HEADS[heads], tie_word_embeddings=tied)
    save_hf_twin(folder / "hf", rope_parameters=ROPES[rope][1], **knobs)
    assert run_hf("import", folder / "hf", f"out_dir={folder / 'run'}") == 0
    return folder / "run", folder / "hf"


# In and out


@pytest.mark.parametrize("way", [there, back])
@pytest.mark.parametrize("heads, tied, rope", GRID)
def test_logits_ids_and_greedy_text_are_those_of_transformers(tmp_path, way, heads, tied, rope):
    assert_the_same(*way(tmp_path, heads, tied, rope))


@pytest.mark.parametrize("heads, tied, rope", GRID)
def test_a_round_trip_is_bitwise(tmp_path, heads, tied, rope):
    knobs = dict(n_kv_head=HEADS[heads] % 4, tie_embeddings=tied, **ROPES[rope][0])
    run = save_run(tmp_path / "run", model_of(**knobs))
    _, again = export_and_import(run)
    before, after = open_weights(run), open_weights(again)
    assert before.config == after.config
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())


def test_a_sentencepiece_run_round_trips_with_its_tokenizer(tmp_path):
    tokenizer = train_sentencepiece([Path(hf.__file__).read_text()], 400)
    run = save_run(tmp_path / "run", model_of(vocab_size=tokenizer.vocab_size), tokenizer)
    out, again = export_and_import(run)
    assert_the_same(run, out)
    assert open_weights(again).tokenizer().sha256 == tokenizer.sha256


def test_a_char_run_says_that_it_has_no_bos_and_no_eos(tmp_path):
    """Llama's, 1 and 2, would be letters here."""
    tokenizer = CharTokenizer(TEXT)
    run = save_run(tmp_path / "run", model_of(vocab_size=tokenizer.vocab_size), tokenizer)
    assert run_hf("export", run, tmp_path / "out") == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert config.bos_token_id is None and config.eos_token_id is None
    assert_the_same(run, tmp_path / "out")


@pytest.mark.parametrize(
    "knobs",
    [
        {"norm": "rmsnorm1p"},
        {"norm": "rmsnorm_noparam"},
        {"norm": "ssnorm", "qk_norm": True},
        {"norm": "rmsnorm1p", "norm_pos": "lns", "n_layer": 3, "qk_norm": True},
        {"norm": "rmsnorm_noparam", "norm_pos": "lns", "n_layer": 3},
        {"embed_scale": "sqrt"},
        {"qk_norm": True, "n_kv_head": 2},
        {"head_dim": 24},
    ],
    ids=str,
)
def test_models_beside_llama_are_exported_too(tmp_path, knobs):
    run = save_run(tmp_path / "run", model_of(**knobs))
    out, again = export_and_import(run)
    assert_the_same(run, out)
    plain = {"norm": "rmsnorm", "norm_pos": "pre", "embed_scale": "none"}
    assert open_weights(again).config == model_of(**knobs | plain).config


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"n_kv_head": 2, "n_layer": 4, "n_embd": 128},
        {"qk_norm": True, "n_kv_head": 1, "head_dim": 24},
        {"norm_pos": "lns", "embed_scale": "sqrt", "n_layer": 3, **LLAMA3},
    ],
    ids=str,
)
def test_layernorm_without_bias_is_exported_as_the_llama_that_it_is(tmp_path, knobs):
    """Pre-LayerNorm without bias is pre-RMSNorm with centred weights (arXiv 2305.14858)."""
    model = model_of(norm="layernorm_nobias", **knobs)
    out, again = export_and_import(run := save_run(tmp_path / "run", model))
    x, found = torch.tensor([list(TEXT.encode())]), compare(run, out)
    size = model(x).abs().max().item()
    assert found.difference <= 1e-4 * size and found.text and found.distinct > 3
    plain = Decoder(replace(model.config, norm="rmsnorm", norm_pos="pre", embed_scale="none"))
    assert open_weights(again).config == plain.config
    plain.load_state_dict(model.state_dict())  # as it was, uncentred, it is another model
    assert (plain.eval()(x) - model(x)).abs().max() > 0.1 * size


def test_why_a_tied_head_keeps_layernorm_from_being_a_llama():
    """Centring the embedding leaves the features alone, but not the logits of a tied head."""
    model = model_of(norm="layernorm_nobias", tie_embeddings=True).double()
    x = torch.tensor([list(TEXT.encode())])
    features, logits = model.features(x), model(x)
    with torch.no_grad():
        model.embed.weight -= model.embed.weight.mean(1, keepdim=True)
    assert torch.allclose(model.features(x), features)
    assert (model(x) - logits).abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_transformers_come_out_as_they_went_in(tmp_path, kind):
    save_hf_twin(tmp_path / "hf", kind, dtype=torch.bfloat16)
    assert run_hf("import", tmp_path / "hf", f"out_dir={tmp_path / 'run'}") == 0
    assert run_hf("export", tmp_path / "run", tmp_path / "out", "dtype=bfloat16") == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype


def test_an_imported_run_samples_and_so_does_the_folder_itself(tmp_path, capsys):
    save_hf_twin(tmp_path / "hf", "MQA, tied")
    run, texts = tmp_path / "my run", []
    assert run_hf("import", tmp_path / "hf", f"out_dir={run}") == 0
    out = capsys.readouterr().out
    assert f"sample.py '{run}' prompt" in out and f"init_from='{run}' dataset" in out
    for place in (run, tmp_path / "hf"):
        assert sample.main([str(place), "prompt=x = 1", "max_new_tokens=9", "device=cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > len("x = 1\n")


SAID = {  # what a folder's files say of texts, beside the tokenizer itself
    "chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    "pad_token": "</s>",
    "padding_side": "left",
    "model_max_length": 99,
}
DRAWS = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1}


def save_chat(folder, with_model=True, generation=DRAWS | {"eos_token_id": [2]}, **said):
    """A Hugging Face folder with a SentencePiece tokenizer, whose files say SAID and `said`."""
    tokenizer = train_sentencepiece([Path(hf.__file__).read_text()], 400)
    save_hf_twin(folder, vocab_size=400, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    files = tokenizer_files(tokenizer)
    config = json.loads(files["tokenizer_config.json"]) | SAID | said
    del config["split_special_tokens"]
    files |= {"tokenizer_config.json": json.dumps(config).encode()}
    files |= {"generation_config.json": json.dumps(generation).encode()}
    for name, content in files.items():
        if with_model or name != "tokenizer.model":
            (folder / name).write_bytes(content)
    return folder


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("with_model", [True, False], ids=["both files", "tokenizer.json"])
def test_what_tokenizer_files_say_survives_a_tuning_and_an_export(tmp_path, capsys, with_model):
    folder, run, out = save_chat(tmp_path / "hf", with_model), tmp_path / "run", tmp_path / "out"
    (tmp_path / "my.txt").write_text(TEXT * 200)
    prepare([str(tmp_path / "my.txt")], tmp_path / "data", tokenizer=str(folder))
    knobs = ["max_iters=1", "warmup_iters=0", "block_size=16", "eval_iters=1", "sample_tokens=0"]
    knobs += ["device=cpu", "compile=false", f"out_dir={run}", f"dataset={tmp_path / 'data'}"]
    preset = str(ROOT / "config" / "finetune.py")
    assert train.main([preset, f"init_from={folder}", *knobs]) == 0
    capsys.readouterr()
    assert run_hf("export", run, out) == 0
    # The model was tuned on short windows, and reads as many tokens as before.
    assert "context 256" in capsys.readouterr().out
    assert read_json(out / "config.json")["max_position_embeddings"] == 256
    for name in ("tokenizer_config.json", "generation_config.json"):
        before, after = (read_json(place / name) for place in (folder, out))
        assert after == before | ({"pad_token_id": 2} if name.startswith("gen") else {})
    assert (out / "tokenizer.model").exists() == with_model
    ids = {name: read_json(out / "config.json")[name] for name in ID_NAMES}
    assert ids == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    theirs, again = (AutoTokenizer.from_pretrained(place) for place in (folder, out))
    chat = [{"role": "user", "content": "a </s> b"}]
    assert again.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert (again.pad_token, again.padding_side, again.model_max_length) == ("</s>", "left", 99)
    ours = open_weights(run).tokenizer()
    assert sample.prompt_ids(ours, "a </s> b", special=True) == theirs("a </s> b").input_ids


def test_stop_tokens_of_all_files_end_a_text_and_are_exported_as_they_came(tmp_path, capsys):
    ends = DRAWS | {"eos_token_id": 0}  # <unk>: a special token, but not the tokenizer's eos
    folder, run = save_chat(tmp_path / "hf", generation=ends), tmp_path / "run"
    assert run_hf("import", folder, f"out_dir={run}") == 0
    assert open_weights(run).tokenizer().end_ids == {0, 1, 2}
    assert run_hf("export", run, tmp_path / "out") == 0
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 0
    )
    capsys.readouterr()
    word = train_sentencepiece([Path(hf.__file__).read_text()], 400).encode("def")[0]
    save_chat(tmp_path / "wrong", generation=DRAWS | {"eos_token_id": word})
    assert run_hf("import", tmp_path / "wrong", f"out_dir={run}2") == 2
    error = capsys.readouterr().err
    assert f"bos or eos, id {word}, is 'd" in error and "which a text can have" in error


@pytest.mark.parametrize("around", [None, "bos"])
def test_an_export_puts_bos_before_a_text_where_the_folder_did(tmp_path, around):
    folder, run, out = save_chat(tmp_path / "hf"), tmp_path / "run", tmp_path / "out"
    if around is None:
        edit(folder / "tokenizer.json", post_processor=None)
        edit(folder / "tokenizer_config.json", add_bos_token=False)
    assert run_hf("import", folder, f"out_dir={run}") == 0
    assert run_hf("export", run, out) == 0
    ids = [AutoTokenizer.from_pretrained(place)("a text").input_ids for place in (folder, out)]
    assert ids[0] == ids[1] == sample.prompt_ids(open_weights(run).tokenizer(), "a text")
    assert (ids[0][0] == 1) == (around == "bos")


def test_sample_py_says_that_a_special_token_is_text_unless_it_is_meant(tmp_path, capsys):
    folder = save_chat(tmp_path / "hf")
    words = [str(folder), "prompt=a</s>b", "max_new_tokens=1", "device=cpu"]
    for special, warnings in (("false", 1), ("true", 0)):
        capsys.readouterr()
        assert sample.main([*words, f"special={special}"]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("the prompt spells </s>") == warnings
        assert printed.out.startswith("a</s>b")


# How it is stored


def test_shards_are_as_small_as_asked_and_load(tmp_path):
    run, out = save_run(tmp_path / "run", model_of()), tmp_path / "out"
    assert run_hf("export", run, out, "shard_gb=0.0001") == 0
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in out.iterdir())
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 102_000 for path in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    size = sum(4 * p.numel() for p in model_of().parameters())
    assert index["metadata"]["total_size"] == size
    assert_the_same(run, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_weight(tmp_path, dtype):
    model, name = model_of(), str(dtype).removeprefix("torch.")
    run = save_run(tmp_path / "run", model)
    assert run_hf("export", run, tmp_path / "out", f"dtype={name}") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(stored, model.head.weight.to(dtype))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == dtype


def test_the_card_tells_of_the_run(tmp_path, capsys):
    data = {"name": "words", "tokens": {"train": 1234}, "tokenizer_sha256": ByteTokenizer().sha256}
    run = save_run(tmp_path / "run", model_of(), data=data, learning_rate=0.0123)
    (run / "metrics.jsonl").write_text(
        '{"step": 2, "val_loss": 2.25, "val_bpb": 1.5}\n'
        '{"step": 9, "val_loss": 1.25, "val_bpb": 0.5}\n'
    )
    assert run_hf("export", run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `learning_rate` | `0.0123` |" in card and "`words`, 1,234 training tokens" in card
    assert "| best validation loss | 2.0000 nats per token |" in card  # by the checkpoint itself
    # The weights are those of step 3.
    assert "2, by its metrics.jsonl | loss 2.2500 nats" in card and "1.25" not in card
    assert "perplexity 9.49, 1.5000 bits per byte" in card
    # Without what cannot be: a loss below the best one.
    (run / "metrics.jsonl").write_text('{"step": 2, "val_loss": 1.25}\n')
    assert run_hf("export", run, tmp_path / "other") == 0
    assert "metrics.jsonl" not in (tmp_path / "other" / "README.md").read_text()
    assert "below the best one in the checkpoint, 2.0000" in capsys.readouterr().err
    # Without them if the tokenizer loses text.
    (run / "metrics.jsonl").write_text('{"step": 2, "val_loss": 2.25}\n')
    assert run_hf("export", run, tmp_path / "lossy") == 0
    card = (tmp_path / "lossy" / "README.md").read_text()
    assert "perplexity 9.49" in card and "bits per byte" not in card


def test_the_card_shows_names_from_elsewhere_as_they_are(tmp_path):
    name = "\x1b]52;c;x\x07\u202e<script>`|[x](http://y)\n# head"
    data = {"name": name, "tokens": {"train": 1}, "tokenizer_sha256": ByteTokenizer().sha256}
    run = save_run(tmp_path / "run", model_of(), data=data, sample_prompt="a | b\n```\nc")
    assert run_hf("export", run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    shown = "`\\x1b]52;c;x\\x07\\x202e<script>\\x60\\x7c[x](http://y)\\x0a# head`"
    assert f"| data | {shown}, 1 training tokens |" in card
    assert "| `sample_prompt` | `a \\x7c b\\x0a\\x60\\x60\\x60\\x0ac` |" in card


def test_the_card_of_an_imported_model_tells_of_no_run(tmp_path):
    save_hf_twin(tmp_path / "hf")
    assert run_hf("import", tmp_path / "hf", f"out_dir={tmp_path / 'run'}") == 0
    assert run_hf("export", tmp_path / "run", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| from | `{tmp_path / 'hf'}` |" in card and "learning_rate" not in card
    assert "A Llama, exported with Rootllama" in card


# What is refused


@pytest.mark.parametrize(
    "knobs, words",
    [
        (
            {"norm": "layernorm"},
            "norm=layernorm: Llama's norms are RMSNorm, so train with norm=rmsnorm",
        ),
        ({"norm": "prmsnorm"}, "norm=prmsnorm"),
        ({"norm": "dyt"}, "norm=dyt"),
        ({"norm": "none"}, "norm=none"),
        ({"norm_pos": "post"}, "norm_pos=post: Llama's norms stand before"),
        ({"norm_pos": "sandwich"}, "norm_pos=sandwich"),
        ({"norm_pos": "mix"}, "norm_pos=mix"),
        ({"norm_pos": "final"}, "norm_pos=final"),
        (
            {"norm": "layernorm_nobias", "tie_embeddings": True},
            "norm=layernorm_nobias with tie_embeddings=true: as RMSNorm it needs the rows",
        ),
        (
            {"embed_scale": "sqrt", "tie_embeddings": True},
            "embed_scale=sqrt with tie_embeddings=true: the factor would go into the embedding",
        ),
        ({"ffn": "geglu"}, "ffn=geglu"),
        ({"ffn": "relu2", "norm": "layernorm"}, "norm=layernorm"),
    ],
)
def test_what_no_llama_computes_is_not_exported(tmp_path, capsys, knobs, words):
    run = save_run(tmp_path / "run", model_of(**knobs))
    assert run_hf("export", run, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_too_large_for_float16_are_refused(tmp_path, capsys):
    model = model_of()
    model.head.weight.data[0, 0] = 1e5
    run = save_run(tmp_path / "run", model)
    assert run_hf("export", run, tmp_path / "out", "dtype=float16") == 2
    assert "lm_head.weight does not fit into float16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys):
    run, folder = save_run(tmp_path / "run", model_of()), save_hf_twin(tmp_path / "hf")
    capsys.readouterr()
    with largest_file(50_000):
        for command, words in (
            (("export", run, tmp_path / "out"), "model.safetensors could not be written"),
            (("import", folder, f"out_dir={run}2"), "error: "),
        ):
            assert run_hf(*command) == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


def test_what_is_there_is_never_touched(tmp_path, capsys):
    run, folder = save_run(tmp_path / "run", model_of()), save_hf_twin(tmp_path / "hf")
    before, preset = (content_of(run), content_of(folder)), ROOT / "config" / "tiny.py"
    (tmp_path / "out").mkdir()
    for command, words in (
        (("export", run, tmp_path / "out"), "exists already"),
        (
            ("import", folder, f"out_dir={run}"),
            "holds ckpt_00000003.pt, config.json, tokenizer.json already",
        ),
        (("import", folder, f"out_dir={folder}"), "holds config.json, tokenizer.json already"),
        (("import", run, f"out_dir={run}2"), "is a run already"),
    ):
        assert run_hf(*command) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train.main([str(preset), f"out_dir={folder}", "resume=auto"])
    assert "is a Hugging Face folder, whose files would be lost" in capsys.readouterr().err
    assert (content_of(run), content_of(folder)) == before and not content_of(tmp_path / "out")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["import"], "write python -m exchange.hf import DIR"),
        (["export", "x"], "write python -m exchange.hf import DIR"),
        (["convert", "a", "b"], "got convert a b"),
        (["import", "nowhere"], "nowhere does not exist"),
        (["import", "x", "out_dir="], "out_dir must be a folder, got ''"),
        (["export", "nowhere", "out"], "nowhere does not exist"),
        (["export", "x", "out", "dtype=int8"], "dtype must be float32, bfloat16 or float16"),
        (["export", "x", "out", "shard_gb=0"], "shard_gb must be above 0"),
        (["import", "x", "dtype=float16"], "unknown knob 'dtype'"),
        (["out_dir=x"], "write python -m exchange.hf import DIR"),
    ],
)
def test_bad_command_lines_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert run_hf(*argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys):
    save_hf(tmp_path / "hf")
    train_sentencepiece([Path(hf.__file__).read_text()], 400).save(tmp_path / "hf")
    assert run_hf("import", tmp_path / "hf", f"out_dir={tmp_path / 'run'}") == 2
    assert "its tokenizer has 400 tokens, its model 280" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def cell(way, heads, tied, rope):
    """A cell of the the table of docs/huggingface.md."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = compare(*way(Path(folder), heads, tied, rope), new_tokens=200)
    return f"{found.difference:.1g}, {'equal' if found.ids and found.text else 'DIFFERENT'}"


if __name__ == "__main__":
    columns = [(tied, rope) for tied in (False, True) for rope in ROPES]
    print("|", *(f"| {'tied' if tied else 'untied'}, {rope}" for tied, rope in columns), "|")
    print("|---" * 5 + "|")
    for name, way in (("to Hugging Face", there), ("from Hugging Face", back)):
        for heads in HEADS:
            cells = [cell(way, heads, tied, rope) for tied, rope in columns]
            print(f"| {heads} {name} |", " | ".join(cells), "|")
