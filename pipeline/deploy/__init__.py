"""A merged encoder with its heads, to predict with and to export."""
