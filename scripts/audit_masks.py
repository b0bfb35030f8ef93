"""Show which random operations of a model differ between copies: python scripts/audit_masks.py MODEL_DIR_OR_CONFIG."""

import json

import tasks.language_modelling  # noqa: F401  # AWD-LSTM is a model that transformers loads
from tasks.cli.errors import explained
from tasks.cli.options import OptionParser
from tasks.models.audit import AuditConfig, audit_model


def main() -> None:
    parser = OptionParser(AuditConfig, allow_abbrev=False, description=__doc__)
    parser.add_argument(
        "model", help="a model folder of transformers, a run folder, or a config.json (for random weights)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    with explained():
        parser.parse_known_options(None)  # an unknown option is named first
        config, named = parser.parse_args_into_dataclasses()
        audit = audit_model(named.model, config)
    print(json.dumps(audit.to_dict(), indent=2) if named.json else audit)


if __name__ == "__main__":
    main()
