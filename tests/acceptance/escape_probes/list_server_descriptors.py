"""Lists the server's open files."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
sys.exit(not list(Path(f"/proc/{arena['server_pid']}/fd").iterdir()))
