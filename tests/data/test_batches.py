"""Damaged folders are refused; batches pack clips, keep the shift rule and score once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fake_codec import FakeCodec, make_audio

from wgpt.data import batches, prepare
from wgpt.data import dataset as dataset_module
from wgpt.data.packing import PackedWindows, Permutation, Segment, cover
from wgpt.errors import DataError
from wgpt.files import read_json


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of ten clips."""
    root = tmp_path_factory.mktemp("data")
    sources = ("wave", "decoded-1", "leaky-1024")
    prepare(make_audio(root / "audio"), root / "data", codec=FakeCodec(), mel_sources=sources)
    return root / "data"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", lambda p: p.write_text("{"), "must be a JSON object"),
        ("manifest.json", lambda p: p.write_text('{"format": "x"}'), "format"),
        ("train/tokens.npy", lambda p: p.write_bytes(p.read_bytes()[:-9]), "whole .npy"),
        ("train/tokens.npy", lambda p: np.save(p, np.zeros((3, 4), np.uint16)), "shape must be"),
        ("train/mel/wave.npy", lambda p: np.save(p, np.zeros((3, 64))), "dtype must be float16"),
        ("valid/offsets.npy", lambda p: p.unlink(), "whole .npy"),
        ("valid/offsets.npy", lambda p: np.save(p, np.array([0, 1])), "rise from 0|shape"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_file(
    data, tmp_path: Path, name: str, damage, message: str
) -> None:
    data = Path(shutil.copytree(data, tmp_path / "copy"))
    damage(data / name)
    with pytest.raises(DataError, match=message) as caught:
        dataset_module.Dataset(data)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mel_sources": ["../wave"]}, "bad entry|plain names"),
        ({"mel_sources": ["../wave"], "normalisation": {"../wave": {"mean": [0.0] * 64,
          "inv_std": [1.0] * 64}}}, "plain names"),
        ({"totals": {}}, "bad entry"),
        ({"mel": {"n_mels": 64}}, "bad entry"),
        ({"normalisation": {s: {"mean": [0.0], "inv_std": [1.0]}
          for s in ("wave", "decoded-1", "leaky-1024")}}, "normalisation of wave"),
        ({"sources": []}, "clips of train must be 9, got 0"),
    ],
)  # fmt: skip
def test_a_manifest_that_breaks_the_format_is_refused(
    data, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = Path(shutil.copytree(data, tmp_path / "copy"))
    manifest = read_json(data / "manifest.json")
    (data / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=message):
        dataset_module.Dataset(data)


def test_verify_finds_a_flipped_bit(data, tmp_path: Path) -> None:
    data = Path(shutil.copytree(data, tmp_path / "copy"))
    path = data / "train" / "tokens.npy"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(DataError, match="sha256"):
        dataset_module.Dataset(data).verify()


def test_unknown_names_are_refused(data) -> None:
    dataset = dataset_module.Dataset(data)
    with pytest.raises(DataError, match="split"):
        dataset.split("later")
    with pytest.raises(DataError, match="--mel-sources decoded-8"):
        dataset.normalisation("decoded-8")
    with pytest.raises(DataError, match="mel source"):
        dataset.split("train").clip(0, "decoded-8")
    with pytest.raises(DataError, match="clip must lie"):
        dataset.split("train").clip(99)


def test_one_file_leaves_the_validation_split_empty(tmp_path: Path, caplog) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(3200, 0.1), 24_000)
    prepare(tmp_path, tmp_path / "data", codec=FakeCodec())
    assert "validation split: it is empty" in caplog.text
    split = dataset_module.Dataset(tmp_path / "data").split("valid")
    assert (split.n_clips, split.n_steps) == (0, 0)
    assert list(batches.evaluation_batches(split, 8, "wave")) == []
    with pytest.raises(DataError, match="at least one clip"):
        batches.TrainingBatches(split, batch_size=1, context_steps=4, seed=0, mel_source=None)


def hand_split(lengths: tuple[int, ...] = (5, 3), r: int = 2) -> dataset_module.Split:
    """Step t of clip c has codes (10 c + t, 100 + 10 c + t) and frames of value 10 c + t + j/2."""
    tokens, frames = [], []
    for c, n in enumerate(lengths):
        for t in range(n):
            tokens.append([10 * c + t, 100 + 10 * c + t])
            frames += [[10 * c + t + j / 2] * 3 for j in range(r)]
    return dataset_module.Split(
        name="train",
        tokens=np.array(tokens, np.uint16),
        offsets=np.cumsum([0, *lengths]),
        mel={"wave": np.array(frames, np.float16)},
        groups=["."] * len(lengths),
        frames_per_step=r,
        codebook_size=1024,
        silence=-11.5,
    )


