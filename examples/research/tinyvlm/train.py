"""Train a tiny VLM on a CPU core or a GPU; stop it at any time and start it again with the same command.

Phase 1 (``--warmup-minutes``): vision tower and projector on dense per-patch labels, whose
classifiers are the language model's own word embeddings.  Phase 2: the whole model on packed
questions; the dense loss stays, and a grounding loss asks the early text states, through a map
that is not shipped, which patches the question is about.  Attention is plain and every token is
kept everywhere: no dropping, pooling or merging.  Scenes and packing depend on the step counter,
which the checkpoint keeps, and on how much of the time is over.  fp32 throughout: on the CPU used
(AVX-512, no AMX) the backward pass of bf16 attention took about four times as long.

``--start`` goes on from an exported model of the family (the optimizers begin anew), or begins with the
decoder and, as far as it fits, the vision tower of a trained LLaVA.
``--video-minutes`` adds a third phase, in which half of the batches are videos of 4 to 16 frames.

    python -m examples.research.tinyvlm.train --minutes 97    # the checkpoint is in runs/tinyvlm
"""

from __future__ import annotations

import argparse
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from examples.research.tinyvlm.batches import Batches, drawn_kind, feed
from examples.research.tinyvlm.families import (
    WORD,
    Family,
    decoder_from_llava,
    family,
    more_words,
    redepthed,
    with_depth,
)
from examples.research.tinyvlm.model import IMAGE
from examples.research.tinyvlm.muon import optimizers
from examples.research.tinyvlm.packing import GROUPS, Batch, pack
from examples.research.tinyvlm.scenes import sample
from examples.research.tinyvlm.videos import film

