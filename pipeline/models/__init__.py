"""Encoders, checkpoints and where they come from, classifiers."""
