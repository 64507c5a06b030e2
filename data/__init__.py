"""Text in, tokens out: tokenizers, the loader, and the command that prepares a data set."""
