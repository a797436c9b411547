"""Projections: hidden states of a model to input vectors of another; from a model to itself, the latent step."""
