"""Generation and scoring: both twins against the plain model, and against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jupiter_engine.backends import load_generator, load_scorer
from jupiter_engine.backends.contract import Completion, Dtype, GenerateRequest, Generator, ScoreRequest
from jupiter_engine.backends.mlx import generate as mlx_generate
from jupiter_engine.backends.torch import generate as torch_generate
from jupiter_engine.backends.torch import model as torch_model
from jupiter_engine.protocol.specs import Twin

import mlx.core as mx  # isort: skip - after backends.mlx, which readies its BLAS
import torch  # isort: skip - after backends.torch, which sets its waiting policy

TWINS: tuple[Twin, ...] = ("torch", "mlx")
NEVER: tuple[int, ...] = ()
"""No stop token."""


def requests_of(count: int, *, new: int = 12) -> list[GenerateRequest]:
    random = np.random.default_rng(1)
    return [
        GenerateRequest(
            prompt=random.integers(0, 300, int(random.integers(2, 70))).tolist(), seed=seed, max_new_tokens=new
        )
        for seed in range(count)
    ]


def all_of(
    generator: Generator,
    requests: Sequence[GenerateRequest],
    *,
    batch: int = 4,
    temperature: float = 1.0,
    top_p: float = 0.9,
    stops: Sequence[int] = NEVER,
) -> list[Completion]:
    found = generator.generate(requests, temperature=temperature, top_p=top_p, batch_size=batch, stop_ids=stops)
    return sorted(found, key=lambda completion: completion.index)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("kind", ["plain", "grouped", "scaled"])
def test_greedy_is_the_argmax_of_the_whole_sequence(tiny_folders: dict[str, Path], kind: str, twin: Twin) -> None:
    """The cached, batched path agrees with recomputing everything for every token."""
    requests = requests_of(5, new=10)
    model = torch_model.load_model(tiny_folders[kind], "float32")
    done = all_of(load_generator(twin, tiny_folders[kind], dtype="float32"), requests, temperature=0, batch=3)
    assert [completion.index for completion in done] == list(range(5))
    for request, completion in zip(requests, done, strict=True):
        ids = [*request.prompt, *completion.tokens]
        with torch.inference_mode():
            logits = model(torch.tensor([ids]))[0]
        best = logits.argmax(dim=-1)[len(request.prompt) - 1 : -1].tolist()
        assert completion.tokens == best
        assert completion.finish == "length"


@pytest.mark.parametrize("twin", TWINS)
def test_neighbours_in_the_batch_change_nothing(tiny_folders: dict[str, Path], twin: Twin) -> None:
    requests = requests_of(9)
    generator = load_generator(twin, tiny_folders["grouped"], dtype="float32")
    alone = [all_of(generator, [request])[0].tokens for request in requests]
    assert [completion.tokens for completion in all_of(generator, requests, batch=4)] == alone
    assert [completion.tokens for completion in all_of(generator, requests[::-1], batch=9)] == alone[::-1]
    assert len({tuple(tokens) for tokens in alone}) == 9


def test_twins_sample_the_same_text(tiny_folders: dict[str, Path]) -> None:
    requests = requests_of(6)
    ours, theirs = (
        [one.tokens for one in all_of(load_generator(twin, tiny_folders["plain"], dtype="float32"), requests)]
        for twin in TWINS
    )
    assert ours == theirs


@pytest.mark.parametrize("twin", TWINS)
def test_another_seed_gives_another_text(tiny_folders: dict[str, Path], twin: Twin) -> None:
    generator = load_generator(twin, tiny_folders["plain"], dtype="float32")
    texts = {
        tuple(all_of(generator, [GenerateRequest(prompt=[5, 6], seed=seed, max_new_tokens=8)])[0].tokens)
        for seed in range(6)
    }
    assert len(texts) == 6


@pytest.mark.parametrize("twin", TWINS)
def test_stops_at_the_stop_token_and_refills(tiny_folders: dict[str, Path], twin: Twin) -> None:
    requests = requests_of(8, new=20)
    generator = load_generator(twin, tiny_folders["plain"], dtype="float32")
    free = all_of(generator, requests, top_p=1.0)
    stop = free[2].tokens[3]
    stopped = all_of(generator, requests, top_p=1.0, batch=3, stops=(stop,))
    for before, after in zip(free, stopped, strict=True):
        if stop in before.tokens:
            assert after.tokens == before.tokens[: before.tokens.index(stop)]
            assert after.finish == "stop"
        else:
            assert after.tokens == before.tokens
            assert after.finish == "length"
    assert stopped[2].finish == "stop"
    assert generator.stats.prompt_tokens == 2 * sum(len(request.prompt) for request in requests)


@pytest.mark.parametrize("twin", TWINS)
def test_streaming_gives_the_same_tokens(tiny_folders: dict[str, Path], twin: Twin) -> None:
    request = requests_of(1)[0]
    generator = load_generator(twin, tiny_folders["grouped"], dtype="float32")
    streamed = list(generator.stream(request, temperature=1.0, top_p=0.9, stop_ids=NEVER))
    assert streamed == all_of(generator, [request])[0].tokens
    assert len(streamed) == 12


@pytest.mark.parametrize("twin", TWINS)
def test_the_context_bounds_a_request(tiny_folders: dict[str, Path], twin: Twin) -> None:
    generator = load_generator(twin, tiny_folders["plain"], dtype="float32")
    long = GenerateRequest(prompt=[7] * 125, seed=0, max_new_tokens=50)
    assert len(all_of(generator, [long])[0].tokens) == 3
    cases = {
        "is empty": GenerateRequest(prompt=[], seed=0, max_new_tokens=1),
        "outside 0..319": GenerateRequest(prompt=[320], seed=0, max_new_tokens=1),
        "context holds 128": GenerateRequest(prompt=[1] * 128, seed=0, max_new_tokens=1),
        "max_new_tokens is 0": GenerateRequest(prompt=[1], seed=0, max_new_tokens=0),
    }
    for words, request in cases.items():
        with pytest.raises(ValueError, match=words):
            all_of(generator, [request])


@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_sampling_follows_the_distribution(top_p: float) -> None:
    """Evenly spaced draws must hit every kept token in proportion to its probability, and no other."""
    logits = np.log(np.array([0.05, 0.4, 0.2, 0.05, 0.3]))
    kept = {0.5: [1, 4], 0.9: [1, 4, 2], 1.0: [0, 1, 2, 3, 4]}[top_p]
    mass = np.exp(logits)[kept] / np.exp(logits)[kept].sum()
    draws = [(i + 0.5) / 2000 for i in range(2000)]
    rows = np.tile(logits.astype(np.float32), (2000, 1))
    for chosen in (
        np.asarray(torch_generate.sample(torch.from_numpy(rows), draws, 1.0, top_p)),
        np.array(mlx_generate.sample(mx.array(rows), draws, 1.0, top_p)),
    ):
        shares = {int(token): float((chosen == token).mean()) for token in np.unique(chosen)}
        assert set(shares) == set(kept)
        for token, expected in zip(kept, mass, strict=True):
            assert shares[token] == pytest.approx(expected, abs=2e-3)


def test_sampling_looks_further_when_the_distribution_is_flat() -> None:
    """Over 1000 equal tokens the first 128 hold too little probability for top_p 0.9."""
    draws = [(i + 0.5) / 500 for i in range(500)]
    chosen = torch_generate.sample(torch.zeros(500, 1000), draws, 1.0, 0.9)
    assert len(set(chosen.tolist())) > 440


def test_temperature_sharpens() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.4]])).repeat(1000, 1)
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    share = float((torch_generate.sample(logits, draws, 0.5, 1.0) == 0).float().mean())
    assert share == pytest.approx(0.36 / (0.36 + 0.16), abs=2e-3)


# -- scoring -------------------------------------------------------------------------------------


def score_requests() -> list[ScoreRequest]:
    random = np.random.default_rng(2)
    question = random.integers(0, 300, 30).tolist()
    shared = [ScoreRequest(tokens=question + random.integers(0, 300, n).tolist(), first=30) for n in (1, 4, 9, 4)]
    single = [
        ScoreRequest(tokens=random.integers(0, 300, n).tolist(), first=first)
        for n, first in ((50, 1), (3, 2), (80, 70), (12, 12), (100, 40))
    ]
    return [single[0], *shared[:2], *single[1:3], *shared[2:], *single[3:]]


def reference(folder: Path, request: ScoreRequest) -> list[float]:
    model = torch_model.load_model(folder, "float32")
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([request.tokens]))[0].double(), dim=-1)
    return [float(logs[at - 1, request.tokens[at]]) for at in range(request.first, len(request.tokens))]


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("kind", ["plain", "grouped", "scaled"])
@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_scores_equal_the_plain_model(tiny_folders: dict[str, Path], kind: str, twin: Twin, batch_tokens: int) -> None:
    requests = score_requests()
    seen: list[tuple[int, int]] = []
    scores = load_scorer(twin, tiny_folders[kind], dtype="float32").logprobs(
        requests, batch_tokens=batch_tokens, progress=lambda done, total: seen.append((done, total))
    )
    for request, values in zip(requests, scores, strict=True):
        assert values == pytest.approx(reference(tiny_folders[kind], request), abs=2e-5)
    assert seen[-1] == (9, 9)
    assert seen == sorted(seen)


@pytest.mark.parametrize("twin", TWINS)
def test_probabilities_of_all_tokens_sum_to_one(tiny_folders: dict[str, Path], twin: Twin) -> None:
    requests = [ScoreRequest(tokens=[3, 4, token], first=2) for token in range(320)]
    values = load_scorer(twin, tiny_folders["plain"], dtype="float32").logprobs(requests)
    assert sum(math.exp(value) for [value] in values) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("twin", TWINS)
def test_impossible_score_requests_are_refused(tiny_folders: dict[str, Path], twin: Twin) -> None:
    scorer = load_scorer(twin, tiny_folders["plain"], dtype="float32")
    cases = {
        "first is 0": ScoreRequest(tokens=[1, 2], first=0),
        "first is 3": ScoreRequest(tokens=[1, 2], first=3),
        "outside": ScoreRequest(tokens=[1, 320], first=1),
        "context holds 128": ScoreRequest(tokens=[1] * 129, first=1),
    }
    for words, request in cases.items():
        with pytest.raises(ValueError, match=words):
            scorer.logprobs([request])
    assert scorer.logprobs([]) == []


def test_bfloat16_scores_are_close(tiny_folders: dict[str, Path]) -> None:
    requests = score_requests()
    for twin in TWINS:
        low, high = (load_scorer(twin, tiny_folders["grouped"], dtype=d).logprobs(requests) for d in DTYPES)
        for one, other in zip(low, high, strict=True):
            assert one == pytest.approx(other, abs=0.05)


DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
