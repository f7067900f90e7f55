from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_memory import peak_memory
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunetv2_selfreg.losses.kmax import KMaxLoss
from nnunetv2_selfreg.networks.clusters import (
    cluster_means,
    fewest_queries,
    group_members,
    hard_assignment,
    log_query_distribution,
    merged,
    query_groups,
)
from nnunetv2_selfreg.networks.kmax import KMaxUXNet
from nnunetv2_selfreg.networks.mask_decoder import (
    LEAST_ASSIGNMENT,
    PUBLISHED,
    KMaxLayer,
    MaskDecoder,
    MaskDecoderSizes,
    MaskPredictor,
    SelfAttention,
    attended,
)
from nnunetv2_selfreg.networks.uxnet import UXNet

STRIDES, KERNELS = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 4


def small(**arguments):
    torch.manual_seed(0)
    arguments = {"width": 4, "deepest": 16, "layer_scale": 1.0, "queries": 24, **arguments}
    return KMaxUXNet(1, 3, STRIDES, KERNELS, **arguments)


def image(batch=2):
    return torch.randn(batch, 1, 16, 24, 16, generator=torch.Generator().manual_seed(1))


class SquareLoss(torch.nn.Module):
    """Stands for nnU-Net's loss with deep supervision, where only gradients matter."""

    def loss(self, output, _target):
        return (output**2).mean()

    def forward(self, outputs, _target):
        return sum(self.loss(output, None) for output in outputs)


def loss_of(network, images):
    target = [torch.arange(16)[:, None, None].expand(len(images), 1, 16, 24, 16) % 3]
    return KMaxLoss(SquareLoss())(network(images), target)


def test_query_distribution_sums_to_one_over_the_queries():
    logits = 50 * torch.randn(2, 24, 3, 4, 5)
    torch.testing.assert_close(log_query_distribution(logits).exp().sum(1), torch.ones(2, 3, 4, 5))


def test_merged_assignment_sums_each_group():
    distribution = torch.softmax(torch.randn(2, 7, 3, 4), 1)
    result = merged(distribution.log(), [1, 2, 4]).exp()
    expected = np.add.reduceat(distribution.numpy(), [0, 1, 3], axis=1)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


def test_segmentation_is_the_distribution_times_the_class_scores():
    torch.manual_seed(0)
    decoder = lively(MaskDecoder(torch.nn.Conv2d, [16, 8, 4], [[3, 3]] * 3, 3, 16, PUBLISHED))
    features = [torch.randn(2, 16, 2, 3), torch.randn(2, 8, 4, 6), torch.randn(2, 4, 8, 12)]
    seen = {}
    decoder.mask_query.register_forward_hook(lambda _m, _i, output: seen.update(queries=output))
    decoder.seg_layers.register_forward_hook(lambda _m, _i, output: seen.update(scores=output))
    segmentation, *log_assignments = decoder(*features)
    q = log_query_distribution(decoder.masks(seen["queries"], features[-1])).exp()
    expected = sum(q[:, n, None] * seen["scores"][:, :, n, None, None] for n in range(16))
    torch.testing.assert_close(segmentation, expected)
    torch.testing.assert_close(log_assignments[-1].exp(), merged(q.log(), decoder.groups).exp())
    assert [tuple(a.shape[2:]) for a in log_assignments] == [(2, 3)] * 2 + [(4, 6)] * 2 + [(8, 12)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 9), st.sampled_from([0.1, 1, 30]))
