"""Translate and score: python scripts/eval_bleu.py --model runs/m1/model runs/m4/model --test-prefix data/test."""

import sys

from tasks.errors import UserError
from tasks.translation.eval_config import parse_evaluation
from tasks.translation.evaluate import evaluate


def main() -> None:
    try:
        evaluate(parse_evaluation())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
