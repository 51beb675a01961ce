"""Reads the machine's users."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
sys.exit(not Path("/etc/passwd").read_text())
