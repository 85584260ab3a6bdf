"""Tasks and suites, layouts of data sets on disk, corruptions."""
