"""The backend as Dynamo and its users meet it: arguments, identity, refusals, gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor import compile_fx

import luvc_fx
from luvc_fx import LuvcWarning, NotRewritten, Reason
from luvc_fx.dynamo.backend import LuvcBackend
from luvc_fx.dynamo.generate_warning import GENERATE_HINT
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.oracle import oracle_forward
from tests.support.replay import (
    Outputs,
    Recorder,
    assert_close,
    assert_is_oracle,
    capture,
    code,
    llava,
    prompt,
    quietly,
    reasons,
    toy,
    toy_inputs,
    toy_whole,
)

SMALL = (("decoder_layers", 2), ("encoder_layers", 3), ("grid", 4))
HALF = Schedule(prune=Prune(tokens=8, layer=1))
BOTH = Schedule(merge=Merge("width", length=2, layer=0), prune=Prune(tokens=3, layer=1))
PRUNES = Schedule(prune=(Prune(tokens=9, layer=0), Prune(tokens=4, layer=1, coverage="global")))


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "triton"}, r"inner is 'triton'; allowed: 'inductor', 'aot_eager', 'eager' or a callable"),
        ({"on_no_match": "log"}, r"on_no_match is 'log'; allowed: 'warn', 'raise', 'ignore'"),
        ({"schedule": 3}, r"schedule is 3; allowed: a Schedule or the name of a preset"),
        ({"schedule": "photo"}, r"preset is 'photo'; allowed"),
        ({"inner": "eager", "mode": "max-autotune"}, r"mode and options are Inductor's; inner is 'eager'"),
        ({"inner": "eager", "options": {"max_autotune": True}}, r"mode and options are Inductor's"),
        ({"mode": "fastest"}, r"mode=fastest"),
        (
            {"options": {"max_autotunes": True}},
            r"'max_autotunes' is no option of Inductor; did you mean max_",
        ),
        ({"options": {"max_autotune": "yes"}}, r"type of attr max_autotune, got str should be bool"),
        ({"options": {"luvc.schedule": "image"}}, r"'luvc.schedule' is an option of backend='luvc_fx'"),
    ],
    ids=[
        *("inner", "on_no_match", "schedule kind", "preset", "mode", "options", "unknown mode"),
        *("unknown option", "option of another type", "option of the name"),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        luvc_fx.backend(**options)


def test_the_default_is_the_image_preset_for_inductor() -> None:
    backend = luvc_fx.backend()
    assert (backend.schedule, backend.inner) == (Schedule.preset("image"), "inductor")
    assert str(backend.report) == "nothing compiled yet"


@pytest.mark.parametrize("wanted", [True, False])
def test_scalar_capture_is_switched_on_unless_told_not_to(wanted: bool) -> None:
    torch._dynamo.config.capture_scalar_outputs = False
    luvc_fx.backend(capture_scalars=wanted)
    assert torch._dynamo.config.capture_scalar_outputs is wanted


def test_caching_precompile_is_refused_by_the_factory_and_at_a_call() -> None:
    backend = luvc_fx.backend(HALF, inner="eager")
    captured = toy_whole()
    torch._dynamo.config.caching_precompile = True
    with pytest.raises(RuntimeError, match="caching_precompile is on"):
        luvc_fx.backend(HALF)
    gm = captured.copy()
    with pytest.raises(RuntimeError, match="caching_precompile is on"):
        backend(gm, list(captured.example_inputs))
    assert code(gm.graph) == code(captured.gm.graph)
    assert backend.report.graphs == []


# ------------------------------------------------------------------------------------------- identity

VARIANTS: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": BOTH},
    "inner": {"inner": "aot_eager"},
    "mode": {"inner": "inductor", "mode": "max-autotune"},
    "options": {"inner": "inductor", "options": {"max_autotune": True}},
    "on_no_match": {"on_no_match": "raise"},
    "strict": {"strict": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_when_they_compile_alike(name: str) -> None:
    given = {"schedule": HALF, "inner": "eager"}
    one, same = luvc_fx.backend(**given), luvc_fx.backend(**given)  # type: ignore[arg-type]
    assert one == same
    assert hash(one) == hash(same)
    other = luvc_fx.backend(**{**given, **VARIANTS[name]})  # type: ignore[arg-type]
    assert one != other
    assert other == luvc_fx.backend(**{**given, **VARIANTS[name]})  # type: ignore[arg-type]
    assert one != "luvc_fx"


def test_a_report_does_not_make_it_another_backend() -> None:
    one, other = luvc_fx.backend(HALF, inner="eager"), luvc_fx.backend(HALF, inner="eager")
    torch.compile(toy(), backend=one)(**toy_inputs())
    assert one.report != other.report
    assert one == other


def test_only_an_unequal_backend_recompiles() -> None:
    model, batch, inner = toy(), toy_inputs(), Recorder()

    def graphs_after(schedule: Schedule) -> int:
        torch.compile(model, backend=luvc_fx.backend(schedule, inner=inner, strict=True))(**batch)
        return len(inner.graphs)

    assert graphs_after(HALF) == 1
    assert graphs_after(Schedule(prune=(Prune(tokens=8, layer=1),))) == 1
    assert graphs_after(BOTH) == 2
    assert graphs_after(HALF) == 2


def test_one_call_again_does_not_compile_again() -> None:
    model, backend = toy(), luvc_fx.backend(HALF, inner="eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    first = compiled(**toy_inputs())
    assert torch.equal(first, compiled(**toy_inputs()))
    assert len(backend.report.graphs) == 1


# --------------------------------------------------------------------------------------- inner compiler


def test_mode_and_options_of_torch_compile_are_accepted() -> None:
    model, batch = toy(), toy_inputs()
    want = torch.compile(model, backend=luvc_fx.backend(HALF, inner="eager", strict=True))(**batch)
    for extra in ({"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        torch._dynamo.reset()
        backend = luvc_fx.backend(HALF, inner="eager", strict=True)
        assert torch.equal(torch.compile(model, backend=backend, **extra)(**batch), want)
        assert backend.report.graphs[0].rewritten


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_an_unknown_option_of_torch_compile_raises(inner: str) -> None:
    captured = toy_whole()
    backend = luvc_fx.backend(HALF, inner=inner)
    with pytest.raises(ValueError, match="'epilogue_fusing' is no option of Inductor; did you mean epilogue"):
        backend(captured.copy(), list(captured.example_inputs), options={"epilogue_fusing": True})
    assert backend.report.graphs == []


def test_unknown_keywords_are_accepted() -> None:
    captured = toy_whole()
    backend = luvc_fx.backend(HALF, inner="eager", strict=True)
    backend(captured.copy(), list(captured.example_inputs), name="layer 3", something_new=1)
    assert backend.report.graphs[0].rewritten


@pytest.mark.parametrize(
    ("factory", "call", "mode", "options"),
    [
        ({}, {}, None, {}),
        ({"mode": "max-autotune"}, {}, "max-autotune", {}),
        ({"mode": "max-autotune"}, {"mode": "reduce-overhead"}, "reduce-overhead", {}),
        (
            {"options": {"max_fusion_size": 7, "max-autotune": False}},
            {"options": {"max-autotune": True}},
            None,
            {"max_fusion_size": 7, "max-autotune": True},
        ),
    ],
    ids=["neither", "factory", "the call wins", "merged"],
)
def test_inductor_gets_mode_and_options(
    monkeypatch: pytest.MonkeyPatch,
    factory: dict[str, Any],
    call: dict[str, Any],
    mode: str | None,
    options: dict[str, Any],
) -> None:
    seen: list[tuple[Any, Any]] = []

    def spy(gm: Any, example_inputs: Any, mode: Any, options: Any, cache_key: str) -> Callable[..., Any]:
        seen.append((mode, options))
        return gm.forward

    monkeypatch.setattr("luvc_fx._compat.compile_inductor", spy)
    captured = toy_whole()
    luvc_fx.backend(HALF, strict=True, **factory)(captured.copy(), list(captured.example_inputs), **call)
    assert [seen[0][0], {k: seen[0][1][k] for k in options}] == [mode, options]


def test_a_callable_inner_gets_the_rewritten_graph_and_its_result_is_returned_as_it_is() -> None:
    captured, given = toy_whole(), []

    def result(*_: Any) -> None: ...

    def inner(gm: Any, example_inputs: Any) -> Callable[..., Any]:
        given.append((gm, example_inputs))
        return result

    gm, example_inputs = captured.copy(), list(captured.example_inputs)
    assert luvc_fx.backend(HALF, inner=inner, strict=True)(gm, example_inputs) is result
    assert given[0][0] is gm, "the module itself, or Inductor loses what Dynamo hung on it"
    assert given[0][1] is example_inputs


def test_errors_of_the_inner_compiler_come_through() -> None:
    def inner(gm: Any, example_inputs: Any) -> Any:
        raise ZeroDivisionError("inner")

    captured = toy_whole()
    with pytest.raises(ZeroDivisionError, match="inner"):
        quietly(HALF, inner)(captured.copy(), list(captured.example_inputs))


def spied_by_a_callable(schedule: Schedule, spy: Callable[..., Any], _: pytest.MonkeyPatch) -> LuvcBackend:
    """An inner compiler of one's own."""

    def inner(gm: Any, example_inputs: Any) -> Any:
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=spy)

    return luvc_fx.backend(schedule, inner=inner, strict=True)


