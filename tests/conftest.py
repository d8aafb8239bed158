"""For all tests: no test may fail for the time that a machine takes, and two beside each other share its cores."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch; what the tests start inherits it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("ascent", deadline=None)
settings.load_profile("ascent")
