"""Text to data/<name>/: train.bin, val.bin, the tokenizer's file and meta.json.

    python data/prepare.py python                     the standard library of the Python that runs: no download
    python data/prepare.py shakespeare                1 MB, downloaded
    python data/prepare.py tinystories | fineweb-edu  streamed from Hugging Face; run again to go on after a stop
    python data/prepare.py FILE-OR-FOLDER...          your own text, .jsonl ('text' field) or .parquet ('text' column)

    tokenizer=sentencepiece | byte | char | tiktoken:gpt2 | PATH.model    sentencepiece is trained on the train split
    tokenizer=FOLDER      that of a run, of a data set or of Hugging Face weights, to train these on
    vocab_size=4096       of a sentencepiece tokenizer that is trained here
    name=NAME             of the folder; default: the name of the source
"""

import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

if not __package__:  # run as a script: import from the repository's root, not from data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data import PART, checksum
from data.corpus import CHUNK, Corpus, Piece, open_corpus
from data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    read_sentencepiece,
    tokenizer_sha256,
    train_sentencepiece,
)

SPLITS = ("train", "val")
SAMPLE = 8_000_000  # characters of the train split that a SentencePiece tokenizer is trained on, at most
FIRST = 20_000  # documents of a stream that the sample is taken from
XZ_LIMIT = 16_000_000  # bytes of validation text that are also given to xz, at about 1 MB/s
COMMIT = 64_000_000  # bytes of text between two points from which a stopped stream can go on


