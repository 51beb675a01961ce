"""Takes memory that no process maps."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
hoard = os.memfd_create("hoard")
os.write(hoard, bytes(1_000_000))
