from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

import weightlift

pytest.register_assert_rewrite("support")

# No database: a failing example is printed, and the folder of the tests stays as it is.
hypothesis.settings.register_profile(
    "weightlift", deadline=None, database=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("weightlift")


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the shell or another test has set does not reach a test."""
    for name in list(os.environ):
        if name.startswith("WEIGHTLIFT_") and name != "WEIGHTLIFT_SIMULATED_DRIVER":
            monkeypatch.delenv(name)
    yield
    weightlift.Settings.set_default(None)
