"""Memory of the C library that a training step can use again at once."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one, which allocates the same again.

    By default it hands large blocks back to the kernel, and every step pays for some ten thousand
    page faults. And the kernel is asked to back the heap with huge pages, as far as it goes: a step
    walks through hundreds of megabytes. docs/log.md has both figures. No-op with another C library.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (AttributeError, OSError):
        return
    m_trim_threshold, m_mmap_threshold, madv_hugepage = -1, -3, 14  # malloc.h, sys/mman.h
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, 2**31 - 1)
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Blocks that are never touched take address space only; freed, they stay the heap's end, from
    # which later ones are cut, and keep the advice. Two, just below the limits, or they would go.
    page = 2 << 20
    n_bytes = (1 << 30) - page
    blocks = [block for block in (malloc(n_bytes), malloc(n_bytes)) if block is not None]
    for block in blocks:
        begin = -(-block // page) * page
        madvise(begin, (block + n_bytes - begin) // page * page, madv_hugepage)
    for block in blocks:
        free(block)
