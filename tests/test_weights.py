"""Hugging Face's folders are read exactly, and what cannot be read is named in one line."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from config.command import one_line
from model import Decoder, ModelConfig
from text.tokenizer import ByteTokenizer, train_sentencepiece
from weights.checkpoint import build_model
from weights.hf_folder import config_from_hf, hf_name, read_hf, weight_shapes
from weights.open import load_model, open_weights, read_architecture

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SMALL = dict(
    vocab_size=280,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 100.0}
KINDS = {
    "MHA": (LlamaConfig, dict(num_key_value_heads=4)),
    "GQA, llama3 scaling": (
        LlamaConfig,
        dict(num_key_value_heads=2, rope_parameters=LLAMA3 | {"rope_theta": 500000.0}),
    ),
    "MQA, tied": (LlamaConfig, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "wide heads": (LlamaConfig, dict(num_key_value_heads=2, head_dim=24)),
    "eps and theta": (LlamaConfig, dict(rms_norm_eps=1e-3, rope_parameters=DEFAULT_ROPE)),
    "mistral": (MistralConfig, dict(num_key_value_heads=2, sliding_window=None, head_dim=32)),
    "qwen3": (Qwen3Config, dict(num_key_value_heads=2, head_dim=16)),
}


def save_hf(folder, kind="MHA", dtype=torch.float32, shard="5GB", **more):
    """A folder as transformers writes it, with random weights and gains; returns its model."""
    config, knobs = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SMALL | knobs | more)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name
            parameter.normal_(float(gain), 0.3 if gain else 0.15)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path):
    save_hf(tmp_path / "hf", shard="40KB")
    return tmp_path / "hf"


def edit(path, **changes):
    """Changes keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if changes.get(key, 0) is not None}
    path.write_text(json.dumps(kept))


