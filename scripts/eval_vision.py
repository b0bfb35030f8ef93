"""Accuracy of image classifiers: python scripts/eval_vision.py --model runs/m1/model runs/m4/model --tta 10."""

from tasks.cli.errors import explained
from tasks.vision.evaluation.config import parse_evaluation
from tasks.vision.evaluation.evaluate import evaluate


def main() -> None:
    with explained():
        evaluate(*parse_evaluation())


if __name__ == "__main__":
    main()
