"""A tab in Automatic1111's webui and Forge: this folder, but for ``command``, is an extension of theirs.

Nothing in it imports lidb-peft: it starts ``hdb`` in the Python that has it, whose packages are newer than the webui's.
"""
