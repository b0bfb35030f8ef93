"""Image classifiers by name; one family a file."""

from tasks.vision.networks.build import build_model as build_model
from tasks.vision.networks.build import parameter_groups as parameter_groups
