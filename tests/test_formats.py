"""Compressed files are read as what they hold, piece by piece; damaged ones are one error line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tarfile
import tracemalloc

import pytest
from test_corpus import in_one_line

from data.corpus import CHUNK, open_corpus
from data.prepare import prepare
from text.formats import PACKED

TEXT = ("one\r\ntwo \u4f60\U0001f600\n" * 3000).encode()


def zstd(content):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow packs and unpacks .zst")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def test_every_suffix_is_tested():
    assert PACK.keys() == PACKED.keys()


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_text_becomes_the_data_set_of_the_same_text(tmp_path, suffix):
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / f"b.txt{suffix.upper()}").write_bytes(PACK[suffix](TEXT))
    plain = prepare([str(tmp_path / "a.txt")], tmp_path / "plain")
    packed = prepare([str(tmp_path / f"b.txt{suffix.upper()}")], tmp_path / "packed")
    for name in ("train.bin", "val.bin", "tokenizer.model"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    assert plain | {"source": "", "checksum": 0} == packed | {"source": "", "checksum": 0}


@pytest.mark.parametrize("shift, suffix", list(enumerate(PACK)))
def test_pieces_of_a_compressed_text_are_those_of_the_text(tmp_path, shift, suffix):
    """The chunks and the split are inside of characters, whose bytes are 4, 3 and 2."""
    text = ("\ufeff" + "x" * shift + "\U0001f600\u4f60\u00e9" * (CHUNK // 7)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / f"a.txt{suffix}").write_bytes(PACK[suffix](text))
    plain, packed = (open_corpus([str(tmp_path / f"a.txt{end}")]) for end in ("", suffix))
    assert list(plain.pieces()) == list(packed.pieces()) == list(packed.pieces())
    assert (plain.name, plain.size) == (packed.name, packed.size) == ("a", len(text))


def files_of_a_folder():
    """name -> content: texts and rows of every format that can be compressed."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["text"], *([f"cell {i}\nof it"] for i in range(60))])
    rows = [{"text": f"row {i}"} for i in range(60)]
    texts = {f"{i}.txt": f"text {i}\n".encode() * 9 for i in range(60)}
    return texts | {
        "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "b.json": json.dumps(rows, indent=1).encode(),
        "c.csv": table.getvalue().encode(),
        "d.tsv": table.getvalue().encode(),
    }


@pytest.mark.parametrize("suffix", PACK)
def test_a_folder_of_compressed_files_is_split_as_the_same_files(tmp_path, suffix, capsys):
    for folder, end in (("plain", ""), ("packed", suffix)):
        (tmp_path / folder).mkdir()
        for name, content in files_of_a_folder().items():
            packed = PACK[suffix](content) if end else content
            (tmp_path / folder / f"{name}{end}").write_bytes(packed)
    plain, packed = (list(open_corpus([str(tmp_path / n)]).pieces()) for n in ("plain", "packed"))
    assert packed == plain and len(plain) == 300
    name = f"a.jsonl{suffix}"
    assert open_corpus([str(tmp_path / "packed" / name)]).name == "a"
    assert capsys.readouterr() == ("", "")


def test_a_file_beside_its_compressed_copy_is_read_twice(tmp_path):
    """And their splits do not depend on the place of the folder."""
    found = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        for i in range(40):
            (folder / f"{i}.txt").write_text(f"plain {i:02}")
            (folder / f"{i}.txt.gz").write_bytes(gzip.compress(b"packed"))
        found.append(list(open_corpus([str(folder)]).pieces()))
    texts = "".join(piece.text for piece in found[0])
    assert texts.count("plain ") == texts.count("packed") == 40 and found[0] == found[1]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_damaged_compressed_file_is_one_error_line(tmp_path, suffix, name):
    line = {"a.txt": "text {}\n", "a.csv": "text\n{}\n"}.get(name, '{{"text": "{}"}}\n')
    packed = PACK[suffix]("".join(line.format(i * i) for i in range(9000)).encode())
    path = tmp_path / f"{name}{suffix}"
    damaged = {"cut": packed[:-9], "head": packed[:40], "another": b"a plain text\n" * 99}
    for content in damaged.values():
        path.write_bytes(content)
        for source in (path, tmp_path):
            match = (
                f"{name}{suffix}: cannot be unpacked .*: it is damaged, cut short, or no {suffix} "
            )
            in_one_line(lambda source=source: open_corpus([str(source)]), match, OSError)


def test_a_preparation_of_a_damaged_file_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT)[:-9])
    with pytest.raises(OSError, match="cannot be unpacked"):
        prepare([str(tmp_path / "a.txt.gz")], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt.gz"]


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.txt", gzip.compress(TEXT), "is gzip, not text in UTF-8: unpack it first"),
        ("a.txt.gz", gzip.compress(gzip.compress(TEXT)), "is gzip, not text in UTF-8: unpack it"),
        ("a.txt.gz", lzma.compress(TEXT), "cannot be unpacked"),
        ("a.tar.gz", tar(), "is a tar archive, not text in UTF-8: unpack it first"),
        ("a.parquet.gz", gzip.compress(b"PAR1\0"), "is compressed parquet, .*: unpack it first"),
        ("a.txt.gz", gzip.compress(b"x" * 9 + b"\xe9" + b"y" * 9), "byte 9 is not UTF-8"),
        ("a.csv.gz", gzip.compress(b"text\n\xe9\n"), "line 2: byte 0 is not UTF-8"),
    ],
    ids=["not so called", "twice", "another", "tar", "parquet", "no UTF-8", "table, no UTF-8"],
)
def test_what_a_compressed_file_holds_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    kind = OSError if "unpacked" in match else ValueError
    in_one_line(lambda: open_corpus([str(tmp_path / name)]), f"{name}:? {match}|{match}", kind)


def test_zstd_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    match = "a.txt.zst: unpacking it needs pyarrow; pip install pyarrow"
    in_one_line(lambda: open_corpus([str(tmp_path / "a.txt.zst")]), match)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_compressed_file_is_never_held_whole(tmp_path, name):
    text = "x" * 99_999
    line = json.dumps({"text": text}) if name == "a.jsonl" else text
    with gzip.open(tmp_path / f"{name}.gz", "wb", 1) as file:
        file.write(b"text\n" if name == "a.csv" else b"")
        for _ in range(200):
            file.write(f"{line}\n".encode())
    tracemalloc.start()
    try:
        for _ in open_corpus([str(tmp_path / f"{name}.gz")]).pieces():
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 * CHUNK
    finally:
        tracemalloc.stop()
