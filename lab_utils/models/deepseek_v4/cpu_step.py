"""A decoding step on a CPU in fp32, where calls cost more than arithmetic: a few rows through a small model.

The same maths as ``block.py``, ``cache.py`` and the kernels have, on the same memory and the same caches, by as few
calls as can be: numpy's, which cost a third of torch's, and torch's own for whatever is one call there.
``tests/models/test_decoding.py`` holds it to the whole text. Every other device and precision takes the modules' way.

Legend: R rows, n streams, D model, H heads, K head dimension, I indexer dimension, X keys, C entries, S selected
entries, N rows that close a window, m compression rate, E experts, F expert width, k experts of a token, M = R·k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.routing.reference import SCORES

if TYPE_CHECKING:
    from lab_utils.models.deepseek_v4.attention import Attention
    from lab_utils.models.deepseek_v4.cache import AttentionCache, Step
    from lab_utils.models.deepseek_v4.hyper_connections import HyperConnection, HyperHead
    from lab_utils.models.deepseek_v4.model import DeepseekV4
    from lab_utils.models.deepseek_v4.moe import MoE

Array = NDArray[np.float32]
# Elements of an expert's weight up to which a loop over the experts at work beats a grouped product.
LOOPED = 1 << 18
# Entries up to which those that are not selected are masked: copying the selected ones costs more.
MASKED = 256
f32 = np.float32


def runs(model: DeepseekV4) -> bool:
    """Whether this way is open to the model."""
    whole = all(layer.mlp.experts.group is None for layer in model.model.layers)
    on_cpu = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return whole and on_cpu and getattr(model, "stage", None) is None


class CpuStep:
    """The model's weights as a step wants them (views; what lies side by side is a copy)."""

    def __init__(self, model: DeepseekV4, caches: dict[Attention, AttentionCache]) -> None:
        self.embedding = _array(model.model.embed_tokens.weight)
        self.streams = model.config.hc_mult
        self.layers = [_Layer(layer, caches[layer.self_attn]) for layer in model.model.layers]
        self.head = _Head(model.model.hc_head)
        self.norm = _Norm(model.model.norm)

    def __call__(self, tokens: list[int], step: Step) -> tuple[Tensor, NDArray | None]:
        """Final hidden states ``[R, D]``, and the experts of each row ``[R, L, k]``."""
        ids_R = np.asarray(tokens)
        now = _Now(step)
        h_RnD = np.repeat(self.embedding[ids_R][:, None], self.streams, 1)
        experts = []
        for layer in self.layers:
            h_RnD, chosen_Rk = layer(h_RnD, ids_R, now)
            experts.append(chosen_Rk)
        return torch.from_numpy(self.norm(self.head(h_RnD))), np.stack(experts, 1)