def edit_tensors(folder, **changes):
    """Changes tensors of model.safetensors; None takes one away."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: t for name, t in tensors.items() if t is not None}
    save_file(kept, folder / "model.safetensors")


def refusal(folder):
    """The one line with which a folder is refused."""
    with pytest.raises((ValueError, OSError)) as error:
        read_hf(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is read


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_the_folder_in_transformers(tmp_path, kind):
    theirs = save_hf(tmp_path, kind)
    ids = torch.randint(280, (2, 64), generator=torch.Generator().manual_seed(1))
    ours = build_model(*read_hf(tmp_path), "cpu").eval()
    with torch.inference_mode():
        ours, wanted = ours(ids), theirs.eval()(ids).logits
    assert wanted.std() > 0.5
    assert (ours - wanted).abs().max() <= 1e-5


def test_shards_give_the_same_as_one_file(folder, tmp_path):
    save_hf(tmp_path / "many", shard="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    (config, one), (again, many) = read_hf(folder), read_hf(tmp_path / "many")
    assert config == again and one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_come_in_exactly(tmp_path, dtype):
    theirs = save_hf(tmp_path, dtype=dtype)
    _, weights = read_hf(tmp_path)
    assert all(t.dtype == torch.float32 for t in weights.values())
    assert torch.equal(weights["embed.weight"].to(dtype), theirs.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "knobs", [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"head_dim": 20, "n_kv_head": 1}]
)
def test_the_table_of_shapes_is_that_of_the_model_and_every_weight_has_a_name_there(knobs):
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_hidden=48, vocab_size=7, **knobs)
    shapes = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    assert weight_shapes(config) == shapes
    assert len({hf_name(name) for name in shapes}) == len(shapes)


def test_configs_of_transformers_4_mean_the_same(folder):
    config = folder / "config.json"
    now = read_architecture(folder)
    edit(config, rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert read_architecture(folder) == now
    scaling = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    edit(config, rope_theta=500000.0, rope_scaling=scaling)
    scaled = read_architecture(folder)
    assert (scaled.rope_scaling, scaled.rope_theta) == ("llama3", 500000.0)
    assert scaled.rope_original_context == 32
    edit(config, rope_theta=5.0, rope_scaling=LLAMA3 | {"factor": 2.0, "rope_theta": 77.0})
    scaled = read_architecture(folder)
    assert (scaled.rope_theta, scaled.rope_factor) == (77.0, 2.0)


def test_llama_1_is_read_whose_config_says_little():
    said = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    config = config_from_hf(said | {"model_type": "llama"}, "config.json")
    assert (config.kv_heads, config.norm_eps) == (4, 1e-6)
    assert (config.rope_theta, config.block_size) == (10000.0, 2048)


def test_surplus_that_old_folders_have_is_left_out(folder):
    """Rotary tables; and beside tied embeddings a head, which must be the same."""
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder / "config.json", tie_word_embeddings=True)
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(folder, **{"lm_head.weight": embedding.clone()}, **rotary)
    assert read_hf(folder)[1].keys() == weight_shapes(read_architecture(folder)).keys()


# What is refused


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not one that this model can be: llama, mistral, qwen3",
        ),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' (another activation"),
        ({"attention_bias": True}, "attention_bias = True (biases in attention)"),
        ({"mlp_bias": True}, "mlp_bias = True (biases in the feed-forward)"),
        ({"num_local_experts": 8}, "num_local_experts = 8 (a mixture of experts)"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"quantization_config": {"bits": 4}}, "(quantised weights)"),
        ({"auto_map": {"AutoModel": "x.py"}}, "(code of its own)"),
        ({"partial_rotary_factor": 0.5}, "RoPE on a part"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaled as 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            "lacks factor, low_freq_factor, high_freq_factor",
        ),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "one number or text for each name",
        ),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": 0}, "config.json: vocab_size must be 1 or more, got 0"),
        ({"intermediate_size": 0}, "config.json: intermediate_size must be 1 or more, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be 1 or more, got 0"),
        ({"head_dim": -2}, "config.json: head_dim must be 1 or more, got -2"),
        ({"hidden_size": "wide"}, "config.json: hidden_size must be a whole number"),
        ({"num_attention_heads": "2"}, "num_attention_heads must not stand in quotes, got '2'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must not stand in quotes"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must not stand in quotes"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a whole number, got 2.0"),
        ({"head_dim": False}, "head_dim must be a whole number, got False"),
        ({"vocab_size": True}, "vocab_size must be a whole number, got True"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings must be a whole number"),
        ({"tie_word_embeddings": 2}, "tie_word_embeddings must be true or false, got 2"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": "low"}},
            "config.json: low_freq_factor must be a number, got 'low'",
        ),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_size": [64]}, "hidden_size must be a number or a text, got list"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be between 1 and 700"),
        ({"rms_norm_eps": -1}, "config.json: rms_norm_eps must be above 0"),
        ({"rms_norm_eps": "NaN"}, "rms_norm_eps must be finite"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=4 must be a multiple of num_key_value_heads=3",
        ),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "surplus model.layers.1."),
        ({"intermediate_size": 97}, "is [64, 96], config.json wants [64, 97]"),
        ({"vocab_size": 10**9}, "config.json wants [1000000000, 64]"),
        ({"tie_word_embeddings": True}, "lm_head.weight is another matrix"),
    ],
)
def test_what_the_model_cannot_be_is_refused_by_name(folder, changes, words):
    edit(folder / "config.json", **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "empty", ["max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta"]
)
def test_a_null_where_the_model_needs_a_value_is_named(folder, empty):
    content = json.loads((folder / "config.json").read_text())
    content |= {"rope_parameters": None, empty: None}
    (folder / "config.json").write_text(json.dumps(content))
    assert f"config.json: {empty} must not be null" in refusal(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.norm.weight": None}, "lacks model.norm.weight"),
        ({"model.extra.weight": torch.zeros(3)}, "surplus model.extra.weight"),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)},
            "surplus model.layers.0.self_attn.q_proj.bias",
        ),
        (
            {"model.norm.weight": torch.ones(65)},
            "model.norm.weight is [65], config.json wants [64]",
        ),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "is I8: only F32, F16 and BF16"),
        ({"model.norm.weight": torch.full((64,), torch.nan)}, "model.norm.weight holds NaN or Inf"),
        ({"model.norm.weight": torch.full((64,), torch.inf)}, "model.norm.weight holds NaN or Inf"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, changes, words):
    edit_tensors(folder, **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin", ""],
)
def test_an_index_cannot_name_a_file_elsewhere(sharded, file):
    index = sharded / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=mapping | {"model.norm.weight": file})
    assert "is not the name of a .safetensors file in the same folder" in refusal(sharded)


@pytest.mark.parametrize(
    "mapping, words",
    [
        ([], "weight_map must say"),
        ({}, "weight_map must say"),
        ({"a": 1}, "weight_map must say"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
        (None, "weight_map must say"),
    ],
)
def test_a_broken_index_is_refused(sharded, mapping, words):
    edit(sharded / "model.safetensors.index.json", weight_map=mapping)
    assert words in refusal(sharded)


def test_index_and_files_must_agree(sharded):
    index = sharded / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=mapping | {"ghost": mapping["model.norm.weight"]})
    assert "ghost is only in the index" in refusal(sharded)
    del mapping["model.norm.weight"]
    edit(index, weight_map=mapping)
    assert "model.norm.weight is not in the index" in refusal(sharded)
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    assert "is both in" in refusal(sharded)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"[]", "must hold a JSON object"),
        ("config.json", b"[" * 100_000, "is not JSON"),
        ("config.json", None, "is missing"),
        ("model.safetensors", b"", "is damaged"),
        ("model.safetensors", b"\xff" * 100, "is damaged"),
        ("model.safetensors", None, "has neither model.safetensors nor"),
    ],
)
def test_damaged_and_missing_files_are_named(folder, name, content, words):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert words in refusal(folder)


def test_a_cut_file_is_refused_and_a_pipe_in_place_of_a_file_is_not_waited_for(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged" in refusal(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "not a regular file" in refusal(folder)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["config.json", "model.safetensors", "model.safetensors.index.json"]),
    at=st.floats(0, 1, exclude_max=True),
    piece=st.binary(min_size=1, max_size=9)
    | st.sampled_from([b"9" * 30, b"null", b"-1", b"[", b"1e999", b'""', b"{}", b"true"]),
)
def test_spoilt_headers_are_read_or_refused_in_one_line(sharded, name, at, piece):
    path = sharded / name if name.endswith("json") else min(sharded.glob("model-*"))
    sound = path.read_bytes()
    place = int(at * min(len(sound), 900))
    try:
        path.write_bytes(sound[:place] + piece + sound[place + len(piece) :])
        read_hf(sharded)
    except (ValueError, OSError) as error:
        assert "\n" not in one_line(error)
    finally:
        path.write_bytes(sound)


def test_without_safetensors_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[hf\]'"):
        read_hf(folder)


# Opening


def test_a_hugging_face_folder_has_no_checkpoints_to_choose_from(folder):
    for place in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match="leave checkpoint=best out"):
            open_weights(place, "best")


def test_a_model_is_opened_by_a_text_or_a_path_and_in_eval_mode(folder):
    ByteTokenizer().save(folder)
    for place in (str(folder), folder):
        model, tokenizer, data = load_model(place)
        assert not model.training and data == {"tokenizer_sha256": tokenizer.sha256}
        assert torch.equal(model.embed.weight, open_weights(place).tensors["embed.weight"])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    train_sentencepiece([(ROOT / "exchange" / "hf.py").read_text()], 400).save(folder)
    with pytest.raises(ValueError, match="has 400 tokens, the model knows only 280"):
        load_model(folder)
