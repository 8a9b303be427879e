"""Fitting weights to photos: the engine for many people at once, its losses, and targets fitted ahead of training."""
