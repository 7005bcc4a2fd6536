"""What happened to each graph: recognised, rewritten, refused and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from luvc_fx.report.insertions import Insertion
from luvc_fx.report.reasons import Refusal


@dataclass(slots=True)
class GraphReport:
    """One captured graph.

    Attributes:
        kind: "whole" (vision, fusion and decoder), "vision", "prefill" (with the fusion), "decode" (one
            query, or more over a shortened cache), "text" (attention, but no image) or "other".
        compile_id: Dynamo's numbers of the function and of its compilation, ``"3/1"``.
        recompile_reason: why this function was compiled again, in Dynamo's words (what its newest
            compilation did not allow); empty the first time.
        encoder_blocks, decoder_layers: how many of each were recognised.
        images: images in the batch, where the graph holds their encoder; `batch`: rows of the prompt.
        lead: rows in front of the grid inside the encoder (CLS).
        grid: height and width of the visual token grid that leaves the encoder, before any merge.
        inserted: what was merged and pruned, in the order of the sites.
        tokens_per_layer: visual tokens of one row that enter each decoder layer.
        fused: visual tokens of one row at the fusion; before merging, `original`.
        flops_before, flops_after: see `luvc_fx.anatomy.costs.flops`.
        kv_bytes_before, kv_bytes_after: of each decoder layer, see `luvc_fx.anatomy.costs.kv_bytes`.
        refusals: what was not done, and why.
        notes: what a reader should know although nothing was refused.
        milliseconds: time in recognition, each pass and the counting of costs.
        compile_seconds: seconds that the inner compiler took, None before it has finished; `cached`: whether
            it took the graph from its caches on disk.
    """

    kind: str = "other"
    compile_id: str = ""
    recompile_reason: str = ""
    nodes_before: int = 0
    nodes_after: int = 0
    encoder_blocks: int = 0
    decoder_layers: int = 0
    batch: int | None = None
    images: int | None = None
    lead: int | None = None
    grid: tuple[int, int] | None = None
    merged_grid: tuple[int, int] | None = None
    inserted: list[Insertion] = field(default_factory=list)
    original: int | None = None
    fused: int | None = None
    tokens_per_layer: list[int] = field(default_factory=list)
    masks_rebuilt: int = 0
    flops_before: int = 0
    flops_after: int = 0
    kv_bytes_before: list[int] = field(default_factory=list)
    kv_bytes_after: list[int] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: float | None = None
    cached: bool = False

    @property
    def rewritten(self) -> bool:
        """Whether this graph differs from what the inner compiler would have got without us."""
        return bool(self.inserted) or self.masks_rebuilt > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: ``"inserted"`` as lines of text, ``"insertions"`` as data."""
        data = asdict(self)
        return {
            **data,
            "inserted": [str(insertion) for insertion in self.inserted],
            "insertions": data["inserted"],
            "rewritten": self.rewritten,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.kind} graph, {self.nodes_before} -> {self.nodes_after} nodes: "
            f"{self.encoder_blocks} encoder blocks, {self.decoder_layers} decoder layers"
            + (f", grid {self.grid[0]} x {self.grid[1]}" if self.grid else "")
        ]
        lines += [f"  {insertion}" for insertion in self.inserted]
        if self.masks_rebuilt:
            lines.append(f"  masks rebuilt in {self.masks_rebuilt} layers")
        if self.tokens_per_layer:
            lines.append(f"  visual tokens entering each layer: {self.tokens_per_layer}")
        if self.flops_before:
            lines.append(f"  {_change(self.flops_before, self.flops_after, 1e6, 'MFLOPs')}")
        if self.kv_bytes_before:
            before, after = sum(self.kv_bytes_before), sum(self.kv_bytes_after)
            lines.append(f"  {_change(before, after, 1024, 'KiB')} of keys and values")
        lines += [f"  refused {refusal}" for refusal in self.refusals]
        lines += [f"  note: {note}" for note in self.notes]
        if self.recompile_reason:
            lines.append(f"  compiled again ({self.compile_id}) because of {self.recompile_reason}")
        total = sum(self.milliseconds.values())
        lines.append(f"  luvc_fx took {total:.0f} ms")
        if self.compile_seconds is not None:
            lines[-1] += f", the compiler behind it {self.compile_seconds:.1f} s"
            lines[-1] += ", from its caches" if self.cached else ""
        return "\n".join(lines)


def _change(before: int, after: int, unit: float, name: str) -> str:
    numbers = f"{before / unit:,.1f}" + (f" -> {after / unit:,.1f}" if after != before else "")
    return f"{numbers} {name}"


MOST_PROMPTS = 256
"""Different numbers of visual tokens that a report remembers."""


@dataclass(slots=True, eq=False)
class Report:
    """All graphs that went through one backend, in the order of their compilation.

    A report equals itself and no other.

    Attributes:
        refusals: those that belong to a call rather than to a graph (the front door's).
        notes: what a reader should know although nothing was refused.
        prompts: for graphs that serve all sizes, how many prompts there were of each: visual tokens of a row
            at the fusion and behind each prune, ``(64, 32, 16, 0)``. At most `MOST_PROMPTS` different ones.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prompts: dict[tuple[int, ...], int] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def saw(self, counts: tuple[int, ...]) -> None:
        """Count a prompt that a graph for all sizes ran."""
        if counts in self.prompts or len(self.prompts) < MOST_PROMPTS:
            self.prompts[counts] = self.prompts.get(counts, 0) + 1

    def refuse(self, refusal: Refusal) -> bool:
        """Add a refusal of the front door unless it is there already; returns whether it is new."""
        if refusal in self.refusals:
            return False
        self.refusals.append(refusal)
        return True

    def all_refusals(self) -> list[Refusal]:
        """Those of calls, and then those of each graph."""
        return [*self.refusals, *(refusal for graph in self.graphs for refusal in graph.refusals)]

    def of_kind(self, kind: str) -> list[GraphReport]:
        """The graphs of one kind."""
        return [graph for graph in self.graphs if graph.kind == kind]

    def tokens_per_layer(self) -> list[int]:
        """Visual tokens entering each decoder layer, in the newest graph that has a fusion."""
        for graph in reversed(self.graphs):
            if graph.tokens_per_layer:
                return graph.tokens_per_layer
        return []

    def budget(self, original: int) -> float:
        """Mean over decoder layers of the visual tokens entering the layer, over `original`."""
        tokens = self.tokens_per_layer()
        return sum(tokens) / (len(tokens) * original) if tokens else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `notes` and `prompts` where there are some."""
        data: dict[str, Any] = {
            "graphs": [graph.to_dict() for graph in self.graphs],
            "refusals": [asdict(refusal) for refusal in self.refusals],
        }
        if self.notes:
            data["notes"] = self.notes
        if self.prompts:
            pairs = self.prompts.items()
            data["prompts"] = [{"visual_tokens": [*counts], "prompts": number} for counts, number in pairs]
        return data

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [str(graph) for graph in self.graphs]
        lines += [f"refused {refusal}" for refusal in self.refusals]
        lines += [f"note: {note}" for note in self.notes]
        if self.prompts:
            lines.append("prompts through the prefill graph for all sizes, by their visual tokens:")
            lines += [f"  {' -> '.join(map(str, counts))}: {n}" for counts, n in self.prompts.items()]
        return "\n".join(lines) if lines else "nothing compiled yet"
