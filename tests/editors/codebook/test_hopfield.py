import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horen_bench.editors.codebook.hopfield import energy, hopfield_map, refine

# One example is a whole codebook and a batch of starting points, so few examples go a long way.
theory = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
n_keys = st.integers(1, 12)
sizes = st.integers(2, 24)
betas = st.floats(0.1, 50.0)


def unit_rows(n: int, size: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(n, size, generator=generator, dtype=torch.float64), dim=-1)


def problem(seed: int, n: int, size: int) -> tuple[Tensor, Tensor]:
    """Unit keys `(n, size)` and eight starting points of any length `(8, size)`, float64."""
    generator = torch.Generator().manual_seed(seed)
    starts = 2 * torch.randn(8, size, generator=generator, dtype=torch.float64)
    return unit_rows(n, size, generator), starts


# --- Appendix D: the undamped map ----------------------------------------------------------------------


@theory
@given(seeds, n_keys, sizes, betas)
def test_one_update_lowers_the_energy_by_half_its_squared_length(seed: int, n: int, size: int, beta: float) -> None:
    """Lemma D.1."""
    keys, xi = problem(seed, n, size)
    after = hopfield_map(xi, keys, beta)
    drop = energy(xi, keys, beta) - energy(after, keys, beta)
    assert (drop >= 0.5 * (after - xi).square().sum(dim=-1) - 1e-12).all()


@theory
@given(seeds, n_keys, sizes, betas)
def test_updates_never_raise_the_energy_and_end_in_a_fixed_point(seed: int, n: int, size: int, beta: float) -> None:
    """Theorem 2.1."""
    keys, xi = problem(seed, n, size)
    level = energy(xi, keys, beta)
    for _ in range(1000):
        xi = hopfield_map(xi, keys, beta)
        previous, level = level, energy(xi, keys, beta)
        assert (level <= previous + 1e-12).all()
    assert (hopfield_map(xi, keys, beta) - xi).norm(dim=-1).max() < 1e-4


@theory
@given(seeds, n_keys, sizes, betas, st.integers(1, 60))
def test_the_path_is_no_longer_than_the_energy_allows(seed: int, n: int, size: int, beta: float, n_steps: int) -> None:
    """Proposition 2.2 with `E_min = -log(C)/beta - 1/2`."""
    keys, xi = problem(seed, n, size)
    room = energy(xi, keys, beta) + math.log(n) / beta + 0.5
    squared_lengths = []
    for _ in range(n_steps):
        after = hopfield_map(xi, keys, beta)
        squared_lengths.append((after - xi).square().sum(dim=-1))
        xi = after
    steps = torch.stack(squared_lengths)
    assert (energy(xi, keys, beta) >= -math.log(n) / beta - 0.5 - 1e-12).all()
    assert (steps.sum(dim=0) <= 2 * room + 1e-12).all()
    assert (steps.min(dim=0).values.sqrt() <= (2 * room / n_steps).sqrt() + 1e-12).all()


def test_energy_and_map_of_two_keys_worked_out_by_hand() -> None:
    # beta = ln 3, q = (1, 0): weights 3/4 and 1/4; sum of exponentials 3 + 1.
    keys, q, beta = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0]]).double(), math.log(3)
    torch.testing.assert_close(hopfield_map(q, keys, beta), torch.tensor([[0.75, 0.25]]).double())
    expected = 0.5 - math.log(4) / math.log(3)
    torch.testing.assert_close(energy(q, keys, beta), torch.tensor([expected]).double())


# --- Eqs. 2-3: damped and projected --------------------------------------------------------------------


def test_refinement_of_two_keys_worked_out_by_hand() -> None:
    # The retrieval (3/4, 1/4) has direction atan(1/3) = 18.4349 degrees; half of the way between two unit
    # vectors, back on the circle, is their bisector: 9.2175 degrees.
    keys, q = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0]]).double()
    half_angle = math.atan(1 / 3) / 2
    expected = torch.tensor([[math.cos(half_angle), math.sin(half_angle)]]).double()
    refined = refine(q, keys, beta=math.log(3), alpha=0.5, steps=1, eps=0.0)
    torch.testing.assert_close(refined, expected)


def test_without_projection_the_step_is_the_plain_damped_average() -> None:
    # 0.9 * (2, 0) + 0.1 * Phi, with Phi = (9, 1)/10 because 2 ln 3 = ln 9.
    keys, q = torch.eye(2, dtype=torch.float64), torch.tensor([[2.0, 0.0]]).double()
    refined = refine(q, keys, beta=math.log(3), alpha=0.1, steps=1, eps=0.0, normalize=False)
    torch.testing.assert_close(refined, torch.tensor([[1.89, 0.01]]).double())


