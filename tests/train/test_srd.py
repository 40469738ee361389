"""SRD against closed forms, the properties its paper claims, and its training."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import load_teacher
from pipeline import make_store, prepare_run, train_settings
from safetensors.torch import load_file

from fkdpipe.common.errors import UsageError
from fkdpipe.networks.feature_layers import Needs, Outputs
from fkdpipe.storage.settings import FeatureSettings
from fkdpipe.train import loop
from fkdpipe.train import step as stepping
from fkdpipe.train.methods import srd
from fkdpipe.train.methods.interface import Context, Targets

B, D_S, D_T, C = 16, 10, 14, 5


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def method(**settings) -> srd.Srd:
    torch.manual_seed(0)
    return srd.Srd(srd.Settings(**settings), D_S, D_T)


def sides(seed=1) -> tuple[Outputs, Targets]:
    student = Outputs(random(B, C, seed=seed), penultimate=random(B, D_S, seed=seed + 1))
    teacher = Outputs(random(B, C, seed=seed + 2), penultimate=random(B, D_T, seed=seed + 3))
    truth = torch.nn.functional.one_hot(torch.arange(B) % C, C).float()
    return student, Targets(truth, truth, teacher)


def test_equal_distances_have_the_loss_of_the_closed_form():
    d = torch.full((4, 5), 0.5) * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    assert srd.log_sum(d, 4).item() == pytest.approx(math.log(20) + 4 * math.log(0.5), rel=1e-6)
    assert srd.log_sum(d, 4).item() == pytest.approx(0.22314, abs=1e-5)
    assert srd.mean_power(d, 4).item() == pytest.approx(0.5**4)


@pytest.mark.parametrize("alpha", [1.0, 2.5, 4.0, 5.0])
def test_scaling_distances_adds_a_constant_so_their_gradient_is_free_of_scale(alpha):
    d = random(B, D_T).requires_grad_()
    value = srd.log_sum(d, alpha)
    assert (srd.log_sum(3 * d, alpha) - value).item() == pytest.approx(
        alpha * math.log(3), rel=1e-4
    )
    (gradient,) = torch.autograd.grad(value, d)
    assert (d * gradient).sum().item() == pytest.approx(alpha, rel=1e-5)
    if alpha == 4:
        assert torch.allclose(gradient, 4 * d**3 / (d**4).sum(), rtol=1e-4)


def test_batch_statistics_of_two_samples_are_plus_and_minus_one():
    made = srd.normalise(torch.tensor([[3.0, -1.0], [5.0, 7.0]]), srd.Settings())
    assert torch.allclose(made.abs(), torch.tensor([[0.99995, 0.999997]] * 2), atol=1e-5)
    assert (made[0] == -made[1]).all()
    exact = srd.normalise(torch.tensor([[0.0], [2e-2]]), srd.Settings())
    assert exact[1].item() == pytest.approx(1e-2 / math.sqrt(1e-4 + 1e-4))  # eps is 1e-4


def test_normalisation_has_no_parameters_and_never_leaves_the_batch_statistics():
    made = method().eval()
    student, targets = sides()
    assert [name for name, _ in made.named_parameters()] == ["projector.weight", "projector.bias"]
    assert not list(made.buffers())
    alone = made.loss(student, targets)["rep"]
    assert torch.equal(alone, made.train().loss(student, targets)["rep"])


def test_the_loss_is_its_slow_twin():
    made = method()
    student, targets = sides()

    def bn(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4)

    weight, bias = (p.detach().double().numpy() for p in made.projector.parameters())
    p = student.penultimate.double().numpy() @ weight.T + bias
    t = targets.teacher.penultimate.double().numpy()
    total = sum(abs(x) ** 4 for x in (bn(p) - bn(t)).ravel())
    terms = made.loss(student, targets)
    assert terms["rep"].item() == pytest.approx(2 * math.log(total), rel=1e-5)
    z = student.logits.double()
    log_q = z - z.exp().sum(1, keepdim=True).log()
    hard = -(targets.truth_BC * log_q).sum(1)
    prob = torch.softmax(targets.teacher.logits.double(), 1)
    soft = (prob * (prob.log() - log_q)).sum(1)
    assert torch.allclose(terms["hard"].double(), hard)
    assert torch.allclose(terms["soft"].double(), soft, atol=1e-6)


def test_the_loss_at_the_start_has_the_size_of_the_papers_logs():
    """256 crops of 512 features: about 2 log(131072 x 12) = 28.5 (d is the difference of two unit
    normals, whose fourth moment is 12)."""
    made = srd.Srd(srd.Settings(), 512, 512)
    value = made.distance(random(256, 512), random(256, 512, seed=5))
    assert 2 * value.item() == pytest.approx(2 * math.log(256 * 512 * 12), rel=0.01)


def test_a_bias_of_the_projector_and_scales_of_the_teachers_channels_do_not_matter():
    made = method()
    student, targets = sides()
    before = made.loss(student, targets)["rep"]
    with torch.no_grad():
        made.projector.bias.add_(7)
    assert torch.allclose(made.loss(student, targets)["rep"], before, atol=1e-4)
    scaled = targets.teacher.penultimate * torch.linspace(3, 9, D_T) - 5
    other = Targets(
        targets.prob_BC, targets.truth_BC, Outputs(targets.teacher.logits, penultimate=scaled)
    )
    assert torch.allclose(made.loss(student, other)["rep"], before, atol=1e-3)


def test_samples_may_be_permuted_together_but_not_on_one_side():
    made = method()
    student, targets = sides()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    x, t = student.penultimate, targets.teacher.penultimate
    value = made.distance(made.projector(x), t)
    assert torch.allclose(made.distance(made.projector(x[order]), t[order]), value, atol=1e-5)
    assert abs(made.distance(made.projector(x), t[order]) - value) > 1e-3


def test_form_corr_has_its_closed_forms():
    made = method(form="corr")
    x = random(B, D_T)
    assert made.distance(x, x.clone()).item() == pytest.approx(math.log(1e-5), abs=1e-3)  # c = 1
    assert made.distance(x, -x).item() == pytest.approx(math.log(D_T * 2**4), rel=1e-4)
    half = torch.cat([x, x])
    unrelated = torch.cat([x, -x])  # c = 0 in every dimension
    assert made.distance(half, unrelated).item() == pytest.approx(math.log(D_T), rel=1e-4)
    ours, theirs = (srd.normalise(v, made.settings) for v in (x, random(B, D_T, seed=4)))
    correlation = (ours * theirs).mean(0)
    assert torch.allclose((ours - theirs).square().mean(0), 2 * (1 - correlation), atol=1e-5)
    assert (method(form="corr").settings.rep_weight, method().settings.rep_weight) == (1, 2)


def test_other_normalisations_are_per_sample():
    x = random(B, D_T)
    unit = srd.normalise(x, srd.Settings(normalise="l2"))
    assert torch.allclose(unit.norm(dim=1), torch.ones(B))
    grouped = srd.normalise(x, srd.Settings(normalise="group", groups=2)).unflatten(1, (2, -1))
    assert torch.allclose(grouped.mean(2), torch.zeros(B, 2), atol=1e-6)
    assert torch.allclose(grouped.var(2, correction=0), torch.ones(B, 2), atol=1e-3)
    assert srd.normalise(x, srd.Settings(normalise="none")) is x
    for kind in ("l2", "group"):
        settings = srd.Settings(normalise=kind, groups=2)
        assert torch.equal(srd.normalise(x[:3], settings), srd.normalise(x, settings)[:3])


def test_dead_channels_and_equal_features_stay_finite():
    for form in ("elementwise", "corr"):
        made = method(form=form)
        x = random(B, D_T).requires_grad_()
        teacher = random(B, D_T, seed=2)
        teacher[:, 3] = 0
        for value in (made.distance(x, teacher), made.distance(x * 1, x.detach())):
            assert value.isfinite()
            (gradient,) = torch.autograd.grad(value, x)
            assert gradient.isfinite().all()


def test_autocast_changes_nothing_behind_the_projector():
    made = method()
    x, t = random(B, D_T) * 40, random(B, D_T, seed=2)
    expected = made.distance(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made.distance(x, t), expected)


def test_without_log_and_without_terms():
    student, targets = sides()
    made = method(log=False, normalise="none", alpha=2.0, hard_weight=0.0, soft_weight=0.0)
    terms = made.loss(student, targets)
    assert set(terms) == {"rep"}
    difference = made.projector(student.penultimate) - targets.teacher.penultimate
    assert terms["rep"].item() == pytest.approx(2 * difference.square().mean().item())
    assert srd.needs(srd.Settings(soft_weight=0.0)).soft is None
    assert srd.needs(srd.Settings()).independent


def test_a_constant_channel_leaves_gradients_of_the_correlation_form_within_bounds():
    made = method(form="corr")
    ours = random(B, D_T)
    ours[:, 3] = 1.5
    ours.requires_grad_()
    made.distance(ours, random(B, D_T, seed=1)).backward()
    assert ours.grad.abs().max() < 1e6


def test_a_pass_may_end_in_a_single_crop_which_says_nothing_of_a_batch():
    made, ours = method(), random(1, D_T).requires_grad_()
    made.distance(ours, random(1, D_T, seed=1)).backward()
    assert ours.grad.abs().sum() == 0


def test_what_cannot_be_is_refused():
    components = FeatureSettings("post", 9, 9, "float16", 1, basis="0" * 64)
    context = Context(
        classes=C, scores=C, epochs=1, student=sides()[0], teacher=sides()[1].teacher,
        student_network=torch.nn.Identity(), features=components,
    )  # fmt: skip
    with pytest.raises(UsageError, match="components of a basis"):
        srd.build(srd.Settings(), context)
    for settings, message in (
        ({"form": "corr", "normalise": "l2"}, "normalise: .* needs normalise = bn"),
        ({"alpha": 0.5}, "alpha must be a number of at least 1; found 0.5"),
        ({"feature_weight": -1.0}, "feature_weight must be a number of at least 0; found -1"),
        ({"groups": 0}, "groups must be a whole number above 0; found 0"),
    ):
        with pytest.raises(UsageError, match=message):
            srd.Settings(**settings)


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, checkpoint):
    network = load_teacher(checkpoint, needs=Needs(penultimate=True))
    return make_store(
        tmp_path_factory.mktemp("srd") / "store", folder, [network], form="full",
        features=("post",),
    )  # fmt: skip


def settings_of(**changes):
    return train_settings(
        **{
            "target": "full",
            "crops_per_image": 1,
            "epochs": 2,
            "method": {"name": "srd"},
            **changes,
        }
    )


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_the_projector_trains_and_is_resumed_but_not_exported(
    tmp_path, folder, store, monkeypatch, projector
):
    settings = settings_of(method={"name": "srd", "projector": projector, "hidden": 32})
    straight = prepare_run(tmp_path / "straight", folder, store, settings)
    before = copy.deepcopy(straight.method.state_dict())
    expected = loop.train(straight)
    after = straight.method.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "weight" in name)
    assert not [name for name in load_file(expected.student) if "projector" in name]

    plain = loop.step

    def stop(run, batch):
        if run.step == 5:
            loop.save(run)
            raise KeyboardInterrupt
        return plain(run, batch)

    monkeypatch.setattr(loop, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(prepare_run(tmp_path / "stopped", folder, store, settings))
    monkeypatch.setattr(loop, "step", plain)
    again = prepare_run(tmp_path / "stopped", folder, store, settings)
    found = load_file(loop.train(again).student)
    assert all(
        torch.equal(found[name], value) for name, value in load_file(expected.student).items()
    )
    assert all(torch.equal(again.method.state_dict()[name], value) for name, value in after.items())


def test_stored_features_and_labels_give_the_terms_of_the_live_teacher(
    tmp_path, folder, store, checkpoint
):
    stored = prepare_run(tmp_path / "stored", folder, store, settings_of())
    live = prepare_run(
        tmp_path / "live", folder, store,
        settings_of(target="ground-truth", teacher=f"test_resnet={checkpoint}"),
    )  # fmt: skip
    for ours, theirs in zip(stored.crops.stream(), live.crops.stream(), strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        live.learner.load_state_dict(stored.learner.state_dict())
        losses = [float(stepping.step(r, b)[0]) for r, b in ((stored, ours), (live, theirs))]
        assert losses[0] == pytest.approx(losses[1], rel=2e-4)
        stored.step, live.step = stored.step + 1, live.step + 1


def test_a_transformer_student_gives_its_mean_patch_token(tmp_path, folder, store):
    method = {"name": "srd", "form": "corr", "student": "tokens"}
    run = prepare_run(
        tmp_path / "run", folder, store, settings_of(student="test_vit", method=method, epochs=1)
    )
    pixels = random(2, 3, 32, 32)
    with torch.no_grad():
        made = run.module.eval()(pixels)
        tokens = run.module.network.forward_features(pixels)[:, 1:]  # without the class token
    assert torch.allclose(srd._represent(made, run.method.settings), tokens.mean(1), atol=1e-6)
    assert loop.train(run).steps == 4


def test_runs_of_single_crops_are_refused(tmp_path, folder, store):
    wanted = train_settings(method={"name": "srd"}, batch_size=2, accumulate=2)
    with pytest.raises(UsageError, match="Raise --batch-size"):
        prepare_run(tmp_path / "run", folder, store, wanted)
