"""Image classification."""

from tasks.vision.model_folder import load_classifier as load_classifier
from tasks.vision.networks import build_model as build_model
