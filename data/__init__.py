"""Text in, tokens out: tokenizers, the loader, and the command that prepares a data set."""

import json
import zlib

PART = 2**20  # tokens; meta.json holds a CRC-32 of each part of so many in a .bin file


def checksum(meta: dict) -> int:
    """CRC-32 over all fields of a meta.json but `checksum` itself."""
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True).encode())
