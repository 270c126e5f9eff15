"""One Hypothesis profile for the pure core: the same examples on every run, and nothing written to
disk."""

import hypothesis

hypothesis.settings.register_profile(
    "unit", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("unit")
