"""params.yaml: what is accepted, and what is said where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from pbkd.config import (
    BlocksConfig,
    BottleneckConfig,
    CandidateConfig,
    CustomConfig,
    GroupedConfig,
    IdentityConfig,
    LowRankConfig,
    NarrowConfig,
    Params,
    SeparableConfig,
    StudentConfig,
    load_params,
    parse_limit,
)
from pbkd.config.load import sections_in
from pbkd.errors import ConfigError

ROOT = Path(__file__).parents[1]


def _load(tmp_path: Path, text: str) -> Params:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_params(path)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("sed: 1", "sed", "seed"),
        ("distil: {epochs: 2}", "distil", "distill"),
        ("registry: {name: a}", "registry", "register"),
        ("distill: {epoch: 2}", "distill.epoch", "epochs"),
        ("teacher: {augment: {flop: true}}", "teacher.augment.flop", "flip"),
        ("register: {nam: a}", "register.nam", "name"),
        (
            "blocks: {candidates: [{kind: separable}, {deph: 2}]}",
            "blocks.candidates.1.deph",
            "depth",
        ),
        (
            "blocks: {overrides: {layer1: [{batchnorm: true}]}}",
            "blocks.overrides.layer1.0.batchnorm",
            "batch_norm",
        ),
        (
            "blocks: {candidates: [{kind: low_rank, rato: 0.5}]}",
            "blocks.candidates.0.rato",
            "ratio",
        ),
        (
            "blocks: {candidates: [{kind: 'm:f', setings: {}}]}",
            "blocks.candidates.0.setings",
            "settings",
        ),
        ("stitch: {students: {a: {max_byte: 1}}}", "stitch.students.a.max_byte", "max_bytes"),
        ("stitch: {sweep: {point: 3}}", "stitch.sweep.point", "points"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(
    tmp_path: Path, text: str, key: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text)
    message = str(caught.value)
    assert str(tmp_path / "params.yaml") in message
    assert f"{key}: unknown key; did you mean `{nearest}`?" in message


def test_an_unknown_key_like_no_other_lists_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.zzz: unknown key; known are source, path,"):
        _load(tmp_path, "prepare: {zzz: 1}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: none", "seed: got 'none'"),
        ("seed: -1", "seed: got -1"),
        ("distill: {epochs: 1.5}", "distill.epochs: got 1.5"),
        ("distill: {lr: 0}", "distill.lr: got 0"),
        ("distill: {lr: .nan}", "distill.lr: got nan"),
        ("distill: {loss: l1}", "distill.loss: got 'l1'; Input should be 'relative_l2' or 'mse'"),
        ("teacher: {min_accuracy: 97}", "teacher.min_accuracy: got 97"),
        (
            "stitch: {students: {a.b: {max_macs: 0.5}, a_b: {max_macs: 0.4}}}",
            "students `a.b` and `a_b` would share an alias in the registry",
        ),
        ("teacher: {augment: {flip: maybe}}", "teacher.augment.flip: got 'maybe'"),
        ("blocks: {candidates: []}", "blocks.candidates: got []"),
        ("blocks: {candidates: [{depth: 3}]}", "blocks.candidates.0.depth: got 3"),
        (
            "blocks: {candidates: [{kind: lowrank, ratio: 0.5}]}",
            "blocks.candidates.0.kind: got 'lowrank'; did you mean `low_rank`?",
        ),
        (
            "blocks: {overrides: {a: [{kind: zzz}]}}",
            "blocks.overrides.a.0.kind: got 'zzz'; known kinds are separable, low_rank, narrow,",
        ),
        ("blocks: {candidates: [{kind: }]}", "blocks.candidates.0.kind: got None; known kinds"),
        (
            "blocks: {candidates: [separable]}",
            "blocks.candidates.0: got 'separable'; expected a mapping such as {kind: separable}",
        ),
        (
            "blocks: {candidates: [{kind: 'my module:f'}]}",
            "blocks.candidates.0.kind: got 'my module:f'; expected package.module:function",
        ),
        (
            "blocks: {candidates: [{kind: low_rank, ratio: 2}]}",
            "blocks.candidates.0.ratio: got 2; Input should be less than 1",
        ),
        (
            "blocks: {candidates: [{kind: low_rank}]}",
            "blocks.candidates.0: got {'kind': 'low_rank'}; set one of `ratio` and `energy`",
        ),
        (
            "blocks: {candidates: [{kind: 'm:f', settings: {a: [1]}}]}",
            "blocks.candidates.0.settings.a: got [1]; Input should be a valid string; or Input "
            "should be a valid integer",
        ),
        ("evaluate: {latency_batch_sizes: [1, 0]}", "evaluate.latency_batch_sizes.1: got 0"),
        ("shrink: {recipe: [prune]}", "shrink.recipe.0: got 'prune'"),
        (
            "shrink: {overrides: {hlf: []}}",
            "params.yaml: shrink.overrides: got `hlf`, which is no student; did you mean `half`?",
        ),
        ("distill: {lr: .inf}", "distill.lr: got inf; Input should be a finite number"),
        ("teacher: {mean: [.nan], std: [1.0]}", "teacher.mean.0: got nan"),
        ("teacher: {mean: [0.5], std: [.inf]}", "teacher.std.0: got inf"),
        ("finetune: {temperature: .inf}", "finetune.temperature: got inf"),
        (
            "stitch: {students: {a: {max_macs: true}}}",
            "stitch.students.a.max_macs: got True; expected a limit such as 0.25, 25% or 40M",
        ),
        (
            "shrink: {recipe: [{method: prune_channels, max_latency: true}]}",
            "shrink.recipe.0.max_latency: got True; expected a limit",
        ),
        (
            "stitch: {sweep: {points: 3}}\nshrink: {overrides: {sweep-4: []}}",
            "shrink.overrides: got `sweep-4`, which is no student; did you mean `sweep-3`?",
        ),
        (
            "shrink: {recipe: [{method: prune, sparsty: 0.5}]}",
            "shrink.recipe.0.sparsty: unknown key; did you mean `sparsity`?",
        ),
        (
            "shrink: {overrides: {half: [{method: quantize, bits: 9}]}}",
            "shrink.overrides.half.0.bits: got 9",
        ),
        ("distill: {lr: true}", "params.yaml: distill.lr: got True; expected a number"),
        ("evaluate: {latency_batch_sizes: [1, true]}", "latency_batch_sizes.1: got True"),
        (
            "shrink: {recipe: [{method: prune, sparsity: 0.5, tune: {lr: true}}]}",
            "shrink.recipe.0.tune.lr: got True; expected a number",
        ),
        (
            "finetune: {mixed_precision: alway}",
            "finetune.mixed_precision: got 'alway'; Input should be a valid boolean, unable to "
            "interpret input; or Input should be 'always'",
        ),
        ("stitch: {max_damage: .nan}", "stitch.max_damage: got nan"),
        ("register: {name: a/b}", "register.name: got 'a/b'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_got(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text)
    assert said in str(caught.value)


def test_what_follows_from_another_mistake_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, "blocks: {candidates: [{depth: 3}]}")
    assert ";" not in str(caught.value).partition("got 3;")[2]


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("{kind: separable, depth: 2}", SeparableConfig(depth=2)),
        ("{kind: low_rank, energy: 0.9}", LowRankConfig(energy=0.9)),
        ("{kind: narrow}", NarrowConfig()),
        ("{kind: bottleneck, batch_norm: true}", BottleneckConfig(batch_norm=True)),
        ("{kind: grouped, groups: 4}", GroupedConfig(groups=4)),
        ("{kind: identity, adapter: never}", IdentityConfig(adapter="never")),
        (
            "{kind: 'm.n:f', settings: {a: 1, b: true, c: x, d: 0.5}}",
            CustomConfig(kind="m.n:f", settings={"a": 1, "b": True, "c": "x", "d": 0.5}),
        ),
    ],
)
def test_every_kind_of_candidate_is_read_and_comes_back(
    tmp_path: Path, text: str, config: CandidateConfig
) -> None:
    blocks = _load(tmp_path, f"blocks: {{candidates: [{text}]}}").blocks
    assert blocks.candidates == (config,)
    assert type(blocks.candidates[0]) is type(config)
    assert BlocksConfig.model_validate_json(blocks.model_dump_json()) == blocks


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed: got 'x'.*; distill\.epoch: unknown key"):
        _load(tmp_path, "seed: x\ndistill: {epoch: 2}")


@pytest.mark.parametrize("blocks", ["{select: paths}", "{paths: [layer1]}"])
def test_paths_and_select_paths_need_each_other(tmp_path: Path, blocks: str) -> None:
    with pytest.raises(ConfigError, match="`paths` needs `select: paths`"):
        _load(tmp_path, f"blocks: {blocks}")


def test_paths_with_select_paths_are_accepted(tmp_path: Path) -> None:
    params = _load(tmp_path, "blocks: {select: paths, paths: ['layer?.*']}")
    assert params.blocks.paths == ("layer?.*",)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"params\.yaml does not exist"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- seed\n", "got list, expected sections"),
        (b"", "got NoneType, expected sections"),
        (b"seed 1", "got str, expected sections"),
        (b"seed: 1\nseed: 2\n", "key `seed` stands twice"),
        (b"distill: {lr: 1, epochs: 2, lr: 3}\n", "key `lr` stands twice"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_params(path)


def test_every_key_has_a_default(tmp_path: Path) -> None:
    params = _load(tmp_path, "seed: 3")
    assert params == Params(seed=3)
    assert params.blocks.candidates == (SeparableConfig(depth=1, batch_norm=False),)
    assert params.register_.name == "pbkd-digits"


def test_yaml_scalars_become_the_declared_types(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-3, which has no dot, as a string
    params = _load(tmp_path, "distill: {lr: 1e-3}\nteacher: {augment: {flip: yes}}")
    assert params.distill.lr == 0.001
    assert params.teacher.augment.flip is True


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Params().distill.epochs = 3  # type: ignore[misc]


def test_the_repository_loads() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.prepare.source == "digits"
    assert params.register_.name == "pbkd-digits"


def test_no_key_has_a_name_that_dvc_leaves_out_of_its_hashes() -> None:
    """DVC's run cache overlooks `size` and `nfiles`, also in parameters: it would restore outputs
    of another value."""

    def names(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield field.alias or name
            for inner in sections_in(field.annotation):
                yield from names(inner)

    found = set(names(Params))
    assert {"image_size", "pad", "depth", "groups", "energy", "max_bytes"} <= found
    assert not found & {"size", "nfiles"}


@pytest.mark.parametrize("limit", [0, -1, "1e999", "inf", "nan", "12 apples", "5ms"])
def test_a_limit_that_means_nothing_is_refused(limit: object) -> None:
    with pytest.raises(ValueError, match="expected a limit"):
        StudentConfig(max_parameters=limit)


@pytest.mark.parametrize(
    ("figure", "text", "value", "is_share"),
    [
        ("parameters", 0.25, 0.25, True),
        ("parameters", "25%", 0.25, True),
        ("parameters", 1, 1, True),
        ("parameters", "500k", 5e5, False),
        ("bytes", "1.5MB", 1.5e6, False),
        ("bytes", "2 KiB", 2048, False),
        ("latency", "800us", 0.8, False),
        ("latency", "2s", 2000, False),
    ],
)
def test_a_limit_is_a_share_or_a_figure(figure, text, value, is_share) -> None:
    limit = parse_limit(text, figure)
    assert (limit.value, limit.is_share) == (pytest.approx(value), is_share)
    assert limit.of(1000) == pytest.approx(1000 * value if is_share else value)


@pytest.mark.parametrize(("method", "epochs"), [("prune", 4), ("low_rank", 2), ("quantize", 1)])
def test_a_tune_of_some_keys_has_the_steps_own_epochs(method: str, epochs: int) -> None:
    settings = {"prune": {"sparsity": 0.5}, "low_rank": {"ratio": 0.5}, "quantize": {}}[method]
    step = {"method": method, **settings, "tune": {"lr": 0.5}}
    (step,) = Params.model_validate({"shrink": {"recipe": [step]}}).shrink.recipe
    assert (step.tune.epochs, step.tune.lr) == (epochs, 0.5)


def test_recipes_may_name_students_of_a_sweep_and_no_damage_may_be_too_large(
    tmp_path: Path,
) -> None:
    text = "stitch: {max_damage: .inf, sweep: {points: 3}}\nshrink: {overrides: {sweep-*: []}}"
    assert _load(tmp_path, text).stitch.max_damage == math.inf
