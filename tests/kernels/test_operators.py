"""Every operator against its definition: values and gradients, in fp64 on random packed rows."""

from __future__ import annotations

import pytest
import torch

from kernels import registry
from kernels.geometry import Geometry
from kernels.indexer_select.reference import scores as index_scores

SEEDS = range(4)


def packed(generator: torch.Generator, rows: int, tokens: int, longest: int) -> Geometry:
    """Rows of documents of random lengths, the last stretch of each row padding."""
    positions, documents = torch.zeros(2, rows, tokens, dtype=torch.long)
    for row in range(rows):
        start, document = 0, 0
        while start < tokens:
            length = min(int(torch.randint(1, longest, (1,), generator=generator)), tokens - start)
            positions[row, start : start + length] = torch.arange(length)
            documents[row, start : start + length] = document
            start, document = start + length, document + 1
        documents[row, documents[row] == document - 1] = -1
    return Geometry(positions, documents)


def agree(
    operator: str,
    inputs: dict[str, torch.Tensor],
    options: dict,
    differentiable: list[str],
    rtol: float = 1e-7,
) -> None:
    """All implementations give the reference's outputs and gradients, to ``rtol`` of their largest number."""
    results = {}
    for name in registry.implementations(operator):
        with registry.force(**{operator: name}):
            run = registry.get(
                operator, "cpu", next(x.dtype for x in inputs.values() if x.is_floating_point())
            )
        leaves = {k: v.clone().requires_grad_(k in differentiable) for k, v in inputs.items()}
        outputs = run(**leaves, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator, loss = torch.Generator().manual_seed(0), 0
        for output in outputs:
            if output is not None and output.requires_grad:
                loss = (
                    loss + (output * torch.randn(output.shape, dtype=output.dtype, generator=generator)).sum()
                )
        if differentiable:
            loss.backward()
        results[name] = [o for o in outputs if o is not None] + [leaves[k].grad for k in differentiable]
    expected = results.pop("reference")
    assert results, f"{operator} has nothing to compare with its reference"
    for name, found in results.items():
        for a, b in zip(found, expected, strict=True):
            close = {"rtol": rtol, "atol": rtol * max(float(b.detach().double().abs().max()), 1e-2)}
            torch.testing.assert_close(a, b, **close, msg=lambda m, n=name: f"{operator}/{n}: {m}")


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_rms_norm(seed):
    g = torch.Generator().manual_seed(seed)
    agree("rms_norm", {"x": normal(g, 3, 5, 16), "weight": normal(g, 16)}, {"eps": 1e-6}, ["x", "weight"])


@pytest.mark.parametrize("seed", SEEDS)
def test_rope(seed):
    g = torch.Generator().manual_seed(seed)
    angle = normal(g, 2, 7, 1, 3)
    agree("rope", {"x": normal(g, 2, 7, 4, 10)}, {"cos": angle.cos(), "sin": angle.sin()}, ["x"])


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_hyper_connection(seed, streams):
    g, n, D = torch.Generator().manual_seed(seed), streams, 12
    pre = {
        "h_NnD": normal(g, 9, n, D),
        "fn": normal(g, n * (n + 2), n * D) / 4,
        "base": normal(g, n * (n + 2)),
        "scale": normal(g, 3),
    }
    agree("hyper_connection_pre", pre, {"iterations": 5, "eps": 1e-6, "norm_eps": 1e-6}, list(pre))
    post = {
        "h_NnD": normal(g, 9, n, D),
        "y_ND": normal(g, 9, D),
        "post_Nn": normal(g, 9, n),
        "comb_Njk": normal(g, 9, n, n),
    }
    agree("hyper_connection_post", post, {}, list(post))


@pytest.mark.parametrize("rate, overlap", [(4, True), (3, False), (8, True), (50, True)])
@pytest.mark.parametrize("seed", SEEDS)
def test_compressor(seed, rate, overlap):
    g = torch.Generator().manual_seed(seed)
    inner = 10 if overlap else 5
    geometry = (
        packed(g, 2, 43, 20) if seed else Geometry(torch.arange(43).expand(2, 43), torch.zeros(2, 43).long())
    )
    entries = geometry.entries(rate)
    inputs = {
        "kv_BTF": normal(g, 2, 43, inner),
        "gate_BTF": normal(g, 2, 43, inner),
        "bias_mF": normal(g, rate, inner),
    }
    used = torch.zeros(2, entries.count, 1, dtype=torch.float64)
    for row in range(2):
        used[row, : int((entries.first_BT[row] + entries.visible_BT[row]).max())] = 1

    def masked(run):
        return lambda **arguments: run(**arguments) * used  # what no query sees may differ

    results = {}
    for name in ("torch", "reference"):
        with registry.force(compressor=name):
            run = masked(registry.get("compressor"))
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        out = run(**leaves, geometry=geometry, rate=rate, overlap=overlap)
        if out.numel():
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results[name] = [out, *(leaf.grad for leaf in leaves.values())]
    for a, b in zip(results["torch"], results["reference"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rate, topk", [(None, None), (4, None), (4, 3), (16, None)])
@pytest.mark.parametrize("seed", SEEDS)
def test_shared_kv_attention(seed, rate, topk):
    g = torch.Generator().manual_seed(seed)
    T = 45
    geometry = packed(g, 3, T, 30)
    angle = normal(g, 3, T, 2)
    inputs = {"q_BTHK": normal(g, 3, T, 2, 8), "kv_BTK": normal(g, 3, T, 8), "sinks_H": normal(g, 2)}
    options = {"cos_BTR": angle.cos(), "sin_BTR": angle.sin(), "geometry": geometry, "window": 7, "eps": 1e-6}
    if rate:
        inputs["entries_BCK"] = normal(g, 3, T // rate, 8)
        options |= {"rate": rate, "want_mass": True}
    if topk:
        select = registry.get("indexer_select")
        arguments = normal(g, 3, T, 2, 4), normal(g, 3, T // rate, 4), normal(g, 3, T, 2)
        options["selected_BTS"] = select(*arguments, geometry, rate=rate, topk=topk)
    agree("shared_kv_attention", inputs, options, list(inputs))


def test_shared_kv_attention_does_not_depend_on_the_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    positions = torch.arange(90).expand(2, 90)
    angle = normal(g, 2, 90, 2)
    q, kv, sinks, entries = normal(g, 2, 90, 2, 8), normal(g, 2, 90, 8), normal(g, 2), normal(g, 2, 22, 8)
    outputs = []
    for elements in (1 << 20, 4000, 1):
        monkeypatch.setattr("kernels.geometry.CHUNK_ELEMENTS", elements)
        geometry = Geometry(positions, torch.zeros(2, 90).long())
        run = registry.get("shared_kv_attention")
        out, _ = run(
            q, kv, sinks, angle.cos(), angle.sin(), geometry, window=8, eps=1e-6, entries_BCK=entries, rate=4
        )
        outputs.append(out)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_indexer_select_keeps_the_best_visible_entries(seed):
    g = torch.Generator().manual_seed(seed)
    geometry = packed(g, 2, 150, 130)
    arguments = normal(g, 2, 150, 3, 4), normal(g, 2, 37, 4), normal(g, 2, 150, 3)
    scores = torch.nn.functional.pad(index_scores(*arguments, geometry, 4), (0, 1), value=float("-inf"))
    chosen = {}
    for name in ("torch", "reference"):
        with registry.force(indexer_select=name):
            selected = registry.get("indexer_select")(*arguments, geometry, rate=4, topk=5)
        assert all(
            len(set(row)) == len(row)
            for row in ([i for i in r if i >= 0] for r in selected.flatten(0, 1).tolist())
        )
        # Entries that no head likes tie at zero, so the choice is compared by its scores.
        chosen[name] = scores.gather(2, torch.where(selected < 0, 37, selected)).sort(-1).values
    torch.testing.assert_close(chosen["torch"], chosen["reference"])
    assert chosen["torch"].isfinite().any() and chosen["torch"].isinf().any()


@pytest.mark.parametrize("topk", [None, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_indexer_kl(seed, topk):
    g = torch.Generator().manual_seed(seed)
    geometry = packed(g, 2, 150, 130)
    inputs = {
        "q_BTHK": normal(g, 2, 150, 3, 4),
        "keys_BCK": normal(g, 2, 37, 4),
        "weights_BTH": normal(g, 2, 150, 3),
    }
    mass, selected = normal(g, 2, 150, 37).square(), None
    entries, slots = geometry.entries(4), torch.arange(37)
    first, visible = entries.first_BT[..., None], entries.visible_BT[..., None]
    mass = mass * ((slots >= first) & (slots < first + visible))  # attention has none where it may not look
    if topk:
        selected = registry.get("indexer_select")(*inputs.values(), geometry, rate=4, topk=topk)
        mass = mass.gather(2, selected.clamp(min=0)) * (selected >= 0)
    options = {"mass": mass, "geometry": geometry, "rate": 4, "selected_BTS": selected}
    agree("indexer_kl", inputs, options, list(inputs))


@pytest.mark.parametrize("size", [0.5, 8.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_grouped_swiglu(seed, size):
    g, N, D, E, F, k = torch.Generator().manual_seed(seed), 13, 8, 5, 4, 2
    inputs = {
        "x_ND": normal(g, N, D) * size,
        "experts_Nk": torch.rand(N, E - 1, generator=g).argsort(1)[:, :k],  # the last expert gets no token
        "weights_Nk": normal(g, N, k).abs(),
        "gate_up_EGD": normal(g, E, 2 * F, D),
        "down_EDF": normal(g, E, D, F),
    }
    # Grouped products know no fp64.
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    names = ["x_ND", "weights_Nk", "gate_up_EGD", "down_EDF"]
    agree("grouped_swiglu", inputs, {"limit": 10.0}, names, rtol=2e-6)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_linear_logprob(seed, chunk):
    g = torch.Generator().manual_seed(seed)
    inputs = {"hidden_ND": normal(g, 10, 6), "weight_VD": normal(g, 11, 6)}
    targets = torch.randint(0, 11, (10,), generator=g)
    agree("linear_logprob", inputs, {"targets_N": targets, "chunk": chunk}, list(inputs))


def test_grouped_swiglu_names_a_width_that_grouped_products_cannot_take():
    x, experts, weights = torch.zeros(3, 6), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(ValueError, match="multiple of 4"):
        registry.get("grouped_swiglu")(x, experts, weights, torch.zeros(2, 8, 6), torch.zeros(2, 6, 4), 10.0)


def test_linear_logprob_is_the_cross_entropy_of_torch():
    g = torch.Generator().manual_seed(0)
    hidden, head, targets = normal(g, 10, 6), normal(g, 11, 6), torch.randint(0, 11, (10,), generator=g)
    logprob, correct, entropy = registry.get("linear_logprob")(hidden, head, targets)
    logits = hidden @ head.T
    torch.testing.assert_close(-logprob, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert not entropy.requires_grad


def test_routing_bias_moves_the_choice_and_never_the_weights():
    g = torch.Generator().manual_seed(0)
    x, weight, run = normal(g, 8, 6), normal(g, 5, 6), registry.get("routing")
    bias = torch.tensor([0.0, 0.0, 100.0, 0.0, 0.0])
    experts, weights = run(x, weight, k=2, scoring="sqrtsoftplus", scaling=1.5, bias_E=bias)
    assert (experts == 2).any(1).all()
    torch.testing.assert_close(weights.sum(1), torch.full((8,), 1.5, dtype=torch.float64))
    table = torch.tensor([[0, 3]]).expand(8, 2)
    hashed, by_table = run(x, weight, k=2, scoring="sqrtsoftplus", scaling=1.5, experts_Nk=table)
    scores = torch.nn.functional.softplus(x @ weight.T).sqrt()[:, [0, 3]]
    assert torch.equal(hashed, table)
    torch.testing.assert_close(by_table, 1.5 * scores / scores.sum(1, keepdim=True))
