"""Opens a device that every machine has: its kernel's log."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
sys.exit(os.open("/dev/kmsg", os.O_RDONLY) < 0)
