import numpy as np
import pytest
import torch

from nnunetv2_selfreg.losses.kmax import KMaxLoss, class_shares, query_distribution_loss


def numpy_loss(log_assignment, labels, ignore=None):
    """Over all voxels of full resolution, each with the assignment of the coarse voxel around it."""
    batch, _, *shape = log_assignment.shape
    factors = [n // m for n, m in zip(labels.shape[2:], shape, strict=True)]
    total, count = 0.0, 0
    for place in np.ndindex(batch, *labels.shape[2:]):
        label = labels[(place[0], 0, *place[1:])]
        if label == ignore:
            continue
        coarse = tuple(p // f for p, f in zip(place[1:], factors, strict=True))
        total -= log_assignment[(place[0], int(label), *coarse)]
        count += 1
    return total / count


@pytest.mark.parametrize(("shape", "coarse"), [((4, 6), (4, 6)), ((4, 6), (2, 3)), ((4, 4, 6), (2, 1, 3))])
@pytest.mark.parametrize("ignore", [None, 3])
def test_loss_against_numpy(shape, coarse, ignore):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, *coarse, generator=generator).log_softmax(1)
    labels = torch.randint(0, 3 if ignore is None else 4, (2, 1, *shape), generator=generator)
    result = query_distribution_loss(logits, class_shares(labels.float(), coarse, 3))
    assert float(result) == pytest.approx(numpy_loss(logits.numpy(), labels.numpy(), ignore), rel=1e-5)


def test_gradient_is_right():
    logits = torch.randn(1, 3, 2, 2, dtype=torch.double, requires_grad=True)
    shares = class_shares(torch.randint(0, 3, (1, 1, 4, 4)), (2, 2), 3)
    assert torch.autograd.gradcheck(lambda x: query_distribution_loss(x.log_softmax(1), shares), logits)


def test_without_a_label_it_is_zero_and_so_is_its_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    shares = class_shares(torch.full((1, 1, 4, 4), 3), (2, 2), 3)
    loss = query_distribution_loss(logits.log_softmax(1), shares)
    loss.backward()
    assert float(loss) == 0
    assert (logits.grad == 0).all()


def test_shares_of_coarse_voxels():
    labels = torch.tensor([[0, 0, 1, 3], [0, 2, 1, 3]])[None, None]
    shares = class_shares(labels, (1, 2), 3)  # 3 is the ignore label
    torch.testing.assert_close(shares[0, :, 0], torch.tensor([[0.75, 0], [0, 0.5], [0.25, 0]]))


class Sum(torch.nn.Module):
    def loss(self, output, target):
        return output.sum() + target.sum()

    def forward(self, outputs, targets):
        return sum(self.loss(*pair) for pair in zip(outputs, targets, strict=True))


class Output:
    segmentation = torch.full((1, 2, 2, 1), 3.0)
    convolutional = (torch.full((1, 2, 2, 1), 1.0), torch.full((1, 2, 1, 1), 2.0))
    log_assignments = (torch.tensor([0.25, 0.75]).reshape(1, 2, 1, 1).log(), torch.full((1, 2, 2, 1), 0.5).log())


def test_sum_of_the_terms():
    target = [torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 1, 1)]
    loss = KMaxLoss(Sum(), query_weight=0.5)
    total = loss(Output, target)
    expected = {"query_segmentation": 12, "convolutional": 4 + 4, "query_distribution": (np.log(2) + np.log(4)) / 2}
    assert {name: float(term) for name, term in loss.terms.items()} == pytest.approx(expected)
    assert float(total) == pytest.approx(20 + 0.5 * expected["query_distribution"])


def test_each_layer_is_compared_with_the_labels_at_its_own_resolution():
    """The finer layers too, whose labels are not those of the coarsest enlarged."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 1, 8, 8), generator=generator)
    shapes = ((2, 2), (2, 2), (4, 4))  # of the layers, then of the masks
    assignments = [torch.randn(2, 3, *shape, generator=generator).log_softmax(1) for shape in shapes]
    expected = [query_distribution_loss(a, class_shares(labels, a.shape[2:], 3)) for a in assignments]
    found = KMaxLoss._query_distribution(assignments, labels)
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_impossible_weight_is_an_error(weight):
    with pytest.raises(ValueError, match=f"query_weight is {weight}"):
        KMaxLoss(Sum(), weight)
