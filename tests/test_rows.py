"""Rows of JSON, of tables and of parquet: what is read, and the one line for what is not."""

import csv
import io
import json

import pytest
from test_corpus import in_one_line, texts_of, write_jsonl

import data.rows
from data.corpus import open_corpus
from data.rows import rows_in

TEXTS = ["one", 'two, "quoted"', "three\nlines\r\nof it", "\u4f60\t", "", " x "]


def table(rows, delimiter=",", encoding="utf-8"):
    """The bytes of a table that Python's csv module writes."""
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue().encode(encoding)


def bad_file(path, content, match):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    in_one_line(lambda: open_corpus([str(path)]), match)


# JSON


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{}", " is an empty object"),
        ("[1]", r" is not a JSON object .it is \[1\].: mend or drop it"),
        ("3", " is not a JSON object .it is 3.: mend or drop it"),
        ('{"a"', " is not a JSON object .Expecting ':' delimiter, at character 5.: mend"),
        ("\udcff", " is not a JSON object .*can't decode byte"),
        ("[" * 100_000, " is not a JSON object .*recursion"),
        ('{"text": 3}', " has 3 as its 'text', not a string: mend or drop it"),
        ('{"text": null}', " has None as its 'text', not a string"),
        ('{"text": "\\ud800"}', " has half a surrogate pair in its 'text'"),
        (
            '{"id": 1, "body": ""}',
            " has 'id', 'body', but no 'text': .* data/prepare.py .*r.jsonl .* has 'messages', or",
        ),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, reason):
    content = b'{"text": "good"}\n\n' + line.encode(errors="surrogateescape") + b"\n"
    bad_file(tmp_path / "r.jsonl", content, f"r.jsonl: line 3{reason}")


@pytest.mark.parametrize("content", ["nothing", "{", '{\n "a": 1\n}', "[[]]", "3", "[" * 10**5])
def test_a_json_file_without_objects_is_one_error_line(tmp_path, content):
    match = "a.json: neither a JSON list of objects nor an object on each line .(line|item|maximum)"
    bad_file(tmp_path / "a.json", content, match)


@pytest.mark.parametrize(
    "content, match",
    [
        ("{}", "line 1 is an empty object"),
        ('{"a": 1}', "line 1 has 'a', but no 'text'"),
        ('[{"text": "x"}, {"text": 5}]', "item 2 has 5 as its 'text'"),
        ('[{"text": "x"}, 7]', "a list of objects|item 2 is 7"),
    ],
)
def test_an_object_without_a_text_is_named_by_what_it_has(tmp_path, content, match):
    bad_file(tmp_path / "a.json", content, match)


# Tables


