"""The model card: README.md of a shared model, in the layout of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from b2txt_jax import __version__
from b2txt_jax.evaluation.report.inputs import groups
from b2txt_jax.evaluation.results import Result
from b2txt_jax.inference.run import Run
from b2txt_jax.metrics import ErrorRate
from b2txt_jax.model.interface import parameter_count
from b2txt_jax.signal.rolling import described


def model_card(
    run: Run,
    name: str,
    results: Sequence[Result],
    data_statement: str,
    license: str,
    calls: Sequence[Mapping[str, Any]],
    stream: bool,
) -> str:
    """Return the card as Markdown.

    Args:
      run: the model.
      name: of it.
      results: of `b2txt evaluate` for its parameters, the newest last.
      data_statement: what it was trained on, and under which terms.
      license: identifier of the hub, such as "cc-by-4.0".
      calls: of `b2txt train`, as calls.jsonl has them.
      stream: whether the folder has the streaming step.
    """
    front = {
        "license": license,
        "library_name": "b2txt_jax",
        "tags": ["brain-to-text", "speech-neuroprosthesis", "ctc", "jax"],
    }
    config, chosen = run.config, run.selection
    facts = {
        "Model": f"`{config.model.name}`, {parameter_count(run.params):,} parameters",
        "Input": f"{config.data.feature_count} features per bin of 20 ms, "
        f"{described(config.signal)}",
        "Output": "logits over the classes of phonemes.json, in their order",
        "Recording days": f"{len(run.sessions)}, {run.sessions[0]} to {run.sessions[-1]}",
        "Checkpoint": f"step {run.step} ({run.weights}), parameters `{run.fingerprint}`",
        "Seed": config.train.seed,
    }
    if chosen["validations"]:
        facts["Chosen"] = (
            f"for the lowest PER of {chosen['validations']} validations, which is too good by "
            f"chance; mean of the last {min(10, chosen['validations'])}: "
            f"{100 * chosen['per_last_ten']:.2f} %"
        )
    if calls:
        facts["Trained by"] = f"`{calls[-1].get('command')}`"
        facts["Code"] = f"b2txt_jax {__version__}, commit {calls[-1].get('commit')}"
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        "Phoneme logits of attempted speech from intracortical recordings, by b2txt_jax.",
        "\n".join(f"- **{key}**: {value}" for key, value in facts.items()),
        "## Figures",
        _figures(results),
        "## Data",
        data_statement,
        (
            "The model has an input layer for each recording day."
            if config.model.days_differ
            else "All recording days share the model's input layer."
        )
        + " On a new day, or another person, it needs training on data of that day. It is a "
        "research model, and not a medical device.",
        "## Use",
        '```python\nimport b2txt_jax\n\nrun = b2txt_jax.load_run("THIS_FOLDER")\n'
        f'logits = run.logits(features, day="{run.sessions[-1]}")  # [T, '
        f"{config.data.feature_count}] -> [frames, {config.model.classes}]\n```",
    ]
    if stream:
        lines += [
            "Without b2txt_jax, bin by bin (`pip install jax flatbuffers safetensors`):",
            "```python\nfrom streaming import Stream\n\n"
            f'stream = Stream(".", day="{run.sessions[-1]}")\nlogits = stream.push(features)\n```',
        ]
    return "\n\n".join(lines) + "\n"


def _figures(results: Sequence[Result]) -> str:
    if not results:
        return "It was not evaluated with a language model."
    rows = [
        "| Decoder | Trials | PER | WER | n-best oracle | WER without LM |",
        "|---|---|---|---|---|---|",
    ]
    few = False
    for result in results:
        every = groups(result.trials)["all"][0]
        per, wer = every.per_interval, every.wer_interval
        few = few or any(one is not None and one.unit == "trials" for one in (per, wer))
        cells = [
            result.name,
            str(len(result.trials)),
            _shown(result.rate("per"), per),
            _shown(result.rate("wer"), wer),
            _shown(result.rate("wer_oracle")),
            _shown(result.rate("wer_without_lm")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    split = results[-1].content.get("split")
    return "\n".join(rows) + (
        f"\n\nOn the {split} split, with 95 % intervals of a bootstrap over "
        + (
            "single trials, since there are too few recording days: they lack the differences "
            "between days."
            if few
            else "recording days."
        )
    )


def _shown(rate: ErrorRate | None, interval: object = None) -> str:
    if rate is None or rate.rate is None:
        return "not measured"
    return f"{100 * rate.rate:.2f} %" + (f" ({interval})" if interval else "")
