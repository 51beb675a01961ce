"""Takes another process's open files away."""

import json
import resource
import sys

arena = json.loads(sys.argv[1])
resource.prlimit(arena["bystander_pid"], resource.RLIMIT_NOFILE, (3, 3))
