"""What a training run was asked for: for its marker, and for trackers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypedDict

from ..data.files import find_files
from ..data.text import Text
from ..io.identity import identify_file, identify_files, identify_model
from .stage import Stage


class RunFacts(TypedDict):
    """What trackers store as a run's configuration."""

    model: str  # path of the model that is trained
    data: str  # path of its data
    teacher: str | None  # path of the teacher
    seed: int
    stages: list[dict[str, Any]]  # the fields of each `Stage`


def describe_run(model: str, data: Text, teacher: str | None, seed: int, stage: Stage) -> RunFacts:
    """The facts of a run of one stage."""
    return {
        "model": model,
        "data": data.path,
        "teacher": teacher,
        "seed": seed,
        "stages": [dataclasses.asdict(stage)],
    }


def describe_request(
    model: str,
    data: Text,
    teacher: str | None,
    seed: int,
    stage: Stage,
    heldout: str | None = None,
    moments: Path | None = None,
    calibration: int = 0,
    keep_moments: bool = False,
) -> dict[str, Any]:
    """Everything that decides what a run of one stage writes; inputs by their content."""
    inputs = {"model": identify_model(model)}
    if teacher:
        inputs["teacher"] = identify_model(teacher)
    if moments:
        inputs["moments"] = {"file": identify_file(moments)}
    for name, path in (("data", data.path), ("held-out data", heldout)):
        if path:
            files = [Path(path)] if stage.kind == "image" else find_files(path)
            inputs[name] = identify_files(files)

    return {
        # --skip-bad may be added after a bad line stopped the first attempt
        "data": dataclasses.asdict(dataclasses.replace(data, path="", skip_bad=False)),
        "seed": seed,
        "stage": dataclasses.asdict(stage),
        "calibration": calibration,
        "keep_moments": keep_moments,
        "inputs": inputs,
    }
