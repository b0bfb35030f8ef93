"""Tables and figures of runs: python scripts/report.py DIR --output report.html (or RESULTS.md)."""

from pathlib import Path

from tasks.cli.errors import explained
from tasks.cli.options import OptionParser
from tasks.experiments.report import ReportConfig, report


def main() -> None:
    parser = OptionParser(ReportConfig, allow_abbrev=False, description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of scripts/experiment.py, run folders, or folders of these")
    with explained():
        parser.parse_known_options(None)  # an unknown option is named first
        config, named = parser.parse_args_into_dataclasses()
        report([Path(run) for run in named.runs], config)


if __name__ == "__main__":
    main()
