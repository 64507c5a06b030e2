"""What text/tokenizer_export.py writes gives our tokenizers' ids in transformers."""

import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from conftest import slow
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_tokenizer import TRICKY, byte_level_json, llama_json, random_texts
from transformers import AutoTokenizer

from text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from text.tokenizer_export import CONVERSIONS, check_same_ids, merges_of, tokenizer_files

SOURCES = [
    path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:12]
]
# As tiktoken writes them, possessive and with $, which mean something else in Hugging Face's
# regular expressions
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def sentencepiece_model(**settings) -> SentencePieceTokenizer:
    """Llama's settings, but for those given."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 700,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    } | settings
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].splitlines()), model_writer=model, **settings
    )
    return SentencePieceTokenizer(model.getvalue())


def tiktoken_of(pattern: str, pieces: list[bytes]) -> TiktokenTokenizer:
    """All bytes, then the pieces; the ids of the special tokens leave gaps."""
    every = dict.fromkeys([*(bytes([i]) for i in range(256)), *filter(None, pieces)])
    ranks = {piece: i for i, piece in enumerate(every)}
    special = {"<|endoftext|>": len(ranks) + 5, "<|fim|>": len(ranks) + 2}
    return TiktokenTokenizer(
        tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    )


KINDS = (
    "ours",
    "llama",
    "normalising",
    "no bytes",
    "characters",
    "byte",
    "char",
    "gpt2",
    "cl100k",
    "llama3",
)
ALL_TEXTS = [kind for kind in KINDS if kind != "char"]  # those that encode any text


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict:
    """kind -> (tokenizer, transformers' own of the exported folder, the folder)."""
    ours = train_sentencepiece(SOURCES[:10], 1500)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizers = (
        ours,
        sentencepiece_model(),
        sentencepiece_model(remove_extra_whitespaces=True),
        sentencepiece_model(byte_fallback=False),
        sentencepiece_model(model_type="char"),
        ByteTokenizer(),
        CharTokenizer("".join(SOURCES)),
        tiktoken_of(GPT2, ours.pieces),
        tiktoken_of(CL100K, ours.pieces),
        HuggingFaceTokenizer(byte_level_json(), special, 1, [2]),
    )
    return {
        kind: (tokenizer, *exported(tokenizer, tmp_path_factory.mktemp("hf")))
        for kind, tokenizer in zip(KINDS, tokenizers, strict=True)
    }


def exported(tokenizer, folder):
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder), folder


def assert_equal(ours, theirs, text: str) -> None:
    ids = ([] if ours.bos_id is None else [ours.bos_id]) + ours.encode(text)
    assert theirs(text).input_ids == ids, text
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    if ours.exact:
        assert ours.decode(ids) == text


@pytest.mark.parametrize("sources", [SOURCES[:3], slow(SOURCES[3:])], ids=["some", "others"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_ids_and_texts_of_the_standard_library(made, kind, sources):
    ours, theirs, _ = made[kind]
    for text in sources:
        assert_equal(ours, theirs, text)


def names_a_special_token(kind: str, text: str) -> bool:
    """A tokenizer.json from elsewhere stays as it came, and there transformers makes special tokens
    of such texts.
    """
    return kind == "llama3" and any(name in text for name in ("<s>", "</s>", "<unk>"))


@pytest.mark.parametrize("kind", ALL_TEXTS)
def test_transformers_gives_our_ids_and_texts_of_odd_texts(made, kind):
    ours, theirs, _ = made[kind]
    for text in TRICKY + random_texts(100):
        if not names_a_special_token(kind, text):
            assert_equal(ours, theirs, text)


@pytest.mark.parametrize("kind", ALL_TEXTS)
@settings(max_examples=60, deadline=None)
@given(
    text=st.text(
        st.sampled_from("ab _(\n\t\u2581\u00e90159'\U0001f600")
        | st.characters(exclude_categories=["Cs"])
    )
)
def test_transformers_gives_our_ids_and_texts_of_any_text(made, kind, text):
    assume(not names_a_special_token(kind, text))
    assert_equal(*made[kind][:2], text)


@pytest.mark.parametrize("kind", KINDS)
def test_bos_eos_and_the_size_of_the_vocabulary_are_told(made, kind):
    ours, theirs, _ = made[kind]
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == max(ours.end_ids, default=None)
    assert max(theirs.get_vocab().values()) == ours.vocab_size - 1


@pytest.mark.parametrize("kind", [kind for kind in ALL_TEXTS if kind != "llama3"])
def test_no_text_becomes_a_special_token(made, kind):
    ours, theirs, _ = made[kind]
    names = "".join(token.content for token in theirs.added_tokens_decoder.values())
    assert names and theirs(names, add_special_tokens=False).input_ids == ours.encode(names)
    both = [[ours.bos_id, *ours.encode(text)] for text in ("one", "two")]
    assert theirs(["one", "two"]).input_ids == both


def test_an_unknown_character_is_refused_by_the_char_tokenizer_there_too(made):
    ours, theirs, _ = made["char"]
    for encode in (ours.encode, theirs):
        with pytest.raises(Exception, match="not among the|Missing"):
            encode("\u4f60")


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_folder_is_a_tokenizer_folder_for_us_too(made, kind):
    ours, _, folder = made[kind]
    again = load_tokenizer(folder)
    assert (again.bos_id, again.end_ids, again.exact) == (ours.bos_id, ours.end_ids, ours.exact)
    assert again.kind == ("sentencepiece" if ours.kind == "sentencepiece" else "huggingface")
    for text in SOURCES[:5] if kind == "char" else SOURCES[:5] + TRICKY:
        for start in (True, False):
            assert again.encode(text, start) == ours.encode(text, start)
    assert again.pieces == ours.pieces[: len(again.pieces)]


def test_sentencepiece_files_have_the_model_and_tell_llama_cpp_of_the_prefix(made):
    for kind, prefix in (("ours", False), ("llama", True), ("normalising", True)):
        files = tokenizer_files(made[kind][0])
        assert files["tokenizer.model"] == made[kind][0].content()
        assert json.loads(files["tokenizer_config.json"])["add_prefix_space"] is prefix
        added = json.loads(files["tokenizer.json"])["added_tokens"]
        assert [token["content"] for token in added] == ["<unk>", "<s>", "</s>"]
        assert [token["id"] for token in added] == [0, 1, 2]


def test_a_hugging_face_tokenizer_is_written_back_as_it_came():
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": "x",
        "auto_map": {"AutoTokenizer": ["a.py", None]},
    }
    files = tokenizer_files(HuggingFaceTokenizer(llama_json(), config, 1, [2]))
    assert json.loads(files["tokenizer.json"]) == llama_json() and "tokenizer.model" not in files
    # LlamaTokenizer would make its own tokenizer of it, and auto_map names code that is not there
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "x",
        "clean_up_tokenization_spaces": False,
    }


