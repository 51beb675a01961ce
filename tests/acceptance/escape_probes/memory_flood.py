"""Takes 200 MB."""

import json
import sys

arena = json.loads(sys.argv[1])
hoard = bytearray(200_000_000)
sys.exit(len(hoard) < len(arena))
