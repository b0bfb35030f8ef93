"""scripts/report.py: records become tables, figures and one page that stands alone."""

import html.parser
import json
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bad_input import SCRIPTS, call
from tasks.experiments.records import Score, read_experiments
from tasks.experiments.significance import p_value_of, welch
from tasks.experiments.tables import averaged, tables, verdict
from tasks.scoring.bleu import paired_bootstrap
from tasks.text.generated.corpus import generate_corpus

TASKS = SCRIPTS.parent / "tasks"
RECORDS = TASKS / "vision" / "results"
CHROMIUM = shutil.which("chromium")
# what a browser measures: figures that drew nothing, and elements that stick out of the page
MEASURE = """<script>addEventListener("load", () => {
  const wide = document.documentElement.clientWidth, figures = [...document.querySelectorAll("figure svg")];
  const empty = figures.filter(svg => svg.getBoundingClientRect().height < 100 || svg.getBBox().width < 200);
  const cut = figures.filter(svg => [...svg.querySelectorAll("text")].some(text => {
    const inner = text.getBoundingClientRect(), outer = svg.getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1; }));
  const out = [...document.querySelectorAll("body *")].filter(one =>
    !one.closest(".scroll, svg, details") && one.getBoundingClientRect().right > wide + 1);
  parent.postMessage(JSON.stringify({width: wide, figures: figures.length, empty: empty.length, cut: cut.length,
    out: out.map(one => one.tagName), scroll: document.documentElement.scrollWidth}), "*");
});</script>"""


def records(*names):
    return [RECORDS / "resnet20-cifar10-subset" / name for name in names]


def test_welchs_p_is_that_of_students_distribution():
    # equal variances and sizes: df = 2 (n - 1); t = 4.303 is the two-sided 5 % point of 2 degrees, 2.776 of 4
    for values, t in (([0.0, 2.0], 4.30265), ([-1.0, 0.0, 1.0], 2.77645)):
        shift = t * (2 * statistics.variance(values) / len(values)) ** 0.5
        assert welch([x + shift for x in values], values) == pytest.approx(0.05, abs=1e-5)
    assert welch([1.0], [2.0, 3.0]) is None
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1.0


@pytest.mark.parametrize("task", ["language_modelling", "vision"])
def test_the_committed_results_are_those_of_the_records(task, tmp_path, monkeypatch, capsys):
    outcome = call("report.py", [TASKS / task / "results", "--output", tmp_path / "RESULTS.md"], monkeypatch, capsys)
    assert outcome.status == 0, outcome.error
    want = (tmp_path / "RESULTS.md").read_text()
    command = f"python scripts/report.py tasks/{task}/results --output tasks/{task}/RESULTS.md"
    assert (TASKS / task / "RESULTS.md").read_text() == want, f"write it anew: {command}"


def test_collected_records_give_the_same_tables_and_hold_no_weights(tmp_path, monkeypatch, capsys):
    source = tmp_path / "subset"
    shutil.copytree(RECORDS / "resnet20-cifar10-subset", source)
    (source / "m4-seed0" / "model").mkdir()
    (source / "m4-seed0" / "model" / "model.safetensors").write_bytes(b"0")
    kept = tmp_path / "kept" / "subset"
    assert call("report.py", [source, "--collect", kept], monkeypatch, capsys).status == 0
    assert {path.name for path in kept.rglob("*") if path.is_file()} == {"results.json", "metrics.jsonl"}
    ours, theirs = ([table.as_text() for table in tables(*read_experiments([path]))] for path in (kept, source))
    assert ours == theirs


def test_lone_runs_are_told_apart_by_their_batch():
    (experiment,) = read_experiments(records("fixed-samples-m4-seed0", "fixed-steps-seed0", "m4-seed0"))
    found = {one.name: (one.method, one.num_copies) for one in experiment.records}
    assert found == {
        "fixed-steps-seed0": ("fixed-steps", 1), "fixed-samples-m4-seed0": ("fixed-samples", 4), "m4-seed0": ("ba", 4)
    }  # fmt: skip


