"""Word errors of a logits file that has its true sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_server.files.logits_file import read_logits
from lm_server.offline import answered, searched
from lm_server.rescoring.scorer import SentenceScorer
from lm_server.search.interface import SearchModel
from lm_server.settings import Settings
from lm_server.tuning.references import read_references, word_errors


def score_file(
    model: SearchModel, settings: Settings, path: Path, scorer: SentenceScorer | None = None
) -> dict[str, Any]:
    """Decode a file in this process and count its word errors.

    Args:
      model: a model folder in memory.
      settings: of the search.
      path: an .npz file with logits, frames, trial and sentence.
      scorer: the large language model that rescores, if any.

    Returns:
      `trials`, `failed` (all of their words count as errors), `not_rescored`, `first_problem`,
      `words`, `errors`, `wer`, and `oracle_errors` and `oracle_wer` of each list's hypothesis that
      is nearest to the truth. A rate without words is None.

    Raises:
      LogitsFileError, ReferencesError: the file cannot be used, or has no true sentences.
    """
    logits, references = read_logits(path), read_references(path)
    words = errors = oracle = failed = not_rescored = 0
    first_problem = None
    with searched(model, settings, logits, workers=1) as outcomes:
        for outcome, answer in answered(outcomes, settings, scorer):
            truth = references[outcome.trial]
            texts = [one.sentence for one in answer.hypotheses] if answer else []
            found = [word_errors(truth, text) for text in texts or [""]]
            words, errors, oracle = words + len(truth), errors + found[0], oracle + min(found)
            failed += not texts
            not_rescored += bool(answer and answer.problem)
            first_problem = first_problem or outcome.problem or (answer and answer.problem)
    return {
        "trials": len(logits.trials),
        "failed": failed,
        "not_rescored": not_rescored,
        "first_problem": first_problem,
        "words": words,
        "errors": errors,
        "wer": errors / words if words else None,
        "oracle_errors": oracle,
        "oracle_wer": oracle / words if words else None,
    }
