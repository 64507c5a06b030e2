"""Text to token ids and back, by bytes, characters, SentencePiece, tiktoken or Hugging Face.

A tokenizer lives in one file: `tokenizer.model` (SentencePiece) or `tokenizer.json` (the others).
This file travels with the data set and with every run, so sampling never needs the network or the
original text.

In reading order: Tokenizer, which is what the rest of the program knows; its five kinds; how one is
loaded from a folder; how one is trained.
"""

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tiktoken

from config.command import warn
from text.tokenizer_json import (
    FOREIGN_TOKEN,
    ID_NAMES,
    PATTERN_PROBE,
    PROBES,
    SPACE,
    Companions,
    Mismatch,
    blamed_on,
    ids_around,
    json_ids,
    json_pieces,
    named_tokens,
    probe_texts,
    read_capped,
    read_companions,
    read_json_object,
    replaced_by,
    run_apart,
    run_by_library,
    rust_errors,
    silent_panics,
    without_prefix,
)

FILES = ("tokenizer.model", "tokenizer.json")
# Appended to a SentencePiece model, these bytes turn its dummy prefix off. They are the protobuf
# field normalizer_spec (3) { add_dummy_prefix (3): false }, and a field that comes again is merged.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# A program for a child process, because a damaged model can crash the process that loads it.
PROBE = """import sentencepiece
model = sentencepiece.SentencePieceProcessor(model_proto=sys.stdin.buffer.read())
model.decode(model.encode('a b')), [model.id_to_piece(i) for i in range(len(model))]"""
# What our own exports say in tokenizer_config.json: it can be made again, so it is not kept.
SAID_BY_EXPORTS = {
    "tokenizer_class",
    "clean_up_tokenization_spaces",
    "add_prefix_space",
    "split_special_tokens",
    "bos_token",
    "eos_token",
    "unk_token",
}
MADE_OF_TEXT = (
    "the id is right, but the model in tokenizer.json also makes it of a text that spells the "
    "token, by ignore_merges or by its merges: without that it can be used here"
)
# In characters. SentencePiece is slower for a longer text, so it is given about so much at a time;
# tiktoken overflows its stack in a run of white space that is some times longer than this.
SENTENCEPIECE_CHARS = 2000
SPACE_RUN = 50_000
END = "<|endoftext|>"  # GPT-2's name for the end of a text, at which llama.cpp stops, too
LINE_END = re.compile(r"\n(?!\n)")
NEEDED_IDS = 3 + 256 + 2  # of every tokenizer that is trained here: special, bytes, space, newline
BORDER = "\ue000"  # no piece passes this character in the text on which a tokenizer is trained


