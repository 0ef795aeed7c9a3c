"""How numbers are written for people."""


def plural(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts; `many` is by default `one` with an s.

    >>> plural(1, "slot"), plural(2, "slot"), plural(1200, "forward pass", "forward passes")
    ('1 slot', '2 slots', '1,200 forward passes')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def short_count(number: float) -> str:
    """A count with three digits and a letter for its magnitude: k, M, B or T.

    >>> short_count(2_621_440), short_count(3e11), short_count(12), short_count(999_900)
    ('2.62M', '300B', '12', '1M')
    """
    for magnitude, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # What three digits round up to the next magnitude is written with its letter.
        if number >= magnitude * 0.9995:
            digits = number / magnitude
            return f"{digits:,.0f}{letter}" if digits >= 999.5 else f"{digits:.3g}{letter}"
    return f"{number:.3g}"


def byte_size(size: float) -> str:
    """A number of bytes with three digits and a unit.

    >>> byte_size(90_000_000), byte_size(2**31), byte_size(3 * 2**43)
    ('85.8 MiB', '2 GiB', '24 TiB')
    """
    for power, letter in ((40, "T"), (30, "G"), (20, "M")):
        if size >= 2**power or letter == "M":
            break
    return f"{size / 2**power:.3g} {letter}iB"


def duration(seconds: float) -> str:
    """A duration as a person says it.

    >>> duration(41.2), duration(600), duration(3600 * 5.25), duration(86400 * 1234)
    ('41 s', '10 min', '5.2 h', '1,234 days')
    """
    for least, size, unit in ((2 * 86400, 86400, "days"), (7200, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{two_digits(seconds / size)} {unit}"
    return f"{seconds:.0f} s"


def two_digits(number: float) -> str:
    """A number with two digits; a large one whole.

    >>> two_digits(0.2484), two_digits(7.36), two_digits(81_081.4)
    ('0.25', '7.4', '81,081')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
