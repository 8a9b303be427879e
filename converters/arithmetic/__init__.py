"""Computing with updates: sums and nearest ones of lower rank, of LoRAs, of whole models, and as LiDB weights."""
