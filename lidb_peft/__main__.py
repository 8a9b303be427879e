"""``python -m lidb_peft`` is ``hdb``, and so is ``accelerate launch -m lidb_peft``: no working folder has that name.

An entry point like the CLI; nothing imports it.
"""

import sys
from pathlib import Path

# With -m, Python looks into the working folder first, where a cli.py may be: `main` is to run and name it.
sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.main import main

del sys.path[0]

if __name__ == "__main__":
    main()
