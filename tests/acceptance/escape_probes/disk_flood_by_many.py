"""Writes 20 files of 3 MB."""

import json
import sys
import time
from pathlib import Path

arena = json.loads(sys.argv[1])
for number in range(20):
    Path(f"flood-{number}").write_bytes(bytes(3_000_000))
time.sleep(1)
