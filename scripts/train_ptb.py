"""Train a language model with Batch Augmentation: accelerate launch scripts/train_ptb.py --ba-m 10."""

from tasks.cli.errors import explained
from tasks.language_modelling.config import parse_config
from tasks.language_modelling.train import train


def main() -> None:
    with explained():
        train(parse_config())


if __name__ == "__main__":
    main()