class Tokenizer:
    """A table from id to bytes, which makes decoding exact and token by token.

    Subclasses add `encode`.

    pieces        the bytes of each id; b"" for special tokens and unused ids
    bos_id        the id with which an empty prompt starts; None if the tokenizer has none
    end_ids       the ids that end a text: bos, since a new document begins there, and every eos
                  that the tokenizer's files name
    before        the ids that stand before every document and every prompt: mostly bos
    after         the ids that stand behind every document
    between       the ids that keep two documents apart if nothing stands before or behind them
    special       the special tokens that a prompt can spell: text -> id
    exact         whether decode_bytes(encode(text)) is the UTF-8 of every text that can be encoded
    dummy_prefix  whether `encode` puts a space before every text; `decode` takes it away again,
                  `decode_bytes` does not
    config, generation  what tokenizer_config.json and generation_config.json said beside a
                  tokenizer of Hugging Face, for an export; empty for ours
    """

    kind: str
    file = "tokenizer.json"
    exact = True
    dummy_prefix = False

    def __init__(self, pieces: Sequence[bytes], bos_id: int | None, end_ids: Iterable[int] = ()):
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        self.bos_id = bos_id
        self.end_ids = frozenset(end_ids if bos_id is None else [bos_id, *end_ids])
        self.before = [] if bos_id is None else [bos_id]
        self.after: list[int] = []
        self.between: list[int] = []
        self.special: dict[str, int] = {}
        self.config: dict = {}
        self.generation: dict = {}

    def encode(self, text: str, start: bool = True) -> list[int]:
        """The ids of a text, none of them special. start=False: it continues an earlier text."""
        raise NotImplementedError

    def encode_special(self, text: str, start: bool = True) -> list[int]:
        """The ids of a text in which a special token that is spelled out is that token."""
        names = sorted(self.special, key=len, reverse=True)  # of two that fit, the longer one
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        ids = self.encode(parts[0], start) if parts[0] else []
        for name, rest in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self.special[name], *self.encode(rest, start=False)]
        return ids

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """encode_special of a text, cut where its spans of characters begin and end; and of each
        span the places in the ids of its first token and behind its last.
        """
        ids, places, done = [], [], 0
        for begin, end in spans:
            ids += self.encode_special(text[done:begin], start=not done)
            answer = self.encode_special(text[begin:end], start=not begin)
            places.append((len(ids), len(ids) + len(answer)))
            ids, done = ids + answer, end
        return ids + self.encode_special(text[done:], start=not done), places

    def spelled(self, text: str) -> list[str]:
        """The special tokens that a text spells out."""
        return [name for name in self.special if name in text]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids. Ids can be decoded in parts: the bytes of a + b are those of a and
        then those of b.
        """
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Bytes that are not UTF-8 become U+FFFD; the ids may stop inside a
        character.
        """
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def fields(self) -> dict:
        """What tokenizer.json holds besides the kind. FROM_JSON makes the tokenizer from it."""
        return {}

    def content(self) -> bytes:
        """The bytes of the tokenizer's file."""
        return (json.dumps({"kind": self.kind, **self.fields()}) + "\n").encode()

    @property
    def sha256(self) -> str:
        """SHA-256 in hexadecimal of all that decides ids. Equal ones mean equal ids for every
        document.
        """
        return hashlib.sha256(self.content()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's file into the folder."""
        (Path(folder) / self.file).write_bytes(self.content())

    def probe(self, keep: Callable[[str], str] = str) -> None:
        """Sets dummy_prefix and exact by trying them out, for a tokenizer from elsewhere.

        keep(text) is the part of a text that the tokenizer can encode. The text that is tried has
        what the common normalisations change.
        """
        self.dummy_prefix = self.decode_bytes(self.encode(keep("a"))).startswith(b" ")
        text = keep("  two  spaces \n\n\t\u00c5\u212b \ufb01 \U0001f600" + SPACE)
        self.exact = self.decode_bytes(self.encode(text)) == text.encode()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and bos."""

    kind = "byte"

    def __init__(self):
        super().__init__([bytes([i]) for i in range(256)] + [b""], bos_id=256)
        self.special = {END: 256}

    def encode(self, text: str, start: bool = True) -> list[int]:
        return list(text.encode())


class CharTokenizer(Tokenizer):
    """One id for each character, in sorted order, and no bos, as in nanoGPT."""

    kind = "char"

    def __init__(self, chars: Iterable[str]):
        self.ids = {char: i for i, char in enumerate(sorted(set(chars)))}
        super().__init__([char.encode() for char in self.ids], bos_id=None)

    def encode(self, text: str, start: bool = True) -> list[int]:
        try:
            return [self.ids[char] for char in text]
        except KeyError:
            unknown = "".join(sorted(set(text) - set(self.ids)))
            raise ValueError(
                f"characters {unknown!r} are not among the {self.vocab_size} of this char "
                "tokenizer; leave them out, or prepare the data with tokenizer=byte"
            ) from None

    def fields(self) -> dict:
        return {"chars": "".join(self.ids)}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, ours (exact) or another one such as Llama's.

    `said` is what the files beside it say, if it comes from Hugging Face. If that is something else
    than the model says, or more than our own exports do, a tokenizer.json stores it all.

    It gives the ids that SentencePiece gives, with one exception: SentencePiece writes a space as
    U+2581, so it cannot tell the two apart. Here a literal U+2581 stays one if the model has pieces
    for its bytes.
    """

    kind = "sentencepiece"
    file = "tokenizer.model"
    said: Companions | None = None
    plain = True  # whether the files beside it leave its ids as they are

    def __init__(self, model: bytes, said: Companions | None = None):
        self.model = model
        try:
            # `first` encodes the beginning of a text, `rest` what follows, without a dummy prefix.
            self.first = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.rest = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
            pieces = [self._piece_bytes(i) for i in range(len(self.first))]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"not a SentencePiece model ({error}); name the .model file of one"
            ) from None
        bos, eos = self.first.bos_id(), self.first.eos_id()  # -1 if the model has none
        super().__init__(pieces, bos if bos >= 0 else None, [eos] if eos >= 0 else [])
        names = [self.first.id_to_piece(i) for i in range(len(self.first))]
        self.special = {name: i for i, name in enumerate(names) if self.first.is_control(i)}
        if said is not None:
            self._take(said, {name: i for i, name in enumerate(names)})
        self.drops_spaces = self.first.normalize("a  b") == self.first.normalize("a b")
        # The ids of the bytes of U+2581. A model that drops spaces would drop some around it, too.
        mark = [self.first.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        has_bytes = all(self.first.is_byte(i) for i in mark)
        self.mark = mark if has_bytes and not self.drops_spaces else None
        # Whether a text may be cut after a line without other ids: no piece goes on after one.
        self.splits = bool(
            self.mark
            and "\n" in self.first.normalize("\n")
            and not any(re.search(b"\n[^\n]", piece) for piece in pieces)
        )
        self.probe()

    def _take(self, said: Companions, ids: dict[str, int]) -> None:
        """Takes over what the files beside the model say: its roles, and what an export needs."""
        own = self.bos_id, self.end_ids, self.before, self.after
        control = set(self.special.values())
        bos, eos = (said.ids(role, ids, control) for role in ("bos", "eos"))
        eos = eos or sorted(self.end_ids - {self.bos_id})
        self.bos_id = bos[0] if bos else self.bos_id
        self.end_ids = frozenset(eos if self.bos_id is None else [self.bos_id, *eos])
        for i in self.end_ids:
            if type(i) is not int or not 0 <= i < self.vocab_size or self.pieces[i]:
                raise Mismatch(f"bos or eos, {i!r:.99}, is not a special token of it")
        # So do transformers' classes for such a model.
        with_bos, with_eos = said.config.get("add_bos_token"), said.config.get("add_eos_token")
        self.before = [] if self.bos_id is None or with_bos is False else [self.bos_id]
        self.after = eos[:1] if with_eos is True else []
        self.between = [] if self.before or self.after else eos[:1]
        self.plain = (self.bos_id, self.end_ids, self.before, self.after) == own
        if says_more(said) or not self.plain:
            self.said, self.config, self.generation = said, said.config, said.merged
            self.file = "tokenizer.json"

    def check_has(self, named: dict[str, tuple[str, dict]]) -> None:
        """Raises Mismatch if it does not have one of the tokens that files beside it name."""
        for text, (file, token) in named.items():
            i = self.first.piece_to_id(text)
            found = i != self.first.unk_id() or text == self.first.id_to_piece(i)
            if not found or (token["special"] and self.pieces[i]):
                kind = "special token" if token["special"] else "token"
                raise Mismatch(f"it does not have the {kind} {text!r:.99} of {file}", FOREIGN_TOKEN)

    def _piece_bytes(self, i: int) -> bytes:
        piece = self.first.id_to_piece(i)
        if self.first.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        if self.first.is_control(i) or self.first.is_unknown(i):
            return b""
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str, start: bool = True) -> list[int]:
        ids, begin = [], 0
        while self.splits and (end := LINE_END.search(text, begin + SENTENCEPIECE_CHARS)):
            ids += self._encode(text[begin : end.end()], start and not begin)
            begin = end.end()
        return ids + self._encode(text[begin:], start and not begin)

    def _encode(self, text: str, start: bool) -> list[int]:
        processor = self.first if start else self.rest
        if self.mark is None or SPACE not in text:
            return processor.encode(text)
        head, *tails = text.split(SPACE)
        if start and self.dummy_prefix and not head:
            ids = self.rest.encode(" ")  # `first` puts no dummy prefix before an empty text
        else:
            ids = processor.encode(head)
        for tail in tails:
            ids += self.mark + self.rest.encode(tail)
        return ids

    def fields(self) -> dict:
        return {"model": base64.b64encode(self.model).decode(), "said": self.said}

    @classmethod
    def from_fields(cls, fields: dict) -> "SentencePieceTokenizer":
        said = Companions(*map(dict, fields["said"]))
        return cls(base64.b64decode(fields["model"], validate=True), said)

    def content(self) -> bytes:
        return self.model if self.file == "tokenizer.model" else super().content()

    @property
    def sha256(self) -> str:
        # Files beside the model that change no id, such as a chat template, change nothing here.
        return hashlib.sha256(self.model if self.plain else self.content()).hexdigest()


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings, saved whole; bos is its <|endoftext|>."""

    kind = "tiktoken"

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        pieces = [b""] * encoding.n_vocab
        for piece, i in encoding._mergeable_ranks.items():
            pieces[i] = piece
        super().__init__(pieces, bos_id=encoding._special_tokens.get("<|endoftext|>"))
        self.special = {name: i for name, i in encoding._special_tokens.items() if name}

    def encode(self, text: str, start: bool = True) -> list[int]:
        runs = (run.span() for run in re.finditer(r"\s\s+", text))
        cuts = [at for begin, end in runs for at in range(begin + SPACE_RUN, end, SPACE_RUN)]
        parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        with rust_errors("its pattern cannot split this text"):
            return [i for part in parts for i in self.encoding.encode_ordinary(part)]

    def fields(self) -> dict:
        ranks = self.encoding._mergeable_ranks.items()
        return {
            "name": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "ranks": {base64.b64encode(piece).decode(): i for piece, i in ranks},
            "special": self.encoding._special_tokens,
        }

    @classmethod
    def from_fields(cls, fields: dict) -> "TiktokenTokenizer":
        ranks = {base64.b64decode(piece, validate=True): i for piece, i in fields["ranks"].items()}
        special = dict(fields["special"])
        ids = [*ranks.values(), *special.values()]
        if not all(type(i) is int and 0 <= i < 2**24 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("the ids must be distinct and from 0 up")
        if not all(bytes([byte]) in ranks for byte in range(256)):  # tiktoken would panic later
            raise ValueError("the ranks must have every single byte")
        encoding = tiktoken.Encoding(
            str(fields["name"]),
            pat_str=fields["pattern"],
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        made = cls(encoding)
        with silent_panics():
            if made.decode_bytes(made.encode(PATTERN_PROBE)) != PATTERN_PROBE.encode():
                raise ValueError("its pattern leaves out a part of a text")
        return made


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face, run by their library `tokenizers` (extra `hf`).

    A special token that is spelled out in a text is ordinary text here. A token that tokenizer.json
    adds without calling it special is part of texts, as it is there. Truncation and padding are
    off. The post-processor says what stands before and behind a document, as in transformers, which
    leaves add_bos_token and add_eos_token alone where there is a tokenizer.json.

    `config` and `generation` are the contents of tokenizer_config.json and generation_config.json;
    `sentencepiece` is the tokenizer.model beside it in base64, if it gives the same ids.
    """

    kind = "huggingface"

    def __init__(
        self,
        tokenizer: dict,
        config: dict,
        bos_id: int | None,
        end_ids: Sequence[int],
        generation: dict | None = None,
        sentencepiece: str = "",
    ):
        added = [
            token | {"special": token["special"] or token["id"] in (bos_id, *end_ids)}
            for token in tokenizer["added_tokens"]
        ]
        plain = tokenizer | {"truncation": None, "padding": None, "added_tokens": added}
        super().__init__(json_pieces(plain), bos_id, end_ids)
        # `first` encodes the beginning of a text, `rest` what follows, without a dummy prefix.
        self.whole, self.first, bare = plain, run_by_library(plain), without_prefix(plain)
        self.rest = self.first if bare is plain else run_by_library(bare)
        self.tokenizer, self.config = tokenizer, dict(config)
        self.generation = dict(generation or {})
        self.sentencepiece = base64.b64decode(sentencepiece, validate=True)
        self.before, self.after = ids_around(tokenizer)
        for i in self.end_ids | {*self.before, *self.after}:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise Mismatch(f"bos or eos, {i!r:.99}, is not an id below {self.vocab_size}")
            self.pieces[i] = b""
        self.special = {
            token["content"]: token["id"]
            for token in added
            if token["special"] and token["content"]
        }
        if not (self.before or self.after):
            ends = sorted(self.end_ids - {self.bos_id}) or sorted(self.end_ids)
            said = Companions(self.config, {"eos_token_id": ends}, {})
            self.between = said.ids("eos", json_ids(tokenizer), ())[:1]
        with silent_panics():
            self._check()

    def _check(self) -> None:
        """Checks that no text becomes a special token and that the library decodes as we do."""
        added = {token["content"] for token in self.tokenizer["added_tokens"]}
        for i in self.end_ids | {*self.before, *self.after}:
            name = self.first.id_to_token(i)
            if i in self.encode(self._encodable(name or "")):
                raise Mismatch(
                    f"bos or eos, id {i}, is {name!r} here, which a text can have",
                    MADE_OF_TEXT if name in added else "",
                )
        self.probe(self._encodable)
        ids = self.encode(self._encodable(PATTERN_PROBE))
        with rust_errors("its decoder fails"):
            theirs = self.first.decode(ids, skip_special_tokens=True)
        ours = self.decode(ids)
        if theirs not in (ours, f" {ours}"):  # some decoders leave the dummy prefix in the text
            raise ValueError("its decoder makes another text of its ids than they spell")

    def _encodable(self, text: str) -> str:
        """The text without the characters that the tokenizer refuses.

        It refuses a character for which it has neither bytes nor an unknown token.
        """

        def fits(part: str) -> bool:
            with suppress(ValueError):
                return self.encode(part) is not None

        return text if fits(text) else "".join(filter(fits, text))

    def encode(self, text: str, start: bool = True) -> list[int]:
        library = self.first if start else self.rest
        with rust_errors("its tokenizer.json cannot encode this text"):
            return library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def spelling(self) -> Any:
        """The library's tokenizer that takes special tokens as such. Another one than `first`, as
        several threads encode at once."""
        made = run_by_library(self.whole)
        made.encode_special_tokens = False  # the library's name for: take them as tokens
        return made

    def encode_special(self, text: str, start: bool = True) -> list[int]:
        return self.encode_spans(text, [])[0]

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """As transformers does, it encodes the text as a whole. A token that is partly in a span
        belongs to it.
        """
        with rust_errors("its tokenizer.json cannot encode this text"):
            made = self.spelling.encode(text, add_special_tokens=False)
        if not made.ids:
            return [], [(0, 0)] * len(spans)
        begins, ends = (np.array(side) for side in zip(*made.offsets, strict=True))
        places = [(int((ends <= begin).sum()), int((begins < end).sum())) for begin, end in spans]
        return made.ids, places

    def fields(self) -> dict:
        fields = {
            "tokenizer": self.tokenizer,
            "config": self.config,
            "bos_id": self.bos_id,
            "end_ids": sorted(self.end_ids),
        }
        if self.generation:
            fields["generation"] = self.generation
        if self.sentencepiece:
            fields["sentencepiece"] = base64.b64encode(self.sentencepiece).decode()
        return fields

    def content(self) -> bytes:
        return self._written({"kind": self.kind, **self.fields()})

    @staticmethod
    def _written(fields: dict) -> bytes:
        # Not in ASCII: its escapes could make the file three times as large as the original.
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode()

    @property
    def sha256(self) -> str:
        return self.sha256_of({"kind": self.kind, **self.fields()})

    @classmethod
    def sha256_of(cls, fields: dict) -> str:
        """The sha256 of a tokenizer.json of ours. The defaults of sampling do not count."""
        kept = {name: value for name, value in fields.items() if name != "generation"}
        return hashlib.sha256(cls._written(kept)).hexdigest()

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: dict) -> Tokenizer:
        """The tokenizer of a Hugging Face folder; `tokenizer` is the content of tokenizer.json.

        A tokenizer.model beside it counts if it gives the same ids. If the folder says no more than
        our own exports do, it is the tokenizer.
        """
        tokenizer = with_named(tokenizer, named_tokens(folder))
        said, ids = read_companions(folder), json_ids(tokenizer)
        files = said.config.get("fast_tokenizer_files", [])
        if files not in ([], ["tokenizer.json"]):
            raise Mismatch(
                f"tokenizer_config.json has a file for each version of transformers, {files!r:.99}",
                "save the folder's tokenizer again with AutoTokenizer's save_pretrained",
            )
        if name := replaced_by(folder, tokenizer, said.config):
            warn_once(
                f"{folder}: transformers 5 makes a {name} of it, which takes other steps than its "
                "tokenizer.json has and can give other ids; those here, and of an export, are the "
                "ids of tokenizer.json"
            )
        special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
        bos, eos = (said.ids(role, ids, special) for role in ("bos", "eos"))
        made = cls(tokenizer, said.config, bos[0] if bos else None, eos, said.merged)
        path = folder / SentencePieceTokenizer.file
        if not path.is_file() or is_tiktoken_model(path):
            return made
        with blamed_on(path):
            model = SentencePieceTokenizer(read_capped(path))
        if not same_ids(made, model):
            return made
        roles = [(t.bos_id, t.end_ids, t.before, t.after) for t in (made, model)]
        if roles[0] == roles[1] and not says_more(said):
            return model
        made.sentencepiece = model.model
        return made


