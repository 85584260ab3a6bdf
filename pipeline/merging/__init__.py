"""Merging methods: state dicts in, one merged state dict out."""
