"""What runs come to: one self-contained page, a Markdown file of results, and small copies of their records."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tasks.cli.errors import UserError, make_folder, writing
from tasks.cli.files import write_text
from tasks.cli.options import option
from tasks.experiments.figures import as_svg, figures, save_figures
from tasks.experiments.records import EVALUATION, EXPERIMENT, RESULTS, SIGNIFICANCE, Experiment, read_experiments
from tasks.experiments.tables import Table, label, tables

_KEPT = (RESULTS, "metrics.jsonl", EXPERIMENT, SIGNIFICANCE)
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d5d5d5; --soft: #f5f5f3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #161616; --line: #3d3d3d; --soft: #212121; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: normal;
  vertical-align: top; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .3rem .35rem; } }
ul { padding-left: 1.2rem; font-size: .92rem; } figure { margin: 1.5rem 0; break-inside: avoid; }
figure svg { display: block; width: 100%; max-width: 44rem; height: auto; } figcaption { font-size: .92rem; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; white-space: pre-wrap; font-size: .82rem; }
@media print { :root { --ink: #000; --paper: #fff; --line: #999; --soft: #fff; color-scheme: light; }
  body { max-width: none; font-size: 10pt; } .scroll { overflow: visible; } th, td { padding: .15rem .35rem; }
  th, td { white-space: normal; } tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


@dataclass(frozen=True)
class ReportConfig:
    """Options of `scripts/report.py` beside the runs."""

    output: str | None = option(None, "file to write: a page, NAME.html, or tables alone, NAME.md")
    figures: str | None = option(None, "folder for every figure as SVG and PNG")
    collect: str | None = option(
        None, "folder for a copy of the small records (results.json, metrics.jsonl), without weights and logs"
    )

    def __post_init__(self) -> None:
        if self.output is None and self.figures is None and self.collect is None:
            raise UserError("nothing to write: give --output FILE.html or FILE.md, --figures DIR, or --collect DIR")
        if self.output is not None and Path(self.output).suffix not in (".html", ".md"):
            raise UserError(f"--output must end in .html or .md, got {self.output}")


def report(runs: Sequence[Path], config: ReportConfig) -> None:
    """Write what is asked for.

    Raises:
        UserError: a folder holds no finished run, or a file cannot be written.
    """
    experiments = read_experiments(runs)
    if config.output is not None:
        file = Path(config.output)
        text = page(experiments) if file.suffix == ".html" else markdown(experiments)
        make_folder(file.parent, remedy="give another --output")
        with writing(file, remedy="give another --output"):
            write_text(file, text)
    for experiment in experiments:
        name = experiment.folder.name if len(experiments) > 1 else ""
        if config.figures is not None:
            save_figures(experiment, Path(config.figures, name))
        if config.collect is not None:
            collect(experiment, Path(config.collect, name))


def collect(experiment: Experiment, folder: Path) -> None:
    """Copy the small files of an experiment's finished runs into `folder`."""
    sources = [record.folder for record in experiment.records]
    sources += [place for place in (experiment.folder / EVALUATION,) if (place / RESULTS).is_file()]
    files = [place / name for place in sources for name in _KEPT]
    files += [experiment.folder / name for name in (EXPERIMENT, SIGNIFICANCE)]
    with writing(folder, remedy="give another --collect"):
        for file in filter(Path.is_file, files):
            target = folder / file.relative_to(experiment.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def markdown(experiments: Sequence[Experiment]) -> str:
    """The tables of experiments: `RESULTS.md`."""
    parts = ["# Results", "Made from the records in `results/` by `scripts/report.py`; edit nothing here."]
    for experiment in experiments:
        parts += [f"## {experiment.title}", *(table.as_markdown() for table in tables(experiment))]
    return "\n\n".join(parts) + "\n"


def page(experiments: Sequence[Experiment]) -> str:
    """One HTML page that needs nothing beside itself: no network, no script, no font."""
    body = "\n".join(_section(number, experiment) for number, experiment in enumerate(experiments))
    title = experiments[0].title if len(experiments) == 1 else "Batch Augmentation: results"
    head = "" if len(experiments) == 1 else f"<h1>{escape(title)}</h1>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n{head}{body}\n</body></html>\n"
    )


def _section(number: int, experiment: Experiment) -> str:
    found = tables(experiment)
    drawn = [
        f"<figure>{as_svg(figure, f'e{number}-{name}')}<figcaption>{escape(caption)}</figcaption></figure>"
        for name, (caption, figure) in figures(experiment).items()
    ]
    shown = [_table(table) for table in found]
    return "\n".join(
        [
            f"<h1>{escape(experiment.title)}</h1>",
            *shown[:1],
            "<h2>Figures</h2>",
            *drawn,
            *shown[1:],
            _options(experiment),
        ]
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n<ul>{notes}</ul>"
    )


def _options(experiment: Experiment) -> str:
    """The configuration of every group, but for the seed."""
    parts = []
    for name, records in experiment.groups().items():
        options = "\n".join(f"{key} = {value}" for key, value in records[0].options.items() if key != "seed")
        seeds = ", ".join(str(record.seed) for record in records)
        what = escape(f"{label(records[0])} ({name}; seeds {seeds})")
        parts.append(f"<details><summary>{what}</summary><pre>{escape(options)}</pre></details>" if options else "")
    return "\n".join(["<h2>Configurations</h2>", *parts]) if any(parts) else ""
