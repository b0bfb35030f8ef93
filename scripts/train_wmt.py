"""Train a translation model with Batch Augmentation: accelerate launch scripts/train_wmt.py --ba-m 4."""

from tasks.cli.errors import explained
from tasks.translation.config import parse_config
from tasks.translation.train import train


def main() -> None:
    with explained():
        train(parse_config())


if __name__ == "__main__":
    main()
