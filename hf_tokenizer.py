"""Our tokenizers as the files from which transformers' AutoTokenizer makes the same ids.

SentencePiece and tiktoken both merge, again and again, the leftmost of the neighbours that make the best piece of all,
which Hugging Face calls BPE; bytes are a BPE without merges. SentencePiece writes U+2581 for a space: the vocabularies
made here have the space itself, so that a U+2581 in a text stays one, in bytes, as with us.
"""

import json
import re
from collections.abc import Callable, Iterator

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

END = "<|endoftext|>"  # the name that GPT-2 gave it, at which llama.cpp too knows to stop
LONGEST = 1000  # a piece is cut at every place, and the longest known (spaces) have 128
PROBES = [
    "", " ", "a", " a", "a ", "  two  spaces, three   and many" + 40 * " ", "\t tab\t\t", "a\r\nb\rc\n\n\nd\n \n  \n",
    SPACE, f"{SPACE}a{SPACE} {SPACE}{SPACE}", "\0nul\0", "\ufeffbom", "<unk><0x0A> <0xE2>", "===----....!!!??((([[[{{{",
    "na\u00efve caf\u00e9 e\u0301 \u212b\ufb01\u00bd\u017f", "\u00a0\u2028\u3000\x85\x0b\x0c\x1b\x7f",
    "\U0001f600 \U0001f468\u200d\U0001f469 \u4f60\u597d\u3002 \u0627\u0644 \u0e01 \uac00", "IT'S we'll They'Ve x'y",
    "0 12 345 6789 12345678 1,000.5 \u0663\u00b2 3rd", "aaaaaaaa ababababa abcabcabc",
    "def f(x):\n    if x:\n\n        return  None  # \u00e9\n", "https://example.org/a_b-c?d=%20&e=1", PATTERN_PROBE]


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name -> content of the files from which transformers.AutoTokenizer.from_pretrained makes this tokenizer.

    Every text gets our ids, bos in front of them where special tokens are added, and decodes to what ours gives; a
    special token spelled out in a text is text. The tokenizers of Hugging Face get their own files back, which put in
    front, and take for special, what they did before. Raises ValueError, in one line, if the made file gives other ids
    for one of many kinds of text, which happens with rare kinds of SentencePiece models and of tiktoken patterns.
    Letters newer than the regular expressions' Unicode tables may be split otherwise by tiktoken's patterns.
    """
    made = JSON_OF[type(tokenizer)](tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        verify(tokenizer, made)
    files = {"tokenizer.json": as_json(made), "tokenizer_config.json": as_json(settings(tokenizer, made))}
    if isinstance(tokenizer, SentencePieceTokenizer):
        files[tokenizer.file] = tokenizer.content()  # llama.cpp's converter wants this one
    return files


def as_json(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def settings(tokenizer: Tokenizer, made: dict) -> dict:
    """The content of tokenizer_config.json. The class is the one that takes tokenizer.json as it is: transformers 5
    makes LlamaTokenizer's steps anew, and other ones."""
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {name: value for name, value in tokenizer.config.items() if name != "auto_map"} | plain
    names = {token["id"]: token["content"] for token in made["added_tokens"]}
    roles = {"bos_token": names.get(tokenizer.bos_id), "unk_token": made["model"]["unk_token"],
             "eos_token": names.get(min(tokenizer.end_ids - {tokenizer.bos_id}, default=tokenizer.bos_id))}
    return plain | {"add_prefix_space": tokenizer.dummy_prefix, "split_special_tokens": True} | {
        role: name for role, name in roles.items() if name}


def layout(model: dict, special: dict[str, int], bos_id: int | None, decoder: list[dict],
           normalizer: list[dict] | None = None, pre_tokenizer: list[dict] | None = None) -> dict:
    """A tokenizer.json of its parts, each of these a list of steps."""
    def sequence(kind: str, steps: list[dict] | None) -> dict | None:
        return {"type": "Sequence", kind: steps} if steps else None
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for name, i in special.items()],
            "normalizer": sequence("normalizers", normalizer),
            "pre_tokenizer": sequence("pretokenizers", pre_tokenizer),
            "post_processor": next((bos_in_front(name, i) for name, i in special.items() if i == bos_id), None),
            "decoder": sequence("decoders", decoder), "model": model}


def bos_in_front(name: str, i: int) -> dict:
    """The post-processor that puts bos before a text, and before both of a pair."""
    def of(text: str, kind: int) -> list[dict]:
        return [{"SpecialToken": {"id": name, "type_id": kind}}, {"Sequence": {"id": text, "type_id": kind}}]
    return {"type": "TemplateProcessing", "single": of("A", 0), "pair": of("A", 0) + of("B", 1),
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}}}


def merges(ranks: dict) -> list[tuple]:
    """Every pair that makes a piece, best piece first, of the pieces (str or bytes) and their ranks (lowest is best).

    Of two overlapping pairs that make the same piece the left one is to be merged. In x y z they overlap on y, so
    x y = y z: the left one is the pair whose second half is also the beginning of the piece.
    """
    found = []
    if max(map(len, ranks), default=0) > LONGEST:
        raise ValueError(f"this tokenizer has a piece of more than {LONGEST} characters")
    for piece in sorted(ranks, key=ranks.__getitem__):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += sorted((pair for pair in pairs if pair[0] in ranks and pair[1] in ranks),
                        key=lambda pair: not piece.startswith(pair[1]))
    return found


