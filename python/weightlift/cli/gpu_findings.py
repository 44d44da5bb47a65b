"""What ``weightlift doctor`` finds out about GPUs, their driver and what is installed for them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from weightlift import _native
from weightlift.cli.findings import Finding, format_rate, no_torch
from weightlift.core.report import format_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["look_at_gpu"]

_PINNED_BYTES = 256 * 10**6
# No compiled kernel is as small; a placeholder is.
_SMALLEST_IMAGE = 256


def look_at_gpu() -> list[Finding]:
    """torch, the driver, its devices, the kernels in this build, and the rate of pinned copies."""
    image = _native.machine()["kernel_image_bytes"]
    without = "this build has none"
    if 0 < image < _SMALLEST_IMAGE:
        image, without = 0, "this is a test build: its kernels are the simulated driver's"
    kernels = Finding(
        "gpu",
        "kernels",
        "ok" if image else "missing",
        f"{format_bytes(image)} in this build" if image else without,
        "" if image else "many small tensors take a copy each, and casts run on the host",
        "" if image else "install a release wheel, or build with nvcc on the PATH",
        image,
    )
    try:
        import torch
    except ImportError:
        return [no_torch("gpu", "torch"), kernels]
    findings = [Finding("gpu", "torch", "ok", f"{torch.__version__}")]
    if not torch.cuda.is_available():
        found, remedy = _why_no_cuda(torch.version.cuda)
        findings.append(
            Finding("gpu", "driver", "missing", found, "loads go to the CPU only", remedy)
        )
        return [*findings, kernels]
    # torch first, or it would not notice a fork.
    torch.empty(0, device="cuda")
    driver = _native.driver_report()
    major, minor = driver["version"] // 1000, driver["version"] % 1000 // 10
    findings.append(
        Finding("gpu", "driver", "ok", f"{driver['library']}, for CUDA {major}.{minor}")
    )
    findings.append(
        Finding("gpu", "batch copies", "ok", "cuMemcpyBatchAsync")
        if driver["batch_copies"]
        else Finding(
            "gpu",
            "batch copies",
            "missing",
            "no cuMemcpyBatchAsync",
            "many small tensors take a call each where the kernels cannot run",
            "a driver for CUDA 13.0 or later",
        )
    )
    for ordinal, (name, refusal) in enumerate(driver["devices"]):
        rate = _pinned_rate(torch.device("cuda", ordinal))
        findings.append(
            Finding(
                "gpu",
                f"cuda:{ordinal}",
                "ok",
                f"{name}; {format_rate(rate)} from pinned memory: no load is faster than this",
                value=rate,
            )
        )
        if image and refusal:
            findings.append(
                Finding(
                    "gpu",
                    f"cuda:{ordinal} kernels",
                    "missing",
                    f"refused: {refusal}",
                    "many small tensors take a copy each, and casts run on the host",
                    "a wheel that was built for this GPU",
                )
            )
    return [*findings, kernels]


def _why_no_cuda(built_for: str | None) -> tuple[str, str]:
    """Why torch sees no GPU, and what to do; without starting CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built_for is None:
        text = "this torch is built without CUDA"
        if not Path("/proc/driver/nvidia/version").exists():
            return f"{text}, and no NVIDIA driver is loaded", "nothing, if there is no GPU"
        return text, "install a torch for CUDA, from pytorch.org"
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs", "unset CUDA_VISIBLE_DEVICES"
    if not Path("/proc/driver/nvidia/version").exists():
        return "no NVIDIA driver is loaded", "install the driver, if there is a GPU"
    if not Path("/dev/nvidiactl").exists():
        return (
            "the driver is loaded, but /dev/nvidiactl is not there",
            "give the container the GPUs: docker run --gpus all",
        )
    return (
        f"torch, built for CUDA {built_for}, cannot use the driver",
        "look at what nvidia-smi and torch.cuda.init() say: an old driver, most often",
    )


def _pinned_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device; the best of five."""
    import torch

    source = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_PINNED_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        rates.append(_PINNED_BYTES / (time.perf_counter() - start))
    return max(rates)
