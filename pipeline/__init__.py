"""The two stages and what they stand on. Data flows one way: see the table of modules in CONTRIBUTING.md."""
