"""Stage two: from cached features to heads and results."""
