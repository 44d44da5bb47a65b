"""The device side of streaming, on a queue with a clock; and tests that the checks find faults."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import weightlift.module.streaming
from compute_queue import ComputeQueue
from streaming_mutants import MUTANTS
from weightlift.module.streaming.residency import Piece, share_out

FOLDER = Path(weightlift.module.streaming.__file__).parents[1]
PACKAGE = "weightlift.module"
# In the order of their imports.
MODULES = (
    "learned_order",
    "streaming.device_side",
    "streaming.ring",
    "streaming.streamed_weight",
    "streaming.executor",
)


def file_of(module: str) -> Path:
    return FOLDER / f"{module.replace('.', '/')}.py"


MIB = 1 << 20
# The limit of a check, because a fault may make it wait for ever; without a fault, the longest
# takes a fifth of it.
LIMIT_SECONDS = 2


def loaded(
    changed: dict[str, str] | None = None, more: Sequence[str] = ()
) -> types.SimpleNamespace:
    """The modules and others, executed again, some with changed text."""
    made: dict[str, types.ModuleType] = {}
    with mock.patch.dict(sys.modules):
        for name in (*MODULES, *more):
            path = file_of(name)
            spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", path)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[f"{PACKAGE}.{name}"] = made[name] = module
            text = (changed or {}).get(name) or path.read_text(encoding="utf-8")
            exec(compile(text, str(path), "exec"), vars(module))
    return types.SimpleNamespace(**{name.rpartition(".")[2]: m for name, m in made.items()})


def blocks(modules: Any, sizes: Sequence[int]) -> list[Any]:
    return [
        modules.ring.Block(number, f"block {number}", size, lambda _: None)
        for number, size in enumerate(sizes)
    ]


def a_ring(
    modules: Any, queue: ComputeQueue, sizes: Sequence[int], buffers: int, ahead: int
) -> Any:
    memory = [queue.allocate(max(sizes)) for _ in range(buffers)]
    return modules.ring.Ring(blocks(modules, sizes), queue, memory, ahead, threaded=False)


def use(ring: Any, queue: ComputeQueue, number: int, seconds: float) -> None:
    slot = ring.pin(number, may_wait=True)
    queue.compute(seconds, slot.buffer, number)
    ring.unpin(slot)


# --- what is checked ------------------------------------------------------------------------------


def copies_and_uses_are_ordered(modules: Any) -> None:
    """By the clock, with the host far ahead: in a fixed order, in random order, and alternating two
    blocks."""
    for seed in range(12):
        numbers = random.Random(seed)
        sizes = [numbers.randrange(1, 4) * MIB for _ in range(8)]
        buffers = numbers.randrange(1, 5)
        queue = ComputeQueue(bytes_per_second=1e9, jitter=3.0, seed=seed)
        ring = a_ring(modules, queue, sizes, buffers, numbers.randrange(4))
        fixed = list(range(8))
        for _ in range(6):
            if seed % 3 == 1:
                numbers.shuffle(fixed)
            elif seed % 3 == 2:
                fixed = [numbers.choice((0, 1, 7)) for _ in range(8)]
            for number in fixed:
                for _ in range(numbers.randrange(1, 3)):
                    use(ring, queue, number, numbers.random() * 0.01)
        queue.check()


def pinned_buffers_are_kept(modules: Any) -> None:
    """Operations with several weights, some of which begin while others have not ended."""
    for seed in range(20):
        numbers = random.Random(seed)
        queue = ComputeQueue(bytes_per_second=1e9, seed=seed)
        ring = a_ring(modules, queue, [MIB] * 8, 3, numbers.randrange(3))
        for _ in range(40):
            chosen = numbers.sample(range(8), numbers.randrange(1, 4))
            held = []
            for number in chosen:
                slot = ring.pin(number, may_wait=not held)
                if slot is not None:
                    held.append((number, slot))
            assert held, "the first may wait and gets its buffer"
            for number, slot in held:
                assert slot.block == number, "a pinned buffer was given away"
                queue.compute(0.001, slot.buffer, number)
            numbers.shuffle(held)
            for _, slot in held:
                ring.unpin(slot)
        queue.check()


def a_failed_read_is_not_used(modules: Any) -> None:
    queue = ComputeQueue(bytes_per_second=1e9)
    failing: set[int] = set()
    copy = queue.copy

    def may_fail(transfer: Any, after: Any) -> Any:
        if transfer.block in failing:
            raise OSError(f"block {transfer.block}")
        return copy(transfer, after)

    queue.copy = may_fail  # type: ignore[method-assign]
    ring = a_ring(modules, queue, [MIB] * 6, 3, 2)
    raised = 0
    for step in range(16):
        failing.clear()
        if step % 2:
            failing.add((step * 2) % 6)
        for number in range(6):
            if number not in failing:
                use(ring, queue, number, 0.002)
                continue
            with contextlib.suppress(OSError):  # a block that is there already need not be read
                use(ring, queue, number, 0.002)
                raised -= 1
            raised += 1
    queue.check()
    assert raised >= 4


def the_order_is_read_ahead(modules: Any) -> None:
    """From the second step on, no use waits for a block that could have been read before."""
    sequence = [0, 1, 2, 1, 3, 4, 1, 5, 6, 7, 1]
    queue = ComputeQueue(bytes_per_second=1e9)
    ring = a_ring(modules, queue, [MIB] * 8, 3, 2)
    for step in range(5):
        waits = ring.waits
        for number in sequence:
            use(ring, queue, number, 0.002)
        assert step < 2 or ring.waits == waits, f"{ring.waits - waits} waits in step {step}"


def a_freed_buffer_is_filled(modules: Any) -> None:
    """Freed by the thread, though no code waits for the read ahead into it."""
    read: list[int] = []
    noted = threading.Condition()

    def fill(number: int) -> None:
        with noted:
            read.append(number)
            noted.notify_all()

    def is_read(*numbers: int) -> bool:
        with noted:
            return noted.wait_for(lambda: read == [*numbers], 2)

    made = [
        modules.ring.Block(number, str(number), 8, lambda _, number=number: fill(number))
        for number in range(4)
    ]
    side = modules.device_side.HostSide(torch.device("cpu"))
    ring = modules.ring.Ring(made, side, [side.allocate(8) for _ in range(2)], 1)
    try:
        first, second = (ring.pin(number, may_wait=True) for number in (0, 1))
        assert is_read(0, 1)
        assert not noted_soon(noted, lambda: len(read) > 2), "both buffers are pinned"
        ring.unpin(first)
        assert is_read(0, 1, 2)
        ring.unpin(second)
    finally:
        ring.stop()


def noted_soon(noted: threading.Condition, what: Any) -> bool:
    with noted:
        return bool(noted.wait_for(what, 0.1))


def steps_are_as_fast_as_they_can_be(modules: Any) -> None:
    for part in (0.1, 0.5, 0.9):
        for seconds in (0.0005, 0.001, 0.003):  # the link is at its limit, both, the computing
            step, floor = step_time(modules, part, seconds)
            assert step <= 1.05 * floor, (part, seconds, step / floor)


def step_time(modules: Any, part: float, seconds: float) -> tuple[float, float]:
    """(seconds of a step, its lower bound), with this part of 60 blocks as the budget."""
    count, rate = 60, 1e9
    pieces = [Piece(f"{n}", (f"{n}",), MIB) for n in range(count)]
    share = share_out(pieces, int(part * count * MIB), 0, 2)
    streamed = {n: i for i, n in enumerate(sorted(set(range(count)) - share.resident))}
    queue = ComputeQueue(bytes_per_second=rate)
    ring = a_ring(modules, queue, [MIB] * len(streamed), share.buffers, 2)
    ends = []
    for _ in range(8):
        for number in range(count):
            if number in streamed:
                use(ring, queue, streamed[number], seconds)
            else:
                queue.compute(seconds)
        ends.append(queue.compute_free)
    queue.check()
    floor = max(count * seconds, len(streamed) * MIB / rate)
    return (ends[-1] - ends[2]) / 5, floor


def numbers_of(name: str, shape: Sequence[int]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + 1000 * float(name)).reshape(tuple(shape))


class Numbers:
    """A source whose weights identify themselves; it writes in two parts."""

    def fill(self, names: Sequence[str], targets: Sequence[torch.Tensor]) -> None:
        for name, target in zip(names, targets, strict=True):
            value = numbers_of(name, target.shape).view(-1)
            target.view(-1)[::2] = value[::2]
            target.view(-1)[1::2] = value[1::2]


def weights_are_what_they_were(modules: Any) -> None:
    """Real operations: results, views and saved tensors of autograd, after their buffers were
    reused."""
    side = modules.device_side.HostSide(torch.device("cpu"))
    made, count = [], 6
    for number in range(count):
        block = modules.executor.BlockOfWeights(number, f"{number}")
        block.add(f"w{number}", (8, 16), torch.float32, Numbers(), f"{number}")
        block.add(f"b{number}", (8,), torch.float32, Numbers(), f"{100 + number}")
        made.append(block)
    executor = modules.executor.Executor(made, side, 2, 1)
    Streamed = modules.streamed_weight.StreamedWeight
    try:
        weights = [[Streamed(executor, s) for s, _ in block.weights] for block in made]
        whole = [
            [numbers_of(f"{n}", (8, 16)), numbers_of(f"{100 + n}", (8,))] for n in range(count)
        ]
        ours, theirs = (graphs_and_views(each) for each in (weights, whole))
        for (x, y, kept), (own_x, own_y, own_kept) in zip(ours, theirs, strict=True):
            assert torch.equal(y, own_y)
            y.sum().backward()
            own_y.sum().backward()
            assert torch.equal(x.grad, own_x.grad)
            for one, other in zip(kept, own_kept, strict=True):
                assert torch.equal(one, other)
        for weight, _ in weights:
            with pytest.raises(RuntimeError, match="would write"):
                weight.mul_(2)
    finally:
        executor.close()


def graphs_and_views(weights: Any) -> list[Any]:
    made = []
    for number, (weight, bias) in enumerate(weights):
        x = torch.ones(3, 16, requires_grad=True)
        y = torch.nn.functional.linear(x, weight, bias)
        with torch.no_grad():
            kept = [weight.t()[3:7, ::2], bias[1::3], weight.view(torch.int32), weight.contiguous()]
            kept.append(torch.cat([weights[(number + 3) % 6][0], weight, weights[0][0]]))
        with torch.inference_mode():
            kept.append(torch.ops.aten.reshape.default(weight.t(), [-1]))
            kept.append(torch.ops.aten.reshape.default(weight, [-1]))
        made.append((x, y, kept))
    return made


def threads_see_their_own(modules: Any) -> None:
    """More threads than buffers."""
    side = modules.device_side.HostSide(torch.device("cpu"))
    made = []
    for number in range(6):
        block = modules.executor.BlockOfWeights(number, f"{number}")
        block.add(f"w{number}", (64, 64), torch.float32, Numbers(), f"{number}")
        made.append(block)
    executor = modules.executor.Executor(made, side, 2, 1)
    Streamed = modules.streamed_weight.StreamedWeight
    weights = [Streamed(executor, block.weights[0][0]) for block in made]
    wrong: list[Any] = []

    def run(seed: int) -> None:
        numbers = random.Random(seed)
        try:
            for _ in range(25):
                number = numbers.randrange(6)
                with torch.no_grad():
                    value = weights[number] * 1
                if not torch.equal(value, numbers_of(f"{number}", (64, 64))):
                    wrong.append((number, value))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    executor.close()
    assert not wrong, wrong[0]


CHECKS = [
    copies_and_uses_are_ordered,
    pinned_buffers_are_kept,
    a_failed_read_is_not_used,
    the_order_is_read_ahead,
    a_freed_buffer_is_filled,
    steps_are_as_fast_as_they_can_be,
    weights_are_what_they_were,
    threads_see_their_own,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(check: Any) -> None:
    check(loaded())


def killed_by(changed: dict[str, str]) -> str | None:
    """The check that fails or does not end."""
    for check in CHECKS:
        modules = loaded(changed)
        rings: list[Any] = []
        begin = modules.ring.Ring.__init__

        def noted(
            self: Any, *args: Any, begin: Any = begin, rings: Any = rings, **how: Any
        ) -> None:
            rings.append(self)
            begin(self, *args, **how)

        modules.ring.Ring.__init__ = noted
        failed: list[BaseException] = []

        def run(check: Any = check, modules: Any = modules, failed: Any = failed) -> None:
            try:
                check(modules)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(LIMIT_SECONDS)
        hangs = thread.is_alive()
        for ring in rings:  # releases the threads that wait in it
            for slot in ring._slots:
                slot.pins = 0
            ring.stop()
        thread.join(2)
        if hangs:
            return f"{check.__name__}: hangs"
        if failed:
            return f"{check.__name__}: {failed[0]!r}"
    return None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name: str) -> None:
    module, old, new = MUTANTS[name]
    module = module if module == "learned_order" else f"streaming.{module}"
    text = file_of(module).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {module}.py"
    killed = killed_by({module: text.replace(old, new)})
    assert killed, "nothing noticed"
    print(killed)
