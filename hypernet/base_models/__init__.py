"""Base models: loading them, and what fitting, training and sampling ask of them.

`base.py` is the protocol; beside it stands one file for each family of models, and `loading.py` opens any of them.
"""
