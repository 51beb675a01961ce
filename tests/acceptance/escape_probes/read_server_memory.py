"""Opens the memory of another process of the server's user."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
with Path(f"/proc/{arena['bystander_pid']}/mem").open("rb") as memory:
    sys.exit(not memory.readable())