@theory
@given(seeds, n_keys, sizes, st.floats(0.0, 0.95), st.integers(1, 5))
def test_refined_queries_stay_on_the_unit_sphere(seed: int, n: int, size: int, alpha: float, steps: int) -> None:
    keys, starts = problem(seed, n, size)
    refined = refine(F.normalize(starts, dim=-1), keys, beta=20.0, alpha=alpha, steps=steps, eps=1e-5)
    torch.testing.assert_close(refined.norm(dim=-1), torch.ones(8).double())


@pytest.mark.parametrize(("steps", "alpha"), [(0, 0.1), (3, 0.0)])
def test_no_steps_or_no_damping_leaves_queries_alone(steps: int, alpha: float) -> None:
    keys, starts = problem(1, 5, 8)
    q = F.normalize(starts, dim=-1)
    torch.testing.assert_close(refine(q, keys, beta=20.0, alpha=alpha, steps=steps, eps=1e-5), q, rtol=0, atol=1e-15)


def test_a_query_that_has_arrived_stays_while_others_of_its_batch_move() -> None:
    # |r - q| is about 1.4 for the second row; the first is its own retrieval, up to e^-20.
    keys = torch.eye(2)[:1]
    q = torch.tensor([[1.0, 1e-6], [0.0, 1.0]])
    refined = refine(q, keys, beta=20.0, alpha=0.5, steps=1, eps=1e-5)
    assert torch.equal(refined[0], q[0])
    torch.testing.assert_close(refined[1], torch.tensor([0.5, 0.5]).sqrt())


def test_steps_go_on_from_where_the_last_one_ended() -> None:
    keys, starts = problem(3, 6, 10)
    q = F.normalize(starts, dim=-1)
    step_by_step = q
    for _ in range(4):
        step_by_step = refine(step_by_step, keys, beta=20.0, alpha=0.1, steps=1, eps=1e-5)
    assert torch.equal(refine(q, keys, beta=20.0, alpha=0.1, steps=4, eps=1e-5), step_by_step)
    assert not torch.allclose(q, step_by_step, atol=1e-2)


@theory
@given(seeds, n_keys, sizes, st.integers(1, 3))
def test_the_zero_first_key_of_the_release_is_inert(seed: int, n: int, size: int, steps: int) -> None:
    keys, starts = problem(seed, n, size)
    q = F.normalize(starts, dim=-1)
    with_dummy = torch.cat([keys.new_zeros(1, size), keys])
    torch.testing.assert_close(
        refine(q, with_dummy, beta=20.0, alpha=0.1, steps=steps, eps=1e-5),
        refine(q, keys, beta=20.0, alpha=0.1, steps=steps, eps=1e-5),
        rtol=0,
        atol=1e-12,
    )


@theory
@given(seeds, n_keys, sizes, st.integers(1, 3))
def test_a_hidden_key_is_as_good_as_absent(seed: int, n: int, size: int, steps: int) -> None:
    keys, starts = problem(seed, n, size)
    q = F.normalize(starts, dim=-1)
    hidden = torch.rand(8, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    hidden[:, 0] = False
    refined = refine(q, keys, beta=20.0, alpha=0.1, steps=steps, eps=1e-5, hidden=hidden)
    for row in range(8):
        alone = refine(q[row : row + 1], keys[~hidden[row]], beta=20.0, alpha=0.1, steps=steps, eps=1e-5)
        torch.testing.assert_close(refined[row : row + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("c", [-0.9, -0.3, 0.0, 0.35, 0.55, 0.8, 0.99])
def test_one_step_lifts_the_cosine_to_a_lone_key_by_the_closed_form(c: float) -> None:
    key = torch.tensor([[1.0, 0.0]]).double()
    q = torch.tensor([[c, math.sqrt(1 - c * c)]], dtype=torch.float64)
    lifted = (refine(q, key, beta=20.0, alpha=0.1, steps=1, eps=0.0) @ key.T).item()
    assert lifted == pytest.approx((0.9 * c + 0.1) / math.sqrt(0.82 + 0.18 * c), abs=1e-12)


@theory
@given(seeds, n_keys, sizes)
def test_one_step_turns_a_query_by_no_more_than_the_damping_allows(seed: int, n: int, size: int) -> None:
    # (1-a) q + a r for unit q, r turns q by at most asin(a / (1-a)); no cosine can gain more than that.
    keys, starts = problem(seed, n, size)
    q = F.normalize(starts, dim=-1)
    turned = refine(q, keys, beta=20.0, alpha=0.1, steps=1, eps=0.0)
    before = (q @ keys.T).clamp(-1, 1).acos()
    after = (turned @ keys.T).clamp(-1, 1).acos()
    assert (before - after).abs().max() <= math.asin(1 / 9) + 1e-7
