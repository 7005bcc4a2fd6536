"""Sizes of images as text: what models make of the constants, and how often Dynamo compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import luvc_fx
from luvc_fx import _compat
from luvc_fx.generate.constants import as_constant, as_text, constant_of, rows_of
from luvc_fx.generate.families import Modality, family_of
from luvc_fx.schedule import Merge, Schedule
from tests.support.models_anyres import anyres_inputs, tiny_llava_next, tiny_onevision
from tests.support.models_qwen import qwen_inputs, tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl
from tests.support.replay import Recorder

ROWS = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 10**6), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


@given(ROWS)
def test_rows_come_back_from_text(rows: list[list[int]]) -> None:
    text = as_text(torch.tensor(rows))
    assert rows_of(text) == rows
    assert as_text(rows) == as_text([tuple(row) for row in rows]) == text
    assert as_text([torch.tensor(row) for row in rows]) == text


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@given(ROWS)
def test_tensors_come_back_from_their_constants(dtype: torch.dtype, rows: list[list[int]]) -> None:
    for tensor in (torch.tensor(rows), torch.tensor(rows[0]), torch.tensor(rows[0][0]), torch.tensor([rows])):
        typed = tensor.to(dtype)
        again = constant_of(as_constant(typed) or "")
        assert torch.equal(again, typed) and (again.dtype, again.device) == (dtype, typed.device)


@given(ROWS)
def test_lists_come_back_from_their_constants(rows: list[list[int]]) -> None:
    assert constant_of(as_constant(rows) or "") == rows
    assert constant_of(as_constant([tuple(row) for row in rows]) or "") == rows
    assert constant_of(as_constant([torch.tensor(row) for row in rows]) or "") == rows
    assert constant_of(as_constant(rows[0]) or "") == rows[0]


def test_a_tensor_without_numbers_keeps_its_shape() -> None:
    assert constant_of(as_constant(torch.zeros(0, 3, dtype=torch.int64)) or "").shape == (0, 3)


@pytest.mark.parametrize(
    "option",
    [
        torch.tensor([1.5]),
        torch.tensor([True]),
        torch.tensor([1j]),
        [],
        [[]],
        [1.5],
        [True],
        ["a"],
        [[1], 2],
        -2,
        None,
    ],
    ids=str,
)
def test_what_is_not_integers_is_no_constant(option: Any) -> None:
    assert as_constant(option) is None


def test_text_as_it_is_written() -> None:
    assert as_text(torch.tensor([[1, 8, 8], [1, 4, 12]])) == "1,8,8;1,4,12"
    assert as_text([3, 1]) == "3;1"


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tolist": lambda x, grid: x.split(grid.prod(-1).tolist()),
    "rows": lambda x, grid: [x[: h * w] * t for t, h, w in grid],
    "item": lambda x, grid: x.repeat(grid[0, 1].item(), 1),
    "max": lambda x, grid: x[: int(grid.max())],
    "cumsum": lambda x, grid: x[: grid.prod(-1).cumsum(0)[-1]],
    "diff": lambda x, grid: x.split(torch.diff(grid.prod(-1).cumsum(0), prepend=torch.tensor([0])).tolist()),
    "repeat_interleave": lambda x, grid: x[torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])],
    "columns": lambda x, grid: x[: int((grid[:, 1] * grid[:, 2] - grid[:, 0]).sum())],
    "arithmetic": lambda x, grid: x[: int((-grid // 2 + 7 - 1).prod() % 3 + 1)],
    "device, dtype, len": lambda x, grid: (
        x + torch.ones(len(grid), device=grid.device, dtype=grid.dtype).sum()
    ),
    "comparison": lambda x, grid: x[: int(grid[0, 0])] if bool((grid[:, 1] > 3).all()) else x,
    "pad": lambda x, grid: x[nn.functional.pad(grid[:, 1], (1, 0))],
    "unique": lambda x, grid: x[torch.unique(grid)],
}
"""Two grids, ``[[1, 4, 6], [2, 4, 4]]``, and 56 rows."""


@pytest.mark.parametrize("use", USES)
def test_a_tower_may_do_anything_with_its_grids(use: str) -> None:
    """As with the tensor itself, and in one graph."""
    counter = torch._dynamo.testing.CompileCounter()

    def tower(x: Tensor, text: str) -> Any:
        return USES[use](x, constant_of(text))

    rows, grid = torch.arange(112.0).view(56, 2), torch.tensor([[1, 4, 6], [2, 4, 4]])
    with _compat.tracing_settings(), _compat.known_constants():
        got = torch.compile(tower, backend=counter)(rows, as_constant(grid) or "")
    want = USES[use](rows, grid)
    for mine, theirs in zip(_compat.tree_leaves(got), _compat.tree_leaves(want), strict=True):
        assert torch.equal(mine, theirs)
    assert counter.frame_count == 1


def test_values_are_followed_only_while_that_is_asked_for() -> None:
    def twice(x: Tensor) -> Any:
        return x[torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor([2, 1]))]

    with _compat.known_constants(), _compat.known_constants():
        pass
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(twice, backend=counter)(torch.ones(3))
    assert counter.frame_count > 1
    torch._dynamo.reset()
    counter.clear()
    with _compat.known_constants():
        torch.compile(twice, backend=counter)(torch.ones(3))
    assert counter.frame_count == 1


QWEN: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f for f in (tiny_qwen2_vl, tiny_qwen2_5_vl, tiny_qwen3_vl)
}


def modality_of(model: Any, name: str) -> Modality:
    return next(modality for modality in family_of(model).modalities() if modality.name == name)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("make", QWEN)
@torch.no_grad()
def test_an_encoder_takes_tables_and_constants(make: str, kind: str) -> None:
    """With the tables that are computed for it, the model's own encoder gives what it gives for a tensor."""
    model = QWEN[make](decoder_layers=1)
    items = [("image", 4, 8), ("image", 8, 6)] if kind == "image" else [("video", 2, 4, 8)]
    batch = qwen_inputs(model, [[2, *items, 1]])  # type: ignore[list-item]
    modality = modality_of(model, kind)
    pixels, grid = batch[modality.pixels], batch[f"{kind}_grid_thw"]
    encode = getattr(model.base_model, modality.method)
    plain, text = family_of(model).encoder_constants(modality, {f"{kind}_grid_thw": grid})
    assert f"{kind}_grid_thw" in text and f"{kind}_grid_thw" not in plain
    assert all(isinstance(table, Tensor) for table in plain.values())
    given_ = {**plain, **{name: constant_of(found) for name, found in text.items()}}
    got = encode(pixels, return_dict=True, **given_)
    want = encode(pixels, grid, return_dict=True)
    assert torch.equal(torch.cat(list(got.pooler_output)), torch.cat(list(want.pooler_output)))
    for mine, theirs in zip(
        getattr(got, "deepstack_features", None) or [],
        getattr(want, "deepstack_features", None) or [],
        strict=True,
    ):
        assert torch.equal(torch.cat(list(mine)), torch.cat(list(theirs)))


