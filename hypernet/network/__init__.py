"""The hypernetwork: the photo encoder, the decoder that predicts theta, and what a prediction is used with."""
