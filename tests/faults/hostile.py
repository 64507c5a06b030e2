"""Files made to do harm, at every place where a file is read. Nothing in them may run, nothing
outside the folder may be touched, memory and time must stay bounded, and what is said must be one
clear line.

Each case is a whole command in a process of its own. An audit hook in it notes every attempt to
start a program, to look up a function for a real pickle, to connect, to write outside the folder or
to read the secret that lies there.

Reading order: the fault and what it does with a case; the cases; the harmful files.
"""

import base64
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

import data.corpus
import data.prepare
import lab.compare
import lab.timing
import sample
import train
from data.corpus import Corpus, Piece
from model import Decoder, ModelConfig
from text.tokenizer import PROBE, train_sentencepiece
from text.tokenizer_json import STEPS_PROBE
from weights import checkpoint

from .harness import Child, Report, command, fault, uncut, words

MEMORY = 1_500_000_000  # bytes that a command may take, what it needs for torch included
SECONDS = 10
PROSE = "the cat sat on a mat and saw the rat run to its hole\n" * 200
# train.py asks git for its own version.
GIT = ["git", "describe", "--match=", "--always", "--abbrev=40", "--dirty"]
WATCHED = "os.system os.exec os.posix_spawn os.fork os.forkpty pty.spawn subprocess.Popen".split()
WATCHED += "pickle.find_class socket.connect socket.getaddrinfo webbrowser.open".split()
PROGRAMS = {
    "train": train.main,
    "sample": sample.main,
    "prepare": data.prepare.main,
    "compare": lab.compare.main,
}
Make = Callable[[Path, Path], object]  # makes a harmful file: (scene, path of the file)


class Place(NamedTuple):
    """Where a file is read."""

    path: str  # below the scene
    program: str
    arguments: Callable[[Path], list[str]]  # of the program, from the scene
    codes: tuple[int, ...] = (2,)
    in_the_way: str = ""  # a file that must go, so that the program reads this one


class Case(NamedTuple):
    name: str
    place: Place
    make: Make
    codes: tuple[int, ...]


# What is done with a case


def hostile_files(report: Report, tries: int, folder: Path) -> None:
    whole = uncut(folder / "whole", keep=1)
    for case in CASES[:tries]:
        scene = folder / "scene"
        stage(case, whole, scene)
        report.count(case.name, judged(case, scene))
        shutil.rmtree(scene)
    report.note = (
        f"{len(PLACES)} places where a file is read, {len(PAYLOADS)} ways to run code, none ran"
    )


def stage(case: Case, whole: Path, scene: Path) -> None:
    """A folder with a run, a data set, a text, what is outside of them, and the harmful file."""
    shutil.copytree(whole, scene / "run")
    shutil.copytree(words(), scene / "data" / "words")
    shutil.copy(scene / "run" / "ckpt_00000012.pt", scene / "sound.pt")
    shutil.copy(words() / "meta.json", scene / "meta.sound")
    (scene / "prose.txt").write_text(PROSE)
    stopped, outside = scene / "data" / ".made.partial", scene / "outside"
    stopped.mkdir()
    (scene / "lab").mkdir()
    for split in ("train", "val"):
        (stopped / f"{split}.bin").touch()
    outside.mkdir()
    (outside / "secret.txt").write_text("the secret\n" * 99)
    (outside / "secret.bin").write_bytes(b"\xff the secret\n" * 99)
    (outside / "evil.pt").write_bytes(pickle.dumps(PAYLOADS["os.system"](outside / "ran")))
    path = scene / case.place.path
    path.unlink(missing_ok=True)
    if case.place.in_the_way:
        (scene / case.place.in_the_way).unlink()
    case.make(scene, path)


