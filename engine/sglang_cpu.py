"""What SGLang 0.5.16 needs to serve on a machine without a GPU. Does nothing where CUDA is present.

Each patch stands here with its reason; there is no other place for one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.layers.rotary_embedding import base as rotary
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils import get_num_new_pages

ENVIRONMENT = {
    # Before it dies, a crashing server collects Python stacks with py-spy, then waits 60 s for CUDA core
    # dumps that cannot come. A worker that is to be restarted has to be gone at once.
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
}


def apply() -> None:
    """Registers the patches. To be called while SGLang loads its plug-ins."""
    if torch.cuda.is_available():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    allocator = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator."
    HookRegistry.register(allocator + "alloc_extend", alloc_extend, HookType.REPLACE)
    HookRegistry.register(allocator + "alloc_decode", alloc_decode, HookType.REPLACE)
    # SGLang looks for its CPU kernels by a package that needs AMX. Without it, rotary embedding would import
    # vLLM's CUDA kernel; told that it is on a CPU, it takes its own PyTorch version.
    rotary._is_cpu = True


def alloc_extend(
    self: Any,
    prefix_lens: torch.Tensor,
    prefix_lens_cpu: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor,
    last_loc: torch.Tensor,
    extend_num_tokens: int,
    num_new_pages: int | None = None,
) -> torch.Tensor | None:
    """KV slots for the new tokens of each request, page by page; None where too few pages are free.

    The original launches a Triton kernel whatever the device; SGLang's own PyTorch version of it does the same.
    """
    if num_new_pages is None:
        num_new_pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu)
    if self.need_sort and num_new_pages > len(self.free_pages):
        self.merge_and_sort_free()
    if num_new_pages > len(self.free_pages):
        return None
    slots = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
    alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
    self.free_pages = self.free_pages[num_new_pages:]
    return slots


def alloc_decode(
    self: Any, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
) -> torch.Tensor | None:
    """One KV slot for each request: the next one of its last page, or the first of a new page. As above."""
    num_new_pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
    if self.need_sort and num_new_pages > len(self.free_pages):
        self.merge_and_sort_free()
    if num_new_pages > len(self.free_pages):
        return None
    slots = last_loc.to(torch.int64) + 1
    starts_page = (seq_lens - 1) % self.page_size == 0
    slots[starts_page] = self.free_pages[:num_new_pages] * self.page_size
    self.free_pages = self.free_pages[num_new_pages:]
    return slots
