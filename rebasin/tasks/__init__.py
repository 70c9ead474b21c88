"""What a run works on, put together from the configuration: architecture, endpoints, objective, data.

`cfg.model.task` names the function that builds the task: a new kind of model is a file here and a config.
"""

from rebasin.integrations.torchvision import prepare_torchvision
from rebasin.tasks.base import Part, Task, load_task

prepare_torchvision()  # before a task imports diffusers

__all__ = ["Part", "Task", "load_task"]
