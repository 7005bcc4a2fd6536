"""What stands about images of mixed sizes is what was measured."""

from __future__ import annotations

import json

from examples.research.mixed_sizes.mixed_sizes import ARMS, markdown, summary
from tests.support.paths import RESEARCH, ROOT

FOLDER = RESEARCH / "mixed_sizes"
RESULT = json.loads((FOLDER / "results.json").read_text())


def test_the_results_are_made_of_the_measurements() -> None:
    arms = RESULT["arms"]
    assert RESULT["summary"] == {arm: summary(arms[arm], arms["eager"]) for arm in ARMS}
    assert (FOLDER / "RESULTS.md").read_text() == markdown(RESULT)
    assert RESULT["settings"]["requests"] == 100 and not RESULT["settings"]["quick"]
    assert not any(arms[arm]["obstacles"] for arm in ARMS), "a graph was left alone"


def test_the_page_says_the_same() -> None:
    text = " ".join((ROOT / "docs" / "use" / "sizes.md").read_text().split())
    eager, ours, buckets = (RESULT["summary"][arm] for arm in ARMS)
    assert ours["paid_back_after"] is None and buckets["paid_back_after"] is None
    assert "**never paid back**" in text
    compiling = f"{ours['compile_seconds']:.0f} s of compiling, or {buckets['compile_seconds']:.0f} s with 8"
    assert compiling in text
    medians = {f"{arm['median_seconds']:.2f}" for arm in (ours, buckets)}
    assert medians == {"0.16"}
    assert f"buy 0.16 s a request instead of {eager['median_seconds']:.2f} s" in text
    needed = [round(arm["would_pay_back_after"], -2) for arm in (ours, buckets)]
    assert f"some {needed[0]:,} requests, or {needed[1]:,}" in text
