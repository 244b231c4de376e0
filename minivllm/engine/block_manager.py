"""BlockManager: the blocks of the KV cache, their reference counts, the prefix cache, eviction.

A block is always in exactly one of three places: used by at least one request (`ref_counts` > 0), free with nothing
worth keeping (`_free`), or free but still holding a published prefix (`_evictable`, least recently used first).

Prefix cache: only full blocks are published, under a 128-bit xxhash chained over the parent block's hash and the
block's tokens, so a hash stands for the whole prefix up to it (vLLM's design, "Automatic Prefix Caching").
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from xxhash import xxh3_128_digest

from minivllm.engine.request import Request


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now, evicting cached ones."""
        return len(self._free) + len(self._evictable)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, request: Request) -> list[int]:
        """The cached blocks that hold the start of the request's tokens.  The last token is never among them, so that
        there always is one to compute logits from.  Takes no reference."""
        if not self.enable_prefix_caching:
            return []
        hits: list[int] = []
        for block_hash in self._hashes(request, (len(request.token_ids) - 1) // self.block_size):
            block = self._block_of.get(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def admit(self, request: Request, hits: list[int], num_spare: int) -> bool:
        """Give `request` the cached blocks `hits` and new ones for the rest of its tokens, all or nothing.

        Fails (False) if fewer than `num_spare` blocks would then be free.
        """
        num_new = self.num_blocks_for(request.num_tokens) - len(hits)
        num_idle_hits = sum(self.ref_counts[block] == 0 for block in hits)
        if self.num_free_blocks - num_idle_hits - num_new < num_spare:
            return False
        for block in hits:
            if self.ref_counts[block] == 0:
                del self._evictable[block]
            self.ref_counts[block] += 1
        request.block_ids = list(hits)
        request.num_published_blocks = len(hits)
        self._append(request, num_new)
        return True

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Let `request` hold `num_tokens` tokens; returns the blocks added, or None (and adds none) if too few are
        free."""
        num_new = self.num_blocks_for(num_tokens) - len(request.block_ids)
        if num_new <= 0:
            return []
        if num_new > self.num_free_blocks:
            return None
        self._append(request, num_new)
        return request.block_ids[-num_new:]

    def free(self, request: Request) -> None:
        """Drop the request's references.  The end of a sequence is evicted before its start."""
        self._release(request.block_ids[request.num_dropped_blocks :])
        request.block_ids = []
        request.num_published_blocks = request.num_dropped_blocks = 0

    def drop(self, request: Request, num_tokens: int) -> None:
        """Drop the references to the blocks that lie wholly in the first `num_tokens` tokens, which no layer will look
        at again.  They keep their places in `block_ids`."""
        num_blocks = num_tokens // self.block_size
        if num_blocks > request.num_dropped_blocks:
            self._release(request.block_ids[request.num_dropped_blocks : num_blocks])
            request.num_dropped_blocks = num_blocks

    def publish(self, request: Request) -> None:
        """Enter the request's full blocks, of known tokens and computed, into the prefix cache."""
        num_tokens = min(request.num_computed_tokens, len(request.token_ids))
        if not self.enable_prefix_caching or num_tokens < (request.num_published_blocks + 1) * self.block_size:
            return
        num_full = num_tokens // self.block_size
        hashes = self._hashes(request, num_full)
        for i in range(max(request.num_published_blocks, request.num_dropped_blocks), num_full):
            block = request.block_ids[i]
            if hashes[i] not in self._block_of:  # else another block holds the same prefix already
                self._block_of[hashes[i]] = block
                self._hash_of[block] = hashes[i]
        request.num_published_blocks = num_full

    def reset_prefix_cache(self) -> None:
        """Forget all published prefixes.  Blocks in use stay with their requests."""
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        self._free.extend(self._evictable)
        self._evictable.clear()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError if the books do not agree with each other and with the running `requests`."""
        used = Counter(block for request in requests for block in request.block_ids[request.num_dropped_blocks :])
        assert [used[block] for block in range(self.num_blocks)] == self.ref_counts, "reference counts are off"
        free = [*self._free, *self._evictable]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {b for b in range(self.num_blocks) if self.ref_counts[b] == 0}, (
            "a block leaked or is shared"
        )
        assert all(self._hash_of[b] is None for b in self._free) and all(self._hash_of[b] for b in self._evictable)
        published = {h: block for block, h in enumerate(self._hash_of) if h is not None}
        assert published == self._block_of, "the prefix cache names wrong blocks"

    def _release(self, block_ids: list[int]) -> None:
        for block in reversed(block_ids):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def _append(self, request: Request, num_new: int) -> None:
        for _ in range(num_new):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                block_hash = self._hash_of[block]
                assert block_hash is not None
                del self._block_of[block_hash]
                self._hash_of[block] = None
            self.ref_counts[block] = 1
            request.block_ids.append(block)

    def _hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        """Hashes of the request's first `num_blocks` blocks; computed once and kept with the request."""
        hashes, size = request.block_hashes, self.block_size
        for i in range(len(hashes), num_blocks):
            tokens = array("q", request.token_ids[i * size : (i + 1) * size])
            hashes.append(xxh3_128_digest((hashes[-1] if hashes else b"") + tokens.tobytes()))
        return hashes[:num_blocks]
