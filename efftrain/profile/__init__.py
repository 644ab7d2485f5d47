"""Parameters, MACs, activations, memory and energy of a model."""
