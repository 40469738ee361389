"""DPK: sizes, polarity and numbers of the authors' code; every ablation of the paper."""

from __future__ import annotations

import pytest
import torch
from feature_maps import context, outputs, targets

from fkdpipe.common.errors import ModelError, UsageError
from fkdpipe.train import methods
from fkdpipe.train.methods import dpk, dpk_blocks
from fkdpipe.train.methods.dpk_blocks import Side, Stack

CPU = torch.device("cpu")


def small(**settings) -> dict:
    stage = {"encoder_width": 16, "decoder_width": 16, "encoder_depth": 1, "decoder_depth": 1}
    return {
        "name": "dpk",
        "stages": [{**stage, "encoder_heads": 2, "decoder_heads": 2}],
        **settings,
    }


def pair(student=(6, 4), teacher=(10, 4), batch=8, **settings):
    ours = outputs(batch, {1: student}, seed=1)
    theirs = outputs(batch, {1: teacher}, seed=2)
    torch.manual_seed(0)
    return methods.build(small(**settings), context(ours, theirs)), ours, theirs


def counted(stage: dpk.Stage, student: tuple[int, int], teacher: tuple[int, int]) -> int:
    """Parameters of the auxiliary modules at the paper's sizes, without memory for them."""
    with torch.device("meta"):
        ours, theirs = (
            outputs_on_meta(stage.stage, channels, side) for channels, side in (student, teacher)
        )
        made = dpk.Dpk(dpk.Settings(stages=(stage,)), ours, theirs, epochs=1)
    return sum(p.numel() for p in made.parameters())


def outputs_on_meta(stage: int, channels: int, side: int):
    from fkdpipe.networks.feature_layers import Outputs

    maps = {stage: torch.zeros(1, channels, side, side, device="meta")}
    return Outputs(logits=torch.zeros(1, 5, device="meta"), stages=maps)


def test_parameter_counts_of_the_authors_logs():
    assert counted(dpk.Stage(), (512, 7), (512, 7)) == 51_483_136  # ResNet-34 -> ResNet-18
    assert counted(dpk.Stage(stage=2), (256, 14), (256, 14)) == 12_896_512
    wide = dpk.Stage(encoder_width=640)
    assert counted(wide, (512, 7), (2048, 7)) == 113_854_208  # ResNet-50 -> ResNet-18


@pytest.mark.parametrize(
    ("encoder", "decoder", "millions"),
    [(1, 1, 10.51), (2, 2, 19.96), (4, 2, 32.57), (4, 4, 38.88), (6, 4, 51.48)],
)
def test_parameter_counts_of_table_17(encoder, decoder, millions):
    stage = dpk.Stage(encoder_depth=encoder, decoder_depth=decoder)
    assert round(counted(stage, (512, 7), (512, 7)) / 1e6, 2) == millions


