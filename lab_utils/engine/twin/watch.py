"""What every operator of a step does to memory, counted products, and the few numbers that the host reads.

Values. A fake tensor has none, but hosts read some: how long documents are, how many tokens go to which rank. A tensor
of whole numbers that comes from the rows or from other such tensors carries its values with it (``known``), computed
beside the fake ones on the CPU; everything else has none. Where the host reads a number of the latter kind, it gets
what a good step would say: 0 for a floating-point number (a loss, a norm: finite), False for a verdict. A whole number
that only data decide is refused: sizes must not be made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lab_utils.engine.twin.ledger import Ledger

aten = torch.ops.aten
KNOWN_ELEMENTS = 1 << 24  # larger tensors carry no values: none that a host reads is
_VALUES = "_twin_known"


def known(tensor: Tensor) -> Tensor | None:
    """The values of a fake tensor, on the CPU, where it carries any."""
    values = getattr(tensor, _VALUES, None)
    return None if values is None or getattr(values.untyped_storage(), "stale", False) else values


def carry(fake: Tensor, values: Tensor) -> Tensor:
    """A fake tensor that carries these values."""
    setattr(fake, _VALUES, values)
    return fake


class Watch(TorchDispatchMode):
    """To be entered above a ``FakeTensorMode``.

    Args:
        ledger: takes up the memory of tensors on ``device``; of others it is the host's, and not followed.
        device: of the step.
    """

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        super().__init__()
        self.ledger, self.device = ledger, device
        self.flops = 0
        self.calls = 0
        self.read: dict[str, int] = {}  # numbers that the host was given, by what they were

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nobody compiles here, and torch's guard against it would be passed at every operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls += 1
        fakes, real = _tensors(args, kwargs)
        if real is not None and real.is_meta:
            with no_dispatch():  # the model before it is cut
                return func(*args, **kwargs)
        if not fakes and real is None and _is_meta(kwargs.get("device")):
            with no_dispatch():
                return func(*args, **kwargs)
        if real is not None and not fakes and func is not aten.lift_fresh.default:
            with no_dispatch():  # real numbers among themselves, as a generator's state
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func in _INDEXING:
            args = (args[0], self._as_places(args[1]), *args[2:])
        if func in _SHAPED_BY_VALUES:
            out, values = self._shaped(func, args, kwargs, fakes), None
        elif func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            out, values = _grouped_mm(*args, **kwargs), None
        else:
            out = func(*args, **kwargs)
            values = self._values(func, args, kwargs, fakes, real)
        if func is aten.lift_fresh.default and isinstance(out, FakeTensor):
            out.constant = None  # torch's own way to carry one number, which would compute on the device
        if values is not None:
            _give(out, values)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in _each(out):
            if tensor.device.type == self.device.type:
                self.ledger.see(tensor, str(func._overloadpacket).rpartition(".")[2])
        return out

    # -- values -------------------------------------------------------------------------------------------------------

    def _values(self, func, args, kwargs, fakes: list[Tensor], real: Tensor | None) -> Any:
        """What the operator gives on the values of its inputs, where all have some."""
        if func is aten.lift_fresh.default:
            with no_dispatch():
                return args[0].clone() if real is not None else None
        carried = [known(t) for t in fakes]
        if (
            all(v is not None for v in carried)
            and (fakes or func in _FACTORIES)
            and _small(func, args, kwargs)
        ):
            swap = lambda x: _swapped(x, known)  # noqa: E731
            options = {k: swap(v) for k, v in kwargs.items()}
            if options.get("device") is not None:
                options["device"] = torch.device("cpu")
            with no_dispatch():
                return func(*(swap(a) for a in args), **options)
        if func._schema.is_mutable:
            for tensor, values in zip(fakes, carried):
                if values is not None and _written(func, args, kwargs, tensor):
                    values.untyped_storage().stale = True
        return None

    def _shaped(self, func, args, kwargs, fakes: list[Tensor]) -> Any:
        """An operator whose output's shape is in its input's values."""
        if func is aten.bincount.default and known(args[0]) is None:
            size = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            with no_dispatch():
                values = _even(args[0].numel(), size, "cpu")
        else:
            values = self._values(func, args, kwargs, fakes, None)
        if values is None:
            raise RuntimeError(f"{func}: values that only data decide are a shape, and the twin has none.")
        made = [
            carry(torch.empty(v.shape, dtype=v.dtype, device=fakes[0].device), v)
            for v in (values if isinstance(values, tuple) else (values,))
        ]
        return tuple(made) if isinstance(values, tuple) else made[0]

    def _answer(self, tensor: Tensor) -> Any:
        values = known(tensor) if isinstance(tensor, FakeTensor) else tensor
        if values is not None:
            with no_dispatch():
                return values.item()
        if tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
            kind = "verdict, read as False" if tensor.dtype == torch.bool else "number, read as 0"
            self.read[kind] = self.read.get(kind, 0) + 1
            return False if tensor.dtype == torch.bool else 0.0
        raise RuntimeError(
            "The host reads a whole number that only data decide: the twin has none. Give the step a way to know it "
            "from the rows, or a door in lab_utils/engine/twin/doors.py."
        )

    def _as_places(self, indices: Any) -> Any:
        """A mask whose values are known, as the places that it names: their number is then a shape."""
        places: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                places.append(index)
                continue
            values = known(index)
            if values is None:
                raise RuntimeError(
                    "A mask that only data decide chooses rows: the twin cannot tell how many."
                )
            with no_dispatch():
                found = values.nonzero(as_tuple=True)
            places += [carry(torch.empty(f.shape, dtype=f.dtype, device=index.device), f) for f in found]
        return places


def even_counts(index_M: Tensor, size: int) -> Tensor:
    """How often each number below ``size`` occurs where only data choose them: as often as any other, the first ones
    once more. To be called within a ``Watch``, which then knows the values."""
    return _even(index_M.numel(), size, index_M.device)


def _even(total: int, size: int, device: Any) -> Tensor:
    whole, rest = divmod(total, size)
    first = torch.arange(size, device=device) < rest
    return torch.full((size,), whole, dtype=torch.int64, device=device) + first


@contextmanager
def lifting_only_on_the_host() -> Iterator[None]:
    """``torch.tensor(…, device=…)`` makes its tensor on the host and moves it, so that the move is seen."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
