"""Dtypes, modes, gradients, losses, further outputs; adapters, dispatched and quantised models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.report import Reason
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_forward, oracle_generate

SCHEDULE = Schedule(
    merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1)),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)),
)
NEW_TOKENS = 4
SMALL = {"decoder_layers": 3, "encoder_layers": 3, "grid": 4}


def compiled(model: Any, schedule: Schedule = SCHEDULE) -> Any:
    """One graph by the user's own line, and a refusal is an error."""
    luvc_fx.prepare(model)
    return torch.compile(model, backend=luvc_fx.backend(schedule, inner="aot_eager", strict=True))


def labels_of(prompt: dict[str, Tensor]) -> Tensor:
    """What a language model is trained on: pad and image tokens do not count."""
    ids = prompt["input_ids"]
    return ids.masked_fill(ids <= 1, -100)


def oracle_loss(model: Any, prompt: dict[str, Tensor], labels: Tensor) -> Tensor:
    want = oracle_forward(model, SCHEDULE, **prompt)
    kept = labels.gather(1, want.rows)
    return model.loss_function(
        logits=want.logits, labels=kept, vocab_size=model.config.text_config.vocab_size
    )


@pytest.mark.parametrize(
    "dtype", slow_unless([torch.float32, torch.bfloat16, torch.float16], [torch.bfloat16]), ids=str
)
@torch.no_grad()
def test_dtypes(dtype: torch.dtype) -> None:
    """Which tokens stay is chosen in float32 on what the model computes in its own dtype."""
    model = tiny_llava().to(dtype)
    prompt = inputs(model, batch=2, padding=(0, 2))
    prompt["pixel_values"] = prompt["pixel_values"].to(dtype)
    # Comfortable choices: in half precision another order of sums may turn a near tie.
    schedule = Schedule(
        merge=Merge("width", length=4, layer=1),
        prune=(Prune(tokens=16, layer=1, energy="lowpass"), Prune(tokens=0, layer=3)),
    )
    want = oracle_forward(model, schedule, **prompt)
    with luvc_fx.applied(model, schedule, inner="aot_eager", strict=True):
        out = model(**prompt)
        assert luvc_fx.report_of(model).tokens_per_layer() == want.tokens_per_layer
    assert out.logits.dtype == dtype
    assert torch.equal(out.row_index, want.rows)
    error = ((out.logits.float() - want.logits.float()) * want.mask[..., None]).square().mean().sqrt()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def test_inference_mode() -> None:
    model = tiny_llava()
    prompt = inputs(model, batch=2)
    want = oracle_forward(model, SCHEDULE, **prompt)
    tokens = oracle_generate(model, SCHEDULE, NEW_TOKENS, **prompt)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(model)(**prompt).logits, want.logits, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()
        with luvc_fx.applied(model, SCHEDULE, inner="aot_eager", strict=True):
            torch.testing.assert_close(model(**prompt).logits, want.logits, atol=1e-5, rtol=1e-5)
            assert torch.equal(model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False), tokens)


