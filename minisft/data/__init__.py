"""Convert dataset rows to token arrays: read, tokenise, label, pack, cache, preview (README.md)."""
