"""Processes that ``lab ascend selftest`` starts: each reads a file of options and leaves a file of results."""
