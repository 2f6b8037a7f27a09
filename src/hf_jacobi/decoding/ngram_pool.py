"""Rejection recycling: the n-grams of one sequence that are worth verifying again (paper, section 3.3)."""

from __future__ import annotations


CONTEXT_LENGTHS = (3, 2, 1)  # lengths of an n-gram's context in tokens; the longest match is tried first
LONGEST_MATCH = 8  # the largest number of tokens before a place that are compared with a context
KEPT_PER_CONTEXT = 8


class NgramPool:
    """
    The n-grams seen so far: in the committed text, optionally in the prompt, and in rejected drafts.

    Text is stored once, as lists of tokens. The index maps a context of one to three tokens to the last
    `KEPT_PER_CONTEXT` places where it ended, the latest last.
    """

    def __init__(self):
        self._ends: dict[tuple[int, ...], list[tuple[list[int], int]]] = {}
        self._text: list[int] = []

    def extend(self, tokens: list[int]) -> None:
        """Appends committed tokens, or those of the prompt, to the text."""
        for token in tokens:
            self._text.append(token)
            self._index(self._text, len(self._text))

    def recycle(self, tokens: list[int]) -> None:
        """Adds a piece of a rejected draft: consecutive predictions that were not committed."""
        if len(tokens) < 2:
            return
        piece = list(tokens)
        for end in range(1, len(piece)):
            self._index(piece, end)

    def _index(self, text: list[int], end: int) -> None:
        for length in CONTEXT_LENGTHS:
            if length <= end:
                ends = self._ends.setdefault(tuple(text[end - length : end]), [])
                ends.append((text, end))
                if len(ends) > KEPT_PER_CONTEXT:
                    del ends[0]

    def continuations(self, context: list[int], length: int, limit: int) -> list[list[int]]:
        """
        Up to `limit` different continuations of `context`, each of 1 to `length` tokens.

        Those that match the most tokens of the context come first, and among equals the latest.
        """
        found: list[list[int]] = []
        if limit < 1 or length < 1:
            return found
        for size in CONTEXT_LENGTHS:
            if size > len(context):
                continue
            for text, end in reversed(self._ends.get(tuple(context[-size:]), ())):
                tokens = text[end : end + length]
                if tokens and tokens not in found:
                    found.append(tokens)
                    if len(found) == limit:
                        return found
        return found

    def matches(self, context: list[int], length: int, limit: int) -> list[tuple[int, list[int]]]:
        """
        Up to `limit` continuations of `context` with different first tokens, the longest match first, and among equals
        the latest.

        Returns:
            `(match, tokens)` of each: the number of tokens before that place that match the context, at most
            `LONGEST_MATCH`; and the 1 to `length` tokens that followed.
        """
        found: dict[int, tuple[int, list[int], int]] = {}
        longest = min(LONGEST_MATCH, len(context))
        for size in CONTEXT_LENGTHS:
            if size > longest or limit < 1 or length < 1:
                continue
            if len(found) >= limit:  # those found have longer matches than any that is left
                break
            for text, end in reversed(self._ends.get(tuple(context[-size:]), ())):
                if end == len(text):
                    continue
                match, most = size, longest if longest < end else end
                while match < most and text[end - 1 - match] == context[-1 - match]:
                    match += 1
                if match > found.get(text[end], (0,))[0]:
                    found[text[end]] = (match, text, end)
        best = sorted(found.values(), key=lambda one: -one[0])[:limit]
        return [(match, text[end : end + length]) for match, text, end in best]
