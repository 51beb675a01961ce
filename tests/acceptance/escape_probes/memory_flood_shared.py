"""Takes 200 MB that are shared."""

import json
import mmap
import sys

arena = json.loads(sys.argv[1])
hoard = mmap.mmap(-1, 200_000_000)
sys.exit(len(hoard) < len(arena))
