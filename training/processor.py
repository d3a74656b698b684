"""What this machine's processor is, as far as speed depends on it. Standard library only: web and engine ask."""

from __future__ import annotations

import functools
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def is_amd_with_avx512() -> bool:
    """torch's float32 products are slow there, oneDNN's are fast. False where Linux does not say."""
    facts: dict[str, str] = {}
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    return facts.get("vendor_id") == "AuthenticAMD" and "avx512f" in facts.get("flags", "").split()
