"""The formats that adapters are kept in: one module for each, and reading any of them as one kind of LoRA."""
