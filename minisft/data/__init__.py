"""From rows to token arrays: readers, formats, tokenising, packing, caches, previews."""
