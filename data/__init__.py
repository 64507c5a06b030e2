"""Text in, tokens out. Read loader.py first: it gives train.py its batches.

loader.py    opens a data set and gives the batch of a step
prepare.py   the command that makes a data set: text to tokens
corpus.py    where its text comes from
rows.py      the rows of JSON, tables and parquet
mixture.py   several data sets in one run
overlap.py   how much of the validation text stands in the training text, too
files.py     files and folders that appear whole or not at all
"""

import json
import os
import zlib
from pathlib import Path

# Where data/prepare.py puts data sets, and all others look for them. config.command.start() has
# made sure that the variable is an absolute path.
DATA = Path(os.environ.get("ROOTLLAMA_DATA", Path(__file__).resolve().parent))
SPLITS = ("train", "val")
PART_TOKENS = 2**20  # meta.json has one CRC-32 for each part of so many tokens of a .bin file


def places_file(split: str, kind: str) -> str:
    """The file that says where the documents, or the answers, of a split are: places of tokens as
    int64, little-endian, in ascending order. An answer has two, its first token and its end.
    """
    return f"{split}.{kind}.bin"


def checksum(meta: dict) -> int:
    """The CRC-32 over all fields of a meta.json except `checksum`, where it is stored."""
    fields = {name: value for name, value in meta.items() if name != "checksum"}
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())