def judged(case: Case, scene: Path) -> str:
    """What was wrong with a case, as a failure."""
    before = outside_of(scene)
    inside = partial(guarded, case.place.program, case.place.arguments(scene), scene)
    child = Child(scene / "run", inside, data=scene / "data", output=scene / "stdout")
    try:
        code, _ = child.end(60)
    except TimeoutError:
        return "it hangs"
    notes = (scene / "notes").read_text()
    lines = (scene / "stderr").read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if outside_of(scene) != before or notes:
        return f"it did what it must not: {notes[:500] or 'outside has changed'}"
    if code not in case.codes:
        return f"exit code {code}: {' '.join(lines)[-500:] or child.text()[-300:]}"
    clear = all(line.startswith(("error: ", "warning: ")) for line in lines)
    if len(errors) != (code == 2) or not clear:
        return f"not one clear line: {lines!r:.700}"
    long = [line for line in lines if len(line) > 2000 or not line.isprintable()]
    return f"a long line, or one with control characters: {long[0]!r:.300}" if long else ""


def outside_of(scene: Path) -> list[tuple[str, bytes]]:
    return sorted((path.name, path.read_bytes()) for path in (scene / "outside").iterdir())


def guarded(program: str, arguments: list[str], scene: Path) -> None:
    """In the child: the program instead of train.py, watched and with a limit on its memory."""
    notes = os.open(scene / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(scene / "stderr", os.O_WRONLY | os.O_CREAT), 2)

    def watch(event: str, details: tuple) -> None:
        if event == "open" and isinstance(details[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(details[0]))
            writes = (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            own = path.startswith((str(scene), "/dev/null")) or "__pycache__" in path
            if path.startswith(str(scene / "outside")) or (writes and not own):
                os.write(notes, f"open {path}\n".encode())
        elif event in WATCHED:
            tried = event == "subprocess.Popen" and details[1][-1].endswith((PROBE, STEPS_PROBE))
            ours = event == "subprocess.Popen" and (tried or details[1] == GIT)
            if not ours:
                os.write(notes, f"{event} {details}"[:300].encode() + b"\n")

    if program == "compare":  # in this process, so that it is watched, too
        lab.timing.time_elsewhere = lab.timing.time_arms
    if program == "prepare":
        data.prepare.DATA = scene / "data"
        stream = Corpus("s", "a stream", two_pieces, stream=True)
        data.corpus.NAMED["a-stream"] = lambda: stream
    limit_data(2 * MEMORY)
    sys.addaudithook(watch)
    try:
        sys.exit(PROGRAMS[program](arguments))
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime
        if used.ru_maxrss * 1024 > MEMORY or seconds > SECONDS:
            os.write(notes, f"{used.ru_maxrss >> 10:,} MB, {seconds:.0f} s".encode())


def two_pieces() -> Iterator[Piece]:
    for split in ("train", "val"):
        yield Piece(split, True, PROSE)


def limit_data(more: int) -> None:
    """This process may take so many bytes more than it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, used + more))


# The places


def training(scene: Path) -> list[str]:
    return command(scene / "run", dataset="words", resume="auto", max_iters=13)


def training_afresh(scene: Path) -> list[str]:
    return command(scene / "fresh", dataset="words")


def comparing(scene: Path) -> list[str]:
    knobs = dict(argument.split("=", 1) for argument in training_afresh(scene)[1:])
    knobs |= {"out_dir": str(scene / "lab"), "seeds": "0", "steps": "2", "processes": "2"}
    knobs.pop("resume", None)
    return [training_afresh(scene)[0], *(f"{name}={value}" for name, value in knobs.items())]


def with_preset(scene: Path) -> list[str]:
    return [str(scene / "mine.py"), f"out_dir={scene / 'fresh'}"]


def sampling(which: str, prompt: str = "the") -> Callable[[Path], list[str]]:
    def arguments(scene: Path) -> list[str]:
        knobs = [f"checkpoint={which}", f"prompt={prompt.format(scene=scene)}"]
        return [str(scene / "run"), *knobs, "max_new_tokens=2", "device=cpu"]

    return arguments


def preparing(source: str, tokenizer: str = "byte") -> Callable[[Path], list[str]]:
    def arguments(scene: Path) -> list[str]:
        chosen = f"tokenizer={tokenizer.format(scene=scene)}"
        return [str(scene / source) if "." in source else source, "name=made", chosen]

    return arguments


TOKENIZER = "run/tokenizer.json"
PLACES = {
    "a checkpoint": Place("run/ckpt_00000012.pt", "train", training),
    "a checkpoint to sample": Place("run/ckpt_00000012.pt", "sample", sampling("latest")),
    "best.pt": Place("run/best.pt", "sample", sampling("best")),
    "metrics.jsonl": Place("run/metrics.jsonl", "train", training, (0, 2)),  # not needed to go on
    "results.jsonl": Place("lab/results.jsonl", "compare", comparing, (0, 2)),  # a cut line
    "timing.json": Place("lab/timing.json", "compare", comparing, (0, 2)),
    "plan.json": Place("lab/plan.json", "compare", comparing, (0, 2)),
    "config.json": Place("run/config.json", "train", training, (0, 2)),  # written, never read
    "a run's tokenizer.json": Place(TOKENIZER, "sample", sampling("best")),
    "a run's tokenizer.model": Place(
        "run/tokenizer.model", "sample", sampling("best"), in_the_way=TOKENIZER
    ),
    "a prompt": Place("prompt.txt", "sample", sampling("best", "FILE:{scene}/prompt.txt")),
    "meta.json": Place("data/words/meta.json", "train", training_afresh),
    "train.bin": Place("data/words/train.bin", "train", training_afresh),
    "val.bin": Place("data/words/val.bin", "train", training_afresh),
    "a data set's tokenizer.json": Place("data/words/tokenizer.json", "train", training_afresh),
    "a preset": Place("mine.py", "train", with_preset),
    "a text": Place("mine.txt", "prepare", preparing("mine.txt")),
    "a .jsonl": Place("mine.jsonl", "prepare", preparing("mine.jsonl")),
    "a .parquet": Place("mine.parquet", "prepare", preparing("mine.parquet")),
    "a .model": Place("mine.model", "prepare", preparing("prose.txt", "{scene}/mine.model")),
    "progress.json": Place("data/.made.partial/progress.json", "prepare", preparing("a-stream")),
}


# Payloads and files in which they hide


class Call:
    """A real unpickler that meets it calls the function."""

    def __init__(self, function: Callable, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


PAYLOADS = {  # functions of the path of a file that is there if one of them has run
    "os.system": lambda path: Call(os.system, f"touch '{path}'"),
    "eval": lambda path: Call(eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Call(exec, f"open({str(path)!r}, 'w')"),
    "subprocess": lambda path: Call(subprocess.Popen, ["touch", str(path)]),
    "Path.touch": lambda path: Call(Path.touch, Path(path)),
    "open": lambda path: Call(open, str(path), "w"),
    "numpy.save": lambda path: Call(numpy.save, str(path), 0),
    "torch.save": lambda path: Call(torch.save, 0, str(path)),
    "torch.load": lambda path: Call(torch.load, str(path.with_name("evil.pt"))),
    "a partial": lambda path: Call(partial(os.system, f"touch '{path}'").__call__),
    "getattr": lambda path: Call(getattr, Path(path), "touch"),
}


def torch_file(value: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def tar_file(value: object) -> bytes:
    """The oldest format of torch."""
    file, content = io.BytesIO(), pickle.dumps(value, protocol=2)
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_file(
    entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two entries of one name
        for name, content in entries:
            archive.writestr(name, content)
        archive.comment = comment
    return file.getvalue()


def entries_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def with_pickle(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A checkpoint whose pickle is another."""
    return zip_file(
        [(n, change(c) if n.endswith("data.pkl") else c) for n, c in entries_of(content)]
    )


class Storage:
    """What a tensor's numbers are said to be."""

    def __init__(self, key: str = "0", numbers: int = 4, place: str = "cpu"):
        self.identity = ("storage", torch.FloatStorage, key, place, numbers)


class WithStorages(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None


def with_tensor(
    state: dict, storage: Storage, offset: int = 0, shape: tuple = (4,), stride: tuple = (1,)
) -> bytes:
    """A checkpoint with one tensor, put together by hand."""
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Call(rebuild, storage, offset, shape, stride, False, OrderedDict())
    file = io.BytesIO()
    only = {"model": {"embed.weight": tensor}, "optimizer": {}}
    WithStorages(file, protocol=2).dump(state | only)
    parts = {"data.pkl": file.getvalue(), "byteorder": b"little", "data/0": bytes(16)}
    parts["version"] = b"3\n"
    return zip_file([(f"archive/{name}", content) for name, content in parts.items()])


def listed_often(content: bytes, times: int = 3000) -> bytes:
    """A zip whose directory lists the largest entry again and again, all at the same place in the
    file."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * times
        archive._didModify = True
    return file.getvalue()


def two_archives(shown: bytes, hidden: bytes) -> bytes:
    """A file that is one archive by the first of its ends in 64 bits, and another one by that which
    its locator names."""
    end = shown[-98:]
    count, length, start = struct.unpack("<QQQ", end[32:56])
    hidden_count, hidden_length, hidden_start = struct.unpack("<10xHII2x", hidden[-22:])
    numbers = (hidden_count, hidden_count, hidden_length, len(shown) - 98 + hidden_start)
    other = end[:24] + struct.pack("<4Q", *numbers)
    body = shown[:start] + hidden[:-22] + other
    moved = struct.pack("<4Q", count, count, length, len(body))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) - 56, 1)
    last = shown[-22:-6] + struct.pack("<IH", len(body), 0)
    return body + shown[start : start + length] + end[:24] + moved + locator + last


def laughs(depth: int = 30, width: int = 10) -> list:
    """10 ** 30 elements, in a few hundred bytes of a pickle."""
    value = ["ha"]
    for _ in range(depth):
        value = [value] * width
    return value


class Built:
    """An OrderedDict with attributes that hide its methods."""

    def __init__(self, **attributes: object):
        self.attributes = attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes


def config(state: dict, **changes: object) -> dict:
    return state | {"config": state["config"] | changes}


def weight(state: dict, value: object) -> dict:
    return state | {"model": state["model"] | {"embed.weight": value}}


ESCAPES = "\x1b]0;owned\x07\r\nerror: all is well\n\u202e\u009b"
LONG, MANY, HUGE = 10**100_000, 10**12, (10**6, 10**6)
LAUGHING = {"tokenizer_sha256": laughs(), "name": laughs()}
STATES: dict[str, Callable[[dict], Any]] = {  # of a sound state
    "bytearray(10**11)": lambda s: weight(s, Call(bytearray, 10**11)),
    "[0] * 10**11": lambda s: weight(s, Call(list.__mul__, [0], 10**11)),
    "10**10 numbers, all the same one": lambda s: weight(s, torch.zeros(1).expand(10**5, 10**5)),
    "views of one storage": lambda s: (
        s | {"model": dict.fromkeys(map(str, range(9999)), torch.ones(99))}
    ),
    "a sparse tensor": lambda s: weight(s, torch.eye(3).to_sparse()),
    "a meta tensor": lambda s: weight(s, torch.empty(HUGE, device="meta")),
    "a quantized tensor": lambda s: weight(s, Call(torch._utils._rebuild_qtensor, Storage)),
    "a Parameter": lambda s: weight(s, torch.nn.Parameter(torch.zeros(3))),
    "a module": lambda s: weight(s, torch.nn.Linear(2, 2)),
    "10**30 lists in the config": lambda s: config(s, n_layer=laughs()),
    "10**12 letters in the config": lambda s: config(s, n_layer=["x" * 10**6] * 10**6),
    "10**30 lists as weights": lambda s: weight(s, laughs()),
    "10**30 lists as the format": lambda s: s | {"format": laughs()},
    "10**30 lists as the version": lambda s: s | {"format_version": laughs()},
    "10**30 lists in the data": lambda s: s | {"data": LAUGHING},
    "a version of 100,000 digits": lambda s: s | {"format_version": LONG},
    "a step of 100,000 digits": lambda s: s | {"step": LONG},
    "n_layer of 100,000 digits": lambda s: config(s, n_layer=LONG),
    "a model of 10,000 blocks": lambda s: config(s, n_layer=10_000),
    "a model a million wide": lambda s: config(s, n_embd=1_000_000),
    "a model of 10**30 tokens": lambda s: config(s, vocab_size=10**30),
    "a block_size of 100 million": lambda s: config(s, block_size=100_000_000),
    "a config of wrong types": lambda s: config(
        s, n_layer="2", dtype=3, device=[], vocab_size=None
    ),
    "an empty config": lambda s: s | {"config": {}},
    "escapes in the config": lambda s: config(s, n_layer=ESCAPES, norm=ESCAPES, device=ESCAPES),
    "escapes as names": lambda s: s | {"model": {ESCAPES: torch.zeros(3)}},
    "escapes in the data": lambda s: s | {"data": dict.fromkeys(LAUGHING, ESCAPES)},
    "numbers for names": lambda s: s | {"model": {7: torch.zeros(3)}, "optimizer": {8: {9: 1}}},
    "an optimizer whose items() is a text": lambda s: s | {"optimizer": Built(items="x")},
    "data whose values() is a number": lambda s: s | {"data": Built(values=7)},
    "a weight with a gradient": lambda s: weight(s, torch.ones(3).requires_grad_()),
    "texts as gradient norms": lambda s: s | {"grad_norms": [ESCAPES]},
    "texts as a loss scale": lambda s: s | {"scaler": {"scale": ESCAPES}},
    "a context of 10**400 tokens": lambda s: s | {"base": {"context": 10**400}},
    "a best loss that is NaN": lambda s: s | {"best_val_loss": float("nan")},
    "step -1": lambda s: s | {"step": -1},
    "a norm that is none": lambda s: config(s, norm="mine"),
    "other optimizer states": lambda s: config(
        s | {"optimizer": {"norm.gain": {"x": torch.ones(1)}}}, n_layer=3
    ),
}
TENSORS: dict[str, tuple[Storage, dict]] = {  # what with_tensor is given
    "a storage of 10**12 numbers": (Storage(numbers=MANY), {"shape": (MANY,)}),
    "a storage of -1 numbers": (Storage(numbers=-1), {}),
    "a tensor beyond its storage": (Storage(), {"offset": 10**9}),
    "a tensor before its storage": (Storage(), {"offset": -4}),
    "a tensor of negative shape": (Storage(), {"shape": (-4,)}),
    "a tensor with stride 0": (Storage(), {"shape": HUGE, "stride": (0, 0)}),
    "a storage in ../../outside": (Storage("../../../outside/secret.txt"), {}),
    "a storage in /etc/passwd": (Storage("/etc/passwd"), {}),
    "a storage on cuda:99": (Storage(place="cuda:99"), {}),
}
PICKLES: dict[str, Callable[[bytes], bytes]] = {  # of the pickle of a sound checkpoint
    "a pickle of 100 MB": lambda p: p[:2] + b"N0" * 50_000_000 + p[2:],
    "a pickle of 3 million steps": lambda p: p[:2] + b"N0" * 1_500_000 + p[2:],
    "lists 200,000 deep": lambda p: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "tuples 200,000 deep": lambda p: b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "a list that holds itself": lambda p: b"\x80\x02]q\x00h\x00a.",
}
ENTRIES: dict[str, Callable[[list], list]] = {  # of the entries of a sound checkpoint
    "entries named ../../outside": lambda e: [(f"../../outside/{n}", c) for n, c in e],
    "entries named /tmp": lambda e: [(f"/{n}", c) for n, c in e],
    "an entry's name with escapes": lambda e: [*e, (f"archive/{ESCAPES}.pkl", b"\xff")],
    "DATA.PKL": lambda e: [(n.replace("data.pkl", "DATA.PKL"), c) for n, c in e],
    "two pickles": lambda e: [(n, c) for n, c in e for _ in range(1 + n.endswith(".pkl"))],
    "a TorchScript archive": lambda e: [*e, ("archive/constants.pkl", b"\x80\x02).")],
}
ARCHIVES: dict[str, Callable[[bytes], bytes]] = {  # of the whole file of a sound checkpoint
    "a 2-GB tensor, deflated": lambda c: zip_file(
        [*entries_of(c), ("archive/data/99", bytes(300_000_000))], zipfile.ZIP_DEFLATED
    ),
    "one entry listed 3,000 times": listed_often,
    "entries said to have 2**62 bytes": lambda c: (
        c[:-22].replace(struct.pack("<I", 4096), b"\xff\xff\xff\x7f") + c[-22:]
    ),
    "entries that are called folders": lambda c: re.sub(
        rb"(PK\x01\x02.{34})\0", lambda found: found[1] + b"\x10", c, flags=re.DOTALL
    ),
    "another archive, to which only PyTorch goes": lambda c: two_archives(
        c, zip_file([("x", b"")])
    ),
    "another archive in the comment": lambda c: zip_file([("x", b"")], comment=c[-60_000:]),
}
CHECKPOINTS: dict[str, Callable[[dict, bytes], bytes]] = {  # of a sound state and its file
    **{n: lambda s, c, f=f: torch_file(f(s)) for n, f in STATES.items()},
    **{n: lambda s, c, t=t: with_tensor(s, t[0], **t[1]) for n, t in TENSORS.items()},
    **{n: lambda s, c, f=f: with_pickle(c, f) for n, f in PICKLES.items()},
    **{n: lambda s, c, f=f: zip_file(f(entries_of(c))) for n, f in ENTRIES.items()},
    **{n: lambda s, c, f=f: f(c) for n, f in ARCHIVES.items()},
}
INFECTED: dict[str, Callable[[dict, Call], dict]] = {  # of a sound state and a payload
    "a weight": weight,
    "a knob": lambda s, e: config(s, n_layer=e),
    "a name": lambda s, e: s | {"data": {e: 1}},
    "the step": lambda s, e: s | {"step": e},
    "a moment": lambda s, e: s | {"optimizer": {"embed.weight": {"exp_avg": e}}},
}
PRESETS = {  # none of it may run; PATH is that of a file that is there if it has
    "an import": "import os\nos.system('touch PATH')",
    "a call": "n_layer = __import__('os').system('touch PATH')",
    "an f-string": "out_dir = f\"{open('PATH', 'w')}\"",
    "a comprehension": "n_layer = [open('PATH', 'w') for _ in 'a']",
    "a dunder attribute": "n_layer = ().__class__.__base__.__subclasses__()",
    "a lambda": "n_layer = (lambda: open('PATH', 'w'))()",
    "an annotation": "n_layer: open('PATH', 'w') = 2",
    "a default of a function": "def f(x=open('PATH', 'w')): pass",
    "a decorator": "@print\nclass n_layer: x = open('PATH', 'w')",
    "a walrus": "n_layer = (x := open('PATH', 'w'))",
    "a star import": "from os import *",
    "an attribute set": "n_layer.x = 3",
    "9 ** 9 ** 9": "n_layer = 9 ** 9 ** 9",
    "a text times a billion": "out_dir = 'x' * 10 ** 9",
    "a sum of 20,000": "n_layer = " + "+".join("1" * 20_000),
    "9,000 minus signs": "n_layer = " + "-" * 9_000 + "1",
    "60,000 brackets": "n_layer = " + "(" * 60_000,
    "a number of 50,000 digits": "n_layer = 0x" + "f" * 50_000,
    "escapes": "dataset = 'a\\x1b]0;owned\\x07\\n/'",
    "a data set outside": "dataset = '../../outside'",
    "an absolute data set": "dataset = '/etc/passwd'",
}
TIKTOKEN = {
    "kind": "tiktoken",
    "name": "x",
    "pattern": r"\w+|\W",
    "special": {},
    "ranks": {base64.b64encode(bytes([i])).decode(): i for i in range(256)},
}
TOKENIZERS = {  # tokenizer.json: what of TIKTOKEN is otherwise, or all of it
    "an id of 2**40": {"special": {"<|endoftext|>": 2**40}},
    "a negative id": {"special": {"<|endoftext|>": -1}},
    "an id twice": {"special": {"a": 7}},
    "a pattern that never ends": {"pattern": r"(?:(a+)\1?)+$|[^a]"},
    "a pattern that matches nothing": {"pattern": ""},
    "a pattern that leaves out all": {"pattern": "(?!)"},
    "a pattern that is none": {"pattern": "(" * 9999},
    "a pattern of 10**9 states": {"pattern": "((a{1000}){1000}){1000}"},
    "escapes in a kind": {"kind": ESCAPES},
    "chars that are lists": {"kind": "char", "chars": [[[]]]},
    "a million characters": {"kind": "char", "chars": "ab" * 500_000},
    "a name outside": {"kind": "../../outside/secret.txt"},
}
JSON = {  # for any JSON file
    "100 MB": lambda: b'{"kind": "' + b"x" * 100_000_000 + b'"}',
    "100,000 brackets": lambda: b"[" * 100_000,
    "4 million brackets": lambda: b"[" + b"[]," * 2_000_000 + b"[]]",
    "a number of 10,000 digits": lambda: b'{"kind": ' + b"9" * 10_000 + b"}",
    "an empty object": lambda: b"{}",
}
RECORDS = {  # of a .jsonl of ours
    "a number": b"5",
    "null": b"null",
    "100,000 brackets": b"[" * 100_000,
    "an object": b"{}",
    "a number of 10,000 digits": b'{"step": ' + b"9" * 10_000 + b"}",
    "a loss of 400 digits": b'{"step": 1, "loss": ' + b"9" * 400 + b"}",
    "texts as numbers": b'{"step": 1, "loss": "\\u001b[2J", "val_loss": [], "knobs": []}',
}
META = {
    "xz_bits_per_byte": ESCAPES,
    "tokens": {"train": 10**15, "val": 10**15},
    "dtype": "../../outside/secret.bin",
    "vocab_size": 10**30,
    "bos_id": ESCAPES,
    "tokenizer_sha256": ESCAPES,
    "bytes": {"train": "x" * 10**6, "val": []},
}
PROGRESS = {
    "tokens": {"train": 10**15, "val": 0},
    "pieces": -1,
    "dtype": "../x",
    "bytes": None,
    "asked": [],
}
SOUND_PROGRESS = {
    "asked": {"source": "a stream", "choice": "byte", "vocab_size": None},
    "dtype": "uint16",
    "pieces": 0,
    "tokens": {"train": 0, "val": 0},
    "bytes": {"train": 0, "val": 0},
    "val_crc32": 0,
}
MODELS = {  # of SentencePiece
    "random bytes": lambda: random.Random(1).randbytes(99_999),
    "half a model": lambda: sound_model()[:3000],
    "a piece of 2**31 bytes": lambda: b"\n\xff\xff\xff\xff\x07" + sound_model(),
    "a model of 50 MB": lambda: sound_model() * 10_000,
}
ROWS = {  # of a .jsonl
    "100,000 brackets": b"[" * 100_000,
    "a lone surrogate": b'{"text": "\\ud800"}',
    "a text that is a list": b'{"text": ["x"]}',
    "a long number": b'{"text": ' + b"9" * 10_000 + b"}",
}


@cache
def sound_model() -> bytes:
    return train_sentencepiece([PROSE], 400).first.serialized_model_proto()


# How a file is made


def written(content: Callable[[], bytes]) -> Make:
    return lambda scene, path: path.write_bytes(content())


def evil(form: Callable[[Call], bytes], payload: Callable[[Path], Call]) -> Make:
    """A payload in a file of some form."""
    return lambda scene, path: path.write_bytes(form(payload(scene / "outside" / "ran")))


def link_to(target: str) -> Make:
    return lambda scene, path: path.symlink_to(scene / target)


def sound_state(scene: Path) -> tuple[dict, bytes]:
    content = (scene / "sound.pt").read_bytes()
    return torch.load(io.BytesIO(content), weights_only=True), content


def changed(change: Callable[[dict, bytes], bytes], scene: Path, path: Path) -> None:
    path.write_bytes(change(*sound_state(scene)))


def infected(change: Callable[[dict, Call], dict], scene: Path, path: Path) -> None:
    payload = PAYLOADS["os.system"](scene / "outside" / "ran")
    path.write_bytes(torch_file(change(sound_state(scene)[0], payload)))


def preset(text: str, scene: Path, path: Path) -> None:
    path.write_text(text.replace("PATH", str(scene / "outside" / "ran")))


def tokenizer(change: dict, scene: Path, path: Path) -> None:
    """Beside a model that it would fit, and that does not know its own."""
    state = config(sound_state(scene)[0], vocab_size=512)
    fields = {name: state["config"][name] for name in ModelConfig.__dataclass_fields__}
    model = Decoder(ModelConfig(**fields))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    unknown = state | {"model": weights, "data": {"name": "words"}}
    (scene / "run" / "best.pt").write_bytes(torch_file(unknown))
    path.write_text(json.dumps(TIKTOKEN | change))


def meta(field: dict, scene: Path, path: Path) -> None:
    path.write_text(json.dumps(json.loads((scene / "meta.sound").read_text()) | field))


def folder_of_links(scene: Path, path: Path) -> None:
    """Two documents, enough for a data set. Both are links, are left out, and nothing remains."""
    path.mkdir()
    for name in ("notes.txt", "todo.txt"):
        (path / name).symlink_to(scene / "outside" / "secret.txt")


def extension_type(scene: Path, path: Path) -> None:
    """Old versions of pyarrow unpickled the type of a column."""
    import pyarrow
    from pyarrow import parquet

    content = pickle.dumps(PAYLOADS["os.system"](scene / "outside" / "ran"))
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": content}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=about)])
    parquet.write_table(pyarrow.table({"text": [PROSE] * 40}, schema=schema), path)


def torch_checkpoint(payload: Call) -> bytes:
    return torch_file({"format": checkpoint.FORMAT, "x": payload})


def cases() -> list[Case]:
    """All of them. The order mixes the kinds, so that a few are some of each."""
    found = []

    def add(place: str, name: str, make: Make, codes: tuple[int, ...] = ()) -> None:
        where = PLACES[place]
        found.append(Case(f"{name} as {place}", where, make, codes or where.codes))

    system = PAYLOADS["os.system"]
    for place in PLACES:
        add(place, "a pickle", evil(partial(pickle.dumps, protocol=4), system))
        add(place, "a torch file", evil(torch_checkpoint, system))
        add(place, "a link to a secret", link_to("outside/secret.bin"))
        # A preparation without its progress begins anew.
        codes = (0, 2) if place == "progress.json" else ()
        add(place, "a FIFO", lambda scene, path: os.mkfifo(path), codes)
        add(place, "a link to /dev/zero", link_to("/dev/zero"), codes)
        add(place, "a link to itself", lambda scene, path: path.symlink_to(path), codes)

    for name, payload in PAYLOADS.items():
        add("best.pt", f"{name} as torch", evil(torch_file, payload))
    for name, form in {
        "legacy torch file": partial(torch_file, legacy=True),
        "tar": tar_file,
        "plain pickle": partial(pickle.dumps, protocol=0),
    }.items():
        add("a checkpoint", f"a {name} of a payload", evil(form, system))
    for name, change in CHECKPOINTS.items():
        add("best.pt", name, partial(changed, change))
        add("a checkpoint", name, partial(changed, change))
    for name, infect in INFECTED.items():
        add("a checkpoint", f"a payload for {name}", partial(infected, infect))

    for name, text in PRESETS.items():
        add("a preset", name, partial(preset, text))
    add("a preset", "100 MB", written(lambda: b"#" * 100_000_000))
    for name, fields in TOKENIZERS.items():
        add("a run's tokenizer.json", name, partial(tokenizer, fields))
    for place in ("meta.json", "a run's tokenizer.json", "progress.json"):
        for name, content in JSON.items():
            add(place, name, written(content))
    for name, content in RECORDS.items():
        for place in ("results.jsonl", "metrics.jsonl"):
            add(place, name, written(lambda c=content: c + b"\n"))
    for name, value in META.items():
        add("meta.json", f"{name}={value!r:.40}", partial(meta, {name: value}))
    for name, value in PROGRESS.items():
        content = json.dumps(SOUND_PROGRESS | {name: value}).encode()
        add("progress.json", f"{name}={value!r:.40}", written(lambda c=content: c))
    for place in ("a .model", "a run's tokenizer.model"):
        for name, content in MODELS.items():
            add(place, name, written(content))
    for name, row in ROWS.items():
        add("a .jsonl", name, written(lambda row=row: row))

    add("a text", "a folder with a link to a secret", folder_of_links)
    add("a .parquet", "a pickled type of pyarrow", extension_type, (0, 2))
    header = b"PAR1" + bytes(99) + b"\xff" * 4 + b"PAR1"
    add("a .parquet", "a header and no more", written(lambda: header))
    return random.Random(0).sample(found, len(found))


CASES = cases()
fault("hostile files", whole=len(CASES), few=8)(hostile_files)
