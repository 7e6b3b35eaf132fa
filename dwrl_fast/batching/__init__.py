"""Turns groups into micro-batches: as a tree of shared prefixes, packed, or padded."""
