"""Empties a file by its path."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
os.truncate(arena["victim"], 0)
