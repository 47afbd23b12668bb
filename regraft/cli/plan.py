"""`regraft plan`: what a change and its training would be, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from .verb import Outcome, Verb, build_growth, check_unused_flags, name_method, remix_changes

if TYPE_CHECKING:
    from rich.console import Console


FORECAST = (
    "stage",
    "gpus",
    "gpu",
    "memory",
    "precision",
    "checkpointing",
    "batch",
    "tokens",
    "share",
    "price",
)


def plan(
    source: str,
    mixer: str | None = None,
    method: str | None = None,
    keep: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    options: dict[str, Any] | None = None,
    inherit: str | None = None,
    for_: str | None = None,
    context: int = 16384,
    length: int = 1024,
    hidden: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: int | None = None,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    tower: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    vocab: int | None = None,
    add_tokens: str | None = None,
    to: str | None = None,
    width_init: str = "pad",
    depth_init: str = "identity",
    fold: Literal["auto", "stream", "eps"] = "auto",
    noise: float | None = None,
    dtype: str | None = None,
    bridge: bool = False,
    untie: bool = False,
    vocab_init: Literal["pieces", "mean", "zero"] = "pieces",
    expert_noise: float = 0.0,
    expert_reinit: float = 0.0,
    adopt: str | None = None,
    train: bool = False,
    stage: Literal["align", "distil", "next"] = "distil",
    gpus: int = 1,
    gpu: str = "h100",
    memory: str | None = None,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    checkpointing: bool = False,
    batch: int | None = None,
    tokens: str | None = None,
    share: float = 0.35,
    price: float | None = None,
    scan: bool = False,
    trust_remote_code: bool = False,
    json: bool = False,
) -> Outcome:
    """Show the weight map, totals and memory of a change; reads no weights unless --scan says so.

    Args:
        source: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        mixer: linearize with this mixer; without it the model as it is (for regraft's own output:
            what was done)
        method: linearize as this method does, such as auto; the flags below change what it says
        keep: layers that keep softmax attention: every:N, a list such as 0,7,14, all or none
        window: width of the gated window branch, 0 for none
        sinks: first tokens that the window always sees
        options: the mixer's own options as JSON, such as {"grouped": false}
        inherit: projections of the source's attention that mixers copy: all, none, or a list such
            as v,o
        for_: linearize for this target of `regraft export`, such as granite_swa, and say whether it
            can hold the result; exit 1 where it cannot
        context: tokens for which state sizes are given
        length: tokens of a row for which FLOPs are given
        hidden: width of the residual stream
        ffn: neurons of every MLP
        heads: query heads
        kv_heads: key/value heads
        head_dim: width of a head
        layers: number of layers; of an encoder and a decoder that are equally deep, of both
        encoder_layers: number of layers of the encoder in front of a decoder
        decoder_layers: number of layers of the decoder behind an encoder
        tower: text or vision, of a model with a tower for each (CLIP, SigLIP): which one grows;
            without it both, where they are equally large
        experts: experts in place of the MLP, in the stock class that has them; of a model with
            experts a multiple of their number
        top_k: experts that a token goes to (default: 2; of a model with experts as many times more)
        vocab: rows of the vocabulary, for padding that kernels want
        add_tokens: tokens that tokenizer and embeddings get: a file with one a line, or a .json
            list
        to: a directory whose config.json says what to grow to: all sizes, and the other settings
            where that keeps the function; what would change it is refused by name
        width_init: width operator, or one each (hidden=tile,ffn=pad): pad, zero_in, pair, split,
            tile, duplicate, aki, lemon; copy starts all that is new at random; auto takes what
            trained best in our comparisons; ligo learns width and depth from --data
        depth_init: identity, llama_pro, stack, gstack, interpolate, midas, upscale or mslt
        fold: how norms keep their mean square over a padded stream
        noise: spread of the noise that separates copies, relative to a tensor's own; 0 for none
        dtype: store in float32, bfloat16, float16 or float64 (default: as the source)
        stage: for --train: align or distil, with the source as teacher, or next
        gpus: how many, over which FSDP2 shards the training
        gpu: which, for its speed and memory as its datasheet has them, such as h100, a100 or mi300x
        memory: of each, such as 80GB (default: what the GPU has)
        precision: float32 or bfloat16 (autocast)
        batch: rows a step over all GPUs (default: what fits at once)
        tokens: to train on, such as 1B: says days
        share: of the GPU's peak that training is assumed to reach
        price: of one GPU for an hour: says the cost
        bridge: write the model as another class where its own cannot hold the sizes
        untie: give the model an output embedding of its own, a copy of the input embedding
        vocab_init: what new rows of the vocabulary hold: the mean of the rows of the pieces that a
            token replaces (padding: of all rows), the mean of all, or zero
        expert_noise: spread of noise on experts, relative to a tensor's own, which is not exact
        expert_reinit: share of every expert's neurons that are drawn anew (Drop-Upcycling), which
            is not exact
        adopt: keys of --to, such as rope_theta,rms_norm_eps, or all, that are taken although the
            function changes
        train: also forecast its training on the GPUs that --gpus and --gpu name: memory, tokens/s,
            days, cost
        checkpointing: recompute activations in the backward pass instead of keeping them
        scan: read all weights of the source and report NaN and infinity, which writing refuses
        trust_remote_code: run the Python files beside the model, if its classes are there
        json: print one JSON object on standard output and nothing else
    """
    import dataclasses

    from ..core.checkpoint import Checkpoint
    from ..core.custom_code import run_custom_code
    from ..linearize import methods
    from ..mixers.remix import Remix
    from ..plan import forecast
    from ..plan import plan as planning

    given = locals()
    if not (mixer or method or for_):
        names = ("keep", "window", "sinks", "options", "inherit")
        check_unused_flags(plan, given, names, "give --mixer, --method or --for as well")
    if not train:
        check_unused_flags(plan, given, FORECAST, "give --train as well")

    # Growth first, then linearization: both may be planned at once.
    run_custom_code(source, trust_remote_code)
    before = Checkpoint.open(source, allow_nonfinite=scan)
    growth = build_growth(given)
    after, notes = growth(before) if growth.has_requests else before, list[str]()
    if mixer or method or for_:
        changes = remix_changes(given)
        recipe = methods.find_method(name_method(method, for_)).with_remix(**changes)
        recipe, notes = recipe.without_text()
        after = Remix.from_options(recipe.remix)(after)
    result = planning.Plan.of(before, after, context, length, notes)
    served = find_served(after.config, for_) if for_ else None
    code, facts = 0, dict[str, Any]()
    if served:
        code, facts = int(bool(served["misfits"])), {"for": served}
    if scan:
        result = dataclasses.replace(result, nonfinite=planning.scan_values(before))
    if not train:
        return Outcome(
            result.to_dict() | facts, lambda console: print_result(result, console, served), code
        )

    request = forecast.TrainingForecastRequest(
        gpus, memory, tokens, length, batch, checkpointing, precision, gpu, price, stage, share
    )
    costs = forecast.forecast(before, after, request)

    def show(console: Console) -> None:
        print_result(result, console, served)
        forecast.print_forecast(costs, console)

    return Outcome(result.to_dict() | facts | {"train": costs}, show, code)


def find_served(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Whether a target holds a model of this config, and what of it it does not."""
    from ..export.target import find_target

    target = find_target(name)
    return {"target": name, "loads": target.loads, "misfits": target.find_misfits(config)}


