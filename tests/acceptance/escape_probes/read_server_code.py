"""Reads the server's own installation."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
sys.exit(not Path(arena["server_code"]).read_text())
