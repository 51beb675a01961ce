"""Makes a hard link to a secret."""

import json
import os
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
os.link(arena["secret"], arena["beside_secret"])
sys.exit(Path(arena["beside_secret"]).read_text() != arena["token"])