@pytest.mark.parametrize("door", ["backend", "compile"])
@torch.no_grad()
def test_labels_give_the_loss_of_the_surviving_rows(door: str) -> None:
    model = tiny_llava()
    prompt = inputs(model, batch=2, padding=(0, 2))
    labels = labels_of(prompt)
    wanted = oracle_loss(model, prompt, labels)
    assert not torch.allclose(model(**prompt, labels=labels).loss, wanted, atol=1e-3)
    if door == "backend":
        loss = compiled(model)(**prompt, labels=labels).loss
    else:
        with luvc_fx.applied(model, SCHEDULE, inner="aot_eager", strict=True):
            loss = model(**prompt, labels=labels).loss
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    "part", slow_unless(["vision_tower", "multi_modal_projector", "language_model"], ["vision_tower"])
)
def test_one_backward_equals_differences_of_the_oracle(part: str) -> None:
    """The gradient along a random direction in one part's weights, next to the oracle's on both sides."""
    model = tiny_llava(**SMALL).double()
    prompt = inputs(model, batch=2)
    prompt["pixel_values"] = prompt["pixel_values"].double()
    labels = labels_of(prompt)

    # The model's own loss would go through float32.
    def loss_of(logits: Tensor, rows: Tensor) -> Tensor:
        targets = labels.gather(1, rows)[:, 1:]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())

    weights = [p for name, p in model.named_parameters() if part in name]
    torch.manual_seed(2)
    direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in weights]
    step = 1e-3  # the model computes norms and rotary tables in float32, so not smaller

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p += by * d
            want = oracle_forward(model, SCHEDULE, **prompt)
            found = float(loss_of(want.logits, want.rows))
            for p, d in zip(weights, direction, strict=True):
                p -= by * d
        return found

    slope = (moved(step) - moved(-step)) / (2 * step)
    model.requires_grad_(True)
    rows = oracle_forward(model, SCHEDULE, **prompt).rows
    loss = loss_of(compiled(model)(**prompt).logits, rows)
    loss.backward()
    assert loss.item() == pytest.approx(moved(0.0), rel=1e-7)
    along = sum(
        float((p.grad * d).sum()) for p, d in zip(weights, direction, strict=True) if p.grad is not None
    )
    assert abs(slope) > 1e-3, "this direction shows nothing"
    assert along == pytest.approx(slope, rel=2e-3)


def test_training_mode_is_refused() -> None:
    model = tiny_llava(**SMALL)
    prompt = inputs(model)
    luvc_fx.compile(model, SCHEDULE, inner="eager")
    model.train()
    with pytest.warns(LuvcWarning, match="training mode"):
        model(**prompt)
    assert [r.reason for r in luvc_fx.report_of(model).refusals] == [Reason.TRAINING]


@torch.no_grad()
def test_hidden_states_have_the_rows_that_enter_each_layer() -> None:
    model = tiny_llava()
    prompt = inputs(model, batch=2)
    want = oracle_forward(model, SCHEDULE, **prompt)
    states = compiled(model)(**prompt, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [*want.kv_lengths, want.kv_lengths[-1]]
    torch.testing.assert_close(model.lm_head(states[-1]), want.logits, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- models that others have changed


@torch.no_grad()
def assert_both_doors_are_the_oracle(model: Any, wanted_from: Any, prompt: dict[str, Tensor]) -> None:
    """`model` gives, through both doors, what the oracle makes of `wanted_from`, its plain twin."""
    want = oracle_forward(wanted_from, SCHEDULE, **prompt)
    tokens = oracle_generate(wanted_from, SCHEDULE, NEW_TOKENS, **prompt)
    luvc_fx.prepare(model)
    backend = luvc_fx.backend(SCHEDULE, inner="eager", strict=True)
    got = torch.compile(model, backend=backend)(**prompt).logits
    torch.testing.assert_close(got, want.logits, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    with luvc_fx.applied(model, SCHEDULE, inner="eager", strict=True):
        assert torch.equal(model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False), tokens)


@pytest.mark.slow
def test_a_lora_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llava(**SMALL)
    prompt = inputs(model, batch=2)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config).eval()
    merged = peft.get_peft_model(tiny_llava(**SMALL), config).eval()
    merged.load_state_dict(adapted.state_dict())
    assert_both_doors_are_the_oracle(adapted, merged.merge_and_unload(), prompt)


def test_device_map_auto(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    plain = tiny_llava(**SMALL)
    plain.save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path, device_map="auto").eval()
    model.generation_config = plain.generation_config
    assert_both_doors_are_the_oracle(model, plain, inputs(plain, batch=2))


def test_dispatch_hooks_are_refused_by_name() -> None:
    """What `device_map="auto"` puts on each module where there is more than one device."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llava(**SMALL)
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    with pytest.raises(ValueError, match="accelerate"):
        luvc_fx.compile(model, SCHEDULE, inner="eager")
    with pytest.raises(ValueError, match="not compiled"):
        luvc_fx.report_of(model)


def test_a_quantised_decoder() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny_llava(**SMALL)
    plain = model(**inputs(model)).logits
    quanto.quantize(model.model.language_model, weights=quanto.qint8)
    quanto.freeze(model)
    assert not torch.equal(model(**inputs(model)).logits, plain)
    assert_both_doors_are_the_oracle(model, model, inputs(model, batch=2))
