"""How alike and how long a run's gradients are: python scripts/measure_gradients.py --run runs/m4 --ba-m 1 2 4 8."""

from tasks.cli.errors import explained
from tasks.cli.machine import parse_with_machine
from tasks.gradients.measure import GradientConfig, measure_gradients


def main() -> None:
    with explained():
        measure_gradients(*parse_with_machine(GradientConfig, None, "Measure the gradients of a run."))


if __name__ == "__main__":
    main()
