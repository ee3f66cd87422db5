"""INSID3 and the contrast map: clustering against SciPy, rules of the paper on small cases, whole images."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbone import PatchEncoder
from model.backbone.encoder import stage_features
from model.few_shot import insid3 as I
from model.few_shot.contrast import contrast
from util.data.wrong_supports import wrong_supports
from util.errors import UserError


def unit(*shape: int, seed: int = 0, axis: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=axis)


@pytest.mark.parametrize("seed", range(4))
def test_average_linkage_equals_scipy(seed: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    centres = unit(5, 8, seed=seed, axis=1)
    cells = F.normalize(centres[torch.arange(90) % 5] + 0.5 * unit(90, 8, seed=seed + 9, axis=1), dim=1).double()
    cells[7] = cells[3]
    similarity = (cells @ cells.T).clamp(-1, 1)
    tree = hierarchy.linkage((1 - similarity)[tuple(torch.triu_indices(90, 90, 1))].clamp(min=0).numpy(), "average")
    torch.testing.assert_close(I.average_linkage(similarity)[1].sort().values, torch.from_numpy(tree[:, 2]).sort().values)
    for cut in (0.05, 0.2, 0.4, 0.9):
        ours = I.average_linkage(similarity, cut)[0]
        theirs = torch.from_numpy(hierarchy.fcluster(tree, cut - 1e-12, "distance"))
        assert torch.equal(ours[:, None] == ours, theirs[:, None] == theirs)
        firsts = [ours.tolist().index(c) for c in range(int(ours.max()) + 1)]
        assert firsts == sorted(firsts)  # numbered by first occurrence


def test_all_equal_cells_are_one_region() -> None:
    assert I.find_regions(unit(4, 1, 1).expand(4, 5, 6), 0.6).unique().tolist() == [0]


def test_masks_on_the_grid() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:33, 16:32] = True  # the next row's centre is not reached
    assert I.grid_mask(mask, (4, 4)).nonzero().tolist() == [[1, 1]]
    first_pixel = torch.zeros(64, 64, dtype=torch.bool)
    first_pixel[32, 48] = True
    assert I.grid_mask(first_pixel, (4, 4)).nonzero().tolist() == [[2, 3]]
    specks = torch.zeros(64, 64, dtype=torch.bool)
    specks[1, 1] = specks[63, 63] = True
    assert I.grid_mask(specks, (4, 4)).nonzero().tolist() == [[2, 2]]
    with pytest.raises(UserError, match="without a foreground"):
        I.grid_mask(torch.zeros(64, 64, dtype=torch.bool), (4, 4))


def test_candidates_need_similarity_and_half_of_the_votes() -> None:
    target, supports = unit(6, 3, 4), unit(3, 6, 3, 4, seed=1, axis=1)
    masks = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    for K, needed in ((1, 1), (2, 1), (3, 2)):
        found = I.find_candidates(target, supports[:K], masks[:K], unit(6))
        for i in range(12):
            row, column = divmod(i, 4)
            cell, votes = target[:, row, column], 0
            for support, mask in zip(supports[:K], masks[:K], strict=True):
                best = max(range(12), key=lambda j: float(cell @ support[:, j // 4, j % 4]))
                votes += int(mask.flatten()[best])
            assert found.votes[row, column] == votes
            assert found.cells[row, column] == (votes >= needed and float(cell @ unit(6)) > 0)
    low = I.find_candidates(-target.abs(), supports, masks, torch.ones(6))
    assert int(low.forward.sum()) == 2  # the tenth of 12 cells above the quantile


@pytest.fixture(scope="module")
def system() -> I.INSID3:
    torch.manual_seed(0)
    encoder = PatchEncoder("vit_tiny_patch16_224").eval().requires_grad_(False)
    return I.INSID3(encoder, side=128, components=10)


def scene(seed: int, place: int) -> tuple[Tensor, Tensor]:
    """A striped square on noise, 3 S S, and its mask."""
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(seed)) * 40
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[place : place + 48, place : place + 48] = True
    stripes = 255 * (torch.arange(128) // 4 % 2).expand(3, 128, 128)
    return torch.where(mask, stripes, image), mask


def test_it_finds_the_object_again(system: I.INSID3) -> None:
    (target, truth), (support, mask) = scene(0, 64), scene(1, 16)
    found = system.predict(target, support[None], mask[None])
    assert (found & truth).sum() / (found | truth).sum() > 0.7
    twice = system.predict(target, support.expand(2, -1, -1, -1), mask.expand(2, -1, -1))
    assert torch.equal(found, twice)
    other, _ = scene(2, 40)
    dropped = system.predict(target, torch.stack([support, other]), torch.stack([mask, torch.zeros_like(mask)]))
    assert torch.equal(found, dropped)  # a support without an object says nothing
    assert system.predict(target, support[None], mask[None], (60, 90)).shape == (60, 90)
    torch.testing.assert_close(system.projector @ system.projector, system.projector, atol=1e-5, rtol=0)
    assert abs(float(system.projector.trace()) - 10) < 1e-3


def test_the_crf_changes_the_strip_only(system: I.INSID3) -> None:
    (target, _), (support, mask) = scene(0, 64), scene(1, 16)
    plain = system.predict(target, support[None], mask[None])
    band = I.Band.of(plain)

    def grow(image: Tensor, unary: Tensor) -> Tensor:
        return torch.stack([-torch.ones_like(unary), torch.ones_like(unary)])

    refined = I.INSID3(system.encoder, 128, 10, crf=grow).predict(target, support[None], mask[None])
    assert torch.equal(refined, band.around) and (band.around > plain).any() and (plain > band.core).any()


def test_no_candidate_no_mask() -> None:
    target, nothing = unit(6, 3, 4), torch.zeros(3, 4, dtype=torch.bool)
    regions = I.judge_regions(nothing.long(), target, target, nothing, unit(6), 0.2)
    assert regions.seed == -1 and not regions.mask.any()


def test_what_it_refuses(system: I.INSID3) -> None:
    with pytest.raises(UserError, match="no multiple of the patch"):
        I.INSID3(system.encoder, side=100)
    for components in (-1, 63, 500):  # 64 cells
        with pytest.raises(UserError, match="choose 1 to 62"):
            _ = I.INSID3(system.encoder, side=128, components=components).projector
    (target, _), (support, mask) = scene(0, 64), scene(1, 16)
    with pytest.raises(UserError, match="no support"):
        system.predict(target, support[None], torch.zeros_like(mask)[None])


def test_contrast() -> None:
    target, supports = unit(6, 3, 4), unit(2, 6, 3, 4, seed=1, axis=1)
    annotation = torch.zeros(6, 8, dtype=torch.uint8)
    annotation[:2, :4] = 1  # cells (0, 0) and (0, 1)
    annotation[2:4] = 255  # row 1 counts as neither
    full = torch.ones(6, 8, dtype=torch.uint8)  # no background
    empty = torch.zeros(6, 8, dtype=torch.uint8)  # left out
    ours = contrast(target, torch.cat([supports, supports[:1]]), [annotation, full, empty])
    one, two = supports.unbind(0)
    object_ = F.normalize((one[:, 0, :2].mean(1) + two.flatten(1).mean(1)) / 2, dim=0)
    around = torch.cat([one[:, 0, 2:], one[:, 2]], 1).mean(1)
    expected = torch.einsum("chw,c->hw", target, object_ - F.normalize(around, dim=0))
    torch.testing.assert_close(ours, expected)
    with pytest.raises(UserError, match="no support"):
        contrast(target, supports[:1], [empty])
    stages = stage_features(torch.randn(2, 8, 6, 6) * 9, torch.randn(2, 16, 3, 3))
    torch.testing.assert_close(stages.norm(dim=1), torch.ones(2, 6, 6))
    torch.testing.assert_close(stages[:, :8].norm(dim=1), torch.full((2, 6, 6), 0.5**0.5))


def test_wrong_supports() -> None:
    assert wrong_supports([0, 0, 1], ["a", "b", "c"], [["x"], ["c"], ["b"]]) == [2, -1, 0]
