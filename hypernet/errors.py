"""What other libraries' errors say, short enough to be part of a sentence of ours."""


def first_line(error: BaseException) -> str:
    """The error's kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_sentence(error: BaseException) -> str:
    """Its first line without advice and links."""
    return first_line(error).split(". ")[0].rstrip(".")
