"""One rank of a job of any size, run without memory and without the other ranks: what it would hold, send and compute.

The engine itself is run, on fake tensors and a fake process group; ``run.step_of`` is the way in, ``check`` compares
ranks. ``docs/twin.md`` says how memory is followed and what cannot be seen.
"""