_SHAPED_BY_VALUES = {
    aten.bincount.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
_FACTORIES = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.scalar_tensor.default,
}


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Shapes of a grouped product in fp32, which a CPU computes and torch's own rule of shapes refuses."""
    if b.ndim == 2:
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _grouped(a, b, offs=None, bias=None, out_dtype=None, *, out_val=None, **_) -> int:
    """FLOPs of ``_grouped_mm``: every row of the first through one matrix; or, of two plain matrices, an outer product
    of each group."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _pointwise_linear(x, weight, *_, out_val=None, **__) -> int:
    return 2 * x.numel() * weight.shape[0]


def _sum_and_product(_, a, b, *args, out_val=None, **__) -> int:
    """torch's own formula takes no ``out_dtype``."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


_FLOPS: dict[Any, Callable[..., int]] = dict(flop_registry)
_FLOPS[aten.addmm] = _sum_and_product
_FLOPS[aten._grouped_mm] = _grouped
_FLOPS[aten.addmm_], _FLOPS[aten.baddbmm_] = _FLOPS[aten.addmm], _FLOPS[aten.baddbmm]
if torch.backends.mkldnn.is_available():
    _FLOPS[torch.ops.mkldnn._linear_pointwise] = _pointwise_linear


def _tensors(args: Any, kwargs: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    """The fake tensors among an operator's inputs, and one that is real, if any."""
    fakes: list[Tensor] = []
    real = None
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, FakeTensor):
                fakes.append(item)
            elif isinstance(item, Tensor):
                real = item
    return fakes, real


def _each(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for item in out:
            yield from _each(item)


def _swapped(value: Any, change: Callable[[Tensor], Tensor | None]) -> Any:
    if isinstance(value, FakeTensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_swapped(item, change) for item in value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _small(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the values are worth carrying: whole numbers, or made of carried ones, and not many."""
    if func is aten.scalar_tensor.default:
        return True
    if func in _FACTORIES:
        dtype = kwargs.get("dtype")
        whole = not dtype.is_floating_point if dtype is not None else all(isinstance(a, int) for a in args)
        shape = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
        size = 1
        for length in shape:
            size *= int(length) if isinstance(length, (int, float)) else 1
        return whole and size <= KNOWN_ELEMENTS
    return torch.Tag.nondeterministic_seeded not in func.tags


def _give(out: Any, values: Any) -> None:
    """Each output its values."""
    if isinstance(out, FakeTensor):
        if isinstance(values, Tensor) and values.numel() <= KNOWN_ELEMENTS and out.shape == values.shape:
            carry(out, values)
    elif isinstance(out, (list, tuple)):
        for one, value in zip(out, values):
            _give(one, value)


def _written(func: Any, args: Any, kwargs: dict[str, Any], tensor: Tensor) -> bool:
    """Whether the operator writes into this one of its inputs."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if any(each is tensor for each in (value if isinstance(value, (list, tuple)) else (value,))):
            return True
    return False


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"
