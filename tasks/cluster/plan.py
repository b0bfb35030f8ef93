"""The options, the table and the figure of `scripts/plan_cluster.py`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from seqba.checkpoint import find_checkpoint
from seqba.groups import CopyGroup
from tasks.cli.errors import UserError, make_folder, writing
from tasks.cli.files import write_json
from tasks.cli.machine import MachineOptions, parse_with_machine, start_accelerator
from tasks.cli.options import check_least, flag, option
from tasks.cluster.costs import Costs, Network, Prediction, fit_costs, predict

logger = logging.getLogger(__name__)

_RANKS_OF_FIGURE = 5_000
_PROBES = (1_024, 32 << 20)  # bytes of the two reductions that tell latency and bandwidth


@dataclass(frozen=True)
class PlanConfig:
    """All options of `scripts/plan_cluster.py`."""

    run: list[str] = option(
        [],
        "run folders of training scripts on one rank, which tell the time of a copy; runs with different --ba-m tell "
        "what an update costs besides",
    )
    measure_network: bool = option(
        False, "time reductions between the ranks of torchrun, print bandwidth and latency, and do nothing else"
    )

    bandwidth: float | None = option(
        None, "bytes a second from one rank to the next, such as 1.25e9 for 10 Gbit/s", group="network"
    )
    latency: float = option(5e-5, "seconds of a message without content")
    overlap: float = option(0.0, "share of the reduction that is hidden behind the backward pass, 0 to 1")

    ranks: list[int] = option([1, 2, 4, 8, 16, 32, 64], "W, the numbers of ranks to predict", group="cluster")
    ba_m: list[int] = option([1, 4, 10], "M, the copies of a sample")
    ranks_per_group: list[int] = option([1], "R; 0 is M: a copy a rank")
    cores: int | None = option(None, "processor cores that all ranks share; by default each rank has its own")
    output_dir: str | None = option(None, "new folder for plan.json and plan.png", group="results")

    def __post_init__(self) -> None:
        check_least(self, {"cores": 1})
        for name, least in (("ranks", 1), ("ba_m", 1), ("ranks_per_group", 0)):
            if wrong := [value for value in getattr(self, name) if value < least]:
                raise UserError(f"{flag(name)} must be at least {least}, got {wrong[0]}")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"--overlap must be from 0 to 1, got {self.overlap}")
        if not 0 <= self.latency < float("inf"):
            raise UserError(f"--latency must be at least 0 seconds and finite, got {self.latency}")
        if self.measure_network:
            return
        if not self.run:
            raise UserError("no measured run: give --run, run folders of training scripts on one rank")
        if self.bandwidth is None or not 0 < self.bandwidth < float("inf"):
            raise UserError(f"--bandwidth must be above 0 bytes a second and finite, got {self.bandwidth}")


def parse_plan(argv: Sequence[str] | None = None) -> tuple[PlanConfig, MachineOptions]:
    """Options from the command line; see `parse_with_machine`."""
    return parse_with_machine(PlanConfig, argv, "Predict the rates of a cluster from measured runs.")


def plan(config: PlanConfig, machine: MachineOptions) -> list[dict[str, Any]]:
    """Print the table of predictions, and write it with its figure where a folder is named.

    Raises:
        UserError: a run cannot be used, or no M, W and R go together.
    """
    accelerator = start_accelerator(machine, seed=0)
    if config.measure_network:
        network = measure_network(accelerator.device)
        logger.info("--bandwidth %.4g --latency %.3g", network.bandwidth, network.latency)
        return []
    assert config.bandwidth is not None
    network, costs = Network(config.bandwidth, config.latency), costs_of_runs(config.run, config.overlap)
    logger.info(
        "a copy of a batch of %.1f samples takes %.4g s, an update %.4g s besides; its gradients are %.4g bytes",
        costs.batch_size,
        costs.copy_seconds,
        costs.update_seconds,
        costs.gradient_bytes,
    )
    rows = []
    for num_copies in config.ba_m:
        for asked in dict.fromkeys(config.ranks_per_group):
            for world in config.ranks:
                in_group = asked or num_copies
                if world % in_group or num_copies % in_group:
                    continue
                group = CopyGroup(num_copies, world_size=world, ranks_per_group=in_group)
                found = predict(costs, network, group, cores=config.cores)
                rows.append({"M": num_copies, "R": in_group, "W": world, **vars(found)})
    if not rows:
        raise UserError("no --ranks is a multiple of a --ranks-per-group that divides its --ba-m")
    logger.info("    M     R      W  updates/s  unique samples/s  samples read/s  reduction")
    for row in rows:
        logger.info(
            f"{row['M']:5} {row['R']:5} {row['W']:6} {row['updates']:10.3f} {row['samples']:17.1f} "
            f"{row['reads']:15.1f} {row['reduction_share']:10.1%}"
        )
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        make_folder(folder, remedy="give another --output-dir")
        with writing(folder, remedy="give another --output-dir"):
            write_json(folder / "plan.json", {"costs": vars(costs), "network": vars(network), "rows": rows})
            draw_plan(costs, network, config.ba_m, folder / "plan.png")
        logger.info("%s: plan.json, plan.png", folder)
    return rows


def costs_of_runs(folders: Sequence[str], overlap: float = 0.0) -> Costs:
    """What a copy and an update cost, from the `results.json` of runs on one rank and the size of their weights.

    Raises:
        UserError: a folder holds no finished run, or one of several ranks.
    """
    found, sizes, batches = [], [], []
    for name in folders:
        folder = Path(name)
        try:
            results = json.loads((folder / "results.json").read_text("utf-8"))
            if results["num_processes"] != 1:
                raise UserError(f"--run {name} is of {results['num_processes']} ranks; give runs on one")
            found.append((int(results["num_copies"]), results["seconds"] / results["updates"]))
            batches.append(results["unique_samples"] / results["updates"])
            sizes.append(_weights(folder))
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--run {name} holds no finished run of a training script ({error!r})") from error
    copy, rest = fit_costs(found)
    return Costs(copy, rest, max(sizes), sum(batches) / len(batches), overlap)


def _weights(folder: Path) -> int:
    """Bytes of the weights in the newest checkpoint or the model folder: as many as their gradients have."""
    checkpoint, _ = find_checkpoint(folder / "checkpoints")
    places = ([checkpoint] if checkpoint is not None else []) + [folder / "model"]
    for place in places:
        if sizes := [file.stat().st_size for file in place.glob("model*.safetensors")]:
            return sum(sizes)
    raise UserError(f"--run {folder} has no weights, neither in model/ nor in checkpoints/")


def measure_network(device: torch.device, repeats: int = 9) -> Network:
    """Bandwidth and latency between the ranks of this run, as the ring's formula has them.

    Raises:
        UserError: there is one rank.
    """
    if not torch.distributed.is_initialized():
        raise UserError("--measure-network needs ranks: torchrun --nproc_per_node 2 scripts/plan_cluster.py ...")
    world = torch.distributed.get_world_size()
    seconds = []
    for size in _PROBES:
        numbers, timings = torch.zeros(size // 4, device=device), []
        for _ in range(repeats):
            torch.distributed.barrier()
            start = time.perf_counter()
            torch.distributed.all_reduce(numbers)
            numbers[0].item()  # waits for the device
            timings.append(time.perf_counter() - start)
        seconds.append(sorted(timings)[repeats // 2])
    steps = 2 * (world - 1)
    per_byte = (seconds[1] - seconds[0]) / (_PROBES[1] - _PROBES[0]) * world / steps
    return Network(bandwidth=1 / per_byte, latency=seconds[0] / steps)


def draw_plan(costs: Costs, network: Network, num_copies: Sequence[int], file: Path) -> None:
    """Updates a second against ranks, a copy a rank: what the paper's Figure 5 says of M = 4 and M = 10, for any M."""
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    panel = figure.subplots()
    for copies in num_copies:
        worlds = [copies * 2**n for n in range(20) if copies * 2**n <= _RANKS_OF_FIGURE]
        rates = [predict_one_copy_each(costs, network, copies, world).updates for world in worlds]
        panel.plot(worlds, rates, marker="o", markersize=3, label=f"M = {copies}")
    panel.set(
        xscale="log", xlabel="ranks, each with one copy of its group's batch", ylabel="updates a second", ylim=(0, None)
    )
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(file)


def predict_one_copy_each(costs: Costs, network: Network, num_copies: int, world: int) -> Prediction:
    """The rates where each rank computes one copy."""
    return predict(costs, network, CopyGroup(num_copies, world_size=world, ranks_per_group=num_copies))
