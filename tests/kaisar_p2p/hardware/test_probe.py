"""Probing describes what is there and is silent about what is not."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kaisar_p2p.hardware import probe as module
from kaisar_p2p.hardware.probe import Gpu, probe


class FakeNvml:
    """The few calls of pynvml that are used, with one healthy and one lost GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True, as_bytes: bool = False) -> None:
        self.driver, self.as_bytes, self.open = driver, as_bytes, 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 1:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=24 << 30)

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"RTX 4090" if self.as_bytes else "RTX 4090"


def test_this_machine_has_a_processor_memory_and_disk(tmp_path: Path) -> None:
    machine = probe(tmp_path)
    assert machine.cpu_cores >= 1
    assert machine.memory_bytes > 1 << 26
    assert machine.disk_free_bytes > 0


def test_the_disk_path_need_not_exist_yet(tmp_path: Path) -> None:
    assert probe(tmp_path / "not" / "yet").disk_free_bytes > 0


@pytest.mark.parametrize("as_bytes", [False, True])
def test_gpus_come_from_nvml_and_a_lost_one_is_left_out(monkeypatch: pytest.MonkeyPatch, as_bytes: bool) -> None:
    nvml = FakeNvml(as_bytes=as_bytes)
    monkeypatch.setattr(module, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    assert probe().gpus == (Gpu("RTX 4090", 24 << 30),)
    assert nvml.open == 0


@pytest.mark.parametrize("nvml", [None, FakeNvml(driver=False)])
def test_no_nvml_or_no_driver_is_normal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nvml: Any
) -> None:
    monkeypatch.setattr(module, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with caplog.at_level(logging.DEBUG, logger=module.__name__):
        assert probe().gpus == ()
    assert all(record.levelno <= logging.INFO for record in caplog.records)


def test_a_machine_without_cpuinfo_still_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "none")
    assert isinstance(probe().cpu_model, str)


def test_without_a_driver_the_bindings_are_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_driver", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]  # importing it would raise
    assert probe().gpus == ()
