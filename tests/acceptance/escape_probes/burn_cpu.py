"""Calculates for 2 seconds."""

import json
import sys
import time

arena = json.loads(sys.argv[1])
while time.process_time() < 2:
    pass
