"""`luvc-fx bench`: sizes are the published ones, numbers are what they say, and the gate shuts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from luvc_fx.apps.bench import SHAPES, Options, alone, choosing, gate, plot, run
from luvc_fx.apps.bench.arms import BASELINE, FASTV, FROZEN, LUVC, RANDOM, SINGLE, SMALLER, arms_of
from luvc_fx.apps.bench.result import BenchResult, Cost, StageTiming
from luvc_fx.apps.bench.running import attention_of
from luvc_fx.apps.bench.shapes import Visual, smaller
from luvc_fx.apps.bench.timing import FIRST_TOKEN, PREFILL, Clock, Span, Stages, ratio_interval, spread
from luvc_fx.cli import main as cli
from luvc_fx.report import GraphReport, Insertion, MergeStep, Reason, Refusal, Report
from luvc_fx.report.errors import InputError
from luvc_fx.schedule import Merge, Prune, Schedule

PARAMETERS = {
    "llava-ov-0.5b": 0.894,
    "llava-ov-7b": 8.03,
    "internvl2.5-2b": 2.21,
    "internvl2.5-8b": 8.08,
    "qwen2-vl-2b": 2.21,
    "qwen2-vl-7b": 8.29,
}
"""Billions, as the published checkpoints have them."""


# ---------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", SHAPES)
def test_models_have_the_published_sizes(name: str) -> None:
    model = SHAPES[name].build(None, torch.device("meta"), torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert count == pytest.approx(PARAMETERS[name], rel=0.03)
    assert SHAPES[name].parameters == pytest.approx(count, rel=0.05)


INPUTS = {
    ("llava-ov-0.5b", Visual()): 27 * 27 + 27 * 28,
    ("llava-ov-0.5b", Visual(3)): 3 * (27 * 27 + 1),
    ("llava-ov-0.5b", Visual(4, video=True)): 4 * 14 * 14 + 1,
    ("internvl2.5-2b", Visual(32, video=True)): 8192,
    ("qwen2-vl-2b", Visual()): 16 * 16,
    ("qwen2-vl-2b", Visual(4, video=True)): 2 * 16 * 16,
}


@pytest.mark.parametrize("name, visual", INPUTS, ids=[f"{name}, {visual}" for name, visual in INPUTS])
def test_prompts_hold_the_visual_tokens_of_their_input(name: str, visual: Visual) -> None:
    shape = SHAPES[name]
    model = shape.build(1, torch.device("meta"), torch.float32)
    inputs = shape.inputs(model.to_empty(device="meta"), visual, 10, 2)
    ids = inputs["input_ids"]
    assert ids.shape == (2, INPUTS[name, visual] + 10)
    assert inputs["attention_mask"].shape == ids.shape


def test_smaller_inputs() -> None:
    onevision, qwen = SHAPES["llava-ov-0.5b"], SHAPES["qwen2-vl-2b"]
    assert smaller(onevision, Visual(), 0.3) is None
    assert smaller(onevision, Visual(10, video=True), 0.3) == Visual(3, video=True)
    assert smaller(qwen, Visual(side=448), 0.25) == Visual(side=224)


def test_a_shape_that_does_not_exist_or_fit() -> None:
    with pytest.raises(InputError, match=r"there is no shape 'llava'; there are llava-ov-0\.5b"):
        run(Options("llava"))
    with pytest.raises(InputError, match="needs a GPU, or --layers"):
        run(Options("llava-ov-7b", device="cpu"))
    with pytest.raises(InputError, match="--batch auto needs a GPU"):
        run(Options("llava-ov-0.5b", device="cpu", batch=None))


# ------------------------------------------------------------------------------------------------ arms


def test_arms_have_the_same_counts() -> None:
    arms = {arm.name: arm for arm in arms_of(FROZEN, 0.25, 24)}
    assert arms[BASELINE].schedule == Schedule()
    assert arms[LUVC].schedule is FROZEN
    random = arms[RANDOM].schedule
    assert random is not None and random.merge == FROZEN.merge
    assert [p.selector.name for p in random.prune] == ["random"] * 3
    assert [p.keep for p in random.prune] == [p.keep for p in FROZEN.prune]
    assert arms[SINGLE].schedule == Schedule(prune=Prune(keep=0.25, layer=0))
    assert arms[SMALLER].smaller
    fastv = arms[FASTV].schedule
    assert fastv is not None
    ((layer, prune),) = fastv.prunes_at(24)
    assert prune.keep is not None
    assert (layer + (24 - layer) * prune.keep) / 24 == pytest.approx(0.25)
    assert FASTV not in {arm.name for arm in arms_of(FROZEN, 0.05, 24)}


@pytest.mark.parametrize("layers", [24, 28, 32])
def test_the_frozen_schedule_has_a_mean_budget_of_30_percent(layers: int) -> None:
    fused, tokens = 0.75, [0.75] * layers
    for layer, prune in FROZEN.prunes_at(layers):
        assert prune.keep is not None
        tokens[layer:] = [prune.keep * fused] * (layers - layer)
    assert sum(tokens) / layers == pytest.approx(0.3, abs=0.01)


# ---------------------------------------------------------------------------------------------- timing


def test_spread_is_the_distance_of_the_quartiles() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert spread([7.0]) == 0.0


def test_the_interval_holds_the_ratio() -> None:
    above, below = [20.0, 21.0, 19.0, 20.5, 22.0], [10.0, 10.2, 9.9, 10.1, 10.3]
    low, high = ratio_interval(above, below)
    assert 1.8 < low < 2.0 < high < 2.25
    assert ratio_interval([4.0] * 3, [2.0] * 3) == (2.0, 2.0)


def test_stages_are_timed_by_their_names() -> None:
    stages = Stages(Clock(torch.device("cpu")))

    def busy(rounds: int) -> int:
        return sum(range(rounds))

    call = stages.timed(PREFILL, busy)
    stages.begin()
    busy(3_000_000)
    assert call(1_000_000) == sum(range(1_000_000))
    spans = stages.take()
    assert set(spans) == {PREFILL, "first token"}
    (prefill,), (first,) = spans[PREFILL], spans["first token"]
    assert 0 < prefill.cpu < first.cpu and 0 < prefill.wall < first.wall
    assert stages.take() == {}


# ------------------------------------------------------------------------------------------------ gate


def report_with(*inserted: Insertion) -> Report:
    return Report(graphs=[GraphReport(kind=PREFILL, inserted=list(inserted))])


def pruned(layer: int, before: int, after: int, absorbs: bool = False) -> Insertion:
    return Insertion("prune", layer, "spectrum", before, after, absorbs=absorbs)


def test_the_gate_on_refusals() -> None:
    report = report_with()
    assert gate.refusals("arm", report) == []
    report.graphs[0].refusals.append(Refusal(Reason.NO_GRID, "the grid is not known"))
    assert gate.refusals("arm", report) == ["arm: no-grid: the grid is not known"]


def test_the_gate_on_sites() -> None:
    both = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=(Prune(0.5, layer=1), Prune(0.0, layer=2)))
    merge = Insertion("merge", 0, "oim", 64, 32, (MergeStep("oim", "width", (8,), (4,)),))
    first, last = pruned(1, 32, 16), pruned(2, 16, 0)
    assert gate.unmatched("arm", report_with(merge, first, last), both) == []
    assert gate.unmatched("arm", report_with(merge, first), both) == [
        "arm: 1 of 2 sites that prune are in the graphs"
    ]
    assert len(gate.unmatched("arm", Report(), both)) == 2
    assert gate.unmatched("arm", Report(), Schedule()) == []


def test_the_gate_on_eager_runs() -> None:
    assert gate.eager_stages("arm", {"vision": 3, "prefill": 3}, 3) == []
    assert "0 compiled prefill graphs ran in 3 runs" in gate.eager_stages("arm", {"vision": 3}, 3)[0]


def test_the_gate_on_recompiles() -> None:
    assert gate.recompiled("arm", 3, 3) == []
    assert gate.recompiled("arm", 3, 5) == ["arm: 2 graphs were compiled while timing"]


def test_the_gate_on_logits() -> None:
    want = torch.randn(1, 100)
    assert gate.wrong_logits("arm", want + 1e-5, want) == []
    assert "differ from eager" in gate.wrong_logits("arm", want + 0.1, want)[0]
    assert gate.wrong_logits("arm", torch.full_like(want, float("nan")), want)


def test_the_gate_on_lengths() -> None:
    assert gate.wrong_lengths("arm", [8, 4], [13, 9], 5) == []
    assert gate.wrong_lengths("arm", [8, 4], [13, 13], 5)


# ------------------------------------------------------------------------------------ found by trying


@pytest.mark.parametrize("most, want", [(1, 1), (5, 4), (8, 8), (10**9, 1024)])
def test_the_largest_batch(most: int, want: int) -> None:
    assert choosing.largest_batch(lambda rows: rows <= most) == want


def test_not_even_one_row_fits() -> None:
    with pytest.raises(InputError, match="not even one row"):
        choosing.largest_batch(lambda rows: False)


def test_a_batch_fits_if_the_baseline_runs_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled it may need more memory than the stock model."""

    def runner(most: int, wrapped: bool) -> Any:
        def generate(rows: int) -> None:
            if rows > most:
                inner = torch.OutOfMemoryError("no memory")
                error = RuntimeError("the compiler failed")
                error.inner_exception = inner  # type: ignore[attr-defined]
                raise error if wrapped else inner

        return lambda model, arm, rows, *_: types.SimpleNamespace(generate=lambda tokens: generate(rows))

    monkeypatch.setattr(choosing, "Stock", runner(16, False))
    for wrapped in (False, True):
        monkeypatch.setattr(choosing, "Compiled", runner(5, wrapped))
        fits = choosing.fits(None, lambda rows: rows, 1, None)  # type: ignore[arg-type, return-value]
        assert choosing.largest_batch(fits) == 4
    monkeypatch.setattr(choosing, "Compiled", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choosing.fits(None, lambda rows: rows, 1, None)(1)  # type: ignore[arg-type, return-value]


def test_the_best_mode_is_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str | None, float] = {None: 5.0, "max-autotune": 3.0}

    def runner(model: Any, arm: Any, inputs: Any, mode: str | None) -> Any:
        spans = {FIRST_TOKEN: [Span(taken[mode], 0.0)]}
        return types.SimpleNamespace(
            generate=lambda tokens: None, stages=types.SimpleNamespace(take=lambda: spans)
        )

    monkeypatch.setattr(choosing, "Compiled", runner)
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")  # type: ignore[assignment]
    mode, found = choosing.best_mode(model, {}, 1, lambda _: None)
    assert mode == "max-autotune" and found == {"default": 5.0, "max-autotune": 3.0}
    del taken["max-autotune"]
    mode, found = choosing.best_mode(model, {}, 1, lambda _: None)
    assert mode is None and found == {"default": 5.0, "max-autotune": "KeyError: 'max-autotune'"}
    taken.clear()
    with pytest.raises(InputError, match="runs in no mode"):
        choosing.best_mode(model, {}, 1, lambda _: None)


