"""The one meter of peak memory. It imports nothing but the standard library, so any environment can count alike."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_forgotten = 0  # the largest resident peak before a `reset`


def reset(device: str = "cpu") -> None:
    """Forget the peak of a CUDA device, or of this process where Linux lets it; elsewhere the old peak stays."""
    global _forgotten
    if device == "cuda":
        sys.modules["torch"].cuda.reset_peak_memory_stats()
        return
    _forgotten = whole_peak_bytes()
    with suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")  # proc(5): the peak begins again at what is resident now


def peak_bytes(device: str = "cpu") -> int:
    """Peak bytes since the start or the last `reset`: allocated by torch on a CUDA device, else resident.

    On Linux it is VmHWM, for `ru_maxrss` begins at the peak of the process that started this one.
    """
    if device == "cuda":
        return sys.modules["torch"].cuda.max_memory_allocated()
    try:
        status = _STATUS.read_text(encoding="ascii")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def whole_peak_bytes() -> int:
    """Peak resident bytes of this process since its start, whatever was reset on the way."""
    return max(_forgotten, peak_bytes())
