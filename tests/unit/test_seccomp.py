"""The seccomp filter: its numbers are the kernel's, and every jump of it lands inside."""

import re
import struct
from pathlib import Path

import pytest

from ai_agent_server.sandbox import _seccomp

HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+) (\d+)"),
    "aarch64": ("/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+) (\d+)"),
}
JUMPS = {0x15, 0x35, 0x45}
RETURN = 0x06


@pytest.mark.parametrize(("column", "machine"), [(0, "x86_64"), (1, "aarch64")])
def test_the_numbers_are_those_of_the_kernels_headers(column: int, machine: str) -> None:
    path, pattern = HEADERS[machine]
    if not Path(path).exists():
        pytest.skip("the kernel's headers are not installed")
    known: dict[str, int] = {}
    for name, number in re.findall(pattern, Path(path).read_text()):
        known.setdefault(name, int(number))
    for name, numbers in (*_seccomp.REFUSALS.items(), *_seccomp.SIGNALS.items()):
        if name in known and numbers[column] is not None:
            assert numbers[column] == known[name], name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("keep_signals", [True, False])
def test_every_jump_lands_on_an_instruction_and_the_end_is_a_return(machine: str, keep_signals: bool) -> None:
    program = _seccomp.program(machine, keep_signals=keep_signals)
    assert program is not None
    steps = list(struct.iter_unpack("=HBBI", program))
    assert len(steps) < 4096
    assert steps[-1] == (RETURN, 0, 0, _seccomp.PERMITTED)
    for index, (operation, if_true, if_false, _) in enumerate(steps):
        if operation in JUMPS:
            assert index + 1 + max(if_true, if_false) < len(steps)


def test_a_machine_whose_numbers_are_not_known_has_no_filter() -> None:
    assert _seccomp.program("riscv64", keep_signals=True) is None
