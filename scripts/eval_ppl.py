"""Perplexity of language models: python scripts/eval_ppl.py --model runs/m1/model runs/m4/model --data data/ptb."""

from tasks.cli.errors import explained
from tasks.language_modelling.evaluation.config import parse_evaluation
from tasks.language_modelling.evaluation.evaluate import evaluate


def main() -> None:
    with explained():
        evaluate(*parse_evaluation())


if __name__ == "__main__":
    main()
