"""Looks for the server's secrets in its own environment."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
sys.exit(arena["token"] not in os.environ.values())