def test_attended_values_against_the_whole_map(seed, width, values, queries, size):
    """Whichever of keys and values is wider, and however sure the voxels are."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, width, 3, 4, 2), (2, width, queries), (2, values, queries)
    voxel_keys, query_keys, of_queries = (size * torch.randn(shape, generator=generator) for shape in shapes)
    found = attended(voxel_keys, query_keys, of_queries)
    logits = np.einsum("bd...,bdn->bn...", voxel_keys.double(), query_keys.double())
    q = torch.softmax(torch.from_numpy(logits), 1)
    expected = torch.einsum("bn...,bmn->bm...", q, of_queries.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * size)


def test_assignment_that_is_surely_wrong_still_has_a_finite_gradient():
    """Also when the loss is scaled for half precision."""
    voxel_keys = torch.ones(1, 8, 2, 2, requires_grad=True)
    query_keys = torch.stack((100 * torch.ones(1, 8), -100 * torch.ones(1, 8)), 2)
    assignment = attended(voxel_keys, query_keys, group_members([1, 1])[None])
    (-(2.0**16) * assignment.clamp_min(LEAST_ASSIGNMENT).log()[:, 1].mean()).backward()
    assert torch.isfinite(voxel_keys.grad).all()


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3))
def test_cluster_means_and_assignment_against_loops(seed, queries, batch):
    generator = torch.Generator().manual_seed(seed)
    logits, values = (torch.randn(batch, n, 3, 2, generator=generator) for n in (queries, 4))
    result = cluster_means(values, hard_assignment(logits))
    expected = np.zeros((batch, 4, queries))
    for b in range(batch):
        belongs = logits[b].flatten(1).numpy().argmax(0)
        for n in set(belongs):
            expected[b, :, n] = values[b].flatten(1).numpy()[:, belongs == n].mean(1)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_large_clusters_are_counted_in_half_precision():
    values = torch.ones(1, 2, 70000, dtype=torch.float16)
    assignment = torch.ones(1, 1, 70000, dtype=torch.float16)
    torch.testing.assert_close(cluster_means(values, assignment), torch.ones(1, 2, 1))


@pytest.mark.parametrize("size", [0.0, 6e4])
def test_keys_of_any_size_are_normalised_in_half_precision(size):
    """Squares of the one are too small for it, of the other too large."""
    masks = MaskPredictor(torch.nn.Conv2d, 4, 256, 128).half()
    masks.voxel_key = torch.nn.Identity()
    feature = torch.full((1, PUBLISHED.key_width, 2, 2), size, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        logits = masks(torch.randn(1, 256, 3, dtype=torch.float16), feature)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert bool(logits.abs().sum() > 0) == (size > 0)


def lively(module):
    """With residual branches that do not start at 0, as after some training."""
    for layer in module.modules():
        if isinstance(layer, KMaxLayer):
            for branch in (layer.update, layer.attention, layer.feed_forward):
                torch.nn.init.ones_(branch[-1].weight)
    return module


def test_fresh_decoder_changes_its_queries_by_activations_alone():
    """Whatever the images: all branches start at 0."""
    network = small()
    decoder, seen = network.decoder.mask_decoder, []
    decoder.mask_query.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    network(image())
    network(image() + 3)
    expected = decoder.queries.detach()
    for _ in range(2 * len(decoder.layers)):
        expected = torch.nn.functional.gelu(expected)
    for queries in seen:
        torch.testing.assert_close(queries, expected.expand(2, -1, -1), rtol=0, atol=0)
    lively(network)(image())
    assert not torch.allclose(seen[-1], seen[0], atol=0.1)


def test_mask_logits_start_with_a_deviation_of_a_tenth(monkeypatch):
    network, found, keys = small(width=16, queries=128), [], MaskPredictor.keys

    def recorded(*arguments):
        voxel_keys, query_keys = keys(*arguments)
        found.append(float(torch.einsum("bdn,bd...->bn...", query_keys, voxel_keys).detach().std()))
        return voxel_keys, query_keys

    monkeypatch.setattr(MaskPredictor, "keys", recorded)
    network(image())
    assert len(found) == 7
    np.testing.assert_allclose(found, 0.1, rtol=0.1)


def test_mask_head_stays_within_slices_where_the_plan_has_no_kernel_across_them():
    network = KMaxUXNet(1, 3, STRIDES, [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]], width=4, deepest=16, queries=24)
    decoder = network.decoder.mask_decoder
    sizes = [layer.mask_head[0].kernel_size for layer in decoder.layers]
    assert sizes == [(5, 5, 5)] * 4 + [(1, 5, 5)] * 2


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"levels": 0}, "levels of the mask decoder is 0, it must be 1 at least"),
        ({"layers_per_level": 0}, "layers_per_level of the mask decoder is 0"),
        ({"width": 100}, "width of the mask decoder is 100, no multiple of heads, 8"),
        ({"key_width": 12}, "key_width of the mask decoder is 12, no multiple"),
    ],
)
def test_impossible_sizes_of_the_mask_decoder(sizes, said):
    with pytest.raises(ValueError, match=said):
        MaskDecoderSizes(**sizes)


def test_layer_adds_both_branches_of_the_queries_before_them():
    torch.manual_seed(0)
    layer = lively(KMaxLayer(torch.nn.Conv2d, 4, [3, 3], PUBLISHED))
    queries, feature = torch.randn(2, 256, 8), torch.randn(2, 4, 6, 5)
    moved, mask_logits = layer(queries, feature)
    space, voxels = layer.space(queries), layer.voxels(feature)
    torch.testing.assert_close(mask_logits, layer.masks(space, layer.mask_head(voxels)))
    centres = layer.value(cluster_means(voxels, hard_assignment(mask_logits)))
    gelu = torch.nn.functional.gelu
    between = gelu(queries + layer.update(centres) + layer.attention(space))
    torch.testing.assert_close(moved, gelu(between + layer.feed_forward(between)))


def test_attention_is_that_of_torch():
    """With keys as wide as values, the only kind that torch has."""
    sizes = replace(PUBLISHED, width=16, key_width=16, heads=4)
    attention, queries = SelfAttention(sizes), torch.randn(2, 16, 6)
    attention.query_key_value[1] = attention.norm = torch.nn.Identity()
    theirs = torch.nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.query_key_value[0].weight[..., 0])
        theirs.out_proj.weight.copy_(torch.eye(16))
    rows = queries.transpose(1, 2)
    expected, _ = theirs(rows, rows, rows)
    torch.testing.assert_close(attention(queries), expected.transpose(1, 2))


def test_queries_move_by_the_mean_value_of_their_voxels():
    torch.manual_seed(0)
    layer = KMaxLayer(torch.nn.Conv2d, 4, [3, 3], PUBLISHED)
    queries, feature = torch.randn(1, 256, 3), torch.randn(1, 4, 2, 3)
    seen = []
    layer.update.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    _, mask_logits = layer(queries, feature)
    voxels = layer.voxels(feature)[0].flatten(1)
    belongs = mask_logits[0].flatten(1).argmax(0)
    assert len(belongs.unique()) > 1
    for query in range(3):
        values = layer.value.weight[..., 0] @ voxels[:, belongs == query]
        expected = values.mean(1) if values.shape[1] else torch.zeros(256)
        torch.testing.assert_close(seen[0][:, query], expected, rtol=1e-4, atol=1e-5)


def test_hard_assignment_gets_no_gradient():
    """A layer's mask logits have no influence on its queries that a gradient could follow."""
    layer = lively(KMaxLayer(torch.nn.Conv3d, 4, [3, 3, 3], PUBLISHED))
    queries, feature = torch.randn(1, 256, 8, requires_grad=True), torch.randn(1, 4, 2, 3, 4, requires_grad=True)
    moved, mask_logits = layer(queries, feature)
    moved.square().sum().backward(retain_graph=True)
    assert all(p.grad is None for p in layer.masks.parameters())
    assert layer.value.weight.grad.abs().sum() > 0
    mask_logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.masks.parameters() if p.ndim > 1)
    logits = torch.randn(1, 8, 5, requires_grad=True)
    assert not hard_assignment(logits).requires_grad


