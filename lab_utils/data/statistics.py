"""What is in a split, in tokens: for ``lab data stats`` and for choosing ``data.row_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lab_utils.data.documents import Encoding, load_documents
from lab_utils.data.manifest import Manifest
from lab_utils.data.packing import first_fit, padding_fraction

if TYPE_CHECKING:
    from lab_utils.data.pairs import Pairs

QUANTILES = (("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


def split_statistics(
    manifest: Manifest, split: str, encoding: Encoding, row_tokens: int, *, mismatched: bool = False
) -> dict[str, Any]:
    """Documents, tokens, tokens that bear loss, quantiles of length, and padding at a row length.

    Running text is cut to rows as the loader does it; what is longer than a row is counted apart, and left out of the
    packing. Of preference rows, lengths, packing and ``longer_than_row`` are of whole pairs, which share a row; there
    are besides ``pairs``, and ``tokens_of``: those of the prompts, each once, and of the chosen and rejected answers.

    Args:
        mismatched: of preference rows, with the third document of each pair that kto takes.

    Raises:
        DataError: the data is not what the manifest says; with ``mismatched`` also as ``load_pairs``.
    """
    more: dict[str, Any] = {}
    if manifest.format == "preference" or mismatched:
        from lab_utils.data.pairs import load_pairs  # here: it brings torch along

        pairs = load_pairs(manifest, split, encoding, mismatched=mismatched)
        documents, lengths = pairs.documents, pairs.lengths
        more = {"pairs": len(pairs), "tokens_of": _tokens_of(pairs)}
    else:
        documents = load_documents(manifest, split, encoding)
        if manifest.format == "text":
            documents = documents.fitted(row_tokens, cut=True)
        lengths = documents.lengths
    packed = lengths[lengths <= row_tokens].tolist()
    rows = first_fit(packed, row_tokens)
    return {
        "documents": len(documents),
        **more,
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(documents.supervised.sum()),
        "row_tokens": row_tokens,
        "rows": len(rows),
        "padding_fraction": padding_fraction(rows, packed, row_tokens),
        "longer_than_row": len(lengths) - len(packed),
        "length": {name: int(np.quantile(lengths, q, method="higher")) for name, q in QUANTILES}
        if len(lengths)
        else {},
    }


def _tokens_of(pairs: Pairs) -> dict[str, int]:
    """An answer begins with the first token of its document that bears loss."""
    from lab_utils.data.pairs import CHOSEN, REJECTED

    documents = pairs.documents
    starts, stops = documents.offsets[:-1], documents.offsets[1:]
    bears = np.append(np.flatnonzero(documents.supervised), len(documents.tokens))
    first = np.minimum(bears[np.searchsorted(bears, starts)], stops)
    chosen, rejected = (slice(role, None, pairs.size) for role in (CHOSEN, REJECTED))
    return {
        "prompt": int((first - starts)[chosen].sum()),
        "chosen": int((stops - first)[chosen].sum()),
        "rejected": int((stops - first)[rejected].sum()),
    }
