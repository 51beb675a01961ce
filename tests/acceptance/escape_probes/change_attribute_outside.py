"""Writes an extended attribute."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
os.setxattr(arena["victim"], "user.evidence", b"x")
