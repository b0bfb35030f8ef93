"""Image classification."""

from tasks.vision.networks import build_model as build_model