# ------------------------------------------------------------------------------------- parts by themselves


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_projector(name: str) -> None:
    model = SHAPES[name].build(1, torch.device("meta"), torch.float32)
    part = alone.projector_of(model)
    assert part is not None
    width = model.config.get_text_config().hidden_size
    assert [p.shape[0] for p in part.parameters()][-1] == width


def test_what_enters_the_projector_is_read_from_the_graph() -> None:
    graph = torch.fx.Graph()
    weight, x = graph.placeholder("weight"), graph.placeholder("x")
    before = graph.call_function(torch.relu, (x,))
    inside = graph.call_function(torch.nn.functional.linear, (before, weight))
    before.meta = {
        "nn_module_stack": {"a": ("model.vision_tower", object)},
        "example_value": torch.ones(2, 7),
    }
    weight.meta = {"example_value": torch.ones(3, 7)}
    inside.meta = {"nn_module_stack": {"b": ("L['self'].model.multi_modal_projector.linear_1", object)}}
    graph.output(inside)
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert alone.projector_rows(gm) == (2, 7)
    inside.meta = before.meta
    assert alone.projector_rows(gm) is None


def test_the_selectors_of_all_sites_have_code_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a site that averages tokens into others. One code for all of them ran eagerly from nine on."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda body, **_: seen.append(body) or body)
    schedule = Schedule(
        prune=(*(Prune(tokens=20 - n, layer=n) for n in range(1, 11)), Prune(tokens=5, layer=11, absorb=True))
    )
    sites = [*(pruned(n, 21 - n, 20 - n) for n in range(1, 11)), pruned(11, 10, 5, absorbs=True)]
    text = types.SimpleNamespace(num_hidden_layers=12, hidden_size=8)
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(get_text_config=lambda: text), dtype=torch.float32, device="cpu"
    )
    calls = alone.selectors(model, schedule, report_with(*sites), 1, None)
    assert [int(call()[0].sum()) for call in calls] == [*range(19, 9, -1), 5]
    assert len({id(body.__code__) for body in seen}) == 11


