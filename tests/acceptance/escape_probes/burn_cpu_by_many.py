"""Four processes calculate for 0.9 seconds each."""

import json
import os
import sys
import time

arena = json.loads(sys.argv[1])
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        while time.process_time() < 0.9:
            pass
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
