"""How the spectrum's filter and the choice are best computed: time by size, and whether the same tokens stay.

``python -m examples.research.benchmarks.realisations`` prints what it finds, ``--write`` puts it into
results/realisations-DEVICE.json. `luvc_fx.ops.lowpass` chooses by it. What the keys mean:

- ``times``: `tokens`, `dim`, `cutoff`, `bins` (that pass), `realisation`; `median_ms` and `spread_ms`
  (between the quartiles) of `spectral_energy` as Inductor compiles it, on noise; `cpu_ms` is processor
  time, 0 on a GPU; the committed ones of a CPU are from a machine that others used as well, so only that
  counts there. ``left_out``: too many products for a CPU.
- ``selection``: the same of choosing a quarter of the `tokens` by `coverage`.
- ``agreement``, on a CPU: the least share of the tokens kept by the FFT in float32 that `realisation` keeps
  too, over energies, coverages and decoder layers, on what enters these layers in the shipped model (of its
  images, one behind the other up to `tokens`). "..., bfloat16" and "..., TF32" round the factors of
  products; "fft, bfloat16 energies" rounds each energy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from examples.research.tinyvlm.scenes import sample
from luvc_fx.apps.bench.timing import Clock, Span, spread
from luvc_fx.apps.demo import load_model
from luvc_fx.apps.environment import hardware, versions
from luvc_fx.ops import select_blocks, select_global, spectral_energy
from luvc_fx.ops.lowpass import passing_bins, products
from luvc_fx.ops.select import keep_blocks, keep_global
from luvc_fx.schedule import ENERGIES

RESULTS = Path(__file__).parent / "results"
TOKENS, DIMS, CUTOFFS = (256, 1024, 4096, 16384), (896, 4096), (0.05, 0.25)
REALISATIONS = ("fft", "basis", "fir")
LAYERS = (2, 6, 10, 15)
IMAGES = 64
MOST_PRODUCTS_ON_CPU = 1 << 35
"""Some ten seconds of one core, by the FIR."""


# ------------------------------------------------------------------------------------------------ time


def timed(call: Callable[[], Any], device: torch.device, runs: int) -> dict[str, float]:
    """Milliseconds of `call`, after a run that is not counted."""
    clock, spans = Clock(device), []
    for _ in range(runs + 1):
        clock.wait()
        stop = clock.stop_after(call)
        clock.wait()
        spans.append(stop())
    return _summary(spans[1:])


def _summary(spans: list[Span]) -> dict[str, float]:
    wall = [span.wall for span in spans]
    cpu = statistics.median(span.cpu for span in spans)
    return {"median_ms": statistics.median(wall), "spread_ms": spread(wall), "cpu_ms": cpu}


def times(
    device: torch.device, sizes: tuple[int, ...], dims: tuple[int, ...], runs: int
) -> Iterator[dict[str, Any]]:
    """Every realisation at every size."""
    for tokens in sizes:
        for dim in dims:
            x = torch.randn(1, tokens, dim, device=device)
            for cutoff in CUTOFFS:
                for realisation in REALISATIONS:
                    yield time_of(x, cutoff, realisation, runs)


def time_of(x: Tensor, cutoff: float, realisation: str, runs: int) -> dict[str, Any]:
    """One realisation at one size, or why it was left out."""
    about = {
        "tokens": x.shape[1],
        "dim": x.shape[2],
        "cutoff": cutoff,
        "bins": passing_bins(x.shape[1], cutoff),
        "realisation": realisation,
    }
    if x.device.type == "cpu" and products(x, cutoff, realisation) > MOST_PRODUCTS_ON_CPU:
        return {**about, "left_out": f"{products(x, cutoff, realisation):.1g} products"}
    torch._dynamo.reset()
    made = torch.compile(
        lambda v: spectral_energy(v, cutoff, "residual", realization=realisation), dynamic=False
    )
    return {**about, **timed(lambda: made(x), x.device, runs)}


def selections(device: torch.device, sizes: tuple[int, ...], runs: int) -> Iterator[dict[str, Any]]:
    """Choosing a quarter by blocks and of all."""
    for tokens in sizes:
        scores = torch.rand(1, tokens, device=device)
        for coverage in ("block", "global"):
            torch._dynamo.reset()

            def pick(x: Tensor, coverage: str = coverage, count: int = tokens // 4) -> Any:
                return keep_blocks(x, count, None) if coverage == "block" else keep_global(x, count)

            made = torch.compile(pick, dynamic=False)
            taken = timed(lambda made=made, scores=scores: made(scores), device, runs)
            yield {"tokens": tokens, "coverage": coverage, **taken}


# ------------------------------------------------------------------------------------------- agreement


class InTF32(TorchFunctionMode):
    """Rounds the factors of matrix products as tensor cores do for TF32: to ten bits behind the point."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.matmul:
            args = tuple(((arg.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for arg in args)
        return function(*args, **(kwargs or {}))


def energies(x: Tensor, cutoff: float, energy: str, realisation: str) -> Tensor:
    """As `spectral_energy`, of a realisation and how it rounds."""
    name, _, rounded = realisation.partition(", ")
    if rounded == "bfloat16":
        with torch.autocast(x.device.type, torch.bfloat16):
            return spectral_energy(x, cutoff, energy, realization=name)
    if rounded == "TF32":
        with InTF32():
            return spectral_energy(x, cutoff, energy, realization=name)
    found = spectral_energy(x, cutoff, energy, realization=name)
    return found.bfloat16().float() if rounded == "bfloat16 energies" else found


def residuals(images: int) -> dict[int, Tensor]:
    """By decoder layer: float32 ``[images, 256, 128]``, the visual rows that enter it."""
    model, processor = load_model()
    model = model.to("cpu", torch.float32)
    found: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    seen: list[Tensor] = []
    for layer in LAYERS:

        def keep(_: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            found[layer].append(hidden[:, seen[-1]])

        model.model.language_model.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    for seed in range(images):
        scene = sample("test", seed)
        text = f"USER: <image> {scene.questions[0].text} ASSISTANT:"
        inputs = processor(images=scene.image, text=text, return_tensors="pt")
        seen.append(inputs["input_ids"][0] == model.config.image_token_id)
        with torch.no_grad():
            model(**inputs)
    return {layer: torch.cat(rows) for layer, rows in found.items()}


ROUNDED = (
    "basis",
    "fir",
    "basis, TF32",
    "basis, bfloat16",
    "fir, bfloat16",
    "fft, bfloat16 energies",
)


def agreements(rows: dict[int, Tensor], sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The least agreement of each realisation with the definition, by size and cutoff."""
    for tokens in sizes:
        for cutoff in (0.1, 0.25, 0.5):
            least = {name: (1.0, "") for name in ROUNDED}
            for layer, hidden in rows.items():
                x = hidden.reshape(-1, tokens, hidden.shape[-1])
                for energy in ENERGIES:
                    want = _kept(energies(x, cutoff, energy, "fft"))
                    for name in ROUNDED:
                        got = _kept(energies(x, cutoff, energy, name))
                        for coverage, kept in got.items():
                            share = float((kept & want[coverage]).sum() / want[coverage].sum())
                            where = f"layer {layer}, {energy}, {coverage}"
                            least[name] = min(least[name], (share, where))
            for name, (share, where) in least.items():
                yield {
                    "tokens": tokens,
                    "cutoff": cutoff,
                    "realisation": name,
                    "least": share,
                    "where": where,
                }


def _kept(scores: Tensor) -> dict[str, Tensor]:
    """A quarter and a half of the tokens by coverage, as bool ``[rows, tokens]``."""
    found = {}
    for share in (4, 2):
        count = scores.shape[1] // share
        for coverage, index in (
            ("block", select_blocks(scores, count, (16, 16))),
            ("global", select_global(scores, count)),
        ):
            empty = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            found[f"1/{share} by {coverage}"] = empty.scatter(1, index, True)
    return found


# -------------------------------------------------------------------------------------------- the whole


def measure(
    device: torch.device,
    sizes: tuple[int, ...],
    dims: tuple[int, ...],
    runs: int,
    images: int,
    say: Callable[[Any], None],
) -> dict[str, Any]:
    """Everything; `say` gets each finding as it is made."""

    def noted(found: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for row in found:
            say(row)
            rows.append(row)
        return rows

    with torch.no_grad():
        agreed = noted(agreements(residuals(images), tuple(n for n in sizes if n <= 256 * images)))
        taken = noted(times(device, sizes, dims, runs))
        picked = noted(selections(device, sizes, runs))
    return {
        "times": taken,
        "selection": picked,
        "agreement": agreed,
        "images": images,
        "layers": list(LAYERS),
        "hardware": hardware(torch.empty(0, device=device)),
        "versions": versions(),
    }


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--largest", type=int, default=max(TOKENS), help="at most so many tokens")
    parser.add_argument("--dim", type=int, nargs="*", default=DIMS, help="channels")
    parser.add_argument("--images", type=int, default=IMAGES, help="for the agreement")
    parser.add_argument("--write", action="store_true", help="into results/")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    device = torch.device(given.device)
    sizes = tuple(tokens for tokens in TOKENS if tokens <= given.largest)
    found = measure(
        device, sizes, tuple(given.dim), given.runs, given.images, lambda row: print(row, flush=True)
    )
    if given.write:
        text = json.dumps(found, indent=1) + "\n"
        (given.out / f"realisations-{device.type}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
