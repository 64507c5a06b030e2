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

from data.tokenizer import (
    PATTERN_PROBE,
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from data.tokenizer_json import SPACE, byte_alphabet, run_by_library, rust_errors

END = "<|endoftext|>"  # GPT-2's name for the end of a text, at which llama.cpp stops, too
LONGEST_PIECE = 1000  # a piece is cut at every place; the longest that is known, of spaces, has 128
PROBES = [
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  spaces, three   and many" + 40 * " ",
    "\t tab\t\t",
    "a\r\nb\rc\n\n\nd\n \n  \n",
    SPACE,
    f"{SPACE}a{SPACE} {SPACE}{SPACE}",
    "\0nul\0",
    "\ufeffbom",
    "<unk><0x0A> <0xE2>",
    "===----....!!!??((([[[{{{",
    "na\u00efve caf\u00e9 e\u0301 \u212b\ufb01\u00bd\u017f",
    "\u00a0\u2028\u3000\x85\x0b\x0c\x1b\x7f",
    "\U0001f600 \U0001f468\u200d\U0001f469 \u4f60\u597d\u3002 \u0627\u0644 \u0e01 \uac00",
    "IT'S we'll They'Ve x'y",
    "0 12 345 6789 12345678 1,000.5 \u0663\u00b2 3rd",
    "aaaaaaaa ababababa abcabcabc",
    "def f(x):\n    if x:\n\n        return  None  # \u00e9\n",
    "https://example.org/a_b-c?d=%20&e=1",
    PATTERN_PROBE,
]


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name -> content of the files from which transformers.AutoTokenizer.from_pretrained makes this
    tokenizer.

    Every text gets our ids, with bos in front where special tokens are added, and ids become the
    text that ours gives. A special token that is spelled out in a text is text. A tokenizer of
    Hugging Face gets its own files back, and treats bos and special tokens as it did before.

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
        "tokenizer_config.json": json_bytes(tokenizer_config(tokenizer, made), indent=1),
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        files[tokenizer.file] = tokenizer.content()  # llama.cpp's converter reads this one
    return files


def json_bytes(content: dict[str, Any], indent: int) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode()


def tokenizer_config(tokenizer: Tokenizer, made: dict) -> dict:
    """The content of tokenizer_config.json, for the tokenizer.json `made`."""
    # This class takes tokenizer.json as it is. LlamaTokenizer would replace the steps in it by its
    # own, which are others.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        theirs = {name: value for name, value in tokenizer.config.items() if name != "auto_map"}
        return theirs | config
    names = {token["id"]: token["content"] for token in made["added_tokens"]}
    other_ends = tokenizer.end_ids - {tokenizer.bos_id}
    roles = {
        "bos_token": names.get(tokenizer.bos_id),
        "unk_token": made["model"]["unk_token"],
        "eos_token": names.get(min(other_ends, default=tokenizer.bos_id)),
    }
    config |= {"add_prefix_space": tokenizer.dummy_prefix, "split_special_tokens": True}
    return config | {role: name for role, name in roles.items() if name}


def from_byte(tokenizer: ByteTokenizer) -> dict:
    ranks = {bytes([i]): i for i in range(256)}
    return byte_level_json(ranks, {END: tokenizer.bos_id}, tokenizer.bos_id, None)


def from_char(tokenizer: CharTokenizer) -> dict:
    """A WordLevel model without an unknown token refuses characters that are not in the vocabulary,
    as ours does.
    """
    model = {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": ""}
    decoder = [{"type": "Fuse"}]
    return assemble(model, {}, None, decoder, pre_tokenizer=[split_step(r"[\s\S]")])


def from_tiktoken(tokenizer: TiktokenTokenizer) -> dict:
    """Hugging Face's regular expressions are Oniguruma's, where two things mean something else: in
    {1,3}+ the + repeats what {1,3} matched, instead of keeping it; and $ also matches before a
    newline.
    """
    fields = tokenizer.fields()
    pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", fields["pattern"])
    pattern = re.sub(r"(?<!\\)\$", r"\\z", pattern)
    ranks = tokenizer.encoding._mergeable_ranks
    return byte_level_json(ranks, fields["special"], tokenizer.bos_id, pattern)


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
    return assemble(made, special, tokenizer.bos_id, decoder, normalizer=before)


CONVERSIONS: dict[type[Tokenizer], Callable[..., dict]] = {
    ByteTokenizer: from_byte,
    CharTokenizer: from_char,
    TiktokenTokenizer: from_tiktoken,
    SentencePieceTokenizer: from_sentencepiece,
    HuggingFaceTokenizer: lambda tokenizer: tokenizer.tokenizer,
}


def byte_level_json(
    ranks: dict[bytes, int], special: dict[str, int], bos_id: int | None, pattern: str | None
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
    return assemble(model, special, bos_id, [spell], pre_tokenizer=before)


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
    model: dict,
    special: dict[str, int],
    bos_id: int | None,
    decoder: list[dict],
    normalizer: list[dict] | None = None,
    pre_tokenizer: list[dict] | None = None,
) -> dict:
    """A tokenizer.json of its parts; decoder, normalizer and pre_tokenizer are lists of steps."""

    def sequence(kind: str, steps: list[dict] | None) -> dict | None:
        return {"type": "Sequence", kind: steps} if steps else None

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos_names = [name for name, i in special.items() if i == bos_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in special.items()
        ],
        "normalizer": sequence("normalizers", normalizer),
        "pre_tokenizer": sequence("pretokenizers", pre_tokenizer),
        "post_processor": bos_in_front(bos_names[0], bos_id) if bos_names else None,
        "decoder": sequence("decoders", decoder),
        "model": model,
    }


def bos_in_front(name: str, i: int) -> dict:
    """The post-processor that puts bos before a text, and before both of a pair."""

    def after_bos(text: str, kind: int) -> list[dict]:
        return [
            {"SpecialToken": {"id": name, "type_id": kind}},
            {"Sequence": {"id": text, "type_id": kind}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": after_bos("A", 0),
        "pair": after_bos("A", 0) + after_bos("B", 1),
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }


def probe_texts(tokenizer: Tokenizer, made: dict) -> Iterator[str]:
    """Texts to try: of many kinds, the names of special tokens, and all pieces, each alone and all
    beside each other.
    """
    yield from PROBES
    names = [token["content"] for token in made["added_tokens"]]
    yield from names
    yield "a".join(names)
    pieces = [piece.decode(errors="ignore") for piece in tokenizer.pieces]
    yield from pieces
    yield "".join(pieces)
    yield " ".join(reversed(pieces))
    yield "\n".join(pieces)


def check_same_ids(tokenizer: Tokenizer, made: dict) -> None:
    """ValueError if, for one of the probes, the library makes other ids of the tokenizer.json
    `made` than we do, or makes another text of the ids.
    """
    refusal = f"this {tokenizer.kind} tokenizer has no exact form for Hugging Face"
    try:
        library = run_by_library(made)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from None
    for text in probe_texts(tokenizer, made):
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
                f"another text of them; if it came with a tokenizer.json, import that without its "
                f"tokenizer.model"
            )
