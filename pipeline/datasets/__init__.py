"""Suites of tasks, layouts of data sets on disk, image corruptions."""
