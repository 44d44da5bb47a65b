"""Faults to be put into the modules of streaming: name -> (module, what it says, what is said in its
place). Each must be noticed by one of the checks of ``test_streaming_device``."""

# ruff: noqa: E501 - the lines of the modules, as they are

from __future__ import annotations

MUTANTS: dict[str, tuple[str, str, str]] = {
    "a_copy_does_not_wait_for_marks": (
        "ring", "block.into(slot.buffer), list(marks.values()))", "block.into(slot.buffer), [])",
    ),
    "uses_are_not_marked": (
        "ring", "            slot.marks[threading.get_ident()] = self.device.mark()\n            slot.pins",
        "            slot.pins",
    ),
    "the_first_mark_stays": (
        "ring", "slot.marks[threading.get_ident()] = self.device.mark()\n            slot.pins",
        "slot.marks.setdefault(threading.get_ident(), self.device.mark())\n            slot.pins",
    ),
    "a_use_does_not_wait_for_its_copy": (
        "ring", "        self.device.wait(arrival)\n", "",
    ),
    "a_use_waits_for_the_copy_before": (
        "ring", "                slot.is_ready, slot.arrival = True, arrival\n",
        "                slot.is_ready = True\n                slot.arrival = slot.arrival or arrival\n",
    ),
    "pins_are_not_counted": ("ring", "            slot.pins += 1\n", ""),
    "pinned_buffers_are_given_away": (
        "ring", "if slot.pins or not slot.is_ready or", "if not slot.is_ready or",
    ),
    "unpinned_twice": ("ring", "            slot.pins -= 1\n", "            slot.pins -= 2\n"),
    "a_buffer_keeps_its_former_block": (
        "ring", "            del self._slot_of[slot.block]\n        slot.block, slot",
        "            pass\n        slot.block, slot",
    ),
    "a_block_is_ready_before_it_is_read": (
        "ring", "        slot.block, slot.is_ready = block.number, False\n",
        "        slot.block, slot.is_ready = block.number, True\n",
    ),
    "a_failed_read_counts": (
        "ring", "                slot.block = None\n                slot.marks",
        "                slot.is_ready = True\n                return\n                slot.marks",
    ),
    "a_failed_read_is_never_tried_again": (
        "ring", "                self._errors.pop(number, None)\n", "                pass\n",
    ),
    "marks_are_lost_with_a_failed_read": (
        "ring", "                slot.marks = marks  #", "                slot.marks = {}  #",
    ),
    "what_is_waited_for_is_given_away": (
        "ring", "or number in self._waiting:\n                continue", "or False:\n                continue",
    ),
    "guesses_take_the_current_buffer": (
        "ring", "if cost < worst and not (is_guess and cost):", "if cost < worst:",
    ),
    "nothing_is_read_ahead": (
        "ring", "for n in [*asked, *self._ahead] if", "for n in asked if",
    ),
    "the_order_is_not_learned": (
        "learned_order", "                self._after[tuple(last[-length:])] = used\n", "                pass\n",
    ),
    "only_the_last_use_counts": ("learned_order", "_CONTEXTS = (8, 4, 2, 1)", "_CONTEXTS = (1,)"),
    "results_may_lie_in_buffers": (
        "streamed_weight",
        "return tensor.clone() if tensor.untyped_storage().data_ptr() in buffers else tensor",
        "return tensor",
    ),
    "copies_pass_for_views": (
        "streamed_weight", "        shadow.untyped_storage()._cdata == base.untyped_storage()._cdata\n",
        "        True\n",
    ),
    "leases_end_before_the_operation": (
        "streamed_weight", "            return leases.without_buffers(func(*real_args, **real_kwargs))\n",
        "            leases.end()\n"
        "            __import__('time').sleep(0.002)\n"
        "            return leases.without_buffers(func(*real_args, **real_kwargs))\n",
    ),
    "views_begin_at_the_buffers_start": (
        "streamed_weight", "        offset = whole.storage_offset() + shadow.storage_offset()\n",
        "        offset = shadow.storage_offset()\n",
    ),
    "writes_are_not_looked_for": (
        "streamed_weight", "            _check_written(func, args, kwargs)\n", "            pass\n",
    ),
    "a_second_weight_waits_too": (
        "executor", "slot = self.ring.pin(stored.block, may_wait=may_wait)",
        "slot = self.ring.pin(stored.block, may_wait=True)",
    ),
    "weights_overlap_in_their_buffer": (
        "executor", "        self.bytes += -(-count // ALIGNMENT) * ALIGNMENT\n",
        "        self.bytes += -(-count // ALIGNMENT) * ALIGNMENT // 2\n",
    ),
    "a_block_is_cut_once_for_all_buffers": (
        "executor", "        views = self._views.get(address)\n",
        "        views = next(iter(self._views.values()), None)\n",
    ),
    "the_thread_is_not_told_of_free_buffers": (
        "ring", "            if self._lacks_buffer or self._thread", "            if self._thread",
    ),
}  # fmt: skip

CUDA_MUTANTS: dict[str, tuple[str, str, str]] = {
    "the_copies_do_not_wait_for_uses": (
        "device_side", "                self._stream.wait_event(mark)\n", "                pass\n",
    ),
    "the_copies_wait_for_one_use_alone": (
        "device_side", "            for mark in after:\n", "            for mark in after[:1]:\n",
    ),
    "uses_do_not_wait_for_the_copies": (
        "device_side", "        torch.cuda.current_stream(self.device).wait_event(arrival)\n", "        pass\n",
    ),
    "the_event_is_recorded_before_the_copies": (
        "device_side",
        "            self._settle = transfer.begin()\n"
        "            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]\n"
        "            arrival.record(self._stream)\n",
        "            arrival = torch.cuda.Event()\n"
        "            arrival.record(self._stream)\n"
        "            self._settle = transfer.begin()\n",
    ),
    "the_copies_are_queued_behind_another_stream": (
        "device_side", "            inside.enter_context(torch.cuda.stream(self._stream))\n",
        "            inside.enter_context(torch.cuda.stream(torch.cuda.Stream(self.device)))\n",
    ),
    "uses_are_marked_on_the_copies_stream": (
        "device_side", "        event.record(torch.cuda.current_stream(self.device))\n",
        "        event.record(self._stream)\n",
    ),
    "the_copies_stream_waits_in_the_place_of_the_uses": (
        "device_side", "        torch.cuda.current_stream(self.device).wait_event(arrival)\n",
        "        self._stream.wait_event(arrival)\n",
    ),
    "the_end_is_not_waited_for": (
        "device_side", "        torch.cuda.synchronize(self.device)\n", "        pass\n",
    ),
    "what_has_failed_is_what_arrived": (
        "device_side", "            self._settle = transfer.begin()\n",
        "            with contextlib.suppress(Exception):\n"
        "                self._settle = transfer.begin()\n",
    ),
    "marks_are_kept_for_one_thread": (
        "ring", "slot.marks[threading.get_ident()] = self.device.mark()\n            slot.pins",
        "slot.marks[0] = self.device.mark()\n            slot.pins",
    ),
    "the_buffers_go_before_the_device_has_ended": (
        "ring", "        self.device.finish()\n        self._slot_of.clear()\n", "        self._slot_of.clear()\n",
    ),
    "half_of_the_weights_are_copied": (
        "sources", "        if not by_engine:\n", "        del by_engine[1:]\n        if not by_engine:\n",
    ),
    "arrived_when_begun": (
        "sources", "            load.wait_for(names)\n", "            pass\n",
    ),
}  # fmt: skip
