"""Checkpoint formats of DeepSeek-V4: ``reader`` reads all of them, ``convert`` turns any into any other."""
