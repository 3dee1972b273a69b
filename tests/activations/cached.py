"""A small teacher with its data, and both sources over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pbkd.activations import (
    Activation,
    CacheSource,
    Capture,
    RelaySource,
    both_sides,
    cache_keys,
    fill_cache,
    finish_fill,
)
from pbkd.activations.cache import Side, View
from pbkd.activations.shards import KIND, shard_name
from pbkd.artifacts import Store
from pbkd.config import ActivationsConfig, AugmentConfig
from pbkd.data import Stream
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_network
from pbkd.testing import random_split

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


def vgg() -> nn.Module:
    torch.manual_seed(0)
    return build_network(CARD.network)


class TokenNet(nn.Module):
    """Blocks whose activations are not images: (N, 64, 3) tokens and (N, 5) features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 3)
        self.mix = nn.Linear(3, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x_nchw: Tensor) -> Tensor:
        tokens = self.mix(torch.relu(self.embed(x_nchw.flatten(1)[:, :, None])))
        return self.head(torch.relu(tokens).mean(1))


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
        self.card = CARD.model_copy(update={"augment": augment})
        self.cuts: dict[str, str] = {}
        self.paths, self.config = paths, config
        self.batch_size, self.capture_batch = batch_size, capture_batch
        self.store = Store(folder / "store")
        self.keys = cache_keys(self.card, config, 0, both_sides(paths))
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

    def fill_part(
        self, part: int = 0, num_parts: int = 1, after_batch: Callable[[], None] = lambda: None
    ) -> None:
        fill_cache(
            self.store,
            self.capture,
            self.keys,
            self.train,
            self.val,
            self.capture_batch,
            part,
            num_parts,
            after_batch,
            cuts=self.cuts,
        )

    def cut_at(self, path: str) -> None:
        """Let the cache hold a block's exact input, too."""
        self.cuts[path] = path
        self.keys |= cache_keys(self.card, self.config, 0, [(path, "cut")], self.cuts)

    def fill(self) -> None:
        self.fill_part()
        finish_fill(self.store, self.keys)

    def cache(self, *, resident: bool | None = None, limit_bytes: int = 1 << 20) -> CacheSource:
        return CacheSource(
            self.store,
            self.keys,
            self.train,
            NUM_VAL,
            self.batch_size,
            resident=resident,
            limit_bytes=limit_bytes,
        )

    def relay(self) -> RelaySource:
        return RelaySource(self.capture, self.train, self.val, self.batch_size)

    def item(self, path: str, side: Side, view: View) -> Path:
        return self.store.path(KIND, self.keys[path, side, view])

    def shard(self, path: str, side: Side, view: View, index: int) -> Path:
        return self.item(path, side, view) / shard_name(index)

    def passes(self) -> list[int]:
        """Grows by the batch size with every pass of the teacher from now on."""
        sizes: list[int] = []
        self.teacher.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        return sizes


def assert_equal(
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


def assert_same_source(setup: Setup, *, resident: bool = False, epochs: int = 4) -> None:
    """Compare the cache with the relay in some epochs and on the validation split."""
    cache, relay = setup.cache(resident=resident), setup.relay()
    for epoch in range(epochs):
        num = assert_equal(cache.epoch(epoch, setup.paths), relay.epoch(epoch, setup.paths))
        assert num == NUM_TRAIN // setup.batch_size * setup.batch_size
    assert assert_equal(cache.val(setup.paths), relay.val(setup.paths)) == NUM_VAL
