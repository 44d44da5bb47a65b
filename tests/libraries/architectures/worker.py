"""Reads names of architectures line by line, makes and loads each, and answers with a line of
JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import observe
import torch
from pairs import every, pairs, sample

import weightlift as wl
from weightlift.core.report import fallback_reasons


def _engine(library: str) -> tuple[int, int]:
    sums = wl.stats().by_caller.get(library, wl.Stats())
    return sums.loads, sums.fallbacks


def judge(kind: Any, name: str, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Loads one architecture with each row, by the library alone and with the backend."""
    answer: dict[str, Any] = {"loads": 0, "failed": 0, "engine": 0, "different": []}
    try:
        made = kind.make(name, folder)
    except kind.NotMade as reason:
        return {"not made": str(reason)}
    answer["title"] = made.title
    loads: list[tuple[dict[str, Any], Any, dict[str, Any]]] = []
    for row in rows:
        effective = dict(row)
        if "model" in row:
            effective["model"] = made.classes[row["model"]].__name__
        if any(effective == other for other, _, _ in loads):
            continue
        try:
            load = kind.cases(made, row)
        except Exception as error:  # the library alone cannot build what the row asks for
            answer["not built"] = f"{type(error).__name__}: {error}"[:300]
            continue
        alone = observe.observe(load)
        kind.amend(made, row, alone)
        loads.append((effective, load, alone))
    with wl.enabled():
        for effective, load, alone in loads:
            before, _ = _engine(kind.LIBRARY)
            backend = observe.observe(load)
            after, _ = _engine(kind.LIBRARY)
            answer["loads"] += 1
            answer["failed"] += "error" in alone
            answer["engine"] += after > before
            found = observe.differences(alone, backend)
            if found:
                answer["different"].append({"row": effective, "found": found})
    return answer


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Memory that a library leaves uninitialised is the same every time.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that libraries print is not an answer
    library = sys.argv[1]
    kind = __import__(f"of_{library}")
    for one in ("transformers", "diffusers"):
        logging = __import__(one).utils.logging
        logging.disable_progress_bar()
    make_rows = every if os.environ.get("FULL") == "1" else pairs
    rows = make_rows(kind.OPTIONS)
    only = os.environ.get("ROWS")
    if only is not None:  # such as 0,7; of nothing, the models are only made
        rows = [rows[int(number)] for number in only.split(",") if number]
    few = int(os.environ.get("ROWS_EACH", "0"))
    for line in sys.stdin:
        name = line.strip()
        # Different rows for each architecture, so that together they cover all rows.
        taken = sample(rows, few, name) if 0 < few < len(rows) else rows
        folder = Path(tempfile.mkdtemp(prefix="architecture-", dir=sys.argv[2]))
        began = time.monotonic()
        try:
            answer = judge(kind, name, taken, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        answer |= {"seconds": time.monotonic() - began}
        answer["fallbacks"] = {f"{a}: {b}": n for (a, b), n in fallback_reasons().items()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
