"""Training a hypernetwork on many people, and resuming it."""
