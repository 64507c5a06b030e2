import io
import json
import math
import os
import struct
import textwrap
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import load_weights
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from llama2c import read_bin, read_tokenizer_bin, tokenizer_bin, write_bin
from model import Decoder, ModelConfig

C, F, L, H, V, T = 24, 40, 3, 4, 17, 16  # of the small models here
MUTATIONS = settings(max_examples=150, deadline=None, derandomize=True, database=None)
TEXTS = ["", "a", " a", "  two  spaces ", "\n\n\ttab\n", "na\u00efve \u4f60\u597d \U0001f600 \ufb01\u212b", "def main(",
         "<s></s> <unk> <0x0A>", "x" * 99, " " * 99, Path(textwrap.__file__).read_text()[:4000]]


def raw_model(kv, tied):
    """A .bin of version 0, put together here from the format's description alone, all of it random numbers."""
    D = C // H
    sizes = [V * C, L * C, L * C * C, L * kv * D * C, L * kv * D * C, L * C * C, L * C, L * F * C, L * C * F, L * F * C,
             C, T * D, 0 if tied else V * C]
    floats = np.random.default_rng(kv).standard_normal(sum(sizes)).astype("<f4") * 0.4
    return struct.pack("<7i", C, F, L, H, kv, V if tied else -V, T) + floats.tobytes()