def spied_inside_inductor(
    schedule: Schedule, spy: Callable[..., Any], patch: pytest.MonkeyPatch
) -> LuvcBackend:
    """Inductor as it is asked for by its name, up to where it generates code."""
    patch.setattr(compile_fx, "_compile_fx_inner", spy)
    return luvc_fx.backend(schedule, inner="inductor", strict=True)


@torch.no_grad()
@pytest.mark.parametrize("spied", [spied_by_a_callable, spied_inside_inductor])
def test_parameters_stay_static_inputs(spied: Callable[..., LuvcBackend]) -> None:
    """Or CUDA graphs copy all weights at each call."""

    def static_inputs(schedule: Schedule) -> tuple[list[list[int]], int]:
        seen: list[list[int]] = []

        def spy(gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
            seen.append(list(kwargs["static_input_idxs"]))
            return make_boxed_func(gm.forward)

        torch._dynamo.reset()
        model = toy()
        # A graph that another test left in the cache would not reach the inner compiler.
        caches_off = torch.compiler.config.patch(force_disable_caches=True)
        with caches_off, pytest.MonkeyPatch.context() as patch:
            backend = spied(schedule, spy, patch)
            got = torch.compile(model, backend=backend)(**toy_inputs())
        assert torch.isfinite(got).all()
        assert backend.report.graphs[0].rewritten is (schedule != Schedule())
        return seen, len(list(model.parameters()))

    plain, count = static_inputs(Schedule())
    ours, _ = static_inputs(BOTH)
    assert [len(found) for found in plain] == [count]
    assert ours == plain


# ------------------------------------------------------------------------------------------- refusals


def refused() -> tuple[nn.Module, dict[str, Tensor]]:
    return toy(fusions=2), toy_inputs()


@torch.no_grad()
def test_on_no_match_warn() -> None:
    model, batch = refused()
    backend = luvc_fx.backend(HALF, inner="eager")
    with pytest.warns(LuvcWarning, match="luvc_fx left this alone: no-fusion: .* more than one place"):
        got = torch.compile(model, backend=backend)(**batch)
    assert torch.equal(got, model(**batch))
    (report,) = backend.report.graphs
    assert reasons(report.refusals) == [Reason.NO_FUSION]
    assert not report.rewritten


@torch.no_grad()
def test_on_no_match_ignore() -> None:
    model, batch = refused()
    backend = luvc_fx.backend(HALF, inner="eager", on_no_match="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LuvcWarning)
        got = torch.compile(model, backend=backend)(**batch)
    assert torch.equal(got, model(**batch))
    assert reasons(backend.report.graphs[0].refusals) == [Reason.NO_FUSION]


@pytest.mark.parametrize("how", [{"on_no_match": "raise"}, {"strict": True}], ids=["raise", "strict"])
def test_on_no_match_raise(how: dict[str, Any]) -> None:
    model, batch = refused()
    captured = capture(model, **batch)
    backend = luvc_fx.backend(HALF, inner="eager", **how)
    with pytest.raises(NotRewritten, match="no-fusion"):
        backend(captured.copy(), list(captured.example_inputs))
    with pytest.raises(Exception, match=r"no-fusion"):
        torch.compile(model, backend=luvc_fx.backend(HALF, inner="eager", **how))(**batch)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(prune=Prune(tokens=3, layer=9)),
        Schedule(prune=Prune(tokens=17, layer=1)),
        Schedule(prune=(Prune(keep=0.5, layer=2), Prune(keep=0.2, layer=-1))),
    ],
    ids=["no such layer", "more than there are", "two at one layer"],
)
def test_a_schedule_that_the_model_cannot_follow(schedule: Schedule) -> None:
    captured = toy_whole()
    _, gm, report = captured.rewritten(quietly(schedule))
    assert reasons(report.refusals) == [Reason.SCHEDULE]
    assert "; allowed: " in report.refusals[0].text
    assert code(gm.graph) == code(captured.gm.graph)
    assert report.tokens_per_layer == [16] * 3


