"""Text to data/<name>/: train.bin, val.bin, the tokenizer's file and meta.json."""

import hashlib
import json
import lzma
import os
import re
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run as a script: import from the repository's root, not from data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import numpy as np
import tiktoken
from tqdm import tqdm

from config.command import (
    expand_home,
    one_line,
    run_command,
    split_arguments,
    user_errors,
    warn,
)
from data import DATA, PART_TOKENS, SPLITS, checksum, places_file
from data.corpus import CHUNK, Corpus, Piece, open_corpus
from data.files import new_folder, sync, write_atomically
from data.overlap import overlap_of
from text.chat import ChatTemplate, encode_conversation, template_of
from text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    read_sentencepiece,
    tokenizer_sha256,
    train_sentencepiece,
)
from text.tokenizer_export import tokenizer_files

USAGE = """\
python data/prepare.py python                     the standard library of the Python that runs
python data/prepare.py shakespeare                1 MB, downloaded
python data/prepare.py tinystories | fineweb-edu  streamed from Hugging Face; after a stop, the
                                                  same command goes on
python data/prepare.py FILE-OR-FOLDER...          your own text, or rows with a text in each:
                                                  .jsonl, .ndjson, .json, .csv, .tsv, .parquet;
                                                  all but .parquet also as .gz, .bz2, .xz or .zst

field=text                the field of the objects, or the column of the table, that has the text
tokenizer=sentencepiece   trained on the train split, with vocab_size=4096 ids
tokenizer=byte | char | tiktoken:gpt2 | PATH.model
tokenizer=FOLDER          the tokenizer of a run, of a data set or of Hugging Face weights
name=NAME                 of the folder; without it, the name of the source

Data sets are made in data/, or in the folder whose absolute path is in ROOTLLAMA_DATA."""
OPTIONS = ("field", "tokenizer", "vocab_size", "name")
SAMPLE_CHARS = 8_000_000  # a SentencePiece tokenizer is trained on at most so many
Surrounded = tuple[list[int], Piece, list[int]]  # a piece between the ids before and behind it
SAMPLE_DOCUMENTS = 20_000  # of a stream: its tokenizer is trained on those at its beginning
XZ_LIMIT = 16_000_000  # bytes: xz takes about 1 s for each MB, so no longer text is compressed
SEARCHED = 50_000_000  # bytes of the training text in which the validation text is looked for
SOUGHT = 1_280_000  # bytes of the validation text that are looked for
LOSSLESS = ("byte", "char", "tiktoken")  # kinds of tokenizers that keep any text by construction
EXAMPLES = 8  # characters that are named if others lose some
SAVE_EVERY = 64_000_000  # bytes of text after which a stream saves its progress


@dataclass
class Encoded:
    """What pieces of one split have become: ids; the places in them where documents begin, and
    where answers begin and end in turn; and lost_by."""

    ids: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    lost: Counter = field(default_factory=Counter)


def prepare(
    sources: list[str] | Corpus,
    out: str | Path,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
) -> dict:
    """Makes the data set folder `out` and returns the content of its meta.json.

    sources and tokenizer are words as on the command line; None takes the source's own tokenizer.
    Raises ValueError or OSError with a message of one line, and then there is no folder `out`.
    """
    out, begin = Path(out), time.monotonic()
    if out.exists() and not (out / "meta.json").is_file():
        raise ValueError(
            f"{out}: exists already and is no data set; choose another name with name="
        )
    if out.exists():
        raise ValueError(f"{out}: exists already; delete it, or choose another name with name=")
    corpus = sources if isinstance(sources, Corpus) else open_corpus(sources)
    choice = corpus.tokenizer if tokenizer is None else tokenizer
    with new_folder(out, "progress.json" if corpus.stream else None) as folder:
        made, progress = start_or_resume(folder, corpus, choice, vocab_size)
        write_tokens(folder, corpus, made, progress)
        for split in SPLITS:
            if not progress["bytes"][split]:
                raise ValueError(
                    f"{corpus.source}: too little text, none is left for {split}; give more"
                )
        meta = meta_of(folder, corpus, made, progress)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        (folder / "progress.json").unlink(missing_ok=True)
        for path in [*folder.iterdir(), folder]:
            sync(path)
        os.rename(folder, out)
        sync(out.parent)
    print_result(out, meta, time.monotonic() - begin)
    if "lost_bytes" in meta:
        warn_of_loss(meta, progress["lost_such_as"])
    if (meta["val_overlap"] or 0) > 0.1:
        warn(
            f"{meta['val_overlap']:.1%} of the val text stands in the train text, too: the val "
            f"loss tells what the model remembers of it, more than how it does on new text; take "
            f"out what comes twice"
        )
    return meta


