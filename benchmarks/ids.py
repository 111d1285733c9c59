"""The token ids that every runner is fed, so that all of them touch the same experts. Standard library only: the peers'
runners import it, too, in environments of their own."""

from __future__ import annotations

import random

SEQUENCES = (1, 4, 16)
CONTEXT, WARM_UP, STEPS, PREFILL = 32, 3, 32, 512


class Ids:
    """Ids of one seed below `vocab`: what is drawn depends on the calls so far alone."""

    def __init__(self, vocab: int) -> None:
        self._random, self._most = random.Random(0), min(40000, vocab)

    def draw(self, sequences: int, count: int = 1) -> list[list[int]]:
        """[sequences][count]"""
        return [[self._random.randrange(10, self._most) for _ in range(count)] for _ in range(sequences)]
