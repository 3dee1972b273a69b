"""params.yaml as typed sections: one frozen model per stage, loaded once, at the edge.

Everything here may change results, so DVC watches it; what may not is in ``pbkd.settings``.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pbkd.config.budgets import StudentConfig, SweepConfig
from pbkd.config.candidates import CandidateConfig, SeparableConfig
from pbkd.config.distillation import DistillationConfig
from pbkd.config.section import Fraction, MixedPrecision, Section
from pbkd.config.shrink import ShrinkConfig
from pbkd.errors import did_you_mean


class AugmentConfig(Section):
    """Label-preserving changes of a training image; drawn per (seed, view, sample)."""

    pad: int = Field(0, ge=0, description="random crop out of an image padded by this, pixels")
    flip: bool = Field(False, description="mirror left to right for half of the samples")
    erase: int = Field(
        0,
        ge=0,
        description="side of a square painted gray, pixels, around a pixel drawn at random "
        "(cutout, arXiv 1708.04552); 0: none",
    )


class PrepareConfig(Section):
    """Raw images to uint8 arrays with train, validation and test splits."""

    source: Literal["digits", "image_folder", "torchvision"] = Field(
        "digits",
        description="digits: scikit-learn's; image_folder: a folder, .tar.gz or .zip of "
        "split/class/image or class/image; torchvision: a data set of torchvision.datasets",
    )
    path: str = Field(
        "data/raw", description="the images, or a data set's files; relative to the workspace"
    )
    dataset: str = Field("", description="class in torchvision.datasets, such as CIFAR10")
    arguments: dict[str, str | int | bool] = Field(
        default_factory=dict, description="more arguments of that class"
    )
    image_size: int | None = Field(
        None,
        ge=8,
        description="height and width of the prepared images, pixels, by a centre crop; null: of "
        "the transforms of `teacher.weights`, else as they are, if all have one size",
    )
    resize: int | None = Field(
        None, ge=8, description="shorter side before the crop, pixels; null: `image_size`"
    )
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: Literal["gray", "rgb"] | None = Field(
        None, description="null: as torchvision or digits has them, RGB for image_folder"
    )
    on_corrupt: Literal["fail", "skip"] = Field(
        "fail", description="an image that cannot be decoded ends the run, or is left out by name"
    )
    limit: int | None = Field(
        None, ge=1, description="images per split at most, drawn by the seed: for a quick try"
    )
    val_fraction: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="share of the training images used to choose, where the source has no such "
        "split",
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of all images held back for the final figures, where the source has "
        "no such split",
    )

    @model_validator(mode="after")
    def _settings_belong_together(self) -> PrepareConfig:
        if (self.source == "torchvision") != bool(self.dataset):
            raise ValueError("`dataset` needs `source: torchvision`, and the other way round")
        if self.arguments and not self.dataset:
            raise ValueError("`arguments` are those of `dataset`, which is not set")
        if self.resize is not None and (self.image_size is None or self.resize < self.image_size):
            raise ValueError("`resize` needs an `image_size` that is not larger")
        return self


class TeacherConfig(Section):
    """The network to compress, where its weights come from, and how it is trained."""

    model: str = Field(
        "vgg_small",
        description="a network of pbkd.models.zoo, a classification model of torchvision, or "
        "`package.module:function`, called with num_classes and in_channels",
    )
    width: float = Field(1.0, gt=0, description="factor on the channels of pbkd's own networks")
    weights: str | None = Field(
        None,
        description="null: random; torchvision's name, such as ResNet18_Weights.IMAGENET1K_V1; or "
        "a file of safetensors or torch.save (tensors only)",
    )
    head: Literal["auto", "keep", "new"] = Field(
        "auto",
        description="the last layer of loaded weights; auto: kept where it has the data's classes",
    )
    mean: tuple[float, ...] | None = Field(
        None,
        description="per channel, of pixels in [0, 1]; null: as the weights' transforms say, else "
        "of the training images",
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, description="as `mean`")
    epochs: int = Field(25, ge=0, description="passes over the training split; 0 needs `weights`")
    batch_size: int = Field(64, ge=2, description="images per step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd: with Nesterov momentum 0.9")
    schedule: Literal["one_cycle", "cosine"] = Field(
        "one_cycle", description="one_cycle: rises for a quarter of the steps; cosine: only falls"
    )
    lr: float = Field(0.1, gt=0, description="peak of the schedule")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty; decoupled for adamw")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share spread over all classes")
    mixed_precision: MixedPrecision = True
    augment: AugmentConfig = Field(
        AugmentConfig(),
        description="for the teacher's training and for every later stage that trains",
    )
    min_accuracy: Fraction = Field(
        0.0, description="validation accuracy below which the run stops, 0 to 1"
    )

    @model_validator(mode="after")
    def _settings_belong_together(self) -> TeacherConfig:
        if self.epochs == 0 and self.weights is None:
            raise ValueError("`epochs: 0` takes a trained teacher: set `weights`")
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` are set together")
        if self.mean and self.std and len(self.mean) != len(self.std):
            raise ValueError("`mean` and `std` have a value per channel each")
        return self


class BlocksConfig(Section):
    """Which parts of the teacher are replaced, and by what."""

    select: Literal["convs", "residual", "paths"] = Field(
        "convs",
        description="convs: every k x k convolution, k > 1; residual: BasicBlock- and "
        "Bottleneck-like modules; paths: the modules that match `paths`",
    )
    paths: tuple[str, ...] = Field((), description="globs over module paths, e.g. layer?.*.conv2")
    exclude: tuple[str, ...] = Field((), description="globs over module paths to leave alone")
    candidates: tuple[CandidateConfig, ...] = Field(
        (SeparableConfig(),), min_length=1, description="replacements tried for every block"
    )
    overrides: dict[str, tuple[CandidateConfig, ...]] = Field(
        default_factory=dict,
        description="glob over block paths: candidates instead of `candidates`; last match wins",
    )

    @model_validator(mode="after")
    def _paths_belong_to_select(self) -> BlocksConfig:
        if (self.select == "paths") != bool(self.paths):
            raise ValueError("`paths` needs `select: paths`, and the other way round")
        return self


class ActivationsConfig(Section):
    """Where a block's inputs and outputs come from while its replacement learns."""

    source: Literal["auto", "cache", "relay"] = Field(
        "auto",
        description="cache: written to disk once; relay: one teacher pass per step feeds all "
        "blocks of a job; auto: measured, the fastest plan, mixtures too, whose cache fits",
    )
    views: int = Field(2, ge=1, description="augmented versions of each image, used in turn")
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="both sources round to this"
    )
    chunk: int = Field(
        512, ge=1, description="images that stay together when the order is shuffled"
    )
    max_cache_gb: float = Field(4.0, ge=0, description="limit of `auto` for the cache, 1e9 bytes")


