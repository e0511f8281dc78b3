"""Readers of data sets: labelled images, shards of tensors, endless batches."""

from dmdkit.data.batches import BatchStream as BatchStream
from dmdkit.data.images import BadImageError as BadImageError
from dmdkit.data.images import ImageDataset as ImageDataset
from dmdkit.data.images import LabelledImage as LabelledImage
from dmdkit.data.images import open_images as open_images
from dmdkit.data.shards import ShardedTensors as ShardedTensors
from dmdkit.data.shards import ShardWriter as ShardWriter
