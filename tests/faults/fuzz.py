"""Thousands of mutations of what a user or a stranger gives us: each is taken, or refused in one clear line.

Real examples are bent in their structure (parts left out, given twice, exchanged, of another type, huge, deep, in odd
letters) and in their bytes. All of a row's run in one process; what would crash that one is counted, and the next
process goes on behind it.
"""

import contextlib
import io
import json
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import checkpoint
from config.schema import OTHERS_NAMES, Config, knobs_of, load_config, user_errors
from data.loader import open_dataset
from data.tokenizer import ByteTokenizer, load_tokenizer
from hf import to_hf
from hf_tokenizer import tokenizer_files
from model import Decoder, ModelConfig
from weights import hf_name, read_hf

from .harness import ROOT, SERVER, Report, fault, words
from .hostile import TIKTOKEN, entries_of, sound_model, torch_file, zip_file

EACH, FEW = 2000, 100
MEMORY = 1_000_000_000  # bytes that a row may take beyond what it starts with
SECONDS = 2  # of computing, for one mutation
DEEP = json.loads("[" * 50 + "]" * 50)
ODD = ["", " ", "\0", "\ud800", "\x1b]0;x\x07\n", "x" * 5000, "\u202e", "=", "-", "--", "9" * 5000, "0x" + "f" * 50,
       "1e999", "nan", "-inf", "1_0", "\u0663", "true", "None", "[]", "a\nb", "../..", "/dev/zero", "'", '"""', "#",
       "\\", "\ufeff"]
TEXTS = st.sampled_from(ODD) | st.text(max_size=20)
SCALARS = (st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | TEXTS
           | st.sampled_from([10**4000, -10**19, 2**31, 2**63, 1e308, DEEP, [], {}, [[]], {"train": 1}, {"": {}}]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
                      max_leaves=5)
CHANGES = st.lists(st.tuples(st.sampled_from(("set", "delete", "rename", "exchange", "wrap", "add")),
                             st.integers(0, 2**20), st.integers(0, 2**20), VALUES, TEXTS), min_size=1, max_size=4)
BYTES = st.lists(st.tuples(st.sampled_from(("flip", "set", "insert", "delete", "repeat", "cut")), st.floats(0, 1),
                           st.binary(max_size=8), st.integers(1, 300)), min_size=1, max_size=4)


def places(tree: object) -> list[tuple[dict | list, object]]:
    """(container, key or index) of every part of a tree of dicts and lists."""
    own = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in own for place in ((tree, key), *places(tree[key]))]