def test_shift_rule_by_hand() -> None:
    split = hand_split()
    first = Segment(clip=0, start=0, stop=4, scored_from=0)
    later = Segment(clip=1, start=1, stop=3, scored_from=2)
    batch = batches.collate(split, [[first], [later]], mel_source="wave", codebooks=2)
    # Clip 0 from its start: BOS, then steps 0..2 as inputs; steps 0..3 as targets.
    assert batch.tokens[0].tolist() == [[1024, 1024], [0, 100], [1, 101], [2, 102]]
    assert batch.targets[0].tolist() == [0, 1, 2, 3]
    assert batch.frames[0, :, 0].tolist() == [-11.5, -11.5, 0, 0.5, 1, 1.5, 2, 2.5]
    # Clip 1 from step 1: step 0 comes first, no BOS; step 1 unscored; the rest is padding.
    assert batch.tokens[1].tolist() == [[10, 110], [11, 111], [1024, 1024], [1024, 1024]]
    assert batch.targets[1].tolist() == [-1, 12, -1, -1]
    assert batch.frames[1, :, 2].tolist() == [10, 10.5, 11, 11.5] + [-11.5] * 4
    assert batch.clips.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]
    assert batch.steps.tolist() == [[0, 1, 2, 3], [1, 2, -1, -1]]
    assert batch.codes is None and batch.first_key is None
    # Targets of all codebooks: the same steps, the same places unscored.
    codes = batches.collate(split, [[first], [later]], n_fine=1).codes
    assert codes.tolist() == [
        [[0, 1, 2, 3], [100, 101, 102, 103]],
        [[-1, 12, -1, -1], [-1, 112, -1, -1]],
    ]
    with pytest.raises(DataError, match=r"n_fine must lie in \[0, 1\].*got 2"):
        batches.collate(split, [[first]], n_fine=2)
    single = batches.collate(split, [[first], [later]], mel_source=None)
    assert single.frames is None and single.tokens[0].tolist() == [1024, 0, 1, 2]
    assert single.tokens.dtype == single.targets.dtype == torch.int64
    with pytest.raises(DataError, match=r"\[1, 2\], got 3"):
        batches.collate(split, [[first]], codebooks=3)