def reference_logits(content, ids):
    """The logits [T, V] of a .bin in float64: LLaMA with RoPE on neighbouring channels, as its authors published it."""
    width, hidden, layers, heads, kv, vocab, context = struct.unpack_from("<7i", content)
    rest, size = np.frombuffer(content, "<f4", offset=28).astype(np.float64), width // heads

    def take(*shape):
        nonlocal rest
        part, rest = rest[:math.prod(shape)].reshape(shape), rest[math.prod(shape):]
        return part

    def norm(x, gain):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain

    def turned(x):  # [T, heads, size], as complex numbers
        angles = np.outer(np.arange(len(ids)), 10000.0 ** (-np.arange(0, size, 2) / size))
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack((z.real, z.imag), -1).reshape(x.shape)

    embed, attn_gain = take(abs(vocab), width), take(layers, width)
    q, k, v = (take(layers, n * size, width) for n in (heads, kv, kv))
    out, ffn_gain = take(layers, width, width), take(layers, width)
    gate, down, up = take(layers, hidden, width), take(layers, width, hidden), take(layers, hidden, width)
    gain, _ = take(width), take(context * size)
    head = embed if vocab > 0 else take(-vocab, width)
    assert not rest.size
    x, future = embed[ids], np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(layers):
        h = norm(x, attn_gain[i])
        queries, keys, values = (np.reshape(h @ w[i].T, (len(ids), -1, size)) for w in (q, k, v))
        queries, keys = turned(queries), np.repeat(turned(keys), heads // kv, 1)
        scores = np.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(size) + future
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", shares, np.repeat(values, heads // kv, 1)).reshape(len(ids), -1) @ out[i].T
        h = norm(x, ffn_gain[i])
        gates = h @ gate[i].T
        x = x + (gates / (1 + np.exp(-gates)) * (h @ up[i].T)) @ down[i].T
    return norm(x, gain) @ head.T


def entries_of(content):
    """(score, piece) of each id in a tokenizer.bin."""
    entries, at = [], 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        entries.append((score, content[at + 8:at + 8 + length]))
        at += 8 + length
    return entries


def packed(entries, longest=None):
    """The tokenizer.bin of (score, piece) for each id."""
    longest = max(len(piece) for _, piece in entries) if longest is None else longest
    return struct.pack("<I", longest) + b"".join(struct.pack("<fi", s, len(p)) + p for s, p in entries)


def ids_of_run_c(entries, text):
    """What llama2.c's run.c makes of a prompt: a space and each character, then again and again the best merge."""
    ids = {piece: i for i, (_, piece) in enumerate(entries)}
    cut = [[ids[char.encode()]] if char.encode() in ids else [byte + 3 for byte in char.encode()] for char in text]
    tokens = [ids[b" "]] + sum(cut, []) if text else []
    while True:
        pairs = [ids.get(entries[a][1] + entries[b][1]) for a, b in zip(tokens, tokens[1:], strict=False)]
        found = [(-entries[i][0], at) for at, i in enumerate(pairs) if i is not None]
        if not found:
            return tokens
        at = min(found)[1]
        tokens[at:at + 2] = [pairs[at]]


@pytest.fixture(scope="module")
def tokenizers():
    """Ours, and one with a dummy prefix as Llama's."""
    text, model = Path(json.decoder.__file__).read_text(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, model_type="bpe", vocab_size=500,
        byte_fallback=True, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False)
    return {"ours": train_sentencepiece([text], 500), "prefixed": SentencePieceTokenizer(model.getvalue())}


@pytest.fixture(scope="module")
def good_entries(tokenizers):
    return entries_of(tokenizer_bin(tokenizers["ours"]))


@pytest.fixture
def put(tmp_path):
    """put(bytes) makes a file of them and gives its path."""
    def write(content):
        (tmp_path / "x.bin").write_bytes(content)
        return tmp_path / "x.bin"

    return write


def weights_of(config):
    return {name: weight.detach() for name, weight in Decoder(config).named_parameters()}


def small(**knobs):
    return ModelConfig(**(dict(n_layer=2, n_head=2, n_embd=8, n_hidden=12, block_size=8, vocab_size=5) | knobs))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_a_file_of_llama2c_gives_its_logits(put, kv, tied):
    content, ids = raw_model(kv, tied), np.random.default_rng(0).integers(V, size=T)
    config, weights = read_bin(put(content))
    model = Decoder(config).eval()
    load_weights(model, weights)
    expected = reference_logits(content, ids)
    assert expected.std() > 0.5 and (config.tie_embeddings, config.kv_heads) == (tied, kv)
    np.testing.assert_allclose(model(torch.tensor(ids)[None])[0].detach(), expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_reading_and_writing_again_gives_the_same_bytes(put, tmp_path, kv, tied):
    content = raw_model(kv, tied)
    write_bin(tmp_path / "y.bin", *read_bin(put(content)))
    written = (tmp_path / "y.bin").read_bytes()
    size = T * C // H * 4  # of the tables, which are random in `content`
    start = len(content) - size - (0 if tied else 4 * V * C)
    assert written[:start] == content[:start] and written[start + size:] == content[start + size:]
    angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, C // H, 2) / (C // H)))
    tables = np.frombuffer(written[start:start + size], "<f4").reshape(2, T, -1)
    np.testing.assert_allclose(tables, [np.cos(angles), np.sin(angles)], atol=1e-6)


@pytest.mark.parametrize("knobs", [{}, {"n_kv_head": 1, "tie_embeddings": True}, {"n_hidden": 0, "head_dim": 4}])
def test_writing_and_reading_gives_the_same_weights(tmp_path, knobs):
    config = small(**knobs)
    weights = weights_of(config)
    write_bin(tmp_path / "y.bin", config, weights)
    again, read = read_bin(tmp_path / "y.bin")
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in read)
    assert [getattr(again, name) for name in ("kv_heads", "hidden_size", "block_size", "tie_embeddings")] == [
        getattr(config, name) for name in ("kv_heads", "hidden_size", "block_size", "tie_embeddings")]


@pytest.mark.parametrize("knobs, words", [
    ({"rope_theta": 5e5}, "rope_theta=10000.0 (here it is 500000.0)"),
    ({"rope_scaling": "llama3"}, "rope_scaling=none (here"), ({"norm_eps": 1e-6}, "norm_eps=1e-05 (here"),
    ({"qk_norm": True}, "qk_norm=False (here"), ({"norm": "layernorm"}, "norm=rmsnorm (here"),
    ({"norm": "rmsnorm1p"}, "here it is rmsnorm1p"), ({"norm_pos": "post"}, "norm_pos=pre (here"),
    ({"ffn": "geglu"}, "ffn=swiglu (here"), ({"head_dim": 8}, "head_dim = n_embd / n_head (here it is 8)"),
    ({"block_size": 10**8, "n_layer": 10}, "32-bit"), ({"vocab_size": 2**28}, "32-bit")])
def test_a_model_that_run_c_cannot_compute_is_refused(tmp_path, knobs, words):
    with pytest.raises(ValueError) as caught:
        write_bin(tmp_path / "y.bin", small(**knobs), {})
    assert words in str(caught.value) and "leave format=llama2c out" in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("norm.gain"), "lack norm.gain"), (lambda w: w.update(extra=w["norm.gain"]), "a surplus extra"),
    (lambda w: w.update({"norm.gain": torch.ones(9)}), "norm.gain must be [8], got [9]"),
    (lambda w: w["blocks.1.attn.q.weight"][0].fill_(math.nan), "blocks.1.attn.q.weight holds NaN")])
