"""The recipe: the only configuration of a run; ``recipe.py`` says how it is used."""

from lab_utils.recipe.objectives import (
    DistillObjective,
    GrpoObjective,
    PreferenceObjective,
    RewardObjective,
    RewardSource,
    RolloutSection,
    SftObjective,
    TeacherSource,
)
from lab_utils.recipe.recipe import Recipe, parse_changes
from lab_utils.recipe.sections import (
    ClusterSection,
    DataSection,
    DataSource,
    ModelSection,
    OptimSection,
    ParallelSection,
    ScheduleSection,
    TrackingSection,
)

__all__ = [
    "ClusterSection",
    "DataSection",
    "DataSource",
    "DistillObjective",
    "GrpoObjective",
    "ModelSection",
    "OptimSection",
    "ParallelSection",
    "PreferenceObjective",
    "Recipe",
    "RewardObjective",
    "RewardSource",
    "RolloutSection",
    "ScheduleSection",
    "SftObjective",
    "TeacherSource",
    "TrackingSection",
    "parse_changes",
]
