"""Deletes what lies outside."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path(arena["victim"]).unlink()
