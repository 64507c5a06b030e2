"""Text to token ids and back: bytes, characters, SentencePiece or tiktoken, behind one small interface.

A tokenizer lives in one file, `tokenizer.model` (SentencePiece) or `tokenizer.json` (the others), which travels with
the data set and with every run, so that sampling never needs the network or the original text.
"""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import tiktoken

FILES = ("tokenizer.model", "tokenizer.json")
SPACE = "\u2581"  # SentencePiece writes a space as this character
# A protobuf field given again is merged over the first: normalizer_spec (3) { add_dummy_prefix (3): false }
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Run on a user's model file in a child process, which a damaged one can crash
PROBE = """import sys, sentencepiece
model = sentencepiece.SentencePieceProcessor(model_proto=sys.stdin.buffer.read())
model.decode(model.encode('a b')), [model.id_to_piece(i) for i in range(len(model))]"""
LARGEST_FILE = 2**24  # bytes of a tokenizer's file, four times those of the largest known
PATTERN_PROBE = "".join(map(chr, range(0x180))) + " words, of all  kinds\n\n\t \u4f60\U0001f600 12 " + 64 * "a" + "!"
SPACE_RUN = 50_000  # characters; tiktoken overflows its stack on a run of white space some times as long


class Tokenizer:
    """A table from id to bytes, which makes decoding exact and token by token; subclasses add `encode`.

    bos_id is put before every document and starts an empty prompt; None for a plain stream of characters.
    exact says whether decode_bytes(encode(text)) is the text's UTF-8 for every text that can be encoded.
    """

    kind: str
    exact = True

    def __init__(self, pieces: Sequence[bytes], bos_id: int | None):
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        self.bos_id = bos_id

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Ids of a text, never a special one. start=False: the text goes on where an earlier chunk stopped."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, special tokens giving none; decode_bytes(a) + decode_bytes(b) is that of a + b."""
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 (an id sequence may stop inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def fields(self) -> dict:
        """What tokenizer.json holds besides the kind; FROM_JSON makes the tokenizer of it again."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's one file into the folder."""
        text = json.dumps({"kind": self.kind, **self.fields()})
        (Path(folder) / "tokenizer.json").write_text(text + "\n", encoding="utf-8")


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
    """A SentencePiece model: ours (exact) or another's, such as Llama's, with the ids SentencePiece itself gives.

    Models with a dummy prefix put a space before the text: `decode` takes that one away, `decode_bytes` keeps it.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        try:
            self.first = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.rest = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
            pieces = [self._piece_bytes(i) for i in range(len(self.first))]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"not a SentencePiece model ({error}); name the .model file of one") from None
        super().__init__(pieces, bos_id=self.first.bos_id() if self.first.bos_id() >= 0 else None)
        # Encoding would turn a literal U+2581 into a space, so it is spelled in bytes where the model has them.
        mark = [self.first.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.mark = mark if all(self.first.is_byte(i) for i in mark) else None
        self.dummy_prefix = self.decode_bytes(self.first.encode("a")).startswith(b" ")
        probe = "  two  spaces \n\n\t\u00c5\u212b \ufb01 \U0001f600" + SPACE  # what common normalisations change
        self.exact = self.decode_bytes(self.encode(probe)) == probe.encode()

    def _piece_bytes(self, i: int) -> bytes:
        piece = self.first.id_to_piece(i)
        if self.first.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        if self.first.is_control(i) or self.first.is_unknown(i):
            return b""
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str, start: bool = True) -> list[int]:
        processor = self.first if start else self.rest
        if self.mark is None or SPACE not in text:
            return processor.encode(text)
        head, *tails = text.split(SPACE)
        ids = processor.encode(head)
        for tail in tails:
            ids += self.mark + self.rest.encode(tail)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def save(self, folder: str | Path) -> None:
        (Path(folder) / "tokenizer.model").write_bytes(self.first.serialized_model_proto())


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
        try:
            return [i for part in parts for i in self.encoding.encode_ordinary(part)]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's, on which nothing but BaseException is a base
                raise
            raise ValueError(f"its pattern cannot split this text ({error!s:.200})") from None

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


@contextmanager
def silent_panics() -> Iterator[None]:
    """Rust writes a panic to stderr, past Python and in several lines, even if it is then caught as an exception."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


FROM_JSON = {
    "byte": lambda fields: ByteTokenizer(),
    "char": lambda fields: CharTokenizer(fields["chars"]),
    "tiktoken": TiktokenTokenizer.from_fields,
}


def tokenizer_file(folder: str | Path) -> Path:
    """The folder's one tokenizer file. Raises FileNotFoundError if there is none, ValueError if there are two."""
    found = [path for path in (Path(folder) / name for name in FILES) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: no {' or '.join(FILES)} there; prepare the data again")
    if len(found) > 1:
        raise ValueError(f"{folder}: has both {' and '.join(FILES)}; delete the one that is not its own")
    return found[0]


def read_capped(path: Path) -> bytes:
    """The content of a tokenizer's file. ValueError if that is no file, or far larger than any tokenizer's."""
    if not path.is_file():  # opening a FIFO would wait for ever
        raise FileNotFoundError(f"{path}: no such tokenizer file; name an existing .model file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: has more than {LARGEST_FILE:,} bytes, no tokenizer needs as many")
    return path.read_bytes()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in a data set's or a run's folder. Raises ValueError in one line if the file is damaged."""
    path = tokenizer_file(folder)
    content = read_capped(path)
    try:
        if path.name == "tokenizer.model":
            return SentencePieceTokenizer(content)
        fields = json.loads(content.decode())
        return FROM_JSON[fields["kind"]](fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: damaged tokenizer file ({reason}); prepare the data again") from None


def tokenizer_sha256(folder: str | Path) -> str:
    """SHA-256 of the folder's tokenizer file, in hexadecimal: equal means the same ids for the same text."""
    return hashlib.sha256(read_capped(tokenizer_file(folder))).hexdigest()


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


def named_tiktoken(name: str) -> TiktokenTokenizer:
    """One of tiktoken's encodings by name; fetched from the network unless tiktoken has it in its cache."""
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"tokenizer=tiktoken:{name} is unknown; choose from {', '.join(sorted(names))}")
    try:
        return TiktokenTokenizer(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise OSError(f"tiktoken:{name} could not be fetched ({reason}); go online once, or use another tokenizer") \
            from None
