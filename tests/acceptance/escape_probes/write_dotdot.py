"""Leaves its work folder by its parent."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path("..", f"evidence-{arena['token']}").write_text("x")
Path("..", f"evidence-{arena['token']}").unlink()
