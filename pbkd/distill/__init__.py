"""Train the candidates of one job, and measure what each one costs the teacher."""

from pbkd.distill.job import (
    SCORES,
    TRAINEES,
    JobReport,
    JobSpec,
    TrainingJob,
    run_job,
    train_and_score,
)
from pbkd.distill.loss import damage_kl, distillation_loss, mse, relative_l2
from pbkd.distill.profile import Profile, ProfileJob, merge_profiles, run_profile
from pbkd.distill.score import Damage, score
from pbkd.distill.trainee import TraineeResult, TraineeSpec, make_trainees

__all__ = [
    "SCORES",
    "TRAINEES",
    "Damage",
    "JobReport",
    "JobSpec",
    "Profile",
    "ProfileJob",
    "TraineeResult",
    "TraineeSpec",
    "TrainingJob",
    "damage_kl",
    "distillation_loss",
    "make_trainees",
    "merge_profiles",
    "mse",
    "relative_l2",
    "run_job",
    "run_profile",
    "score",
    "train_and_score",
]