def print_result(result: Any, console: Console, served: Mapping[str, Any] | None) -> None:
    """A Plan, whether a target holds it, and whether values were looked at."""
    # No annotation: jsonargparse imports what this module imports for type checking.
    from ..plan.plan import print_plan

    print_plan(result, console)
    if served:
        found = served["misfits"]
        line = f"cannot hold it: {'; '.join(found)}" if found else f"holds it: {served['loads']}"
        console.print(f"{served['target']} {line}", soft_wrap=True, highlight=False)
    if result.nonfinite is None:
        line = "No values were read: --scan looks for NaN and infinity"
        console.print(line, soft_wrap=True, highlight=False)


VERB = Verb(
    plan,
    examples=(
        "regraft plan SOURCE --mixer gated_deltanet",
        (
            "regraft plan SOURCE --mixer gated_deltanet --train --gpus 64 --tokens 1B --length 4096"
            " --price 2.5"
        ),
    ),
    sections={
        "linearize": (
            "mixer",
            "method",
            "keep",
            "window",
            "sinks",
            "options",
            "inherit",
            "for_",
        ),
        "grow": (
            "hidden",
            "ffn",
            "heads",
            "kv_heads",
            "head_dim",
            "layers",
            "encoder_layers",
            "decoder_layers",
            "tower",
            "experts",
            "top_k",
            "vocab",
            "add_tokens",
            "to",
            "width_init",
            "depth_init",
            "fold",
            "noise",
            "bridge",
            "untie",
            "vocab_init",
            "expert_noise",
            "expert_reinit",
            "adopt",
            "dtype",
        ),
        "FLOPs and state": (
            "context",
            "length",
            "scan",
        ),
        "training forecast": (
            "train",
            "stage",
            "tokens",
            "batch",
            "gpus",
            "gpu",
            "memory",
            "precision",
            "checkpointing",
            "share",
            "price",
        ),
        "output": ("trust_remote_code", "json"),
    },
)
