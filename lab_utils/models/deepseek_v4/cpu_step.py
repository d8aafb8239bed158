"""A decoding step on a CPU in fp32, where calls cost more than arithmetic: a few rows through a small model.

The same maths as ``block.py``, ``cache.py`` and the kernels have, on the same memory and the same caches, by as few
calls as can be: numpy's, which cost a third of torch's, and torch's own for whatever is one call there.
``tests/models/test_decoding.py`` holds it to the whole text. Every other device and precision takes the modules' way.

Legend: R rows, n streams, D model, H heads, K head dimension, I indexer dimension, X keys, C entries, S selected
entries, N rows that close a window, m compression rate, E experts, F expert width, k experts of a token, M = R·k.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.routing.reference import SCORES
from lab_utils.models.deepseek_v4.cpu_positions import Array, Now, Turns, f32

if TYPE_CHECKING:
    from lab_utils.models.deepseek_v4.attention import Attention
    from lab_utils.models.deepseek_v4.cache import AttentionCache
    from lab_utils.models.deepseek_v4.hyper_connections import HyperConnection, HyperHead
    from lab_utils.models.deepseek_v4.model import DeepseekV4
    from lab_utils.models.deepseek_v4.moe import MoE

# Elements of an expert's weight up to which a loop over the experts at work beats a grouped product.
LOOPED = 1 << 18
# Multiply-accumulates up to which OpenBLAS, which numpy's wheels carry, stays on the calling thread.
ONE_THREAD = 1 << 18
# Entries up to which those that are not selected are masked: copying the selected ones costs more.
MASKED = 256


def runs(model: DeepseekV4) -> bool:
    """Whether this way is open to the model."""
    whole = all(layer.mlp.experts.group is None for layer in model.model.layers)
    on_cpu = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return whole and on_cpu and getattr(model, "stage", None) is None


class CpuStep:
    """The model's weights as a step wants them (views; what lies side by side is a copy)."""

    def __init__(self, model: DeepseekV4, caches: dict[Attention, AttentionCache]) -> None:
        self.embedding = _array(model.model.embed_tokens.weight)
        self.streams, self.dense = model.config.hc_mult, model.warmup
        self.layers = [_Layer(layer, caches[layer.self_attn]) for layer in model.model.layers]
        self.head = _Head(model.model.hc_head)
        self.norm = _Norm(model.model.norm)
        self.vocabulary = _array(model.head_weight).T
        self.turns = Turns(model.rotary)

    def __call__(self, tokens: list[int], positions: list[int]) -> tuple[Tensor, NDArray]:
        """Logits ``[R, V]`` behind a token of each row, and the experts of each row ``[R, L, k]``."""
        ids_R = np.asarray(tokens)
        now = Now(positions, self.turns, self.dense)
        h_RnD = np.repeat(self.embedding[ids_R][:, None], self.streams, 1)
        experts = []
        for layer in self.layers:
            h_RnD, chosen_Rk = layer(h_RnD, ids_R, now)
            experts.append(chosen_Rk)
        logits_RV = _dot(self.norm(self.head(h_RnD)), self.vocabulary)
        return torch.from_numpy(logits_RV), np.stack(experts, 1)