class _Now:
    """What the layers read of a step, as arrays; what ``Step`` doesn't keep is made once here."""

    def __init__(self, step: Step) -> None:
        self.step, self._made = step, {}
        self.rows_R = step.rows_R.numpy()
        self.position_R = step.position_R.numpy()

    def turn(self, kind: str) -> NDArray[np.complex64]:
        """Rotation of each row ``[R, pairs]``."""
        return self._once(("turn", kind), lambda: _turn(self.step.rotary(kind, self.step.position_R)))

    def place(self, ring: int) -> NDArray:
        return self._once(("place", ring), lambda: self.position_R % ring)

    def bias(self, window: int, rate: int | None, columns: int) -> Array:
        return self.step.bias(window, rate, columns).numpy()

    def hidden(self, rate: int, entries: int) -> NDArray:
        return self.step.hidden(rate, entries).numpy()

    def closing(self, rate: int, overlap: bool) -> _Closing | None:
        def make() -> _Closing | None:
            found = self.step.closing(rate, overlap)
            if found is None:
                return None
            fresh = found.fresh_N11.numpy() if found.fresh_N11 is not None else None
            rows, order, entry = (x.numpy() for x in (found.rows_N, found.order_NY, found.entry_N))
            return _Closing(rows, order, fresh, entry, _turn(found.angles))

        return self._once(("closing", rate, overlap), make)

    def _once(self, key: tuple, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class _Closing(NamedTuple):
    """``cache.Closing`` as arrays."""

    rows_N: NDArray
    order_NY: NDArray
    fresh_N11: NDArray | None
    entry_N: NDArray
    turn: NDArray[np.complex64]


class _Layer:
    def __init__(self, layer, cache: AttentionCache) -> None:
        self.attention, self.experts = _Attention(layer.self_attn, cache), _Experts(layer.mlp)
        self.norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.connections = _Connection(layer.attn_hc), _Connection(layer.ffn_hc)

    def __call__(self, h_RnD: Array, ids_R: NDArray, now: _Now) -> tuple[Array, NDArray]:
        x_RD, post, comb = self.connections[0](h_RnD)
        h_RnD = _mixed(h_RnD, self.attention(self.norms[0](x_RD), now), post, comb)
        x_RD, post, comb = self.connections[1](h_RnD)
        y_RD, chosen_Rk = self.experts(self.norms[1](x_RD), ids_R)
        return _mixed(h_RnD, y_RD, post, comb), chosen_Rk


class _Norm:
    def __init__(self, norm) -> None:
        self.weight, self.eps = _array(norm.weight), f32(norm.eps)

    def __call__(self, x_RD: Array) -> Array:
        out = x_RD * _inverse_rms(x_RD, self.eps)[:, None]
        out *= self.weight
        return out


class _Connection:
    """The way in of a hyper-connection; ``kernels/hyper_connection_pre``."""

    def __init__(self, connection: HyperConnection) -> None:
        options = connection.options
        self.n = n = int((1 + len(connection.base)) ** 0.5) - 1  # n(n+2) coefficients
        self.fn = _array(connection.fn).T
        self.base = _array(connection.base)[:, None]
        self.factor = np.repeat(_array(connection.scale), [n, n, n * n])[:, None]
        self.eps, self.norm_eps = f32(options["eps"]), f32(options["norm_eps"])
        sums = [_sums(n, dim, options["eps"]) for dim in (0, 1)]
        self.sums = [sums[dim] for dim in (0, *(1, 0) * (options["iterations"] - 1))]

    def __call__(self, h_RnD: Array) -> tuple[Array, Array, Array]:
        """Collapsed ``[R, D]``, post ``[R, n]`` and comb ``[n, n, R]`` (rows last)."""
        R, n, _ = h_RnD.shape
        u = h_RnD.reshape(R, -1)
        z = np.multiply(np.dot(u, self.fn).T, _inverse_rms(u, self.norm_eps), order="C")
        z *= self.factor
        z += self.base
        gates = torch.sigmoid(torch.from_numpy(z[: 2 * n])).numpy().T
        comb = torch.from_numpy(z[2 * n :].reshape(n, n, R)).softmax(1).numpy()
        pre = gates[:, :n] + self.eps
        return np.matmul(pre[:, None], h_RnD)[:, 0], gates[:, n:] * f32(2), self._balanced(comb)

    def _balanced(self, comb_jkR: Array) -> Array:
        """Divided by sums plus eps along both dimensions in turn (Sinkhorn), two calls a time."""
        n, _, R = comb_jkR.shape
        parts = np.ones((n * n + 1, R), f32)
        np.add(comb_jkR.reshape(n * n, R), self.eps, out=parts[:-1])
        divisors = np.empty_like(parts)
        for sums in self.sums:
            np.dot(sums, parts, out=divisors)
            np.divide(parts, divisors, out=parts)
        return parts[:-1].reshape(n, n, R)


class _Head:
    """The streams' last collapse."""

    def __init__(self, head: HyperHead) -> None:
        self.fn, self.base, self.scale = _array(head.hc_fn).T, _array(head.hc_base), _array(head.hc_scale)
        self.eps, self.norm_eps = f32(head.eps), f32(head.norm_eps)

    def __call__(self, h_RnD: Array) -> Array:
        u = h_RnD.reshape(len(h_RnD), -1)
        z = np.dot(u, self.fn) * _inverse_rms(u, self.norm_eps)[:, None]
        a = torch.sigmoid(torch.from_numpy(z * self.scale + self.base)).numpy() + self.eps
        return np.matmul(a[:, None], h_RnD)[:, 0]


class _Attention:
    """A token of each row against an ``AttentionCache``; what it does step by step is said there."""

    def __init__(self, attention: Attention, cache: AttentionCache) -> None:
        self.cache, self.kind, self.heads = cache, attention.rope_kind, attention.heads
        self.eps, self.sinks = f32(attention.eps), _array(attention.sinks)
        self.into, self.queries = _array(cache.into).T, _array(cache.queries).T
        self.into_at, self.queries_at = _slices(cache.into_sizes), _slices(cache.query_sizes)
        self.q_norm, self.kv_norm = _Norm(attention.q_a_norm), _Norm(attention.kv_norm)
        groups = attention.o_a_proj.groups
        self.out_a = attention.o_a_proj.weight.detach().unflatten(0, (groups, -1)).transpose(1, 2)
        self.out_b = _array(attention.o_b_proj.weight).T
        self.pool_norms = [_Norm(pool.kv_norm) for pool in cache.pools]
        self.pool_at = _slices([len(norm.weight) for norm in self.pool_norms])
        if cache.pools:
            self.bias = _array(cache.bias_mF)

    def __call__(self, x_RD: Array, now: _Now) -> Array:
        cache, R, step = self.cache, len(x_RD), now.step
        into = np.dot(x_RD, self.into)
        q_a, kv, *pooled = [into[:, at] for at in self.into_at]
        queries = np.dot(self.q_norm(q_a), self.queries)
        queries = [queries[:, at] for at in self.queries_at]
        turn = now.turn(self.kind)
        keys = cache.keys_RXK.numpy()
        keys[now.rows_R, 1 + now.place(cache.start - 1)] = _rotate(self.kv_norm(kv), turn)
        selected_RS = None
        if cache.pools:
            self._pool(pooled[0], now)
            if cache.indexer is not None and not step.dense and step.entries(cache.rate) > cache.indexer.topk:
                selected_RS = self._select(queries[1], pooled[1], turn, now)
        keys_RXK, bias_R1X = self._attended(selected_RS, now)
        q_RHK = queries[0].reshape(R, self.heads, -1)
        q_RHK = q_RHK * (_inverse_rms(q_RHK, self.eps) * f32(q_RHK.shape[-1] ** -0.5))[..., None]
        scores = torch.bmm(torch.from_numpy(_rotate(q_RHK, turn[:, None])), keys_RXK.transpose(1, 2))
        raw = scores.numpy()
        raw += bias_R1X
        raw[:, :, 0] = self.sinks
        out_RHK = torch.bmm(scores.softmax(-1), keys_RXK).numpy()
        out_RHK = _rotate(out_RHK, turn.conj()[:, None]).reshape(R, len(self.out_a), -1)
        inner = torch.bmm(torch.from_numpy(out_RHK).transpose(0, 1), self.out_a)
        return np.dot(inner.transpose(0, 1).reshape(R, -1).numpy(), self.out_b)

    def _pool(self, projected_RF: Array, now: _Now) -> None:
        cache, m = self.cache, self.cache.rate
        ring = cache.ring_RYF.numpy()
        ring[now.rows_R, now.place(cache.ring)] = projected_RF
        closing = now.closing(m, cache.overlap)
        if closing is None:
            return
        block = ring[closing.rows_N[:, None], closing.order_NY]
        F2 = block.shape[2] // 2
        kv, gate = block[..., :F2], block[..., F2:]
        if cache.overlap:
            half = F2 // 2
            gates = np.empty((len(block), 2 * m, half), f32)
            np.add(gate[:, :m, :half], self.bias[:, :half], out=gates[:, :m])
            np.add(gate[:, m:, half:], self.bias[:, half:], out=gates[:, m:])
            np.copyto(gates[:, :m], f32(-np.inf), where=closing.fresh_N11)
            kv = np.concatenate([kv[:, :m, :half], kv[:, m:, half:]], 1)
        else:
            gates = gate + self.bias
        pooled = np.add.reduce(kv * torch.from_numpy(gates).softmax(1).numpy(), 1)
        cache._make_room(now.step.entries(m))
        entries, *keys = (
            _rotate(norm(pooled[:, at]), closing.turn)
            for norm, at in zip(self.pool_norms, self.pool_at, strict=True)
        )
        cache.keys_RXK.numpy()[closing.rows_N, cache.start + closing.entry_N] = entries
        if keys:
            cache.index_RCI.numpy()[closing.rows_N, closing.entry_N] = keys[0]

    def _select(self, q_RX: Array, scored_RH: Array, turn: NDArray, now: _Now) -> NDArray:
        cache, indexer, R = self.cache, self.cache.indexer, len(q_RX)
        C = now.step.entries(cache.rate)
        q_RHI = _rotate(q_RX.reshape(R, indexer.heads, -1), turn[:, None])
        dots = torch.bmm(torch.from_numpy(q_RHI), cache.index_RCI[:R, :C].transpose(1, 2)).relu_()
        weights = torch.from_numpy(scored_RH * f32(indexer.scorer.factor))
        scores_RC = torch.bmm(weights[:, None], dots)[:, 0].numpy()
        # As kernels._support.break_ties: of several zeros the earliest entry ranks first.
        scores_RC = np.where(scores_RC == 0, np.arange(1, C + 1, dtype=f32) * f32(-1e-30), scores_RC)
        scores_RC[now.hidden(cache.rate, C)] = -np.inf
        values, selected_RS = torch.from_numpy(scores_RC).topk(indexer.topk, -1)
        return np.where(values.numpy() == -np.inf, -1, selected_RS.numpy())

    def _attended(self, selected_RS: NDArray | None, now: _Now) -> tuple[Tensor, Array]:
        cache, R, window = self.cache, len(now.rows_R), self.cache.start - 1
        if selected_RS is None:
            rate = cache.rate if cache.pools else None
            C = now.step.entries(rate) if rate else 0
            return cache.keys_RXK[:R, : cache.start + C], now.bias(window, rate, C)
        C = now.step.entries(cache.rate)
        bias_R1X = now.bias(window, None, 0)
        if C <= MASKED:
            seen_RC = np.full((R, C + 1), f32(-np.inf))  # the last one is for those that are none: number -1
            seen_RC[now.rows_R[:, None], selected_RS] = 0
            bias_R1X = np.concatenate([bias_R1X, seen_RC[:, None, :C]], 2)
            return cache.keys_RXK[:R, : cache.start + C], bias_R1X
        keys = cache.keys_RXK.numpy()
        chosen_RSK = keys[now.rows_R[:, None], cache.start + np.maximum(selected_RS, 0)]
        none_RS = np.where(selected_RS < 0, f32(-np.inf), f32(0))
        keys_RXK = np.concatenate([keys[:R, : cache.start], chosen_RSK], 1)
        return torch.from_numpy(keys_RXK), np.concatenate([bias_R1X, none_RS[:, None]], 2)


class _Experts:
    """Router, routed experts and the shared one."""

    def __init__(self, moe: MoE) -> None:
        gate, experts, shared = moe.gate, moe.experts, moe.shared_experts
        self.router, self.options = _array(gate.weight).T, gate.options
        self.table = gate.tid2eid.numpy() if gate.hashed else None
        self.bias = None if gate.hashed else _array(gate.e_score_correction_bias)
        self.gate_up, self.down = (
            w.detach().transpose(1, 2) for w in (experts.gate_up_proj, experts.down_proj)
        )
        self.limit = experts.limit
        self.looped = self.gate_up[0].numel() <= LOOPED
        self.shared_in = np.concatenate([_array(shared.gate_proj.weight), _array(shared.up_proj.weight)]).T
        self.shared_out = _array(shared.down_proj.weight).T

    def __call__(self, x_RD: Array, ids_R: NDArray) -> tuple[Array, NDArray]:
        scores_RE = SCORES[self.options["scoring"]](torch.from_numpy(np.dot(x_RD, self.router))).numpy()
        k = self.options["k"]
        if self.table is not None:
            chosen_Rk = self.table[ids_R]
        else:
            chosen_Rk = np.argpartition(-(scores_RE + self.bias), k - 1, 1)[:, :k]
        weights_Rk = scores_RE[np.arange(len(ids_R))[:, None], chosen_Rk]
        weights_Rk = weights_Rk * (
            f32(self.options["scaling"]) / (np.add.reduce(weights_Rk, 1, keepdims=True) + f32(1e-20))
        )
        y_RD = self._routed(x_RD, chosen_Rk, weights_Rk)
        y_RD += np.dot(self._swiglu(np.dot(x_RD, self.shared_in)), self.shared_out)
        return y_RD, chosen_Rk

    def _routed(self, x_RD: Array, chosen_Rk: NDArray, weights_Rk: Array) -> Array:
        flat_M = chosen_Rk.reshape(-1)
        order_M = np.argsort(flat_M, kind="stable")
        rows_MD = x_RD[order_M // chosen_Rk.shape[1]]
        ends_E = np.cumsum(np.bincount(flat_M, minlength=len(self.gate_up)))
        act_MF = self._swiglu(self._grouped(rows_MD, self.gate_up, ends_E))
        act_MF *= weights_Rk.reshape(-1, 1)[order_M]
        out_MD = np.empty_like(rows_MD)
        out_MD[order_M] = self._grouped(act_MF, self.down, ends_E)
        return np.add.reduce(out_MD.reshape(*chosen_Rk.shape, -1), 1)

    def _grouped(self, x_MX: Array, weight_EXY: Tensor, ends_E: NDArray) -> Array:
        if not self.looped:
            ends = torch.from_numpy(ends_E.astype(np.int32))
            return F.grouped_mm(torch.from_numpy(x_MX), weight_EXY, offs=ends).numpy()
        weights, dot = weight_EXY.numpy(), np.dot
        out = np.empty((len(x_MX), weights.shape[2]), f32)
        start = 0
        for weight, stop in zip(weights, ends_E.tolist(), strict=True):
            if start < stop:
                dot(x_MX[start:stop], weight, out[start:stop])
            start = stop
        return out

    def _swiglu(self, hidden_MG: Array) -> Array:
        width = hidden_MG.shape[1] // 2
        gate = np.minimum(hidden_MG[:, :width], f32(self.limit))
        act = F.silu(torch.from_numpy(gate)).numpy()
        act *= np.maximum(np.minimum(hidden_MG[:, width:], f32(self.limit)), f32(-self.limit))
        return act


def _sums(n: int, dim: int, eps: float) -> Array:
    """Times the n² numbers of a matrix and a 1: for each of them the sum along ``dim`` through it plus eps, and 1."""
    same = np.eye(n, dtype=f32)
    all_ = np.ones((n, n), f32)
    out = np.zeros((n * n + 1, n * n + 1), f32)
    out[:-1, :-1] = np.kron(all_, same) if dim == 0 else np.kron(same, all_)
    out[:-1, -1], out[-1, -1] = eps, 1
    return out


def _slices(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _mixed(h_RnD: Array, y_RD: Array, post_Rn: Array, comb_jkR: Array) -> Array:
    """The streams after a block; ``kernels/hyper_connection_post``."""
    out = np.matmul(comb_jkR.transpose(2, 1, 0), h_RnD)
    out += post_Rn[:, :, None] * y_RD[:, None]
    return out


def _inverse_rms(x: Array, eps: np.float32) -> Array:
    return f32(1) / np.sqrt(np.vecdot(x, x) / f32(x.shape[-1]) + eps)


def _rotate(x: Array, turn: NDArray[np.complex64]) -> Array:
    """The last channels of x rotated in place, by pairs."""
    x[..., x.shape[-1] - 2 * turn.shape[-1] :].view(np.complex64)[...] *= turn
    return x


def _turn(angles: tuple[Tensor, Tensor]) -> NDArray[np.complex64]:
    return torch.complex(*angles).numpy()


def _array(x: Tensor) -> Array:
    return x.detach().numpy()
