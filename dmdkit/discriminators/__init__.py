"""Discriminators: the head, the critic that carries it, heads on other features."""

from dmdkit.discriminators.head import DiffusionGANHead as DiffusionGANHead
from dmdkit.discriminators.networks import FeatureDiscriminator as FeatureDiscriminator
from dmdkit.discriminators.networks import NetworkWithHead as NetworkWithHead
