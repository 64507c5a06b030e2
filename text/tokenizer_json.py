"""Tokenizer files as they are on the disk, and what a tokenizer.json of Hugging Face says.

In reading order: reading a file, with errors that name it; the steps, ids and pieces in a
tokenizer.json; what the files beside it say; texts to try tokenizers with; the library that runs
it.
"""

import base64
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

LARGEST_FILE = 2**25  # bytes; the file of Llama 3's tokenizer has half of that
LARGEST_ID = 2**22  # unused ids take memory, too; the largest vocabularies have 2**18 ids
LONGEST_TRY = 10  # seconds for what an honest tokenizer does in a part of one
MOST_STEPS = 64
MOST_GROWTH = 256  # the steps of a tokenizer.json may make a text so many times as long
MOST_CHARS = 256  # of its regular expressions, each of which is tried over and over
MOST_AROUND = 64  # ids that it may put around a text
SPACE = "\u2581"  # SentencePiece writes a space as this character
DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"}  # known here
ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_PREFIX = {"add_prefix_space": False, "prepend_scheme": "never"}
# How many times as long these steps can make a text. Those in STEADY never make it longer. For the
# forms of Unicode and for Lowercase it is what they do to many characters; a few become longer.
GROWTH = {
    "ByteLevel": 2,
    "Metaspace": 2,
    "Lowercase": 2,
    "BertNormalizer": 4,
    "NFC": 4,
    "NFD": 4,
    "NFKC": 4,
    "NFKD": 4,
}
STEADY = (
    "BertPreTokenizer ByteFallback CharDelimiterSplit Digits Fuse Nmt Punctuation Split Strip "
    "StripAccents UnicodeScripts Whitespace WhitespaceSplit"
).split()


# Reading a file


def read_capped(path: Path) -> bytes:
    """The content of a tokenizer's file; an error if it is no file or larger than LARGEST_FILE."""
    if not path.is_file():  # opening a FIFO would wait for ever
        raise FileNotFoundError(f"{path}: no such tokenizer file; name an existing .model file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{path}: has more than {LARGEST_FILE:,} bytes, no tokenizer needs as many"
        )
    return path.read_bytes()


class Mismatch(ValueError):
    """What the files beside a tokenizer say does not fit it. `cure` says what to do about that."""

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.cure = cure or (
            "it is not the tokenizer of the config.json and generation_config.json beside it, or "
            "the ids there are wrong: correct them"
        )


class Damaged(ValueError):
    """A file is damaged; the error names it."""


@contextmanager
def blamed_on(path: Path, foreign: bool = False) -> Iterator[None]:
    """Turns the errors that a damaged file causes into a ValueError of one line that names it.

    Another file that was found damaged meanwhile keeps the blame. foreign: the file is Hugging
    Face's, so the files beside it can be wrong instead (Mismatch).
    """
    try:
        yield
    except Damaged:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if foreign and isinstance(error, Mismatch):
            raise ValueError(f"{path}: {error}: {error.cure}") from None
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise Damaged(
            f"{path}: damaged tokenizer file ({reason}); make or fetch it again"
        ) from None


def read_text(path: Path) -> str:
    content = read_capped(path)
    with blamed_on(path):
        return content.decode()


def read_json_object(path: Path) -> dict:
    """The object in a JSON file; ValueError in one line if the file holds anything else."""
    content = read_text(path)
    with blamed_on(path):
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError("not an object in braces")
        return fields


# Steps, ids and pieces