def with_named(tokenizer: dict, named: dict[str, tuple[str, dict]]) -> dict:
    """A tokenizer.json to which the tokens that files beside it name are added, as transformers
    does. Raises Mismatch if one is not in the vocabulary: its id would be a new one.
    """
    ids = json_ids(tokenizer)
    added = {token["content"] for token in tokenizer["added_tokens"]}
    for text, (file, _) in named.items():
        if text not in ids:
            raise Mismatch(f"it does not have the token {text!r:.99} of {file}", FOREIGN_TOKEN)
    more = [token | {"id": ids[t]} for t, (_, token) in named.items() if t not in added]
    return tokenizer | {"added_tokens": [*tokenizer["added_tokens"], *more]} if more else tokenizer


@lru_cache
def warn_once(text: str) -> None:
    """Warns once, however often a program opens the folder."""
    warn(text)


def same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether two tokenizers have the same pieces and give the same ids for texts of many kinds.

    U+2581 is left out: each kind of tokenizer has its own way with it.
    """
    if first.pieces != second.pieces:
        return False
    tries = [(text.replace(SPACE, ""), True) for text in probe_texts(first.pieces)]
    tries += [(text.replace(SPACE, ""), False) for text in PROBES]
    return all(first.encode(text, start) == second.encode(text, start) for text, start in tries)


def says_more(said: Companions) -> bool:
    """Whether files of Hugging Face say more than our own exports do."""
    return bool(
        said.config.keys() - SAID_BY_EXPORTS
        or (said.config and not said.config.get("split_special_tokens"))
        or said.merged.keys() - set(ID_NAMES[:2])
    )


# Loading


FROM_JSON = {  # kind -> the tokenizer of the fields in our tokenizer.json
    "byte": lambda fields: ByteTokenizer(),
    "char": lambda fields: CharTokenizer(fields["chars"]),
    "sentencepiece": SentencePieceTokenizer.from_fields,
    "tiktoken": TiktokenTokenizer.from_fields,
    "huggingface": lambda fields: HuggingFaceTokenizer(
        **{name: fields[name] for name in fields if name != "kind"}
    ),
}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in the folder of a data set, a run or a Hugging Face model.

    Raises ValueError if its file is damaged and OSError if it needs a library that is not
    installed, in one line.
    """
    path = tokenizer_file(folder)
    if path.name == SentencePieceTokenizer.file:
        with blamed_on(path, foreign=True):
            made = SentencePieceTokenizer(read_capped(path), read_companions(path.parent))
            made.check_has(named_tokens(path.parent))
            return made
    fields = read_json_object(path)
    ours = "kind" in fields
    with blamed_on(path, foreign=not ours):
        if not ours and "model" in fields:
            return HuggingFaceTokenizer.from_folder(path.parent, fields)
        return FROM_JSON[fields["kind"]](fields)


