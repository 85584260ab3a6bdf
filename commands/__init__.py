"""The commands of `probsurgery`, one module per group: parse the options, call a stage, render the result."""
