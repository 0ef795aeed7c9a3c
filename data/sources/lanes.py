"""Where lanes begin that are cut by documents and not by bytes.

A source is cut into lanes of equal bytes, which needs no reading. Where a record is as long as
several lanes, or where records are few, lanes can be empty. Then the source is read once,
and its lanes are cut between documents.
"""

from collections.abc import Sequence
from heapq import nlargest
from itertools import accumulate


def first_documents(sizes: Sequence[int], lanes: int) -> list[int] | None:
    """The number of the first document of each lane; None if there are fewer documents than lanes.

    Lanes get equal sizes, of which a document counts at most as much as a whole lane. So each lane
    begins at another document, and what is beside a long one is dealt equally:

        sizes      1 1 1 90   1 1 1 1 1     four lanes
        counted    1 1 1 2.67 1 1 1 1 1     the 8 others fill three lanes, 2.67 each
        lane       0 0 0 1    2 2 2 3 3

    >>> first_documents([1, 1, 1, 90, 1, 1, 1, 1, 1], 4)
    [0, 3, 4, 7]

    Args:
        sizes: of the documents, in any unit; each at least 1.
    """
    if len(sizes) < lanes:
        return None
    # With the k longest documents a lane each, the others fill lanes - k. The first k that leaves
    # none of the others longer than a lane; with lanes - 1 none can be, for they fill one lane.
    longest = nlargest(lanes, sizes)
    others, k = sum(sizes), 0
    while longest[k] * (lanes - k) > others:
        others -= longest[k]
        k += 1
    # In integers, for any sizes: all are multiplied by lanes - k, so that a lane has `others`.
    begins = accumulate((min(size * (lanes - k), others) for size in sizes), initial=0)
    firsts: list[int] = []
    for number, begin in enumerate(begins):
        if len(firsts) < lanes and begin >= len(firsts) * others:
            firsts.append(number)
    return firsts
