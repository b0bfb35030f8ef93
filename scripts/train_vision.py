"""Train an image classifier with Batch Augmentation: accelerate launch scripts/train_vision.py --ba-m 10."""

from tasks.cli.errors import explained
from tasks.vision.config import parse_config
from tasks.vision.train import train


def main() -> None:
    with explained():
        train(parse_config())


if __name__ == "__main__":
    main()
