"""Everything of `scripts/eval_bleu.py`."""