def test_permuting_queries_within_groups_changes_nothing():
    network, images = (
        lively(small()).double(),
        image().double(),
    )  # each norm multiplies the rounding of single precision
    expected = network(images)
    sizes = network.decoder.mask_decoder.groups
    order = torch.cat([torch.randperm(n) + sum(sizes[:i]) for i, n in enumerate(sizes)])
    assert not torch.equal(order, torch.arange(24))
    with torch.no_grad():
        queries = network.decoder.mask_decoder.queries
        queries.copy_(queries[:, order])
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        queries.copy_(queries.flip(1))  # across groups
    assert not torch.allclose(network(images).log_assignments[-1], expected.log_assignments[-1], atol=1e-3)


def test_layers_read_the_bottleneck_and_the_two_deepest_decoder_levels():
    network = KMaxUXNet(1, 2, [[1, 1], *[[2, 2]] * 4], [[3, 3]] * 5, width=4, deepest=16, queries=16)
    output = network(torch.randn(1, 1, 32, 64))
    sizes = [tuple(a.shape[2:]) for a in output.log_assignments]
    assert sizes == [(2, 4)] * 2 + [(4, 8)] * 2 + [(8, 16)] * 2 + [(32, 64)]
    assert [tuple(c.shape[2:]) for c in output.convolutional] == [(32, 64), (16, 32), (8, 16), (4, 8)]
    assert output.segmentation.shape == (1, 2, 32, 64)


