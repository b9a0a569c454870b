"""Write the JSON schema of cluster.yaml, for editors. Usage: python .ci/write_schema.py FILE"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flm.cluster.settings.config import json_schema

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(json_schema(), indent=2) + "\n")
