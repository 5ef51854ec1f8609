"""The tasks of the accuracy study, each with few examples and one epoch."""

from dataclasses import replace

from accuracy_tasks import TASKS

TINY = {
    task.network: replace(
        task,
        training_examples=32,
        test_examples=16,
        recipe=replace(task.recipe, epochs=1, batch_size=16),
    )
    for task in TASKS
}
U_NET = TINY["small U-Net"]