GROUND_WEIGHT = 0.5  # weight of the grounding loss in phase 2
GROUND_LAYER = 4  # layers that the text has passed when the grounding loss reads it
DENSE_WEIGHT = 1.0  # weight of the dense loss in phase 2
VISION_RATE = 0.6  # learning rate of the warmed-up vision parts in phase 2, as a share


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Scale the last dimension to a root mean square of 1."""
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class DenseHeads(nn.Module):
    """Dense losses on projected visual tokens; word groups are scored by the word embeddings."""

    def __init__(self, dim: int, groups: tuple[str, ...] = tuple(GROUPS)) -> None:
        super().__init__()
        self.groups = groups
        self.scales = nn.ParameterDict({g: nn.Parameter(torch.tensor(1.0)) for g in groups})
        self.is_thing = nn.Linear(dim, 1)
        self.offset = nn.Linear(dim, 2)
        self.ground = nn.Linear(dim, dim, bias=False)

    def grounding(self, text: torch.Tensor, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of finding the patches a question is about.

        text (Q, D) hidden states where the answers start, features (B, P, D) visual tokens.
        """
        visible = batch.about.any(1)
        query = self.ground(rms_norm(text[visible]))
        scores = (rms_norm(features)[batch.asked[visible]] @ query[:, :, None])[:, :, 0]
        hit = scores.masked_fill(~batch.about[visible], float("-inf"))
        return (scores.logsumexp(1) - hit.logsumexp(1)).mean()

    def forward(
        self, features: torch.Tensor, words: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and patch accuracies for features (B, P, D) and word embeddings (V, D)."""
        thing = batch.dense["color"] >= 0
        inside = rms_norm(features[thing])
        loss = functional.binary_cross_entropy_with_logits(
            self.is_thing(features).squeeze(-1).float(), thing.float()
        )
        loss = loss + 5 * functional.l1_loss(self.offset(inside), batch.offsets[thing])
        accuracy = {}
        for group in self.groups:
            names = GROUPS[group]
            rows = words[[WORD[w] for w in names]]
            logits = self.scales[group] * inside @ rows.T
            label = batch.dense[group][thing]
            if (label >= 0).any():
                loss = loss + functional.cross_entropy(logits, label, ignore_index=-100)
                known = label >= 0
                accuracy[group] = (logits.argmax(-1) == label)[known].float().mean()
        return loss, accuracy


@dataclass
class State:
    """Counters that a checkpoint keeps; the seconds are the processor's, or the clock's on a GPU."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    log: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))


def embed(model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """Input embeddings (B, L, D) with the image features where the placeholders are."""
    words = model.get_input_embeddings()(batch.input_ids)
    return words.masked_scatter((batch.input_ids == IMAGE).unsqueeze(-1), features.to(words.dtype))


def read(
    model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the language model: logits (N, V) at the N targets, early hidden states (Q, D).

    The hidden states are those after ``GROUND_LAYER`` layers where the Q answers start.
    """
    decoder = model.model.language_model
    hidden = embed(model, batch, features)
    positions = batch.position_ids
    rotary = decoder.rotary_emb(hidden, position_ids=positions[0] if len(positions) == 1 else positions)
    at = batch.targets >= 0
    for number, layer in enumerate(decoder.layers):
        if number == GROUND_LAYER:
            early = hidden[at][batch.first]
        hidden = layer(hidden, attention_mask=batch.mask, position_embeddings=rotary)
    return model.lm_head(decoder.norm(hidden[at])), early


@torch.no_grad()
def dev_accuracy(
    model: LlavaForConditionalGeneration, kind: Family, scenes: int, size: int, frames: int = 0
) -> dict[str, float]:
    """Teacher-forced accuracy of the whole answer per task on single-turn dev questions."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, scenes, size):
        numbers = range(first, first + size)
        if frames:
            listed = [film("dev", i, frames) for i in numbers]
        else:
            listed = [sample("dev", i, drawn_kind(kind, i)) for i in numbers]
        batch = pack(listed, np.random.default_rng(0), kind.side, turns=(1.0,), kind=kind)
        batch = batch.to(model.device)
        with torch.compiler.set_stance("force_eager"):
            logits, _ = read(model, batch, visual(model, kind, batch))
        right = (logits.argmax(-1) == batch.targets[batch.targets >= 0]).tolist()
        rests = [iter(scene.questions) for scene in listed]
        for row, at in zip(batch.asked.tolist(), batch.first.tolist(), strict=True):
            question = next(rests[row])
            hits[question.task].append(all(right[at : at + len(question.answer.split())]))
    return {task: float(np.mean(hits[task])) for task in sorted(hits)}


def visual(model: nn.Module, kind: Family, batch: Batch) -> torch.Tensor:
    """Visual tokens (B, F*N, D) of the frames of each row."""
    features = kind.features(model, batch.pixels)
    return features.reshape(len(batch.input_ids), -1, features.shape[-1])


def save(
    path: Path, model: nn.Module, heads: nn.Module, opts: list[torch.optim.Optimizer], state: State
) -> None:
    """Write the checkpoint atomically."""
    part = path.with_suffix(".part")
    content = {
        "model": model.state_dict(),
        "heads": heads.state_dict(),
        "optimizers": [o.state_dict() for o in opts],
        "state": {k: v for k, v in vars(state).items() if k != "log"},
    }
    torch.save(content, part)
    part.replace(path)


def load(path: Path, model: nn.Module, heads: nn.Module, opts: list[torch.optim.Optimizer]) -> State:
    """Restore everything from the checkpoint."""
    content = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(content["model"])
    heads.load_state_dict(content["heads"])
    for optimizer, saved in zip(opts, content["optimizers"], strict=True):
        peaks = [(g["lr"], g["peak"]) for g in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, (lr, peak) in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"], group["peak"] = lr, peak
    return State(**content["state"])


def begin(kind: Family, args: argparse.Namespace) -> nn.Module:
    """A fresh model, one that goes on from an exported one, or one that starts from a LLaVA."""
    torch.manual_seed(args.seed)
    model = with_depth(kind.build(), args.layers)
    if args.start:
        source = AutoModelForImageTextToText.from_pretrained(args.start, dtype=torch.float32)
        source = redepthed(source, args.layers)
        if type(source) is type(model):
            more_words(source, len(model.get_input_embeddings().weight))
            model.load_state_dict(source.state_dict())
        else:
            decoder_from_llava(model, source)
            kind.vision_from_llava(model, source)
    return model


def train(args: argparse.Namespace) -> None:
    """Run all phases until ``--minutes`` are spent, counting earlier runs."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    torch.set_float32_matmul_precision("high" if gpu else "highest")
    kind = family(args.family)
    batches = Batches(args.family, args.warmup_batch, args.batch)
    path = Path(args.run) / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = begin(kind, args).to(device)
    heads = DenseHeads(model.config.text_config.hidden_size, kind.groups).to(device)
    opts = optimizers(model, heads, args.muon_lr, args.adam_lr)
    if not gpu:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    state = load(path, model, heads, opts) if path.exists() else State()
    parameters = [*model.parameters(), *heads.parameters()]
    last_save = last_dev = state.seconds
    since_start = 0  # the learning rate ramps up again after every start
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    past = 60 * args.warmup_minutes
    film_from = 60 * (args.minutes - args.video_minutes)
    draws = feed(batches, state.step, args.workers)
    while state.seconds < 60 * args.minutes and not stopped:
        began = clock()
        warm = state.seconds < past
        since_start += 1
        if warm:
            done = state.seconds / past
            decay = 1 - 0.8 * done
            ramp = min(1.0, since_start / 100)
        else:
            done = (state.seconds - past) / (60 * args.minutes - past)
            decay = min(1.0, 1.5 * (1 - done))
            ramp = min(1.0, since_start / 50)
        for optimizer in opts:
            for group in optimizer.param_groups:
                share = VISION_RATE if group["vision"] and not warm else 1.0
                group["lr"] = group["peak"] * decay * ramp * share
        films = args.video_minutes > 0 and state.seconds >= film_from
        late = (state.seconds - film_from) / (60 * args.video_minutes) if films else 0.0
        batches.progress.copy_(torch.tensor([float(warm), done, float(films), late]))
        draw = next(draws)
        video, batch = draw.video, draw.batch.to(device)
        loss, told = losses(model, heads, kind, batch, warm, words_learn=not (args.start and warm))
        if draw.extra is not None and not warm:
            extra = draw.extra.to(device)
            words = model.get_input_embeddings().weight
            digits, read_off = heads(kind.features(model, extra.pixels), words, extra)
            told["digit"] = read_off["number"]
            loss = loss + digits
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in {**told, "norm": norm}.items():
            state.log[("video_" if video else "") + name].append(value.detach())
        state.step += 1
        state.images += len(batch.pixels)
        if gpu:
            torch.cuda.synchronize()  # or the clock would run ahead of the work
        state.seconds += clock() - began
        if state.step % 50 == 0:
            means = " ".join(f"{k} {torch.stack(v).float().mean():.3f}" for k, v in state.log.items())
            minutes = state.seconds / 60
            print(f"{minutes:.1f} min step {state.step} images {state.images} {means}", flush=True)
            state.log.clear()
        if not warm and state.seconds - last_dev > 60 * args.dev_minutes:
            last_dev = state.seconds
            scores = dev_accuracy(model, kind, 96, 16)
            if films:
                scores |= {f"4:{k}": v for k, v in dev_accuracy(model, kind, 32, 4, frames=4).items()}
                scores |= {f"16:{k}": v for k, v in dev_accuracy(model, kind, 16, 2, frames=16).items()}
            line = " ".join(f"{k} {100 * v:.0f}" for k, v in scores.items())
            macro = 100 * np.mean(list(scores.values()))
            print(f"  dev macro {macro:.1f} | {line}", flush=True)
        if state.seconds - last_save > 120:
            last_save = state.seconds
            save(path, model, heads, opts, state)
    save(path, model, heads, opts, state)
    print("stopped" if stopped else "done", flush=True)


def losses(
    model: nn.Module, heads: DenseHeads, kind: Family, batch: Batch, warm: bool, words_learn: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, and what is worth to be logged of it; in the warm-up the dense loss only.

    Args:
        words_learn: whether the word embeddings learn from the dense loss.
    """
    features = kind.features(model, batch.pixels)
    words = model.get_input_embeddings().weight
    loss, told = heads(features, words if words_learn else words.detach(), batch)
    told["dense"] = loss
    if warm:
        return loss, told
    features = features.reshape(len(batch.input_ids), -1, features.shape[-1])
    logits, early = read(model, batch, features)
    keep = batch.targets >= 0
    target, weight = batch.targets[keep], batch.weights[keep]
    each = functional.cross_entropy(logits, target, reduction="none")
    told["answer"] = (each * weight).sum() / weight.sum()
    told["ground"] = heads.grounding(early, features, batch)
    return DENSE_WEIGHT * loss + GROUND_WEIGHT * told["ground"] + told["answer"], told


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="llava", help="llava, internvl or qwen2_vl")
    parser.add_argument(
        "--layers", type=int, default=16, help="of the decoder, also where the start has others"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument(
        "--start", type=Path, help="folder of an exported model, or of a trained LLaVA, to start from"
    )
    parser.add_argument("--run", default="runs/tinyvlm", help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=97, help="training time in all")
    parser.add_argument("--warmup-minutes", type=float, default=28, help="time of phase 1")
    parser.add_argument("--video-minutes", type=float, default=0, help="time of the last phase")
    parser.add_argument("--dev-minutes", type=float, default=4, help="between looks at dev accuracy")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; there, minutes are the clock's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes ahead")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup-batch", type=int, default=32)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
