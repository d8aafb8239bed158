"""What a prediction takes for granted, beside the figures of a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lab_utils.planner.cluster import Case


@dataclass(frozen=True)
class Assumptions:
    """The defaults are those of the engine as it is.

    Args:
        case: which end of the cluster's efficiencies: low, expected or high.
        kernels: fused operators of the device (``docs/kernels.md``), or the plain ones that run anywhere.
        hidden_exchange: share of the all-to-all that travels behind other work; the engine hides it behind the shared
            expert alone, which is counted apart.
        hidden_messages: streams between stages travel behind other work; the engine leaves ColossalAI's ``overlap_p2p``
            off, which hangs (``engine/colossal.py``).
        imbalance: rows that the fullest rank of an ep group gets over the mean; the others wait for it.
        swapped: masters and moments wait in host memory and come to the device for the update; the engine updates on
            the host instead (``parallel.offload``).
        loss_share: tokens that bear loss; the head skips the others.
        fp8: products of layers in fp8, which the engine doesn't do; for comparison with runs that did.
    """

    case: Case = "expected"
    kernels: Literal["fused", "plain"] = "fused"
    hidden_exchange: float = 0.0
    hidden_messages: bool = False
    imbalance: float = 1.1
    swapped: bool = False
    loss_share: float = 1.0
    fp8: bool = False

    def but(self, **changes: object) -> Assumptions:
        return replace(self, **changes)  # type: ignore[arg-type]