def test_tables_that_the_caller_gives_stay() -> None:
    model = tiny_qwen2_vl(decoder_layers=1)
    options = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "image_position_ids": torch.zeros(16, 2)}
    plain, text = family_of(model).encoder_constants(modality_of(model, "image"), options)
    assert plain["image_position_ids"] is options["image_position_ids"]
    assert text == {
        "image_grid_thw": "int64|cpu|1,3|1,4,4",
        "image_cu_seqlens": "int32|cpu|2|0,16",
    }


def test_other_options_stay_as_they_are() -> None:
    model = tiny_llava_next(decoder_layers=1)
    options = {"image_sizes": torch.tensor([[30, 40]]), "vision_feature_layer": -2}
    plain, text = family_of(model).encoder_constants(modality_of(model, "image"), options)
    assert (plain, text) == ({"vision_feature_layer": -2}, {"image_sizes": "rows|30,40"})


# ------------------------------------------------------------------------------------ recompilation


def symbolic(recorder: Recorder) -> list[str]:
    return [
        str(example)
        for graph in recorder.graphs
        for example in graph.example_inputs
        if isinstance(example, torch.SymInt)
        or (isinstance(example, Tensor) and any(isinstance(s, torch.SymInt) for s in example.shape))
    ]


class Vision(Recorder):
    """Keeps the graphs of the vision encoder only; others run as they are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def __call__(self, gm: Any, example_inputs: Any, **more: Any) -> Any:
        if luvc_fx.report_of(self.model).graphs[-1].kind == "vision":
            return super().__call__(gm, example_inputs, **more)
        return gm.forward


@pytest.mark.slow
@torch.no_grad()
def test_each_new_grid_is_one_compilation_without_symbols() -> None:
    model: Any = tiny_qwen2_vl(decoder_layers=1, encoder_layers=2)
    seen = Vision(model)
    luvc_fx.compile(model, Schedule(merge=Merge("width", keep=0.5, layer=0)), inner=seen, strict=True)
    counts = []
    for height, width in ((4, 4), (4, 4), (4, 8), (4, 4), (8, 4), (4, 8), (12, 8)):
        batch = qwen_inputs(model, [[2, ("image", height, width), 1]], seed=height + width)
        model(**batch)
        counts.append(len(seen.graphs))
    assert counts == [1, 1, 2, 2, 3, 3, 4], "the third and later sizes must not be symbolic, either"
    assert symbolic(seen) == []


@torch.no_grad()
def test_another_size_with_the_same_tiles_is_one_compilation() -> None:
    model: Any = tiny_llava_next(decoder_layers=1, encoder_layers=2)
    seen = Vision(model)
    luvc_fx.compile(model, Schedule(merge=Merge("width", keep=0.5, layer=0)), inner=seen, strict=True)
    counts = []
    for height, width in ((20, 40), (20, 40), (24, 40), (20, 40)):
        model(**anyres_inputs(model, [[2, ("image", height, width), 1]]))
        counts.append(len(seen.graphs))
    assert counts == [1, 1, 2, 2]
    assert symbolic(seen) == []


# ----------------------------------------------------------------------------------------- numpy


def test_a_method_without_numpy_beside_the_class() -> None:
    model = tiny_llava_next(decoder_layers=1)
    base = model.base_model
    kind, module = type(base), sys.modules[type(base).__module__]
    before = (kind.pack_image_features, kind.pack_image_features.__globals__["np"], dict(vars(base)))
    found = family_of(model).traceable_methods()
    assert list(found) == ["pack_image_features"]
    own = found["pack_image_features"]
    assert own.func.__globals__["np"] is not numpy  # type: ignore[attr-defined]
    assert kind.pack_image_features is before[0] and before[0].__globals__["np"] is before[1] is numpy
    assert module.np is numpy and dict(vars(base)) == before[2]
    generator = torch.Generator().manual_seed(1)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    features = [torch.randn(3, side * side, 48, generator=generator)]
    arguments = (features, [(24, 40)], "default")
    for mine, theirs in zip(
        own(*arguments, image_newline=base.image_newline),
        base.pack_image_features(*arguments, image_newline=base.image_newline),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("make", [tiny_onevision, tiny_qwen2_vl], ids=lambda f: f.__name__)
def test_models_that_ask_numpy_for_nothing_keep_their_methods(make: Callable[..., Any]) -> None:
    model = make(decoder_layers=1)
    base = model.base_model
    for name, method in family_of(model).traceable_methods().items():
        assert method.func.__globals__["np"] is not numpy  # type: ignore[attr-defined]
        assert getattr(type(base), name).__globals__["np"] is numpy


def test_restore_takes_the_method_off() -> None:
    model: Any = luvc_fx.prepare(tiny_llava_next(decoder_layers=1))
    before = dict(vars(model.base_model))
    luvc_fx.compile(model, Schedule(), inner="eager")
    assert "pack_image_features" in vars(model.base_model)
    assert "pack_image_features" not in before
    luvc_fx.restore(model)
    assert vars(model.base_model).keys() == before.keys()
    assert model.base_model.pack_image_features.__func__ is type(model.base_model).pack_image_features


def test_a_method_of_the_instances_own_stays() -> None:
    """What a user put in the place of the class's method is what runs, during and after."""
    model: Any = tiny_llava_next(decoder_layers=1)

    def mine(*_: Any, **__: Any) -> None:
        raise AssertionError("not called here")

    model.base_model.pack_image_features = mine
    assert family_of(model).traceable_methods() == {}
    luvc_fx.compile(model, Schedule(), inner="eager")
    assert model.base_model.pack_image_features is mine
    luvc_fx.restore(model)
    assert model.base_model.pack_image_features is mine
