"""Arithmetic on updates: sums, lower ranks and LiDB projections, of LoRAs and of whole models."""
