"""Train the tiny VLM on CPU; stop it at any time and start it again with the same command.

Phase 1 (``--warmup-minutes``): vision tower and projector on dense per-patch labels, whose
classifiers are the language model's own word embeddings.  Phase 2: the whole model on packed
questions; the dense loss stays, and a grounding loss asks the early text states, through a map
that is not shipped, which patches the question is about.  Attention is plain and every token is
kept everywhere: no dropping, pooling or merging.  Scenes and packing depend on the step and image
counters only, which the checkpoint keeps.  fp32 throughout: on the CPU used (AVX-512, no
AMX) the backward pass of bf16 attention took about four times as long.
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
from model import build_model, image_features
from packing import GROUPS, WORD, Batch, pack
from scenes import SIZE, sample
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

FULL_SHARE = (0.1, 0.85)  # least and most share of batches at 128 px in phase 2
GROUND_WEIGHT = 0.5  # weight of the grounding loss in phase 2
GROUND_LAYER = 4  # layers that the text has passed when the grounding loss reads it
WARM_FULL_SHARE = 0.65
SMALL_SIDES = (64, 80, 96, 112)
DENSE_WEIGHT = 1.0  # weight of the dense loss in phase 2
EXTRA_FIRST = 10_000_000  # phase 2 adds as many card scenes, for the dense loss only, from here on
VISION_RATE = 0.6  # learning rate of the warmed-up vision parts in phase 2, as a share


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Scale the last dimension to a root mean square of 1."""
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class DenseHeads(nn.Module):
    """Dense losses on projected visual tokens; word groups are scored by the word embeddings."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({g: nn.Parameter(torch.tensor(1.0)) for g in GROUPS})
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
        for group, names in GROUPS.items():
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
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    log: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def make_batch(step: int, first: int, size: int, full_share: float, kind: str | None = None) -> Batch:
    """The batch of ``step``: scenes ``first``... at one random resolution."""
    rng = np.random.default_rng([7, step])
    side = SIZE if rng.random() < full_share else int(rng.choice(SMALL_SIDES))
    return pack([sample("train", first + i, kind) for i in range(size)], rng, side)


def embed(model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """Input embeddings (B, L, D) with the image features after the first token."""
    words = model.get_input_embeddings()(batch.input_ids)
    n = features.shape[1]
    return torch.cat([words[:, :1], features.to(words.dtype), words[:, 1 + n :]], 1)


def read(
    model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the language model: logits (N, V) at the N targets, early hidden states (Q, D).

    The hidden states are those after ``GROUND_LAYER`` layers where the Q answers start.
    """
    llama = model.model.language_model
    hidden = embed(model, batch, features)
    rotary = llama.rotary_emb(hidden, position_ids=batch.position_ids)
    at = batch.targets >= 0
    for number, layer in enumerate(llama.layers):
        if number == GROUND_LAYER:
            early = hidden[at][::2]
        hidden = layer(hidden, attention_mask=batch.mask, position_embeddings=rotary)
    return model.lm_head(llama.norm(hidden[at])), early


