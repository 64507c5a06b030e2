"""Text in, tokens out: tokenizers, the loader, and the command that prepares a data set."""

PART = 2**20  # tokens; meta.json holds a CRC-32 of each part of so many in a .bin file
