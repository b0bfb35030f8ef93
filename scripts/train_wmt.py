"""Train a translation model with Batch Augmentation: accelerate launch scripts/train_wmt.py --ba-m 4."""

import sys

from tasks.errors import UserError
from tasks.translation.config import parse_config
from tasks.translation.train import train


def main() -> None:
    try:
        train(parse_config())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
