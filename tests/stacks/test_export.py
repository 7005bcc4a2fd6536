"""`luvc_fx.export`: one stock program, a package that runs where luvc_fx is not, and what is refused."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_internvl, tiny_llava
from tests.support.models_anyres import anyres_inputs, tiny_onevision
from tests.support.oracle import OracleResult, oracle_forward, score_gap
from tests.support.paths import EXAMPLES

PRUNE = (Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=2))
BOTH = Schedule(merge=(Merge("width", keep=0.5, layer=0),), prune=PRUNE)
SMALL = Schedule(merge=BOTH.merge, prune=PRUNE[:1])
MODELS = {"LLaVA": tiny_llava, "InternVL": tiny_internvl}


def check(got: dict[str, Any], wanted: OracleResult, tolerance: float = 1e-5) -> None:
    """Logits and rows of a program against the oracle's; padded rows hold anything."""
    assert torch.equal(got["row_index"], wanted.rows)
    assert float(((got["logits"] - wanted.logits) * wanted.mask[..., None]).abs().max()) < tolerance
    assert [keys.shape[2] for keys in got["keys"]] == wanted.kv_lengths
    assert [values.shape[2] for values in got["values"]] == wanted.kv_lengths


@pytest.mark.parametrize("family", slow_unless(MODELS, ["LLaVA"]))
def test_an_exported_program_equals_the_oracle_for_prompts_of_any_length(family: str) -> None:
    model = MODELS[family](decoder_layers=3, encoder_layers=3)
    prompt = inputs(model, batch=2, padding=(0, 2))
    assert score_gap(model, BOTH, **prompt) > 1e-4
    program = luvc_fx.export(model, prompt, BOTH)
    module = program.module()
    check(module(**prompt), oracle_forward(model, BOTH, **prompt))
    for text, seed in (((2, 1), 1), ((9, 14), 2)):
        other = inputs(model, batch=2, padding=(0, 3), text=text, seed=seed)
        check(module(**other), oracle_forward(model, BOTH, **other))


@pytest.mark.slow
def test_what_is_exported_is_torch_alone_and_the_models_weights() -> None:
    model = tiny_llava(decoder_layers=3, encoder_layers=3)
    prompt = inputs(model)
    program = luvc_fx.export(model, prompt, BOTH, dynamic=False)
    assert not [node for node in program.graph.nodes if "luvc" in str(node.target)]
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(program.state_dict) <= set(own)
    assert all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in program.state_dict.items())
    assert sorted(program.graph_signature.user_inputs) == sorted(prompt)
    assert luvc_fx.export(model, prompt, Schedule()).module()(**prompt)["logits"].shape[1] == 72
    with pytest.raises(AssertionError, match=r"input_ids.size\(\)\[1\] == 72"):
        program.module()(**inputs(model, text=(3, 9)))


@pytest.mark.slow
def test_a_prompt_with_another_number_of_images_fails_and_does_not_answer_wrong() -> None:
    model = tiny_llava(decoder_layers=3, encoder_layers=3)
    module = luvc_fx.export(model, inputs(model), BOTH).module()
    two = inputs(model, images=2)
    with pytest.raises((RuntimeError, AssertionError)):
        module(**{**two, "pixel_values": two["pixel_values"][:1]})


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_the_package_answers_in_a_process_without_luvc_fx(family: str, tmp_path: Path) -> None:
    """`examples/export_package.py` makes it, `examples/run_package.py` loads it."""
    model = MODELS[family](decoder_layers=2, encoder_layers=2)
    prompt = inputs(model)
    path, data, answers = (str(tmp_path / name) for name in ("vlm.pt2", "inputs.pt", "outputs.pt"))
    runpy.run_path(str(EXAMPLES / "export_package.py"))["package"](model, prompt, SMALL, path)
    longer = inputs(model, text=(6, 11), seed=3)
    for each in (prompt, longer):
        torch.save(each, data)
        command = [sys.executable, str(EXAMPLES / "run_package.py"), path, data, answers]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        wanted = oracle_forward(model, SMALL, **each)
        check(torch.load(answers), wanted, 1e-4)
        assert f"next token: {wanted.logits[:, -1].argmax(-1).tolist()}" in done.stdout


@pytest.mark.slow
def test_what_cannot_be_exported_raises_before_anything_is_written() -> None:
    model = tiny_llava(decoder_layers=3, encoder_layers=3)
    prompt = inputs(model)
    text = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    impossible = Schedule(prune=(Prune(tokens=99, layer=1),))
    onevision = tiny_onevision()
    tiles = anyres_inputs(onevision, [[4, ("image", 40, 40), 5]])
    for arguments, message in (
        ((model, prompt, impossible), "schedule: Prune.tokens is 99; allowed: at most 64"),
        ((model, prompt, Schedule(prune=(Prune(keep=0.5, layer=9),))), "Prune.layer is 9"),
        ((model, text, BOTH), "no image enters this forward"),
        ((model, {**prompt, "tone": 1}, BOTH), "input 'tone' is int"),
        ((model, {**prompt, "tone": torch.ones(1)}, BOTH), "does not read tone"),
        ((onevision, tiles, BOTH), "image_sizes.*luvc_fx.compile"),
    ):
        with pytest.raises(ValueError, match=message):
            luvc_fx.export(*arguments)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        luvc_fx.export(tiny_llava().train(), prompt, BOTH)
    with luvc_fx.applied(model, BOTH), pytest.raises(ValueError, match=r"luvc_fx.restore\(model\)"):
        luvc_fx.export(model, prompt, BOTH)
