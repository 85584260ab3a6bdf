"""Merging: state dicts in, a merged state dict out."""
