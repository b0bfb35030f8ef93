"""Images with their classes, in three splits: drawn ones, CIFAR archives, class folders, data sets."""

from tasks.vision.data.sources import ImageSplits as ImageSplits
from tasks.vision.data.sources import load_images as load_images
