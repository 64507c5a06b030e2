"""Thousands of mutations of what a user or a stranger gives us. Each must be taken, or refused in
one clear line, within bounded memory and time.

Real examples are bent in their structure (parts left out, given twice, exchanged, of another type,
huge, deep, in odd letters) and in their bytes. All mutations of one row run in one process. If one
ends that process, that is counted, and the next process goes on behind it.
"""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from config.command import user_errors
from config.preset import make_config, read_knobs
from config.schema import SYNONYMS, Config, knobs_of
from data import checksum
from data.loader import open_dataset
from exchange.hf import config_to_hf
from lab.compare import read_results
from model import Decoder, ModelConfig
from run import sharded
from run.metrics import METRICS_FILE, read_metrics
from run.ranks import ALONE
from text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from text.tokenizer_export import tokenizer_files
from weights import checkpoint
from weights.hf_folder import hf_name, read_hf

from .harness import ROOT, SERVER, Report, fault, words
from .hostile import TIKTOKEN, limit_data, sound_model, torch_file, with_pickle

EACH, FEW = 2000, 10
MEMORY = 1_000_000_000  # bytes that a row may take beyond what it starts with
PARTS = "ckpt_00000003.shards"
SECONDS = 2  # of computing, for one mutation
TINY = ModelConfig(vocab_size=257, n_layer=1, n_embd=4, n_head=1, n_hidden=4, block_size=4)

# Mutations

