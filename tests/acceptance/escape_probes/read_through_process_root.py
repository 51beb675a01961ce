"""Walks out through the root of another process in /proc."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
root = f"/proc/{arena['server_pid']}/root"
sys.exit(Path(root + arena["secret"]).read_text() != arena["token"])
