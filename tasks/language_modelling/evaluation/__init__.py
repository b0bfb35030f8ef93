"""Everything of `scripts/eval_ppl.py`."""
