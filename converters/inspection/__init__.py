"""Describing what an adapter file holds, and the problems its readers would have with it."""
