"""Metrics: feature statistics, Frechet distance, nearest neighbours."""

from dmdkit.metrics.statistics import FeatureStatistics as FeatureStatistics
from dmdkit.metrics.statistics import frechet_distance as frechet_distance
from dmdkit.metrics.statistics import nearest_distance as nearest_distance