def print_result(out: Path, meta: dict, seconds: float) -> None:
    """One line: what was made, and how fast."""
    tokens, size = (sum(meta[key].values()) for key in ("tokens", "bytes"))
    text = (
        f"{out}: {meta['source']}, {size / 1e6:.2f} MB -> {meta['tokens']['train']:,} train and "
        f"{meta['tokens']['val']:,} val tokens, vocabulary {meta['vocab_size']:,} "
        f"({meta['tokenizer']}), {size / tokens:.2f} bytes/token; {seconds:.1f} s, "
        f"{size / 1e6 / seconds:.1f} MB/s"
    )
    if (meta["val_overlap"] or 0) > 0.01:
        most = f"{SEARCHED / 1e6:.0f} MB of the train text that were searched"
        where = most if meta["bytes"]["train"] > SEARCHED else "train text"
        text += f"; {meta['val_overlap']:.1%} of the val text stands in the {where}, too"
    print(one_line(text))


def warn_of_loss(meta: dict, such_as: str) -> None:
    """One line: how much of the text the tokenizer loses, and what follows from it."""
    shares = (
        f"{100 * meta['lost_bytes'][split] / meta['bytes'][split]:.3g}% of the {split} text"
        for split in SPLITS
    )
    warn(
        f"this tokenizer loses {' and '.join(shares)}, such as "
        f"{', '.join(map(repr, such_as))}: a model cannot learn that, and bits per byte are "
        f"withheld; tokenizer=sentencepiece or byte keeps all of it"
    )


# The tokenizer


def make_tokenizer(choice: str, vocab_size: int | None, corpus: Corpus) -> Tokenizer:
    """The tokenizer that `tokenizer=choice` names."""
    if choice == "sentencepiece":
        return train_tokenizer(corpus, 4096 if vocab_size is None else vocab_size)
    if vocab_size is not None:
        raise ValueError(
            f"vocab_size={vocab_size} is for tokenizer=sentencepiece; tokenizer={choice} has its "
            "own size"
        )
    if choice == "byte":
        return ByteTokenizer()
    if choice == "char":
        return char_tokenizer(corpus)
    if choice.startswith("tiktoken:"):
        return named_tiktoken(choice.removeprefix("tiktoken:"))
    path = Path(expand_home(choice))
    if choice and path.is_dir():
        return say_whether_exportable(load_tokenizer(path))
    if path.suffix.lower() == ".model":
        return say_whether_exportable(read_sentencepiece(path))
    raise ValueError(
        f"tokenizer={choice} is unknown; choose from byte, char, sentencepiece, tiktoken:NAME, "
        "PATH.model, FOLDER"
    )


