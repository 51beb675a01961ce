"""Starts 50 processes at once."""

import json
import os
import sys
import time

arena = json.loads(sys.argv[1])
children = []
try:
    for _ in range(50):
        child = os.fork()
        if child == 0:
            time.sleep(2)
            os._exit(0)
        children.append(child)
finally:
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
