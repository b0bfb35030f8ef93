"""Run the paper's protocol from a manifest: python scripts/experiment.py tasks/vision/experiments/demo.toml."""

from pathlib import Path

from tasks.cli.errors import explained
from tasks.cli.log import show_log
from tasks.cli.options import OptionParser
from tasks.experiments.run import ExperimentConfig, run_experiment


def main() -> None:
    parser = OptionParser(ExperimentConfig, allow_abbrev=False, description=__doc__)
    parser.add_argument("manifest", help="TOML file of an experiment, such as those in tasks/*/experiments/")
    with explained():
        parser.parse_known_options(None)  # an unknown option is named first
        config, named = parser.parse_args_into_dataclasses()
        show_log()
        run_experiment(Path(named.manifest), config)


if __name__ == "__main__":
    main()
