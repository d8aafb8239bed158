"""torch.distributed's and the engine's doors while a twin runs: calls are written down, and nobody is asked.

What other ranks would answer is derived and never made up: tensors of unknown values stay so; sizes of the exchange of
experts follow from an even routing (every expert gets the same number of tokens, as balanced training aims at); what a
stage hands on has the shape of the streams; the one agreement of all stages, over how many ranks whole matrices are
dealt out, is answered for every stage from its own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from lab_utils import collectives
from lab_utils.engine import colossal
from lab_utils.engine.library import p2p
from lab_utils.engine.twin.collectives import MESSAGES, Collective, Record
from lab_utils.engine.twin.ledger import Ledger
from lab_utils.engine.twin.watch import carry, even_counts, known
from lab_utils.models.deepseek_v4 import expert_parallel


class Doors:
    """Stand where other ranks would be.

    Args:
        record: of the calls; ledger: learns which memory is of which exchange.
        backend: of the collectives, as the device's real group would name it.
        device: of the step.
    """

    def __init__(self, record: Record, ledger: Ledger, backend: str, device: torch.device) -> None:
        self.record, self.ledger, self.backend, self.device = record, ledger, backend, device
        self.names: dict[tuple[int, ...], str] = {}
        self.streams: tuple[tuple[int, ...], torch.dtype] | None = None  # of one micro-batch
        self.said: Callable[[], list[Any]] | None = None  # by every stage, in the one agreement
        self._ranks: dict[int, tuple[Any, tuple[int, ...]]] = {}

    def name_groups(self, layout: Any) -> None:
        """Call the groups of a layout by what they share; smaller ones, of whole matrices, stay ``shards``."""
        groups = {
            "world": None,
            "data": layout.dp_group,
            "experts": layout.ep_group,
            "expert_data": layout.moe_dp_group,
            "pipeline": layout.pp_group,
        }
        if layout.parts is not None:
            groups["rows"] = layout.parts.group
        if layout.pp_size > 1 and layout.ends_group is not None:
            groups["ends"] = layout.ends_group
        for name, group in groups.items():
            self.names.setdefault(self.ranks_of(group), name)

    def ranks_of(self, group: Any) -> tuple[int, ...]:
        found = self._ranks.get(id(group))
        if found is None:
            group_or_world = dist.group.WORLD if group is None else group
            found = self._ranks[id(group)] = (group, tuple(dist.get_process_group_ranks(group_or_world)))
        return found[1]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within the block, calls come here."""
        doors: list[tuple[Any, str, Any]] = [
            (dist, "all_reduce", self.all_reduce),
            (dist, "all_to_all_single", self.all_to_all),
            (dist, "batch_isend_irecv", self.messages),
            (dist, "broadcast", self.broadcast),
            (dist, "all_gather_object", self.all_gather_object),
            (dist, "barrier", self.barrier),
            (dist, "get_backend", lambda group=None: self.backend),
            (collectives, "all_gather", self.all_gather),
            (collectives, "reduce_scatter", self.reduce_scatter),
            (p2p, "_send_recv_serialization_object", self.announcements),
            (p2p, "_check_device", lambda group: (self.device, self.device.type != "cpu")),
            (dist, "P2POp", Message),
            (colossal, "gather_objects", self.stages_say),
            (expert_parallel, "count", even_counts),
        ]
        with patched(doors):
            yield

    # -- collectives --------------------------------------------------------------------------------------------------

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ):
        ranks = self.ranks_of(group)
        self._add("all_reduce", ranks, tensor, 2 * tensor.nbytes * (len(ranks) - 1) / len(ranks))
        values = known(tensor)
        if values is not None and op == dist.ReduceOp.SUM:  # every rank says the same
            with _disable_current_modes():
                values.mul_(len(ranks))
        return None

    def all_gather(self, out: Tensor, own: Tensor, group: Any = None) -> None:
        ranks = self.ranks_of(group)
        self._add("all_gather", ranks, own, own.nbytes * (len(ranks) - 1))

    def reduce_scatter(self, own: Tensor, whole: Tensor, group: Any = None) -> None:
        ranks = self.ranks_of(group)
        self._add("reduce_scatter", ranks, whole, whole.nbytes * (len(ranks) - 1) / len(ranks))

    def broadcast(self, tensor: Tensor, src: int | None = None, group: Any = None, **_: Any) -> None:
        self._add("broadcast", self.ranks_of(group), tensor, tensor.nbytes)

    def barrier(self, group: Any = None, **_: Any) -> None:
        ranks = self.ranks_of(group)
        self.record.add(Collective("barrier", self.names.get(ranks, "shards"), ranks))

    def all_gather_object(self, found: list[Any], value: Any, group: Any = None) -> None:
        """Every rank of the group says the same."""
        ranks = self.ranks_of(group)
        self.record.add(Collective("all_gather_object", self.names.get(ranks, "shards"), ranks))
        found[:] = [value] * len(ranks)

    def all_to_all(
        self,
        out: Tensor,
        own: Tensor,
        received: list[int] | None = None,
        sizes: list[int] | None = None,
        group: Any = None,
        **_: Any,
    ) -> None:
        ranks = self.ranks_of(group)
        mine = ranks.index(dist.get_rank())
        if sizes is None:
            self._add("all_to_all", ranks, own, own.nbytes * (len(ranks) - 1) / len(ranks))
            values = known(own)
            if values is not None:  # counts of tokens: what one source sends here, each sends
                with _disable_current_modes():
                    rows = values.view(len(ranks), -1)[mine].repeat(len(ranks)).view(out.shape)
                carry(out, rows)
            return
        row = own.nbytes // max(len(own), 1)
        entry = self._entry("all_to_all", ranks, own, (sum(sizes) - sizes[mine]) * row)
        self.record.add(replace(entry, uneven=True))
        for tensor in (out, own):
            self.ledger.name(tensor, "exchange", keep=True)

    # -- between stages -----------------------------------------------------------------------------------------------

    def messages(self, operations: list[Message]) -> list[Any]:
        batch = []
        for one in operations:
            ranks = self.ranks_of(one.group)
            self.ledger.name(one.tensor, "streams")
            kind = "send" if one.sends else "recv"
            entry = self._entry(kind, ranks, one.tensor, one.tensor.nbytes if one.sends else 0)
            batch.append(replace(entry, peer=one.peer))
        self.record.add(*batch)
        return []

    def announcements(
        self, object: Any, send_dst: Any, recv_src: Any, send_group: Any, recv_group: Any, *_: Any, **__: Any
    ) -> Any:
        """The description of what will be sent, and of what comes: streams of one micro-batch."""
        sizes: list[Collective] = []
        if object is not None and send_dst is not None:
            ranks = self.ranks_of(send_group)
            sizes.append(
                Collective("send_object", self.names.get(ranks, "neighbours"), ranks, peer=int(send_dst))
            )
        if recv_src is not None:
            ranks = self.ranks_of(recv_group)
            sizes.append(
                Collective("recv_object", self.names.get(ranks, "neighbours"), ranks, peer=int(recv_src))
            )
        if sizes:
            self.record.add(*sizes)  # the size, then the bytes
            self.record.add(*sizes)
        if recv_src is None:
            return None
        shape, dtype = self.streams
        _, tree = tree_flatten({"streams": None})
        return p2p.P2PMetadata(tree, [p2p.TensorMetadata(torch.Size(shape), dtype, True)], [], [])

    def stages_say(self, value: Any) -> list[Any]:
        """How many ranks each stage could deal its matrices to; ``said`` by every stage."""
        ranks = self.ranks_of(None)
        self.record.add(Collective("all_gather_object", "world", ranks))
        return [value, *(self.said() if self.said else [])]

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _entry(self, kind: str, ranks: tuple[int, ...], tensor: Tensor, sent: float) -> Collective:
        name = self.names.get(ranks, "neighbours" if kind in MESSAGES else "shards")
        return Collective(
            kind, name, ranks, str(tensor.dtype).removeprefix("torch."), tensor.nbytes, int(sent)
        )

    def _add(self, kind: str, ranks: tuple[int, ...], tensor: Tensor, sent: float) -> None:
        self.record.add(self._entry(kind, ranks, tensor, sent))


class Message:
    """``dist.P2POp`` without its checks of devices."""

    def __init__(self, op: Callable, tensor: Tensor, peer: int, group: Any = None, *_: Any) -> None:
        self.sends, self.tensor, self.peer, self.group = op is dist.isend, tensor, int(peer), group


@contextmanager
def patched(doors: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes replaced within the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in doors]
    for owner, name, function in doors:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
