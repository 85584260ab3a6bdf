"""Caches on disk: formats, manifest, reading, writing, maintenance."""
