"""The result of tuning as a text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_server.errors import UserError
from lm_server.files.atomic_file import replacing
from lm_server.tuning.tuner import Result, Tried, curves, search_curve

_TUNED = (
    *("acoustic_scale", "blank_penalty", "silence_penalty", "word_bonus", "max_active", "beam"),
    *("alpha", "confidence_temperature"),
)
_EXCHANGES = 8
"""Exchanges of classes that are shown."""
_OF_SEARCH = ("acoustic_scale", "blank_penalty", "silence_penalty", "word_bonus", "max_active")


class ReportError(UserError, OSError):
    """A picture that cannot be written."""


def about(result: Result) -> dict[str, Any]:
    """Return what the settings file tells of how the settings were found."""

    def rate(errors: float) -> float:
        return round(float(errors) / max(result.words, 1), 6)

    def search(one: Tried) -> dict[str, Any]:
        settings = one.lists.settings
        return {
            **{name: getattr(settings, name) for name in _OF_SEARCH},
            "wer": one.errors / max(int(one.lists.reference_words.sum()), 1),
            "wer_reranked": one.rate,
            "confusion": settings.confusion is not None,
        }

    return {
        "sentences": len(result.lists.sentences),
        "words": result.words,
        "wer": rate(result.errors),
        "expected_wer": round(result.expected, 6),
        "kept_settings_in_use_because_expected": result.kept,
        "abandoned": [search(one) for one in result.abandoned],
        "seconds_per_sentence": [
            {"max_active": active, "beam": beam, "seconds": round(seconds, 4)}
            for active, beam, seconds in result.seconds
        ],
        "wer_before": rate(result.default_errors),
        "oracle_wer": rate(result.lists.oracle().sum()),
        "rescored": result.lists.rescored,
        "confusion": _confusion(result),
        "asking_during_the_search": result.fusion
        and {
            "expected_wer_rescored": round(result.fusion[0], 6),
            "expected_wer_asked": round(result.fusion[1], 6),
        },
        "log_loss_of_confidence": [round(one, 4) for one in result.log_loss],
        "searches": [
            {**search(one), "oracle_wer": rate(one.lists.oracle().sum())} for one in result.tried
        ],
        "curves": curves(result),
        "blank_penalty_of_searches": search_curve(result),
    }


def _confusion(result: Result) -> dict[str, Any] | None:
    """Return what a class confusion brings, and the likeliest exchanges of the one in use."""
    used, tried = result.settings.confusion, result.confusion
    if used is None and tried is None:
        return None
    return {
        "expected_wer_without": tried and round(tried[0], 6),
        "expected_wer_with": tried and round(tried[1], 6),
        "used": used is not None,
        "likeliest": [
            {"shown": shown, "said": said, "probability": round(probability, 4)}
            for shown, said, probability in (used.likeliest(_EXCHANGES) if used else ())
        ],
    }


def as_text(result: Result) -> str:
    """Return every search, the curves around the optimum, and the result."""
    found = about(result)
    names = ("acoustic scale", "blank penalty", "silence penalty", "word bonus", "max active")
    lines = ["  ".join(names) + "     WER  re-ranked  oracle"]
    for one in [*found["searches"], *found["abandoned"]]:
        oracle = f"{one['oracle_wer']:7.2%}" if "oracle_wer" in one else "abandoned"
        numbers = zip(names, _OF_SEARCH, strict=True)
        lines.append(
            "  ".join(f"{one[key]:{len(name)}g}" for name, key in numbers)
            + f" {one['wer']:7.2%} {one['wer_reranked']:10.2%} {oracle}"
            + ("  with a class confusion" if one["confusion"] else "")
        )
    for active, beam, seconds in result.seconds:
        lines.append(f"max_active {active}, beam {beam:g}: {seconds:.3f} s of CPU per sentence")
    for name, points in found["curves"].items():
        lines += ["", f"WER by {name}, the rest as found:", _points(points)]
    lines += ["", "WER by blank_penalty, a search each, re-ranked without a large model:"]
    lines.append(_points(found["blank_penalty_of_searches"]))
    before, after = result.log_loss
    lines += [
        "",
        "found: " + ", ".join(f"{name} {getattr(result.settings, name):g}" for name in _TUNED),
        f"WER on these {found['sentences']} sentences: {found['wer_before']:.2%} -> "
        f"{found['wer']:.2%}"
        + (" with rescoring" if found["rescored"] else "")
        + f", n-best oracle {found['oracle_wer']:.2%}",
        "WER to expect of other sentences ("
        + ("not chosen on these" if result.kept else "chosen on one half, counted on the other")
        + f"): {found['expected_wer']:.2%}",
        f"log loss of the sentence confidence: {before:.3f} -> {after:.3f}",
        *_of_confusion(found["confusion"]),
    ]
    if result.fusion is not None:
        alone, asking = result.fusion
        lines.append(
            f"WER to expect, the large model asked during the search: {asking:.2%} against "
            f"{alone:.2%} rescored at the end: "
            + (
                f"use --fuse with fuse_weight {result.settings.fuse_weight:g}"
                if result.settings.fuse_weight
                else "leave --fuse out"
            )
        )
    if result.settings.minimum_bayes_risk:
        lines.append(
            "note: these rates are of the likeliest hypotheses, and minimum_bayes_risk is 1: "
            "`lm-server score` with these settings counts the errors of what it answers"
        )
    if result.kept is not None:
        lines.append(
            "note: these are the settings that were in use, with a new temperature. Others are "
            f"expected to be worse on other sentences, {result.kept:.2%} against "
            f"{result.expected:.2%}: tune on more sentences, or with more --searches"
        )
    return "\n".join(lines)


def _of_confusion(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = []
    if found["expected_wer_with"] is not None:
        lines.append(
            "WER to expect with a class confusion, learned on one half and counted on the other: "
            f"{found['expected_wer_with']:.2%} against {found['expected_wer_without']:.2%} without"
        )
    exchanges = ", ".join(
        f"{one['said']} shown as {one['shown']} {one['probability']:.1%}"
        for one in found["likeliest"]
    )
    lines.append(f"class confusion: {exchanges}" if found["used"] else "class confusion: none")
    return lines


def _points(points: list[tuple[float, float]]) -> str:
    return "  " + "  ".join(f"{value:.3g}: {rate:.2%}" for value, rate in points)


def write_picture(result: Result, path: Path) -> None:
    """Write the curves and the searches as a PNG, atomically.

    Raises:
      ReportError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    found = about(result)
    panels = found["curves"]
    figure = Figure(figsize=(3.6 * (len(panels) + 2), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + 2)
    first, second = axes[:2]
    points = first.scatter(
        [one["acoustic_scale"] for one in found["searches"]],
        [one["blank_penalty"] for one in found["searches"]],
        # The logarithmic colour scale has no zero.
        c=[max(100 * one["wer"], 0.1) for one in found["searches"]],
        cmap="viridis_r",
        norm=LogNorm(),
    )
    first.set(xscale="log", yscale="log", title="searches")
    first.set(xlabel="acoustic_scale", ylabel="blank_penalty")
    for axis in (first.xaxis, first.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    figure.colorbar(points, ax=first, label="WER (%)")
    searched = found["blank_penalty_of_searches"]
    second.plot([x for x, _ in searched], [100 * y for _, y in searched], "o")
    second.axvline(result.settings.blank_penalty, linestyle=":", color="grey")
    second.set(xscale="log", xlabel="blank_penalty", ylabel="WER (%)", title="searches, re-ranked")
    for panel, (name, curve) in zip(axes[2:], panels.items(), strict=True):
        panel.plot([x for x, _ in curve], [100 * y for _, y in curve], marker="o")
        panel.axvline(getattr(result.settings, name), linestyle=":", color="grey")
        panel.set(xlabel=name, ylabel="WER (%)")
    if path.exists() and not path.is_file():
        raise ReportError(
            f"cannot write {path}: it exists and is no regular file: choose another place"
        )
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    except OSError as error:
        raise ReportError(f"cannot write {path} ({error}): choose another place") from error
