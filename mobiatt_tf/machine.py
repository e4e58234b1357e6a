"""The machine that a figure was measured on."""

import contextlib
import os
import platform
import re
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE):
            return match[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
