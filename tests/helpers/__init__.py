"""What several tests share. Some of it runs the examples' workloads: whoever imports this finds them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