def test_parts_are_timed_in_turns() -> None:
    seen: list[str] = []
    parts = {"a": (lambda: seen.append("a"),), "none": (), "b": (lambda: seen.append("b"),) * 2}
    spans = alone.timed(parts, torch.device("cpu"), 3)
    assert seen == ["a", "b", "b"] * 5
    assert {name: len(found) for name, found in spans.items()} == {"a": 3, "b": 3}


def test_the_bars_of_a_plot_add_up() -> None:
    """The projector is a part of the vision stage, where it was timed by itself."""

    def row(arm: str, stage: str, taken: float) -> StageTiming:
        return StageTiming({"new_tokens": 3}, None, arm, stage, taken, 0.0, 0.0, 1, None, None, None, {}, {})

    rows = [row(arm, *of) for arm in (BASELINE, "eager") for of in (("vision", 9.0), ("decode", 2.0))]
    rows += [row(BASELINE, "projector", 4.0), row(BASELINE, PREFILL, 1.0)]
    result = BenchResult(rows, [], 0, 0, None, None, [], {}, (0.0, 0.0))
    assert [*plot.parts(result, BASELINE).values()] == [5.0, 4.0, 1.0, 6.0]
    assert [*plot.parts(result, "eager").values()] == [9.0, 0.0, 0.0, 6.0]


