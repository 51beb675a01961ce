"""`make bench` knows every measurement there is: it runs it, or says why not."""

from pathlib import Path

import bench
from bench.run import LEFT_OUT, MEASUREMENTS


def test_every_measurement_is_run_or_left_out_with_its_reason() -> None:
    folder = Path(bench.__path__[0])
    programs = {
        path.parent.name if path.name == "__main__.py" else path.stem
        for path in (*folder.glob("*.py"), *folder.glob("*/__main__.py"))
        if '__name__ == "__main__"' in path.read_text("utf-8")
    }
    assert programs - {"run"} == MEASUREMENTS.keys() | LEFT_OUT.keys()
    assert not MEASUREMENTS.keys() & LEFT_OUT.keys()
