"""What is said of other libraries' errors."""

import pytest

from probsurgery.pipeline.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("wrong\nand why"), "wrong"),
        (
            ValueError("\n fields that are wrong:\n\n    size is negative\n    name"),
            "fields that are wrong: size is negative",
        ),
        (ValueError("nothing follows:"), "nothing follows:"),
        (ValueError(" "), "ValueError"),
    ],
)
def test_the_first_line_is_the_one_that_says_something(error, line):
    assert first_line(error) == line
