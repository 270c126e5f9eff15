"""The engine's tests import `engine_world` from here. Hypothesis as in tests/unit: the same examples on every run."""

import hypothesis

hypothesis.settings.register_profile(
    "engine", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("engine")
