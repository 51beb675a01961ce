"""What is free of RAM and of an NVIDIA card: the real /proc, the real binding over a double of the driver."""

import ctypes
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest

from ai_agent_server.assembly import gauges_for
from ai_agent_server.config.settings import parse
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.memory_gauges.nvidia import NvidiaGauge
from ai_agent_server.memory_gauges.ram import RAMGauge

MB = 2**20
OK = 0
LOST: int = pynvml.NVML_ERROR_GPU_IS_LOST
NOT_FOUND: int = pynvml.NVML_ERROR_NOT_FOUND


class Driver:
    """libnvidia-ml as nvidia-ml-py calls it: C functions that fill what they are pointed to."""

    def __init__(self) -> None:
        self.total_mb, self.free_mb = 16_384, 15_000
        self.opened = 0
        self.lost = False

    def nvmlInitWithFlags(self, _flags: int) -> int:  # noqa: N802 - theirs
        self.opened += 1
        return OK

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.opened -= 1
        return OK

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, _handle: Any) -> int:  # noqa: N802
        return OK if index.value == 0 else NOT_FOUND

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, _handle: Any) -> int:  # noqa: N802
        return OK if uuid.value == b"GPU-1" else NOT_FOUND

    def nvmlDeviceGetName(self, _handle: Any, name: Any, _size: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA GeForce RTX 5060 Ti"
        return OK

    def nvmlDeviceGetMemoryInfo(self, _handle: Any, memory: Any) -> int:  # noqa: N802
        if self.lost:
            return LOST
        info = memory._obj
        info.total, info.free = self.total_mb * MB, self.free_mb * MB
        info.used = info.total - info.free
        return OK


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(pynvml, "nvmlLib", made)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return made


@pytest.mark.parametrize("where", ["0", "", "GPU-1"])
def test_a_card_tells_what_is_free(driver: Driver, where: str) -> None:
    gauge = NvidiaGauge(where)
    found = gauge.read()
    assert found is not None
    assert (found.device, found.total_mb, found.free_mb) == ("NVIDIA GeForce RTX 5060 Ti", 16_384, 15_000)
    driver.free_mb = 4000
    found = gauge.read()
    assert found is not None
    assert found.free_mb == 4000
    assert driver.opened == 1
    gauge.close()
    assert driver.opened == 0


@pytest.mark.parametrize("where", ["1", "GPU-2"])
def test_a_card_that_is_not_there_tells_nothing_and_holds_nothing(driver: Driver, where: str) -> None:
    assert NvidiaGauge(where).read() is None
    assert driver.opened == 0


def test_a_card_that_was_lost_is_opened_anew_once_it_is_back(driver: Driver) -> None:
    gauge = NvidiaGauge("0")
    gauge.read()
    driver.lost = True
    assert gauge.read() is None
    driver.lost = False
    assert gauge.read() is not None
    assert driver.opened == 1


def test_without_a_driver_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_name: str) -> ctypes.CDLL:
        raise OSError("no such file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", no_library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    gauge = NvidiaGauge("0")
    assert gauge.read() is None
    assert gauge.read() is None
    gauge.close()


def test_ram_tells_what_programs_may_still_take() -> None:
    found, truth = RAMGauge().read(), psutil.virtual_memory()
    assert found is not None
    assert found.total_mb == truth.total / MB
    assert found.free_mb == pytest.approx(truth.available / MB, rel=0.5)


@pytest.mark.parametrize("text", ["", "MemTotal: 16 kB\n", "MemTotal: much\nMemAvailable: 3 kB\n", None])
def test_a_system_that_tells_of_ram_in_another_way_tells_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    assert RAMGauge(meminfo=tmp_path / "meminfo").read() is None


def configured(**accelerators: str) -> bytes:
    each = ",".join(f'"{name}": {{"memory_mb": 9000 {more}}}' for name, more in accelerators.items())
    llm = '{"engine": "local.scripted", "model": "m", "source": "local"}'
    return f'{{"accelerators": {{{each}}}, "llms": {{"a": {llm}}}, "profiles": {{}}}}'.encode()


def test_a_gauge_goes_with_the_name_where_nothing_is_said() -> None:
    settings = parse(
        configured(gpu0="", gpu="", cpu="", igpu="", gpu1=', "device": "none"', big=', "device": "ram"'),
        source="t",
    )
    kinds = {name: type(gauge) for name, gauge in gauges_for(settings).items()}
    assert kinds == {"gpu0": NvidiaGauge, "gpu": NvidiaGauge, "cpu": RAMGauge, "big": RAMGauge}


@pytest.mark.parametrize("device", ["nvidia:first", "ram:1", "abacus"])
def test_a_device_that_cannot_be_is_refused_with_its_place(device: str) -> None:
    settings = parse(configured(gpu0=f', "device": "{device}"'), source="t")
    with pytest.raises(ConfigurationError, match="/accelerators/gpu0/device"):
        gauges_for(settings)