def test_weights_that_are_not_the_models_are_named(tmp_path, change, words):
    weights = weights_of(small())
    change(weights)
    with pytest.raises(ValueError) as caught:
        write_bin(tmp_path / "y.bin", small(), weights)
    assert words in str(caught.value) and not any(tmp_path.iterdir())


def header(*numbers):
    return struct.pack("<7i", *numbers)


@pytest.mark.parametrize("content, words", [
    (b"", "it has 0 bytes"), (header(C, F, L, H, 2, V, T)[:27], "it has 27 bytes"),
    (struct.pack("<Ii", 0x616B3432, 2) + bytes(300), "version 2, wanted is version 0"),
    (raw_model(2, True)[:-4], "cut short"), (raw_model(2, False) + b"\0", "too long"),
    (header(C, F, L, H, 2, -V, T) + raw_model(2, True)[28:], "cut short"),  # says that it has a head of its own
    (header(C, F, 0, H, 2, V, T), "n_layer=0"), (header(C, F, L, H, -2, V, T), "n_kv_head=-2"),
    (header(C, F, L, 5, 5, V, T), "must be a multiple of 2 * n_head"), (header(C, F, L, H, 3, V, T), "n_kv_head from"),
    (header(*7 * [2**31 - 1]), "n_layer must be between"), (header(*7 * [-2**31]), "n_embd=-2147483648"),
    (header(10**6, 2**31 - 1, 700, 1, 1, -2**31, 10**8), "asks for"), (b"PK\x03\x04" + bytes(400), "n_hidden=0")])
def test_a_file_that_is_not_of_version_0_is_refused_unread(put, monkeypatch, content, words):
    monkeypatch.setattr("numpy.fromfile", None)
    with pytest.raises(ValueError) as caught:
        read_bin(put(content))
    assert words in str(caught.value) and "x.bin" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_file_with_numbers_that_are_none_is_refused(put, value):
    content = bytearray(raw_model(2, True))
    content[28 + 4 * V * C:28 + 4 * V * C + 4] = struct.pack("<f", value)
    with pytest.raises(ValueError, match="blocks.0.attn_norm.gain holds NaN or Inf"):
        read_bin(put(content))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "none", "."):
        with pytest.raises(FileNotFoundError, match="no such"):
            read_bin(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="no such"):
            read_tokenizer_bin(tmp_path / name, 300)


@MUTATIONS
@given(st.dictionaries(st.integers(0, 6), st.sampled_from([0, 1, 2, 3, 4, 16, 24, -1, -17, 10**5, 2**31 - 1, -2**31])),
       st.sampled_from([0, 0, 0, -9, -4, -1, 1, 4]))
def test_a_mutated_header_is_refused_or_gives_a_model(tmp_path_factory, numbers, more):
    content = raw_model(2, False)
    changed = [numbers.get(at, old) for at, old in enumerate(struct.unpack_from("<7i", content))]
    content = header(*changed) + (content[28:] + bytes(max(0, more)))[:len(content) - 28 + more]
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    path.write_bytes(content)
    try:
        config, weights = read_bin(path)
    except ValueError as error:
        assert "mutated.bin" in str(error) and "\n" not in str(error)
    else:
        load_weights(Decoder(config), weights)


@pytest.mark.parametrize("name", ["ours", "prefixed"])
def test_a_tokenizer_comes_back_and_cuts_text_as_run_c(put, tokenizers, name):
    tokenizer = tokenizers[name]
    content = tokenizer_bin(tokenizer)
    again = read_tokenizer_bin(put(content), tokenizer.vocab_size)
    assert tokenizer_bin(again) == content and again.pieces == tokenizer.pieces and again.dummy_prefix
    for text in TEXTS:
        ids = ids_of_run_c(entries_of(content), text)
        assert again.encode(text) == ids, text[:20]
        assert tokenizer.encode(text if tokenizer.dummy_prefix or not text else " " + text) == ids, text[:20]
        assert again.decode(ids) == text


def test_a_tokenizer_bin_has_llama2cs_layout(tokenizers):
    tokenizer = tokenizers["prefixed"]
    content = tokenizer_bin(tokenizer)
    entries = entries_of(content)
    assert int.from_bytes(content[:4], "little") == max(len(piece) for _, piece in entries)
    assert [piece for _, piece in entries[:4]] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    assert entries[3 + 0xAB] == (0.0, b"<0xAB>") and len(entries) == tokenizer.vocab_size
    piece = tokenizer.first.piece_to_id("\u2581the")
    assert entries[piece] == (tokenizer.first.get_score(piece), b" the")


