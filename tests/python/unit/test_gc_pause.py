"""gc_pause: checked with Python's own ``gc``."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

import weightlift
from weightlift import _native
from weightlift.core import gc_pause
from weightlift.load.plans import finish_plan


@pytest.fixture(scope="module", autouse=True)
def as_in_a_program(quick_collections: None) -> None:
    """Without frozen objects (conftest.py), which few programs have."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def test_nested() -> None:
    with gc_pause.paused():
        with gc_pause.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()


def test_an_error_ends_it() -> None:
    with pytest.raises(KeyError), gc_pause.paused():
        raise KeyError


def test_who_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with gc_pause.paused(), gc_pause.resumed():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_resumed() -> None:
    with gc_pause.resumed():
        assert gc.isenabled()
    with gc_pause.paused(), gc_pause.paused():
        with gc_pause.resumed():
            assert gc.isenabled()
            with gc_pause.paused():
                assert not gc.isenabled()
            assert gc.isenabled()
        assert not gc.isenabled()


@contextlib.contextmanager
def another_threads_pause() -> Iterator[None]:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with gc_pause.paused():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    yield
    leave.set()
    thread.join()


def test_until_the_last_thread_ends_its_own() -> None:
    with another_threads_pause():
        with gc_pause.paused(), gc_pause.resumed():  # this thread's is not all there is
            assert not gc.isenabled()
        assert not gc.isenabled()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_is_not_left_in_the_pause_of_a_thread_it_does_not_have() -> None:
    with another_threads_pause():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def _many() -> list[list[int]]:
    """More than the collector leaves young."""
    return [[] for _ in range(10 * max(gc.get_threshold()[0], 100))]


def _is_old(item: object) -> bool:
    return any(item is other for other in gc.get_objects(generation=2))


def test_what_was_made_is_not_looked_at_again() -> None:
    with gc_pause.paused():
        made = _many()
    assert _is_old(made)
    with gc_pause.paused(), gc_pause.resumed():
        assert gc.get_count()[0] <= gc.get_threshold()[0]


def test_what_a_program_has_frozen_stays_so() -> None:
    gc.freeze()
    try:
        with gc_pause.paused():
            made = _many()
        assert gc.get_freeze_count() > 0
        assert not _is_old(made)
    finally:
        gc.unfreeze()


def test_what_an_error_leaves_is_young() -> None:
    made = []
    left = []

    def fail() -> None:
        made.append(_many())
        left.append(weakref.ref(_Cycle()))
        raise KeyError

    with pytest.raises(KeyError), gc_pause.paused():
        fail()
    gc.collect(0)
    assert left[0]() is None


class _Model(weightlift.ModelMixin, weightlift.ConfigMixin):
    """Asks, while it is made, whether anything is collected."""

    seen: bool | None = None

    @weightlift.register_to_config
    def __init__(self) -> None:
        super().__init__()
        type(self).seen = gc.isenabled()
        self.layer = torch.nn.Linear(4, 4)


class _Watched(weightlift.ModelMixin, weightlift.ConfigMixin):
    """Has its own code for training and evaluation mode."""

    @weightlift.register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> _Watched:
        self.modes.append(mode)
        return super().train(mode)


def test_a_train_of_the_models_own_is_called(tmp_path: os.PathLike[str]) -> None:
    _Watched().save_pretrained(tmp_path)
    model = _Watched.from_pretrained(tmp_path)
    assert model.modes == [False]
    assert not any(module.training for module in model.modules())


def test_a_model_is_made_without_looks_for_garbage(tmp_path: os.PathLike[str]) -> None:
    _Model().save_pretrained(tmp_path)
    assert _Model.seen is True
    cycle = _Cycle()
    gone = weakref.ref(cycle)
    del cycle
    _Model.from_pretrained(tmp_path)
    assert _Model.seen is False
    gc.collect()
    assert gone() is None


class _Plan:
    """Takes two looks to end."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def wait(self, seconds: float) -> bool:
        self.seen.append(gc.isenabled())
        return len(self.seen) == 3

    def finish(self) -> dict[str, Any]:
        return {"touched": []}


def test_others_collect_while_a_load_waits() -> None:
    plan = _Plan()
    with gc_pause.paused():
        finish_plan(cast("_native.Plan", plan))
        assert not gc.isenabled()
    assert plan.seen == [False, True, True]  # the first does not wait