@pytest.mark.parametrize("where", ["dropout", "attention"])
def test_training_with_dropout_is_refused(where: str) -> None:
    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            if where == "dropout":
                return self.plain(x)
            h = x.unsqueeze(1)
            p = 0.5 if self.training else 0.0
            return x + nn.functional.scaled_dot_product_attention(h, h, h, dropout_p=p).squeeze(1)

    model = toy(between=Drop()).requires_grad_(True)
    # `between` is a block of its own where it attends
    batch = toy_inputs()
    graphs: dict[str, list[Any]] = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        recorder = Recorder()
        torch._dynamo.reset()
        torch.compile(model, backend=recorder)(**batch)
        graphs[mode] = recorder.graphs
    (captured,) = graphs["train"]
    gm = captured.copy()
    backend = quietly(HALF)
    backend(gm, list(captured.example_inputs))
    (report,) = backend.report.graphs
    assert reasons(report.refusals) == [Reason.TRAINING]
    assert code(gm.graph) == code(captured.gm.graph)
    torch.manual_seed(3)
    plain = captured.gm.forward(*captured.values)[0]
    torch.manual_seed(3)
    assert torch.equal(gm.forward(*captured.values)[0], plain)
    assert plain.requires_grad
    (captured,) = graphs["eval"]
    _, _, report = captured.rewritten(luvc_fx.backend(HALF, inner="eager", strict=True))
    assert report.rewritten


