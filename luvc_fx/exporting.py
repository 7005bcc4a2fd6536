"""`luvc_fx.export`: a whole forward as an exported program of torch, with the schedule written into it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from luvc_fx import _compat
from luvc_fx.dynamo.backend import backend, prepare
from luvc_fx.generate.families import STEERING
from luvc_fx.generate.frontdoor import is_compiled
from luvc_fx.generate.model_check import check_schedule, check_supported
from luvc_fx.graph import markers
from luvc_fx.graph.emit import emit
from luvc_fx.graph.nodes import output_node, value
from luvc_fx.methods.checks import check_bool, check_module, refuse
from luvc_fx.report import Report
from luvc_fx.report.errors import brief
from luvc_fx.schedule import Schedule

TEXT = ("input_ids", "attention_mask", "position_ids")
"""Inputs whose last axis is the prompt's."""


def export(
    model: Any,
    inputs: Mapping[str, Tensor],
    schedule: Schedule | str = "image",
    dynamic: bool = True,
) -> torch.export.ExportedProgram:
    """One forward of a model, from pixels to logits, exported with the visual tokens merged and pruned.

    The program is stock torch: it can be saved by `torch.export.save`, or compiled into a package by
    ``torch._inductor.aoti_compile_and_package(program, package_path="vlm.pt2")``, and neither luvc_fx
    nor transformers is needed where it runs. It takes `inputs` by their names and returns a dict:
    ``logits`` ``[batch, rows, vocabulary]`` of the surviving rows, ``row_index`` ``[batch, rows]`` with
    their numbers in the prompt, and ``keys`` and ``values``, lists with a tensor ``[batch, heads, rows,
    dim]`` for each decoder layer. Weights are shared with the model, not copied.

    Args:
        model: as of `luvc_fx.compile`, of a family whose forward is one graph (LLaVA-1.5, InternVL).
        inputs: what the processor makes of one prompt. Number and size of the images and rows of the
            batch are fixed by it.
        dynamic: let the length of the prompt differ, by more or less text; otherwise it is fixed too.

    Raises:
        ValueError: a schedule that the model cannot follow, inputs that are not tensors, a forward that
            is not one graph, or anything that was refused; the text says what.

    >>> program = luvc_fx.export(model, inputs, "image")  # doctest: +SKIP
    >>> torch._inductor.aoti_compile_and_package(program, package_path="vlm.pt2")  # doctest: +SKIP
    """
    schedule = Schedule.of(schedule)
    check_module(model)
    if not isinstance(inputs, Mapping):
        refuse("", "inputs", inputs, "a mapping of tensors by name")
    check_bool("", "dynamic", dynamic)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_supported(model)
    check_schedule(model, schedule)
    if is_compiled(model):
        raise ValueError("this model is compiled by luvc_fx; call luvc_fx.restore(model) before exporting it")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval()")
    for name, given in inputs.items():
        if not isinstance(given, Tensor):
            raise ValueError(f"input {name!r} is {type(given).__name__}; allowed: tensors")
    if "input_ids" not in inputs:
        raise ValueError("inputs have no input_ids")
    if steering := [name for name in inputs if name in STEERING]:
        raise ValueError(
            f"{', '.join(steering)} of {type(model).__name__} steers Python code, so its forward is not one "
            "graph and cannot be exported; luvc_fx.compile runs it"
        )
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    with torch.no_grad():
        module = _rewritten(prepare(model), copies, schedule, dynamic)
        read = {name: copies[name] for name in inspect.signature(module.forward).parameters}
        if unread := sorted(set(copies) - set(read)):
            raise ValueError(f"the forward does not read {', '.join(unread)}; leave it out of inputs")
        shapes = None
        if dynamic:
            length = torch.export.Dim.DYNAMIC
            shapes = {name: {x.dim() - 1: length} if name in TEXT else None for name, x in read.items()}
        return torch.export.export(module, (), read, dynamic_shapes=shapes)