def trained(**options):
    model, text = io.BytesIO(), Path(textwrap.__file__).read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, minloglevel=2, **(
        dict(model_type="bpe", vocab_size=500, byte_fallback=True, normalization_rule_name="identity",
             remove_extra_whitespaces=False) | options))
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize("options, words", [
    ({"byte_fallback": False}, "256 bytes"), ({"bos_id": 2, "eos_id": 1}, "ids 0 to 258"),
    ({"pad_id": 3}, "256 bytes"), ({"model_type": "unigram"}, "not plain BPE"), ({"control_symbols": ["<c>"]}, "256 b"),
    ({"normalization_rule_name": "nmt_nfkc"}, "not plain BPE"), ({"remove_extra_whitespaces": True}, "not plain BPE"),
    ({"user_defined_symbols": ["return s"]}, "ids 0 to 258")])
def test_a_tokenizer_that_run_c_would_misread_is_refused(options, words):
    with pytest.raises(ValueError) as caught:
        tokenizer_bin(trained(**options))
    assert words in str(caught.value) and "leave format=llama2c out" in str(caught.value)


@pytest.mark.parametrize("kind, words", [(3, "a piece is empty"), (4, "come before all merges")])
def test_a_piece_that_is_not_merged_is_refused(tokenizers, kind, words):
    piece = b"qzqz"  # appended to the model's protobuf: a control piece (3) or a user-defined one (4)
    extra = b"\x0a" + bytes([len(piece) + 4, 0x0A, len(piece)]) + piece + bytes([0x18, kind])
    with pytest.raises(ValueError, match=words):
        tokenizer_bin(SentencePieceTokenizer(tokenizers["ours"].first.serialized_model_proto() + extra))


def test_other_kinds_of_tokenizers_are_refused():
    with pytest.raises(ValueError, match="SentencePiece tokenizers only, this one is byte"):
        tokenizer_bin(ByteTokenizer())


@pytest.mark.parametrize("change, words", [
    (lambda e: packed(e)[:-1], "should be a piece"), (lambda e: packed(e) + b"\0", "should be a piece"),
    (lambda e: packed(e)[:3], "ids 0 to 258"), (lambda e: b"", "ids 0 to 258"), (lambda e: packed(e[:258]), "ids 0 to"),
    (lambda e: packed(e[:-1]), "pieces, the model has"), (lambda e: packed(e, longest=5), "longest has 5"),
    (lambda e: packed([*e[:-1], (0.0, b"")]), "a piece of 0 bytes"), (lambda e: packed([*e[1:], e[0]]), "ids 0 to 258"),
    (lambda e: packed([*e[:-1], (0.0, b"\xff")]), "not UTF-8"), (lambda e: packed([*e[:-1], (0.0, b"a\0b")]), "NUL"),
    (lambda e: packed([*e[:-1], (0.0, "\u2581a".encode())]), "U+2581"),
    (lambda e: packed([*e[:-1], e[-2]]), "two pieces"), (lambda e: packed([*e[:-1], (0.0, b"<s>")]), "two pieces"),
    (lambda e: packed([*e[:-1], (math.nan, e[-1][1])]), "a score is NaN"),
    (lambda e: packed([(s, b"\n\t" if p == b" " else p) for s, p in e]), "single space"),
    (lambda e: packed(e)[:4] + struct.pack("<fi", 0, -1) + packed(e)[12:], "4,294,967,295 bytes")])
def test_a_damaged_tokenizer_bin_is_refused(put, good_entries, change, words):
    with pytest.raises(ValueError) as caught:
        read_tokenizer_bin(put(change(good_entries)), len(good_entries))
    assert words in str(caught.value) and "x.bin" in str(caught.value) and "\n" not in str(caught.value)


@MUTATIONS
@given(st.data())
def test_a_mutated_tokenizer_bin_is_refused_or_gives_a_tokenizer(tmp_path_factory, good_entries, data):
    content = bytearray(packed(good_entries))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 3000, len(content) - 1))
        content[at:at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2) | st.just(b"abc"))
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    path.write_bytes(content)
    try:
        tokenizer = read_tokenizer_bin(path, len(good_entries))
    except ValueError as error:
        assert "mutated.bin" in str(error) and "\n" not in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("def main(): pass")) == "def main(): pass"