def bpe(vocab: dict[str, int], merges: list[tuple], **settings) -> dict:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            **settings, "vocab": vocab, "merges": merges}


def byte_level(ranks: dict[bytes, int], special: dict[str, int], bos_id: int | None, pattern: str | None) -> dict:
    """The tokenizer.json of byte sequences, which are spelled in an alphabet of 256 visible characters."""
    alphabet = byte_alphabet()
    names = {piece: "".join(alphabet[byte] for byte in piece) for piece in ranks}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return layout(bpe({names[piece]: i for piece, i in ranks.items()} | special,
                      [(names[left], names[right]) for left, right in merges(ranks)],
                      ignore_merges=pattern is not None),
                  special, bos_id, [level], pre_tokenizer=[split, level] if pattern else [level])


def from_byte(tokenizer: ByteTokenizer) -> dict:
    return byte_level({bytes([i]): i for i in range(256)}, {END: tokenizer.bos_id}, tokenizer.bos_id, None)


def from_tiktoken(tokenizer: TiktokenTokenizer) -> dict:
    """Hugging Face's regular expressions are Oniguruma's: there {1,3}+ repeats what {1,3} matched instead of keeping
    it, and $ also matches before a newline."""
    fields, encoding = tokenizer.fields(), tokenizer.encoding
    pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", fields["pattern"])
    pattern = re.sub(r"(?<!\\)\$", r"\\z", pattern)
    return byte_level(encoding._mergeable_ranks, fields["special"], tokenizer.bos_id, pattern)


def from_char(tokenizer: CharTokenizer) -> dict:
    """Characters outside the vocabulary are refused there too: a WordLevel model without an unknown token does that."""
    model = {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": ""}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return layout(model, {}, None, [{"type": "Fuse"}], pre_tokenizer=[split])


def from_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict:
    """For BPE models, and those of single characters. Unigram ones, which compare sums of logarithms, are found out by
    verify: ties would be decided otherwise. So are pieces that a user defined, and normalisations such as NFKC."""
    model, count = tokenizer.first, tokenizer.vocab_size
    names = [model.id_to_piece(i).replace(SPACE, " ") for i in range(count)]
    special = {names[i]: i for i in range(count) if model.is_control(i) or model.is_unknown(i)}
    ranks = {names[i]: -model.get_score(i) for i in range(count) if not model.is_byte(i) and names[i] not in special}
    if len(set(names)) < count:
        raise ValueError("two pieces of this SentencePiece model are the same but for U+2581 and a space")
    made = bpe({name: i for i, name in enumerate(names)}, merges(ranks), unk_token=names[model.unk_id()], fuse_unk=True,
               byte_fallback=any(map(model.is_byte, range(count))))
    before = [replace(r"\A +", ""), replace(" {2,}", " ")] if tokenizer.drops_spaces else []
    before += [replace(SPACE, " ")] if tokenizer.mark is None else []
    before += [{"type": "Prepend", "prepend": " "}] if tokenizer.dummy_prefix else []
    before += [replace(r" +\z", "")] if tokenizer.drops_spaces else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.dummy_prefix else []
    return layout(made, special, tokenizer.bos_id, [{"type": "ByteFallback"}, {"type": "Fuse"}, *after], before)


def replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


JSON_OF: dict[type[Tokenizer], Callable[..., dict]] = {
    ByteTokenizer: from_byte, CharTokenizer: from_char, TiktokenTokenizer: from_tiktoken,
    SentencePieceTokenizer: from_sentencepiece, HuggingFaceTokenizer: lambda tokenizer: tokenizer.tokenizer}


def probes(tokenizer: Tokenizer, made: dict) -> Iterator[str]:
    """Texts to try: of many kinds, the names of special tokens, and all pieces, alone and beside each other."""
    yield from PROBES
    names = [token["content"] for token in made["added_tokens"]]
    yield from names
    yield "a".join(names)
    pieces = [piece.decode(errors="ignore") for piece in tokenizer.pieces]
    yield from pieces
    yield "".join(pieces)
    yield " ".join(reversed(pieces))
    yield "\n".join(pieces)


def verify(tokenizer: Tokenizer, made: dict) -> None:
    """Raises ValueError if the library makes other ids, or another text of them, than we do, for any of the probes."""
    refusal = f"this {tokenizer.kind} tokenizer has no exact form for Hugging Face"
    try:
        library = run_by_library(made)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from None
    known = set(tokenizer.ids) if isinstance(tokenizer, CharTokenizer) else None
    for text in probes(tokenizer, made):
        text = text if known is None else "".join(filter(known.__contains__, text))
        ours = tokenizer.encode(text)
        with rust_errors(refusal):
            theirs = library.encode(text, add_special_tokens=False).ids
            back = library.decode(theirs, skip_special_tokens=True)
        if theirs != ours or back != tokenizer.decode(ours):
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise ValueError(f"{refusal}: of {text!r:.99} it would make other ids from place {at} on, or another text "
                             "of them; if it came with a tokenizer.json, import that without its tokenizer.model")
