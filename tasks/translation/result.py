"""The result of a run: the best checkpoint translates every test set once; scores, translations, model folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from transformers import MarianMTModel

from tasks.cli.files import write_text
from tasks.cli.software import describe_machine
from tasks.decoding.search import Decoding, count_truncated, translate
from tasks.models.folder import save_model_folder
from tasks.run.loop import Run
from tasks.scoring.bleu import BleuScore, one_line_each, score_bleu
from tasks.scoring.hypotheses import hypothesis_files
from tasks.translation.model import decoding_config
from tasks.translation.prepare import Corpus

logger = logging.getLogger(__name__)

_SHOWN = 5  # translations a test set
USAGE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
batch = tokenizer(["..."], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
"""


def write_result(
    run: Run,
    corpus: Corpus,
    model: MarianMTModel,
    decoding: Decoding,
    max_length: int,
    *,
    languages: tuple[str, str],
    tokenizer: str,
    made_by: Mapping[str, str],
) -> None:
    """Score every test set by itself, and write `hyp.*.txt`, `model/` and `results.json` into the run folder.

    The model has the weights of the best checkpoint; `decoding` becomes its folder's default, `tokenizer` is
    BLEU's, and `languages` and `made_by` (how it was trained) stand in its card.
    """
    model.generation_config = decoding_config(
        model, num_beams=decoding.num_beams, length_penalty=decoding.length_penalty, max_length=max_length
    )
    files = dict(zip(corpus.tests, hypothesis_files(list(corpus.tests)), strict=True))
    scores = {
        name: _score(run, corpus, model, name, files[name], decoding, max_length, tokenizer) for name in corpus.tests
    }
    if run.accelerator.is_main_process:
        updates = run.progress.best_update or run.progress.update
        rows = {
            "data": corpus.description,
            "updates": f"{updates:,} (the checkpoint with the lowest validation loss)",
            **made_by,
            **describe_machine(run.accelerator),
        }
        save_model_folder(
            run.folder / "model",
            model,
            corpus.tokenizer,
            title="Translation {} -> {}".format(*languages),
            languages=languages,
            pipeline="translation",
            made_by=rows,
            scores=[f"{name}: {score}" for name, score in scores.items()],
            usage=USAGE,
        )
    tests = {
        name: {"bleu": score.bleu, "signature": score.signature, "decoding": score.decoding, "file": files[name]}
        for name, score in scores.items()
    }
    run.finish({"tests": tests})
    for name, score in scores.items():
        logger.info(f"test {name}: {score}")
    if not scores:
        logger.info("no --test-prefix: nothing was scored")
    logger.info(f"{run.folder}: model/, curve.png, results.json, metrics.jsonl{', hyp.*.txt' if scores else ''}")


def _score(
    run: Run,
    corpus: Corpus,
    model: MarianMTModel,
    name: str,
    file: str,
    decoding: Decoding,
    max_length: int,
    tokenizer: str,
) -> BleuScore:
    text = corpus.tests[name]
    cut = count_truncated(model, corpus.tokenizer, text.source)
    logger.info(f"translating {name}: {len(text):,} sentences" + (f", {cut} cut to {max_length}" if cut else ""))
    hypotheses = translate(run.accelerator, model, corpus.tokenizer, text.source)
    for source, hypothesis, reference in list(zip(text.source, hypotheses, text.target, strict=True))[:_SHOWN]:
        logger.info(f"\n  source      {source}\n  translation {hypothesis}\n  reference   {reference}")
    if run.accelerator.is_main_process:
        lines, _ = one_line_each(hypotheses)
        write_text(run.folder / file, "".join(f"{line}\n" for line in lines))
    return score_bleu(hypotheses, text.target, str(decoding), tokenizer)
