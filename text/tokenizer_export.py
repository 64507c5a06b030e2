"""Our tokenizers as the files from which transformers' AutoTokenizer makes the same ids.

SentencePiece and tiktoken do the same thing: again and again, they merge the leftmost of the
neighbours that together are the best piece of all. Hugging Face calls this BPE. Bytes are a BPE
without merges. SentencePiece writes a space as U+2581; the vocabularies made here have the space
itself, so a U+2581 in a text stays what it is, in bytes, as it does with our tokenizers.

Reading order: tokenizer_files; the conversion of each kind of tokenizer, down to CONVERSIONS; the
parts of a tokenizer.json; check_same_ids, which tries what was made.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from text.tokenizer import (
    END,
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from text.tokenizer_json import (
    SPACE,
    byte_alphabet,
    probe_texts,
    run_by_library,
    rust_errors,
)

LONGEST_PIECE = 1000  # a piece is cut at every place; the longest that is known, of spaces, has 128


def tokenizer_files(tokenizer: Tokenizer, chat_template: str | None = None) -> dict[str, bytes]:
    """Name -> content of the files from which transformers.AutoTokenizer.from_pretrained makes this
    tokenizer; with a chat template, if one is given.

    Every text gets our ids, with what stands before and behind a document where special tokens are
    added, and ids become the text that ours gives. A special token that is spelled out in a text is
    text, unless there is a chat template, which spells those that it means. A tokenizer of Hugging
    Face gets its own files back, and treats bos and special tokens as it did before.

    ValueError if the made files give other ids for one of many kinds of text. This happens with
    rare kinds of SentencePiece models and of tiktoken patterns. One difference is not found:
    tiktoken's patterns may split letters otherwise that are newer than the Unicode tables of the
    regular expressions.
    """
    made = CONVERSIONS[type(tokenizer)](tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        check_same_ids(tokenizer, made)
    files = {
        "tokenizer.json": json_bytes(made, indent=1),
        "tokenizer_config.json": json_bytes(
            tokenizer_config(tokenizer, made, chat_template), indent=1
        ),
    }
    model = {SentencePieceTokenizer: "model", HuggingFaceTokenizer: "sentencepiece"}
    if content := getattr(tokenizer, model.get(type(tokenizer), ""), b""):
        files[SentencePieceTokenizer.file] = content  # llama.cpp's converter reads this one
    return files


def json_bytes(content: dict[str, Any], indent: int) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode()


def tokenizer_config(tokenizer: Tokenizer, made: dict, chat_template: str | None) -> dict:
    """The content of tokenizer_config.json, for the tokenizer.json `made`."""
    # This class takes tokenizer.json as it is. LlamaTokenizer would replace the steps in it by its
    # own, which are others.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    theirs = {
        name: names_only(value) if name.endswith(("_token", "_tokens")) else value
        for name, value in tokenizer.config.items()
        if name != "auto_map"
    }
    if chat_template and "chat_template" not in theirs:
        config["chat_template"] = chat_template
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return theirs | config
    names = {token["id"]: token["content"] for token in made["added_tokens"]}
    other_ends = tokenizer.end_ids - {tokenizer.bos_id}
    roles = {
        "bos_token": names.get(tokenizer.bos_id),
        "unk_token": made["model"]["unk_token"],
        "eos_token": names.get(min(other_ends, default=tokenizer.bos_id)),
    }
    config |= {"add_prefix_space": tokenizer.dummy_prefix}
    if not theirs and not chat_template:  # a template spells special tokens that are meant
        config |= {"split_special_tokens": True}
    return {role: name for role, name in roles.items() if name} | theirs | config


def names_only(value: Any) -> Any:
    """What tokenizer_config.json says of special tokens, with the text of each token alone.

    It and special_tokens_map.json describe a token in different forms, and transformers does not
    take the form of one in the other. How a token is found in a text is in tokenizer.json.
    """
    match value:
        case {"content": str(text)}:
            return text
        case dict():
            return {name: names_only(inner) for name, inner in value.items()}
        case list():
            return [names_only(inner) for inner in value]
    return value


def from_byte(tokenizer: ByteTokenizer) -> dict:
    ranks = {bytes([i]): i for i in range(256)}
    return byte_level_json(tokenizer, ranks, {END: tokenizer.bos_id}, None)


def from_char(tokenizer: CharTokenizer) -> dict:
    """A WordLevel model without an unknown token refuses characters that are not in the vocabulary,
    as ours does.
    """
    model = {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": ""}
    decoder = [{"type": "Fuse"}]
    return assemble(tokenizer, model, {}, decoder, pre_tokenizer=[split_step(r"[\s\S]")])


def from_tiktoken(tokenizer: TiktokenTokenizer) -> dict:
    """Hugging Face's regular expressions are Oniguruma's, where two things mean something else: in
    {1,3}+ the + repeats what {1,3} matched, instead of keeping it; and $ also matches before a
    newline.
    """
    fields = tokenizer.fields()
    pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", fields["pattern"])
    pattern = re.sub(r"(?<!\\)\$", r"\\z", pattern)
    ranks = tokenizer.encoding._mergeable_ranks
    return byte_level_json(tokenizer, ranks, fields["special"], pattern)


def from_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict:
    """For BPE models, and those of single characters. What has no exact form is left for
    check_same_ids to find: Unigram models, which compare sums of logarithms, so ties would be
    decided otherwise; pieces that a user defined; and normalisations such as NFKC.
    """
    model, count = tokenizer.first, tokenizer.vocab_size
    names = [model.id_to_piece(i).replace(SPACE, " ") for i in range(count)]
    if len(set(names)) < count:
        raise ValueError(
            "two pieces of this SentencePiece model are the same but for U+2581 and a space"
        )
    special = {names[i]: i for i in range(count) if model.is_control(i) or model.is_unknown(i)}
    ranks = {
        names[i]: -model.get_score(i)
        for i in range(count)
        if not model.is_byte(i) and names[i] not in special
    }
    made = bpe_model(
        {name: i for i, name in enumerate(names)},
        merges_of(ranks),
        unk_token=names[model.unk_id()],
        fuse_unk=True,
        byte_fallback=any(map(model.is_byte, range(count))),
    )
    before = []
    decoder = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.drops_spaces:
        before += [replace_step(r"\A +", ""), replace_step(" {2,}", " ")]
    if tokenizer.mark is None:  # U+2581 in a text becomes a space
        before += [replace_step(SPACE, " ")]
    if tokenizer.dummy_prefix:
        before += [{"type": "Prepend", "prepend": " "}]
        decoder += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if tokenizer.drops_spaces:
        before += [replace_step(r" +\z", "")]
    return assemble(tokenizer, made, special, decoder, normalizer=before)


CONVERSIONS: dict[type[Tokenizer], Callable[..., dict]] = {
    ByteTokenizer: from_byte,
    CharTokenizer: from_char,
    TiktokenTokenizer: from_tiktoken,
    SentencePieceTokenizer: from_sentencepiece,
    HuggingFaceTokenizer: lambda tokenizer: tokenizer.tokenizer,
}


def byte_level_json(
    tokenizer: Tokenizer, ranks: dict[bytes, int], special: dict[str, int], pattern: str | None
) -> dict:
    """The tokenizer.json of pieces that are bytes, spelled in an alphabet of 256 visible
    characters. `pattern` cuts a text before it is tokenized.
    """
    alphabet = byte_alphabet()
    names = {piece: "".join(alphabet[byte] for byte in piece) for piece in ranks}
    vocab = {names[piece]: i for piece, i in ranks.items()} | special
    merges = [(names[left], names[right]) for left, right in merges_of(ranks)]
    model = bpe_model(vocab, merges, ignore_merges=pattern is not None)
    spell = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    before = [split_step(pattern), spell] if pattern else [spell]
    return assemble(tokenizer, model, special, [spell], pre_tokenizer=before)


def merges_of(ranks: dict) -> list[tuple]:
    """Every pair of pieces that together are a piece, the best piece first; `ranks` has the pieces
    (str or bytes) and their ranks (the lowest is the best).

    Two pairs can make the same piece of overlapping text: in x y z, where x y = y z. Then the left
    one is to be merged. Its second half y is also the beginning of the piece, so it comes first.
    """
    if max(map(len, ranks), default=0) > LONGEST_PIECE:
        raise ValueError(f"this tokenizer has a piece of more than {LONGEST_PIECE} characters")
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        left = [pair for pair in known if piece.startswith(pair[1])]
        merges += left + [pair for pair in known if not piece.startswith(pair[1])]
    return merges


def bpe_model(vocab: dict[str, int], merges: list[tuple], **settings: Any) -> dict:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": vocab,
        "merges": merges,
    }


def replace_step(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def split_step(pattern: str) -> dict:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def assemble(
    tokenizer: Tokenizer,
    model: dict,
    special: dict[str, int],
    decoder: list[dict],
    normalizer: list[dict] | None = None,
    pre_tokenizer: list[dict] | None = None,
) -> dict:
    """A tokenizer.json of its parts; decoder, normalizer and pre_tokenizer are lists of steps."""

    def sequence(kind: str, steps: list[dict] | None) -> dict | None:
        return {"type": "Sequence", kind: steps} if steps else None

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = {i: name for name, i in special.items()}
    before, after = ([names[i] for i in ids] for ids in (tokenizer.before, tokenizer.after))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in special.items()
        ],
        "normalizer": sequence("normalizers", normalizer),
        "pre_tokenizer": sequence("pretokenizers", pre_tokenizer),
        "post_processor": around_text(before, after, special) if before or after else None,
        "decoder": sequence("decoders", decoder),
        "model": model,
    }


def around_text(before: list[str], after: list[str], ids: dict[str, int]) -> dict:
    """The post-processor that puts special tokens before and behind a text, and around both of a
    pair.
    """

    def token(name: str, kind: int) -> dict:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    def one(text: str, kind: int) -> list[dict]:
        return [
            *(token(name, kind) for name in before),
            {"Sequence": {"id": text, "type_id": kind}},
            *(token(name, kind) for name in after),
        ]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in before + after
        },
    }


def texts_to_try(tokenizer: Tokenizer, made: dict) -> Iterator[str]:
    """Texts of many kinds, the names of special tokens, and all pieces, each alone and all beside
    each other.
    """
    names = [token["content"] for token in made["added_tokens"]]
    yield from names
    yield "a".join(names)
    yield from (piece.decode(errors="ignore") for piece in tokenizer.pieces)
    yield from probe_texts(tokenizer.pieces)


def check_same_ids(tokenizer: Tokenizer, made: dict, program: str = "Hugging Face") -> None:
    """ValueError if, for one of the probes, the library makes other ids of the tokenizer.json
    `made` than we do, or makes another text of the ids. The error names the program it is for.
    """
    refusal = f"this {tokenizer.kind} tokenizer has no exact form for {program}"
    try:
        library = run_by_library(made)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from None
    for text in texts_to_try(tokenizer, made):
        if isinstance(tokenizer, CharTokenizer):  # it refuses characters that it does not know
            text = "".join(char for char in text if char in tokenizer.ids)
        ours = tokenizer.encode(text)
        with rust_errors(refusal):
            theirs = library.encode(text, add_special_tokens=False).ids
            back = library.decode(theirs, skip_special_tokens=True)
        if theirs != ours or back != tokenizer.decode(ours):
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            at = same.index(False) if False in same else len(ours)
            raise ValueError(
                f"{refusal}: of {text!r:.99} it would make other ids from place {at} on, or "
                f"another text of them; if it came with a tokenizer.json, name that folder"
            )
