"""Writes 60 MB where the path is too long to be looked up."""

import json
import os
import sys
import time
from pathlib import Path

arena = json.loads(sys.argv[1])
for _ in range(30):
    Path("d" * 200).mkdir()
    os.chdir("d" * 200)
for number in range(20):
    Path(f"flood-{number}").write_bytes(bytes(3_000_000))
time.sleep(1)
