"""What this machine says about itself: processor, memory, disk and GPUs.

Readings are hints for adverts and for choosing a tier. They prove nothing; proofs do (`prove`).
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

log = logging.getLogger(__name__)

_CPU_INFO = Path("/proc/cpuinfo")
_NVML_LIBRARY = "nvml.dll" if platform.system() == "Windows" else "libnvidia-ml.so.1"
_MAX_GPUS = 64
_MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine's own description. Numbers that cannot be read are 0, texts are empty."""

    cpu_model: str
    cpu_cores: int
    memory_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]


def probe(disk: Path = Path(".")) -> Machine:
    """Describe this machine. Never raises; missing parts are missing.

    Args:
        disk: a path on the disk that containers will use; it need not exist yet.
    """
    return Machine(
        cpu_model=_cpu_model(),
        cpu_cores=_cpu_cores(),
        memory_bytes=_memory_bytes(),
        disk_free_bytes=_disk_free_bytes(disk),
        gpus=_gpus(),
    )


def _cpu_model() -> str:
    try:
        lines = _CPU_INFO.read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()[:_MAX_NAME]
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())[:_MAX_NAME]


def _cpu_cores() -> int:
    """Cores that this process may use: a container or a batch system can allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def _memory_bytes() -> int:
    try:
        return int(psutil.virtual_memory().total)
    except (OSError, psutil.Error) as error:
        log.info("the amount of memory cannot be read: %s", error)
        return 0


def _disk_free_bytes(path: Path) -> int:
    """Free bytes where `path` is, or would be."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError as error:
            log.info("free disk space at %s cannot be read: %s", place, error)
            return 0
    return 0


def _gpus() -> tuple[Gpu, ...]:
    """GPUs through NVML. No library or no driver is normal: most machines have no NVIDIA GPU."""
    if not _has_driver():
        log.info("no NVIDIA driver: no GPUs are looked for")
        return ()
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        log.info("NVML is not installed: no GPUs are looked for")
        return ()
    try:
        with _nvml_session(nvml):
            count = min(nvml.nvmlDeviceGetCount(), _MAX_GPUS)
            return tuple(gpu for index in range(count) if (gpu := _gpu(nvml, index)) is not None)
    except nvml.NVMLError as error:
        log.info("no GPUs: %s", error)
        return ()


def _has_driver() -> bool:
    """Asked first, because importing the NVML bindings takes 18 MB of memory."""
    try:
        ctypes.CDLL(_NVML_LIBRARY)
    except OSError:
        return False
    return True


@contextmanager
def _nvml_session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu | None:
    """One GPU, or None when its driver does not answer for it (fallen off the bus, no permission)."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return Gpu(_text(nvml.nvmlDeviceGetName(handle)), int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
    except nvml.NVMLError as error:
        log.warning("GPU %d does not answer: %s", index, error)
        return None


def _text(value: str | bytes) -> str:
    """Older bindings return bytes."""
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else value)[:_MAX_NAME]