DEEP = json.loads("[" * 50 + "]" * 50)
ODD = ["", " ", "\0", "\ud800", "\x1b]0;x\x07\n", "\u202e", "\u0663", "\ufeff", "a\nb", '"""', "'"]
ODD += ["x" * 5000, "9" * 5000, "0x" + "f" * 50, "\\", "/dev/zero", "../..", "#"]
ODD += "= - -- 1e999 nan -inf 1_0 true None []".split()
TEXTS = st.sampled_from(ODD) | st.text(max_size=20)
LARGE = [10**4000, -(10**19), 2**31, 2**63, 1e308]
TREES = [DEEP, [], {}, [[]], {"train": 1}, {"": {}}]
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS | st.sampled_from(LARGE + TREES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
BENDS = st.sampled_from(("set", "delete", "rename", "exchange", "wrap", "add"))
PART = st.integers(0, 2**20)
CHANGES = st.lists(st.tuples(BENDS, PART, PART, VALUES, TEXTS), min_size=1, max_size=4)
CUTS = st.sampled_from(("flip", "set", "insert", "delete", "repeat", "cut"))
ONE_CUT = st.tuples(CUTS, st.floats(0, 1), st.binary(max_size=8), st.integers(1, 300))
BYTES = st.none() | st.lists(ONE_CUT, min_size=1, max_size=4)


def places(tree: object) -> list[tuple[dict | list, object]]:
    """(container, key or index) of every part of a tree of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else []
    if isinstance(tree, list):
        keys = list(range(len(tree)))
    return [place for key in keys for place in ((tree, key), *places(tree[key]))]


def copied(tree: object) -> object:
    """Tensors are not copied, because they are never changed."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return type(tree)(copied(value) for value in tree) if isinstance(tree, (list, tuple)) else tree


def bent(tree: dict, changes: list[tuple]) -> object:
    """A copy of a tree with its structure changed."""
    tree = {"": copied(tree)}
    # The values are copied, or one would stay bent for all later tries.
    for change, one, two, value, text in copied(changes):
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


def spoilt(content: bytes, changes: list[tuple] | None) -> bytes:
    """A copy of bytes with some of them changed."""
    content = bytearray(content)
    for change, where, new, count in changes or []:
        at = int(where * (len(content) - 1)) if content else 0
        if change == "flip" and content:
            content[at] ^= 1 << count % 8
        elif change == "set":
            content[at : at + len(new)] = new
        elif change == "insert":
            content[at:at] = new
        elif change == "delete":
            del content[at : at + count]
        elif change == "repeat":
            content[at:at] = content[at : at + count] * (count % 5)
        elif change == "cut":
            del content[at:]
    return bytes(content)


def bent_json(tree: dict, changes: list[tuple], cuts: list[tuple] | None) -> bytes:
    return spoilt(json.dumps(bent(tree, changes)).encode(), cuts)


# What is tried with a mutation: each function takes a folder, a sound example and the mutation

NAMES = st.sampled_from([*knobs_of(Config, ModelConfig), *SYNONYMS, "preset", "help"]) | TEXTS
GOOD = st.sampled_from("1 2 64 0.1 1e-3 true auto cosine dyt words -1 0 10**3".split())
DASHES = st.sampled_from(("", "", "--", "-"))
ARGUMENTS = st.builds("{}{}={}".format, DASHES, NAMES, GOOD | TEXTS | st.integers().map(str))
LONE = st.sampled_from(["config/tiny.py", "config", "--", "-h", "x.py"])
COMMAND_LINES = st.lists(ARGUMENTS | LONE | TEXTS, max_size=6)

SPELLINGS = ["0x" + "f" * 9000, "9" * 4500, "-" * 300 + "1", "(" * 150 + "1", "-" * 9000 + "1"]
SPELLINGS += ["1" + "+1" * 1500, "1" + "+1" * 20_000, "1is 1", "f'{1}'"]
SPELLINGS += "1j 1_000 007 ... b'x'".split()
NUMBERS = st.integers(-(10**20), 10**20).map(str) | st.floats().map(repr) | GOOD
SIGNS = st.sampled_from("+ - * / // ** % @ if , :=".split())
WRAPPERS = st.sampled_from(("({})", "[{}]", "-{}", "open({})", "lambda: {}"))
EXPRESSIONS = st.recursive(
    NUMBERS | st.sampled_from(SPELLINGS) | TEXTS.map(ascii) | TEXTS,
    lambda inner: (
        st.builds("{} {} {}".format, inner, SIGNS, inner) | st.builds(str.format, WRAPPERS, inner)
    ),
    max_leaves=6,
)
EQUALS = st.sampled_from((*"====", "+=", ":", "==", ": int =", "= x ="))
LINES = st.builds("{} {} {}".format, NAMES, EQUALS, EXPRESSIONS) | TEXTS
STRANGE = st.sampled_from(["# a comment", "'''", "import os", "if 1:", "  n_layer = 2", "\t"])
REAL = st.sampled_from((ROOT / "config" / "small.py").read_text(encoding="utf-8").splitlines())
PRESETS = st.lists(REAL | LINES | STRANGE, max_size=8).map("\n".join)


def try_command_line(folder: Path, sound: None, argv: list[str]) -> None:
    make_config(read_knobs(argv))


def try_preset(folder: Path, sound: None, text: str, cuts: list[tuple] | None) -> None:
    (folder / "mine.py").write_bytes(spoilt(text.encode(errors="surrogatepass"), cuts))
    make_config(read_knobs([str(folder / "mine.py")]))


def try_meta(folder: Path, sound: dict, changes: list[tuple], cuts: list[tuple] | None) -> None:
    (folder / "meta.json").write_bytes(bent_json(sound, changes, cuts))
    data = open_dataset(folder)
    json.dumps(data.fingerprint), data.bytes_per_token("val")


def small_state() -> dict:
    weights = {name: parameter.detach() for name, parameter in Decoder(TINY).named_parameters()}
    return {
        "format": checkpoint.FORMAT,
        "format_version": checkpoint.VERSION,
        "step": 3,
        "model": weights,
        "optimizer": {"norm.gain": {"exp_avg": torch.ones(4), "step": torch.tensor(3.0)}},
        "scaler": {},
        "config": Config(model=TINY).flat(),
        "data": {"name": "words", "tokens": {"val": 3}},
        "best_val_loss": 2.5,
        "grad_norms": [1.0, 2.0],
        "base": {},
    }


def try_checkpoint(
    folder: Path, sound: dict, changes: list[tuple], cuts: list[tuple] | None, where: str
) -> None:
    """Bent before it is saved. Then either its pickle alone is spoilt, with a right checksum, or
    the list of its entries."""
    content = torch_file(bent(sound, changes) if where != "pickle alone" else sound)
    if cuts and where != "whole file":
        content = with_pickle(content, lambda pickled: spoilt(pickled, cuts))
    elif cuts:
        directory = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x05\x06"))
        content = content[:directory] + spoilt(content[directory:], cuts)
    (folder / "x.pt").write_bytes(content)
    state = checkpoint.load(folder / "x.pt")
    checkpoint.build_model(checkpoint.model_config(state), state["model"], "cpu")
    checkpoint.compare_with_run(state, sound["config"], sound["data"])


def use_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("the cat sat on a mat 12\n\u00e9"))
    return tokenizer


