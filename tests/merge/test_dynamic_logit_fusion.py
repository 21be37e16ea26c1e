"""Dynamic Logits Fusion's weights: against dense searches in float64, closed forms, and the derivatives' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from folklora.merge.dynamic_logit_fusion import Shift, divergences, fuse, fusion_weights, transfer

EXACT = 1e-10
GRID = torch.linspace(0, 2, 2001, dtype=torch.float64)


@pytest.fixture
def logits() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`logits(seed, rows=(), specialists=1, vocabulary=20, moved=1.0)`: large, small, specialists; float64."""

    def draw(
        seed: int, rows: tuple[int, ...] = (), specialists: int = 1, vocabulary: int = 20, moved: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        large, small = 2 * torch.randn(2, *rows, vocabulary, generator=generator, dtype=torch.float64)
        change = torch.randn(specialists, *rows, vocabulary, generator=generator, dtype=torch.float64)
        return large, small, small + moved * change

    return draw


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P||Q) of log probabilities."""
    return (p.exp() * (p - q)).sum(dim=-1)


def curves(large: Tensor, small: Tensor, specialist: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P̃||P) and KL(P||P̃) on the grid of α, from the paper's definition."""
    start = large.log_softmax(-1)
    fused = (large + GRID[:, None] * (specialist - small)).log_softmax(-1)
    return kl(fused, start), kl(start, fused)


def squares(large: Tensor, small: Tensor, specialists: Tensor, moving: int, objective: str = "symmetric") -> Tensor:
    """The paper's objective for the targets of all specialists on the grid of α of one of them."""
    f, r = curves(large, small, specialists[moving])
    before, total = small.log_softmax(-1), torch.zeros_like(GRID)
    for specialist in specialists:
        after = specialist.log_softmax(-1)
        total += (objective != "reverse") * (f - kl(after, before)) ** 2
        total += (objective != "forward") * (r - kl(before, after)) ** 2
    return total


@pytest.mark.parametrize("objective", ["symmetric", "forward", "reverse"])
@pytest.mark.parametrize("moved", [0.1, 1.0, 3.0, 6.0])
def test_one_specialist_gets_the_weight_of_a_dense_search(logits, objective, moved):
    for seed in range(9):
        large, small, specialists = logits(seed, vocabulary=(5, 20, 100)[seed % 3], moved=moved)
        change = Shift.between(small, specialists)
        (alpha,) = fusion_weights(large, change, objective=objective, tolerance=EXACT)
        found = squares(large, small, specialists, 0, objective)
        assert abs(alpha - GRID[found.argmin()]) <= GRID[1] * (1 + 1e-9)
        _, value = transfer(
            large, change.delta[0], change.forward[0], change.reverse[0], objective=objective, tolerance=EXACT
        )
        assert value <= found.min() + 1e-12


@pytest.mark.parametrize("count", [2, 3])
def test_several_specialists_get_the_weights_of_a_dense_search_over_all(logits, count):
    for seed in range(9):
        large, small, specialists = logits(seed, specialists=count, moved=(0.5, 2.0)[seed % 2])
        found = torch.stack([squares(large, small, specialists, t) for t in range(count)])
        moving, place = divmod(int(found.argmin()), len(GRID))
        alpha = fusion_weights(large, Shift.between(small, specialists), tolerance=EXACT)
        assert alpha.count_nonzero() == 1
        assert abs(alpha[moving] - GRID[place]) <= GRID[1] * (1 + 1e-9)


def test_alpha_of_0_is_the_large_model_bit_for_bit(logits):
    for dtype in (torch.float32, torch.float64):
        large, small, specialists = (part.to(dtype) for part in logits(0, (3,), 2))
        change = Shift.between(small, specialists)
        assert torch.equal(fuse(large, change, torch.zeros(3, 2, dtype=dtype)), large.log_softmax(-1))


