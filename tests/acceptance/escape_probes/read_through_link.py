"""Makes a link in its work folder that leads to a secret."""

import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
Path("link").symlink_to(arena["secret"])
sys.exit(Path("link").read_text() != arena["token"])
