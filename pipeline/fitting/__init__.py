"""Stage two: features to heads and results."""
