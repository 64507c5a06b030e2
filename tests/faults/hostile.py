"""Files made to do harm, at every place where a file is read: nothing in them runs, nothing outside the folder is
touched, memory and time stay bounded, and what is said is one clear line.

Each case is a whole command in a process of its own, where an audit hook notes every attempt to start a program, to
look up a function for a real pickle, to connect, to write outside the folder or to read the secret that lies there.
"""

import base64
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy
import torch

import checkpoint
import data.corpus
import data.prepare
import sample
import train
from data.corpus import Corpus, Piece
from data.tokenizer import PROBE, train_sentencepiece
from model import Decoder, ModelConfig

from .harness import Child, Report, command, fault, run, words

MEMORY = 1_500_000_000  # bytes that a command may take, what it needs for torch included
SECONDS = 10
PROSE = "the cat sat on a mat and saw the rat run to its hole\n" * 200
GIT = ["git", "describe", "--match=", "--always", "--abbrev=40", "--dirty"]  # train.py notes its own version
WATCHED = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen",
           "pickle.find_class", "socket.connect", "socket.getaddrinfo", "webbrowser.open"}


class Call:
    """Unpickled by a real unpickler, it calls the function."""

    def __init__(self, function: Callable, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


PAYLOADS = {  # functions of the path of a file that will be there if one of them has run
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
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_file(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
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


def with_pickle(content: bytes, change: Callable[[bytes], bytes], name: str = "data.pkl") -> bytes:
    """A checkpoint whose pickle is another, perhaps under another name."""
    return zip_file([(n.replace("data.pkl", name), change(c) if n.endswith("data.pkl") else c)
                     for n, c in entries_of(content)])


class Storage:
    """What a tensor's numbers are said to be."""

    def __init__(self, key: str = "0", numbers: int = 4, place: str = "cpu"):
        self.identity = ("storage", torch.FloatStorage, key, place, numbers)


class WithStorages(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None


def with_tensor(state: dict, storage: Storage, offset: int = 0, shape: tuple = (4,), stride: tuple = (1,)) -> bytes:
    """A checkpoint with one tensor, put together by hand."""
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())
    file = io.BytesIO()
    WithStorages(file, protocol=2).dump(state | {"model": {"embed.weight": tensor}, "optimizer": {}})
    return zip_file([("archive/data.pkl", file.getvalue()), ("archive/byteorder", b"little"),
                     ("archive/data/0", bytes(16)), ("archive/version", b"3\n")])


def same_entry_often(content: bytes, times: int = 3000) -> bytes:
    """A zip whose directory lists the largest entry again and again, all at the same place in the file."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * times
        archive._didModify = True
    return file.getvalue()


def laughs(depth: int = 30, width: int = 10) -> list:
    """10 ** 30 elements, in a few hundred bytes of a pickle."""
    value = ["ha"]
    for _ in range(depth):
        value = [value] * width
    return value


def config(state: dict, **changes: object) -> dict:
    return state | {"config": state["config"] | changes}


def weight(state: dict, value: object) -> dict:
    return state | {"model": state["model"] | {"embed.weight": value}}


ESCAPES = "\x1b]0;owned\x07\r\nerror: all is well\n\u202e\u009b"
CHECKPOINTS: dict[str, Callable[[dict, bytes], bytes]] = {  # of a sound state and its file's content
    "a 2-GB tensor, deflated": lambda s, c: zip_file([*entries_of(c), ("archive/data/99", bytes(300_000_000))],
                                                     zipfile.ZIP_DEFLATED),
    "one entry listed 3,000 times": lambda s, c: same_entry_often(c),
    "entries said to have 2**62 bytes": lambda s, c: c[:-22].replace(struct.pack("<I", 4096), b"\xff\xff\xff\x7f")
    + c[-22:],
    "a pickle of 100 MB": lambda s, c: with_pickle(c, lambda p: p[:2] + b"N0" * 50_000_000 + p[2:]),
    "a pickle of 3 million steps": lambda s, c: with_pickle(c, lambda p: p[:2] + b"N0" * 1_500_000 + p[2:]),
    "lists 200,000 deep": lambda s, c: with_pickle(c, lambda p: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
    "tuples 200,000 deep": lambda s, c: with_pickle(c, lambda p: b"\x80\x02)" + b"\x85" * 200_000 + b"."),
    "bytearray(10**11)": lambda s, c: torch_file(weight(s, Call(bytearray, 10**11))),
    "[0] * 10**11": lambda s, c: torch_file(weight(s, Call(list.__mul__, [0], 10**11))),
    "10**10 numbers, all the same one": lambda s, c: torch_file(weight(s, torch.zeros(1).expand(10**5, 10**5))),
    "views of one storage": lambda s, c: torch_file(s | {"model": dict.fromkeys(map(str, range(9999)),
                                                                                  torch.ones(99))}),
    "a sparse tensor": lambda s, c: torch_file(weight(s, torch.eye(3).to_sparse())),
    "a meta tensor": lambda s, c: torch_file(weight(s, torch.empty(10**6, 10**6, device="meta"))),
    "a quantized tensor": lambda s, c: torch_file(weight(s, Call(torch._utils._rebuild_qtensor, Storage))),
    "a Parameter": lambda s, c: torch_file(weight(s, torch.nn.Parameter(torch.zeros(3)))),
    "a module": lambda s, c: torch_file(weight(s, torch.nn.Linear(2, 2))),
    "a storage of 10**12 numbers": lambda s, c: with_tensor(s, Storage(numbers=10**12), shape=(10**12,)),
    "a storage of -1 numbers": lambda s, c: with_tensor(s, Storage(numbers=-1)),
    "a tensor beyond its storage": lambda s, c: with_tensor(s, Storage(), offset=10**9),
    "a tensor before its storage": lambda s, c: with_tensor(s, Storage(), offset=-4),
    "a tensor of negative shape": lambda s, c: with_tensor(s, Storage(), shape=(-4,)),
    "a tensor with stride 0": lambda s, c: with_tensor(s, Storage(), shape=(10**6, 10**6), stride=(0, 0)),
    "a storage in ../../outside": lambda s, c: with_tensor(s, Storage("../../../outside/secret.txt")),
    "a storage in /etc/passwd": lambda s, c: with_tensor(s, Storage("/etc/passwd")),
    "a storage on cuda:99": lambda s, c: with_tensor(s, Storage(place="cuda:99")),
    "entries named ../../outside": lambda s, c: zip_file([(f"../../outside/{n}", e) for n, e in entries_of(c)]),
    "entries named /tmp": lambda s, c: zip_file([(f"/{n}", e) for n, e in entries_of(c)]),
    "an entry's name with escapes": lambda s, c: zip_file([*entries_of(c), (f"archive/{ESCAPES}.pkl", b"\xff")]),
    "DATA.PKL": lambda s, c: with_pickle(c, lambda p: p, "DATA.PKL"),
    "two pickles": lambda s, c: zip_file([(n, e) for n, e in entries_of(c) for _ in range(1 + n.endswith(".pkl"))]),
    "a TorchScript archive": lambda s, c: zip_file([*entries_of(c), ("archive/constants.pkl", b"\x80\x02).")]),
    "another archive in the comment": lambda s, c: zip_file([("x", b"")], comment=c[-60_000:]),
    "10**30 lists in the config": lambda s, c: torch_file(config(s, n_layer=laughs())),
    "10**12 letters in the config": lambda s, c: torch_file(config(s, n_layer=["x" * 10**6] * 10**6)),
    "10**30 lists as weights": lambda s, c: torch_file(weight(s, laughs())),
    "10**30 lists as the format": lambda s, c: torch_file(s | {"format": laughs()}),
    "10**30 lists as the version": lambda s, c: torch_file(s | {"format_version": laughs()}),
    "10**30 lists in the data": lambda s, c: torch_file(s | {"data": {"tokenizer_sha256": laughs(), "name": laughs()}}),
    "a list that holds itself": lambda s, c: with_pickle(c, lambda p: b"\x80\x02]q\x00h\x00a."),
    "a version of 100,000 digits": lambda s, c: torch_file(s | {"format_version": 10**100_000}),
    "a step of 100,000 digits": lambda s, c: torch_file(s | {"step": 10**100_000}),
    "n_layer of 100,000 digits": lambda s, c: torch_file(config(s, n_layer=10**100_000)),
    "a model of 10,000 blocks": lambda s, c: torch_file(config(s, n_layer=10_000)),
    "a model a million wide": lambda s, c: torch_file(config(s, n_embd=1_000_000)),
    "a model of 10**30 tokens": lambda s, c: torch_file(config(s, vocab_size=10**30)),
    "a block_size of 100 million": lambda s, c: torch_file(config(s, block_size=100_000_000)),
    "a config of wrong types": lambda s, c: torch_file(config(s, n_layer="2", dtype=3, device=[], vocab_size=None)),
    "an empty config": lambda s, c: torch_file(s | {"config": {}}),
    "escapes in the config": lambda s, c: torch_file(config(s, n_layer=ESCAPES, norm=ESCAPES, device=ESCAPES)),
    "escapes as names": lambda s, c: torch_file(s | {"model": {ESCAPES: torch.zeros(3)}}),
    "escapes in the data": lambda s, c: torch_file(s | {"data": {"name": ESCAPES, "tokenizer_sha256": ESCAPES}}),
    "numbers for names": lambda s, c: torch_file(s | {"model": {7: torch.zeros(3)}, "optimizer": {8: {9: 1}}}),
    "other optimizer states": lambda s, c: torch_file(config(s | {"optimizer": {"norm.gain": {"x": torch.ones(1)}}},
                                                             n_layer=3)),
}
PRESETS = {  # nothing of them is run
    "an import": "import os\nos.system('touch {path}')",
    "a call": "n_layer = __import__('os').system('touch {path}')",
    "an f-string": "out_dir = f\"{{open('{path}', 'w')}}\"",
    "a comprehension": "n_layer = [open('{path}', 'w') for _ in 'a']",
    "a dunder attribute": "n_layer = ().__class__.__base__.__subclasses__()",
    "a lambda": "n_layer = (lambda: open('{path}', 'w'))()",
    "an annotation": "n_layer: open('{path}', 'w') = 2",
    "a default of a function": "def f(x=open('{path}', 'w')): pass",
    "a decorator": "@print\nclass n_layer: x = open('{path}', 'w')",
    "a walrus": "n_layer = (x := open('{path}', 'w'))",
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
TIKTOKEN = {"kind": "tiktoken", "name": "x", "pattern": r"\w+|\W", "special": {},
            "ranks": {base64.b64encode(bytes([i])).decode(): i for i in range(256)}}
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


@dataclass
class Case:
    """A file at a place of a scene, made by make(scene, path), and the command that reads it."""

    name: str
    path: str  # below the scene
    program: str
    arguments: Callable[[Path], list[str]]
    make: Callable[[Path, Path], None]
    codes: tuple = (2,)
    clears: list[str] = field(default_factory=list)  # what must go, so that the command gets to it


def written(content: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    """A make() that writes content(path of the sentinel)."""
    return lambda scene, path: path.write_bytes(content(scene / "outside" / "ran"))


def link_to(target: str) -> Callable[[Path, Path], None]:
    return lambda scene, path: path.symlink_to(scene / target)


def train_in(scene: Path) -> list[str]:
    return command(scene / "run", resume="auto", max_iters=13)


def train_afresh(scene: Path) -> list[str]:
    return command(scene / "fresh")


def with_preset(scene: Path) -> list[str]:
    return [str(scene / "mine.py"), f"out_dir={scene / 'fresh'}"]


def sampling(which: str, prompt: str = "the") -> Callable[[Path], list[str]]:
    return lambda scene: [str(scene / "run"), f"checkpoint={which}", f"prompt={prompt.format(scene=scene)}",
                          "max_new_tokens=2", "device=cpu"]


def preparing(source: str, *options: str) -> Callable[[Path], list[str]]:
    return lambda scene: [str(scene / source), "name=made", *(option.format(scene=scene) for option in options)]


PLACES = {  # where a file is read: (its path, the program and its arguments, exit codes, what must go before)
    "a checkpoint": ("run/ckpt_00000012.pt", "train", train_in, (2,), []),
    "a checkpoint to sample": ("run/ckpt_00000012.pt", "sample", sampling("latest"), (2,), []),
    "best.pt": ("run/best.pt", "sample", sampling("best"), (2,), []),
    "metrics.jsonl": ("run/metrics.jsonl", "train", train_in, (0, 2), []),  # not needed to go on
    "config.json": ("run/config.json", "train", train_in, (0, 2), []),  # written, never read
    "a run's tokenizer.json": ("run/tokenizer.json", "sample", sampling("best"), (2,), []),
    "a run's tokenizer.model": ("run/tokenizer.model", "sample", sampling("best"), (2,), ["run/tokenizer.json"]),
    "a prompt": ("prompt.txt", "sample", sampling("best", "FILE:{scene}/prompt.txt"), (2,), []),
    "meta.json": ("data/words/meta.json", "train", train_afresh, (2,), []),
    "train.bin": ("data/words/train.bin", "train", train_afresh, (2,), []),
    "val.bin": ("data/words/val.bin", "train", train_afresh, (2,), []),
    "a data set's tokenizer.json": ("data/words/tokenizer.json", "train", train_afresh, (2,), []),
    "a preset": ("mine.py", "train", with_preset, (2,), []),
    "a text": ("mine.txt", "prepare", preparing("mine.txt", "tokenizer=byte"), (2,), []),
    "a .jsonl": ("mine.jsonl", "prepare", preparing("mine.jsonl", "tokenizer=byte"), (2,), []),
    "a .parquet": ("mine.parquet", "prepare", preparing("mine.parquet", "tokenizer=byte"), (2,), []),
    "a .model": ("mine.model", "prepare", preparing("prose.txt", "tokenizer={scene}/mine.model"), (2,), []),
    "progress.json": ("data/.made.partial/progress.json", "prepare",
                      lambda scene: ["a-stream", "name=made", "tokenizer=byte"], (2,), []),
}


def at(place: str, name: str, make: Callable[[Path, Path], None], codes: tuple = ()) -> Case:
    path, program, arguments, usual, clears = PLACES[place]
    return Case(f"{name} as {place}", path, program, arguments, make, codes or usual, clears)


def cases() -> list[Case]:
    """All of them; the order mixes the kinds, so that a few are some of each."""
    evil = PAYLOADS["os.system"]
    found = [at(place, name, make) for place in PLACES for name, make in {
        "a pickle": written(lambda path: pickle.dumps(evil(path), protocol=4)),
        "a torch file": written(lambda path: torch_file({"format": checkpoint.FORMAT, "x": evil(path)})),
        "a link to a secret": link_to("outside/secret.bin")}.items()]
    found += [at(place, name, make, (0, 2) if place == "progress.json" else ())  # it has no progress then, and begins
              for place in PLACES for name, make in {
        "a FIFO": lambda scene, path: os.mkfifo(path),
        "a link to /dev/zero": link_to("/dev/zero"),
        "a link to itself": lambda scene, path: path.symlink_to(path)}.items()]
    found += [at("best.pt", f"{name} as {kind}", written(lambda path, p=payload, f=form: f(p(path))))
              for name, payload in PAYLOADS.items() for kind, form in (("torch", torch_file),)]
    found += [at("a checkpoint", f"a {kind} of a payload", written(lambda path, f=form: f(evil(path))))
              for kind, form in (("legacy torch file", partial(torch_file, legacy=True)), ("tar", tar_file),
                                 ("plain pickle", partial(pickle.dumps, protocol=0)))]
    for name, change in CHECKPOINTS.items():
        found += [at(place, name, partial(changed, change)) for place in ("best.pt", "a checkpoint")]
    for name, change in {"a weight": weight, "a knob": lambda s, e: config(s, n_layer=e),
                         "a name": lambda s, e: s | {"data": {e: 1}}, "the step": lambda s, e: s | {"step": e},
                         "a moment": lambda s, e: s | {"optimizer": {"embed.weight": {"exp_avg": e}}}}.items():
        found.append(at("a checkpoint", f"a payload for {name}", partial(infected, change)))
    found += [at("a preset", name, written(lambda path, t=text: t.replace("{path}", str(path)).replace(
        "{{", "{").replace("}}", "}").encode())) for name, text in PRESETS.items()]
    found += [at("a preset", "100 MB", written(lambda path: b"#" * 100_000_000))]
    found += [at("a run's tokenizer.json", name, partial(tokenizer, change)) for name, change in TOKENIZERS.items()]
    found += [at(place, name, written(content)) for place in ("meta.json", "a run's tokenizer.json", "progress.json")
              for name, content in {"100 MB": lambda path: b'{"kind": "' + b"x" * 100_000_000 + b'"}',
                                    "100,000 brackets": lambda path: b"[" * 100_000,
                                    "4 million brackets": lambda path: b"[" + b"[]," * 2_000_000 + b"[]]",
                                    "a number of 10,000 digits": lambda path: b'{"kind": ' + b"9" * 10_000 + b"}",
                                    "an empty object": lambda path: b"{}"}.items()]
    found += [at("meta.json", f"{name}={value!r:.40}", partial(meta, name, value)) for name, value in {
        "tokens": {"train": 10**15, "val": 10**15}, "dtype": "../../outside/secret.bin", "vocab_size": 10**30,
        "bos_id": ESCAPES, "tokenizer_sha256": ESCAPES, "bytes": {"train": "x" * 10**6, "val": []}}.items()]
    found += [at("progress.json", f"{name}={value!r:.40}", partial(progress, name, value)) for name, value in {
        "tokens": {"train": 10**15, "val": 0}, "pieces": -1, "dtype": "../x", "bytes": None, "asked": []}.items()]
    found += [at(place, name, written(content)) for place in ("a .model", "a run's tokenizer.model")
              for name, content in {
        "random bytes": lambda path: random.Random(1).randbytes(99_999),
        "half a model": lambda path: sound_model()[:3000],
        "a piece of 2**31 bytes": lambda path: b"\n\xff\xff\xff\xff\x07" + sound_model(),
        "a model of 50 MB": lambda path: sound_model() * 10_000}.items()]
    found += [at("a .jsonl", name, written(lambda path, c=content: c)) for name, content in {
        "100,000 brackets": b"[" * 100_000, "a lone surrogate": b'{"text": "\\ud800"}',
        "a text that is a list": b'{"text": ["x"]}',
        "a long number": b'{"text": ' + b"9" * 10_000 + b"}"}.items()]
    found += [at("a text", "a folder with a link to a secret", folder_of_links),
              at("a .parquet", "a pickled type of pyarrow", extension_type, (0, 2)),
              at("a .parquet", "a header and no more",
                 written(lambda path: b"PAR1" + bytes(99) + b"\xff" * 4 + b"PAR1"))]
    return random.Random(0).sample(found, len(found))


def sound_state(scene: Path) -> tuple[dict, bytes]:
    content = (scene / "sound.pt").read_bytes()
    return torch.load(io.BytesIO(content), weights_only=True), content


def changed(change: Callable[[dict, bytes], bytes], scene: Path, path: Path) -> None:
    path.write_bytes(change(*sound_state(scene)))


def infected(change: Callable[[dict, object], dict], scene: Path, path: Path) -> None:
    path.write_bytes(torch_file(change(sound_state(scene)[0], PAYLOADS["os.system"](scene / "outside" / "ran"))))


def tokenizer(change: dict, scene: Path, path: Path) -> None:
    """Beside a model that it would fit, and that does not know its own."""
    state = config(sound_state(scene)[0], vocab_size=512)
    model = Decoder(ModelConfig(**{name: state["config"][name] for name in ModelConfig.__dataclass_fields__}))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    (scene / "run" / "best.pt").write_bytes(torch_file(state | {"model": weights, "data": {"name": "words"}}))
    path.write_text(json.dumps(TIKTOKEN | change))


def meta(name: str, value: object, scene: Path, path: Path) -> None:
    path.write_text(json.dumps(json.loads((scene / "meta.sound").read_text()) | {name: value}))


def progress(name: str, value: object, scene: Path, path: Path) -> None:
    sound = {"asked": {"source": "a stream", "choice": "byte", "vocab_size": None}, "dtype": "uint16", "pieces": 0,
             "tokens": {"train": 0, "val": 0}, "bytes": {"train": 0, "val": 0}, "val_crc32": 0}
    path.write_text(json.dumps(sound | {name: value}))


def folder_of_links(scene: Path, path: Path) -> None:
    """Two documents, enough for a data set; both are links, are left out, and nothing remains."""
    path.mkdir()
    for name in ("notes.txt", "todo.txt"):
        (path / name).symlink_to(scene / "outside" / "secret.txt")


def extension_type(scene: Path, path: Path) -> None:
    """Old versions of pyarrow unpickled the type of a column."""
    import pyarrow
    from pyarrow import parquet

    evil = pickle.dumps(PAYLOADS["os.system"](scene / "outside" / "ran"))
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=about)])
    parquet.write_table(pyarrow.table({"text": [PROSE] * 40}, schema=schema), path)


def sound_model(made: list = []) -> bytes:  # noqa: B006, made once
    if not made:
        made.append(train_sentencepiece([PROSE], 400).first.serialized_model_proto())
    return made[0]


def stage(case: Case, whole: Path, source: Path, scene: Path) -> None:
    """A folder with a run, a data set, a text, what is outside of them, and the hostile file."""
    shutil.copytree(whole, scene / "run")
    shutil.copytree(source, scene / "data" / "words")
    (scene / "data" / ".made.partial").mkdir()
    for split in ("train", "val"):
        (scene / "data" / ".made.partial" / f"{split}.bin").touch()
    (scene / "prose.txt").write_text(PROSE)
    shutil.copy(scene / "run" / "ckpt_00000012.pt", scene / "sound.pt")
    shutil.copy(scene / "data" / "words" / "meta.json", scene / "meta.sound")
    (scene / "outside").mkdir()
    (scene / "outside" / "secret.txt").write_text("the secret\n" * 99)
    (scene / "outside" / "secret.bin").write_bytes(b"\xff the secret\n" * 99)
    (scene / "outside" / "evil.pt").write_bytes(pickle.dumps(PAYLOADS["os.system"](scene / "outside" / "ran")))
    for name in (case.path, *case.clears):
        (scene / name).unlink(missing_ok=True)
    case.make(scene, scene / case.path)


def guarded(program: str, arguments: list[str], scene: Path) -> None:
    """In the child: instead of a plain train.main, the program, watched and with a limit on its memory."""
    notes = os.open(scene / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(scene / "stderr", os.O_WRONLY | os.O_CREAT), 2)

    def watch(event: str, details: tuple) -> None:
        if event == "open" and isinstance(details[0], (str, bytes)):
            path, writes = os.path.abspath(os.fsdecode(details[0])), (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            secret = path.startswith(str(scene / "outside"))
            if secret or (writes and not path.startswith((str(scene), "/dev/null")) and "__pycache__" not in path):
                os.write(notes, f"open {path}\n".encode())
        elif event in WATCHED and not (event == "subprocess.Popen" and (PROBE in details[1] or details[1] == GIT)):
            os.write(notes, f"{event} {details}"[:300].encode() + b"\n")

    if program == "prepare":
        data.prepare.__file__ = str(scene / "data" / "prepare.py")
        data.corpus.NAMED["a-stream"] = lambda: Corpus("s", "a stream", lambda: (
            Piece(split, True, PROSE) for split in ("train", "val")), stream=True)
    used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * MEMORY,) * 2)
    sys.addaudithook(watch)
    try:
        sys.exit({"train": train.main, "sample": sample.main, "prepare": data.prepare.main}[program](arguments))
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        if used.ru_maxrss * 1024 > MEMORY or used.ru_utime + used.ru_stime > SECONDS:
            os.write(notes, f"{used.ru_maxrss >> 10:,} MB, {used.ru_utime + used.ru_stime:.0f} s".encode())


def outside(scene: Path) -> list[tuple[str, bytes]]:
    return sorted((path.name, path.read_bytes()) for path in (scene / "outside").iterdir())


def judged(case: Case, scene: Path) -> str:
    """What was wrong with a case, as a failure."""
    arguments, before = case.arguments(scene), outside(scene)
    child = Child(command(scene / "run"), scene / "data", partial(guarded, case.program, arguments, scene),
                  output=scene / "stdout")
    try:
        code = child.wait(60)
    except TimeoutError:
        return "it hangs"
    notes, lines = (scene / "notes").read_text(), (scene / "stderr").read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if outside(scene) != before or notes:
        return f"it did what it must not: {notes[:500] or 'outside has changed'}"
    if code not in case.codes:
        return f"exit code {code}: {' '.join(lines)[-500:] or child.text()[-300:]}"
    if len(errors) != (code == 2) or not all(line.startswith(("error: ", "warning: ")) for line in lines):
        return f"not one clear line: {lines!r:.700}"
    long = [line for line in lines if len(line) > 2000 or not line.isprintable()]
    return f"a long line, or one with control characters: {long[0]!r:.300}" if long else ""


CASES = cases()


@fault("hostile files", whole=len(CASES), few=14)
def hostile_files(tries: int, folder: Path) -> Report:
    source, report = words(folder) / "words", Report()
    code, text = run(command(folder / "whole", keep=1), source.parent)
    assert code == 0, text
    for i, case in enumerate(CASES[:tries]):
        scene = folder / f"scene{i}"
        stage(case, folder / "whole", source, scene)
        failure = judged(case, scene)
        report.count(f"{case.name}: {failure}" if failure else "")
        shutil.rmtree(scene)
    report.note = f"{len(PLACES)} places where a file is read, {len(PAYLOADS)} ways to run code, none ran"
    return report