def copied(tree: object) -> object:
    """Tensors are not: they are never changed."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return type(tree)(copied(value) for value in tree) if isinstance(tree, (list, tuple)) else tree


def bent(tree: dict, changes: list[tuple]) -> object:
    """A copy of a tree with its structure changed."""
    tree = {"": copied(tree)}
    for change, one, two, value, text in copied(changes):  # or a value would be bent for all later tries too
        there = places(tree)
        if not there:
            break
        (parent, key), (other, name) = (there[n % len(there)] for n in (one, two))
        if change == "set":
            parent[key] = value
        elif change == "delete":
            del parent[key]
        elif change == "rename" and isinstance(parent, dict):
            parent[text] = parent.pop(key)
        elif change == "exchange":
            parent[key], other[name] = copied(other[name]), copied(parent[key])
        elif change == "wrap":
            parent[key] = [parent[key]]
        elif isinstance(parent, dict):
            parent[text] = value
    return tree.get("", {})


def spoilt(content: bytes, changes: list[tuple]) -> bytes:
    """A copy of bytes with some of them changed."""
    content = bytearray(content)
    for change, where, new, count in changes:
        at = int(where * (len(content) - 1)) if content else 0
        if change == "flip" and content:
            content[at] ^= 1 << count % 8
        elif change == "set":
            content[at:at + len(new)] = new
        elif change == "insert":
            content[at:at] = new
        elif change == "delete":
            del content[at:at + count]
        elif change == "repeat":
            content[at:at] = content[at:at + count] * (count % 5)
        elif change == "cut":
            del content[at:]
    return bytes(content)


KNOBS = knobs_of(Config, ModelConfig)
NAMES = st.sampled_from([*KNOBS, *OTHERS_NAMES, "preset", "help"]) | TEXTS
GOOD = st.sampled_from(["1", "2", "64", "0.1", "1e-3", "true", "auto", "cosine", "dyt", "words", "-1", "0", "10**3"])
ARGUMENTS = st.builds("{}{}={}".format, st.sampled_from(("", "", "--", "-")), NAMES,
                      GOOD | TEXTS | st.integers().map(str))
COMMAND_LINES = st.lists(ARGUMENTS | st.sampled_from(["config/tiny.py", "config", "--", "-h", "x.py"]) | TEXTS,
                         max_size=6)

NUMBERS = st.integers(-10**20, 10**20).map(str) | st.floats().map(repr) | GOOD | st.sampled_from(
    ["0x" + "f" * 9000, "1j", "1_000", "007", "9" * 4500, "1is 1", "...", "b'x'", "f'{1}'", "-" * 300 + "1",
     "(" * 150 + "1", "-" * 9000 + "1", "1" + "+1" * 1500, "1" + "+1" * 20_000])
EXPRESSIONS = st.recursive(NUMBERS | TEXTS.map(ascii) | TEXTS, lambda inner: st.builds(
    "{} {} {}".format, inner, st.sampled_from(("+", "-", "*", "/", "//", "**", "%", "@", "if", ",", ":=")), inner)
    | inner.map("({})".format) | inner.map("[{}]".format) | inner.map("-{}".format) | inner.map("open({})".format)
    | inner.map("lambda: {}".format), max_leaves=6)
LINES = st.builds("{} {} {}".format, NAMES, st.sampled_from((*"====", "+=", ":", "==", ": int =", "= x =")),
                  EXPRESSIONS) | TEXTS | st.sampled_from(
    ["# a comment", "'''", "import os", "if 1:", "  n_layer = 2", "\t"])
REAL_LINES = st.sampled_from((ROOT / "config" / "small.py").read_text(encoding="utf-8").splitlines())
PRESETS = st.lists(REAL_LINES | LINES, max_size=8).map("\n".join)


def try_command_line(folder: Path, argv: list[str]) -> None:
    load_config(argv)


def try_preset(folder: Path, text: str, changes: list[tuple] | None) -> None:
    content = text.encode(errors="surrogatepass")
    (folder / "mine.py").write_bytes(spoilt(content, changes) if changes else content)
    load_config([str(folder / "mine.py")])


def try_meta(folder: Path, sound: dict, changes: list[tuple], bytes_too: list[tuple] | None) -> None:
    content = json.dumps(bent(sound, changes)).encode()
    (folder / "words" / "meta.json").write_bytes(spoilt(content, bytes_too) if bytes_too else content)
    data = open_dataset(folder / "words")
    json.dumps(data.fingerprint), data.bytes_per_token("val")


def small_state() -> dict:
    config = ModelConfig(vocab_size=7, n_layer=1, n_embd=4, n_head=1, n_hidden=4, block_size=4)
    weights = {name: parameter.detach() for name, parameter in Decoder(config).named_parameters()}
    return {"format": checkpoint.FORMAT, "format_version": checkpoint.VERSION, "step": 3, "model": weights,
            "optimizer": {"norm.gain": {"exp_avg": torch.ones(4), "step": torch.tensor(3.0)}}, "scaler": {},
            "config": Config(model=config).flat(), "data": {"name": "words", "tokens": {"val": 3}},
            "best_val_loss": 2.5, "grad_norms": [1.0, 2.0], "base": {}}


def try_checkpoint(folder: Path, sound: dict, changes: list[tuple], bytes_too: list[tuple] | None,
                   where: str) -> None:
    """Bent before it is saved, and then perhaps spoilt: the pickle alone, with a right checksum, or the whole file."""
    content = torch_file(bent(sound, changes) if where != "pickle alone" else sound)
    if bytes_too and where != "whole file":
        content = zip_file([(name, spoilt(part, bytes_too) if name.endswith("data.pkl") else part)
                            for name, part in entries_of(content)])
    elif bytes_too:
        directory = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x05\x06"))
        content = content[:directory] + spoilt(content[directory:], bytes_too)
    (folder / "x.pt").write_bytes(content)
    state = checkpoint.load(folder / "x.pt")
    checkpoint.build_model(checkpoint.model_config(state), state["model"], "cpu")
    checkpoint.compare_with_run(state, sound["config"], sound["data"])


def try_tokenizer(folder: Path, sound: dict, changes: list[tuple], bytes_too: list[tuple] | None, kind: str) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink(missing_ok=True)
    if kind == "model":
        (folder / "tokenizer.model").write_bytes(spoilt(sound_model(), bytes_too or []))
    else:
        content = json.dumps(bent(sound, changes)).encode()
        (folder / "tokenizer.json").write_bytes(spoilt(content, bytes_too) if bytes_too else content)
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("the cat sat on a mat 12\n\u00e9"))
    tokenizer.decode(range(tokenizer.vocab_size))


def hugging_face() -> tuple[dict, bytes]:
    """A folder of Hugging Face with a byte tokenizer: the content of its JSON files, by name, and of its weights."""
    config = ModelConfig(vocab_size=257, n_layer=1, n_embd=4, n_head=1, n_hidden=4, block_size=4)
    weights = {hf_name(name): p.detach() for name, p in Decoder(config).named_parameters()}
    files = {name: json.loads(content) for name, content in tokenizer_files(ByteTokenizer()).items()}
    return files | {"config.json": to_hf(config, ByteTokenizer(), "float32")}, safetensors.torch.save(weights)


def try_hugging_face(folder: Path, sound: tuple[dict, bytes], changes: list[tuple], bytes_too: list[tuple] | None,
                     name: str) -> None:
    files, weights = sound
    contents = {name: json.dumps(fields).encode() for name, fields in files.items()} | {"model.safetensors": weights}
    if name in files:
        contents[name] = json.dumps(bent(files[name], changes)).encode()
    if bytes_too:
        head = contents[name][:2000]  # of the weights all that is not numbers
        contents[name] = spoilt(head, bytes_too) + contents[name][2000:]
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    read_hf(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("the cat sat on a mat 12\n\u00e9"))


SOURCES: dict[str, Callable[[Path], tuple]] = {  # name -> function of a folder -> (what is tried, the mutations)
    "the command line": lambda folder: (partial(try_command_line, folder), (COMMAND_LINES,)),
    "a preset": lambda folder: (partial(try_preset, folder), (PRESETS, st.none() | BYTES)),
    "meta.json": lambda folder: (partial(try_meta, words(folder), json.loads(
        (words(folder) / "words" / "meta.json").read_text())), (CHANGES, st.none() | BYTES)),
    "a checkpoint's header": lambda folder: (partial(try_checkpoint, folder, small_state()), (
        CHANGES, st.none() | BYTES, st.sampled_from(("fields", "pickle alone", "whole file")))),
    "a tokenizer file": lambda folder: (partial(try_tokenizer, folder, TIKTOKEN), (
        CHANGES, st.none() | BYTES, st.sampled_from(("json", "model")))),
    "a Hugging Face folder": lambda folder: (partial(try_hugging_face, folder, hugging_face()), (
        CHANGES, st.none() | BYTES, st.sampled_from(("config.json", "tokenizer.json", "tokenizer_config.json",
                                                     "model.safetensors")))),
}


def judged(function: Callable, arguments: tuple) -> tuple[str, bool]:
    """(what was wrong with one try, as a failure; whether it was taken)."""
    begin = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said), user_errors():
            function(*arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:  # a panic of Rust is no Exception
        return f"{type(error).__name__}: {str(error)[:300]!r}", False
    line, seconds = said.getvalue(), time.process_time() - begin
    if code not in (0, 2) or (code == 2) != (line.startswith("error: ") and line.count("\n") == 1 and len(line) < 2000):
        return f"exit code {code}: {line[:300]!r}", False
    return f"{seconds:.1f} s of computing" if seconds > SECONDS else "", code == 0


def hunt(source: str, tries: int, skip: int, folder: Path, log: Path) -> None:
    """In a child: all tries after the first `skip`. In the log, what is being tried, and what failed."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    file, (function, strategies) = open(log, "a", buffering=1), SOURCES[source](folder)
    used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY,) * 2)
    count = 0

    @settings(max_examples=tries, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.tuples(*strategies))
    def attempt(arguments: tuple) -> None:
        nonlocal count
        count += 1
        if skip < count <= tries:
            file.write(json.dumps(["try", count]) + "\n")
            failure, taken = judged(function, arguments)
            if failure or taken:
                file.write(json.dumps(["failed" if failure else "taken", count, failure, repr(arguments)[:600]]) + "\n")

    attempt()
    file.write(json.dumps(["done", min(count, tries)]) + "\n")


def fuzzed(source: str, tries: int, folder: Path) -> Report:
    report, log, skip, done = Report(), folder / "log", 0, False
    signals = 0
    while not done:
        child = SERVER.Process(target=hunt, args=(source, tries, skip, folder, log))
        child.start()
        child.join(1800)
        lines = log.read_text().splitlines() if log.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("]")]  # the last may be cut short
        assert events, f"nothing was tried: {(folder / 'stderr').read_text()[-1000:]}"
        done = events[-1][0] == "done"
        if not done:  # it has died while it tried this one
            skip, signals = events[-1][1], signals + 1
            with open(log, "a") as file:
                file.write("\n" + json.dumps(["failed", skip, f"exit code {child.exitcode}", ""]) + "\n")
    failed = {event[1]: event for event in events if event[0] == "failed"}
    for number in range(1, events[-1][1] + 1):
        event = failed.get(number)
        report.count(f"mutation {number}: {event[2]}: {event[3]}" if event else "")
    report.note = (f"{sum(event[0] == 'taken' for event in events):,} were taken, the others refused; "
                   f"{signals} ended the process")
    return report


for name in SOURCES:
    fault(f"fuzz of {name}", whole=EACH, few=FEW)(partial(fuzzed, name))
