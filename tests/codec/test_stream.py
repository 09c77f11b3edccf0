"""Streaming gives what whole-file coding gives, for every way of cutting the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stream_cases import (
    ATOL,
    HOP,
    MINI,
    SETTINGS,
    assert_same_codes,
    cut,
    decode_whole,
    encode_whole,
    model_of,
    network_of,
    noise,
    random_codes,
    stored_bytes,
)

from wgpt.codec.network import Architecture
from wgpt.codec.stream import BLOCK_FRAMES, StreamDecoder, StreamEncoder
from wgpt.errors import CodecError


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Single frames are too small to share: on a busy machine two threads took 14 times as long."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("chunks", ["frame", "random", "whole"])
def test_encoder_gives_the_codes_of_the_whole_wave(name: str, chunks: str) -> None:
    model = model_of(name)
    wave = noise(30 * HOP + 77, seed=1)
    generator = torch.Generator().manual_seed(2)
    lengths = {
        "frame": lambda: HOP,
        "random": lambda: int(torch.randint(0, 1300, (), generator=generator)),
        "whole": lambda: len(wave),
    }[chunks]
    encoder = StreamEncoder(network_of(model), 8)
    codes = [encoder.push(wave[piece]) for piece in cut(len(wave), lengths)]
    expected = encode_whole(model, wave)
    assert expected.unique().numel() > 50
    assert_same_codes(model, wave, torch.cat(codes, 1), expected)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("chunks", ["frame", "random", "whole"])
@pytest.mark.parametrize("n_codebooks", [1, 8])
def test_decoder_gives_the_samples_of_all_codes(name: str, chunks: str, n_codebooks: int) -> None:
    model = model_of(name)
    codes = random_codes(n_codebooks, 30, seed=3)
    generator = torch.Generator().manual_seed(4)
    lengths = {
        "frame": lambda: 1,
        "random": lambda: int(torch.randint(0, 5, (), generator=generator)),
        "whole": lambda: 30,
    }[chunks]
    decoder = StreamDecoder(network_of(model))
    waves = [decoder.push(codes[:, piece]) for piece in cut(30, lengths)]
    expected = decode_whole(model, codes)
    assert expected.std() > 0.1
    assert torch.cat(waves).dtype == torch.float32
    torch.testing.assert_close(torch.cat(waves), expected, rtol=0, atol=ATOL)


def test_one_sample_at_a_time_gives_the_same_codes() -> None:
    model = model_of("mini")
    wave = noise(3 * HOP, seed=5)
    encoder = StreamEncoder(network_of(model), 8)
    pushed = [encoder.push(wave[i : i + 1]) for i in range(len(wave))]
    assert [i for i, x in enumerate(pushed) if x.shape[1]] == [319, 639, 959]
    assert_same_codes(model, wave, torch.cat(pushed, 1), encode_whole(model, wave))


def test_pushes_longer_than_a_block_give_the_same() -> None:
    model = model_of("mini")
    n_frames = 2 * BLOCK_FRAMES + 3
    wave, codes = noise(n_frames * HOP, seed=6), random_codes(8, n_frames, seed=7)
    decoded = StreamDecoder(network_of(model)).push(codes)
    torch.testing.assert_close(decoded, decode_whole(model, codes), rtol=0, atol=ATOL)
    assert_same_codes(
        model, wave, StreamEncoder(network_of(model)).push(wave), encode_whole(model, wave)
    )


def test_what_came_before_matters() -> None:
    """The checks above would notice a lost state: without it the outputs are far off."""
    for name in SETTINGS:
        model = model_of(name)
        wave, codes = noise(30 * HOP, seed=8), random_codes(8, 30, seed=9)
        whole = decode_whole(model, codes)[15 * HOP :]
        assert (StreamDecoder(network_of(model)).push(codes[:, 15:]) - whole).abs().max() > 0.1
        later = StreamEncoder(network_of(model), 8).push(wave[15 * HOP :])
        assert (later != encode_whole(model, wave)[:, 15:]).float().mean() > 0.05


@pytest.mark.parametrize("name", SETTINGS)
def test_empty_pushes_give_nothing_and_change_nothing(name: str) -> None:
    model = model_of(name)
    wave, codes = noise(12 * HOP, seed=10), random_codes(8, 12, seed=11)
    encoder, decoder = StreamEncoder(network_of(model), 8), StreamDecoder(network_of(model), 8)
    given, waves = [], []
    for t in range(12):
        assert encoder.push(wave[:0]).shape == (8, 0)
        assert decoder.push(codes[:, :0]).shape == (0,)
        given.append(encoder.push(wave[t * HOP : (t + 1) * HOP]))
        waves.append(decoder.push(codes[:, t : t + 1]))
    assert encoder.flush().shape == (8, 0) and decoder.flush().shape == (0,)
    assert_same_codes(model, wave, torch.cat(given, 1), encode_whole(model, wave))
    torch.testing.assert_close(torch.cat(waves), decode_whole(model, codes), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "n_encoder", "n_decoder"),
    [("mini", 1, 1), ("dilated", 1, 1), ("mini-reflect", 5, 7), ("encodec", 7, 7)],
)
def test_first_frames_come_after_n_start_frames(name: str, n_encoder: int, n_decoder: int) -> None:
    model = model_of(name)
    encoder, decoder = StreamEncoder(network_of(model), 1), StreamDecoder(network_of(model))
    assert (encoder.n_start_frames, decoder.n_start_frames) == (n_encoder, n_decoder)
    counts = [encoder.push(noise(HOP, seed=t)).shape[1] for t in range(9)]
    assert counts == [0] * (n_encoder - 1) + [n_encoder] + [1] * (9 - n_encoder)
    counts = [len(decoder.push(random_codes(8, 1, seed=t))) // HOP for t in range(9)]
    assert counts == [0] * (n_decoder - 1) + [n_decoder] + [1] * (9 - n_decoder)


@pytest.mark.parametrize("name", ["mini", "mini-reflect", "encodec"])
@pytest.mark.parametrize("n_frames", [1, 2, 6])
def test_flush_completes_a_short_stream(name: str, n_frames: int) -> None:
    model = model_of(name)
    wave, codes = noise(n_frames * HOP + 50, seed=12), random_codes(8, n_frames, seed=13)
    encoder, decoder = StreamEncoder(network_of(model), 8), StreamDecoder(network_of(model))
    got = torch.cat([*(encoder.push(x) for x in wave.split(500)), encoder.flush()], 1)
    assert_same_codes(model, wave, got, encode_whole(model, wave))
    got = torch.cat([*(decoder.push(x) for x in codes.split(1, 1)), decoder.flush()])
    torch.testing.assert_close(got, decode_whole(model, codes), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["mini", "encodec"])
def test_a_lead_stands_before_every_stream_and_removes_the_wait(name: str) -> None:
    model, n_lead = model_of(name), 8
    silence = encode_whole(model, torch.zeros(n_lead * HOP))
    waves, codes = noise(2, 9 * HOP, seed=25), random_codes(2, 3, 9, seed=26)
    encoder = StreamEncoder(network_of(model), 8, n_lead_frames=n_lead)
    decoder = StreamDecoder(network_of(model), lead=silence)
    assert encoder.n_start_frames == decoder.n_start_frames == 1
    for _ in range(2):
        pushed = [encoder.push(x) for x in waves.split(HOP, 1)]
        decoded = [decoder.push(x) for x in codes.split(1, 2)]
        assert all(x.shape == (2, 8, 1) for x in pushed)
        assert all(x.shape == (2, HOP) for x in decoded)
        for b in range(2):
            wave = torch.cat((torch.zeros(n_lead * HOP), waves[b]))
            got = torch.cat((silence, torch.cat(pushed, 2)[b]), 1)
            assert_same_codes(model, wave, got, encode_whole(model, wave))
            whole = decode_whole(model, torch.cat((silence[:3], codes[b]), 1))[n_lead * HOP :]
            torch.testing.assert_close(torch.cat(decoded, 1)[b], whole, rtol=0, atol=ATOL)
        encoder.reset()
        decoder.reset()
    with pytest.raises(CodecError, match="0 or at least 7 frames, got 3"):
        StreamDecoder(network_of(model_of("encodec")), lead=silence[:, :3])


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_rows_are_streams_of_their_own(name: str) -> None:
    model = model_of(name)
    waves, codes = noise(3, 11 * HOP, seed=14), random_codes(3, 4, 11, seed=15)
    encoder, decoder = StreamEncoder(network_of(model), 8), StreamDecoder(network_of(model))
    got = torch.cat([encoder.push(x) for x in waves.split(777, 1)], 2)
    decoded = torch.cat([decoder.push(x) for x in codes.split(2, 2)], 1)
    assert got.shape == (3, 8, 11) and decoded.shape == (3, 11 * HOP)
    for b in range(3):
        assert_same_codes(model, waves[b], got[b], encode_whole(model, waves[b]))
        whole = decode_whole(model, codes[b])
        torch.testing.assert_close(decoded[b], whole, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["mini", "encodec"])
@pytest.mark.parametrize("n_prompt", [3, 9])
def test_clones_go_their_own_way(name: str, n_prompt: int) -> None:
    model = model_of(name)
    prompt = random_codes(8, n_prompt, seed=16)
    ways = random_codes(2, 8, 9, seed=17)
    first = StreamDecoder(network_of(model))
    head = first.push(prompt)
    second = first.clone()
    tails = [torch.empty(0), torch.empty(0)]
    for t in range(9):
        for i, decoder in enumerate((first, second)):
            tails[i] = torch.cat((tails[i], decoder.push(ways[i][:, t : t + 1])))
    for tail, way in zip(tails, ways, strict=True):
        whole = decode_whole(model, torch.cat((prompt, way), 1))
        torch.testing.assert_close(torch.cat((head, tail)), whole, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["mini", "encodec"])
@pytest.mark.parametrize("n_prompt", [3, 9])
def test_clone_of_one_becomes_a_batch(name: str, n_prompt: int) -> None:
    model = model_of(name)
    prompt, ways = random_codes(8, n_prompt, seed=18), random_codes(3, 8, 9, seed=19)
    decoder, encoder = StreamDecoder(network_of(model)), StreamEncoder(network_of(model), 8)
    head = decoder.push(prompt)
    tails = decoder.clone(3).push(ways)
    wave_head, wave_tails = noise(n_prompt * HOP + 99, seed=20), noise(3, 9 * HOP, seed=21)
    codes_head = encoder.push(wave_head)
    codes_tails = encoder.clone(3).push(wave_tails)
    for b in range(3):
        whole = decode_whole(model, torch.cat((prompt, ways[b]), 1))
        torch.testing.assert_close(torch.cat((head, tails[b])), whole, rtol=0, atol=ATOL)
        wave = torch.cat((wave_head, wave_tails[b]))
        got = torch.cat((codes_head, codes_tails[b]), 1)
        assert_same_codes(model, wave, got, encode_whole(model, wave))
    with pytest.raises(CodecError, match="stream of 3"):
        twin = decoder.clone(3)
        twin.clone(2)


@pytest.mark.parametrize("name", ["mini", "encodec"])
def test_streams_join_to_a_batch_with_the_bits_of_each(name: str) -> None:
    model, codes = model_of(name), random_codes(3, 8, 18, seed=31)
    streams = [StreamDecoder(network_of(model)) for _ in range(3)]
    for stream, row in zip(streams, codes, strict=True):
        stream.push(row[None, :, :9])
    joined = StreamDecoder.join(streams)
    together = torch.cat([joined.push(codes[:, :, t : t + 1]) for t in range(9, 18)], 1)
    for b, stream in enumerate(streams):
        alone = [stream.push(codes[b : b + 1, :, t : t + 1]) for t in range(9, 18)]
        assert torch.equal(torch.cat(alone, 1)[0], together[b])
    with pytest.raises(CodecError, match="started and wait for nothing"):
        StreamDecoder.join([StreamDecoder(network_of(model))])


def test_reset_starts_again() -> None:
    model = model_of("mini")
    codes, wave = random_codes(8, 6, seed=22), noise(6 * HOP, seed=23)
    decoder, encoder = StreamDecoder(network_of(model)), StreamEncoder(network_of(model))
    first, first_codes = decoder.push(codes), encoder.push(wave)
    encoder.push(wave[:100])
    decoder.flush()
    with pytest.raises(CodecError, match=r"flush\(\); call reset\(\)"):
        decoder.push(codes)
    decoder.reset()
    encoder.reset()
    batch = decoder.push(codes[None])
    assert torch.equal(batch[0], first) and batch.shape == (1, 6 * HOP)
    assert torch.equal(encoder.push(wave), first_codes)


def test_state_does_not_grow() -> None:
    model = model_of("mini")
    encoder, decoder = StreamEncoder(network_of(model)), StreamDecoder(network_of(model))
    seen = set()
    for _ in range(6):
        encoder.push(noise(10 * HOP))
        decoder.push(random_codes(8, 10))
        seen.add((stored_bytes(encoder), stored_bytes(decoder)))
    assert len(seen) == 1
    block = (BLOCK_FRAMES * HOP + 8) * 8 * 4  # one layer's input at the rate of the sound, bytes
    encoder.push(noise(20 * BLOCK_FRAMES * HOP + 100))
    decoder.push(random_codes(8, 20 * BLOCK_FRAMES))
    assert encoder._tail is not None and encoder._tail.untyped_storage().nbytes() < 4 * HOP
    assert stored_bytes(encoder) < 8 * block and stored_bytes(decoder) < 8 * block


@pytest.mark.parametrize("name", ["mini", "mini-reflect"])
def test_callers_may_reuse_their_memory(name: str) -> None:
    model = model_of(name)
    wave = noise(9 * HOP, seed=24)
    encoder, pieces = StreamEncoder(network_of(model)), []
    buffer = torch.empty(200)
    for piece in cut(len(wave), lambda: 200):
        view = buffer[: piece.stop - piece.start].copy_(wave[piece])
        pieces.append(encoder.push(view))
        buffer.fill_(9.0)
    assert_same_codes(model, wave, torch.cat(pieces, 1), encode_whole(model, wave))


def test_a_short_frame_held_back_is_a_copy() -> None:
    """Frames of 4 samples, fewer than the first layer mirrors, wait in it."""
    change = {"pad_mode": "reflect", "upsampling_ratios": [2, 2], "target_bandwidths": [60.0]}
    torch.manual_seed(0)
    modeling = pytest.importorskip("transformers.models.encodec.modeling_encodec")
    model = modeling.EncodecModel(modeling.EncodecConfig(**(MINI | change)))
    wave, buffer = noise(120, seed=27), torch.empty(4)
    with torch.no_grad():
        z = model.encoder(wave[None, None])
    draws = torch.randn(1024, 48, generator=torch.Generator().manual_seed(28))
    model.quantizer.layers[0].codebook.embed.copy_(z.mean(2) + z.std(2) * draws)
    encoder, pieces = StreamEncoder(network_of(model)), []
    for piece in wave.split(4):
        pieces.append(encoder.push(buffer.copy_(piece)))
    expected = StreamEncoder(network_of(model)).push(wave)
    assert expected.unique().numel() > 10 and torch.equal(torch.cat(pieces, 1), expected)


def test_outputs_are_ordinary_tensors() -> None:
    model = model_of("mini")
    codes = StreamEncoder(network_of(model)).push(noise(2 * HOP))
    wave = StreamDecoder(network_of(model)).push(codes)
    wave *= 2  # raises on a tensor of inference mode
    table = torch.zeros(1024, 4, requires_grad=True)
    torch.nn.functional.embedding(codes, table).sum().backward()  # saves codes
    assert table.grad is not None and not wave.requires_grad


def test_errors_say_what_to_do() -> None:
    model = model_of("mini")
    encoder, decoder = StreamEncoder(network_of(model)), StreamDecoder(network_of(model), 4)
    with pytest.raises(CodecError, match=r"must be float32, got torch\.float64"):
        encoder.push(torch.zeros(320, dtype=torch.float64))
    with pytest.raises(CodecError, match=r"wave must have 1 dimensions.*\(1, 1, 320\)"):
        encoder.push(torch.zeros(1, 1, 320))
    with pytest.raises(CodecError, match=r"codes must be int64, got torch\.int32"):
        decoder.push(torch.zeros(4, 1, dtype=torch.int32))
    with pytest.raises(CodecError, match="NaN or infinite"):
        encoder.push(torch.full((3,), torch.nan))
    with pytest.raises(CodecError, match="1 to 4 codebooks"):
        decoder.push(random_codes(8, 1))
    with pytest.raises(CodecError, match=r"lie in \[0, 1024\), got values from 5 to 1024"):
        decoder.push(torch.tensor([[5], [1024]]))
    with pytest.raises(CodecError, match="batch of none"):
        decoder.push(random_codes(4, 1)[None][:0])
    decoder.push(random_codes(4, 1))  # a refused push leaves a stream as it was
    with pytest.raises(CodecError, match="without a batch, got codes of shape"):
        decoder.push(random_codes(2, 4, 1))
    with pytest.raises(CodecError, match=r"n_codebooks must lie in \[1, 8\], got 9"):
        StreamDecoder(network_of(model), 9)


@pytest.mark.parametrize(
    "change",
    [
        {"num_lstm_layers": 0},
        {"normalize": True},
        {"use_causal_conv": False},
        {"norm_type": "time_group_norm"},
        {"chunk_length_s": 1.0},
        {"pad_mode": "replicate"},
    ],
)
def test_a_model_that_is_not_causal_is_refused(change: dict[str, Any]) -> None:
    architecture = Architecture.from_config(MINI | change, "the test's")
    with pytest.raises(CodecError, match=next(iter(change))):
        architecture.check_causal("the test's")
