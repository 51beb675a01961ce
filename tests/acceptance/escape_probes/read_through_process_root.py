"""Walks out through /proc/1/root."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
sys.exit(Path("/proc/1/root" + arena["secret"]).read_text() != arena["token"])
