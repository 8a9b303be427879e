"""Saying what an adapter file holds, and what its readers would stumble over."""
