"""Scaling laws: the loss as a constant and powers of parameters, tokens or FLOPs.

    along a ladder         L = E + A C^-a
    over size              L = E + A N^-a
    over data              L = E + B D^-b
    over size and data     L = E + A N^-a + B D^-b                        arXiv 2203.15556
    with copies            L = E + A (N_once + K^phi N_rep)^-a + B D^-b   arXiv 2604.21106

All constants but the exponents enter linearly, so for given exponents they are found at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.experiments.fits.points import Exponents, Floats, Points

Quantity = Literal["parameters", "tokens", "FLOPs"]

POWERS = (0.01, 2.0)
"""Where the exponents a and b are sought. Published ones lie between 0.05 and 0.6."""

PHI = (-1.0, 2.0)
"""Where phi is sought. 0: copies are worth nothing; 1: as much as parameters."""


@dataclass(frozen=True)
class Term:
    """A power of a quantity, times a coefficient.

    Attributes:
        coefficient: its name, such as `A`; at least 0.
        exponent: its name, such as `a`; above 0.
        of: what is raised to minus the exponent.
    """

    coefficient: str
    exponent: str
    of: Quantity


SIZE, DATA = Term("A", "a", "parameters"), Term("B", "b", "tokens")


@dataclass(frozen=True)
class Law:
    """A constant E and some terms.

    Attributes:
        words: what it tells, for a title.
        terms: at least one.
        copies: whether phi weighs the copies in the number of parameters; otherwise parameters
            count once, whatever K is.
    """

    words: str
    terms: tuple[Term, ...]
    copies: bool = False

    @property
    def coefficients(self) -> tuple[str, ...]:
        return ("E", *(term.coefficient for term in self.terms))

    @property
    def exponents(self) -> tuple[str, ...]:
        return (*(term.exponent for term in self.terms), *(["phi"] if self.copies else []))

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of all constants."""
        return self.coefficients + self.exponents

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """Where each exponent is sought."""
        return tuple(PHI if name == "phi" else POWERS for name in self.exponents)

    @property
    def formula(self) -> str:
        """The law as it is written.

        >>> COPIES.formula
        'L = E + A (N_once + K^phi N_rep)^-a + B D^-b'
        """
        bases = {
            "parameters": "(N_once + K^phi N_rep)" if self.copies else "N",
            "tokens": "D",
            "FLOPs": "C",
        }
        terms = (f"{term.coefficient} {bases[term.of]}^-{term.exponent}" for term in self.terms)
        return " + ".join(["L = E", *terms])

    def base(self, term: Term, points: Points, exponents: Exponents) -> Floats:
        """What a term raises to a power: one number for each run."""
        if term.of == "tokens":
            return points.tokens
        if term.of == "FLOPs":
            return points.flops
        weight = points.K ** exponents[-1] if self.copies else 1.0
        return points.once + weight * points.repeated

    def columns(self, points: Points, exponents: Exponents) -> Floats:
        """What the coefficients are multiplied by: a matrix (runs, coefficients)."""
        powers = [
            self.base(term, points, exponents) ** -exponent
            for term, exponent in zip(self.terms, exponents, strict=False)
        ]
        return np.stack([np.ones(len(points.runs)), *powers], axis=1)

    def loss(self, constants: Mapping[str, float], points: Points) -> Floats:
        """The loss of each run as the law has it."""
        columns = self.columns(points, [constants[name] for name in self.exponents])
        return columns @ np.array([constants[name] for name in self.coefficients])


ALONG_LADDER = Law("along the ladder", (Term("A", "a", "FLOPs"),))
OVER_SIZE = Law("over size", (SIZE,))
OVER_DATA = Law("over data", (DATA,))
SIZE_AND_DATA = Law("over size and data", (SIZE, DATA))
COPIES = Law("over size, data and copies", (SIZE, DATA), copies=True)
COPIES_AT_ONE_LENGTH = Law("over size and copies", (SIZE,), copies=True)
