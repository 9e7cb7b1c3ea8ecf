"""A table in page-locked host memory that the GPU reads by itself.

One small kernel gathers rows straight over the bus into device memory: no copy through the host, no synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch

from loaders.errors import OverBudget

BLOCK = 1024


class Pinned:
    """Page-locked memory of exactly the size asked for: torch's own pinned allocator rounds up to a power of two."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.tensor = torch.empty(shape, dtype=dtype)
        error = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self.tensor.nbytes, 0)
        if int(error) != 0:
            raise OverBudget(
                f"{self.tensor.nbytes} bytes of page-locked memory refused (CUDA error {int(error)})",
                field="--ple ram",
                hint="Raise the limit on locked memory (ulimit -l), or use --ple ssd",
            )

    def close(self) -> None:
        """Unlocks the pages. No kernel may still be reading them."""
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())


def gather_kernel() -> Any:
    """The kernel, compiled on first use; None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def kernel(table, ids, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        source = tl.load(ids + row)
        values = tl.load(table + source * width + columns, mask=columns < width)
        tl.store(out + row * width + columns, values, mask=columns < width)

    return kernel


class PinnedGather:
    """Rows of page-locked ``table`` [n, columns] by device ids int64 [t], onto the device, in the table's type."""

    def __init__(self, table: torch.Tensor, device: torch.device) -> None:
        self.device, self.dtype = device, table.dtype
        # Whole words where rows allow it: fewer, wider reads over the bus.
        row = table.shape[1] * table.element_size()
        wide = next((t for t in (torch.int32, torch.int16) if row % t.itemsize == 0), table.dtype)
        self.words = table.view(wide) if wide.itemsize > table.element_size() else table
        self.kernel = gather_kernel()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        rows, width = ids.shape[0], self.words.shape[1]
        if self.kernel is None:
            return self.words[ids.cpu()].to(self.device, non_blocking=True).view(self.dtype)
        out = torch.empty((rows, width), dtype=self.words.dtype, device=self.device)
        self.kernel[(rows, -(-width // BLOCK))](self.words, ids, out, width, block=BLOCK)
        return out.view(self.dtype)
