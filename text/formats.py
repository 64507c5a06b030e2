"""What a file holds: how it is unpacked if it is compressed, and what it is if not text in UTF-8.

A compressed file is known by the end of its name, what is no text by its first bytes.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import unicodedata
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

HEAD = 8192  # bytes that are looked at
BYTE_ORDER_MARK = "\ufeff"  # some programs begin a file in UTF-8 with it, too
UNPACK = "unpack it first"
DROP_NUL = "take it out; or, if it is a text, tr -d '\\000' < OLD > NEW removes these"
BINARY = "binary (it has NUL bytes)"
SAVE_AS_TEXT = "save its content as text in UTF-8 first"
FORMATS = (  # a pattern of the first bytes, what such a file is, and what to do with it
    (rb"\x1f\x8b", "gzip", UNPACK),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2", UNPACK),
    (rb"\xfd7zXZ\0", "xz", UNPACK),
    (rb"\x28\xb5\x2f\xfd", "zstd", UNPACK),
    (rb"\x04\x22\x4d\x18", "lz4", UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "7-Zip", UNPACK),
    (rb"Rar!\x1a\x07", "RAR", UNPACK),
    (rb"(?s).{257}ustar[\0 ]", "a tar archive", UNPACK),
    (
        rb"PK(\x03\x04|\x05\x06)",
        "a zip archive or an office document",
        f"{UNPACK}, or save as text",
    ),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", SAVE_AS_TEXT),
    (rb"%PDF-\d", "a PDF", "make text of it first, for instance with pdftotext"),
    (rb"PAR1.*\0", "parquet", "give it a name that ends with .parquet"),
    (rb"ARROW1\0", "Arrow", "save it as .parquet"),
    (rb"\x89PNG\r\n", "a PNG image", SAVE_AS_TEXT),
    (rb"\xff\xd8\xff", "a JPEG image", SAVE_AS_TEXT),
    (rb"GIF8[79]a.*\0", "a GIF image", SAVE_AS_TEXT),
    (rb"RIFF....WEBP", "a WebP image", SAVE_AS_TEXT),
    (rb"II\*\0|MM\0\*", "a TIFF image", SAVE_AS_TEXT),
    (rb"\x7fELF|\xcf\xfa\xed\xfe|MZ.*\0", "a program", "leave it out"),
    (rb"SQLite format 3\0", "an SQLite database", SAVE_AS_TEXT),
)
ASCII = re.compile(rb"[\t\r\n -~]")  # a character that a text may have
# In Windows-1252. In DOS's code pages these bytes are letters.
SIGN_IN_A_WORD = rb"[A-Za-z][\x80-\x89\x8b\x8d\x8f-\x91\x93-\x99\x9b\x9d][A-Za-z]"
# Text in another encoding has NUL bytes, too. The wider one comes first, as UTF-32 begins with the
# byte order mark of UTF-16.
WIDE = {
    "UTF-32LE": codecs.BOM_UTF32_LE,
    "UTF-32BE": codecs.BOM_UTF32_BE,
    "UTF-16LE": codecs.BOM_UTF16_LE,
    "UTF-16BE": codecs.BOM_UTF16_BE,
}


# Compressed files


class Unpacked(io.RawIOBase):
    """The content of a compressed file, which is read from `file`. OSError if it is damaged."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self.file.readinto(buffer)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise OSError(
                f"{self.path}: cannot be unpacked ({error}): it is damaged, cut short, or no "
                f"{self.path.suffix} file"
            ) from None

    def close(self) -> None:
        self.file.close()
        super().close()


def open_zstd(path: Path) -> BinaryIO:
    """A .zst file, opened to read its content."""
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise ValueError(f"{path}: unpacking it needs pyarrow; pip install pyarrow") from None
    return CompressedInputStream(open(path, "rb"), "zstd")


PACKED: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zstd,
}


def unpacked_name(name: str) -> str:
    """The name that a compressed file has when it is unpacked: a.txt for a.txt.gz."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PACKED else name


def open_unpacked(path: Path) -> BinaryIO:
    """A file opened to read its bytes, or those of its content if it is compressed.

    A compressed file is unpacked while it is read, so it takes no more memory than another one. It
    can only be read from the beginning to the end.
    """
    unpack = PACKED.get(path.suffix.lower())
    if unpack is None:
        return open(path, "rb")
    return io.BufferedReader(Unpacked(path, unpack(path)), 2**16)


def skip_bytes(file: BinaryIO, count: int) -> None:
    """Goes on by so many bytes in a file, or to its end."""
    if file.seekable():
        file.seek(count, os.SEEK_CUR)
        return
    while count and (block := file.read(min(count, 2**20))):
        count -= len(block)


def unpacked_size(path: Path) -> int:
    """The bytes of a file, or of its content if it is compressed, which is read for it."""
    if unpacked_name(path.name) == path.name:
        return path.stat().st_size
    with open_unpacked(path) as file:
        return sum(map(len, iter(partial(file.read, 2**20), b"")))


# What is no text


def not_text(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins with these bytes, and what to do with it; None for a text.

    head: the first HEAD bytes, or all if there are fewer. A text has no NUL byte there.
    """
    for pattern, what, cure in FORMATS:
        if re.match(pattern, head, re.DOTALL):
            return what, cure
    if encoding := wide_encoding(head):
        cure = f"convert it to UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW"
        return f"probably text in {encoding}", cure
    if b"\0" in head:
        return BINARY, DROP_NUL
    return None


def wide_encoding(head: bytes) -> str | None:
    """The encoding of UTF-16 or UTF-32 in which these bytes are text, if there is one."""
    for encoding, mark in WIDE.items():
        if head.startswith(mark):
            return encoding
    few_nul = len(ASCII.findall(head)) > 0.8 * len(head)  # in UTF-16 at most half are ASCII
    if b"\0" not in head or few_nul:
        return None
    texts = {encoding: read_as(head, encoding) for encoding in WIDE}
    texts = {encoding: text for encoding, text in texts.items() if text}
    # Read in the wrong order of bytes, many a text is printable, too, but has less of ASCII.
    return max(texts, key=lambda encoding: sum(map(str.isascii, texts[encoding])), default=None)


def read_as(head: bytes, encoding: str) -> str:
    """These bytes as text in the encoding, or "" if they are no text in it. The last character may
    be cut.
    """
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return ""
    return text if all(map(is_of_text, text)) else ""


def is_of_text(char: str) -> bool:
    """Whether it is printable, a space, or says how its neighbours are joined, split or turned."""
    return char.isprintable() or char.isspace() or unicodedata.category(char) == "Cf"


def not_utf8(content: bytes, at: int) -> str:
    """In words: the byte at this place of a text is not UTF-8, and how to make it so.

    Another encoding is named only if the text around is plausible in it. Windows-1252 is that of
    western languages, in which never many letters beyond ASCII stand side by side, words are short,
    and no sign but an apostrophe stands within one.
    """
    around = content[max(0, at - HEAD // 2) : at + HEAD // 2]
    words = read_as(around, "cp1252").split()
    plausible = bool(words) and len(around) < 20 * len(words)
    if plausible and not re.search(rb"[\x80-\xff]{4}|" + SIGN_IN_A_WORD, around):
        byte = content[at : at + 1].decode("cp1252")
        what, encoding = f", which is {byte!r} in Windows-1252", "WINDOWS-1252"
    else:
        what, encoding = "", "ITS-ENCODING"
    return (
        f"is not UTF-8 (0x{content[at]:02X}{what}); if it is a text, convert it to UTF-8, for "
        f"instance with iconv -f {encoding} -t UTF-8 OLD > NEW"
    )
