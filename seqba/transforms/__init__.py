"""Random transforms of whole batches of images, each image under parameters of its own, on any device.

torchvision's transforms draw once for all images of a batch. These draw for each: from torch's generator, or from keys,
(seed, epoch, sample, copy) for instance, of which the draws are then a function alone.
"""

from seqba.transforms.batched import BatchTransform as BatchTransform
from seqba.transforms.batched import Compose as Compose
from seqba.transforms.batched import Normalize as Normalize
from seqba.transforms.crop import RandomCrop as RandomCrop
from seqba.transforms.cutout import Cutout as Cutout
from seqba.transforms.each import EachImage as EachImage
from seqba.transforms.flip import RandomHorizontalFlip as RandomHorizontalFlip
from seqba.transforms.mixup import Mixup as Mixup
from seqba.transforms.mixup import mix_rows as mix_rows
