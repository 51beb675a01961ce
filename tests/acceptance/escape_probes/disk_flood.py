"""Writes one file of 40 MB."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path("flood").write_bytes(bytes(40_000_000))
