"""How much a merge of folders reads, holds and writes at a time: what bounds its memory."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.checkpoint.ahead import AHEAD, PIECE, RING
from pymerge.checkpoint.writer import BLOCK, BLOCKS
from pymerge.planning.plan import FISHER_CHUNK, WINDOW


@dataclass(frozen=True)
class Sizes:
    """Bytes, but for `blocks` and `fisher_chunk`.

    ahead: mapped inputs that are requested ahead. ring: memory for inputs that cannot be used in
        place. piece: of one read into it.
    block, blocks: the blocks into which outputs are computed; a larger tensor is cut into them, or
        made in memory of its own.
    anonymous: the largest buffer for a whole tensor that is kept in anonymous memory; larger ones
        are backed by a file.
    window: layers that are solved together. fisher_chunk: elements that Fisher merging takes at a
        time.
    """

    ahead: int = AHEAD
    ring: int = RING
    piece: int = PIECE
    block: int = BLOCK
    blocks: int = BLOCKS
    anonymous: int = 1 << 20
    window: int = WINDOW
    fisher_chunk: int = FISHER_CHUNK


SIZES = Sizes()
