"""What exchange/gguf.py writes, read back with the package gguf, and what it refuses.

The slow tests run it in llama.cpp:

pip install llama-cpp-python
LLAMA_CPP=PATH-OF-ITS-SOURCES python -m pytest -m slow tests/test_gguf.py
"""

import json
import os
from pathlib import Path

import gguf
import pytest
import torch
from conftest import largest_file
from test_hf import LLAMA3, model_of, run_hf, save_run
from test_hf_tokenizer import GPT2, SOURCES, sentencepiece_model, tiktoken_of
from test_tokenizer import (
    TRICKY,
    byte_level_json,
    llama_json,
    random_texts,
    trained_by_library,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from exchange import gguf as command
from exchange import gguf_vocabulary as vocabulary
from exchange.gguf_vocabulary import gguf_vocabulary
from model import rope_frequencies
from sample import generate
from text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from weights import checkpoint
from weights.open import load_model, open_weights

TEXT = Path(json.__file__).read_text(encoding="utf-8")
MODELS = {
    "MHA": {},
    "GQA, tied, wide heads, llama3 scaling": dict(
        n_kv_head=2, tie_embeddings=True, head_dim=24, **LLAMA3
    ),
    "qwen3": dict(qk_norm=True, n_kv_head=2),
    "rmsnorm1p": dict(norm="rmsnorm1p"),
}
OUTER = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
INNER = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.out": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}


def run_gguf(*argv):
    try:
        return command.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def written(folder, model, tokenizer=None, *knobs):
    """(the run's folder, the file that was written of it)."""
    run = save_run(folder / "run", model, tokenizer)
    assert run_gguf(run, folder / "x.gguf", *knobs) == 0
    return run, folder / "x.gguf"


def tensors_of(file):
    """llama.cpp's name -> tensor, as stored."""
    return {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(file).tensors}


def settings_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def their_name(name):
    """llama.cpp's name of one of our weights."""
    place = name.rpartition(".")[0]
    if place in OUTER:
        return f"{OUTER[place]}.weight"
    _, layer, part = place.split(".", 2)
    return f"blk.{layer}.{INNER[part]}.weight"


# Weights


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_is_there_bit_for_bit_in_the_order_of_llama_cpp(tmp_path, kind):
    model = model_of(**MODELS[kind])
    _, file = written(tmp_path, model)
    found, head = tensors_of(file), model.config.head_size
    for name, ours in model.named_parameters():
        theirs = found.pop(their_name(name))
        if kind == "rmsnorm1p" and name.endswith("gain"):
            ours = 1 + ours
        if kind != "qwen3" and name.endswith(("attn.q.weight", "attn.k.weight")):
            heads = theirs.view(-1, head, theirs.shape[1])  # pairs of neighbours are rotated there
            theirs = torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)
        assert torch.equal(theirs, ours), name
    assert found.keys() == ({"rope_freqs.weight"} if "llama3" in kind else set())
    if found:
        config = model.config
        exponent = torch.arange(0, head, 2) / head
        ours = config.rope_theta**-exponent / found["rope_freqs.weight"]
        torch.testing.assert_close(ours, rope_frequencies(config))
        assert found["rope_freqs.weight"].unique().numel() > 2


def test_half_precision_and_8_bits_round_matrices_and_leave_norms_alone(tmp_path):
    run, _ = written(tmp_path, model_of())
    wanted = tensors_of(tmp_path / "x.gguf")
    for dtype, most in (("f16", 2**-11), ("q8_0", 0.51 / 127 + 2**-11)):
        assert run_gguf(run, tmp_path / f"{dtype}.gguf", f"dtype={dtype}") == 0
        found = gguf.GGUFReader(tmp_path / f"{dtype}.gguf").tensors
        assert {t.name for t in found} == wanted.keys()
        for tensor in found:
            values = gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type)
            blocks, ours = torch.from_numpy(values), wanted[tensor.name]
            if ours.dim() == 1:
                assert tensor.tensor_type.name == "F32" and torch.equal(blocks, ours)
                continue
            assert tensor.tensor_type.name == dtype.upper()
            errors = (blocks - ours).abs().view(-1, 32).amax(1)
            assert (errors <= most * ours.abs().view(-1, 32).amax(1)).all()


