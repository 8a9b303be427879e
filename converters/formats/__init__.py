"""Adapter file formats: a module for each, and reading any of them into one representation of a LoRA."""