def test_the_attention_kernel_is_seen() -> None:
    q = torch.randn(1, 2, 8, 16)
    output, names = attention_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert output.shape == q.shape
    assert [name for name in names if name.startswith("_scaled_dot_product_flash_attention")]
    assert attention_of(lambda: q @ q.mT)[1] == []


def test_arms_with_other_attention_kernels_are_named() -> None:
    def cost(arm: str, *kernels: str) -> Cost:
        return Cost(arm, [], None, None, 0, 0.0, 0.0, 0.0, 0.0, 0, 0, None, list(kernels))

    costs = [cost(BASELINE, "flash"), cost(LUVC, "flash"), cost(FASTV, "efficient")]
    result = BenchResult([], costs, 0, 0, None, None, [], {}, (0.0, 0.0))
    assert result.other_attention() == [FASTV]


# --------------------------------------------------------------------------------------------- running

SMALL: dict[str, Any] = {
    "visual": Visual(1, video=True),
    "text": 8,
    "layers": 3,
    "rounds": 2,
    "new_tokens": 2,
    "device": "cpu",
}
PRUNED = Schedule(prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)))


@pytest.fixture(scope="module")
def small() -> BenchResult:
    return run(Options("llava-ov-0.5b", PRUNED, names=(BASELINE, LUVC, "eager", SINGLE, SMALLER), **SMALL))


