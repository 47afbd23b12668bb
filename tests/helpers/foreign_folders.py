"""Folders of other people's files; see `foreign.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from helpers.foreign import MODEL_FILES, Case

FOLDERS: dict[str, Callable[[Case], None]] = {}


def folder(make: Callable[[Case], None]) -> Callable[[Case], None]:
    """Enter a folder under its function's name."""
    FOLDERS[make.__name__.replace("_", " ")] = make
    return make


# Projects and downloads at the output.


@folder
def project(case: Case) -> None:
    case.write("config.json", "src/main.py", ".git/HEAD", ".git/objects/ab/cd", "package.json")
    (case.o / "config.json").write_text('{"name": "app", "version": "1.0"}')


@folder
def project_like_a_model(case: Case) -> None:
    case.write("model.safetensors", "tokenizer.json", "train.py", "README.md", "notes/day1.md")
    (case.o / "config.json").write_text('{"model_type": "llama", "architectures": ["X"]}')


@folder
def package_with_our_folders(case: Case) -> None:
    for name in ("run", "work", "stream", "text", "data", "tokenizer", "arms", "sources", "logs"):
        case.write(f"{name}/__init__.py", f"{name}/deep/er.txt")
    case.write("pyproject.toml", "run/lock", "run/state.json", "work/trained/weights.bin")


@folder
def only_run_and_work(case: Case) -> None:
    case.write("run/main.go", "work/notes.txt")


@folder
def only_stream(case: Case) -> None:
    case.write("stream/main.go", "stream/layer-0.safetensors")


@folder
def only_names_of_a_run(case: Case) -> None:
    case.write("metrics.jsonl")


@folder
def tensorboard_logs(case: Case) -> None:
    case.write(
        "metrics.jsonl", "tensorboard/events.out.tfevents.1", "wandb/run-1/logs", "run.text/a"
    )


@folder
def conversion_of_somebody(case: Case) -> None:
    case.write("asked.json", "work/mine.txt", "fitting/mine.txt", "start.json", "done.json")


@folder
def asked_json_alone(case: Case) -> None:
    (case.o).mkdir()
    (case.o / "asked.json").write_text('{"question": "why"}')


@folder
def journal_of_somebody(case: Case) -> None:
    case.write("time.json", "ledger.json", "report.html", "plan.json", "eval.json", "samples.json")
    (case.o / "time.json").write_text('{"seconds": 1.0, "phases": {}}')


@folder
def recipes_of_somebody(case: Case) -> None:
    case.write("pages/index.md")
    (case.o / "recipe.yaml").write_text("flour: 500g\n")
    (case.o / "recipe.json").write_text('{"flour": 500}')


@folder
def recipe_that_fits(case: Case) -> None:
    case.write("data/train.jsonl", "arms/pad/0/mine.txt", "logs/mine.txt", "work/mine.txt")
    case.write("compare.html", "compare.json", "run/mine.txt")


@folder
def download_of_the_hub(case: Case) -> None:
    cache = case.place / "models--a--b"
    case.write("blobs/1", "blobs/2", "refs/main", under=cache)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs/1").write_text('{"model_type": "llama"}')
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    case.out = str(snapshot)


@folder
def cache_of_the_hub(case: Case) -> None:
    download_of_the_hub(case)
    case.out = str(case.place / "models--a--b")


@folder
def download_that_is_not_finished(case: Case) -> None:
    case.write(
        "config.json",
        "model.safetensors.part",
        ".cache/huggingface/download/model.safetensors.incomplete",
        ".cache/huggingface/.gitignore",
    )
    (case.o / "config.json").write_text('{"model_type": "llama"}')


@folder
def stock_model(case: Case) -> None:
    shutil.copytree(case.root / "in" / "source", case.o)


@folder
def checkpoint_of_a_trainer(case: Case) -> None:
    case.write("trainer_state.json", "optimizer.pt", "checkpoint-500/config.json", "runs/a/events")
    (case.o / "config.json").write_text('{"model_type": "llama"}')


