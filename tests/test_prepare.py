import json
import lzma
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import data.prepare as command
from data.corpus import CHUNK, NAMED, Corpus, Piece, hub_stream
from data.loader import open_dataset
from data.prepare import (
    in_order,
    main,
    prepare,
    spread_sample,
    train_tokenizer,
    xz_bits_per_byte,
)
from text.tokenizer import ByteTokenizer, load_tokenizer, train_sentencepiece
from text.tokenizer_export import tokenizer_files

PROSE = "".join(
    f"line {i}: the quick brown fox\n    jumps over {i * 7} lazy dogs\n\n" for i in range(300)
)
CUT = int(len(PROSE) * 0.9)
ROOT = Path(__file__).parent.parent
FILES = (
    "train.bin",
    "train.documents.bin",
    "val.bin",
    "val.documents.bin",
    "meta.json",
    "tokenizer.model",
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command: (exit code, what it wrote to stderr)."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(command, "DATA", tmp_path / "data")

    def call(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


def decoded(folder, split):
    dataset = open_dataset(folder)
    return load_tokenizer(folder).decode(getattr(dataset, split).tolist())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same_files(a, b, names=FILES):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


# The data set


@pytest.mark.parametrize("tokenizer", ["byte", "char", "sentencepiece"])
def test_a_prepared_data_set_opens_and_decodes_to_its_text(text, tmp_path, tokenizer):
    out = tmp_path / "out"
    meta = prepare([str(text)], out, tokenizer)
    assert (decoded(out, "train"), decoded(out, "val")) == (PROSE[:CUT], PROSE[CUT:])
    assert meta == json.loads((out / "meta.json").read_text())
    assert meta["bytes"] == {"train": CUT, "val": len(PROSE) - CUT}
    assert meta["tokenizer"] == tokenizer and str(tmp_path) not in json.dumps(meta)
    assert names_in(tmp_path) == ["out", "prose.txt"]  # nothing temporary is left


def test_char_ids_are_those_of_nanogpt(text, tmp_path):
    prepare([str(text)], tmp_path / "out", "char")
    place = {char: i for i, char in enumerate(sorted(set(PROSE)))}
    ids = np.array([place[char] for char in PROSE], dtype=np.uint16)
    assert (tmp_path / "out" / "train.bin").read_bytes() == ids[:CUT].tobytes()
    assert (tmp_path / "out" / "val.bin").read_bytes() == ids[CUT:].tobytes()


def test_bos_stands_before_every_document_and_nowhere_else(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i}\n")
    prepare([str(folder)], tmp_path / "out", "byte")
    dataset = open_dataset(tmp_path / "out")
    stream = np.concatenate([dataset.train, dataset.val]).tolist()
    assert stream[0] == 256 and stream.count(256) == 30
    found = "".join(chr(i) if i < 256 else "|" for i in stream).split("|")[1:]
    assert sorted(found) == sorted(f"document {i}\n" for i in range(30))


@pytest.mark.parametrize(
    "around, before, after, between",
    [(["<s>", "A"], [1], [], []), (["A", "</s>"], [], [2], []), (["A"], [], [], [2])],
    ids=["bos", "eos", "nothing"],
)
def test_documents_stand_between_the_ids_that_their_tokenizer_puts_around_a_text(
    tmp_path, around, before, after, between
):
    """As in transformers. Where it puts none, eos keeps two documents apart."""
    ours, folder = train_sentencepiece(["fox dogs " * 50], 300), tmp_path / "hf"
    folder.mkdir()
    for name, content in tokenizer_files(ours).items():
        (folder / name).write_bytes(content)
    fields = json.loads((folder / "tokenizer.json").read_text())
    kinds = ["Sequence" if part == "A" else "SpecialToken" for part in around]
    parts = [{k: {"id": part, "type_id": 0}} for k, part in zip(kinds, around, strict=True)]
    names = {"<s>": 1, "</s>": 2}
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in names.items()}
    fields["post_processor"] |= {"single": parts, "special_tokens": tokens}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    pieces = [("train", True, "fox dogs"), ("val", True, "dogs"), ("train", True, "fox ")]
    pieces += [("train", False, "dogs"), ("train", True, "fox")]
    corpus = Corpus("words", "words", lambda: (Piece(*piece) for piece in pieces))
    prepare(corpus, tmp_path / "out", str(folder))
    dataset = open_dataset(tmp_path / "out")
    one, three = ours.encode("fox dogs"), ours.encode("fox")
    two = ours.encode("fox ") + ours.encode("dogs", start=False)
    ids = [before + one + after, between + before + two + after, between + before + three + after]
    assert dataset.train.tolist() == sum(ids, [])
    assert dataset.val.tolist() == before + ours.encode("dogs") + after


def test_a_model_that_cannot_be_exported_is_named_at_preparation(text, tmp_path, capsys):
    for name, symbols in (("plain", []), ("other", ["[REF]"])):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["fox dogs " * 50]),
            model_prefix=str(tmp_path / name),
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=symbols,
            minloglevel=2,
        )
        prepare([str(text)], tmp_path / f"{name}-out", str(tmp_path / f"{name}.model"))
        said = "cannot be exported to Hugging Face: this sentencepiece tokenizer has no exact form"
        assert (said in capsys.readouterr().err) == bool(symbols)