def test_a_batch_depends_on_seed_and_step_alone(data) -> None:
    split = dataset_module.Dataset(data).split("train")
    kwargs = {"batch_size": 4, "context_steps": 20, "mel_source": "wave"}

    def draw(seed: int, step: int, **more: int) -> batches.Batch:
        return batches.TrainingBatches(split, seed=seed, **kwargs, **more).batch(step)

    drawn_from = batches.TrainingBatches(split, seed=7, **kwargs)
    forward = [drawn_from.batch(step) for step in range(6)]
    for step in (5, 0, 3):
        for other in (drawn_from.batch(step), draw(7, step)):
            assert torch.equal(other.tokens, forward[step].tokens)
            assert torch.equal(other.frames, forward[step].frames)
            assert torch.equal(other.targets, forward[step].targets)
    assert not torch.equal(forward[0].targets, forward[1].targets)
    assert not torch.equal(draw(8, 0).targets, forward[0].targets)
    # Two ranks read the halves of the same batch.
    halves = [draw(7, 3, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([h.targets for h in halves]), forward[3].targets)
    assert torch.equal(torch.cat([h.frames for h in halves]), forward[3].frames)
    ahead = list(batches.prefetch(drawn_from.batch, 2, 5))
    assert [torch.equal(a.targets, b.targets) for a, b in zip(ahead, forward[2:5], strict=True)]


def test_packed_rows_by_hand() -> None:
    """Two whole clips and the beginning of a third, with their ends as targets."""
    split = hand_split((2, 1, 5))
    row = [Segment(1, 0, 2, 0), Segment(0, 0, 3, 0), Segment(2, 3, 6, 3)]
    batch = batches.collate(split, [row], steps=9, mel_source="wave", n_fine=1)
    assert batch.tokens[0].tolist() == [1024, 10, 1024, 0, 1, 22, 23, 24, 1024]
    assert batch.targets[0].tolist() == [10, 1024, 0, 1, 1024, 23, 24, 1024, -1]
    silent = -11.5
    assert batch.frames[0, ::2, 0].tolist() == [silent, 10, silent, 0, 1, 22, 23, 24, silent]
    assert batch.first_key[0].tolist() == [0, 0, 2, 2, 2, 5, 5, 5, 8]
    assert batch.first_key.dtype == torch.int32
    assert batch.codes[0].tolist() == [
        [10, -1, 0, 1, -1, 23, 24, -1, -1], [110, -1, 100, 101, -1, 123, 124, -1, -1],
    ]  # fmt: skip
    assert batch.clips[0].tolist() == [1, 1, 0, 0, 0, 2, 2, 2, -1]
    assert batch.steps[0].tolist() == [0, 1, 0, 1, 2, 3, 4, 5, -1]
    # A segment that is nothing but a clip's end.
    (end,) = batches.collate(split, [[Segment(0, 2, 3, 2)]], mel_source="wave").targets.tolist()
    assert end == [1024]


@pytest.mark.parametrize("end_of_clip", [False, True])
@pytest.mark.parametrize("context", [1, 4, 8, 500])
def test_an_epoch_holds_every_position_once_without_padding(context, end_of_clip) -> None:
    lengths = (50, 30, 4, 1)
    drawn_from = batches.TrainingBatches(
        hand_split(lengths), batch_size=1, context_steps=context, seed=1, mel_source=None,
        end_of_clip=end_of_clip,
    )  # fmt: skip
    n_windows = drawn_from.windows.n_windows
    total = sum(lengths) + end_of_clip * len(lengths)
    assert n_windows == -(-total // context)
    for epoch in range(3):
        made = [drawn_from.batch(epoch * n_windows + i) for i in range(n_windows)]
        seen = sorted(
            (int(clip), int(step))
            for batch in made
            for clip, step in zip(batch.clips[0], batch.steps[0], strict=True)
            if clip >= 0
        )
        assert seen == [(c, t) for c, n in enumerate(lengths) for t in range(n + end_of_clip)]
        padding = [int((batch.targets == batches.IGNORED).sum()) for batch in made]
        assert {batch.tokens.shape for batch in made} == {(1, min(context, total))}
        assert sum(padding) == max(padding) == n_windows * min(context, total) - total
        for batch in made:
            for clip, step, target in zip(*map(torch.flatten, (
                batch.clips, batch.steps, batch.targets)), strict=True):  # fmt: skip
                if clip >= 0:
                    at_end = step == lengths[int(clip)]
                    assert target == (1024 if at_end else 10 * clip + step)
    assert drawn_from.epoch(2 * n_windows) == 2.0


def test_epochs_cut_and_order_the_clips_anew() -> None:
    """Also where there is one long recording alone."""
    for lengths in ((900,), (300, 200, 400)):
        windows = PackedWindows(np.cumsum([0, *lengths]), 100, seed=0)
        epochs = [[tuple(windows.window(9 * e + i)) for i in range(9)] for e in range(6)]
        assert len({frozenset(one) for one in epochs}) > 4
        starts = [one[0][0].start for one in epochs]
        assert len(set(starts)) > 3
        assert epochs[2] != sorted(epochs[2], key=lambda w: (w[0].clip, w[0].start))


def test_the_draw_is_pinned() -> None:
    # A resumed run must see the batches it would have seen, in any later version too.
    drawn_from = batches.TrainingBatches(
        hand_split((50, 30, 4)), batch_size=2, context_steps=30, seed=1, mel_source=None
    )
    drawn = [[(s.clip, s.start, s.stop) for s in row]
             for row in drawn_from.segments(0) + drawn_from.segments(1)]  # fmt: skip
    assert drawn == [
        [(1, 22, 30), (2, 0, 4), (0, 0, 18)], [(0, 48, 50), (1, 0, 22)],
        [(0, 18, 48)], [(1, 9, 30), (2, 0, 4), (0, 0, 5)],
    ]  # fmt: skip


def test_other_batches_begin_where_the_last_ones_ended() -> None:
    kwargs = {"context_steps": 10, "seed": 1, "mel_source": None}
    split = hand_split((50, 30, 4))
    one = batches.TrainingBatches(split, batch_size=2, **kwargs)
    other = batches.TrainingBatches(
        split, batch_size=4, first_step=6, first_window=one.windows_at(6), **kwargs
    )
    assert other.segments(7) == one.segments(8) + one.segments(9)
    assert other.epoch(6) == one.epoch(6) == 12 / 9


@pytest.mark.parametrize("context", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 8, 9, 12, 13, 40])
def test_windows_score_every_step_once_with_half_a_context(n_steps: int, context: int) -> None:
    scored = []
    for crop in cover(n_steps, context):
        assert crop.stop - crop.start <= context
        assert crop.start <= crop.scored_from < crop.stop <= n_steps
        if crop.start > 0:
            assert crop.scored_from - crop.start >= context / 2 or context == 1
        scored += range(crop.scored_from, crop.stop)
    assert scored == list(range(n_steps))


@pytest.mark.parametrize("context", [16, 200])
def test_evaluation_covers_every_token_of_every_clip(data, context) -> None:
    split = dataset_module.Dataset(data).split("train")
    seen: dict[tuple[int, int], int] = {}
    n_positions = 0
    for batch in batches.evaluation_batches(split, context, "wave", batch_size=3):
        assert batch.targets.shape[0] <= 3 and batch.frames.shape[1] == batch.tokens.shape[1]
        assert batch.targets.shape[1] <= context
        n_positions += batch.targets.numel()
        for *key, target in zip(*map(torch.flatten, (
            batch.clips, batch.steps, batch.targets)), strict=True):  # fmt: skip
            if target != batches.IGNORED:
                place = int(key[0]), int(key[1])
                assert place not in seen
                seen[place] = int(target)
    expected = {
        (clip, t): int(code)
        for clip in range(split.n_clips)
        for t, code in enumerate(split.clip(clip)[0][0])
    }
    assert seen == expected
    if context == 200:  # short clips share rows
        assert n_positions < 1.6 * split.n_steps


def test_prefetch_raises_what_the_maker_raised_and_stops_early() -> None:
    def make(step: int) -> Any:
        if step == 3:
            raise RuntimeError("no step 3")
        return step

    with pytest.raises(RuntimeError, match="no step 3"):
        list(batches.prefetch(make, 0, 10))
    ahead = batches.prefetch(make, 0, 3)
    assert next(ahead) == 0
    ahead.close()


def test_bad_batch_settings_are_refused() -> None:
    good = {"batch_size": 4, "context_steps": 8, "seed": 0, "mel_source": None}
    for change, message in [
        ({"batch_size": 0}, "batch_size"), ({"context_steps": 0}, "context_steps"),
        ({"seed": -1}, "seed"), ({"world_size": 3}, "divisible by 3"), ({"rank": 1}, "rank"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            batches.TrainingBatches(hand_split(), **(good | change))


def test_joined_clips_are_the_same_steps_in_fewer_clips(data) -> None:
    """Neighbours of one group, until they are long enough; what follows a clip is then learnt."""
    whole = dataset_module.Dataset(data).split("train")
    lengths = np.diff(whole.offsets)
    joined = whole.joined(int(lengths[:2].sum()))
    assert joined.groups[0] == whole.groups[0] == whole.groups[1]
    assert joined.clip_steps(0) == lengths[0] + lengths[1]
    for got, first, second in zip(
        joined.clip(0, "wave"), whole.clip(0, "wave"), whole.clip(1, "wave"), strict=True
    ):
        axis = 1 if got.dtype == torch.int64 else 0
        assert torch.equal(got, torch.cat([first, second], axis))
    other = dataclasses.replace(whole, groups=[str(i // 2) for i in range(whole.n_clips)])
    for n_steps in (0, 1, 40, 10**9):
        by_group = other.joined(n_steps)
        assert by_group.n_steps == whole.n_steps and set(by_group.offsets) <= set(whole.offsets)
        pairs = {int(whole.offsets[i]): str(i // 2) for i in range(whole.n_clips)}
        assert by_group.groups == [pairs[int(start)] for start in by_group.offsets[:-1]]
    assert other.joined(0).n_clips == whole.n_clips
    assert other.joined(10**9).n_clips == -(-whole.n_clips // 2)  # never across groups
    empty = dataset_module.Dataset(data).split("test")
    assert empty.joined(100).n_clips == 0


def test_a_batch_of_joined_clips_goes_on_across_the_joint(data) -> None:
    """The first step of the second clip is predicted from the last of the first, not from BOS."""
    whole = dataset_module.Dataset(data).joined(3600.0).split("train")
    joint = int(np.diff(dataset_module.Dataset(data).split("train").offsets)[0])
    batch = batches.collate(whole, [[Segment(0, joint, joint + 4, joint)]], mel_source="wave")
    codes, frames = whole.clip(0, "wave")
    assert batch.tokens[0].tolist() == codes[0, joint - 1 : joint + 3].tolist()
    assert batch.targets[0].tolist() == codes[0, joint : joint + 4].tolist()
    assert torch.equal(batch.frames[0], frames[joint - 1 : joint + 3])


@pytest.mark.parametrize("end_of_clip", [False, True])
@pytest.mark.parametrize("window", [1, 7, 500])
def test_a_computed_order_holds_every_position_once_too(window: int, end_of_clip: bool) -> None:
    lengths = np.array([50, 30, 4, 1, 200])
    offsets = np.cumsum([0, *lengths])
    windows = PackedWindows(offsets, window, seed=1, end_of_clip=end_of_clip, held=0)
    expected = [(c, t) for c, n in enumerate(lengths) for t in range(n + end_of_clip)]
    epochs = []
    for epoch in range(3):
        drawn = [windows.window(epoch * windows.n_windows + i) for i in range(windows.n_windows)]
        seen = [(s.clip, t) for row in drawn for s in row for t in range(s.start, s.stop)]
        assert sorted(seen) == expected
        full = [sum(s.stop - s.start for s in row) for row in drawn]
        assert sum(full) - min(full) == (len(full) - 1) * max(full)  # one may be shorter
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    again = PackedWindows(offsets, window, seed=1, end_of_clip=end_of_clip, held=0)
    other = PackedWindows(offsets, window, seed=2, end_of_clip=end_of_clip, held=0)
    n = windows.n_windows
    assert all(again.window(i) == windows.window(i) for i in range(n, 2 * n))
    assert [other.window(i) for i in range(n)] != [windows.window(i) for i in range(n)]


def test_a_computed_order_is_pinned_and_a_permutation() -> None:
    def order(n: int, seed: int = 0) -> list[int]:
        permutation = Permutation(n, np.random.Generator(np.random.Philox(key=seed)))
        return [permutation(i) for i in range(n)]

    # A resumed run must see the batches it would have seen, in any later version too.
    assert order(12) == [0, 2, 7, 8, 1, 6, 5, 10, 9, 11, 3, 4]
    for n in (1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000):
        assert sorted(order(n)) == list(range(n))
    found = np.array(order(4096))
    assert abs(np.corrcoef(found, np.arange(4096))[0, 1]) < 0.06  # 4 standard deviations
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.06
    assert np.mean(found == np.array(order(4096, 1))) < 0.01


def test_the_order_is_computed_where_clips_or_windows_are_very_many() -> None:
    from wgpt.data import packing

    assert packing.MOST_HELD == 1 << 20  # another value changes what resumed runs see
    offsets = np.arange((1 << 20) + 2, dtype=np.int64) * 10
    for n_clips, window, computed in (
        (1 << 20, 10, False),
        ((1 << 20) + 1, 10, True),
        ((1 << 20) + 1, 1000, True),
        (1 << 17, 1, True),
    ):
        windows = PackedWindows(offsets[: n_clips + 1], window, seed=0)
        assert isinstance(windows._epoch(0), packing._ComputedOrder) == computed


def test_rows_of_a_file_are_read_as_they_are_mapped(tmp_path: Path) -> None:
    from wgpt.data.mapped import open_array, read_rows

    array = np.arange(60, dtype=np.int16).reshape(20, 3)
    np.save(tmp_path / "a.npy", array)
    mapped = open_array(tmp_path / "a.npy")
    for first, last in ((0, 20), (3, 4), (7, 7), (19, 20)):
        assert np.array_equal(read_rows(mapped, first, last), array[first:last])
        assert np.array_equal(read_rows(mapped[5:], first, last), array[5:][first:last])
        assert np.array_equal(read_rows(array, first, last), array[first:last])
    with open(tmp_path / "a.npy", "r+b") as file:
        file.truncate(200)  # a mapping would end the process here
    assert np.array_equal(read_rows(mapped, 0, 12), array[:12])
    with pytest.raises(DataError, match=r"a\.npy: must hold rows 12 to 13, but ends before"):
        read_rows(mapped, 12, 13)


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetch_keeps_the_order_with_many_workers(workers: int) -> None:
    running, most = set(), []

    def make(step: int) -> Any:
        running.add(step)
        most.append(len(running))
        time.sleep(0.01 * (step % 3))
        running.discard(step)
        return step

    assert list(batches.prefetch(make, 4, 24, workers=workers)) == list(range(4, 24))
    assert max(most) == workers