@torch.no_grad()
def test_logits_to_keep_still_means_the_last_rows() -> None:
    model, batch = llava(**dict(SMALL)), prompt(batch=2, model=SMALL)
    want = oracle_forward(model, BOTH, **batch).logits[:, -1:]
    backend = luvc_fx.backend(BOTH, inner="eager", strict=True)
    got = torch.compile(model, backend=backend)(**batch, logits_to_keep=1).logits
    assert backend.report.graphs[0].tokens_per_layer == [8, 3]
    assert_close(got, want, 2e-5, "the last row's logits")


# --------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "fresh"])
def test_generate_on_a_compiled_model_warns(prepared: bool) -> None:
    from tests.support.models import tiny_llava

    model = tiny_llava(**dict(SMALL))
    if prepared:
        luvc_fx.prepare(model)
    batch = prompt(model=SMALL)
    plain = model.generate(**batch, max_new_tokens=2, do_sample=False)
    backend = luvc_fx.backend(HALF, inner="eager")
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(LuvcWarning) as caught:
        got = compiled.generate(**batch, max_new_tokens=2, do_sample=False)
    assert [str(w.message) for w in caught if w.category is LuvcWarning] == [GENERATE_HINT]
    assert torch.equal(got, plain)
    assert backend.report.graphs == []


