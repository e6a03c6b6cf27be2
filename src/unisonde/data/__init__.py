"""Prompts, images and speech, as items: readers of benchmarks and of the user's own files, and the Tabletop world."""

from unisonde.data.catalogue import DATA, DataSet, data_digest, open_data
from unisonde.data.item import TASKS, Item, Task, evenly, read_picture

__all__ = ["DATA", "TASKS", "DataSet", "Item", "Task", "data_digest", "evenly", "open_data", "read_picture"]
