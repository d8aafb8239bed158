"""For all tests: no test may fail for the time that a machine takes."""

from hypothesis import settings

settings.register_profile("ascent", deadline=None)
settings.load_profile("ascent")
