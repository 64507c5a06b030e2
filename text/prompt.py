"""What a user wants to be continued: a text, a file or standard input, and its token ids."""

import re
import sys
from pathlib import Path
from typing import BinaryIO

from config.command import expand_home, warn
from text.formats import BYTE_ORDER_MARK, HEAD, not_text, not_utf8
from text.tokenizer import Tokenizer

LARGEST_PROMPT = 1_000_000  # bytes of a file or of standard input; far more than any context


def prompt_text(prompt: str) -> str:
    """The text that prompt=... stands for."""
    if prompt == "-":
        if not (text := read_prompt(sys.stdin.buffer, "standard input")):
            raise ValueError("prompt=-, but nothing came from standard input")
        return text
    if prompt.startswith("FILE:"):
        name = prompt.removeprefix("FILE:")
        if not name:
            raise ValueError("prompt=FILE: names no file: write prompt=FILE:PATH")
        path = Path(expand_home(name))
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file, as in prompt=FILE:my.txt")
        if path.exists() and not path.is_file():  # a FIFO could make us wait for ever
            raise ValueError(f"{path} is not a regular file: use prompt=- to read from a pipe")
        with open(path, "rb") as file:
            return read_prompt(file, file.name)
    return prompt


def read_prompt(file: BinaryIO, name: str) -> str:
    """The text of a file without its last end of line (LF or CRLF), which echo and editors put
    there, and without a byte order mark. All else is taken as it is, as data are.

    ValueError if it is too long or no text in UTF-8.
    """
    content = file.read(LARGEST_PROMPT + 1)
    if len(content) > LARGEST_PROMPT:
        raise ValueError(
            f"{name} is longer than {LARGEST_PROMPT:,} bytes: give its end only, a model does not "
            f"see more of it"
        )
    if found := not_text(content[:HEAD]):
        what, cure = found
        raise ValueError(f"{name} is {what}, not text in UTF-8: {cure}")
    try:
        text = content.decode().removeprefix(BYTE_ORDER_MARK)
        return re.sub("\r?\n\\Z", "", text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} {not_utf8(content, error.start)}") from error


def refuse_other_encodings(text: str) -> None:
    """ValueError if Python has put a surrogate where a byte of a prompt was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not text in UTF-8 after {text[: error.start][-30:]!r}: let the "
            "terminal, or the program that it is from, use UTF-8"
        ) from None


def prompt_ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """The ids of a prompt, at least one. ValueError if the text cannot be encoded, and a warning if
    the tokenizer loses some of it.

    They begin as a document does in training, mostly with bos. An empty text gets a bos even if
    documents have none, because the model must read something. If there is no bos at all, an empty
    text becomes a newline, or the first token if newline has no token.

    A special token that is spelled out in the text is text, and a warning says so. With `special`
    it is the token, and a text that begins as a document does gets no second beginning.
    """
    refuse_other_encodings(text)
    before = tokenizer.before
    if not text and not before and tokenizer.bos_id is not None:
        before = [tokenizer.bos_id]
    if special and not tokenizer.special:
        raise ValueError(
            f"special=true, but a prompt can spell no special token of this {tokenizer.kind} "
            f"tokenizer: leave it out"
        )
    if special:
        ids = tokenizer.encode_special(text)
        ids = ids if before and ids[: len(before)] == before else before + ids
    else:
        if spelled := tokenizer.spelled(text):
            warn(
                f"the prompt spells {', '.join(spelled[:3])}, which is text like any other: "
                f"special=true of sample.py makes it the special token"
            )
        encoded = tokenizer.encode(text)
        if (seen := tokenizer.decode(encoded)) != text:
            warn(f"the tokenizer loses some of the prompt, the model sees {seen!r:.300}")
        ids = before + encoded
    if ids:
        return ids
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [0]
