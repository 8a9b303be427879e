"""`hdb`, the command line: thin commands, each over one library call."""
