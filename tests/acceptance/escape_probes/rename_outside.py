"""Moves its own file to the outside."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path("mine").write_text("x")
Path("mine").rename(Path(arena["outside"], "evidence"))
