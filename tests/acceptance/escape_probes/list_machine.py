"""Lists the root of the machine's file system."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
sys.exit(Path("/etc") not in Path("/").iterdir())