def test_preparing_twice_gives_the_same_files(text, tmp_path):
    prepare([str(text)], tmp_path / "a")
    prepare([str(text)], tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_a_text_of_several_chunks_gives_the_ids_of_the_whole(tmp_path, monkeypatch, tokenizer):
    for module in ("data.corpus", "data.prepare"):
        monkeypatch.setattr(f"{module}.CHUNK", 5001)
    line = "".join(random.Random(0).choices("ab \u4f60\U0001f600", k=20_000))  # of 44 kB
    (tmp_path / "line.txt").write_text(line, encoding="utf-8")
    prepare([str(tmp_path / "line.txt")], tmp_path / "out", tokenizer)
    dataset = open_dataset(tmp_path / "out")
    made = load_tokenizer(tmp_path / "out")
    train, val = made.decode(dataset.train.tolist()), made.decode(dataset.val.tolist())
    assert train + val == line
    bos = [] if made.bos_id is None else [made.bos_id]
    assert dataset.train.tolist() == bos + made.encode(train)


def test_a_chunk_within_a_document_gets_no_dummy_space(tmp_path):
    sentencepiece.SentencePieceTrainer.train(  # as Llama's: a space is put before every text
        sentence_iterator=iter(PROSE.splitlines()),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    prose = PROSE * (CHUNK // len(PROSE) + 1)
    (tmp_path / "long.txt").write_text(prose)
    prepare([str(tmp_path / "long.txt")], tmp_path / "out", str(tmp_path / "llama.model"))
    assert decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val") == prose


# The tokenizer


def test_the_tokenizer_has_seen_the_train_split_only(tmp_path):
    (tmp_path / "t.txt").write_text("abc " * 900 + "xyz " * 100)
    prepare([str(tmp_path / "t.txt")], tmp_path / "out")
    pieces = load_tokenizer(tmp_path / "out").pieces
    assert any(b"abc" in piece for piece in pieces) and not any(b"xy" in piece for piece in pieces)


def test_the_tokenizer_of_a_stream_is_trained_on_its_beginning():
    endless = Corpus("s", "", lambda: (Piece("train", True, "a b") for _ in count()), stream=True)
    assert train_tokenizer(endless, 300).vocab_size > 256


def test_the_sample_is_bounded_and_spread_over_all_of_the_text():
    texts = [f"{i:04d}" * 250 for i in range(100)]
    sample = spread_sample(texts, 20_000, block=100)
    assert 10_000 <= sum(map(len, sample)) <= 20_000
    assert {int(block[:4]) for block in sample} == set(range(100))
    assert spread_sample(texts, 10**9) == texts


def test_vocab_size_sets_the_size_of_a_trained_tokenizer(text, tmp_path):
    assert prepare([str(text)], tmp_path / "out", vocab_size=350)["vocab_size"] == 350


def test_a_vocabulary_of_65536_ids_is_written_as_uint32(tmp_path):
    chars = "".join(chr(0x10000 + i) for i in range(80_000))
    (tmp_path / "chars.txt").write_text(chars, encoding="utf-8")
    assert prepare([str(tmp_path / "chars.txt")], tmp_path / "out", "char")["dtype"] == "uint32"
    assert open_dataset(tmp_path / "out").train.tolist() == list(range(72_000))


def test_a_given_model_file_is_the_tokenizer(text, tmp_path):
    train_sentencepiece(["fox dogs " * 50], 300).save(tmp_path)
    prepare([str(text)], tmp_path / "out", str(tmp_path / "tokenizer.model"))
    assert same_files(tmp_path, tmp_path / "out", ["tokenizer.model"])
    assert decoded(tmp_path / "out", "train") == PROSE[:CUT]


@pytest.fixture
def hugging_face(tmp_path):
    """A folder as Hugging Face's, with a tokenizer of bytes."""
    (tmp_path / "theirs").mkdir()
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (tmp_path / "theirs" / name).write_bytes(content)
    return tmp_path / "theirs"


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_folder_gives_its_tokenizer(text, tmp_path, hugging_face, kind, run):
    folder = hugging_face
    if kind == "sentencepiece":
        folder = tmp_path / "model"
        folder.mkdir()
        train_sentencepiece(["fox dogs " * 50], 300).save(folder)
    assert run(text, f"tokenizer={folder}") == (0, "")
    given, made = load_tokenizer(folder), tmp_path / "data" / "prose"
    assert [path.name for path in made.glob("tokenizer.*")] == [given.file]
    assert (made / given.file).read_bytes() == given.content()
    meta = open_dataset(made).meta
    assert (meta["tokenizer"], meta["tokenizer_sha256"]) == (kind, given.sha256)
    assert meta["bos_id"] == given.bos_id and meta["xz_bits_per_byte"] > 0
    assert decoded(made, "train") == PROSE[:CUT]
    assert run(text, "name=again", f"tokenizer={made}") == (0, "")
    assert same_files(made, tmp_path / "data" / "again", ["train.bin"])


def test_xz_is_given_the_training_text_first():
    pick = random.Random(0)
    before, text = (bytes(pick.choices(b"abcdefgh \n", k=n)) for n in (100_000, 20_000))
    alone, together = (
        len(lzma.compress(some, preset=9 | lzma.PRESET_EXTREME)) for some in (before, before + text)
    )
    bits = xz_bits_per_byte(before, text)
    assert bits == pytest.approx(8 * (together - alone) / 20_000, rel=1e-3)
    assert 0 < xz_bits_per_byte(before, before[-20_000:]) < 0.02 * bits  # it has seen that
    assert xz_bits_per_byte(before, b"") is None


def test_a_text_that_is_too_long_for_xz_is_cut_or_not_measured(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("data.prepare.XZ_LIMIT", 300)
    monkeypatch.setattr("data.prepare.xz_bits_per_byte", lambda *both: seen.append(both))
    (tmp_path / "a.txt").write_text("0123456789" * 200)
    prepare([str(tmp_path / "a.txt")], tmp_path / "made", tokenizer="byte")
    before, text = seen.pop()
    assert before == b"0123456789" * 30 and text == b"0123456789" * 20
    (tmp_path / "a.txt").write_text("0123456789" * 400)
    prepare([str(tmp_path / "a.txt")], tmp_path / "more", tokenizer="byte")
    monkeypatch.undo()
    assert xz_bits_per_byte(b"", bytes(16_000_001)) is None


def test_a_normalising_tokenizer_is_measured(text, tmp_path, hugging_face, capsys):
    fields = json.loads((hugging_face / "tokenizer.json").read_text())
    fields["normalizer"] = {"type": "Replace", "pattern": {"String": "q"}, "content": "k"}
    (hugging_face / "tokenizer.json").write_text(json.dumps(fields))
    meta = prepare([str(text)], tmp_path / "out", str(hugging_face))
    lost = {"train": PROSE[:CUT].count("q"), "val": PROSE[CUT:].count("q")}
    assert meta["lost_bytes"] == lost and meta["xz_bits_per_byte"] is None
    share = f"{100 * lost['train'] / CUT:.3g}%"
    assert f"warning: this tokenizer loses {share} of the train text" in capsys.readouterr().err


def test_the_share_of_a_text_that_its_tokenizer_loses_is_told(run, tmp_path, letters):
    (tmp_path / "letters.model").write_bytes(letters)
    (tmp_path / "t.txt").write_text("a bad cab\n" * 90 + "a \u00e4 7 dab" * 10)
    code, err = run(tmp_path / "t.txt", f"tokenizer={tmp_path / 'letters.model'}")
    assert code == 0 and err.count("\n") == 1
    data = open_dataset(tmp_path / "data" / "t")
    assert data.meta["lost_bytes"] == {"train": 90, "val": 30}  # newlines; \u00e4 has two bytes
    assert (data.lost_share("train"), data.lost_share("val")) == (0.1, 0.3)
    words = "10% of the train text and 30% of the val text, such as"
    assert f"warning: this tokenizer loses {words}" in err
    assert "'\u00e4'" in err and "'7'" in err and "tokenizer=sentencepiece or byte keeps all" in err


def test_a_text_of_which_nothing_is_lost_has_the_meta_json_that_it_always_had(
    run, tmp_path, letters
):
    (tmp_path / "letters.model").write_bytes(letters)
    (tmp_path / "t.txt").write_text(" a bad cab" * 90)
    assert run(tmp_path / "t.txt", f"tokenizer={tmp_path / 'letters.model'}") == (0, "")
    data = open_dataset(tmp_path / "data" / "t")
    assert "lost_bytes" not in data.meta and data.lost_share("val") == 0


# Threads, errors and stops


def test_work_is_done_in_order_and_few_items_are_held():
    taken, done = [], []

    def items():
        for i in range(200):
            taken.append(i)
            assert len(taken) - len(done) <= 2 * (os.cpu_count() or 1) + 2
            yield i

    for item, square in in_order(lambda i: i * i, items()):
        done.append((item, square))
    assert done == [(i, i * i) for i in range(200)]


def test_an_error_in_the_middle_leaves_nothing_behind(tmp_path):
    def pieces():
        yield Piece("train", True, "text")
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        prepare(Corpus("x", "test", pieces), tmp_path / "out", "byte")
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() < 5


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("network down")])
def test_a_stopped_stream_goes_on_to_the_same_result(tmp_path, monkeypatch, stop):
    # A stream that is large enough to be saved on its way would take minutes.
    monkeypatch.setattr(command, "SAVE_EVERY", 2000)
    monkeypatch.setattr(command, "CHUNK", 500)
    splits = ["train"] * 6 + ["val"]
    rows = [Piece(splits[i % 7], True, f"row {i} \u4f60\n" * 3) for i in range(1500)]
    passes = []

    def pieces(stop_in=None):
        """One pass trains the tokenizer, if there is none, and one makes the tokens."""
        passes.append(stop_in)
        for i, row in enumerate(rows):
            if i == 1100 and len(passes) == stop_in:
                raise stop
            yield row

    whole = Corpus("s", "test stream", pieces, stream=True)
    broken = Corpus("s", "test stream", lambda: pieces(stop_in=2), stream=True)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises((KeyboardInterrupt, OSError)):
        prepare(broken, out, vocab_size=300)
    assert not out.exists() and (partial / "progress.json").exists()
    with pytest.raises(ValueError, match="other settings"):
        prepare(whole, out, "byte")
    with open(partial / "train.bin", "ab") as file:
        file.write(b"written after the progress was saved")
    prepare(whole, out, vocab_size=300)
    assert len(passes) == 3  # the tokenizer is not trained again
    prepare(whole, tmp_path / "whole", vocab_size=300)
    assert same_files(out, tmp_path / "whole")
    assert names_in(tmp_path) == ["out", "whole"] and names_in(out) == sorted(FILES)


SOUND = {
    "asked": {"source": "test stream", "choice": "byte", "vocab_size": None},
    "dtype": "uint16",
    "pieces": 0,
    "tokens": {"train": 0, "val": 0},
    "bytes": {"train": 0, "val": 0},
    "val_crc32": 0,
}
UNSOUND = [{"dtype": "u1"}, {"dtype": []}, {"pieces": -1}, {"pieces": True}, {"asked": 3}]
UNSOUND += [{"bytes": None}, {"val_crc32": "0"}]
UNSOUND += [{"tokens": {"train": tokens, "val": 0}} for tokens in (1, 10**15)]
NO_JSON = ["", "{}", "[]", "[" * 100_000, "\0", " " * 100_001]


@pytest.mark.parametrize("content", NO_JSON + [json.dumps(SOUND | change) for change in UNSOUND])
def test_progress_that_cannot_be_is_refused(tmp_path, content):
    stream = Corpus("s", "test stream", lambda: iter([]), stream=True, tokenizer="byte")
    folder = tmp_path / ".out.partial"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (folder / name).touch()
    (folder / "progress.json").write_text(content)
    match = "progress.json is damaged, or does not belong to its .bin files; delete"
    with pytest.raises(ValueError, match=match):
        prepare(stream, tmp_path / "out")
    assert (folder / "train.bin").stat().st_size == 0


def test_a_stream_of_hugging_face_is_prepared(tmp_path):
    pytest.importorskip("datasets", reason="datasets streams from Hugging Face")
    rows = [f"row {i} of the stream" for i in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = hub_stream("rows", "json", "byte", data_files=[str(tmp_path / "rows.jsonl")])
    meta = prepare(source, tmp_path / "out")
    assert sum(meta["bytes"].values()) == sum(map(len, rows)) and meta["tokenizer"] == "byte"
    with pytest.raises(ValueError, match="tokenizer=char needs all of the text"):
        prepare(source, tmp_path / "chars", "char")


# The command


def test_the_command_prepares_a_named_data_set(run, text, tmp_path):
    assert run(text) == (0, "")
    assert open_dataset(tmp_path / "data" / "prose").meta["tokenizer"] == "sentencepiece"
    assert run(text, text.parent / "prose.txt", "--tokenizer=byte", "name=two") == (0, "")
    two = open_dataset(tmp_path / "data" / "two").meta
    assert two["source"] == "2 files of prose.txt, prose.txt, few or unequal, so each is cut 90/10"
    assert two["bytes"] == {"train": 2 * CUT, "val": 2 * (len(PROSE) - CUT)}


def test_the_command_takes_the_text_from_the_field_that_is_named(run, tmp_path):
    (tmp_path / "r.csv").write_text("text,body\n" + "a,the text of a body\n" * 30)
    assert run(tmp_path / "r.csv", "tokenizer=byte", "field=body")[0] == 0
    made = decoded(tmp_path / "data" / "r", "train") + decoded(tmp_path / "data" / "r", "val")
    assert sorted(made) == sorted("the text of a body" * 30)
    code, err = run(tmp_path / "r.csv", "name=other", "field=title")
    match = "line 2 has 'text', 'body', but no 'title': name the one with the text, as in python "
    assert code == 2 and f"{match}data/prepare.py {tmp_path / 'r.csv'} field=NAME" in err


def test_data_sets_stand_where_the_environment_says(text, tmp_path):
    sets = tmp_path / "elsewhere" / "sets"
    program = partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path)
    words = [sys.executable, str(ROOT / "data" / "prepare.py"), str(text), "tokenizer=byte"]
    told = os.environ | {"ROOTLLAMA_DATA": str(sets)}
    done = program(words, env=told)
    assert done.returncode == 0 and done.stdout.startswith(f"{sets / 'prose'}: "), done.stderr
    script = "from run.setup import find_dataset; print(find_dataset('prose', None))"
    found = program([sys.executable, "-c", script], env=told, cwd=ROOT).stdout
    assert found == f"{sets / 'prose'}\n"
    for place in ("sets", "", "~/sets"):
        done = program(words, env=told | {"ROOTLLAMA_DATA": place})
        message = f"error: ROOTLLAMA_DATA is {place!r}: make it the absolute path of a folder\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


WRONG = [
    ("", "no source given"),
    ("name=x", "no source given"),
    ("nothing.txt", "nothing.txt is not a file or folder"),
    ("TEXT tokeniser=byte", "unknown option 'tokeniser'; choose from field, tokenizer"),
    ("TEXT field=body", "field=body is for the rows of .jsonl"),
    ("python field=body", "of which python has none: leave it out"),
    ("TEXT tokenizer=bpe", "tokenizer=bpe is unknown; choose from byte, char, sentencepiece"),
    ("TEXT tokenizer=", "tokenizer= is unknown"),
    ("TEXT tokenizer=FOLDER", "no tokenizer.model or tokenizer.json there"),
    ("TEXT tokenizer=byte vocab_size=300", "vocab_size=300 is for tokenizer=sentencepiece"),
    ("TEXT vocab_size=many", "must be a whole number below ten million, got 'many'"),
    ("TEXT vocab_size=-1", "vocab_size must be a whole number below ten million, got '-1'"),
    ("TEXT vocab_size=0", "vocab_size=0 is too small for tokenizer=sentencepiece"),
    ("TEXT vocab_size=99", "needs at least"),
    ("TEXT vocab_size=", "got ''"),
    ("TEXT tokenizer=tiktoken:no", "tiktoken:no is unknown"),
    ("TEXT tokenizer=no.model", "no.model: no such tokenizer file"),
    ("TEXT tokenizer=byte --tokenizer=char", "tokenizer is given twice, as 'byte' and 'char'"),
    ("TEXT name=../x", "must be a bare folder name"),
    ("TEXT name=a/b", "must be a bare folder name"),
    ("TEXT name=..", "must be a bare"),
    ("TEXT name=", "must be a bare"),
    ("TEXT name=a\\b", "must be a bare"),
    ("TEXT TEXT", "give it a name="),
    ("TEXT --tokenizer byte", "--tokenizer has no value: write tokenizer=VALUE"),
    ("shakespeare_char", "did you mean shakespeare?"),
    ("roneneldan/TinyStories", "did you mean tinystories?"),
    ("openwebtext", "did you mean fineweb-edu?"),
    ("https://a.org/b.txt", "https://a.org/b.txt is not a file or folder, nor one of"),
    ("https://a.org/b.txt", "download it, and name the file"),
    ("EMPTY", "too little text"),
    ("ONE", "too little text"),
    ("EMPTY tokenizer=byte", "too little text"),
    ("ONE tokenizer=byte", "too little text"),
    ("FOLDER", "too little text"),
    ("LATIN", "byte 3 is not UTF-8"),
]


@pytest.mark.parametrize("line, match", WRONG)
def test_wrong_input_is_one_error_line_and_leaves_nothing(run, text, tmp_path, line, match):
    for name, content in {"EMPTY": b"", "ONE": b"x", "LATIN": b"caf\xe9" * 50}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "FOLDER").mkdir()
    text.rename(tmp_path / "TEXT")
    for name in ("EMPTY", "ONE", "LATIN", "FOLDER", "TEXT"):
        line = line.replace(name, str(tmp_path / name))
    code, err = run(*line.split())
    assert code == 2 and match in err and err.startswith("error: ") and err.count("\n") == 1
    assert list((tmp_path / "data").iterdir()) == []


def test_an_error_is_one_line_that_no_terminal_obeys(run, tmp_path):
    message = f"{tmp_path}/x ]0;owned .txt is not a file or folder, nor one of {', '.join(NAMED)}"
    assert run(tmp_path / "x\x1b]0;owned\x07\n.txt") == (2, f"error: {message}\n")


def test_an_existing_data_set_is_not_overwritten(run, text, tmp_path):
    assert run(text, "tokenizer=byte")[0] == 0
    before = (tmp_path / "data" / "prose" / "meta.json").read_bytes()
    code, err = run(text, "tokenizer=char")
    assert code == 2 and "exists already; delete it, or choose another name" in err
    assert (tmp_path / "data" / "prose" / "meta.json").read_bytes() == before


def test_nobody_is_told_to_delete_what_is_no_data_set(run, text, tmp_path):
    (tmp_path / "data" / "code.py").write_text("")
    code, err = run(text, "tokenizer=byte", "name=code.py")
    assert code == 2 and "is no data set" in err and "name=" in err and "delete it" not in err


BUILD = """import sys, time
from pathlib import Path
from data.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "large.bin").write_text("half")
    print(folder, flush=True)
    time.sleep(60)"""


def test_what_a_killed_command_left_is_removed_by_the_next_one(text, tmp_path):
    """And what a living one is making stays, as do folders that only look like it."""
    sets = tmp_path / "data"
    (sets / ".theirs.abcdefgh").mkdir(parents=True)
    (sets / ".mine.rootllama-unfinished").mkdir()
    words = [sys.executable, "-c", BUILD, str(sets / "other")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        prepare([str(text)], sets / "first", "byte")
        assert (folder / "large.bin").exists() and folder.parent == sets
        process.kill()
    prepare([str(text)], sets / "second", "byte")
    assert names_in(sets) == [".mine.rootllama-unfinished", ".theirs.abcdefgh", "first", "second"]


def test_the_home_folder_may_be_written_as_a_tilde(run, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train_sentencepiece(["fox dogs " * 50], 300).save(tmp_path)
    text.rename(tmp_path / "a=b.txt")
    assert run("~/a=b.txt", "tokenizer=~/tokenizer.model", "name=one") == (0, "")
    assert run("~/a=b.txt", "tokenizer=~/data/one", "name=two") == (0, "")
    assert names_in(tmp_path / "data") == ["one", "two"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_cleans_up(tmp_path, number, code):
    """The real script, started from elsewhere, and stopped while it reads a text."""
    folder = tmp_path / "data"
    (tmp_path / "big.txt").write_bytes(b"0123456789 abcdefg\n" * 4_000_000)  # for several seconds
    words = [sys.executable, command.__file__, "big.txt", "tokenizer=byte"]
    there = os.environ | {"ROOTLLAMA_DATA": str(folder)}
    process = subprocess.Popen(words, cwd=tmp_path, env=there, stderr=subprocess.PIPE)
    begin = time.monotonic()
    while not list(folder.glob(".big.*/train.bin")):
        assert time.monotonic() - begin < 20
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and b"Traceback" not in err
    assert not folder.exists()
