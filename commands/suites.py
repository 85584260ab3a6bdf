"""`suites`: the sets of tasks that the package knows, and those of one's own."""

from typing import Annotated

import typer
from typer import Option

from probsurgery.commands.options import AsJson
from probsurgery.commands.progress import shown_progress
from probsurgery.commands.render import note, print_json, print_rows, say
from probsurgery.pipeline.config import SUITES
from probsurgery.pipeline.errors import InputError


def list_command(context: typer.Context, as_json: AsJson = False) -> None:
    """List the package's suites and their tasks."""
    if context.invoked_subcommand:
        return
    from probsurgery.pipeline.datasets.suites import suite_tasks

    suites = {name: suite_tasks(name).values() for name in SUITES}
    if as_json:
        print_json({name: {task.name: len(task.class_names) for task in tasks} for name, tasks in suites.items()})
        return
    for name, tasks in suites.items():
        print(f"{name}: {len(tasks)} tasks")
        images = [(task.name, str(len(task.class_names)), task.place("test")) for task in tasks]
        print_rows(("task", "classes", "test images from"), images)


def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(SUITES)}, or a file.")],
) -> None:
    """Print a suite's file, to copy from: tasks, classes, prompts and where images come from."""
    from probsurgery.pipeline.datasets.suites import load_suite

    print(load_suite(name).path.read_text(encoding="utf-8"), end="")


def check_command(
    suite: Annotated[str, typer.Argument(metavar="FILE", help=f"A suite's file, or one of {', '.join(SUITES)}.")],
    arch: Annotated[str | None, Option(help="Encoder, if the suite names none.")] = None,
    checkpoints: Annotated[str | None, Option(help="Folder of checkpoints, as for `extract`.")] = None,
    data: Annotated[str | None, Option(help="Folder of data sets, as for `extract`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Open everything that a suite names, without encoding: encoder, checkpoints, classifiers and every image.

    Prints a line for each task. Exits with status 2 and a line for every problem if there are any.
    """
    from probsurgery.pipeline.extraction.check import check_suite

    with shown_progress("images") as progress:
        checked, problems = check_suite(suite, arch, checkpoints, data, progress)
    if as_json:
        print_json({"tasks": checked, "problems": problems})
    for name, task in {} if as_json else checked.items():
        images = ", ".join(f"{rows:,} {split}" for split, rows in task["images"].items())
        listed = ", ".join(task["class_names"][:5]) + (", ..." if len(task["class_names"]) > 5 else "")
        classes = f"{task['classes']} classes{f' ({listed})' if listed else ''}"
        say(f"{name}: {images} images, {classes}, {task['classifier']}, expert {task['expert']}")
    for problem in problems:
        note(problem)
    if problems:
        raise typer.Exit(InputError.exit_status)
