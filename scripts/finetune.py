"""Train a transformers model on a data set with the Trainer: python scripts/finetune.py --model DIR --dataset DIR."""

from tasks.cli.errors import explained
from tasks.finetuning.config import parse_finetuning
from tasks.finetuning.train import finetune


def main() -> None:
    with explained():
        finetune(*parse_finetuning())


if __name__ == "__main__":
    main()
