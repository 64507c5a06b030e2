import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import zipfile
from pathlib import Path

import pytest

import data.corpus as corpus
from data.corpus import CHUNK, documents, hub_stream, open_corpus, python_source, split_of
from data.prepare import prepare


def joined(source, split):
    return "".join(piece.text for piece in source.pieces() if piece.split == split)


def texts_of(source):
    return [piece.text for piece in source.pieces()]


def one_text(path, content):
    """The corpus of one text file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_corpus([str(path)])


def in_one_line(call, match, kind=ValueError):
    with pytest.raises(kind, match=match) as raised:
        list(call().pieces())
    assert "\n" not in str(raised.value)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def test_a_text_file_is_split_at_ninety_percent_of_its_bytes(tmp_path):
    text = "0123456789" * 101
    source = one_text(tmp_path / "a.txt", text)
    assert (joined(source, "train"), joined(source, "val")) == (text[:909], text[909:])
    assert source.name == "a" and str(tmp_path) not in source.source


@pytest.mark.parametrize("size", range(10, 30))
def test_the_split_cuts_no_character(tmp_path, size):
    text = "\U0001f600\u4f60a\u00e9" * size
    source = one_text(tmp_path / "a.txt", text)
    train = joined(source, "train")
    assert train + joined(source, "val") == text
    assert 0 <= len(train.encode()) - int(len(text.encode()) * 0.9) <= 3


@pytest.mark.parametrize("shift", range(4))
def test_a_text_is_read_in_chunks_and_kept_exactly(tmp_path, shift):
    """The chunks end inside of characters, whose bytes are 4, 3 and 2."""
    begin = "one\ufeff\r\ntwo\rthree\n\t" + "x" * shift
    text = begin + "\U0001f600\u4f60\u00e9" * (CHUNK // 4)
    pieces = list(one_text(tmp_path / "a.txt", text).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text.encode()) for piece in pieces) < CHUNK + 4
    assert [(piece.split, piece.start) for piece in pieces] == [
        ("train", True),
        ("train", False),
        ("train", False),
        ("val", True),
    ]


@pytest.mark.parametrize("at", [0, 5, CHUNK - 1, CHUNK, 2 * CHUNK - 2, 2 * CHUNK])
def test_what_is_not_utf8_is_named_with_its_byte(tmp_path, at):
    bad = one_text(tmp_path / "a.txt", b"x" * at + b"\xe9" + b"y" * (2 * CHUNK + 99 - at))
    in_one_line(lambda: bad, f"a.txt: byte {at} is not UTF-8")


@pytest.mark.parametrize("at", [9000, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_a_nul_byte_is_no_text_wherever_it_stands(tmp_path, at):
    content = ("\u00e9" * (at // 2) + "x" * (at % 2)).encode() + b"\0" + b"y" * (2 * CHUNK)
    in_one_line(lambda: one_text(tmp_path / "a.txt", content), f"a.txt: byte {at} is NUL.* tr -d")
    in_one_line(lambda: open_corpus([str(tmp_path)]), f"a.txt: byte {at} is NUL")


@pytest.mark.parametrize(
    "content, guessed",
    [
        ("Le caf\u00e9 est l\u00e0. ".encode("cp1252"), True),
        ("\u201cGr\u00fc\u00dfe\u201d\r\n".encode("cp1252") + b"to you\n", True),
        ("\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002\n".encode("shift_jis"), False),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440\n".encode("cp1251"), False),
        ("Les \u00e9l\u00e8ves d\u00e9j\u00e0 pr\u00e9par\u00e9s\n".encode("cp437"), False),
        (b"\x80\x05]\x94(K\x01K\x02e.", False),  # a pickle
        (b"\xff\xfb\x90d\x01\x02\x03 Info", False),  # MP3
    ],
    ids=["French", "German", "Shift-JIS", "Russian", "DOS", "pickle", "MP3"],
)
def test_an_encoding_is_guessed_only_where_it_is_plausible(tmp_path, content, guessed):
    for text in (content, b"plain words " + content):
        with pytest.raises(ValueError, match="is not UTF-8.* iconv -f ") as raised:
            texts_of(one_text(tmp_path / "a.txt", text))
        assert ("WINDOWS-1252" in str(raised.value)) == guessed


def test_a_character_that_the_end_of_the_file_cuts_is_not_utf8(tmp_path):
    bad = one_text(tmp_path / "b.txt", b"x" * 50 + b"\xe4\xbd")
    in_one_line(lambda: bad, "b.txt: byte 50 is not UTF-8")


def test_a_file_of_a_folder_is_a_document_in_one_split(tmp_path):
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    texts = {f"deep/{i}.txt": f"text {i} " * 9 for i in range(40)} | {"0.md": "first"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    source = open_corpus([str(folder)])
    pieces = list(source.pieces())
    assert sorted(piece.text for piece in pieces) == sorted(texts.values())
    assert all(piece.start for piece in pieces)
    assert {piece.split for piece in pieces} == {"train", "val"}
    assert pieces == list(documents([folder]).pieces())
    assert (source.name, source.source) == ("books", "41 files of books, split by document")
    assert source.size == sum(map(len, texts.values()))


def test_two_files_are_enough_for_both_splits(tmp_path):
    for i in range(30):  # whatever the hashes of their names are
        paths = [tmp_path / f"{i}.txt", tmp_path / f"{i}.md"]
        for path in paths:
            path.write_text(path.name)
        assert {piece.split for piece in documents(paths).pieces()} == {"train", "val"}


@pytest.mark.parametrize(
    "sizes",
    [[5000], [5000, 30], [5000] + [9] * 60, [99] * 3],
    ids=["one", "two", "one giant", "three"],
)
@pytest.mark.parametrize("kind", ["files", "rows"])
def test_few_or_unequal_documents_are_each_cut_at_ninety_percent(tmp_path, sizes, kind):
    (tmp_path / "mine").mkdir()
    texts = ["ab"[i % 2] * size for i, size in enumerate(sizes)]
    if kind == "rows":
        write_jsonl(tmp_path / "mine" / "r.jsonl", texts)
    else:
        for i, text in enumerate(texts):
            (tmp_path / "mine" / f"{i}.txt").write_text(text)
    source = documents([tmp_path / "mine"])
    pieces = list(source.pieces())
    cuts = [(text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]) for text in texts]
    for i, split in enumerate(("train", "val")):
        found = sorted(piece.text for piece in pieces if piece.split == split)
        assert found == sorted(cut[i] for cut in cuts)
    assert all(piece.start for piece in pieces) and pieces == list(source.pieces())
    assert source.source.endswith(" of mine, few or unequal, so each is cut 90/10")
    assert source.size == sum(sizes)


def test_files_of_the_same_name_are_all_taken(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    assert sorted(texts_of(documents([tmp_path / n / "x.txt" for n in "abc"]))) == ["a", "b", "c"]


def test_what_a_folder_held_and_was_not_read_is_counted_and_named(tmp_path, capsys):
    folder = tmp_path / "mine"
    for name in (".git", "more"):
        (folder / name).mkdir(parents=True)
    files = {"a.txt": b"a", "more/b": b"b", "e.txt": b"", ".hidden": b"h", ".git/config": b"c"}
    files |= {"x.png": b"\x89PNG\r\n\0", "g.txt": gzip.compress(b"x"), "u.md": b"u\0\n\0"}
    files |= {"y.PNG": b"\x89PNG\r\n\0", "t.tgz.gz": gzip.compress(bytes(257) + b"ustar\0")}
    files |= {"package.json": b'{"text": 5}', "list.json": b"[1]", "z\x1b[31m.dat": bytes(9)}
    files |= {"z.\x1b[31m": bytes(9), "0.DAT": bytes(9), "core": bytes(9)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name, target in {"linked": "more", "gone": "nowhere", "self": "self"}.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    assert sorted(texts_of(documents([folder]))) == ["a", "b"]
    assert capsys.readouterr().out == (
        f"{folder}: left out 1 . [31m binary file (z. [31m), 1 binary file (core), "
        "1 empty file (e.txt), 1 file holding a tar archive (t.tgz.gz), "
        "1 file holding gzip (g.txt), 1 file holding probably text in UTF-16LE (u.md), "
        "1 link to folders (linked), 1 special file (pipe), "
        "2 .dat binary files (0.DAT, z [31m.dat), "
        "2 .json files without rows of text (list.json, package.json), "
        "2 broken links (gone, self), 2 files holding a PNG image (x.png, y.PNG), "
        "2 hidden files or folders (.git, .hidden)\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_of_a_folder_are_named(tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b.txt").chmod(0)
    for name in ("closed", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.txt").write_text("c")
    (tmp_path / "closed").chmod(0)
    (tmp_path / "locked").chmod(0o600)  # its files have names, and cannot be opened
    assert "".join(texts_of(documents([tmp_path]))) == "a.txt"
    found = "left out 3 unreadable files or folders (b.txt, closed, locked/c.txt)"
    assert found in capsys.readouterr().out


def test_a_name_that_is_not_utf8_is_no_obstacle(tmp_path):
    for name in (b"caf\xe9.txt", b"b.txt"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"text")
    assert "".join(texts_of(documents([tmp_path]))) == "texttext"


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert "".join(texts_of(open_corpus(["~/a.txt"]))) == "at home"
    in_one_line(lambda: open_corpus(["~nobody-here/a"]), "there is no user 'nobody-here'")


@pytest.mark.parametrize("file", ["a.txt", "a.jsonl", "a.json", "folder"])
def test_a_byte_order_mark_at_the_head_of_a_file_is_no_text(tmp_path, file):
    content = {"a.txt": "text", "a.jsonl": '{"text": "text"}', "a.json": '[{"text": "text"}]'}
    place = tmp_path / file
    if file == "folder":
        place.mkdir()
    path = place / "a.txt" if place.is_dir() else place
    path.write_text("\ufeff" + content[path.name])
    assert "".join(texts_of(open_corpus([str(place)]))) == "text"


def test_links_out_of_a_folder_are_left_out(tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("the key")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("mine")
    (folder / "inside.txt").symlink_to(folder / "a.txt")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert "".join(texts_of(open_corpus([str(folder)]))) == "minemine"
    assert "left out 1 link to files outside of it (notes.txt)" in capsys.readouterr().out


def test_each_line_of_jsonl_is_a_document(tmp_path):
    texts = [f"row {i}\n\u4f60" for i in range(200)]
    pieces = list(open_corpus([str(write_jsonl(tmp_path / "r.jsonl", texts))]).pieces())
    assert [piece.text for piece in pieces] == texts and all(piece.start for piece in pieces)
    assert [piece.split for piece in pieces] == [split_of(f"r.jsonl:{i}", 0.1) for i in range(200)]
    assert 5 < sum(piece.split == "val" for piece in pieces) < 40


ROWS = [{"text": "one\n"}, {"text": "two"}, {"text": "\u4f60"}]


@pytest.mark.parametrize(
    "name", ["a.JSONL", "a.ndjson", "a.jsonlines", "a.jl", "a.Json", "lines.json", "bom.json"]
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_rows_are_known_by_their_suffix_in_any_case(tmp_path, name, in_folder, capsys):
    text = "\n".join(map(json.dumps, ROWS))
    if name in ("a.Json", "bom.json"):
        text = json.dumps(ROWS, indent=1)
    encoding = "utf-8-sig" if name == "bom.json" else "utf-8"
    (tmp_path / name).write_text(text, encoding=encoding)
    source = open_corpus([str(tmp_path if in_folder else tmp_path / name)])
    assert sorted("".join(texts_of(source))) == sorted("one\ntwo\u4f60")
    assert source.source.startswith("1 file of ") and capsys.readouterr().out == ""


@pytest.mark.parametrize("in_folder", [False, True])
def test_rows_under_the_name_of_a_text_are_told(tmp_path, capsys, in_folder):
    rows, plain = "\n" + "\n".join(map(json.dumps, ROWS)), '{"a": 1}\n'
    for name, text in {"a.txt": rows, "b.txt": plain, "c.md": "{\n", "d.jsonl": rows}.items():
        (tmp_path / name).write_text(text)
        if not in_folder:
            texts_of(open_corpus([str(tmp_path / name)]))
    if in_folder:
        assert rows in "".join(texts_of(open_corpus([str(tmp_path)])))
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {tmp_path / 'a.txt'}: ") and err.count("\n") == 1
    assert "a name that ends with .jsonl" in err


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_file_of_a_data_set_is_told_to_be_one(tmp_path, name):
    (tmp_path / "a.txt").write_text("a text of which a data set is made " * 30)
    prepare([str(tmp_path / "a.txt")], tmp_path / "a", tokenizer="byte")
    match = f"{name} is a part of the data set {tmp_path / 'a'}: name that folder"
    in_one_line(lambda: open_corpus([str(tmp_path / "a" / name)]), match)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "text")
    return file.getvalue()


FOREIGN = {  # what is given as text, and a part of the message
    "gzip": (gzip.compress(b"x"), "is gzip, .*unpack it first"),
    "bzip2": (bz2.compress(b"x"), "is bzip2, .*unpack it first"),
    "xz": (lzma.compress(b"x"), "is xz, .*unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is zstd, .*unpack it first"),
    "zip": (zipped(), "is a zip archive or an office document"),
    "PDF": (b"%PDF-1.7\n%", "is a PDF, .*pdftotext"),
    "parquet": (b"PAR1\x15\0\x15", "is parquet, .*ends with .parquet"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "is a PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0", "is a JPEG image"),
    "program": (b"\x7fELF\2\1", "is a program"),
    "UTF-16 with a mark": ("a\u4f60".encode("utf-16"), "UTF-16LE, .*iconv -f UTF-16LE -t UTF-8"),
    "UTF-16": ("line\n\u4f60\n".encode("utf-16-le"), "UTF-16LE, .*iconv -f UTF-16LE"),
    "UTF-16BE": ("line\n".encode("utf-16-be"), "UTF-16BE, .*iconv -f UTF-16BE"),
    "UTF-16BE, Russian": (
        "\u043c\u0438\u0440, ".encode("utf-16-be"),
        "UTF-16BE, .*iconv -f UTF-16BE",
    ),
    "UTF-16BE, Korean": ("\uc138\uacc4 \n".encode("utf-16-be"), "UTF-16BE, .*iconv -f UTF-16BE"),
    "UTF-16, Persian": ("a\u200cb \xad".encode("utf-16-le"), "UTF-16LE, .*iconv -f UTF-16LE"),
    "UTF-16, cut": ("line\n".encode("utf-16-le")[:-1], "UTF-16LE, .*iconv -f UTF-16LE"),
    "UTF-32": (("x" * 5000).encode("utf-32"), "UTF-32LE, .*iconv -f UTF-32LE"),
    "NUL": (b"a text with one\0 of them", "is binary .it has NUL bytes"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_text_is_named_with_the_way_out(tmp_path, kind):
    content, match = FOREIGN[kind]
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        in_one_line(
            lambda name=name: open_corpus([str(tmp_path / name)]), f"{name} {match}|{match}"
        )


@pytest.mark.parametrize("text", ["BZh is no bzip2", "PK", "PAR1 is a word", "MZ", "GIF87a", "II*"])
def test_a_text_may_begin_as_another_format_does(tmp_path, text):
    assert "".join(texts_of(one_text(tmp_path / "a.txt", text))) == text


def test_the_python_source_is_the_standard_library_without_its_tests():
    source = python_source()
    pieces = list(source.pieces())
    texts = {piece.text for piece in pieces}
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "textwrap.py").read_text(encoding="utf-8") in texts
    assert all(piece.start and piece.text for piece in pieces)
    assert 3e6 < sum(len(piece.text) for piece in pieces) < 3e7
    assert 0.01 < sum(piece.split == "val" for piece in pieces) / len(pieces) < 0.12
    for unwanted in root.glob("*/test*/__init__.py"):
        assert unwanted.stat().st_size == 0 or unwanted.read_text(encoding="utf-8") not in texts
    assert str(root) not in source.source


@pytest.fixture
def pretend_shakespeare(tmp_path, monkeypatch):
    """A local file in place of the download, so that no test needs the network."""
    content = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    (tmp_path / "input.txt").write_bytes(content)
    monkeypatch.setattr(corpus, "SHAKESPEARE", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path / "input.txt"


def test_shakespeare_is_split_as_the_same_local_file_is(pretend_shakespeare):
    source = open_corpus(["shakespeare"])
    assert source.name == "shakespeare" and source.tokenizer == "char"
    assert list(source.pieces()) == list(open_corpus([str(pretend_shakespeare)]).pieces())
    assert prepare(source, pretend_shakespeare.parent / "out")["tokenizer"] == "char"


def test_a_download_that_fails_or_is_something_else_is_one_error_line(pretend_shakespeare):
    pretend_shakespeare.write_text("<html>please log in</html>")
    in_one_line(lambda: open_corpus(["shakespeare"]), "not tinyshakespeare")
    pretend_shakespeare.unlink()
    match = "prepare.py input.txt name=shakespeare tokenizer=char"
    in_one_line(lambda: open_corpus(["shakespeare"]), match, OSError)


def test_a_stream_gives_the_rows_of_a_hugging_face_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets streams from Hugging Face")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    texts = [f"row {i}" for i in range(300)]
    path = write_jsonl(tmp_path / "rows.jsonl", texts)
    source = hub_stream("rows", "json", "byte", data_files=[str(path)])
    assert texts_of(source) == texts and source.stream
    assert {piece.split for piece in source.pieces()} == {"train", "val"}


STREAMS = {
    "tinystories": ("roneneldan/TinyStories", {}, "sentencepiece"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", {"name": "sample-10BT"}, "tiktoken:gpt2"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_named_streams_ask_for_the_right_data(monkeypatch, name):
    datasets = pytest.importorskip("datasets", reason="datasets streams from Hugging Face")
    asked = []

    def load(*words, **options):
        asked.append((words, options))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)  # it would use the network
    path, options, tokenizer = STREAMS[name]
    source = open_corpus([name])
    assert texts_of(source) == ["a"] and source.tokenizer == tokenizer
    assert asked == [((path,), options | {"split": "train", "streaming": True})]


def test_a_stream_that_breaks_says_to_run_again(tmp_path):
    pytest.importorskip("datasets", reason="datasets streams from Hugging Face")
    missing = hub_stream("rows", "json", "byte", data_files=[str(tmp_path / "no.jsonl")])
    in_one_line(lambda: missing, "run the same command again", OSError)


def test_an_unknown_source_is_one_error_line(tmp_path):
    match = "is not a file or folder, nor one of python, shakespeare, tinystories"
    in_one_line(lambda: open_corpus([str(tmp_path / "nothing")]), match, FileNotFoundError)