def test_the_settings_are_those_of_the_model(tmp_path):
    model = model_of(n_kv_head=2, head_dim=24, norm_eps=1e-3, rope_theta=777.0)
    _, file = written(tmp_path, model)
    found = settings_of(file)
    wanted = {
        "general.architecture": "llama",
        "general.name": "run",
        "general.file_type": 0,
        "llama.context_length": 256,
        "llama.vocab_size": 257,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 777.0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    place = checkpoint.path_of(save_run(tmp_path / "q", model_of(qk_norm=True)), 3)
    state = checkpoint.load(place) | {"base": {"context": 512}}  # it was tuned on shorter windows
    checkpoint.save(place, state)
    assert run_gguf(place, tmp_path / "q.gguf") == 0
    found = settings_of(tmp_path / "q.gguf")
    assert found["general.architecture"] == "qwen3" and found["qwen3.context_length"] == 512


@pytest.mark.parametrize(
    "knobs",
    [{"n_kv_head": 2}, dict(norm="layernorm_nobias", norm_pos="lns", embed_scale="sqrt")],
    ids=str,
)
def test_a_hugging_face_folder_and_the_file_of_a_checkpoint_give_the_same_file(tmp_path, knobs):
    run, file = written(tmp_path / "a", model_of(**knobs))
    (tmp_path / "b").mkdir()
    run_hf("export", run, tmp_path / "b" / "run")
    for place in (run / "ckpt_00000003.pt", tmp_path / "b" / "run"):
        again = tmp_path / f"{place.name}.gguf"
        assert run_gguf(place, again) == 0
        assert again.read_bytes() == file.read_bytes()


# Vocabularies


def hugging_face_of(cut):
    """A byte-level tokenizer.json as the family has it that llama.cpp calls `cut`."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "gpt-2":
        step = gpt2
    elif cut == "smollm":
        step = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    else:
        pattern = vocabulary.QWEN2 if cut == "qwen2" else vocabulary.LLAMA3
        step = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    made = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    made.pre_tokenizer, made.decoder = step, decoders.ByteLevel()
    trained = trained_by_library(made, pre_tokenizers.ByteLevel.alphabet())
    added = {"id": 600, "content": "<th\u00e9>", "special": False}
    trained["added_tokens"].append(trained["added_tokens"][0] | added)
    return HuggingFaceTokenizer(trained, {"eos_token": "</s>"}, 1, [2])


CUTS = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2")
KINDS = {
    "ours": lambda: train_sentencepiece([TEXT], 500),
    "llama": sentencepiece_model,
    "byte": ByteTokenizer,
    "tiktoken": lambda: tiktoken_of(vocabulary.GPT2_BY_TIKTOKEN.replace(r"\z", "$"), PIECES),
} | {cut: lambda cut=cut: hugging_face_of(cut) for cut in CUTS}
PIECES = train_sentencepiece([TEXT], 500).pieces


@pytest.mark.parametrize("cut", CUTS)
def test_the_cut_of_a_byte_level_tokenizer_has_llama_cpps_name(cut):
    found = gguf_vocabulary(hugging_face_of(cut), 601)
    assert found["tokenizer_model"] == "gpt2" and found["tokenizer_pre"] == cut
    merges = [tuple(merge.split(" ")) for merge in found["token_merges"]]
    ids = {name: i for i, name in enumerate(found["token_list"])}
    assert all(left + right in ids for left, right in merges) and len(merges) > 100
    assert [found["token_types"][i] for i in (1, 2, 600)] == [3, 3, 4]
    assert found["token_list"][600] == "<th\u00e9>"
    assert found["add_bos_token"] is False  # nothing stands before a text there


def test_a_sentencepiece_vocabulary_keeps_pieces_scores_and_kinds(tmp_path):
    tokenizer = train_sentencepiece([TEXT], 500)
    model = tokenizer.first
    _, file = written(tmp_path, model_of(vocab_size=tokenizer.vocab_size + 3), tokenizer)
    found, size = settings_of(file), tokenizer.vocab_size
    tokens, types = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert found["tokenizer.ggml.model"] == "llama"
    assert tokens[:size] == [model.id_to_piece(i) for i in range(size)]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    scores = found["tokenizer.ggml.scores"]
    assert scores[:size] == [model.get_score(i) for i in range(size)]
    assert types == [2, 3, 3] + 256 * [6] + (size - 259) * [1] + 3 * [5]
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert gguf_vocabulary(sentencepiece_model(), 700)["add_space_prefix"] is True


def test_text_ends_where_ours_does():
    tokenizer = train_sentencepiece([TEXT], 500)
    found = gguf_vocabulary(tokenizer, 500)
    assert (found["bos_token_id"], found["eos_token_id"], found["eot_token_id"]) == (1, 2, 1)
    said = {"eos_token": "</s>"}
    generation = {"eos_token_id": [0, 2], "pad_token_id": 0}
    chat = HuggingFaceTokenizer(byte_level_json(), said, 1, [0, 2], generation)
    found = gguf_vocabulary(chat, 601)
    assert (found["eos_token_id"], found["eot_token_id"], found["pad_token_id"]) == (2, 0, 0)
    assert found["add_bos_token"]
    none = HuggingFaceTokenizer(byte_level_json(), said, 1, [2], {"pad_token_id": -1})
    assert "pad_token_id" not in gguf_vocabulary(none, 601)


@pytest.mark.parametrize(
    "said",
    [
        {"chat_template": "{{ messages }}"},
        {"chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tools"}]},
        {},
    ],
)
def test_the_chat_template_goes_along(tmp_path, said):
    tokenizer = HuggingFaceTokenizer(byte_level_json(), {"eos_token": "</s>"} | said, 1, [2])
    _, file = written(tmp_path, model_of(vocab_size=601), tokenizer)
    found = settings_of(file).get("tokenizer.chat_template")
    assert found == ("{{ messages }}" if said else None)


def test_a_tokenizer_json_with_a_model_of_sentencepiece_beside_it_is_written_as_that_model(
    tmp_path,
):
    model = sentencepiece_model()
    run = save_run(tmp_path / "run", model_of(vocab_size=700), model)
    run_hf("export", run, tmp_path / "hf")
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ x }}"}))
    theirs = open_weights(tmp_path / "hf").tokenizer()
    assert isinstance(theirs, HuggingFaceTokenizer) and theirs.sentencepiece
    wanted = gguf_vocabulary(model, 700)
    found = gguf_vocabulary(theirs, 700)
    assert {name: found[name] for name in wanted} == wanted


def changed(**parts):
    return HuggingFaceTokenizer(byte_level_json() | parts, {"eos_token": "</s>"}, 1, [2])


def level_and(*steps):
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {"type": "Sequence", "pretokenizers": [*steps, level | {"use_regex": False}]}


def added_token(**flags):
    tokens = byte_level_json()["added_tokens"]
    return tokens[:-1] + [tokens[-1] | flags]


SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
LEVEL_WITH_PREFIX = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": False,
    "use_regex": True,
}
WORDS = {
    "type": "WordLevel",
    "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(i): i for i in range(3, 1000)},
    "unk_token": "<unk>",
}
REFUSED = {
    "char": (lambda: CharTokenizer(TEXT), "no vocabulary like char: .*=sentencepiece, byte or"),
    "no bytes": (lambda: sentencepiece_model(byte_fallback=False), "drops spaces or has no bytes"),
    "spaces": (lambda: sentencepiece_model(remove_extra_whitespaces=True), "drops spaces or"),
    "unigram": (lambda: sentencepiece_model(model_type="unigram"), "no exact form for llama.cpp"),
    "NFKC": (
        lambda: sentencepiece_model(normalization_rule_name="nfkc"),
        "no exact form for llama.cpp",
    ),
    "pattern": (lambda: tiktoken_of(r"\w+|\W+", PIECES), r"cuts a text by .*\\w\+.* known here: "),
    "fake cut": (lambda: tiktoken_of(GPT2, [b"a b"]), "cuts a text by "),
    "no pattern": (lambda: changed(pre_tokenizer=level_and()), "cuts a text by nothing,"),
    "two cuts": (lambda: changed(pre_tokenizer=level_and(SPLIT, SPLIT)), "'x' and then 'x'"),
    "removed": (
        lambda: changed(pre_tokenizer=level_and(SPLIT | {"behavior": "MergedWithNext"})),
        "steps that llama.cpp does not take as it does: Split",
    ),
    "inverted": (lambda: changed(pre_tokenizer=level_and(SPLIT | {"invert": True})), ": Split"),
    "prefix": (
        lambda: changed(pre_tokenizer=level_and() | {"pretokenizers": [LEVEL_WITH_PREFIX]}),
        "as it does: ByteLevel",
    ),
    "whole pieces": (
        lambda: tiktoken_of(vocabulary.GPT2_BY_TIKTOKEN.replace(r"\z", "$"), [b"abc"]),
        "no exact form for llama.cpp: of '.*' it would make other ids",
    ),
    "WordLevel": (
        lambda: changed(model=WORDS, added_tokens=byte_level_json()["added_tokens"][:3]),
        "not byte-level BPE",
    ),
    "four ends": (
        lambda: HuggingFaceTokenizer(byte_level_json(), {}, 1, [0, 2], {"eos_token_id": 4 * [2]}),
        r"ends a text at \[2, 2, 2, 2\], and llama.cpp wants one id to 3",
    ),
    "lowercase": (lambda: changed(normalizer={"type": "Lowercase"}), "as it does: Lowercase"),
    "no byte level": (
        lambda: HuggingFaceTokenizer(llama_json(), {}, 1, [2]),
        "not byte-level BPE.* put the tokenizer.model",
    ),
    "stripping": (lambda: changed(added_tokens=added_token(lstrip=True)), "the characters around"),
    "no end": (lambda: HuggingFaceTokenizer(byte_level_json(), {}, None, []), "puts the ids .1."),
    "no bos": (
        lambda: HuggingFaceTokenizer(byte_level_json() | {"post_processor": None}, {}, None, []),
        "ends a text at no id",
    ),
    "one name": (
        lambda: changed(added_tokens=added_token(content="[PAD601]")),
        "two tokens have the same name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_without_an_exact_form_is_refused_by_name(case):
    make, words = REFUSED[case]
    tokenizer = make()
    with pytest.raises(ValueError, match=words) as raised:
        gguf_vocabulary(tokenizer, tokenizer.vocab_size + 1)
    assert "\n" not in str(raised.value)


def test_a_normal_form_that_llama_cpp_lacks_is_a_warning(capsys):
    assert gguf_vocabulary(changed(normalizer={"type": "NFC"}), 601)["tokenizer_pre"] == "gpt-2"
    assert "does not bring a text into the form NFC" in capsys.readouterr().err


# Refusals


@pytest.mark.parametrize(
    "model, knob, words",
    [
        (
            dict(norm="layernorm_nobias", tie_embeddings=True),
            "f32",
            "train with tie_embeddings=false",
        ),
        (dict(norm="layernorm"), "f32", "norm=layernorm: Llama's norms are RMSNorm"),
        (dict(qk_norm=True, **LLAMA3), "f32", "rope_scaling=llama3 with qk_norm=true"),
        (dict(n_hidden=100), "q8_0", "ffn_down.weight has 100 numbers in a row, and q8_0"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_one_line_and_leaves_nothing(
    tmp_path, capsys, model, knob, words
):
    run = save_run(tmp_path / "run", model_of(**model))
    assert run_gguf(run, tmp_path / "new" / "x.gguf", f"dtype={knob}") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_too_large_for_half_precision_are_refused(tmp_path, capsys):
    model = model_of()
    model.head.weight.data[0, 0] = 1e5
    run = save_run(tmp_path / "run", model)
    assert run_gguf(run, tmp_path / "x.gguf", "dtype=f16") == 2
    assert "output.weight does not fit into f16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path, capsys):
    run = save_run(tmp_path / "run", model_of())
    with largest_file(100_000):
        assert run_gguf(run, tmp_path / "x.gguf") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_that_is_there_is_never_touched(tmp_path, capsys):
    run = save_run(tmp_path / "run", model_of())
    (tmp_path / "x.gguf").write_text("mine")
    assert run_gguf(run, tmp_path / "x.gguf") == 2
    assert "x.gguf exists already: name another file" in capsys.readouterr().err
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_without_the_package_the_line_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "gguf", None)
    assert run_gguf(tmp_path, tmp_path / "x.gguf") == 2
    assert "needs the package gguf: pip install -e '.[gguf]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "got no model: write python -m exchange.gguf RUN FILE.gguf"),
        (["a", "b", "c"], "got a b c: write python -m exchange.gguf"),
        (["nowhere", "x.gguf"], "nowhere does not exist"),
        (["x", "x.gguf", "dtype=q4_0"], "dtype must be f32, f16 or q8_0"),
        (["x", "x.gguf", "shard_gb=1"], "unknown knob 'shard_gb'"),
    ],
)
def test_bad_command_lines_of_gguf_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert run_gguf(*argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


# In llama.cpp


def opened(file, **options):
    """The file in llama.cpp, with a cache in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False)
    return llama_cpp.Llama(
        str(file), n_ctx=256, logits_all=True, verbose=False, n_threads=2, **exact | options
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_the_same(tmp_path, kind):
    tokenizer = train_sentencepiece([TEXT], 500)
    run, file = written(tmp_path, model_of(**MODELS[kind], vocab_size=500), tokenizer)
    theirs, (ours, _, _) = opened(file), load_model(run)
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)][:200]
    theirs.eval(ids)
    with torch.inference_mode():
        wanted = ours(torch.tensor([ids]))[0]
    assert (torch.from_numpy(theirs.scores[:200]) - wanted).abs().max() <= 1e-4
    theirs.reset()
    theirs.eval(ids[:8])
    found = []
    for _ in range(200):
        found.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
        theirs.eval(found[-1:])
    assert found == [i for (i,) in generate(ours, ids[:8], 200, temperature=0)]
    for dtype, most in (("f16", 0.01), ("q8_0", 0.1)):
        assert run_gguf(run, tmp_path / f"{dtype}.gguf", f"dtype={dtype}") == 0
        rounded = opened(tmp_path / f"{dtype}.gguf")
        rounded.eval(ids)
        error = torch.from_numpy(rounded.scores[:200]) - wanted
        assert 0 < error.std() / wanted.std() <= most


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_same_ids_and_ends_at_the_same_ones(tmp_path, kind):
    """With one exception: as SentencePiece itself, it cannot tell U+2581 and a space apart."""
    tokenizer = KINDS[kind]()
    _, file = written(tmp_path, model_of(vocab_size=tokenizer.vocab_size + 2), tokenizer)
    theirs = opened(file, vocab_only=True)
    for text in [TEXT, *TRICKY, *random_texts(400)]:
        if isinstance(tokenizer, SentencePieceTokenizer):
            text = text.replace("\u2581", "")
        data, ids = text.encode(), tokenizer.encode(text)
        assert theirs.tokenize(data, add_bos=False, special=False) == ids, text
        assert theirs.tokenize(data, add_bos=True, special=False) == tokenizer.before + ids
        assert theirs.detokenize(ids, special=False) == tokenizer.decode_bytes(ids)
    ends = pytest.importorskip("llama_cpp").llama_vocab_is_eog
    found = {i for i in range(theirs.n_vocab()) if ends(theirs._model.vocab, i)}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        assert found == {2}  # its files do not call bos an end
    else:
        assert found == tokenizer.end_ids