class _Layer:
    def __init__(self, layer, cache: AttentionCache) -> None:
        self.attention, self.experts = _Attention(layer.self_attn, cache), _Experts(layer.mlp)
        self.norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.connections = _Connection(layer.attn_hc), _Connection(layer.ffn_hc)

    def __call__(self, h_RnD: Array, ids_R: NDArray, now: Now) -> tuple[Array, NDArray]:
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
        z = np.multiply(_dot(u, self.fn).T, _inverse_rms(u, self.norm_eps), order="C")
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
        z = _dot(u, self.fn) * _inverse_rms(u, self.norm_eps)[:, None]
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
        self.out = _one_product(self.out_a, self.out_b)
        self.pool_norms = [_Norm(pool.kv_norm) for pool in cache.pools]
        self.pool_at = _slices([len(norm.weight) for norm in self.pool_norms])
        if cache.pools:
            self.bias = _array(cache.bias_mF)

    def __call__(self, x_RD: Array, now: Now) -> Array:
        cache, R, into_at = self.cache, len(x_RD), self.into_at
        into = _dot(x_RD, self.into)
        queries = _dot(self.q_norm(into[:, into_at[0]]), self.queries)
        turn = now.turn(self.kind)
        keys = cache.keys_RXK.numpy()
        keys[now.rows_R, 1 + now.place(cache.start - 1)] = _rotate(self.kv_norm(into[:, into_at[1]]), turn)
        keys_RXK, bias_R1X = cache.keys_RXK, None
        if cache.pools:
            self._pool(into[:, into_at[2]], now)
            keys_RXK = cache.keys_RXK  # has room for the new entry
            if cache.indexer is not None and not now.dense and now.entries(cache.rate) > cache.indexer.topk:
                selected_RS = self._select(queries[:, self.queries_at[1]], into[:, into_at[3]], turn, now)
                keys_RXK, bias_R1X = self._selected(selected_RS, now)
        if bias_R1X is None:
            bias_R1X = now.bias(cache.start - 1, cache.rate if cache.pools else None)
        keys_RXK = keys_RXK[:R, : bias_R1X.shape[2]]
        q_RHK = queries[:, self.queries_at[0]].reshape(R, self.heads, -1)
        q_RHK = q_RHK * (_inverse_rms(q_RHK, self.eps) * f32(q_RHK.shape[-1] ** -0.5))[..., None]
        scores = torch.bmm(torch.from_numpy(_rotate(q_RHK, turn[:, None])), keys_RXK.transpose(1, 2))
        raw = scores.numpy()
        raw += bias_R1X
        raw[:, :, 0] = self.sinks
        out_RHK = _rotate(torch.bmm(scores.softmax(-1), keys_RXK).numpy(), turn.conj()[:, None])
        if self.out is not None:
            return _dot(out_RHK.reshape(R, -1), self.out)
        out_RGX = torch.from_numpy(out_RHK.reshape(R, len(self.out_a), -1))
        inner = torch.bmm(out_RGX.transpose(0, 1), self.out_a)
        return _dot(inner.transpose(0, 1).reshape(R, -1).numpy(), self.out_b)

    def _pool(self, projected_RF: Array, now: Now) -> None:
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
        cache._make_room(now.entries(m))
        entries, *keys = (
            _rotate(norm(pooled[:, at]), closing.turn)
            for norm, at in zip(self.pool_norms, self.pool_at, strict=True)
        )
        cache.keys_RXK.numpy()[closing.rows_N, cache.start + closing.entry_N] = entries
        if keys:
            cache.index_RCI.numpy()[closing.rows_N, closing.entry_N] = keys[0]

    def _select(self, q_RX: Array, scored_RH: Array, turn: NDArray, now: Now) -> NDArray:
        """Entries that each row attends ``[R, S]``; where there are fewer, some that it does not see."""
        cache, indexer, R = self.cache, self.cache.indexer, len(q_RX)
        C = now.entries(cache.rate)
        q_RHI = _rotate(q_RX.reshape(R, indexer.heads, -1), turn[:, None])
        dots = torch.bmm(torch.from_numpy(q_RHI), cache.index_RCI[:R, :C].transpose(1, 2)).relu_()
        weights = torch.from_numpy(scored_RH * f32(indexer.scorer.factor))
        scores_RC = torch.bmm(weights[:, None], dots)[:, 0].numpy()
        # As kernels._support.break_ties: of several zeros the earliest entry ranks first.
        np.copyto(scores_RC, np.arange(1, C + 1, dtype=f32) * f32(-1e-30), where=scores_RC == 0)
        scores_RC += now.hidden(cache.rate)
        return np.argpartition(scores_RC, C - indexer.topk, 1)[:, C - indexer.topk :]

    def _selected(self, selected_RS: NDArray, now: Now) -> tuple[Tensor, Array]:
        """Keys ``[≥ R, ≥ X, K]`` and what is added to their scores ``[R, 1, X]``."""
        cache, rows_R1 = self.cache, now.rows_R[:, None]
        hidden_RC, window = now.hidden(cache.rate), now.bias(cache.start - 1, None)
        if hidden_RC.shape[1] <= MASKED:
            bias_RC = np.full_like(hidden_RC, -np.inf)
            bias_RC[rows_R1, selected_RS] = hidden_RC[rows_R1, selected_RS]
            return cache.keys_RXK, np.concatenate([window, bias_RC[:, None]], 2)
        keys = cache.keys_RXK.numpy()
        keys_RXK = np.concatenate(
            [keys[: len(rows_R1), : cache.start], keys[rows_R1, cache.start + selected_RS]], 1
        )
        bias_R1X = np.concatenate([window, hidden_RC[rows_R1, selected_RS][:, None]], 2)
        return torch.from_numpy(keys_RXK), bias_R1X


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
        scores_RE = SCORES[self.options["scoring"]](torch.from_numpy(_dot(x_RD, self.router))).numpy()
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
        y_RD += _dot(self._swiglu(_dot(x_RD, self.shared_in)), self.shared_out)
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
        weights = weight_EXY.numpy()
        out = np.empty((len(x_MX), weights.shape[2]), f32)
        start = 0
        for weight, stop in zip(weights, ends_E.tolist(), strict=True):
            if start < stop:
                _dot(x_MX[start:stop], weight, out[start:stop])
            start = stop
        return out

    def _swiglu(self, hidden_MG: Array) -> Array:
        width = hidden_MG.shape[1] // 2
        gate = np.minimum(hidden_MG[:, :width], f32(self.limit))
        act = F.silu(torch.from_numpy(gate)).numpy()
        act *= np.maximum(np.minimum(hidden_MG[:, width:], f32(self.limit)), f32(-self.limit))
        return act


