"""From rows to token arrays: read, tokenise, label, pack, cache, preview (see README.md)."""
