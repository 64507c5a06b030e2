"""A tokenizer as the vocabulary of a GGUF file, with which llama.cpp makes the same ids.

llama.cpp has two kinds that fit here. "llama" is the BPE of SentencePiece; "gpt2" is byte-level
BPE, and has names for the ways in which a text is cut before it. A tokenizer that has no exact form
there is refused.

Reading order: gguf_vocabulary; roles; the two kinds; the cut.
"""

from collections.abc import Collection
from typing import Any

from config.command import warn
from exchange.hf import generation_config
from text.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from text.tokenizer_export import (
    CONVERSIONS,
    END,
    check_same_ids,
    from_sentencepiece,
    names_only,
)
from text.tokenizer_json import MATCHING, flattened, json_ids, kinds_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's types of a token
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # a text ends at each of them
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_BY_TIKTOKEN = (  # cuts alike
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
# The patterns that cut a text, one after the other -> whether a part that is a piece is taken at
# once, without its merges (ignore_merges) -> llama.cpp's name for both.
CUTS = {
    (GPT2,): {False: "gpt-2"},
    (GPT2_BY_TIKTOKEN,): {False: "gpt-2"},
    (DIGIT, GPT2): {False: "smollm"},
    (LLAMA3,): {False: "dbrx", True: "llama-bpe"},
    (QWEN2,): {False: "qwen2"},
}


def gguf_vocabulary(
    tokenizer: Tokenizer, size: int, turn_ends: Collection[int] = ()
) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer: the name of each setting, as GGUFWriter's method
    add_NAME has it, and its value. Ids up to `size`, that of the embedding, are filled up. A text
    ends at `turn_ends`, too, with which the model ends an answer.

    ValueError if llama.cpp would make other ids of a text, or could not end one.
    """
    model = tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.sentencepiece:
        model = SentencePieceTokenizer(tokenizer.sentencepiece)  # which gives the same ids
    match model:
        case SentencePieceTokenizer():
            return sentencepiece_vocabulary(model, size) | roles(tokenizer, turn_ends)
        case ByteTokenizer() | TiktokenTokenizer() | HuggingFaceTokenizer():
            return byte_level_vocabulary(model, size) | roles(tokenizer, turn_ends)
    raise ValueError(
        f"llama.cpp has no vocabulary like {tokenizer.kind}: prepare the data with "
        f"tokenizer=sentencepiece, byte or tiktoken:gpt2"
    )


# Roles


def roles(tokenizer: Tokenizer, turn_ends: Collection[int]) -> dict[str, Any]:
    """What stands before a prompt, what ends a text, and the chat template. What stands behind a
    document is left out, for a prompt is to go on.
    """
    if tokenizer.before not in ([], [tokenizer.bos_id]):
        raise ValueError(
            f"this tokenizer puts the ids {tokenizer.before} before a text, and llama.cpp puts "
            f"only bos there, {tokenizer.bos_id}: change the post_processor of its tokenizer.json"
        )
    pad = generation_config(tokenizer).get("pad_token_id")
    found = {
        "bos_token_id": tokenizer.bos_id,
        "pad_token_id": pad if pad in range(tokenizer.vocab_size) else None,  # -1 means none, too
    } | dict(zip(END_KEYS, ends_of_text(tokenizer, turn_ends), strict=False))
    added = {"add_bos_token": bool(tokenizer.before), "add_eos_token": False}
    return {name: value for name, value in found.items() if value is not None} | added


def ends_of_text(tokenizer: Tokenizer, turn_ends: Collection[int]) -> list[int]:
    """The ids that end a text; that which tokenizer_config.json names comes first, for chat
    templates write it, and bos last.
    """
    said = generation_config(tokenizer, turn_ends)["eos_token_id"]
    ends = said if isinstance(said, list) else [said]
    if ends == [None] or len(ends) > len(END_KEYS):
        raise ValueError(
            f"this tokenizer ends a text at {'no id' if ends == [None] else ends}, and llama.cpp "
            f"wants one id to {len(END_KEYS)}: set eos_token_id in generation_config.json"
        )
    eos = tokenizer.special.get(names_only(tokenizer.config.get("eos_token")))
    return sorted(ends, key=lambda i: (i != eos, i == tokenizer.bos_id))


def named_ids(names: dict[int, str], types: dict[int, int], size: int) -> dict[str, Any]:
    """The name and the type of each id; one without a name is unused."""
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    if len(set(tokens)) < size:
        raise ValueError("two tokens have the same name, and llama.cpp wants one name for each")
    return {"token_list": tokens, "token_types": [types.get(i, UNUSED) for i in range(size)]}


# The two kinds


def sentencepiece_vocabulary(tokenizer: SentencePieceTokenizer, size: int) -> dict[str, Any]:
    if tokenizer.mark is None:
        raise ValueError(
            "this SentencePiece model drops spaces or has no bytes for unknown characters, and "
            "llama.cpp needs both: data/prepare.py trains such a model with tokenizer=sentencepiece"
        )
    check_same_ids(tokenizer, from_sentencepiece(tokenizer), "llama.cpp")  # no Unigram, no NFKC
    model, every = tokenizer.first, range(tokenizer.vocab_size)
    tests = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, BYTE: model.is_byte}
    types = {i: next((t for t, test in tests.items() if test(i)), NORMAL) for i in every}
    unused = [0.0] * (size - len(every))
    return {
        "tokenizer_model": "llama",
        "token_scores": [model.get_score(i) for i in every] + unused,
        "unk_token_id": model.unk_id(),
        "add_space_prefix": tokenizer.dummy_prefix,
    } | named_ids({i: model.id_to_piece(i) for i in every}, types, size)


def byte_level_vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Bytes are a BPE without merges."""
    made = CONVERSIONS[type(tokenizer)](tokenizer)
    cut = name_of_cut(tokenizer, made)
    added, names = made["added_tokens"], {i: name for name, i in json_ids(made).items()}
    plain = [token for token in added if tokenizer.pieces[token["id"]]]
    if spaced := [t["content"] for t in plain if any(t.get(how) for how in MATCHING[:3])]:
        raise ValueError(
            f"its token {spaced[0]!r:.99} is found by the characters around it, and llama.cpp does "
            f"not look at them: set {', '.join(MATCHING[:3])} to false in its tokenizer.json"
        )
    types = {i: NORMAL if tokenizer.pieces[i] else CONTROL for i in names}
    types |= {token["id"]: USER_DEFINED for token in plain}
    merges = [m if isinstance(m, str) else " ".join(m) for m in made["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": cut,
        "token_merges": merges or [f"{END} {END}"],  # one must be there, and this one never applies
    } | named_ids(names, types, size)


# The cut


def name_of_cut(tokenizer: Tokenizer, made: dict) -> str:
    """llama.cpp's name for the way in which the tokenizer.json `made` cuts a text."""
    patterns, model = cut_patterns(made), made["model"]
    if not patterns and not model["merges"]:
        return "gpt-2"  # without merges, each cut gives the same bytes
    known = CUTS.get(patterns, {})
    at_once = bool(model.get("ignore_merges"))
    if at_once in known and isinstance(tokenizer, HuggingFaceTokenizer):
        return known[at_once]
    if False not in known:
        names = sorted({name for names in CUTS.values() for name in names.values()})
        raise ValueError(
            f"this tokenizer cuts a text by {' and then '.join(map(repr, patterns)) or 'nothing'}, "
            f"which is none of llama.cpp's ways that are known here: {', '.join(names)}"
        )
    by_merges = made | {"model": model | {"ignore_merges": False}}
    check_same_ids(tokenizer, by_merges, "llama.cpp")
    return known[False]


def cut_patterns(made: dict) -> tuple[str, ...]:
    """The patterns by which a byte-level tokenizer.json cuts a text, one after the other.
    ValueError if it is not byte-level BPE, or takes a step that llama.cpp does not take.
    """
    steps = flattened(made.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if made["model"]["type"] != "BPE" or kinds[-1:] != ["ByteLevel"]:
        raise ValueError(
            "this tokenizer.json is not byte-level BPE, which llama.cpp could take: put the "
            "tokenizer.model of SentencePiece beside it, if the model has one"
        )
    before = kinds_of(flattened(made.get("normalizer")))
    patterns = [pattern_of(step) for step in steps]
    unknown = before - {"NFC"} | {k for k, p in zip(kinds, patterns, strict=True) if p is None}
    if unknown:
        raise ValueError(
            f"this tokenizer.json takes steps that llama.cpp does not take as it does: "
            f"{', '.join(sorted(unknown))!s:.200}"
        )
    if before:
        warn(
            "llama.cpp does not bring a text into the form NFC, as this tokenizer does: a text in "
            "another form gets other ids there"
        )
    return tuple(filter(None, patterns))


def pattern_of(step: dict) -> str | None:
    """The pattern by which a step cuts; "" if it only spells bytes, None if it does more."""
    match step:
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
            return None if step.get("invert") else pattern
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2 if step.get("use_regex", True) else ""
    return None
