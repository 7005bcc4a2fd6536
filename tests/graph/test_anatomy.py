"""Recognition: what is found in a graph, by structure alone, and why something is not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import luvc_fx
from luvc_fx.anatomy.attention import attentions
from luvc_fx.anatomy.recognise import Anatomy, recognise
from luvc_fx.graph.nodes import live_nodes, op_name, shape, value
from luvc_fx.report import Insertion, Reason
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.models import rename_everything, tiny_llava
from tests.support.oracle import oracle_forward
from tests.support.replay import (
    Captured,
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
    whole,
)

SMALL = (("decoder_layers", 2), ("encoder_layers", 3), ("grid", 4))
BOTH = Schedule(
    merge=(Merge("width", length=2, layer=0), Merge("height", length=3, layer=-1)),
    prune=(Prune(tokens=4, layer=0), Prune(tokens=1, layer=-1, energy="lowpass")),
)


def anonymous(captured: Captured) -> fx.Graph:
    """A copy without any word about modules, and with meaningless node names."""
    graph = captured.copy().graph
    for number, node in enumerate(graph.nodes):
        for key in list(node.meta):
            if key != "example_value":
                del node.meta[key]
        if node.op != "output":
            node._rename(f"n{number}")
    return graph


def summary(anatomy: Anatomy) -> dict[str, Any]:
    encoder, decoder = anatomy.encoder, anatomy.decoder
    assert encoder is not None
    assert decoder is not None
    return {
        "kind": anatomy.kind,
        "blocks": len(encoder.leaving),
        "grid": encoder.grid,
        "lead": encoder.lead,
        "images": encoder.images,
        "layers": len(decoder.entering),
        "batch": decoder.batch,
        "visual": decoder.visual,
    }


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}, {"blocks": 3, "grid": (8, 8), "layers": 4, "visual": 64}),
    "last feature layer": (
        {"vision_feature_layer": -1, "encoder_layers": 3, "decoder_layers": 2, "grid": 4},
        {},
        {"blocks": 3, "grid": (4, 4), "layers": 2, "visual": 16},
    ),
    "early feature layer": (
        {"vision_feature_layer": -3, "decoder_layers": 2, "grid": 4},
        {},
        {"blocks": 2, "grid": (4, 4), "layers": 2, "visual": 16},
    ),
    "colliding sizes": ({"collide": True}, {}, {"blocks": 3, "grid": (4, 4), "layers": 4, "visual": 16}),
    "colliding sizes, batch of 4": (
        {"collide": True},
        {"batch": 4},
        {"blocks": 3, "grid": (4, 4), "layers": 4, "visual": 16, "batch": 4, "images": 4},
    ),
    "two images a row": (
        dict(SMALL),
        {"batch": 2, "images": 2},
        {"blocks": 2, "grid": (4, 4), "layers": 2, "visual": 32, "batch": 2, "images": 4},
    ),
    "odd grid": (
        {"decoder_layers": 2, "encoder_layers": 3, "grid": 5},
        {"padding": 2},
        {"blocks": 2, "grid": (5, 5), "layers": 2, "visual": 25},
    ),
}


@pytest.mark.parametrize(
    ("name", "names"),
    slow_unless(
        itertools.product(MODELS, ["named", "anonymous"]),
        [("default", "named"), *((name, "anonymous") for name in MODELS)],
    ),
)
def test_the_parts_are_found(name: str, names: str) -> None:
    model, options, want = MODELS[name]
    captured = whole(model=tuple(model.items()), **options)
    graph = captured.copy().graph if names == "named" else anonymous(captured)
    anatomy = recognise(graph)
    assert anatomy.refusals == []
    defaults = {"kind": "whole", "lead": 1, "images": 1, "batch": 1}
    assert summary(anatomy) == {**defaults, **want}


def test_recognition_changes_nothing() -> None:
    captured = whole()
    before = code(captured.gm.graph), [dict(n.meta) for n in captured.gm.graph.nodes]
    recognise(captured.gm.graph)
    assert (code(captured.gm.graph), [dict(n.meta) for n in captured.gm.graph.nodes]) == before


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_sites_are_the_layers_inputs_and_outputs(layer: int) -> None:
    """The values that hooks on the stock modules see are the values at the sites."""
    options = {"decoder_layers": 2, "encoder_layers": 3, "grid": 4, "vision_feature_layer": layer}
    model, captured = llava(**options), whole(model=tuple(options.items()))
    anatomy = recognise(captured.gm.graph)
    assert anatomy.encoder is not None
    assert anatomy.decoder is not None
    seen: dict[str, list[Tensor]] = {"leaving": [], "entering": []}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: seen["leaving"].append(out))
        for block in model.model.vision_tower.encoder.layers
    ] + [
        block.register_forward_pre_hook(lambda _m, args: seen["entering"].append(args[0]))
        for block in model.model.language_model.layers
    ]
    try:
        with torch.no_grad():
            model(**prompt(model=tuple(options.items())))
    finally:
        for hook in hooks:
            hook.remove()
    blocks = 3 + 1 + layer
    sites = {"leaving": anatomy.encoder.leaving, "entering": anatomy.decoder.entering}
    assert [len(sites["leaving"]), len(sites["entering"])] == [blocks, 2]
    values: dict[fx.Node, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if any(n in nodes for nodes in sites.values()):
                values[n] = result.clone()
            return result

    with torch.no_grad():
        Watch(captured.gm).run(*captured.values)
    for which, nodes in sites.items():
        wanted = seen[which][: len(nodes)]
        for number, (node, want) in enumerate(zip(nodes, wanted, strict=True)):
            assert torch.equal(values[node], want), f"{which} {number}"


@pytest.mark.parametrize("collide", [False, True], ids=["plain", "colliding sizes"])
def test_renamed_models_are_rewritten_like_any(collide: bool) -> None:
    options: dict[str, Any] = {"collide": True} if collide else dict(SMALL)
    model = rename_everything(luvc_fx.prepare(tiny_llava(**options)))
    batch = prompt(batch=2, model=tuple(options.items()))
    captured = capture(model, **batch)
    for node in captured.gm.graph.nodes:
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("source_fn_stack", None)
    names = {type(module).__name__ for module in model.modules()}
    assert all(name[0] == "K" and name[1:].isdigit() for name in names)
    got, _, report = captured.rewritten(luvc_fx.backend(BOTH, inner="eager", strict=True))
    want = oracle_forward(model, BOTH, **batch)
    assert report.tokens_per_layer == want.tokens_per_layer
    assert_is_oracle(Outputs.of(got), want)


def test_a_dead_encoder_layer_is_no_block() -> None:
    """With feature layer -2 the tower's last layer may run in the graph, but nothing reads it."""
    captured = whole()
    anatomy = recognise(captured.gm.graph)
    assert anatomy.encoder is not None
    attentions = [n for n in captured.gm.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    assert len(attentions) >= 4 + 3
    assert len(anatomy.encoder.leaving) == 3
    assert anatomy.encoder.leaving[-1] in set(_above(anatomy.encoder.features))


def _above(node: fx.Node) -> list[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for other in stack.pop().all_input_nodes:
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return list(seen)


# --------------------------------------------------------------------- captures that end too early


@torch.no_grad()
def test_a_fresh_model_prunes_and_says_why_it_does_not_merge() -> None:
    # not a quarter of the tokens: a decoder graph of its own does not know the grid for 2 x 2 blocks
    schedule = Schedule(merge=Merge("width", length=2, layer=0), prune=Prune(tokens=5, layer=1))
    model, batch = tiny_llava(**dict(SMALL)), prompt(batch=2, model=SMALL)
    backend = luvc_fx.backend(schedule, inner="eager", on_no_match="ignore")
    got = torch.compile(model, backend=backend)(**batch)
    graphs = backend.report.graphs
    assert len(graphs) > 1, "the fresh model captured whole, so this shows nothing"
    found = [refusal for graph in graphs for refusal in graph.refusals]
    assert Reason.CAPTURE_ENDED_BEFORE_FUSION in reasons(found)
    assert "luvc_fx.prepare(model)" in found[0].text
    assert backend.report.tokens_per_layer() == [16, 5]
    assert_is_oracle(Outputs.of_model(got), oracle_forward(model, Schedule(prune=schedule.prune), **batch))


@torch.no_grad()
def test_without_scalar_capture_it_is_the_same_story() -> None:
    torch._dynamo.config.capture_scalar_outputs = False
    # not a quarter of the tokens: a decoder graph of its own does not know the grid for 2 x 2 blocks
    schedule = Schedule(merge=Merge("width", length=2, layer=0), prune=Prune(tokens=5, layer=1))
    model, batch = llava(**dict(SMALL)), prompt(batch=2, model=SMALL)
    backend = luvc_fx.backend(schedule, inner="eager", on_no_match="ignore", capture_scalars=False)
    got = torch.compile(model, backend=backend)(**batch)
    found = [refusal for graph in backend.report.graphs for refusal in graph.refusals]
    assert Reason.CAPTURE_ENDED_BEFORE_FUSION in reasons(found)
    assert_is_oracle(Outputs.of_model(got), oracle_forward(model, Schedule(prune=schedule.prune), **batch))


# ----------------------------------------------------------------------------- models by hand


def refusal_of(captured: Captured, schedule: Schedule = BOTH) -> tuple[Any, fx.GraphModule]:
    """The report on a graph of which nothing is rewritten, and the graph afterwards."""
    got, gm, report = captured.rewritten(quietly(schedule))
    for mine, plain in zip(got, captured.plain(), strict=True):
        assert torch.equal(mine, plain)
    return report, gm


def test_the_toy_is_recognised() -> None:
    """Or the refusals below would say nothing."""
    captured = toy_whole()
    anatomy = recognise(captured.gm.graph)
    want = {"kind": "whole", "blocks": 2, "grid": (4, 4), "lead": 0, "images": 2}
    assert summary(anatomy) == {**want, "layers": 3, "batch": 2, "visual": 16}
    for node in (*anatomy.encoder.leaving, *anatomy.decoder.entering):  # type: ignore[union-attr]
        assert value(node).dim() == 3
        assert shape(node)[0] == 2
    _, _, report = captured.rewritten(luvc_fx.backend(BOTH, inner="eager", strict=True))
    assert report.tokens_per_layer == [4, 4, 1]
    assert report.merged_grid == (3, 2)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_prune_by_hand(layer: int) -> None:
    """The toy's layers one by one, with the rows picked between them."""
    model, batch = toy(), toy_inputs()
    captured = capture(model, **batch)
    schedule = Schedule(prune=Prune(tokens=4, layer=layer, selector="uniform"))
    (got,), _, _ = captured.rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))
    visual = batch["ids"][0] == 1
    kept = torch.arange(len(visual))[visual][[2, 6, 10, 14]]
    rows = sorted([*torch.arange(len(visual))[~visual].tolist(), *kept.tolist()])
    with torch.no_grad():
        x = model.patches(batch["pixels"]).flatten(2).transpose(1, 2)
        for block in model.encoder:
            x = block(x)
        hidden = model.embed(batch["ids"])
        hidden[:, visual] = x
        for number, block in enumerate(model.decoder):
            hidden = block(hidden[:, rows] if number == layer else hidden)
        assert_close(got, model.head(hidden), 1e-5, "logits")