def spread_sample(texts: Iterable[str], limit: int, block: int = 2**14) -> list[str]:
    """Between half of limit and limit characters (or all, if fewer), in blocks spread evenly over the texts."""
    kept, size, stride, count = [], 0, 1, 0
    for text in texts:
        for at in range(0, len(text), block):
            if count % stride == 0:
                kept.append(text[at:at + block])
                size += len(kept[-1])
                if size > limit:  # keep every second one, from now on too
                    kept, stride = kept[::2], stride * 2
                    size = sum(map(len, kept))
            count += 1
    return kept


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A SentencePiece tokenizer of the train split of the corpus, or of a stream's beginning."""
    print(f"training a tokenizer of {vocab_size} pieces ...", flush=True)
    with closing(corpus.pieces()) as pieces:
        used = islice(pieces, FIRST) if corpus.stream else pieces
        sample = spread_sample((piece.text for piece in used if piece.split == "train"), SAMPLE)
    if not sample:
        raise ValueError(f"{corpus.source}: too little text, none is left for train; give more")
    tokenizer = train_sentencepiece(sample, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        print(f"the text is too small for {vocab_size} pieces: the tokenizer has {tokenizer.vocab_size}")
    return tokenizer


def char_tokenizer(corpus: Corpus) -> Tokenizer:
    """The characters of the whole text."""
    if corpus.stream:
        raise ValueError(f"tokenizer=char needs all of the text first, {corpus.name} is a stream; take tokenizer=byte")
    chars: set[str] = set()
    for piece in corpus.pieces():
        chars.update(piece.text)
    return CharTokenizer(chars)


def make_tokenizer(choice: str, vocab_size: int | None, corpus: Corpus) -> Tokenizer:
    """The tokenizer that `tokenizer=choice` names."""
    if vocab_size is not None and choice != "sentencepiece":
        raise ValueError(f"vocab_size={vocab_size} is for tokenizer=sentencepiece; tokenizer={choice} has its own size")
    makers = {"byte": ByteTokenizer, "char": lambda: char_tokenizer(corpus),
              "sentencepiece": lambda: train_tokenizer(corpus, 4096 if vocab_size is None else vocab_size)}
    if choice in makers:
        return makers[choice]()
    if choice.startswith("tiktoken:"):
        return named_tiktoken(choice.removeprefix("tiktoken:"))
    if choice and Path(choice).is_dir():
        return load_tokenizer(choice)
    if choice.endswith(".model"):
        return read_sentencepiece(choice)
    raise ValueError(f"tokenizer={choice} is unknown; choose from {', '.join(makers)}, tiktoken:NAME, PATH.model, "
                     "FOLDER")


def named_tiktoken(name: str) -> TiktokenTokenizer:
    """One of tiktoken's encodings by name; fetched from the network unless tiktoken has it in its cache."""
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"tokenizer=tiktoken:{name} is unknown; choose from {', '.join(sorted(names))}")
    try:
        return TiktokenTokenizer(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise OSError(f"tiktoken:{name} could not be fetched ({reason}); go online once, or use another tokenizer") \
            from None


def encode(tokenizer: Tokenizer, dtype: str, task: list[Piece]) -> dict[str, bytes]:
    """The ids of a task's pieces as the bytes of each split's .bin file."""
    ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    for piece in task:
        if piece.start and tokenizer.bos_id is not None:
            ids[piece.split].append(tokenizer.bos_id)
        ids[piece.split] += tokenizer.encode(piece.text, start=piece.start)
    return {split: np.array(ids[split], dtype=np.dtype(dtype).newbyteorder("<")).tobytes() for split in ids}


def tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of about CHUNK characters, so that short documents too make work worth handing out."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def in_order(function: Callable, items: Iterable) -> Iterator[tuple]:
    """(item, function(item)) in the order of items, computed by threads, with few items held at once.

    Threads, not processes: sentencepiece and tiktoken let go of Python's lock while they encode.
    """
    workers = min(os.cpu_count() or 1, 16)
    pool = ThreadPoolExecutor(workers)
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit(folder: Path, progress: dict) -> None:
    """Notes how far the .bin files, which are on the disk by then, are good."""
    for split in SPLITS:
        sync(folder / f"{split}.bin")
    (folder / "progress.new").write_text(json.dumps(progress), encoding="utf-8")
    sync(folder / "progress.new")
    os.replace(folder / "progress.new", folder / "progress.json")


def write_tokens(folder: Path, corpus: Corpus, tokenizer: Tokenizer, progress: dict) -> None:
    """Appends the corpus, from piece number progress['pieces'] on, to the .bin files, and keeps count in progress."""
    itemsize, committed = np.dtype(progress["dtype"]).itemsize, sum(progress["bytes"].values())
    for split in SPLITS:
        with open(folder / f"{split}.bin", "ab") as file:
            file.truncate(progress["tokens"][split] * itemsize)  # what came after the last commit is done again
    with (closing(corpus.pieces()) as pieces,
          open(folder / "train.bin", "ab") as train, open(folder / "val.bin", "ab") as val,
          tqdm(desc=corpus.name, total=corpus.size, unit="B", unit_scale=True, disable=None) as bar):
        todo = tasks(islice(pieces, progress["pieces"], None))
        for task, encoded in in_order(lambda task: encode(tokenizer, progress["dtype"], task), todo):
            for split, file in zip(SPLITS, (train, val), strict=True):
                file.write(encoded[split])
                file.flush()
                text = "".join(piece.text for piece in task if piece.split == split).encode()
                progress["tokens"][split] += len(encoded[split]) // itemsize
                progress["bytes"][split] += len(text)
                if split == "val":
                    progress["val_crc32"] = zlib.crc32(text, progress["val_crc32"])
                bar.update(len(text))
            progress["pieces"] += len(task)
            if corpus.stream and sum(progress["bytes"].values()) - committed >= COMMIT:
                committed = sum(progress["bytes"].values())
                commit(folder, progress)


def blocks(path: Path, size: int = 2**22) -> Iterator[bytes]:
    """The content of a file, `size` bytes at once."""
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


def val_text(folder: Path, tokenizer: Tokenizer, progress: dict) -> Iterator[bytes]:
    """The validation text, decoded from val.bin, in chunks; ValueError if it is not the text that went in."""
    crc = 0
    for ids in blocks(folder / "val.bin"):
        text = tokenizer.decode_bytes(np.frombuffer(ids, progress["dtype"]).tolist())
        crc = zlib.crc32(text, crc)
        yield text
    if crc != progress["val_crc32"]:
        raise ValueError("val.bin does not decode to the text it was made from; please report this as a bug")


def xz_bits_per_byte(text: Iterable[bytes]) -> float | None:
    """What `xz -9e` makes of the text, the yardstick for a model's bits per byte; None above XZ_LIMIT, it is slow."""
    compressor, size, compressed = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME), 0, 0
    for chunk in text:
        size += len(chunk)
        compressed += len(compressor.compress(chunk)) if size <= XZ_LIMIT else 0
    return 8 * (compressed + len(compressor.flush())) / size if 0 < size <= XZ_LIMIT else None


