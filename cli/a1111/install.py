"""Run by the webui when it starts: installs nothing, for lidb-peft needs newer packages than the webui has."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from lidb_peft_process import why_hdb_cannot_run

problem = why_hdb_cannot_run()
if problem:
    print(f"lidb-peft: {problem}")
