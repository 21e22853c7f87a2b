"""What the module says of itself: the manifest from the plan, the choices and the target."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import Any

from linattn.runtime.manifest import Manifest, Parameters
from linattn.runtime.manifest_target import Target as ManifestTarget

from ..graph.row_masks import has_row_masks
from ..lower.parameters import PARAMETER_SCOPE
from ..model import LoadedModel
from ..options import CompileOptions
from ..targets import CompileTarget
from .entry_points import ModulePlan
from .report import CompileReport


def describe_module(
    model: LoadedModel, plan: ModulePlan, report: CompileReport, target: CompileTarget, options: CompileOptions
) -> Manifest:
    """The manifest of a module.

    Args:
        model: The model.
        plan: Its entry points, inputs, outputs and states.
        report: What was chosen for its nodes.
        target: What it is compiled for.
        options: What the user asked for.
    """
    versions = {name: metadata.version(name) for name in ("linattn", "onnx")}
    versions["iree"] = metadata.version("iree-base-compiler")
    nodes: tuple[Any, ...] = tuple(dataclasses.asdict(row) for row in report.nodes)
    return Manifest(
        model_name=model.name,
        model_sha256=model.sha256,
        target=ManifestTarget(
            target.name,
            target.device,
            target.description,
            target.subgroup_size,
            target.architecture,
            target.instruction_sets,
            target.levels,
            target.native.names if target.native is not None else (),
        ),
        batch=plan.batch,
        max_context=plan.max_context,
        context_limit=plan.context_limit,
        inputs=plan.inputs,
        outputs=plan.outputs,
        states=plan.states,
        entry_points=plan.entry_points,
        dims=plan.roles.roles,
        nodes=nodes,
        parameters=Parameters(PARAMETER_SCOPE, options.parameters.name) if options.parameters else None,
        row_masks=has_row_masks(model.proto.graph, plan.pairs),
        producer=versions,
    )