def fifth(x: Tensor) -> Tensor:
    return x + x[:, 5:6]


def first_rows(x: Tensor) -> Tensor:
    return torch.cat([x[:, :7] * 2, x[:, 7:]], dim=1)


def appended(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(x.shape[0], 1, x.shape[2])], dim=1)


def in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, 3] = 0.0
    return y


def two_attentions(x: Tensor) -> Tensor:
    h = x.unsqueeze(1)
    attend = torch.nn.functional.scaled_dot_product_attention
    return x + (attend(h, h, h) + attend(h * 2, h, h)).squeeze(1)


def permuted(x: Tensor) -> Tensor:
    return x[:, torch.arange(x.shape[1] - 1, -1, -1)]


TOYS: dict[str, tuple[dict[str, Any], dict[str, Any], Reason, str]] = {
    "two fusions": ({"fusions": 2}, {}, Reason.NO_FUSION, "more than one place"),
    "no fusion": ({"fusions": 0}, {}, Reason.CAPTURE_ENDED_BEFORE_FUSION, "luvc_fx.compile"),
    "no residual in the decoder": (
        {"residual": False},
        {},
        Reason.RESIDUAL_STREAM,
        "no [batch, rows, dim] value enters layer 0",
    ),
    "two attention calls on one value": (
        {"between": two_attentions},
        {},
        Reason.RESIDUAL_STREAM,
        "two attention calls read the same residual value",
    ),
    "cut at a fixed token": ({"between": fifth}, {}, Reason.TOKEN_AXIS, "fixed place"),
    "front rows changed": ({"between": first_rows}, {}, Reason.TOKEN_AXIS, "fixed place"),
    "rows appended": ({"between": appended}, {}, Reason.TOKEN_AXIS, "appended behind"),
    "written in place": ({"between": in_place}, {}, Reason.TOKEN_AXIS, ""),
    "picked by a tensor": ({"between": permuted}, {}, Reason.TOKEN_AXIS, ""),
}


