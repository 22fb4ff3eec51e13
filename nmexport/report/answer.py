"""The report's answer in plain words: keep the sparse model or not, for whom, and why.

Thresholds are ours and stated here. They decide what the first screen says; the gates, which are
the user's, decide what is packaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nmexport.report.figures import number, percent, rate, size

if TYPE_CHECKING:
    from nmexport.report.model import Latency, Report

Advice = Literal["keep", "try", "leave", "unknown"]

CLOSE_RATIO = 1.10
"""Perplexity, times dense: up to here few readers tell the texts apart."""
FAR_RATIO = 1.30
"""From here on text is plainly worse, and only a task of the user's own can say otherwise."""
LEAST_GAIN = 1.05
"""Decode speed, times dense, that is worth another model to look after."""
_SELF = "self"
_FEW_TOKENS = 4000
_NOT_COMPARED = "Not compared with dense."


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One reason: what it is about, the figure, and what that means."""

    about: str
    figure: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The first screen."""

    advice: Advice
    headline: str
    """Keep it or not, in a sentence."""
    whom: tuple[str, ...]
    """Who gains, and who does not."""
    facts: tuple[Fact, ...]
    doubts: tuple[str, ...]
    """What this report cannot say."""


def answer(report: Report) -> Answer:
    """Sum up a report for somebody who decides and does not measure."""
    advice, headline = _advice(report)
    return Answer(
        advice=advice,
        headline=headline,
        whom=_whom(report, advice),
        facts=(_quality(report), _speed(report), _prompts(report.latency), _memory(report)),
        doubts=tuple(_doubts(report)),
    )


def _advice(report: Report) -> tuple[Advice, str]:
    if report.verdict == "fail":
        names = ", ".join(report.failed_gates)
        return "leave", f"Do not use it: it misses what you asked for ({names})."
    if report.parity.linears.engine.within_contract is False:
        return "leave", "Do not use it: the engine does not compute what it should."
    ratio, gain = report.accuracy.perplexity_ratio, report.latency.speedup.decode
    if ratio is None or gain is None:
        missing = "quality" if ratio is None else "speed"
        return "unknown", f"No answer: {missing} was not compared with the dense model."
    over_stored = _over_stored(report)
    if over_stored is not None and over_stored < LEAST_GAIN:
        return (
            "leave",
            f"Keep the dense model in {_say_stored(report)}: the sparse one is not faster.",
        )
    return _weigh(ratio, gain)


def _over_stored(report: Report) -> float | None:
    """Decode speed, times that of the dense model in the same integers."""
    return None if report.stored_dense is None else report.stored_dense.latency.speedup.decode


def _say_stored(report: Report) -> str:
    return report.weights.sparse or "integers"


def _weigh(ratio: float, gain: float) -> tuple[Advice, str]:
    """Weigh perplexity, times dense, against decode speed, times dense."""
    if gain < LEAST_GAIN:
        return "leave", "Keep the dense model: the sparse one is not faster here."
    if ratio > FAR_RATIO:
        return "leave", "Keep the dense model: the sparse one is faster, and its text much worse."
    if ratio > CLOSE_RATIO:
        return "try", "Try it on your own task first: it is faster, and its text is worse."
    return "keep", "Keep the sparse model: it is faster, and its text is about as good."


def _whom(report: Report, advice: Advice) -> tuple[str, ...]:
    if advice in {"leave", "unknown"}:
        return (*_instead(report, advice), *_alike(report))
    batch = report.latency.dense.decode.batch or 1
    users = "one user" if batch == 1 else f"{batch} users"
    lines = [f"For {users} at a time, with answers longer than their prompts: this was measured."]
    over_stored = _over_stored(report)
    if over_stored is not None:
        lines.append(
            f"It is {_as_fast(over_stored)} as the dense model in {_say_stored(report)}, too."
        )
    prefill = report.latency.speedup.prefill
    if prefill is not None and prefill < LEAST_GAIN:
        lines.append("Not for long prompts with short answers: prompts are read no faster.")
    return (*lines, *_alike(report))


def _alike(report: Report) -> tuple[str, ...]:
    """Say what one pattern for all linears would have cost, where a budget chose for each."""
    allocation = report.allocation
    if allocation is None or allocation.forms:
        return ()
    section = report.recipe.get("sparsity")
    pattern = str(section.get("pattern")) if isinstance(section, dict) else ""
    alike = [
        point
        for point in allocation.front
        if point.kind == "uniform" and point.label.split()[0] == pattern
    ]
    if not alike:
        return ()
    chosen, saved = number(allocation.perplexity_ratio, 3), percent(allocation.bytes_saved, 0)
    ratio, more = number(alike[0].perplexity_ratio, 3), percent(alike[0].bytes_saved, 0)
    line = (
        f"A budget chose for each linear: perplexity on calibration text is {chosen} times dense, "
        f"{saved} of the bytes saved. {pattern} everywhere saves {more}, at {ratio} times "
        f"(`--pattern {pattern}`)."
    )
    return (line,)