def real_tokenizer(file, cut):
    """The tokenizer.json of a vocabulary in llama.cpp's sources, which has no weights."""
    said, made = settings_of(file), json.loads(json.dumps(hugging_face_of(cut).tokenizer))
    tokens, types = (said[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    special = [i for i, kind in enumerate(types) if kind == 3]
    about = made["added_tokens"][0]
    made["added_tokens"] = [about | {"id": i, "content": tokens[i]} for i in special]
    made["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    made["model"]["merges"] = [merge.split(" ") for merge in said["tokenizer.ggml.merges"]]
    return HuggingFaceTokenizer(made, {}, None, special[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, cut",
    [("gpt-2", "gpt-2"), ("starcoder", "smollm"), ("llama-bpe", "llama-bpe"), ("qwen2", "qwen2")],
)
def test_real_vocabularies_give_the_same_ids_in_llama_cpp(tmp_path, family, cut):
    """StarCoder's text is cut as SmolLM's. LLAMA_CPP says where the sources of llama.cpp are."""
    sources = Path(os.environ.get("LLAMA_CPP", "LLAMA_CPP is not set"))
    file = sources / "models" / f"ggml-vocab-{family}.gguf"
    if not file.exists():
        pytest.skip(f"no {file}")
    tokenizer = real_tokenizer(file, cut)
    _, made = written(tmp_path, model_of(vocab_size=tokenizer.vocab_size), tokenizer)
    theirs = opened(made, vocab_only=True)
    for text in [*SOURCES, *TRICKY, *random_texts(1000)]:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids, text
