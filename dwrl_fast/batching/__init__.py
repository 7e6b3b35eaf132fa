"""Groups become micro-batches: a tree of shared prefixes, packed, or padded."""
