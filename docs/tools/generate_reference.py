"""The pages of the site that no file holds: the reference, the tree of the package, its figures, the changes.

A hook of mkdocs, named in mkdocs.yml: the pages are made while the site is built and are in no commit, so that they
cannot be out of date, and no test has to compare them. `generate_pages()` gives the same pages to a test.

Run it alone to read one page: python docs/tools/generate_reference.py reference/cli.md
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import docstring_parser

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
for folder in (TOOLS, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import code_figures  # noqa: E402
import package_tree  # noqa: E402
from family_table import family_rows, list_stock_families, refusals  # noqa: E402
from target_table import target_refusals, target_rows  # noqa: E402

import regraft  # noqa: E402
from regraft.cli.main import main as command_line  # noqa: E402
from regraft.cli.parser import VERBS  # noqa: E402
from regraft.compare.recipe import Comparison  # noqa: E402
from regraft.export import find_target, list_targets  # noqa: E402
from regraft.linearize.method import find_method, list_methods  # noqa: E402
from regraft.mixers.registry import mixers  # noqa: E402
from regraft.recipes.schema import Recipe  # noqa: E402

HELP_WIDTH = 100  # characters of a line of --help
MODULES = {  # below the public names of the package: what one calls from Python, by folder
    "regraft.core": ("core.axes", "core.part", "core.anatomy", "core.checkpoint", "core.step"),
    "regraft.modeling": ("modeling.flops", "modeling.layer_kinds"),
    "regraft.evaluation": ("evaluation.perplexity", "evaluation.tasks", "evaluation.recall"),
    "regraft.train": ("train.stage",),
    "regraft.growth": ("growth.ligo_options", "growth.optimizer_state"),
    "regraft.linearize": ("linearize.method", "linearize.select_layers"),
}


def generate_pages() -> dict[str, str]:
    """Every generated page by its path below docs/."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {path: make() for path, make in PAGES.items()}


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: the pages join those of docs/."""
    from mkdocs.structure.files import File

    for path, text in generate_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


# Helpers for markdown.


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table; cells may hold anything but a line break."""
    lines = [list(head), *(list(row) for row in rows)]
    text = [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Examples?|Note):\s*$", re.M)


def prose(text: str | None) -> str:
    """A docstring as markdown: what it says before its sections.

    Underscores and stars outside code are escaped, so that formulas such as `k_t` stay as they are.
    """
    return escape(SECTION.split(inspect.cleandoc(text or ""))[0].strip())


def escape(text: str) -> str:
    """Markdown's signs outside backticks, escaped."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def format_type(kind: Any) -> str:
    """A type as a reader would write it."""
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(kind))
    if kind is type(None):
        return "null"
    parts = typing.get_args(kind)
    if parts and typing.get_origin(kind) not in (list, dict, tuple):
        return " or ".join(format_type(part) for part in parts)
    if parts and typing.get_origin(kind) is list:
        return f"list of {format_type(parts[0])}"
    if typing.get_origin(kind) in (dict, tuple) or kind is Any:
        return "mapping" if typing.get_origin(kind) is dict else "any"
    if dataclasses.is_dataclass(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    return f"`{getattr(kind, '__name__', str(kind))}`"


def format_default(field: dataclasses.Field[Any]) -> str:
    """A field's default, "required" without one."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its own"
    return f"`{value!r}`" if value not in (None, "") else ("null" if value is None else '`""`')


def fields_table(schema: Any) -> str:
    """The fields of a dataclass: type, default, meaning."""
    hints = typing.get_type_hints(schema)
    said = read_field_meanings(schema)
    rows = [
        [f"`{field.name}`", format_type(hints[field.name]), format_default(field)]
        + ([escape(said.get(field.name, ""))] if said else [])
        for field in dataclasses.fields(schema)
    ]
    return table(["key", "type", "default", *(["meaning"] if said else [])], rows)


