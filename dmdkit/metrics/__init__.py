"""Metrics: feature statistics, distances of sets, fidelity and variety."""

from dmdkit.metrics.images import centre_crop as centre_crop
from dmdkit.metrics.images import clean_resize as clean_resize
from dmdkit.metrics.images import lanczos_resize as lanczos_resize
from dmdkit.metrics.images import pairwise_diversity as pairwise_diversity
from dmdkit.metrics.kernel import KernelDistance as KernelDistance
from dmdkit.metrics.kernel import kernel_distance as kernel_distance
from dmdkit.metrics.kernel import squared_mmd as squared_mmd
from dmdkit.metrics.manifold import DensityCoverage as DensityCoverage
from dmdkit.metrics.manifold import PrecisionRecall as PrecisionRecall
from dmdkit.metrics.manifold import density_coverage as density_coverage
from dmdkit.metrics.manifold import precision_recall as precision_recall
from dmdkit.metrics.statistics import FeatureStatistics as FeatureStatistics
from dmdkit.metrics.statistics import frechet_distance as frechet_distance
from dmdkit.metrics.statistics import nearest_distance as nearest_distance