def _instead(report: Report, advice: Advice) -> tuple[str, ...]:
    """Say what to do next where nobody should use it as it is."""
    if advice == "unknown":
        return ("For nobody yet: build again with the dense model, and with a text to measure on.",)
    over_stored = _over_stored(report)
    if over_stored is not None and over_stored < LEAST_GAIN and not report.failed_gates:
        return (_stored_instead(report, over_stored),)
    if report.accuracy.perplexity_ratio is None or report.allocation is not None:
        return ("For nobody as it is: allow fewer bytes saved (`--budget`), or learn for longer.",)
    return (
        "For nobody as it is. A budget (`--budget ppl=1.1`) leaves sensitive parts dense.",
        "`--effort thorough` learns for longer.",
    )


def _stored_instead(report: Report, over_stored: float) -> str:
    """Say that quantisation gains what there is to gain."""
    stored = _say_stored(report)
    ratio = None if report.stored_dense is None else report.stored_dense.scores.perplexity_ratio
    cost = "" if ratio is None else f", at {number(ratio)} times its perplexity"
    over_float = report.latency.speedup.decode
    gain = "" if over_float is None else f" It is {_as_fast(over_float / over_stored)} as dense"
    return (
        f"Sparsity does not pay here: on top of {stored} it is {over_stored:.2f}x as fast."
        f"{gain}{cost}. {_that_alone(report)} builds that alone."
    )


def _that_alone(report: Report) -> str:
    """Name the options that build the dense model in the same integers."""
    if report.allocation is not None and report.allocation.forms:
        return "A budget with `--budget-pattern 16:16`"
    return f"`--pattern 16:16 --weights {_say_stored(report)}`"


def _quality(report: Report) -> Fact:
    accuracy = report.accuracy
    about, ratio = "Quality", accuracy.perplexity_ratio
    if ratio is None:
        return Fact(about=about, figure="?", words=accuracy.why or _NOT_COMPARED)
    if ratio <= CLOSE_RATIO:
        words = "about as good as dense"
    else:
        words = "worse than dense" if ratio <= FAR_RATIO else "much worse than dense"
    same = accuracy.top1_agreement
    agreed = "" if same is None else f" The likeliest next word is the same in {percent(same, 0)}."
    lost = round(100 * (ratio - 1))
    return Fact(
        about=about,
        figure="the same" if lost == 0 else f"{abs(lost)} % {'worse' if lost > 0 else 'better'}",
        words=f"By perplexity: text is {words}.{agreed}",
    )


def _speed(report: Report) -> Fact:
    latency = report.latency
    gain, batch = latency.speedup.decode, latency.dense.decode.batch or 1
    about = "Speed, one user" if batch == 1 else f"Speed, {batch} users"
    if gain is None:
        return Fact(about=about, figure="?", words=latency.why or _NOT_COMPARED)
    dense, sparse = latency.dense.decode.tokens_per_s, latency.sparse.decode.tokens_per_s
    words = f"Answers are written at {rate(sparse)}; dense makes {rate(dense)}"
    over_stored = _over_stored(report)
    if over_stored is not None:  # timed in a run of its own: its rates are of another moment
        words += f". It is {over_stored:.2f}x as fast as dense in {_say_stored(report)}"
    return Fact(about=about, figure=_as_fast(gain), words=f"{words}.")


def _prompts(latency: Latency) -> Fact:
    gain, tokens = latency.speedup.prefill, latency.dense.prefill.tokens
    if gain is None:
        return Fact(about="First word", figure="?", words=latency.why or _NOT_COMPARED)
    return Fact(
        about="First word",
        figure=_as_fast(gain),
        words=f"The wait for it, after a prompt of {number(tokens)} tokens.",
    )


def _as_fast(gain: float) -> str:
    """`1.5x as fast`."""
    return f"{gain:.2g}x as fast"


def _memory(report: Report) -> Fact:
    memory = report.memory
    sparse, dense = memory.sparse.peak_rss_bytes, memory.dense.peak_rss_bytes
    beside = f"dense takes {size(dense)}" if dense is not None else "dense was not measured"
    return Fact(
        about="Memory",
        figure="?" if sparse is None else size(sparse),
        words=f"At its peak; {beside}. On disk {size(memory.artifact_bytes)}.",
    )


def _doubts(report: Report) -> list[str]:
    """List what the figures above do not show."""
    accuracy, weights = report.accuracy, report.weights
    doubts = []
    if accuracy.dataset == _SELF:
        doubts.append(
            "Quality was measured on text that the model wrote itself. Name a held-out text "
            "(`--eval-data`) before you rely on it."
        )
    if accuracy.tokens is not None and accuracy.tokens < _FEW_TOKENS:
        doubts.append(f"Quality was measured on {accuracy.tokens:,} tokens: too few to be sure.")
    if not accuracy.tasks:
        doubts.append("No task was scored (`--tasks`): perplexity is a proxy.")
    batch = report.latency.dense.decode.batch or 1
    if batch == 1:
        doubts.append(
            "Eight users at once were not measured here: `nmexport bench serve --clients 8` does."
        )
    if weights.sparse == weights.dense:
        doubts.append(
            f"Both models store {weights.dense or 'the same'} weights. An int8 model without "
            "sparsity (`--pattern 16:16 --weights int8`) may be all you need."
        )
    return doubts
