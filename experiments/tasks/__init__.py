"""The tasks that a model can be trained for and scored on, by the name that `Settings.task` gives."""

from experiments.tasks.task import Task
from experiments.tasks.vqa import VQATask

TASKS: dict[str, type[Task]] = {"vqa": VQATask}
