"""What planning needs to know: times, sizes and limits, as measured or as assumed.

All times are seconds on a worker of speed 1; a worker of speed 2 takes half of them. All are of the
whole block phase: every epoch, every validation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCost:
    """One block of the teacher; blocks are listed in the order in which they run.

    Attributes:
        path: module path below the network.
        teacher_s: the teacher from the end of the block before (or from the images) to the end of
            this block, for every pass that a relay makes.
        fill_teacher_s: the same for the passes that fill a cache: one per view.
        read_input_s, read_output_s: reading the block's input, or output, from a cache.
        write_input_s, write_output_s: writing them once.
        input_bytes, output_bytes: their sizes in a cache.
        read_cut_s, write_cut_s, cut_bytes: the same for the exact input, in float32, with which a
            relay that begins with this block goes on.
        is_cut: whether the teacher can go on from this block's input alone: nothing that comes
            later depends on earlier results by another way, such as a skip around the block.
        has_input, has_output, has_cut: whether the cache holds them already.
        before_score_s: the teacher before the suffix of this block, for all images of the score: a
            job runs it once, up to its last block.
    """

    path: str
    teacher_s: float
    fill_teacher_s: float = 0.0
    read_input_s: float = 0.0
    read_output_s: float = 0.0
    read_cut_s: float = 0.0
    write_input_s: float = 0.0
    write_output_s: float = 0.0
    write_cut_s: float = 0.0
    input_bytes: int = 0
    output_bytes: int = 0
    cut_bytes: int = 0
    is_cut: bool = False
    has_input: bool = False
    has_output: bool = False
    has_cut: bool = False
    before_score_s: float = 0.0


@dataclass(frozen=True)
class TraineeCost:
    """One candidate of one block.

    Attributes:
        name: unique.
        block: path of its block.
        own_s: its steps, validations and score, without what the source costs.
        memory_bytes: that it holds while it trains; co-trained trainees add up.
    """

    name: str
    block: str
    own_s: float
    memory_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """What a plan must keep to.

    Attributes:
        disk_bytes: for the cache, beside what it holds already.
        memory_bytes: for the trainees of one job.
        job_s: what a job costs before it trains: reading teacher and data.
        risk: relative error to expect of a job's cost. Several workers then wait so much of the
            longest job for the last one to end; above 0, smaller jobs are preferred to it.
    """

    disk_bytes: float = float("inf")
    memory_bytes: float = float("inf")
    job_s: float = 0.0
    risk: float = 0.0
