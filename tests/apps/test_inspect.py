"""`luvc-fx inspect`: one forward, all that is known of it, and one line where there is nothing to know."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from luvc_fx.apps import inspection, local_model
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.cli.main import main as cli
from luvc_fx.generate.families import Family
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models import inputs, tiny_internvl, tiny_llava, visual_tokens

WORDS = ("<pad>", "<image>", "<unk>", "describe", "the")
KEYS = {
    "directory",
    "model",
    "processor",
    "images",
    "synthetic",
    "image_size",
    "prompt",
    "prompt_rows",
    "visual_tokens",
    "schedule",
    "plan",
    "tokens_per_layer",
    "budget",
    "report",
    "hardware",
    "versions",
}


def processor(model: Any) -> LlavaProcessor:
    """A processor without a chat template for `tiny_llava`: words of a line, images of the tower's size."""
    core = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = dict.fromkeys(("height", "width"), model.config.vision_config.image_size)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@pytest.fixture
def llava_dir(tmp_path: Path) -> Path:
    model = tiny_llava()
    directory = tmp_path / "a llava"
    model.save_pretrained(directory)
    processor(model).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something wants a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def shown(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli(["inspect", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out


def told(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    out = shown(capfd, *arguments, "--json")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert set(found) == KEYS
    return found


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of an inspection that exits with 2."""
    assert cli(["inspect", *map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("...")]
    assert len(lines) == 1, err
    assert lines[0].startswith("luvc-fx: ")
    return lines[0]


def count_calls(model: Any) -> dict[str, int]:
    """How often the parts of a model have run since."""
    calls: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        calls[name] = 0

        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    inner = model.model
    parts: dict[str, nn.Module] = {
        "first encoder block": inner.vision_tower.encoder.layers[0],
        "first decoder layer": inner.language_model.layers[0],
        "last decoder layer": inner.language_model.layers[-1],
        "head": model.lm_head,
    }
    for name, part in parts.items():
        part.register_forward_hook(counter(name))
    return calls


def test_the_model_runs_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llava_dir: Path
) -> None:
    model, its_processor = local_model.load(llava_dir)
    calls = count_calls(model)
    monkeypatch.setattr(inspection, "load", lambda _: (model, its_processor))
    found = told(capfd, llava_dir)
    assert set(calls.values()) == {1}, calls
    assert [graph["kind"] for graph in found["report"]["graphs"]] == ["vision", "prefill"]
    # The hooks count what runs, compiled or not, and the model is as it was.
    assert not hasattr(model, "_luvc_fx")
    prompt = inputs(model)
    inspection.run_once(model, prompt, Schedule.preset("image"))
    assert set(calls.values()) == {2}, calls
    model(**prompt)
    assert set(calls.values()) == {3}, calls


def test_the_shipped_model(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[inspection.Inspection] = []

    def run(*arguments: Any) -> inspection.Inspection:
        results.append(inspection.inspect(*arguments))
        return results[0]

    monkeypatch.setattr(importlib.import_module("luvc_fx.cli.commands.inspect"), "run", run)
    out = shown(capfd, MODEL_DIR, "--prompt", "which bar is tallest ?")
    check_image_preset(json.loads(json.dumps(results[0].to_dict())))
    for text in (
        "synthetic test image, 128 x 128",
        "256 of them visual",
        "vision (encoder)",
        "prefill (fusion, decoder)",
        "16 x 12",
        "256 -> 192 patches",
        "before decoder layer 15",
        "48 -> 0 visual",
        "6 - 14",
        "budget: 0.293 of 256",
        "GFLOPs",
        "KiB",
        "192 visual tokens and not 256",
        "refused: nothing",
    ):
        assert text in out
    assert max(map(len, out.splitlines())) <= 100


def check_image_preset(found: dict[str, Any]) -> None:
    """The shipped model under the `image` preset, as data."""
    assert set(found) == KEYS
    assert (found["model"], found["processor"]) == ("LlavaForConditionalGeneration", "LlavaProcessor")
    assert found["synthetic"]
    assert Schedule.from_json(json.dumps(found["schedule"])) == Schedule.preset("image")
    assert found["visual_tokens"] == 256
    tokens = found["tokens_per_layer"]
    assert found["budget"] == pytest.approx(sum(tokens) / (len(tokens) * 256))
    assert set(found["versions"]) == {"python", "luvc-fx", "torch", "transformers"}
    vision, prefill = found["report"]["graphs"]
    assert (vision["encoder_blocks"], vision["grid"], vision["merged_grid"]) == (5, [16, 16], [16, 12])
    assert (prefill["decoder_layers"], prefill["tokens_per_layer"]) == (16, tokens)
    assert prefill["flops_after"] < prefill["flops_before"]
    assert sum(prefill["kv_bytes_after"]) < sum(prefill["kv_bytes_before"])
    assert [tuple(site.values()) for site in found["plan"]] == [
        (0, "after encoder block 2", "merge width 16 -> 12", 256, 192, "patches"),
        (1, "before decoder layer 2", "prune by distinct", 192, 96, "visual tokens"),
        (1, "before decoder layer 6", "prune by distinct", 96, 48, "visual tokens"),
        (1, "before decoder layer 15", "prune by spectrum", 48, 0, "visual tokens"),
    ]


def test_a_directory_without_a_chat_template(
    capfd: pytest.CaptureFixture[str], llava_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "schedule.json"
    steps = (Merge("width", keep=0.5, layer=0), Merge("height", length=4, layer=0))
    file.write_text(Schedule(merge=steps, prune=Prune(keep=0.5, layer=1)).to_json())
    found = told(capfd, llava_dir, "--schedule", file)
    assert found["synthetic"] and found["image_size"] == [32, 32]
    assert found["visual_tokens"] == 64
    assert found["tokens_per_layer"] == [16, 8, 8, 8]
    assert [(site["before"], site["after"]) for site in found["plan"]] == [(64, 16), (16, 8)]


def test_several_images(capfd: pytest.CaptureFixture[str], llava_dir: Path) -> None:
    images = [str(MODEL_DIR / name) for name in ("chart.png", "objects.png")]
    found = told(capfd, llava_dir, "--image", images[0], "--image", images[1], "--schedule", "document")
    assert found["images"] == images
    assert found["visual_tokens"] == 128
    assert found["tokens_per_layer"] == [128, 128, 64, 0]


def test_an_empty_schedule_and_refusals(
    capfd: pytest.CaptureFixture[str], llava_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(Schedule().to_json())
    out = shown(capfd, llava_dir, "--schedule", file)
    assert "the schedule asks for nothing" in out
    assert "budget: 1.000" in out
    file.write_text(Schedule(prune=Prune(tokens=1000, layer=1)).to_json())
    out = shown(capfd, llava_dir, "--schedule", file)
    assert "nothing is inserted; see what was refused" in out
    assert "Prune.tokens" in out


def test_internvl_runs_once_in_its_tiles() -> None:
    model = tiny_internvl()
    schedule = Schedule(merge=Merge("width", keep=0.5, layer=0), prune=Prune(keep=0.5, layer=1))
    report = inspection.run_once(model, inputs(model, tiles=2), schedule)
    assert [graph.kind for graph in report.graphs] == ["vision", "prefill"]
    plan = inspection.plan_of(report)
    merged = visual_tokens(model)  # of two tiles, each half as wide
    assert [(line.before, line.after) for line in plan] == [(64, 32), (merged, merged // 2)]


def test_directories_of_something_else(
    capfd: pytest.CaptureFixture[str], llava_dir: Path, tmp_path: Path
) -> None:
    assert "does not exist" in refused(capfd, tmp_path / "none")
    assert "is a file" in refused(capfd, llava_dir / "config.json")
    assert "no config.json" in refused(capfd, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "no vision-language model" in refused(capfd, other)
    (other / "config.json").write_text('{"model_type": "nothing-known"}')
    assert "nothing-known" in refused(capfd, other)
    (other / "config.json").write_text("{")
    assert "config" in refused(capfd, other)


def test_directories_with_something_missing(capfd: pytest.CaptureFixture[str], llava_dir: Path) -> None:
    weights = llava_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "weights" in refused(capfd, llava_dir)
    weights.unlink()
    assert "weights" in refused(capfd, llava_dir)
    for file in llava_dir.glob("*processor*"):
        file.unlink()
    assert "processor" in refused(capfd, llava_dir)
    shutil.rmtree(llava_dir)
    assert "does not exist" in refused(capfd, llava_dir)


def test_wrong_arguments(capfd: pytest.CaptureFixture[str], llava_dir: Path, tmp_path: Path) -> None:
    assert "model_dir" in refused(capfd).lower()
    assert "image, video, document" in refused(capfd, llava_dir, "--schedule", "imgae")
    assert "No such file" in refused(capfd, llava_dir, "--image", tmp_path / "none.png")
    assert "format" in refused(capfd, llava_dir, "--image", llava_dir / "config.json")
    assert "empty" in refused(capfd, llava_dir, "--prompt", " ")
    assert "<image>" in refused(capfd, llava_dir, "--prompt", "an <image> ?")
    file = tmp_path / "schedule.json"
    file.write_text(Schedule(prune=Prune(keep=0.5, layer=99)).to_json())
    assert "does not fit the model" in refused(capfd, llava_dir, "--schedule", file)


def test_models_that_cannot_be_wired_or_run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava()
    its_processor = processor(model)
    monkeypatch.setattr(inspection, "load", lambda _: (model.model.language_model, its_processor))
    assert "cannot wire" in refused(capfd, MODEL_DIR)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nkernel")

    model.model.vision_tower.embeddings.forward = broken
    monkeypatch.setattr(inspection, "load", lambda _: (model, its_processor))
    line = refused(capfd, MODEL_DIR)
    assert "failed in its forward" in line and "no such kernel" in line
    assert not hasattr(model, "_luvc_fx")


@pytest.mark.parametrize(
    ("image_processor", "vision", "size"),
    [
        ({"size": {"height": 20, "width": 30}}, {}, (20, 30)),
        ({"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}, {}, (24, 24)),
        (
            {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}, "do_center_crop": True},
            {},
            (20, 20),
        ),
        ({"size": {"longest_edge": 64}}, {}, (64, 64)),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, {}, None),
        ({}, {"image_size": 48}, (48, 48)),
        ({}, {"image_size": [48, 32]}, (48, 32)),
    ],
)
def test_the_size_of_the_synthetic_image(
    image_processor: dict[str, Any], vision: dict[str, Any], size: tuple[int, int] | None
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(**vision)))
    assert Family(model).preferred_size(SimpleNamespace(**image_processor)) == size
