"""Opens a folder without reading it, then a file below it."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
folder = os.open(arena["outside"], os.O_PATH)
sys.exit(not os.read(os.open("victim", os.O_RDONLY, dir_fd=folder), 1))
