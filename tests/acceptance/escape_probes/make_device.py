"""Makes a device node for the machine's memory."""

import json
import os
import stat
import sys

arena = json.loads(sys.argv[1])
os.mknod("device", 0o600 | stat.S_IFCHR, os.makedev(1, 1))
