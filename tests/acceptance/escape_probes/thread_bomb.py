"""Starts 50 threads at once."""

import json
import sys
import threading

arena = json.loads(sys.argv[1])
enough = threading.Event()
threads = [threading.Thread(target=enough.wait, args=(2,), daemon=True) for _ in range(50)]
for thread in threads:
    thread.start()
enough.set()