@pytest.mark.parametrize("name", TOYS)
def test_what_is_refused_is_left_alone_with_a_reason(name: str) -> None:
    options, given, reason, words = TOYS[name]
    if name == "no fusion":
        # the features never enter the text: the encoder alone
        model = toy()
        captured = capture(
            lambda pixels: model.encoder[1](
                model.encoder[0](model.patches(pixels).flatten(2).transpose(1, 2))
            ),
            pixels=toy_inputs()["pixels"],
        )
    else:
        captured = capture(toy(**options), **toy_inputs(**given))
    report, gm = refusal_of(captured)
    assert reasons(report.refusals) == [reason], "one reason, the right one"
    assert words in report.refusals[0].text
    assert not report.rewritten
    assert code(gm.graph) == code(captured.gm.graph)


VISION_TOYS: dict[str, tuple[dict[str, Any], Reason]] = {
    "no convolution": ({"conv": False}, Reason.NO_GRID),
    "a patch at a fixed place": ({"vision_between": fifth}, Reason.TOKEN_AXIS),
    "patches reordered": ({"vision_between": permuted}, Reason.TOKEN_AXIS),
    "patches written in place": ({"vision_between": in_place}, Reason.TOKEN_AXIS),
}


@pytest.mark.parametrize("name", VISION_TOYS)
def test_without_a_grid_nothing_merges_but_pruning_goes_on(name: str) -> None:
    options, reason = VISION_TOYS[name]
    captured = capture(toy(**options), **toy_inputs(conv=options.get("conv", True)))
    got, _, report = captured.rewritten(quietly(BOTH))
    assert reason in reasons(report.refusals)
    only, _, other = captured.rewritten(quietly(Schedule(prune=BOTH.prune)))
    pruned = [Insertion("prune", 0, "spectrum", 16, 4), Insertion("prune", 2, "spectrum", 4, 1)]
    assert report.inserted == other.inserted == pruned
    assert other.refusals == [], "no merge was asked for"
    assert all(torch.equal(a, b) for a, b in zip(got, only, strict=True))