def describe(folder: Path, corpus: Corpus, tokenizer: Tokenizer, progress: dict) -> dict:
    """The content of meta.json."""
    content, part = hashlib.sha256(), PART * np.dtype(progress["dtype"]).itemsize
    checksums: dict[str, list[int]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for block in blocks(folder / f"{split}.bin", part):
            content.update(block)
            checksums[split].append(zlib.crc32(block))
    return {"format_version": 1, "dtype": progress["dtype"], "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id, "tokens": progress["tokens"], "bytes": progress["bytes"],
            "tokenizer": tokenizer.kind, "tokenizer_sha256": tokenizer_sha256(folder), "source": corpus.source,
            "content_sha256": content.hexdigest(), "crc32": checksums}


def read_progress(folder: Path) -> dict:
    """How far a stopped preparation has come. ValueError if that cannot be true of the files that it has left."""
    path = folder / "progress.json"
    try:
        progress = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 100_000 else {}
        itemsize = {"uint16": 2, "uint32": 4}[progress["dtype"]]
        counts = [progress[name] for name in ("pieces", "val_crc32")]
        counts += [progress[name][split] for name in ("tokens", "bytes") for split in SPLITS]
        if not (isinstance(progress["asked"], dict) and all(type(count) is int and count >= 0 for count in counts)):
            raise ValueError
        if any((folder / f"{s}.bin").stat().st_size < progress["tokens"][s] * itemsize for s in SPLITS):
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged, or does not belong to its .bin files; delete {folder}") from None
    return progress


def start(folder: Path, corpus: Corpus, choice: str, vocab_size: int | None) -> tuple[Tokenizer, dict]:
    """The tokenizer, saved in the folder, and the progress: none, or that of a stream which was stopped."""
    asked = {"source": corpus.source, "choice": choice, "vocab_size": vocab_size}
    if (folder / "progress.json").is_file():
        progress = read_progress(folder)
        if progress["asked"] != asked:
            raise ValueError(f"{folder}: a preparation with other settings stopped there; delete it, or repeat those")
        print(f"going on after {progress['pieces']:,} documents")
        return load_tokenizer(folder), progress
    tokenizer = make_tokenizer(choice, vocab_size, corpus)
    tokenizer.save(folder)
    return tokenizer, {"asked": asked, "dtype": "uint16" if tokenizer.vocab_size < 2**16 else "uint32", "pieces": 0,
                       "tokens": dict.fromkeys(SPLITS, 0), "bytes": dict.fromkeys(SPLITS, 0), "val_crc32": 0}


@contextmanager
def workshop(out: Path, stream: bool) -> Iterator[Path]:
    """A folder beside out to build in. If the work fails it is deleted, unless a stream has committed something."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if stream:
        folder = out.parent / f".{out.name}.partial"
        folder.mkdir(exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        folder.chmod(0o755)  # mkdtemp's own is for this user only
    try:
        yield folder
    finally:
        if folder.exists() and not (folder / "progress.json").exists():
            shutil.rmtree(folder)


def prepare(sources: list[str] | Corpus, out: str | Path, tokenizer: str | None = None,
            vocab_size: int | None = None) -> dict:
    """Makes the data set folder `out` from the sources (words as on the command line) and returns its meta.json.

    tokenizer: None is the source's own default. Raises ValueError or OSError, in one line, and then there is no `out`.
    """
    out, begin = Path(out), time.monotonic()
    if out.exists():
        raise ValueError(f"{out}: exists already; delete it, or choose another name with name=")
    corpus = sources if isinstance(sources, Corpus) else open_corpus(sources)
    with workshop(out, corpus.stream) as folder:
        made, progress = start(folder, corpus, corpus.tokenizer if tokenizer is None else tokenizer, vocab_size)
        write_tokens(folder, corpus, made, progress)
        for split in SPLITS:
            if not progress["bytes"][split]:
                raise ValueError(f"{corpus.source}: too little text, none is left for {split}; give more")
        meta = describe(folder, corpus, made, progress)
        meta["val_xz_bits_per_byte"] = xz_bits_per_byte(val_text(folder, made, progress)) if made.exact else None
        meta["checksum"] = checksum(meta)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        (folder / "progress.json").unlink(missing_ok=True)
        for path in [*folder.iterdir(), folder]:
            sync(path)
        os.rename(folder, out)
        sync(out.parent)
    report(out, meta, time.monotonic() - begin)
    return meta


def report(out: Path, meta: dict, seconds: float) -> None:
    """Prints what was made, and how fast."""
    tokens, size = (sum(meta[key].values()) for key in ("tokens", "bytes"))
    print(f"{out}: {meta['source']}, {size / 1e6:.2f} MB -> {meta['tokens']['train']:,} train and "
          f"{meta['tokens']['val']:,} val tokens, vocabulary {meta['vocab_size']:,} ({meta['tokenizer']}), "
          f"{size / tokens:.2f} bytes/token; {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")


OPTIONS = ("tokenizer", "vocab_size", "name")


def parse(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Splits the command line into sources and options."""
    options, sources = {}, []
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals or Path(word).exists():
            sources.append(word)
        elif key not in OPTIONS:
            raise ValueError(f"unknown option {key!r}; choose from {', '.join(OPTIONS)}")
        else:
            options[key] = value
    if not sources:
        raise ValueError("no source given; try: python data/prepare.py python (or --help)")
    return sources, options


def run(argv: list[str]) -> None:
    """The command: parse, check the options, prepare."""
    sources, options = parse(argv)
    if len(sources) > 1 and "name" not in options:
        raise ValueError(f"{len(sources)} sources are one data set; give it a name=")
    size = options.get("vocab_size")
    if size is not None and not re.fullmatch("[0-9]{1,7}", size):
        raise ValueError(f"vocab_size={size}: expected a whole number, below ten million")
    corpus = open_corpus(sources)
    name = options.get("name", corpus.name)
    if name != Path(name).name or name.startswith(".") or not name or "\\" in name:
        raise ValueError(f"name={name!r} must be a bare folder name, without slashes and not starting with a dot")
    prepare(corpus, Path(__file__).resolve().parent / name, options.get("tokenizer"), size and int(size))


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 the user's error, 130 and 143 stopped by Ctrl-C and SIGTERM."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        run(argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # on one line of bounded length, and nothing in it that a terminal obeys
        text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
        print(f"error: {text:.1500}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-made folders are cleaned up
    sys.exit(main(sys.argv[1:]))
