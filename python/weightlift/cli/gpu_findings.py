"""``weightlift doctor``: GPUs, their driver and the kernels."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weightlift._native as _native
from weightlift.cli.findings import Finding, format_rate, no_torch
from weightlift.core.report import format_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["probe_gpu"]

_PINNED_BYTES = 256 * 10**6
# All drivers since 12.0 load machine code for older GPUs, which CUDA 12's ptxas assembled.
_BLACKWELL = 100


def probe_gpu() -> list[Finding]:
    """torch, the driver, its devices, the kernels in this build, and the rate of pinned copies."""
    kernels = _kernels(_native.machine())
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
    # torch first, because it must initialize CUDA to detect a fork.
    torch.empty(0, device="cuda")
    driver = _native.driver_report()
    major, minor = driver["version"] // 1000, driver["version"] % 1000 // 10
    findings.append(
        Finding("gpu", "driver", "ok", f"{driver['library']}, for CUDA {major}.{minor}")
    )
    batch = driver["batch_copies"]
    findings.append(
        Finding("gpu", "batch copies", "ok", f"cuMemcpyBatchAsync of CUDA {batch}")
        if batch
        else Finding(
            "gpu",
            "batch copies",
            "missing",
            "no cuMemcpyBatchAsync",
            "many small tensors take a call each where the kernels cannot run",
            "a driver for CUDA 12.8 or later",
        )
    )
    for ordinal, (name, form, refusal) in enumerate(driver["devices"]):
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
        if kernels.state != "missing":
            findings.append(
                Finding(
                    "gpu",
                    f"cuda:{ordinal} kernels",
                    "missing",
                    f"refused: {refusal}",
                    "many small tensors take a copy each, and casts run on the host",
                    "a wheel that was built for this GPU",
                )
                if refusal
                else Finding("gpu", f"cuda:{ordinal} kernels", "ok", form)
            )
    return [*findings, kernels]


def _kernels(machine: dict[str, Any]) -> Finding:
    """The kernel images in this build, and the drivers that can load them."""
    images = machine["kernels"]
    if not machine["kernel_toolkit"]:
        found = "this is a test build: its kernels are the simulated driver's"
        return Finding(
            "gpu",
            "kernels",
            "missing",
            found if images else "this build has none",
            "many small tensors take a copy each, and casts run on the host",
            "install a release wheel, or build with nvcc on the PATH",
            0,
        )
    code = [f"sm_{architecture}" for architecture, is_ptx, *_ in images if not is_ptx]
    text = [maker for _, is_ptx, maker, _ in images if is_ptx]
    size = sum(image[-1] for image in images)
    found = f"{', '.join(code)} and {', '.join(text)}, {format_bytes(size)} in this build"
    if any(
        architecture < _BLACKWELL and not is_ptx and not maker.startswith("ptxas 12.")
        for architecture, is_ptx, maker, _ in images
    ):
        return Finding(
            "gpu",
            "kernels",
            "info",
            f"{found}; drivers of the CUDA 12 series compile the PTX",
            "the first load of a machine takes longer under such a driver",
            "install a release wheel, or nvidia-cuda-nvcc-cu12 before building",
            size,
        )
    return Finding("gpu", "kernels", "ok", found, value=size)


def _why_no_cuda(built_for: str | None) -> tuple[str, str]:
    """Why torch finds no GPU, and what to do; does not start CUDA."""
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
    """The best of five rates from pinned memory to the device, in bytes/s."""
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