def flattened(part: dict | None) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, with Sequences inside it
    dissolved.
    """
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    (name,) = {"normalizers", "pretokenizers", "processors", "decoders"} & part.keys()
    return [step for inner in part[name] for step in flattened(inner)]


def kinds_of(steps: list[dict]) -> set[str]:
    return {step["type"] for step in steps}


def without_prefix(tokenizer: dict) -> dict:
    """A tokenizer.json without the steps that put a space before a text.

    The same object if it has no such step.
    """
    before = flattened(tokenizer.get("normalizer"))
    splits = flattened(tokenizer.get("pre_tokenizer"))
    kept = [step for step in before if step["type"] != "Prepend"]
    bare = [
        step | {name: off for name, off in NO_PREFIX.items() if name in step} for step in splits
    ]
    if (kept, bare) == (before, splits):
        return tokenizer
    return tokenizer | {
        "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": bare},
    }


def byte_alphabet() -> list[str]:
    """The character with which a byte-level vocabulary writes each byte.

    A visible character of Latin-1 stands for itself; the other bytes get U+0100 and following.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def json_ids(tokenizer: dict) -> dict[str, int]:
    """The id of each entry of a tokenizer.json, with the tokens that were added.

    Raises ValueError if an id is negative or LARGEST_ID or more.
    """
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, dict):
        ids = dict(vocab)
    else:  # a Unigram model has a list of (piece, score)
        ids = {entry[0]: i for i, entry in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if not ids or not all(type(i) is int and 0 <= i < LARGEST_ID for i in ids.values()):
        raise ValueError(f"it must have ids, all of them below {LARGEST_ID:,}")
    return ids


def json_pieces(tokenizer: dict) -> list[bytes]:
    """The bytes of each id of a tokenizer.json; b"" for special tokens and for unused ids.

    Raises ValueError if its decoder does more than to join pieces, as WordPiece's does.
    """
    kinds = kinds_of(flattened(tokenizer["decoder"]))
    if not kinds or kinds - DECODERS:
        raise ValueError(
            f"its decoder {', '.join(sorted(kinds - DECODERS)) or 'null'} is not one that is known "
            f"here: {', '.join(sorted(DECODERS))}"
        )
    ids = json_ids(tokenizer)
    pieces = [b""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        pieces[i] = piece_bytes(piece, kinds)
    for token in tokenizer["added_tokens"]:
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    return pieces


BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}


def piece_bytes(piece: str, decoders: set[str]) -> bytes:
    """The bytes that these decoders make of an entry of the vocabulary."""
    if "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[1:-1], 16)])
    if "ByteLevel" in decoders and all(char in BYTE_OF for char in piece):
        return bytes(BYTE_OF[char] for char in piece)
    if {"Metaspace", "Replace"} & decoders:
        piece = piece.replace(SPACE, " ")
    return piece.encode()


def ids_around(tokenizer: dict) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json puts before a text and behind it, such as bos and eos.

    Its post-processor is only read and never run: it can ask for more ids than memory has. Raises
    ValueError if it does anything else.
    """
    before, after = [], []
    for step in flattened(tokenizer.get("post_processor")):
        match step["type"]:
            case "ByteLevel":  # it moves offsets only
                continue
            case "BertProcessing" | "RobertaProcessing":
                first, last = [step["cls"][1]], [step["sep"][1]]
            case "TemplateProcessing":
                known, parts = step["special_tokens"], step["single"]
                (at,) = [i for i, part in enumerate(parts) if "Sequence" in part]
                names = [part["SpecialToken"]["id"] for part in parts if "Sequence" not in part]
                lengths = [len(known[name]["ids"]) for name in names[: MOST_AROUND + 1]]
                if len(names) > MOST_AROUND or sum(lengths) > MOST_AROUND:
                    raise ValueError(f"it puts more than {MOST_AROUND} ids around a text")
                first, last = (
                    [i for name in part for i in known[name]["ids"]]
                    for part in (names[:at], names[at:])
                )
            case kind:
                raise ValueError(f"its post-processor {kind!s:.80} is not known here")
        if before or after:  # in what order they count is the library's secret
            raise ValueError("its post-processor puts tokens around a text in two steps")
        before, after = first, last
    return before, after


def check_growth(tokenizer: dict) -> None:
    """ValueError if the steps of a tokenizer.json could make a text so long that it fills any
    memory, as a few replacements do that each double it.
    """
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        steps = [step for name in names for step in flattened(tokenizer.get(name))]
        if len(steps) > MOST_STEPS or math.prod(map(growth, steps)) > MOST_GROWTH:
            raise ValueError(
                f"its {' and '.join(names)} could make texts too long: {MOST_STEPS} steps that "
                f"make a text {MOST_GROWTH} times as long are the most"
            )


def growth(step: dict) -> int:
    """How many times as long a step of a tokenizer.json can make a text."""
    match step["type"]:
        case "Replace":
            # A regular expression can match where nothing is, between any two characters.
            old, new = step["pattern"].get("String"), len(step["content"])
            if old == "":
                raise ValueError("a step of it replaces the empty text")
            return 1 + new if old is None else max(1, math.ceil(new / len(old)))
        case "Prepend":
            return 1 + len(step["prepend"])
        case "Precompiled":
            table = base64.b64decode(step["precompiled_charsmap"] or "")
            size = int.from_bytes(table[:4], "little")
            if table and len(table) < 4 + size:  # the library reserves memory for all of it
                raise ValueError(f"its charsmap says {size:,} bytes and has {len(table) - 4:,}")
            return max(1, *map(len, table[4 + size :].split(b"\0")))
        case kind if kind in STEADY:
            return 1
        case kind if kind in GROWTH:
            return GROWTH[kind]
    raise ValueError(f"its step {step['type']!s:.80} is not known here")


# The files beside it


FOREIGN_TOKEN = (
    "it is not the tokenizer of the files beside it, or transformers would add the token to it: "
    "save the folder's tokenizer again with AutoTokenizer's save_pretrained, or take the token out "
    "of that file"
)
MATCHING = ("single_word", "lstrip", "rstrip", "normalized")  # how a token is found in a text


class Companions(NamedTuple):
    """What the files of a Hugging Face folder say beside its tokenizer."""

    config: dict  # tokenizer_config.json, with what transformers takes from files of their own
    generation: dict  # generation_config.json
    model: dict  # the ids of special tokens in config.json

    @property
    def merged(self) -> dict:
        """generation_config.json, with the ids of config.json where it names none."""
        return self.model | self.generation

    def ids(self, role: str, known: dict[str, int], special: Container[int]) -> list[int]:
        """The ids of the role "bos" or "eos", that of tokenizer_config.json first.

        All three files count, with one exception: many a config.json holds the ids of another
        tokenizer. Where generation_config.json speaks, config.json adds only special tokens.
        `known` has the id of each text, `special` the special tokens. Raises Mismatch if
        tokenizer_config.json names a text that is not in the vocabulary.
        """
        token = self.config.get(f"{role}_token")
        text = token.get("content", token) if isinstance(token, dict) else token
        if text is not None and (not isinstance(text, str) or text not in known):
            raise Mismatch(
                f"it does not have tokenizer_config.json's {role}_token {text!r:.99}", FOREIGN_TOKEN
            )
        found = [] if text is None else [known[text]]
        said, other = (
            [] if i is None else i if isinstance(i, list) else [i]
            for i in (file.get(f"{role}_token_id") for file in (self.generation, self.model))
        )
        if wrong := [i for i in said + other if type(i) is not int]:
            raise Mismatch(f"{role}_token_id must be an id or a list of ids, got {wrong[0]!r:.99}")
        found += said + [i for i in other if not said or i in special]
        return list(dict.fromkeys(found))


def read_companions(folder: Path) -> Companions:
    """The files of a Hugging Face folder, each of which may be missing."""

    def read(name: str) -> dict:
        return read_json_object(folder / name) if (folder / name).exists() else {}

    config = read("tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # else transformers leaves this old file alone
        config |= read("special_tokens_map.json")
    more = sorted(folder.glob("additional_chat_templates/*.jinja"))
    templates = {path.stem: read_text(path) for path in more}
    if (folder / "chat_template.jinja").exists():
        templates["default"] = read_text(folder / "chat_template.jinja")
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:  # as transformers 4 writes several templates, and 5 reads them too
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    generation, model = read("generation_config.json"), read("config.json")
    unnamed = [name for name in ID_NAMES if generation.get(name) is None]
    generation = {name: value for name, value in generation.items() if name not in unnamed}
    ids = {name: model[name] for name in ID_NAMES if model.get(name) is not None}
    return Companions(config, generation, ids)


def replaced_by(folder: Path, tokenizer: dict, config: dict) -> str | None:
    """The class for which transformers 5 replaces the steps in a folder's tokenizer.json, if that
    can change ids; else None. `config` is what tokenizer_config.json says.

    The regular expression of Qwen2Tokenizer is not compared.
    """
    about = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    family = about.get("model_type")
    usual = "Qwen2Tokenizer" if family == "qwen3" else ""
    name = str(config.get("tokenizer_class") or about.get("tokenizer_class") or usual)
    name = name.removesuffix("Fast")
    steps = [flattened(tokenizer.get(part)) for part in ("normalizer", "pre_tokenizer")]
    prefix = config.get("add_prefix_space")
    level = {"type": "ByteLevel", "add_prefix_space": prefix is True}
    match name:
        # For byte-level tokenizers and for Mistral, transformers takes tokenizer.json after all.
        case "LlamaTokenizer" if family != "mistral" and "ByteLevel" not in kinds_of(steps[1]):
            scheme = "always" if config.get("legacy") else "first"
            scheme = "never" if prefix is False else scheme
            space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme}
            wanted = [[], [space | {"split": False}]]
        case "GPT2Tokenizer":
            wanted = [[], [level | {"use_regex": True}]]
        case "Qwen2Tokenizer":
            split = {"type": "Split", "behavior": "Isolated", "invert": False}
            wanted = [[{"type": "NFC"}], [split, level | {"use_regex": False}]]
        case _:
            return None
    # A step can say more than is compared here, which then changes no id.
    same = [len(have) for have in steps] == [len(want) for want in wanted] and all(
        want.items() <= have.items()
        for have, want in zip(chain(*steps), chain(*wanted), strict=True)
    )
    model = tokenizer["model"]
    same &= bool(model.get("byte_fallback")) is (name == "LlamaTokenizer")
    return None if same and not model.get("ignore_merges") else name


def named_tokens(folder: Path) -> dict[str, tuple[str, dict]]:
    """The tokens that the files of a Hugging Face folder name beside its tokenizer: text -> (name
    of the file, the token as in a tokenizer.json, without its id). transformers adds those that the
    tokenizer does not have.
    """
    named: dict[str, tuple[str, dict]] = {}

    def take(file: str, said: Any, special: bool = True) -> None:
        match said:
            case str() if said:
                take(file, {"content": said}, special)
            case {"content": str(text)}:
                special = special or said.get("special") is True
                how = dict.fromkeys(MATCHING, False) | {"normalized": not special}
                how |= {name: said[name] for name in how if type(said.get(name)) is bool}
                if text:
                    token = {"content": text, **how, "special": special}
                    named.setdefault(text, (file, token))
            case list():
                for inner in said:
                    take(file, inner, special)
            case dict():
                take(file, list(said.values()), special)

    def take_file(file: str) -> dict:
        content = read_json_object(folder / file) if (folder / file).exists() else {}
        for name, said in content.items():
            if name.endswith(("_token", "special_tokens")):
                take(file, said)
        return content

    config = take_file("tokenizer_config.json")
    if "added_tokens_decoder" in config:  # else transformers leaves the old files alone
        take("tokenizer_config.json", config["added_tokens_decoder"], special=False)
        return named
    take_file("special_tokens_map.json")
    if (folder / "added_tokens.json").exists():
        take("added_tokens.json", list(read_json_object(folder / "added_tokens.json")), False)
    return named


# Texts to try tokenizers with


PATTERN_PROBE = "".join(map(chr, range(0x180)))
PATTERN_PROBE += " words, of all  kinds\n\n\t \u4f60\U0001f600 12 " + 64 * "a" + "!"
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


def probe_texts(pieces: list[bytes]) -> Iterator[str]:
    """Texts of many kinds, and all pieces of a vocabulary, each in a line and beside each other;
    100 at a time, for the time that some tokenizers take grows faster than their text.
    """
    yield from PROBES
    texts = [piece.decode(errors="ignore") for piece in pieces]
    for at in range(0, len(texts), 100):
        some = texts[at : at + 100]
        yield "\n".join(some)
        yield "".join(reversed(some))


# The library


def run_by_library(tokenizer: dict) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json, without its post-processor.

    Raises ValueError if it is damaged and OSError if the library is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise OSError(
            "a tokenizer.json of Hugging Face needs the library tokenizers: pip install -e '.[hf]'"
        ) from None
    # With these, pieces are not simply joined. A wrong prefix makes the library end the process.
    names = ("continuing_subword_prefix", "end_of_word_suffix")
    unknown = [name for name in names if tokenizer["model"].get(name)]
    if unknown:
        raise ValueError(f"its model has {' and '.join(unknown)}, which is not known here")
    if rate := tokenizer["model"].get("dropout"):
        raise Mismatch(
            f"its model leaves out merges by chance (dropout={rate!r:.20}), so a text would get "
            f"other ids each time",
            "make that null",
        )
    check_growth(tokenizer)
    with silent_panics(), rust_errors("not of Hugging Face's kind"):
        made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer | {"post_processor": None}))
    check_patterns(tokenizer)
    for token in tokenizer["added_tokens"]:
        given = made.token_to_id(token["content"])  # it counts on where an id is not the next one
        if token["content"] and given != token["id"]:
            raise ValueError(
                f"its added token {token['content']!r:.99} has the id {token['id']}, but the "
                f"library gives it {given}"
            )
    made.encode_special_tokens = True  # the library's name for: encode them as ordinary text
    if made.normalizer:  # it can panic
        with silent_panics(), rust_errors("its normalizer fails for a short text"):
            made.normalizer.normalize_str(PATTERN_PROBE)
    return made


def check_patterns(tokenizer: dict) -> None:
    """ValueError if the regular expressions of a tokenizer.json take very long for short texts.

    They run in code that no signal stops, so a child process tries them first. Most tokenizers have
    none, or only those that cannot take long: without groups, and with one repetition at most.
    """
    names = ("normalizer", "pre_tokenizer", "decoder")
    before, splits, decoders = (flattened(tokenizer.get(name)) for name in names)
    before = before + [step for step in decoders if step["type"] == "Replace"]
    patterns = [step["pattern"] for step in before + splits if "pattern" in step]
    patterns = [pattern["Regex"] for pattern in patterns if "Regex" in pattern]
    if any(re.search(r"\\[1-9k]", pattern) for pattern in patterns):
        raise ValueError("a regular expression of it refers back to a group, which can take hours")
    if any("(" in pattern or len(re.findall("[*+{?]", pattern)) > 1 for pattern in patterns):
        steps = {
            "normalizer": {"type": "Sequence", "normalizers": before},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        }
        chars = sorted(set("".join(patterns)))[:MOST_CHARS]
        try_steps(json.dumps(steps), " \n\ta1.\u4f60" + "".join(chars))


STEPS_PROBE = """import json, tokenizers
steps, texts = json.load(sys.stdin)
empty = {"type": "BPE", "vocab": {}, "merges": []}
empty = {"version": "1.0", "added_tokens": [], "model": empty} | json.loads(steps)
made = tokenizers.Tokenizer.from_str(json.dumps(empty))
for text in texts:
    made.encode(text)"""


@lru_cache
def try_steps(steps: str, chars: str) -> None:
    """ValueError if the steps, as JSON, fail or take very long for short texts, among them each of
    these characters over and over, before all of them.
    """
    given = json.dumps([steps, [PATTERN_PROBE, *(1000 * char + chars for char in chars)]])
    if run_apart(STEPS_PROBE, given.encode(), LONGEST_TRY) != 0:
        raise ValueError(
            f"its regular expressions fail for short texts, or take more than {LONGEST_TRY} seconds"
        )


def run_apart(code: str, given: bytes, seconds: float) -> int | None:
    """The exit code of Python code in a child process, which gets `given` on its standard input;
    None if it did not end within so many seconds.
    """
    # Nothing is imported from the current folder, which can be a stranger's.
    code = f"import sys; sys.path[:] = filter(None, sys.path)\n{code}"
    command = [sys.executable, "-c", code]
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, input=given, capture_output=True, timeout=seconds)
        return done.returncode
    return None


@contextmanager
def rust_errors(reason: str) -> Iterator[None]:
    """Turns the errors of a Rust library into ValueError.

    They are of type Exception itself, or panics, which derive from BaseException only.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{reason} ({' '.join(str(error).split()):.200})") from None


@contextmanager
def silent_panics() -> Iterator[None]:
    """Sends stderr to nowhere, where Rust reports a panic even if Python catches it afterwards."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
