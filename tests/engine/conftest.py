"""Lets the engine's tests import `engine_world`, and sets up Hypothesis as in tests/unit.

Its examples are the same on every run.
"""

import hypothesis

hypothesis.settings.register_profile(
    "engine", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("engine")