class DistillConfig(Section):
    """How each candidate is trained on its block's activations, and how its damage is scored.

    The score takes the first images of the validation split, which `prepare` shuffled by the seed:
    the same ones for every candidate. They are `score_images` at most, and no more than one for
    every 25 images that a candidate trains on in all its epochs, unless these are fewer than 250:
    so short trainings are not outlasted by their scores, on whatever machine.
    """

    loss: Literal["relative_l2", "mse"] = Field(
        "relative_l2", description="relative_l2: squared error over the target's squared norm"
    )
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    lr: float = Field(2e-3, gt=0, description="start of the cosine schedule")
    weight_decay: float = Field(0.0, ge=0)
    epochs: int = Field(10, ge=1, description="passes over the training split, at most")
    batch_size: int = Field(64, ge=2, description="images per step")
    patience: int = Field(
        4, ge=1, description="epochs without a better validation loss before training stops"
    )
    mixed_precision: MixedPrecision = True
    min_improvement: float = Field(
        1e-3, ge=0, description="relative fall of the validation loss that counts as better"
    )
    score_images: int = Field(
        2000, ge=1, description="validation images used for the damage, at most; see above"
    )


class RepairConfig(Section):
    """Short training of a stitched student on the teacher's activations; no label, no logit.

    ``joint``: losses at all blocks' outputs, with gradients through the whole student; ``local``:
    each block alone, on the student's inputs: weaker, but with memory for one block at a time.
    docs/repair.md compares them.
    """

    method: Literal["none", "local", "joint"] = "joint"
    epochs: int = Field(1, ge=0, description="passes over the training split")
    batch_size: int = Field(64, ge=2, description="images per step")
    lr: float = Field(5e-3, gt=0, description="start of the cosine schedule (AdamW)")
    mixed_precision: MixedPrecision = True


_NAME = r"^[A-Za-z0-9][\w.-]*$"
StudentName = Annotated[str, Field(pattern=_NAME)]


