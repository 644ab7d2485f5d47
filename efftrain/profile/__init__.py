"""Parameters, MACs, activations, memory and energy of a model."""

from efftrain.profile.energy import NumberFormat
from efftrain.profile.model import LayerProfile, ModelProfile, profile_model

__all__ = ["LayerProfile", "ModelProfile", "NumberFormat", "profile_model"]
