"""Text to token ids and back: bytes, characters, SentencePiece, tiktoken or Hugging Face's, behind one interface.

A tokenizer lives in one file, `tokenizer.model` (SentencePiece) or `tokenizer.json` (the others), which travels with
the data set and with every run, so that sampling never needs the network or the original text.
"""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import sentencepiece
import tiktoken

from data.tokenizer_json import (
    SPACE,
    Mismatch,
    damage,
    json_ids,
    json_pieces,
    read_capped,
    read_json,
    run_by_library,
    rust_errors,
    silent_panics,
    special_ids,
    without_prefix,
)

FILES = ("tokenizer.model", "tokenizer.json")
# A protobuf field given again is merged over the first: normalizer_spec (3) { add_dummy_prefix (3): false }
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Run on a user's model file in a child process, which a damaged one can crash
PROBE = """import sys, sentencepiece
model = sentencepiece.SentencePieceProcessor(model_proto=sys.stdin.buffer.read())
model.decode(model.encode('a b')), [model.id_to_piece(i) for i in range(len(model))]"""
PATTERN_PROBE = "".join(map(chr, range(0x180))) + " words, of all  kinds\n\n\t \u4f60\U0001f600 12 " + 64 * "a" + "!"
PART = 2000  # characters that SentencePiece is given at once, about: it is slower, the longer a text
LINE_END = re.compile(r"\n(?!\n)")
SPACE_RUN = 50_000  # characters; tiktoken overflows its stack on a run of white space some times as long


