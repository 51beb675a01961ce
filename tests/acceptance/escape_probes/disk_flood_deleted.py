"""Writes 20 files of 3 MB that have no name any more."""

import json
import os
import sys
import time
from pathlib import Path

arena = json.loads(sys.argv[1])
kept = []
for number in range(20):
    kept.append(os.open(f"flood-{number}", os.O_CREAT | os.O_WRONLY))
    Path(f"flood-{number}").unlink()
    os.write(kept[-1], bytes(3_000_000))
time.sleep(1)
