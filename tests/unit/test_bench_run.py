"""`make bench` finds every measurement by itself; what it leaves out is there, and said."""

from pathlib import Path

import bench
import pytest
from bench.run import ARGUMENTS, FOLDER, LEFT_OUT, PARTS, main, measurements


def test_what_is_left_out_or_has_arguments_is_a_program_here() -> None:
    assert Path(bench.__path__[0]) == FOLDER
    programs = {path.stem for path in FOLDER.glob("*.py")} | {
        path.parent.name for path in FOLDER.glob("*/__main__.py")
    }
    assert LEFT_OUT.keys() | PARTS <= programs
    assert ARGUMENTS.keys() <= set(measurements())
    assert {"gateway", "orchestration", "sandbox_overhead", "gpu_queue"} <= set(measurements())
    assert not LEFT_OUT.keys() & set(measurements())


def test_a_measurement_that_is_not_there_is_refused_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "choose from" in capsys.readouterr().err