@pytest.mark.slow
def test_a_run(small: BenchResult) -> None:
    assert small.obstacles == []
    assert small.visual_tokens == 197 and small.prompt_rows == 205
    costs = {cost.arm: cost for cost in small.costs}
    assert costs[LUVC].tokens_per_layer == [197, 99, 0]
    assert costs[LUVC].budget == pytest.approx((197 + 99) / (3 * 197))
    assert costs[BASELINE].tokens_per_layer == [197] * 3
    rows = [197 + 8, 99 + 8, 8]
    assert costs[LUVC].kv_bytes == sum(rows) * 2 * 2 * 64 * 4
    assert small.ideal is not None and 1.5 < small.ideal < 3.5
    assert small.realised is not None
    for arm in (BASELINE, LUVC, "eager", SINGLE):
        for stage in ("vision", "prefill", "first token", "decode"):
            row = small.row(arm, stage)
            assert row is not None and row.median_ms > 0 and row.runs == 2
            assert (row.speedup is None) == (arm == BASELINE)
    baseline, luvc = small.row(BASELINE, "prefill"), small.row(LUVC, "prefill")
    assert baseline is not None and luvc is not None
    assert luvc.speedup == pytest.approx(baseline.median_ms / luvc.median_ms)
    assert small.row(LUVC, "selector") is not None and small.row(BASELINE, "selector") is None
    for arm in (BASELINE, LUVC, SINGLE):
        part, whole = small.row(arm, "projector"), small.row(arm, "vision")
        assert part is not None and whole is not None and part.cpu_ms < whole.cpu_ms
    assert small.other_attention() == [] and costs[LUVC].attention
    for cost in small.costs:
        assert cost.recompiled == 0
    assert 0 < costs[LUVC].luvc_s < costs[LUVC].first_s


@pytest.mark.slow
def test_its_json_has_the_documented_keys(small: BenchResult) -> None:
    read = json.loads(small.to_json())
    keys = {"shape", "schedule", "arm", "stage", "median_ms", "spread_ms", "speedup", "hardware", "versions"}
    assert all(keys <= set(row) for row in read["rows"])
    assert read["rows"][0]["shape"]["name"] == "llava-ov-0.5b"


@pytest.mark.slow
def test_a_plot(small: BenchResult, tmp_path: Any) -> None:
    from luvc_fx.apps.bench.plot import draw

    draw(small, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot be written"):
        draw(small, tmp_path / "no" / "bars.png")


@pytest.mark.slow
def test_no_speed_up_is_given_for_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(importlib.import_module("luvc_fx.passes.prune_tokens"), "_prune_body", broken)
    result = run(Options("llava-ov-0.5b", PRUNED, **SMALL))
    assert any("pass-failed" in text for text in result.obstacles)
    assert all(row.speedup is None and row.interval is None for row in result.rows)
    assert result.realised is None


def test_the_command_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "luvc_fx.cli.main", "bench", "--shape", "gpt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("luvc-fx: there is no shape 'gpt'; there are")


def test_a_batch_is_a_number_or_auto(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[int | None] = []

    def stop(options: Options, note: Any) -> None:
        seen.append(options.batch)
        raise InputError("enough was seen")

    monkeypatch.setattr(importlib.import_module("luvc_fx.cli.commands.bench"), "run", stop)
    for given in ("8", "auto", "0"):
        assert cli.main(["bench", "--batch", given]) == 2
    assert seen == [8, None]
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == "luvc-fx: --batch is '0'; allowed: a whole number from 1 to 10000, or 'auto'"