class Tokenizer:
    """A table from id to bytes, which makes decoding exact and token by token; subclasses add `encode`.

    bos_id is put before every document and starts an empty prompt; None for a plain stream of characters.
    end_ids are those at which a text ends: bos, which is all that stands between documents, and the tokenizer's own.
    exact says whether decode_bytes(encode(text)) is the text's UTF-8 for every text that can be encoded.
    dummy_prefix: a space is put before every text. `decode` takes that one away, `decode_bytes` keeps it.
    bos_before_prompts: prompts start with bos, as documents do; some of Hugging Face's leave it out there.
    """

    kind: str
    file = "tokenizer.json"
    exact = bos_before_prompts = True
    dummy_prefix = False

    def __init__(self, pieces: Sequence[bytes], bos_id: int | None, end_ids: Iterable[int] = ()):
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        self.bos_id = bos_id
        self.end_ids = frozenset(end_ids if bos_id is None else [bos_id, *end_ids])

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Ids of a text, never a special one. start=False: the text goes on where an earlier chunk stopped."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, special tokens giving none; decode_bytes(a) + decode_bytes(b) is that of a + b."""
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 (an id sequence may stop inside a character) become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def fields(self) -> dict:
        """What tokenizer.json holds besides the kind; FROM_JSON makes the tokenizer of it again."""
        return {}

    def content(self) -> bytes:
        """The bytes of the tokenizer's one file."""
        return (json.dumps({"kind": self.kind, **self.fields()}) + "\n").encode()

    @property
    def sha256(self) -> str:
        """SHA-256 of content(), in hexadecimal: equal means the same ids for the same text."""
        return hashlib.sha256(self.content()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's one file into the folder."""
        (Path(folder) / self.file).write_bytes(self.content())

    def probe(self, keep: Callable[[str], str] = str) -> None:
        """Finds out what a tokenizer from elsewhere does to a text; `keep` leaves of one what can be encoded at all."""
        self.dummy_prefix = self.decode_bytes(self.encode(keep("a"))).startswith(b" ")
        text = keep("  two  spaces \n\n\t\u00c5\u212b \ufb01 \U0001f600" + SPACE)  # what common normalisations change
        self.exact = self.decode_bytes(self.encode(text)) == text.encode()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and bos."""

    kind = "byte"

    def __init__(self):
        super().__init__([bytes([i]) for i in range(256)] + [b""], bos_id=256)

    def encode(self, text: str, start: bool = True) -> list[int]:
        return list(text.encode())


class CharTokenizer(Tokenizer):
    """One id per character, in sorted order, and no bos: nanoGPT's character-level ids."""

    kind = "char"

    def __init__(self, chars: Iterable[str]):
        self.ids = {char: i for i, char in enumerate(sorted(set(chars)))}
        super().__init__([char.encode() for char in self.ids], bos_id=None)

    def encode(self, text: str, start: bool = True) -> list[int]:
        try:
            return [self.ids[char] for char in text]
        except KeyError:
            unknown = "".join(sorted(set(text) - set(self.ids)))
            raise ValueError(f"characters {unknown!r} are not among the {self.vocab_size} of this char tokenizer; "
                             "leave them out, or prepare the data with tokenizer=byte") from None

    def fields(self) -> dict:
        return {"chars": "".join(self.ids)}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: ours (exact) or another's, such as Llama's, with the ids SentencePiece itself gives."""

    kind = "sentencepiece"
    file = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        try:
            self.first = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.rest = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
            pieces = [self._piece_bytes(i) for i in range(len(self.first))]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"not a SentencePiece model ({error}); name the .model file of one") from None
        bos, eos = self.first.bos_id(), self.first.eos_id()  # -1 = it has none
        super().__init__(pieces, bos if bos >= 0 else None, [eos] if eos >= 0 else [])
        # Encoding would turn a literal U+2581 into a space, so it is spelled in bytes where the model has them, and
        # leaves other spaces alone.
        self.drops_spaces = self.first.normalize("a  b") == self.first.normalize("a b")
        mark = [self.first.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.mark = mark if all(self.first.is_byte(i) for i in mark) and not self.drops_spaces else None
        # Whether a text cut at the end of a line has the same ids: no piece goes on after one.
        self.splits = bool(self.mark and "\n" in self.first.normalize("\n")
                           and not any(re.search(b"\n[^\n]", piece) for piece in pieces))
        self.probe()

    def _piece_bytes(self, i: int) -> bytes:
        piece = self.first.id_to_piece(i)
        if self.first.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        if self.first.is_control(i) or self.first.is_unknown(i):
            return b""
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str, start: bool = True) -> list[int]:
        ids, begin = [], 0
        while self.splits and (end := LINE_END.search(text, begin + PART)):
            ids += self._encode(text[begin:end.end()], start and not begin)
            begin = end.end()
        return ids + self._encode(text[begin:], start and not begin)

    def _encode(self, text: str, start: bool) -> list[int]:
        processor = self.first if start else self.rest
        if self.mark is None or SPACE not in text:
            return processor.encode(text)
        head, *tails = text.split(SPACE)
        ids = processor.encode(head) if head or not (start and self.dummy_prefix) else self.rest.encode(" ")
        for tail in tails:
            ids += self.mark + self.rest.encode(tail)
        return ids

    def content(self) -> bytes:
        return self.model


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings, saved whole; bos is its <|endoftext|>."""

    kind = "tiktoken"

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        pieces = [b""] * encoding.n_vocab  # special tokens, and ids that the encoding leaves unused, are no text
        for piece, i in encoding._mergeable_ranks.items():
            pieces[i] = piece
        super().__init__(pieces, bos_id=encoding._special_tokens.get("<|endoftext|>"))

    def encode(self, text: str, start: bool = True) -> list[int]:
        runs = (run.span() for run in re.finditer(r"\s\s+", text))
        cuts = [at for begin, end in runs for at in range(begin + SPACE_RUN, end, SPACE_RUN)]
        parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        with rust_errors("its pattern cannot split this text"):
            return [i for part in parts for i in self.encoding.encode_ordinary(part)]

    def fields(self) -> dict:
        ranks = {base64.b64encode(piece).decode(): i for piece, i in self.encoding._mergeable_ranks.items()}
        return {"name": self.encoding.name, "pattern": self.encoding._pat_str, "ranks": ranks,
                "special": self.encoding._special_tokens}

    @classmethod
    def from_fields(cls, fields: dict) -> "TiktokenTokenizer":
        ranks = {base64.b64decode(piece, validate=True): i for piece, i in fields["ranks"].items()}
        special = dict(fields["special"])
        ids = [*ranks.values(), *special.values()]
        if not all(type(i) is int and 0 <= i < 2**24 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("the ids must be distinct and from 0 up")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("the ranks must have every single byte")  # else tiktoken panics when it meets one
        made = cls(tiktoken.Encoding(str(fields["name"]), pat_str=fields["pattern"], mergeable_ranks=ranks,
                                     special_tokens=special))
        with silent_panics():
            if made.decode_bytes(made.encode(PATTERN_PROBE)) != PATTERN_PROBE.encode():
                raise ValueError("its pattern leaves out a part of a text")
        return made


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face, run by their library `tokenizers` (extra `hf`), without its special tokens.

    A special token spelled out in a text is ordinary text; one that tokenizer.json adds but does not call special is
    part of texts there, and so here. Its post-processor, truncation and padding are off. config is the content of
    tokenizer_config.json, kept for the way back.
    """

    kind = "huggingface"

    def __init__(self, tokenizer: dict, config: dict, bos_id: int | None, end_ids: Sequence[int]):
        self.tokenizer, self.config = tokenizer, dict(config)
        plain = tokenizer | {"truncation": None, "padding": None, "added_tokens": [
            token | {"special": token["special"] or token["id"] in (bos_id, *end_ids)}
            for token in tokenizer["added_tokens"]]}
        self.first, bare = run_by_library(plain), without_prefix(plain)
        self.rest = self.first if bare is plain else run_by_library(bare)
        self.bos_before_prompts = bos_id in self.first.encode("").ids
        super().__init__(json_pieces(plain), bos_id, end_ids)
        for i in self.end_ids:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise Mismatch(f"bos or eos, {i!r:.99}, is not an id below {self.vocab_size}")
            self.pieces[i] = b""
        with silent_panics():
            self._check()

    def _check(self) -> None:
        """That no text becomes a special token, and that the library makes of ids what `pieces` makes of them."""
        for i in self.end_ids:
            if i in self.encode(self._encodable(self.first.id_to_token(i) or "")):
                raise Mismatch(f"bos or eos, id {i}, is {self.first.id_to_token(i)!r} here, which a text can have")
        ids = self.encode(self._encodable(PATTERN_PROBE))
        with rust_errors("its decoder fails"):
            theirs = self.first.decode(ids, skip_special_tokens=True)
        if theirs.removeprefix(" ") != self.decode(ids).removeprefix(" "):  # some leave a dummy prefix there
            raise ValueError("its decoder makes another text of its ids than they spell")
        self.probe(self._encodable)

    def _encodable(self, text: str) -> str:
        """The text without the characters that the tokenizer refuses: some have neither bytes nor an unknown token."""
        def fits(part: str) -> bool:
            with suppress(ValueError):
                return self.encode(part) is not None
        return text if fits(text) else "".join(filter(fits, text))

    def encode(self, text: str, start: bool = True) -> list[int]:
        with rust_errors("its tokenizer.json cannot encode this text"):
            return (self.first if start else self.rest).encode_batch_fast([text], add_special_tokens=False)[0].ids

    def fields(self) -> dict:
        return {"tokenizer": self.tokenizer, "config": self.config, "bos_id": self.bos_id,
                "end_ids": sorted(self.end_ids)}

    def content(self) -> bytes:  # not spelled in ASCII, which could be thrice as large as what was read
        return (json.dumps({"kind": self.kind, **self.fields()}, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: dict) -> "HuggingFaceTokenizer":
        """The tokenizer of a Hugging Face folder, whose tokenizer.json is given as it was parsed."""
        files = [read_json(folder / name) if (folder / name).exists() else {}
                 for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
        if (template := folder / "chat_template.jinja").exists():  # transformers reads it in the config too
            files[-1]["chat_template"] = read_capped(template).decode()
        bos, eos = (special_ids(role, files, json_ids(tokenizer)) for role in ("bos", "eos"))
        return cls(tokenizer, files[-1], bos[0] if bos else None, eos)


FROM_JSON = {
    "byte": lambda fields: ByteTokenizer(),
    "char": lambda fields: CharTokenizer(fields["chars"]),
    "tiktoken": TiktokenTokenizer.from_fields,
    "huggingface": lambda fields: HuggingFaceTokenizer(**{name: fields[name] for name in fields if name != "kind"}),
}


def tokenizer_file(folder: str | Path) -> Path:
    """The folder's tokenizer file. Of a Hugging Face folder with both it is tokenizer.model, which needs no library,
    unless tokenizer.json knows other ids (tokens were added) or tokenizer.model is not SentencePiece's.
    FileNotFoundError if there is none, and ValueError if both are there and tokenizer.json is one of ours.
    """
    found = [path for path in (Path(folder) / name for name in FILES) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: no {' or '.join(FILES)} there: a run, a data set and a model each have one")
    if found[0].name == FILES[0] and re.match(rb"[A-Za-z0-9+/]+=* \d+\s", read_capped(found[0])):
        if len(found) == 1:
            raise ValueError(f"{found[0]}: is tiktoken's and not SentencePiece's, as Meta gives it with Llama 3; put "
                             "the tokenizer.json of the same model beside it")
        return found[1]
    if len(found) == 1:
        return found[0]
    model, other = found
    fields = read_json(other)
    if "kind" in fields:
        raise ValueError(f"{folder}: has both {' and '.join(FILES)}; delete the one that is not its own")
    with damage(other):
        known = len({*json_ids(fields).values()})
    with damage(model):
        return model if SentencePieceTokenizer(read_capped(model)).vocab_size == known else other


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in the folder of a data set, a run or a Hugging Face model.

    Raises ValueError in one line if its file is damaged, OSError if it needs a library that is not installed.
    """
    path = tokenizer_file(folder)
    if path.name == SentencePieceTokenizer.file:
        with damage(path):
            return SentencePieceTokenizer(read_capped(path))
    fields = read_json(path)
    with damage(path, foreign="kind" not in fields):
        if "kind" not in fields and "model" in fields:
            return HuggingFaceTokenizer.from_folder(path.parent, fields)
        return FROM_JSON[fields["kind"]](fields)


def tokenizer_sha256(folder: str | Path) -> str:
    """load_tokenizer(folder).sha256, for files of ours without loading them."""
    path = tokenizer_file(folder)
    content = read_capped(path)
    if path.name == SentencePieceTokenizer.file or content.startswith(b'{"kind": '):
        return hashlib.sha256(content).hexdigest()
    return load_tokenizer(folder).sha256


def train_sentencepiece(blocks: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """BPE with byte fallback over the blocks of text, exact for every text. A small text may give fewer ids than asked.

    A piece is a word or part of one, with the space before it, or a run of spaces or of signs with the newlines after
    them; it never goes past a line's end, so a prompt that ends with its line is cut as in training. Pieces of several
    words would make a sixth fewer tokens, but the models trained on them were worse in bits per byte (LOG.md).
    """
    border = "\ue000"  # tells the trainer where no merge may pass; it and three of the trainer's own marks are dropped
    reserved = re.compile(f"[\0\u2585{SPACE}{border}]")
    lines = re.compile("[^\n]+\n*|\n+")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(border.join(lines.findall(reserved.sub("", block))) for block in blocks),
            model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,  # Llama's layout
            byte_fallback=True, character_coverage=0.9995,
            required_chars=SPACE + "\n",  # a space without a piece of its own would become the bytes of U+2581
            normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            pretokenization_delimiter=border, max_sentencepiece_length=32, max_sentence_length=2**30,
            num_threads=2,  # part of the file, so a fixed number: the same text gives the same file on every machine
            minloglevel=2)
    except RuntimeError as error:
        needed = re.search(r"\d+ vs (\d+)", str(error))
        reason = f"it needs at least {needed[1]}" if needed else f"no tokenizer can be trained on it ({error})"
        raise ValueError(f"vocab_size={vocab_size} does not suit this text: {reason}") from None
    return SentencePieceTokenizer(model.getvalue())


def read_sentencepiece(path: str | Path) -> SentencePieceTokenizer:
    """A user's .model file, parsed in a child process first, since a damaged one can crash SentencePiece."""
    model = read_capped(Path(path))
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], input=model, capture_output=True, timeout=120)
        if done.returncode != 0:
            raise ValueError("not a SentencePiece model; name the .model file of one")
        return SentencePieceTokenizer(model)
    except (ValueError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{path}: {error}") from None
