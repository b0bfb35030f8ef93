"""Show which random operations of a model differ between copies: python scripts/audit_masks.py MODEL_DIR_OR_CONFIG."""

import argparse
import json

from tasks.audit import audit_model
from tasks.errors import explained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a transformers model folder, or a config.json (its weights are then random)")
    parser.add_argument("--batch-size", type=int, default=4, help="B, samples before repetition")
    parser.add_argument("--length", type=int, default=16, help="tokens a sample, of text models")
    parser.add_argument("--num-copies", type=int, default=4, help="M; more give a sharper estimate of the variance")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args()
    with explained():
        audit = audit_model(
            options.model, batch_size=options.batch_size, length=options.length, num_copies=options.num_copies
        )
    print(json.dumps(audit.to_dict(), indent=2) if options.json else audit)


if __name__ == "__main__":
    main()