@folder
def home(case: Case) -> None:
    case.write(".bashrc", ".ssh/id_rsa", ".cache/x", ".config/y/z", "Documents/thesis.tex")
    case.write("config.json")
    (case.o / ".ssh/id_rsa").chmod(0o600)
    (case.o / ".ssh").chmod(0o700)
    case.cwd = case.o


@folder
def home_as_caches(case: Case) -> None:
    home(case)
    case.cwd = case.place
    case.cache = case.teacher_cache = case.scratch = str(case.o)
    case.out = str(case.place / "fresh")


# Names beside the output or inside it that a program might think its own.


@folder
def partial_folder(case: Case) -> None:
    case.write("thesis.tex", "model.safetensors", ".regraft.json", under=case.place / ".o.partial")


@folder
def partial_file(case: Case) -> None:
    case.write(".o.partial", ".o.regraft", ".o.old", ".o.fitting", ".o.tmp", under=case.place)


@folder
def hidden_siblings(case: Case) -> None:
    for name in (".o.regraft", ".o.old", ".o.fitting", ".o.work", ".o.tmp", ".o.lock", ".o"):
        case.write("mine.txt", "run/mine.txt", under=case.place / name)


@folder
def siblings(case: Case) -> None:
    case.write("o.part", "o.old", "o.tmp", "o.lock", "o.bak", "o~", under=case.place)
    case.write("mine.txt", under=case.place / "o.partial")


@folder
def hidden_sibling_with_a_marker(case: Case) -> None:
    for name in (".o.regraft", ".o.partial"):
        folder = case.place / name
        case.write("mine.txt", under=folder)
        marker = case.root / "in" / "grown" / ".regraft.json"
        text = marker.read_text() if marker.exists() else '{"fingerprint": "x", "files": {}}'
        (folder / ".regraft.json").write_text(text)


@folder
def sibling_link(case: Case) -> None:
    case.write("mine.txt", under=case.root / "elsewhere")
    for name in (".o.partial", ".o.regraft", ".o.fitting", ".o.old"):
        (case.place / name).symlink_to(case.root / "elsewhere")


@folder
def part_files(case: Case) -> None:
    case.model()
    case.write("model.safetensors.part", "config.json.123.part", "x.part")


@folder
def work_folder_of_somebody(case: Case) -> None:
    case.write(".regraft-work/mine.txt", ".regraft-work/run/mine.txt", "config.json")


@folder
def empty_but_for_a_work_folder(case: Case) -> None:
    case.write(".regraft-work/mine.txt")


@folder
def work_folder_in_a_model(case: Case) -> None:
    case.model()
    case.write(".regraft-work/mine.txt")


@folder
def garbage_marker(case: Case) -> None:
    case.write("config.json", "mine.txt", ".regraft.json")


@folder
def marker_of_another_program(case: Case) -> None:
    case.write("config.json", "mine.txt")
    (case.o / ".regraft.json").write_text('{"files": ["config.json", "mine.txt"], "version": 1}')


@folder
def marker_alone(case: Case) -> None:
    case.o.mkdir()
    (case.o / ".regraft.json").write_text('["not", "ours"]')


@folder
def marker_copied_into_a_project(case: Case) -> None:
    case.model(case.place / "model")
    case.write(*MODEL_FILES, "main.py")
    for name in (".regraft.json", "lineage.json"):
        file = case.place / "model" / name
        if file.exists():
            shutil.copy2(file, case.o / name)


@folder
def marker_copied_and_nothing_else(case: Case) -> None:
    case.model(case.place / "model")
    names = [file.name for file in (case.place / "model").iterdir() if file.is_file()]
    case.write(*[name for name in names if name != ".regraft.json"])
    file = case.place / "model" / ".regraft.json"
    if file.exists():
        shutil.copy2(file, case.o / ".regraft.json")


@folder
def empty_files(case: Case) -> None:
    case.o.mkdir()
    for name in MODEL_FILES:
        (case.o / name).touch()


# A model that regraft wrote, and something of the user's in it.


@folder
def finished_model(case: Case) -> None:
    case.model()


@folder
def model_with_notes(case: Case) -> None:
    case.model()
    case.write("notes.txt")


@folder
def model_with_a_hidden_file(case: Case) -> None:
    case.model()
    case.write(".gitattributes", ".git/HEAD")