def try_tokenizer(
    folder: Path, sound: dict, changes: list[tuple], cuts: list[tuple] | None, name: str
) -> None:
    for old in folder.glob("tokenizer.*"):
        old.unlink()
    is_json = name == "tokenizer.json"
    content = bent_json(sound, changes, cuts) if is_json else spoilt(sound_model(), cuts)
    (folder / name).write_bytes(content)
    tokenizer = use_tokenizer(folder)
    tokenizer.decode(range(tokenizer.vocab_size))


def hf_folder() -> dict[str, dict | bytes]:
    """A folder of Hugging Face with a byte tokenizer: the content of its files, by name."""
    weights = {hf_name(name): p.detach() for name, p in Decoder(TINY).named_parameters()}
    files = {name: json.loads(text) for name, text in tokenizer_files(ByteTokenizer()).items()}
    files["config.json"] = config_to_hf(TINY, ByteTokenizer(), "float32")
    return files | {"model.safetensors": safetensors.torch.save(weights)}


def try_hf_folder(
    folder: Path, sound: dict, changes: list[tuple], cuts: list[tuple] | None, name: str
) -> None:
    for file, content in sound.items():
        if isinstance(content, dict):
            content = json.dumps(bent(content, changes) if file == name else content).encode()
        if file == name:  # of the weights, what comes before the numbers
            content = spoilt(content[:2000], cuts) + content[2000:]
        (folder / file).write_bytes(content)
    read_hf(folder)
    use_tokenizer(folder)


def sound_meta(folder: Path) -> dict:
    for path in words().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return json.loads((folder / "meta.json").read_text())


RESULT = json.loads((ROOT / "docs/small-norms/results.jsonl").read_text().splitlines()[0])
METRICS = {
    "step": 3,
    "loss": 2.5,
    "train_loss": 2.3,
    "val_loss": 2.4,
    "val_bpb": 1.2,
    "step_ms": 9.5,
    "peak_memory_mb": 100,
    "watch": {"ffn_rms": [1.0, None]},
}


def try_records(
    folder: Path, sound: dict, changes: list[tuple], cuts: list[tuple] | None, name: str
) -> None:
    """A line of results.jsonl, or of metrics.jsonl, of which a damaged line is left out."""
    tree = {"results.jsonl": RESULT, METRICS_FILE: METRICS}[name]
    (folder / name).write_bytes(bent_json(tree, changes, cuts) + b"\n")
    if name == METRICS_FILE:
        with contextlib.redirect_stderr(None):
            losses = [r["loss"] + r["step"] for r in read_metrics(folder) if "loss" in r]
        f"{sum(losses):.3f}"
    else:
        json.dumps(read_results(folder / name)[1])


def sound_parts(folder: Path) -> dict:
    state = {name: v for name, v in small_state().items() if not name.startswith("format")}
    sharded.save_parts(folder / PARTS, state, ALONE)
    return json.loads((folder / PARTS / sharded.MANIFEST).read_text())


def try_manifest(folder: Path, sound: dict, changes: list[tuple], again: bool) -> None:
    """`again`: with the checksum that the bent manifest has."""
    tree = bent(sound, changes)
    if again and isinstance(tree, dict):
        with contextlib.suppress(ValueError):
            tree |= {"checksum": checksum(tree)}
    (folder / PARTS / sharded.MANIFEST).write_text(json.dumps(tree))
    state = sharded.load_parts(folder / PARTS)
    for tensors in (state["model"], *state["optimizer"].values()):
        for name, tensor in tensors.items():
            tensors[name] = torch.full(tensor.shape, float("nan"))  # all of it must be read
    sharded.read_into(state, folder / PARTS)


