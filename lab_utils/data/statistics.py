"""What is in a split, in tokens: for ``lab data stats`` and for choosing ``data.row_tokens``."""

from __future__ import annotations

from typing import Any

import numpy as np

from lab_utils.data.columns import trained_messages
from lab_utils.data.documents import Encoding, encode_row, load_documents
from lab_utils.data.manifest import Manifest
from lab_utils.data.packing import first_fit, padding_fraction

QUANTILES = (("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


def split_statistics(manifest: Manifest, split: str, encoding: Encoding, row_tokens: int) -> dict[str, Any]:
    """Documents, tokens, tokens that bear loss, quantiles of length, and padding at a row length.

    Running text is cut to rows as the loader does it; conversations longer than a row are counted apart, and
    left out of the packing. A preference row counts as two documents, chosen and rejected.

    Raises:
        DataError: the data is not what the manifest says.
    """
    if manifest.format == "preference":
        lengths, supervised = [], 0
        for place, row in manifest.located_rows(split):
            for _, messages in trained_messages(row, manifest.format):
                side = {"messages": messages, "tools": row.get("tools")}
                document = encode_row(side, "messages", encoding, place)
                lengths.append(len(document.input_ids))
                supervised += int(sum(document.loss_weights))
        lengths = np.asarray(lengths, np.int64)
    else:
        documents = load_documents(manifest, split, encoding)
        supervised = int(documents.supervised.sum())
        if manifest.format == "text":
            documents = documents.fitted(row_tokens, cut=True)
        lengths = documents.lengths
    packed = lengths[lengths <= row_tokens].tolist()
    rows = first_fit(packed, row_tokens)
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": supervised,
        "row_tokens": row_tokens,
        "rows": len(rows),
        "padding_fraction": padding_fraction(rows, packed, row_tokens),
        "longer_than_row": len(lengths) - len(packed),
        "length": {name: int(np.quantile(lengths, q, method="higher")) for name, q in QUANTILES}
        if len(lengths)
        else {},
    }
