"""Train the candidates of one job, and measure what each one costs the teacher."""

from pbkd.distill.job import SCORES, TRAINEES, JobReport, JobSpec, run_job
from pbkd.distill.loss import damage_kl, distillation_loss, mse, relative_l2
from pbkd.distill.score import Damage, score
from pbkd.distill.trainee import TraineeResult, TraineeSpec

__all__ = [
    "SCORES",
    "TRAINEES",
    "Damage",
    "JobReport",
    "JobSpec",
    "TraineeResult",
    "TraineeSpec",
    "damage_kl",
    "distillation_loss",
    "mse",
    "relative_l2",
    "run_job",
    "score",
]