def test_network_of_three_stages_reads_what_there_is():
    network = KMaxUXNet(1, 2, [[1, 1], *[[2, 2]] * 2], [[3, 3]] * 3, width=4, deepest=16, queries=16)
    sizes = [tuple(a.shape[2:]) for a in network(torch.randn(1, 1, 16, 32)).log_assignments]
    assert sizes == [(4, 8)] * 2 + [(8, 16)] * 2 + [(16, 32)]


def test_weights_of_a_training_with_other_classes_are_taken(tmp_path):
    def build(classes):
        return KMaxUXNet(1, classes, [[1, 1], *[[2, 2]] * 2], [[3, 3]] * 3, width=4, deepest=16, queries=16)

    before, after = build(3), build(2)
    torch.save({"network_weights": before.state_dict()}, tmp_path / "checkpoint.pth")
    load_pretrained_weights(after, tmp_path / "checkpoint.pth")
    assert torch.equal(after.decoder.mask_decoder.queries, before.decoder.mask_decoder.queries)


def test_without_deep_supervision_the_segmentation_stays():
    network = small().eval()
    expected = network(image()).segmentation
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(image()), expected)


def test_every_parameter_learns_with_a_single_sample():
    """In the second step at the latest: the first one wakes the residual branches."""
    network = small()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(network, image(1)).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
        silent = {name for name, p in network.named_parameters() if p.grad.abs().sum() == 0}
        optimizer.step()
    assert not silent


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.matrix)])
def test_steps_in_half_precision_stay_finite(steps):
    """As nnU-Net trains on a GPU: its loss, the loss scaled, the gradient clipped."""
    torch.manual_seed(0)
    network = KMaxUXNet(1, 3, [[1, 1], [2, 2], [2, 2]], [[3, 3]] * 3, width=4, deepest=16, queries=24)
    optimizer, scaler = torch.optim.AdamW(network.parameters(), 1e-3), torch.amp.GradScaler("cpu")
    of_a_scale = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    loss = KMaxLoss(DeepSupervisionWrapper(of_a_scale, [2 / 3, 1 / 3]))
    images, rows = image(1)[:, :, 0, :16], torch.arange(16) // 6
    target = [labels[None, None, :, None].expand(1, 1, -1, len(labels)) for labels in (rows, rows[::2])]
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.float16):
            total = loss(network(images), target)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        losses.append(total.item())
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert scaler.get_scale() >= 2**6  # at most 10 steps were left out: how many depends on the processor's rounding
    assert losses[-1] < losses[0] - 1  # Dice is negative


@pytest.mark.matrix
def test_memory_at_128_cubed_stays_under_1_6_times_ux_nets():
    strides, kernels = [[1] * 3, *[[2] * 3] * 4], [[3] * 3] * 5
    ux_net, kmax = (
        peak_memory(lambda cls=cls: cls(1, 3, strides, kernels), [128] * 3, 1) for cls in (UXNet, KMaxUXNet)
    )
    assert ux_net < kmax < 1.6 * ux_net


def test_activation_checkpointing_changes_no_gradient():
    found = []
    for on in (False, True):
        network = small(activation_checkpointing=on)
        assert ("forward" in vars(network.decoder.mask_decoder)) == on
        loss_of(network, image()).backward()
        found.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*found)


@given(st.integers(2, 300))
def test_queries_that_the_error_asks_for_are_just_enough(classes):
    enough = fewest_queries(classes)
    assert min(query_groups(enough, classes)) == 1
    with pytest.raises(ValueError, match=f"{enough - 1} queries are too few.*Raise `queries` to {enough} or more"):
        query_groups(enough - 1, classes)


@given(st.integers(2, 40), st.integers(16, 300))
def test_groups_share_the_queries(classes, queries):
    if queries // 8 + classes - 1 > queries:
        with pytest.raises(ValueError, match=f"{queries} queries are too few for {classes} classes"):
            query_groups(queries, classes)
        return
    groups = query_groups(queries, classes)
    assert sum(groups) == queries
    assert len(groups) == classes
    assert groups[0] == queries // 8
    assert len({*groups[1:-1]}) <= 1
    assert groups[-1] >= groups[1] >= 1


@pytest.mark.parametrize(("queries", "classes"), [(7, 2), (16, 20), (3, 4)])
def test_group_without_a_query_is_an_error(queries, classes):
    with pytest.raises(ValueError, match=rf"{queries} queries are too few for {classes} classes.*Raise `queries` to"):
        KMaxUXNet(1, classes, STRIDES, KERNELS, width=4, deepest=16, queries=queries)
