"""Names of the first version, for programs that import them; what they name is in `lorainit_diffusers.training`."""

from lorainit_diffusers.training.classification.data import (
    ClassData,
    check_classes,
    few_shots,
    read_class_folder,
    split_off_validation,
)
from lorainit_diffusers.training.classification.task import ClassificationTask

__all__ = [
    "ClassData",
    "ClassificationTask",
    "check_classes",
    "few_shots",
    "read_class_folder",
    "split_off_validation",
]
