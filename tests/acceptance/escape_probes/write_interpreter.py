"""Puts a module among the interpreter's own, and takes it away again."""

import json
import os
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
planted = Path(os.__file__).with_name(f"planted_{arena['token']}.py")
planted.write_text("")
planted.unlink()