def _rewritten(model: Any, inputs: dict[str, Tensor], schedule: Schedule, dynamic: bool) -> nn.Module:
    """The rewritten forward as a module that owns its weights and takes `inputs` by name."""

    def body(kwargs: dict[str, Tensor]) -> dict[str, Any]:
        out = model(**kwargs, use_cache=True)
        layers = _compat.cache_of(out).layers
        return {
            "logits": out.logits,
            "row_index": markers.PROMPT_ROWS(kwargs["input_ids"]),
            "keys": [layer.keys for layer in layers],
            "values": [layer.values for layer in layers],
        }

    captured: list[tuple[fx.GraphModule, list[Any], Any]] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            outputs = gm.forward(*args)
            captured.append((gm, example_inputs, outputs))
            return outputs

        return run

    ours = backend(schedule, keep, on_no_match="ignore", capture_scalars=False, recompile_limit=None)
    if dynamic:
        for name in TEXT:
            if name in inputs:
                torch._dynamo.mark_dynamic(inputs[name], inputs[name].dim() - 1)
    compiled = torch.compile(_compat.with_own_code(body), backend=ours, fullgraph=True, dynamic=False)
    try:
        with _compat.tracing_settings():
            wanted = compiled(inputs)
    except _compat.NOT_ONE_GRAPH as error:
        raise ValueError(f"the forward of {type(model).__name__} is not one graph: {brief(error)}") from error
    _check(ours.report, schedule)
    ((gm, example_inputs, outputs),) = captured
    _own_weights(gm, example_inputs, model, inputs)
    _write_out_markers(gm.graph)
    # The graph returns its results in an order of Dynamo's own; the tensors themselves say which is which.
    place = {id(tensor): number for number, tensor in enumerate(outputs)}
    nodes: Any = output_node(gm.graph).args[0]
    output_node(gm.graph).args = (_compat.tree_map(lambda tensor: nodes[place[id(tensor)]], wanted),)
    gm.graph.set_codegen(fx.graph.CodeGen())
    gm.graph.lint()
    return _plain_module(fx.GraphModule(gm, gm.graph))


def _check(report: Report, schedule: Schedule) -> None:
    if refusals := report.all_refusals():
        raise ValueError("the schedule cannot be followed: " + "; ".join(map(str, refusals)))
    wanted = schedule.prune or schedule.merge
    if wanted and not any(graph.inserted for graph in report.graphs):
        raise ValueError("nothing was rewritten: no image enters this forward")


def _own_weights(
    gm: fx.GraphModule, example_inputs: list[Any], model: nn.Module, inputs: dict[str, Tensor]
) -> None:
    """Weights and buffers, which Dynamo passes in, become the module's own, under the model's names."""
    graph = gm.graph
    given = {id(tensor): name for name, tensor in inputs.items()}
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    placeholders = graph.find_nodes(op="placeholder")
    sizes: dict[Any, tuple[fx.Node, int]] = {}
    for node, example in zip(placeholders, example_inputs, strict=True):
        if id(example) in given:
            node.target = given[id(example)]
            for axis, size in enumerate(value(node).shape):
                if isinstance(size, torch.SymInt):
                    sizes[size.node.expr] = node, axis
    for node, example in zip(placeholders, example_inputs, strict=True):
        if id(example) in given:
            continue
        with graph.inserting_after(placeholders[-1]):
            if isinstance(example, torch.SymInt):
                # A size that is an input of its own is read off the tensor that it belongs to.
                new = graph.call_function(torch.ops.aten.sym_size.int, sizes[example.node.expr])
            else:
                name = names.setdefault(id(example), f"constant_{len(names)}")
                _put(gm, name, example)
                new = graph.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    for node in placeholders:
        if node.target not in inputs:
            graph.erase_node(node)


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor)


def _plain_module(gm: fx.GraphModule) -> nn.Module:
    """The generated code on an ordinary module: of a graph module export makes dicts of FX's own kind."""
    module: nn.Module = type("Forward", (nn.Module,), {"forward": type(gm).forward})()
    for name, child in gm.named_children():
        module.add_module(name, child)
    for name, buffer in gm.named_buffers(recurse=False):
        module.register_buffer(name, buffer)
    return module


def _write_out_markers(graph: fx.Graph) -> None:
    """Our own operators become the operators of torch that they stand for."""
    for node in [node for node in graph.nodes if markers.is_ours(node)]:
        (new,) = emit(graph, "marker", lambda *args, call=node.target: call(*args), *node.args)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
