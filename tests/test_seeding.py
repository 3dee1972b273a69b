"""Seeds: the same on every machine, different for different names."""

from __future__ import annotations

import torch

from pbkd.seeding import derive_seed, make_generator


def test_a_seed_is_the_same_on_every_machine() -> None:
    # the first 63 bits of BLAKE2b-64 of "0/order/1"
    assert derive_seed(0, "order", 1) == 0x291A7F973EFDDBEF


def test_seeds_have_63_bits_and_differ() -> None:
    names = [(), ("a",), ("b",), ("a", 0), ("a", 1), (1, "a")]
    seeds = {derive_seed(seed, *name) for seed in (0, 1, 2**31 - 1) for name in names}
    assert len(seeds) == 3 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_neither_reads_nor_moves_the_global_state() -> None:
    before = torch.get_rng_state()
    first = torch.rand(4, generator=make_generator(0, "x"))
    torch.manual_seed(9)
    second = torch.rand(4, generator=make_generator(0, "x"))
    torch.set_rng_state(before)
    torch.rand(4, generator=make_generator(0, "x"))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(4, generator=make_generator(0, "y")))
    assert torch.equal(torch.get_rng_state(), before)
