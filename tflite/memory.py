"""The resident size of this process and its peak."""

import contextlib
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int | None:
    with contextlib.suppress(OSError):
        if match := re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    return None


def resident_bytes() -> int | None:
    """Bytes of this process in physical memory now; None where the system does not say (no /proc)."""
    return _status_bytes("VmRSS")


def resident_peak_bytes() -> int:
    """The most bytes this process has held in physical memory since `reset_peak`, or since it started.

    Linux's VmHWM comes first: getrusage's figure survives exec and so starts at the size of the process that started
    this one (seen: 611 MB in the child of a process of 600 MB, where VmHWM said 9 MB).
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Makes the peak start again from the present size; does nothing where the system has no such switch."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # documented in proc(5)
