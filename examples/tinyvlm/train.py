"""Train a tiny VLM on CPU; stop it at any time and start it again with the same command.

Phase 1 (``--warmup-minutes``): vision tower and projector on dense per-patch labels, whose
classifiers are the language model's own word embeddings.  Phase 2: the whole model on packed
questions; the dense loss stays, and a grounding loss asks the early text states, through a map
that is not shipped, which patches the question is about.  Attention is plain and every token is
kept everywhere: no dropping, pooling or merging.  Scenes and packing depend on the step and image
counters only, which the checkpoint keeps.  fp32 throughout: on the CPU used (AVX-512, no
AMX) the backward pass of bf16 attention took about four times as long.

``--start`` goes on from an exported model of the family (the optimizers begin anew), or begins with the
decoder and, as far as it fits, the vision tower of a trained LLaVA.
``--video-minutes`` adds a third phase, in which half of the batches are videos of 4 to 16 frames.
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
from families import WORD, Family, decoder_from_llava, family
from model import IMAGE
from packing import GROUPS, Batch, pack
from scenes import sample
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from videos import film

FULL_SHARE = (0.1, 0.85)  # least and most share of batches at full size in phase 2
GROUND_WEIGHT = 0.5  # weight of the grounding loss in phase 2
GROUND_LAYER = 4  # layers that the text has passed when the grounding loss reads it
WARM_FULL_SHARE = 0.65
MATRICES = (".layers.", ".layer.", ".blocks.", "projector", "merger")  # where Muon's parameters are
VIDEO_FRAMES = {4: 3, 8: 2, 16: 1}  # frames of a video -> videos in a batch
DENSE_WEIGHT = 1.0  # weight of the dense loss in phase 2
EXTRA_FIRST = 10_000_000  # phase 2 adds as many card scenes, for the dense loss only, from here on
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
    ) -> tuple[torch.Tensor, dict[str, float]]:
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
                accuracy[group] = (logits.argmax(-1) == label)[known].float().mean().item()
        return loss, accuracy


@dataclass
class State:
    """Counters that a checkpoint keeps."""

    step: int = 0
    images: int = 0
    cpu_seconds: float = 0.0
    log: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def make_batch(
    kind: Family, step: int, first: int, size: int, full_share: float, scene: str | None = None
) -> Batch:
    """The batch of images of ``step``: scenes ``first``... at one random resolution."""
    rng = np.random.default_rng([7, step])
    side = kind.side if rng.random() < full_share else int(rng.choice(kind.small_sides))
    names, shares = list(kind.kinds), list(kind.kinds.values())
    listed = []
    for i in range(first, first + size):
        drawn = names[np.random.default_rng([8, i]).choice(len(names), p=shares)]
        # LLaVA's scenes draw their own kind, by shares of their own that are the same.
        listed.append(sample("train", i, scene or (None if kind.name == "llava" else drawn)))
    return pack(listed, rng, side, kind=kind)


def make_videos(kind: Family, step: int, first: int, done: float) -> Batch:
    """The batch of videos of ``step``; longer ones come later."""
    rng = np.random.default_rng([9, step])
    late = max(0.0, 2 * done - 0.8)
    shares = np.array([1.0, 0.3 + late, late]) / (1.3 + 2 * late)
    frames = int(rng.choice(list(VIDEO_FRAMES), p=shares))
    films = [film("train", first + i, frames) for i in range(VIDEO_FRAMES[frames])]
    return pack(films, rng, kind.side, kind=kind)


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


def optimizers(
    model: nn.Module, heads: DenseHeads, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for embeddings, convolution, norms, biases."""
    matrices: dict[bool, list[nn.Parameter]] = {True: [], False: []}  # key: is it vision?
    dense = [p for p in heads.parameters() if p is not heads.ground.weight]
    others: dict[bool, list[nn.Parameter]] = {True: dense, False: []}
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and any(part in name for part in MATRICES)
        (matrices if inner else others)["language_model" not in name].append(p)
    others[False].append(heads.ground.weight)
    muon = torch.optim.Muon(
        [{"params": p, "vision": vision} for vision, p in matrices.items()],
        lr=muon_lr,
        weight_decay=0.02,
        adjust_lr_fn="match_rms_adamw",
        ns_steps=4,
    )
    adam = torch.optim.AdamW(
        [{"params": p, "vision": vision} for vision, p in others.items()],
        lr=adam_lr,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


@torch.no_grad()
def dev_accuracy(
    model: LlavaForConditionalGeneration, kind: Family, scenes: int, size: int, frames: int = 0
) -> dict[str, float]:
    """Teacher-forced accuracy of the whole answer per task on single-turn dev questions."""
    hits: dict[str, list[bool]] = defaultdict(list)
    names, shares = list(kind.kinds), list(kind.kinds.values())
    for first in range(0, scenes, size):
        if frames:
            listed = [film("dev", first + i, frames) for i in range(size)]
        else:
            drawn = [
                names[np.random.default_rng([8, first + i]).choice(len(names), p=shares)] for i in range(size)
            ]
            listed = [sample("dev", first + i, drawn[i]) for i in range(size)]
        batch = pack(listed, np.random.default_rng(0), kind.side, turns=(1.0,), kind=kind)
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
    content = torch.load(path, weights_only=True)
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
    model = kind.build()
    if args.start:
        source = AutoModelForImageTextToText.from_pretrained(args.start, dtype=torch.float32)
        if type(source) is type(model):
            model.load_state_dict(source.state_dict())
        else:
            decoder_from_llava(model, source)
            kind.vision_from_llava(model, source)
    return model


def train(args: argparse.Namespace) -> None:
    """Run all phases until ``--minutes`` of processor time are spent, counting earlier runs."""
    torch.set_num_threads(args.threads)
    kind = family(args.family)
    model = begin(kind, args)
    heads = DenseHeads(model.config.text_config.hidden_size, kind.groups)
    opts = optimizers(model, heads, args.muon_lr, args.adam_lr)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    path = Path(args.run) / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = load(path, model, heads, opts) if path.exists() else State()
    parameters = [*model.parameters(), *heads.parameters()]
    last_save = last_dev = state.cpu_seconds
    since_start = 0  # the learning rate ramps up again after every start
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    past = 60 * args.warmup_minutes
    film_from = 60 * (args.minutes - args.video_minutes)
    while state.cpu_seconds < 60 * args.minutes and not stopped:
        began = time.process_time()
        warm = state.cpu_seconds < past
        since_start += 1
        if warm:
            size, done = args.warmup_batch, state.cpu_seconds / past
            decay = 1 - 0.8 * done
            ramp = min(1.0, since_start / 100)
        else:
            size, done = args.batch, (state.cpu_seconds - past) / (60 * args.minutes - past)
            decay = min(1.0, 1.5 * (1 - done))
            ramp = min(1.0, since_start / 50)
        for optimizer in opts:
            for group in optimizer.param_groups:
                share = VISION_RATE if group["vision"] and not warm else 1.0
                group["lr"] = group["peak"] * decay * ramp * share
        share = WARM_FULL_SHARE if warm else float(np.clip(1.5 * done - 0.4, *FULL_SHARE))
        video = state.cpu_seconds >= film_from and state.step % 2 == 0
        if video:
            late = (state.cpu_seconds - film_from) / (60 * args.video_minutes)
            batch = make_videos(kind, state.step, state.images, late)
        else:
            batch = make_batch(kind, state.step, state.images, size, share)
        features = kind.features(model, batch.pixels)
        words = model.get_input_embeddings().weight
        if args.start and warm:
            words = words.detach()  # the decoder knows them as they are
        loss, accuracy = heads(features, words, batch)
        mark = "video_" if video else ""
        state.log[mark + "dense"].append(loss.item())
        for name, value in accuracy.items():
            state.log[mark + name].append(value)
        if not warm:
            features = features.reshape(len(batch.input_ids), -1, features.shape[-1])
            logits, early = read(model, batch, features)
            if not video and kind.name == "llava":
                extra = make_batch(kind, state.step, EXTRA_FIRST + state.images, size, share, "cards")
                digits, read_off = heads(kind.features(model, extra.pixels), words, extra)
                state.log["digit"].append(read_off["number"])
                loss = loss + digits
            keep = batch.targets >= 0
            target, weight = batch.targets[keep], batch.weights[keep]
            each = functional.cross_entropy(logits, target, reduction="none")
            answer = (each * weight).sum() / weight.sum()
            ground = heads.grounding(early, features, batch)
            loss = DENSE_WEIGHT * loss + GROUND_WEIGHT * ground + answer
            state.log[mark + "ground"].append(ground.item())
            state.log[mark + "answer"].append(answer.item())
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.log["norm"].append(norm.item())
        state.step += 1
        state.images += size
        state.cpu_seconds += time.process_time() - began
        if state.step % 50 == 0:
            means = " ".join(f"{k} {np.mean(v):.3f}" for k, v in state.log.items())
            minutes = state.cpu_seconds / 60
            print(f"{minutes:.1f} min step {state.step} images {state.images} {means}", flush=True)
            state.log.clear()
        if not warm and state.cpu_seconds - last_dev > 60 * args.dev_minutes:
            last_dev = state.cpu_seconds
            scores = dev_accuracy(model, kind, 96, 16)
            if video or state.cpu_seconds >= film_from:
                scores |= {f"4:{k}": v for k, v in dev_accuracy(model, kind, 32, 4, frames=4).items()}
            line = " ".join(f"{k} {100 * v:.0f}" for k, v in scores.items())
            macro = 100 * np.mean(list(scores.values()))
            print(f"  dev macro {macro:.1f} | {line}", flush=True)
        if state.cpu_seconds - last_save > 120:
            last_save = state.cpu_seconds
            save(path, model, heads, opts, state)
    save(path, model, heads, opts, state)
    print("stopped" if stopped else "done", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="llava", help="llava, internvl or qwen2_vl")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument(
        "--start", type=Path, help="folder of an exported model, or of a trained LLaVA, to start from"
    )
    parser.add_argument("--run", default="runs/tinyvlm", help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=97, help="training time in all")
    parser.add_argument("--warmup-minutes", type=float, default=28, help="time of phase 1")
    parser.add_argument("--video-minutes", type=float, default=0, help="time of the last phase")
    parser.add_argument("--dev-minutes", type=float, default=4, help="between looks at dev accuracy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup-batch", type=int, default=32)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