def test_compiling_a_function_or_a_module_without_generate_is_fine() -> None:
    model, batch = toy(), toy_inputs()
    torch.compile(model, backend=luvc_fx.backend(HALF, inner="eager", strict=True))(**batch)
    assert not hasattr(model, "generate")
    torch._dynamo.reset()
    backend = luvc_fx.backend(HALF, inner="eager", strict=True)
    torch.compile(lambda **kwargs: model(**kwargs), backend=backend)(**batch)
    assert backend.report.graphs[0].rewritten


# -------------------------------------------------------------------------------------------- gradients


def gradients(
    forward: Callable[..., Tensor], model: nn.Module, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of a weighted sum of the last row's logits, with respect to pixels and some parameters."""
    pixels = batch["pixel_values"].clone().requires_grad_(True)
    names = [
        n
        for n, p in model.named_parameters()
        if n.endswith(("q_proj.weight", "linear_1.weight", "lm_head.weight"))
    ]
    parameters = dict(model.named_parameters())
    logits = forward(**{**batch, "pixel_values": pixels})[:, -1]
    weights = torch.linspace(-1, 1, logits.shape[-1])
    found = torch.autograd.grad(
        (logits * weights).sum(), [pixels, *(parameters[n] for n in names)], allow_unused=True
    )
    return {n: g for n, g in zip(["pixel_values", *names], found, strict=True) if g is not None}


def trainable() -> nn.Module:
    return luvc_fx.prepare(copy.deepcopy(llava(**dict(SMALL))).requires_grad_(True))


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_gradients_through_prunes_are_the_oracle_s(inner: str) -> None:
    model, batch = trainable(), prompt(batch=2, model=SMALL)
    backend = luvc_fx.backend(PRUNES, inner=inner, strict=True)
    compiled = torch.compile(model, backend=backend)
    got = gradients(lambda **kwargs: compiled(**kwargs).logits, model, batch)
    with_grad = oracle_forward.__wrapped__  # type: ignore[attr-defined]
    want = gradients(lambda **kwargs: with_grad(model, PRUNES, **kwargs).logits, model, batch)
    assert backend.report.graphs[0].rewritten
    assert got.keys() == want.keys()
    assert len(got) > 4
    for name in want:
        assert_close(got[name], want[name], 1e-4, f"gradient of {name}")


def test_gradients_through_merges_are_the_oracle_s_slope() -> None:
    """The oracle merges in NumPy, so its slope along a direction stands for its gradient."""
    model, batch = trainable(), prompt(batch=2, model=SMALL)
    backend = luvc_fx.backend(BOTH, inner="aot_eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    got = gradients(lambda **kwargs: compiled(**kwargs).logits, model, batch)["pixel_values"]
    torch.manual_seed(4)
    direction = torch.randn_like(got)
    step = 2e-3
    # The rules merge in float32, so only that step is rounded here.
    exact = copy.deepcopy(model).double()

    def at(offset: float) -> Tensor:
        moved = {**batch, "pixel_values": (batch["pixel_values"] + offset * direction).double()}
        logits = oracle_forward(exact, BOTH, **moved).logits[:, -1]
        return (logits * torch.linspace(-1, 1, logits.shape[-1])).sum()

    slope = float((at(step) - at(-step)) / (2 * step))
    found = float((got * direction).sum())
    assert abs(found - slope) <= 0.01 * abs(slope), f"slope {found:.5g}, the oracle's is {slope:.5g}"
    assert float(oracle_forward(model, BOTH, **batch).gap) > 1e-4


def test_inference_mode() -> None:
    model, batch = llava(**dict(SMALL)), prompt(batch=2, model=SMALL)
    backend = luvc_fx.backend(BOTH, inner="eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        got = compiled(**batch)
    assert_is_oracle(Outputs.of_model(got), oracle_forward(model, BOTH, **batch))