def test_averages_at_test_time_are_the_improvements_of_the_papers_table_4():
    (experiment,) = read_experiments(records("fixed-steps-seed0"))
    (record,) = experiment.records
    plain = replace(record, tests={"test": Score(93.41, "%", True)})
    scored = {"model": f"elsewhere/{record.name}/model", "accuracy": 0.9341, "tta_accuracy": 0.9433}
    views = replace(experiment, records=[plain], evaluation={"options": {"tta": 10}, "models": {"a": scored}})
    assert averaged(views).rows == [["fixed steps", "test, %", "93.41", "94.33", "+13.96%"]]
    assert averaged(views).head[3] == "10 views (TTA)"
    plain = replace(record, tests={"test": Score(60.0, "perplexity", False)})
    scored = {"model": f"{record.name}/model", "perplexity": 57.0}
    masks = replace(experiment, records=[plain], evaluation={"options": {"mc_dropout": 8}, "models": {"a": scored}})
    assert averaged(masks).rows == [["fixed steps", "test, perplexity", "60.00", "57.00", "+5.00%"]]


def test_one_seed_is_no_test():
    (experiment,) = read_experiments(records("fixed-steps-seed0", "m4-seed0"))
    steps, ours = ([record] for record in experiment.records)
    assert "no test tells it from chance" in verdict(ours, steps, "test")


def test_bleu_is_compared_by_paired_bootstrap_and_remembered_without_the_translations(tmp_path):
    text = generate_corpus(seed=3)["test"].target
    worse = [line if n % 3 else line.rpartition(" ")[0] for n, line in enumerate(text)]
    options = {"train_prefix": [], "corpus_seed": 3, "target_lang": "de", "bleu_tokenize": None}
    for name, copies, lines in (("fixed-steps-seed0", 1, worse), ("m4-seed0", 4, text)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "hyp.generated.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / "config.json").write_text(json.dumps(options))
        (folder / "metrics.jsonl").write_text('{"update": 8, "loss": 1.0, "valid_loss": 1.0}\n')
        test = {"bleu": 100 - len(lines), "signature": "sig", "decoding": "beam 4", "file": "hyp.generated.txt"}
        results = {"updates": 8, "unique_samples": 80, "seen_instances": 80 * copies, "num_copies": copies}
        (folder / "results.json").write_text(json.dumps({**results, "tests": {"generated": test}}))
    (experiment,) = read_experiments([tmp_path])
    steps, ours = ([record] for record in experiment.records)
    p, how = p_value_of(ours, steps, "generated")
    want = paired_bootstrap({"steps": worse, "ours": text}, text, num_samples=1_000, seed=12_345)[1].p_value
    assert p == want < 0.01
    assert "paired bootstrap" in how
    for file in tmp_path.glob("*/hyp.*"):
        file.unlink()
    assert p_value_of(ours, steps, "generated") == (p, how)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([RECORDS], "nothing to write: give --output"),
        ([RECORDS, "--output", "report.pdf"], "--output must end in .html or .md, got report.pdf"),
        (["nowhere", "--output", "report.md"], "nowhere holds no finished run"),
    ],
)
def test_wrong_options_are_refused(argv, error, monkeypatch, capsys):
    outcome = call("report.py", argv, monkeypatch, capsys)
    assert outcome.status == 1
    assert error in outcome.error


class Page(html.parser.HTMLParser):
    """What a page asks of the network, its ids, and whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.ids, self.asked, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        self.asked += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []


@pytest.fixture
def page(tmp_path, monkeypatch, capsys) -> Path:
    file = tmp_path / "report.html"
    outcome = call("report.py", [RECORDS, *sorted(RECORDS.parent.parent.glob("language_modelling/results/*small")),
                                 "--output", file], monkeypatch, capsys)  # fmt: skip
    assert outcome.status == 0, outcome.error
    return file


def test_the_page_stands_alone(page):
    text = page.read_text("utf-8")
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    assert parser.asked == []
    assert not re.search(r"@import|url\((?!#)|<script", text)
    assert len(set(parser.ids)) == len(parser.ids)
    for used in re.findall(r'(?:url\(#|href="#)([^)"]+)', text):
        assert used in parser.ids, used
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_every_figure_is_drawn_and_nothing_overflows(width, page):
    page.write_text(page.read_text("utf-8").replace("</head>", f"{MEASURE}</head>"), "utf-8")
    frame = page.with_name("frame.html")  # a window of Chromium's own is never as narrow as a phone
    frame.write_text(
        '<script>addEventListener("message", event => { document.title = event.data; });</script>'
        f'<iframe src="{page.name}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    )
    said = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--dump-dom",
         f"--user-data-dir={page.parent / 'profile'}", frame.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    found = json.loads(re.search(r"<title>(.*?)</title>", said)[1].replace("&quot;", '"'))
    assert found["width"] in (width, width - 15)  # a scroll bar is 15 pixels wide
    assert found["figures"] == 8
    assert (found["empty"], found["cut"], found["out"]) == (0, 0, [])
    assert found["scroll"] <= found["width"]
