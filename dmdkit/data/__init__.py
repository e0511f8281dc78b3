"""Readers of data sets: images, shards, latents, prompts; endless batches."""

from dmdkit.data.batches import BatchStream as BatchStream
from dmdkit.data.images import BadImageError as BadImageError
from dmdkit.data.images import ImageDataset as ImageDataset
from dmdkit.data.images import LabelledImage as LabelledImage
from dmdkit.data.images import open_images as open_images
from dmdkit.data.latents import LatentDataset as LatentDataset
from dmdkit.data.latents import LatentKind as LatentKind
from dmdkit.data.latents import LatentSample as LatentSample
from dmdkit.data.latents import open_latents as open_latents
from dmdkit.data.latents import weights_digest as weights_digest
from dmdkit.data.prompts import Prompts as Prompts
from dmdkit.data.prompts import read_prompts as read_prompts
from dmdkit.data.shards import ShardedTensors as ShardedTensors
from dmdkit.data.shards import ShardWriter as ShardWriter
