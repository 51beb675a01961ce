"""Looks for the work folders of other runs."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
sys.exit(not any((folder / "other").exists() for folder in Path(arena["temporary"]).iterdir()))
