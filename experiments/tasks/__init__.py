"""The tasks that a model can be trained for and scored on, by their name in `Settings.task`."""

from experiments.tasks.guesswhat import GuessWhatTask
from experiments.tasks.task import Task
from experiments.tasks.vqa import VQATask

TASKS: dict[str, type[Task]] = {"vqa": VQATask, "guesswhat": GuessWhatTask}
