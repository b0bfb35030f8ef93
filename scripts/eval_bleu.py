"""Translate and score: python scripts/eval_bleu.py --model runs/m1/model runs/m4/model --test-prefix data/test."""

from tasks.cli.errors import explained
from tasks.translation.evaluation.config import parse_evaluation
from tasks.translation.evaluation.evaluate import evaluate


def main() -> None:
    with explained():
        evaluate(*parse_evaluation())


if __name__ == "__main__":
    main()
