"""In and out of the command hf.py, against transformers.

`PYTHONPATH=. python tests/test_hf.py` prints the README's table.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, largest_file
from safetensors.torch import load_file
from test_weights import KINDS, edit, save_hf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import checkpoint
import hf
import sample
import train
from config.schema import Config
from data.tokenizer import ByteTokenizer, CharTokenizer, train_sentencepiece
from generate import generate
from hf_tokenizer import tokenizer_files
from model import Decoder, ModelConfig
from weights import load_model, open_weights, shapes

HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
LLAMA3 = dict(rope_scaling="llama3", rope_theta=500000.0, rope_original_context=64)
ROPES = {"default": {}, "llama3 scaling": LLAMA3}
GRID = [(heads, tied, rope) for heads in HEADS for tied in (False, True) for rope in ROPES]


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
    checkpoint.save(checkpoint.path_of(folder, 3), {
        "step": 3, "model": {name: p.detach() for name, p in model.named_parameters()}, "optimizer": {}, "scaler": {},
        "config": config, "data": data or {"tokenizer_sha256": tokenizer.sha256}, "base": {}, "best_val_loss": 2.0,
        "grad_norms": []})
    return folder


def save_hf_twin(folder, heads, tied, rope):
    """A Hugging Face folder of the same shapes, made by transformers, with a byte tokenizer."""
    scaling = {"rope_type": "default", "rope_theta": 10000.0} if rope == "default" else {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}
    torch.manual_seed(0)
    twin = LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=HEADS[heads], max_position_embeddings=256, tie_word_embeddings=tied,
        rope_parameters=scaling, bos_token_id=256, eos_token_id=256))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.normal_(float("norm" in name), 0.3 if "norm" in name else 0.15)
    twin.save_pretrained(folder)
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (folder / name).write_bytes(content)


def run_hf(*argv):
    try:
        return hf.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


@torch.inference_mode()
def compare(run, folder, new_tokens):
    """The same weights here and in transformers: the largest difference of a logit, and whether the ids of a text, and
    the ids that are likeliest to follow, are equal."""
    ours, tokenizer, _ = load_model(run)
    theirs, their_tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    text = "def main():\n    return [x for x in range(10)]  # a comment\n"
    ids = [tokenizer.bos_id, *tokenizer.encode(text)] if tokenizer.bos_id is not None else tokenizer.encode(text)
    x = torch.tensor([ids])
    difference = (ours.eval()(x) - theirs.eval()(x).logits).abs().max().item()
    ours_next = [i for i, in generate(ours, ids[:8], new_tokens, temperature=0)]
    theirs_next = theirs.generate(x[:, :8], max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
                                  pad_token_id=0)[0, 8:].tolist()
    return SimpleNamespace(difference=difference, ids=their_tokenizer(text).input_ids == ids,
                           text=ours_next == theirs_next, distinct=len(set(ours_next)))


def there(folder, heads, tied, rope, new_tokens):
    """Ours -> Hugging Face."""
    run = save_run(folder / "run", model_of(n_kv_head=HEADS[heads], tie_embeddings=tied, **ROPES[rope]))
    assert run_hf("export", run, folder / "out") == 0
    return compare(run, folder / "out", new_tokens)


def back(folder, heads, tied, rope, new_tokens):
    """Hugging Face -> ours."""
    save_hf_twin(folder / "hf", heads, tied, rope)
    assert run_hf("import", folder / "hf", f"out_dir={folder / 'run'}") == 0
    return compare(folder / "run", folder / "hf", new_tokens)


@pytest.mark.parametrize("way", [there, back])
@pytest.mark.parametrize("heads, tied, rope", GRID)
def test_logits_ids_and_greedy_text_are_those_of_transformers(tmp_path, way, heads, tied, rope):
    found = way(tmp_path, heads, tied, rope, 40)
    assert found.difference <= 1e-5 and found.ids and found.text
    assert found.distinct > 3  # else equal texts would say little


@pytest.mark.parametrize("heads, tied, rope", GRID)
def test_a_round_trip_is_bitwise(tmp_path, heads, tied, rope):
    knobs = dict(n_kv_head=HEADS[heads] % 4, tie_embeddings=tied, **ROPES[rope])
    run = save_run(tmp_path / "run", model_of(**knobs))
    assert run_hf("export", run, tmp_path / "out") == 0
    assert run_hf("import", tmp_path / "out", f"out_dir={tmp_path / 'again'}") == 0
    before, after = open_weights(run), open_weights(tmp_path / "again")
    assert before.config == after.config
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())


def test_a_sentencepiece_run_round_trips_with_its_tokenizer(tmp_path):
    tokenizer = train_sentencepiece([Path(hf.__file__).read_text()], 400)
    run = save_run(tmp_path / "run", model_of(vocab_size=tokenizer.vocab_size), tokenizer)
    assert run_hf("export", run, tmp_path / "out") == 0
    found = compare(run, tmp_path / "out", 40)
    assert found.difference <= 1e-5 and found.ids and found.text
    assert run_hf("import", tmp_path / "out", f"out_dir={tmp_path / 'again'}") == 0
    assert open_weights(run).tokenizer().sha256 == open_weights(tmp_path / "again").tokenizer().sha256


def test_a_char_run_says_that_it_has_no_bos_and_no_eos(tmp_path):
    tokenizer = CharTokenizer("def main():\n    return [x for x in range(10)]  # a comment\n")
    run = save_run(tmp_path / "run", model_of(vocab_size=tokenizer.vocab_size), tokenizer)
    assert run_hf("export", run, tmp_path / "out") == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert config.bos_token_id is None and config.eos_token_id is None  # not Llama's 1 and 2, which are letters here
    found = compare(run, tmp_path / "out", 40)
    assert found.difference <= 1e-5 and found.ids and found.text


@pytest.mark.parametrize("norm", ["rmsnorm1p", "rmsnorm_noparam"])
def test_other_gains_become_plain_ones_exactly(tmp_path, norm):
    run = save_run(tmp_path / "run", model_of(norm=norm))
    assert run_hf("export", run, tmp_path / "out") == 0
    found = compare(run, tmp_path / "out", 40)
    assert found.difference <= 1e-5 and found.text


@pytest.mark.parametrize("knobs", [{"qk_norm": True, "n_kv_head": 2}, {"head_dim": 24}], ids=["qk_norm", "head_dim"])
def test_models_beside_llama_are_exported_too(tmp_path, knobs):
    run = save_run(tmp_path / "run", model_of(**knobs))
    assert run_hf("export", run, tmp_path / "out") == 0
    found = compare(run, tmp_path / "out", 40)
    assert found.difference <= 1e-5 and found.text
    assert run_hf("import", tmp_path / "out", f"out_dir={tmp_path / 'again'}") == 0
    assert open_weights(run).config == open_weights(tmp_path / "again").config


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_transformers_come_out_as_they_went_in(tmp_path, kind):
    save_hf(tmp_path / "hf", kind, dtype=torch.bfloat16)
    for file in ("config.json", "generation_config.json"):
        edit(tmp_path / "hf" / file, bos_token_id=256, eos_token_id=256)
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (tmp_path / "hf" / name).write_bytes(content)
    assert run_hf("import", tmp_path / "hf", f"out_dir={tmp_path / 'run'}") == 0
    assert run_hf("export", tmp_path / "run", tmp_path / "out", "dtype=bfloat16") == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) and t.dtype == after[name].dtype for name, t in before.items())


@pytest.mark.parametrize("knobs, words", [
    ({"norm": "layernorm"}, "norm=layernorm: Llama's norms are RMSNorm, so train with norm=rmsnorm"),
    ({"norm": "prmsnorm"}, "norm=prmsnorm"), ({"norm": "dyt"}, "norm=dyt"), ({"norm": "none"}, "norm=none"),
    ({"norm_pos": "post"}, "norm_pos=post: Llama's norms stand before"),
    ({"norm_pos": "sandwich"}, "norm_pos=sandwich"),
    ({"ffn": "geglu"}, "ffn=geglu"), ({"ffn": "relu2", "norm": "layernorm"}, "norm=layernorm")])
@pytest.mark.parametrize("form", ["hf", "llama2c"])
def test_what_no_llama_computes_is_not_exported(tmp_path, capsys, knobs, words, form):
    run = save_run(tmp_path / "run", model_of(**knobs))
    assert run_hf("export", run, tmp_path / "out", f"format={form}") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_shards_are_as_small_as_asked_and_load(tmp_path):
    run = save_run(tmp_path / "run", model_of())
    assert run_hf("export", run, tmp_path / "out", "shard_gb=0.0001") == 0
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").iterdir())
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 102_000 for path in shards)
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(
        4 * p.numel() for p in model_of().parameters())
    assert compare(run, tmp_path / "out", 8).difference <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_weight(tmp_path, dtype):
    model = model_of()
    run = save_run(tmp_path / "run", model)
    assert run_hf("export", run, tmp_path / "out", f"dtype={dtype}") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(stored, model.head.weight.to(getattr(torch, dtype)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_weights_too_large_for_float16_are_refused(tmp_path, capsys):
    model = model_of()
    model.head.weight.data[0, 0] = 1e5
    run = save_run(tmp_path / "run", model)
    assert run_hf("export", run, tmp_path / "out", "dtype=float16") == 2
    assert "lm_head.weight does not fit into float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_the_card_tells_of_the_run(tmp_path):
    fingerprint = {"name": "words", "tokens": {"train": 1234}, "tokenizer_sha256": ByteTokenizer().sha256}
    run = save_run(tmp_path / "run", model_of(), data=fingerprint, learning_rate=0.0123)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (
        {"step": 2, "val_loss": 2.25, "val_bpb": 1.5}, {"step": 9, "val_loss": 1.25, "val_bpb": 0.5})))
    assert run_hf("export", run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `learning_rate` | `0.0123` |" in card and "loss 2.2500 nats" in card and "1.25" not in card
    assert "words, 1,234 training tokens" in card


def test_the_card_of_an_imported_model_tells_of_no_run(tmp_path):
    save_hf_twin(tmp_path / "hf", "MHA", False, "default")
    assert run_hf("import", tmp_path / "hf", f"out_dir={tmp_path / 'run'}") == 0
    assert run_hf("export", tmp_path / "run", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| from | {tmp_path / 'hf'} |" in card and "learning_rate" not in card
    assert "A Llama, exported with Rootllama" in card


def test_a_full_disk_under_an_export_is_one_line_and_leaves_nothing(tmp_path, capsys):
    run = save_run(tmp_path / "run", model_of())
    with largest_file(50_000):
        assert run_hf("export", run, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "model.safetensors could not be written" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_imported_run_samples_and_so_does_the_folder_itself(tmp_path, capsys):
    save_hf_twin(tmp_path / "hf", "GQA", True, "default")
    assert run_hf("import", tmp_path / "hf", f"out_dir={tmp_path / 'my run'}") == 0
    out = capsys.readouterr().out
    assert f"sample.py '{tmp_path / 'my run'}' prompt" in out and f"init_from='{tmp_path / 'my run'}' dataset" in out
    texts = []
    for place in ("my run", "hf"):
        capsys.readouterr()
        assert sample.main([str(tmp_path / place), "prompt=x = 1", "max_new_tokens=9", "device=cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > len("x = 1\n")


def test_export_never_touches_what_is_there(tmp_path, capsys):
    run = save_run(tmp_path / "run", model_of())
    (tmp_path / "out").mkdir()
    assert run_hf("export", run, tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_import_never_touches_a_run(tmp_path, capsys):
    save_hf_twin(tmp_path / "hf", "MHA", False, "default")
    run = save_run(tmp_path / "run", model_of())
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert run_hf("import", tmp_path / "hf", f"out_dir={run}") == 2
    assert "holds ckpt_00000003.pt, config.json, tokenizer.json already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_hugging_face_folder_is_never_written_into(tmp_path, capsys):
    folder = tmp_path / "hf"
    save_hf_twin(folder, "MHA", False, "default")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_hf("import", folder, f"out_dir={folder}") == 2
    assert "holds config.json, tokenizer.json already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        train.main([str(ROOT / "config" / "tiny.py"), f"out_dir={folder}", "resume=auto"])
    assert stop.value.code == 2 and "is a Hugging Face folder, whose files would be lost" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch, capsys):
    save_hf_twin(tmp_path / "hf", "MHA", False, "default")
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (_ for _ in ()).throw(OSError("disk full")))
    assert run_hf("import", tmp_path / "hf", f"out_dir={tmp_path / 'run'}") == 2
    assert "disk full" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv, words", [
    (["import"], "write python hf.py import DIR"), (["export", "x"], "write python hf.py import DIR"),
    (["convert", "a", "b"], "got convert a b"),
    (["import", "nowhere"], "nowhere does not exist"),
    (["import", "x", "out_dir="], "out_dir must be a folder, got ''"),
    (["export", "nowhere", "out"], "nowhere does not exist"),
    (["export", "x", "out", "dtype=int8"], "dtype must be float32, bfloat16 or float16"),
    (["export", "x", "out", "shard_gb=0"], "shard_gb must be above 0"),
    (["export", "x", "out", "format=llama2c", "dtype=float16"], "format=llama2c holds float32 alone"),
    (["import", "x", "dtype=float16"], "unknown knob 'dtype'"), (["out_dir=x"], "write python hf.py import DIR")])
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


def test_llama2c_leaves_out_padding_and_folds_gains(tmp_path):
    tokenizer = train_sentencepiece([Path(hf.__file__).read_text()], 400)
    model = model_of(vocab_size=tokenizer.vocab_size + 9, norm="rmsnorm1p")
    run = save_run(tmp_path / "run", model, tokenizer)
    assert run_hf("export", run, tmp_path / "out", "format=llama2c") == 0
    assert run_hf("import", tmp_path / "out", f"out_dir={tmp_path / 'again'}") == 0
    again, ids = load_model(tmp_path / "again")[0].eval(), torch.arange(1, 100)[None]
    assert again.config.vocab_size == tokenizer.vocab_size
    with torch.inference_mode():
        assert (again(ids) - model(ids)[..., :-9]).abs().max() <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_llama2c_round_trip_is_bitwise(tmp_path, tied):
    tokenizer = train_sentencepiece([Path(hf.__file__).read_text()], 400)
    run = save_run(tmp_path / "run", model_of(vocab_size=tokenizer.vocab_size, n_kv_head=2, tie_embeddings=tied),
                   tokenizer)
    assert run_hf("export", run, tmp_path / "out", "format=llama2c") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.bin", "tokenizer.bin"]
    for source in ("out", "out/model.bin"):
        again = tmp_path / source.replace("/", "-again-")
        assert run_hf("import", tmp_path / source, f"out_dir={again}-run") == 0
        before, after = open_weights(run), open_weights(Path(f"{again}-run"))
        assert shapes(before.config) == shapes(after.config)
        assert all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())


if __name__ == "__main__":
    columns = [(tied, rope) for tied in (False, True) for rope in ROPES]
    print("|", *(f"| {'tied' if tied else 'untied'}, {rope}" for tied, rope in columns), "|\n" + "|---" * 5 + "|")
    for name, way in (("to Hugging Face", there), ("from Hugging Face", back)):
        for heads in HEADS:
            cells = []
            for tied, rope in columns:
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                    found = way(Path(folder), heads, tied, rope, 200)
                cells.append(f"{found.difference:.1g}, {'equal' if found.ids and found.text else 'DIFFERENT'}")
            print(f"| {heads} {name} |", " | ".join(cells), "|")
