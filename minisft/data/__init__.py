"""From rows to token arrays: readers, formats, tokenisation, packing, caches, previews."""