HF_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
Source = tuple[Callable, Callable[[Path], object], tuple]
SOURCES: dict[str, Source] = {  # name -> (what is tried, the sound example, the mutations)
    "the command line": (try_command_line, lambda folder: None, (COMMAND_LINES,)),
    "a preset": (try_preset, lambda folder: None, (PRESETS, BYTES)),
    "meta.json": (try_meta, sound_meta, (CHANGES, BYTES)),
    "a checkpoint's header": (
        try_checkpoint,
        lambda folder: small_state(),
        (CHANGES, BYTES, st.sampled_from(("fields", "pickle alone", "whole file"))),
    ),
    "the records of runs and comparisons": (
        try_records,
        lambda folder: {},
        (CHANGES, BYTES, st.sampled_from(("results.jsonl", METRICS_FILE))),
    ),
    "a checkpoint in parts": (try_manifest, sound_parts, (CHANGES, st.booleans())),
    "a tokenizer file": (
        try_tokenizer,
        lambda folder: TIKTOKEN,
        (CHANGES, BYTES, st.sampled_from(("tokenizer.json", "tokenizer.model"))),
    ),
    "a Hugging Face folder": (
        try_hf_folder,
        lambda folder: hf_folder(),
        (CHANGES, BYTES, st.sampled_from(HF_FILES)),
    ),
}


# The hunt


def judged(function: Callable, arguments: tuple) -> tuple[str, bool]:
    """(what was wrong with one try, as a failure; whether the mutation was taken)."""
    begin, code = time.process_time(), 0
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), user_errors():
            function(*arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:  # a panic of Rust is no Exception
        return f"{type(error).__name__}: {str(error)[:300]!r}", False
    line, seconds = said.getvalue(), time.process_time() - begin
    refused = line.startswith("error: ") and line.count("\n") == 1 and len(line) < 2000
    if code not in (0, 2) or refused != (code == 2):
        return f"exit code {code}: {line[:300]!r}", False
    return f"{seconds:.1f} s of computing" if seconds > SECONDS else "", code == 0


def hunt(source: str, tries: int, skip: int, folder: Path, log: Path, example: object) -> None:
    """In a child: all tries after the first `skip`. What is being tried, and what failed, is
    written to the log."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    function, _, strategies = SOURCES[source]
    limit_data(MEMORY)
    file, count = open(log, "a", buffering=1), 0

    def write(*event: object) -> None:
        file.write(json.dumps(event) + "\n")

    @settings(
        max_examples=tries,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def attempt(mutation: tuple) -> None:
        nonlocal count
        count += 1
        if skip < count <= tries:
            write("try", count)
            failure, taken = judged(function, (folder, example, *mutation))
            if failure or taken:
                write("failed" if failure else "taken", count, failure, repr(mutation)[:600])

    attempt()
    write("done", min(count, tries))


def fuzzed(source: str, report: Report, tries: int, folder: Path) -> None:
    log, skip, deaths, done = folder / "log", 0, 0, False
    example = SOURCES[source][1](folder)
    while not done:
        child = SERVER.Process(target=hunt, args=(source, tries, skip, folder, log, example))
        child.start()
        child.join(1800)
        lines = log.read_text().splitlines() if log.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("]")]  # the last may be cut
        assert events, f"nothing was tried: {(folder / 'stderr').read_text()[-1000:]}"
        done = events[-1][0] == "done"
        if not done:  # it has died while it tried this one
            skip, deaths = events[-1][1], deaths + 1
            event = json.dumps(["failed", skip, f"exit code {child.exitcode}", ""])
            with open(log, "a") as file:
                file.write(f"\n{event}\n")
    failed = {number: words for kind, number, *words in events if kind == "failed"}
    for number in range(1, events[-1][1] + 1):
        report.count(f"mutation {number}", ": ".join(failed.get(number, [])))
    taken = sum(event[0] == "taken" for event in events)
    report.note = f"{taken:,} were taken, the others refused; {deaths} ended the process"


for name in SOURCES:
    fault(f"fuzz of {name}", whole=EACH, few=FEW)(partial(fuzzed, name))
