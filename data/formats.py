"""What a file holds that is not a text in UTF-8, told by its first bytes; and how to say so."""

import codecs
import re
import unicodedata

HEAD = 8192  # bytes that are looked at
BYTE_ORDER_MARK = "\ufeff"  # some programs begin a file in UTF-8 with it, too
UNPACK = "unpack it first"
DROP_NUL = "take it out; or, if it is a text, tr -d '\\000' < OLD > NEW removes these"
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
        return "binary (it has NUL bytes)", DROP_NUL
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