class StitchConfig(Section):
    """Which students are made of the trained candidates, and how they are mended."""

    students: dict[StudentName, StudentConfig] = Field(
        default_factory=lambda: {"half": StudentConfig(max_macs=0.5)},
        description="name: limits; of all students within them the one of least damage is made",
    )
    sweep: SweepConfig | None = Field(None, description="more students, along a front")
    max_damage: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=True,
        description="mean KL divergence of the logits, nats, over which a candidate is left out; "
        ".inf: none is",
    )
    latency_batch_size: int = Field(1, ge=1, description="images per batch for `max_latency`")
    latency_threads: int | None = Field(
        1, ge=1, description="CPU threads for `max_latency`; null: all cores"
    )
    recalibrate_batches: int = Field(
        16, ge=0, description="training batches for fresh batch-norm statistics; 0: none"
    )
    repair: RepairConfig = RepairConfig()

    @model_validator(mode="after")
    def _some_student(self) -> StitchConfig:
        if not self.students and self.sweep is None:
            raise ValueError("name a student in `students`, or set `sweep`")
        if "teacher" in self.students:
            raise ValueError("`teacher` is no name for a student")
        aliases: dict[str, str] = {}
        for name in self.students:
            other = aliases.setdefault(name.replace(".", "_"), name)
            if other != name:
                raise ValueError(
                    f"students `{other}` and `{name}` would share an alias in the registry, which "
                    "has no dots; rename one"
                )
        swept = [name for name in self.students if re.fullmatch(r"sweep-\d+", name)]
        if self.sweep is not None and swept:
            raise ValueError(f"`{swept[0]}` is the name of a student of `sweep`; take another")
        return self


class FinetuneConfig(DistillationConfig):
    """End-to-end distillation of a stitched student, and its baselines.

    Unless ``teachers: inline``, the teacher labels ``views`` views of the training images once, for
    all students; epoch e shows view e mod ``views``.
    """

    teachers: Literal["inline", "cached", "elastic"] = Field(
        "inline",
        description="inline: the teacher runs at every step; cached: its logits are kept, view by "
        "view; elastic: they are kept, and come from teachers on Ray while students train",
    )
    views: int = Field(8, ge=1, description="augmented views of the images, unless `inline`")
    top_labels: int | None = Field(
        None,
        ge=1,
        description="logits that are kept of an image, unless `inline`, the largest; the rest of "
        "the distribution is spread over the other classes; null: all",
    )
    without_teachers: Literal["fail", "labels"] = Field(
        "fail",
        description="if `elastic`, and no label came for PBKD_TEACHER_DEADLINE_S: end with an "
        "error, or go on with true labels alone until teachers come",
    )
    baselines: tuple[Literal["scratch", "distill"], ...] = Field(
        (),
        description="for each student the same architecture with random weights, trained for as "
        "many seconds as the student took: on the labels alone, or distilled end to end",
    )


class EvaluateConfig(Section):
    """What is measured of teacher and students."""

    batch_size: int = Field(256, ge=1, description="images per batch for the accuracy, at most")
    latency_batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 256)
    latency_threads: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(
        (1, None), min_length=1, description="CPU threads of a measurement; null: all cores"
    )
    runtimes: tuple[Literal["pytorch", "onnxruntime", "onnxruntime-int8"], ...] = Field(
        ("pytorch", "onnxruntime"),
        description="what runs the models, on the CPU but for pytorch; those that are not "
        "installed are left out",
    )
    calibration_images: int = Field(
        256, ge=1, description="training images that set the ranges of int8 activations, at most"
    )
    latency_seconds: float = Field(
        2.0,
        gt=0,
        description="measuring time per batch size for teacher and one student, shared by threads "
        "and runtimes; more students get more in proportion",
    )
    latency_max_seconds: float = Field(
        120.0, gt=0, description="per batch size, no round of all models begins after this time"
    )

    @model_validator(mode="after")
    def _pytorch_is_measured(self) -> EvaluateConfig:
        if "pytorch" not in self.runtimes:
            raise ValueError("`runtimes` needs `pytorch`, which the others are compared with")
        return self


class RegisterConfig(Section):
    """The names in the MLflow registry and the rule for the alias `champion`."""

    name: str = Field("pbkd-digits", pattern=_NAME, description="model name")
    max_accuracy_drop: Fraction = Field(
        0.02, description="validation accuracy that a champion may lose against its teacher"
    )


class Params(Section):
    """params.yaml: a seed, and a section per stage."""

    seed: int = Field(0, ge=0, lt=2**31)
    prepare: PrepareConfig = PrepareConfig()
    teacher: TeacherConfig = TeacherConfig()
    blocks: BlocksConfig = BlocksConfig()
    activations: ActivationsConfig = ActivationsConfig()
    distill: DistillConfig = DistillConfig()
    stitch: StitchConfig = StitchConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    shrink: ShrinkConfig = ShrinkConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    register_: RegisterConfig = Field(RegisterConfig(), alias="register")

    @model_validator(mode="after")
    def _recipes_have_students(self) -> Params:
        sweep = self.stitch.sweep
        swept = [f"sweep-{number + 1}" for number in range(sweep.points if sweep else 0)]
        names = [*self.stitch.students, *swept]
        for glob in self.shrink.overrides:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(
                    f"shrink.overrides: got `{glob}`, which is no student; "
                    + did_you_mean(glob, names, f"there are {', '.join(names)}")
                )
        return self
