"""The bill of materials of a release (CycloneDX 1.5): compiled-in parts, tools and dependencies.

The same commit gives the same bytes: the document's time is the commit's, and its serial number is
derived from the commit.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

__all__ = ["make_sbom", "pinned_versions"]


@dataclass(frozen=True)
class Part:
    """A package of PyPI.

    Attributes:
        role: ``compiled in``, ``build`` or ``run time``. A run-time package has no version here,
            because the wheels' Requires-Dist states the versions.
    """

    name: str
    licence: str
    role: str

    def describe(self, pins: Mapping[str, str]) -> dict[str, Any]:
        version = {} if self.role == "run time" else {"version": pins[self.name]}
        purl = "@".join([f"pkg:pypi/{self.name}", *version.values()])
        return {
            "type": "library",
            "bom-ref": purl,
            "name": self.name,
            **version,
            "scope": "excluded" if self.role == "build" else "required",
            "licenses": [{"expression": self.licence}],
            "purl": purl,
            "properties": [{"name": "weightlift:role", "value": self.role}],
        }


_PARTS = (
    Part("pybind11", "BSD-3-Clause", "compiled in"),
    Part("nlohmann-json", "MIT", "compiled in"),
    # libc++, libc++abi and zig's own runtime.
    Part("ziglang", "MIT AND Apache-2.0 WITH LLVM-exception", "compiled in"),
    # cuda.h, of which only prototypes are used, and the compilers of the kernels.
    Part("nvidia-cuda-runtime", "LicenseRef-NVIDIA-CUDA-EULA", "build"),
    Part("nvidia-cuda-nvcc", "LicenseRef-NVIDIA-CUDA-EULA", "build"),
    Part("nvidia-cuda-nvcc-cu12", "LicenseRef-NVIDIA-CUDA-EULA", "build"),
    Part("safetensors", "Apache-2.0", "run time"),
    Part("huggingface_hub", "Apache-2.0", "run time"),
)


def pinned_versions(requirements: Iterable[str]) -> dict[str, str]:
    """The versions by name, from lines ``NAME==VERSION`` of requirements files."""
    lines = (line for text in requirements for line in text.splitlines())
    found = (re.match(r"([\w-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match is not None}


def make_sbom(
    version: str,
    commit: str,
    made: datetime,
    hashes: Mapping[str, str],
    pins: Mapping[str, str],
) -> dict[str, Any]:
    """The document as a JSON value.

    Args:
        version: weightlift's version.
        made: the time of the commit.
        hashes: SHA-256 of the release's files, by their names.
        pins: versions of the build's packages, by name.
    """
    own = f"pkg:pypi/weightlift@{version}"
    components = [part.describe(pins) for part in _PARTS]
    files = [
        {"name": f"weightlift:sha256:{name}", "value": value} for name, value in hashes.items()
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, f"{own}#{commit}").urn,
        "version": 1,
        "metadata": {
            "timestamp": made.isoformat(),
            "authors": [{"name": "The weightlift authors"}],
            "component": {
                "type": "library",
                "bom-ref": own,
                "name": "weightlift",
                "version": version,
                "purl": own,
                "licenses": [{"expression": "Apache-2.0"}],
                "properties": [{"name": "weightlift:commit", "value": commit}, *files],
            },
        },
        "components": components,
        "dependencies": [
            {"ref": own, "dependsOn": [component["bom-ref"] for component in components]}
        ],
    }
