"""Kernels that exchange values between ranks, here of one process: one after the other, where what the others send lies
there before, or side by side on a GPU, if they are the same kernel (or one would be loaded while the other waits)."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from minivllm import kernels
from minivllm.kernels import Inbox, VocabShare, norm
from minivllm.parallel import TensorParallel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def open_inboxes(rows, senders, width, dtype, ranks):
    """An inbox for each rank."""
    empty = Inbox.empty(dtype.itemsize * 8)
    shape = rows, 2, senders, width
    places = [torch.full(shape, empty, dtype=INTEGER.get(dtype, dtype), device=DEVICE) for _ in range(ranks)]
    addresses = torch.tensor([one.data_ptr() for one in places], device=DEVICE)
    return [
        Inbox(places[rank], addresses, torch.zeros(rows, dtype=torch.int32, device=DEVICE), rank)
        for rank in range(ranks)
    ]


def sender(inbox, rank, receiver):
    """Which of its places in the receiver's inbox are the rank's."""
    return rank - (rank > receiver) if inbox.places.shape[2] < inbox.size else rank


def run_ranks(inboxes, call, messages, same_kernel=True, sends=None):
    """call(rank) for all; `messages`: [ranks, rows, width], what each rank will send (but for rounding if the kernels
    are not the same), to all others, or to those for which sends(rank, other, row)."""
    messages = torch.where(messages == 0, 0, messages)  # −0.0 goes as 0.0
    sends = sends or (lambda rank, other, row: True)
    _, num_rows, width = messages.shape
    results = []
    for rank, inbox in enumerate(inboxes):
        if DEVICE == "cpu" or not same_kernel:
            others = [peer for peer in range(len(inboxes)) if peer != rank]
            turns = (inbox.turns[:num_rows] % 2).tolist()
            for row, turn in enumerate(turns):
                for peer in others:
                    if sends(peer, rank, row):
                        message = messages[peer, row].contiguous().view(inbox.places.dtype)
                        inbox.places[row, turn, sender(inbox, peer, rank), :width] = message
            before = [one.places.clone() for one in inboxes]
            results.append(call(rank))
            for peer in others:  # what this one has sent, as the others would find it
                for row, turn in enumerate(turns):
                    sent = inboxes[peer].places[row, turn, sender(inbox, rank, peer), :width]
                    if not sends(rank, peer, row):
                        assert (sent == Inbox.empty(sent.element_size() * 8)).all()
                    elif same_kernel:
                        assert torch.equal(sent, messages[rank, row].view(sent.dtype)), "to the bit"
                inboxes[peer].places.copy_(before[peer])
        else:
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append(call(rank))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert all((inbox.places == Inbox.empty(inbox.places.element_size() * 8)).all() for inbox in inboxes)
    return results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "size", "ranks", "owned"),
    [(1, 4096, 2, 0), (5, 64, 2, 0), (3, 160, 3, 0), (2, 5120, 4, 0), (5, 160, 3, 1), (2, 5120, 4, 1), (5, 64, 4, 2)],
)
def test_sum_rms_norm(rows, size, ranks, owned, dtype, monkeypatch):
    """Added up by each rank, by an owner of each row (1), or by turns (2)."""
    if owned and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter rounds bfloat16 toward zero")
    generator = torch.Generator().manual_seed(rows * size + ranks)
    inboxes = open_inboxes(8, ranks - 1, size, dtype, ranks)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    weight = draw(size)
    # Turns are counted row by row: steps of other lengths come between.
    for turn, (num_rows, with_residual) in enumerate(
        [(rows, True), (1, True), (rows, False), (8, True), (rows, True), (rows, True)]
    ):
        by_owner = owned == 1 or (owned == 2 and turn % 2 == 1)
        monkeypatch.setattr(norm, "OWNED_BYTES", 0 if by_owner else 1 << 30)
        x, residual = draw(ranks, num_rows, size), draw(num_rows, size)
        x[:, :, ::7] = -0.0
        total = x.float().sum(0) + (residual.float() if with_residual else 0)
        summed = torch.zeros(num_rows, size, device=DEVICE)
        for one in x:
            summed += one.float()  # in this order, to the bit
        before = residual.float() if with_residual else 0
        owners = torch.arange(ranks)[:, None, None] == (torch.arange(num_rows) % ranks)[None, :, None]
        owners = owners.to(DEVICE)
        rounded = total.to(dtype).float()
        expected = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
        outs = run_ranks(
            inboxes,
            lambda rank, x=x, residual=residual, given=with_residual: kernels.sum_rms_norm(
                x[rank].clone(), residual.clone() if given else None, weight, 1e-5, inboxes[rank]
            ),
            torch.where(owners, (summed + before).to(dtype), x) if by_owner else x,
            sends=(lambda rank, other, row: row % ranks in (rank, other)) if by_owner else None,
        )
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for normed, summed in outs:
            assert torch.equal(summed, outs[0][1]), "the same on all ranks"
            torch.testing.assert_close(summed.float(), total, rtol=tolerance, atol=tolerance)
            if DEVICE == "cuda" or dtype != torch.bfloat16:  # products of which the interpreter gets wrong
                assert torch.equal(normed, outs[0][0]), "the same on all ranks"
                torch.testing.assert_close(normed.float(), expected, rtol=tolerance, atol=tolerance)
    assert all(inbox.turns[0] == 6 for inbox in inboxes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("num_others", [1, 3])
def test_sum_rms_norm_of_what_is_there(num_others, with_residual, dtype):
    """Addends are rows of a longer buffer."""
    generator = torch.Generator().manual_seed(num_others)
    x, residual, weight, rest = (
        torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
        for shape in ((3, 160), (3, 160), (160,), (num_others, 5, 160))
    )
    addends = rest[:, :3]
    total = x.float() + addends.float().sum(0) + (residual.float() if with_residual else 0)
    rounded = total.to(dtype).float()
    expected = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    normed, summed = kernels.sum_rms_norm(x, residual if with_residual else None, weight, 1e-5, addends)
    assert summed is (residual if with_residual else x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(summed.float(), total, rtol=tolerance, atol=tolerance)
    if DEVICE == "cuda" or dtype != torch.bfloat16:
        torch.testing.assert_close(normed.float(), expected, rtol=tolerance, atol=tolerance)


def test_flags_are_waited_for():
    """All of them."""
    flags = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    kernels.await_flags(flags, 0)
    if DEVICE == "cuda":  # set from another stream, once the kernel is loaded
        torch.cuda.synchronize()
        side, done = torch.cuda.Stream(), torch.cuda.Event()
        one = torch.ones(1, dtype=torch.int32, device=DEVICE)
        kernels.await_flags(flags, 1)
        done.record()
        for i in range(3):
            time.sleep(0.02)
            assert not done.query()
            with torch.cuda.stream(side):
                flags[i : i + 1].copy_(one)
        done.synchronize()
        return
    waiting = threading.Thread(target=kernels.await_flags, args=(flags, 1))
    waiting.start()
    for i in range(3):
        waiting.join(0.05)
        assert waiting.is_alive()
        flags[i] = 1
    waiting.join(20)
    assert not waiting.is_alive()


def test_sums_of_more_rows_than_an_inbox_has_are_added_up_at_once(monkeypatch):
    added = []
    monkeypatch.setattr(torch.distributed, "all_reduce", added.append)
    [inbox, _] = open_inboxes(4, 1, 64, torch.float32, 2)
    tp = TensorParallel(0, 2, inbox, None)
    few, many = torch.ones(4, 64), torch.ones(5, 64)
    double = torch.nn.Linear(64, 64, bias=False)
    double.weight = torch.nn.Parameter(2 * torch.eye(64), requires_grad=False)
    summand = tp.sum(double, few)
    assert torch.equal(summand.value, 2 * few) and summand.addends is inbox and not added
    assert tp.sum(double, many) is added[0] and torch.equal(added[0], 2 * many)
    assert torch.equal(TensorParallel().sum(double, many), 2 * many) and len(added) == 1
    rows = SimpleNamespace(more_than=4, sum=lambda linear, x: ("shared out", linear(x)))
    tp = TensorParallel(0, 2, inbox, None, rows)
    assert tp.sum(double, few).addends is inbox and tp.sum(double, many)[0] == "shared out" and len(added) == 1


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # of the interpreter
@pytest.mark.parametrize(("vocab", "ranks"), [(20000, 2), (4097, 3), (150, 2), (33000, 4)])
def test_ranks_draw_as_one(vocab, ranks):
    """The same tokens as from all logits at once, greedy or not."""
    rows = 6
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(DEVICE)
    logits[1] = -0.0  # all equal: greedily the first
    logits[2, : vocab // 2] = float("-inf")
    logits[3, 7] = logits[3, -1] = 50.0  # the best one twice
    temperature = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.7, 1.5], device=DEVICE)
    seeds = torch.arange(rows, device=DEVICE) + 1234567891011
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    size = -(-vocab // (4096 * ranks)) * 4096
    inboxes = open_inboxes(rows, ranks, 4, torch.int32, ranks)
    for turn in range(4):
        positions = torch.full((rows,), turn, dtype=torch.int32, device=DEVICE)
        arguments = temperature, seeds, positions

        def draw(logits, *share, arguments=arguments):
            last_token = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
            return kernels.sample(logits, *arguments, last_token, slots, *share), last_token

        expected = draw(logits)
        messages = torch.stack([message(logits[:, i * size : (i + 1) * size], *arguments, i * size)
                                for i in range(ranks)]).to(DEVICE)  # fmt: skip
        drawn = run_ranks(
            inboxes,
            lambda rank, draw=draw: draw(
                logits[:, rank * size : (rank + 1) * size], VocabShare(rank * size, inboxes[rank])
            ),
            messages,
            same_kernel=False,
        )
        assert all(torch.equal(tokens, expected[0]) for pair in [expected, *drawn] for tokens in pair)


def message(logits, temperature, seeds, positions, first_id):
    """What a rank sends of its logits: the greatest one, the score of the token drawn, the token.  [rows, 3] int32."""
    from minivllm.backends import torch_backend

    logits, temperature, seeds, positions = (one.cpu() for one in (logits, temperature, seeds, positions))
    rows, vocab = logits.shape
    words = torch.zeros(rows, 3, dtype=torch.int32)
    for row in range(rows):
        own, temp = logits[row], float(temperature[row])
        top, score, token = torch.tensor(float("-inf")), torch.tensor(float("-inf")), 0x7FFFFFFF
        if vocab:
            top, token = own.max(), int((own == own.max()).nonzero()[0]) + first_id
        if vocab and temp > 0:
            seed, position = seeds[row : row + 1], positions[row : row + 1]
            splits = own.split(4096)
            masses = torch.stack([((split - top) / temp).exp().sum() for split in splits])
            ids = torch.arange(len(splits)) + first_id // 4096 + torch_backend.FIRST_SPLIT
            scores = masses.log() + torch_backend.gumbel_noise(seed, position, ids)[0]
            score, best = scores.max(), int(scores.argmax())
            inside = torch.arange(len(splits[best])) + first_id + best * 4096
            noise = torch_backend.gumbel_noise(seed, position, inside)[0]
            token = int(inside[(splits[best] / temp + noise).argmax()])
        for place, value in enumerate((top, score)):
            words[row, place] = value.float().view(torch.int32)
        words[row, 2] = token
    return torch.where(words == Inbox.empty(32), 0, words)
