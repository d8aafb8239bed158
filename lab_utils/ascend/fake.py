"""Training on device ``npu`` without one: tensors that have shape, dtype and device and no contents.

torch's fake tensors run every operator's own schema and meta function, and autograd its formulas, those of torch_npu
included. What the host asks of a device (how many rows go to an expert, whether a norm is finite) has no answer there;
``Known`` carries contents along for tensors that follow from known ones alone, which the rows of a batch are. A choice
of the best by unknown scores falls evenly on all there are; any other unknown number is zero.

To be used in a child process that has imported torch_npu under the stand-in (``stand_in.environment``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from lab_utils.engine.twin.watch import lifting_only_on_the_host

LARGEST = 1 << 16  # elements of a tensor whose contents are carried along
Seen = Callable[[Any, tuple, dict], None]


@contextmanager
def fake(seen: Seen = lambda *_: None) -> Iterator[None]:
    """Within the block tensors have no contents but what is known of them."""
    with lifting_only_on_the_host(), FakeTensorMode(allow_non_fake_inputs=True), Known(seen):
        yield


class Known(TorchDispatchMode):
    """Contents of fake tensors that follow from known contents; to be entered within a ``FakeTensorMode``.

    Args:
        seen: is told of every operator with its arguments, before it runs.
    """

    def __init__(self, seen: Seen = lambda *_: None) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():
            with self:  # what is made of other operators, in inference mode, is seen as those
                return func.decompose(*args, **kwargs)
        given = _tensors((args, kwargs))
        if given and all(x.is_meta and not isinstance(x, FakeTensor) for x in given):
            with _disable_current_modes():  # a model without memory, before it is cut
                return func(*args, **kwargs)
        self.seen(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            contents = _contents(args[0])
            with _disable_current_modes():
                return _zero(args[0].dtype) if contents is None else contents.item()
        if func.namespace == "c10d":
            return _collective(func, args, kwargs)
        if func.overloadpacket in _INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        known = _run(func, args, kwargs)
        try:
            found = func(*args, **kwargs)
        except DynamicOutputShapeException:
            if known is None:
                raise
            device = next(x.device for x in _tensors((args, kwargs)))
            found = tree_map(
                lambda x: torch.empty_like(x, device=device) if isinstance(x, Tensor) else x, known
            )
        if known is None:
            for x in _written(func, args, kwargs):
                x._known = None
            if func is torch.ops.aten.topk.default:
                spread(found[1], args[0].shape[args[2] if len(args) > 2 else -1])
        else:
            for x, contents in zip(tree_flatten(found)[0], tree_flatten(known)[0], strict=True):
                if isinstance(x, FakeTensor):
                    x._known = contents
        return found


def spread(chosen: Tensor, among: int) -> None:
    """What is chosen by unknown scores: everything in turn, so that all get the same number."""
    if isinstance(chosen, FakeTensor) and chosen.numel() <= LARGEST:
        with _disable_current_modes():
            chosen._known = (torch.arange(chosen.numel()) % among).view(chosen.shape).to(chosen.dtype)


def _collective(func: Any, args: tuple, kwargs: dict) -> Any:
    """The other ranks are like this one: what arrives is what was sent, and a sum is what it was."""
    found = func(*args, **kwargs)
    if func is torch.ops.c10d.alltoall_base_.default:
        output, given = args[0], _contents(args[1])
        with _disable_current_modes():
            output._known = given.clone() if given is not None and given.shape == output.shape else None
    return found


_INDEXING = {
    getattr(torch.ops.aten, name)
    for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
}


def _places(indices: Any) -> list[Any]:
    """A known mask as the places that it names: their number is then a shape."""
    places: list[Any] = []
    for index in indices:
        mask = _contents(index) if isinstance(index, Tensor) and index.dtype == torch.bool else None
        if mask is None:
            places.append(index)
            continue
        with _disable_current_modes():
            found = mask.nonzero(as_tuple=True)
        for contents in found:
            place = torch.empty(contents.shape, dtype=torch.int64, device=index.device)
            place._known = contents
            places.append(place)
    return places


def _zero(dtype: torch.dtype) -> float | int | bool:
    return 0.0 if dtype.is_floating_point else False if dtype == torch.bool else 0


def _contents(x: Any) -> Any:
    """Contents of a tensor on the CPU, None where they are not known; anything else is itself, devices are the CPU."""
    if isinstance(x, FakeTensor):
        return getattr(x, "_known", None)
    if isinstance(x, Tensor):
        return x.detach() if x.device.type == "cpu" else None
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """Fake tensors that an operator changes."""
    named = zip((a.name for a in func._schema.arguments), args)
    given = {**dict(named), **kwargs}
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in names for x in _tensors(given.get(name)) if isinstance(x, FakeTensor)]


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """What an operator gives on known contents; None where some are unknown or many."""
    given = _tensors((args, kwargs))
    if func.namespace != "aten" or func.overloadpacket.__name__.startswith(("empty", "new_empty")):
        return None
    if any(x.numel() > LARGEST or _contents(x) is None for x in given) or not (given or _small(args, kwargs)):
        return None
    with _disable_current_modes(), torch.no_grad():
        return func(*tree_map(_contents, args), **tree_map(_contents, kwargs))


def _small(args: tuple, kwargs: dict) -> bool:
    """Whether a tensor made from nothing is one of a few whole numbers, as an index or a count is."""
    dtype = kwargs.get("dtype")
    if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        return False
    size = args[0] if args and isinstance(args[0], list | tuple) else [1]
    count = 1
    for length in size:
        count *= length
    return count <= LARGEST
