"""Writes to the outside through a link in its work folder."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path("link").symlink_to(arena["outside"])
Path("link", "evidence").write_text("x")