def test_alpha_of_1_everywhere_is_proxy_tuning(logits):
    large, small, specialists = logits(12, (3,), 2)
    expected = (large + specialists.sum(0) - 2 * small).softmax(-1)
    found = fuse(large, Shift.between(small, specialists), torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(found.exp(), expected)


def test_a_large_model_that_is_the_small_base_becomes_the_specialist(logits):
    _, small, specialists = logits(1, (4,))
    change = Shift.between(small, specialists)
    alpha = fusion_weights(small, change, tolerance=EXACT)
    torch.testing.assert_close(alpha, torch.ones_like(alpha), atol=1e-9, rtol=0)
    torch.testing.assert_close(fuse(small, change, alpha), specialists[0].log_softmax(-1), atol=1e-8, rtol=0)
    moved = divergences(small, change.delta[0], alpha[:, 0])
    torch.testing.assert_close(moved.f, change.forward[0], atol=1e-8, rtol=0)
    torch.testing.assert_close(moved.r, change.reverse[0], atol=1e-8, rtol=0)


def test_divergences_grow_as_their_derivatives_say(logits):
    large, small, specialists = logits(2)
    delta = Shift.between(small, specialists).delta[0]
    alpha, step = torch.linspace(0.1, 2, 39, dtype=torch.float64), 1e-5
    at, above, below = (divergences(large, delta, a) for a in (alpha, alpha + step, alpha - step))
    assert (at.f.diff() > 0).all()
    assert (at.r.diff() > 0).all()
    torch.testing.assert_close((above.f - below.f) / (2 * step), at.f_slope, atol=1e-6, rtol=0)
    torch.testing.assert_close((above.r - below.r) / (2 * step), at.r_slope, atol=1e-6, rtol=0)
    f, r = curves(large, small, specialists[0])
    found = divergences(large, delta, GRID)
    torch.testing.assert_close(found.f, f, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.r, r, atol=1e-12, rtol=0)


def test_one_divergence_alone_is_met_and_both_meet_between(logits):
    met = 0
    for seed in range(12):
        large, small, specialists = logits(seed)
        change = Shift.between(small, specialists)
        found = {
            objective: fusion_weights(large, change, objective=objective, tolerance=EXACT)[0]
            for objective in ("forward", "reverse", "symmetric")
        }
        if max(found["forward"], found["reverse"]) < 2 - 1e-6:
            met += 1
            f = divergences(large, change.delta[0], found["forward"]).f
            r = divergences(large, change.delta[0], found["reverse"]).r
            assert abs(f - change.forward[0]) < 1e-6
            assert abs(r - change.reverse[0]) < 1e-6
        low, high = sorted((found["forward"], found["reverse"]))
        assert low - 1e-9 <= found["symmetric"] <= high + 1e-9
    assert met > 6


def test_a_divergence_out_of_reach_takes_the_largest_alpha(logits):
    large, small, _ = logits(3)
    sure = small.clone()
    sure[large.argmax()] += 12
    change = Shift.between(small, sure[None])
    # the large model thinks much of that token already: f ≤ -log P(token), less than what fine-tuning moved
    assert change.forward[0] > -large.log_softmax(-1).max()
    alpha = fusion_weights(large, change, objective="forward", alpha_max=3.0, tolerance=EXACT)
    assert float(alpha) == pytest.approx(3.0)
    assert fusion_weights(large, change).isfinite().all()


def test_constants_in_logits_change_nothing(logits):
    large, small, specialists = logits(4, (3,), 2)
    change, moved = Shift.between(small, specialists), Shift.between(small - 7, specialists + torch.rand(2, 3, 1))
    alpha = fusion_weights(large, change, tolerance=EXACT)
    torch.testing.assert_close(fusion_weights(large + 50, moved, tolerance=EXACT), alpha, atol=1e-8, rtol=0)
    torch.testing.assert_close(fuse(large + 50, moved, alpha), fuse(large, change, alpha), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_specialist_that_learnt_nothing_has_no_weight(logits, dtype):
    large, small, _ = (part.to(dtype) for part in logits(5, (3,)))
    change = Shift.between(small, torch.stack([small, small + 3]))
    alpha = fusion_weights(large, change)
    assert torch.equal(alpha, torch.zeros(3, 2, dtype=dtype))
    torch.testing.assert_close(fuse(large, change, alpha), large.log_softmax(-1))


def test_rows_are_solved_each_by_itself(logits):
    large, small, specialists = logits(6, (2, 5), 3)
    change = Shift.between(small, specialists)
    together = fusion_weights(large, change, tolerance=EXACT)
    assert together.shape == (2, 5, 3)
    fused = fuse(large, change, together)
    for i in range(2):
        for j in range(5):
            alone = Shift.between(small[i, j], specialists[:, i, j])
            alpha = fusion_weights(large[i, j], alone, tolerance=EXACT)
            torch.testing.assert_close(together[i, j], alpha, atol=1e-9, rtol=0)
            torch.testing.assert_close(fused[i, j], fuse(large[i, j], alone, alpha), atol=1e-8, rtol=0)


def test_specialists_that_learnt_nothing_leave_another_ones_own_target_alone(logits):
    large, small, specialists = logits(7, (4,))
    several = Shift.between(small, torch.stack([small, specialists[0], small]))
    alone = Shift.between(small, specialists)
    own, _ = transfer(large, several.delta[1], several.forward[1], several.reverse[1], tolerance=EXACT)
    expected = fusion_weights(large, alone, tolerance=EXACT)
    torch.testing.assert_close(own[:, None], expected, atol=1e-12, rtol=0)
    # the targets of all three are nearer to nothing, and so is the weight that meets them
    alpha = fusion_weights(large, several, tolerance=EXACT)
    assert (alpha[:, 1] < expected[:, 0]).all()
    assert not alpha[:, [0, 2]].any()


def test_the_order_of_the_vocabulary_does_not_matter(logits):
    large, small, specialists = logits(8, (3,), 2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    change, moved = Shift.between(small, specialists), Shift.between(small[:, order], specialists[..., order])
    alpha = fusion_weights(large, change, tolerance=EXACT)
    torch.testing.assert_close(fusion_weights(large[:, order], moved, tolerance=EXACT), alpha, atol=1e-9, rtol=0)
    torch.testing.assert_close(fuse(large[:, order], moved, alpha), fuse(large, change, alpha)[:, order])


def test_banned_tokens_are_as_if_they_were_not_there(logits):
    large, small, specialists = logits(9, (3,), 2)
    kept = [i for i in range(20) if i not in (0, 7)]
    large[:, [0, 7]] = -torch.inf
    change = Shift.between(small, specialists, banned=large.isneginf())
    few = Shift.between(small[:, kept], specialists[..., kept])
    alpha = fusion_weights(large, change, tolerance=EXACT)
    torch.testing.assert_close(alpha, fusion_weights(large[:, kept], few, tolerance=EXACT), atol=1e-9, rtol=0)
    fused = fuse(large, change, alpha)
    torch.testing.assert_close(fused[:, kept], fuse(large[:, kept], few, alpha))
    assert fused[:, [0, 7]].isneginf().all()


def test_a_token_that_a_small_model_bans_does_not_count(logits):
    large, small, specialists = logits(10)
    specialists[0, 3] = -torch.inf
    change = Shift.between(small, specialists)
    assert change.delta[0, 3] == 0
    assert torch.stack([change.forward[0], change.reverse[0]]).isfinite().all()
    assert fuse(large, change, fusion_weights(large, change)).isfinite().all()


def test_float32_finds_what_float64_finds(logits):
    large, small, specialists = logits(11, (20,), 2, vocabulary=1000)
    alpha = fusion_weights(large, Shift.between(small, specialists), tolerance=EXACT)
    single = fusion_weights(large.float(), Shift.between(small.float(), specialists.float()))
    # where two specialists do as well, rounding may choose either
    agree = (alpha.argmax(-1) == single.argmax(-1)).float().mean()
    assert agree > 0.95
    torch.testing.assert_close(single.double().sum(-1), alpha.sum(-1), atol=0.01, rtol=0)
