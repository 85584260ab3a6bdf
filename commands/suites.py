"""`suites`: the sets of tasks that the package knows."""

from typing import Annotated

import typer

from probsurgery.commands.options import AsJson
from probsurgery.commands.render import print_json, print_rows
from probsurgery.pipeline.config import SUITES


def list_command(context: typer.Context, as_json: AsJson = False) -> None:
    """List the suites and their tasks."""
    if context.invoked_subcommand:
        return
    from probsurgery.pipeline.datasets.suites import suite_tasks

    suites = {name: suite_tasks(name).values() for name in SUITES}
    if as_json:
        print_json({name: {task.name: len(task.class_names) for task in tasks} for name, tasks in suites.items()})
        return
    for name, tasks in suites.items():
        print(f"{name}: {len(tasks)} tasks")
        images = [(t.name, str(len(t.class_names)), t.hub.id if t.hub else f"packages of [{t.reader}]") for t in tasks]
        print_rows(("task", "classes", "test images from"), images)


def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(SUITES)}.")],
) -> None:
    """Print a suite's file: tasks, classes, prompts and where images come from."""
    from probsurgery.pipeline.datasets.suites import suite_path

    print(suite_path(name).read_text(encoding="utf-8"), end="")