@pytest.mark.parametrize(
    "name, delimiter", [("a.csv", ","), ("A.CSV", ","), ("a.tsv", "\t"), ("a.Tab", "\t")]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_each_row_of_a_table_is_a_document(tmp_path, name, delimiter, encoding):
    rows = [("text", "id"), *((text, i) for i, text in enumerate(TEXTS))]
    (tmp_path / name).write_bytes(table(rows, delimiter, encoding))
    assert "".join(texts_of(open_corpus([str(tmp_path / name)]))) == "".join(TEXTS)
    assert [row for _, row in rows_in(tmp_path / name)] == [
        {"text": text, "id": str(i)} for i, text in enumerate(TEXTS)
    ]


def test_a_row_has_the_line_on_which_it_begins_as_its_place(tmp_path):
    (tmp_path / "a.csv").write_text('text\none\n\n"two\nlines"\nthree\n')
    assert list(rows_in(tmp_path / "a.csv")) == [
        ("line 2", {"text": "one"}),
        ("line 4", {"text": "two\nlines"}),
        ("line 6", {"text": "three"}),
    ]
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert list(rows_in(tmp_path / "a.jsonl")) == [("line 1", {"text": "x", "id": 1})]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_of_a_table_may_end_as_on_any_system(tmp_path, ending):
    (tmp_path / "a.csv").write_bytes(ending.join(["text,id", "one,1", "two,2"]).encode())
    assert list(data.rows.texts_in(tmp_path / "a.csv", "text")) == ["one", "two"]


@pytest.mark.parametrize(
    "content, match",
    [
        ("id,body\n1,a\n", "line 2 has 'id', 'body', but no 'text': .*field=NAME"),
        ('id,text\n1,"a\nb"\n\n2\n', "line 5 has 1 cell, the first line has 2: mend or drop it"),
        ("id,text\n1,a,b\n", "line 2 has 3 cells, the first line has 2"),
        ("text,text\na,b\n", "two columns are called 'text': rename one in line 1"),
        ('text\n"a\n', "the row from line 2 on cannot be read .unexpected end of data.*doubled"),
        ('text\na\n"b"c\n', "the row from line 3 on cannot be read"),
        (b"text\nok\ncaf\xe9s\n", "line 3: byte 3 is not UTF-8 .0xE9.*iconv -f "),
        (b"text\n" + b"ok\n" * 9000 + b"a\0b\n", "line 9002 has a NUL, which no text has"),
        ("text,id\n".encode("utf-16"), "probably text in UTF-16LE"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_error_line(tmp_path, content, match):
    bad_file(tmp_path / "a.csv", content, f"a.csv.* {match}|a.csv: {match}")


def test_a_cell_may_be_large_but_a_quote_that_is_never_closed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text('text\n"' + "x\n" * 300_000 + '"\n')
    assert texts_of(open_corpus([str(tmp_path / "a.csv")]))[0].count("x") == 270_000
    monkeypatch.setattr(data.rows, "LARGEST_CELL", 1000)
    match = "a.csv: the row from line 2 on cannot be read .field larger than field limit"
    in_one_line(lambda: open_corpus([str(tmp_path / "a.csv")]), match)


# Parquet


def test_each_row_of_parquet_is_a_document(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
    from pyarrow import parquet

    def write(name, **columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")

    texts = [f"row {i}" for i in range(2500)]
    write("r", text=texts, n=list(range(2500)))
    assert texts_of(open_corpus([str(tmp_path / "r.parquet")])) == texts
    rows = list(rows_in(tmp_path / "r.parquet"))
    assert rows[1999] == ("row 2000", {"text": "row 1999", "n": 1999}) and len(rows) == 2500
    write("no", words=texts, n=list(range(2500)))
    write("numbers", text=[1, 2])
    write("null", text=["a", None])
    write("lists", text=[["a"], ["b"]])
    (tmp_path / "garbage.parquet").write_bytes(b"garbage")
    found = {
        "no": "row 1 has 'words', 'n', but no 'text': .*field=NAME",
        "numbers": "row 1 has 1 as its 'text', not a string",
        "null": "row 2 has None as its 'text', not a string",
        "lists": r"row 1 has \['a'\] as its 'text', not a string",
        "garbage": "not a parquet file that can be read .",
    }
    for name, reason in found.items():
        sources = [str(tmp_path / f"{name}.parquet")]
        in_one_line(lambda sources=sources: open_corpus(sources), f"{name}.parquet: {reason}")


# The field


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_the_field_with_the_text_can_be_named(tmp_path, name):
    rows = [{"text": f"title {i}", "the body": f"body {i}"} for i in range(50)]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith("sv"):
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_bytes(table(cells, "," if name == "a.csv" else "\t"))
    else:
        path.write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    for source in (path, tmp_path):
        for field, named in (("text", None), ("the body", "the body")):
            found = "".join(texts_of(open_corpus([str(source)], named)))
            assert found == "".join(row[field] for row in rows)


def test_a_field_where_there_are_no_rows_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for source in (tmp_path, tmp_path / "a.txt"):
        match = (
            f"field=body is for the rows of .jsonl, .*, of which {source} has none: leave it out"
        )
        in_one_line(lambda source=source: open_corpus([str(source)], "body"), match)
