"""Prime numbers, for the sizes of hash tables."""

from __future__ import annotations

import functools
import itertools
import math


@functools.lru_cache(maxsize=32)
def first_primes(start: int, count: int) -> tuple[int, ...]:
    """Return the first `count` primes from `start` on, `start` included."""
    candidates = filter(_is_prime, itertools.count(max(2, start)))
    return tuple(itertools.islice(candidates, count))


def _is_prime(number: int) -> bool:
    if number % 2 == 0:
        return number == 2
    return all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))
