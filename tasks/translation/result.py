"""The result of a run: the best checkpoint translates every test set once; scores, translations, model folder."""

from __future__ import annotations

from transformers import MarianMTModel

from tasks.cli.files import write_text
from tasks.decoding.search import Decoding, count_truncated, translate
from tasks.run.loop import Run
from tasks.scoring.bleu import BleuScore, one_line_each, score_bleu
from tasks.scoring.hypotheses import hypothesis_files
from tasks.translation.card import save_model_folder
from tasks.translation.config import TranslationConfig
from tasks.translation.model import decoding_config
from tasks.translation.prepare import Corpus

_SHOWN = 5  # translations a test set


def write_result(config: TranslationConfig, run: Run, corpus: Corpus, model: MarianMTModel) -> None:
    """Score every test set by itself, and write `hyp.*.txt`, `model/` and `results.json` into the run folder."""
    model.generation_config = decoding_config(
        model, num_beams=config.num_beams, length_penalty=config.length_penalty, max_length=config.max_length
    )
    files = dict(zip(corpus.tests, hypothesis_files(list(corpus.tests)), strict=True))
    scores = {name: _score(config, run, corpus, model, name, files[name]) for name in corpus.tests}
    if run.accelerator.is_main_process:
        save_model_folder(
            run.folder / "model",
            model,
            corpus.tokenizer,
            config,
            data=corpus.description,
            updates=run.progress.best_update or run.progress.update,
            scores=scores,
        )
    tests = {
        name: {"bleu": score.bleu, "signature": score.signature, "decoding": score.decoding, "file": files[name]}
        for name, score in scores.items()
    }
    run.finish({"tests": tests})
    for name, score in scores.items():
        run.say(f"test {name}: {score}")
    if not scores:
        run.say("no --test-prefix: nothing was scored")
    run.say(f"{run.folder}: model/, curve.png, results.json, metrics.jsonl{', hyp.*.txt' if scores else ''}")


def _score(
    config: TranslationConfig, run: Run, corpus: Corpus, model: MarianMTModel, name: str, file: str
) -> BleuScore:
    text = corpus.tests[name]
    cut = count_truncated(model, corpus.tokenizer, text.source)
    run.say(f"translating {name}: {len(text):,} sentences" + (f", {cut} cut to {config.max_length}" if cut else ""))
    hypotheses = translate(run.accelerator, model, corpus.tokenizer, text.source)
    for source, hypothesis, reference in list(zip(text.source, hypotheses, text.target, strict=True))[:_SHOWN]:
        run.say(f"\n  source      {source}\n  translation {hypothesis}\n  reference   {reference}")
    if run.accelerator.is_main_process:
        lines, _ = one_line_each(hypotheses)
        write_text(run.folder / file, "".join(f"{line}\n" for line in lines))
    return score_bleu(hypotheses, text.target, str(Decoding(config.num_beams, config.length_penalty)))
