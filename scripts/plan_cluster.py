"""Predict a cluster's rates from measured runs: python scripts/plan_cluster.py --run RUN --bandwidth 1.25e9."""

from tasks.cli.errors import explained
from tasks.cluster.plan import parse_plan, plan


def main() -> None:
    with explained():
        plan(*parse_plan())


if __name__ == "__main__":
    main()