def test_positions_are_sines_and_cosines_in_turn():
    made = dpk_blocks.position_embedding(5, 8)
    assert made[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert made[3, 2] == pytest.approx(torch.tensor(3 / 10_000 ** (2 / 8)).sin().item(), abs=1e-6)
    assert made[3, 3] == pytest.approx(torch.tensor(3 / 10_000 ** (2 / 8)).cos().item(), abs=1e-6)


def test_patchify_puts_channels_fastest():
    map_BCHW = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    made = dpk_blocks.patchify(map_BCHW, 2)
    assert made.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            cut = map_BCHW[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(made[:, 3 * row + column], cut.permute(0, 2, 3, 1).flatten(1))


def attentive(fill="teacher", patch=1) -> dpk_blocks.Attentive:
    torch.manual_seed(0)
    return dpk_blocks.Attentive(
        Side(6, patch), Side(10, patch), 16, Stack(16, 1, 2), Stack(8, 1, 2), fill
    )


def test_the_student_is_never_read_where_the_mask_is_nor_the_teacher_elsewhere():
    """The strong test of the mask's polarity, with masked tokens exchanged between tokens."""
    transform = attentive()
    ours, theirs = torch.randn(4, 6, 4, 4), torch.randn(4, 10, 4, 4)
    mask = torch.rand(4, 16).argsort(1) < 7
    plain = transform(ours, theirs, mask, 7)
    assert plain.shape == (4, 16, 10)
    on_map = mask.view(4, 1, 4, 4)
    with torch.no_grad():
        other_ours = torch.where(on_map, torch.randn_like(ours), ours)
        other_theirs = torch.where(on_map, theirs, torch.randn_like(theirs))
        assert torch.equal(transform(other_ours, other_theirs, mask, 7), plain)
        read_ours = torch.where(on_map, ours, torch.randn_like(ours))
        read_theirs = torch.where(on_map, torch.randn_like(theirs), theirs)
        assert not torch.allclose(transform(read_ours, theirs, mask, 7), plain)
        assert not torch.allclose(transform(ours, read_theirs, mask, 7), plain)


def test_encoding_only_the_visible_equals_encoding_all_behind_a_key_mask():
    """The slow twin: both encoders on all tokens, attention kept to the visible ones."""
    transform = attentive().eval()
    ours, theirs = torch.randn(3, 6, 4, 4), torch.randn(3, 10, 4, 4)
    mask = torch.rand(3, 16).argsort(1) < 5
    fast = transform(ours, theirs, mask, 5)
    kept = masked_encoding(
        transform.student_encoder, transform._tokens(transform.student_patches, ours), ~mask
    )
    given = masked_encoding(
        transform.teacher_encoder, transform._tokens(transform.teacher_patches, theirs), mask
    )
    hybrid = torch.where(mask[:, :, None], transform.to_decoder(given), transform.to_decoder(kept))
    slow = transform.out(transform.decoder(hybrid + transform.decoder_positions))
    assert torch.allclose(fast, slow, atol=1e-5)


def masked_encoding(encoder, tokens, visible):
    *blocks, norm = encoder
    for block in blocks:
        x = block.norm1(tokens)
        bias = torch.cat([block.q_bias, torch.zeros_like(block.q_bias), block.v_bias])
        q, k, v = (x @ block.qkv.weight.T + bias).chunk(3, dim=2)
        heads = []
        for part in range(block.heads):
            columns = slice(
                part * q.shape[2] // block.heads, (part + 1) * q.shape[2] // block.heads
            )
            scores = q[..., columns] @ k[..., columns].transpose(1, 2)
            scores = scores / (q.shape[2] // block.heads) ** 0.5
            scores = scores.masked_fill(~visible[:, None, :], -torch.inf)
            heads.append(scores.softmax(2) @ v[..., columns])
        tokens = tokens + block.proj(torch.cat(heads, 2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return norm(tokens)


def test_the_feature_term_is_the_mean_square_over_all_tokens_and_values():
    method, ours, theirs = pair(ratio="fixed", fixed_ratio=0.5)
    torch.manual_seed(3)
    terms = method.loss(ours, targets(theirs))
    torch.manual_seed(3)
    mask = dpk.dpk_masks.draw("random", 8, (4, 4), 8, CPU)
    made = method.transforms["1"](ours.stages[1], theirs.stages[1], mask, 8)
    wanted = dpk_blocks.patchify(theirs.stages[1], 1)
    expected = torch.nn.functional.mse_loss(made, wanted)
    assert torch.allclose(terms["feature_1"].mean(), 0.2 * expected, atol=1e-6)
    assert set(terms) == {"hard", "kd", "feature_1"}
    hard = torch.nn.functional.cross_entropy(ours.logits, torch.arange(8) % 5, reduction="none")
    assert torch.allclose(terms["hard"], 0.8 * hard, atol=1e-6)
    only = pair(ratio="fixed", fixed_ratio=0.5, loss_on="student")[0]
    only.load_state_dict(method.state_dict())
    torch.manual_seed(3)
    term = only.loss(ours, targets(theirs))["feature_1"]
    error = (made - wanted).square().mean(2)
    expected = torch.stack([row[~m].mean() for row, m in zip(error, mask, strict=True)])
    assert torch.allclose(term, 0.2 * expected, atol=1e-6)


def test_gradients_reach_student_and_auxiliary_modules_and_never_the_teacher():
    method, ours, theirs = pair()
    sum(term.sum() for term in method.loss(ours, targets(theirs)).values()).backward()
    assert theirs.stages[1].grad is None
    assert ours.stages[1].grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    masked = (ours.stages[1].grad.abs().sum(1) == 0).flatten(1).sum(1)
    assert masked.tolist() == [round(method.facts()["masked_1"] * 16)] * 8


def test_without_prior_knowledge_there_is_no_teacher_encoder():
    for fill in ("zero", "learnable"):
        transform = attentive(fill)
        names = {name.split(".")[0] for name, _ in transform.named_parameters()}
        assert not {n for n in names if n.startswith("teacher")}
        assert ("token" in names) == (fill == "learnable")
        ours = torch.randn(4, 6, 4, 4)
        mask = torch.rand(4, 16).argsort(1) < 7
        made = transform(ours, torch.randn(4, 10, 4, 4), mask, 7)
        assert torch.equal(made, transform(ours, torch.randn(4, 10, 4, 4), mask, 7))


@pytest.mark.parametrize("fill", ["teacher", "zero", "learnable"])
@pytest.mark.parametrize("transform", ["encoder-decoder", "mlp", "conv"])
def test_every_transform_and_fill_trains(transform, fill):
    method, ours, theirs = pair(transform=transform, fill=fill, ratio="fixed", fixed_ratio=0.5)
    sum(term.sum() for term in method.loss(ours, targets(theirs)).values()).backward()
    assert theirs.stages[1].grad is None
    assert ours.stages[1].grad.abs().sum() > 0
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("transform", ["encoder-decoder", "mlp"])
def test_positions_are_learnt_where_the_paper_is_followed(transform):
    fixed, _, _ = pair(transform=transform)
    learnt, ours, theirs = pair(transform=transform, positions="learnable")
    sum(term.sum() for term in learnt.loss(ours, targets(theirs)).values()).backward()
    of = {name: p for name, p in learnt.named_parameters() if name.endswith("positions")}
    assert of
    assert all(p.grad.abs().sum() > 0 for p in of.values())
    assert not any(name.endswith("positions") for name, _ in fixed.named_parameters())


def test_maps_of_other_grids_meet_on_the_coarser_one():
    method, ours, theirs = pair(student=(6, 8), teacher=(10, 4))
    assert [side.patch for side in method.patches[1]] == [2, 1]
    assert method.loss(ours, targets(theirs))["feature_1"].shape == (8,)
    method, ours, theirs = pair(student=(6, 4), teacher=(10, 8))
    assert [side.patch for side in method.patches[1]] == [1, 2]
    assert method.transforms["1"].out.out_features == 40


def test_several_stages_have_a_ratio_and_a_term_each():
    size = {"encoder_depth": 1, "decoder_depth": 1, "encoder_heads": 2, "decoder_heads": 2}
    table = {"name": "dpk", "stages": [{"stage": 1, **size}, {"stage": 2, "grid": 4, **size}]}
    ours = outputs(8, {1: (6, 4), 2: (4, 8)}, seed=1)
    theirs = outputs(8, {1: (10, 4), 2: (8, 8)}, seed=2)
    method = methods.build(table, context(ours, theirs))
    terms = method.loss(ours, targets(theirs))
    assert {"feature_1", "feature_2"} < set(terms)
    assert set(method.facts()) == {"masked_1", "masked_2"}
    assert methods.needs(table).teacher.stages == (1, 2)


def test_schedules_of_the_mask_ratio():
    maps = torch.randn(8, 6, 7, 7)
    fixed = {
        kind: methods.build(small(ratio=kind), context(*[outputs(1, {1: (6, 7)})] * 2))
        for kind in ("exponential", "linear")
    }
    counts = {
        kind: [method.count(maps, maps, (7, 7), epoch) for epoch in (0, 5, 9, 200)]
        for kind, method in fixed.items()
    }
    # 49 tokens, ratios held within 0.10 and 0.95; the run has 10 epochs
    assert counts["exponential"] == [int(49 * r) for r in (0.95, 0.95**5, 0.95**9, 0.10)]
    assert counts["linear"] == [int(49 * r) for r in (0.95, 0.5, 0.1, 0.1)]


def test_ratios_follow_the_gap():
    """Equal maps: CKA and cosine are 1, and the teacher gives the least."""
    for ratio in ("cka", "cosine"):
        method, ours, _ = pair(teacher=(6, 4), ratio=ratio)
        maps = ours.stages[1]
        assert method.count(maps, maps, (7, 7), 0) == int(0.10 * 49)
        assert method.count(maps, -maps, (7, 7), 0) == (4 if ratio == "cka" else 46)


def test_numbers_are_the_same_for_any_order_of_the_batch():
    method, ours, theirs = pair()
    order = torch.randperm(8)
    made = [
        method.count(a, b, (4, 4), 0)
        for a, b in (
            (ours.stages[1], theirs.stages[1]),
            (ours.stages[1][order], theirs.stages[1][order]),
        )
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "grid"}, "one of every four tokens"),
        ({"mask": "grid", "ratio": "fixed", "fixed_ratio": 0.5}, "fixed_ratio = 0.75"),
        ({"fixed_ratio": 1.5}, "fixed_ratio must be a number from 0 to 1"),
        ({"stages": []}, "counted from the end"),
        (
            {"stages": [{}, {"encoder_depth": 0}]},
            r"stages\[1\].encoder_depth must be a whole number",
        ),
        ({"feature_weight": -1.0}, "feature_weight must be a number of at least 0"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        methods.parse({"name": "dpk", **change})


def test_pairs_that_do_not_fit_are_refused_with_a_way_out():
    with pytest.raises(ModelError, match="Use grid = 2"):
        pair(student=(6, 4), teacher=(10, 6))
    with pytest.raises(ModelError, match="at least 4 tokens"):
        pair(student=(6, 1), teacher=(10, 1))
    with pytest.raises(ModelError, match="set ratio = cka"):
        pair(ratio="cosine")
    with pytest.raises(ModelError, match="not an even multiple of 8 heads; the nearest is 16"):
        Stack(20, 1, 8)