def _one_product(out_a_GXY: Tensor, out_b_ZD: Array) -> Array | None:
    """The groups' output projections and the one behind them as one matrix, where that has fewer elements."""
    G, X, Y = out_a_GXY.shape
    if G * X * out_b_ZD.shape[1] > out_a_GXY.numel() + out_b_ZD.size:
        return None
    return torch.bmm(out_a_GXY, torch.from_numpy(out_b_ZD).reshape(G, Y, -1)).flatten(0, 1).numpy()


@cache
def _sums(n: int, dim: int, eps: float) -> Array:
    """Times the n² numbers of a matrix and a 1: for each of them the sum along ``dim`` through it plus eps, and 1."""
    same = np.eye(n, dtype=f32)
    all_ = np.ones((n, n), f32)
    out = np.zeros((n * n + 1, n * n + 1), f32)
    out[:-1, :-1] = np.kron(all_, same) if dim == 0 else np.kron(same, all_)
    out[:-1, -1], out[-1, -1] = eps, 1
    return out


def _dot(a_MK: Array, b_KN: Array, out_MN: Array | None = None) -> Array:
    """A product, by whichever library starts sooner; of numpy's, none that would wake its threads beside torch's."""
    if len(a_MK) * b_KN.size <= ONE_THREAD:
        return np.dot(a_MK, b_KN, out_MN)
    out = None if out_MN is None else torch.from_numpy(out_MN)
    return torch.mm(torch.from_numpy(a_MK), torch.from_numpy(b_KN), out=out).numpy()


def _slices(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _mixed(h_RnD: Array, y_RD: Array, post_Rn: Array, comb_jkR: Array) -> Array:
    """The streams after a block; ``kernels/hyper_connection_post``."""
    out = np.matmul(comb_jkR.transpose(2, 1, 0), h_RnD)
    out += post_Rn[:, :, None] * y_RD[:, None]
    return out


def _inverse_rms(x: Array, eps: np.float32) -> Array:
    size = f32(x.shape[-1])
    squares = np.vecdot(x, x)
    squares += size * eps
    np.divide(size, squares, out=squares)
    return np.sqrt(squares, out=squares)


def _rotate(x: Array, turn: NDArray[np.complex64]) -> Array:
    """The last channels of x rotated in place, by pairs."""
    x[..., x.shape[-1] - 2 * turn.shape[-1] :].view(np.complex64)[...] *= turn
    return x


def _array(x: Tensor) -> Array:
    return x.detach().numpy()
