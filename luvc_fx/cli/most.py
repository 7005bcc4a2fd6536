"""The most that the numbers of commands may be: beyond that it was a slip of the finger, not a wish."""

RUNS = 10_000
"""Timed runs, and questions or images at once."""

TOKENS = 1_000_000
"""Of a prompt or an answer."""

THREADS = 1024

ANY = (1 << 63) - 1
"""Whole numbers that torch can hold, where a large one does no harm."""
