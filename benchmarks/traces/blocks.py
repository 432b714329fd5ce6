"""From a file's block ids to page ids as the index knows them.

    file     17 18 19 20 | 21 22          blocks of 128 tokens, say
    pages    p(root 17 18 19 20)          4 blocks a page; "21 22" has no id yet

The ids of a file may name a block by its content alone, and are small numbers that two files
share. Chaining makes them name all that comes before them, and the trace's name is the root.
"""

from __future__ import annotations

from collections.abc import Sequence

from transfer.pages import chain_ids, namespace, root_id


class Blocks:
    """Page ids of one trace.

    block_tokens  tokens that one of the file's ids stands for
    page_tokens   a multiple of it; raises ValueError for anything else
    """

    def __init__(self, trace: str, block_tokens: int, page_tokens: int) -> None:
        if page_tokens < 1 or page_tokens % block_tokens:
            raise ValueError(f"{trace}: wanted pages of a multiple of {block_tokens} tokens, found {page_tokens}")
        self.page_tokens = page_tokens
        self.blocks_per_page = page_tokens // block_tokens
        self._root = root_id(namespace(trace))
        self._numbers: dict[int, int] = {}

    def ids(self, blocks: Sequence[int], prompt_tokens: int) -> tuple[list[int], int | None]:
        """Ids of the prompt's whole pages, and of its partial last one if there are blocks for it.

        blocks  of the whole prompt, any numbers; at least as many as its whole pages need
        """
        # Hashes of 64 bits do not fit where tokens go, so blocks are numbered as they come.
        numbers = self._numbers
        numbered = [numbers.setdefault(block, len(numbers)) for block in blocks]
        return self.numbered_ids(numbered, prompt_tokens)

    def numbered_ids(
        self, blocks: Sequence[int], prompt_tokens: int, known: Sequence[int] = ()
    ) -> tuple[list[int], int | None]:
        """`ids` of blocks that are numbers below 2**32 already, one number for one content.

        known  ids of the first pages, if they were had before
        """
        whole = prompt_tokens // self.page_tokens * self.blocks_per_page
        start = len(known) * self.blocks_per_page
        parent = known[-1] if known else self._root
        ids = [*known, *chain_ids(parent, blocks[start:whole], self.blocks_per_page)]
        rest = blocks[whole:]
        partial = chain_ids(ids[-1] if ids else self._root, rest, len(rest))[0] if rest else None
        return ids, partial
