"""Opens a file of the server's user to all."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path(arena["secret"]).chmod(0o777)
