"""What the tests of bad input share: good text, tiny options, and a script's `main` with its verdict."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from tasks.text.generated.corpus import generate_corpus

SCRIPTS = Path(__file__).parents[1] / "scripts"
_MODEL = "--width 16 --ffn-width 24 --num-layers 1 --num-heads 2 --vocab-size 400"
_RUN = "--max-updates 4 --warmup-updates 2 --log-every 1 --eval-every 2 --save-every 2 --num-beams 1 --cpu"
OPTIONS = f"{_MODEL} --max-tokens 400 --ba-m 2 {_RUN}".split()


def write_text(folder: Path) -> Path:
    """Two small corpora, of 300 and 8 pairs each, as prefixes train, valid, test and other."""
    folder.mkdir(parents=True)
    corpus = generate_corpus(train=300, valid=20, test=8)
    corpus["other"] = generate_corpus(train=300, valid=1, test=1, seed=1)["train"]
    for name, text in corpus.items():
        (folder / f"{name}.en").write_text("".join(f"{line}\n" for line in text.source), "utf-8")
        (folder / f"{name}.de").write_text("".join(f"{line}\n" for line in text.target), "utf-8")
    return folder


@dataclass(frozen=True)
class Verdict:
    """How a script ended, as its caller sees it: exit status, the last line for stderr, and all it said."""

    status: int
    error: str
    stdout: str
    stderr: str


def call(script, argv, monkeypatch, capsys) -> Verdict:
    """A script's `main`, in this process; any other exception than the program's own exit is a failure."""
    main = runpy.run_path(str(SCRIPTS / script))["main"]
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    out, err = capsys.readouterr()
    return Verdict(1, code, out, err) if isinstance(code, str) else Verdict(code or 0, "", out, err)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