def optimizers(
    model: nn.Module, heads: DenseHeads, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for embeddings, convolution, norms, biases."""
    matrices: dict[bool, list[nn.Parameter]] = {True: [], False: []}  # key: is it vision?
    dense = [p for p in heads.parameters() if p is not heads.ground.weight]
    others: dict[bool, list[nn.Parameter]] = {True: dense, False: []}
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and (".layers." in name or "projector" in name)
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
def dev_accuracy(model: LlavaForConditionalGeneration, scenes: int, size: int) -> dict[str, float]:
    """Teacher-forced accuracy of the answer word per task on single-turn dev questions."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, scenes, size):
        listed = [sample("dev", first + i) for i in range(size)]
        batch = pack(listed, np.random.default_rng(0), turns=(1.0,))
        with torch.compiler.set_stance("force_eager"):
            logits, _ = read(model, batch, image_features(model, batch.pixels))
        right = logits.argmax(-1) == batch.targets[batch.targets >= 0]
        rows = torch.nonzero(batch.targets >= 0)[::2, 0].tolist()
        rests = [iter(scene.questions) for scene in listed]
        for row, hit in zip(rows, right[::2].tolist(), strict=True):
            hits[next(rests[row]).task].append(hit)
    return {task: float(np.mean(hits[task])) for task in sorted(hits)}


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


def train(args: argparse.Namespace) -> None:
    """Run both phases until ``--minutes`` of training are spent, counting earlier runs."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build_model()
    heads = DenseHeads(model.config.text_config.hidden_size)
    opts = optimizers(model, heads, args.muon_lr, args.adam_lr)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    path = Path(args.run) / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = load(path, model, heads, opts) if path.exists() else State()
    parameters = [*model.parameters(), *heads.parameters()]
    last_save = last_dev = state.seconds
    since_start = 0  # phase 2 ramps its learning rate up again after every start
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    while state.seconds < 60 * args.minutes and not stopped:
        began, cpu = time.monotonic(), time.process_time()
        warm = state.seconds < 60 * args.warmup_minutes
        if warm:
            size, done = args.warmup_batch, state.seconds / (60 * args.warmup_minutes)
            decay = 1 - 0.8 * done
            ramp = min(1.0, (state.step + 1) / 100)
        else:
            past = 60 * args.warmup_minutes
            size, done = args.batch, (state.seconds - past) / (60 * args.minutes - past)
            decay = min(1.0, 1.5 * (1 - done))
            since_start += 1
            ramp = min(1.0, since_start / 50)
        for optimizer in opts:
            for group in optimizer.param_groups:
                share = VISION_RATE if group["vision"] and not warm else 1.0
                group["lr"] = group["peak"] * decay * ramp * share
        share = WARM_FULL_SHARE if warm else float(np.clip(1.5 * done - 0.4, *FULL_SHARE))
        batch = make_batch(state.step, state.images, size, share)
        features = image_features(model, batch.pixels)
        loss, accuracy = heads(features, model.get_input_embeddings().weight, batch)
        state.log["dense"].append(loss.item())
        for name, value in accuracy.items():
            state.log[name].append(value)
        if not warm:
            logits, early = read(model, batch, features)
            extra = make_batch(state.step, EXTRA_FIRST + state.images, size, share, "cards")
            seen = image_features(model, extra.pixels)
            digits, read_off = heads(seen, model.get_input_embeddings().weight, extra)
            state.log["digit"].append(read_off["number"])
            keep = batch.targets >= 0
            target, weight = batch.targets[keep], batch.weights[keep]
            each = functional.cross_entropy(logits, target, reduction="none")
            answer = (each * weight).sum() / weight.sum()
            ground = heads.grounding(early, features, batch)
            loss = DENSE_WEIGHT * (loss + digits) + GROUND_WEIGHT * ground + answer
            state.log["ground"].append(ground.item())
            state.log["answer"].append(answer.item())
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.log["norm"].append(norm.item())
        state.step += 1
        state.images += size
        state.seconds += time.monotonic() - began
        state.cpu_seconds += time.process_time() - cpu
        if state.step % 50 == 0:
            means = " ".join(f"{k} {np.mean(v):.3f}" for k, v in state.log.items())
            minutes = state.seconds / 60
            print(f"{minutes:.1f} min step {state.step} images {state.images} {means}", flush=True)
            state.log.clear()
        if not warm and state.seconds - last_dev > 240:
            last_dev = state.seconds
            scores = dev_accuracy(model, 160, 16)
            line = " ".join(f"{k} {100 * v:.0f}" for k, v in scores.items())
            macro = 100 * np.mean(list(scores.values()))
            print(f"  dev macro {macro:.1f} | {line}", flush=True)
        if state.seconds - last_save > 120:
            last_save = state.seconds
            save(path, model, heads, opts, state)
    save(path, model, heads, opts, state)
    print("stopped" if stopped else "done", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/tinyvlm", help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=97, help="training time in all")
    parser.add_argument("--warmup-minutes", type=float, default=28, help="time of phase 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup-batch", type=int, default=32)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
