"""What the docstring of a configuration dataclass says about its fields."""

import inspect
import re
from typing import Any

ENTRY = re.compile(r"([\w, ]+): (.*)")


def summary(cls: Any) -> str:
    """The docstring of a class up to its `Attributes:`."""
    return (inspect.getdoc(cls) or "").partition("Attributes:\n")[0].strip()


def descriptions(cls: Any) -> dict[str, str]:
    """The description of each field: the entries under `Attributes:` of a class and its bases.

    >>> class Base:
    ...     '''Has a size.
    ...
    ...     Attributes:
    ...         size: in bytes.
    ...     '''
    >>> class File(Base):
    ...     '''Has a name.
    ...
    ...     Attributes:
    ...         name: the path,
    ...             relative to the current directory.
    ...     '''
    >>> descriptions(File)
    {'size': 'in bytes.', 'name': 'the path, relative to the current directory.'}
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        entries = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")[2]
        names: list[str] = []
        for line in entries.splitlines():
            text = line.strip()
            if line.startswith("    ") and not line.startswith("     ") and ENTRY.match(text):
                listed, _, text = text.partition(": ")
                names = listed.split(", ")
                found |= dict.fromkeys(names, "")
            found |= {name: f"{found[name]} {text}".strip() for name in names}
    return found
