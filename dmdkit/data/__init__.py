"""Readers of data sets: images, shards of tensors, prompts; endless batches."""

from dmdkit.data.batches import BatchStream as BatchStream
from dmdkit.data.images import BadImageError as BadImageError
from dmdkit.data.images import ImageDataset as ImageDataset
from dmdkit.data.images import LabelledImage as LabelledImage
from dmdkit.data.images import open_images as open_images
from dmdkit.data.prompts import Prompts as Prompts
from dmdkit.data.prompts import read_prompts as read_prompts
from dmdkit.data.shards import ShardedTensors as ShardedTensors
from dmdkit.data.shards import ShardWriter as ShardWriter
