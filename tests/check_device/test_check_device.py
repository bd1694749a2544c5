"""The exact references against PyTorch in float64, and what the command does when a device errs."""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from b2txt_jax.check_device import command, exact, kernels, steps
from b2txt_jax.check_device.limits import product_flops
from b2txt_jax.model.gru.scan import gru_recurrence


def test_the_exact_recurrence_is_pytorchs_for_each_trial_of_a_row():
    rng, hidden, trials = np.random.default_rng(0), 3, (4, 5)
    module = torch.nn.GRU(3 * hidden, hidden, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(3 * hidden))
        module.bias_ih_l0.zero_()
    x = torch.tensor(rng.normal(size=(sum(trials), 1, 3 * hidden)), requires_grad=True)
    h0 = torch.tensor(rng.normal(size=(1, 1, hidden)), requires_grad=True)
    cotangent = rng.normal(size=(sum(trials), 1, hidden))
    states = torch.cat([module(part, h0)[0] for part in x.split(trials)])
    states.backward(torch.tensor(cotangent))
    begins = np.zeros((sum(trials), 1), bool)
    begins[[0, trials[0]]] = True
    weight, bias = (p.detach().numpy() for p in (module.weight_hh_l0, module.bias_hh_l0))
    ours = exact.gru(x.detach().numpy(), h0.detach().numpy()[0], weight, bias, begins, cotangent)
    wanted = {
        "states": states.detach(),
        "d_projected": x.grad,
        "d_h0": h0.grad[0],
        "d_weight": module.weight_hh_l0.grad,
        "d_bias": module.bias_hh_l0.grad,
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value.numpy(), rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_exact_stack_is_pytorchs():
    rng, hidden, layers = np.random.default_rng(0), 3, 3
    module = torch.nn.GRU(3 * hidden, hidden, layers, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(3 * hidden))
        module.bias_ih_l0.zero_()
    x = torch.tensor(rng.normal(size=(5, 2, 3 * hidden)), requires_grad=True)
    h0 = torch.tensor(rng.normal(size=(2, hidden)), requires_grad=True)
    cotangent = rng.normal(size=(5, 2, hidden))
    states = module(x, h0.expand(layers, 2, hidden).contiguous())[0]
    states.backward(torch.tensor(cotangent))
    named = dict(module.named_parameters())

    def stacked(name, first, of=lambda p: p):
        values = [of(named[f"{name}_l{layer}"]).detach() for layer in range(first, layers)]
        return np.stack([value.numpy() for value in values])

    parts = {"weight_ih": 1, "bias_ih": 1, "weight_hh": 0, "bias_hh": 0}
    begins = np.zeros((5, 2), bool)
    stack = [stacked(name, first) for name, first in parts.items()]
    ours = exact.gru_stack(x.detach().numpy(), h0.detach().numpy(), *stack, begins, cotangent)
    wanted = {"states": states.detach().numpy(), "d_projected": x.grad, "d_h0": h0.grad}
    wanted |= {f"d_{name}": stacked(name, n, lambda p: p.grad) for name, n in parts.items()}
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_exact_ctc_loss_is_pytorchs():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(3, 12, 5)), requires_grad=True)
    labels = np.array([[1, 1, 2], [3, 0, 0], [4, 4, 4]])
    frames, length = np.array([12, 7, 4]), np.array([3, 1, 3])  # the last cannot be spelled
    losses = functional.ctc_loss(
        logits.log_softmax(2).transpose(0, 1),
        *(torch.tensor(a) for a in (labels, frames, length)),
        reduction="none",
    )
    losses[:2].sum().backward()
    ours = exact.ctc(logits.detach().numpy(), frames, labels, length)
    np.testing.assert_allclose(ours["loss"], losses.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(ours["d_logits"][:2], logits.grad.numpy()[:2], atol=1e-12)
    assert not ours["d_logits"][2].any()  # PyTorch has NaN


def test_products_in_loops_and_in_their_gradient_count_as_often_as_they_run():
    def last(h, w):
        return jax.lax.scan(lambda h, _: (h @ w, None), h, length=7)[0].sum()

    h, w = jnp.ones((2, 3)), jnp.ones((3, 3))
    assert product_flops(last, h, w) == 7 * 2 * 2 * 3 * 3
    assert product_flops(jax.grad(last, (0, 1)), h, w) == 3 * 7 * 2 * 2 * 3 * 3


def run(tmp_path, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    file = tmp_path / "check.json"
    status = command.run(parser.parse_args([*words, "--json", str(file)]))
    return status, json.loads(file.read_text())


def only(*kept):
    """Keep the checks whose names begin so."""
    every = command._checks
    return lambda *arguments: (one for one in every(*arguments) if one[0].startswith(kept))


@pytest.mark.parametrize("wrong", ["", "states", "gradient", "exception"])
def test_a_kernel_that_errs_by_a_thousandth_is_named_and_counted(
    wrong, tmp_path, capsys, monkeypatch
):
    @jax.custom_vjp
    def off(x):
        return x * 1.001 if wrong == "states" else x

    off.defvjp(lambda x: (off(x), None), lambda _, g: (g * (1.001 if wrong == "gradient" else 1),))

    def recurrence(*arguments):
        if wrong == "exception":
            raise RuntimeError("the chip is on fire")
        return off(gru_recurrence(*arguments))

    monkeypatch.setattr(kernels, "gru_recurrence", recurrence)
    monkeypatch.setattr(command, "_checks", only("recurrence scan, float32", "CTC loss scan"))
    status, found = run(tmp_path)
    printed = capsys.readouterr().out
    name = "recurrence scan, float32, odd size"
    assert status == (1 if wrong else 0)
    assert found["disagree"] == ([name] if wrong else [])
    assert ("1 of 3 checks" in printed) == bool(wrong)
    assert (f"DISAGREE: {name}" in printed) == bool(wrong)
    assert ("on fire" in printed) == (wrong == "exception")
    assert [one["status"] for one in found["checks"]] == ["ok", "problem" if wrong else "ok", "ok"]


def test_nan_disagrees():
    assert not kernels.Comparison("one", {"states": float("nan")}, 1.0).agrees
    values = {"losses": [1.0, 2.0]}
    assert not steps.Steps("float32", {"losses": [1.0, float("nan")]}, values, 1.0).agrees
    assert (
        "states is nan"
        in command._compared(
            lambda: kernels.Comparison("one", {"loss": 0.5, "states": float("nan")}, 1.0)
        )[0].found
    )


def test_the_file_of_a_device_that_gives_nan_is_json(tmp_path, monkeypatch):
    errors = {"states": float("nan"), "loss": 1e-7}
    check = functools.partial(command._compared, lambda: kernels.Comparison("one", errors, 1e-5))
    monkeypatch.setattr(command, "_checks", lambda *_: iter([("one", check)]))

    def strict(constant):
        raise AssertionError(f"{constant} is not JSON")

    status, _ = run(tmp_path)
    found = json.loads((tmp_path / "check.json").read_text(), parse_constant=strict)
    assert (status, found["disagree"]) == (1, ["one"])
    assert found["checks"][1]["errors"] == {"states": None, "loss": 1e-7}


def test_steps_with_another_gradient_are_named():
    wanted = {"losses": [39.1, 35.2], "gradient norms": [9.0, 8.0]}
    assert (
        command._stepped("a", iter([steps.Steps("float32", wanted, wanted, 2e-4)]))[0].status
        == "ok"
    )
    other = wanted | {"gradient norms": [9.0, 8.01]}
    finding = command._stepped("a", iter([steps.Steps("float32", other, wanted, 2e-4)]))[0]
    assert finding.status == "problem"
    assert "norms 9, 8.01; needed within 0.0002 of the CPU's losses 39.1, 35.2" in finding.found


def test_steps_behind_others_that_failed_are_said_not_to_have_run():
    def failing():
        yield from ()
        raise RuntimeError("out of memory")

    rest = failing()
    with pytest.raises(RuntimeError):
        command._stepped("a", rest)
    finding, _ = command._stepped("b", rest)
    assert (finding.status, finding.found[:7]) == ("problem", "not run")


def test_a_speed_without_a_measured_limit_has_no_share_of_it(monkeypatch):
    speed = steps.Speed(2, 9, 0.1, 1.0, 10**9)
    monkeypatch.setattr(steps, "speed", lambda *_: speed)
    finding, figures = command._speed("a", steps.SMALL, jax.devices("cpu"), "float32", {})
    assert finding.status == "ok"
    assert "1 GFLOP of products; compiled" in finding.found
    assert figures["share_of_peak"] is None


@pytest.mark.slow
def test_this_machine_passes_the_quick_check(tmp_path):
    status, found = run(tmp_path, "--quick")
    assert (status, found["disagree"]) == (0, [])
    by_name = {one["name"]: one for one in found["checks"]}
    assert min(by_name["speed of demo, float32"][key] for key in ("flops", "seconds")) > 0
    losses = by_name["4 steps of demo, float32"]["found"]["losses"]
    assert len(set(losses)) == 4


def test_the_loss_of_a_label_that_cannot_be_spelled_is_compared_too():
    wanted = {"loss": np.array([np.inf, 2.0])}
    assert kernels._errors({"loss": np.array([np.inf, 2.0])}, wanted) == {"loss": 0.0}
    assert kernels._errors({"loss": np.array([5.0, 2.0])}, wanted) == {"loss": np.inf}
