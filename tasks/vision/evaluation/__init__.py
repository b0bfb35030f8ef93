"""Evaluation of image classifiers, with test-time augmentation: `scripts/eval_vision.py`."""
