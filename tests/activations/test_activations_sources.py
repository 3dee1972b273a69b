"""Cache and relay give the same activations, bit for bit; damage of the cache is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from pbkd.activations import (
    Activation,
    CacheSource,
    Capture,
    RelaySource,
    Source,
    cache_bytes,
    cache_key,
    fill_cache,
)
from pbkd.activations.cache import KIND, VAL, cache_views
from pbkd.artifacts import Store, load_tensors
from pbkd.blocks import find_blocks
from pbkd.config import ActivationsConfig, AugmentConfig, BlocksConfig
from pbkd.data import Stream
from pbkd.errors import ArtifactError
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_network
from pbkd.testing import OverwritingNet, random_split

NUM_TRAIN, NUM_VAL = 26, 11
CARD = ModelCard(
    network=NetworkSpec(name="vgg_small", num_classes=3, in_channels=1, width=0.125),
    mean=(0.5,),
    std=(0.25,),
    image_size=(8, 8),
    class_names=("a", "b", "c"),
    augment=AugmentConfig(pad=1, flip=True),
    data_digest="data",
    digest="teacher",
)
CONFIG = ActivationsConfig(views=2, chunk=7)
VGG_PATHS = ["features.3", "features.14", "features.7"]
OWN_PATHS = ["stem", "branch", "entry", "tail"]


class Setup:
    """A teacher, its data, and the two sources over them."""

    def __init__(
        self,
        folder: Path,
        net: nn.Module,
        paths: list[str],
        config: ActivationsConfig = CONFIG,
        *,
        augment: AugmentConfig = CARD.augment,
        batch_size: int = 5,
        capture_batch: int = 8,
    ) -> None:
        card = CARD.model_copy(update={"augment": augment})
        self.paths, self.config = paths, config
        self.batch_size, self.capture_batch = batch_size, capture_batch
        self.store = Store(folder / "store")
        self.keys = {
            (path, view): cache_key(card, config, 0, path, view)
            for path in paths
            for view in cache_views(config)
        }
        self.train, self.val = (
            Stream(
                random_split(num, seed=seed),
                seed=0,
                augment=augment,
                views=config.views,
                chunk=config.chunk,
            )
            for num, seed in ((NUM_TRAIN, 0), (NUM_VAL, 1))
        )
        self.teacher = Classifier(net, CARD.mean, CARD.std).eval()
        dtype = getattr(torch, config.dtype)
        self.capture = Capture(self.teacher, paths, self.val.plain(torch.arange(4)), dtype)

    def fill(self) -> None:
        fill_cache(self.store, self.capture, self.keys, self.train, self.val, self.capture_batch)

    def cache(self) -> CacheSource:
        return CacheSource(self.store, self.keys, self.train, NUM_VAL, self.batch_size)

    def relay(self) -> RelaySource:
        return RelaySource(self.capture, self.train, self.val, self.batch_size)

    def item(self, path: str, view: int | str) -> Path:
        return self.store.path(KIND, self.keys[path, view])


def _vgg() -> nn.Module:
    torch.manual_seed(0)
    return build_network(CARD.network)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path, _vgg(), VGG_PATHS)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _assert_equal(
    first: Iterator[dict[str, Activation]], second: Iterator[dict[str, Activation]]
) -> int:
    """Compare batch by batch, bit for bit; gives the number of images."""
    num = 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for path in a:
            for x, y in ((a[path].input, b[path].input), (a[path].output, b[path].output)):
                assert x.dtype == y.dtype
                assert torch.equal(x, y)
        num += len(next(iter(a.values())).input)
    return num


def _assert_same_source(setup: Setup, epochs: int = 4) -> None:
    cache, relay = setup.cache(), setup.relay()
    for epoch in range(epochs):
        num = _assert_equal(cache.epoch(epoch, setup.paths), relay.epoch(epoch, setup.paths))
        assert num == NUM_TRAIN // setup.batch_size * setup.batch_size
    assert _assert_equal(cache.val(setup.paths), relay.val(setup.paths)) == NUM_VAL


# ---------------------------------------------------------------- equivalence


@pytest.mark.parametrize(
    ("dtype", "views", "chunk", "batch_size", "capture_batch"),
    [
        ("float16", 1, 100, 5, 8),  # one shard
        ("float16", 2, 7, 5, 8),  # nothing divides anything; a last validation batch of one
        ("bfloat16", 2, 7, 5, 8),
        ("float32", 2, 7, 5, 8),
        ("float32", 3, 3, 8, 5),  # a batch needs several shards
        ("float32", 2, 13, 13, 26),  # all divide
        ("float32", 1, 1, 10, 2),  # shards of one image, and a last validation batch of one
    ],
)
def test_cache_equals_relay(
    tmp_path: Path,
    dtype: Literal["float16", "bfloat16", "float32"],
    views: int,
    chunk: int,
    batch_size: int,
    capture_batch: int,
) -> None:
    config = ActivationsConfig(views=views, chunk=chunk, dtype=dtype)
    setup = Setup(
        tmp_path, _vgg(), VGG_PATHS, config, batch_size=batch_size, capture_batch=capture_batch
    )
    setup.fill()
    _assert_same_source(setup)


def test_cache_equals_relay_where_activations_are_overwritten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    setup = Setup(tmp_path, OverwritingNet(), OWN_PATHS)
    assert len(setup.capture.overwritten) == 3
    setup.fill()
    _assert_same_source(setup)


def test_cache_equals_relay_without_augmentation(tmp_path: Path) -> None:
    setup = Setup(tmp_path, _vgg(), VGG_PATHS, augment=AugmentConfig())
    setup.fill()
    _assert_same_source(setup)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("writing", [1, 2])
@pytest.mark.parametrize("reading", [1, 2])
def test_cache_equals_relay_with_any_number_of_threads(
    setup: Setup, writing: int, reading: int
) -> None:
    torch.set_num_threads(writing)
    setup.fill()
    torch.set_num_threads(reading)
    _assert_same_source(setup)


@pytest.mark.parametrize("kind", ["cache", "relay"])
def test_a_part_of_the_blocks_and_another_pass_give_the_same(setup: Setup, kind: str) -> None:
    setup.fill()
    source: Source = setup.cache() if kind == "cache" else setup.relay()
    whole = list(source.epoch(1, setup.paths))
    for path in setup.paths:
        alone = [{path: batch[path]} for batch in whole]
        assert _assert_equal(source.epoch(1, [path]), iter(alone)) == 25
    assert _assert_equal(source.epoch(1, setup.paths), iter(whole)) == 25


def test_views_differ_in_the_cache_and_return(setup: Setup) -> None:
    setup.fill()
    source, path = setup.cache(), setup.paths[0]
    by_row = []
    for epoch in (0, 1, 2):
        batches = list(source.epoch(epoch, [path]))
        rows = torch.cat(list(setup.train.rows(epoch, setup.batch_size)))
        inputs = torch.cat([batch[path].input for batch in batches])
        by_row.append(dict(zip(rows.tolist(), inputs, strict=True)))
    first, second, third = by_row
    assert all(torch.equal(first[row], third[row]) for row in first.keys() & third.keys())
    assert any(not torch.equal(first[row], second[row]) for row in first.keys() & second.keys())


# ---------------------------------------------------------------- filling


def test_the_cache_is_as_large_as_predicted(setup: Setup) -> None:
    setup.fill()
    config = BlocksConfig(select="paths", paths=tuple(setup.paths))
    blocks = find_blocks(setup.teacher.net, config, torch.rand(1, 1, 8, 8)).blocks
    size = sum(
        tensor.numel() * tensor.element_size()
        for shard in setup.store.root.rglob("*.safetensors")
        for tensor in load_tensors(shard).values()
    )
    assert cache_bytes(blocks, setup.config, NUM_TRAIN, NUM_VAL) == size
    per_image = (4 * 64 + 4 * 64) + (8 * 4 + 16 * 4) + (4 * 16 + 8 * 16)
    assert size == 2 * per_image * (2 * NUM_TRAIN + NUM_VAL)


def test_an_item_has_a_shard_per_chunk(setup: Setup) -> None:
    setup.fill()
    for view, num in ((0, NUM_TRAIN), (1, NUM_TRAIN), (VAL, NUM_VAL)):
        shards = sorted(setup.item("features.3", view).glob("shard-*"))
        sizes = [len(load_tensors(shard)["input"]) for shard in shards]
        assert sizes == [7] * (num // 7) + [num % 7]


def _passes(setup: Setup) -> list[int]:
    """Grows by the batch size with every pass of the teacher from now on."""
    sizes: list[int] = []
    setup.teacher.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def test_what_is_there_is_not_made_again(setup: Setup) -> None:
    setup.fill()
    passes = _passes(setup)
    setup.fill()
    assert passes == []


def test_only_what_is_missing_is_made(setup: Setup) -> None:
    setup.fill()
    markers = {key: setup.item(*key) / "item.json" for key in setup.keys}
    before = {key: marker.stat().st_ino for key, marker in markers.items()}
    (setup.item("features.3", 1) / "shard-00000.safetensors").unlink()
    passes = _passes(setup)
    setup.fill()
    assert passes == [8] * 4  # 26 images in chunks of 7, each one pass of the capture batch
    after = {key: marker.stat().st_ino for key, marker in markers.items()}
    assert {key for key in before if before[key] != after[key]} == {("features.3", 1)}
    _assert_same_source(setup)


def test_an_interrupted_filling_leaves_nothing_half_done(setup: Setup) -> None:
    num_passes = 0

    def fail_in_the_second_view(_: nn.Module, args: object) -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes == 6:
            raise KeyboardInterrupt

    handle = setup.teacher.register_forward_pre_hook(fail_in_the_second_view)
    with pytest.raises(KeyboardInterrupt):
        setup.fill()
    handle.remove()
    done = {key for key, name in setup.keys.items() if setup.store.has(KIND, name)}
    assert done == {(path, 0) for path in setup.paths}
    assert len(list((setup.store.root / KIND).iterdir())) == len(done)
    setup.fill()
    _assert_same_source(setup)


# ---------------------------------------------------------------- damage


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [_flip_a_byte, _truncate, _remove])
@pytest.mark.parametrize(("view", "shard"), [(0, 0), (1, 3), (VAL, 1)])
def test_a_damaged_shard_is_found_and_the_cache_can_be_refilled(
    setup: Setup, damage: Callable[[Path], None], view: int | str, shard: int
) -> None:
    setup.fill()
    path = setup.item("features.14", view) / f"shard-{shard:05d}.safetensors"
    damage(path)
    source = setup.cache()
    batches = source.val(setup.paths) if isinstance(view, str) else source.epoch(view, setup.paths)
    with pytest.raises(ArtifactError, match=f"{path.name}: checksum differs"):
        list(batches)
    present = {key for key in setup.keys if setup.item(*key).exists()}
    assert present == set(setup.keys) - {("features.14", view)}
    setup.fill()
    _assert_same_source(setup)


def test_an_item_without_its_marker_is_an_error(setup: Setup) -> None:
    setup.fill()
    (setup.item("features.3", 0) / "item.json").unlink()
    with pytest.raises(ArtifactError, match=r"item\.json is missing"):
        next(iter(setup.cache().epoch(0, setup.paths)))
    setup.fill()
    _assert_same_source(setup)


# ---------------------------------------------------------------- keys


def _key(view: int | str = 0, **changes: object) -> str:
    card_changes = {name: changes.pop(name) for name in list(changes) if name in CARD_FIELDS}
    seed, path = changes.pop("seed", 0), changes.pop("path", "features.3")
    card = CARD.model_copy(update=card_changes)
    config = CONFIG.model_copy(update=changes)
    assert isinstance(seed, int)
    assert isinstance(path, str)
    return cache_key(card, config, seed, path, view)


CARD_FIELDS = set(ModelCard.model_fields)


@pytest.mark.parametrize("view", [0, VAL])
@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "other"},
        {"data_digest": "other"},
        {"dtype": "bfloat16"},
        {"chunk": 8},
        {"path": "features.7"},
    ],
    ids=str,
)
def test_a_key_changes_with_what_the_contents_depend_on(
    changes: dict[str, object], view: int | str
) -> None:
    assert _key(view, **changes) != _key(view)


AUGMENTATION = [
    {"augment": AugmentConfig(pad=2, flip=True)},
    {"augment": AugmentConfig()},
    {"seed": 1},
]


@pytest.mark.parametrize("changes", AUGMENTATION, ids=str)
def test_augmentation_changes_the_keys_of_the_training_split_alone(
    changes: dict[str, object],
) -> None:
    assert _key(0, **changes) != _key(0)
    assert _key(VAL, **changes) == _key(VAL)


@pytest.mark.parametrize("view", [0, VAL])
@pytest.mark.parametrize(
    "changes",
    [
        {"views": 5},
        {"max_cache_gb": 1.0},
        {"source": "relay"},
        {"class_names": ("x", "y", "z")},
    ],
    ids=str,
)
def test_a_key_changes_with_nothing_else(changes: dict[str, object], view: int | str) -> None:
    assert _key(view, **changes) == _key(view)


def test_every_view_has_a_key() -> None:
    assert cache_views(ActivationsConfig(views=3)) == [0, 1, 2, VAL]
    assert len({_key(view) for view in (0, 1, 2, VAL)}) == 4
