"""Reads the server's environment through /proc."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
sys.exit(b"=" not in Path(f"/proc/{arena['server_pid']}/environ").read_bytes())