NAMED = {
    "bos_token": {"content": "<s>", "lstrip": False, "normalized": False},
    "eos_token": {"content": "</s>", "rstrip": False, "single_word": False},
    "pad_token": {"content": "</s>", "normalized": True, "special": True},
}
OLD = {role: {"__type": "AddedToken", **token} for role, token in NAMED.items()}
LISTED = [{"content": "<unk>", "lstrip": False}, "<s>"]


@pytest.mark.parametrize("with_model", [False, True], ids=["json", "model"])
@pytest.mark.parametrize(
    "config, token_map",
    [
        ({}, NAMED | {"additional_special_tokens": LISTED}),
        ({}, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}),
        (NAMED, {}),
        (OLD | {"additional_special_tokens": [OLD["bos_token"], "<unk>"]}, NAMED),
        ({"extra_special_tokens": {"eot_token": "<unk>"}}, NAMED),
        ({"extra_special_tokens": ["<unk>"]}, NAMED | {"extra_special_tokens": LISTED}),
    ],
)
def test_special_tokens_load_from_an_export_in_whatever_form_they_came(
    config, token_map, with_model, made, tmp_path
):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    ours = made["ours"][0]
    if with_model:
        ours.save(source)
    else:
        fields = CONVERSIONS[SentencePieceTokenizer](ours)
        (source / "tokenizer.json").write_text(json.dumps(fields))
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").write_text(json.dumps(token_map))
    again, (theirs, _) = load_tokenizer(source), exported(load_tokenizer(source), out)
    assert_equal(again, theirs, SOURCES[0][:3000])
    text = "one</s>two<s> three"
    assert theirs(text, add_special_tokens=False).input_ids == again.encode_special(text)
    if "pad_token" in config | token_map:
        assert (theirs.pad_token, theirs.pad_token_id) == ("</s>", 2)


def test_the_files_are_the_same_each_time(made):
    for tokenizer, _, _ in made.values():
        assert tokenizer_files(tokenizer) == tokenizer_files(tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": ["<sep>"]},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=str,
)
def test_a_model_without_an_exact_form_is_refused_with_the_first_text_that_differs(change):
    words = "has no exact form for Hugging Face: of '.*' it would make other ids from"
    with pytest.raises(ValueError, match=words):
        tokenizer_files(sentencepiece_model(**change))


@pytest.mark.parametrize(
    "pattern", [r"\p{Script=Greek}+|[\s\S]", r"^\w+|[\s\S]", r"<\|[a-z]+\|>|[\s\S]"]
)
def test_a_pattern_that_cannot_be_had_there_is_refused(pattern):
    """One that Oniguruma does not know; one where ^ is the beginning of any line; one that keeps a
    special token's name whole, which is in their vocabulary and not in ours.
    """
    words = "tiktoken tokenizer has no exact form for Hugging Face"
    with pytest.raises(ValueError, match=words) as raised:
        tokenizer_files(tiktoken_of(pattern, [b"ab"]))
    assert "\n" not in str(raised.value)


def test_a_piece_that_would_take_for_ever_is_refused():
    with pytest.raises(ValueError, match="a piece of more than 1000 characters"):
        tokenizer_files(tiktoken_of(r"[\s\S]+", [b"a" * 1001]))


def test_merges_are_all_pairs_and_of_overlapping_ones_the_left_comes_first():
    merges = merges_of({"a": 0, "b": 1, "ba": 3, "ab": 4, "aba": 5})
    assert merges == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]
    assert merges_of({b"a": 0, b"c": 7, b"ac": 2, b"acx": 3}) == [(b"a", b"c")]


def test_a_vocabulary_that_is_wrong_in_one_rare_piece_is_found():
    ours = train_sentencepiece(SOURCES[:2], 600)
    made = json.loads(tokenizer_files(ours)["tokenizer.json"])
    rare = max(ours.pieces[-100:], key=len).decode()
    merges = made["model"]["merges"]
    made["model"]["merges"] = [pair for pair in merges if "".join(pair) != rare]
    assert len(made["model"]["merges"]) < len(merges)
    with pytest.raises(ValueError, match="no exact form"):
        check_same_ids(ours, made)