def say_whether_exportable(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer. A line says so if it is a SentencePiece model that cannot be exported: better
    now than after the training.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        # OSError: the library for it is not installed, so it is not exported from here.
        with suppress(OSError):
            try:
                tokenizer_files(tokenizer)
            except ValueError as error:
                warn(f"what is trained with it cannot be exported to Hugging Face: {error}")
    return tokenizer


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A SentencePiece tokenizer, trained on the train split of the corpus.

    Of a stream only the first SAMPLE_DOCUMENTS are read for it.
    """
    print(f"training a tokenizer of {vocab_size} pieces ...", flush=True)
    with closing(corpus.pieces()) as pieces:
        used = islice(pieces, SAMPLE_DOCUMENTS) if corpus.stream else pieces
        texts = (piece.text for piece in used if piece.split == "train")
        sample = spread_sample(texts, SAMPLE_CHARS)
    if not sample:
        raise ValueError(f"{corpus.source}: too little text, none is left for train; give more")
    tokenizer = train_sentencepiece(sample, vocab_size)
    made = tokenizer.vocab_size
    if made < vocab_size:
        print(f"the text is too small for {vocab_size} pieces: the tokenizer has {made}")
    return tokenizer


def spread_sample(texts: Iterable[str], limit: int, block: int = 2**14) -> list[str]:
    """Blocks of at most `block` characters, spread evenly over the texts.

    They have between limit / 2 and limit characters in all; shorter texts are taken whole.
    """
    kept, size, stride, count = [], 0, 1, 0
    for text in texts:
        for at in range(0, len(text), block):
            if count % stride == 0:
                kept.append(text[at : at + block])
                size += len(kept[-1])
                if size > limit:  # keep every second block only, here and from now on
                    kept, stride = kept[::2], stride * 2
                    size = sum(map(len, kept))
            count += 1
    return kept


def char_tokenizer(corpus: Corpus) -> Tokenizer:
    """A tokenizer of all characters that the text has."""
    if corpus.stream:
        raise ValueError(
            f"tokenizer=char needs all of the text first, {corpus.name} is a stream; "
            "take tokenizer=byte"
        )
    chars: set[str] = set()
    for piece in corpus.pieces():
        chars.update(piece.text)
    return CharTokenizer(chars)


def named_tiktoken(name: str) -> TiktokenTokenizer:
    """One of tiktoken's encodings, from the network unless it is in tiktoken's cache."""
    names = tiktoken.list_encoding_names()
    if name not in names:
        known = ", ".join(sorted(names))
        raise ValueError(f"tokenizer=tiktoken:{name} is unknown; choose from {known}")
    try:
        return TiktokenTokenizer(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise OSError(
            f"tiktoken:{name} could not be fetched ({reason}); go online once, "
            "or use another tokenizer"
        ) from None


# The tokens


def write_tokens(folder: Path, corpus: Corpus, tokenizer: Tokenizer, progress: dict) -> None:
    """Appends the tokens of the corpus to the .bin files, and keeps count in `progress`.

    It begins with piece number progress["pieces"]. What the files hold beyond the counts in the
    progress was written after it was saved for the last time; it is cut off and made again.
    """
    itemsize = np.dtype(progress["dtype"]).itemsize
    sizes = {f"{split}.bin": progress["tokens"][split] * itemsize for split in SPLITS}
    sizes |= {name: 8 * count for name, count in progress["places"].items()}
    saved = sum(progress["bytes"].values())
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "ab")) for name in sizes}
        for name, file in files.items():
            file.truncate(sizes[name])
        template = stack.enter_context(template_of(tokenizer)) if corpus.chat else None
        pieces = stack.enter_context(closing(corpus.pieces()))
        bar = stack.enter_context(
            tqdm(desc=corpus.name, total=corpus.size, unit="B", unit_scale=True, disable=None)
        )
        begun = {split for split in SPLITS if progress["tokens"][split]}
        rest = islice(pieces, progress["pieces"], None)
        groups = group_pieces(with_surroundings(rest, tokenizer, begun))
        for group, encoded in in_order(partial(encode_pieces, tokenizer, template), groups):
            bar.update(append_tokens(files, group, encoded, progress))
            total = sum(progress["bytes"].values())
            if corpus.stream and total - saved >= SAVE_EVERY:
                saved = total
                save_progress(folder, progress)


def append_tokens(
    files: dict[str, BinaryIO], group: list[Surrounded], encoded: dict[str, Encoded], progress: dict
) -> int:
    """Writes what one group of pieces has become, counts it in `progress`, and returns how many
    bytes of text it was.
    """
    dtype, size, lost = np.dtype(progress["dtype"]).newbyteorder("<"), 0, Counter()
    for split, made in encoded.items():
        before = progress["tokens"][split]
        for kind in ("documents", "answers"):
            places, name = getattr(made, kind), places_file(split, kind)
            if places:
                files[name].write((np.array(places, "<i8") + before).tobytes())
                progress["places"][name] += len(places)
        files[f"{split}.bin"].write(np.array(made.ids, dtype).tobytes())
        text = "".join(piece.text for _, piece, _ in group if piece.split == split).encode()
        progress["tokens"][split] += len(made.ids)
        progress["bytes"][split] += len(text)
        progress["lost_bytes"][split] += sum(made.lost.values())
        if split == "val":
            progress["val_crc32"] = zlib.crc32(text, progress["val_crc32"])
        size, lost = size + len(text), lost + made.lost
    for file in files.values():
        file.flush()
    progress["pieces"] += len(group)
    seen = progress["lost_such_as"]
    new = [char for char, _ in lost.most_common() if char not in seen]
    progress["lost_such_as"] = (seen + "".join(new))[:EXAMPLES]
    return size


def with_surroundings(
    pieces: Iterable[Piece], tokenizer: Tokenizer, begun: set[str]
) -> Iterator[Surrounded]:
    """(the ids before it, the piece, the ids behind it) of each piece. `begun` are the splits that
    have a document already.
    """
    for piece, following in pairwise(chain(pieces, [None])):
        if piece.messages:  # whose template says all that stands around it
            yield [], piece, []
            continue
        before = tokenizer.before if piece.start else []
        if piece.start and piece.split in begun:
            before = tokenizer.between + before
        begun.add(piece.split)
        ends = following is None or following.start
        yield before, piece, tokenizer.after if ends else []


def group_pieces(pieces: Iterable[Surrounded]) -> Iterator[list[Surrounded]]:
    """Groups of at least CHUNK characters, so that short documents, too, keep a thread busy."""
    group, size = [], 0
    for surrounded in pieces:
        group.append(surrounded)
        size += len(surrounded[1].text)
        if size >= CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def encode_pieces(
    tokenizer: Tokenizer, template: ChatTemplate | None, pieces: list[Surrounded]
) -> dict[str, Encoded]:
    """What the pieces become, by split. Conversations need a template."""
    encoded = {split: Encoded() for split in SPLITS}
    for before, piece, after in pieces:
        made = encoded[piece.split]
        begin = len(made.ids)
        if piece.messages:
            try:
                talk = encode_conversation(tokenizer, template, piece.messages)
            except ValueError as error:
                raise ValueError(f"{piece.place}: {error}") from None
            made.ids += talk.ids
            made.documents.append(begin)
            made.answers += [begin + place for answer in talk.answers for place in answer]
            continue
        if piece.start:  # what stands between two documents belongs to the first one
            made.documents.append(begin + len(before) - len(tokenizer.before))
        found = tokenizer.encode(piece.text, start=piece.start)
        made.ids += [*before, *found, *after]
        made.lost += lost_by(tokenizer, found, piece)
    return encoded


def lost_by(tokenizer: Tokenizer, ids: list[int], piece: Piece) -> Counter:
    """character -> how many bytes of it the ids of a piece do not give back.

    Characters that change their places count as one that is lost.
    """
    if tokenizer.kind in LOSSLESS:
        return Counter()
    text = tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
    if text == piece.text:
        return Counter()
    if piece.start and tokenizer.dummy_prefix:
        text = text.removeprefix(" ")
        if text == piece.text:
            return Counter()
    missing = Counter(piece.text) - Counter(text) or Counter(piece.text[:1])
    return Counter({char: count * len(char.encode()) for char, count in missing.items()})


def in_order(function: Callable, items: Iterable) -> Iterator[tuple]:
    """(item, function(item)) in the order of the items, computed by threads, few of them at a time.

    Threads are enough: sentencepiece and tiktoken release Python's lock while they encode.
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


# How far it is


def start_or_resume(
    folder: Path, corpus: Corpus, choice: str, vocab_size: int | None
) -> tuple[Tokenizer, dict]:
    """The tokenizer, which is saved in the folder, and the progress.

    A stream that was stopped goes on with the tokenizer and the progress in the folder.
    """
    asked = {"source": corpus.source, "choice": choice, "vocab_size": vocab_size}
    if (folder / "progress.json").is_file():
        progress = read_progress(folder)
        if progress["asked"] != asked:
            raise ValueError(
                f"{folder}: a preparation with other settings stopped there; "
                "delete it, or repeat those"
            )
        print(f"going on after {progress['pieces']:,} documents")
        return load_tokenizer(folder), progress
    tokenizer = make_tokenizer(choice, vocab_size, corpus)
    tokenizer.save(folder)
    kinds = ("documents", "answers") if corpus.chat else ("documents",)
    return tokenizer, {
        "asked": asked,
        "dtype": "uint16" if tokenizer.vocab_size < 2**16 else "uint32",
        "pieces": 0,
        "places": {places_file(split, kind): 0 for kind in kinds for split in SPLITS},
        "tokens": dict.fromkeys(SPLITS, 0),
        "bytes": dict.fromkeys(SPLITS, 0),
        "val_crc32": 0,
        "lost_bytes": dict.fromkeys(SPLITS, 0),
        "lost_such_as": "",
    }


def save_progress(folder: Path, progress: dict) -> None:
    """Waits until the .bin files are on the disk, then saves how far they are good."""
    for name in ("train.bin", "val.bin", *progress["places"]):
        sync(folder / name)
    text = json.dumps(progress)
    write_atomically(folder / "progress.json", lambda file: file.write(text.encode()))


def read_progress(folder: Path) -> dict:
    """The progress of a stopped preparation; ValueError if the .bin files contradict it."""
    path = folder / "progress.json"
    try:
        if path.stat().st_size >= 100_000:
            raise ValueError
        # An older version did not measure what is lost.
        unmeasured = {"lost_bytes": dict.fromkeys(SPLITS, 0), "lost_such_as": ""}
        progress = unmeasured | json.loads(path.read_text(encoding="utf-8"))
        itemsize = {"uint16": 2, "uint32": 4}[progress["dtype"]]
        counts = [progress["pieces"], progress["val_crc32"]]
        for split in SPLITS:
            counts += [progress[name][split] for name in ("tokens", "bytes", "lost_bytes")]
        counts += dict(progress["places"]).values()
        sound = isinstance(progress["asked"], dict)
        known = {places_file(split, kind) for split in SPLITS for kind in ("documents", "answers")}
        sound = sound and progress["places"].keys() <= known
        sound = sound and isinstance(progress["lost_such_as"], str)
        sound = sound and all(type(count) is int and count >= 0 for count in counts)
        for split in SPLITS:
            size = (folder / f"{split}.bin").stat().st_size
            sound = sound and progress["tokens"][split] * itemsize <= size
        for name, count in progress["places"].items():
            sound = sound and 8 * count <= (folder / name).stat().st_size
        if not sound:
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is damaged, or does not belong to its .bin files; delete {folder}"
        ) from None
    return progress


