from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

import weightlift
from weightlift.load import arriving_load
from weightlift.module import order_of_use

pytest.register_assert_rewrite(
    "support", "backend_support", "simulated", "accelerate_models", "transformers_models"
)

# A shell that starts `make test` in the background makes it ignore Ctrl-C (POSIX, "Asynchronous
# Lists"), and its children would inherit this; but tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No database: a failing example is printed, and the tests' folder stays unchanged.
hypothesis.settings.register_profile(
    "weightlift", deadline=None, database=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("weightlift")

# The build that runs, and whether a GPU is required: these are not settings.
FOR_TESTS = ("WEIGHTLIFT_SIMULATED_DRIVER", "WEIGHTLIFT_REQUIRE_GPU")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """What there is before the first test of a file stays, such as modules. Without this, each
    ``gc.collect()`` of a test looks at all of it, which takes most of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of the shell or of another test do not reach a test."""
    for name in list(os.environ):
        if name.startswith("WEIGHTLIFT_") and name not in FOR_TESTS:
            monkeypatch.delenv(name)
    monkeypatch.setattr(order_of_use, "_orders", {})
    yield
    weightlift.Settings.set_default(None)


# Threads of models that outlive a test, such as those of a fixture of the module.
_kept: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@pytest.fixture(autouse=True)
def earlier_loads_have_ended() -> None:
    """A background load that the collector deletes during a test, or a read ahead for the hooks of
    an earlier model, would count in the test's ``stats()``."""
    if arriving_load._running or own_threads():
        gc.collect()  # a model with hooks is in a cycle
    for thread in own_threads():
        thread.join(10)
        if thread.is_alive():
            _kept.add(thread)


def own_threads() -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("weightlift") and thread not in _kept
    ]


def required(report: pytest.TestReport | pytest.CollectReport) -> None:
    """If a GPU is required, a skipped test is a failure."""
    expected = hasattr(report, "wasxfail")  # pytest counts these as skipped
    if report.skipped and not expected and os.environ.get("WEIGHTLIFT_REQUIRE_GPU"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and WEIGHTLIFT_REQUIRE_GPU is set: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    outcome: Any = yield
    required(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    outcome: Any = yield
    required(outcome.get_result())
