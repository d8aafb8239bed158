"""Which rows of a named tensor a rank holds: the whole of it, or a run of its first dimension."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows ``[start, stop)`` of the ``total`` that the whole tensor has; a tensor without dimensions has one."""

    start: int
    stop: int
    total: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.total

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Of a parameter as the policy marked it (``rows = (start, total)``), else all of it."""
        count = tensor.shape[0] if tensor.ndim else 1
        start, total = getattr(tensor, "rows", (0, count))
        return cls(start, start + count, total)
