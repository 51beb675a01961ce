"""Writes into a folder that all may write to."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path(arena["outside"], "evidence").write_text("x")
