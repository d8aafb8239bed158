"""The Ascend path: proven without a chip (``check``), on chips (``selftest``), and what a cluster's environment needs.

``lab ascend check`` loads the real torch_npu against a *stand-in CANN* that is built on the spot from the wheel's own
undefined symbols: what torch_npu itself decides (schemas, shapes, dtypes, autograd formulas, which operators have an
NPU kernel, process groups up to the first byte sent) is then the real thing; numbers and speed are not.
"""
