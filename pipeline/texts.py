"""Text of files and folders, which anybody may have written, as it is shown: the one place that it passes through."""


def plain(text: str) -> str:
    """Text on one line, with a question mark for what controls a terminal, reverses the order of letters, or is none.

    Such as escapes, marks for writing from right to left, and lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