def read_field_meanings(schema: Any) -> dict[str, str]:
    """What a dataclass says of its fields: under `Attributes:` of its docstring, or in comments above them."""
    said: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        lines = inspect.getsource(kind).splitlines()
        tree = ast.parse(textwrap.dedent("\n".join(lines))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if comment := read_comment_above(lines, node.lineno - 1):
                    said[node.target.id] = comment
        for one in docstring_parser.parse(vars(kind).get("__doc__") or "").params:
            said[one.arg_name] = " ".join((one.description or "").split())
    return said


def read_comment_above(lines: list[str], index: int) -> str:
    """The comment that ends on the line above `index`, on one line."""
    found: list[str] = []
    while index and lines[index - 1].strip().startswith("#"):
        index -= 1
        found.insert(0, lines[index].strip().lstrip("#").strip())
    return " ".join(found)


def first_line(text: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join((text or "").split("\n\n")[0].split())


# Pages.


def cli_page() -> str:
    """The command line: what `--help` prints, verb by verb."""
    rows = [
        [
            f"[`{name}`](#{name})",
            escape(verb.summary),
            "yes" if verb.resumes else "",
            "yes" if verb.distributed else "",
        ]
        for name, verb in VERBS.items()
    ]
    blocks = [
        "# Command line",
        "Made from the parser: this is what `regraft VERB --help` prints. Flags may be written with dashes or "
        "underscores. `--json` prints one JSON object on standard output and nothing else. Exit codes: 0 done, 1 a "
        "check does not hold, 2 wrong use or input (one line says what, the value and what to do), 70 a bug (its traceback "
        "is in a file that the line names), 128 + N ended by signal N: 130 Ctrl-C, 141 nobody reads the output.",
        table(
            ["verb", "what it does", "resumes when run again", "runs under torchrun"],
            rows,
        ),
        "Flags that take a number with a unit (`--tokens 1B` of plan, `--memory 80GB`) count K, M, G or B, and T in powers "
        "of 1,000. Context lengths (`--lengths 1k,4k`) take k for 1,024.",
    ]
    for name in VERBS:
        blocks += [f"## {name}", f"```text\n{read_help(name)}\n```"]
    return "\n\n".join(blocks) + "\n"


def read_help(verb: str) -> str:
    """What `regraft VERB --help` prints."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(HELP_WIDTH)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            command_line([verb, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return printed.getvalue().rstrip()


def python_page() -> str:
    """The public names of the package by mkdocstrings, and the modules below them."""
    blocks = [
        "# Python",
        "`import regraft` has the names of the first section; they load when first used. `import regraft.modeling` makes "
        "`AutoModelForCausalLM.from_pretrained` load linearized models (without regraft: `trust_remote_code=True`). "
        "The modules below the public names may change between versions.",
        "## regraft",
        "::: regraft.open",
    ]
    for name in regraft.__all__:
        value = getattr(regraft, name)
        if inspect.ismodule(value):
            blocks.append(f"::: {value.__name__}")
        else:
            blocks.append(f"::: {value.__module__}.{value.__qualname__}")
    for folder, modules in MODULES.items():
        blocks.append(f"## {folder}")
        blocks += [f"::: regraft.{module}" + SHOW_MODULE for module in modules]
    return "\n\n".join(blocks) + "\n"


SHOW_MODULE = "\n    options:\n      show_root_full_path: true\n      heading_level: 3"


def families_page() -> str:
    """Families, and what each can do, found out by asking the steps."""
    head, rows = family_rows()
    blocks = [
        "# Families",
        "Each family is a table in `regraft/families/`: the name, the signature and the place of every parameter. What "
        "a family can do follows from its table; this page asks the steps for it, on a tiny model of each "
        "(`docs/tools/family_table.py`). Layers can be added in every family.",
        table(head, rows),
        "- *any*: any larger size. *multiples*: of the number or size that is named. *with hidden*: only together with "
        "`--hidden`. *may follow*: the step moves another size as well, where the class ties it to the first.\n"
        "- *trains*: objectives of `regraft train --stage` beside `align` and `matrix`, which linearized models have.\n"
        "- *as another class*: the family that `--bridge` (`regraft.Bridge`) writes the model as, when its own class "
        "cannot hold the sizes.\n"
        "- Linearized models (`model_type: regraft`) grow like their host, and train with the objectives of decoders.",
        "## What each is",
        "\n".join(f"- {escape(describe_family(name))}" for name in list_stock_families()),
        "## What is refused",
        "A refusal says the value and the nearest that works. For the tiny models here:",
        "\n".join(f"- {escape(line)}" for line in refusals()),
    ]
    return "\n\n".join(blocks) + "\n"


def describe_family(name: str) -> str:
    """A family's name and the docstring of its table, on one line."""
    module = importlib.import_module(f"regraft.families.{name.replace('-', '_')}")
    return f"`{name}`: {first_line(module.__doc__)}"


def mixers_page() -> str:
    """Mixers by name: docstring and options."""
    known = dict(sorted(mixers().items()))
    blocks = [
        "# Mixers",
        "What `--mixer` takes, and the `mixer` of `regraft.Remix`. Options are given as JSON "
        '(`--mixer gla --options \'{"gate": "none"}\'`). With `--window` above 0 a linear mixer stands beside a '
        "branch of windowed softmax attention; both are joined by `gated`, which is not named by itself. On a GPU the "
        "recurrences run in flash-linear-attention's kernels where the extra `fast` is installed, elsewhere in plain "
        "PyTorch.",
        table(
            ["mixer", "is"],
            [
                [f"[`{n}`](#{n})", escape(first_line(sys.modules[m.__module__].__doc__))]
                for n, m in known.items()
            ],
        ),
    ]
    for name, mixer in known.items():
        options = mixer.Options
        blocks += [
            f"## {name}",
            prose(inspect.getdoc(mixer)),
            f"`{mixer.__module__}.{mixer.__name__}`",
        ]
        own = [prose(inspect.getdoc(one)) for one in options.__mro__ if documented_here(one)]
        blocks += (
            ["Options:", *own[:1], fields_table(options)] if dataclasses.fields(options) else []
        )
    return "\n\n".join(blocks) + "\n"


def targets_page() -> str:
    """Targets of `regraft export`, and what each holds, found out by asking them."""
    head, rows = target_rows()
    blocks = [
        "# Targets",
        "What `regraft export --to` takes, and `--for` of `linearize` and `plan`. This page asks each target about "
        "tiny models (`docs/tools/target_table.py`): a mixer in every layer of a Llama, then a stock model of every "
        "family.",
        *(
            f"- `{name}`: {escape(first_line(importlib.import_module(f'regraft.export.targets.{name}').__doc__))} "
            f"Opened by {find_target(name).loads}."
            for name in list_targets()
        ),
        table(head, rows),
        "## What is refused",
        "\n".join(f"- {escape(line)}" for line in target_refusals()),
    ]
    return "\n\n".join(blocks) + "\n"


def documented_here(kind: Any) -> bool:
    """Whether a dataclass has a docstring of its own, not one that Python made."""
    text = vars(kind).get("__doc__") or ""
    return (
        dataclasses.is_dataclass(kind) and bool(text) and not text.startswith(f"{kind.__name__}(")
    )


def methods_page() -> str:
    """Methods by name: docstring, remix and stages."""
    blocks = [
        "# Methods",
        "What `--method` takes: mixer, kept layers, closed-form start and stages of training. Other flags change what "
        "the method says. Each file `regraft/linearize/methods/NAME.py` states what differs from its paper and what is "
        "known of patents and licences.",
    ]
    overview, details = [], []
    for name in list_methods():
        method = find_method(name)
        module = sys.modules[f"regraft.linearize.methods.{name}"]
        stages = ", ".join(leg.kind for leg in method.legs)
        keep = f"`{method.remix.keep}`" + (
            f", without text `{method.unmeasured}`" if method.unmeasured else ""
        )
        mixer = f"[`{method.remix.mixer}`](mixers.md#{method.remix.mixer})"
        overview.append(
            [f"[`{name}`](#{name})", mixer, keep, str(method.remix.window or "none"), stages]
        )
        details += [f"## {name}", prose(module.__doc__), f"```yaml\n{describe_method(method)}\n```"]
    blocks.append(table(["method", "mixer", "kept layers", "window beside", "stages"], overview))
    return "\n\n".join([*blocks, *details]) + "\n"


def describe_method(method: Any) -> str:
    """A method in the words of a recipe, with shares for tokens."""
    import yaml

    plain = type(method.remix)()
    remix = {
        key: value
        for key, value in dataclasses.asdict(method.remix).items()
        if key in ("mixer", "keep", "window") or value != getattr(plain, key)
    }
    stages = [
        {"kind": leg.kind, "share": round(leg.share, 3)}
        | ({"rows_longer_by": leg.longer} if leg.longer != 1 else {})
        | dict(leg.fields)
        for leg in method.legs
    ]
    content = {"remix": remix, "calibration": method.calibration, "stages": stages}
    return yaml.safe_dump(content, sort_keys=False, width=100).rstrip()


def recipes_page() -> str:
    """The schemas of recipes: dataclass by dataclass."""
    seen: set[Any] = set()
    blocks = [
        "# Recipes",
        "Keys of the YAML files that `regraft run` and `regraft compare` read. Unknown keys are errors. Any key can be "
        "overridden on the command line (`--stages.1.tokens 500000`). How to write one: "
        "[Recipes](../guides/recipes.md), [Comparing](../guides/comparing.md).",
    ]
    for title, root in (("regraft run", Recipe), ("regraft compare", Comparison)):
        blocks.append(f"## {title}")
        for schema in reachable(root, seen):
            blocks += [
                f"### {schema.__name__}",
                prose(inspect.getdoc(schema)),
                fields_table(schema),
            ]
    return "\n\n".join(blocks) + "\n"


def reachable(schema: Any, seen: set[Any]) -> Iterator[Any]:
    """A dataclass and all that its fields hold, each once."""
    if schema in seen:
        return
    seen.add(schema)
    yield schema
    for hint in typing.get_type_hints(schema).values():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from reachable(part, seen)


def changelog_page() -> str:
    """CHANGELOG.md of the repository; links into docs/ go to the pages."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/python.md": python_page,
    "reference/families.md": families_page,
    "reference/mixers.md": mixers_page,
    "reference/targets.md": targets_page,
    "reference/methods.md": methods_page,
    "reference/recipes.md": recipes_page,
    "contributing/tree.md": package_tree.tree_page,
    "contributing/figures.md": code_figures.figures_page,
    "changelog.md": changelog_page,
}


def read_pages(names: Iterable[str]) -> Mapping[str, str]:
    """Some of the pages."""
    return {name: PAGES[name]() for name in names}


if __name__ == "__main__":
    for page in read_pages(sys.argv[1:] or ["reference/cli.md"]).values():
        print(page)