def tokenizer_sha256(folder: str | Path) -> str:
    """load_tokenizer(folder).sha256; most files of ours are not even loaded for it."""
    path = tokenizer_file(folder)
    content = read_capped(path)
    if content.startswith(b'{"kind": "huggingface"'):
        return HuggingFaceTokenizer.sha256_of(read_json_object(path))
    if path.name == SentencePieceTokenizer.file:
        whole = not any(read_companions(path.parent))
    else:
        whole = content.startswith(b'{"kind": ') and b'"sentencepiece"' not in content[:30]
    return hashlib.sha256(content).hexdigest() if whole else load_tokenizer(folder).sha256


def tokenizer_file(folder: str | Path) -> Path:
    """The path of the folder's tokenizer file: tokenizer.json if there is one, else
    tokenizer.model.

    Raises FileNotFoundError if there is none. Raises ValueError if there are both and
    tokenizer.json is one of ours, or if the only file is tiktoken's.
    """
    found = [path for path in (Path(folder) / name for name in FILES) if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder}: no {' or '.join(FILES)} there: a run, a data set and a model each have one"
        )
    if len(found) == 1 and is_tiktoken_model(found[0]):
        raise ValueError(
            f"{found[0]}: is tiktoken's and not SentencePiece's, as Meta gives it with "
            "Llama 3; put the tokenizer.json of the same model beside it"
        )
    if len(found) == 2 and "kind" in read_json_object(found[1]):
        raise ValueError(
            f"{folder}: has both {' and '.join(FILES)}; delete the one that is not its own"
        )
    return found[-1]