@folder
def model_with_a_subfolder(case: Case) -> None:
    case.model()
    case.write("evals/mmlu/results.json")


@folder
def model_with_an_empty_folder(case: Case) -> None:
    case.model()
    (case.o / "plots").mkdir()


def changed(case: Case, name: str, change: Callable[[Path], object]) -> None:
    case.model()
    change(case.o / name)
    case.owned.discard(case.o / name)


@folder
def model_with_edited_weights(case: Case) -> None:
    def edit(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    changed(case, "model.safetensors", edit)


@folder
def model_with_edited_config(case: Case) -> None:
    changed(case, "config.json", lambda file: file.write_text(file.read_text() + "\n"))


@folder
def model_with_edited_card(case: Case) -> None:
    changed(case, "README.md", lambda file: file.write_text("# My model, with a long story"))


@folder
def model_with_weights_moved_in(case: Case) -> None:
    """Of the same size, and older than the model: as `mv` leaves them."""

    def replace(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[:-64] + bytes(64))
        os.utime(file, (1_500_000_000, 1_500_000_000))

    changed(case, "model.safetensors", replace)


@folder
def model_with_a_finetuned_file(case: Case) -> None:
    case.model()
    case.write("optimizer.safetensors", "adapter/adapter_model.safetensors")


@folder
def model_with_a_link_out(case: Case) -> None:
    case.model()
    case.write("thesis.tex", under=case.root / "elsewhere")
    (case.o / "texts").symlink_to(case.root / "elsewhere")
    (case.o / "thesis.tex").symlink_to(case.root / "elsewhere" / "thesis.tex")


@folder
def model_whose_file_is_a_link(case: Case) -> None:
    case.model()
    elsewhere = case.root / "elsewhere"
    elsewhere.mkdir()
    for name in ("README.md", "model.safetensors"):
        (case.o / name).rename(elsewhere / name)
        (case.o / name).symlink_to(elsewhere / name)
        case.owned.discard(case.o / name)


@folder
def model_with_hard_links(case: Case) -> None:
    case.model()
    backup = case.root / "backup"
    backup.mkdir()
    for file in case.o.iterdir():
        if file.is_file():
            os.link(file, backup / file.name)


@folder
def model_with_a_fifo(case: Case) -> None:
    case.model()
    os.mkfifo(case.o / "pipe")


@folder
def fifo(case: Case) -> None:
    case.o.mkdir()
    os.mkfifo(case.o / "config.json")


@folder
def fifo_as_output(case: Case) -> None:
    os.mkfifo(case.o)


@folder
def model_beside_user_files(case: Case) -> None:
    case.model()
    case.write("notes.txt", "o2/config.json", "Makefile", under=case.place)


# Links at the output.


@folder
def link_to_a_project(case: Case) -> None:
    case.write("config.json", "main.py", under=case.root / "elsewhere")
    case.o.symlink_to(case.root / "elsewhere")


@folder
def link_to_an_empty_folder(case: Case) -> None:
    (case.root / "elsewhere").mkdir()
    case.o.symlink_to(case.root / "elsewhere")


@folder
def link_to_a_model(case: Case) -> None:
    case.model(case.root / "elsewhere")
    case.o.symlink_to(case.root / "elsewhere")


@folder
def link_to_a_file(case: Case) -> None:
    case.write("thesis.tex", under=case.root)
    case.o.symlink_to(case.root / "thesis.tex")


@folder
def dangling_link(case: Case) -> None:
    case.o.symlink_to(case.root / "nowhere")


@folder
def link_loop(case: Case) -> None:
    case.o.symlink_to(case.place / "p")
    (case.place / "p").symlink_to(case.o)


@folder
def link_to_its_own_folder(case: Case) -> None:
    case.write("config.json", "main.py", under=case.place)
    case.o.symlink_to(".")


@folder
def file_as_output(case: Case) -> None:
    case.write("o", under=case.place)


@folder
def file_as_parent(case: Case) -> None:
    case.write("o", under=case.place)
    case.out = str(case.o / "model")


@folder
def folder_of_links_to_folders(case: Case) -> None:
    case.write("a/config.json", "b/main.py", under=case.root / "elsewhere")
    case.o.mkdir()
    for name in ("run", "work", "stream", "run.text", "data", "arms", ".regraft-work"):
        (case.o / name).symlink_to(case.root / "elsewhere")


# Source, data, caches and output in each other.


def source_copy(case: Case, folder: Path) -> None:
    shutil.copytree(case.root / "in" / "source", folder)
    case.source = str(folder)


@folder
def output_in_the_source(case: Case) -> None:
    source_copy(case, case.place / "s")
    case.out = str(case.place / "s" / "o")


@folder
def source_in_the_output(case: Case) -> None:
    source_copy(case, case.o / "models" / "s")
    case.write("config.json")


@folder
def source_in_a_model(case: Case) -> None:
    case.model()
    source_copy(case, case.o / "s")


@folder
def output_is_the_source(case: Case) -> None:
    source_copy(case, case.o)


@folder
def output_is_a_model_and_the_source(case: Case) -> None:
    case.model()
    case.owned.clear()  # the source of this command is nobody's to replace
    case.source = str(case.o)


@folder
def output_is_the_source_by_a_link(case: Case) -> None:
    case.model(case.place / "s")
    case.owned.clear()
    case.source = str(case.place / "s")
    case.o.symlink_to("s")


@folder
def source_is_a_link_to_the_output(case: Case) -> None:
    case.model()
    case.owned.clear()
    (case.place / "s").symlink_to("o")
    case.source = str(case.place / "s")


@folder
def output_is_the_source_by_dots(case: Case) -> None:
    case.model()
    case.owned.clear()
    case.write("mine.txt", under=case.place / "x")
    case.source, case.out = str(case.o), str(case.place / "x" / ".." / "o")


@folder
def output_is_the_source_by_a_relative_path(case: Case) -> None:
    case.model()
    case.owned.clear()
    case.source, case.out = str(case.o), "o/"


@folder
def output_is_the_source_by_dots_behind_a_link(case: Case) -> None:
    case.model()
    case.owned.clear()
    case.write("mine.txt", under=case.root / "far" / "away")
    (case.place / "x").symlink_to(case.root / "far" / "away")
    (case.root / "far" / "o").symlink_to(case.o)
    case.source, case.out = str(case.o), str(case.place / "x" / ".." / "o")


@folder
def data_in_a_model(case: Case) -> None:
    case.model()
    shutil.copy2(case.data, case.o / "text.txt")
    case.data = str(case.o / "text.txt")


@folder
def data_is_a_file_of_the_output(case: Case) -> None:
    case.model()
    case.data = str(case.o / "README.md")


@folder
def data_folder_is_the_output(case: Case) -> None:
    case.o.mkdir()
    for number in range(3):
        shutil.copy2(case.data, case.o / f"{number}.txt")
    case.data = case.out


@folder
def output_in_the_data_folder(case: Case) -> None:
    case.place.joinpath("texts").mkdir()
    shutil.copy2(case.data, case.place / "texts" / "a.txt")
    case.data = str(case.place / "texts")
    case.out = str(case.place / "texts" / "o")


@folder
def caches_in_the_output(case: Case) -> None:
    case.model()
    case.write("tokens/mine.bin", "teacher/mine.bin", "scratch/mine.bin")
    case.cache, case.teacher_cache = str(case.o / "tokens"), str(case.o / "teacher")
    case.scratch = str(case.o / "scratch")


@folder
def caches_are_the_output(case: Case) -> None:
    case.cache = case.teacher_cache = case.scratch = case.out


@folder
def caches_are_the_source(case: Case) -> None:
    source_copy(case, case.place / "s")
    case.cache = case.teacher_cache = case.scratch = case.source


@folder
def caches_of_other_programs(case: Case) -> None:
    for name in ("a.part", "x/a.part", "x/b.123.part", ".lock", "x/facts.json", "y/z.safetensors"):
        case.write(name, under=case.place / "shared")
    case.write("lock", "tokens", "journal.json", "documents", under=case.place / "shared" / "k")
    case.cache = case.teacher_cache = case.scratch = str(case.place / "shared")


@folder
def caches_are_files(case: Case) -> None:
    case.write("shared", under=case.place)
    case.cache = case.teacher_cache = case.scratch = str(case.place / "shared")


@folder
def caches_are_links(case: Case) -> None:
    caches_of_other_programs(case)
    (case.place / "link").symlink_to("shared")
    case.cache = case.teacher_cache = case.scratch = str(case.place / "link")


@folder
def moments_in_the_output(case: Case) -> None:
    case.model()
    shutil.copy2(case.moments, case.o / "optimizer.safetensors")
    case.moments = str(case.o / "optimizer.safetensors")


@folder
def recipe_in_the_output(case: Case) -> None:
    case.o.mkdir()
    for name in ("recipe.yaml", "comparison.yaml"):
        shutil.copy2(case.root / "in" / name, case.o / name)
    case.recipe, case.comparison = str(case.o / "recipe.yaml"), str(case.o / "comparison.yaml")


# The output given in an unusual way.


def in_project(case: Case, out: str) -> None:
    case.write("config.json", "main.py", "run/x", "work/x", "stream/x", under=case.place)
    case.out = out


@folder
def output_is_a_dot(case: Case) -> None:
    in_project(case, ".")


@folder
def output_is_empty(case: Case) -> None:
    in_project(case, "")


@folder
def output_is_dots(case: Case) -> None:
    in_project(case, "..")


@folder
def output_is_a_dot_and_a_slash(case: Case) -> None:
    in_project(case, ".//./")


@folder
def output_leads_back(case: Case) -> None:
    in_project(case, "new/..")


@folder
def output_is_a_dot_in_a_model(case: Case) -> None:
    case.model()
    case.write("notes.txt")
    case.cwd, case.out = case.o, "."


@folder
def output_with_a_strange_name(case: Case) -> None:
    case.out = str(case.place / " -x [/bold]\n; rm *")
    case.write("config.json", "mine.txt", under=Path(case.out))


@folder
def output_with_a_partial_name(case: Case) -> None:
    case.out = str(case.place / ".o.partial")
    case.write("config.json", "mine.txt", under=Path(case.out))


@folder
def read_only_folder(case: Case) -> None:
    case.write("config.json", "mine.txt")
    (case.o / "mine.txt").chmod(0o444)
    case.o.chmod(0o555)


@folder
def pictures_in_the_current_folder(case: Case) -> None:
    case.write("positions.svg", "bench.svg", under=case.place)


@folder
def picture_links_in_the_current_folder(case: Case) -> None:
    case.write("drawing.svg", under=case.root / "elsewhere")
    for name in ("positions.svg", "bench.svg"):
        (case.place / name).symlink_to(case.root / "elsewhere" / "drawing.svg")


@folder
def cache_of_the_demo(case: Case) -> None:
    case.write(
        "packages.part", "text/mine.jsonl", "converted/mine.gguf", under=case.place / ".cache"
    )
    case.write("mine.txt", under=case.place / ".cache" / "packages.part.d")


@folder
def download_of_the_demo(case: Case) -> None:
    case.write("a/b.txt", under=case.place / ".cache" / "packages.part")


@folder
def comparison_with_paths_as_names(case: Case) -> None:
    elsewhere = case.root / "elsewhere"
    case.write("0/mine.txt", "0/config.json", under=elsewhere)
    recipe = yaml.safe_load(Path(case.comparison).read_text())
    recipe["others"] = {str(elsewhere): {"num_hidden_layers": 2}}
    recipe["arms"].append({"name": "far", "source": str(elsewhere), "grow": {}})
    Path(case.comparison).write_text(yaml.safe_dump(recipe))


@folder
def comparison_with_dots_as_names(case: Case) -> None:
    case.write("0/mine.txt", "0/config.json", under=case.place / "x")
    recipe = yaml.safe_load(Path(case.comparison).read_text())
    recipe["others"] = {"../../x": {"num_hidden_layers": 2}}
    recipe["arms"].append({"name": "far", "source": "../../x", "grow": {}})
    recipe["arms"].append({"name": "..", "grow": {}})
    Path(case.comparison).write_text(yaml.safe_dump(recipe))