def test_patches_that_come_one_by_one_have_no_grid() -> None:
    """The reason is not that the image is small: its patches may be many, cut before the tower."""
    captured = capture(toy(), **toy_inputs(side=1))
    _, _, report = captured.rewritten(quietly(Schedule(merge=BOTH.merge)))
    assert reasons(report.refusals) == [Reason.NO_GRID]
    assert "one patch of each input: small images, or patches without their grid" in report.refusals[0].text


def test_an_uneven_batch_is_refused() -> None:
    """Three images in two rows: 2 and 1."""
    model = toy()
    side = 2
    ids = torch.full((2, 12), 1)
    ids[:, :2] = 3
    ids[0, 2 + 2 * side * side :] = 4
    ids[1, 2 + side * side :] = 4
    pixels = toy_inputs(rows=2, images=3, side=side)["pixels"]
    report, gm = refusal_of(capture(model, ids=ids, pixels=pixels), Schedule(prune=Prune(tokens=1, layer=1)))
    assert reasons(report.refusals) == [Reason.UNEVEN_BATCH]
    assert not report.rewritten
    assert gm.graph is not None


@torch.no_grad()
def test_rows_with_other_counts_than_compiled_for_are_an_error() -> None:
    """Two images in one row and none in the other are as many as one in each."""
    model = toy()
    backend = luvc_fx.backend(Schedule(prune=Prune(tokens=2, layer=1)), inner="eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    ids = torch.full((2, 12), 4)
    ids[:, 2:6] = 1
    pixels = toy_inputs(side=2)["pixels"]
    compiled(ids=ids, pixels=pixels)
    uneven = torch.full((2, 12), 4)
    uneven[0, 2:10] = 1
    with pytest.raises(RuntimeError, match="compiled for 4 visual tokens in each row"):
        compiled(ids=uneven, pixels=pixels)
    assert len(backend.report.graphs) == 1


@torch.no_grad()
def test_a_static_cache_is_refused_and_the_result_is_the_plain_one() -> None:
    from transformers import StaticCache

    model, batch = llava(**dict(SMALL)), prompt(batch=2, model=SMALL)
    length = batch["input_ids"].shape[1]

    def cache() -> Any:
        return StaticCache(config=model.config.text_config, max_cache_len=length + 4)

    backend = quietly(Schedule(prune=Prune(tokens=4, layer=1)))
    got = torch.compile(model, backend=backend)(**batch, past_key_values=cache()).logits
    want = model(**batch, past_key_values=cache()).logits
    found = [refusal for graph in backend.report.graphs for refusal in graph.refusals]
    assert found, "a prefill into a StaticCache must be refused by name"
    assert not any(graph.rewritten for graph in backend.report.graphs)
    assert torch.allclose(got, want, atol=1e-5)


@torch.no_grad()
def test_a_prompt_behind_a_cache_that_holds_rows_is_refused() -> None:
    from transformers import DynamicCache

    model, batch = llava(**dict(SMALL)), prompt(model=SMALL)
    text = batch["input_ids"][:, :3]

    def cache() -> Any:
        past = DynamicCache(config=model.config.text_config)
        model(input_ids=text, past_key_values=past)
        return past

    mask = torch.ones(1, 3 + batch["input_ids"].shape[1], dtype=torch.long)
    backend = quietly(Schedule(prune=Prune(tokens=4, layer=1)))
    given = {**batch, "attention_mask": mask}
    got = torch.compile(model, backend=backend)(**given, past_key_values=cache()).logits
    want = model(**given, past_key_values=cache()).logits
    found = [refusal for graph in backend.report.graphs for refusal in graph.refusals]
    assert Reason.PAST_NOT_EMPTY in reasons(found)
    assert torch.allclose(got, want, atol=1e-5)


@torch.no_grad()
def test_attention_that_is_written_out_is_found() -> None:
    """Queries, keys, values and mask of the same calls as the fused operator's."""
    fused, written = (whole(model=(*SMALL, ("attn", attn))).gm.graph for attn in ("sdpa", "eager"))
    both = [attentions(graph, live_nodes(graph)) for graph in (fused, written)]
    assert [call.fused for call in both[0]] == [True] * 4
    assert [call.fused for call in both[1]] == [False] * 4
    for one, other in zip(*both, strict=True):
        for name in ("node", "queries", "values", "keys"):
            fused_shape, shape_ = shape(getattr(one, name)), shape(getattr(other, name))
            assert fused_shape[-2:] == shape_[-2:], name
        assert one.mask is None or other.mask is not None


@pytest.mark.parametrize("what", ["another axis", "a bias twice", "keys as they are"])
def test_products_and_a_softmax_that_are_no_attention(what: str) -> None:
    def call(x: Tensor) -> Tensor:
        if what == "another axis":
            return (x @ x.transpose(-1, -2)).softmax(-2) @ x
        if what == "a bias twice":
            return (x @ x.transpose(-1, -2) + 1 + x.mean()).softmax(-1) @ x
        return (x @ x).softmax(-1) @ x

    graph = capture(call, x=torch.ones(1, 2, 4, 4)).gm.graph
    assert attentions(graph, live_nodes(graph)) == []


def test_several_graphs_are_reported_apart() -> None:
    model = toy()
    backend = luvc_fx.backend(Schedule(prune=Prune(tokens=2, layer=1)), inner=Recorder(), strict=True)

    def call(ids: Tensor, pixels: Tensor) -> Tensor:
        x = model.patches(pixels)
        torch._dynamo.graph_break()
        return x

    torch.compile(call, backend=backend)(**toy_inputs())
    assert [graph.kind for graph in backend.report.graphs] == ["other"]
    torch.compile(model, backend=backend)(**toy_inputs())
    assert [graph.kind for graph in backend.report.graphs][-1] == "whole"
    assert len(backend.report.of_kind("whole")) == 1
    assert backend.report.tokens_per_layer() == [16, 2, 2]
    assert backend.report.budget(16) == pytest.approx(20 / 48)