def is_tiktoken_model(path: Path) -> bool:
    """Whether a tokenizer.model is tiktoken's: lines of a piece in base64 and its rank."""
    return path.name == FILES[0] and bool(re.match(rb"[A-Za-z0-9+/]+=* \d+\s", read_capped(path)))


def read_sentencepiece(path: str | Path) -> SentencePieceTokenizer:
    """A user's .model file, which a child process parses first: it can crash SentencePiece."""
    model = read_capped(Path(path))
    try:
        if run_apart(PROBE, model, seconds=120) != 0:
            raise ValueError("not a SentencePiece model; name the .model file of one")
        return SentencePieceTokenizer(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Training


def train_sentencepiece(blocks: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """BPE with byte fallback, trained on blocks of text; exact for every text.

    A small text may give fewer ids than vocab_size. A piece is a word or a part of one with the
    space before it, or a run of spaces, or a run of signs with the newlines after it. No piece goes
    past the end of a line, so a prompt that ends with its line gets the ids that training has seen.
    Pieces of several words would save a sixth of the tokens, but the models trained on them were
    worse in bits per byte (docs/LOG.md).

    Each character gets an id, except for the rarest, which are spelled by their bytes. A text of
    many characters, as a Chinese one, may have more of them than vocab_size has room for. Then the
    most frequent characters get half of the room, and pieces of several characters the rest.
    ValueError if vocab_size is below NEEDED_IDS.
    """
    if vocab_size < NEEDED_IDS:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for tokenizer=sentencepiece: it needs at least "
            f"{NEEDED_IDS} ids, of which 256 are for bytes"
        )
    reserved = re.compile(f"[\0\u2585{SPACE}{BORDER}]")  # border, and marks of the trainer itself
    lines = re.compile("[^\n]+\n*|\n+")
    texts = [BORDER.join(lines.findall(reserved.sub("", block))) for block in blocks]
    try:
        try:
            return run_trainer(texts, vocab_size)
        except RuntimeError as error:
            if "required_chars" not in str(error):
                raise
        return run_trainer(without_rare(texts, (vocab_size - NEEDED_IDS) // 2), vocab_size)
    except RuntimeError as error:
        raise ValueError(
            f"no tokenizer with vocab_size={vocab_size} can be trained on this text ({error})"
        ) from None


def without_rare(texts: list[str], kept: int) -> list[str]:
    """The texts with BORDER instead of all characters but the `kept` most frequent ones."""
    counts = Counter(char for text in texts for char in text if char not in BORDER + "\n ")
    # Those that are equally frequent are in the order of their code points.
    rare = sorted(counts, key=lambda char: (-counts[char], char))[kept:]
    table = dict.fromkeys(map(ord, rare), BORDER)
    return [text.translate(table) for text in texts]


def run_trainer(texts: list[str], vocab_size: int) -> SentencePieceTokenizer:
    """SentencePiece's trainer, which raises RuntimeError."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        # The special ids of Llama
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        character_coverage=0.9995,
        # A space without a piece of its own would become the bytes of U+2581.
        required_chars=SPACE + "\n",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pretokenization_delimiter=BORDER,
        max_sentencepiece_length=32,
        max_sentence_length=2**30,
        # It is written into the file. A fixed number gives the same file on every machine.
        num_threads=2,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())