# What is known about the result


def meta_of(folder: Path, corpus: Corpus, tokenizer: Tokenizer, progress: dict) -> dict:
    """The content of meta.json."""
    content, part = hashlib.sha256(), PART_TOKENS * np.dtype(progress["dtype"]).itemsize
    checksums: dict[str, list[int]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for block in read_blocks(folder / f"{split}.bin", part):
            content.update(block)
            checksums[split].append(zlib.crc32(block))
    places = {}
    for name, count in progress["places"].items():
        content_of = (folder / name).read_bytes()
        places[name] = [count, zlib.crc32(content_of)]
        if "answers" in name:  # other answers to learn are other data
            content.update(content_of)
    lost = {"lost_bytes": progress["lost_bytes"]} if any(progress["lost_bytes"].values()) else {}
    meta = {
        "format_version": 1,
        "dtype": progress["dtype"],
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "tokens": progress["tokens"],
        "bytes": progress["bytes"],
        "tokenizer": tokenizer.kind,
        "tokenizer_sha256": tokenizer_sha256(folder),
        "source": corpus.source,
        "content_sha256": content.hexdigest(),
        "crc32": checksums,
        "places": places,
        "xz_bits_per_byte": None,
        "val_overlap": None,
        **lost,  # only there if there is a loss
    }
    if tokenizer.exact and not lost and not corpus.chat:
        text = bytearray()
        for block in val_text(folder, tokenizer, progress):  # all of it is checked
            text += block if len(text) <= XZ_LIMIT else b""
        before = train_text(folder, tokenizer, progress)
        meta["xz_bits_per_byte"] = xz_bits_per_byte(before, bytes(text))
        spread = partial(spread_text, folder, tokenizer, progress)
        meta["val_overlap"] = overlap_of(
            spread("val", SOUGHT, 2**12), spread("train", SEARCHED, 2**18)
        )
    return meta | {"checksum": checksum(meta)}


def val_text(folder: Path, tokenizer: Tokenizer, progress: dict) -> Iterator[bytes]:
    """The text of the val split in blocks, decoded from val.bin.

    Ends with ValueError if it is not the text that was encoded.
    """
    crc = 0
    for ids in read_blocks(folder / "val.bin"):
        text = tokenizer.decode_bytes(np.frombuffer(ids, progress["dtype"]).tolist())
        crc = zlib.crc32(text, crc)
        yield text
    if crc != progress["val_crc32"]:
        raise ValueError(
            "val.bin does not decode to the text it was made from; please report this as a bug"
        )


def train_text(folder: Path, tokenizer: Tokenizer, progress: dict) -> bytes:
    """The end of the training text, about XZ_LIMIT bytes of it, or all if it has no more."""
    ids = np.memmap(folder / "train.bin", progress["dtype"], mode="r")
    share = min(1, XZ_LIMIT / progress["bytes"]["train"])
    return tokenizer.decode_bytes(ids[len(ids) - int(share * len(ids)) :].tolist())


def spread_text(
    folder: Path, tokenizer: Tokenizer, progress: dict, split: str, limit: int, part: int
) -> Iterator[bytes]:
    """About `limit` bytes of the text of a split in parts of `part` tokens, spread evenly over it;
    all of it if it has no more.
    """
    ids = np.memmap(folder / f"{split}.bin", progress["dtype"], mode="r")
    parts = -(-len(ids) // part)
    chosen = min(parts, max(1, parts * limit // progress["bytes"][split]))
    for i in (np.arange(chosen) * parts // chosen).tolist():
        yield tokenizer.decode_bytes(ids[i * part : (i + 1) * part].tolist())


def xz_bits_per_byte(before: bytes, text: bytes) -> float | None:
    """What `xz -9e` needs for the text if it has seen the one before it, as a model has: how much
    larger both together become than the first alone. None for a text of more than XZ_LIMIT bytes.
    """
    if not 0 < len(text) <= XZ_LIMIT:
        return None
    # A dictionary as long as the text does what the usual 64 MB do, and takes less memory.
    how = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
    how["dict_size"] = max(2**16, len(before) + len(text))
    with ThreadPoolExecutor(2) as pool:
        compress = partial(lzma.compress, filters=[how])
        alone, together = map(len, pool.map(compress, (before, before + text)))
    return 8 * max(1, together - alone) / len(text)


def read_blocks(path: Path, size: int = 2**22) -> Iterator[bytes]:
    """The content of a file, `size` bytes at a time."""
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


# The command


def read_command(argv: list[str]) -> tuple[Corpus, Path, str | None, int | None]:
    """What the command line asks for, as the arguments of `prepare`."""
    sources, options = [], {}
    for word in argv:
        if os.path.exists(os.path.expanduser(word)):  # it may contain a '='
            sources.append(word)
            continue
        words, pairs = split_arguments([word])
        sources += words
        for key, value in pairs.items():
            if key not in OPTIONS:
                raise ValueError(f"unknown option {key!r}; choose from {', '.join(OPTIONS)}")
            if key in options:
                raise ValueError(
                    f"{key} is given twice, as {options[key]!r} and {value!r}: keep one"
                )
            options[key] = value
    if not sources:
        raise ValueError("no source given; try: python data/prepare.py python (or --help)")
    if len(sources) > 1 and "name" not in options:
        raise ValueError(f"{len(sources)} sources are one data set; give it a name=")
    size = options.get("vocab_size")
    if size is not None and not re.fullmatch("[0-9]{1,7}", size):
        raise ValueError(f"vocab_size must be a whole number below ten million, got {size!r:.80}")
    corpus = open_corpus(sources, options.get("field"))
    name = options.get("name", corpus.name)
    if name != Path(name).name or name.startswith((".", "~")) or not name or "\\" in name:
        raise ValueError(
            f"name={name!r} must be a bare folder name: without slashes, and not beginning with . "
            f"or ~"
        )
    return corpus, DATA / name, options.get("tokenizer"), None if size is None else int(size)


def main(argv: list[str]) -> int:
    """Returns the exit code, 0; the user's errors end with 2, Ctrl-C with 130 and SIGTERM with
    143."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    with user_errors():
        prepare(*read_command(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
